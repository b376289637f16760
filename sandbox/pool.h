// pool.h - VMs made ahead, per template: parked (QEMU waits before the restore) and ready (restored, warmed, nobody's yet).
// A create takes a ready one, else a parked one, else forks. Filled in the background at lowest priority while no request
// launches anything.
//
// Owns: the entries (process, run directory, disk, uid, their share of the memory budget), <state>/pool. Threads: any.
#ifndef AIRLOCK_SANDBOX_POOL_H
#define AIRLOCK_SANDBOX_POOL_H

#include "base/id.h"
#include "sandbox/origin.h"
#include "sandbox/warm.h"

struct manager;
struct pool_class;

struct pool_entry {
    struct pool_entry *next;
    struct pool_class *class;
    char name[ID_MAX];           // process, run directory, disk directory
    struct vm *vm;
    struct warm warm;            // its callbacks until it is taken
    struct origin *origin;       // reference
    unsigned uid, reserved_mib;
    bool restored;
    bool unwanted;               // in the making: ended, its memory is needed
};

struct pool {
    pthread_mutex_t lock;
    struct pool_class *classes;
    bool filling;
    struct pool_entry *making;   // its VM is up, and it is not in a list yet
    int dirfd;                   // <state>/pool
    uint64_t hits, misses, made, failed;
};

int pool_open(struct manager *m, struct err *err);
// A template is in use: from now on its pool is kept full.
void pool_want(struct manager *m, const struct machine_parts *parts, struct origin *o);
// The caller owns what it gets: NULL where there is none.
struct pool_entry *pool_take(struct manager *m, const char *key);
// Its directory is the caller's from here on; frees the entry and what is left of it. The VM was taken out before.
void pool_entry_done(struct manager *m, struct pool_entry *e);
void pool_entry_end(struct manager *m, struct pool_entry *e); // ends the VM too
// Ends one of the template that was used least recently: a pool is a cache, and gives way to a sandbox that needs its memory.
// False: nothing is left to give up.
bool pool_give_up(struct manager *m);
// Fills what is missing, in the background, and ends what died. Called after a take and once a second.
void pool_refill(struct manager *m);
// At start: the template of the default shape of an image, so that the pool is there before the first create.
void pool_begin(struct manager *m);
// Ends all that is pooled: it belongs to nobody. At a clean stop.
void pool_end(struct manager *m);
// Entries, and what they may take at worst; for gauges.
void pool_count(struct manager *m, unsigned *ret_ready, unsigned *ret_parked, unsigned *ret_mib);

#endif
