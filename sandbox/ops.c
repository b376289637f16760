// Control operations: queued per sandbox, run one at a time on a worker, launches bounded by slots. An operation that
// boots a guest waits for its slot without holding a thread, so that deletes and stops never stand behind boots.
#include "sandbox/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A sandbox whose next operation waits for a launch slot.
struct op_wait {
    struct op_wait *next;
    struct sandbox *s; // reference
};

static void run_next(void *arg);

struct op *op_new(const char *name, void (*run)(struct sandbox *, struct op *), const struct admission *a, int status,
                  const struct op_callbacks *cb)
{
    struct op *op = calloc(1, sizeof *op);
    if (!op)
        return NULL;
    op->name = name;
    op->run = run;
    op->a = *a;
    op->success_status = status;
    if (cb)
        op->cb = *cb;
    op->t0_us = clock_mono_us();
    return op;
}

void op_discard(struct op *op)
{
    json_decref(op->labels);
    sandbox_row_free(&op->row);
    job_row_free(&op->job);
    free(op);
}

void op_done(struct op *op, struct sandbox *s, const struct err *err)
{
    void (*done)(void *, const struct sandbox_info *, const struct err *) = op->cb.done;
    op->cb.done = NULL;
    if (!done)
        return;
    if (err) {
        done(op->cb.arg, NULL, err);
        return;
    }
    struct sandbox_info *view = sandbox_view(s);
    done(op->cb.arg, view, NULL);
    sandbox_info_unref(view);
}

bool op_should_stop(struct sandbox *s, struct op *op, struct err *err)
{
    pthread_mutex_lock(&s->lock);
    const bool deleted = s->delete_wanted;
    pthread_mutex_unlock(&s->lock);
    if (deleted)
        err_set(err, ERR_CONFLICT, "deleted", "the sandbox was deleted while this ran");
    else if (atomic_load(&op->cancelled))
        err_set(err, ERR_CONFLICT, "cancelled", "the job was cancelled");
    else
        return false;
    return true;
}

// ---- launch slots ---------------------------------------------------------------------------------------------
static bool slot_try(struct manager *m)
{
    pthread_mutex_lock(&m->lock);
    const bool got = m->launches < m->o.max_launches;
    m->launches += got;
    pthread_mutex_unlock(&m->lock);
    return got;
}

static void submit(struct sandbox *s)
{
    if (work_submit(s->m->ops, run_next, s) == 0)
        return;
    // The pool ends: the server stops. The journal has what was admitted; the next start finishes it.
    log_warn("sandbox %s: operation left to the next start", s->id);
    atomic_fetch_sub(&s->m->active, 1);
    sandbox_unref(s);
}

static void slot_release(struct manager *m)
{
    pthread_mutex_lock(&m->lock);
    m->launches--;
    struct op_wait *w = m->slot_head;
    if (w) {
        m->slot_head = w->next;
        if (!m->slot_head)
            m->slot_tail = NULL;
        m->launches++;
    }
    pthread_mutex_unlock(&m->lock);
    if (!w)
        return;
    struct sandbox *s = w->s;
    free(w);
    pthread_mutex_lock(&s->lock);
    s->op_slot_wait = false;
    s->ops->has_slot = true;
    pthread_mutex_unlock(&s->lock);
    submit(s);
}

// Queues s (reference taken over) for a slot. False when out of memory.
static bool slot_wait(struct manager *m, struct sandbox *s)
{
    struct op_wait *w = calloc(1, sizeof *w);
    if (!w)
        return false;
    w->s = s;
    pthread_mutex_lock(&m->lock);
    if (m->slot_tail)
        m->slot_tail->next = w;
    else
        m->slot_head = w;
    m->slot_tail = w;
    pthread_mutex_unlock(&m->lock);
    return true;
}

void ops_kick_for_delete(struct sandbox *s)
{
    struct manager *m = s->m;
    bool found = false;
    pthread_mutex_lock(&m->lock);
    struct op_wait *prev = NULL;
    for (struct op_wait *w = m->slot_head; w; prev = w, w = w->next) {
        if (w->s != s)
            continue;
        if (prev)
            prev->next = w->next;
        else
            m->slot_head = w->next;
        if (m->slot_tail == w)
            m->slot_tail = prev;
        free(w);
        found = true;
        break;
    }
    pthread_mutex_unlock(&m->lock);
    if (!found)
        return;
    pthread_mutex_lock(&s->lock);
    s->op_slot_wait = false;
    pthread_mutex_unlock(&s->lock);
    submit(s); // without a slot: it only looks at delete_wanted and ends
}

// ---- the queue --------------------------------------------------------------------------------------------------
// Dispatches the operation at the head. A reference to s travels with it.
static void dispatch(struct sandbox *s, struct op *op)
{
    if (!op->wants_slot) {
        submit(s);
        return;
    }
    if (slot_try(s->m)) {
        op->has_slot = true;
        submit(s);
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->op_slot_wait = true;
    pthread_mutex_unlock(&s->lock);
    if (!slot_wait(s->m, s)) {
        submit(s);
        return;
    }
    // A slot may have become free between the two looks.
    pthread_mutex_lock(&s->m->lock);
    const bool idle = s->m->launches < s->m->o.max_launches;
    s->m->launches += idle;
    pthread_mutex_unlock(&s->m->lock);
    if (idle)
        slot_release(s->m);
    pthread_mutex_lock(&s->lock);
    const bool deleted = s->delete_wanted;
    pthread_mutex_unlock(&s->lock);
    if (deleted) // the delete may have looked for us before we were queued
        ops_kick_for_delete(s);
}

void op_enqueue(struct sandbox *s, struct op *op)
{
    atomic_fetch_add(&s->m->active, 1);
    sandbox_ref(s);
    pthread_mutex_lock(&s->lock);
    const bool first = !s->ops;
    if (first)
        s->ops = op;
    else
        s->ops_last->next = op;
    s->ops_last = op;
    pthread_mutex_unlock(&s->lock);
    if (first)
        dispatch(s, op);
}

// The head of the queue has ended: the next one, with the reference that came with it.
static void leave(struct sandbox *s, struct op *op)
{
    struct manager *m = s->m;
    pthread_mutex_lock(&s->lock);
    s->ops = op->next;
    s->op_active = false;
    if (!s->ops)
        s->ops_last = NULL;
    struct op *next = s->ops;
    pthread_mutex_unlock(&s->lock);
    op_discard(op);
    if (next)
        dispatch(s, next);
    sandbox_unref(s);
    atomic_fetch_sub(&m->active, 1);
}

// What stood in the queue before it may have changed the sandbox.
int op_generation_check(struct sandbox *s, const struct op *op, struct err *err)
{
    struct sandbox_info *view = sandbox_view(s);
    const int64_t now = view->row.generation;
    sandbox_info_unref(view);
    if (op->a.if_generation == 0 || op->a.if_generation == now)
        return 0;
    return err_set(err, ERR_PRECONDITION_FAILED, "generation_mismatch", "the sandbox is at generation %lld", (long long)now);
}

static void run_next(void *arg)
{
    struct sandbox *s = arg;
    struct manager *m = s->m;
    pthread_mutex_lock(&s->lock);
    struct op *op = s->ops;
    s->op_active = true;
    pthread_mutex_unlock(&s->lock);

    struct err e = {0};
    if (op->cb.done && op_generation_check(s, op, &e) != 0) // one that has another way to answer looks itself
        op_done(op, s, &e);
    else
        op->run(s, op);
    if (op->cb.done) {
        err_set(&e, ERR_INTERNAL, "no_answer", "the operation ended without an answer");
        op_done(op, s, &e);
    }
    if (op->has_slot)
        slot_release(m);
    op->has_slot = false;
    store_thread_done(); // 32 threads, and few operations read
    pthread_mutex_lock(&s->lock);
    op->left = op->parked && !op->unparked;
    const bool stays = op->left;
    pthread_mutex_unlock(&s->lock);
    if (!stays)
        leave(s, op);
}

void op_park(struct sandbox *s, struct op *op)
{
    pthread_mutex_lock(&s->lock);
    op->parked = true;
    pthread_mutex_unlock(&s->lock);
}

void op_unpark(struct sandbox *s, struct op *op)
{
    pthread_mutex_lock(&s->lock);
    op->unparked = true;
    const bool left = op->left; // else its thread is not through with it, and will see
    pthread_mutex_unlock(&s->lock);
    if (left)
        leave(s, op);
}

// ---- jobs and stages ------------------------------------------------------------------------------------------------
void job_begin(struct job_row *job, const struct admission *a, const char *kind)
{
    memset(job, 0, sizeof *job);
    snprintf(job->id, sizeof job->id, "%s", a->job_id);
    snprintf(job->tenant, sizeof job->tenant, "%s", a->tenant);
    snprintf(job->sandbox_id, sizeof job->sandbox_id, "%s", a->sandbox_id);
    snprintf(job->kind, sizeof job->kind, "%s", kind);
    snprintf(job->audit_id, sizeof job->audit_id, "%s", a->audit_id);
    snprintf(job->receipt_id, sizeof job->receipt_id, "%s", a->receipt_id);
    snprintf(job->request_id, sizeof job->request_id, "%s", a->request_id);
    job->state = JOB_RUNNING;
    job->created_at_ms = job->updated_at_ms = clock_wall_ms();
}

void stage_note(struct job_row *job, const char *name, int64_t us)
{
    CLEANUP_JSON json_t *stages = job->stages_json ? json_loads(job->stages_json, 0, NULL) : json_array();
    json_t *one = json_object();
    json_put_str(one, "name", name);
    json_put_int(one, "ms", (us + 500) / 1000);
    json_array_append_new(stages, one);
    free(job->stages_json);
    job->stages_json = json_dumps(stages, JSON_COMPACT);
}

int stages_run(struct sandbox *s, struct job_row *job, const struct stage *stages, size_t n, void *ctx, struct err *err)
{
    size_t i = 0;
    for (; i < n; i++) {
        snprintf(job->stage, sizeof job->stage, "%s", stages[i].name);
        job->state = JOB_RUNNING;
        job->updated_at_ms = clock_wall_ms();
        const struct change c = {.job_update = job};
        if (*job->id && !stages[i].quick && change_commit(s->m, &c, err) != 0) // a fork's children have no journal of their own: they are undone
            break;
        crash_point(s, stages[i].name);
        const int64_t t = clock_mono_us();
        const int failed = stages[i].run(ctx, err);
        stage_note(job, stages[i].name, clock_mono_us() - t);
        if (failed)
            break;
    }
    if (i == n)
        return 0;
    err_wrap(err, stages[i].name);
    for (size_t k = i + 1; k-- > 0;)
        if (stages[k].undo)
            stages[k].undo(ctx);
    return -1;
}
