// Commands, the requests: run, stdin, info, output. Signals are in command_signal.c.
#include "sandbox/command_int.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/enc.h"
#include "sandbox/policy.h"

// ---- the RUN message ----------------------------------------------------------------------------------------------
static struct slice text_slice(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

static int add_arg(struct msg_run *run, const char *text, size_t *total, struct err *err)
{
    *total += strlen(text) + 1;
    if (run->n_args == MSG_ARGS_MAX || *total > LIMIT_ARGS_BYTES)
        return err_set(err, ERR_VALIDATION, "argv_too_large", "argv holds more than %d words or %u bytes", MSG_ARGS_MAX,
                       LIMIT_ARGS_BYTES);
    run->args[run->n_args++] = text_slice(text);
    return 0;
}

static int encode_argv(struct msg_run *run, const struct command_request *r, struct err *err)
{
    size_t total = 0, i;
    json_t *word;
    if (r->shell)
        return add_arg(run, "/bin/sh", &total, err) || add_arg(run, "-c", &total, err) ||
                       add_arg(run, r->shell, &total, err)
                   ? -1
                   : 0;
    json_array_foreach((json_t *)r->argv, i, word) {
        if (add_arg(run, json_string_value(word), &total, err) != 0)
            return -1;
    }
    return 0;
}

// The sandbox's environment with the command's on top, as K=V texts owned by `texts`.
static int encode_env(struct msg_run *run, const struct command_request *r, const char *sandbox_env, json_t *texts,
                      struct err *err)
{
    CLEANUP_JSON json_t *all = sandbox_env ? json_loads(sandbox_env, 0, NULL) : NULL;
    if (!all)
        all = json_object();
    if (r->env)
        json_object_update(all, (json_t *)r->env);
    const char *key;
    json_t *value;
    json_object_foreach(all, key, value) {
        json_t *pair = json_sprintf("%s=%s", key, json_string_value(value));
        if (!pair || run->n_env == MSG_ARGS_MAX)
            return err_set(err, ERR_VALIDATION, "env_too_large", "more than %d environment variables", MSG_ARGS_MAX);
        json_array_append_new(texts, pair);
        run->env[run->n_env++] = text_slice(json_string_value(pair));
    }
    return 0;
}

int command_encode(struct command *c, const struct command_request *r, const char *sandbox_env, struct err *err)
{
    CLEANUP_FREE struct msg_run *run = calloc(1, sizeof *run);
    CLEANUP_JSON json_t *texts = json_array();
    if (!run || !texts)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    run->command_id = text_slice(c->row.id);
    if (encode_argv(run, r, err) != 0 || encode_env(run, r, sandbox_env, texts, err) != 0)
        return -1;
    if (r->cwd)
        run->cwd = text_slice(r->cwd);
    run->user = text_slice(r->user);
    run->timeout_ms = (uint64_t)r->timeout_ms;
    run->has_stdin = c->row.has_stdin;
    run->raw_output = r->internal;
    if (r->internal && r->cwd && r->stdin_open)
        run->write_dir = run->cwd;
    run->make_dir = r->make_dir;
    run->quiet = !r->tell_started && !c->row.has_stdin && !r->internal;
    buf_init(&c->run, FRAME_PAYLOAD_MAX);
    if (msg_run_encode(&c->run, run) != 0 || frame_has_magic(c->run.data, c->run.len))
        return err_set(err, ERR_VALIDATION, "command_too_large", "argv and environment are larger than %u bytes",
                       FRAME_PAYLOAD_MAX);
    return 0;
}

// Keyed hash over the words, each with its length, so that two argvs never hash alike.
static void hash_argv(struct manager *m, const struct command_request *r, char out[static SHA256_HEX])
{
    CLEANUP_FREE char *text = r->argv ? json_dumps(r->argv, JSON_COMPACT) : strdup(r->shell);
    evidence_argv_hmac(m->store, text ? text : "", text ? strlen(text) : 0, out);
}

static char *env_names(const json_t *env)
{
    CLEANUP_JSON json_t *names = json_array();
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)env, key, value) json_array_append_new(names, json_string(key));
    return json_dumps(names, JSON_COMPACT);
}

struct command *command_new(struct sandbox *s, const struct command_request *r, const struct admission *a, int status,
                            struct err *err)
{
    struct command *c = calloc(1, sizeof *c);
    if (!c) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    c->s = s;
    c->a = *a;
    c->success_status = status;
    struct command_row *row = &c->row;
    id_new(ID_COMMAND, row->id);
    id_new(ID_JOB, c->a.job_id);
    snprintf(c->a.sandbox_id, sizeof c->a.sandbox_id, "%s", s->id);
    snprintf(row->tenant, sizeof row->tenant, "%s", s->tenant);
    snprintf(row->sandbox_id, sizeof row->sandbox_id, "%s", s->id);
    snprintf(row->user, sizeof row->user, "%s", r->user);
    snprintf(row->job_id, sizeof row->job_id, "%s", c->a.job_id);
    snprintf(row->audit_id, sizeof row->audit_id, "%s", a->audit_id);
    snprintf(row->receipt_id, sizeof row->receipt_id, "%s", a->receipt_id);
    row->phase = COMMAND_ADMITTED;
    row->timeout_ms = r->timeout_ms;
    row->max_output_bytes = r->max_output_bytes;
    row->background = r->background;
    row->check = r->check;
    row->internal = r->internal;
    row->has_stdin = r->stdin_open || r->stdin_len > 0;
    row->created_at_ms = clock_wall_ms();
    row->env_names_json = env_names(r->env);
    hash_argv(s->m, r, row->argv_hmac);
    if (r->stdin_len > 0) {
        c->inline_stdin = malloc(r->stdin_len);
        c->inline_len = r->stdin_len;
        if (c->inline_stdin)
            memcpy(c->inline_stdin, r->stdin_text, r->stdin_len);
    }
    struct sandbox_info *view = sandbox_view(s);
    const int failed = command_encode(c, r, r->internal ? NULL : view->row.env_json, err);
    sandbox_info_unref(view);
    if (failed || (r->stdin_len > 0 && !c->inline_stdin)) {
        command_free(c);
        return NULL;
    }
    return c;
}

// ---- admission --------------------------------------------------------------------------------------------------
static int admit_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct command *c = arg;
    CLEANUP_JSON json_t *facts = json_object();
    json_put_str(facts, "command_id", c->row.id);
    json_put_str(facts, "user", c->row.user);
    json_put_str(facts, "argv_hmac", c->row.argv_hmac);
    const struct change change = {.admit = &c->a, .admit_facts = facts, .job_insert = &c->job};
    if (change_apply(tx, &change, err) != 0)
        return -1;
    return command_insert(tx, &c->row, LIMIT_COMMANDS_RUNNING, err);
}

static void unlist_locked(struct command *c)
{
    for (struct command **at = &c->s->commands; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            c->s->n_commands--;
            break;
        }
    c->listed = false;
}

static void refuse(struct command *c, const struct err *err)
{
    if (c->archive) {
        c->err = *err;
        archive_finished(c);
    } else {
        c->cb.done(c->cb.arg, NULL, err);
    }
    command_free(c);
}

// Durable: send it to the guest.
static void admitted(void *arg, const struct err *err)
{
    struct command *c = arg;
    struct sandbox *s = c->s;
    if (err) {
        const struct err copy = *err;
        pthread_mutex_lock(&s->lock);
        const bool ending = c->finishing; // its outcome is queued behind us and answers
        if (ending)
            c->err = copy;
        else
            unlist_locked(c);
        pthread_mutex_unlock(&s->lock);
        if (!ending)
            refuse(c, &copy);
        sandbox_unref(s);
        return;
    }
    struct err send_err = {0};
    atomic_fetch_add(&s->m->commands_run, 1);
    pthread_mutex_lock(&s->lock);
    c->durable = true;
    c->sent_ms = clock_mono_ms();
    bool sent = false;
    if (s->vm && s->session && !c->finishing) {
        c->seen = s->session_no;
        sent = vm_send(s->vm, FRAME_RUN, c->row.agent_id, &c->run, &send_err) == 0;
    }
    buf_free(&c->run);
    c->sent = sent;
    if (sent) { // the moment that the guest starts it, but for the way there
        c->row.phase = COMMAND_RUNNING_;
        c->row.started_at_ms = clock_wall_ms();
    }
    if (!sent && !c->finishing)
        command_finish_locked(c, OUTCOME_LOST);
    pthread_mutex_unlock(&s->lock);
    sandbox_unref(s);
}

// Inline stdin outlives the server: kept beside the output until the command has ended.
static int keep_stdin(struct command *c, struct err *err)
{
    char name[ID_MAX + 8];
    snprintf(name, sizeof name, "%s.stdin", c->row.id);
    if (c->inline_len == 0 || fd_write_file_atomic(c->s->out_dirfd, name, c->inline_stdin, c->inline_len, 0600) == 0)
        return 0;
    if (errno == ENOSPC)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the command's input");
    return err_sys(err, errno, "keeping a command's stdin");
}

static void submit(void *arg)
{
    struct command *c = arg;
    struct err err = {0};
    if (keep_stdin(c, &err) != 0) {
        admitted(c, &err);
    } else if (store_submit(c->s->m->store, admit_tx, admitted, c) != 0) {
        err_set(&err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
        admitted(c, &err);
    }
}

void command_launch(struct command *c, const struct command_request *r)
{
    struct sandbox *s = c->s;
    struct manager *m = s->m;
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    int refused = sandbox_require_running(s, &err);
    if (!refused && s->n_commands >= LIMIT_COMMANDS_RUNNING) {
        refused = err_set(&err, ERR_RATE_LIMITED, "too_many_commands", "%d commands run in this sandbox already",
                          LIMIT_COMMANDS_RUNNING);
        err_remedy(&err, "wait for one to end, or signal it");
    }
    if (!refused) {
        c->row.agent_id = vm_next_id(s->vm); // recorded: who continues from a paused guest after a restart cannot ask for it
        c->next = s->commands;
        s->commands = c;
        s->n_commands++;
        c->listed = true;
    }
    pthread_mutex_unlock(&s->lock);
    if (refused || store_reserve_check(m->store, &err) != 0) {
        pthread_mutex_lock(&s->lock);
        if (c->listed)
            unlist_locked(c);
        pthread_mutex_unlock(&s->lock);
        refuse(c, &err);
        return;
    }
    job_begin(&c->job, &c->a, c->a.operation);
    snprintf(c->job.ref, sizeof c->job.ref, "%s", c->row.id);
    sandbox_ref(s); // until admitted() has run
    if (c->inline_len == 0 || work_submit(m->io, submit, c) != 0)
        submit(c);
    (void)r;
}

static int answer(const struct command_callbacks *cb, const struct err *err)
{
    cb->done(cb->arg, NULL, err);
    return 0;
}

// The sandbox for an act inside it: live, or the right refusal (destroyed: 409, otherwise 404).
static struct sandbox *find_for_act(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    struct sandbox *s = registry_find(m, tenant, id, NULL);
    if (s)
        return s;
    struct sandbox_info *view = manager_get(m, tenant, id, err);
    if (view) {
        sandbox_info_unref(view);
        err_set(err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is destroyed");
        err_remedy(err, "create a new sandbox");
    }
    return NULL;
}

int command_run(struct manager *m, const char *sandbox_id, const struct command_request *r, const struct admission *a,
                int success_status, const struct command_callbacks *cb)
{
    struct err err = {0};
    if (policy_env(r->env, &err) != 0)
        return answer(cb, &err);
    struct sandbox *s = find_for_act(m, a->tenant, sandbox_id, &err);
    if (!s)
        return answer(cb, &err);
    struct command *c = command_new(s, r, a, success_status, &err);
    if (c) {
        c->cb = *cb;
        command_launch(c, r);
    } else {
        answer(cb, &err);
    }
    sandbox_unref(s);
    return 0;
}

// ---- looking ----------------------------------------------------------------------------------------------------
int command_info(struct manager *m, const char *tenant, const char *sandbox_id, const char *id, struct command_row *ret,
                 struct err *err)
{
    struct sandbox *s = registry_find(m, tenant, sandbox_id, NULL);
    if (s) {
        pthread_mutex_lock(&s->lock);
        struct command *c = command_by_id(s, id);
        const bool found = c && !c->row.internal && command_row_copy(ret, &c->row) == 0;
        if (found) {
            ret->phase = COMMAND_RUNNING_;
            ret->outcome = OUTCOME_NONE;
            for (int i = 0; i < 2; i++)
                *(i ? &ret->stderr_bytes : &ret->stdout_bytes) = (int64_t)c->spooled[i];
            ret->stdin_bytes = (int64_t)c->stdin_sent;
        }
        pthread_mutex_unlock(&s->lock);
        sandbox_unref(s);
        if (found)
            return 0;
    }
    const int got = command_get(m->store, tenant, sandbox_id, id, ret, err);
    if (got == 0 && !ret->internal)
        return 0;
    if (got == 0)
        command_row_free(ret);
    if (got >= 0)
        *err = not_found_error();
    return -1;
}

struct spool_reader *command_output(struct manager *m, const char *tenant, const char *sandbox_id, const char *id,
                                    struct err *err)
{
    struct command_row row = {0};
    if (command_info(m, tenant, sandbox_id, id, &row, err) != 0)
        return NULL;
    command_row_free(&row);
    char path[2 * ID_MAX + 8];
    snprintf(path, sizeof path, "%s/out", sandbox_id);
    CLEANUP_FD int dirfd = openat(m->sandboxes_dirfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0) {
        *err = not_found_error();
        return NULL;
    }
    return spool_reader_open(dirfd, id, err);
}

// A live sandbox and an existing command, running or not; the refusal otherwise.
struct sandbox *command_find(struct manager *m, const char *tenant, const char *sandbox_id, const char *id,
                             bool *ret_running, struct err *err)
{
    struct command_row row = {0};
    if (command_info(m, tenant, sandbox_id, id, &row, err) != 0)
        return NULL;
    *ret_running = row.phase != COMMAND_FINISHED;
    command_row_free(&row);
    if (!*ret_running) {
        err_set(err, ERR_CONFLICT, "not_running", "the command has finished");
        return NULL;
    }
    return find_for_act(m, tenant, sandbox_id, err);
}

// ---- stdin ------------------------------------------------------------------------------------------------------
struct stdin_call {
    struct act act;
    struct sandbox *s;
    char id[ID_MAX];
    uint8_t *data;
    size_t len, given;
    int64_t offset, total;
    bool eof;
    void (*done)(void *arg, int64_t total, const struct err *err);
    void *arg;
};

void stdin_call_end(struct command *c, const struct err *err)
{
    struct stdin_call *call = c->stdin_call;
    c->stdin_call = NULL;
    call->total = (int64_t)c->stdin_sent;
    call->act.facts = json_object();
    json_put_str(call->act.facts, "command_id", call->id);
    json_put_int(call->act.facts, "bytes", (int64_t)call->given);
    act_end(&call->act, err);
}

// Gives what fits between what was sent and what the guest has taken plus one window.
static size_t feed(struct command *c, const uint8_t *data, size_t len, bool last, struct err *err)
{
    const uint64_t window = VM_WINDOW_BYTES - (c->stdin_sent - c->stdin_credit);
    const size_t n = len < window ? len : (size_t)window;
    const bool end = last && n == len;
    if (n == 0 && !end)
        return 0;
    if (vm_send_data(c->s->vm, FRAME_STDIN, c->row.agent_id, MSG_STDIN, c->stdin_sent, data, n, end, err) != 0)
        return 0;
    c->stdin_sent += n;
    c->stdin_eof_sent = end;
    return n;
}

void command_feed_locked(struct command *c)
{
    struct err err = {0};
    if (!c->known || c->exited || !c->s->vm || !c->s->session)
        return;
    if (c->inline_stdin && !c->stdin_eof_sent && c->stdin_sent <= c->inline_len)
        feed(c, (uint8_t *)c->inline_stdin + c->stdin_sent, c->inline_len - c->stdin_sent, true, &err);
    struct stdin_call *call = c->stdin_call;
    if (call && !c->stdin_eof_sent) {
        call->given += feed(c, call->data + call->given, call->len - call->given, call->eof, &err);
        const bool all = call->given == call->len && (!call->eof || c->stdin_eof_sent);
        if (all || (err.kind != ERR_NONE && strcmp(err.code, "channel_busy") != 0))
            stdin_call_end(c, all ? NULL : &err);
    }
}

static void stdin_go(struct act *act)
{
    struct stdin_call *call = (struct stdin_call *)act;
    struct sandbox *s = call->s;
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    struct command *c = command_by_id(s, call->id);
    if (!c || c->exited || c->finishing)
        err_set(&err, ERR_CONFLICT, "not_running", "the command has finished");
    else if (!c->row.has_stdin || c->inline_stdin)
        err_set(&err, ERR_CONFLICT, "stdin_closed", "the command was started without an open stdin");
    else if (c->stdin_eof_sent)
        err_set(&err, ERR_CONFLICT, "stdin_closed", "the command's stdin was closed before");
    else if (c->stdin_call)
        err_set(&err, ERR_CONFLICT, "stdin_busy", "another request feeds this stdin now");
    else if (call->offset >= 0 && (uint64_t)call->offset != c->stdin_sent)
        err_set(&err, ERR_CONFLICT, "stdin_offset", "stdin is at offset %llu", (unsigned long long)c->stdin_sent);
    else if (sandbox_require_running(s, &err) == 0) {
        c->stdin_call = call;
        command_feed_locked(c);
    }
    pthread_mutex_unlock(&s->lock);
    if (err.kind != ERR_NONE)
        act_end(act, &err);
}

static void stdin_done(struct act *act, const struct err *err)
{
    struct stdin_call *call = (struct stdin_call *)act;
    call->done(call->arg, call->total, err);
    sandbox_unref(call->s);
    free(call->data);
    free(call);
}

int command_stdin(struct manager *m, const char *sandbox_id, const char *id, const void *data, size_t len,
                  int64_t offset, bool eof, const struct admission *a, int success_status,
                  void (*done)(void *arg, int64_t total, const struct err *err), void *arg)
{
    struct err err = {0};
    bool running;
    struct sandbox *s = command_find(m, a->tenant, sandbox_id, id, &running, &err);
    struct stdin_call *call = s ? calloc(1, sizeof *call) : NULL;
    if (call && !(call->data = malloc(len + 1))) {
        free(call);
        call = NULL;
    }
    if (!call) {
        if (s)
            err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        sandbox_unref(s);
        done(arg, 0, &err);
        return 0;
    }
    memcpy(call->data, data, len);
    call->act = (struct act){.m = m, .a = *a, .status = success_status, .go = stdin_go, .done = stdin_done};
    snprintf(call->act.a.sandbox_id, sizeof call->act.a.sandbox_id, "%s", sandbox_id);
    call->s = s;
    call->len = len;
    call->offset = offset;
    call->eof = eof;
    call->done = done;
    call->arg = arg;
    snprintf(call->id, sizeof call->id, "%s", id);
    act_begin(&call->act);
    return 0;
}
