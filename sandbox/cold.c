// Pause, resume, and the cold state: memory to storage, QEMU gone, and back.
//
// cold:   freeze → capture (the VM stays stopped) → write → commit → end. Before `commit` a restart finds a running sandbox
//         and lets its VM go on; after it, it ends what is left of the VM.
// resume: prepare → launch → restore → agent → commit. Before `agent` a restart goes back to cold: the guest has not run
//         and its disk is as it was. From `agent` on the VM is adopted and the resume finished.
#include "sandbox/cold.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sandbox/carry.h"
#include "sandbox/disk.h"
#include "sandbox/launch.h"

#define REFRESH_MS 5000

// ---- rows -------------------------------------------------------------------------------------------------------
static void row_next(struct sandbox *s, struct sandbox_row *ret, int state, const char *reason)
{
    struct sandbox_info *view = sandbox_view(s);
    sandbox_row_copy(ret, &view->row);
    sandbox_info_unref(view);
    ret->generation++;
    ret->updated_at_ms = clock_wall_ms();
    ret->state = state;
    snprintf(ret->state_reason, sizeof ret->state_reason, "%s", reason ? reason : "");
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

static void unchanged(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    job_begin(&op->job, &op->a, op->a.operation);
    job_finish(&op->job, true, NULL, s->id);
    const struct change c = {.admit = &op->a, .job_insert = &op->job, .settle = &op->a, .outcome = "unchanged",
                             .status = op->success_status, .ref = s->id};
    const int failed = change_commit(s->m, &c, &err);
    op_done(op, s, failed ? &err : NULL);
}

static bool refused(struct sandbox *s, struct op *op, bool allowed, const char *code, const char *verb)
{
    struct err err = {0};
    if (op_should_stop(s, op, &err)) {
        op_done(op, s, &err);
        return true;
    }
    if (allowed)
        return false;
    err_set(&err, ERR_CONFLICT, code, "a sandbox that is %s cannot be %s", sandbox_state_name(sandbox_present_state(s)), verb);
    op_done(op, s, &err);
    return true;
}

// Intent, durable, before the act.
static int admit(struct sandbox *s, struct op *op, const char *stage, struct err *err)
{
    job_begin(&op->job, &op->a, op->a.operation);
    snprintf(op->job.stage, sizeof op->job.stage, "%s", stage);
    const struct change c = {.admit = &op->a, .job_insert = &op->job};
    if (change_commit(s->m, &c, err) != 0)
        return -1;
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    return 0;
}

// The act failed and nothing has changed: outcome, job, answer.
static void fail(struct sandbox *s, struct op *op, const struct err *why)
{
    struct err err = {0}, stop = {0};
    if (op_should_stop(s, op, &stop)) // a delete has ended the VM, and is the answer
        why = &stop;
    struct change c = {.job_update = &op->job, .settle = &op->a, .ref = s->id};
    CLEANUP_FREE char *problem = change_set_failure(s->m, &c, &op->a, why);
    job_finish(&op->job, false, problem, s->id);
    log_warn("sandbox %s: %s failed: %s (%s) %s", s->id, op->name, why->detail, why->code, why->internal);
    if (change_commit(s->m, &c, &err) != 0)
        log_error("sandbox %s: the failure could not be recorded: %s", s->id, err.internal);
    op_done(op, s, why);
}

static struct vm *vm_of(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    return vm;
}

// ---- pause and resume -----------------------------------------------------------------------------------------------
static void move(struct sandbox *s, struct op *op, int from, int to, json_t *facts, struct err *err)
{
    struct sandbox_row row = {0};
    pthread_mutex_lock(&s->lock); // what was told before a pause is told on after it
    const char *reason = to != SANDBOX_RUNNING ? NULL : s->disk_full_noted ? "host_disk_full" : s->mute_noted ? "agent_unresponsive" : NULL;
    pthread_mutex_unlock(&s->lock);
    row_next(s, &row, to, reason);
    job_finish(&op->job, true, NULL, s->id);
    struct change c = {.job_update = &op->job, .from_state = from, .cause = op->name, .settle = &op->a,
                       .outcome = "succeeded", .status = op->success_status, .ref = s->id, .facts = facts};
    crash_point(s, "commit");
    const int failed = change_show_once(s, &c, &row, err);
    crash_point(s, "end");
    struct err ignored = {0};
    if (failed && to == SANDBOX_PAUSED && vm_resume(vm_of(s), &ignored) != 0) // it is running, for everybody
        log_error("sandbox %s: could not be resumed: %s", s->id, ignored.detail);
    if (failed && to == SANDBOX_RUNNING && vm_pause(vm_of(s), &ignored) != 0) // it is paused, for everybody
        log_error("sandbox %s: could not be paused again: %s", s->id, ignored.detail);
    op_done(op, s, failed ? err : NULL);
}

void pause_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    const int state = sandbox_present_state(s);
    if (state == SANDBOX_PAUSED) {
        unchanged(s, op);
        return;
    }
    struct vm *vm = vm_of(s);
    if (refused(s, op, state == SANDBOX_RUNNING && vm, "not_pausable", "paused"))
        return;
    if (admit(s, op, "pause", &err) != 0) {
        op_done(op, s, &err);
        return;
    }
    crash_point(s, "pause");
    const int64_t t = clock_mono_us();
    const int failed = vm_pause(vm, &err);
    stage_note(&op->job, "pause", clock_mono_us() - t);
    if (failed)
        fail(s, op, &err);
    else
        move(s, op, SANDBOX_RUNNING, SANDBOX_PAUSED, NULL, &err);
}

// The guest's clock stood still: its wall clock is set before anyone is told that it runs.
static void set_clock(struct sandbox *s, struct vm *vm, json_t *facts)
{
    struct err err = {0};
    struct vm_refreshed r = {0};
    const struct vm_identity id = {.clock = true};
    // After a restart of the server the agent is met only now.
    const bool set = vm_wait_ready(vm, clock_mono_ms() + REFRESH_MS, &err) &&
                     vm_refresh(vm, &id, REFRESH_MS, &r, &err) == 0;
    json_put(facts, "clock_set", json_boolean(set));
    if (set)
        json_put_int(facts, "clock_offset_ms", r.clock_offset_ms);
    else
        log_warn("sandbox %s: its clock was not set after the pause: %s", s->id, err.detail);
}

void resume_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    const int state = sandbox_present_state(s);
    if (state == SANDBOX_RUNNING) {
        unchanged(s, op);
        return;
    }
    if (state == SANDBOX_COLD) {
        wake_run(s, op);
        return;
    }
    struct vm *vm = vm_of(s);
    if (refused(s, op, state == SANDBOX_PAUSED && vm, "not_resumable", "resumed"))
        return;
    if (admit(s, op, "resume", &err) != 0) {
        op_done(op, s, &err);
        return;
    }
    crash_point(s, "resume");
    CLEANUP_JSON json_t *facts = json_object();
    const int64_t t = clock_mono_us();
    const int failed = vm_resume(vm, &err);
    if (!failed)
        set_clock(s, vm, facts);
    stage_note(&op->job, "resume", clock_mono_us() - t);
    if (failed) {
        fail(s, op, &err);
        return;
    }
    move(s, op, SANDBOX_PAUSED, SANDBOX_RUNNING, facts, &err);
}

// ---- cold -------------------------------------------------------------------------------------------------------
int cold_erase(struct sandbox *s, uint64_t *ret_bytes)
{
    uint64_t bytes = 0, half = 0;
    if (ret_bytes)
        *ret_bytes = 0;
    if (s->dirfd < 0)
        return 0;
    const int left = fd_remove_tree(s->dirfd, "cold", &bytes) | fd_remove_tree(s->dirfd, ".cold", &half) |
                     fd_remove_tree(s->dirfd, ".cold.old", NULL);
    if (left)
        log_warn("sandbox %s: its cold state could not be erased", s->id);
    if (ret_bytes)
        *ret_bytes = bytes + half;
    return left ? -1 : 0;
}

// What the row remembers of the files: where the memory goes back to, and which writing of it is the last.
static void row_cold(struct sandbox_row *row, const struct moment *mo, const struct saved_result *r)
{
    CLEANUP_JSON json_t *o = json_object();
    json_put_str(o, "template", mo->base.template_key);
    json_put_str(o, "template_manifest", mo->base.template_manifest);
    json_put_str(o, "cold_manifest", r->manifest_sha256);
    json_put_int(o, "cold_epoch", row->generation);
    free(row->origin_json);
    row->origin_json = json_dumps(o, JSON_COMPACT);
}

static int cold_write(struct sandbox *s, struct saved_writer *w, const struct moment *mo, struct sandbox_row *row,
                      struct saved_result *r, struct err *err)
{
    CLEANUP_JSON json_t *machine = machine_of_row(s->m, row, err);
    const struct saved_facts f = {.kind = "cold", .id = s->id, .epoch = row->generation,
                                  .template_key = mo->base.template_key,
                                  .template_manifest = mo->base.template_manifest, .machine = machine,
                                  .commands = mo->commands};
    w->own_disk_fd = disk_open(s->dirfd, err); // it stands still, as the memory does
    if (!machine || w->own_disk_fd < 0 || saved_finish(w, &f, &mo->capture.runs, mo->capture.pages, r, err) != 0)
        return -1;
    row_cold(row, mo, r);
    return 0;
}

static json_t *moment_facts(const struct moment *mo, const struct saved_result *r)
{
    json_t *f = json_object();
    json_put_int(f, "bytes", r->bytes);
    json_put_str(f, "manifest_sha256", r->manifest_sha256);
    json_put_int(f, "paused_us", mo->capture.paused_us);
    json_put_str(f, "template", *mo->base.template_key ? mo->base.template_key : NULL);
    return f;
}

// The VM goes on as it was before.
static void cold_give_up(struct sandbox *s, struct op *op, int from, struct vm *vm, const struct err *why)
{
    struct err err = {0};
    struct err told = *why;
    const bool deleted = op_should_stop(s, op, &told); // which has ended the VM, and is the answer
    if (!deleted && from == SANDBOX_RUNNING && vm_is_paused(vm) && vm_resume(vm, &err) != 0)
        log_error("sandbox %s: could not be resumed: %s", s->id, err.detail);
    vm_thaw(vm);
    if (!deleted && from == SANDBOX_RUNNING)
        vm_set_clock(vm); // it stood still
    fail(s, op, &told);
}

void cold_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    struct saved_writer w = {0};
    struct saved_result r = {0};
    struct moment mo = {0};
    const int from = sandbox_present_state(s);
    if (from == SANDBOX_COLD) {
        unchanged(s, op);
        return;
    }
    struct vm *vm = vm_of(s);
    if (refused(s, op, (from == SANDBOX_RUNNING || from == SANDBOX_PAUSED) && vm, "not_coolable", "made cold"))
        return;
    if (store_reserve_check(s->m->store, &err) != 0 || admit(s, op, "capture", &err) != 0) {
        op_done(op, s, &err);
        return;
    }
    const int64_t t0 = clock_mono_us();
    int failed = machine_fits(s, &err);
    if (!failed)
        failed = saved_begin(s->m->store, s->dirfd, "cold", false, &w, &err);
    if (!failed)
        failed = moment_take(s, w.state_fd, -1, false, &mo, &err);
    const int64_t t1 = clock_mono_us();
    struct sandbox_row row = {0};
    row_next(s, &row, SANDBOX_COLD, strcmp(op->cause, "expired") == 0 ? "expired" : NULL);
    crash_point(s, "write");
    if (!failed)
        failed = room_for(s->m, ram_runs_bytes(&mo.capture.runs), &err);
    if (!failed)
        failed = cold_write(s, &w, &mo, &row, &r, &err);
    stage_note(&op->job, "capture", t1 - t0);
    stage_note(&op->job, "write", clock_mono_us() - t1);
    if (failed) {
        saved_abort(&w);
        moment_free(&mo);
        sandbox_row_free(&row);
        cold_give_up(s, op, from, vm, &err);
        return;
    }
    CLEANUP_JSON json_t *facts = moment_facts(&mo, &r);
    moment_free(&mo);
    json_decref(r.sizes);
    json_decref(r.digests);
    job_finish(&op->job, true, NULL, s->id);
    crash_point(s, "commit");
    struct change c = {.job_update = &op->job, .from_state = from, .cause = *op->cause ? op->cause : "cold",
                       .settle = &op->a, .outcome = "succeeded", .status = op->success_status, .ref = s->id, .facts = facts};
    if (change_show_once(s, &c, &row, &err) != 0) { // not durable: it runs on, and the files are of no epoch that is known
        cold_erase(s, NULL);
        cold_give_up(s, op, from, vm, &err);
        return;
    }
    crash_point(s, "end");
    struct err end_err = {0};
    if (sandbox_drop_vm(s, true, &end_err) != 0)
        log_error("sandbox %s: %s %s", s->id, end_err.detail, end_err.internal);
    sandbox_uid_release(s);
    op_done(op, s, NULL);
}

// As the reaper would see it now: the ttl may have been renewed while the cooling waited.
static bool still_due(struct sandbox *s)
{
    struct sandbox_info *view = sandbox_view(s);
    const struct sandbox_row *row = &view->row;
    const bool due = (row->state == SANDBOX_RUNNING || row->state == SANDBOX_PAUSED) && row->expires_at_ms > 0 &&
                     clock_wall_ms() >= row->expires_at_ms && strcmp(row->on_expiry, "cold") == 0;
    sandbox_info_unref(view);
    pthread_mutex_lock(&s->lock);
    const bool deleted = s->delete_wanted;
    pthread_mutex_unlock(&s->lock);
    return due && !deleted;
}

static void stop_if_due(struct sandbox *s, struct op *op)
{
    if (still_due(s))
        stop_run(s, op);
}

static void stopped_instead(struct sandbox *s)
{
    struct admission a;
    system_admission(&a, s->tenant, "sandbox.stop", s->id);
    struct op *op = op_new("expire", stop_if_due, &a, 200, NULL);
    if (!op)
        return; // the reaper's next look begins anew
    snprintf(op->cause, sizeof op->cause, "expired");
    id_new(ID_JOB, op->a.job_id);
    op_enqueue(s, op);
}

// A guest can keep itself from being saved (by not answering) and a host's disk can be full: neither is a longer life.
void expire_cold_run(struct sandbox *s, struct op *op)
{
    cold_run(s, op);
    if (still_due(s))
        stopped_instead(s);
}

// ---- back -------------------------------------------------------------------------------------------------------
int cold_load(struct sandbox *s, const struct sandbox_row *row, const struct machine_parts *parts, struct origin **ret,
              struct err *err)
{
    struct saved files = {0};
    CLEANUP_JSON json_t *mismatches = json_array(), *machine = machine_of(parts);
    CLEANUP_JSON json_t *o = row->origin_json ? json_loads(row->origin_json, 0, NULL) : NULL;
    const char *manifest = json_get_str(o, "cold_manifest");
    const struct saved_expect expect = {.kind = "cold", .id = s->id, .manifest_sha256 = manifest ? manifest : "none",
                                        .epoch = json_get_int(o, "cold_epoch", -2)};
    if (saved_open(s->m->store, s->dirfd, "cold", &expect, &files, mismatches, err) != 0) {
        if (err->kind != ERR_NOT_FOUND)
            return -1;
        memset(err, 0, sizeof *err);
        saved_mismatch(mismatches, "manifest", "present", "missing");
        return saved_refuse(mismatches, err);
    }
    CLEANUP_FD int disk = disk_open(s->dirfd, err);
    int failed = disk < 0 ? -1 : 0;
    if (!failed && json_array_size(mismatches) == 0)
        failed = saved_verify_own_disk(&files, disk, mismatches, err);
    if (!failed)
        failed = saved_origin(s->m, &files, machine, false, mismatches, ret, err);
    saved_close(&files);
    return failed;
}

static void wake_commit(struct sandbox *s, struct op *op, struct launch *l)
{
    struct err err = {0};
    l->row.state = SANDBOX_RUNNING;
    l->row.state_reason[0] = 0;
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    launch_describe(l);
    job_finish(l->job, true, NULL, s->id);
    CLEANUP_JSON json_t *facts = launch_facts(l);
    struct change c = {.from_state = SANDBOX_RESTORING, .cause = "resume", .job_update = l->job, .settle = &op->a,
                       .outcome = "succeeded", .status = op->success_status, .ref = s->id, .facts = facts};
    crash_point(s, "commit");
    while (change_show(s, &c, &l->row, &err) != 0) { // it runs: recorded as soon as the disk takes it, or by the next start
        struct err stop = {0};
        const struct timespec second = {.tv_sec = 1};
        log_warn_limited("sandbox %s: its resume could not be recorded: %s", s->id, err.internal);
        if (manager_stopping(s->m) || op_should_stop(s, op, &stop)) {
            op_done(op, s, &err);
            return;
        }
        nanosleep(&second, NULL); // nobody tells when there is room again
        memset(&err, 0, sizeof err);
    }
    crash_point(s, "end");
    cold_erase(s, NULL); // of an epoch that is over
    op_done(op, s, NULL);
}

void cold_to_stopped_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    struct sandbox_row row = {0};
    if (sandbox_present_state(s) != SANDBOX_COLD || op_should_stop(s, op, &err))
        return;
    commands_finish_all(s, OUTCOME_KILLED);
    row_next(s, &row, SANDBOX_STOPPED, "expired");
    struct change c = {.from_state = SANDBOX_COLD, .cause = "expired"};
    if (change_show_once(s, &c, &row, &err) != 0) {
        log_warn_limited("sandbox %s: its expiry could not be recorded: %s", s->id, err.detail); // the next tick tries again
        return;
    }
    cold_erase(s, NULL);
    log_info("sandbox %s: expired, stopped", s->id);
}

// Back to cold where the guest has not run; else it is a VM that died.
static void wake_failed(struct sandbox *s, struct op *op, struct launch *l, bool ran, const struct err *why)
{
    struct err err = {0};
    sandbox_uid_release(s);
    if (ran)
        commands_finish_all(s, OUTCOME_LOST);
    l->row.state = ran ? SANDBOX_FAILED : SANDBOX_COLD;
    snprintf(l->row.state_reason, sizeof l->row.state_reason, "%s", *why->code ? why->code : err_kind_name(why->kind));
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    free(l->row.runtime_json);
    l->row.runtime_json = NULL;
    struct change c = {.from_state = SANDBOX_RESTORING, .cause = "resume", .job_update = l->job, .settle = &op->a,
                       .ref = s->id};
    CLEANUP_FREE char *problem = change_set_failure(s->m, &c, &op->a, why);
    job_finish(l->job, false, problem, s->id);
    log_warn("sandbox %s: resume failed: %s (%s) %s", s->id, why->detail, why->code, why->internal);
    if (change_show(s, &c, &l->row, &err) != 0)
        log_error("sandbox %s: the failure could not be recorded: %s", s->id, err.internal);
    else if (ran)
        cold_erase(s, NULL); // of an epoch that is over
    op_done(op, s, why);
}

static int wake_admit(struct sandbox *s, struct op *op, struct launch *l, struct err *err)
{
    struct sandbox_row shown = {0};
    job_begin(&op->job, &op->a, op->a.operation);
    l->row.state = SANDBOX_RESTORING;
    l->row.state_reason[0] = 0;
    l->row.generation++;
    l->row.updated_at_ms = clock_wall_ms();
    struct change c = {.admit = &op->a, .from_state = SANDBOX_COLD, .cause = "resume", .job_insert = &op->job};
    if (sandbox_row_copy(&shown, &l->row) != 0)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (change_show_once(s, &c, &shown, err) != 0)
        return -1;
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    return 0;
}

void wake_run(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, LAUNCH_WAKE);
    if (op_should_stop(s, op, &err) || store_reserve_check(s->m->store, &err) != 0 ||
        accel_again(s->m, &l.row, &l.accel, &err) != 0 ||
        sandbox_budget_take(s, l.accel, l.row.memory_mib, &err) != 0 || wake_admit(s, op, &l, &err) != 0) {
        sandbox_uid_release(s);
        op_done(op, s, &err);
    } else if (launch_run(&l, &err) == 0) {
        wake_commit(s, op, &l);
    } else {
        wake_failed(s, op, &l, l.ran, &err);
    }
    launch_close(&l);
}

void wake_resume(struct sandbox *s, struct op *op)
{
    struct launch l;
    struct err err = {0};
    launch_init(&l, s, op, LAUNCH_WAKE);
    launch_resumed(&l);
    l.vm = vm_of(s);
    CLEANUP_JSON json_t *runtime = l.vm ? vm_runtime(l.vm) : NULL;
    const char *accel = json_get_str(runtime, "accel");
    l.accel = accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG;
    (void)images_runtime(s->m->images, &l.runtime, &err);
    if (l.vm && launch_finish(&l, &err) == 0) {
        wake_commit(s, op, &l);
    } else {
        launch_undo(&l);
        wake_failed(s, op, &l, true, &err);
    }
    launch_close(&l);
}
