// saved.h - a saved state on disk: a directory with manifest.json, state, memory, where its owner has no disk of its own
// disk.raw, and what commands had written in spool/. Written whole or not at all; read only after the seal, the digests and
// what the store knows of it agree. docs/snapshots.md has the layout. Templates, snapshots and cold sandboxes are all kept so.
//
// Owns the files and their form. Does not own what they are for, rows, processes. Blocking; worker threads.
#ifndef AIRLOCK_SANDBOX_SAVED_H
#define AIRLOCK_SANDBOX_SAVED_H

#include <jansson.h>

#include "qemu/ram.h"
#include "store/store.h"

#define SAVED_FORMAT 1

// One that is being written: below a temporary name (`.name`) until saved_finish.
struct saved_writer {
    struct store *store;
    int parent_dirfd, dirfd, state_fd, disk_fd; // disk_fd -1: without one
    int own_disk_fd;                            // its owner's disk, kept elsewhere: hashed and synced too; -1: none
    char name[96];
};
// Errors: unavailable/disk_full.
int saved_begin(struct store *store, int parent_dirfd, const char *name, bool with_disk, struct saved_writer *ret,
                struct err *err);
void saved_abort(struct saved_writer *w); // accepts one that was finished or never begun

struct saved_facts {
    const char *kind;          // "template", "snapshot", "cold"
    const char *id;            // of the snapshot or sandbox; the key of a template
    int64_t epoch;
    const char *template_key, *template_manifest; // what memory differs from, and its manifest's digest; "" for none
    const json_t *machine;     // machine.h
    const json_t *commands;    // those that ran; NULL or array
};
struct saved_result {
    char manifest_sha256[DIGEST_TEXT_MAX];
    json_t *sizes, *digests;   // of each file → bytes, "sha256:…"; new
    int64_t bytes;             // allocated on disk
};
// Writes memory and manifest, hashes what else is in the directory and in its spool/, syncs, and gives the directory its
// name (replacing one of an earlier epoch). Ends the writer where it succeeds; saved_abort is due where it does not.
int saved_finish(struct saved_writer *w, const struct saved_facts *f, const struct ram_runs *runs, const void *pages,
                 struct saved_result *ret, struct err *err);

// What the files of a directory looked like: name, device, inode, mode, size and change time of each. Another signature:
// somebody touched them, and they are checked again before they are used.
struct saved_signature {
    uint8_t v[SHA256_BYTES];
    int64_t changed_ms;        // wall clock; of the one that changed last
};
void saved_sign(int dirfd, struct saved_signature *ret); // zeros where it cannot be read

// One that is there.
struct saved {
    int dirfd;
    json_t *manifest;                        // empty where its seal is not good
    char manifest_sha256[DIGEST_TEXT_MAX];
    struct saved_signature signature;        // from before anything of it was read
    bool settled;                            // its last change was so long before that the next will have another time
};
// What the store remembers of it: NULL manifest_sha256: nothing (templates: the seal alone counts).
struct saved_expect {
    const char *kind, *id, *manifest_sha256;
    int64_t epoch;
};
// Opens and checks manifest, seal and what is expected. Each fault is appended to mismatches as machine_compare does; of a
// manifest whose seal is not good nothing else is believed. 0 where it is there, also when it is not in order; -1 with
// not_found/saved_missing or internal.
int saved_open(struct store *store, int parent_dirfd, const char *name, const struct saved_expect *expect,
               struct saved *ret, json_t *mismatches, struct err *err);
void saved_close(struct saved *s); // accepts a zeroed one
// Compares sizes and digests of all files. 0, or -1 with err where a file cannot be read. What was found is remembered in this
// process: as long as no file is touched none is read again.
int saved_verify(const struct saved *s, json_t *mismatches, struct err *err);
// Remembers of one that was loaded in full that all of it is as it was written.
void saved_verified(const struct saved *s);
// Of those alone that saved_load and saved_open_disk leave out, and names what the manifest does not know.
int saved_verify_rest(const struct saved *s, json_t *mismatches, struct err *err);
// Compares the disk that its owner keeps itself.
int saved_verify_own_disk(const struct saved *s, int disk_fd, json_t *mismatches, struct err *err);
// Puts memory into ram_fd (which holds the template's pages already) and the state into a sealed memory file, checking
// their digests in the same pass: nothing is to be used where mismatches grew.
// Its pages apart from the template's: ram_file_read.
int saved_load_apart(const struct saved *s, uint64_t ram_bytes, struct ram_runs *ret_runs, void **ret_pages,
                     size_t *ret_mapped, int *ret_state_fd, json_t *mismatches, struct err *err);
int saved_load(const struct saved *s, int ram_fd, uint64_t ram_bytes, struct ram_runs *ret_runs, int *ret_state_fd,
               json_t *mismatches, struct err *err);
// The disk, read-only, its digest compared (once per inode and change time in this process). -1 with err; -2: differs.
int saved_open_disk(const struct saved *s, json_t *mismatches, struct err *err);

// Adds one {"field","expected","found"}; none past the first hundred.
void saved_mismatch(json_t *mismatches, const char *field, const char *expected, const char *found);

#endif
