// What file operations do, below /tmp, which is a root that may be written: where they lead after all symbolic links, what
// they refuse, and what they leave behind.
// Longer than 600 lines: it mirrors guest/fileact.c, and compiles it in.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#pragma GCC diagnostic ignored "-Wunused-result" // the agent is built with another C library, which marks none
#include "guest/fileact.c"

#include "base/fd.h"

// The names of owners are user.c's.
void user_name_of(uid_t uid, char *out, size_t cap)
{
    snprintf(out, cap, "user%u", (unsigned)uid);
}

void group_name_of(gid_t gid, char *out, size_t cap)
{
    snprintf(out, cap, "group%u", (unsigned)gid);
}

struct fixture {
    char top[64], outside[80]; // below /tmp; a directory that is none of the roots'
    char path[600], to[600];
    int fd;
    struct fileop op;
    struct msg_file_result r;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->top, "/tmp/airlock-fileact.XXXXXX");
    strcpy(x->outside, "/var/tmp/airlock-fileact.XXXXXX");
    if (!mkdtemp(x->top) || !mkdtemp(x->outside))
        return -1;
    x->fd = open(x->top, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    umask(022);
    *state = x;
    return x->fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    fd_close(&x->fd);
    const int failed = fd_remove_tree(AT_FDCWD, x->top, NULL) | fd_remove_tree(AT_FDCWD, x->outside, NULL);
    free(x);
    return failed;
}

// An operation on top/path; a path that begins with / is taken as it is.
static struct fileop *op_of(struct fixture *x, enum msg_file_op op, const char *path, const char *to)
{
    snprintf(x->path, sizeof x->path, "%s%s%s", *path == '/' ? "" : x->top, *path == '/' ? "" : "/", path);
    if (to)
        snprintf(x->to, sizeof x->to, "%s%s%s", *to == '/' ? "" : x->top, *to == '/' ? "" : "/", to);
    static uint64_t id;
    x->op = (struct fileop){.op = op, .id = ++id, .path = x->path, .to = x->to, .fd = -1, .dirfd = -1};
    memset(&x->r, 0, sizeof x->r);
    return &x->op;
}

static int simple(struct fixture *x, enum msg_file_op op, const char *path, const char *to)
{
    const int before = fd_count_open(), status = fileact_simple(op_of(x, op, path, to), &x->r);
    assert_int_equal(fd_count_open(), before);
    return status;
}

static int finish_write(struct fixture *x, const char *text)
{
    int status = fileact_open_write(&x->op);
    if (status != MSG_FILE_OK) {
        assert_int_equal(x->op.fd, -1);
        assert_int_equal(x->op.dirfd, -1);
        return status;
    }
    assert_int_equal(fd_write_full(x->op.fd, text, strlen(text)), 0);
    x->op.at = strlen(text);
    status = fileact_commit(&x->op, &x->r);
    fileact_discard(&x->op);
    return status;
}

static int write_file(struct fixture *x, const char *path, const char *text)
{
    (void)op_of(x, MSG_FILE_WRITE, path, NULL);
    return finish_write(x, text);
}

static void put(struct fixture *x, const char *name, const char *text)
{
    CLEANUP_FD int fd = openat(x->fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(fd_write_full(fd, text, strlen(text)), 0);
}

static void link_to(struct fixture *x, const char *name, const char *target)
{
    assert_int_equal(symlinkat(target, x->fd, name), 0);
}

static void make_dir(struct fixture *x, const char *name)
{
    assert_int_equal(mkdirat(x->fd, name, 0755), 0);
}

static void assert_content(struct fixture *x, const char *name, const char *text)
{
    CLEANUP_BUF struct buf b = BUF_INIT(10000);
    assert_int_equal(fd_read_file(x->fd, name, &b), 0);
    assert_string_equal(buf_text(&b), text);
}

static struct stat stat_of(struct fixture *x, const char *name)
{
    struct stat st;
    assert_int_equal(fstatat(x->fd, name, &st, AT_SYMLINK_NOFOLLOW), 0);
    return st;
}

static bool there(int dirfd, const char *name)
{
    struct stat st;
    return fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static size_t entries(const char *path)
{
    size_t n = 0;
    DIR *d = opendir(path);
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n - 2;
}

// ---- writing ----------------------------------------------------------------------------------------------------------
static void a_file_is_written_and_replaced(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(write_file(x, "new", "one"), MSG_FILE_OK);
    assert_true(x->r.created);
    assert_int_equal(x->r.size, 3);
    assert_int_equal(stat_of(x, "new").st_mode & 07777, 0644);
    assert_content(x, "new", "one");
    assert_int_equal(fchmodat(x->fd, "new", 0750, 0), 0);
    assert_int_equal(write_file(x, "new", "second"), MSG_FILE_OK);
    assert_false(x->r.created);
    assert_int_equal(stat_of(x, "new").st_mode & 07777, 0750); // it keeps its mode
    assert_content(x, "new", "second");
    op_of(x, MSG_FILE_WRITE, "new", NULL)->mode = 0600;
    assert_int_equal(finish_write(x, ""), MSG_FILE_OK);
    assert_int_equal(stat_of(x, "new").st_mode & 07777, 0600);
    assert_int_equal(entries(x->top), 1); // no temporary file
}

static void a_write_that_is_given_up_leaves_nothing(void **state)
{
    struct fixture *x = *state;
    put(x, "file", "old");
    const int before = fd_count_open();
    assert_int_equal(fileact_open_write(op_of(x, MSG_FILE_WRITE, "file", NULL)), MSG_FILE_OK);
    assert_int_equal(fd_write_full(x->op.fd, "new", 3), 0);
    assert_content(x, "file", "old");
    fileact_discard(&x->op);
    fileact_discard(&x->op);
    assert_content(x, "file", "old");
    assert_int_equal(entries(x->top), 1);
    assert_int_equal(fd_count_open(), before);
}

static void exclusive_writes(void **state)
{
    struct fixture *x = *state;
    put(x, "file", "old");
    link_to(x, "link", "nowhere");
    op_of(x, MSG_FILE_WRITE, "file", NULL)->exclusive = true;
    assert_int_equal(finish_write(x, "new"), MSG_FILE_EXISTS);
    op_of(x, MSG_FILE_WRITE, "link", NULL)->exclusive = true; // a link is something, too
    assert_int_equal(finish_write(x, "new"), MSG_FILE_EXISTS);
    assert_false(there(x->fd, "nowhere"));
    op_of(x, MSG_FILE_WRITE, "other", NULL)->exclusive = true;
    assert_int_equal(finish_write(x, "new"), MSG_FILE_OK);
    // Somebody is faster: what is there stays.
    op_of(x, MSG_FILE_WRITE, "raced", NULL)->exclusive = true;
    assert_int_equal(fileact_open_write(&x->op), MSG_FILE_OK);
    put(x, "raced", "first");
    assert_int_equal(fileact_commit(&x->op, &x->r), MSG_FILE_EXISTS);
    fileact_discard(&x->op);
    assert_content(x, "raced", "first");
    assert_int_equal(entries(x->top), 4);
}

static void parents_are_made_where_asked(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(write_file(x, "a/b/c", "x"), MSG_FILE_NOT_FOUND);
    op_of(x, MSG_FILE_WRITE, "a/b/c", NULL)->mkdirs = true;
    assert_int_equal(finish_write(x, "x"), MSG_FILE_OK);
    assert_content(x, "a/b/c", "x");
    assert_int_equal(stat_of(x, "a/b").st_mode & 07777, 0755);
    op_of(x, MSG_FILE_WRITE, "a/b/c/d", NULL)->mkdirs = true; // below a file
    assert_int_equal(finish_write(x, "x"), MSG_FILE_NOT_DIRECTORY);
}

static void only_regular_files_are_written(void **state)
{
    struct fixture *x = *state;
    make_dir(x, "dir");
    assert_int_equal(mkfifoat(x->fd, "fifo", 0644), 0);
    assert_int_equal(write_file(x, "dir", "x"), MSG_FILE_IS_DIRECTORY);
    assert_int_equal(write_file(x, "fifo", "x"), MSG_FILE_NOT_REGULAR);
    char name[400];
    memset(name, 'n', 256);
    name[256] = 0;
    assert_int_equal(write_file(x, name, "x"), MSG_FILE_NAME_TOO_LONG);
    name[255] = 0;
    assert_int_equal(write_file(x, name, "x"), MSG_FILE_OK);
}

// ---- where it leads ---------------------------------------------------------------------------------------------------
static void nothing_is_written_outside_the_roots(void **state)
{
    static const char *const OUTSIDE[] = {"/airlock-test", "/etc/airlock-test", "/usr/airlock-test", "/tmp", "/work", "/home",
                                          "/dev/shm/airlock-test", "/etc/no/such/airlock-test", "/proc/self/airlock-test"};
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof OUTSIDE / sizeof *OUTSIDE; i++)
        for (int mkdirs = 0; mkdirs < 2; mkdirs++) {
            op_of(x, MSG_FILE_WRITE, OUTSIDE[i], NULL)->mkdirs = mkdirs;
            if (finish_write(x, "x") != MSG_FILE_OUTSIDE_ROOTS)
                fail_msg("%s", OUTSIDE[i]);
            assert_int_equal(simple(x, MSG_FILE_DELETE, OUTSIDE[i], NULL), MSG_FILE_OUTSIDE_ROOTS);
            op_of(x, MSG_DIR_MAKE, OUTSIDE[i], NULL)->mkdirs = mkdirs;
            assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OUTSIDE_ROOTS);
            assert_int_equal(simple(x, MSG_FILE_CHECK_WRITE, OUTSIDE[i], NULL), MSG_FILE_OUTSIDE_ROOTS);
        }
    assert_int_equal(simple(x, MSG_FILE_CHECK_WRITE, "file", NULL), MSG_FILE_OK);
}

static void a_final_link_is_followed_to_where_it_may_lead(void **state)
{
    struct fixture *x = *state;
    char target[200];
    put(x, "target", "old");
    make_dir(x, "sub");
    link_to(x, "near", "target");
    link_to(x, "sub/up", "../near"); // a link to a link
    link_to(x, "new", "sub/made");
    assert_int_equal(write_file(x, "sub/up", "through two"), MSG_FILE_OK);
    assert_content(x, "target", "through two");
    assert_true(S_ISLNK(stat_of(x, "near").st_mode) && S_ISLNK(stat_of(x, "sub/up").st_mode));
    assert_int_equal(write_file(x, "new", "made"), MSG_FILE_OK); // what it points to comes to be
    assert_content(x, "sub/made", "made");
    // And where it may not.
    snprintf(target, sizeof target, "%s/victim", x->outside);
    link_to(x, "absolute", target);
    snprintf(target, sizeof target, "../..%s/victim", x->outside);
    link_to(x, "relative", target);
    link_to(x, "twice", "absolute");
    static const char *const NAMES[] = {"absolute", "relative", "twice"};
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(write_file(x, NAMES[i], "x"), MSG_FILE_OUTSIDE_ROOTS);
        assert_int_equal(simple(x, MSG_FILE_CHECK_WRITE, NAMES[i], NULL), MSG_FILE_OUTSIDE_ROOTS);
    }
    assert_int_equal(entries(x->outside), 0);
}

static void a_linked_directory_is_judged_by_where_it_is(void **state)
{
    struct fixture *x = *state;
    char made[200];
    make_dir(x, "real");
    link_to(x, "inside", "real");
    link_to(x, "outside", x->outside);
    assert_int_equal(write_file(x, "inside/file", "x"), MSG_FILE_OK);
    assert_content(x, "real/file", "x");
    assert_int_equal(write_file(x, "outside/file", "x"), MSG_FILE_OUTSIDE_ROOTS);
    op_of(x, MSG_FILE_WRITE, "outside/a/b/file", NULL)->mkdirs = true;
    assert_int_equal(finish_write(x, "x"), MSG_FILE_OUTSIDE_ROOTS);
    op_of(x, MSG_DIR_MAKE, "outside/a/b", NULL)->mkdirs = true;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OUTSIDE_ROOTS);
    snprintf(made, sizeof made, "%s/outside/a", x->top);
    assert_int_equal(fileop_make_dirs(made), MSG_FILE_OUTSIDE_ROOTS);
    assert_int_equal(write_file(x, "outside/no/file", "x"), MSG_FILE_OUTSIDE_ROOTS); // not: not found
    assert_int_equal(entries(x->outside), 0);
    // Reading is another matter: what the user may read is read.
    CLEANUP_FD int other = open(x->outside, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(fd_write_file_atomic(other, "readable", "x", 1, 0644), 0);
    assert_int_equal(fileact_open_read(op_of(x, MSG_FILE_READ, "outside/readable", NULL), &x->r), MSG_FILE_OK);
    fileact_discard(&x->op);
}

static void links_in_a_circle_and_to_nowhere(void **state)
{
    struct fixture *x = *state;
    char name[20], target[20];
    link_to(x, "a", "b");
    link_to(x, "b", "a");
    link_to(x, "self", "self");
    link_to(x, "dots", "..");
    link_to(x, "slash", "x/");
    link_to(x, "broken", "no/such/dir/file");
    assert_int_equal(write_file(x, "a", "x"), MSG_FILE_LOOP);
    assert_int_equal(write_file(x, "self", "x"), MSG_FILE_LOOP);
    assert_int_equal(write_file(x, "self/file", "x"), MSG_FILE_LOOP);
    assert_int_equal(write_file(x, "dots", "x"), MSG_FILE_NOT_REGULAR);
    assert_int_equal(write_file(x, "slash", "x"), MSG_FILE_NOT_REGULAR);
    assert_int_equal(write_file(x, "broken", "x"), MSG_FILE_NOT_FOUND);
    for (int i = 0; i < LINKS_MAX + 1; i++) { // a chain as long as it may be, and one longer
        snprintf(name, sizeof name, "l%d", i);
        snprintf(target, sizeof target, "l%d", i + 1);
        link_to(x, name, target);
    }
    snprintf(name, sizeof name, "l%d", 2);
    assert_int_equal(write_file(x, name, "x"), MSG_FILE_OK);
    assert_int_equal(write_file(x, "l0", "x"), MSG_FILE_LOOP);
}

// The kernel's own links lead anywhere: no path goes through one.
static void magic_links_are_not_followed(void **state)
{
    struct fixture *x = *state;
    char path[300];
    put(x, "file", "x");
    snprintf(path, sizeof path, "/proc/self/root%s/file", x->top);
    assert_int_equal(write_file(x, path, "y"), MSG_FILE_LOOP);
    assert_int_equal(fileact_open_read(op_of(x, MSG_FILE_READ, path, NULL), &x->r), MSG_FILE_LOOP);
    snprintf(path, sizeof path, "/proc/self/fd/%d/file", x->fd);
    assert_int_equal(write_file(x, path, "y"), MSG_FILE_LOOP);
    link_to(x, "magic", "/proc/self/cwd");
    assert_int_equal(write_file(x, "magic/file", "y"), MSG_FILE_LOOP);
    assert_content(x, "file", "x");
}

static void paths_that_are_none(void **state)
{
    static const char *const BAD[] = {"", "a/../b", "./a", "a/", "a//b", "..", "\xff"};
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        char path[200];
        snprintf(path, sizeof path, "%s/%s", x->top, BAD[i]);
        assert_int_equal(write_file(x, path, "x"), MSG_FILE_PATH_INVALID);
        assert_int_equal(fileact_open_read(op_of(x, MSG_FILE_READ, path, NULL), &x->r), MSG_FILE_PATH_INVALID);
        assert_int_equal(fileact_list(op_of(x, MSG_DIR_LIST, path, NULL), NULL), MSG_FILE_PATH_INVALID);
        static const enum msg_file_op OPS[] = {MSG_FILE_STAT, MSG_FILE_DELETE, MSG_DIR_MAKE, MSG_FILE_CHECK_WRITE};
        for (size_t k = 0; k < sizeof OPS / sizeof *OPS; k++)
            assert_int_equal(simple(x, OPS[k], path, NULL), MSG_FILE_PATH_INVALID);
        assert_int_equal(simple(x, MSG_FILE_MOVE, path, "to"), MSG_FILE_PATH_INVALID);
        put(x, "from", "x");
        assert_int_equal(simple(x, MSG_FILE_MOVE, "from", path), MSG_FILE_PATH_INVALID);
    }
    strcpy(x->path, "relative/path");
    x->op = (struct fileop){.op = MSG_FILE_STAT, .path = x->path, .fd = -1, .dirfd = -1};
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_PATH_INVALID);
}

// ---- removing ---------------------------------------------------------------------------------------------------------
static void removal_counts_and_follows_nothing(void **state)
{
    struct fixture *x = *state;
    CLEANUP_FD int other = open(x->outside, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(fd_write_file_atomic(other, "kept", "x", 1, 0644), 0);
    make_dir(x, "tree");
    make_dir(x, "tree/sub");
    put(x, "tree/one", "1");
    put(x, "tree/sub/two", "2");
    link_to(x, "tree/link", x->outside);
    link_to(x, "link", "tree");
    assert_int_equal(simple(x, MSG_FILE_DELETE, "tree", NULL), MSG_FILE_NOT_EMPTY);
    assert_int_equal(simple(x, MSG_FILE_DELETE, "link", NULL), MSG_FILE_OK); // the link itself
    assert_int_equal(x->r.removed, 1);
    assert_int_equal(x->r.kind, MSG_KIND_SYMLINK);
    assert_true(there(x->fd, "tree/one"));
    op_of(x, MSG_FILE_DELETE, "tree", NULL)->recursive = true;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OK);
    assert_int_equal(x->r.removed, 5);
    assert_int_equal(x->r.kind, MSG_KIND_DIRECTORY);
    assert_false(there(x->fd, "tree"));
    assert_true(there(other, "kept"));
    make_dir(x, "empty");
    assert_int_equal(simple(x, MSG_FILE_DELETE, "empty", NULL), MSG_FILE_OK);
    assert_int_equal(entries(x->top), 0);
}

// (Not recursively: what this test is about must not cost anybody a home.)
static void the_roots_themselves_stay(void **state)
{
    static const char *const ROOTS[] = {"/tmp", "/work", "/home"};
    struct fixture *x = *state;
    put(x, "file", "x");
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(simple(x, MSG_FILE_DELETE, ROOTS[i], NULL), MSG_FILE_OUTSIDE_ROOTS);
        assert_int_equal(simple(x, MSG_FILE_MOVE, ROOTS[i], "moved"), MSG_FILE_OUTSIDE_ROOTS);
        assert_int_equal(simple(x, MSG_FILE_MOVE, "file", ROOTS[i]), MSG_FILE_OUTSIDE_ROOTS);
    }
    assert_true(there(x->fd, "file"));
}

// ---- moving, making ---------------------------------------------------------------------------------------------------
static void moves(void **state)
{
    struct fixture *x = *state;
    char path[200];
    put(x, "a", "of a");
    put(x, "b", "of b");
    make_dir(x, "dir");
    assert_int_equal(simple(x, MSG_FILE_MOVE, "a", "dir/a"), MSG_FILE_OK);
    assert_content(x, "dir/a", "of a");
    assert_int_equal(simple(x, MSG_FILE_MOVE, "missing", "c"), MSG_FILE_NOT_FOUND);
    op_of(x, MSG_FILE_MOVE, "b", "dir/a")->exclusive = true;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_EXISTS);
    assert_content(x, "dir/a", "of a");
    assert_int_equal(simple(x, MSG_FILE_MOVE, "b", "dir/a"), MSG_FILE_OK); // replaces
    assert_content(x, "dir/a", "of b");
    assert_int_equal(simple(x, MSG_FILE_MOVE, "dir/a", "x/y/a"), MSG_FILE_NOT_FOUND);
    op_of(x, MSG_FILE_MOVE, "dir/a", "x/y/a")->mkdirs = true;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OK);
    assert_content(x, "x/y/a", "of b");
    // A link is moved, not what it points to; neither end may be outside.
    link_to(x, "link", "x/y/a");
    assert_int_equal(simple(x, MSG_FILE_MOVE, "link", "moved"), MSG_FILE_OK);
    assert_true(S_ISLNK(stat_of(x, "moved").st_mode));
    snprintf(path, sizeof path, "%s/stolen", x->outside);
    assert_int_equal(simple(x, MSG_FILE_MOVE, "x/y/a", path), MSG_FILE_OUTSIDE_ROOTS);
    CLEANUP_FD int other = open(x->outside, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(fd_write_file_atomic(other, "stolen", "x", 1, 0644), 0);
    assert_int_equal(simple(x, MSG_FILE_MOVE, path, "mine"), MSG_FILE_OUTSIDE_ROOTS);
    assert_true(there(other, "stolen"));
}

static void directories_are_made(void **state)
{
    struct fixture *x = *state;
    const mode_t mask = umask(077); // the mode is what was asked for
    assert_int_equal(simple(x, MSG_DIR_MAKE, "dir", NULL), MSG_FILE_OK);
    assert_true(x->r.created);
    assert_int_equal(stat_of(x, "dir").st_mode & 07777, 0755);
    op_of(x, MSG_DIR_MAKE, "private", NULL)->mode = 0700;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OK);
    assert_int_equal(stat_of(x, "private").st_mode & 07777, 0700);
    umask(mask);
    assert_int_equal(simple(x, MSG_DIR_MAKE, "dir", NULL), MSG_FILE_OK);
    assert_false(x->r.created);
    put(x, "file", "x");
    link_to(x, "link", "dir");
    assert_int_equal(simple(x, MSG_DIR_MAKE, "file", NULL), MSG_FILE_EXISTS);
    assert_int_equal(simple(x, MSG_DIR_MAKE, "link", NULL), MSG_FILE_EXISTS);
    assert_int_equal(simple(x, MSG_DIR_MAKE, "a/b", NULL), MSG_FILE_NOT_FOUND);
    op_of(x, MSG_DIR_MAKE, "a/b", NULL)->mkdirs = true;
    assert_int_equal(fileact_simple(&x->op, &x->r), MSG_FILE_OK);
    assert_true(there(x->fd, "a/b"));
    char path[200];
    snprintf(path, sizeof path, "%s/m/n/o", x->top);
    assert_int_equal(fileop_make_dirs(path), MSG_FILE_OK);
    assert_int_equal(fileop_make_dirs(path), MSG_FILE_OK);
    assert_true(there(x->fd, "m/n/o"));
    assert_int_equal(fileop_make_dirs("m/n"), MSG_FILE_PATH_INVALID);
}

// ---- looking ----------------------------------------------------------------------------------------------------------
static void facts_of_a_path(void **state)
{
    struct fixture *x = *state;
    char text[40];
    put(x, "file", "12345");
    assert_int_equal(fchmodat(x->fd, "file", 04711, 0), 0);
    const struct timespec times[2] = {{1, 0}, {1700000000, 123456789}};
    assert_int_equal(utimensat(x->fd, "file", times, 0), 0);
    assert_int_equal(simple(x, MSG_FILE_STAT, "file", NULL), MSG_FILE_OK);
    assert_int_equal(x->r.kind, MSG_KIND_FILE);
    assert_int_equal(x->r.size, 5);
    assert_int_equal(x->r.mode, 04711);
    assert_int_equal(x->r.mtime_ms, 1700000000123);
    assert_int_equal(x->r.uid, getuid());
    snprintf(text, sizeof text, "user%u", (unsigned)getuid());
    assert_int_equal(x->r.owner.len, strlen(text));
    assert_memory_equal(x->r.owner.data, text, x->r.owner.len);
    link_to(x, "link", "no/where");
    assert_int_equal(simple(x, MSG_FILE_STAT, "link", NULL), MSG_FILE_OK);
    assert_int_equal(x->r.kind, MSG_KIND_SYMLINK);
    assert_int_equal(x->r.target.len, 8);
    assert_memory_equal(x->r.target.data, "no/where", 8);
    assert_int_equal(simple(x, MSG_FILE_STAT, "missing", NULL), MSG_FILE_NOT_FOUND);
    assert_int_equal(simple(x, MSG_FILE_STAT, "file/x", NULL), MSG_FILE_NOT_DIRECTORY);
    assert_int_equal(simple(x, MSG_FILE_STAT, "/", NULL), MSG_FILE_OK);
    assert_int_equal(x->r.kind, MSG_KIND_DIRECTORY);
    assert_int_equal(simple(x, MSG_FILE_STAT, "/dev/null", NULL), MSG_FILE_OK);
    assert_int_equal(x->r.kind, MSG_KIND_OTHER);
}

static int open_read(struct fixture *x, const char *path, uint64_t offset, uint64_t length)
{
    struct fileop *op = op_of(x, MSG_FILE_READ, path, NULL);
    op->offset = offset;
    op->length = length;
    const int status = fileact_open_read(op, &x->r);
    assert_true((op->fd >= 0) == (status == MSG_FILE_OK));
    fileact_discard(op);
    return status;
}

static void ranges_of_a_file(void **state)
{
    struct fixture *x = *state;
    put(x, "file", "0123456789");
    put(x, "empty", "");
    assert_int_equal(open_read(x, "file", 0, 0), MSG_FILE_OK);
    assert_int_equal(x->op.end, 10);
    assert_int_equal(x->r.size, 10);
    assert_int_equal(open_read(x, "file", 4, 0), MSG_FILE_OK);
    assert_int_equal(x->op.end, 6);
    assert_int_equal(open_read(x, "file", 4, 3), MSG_FILE_OK);
    assert_int_equal(x->op.end, 3);
    assert_int_equal(open_read(x, "file", 4, UINT64_MAX), MSG_FILE_OK); // no more than there is
    assert_int_equal(x->op.end, 6);
    assert_int_equal(open_read(x, "file", 9, 1), MSG_FILE_OK);
    assert_int_equal(open_read(x, "file", 10, 1), MSG_FILE_RANGE);
    assert_int_equal(open_read(x, "file", UINT64_MAX, 0), MSG_FILE_RANGE);
    assert_int_equal(open_read(x, "empty", 0, 0), MSG_FILE_OK);
    assert_int_equal(open_read(x, "empty", 1, 0), MSG_FILE_RANGE);
    assert_int_equal(open_read(x, "/proc/self/status", 0, 0), MSG_FILE_OK); // says 0, is read to its end
    assert_int_equal(x->op.end, UINT64_MAX);
}

static void only_regular_files_are_read(void **state)
{
    struct fixture *x = *state;
    make_dir(x, "dir");
    assert_int_equal(mkfifoat(x->fd, "fifo", 0644), 0);
    put(x, "file", "x");
    link_to(x, "link", "file");
    assert_int_equal(open_read(x, "dir", 0, 0), MSG_FILE_IS_DIRECTORY);
    assert_int_equal(open_read(x, "fifo", 0, 0), MSG_FILE_NOT_REGULAR); // and nobody waits for a writer
    assert_int_equal(open_read(x, "/dev/zero", 0, 0), MSG_FILE_NOT_REGULAR);
    assert_int_equal(open_read(x, "missing", 0, 0), MSG_FILE_NOT_FOUND);
    assert_int_equal(open_read(x, "file/x", 0, 0), MSG_FILE_NOT_DIRECTORY);
    assert_int_equal(open_read(x, "link", 0, 0), MSG_FILE_OK);
}

// ---- listing ----------------------------------------------------------------------------------------------------------
static struct {
    char names[20000];
    size_t entries, frames;
    bool last, truncated;
} listed;

static bool collect(struct fileop *op, const struct msg_file_result *r, bool last)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    assert_int_equal(msg_file_result_encode(&b, r), 0); // it goes into a frame
    assert_false(listed.last);
    listed.last = last;
    listed.truncated |= r->truncated;
    listed.frames++;
    for (size_t i = 0; i < r->n_entries; i++, listed.entries++) {
        const struct msg_entry *e = &r->entries[i];
        const size_t at = strlen(listed.names);
        snprintf(listed.names + at, sizeof listed.names - at, "|%.*s%s%.*s", (int)e->name.len, (const char *)e->name.data,
                 e->target.len ? ">" : e->kind == MSG_KIND_DIRECTORY ? "/" : "", (int)e->target.len,
                 (const char *)e->target.data);
    }
    return true;
}

static int list(struct fixture *x, const char *path, uint64_t depth, uint64_t max_entries)
{
    struct fileop *op = op_of(x, MSG_DIR_LIST, path, NULL);
    op->depth = depth;
    op->max_entries = max_entries;
    memset(&listed, 0, sizeof listed);
    const int before = fd_count_open(), status = fileact_list(op, collect);
    assert_int_equal(fd_count_open(), before);
    assert_true(listed.last == (status == MSG_FILE_OK));
    strcat(listed.names, "|");
    return status;
}

static bool has(const char *entry)
{
    char text[100];
    snprintf(text, sizeof text, "|%s|", entry);
    return strstr(listed.names, text) != NULL;
}

static void a_directory_is_listed(void **state)
{
    struct fixture *x = *state;
    make_dir(x, "dir");
    assert_int_equal(list(x, "dir", 1, 0), MSG_FILE_OK);
    assert_int_equal(listed.entries, 0);
    put(x, "dir/file", "x");
    put(x, "dir/.hidden", "x");
    put(x, "dir/no\xfftext", "x"); // cannot be said in JSON
    make_dir(x, "dir/sub");
    put(x, "dir/sub/below", "x");
    make_dir(x, "dir/sub/deep");
    put(x, "dir/sub/deep/file", "x");
    link_to(x, "dir/link", "sub");
    link_to(x, "todir", "dir");
    assert_int_equal(list(x, "dir", 0, 0), MSG_FILE_OK); // at least one level
    assert_int_equal(listed.entries, 4);
    assert_true(has("file") && has(".hidden") && has("sub/") && has("link>sub"));
    assert_int_equal(list(x, "dir", 2, 0), MSG_FILE_OK);
    assert_int_equal(listed.entries, 6);
    assert_true(has("sub/below") && has("sub/deep/"));
    assert_int_equal(list(x, "dir", 99, 0), MSG_FILE_OK);
    assert_int_equal(listed.entries, 7);
    assert_true(has("sub/deep/file"));
    assert_false(has("link/below")); // links are told, not entered
    assert_int_equal(list(x, "todir", 1, 0), MSG_FILE_OK);
    assert_int_equal(listed.entries, 4);
    assert_int_equal(list(x, "dir/file", 1, 0), MSG_FILE_NOT_DIRECTORY);
    assert_int_equal(list(x, "missing", 1, 0), MSG_FILE_NOT_FOUND);
}

static void a_long_listing_comes_in_frames_and_ends(void **state)
{
    struct fixture *x = *state;
    make_dir(x, "many");
    for (int i = 0; i < 300; i++) {
        char name[64];
        snprintf(name, sizeof name, "many/file-%03d", i);
        put(x, name, "");
    }
    assert_int_equal(list(x, "many", 1, 0), MSG_FILE_OK);
    assert_int_equal(listed.entries, 300);
    assert_true(listed.frames > 1);
    assert_false(listed.truncated);
    for (int i = 0; i < 300; i++) {
        char name[64];
        snprintf(name, sizeof name, "file-%03d", i);
        assert_true(has(name));
    }
    assert_int_equal(list(x, "many", 1, 300), MSG_FILE_OK);
    assert_false(listed.truncated);
    assert_int_equal(list(x, "many", 1, 299), MSG_FILE_OK);
    assert_int_equal(listed.entries, 299);
    assert_true(listed.truncated);
    assert_int_equal(list(x, "", 5, 100), MSG_FILE_PATH_INVALID);
    snprintf(x->to, sizeof x->to, "%s", x->top);
    assert_int_equal(list(x, x->to, 5, 100), MSG_FILE_OK); // the limit counts over all levels
    assert_int_equal(listed.entries, 100);
    assert_true(listed.truncated);
}

// ---- errno ------------------------------------------------------------------------------------------------------------
static void statuses_of_errors(void **state)
{
    static const struct {
        int code, status;
    } CASES[] = {{ENOENT, MSG_FILE_NOT_FOUND}, {EACCES, MSG_FILE_PERMISSION}, {EPERM, MSG_FILE_PERMISSION},
                 {EEXIST, MSG_FILE_EXISTS}, {ENOTDIR, MSG_FILE_NOT_DIRECTORY}, {ENOTEMPTY, MSG_FILE_NOT_EMPTY},
                 {ENOSPC, MSG_FILE_NO_SPACE}, {EDQUOT, MSG_FILE_NO_SPACE}, {EROFS, MSG_FILE_READ_ONLY},
                 {EISDIR, MSG_FILE_IS_DIRECTORY}, {ELOOP, MSG_FILE_LOOP}, {ENAMETOOLONG, MSG_FILE_NAME_TOO_LONG},
                 {ENXIO, MSG_FILE_NOT_REGULAR}, {EIO, MSG_FILE_ERROR}, {0, MSG_FILE_ERROR}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        assert_int_equal(fileact_status(CASES[i].code), CASES[i].status);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_file_is_written_and_replaced),
        TEST(a_write_that_is_given_up_leaves_nothing),
        TEST(exclusive_writes),
        TEST(parents_are_made_where_asked),
        TEST(only_regular_files_are_written),
        TEST(nothing_is_written_outside_the_roots),
        TEST(a_final_link_is_followed_to_where_it_may_lead),
        TEST(a_linked_directory_is_judged_by_where_it_is),
        TEST(links_in_a_circle_and_to_nowhere),
        TEST(magic_links_are_not_followed),
        TEST(paths_that_are_none),
        TEST(removal_counts_and_follows_nothing),
        TEST(the_roots_themselves_stay),
        TEST(moves),
        TEST(directories_are_made),
        TEST(facts_of_a_path),
        TEST(ranges_of_a_file),
        TEST(only_regular_files_are_read),
        TEST(a_directory_is_listed),
        TEST(a_long_listing_comes_in_frames_and_ends),
        cmocka_unit_test(statuses_of_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
