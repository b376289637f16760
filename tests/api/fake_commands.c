#include "fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "base/clock.h"
#include "base/json.h"

const char *command_signal_name(int number)
{
    return number == 9 ? "KILL" : number == 15 ? "TERM" : NULL;
}

int command_signal_number(const char *name)
{
    return strcmp(name, "KILL") == 0 ? 9 : 15;
}

struct fake_command *fake_command_find(struct manager *m, const char *id)
{
    struct fake_command *c = m->commands;
    while (c && strcmp(c->row.id, id) != 0)
        c = c->next;
    return c;
}

static int admit_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct fake_command *c = arg;
    struct job_row job = {.state = JOB_RUNNING, .created_at_ms = clock_wall_ms(), .updated_at_ms = clock_wall_ms()};
    snprintf(job.id, sizeof job.id, "%s", c->row.job_id);
    snprintf(job.tenant, sizeof job.tenant, "%s", c->row.tenant);
    snprintf(job.sandbox_id, sizeof job.sandbox_id, "%s", c->row.sandbox_id);
    snprintf(job.kind, sizeof job.kind, "command.run");
    snprintf(job.ref, sizeof job.ref, "%s", c->row.id);
    snprintf(job.audit_id, sizeof job.audit_id, "%s", c->row.audit_id);
    snprintf(job.receipt_id, sizeof job.receipt_id, "%s", c->row.receipt_id);
    if (evidence_admit(tx, &c->a, NULL, err) != 0 || job_insert(tx, &job, err) != 0)
        return -1;
    return command_insert(tx, &c->row, 32, err);
}

static int settle_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct fake_command *c = arg;
    const bool failed = c->row.check && c->row.exit_code != 0;
    char *problem = NULL;
    struct settlement s = {.outcome = "exited", .status = c->status, .ref = c->row.id};
    if (failed) {
        struct err why = {0};
        err_set(&why, ERR_GUEST_COMMAND_FAILED, "check_failed", "the command did not exit with 0");
        s.problem_json = problem = api_render_problem(&why, &c->a, &s.status);
    }
    const int bad = command_update(tx, &c->row, err) != 0 || evidence_settle(tx, &c->a, &s, err) != 0;
    free(problem);
    return bad ? -1 : 0;
}

static void finish(struct manager *m, struct fake_command *c, int code)
{
    struct err err = {0};
    struct spool_state st;
    spool_state(c->spool, &st);
    pthread_mutex_lock(&m->lock);
    c->row.phase = COMMAND_FINISHED;
    c->row.outcome = OUTCOME_EXITED;
    c->row.exit_code = code;
    c->row.stdout_bytes = c->row.stdout_spooled = (int64_t)st.kept[0];
    c->row.stderr_bytes = c->row.stderr_spooled = (int64_t)st.kept[1];
    c->row.finished_at_ms = clock_wall_ms();
    c->row.duration_ms = 3;
    pthread_mutex_unlock(&m->lock);
    store_write(m->store, settle_tx, c, &err);
    pthread_mutex_lock(&m->lock);
    for (struct fake_command **at = &m->commands; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    pthread_mutex_unlock(&m->lock);
    hub_notify(m->hub, c->row.id);
    c->cb.done(c->cb.arg, &c->row, NULL);
    spool_close(c->spool);
    command_row_free(&c->row);
    free(c);
}

static void write_piece(struct fake_command *c, enum spool_stream stream, const void *data, size_t len)
{
    struct err err = {0};
    struct spool_state st;
    spool_state(c->spool, &st);
    const struct spool_piece piece = {stream, st.kept[stream], data, len};
    spool_write(c->spool, &piece, 1, &err);
}

void fake_output(struct manager *m, const char *id, enum spool_stream stream, const void *data, size_t len)
{
    pthread_mutex_lock(&m->lock);
    struct fake_command *c = fake_command_find(m, id);
    if (c) {
        write_piece(c, stream, data, len);
        *(stream == SPOOL_STDOUT ? &c->row.stdout_bytes : &c->row.stderr_bytes) += (int64_t)len;
    }
    pthread_mutex_unlock(&m->lock);
    hub_notify(m->hub, id);
}

void fake_exit(struct manager *m, const char *id, int code)
{
    pthread_mutex_lock(&m->lock);
    struct fake_command *c = fake_command_find(m, id);
    pthread_mutex_unlock(&m->lock);
    if (!c)
        return;
    finish(m, c, code);
}

struct start {
    struct manager *m;
    struct fake_command *c;
    char word[32], text[256];
};

// echo TEXT, err TEXT, exit N, hold: the guest's whole repertoire.
static void run(void *arg)
{
    struct start *s = arg;
    struct manager *m = s->m;
    struct fake_command *c = s->c;
    struct err err = {0};
    if (store_write(m->store, admit_tx, c, &err) != 0) {
        c->cb.done(c->cb.arg, NULL, &err);
        command_row_free(&c->row);
        free(c);
        free(s);
        return;
    }
    c->row.phase = COMMAND_RUNNING_;
    c->row.started_at_ms = clock_wall_ms();
    c->spool = spool_open(m->dirfd, c->row.id, &err);
    pthread_mutex_lock(&m->lock);
    c->next = m->commands;
    m->commands = c;
    pthread_mutex_unlock(&m->lock);
    char id[ID_MAX];
    memcpy(id, c->row.id, sizeof id);
    c->cb.admitted(c->cb.arg, c->row.id, c->row.job_id);
    if (strcmp(s->word, "hold") != 0) {
        if (strcmp(s->word, "echo") == 0)
            write_piece(c, SPOOL_STDOUT, s->text, strlen(s->text));
        if (strcmp(s->word, "err") == 0)
            write_piece(c, SPOOL_STDERR, s->text, strlen(s->text));
        fake_exit(m, id, strcmp(s->word, "exit") == 0 ? atoi(s->text) : 0);
    }
    free(s);
}

int command_run(struct manager *m, const char *sandbox_id, const struct command_request *r, const struct admission *a,
                int success_status, const struct command_callbacks *cb)
{
    struct err err = {0};
    struct sandbox_info *i = manager_get(m, a->tenant, sandbox_id, &err);
    if (i && i->row.state != SANDBOX_RUNNING)
        err_set(&err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is %s", sandbox_state_name(i->row.state));
    sandbox_info_unref(i);
    if (err.kind != ERR_NONE) {
        cb->done(cb->arg, NULL, &err);
        return 0;
    }
    struct start *s = calloc(1, sizeof *s);
    struct fake_command *c = calloc(1, sizeof *c);
    s->m = m;
    s->c = c;
    if (r->argv) {
        snprintf(s->word, sizeof s->word, "%s", json_string_value(json_array_get(r->argv, 0)));
        const char *text = json_string_value(json_array_get(r->argv, 1));
        snprintf(s->text, sizeof s->text, "%s", text ? text : "");
    }
    c->a = *a;
    c->status = success_status;
    c->cb = *cb;
    id_new(ID_COMMAND, c->row.id);
    id_new(ID_JOB, c->row.job_id);
    memcpy(c->a.job_id, c->row.job_id, ID_MAX);
    snprintf(c->row.tenant, sizeof c->row.tenant, "%s", a->tenant);
    snprintf(c->row.sandbox_id, sizeof c->row.sandbox_id, "%s", sandbox_id);
    snprintf(c->row.user, sizeof c->row.user, "%s", r->user);
    memcpy(c->row.audit_id, a->audit_id, ID_MAX);
    memcpy(c->row.receipt_id, a->receipt_id, ID_MAX);
    c->row.phase = COMMAND_ADMITTED;
    c->row.timeout_ms = r->timeout_ms;
    c->row.max_output_bytes = r->max_output_bytes;
    c->row.background = r->background;
    c->row.check = r->check;
    c->row.created_at_ms = clock_wall_ms();
    c->row.env_names_json = strdup("[\"B\",\"A\"]");
    return work_submit(m->pool, run, s);
}

int command_info(struct manager *m, const char *tenant, const char *sandbox_id, const char *id, struct command_row *ret,
                 struct err *err)
{
    pthread_mutex_lock(&m->lock);
    struct fake_command *c = fake_command_find(m, id);
    const bool live = c && strcmp(c->row.tenant, tenant) == 0 && strcmp(c->row.sandbox_id, sandbox_id) == 0;
    if (live) {
        command_row_copy(ret, &c->row);
        ret->phase = COMMAND_RUNNING_; // until it is durable
        ret->outcome = OUTCOME_NONE;
    }
    pthread_mutex_unlock(&m->lock);
    if (live)
        return 0;
    const int got = command_get(m->store, tenant, sandbox_id, id, ret, err);
    return got > 0 ? err_set(err, ERR_NOT_FOUND, "not_found", "no such object") : got;
}

struct spool_reader *command_output(struct manager *m, const char *tenant, const char *sandbox_id, const char *id,
                                    struct err *err)
{
    struct command_row row = {0};
    if (command_info(m, tenant, sandbox_id, id, &row, err) != 0)
        return NULL;
    command_row_free(&row);
    return spool_reader_open(m->dirfd, id, err);
}

int command_stdin(struct manager *m, const char *sandbox_id, const char *id, const void *data, size_t len,
                  int64_t offset, bool eof, const struct admission *a, int success_status,
                  void (*done)(void *arg, int64_t total, const struct err *err), void *arg)
{
    struct err err = {0};
    struct command_row row = {0};
    (void)eof, (void)success_status, (void)data;
    if (command_info(m, a->tenant, sandbox_id, id, &row, &err) == 0 && offset >= 0 && (size_t)offset != m->stdin_len)
        err_set(&err, ERR_CONFLICT, "stdin_offset", "stdin ends elsewhere");
    command_row_free(&row);
    if (err.kind == ERR_NONE) {
        m->stdin_len += len;
        m->stdin_calls++;
    }
    done(arg, (int64_t)m->stdin_len, err.kind != ERR_NONE ? &err : NULL);
    return 0;
}

int command_signal(struct manager *m, const char *sandbox_id, const char *id, const char *name, const struct admission *a,
                   int success_status, void (*done)(void *arg, const struct err *err), void *arg)
{
    struct err err = {0};
    struct command_row row = {0};
    (void)name, (void)success_status;
    if (command_info(m, a->tenant, sandbox_id, id, &row, &err) == 0 && row.phase == COMMAND_FINISHED)
        err_set(&err, ERR_CONFLICT, "not_running", "the command has ended");
    command_row_free(&row);
    done(arg, err.kind != ERR_NONE ? &err : NULL);
    return 0;
}
