#include "qemu/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "qemu/host.h"

#define CACHE "accel.json"
#define DIR_NAME "probe"
#define CANCEL_LOOK_MS 200

// ---- the kept verdict -------------------------------------------------------------------------------------------------
struct key {
    char boot_id[48], qemu[80];
    const char *kernel;
};

static void key_fill(struct key *k, const struct vm_spec *spec, const char *kernel_digest)
{
    CLEANUP_BUF struct buf b = BUF_INIT(64);
    struct stat st;
    const char *qemu = spec->qemu_path ? spec->qemu_path : "/usr/bin/qemu-system-x86_64";
    memset(k, 0, sizeof *k);
    if (fd_read_file(AT_FDCWD, "/proc/sys/kernel/random/boot_id", &b) == 0)
        snprintf(k->boot_id, sizeof k->boot_id, "%.36s", buf_text(&b));
    if (stat(qemu, &st) == 0) // the build: the same file, unchanged
        snprintf(k->qemu, sizeof k->qemu, "%llu-%lld-%lld", (unsigned long long)st.st_ino, (long long)st.st_size,
                 (long long)st.st_mtime);
    k->kernel = kernel_digest;
}

static bool equal(const json_t *o, const char *name, const char *value)
{
    const char *have = json_get_str(o, name);
    return have && strcmp(have, value) == 0;
}

static bool cached(int dirfd, const struct key *k, struct probe_verdict *ret)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    if (fd_read_file(dirfd, CACHE, &b) != 0)
        return false;
    CLEANUP_JSON json_t *o = json_parse_strict(buf_text(&b), b.len, NULL);
    const char *reason = json_get_str(o, "reason");
    if (!o || !reason || !equal(o, "boot_id", k->boot_id) || !equal(o, "qemu", k->qemu) || !equal(o, "kernel", k->kernel))
        return false;
    ret->kvm_usable = json_is_true(json_object_get(o, "kvm_usable"));
    ret->probed_at_ms = json_get_int(o, "probed_at_ms", 0);
    ret->from_cache = true;
    snprintf(ret->reason, sizeof ret->reason, "%s", reason);
    return true;
}

static void keep(int dirfd, const struct key *k, const struct probe_verdict *v)
{
    CLEANUP_JSON json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:b, s:I}", "boot_id", k->boot_id, "qemu", k->qemu, "kernel",
                                       k->kernel, "reason", v->reason, "kvm_usable", v->kvm_usable, "probed_at_ms",
                                       (json_int_t)v->probed_at_ms);
    CLEANUP_FREE char *text = o ? json_dumps(o, JSON_INDENT(2)) : NULL;
    if (text)
        (void)fd_write_file_atomic(dirfd, CACHE, text, strlen(text), 0600);
}

// ---- the boot -----------------------------------------------------------------------------------------------------
// A guest without disks reaches its agent's hello and says that it has no root: that is the proof.
struct proof {
    pthread_mutex_t lock;
    bool said_fatal;
};

static void no_ready(void *arg, const struct vm_hello *h) { (void)arg, (void)h; }
static void no_command(void *arg, int t, uint64_t id, const struct msg_command *m) { (void)arg, (void)t, (void)id, (void)m; }
static void no_output(void *arg, uint64_t id, const struct msg_data *d) { (void)arg, (void)id, (void)d; }
static void no_offset(void *arg, uint64_t id, uint64_t o) { (void)arg, (void)id, (void)o; }
static void no_info(void *arg, uint64_t id, const struct msg_file_result *r) { (void)arg, (void)id, (void)r; }
static void no_data(void *arg, uint64_t id, const struct msg_data *d, bool l) { (void)arg, (void)id, (void)d, (void)l; }
static void no_result(void *arg, uint64_t id, const struct msg_file_result *r, bool l) { (void)arg, (void)id, (void)r, (void)l; }
static void no_console(void *arg, const uint8_t *d, size_t n, uint64_t x) { (void)arg, (void)d, (void)n, (void)x; }
static void no_text(void *arg, const char *t, size_t n) { (void)arg, (void)t, (void)n; }
static void no_session(void *arg, bool m, bool l) { (void)arg, (void)m, (void)l; }
static void no_io(void *arg, bool p) { (void)arg, (void)p; }
static void no_gone(void *arg, enum vm_gone h, const char *d) { (void)arg, (void)h, (void)d; }

static void on_fatal(void *arg, const char *text, size_t len)
{
    struct proof *p = arg;
    (void)text, (void)len;
    pthread_mutex_lock(&p->lock);
    p->said_fatal = true;
    pthread_mutex_unlock(&p->lock);
}

static const struct vm_callbacks CALLBACKS = {
    no_ready, no_command, no_output, no_offset, no_info, no_data, no_offset, no_result,
    no_console, no_text, no_text, on_fatal, no_session, no_io, no_gone,
};

enum outcome {
    NOT_LAUNCHED, // which says nothing about KVM
    ENDED_EARLY,
    KNOWN,
    LEFT,         // its processes could not be ended
};

// Looks at *cancelled as well: probe_end finds no processes that are still to be launched, nor those that are just in exec.
static bool wait_ready(struct vm *vm, int64_t until, const atomic_bool *cancelled, struct err *err)
{
    bool ready = false, again = true;
    while (again && !atomic_load(cancelled)) {
        const int64_t now = clock_mono_ms();
        memset(err, 0, sizeof *err);
        ready = vm_wait_ready(vm, until - now > CANCEL_LOOK_MS ? now + CANCEL_LOOK_MS : until, err);
        again = !ready && err->kind == ERR_TIMEOUT && clock_mono_ms() < until;
    }
    return ready;
}

static enum outcome boot(const struct vm_spec *spec, struct loop *loop, int timeout_ms, const atomic_bool *cancelled,
                         struct probe_verdict *ret)
{
    struct err err = {0};
    bool left = false;
    struct proof proof = {.lock = PTHREAD_MUTEX_INITIALIZER};
    const int64_t start = clock_mono_ms();
    struct vm *vm = vm_launch(spec, loop, &CALLBACKS, &proof, &err);
    const bool ready = vm && wait_ready(vm, start + timeout_ms, cancelled, &err);
    if (vm) {
        struct err ignored = {0};
        left = vm_end(vm, &ignored) != 0;
        vm_free(vm);
    }
    ret->kvm_usable = ready || proof.said_fatal;
    if (ret->kvm_usable)
        snprintf(ret->reason, sizeof ret->reason, "a guest reached its agent in %lld ms",
                 (long long)(clock_mono_ms() - start));
    else if (err.kind == ERR_TIMEOUT)
        snprintf(ret->reason, sizeof ret->reason, "/dev/kvm opens, but a guest did not reach its agent within %d s",
                 timeout_ms / 1000);
    else
        snprintf(ret->reason, sizeof ret->reason, "%.150s", err.detail);
    return left ? LEFT : !vm ? NOT_LAUNCHED : ret->kvm_usable || err.kind == ERR_TIMEOUT ? KNOWN : ENDED_EARLY;
}

// Its name is of this run directory alone: servers beside each other end none but their own.
static void name_of(int run_parent_dirfd, char out[64])
{
    struct stat st = {0};
    (void)fstat(run_parent_dirfd, &st);
    snprintf(out, 64, "probe-%llx-%llx", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
}

int probe_end(int run_parent_dirfd, bool tidy, struct err *err)
{
    char id[64];
    struct stat st;
    if (fstatat(run_parent_dirfd, DIR_NAME, &st, AT_SYMLINK_NOFOLLOW) != 0 && errno == ENOENT)
        return 0;
    name_of(run_parent_dirfd, id);
    if (vm_end_stray(NULL, id, NULL, err) != 0)
        return -1;
    if (tidy && fd_remove_tree(run_parent_dirfd, DIR_NAME, NULL) != 0)
        return err_set(err, ERR_CLEANUP_FAILED, "probe", "the probe's directory cannot be removed");
    return 0;
}

static int stopping(struct err *err)
{
    return err_set(err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
}

int probe_kvm(int state_dirfd, int run_parent_dirfd, const struct vm_spec *spec, const char *kernel_digest,
              int timeout_ms, const atomic_bool *cancelled, struct probe_verdict *ret, struct err *err)
{
    char id[64];
    struct key key;
    key_fill(&key, spec, kernel_digest);
    memset(ret, 0, sizeof *ret);
    if (cached(state_dirfd, &key, ret))
        return 0;
    if (atomic_load(cancelled))
        return stopping(err);
    if (probe_end(run_parent_dirfd, true, err) != 0)
        return -1;
    struct loop *loop = loop_new(err); // its own: a hanging probe is nobody else's business
    if (!loop || loop_start(loop, "probe", err) != 0) {
        loop_free(loop);
        return -1;
    }
    CLEANUP_FD int dir = mkdirat(run_parent_dirfd, DIR_NAME, 0700) == 0
                             ? openat(run_parent_dirfd, DIR_NAME, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
                             : -1;
    if (dir < 0) {
        const int code = errno;
        loop_free(loop);
        return err_sys(err, code, "making the probe's directory");
    }
    struct vm_spec own = *spec;
    name_of(run_parent_dirfd, id);
    own.id = id;
    own.run_dirfd = dir;
    const enum outcome outcome = boot(&own, loop, timeout_ms, cancelled, ret);
    ret->probed_at_ms = clock_wall_ms();
    loop_free(loop);
    if (outcome != LEFT)
        (void)fd_remove_tree(run_parent_dirfd, DIR_NAME, NULL);
    if (atomic_load(cancelled)) // whatever it says may be of probe_end's making
        return stopping(err);
    if (outcome == KNOWN)
        keep(state_dirfd, &key, ret);
    return 0;
}
