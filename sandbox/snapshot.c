// Snapshots: taking one of a running or paused sandbox, putting one back into memory, comparing.
//
// take: freeze → capture → write → commit. Until `commit` the files are in `snapshots/.<id>`, which the next start removes;
// the source goes on after `capture`.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/carry.h"
#include "sandbox/cold.h"

// ---- a call of a client's ---------------------------------------------------------------------------------------------
struct snapshot_call {
    struct snapshot_callbacks cb;
    struct snapshot_row row;
    bool stop;
};

static void call_admitted(void *arg, const char *job_id)
{
    const struct snapshot_call *call = arg;
    if (call->cb.admitted)
        call->cb.admitted(call->cb.arg, job_id);
}

static void call_done(void *arg, const struct sandbox_info *info, const struct err *err)
{
    struct snapshot_call *call = arg;
    (void)info;
    if (call->cb.done)
        call->cb.done(call->cb.arg, err ? NULL : &call->row, err);
    snapshot_row_free(&call->row);
    free(call);
}

static int answer(const struct snapshot_callbacks *cb, const struct err *err)
{
    cb->done(cb->arg, NULL, err);
    return 0;
}

static void job_finish(struct job_row *job, bool ok, const char *problem, const char *ref)
{
    job->state = ok ? JOB_SUCCEEDED : JOB_FAILED;
    job->stage[0] = 0;
    job->finished_at_ms = job->updated_at_ms = clock_wall_ms();
    free(job->problem_json);
    job->problem_json = problem ? strdup(problem) : NULL;
    snprintf(job->ref, sizeof job->ref, "%s", ref);
}

// ---- taking -----------------------------------------------------------------------------------------------------------
static json_t *qemu_of(const json_t *machine)
{
    json_t *q = json_object();
    json_put_str(q, "version", json_get_str(machine, "qemu_version"));
    json_put_str(q, "digest", json_get_str(machine, "qemu_digest"));
    json_put_str(q, "machine", json_get_str(machine, "machine"));
    json_put_str(q, "cpu_model", json_get_str(machine, "cpu_model"));
    return q;
}

// The snapshot that a sandbox comes from, or where that was deleted the nearest one before it: lineage, not storage.
static void find_parent(struct manager *m, struct snapshot_row *row, const char *first)
{
    struct snapshot_row at = {0};
    struct err err = {0};
    char id[ID_MAX];
    snprintf(id, sizeof id, "%s", first);
    row->parent_id[0] = 0;
    while (*id && !*row->parent_id && snapshot_get(m->store, row->tenant, id, &at, &err) == 0) {
        if (at.state == SNAPSHOT_READY)
            snprintf(row->parent_id, sizeof row->parent_id, "%s", at.id);
        snprintf(id, sizeof id, "%s", at.parent_id);
        snapshot_row_free(&at);
    }
}

static void fill_source(struct snapshot_row *row, const struct sandbox_row *from)
{
    CLEANUP_JSON json_t *backend = from->backend_json ? json_loads(from->backend_json, 0, NULL) : NULL;
    const char *accel = json_get_str(backend, "accel");
    snprintf(row->tenant, sizeof row->tenant, "%s", from->tenant);
    snprintf(row->sandbox_id, sizeof row->sandbox_id, "%s", from->id);
    snprintf(row->image_ref, sizeof row->image_ref, "%s", from->image_ref);
    snprintf(row->image_digest, sizeof row->image_digest, "%s", from->image_digest);
    snprintf(row->accel, sizeof row->accel, "%s", accel ? accel : "");
    row->vcpus = from->vcpus;
    row->memory_mib = from->memory_mib;
    row->disk_mib = from->disk_mib;
    free(row->env_json);
    row->env_json = from->env_json ? strdup(from->env_json) : NULL;
}

static void put_ms(json_t *t, const char *name, int64_t us)
{
    const int64_t hundredths = us / 10;
    json_put(t, name, json_real((double)hundredths / 100));
}

static void fill_result(struct snapshot_row *row, const struct moment *mo, struct saved_result *r, int64_t write_us,
                        int64_t total_us)
{
    CLEANUP_JSON json_t *t = json_object();
    put_ms(t, "freeze", mo->freeze_us);
    put_ms(t, "stop", mo->capture.stop_us);
    put_ms(t, "save", mo->capture.save_us);
    put_ms(t, "memory", mo->capture.memory_us);
    put_ms(t, "disk", mo->capture.disk_us);
    put_ms(t, "write", write_us);
    put_ms(t, "total", total_us);
    row->state = SNAPSHOT_READY;
    snprintf(row->kind, sizeof row->kind, "%s", *mo->base.template_key ? "delta" : "full");
    snprintf(row->template_key, sizeof row->template_key, "%s", mo->base.template_key);
    snprintf(row->manifest_sha256, sizeof row->manifest_sha256, "%s", r->manifest_sha256);
    json_put_str(r->digests, "manifest", r->manifest_sha256);
    row->sizes_json = json_dumps(r->sizes, JSON_COMPACT);
    row->digests_json = json_dumps(r->digests, JSON_COMPACT);
    row->timings_json = json_dumps(t, JSON_COMPACT);
    row->bytes = r->bytes;
    row->paused_us = mo->capture.paused_us;
    json_decref(r->sizes);
    json_decref(r->digests);
}

static json_t *result_facts(const struct snapshot_row *row)
{
    json_t *f = json_object();
    json_put_str(f, "snapshot_id", row->id);
    json_put_str(f, "kind", row->kind);
    json_put_str(f, "manifest_sha256", row->manifest_sha256);
    json_put_str(f, "template", *row->template_key ? row->template_key : NULL);
    json_put_int(f, "bytes", row->bytes);
    json_put_int(f, "paused_us", row->paused_us);
    json_put_time(f, "expires_at", row->expires_at_ms);
    return f;
}

static int write_spools(struct saved_writer *w, struct sandbox *s, const json_t *commands, struct err *err)
{
    if (json_array_size(commands) == 0)
        return 0;
    if (mkdirat(w->dirfd, "spool", 0700) != 0)
        return err_sys(err, errno, "making a snapshot's spool");
    CLEANUP_FD int dir = openat(w->dirfd, "spool", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return dir < 0 ? err_sys(err, errno, "opening a snapshot's spool") : carry_spools(s->out_dirfd, dir, commands, err);
}

// Captures and writes; the files have their name where it returns 0.
static int take(struct sandbox *s, struct job_row *job, struct snapshot_call *call, struct err *err)
{
    struct manager *m = s->m;
    struct saved_writer w = {0};
    struct saved_result r = {0};
    struct moment mo = {0};
    const int64_t t0 = clock_mono_us();
    struct sandbox_info *view = sandbox_view(s);
    CLEANUP_JSON json_t *machine = machine_of_row(m, &view->row, err), *q = qemu_of(machine);
    fill_source(&call->row, &view->row);
    find_parent(m, &call->row, view->row.parent_snapshot_id);
    sandbox_info_unref(view);
    call->row.qemu_json = json_dumps(q, JSON_COMPACT);
    int failed = machine ? saved_begin(m->store, m->snapshots_dirfd, call->row.id, true, &w, err) : -1;
    if (!failed)
        failed = room_for(m, room_of_disk(s->dirfd, "disk.raw"), err);
    if (!failed)
        failed = moment_take(s, w.state_fd, w.disk_fd, !call->stop, &mo, err);
    const int64_t t1 = clock_mono_us();
    crash_point(s, "write");
    if (!failed)
        failed = room_for(m, ram_runs_bytes(&mo.capture.runs), err);
    if (!failed)
        failed = write_spools(&w, s, mo.commands, err);
    const struct saved_facts f = {.kind = "snapshot", .id = call->row.id, .epoch = call->row.epoch,
                                  .template_key = mo.base.template_key, .template_manifest = mo.base.template_manifest,
                                  .machine = machine, .commands = mo.commands};
    if (!failed)
        failed = saved_finish(&w, &f, &mo.capture.runs, mo.capture.pages, &r, err);
    const int64_t t2 = clock_mono_us();
    if (!failed)
        fill_result(&call->row, &mo, &r, t2 - t1, t2 - t0);
    stage_note(job, "capture", t1 - t0);
    stage_note(job, "write", t2 - t1);
    saved_abort(&w);
    moment_free(&mo);
    return failed;
}

static void go_on(struct sandbox *s)
{
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    if (vm && sandbox_present_state(s) == SANDBOX_RUNNING && vm_is_paused(vm) && vm_resume(vm, &err) != 0)
        log_error("sandbox %s: could not be resumed: %s", s->id, err.detail);
    if (vm)
        vm_thaw(vm);
}

static void fail(struct sandbox *s, struct op *op, const struct err *why)
{
    struct err err = {0};
    struct change c = {.job_update = &op->job, .settle = &op->a, .ref = s->id};
    CLEANUP_FREE char *problem = change_set_failure(s->m, &c, &op->a, why);
    job_finish(&op->job, false, problem, s->id);
    log_warn("sandbox %s: snapshot failed: %s (%s) %s", s->id, why->detail, why->code, why->internal);
    if (change_commit(s->m, &c, &err) != 0)
        log_error("sandbox %s: the failure could not be recorded: %s", s->id, err.internal);
    op_done(op, s, why);
}

// The source ends as by a stop: its guest is asked, so that its disk has what it had written.
static void end_source(struct sandbox *s)
{
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    if (vm && vm_is_paused(vm) && vm_resume(vm, &err) != 0)
        log_warn("sandbox %s: not resumed before its stop: %s", s->id, err.detail);
    if (vm) {
        vm_thaw(vm);
        (void)vm_stop(vm, LIMIT_STOP_GRACE_MS);
    }
    memset(&err, 0, sizeof err);
    if (sandbox_drop_vm(s, true, &err) != 0)
        log_error("sandbox %s: %s %s", s->id, err.detail, err.internal);
    sandbox_uid_release(s);
    commands_finish_all(s, OUTCOME_KILLED);
}

static int commit(struct sandbox *s, struct op *op, struct snapshot_call *call, struct err *err)
{
    struct sandbox_row row = {0};
    struct shown shown = {s, &row};
    const int from = sandbox_present_state(s);
    CLEANUP_JSON json_t *facts = result_facts(&call->row);
    job_finish(&op->job, true, NULL, call->row.id);
    if (asprintf(&op->job.result_json, "{\"snapshot_id\":\"%s\"}", call->row.id) < 0)
        op->job.result_json = NULL;
    struct change c = {.job_update = &op->job, .settle = &op->a, .outcome = "succeeded", .status = op->success_status,
                       .ref = call->row.id, .facts = facts, .snapshot_insert = &call->row,
                       .max_snapshots = s->m->o.max_snapshots_per_tenant, .event_kind = "snapshot.created"};
    if (call->stop) {
        struct sandbox_info *view = sandbox_view(s);
        sandbox_row_copy(&row, &view->row);
        sandbox_info_unref(view);
        row.generation++;
        row.updated_at_ms = clock_wall_ms();
        row.state = SANDBOX_STOPPED;
        snprintf(row.state_reason, sizeof row.state_reason, "snapshot");
        c.update = &row;
        c.shown = &shown;
        c.n_shown = 1;
        c.from_state = from;
        c.cause = "snapshot";
    }
    int failed = change_commit(s->m, &c, err);
    while (failed && strcmp(err->code, "parent_deleted") == 0) { // since it was looked up
        memset(err, 0, sizeof *err);
        find_parent(s->m, &call->row, call->row.parent_id);
        failed = change_commit(s->m, &c, err);
    }
    if (failed)
        sandbox_row_free(&row);
    return failed;
}

void snapshot_run(struct sandbox *s, struct op *op)
{
    struct snapshot_call *call = op->cb.arg;
    struct err err = {0};
    const int state = sandbox_present_state(s);
    if (op_should_stop(s, op, &err)) {
        op_done(op, s, &err);
        return;
    }
    if (state != SANDBOX_RUNNING && state != SANDBOX_PAUSED) {
        err_set(&err, ERR_CONFLICT, "sandbox_not_running", "a sandbox that is %s has no memory to take",
                sandbox_state_name(state));
        op_done(op, s, &err);
        return;
    }
    job_begin(&op->job, &op->a, op->a.operation);
    snprintf(op->job.stage, sizeof op->job.stage, "capture");
    snprintf(op->job.ref, sizeof op->job.ref, "%s", call->row.id);
    const struct change intent = {.admit = &op->a, .job_insert = &op->job};
    if (store_reserve_check(s->m->store, &err) != 0 || change_commit(s->m, &intent, &err) != 0) {
        op_done(op, s, &err);
        return;
    }
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    int failed = take(s, &op->job, call, &err);
    crash_point(s, "commit");
    if (!failed && commit(s, op, call, &err) != 0) {
        uint64_t bytes = 0;
        snapshot_erase(s->m, call->row.id, &bytes, &failed);
        failed = -1;
    }
    if (failed) {
        if (!op_should_stop(s, op, &err)) // a delete has ended the VM meanwhile, and is the answer
            go_on(s);
        fail(s, op, &err);
        return;
    }
    crash_point(s, "end");
    if (call->stop)
        end_source(s);
    op_done(op, s, NULL);
}

int manager_snapshot(struct manager *m, const char *sandbox_id, const struct snapshot_request *r,
                     const struct admission *a, int success_status, const struct snapshot_callbacks *cb)
{
    struct err err = {0};
    struct sandbox *s = registry_find(m, a->tenant, sandbox_id, &err);
    if (!s) {
        struct sandbox_info *gone = manager_get(m, a->tenant, sandbox_id, &err);
        if (gone)
            err_set(&err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is destroyed");
        sandbox_info_unref(gone);
        return answer(cb, &err);
    }
    struct snapshot_call *call = calloc(1, sizeof *call);
    const struct op_callbacks wrapped = {call_admitted, call_done, call};
    struct op *op = call ? op_new("snapshot", snapshot_run, a, success_status, &wrapped) : NULL;
    if (!op) {
        free(call);
        sandbox_unref(s);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return answer(cb, &err);
    }
    const int64_t now = clock_wall_ms();
    call->cb = *cb;
    call->stop = r->stop;
    id_new(ID_SNAPSHOT, call->row.id);
    snprintf(call->row.name, sizeof call->row.name, "%s", r->name ? r->name : "");
    call->row.created_at_ms = now;
    call->row.epoch = now;
    call->row.generation = 1;
    call->row.expires_at_ms = r->keep ? 0 : now + r->expires_in_seconds * 1000;
    snprintf(op->a.sandbox_id, sizeof op->a.sandbox_id, "%s", s->id);
    id_new(ID_JOB, op->a.job_id);
    snprintf(call->row.job_id, sizeof call->row.job_id, "%s", op->a.job_id);
    snprintf(call->row.audit_id, sizeof call->row.audit_id, "%s", a->audit_id);
    snprintf(call->row.receipt_id, sizeof call->row.receipt_id, "%s", a->receipt_id);
    op_enqueue(s, op);
    sandbox_unref(s);
    // cppcheck-suppress memleak ; call_done frees it
    return 0;
}

int snapshot_usable(const struct snapshot_row *row, struct err *err)
{
    if (row->state != SNAPSHOT_READY)
        return err_set(err, ERR_CONFLICT, "snapshot_deleted", "the snapshot was deleted");
    if (row->expires_at_ms != 0 && clock_wall_ms() >= row->expires_at_ms) // others are built on it, or it goes in a moment
        return err_set(err, ERR_CONFLICT, "snapshot_expired", "the snapshot's retention is over");
    return 0;
}

bool snapshot_deleted_meanwhile(struct manager *m, const struct snapshot_row *row, struct err *err)
{
    struct snapshot_row now = {0};
    struct err ignored = {0};
    const bool deleted = snapshot_get(m->store, row->tenant, row->id, &now, &ignored) == 0 && now.state != SNAPSHOT_READY;
    snapshot_row_free(&now);
    if (!deleted)
        return false;
    memset(err, 0, sizeof *err);
    err_set(err, ERR_CONFLICT, "snapshot_deleted", "the snapshot was deleted");
    return true;
}

// ---- back into memory ---------------------------------------------------------------------------------------------------
static int open_row(struct manager *m, const struct snapshot_row *row, struct saved *ret, json_t *mismatches,
                    struct err *err)
{
    const struct saved_expect expect = {.kind = "snapshot", .id = row->id, .manifest_sha256 = row->manifest_sha256,
                                        .epoch = row->epoch};
    if (saved_open(m->store, m->snapshots_dirfd, row->id, &expect, ret, mismatches, err) == 0)
        return 0;
    if (err->kind != ERR_NOT_FOUND)
        return -1;
    memset(err, 0, sizeof *err);
    saved_mismatch(mismatches, "manifest", "present", "missing");
    return saved_refuse(mismatches, err);
}

static json_t *machine_of_snapshot(struct manager *m, const struct snapshot_row *row, struct err *err)
{
    CLEANUP_JSON json_t *backend = json_object();
    json_put_str(backend, "accel", row->accel);
    CLEANUP_FREE char *text = json_dumps(backend, JSON_COMPACT);
    struct sandbox_row as = {.vcpus = row->vcpus, .memory_mib = row->memory_mib, .disk_mib = row->disk_mib,
                             .backend_json = text};
    snprintf(as.image_digest, sizeof as.image_digest, "%s", row->image_digest);
    return machine_of_row(m, &as, err);
}

int snapshot_origin_make(struct manager *m, const struct snapshot_row *row, struct origin **ret, struct err *err)
{
    struct saved files = {0};
    CLEANUP_JSON json_t *mismatches = json_array(), *machine = machine_of_snapshot(m, row, err);
    if (!machine || open_row(m, row, &files, mismatches, err) != 0)
        return -1;
    const int failed = saved_origin(m, &files, machine, true, mismatches, ret, err);
    if (!failed) {
        (*ret)->commands = json_incref(json_object_get(files.manifest, "commands"));
        (*ret)->signature = files.signature;
        saved_verified(&files);
        (*ret)->spool_dirfd = openat(files.dirfd, "spool", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    }
    saved_close(&files);
    return failed;
}

static int compare(struct manager *m, const struct saved *files, const json_t *machine, json_t *mismatches, struct err *err)
{
    const char *key = json_get_str(files->manifest, "template");
    const char *manifest = json_get_str(files->manifest, "template_manifest");
    const char *accel = json_get_str(machine, "accel");
    enum vm_accel usable;
    struct err unusable = {0};
    machine_compare(json_object_get(files->manifest, "machine"), machine, mismatches);
    if (accel_choose(m, accel, &usable, &unusable) != 0)
        saved_mismatch(mismatches, "accel", accel, "not usable");
    if (key && *key && template_check(m, key, manifest ? manifest : "", mismatches, err) != 0)
        return -1;
    return saved_verify(files, mismatches, err);
}

json_t *manager_snapshot_compat(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    struct snapshot_row row = {0};
    struct saved files = {0};
    const int found = snapshot_get(m->store, tenant, id, &row, err);
    if (found != 0 || snapshot_usable(&row, err) != 0) {
        if (found == 0)
            snapshot_row_free(&row);
        else if (found > 0)
            *err = not_found_error();
        return NULL;
    }
    CLEANUP_JSON json_t *mismatches = json_array(), *machine = machine_of_snapshot(m, &row, err);
    int failed = machine ? open_row(m, &row, &files, mismatches, err) : -1;
    if (failed && err->kind == ERR_SNAPSHOT_MISMATCH) { // not there at all
        failed = 0;
        memset(err, 0, sizeof *err);
    } else if (!failed && json_array_size(mismatches) == 0) { // else nothing that the manifest says is believed
        failed = compare(m, &files, machine, mismatches, err);
    }
    saved_close(&files);
    if (!failed && json_array_size(mismatches) > 0)
        failed = snapshot_deleted_meanwhile(m, &row, err) ? -1 : 0;
    snapshot_row_free(&row);
    if (failed)
        return NULL;
    json_t *verdict = json_object();
    json_put(verdict, "compatible", json_boolean(json_array_size(mismatches) == 0));
    json_put(verdict, "mismatches", json_incref(mismatches));
    return verdict;
}
