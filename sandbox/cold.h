// cold.h - snapshots of all kinds beyond the files: taking one of a sandbox, and putting one back into memory. Within the
// room; capture.c.
#ifndef AIRLOCK_SANDBOX_COLD_H
#define AIRLOCK_SANDBOX_COLD_H

#include "qemu/capture.h"
#include "sandbox/internal.h"
#include "sandbox/machine.h"
#include "sandbox/saved.h"

// What a sandbox's memory differs from, for a capture.
struct base {
    struct ram_runs runs;              // owned
    char template_key[DIGEST_TEXT_MAX], template_manifest[DIGEST_TEXT_MAX]; // origin.h
};
// snapshot_mismatch where that is not there as it was: what is saved now could not be continued.
int base_of(struct sandbox *s, struct base *ret, struct err *err);
void base_free(struct base *b);

// The machine that a sandbox is: of its VM as it was launched, which may be by another QEMU than this server's; without one by
// its row and this host.
json_t *machine_of_row(struct manager *m, const struct sandbox_row *row, struct err *err); // new
// What the sandbox's VM saves now can be continued by this server. Else snapshot_mismatch with the fields named.
int machine_fits(struct sandbox *s, struct err *err);

// Turns mismatches into the error: 409 snapshot_mismatch naming each. 0 where there is none.
int saved_refuse(const json_t *mismatches, struct err *err);
// Memory of a saved state on top of its template, checked. mismatches as saved_open left them; machine: what it must fit.
int saved_origin(struct manager *m, const struct saved *s, const json_t *machine, bool with_disk, json_t *mismatches,
                 struct origin **ret, struct err *err);

// The cold state of s (docs/snapshots.md).
int cold_load(struct sandbox *s, const struct sandbox_row *row, const struct machine_parts *parts, struct origin **ret,
              struct err *err);
int cold_erase(struct sandbox *s, uint64_t *ret_bytes);         // 0, or -1: something is left

// Freezes the agent where the VM runs, captures, lets it go on or not. `spec` lacks only base and ram_bytes.
struct moment {
    struct capture capture;
    struct base base;
    json_t *commands;                  // those that ran
    int64_t freeze_us;
    uint64_t disk_bytes, disk_free_bytes; // of the guest's filesystem; 0 where it was paused already
};
// The memory of a guest whose disk is full is taken only where it ends with it (disk_to_fd -1: its own disk stays).
int moment_take(struct sandbox *s, int state_fd, int disk_to_fd, bool go_on, struct moment *ret, struct err *err);
void moment_free(struct moment *mo);
// Whether the host's disk takes so many bytes more and keeps its reserve. unavailable/disk_full.
// What is promised to others is not there.
int room_for(struct manager *m, uint64_t bytes, struct err *err);
// The same, and no other counts on it until it is given back: when it is written, or will not be.
int room_promise(struct manager *m, uint64_t bytes, struct err *err);
void room_give(struct manager *m, uint64_t bytes);
// What a copy of a disk takes at most: its allocated bytes, as not every filesystem shares them. 0: there is none.
uint64_t room_of_disk(int dirfd, const char *path);

void cold_run(struct sandbox *s, struct op *op);
void cold_to_stopped_run(struct sandbox *s, struct op *op);    // the ttl of a cold one with on_expiry stop: memory goes, disk stays
void expire_cold_run(struct sandbox *s, struct op *op);        // … and where that fails stopped: it does not outlive its ttl
void wake_run(struct sandbox *s, struct op *op);               // resume of a cold one
void wake_resume(struct sandbox *s, struct op *op);            // … of an earlier server, its VM adopted
void pause_run(struct sandbox *s, struct op *op);
void resume_run(struct sandbox *s, struct op *op);             // from paused or cold
void snapshot_run(struct sandbox *s, struct op *op);
void fork_run(struct sandbox *s, struct op *op);
// Of a running or paused sandbox, which goes on: *ret referenced, in no cache. Blocking for as long as its disk is copied.
int fork_moment(struct sandbox *s, struct origin **ret, struct err *err);
// Whether a sandbox can be made of it now: it is there, its time is not over. Errors: conflict/snapshot_deleted,
// conflict/snapshot_expired.
int snapshot_usable(const struct snapshot_row *row, struct err *err);
// Its files are not as they were: because it was deleted after row was read? Then err says so (snapshot_deleted).
bool snapshot_deleted_meanwhile(struct manager *m, const struct snapshot_row *row, struct err *err);
// Its files: how much there was, and whether something is left.
void snapshot_erase(struct manager *m, const char *id, uint64_t *ret_bytes, int *ret_failed);
void snapshots_sweep(struct manager *m);                       // half-written ones of an earlier server
void snapshots_expire(struct manager *m);                      // reaper: what is past its retention

#endif
