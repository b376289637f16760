// A VM's state as a whole: stop and go, saved device state in and out, the agent's freeze and refresh.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/crypto.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/log.h"
#include "qemu/vm_int.h"

#define QMP_MS 10000
#define BACKGROUND_NICE 19
#define STATE_OPAQUE "airlock-state"
#define STATES_LEFT_MAX 64 // of the 256 descriptors of process.c, that a VM holds until it runs again

// Waits for vm->changed, which broadcasts; false when the time is up. Under vm->lock.
static bool wait_changed(struct vm *vm, int64_t deadline_mono_ms)
{
    const struct timespec until = {.tv_sec = deadline_mono_ms / 1000, .tv_nsec = deadline_mono_ms % 1000 * 1000000};
    return pthread_cond_timedwait(&vm->changed, &vm->lock, &until) == 0;
}

static int ask(struct vm *vm, const char *command, json_t *arguments_stolen, int timeout_ms, struct err *err)
{
    json_t *r = vm_qmp(vm, command, arguments_stolen, timeout_ms, err);
    json_decref(r);
    return r ? 0 : -1;
}

// ---- stop and go ----------------------------------------------------------------------------------------------------
static void set_paused(struct vm *vm, bool paused)
{
    pthread_mutex_lock(&vm->lock);
    vm->paused = paused;
    pthread_mutex_unlock(&vm->lock);
}

bool vm_is_paused(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    const bool paused = vm->paused;
    pthread_mutex_unlock(&vm->lock);
    return paused;
}

int vm_pause(struct vm *vm, struct err *err)
{
    const bool was = vm_is_paused(vm);
    set_paused(vm, true);
    if (ask(vm, "stop", NULL, QMP_MS, err) == 0)
        return 0;
    if (was) // its owner's pause, which a refusal here does not end
        return -1;
    qmp_send(vm, "cont"); // it may stop yet, after we have given up
    set_paused(vm, false);
    return -1;
}

// The session of a guest that was loaded begins when it goes on: what it is told is there when it wakes.
struct begin {
    struct vm *vm;
    struct buf *first;
    bool done;
};

static void begin_now(void *arg)
{
    struct begin *b = arg;
    struct vm *vm = b->vm;
    if (vm->attached) {
        vm->first = b->first;
        session_connect(vm);
        vm->first = NULL;
    }
    pthread_mutex_lock(&vm->lock);
    b->done = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

static int begin_session(struct vm *vm, struct buf *first, struct err *err)
{
    struct begin b = {vm, first, false};
    pthread_mutex_lock(&vm->lock);
    const bool waits = vm->waits;
    vm->waits = false;
    pthread_mutex_unlock(&vm->lock);
    if (!waits)
        return 0;
    if (loop_post(vm->loop, begin_now, &b) != 0)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    pthread_mutex_lock(&vm->lock);
    while (!b.done)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

int vm_go(struct vm *vm, struct err *err)
{
    if (begin_session(vm, NULL, err) != 0 || ask(vm, "cont", NULL, QMP_MS, err) != 0)
        return -1;
    set_paused(vm, false);
    return 0;
}

int vm_resume(struct vm *vm, struct err *err)
{
    if (vm_go(vm, err) != 0)
        return -1;
    if (vm->state_fd >= 0 || vm->states_left)
        vm_save_done(vm);
    return 0;
}

// ---- saved state ----------------------------------------------------------------------------------------------------
// 1 completed, 0 not yet, -1 failed.
static int migration(struct vm *vm, struct err *err)
{
    CLEANUP_JSON json_t *r = vm_qmp(vm, "query-migrate", NULL, QMP_MS, err);
    const char *status = json_get_str(r, "status");
    if (!r)
        return -1;
    if (status && strcmp(status, "completed") == 0)
        return 1;
    if (!status || (strcmp(status, "failed") != 0 && strcmp(status, "cancelled") != 0))
        return 0;
    err_set(err, ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch", "QEMU refused the saved state");
    return err_field(err, "state", "refused by QEMU");
}

int vm_restore(struct vm *vm, int state_fd, int timeout_ms, struct err *err)
{
    const int64_t until = clock_mono_ms() + timeout_ms;
    json_t *r = vm_qmp_fd(vm, "getfd", json_pack("{s:s}", "fdname", "state"), state_fd, timeout_ms, err);
    if (!r)
        return -1;
    json_decref(r);
    if (ask(vm, "migrate-incoming", json_pack("{s:s}", "uri", "fd:state"), timeout_ms, err) != 0)
        return -1;
    for (;;) {
        const int done = migration(vm, err);
        if (done != 0)
            return done > 0 ? 0 : -1;
        if (clock_mono_ms() > until)
            return err_set(err, ERR_TIMEOUT, "restore_timeout", "the saved state was not loaded in time");
        const struct timespec pause = {.tv_nsec = 300 * 1000}; // QEMU tells nobody when it is done
        nanosleep(&pause, NULL);
    }
}

static int copy_state(int from, int to, struct err *err)
{
    struct stat st;
    off_t at = 0;
    if (fstat(from, &st) != 0)
        return err_sys(err, errno, "reading device state");
    if (st.st_size > VM_STATE_MAX) // it could not be loaded either, and what QEMU writes must not fill the host's disk
        return err_set(err, ERR_TRANSPORT_FAILED, "device_state", "the sandbox's device state is of more than %u MiB",
                       VM_STATE_MAX >> 20);
    while (at < st.st_size)
        if (sendfile(to, from, &at, (size_t)(st.st_size - at)) <= 0)
            return err_sys(err, errno, "writing device state");
    return 0;
}

static int reopen(int fd, int flags)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return fd < 0 ? -1 : open(path, flags | O_CLOEXEC);
}

static int give_state_file(struct vm *vm, int timeout_ms, struct err *err)
{
    CLEANUP_FD int memory = memfd_create("airlock-state", MFD_CLOEXEC);
    CLEANUP_FD int out = reopen(memory, O_WRONLY); // QEMU matches access modes, and wants to write only
    if (out < 0)
        return err_sys(err, errno, "making a file for device state");
    CLEANUP_JSON json_t *set = vm_qmp_fd(vm, "add-fd", json_pack("{s:s}", "opaque", STATE_OPAQUE), out, timeout_ms, err);
    if (!set) {
        vm->states_left = true; // it may have come, and only the answer not
        return -1;
    }
    vm->state_fdset = json_integer_value(json_object_get(set, "fdset-id"));
    vm->state_fd = fd_steal(&out);
    return 0;
}

// By way of a file in memory, as QEMU has no business with what is kept. It closes a descriptor that it was given only while the
// guest runs (monitor/fds.c), so a VM that stands still is saved into the same one each time: they share the position.
int vm_save_state(struct vm *vm, int fd, int timeout_ms, struct err *err)
{
    char path[64];
    if (vm->state_fd < 0 && give_state_file(vm, timeout_ms, err) != 0)
        return -1;
    CLEANUP_FD int memory = reopen(vm->state_fd, O_RDONLY);
    if (memory < 0 || ftruncate(vm->state_fd, 0) != 0 || lseek(vm->state_fd, 0, SEEK_SET) != 0)
        return err_sys(err, errno, "opening a file for device state");
    snprintf(path, sizeof path, "/dev/fdset/%lld", (long long)vm->state_fdset);
    // live=false: the drives stay active, because this VM goes on.
    if (ask(vm, "xen-save-devices-state", json_pack("{s:s, s:b}", "filename", path, "live", 0), timeout_ms, err) != 0) {
        fd_close(&vm->state_fd); // it may be written to yet: not the file of the next save
        vm->states_left = true;
        return -1;
    }
    const int failed = copy_state(memory, fd, err);
    (void)!ftruncate(vm->state_fd, 0);
    return failed;
}

int vm_save_room(struct vm *vm, struct err *err)
{
    size_t i, n = 0;
    json_t *set;
    if (vm->state_fd >= 0 || !vm->states_left)
        return 0;
    CLEANUP_JSON json_t *sets = vm_qmp(vm, "query-fdsets", NULL, QMP_MS, err);
    if (!sets)
        return -1;
    json_array_foreach(sets, i, set)
        n += json_array_size(json_object_get(set, "fds"));
    if (n < STATES_LEFT_MAX)
        return 0;
    err_set(err, ERR_UNAVAILABLE, "state_descriptors", "the paused virtual machine has no room for another save");
    return err_remedy(err, "resume the sandbox; it may be paused again at once");
}

// QEMU closes a descriptor that was taken back only while the guest runs: what was left is taken back again.
void vm_fds_close(struct vm *vm, const char *opaque)
{
    struct err err = {0};
    size_t i;
    json_t *set;
    CLEANUP_JSON json_t *sets = vm_qmp(vm, "query-fdsets", NULL, QMP_MS, &err);
    json_array_foreach(sets, i, set) {
        const char *its = json_get_str(json_array_get(json_object_get(set, "fds"), 0), "opaque");
        const json_int_t id = json_get_int(set, "fdset-id", -1);
        if (its && strcmp(its, opaque) == 0)
            (void)ask(vm, "remove-fd", json_pack("{s:I}", "fdset-id", id), QMP_MS, &err);
    }
}

void vm_save_done(struct vm *vm)
{
    vm_fds_close(vm, STATE_OPAQUE);
    fd_close(&vm->state_fd);
    vm->states_left = false;
}

pid_t vm_pid(const struct vm *vm)
{
    return vm->process.pid;
}

pid_t vm_outer_pid(const struct vm *vm)
{
    return vm->process.outer;
}

bool vm_ram_is_file(const struct vm *vm)
{
    return vm->ram_is_file;
}

const char *vm_name(const struct vm *vm)
{
    return vm->id;
}

// ---- freeze -----------------------------------------------------------------------------------------------------------
#define BOTH_PORTS ((1u << MSG_PORT_CONTROL) | (1u << MSG_PORT_BULK))

void state_frozen(struct vm *vm, const struct frame *f)
{
    struct msg_frozen m;
    if (msg_frozen_decode(f->payload, f->length, &m) != 0 || (m.port != MSG_PORT_CONTROL && m.port != MSG_PORT_BULK))
        return;
    pthread_mutex_lock(&vm->lock);
    if (vm->freeze_id != 0 && f->id == vm->freeze_id) {
        vm->frozen |= 1u << m.port;
        vm->frozen_said = (struct vm_frozen){m.disk_bytes, m.disk_free_bytes, (unsigned)m.n_commands};
        pthread_cond_broadcast(&vm->changed);
    }
    pthread_mutex_unlock(&vm->lock);
}

void state_session_lost(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->freeze_lost = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

int vm_freeze_wait(struct vm *vm, int timeout_ms, struct vm_frozen *ret, struct err *err)
{
    const int64_t until = clock_mono_ms() + timeout_ms;
    pthread_mutex_lock(&vm->lock);
    bool in_time = true;
    while (vm->frozen != BOTH_PORTS && !vm->freeze_lost && !vm->gone && in_time)
        in_time = wait_changed(vm, until);
    const bool frozen = vm->frozen == BOTH_PORTS && !vm->freeze_lost && !vm->gone;
    *ret = vm->frozen_said;
    pthread_mutex_unlock(&vm->lock);
    if (frozen)
        return 0;
    if (in_time)
        return err_set(err, ERR_TRANSPORT_FAILED, "agent_unreachable", "the sandbox's agent does not answer");
    err_set(err, ERR_TIMEOUT, "agent_freeze", "the sandbox's agent did not come to rest within %d ms", timeout_ms);
    return err_remedy(err, "try again when the guest is less busy");
}

int vm_freeze_begin(struct vm *vm, struct err *err)
{
    if (vm->hello.version != 0 && !(vm->hello.features & MSG_FEATURE_FREEZE)) {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "agent_freeze", "the sandbox's agent is of an older version");
        return err_remedy(err, "stop and start the sandbox");
    }
    pthread_mutex_lock(&vm->lock);
    const uint64_t id = vm->freeze_id = atomic_fetch_add(&vm->next_id, 1) & FRAME_ID_MAX;
    vm->frozen = 0;
    vm->freeze_lost = false;
    pthread_mutex_unlock(&vm->lock);
    if (channel_freeze(&vm->control, FRAME_FREEZE, id) != 0 || channel_freeze(&vm->bulk, FRAME_FREEZE, id) != 0)
        return err_set(err, ERR_TRANSPORT_FAILED, "agent_unreachable", "the sandbox's agent does not answer");
    return 0;
}

int vm_freeze(struct vm *vm, int timeout_ms, struct vm_frozen *ret, struct err *err)
{
    return vm_freeze_begin(vm, err) != 0 ? -1 : vm_freeze_wait(vm, timeout_ms, ret, err);
}

void vm_thaw(struct vm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->freeze_id = 0;
    pthread_mutex_unlock(&vm->lock);
    channel_thaw(&vm->control);
    channel_thaw(&vm->bulk);
}

// ---- refresh ----------------------------------------------------------------------------------------------------------
static void copy_word(char *out, size_t cap, struct slice s)
{
    size_t n = 0;
    for (size_t i = 0; i < s.len && n + 1 < cap; i++)
        if (s.data[i] > 0x20 && s.data[i] < 0x7f)
            out[n++] = (char)s.data[i];
    out[n] = 0;
}

void state_refreshed(struct vm *vm, const struct frame *f)
{
    struct msg_refreshed m;
    const int64_t now = clock_wall_ms();
    int64_t offset;
    if (msg_refreshed_decode(f->payload, f->length, &m) != 0)
        return;
    if (__builtin_sub_overflow(m.wall_ms, now, &offset)) // any number can come from a guest: this is none near ours
        offset = m.wall_ms < now ? INT64_MIN : INT64_MAX;
    pthread_mutex_lock(&vm->lock);
    if (memcmp(m.generation, vm->refresh_generation, sizeof m.generation) == 0) {
        struct vm_refreshed *r = &vm->refreshed;
        *r = (struct vm_refreshed){.done = (unsigned)m.done, .clock_offset_ms = offset};
        memcpy(r->generation, m.generation, sizeof r->generation);
        copy_word(r->hostname, sizeof r->hostname, m.hostname);
        copy_word(r->machine_id, sizeof r->machine_id, m.machine_id);
        copy_word(r->boot_id, sizeof r->boot_id, m.boot_id);
        snprintf(r->fault, sizeof r->fault, "%.*s", (int)(m.fault.len < 120 ? m.fault.len : 120), (const char *)m.fault.data);
        memcpy(r->random, m.random.data, m.random.len < 16 ? m.random.len : 16);
        vm->refreshed_came = true;
        pthread_cond_broadcast(&vm->changed);
    }
    pthread_mutex_unlock(&vm->lock);
}

static struct slice slice_of(const char *text)
{
    return (struct slice){(const uint8_t *)(text ? text : ""), text ? strlen(text) : 0};
}

static unsigned parts_of(const struct vm_identity *id)
{
    return (id->seed ? (unsigned)MSG_REFRESH_ENTROPY : 0u) | (id->clock ? (unsigned)MSG_REFRESH_CLOCK : 0u) |
           (id->hostname ? (unsigned)MSG_REFRESH_HOSTNAME : 0u) |
           (id->machine_id ? (unsigned)MSG_REFRESH_MACHINE_ID : 0u) | (id->boot_id ? (unsigned)MSG_REFRESH_BOOT_ID : 0u);
}

// The agent says what is in force; what was asked for is looked at here, word by word.
static int refresh_check(const struct vm_identity *id, const struct vm_refreshed *r, struct err *err)
{
    static const struct {
        unsigned part;
        const char *name;
    } PARTS[] = {{MSG_REFRESH_ENTROPY, "entropy"}, {MSG_REFRESH_CLOCK, "clock"}, {MSG_REFRESH_HOSTNAME, "hostname"},
                 {MSG_REFRESH_MACHINE_ID, "machine_id"}, {MSG_REFRESH_BOOT_ID, "boot_id"}};
    unsigned missing = parts_of(id) & ~r->done;
    if (id->clock && (r->clock_offset_ms > 2000 || r->clock_offset_ms < -2000))
        missing |= MSG_REFRESH_CLOCK;
    if (id->hostname && strcmp(id->hostname, r->hostname) != 0)
        missing |= MSG_REFRESH_HOSTNAME;
    if (id->machine_id && strcmp(id->machine_id, r->machine_id) != 0)
        missing |= MSG_REFRESH_MACHINE_ID;
    if (id->boot_id && strcmp(id->boot_id, r->boot_id) != 0)
        missing |= MSG_REFRESH_BOOT_ID;
    if (missing == 0)
        return 0;
    char names[80] = "";
    for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
        if (missing & PARTS[i].part)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *names ? ", " : "", PARTS[i].name);
    err_set(err, ERR_TRANSPORT_FAILED, "not_unique", "the guest could not be made unique: %s", names);
    snprintf(err->internal, sizeof err->internal, "agent: %.100s", r->fault);
    return -1;
}

// Encodes the request and makes ready for its answer, which is known by the generation.
static int refresh_prepare(struct vm *vm, const struct vm_identity *id, struct buf *out, struct err *err)
{
    struct msg_refresh m = {.seed = {id->seed, id->seed ? MSG_SEED_BYTES : 0}, .wall_ms = id->clock ? clock_wall_ms() : 0,
                            .hostname = slice_of(id->hostname), .machine_id = slice_of(id->machine_id),
                            .boot_id = slice_of(id->boot_id)};
    if (crypto_random(m.generation, sizeof m.generation) != 0 || msg_refresh_encode(out, &m) != 0)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    pthread_mutex_lock(&vm->lock);
    memcpy(vm->refresh_generation, m.generation, sizeof m.generation);
    vm->refreshed_came = false;
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

static int refresh_wait(struct vm *vm, const struct vm_identity *id, int timeout_ms, struct vm_refreshed *ret, struct err *err)
{
    const int64_t until = clock_mono_ms() + timeout_ms;
    pthread_mutex_lock(&vm->lock);
    bool in_time = true;
    while (!vm->refreshed_came && !vm->gone && in_time)
        in_time = wait_changed(vm, until);
    const bool came = vm->refreshed_came;
    *ret = vm->refreshed;
    pthread_mutex_unlock(&vm->lock);
    if (came && id->hostname)
        snprintf(vm->hostname, sizeof vm->hostname, "%s", id->hostname);
    if (came)
        return refresh_check(id, ret, err);
    if (!in_time)
        return err_set(err, ERR_TIMEOUT, "agent_refresh", "the agent did not renew the guest's identity in time");
    return err_set(err, ERR_TRANSPORT_FAILED, "vm_died", "the virtual machine ended before its agent answered");
}

int vm_refresh(struct vm *vm, const struct vm_identity *id, int timeout_ms, struct vm_refreshed *ret, struct err *err)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1024);
    if (!(vm->hello.features & MSG_FEATURE_REFRESH))
        return err_set(err, ERR_UNSUPPORTED_CAPABILITY, "agent_refresh", "the sandbox's agent is of an older version");
    if (refresh_prepare(vm, id, &b, err) != 0 || vm_send(vm, FRAME_REFRESH, vm_next_id(vm), &b, err) != 0)
        return -1;
    return refresh_wait(vm, id, timeout_ms, ret, err);
}

void vm_set_clock(struct vm *vm)
{
    uint8_t room[256];
    struct buf b = BUF_OVER(room);
    struct err err = {0};
    const struct msg_refresh m = {.wall_ms = clock_wall_ms()}; // a generation that nobody waits for
    if ((vm->hello.features & MSG_FEATURE_REFRESH) && msg_refresh_encode(&b, &m) == 0)
        (void)vm_send(vm, FRAME_REFRESH, vm_next_id(vm), &b, &err);
}

// The request goes out with the hello, so that the guest wakes once for all of it.
int vm_resume_as(struct vm *vm, const struct vm_identity *id, int64_t deadline_mono_ms, int timeout_ms,
                 struct vm_refreshed *ret, struct err *err)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1024), first = BUF_INIT(2048);
    uint8_t h[FRAME_HEADER_BYTES];
    if (refresh_prepare(vm, id, &b, err) != 0)
        return -1;
    frame_header(h, FRAME_REFRESH, 0, vm_next_id(vm), (uint32_t)b.len);
    if (!buf_add(&first, h, sizeof h) || !buf_add(&first, b.data, b.len))
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (begin_session(vm, &first, err) != 0 || vm_resume(vm, err) != 0 || !vm_wait_ready(vm, deadline_mono_ms, err))
        return -1;
    if (!(vm->hello.features & MSG_FEATURE_REFRESH))
        return err_set(err, ERR_UNSUPPORTED_CAPABILITY, "agent_refresh", "the sandbox's agent is of an older version");
    pthread_mutex_lock(&vm->lock);
    const bool again = vm->sessions > 1 && !vm->refreshed_came; // the hello that it came with was of another session
    pthread_mutex_unlock(&vm->lock);
    return again ? vm_refresh(vm, id, timeout_ms, ret, err) : refresh_wait(vm, id, timeout_ms, ret, err);
}

// ---- owner and priority ---------------------------------------------------------------------------------------------
struct rebind {
    struct vm *vm;
    const struct vm_callbacks *cb;
    void *arg;
    bool done;
};

static void rebind_now(void *arg)
{
    struct rebind *r = arg;
    r->vm->cb = r->cb;
    r->vm->arg = r->arg;
    if (r->vm->session_up) // the new owner has not seen it begin
        r->vm->cb->ready(r->vm->arg, &r->vm->hello);
    pthread_mutex_lock(&r->vm->lock);
    r->done = true;
    pthread_cond_broadcast(&r->vm->changed);
    pthread_mutex_unlock(&r->vm->lock);
}

void vm_rebind(struct vm *vm, const struct vm_callbacks *cb, void *arg)
{
    struct rebind r = {vm, cb, arg, false};
    if (loop_post(vm->loop, rebind_now, &r) != 0)
        return; // out of memory: the old owner stays, and answers with what it is
    pthread_mutex_lock(&vm->lock);
    while (!r.done)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
}

void vm_background(struct vm *vm, bool on)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", (int)vm->process.pid);
    DIR *d = opendir(path);
    if (!d)
        return;
    for (const struct dirent *e; (e = readdir(d));) {
        const long tid = strtol(e->d_name, NULL, 10);
        if (tid > 0)
            (void)setpriority(PRIO_PROCESS, (id_t)tid, on ? BACKGROUND_NICE : 0);
    }
    closedir(d);
}
