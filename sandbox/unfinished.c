#include "sandbox/unfinished.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- admissions that were never settled ---------------------------------------------------------------------------------
static bool keep_pending(void *arg, const struct admission *a)
{
    struct manager *m = arg;
    struct admission *more = realloc(m->pending, (m->n_pending + 1) * sizeof *more);
    if (!more)
        return false;
    m->pending = more;
    m->pending[m->n_pending++] = *a;
    return true;
}

int pending_load(struct manager *m, struct err *err)
{
    return receipt_each_pending_all_tenants(m->store, keep_pending, m, err);
}

bool pending_take(struct manager *m, const char *receipt_id, struct admission *ret)
{
    bool found = false;
    pthread_mutex_lock(&m->pending_lock);
    for (size_t i = 0; i < m->n_pending && !found; i++)
        if (strcmp(m->pending[i].receipt_id, receipt_id) == 0) {
            *ret = m->pending[i];
            m->pending[i] = m->pending[--m->n_pending];
            found = true;
        }
    pthread_mutex_unlock(&m->pending_lock);
    return found;
}

void pending_lose(struct manager *m)
{
    for (;;) {
        struct admission a;
        pthread_mutex_lock(&m->pending_lock);
        const bool any = m->n_pending > 0;
        if (any)
            a = m->pending[--m->n_pending];
        pthread_mutex_unlock(&m->pending_lock);
        if (!any)
            return;
        struct err err = {0};
        // The deletion of a snapshot is admitted with the end of its row; its files have been swept.
        const bool finished = strcmp(a.operation, "snapshot.delete") == 0;
        const struct change c = {.settle = &a, .outcome = finished ? "succeeded" : "lost", .status = finished ? 200 : 503,
                                 .forget_idem = true};
        if (change_commit(m, &c, &err) != 0)
            log_error("receipt %s: could not be settled: %s %s", a.receipt_id, err.detail, err.internal);
    }
}

// ---- jobs left behind -----------------------------------------------------------------------------------------------
bool unfinished_add(struct unfinished *u, const struct job_row *row)
{
    struct job_row *more = realloc(u->rows, (u->n + 1) * sizeof *more);
    if (!more)
        return false;
    u->rows = more;
    struct job_row *to = &u->rows[u->n++];
    *to = *row;
    to->stages_json = row->stages_json ? strdup(row->stages_json) : NULL;
    to->problem_json = row->problem_json ? strdup(row->problem_json) : NULL;
    to->result_json = row->result_json ? strdup(row->result_json) : NULL;
    return true;
}

struct of {
    const struct sandbox *s;
    struct unfinished *to;
};

static bool add_of(void *arg, const struct job_row *row)
{
    const struct of *of = arg;
    return strcmp(row->sandbox_id, of->s->id) != 0 || unfinished_add(of->to, row);
}

int unfinished_of(const struct sandbox *s, struct unfinished *to, struct err *err)
{
    struct of of = {s, to};
    return job_each_unfinished_all_tenants(s->m->store, add_of, &of, err);
}

void unfinished_free(struct unfinished *u)
{
    for (size_t i = 0; i < u->n; i++)
        job_row_free(&u->rows[i]);
    free(u->rows);
}

struct job_row *unfinished_kind(struct unfinished *u, const char *kind)
{
    for (size_t i = 0; i < u->n; i++)
        if (strcmp(u->rows[i].kind, kind) == 0)
            return &u->rows[i];
    return NULL;
}

void job_admission(struct manager *m, const struct job_row *job, struct admission *a)
{
    if (!pending_take(m, job->receipt_id, a)) {
        system_admission(a, job->tenant, job->kind, job->sandbox_id);
        snprintf(a->receipt_id, sizeof a->receipt_id, "%s", job->receipt_id);
    }
    snprintf(a->job_id, sizeof a->job_id, "%s", job->id);
    snprintf(a->sandbox_id, sizeof a->sandbox_id, "%s", job->sandbox_id);
}

void job_settle(struct manager *m, struct job_row *job, const struct admission *a, enum job_state state,
                const char *outcome, const struct err *why, int status)
{
    struct err err = {0};
    struct change c = {.job_update = job, .settle = a, .outcome = outcome, .status = status,
                       .ref = *job->ref ? job->ref : job->sandbox_id};
    CLEANUP_FREE char *problem = NULL;
    if (why) {
        problem = change_set_failure(m, &c, a, why);
        c.outcome = outcome;
    }
    job->state = state;
    job->stage[0] = 0;
    job->finished_at_ms = job->updated_at_ms = clock_wall_ms();
    free(job->problem_json);
    job->problem_json = problem ? strdup(problem) : NULL;
    if (change_commit(m, &c, &err) != 0)
        log_error("job %s: could not be ended: %s %s", job->id, err.detail, err.internal);
}

// Operations that record their work and their job's end in one transaction: where the job has not ended, the work was undone.
// NULL: not one of them.
static const char *undone_code(const char *kind)
{
    static const struct {
        const char *kind, *code;
    } WHOLE[] = {{"sandbox.create", "create_undone"}, {"sandbox.start", "start_undone"},
                 {"sandbox.pause", "pause_undone"},  {"sandbox.resume", "resume_undone"},
                 {"sandbox.cold", "cold_undone"},    {"snapshot.create", "snapshot_undone"},
                 {"sandbox.fork", "fork_undone"},    {"snapshot.fork", "fork_undone"}};
    for (size_t i = 0; i < sizeof WHOLE / sizeof *WHOLE; i++)
        if (strcmp(kind, WHOLE[i].kind) == 0)
            return WHOLE[i].code;
    return NULL;
}

void job_give_up(struct manager *m, struct job_row *job)
{
    struct admission a;
    struct err why = {0};
    const char *code = undone_code(job->kind);
    job_admission(m, job, &a);
    err_set(&why, ERR_UNAVAILABLE, code ? code : "lost", "the server was restarted while this ran");
    if (code)
        err_remedy(&why, "send the request again");
    job_settle(m, job, &a, JOB_FAILED, code ? "undone" : "lost", &why, 503);
}
