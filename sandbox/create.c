// Creating and starting: admission, then the stages prepare → launch → agent, each journaled before it begins.
//
// kill -9 of the server at each point, and what the next start does (docs/restart.md has the whole table):
//   before the admission is committed    nothing happened; the client's retry begins anew
//   admitted, prepare                     undone: files erased, sandbox destroyed, key free, retry begins anew
//   launch                                VM found by its name and ended, then as prepare
//   agent                                 VM adopted; when its agent answers the create succeeds
#include "sandbox/internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sandbox/disk.h"
#include "sandbox/policy.h"

struct launch {
    struct sandbox *s;
    struct op *op;
    struct sandbox_row row;      // the next version of the sandbox's row
    struct job_row *job;
    bool fresh;                  // create: makes the disk
    enum vm_accel accel;
    struct image_runtime runtime;
    int kernel_fd, initrd_fd, root_fd, disk_fd;
    struct vm *vm;               // set while the sandbox has it
    int64_t t_prepare_us, t_launch_us, t_agent_us;
};

// ---- accelerator ------------------------------------------------------------------------------------------------
int accel_choose(struct manager *m, const char *require, enum vm_accel *ret, struct err *err)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LIMIT_PROBE_MS / 1000 + 5;
    pthread_mutex_lock(&m->accel_lock);
    int waited = 0;
    while (m->accel_known == ACCEL_UNKNOWN && waited == 0)
        waited = pthread_cond_timedwait(&m->accel_cond, &m->accel_lock, &until);
    const bool known = m->accel_known == ACCEL_KNOWN, kvm = m->kvm_usable;
    char reason[sizeof m->accel_reason];
    snprintf(reason, sizeof reason, "%s", m->accel_reason);
    pthread_mutex_unlock(&m->accel_lock);
    if (!known)
        return err_set(err, ERR_UNAVAILABLE, "accel_unknown", "the accelerator is still being probed");
    const bool tcg_allowed = m->o.accel == ACCEL_TCG_ONLY || (m->o.accel == ACCEL_AUTO && m->o.allow_emulation);
    const bool want_kvm = require && strcmp(require, "kvm") == 0, want_tcg = require && strcmp(require, "tcg") == 0;
    if (kvm && m->o.accel != ACCEL_TCG_ONLY && !want_tcg)
        *ret = VM_ACCEL_KVM;
    else if (tcg_allowed && !want_kvm)
        *ret = VM_ACCEL_TCG;
    else if (want_tcg) {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "tcg", "emulation is not allowed on this server");
        return err_remedy(err, "start the server with --allow-emulation, or do not require tcg");
    } else {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "kvm", "KVM cannot be used here: %s", reason);
        return err_remedy(err, want_kvm && tcg_allowed
                                   ? "leave out require.accel to accept emulation, which is no security boundary"
                                   : "start the server with --allow-emulation to accept emulation, which is no "
                                     "security boundary");
    }
    return 0;
}

int manager_uid_take(struct manager *m, unsigned *ret_uid, struct err *err)
{
    *ret_uid = 0;
    if (!m->host.is_root || m->o.uid_count == 0)
        return 0;
    pthread_mutex_lock(&m->lock);
    unsigned i = 0;
    while (i < m->o.uid_count && m->uids[i])
        i++;
    if (i < m->o.uid_count) {
        m->uids[i] = 1;
        *ret_uid = m->o.uid_base + i;
    }
    pthread_mutex_unlock(&m->lock);
    if (*ret_uid == 0)
        return err_set(err, ERR_UNAVAILABLE, "uids_exhausted", "no host uid is left for another jail");
    return 0;
}

void sandbox_uid_release(struct sandbox *s)
{
    struct manager *m = s->m;
    pthread_mutex_lock(&m->lock);
    if (s->vm_uid >= m->o.uid_base && s->vm_uid < m->o.uid_base + m->o.uid_count)
        m->uids[s->vm_uid - m->o.uid_base] = 0;
    s->vm_uid = 0;
    pthread_mutex_unlock(&m->lock);
}

// ---- stages -----------------------------------------------------------------------------------------------------
static int stage_prepare(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct manager *m = l->s->m;
    const int64_t t = clock_mono_us();
    if (images_runtime(m->images, &l->runtime, err) != 0)
        return -1;
    l->kernel_fd = images_open_blob(m->images, l->runtime.kernel_digest, err);
    if (l->kernel_fd < 0)
        return -1;
    l->initrd_fd = images_open_blob(m->images, l->runtime.initramfs_digest, err);
    if (l->initrd_fd < 0)
        return -1;
    l->root_fd = images_open_blob(m->images, l->row.image_digest, err);
    if (l->root_fd < 0)
        return -1;
    if (l->fresh && disk_make(m->o.state_dirfd, l->s->dirfd, l->row.disk_mib, err) != 0)
        return -1;
    l->disk_fd = disk_open(l->s->dirfd, err);
    l->t_prepare_us = clock_mono_us() - t;
    return l->disk_fd < 0 ? -1 : 0;
}

// The facts that adoption needs become durable as soon as the process exists.
static int journal_runtime(struct launch *l, struct err *err)
{
    CLEANUP_JSON json_t *runtime = vm_runtime(l->vm);
    if (!runtime)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_put_int(runtime, "jail_uid", l->s->vm_uid);
    free(l->row.runtime_json);
    l->row.runtime_json = json_dumps(runtime, JSON_COMPACT);
    const struct change c = {.update = &l->row};
    return change_commit(l->s->m, &c, err);
}

static int stage_launch(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct sandbox *s = l->s;
    struct manager *m = s->m;
    const int64_t t = clock_mono_us();
    if (op_should_stop(s, l->op, err) || manager_uid_take(m, &s->vm_uid, err) != 0)
        return -1;
    const struct vm_spec spec = {.id = s->id, .accel = l->accel, .qemu_path = m->o.qemu_path, .vcpus = l->row.vcpus,
                                 .memory_mib = l->row.memory_mib, .tsc_khz = m->host.tsc_khz,
                                 .kernel_fd = l->kernel_fd, .initrd_fd = l->initrd_fd, .root_fd = l->root_fd,
                                 .disk_fd = l->disk_fd, .run_dirfd = s->run_dirfd, .jail_uid = s->vm_uid,
                                 .cgroup_parent = m->o.cgroup_parent};
    pthread_mutex_lock(&s->lock);
    memset(&s->fatal, 0, sizeof s->fatal);
    s->session = false;
    s->session_lost_ms = 0; // a boot has its own deadline
    s->vm_no++;
    pthread_mutex_unlock(&s->lock);
    l->vm = vm_launch(&spec, m->loop, &SANDBOX_VM_CALLBACKS, s, err);
    if (!l->vm)
        return -1;
    pthread_mutex_lock(&s->lock);
    s->vm = l->vm;
    pthread_mutex_unlock(&s->lock);
    l->t_launch_us = clock_mono_us() - t;
    return journal_runtime(l, err);
}

static void undo_launch(void *arg)
{
    struct launch *l = arg;
    struct err e = {0};
    if (sandbox_drop_vm(l->s, true, &e) != 0)
        log_error("sandbox %s: %s", l->s->id, e.internal);
    sandbox_uid_release(l->s);
    l->vm = NULL;
}

// Waits for the agent. A delete or cancel meanwhile kills the VM (lifecycle.c), which ends the wait.
static int stage_agent(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct sandbox *s = l->s;
    const int64_t t = clock_mono_us();
    const bool up = vm_wait_ready(l->vm, clock_mono_ms() + s->m->o.boot_timeout_ms, err);
    l->t_agent_us = clock_mono_us() - t;
    if (up && !op_should_stop(s, l->op, err))
        return 0;
    struct err stop = {0};
    if (op_should_stop(s, l->op, &stop))
        *err = stop;
    pthread_mutex_lock(&s->lock);
    if (!up && s->fatal.kind != ERR_NONE && stop.kind == ERR_NONE)
        *err = s->fatal;
    pthread_mutex_unlock(&s->lock);
    return -1;
}

static const struct stage LAUNCH_STAGES[] = {
    {"prepare", stage_prepare, NULL},
    {"launch", stage_launch, undo_launch},
    {"agent", stage_agent, NULL},
};

static void launch_close(struct launch *l)
{
    fd_close(&l->kernel_fd);
    fd_close(&l->initrd_fd);
    fd_close(&l->root_fd);
    fd_close(&l->disk_fd);
    sandbox_row_free(&l->row);
}

// ---- outcome ----------------------------------------------------------------------------------------------------
static void fill_backend(struct launch *l)
{
    struct manager *m = l->s->m;
    CLEANUP_JSON json_t *b = json_object();
    json_put_str(b, "accel", vm_accel_name(l->accel));
    json_put_str(b, "isolation", l->accel == VM_ACCEL_KVM ? "hardware" : "emulated");
    json_put_str(b, "boot_path", "cold");
    json_put_str(b, "qemu_version", m->host.qemu_version);
    free(l->row.backend_json);
    l->row.backend_json = json_dumps(b, JSON_COMPACT);
    CLEANUP_JSON json_t *t = json_object();
    const int64_t total = clock_mono_us() - l->op->t0_us;
    const int64_t admit = total - l->t_prepare_us - l->t_launch_us - l->t_agent_us;
    json_put_int(t, "admit", (admit > 0 ? admit : 0) / 1000);
    json_put_int(t, "prepare", l->t_prepare_us / 1000);
    json_put_int(t, "launch", l->t_launch_us / 1000);
    json_put_int(t, "restore", 0);
    json_put_int(t, "agent", l->t_agent_us / 1000);
    json_put_int(t, "total", total / 1000);
    free(l->row.timings_json);
    l->row.timings_json = json_dumps(t, JSON_COMPACT);
}

// What was really in force: the receipt's facts.
static json_t *launch_facts(struct launch *l)
{
    json_t *f = json_object();
    json_put_str(f, "accel", vm_accel_name(l->accel));
    json_put_str(f, "isolation_kind", l->accel == VM_ACCEL_KVM ? "hardware" : "emulated");
    json_put_str(f, "boot_path", "cold");
    json_put_str(f, "image_digest", l->row.image_digest);
    json_put_str(f, "kernel_digest", l->runtime.kernel_digest);
    json_put_str(f, "initramfs_digest", l->runtime.initramfs_digest);
    json_put_str(f, "qemu_digest", l->s->m->host.qemu_sha256);
    json_put_str(f, "qemu_version", l->s->m->host.qemu_version);
    json_put_int(f, "vcpus", l->row.vcpus);
    json_put_int(f, "memory_mib", l->row.memory_mib);
    json_put_int(f, "disk_mib", l->row.disk_mib);
    json_put(f, "network", json_string("none"));
    json_put(f, "jail", l->vm ? vm_isolation(l->vm) : json_null());
    return f;
}

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
    fill_backend(l);
    job_end(l->job, JOB_SUCCEEDED, NULL, s->id);
    CLEANUP_JSON json_t *facts = launch_facts(l);
    const struct change c = {.update = &l->row, .from_state = from, .cause = l->op->name, .job_update = l->job,
                             .settle = &l->op->a, .outcome = "succeeded", .status = l->op->success_status,
                             .ref = s->id, .facts = facts};
    if (change_commit(s->m, &c, &err) != 0) {
        // Not durable: the client hears of the failure, and the next start finds a VM whose create was not finished.
        undo_launch(l);
        op_done(l->op, s, &err);
        return;
    }
    atomic_fetch_add(&s->m->boots, 1);
    sandbox_publish(s, &l->row);
    op_done(l->op, s, NULL);
}

static const char *failure_reason(const struct err *err)
{
    return *err->code ? err->code : err_kind_name(err->kind);
}

static void commit_failed(struct launch *l, const struct err *why)
{
    struct sandbox *s = l->s;
    struct err err = {0};
    const int from = l->row.state;
    atomic_fetch_add(&s->m->boot_failures, 1);
    log_warn("sandbox %s: %s failed: %s (%s) %s", s->id, l->op->name, why->detail, why->code, why->internal);
    l->row.state = SANDBOX_FAILED;
    snprintf(l->row.state_reason, sizeof l->row.state_reason, "%s", failure_reason(why));
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    free(l->row.runtime_json);
    l->row.runtime_json = NULL;
    struct change c = {.update = &l->row, .from_state = from, .cause = l->op->name, .job_update = l->job,
                       .settle = &l->op->a, .ref = s->id};
    CLEANUP_FREE char *problem = change_set_failure(s->m, &c, &l->op->a, why);
    job_end(l->job, strcmp(why->code, "cancelled") == 0 ? JOB_CANCELLED : JOB_FAILED, problem, s->id);
    if (change_commit(s->m, &c, &err) != 0)
        log_error("sandbox %s: the failure could not be recorded: %s", s->id, err.internal);
    else
        sandbox_publish(s, &l->row);
    op_done(l->op, s, why);
}

static void launch_go(struct launch *l)
{
    struct err err = {0};
    const size_t n = sizeof LAUNCH_STAGES / sizeof *LAUNCH_STAGES;
    if (op_should_stop(l->s, l->op, &err) || stages_run(l->s->m, l->job, LAUNCH_STAGES, n, l, &err) != 0)
        commit_failed(l, &err);
    else
        commit_up(l);
    launch_close(l);
}

static void launch_init(struct launch *l, struct sandbox *s, struct op *op, bool fresh)
{
    memset(l, 0, sizeof *l);
    l->s = s;
    l->op = op;
    l->job = &op->job;
    l->fresh = fresh;
    l->kernel_fd = l->initrd_fd = l->root_fd = l->disk_fd = -1;
    struct sandbox_info *view = sandbox_view(s);
    sandbox_row_copy(&l->row, &view->row);
    sandbox_info_unref(view);
}

// ---- the operations -----------------------------------------------------------------------------------------------
// The row is admitted already (manager_create): here the guest comes up.
void create_run(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, true);
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
    launch_init(&l, s, op, false);
    pthread_mutex_lock(&s->lock);
    l.vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    CLEANUP_JSON json_t *runtime = l.vm ? vm_runtime(l.vm) : NULL;
    const char *accel = json_get_str(runtime, "accel");
    l.accel = accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG;
    (void)images_runtime(s->m->images, &l.runtime, &err);
    if (!l.vm || stage_agent(&l, &err) != 0) {
        undo_launch(&l);
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
    launch_init(&l, s, op, false);
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
    const struct change c = {.admit = &op->a, .update = &l.row, .from_state = from, .cause = "start",
                             .job_insert = &op->job};
    struct sandbox_row shown = {0};
    if (change_commit(s->m, &c, &err) != 0 || sandbox_row_copy(&shown, &l.row) != 0) {
        op_done(op, s, &err);
        launch_close(&l);
        return;
    }
    sandbox_publish(s, &shown);
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
};

static int admit_checks(struct create_admission *c, struct err *err)
{
    struct manager *m = c->m;
    struct sandbox_row *row = &c->op->row;
    struct image_ref image;
    if (store_reserve_check(m->store, err) != 0)
        return -1;
    if (images_resolve(m->images, c->image, &image, err) != 0)
        return -1;
    enum vm_accel accel;
    if (accel_choose(m, *c->op->require_accel ? c->op->require_accel : NULL, &accel, err) != 0)
        return -1;
    snprintf(row->image_ref, sizeof row->image_ref, "%s", c->image);
    snprintf(row->image_digest, sizeof row->image_digest, "%s", image.digest);
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
    if (!s)
        sandbox_row_free(&kept);
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
    if (!s) {
        if (c->inserted)
            admitted_but_failed(c, &err);
        c->op->cb.done(c->op->cb.arg, NULL, &err);
        op_discard(c->op);
    } else {
        registry_add(m, s);
        if (c->op->cb.admitted)
            c->op->cb.admitted(c->op->cb.arg, c->op->a.job_id);
        op_enqueue(s, c->op);
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
    snprintf(c->image, sizeof c->image, "%s", r->image);
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, create_admit_work, c) == 0)
        return 0;
    atomic_fetch_sub(&m->active, 1);
    op_discard(op);
    free(c);
    err_set(&err, ERR_UNAVAILABLE, "busy", "too many operations wait already");
    return create_refuse(cb, &err);
}
