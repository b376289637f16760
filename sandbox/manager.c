// The service itself: opening, the accelerator's verdict, stopping, facts and gauges.
#include "sandbox/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qemu/probe.h"

static int make_dir(int parent, const char *name, struct err *err)
{
    if (mkdirat(parent, name, 0700) != 0 && errno != EEXIST)
        return err_sys(err, errno, "making %s", name);
    const int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd >= 0 ? fd : err_sys(err, errno, "opening %s", name);
}

static int manager_open(struct manager *m, struct err *err)
{
    if (host_facts_read(m->o.qemu_path, &m->host, err) != 0)
        return -1;
    if (m->o.qemu_path && !*m->host.qemu_version) // who names one does not want another, nor a server without
        return err_set(err, ERR_VALIDATION, "qemu", "%s is no QEMU that can be run", m->o.qemu_path);
    m->o.qemu_path = m->o.qemu_path ? m->host.qemu_path : NULL; // absolute
    m->sandboxes_dirfd = make_dir(m->o.state_dirfd, "sandboxes", err);
    m->run_dirfd = m->sandboxes_dirfd < 0 ? -1 : make_dir(m->o.state_dirfd, "run", err);
    m->snapshots_dirfd = m->run_dirfd < 0 ? -1 : make_dir(m->o.state_dirfd, "snapshots", err);
    if (m->snapshots_dirfd < 0 || origins_open(m, err) != 0 || pool_open(m, err) != 0)
        return -1;
    m->images = images_open(m->o.image_dirfd, err);
    m->hub = hub_new();
    m->uids = calloc(m->o.uid_count + 1, sizeof *m->uids);
    m->ops = work_pool_new("ops", OPS_THREADS, 100000, err);
    m->io = work_pool_new("io", IO_THREADS, 100000, err);
    if (!m->images || !m->ops || !m->io)
        return -1;
    if (!m->hub || !m->uids)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    work_pool_warm(m->io, store_warm, m->store);
    return 0;
}

struct manager *manager_new(const struct manager_options *options, struct err *err)
{
    struct manager *m = calloc(1, sizeof *m);
    if (!m) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    m->o = *options;
    m->store = options->store;
    m->loop = options->loop;
    m->sandboxes_dirfd = m->run_dirfd = -1;
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->accel_lock, NULL);
    pthread_mutex_init(&m->pending_lock, NULL);
    pthread_cond_init(&m->accel_cond, NULL);
    if (manager_open(m, err) == 0)
        return m;
    manager_free(m);
    return NULL;
}

// ---- the accelerator's verdict ----------------------------------------------------------------------------------------
static void accel_decide(struct manager *m, bool usable, const char *reason, int64_t at_ms)
{
    pthread_mutex_lock(&m->accel_lock);
    m->kvm_usable = usable;
    snprintf(m->accel_reason, sizeof m->accel_reason, "%s", reason);
    m->accel_probed_at_ms = at_ms;
    m->accel_known = ACCEL_KNOWN;
    pthread_cond_broadcast(&m->accel_cond);
    pthread_mutex_unlock(&m->accel_lock);
    log_info("accelerator: kvm %s (%s)", usable ? "usable" : "not usable", reason);
}

static int probe(struct manager *m, struct probe_verdict *ret, struct err *err)
{
    struct image_runtime runtime;
    if (images_runtime(m->images, &runtime, err) != 0)
        return -1;
    CLEANUP_FD int kernel = images_open_blob(m->images, runtime.kernel_digest, err);
    if (kernel < 0)
        return -1;
    CLEANUP_FD int initrd = images_open_blob(m->images, runtime.initramfs_digest, err);
    if (initrd < 0)
        return -1;
    unsigned uid = 0;
    if (manager_uid_take(m, &uid, err) != 0)
        return -1;
    const struct vm_spec spec = {.accel = VM_ACCEL_KVM, .qemu_path = m->o.qemu_path, .vcpus = 1,
                                 .memory_mib = LIMIT_MEMORY_MIB_MIN, .tsc_khz = m->host.tsc_khz, .kernel_fd = kernel,
                                 .initrd_fd = initrd, .root_fd = -1, .disk_fd = -1, .run_dirfd = -1, .jail_uid = uid,
                                 .cgroup_parent = m->o.cgroup_parent};
    const int failed = probe_kvm(m->o.state_dirfd, m->run_dirfd, &spec, runtime.kernel_digest, LIMIT_PROBE_MS,
                                 &m->probe_cancelled, ret, err);
    if (uid)
        manager_uid_give(m, uid);
    return failed;
}

static void probe_work(void *arg)
{
    struct manager *m = arg;
    struct err err = {0};
    struct probe_verdict v = {0};
    if (m->o.accel == ACCEL_TCG_ONLY)
        accel_decide(m, false, "not asked for: accel is tcg", 0);
    else if (!m->host.kvm_device)
        accel_decide(m, false, "/dev/kvm is missing or may not be opened", clock_wall_ms());
    else if (probe(m, &v, &err) == 0)
        accel_decide(m, v.kvm_usable, v.reason, v.probed_at_ms);
    else if (!atomic_load(&m->probe_cancelled)) // else nobody is to act on it (accel_choose)
        accel_decide(m, false, err.detail, clock_wall_ms());
    atomic_fetch_sub(&m->active, 1);
}

// ---- life -------------------------------------------------------------------------------------------------------
static void first_tick(void *arg)
{
    reaper_tick(arg);
}

// Nobody adopts a probe: one whose server is gone would run for ever.
static void end_probe(struct manager *m, bool tidy)
{
    struct err err = {0};
    if (probe_end(m->run_dirfd, tidy, &err) != 0)
        log_warn("the accelerator's probe: %s", err.detail);
}

int manager_start(struct manager *m, struct err *err)
{
    end_probe(m, true);
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, probe_work, m) != 0) {
        atomic_fetch_sub(&m->active, 1);
        return err_set(err, ERR_INTERNAL, "no_threads", "the workers cannot be started");
    }
    if (reconcile_start(m, err) != 0)
        return -1;
    return loop_post(m->loop, first_tick, m);
}

bool manager_stopping(struct manager *m)
{
    pthread_mutex_lock(&m->lock);
    const bool stopping = m->stopping;
    pthread_mutex_unlock(&m->lock);
    return stopping;
}

// Operations under way reach their journaled end or are left to the next start, as after kill -9; sandboxes keep
// running. The process ends right after: nothing is taken apart that another thread may still use.
void manager_stop(struct manager *m)
{
    pthread_mutex_lock(&m->lock);
    m->stopping = true;
    pthread_mutex_unlock(&m->lock);
    pthread_mutex_lock(&m->accel_lock);
    atomic_store(&m->probe_cancelled, true);
    pthread_cond_broadcast(&m->accel_cond);
    pthread_mutex_unlock(&m->accel_lock);
    end_probe(m, false);
    hub_notify_all(m->hub);
    pool_end(m);
    templates_stop(m);
    const int64_t until = clock_mono_ms() + 2000;
    while (atomic_load(&m->active) > 0 && clock_mono_ms() < until) {
        struct timespec pause = {.tv_nsec = 5 * 1000 * 1000};
        nanosleep(&pause, NULL);
    }
    pool_end(m); // what was being made meanwhile
    end_probe(m, false);
}

void manager_free(struct manager *m)
{
    if (!m)
        return;
    work_pool_free(m->ops);
    work_pool_free(m->io);
    images_free(m->images);
    hub_free(m->hub);
    fd_close(&m->sandboxes_dirfd);
    fd_close(&m->run_dirfd);
    pthread_cond_destroy(&m->accel_cond);
    pthread_mutex_destroy(&m->accel_lock);
    pthread_mutex_destroy(&m->pending_lock);
    pthread_mutex_destroy(&m->lock);
    free(m->pending);
    free(m->uids);
    free(m);
}

bool manager_ready(struct manager *m, char *out, size_t cap)
{
    pthread_mutex_lock(&m->lock);
    const bool ready = m->reconciled && m->adopting == 0;
    if (!ready)
        snprintf(out, cap, m->reconciled ? "%u sandboxes are not adopted yet" : "reconciliation is not done", m->adopting);
    pthread_mutex_unlock(&m->lock);
    return ready;
}

struct hub *manager_hub(struct manager *m)
{
    return m->hub;
}

struct store *manager_store(struct manager *m)
{
    return m->store;
}

// ---- jobs -------------------------------------------------------------------------------------------------------
static int cancel_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct admission *a = arg;
    const struct change c = {.admit = a, .settle = a, .outcome = "succeeded", .status = 200, .ref = a->job_id};
    return change_apply(tx, &c, err);
}

int manager_job_cancel(struct manager *m, const char *tenant, const char *job_id, const struct admission *a,
                       struct err *err)
{
    struct job_row job = {0};
    const int found = job_get(m->store, tenant, job_id, &job, err);
    if (found != 0) {
        if (found > 0)
            *err = not_found_error();
        return -1;
    }
    struct sandbox *s = registry_find(m, tenant, job.sandbox_id, NULL);
    bool marked = false;
    if (s && strcmp(job.kind, "sandbox.create") == 0) {
        pthread_mutex_lock(&s->lock);
        if (s->ops && strcmp(s->ops->a.job_id, job_id) == 0) {
            atomic_store(&s->ops->cancelled, true);
            if (s->vm && s->info->row.state == SANDBOX_STARTING)
                vm_kill(s->vm);
            marked = true;
        }
        pthread_mutex_unlock(&s->lock);
        if (marked)
            ops_kick_for_delete(s);
    }
    sandbox_unref(s);
    job_row_free(&job);
    if (!marked) {
        err_set(err, ERR_CONFLICT, "not_cancellable", "the job has ended, or is of a kind that cannot be cancelled");
        return err_remedy(err, "signal a command, or delete the sandbox");
    }
    struct admission copy = *a;
    snprintf(copy.job_id, sizeof copy.job_id, "%s", job_id);
    return store_write(m->store, cancel_tx, &copy, err);
}

// ---- facts ------------------------------------------------------------------------------------------------------
static bool add_image(void *arg, const struct image_ref *i)
{
    json_t *one = json_object();
    json_put_str(one, "name", i->name);
    json_put_str(one, "digest", i->digest);
    json_put_int(one, "bytes", (int64_t)i->bytes);
    json_put_time(one, "created_at", i->created_at_ms);
    json_array_append_new(arg, one);
    return true;
}

static json_t *part(bool available, const char *reason)
{
    json_t *p = json_object();
    json_put(p, "available", json_boolean(available));
    json_put_str(p, "reason", reason && *reason ? reason : NULL);
    return p;
}

static json_t *accel_facts(struct manager *m)
{
    static const char *const CONFIGURED[] = {[ACCEL_AUTO] = "auto", [ACCEL_KVM_ONLY] = "kvm", [ACCEL_TCG_ONLY] = "tcg"};
    pthread_mutex_lock(&m->accel_lock);
    const bool known = m->accel_known == ACCEL_KNOWN, kvm = m->kvm_usable && m->o.accel != ACCEL_TCG_ONLY;
    char reason[sizeof m->accel_reason];
    snprintf(reason, sizeof reason, "%s", m->accel_reason);
    const int64_t at = m->accel_probed_at_ms;
    pthread_mutex_unlock(&m->accel_lock);
    const bool tcg = m->o.accel == ACCEL_TCG_ONLY || (m->o.accel == ACCEL_AUTO && m->o.allow_emulation);
    json_t *a = json_object();
    json_put_str(a, "configured", CONFIGURED[m->o.accel]);
    json_put_str(a, "selected", !known ? NULL : kvm ? "kvm" : tcg ? "tcg" : NULL);
    json_t *k = json_object();
    json_put(k, "usable", known ? json_boolean(m->kvm_usable) : json_null());
    json_put_str(k, "reason", known ? reason : "being probed");
    json_put_time(k, "probed_at", at);
    json_put(a, "kvm", k);
    json_t *t = json_object();
    json_put(t, "usable", json_boolean(tcg));
    json_put_str(t, "reason", tcg ? "allowed by the operator; no security boundary" : "emulation is not allowed here");
    json_put(a, "tcg", t);
    return a;
}

json_t *manager_facts(struct manager *m)
{
    struct err err = {0};
    json_t *f = json_object(), *images = json_array(), *jail = json_object();
    json_put(f, "accel", accel_facts(m));
    json_put_int(f, "sandboxes_max", m->o.max_live_per_tenant);
    json_t *memory = json_object();
    pthread_mutex_lock(&m->lock);
    json_put_int(memory, "committed_mib", (int64_t)m->committed_mib);
    pthread_mutex_unlock(&m->lock);
    json_put_int(memory, "budget_mib", (int64_t)budget_mib(m));
    json_put(f, "memory", memory);
    json_put_str(f, "qemu_version", *m->host.qemu_version ? m->host.qemu_version : NULL);
    json_put_str(f, "qemu_digest", *m->host.qemu_sha256 ? m->host.qemu_sha256 : NULL);
    struct image_runtime r;
    if (images_runtime(m->images, &r, &err) == 0) {
        json_put_str(f, "kernel_version", r.kernel_version);
        json_put_str(f, "kernel_digest", r.kernel_digest);
        json_put_str(f, "initramfs_digest", r.initramfs_digest);
    }
    (void)images_each(m->images, add_image, images, &err);
    json_put(f, "images", images);
    json_put(jail, "bubblewrap", part(m->host.jail_works, m->host.jail_reason));
    json_put(jail, "seccomp", part(*m->host.qemu_version != 0, "QEMU's -sandbox, all parts denied"));
    json_put(jail, "uid_separation", part(m->host.is_root && m->o.uid_count > 0,
                                          m->host.is_root ? "one host uid per sandbox" : "the server is not root"));
    json_put(jail, "cgroup", part(m->o.cgroup_parent != NULL && m->host.cgroup_v2, m->host.cgroup_reason));
    json_put(f, "jail", jail);
    return f;
}

json_t *manager_gauges(struct manager *m)
{
    unsigned by_state[SANDBOX_STATES] = {0};
    uint64_t running_commands = 0, rss = 0;
    size_t n;
    struct sandbox **all = registry_all(m, &n);
    for (size_t i = 0; all && i < n; i++) {
        struct vm_stats st = {0};
        pthread_mutex_lock(&all[i]->lock);
        const int state = all[i]->info->row.state;
        by_state[state >= 0 && state < SANDBOX_STATES ? state : 0]++;
        running_commands += all[i]->n_commands;
        if (all[i]->vm)
            vm_stats(all[i]->vm, &st);
        pthread_mutex_unlock(&all[i]->lock);
        rss += st.rss_bytes;
        sandbox_unref(all[i]);
    }
    free(all);
    json_t *g = json_object();
    for (int state = 1; state < SANDBOX_DESTROYED; state++) {
        char name[64];
        snprintf(name, sizeof name, "airlock_sandboxes{state=\"%s\"}", sandbox_state_name(state));
        json_put_int(g, name, by_state[state]);
    }
    pthread_mutex_lock(&m->lock);
    json_put_int(g, "airlock_launches_running", m->launches);
    pthread_mutex_unlock(&m->lock);
    json_put_int(g, "airlock_commands_running", (int64_t)running_commands);
    json_put_int(g, "airlock_vm_resident_bytes", (int64_t)rss);
    json_put_int(g, "airlock_boots_total", (int64_t)atomic_load(&m->boots));
    json_put_int(g, "airlock_boot_failures_total", (int64_t)atomic_load(&m->boot_failures));
    json_put_int(g, "airlock_adoptions_total", (int64_t)atomic_load(&m->adoptions));
    memory_gauges(m, g);
    json_put_int(g, "airlock_commands_total", (int64_t)atomic_load(&m->commands_run));
    return g;
}
