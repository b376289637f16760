// Commands: run, list, get, wait, signal, stdin, output.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/output.h"
#include "api/principal.h"
#include "api/problem.h"
#include "api/pump.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/clock.h"
#include "base/fd.h"
#include "sandbox/command.h"

// ---- run ----------------------------------------------------------------------------------------------------------
struct run {
    struct api_call *c;           // a reference
    bool background, check, stream;
    char command_id[ID_MAX];
    struct command_row row;       // a copy
    struct err err;
};

static void run_free(struct run *r)
{
    call_unref(r->c);
    command_row_free(&r->row);
    free(r);
}

static void reply_stream_of(struct api_call *c, const char *command_id)
{
    struct err err = {0};
    struct output *o = output_new(c, c->in->ids[0], command_id, -1, 0, &err);
    if (o)
        sse_reply(c, &OUTPUT_SOURCE, o, command_id);
    else
        call_fail(c, &err);
}

static void reply_background(struct api_call *c, const char *command_id)
{
    struct command_row row = {0};
    struct err err = {0};
    if (command_info(c->a->manager, c->who->row.tenant, c->in->ids[0], command_id, &row, &err) != 0) {
        call_fail(c, &err);
        return;
    }
    reply_header(c, "Location", call_textf(c, "/v1/sandboxes/%s/commands/%s", row.sandbox_id, row.id));
    if (c->in->prefer_async)
        reply_header(c, "Preference-Applied", "respond-async");
    reply_json(c, 202, view_command(c, &row));
    command_row_free(&row);
}

static bool check_failed(const struct command_row *row)
{
    return row->outcome != OUTCOME_EXITED || row->exit_code != 0;
}

static void reply_result(struct api_call *c, const struct command_row *row, bool check)
{
    if (!check || !check_failed(row)) {
        reply_json(c, 200, view_command_result(c, row));
        return;
    }
    struct err *err = &c->in->err;
    err_set(err, ERR_GUEST_COMMAND_FAILED, "check_failed", "the command did not exit with 0");
    err_remedy(err, "look at result");
    snprintf(c->in->a.job_id, sizeof c->in->a.job_id, "%s", row->job_id);
    c->in->admitted = true;
    c->in->extra = json_object();
    json_put(c->in->extra, "result", view_command_result(c, row));
    reply_problem(c);
}

// Admitted: the moment for the answers that do not wait.
static void answer_early(void *arg)
{
    struct run *r = arg;
    struct api_call *c = r->c;
    if (r->stream)
        reply_stream_of(c, r->command_id);
    else if (r->background)
        reply_background(c, r->command_id);
    else
        view_reply_accepted(c);
    run_free(r);
}

static void answer_late(void *arg)
{
    struct run *r = arg;
    if (r->err.kind != ERR_NONE)
        call_fail(r->c, &r->err);
    else
        reply_result(r->c, &r->row, r->check);
    run_free(r);
}

static void on_admitted(void *arg, const char *command_id, const char *job_id)
{
    struct run *r = arg;
    struct api_call *c = r->c;
    c->in->admitted = true;
    snprintf(c->in->a.job_id, sizeof c->in->a.job_id, "%s", job_id);
    snprintf(r->command_id, sizeof r->command_id, "%s", command_id);
    if (!r->background && !r->stream && !c->in->prefer_async)
        return;
    struct run *early = calloc(1, sizeof *early); // r is still done's
    if (!early)
        return;
    *early = *r;
    early->c = call_ref(c);
    c->handed = true;
    if (work_submit(c->a->pool, answer_early, early) != 0)
        answer_early(early);
}

static void on_done(void *arg, const struct command_row *row, const struct err *err)
{
    struct run *r = arg;
    if (r->c->handed) {
        run_free(r);
        return;
    }
    if (err)
        r->err = *err;
    else if (command_row_copy(&r->row, row) != 0)
        err_set(&r->err, ERR_INTERNAL, "out_of_memory", "out of memory");
    // One that said nothing is answered here, on the writer's thread: there is no spool to be read.
    const bool silent = !err && !r->check && r->row.stdout_bytes == 0 && r->row.stderr_bytes == 0;
    if ((silent && r->err.kind == ERR_NONE) || work_submit(r->c->a->pool, answer_late, r) != 0)
        answer_late(r);
}

// Rules of argv that no schema says.
static void check_argv(struct api_call *c, const json_t *argv)
{
    size_t i, total = 0;
    const json_t *word;
    json_array_foreach(argv, i, word) total += json_string_length(word) + 1;
    if (total > LIMIT_ARGS_BYTES)
        faults_add(call_faults(c), "/argv", "must have at most %u bytes together", LIMIT_ARGS_BYTES);
    if (argv && json_string_length(json_array_get(argv, 0)) == 0)
        faults_add(call_faults(c), "/argv/0", "must not be empty");
}

static int64_t timeout_ms_of(const json_t *body)
{
    const json_t *t = json_object_get(body, "timeout_seconds");
    return t ? (int64_t)(json_number_value(t) * 1000 + 0.5) : LIMIT_COMMAND_TIMEOUT_S_DEFAULT * 1000;
}

static void run(struct api_call *c)
{
    const json_t *body = c->in->json, *input = json_object_get(body, "stdin");
    const char *user = json_get_str(body, "user");
    check_argv(c, json_object_get(body, "argv"));
    if (input && json_string_length(input) > LIMIT_STDIN_INLINE_BYTES)
        faults_add(call_faults(c), "/stdin", "must have at most %u bytes", LIMIT_STDIN_INLINE_BYTES);
    if (call_has_faults(c)) {
        call_invalid(c);
        return;
    }
    struct run *r = calloc(1, sizeof *r);
    if (!r) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    r->background = json_is_true(json_object_get(body, "background"));
    r->check = json_is_true(json_object_get(body, "check"));
    r->stream = c->in->accept_stream && !r->background;
    const struct command_request request = {
        .argv = json_object_get(body, "argv"),
        .shell = json_get_str(body, "shell"),
        .cwd = json_get_str(body, "cwd"),
        .env = json_object_get(body, "env"),
        .user = user ? user : "sandbox",
        .stdin_text = json_string_value(input),
        .stdin_len = json_string_length(input),
        .stdin_open = r->background && !input,
        .tell_started = r->background || r->stream || c->in->prefer_async,
        .timeout_ms = timeout_ms_of(body),
        .max_output_bytes = json_get_int(body, "max_output_bytes", LIMIT_OUTPUT_ANSWER_DEFAULT),
        .background = r->background,
        .check = r->check,
    };
    if (!call_user_allowed(c, request.user)) {
        free(r);
        return;
    }
    r->c = call_ref(c);
    const struct command_callbacks cb = {on_admitted, on_done, r};
    const int status = r->background || (c->in->prefer_async && !r->stream) ? 202 : 200;
    command_run(c->a->manager, c->in->ids[0], &request, call_admission(c), status, &cb);
}

// The command of a stored answer: its reference, or that of its job while it runs.
static bool replayed_command(struct api_call *c, char out[static ID_MAX])
{
    struct job_row job = {0};
    struct err err = {0};
    snprintf(out, ID_MAX, "%s", c->in->replay->ref);
    if (!*out && job_get(c->a->store, c->who->row.tenant, c->in->replay->job_id, &job, &err) == 0) {
        snprintf(out, ID_MAX, "%s", job.ref);
        job_row_free(&job);
    }
    return strncmp(out, "cmd", 3) == 0;
}

static void replay_run(struct api_call *c)
{
    char id[ID_MAX];
    struct command_row row = {0};
    struct err err = {0};
    const json_t *body = json_parse_strict(buf_text(&c->in->body), c->in->body.len, &err);
    const bool background = json_is_true(json_object_get(body, "background"));
    const bool check = json_is_true(json_object_get(body, "check"));
    json_decref((json_t *)body);
    const bool known = replayed_command(c, id);
    const bool stream = c->in->accept_stream && !background;
    if ((c->in->prefer_async || c->in->replay->status == 202) && *c->in->replay->job_id && !stream && !background) {
        view_reply_accepted(c);
        return;
    }
    if (!known || (!stream && !background && !check)) {
        if (replay_is_problem(c))
            return;
    }
    if (!known)
        err_set(&err, ERR_INTERNAL, "replay", "the stored answer cannot be rebuilt");
    else if (stream) {
        reply_stream_of(c, id);
        return;
    } else if (background) {
        reply_background(c, id);
        return;
    } else if (command_info(c->a->manager, c->who->row.tenant, c->in->ids[0], id, &row, &err) == 0) {
        if (row.outcome != OUTCOME_SPAWN_FAILED || !replay_is_problem(c))
            reply_result(c, &row, check);
        command_row_free(&row);
        return;
    }
    c->in->admitted = false;
    call_fail(c, &err);
}

// ---- reads ----------------------------------------------------------------------------------------------------------
// The row of the command in the path, or the answer that there is none.
static bool row_of(struct api_call *c, struct command_row *ret)
{
    struct err err = {0};
    if (command_info(c->a->manager, c->who->row.tenant, c->in->ids[0], c->in->ids[1], ret, &err) == 0)
        return true;
    call_fail(c, &err);
    return false;
}

struct command_page {
    struct list l; // first: list_add's
    struct api_call *c;
};

// One that still runs is told as it is now, not as it was last written down.
static bool list_one(void *arg, const struct command_row *row)
{
    struct command_page *p = arg;
    struct command_row live;
    struct err ignored = {0};
    if (row->internal)
        return true;
    if (row->phase == COMMAND_FINISHED ||
        command_info(p->c->a->manager, row->tenant, row->sandbox_id, row->id, &live, &ignored) != 0)
        return list_add(&p->l, row->id, view_command_summary(row));
    const bool more = list_add(&p->l, live.id, view_command_summary(&live));
    command_row_free(&live);
    return more;
}

static void list(struct api_call *c)
{
    struct command_page p = {.c = c};
    struct err err = {0};
    if (!list_begin(&p.l, c))
        return;
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    const int failed = !info || command_list(c->a->store, &p.l.page, c->in->ids[0], list_one, &p, &err) != 0;
    sandbox_info_unref(info);
    list_reply(&p.l, failed, &err);
}

static void get(struct api_call *c)
{
    struct command_row row = {0};
    if (!row_of(c, &row))
        return;
    reply_json(c, 200, view_command(c, &row));
    command_row_free(&row);
}

struct wait {
    char sandbox_id[ID_MAX], id[ID_MAX];
    int64_t until_ms;
};

static void wait_over(struct api_call *c)
{
    free((void *)c->body_owner);
    c->body_owner = NULL;
    c->body_release = NULL;
}

static enum pump_next wait_step(struct pump *p)
{
    struct api_call *c = p->c;
    const struct wait *w = c->body_owner;
    struct command_row row = {0};
    struct err err = {0};
    if (pump_gone(p))
        return PUMP_DONE;
    const int failed = command_info(c->a->manager, c->who->row.tenant, w->sandbox_id, w->id, &row, &err);
    const int64_t left = w->until_ms - clock_mono_ms();
    if (!failed && row.phase != COMMAND_FINISHED && left > 0 && !atomic_load(&c->a->stopping)) {
        command_row_free(&row);
        pump_after(p, left < 1000 ? left : 1000);
        return PUMP_WAIT;
    }
    wait_over(c);
    if (failed)
        call_fail(c, &err);
    else
        reply_json(c, 200, view_command(c, &row));
    command_row_free(&row);
    return PUMP_DONE;
}

static void free_wait(const void *w)
{
    free((void *)w);
}

static void wait_for(struct api_call *c)
{
    struct wait *w = calloc(1, sizeof *w);
    const struct param_value *timeout = call_param(c, "timeout_seconds");
    if (w) {
        memcpy(w->sandbox_id, c->in->ids[0], sizeof w->sandbox_id);
        memcpy(w->id, c->in->ids[1], sizeof w->id);
        w->until_ms = clock_mono_ms() + (timeout->given ? (int64_t)(timeout->number * 1000) : 60000);
        c->body_owner = w;
        c->body_release = free_wait;
    }
    if (!w || pump_start(c, w->id, wait_step) != 0) {
        struct err err = {0};
        wait_over(c);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
    }
}

// ---- output ---------------------------------------------------------------------------------------------------------
static void follow(struct api_call *c)
{
    static const char *const REFUSED[] = {"offset", "limit"};
    struct err err = {0};
    for (size_t i = 0; i < 2; i++)
        if (call_param(c, REFUSED[i])->given)
            faults_add(call_faults(c), i ? "/query/limit" : "/query/offset", "must not stand beside follow");
    if (call_has_faults(c)) {
        call_invalid(c);
        return;
    }
    const char *stream = call_param_text(c, "stream", NULL);
    const int only = !stream ? -1 : strcmp(stream, "stderr") == 0 ? SPOOL_STDERR : SPOOL_STDOUT;
    const char *last = call_param_text(c, "Last-Event-ID", "0");
    char id[ID_MAX];
    memcpy(id, c->in->ids[1], sizeof id);
    struct output *o = output_new(c, c->in->ids[0], id, only, strtoull(last, NULL, 10), &err);
    if (o) {
        call_admission(c);
        sse_reply(c, &OUTPUT_SOURCE, o, id);
    } else if (err.kind == ERR_VALIDATION) {
        faults_add(call_faults(c), "/header/Last-Event-ID", "lies past the end of the output");
        call_invalid(c);
    } else {
        call_fail(c, &err);
    }
}

// Bytes of one stream, at most limit; ret_more: there was a byte after them.
static int read_bytes(struct api_call *c, enum spool_stream stream, uint64_t offset, uint64_t limit, struct buf *out,
                      bool *ret_more, struct err *err)
{
    struct spool_reader *r = command_output(c->a->manager, c->who->row.tenant, c->in->ids[0], c->in->ids[1], err);
    int64_t n = r ? 0 : -1;
    while (r && out->len < limit) {
        const uint64_t want = limit - out->len < 65536 ? limit - out->len : 65536;
        if (!buf_reserve(out, want)) {
            n = err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
            break;
        }
        n = spool_read(r, stream, offset + out->len, out->data + out->len, want, err);
        if (n <= 0)
            break;
        out->len += (size_t)n;
    }
    uint8_t one;
    *ret_more = n >= 0 && r && spool_read(r, stream, offset + out->len, &one, 1, err) > 0;
    spool_reader_close(r);
    return n < 0 ? -1 : 0;
}

static void output(struct api_call *c)
{
    if (call_param_flag(c, "follow")) {
        follow(c);
        return;
    }
    struct command_row row = {0};
    struct err err = {0};
    if (!row_of(c, &row))
        return;
    const bool finished = row.phase == COMMAND_FINISHED;
    const bool second = strcmp(call_param_text(c, "stream", "stdout"), "stderr") == 0;
    const int64_t produced = second ? row.stderr_bytes : row.stdout_bytes;
    command_row_free(&row);
    const uint64_t offset = (uint64_t)call_param_integer(c, "offset", 0);
    const uint64_t limit = (uint64_t)call_param_integer(c, "limit", 1 << 20);
    CLEANUP_BUF struct buf b = BUF_INIT(LIMIT_OUTPUT_ANSWER_MAX + 65536);
    bool more = false;
    int failed = read_bytes(c, second ? SPOOL_STDERR : SPOOL_STDOUT, offset, limit, &b, &more, &err);
    if (!failed && b.len == 0 && offset > (uint64_t)produced)
        failed = err_set(&err, ERR_RANGE, "range_not_satisfiable", "the offset lies past what the command has written");
    if (failed) {
        call_fail(c, &err);
        return;
    }
    const size_t len = b.len;
    reply_header(c, "Airlock-Next-Offset", call_textf(c, "%" PRIu64, offset + len));
    reply_header(c, "Airlock-Complete", finished && !more ? "true" : "false");
    reply_header(c, "X-Content-Type-Options", "nosniff");
    call_admission(c);
    buf_reserve(&b, 1);
    char *text = buf_steal(&b);
    reply_text(c, 200, "application/octet-stream", text ? text : strdup(""), len);
}

const struct handler COMMAND_HANDLERS[] = {
    {"command.run", RUN_ASYNC, run, NULL, replay_run},
    {"command.list", RUN_POOLED, list, NULL, NULL},
    {"command.get", RUN_POOLED, get, NULL, NULL},
    {"command.wait", RUN_ASYNC, wait_for, NULL, NULL},
    {"command.output", RUN_POOLED, output, NULL, NULL},
    {0},
};
