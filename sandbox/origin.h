// origin.h - what forks continue from: a guest's memory (sealed memfd), device state and disk at one moment. Loaded origins
// are kept by key: templates are made here on first need, snapshots are put together from their template and their file.
//
// Owns: the descriptors, the cache and its limits, <state>/templates. Does not own: sandboxes, snapshots' rows.
// Threads: any; calls block (loading, or waiting for somebody who loads). A struct origin does not change once it is
// handed out.
#ifndef AIRLOCK_SANDBOX_ORIGIN_H
#define AIRLOCK_SANDBOX_ORIGIN_H

#include "qemu/ram.h"
#include "qemu/ram_hold.h"
#include "sandbox/machine.h"
#include "sandbox/saved.h"

struct manager;
struct snapshot_row;

enum origin_state { ORIGIN_MAKING, ORIGIN_READY, ORIGIN_FAILED };

struct origin {
    struct origin *next;
    int refs;                          // under origins.lock; the cache itself holds one
    int pool_refs;                     // of them the pool's: it gives them up where the memory is needed
    int map_refs;                      // of them sandboxes' that run: they map its memory and need no file any more
    bool listed;                       // it is in the cache
    enum origin_state state;
    bool forgotten;                    // while it is made: it is for who waits for it, and does not stay in the cache
    char key[DIGEST_TEXT_MAX];         // template key or snapshot id; "" for a live fork: not in the cache
    char template_key[DIGEST_TEXT_MAX]; // what its pages differ from; "" for nothing
    char template_manifest[DIGEST_TEXT_MAX]; // and which making of it: the digest of its manifest
    int ram_fd, state_fd, disk_fd;     // disk_fd -1: the user has its own
    uint64_t ram_bytes;                // guest memory
    uint64_t held_bytes;               // that the memory file really holds
    json_t *commands;                  // that ran at that moment (carry.h); NULL: none
    int spool_dirfd;                   // their output so far; -1: none
    struct ram_runs runs;              // pages that differ from the template; empty for a template
    struct ram_runs put_runs;          // pages that its one user puts over them itself (vm_put_pages); origin_put_done
    void *put_pages;
    size_t put_mapped;
    struct origin *base;               // whose memory it maps; a reference, or NULL
    struct ram_hold hold;              // of a template
    uint64_t counted_bytes;            // of one that is not in the cache, or not any more
    struct saved_signature signature;  // of its directory when it was checked
    struct saved_signature base_signature; // and of its template's, where it is no template itself
    int64_t used_ms;                   // monotonic
    int64_t retry_ms;                  // failed: not again before
    struct err err;
};

struct template_build;

struct origins {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct origin *list;
    struct template_build *builds;     // under way (template.c)
    int templates_dirfd;
    uint64_t unlisted_bytes;           // of origins that are not in the list: never in it, or out of it but in use
    uint64_t made, loaded, evicted;    // for gauges
};

int origins_open(struct manager *m, struct err *err);

// The template of these parts. 0: *ret referenced (waits while it is made or loaded); 1: there is none, it is being made
// in the background now: boot; -1 with err only where waiting was cut short (stop says so, NULL: never).
int origin_template(struct manager *m, const struct machine_parts *parts, bool (*stop)(void *arg), void *arg,
                    struct origin **ret, struct err *err);
// Templates are made by this (template.c): blocking, several seconds.
int template_make(struct manager *m, const struct machine_parts *parts, struct origin *o, struct err *err);
// Loads one from disk. 0; TEMPLATE_MISSING; TEMPLATE_DAMAGED (which is logged); -1.
enum { TEMPLATE_MISSING = 1, TEMPLATE_DAMAGED = 2 };
int template_load(struct manager *m, const char *key, struct origin *o, struct err *err);
// A snapshot, live or cold sandbox goes back to it: what is left of it is not made anew, but kept for its repair.
bool template_needed(struct manager *m, const char *key);
// Whether it is there as it was, without loading it. What is wrong goes to mismatches as "template"; -1 with err.
int template_check(struct manager *m, const char *key, const char *manifest, json_t *mismatches, struct err *err);
// Of one that is kept: the same digest. Tells it where it is another.
bool template_same(const char *manifest, const char *found, json_t *mismatches);

const char *template_name(const char *key);    // of its directory
// Removes from disk, above the limit, what no snapshot, live or cold sandbox needs, least recently used first. The one used
// last stays.
void templates_evict(struct manager *m);
void templates_sweep(struct manager *m);       // at start: half-written ones
void templates_stop(struct manager *m);        // at the end: VMs of those in the making

// A template by key and its manifest's digest, for what is built on it: pages that differ from one making of it fit no other.
// None is made. 0; where it is not there as it was, *ret is NULL and mismatches has "template"; -1 with err.
int origin_base(struct manager *m, const char *key, const char *manifest, struct origin **ret, json_t *mismatches,
                struct err *err);
// It is loaded, was made so, and its files were not touched since they were checked.
bool origin_current(struct manager *m, const char *key, const char *manifest);

// A snapshot, checked in full. snapshot_mismatch with the fields named.
int origin_snapshot(struct manager *m, const struct snapshot_row *row, struct origin **ret, struct err *err);

// Loads one (snapshot.c).
int snapshot_origin_make(struct manager *m, const struct snapshot_row *row, struct origin **ret, struct err *err);

struct origin *origin_new(void);            // empty, one reference; for what is not cached
struct origin *origin_ref(struct manager *m, struct origin *o);
void origin_unref(struct manager *m, struct origin *o);        // accepts NULL
// Its memory counts from here until its end, as that of a cached one does: with budget and gauges.
void origin_count(struct manager *m, struct origin *o);
void origin_put_done(struct origin *o);     // of one that is not shared
// Takes it out of the cache (its users go on); one in the making when it is made.
void origin_forget(struct manager *m, const char *key);
// For a VM that was launched from it. One that is out of the cache and has only such users lets go of its disk and state: what a
// deletion erased has its room back.
struct origin *origin_map_ref(struct manager *m, struct origin *o);
void origin_map_unref(struct manager *m, struct origin *o);    // accepts NULL
// The same for the pool.
struct origin *origin_pool_ref(struct manager *m, struct origin *o);
void origin_pool_unref(struct manager *m, struct origin *o);
// Takes a template that nobody uses out of memory and gives its directory a hidden name, in one step. False: it is in use.
bool origin_retire(struct manager *m, const char *name, const char *hidden);
// A descriptor of its own offset. -1 with err.
int origin_state_open(const struct origin *o, struct err *err);
// Drops what nobody uses above the limit.
void origins_trim(struct manager *m);
// Drops the least recently used of what nobody uses. False: there is none.
bool origins_give_up(struct manager *m);

#endif
