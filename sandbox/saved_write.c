// The writing of a saved state.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/json.h"
#include "base/log.h"
#include "sandbox/saved_int.h"
#include "store/seal.h"

static int no_room(struct err *err, int code, const char *what)
{
    if (code == ENOSPC || code == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the saved state");
    return err_sys(err, code, "%s", what);
}

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
    struct saved_writer w = {.store = store, .parent_dirfd = parent_dirfd, .dirfd = -1, .state_fd = -1, .disk_fd = -1,
                             .own_disk_fd = -1};
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
    fd_close(&w->own_disk_fd);
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

// What is written down of the files.
struct notes {
    json_t *files;             // of the manifest
    json_t *own_disk;          // NULL: none
    struct saved_result *r;
    struct err *err;
};

static json_t *file_note(const uint8_t hash[SHA256_BYTES], int64_t bytes)
{
    char digest[DIGEST_TEXT_MAX];
    json_t *one = json_object();
    json_put_str(one, "sha256", crypto_digest_text(hash, digest));
    json_put_int(one, "bytes", bytes);
    return one;
}

// Syncs it first: what a full disk refuses late is refused here.
static int note_file(struct notes *n, const char *name, const char *shown, const uint8_t hash[SHA256_BYTES], int fd)
{
    char digest[DIGEST_TEXT_MAX];
    struct stat st;
    if (fsync(fd) != 0 || fstat(fd, &st) != 0)
        return no_room(n->err, errno, "writing a file of a saved state");
    json_put(n->files, name, file_note(hash, st.st_size));
    json_put_str(n->r->digests, shown, crypto_digest_text(hash, digest));
    json_put_int(n->r->sizes, shown, (int64_t)st.st_blocks * 512);
    n->r->bytes += (int64_t)st.st_blocks * 512;
    return 0;
}

static int note_spool(void *arg, int dirfd, const char *path)
{
    struct notes *n = arg;
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FD int fd = openat(dirfd, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return err_sys(n->err, errno, "opening a spool of a saved state");
    return crypto_sha256_fd(fd, hash, NULL, n->err) != 0 ? -1 : note_file(n, path, path, hash, fd);
}

static int note_spools(int dirfd, struct notes *n)
{
    CLEANUP_FD int spool = openat(dirfd, "spool", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (spool < 0)
        return errno == ENOENT ? 0 : err_sys(n->err, errno, "opening the spool of a saved state");
    if (saved_each_in(dirfd, "spool", note_spool, n) != 0)
        return n->err->kind != ERR_NONE ? -1 : err_sys(n->err, errno, "listing the spool of a saved state");
    return fsync(spool) == 0 ? 0 : no_room(n->err, errno, "writing the spool of a saved state");
}

static int note_own_disk(int fd, struct notes *n)
{
    struct stat st;
    uint8_t hash[SHA256_BYTES];
    if (fd < 0)
        return 0;
    if (fsync(fd) != 0 || fstat(fd, &st) != 0)
        return no_room(n->err, errno, "writing the disk");
    if (saved_disk_hash(fd, hash, n->err) != 0)
        return -1;
    n->own_disk = file_note(hash, st.st_size);
    return 0;
}

// Hashes and syncs what is there.
static int write_files(struct saved_writer *w, const struct ram_runs *runs, const void *pages, struct notes *n)
{
    uint8_t hash[SHA256_BYTES];
    uint64_t bytes;
    CLEANUP_FD int memory = make_file(w->dirfd, "memory", n->err);
    if (memory < 0 || ram_file_write(memory, runs, pages, hash, &bytes, n->err) != 0 ||
        note_file(n, "memory", "memory_bytes", hash, memory) != 0)
        return -1;
    if (crypto_sha256_fd(w->state_fd, hash, NULL, n->err) != 0 || note_file(n, "state", "state_bytes", hash, w->state_fd) != 0)
        return -1;
    if (w->disk_fd >= 0 && (ram_sparse_digest(w->disk_fd, hash, NULL, n->err) != 0 ||
                            note_file(n, "disk.raw", "disk_bytes", hash, w->disk_fd) != 0))
        return -1;
    return note_own_disk(w->own_disk_fd, n) != 0 ? -1 : note_spools(w->dirfd, n);
}

static char *manifest_text(struct store *store, const struct saved_facts *f, const struct notes *n)
{
    char seal[SHA256_HEX];
    CLEANUP_JSON json_t *m = json_object();
    json_put_int(m, "format", SAVED_FORMAT);
    json_put_str(m, "kind", f->kind);
    json_put_str(m, "id", f->id);
    json_put_int(m, "epoch", f->epoch);
    json_put_str(m, "template", f->template_key);
    json_put_str(m, "template_manifest", f->template_manifest);
    json_put(m, "machine", json_deep_copy(f->machine));
    json_put(m, "commands", f->commands ? json_deep_copy(f->commands) : json_array());
    json_put(m, "files", json_incref(n->files));
    json_put(m, "own_disk", n->own_disk ? json_incref(n->own_disk) : json_null());
    CLEANUP_FREE char *open_text = json_canonical(m);
    if (!open_text) {
        err_set(n->err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    if (store_seal(store, open_text, strlen(open_text), seal, n->err) != 0)
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
    struct notes n = {.files = files, .r = &r, .err = err};
    int failed = write_files(w, runs, pages, &n);
    if (!failed && !(text = manifest_text(w->store, f, &n)))
        failed = -1;
    json_decref(n.own_disk);
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
