#include "sandbox/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/carry.h"
#include "sandbox/cold.h"
#include "sandbox/disk.h"

#define REFRESH_MS 10000
#define AWAKE_MS 30000 // it does not boot: a guest that was saved mute does not hold a launch's slot for as long as a boot may take
#define RESTORE_MS 30000

// ---- prepare ----------------------------------------------------------------------------------------------------
static bool wait_stop(void *arg)
{
    const struct launch *l = arg;
    return op_should_stop(l->s, l->op, NULL);
}

static struct machine_parts parts_of(const struct launch *l)
{
    const struct manager *m = l->s->m;
    return (struct machine_parts){.image_digest = l->row.image_digest, .qemu_digest = m->host.qemu_sha256,
                                  .qemu_version = m->host.qemu_version, .runtime = &l->runtime, .accel = l->accel,
                                  .vcpus = l->row.vcpus, .memory_mib = l->row.memory_mib, .disk_mib = l->row.disk_mib,
                                  .tsc_khz = m->host.tsc_khz, .host_cpu = m->host.cpu_sha256};
}

static int find_snapshot(struct launch *l, struct err *err)
{
    struct manager *m = l->s->m;
    struct snapshot_row row = {0};
    const int found = snapshot_get(m->store, l->row.tenant, l->row.parent_snapshot_id, &row, err);
    if (found != 0 || snapshot_usable(&row, err) != 0) {
        if (found == 0)
            snapshot_row_free(&row);
        return found > 0 ? err_set(err, ERR_CONFLICT, "snapshot_deleted", "the snapshot was deleted") : -1;
    }
    const int failed = origin_snapshot(m, &row, &l->origin, err);
    snapshot_row_free(&row);
    return failed;
}

// A template where there is one or one in the making; the first of its kind boots, and has one made beside it.
static int find_origin(struct launch *l, struct err *err)
{
    struct manager *m = l->s->m;
    const struct machine_parts parts = parts_of(l);
    if (l->kind == LAUNCH_WAKE)
        return cold_load(l->s, &l->row, &parts, &l->origin, err);
    if (l->kind == LAUNCH_RESTORE)
        return find_snapshot(l, err);
    if (l->kind != LAUNCH_CREATE || !m->o.templates)
        return 0;
    const int got = origin_template(m, &parts, wait_stop, l, &l->origin, err);
    if (got == 0) {
        l->boot_path = "template";
        pool_want(m, &parts, l->origin);
    }
    return got < 0 ? -1 : 0;
}

static int open_boot_files(struct launch *l, struct err *err)
{
    struct images *im = l->s->m->images;
    l->root_fd = images_open_blob(im, l->row.image_digest, err);
    if (l->root_fd < 0 || l->origin)
        return l->root_fd < 0 ? -1 : 0;
    l->kernel_fd = images_open_blob(im, l->runtime.kernel_digest, err);
    l->initrd_fd = l->kernel_fd < 0 ? -1 : images_open_blob(im, l->runtime.initramfs_digest, err);
    return l->initrd_fd < 0 ? -1 : 0;
}

// A snapshot's disk has what its guest wrote: it does not eat the host's reserve. A fork has promised room for all its copies,
// and a template's is nearly empty.
static int copy_disk(struct launch *l, struct err *err)
{
    struct manager *m = l->s->m;
    struct stat st = {0};
    const bool promise = l->kind == LAUNCH_RESTORE && !l->room_promised && fstat(l->origin->disk_fd, &st) == 0;
    const uint64_t bytes = promise ? (uint64_t)st.st_blocks * 512 : 0;
    if (promise && room_promise(m, bytes, err) != 0)
        return -1;
    const int failed = disk_copy(l->origin->disk_fd, l->s->dirfd, err);
    room_give(m, bytes);
    return failed;
}

static int make_disk(struct launch *l, struct err *err)
{
    struct sandbox *s = l->s;
    if (l->kind == LAUNCH_START || l->kind == LAUNCH_WAKE)
        return 0;
    return l->origin ? copy_disk(l, err) : disk_make(s->m->o.state_dirfd, s->dirfd, l->row.disk_mib, err);
}

// What a later snapshot must contain beside what this VM changes: kept beside the disk, for a server that is restarted. The row
// has its digest.
static int keep_base(struct launch *l, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    (void)unlinkat(l->s->dirfd, "base.runs", 0);
    l->base_runs[0] = 0;
    if (!l->origin || l->origin->runs.n == 0)
        return 0;
    CLEANUP_FD int fd = openat(l->s->dirfd, "base.runs", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_sys(err, errno, "keeping what a sandbox is based on");
    if (ram_runs_save(fd, &l->origin->runs, err) != 0 || crypto_sha256_fd(fd, hash, NULL, err) != 0)
        return -1;
    crypto_digest_text(hash, l->base_runs);
    return 0;
}

static int stage_prepare(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct manager *m = l->s->m;
    const int64_t t = clock_mono_us();
    int failed = images_runtime(m->images, &l->runtime, err);
    if (!failed && !l->origin)
        failed = find_origin(l, err);
    l->continued = l->origin != NULL;
    if (!failed && (open_boot_files(l, err) != 0 || make_disk(l, err) != 0 || keep_base(l, err) != 0))
        failed = -1;
    if (!failed && l->kind == LAUNCH_RESTORE && l->origin && json_array_size(l->origin->commands) > 0)
        failed = carry_prepare(l->s, &l->op->a, l->origin->commands, l->origin->spool_dirfd, &l->commands, &l->n_commands, err);
    if (!failed)
        l->disk_fd = disk_open(l->s->dirfd, err);
    l->t_prepare_us = clock_mono_us() - t;
    return failed || l->disk_fd < 0 ? -1 : 0;
}

// ---- launch -----------------------------------------------------------------------------------------------------
// What its memory goes back to: a later snapshot, and a server that is restarted, need to know.
static void describe_origin(struct launch *l)
{
    if (l->continued && !l->origin)
        return; // as an earlier server wrote it
    free(l->row.origin_json);
    l->row.origin_json = NULL;
    if (!l->origin)
        return;
    CLEANUP_JSON json_t *o = json_object();
    json_put_str(o, "template", l->origin->template_key);
    json_put_str(o, "template_manifest", l->origin->template_manifest);
    json_put_str(o, "base_runs", *l->base_runs ? l->base_runs : NULL);
    l->row.origin_json = json_dumps(o, JSON_COMPACT);
}

// The row of a cold sandbox that comes back still names the files which it may have to go back to.
static void add_base_runs(struct launch *l)
{
    CLEANUP_JSON json_t *o = l->row.origin_json ? json_loads(l->row.origin_json, 0, NULL) : NULL;
    json_put_str(o, "base_runs", *l->base_runs ? l->base_runs : NULL);
    free(l->row.origin_json);
    l->row.origin_json = json_dumps(o, JSON_COMPACT);
}

// The facts that adoption needs become durable as soon as the process exists.
static int journal_runtime(struct launch *l, struct err *err)
{
    CLEANUP_JSON json_t *runtime = vm_runtime(l->vm);
    if (!runtime)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    crash_point(l->s, "journal");
    const struct machine_parts parts = parts_of(l);
    json_put_int(runtime, "jail_uid", l->s->vm_uid);
    json_put(runtime, "machine", machine_of(&parts));
    free(l->row.runtime_json);
    l->row.runtime_json = json_dumps(runtime, JSON_COMPACT);
    if (l->kind == LAUNCH_WAKE)
        add_base_runs(l);
    else
        describe_origin(l);
    const struct change c = {.update = &l->row, .job_update = *l->job->id ? l->job : NULL, .continued = l->commands,
                             .n_continued = l->n_commands};
    if (change_commit(l->s->m, &c, err) != 0)
        return -1;
    return carry_list(l->s, l->commands, l->n_commands, err); // before the guest runs
}

static void take_vm(struct launch *l, struct vm *vm)
{
    struct sandbox *s = l->s;
    struct origin *ref = l->origin ? origin_map_ref(s->m, l->origin) : NULL;
    l->vm = vm;
    pthread_mutex_lock(&s->lock);
    s->vm = vm;
    struct origin *old = s->origin;
    s->origin = ref;
    pthread_mutex_unlock(&s->lock);
    origin_map_unref(s->m, old);
}

static void begin_vm(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    memset(&s->fatal, 0, sizeof s->fatal);
    s->session = false;
    s->session_lost_ms = 0; // a boot has its own deadline
    s->vm_no++;
    pthread_mutex_unlock(&s->lock);
}

static int stage_launch(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct sandbox *s = l->s;
    struct manager *m = s->m;
    const int64_t t = clock_mono_us();
    if (op_should_stop(s, l->op, err) || sandbox_budget_take(s, l->accel, l->row.memory_mib, err) != 0 ||
        manager_uid_take(m, &s->vm_uid, err) != 0)
        return -1;
    const struct vm_spec spec = {.id = s->id, .accel = l->accel, .qemu_path = m->o.qemu_path, .vcpus = l->row.vcpus,
                                 .memory_mib = l->row.memory_mib, .tsc_khz = m->host.tsc_khz,
                                 .kernel_fd = l->kernel_fd, .initrd_fd = l->initrd_fd, .root_fd = l->root_fd,
                                 .disk_fd = l->disk_fd, .ram_fd = l->origin ? l->origin->ram_fd : -1,
                                 .incoming = l->origin != NULL, .run_dirfd = s->run_dirfd, .jail_uid = s->vm_uid,
                                 .cgroup_parent = m->o.cgroup_parent};
    begin_vm(s);
    struct vm *vm = vm_launch(&spec, m->loop, &SANDBOX_VM_CALLBACKS, s, err);
    if (!vm)
        return -1;
    take_vm(l, vm);
    const int failed = journal_runtime(l, err);
    l->t_launch_us = clock_mono_us() - t;
    return failed;
}

void launch_undo(struct launch *l)
{
    struct err e = {0};
    if (sandbox_drop_vm(l->s, true, &e) != 0)
        log_error("sandbox %s: %s", l->s->id, e.internal);
    sandbox_uid_release(l->s);
    if (l->n_commands > 0) // of a moment that did not come to life
        commands_finish_all(l->s, OUTCOME_LOST);
    l->vm = NULL;
}

static void undo_launch(void *arg)
{
    launch_undo(arg);
}

// ---- restore ----------------------------------------------------------------------------------------------------
static int stage_restore(void *arg, struct err *err)
{
    struct launch *l = arg;
    const int64_t t = clock_mono_us();
    CLEANUP_FD int state = origin_state_open(l->origin, err);
    if (state < 0 || op_should_stop(l->s, l->op, err))
        return -1;
    int failed = 0;
    if (l->origin->put_runs.n > 0)
        failed = vm_put_pages(l->vm, l->origin->ram_bytes, &l->origin->put_runs, l->origin->put_pages, RESTORE_MS, err);
    origin_put_done(l->origin);
    if (!failed)
        failed = vm_restore(l->vm, state, RESTORE_MS, err);
    l->t_restore_us = clock_mono_us() - t;
    return failed;
}

// ---- agent ------------------------------------------------------------------------------------------------------
static void random_ids(char machine_id[static 33], char boot_id[static 37])
{
    uint8_t r[32];
    (void)crypto_random(r, sizeof r);
    for (int i = 0; i < 16; i++)
        snprintf(machine_id + 2 * i, 3, "%02x", r[i]);
    r[22] = (uint8_t)((r[22] & 0x0f) | 0x40); // a random UUID (RFC 9562, version 4)
    r[24] = (uint8_t)((r[24] & 0x3f) | 0x80);
    for (int i = 0, at = 0; i < 16; i++)
        at += snprintf(boot_id + at, (size_t)(37 - at), "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", r[16 + i]);
}

// Nobody gets a sandbox that continues from a state before its agent has proved that it is somebody else. One that comes back
// from cold is the same machine: it keeps name and machine id.
static int renew(struct launch *l, bool stands, struct err *err)
{
    uint8_t seed[MSG_SEED_BYTES];
    char machine_id[33], boot_id[37];
    if (crypto_random(seed, sizeof seed) != 0)
        return err_set(err, ERR_INTERNAL, "no_entropy", "the host has no entropy");
    random_ids(machine_id, boot_id);
    const bool same = l->kind == LAUNCH_WAKE;
    const struct vm_identity id = {.seed = seed, .clock = true, .hostname = same ? NULL : l->s->id,
                                   .machine_id = same ? NULL : machine_id, .boot_id = boot_id};
    const int most = l->s->m->o.boot_timeout_ms;
    const int64_t until = clock_mono_ms() + (most < AWAKE_MS ? most : AWAKE_MS);
    l->ran = true; // from here on nobody can tell that it has not
    if (stands)
        return vm_resume_as(l->vm, &id, until, REFRESH_MS, &l->refreshed, err);
    return vm_wait_ready(l->vm, until, err) ? vm_refresh(l->vm, &id, REFRESH_MS, &l->refreshed, err) : -1;
}

// Waits for the agent. A delete or cancel meanwhile kills the VM (lifecycle.c), which ends the wait.
static int stage_agent(void *arg, struct err *err)
{
    struct launch *l = arg;
    struct sandbox *s = l->s;
    const int64_t t = clock_mono_us();
    const bool stands = l->origin && (!l->pooled || !l->pool_restored); // restored, and not yet let go
    const bool up = l->continued ? renew(l, stands, err) == 0
                                 : vm_wait_ready(l->vm, clock_mono_ms() + s->m->o.boot_timeout_ms, err);
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

// ---- from the pool ----------------------------------------------------------------------------------------------
int launch_take_directory(struct manager *m, const char *name, const char *id)
{
    if (faccessat(m->run_dirfd, name, F_OK, AT_SYMLINK_NOFOLLOW) != 0)
        return 0;
    (void)unlinkat(m->run_dirfd, id, AT_REMOVEDIR); // empty: nothing has been made in it
    return renameat(m->run_dirfd, name, m->run_dirfd, id);
}

// Its disk first: it belongs to a row that is there. Then the row learns of the VM; then the directory gets its name, which
// a restart makes up for (reconcile.c).
static int move_in(struct launch *l, struct pool_entry *e, struct err *err)
{
    struct sandbox *s = l->s;
    struct manager *m = s->m;
    char disk[ID_MAX + 16];
    snprintf(disk, sizeof disk, "%s/disk.raw", e->name);
    if (renameat(m->pool.dirfd, disk, s->dirfd, "disk.raw") != 0)
        return err_sys(err, errno, "moving a pooled disk");
    s->vm_uid = e->uid;
    e->uid = 0;
    budget_pool_give(m, e->reserved_mib); // its admission reserved as much
    e->reserved_mib = 0;
    begin_vm(s);
    vm_rebind(e->vm, &SANDBOX_VM_CALLBACKS, s);
    take_vm(l, e->vm);
    e->vm = NULL;
    snprintf(l->job->stage, sizeof l->job->stage, e->restored ? "agent" : "restore");
    l->job->state = JOB_RUNNING;
    if (journal_runtime(l, err) != 0)
        return -1;
    crash_point(s, "claim");
    if (launch_take_directory(m, e->name, s->id) != 0)
        return err_sys(err, errno, "naming a pooled VM's directory");
    fd_close(&s->run_dirfd);
    s->run_dirfd = openat(m->run_dirfd, s->id, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return s->run_dirfd >= 0 ? 0 : err_sys(err, errno, "opening a VM's directory");
}

static int launch_from_pool(struct launch *l, struct err *err)
{
    struct manager *m = l->s->m;
    char key[DIGEST_TEXT_MAX];
    const int64_t t = clock_mono_us();
    if (l->kind != LAUNCH_CREATE || !m->o.templates || images_runtime(m->images, &l->runtime, err) != 0)
        return 0;
    const struct machine_parts parts = parts_of(l);
    CLEANUP_JSON json_t *machine = machine_of(&parts);
    struct pool_entry *e = machine_key(machine, key) ? pool_take(m, key) : NULL;
    if (!e)
        return 0;
    l->origin = origin_ref(m, e->origin);
    l->continued = true;
    l->pooled = true;
    l->pool_restored = e->restored;
    l->boot_path = "pool";
    vm_background(e->vm, false);
    const int failed = move_in(l, e, err);
    if (failed)
        launch_undo(l);
    if (e->vm)
        pool_entry_end(m, e);
    else
        pool_entry_done(m, e);
    pool_refill(m);
    l->t_launch_us = clock_mono_us() - t;
    return failed;
}

// ---- all of it --------------------------------------------------------------------------------------------------
static const struct stage PREPARE[] = {{"prepare", stage_prepare, NULL, false}};
static const struct stage BOOT[] = {{"launch", stage_launch, undo_launch, true}, {"agent", stage_agent, NULL, false}};
static const struct stage CONTINUE[] = {{"launch", stage_launch, undo_launch, true}, {"restore", stage_restore, NULL, true},
                                        {"agent", stage_agent, NULL, false}};
static const struct stage UNPARK[] = {{"restore", stage_restore, undo_launch, true}, {"agent", stage_agent, undo_launch, false}};

// The last stage of a VM that was made ahead is in the journal already: one commit less on the shortest path.
static int run_claimed(struct launch *l, struct err *err)
{
    const int64_t t = clock_mono_us();
    if (!l->pool_restored)
        return stages_run(l->s, l->job, UNPARK, 2, l, err);
    crash_point(l->s, "agent");
    const int failed = stage_agent(l, err);
    stage_note(l->job, "agent", clock_mono_us() - t);
    if (failed)
        launch_undo(l);
    return failed;
}

// A VM that was made ahead and does not answer costs its client time, not the sandbox: another is made as if there had been
// no pool. run_claimed has ended it.
static bool pooled_failed(struct launch *l, struct err *err)
{
    if (op_should_stop(l->s, l->op, NULL))
        return false;
    log_warn("sandbox %s: its pooled VM failed: %s (%s); another is made", l->s->id, err->detail, err->code);
    memset(err, 0, sizeof *err);
    memset(&l->refreshed, 0, sizeof l->refreshed);
    origin_unref(l->s->m, l->origin);
    l->origin = NULL;
    l->pooled = l->pool_restored = l->continued = l->ran = false;
    l->boot_path = "cold";
    l->t_launch_us = l->t_restore_us = l->t_agent_us = 0;
    return true;
}

static int run(struct launch *l, struct err *err)
{
    if (op_should_stop(l->s, l->op, err))
        return -1;
    if (launch_from_pool(l, err) != 0)
        return -1;
    if (l->pooled) {
        const int failed = run_claimed(l, err);
        if (!failed || !pooled_failed(l, err))
            return failed;
    }
    if (stages_run(l->s, l->job, PREPARE, 1, l, err) != 0)
        return -1;
    return l->origin ? stages_run(l->s, l->job, CONTINUE, 3, l, err) : stages_run(l->s, l->job, BOOT, 2, l, err);
}

int launch_run(struct launch *l, struct err *err)
{
    const int failed = run(l, err);
    if (failed)
        (void)op_should_stop(l->s, l->op, err); // a delete has ended the VM, and is the answer
    return failed;
}

int launch_finish(struct launch *l, struct err *err)
{
    return stage_agent(l, err);
}

void launch_resumed(struct launch *l)
{
    l->continued = l->row.origin_json != NULL;
    l->boot_path = !l->continued ? "cold" : *l->row.parent_snapshot_id ? "snapshot" : "template";
}

void launch_init(struct launch *l, struct sandbox *s, struct op *op, enum launch_kind kind)
{
    memset(l, 0, sizeof *l);
    l->s = s;
    l->op = op;
    l->job = &op->job;
    l->kind = kind;
    l->boot_path = kind == LAUNCH_RESTORE || kind == LAUNCH_WAKE ? "snapshot" : "cold";
    l->kernel_fd = l->initrd_fd = l->root_fd = l->disk_fd = -1;
    struct sandbox_info *view = sandbox_view(s);
    sandbox_row_copy(&l->row, &view->row);
    sandbox_info_unref(view);
}

void launch_close(struct launch *l)
{
    fd_close(&l->kernel_fd);
    fd_close(&l->initrd_fd);
    fd_close(&l->root_fd);
    fd_close(&l->disk_fd);
    origin_unref(l->s->m, l->origin);
    l->origin = NULL;
    carry_discard(l->commands, l->n_commands);
    l->commands = NULL;
    sandbox_row_free(&l->row);
}

// ---- what it was ------------------------------------------------------------------------------------------------
static void put_stage(json_t *t, const char *name, int64_t us)
{
    if (us > 0)
        json_put_int(t, name, (us + 500) / 1000);
    else
        json_put(t, name, json_null());
}

static json_t *uniqueness_of(const struct launch *l)
{
    static const struct {
        unsigned part;
        const char *name;
    } PARTS[] = {{MSG_REFRESH_ENTROPY, "entropy"}, {MSG_REFRESH_CLOCK, "clock"}, {MSG_REFRESH_HOSTNAME, "hostname"},
                 {MSG_REFRESH_MACHINE_ID, "machine_id"}, {MSG_REFRESH_BOOT_ID, "boot_id"}};
    char hex[33];
    if (l->refreshed.done == 0)
        return NULL;
    json_t *u = json_object();
    for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
        json_put(u, PARTS[i].name, json_boolean(l->refreshed.done & PARTS[i].part));
    for (int i = 0; i < 16; i++)
        snprintf(hex + 2 * i, 3, "%02x", l->refreshed.generation[i]);
    json_put_str(u, "generation", hex);
    json_put_int(u, "clock_offset_ms", l->refreshed.clock_offset_ms);
    json_put_time(u, "refreshed_at", clock_wall_ms());
    return u;
}

void launch_describe(struct launch *l)
{
    struct manager *m = l->s->m;
    CLEANUP_JSON json_t *b = json_object();
    json_put_str(b, "accel", vm_accel_name(l->accel));
    json_put_str(b, "isolation", l->accel == VM_ACCEL_KVM ? "hardware" : "emulated");
    json_put_str(b, "boot_path", l->boot_path);
    json_put_str(b, "qemu_version", m->host.qemu_version);
    free(l->row.backend_json);
    l->row.backend_json = json_dumps(b, JSON_COMPACT);
    CLEANUP_JSON json_t *t = json_object();
    const int64_t total = clock_mono_us() - l->op->t0_us;
    const int64_t admit = total - l->t_prepare_us - l->t_launch_us - l->t_restore_us - l->t_agent_us;
    json_put_int(t, "admit", (admit > 0 ? admit : 0) / 1000);
    put_stage(t, "prepare", l->t_prepare_us);
    put_stage(t, "launch", l->t_launch_us);
    put_stage(t, "restore", l->t_restore_us);
    put_stage(t, "agent", l->t_agent_us);
    json_put_int(t, "total", total / 1000);
    free(l->row.timings_json);
    l->row.timings_json = json_dumps(t, JSON_COMPACT);
    CLEANUP_JSON json_t *u = uniqueness_of(l);
    free(l->row.uniqueness_json);
    l->row.uniqueness_json = u ? json_dumps(u, JSON_COMPACT) : NULL;
    describe_origin(l);
}

// What was really in force: the receipt's facts.
json_t *launch_facts(struct launch *l)
{
    json_t *f = json_object();
    json_put_str(f, "accel", vm_accel_name(l->accel));
    json_put_str(f, "isolation_kind", l->accel == VM_ACCEL_KVM ? "hardware" : "emulated");
    json_put_str(f, "boot_path", l->boot_path);
    json_put_str(f, "image_digest", l->row.image_digest);
    json_put_str(f, "kernel_digest", l->runtime.kernel_digest);
    json_put_str(f, "initramfs_digest", l->runtime.initramfs_digest);
    json_put_str(f, "qemu_digest", l->s->m->host.qemu_sha256);
    json_put_str(f, "qemu_version", l->s->m->host.qemu_version);
    json_put_int(f, "vcpus", l->row.vcpus);
    json_put_int(f, "memory_mib", l->row.memory_mib);
    json_put_int(f, "disk_mib", l->row.disk_mib);
    json_put(f, "network", json_string("none"));
    json_put_str(f, "template", l->origin && *l->origin->template_key ? l->origin->template_key : NULL);
    json_t *u = uniqueness_of(l);
    json_put(f, "uniqueness", u ? u : json_null());
    json_put(f, "jail", l->vm ? vm_isolation(l->vm) : json_null());
    return f;
}
