// Commands, what the guest says of them, and the outcome: one transaction with job, receipt and event.
#include "sandbox/command_int.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct command *command_by_agent_id(struct sandbox *s, uint64_t id)
{
    struct command *c = s->commands;
    while (c && !(c->sent && c->row.agent_id == id))
        c = c->next;
    return c;
}

struct command *command_by_id(struct sandbox *s, const char *id)
{
    struct command *c = s->commands;
    while (c && strcmp(c->row.id, id) != 0)
        c = c->next;
    return c;
}

void command_free(struct command *c)
{
    if (!c)
        return;
    while (c->pending) {
        struct piece *next = c->pending->next;
        free(c->pending);
        c->pending = next;
    }
    spool_close(c->spool);
    buf_free(&c->run);
    free(c->inline_stdin);
    json_decref(c->facts);
    free(c->problem);
    command_row_free(&c->row);
    job_row_free(&c->job);
    free(c);
}

// ---- what the guest says ------------------------------------------------------------------------------------------
static enum command_outcome outcome_of(uint64_t told)
{
    switch ((enum msg_outcome)told) {
    case MSG_EXITED:
        return OUTCOME_EXITED;
    case MSG_SIGNALED:
        return OUTCOME_SIGNALED;
    case MSG_TIMED_OUT:
        return OUTCOME_TIMED_OUT;
    case MSG_KILLED:
        return OUTCOME_KILLED;
    case MSG_SPAWN_FAILED:
        return OUTCOME_SPAWN_FAILED;
    }
    return OUTCOME_LOST; // a number of the guest's own making
}

static const char *errno_words(uint64_t number)
{
    switch (number) {
    case ENOENT:
        return "no such file";
    case EACCES:
        return "permission denied";
    case ENOEXEC:
        return "not an executable format";
    case ENOTDIR:
        return "not a directory";
    case ELOOP:
        return "too many symbolic links";
    case E2BIG:
        return "argument list too long";
    case ENOMEM:
        return "the guest is out of memory";
    case EAGAIN:
        return "the guest can start no more processes";
    default:
        return "it could not be started";
    }
}

static void describe_spawn(struct command_row *row, const struct msg_command *m)
{
    const char *what = m->spawn_stage == MSG_SPAWN_CWD      ? "working directory"
                       : m->spawn_stage == MSG_SPAWN_USER   ? "user"
                       : m->spawn_stage == MSG_SPAWN_ROOTS  ? "directory outside the writable roots"
                       : m->spawn_stage == MSG_SPAWN_SYSTEM ? "process"
                                                            : "program";
    if (m->spawn_stage == MSG_SPAWN_OK)
        return;
    if (m->spawn_stage == MSG_SPAWN_USER)
        snprintf(row->spawn_error, sizeof row->spawn_error, "user: no such user in the guest");
    else
        snprintf(row->spawn_error, sizeof row->spawn_error, "%s: %s", what, errno_words(m->spawn_errno));
}

static void note_exit_locked(struct command *c, const struct msg_command *m)
{
    struct command_row *row = &c->row;
    if (c->exited)
        return;
    c->exited = true;
    c->exit_seen_ms = clock_mono_ms();
    row->outcome = outcome_of(m->outcome);
    row->exit_code = (int)(m->exit_code & 0xff);
    row->signal = (int)(m->signal & 0x7f);
    row->duration_ms = m->duration_ms < 0 ? 0 : m->duration_ms;
    c->total[0] = m->stdout_bytes;
    c->total[1] = m->stderr_bytes;
    describe_spawn(row, m);
    if (c->stdin_call) {
        struct err err = {0};
        err_set(&err, ERR_CONFLICT, "not_running", "the command has finished");
        stdin_call_end(c, &err);
    }
    if (c->tail_len[0] || c->tail_len[1])
        io_schedule_locked(c->s);
    command_try_finish_locked(c);
}

static bool slice_is(struct slice s, const char *text)
{
    return s.len == strlen(text) && memcmp(s.data, text, s.len) == 0;
}

static struct command *by_slice(struct sandbox *s, struct slice id)
{
    struct command *c = s->commands;
    while (c && !slice_is(id, c->row.id))
        c = c->next;
    return c;
}

static void forget(struct sandbox *s, uint64_t id)
{
    struct err err = {0};
    if (s->vm && s->session)
        (void)vm_send(s->vm, FRAME_FORGET, id, NULL, &err);
}

// ---- telling the caller -------------------------------------------------------------------------------------------
// True for the one caller that then has to call tell_admitted, not under the lock. The command stays until it has.
static bool tell_begin_locked(struct command *c)
{
    if (!c->durable || c->told != TOLD_NOTHING || !c->cb.admitted)
        return false;
    c->told = TELLING;
    return true;
}

static void conclude(struct command *c)
{
    struct sandbox *s = c->s;
    if (c->archive)
        archive_finished(c);
    else if (c->cb.done)
        c->cb.done(c->cb.arg, c->err.kind == ERR_NONE ? &c->row : NULL, c->err.kind == ERR_NONE ? NULL : &c->err);
    command_free(c);
    sandbox_unref(s);
}

static void tell_admitted(struct command *c)
{
    c->cb.admitted(c->cb.arg, c->row.id, c->row.job_id);
    pthread_mutex_lock(&c->s->lock);
    c->told = TOLD;
    const bool concluded = c->concluded;
    pthread_mutex_unlock(&c->s->lock);
    if (concluded)
        conclude(c);
}

void commands_on_frame(struct sandbox *s, int type, uint64_t id, const struct msg_command *m)
{
    struct transfer *wake = NULL;
    pthread_mutex_lock(&s->lock);
    struct command *c = command_by_agent_id(s, id);
    if (type == FRAME_COMMAND_STATE) {
        if (!c)
            c = by_slice(s, m->command_id);
        if (c) {
            c->sent = c->known = true;
            if (!c->row.started_at_ms) // an earlier server heard when; it was a moment after
                c->row.started_at_ms = c->row.created_at_ms;
            c->seen = s->session_no + 1;
            c->row.agent_id = id;
            c->stdin_credit = m->stdin_bytes;
            c->stdin_sent = m->stdin_received > m->stdin_bytes ? m->stdin_received : m->stdin_bytes;
            c->stdin_eof_sent = m->stdin_closed;
        } else if (s->n_forget < sizeof s->forget / sizeof *s->forget) {
            s->forget[s->n_forget++] = id; // told when the session is up
        }
    }
    if (c && type == FRAME_STARTED) {
        c->known = true;
        command_feed_locked(c);
        wake = archive_known_locked(c);
    }
    const bool tell = c && type == FRAME_STARTED && tell_begin_locked(c);
    if (c && m->phase == MSG_COMMAND_EXITED)
        note_exit_locked(c, m);
    pthread_mutex_unlock(&s->lock);
    if (wake)
        archive_wake(wake);
    if (tell)
        tell_admitted(c);
    if (c && type == FRAME_STARTED)
        hub_notify(s->m->hub, s->id);
}

void commands_on_stdin_credit(struct sandbox *s, uint64_t id, uint64_t offset)
{
    pthread_mutex_lock(&s->lock);
    struct command *c = command_by_agent_id(s, id);
    struct transfer *wake = NULL;
    if (c && offset <= c->stdin_sent && offset > c->stdin_credit) {
        c->stdin_credit = offset;
        command_feed_locked(c);
        wake = c->archive ? archive_ref(c) : NULL;
    }
    pthread_mutex_unlock(&s->lock);
    if (wake)
        archive_wake(wake);
}

// A session is up: send output again from where we are; what the agent does not know was lost on the way.
void commands_on_ready(struct sandbox *s)
{
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    for (unsigned i = 0; i < s->n_forget; i++)
        forget(s, s->forget[i]);
    s->n_forget = 0;
    for (struct command *c = s->commands, *next; c; c = next) {
        next = c->next;
        if (!c->sent || c->finishing)
            continue;
        if (c->seen != s->session_no) {
            command_finish_locked(c, OUTCOME_LOST);
            continue;
        }
        CLEANUP_BUF struct buf b = BUF_INIT(256);
        const struct msg_offsets o = {.stdout_offset = c->recv[0], .stderr_offset = c->recv[1],
                                      .stdin_offset = c->stdin_credit};
        msg_offsets_encode(&b, &o);
        if (s->vm)
            (void)vm_send(s->vm, FRAME_ATTACH, c->row.agent_id, &b, &err);
        command_feed_locked(c);
    }
    pthread_mutex_unlock(&s->lock);
}

// ---- the outcome --------------------------------------------------------------------------------------------------
static json_t *outcome_facts(struct command *c)
{
    const struct command_row *row = &c->row;
    json_t *f = json_object();
    json_put_str(f, "command_id", row->id);
    json_put_str(f, "outcome", command_outcome_name(row->outcome));
    json_put(f, "exit_code", row->outcome == OUTCOME_EXITED ? json_integer(row->exit_code) : json_null());
    json_put_str(f, "signal", row->signal ? command_signal_name(row->signal) : NULL);
    json_put_str(f, "user", row->user);
    json_put_str(f, "argv_hmac", row->argv_hmac);
    json_t *names = row->env_names_json ? json_loads(row->env_names_json, 0, NULL) : NULL;
    json_put(f, "env_names", names ? names : json_array());
    json_put_int(f, "duration_ms", row->duration_ms);
    json_put_int(f, "stdout_bytes", row->stdout_bytes);
    json_put_int(f, "stderr_bytes", row->stderr_bytes);
    json_put_int(f, "stdout_kept_bytes", row->stdout_spooled);
    json_put_int(f, "stderr_kept_bytes", row->stderr_spooled);
    json_put_str(f, "stdout_sha256", *row->stdout_sha256 ? row->stdout_sha256 : NULL);
    json_put_str(f, "stderr_sha256", *row->stderr_sha256 ? row->stderr_sha256 : NULL);
    json_put(f, "redacted", json_boolean(row->redacted));
    return f;
}

static void take_spool(struct command *c)
{
    struct command_row *row = &c->row;
    struct err err = {0};
    if (c->archive)
        archive_fill_row(c);
    else if (!c->spool)
        c->spool = spool_open(c->s->out_dirfd, row->id, &err);
    if (!c->spool)
        return;
    struct spool_state st;
    spool_state(c->spool, &st);
    row->stdout_bytes = (int64_t)st.produced[0];
    row->stderr_bytes = (int64_t)st.produced[1];
    row->stdout_spooled = (int64_t)st.kept[0];
    row->stderr_spooled = (int64_t)st.kept[1];
    spool_digest(c->spool, SPOOL_STDOUT, row->stdout_sha256);
    spool_digest(c->spool, SPOOL_STDERR, row->stderr_sha256);
    row->redacted = c->redacted;
}

static bool succeeded(const struct command_row *row)
{
    return row->outcome == OUTCOME_EXITED && row->exit_code == 0;
}

static int outcome_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct command *c = arg;
    if (command_update(tx, &c->row, err) != 0 || change_apply(tx, &c->change, err) != 0)
        return -1;
    if (c->row.internal)
        return 0;
    char data[160];
    snprintf(data, sizeof data, "{\"command_id\":\"%s\",\"outcome\":\"%s\"}", c->row.id,
             command_outcome_name(c->row.outcome));
    return event_append(tx, c->row.tenant, "command.finished", c->row.sandbox_id, data, err);
}

static void drop_stdin_file(struct command *c)
{
    char name[ID_MAX + 8];
    snprintf(name, sizeof name, "%s.stdin", c->row.id);
    if (c->row.has_stdin && c->s->out_dirfd >= 0)
        (void)unlinkat(c->s->out_dirfd, name, 0);
}

static void outcome_submit(void *arg);

static void outcome_done(void *arg, const struct err *err)
{
    struct command *c = arg;
    struct sandbox *s = c->s;
    if (err && err->kind == ERR_UNAVAILABLE) { // disk full: the outcome waits until it can be kept
        c->exit_seen_ms = clock_mono_ms();
        pthread_mutex_lock(&s->lock);
        c->finishing = false;
        c->retry_at_ms = clock_mono_ms() + 500;
        pthread_mutex_unlock(&s->lock);
        return;
    }
    if (err)
        log_error("command %s: its outcome could not be recorded: %s %s", c->row.id, err->detail, err->internal);
    if (err && c->err.kind == ERR_NONE)
        c->err = *err;
    sandbox_ref(s); // conclude's
    pthread_mutex_lock(&s->lock);
    for (struct command **at = &s->commands; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            s->n_commands--;
            break;
        }
    if (c->sent)
        forget(s, c->row.agent_id);
    pthread_cond_broadcast(&s->commands_gone);
    pthread_mutex_unlock(&s->lock);
    drop_stdin_file(c);
    hub_notify(s->m->hub, c->row.id);
    pthread_mutex_lock(&s->lock);
    const bool tell = tell_begin_locked(c);
    c->concluded = c->told == TELLING;
    const bool wait = c->concluded && !tell;
    pthread_mutex_unlock(&s->lock);
    if (tell)
        tell_admitted(c); // and concludes
    else if (!wait)
        conclude(c);
}

static void spawn_failure(struct command *c)
{
    const bool roots = strncmp(c->row.spawn_error, "directory outside", 17) == 0;
    if (roots)
        err_set(&c->err, ERR_POLICY_DENIED, "path_outside_roots", "the directory is outside the writable roots");
    else
        err_set(&c->err, ERR_GUEST_COMMAND_FAILED, "spawn_failed", "%s", c->row.spawn_error);
}

// Fills row and change and hands them to the writer. Runs on the io pool: reads the spool's state.
static void outcome_submit(void *arg)
{
    struct command *c = arg;
    struct command_row *row = &c->row;
    take_spool(c);
    row->phase = COMMAND_FINISHED;
    if (!row->finished_at_ms)
        row->finished_at_ms = clock_wall_ms();
    json_decref(c->facts);
    c->facts = outcome_facts(c);
    memset(&c->change, 0, sizeof c->change);
    c->change.settle = &c->a;
    c->change.outcome = c->aborted ? "aborted" : command_outcome_name(row->outcome);
    c->change.status = row->check && !succeeded(row) ? 422 : c->success_status;
    c->change.ref = row->id;
    c->change.facts = c->facts;
    if (row->outcome == OUTCOME_SPAWN_FAILED && c->err.kind == ERR_NONE)
        spawn_failure(c);
    free(c->problem);
    c->problem = NULL;
    if (c->err.kind != ERR_NONE)
        c->problem = change_set_failure(c->s->m, &c->change, &c->a, &c->err);
    c->job.state = c->err.kind != ERR_NONE || row->outcome == OUTCOME_LOST ? JOB_FAILED : JOB_SUCCEEDED;
    c->job.finished_at_ms = c->job.updated_at_ms = row->finished_at_ms;
    c->job.stage[0] = 0;
    free(c->job.problem_json);
    c->job.problem_json = c->problem ? strdup(c->problem) : NULL;
    c->change.job_update = &c->job;
    if (store_submit(c->s->m->store, outcome_tx, outcome_done, c) != 0)
        log_warn("command %s: its outcome is left to the next start", row->id);
}

// Under sandbox.lock. The outcome is known and all output is kept.
static void finish_locked(struct command *c)
{
    c->finishing = true;
    outcome_submit(c); // spool_open of an unopened spool reads two empty files' state: no output, no file
}

void command_try_finish_locked(struct command *c)
{
    if (!c->exited || c->finishing || c->io_busy || c->pending)
        return;
    if (c->tail_len[0] > 0 || c->tail_len[1] > 0)
        return;
    if (c->recv[0] < c->total[0] || c->recv[1] < c->total[1])
        return;
    finish_locked(c);
}

void command_finish_locked(struct command *c, enum command_outcome outcome)
{
    struct err err = {0};
    if (c->finishing)
        return;
    if (c->stdin_call) {
        err_set(&err, ERR_TRANSPORT_FAILED, "vm_gone", "the command was lost");
        stdin_call_end(c, &err);
    }
    if (!c->exited) {
        c->exited = true;
        c->row.outcome = outcome;
        c->row.signal = outcome == OUTCOME_KILLED ? 9 : 0;
        c->row.duration_ms = clock_wall_ms() - c->row.created_at_ms;
    }
    c->total[0] = c->recv[0]; // nothing more will come
    c->total[1] = c->recv[1];
    if (c->tail_len[0] || c->tail_len[1] || c->pending)
        io_schedule_locked(c->s);
    command_try_finish_locked(c);
}

void commands_finish_all(struct sandbox *s, enum command_outcome outcome)
{
    pthread_mutex_lock(&s->lock);
    for (struct command *c = s->commands, *next; c; c = next) {
        next = c->next;
        command_finish_locked(c, outcome);
    }
    while (s->commands && !s->m->stopping)
        pthread_cond_wait(&s->commands_gone, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

#define OVERDUE_MS (LIMIT_COMMAND_KILL_GRACE_MS + 5000) // TERM, KILL, and the way of the answer

// Once a second: an exit whose output does not come, an outcome that waits for room on the disk.
void commands_tick(struct sandbox *s, int64_t now_ms)
{
    struct command *mute[LIMIT_COMMANDS_RUNNING];
    size_t n = 0;
    pthread_mutex_lock(&s->lock);
    if (s->io_retry_at_ms && now_ms >= s->io_retry_at_ms) {
        s->io_retry_at_ms = 0;
        io_schedule_locked(s);
    }
    for (struct command *c = s->commands, *next; c; c = next) {
        next = c->next;
        if (c->sent && now_ms - c->sent_ms > LIMIT_STARTED_MS && n < sizeof mute / sizeof *mute && tell_begin_locked(c))
            mute[n++] = c;
        if (s->mute_noted && s->vm && c->sent && !c->exited && !c->finishing && now_ms - c->sent_ms > c->row.timeout_ms + OVERDUE_MS) {
            log_warn_limited("command %s: its agent does not answer, and its deadline is over", c->row.id);
            command_finish_locked(c, OUTCOME_LOST); // told to the agent: if it comes back, it ends it
            continue;
        }
        if (!c->exited || c->finishing)
            continue;
        if (c->retry_at_ms && now_ms >= c->retry_at_ms) {
            c->retry_at_ms = 0;
            command_try_finish_locked(c);
        } else if (s->session && !c->pending && !c->io_busy && now_ms - c->exit_seen_ms > LIMIT_AGENT_MUTE_MS) {
            log_warn_limited("command %s: its last output never came", c->row.id);
            command_finish_locked(c, c->row.outcome);
        }
    }
    pthread_mutex_unlock(&s->lock);
    for (size_t i = 0; i < n; i++)
        tell_admitted(mute[i]);
}

// ---- commands of an earlier server ----------------------------------------------------------------------------------
static struct command *revive(struct sandbox *s, const struct command_row *row, const struct admission *a)
{
    struct command *c = calloc(1, sizeof *c);
    if (!c || command_row_copy(&c->row, row) != 0) {
        free(c);
        return NULL;
    }
    c->s = s;
    c->a = *a;
    c->success_status = row->background ? 202 : 200;
    job_begin(&c->job, a, a->operation);
    snprintf(c->job.ref, sizeof c->job.ref, "%s", row->id);
    return c;
}

// Reads back inline stdin that the guest may not have taken yet.
static void reload_stdin(struct command *c)
{
    char name[ID_MAX + 8];
    snprintf(name, sizeof name, "%s.stdin", c->row.id);
    struct buf b = BUF_INIT(LIMIT_STDIN_INLINE_BYTES + 1);
    if (fd_read_file(c->s->out_dirfd, name, &b) == 0 && b.len > 0) {
        c->inline_len = b.len;
        c->inline_stdin = buf_steal(&b);
    }
    buf_free(&b);
}

int command_adopt(struct sandbox *s, const struct command_row *row, const struct admission *a, struct err *err)
{
    struct command *c = revive(s, row, a);
    if (!c)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    c->spool = spool_open(s->out_dirfd, row->id, err);
    if (!c->spool) {
        command_free(c);
        return -1;
    }
    struct spool_state st;
    spool_state(c->spool, &st);
    for (int i = 0; i < 2; i++)
        c->recv[i] = c->spooled[i] = st.produced[i];
    if (row->has_stdin)
        reload_stdin(c);
    c->sent = true; // if the agent does not know it, it is lost
    c->durable = true;
    pthread_mutex_lock(&s->lock);
    c->next = s->commands;
    s->commands = c;
    s->n_commands++;
    c->listed = true;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static int lose_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct command *c = arg;
    return command_update(tx, &c->row, err) != 0 ? -1 : change_apply(tx, &c->change, err);
}

// A command whose sandbox cannot give it back: settled as lost, with what its spool holds.
void command_lose(struct manager *m, const struct command_row *row, const struct admission *a)
{
    struct err err = {0};
    struct sandbox *s = registry_find(m, NULL, row->sandbox_id, NULL);
    struct command *c = s ? revive(s, row, a) : NULL;
    if (c) {
        take_spool(c);
        c->row.phase = COMMAND_FINISHED;
        c->row.outcome = OUTCOME_LOST;
        c->row.finished_at_ms = clock_wall_ms();
        c->facts = outcome_facts(c);
        c->job.state = JOB_FAILED;
        c->job.finished_at_ms = c->job.updated_at_ms = c->row.finished_at_ms;
        c->change = (struct change){.settle = &c->a, .outcome = "lost", .status = c->success_status, .ref = c->row.id,
                                    .facts = c->facts, .job_update = &c->job};
        if (store_write(m->store, lose_tx, c, &err) != 0)
            log_error("command %s: could not be settled: %s %s", row->id, err.detail, err.internal);
    }
    command_free(c);
    sandbox_unref(s);
}
