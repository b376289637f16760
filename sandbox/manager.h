// manager.h - the sandbox service: what api/ calls. Owns the registry of live sandboxes, their VMs, the workers that
// run control operations one at a time per sandbox, reaper and reconciliation. Does not own HTTP, JSON parsing of
// requests, tokens, or the store and loop it is given.
//
// Threads: any. Calls marked async return at once and answer exactly once through their callbacks, on a worker, the
// loop or the store's writer thread; callbacks only hand over. Reads are from memory where a sandbox is live, else one
// tenant-filtered query. A tenant never sees another's objects: foreign and missing are the same not_found.
#ifndef AIRLOCK_SANDBOX_MANAGER_H
#define AIRLOCK_SANDBOX_MANAGER_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/loop.h"
#include "sandbox/hub.h"
#include "sandbox/state.h"
#include "store/evidence.h"
#include "store/rows.h"

struct manager;
struct store;

enum accel_config { ACCEL_AUTO = 0, ACCEL_KVM_ONLY = 1, ACCEL_TCG_ONLY = 2 };

struct manager_options {
    struct store *store;
    struct loop *loop;
    int state_dirfd, image_dirfd;      // borrowed
    enum accel_config accel;
    bool allow_emulation;
    const char *qemu_path;             // a path, or a name that is looked up; NULL: qemu-system-x86_64
    const char *cgroup_parent;         // NULL: none
    unsigned uid_base, uid_count;      // host uids for jails, used where the server is root
    unsigned max_live_per_tenant;      // quota
    unsigned max_launches;             // booting at once; further ones queue
    int64_t retention_ms;              // of destroyed sandboxes
    unsigned disk_reserve_mib;   // of the state directory's filesystem: saved states leave it free
    unsigned max_snapshots_per_tenant; // quota
    const char *own_program;           // this binary, for ram_hold.h; NULL: templates are not held
    bool templates;                    // fork creates from templates; off: every create boots
    int template_memory_mib, template_disk_mib; // of templates nobody uses, kept for the next create
    unsigned pool, pool_parked;        // per template: restored ahead, processes parked before the restore
    int pool_memory_mib;               // all pooled VMs together, worst case
    int memory_budget_mib;             // all VMs together, worst case; 0: 90 % of the host's memory
    int boot_timeout_ms;
    // Renders the problem document of an error (for jobs, receipts, replays) and its status; set by api/. New text.
    char *(*render_problem)(const struct err *err, const struct admission *a, int *ret_status);
};

struct manager *manager_new(const struct manager_options *options, struct err *err);
// Starts reconciliation (adoption, orphans, half-done jobs) and the accelerator probe in the background.
int manager_start(struct manager *m, struct err *err);
// Stops accepting and gives operations under way up to 2 s; sandboxes keep running. After it: store_close, then the process
// ends. Nothing is freed: what is under way is journaled, and the next start finishes or undoes it, as after kill -9.
void manager_stop(struct manager *m);
// Of a manager that was never started.
void manager_free(struct manager *m);

// True when reconciliation is done; otherwise writes what is missing ("3 sandboxes not yet adopted").
bool manager_ready(struct manager *m, char *out, size_t cap);
struct hub *manager_hub(struct manager *m);
struct store *manager_store(struct manager *m);

// ---- sandboxes ------------------------------------------------------------------------------------------------
// An immutable view of one sandbox at one generation. Reference-counted: _ref/_unref from any thread.
struct sandbox_info {
    struct sandbox_row row;
    int refs_;                 // private
    void *cache;               // api's rendered form, set once by compare-and-swap, freed by cache_free
    void (*cache_free)(void *);
};
struct sandbox_info *sandbox_info_ref(const struct sandbox_info *i);
void sandbox_info_unref(const struct sandbox_info *i); // accepts NULL

// Present view or NULL with not_found (or the store's error). Never blocks for live ones.
struct sandbox_info *manager_get(struct manager *m, const char *tenant, const char *id, struct err *err);
// Live or not, by the store, newest first (see sandbox_list for the filter).
int manager_list(struct manager *m, const struct sandbox_filter *filter,
                 bool (*fn)(void *arg, const struct sandbox_info *i), void *arg, struct err *err);

struct sandbox_request {       // validated by api against the specification; defaults filled in
    const char *image, *snapshot_id; // exactly one is not NULL; resources and env come with a snapshot (0, NULL here)
    const char *name;          // NULL: none
    const json_t *labels, *env; // objects or NULL
    int vcpus, memory_mib, disk_mib;
    int64_t ttl_seconds;
    const char *on_expiry;     // "destroy", "stop", "cold"
    bool detached;
    const char *owner;         // NULL: none
    const char *require_accel; // NULL, "kvm", "tcg"
};

// What an operation answers. `admitted` (NULL allowed) comes once the intent is durable, before the act: the moment
// for a 202; not called when admission fails. `done` comes once, after the outcome is durable (or admission failed).
struct op_callbacks {
    void (*admitted)(void *arg, const char *job_id);
    void (*done)(void *arg, const struct sandbox_info *info_or_null, const struct err *err_or_null);
    void *arg;
};

// All async. The admission's ids audit_id, receipt_id are reserved by the caller; job_id is filled in by the manager;
// success_status goes into receipt and replay.
int manager_create(struct manager *m, const struct sandbox_request *r, const struct admission *a, int success_status,
                   const struct op_callbacks *cb);
// resume: from paused or cold.
enum sandbox_verb { VERB_STOP, VERB_START, VERB_DETACH, VERB_PAUSE, VERB_RESUME, VERB_COLD };
int manager_verb(struct manager *m, const char *id, enum sandbox_verb verb, const char *owner_or_null,
                 const struct admission *a, int success_status, const struct op_callbacks *cb);
// info->row.deletion_json holds the report.
int manager_delete(struct manager *m, const char *id, const struct admission *a, int success_status,
                   const struct op_callbacks *cb);

struct sandbox_patch {
    const json_t *labels;      // NULL: unchanged; replaces all
    int64_t ttl_seconds;       // 0: unchanged; counts from now
    const char *on_expiry;     // NULL: unchanged
};
int manager_patch(struct manager *m, const char *id, const struct sandbox_patch *p, const struct admission *a,
                  int success_status, const struct op_callbacks *cb);

// ---- snapshots and forks ----------------------------------------------------------------------------------------
// All or none: count sandboxes that continue from the source's present moment. The source is a running or paused
// sandbox, or a snapshot (id tells which).
struct fork_request {
    unsigned count;            // 1-LIMIT_FORK_MAX
    int64_t ttl_seconds;       // 0: the source's (of a sandbox); counts from now
    const char *on_expiry;     // NULL: the source's
    bool detached;
    const char *owner;         // NULL: none
};
// items: borrowed for the call; err NULL: all of them are up.
struct fork_callbacks {
    void (*admitted)(void *arg, const char *job_id);
    void (*done)(void *arg, const struct sandbox_info *const *items, size_t n, const struct err *err_or_null);
    void *arg;
};
// Async. Errors: conflict/not_forkable, conflict/snapshot_mismatch …, rate_limited/quota_exceeded (all children
// counted), unavailable/memory_budget, timeout, transport_failed.
int manager_fork(struct manager *m, const char *id, const struct fork_request *r, const struct admission *a,
                 int success_status, const struct fork_callbacks *cb);

struct snapshot_request {
    const char *name;          // NULL: none
    int64_t expires_in_seconds; // 0 with keep
    bool keep;
    bool stop;                 // the source is stopped instead of going on
};
// row: borrowed for the call.
struct snapshot_callbacks {
    void (*admitted)(void *arg, const char *job_id);
    void (*done)(void *arg, const struct snapshot_row *row_or_null, const struct err *err_or_null);
    void *arg;
};
// Async. a->sandbox_id is the source; the snapshot's id goes into receipt and replay (ref). Errors:
// conflict/not_running, conflict/guest_disk_full, timeout/agent_freeze, unavailable/disk_full, rate_limited.
int manager_snapshot(struct manager *m, const char *sandbox_id, const struct snapshot_request *r,
                     const struct admission *a, int success_status, const struct snapshot_callbacks *cb);
// Async. row->deletion_json holds the report; a second delete gives the same one. Errors:
// precondition_failed, conflict/has_children, cleanup_failed.
int manager_snapshot_delete(struct manager *m, const char *id, const struct admission *a,
                            int success_status, const struct snapshot_callbacks *cb);
// Blocking: reads the files, gigabytes of them, where one was touched since the last time; for a thread of its own.
// {"compatible":bool,"mismatches":[{"field","expected","found"}]}, new; NULL with err.
json_t *manager_snapshot_compat(struct manager *m, const char *tenant, const char *id, struct err *err);

// Memory of a live sandbox, read from /proc now (blocking): {"unique_bytes","shared_bytes","vmm_bytes"}: what it alone
// adds, what it shares with its template, of the first what is QEMU's own. New; NULL where it has no VM.
json_t *manager_memory(struct manager *m, const char *tenant, const char *id);

// ---- jobs -----------------------------------------------------------------------------------------------------
// Cancels a queued job, or asks a running one to stop at its next stage (creates only). 0, or conflict/not_cancellable.
int manager_job_cancel(struct manager *m, const char *tenant, const char *job_id, const struct admission *a,
                       struct err *err);

// ---- capabilities ---------------------------------------------------------------------------------------------
// {"accel":{…},"isolation":…,"qemu_version":…,"jail":{…},"images":[…]}: the facts; api shapes the answer. New.
json_t *manager_facts(struct manager *m);
// Gauges for /metrics: {"name": number}. New.
json_t *manager_gauges(struct manager *m);

#endif
