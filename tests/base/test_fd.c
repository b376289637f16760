// Descriptors and files: exact reads and writes, whole files, durable replacement, trees, sockets below long paths.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fd.h"

struct dir {
    char path[64];
    int fd;
};

static int setup(void **state)
{
    struct dir *d = calloc(1, sizeof *d);
    strcpy(d->path, "/tmp/airlock-fd.XXXXXX");
    if (!mkdtemp(d->path))
        return -1;
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *state = d;
    return d->fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct dir *d = *state;
    fd_close(&d->fd);
    const int failed = fd_remove_tree(AT_FDCWD, d->path, NULL);
    free(d);
    return failed;
}

static void put(struct dir *d, const char *name, const char *text)
{
    CLEANUP_FD int fd = openat(d->fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_int_equal(fd_write_full(fd, text, strlen(text)), 0);
}

static bool there(struct dir *d, const char *name)
{
    struct stat st;
    return fstatat(d->fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static size_t entries(struct dir *d)
{
    size_t n = 0;
    DIR *dir = opendir(d->path);
    for (const struct dirent *e; (e = readdir(dir));)
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(dir);
    return n;
}

// ---- descriptors ------------------------------------------------------------------------------------------------------
static void closing_keeps_errno_and_forgets(void **state)
{
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const int number = fd;
    errno = EXDEV;
    fd_close(&fd);
    assert_int_equal(fd, -1);
    assert_int_equal(errno, EXDEV);
    assert_int_equal(fcntl(number, F_GETFD), -1);
    errno = EXDEV;
    fd_close(&fd); // again
    assert_int_equal(errno, EXDEV);
    int fd2 = open("/dev/null", O_RDONLY | O_CLOEXEC);
    {
        CLEANUP_FD int kept = fd2, gone = dup(fd2);
        fd2 = gone;
        assert_true(fd_steal(&kept) >= 0);
        assert_int_equal(kept, -1);
    }
    assert_int_equal(fcntl(fd2, F_GETFD), -1);
    assert_int_equal(fcntl(number, F_GETFD), FD_CLOEXEC); // the stolen one, under the first free number
    close(number);
}

static void stealing_memory(void **state)
{
    char *p = strdup("mine");
    char *q = STEAL(p);
    assert_null(p);
    assert_string_equal(q, "mine");
    free(q);
}

static void flags(void **state)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    for (int i = 0; i < 2; i++) { // twice is once
        assert_int_equal(fd_set_nonblock(ends[0], true), 0);
        assert_int_equal(fd_set_cloexec(ends[0], true), 0);
        assert_true(fcntl(ends[0], F_GETFL) & O_NONBLOCK);
        assert_true(fcntl(ends[0], F_GETFD) & FD_CLOEXEC);
    }
    assert_int_equal(fd_set_nonblock(ends[0], false), 0);
    assert_int_equal(fd_set_cloexec(ends[0], false), 0);
    assert_false(fcntl(ends[0], F_GETFL) & O_NONBLOCK);
    assert_false(fcntl(ends[0], F_GETFD) & FD_CLOEXEC);
    close(ends[0]);
    close(ends[1]);
    assert_int_equal(fd_set_nonblock(-1, true), -1);
    assert_int_equal(errno, EBADF);
}

static void open_descriptors_are_counted(void **state)
{
    const int before = fd_count_open();
    assert_true(before >= 3);
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_int_equal(fd_count_open(), before + 1);
    fd_close(&fd);
    assert_int_equal(fd_count_open(), before);
}

// ---- exact reads and writes -------------------------------------------------------------------------------------------
struct writer {
    int fd;
    const uint8_t *data;
    size_t len;
    int failed;
};

static void *write_in_pieces(void *arg)
{
    struct writer *w = arg;
    for (size_t at = 0, step = 1; at < w->len; at += step, step = step % 5000 + 1) {
        if (step > w->len - at)
            step = w->len - at;
        w->failed |= fd_write_full(w->fd, w->data + at, step);
    }
    close(w->fd);
    return NULL;
}

static void reads_through_short_counts(void **state)
{
    static uint8_t data[300000], got[300000];
    int ends[2];
    pthread_t thread;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 7 + i / 256);
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    struct writer w = {ends[1], data, sizeof data, 0};
    assert_int_equal(pthread_create(&thread, NULL, write_in_pieces, &w), 0);
    assert_int_equal(fd_read_full(ends[0], got, sizeof got), 0);
    pthread_join(thread, NULL);
    assert_int_equal(w.failed, 0);
    assert_memory_equal(got, data, sizeof data);
    assert_int_equal(fd_read_full(ends[0], got, 0), 0);
    assert_int_equal(fd_read_full(ends[0], got, 1), -1); // the end
    assert_int_equal(errno, EIO);
    close(ends[0]);
}

static void an_early_end_is_an_error(void **state)
{
    struct dir *d = *state;
    char got[10];
    put(d, "file", "12345");
    CLEANUP_FD int fd = openat(d->fd, "file", O_RDWR | O_CLOEXEC);
    assert_int_equal(fd_read_full(fd, got, 6), -1);
    assert_int_equal(errno, EIO);
    assert_int_equal(fd_pread_full(fd, got, 3, 2), 0);
    assert_memory_equal(got, "345", 3);
    assert_int_equal(fd_pread_full(fd, got, 3, 3), -1);
    assert_int_equal(errno, EIO);
    assert_int_equal(fd_pwrite_full(fd, "xyz", 3, 4), 0);
    assert_int_equal(fd_pread_full(fd, got, 7, 0), 0);
    assert_memory_equal(got, "1234xyz", 7);
    CLEANUP_FD int read_only = openat(d->fd, "file", O_RDONLY | O_CLOEXEC);
    assert_int_equal(fd_write_full(read_only, "x", 1), -1);
    assert_int_equal(errno, EBADF);
    assert_int_equal(fd_pwrite_full(read_only, "x", 1, 0), -1);
}

// ---- whole files ------------------------------------------------------------------------------------------------------
static void a_file_up_to_the_buffer_s_maximum(void **state)
{
    struct dir *d = *state;
    static const size_t SIZES[] = {0, 1, 65535, 65536, 65537, 200000};
    char *text = malloc(200001);
    memset(text, 'f', 200000);
    text[200000] = 0;
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES; i++) {
        CLEANUP_BUF struct buf exact = BUF_INIT(SIZES[i]), more = BUF_INIT(300000), after = BUF_INIT(300000);
        put(d, "file", text + 200000 - SIZES[i]);
        assert_int_equal(fd_read_file(d->fd, "file", &exact), 0);
        assert_int_equal(exact.len, SIZES[i]);
        assert_int_equal(fd_read_file(d->fd, "file", &more), 0);
        assert_int_equal(more.len, SIZES[i]);
        assert_string_equal(buf_text(&more), text + 200000 - SIZES[i]);
        buf_adds(&after, "before:");
        assert_int_equal(fd_read_file(d->fd, "file", &after), 0);
        assert_int_equal(after.len, 7 + SIZES[i]);
        if (SIZES[i] == 0)
            continue;
        CLEANUP_BUF struct buf less = BUF_INIT(SIZES[i] - 1);
        assert_int_equal(fd_read_file(d->fd, "file", &less), -1);
        assert_int_equal(errno, EFBIG);
    }
    free(text);
    CLEANUP_BUF struct buf b = BUF_INIT(10);
    assert_int_equal(fd_read_file(d->fd, "missing", &b), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(fd_read_file(d->fd, ".", &b), -1);
    assert_int_equal(errno, EISDIR);
}

static void atomic_replacement(void **state)
{
    struct dir *d = *state;
    struct stat first, second;
    CLEANUP_BUF struct buf b = BUF_INIT(100);
    const mode_t mask = umask(077); // the mode is what was asked for, whatever the mask
    assert_int_equal(fd_write_file_atomic(d->fd, "file", "one", 3, 0644), 0);
    umask(mask);
    assert_int_equal(fstatat(d->fd, "file", &first, 0), 0);
    assert_int_equal(first.st_mode & 07777, 0644);
    CLEANUP_FD int reader = openat(d->fd, "file", O_RDONLY | O_CLOEXEC);
    assert_int_equal(fd_write_file_atomic(d->fd, "file", "second", 6, 0600), 0);
    assert_int_equal(fstatat(d->fd, "file", &second, 0), 0);
    assert_true(first.st_ino != second.st_ino);
    assert_int_equal(second.st_mode & 07777, 0600);
    assert_int_equal(fd_read_file(d->fd, "file", &b), 0);
    assert_string_equal(buf_text(&b), "second");
    char old[4] = "";
    assert_int_equal(fd_read_full(reader, old, 3), 0); // who has the old one open keeps it whole
    assert_string_equal(old, "one");
    assert_int_equal(fd_write_file_atomic(d->fd, "empty", "", 0, 0600), 0);
    assert_int_equal(entries(d), 2);
}

static void a_failed_replacement_leaves_the_old_file_and_no_other(void **state)
{
    struct dir *d = *state;
    CLEANUP_BUF struct buf b = BUF_INIT(100);
    put(d, "file", "old");
    assert_int_equal(mkdirat(d->fd, "taken", 0700), 0);
    put(d, "taken/x", "");
    assert_int_equal(fd_write_file_atomic(d->fd, "taken", "new", 3, 0600), -1); // a directory stands there
    assert_int_equal(errno, EISDIR);
    assert_int_equal(entries(d), 2);
    assert_int_equal(fd_write_file_atomic(d->fd, "no/such/file", "new", 3, 0600), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(entries(d), 2);
    // No room: a limit on the size of files, in a child, as it counts for the whole process.
    const pid_t child = fork();
    if (child == 0) {
        static char large[100000];
        const struct rlimit limit = {50000, 50000};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        const int failed = fd_write_file_atomic(d->fd, "file", large, sizeof large, 0600);
        _exit(failed == -1 && errno == EFBIG ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(entries(d), 2);
    assert_int_equal(fd_read_file(d->fd, "file", &b), 0);
    assert_string_equal(buf_text(&b), "old");
}

static void a_symlink_is_replaced_not_followed(void **state)
{
    struct dir *d = *state;
    struct stat st;
    CLEANUP_BUF struct buf b = BUF_INIT(100);
    put(d, "target", "untouched");
    assert_int_equal(symlinkat("target", d->fd, "link"), 0);
    assert_int_equal(fd_write_file_atomic(d->fd, "link", "new", 3, 0600), 0);
    assert_int_equal(fstatat(d->fd, "link", &st, AT_SYMLINK_NOFOLLOW), 0);
    assert_true(S_ISREG(st.st_mode));
    assert_int_equal(fd_read_file(d->fd, "target", &b), 0);
    assert_string_equal(buf_text(&b), "untouched");
}

struct replacer {
    struct dir *d;
    char text[5001];
    int failed;
};

static void *replace_often(void *arg)
{
    struct replacer *r = arg;
    for (int i = 0; i < 30; i++)
        r->failed |= fd_write_file_atomic(r->d->fd, "shared", r->text, 5000, 0600);
    return NULL;
}

static void a_reader_sees_one_version(void **state)
{
    struct dir *d = *state;
    struct replacer r[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        r[i] = (struct replacer){.d = d};
        memset(r[i].text, 'a' + i, 5000);
    }
    assert_int_equal(fd_write_file_atomic(d->fd, "shared", r[0].text, 5000, 0600), 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, replace_often, &r[i]), 0);
    for (int i = 0; i < 200; i++) {
        CLEANUP_BUF struct buf b = BUF_INIT(10000);
        assert_int_equal(fd_read_file(d->fd, "shared", &b), 0);
        assert_int_equal(b.len, 5000);
        for (size_t k = 1; k < 5000; k++)
            assert_int_equal(b.data[k], b.data[0]);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(r[i].failed, 0);
    }
    assert_int_equal(entries(d), 1);
}

// ---- directories ------------------------------------------------------------------------------------------------------
static void directories_are_made_on_the_way(void **state)
{
    struct dir *d = *state;
    char path[200];
    struct stat st;
    snprintf(path, sizeof path, "%s/a/b/c", d->path);
    assert_int_equal(fd_mkdirs(path, 0700), 0);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0700);
    snprintf(path, sizeof path, "%s/a/b", d->path);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0700, 0700);
    assert_int_equal(fd_mkdirs(path, 0700), 0); // it is there
    put(d, "file", "");
    snprintf(path, sizeof path, "%s/file", d->path);
    assert_int_equal(fd_mkdirs(path, 0700), -1);
    assert_int_equal(errno, ENOTDIR);
    snprintf(path, sizeof path, "%s/file/below", d->path);
    assert_int_equal(fd_mkdirs(path, 0700), -1);
    assert_int_equal(errno, ENOTDIR);
    assert_int_equal(fd_mkdirs("", 0700), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(fd_mkdirs("/", 0700), 0);
    char *deep = malloc(5000);
    memset(deep, 'd', 4999);
    deep[4999] = 0;
    assert_int_equal(fd_mkdirs(deep, 0700), -1);
    assert_int_equal(errno, ENAMETOOLONG);
    free(deep);
}

static void a_tree_is_removed_and_counted(void **state)
{
    struct dir *d = *state;
    uint64_t bytes = 5;
    struct stat st;
    char text[9000];
    memset(text, 't', sizeof text - 1);
    text[sizeof text - 1] = 0;
    assert_int_equal(mkdirat(d->fd, "tree", 0700), 0);
    assert_int_equal(mkdirat(d->fd, "tree/sub", 0700), 0);
    assert_int_equal(mkdirat(d->fd, "tree/empty", 0700), 0);
    put(d, "tree/one", text);
    put(d, "tree/sub/two", text);
    assert_int_equal(fstatat(d->fd, "tree/one", &st, 0), 0);
    assert_int_equal(fd_remove_tree(d->fd, "tree", &bytes), 0);
    assert_int_equal(bytes, 5 + 2 * (uint64_t)st.st_blocks * 512); // added to what was there
    assert_false(there(d, "tree"));
    assert_int_equal(fd_remove_tree(d->fd, "tree", &bytes), 0); // nothing there is fine
    put(d, "file", "x");
    assert_int_equal(fd_remove_tree(d->fd, "file", NULL), 0);
    assert_false(there(d, "file"));
}

static void symlinks_are_removed_not_followed(void **state)
{
    struct dir *d = *state;
    assert_int_equal(mkdirat(d->fd, "outside", 0700), 0);
    put(d, "outside/kept", "");
    assert_int_equal(mkdirat(d->fd, "tree", 0700), 0);
    assert_int_equal(symlinkat("../outside", d->fd, "tree/link"), 0);
    assert_int_equal(symlinkat("tree", d->fd, "itself"), 0);
    assert_int_equal(symlinkat("nowhere", d->fd, "tree/broken"), 0);
    assert_int_equal(fd_remove_tree(d->fd, "itself", NULL), 0); // the link alone
    assert_true(there(d, "tree"));
    assert_int_equal(fd_remove_tree(d->fd, "tree", NULL), 0);
    assert_false(there(d, "tree"));
    assert_true(there(d, "outside/kept"));
}

// A tree of any depth costs neither stack nor descriptors: past a bound it is refused.
static void a_deep_tree(void **state)
{
    struct dir *d = *state;
    for (int depth = 200; depth <= 400; depth += 200) {
        CLEANUP_FD int at = dup(d->fd);
        for (int i = 0; i < depth; i++) {
            assert_int_equal(mkdirat(at, "d", 0700), 0);
            const int next = openat(at, "d", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            fd_close(&at);
            at = next;
        }
        fd_close(&at);
        const int before = fd_count_open();
        assert_int_equal(fd_remove_tree(d->fd, "d", NULL), depth == 200 ? 0 : -1);
        assert_int_equal(fd_count_open(), before);
        assert_true(there(d, "d") == (depth > 200));
    }
    // For the teardown: half of it to another place first.
    CLEANUP_FD int half = dup(d->fd);
    for (int i = 0; i < 199; i++) {
        const int next = openat(half, "d", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        fd_close(&half);
        half = next;
    }
    assert_int_equal(renameat(half, "d", d->fd, "second"), 0);
    fd_close(&half);
    assert_int_equal(fd_remove_tree(d->fd, "d", NULL), 0);
    assert_int_equal(fd_remove_tree(d->fd, "second", NULL), 0);
}

// ---- sockets ----------------------------------------------------------------------------------------------------------
static void sockets_below_a_long_path(void **state)
{
    struct dir *d = *state;
    char path[400], got[5] = "";
    const int n = snprintf(path, sizeof path, "%s/", d->path);
    memset(path + n, 'p', 200); // longer than a socket's address may be
    path[n + 200] = 0;
    assert_int_equal(mkdir(path, 0700), 0);
    CLEANUP_FD int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CLEANUP_FD int listening = fd_unix_listen(dir, "socket", 4);
    assert_true(listening >= 0);
    assert_true(fcntl(listening, F_GETFD) & FD_CLOEXEC);
    CLEANUP_FD int client = fd_unix_connect(dir, "socket");
    assert_true(client >= 0);
    assert_true(fcntl(client, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(client, F_GETFL) & O_NONBLOCK);
    CLEANUP_FD int server = accept(listening, NULL, NULL);
    assert_int_equal(fd_write_full(client, "word", 4), 0);
    assert_int_equal(fd_read_full(server, got, 4), 0);
    assert_string_equal(got, "word");
}

static void an_old_socket_is_replaced(void **state)
{
    struct dir *d = *state;
    int old = fd_unix_listen(d->fd, "socket", 4);
    assert_true(old >= 0);
    fd_close(&old);
    assert_true(there(d, "socket")); // its name stays
    assert_int_equal(fd_unix_connect(d->fd, "socket"), -1);
    assert_int_equal(errno, ECONNREFUSED);
    CLEANUP_FD int listening = fd_unix_listen(d->fd, "socket", 4), client = fd_unix_connect(d->fd, "socket");
    assert_true(listening >= 0 && client >= 0);
    assert_int_equal(fd_unix_connect(d->fd, "missing"), -1);
    assert_int_equal(errno, ENOENT);
    char name[200];
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    assert_int_equal(fd_unix_listen(d->fd, name, 4), -1);
    assert_int_equal(errno, ENAMETOOLONG);
    assert_int_equal(fd_unix_connect(d->fd, name), -1);
    assert_int_equal(errno, ENAMETOOLONG);
}

static void a_full_backlog_does_not_block(void **state)
{
    struct dir *d = *state;
    CLEANUP_FD int listening = fd_unix_listen(d->fd, "socket", 1);
    int clients[64], n = 0;
    while (n < 64 && (clients[n] = fd_unix_connect(d->fd, "socket")) >= 0)
        n++;
    assert_true(n > 0 && n < 64);
    assert_int_equal(errno, EAGAIN);
    while (n > 0)
        close(clients[--n]);
    assert_true(listening >= 0);
}

static void free_bytes(void **state)
{
    struct dir *d = *state;
    struct statvfs v;
    assert_int_equal(fstatvfs(d->fd, &v), 0);
    const int64_t n = fd_free_bytes(d->fd);
    assert_true(n > 0);
    assert_true(n <= (int64_t)(v.f_blocks * v.f_frsize));
    assert_int_equal(n % (int64_t)v.f_frsize, 0);
    assert_int_equal(fd_free_bytes(-1), -1);
    assert_int_equal(errno, EBADF);
}

// A server that is killed while a child of it is between fork and exec leaves its lock to that child for a moment.
static void a_lock_that_a_child_still_holds(void **state)
{
    struct dir *d = *state;
    int told[2];
    char byte;
    assert_int_equal(pipe(told), 0);
    const int mine = openat(d->fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    const int other = openat(d->fd, "lock", O_RDWR | O_CLOEXEC);
    assert_true(mine >= 0 && other >= 0);
    assert_int_equal(fd_lock(mine, 0), 0);
    const pid_t child = fork();
    if (child == 0) {
        close(other);
        (void)!read(told[0], &byte, 1); // with its own copy of `mine`
        usleep(50000);
        _exit(0);
    }
    close(mine);
    assert_int_equal(fd_lock(other, 20), -1);
    assert_int_equal(errno, EWOULDBLOCK);
    assert_int_equal(write(told[1], "x", 1), 1);
    assert_int_equal(fd_lock(other, 10000), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
    close(other);
    close(told[0]);
    close(told[1]);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(closing_keeps_errno_and_forgets),
        cmocka_unit_test(stealing_memory),
        cmocka_unit_test(flags),
        cmocka_unit_test(open_descriptors_are_counted),
        cmocka_unit_test(reads_through_short_counts),
        TEST(an_early_end_is_an_error),
        TEST(a_file_up_to_the_buffer_s_maximum),
        TEST(atomic_replacement),
        TEST(a_failed_replacement_leaves_the_old_file_and_no_other),
        TEST(a_symlink_is_replaced_not_followed),
        TEST(a_reader_sees_one_version),
        TEST(directories_are_made_on_the_way),
        TEST(a_tree_is_removed_and_counted),
        TEST(symlinks_are_removed_not_followed),
        TEST(a_deep_tree),
        TEST(sockets_below_a_long_path),
        TEST(an_old_socket_is_replaced),
        TEST(a_full_backlog_does_not_block),
        TEST(a_lock_that_a_child_still_holds),
        TEST(free_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
