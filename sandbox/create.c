// Creating and starting: admission, then the stages prepare → launch → agent, each journaled before it begins.
//
// kill -9 of the server at each point, and what the next start does (docs/restart.md has the whole table):
//   before the admission is committed    nothing happened; the client's retry begins anew
//   admitted, prepare                     undone: files erased, sandbox destroyed, key free, retry begins anew
//   launch                                VM found by its name and ended, then as prepare
//   agent                                 VM adopted; when its agent answers the create succeeds
#include "sandbox/cold.h"
#include "sandbox/launch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sandbox/policy.h"

// ---- outcome ----------------------------------------------------------------------------------------------------
static void job_end(struct job_row *job, enum job_state state, const char *problem, const char *ref)
{
    job->state = state;
    job->finished_at_ms = job->updated_at_ms = clock_wall_ms();
    job->stage[0] = 0;
    free(job->problem_json);
    job->problem_json = problem ? strdup(problem) : NULL;
    if (ref)
        snprintf(job->ref, sizeof job->ref, "%s", ref);
    if (state == JOB_SUCCEEDED && ref) {
        free(job->result_json);
        if (asprintf(&job->result_json, "{\"sandbox_id\":\"%s\"}", ref) < 0)
            job->result_json = NULL;
    }
}

static void commit_up(struct launch *l)
{
    struct sandbox *s = l->s;
    struct err err = {0};
    const int from = l->row.state;
    l->row.state = SANDBOX_RUNNING;
    l->row.state_reason[0] = 0;
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    launch_describe(l);
    job_end(l->job, JOB_SUCCEEDED, NULL, s->id);
    CLEANUP_JSON json_t *facts = launch_facts(l);
    crash_point(s, "commit");
    struct change c = {.from_state = from, .cause = l->op->name, .job_update = l->job, .settle = &l->op->a,
                       .outcome = "succeeded", .status = l->op->success_status, .ref = s->id, .facts = facts};
    if (change_show(s, &c, &l->row, &err) != 0) {
        // Not durable: the client hears of the failure, and the next start finds a VM whose create was not finished.
        launch_undo(l);
        op_done(l->op, s, &err);
        return;
    }
    atomic_fetch_add(&s->m->boots, 1);
    crash_point(s, "end");
    op_done(l->op, s, NULL);
}

static const char *failure_reason(const struct err *err)
{
    return *err->code ? err->code : err_kind_name(err->kind);
}

// A restore that was refused before the guest ran leaves no sandbox; what was launched for it has ended (launch_undo).
static bool refused(struct launch *l, const struct err *why)
{
    struct err err = {0};
    static const char *const CODES[] = {"snapshot_deleted", "disk_full", "memory_budget"};
    bool named = why->kind == ERR_SNAPSHOT_MISMATCH;
    for (size_t i = 0; i < sizeof CODES / sizeof *CODES; i++)
        named = named || strcmp(why->code, CODES[i]) == 0;
    if (l->kind != LAUNCH_RESTORE || l->ran || !named)
        return false;
    CLEANUP_JSON json_t *report = json_pack("{s:[],s:[],s:[]}", "erased", "retained", "failed");
    if (sandbox_erase(l->s, report, true, &err) != 0)
        log_warn("sandbox %s: %s", l->s->id, err.detail);
    free(l->row.deletion_json);
    l->row.deletion_json = json_dumps(report, JSON_COMPACT);
    l->row.destroyed_at_ms = clock_wall_ms();
    return true;
}

static void commit_failed(struct launch *l, const struct err *why)
{
    struct sandbox *s = l->s;
    struct err err = {0};
    const int from = l->row.state;
    const bool none = refused(l, why);
    atomic_fetch_add(&s->m->boot_failures, 1);
    log_warn("sandbox %s: %s failed: %s (%s) %s", s->id, l->op->name, why->detail, why->code, why->internal);
    l->row.state = none ? SANDBOX_DESTROYED : SANDBOX_FAILED;
    snprintf(l->row.state_reason, sizeof l->row.state_reason, "%s", failure_reason(why));
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    free(l->row.runtime_json);
    l->row.runtime_json = NULL;
    sandbox_uid_release(s); // and its share of the memory
    struct change c = {.from_state = from, .cause = l->op->name, .job_update = l->job, .settle = &l->op->a, .ref = s->id};
    CLEANUP_FREE char *problem = change_set_failure(s->m, &c, &l->op->a, why);
    job_end(l->job, strcmp(why->code, "cancelled") == 0 ? JOB_CANCELLED : JOB_FAILED, problem, s->id);
    if (change_show(s, &c, &l->row, &err) != 0)
        log_error("sandbox %s: the failure could not be recorded: %s", s->id, err.internal);
    if (none)
        registry_remove(s->m, s);
    op_done(l->op, s, why);
}

static void launch_go(struct launch *l)
{
    struct err err = {0};
    if (launch_run(l, &err) != 0)
        commit_failed(l, &err);
    else
        commit_up(l);
    launch_close(l);
}

// ---- the operations -----------------------------------------------------------------------------------------------
// The row is admitted already (manager_create): here the guest comes up.
void create_run(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, *op->row.parent_snapshot_id ? LAUNCH_RESTORE : LAUNCH_CREATE);
    if (accel_choose(s->m, *op->require_accel ? op->require_accel : NULL, &l.accel, &err) != 0) {
        commit_failed(&l, &err);
        launch_close(&l);
        return;
    }
    launch_go(&l);
}

// A create of an earlier server whose VM was adopted: what is left is the outcome.
void create_resume(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, LAUNCH_CREATE);
    launch_resumed(&l);
    pthread_mutex_lock(&s->lock);
    l.vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    CLEANUP_JSON json_t *runtime = l.vm ? vm_runtime(l.vm) : NULL;
    const char *accel = json_get_str(runtime, "accel");
    l.accel = accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG;
    (void)images_runtime(s->m->images, &l.runtime, &err);
    if (!l.vm || launch_finish(&l, &err) != 0) {
        launch_undo(&l);
        commit_failed(&l, &err);
    } else {
        commit_up(&l);
    }
    launch_close(&l);
}

// start: admission, state starting, then the same stages from the disk that is there. The ttl counts from now.
void start_run(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, LAUNCH_START);
    const int from = l.row.state;
    job_begin(&op->job, &op->a, "sandbox.start");
    if (from == SANDBOX_RUNNING) { // already there: 200, nothing changes
        job_end(&op->job, JOB_SUCCEEDED, NULL, s->id);
        const struct change c = {.admit = &op->a, .job_insert = &op->job, .settle = &op->a, .outcome = "unchanged",
                                 .status = op->success_status, .ref = s->id};
        const int failed = change_commit(s->m, &c, &err);
        op_done(op, s, failed ? &err : NULL);
        launch_close(&l);
        return;
    }
    struct sm sm;
    sm_init(&sm, SANDBOX_STATE_TABLE, SANDBOX_STATES, from);
    if (op_should_stop(s, op, &err) || !sm_can(&sm, SANDBOX_STARTING)) {
        if (err.kind == ERR_NONE)
            err_set(&err, ERR_CONFLICT, "not_startable", "a sandbox that is %s cannot be started",
                    sandbox_state_name(from));
        op_done(op, s, &err);
        launch_close(&l);
        return;
    }
    if (store_reserve_check(s->m->store, &err) != 0 || accel_choose(s->m, NULL, &l.accel, &err) != 0) {
        op_done(op, s, &err);
        launch_close(&l);
        return;
    }
    const int64_t now = clock_wall_ms();
    l.row.state = SANDBOX_STARTING;
    l.row.state_reason[0] = 0;
    l.row.generation++;
    l.row.updated_at_ms = now;
    l.row.expires_at_ms = now + l.row.ttl_seconds * 1000;
    snprintf(l.row.job_id, sizeof l.row.job_id, "%s", op->a.job_id);
    struct change c = {.admit = &op->a, .from_state = from, .cause = "start", .job_insert = &op->job};
    struct sandbox_row shown = {0};
    const int failed = sandbox_row_copy(&shown, &l.row) != 0 ? err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory")
                                                              : change_show_once(s, &c, &shown, &err);
    if (failed) {
        op_done(op, s, &err);
        launch_close(&l);
        return;
    }
    cold_erase(s, NULL); // of a resume that failed
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    launch_go(&l);
}

// ---- admission of a create ------------------------------------------------------------------------------------------
struct create_admission {
    struct manager *m;
    struct op *op;
    char image[192];
    bool inserted;               // the row is in the store: a failure from here on must be recorded
    unsigned reserved_mib;       // of the memory budget, until the sandbox has it
};

// A shape that is asked for must be the snapshot's: a saved memory cannot change its size.
static int check_shape(const struct sandbox_row *row, const struct snapshot_row *snapshot, struct err *err)
{
    const bool same = (!row->vcpus || row->vcpus == snapshot->vcpus) &&
                      (!row->memory_mib || row->memory_mib == snapshot->memory_mib) &&
                      (!row->disk_mib || row->disk_mib == snapshot->disk_mib);
    if (same)
        return 0;
    err_set(err, ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch",
            "the snapshot has %d vcpus, %d MiB of memory and a disk of %d MiB: resources differ", snapshot->vcpus,
            snapshot->memory_mib, snapshot->disk_mib);
    const struct {
        const char *name;
        int asked, has;
    } parts[] = {{"vcpus", row->vcpus, snapshot->vcpus}, {"memory_mib", row->memory_mib, snapshot->memory_mib},
                 {"disk_mib", row->disk_mib, snapshot->disk_mib}};
    for (size_t i = 0; i < 3; i++)
        if (parts[i].asked && parts[i].asked != parts[i].has)
            err_field(err, parts[i].name, "expected %d, found %d", parts[i].asked, parts[i].has);
    return err_remedy(err, "leave out resources");
}

// Device state of one accelerator is nothing to the other: the sandbox has the snapshot's, whatever else this host could do.
static int check_accel(struct create_admission *c, const struct snapshot_row *snapshot, struct err *err)
{
    char *require = c->op->require_accel;
    if (!*require || strcmp(require, snapshot->accel) == 0) {
        snprintf(require, sizeof c->op->require_accel, "%s", snapshot->accel);
        return 0;
    }
    err_set(err, ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch", "the snapshot was taken under %s: require.accel differs",
            snapshot->accel);
    err_field(err, "accel", "expected %s, found %s", require, snapshot->accel);
    return err_remedy(err, "leave out require.accel");
}

static int admit_snapshot(struct create_admission *c, struct err *err)
{
    struct sandbox_row *row = &c->op->row;
    struct snapshot_row snapshot = {0};
    const int found = snapshot_get(c->m->store, row->tenant, row->parent_snapshot_id, &snapshot, err);
    if (found != 0) {
        if (found > 0)
            *err = not_found_error();
        return -1;
    }
    const int failed = snapshot_usable(&snapshot, err) != 0 || check_shape(row, &snapshot, err) != 0 ||
                       check_accel(c, &snapshot, err) != 0;
    snprintf(row->image_ref, sizeof row->image_ref, "%s", snapshot.image_ref);
    snprintf(row->image_digest, sizeof row->image_digest, "%s", snapshot.image_digest);
    snprintf(row->parent_sandbox_id, sizeof row->parent_sandbox_id, "%s", snapshot.sandbox_id);
    row->vcpus = snapshot.vcpus;
    row->memory_mib = snapshot.memory_mib;
    row->disk_mib = snapshot.disk_mib;
    free(row->env_json);
    row->env_json = strdup(snapshot.env_json ? snapshot.env_json : "{}");
    snapshot_row_free(&snapshot);
    return failed;
}

static int admit_checks(struct create_admission *c, struct err *err)
{
    struct manager *m = c->m;
    struct sandbox_row *row = &c->op->row;
    struct image_ref image;
    if (store_reserve_check(m->store, err) != 0)
        return -1;
    enum vm_accel accel;
    if (*row->parent_snapshot_id && admit_snapshot(c, err) != 0)
        return -1;
    if (accel_choose(m, *c->op->require_accel ? c->op->require_accel : NULL, &accel, err) != 0)
        return -1;
    if (!*row->parent_snapshot_id) {
        if (images_resolve(m->images, c->image, &image, err) != 0)
            return -1;
        snprintf(row->image_ref, sizeof row->image_ref, "%s", c->image);
        snprintf(row->image_digest, sizeof row->image_digest, "%s", image.digest);
    }
    c->reserved_mib = budget_need(accel, row->memory_mib);
    if (budget_take(m, c->reserved_mib, err) != 0) {
        c->reserved_mib = 0;
        return -1;
    }
    CLEANUP_JSON json_t *b = json_object();
    json_put_str(b, "accel", vm_accel_name(accel));
    json_put_str(b, "isolation", accel == VM_ACCEL_KVM ? "hardware" : "emulated");
    json_put_str(b, "boot_path", "cold");
    json_put_str(b, "qemu_version", m->host.qemu_version);
    row->backend_json = json_dumps(b, JSON_COMPACT);
    return 0;
}

static struct sandbox *admit(struct create_admission *c, struct err *err)
{
    struct op *op = c->op;
    if (admit_checks(c, err) != 0)
        return NULL;
    job_begin(&op->job, &op->a, "sandbox.create");
    op->job.state = JOB_QUEUED;
    snprintf(op->job.ref, sizeof op->job.ref, "%s", op->row.id);
    CLEANUP_JSON json_t *facts = json_object();
    json_put_str(facts, "image_digest", op->row.image_digest);
    json_put_int(facts, "vcpus", op->row.vcpus);
    json_put_int(facts, "memory_mib", op->row.memory_mib);
    json_put_int(facts, "disk_mib", op->row.disk_mib);
    json_put_int(facts, "ttl_seconds", op->row.ttl_seconds);
    const struct change change = {.admit = &op->a, .admit_facts = facts, .insert = &op->row,
                                  .max_live = c->m->o.max_live_per_tenant, .from_state = -1, .cause = "create",
                                  .job_insert = &op->job};
    if (change_commit(c->m, &change, err) != 0)
        return NULL;
    c->inserted = true;
    struct sandbox_row kept = {0};
    if (sandbox_row_copy(&kept, &op->row) != 0) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    struct sandbox *s = sandbox_new(c->m, &kept, true, err);
    if (!s) {
        sandbox_row_free(&kept);
        return NULL;
    }
    s->reserved_mib = c->reserved_mib;
    c->reserved_mib = 0;
    return s;
}

// The row is there but its directories are not: it fails like a create that could not prepare.
static void admitted_but_failed(struct create_admission *c, const struct err *why)
{
    struct op *op = c->op;
    struct err err = {0};
    const int from = op->row.state;
    op->row.state = SANDBOX_DESTROYED;
    snprintf(op->row.state_reason, sizeof op->row.state_reason, "%s", failure_reason(why));
    op->row.generation++;
    op->row.destroyed_at_ms = op->row.updated_at_ms = clock_wall_ms();
    struct change change = {.update = &op->row, .from_state = from, .cause = "create", .job_update = &op->job,
                            .settle = &op->a, .ref = op->row.id};
    CLEANUP_FREE char *problem = change_set_failure(c->m, &change, &op->a, why);
    job_end(&op->job, JOB_FAILED, problem, op->row.id);
    if (change_commit(c->m, &change, &err) != 0)
        log_error("sandbox %s: %s", op->row.id, err.internal);
}

static void create_admit_work(void *arg)
{
    struct create_admission *c = arg;
    struct manager *m = c->m;
    struct err err = {0};
    struct sandbox *s = admit(c, &err);
    budget_give(m, c->reserved_mib);
    if (!s) {
        if (c->inserted)
            admitted_but_failed(c, &err);
        c->op->cb.done(c->op->cb.arg, NULL, &err);
        op_discard(c->op);
    } else {
        if (c->op->cb.admitted)
            c->op->cb.admitted(c->op->cb.arg, c->op->a.job_id);
        op_enqueue(s, c->op); // before anybody finds it: a delete comes after its create
        registry_add(m, s);
        if (sandbox_present_state(s) == SANDBOX_DESTROYED) // by then already
            registry_remove(m, s);
        sandbox_unref(s);
    }
    free(c);
    atomic_fetch_sub(&m->active, 1);
}

static void fill_row(struct sandbox_row *row, const struct sandbox_request *r, const struct admission *a)
{
    const int64_t now = clock_wall_ms();
    snprintf(row->id, sizeof row->id, "%s", a->sandbox_id);
    snprintf(row->tenant, sizeof row->tenant, "%s", a->tenant);
    snprintf(row->name, sizeof row->name, "%s", r->name ? r->name : "");
    row->state = SANDBOX_STARTING;
    row->vcpus = r->vcpus;
    row->memory_mib = r->memory_mib;
    row->disk_mib = r->disk_mib;
    row->labels_json = r->labels ? json_dumps(r->labels, JSON_COMPACT) : strdup("{}");
    row->env_json = r->env ? json_dumps(r->env, JSON_COMPACT) : strdup("{}");
    row->ttl_seconds = r->ttl_seconds;
    row->expires_at_ms = now + r->ttl_seconds * 1000;
    snprintf(row->on_expiry, sizeof row->on_expiry, "%s", r->on_expiry);
    row->detached = r->detached;
    snprintf(row->owner, sizeof row->owner, "%s", r->owner ? r->owner : "");
    row->generation = 1;
    row->created_at_ms = row->updated_at_ms = now;
    snprintf(row->job_id, sizeof row->job_id, "%s", a->job_id);
    snprintf(row->audit_id, sizeof row->audit_id, "%s", a->audit_id);
    snprintf(row->receipt_id, sizeof row->receipt_id, "%s", a->receipt_id);
}

static int create_refuse(const struct op_callbacks *cb, const struct err *err)
{
    cb->done(cb->arg, NULL, err);
    return 0;
}

int manager_create(struct manager *m, const struct sandbox_request *r, const struct admission *a, int success_status,
                   const struct op_callbacks *cb)
{
    struct err err = {0};
    if (policy_env(r->env, &err) != 0)
        return create_refuse(cb, &err);
    struct op *op = op_new("create", create_run, a, success_status, cb);
    struct create_admission *c = calloc(1, sizeof *c);
    if (!op || !c) {
        free(op);
        free(c);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return create_refuse(cb, &err);
    }
    id_new(ID_SANDBOX, op->a.sandbox_id);
    id_new(ID_JOB, op->a.job_id);
    op->wants_slot = true;
    snprintf(op->require_accel, sizeof op->require_accel, "%s", r->require_accel ? r->require_accel : "");
    fill_row(&op->row, r, &op->a);
    c->m = m;
    c->op = op;
    snprintf(c->image, sizeof c->image, "%s", r->image ? r->image : "");
    snprintf(op->row.parent_snapshot_id, sizeof op->row.parent_snapshot_id, "%s", r->snapshot_id ? r->snapshot_id : "");
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, create_admit_work, c) == 0)
        return 0;
    atomic_fetch_sub(&m->active, 1);
    op_discard(op);
    free(c);
    err_set(&err, ERR_UNAVAILABLE, "busy", "too many operations wait already");
    return create_refuse(cb, &err);
}
