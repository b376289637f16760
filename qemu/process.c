#include "qemu/process.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"

// Numbers inside the jail. Everything above is closed before exec.
enum { FD_KERNEL = 10, FD_INITRD, FD_ROOT, FD_DISK, FD_CONTROL, FD_BULK, FD_QMP, FD_CONSOLE, FD_DISK_READ, FD_RAM, FD_INFO,
       FD_QEMU, FD_END };
#define FD_ABOVE 64
#define INFO_TIMEOUT_MS 10000

static int pidfd_open_(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

static bool ended(int pidfd, int timeout_ms)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    int n;
    do
        n = poll(&p, 1, timeout_ms);
    while (n < 0 && errno == EINTR);
    return n > 0;
}

static int read_proc(pid_t pid, const char *name, struct buf *out)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return fd_read_file(AT_FDCWD, path, out);
}

// Of a look that failed: whether that says nothing of the process. (Else it is gone: a big answer is none of ours either.)
static bool cannot_tell(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM || error == EAGAIN;
}

uint64_t process_start_time(pid_t pid)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    if (pid <= 0 || read_proc(pid, "stat", &b) != 0)
        return 0;
    const char *at = strrchr(buf_text(&b), ')'); // the name before may hold anything
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at + 1, NULL, 10) : 0;
}

// Our QEMU and its bubblewrap both have `-name\0ID\0` in their command lines.
// 1 it has, 0 it has not, -1 with errno: the host had nothing left to look with.
static int names(pid_t pid, const char *id)
{
    char wanted[64];
    CLEANUP_BUF struct buf b = BUF_INIT(65536);
    const int n = snprintf(wanted, sizeof wanted, "-name%c%s", 0, id);
    if (read_proc(pid, "cmdline", &b) != 0)
        return cannot_tell(errno) ? -1 : 0;
    return b.len > 0 && memmem(b.data, b.len, wanted, (size_t)n + 1) != NULL;
}

// ---- starting -----------------------------------------------------------------------------------------------------
static const struct {
    int resource;
    rlim_t most;
} LIMITS[] = {
    {RLIMIT_CORE, 0},
    {RLIMIT_NOFILE, 256},
    {RLIMIT_MEMLOCK, 64 << 10},
    {RLIMIT_MSGQUEUE, 0},
};
#define LIMIT_PROCESSES 256 // per jail uid: QEMU's threads

struct child {
    const struct vm_spec *spec;
    char *const *argv;
    int wanted[FD_END];  // by number inside the jail; -1: none
    int stderr_fd, null_fd;
    int report_fd;       // errno when something before exec fails
};

// Moves every wanted descriptor out of the way, then to its place, then closes the rest.
static int place_fds(struct child *c)
{
    if (dup2(c->null_fd, 0) < 0 || dup2(c->null_fd, 1) < 0 || dup2(c->stderr_fd, 2) < 0)
        return -1;
    for (int i = FD_KERNEL; i < FD_END; i++)
        if (c->wanted[i] >= 0 && (c->wanted[i] = fcntl(c->wanted[i], F_DUPFD, FD_ABOVE)) < 0)
            return -1;
    const int report = fcntl(c->report_fd, F_DUPFD_CLOEXEC, FD_ABOVE);
    if (report < 0)
        return -1;
    c->report_fd = report;
    for (int i = FD_KERNEL; i < FD_END; i++)
        if (c->wanted[i] >= 0 && dup2(c->wanted[i], i) < 0)
            return -1;
    for (int fd = 3; fd < FD_KERNEL; fd++)
        close(fd);
    if (dup2(report, FD_END) < 0 || fcntl(FD_END, F_SETFD, FD_CLOEXEC) != 0)
        return -1;
    c->report_fd = FD_END;
    return (int)syscall(SYS_close_range, FD_END + 1, ~0u, 0);
}

static int become(const struct child *c)
{
    for (size_t i = 0; i < sizeof LIMITS / sizeof *LIMITS; i++) {
        const struct rlimit r = {LIMITS[i].most, LIMITS[i].most};
        if (setrlimit(LIMITS[i].resource, &r) != 0)
            return -1;
    }
    const uid_t uid = c->spec->jail_uid;
    if (uid == 0)
        return 0;
    const struct rlimit processes = {LIMIT_PROCESSES, LIMIT_PROCESSES};
    if (setrlimit(RLIMIT_NPROC, &processes) != 0)
        return -1;
    struct stat kvm;
    gid_t group = 0; // of /dev/kvm, where the host gives it to a group
    const bool with_kvm = c->spec->accel == VM_ACCEL_KVM && stat("/dev/kvm", &kvm) == 0 && (kvm.st_mode & 0060) == 0060;
    if (with_kvm)
        group = kvm.st_gid;
    if (setgroups(with_kvm ? 1 : 0, &group) != 0 || setresgid(uid, uid, uid) != 0 || setresuid(uid, uid, uid) != 0)
        return -1;
    return getuid() == uid && geteuid() == uid && getgid() == uid ? 0 : (errno = EPERM, -1);
}

static void write_small(const char *path, const char *text)
{
    const int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        (void)!write(fd, text, strlen(text));
        close(fd);
    }
}

static void __attribute__((noreturn)) run_child(struct child *c)
{
    char path[] = "PATH=/usr/bin:/bin", *no_env[] = {path, NULL};
    sigset_t none;
    sigemptyset(&none);
    for (int s = 1; s < 32; s++)
        signal(s, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    write_small("/proc/self/oom_score_adj", "500"); // a guest goes before the server
    // QEMU asks for huge pages for its translation buffer and for tables of a few pages: under emulation 2 MB at a time are
    // dirty that nobody uses, in every fork. Inherited over exec (prctl(2)).
    if (c->spec->accel == VM_ACCEL_TCG)
        (void)prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    if (c->spec->background)
        (void)setpriority(PRIO_PROCESS, 0, 19); // best effort
    if (setsid() < 0 || chdir("/") != 0 || place_fds(c) != 0 || become(c) != 0)
        goto failed;
    umask(077);
    execve("/usr/bin/bwrap", c->argv, no_env);
    execve("/bin/bwrap", c->argv, no_env);
failed:;
    const int code = errno;
    (void)!write(c->report_fd, &code, sizeof code);
    _exit(127);
}

static int stderr_memory(struct err *err)
{
    CLEANUP_FD int fd = memfd_create("qemu-stderr", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, PROCESS_STDERR_BYTES) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) != 0)
        return err_sys(err, errno, "making QEMU's error file");
    return fd_steal(&fd);
}

// bubblewrap says {"child-pid": N, … } once the namespaces are up, in several writes: all of it is read, because it dies of
// a closed pipe in between and leaves its child behind.
static pid_t read_info(int fd, int outer_pidfd)
{
    char text[1024];
    size_t n = 0;
    const int64_t until = clock_mono_ms() + INFO_TIMEOUT_MS;
    while (n < sizeof text - 1) {
        struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = outer_pidfd, .events = POLLIN}};
        const int64_t left = until - clock_mono_ms();
        if (left <= 0 || poll(p, 2, (int)left) == 0)
            return -1;
        const ssize_t got = p[0].revents ? read(fd, text + n, sizeof text - 1 - n) : 0;
        if (got <= 0)
            return -1;
        n += (size_t)got;
        text[n] = 0;
        const char *at = strstr(text, "\"child-pid\":");
        if (at && strchr(at, '}'))
            return (pid_t)strtol(at + 12, NULL, 10);
    }
    return -1;
}

// QEMU can have ended before it could be looked at. Its bubblewrap, which ends with it and is not reaped yet, stands for it
// then: how it ended is told where the end of any other is.
static int hold(struct process *p, struct err *err)
{
    errno = 0;
    p->start = process_start_time(p->pid);
    p->pidfd = p->start ? pidfd_open_(p->pid) : -1;
    if (p->pidfd >= 0)
        return 0;
    if (cannot_tell(errno))
        return err_sys(err, errno, "looking at QEMU");
    p->pid = p->outer;
    p->start = p->outer_start;
    p->pidfd = fcntl(p->outer_pidfd, F_DUPFD_CLOEXEC, 0);
    return p->pidfd >= 0 ? 0 : err_sys(err, errno, "looking at QEMU");
}

static int explain(struct process *p, int report_fd, struct err *err)
{
    int code = 0;
    if (read(report_fd, &code, sizeof code) == (ssize_t)sizeof code) {
        if (code == ENOENT) {
            err_set(err, ERR_UNSUPPORTED_CAPABILITY, "bubblewrap", "bubblewrap is not installed on this host");
            return err_remedy(err, "install bubblewrap; airlock doctor lists what is missing");
        }
        return err_sys(err, code, "starting the jail");
    }
    char said[200] = "";
    const ssize_t n = pread(p->stderr_fd, said, sizeof said - 1, 0);
    said[n > 0 ? strnlen(said, (size_t)n) : 0] = 0;
    err_set(err, ERR_UNSUPPORTED_CAPABILITY, "jail", "the jail cannot be built on this host");
    snprintf(err->internal, sizeof err->internal, "bwrap: %s", said);
    return err_remedy(err, "run airlock doctor; user namespaces must be allowed");
}

static int start_in_jail(const struct vm_spec *spec, struct child *c, struct process *p, struct err *err)
{
    int info[2] = {-1, -1}, report[2] = {-1, -1};
    if (pipe2(info, O_CLOEXEC) != 0 || pipe2(report, O_CLOEXEC) != 0) {
        const int code = errno;
        fd_close(&info[0]);
        fd_close(&info[1]);
        return err_sys(err, code, "starting QEMU");
    }
    c->wanted[FD_INFO] = info[1];
    c->report_fd = report[1];
    p->outer = fork();
    if (p->outer == 0)
        run_child(c);
    const int fork_code = errno;
    fd_close(&info[1]);
    fd_close(&report[1]);
    int failed = p->outer < 0 ? err_sys(err, fork_code, "fork") : 0;
    if (!failed) {
        p->ours = true;
        p->outer_start = process_start_time(p->outer);
        p->outer_pidfd = pidfd_open_(p->outer);
        p->pid = read_info(info[0], p->outer_pidfd);
        failed = p->pid > 0 ? hold(p, err) : explain(p, report[0], err);
    }
    fd_close(&info[0]);
    fd_close(&report[0]);
    (void)spec;
    return failed;
}

// Whether a user that owns nothing can run the file: every directory on the way, and the file, are open to all.
static bool reachable(const char *path, uid_t uid)
{
    char at[PATH_MAX];
    struct stat st;
    if (uid == 0)
        return true;
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(at, sizeof at, "%.*s", (int)(slash - path), path);
        if (stat(at, &st) != 0 || !(st.st_mode & S_IXOTH))
            return false;
    }
    return stat(path, &st) == 0 && (st.st_mode & S_IROTH) && (st.st_mode & S_IXOTH);
}

int process_start(const struct vm_spec *spec, const struct process_fds *fds, struct process *ret, struct err *err)
{
    const struct argv_fds inside = {.kernel = FD_KERNEL, .initrd = FD_INITRD, .root = fds->root >= 0 ? FD_ROOT : -1,
                                    .disk = fds->disk >= 0 ? FD_DISK : -1, .control = FD_CONTROL, .bulk = FD_BULK,
                                    .qmp = FD_QMP, .console = FD_CONSOLE,
                                    .disk_read = fds->disk >= 0 ? FD_DISK_READ : -1,
                                    .ram = fds->ram >= 0 ? FD_RAM : -1};
    struct argv jail = {0}, qemu = {0};
    *ret = (struct process){.outer = -1, .pid = -1, .outer_pidfd = -1, .pidfd = -1, .stderr_fd = -1, .uid = spec->jail_uid};
    CLEANUP_FD int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    ret->stderr_fd = stderr_memory(err);
    if (ret->stderr_fd < 0)
        return -1;
    const bool copied = argv_qemu_is_foreign(spec) && !reachable(spec->qemu_path, spec->jail_uid);
    CLEANUP_FD int qemu_fd = copied ? open(spec->qemu_path, O_RDONLY | O_CLOEXEC) : -1;
    if (copied && qemu_fd < 0)
        return err_sys(err, errno, "opening QEMU");
    char **words = NULL;
    int failed = 0;
    if (null_fd < 0 || argv_jail(spec, FD_INFO, copied ? FD_QEMU : -1, &jail) != 0 || argv_qemu(spec, &inside, &qemu) != 0 ||
        !(words = calloc(jail.n + qemu.n + 1, sizeof *words))) {
        failed = err_sys(err, ENOMEM, "preparing QEMU");
    } else {
        memcpy(words, jail.words, jail.n * sizeof *words);
        memcpy(words + jail.n, qemu.words, qemu.n * sizeof *words);
        struct child c = {.spec = spec, .argv = words, .stderr_fd = ret->stderr_fd, .null_fd = null_fd};
        for (int i = 0; i < FD_END; i++)
            c.wanted[i] = -1;
        const int wanted[] = {fds->kernel, fds->initrd, fds->root, fds->disk, fds->control, fds->bulk, fds->qmp, fds->console,
                              fds->disk_read, fds->ram};
        memcpy(c.wanted + FD_KERNEL, wanted, sizeof wanted);
        c.wanted[FD_QEMU] = qemu_fd;
        failed = start_in_jail(spec, &c, ret, err);
    }
    free(words);
    argv_free(&jail);
    argv_free(&qemu);
    if (failed) {
        if (ret->outer > 0)
            (void)process_end(ret, 2000);
        process_close(ret);
    }
    return failed;
}

// ---- identity -----------------------------------------------------------------------------------------------------
// 0: *ret_fd is its pidfd; 1: gone; -1 with errno: cannot be told.
static int open_same(pid_t pid, uint64_t start, const char *id, int *ret_fd)
{
    CLEANUP_FD int fd = pid > 0 ? pidfd_open_(pid) : -1;
    if (fd < 0)
        return pid > 0 && cannot_tell(errno) ? -1 : 1;
    // Looked at after the pidfd is held: what is true now stays true of what it names.
    errno = 0;
    const uint64_t found = process_start_time(pid);
    if (found == 0 && cannot_tell(errno))
        return -1;
    const int named = found == start ? names(pid, id) : 0;
    if (named < 0)
        return -1;
    if (!named || ended(fd, 0))
        return 1;
    *ret_fd = fd_steal(&fd);
    return 0;
}

int process_open(pid_t outer, uint64_t outer_start, pid_t pid, uint64_t start, const char *id, struct process *ret)
{
    *ret = (struct process){.outer = outer, .pid = pid, .outer_start = outer_start, .start = start, .outer_pidfd = -1,
                            .pidfd = -1, .stderr_fd = -1};
    const int there = open_same(pid, start, id, &ret->pidfd);
    if (there != 0 || open_same(outer, outer_start, id, &ret->outer_pidfd) >= 0) // one without its jail is still ours
        return there;
    const int why = errno;
    fd_close(&ret->pidfd);
    errno = why;
    return -1;
}

// ---- ending -------------------------------------------------------------------------------------------------------
static void kill_fd(int pidfd)
{
    if (pidfd >= 0)
        (void)syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
}

void process_kill(const struct process *p)
{
    kill_fd(p->pidfd);
}

static void reap(struct process *p)
{
    int status;
    if (p->ours && p->outer > 0 && waitpid(p->outer, &status, WNOHANG) == p->outer)
        p->ours = false;
}

int process_end(struct process *p, int timeout_ms)
{
    const int64_t until = clock_mono_ms() + timeout_ms;
    kill_fd(p->pidfd);
    if (p->pidfd >= 0 && !ended(p->pidfd, timeout_ms))
        return -1;
    if (p->outer_pidfd >= 0) { // it ends by itself when its child has
        const int64_t left = until - clock_mono_ms();
        if (p->pidfd < 0 || !ended(p->outer_pidfd, left > 1000 ? 1000 : left > 0 ? (int)left : 0))
            kill_fd(p->outer_pidfd);
        if (!ended(p->outer_pidfd, 1000))
            return -1;
    }
    reap(p);
    return 0;
}

int process_exit_status(struct process *p)
{
    int status;
    if (!p->ours || waitpid(p->outer, &status, WNOHANG) != p->outer)
        return -1;
    p->ours = false;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void process_close(struct process *p)
{
    fd_close(&p->outer_pidfd);
    fd_close(&p->pidfd);
    fd_close(&p->stderr_fd);
}

// Number found; *left of them are still alive, *all goes false when some could not be looked at.
static int end_named_once(const char *id, int timeout_ms, int *left, bool *all)
{
    DIR *d = opendir("/proc");
    int found = 0;
    *left = 0;
    if (!d) {
        *all = false;
        return 0;
    }
    for (const struct dirent *e; (e = readdir(d));) {
        const pid_t pid = (pid_t)strtol(e->d_name, NULL, 10);
        const int named = pid <= 1 || pid == getpid() ? 0 : names(pid, id);
        const int fd = named > 0 ? pidfd_open_(pid) : -1;
        if (named < 0 || (named > 0 && fd < 0 && cannot_tell(errno)))
            *all = false;
        if (fd < 0)
            continue;
        found++;
        if (names(pid, id) > 0)
            kill_fd(fd);
        *left += !ended(fd, timeout_ms);
        close(fd);
    }
    closedir(d);
    return found;
}

int process_end_named(const char *id, int timeout_ms)
{
    int left = 0;
    bool all = true;
    // Again while there are some: a bubblewrap may have made its child behind the look, and a child may have been in exec.
    for (int pass = 0; pass < 5 && end_named_once(id, timeout_ms, &left, &all) > 0 && left == 0 && all; pass++)
        ;
    return all ? left : -1;
}

// ---- what is in force -----------------------------------------------------------------------------------------------
static void status_word(json_t *out, const char *key, const char *status, const char *field)
{
    char wanted[40], word[64] = "";
    snprintf(wanted, sizeof wanted, "\n%s:\t", field);
    const char *at = strstr(status, wanted);
    if (at)
        sscanf(at + strlen(wanted), "%63s", word);
    json_put_str(out, key, at ? word : NULL);
}

static json_t *own_namespaces(pid_t pid)
{
    static const char *const KINDS[] = {"user", "mnt", "pid", "net", "ipc", "uts", "cgroup"};
    json_t *list = json_array();
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        char path[64], theirs[64] = "", ours[64] = "";
        snprintf(path, sizeof path, "/proc/%d/ns/%s", (int)pid, KINDS[i]);
        ssize_t n = readlink(path, theirs, sizeof theirs - 1);
        snprintf(path, sizeof path, "/proc/self/ns/%s", KINDS[i]);
        ssize_t m = readlink(path, ours, sizeof ours - 1);
        if (n > 0 && m > 0 && strcmp(theirs, ours) != 0)
            json_array_append_new(list, json_string(KINDS[i]));
    }
    return list;
}

static json_t *limits_of(pid_t pid)
{
    static const struct {
        const char *key, *line;
    } WANTED[] = {{"nofile", "Max open files"}, {"nproc", "Max processes"}, {"core", "Max core file size"}};
    CLEANUP_BUF struct buf b = BUF_INIT(8192);
    json_t *o = json_object();
    if (read_proc(pid, "limits", &b) != 0)
        return o;
    for (size_t i = 0; i < sizeof WANTED / sizeof *WANTED; i++) {
        const char *at = strstr(buf_text(&b), WANTED[i].line);
        char word[32] = "";
        if (at && sscanf(at + strlen(WANTED[i].line), "%31s", word) == 1)
            json_put_str(o, WANTED[i].key, word);
    }
    return o;
}

json_t *process_isolation(const struct process *p)
{
    CLEANUP_BUF struct buf b = BUF_INIT(16384);
    json_t *o = json_object();
    const int failed = read_proc(p->pid, "status", &b);
    const char *status = buf_text(&b);
    json_put(o, "bubblewrap", json_true());
    status_word(o, "uid", failed ? "" : status, "Uid");
    status_word(o, "seccomp", failed ? "" : status, "Seccomp"); // 2: filter
    status_word(o, "no_new_privs", failed ? "" : status, "NoNewPrivs");
    status_word(o, "capabilities", failed ? "" : status, "CapEff");
    json_put(o, "namespaces", own_namespaces(p->pid));
    json_put(o, "rlimits", limits_of(p->pid));
    json_put(o, "cgroup", json_null());
    return o;
}

void process_usage(const struct process *p, uint64_t *ret_cpu_ms, uint64_t *ret_rss_bytes)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096), m = BUF_INIT(256);
    unsigned long long user = 0, system = 0, rss = 0;
    *ret_cpu_ms = *ret_rss_bytes = 0;
    if (p->pid <= 0 || read_proc(p->pid, "stat", &b) != 0 || read_proc(p->pid, "statm", &m) != 0)
        return;
    const char *at = strrchr(buf_text(&b), ')');
    if (at && sscanf(at + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user, &system) == 2)
        *ret_cpu_ms = (user + system) * 1000 / (unsigned long long)sysconf(_SC_CLK_TCK);
    if (sscanf(buf_text(&m), "%*u %llu", &rss) == 1)
        *ret_rss_bytes = rss * (unsigned long long)sysconf(_SC_PAGESIZE);
}
