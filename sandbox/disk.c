#include "sandbox/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/log.h"
#include "qemu/ram.h"

static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER; // one template is made at a time

static int no_room(struct err *err, int code, const char *what)
{
    if (code == ENOSPC || code == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the sandbox's disk");
    return err_sys(err, code, "%s", what);
}

// mke2fs on a sparse file: no journal (the disk's life is the sandbox's; QEMU's host cache is what a crash could lose),
// no reserved blocks, inode tables left lazy so that the template stays small.
static int format(const char *path, struct err *err)
{
    const char *argv[] = {"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256",
                    "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
                    path, NULL};
    const char *env[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    static const char *const PLACES[] = {"/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/local/sbin/mke2fs"};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&actions, 0, 1);
    posix_spawn_file_actions_adddup2(&actions, 0, 2);
    pid_t pid = -1;
    int failed = ENOENT, status = -1;
    for (size_t i = 0; failed && i < sizeof PLACES / sizeof *PLACES; i++)
        failed = posix_spawn(&pid, PLACES[i], &actions, NULL, (char **)argv, (char **)env);
    posix_spawn_file_actions_destroy(&actions);
    if (failed) {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "mke2fs", "mke2fs cannot be started on this host");
        return err_remedy(err, "install e2fsprogs");
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    return err_set(err, ERR_INTERNAL, "mke2fs_failed", "the sandbox's filesystem could not be made");
}

static int template_make(int dirfd, const char *name, int mib, struct err *err)
{
    char temporary[64], path[96];
    snprintf(temporary, sizeof temporary, ".%s.new", name);
    (void)unlinkat(dirfd, temporary, 0);
    CLEANUP_FD int fd = openat(dirfd, temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return no_room(err, errno, "making a disk template");
    // mke2fs gets the file by a path of our own process: valid for the child while we hold both.
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)getpid(), fd);
    if (ftruncate(fd, (off_t)mib << 20) != 0 || format(path, err) != 0 || fsync(fd) != 0 ||
        renameat(dirfd, temporary, dirfd, name) != 0 || fsync(dirfd) != 0) {
        const int code = errno;
        (void)unlinkat(dirfd, temporary, 0);
        return err->kind != ERR_NONE ? -1 : no_room(err, code, "making a disk template");
    }
    return 0;
}

static int template_open(int state_dirfd, int mib, struct err *err)
{
    char name[32];
    snprintf(name, sizeof name, "ext4-%d.raw", mib);
    if (mkdirat(state_dirfd, "disks", 0700) != 0 && errno != EEXIST)
        return no_room(err, errno, "making the disk templates' directory");
    CLEANUP_FD int dirfd = openat(state_dirfd, "disks", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0)
        return err_sys(err, errno, "opening the disk templates");
    pthread_mutex_lock(&making);
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT && template_make(dirfd, name, mib, err) == 0)
        fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC);
    const int code = errno;
    pthread_mutex_unlock(&making);
    if (fd < 0 && err->kind == ERR_NONE)
        err_sys(err, code, "opening a disk template");
    return fd;
}

int disk_fill(int state_dirfd, int to_fd, int mib, struct err *err)
{
    CLEANUP_FD int from = template_open(state_dirfd, mib, err);
    return from < 0 ? -1 : ram_sparse_copy(from, to_fd, NULL, err);
}

static int disk_new(int sandbox_dirfd, struct err *err)
{
    (void)unlinkat(sandbox_dirfd, "disk.raw", 0);
    const int to = openat(sandbox_dirfd, "disk.raw", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return to >= 0 ? to : no_room(err, errno, "making a disk");
}

int disk_make(int state_dirfd, int sandbox_dirfd, int mib, struct err *err)
{
    CLEANUP_FD int to = disk_new(sandbox_dirfd, err);
    if (to >= 0 && disk_fill(state_dirfd, to, mib, err) == 0)
        return 0;
    (void)unlinkat(sandbox_dirfd, "disk.raw", 0);
    return -1;
}

int disk_copy(int from_fd, int sandbox_dirfd, struct err *err)
{
    CLEANUP_FD int to = disk_new(sandbox_dirfd, err);
    if (to >= 0 && ram_sparse_copy(from_fd, to, NULL, err) == 0)
        return 0;
    (void)unlinkat(sandbox_dirfd, "disk.raw", 0);
    return -1;
}

int disk_open(int sandbox_dirfd, struct err *err)
{
    const int fd = openat(sandbox_dirfd, "disk.raw", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        err_sys(err, errno, "opening a sandbox's disk");
    return fd;
}
