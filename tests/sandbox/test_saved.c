// A saved state on disk: what was written is believed, and everything else is named.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "sandbox/saved.h"

enum { EPOCH = 7 };

struct fixture {
    char path[64];
    int top;
    struct store *store;
    char manifest[DIGEST_TEXT_MAX];
    struct err err;
};

static void put(int dirfd, const char *name, const char *text)
{
    CLEANUP_FD int fd = openat(dirfd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(fd_write_full(fd, text, strlen(text)), 0);
}

static json_t *machine(void)
{
    return json_pack("{s:i}", "memory_mib", 1);
}

// Two runs of pages, device state, a disk with a hole, the output of one command.
static void save(struct fixture *x, int64_t epoch, struct saved_result *ret)
{
    struct saved_writer w = {0};
    struct ram_runs runs = {0};
    uint8_t pages[3 * RAM_PAGE];
    CLEANUP_JSON json_t *m = machine();
    const struct saved_facts f = {.kind = "snapshot", .id = "one", .epoch = epoch, .template_key = "", .template_manifest = "",
                                  .machine = m};
    memset(pages, 0x5a, sizeof pages);
    assert_int_equal(ram_runs_add(&runs, 0, 1), 0);
    assert_int_equal(ram_runs_add(&runs, 4 * RAM_PAGE, 2), 0);
    assert_int_equal(saved_begin(x->store, x->top, "one", true, &w, &x->err), 0);
    assert_int_equal(fd_write_full(w.state_fd, "device state", 12), 0);
    assert_int_equal(ftruncate(w.disk_fd, 64 * 1024), 0);
    assert_int_equal(fd_pwrite_full(w.disk_fd, "block", 5, 40 * 1024), 0);
    assert_int_equal(mkdirat(w.dirfd, "spool", 0700), 0);
    put(w.dirfd, "spool/cmd.stdout", "to stdout\n");
    put(w.dirfd, "spool/cmd.order", "order");
    assert_int_equal(saved_finish(&w, &f, &runs, pages, ret, &x->err), 0);
    ram_runs_free(&runs);
}

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    struct saved_result r = {0};
    strcpy(x->path, "/tmp/airlock-saved.XXXXXX");
    if (!mkdtemp(x->path))
        return -1;
    x->top = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const struct store_options o = {.state_dirfd = x->top, .server_version = "test"};
    x->store = store_open(&o, &x->err);
    save(x, EPOCH, &r);
    strcpy(x->manifest, r.manifest_sha256);
    json_decref(r.sizes);
    json_decref(r.digests);
    *state = x;
    return x->store ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    store_close(x->store);
    (void)fd_remove_tree(AT_FDCWD, x->path, NULL);
    fd_close(&x->top);
    free(x);
    return 0;
}

// The fields of what is wrong, one after the other.
static const char *verify(struct fixture *x, char *out, size_t cap)
{
    struct saved s = {0};
    CLEANUP_JSON json_t *mismatches = json_array();
    const struct saved_expect e = {.kind = "snapshot", .id = "one", .manifest_sha256 = x->manifest, .epoch = EPOCH};
    size_t i;
    json_t *one;
    assert_int_equal(saved_open(x->store, x->top, "one", &e, &s, mismatches, &x->err), 0);
    if (json_array_size(mismatches) == 0)
        assert_int_equal(saved_verify(&s, mismatches, &x->err), 0);
    saved_close(&s);
    *out = 0;
    json_array_foreach(mismatches, i, one)
        snprintf(out + strlen(out), cap - strlen(out), "%s%s=%s", i ? " " : "", json_get_str(one, "field"),
                 strncmp(json_get_str(one, "found"), "sha256:", 7) == 0 ? "differs" : json_get_str(one, "found"));
    return out;
}

#define assert_verdict(x, want)                                                                                         \
    do {                                                                                                                \
        char got_[600];                                                                                                 \
        assert_string_equal(verify(x, got_, sizeof got_), want);                                                        \
    } while (0)

static void test_whole(void **state)
{
    struct fixture *x = *state;
    struct saved_result r = {0};
    assert_verdict(x, "");
    save(x, EPOCH, &r); // the same again: every byte of the manifest, too
    assert_string_equal(r.manifest_sha256, x->manifest);
    static const char *const NAMES[] = {"memory_bytes", "state_bytes", "disk_bytes", "spool/cmd.stdout", "spool/cmd.order"};
    int64_t sum = 0;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        assert_non_null(json_get_str(r.digests, NAMES[i]));
        sum += json_get_int(r.sizes, NAMES[i], -1000000);
    }
    assert_int_equal(sum, r.bytes);
    assert_int_equal(json_object_size(r.sizes), sizeof NAMES / sizeof *NAMES);
    json_decref(r.sizes);
    json_decref(r.digests);
    assert_verdict(x, "");
}

static const char *const FILES[] = {"state", "memory", "disk.raw", "spool/cmd.stdout", "spool/cmd.order"};

static void flip(struct fixture *x, const char *path, off_t at)
{
    uint8_t byte;
    CLEANUP_FD int fd = openat(x->top, path, O_RDWR | O_CLOEXEC);
    assert_int_equal(fd_pread_full(fd, &byte, 1, at), 0);
    byte ^= 1;
    assert_int_equal(fd_pwrite_full(fd, &byte, 1, at), 0);
}

static void test_flipped_bits(void **state)
{
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char path[64], want[64];
        struct stat st;
        snprintf(path, sizeof path, "one/%s", FILES[i]);
        snprintf(want, sizeof want, "%s=differs", FILES[i]);
        assert_int_equal(fstatat(x->top, path, &st, 0), 0);
        const off_t at[] = {0, st.st_size / 2, st.st_size - 1};
        for (size_t k = 0; k < 3; k++) {
            flip(x, path, at[k]);
            assert_verdict(x, want);
            flip(x, path, at[k]);
            assert_verdict(x, "");
        }
    }
    flip(x, "one/manifest.json", 0);
    assert_verdict(x, "manifest=differs");
    flip(x, "one/manifest.json", 0);
    flip(x, "one/manifest.json", 12);
    char got[600];
    assert_non_null(strstr(verify(x, got, sizeof got), "manifest=differs"));
}

static void test_missing_and_other_things(void **state)
{
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char path[64], want[64];
        snprintf(path, sizeof path, "one/%s", FILES[i]);
        assert_int_equal(renameat(x->top, path, x->top, "aside"), 0);
        snprintf(want, sizeof want, "%s=missing", FILES[i]);
        assert_verdict(x, want);
        snprintf(want, sizeof want, "%s=not a file", FILES[i]);
        assert_int_equal(symlinkat("aside", x->top, path), 0);
        assert_verdict(x, want);
        assert_int_equal(unlinkat(x->top, path, 0), 0);
        assert_int_equal(mkfifoat(x->top, path, 0600), 0); // which would be waited for
        assert_verdict(x, want);
        assert_int_equal(unlinkat(x->top, path, 0), 0);
        assert_int_equal(renameat(x->top, "aside", x->top, path), 0);
    }
    assert_verdict(x, "");
}

static void test_sizes(void **state)
{
    struct fixture *x = *state;
    CLEANUP_FD int fd = openat(x->top, "one/spool/cmd.stdout", O_RDWR | O_CLOEXEC);
    assert_int_equal(ftruncate(fd, 11), 0);
    assert_verdict(x, "spool/cmd.stdout=11 bytes");
    assert_int_equal(ftruncate(fd, 0), 0);
    assert_verdict(x, "spool/cmd.stdout=0 bytes");
    CLEANUP_FD int disk = openat(x->top, "one/disk.raw", O_RDWR | O_CLOEXEC);
    assert_int_equal(ftruncate(disk, (off_t)1 << 40), 0); // which nobody wants to read
    assert_verdict(x, "disk.raw=1099511627776 bytes spool/cmd.stdout=0 bytes");
}

static void test_unexpected(void **state)
{
    struct fixture *x = *state;
    struct saved_signature before, after;
    CLEANUP_FD int dir = openat(x->top, "one", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    saved_sign(dir, &before);
    put(x->top, "one/spool/\xff\n", "");
    saved_sign(dir, &after);
    assert_memory_not_equal(&before, &after, sizeof before);
    assert_verdict(x, "spool/\?\?=unexpected");
    assert_int_equal(unlinkat(x->top, "one/spool/\xff\n", 0), 0);
    saved_sign(dir, &after);
    assert_memory_equal(&before, &after, sizeof before);
    put(x->top, "one/more", "");
    assert_verdict(x, "more=unexpected");
    assert_int_equal(unlinkat(x->top, "one/more", 0), 0);
    assert_int_equal(renameat(x->top, "one/spool", x->top, "aside"), 0);
    assert_int_equal(symlinkat("../aside", x->top, "one/spool"), 0); // the right files, by a link
    char got[600];
    assert_non_null(strstr(verify(x, got, sizeof got), "spool=unexpected"));
}

// Bytes that this thread has asked read() for.
static unsigned long long bytes_read(void)
{
    char text[512] = "";
    unsigned long long n = 0;
    CLEANUP_FD int fd = open("/proc/thread-self/io", O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0 && read(fd, text, sizeof text - 1) > 0);
    assert_int_equal(sscanf(text, "rchar: %llu", &n), 1);
    return n;
}

static void settle(const struct fixture *x)
{
    CLEANUP_FD int dir = openat(x->top, "one", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct saved_signature now;
    saved_sign(dir, &now);
    while (clock_wall_ms() - now.changed_ms < 200) // more than the granularity of change times that is reckoned with
        nanosleep(&(struct timespec){0, 5000000}, NULL);
}

static bool read_memory(struct fixture *x, const char *want)
{
    const unsigned long long before = bytes_read();
    assert_verdict(x, want);
    return bytes_read() - before >= 3ull * RAM_PAGE; // the rest, the manifest with it, is less
}

static void test_remembered(void **state)
{
    struct fixture *x = *state;
    assert_true(read_memory(x, "")); // just written: another change may have the same time
    settle(x);
    assert_true(read_memory(x, ""));
    assert_false(read_memory(x, ""));
    flip(x, "one/memory", -1 + 3 * RAM_PAGE);
    assert_true(read_memory(x, "memory=differs"));
    settle(x);
    assert_true(read_memory(x, "memory=differs"));
    assert_false(read_memory(x, "memory=differs"));
    flip(x, "one/memory", -1 + 3 * RAM_PAGE);
    put(x->top, "one/more", "");
    settle(x);
    assert_true(read_memory(x, "more=unexpected"));
    assert_false(read_memory(x, "more=unexpected"));
    assert_int_equal(unlinkat(x->top, "one/more", 0), 0);
    struct saved s = {0};
    CLEANUP_JSON json_t *mismatches = json_array();
    const struct saved_expect e = {.kind = "snapshot", .id = "one", .manifest_sha256 = x->manifest, .epoch = EPOCH};
    assert_int_equal(saved_open(x->store, x->top, "one", &e, &s, mismatches, &x->err), 0);
    saved_verified(&s); // as its loading says
    saved_close(&s);
    assert_false(read_memory(x, ""));
}

// An older writing has a good seal.
static void test_older(void **state)
{
    struct fixture *x = *state;
    struct saved_result r = {0};
    save(x, EPOCH - 1, &r);
    json_decref(r.sizes);
    json_decref(r.digests);
    assert_verdict(x, "manifest=differs epoch=6");
}

static void test_own_disk(void **state)
{
    struct fixture *x = *state;
    struct saved_writer w = {0};
    struct saved_result r = {0};
    struct saved s = {0};
    const struct ram_runs none = {0};
    CLEANUP_JSON json_t *m = machine(), *mismatches = json_array();
    const struct saved_facts f = {.kind = "cold", .id = "two", .epoch = 1, .template_key = "", .template_manifest = "", .machine = m};
    const struct saved_expect e = {.kind = "cold", .id = "two", .epoch = 1};
    put(x->top, "disk", "what the guest wrote");
    CLEANUP_FD int disk = openat(x->top, "disk", O_RDWR | O_CLOEXEC);
    assert_int_equal(saved_begin(x->store, x->top, "two", false, &w, &x->err), 0);
    w.own_disk_fd = fcntl(disk, F_DUPFD_CLOEXEC, 3);
    assert_int_equal(saved_finish(&w, &f, &none, "", &r, &x->err), 0);
    json_decref(r.sizes);
    json_decref(r.digests);
    assert_int_equal(saved_open(x->store, x->top, "two", &e, &s, mismatches, &x->err), 0);
    assert_int_equal(saved_verify_own_disk(&s, disk, mismatches, &x->err), 0);
    assert_int_equal(json_array_size(mismatches), 0);
    flip(x, "disk", 3);
    assert_int_equal(saved_verify_own_disk(&s, disk, mismatches, &x->err), 0);
    assert_int_equal(ftruncate(disk, 4), 0);
    assert_int_equal(saved_verify_own_disk(&s, disk, mismatches, &x->err), 0);
    assert_int_equal(json_array_size(mismatches), 2);
    assert_string_equal(json_get_str(json_array_get(mismatches, 0), "field"), "disk.raw");
    saved_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_whole, setup, teardown),
        cmocka_unit_test_setup_teardown(test_flipped_bits, setup, teardown),
        cmocka_unit_test_setup_teardown(test_missing_and_other_things, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unexpected, setup, teardown),
        cmocka_unit_test_setup_teardown(test_remembered, setup, teardown),
        cmocka_unit_test_setup_teardown(test_older, setup, teardown),
        cmocka_unit_test_setup_teardown(test_own_disk, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
