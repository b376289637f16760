// Stop, delete, patch, detach, and what happens when a VM ends by itself. Each runs as the sandbox's only operation.
#include "sandbox/cold.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD_AGAIN_MS 1000 // nothing is written as long as it fails
#define CLEAN_AGAIN_MS 60000 // each try has a job and a receipt

// ---- shared -----------------------------------------------------------------------------------------------------
int sandbox_drop_vm(struct sandbox *s, bool end, struct err *err)
{
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    struct origin *origin = s->origin; // its memory goes with the VM: a cold or stopped sandbox needs the files alone
    s->vm = NULL;
    s->origin = NULL;
    s->session = false;
    pthread_mutex_unlock(&s->lock);
    origin_map_unref(s->m, origin);
    if (!vm)
        return 0;
    const int failed = end ? vm_end(vm, err) : 0;
    vm_free(vm);
    return failed;
}

static void row_next(struct sandbox *s, struct sandbox_row *ret)
{
    struct sandbox_info *view = sandbox_view(s);
    sandbox_row_copy(ret, &view->row);
    sandbox_info_unref(view);
    ret->generation++;
    ret->updated_at_ms = clock_wall_ms();
}

static void row_state(struct sandbox_row *row, int state, const char *reason)
{
    row->state = state;
    snprintf(row->state_reason, sizeof row->state_reason, "%s", reason ? reason : "");
}

static void job_finish(struct job_row *job, enum job_state state, const char *problem, const char *ref)
{
    job->state = state;
    job->stage[0] = 0;
    job->finished_at_ms = job->updated_at_ms = clock_wall_ms();
    job->problem_json = problem ? strdup(problem) : NULL;
    snprintf(job->ref, sizeof job->ref, "%s", ref);
}

// A verb that finds its state already there: 200, nothing changes, but it is evidence.
static void unchanged(struct sandbox *s, struct op *op, const char *kind)
{
    struct err err = {0};
    job_begin(&op->job, &op->a, kind);
    job_finish(&op->job, JOB_SUCCEEDED, NULL, s->id);
    const struct change c = {.admit = &op->a, .job_insert = &op->job, .settle = &op->a, .outcome = "unchanged",
                             .status = op->success_status, .ref = s->id};
    const int failed = change_commit(s->m, &c, &err);
    op_done(op, s, failed ? &err : NULL);
}

static void refuse_state(struct sandbox *s, struct op *op, const char *code, const char *verb)
{
    struct err err = {0};
    const int state = sandbox_present_state(s);
    if (!op_should_stop(s, op, &err))
        err_set(&err, ERR_CONFLICT, code, "a sandbox that is %s cannot be %s", sandbox_state_name(state), verb);
    op_done(op, s, &err);
}

// ---- stop -------------------------------------------------------------------------------------------------------
void stop_run(struct sandbox *s, struct op *op)
{
    struct err err = {0}, end_err = {0};
    const int state = sandbox_present_state(s);
    if (state == SANDBOX_STOPPED) {
        unchanged(s, op, "sandbox.stop");
        return;
    }
    if ((state != SANDBOX_RUNNING && state != SANDBOX_STOPPING && state != SANDBOX_PAUSED) || s->delete_wanted) {
        refuse_state(s, op, "not_stoppable", "stopped");
        return;
    }
    job_begin(&op->job, &op->a, "sandbox.stop");
    snprintf(op->job.stage, sizeof op->job.stage, "shutdown");
    struct sandbox_row row = {0};
    row_next(s, &row);
    row_state(&row, SANDBOX_STOPPING, NULL);
    struct change c = {.admit = &op->a, .job_insert = &op->job, .from_state = state, .cause = *op->cause ? op->cause : "stop"};
    if (change_show_once(s, &c, &row, &err) != 0) {
        op_done(op, s, &err);
        return;
    }
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    crash_point(s, "shutdown");
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    pthread_mutex_unlock(&s->lock);
    if (vm && state == SANDBOX_PAUSED && vm_resume(vm, &end_err) != 0) // a guest that stands still cannot be asked
        log_warn("sandbox %s: not resumed before its stop: %s", s->id, end_err.detail);
    const bool by_itself = vm && vm_stop(vm, LIMIT_STOP_GRACE_MS);
    if (sandbox_drop_vm(s, true, &end_err) != 0)
        log_error("sandbox %s: %s %s", s->id, end_err.detail, end_err.internal);
    sandbox_uid_release(s);
    commands_finish_all(s, OUTCOME_KILLED);
    memset(&row, 0, sizeof row);
    row_next(s, &row);
    row_state(&row, SANDBOX_STOPPED, strcmp(op->cause, "expired") == 0 ? "expired" : NULL);
    free(row.runtime_json);
    row.runtime_json = NULL;
    CLEANUP_JSON json_t *facts = json_object();
    json_put(facts, "guest_shut_down_by_itself", json_boolean(by_itself));
    job_finish(&op->job, JOB_SUCCEEDED, NULL, s->id);
    struct change done = {.job_update = &op->job, .from_state = SANDBOX_STOPPING, .cause = "stop", .settle = &op->a,
                          .outcome = "succeeded", .status = op->success_status, .ref = s->id, .facts = facts};
    crash_point(s, "commit");
    const int failed = change_show_once(s, &done, &row, &err);
    crash_point(s, "end");
    op_done(op, s, failed ? &err : NULL);
}

// ---- the VM ended by itself, or something is to be noted ------------------------------------------------------------
void gone_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    const int state = sandbox_present_state(s);
    if (state != SANDBOX_RUNNING && state != SANDBOX_PAUSED) {
        pthread_mutex_lock(&s->lock);
        s->end_unrecorded = false;
        pthread_mutex_unlock(&s->lock);
        return; // a stop, delete or failed launch is the cause and says so itself
    }
    pthread_mutex_lock(&s->lock);
    const bool again = s->end_unrecorded && !s->vm;
    const bool ours = (again || (s->vm && s->vm_no == op->vm_no)) && !s->delete_wanted;
    s->end_unrecorded = ours;
    s->gone_how = ours ? op->gone : s->gone_how;
    pthread_mutex_unlock(&s->lock);
    if (!ours)
        return; // an old VM's end, or the delete that comes says what became of it
    if (sandbox_drop_vm(s, true, &err) != 0)
        log_error("sandbox %s: %s %s", s->id, err.detail, err.internal);
    sandbox_uid_release(s);
    commands_finish_all(s, OUTCOME_LOST);
    const bool shutdown = op->gone == VM_GONE_SHUTDOWN;
    struct sandbox_row row = {0};
    row_next(s, &row);
    row_state(&row, shutdown ? SANDBOX_STOPPED : SANDBOX_FAILED, shutdown ? "guest_shutdown" : "vm_died");
    free(row.runtime_json);
    row.runtime_json = NULL;
    struct change c = {.from_state = state, .cause = shutdown ? "guest_shutdown" : "vm_died"};
    if (change_show_once(s, &c, &row, &err) != 0) { // the reaper tries again
        log_error("sandbox %s: its end could not be recorded: %s", s->id, err.internal);
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->end_unrecorded = false;
    pthread_mutex_unlock(&s->lock);
    log_info("sandbox %s: %s", s->id, shutdown ? "the guest shut down" : "the VM died");
}

void note_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    struct sandbox_row row = {0};
    if (sandbox_present_state(s) != SANDBOX_RUNNING)
        return;
    row_next(s, &row);
    const bool same = strcmp(row.state_reason, op->cause) == 0;
    if (op->flag == same) { // set already, or another reason took its place
        sandbox_row_free(&row);
        return;
    }
    snprintf(row.state_reason, sizeof row.state_reason, "%s", op->flag ? op->cause : "");
    struct change c = {.from_state = SANDBOX_RUNNING};
    if (change_show_once(s, &c, &row, &err) != 0)
        log_warn("sandbox %s: %s not recorded: %s", s->id, op->cause, err.internal);
}

// ---- patch and detach -------------------------------------------------------------------------------------------
void patch_run(struct sandbox *s, struct op *op)
{
    struct err err = {0};
    struct sandbox_row row = {0};
    row_next(s, &row);
    if (row.state == SANDBOX_DESTROYED || s->delete_wanted) {
        err_set(&err, ERR_CONFLICT, "destroyed", "a destroyed sandbox cannot be changed");
        sandbox_row_free(&row);
        op_done(op, s, &err);
        return;
    }
    if (op->labels) {
        free(row.labels_json);
        row.labels_json = json_dumps(op->labels, JSON_COMPACT);
    }
    if (op->ttl_seconds > 0) {
        row.ttl_seconds = op->ttl_seconds;
        row.expires_at_ms = clock_wall_ms() + op->ttl_seconds * 1000;
    }
    if (*op->on_expiry)
        snprintf(row.on_expiry, sizeof row.on_expiry, "%s", op->on_expiry);
    if (op->flag) { // detach
        row.detached = true;
        snprintf(row.owner, sizeof row.owner, "%s", op->owner);
    }
    CLEANUP_JSON json_t *facts = json_object();
    json_put_int(facts, "generation", row.generation);
    json_put_time(facts, "expires_at", row.expires_at_ms);
    struct change c = {.admit = &op->a, .settle = &op->a, .outcome = "succeeded", .status = op->success_status,
                       .ref = s->id, .facts = facts};
    const int failed = change_show_once(s, &c, &row, &err);
    op_done(op, s, failed ? &err : NULL);
}

void detach_run(struct sandbox *s, struct op *op)
{
    op->flag = true;
    patch_run(s, op);
}

// ---- delete -----------------------------------------------------------------------------------------------------
static void report_add(json_t *list, const char *kind, uint64_t bytes)
{
    json_t *one = json_object();
    json_put_str(one, "kind", kind);
    json_put_int(one, "bytes", (int64_t)bytes);
    json_array_append_new(list, one);
}

static uint64_t tree_bytes(int dirfd, const char *name)
{
    struct stat st;
    const int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return 0;
    uint64_t sum = 0;
    DIR *d = fdopendir(fd);
    if (!d) {
        close(fd);
        return 0;
    }
    for (const struct dirent *e; (e = readdir(d));)
        if (fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode))
            sum += (uint64_t)st.st_size;
    closedir(d);
    return sum;
}

// Erases what a destroyed sandbox must not leave: the disk, the run directory; with keep_records false logs and output
// too. Fills erased/retained/failed of the report.
int sandbox_erase(struct sandbox *s, json_t *report, bool keep_records, struct err *err)
{
    struct manager *m = s->m;
    json_t *erased = json_object_get(report, "erased"), *failed = json_object_get(report, "failed");
    int bad = 0;
    struct stat st;
    if (s->dirfd >= 0 && fstatat(s->dirfd, "disk.raw", &st, AT_SYMLINK_NOFOLLOW) == 0) {
        const uint64_t bytes = (uint64_t)st.st_blocks * 512;
        const int gone = unlinkat(s->dirfd, "disk.raw", 0) == 0;
        report_add(gone ? erased : failed, "disk", bytes);
        bad += !gone;
    }
    uint64_t bytes = 0;
    const bool cold = s->dirfd >= 0 && faccessat(s->dirfd, "cold", F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    const int cold_left = cold_erase(s, &bytes);
    if (cold || cold_left)
        report_add(cold_left ? failed : erased, "cold_state", bytes);
    bad += cold_left != 0;
    bytes = 0;
    (void)unlinkat(s->dirfd, "base.runs", 0);
    const int run_left = fd_remove_tree(m->run_dirfd, s->id, &bytes);
    report_add(run_left ? failed : erased, "run_directory", bytes);
    bad += run_left != 0;
    if (keep_records) {
        json_t *retained = json_object_get(report, "retained");
        report_add(retained, "logs", tree_bytes(s->dirfd, "log"));
        report_add(retained, "command_output", tree_bytes(s->dirfd, "out"));
    } else {
        bytes = 0;
        const int left = fd_remove_tree(m->sandboxes_dirfd, s->id, &bytes);
        report_add(left ? failed : erased, "records", bytes);
        bad += left != 0;
    }
    if (bad)
        return err_set(err, ERR_CLEANUP_FAILED, "cleanup_failed", "%d kinds of data could not be erased", bad);
    return 0;
}

static json_t *report_new(void)
{
    json_t *r = json_object();
    json_put(r, "erased", json_array());
    json_put(r, "retained", json_array());
    json_put(r, "failed", json_array());
    return r;
}

static int end_vm(struct sandbox *s, json_t *report, struct err *err)
{
    struct sandbox_info *view = sandbox_view(s);
    const uint64_t bytes = (uint64_t)view->row.memory_mib << 20;
    const int state = view->row.state;
    CLEANUP_JSON json_t *runtime = view->row.runtime_json ? json_loads(view->row.runtime_json, 0, NULL) : NULL;
    sandbox_info_unref(view);
    pthread_mutex_lock(&s->lock);
    const bool had = s->vm != NULL;
    pthread_mutex_unlock(&s->lock);
    int left = sandbox_drop_vm(s, true, err);
    if (!had && runtime) // of an earlier server, not adopted
        left = vm_end_stray(runtime, s->id, s->m->o.cgroup_parent, err);
    if (had || (runtime && state != SANDBOX_COLD && state != SANDBOX_STOPPED && state != SANDBOX_FAILED))
        report_add(json_object_get(report, left ? "failed" : "erased"), "memory", bytes);
    return left;
}

// A delete that is over without its end. What was begun goes on (reaper.c): its data are gone, and nobody may use it. ms: 0
// where nothing was begun, so that it is what it was.
static void delete_later(struct sandbox *s, int64_t ms)
{
    pthread_mutex_lock(&s->lock);
    s->delete_wanted = ms > 0;
    s->delete_again_ms = ms > 0 ? clock_mono_ms() + ms : 0;
    pthread_mutex_unlock(&s->lock);
}

void delete_run(struct sandbox *s, struct op *op)
{
    struct err err = {0}, vm_err = {0}, erase_err = {0};
    const int state = sandbox_present_state(s);
    job_begin(&op->job, &op->a, "sandbox.delete");
    if (state == SANDBOX_DESTROYED) { // twice at once: the second gets the first's report
        unchanged(s, op, "sandbox.delete");
        return;
    }
    snprintf(op->job.stage, sizeof op->job.stage, "erase");
    const struct change begin = {.admit = &op->a, .job_insert = &op->job};
    if (change_commit(s->m, &begin, &err) != 0) { // nothing has happened, unless it was begun before
        pthread_mutex_lock(&s->lock);
        const bool begun = s->delete_again_ms > 0 || strcmp(op->cause, "restart") == 0;
        pthread_mutex_unlock(&s->lock);
        delete_later(s, begun ? RECORD_AGAIN_MS : 0);
        op_done(op, s, &err);
        return;
    }
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->a.job_id);
    crash_point(s, "erase");
    CLEANUP_JSON json_t *report = report_new();
    const int vm_left = end_vm(s, report, &vm_err);
    sandbox_uid_release(s);
    commands_finish_all(s, OUTCOME_KILLED);
    const int files_left = sandbox_erase(s, report, true, &erase_err);
    report_add(json_object_get(report, "retained"), "receipts", 0);
    const struct err *why = vm_left ? &vm_err : files_left ? &erase_err : NULL;
    struct sandbox_row row = {0};
    row_next(s, &row);
    row.deletion_json = json_dumps(report, JSON_COMPACT);
    struct change c = {.settle = &op->a, .job_update = &op->job, .from_state = state,
                       .cause = *op->cause ? op->cause : "delete", .outcome = "succeeded", .status = op->success_status,
                       .ref = s->id, .facts = report};
    CLEANUP_FREE char *problem = NULL;
    if (why) { // stays what it is, failed: DELETE can be tried again
        row_state(&row, SANDBOX_FAILED, "cleanup_failed");
        c.from_state = state == SANDBOX_FAILED ? SANDBOX_FAILED : state;
        problem = change_set_failure(s->m, &c, &op->a, why);
    } else {
        row_state(&row, SANDBOX_DESTROYED, *op->cause ? op->cause : NULL);
        row.destroyed_at_ms = row.updated_at_ms;
        free(row.runtime_json);
        row.runtime_json = NULL;
    }
    job_finish(&op->job, why ? JOB_FAILED : JOB_SUCCEEDED, problem, s->id);
    crash_point(s, "commit");
    if (change_show_once(s, &c, &row, &err) != 0) {
        delete_later(s, RECORD_AGAIN_MS);
        op_done(op, s, &err);
        return;
    }
    crash_point(s, "end");
    if (!why)
        registry_remove(s->m, s);
    else
        delete_later(s, CLEAN_AGAIN_MS);
    op_done(op, s, why);
}

// ---- what api calls -----------------------------------------------------------------------------------------------
static int answer(const struct op_callbacks *cb, const struct err *err)
{
    cb->done(cb->arg, NULL, err);
    return 0;
}

static int queue(struct sandbox *s, struct op *op, const struct op_callbacks *cb)
{
    if (op) {
        snprintf(op->a.sandbox_id, sizeof op->a.sandbox_id, "%s", s->id);
        id_new(ID_JOB, op->a.job_id);
        op_enqueue(s, op);
    } else {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        answer(cb, &err);
    }
    sandbox_unref(s);
    return 0;
}

// A sandbox that is no longer live answers by its stored view: destroyed ones refuse, others are not found.
static int not_live(struct manager *m, const char *tenant, const char *id, const char *verb,
                    const struct op_callbacks *cb)
{
    struct err err = {0};
    struct sandbox_info *view = manager_get(m, tenant, id, &err);
    if (!view)
        return answer(cb, &err);
    const bool gone = view->row.state == SANDBOX_DESTROYED;
    sandbox_info_unref(view);
    if (gone)
        err_set(&err, ERR_CONFLICT, "destroyed", "a destroyed sandbox cannot be %s", verb);
    else
        err_set(&err, ERR_UNAVAILABLE, "busy", "the sandbox is being admitted");
    return answer(cb, &err);
}

int manager_verb(struct manager *m, const char *id, enum sandbox_verb verb, const char *owner, const struct admission *a,
                 int success_status, const struct op_callbacks *cb)
{
    static const struct {
        const char *name, *past;
        void (*run)(struct sandbox *, struct op *);
        bool slot;
    } VERBS[] = {
        [VERB_STOP] = {"stop", "stopped", stop_run, false},
        [VERB_START] = {"start", "started", start_run, true},
        [VERB_DETACH] = {"detach", "detached", detach_run, false},
        [VERB_PAUSE] = {"pause", "paused", pause_run, false},
        [VERB_RESUME] = {"resume", "resumed", resume_run, false},
        [VERB_COLD] = {"cold", "made cold", cold_run, false},
    };
    struct sandbox *s = registry_find(m, a->tenant, id, NULL);
    if (!s)
        return not_live(m, a->tenant, id, VERBS[verb].past, cb);
    struct op *op = op_new(VERBS[verb].name, VERBS[verb].run, a, success_status, cb);
    if (op) {
        op->wants_slot = VERBS[verb].slot || (verb == VERB_RESUME && sandbox_present_state(s) == SANDBOX_COLD);
        snprintf(op->owner, sizeof op->owner, "%s", owner ? owner : "");
    }
    return queue(s, op, cb);
}

int manager_patch(struct manager *m, const char *id, const struct sandbox_patch *p, const struct admission *a,
                  int success_status, const struct op_callbacks *cb)
{
    struct sandbox *s = registry_find(m, a->tenant, id, NULL);
    if (!s)
        return not_live(m, a->tenant, id, "changed", cb);
    struct op *op = op_new("patch", patch_run, a, success_status, cb);
    if (op) {
        op->labels = p->labels ? json_deep_copy(p->labels) : NULL;
        op->ttl_seconds = p->ttl_seconds;
        snprintf(op->on_expiry, sizeof op->on_expiry, "%s", p->on_expiry ? p->on_expiry : "");
    }
    return queue(s, op, cb);
}

// The second DELETE of a destroyed sandbox: the same report, with a receipt of its own.
struct redelete {
    struct manager *m;
    struct admission a;
    int status;
    struct op_callbacks cb;
    struct sandbox_info *view;
};

static int redelete_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct redelete *r = arg;
    const struct change c = {.admit = &r->a, .settle = &r->a, .outcome = "unchanged", .status = r->status,
                             .ref = r->view->row.id};
    return change_apply(tx, &c, err);
}

static void redelete_done(void *arg, const struct err *err)
{
    struct redelete *r = arg;
    r->cb.done(r->cb.arg, err ? NULL : r->view, err);
    sandbox_info_unref(r->view);
    free(r);
}

static int delete_again(struct manager *m, const char *id, const struct admission *a, int status,
                        const struct op_callbacks *cb)
{
    struct err err = {0};
    struct sandbox_info *view = manager_get(m, a->tenant, id, &err);
    if (!view)
        return answer(cb, &err);
    if (view->row.state != SANDBOX_DESTROYED) {
        sandbox_info_unref(view);
        err_set(&err, ERR_UNAVAILABLE, "busy", "the sandbox is being admitted");
        return answer(cb, &err);
    }
    struct redelete *r = calloc(1, sizeof *r);
    if (r) {
        *r = (struct redelete){.m = m, .a = *a, .status = status, .cb = *cb, .view = view};
        snprintf(r->a.sandbox_id, sizeof r->a.sandbox_id, "%s", id);
        if (store_submit(m->store, redelete_tx, redelete_done, r) == 0)
            return 0;
        free(r);
    }
    sandbox_info_unref(view);
    err_set(&err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
    return answer(cb, &err);
}

static void enqueue_delete(struct sandbox *s, struct op *op)
{
    snprintf(op->a.sandbox_id, sizeof op->a.sandbox_id, "%s", s->id);
    id_new(ID_JOB, op->a.job_id);
    pthread_mutex_lock(&s->lock);
    s->delete_wanted = true;
    if (s->vm && s->ops) // what runs may wait for the guest, and it has lost its purpose
        vm_kill(s->vm);
    pthread_mutex_unlock(&s->lock);
    op_enqueue(s, op);
    ops_kick_for_delete(s);
}

int manager_delete(struct manager *m, const char *id, const struct admission *a, int success_status,
                   const struct op_callbacks *cb)
{
    struct err err = {0};
    struct sandbox *s = registry_find(m, a->tenant, id, NULL);
    if (!s)
        return delete_again(m, id, a, success_status, cb);
    struct op *op = op_new("delete", delete_run, a, success_status, cb);
    if (op)
        enqueue_delete(s, op);
    sandbox_unref(s);
    if (op)
        return 0;
    err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    return answer(cb, &err);
}

void manager_delete_by_system(struct sandbox *s, const struct admission *a, const char *cause)
{
    struct op *op = op_new("delete", delete_run, a, 200, NULL);
    if (!op)
        return; // the next tick tries again
    snprintf(op->cause, sizeof op->cause, "%s", cause);
    enqueue_delete(s, op);
}
