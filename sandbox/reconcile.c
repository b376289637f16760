// What a start does about what an earlier server left: adopt what runs, finish or undo what was half done, end what
// belongs to nobody. docs/restart.md has the table of every stage.
#include "qemu/disk_job.h"
#include "sandbox/cold.h"
#include "sandbox/launch.h"
#include "sandbox/unfinished.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ADOPT_READY_MS (LIMIT_AGENT_MUTE_MS + 1500) // by then it answers, or is told as mute

// ---- one sandbox --------------------------------------------------------------------------------------------------
static void commit_state(struct sandbox *s, int to, const char *reason, const char *cause)
{
    struct err err = {0};
    struct sandbox_row row = {0};
    struct sandbox_info *view = sandbox_view(s);
    sandbox_row_copy(&row, &view->row);
    sandbox_info_unref(view);
    const int from = row.state;
    row.state = to;
    snprintf(row.state_reason, sizeof row.state_reason, "%s", reason ? reason : "");
    row.generation++;
    row.updated_at_ms = clock_wall_ms();
    if (to == SANDBOX_DESTROYED)
        row.destroyed_at_ms = row.updated_at_ms;
    free(row.runtime_json);
    row.runtime_json = NULL;
    struct change c = {.from_state = from, .cause = cause};
    if (change_show_once(s, &c, &row, &err) != 0)
        log_error("sandbox %s: %s not recorded: %s %s", s->id, cause, err.detail, err.internal);
}

static json_t *runtime_of(struct sandbox *s)
{
    struct sandbox_info *view = sandbox_view(s);
    json_t *runtime = view->row.runtime_json ? json_loads(view->row.runtime_json, 0, NULL) : NULL;
    sandbox_info_unref(view);
    return runtime;
}

// What its row says: a row may be stale, and the uid another's since. It is free when nobody claims it any more.
static void uid_reserve(struct sandbox *s, const json_t *runtime)
{
    struct manager *m = s->m;
    const unsigned uid = (unsigned)json_get_int(runtime, "jail_uid", 0);
    pthread_mutex_lock(&m->lock);
    if (uid >= m->o.uid_base && uid < m->o.uid_base + m->o.uid_count) {
        m->uids[uid - m->o.uid_base]++;
        s->vm_uid = uid;
    }
    pthread_mutex_unlock(&m->lock);
}

// It runs already: its share is taken whether it fits or not.
static void budget_reserve(struct sandbox *s, const json_t *runtime)
{
    const char *accel = json_get_str(runtime, "accel");
    struct sandbox_info *view = sandbox_view(s);
    if (s->reserved_mib == 0) {
        s->reserved_mib = budget_need(accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG,
                                      view->row.memory_mib);
        budget_force(s->m, s->reserved_mib);
    }
    sandbox_info_unref(view);
}

struct command_load {
    struct sandbox *s;
    bool live;   // false: nothing of it can still run
};

// Commands that had not finished: given back to the sandbox, or settled as lost.
static bool load_command(void *arg, const struct command_row *row)
{
    struct command_load *l = arg;
    struct err err = {0};
    struct admission a;
    if (strcmp(row->sandbox_id, l->s->id) != 0)
        return true;
    if (!pending_take(l->s->m, row->receipt_id, &a)) {
        system_admission(&a, row->tenant, "command.run", row->sandbox_id);
        snprintf(a.receipt_id, sizeof a.receipt_id, "%s", row->receipt_id);
    }
    snprintf(a.job_id, sizeof a.job_id, "%s", row->job_id);
    snprintf(a.sandbox_id, sizeof a.sandbox_id, "%s", row->sandbox_id);
    if (!row->internal && command_adopt(l->s, row, &a, &err) == 0)
        return true;
    command_lose(l->s->m, row, &a);
    return true;
}

static int load_commands(struct sandbox *s, struct err *err)
{
    struct command_load l = {.s = s};
    return command_each_unfinished_all_tenants(s->m->store, load_command, &l, err);
}

// Adopts the VM. VM_ADOPTED: session is up (or the agent is mute, which is told).
static enum vm_adopt_verdict adopt_vm(struct sandbox *s, const json_t *runtime, struct err *err)
{
    struct vm *vm = NULL;
    if (!runtime || s->run_dirfd < 0)
        return VM_ADOPT_GONE;
    pthread_mutex_lock(&s->lock);
    s->vm_no++;
    pthread_mutex_unlock(&s->lock);
    const enum vm_adopt_verdict v =
        vm_adopt(runtime, s->id, s->run_dirfd, s->m->loop, &SANDBOX_VM_CALLBACKS, s, &vm, err);
    if (v != VM_ADOPTED)
        return v;
    pthread_mutex_lock(&s->lock);
    s->vm = vm; // before its session can be up: commands are attached through it
    s->session_lost_ms = clock_mono_ms();
    pthread_mutex_unlock(&s->lock);
    if (vm_connect(vm, sandbox_present_state(s) == SANDBOX_PAUSED, err) == 0)
        return VM_ADOPTED;
    pthread_mutex_lock(&s->lock);
    s->vm = NULL;
    pthread_mutex_unlock(&s->lock);
    vm_free(vm);
    return VM_ADOPT_FAILED;
}

static void end_stray(struct sandbox *s, const json_t *runtime)
{
    struct err err = {0};
    if (vm_end_stray(runtime, s->id, s->m->o.cgroup_parent, &err) != 0)
        log_error("sandbox %s: %s %s", s->id, err.detail, err.internal); // it may live: uid and memory stay taken
    else
        sandbox_uid_release(s);
}

static void gone_while_down(struct sandbox *s, enum vm_adopt_verdict v, const json_t *runtime)
{
    end_stray(s, runtime);
    commands_finish_all(s, OUTCOME_LOST);
    if (v == VM_ADOPT_HOST_REBOOTED)
        commit_state(s, SANDBOX_STOPPED, "host_rebooted", "host_rebooted");
    else
        commit_state(s, SANDBOX_FAILED, "vm_died", "vm_died");
}

// running (and paused): adopted, or known to be gone.
static void adopt_running(struct sandbox *s)
{
    struct err err = {0};
    CLEANUP_JSON json_t *runtime = runtime_of(s);
    const enum vm_adopt_verdict v = adopt_vm(s, runtime, &err);
    if (v != VM_ADOPTED) {
        log_warn("sandbox %s: not adopted: %s %s", s->id, err.detail, err.internal);
        if (v == VM_ADOPT_FAILED) // it may well run: a later start can tell
            return;
        gone_while_down(s, v, runtime);
        return;
    }
    disk_job_sweep(s->vm);
    const int64_t until = clock_mono_ms() + ADOPT_READY_MS;
    static const char ADOPTED[] = "adopted by a new server; what the console said meanwhile is not kept\n";
    sandbox_log(s, LOGSRC_VMM, "", "", (const uint8_t *)ADOPTED, sizeof ADOPTED - 1);
    bool ready = sandbox_present_state(s) == SANDBOX_PAUSED, deleted = false; // one that stands still cannot answer
    if (ready && vm_pause(s->vm, &err) != 0) // its resume may have been cut after the guest was let go
        log_error("sandbox %s: could not be paused again: %s", s->id, err.detail);
    while (!ready && !deleted && clock_mono_ms() < until) { // in steps: a delete does not wait for a mute agent
        memset(&err, 0, sizeof err);
        ready = vm_wait_ready(s->vm, clock_mono_ms() + 250, &err);
        if (!ready && err.kind != ERR_TIMEOUT)
            break;
        pthread_mutex_lock(&s->lock);
        deleted = s->delete_wanted;
        pthread_mutex_unlock(&s->lock);
    }
    if (!ready && !deleted)
        log_warn("sandbox %s: adopted, but its agent does not answer: %s", s->id, err.detail);
    atomic_fetch_add(&s->m->adoptions, 1);
}

// Erases a create that never came up: the client's retry begins anew, under the same name if it likes.
static void undo_create(struct sandbox *s, struct job_row *job, const struct admission *a, const json_t *runtime)
{
    struct err why = {0}, err = {0};
    end_stray(s, runtime);
    commands_finish_all(s, OUTCOME_LOST); // of a snapshot, that were to go on in it
    CLEANUP_JSON json_t *report = json_pack("{s:[],s:[],s:[]}", "erased", "retained", "failed");
    if (sandbox_erase(s, report, true, &err) != 0)
        log_error("sandbox %s: %s", s->id, err.detail);
    commit_state(s, SANDBOX_DESTROYED, "create_undone", "restart");
    crash_point(s, "settle");
    err_set(&why, ERR_UNAVAILABLE, "create_undone", "the server was restarted while the sandbox was made");
    err_remedy(&why, "send the request again");
    if (job)
        job_settle(s->m, job, a, JOB_FAILED, "undone", &why, 503);
    registry_remove(s->m, s);
}

// A delete that was interrupted goes on under its own evidence: it is settled when it is done, or at the next start.
struct redo {
    struct manager *m;
    struct job_row job;
    struct admission a;
};

static void redone(void *arg, const struct sandbox_info *info, const struct err *err)
{
    struct redo *r = arg;
    (void)info;
    job_settle(r->m, &r->job, &r->a, err ? JOB_FAILED : JOB_SUCCEEDED, err ? "failed" : "succeeded", err, 200);
    job_row_free(&r->job);
    free(r);
}

static void redo_delete(struct sandbox *s, struct job_row *job, const struct admission *a)
{
    struct redo *r = calloc(1, sizeof *r);
    const struct op_callbacks cb = {.done = redone, .arg = r};
    struct op *op = r ? op_new("delete", delete_run, a, 200, &cb) : NULL;
    if (!op) {
        free(r);
        return;
    }
    *r = (struct redo){s->m, *job, *a};
    memset(job, 0, sizeof *job);
    // What it does now has evidence of its own too.
    system_admission(&op->a, s->tenant, "sandbox.delete", s->id);
    id_new(ID_JOB, op->a.job_id);
    snprintf(op->cause, sizeof op->cause, "restart");
    pthread_mutex_lock(&s->lock);
    s->delete_wanted = true;
    pthread_mutex_unlock(&s->lock);
    op_enqueue(s, op);
}

static bool continues(struct sandbox *s)
{
    struct sandbox_info *view = sandbox_view(s);
    const bool is = view->row.origin_json != NULL;
    sandbox_info_unref(view);
    return is;
}

// A resume of a cold sandbox: finished where the guest was let go, else cold again.
static void redo_wake(struct sandbox *s, struct job_row *job, const struct admission *a)
{
    struct err err = {0}, why = {0};
    CLEANUP_JSON json_t *runtime = runtime_of(s);
    const bool ran = job && strcmp(job->stage, "agent") == 0;
    const enum vm_adopt_verdict v = ran ? adopt_vm(s, runtime, &err) : VM_ADOPT_GONE;
    if (v == VM_ADOPT_FAILED) { // for a later start
        log_warn("sandbox %s: not adopted: %s %s", s->id, err.detail, err.internal);
        return;
    }
    struct op *op = v == VM_ADOPTED ? op_new("resume", wake_resume, a, 200, NULL) : NULL;
    if (op) {
        op->job = *job;
        memset(job, 0, sizeof *job);
        op_enqueue(s, op);
        return;
    }
    end_stray(s, runtime);
    if (ran) {
        commands_finish_all(s, OUTCOME_LOST);
        commit_state(s, SANDBOX_FAILED, "vm_died", "restart");
    } else {
        commit_state(s, SANDBOX_COLD, NULL, "restart");
    }
    crash_point(s, "settle");
    err_set(&why, ERR_UNAVAILABLE, "resume_undone", "the server was restarted while the sandbox was resumed");
    err_remedy(&why, "send the request again");
    if (job)
        job_settle(s->m, job, a, JOB_FAILED, "undone", &why, 503);
}

// Cold or stopped by a snapshot: what may be left of its VM ends; a cold one's commands wait for its return.
static void rest_without_vm(struct sandbox *s, int state)
{
    CLEANUP_JSON json_t *runtime = runtime_of(s);
    if (runtime)
        end_stray(s, runtime);
    if (state == SANDBOX_COLD)
        return;
    cold_erase(s, NULL);
    commands_finish_all(s, state == SANDBOX_STOPPED ? OUTCOME_KILLED : OUTCOME_LOST);
}

static void resume_create(struct sandbox *s, struct job_row *job, const struct admission *a, bool start)
{
    struct err err = {0};
    CLEANUP_JSON json_t *runtime = runtime_of(s);
    // One that continues from a state and had not come to its last stage may not even have loaded it.
    const bool loaded = !continues(s) || strcmp(job->stage, "agent") == 0;
    const enum vm_adopt_verdict v = loaded ? adopt_vm(s, runtime, &err) : VM_ADOPT_GONE;
    if (v == VM_ADOPT_FAILED) { // for a later start
        log_warn("sandbox %s: not adopted: %s %s", s->id, err.detail, err.internal);
        return;
    }
    struct op *op = v == VM_ADOPTED ? op_new(start ? "start" : "create", create_resume, a, start ? 200 : 201, NULL) : NULL;
    if (op) {
        op->job = *job;
        memset(job, 0, sizeof *job);
        op_enqueue(s, op);
        return;
    }
    if (!start) {
        undo_create(s, job, a, runtime);
        return;
    }
    struct err why = {0};
    end_stray(s, runtime);
    commit_state(s, SANDBOX_STOPPED, "start_undone", "restart");
    crash_point(s, "settle");
    err_set(&why, ERR_UNAVAILABLE, "start_undone", "the server was restarted while the sandbox started");
    job_settle(s->m, job, a, JOB_FAILED, "undone", &why, 503);
}

static void finish_stop(struct sandbox *s, struct job_row *job, const struct admission *a)
{
    CLEANUP_JSON json_t *runtime = runtime_of(s);
    end_stray(s, runtime);
    commands_finish_all(s, OUTCOME_KILLED);
    commit_state(s, SANDBOX_STOPPED, NULL, "restart");
    crash_point(s, "settle");
    if (job)
        job_settle(s->m, job, a, JOB_SUCCEEDED, "succeeded", NULL, 200);
}

static void reconcile_one(struct sandbox *s, struct unfinished *u)
{
    struct admission a;
    struct job_row *job;
    const int state = sandbox_present_state(s);
    if ((job = unfinished_kind(u, "sandbox.delete"))) {
        CLEANUP_JSON json_t *runtime = runtime_of(s);
        job_admission(s->m, job, &a);
        end_stray(s, runtime);
        redo_delete(s, job, &a);
    } else if (state == SANDBOX_STARTING) {
        job = unfinished_kind(u, "sandbox.create");
        const bool start = !job && (job = unfinished_kind(u, "sandbox.start"));
        if (!job) { // a fork's child: the fork had not come to its commit
            CLEANUP_JSON json_t *runtime = runtime_of(s);
            undo_create(s, NULL, NULL, runtime);
            return;
        }
        job_admission(s->m, job, &a);
        resume_create(s, job, &a, start);
    } else if (state == SANDBOX_STOPPING) {
        job = unfinished_kind(u, "sandbox.stop");
        if (job)
            job_admission(s->m, job, &a);
        finish_stop(s, job, &a);
    } else if (state == SANDBOX_RUNNING || state == SANDBOX_PAUSED) {
        cold_erase(s, NULL); // of a cooling that had not come to its commit, or of one that is over
        adopt_running(s);
    } else if (state == SANDBOX_RESTORING) {
        job = unfinished_kind(u, "sandbox.resume");
        if (job)
            job_admission(s->m, job, &a);
        redo_wake(s, job, job ? &a : NULL);
    } else {
        rest_without_vm(s, state);
    }
}

// Jobs that nothing goes on with. A stop that an earlier start finished may lack its end; what else has come to its end has
// it recorded.
static void settle_rest(struct sandbox *s, struct unfinished *u)
{
    const int state = sandbox_present_state(s);
    for (size_t i = 0; i < u->n; i++) {
        struct job_row *job = &u->rows[i];
        struct admission a;
        if ((job->state != JOB_RUNNING && job->state != JOB_QUEUED) || strncmp(job->kind, "command.", 8) == 0)
            continue;
        if (state != SANDBOX_STOPPED || strcmp(job->kind, "sandbox.stop") != 0) {
            job_give_up(s->m, job);
            continue;
        }
        job_admission(s->m, job, &a);
        job_settle(s->m, job, &a, JOB_SUCCEEDED, "succeeded", NULL, 200);
    }
}

// The first operation of a sandbox of an earlier server: what clients ask for meanwhile stands behind it.
static void adopt_run(struct sandbox *s, struct op *op)
{
    struct manager *m = s->m;
    struct err err = {0};
    struct unfinished u = {0};
    (void)op;
    if (unfinished_of(s, &u, &err) != 0 || load_commands(s, &err) != 0) {
        log_error("sandbox %s: its journal could not be read: %s", s->id, err.internal);
    } else {
        reconcile_one(s, &u);
        settle_rest(s, &u);
    }
    unfinished_free(&u);
    pthread_mutex_lock(&s->lock);
    s->adopting = false;
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_lock(&m->lock);
    m->adopting--;
    pthread_mutex_unlock(&m->lock);
    hub_notify(m->hub, "ready");
}

// ---- all of them --------------------------------------------------------------------------------------------------
static bool take_sandbox(void *arg, const struct sandbox_row *row)
{
    struct manager *m = arg;
    struct err err = {0};
    struct sandbox_row copy = {0};
    if (sandbox_row_copy(&copy, row) != 0)
        return false;
    CLEANUP_JSON json_t *runtime = row->runtime_json ? json_loads(row->runtime_json, 0, NULL) : NULL;
    const char *name = json_get_str(runtime, "name");
    if (name && strcmp(name, row->id) != 0) // was taken from the pool, and its directory may still have the old name
        (void)launch_take_directory(m, name, row->id);
    struct sandbox *s = sandbox_new(m, &copy, true, &err);
    struct admission a;
    system_admission(&a, row->tenant, "sandbox.adopt", row->id);
    struct op *op = s ? op_new("adopt", adopt_run, &a, 200, NULL) : NULL;
    if (!op) {
        log_error("sandbox %s: not taken over: %s %s", row->id, err.detail, err.internal);
        sandbox_row_free(&copy);
        sandbox_unref(s);
        return true;
    }
    s->adopting = true;
    if (runtime) { // before anybody else launches
        uid_reserve(s, runtime);
        budget_reserve(s, runtime);
    }
    pthread_mutex_lock(&m->lock);
    m->adopting++;
    pthread_mutex_unlock(&m->lock);
    registry_add(m, s);
    op_enqueue(s, op);
    sandbox_unref(s);
    return true;
}

static bool live(struct manager *m, const char *id)
{
    struct sandbox *s = registry_find(m, NULL, id, NULL);
    sandbox_unref(s);
    return s != NULL;
}

// What belongs to no sandbox. It is listed before the first request, so that nothing of this server is taken for it.
struct orphans {
    struct manager *m;
    struct unfinished jobs;
    json_t *runs; // array of names below run/
};

static bool keep_orphan_job(void *arg, const struct job_row *row)
{
    struct orphans *o = arg;
    return (*row->sandbox_id && live(o->m, row->sandbox_id)) || unfinished_add(&o->jobs, row);
}

static void list_runs(struct orphans *o)
{
    const int fd = openat(o->m->run_dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        fd_close(&(int){fd});
        return;
    }
    for (const struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.' && strcmp(e->d_name, "probe") != 0 && !live(o->m, e->d_name)) // the probe tidies up itself
            json_array_append_new(o->runs, json_string(e->d_name));
    closedir(d);
}

static void orphans_free(struct orphans *o)
{
    if (!o)
        return;
    unfinished_free(&o->jobs);
    json_decref(o->runs);
    free(o);
}

static struct orphans *orphans_list(struct manager *m, struct err *err)
{
    struct orphans *o = calloc(1, sizeof *o);
    if (!o) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    *o = (struct orphans){.m = m, .runs = json_array()};
    list_runs(o);
    if (job_each_unfinished_all_tenants(m->store, keep_orphan_job, o, err) == 0)
        return o;
    orphans_free(o);
    return NULL;
}

// Run directories without a sandbox: their QEMU, if any, belongs to nobody.
static void sweep_runs(const struct orphans *o)
{
    struct manager *m = o->m;
    for (size_t i = 0; i < json_array_size(o->runs); i++) {
        const char *name = json_string_value(json_array_get(o->runs, i));
        struct err err = {0};
        if (id_valid(ID_SANDBOX, name) && vm_end_stray(NULL, name, m->o.cgroup_parent, &err) != 0) {
            log_error("orphan %s: %s %s", name, err.detail, err.internal);
            continue; // found again by its directory
        }
        if (fd_remove_tree(m->run_dirfd, name, NULL) != 0)
            log_warn("orphan %s: its run directory could not be removed", name);
    }
}

// After the registry is filled: what belongs to nobody, and the end of all adoptions.
static void reconcile_work(void *arg)
{
    struct orphans *o = arg;
    struct manager *m = o->m;
    sweep_runs(o);
    pthread_mutex_lock(&m->lock);
    m->reconciled = true;
    while (m->adopting > 0 && !m->stopping) {
        pthread_mutex_unlock(&m->lock);
        struct timespec pause = {.tv_nsec = 2 * 1000 * 1000};
        nanosleep(&pause, NULL); // workers count down; there is nobody to wake but us
        pthread_mutex_lock(&m->lock);
    }
    pthread_mutex_unlock(&m->lock);
    for (size_t i = 0; i < o->jobs.n; i++) // of a fork of a snapshot: now its children have ended
        job_give_up(m, &o->jobs.rows[i]);
    orphans_free(o);
    pending_lose(m);
    retention_sweep(m);
    pool_begin(m);
    hub_notify(m->hub, "ready");
    atomic_fetch_sub(&m->active, 1);
}

int reconcile_start(struct manager *m, struct err *err)
{
    // Before the first request: every sandbox is known, and what is asked of it waits for its adoption.
    templates_sweep(m); // before anybody makes one
    snapshots_sweep(m);
    if (pending_load(m, err) != 0 ||
        sandbox_each_live_all_tenants(m->store, take_sandbox, m, err) != 0)
        return -1;
    struct orphans *o = orphans_list(m, err);
    if (!o)
        return -1;
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, reconcile_work, o) == 0)
        return 0;
    atomic_fetch_sub(&m->active, 1);
    orphans_free(o);
    return err_set(err, ERR_INTERNAL, "no_threads", "the workers cannot be started");
}
