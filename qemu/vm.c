// One VM's life: launch, adoption, waiting, ending.
#include "qemu/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/limits.h"
#include "base/log.h"
#include "qemu/vm_int.h"

#define CONTROL_QUEUE_MAX (4u << 20)
#define END_TIMEOUT_MS 10000

static const char *const SOCKETS[] = {"control", "bulk", "qmp", "console"};

// ---- making -----------------------------------------------------------------------------------------------------
static struct vm *vm_new(const char *id, int run_dirfd, struct loop *loop, const struct vm_callbacks *cb, void *arg,
                         struct err *err)
{
    struct vm *vm = calloc(1, sizeof *vm);
    const int dir = fcntl(run_dirfd, F_DUPFD_CLOEXEC, 3);
    if (!vm || dir < 0) {
        err_sys(err, vm ? errno : ENOMEM, "making a VM");
        free(vm);
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->changed, &attr);
    pthread_condattr_destroy(&attr);
    snprintf(vm->id, sizeof vm->id, "%s", id);
    snprintf(vm->hostname, sizeof vm->hostname, "%s", id);
    vm->loop = loop;
    vm->cb = cb;
    vm->arg = arg;
    vm->run_dirfd = dir;
    vm->state_fd = vm->qmp_fd = vm->console_fd = vm->early_fds[0] = vm->early_fds[1] = -1;
    vm->reconnect_ms = RECONNECT_MS;
    vm->process = (struct process){.outer = -1, .pid = -1, .outer_pidfd = -1, .pidfd = -1, .stderr_fd = -1};
    atomic_store(&vm->next_id, (unsigned long long)clock_wall_ms() << 14); // below 2^56 until the year 2109
    channel_init(&vm->control, loop, CONTROL_QUEUE_MAX, &VM_CHANNEL_CALLBACKS, vm);
    channel_init(&vm->bulk, loop, VM_BULK_QUEUE_MAX, &VM_CHANNEL_CALLBACKS, vm);
    return vm;
}

static void vm_destroy(struct vm *vm)
{
    channel_destroy(&vm->control);
    channel_destroy(&vm->bulk);
    process_close(&vm->process);
    fd_close(&vm->run_dirfd);
    fd_close(&vm->state_fd);
    fd_close(&vm->qmp_fd);
    fd_close(&vm->console_fd);
    fd_close(&vm->early_fds[0]);
    fd_close(&vm->early_fds[1]);
    pthread_cond_destroy(&vm->changed);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

// ---- the loop's side ------------------------------------------------------------------------------------------------
static void on_gone(void *arg, uint32_t events)
{
    struct vm *vm = arg;
    (void)events;
    loop_watch_remove(vm->gone_watch);
    vm->gone_watch = NULL;
    qmp_drain(vm); // its last words are in the socket
    stderr_tell(vm);
    const int status = process_exit_status(&vm->process);
    const bool shutdown = !vm->panic_seen && (vm->shutdown_seen || status == 0);
    session_close(vm);
    loop_timer_cancel(vm->resume_timer);
    vm->resume_timer = NULL;
    pthread_mutex_lock(&vm->lock);
    vm->gone = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    if (vm->attached)
        vm->cb->gone(vm->arg, shutdown ? VM_GONE_SHUTDOWN : VM_GONE_DIED,
                     shutdown ? "the guest shut down" : "QEMU ended unexpectedly");
    vm->attached = false;
}

struct attach {
    struct vm *vm;
    int qmp_fd, console_fd;
};

static void attach(void *arg)
{
    struct attach *a = arg;
    struct vm *vm = a->vm;
    vm->attached = true;
    qmp_connect(vm, a->qmp_fd);
    console_connect(vm, a->console_fd);
    if (vm->waits)
        session_hold(vm);
    else
        session_connect(vm);
    vm->gone_watch = loop_watch_add(vm->loop, vm->process.pidfd, EPOLLIN, on_gone, vm);
    free(a);
}

static void detach(void *arg)
{
    struct vm *vm = arg;
    vm->attached = false;
    session_close(vm);
    qmp_close(vm);
    console_close(vm);
    loop_watch_remove(vm->gone_watch);
    vm->gone_watch = NULL;
    loop_timer_cancel(vm->resume_timer);
    vm->resume_timer = NULL;
    pthread_mutex_lock(&vm->lock);
    vm->detached = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

static bool no_descriptors(int error)
{
    return error == EMFILE || error == ENFILE;
}

static int begin(struct vm *vm, struct err *err)
{
    struct attach *a = calloc(1, sizeof *a);
    if (!a)
        return err_sys(err, ENOMEM, "attaching a VM");
    a->vm = vm;
    errno = 0;
    a->qmp_fd = fd_unix_connect(vm->run_dirfd, "qmp");
    a->console_fd = a->qmp_fd >= 0 || !no_descriptors(errno) ? fd_unix_connect(vm->run_dirfd, "console") : -1;
    int why = 0;
    if ((a->qmp_fd < 0 || a->console_fd < 0) && no_descriptors(errno)) // without a monitor nobody could stop it nor save it
        why = errno;
    else if (loop_post(vm->loop, attach, a) != 0)
        why = ENOMEM;
    if (why == 0)
        return 0;
    fd_close(&a->qmp_fd);
    fd_close(&a->console_fd);
    free(a);
    return err_sys(err, why, "attaching a VM");
}

// ---- launch -----------------------------------------------------------------------------------------------------
// The jail's uid must be able to read what QEMU opens by name; a blob that it cannot is given as a sealed copy.
static int readable(int fd, uid_t uid)
{
    struct stat st;
    return fstat(fd, &st) == 0 && (uid == 0 || (st.st_mode & 0004));
}

static int sealed_copy(int fd, struct err *err)
{
    CLEANUP_FD int copy = memfd_create("blob", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char chunk[65536];
    ssize_t n = copy < 0 ? -1 : 1;
    for (off_t at = 0; n > 0; at += n) {
        n = pread(fd, chunk, sizeof chunk, at);
        if (n > 0 && fd_write_full(copy, chunk, (size_t)n) != 0)
            n = -1;
    }
    if (n < 0 || fchmod(copy, 0444) != 0 ||
        fcntl(copy, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0)
        return err_sys(err, errno, "copying a boot file");
    return fd_steal(&copy);
}

static int start(struct vm *vm, const struct vm_spec *spec, struct err *err)
{
    CLEANUP_FD int control = fd_unix_listen(vm->run_dirfd, SOCKETS[0], 8);
    CLEANUP_FD int bulk = fd_unix_listen(vm->run_dirfd, SOCKETS[1], 8);
    CLEANUP_FD int qmp = fd_unix_listen(vm->run_dirfd, SOCKETS[2], 8);
    CLEANUP_FD int console = fd_unix_listen(vm->run_dirfd, SOCKETS[3], 8);
    CLEANUP_FD int kernel_copy = -1, initrd_copy = -1, disk_read = -1;
    char disk_path[32];
    snprintf(disk_path, sizeof disk_path, "/proc/self/fd/%d", spec->disk_fd);
    if (spec->disk_fd >= 0 && (disk_read = open(disk_path, O_RDONLY | O_CLOEXEC)) < 0)
        return err_sys(err, errno, "opening a disk");
    if (control < 0 || bulk < 0 || qmp < 0 || console < 0)
        return err_sys(err, errno, "making a VM's sockets");
    const bool boots = !spec->incoming;
    if (boots && !readable(spec->kernel_fd, spec->jail_uid) && (kernel_copy = sealed_copy(spec->kernel_fd, err)) < 0)
        return -1;
    if (boots && !readable(spec->initrd_fd, spec->jail_uid) && (initrd_copy = sealed_copy(spec->initrd_fd, err)) < 0)
        return -1;
    const struct process_fds fds = {!boots ? -1 : kernel_copy >= 0 ? kernel_copy : spec->kernel_fd,
                                    !boots ? -1 : initrd_copy >= 0 ? initrd_copy : spec->initrd_fd,
                                    spec->root_fd, spec->disk_fd, control, bulk, qmp, console, disk_read,
                                    spec->ram_fd > 0 ? spec->ram_fd : -1};
    // Connected before QEMU runs: it accepts when it is there, and no message waits for a poll of ours.
    struct attach *a = calloc(1, sizeof *a);
    if (!a)
        return err_sys(err, ENOMEM, "launching a VM");
    *a = (struct attach){vm, fd_unix_connect(vm->run_dirfd, "qmp"), fd_unix_connect(vm->run_dirfd, "console")};
    if (process_start(spec, &fds, &vm->process, err) == 0) {
        if (loop_post(vm->loop, attach, a) == 0)
            return 0;
        err_sys(err, ENOMEM, "launching a VM");
        (void)process_end(&vm->process, END_TIMEOUT_MS);
    }
    fd_close(&a->qmp_fd);
    fd_close(&a->console_fd);
    free(a);
    return -1;
}

struct vm *vm_launch(const struct vm_spec *spec, struct loop *loop, const struct vm_callbacks *cb, void *arg,
                     struct err *err)
{
    struct vm *vm = vm_new(spec->id, spec->run_dirfd, loop, cb, arg, err);
    if (!vm)
        return NULL;
    vm->accel = spec->accel;
    vm->ram_is_file = spec->ram_fd > 0;
    vm->paused = vm->waits = spec->incoming;
    if (start(vm, spec, err) == 0)
        return vm;
    vm_destroy(vm);
    return NULL;
}

// ---- adoption ---------------------------------------------------------------------------------------------------
static int host_boot_id(char out[static 48])
{
    CLEANUP_BUF struct buf b = BUF_INIT(64);
    out[0] = 0;
    if (fd_read_file(AT_FDCWD, "/proc/sys/kernel/random/boot_id", &b) != 0)
        return -1;
    snprintf(out, 48, "%.36s", buf_text(&b));
    return 0;
}

json_t *vm_runtime(const struct vm *vm)
{
    char boot_id[48];
    (void)host_boot_id(boot_id);
    return json_pack("{s:i, s:I, s:i, s:I, s:s, s:s, s:i, s:s, s:b}", "outer", (int)vm->process.outer, "outer_start",
                     (json_int_t)vm->process.outer_start, "pid", (int)vm->process.pid, "start",
                     (json_int_t)vm->process.start, "accel", vm_accel_name(vm->accel), "boot_id", boot_id, "uid",
                     (int)vm->process.uid, "name", vm->id, "ram_file", (int)vm->ram_is_file);
}

// A VM that was made ahead has the name of the pool's entry.
static const char *name_of(const json_t *runtime, const char *id)
{
    const char *name = json_get_str(runtime, "name");
    return name && *name ? name : id;
}

static int open_by_runtime(const json_t *runtime, const char *id, struct process *ret)
{
    return process_open((pid_t)json_get_int(runtime, "outer", -1), (uint64_t)json_get_int(runtime, "outer_start", 0),
                        (pid_t)json_get_int(runtime, "pid", -1), (uint64_t)json_get_int(runtime, "start", 0),
                        name_of(runtime, id), ret);
}

enum vm_adopt_verdict vm_adopt(const json_t *runtime, const char *id, int run_dirfd, struct loop *loop,
                               const struct vm_callbacks *cb, void *arg, struct vm **ret_vm, struct err *err)
{
    char boot_id[48];
    if (host_boot_id(boot_id) != 0) {
        err_sys(err, errno, "reading the host's boot id");
        return VM_ADOPT_FAILED;
    }
    const char *theirs = json_get_str(runtime, "boot_id"), *accel = json_get_str(runtime, "accel");
    if (!theirs || strcmp(theirs, boot_id) != 0)
        return VM_ADOPT_HOST_REBOOTED;
    struct vm *vm = vm_new(name_of(runtime, id), run_dirfd, loop, cb, arg, err);
    if (!vm)
        return VM_ADOPT_FAILED;
    vm->adopted = vm->states_left = true;
    snprintf(vm->hostname, sizeof vm->hostname, "%s", id);
    vm->ram_is_file = json_is_true(json_object_get(runtime, "ram_file"));
    vm->accel = accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG;
    const int gone = open_by_runtime(runtime, id, &vm->process);
    if (gone != 0) {
        if (gone > 0)
            err_set(err, ERR_TRANSPORT_FAILED, "vm_gone", "the virtual machine has ended");
        else
            err_sys(err, errno, "looking for a VM's process");
        vm_destroy(vm);
        return gone > 0 ? VM_ADOPT_GONE : VM_ADOPT_FAILED;
    }
    vm->process.uid = (uid_t)json_get_int(runtime, "uid", 0);
    *ret_vm = vm;
    return VM_ADOPTED;
}

int vm_connect(struct vm *vm, bool paused, struct err *err)
{
    vm->paused = paused;
    return begin(vm, err);
}

int vm_end_stray(const json_t *runtime, const char *id, const char *cgroup_parent, struct err *err)
{
    struct process p;
    (void)cgroup_parent;
    if (runtime && open_by_runtime(runtime, id, &p) == 0) {
        (void)process_end(&p, END_TIMEOUT_MS);
        process_close(&p);
    }
    const int left = process_end_named(id, END_TIMEOUT_MS);
    const int pooled = strcmp(name_of(runtime, id), id) != 0 ? process_end_named(name_of(runtime, id), END_TIMEOUT_MS) : 0;
    if (left == 0 && pooled == 0)
        return 0;
    if (left < 0 || pooled < 0)
        return err_set(err, ERR_CLEANUP_FAILED, "process_left", "the host's processes could not all be looked at");
    return err_set(err, ERR_CLEANUP_FAILED, "process_left", "%d processes of the sandbox could not be ended",
                   left + pooled);
}

// ---- waiting ----------------------------------------------------------------------------------------------------
void vm_note_fatal(struct vm *vm, const struct err *err)
{
    pthread_mutex_lock(&vm->lock);
    vm->fatal = *err;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

void vm_note_ready(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->ready = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

bool vm_wait_ready(struct vm *vm, int64_t deadline_mono_ms, struct err *err)
{
    const struct timespec until = {.tv_sec = deadline_mono_ms / 1000, .tv_nsec = deadline_mono_ms % 1000 * 1000000};
    pthread_mutex_lock(&vm->lock);
    int waited = 0;
    while (!vm->ready && !vm->gone && vm->fatal.kind == ERR_NONE && waited == 0)
        waited = pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
    const bool ready = vm->ready && !vm->gone;
    if (!ready && vm->fatal.kind != ERR_NONE)
        *err = vm->fatal;
    else if (!ready && vm->gone)
        err_set(err, ERR_TRANSPORT_FAILED, "vm_died", "the virtual machine ended before its agent answered");
    else if (!ready)
        err_set(err, ERR_TIMEOUT, "boot_timeout", "the guest's agent did not answer in time");
    pthread_mutex_unlock(&vm->lock);
    return ready;
}

// ---- sending ----------------------------------------------------------------------------------------------------
uint64_t vm_next_id(struct vm *vm)
{
    return atomic_fetch_add(&vm->next_id, 1) & FRAME_ID_MAX;
}

static int send_error(int code, struct err *err)
{
    if (code == -2)
        return err_set(err, ERR_UNAVAILABLE, "channel_busy", "the channel to the guest is full");
    return err_set(err, ERR_TRANSPORT_FAILED, "agent_unreachable", "the sandbox's agent does not answer");
}

static int send_by(struct channel *c, int type, uint64_t id, const struct buf *payload, struct err *err)
{
    const int code = channel_send(c, (uint8_t)type, 0, id, payload ? payload->data : NULL, payload ? payload->len : 0, NULL, 0);
    return code == 0 ? 0 : send_error(code, err);
}

int vm_send(struct vm *vm, int type, uint64_t id, const struct buf *payload, struct err *err)
{
    return send_by(&vm->control, type, id, payload, err);
}

int vm_send_bulk(struct vm *vm, int type, uint64_t id, const struct buf *payload, struct err *err)
{
    return send_by(&vm->bulk, type, id, payload, err);
}

int vm_send_data(struct vm *vm, int type, uint64_t id, uint64_t stream, uint64_t offset, const void *data, size_t len,
                 bool last, struct err *err)
{
    const uint8_t *at = data;
    // All or nothing. Content made of magics goes out in pieces of 15 bytes, each with 24 of its own.
    if (channel_room(&vm->bulk) < 3 * len + 4096)
        return send_error(-2, err);
    do {
        uint8_t head[MSG_DATA_HEADER];
        size_t n = len < FRAME_DATA_MAX - MSG_DATA_HEADER ? len : FRAME_DATA_MAX - MSG_DATA_HEADER;
        if (n > 0)
            n = frame_data_cut(at, n);
        msg_data_header(head, stream, offset);
        const bool end = last && n == len;
        const int code = channel_send(&vm->bulk, (uint8_t)type, end ? FRAME_LAST : 0, id, head, sizeof head, at, n);
        if (code != 0)
            return send_error(code, err);
        if (n > 0)
            at += n;
        len -= n;
        offset += n;
    } while (len > 0);
    return 0;
}

struct hold {
    struct vm *vm;
    bool hold;
};

static void hold_now(void *arg)
{
    struct hold *h = arg;
    channel_hold(&h->vm->bulk, h->hold);
    free(h);
}

void vm_hold_bulk(struct vm *vm, bool hold)
{
    struct hold *h = malloc(sizeof *h);
    if (!h)
        return;
    *h = (struct hold){vm, hold};
    if (loop_post(vm->loop, hold_now, h) != 0)
        free(h);
}

// ---- ending -----------------------------------------------------------------------------------------------------
void vm_kill(struct vm *vm)
{
    process_kill(&vm->process);
}

bool vm_stop(struct vm *vm, int grace_ms)
{
    struct err err = {0};
    const int64_t deadline = clock_mono_ms() + grace_ms;
    const struct timespec until = {.tv_sec = deadline / 1000, .tv_nsec = deadline % 1000 * 1000000};
    const bool asked = vm_send(vm, FRAME_SHUTDOWN, 0, NULL, &err) == 0;
    pthread_mutex_lock(&vm->lock);
    int waited = 0;
    while (asked && !vm->gone && waited == 0)
        waited = pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
    const bool gone = vm->gone;
    pthread_mutex_unlock(&vm->lock);
    return gone;
}

int vm_end(struct vm *vm, struct err *err)
{
    if (process_end(&vm->process, END_TIMEOUT_MS) == 0)
        return 0;
    return err_set(err, ERR_CLEANUP_FAILED, "process_left", "the virtual machine's process could not be ended");
}

void vm_free(struct vm *vm)
{
    if (!vm)
        return;
    pthread_mutex_lock(&vm->lock);
    const bool posted = loop_post(vm->loop, detach, vm) == 0;
    while (posted && !vm->detached)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
    vm_destroy(vm);
}

// ---- facts ------------------------------------------------------------------------------------------------------
json_t *vm_isolation(struct vm *vm)
{
    return process_isolation(&vm->process);
}

void vm_stats(struct vm *vm, struct vm_stats *ret)
{
    *ret = (struct vm_stats){.pid = vm->process.pid, .frames_in = vm->control.frames_in + vm->bulk.frames_in,
                             .frames_out = vm->control.frames_out + vm->bulk.frames_out,
                             .violations = vm->control.violations + vm->bulk.violations,
                             .last_ping_us = atomic_load(&vm->last_ping_us)};
    process_usage(&vm->process, &ret->cpu_ms, &ret->rss_bytes);
}
