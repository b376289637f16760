#include "sandbox/saved.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "qemu/vm.h"
#include "sandbox/saved_int.h"
#include "store/seal.h"

#define MANIFEST_MAX (4u << 20)
#define VERIFIED_MAX 64
#define VERDICTS_MAX 512
#define MISMATCHES_MAX 100
#define RACY_MS 50 // a change this young and the next may have one time: the kernel's clock ticks every 1 to 10 ms

void saved_mismatch(json_t *mismatches, const char *field, const char *expected, const char *found)
{
    json_t *one = json_array_size(mismatches) < MISMATCHES_MAX ? json_object() : NULL;
    if (!one)
        return;
    json_put_str(one, "field", field);
    json_put_str(one, "expected", expected);
    json_put_str(one, "found", found);
    json_array_append_new(mismatches, one);
}

// ---- what is there ------------------------------------------------------------------------------------------------------
int saved_each_in(int dirfd, const char *sub, saved_file_fn fn, void *arg)
{
    CLEANUP_FD int fd = openat(dirfd, *sub ? sub : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    int failed = d ? 0 : -1;
    if (d)
        (void)fd_steal(&fd);
    for (const struct dirent *e; !failed && (e = readdir(d));) {
        char path[SAVED_PATH_MAX];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || (!*sub && strcmp(e->d_name, "spool") == 0))
            continue;
        snprintf(path, sizeof path, "%s%s%s", sub, *sub ? "/" : "", e->d_name);
        failed = fn(arg, dirfd, path);
    }
    if (d)
        closedir(d);
    return failed;
}

// Of a saved state: its directory and spool/. A spool that is no directory counts as a file.
static int each_file(int dirfd, saved_file_fn fn, void *arg)
{
    struct stat st;
    const int failed = saved_each_in(dirfd, "", fn, arg);
    if (failed || fstatat(dirfd, "spool", &st, AT_SYMLINK_NOFOLLOW) != 0)
        return failed;
    return S_ISDIR(st.st_mode) ? saved_each_in(dirfd, "spool", fn, arg) : fn(arg, dirfd, "spool");
}

// Each file's hash is added to the others' (exclusive or): the order in which a directory lists them is nothing.
static int sign_file(void *arg, int dirfd, const char *path)
{
    struct saved_signature *sum = arg;
    struct stat st;
    char text[SAVED_PATH_MAX + 160];
    uint8_t hash[SHA256_BYTES];
    if (fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) != 0)
        memset(&st, 0, sizeof st);
    const int64_t changed = (int64_t)st.st_ctim.tv_sec * 1000 + st.st_ctim.tv_nsec / 1000000;
    if (changed > sum->changed_ms)
        sum->changed_ms = changed;
    const int n = snprintf(text, sizeof text, "%s %llu %llu %o %lld %lld %ld", path, (unsigned long long)st.st_dev,
                           (unsigned long long)st.st_ino, st.st_mode, (long long)st.st_size, (long long)st.st_ctim.tv_sec,
                           st.st_ctim.tv_nsec);
    crypto_sha256(text, (size_t)n, hash);
    for (size_t i = 0; i < sizeof hash; i++)
        sum->v[i] ^= hash[i];
    return 0;
}

void saved_sign(int dirfd, struct saved_signature *ret)
{
    memset(ret, 0, sizeof *ret);
    if (each_file(dirfd, sign_file, ret) != 0)
        memset(ret, 0, sizeof *ret);
}

// ---- the disk: verified once per inode and change time -----------------------------------------------------------------
struct verified {
    dev_t dev;
    ino_t ino;
    struct timespec changed;
    off_t size;
    uint8_t hash[SHA256_BYTES];
};
static pthread_mutex_t verified_lock = PTHREAD_MUTEX_INITIALIZER;
static struct verified verified[VERIFIED_MAX];
static unsigned next_verified;

static bool verified_find(const struct stat *st, uint8_t out[SHA256_BYTES])
{
    bool found = false;
    pthread_mutex_lock(&verified_lock);
    for (unsigned i = 0; i < VERIFIED_MAX && !found; i++) {
        const struct verified *v = &verified[i];
        found = v->ino == st->st_ino && v->dev == st->st_dev && v->size == st->st_size &&
                v->changed.tv_sec == st->st_ctim.tv_sec && v->changed.tv_nsec == st->st_ctim.tv_nsec;
        if (found)
            memcpy(out, v->hash, SHA256_BYTES);
    }
    pthread_mutex_unlock(&verified_lock);
    return found;
}

static void verified_add(const struct stat *st, const uint8_t hash[SHA256_BYTES])
{
    struct verified v = {st->st_dev, st->st_ino, st->st_ctim, st->st_size, {0}};
    memcpy(v.hash, hash, SHA256_BYTES);
    pthread_mutex_lock(&verified_lock);
    verified[next_verified++ % VERIFIED_MAX] = v;
    pthread_mutex_unlock(&verified_lock);
}

int saved_disk_hash(int fd, uint8_t out[SHA256_BYTES], struct err *err)
{
    struct stat before, after;
    const int64_t now = clock_wall_ms();
    if (fstat(fd, &before) != 0)
        return err_sys(err, errno, "reading a disk");
    if (verified_find(&before, out))
        return 0;
    if (ram_sparse_digest(fd, out, NULL, err) != 0)
        return -1;
    const int64_t changed = (int64_t)before.st_ctim.tv_sec * 1000 + before.st_ctim.tv_nsec / 1000000;
    if (fstat(fd, &after) == 0 && memcmp(&before.st_ctim, &after.st_ctim, sizeof after.st_ctim) == 0 && now - changed > RACY_MS)
        verified_add(&after, out);
    return 0;
}

// ---- what was found of a whole directory: once per signature ------------------------------------------------------------
struct verdict {
    struct saved_signature signature;
    json_t *mismatches;        // NULL: none is kept here
};
static pthread_mutex_t verdicts_lock = PTHREAD_MUTEX_INITIALIZER;
static struct verdict verdicts[VERDICTS_MAX];
static unsigned next_verdict;

// Under the lock.
static struct verdict *verdict_of(const struct saved_signature *signature)
{
    for (unsigned i = 0; i < VERDICTS_MAX; i++)
        if (verdicts[i].mismatches && memcmp(&verdicts[i].signature, signature, sizeof *signature) == 0)
            return &verdicts[i];
    return NULL;
}

static bool verdict_find(const struct saved *s, json_t **ret_mismatches)
{
    pthread_mutex_lock(&verdicts_lock);
    const struct verdict *v = s->settled ? verdict_of(&s->signature) : NULL;
    json_t *found = v ? json_deep_copy(v->mismatches) : NULL;
    pthread_mutex_unlock(&verdicts_lock);
    if (found)
        *ret_mismatches = found;
    return found;
}

// Nothing where a file was touched while it was read, or so shortly before that another change may not show.
static void verdict_add(const struct saved *s, const json_t *mismatches)
{
    struct saved_signature now;
    saved_sign(s->dirfd, &now);
    if (!s->settled || memcmp(&now, &s->signature, sizeof now) != 0)
        return;
    pthread_mutex_lock(&verdicts_lock);
    struct verdict *v = verdict_of(&now);
    if (!v)
        v = &verdicts[next_verdict++ % VERDICTS_MAX];
    json_decref(v->mismatches);
    *v = (struct verdict){now, json_deep_copy(mismatches)};
    pthread_mutex_unlock(&verdicts_lock);
}

void saved_verified(const struct saved *s)
{
    CLEANUP_JSON json_t *none = json_array();
    verdict_add(s, none);
}

// ---- reading ----------------------------------------------------------------------------------------------------------
static bool check_seal(struct store *store, json_t *manifest, json_t *mismatches)
{
    const char *told = json_get_str(manifest, "seal");
    CLEANUP_FREE char *seal = told ? strdup(told) : NULL;
    (void)json_object_del(manifest, "seal");
    CLEANUP_FREE char *text = json_canonical(manifest);
    if (text && store_seal_ok(store, text, strlen(text), seal))
        return true;
    saved_mismatch(mismatches, "seal", "made by this server", "different");
    return false;
}

static void check_word(const json_t *manifest, const char *key, const char *expected, json_t *mismatches)
{
    const char *found = json_get_str(manifest, key);
    if (expected && (!found || strcmp(found, expected) != 0))
        saved_mismatch(mismatches, key, expected, found ? found : "none");
}

static void check_epoch(const json_t *manifest, int64_t expected, json_t *mismatches)
{
    char want[24], have[24];
    const int64_t found = json_get_int(manifest, "epoch", -1);
    snprintf(want, sizeof want, "%lld", (long long)expected);
    snprintf(have, sizeof have, "%lld", (long long)found);
    if (found != expected)
        saved_mismatch(mismatches, "epoch", want, have);
}

// Whatever stands there under that name: 0 with its text; 1: not a manifest; -1: nothing, or it cannot be read.
static int read_manifest(int dirfd, struct buf *text, struct err *err)
{
    struct stat st;
    if (fstatat(dirfd, "manifest.json", &st, AT_SYMLINK_NOFOLLOW) != 0)
        return errno == ENOENT ? err_set(err, ERR_NOT_FOUND, "saved_missing", "the saved state is not there")
                               : err_sys(err, errno, "reading a manifest");
    if (!S_ISREG(st.st_mode) || st.st_size > MANIFEST_MAX)
        return 1;
    return fd_read_file(dirfd, "manifest.json", text) == 0 ? 0 : err_sys(err, errno, "reading a manifest");
}

static void check_manifest(struct store *store, const struct buf *text, const struct saved_expect *expect, struct saved *s,
                           json_t *mismatches)
{
    uint8_t hash[SHA256_BYTES];
    struct err bad = {0};
    crypto_sha256(text->data, text->len, hash);
    crypto_digest_text(hash, s->manifest_sha256);
    if (expect->manifest_sha256 && strcmp(expect->manifest_sha256, s->manifest_sha256) != 0)
        saved_mismatch(mismatches, "manifest", expect->manifest_sha256, s->manifest_sha256);
    json_t *manifest = json_parse_strict(buf_text(text), text->len, &bad);
    if (!manifest || !check_seal(store, manifest, mismatches)) {
        if (!manifest && json_array_size(mismatches) == 0)
            saved_mismatch(mismatches, "manifest", "as written", "no JSON");
        json_decref(manifest);
        return;
    }
    check_word(manifest, "kind", expect->kind, mismatches);
    check_word(manifest, "id", expect->id, mismatches);
    check_epoch(manifest, expect->epoch, mismatches);
    json_decref(s->manifest);
    s->manifest = manifest;
}

int saved_open(struct store *store, int parent_dirfd, const char *name, const struct saved_expect *expect,
               struct saved *ret, json_t *mismatches, struct err *err)
{
    CLEANUP_BUF struct buf text = BUF_INIT(MANIFEST_MAX);
    CLEANUP_FD int dirfd = openat(parent_dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (dirfd < 0)
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP
                   ? err_set(err, ERR_NOT_FOUND, "saved_missing", "the saved state is not there")
                   : err_sys(err, errno, "opening a saved state");
    struct saved s = {.manifest = json_object()};
    const int64_t now = clock_wall_ms();
    saved_sign(dirfd, &s.signature);
    s.settled = s.signature.changed_ms > 0 && now - s.signature.changed_ms > RACY_MS;
    const int read = read_manifest(dirfd, &text, err);
    if (read == 0)
        check_manifest(store, &text, expect, &s, mismatches);
    else if (read > 0)
        saved_mismatch(mismatches, "manifest", "as written", "not a manifest");
    if (read < 0 || !s.manifest) {
        json_decref(s.manifest);
        return read < 0 ? -1 : err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    }
    s.dirfd = fd_steal(&dirfd);
    *ret = s;
    return 0;
}

void saved_close(struct saved *s)
{
    if (s->manifest)
        fd_close(&s->dirfd);
    json_decref(s->manifest);
    s->manifest = NULL;
}

static const json_t *told_of(const struct saved *s, const char *name)
{
    return json_object_get(json_object_get(s->manifest, "files"), name);
}

// Compares a hash with what the manifest says of the file. False: differs, and is told.
static bool same_digest(const json_t *told, const char *name, const uint8_t hash[SHA256_BYTES], json_t *mismatches)
{
    char digest[DIGEST_TEXT_MAX];
    const char *expected = json_get_str(told, "sha256");
    crypto_digest_text(hash, digest);
    if (expected && strcmp(expected, digest) == 0)
        return true;
    saved_mismatch(mismatches, name, expected ? expected : "none", digest);
    return false;
}

static bool same_size(const json_t *told, const char *name, int64_t bytes, json_t *mismatches)
{
    char want[40], have[40];
    const int64_t expected = json_get_int(told, "bytes", -1);
    if (expected == bytes)
        return true;
    snprintf(want, sizeof want, "%lld bytes", (long long)expected);
    snprintf(have, sizeof have, "%lld bytes", (long long)bytes);
    saved_mismatch(mismatches, name, want, have);
    return false;
}

// A regular file of the size that the manifest says. -2: it is not, and is told; -1 with err. (A FIFO is not waited for.)
static int open_file(const struct saved *s, const char *name, json_t *mismatches, struct err *err)
{
    struct stat st;
    CLEANUP_FD int fd = openat(s->dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR && errno != ELOOP)
        return err_sys(err, errno, "opening a file of a saved state");
    if (fd < 0) {
        saved_mismatch(mismatches, name, "present", errno == ELOOP ? "not a file" : "missing");
        return -2;
    }
    if (fstat(fd, &st) != 0)
        return err_sys(err, errno, "reading a file of a saved state");
    if (S_ISREG(st.st_mode))
        return same_size(told_of(s, name), name, st.st_size, mismatches) ? fd_steal(&fd) : -2;
    saved_mismatch(mismatches, name, "present", "not a file");
    return -2;
}

// 0 also where it differs, which is told.
static int verify_plain(const struct saved *s, const char *name, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int fd = open_file(s, name, mismatches, err);
    if (fd < 0)
        return fd == -1 ? -1 : 0;
    if (crypto_sha256_fd(fd, hash, NULL, err) != 0)
        return -1;
    (void)same_digest(told_of(s, name), name, hash, mismatches);
    return 0;
}

int saved_open_disk(const struct saved *s, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int fd = open_file(s, "disk.raw", mismatches, err);
    if (fd < 0)
        return fd;
    if (saved_disk_hash(fd, hash, err) != 0)
        return -1;
    return same_digest(told_of(s, "disk.raw"), "disk.raw", hash, mismatches) ? fd_steal(&fd) : -2;
}

int saved_verify_own_disk(const struct saved *s, int disk_fd, json_t *mismatches, struct err *err)
{
    const json_t *told = json_object_get(s->manifest, "own_disk");
    uint8_t hash[SHA256_BYTES];
    struct stat st;
    if (fstat(disk_fd, &st) != 0)
        return err_sys(err, errno, "reading a disk");
    if (!same_size(told, "disk.raw", st.st_size, mismatches))
        return 0;
    if (saved_disk_hash(disk_fd, hash, err) != 0)
        return -1;
    (void)same_digest(told, "disk.raw", hash, mismatches);
    return 0;
}

// ---- loading ----------------------------------------------------------------------------------------------------------
// A sealed copy in memory, hashed as it is copied: what QEMU reads is what was checked.
static int load_state(const struct saved *s, int *ret_fd, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_BUF struct buf b = BUF_INIT(VM_STATE_MAX);
    CLEANUP_FD int there = open_file(s, "state", mismatches, err);
    if (there < 0)
        return there == -1 ? -1 : 0;
    if (fd_read_file(s->dirfd, "state", &b) != 0)
        return err_sys(err, errno, "reading device state");
    crypto_sha256(b.data, b.len, hash);
    if (!same_digest(told_of(s, "state"), "state", hash, mismatches))
        return 0;
    CLEANUP_FD int fd = memfd_create("airlock-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || fd_write_full(fd, b.data, b.len) != 0 || ram_seal(fd, err) != 0)
        return err_sys(err, errno, "keeping device state");
    *ret_fd = fd_steal(&fd);
    return 0;
}

// What ram_file_load or ram_file_read said of a file that is as long as the manifest says.
static int memory_said(const struct saved *s, int failed, const uint8_t hash[SHA256_BYTES], json_t *mismatches, struct err *err)
{
    if (failed && err->kind != ERR_CONFLICT)
        return -1;
    if (failed) {
        memset(err, 0, sizeof *err); // not even its form is right
        saved_mismatch(mismatches, "memory", "as written", "malformed");
        return 0;
    }
    (void)same_digest(told_of(s, "memory"), "memory", hash, mismatches);
    return 0;
}

int saved_load(const struct saved *s, int ram_fd, uint64_t ram_bytes, struct ram_runs *ret_runs, int *ret_state_fd,
               json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int memory = open_file(s, "memory", mismatches, err);
    if (memory == -1 || load_state(s, ret_state_fd, mismatches, err) != 0)
        return -1;
    if (memory < 0)
        return 0;
    const int failed = ram_file_load(memory, ram_fd, ram_bytes, hash, ret_runs, err);
    return memory_said(s, failed, hash, mismatches, err);
}

int saved_load_apart(const struct saved *s, uint64_t ram_bytes, struct ram_runs *ret_runs, void **ret_pages,
                     size_t *ret_mapped, int *ret_state_fd, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int memory = open_file(s, "memory", mismatches, err);
    if (memory == -1 || load_state(s, ret_state_fd, mismatches, err) != 0)
        return -1;
    if (memory < 0)
        return 0;
    const int failed = ram_file_read(memory, ram_bytes, hash, ret_runs, ret_pages, ret_mapped, err);
    return memory_said(s, failed, hash, mismatches, err);
}

// ---- comparing alone ----------------------------------------------------------------------------------------------------
struct listing {
    const struct saved *s;
    json_t *mismatches;
};

// A name that is no JSON text is shown with marks in place of what is strange in it.
static int name_unexpected(void *arg, int dirfd, const char *path)
{
    const struct listing *l = arg;
    char shown[SAVED_PATH_MAX];
    (void)dirfd;
    if (strcmp(path, "manifest.json") == 0 || told_of(l->s, path))
        return 0;
    snprintf(shown, sizeof shown, "%s", path);
    for (char *p = shown; *p; p++)
        if (*p < ' ' || *p > '~')
            *p = '?';
    saved_mismatch(l->mismatches, shown, "none", "unexpected");
    return 0;
}

int saved_verify_rest(const struct saved *s, json_t *mismatches, struct err *err)
{
    const char *name;
    json_t *told;
    const struct listing l = {s, mismatches};
    json_object_foreach(json_object_get(s->manifest, "files"), name, told) {
        if (strcmp(name, "state") == 0 || strcmp(name, "memory") == 0 || strcmp(name, "disk.raw") == 0)
            continue;
        if (verify_plain(s, name, mismatches, err) != 0)
            return -1;
    }
    return each_file(s->dirfd, name_unexpected, (void *)&l) == 0 ? 0 : err_sys(err, errno, "listing a saved state");
}

static int verify_all(const struct saved *s, json_t *mismatches, struct err *err)
{
    if (verify_plain(s, "memory", mismatches, err) != 0 || verify_plain(s, "state", mismatches, err) != 0)
        return -1;
    if (told_of(s, "disk.raw")) {
        CLEANUP_FD int disk = saved_open_disk(s, mismatches, err);
        if (disk == -1)
            return -1;
    }
    return saved_verify_rest(s, mismatches, err);
}

int saved_verify(const struct saved *s, json_t *mismatches, struct err *err)
{
    CLEANUP_JSON json_t *found = NULL;
    if (!verdict_find(s, &found)) {
        found = json_array();
        if (!found)
            return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        if (verify_all(s, found, err) != 0)
            return -1;
        verdict_add(s, found);
    }
    size_t i;
    json_t *one;
    json_array_foreach(found, i, one)
        if (json_array_size(mismatches) < MISMATCHES_MAX)
            json_array_append(mismatches, one);
    return 0;
}
