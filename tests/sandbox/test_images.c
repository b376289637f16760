// The image directory: what index.json says, what a blob must be, and what the writing commands leave behind.
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
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "sandbox/images.h"

struct fixture {
    char path[64], file[96]; // the image directory; a file beside it to add
    int dirfd;
    struct images *im;
    struct err err;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->path, "/tmp/airlock-images.XXXXXX");
    if (!mkdtemp(x->path))
        return -1;
    snprintf(x->file, sizeof x->file, "%s.file", x->path);
    x->dirfd = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    x->im = images_open(x->dirfd, &x->err);
    *state = x;
    return x->im ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    images_free(x->im);
    images_free(NULL);
    fd_close(&x->dirfd);
    (void)unlink(x->file);
    const int failed = fd_remove_tree(AT_FDCWD, x->path, NULL);
    free(x);
    return failed;
}

#define assert_fault(x, k, c)                                                                                          \
    do {                                                                                                               \
        assert_int_equal((x)->err.kind, (k));                                                                          \
        assert_string_equal((x)->err.code, (c));                                                                       \
        (x)->err = (struct err){0};                                                                                    \
    } while (0)

// A file with this content; its digest.
static const char *file_with(struct fixture *x, const char *content, char digest[DIGEST_TEXT_MAX])
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int fd = open(x->file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_int_equal(fd_write_full(fd, content, strlen(content)), 0);
    crypto_sha256(content, strlen(content), hash);
    crypto_digest_text(hash, digest);
    return x->file;
}

static void add(struct fixture *x, const char *name, const char *content, char digest[DIGEST_TEXT_MAX])
{
    char got[DIGEST_TEXT_MAX];
    assert_int_equal(images_add(x->dirfd, name, file_with(x, content, digest), got, &x->err), 0);
    assert_string_equal(got, digest);
}

static void blob_path(const char *digest, char out[static 96])
{
    snprintf(out, 96, "blobs/sha256/%s", digest + 7);
}

static void index_is(struct fixture *x, const char *text)
{
    assert_int_equal(fd_write_file_atomic(x->dirfd, "index.json", text, strlen(text), 0644), 0);
}

static bool there(struct fixture *x, const char *digest)
{
    char path[96];
    struct stat st;
    blob_path(digest, path);
    return fstatat(x->dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

// ---- reading the index ------------------------------------------------------------------------------------------------
static void an_empty_directory_has_no_runtime(void **state)
{
    struct fixture *x = *state;
    struct image_ref ref;
    struct image_runtime runtime;
    assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), -1);
    assert_true(x->err.remedy[0] != 0);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
    assert_int_equal(images_runtime(x->im, &runtime, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
}

static void names_and_digests_resolve(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX], other[DIGEST_TEXT_MAX], text[300];
    struct image_ref ref;
    const int64_t before = clock_wall_ms();
    add(x, "debian", "root one", digest);
    add(x, "alpine", "root two", other);
    assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), 0);
    assert_string_equal(ref.name, "debian");
    assert_string_equal(ref.digest, digest);
    assert_int_equal(ref.bytes, 8);
    assert_true(ref.created_at_ms >= before - 1000 && ref.created_at_ms <= clock_wall_ms() + 1000);
    snprintf(text, sizeof text, "debian@%s", digest);
    assert_int_equal(images_resolve(x->im, text, &ref, &x->err), 0);
    assert_int_equal(images_resolve(x->im, other, &ref, &x->err), 0); // by digest alone
    assert_string_equal(ref.name, "alpine");
    snprintf(text, sizeof text, "debian@%s", other);
    assert_int_equal(images_resolve(x->im, text, &ref, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "digest_mismatch");
    assert_int_equal(images_resolve(x->im, "fedora", &ref, &x->err), -1);
    assert_non_null(strstr(x->err.detail, "fedora"));
    assert_fault(x, ERR_ADMISSION_FAILED, "image_not_found");
    assert_int_equal(images_resolve(x->im, "debia", &ref, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "image_not_found");
    assert_int_equal(images_resolve(x->im, "", &ref, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "image_not_found");
}

static void bad_digests_are_named_as_such(void **state)
{
    static const char *const BAD[] = {
        "sha256:", "sha256:abc", "debian@", "debian@sha256:", "debian@md5:00000000000000000000000000000000",
        "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b8555",
        "sha256:../../../../../../../../../../../../../../../../../../../etc/passwd",
        "debian@sha256:g3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    };
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX];
    struct image_ref ref;
    add(x, "debian", "root", digest);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        assert_int_equal(images_resolve(x->im, BAD[i], &ref, &x->err), -1);
        assert_fault(x, ERR_ADMISSION_FAILED, "bad_digest");
        assert_int_equal(images_open_blob(x->im, BAD[i], &x->err), -1);
        assert_fault(x, ERR_ADMISSION_FAILED, "bad_digest");
    }
    assert_int_equal(images_open_blob(x->im, "", &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "bad_digest");
}

static void an_index_that_is_none(void **state)
{
    static const struct {
        const char *text;
        enum err_kind kind;
        const char *code;
    } CASES[] = {
        {"", ERR_VALIDATION, "malformed_json"},
        {"{\"format\": 1", ERR_VALIDATION, "malformed_json"},
        {"{\"format\": 1, \"format\": 1}", ERR_VALIDATION, "malformed_json"},
        {"{\"images\": {}}", ERR_UNAVAILABLE, "image_format"},
        {"{\"format\": 2, \"images\": {}}", ERR_UNAVAILABLE, "image_format"},
        {"{\"format\": \"1\"}", ERR_UNAVAILABLE, "image_format"},
        {"[]", ERR_UNAVAILABLE, "image_format"},
        {"null", ERR_UNAVAILABLE, "image_format"},
        {"{\"format\": 1}", ERR_ADMISSION_FAILED, "image_not_found"},
        {"{\"format\": 1, \"images\": []}", ERR_ADMISSION_FAILED, "image_not_found"},
        {"{\"format\": 1, \"images\": {\"debian\": null}}", ERR_ADMISSION_FAILED, "image_not_found"},
        {"{\"format\": 1, \"images\": {\"debian\": {\"digest\": 5}}}", ERR_ADMISSION_FAILED, "image_not_found"},
    };
    struct fixture *x = *state;
    struct image_ref ref;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        index_is(x, CASES[i].text);
        assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), -1);
        assert_fault(x, CASES[i].kind, CASES[i].code);
    }
}

static void a_changed_index_is_read_again(void **state)
{
    struct fixture *x = *state;
    char one[DIGEST_TEXT_MAX], two[DIGEST_TEXT_MAX];
    struct image_ref ref;
    add(x, "debian", "root one", one);
    assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), 0);
    assert_string_equal(ref.digest, one);
    add(x, "debian", "root two", two); // the name moves on
    assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), 0);
    assert_string_equal(ref.digest, two);
    assert_int_equal(unlinkat(x->dirfd, "index.json", 0), 0);
    assert_int_equal(images_resolve(x->im, "debian", &ref, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
}

static bool collect(void *arg, const struct image_ref *ref)
{
    buf_addf(arg, "%s %s\n", ref->name, ref->digest);
    return true;
}

static bool only_first(void *arg, const struct image_ref *ref)
{
    (void)ref;
    return ++*(int *)arg < 1;
}

static void each_image_is_listed(void **state)
{
    struct fixture *x = *state;
    char one[DIGEST_TEXT_MAX], two[DIGEST_TEXT_MAX], want[300];
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    int n = 0;
    assert_int_equal(images_each(x->im, collect, &b, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
    add(x, "a", "root one", one);
    add(x, "b", "root two", two);
    assert_int_equal(images_each(x->im, collect, &b, &x->err), 0);
    snprintf(want, sizeof want, "a %s\nb %s\n", one, two);
    assert_string_equal(buf_text(&b), want);
    assert_int_equal(images_each(x->im, only_first, &n, &x->err), 0);
    assert_int_equal(n, 1);
}

static void the_runtime_in_force(void **state)
{
    struct fixture *x = *state;
    char kernel[DIGEST_TEXT_MAX], initramfs[DIGEST_TEXT_MAX], other[96];
    struct image_runtime runtime;
    snprintf(other, sizeof other, "%s.file2", x->path);
    CLEANUP_FD int fd = open(other, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    uint8_t hash[SHA256_BYTES];
    assert_int_equal(fd_write_full(fd, "the initramfs", 13), 0);
    crypto_sha256("the initramfs", 13, hash);
    crypto_digest_text(hash, initramfs);
    assert_int_equal(images_set_runtime(x->dirfd, file_with(x, "the kernel", kernel), other, "6.1.0-44", &x->err), 0);
    assert_int_equal(unlink(other), 0);
    assert_int_equal(images_runtime(x->im, &runtime, &x->err), 0);
    assert_string_equal(runtime.kernel_digest, kernel);
    assert_string_equal(runtime.initramfs_digest, initramfs);
    assert_string_equal(runtime.kernel_version, "6.1.0-44");
    CLEANUP_FD int blob = images_open_blob(x->im, kernel, &x->err);
    assert_true(blob >= 0);
    index_is(x, "{\"format\": 1, \"runtime\": {\"kernel\": {\"digest\": \"sha256:x\"}}}"); // no initramfs
    assert_int_equal(images_runtime(x->im, &runtime, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
}

// ---- blobs ------------------------------------------------------------------------------------------------------------
static void a_blob_is_opened_read_only(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX], text[32] = "", path[96];
    struct stat st;
    add(x, "debian", "the root", digest);
    blob_path(digest, path);
    assert_int_equal(fstatat(x->dirfd, path, &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0444);
    CLEANUP_FD int fd = images_open_blob(x->im, digest, &x->err), again = images_open_blob(x->im, digest, &x->err);
    assert_true(fd >= 0 && again >= 0);
    assert_int_equal(fd_read_full(fd, text, 8), 0);
    assert_string_equal(text, "the root");
    assert_int_equal(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
}

static void a_missing_blob(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX], path[96];
    add(x, "debian", "the root", digest);
    blob_path(digest, path);
    assert_int_equal(unlinkat(x->dirfd, path, 0), 0);
    assert_int_equal(images_open_blob(x->im, digest, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "blob_missing");
}

static void a_blob_is_a_file_of_its_own(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX], path[96];
    add(x, "debian", "the root", digest);
    blob_path(digest, path);
    assert_int_equal(unlinkat(x->dirfd, path, 0), 0);
    // A symlink to a file with the very content is none.
    char same[DIGEST_TEXT_MAX];
    assert_int_equal(symlinkat(file_with(x, "the root", same), x->dirfd, path), 0);
    assert_int_equal(images_open_blob(x->im, digest, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "blob_missing");
    assert_int_equal(unlinkat(x->dirfd, path, 0), 0);
    assert_int_equal(mkdirat(x->dirfd, path, 0755), 0);
    assert_int_equal(images_open_blob(x->im, digest, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "blob_missing");
}

// Changed content of the same length: found before the first use, and after one too.
static void a_changed_blob_is_found(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX], path[96];
    add(x, "debian", "the root", digest);
    blob_path(digest, path);
    CLEANUP_FD int good = images_open_blob(x->im, digest, &x->err);
    assert_true(good >= 0);
    struct stat st;
    assert_int_equal(fstat(good, &st), 0);
    assert_int_equal(fchmodat(x->dirfd, path, 0644, 0), 0);
    CLEANUP_FD int fd = openat(x->dirfd, path, O_WRONLY | O_CLOEXEC);
    assert_int_equal(fd_pwrite_full(fd, "The", 3, 0), 0);
    const struct timespec later[2] = {st.st_mtim, {st.st_mtim.tv_sec + 10, 0}};
    assert_int_equal(futimens(fd, later), 0);
    assert_int_equal(images_open_blob(x->im, digest, &x->err), -1);
    assert_null(strstr(x->err.detail, x->path)); // no path of the host
    assert_fault(x, ERR_ADMISSION_FAILED, "blob_corrupt");
    assert_int_equal(fd_pwrite_full(fd, "the", 3, 0), 0); // and it may be mended
    assert_int_equal(futimens(fd, later), 0);
    CLEANUP_FD int mended = images_open_blob(x->im, digest, &x->err);
    assert_true(mended >= 0);
}

static void more_blobs_than_are_remembered(void **state)
{
    enum { N = 70 };
    struct fixture *x = *state;
    char digest[N][DIGEST_TEXT_MAX], name[16], content[32];
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "image%d", i);
        snprintf(content, sizeof content, "content %d", i);
        add(x, name, content, digest[i]);
    }
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < N; i++) {
            CLEANUP_FD int fd = images_open_blob(x->im, digest[i], &x->err);
            assert_true(fd >= 0);
        }
}

// ---- writing ----------------------------------------------------------------------------------------------------------
static void names_of_images(void **state)
{
    static const char *const BAD[] = {"", ".", "..", ".hidden", "-flag", "UPPER", "a/b", "../x", "a b", "a\nb", "ä", "a@b",
                                      "sha256:x",
                                      "a2345678901234567890123456789012345678901234567890123456789012345"},
                             *const GOOD[] = {"a", "0", "_", "debian-12.5_slim",
                                              "a234567890123456789012345678901234567890123456789012345678901234"};
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX];
    struct image_ref ref;
    (void)file_with(x, "root", digest);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        assert_int_equal(images_add(x->dirfd, BAD[i], x->file, NULL, &x->err), -1);
        assert_fault(x, ERR_VALIDATION, "name_invalid");
    }
    struct stat st;
    assert_int_equal(fstatat(x->dirfd, "index.json", &st, 0), -1); // nothing was written
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        assert_int_equal(images_add(x->dirfd, GOOD[i], x->file, NULL, &x->err), 0);
        assert_int_equal(images_resolve(x->im, GOOD[i], &ref, &x->err), 0);
    }
}

static void adding_keeps_what_is_there(void **state)
{
    struct fixture *x = *state;
    char one[DIGEST_TEXT_MAX], same[DIGEST_TEXT_MAX];
    struct image_ref ref;
    add(x, "a", "root", one);
    add(x, "b", "root", same); // the same content is one blob under two names
    assert_string_equal(one, same);
    assert_int_equal(images_resolve(x->im, "a", &ref, &x->err), 0);
    assert_int_equal(images_resolve(x->im, "b", &ref, &x->err), 0);
    assert_int_equal(images_add(x->dirfd, "c", "/does/not/exist", NULL, &x->err), -1);
    assert_null(strstr(x->err.detail, "/does/not"));
    assert_fault(x, ERR_INTERNAL, "system_error");
    assert_int_equal(images_resolve(x->im, "c", &ref, &x->err), -1);
    x->err = (struct err){0};
    // An index that cannot be read is not overwritten.
    index_is(x, "{\"format\": 9}");
    assert_int_equal(images_add(x->dirfd, "d", x->file, NULL, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "image_format");
    CLEANUP_BUF struct buf b = BUF_INIT(100);
    assert_int_equal(fd_read_file(x->dirfd, "index.json", &b), 0);
    assert_string_equal(buf_text(&b), "{\"format\": 9}");
}

static void a_large_file_arrives_whole(void **state)
{
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX];
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    for (unsigned i = 0; b.len < 300000; i++)
        buf_addf(&b, "%u ", i);
    add(x, "large", buf_text(&b), digest);
    CLEANUP_FD int fd = images_open_blob(x->im, digest, &x->err);
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_size, b.len);
}

static void a_removed_name_and_its_blob(void **state)
{
    struct fixture *x = *state;
    char a[DIGEST_TEXT_MAX], b[DIGEST_TEXT_MAX], kernel[DIGEST_TEXT_MAX];
    uint64_t bytes = 99;
    struct image_ref ref;
    add(x, "a", "root a", a);
    add(x, "b", "root b, a longer one", b);
    assert_int_equal(images_set_runtime(x->dirfd, file_with(x, "kernel", kernel), x->file, "6.1", &x->err), 0);
    assert_int_equal(images_prune(x->dirfd, &bytes, &x->err), 0);
    assert_int_equal(bytes, 0);
    assert_int_equal(images_remove(x->dirfd, "nobody", &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "image_not_found");
    assert_int_equal(images_remove(x->dirfd, "b", &x->err), 0);
    assert_int_equal(images_resolve(x->im, "b", &ref, &x->err), -1);
    assert_fault(x, ERR_ADMISSION_FAILED, "image_not_found");
    assert_true(there(x, b)); // until it is pruned
    assert_int_equal(images_prune(x->dirfd, &bytes, &x->err), 0);
    assert_int_equal(bytes, strlen("root b, a longer one"));
    assert_false(there(x, b));
    assert_true(there(x, a) && there(x, kernel));
}

// Without an index nobody knows what is in use: nothing is removed.
static void no_pruning_without_an_index(void **state)
{
    struct fixture *x = *state;
    char a[DIGEST_TEXT_MAX];
    uint64_t bytes;
    add(x, "a", "root a", a);
    index_is(x, "not JSON");
    assert_int_equal(images_prune(x->dirfd, &bytes, &x->err), -1);
    assert_fault(x, ERR_VALIDATION, "malformed_json");
    assert_int_equal(unlinkat(x->dirfd, "index.json", 0), 0);
    assert_int_equal(images_prune(x->dirfd, &bytes, &x->err), -1);
    assert_fault(x, ERR_UNAVAILABLE, "runtime_missing");
    assert_true(there(x, a));
}

static bool note(void *arg, const char *what, const char *digest, bool ok)
{
    (void)digest;
    buf_addf(arg, "%s %s\n", what, ok ? "good" : "bad");
    return true;
}

static void verify_looks_at_every_blob(void **state)
{
    struct fixture *x = *state;
    char a[DIGEST_TEXT_MAX], b[DIGEST_TEXT_MAX], kernel[DIGEST_TEXT_MAX], path[96];
    CLEANUP_BUF struct buf said = BUF_INIT(4096);
    add(x, "a", "root a", a);
    add(x, "b", "root b", b);
    assert_int_equal(images_set_runtime(x->dirfd, file_with(x, "kernel", kernel), x->file, "6.1", &x->err), 0);
    assert_int_equal(images_verify(x->dirfd, note, &said, &x->err), 0);
    assert_string_equal(buf_text(&said), "initramfs good\nkernel good\na good\nb good\n");
    blob_path(a, path);
    assert_int_equal(unlinkat(x->dirfd, path, 0), 0);
    blob_path(b, path);
    assert_int_equal(fchmodat(x->dirfd, path, 0644, 0), 0);
    CLEANUP_FD int fd = openat(x->dirfd, path, O_WRONLY | O_CLOEXEC);
    assert_int_equal(fd_pwrite_full(fd, "R", 1, 0), 0);
    buf_clear(&said);
    assert_int_equal(images_verify(x->dirfd, note, &said, &x->err), -1);
    assert_string_equal(buf_text(&said), "initramfs good\nkernel good\na bad\nb bad\n");
    assert_non_null(strstr(x->err.detail, "2 blobs"));
    assert_fault(x, ERR_ADMISSION_FAILED, "blob_corrupt");
}

// Two processes write at once: the lock file keeps both names.
static void writers_do_not_lose_each_other_s_names(void **state)
{
    enum { EACH = 15 };
    struct fixture *x = *state;
    char digest[DIGEST_TEXT_MAX];
    (void)file_with(x, "root", digest);
    const pid_t child = fork();
    for (int i = 0; i < EACH; i++) {
        char name[16];
        struct err err = {0};
        snprintf(name, sizeof name, "%s%d", child ? "parent" : "child", i);
        const int failed = images_add(x->dirfd, name, x->file, NULL, &err);
        if (child)
            assert_int_equal(failed, 0);
        else if (failed)
            _exit(1);
    }
    if (!child)
        _exit(0);
    int status, n = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 16);
    assert_int_equal(images_each(x->im, collect, &b, &x->err), 0);
    for (const char *at = buf_text(&b); (at = strchr(at, '\n')); at++)
        n++;
    assert_int_equal(n, 2 * EACH);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_empty_directory_has_no_runtime),
        TEST(names_and_digests_resolve),
        TEST(bad_digests_are_named_as_such),
        TEST(an_index_that_is_none),
        TEST(a_changed_index_is_read_again),
        TEST(each_image_is_listed),
        TEST(the_runtime_in_force),
        TEST(a_blob_is_opened_read_only),
        TEST(a_missing_blob),
        TEST(a_blob_is_a_file_of_its_own),
        TEST(a_changed_blob_is_found),
        TEST(more_blobs_than_are_remembered),
        TEST(names_of_images),
        TEST(adding_keeps_what_is_there),
        TEST(a_large_file_arrives_whole),
        TEST(a_removed_name_and_its_blob),
        TEST(no_pruning_without_an_index),
        TEST(verify_looks_at_every_blob),
        TEST(writers_do_not_lose_each_other_s_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
