#include "qemu/host.h"

#include <errno.h>
#include <stdarg.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/crypto.h"
#include "base/fd.h"
#include "base/limits.h"

extern char **environ;

// ---- TSC --------------------------------------------------------------------------------------------------------
static uint64_t raw_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_RAW, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#if defined(__x86_64__)
// Both clocks at one moment: of several readings the one that took the fewest ticks, for one that was interrupted half way
// is milliseconds off. With four busy loops on two CPUs a single reading gave up to 2691 MHz for 2100; this one 2100 ± 0.
static void both_clocks(uint64_t *ns, uint64_t *ticks)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 32; i++) {
        const uint64_t before = __builtin_ia32_rdtsc(), now = raw_ns(), took = __builtin_ia32_rdtsc() - before;
        if (took >= best)
            continue;
        best = took;
        *ns = now;
        *ticks = before + took / 2;
    }
}

static unsigned measure_khz(void)
{
    uint64_t t0 = 0, c0 = 0, t1 = 0, c1 = 0;
    both_clocks(&t0, &c0);
    while (raw_ns() - t0 < 10 * 1000 * 1000) { }
    both_clocks(&t1, &c1);
    return (unsigned)((c1 - c0) * 1000000u / (t1 - t0));
}
#else
static unsigned measure_khz(void)
{
    return 0;
}
#endif

// /proc/cpuinfo's bogomips is twice the frequency the kernel calibrated. Where both agree within 1 %, it is the steadier.
unsigned host_tsc_khz(void)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    const unsigned measured = measure_khz();
    const char *at = fd_read_file(AT_FDCWD, "/proc/cpuinfo", &b) == 0 ? strstr(buf_text(&b), "bogomips") : NULL;
    at = at ? strchr(at, ':') : NULL;
    const unsigned told = at ? (unsigned)(strtod(at + 1, NULL) * 500) : 0;
    const unsigned apart = told > measured ? told - measured : measured - told;
    return told && apart < measured / 100 ? told : measured;
}

// ---- programs -----------------------------------------------------------------------------------------------------
static bool find_program(const char *name, char *out, size_t cap)
{
    static const char *const PLACES[] = {"/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin", "/sbin"};
    for (size_t i = 0; i < sizeof PLACES / sizeof *PLACES; i++) {
        snprintf(out, cap, "%s/%s", PLACES[i], name);
        if (access(out, X_OK) == 0)
            return true;
    }
    *out = 0;
    return false;
}

// Runs argv with its output in out (bounded). Exit status, or -1.
static int run(char *const argv[], char *out, size_t cap)
{
    int pipe_fds[2];
    posix_spawn_file_actions_t actions;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0)
        return -1;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], 1);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], 2);
    pid_t pid;
    const int failed = posix_spawn(&pid, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_fds[1]);
    size_t n = 0;
    char sink[512] = {0};
    for (ssize_t got = 1; !failed && got > 0;) {
        const bool room = n + 1 < cap;
        got = read(pipe_fds[0], room ? out + n : sink, room ? cap - 1 - n : sizeof sink);
        n += room && got > 0 ? (size_t)got : 0;
    }
    if (cap)
        out[n < cap ? n : cap - 1] = 0;
    close(pipe_fds[0]);
    int status = -1;
    while (!failed && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return !failed && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void look_at_qemu(struct host_facts *f, const char *given)
{
    char said[256];
    struct err err = {0};
    uint8_t hash[SHA256_BYTES];
    char real[PATH_MAX];
    if (given && strchr(given, '/'))
        snprintf(f->qemu_path, sizeof f->qemu_path, "%s", realpath(given, real) && strlen(real) < sizeof f->qemu_path ? real : given);
    else if (given)
        find_program(given, f->qemu_path, sizeof f->qemu_path);
    else
        find_program("qemu-system-x86_64", f->qemu_path, sizeof f->qemu_path);
    if (!*f->qemu_path)
        return;
    char *argv[] = {f->qemu_path, (char *)"--version", NULL};
    if (run(argv, said, sizeof said) != 0)
        return;
    const char *at = strstr(said, "version ");
    if (at)
        sscanf(at + 8, "%47[0-9.]", f->qemu_version);
    CLEANUP_FD int fd = open(f->qemu_path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && crypto_sha256_fd(fd, hash, NULL, &err) == 0)
        crypto_digest_text(hash, f->qemu_sha256);
}

// The namespaces and mounts of a launch, around `true`.
static void try_jail(struct host_facts *f)
{
    char said[160];
    if (!find_program("bwrap", f->bwrap_path, sizeof f->bwrap_path)) {
        snprintf(f->jail_reason, sizeof f->jail_reason, "bubblewrap is not installed");
        return;
    }
    char *argv[] = {f->bwrap_path, (char *)"--unshare-user", (char *)"--unshare-pid", (char *)"--unshare-net",
                    (char *)"--unshare-ipc", (char *)"--unshare-uts", (char *)"--as-pid-1", (char *)"--ro-bind",
                    (char *)"/usr", (char *)"/usr", (char *)"--symlink", (char *)"usr/lib", (char *)"/lib",
                    (char *)"--symlink", (char *)"usr/lib64", (char *)"/lib64", (char *)"--proc", (char *)"/proc",
                    (char *)"--dev", (char *)"/dev", (char *)"--", (char *)"/usr/bin/true", NULL};
    f->jail_works = run(argv, said, sizeof said) == 0;
    said[strcspn(said, "\n")] = 0;
    if (!f->jail_works)
        snprintf(f->jail_reason, sizeof f->jail_reason, "bubblewrap failed: %.120s", *said ? said : "no message");
}

static void look_at_cgroup(struct host_facts *f)
{
    struct stat st;
    if (stat("/sys/fs/cgroup/cgroup.controllers", &st) != 0)
        snprintf(f->cgroup_reason, sizeof f->cgroup_reason, "no cgroup v2 hierarchy is mounted");
    else
        snprintf(f->cgroup_reason, sizeof f->cgroup_reason, "cgroup v2 is there, but limits are not applied by this version");
}

static void look_at_cpu(struct host_facts *f)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4u << 20);
    uint8_t hash[SHA256_BYTES];
    struct sha256 *h = fd_read_file(AT_FDCWD, "/proc/cpuinfo", &b) == 0 ? sha256_new() : NULL;
    for (const char *line = buf_text(&b); h && *line && *line != '\n'; line += strcspn(line, "\n") + 1) // to the first blank one
        if (strncmp(line, "model name", 10) == 0 || strncmp(line, "flags", 5) == 0)
            sha256_update(h, line, strcspn(line, "\n"));
    if (h) {
        sha256_peek(h, hash);
        crypto_digest_text(hash, f->cpu_sha256);
    }
    sha256_free(h);
}

int host_facts_read(const char *qemu_path, struct host_facts *f, struct err *err)
{
    CLEANUP_BUF struct buf b = BUF_INIT(64);
    (void)err;
    memset(f, 0, sizeof *f);
    f->tsc_khz = host_tsc_khz();
    look_at_qemu(f, qemu_path);
    try_jail(f);
    look_at_cgroup(f);
    look_at_cpu(f);
    if (fd_read_file(AT_FDCWD, "/proc/sys/kernel/random/boot_id", &b) == 0)
        snprintf(f->boot_id, sizeof f->boot_id, "%.36s", buf_text(&b));
    f->is_root = geteuid() == 0;
    f->userns = f->jail_works;
    CLEANUP_FD int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    f->kvm_device = kvm >= 0;
    f->cpus = sysconf(_SC_NPROCESSORS_ONLN);
    f->memory_mib = sysconf(_SC_PHYS_PAGES) / 256 * (sysconf(_SC_PAGESIZE) / 4096);
    return 0;
}

// ---- checks -----------------------------------------------------------------------------------------------------
static void check(struct host_check *c, const char *name, int verdict, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static void check(struct host_check *c, const char *name, int verdict, const char *fmt, ...)
{
    va_list args;
    c->name = name;
    c->verdict = verdict;
    va_start(args, fmt);
    vsnprintf(c->text, sizeof c->text, fmt, args);
    va_end(args);
}

int host_checks(const struct host_facts *f, bool allow_emulation, struct host_check out[static HOST_CHECKS_MAX])
{
    int n = 0;
    char path[64];
    struct rlimit files = {0};
    if (*f->qemu_version)
        check(&out[n++], "qemu", HOST_OK, "QEMU %s", f->qemu_version);
    else
        check(&out[n++], "qemu", HOST_FAIL, "qemu-system-x86_64 cannot be run: install qemu-system-x86");
    if (f->jail_works)
        check(&out[n++], "jail", HOST_OK, "bubblewrap works with all namespaces");
    else
        check(&out[n++], "jail", HOST_FAIL,
              "%s: install bubblewrap and allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)",
              f->jail_reason);
    if (f->kvm_device)
        check(&out[n++], "kvm", HOST_OK, "/dev/kvm opens; whether a guest runs under it is probed by the server");
    else if (allow_emulation)
        check(&out[n++], "kvm", HOST_WARN, "no /dev/kvm: emulation (TCG) is used, which is no security boundary");
    else
        check(&out[n++], "kvm", HOST_FAIL,
              "no /dev/kvm that this user may open: enable virtualization and join the group kvm, or accept emulation, "
              "which is no security boundary, with --allow-emulation");
    if (find_program("mke2fs", path, sizeof path))
        check(&out[n++], "mke2fs", HOST_OK, "found");
    else
        check(&out[n++], "mke2fs", HOST_FAIL, "mke2fs makes the sandboxes' disks: install e2fsprogs");
    if (find_program("mmdebstrap", path, sizeof path) && find_program("mkfs.erofs", path, sizeof path))
        check(&out[n++], "image tools", HOST_OK, "mmdebstrap and mkfs.erofs found");
    else
        check(&out[n++], "image tools", HOST_WARN,
              "mmdebstrap or mkfs.erofs missing: images cannot be built here (install mmdebstrap erofs-utils)");
    check(&out[n++], "uids", f->is_root ? HOST_OK : HOST_WARN, "%s",
          f->is_root ? "each sandbox gets a host uid of its own"
                     : "not root: all sandboxes run under the server's uid, apart by namespaces only");
    check(&out[n++], "cgroup", HOST_WARN, "%s: memory and CPU of QEMU are bounded by its arguments alone", f->cgroup_reason);
    getrlimit(RLIMIT_NOFILE, &files);
    check(&out[n++], "descriptors", files.rlim_max >= 4096 ? HOST_OK : HOST_WARN,
          "RLIMIT_NOFILE %llu (hard %llu): about %llu connections", (unsigned long long)files.rlim_cur,
          (unsigned long long)files.rlim_max, (unsigned long long)(files.rlim_max > 512 ? files.rlim_max - 512 : 0));
    check(&out[n++], "tsc", f->tsc_khz ? HOST_OK : HOST_FAIL, "%u kHz", f->tsc_khz);
    check(&out[n++], "host", HOST_OK, "%ld CPUs, %ld MiB of memory", f->cpus, f->memory_mib);
    return n;
}
