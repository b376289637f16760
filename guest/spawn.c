// Starting a command: vfork, so that the cost is that of exec alone. In the child only system calls: credentials are
// set by the raw calls, because the C library's wrappers would wait for the agent's other threads.
#include "guest/agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void __attribute__((noreturn)) fail(struct spawn *s, int stage)
{
    s->stage = stage;
    s->err = errno;
    _exit(127);
}

static void become(struct spawn *s)
{
    const struct user *u = s->user;
    if (syscall(SYS_setgroups, u->n_groups, u->groups) != 0 || syscall(SYS_setresgid, u->gid, u->gid, u->gid) != 0 ||
        syscall(SYS_setresuid, u->uid, u->uid, u->uid) != 0)
        fail(s, MSG_SPAWN_USER);
}

static void enter(struct spawn *s)
{
    if (s->write_dir && s->make_dir && fileop_make_dirs(s->write_dir) == MSG_FILE_OUTSIDE_ROOTS) {
        errno = EACCES;
        fail(s, MSG_SPAWN_ROOTS);
    }
    if (chdir(s->cwd) != 0)
        fail(s, MSG_SPAWN_CWD);
    if (!s->write_dir)
        return;
    const int fd = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    errno = EACCES;
    if (fd < 0 || fileop_dir_allowed(fd) != MSG_FILE_OK)
        fail(s, MSG_SPAWN_ROOTS);
}

// execvp, without its memory: each place in turn, as a shell does it.
static void search(struct spawn *s, char *path, size_t cap)
{
    int best = ENOENT;
    if (strchr(s->argv[0], '/')) {
        execve(s->argv[0], s->argv, s->envp);
        return;
    }
    for (const char *at = s->path; at;) {
        const char *colon = strchr(at, ':');
        const size_t n = colon ? (size_t)(colon - at) : strlen(at);
        const size_t name = strlen(s->argv[0]);
        if (n + name + 2 < cap) {
            memcpy(path, at, n);
            path[n] = '/';
            memcpy(path + n + (n > 0), s->argv[0], name + 1);
            if (access(path, F_OK) == 0) // a failed exec has built a memory image before it looks
                execve(path, s->argv, s->envp);
            if (errno != ENOENT && errno != ENOTDIR)
                best = errno;
            if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
                break;
        }
        at = colon ? colon + 1 : NULL;
    }
    errno = best;
}

static void __attribute__((noreturn)) child(struct spawn *s, char *path, size_t cap)
{
    static const int RESET[] = {SIGPIPE, SIGCHLD, SIGINT, SIGTERM, SIGHUP};
    const struct sigaction plain = {.sa_handler = SIG_DFL};
    const struct rlimit files = {1024, 524288}, core = {0, 0};
    sigset_t none;
    for (size_t i = 0; i < sizeof RESET / sizeof *RESET; i++)
        sigaction(RESET[i], &plain, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    if (dup2(s->stdin_fd, 0) < 0 || dup2(s->stdout_fd, 1) < 0 || dup2(s->stderr_fd, 2) < 0)
        fail(s, MSG_SPAWN_SYSTEM);
    syscall(SYS_close_range, 3u, ~0u, 4u /* CLOSE_RANGE_CLOEXEC */);
    syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &files, NULL);
    syscall(SYS_prlimit64, 0, RLIMIT_CORE, &core, NULL);
    umask(022);
    become(s);
    enter(s);
    search(s, path, cap);
    fail(s, MSG_SPAWN_EXEC);
}

pid_t spawn_run(struct spawn *s)
{
    static char path[LIMIT_PATH_BYTES + 512]; // main thread only
    sigset_t all, old;
    s->stage = MSG_SPAWN_OK;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &old);
    const pid_t pid = vfork();
    if (pid == 0)
        child(s, path, sizeof path);
    const int code = errno;
    sigprocmask(SIG_SETMASK, &old, NULL);
    if (pid < 0) {
        s->stage = MSG_SPAWN_SYSTEM;
        s->err = code;
        return -1;
    }
    return pid; // with stage set: it has ended already, and is reaped as usual
}

// ---- pipes ---------------------------------------------------------------------------------------------------------
static int null_fd = -1; // what a command without stdin reads; kept

void spawn_pipes_close(int fds[3])
{
    for (int i = 0; i < 3; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

bool spawn_pipes(struct spawn_pipes *p, bool has_stdin)
{
    int pair[2];
    for (int i = 0; i < 3; i++)
        p->ours[i] = p->theirs[i] = -1;
    for (int i = 0; i < 3; i++) {
        if (i == 0 && !has_stdin) {
            if (null_fd < 0 && (null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
                return false;
            continue;
        }
        if (pipe2(pair, O_CLOEXEC) != 0)
            return false;
        p->ours[i] = pair[i == 0];
        p->theirs[i] = pair[i != 0];
        fcntl(p->ours[i], F_SETFL, O_NONBLOCK);
    }
    return true;
}

int spawn_null(void)
{
    return null_fd;
}
