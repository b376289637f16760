// Forks: N sandboxes that continue from one moment of another, or from a snapshot. All or none.
//
// freeze → capture (the source goes on) → per child prepare, launch, restore, agent → commit. The children's rows are
// written with the intent, as `starting`; they become `running` together in one transaction, or are undone together. A
// restart undoes what had not come to its commit.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/carry.h"
#include "sandbox/cold.h"
#include "sandbox/launch.h"

struct fork_group;

struct child {
    struct fork_group *g;
    struct sandbox_row row;        // as admitted, then as it came up
    struct sandbox *s;             // reference
    struct op *op;                 // parked until the group is decided: what a client asks of s stands behind it
    struct err err;
    bool up;
};

struct fork_group {
    struct manager *m;
    struct fork_callbacks cb;
    struct admission a;
    struct job_row job;
    int status;
    char from[ID_MAX];             // sandbox or snapshot
    bool of_snapshot;
    struct fork_request r;
    char on_expiry[WORD_MAX], owner[LIMIT_OWNER_MAX];
    struct origin *origin;
    struct child *children;
    unsigned n;
    bool admitted;
    int64_t t0_us, t_launch_us;    // asked for; its children begun
    uint64_t copy_bytes;           // of the disk
    pthread_mutex_t lock;
    unsigned left;                 // children under way
    unsigned copies;               // of the disk that the host's has promised room for, and are not made yet
};

static void group_free(struct fork_group *g)
{
    for (unsigned i = 0; i < g->n; i++) {
        struct child *c = &g->children[i];
        if (c->op)
            op_unpark(c->s, c->op);
        sandbox_row_free(&c->row);
        sandbox_unref(c->s);
    }
    origin_unref(g->m, g->origin);
    job_row_free(&g->job);
    pthread_mutex_destroy(&g->lock);
    free(g->children);
    free(g);
}

// Room for the disk of the moment, where it is not a snapshot's, and each child's. Before anything is made.
static int copies_promise(struct fork_group *g, int dirfd, const char *path, struct err *err)
{
    const unsigned n = g->of_snapshot ? g->n : g->n + 1;
    const uint64_t bytes = room_of_disk(dirfd, path);
    if (room_promise(g->m, bytes * n, err) != 0)
        return -1;
    g->copy_bytes = bytes;
    g->copies = n;
    return 0;
}

// They take their room themselves now, or will not be made.
static void copies_made(struct fork_group *g, unsigned n)
{
    pthread_mutex_lock(&g->lock);
    n = n < g->copies ? n : g->copies;
    g->copies -= n;
    pthread_mutex_unlock(&g->lock);
    room_give(g->m, g->copy_bytes * n);
}

static void group_answer(struct fork_group *g, const struct err *err)
{
    copies_made(g, g->n + 1); // those that were given up
    if (err) {
        g->cb.done(g->cb.arg, NULL, 0, err);
        return;
    }
    const struct sandbox_info **items = calloc(g->n, sizeof *items);
    for (unsigned i = 0; items && i < g->n; i++)
        items[i] = sandbox_view(g->children[i].s);
    struct err oom = {0};
    if (!items)
        err_set(&oom, ERR_INTERNAL, "out_of_memory", "out of memory");
    g->cb.done(g->cb.arg, items, items ? g->n : 0, items ? NULL : &oom);
    for (unsigned i = 0; items && i < g->n; i++)
        sandbox_info_unref(items[i]);
    free(items);
}

static void job_finish(struct fork_group *g, bool ok, const char *problem)
{
    g->job.state = ok ? JOB_SUCCEEDED : JOB_FAILED;
    g->job.stage[0] = 0;
    g->job.finished_at_ms = g->job.updated_at_ms = clock_wall_ms();
    free(g->job.problem_json);
    g->job.problem_json = problem ? strdup(problem) : NULL;
}

// ---- the end ------------------------------------------------------------------------------------------------------
static void undo_child(struct child *c)
{
    struct sandbox *s = c->s;
    struct err err = {0};
    if (!s)
        return;
    if (sandbox_drop_vm(s, true, &err) != 0)
        log_error("sandbox %s: %s %s", s->id, err.detail, err.internal);
    sandbox_uid_release(s);
    commands_finish_all(s, OUTCOME_LOST);
    CLEANUP_JSON json_t *report = json_pack("{s:[],s:[],s:[]}", "erased", "retained", "failed");
    if (sandbox_erase(s, report, true, &err) != 0)
        log_warn("sandbox %s: %s", s->id, err.detail);
    c->row.deletion_json = json_dumps(report, JSON_COMPACT);
}

static void row_undone(struct sandbox_row *row)
{
    row->state = SANDBOX_DESTROYED;
    snprintf(row->state_reason, sizeof row->state_reason, "fork_undone");
    row->generation++;
    row->destroyed_at_ms = row->updated_at_ms = clock_wall_ms();
    free(row->runtime_json);
    row->runtime_json = NULL;
}

static void group_undo(struct fork_group *g, const struct err *why)
{
    struct err err = {0};
    struct change c = {.job_update = &g->job, .settle = &g->a, .ref = g->job.id};
    CLEANUP_FREE char *problem = change_set_failure(g->m, &c, &g->a, why);
    log_warn("fork of %s: undone: %s (%s) %s", g->from, why->detail, why->code, why->internal);
    for (unsigned i = 0; i < g->n; i++)
        undo_child(&g->children[i]);
    origin_unref(g->m, g->origin); // a full disk has room again for the outcome
    g->origin = NULL;
    for (unsigned i = 0; i < g->n; i++) { // one by one: a child that was deleted meanwhile is destroyed already
        struct child *one = &g->children[i];
        const int from = one->row.state;
        row_undone(&one->row);
        struct shown shown = {one->s, &one->row};
        const struct change u = {.update = &one->row, .from_state = from, .cause = "fork_undone", .shown = &shown,
                                 .n_shown = one->s ? 1 : 0};
        memset(&err, 0, sizeof err);
        const int failed = change_commit(g->m, &u, &err);
        if (failed && err.kind != ERR_CONFLICT)
            log_error("sandbox %s: could not be undone: %s", one->row.id, err.internal);
        if (failed && one->s) // it is gone all the same, and nobody must find it otherwise
            sandbox_publish(one->s, &one->row);
        if (one->s)
            registry_remove(g->m, one->s);
    }
    job_finish(g, false, problem); // last: who reads of it finds the children so
    memset(&err, 0, sizeof err);
    if (change_commit(g->m, &c, &err) != 0)
        log_error("fork of %s: its failure could not be recorded: %s", g->from, err.internal);
    group_answer(g, why);
    group_free(g);
}

static json_t *group_facts(const struct fork_group *g)
{
    json_t *f = json_object(), *list = json_array();
    for (unsigned i = 0; i < g->n; i++) {
        json_t *one = json_object();
        const char *u = g->children[i].row.uniqueness_json;
        json_put_str(one, "sandbox_id", g->children[i].row.id);
        json_put(one, "uniqueness", u ? json_loads(u, 0, NULL) : json_null());
        json_array_append_new(list, one);
    }
    json_put_str(f, g->of_snapshot ? "snapshot_id" : "sandbox_id", g->from);
    json_put(f, "children", list);
    return f;
}

static void group_commit(struct fork_group *g, struct sandbox *last)
{
    struct err err = {0};
    struct sandbox_row *rows = calloc(g->n, sizeof *rows);
    struct shown *shown = calloc(g->n, sizeof *shown);
    CLEANUP_JSON json_t *facts = group_facts(g);
    for (unsigned i = 0; rows && shown && i < g->n; i++) {
        struct sandbox_row *row = &g->children[i].row;
        row->state = SANDBOX_RUNNING;
        row->generation++;
        row->updated_at_ms = clock_wall_ms();
        rows[i] = *row; // borrowed
        shown[i] = (struct shown){g->children[i].s, row};
    }
    stage_note(&g->job, "launch", clock_mono_us() - g->t_launch_us);
    job_finish(g, true, NULL);
    const struct change c = {.rows = rows, .n_rows = g->n, .rows_from = SANDBOX_STARTING, .cause = "fork",
                             .job_update = &g->job, .settle = &g->a, .outcome = "succeeded", .status = g->status,
                             .shown = shown, .n_shown = g->n,
                             .ref = g->job.id, .facts = facts};
    crash_point(last, "commit");
    const int failed = rows && shown ? change_commit(g->m, &c, &err) : err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    free(rows);
    free(shown);
    if (failed) {
        for (unsigned i = 0; i < g->n; i++)
            g->children[i].row.state = SANDBOX_STARTING;
        group_undo(g, &err);
        return;
    }
    atomic_fetch_add(&g->m->boots, g->n);
    crash_point(last, "end");
    group_answer(g, NULL);
    group_free(g);
}

// last: whose operation this is.
static void group_left(struct fork_group *g, struct sandbox *last)
{
    pthread_mutex_lock(&g->lock);
    g->left--;
    const bool all = g->left == 0;
    pthread_mutex_unlock(&g->lock);
    if (!all)
        return;
    for (unsigned i = 0; i < g->n; i++)
        if (!g->children[i].up) {
            const struct err why = g->children[i].err;
            group_undo(g, &why);
            return;
        }
    group_commit(g, last);
}

// ---- a child ------------------------------------------------------------------------------------------------------
static void child_run(struct sandbox *s, struct op *op)
{
    struct child *c = op->arg;
    struct fork_group *g = c->g;
    struct launch l;
    op_park(s, op);
    launch_init(&l, s, op, LAUNCH_RESTORE);
    op->cb.done = NULL;
    op->t0_us = g->t0_us;
    l.boot_path = "fork";
    l.room_promised = true;
    l.origin = origin_ref(g->m, g->origin);
    int failed = accel_again(g->m, &l.row, &l.accel, &c->err);
    if (!failed)
        failed = launch_run(&l, &c->err);
    copies_made(g, 1);
    if (!failed) {
        launch_describe(&l);
        sandbox_row_free(&c->row);
        failed = sandbox_row_copy(&c->row, &l.row) != 0 ? err_set(&c->err, ERR_INTERNAL, "out_of_memory", "out of memory") : 0;
    }
    c->up = !failed;
    launch_close(&l);
    group_left(g, s);
}

static void child_fill(struct child *c, struct fork_group *g, const struct sandbox_row *from)
{
    struct sandbox_row *row = &c->row;
    const int64_t now = clock_wall_ms();
    id_new(ID_SANDBOX, row->id);
    snprintf(row->tenant, sizeof row->tenant, "%s", g->a.tenant);
    row->state = SANDBOX_STARTING;
    snprintf(row->image_ref, sizeof row->image_ref, "%s", from->image_ref);
    snprintf(row->image_digest, sizeof row->image_digest, "%s", from->image_digest);
    row->vcpus = from->vcpus;
    row->memory_mib = from->memory_mib;
    row->disk_mib = from->disk_mib;
    row->labels_json = strdup(from->labels_json ? from->labels_json : "{}");
    row->env_json = strdup(from->env_json ? from->env_json : "{}");
    row->backend_json = from->backend_json ? strdup(from->backend_json) : NULL;
    row->ttl_seconds = g->r.ttl_seconds ? g->r.ttl_seconds : from->ttl_seconds;
    row->expires_at_ms = now + row->ttl_seconds * 1000;
    snprintf(row->on_expiry, sizeof row->on_expiry, "%s", *g->on_expiry ? g->on_expiry : from->on_expiry);
    row->detached = g->r.detached;
    snprintf(row->owner, sizeof row->owner, "%s", g->owner);
    snprintf(row->parent_sandbox_id, sizeof row->parent_sandbox_id, "%s", from->id);
    snprintf(row->parent_snapshot_id, sizeof row->parent_snapshot_id, "%s",
             g->of_snapshot ? g->from : from->parent_snapshot_id);
    row->generation = 1;
    row->created_at_ms = row->updated_at_ms = now;
    snprintf(row->job_id, sizeof row->job_id, "%s", g->a.job_id);
    snprintf(row->audit_id, sizeof row->audit_id, "%s", g->a.audit_id);
    snprintf(row->receipt_id, sizeof row->receipt_id, "%s", g->a.receipt_id);
    c->g = g;
}

// ---- intent -------------------------------------------------------------------------------------------------------
static char *ids_json(const struct fork_group *g)
{
    CLEANUP_JSON json_t *o = json_object();
    json_t *list = json_array();
    for (unsigned i = 0; i < g->n; i++)
        json_array_append_new(list, json_string(g->children[i].row.id));
    json_put(o, "sandbox_ids", list);
    return json_dumps(o, JSON_COMPACT);
}

static int admit_rows(struct fork_group *g, struct err *err)
{
    struct sandbox_row *rows = calloc(g->n, sizeof *rows);
    if (!rows)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    for (unsigned i = 0; i < g->n; i++)
        rows[i] = g->children[i].row; // borrowed
    CLEANUP_JSON json_t *facts = json_object();
    json_put_int(facts, "count", g->n);
    json_put_str(facts, g->of_snapshot ? "snapshot_id" : "sandbox_id", g->from);
    job_begin(&g->job, &g->a, g->a.operation);
    snprintf(g->job.stage, sizeof g->job.stage, "capture");
    snprintf(g->job.ref, sizeof g->job.ref, "%s", g->job.id);
    g->job.result_json = ids_json(g);
    const struct change c = {.admit = &g->a, .admit_facts = facts, .rows = rows, .n_rows = g->n, .rows_insert = true,
                             .rows_from = -1, .max_live = g->m->o.max_live_per_tenant, .cause = "fork",
                             .job_insert = &g->job};
    const int failed = change_commit(g->m, &c, err);
    free(rows);
    return failed;
}

// Before there is anything to continue from: keeps the child's queue.
static void child_wait(struct sandbox *s, struct op *op)
{
    op->cb.done = NULL;
    op_park(s, op);
}

// From here on children exist, for clients and for a restart.
static int make_children(struct fork_group *g, const struct sandbox_row *from, struct err *err)
{
    CLEANUP_JSON json_t *backend = from->backend_json ? json_loads(from->backend_json, 0, NULL) : NULL;
    const char *accel = json_get_str(backend, "accel");
    const unsigned need = budget_need(accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG, from->memory_mib);
    for (unsigned i = 0; i < g->n; i++)
        child_fill(&g->children[i], g, from);
    if (store_reserve_check(g->m->store, err) != 0 || budget_take(g->m, need * g->n, err) != 0)
        return -1;
    if (admit_rows(g, err) != 0) {
        budget_give(g->m, need * g->n);
        return -1;
    }
    g->admitted = true;
    int failed = 0;
    for (unsigned i = 0; i < g->n; i++) {
        struct sandbox_row copy = {0};
        struct child *c = &g->children[i];
        c->s = !failed && sandbox_row_copy(&copy, &c->row) == 0 ? sandbox_new(g->m, &copy, true, err) : NULL;
        struct op *op = c->s ? op_new("fork", child_wait, &g->a, g->status, NULL) : NULL;
        if (c->s) {
            c->s->reserved_mib = need;
            registry_add(g->m, c->s);
            failed = op ? 0 : err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
            if ((c->op = op))
                op_enqueue(c->s, op);
        } else {
            sandbox_row_free(&copy);
            budget_give(g->m, need);
            failed = -1;
        }
    }
    if (!failed && g->cb.admitted)
        g->cb.admitted(g->cb.arg, g->a.job_id);
    return failed;
}

static void start_child(struct child *c)
{
    struct fork_group *g = c->g;
    struct op *wait = c->op, *op = op_new("fork", child_run, &g->a, g->status, NULL);
    if (!op) {
        err_set(&c->err, ERR_INTERNAL, "out_of_memory", "out of memory");
        group_left(g, c->s);
        return;
    }
    op->a.idem_key[0] = 0;
    op->wants_slot = true;
    op->arg = c;
    c->op = op;
    op_enqueue(c->s, op);
    op_unpark(c->s, wait);
}

// One more than there are children: the group is there until all have been started.
static void start_children(struct fork_group *g, int64_t t_us)
{
    g->left = g->n + 1;
    g->t_launch_us = clock_mono_us();
    stage_note(&g->job, "capture", g->t_launch_us - t_us);
    for (unsigned i = 0; i < g->n; i++)
        start_child(&g->children[i]);
    group_left(g, g->children[0].s);
}

static void group_fail(struct fork_group *g, const struct err *err)
{
    if (g->admitted) {
        group_undo(g, err);
        return;
    }
    group_answer(g, err);
    group_free(g);
}

// ---- of a running sandbox -----------------------------------------------------------------------------------------
void fork_run(struct sandbox *s, struct op *op)
{
    struct fork_group *g = op->arg;
    struct err err = {0};
    const int64_t t = clock_mono_us();
    op->cb.done = NULL;
    const int state = sandbox_present_state(s);
    int failed = op_should_stop(s, op, &err) ? -1 : op_generation_check(s, op, &err);
    if (!failed && state != SANDBOX_RUNNING && state != SANDBOX_PAUSED)
        failed = err_set(&err, ERR_CONFLICT, "sandbox_not_running", "a sandbox that is %s cannot be forked",
                         sandbox_state_name(state));
    struct sandbox_info *view = sandbox_view(s);
    if (!failed)
        failed = copies_promise(g, s->dirfd, "disk.raw", &err);
    if (!failed)
        failed = make_children(g, &view->row, &err);
    sandbox_info_unref(view);
    if (!failed && (failed = fork_moment(s, &g->origin, &err)) != 0)
        (void)op_should_stop(s, op, &err); // a delete has ended the VM meanwhile, and is the answer
    else if (!failed)
        copies_made(g, 1); // the moment's
    if (failed)
        group_fail(g, &err);
    else
        start_children(g, t);
}

// ---- of a snapshot --------------------------------------------------------------------------------------------------
static int load_snapshot(struct fork_group *g, struct snapshot_row *row, struct err *err)
{
    const int found = snapshot_get(g->m->store, g->a.tenant, g->from, row, err);
    if (found != 0) {
        if (found > 0)
            *err = not_found_error();
        return -1;
    }
    if (g->a.if_generation != 0 && g->a.if_generation != row->generation)
        return err_set(err, ERR_PRECONDITION_FAILED, "generation_mismatch", "the snapshot is at generation %lld",
                       (long long)row->generation);
    return snapshot_usable(row, err);
}

static void fork_snapshot_work(void *arg)
{
    struct fork_group *g = arg;
    struct manager *m = g->m;
    const int64_t t = clock_mono_us();
    struct err err = {0};
    struct snapshot_row row = {0};
    int failed = load_snapshot(g, &row, &err);
    if (!failed) {
        char disk[ID_MAX + sizeof "/disk.raw"];
        snprintf(disk, sizeof disk, "%s/disk.raw", row.id);
        failed = copies_promise(g, m->snapshots_dirfd, disk, &err);
    }
    if (!failed) {
        CLEANUP_JSON json_t *backend = json_object();
        json_put_str(backend, "accel", row.accel);
        json_put_str(backend, "isolation", strcmp(row.accel, "kvm") == 0 ? "hardware" : "emulated");
        json_put_str(backend, "boot_path", "fork");
        json_put_str(backend, "qemu_version", m->host.qemu_version);
        struct sandbox_row from = {.vcpus = row.vcpus, .memory_mib = row.memory_mib, .disk_mib = row.disk_mib,
                                   .env_json = row.env_json, .backend_json = json_dumps(backend, JSON_COMPACT)};
        snprintf(from.id, sizeof from.id, "%s", row.sandbox_id);
        snprintf(from.image_ref, sizeof from.image_ref, "%s", row.image_ref);
        snprintf(from.image_digest, sizeof from.image_digest, "%s", row.image_digest);
        failed = make_children(g, &from, &err);
        free(from.backend_json);
    }
    if (!failed)
        failed = origin_snapshot(m, &row, &g->origin, &err);
    snapshot_row_free(&row);
    if (failed)
        group_fail(g, &err);
    else
        start_children(g, t);
    store_thread_done();
    atomic_fetch_sub(&m->active, 1);
}

// ---- what api calls -----------------------------------------------------------------------------------------------
static struct fork_group *group_new(struct manager *m, const char *id, const struct fork_request *r,
                                    const struct admission *a, int status, const struct fork_callbacks *cb)
{
    struct fork_group *g = calloc(1, sizeof *g);
    struct child *children = calloc(r->count, sizeof *children);
    if (!g || !children) {
        free(g);
        free(children);
        return NULL;
    }
    *g = (struct fork_group){.m = m, .cb = *cb, .a = *a, .status = status, .r = *r, .children = children, .n = r->count,
                             .t0_us = clock_mono_us()};
    pthread_mutex_init(&g->lock, NULL);
    snprintf(g->from, sizeof g->from, "%s", id);
    snprintf(g->on_expiry, sizeof g->on_expiry, "%s", r->on_expiry ? r->on_expiry : "");
    snprintf(g->owner, sizeof g->owner, "%s", r->owner ? r->owner : "");
    id_new(ID_JOB, g->a.job_id);
    return g;
}

int manager_fork(struct manager *m, const char *id, const struct fork_request *r, const struct admission *a,
                 int success_status, const struct fork_callbacks *cb)
{
    struct err err = {0};
    const bool of_snapshot = id_valid(ID_SNAPSHOT, id);
    struct sandbox *s = of_snapshot ? NULL : registry_find(m, a->tenant, id, &err);
    if (!of_snapshot && !s) {
        struct sandbox_info *gone = manager_get(m, a->tenant, id, &err);
        if (gone)
            err_set(&err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is destroyed");
        sandbox_info_unref(gone);
        cb->done(cb->arg, NULL, 0, &err);
        return 0;
    }
    struct fork_group *g = group_new(m, id, r, a, success_status, cb);
    struct op *op = g && s ? op_new("fork", fork_run, a, success_status, NULL) : NULL;
    if (!g || (s && !op)) {
        sandbox_unref(s);
        if (g)
            group_free(g);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        cb->done(cb->arg, NULL, 0, &err);
        return 0;
    }
    if (s) {
        snprintf(g->a.sandbox_id, sizeof g->a.sandbox_id, "%s", s->id);
        op->arg = g;
        op_enqueue(s, op);
        sandbox_unref(s);
        return 0;
    }
    g->of_snapshot = true;
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, fork_snapshot_work, g) == 0)
        return 0;
    atomic_fetch_sub(&m->active, 1);
    err_set(&err, ERR_UNAVAILABLE, "busy", "too many operations wait already");
    group_fail(g, &err);
    return 0;
}
