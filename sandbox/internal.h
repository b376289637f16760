// internal.h - what the files of this room share: the registry, a live sandbox, its operations, its commands and file
// transfers. Nothing outside sandbox/ includes it.
//
// Lock order: manager.lock (registry) → sandbox.lock → nothing. Neither is held across QMP, a commit, or a call that
// blocks. vm_send* may be called under sandbox.lock: it never blocks and calls nothing back.
// A sandbox's row changes only in its operations, which run one at a time (ops.c), so that a change never races.
#ifndef AIRLOCK_SANDBOX_INTERNAL_H
#define AIRLOCK_SANDBOX_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/work.h"
#include "proto/frame.h"
#include "qemu/host.h"
#include "qemu/vm.h"
#include "sandbox/command.h"
#include "sandbox/files.h"
#include "sandbox/images.h"
#include "sandbox/manager.h"
#include "sandbox/origin.h"
#include "sandbox/pool.h"
#include "store/logfile.h"
#include "store/store.h"

#define REGISTRY_BUCKETS 1024
#define OPS_THREADS 32
#define IO_THREADS 4
#define LOG_PENDING_MAX 512 // log lines of one sandbox that wait for the disk; more are counted as a gap

struct sandbox;
struct command;
struct transfer;
struct log_line;
struct continued;

// What a control operation is made of; freed by ops.c after it ran.
struct op {
    struct op *next;             // in the sandbox's queue, or in the manager's queue for launch slots
    const char *name;            // for logs
    void (*run)(struct sandbox *s, struct op *op);
    bool wants_slot;             // boots a guest: waits until a launch slot is free
    bool has_slot;
    bool parked, unparked, left; // ops.c: it ran, but keeps its place; under sandbox.lock
    atomic_bool cancelled;       // by POST …/cancel: a create ends at its next stage
    struct admission a;
    int success_status;
    struct op_callbacks cb;
    int64_t t0_us;               // when the request arrived
    // Parameters of the one kind or other.
    char cause[WORD_MAX];
    char owner[LIMIT_OWNER_MAX];
    json_t *labels;              // new, or NULL
    int64_t ttl_seconds;
    char on_expiry[WORD_MAX];
    enum vm_gone gone;
    unsigned vm_no;              // which VM of the sandbox an event is about
    bool flag;                   // mute, io error …
    struct sandbox_row row;      // create: the row to insert
    char require_accel[8];
    struct job_row job;          // resumed create
    void *arg;                   // fork: its group
};

struct sandbox {
    struct sandbox *hash_next;
    struct manager *m;
    atomic_int refs;
    char id[ID_MAX], tenant[TENANT_MAX];
    int dirfd, out_dirfd, log_dirfd, run_dirfd;
    struct logfile *log;

    pthread_mutex_t lock;        // all below
    struct sandbox_info *info;
    struct op *ops, *ops_last;   // ops is the one that runs or waits for its slot
    bool op_active, op_slot_wait;
    bool delete_wanted;          // running operations end early
    struct vm *vm;
    unsigned vm_no;              // counts the VMs this sandbox had in this process
    unsigned vm_uid;             // 0: none taken
    unsigned reserved_mib;       // of the memory budget; under manager.lock
    struct origin *origin;       // its memory is a private copy of; NULL: booted. Reference
    bool adopting;              // of an earlier server, and not yet taken over or given up
    bool session;                // the agent answers
    int64_t session_lost_ms;     // monotonic; while there is no session: since when
    bool mute_noted, disk_full_noted;
    unsigned session_no;
    struct command *commands;
    unsigned n_commands;
    pthread_cond_t commands_gone; // a command left the list
    uint64_t forget[64];         // agent ids that nobody here knows, until the session is up
    unsigned n_forget;
    struct transfer *transfers;
    struct log_line *log_head, *log_tail;
    unsigned log_pending;
    uint64_t log_dropped;
    bool io_scheduled;
    int64_t io_retry_at_ms;      // disk full: try again then
    int64_t delete_again_ms;     // monotonic; a delete that was begun and not recorded, or left something: tried again then
    bool end_unrecorded;         // its VM ended as gone_how, and the row could not be told: it is, when it can be
    enum vm_gone gone_how;
    struct err fatal;            // what the guest said before it died
    unsigned ready_no;           // times the agent became ready
};

enum accel_verdict { ACCEL_UNKNOWN = 0, ACCEL_KNOWN = 1 };

struct manager {
    struct manager_options o;
    struct store *store;
    struct loop *loop;
    struct hub *hub;
    struct images *images;
    struct host_facts host;
    struct work_pool *ops, *io;
    int sandboxes_dirfd, run_dirfd;

    pthread_mutex_t lock;
    struct sandbox *buckets[REGISTRY_BUCKETS];
    unsigned n_live;
    unsigned launches;           // slots taken
    struct op_wait *slot_head, *slot_tail;
    unsigned *uids;              // one per uid of the range: how many rows have it; more than one only where rows are stale
    bool stopping;
    unsigned adopting;           // sandboxes not yet adopted or given up
    bool reconciled;
    atomic_uint active;          // operations, io jobs and reconcile tasks under way

    pthread_mutex_t accel_lock;
    pthread_cond_t accel_cond;
    atomic_bool probe_cancelled; // the server stops
    enum accel_verdict accel_known;
    bool kvm_usable;
    char accel_reason[200];
    int64_t accel_probed_at_ms;

    struct origins origins;
    struct pool pool;
    int snapshots_dirfd;
    atomic_ullong copying_bytes; // of disks that QEMUs are copying now
    atomic_ullong promised_bytes; // of disks that are to be copied in a moment (room_promise)
    atomic_bool expiring;        // snapshots past their retention are being deleted
    uint64_t committed_mib;      // worst case of all sandboxes' VMs; under lock
    uint64_t pooled_mib;         // and of the pool's, which give way to them; under lock
    struct loop_timer *tick;
    pthread_mutex_t pending_lock; // admissions of an earlier server, by receipt id, until settled
    struct admission *pending;
    size_t n_pending;
    atomic_ullong boots, boot_failures, adoptions, commands_run;
};

// ---- registry.c -----------------------------------------------------------------------------------------------
// Takes the row's members. Opens (with make: makes) its directories. NULL with err.
struct sandbox *sandbox_new(struct manager *m, struct sandbox_row *row_stolen, bool make, struct err *err);
void registry_add(struct manager *m, struct sandbox *s);       // takes a reference of its own
void registry_remove(struct manager *m, struct sandbox *s);
// A new reference, or NULL with not_found: tenant NULL is the server itself. For a tenant it waits, a second at most, for one
// whose row was committed a moment ago: lists have it already.
struct sandbox *registry_find(struct manager *m, const char *tenant, const char *id, struct err *err);
struct sandbox *sandbox_ref(struct sandbox *s);
void sandbox_unref(struct sandbox *s);                          // accepts NULL
// References to all live sandboxes; array new, count in *ret_n.
struct sandbox **registry_all(struct manager *m, size_t *ret_n);
// The present view, referenced.
struct sandbox_info *sandbox_view(struct sandbox *s);
int sandbox_present_state(struct sandbox *s);
// Makes row (members taken) the present view and wakes who waits.
void sandbox_publish(struct sandbox *s, struct sandbox_row *row_stolen);
struct err not_found_error(void);
// Answers "not running" (409, or 404 when gone) unless commands and files may go to the guest. Under sandbox.lock.
int sandbox_require_running(struct sandbox *s, struct err *err);

// ---- ops.c ----------------------------------------------------------------------------------------------------
struct op *op_new(const char *name, void (*run)(struct sandbox *, struct op *), const struct admission *a, int status,
                  const struct op_callbacks *cb);
void op_discard(struct op *op);                                // of one that was never enqueued
void op_enqueue(struct sandbox *s, struct op *op);              // takes op; a reference to s is held until it ran
void op_done(struct op *op, struct sandbox *s, const struct err *err); // calls cb.done once
// Called by an operation that has run but whose outcome is not decided yet: it keeps its place, so that nothing else is done
// with the sandbox, but no thread. op_unpark, due once from anywhere, lets the next one run.
void op_park(struct sandbox *s, struct op *op);
void op_unpark(struct sandbox *s, struct op *op);
// If-Match, when its turn comes. Error: precondition_failed/generation_mismatch.
int op_generation_check(struct sandbox *s, const struct op *op, struct err *err);
bool op_should_stop(struct sandbox *s, struct op *op, struct err *err); // deleted or cancelled meanwhile
void ops_kick_for_delete(struct sandbox *s);                    // a create that waits for its slot runs at once, to end
void job_begin(struct job_row *job, const struct admission *a, const char *kind);

void stage_note(struct job_row *job, const char *name, int64_t us);
struct stage {
    const char *name;
    int (*run)(void *ctx, struct err *err);
    void (*undo)(void *ctx);
    bool quick;                  // of milliseconds, and undone by a restart wherever it was cut: not journaled by itself
};
// Runs stages in order, journaling each name in job before it begins and its time after. On failure undoes the ones
// that ran, last first, and returns -1 with the stage's name in err->internal.
int stages_run(struct sandbox *s, struct job_row *job, const struct stage *stages, size_t n, void *ctx, struct err *err);

// ---- journal.c ------------------------------------------------------------------------------------------------
// A sandbox as everybody sees it from a change on: published on the store's thread right after the commit, before the caller
// or anybody else is told, so that who reads of an outcome in the store and asks again finds the sandbox in that state. The
// row's members are taken when the change succeeds.
struct shown {
    struct sandbox *s;
    struct sandbox_row *row;
};
// One durable step: everything that is set is written in one transaction.
struct change {
    struct shown *shown;
    size_t n_shown;
    const struct sandbox_row *insert, *update;
    unsigned max_live;
    int from_state;                    // 0: no state change to tell
    const char *cause;                 // of the state change
    const struct job_row *job_insert, *job_update;
    const struct admission *admit, *settle;
    const json_t *admit_facts, *facts;
    const struct sandbox_row *rows;    // more of them, each updated or inserted as `rows_insert` says
    size_t n_rows;
    bool rows_insert;
    int rows_from;                     // their state before, as from_state
    const struct continued *continued; // commands of a fork
    size_t n_continued;
    const struct snapshot_row *snapshot_insert, *snapshot_update;
    unsigned max_snapshots;
    const char *outcome, *ref, *problem_json;
    const char *event_kind;            // of the snapshot
    int status;
    bool forget_idem;
};
int change_commit(struct manager *m, const struct change *c, struct err *err);
// The same with row as update and as what is shown. Its members are taken when that succeeds …
int change_show(struct sandbox *s, const struct change *c, struct sandbox_row *row, struct err *err);
// … or either way.
int change_show_once(struct sandbox *s, const struct change *c, struct sandbox_row *row, struct err *err);
// Same, not waiting: deep-copies nothing; everything pointed to must live until done.
int change_submit(struct manager *m, const struct change *c, store_done_fn done, void *arg);
int change_apply(struct store_tx *tx, const struct change *c, struct err *err);
// Problem text and status of err for a (new text).
char *problem_of(struct manager *m, const struct err *err, const struct admission *a, int *ret_status);
// Fills outcome, status, problem and forget_idem of a failed settlement; the text is owned by the caller.
char *change_set_failure(struct manager *m, struct change *c, const struct admission *a, const struct err *err);
// Admission of the server itself (reaper, reconcile).
void system_admission(struct admission *a, const char *tenant, const char *operation, const char *sandbox_id);

// ---- crash.c ----------------------------------------------------------------------------------------------------
// Ends the process here where a test build was told so: AIRLOCK_CRASH_AT=<operation>.<stage>, by the name of the operation
// that runs; without a sandbox, stage is the whole name. Nothing in a release build.
#ifdef AIRLOCK_CRASH_POINTS
void crash_point(struct sandbox *s, const char *stage);
#else
#define crash_point(s, stage) ((void)(s), (void)(stage))
#endif

// ---- lifecycle ------------------------------------------------------------------------------------------------
void create_run(struct sandbox *s, struct op *op);              // create.c: wants a slot
void start_run(struct sandbox *s, struct op *op);
void create_resume(struct sandbox *s, struct op *op);           // reconcile: VM of a half-done create was adopted
extern const struct vm_callbacks SANDBOX_VM_CALLBACKS;          // events.c
void stop_run(struct sandbox *s, struct op *op);                // lifecycle.c
void delete_run(struct sandbox *s, struct op *op);
void manager_delete_by_system(struct sandbox *s, const struct admission *a, const char *cause);
void patch_run(struct sandbox *s, struct op *op);
void detach_run(struct sandbox *s, struct op *op);
void gone_run(struct sandbox *s, struct op *op);
void note_run(struct sandbox *s, struct op *op);                // state_reason of a running sandbox
// Takes the VM out of s (so that nobody sends to it any more), then ends or only forgets it. Returns 0 or -1.
int sandbox_drop_vm(struct sandbox *s, bool end, struct err *err);
void sandbox_uid_release(struct sandbox *s);
int manager_uid_take(struct manager *m, unsigned *ret_uid, struct err *err);
void manager_uid_give(struct manager *m, unsigned uid);
// The memory budget: worst case of every VM. A sandbox's share is taken with its admission or launch and given back with its
// uid (sandbox_uid_release). budget_take: unavailable/memory_budget. What is only kept for later (the pool, templates that
// nobody uses) is never in its way: it is given up before the VM starts, by budget_make_room.
unsigned budget_need(enum vm_accel accel, int memory_mib);
uint64_t budget_mib(const struct manager *m);
int budget_take(struct manager *m, unsigned mib, struct err *err);
void budget_force(struct manager *m, unsigned mib);  // of a VM that runs already
void budget_give(struct manager *m, unsigned mib);
bool budget_pool_take(struct manager *m, unsigned mib); // of what is left when everything counts
void budget_pool_give(struct manager *m, unsigned mib);
bool budget_build_take(struct manager *m, unsigned mib); // of a template's VM: the same, but what is kept for later gives way
int64_t budget_left(struct manager *m);              // MiB when everything counts; may be negative
void budget_make_room(struct manager *m);
bool manager_stopping(struct manager *m);
void memory_gauges(struct manager *m, json_t *g);    // memory.c
int sandbox_budget_take(struct sandbox *s, enum vm_accel accel, int memory_mib, struct err *err);
int sandbox_erase(struct sandbox *s, json_t *report, bool keep_records, struct err *err);
// Picks the accelerator for a launch, waiting for the verdict; refuses rather than downgrades.
int accel_choose(struct manager *m, const char *require, enum vm_accel *ret, struct err *err);
// The one that the sandbox had, for what continues from its state.
int accel_again(struct manager *m, const struct sandbox_row *row, enum vm_accel *ret, struct err *err);

// ---- commands -------------------------------------------------------------------------------------------------
void commands_on_frame(struct sandbox *s, int type, uint64_t id, const struct msg_command *c); // loop
void commands_on_output(struct sandbox *s, uint64_t id, const struct msg_data *d);             // loop
void commands_on_stdin_credit(struct sandbox *s, uint64_t id, uint64_t offset);                // loop
void commands_on_ready(struct sandbox *s);                       // loop: those that the agent does not know are lost
void commands_finish_all(struct sandbox *s, enum command_outcome outcome); // blocking: all settled when it returns
int command_adopt(struct sandbox *s, const struct command_row *row, const struct admission *a, struct err *err);
void commands_tick(struct sandbox *s, int64_t now_ms);
void commands_io(struct sandbox *s);                             // io.c: what waits for the disk
bool commands_want_io_locked(struct sandbox *s);
void command_lose(struct manager *m, const struct command_row *row, const struct admission *a); // without a VM

// ---- io.c -----------------------------------------------------------------------------------------------------
// Schedules the sandbox's io job (one at a time). Under sandbox.lock or not.
void io_schedule(struct sandbox *s);
void io_schedule_locked(struct sandbox *s);
// events.c, once a second: a VM whose agent has no session for long is told as mute.
void sandbox_session_tick(struct sandbox *s, int64_t now_ms);
void sandbox_log(struct sandbox *s, enum log_source source, const char *stream, const char *command_id, const void *text,
                 size_t len);
void sandbox_log_gap(struct sandbox *s, enum log_source source, uint64_t bytes);

// ---- act.c ----------------------------------------------------------------------------------------------------
// A short act that is admitted (durable), done, and settled, without a thread waiting in between. With an empty
// receipt_id it is done at once and leaves an audit entry in a later group. Embedded in its user's struct.
struct act {
    struct manager *m;
    struct admission a;
    int status;                          // of success
    void (*go)(struct act *act);         // admitted: do it; any thread; then act_end
    void (*done)(struct act *act, const struct err *err); // settled or refused; frees the user's struct
    struct err err;
    json_t *facts;                       // of the outcome; owned
    const char *outcome;                 // NULL: succeeded or failed by err
    char *problem;
    struct change change;
};
void act_begin(struct act *act);
void act_end(struct act *act, const struct err *err_or_null);

// ---- transfers (files.c) ----------------------------------------------------------------------------------------
void transfers_on_info(struct sandbox *s, uint64_t id, const struct msg_file_result *r);
void transfers_on_data(struct sandbox *s, uint64_t id, const struct msg_data *d, bool last);
void transfers_on_credit(struct sandbox *s, uint64_t id, uint64_t offset);
void transfers_on_result(struct sandbox *s, uint64_t id, const struct msg_file_result *r, bool last);
void transfers_fail_all(struct sandbox *s, const struct err *err);
void transfers_tick(struct sandbox *s, int64_t now_ms);

// ---- reconcile.c, reaper.c ----------------------------------------------------------------------------------------
int reconcile_start(struct manager *m, struct err *err);
bool pending_take(struct manager *m, const char *receipt_id, struct admission *ret);
void reaper_tick(void *arg);                                     // loop, once a second
void retention_sweep(struct manager *m); // at start: records whose rows are gone

#endif
