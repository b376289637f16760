#include "sandbox/saved.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/buf.h"
#include "base/json.h"
#include "base/log.h"
#include "store/seal.h"

#define MANIFEST_MAX (4u << 20)
#define STATE_MAX (64u << 20) // device state is some 20 KiB; KVM adds little
#define VERIFIED_MAX 64

static int no_room(struct err *err, int code, const char *what)
{
    if (code == ENOSPC || code == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the saved state");
    return err_sys(err, code, "%s", what);
}

void saved_mismatch(json_t *mismatches, const char *field, const char *expected, const char *found)
{
    json_t *one = json_object();
    json_put_str(one, "field", field);
    json_put_str(one, "expected", expected);
    json_put_str(one, "found", found);
    json_array_append_new(mismatches, one);
}

// ---- writing ----------------------------------------------------------------------------------------------------------
static int make_file(int dirfd, const char *name, struct err *err)
{
    const int fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    return fd >= 0 ? fd : no_room(err, errno, "making a file of a saved state");
}

static const char *temporary(const struct saved_writer *w, char out[static 100])
{
    snprintf(out, 100, ".%s", w->name);
    return out;
}

int saved_begin(struct store *store, int parent_dirfd, const char *name, bool with_disk, struct saved_writer *ret,
                struct err *err)
{
    struct saved_writer w = {.store = store, .parent_dirfd = parent_dirfd, .dirfd = -1, .state_fd = -1, .disk_fd = -1};
    char hidden[100];
    snprintf(w.name, sizeof w.name, "%s", name);
    temporary(&w, hidden);
    (void)fd_remove_tree(parent_dirfd, hidden, NULL); // of an attempt that was cut short
    if (mkdirat(parent_dirfd, hidden, 0700) != 0)
        return no_room(err, errno, "making the directory of a saved state");
    w.dirfd = openat(parent_dirfd, hidden, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (w.dirfd < 0) {
        err_sys(err, errno, "opening the directory of a saved state");
    } else if ((w.state_fd = make_file(w.dirfd, "state", err)) >= 0 &&
               (!with_disk || (w.disk_fd = make_file(w.dirfd, "disk.raw", err)) >= 0)) {
        *ret = w;
        return 0;
    }
    saved_abort(&w);
    return -1;
}

static void writer_close(struct saved_writer *w)
{
    fd_close(&w->state_fd);
    fd_close(&w->disk_fd);
    fd_close(&w->dirfd);
}

void saved_abort(struct saved_writer *w)
{
    char hidden[100];
    if (!*w->name)
        return;
    writer_close(w);
    if (fd_remove_tree(w->parent_dirfd, temporary(w, hidden), NULL) != 0)
        log_warn("saved state %s: what was half written could not be removed", w->name);
    w->name[0] = 0;
}

static void note_file(json_t *files, struct saved_result *r, const char *name, const char *shown,
                      const uint8_t hash[SHA256_BYTES], int fd)
{
    char digest[DIGEST_TEXT_MAX];
    struct stat st = {0};
    (void)fstat(fd, &st);
    json_t *one = json_object();
    crypto_digest_text(hash, digest);
    json_put_str(one, "sha256", digest);
    json_put_int(one, "bytes", st.st_size);
    json_put(files, name, one);
    json_put_str(r->digests, shown, digest);
    json_put_int(r->sizes, shown, (int64_t)st.st_blocks * 512);
    r->bytes += (int64_t)st.st_blocks * 512;
}

// Hashes and syncs what is there. What a full disk refuses late (fsync) is refused here.
static int write_files(struct saved_writer *w, const struct ram_runs *runs, const void *pages, json_t *files,
                       struct saved_result *r, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    uint64_t bytes;
    CLEANUP_FD int memory = make_file(w->dirfd, "memory", err);
    if (memory < 0 || ram_file_write(memory, runs, pages, hash, &bytes, err) != 0)
        return -1;
    if (fsync(memory) != 0)
        return no_room(err, errno, "writing memory");
    note_file(files, r, "memory", "memory_bytes", hash, memory);
    if (crypto_sha256_fd(w->state_fd, hash, NULL, err) != 0)
        return -1;
    if (fsync(w->state_fd) != 0)
        return no_room(err, errno, "writing device state");
    note_file(files, r, "state", "state_bytes", hash, w->state_fd);
    if (w->disk_fd < 0)
        return 0;
    if (ram_sparse_digest(w->disk_fd, hash, NULL, err) != 0)
        return -1;
    if (fsync(w->disk_fd) != 0)
        return no_room(err, errno, "writing the disk");
    note_file(files, r, "disk.raw", "disk_bytes", hash, w->disk_fd);
    return 0;
}

static char *manifest_text(struct store *store, const struct saved_facts *f, json_t *files, struct err *err)
{
    char seal[SHA256_HEX];
    CLEANUP_JSON json_t *m = json_object();
    json_put_int(m, "format", SAVED_FORMAT);
    json_put_str(m, "kind", f->kind);
    json_put_str(m, "id", f->id);
    json_put_int(m, "epoch", f->epoch);
    json_put_str(m, "template", f->template_key);
    json_put(m, "machine", json_deep_copy(f->machine));
    json_put(m, "commands", f->commands ? json_deep_copy(f->commands) : json_array());
    json_put(m, "files", json_incref(files));
    CLEANUP_FREE char *open_text = json_canonical(m);
    if (!open_text) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    if (store_seal(store, open_text, strlen(open_text), seal, err) != 0)
        return NULL;
    json_put_str(m, "seal", seal);
    return json_canonical(m);
}

// Gives the directory its name; a predecessor is moved aside first and removed after.
static int put_in_place(struct saved_writer *w, struct err *err)
{
    char hidden[100], old[104];
    temporary(w, hidden);
    snprintf(old, sizeof old, ".%s.old", w->name);
    (void)fd_remove_tree(w->parent_dirfd, old, NULL);
    const bool had = renameat(w->parent_dirfd, w->name, w->parent_dirfd, old) == 0;
    if (fsync(w->dirfd) != 0 || renameat(w->parent_dirfd, hidden, w->parent_dirfd, w->name) != 0 ||
        fsync(w->parent_dirfd) != 0)
        return no_room(err, errno, "naming a saved state");
    if (had)
        (void)fd_remove_tree(w->parent_dirfd, old, NULL);
    return 0;
}

int saved_finish(struct saved_writer *w, const struct saved_facts *f, const struct ram_runs *runs, const void *pages,
                 struct saved_result *ret, struct err *err)
{
    struct saved_result r = {.sizes = json_object(), .digests = json_object()};
    CLEANUP_JSON json_t *files = json_object();
    CLEANUP_FREE char *text = NULL;
    uint8_t hash[SHA256_BYTES];
    int failed = write_files(w, runs, pages, files, &r, err);
    if (!failed && !(text = manifest_text(w->store, f, files, err)))
        failed = -1;
    if (!failed && fd_write_file_atomic(w->dirfd, "manifest.json", text, strlen(text), 0600) != 0)
        failed = no_room(err, errno, "writing a manifest");
    if (!failed)
        failed = put_in_place(w, err);
    if (failed) {
        json_decref(r.sizes);
        json_decref(r.digests);
        return -1;
    }
    crypto_sha256(text, strlen(text), hash);
    crypto_digest_text(hash, r.manifest_sha256);
    writer_close(w);
    w->name[0] = 0;
    *ret = r;
    return 0;
}

// ---- reading ----------------------------------------------------------------------------------------------------------
static void check_seal(struct store *store, json_t *manifest, json_t *mismatches)
{
    const char *told = json_get_str(manifest, "seal");
    CLEANUP_FREE char *seal = told ? strdup(told) : NULL;
    (void)json_object_del(manifest, "seal");
    CLEANUP_FREE char *text = json_canonical(manifest);
    if (!text || !store_seal_ok(store, text, strlen(text), seal))
        saved_mismatch(mismatches, "seal", "made by this server", "different");
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

int saved_open(struct store *store, int parent_dirfd, const char *name, const struct saved_expect *expect,
               struct saved *ret, json_t *mismatches, struct err *err)
{
    CLEANUP_BUF struct buf text = BUF_INIT(MANIFEST_MAX);
    uint8_t hash[SHA256_BYTES];
    char digest[DIGEST_TEXT_MAX];
    CLEANUP_FD int dirfd = openat(parent_dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (dirfd < 0 || fd_read_file(dirfd, "manifest.json", &text) != 0) {
        if (errno == ENOENT)
            return err_set(err, ERR_NOT_FOUND, "saved_missing", "the saved state is not there");
        return err_sys(err, errno, "reading a manifest");
    }
    struct err bad = {0};
    json_t *manifest = json_parse_strict(buf_text(&text), text.len, &bad);
    if (!manifest) {
        saved_mismatch(mismatches, "manifest", "as written", "no JSON");
        manifest = json_object();
    }
    crypto_sha256(text.data, text.len, hash);
    crypto_digest_text(hash, digest);
    if (expect->manifest_sha256 && strcmp(expect->manifest_sha256, digest) != 0)
        saved_mismatch(mismatches, "manifest", expect->manifest_sha256, digest);
    check_seal(store, manifest, mismatches);
    check_word(manifest, "kind", expect->kind, mismatches);
    check_word(manifest, "id", expect->id, mismatches);
    check_epoch(manifest, expect->epoch, mismatches);
    *ret = (struct saved){fd_steal(&dirfd), manifest};
    return 0;
}

void saved_close(struct saved *s)
{
    if (s->manifest)
        fd_close(&s->dirfd);
    json_decref(s->manifest);
    s->manifest = NULL;
}

// Compares a hash with what the manifest says of the file. False: differs, and is told.
static bool same_digest(const struct saved *s, const char *name, const uint8_t hash[SHA256_BYTES], json_t *mismatches)
{
    char digest[DIGEST_TEXT_MAX];
    const char *told = json_get_str(json_object_get(json_object_get(s->manifest, "files"), name), "sha256");
    crypto_digest_text(hash, digest);
    if (told && strcmp(told, digest) == 0)
        return true;
    saved_mismatch(mismatches, name, told ? told : "none", digest);
    return false;
}

static int open_file(const struct saved *s, const char *name, json_t *mismatches, struct err *err)
{
    const int fd = openat(s->dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd >= 0)
        return fd;
    if (errno != ENOENT)
        return err_sys(err, errno, "opening a file of a saved state");
    saved_mismatch(mismatches, name, "present", "missing");
    return -2;
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

static int sparse_hash(int fd, uint8_t out[SHA256_BYTES], struct err *err)
{
    struct stat before, after;
    if (fstat(fd, &before) != 0)
        return err_sys(err, errno, "reading a disk");
    if (verified_find(&before, out))
        return 0;
    if (ram_sparse_digest(fd, out, NULL, err) != 0)
        return -1;
    if (fstat(fd, &after) == 0 && memcmp(&before.st_ctim, &after.st_ctim, sizeof after.st_ctim) == 0)
        verified_add(&after, out);
    return 0;
}

int saved_open_disk(const struct saved *s, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int fd = open_file(s, "disk.raw", mismatches, err);
    if (fd < 0)
        return fd;
    if (sparse_hash(fd, hash, err) != 0)
        return -1;
    return same_digest(s, "disk.raw", hash, mismatches) ? fd_steal(&fd) : -2;
}

void saved_sign(int dirfd, struct saved_signature *ret)
{
    static const char *const FILES[SAVED_FILES] = {"manifest.json", "state", "memory", "disk.raw"};
    memset(ret, 0, sizeof *ret);
    for (int i = 0; i < SAVED_FILES; i++) {
        struct stat st;
        if (fstatat(dirfd, FILES[i], &st, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        const uint64_t v[5] = {st.st_dev, st.st_ino, (uint64_t)st.st_size, (uint64_t)st.st_ctim.tv_sec,
                               (uint64_t)st.st_ctim.tv_nsec};
        memcpy(ret->v[i], v, sizeof v);
    }
}

// ---- loading ----------------------------------------------------------------------------------------------------------
// A sealed copy in memory, hashed as it is copied: what QEMU reads is what was checked.
static int load_state(const struct saved *s, int *ret_fd, json_t *mismatches, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_BUF struct buf b = BUF_INIT(STATE_MAX);
    if (fd_read_file(s->dirfd, "state", &b) != 0) {
        if (errno != ENOENT)
            return err_sys(err, errno, "reading device state");
        saved_mismatch(mismatches, "state", "present", "missing");
        return 0;
    }
    crypto_sha256(b.data, b.len, hash);
    if (!same_digest(s, "state", hash, mismatches))
        return 0;
    CLEANUP_FD int fd = memfd_create("airlock-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || fd_write_full(fd, b.data, b.len) != 0 || ram_seal(fd, err) != 0)
        return err_sys(err, errno, "keeping device state");
    *ret_fd = fd_steal(&fd);
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
    if (ram_file_load(memory, ram_fd, ram_bytes, hash, ret_runs, err) != 0) {
        if (err->kind != ERR_CONFLICT)
            return -1;
        memset(err, 0, sizeof *err); // not even its form is right
        saved_mismatch(mismatches, "memory", "as written", "malformed");
        return 0;
    }
    (void)same_digest(s, "memory", hash, mismatches);
    return 0;
}

int saved_verify(const struct saved *s, json_t *mismatches, struct err *err)
{
    static const char *const PLAIN[] = {"state", "memory"};
    uint8_t hash[SHA256_BYTES];
    for (size_t i = 0; i < 2; i++) {
        CLEANUP_FD int fd = open_file(s, PLAIN[i], mismatches, err);
        if (fd == -1)
            return -1;
        if (fd < 0)
            continue;
        if (crypto_sha256_fd(fd, hash, NULL, err) != 0)
            return -1;
        (void)same_digest(s, PLAIN[i], hash, mismatches);
    }
    if (!json_object_get(json_object_get(s->manifest, "files"), "disk.raw"))
        return 0;
    CLEANUP_FD int disk = saved_open_disk(s, mismatches, err);
    return disk == -1 ? -1 : 0;
}
