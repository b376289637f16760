// images.h - the content-addressed image directory: names → digests, blobs by SHA-256. Self-contained, may be shared
// read-only by several servers. Owns the format; used by the server (read) and `airlock image` (write).
//
//   <image-dir>/index.json                 {"format":1,"runtime":{"kernel":{"digest","bytes","version"},
//                                           "initramfs":{"digest","bytes"}},
//                                           "images":{"debian":{"digest","bytes","created_at"}}}
//   <image-dir>/blobs/sha256/<64 hex>      kernel, initramfs, erofs roots; mode 0444
//
// index.json is replaced atomically under a lock file; a blob is complete before it is named.
#ifndef AIRLOCK_SANDBOX_IMAGES_H
#define AIRLOCK_SANDBOX_IMAGES_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/crypto.h"
#include "base/err.h"

struct images;

// dirfd is borrowed. Reads index.json (again when it changed: images_resolve looks at its mtime and inode).
struct images *images_open(int dirfd, struct err *err);
void images_free(struct images *im); // accepts NULL

struct image_ref {
    char name[128], digest[DIGEST_TEXT_MAX];
    uint64_t bytes;
    int64_t created_at_ms;
};
// By name ("debian"), or name@sha256:… (must agree), or sha256:… . admission_failed/image_not_found, digest_mismatch.
int images_resolve(struct images *im, const char *ref, struct image_ref *ret, struct err *err);
// A read-only descriptor of a blob whose content was hashed and found equal once per (inode, size, mtime) in this
// process. admission_failed/blob_missing, blob_corrupt. Caller closes.
int images_open_blob(struct images *im, const char *digest, struct err *err);
// Kernel and initramfs in force. unavailable/runtime_missing when none was registered.
struct image_runtime {
    char kernel_digest[DIGEST_TEXT_MAX], initramfs_digest[DIGEST_TEXT_MAX], kernel_version[96];
};
int images_runtime(struct images *im, struct image_runtime *ret, struct err *err);
int images_each(struct images *im, bool (*fn)(void *, const struct image_ref *), void *arg, struct err *err);

// ---- writing (airlock image …) ---------------------------------------------------------------------------------
// Copies file into blobs (reflink or copy, fsync, rename, 0444) and names it. ret_digest may be NULL.
int images_add(int dirfd, const char *name, const char *root_path, char ret_digest[DIGEST_TEXT_MAX], struct err *err);
int images_set_runtime(int dirfd, const char *kernel_path, const char *initramfs_path, const char *kernel_version,
                       struct err *err);
int images_remove(int dirfd, const char *name, struct err *err);
// Removes blobs that no name refers to; bytes freed.
int images_prune(int dirfd, uint64_t *ret_bytes, struct err *err);
// Hashes every blob that is referred to; fn per blob.
int images_verify(int dirfd, bool (*fn)(void *, const char *what, const char *digest, bool ok), void *arg,
                  struct err *err);

#endif
