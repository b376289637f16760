// The disks: an ext4 filesystem from a template of its size, sparse, and what happens where there is no room.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/crypto.h"
#include "base/fd.h"
#include "sandbox/disk.h"

struct fixture {
    char path[64];
    int state_fd, sandbox_fd;
    struct err err;
};

static bool mke2fs_there(void)
{
    return access("/usr/sbin/mke2fs", X_OK) == 0 || access("/sbin/mke2fs", X_OK) == 0 ||
           access("/usr/local/sbin/mke2fs", X_OK) == 0;
}

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->path, "/tmp/airlock-disk.XXXXXX");
    if (!mkdtemp(x->path))
        return -1;
    x->state_fd = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (mkdirat(x->state_fd, "sandbox", 0700) != 0)
        return -1;
    x->sandbox_fd = openat(x->state_fd, "sandbox", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *state = x;
    return x->sandbox_fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    fd_close(&x->state_fd);
    fd_close(&x->sandbox_fd);
    const int failed = fd_remove_tree(AT_FDCWD, x->path, NULL);
    free(x);
    return failed;
}

static struct stat stat_of(int dirfd, const char *name)
{
    struct stat st;
    assert_int_equal(fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW), 0);
    return st;
}

static bool there(int dirfd, const char *name)
{
    struct stat st;
    return fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static void digest_of(int dirfd, const char *name, uint8_t out[SHA256_BYTES])
{
    CLEANUP_FD int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC);
    struct err err = {0};
    assert_int_equal(crypto_sha256_fd(fd, out, NULL, &err), 0);
}

static void a_disk_is_a_sparse_filesystem(void **state)
{
    struct fixture *x = *state;
    uint8_t magic[2], uuid[16] = {0};
    if (!mke2fs_there())
        skip();
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 256, &x->err), 0);
    const struct stat st = stat_of(x->sandbox_fd, "disk.raw");
    assert_int_equal(st.st_size, (off_t)256 << 20);
    assert_true((uint64_t)st.st_blocks * 512 < 32u << 20);
    assert_int_equal(st.st_mode & 07777, 0600);
    CLEANUP_FD int fd = disk_open(x->sandbox_fd, &x->err);
    assert_true(fd >= 0);
    assert_int_equal(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDWR);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(fd_pread_full(fd, magic, 2, 1024 + 56), 0); // ext4's superblock
    assert_int_equal(magic[0], 0x53);
    assert_int_equal(magic[1], 0xef);
    assert_int_equal(fd_pread_full(fd, uuid, sizeof uuid, 1024 + 104), 0);
    assert_memory_not_equal(uuid, (uint8_t[16]){0}, sizeof uuid);
}

static void a_template_is_made_once_per_size(void **state)
{
    struct fixture *x = *state;
    uint8_t a[SHA256_BYTES], b[SHA256_BYTES];
    if (!mke2fs_there())
        skip();
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 64, &x->err), 0);
    const struct stat first = stat_of(x->state_fd, "disks/ext4-64.raw");
    assert_int_equal(stat_of(x->state_fd, "disks").st_mode & 07777, 0700);
    digest_of(x->sandbox_fd, "disk.raw", a);
    digest_of(x->state_fd, "disks/ext4-64.raw", b);
    assert_memory_equal(a, b, sizeof a);
    // A new disk replaces the old one, from the same template; what was written to the old one is not in it.
    CLEANUP_FD int fd = disk_open(x->sandbox_fd, &x->err);
    assert_int_equal(fd_pwrite_full(fd, "written by a guest", 18, 40 << 20), 0);
    const struct stat old = stat_of(x->sandbox_fd, "disk.raw");
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 64, &x->err), 0);
    assert_int_equal(stat_of(x->state_fd, "disks/ext4-64.raw").st_ino, first.st_ino);
    assert_true(stat_of(x->sandbox_fd, "disk.raw").st_ino != old.st_ino); // the old one is still open
    digest_of(x->sandbox_fd, "disk.raw", a);
    assert_memory_equal(a, b, sizeof a);
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 65, &x->err), 0);
    assert_int_equal(stat_of(x->state_fd, "disks/ext4-65.raw").st_size, (off_t)65 << 20);
    assert_int_equal(stat_of(x->sandbox_fd, "disk.raw").st_size, (off_t)65 << 20);
}

// What a crash left of a template that was being made is no hindrance.
static void a_half_made_template_is_made_anew(void **state)
{
    struct fixture *x = *state;
    if (!mke2fs_there())
        skip();
    assert_int_equal(mkdirat(x->state_fd, "disks", 0700), 0);
    CLEANUP_FD int half = openat(x->state_fd, "disks/.ext4-64.raw.new", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(fd_write_full(half, "half", 4), 0);
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 64, &x->err), 0);
    assert_false(there(x->state_fd, "disks/.ext4-64.raw.new"));
    assert_int_equal(stat_of(x->sandbox_fd, "disk.raw").st_size, (off_t)64 << 20);
}

static void no_disk_and_no_symlink_is_opened(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(disk_open(x->sandbox_fd, &x->err), -1);
    assert_int_equal(x->err.kind, ERR_INTERNAL);
    assert_int_equal(x->err.sys_errno, ENOENT);
    CLEANUP_FD int other = openat(x->state_fd, "other", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(other >= 0);
    assert_int_equal(symlinkat("../other", x->sandbox_fd, "disk.raw"), 0);
    assert_int_equal(disk_open(x->sandbox_fd, &x->err), -1);
    assert_int_equal(x->err.sys_errno, ELOOP);
}

// A symlink in the disk's place is replaced, never written through.
static void making_does_not_follow_a_symlink(void **state)
{
    struct fixture *x = *state;
    if (!mke2fs_there())
        skip();
    CLEANUP_FD int other = openat(x->state_fd, "other", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(other >= 0);
    assert_int_equal(symlinkat("../other", x->sandbox_fd, "disk.raw"), 0);
    assert_int_equal(disk_make(x->state_fd, x->sandbox_fd, 64, &x->err), 0);
    assert_true(S_ISREG(stat_of(x->sandbox_fd, "disk.raw").st_mode));
    assert_int_equal(stat_of(x->state_fd, "other").st_size, 0);
}

// ---- at once ----------------------------------------------------------------------------------------------------------
struct maker {
    struct fixture *x;
    char name[16];
    int mib, failed;
    struct err err;
};

static void *make_one(void *arg)
{
    struct maker *m = arg;
    CLEANUP_FD int dir = openat(m->x->state_fd, m->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    m->failed = disk_make(m->x->state_fd, dir, m->mib, &m->err);
    return NULL;
}

static void many_at_once(void **state)
{
    enum { N = 6 };
    struct fixture *x = *state;
    struct maker makers[N];
    pthread_t threads[N];
    if (!mke2fs_there())
        skip();
    for (int i = 0; i < N; i++) {
        makers[i] = (struct maker){.x = x, .mib = 64 + i % 2};
        snprintf(makers[i].name, sizeof makers[i].name, "sandbox%d", i);
        assert_int_equal(mkdirat(x->state_fd, makers[i].name, 0700), 0);
    }
    for (int i = 0; i < N; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, make_one, &makers[i]), 0);
    for (int i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < N; i++) {
        char path[40];
        uint8_t a[SHA256_BYTES], b[SHA256_BYTES];
        snprintf(path, sizeof path, "sandbox%d/disk.raw", i);
        assert_int_equal(makers[i].failed, 0);
        assert_int_equal(makers[i].err.kind, ERR_NONE);
        digest_of(x->state_fd, path, a);
        digest_of(x->state_fd, i % 2 ? "disks/ext4-65.raw" : "disks/ext4-64.raw", b);
        assert_memory_equal(a, b, sizeof a); // whole, though others were made meanwhile
    }
}

// ---- no room ----------------------------------------------------------------------------------------------------------
// A small filesystem of its own, in a child with namespaces of its own. What the child says: 0 all was as expected, 77 such
// a filesystem cannot be had here, otherwise the line of what was not.
#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        if (!(x))                                                                                                      \
            _exit(__LINE__ % 256 == 77 ? 78 : __LINE__ % 256);                                                         \
    } while (0)

// Mounts of its own: by its own right, or as root of a user namespace.
static void own_mounts(void)
{
    char text[40];
    const int uid = (int)getuid(), gid = (int)getgid();
    if (unshare(CLONE_NEWNS) == 0) {
        if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
            _exit(77);
        return;
    }
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0)
        _exit(77);
    CLEANUP_FD int groups = open("/proc/self/setgroups", O_WRONLY | O_CLOEXEC);
    CLEANUP_FD int u = open("/proc/self/uid_map", O_WRONLY | O_CLOEXEC);
    CLEANUP_FD int g = open("/proc/self/gid_map", O_WRONLY | O_CLOEXEC);
    (void)fd_write_full(groups, "deny", 4);
    snprintf(text, sizeof text, "0 %d 1", uid);
    (void)fd_write_full(u, text, strlen(text));
    snprintf(text, sizeof text, "0 %d 1", gid);
    (void)fd_write_full(g, text, strlen(text));
}

static void __attribute__((noreturn)) in_a_small_filesystem(const char *path)
{
    struct err err = {0};
    own_mounts();
    if (mount("small", path, "tmpfs", 0, "size=1m") != 0)
        _exit(77);
    CLEANUP_FD int state_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    MUST(mkdirat(state_fd, "sandbox", 0700) == 0);
    CLEANUP_FD int sandbox_fd = openat(state_fd, "sandbox", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    // The template fits (it is sparse) and so do some disks, but not every one.
    MUST(disk_make(state_fd, sandbox_fd, 64, &err) == 0);
    CLEANUP_FD int filler = openat(state_fd, "filler", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    char block[4096];
    memset(block, 'f', sizeof block);
    while (fd_write_full(filler, block, sizeof block) == 0)
        ;
    MUST(errno == ENOSPC);
    MUST(unlinkat(sandbox_fd, "disk.raw", 0) == 0);
    while (fd_write_full(filler, block, sizeof block) == 0)
        ;
    MUST(disk_make(state_fd, sandbox_fd, 64, &err) == -1);
    MUST(err.kind == ERR_UNAVAILABLE && strcmp(err.code, "disk_full") == 0);
    struct stat st;
    MUST(fstatat(sandbox_fd, "disk.raw", &st, 0) != 0); // no half of a disk is left
    // With room again it works again.
    MUST(ftruncate(filler, 0) == 0);
    err = (struct err){0};
    MUST(disk_make(state_fd, sandbox_fd, 64, &err) == 0);
    _exit(0);
}

static void no_room_is_said_and_leaves_nothing(void **state)
{
    struct fixture *x = *state;
    int status;
    if (!mke2fs_there())
        skip();
    const pid_t child = fork();
    if (child == 0)
        in_a_small_filesystem(x->path);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77)
        skip();
    assert_int_equal(WEXITSTATUS(status), 0);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_disk_is_a_sparse_filesystem),
        TEST(a_template_is_made_once_per_size),
        TEST(a_half_made_template_is_made_anew),
        TEST(no_disk_and_no_symlink_is_opened),
        TEST(making_does_not_follow_a_symlink),
        TEST(many_at_once),
        TEST(no_room_is_said_and_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
