#include "sandbox/images.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/log.h"

#define INDEX_MAX (1u << 20)
#define VERIFIED_MAX 64

// A blob whose content was hashed by this process, as it was then.
struct verified {
    char digest[DIGEST_TEXT_MAX];
    dev_t dev;
    ino_t ino;
    off_t size;
    struct timespec mtime;
};

struct images {
    int dirfd;
    pthread_mutex_t lock;
    json_t *index;           // NULL until there is one
    struct stat index_stat;
    struct verified verified[VERIFIED_MAX];
    unsigned next_verified;
};

// ---- the index ----------------------------------------------------------------------------------------------------
static json_t *index_read(int dirfd, struct err *err)
{
    CLEANUP_BUF struct buf b = BUF_INIT(INDEX_MAX);
    if (fd_read_file(dirfd, "index.json", &b) != 0) {
        if (errno == ENOENT) {
            err_set(err, ERR_UNAVAILABLE, "runtime_missing", "the image directory holds no images yet");
            err_remedy(err, "build them: docker/guest/build, or ./quickstart");
        } else {
            err_sys(err, errno, "reading index.json");
        }
        return NULL;
    }
    json_t *index = json_parse_strict(buf_text(&b), b.len, err);
    if (index && json_get_int(index, "format", 0) != 1) {
        json_decref(index);
        err_set(err, ERR_UNAVAILABLE, "image_format", "the image directory has a format this server does not know");
        return NULL;
    }
    return index;
}

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

// The present index, borrowed under the lock. NULL with err.
static json_t *index_get(struct images *im, struct err *err)
{
    struct stat st;
    if (fstatat(im->dirfd, "index.json", &st, 0) == 0 && im->index && same_file(&st, &im->index_stat))
        return im->index;
    json_t *fresh = index_read(im->dirfd, err);
    if (!fresh)
        return NULL;
    json_decref(im->index);
    im->index = fresh;
    im->index_stat = st;
    return fresh;
}

struct images *images_open(int dirfd, struct err *err)
{
    struct images *im = calloc(1, sizeof *im);
    if (!im) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    im->dirfd = dirfd;
    pthread_mutex_init(&im->lock, NULL);
    return im;
}

void images_free(struct images *im)
{
    if (!im)
        return;
    json_decref(im->index);
    pthread_mutex_destroy(&im->lock);
    free(im);
}

static bool digest_valid(const char *text)
{
    uint8_t raw[SHA256_BYTES];
    return strncmp(text, "sha256:", 7) == 0 && strlen(text) == 71 && enc_unhex(text + 7, 64, raw) == 0 &&
           strspn(text + 7, "0123456789abcdef") == 64;
}

static void fill_ref(struct image_ref *ret, const char *name, const json_t *entry)
{
    memset(ret, 0, sizeof *ret);
    const char *digest = json_get_str(entry, "digest"), *created = json_get_str(entry, "created_at");
    snprintf(ret->name, sizeof ret->name, "%s", name);
    snprintf(ret->digest, sizeof ret->digest, "%s", digest ? digest : "");
    ret->bytes = (uint64_t)json_get_int(entry, "bytes", 0);
    if (created)
        (void)clock_parse(created, &ret->created_at_ms);
}

static int not_found(struct err *err, const char *ref)
{
    err_set(err, ERR_ADMISSION_FAILED, "image_not_found", "no image is called %.100s", ref);
    return err_remedy(err, "GET /v1/images lists what is there");
}

static int resolve_in(const json_t *index, const char *ref, struct image_ref *ret, struct err *err)
{
    const json_t *images = json_object_get(index, "images");
    char name[128];
    const char *at = strchr(ref, '@');
    snprintf(name, sizeof name, "%.*s", (int)(at ? at - ref : (long)strlen(ref)), ref);
    const bool bare = !at && strncmp(ref, "sha256:", 7) == 0;
    if ((at && !digest_valid(at + 1)) || (bare && !digest_valid(ref)))
        return err_set(err, ERR_ADMISSION_FAILED, "bad_digest", "a digest is sha256: and 64 lower-case hex digits");
    const char *key;
    json_t *entry;
    json_object_foreach((json_t *)images, key, entry) {
        const char *digest = json_get_str(entry, "digest");
        if (!digest || (bare ? strcmp(digest, ref) != 0 : strcmp(key, name) != 0))
            continue;
        fill_ref(ret, key, entry);
        if (at && strcmp(digest, at + 1) != 0)
            return err_set(err, ERR_ADMISSION_FAILED, "digest_mismatch", "%.100s has another digest here", name);
        return 0;
    }
    return not_found(err, ref);
}

int images_resolve(struct images *im, const char *ref, struct image_ref *ret, struct err *err)
{
    pthread_mutex_lock(&im->lock);
    const json_t *index = index_get(im, err);
    const int failed = index ? resolve_in(index, ref, ret, err) : -1;
    pthread_mutex_unlock(&im->lock);
    return failed;
}

static int runtime_in(const json_t *index, struct image_runtime *ret, struct err *err)
{
    const json_t *runtime = json_object_get(index, "runtime");
    const json_t *kernel = json_object_get(runtime, "kernel"), *initramfs = json_object_get(runtime, "initramfs");
    const char *k = json_get_str(kernel, "digest"), *i = json_get_str(initramfs, "digest");
    const char *version = json_get_str(kernel, "version");
    if (!k || !i) {
        err_set(err, ERR_UNAVAILABLE, "runtime_missing", "the image directory holds no kernel and initramfs yet");
        return err_remedy(err, "build them: docker/guest/build, or ./quickstart");
    }
    snprintf(ret->kernel_digest, sizeof ret->kernel_digest, "%s", k);
    snprintf(ret->initramfs_digest, sizeof ret->initramfs_digest, "%s", i);
    snprintf(ret->kernel_version, sizeof ret->kernel_version, "%s", version ? version : "");
    return 0;
}

int images_runtime(struct images *im, struct image_runtime *ret, struct err *err)
{
    pthread_mutex_lock(&im->lock);
    const json_t *index = index_get(im, err);
    const int failed = index ? runtime_in(index, ret, err) : -1;
    pthread_mutex_unlock(&im->lock);
    return failed;
}

int images_each(struct images *im, bool (*fn)(void *, const struct image_ref *), void *arg, struct err *err)
{
    pthread_mutex_lock(&im->lock);
    const json_t *index = index_get(im, err);
    const char *key;
    json_t *entry;
    json_object_foreach(json_object_get(index, "images"), key, entry) {
        struct image_ref ref;
        fill_ref(&ref, key, entry);
        if (!fn(arg, &ref))
            break;
    }
    pthread_mutex_unlock(&im->lock);
    return index ? 0 : -1;
}

// ---- blobs ------------------------------------------------------------------------------------------------------
static void blob_path(const char *digest, char out[static 96])
{
    snprintf(out, 96, "blobs/sha256/%.64s", digest + 7);
}

static bool was_verified(struct images *im, const char *digest, const struct stat *st)
{
    for (unsigned i = 0; i < VERIFIED_MAX; i++) {
        const struct verified *v = &im->verified[i];
        if (v->dev == st->st_dev && v->ino == st->st_ino && v->size == st->st_size &&
            v->mtime.tv_sec == st->st_mtim.tv_sec && v->mtime.tv_nsec == st->st_mtim.tv_nsec &&
            strcmp(v->digest, digest) == 0)
            return true;
    }
    return false;
}

static int hash_matches(int fd, const char *digest, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    char text[DIGEST_TEXT_MAX];
    uint64_t bytes;
    if (crypto_sha256_fd(fd, hash, &bytes, err) != 0)
        return -1;
    return strcmp(crypto_digest_text(hash, text), digest) == 0;
}

int images_open_blob(struct images *im, const char *digest, struct err *err)
{
    char path[96];
    struct stat st;
    if (!digest_valid(digest))
        return err_set(err, ERR_ADMISSION_FAILED, "bad_digest", "a digest is sha256: and 64 lower-case hex digits");
    blob_path(digest, path);
    CLEANUP_FD int fd = openat(im->dirfd, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
        return err_set(err, ERR_ADMISSION_FAILED, "blob_missing", "%.20s… is not in the image directory", digest);
    pthread_mutex_lock(&im->lock);
    const bool known = was_verified(im, digest, &st);
    pthread_mutex_unlock(&im->lock);
    if (known)
        return fd_steal(&fd);
    const int equal = hash_matches(fd, digest, err);
    if (equal < 0)
        return -1;
    if (!equal)
        return err_set(err, ERR_ADMISSION_FAILED, "blob_corrupt", "%.20s… does not have that digest any more", digest);
    pthread_mutex_lock(&im->lock);
    struct verified *v = &im->verified[im->next_verified++ % VERIFIED_MAX];
    *v = (struct verified){.dev = st.st_dev, .ino = st.st_ino, .size = st.st_size, .mtime = st.st_mtim};
    snprintf(v->digest, sizeof v->digest, "%s", digest);
    pthread_mutex_unlock(&im->lock);
    return fd_steal(&fd);
}

// ---- writing ----------------------------------------------------------------------------------------------------
static int lock_dir(int dirfd, struct err *err)
{
    if ((mkdirat(dirfd, "blobs", 0755) != 0 && errno != EEXIST) ||
        (mkdirat(dirfd, "blobs/sha256", 0755) != 0 && errno != EEXIST))
        return err_sys(err, errno, "making blobs/sha256");
    const int fd = openat(dirfd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        return err_sys(err, errno, "opening the image directory's lock");
    while (flock(fd, LOCK_EX) != 0)
        if (errno != EINTR) {
            const int code = errno;
            close(fd);
            return err_sys(err, code, "locking the image directory");
        }
    return fd;
}

static int copy_bytes(int from, int to)
{
    char chunk[65536];
    if (ioctl(to, FICLONE, from) == 0)
        return 0;
    for (off_t at = 0;;) {
        const ssize_t n = pread(from, chunk, sizeof chunk, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return (int)n;
        if (fd_pwrite_full(to, chunk, (size_t)n, at) != 0)
            return -1;
        at += n;
    }
}

// Copies path into the blobs under its digest. Under the lock.
static int blob_put(int dirfd, const char *path, char digest[DIGEST_TEXT_MAX], uint64_t *ret_bytes, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    char name[96];
    CLEANUP_FD int from = open(path, O_RDONLY | O_CLOEXEC);
    if (from < 0)
        return err_sys(err, errno, "opening %s", path);
    (void)unlinkat(dirfd, "blobs/sha256/.new", 0);
    CLEANUP_FD int to = openat(dirfd, "blobs/sha256/.new", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (to < 0)
        return err_sys(err, errno, "making a blob");
    // The digest is of what was copied, so that a file that changes meanwhile cannot be named wrongly.
    if (copy_bytes(from, to) != 0 || fchmod(to, 0444) != 0 || fsync(to) != 0)
        return err_sys(err, errno, "copying %s", path);
    if (crypto_sha256_fd(to, hash, ret_bytes, err) != 0)
        return -1;
    crypto_digest_text(hash, digest);
    blob_path(digest, name);
    if (renameat(dirfd, "blobs/sha256/.new", dirfd, name) != 0)
        return err_sys(err, errno, "naming a blob");
    CLEANUP_FD int blobs = openat(dirfd, "blobs/sha256", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (blobs < 0 || fsync(blobs) != 0)
        return err_sys(err, errno, "keeping a blob");
    return 0;
}

static json_t *index_for_change(int dirfd, struct err *err)
{
    struct stat st;
    if (fstatat(dirfd, "index.json", &st, 0) == 0)
        return index_read(dirfd, err);
    json_t *index = json_object();
    json_put_int(index, "format", 1);
    json_put(index, "runtime", json_object());
    json_put(index, "images", json_object());
    return index;
}

static int index_write(int dirfd, const json_t *index, struct err *err)
{
    CLEANUP_FREE char *text = json_dumps(index, JSON_INDENT(2) | JSON_SORT_KEYS);
    if (!text || fd_write_file_atomic(dirfd, "index.json", text, strlen(text), 0644) != 0)
        return err_sys(err, errno, "writing index.json");
    return 0;
}

static json_t *index_entry(const char *digest, uint64_t bytes)
{
    json_t *e = json_object();
    json_put_str(e, "digest", digest);
    json_put_int(e, "bytes", (int64_t)bytes);
    json_put_time(e, "created_at", clock_wall_ms());
    return e;
}

static bool name_valid(const char *name)
{
    const size_t n = strlen(name);
    return n >= 1 && n <= 64 && strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") == n && name[0] != '.' &&
           name[0] != '-';
}

int images_add(int dirfd, const char *name, const char *root_path, char ret_digest[DIGEST_TEXT_MAX], struct err *err)
{
    char digest[DIGEST_TEXT_MAX];
    uint64_t bytes;
    if (!name_valid(name))
        return err_set(err, ERR_VALIDATION, "name_invalid", "an image's name is 1 to 64 of [a-z0-9._-]");
    CLEANUP_FD int lock = lock_dir(dirfd, err);
    if (lock < 0 || blob_put(dirfd, root_path, digest, &bytes, err) != 0)
        return -1;
    CLEANUP_JSON json_t *index = index_for_change(dirfd, err);
    if (!index)
        return -1;
    json_put(json_object_get(index, "images"), name, index_entry(digest, bytes));
    if (ret_digest)
        memcpy(ret_digest, digest, DIGEST_TEXT_MAX);
    return index_write(dirfd, index, err);
}

int images_set_runtime(int dirfd, const char *kernel_path, const char *initramfs_path, const char *kernel_version,
                       struct err *err)
{
    char kernel[DIGEST_TEXT_MAX], initramfs[DIGEST_TEXT_MAX];
    uint64_t kernel_bytes, initramfs_bytes;
    CLEANUP_FD int lock = lock_dir(dirfd, err);
    if (lock < 0 || blob_put(dirfd, kernel_path, kernel, &kernel_bytes, err) != 0 ||
        blob_put(dirfd, initramfs_path, initramfs, &initramfs_bytes, err) != 0)
        return -1;
    CLEANUP_JSON json_t *index = index_for_change(dirfd, err);
    if (!index)
        return -1;
    json_t *runtime = json_object(), *k = index_entry(kernel, kernel_bytes);
    json_put_str(k, "version", kernel_version);
    json_put(runtime, "kernel", k);
    json_put(runtime, "initramfs", index_entry(initramfs, initramfs_bytes));
    json_put(index, "runtime", runtime);
    return index_write(dirfd, index, err);
}

int images_remove(int dirfd, const char *name, struct err *err)
{
    CLEANUP_FD int lock = lock_dir(dirfd, err);
    if (lock < 0)
        return -1;
    CLEANUP_JSON json_t *index = index_for_change(dirfd, err);
    if (!index)
        return -1;
    if (json_object_del(json_object_get(index, "images"), name) != 0)
        return not_found(err, name);
    return index_write(dirfd, index, err);
}

// ---- all that is referred to ------------------------------------------------------------------------------------------
struct referred {
    const char *what, *digest;
};

static size_t referred_list(const json_t *index, struct referred *out, size_t cap)
{
    size_t n = 0;
    const char *key;
    json_t *entry;
    const json_t *parts[] = {json_object_get(index, "runtime"), json_object_get(index, "images")};
    for (size_t p = 0; p < 2; p++)
        json_object_foreach((json_t *)parts[p], key, entry) {
            const char *digest = json_get_str(entry, "digest");
            if (n < cap && digest && digest_valid(digest))
                out[n++] = (struct referred){key, digest};
        }
    return n;
}

// How many blobs an index can name.
static size_t referred_max(const json_t *index)
{
    return json_object_size(json_object_get(index, "runtime")) + json_object_size(json_object_get(index, "images")) + 1;
}

int images_verify(int dirfd, bool (*fn)(void *, const char *what, const char *digest, bool ok), void *arg, struct err *err)
{
    CLEANUP_JSON json_t *index = index_read(dirfd, err);
    CLEANUP_FREE struct referred *list = calloc(referred_max(index), sizeof *list);
    if (!index || !list)
        return -1;
    const size_t n = referred_list(index, list, referred_max(index));
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        char path[96];
        blob_path(list[i].digest, path);
        CLEANUP_FD int fd = openat(dirfd, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        struct err ignored = {0};
        const bool ok = fd >= 0 && hash_matches(fd, list[i].digest, &ignored) == 1;
        bad += !ok;
        if (!fn(arg, list[i].what, list[i].digest, ok))
            break;
    }
    return bad ? err_set(err, ERR_ADMISSION_FAILED, "blob_corrupt", "%d blobs are missing or changed", bad) : 0;
}

int images_prune(int dirfd, uint64_t *ret_bytes, struct err *err)
{
    *ret_bytes = 0;
    CLEANUP_FD int lock = lock_dir(dirfd, err);
    if (lock < 0)
        return -1;
    CLEANUP_JSON json_t *index = index_read(dirfd, err);
    CLEANUP_FREE struct referred *list = calloc(referred_max(index), sizeof *list);
    const int blobs = openat(dirfd, "blobs/sha256", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = index && list && blobs >= 0 ? fdopendir(blobs) : NULL;
    if (!d) {
        if (blobs >= 0)
            close(blobs);
        return err->kind != ERR_NONE ? -1 : err_sys(err, errno, "opening the blobs");
    }
    const size_t n = referred_list(index, list, referred_max(index));
    for (const struct dirent *e; (e = readdir(d));) {
        struct stat st;
        bool kept = e->d_name[0] == '.';
        for (size_t i = 0; i < n && !kept; i++)
            kept = strcmp(list[i].digest + 7, e->d_name) == 0;
        if (!kept && fstatat(blobs, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && unlinkat(blobs, e->d_name, 0) == 0)
            *ret_bytes += (uint64_t)st.st_size;
    }
    closedir(d);
    return 0;
}
