// call.h - what the files of this room share: the api, a call from its first byte to its end, and the table of handlers.
// Nothing outside api/ includes it (tests/api may).
//
// Who may touch a call: exactly one thread at a time "has" it. It is handed on, never shared: adapter → work pool → a
// callback of sandbox/ → work pool → answered. Shared by all are only: refs, the wake lock and what stands under it, and
// `answered`, which publishes the response to the adapter. A call lives until nobody holds a reference; the adapter's is
// given back by api_call_end, those of work under way when it ends, so that a gone client stops nothing.
#ifndef AIRLOCK_API_CALL_H
#define AIRLOCK_API_CALL_H

#include <pthread.h>
#include <stdatomic.h>

#include "api/api.h"
#include "api/faults.h"
#include "api/spec.h"
#include "api/timer.h"
#include "base/buf.h"
#include "base/json.h"
#include "base/work.h"
#include "sandbox/hub.h"
#include "store/evidence.h"
#include "store/store.h"

struct principal;
struct principals;
struct metrics;
struct idem_table;
struct idem_entry;
struct pump;

struct api {
    struct api_options o;
    struct manager *manager;
    struct store *store;
    struct hub *hub;
    struct spec *spec;
    struct principals *principals;
    struct metrics *metrics;
    struct timers *timers;
    struct idem_table *idem;
    struct work_pool *pool;
    struct work_pool *compat;        // reads whole snapshots: one at a time, and never a thread of `pool`
    atomic_bool stopping;
    atomic_bool verifying;           // one walk over the chain at a time
    atomic_ullong requests;
    char boot[12];                   // of made request ids
    pthread_mutex_t streams_lock;
    struct api_call *streams;        // calls with a stream
    atomic_uint calls;
};

struct param_value {
    const char *text;                // decoded; NUL-terminated, may hold NUL within len
    size_t len;
    int64_t integer;                 // PARAM_INTEGER; PARAM_BOOLEAN: 0 or 1
    double number;                   // PARAM_NUMBER
    bool given;
};

// What came in and what is being decided; freed once the answer stands.
struct input {
    struct param_value params[SPEC_PARAMS_MAX];
    char ids[SPEC_PATH_PARAMS_MAX][ID_MAX]; // in the order of the path; malformed ones replaced by one that never exists
    char *text;                      // storage of decoded parameters
    char *path;                      // raw
    struct buf body;
    uint8_t body_sha256[SHA256_BYTES];
    json_t *json;
    struct faults faults;
    struct err err;
    struct admission a;
    struct idem_entry *entry;        // in-flight claim on the key
    struct idem_row *replay;         // the stored answer that is given again
    json_t *extra;                   // members to add to a problem: result, report
    char *problem;                   // the problem as it was stored with the job
    char *query;                     // raw, kept while the token is looked up
    const char *content_range;       // 416
    int64_t content_length;
    bool json_type;                  // Content-Type is application/json
    bool has_admission;
    bool ran;                        // the handler had it
    bool noted;                      // the audit entry of a denial is written
    bool prove;                      // a refusal gets its receipt here: no act of sandbox/ made one
    bool admitted;                   // the intent is durable: audit_id and receipt_id mean something
    bool settles_itself;             // evidence of a failed act may exist or not: ask the store
    bool audited;                    // the audit entry of a read is written by sandbox/
    bool prefer_async, accept_stream, accept_json;
};

enum call_phase {
    PHASE_AUTH,                      // the token is being looked up
    PHASE_BODY,                      // the body comes
    PHASE_RUN,                       // the handler has it
};

struct stream_ops {
    // As api_stream_read.
    int64_t (*read)(struct api_call *c, void *out, size_t cap);
    // Once, when nobody will read any more; no wake-up may come from it afterwards.
    void (*close)(struct api_call *c, bool completed);
    void (*free)(struct api_call *c); // with the call
};

// Takes an upload piece by piece; set by a handler's `begin`.
struct sink_ops {
    size_t (*push)(struct api_call *c, const void *data, size_t len);
    void (*end)(struct api_call *c);
    void (*abort)(struct api_call *c);
    void (*free)(struct api_call *c);
};

struct call_text {
    struct call_text *next;
    char text[];
};

#define CALL_INLINE_TEXT 104

struct api_call {
    struct api *a;
    const struct operation *op;      // NULL: unknown
    struct principal *who;
    struct input *in;
    pthread_mutex_t lock;            // wake, ended, phase changes
    void (*wake)(void *arg);
    void *wake_arg;
    atomic_int refs;
    atomic_bool answered;
    atomic_bool ending;              // stream: token revoked or server stopping
    bool ended;                      // the adapter is gone
    bool body_ended;
    bool replayed;
    bool handed;                     // answered when the act was admitted: its end says nothing to this client
    _Atomic enum call_phase phase;
    int64_t t0_us;
    const char *request_id;
    const struct stream_ops *stream;
    const struct sink_ops *sink;
    void *state;                     // of stream or sink
    struct pump *pump;               // under lock: what waits for news on behalf of the call
    struct api_call *stream_prev, *stream_next;
    const void *body_owner;
    void (*body_release)(const void *owner);
    struct api_response resp;
    struct call_text *texts;
    size_t text_used;
    char text[CALL_INLINE_TEXT];
};

// ---- handlers -----------------------------------------------------------------------------------------------------
enum handler_mode {
    RUN_INLINE,   // memory only: in the adapter's thread
    RUN_POOLED,   // reads or writes the database: on the work pool
    RUN_ASYNC,    // starts something that answers by callback: in whatever thread
};
struct handler {
    const char *operation;
    enum handler_mode mode;
    void (*run)(struct api_call *c);
    // Raw bodies that are handed on: called when the headers are valid; sets c->sink or answers. NULL: collected.
    void (*begin)(struct api_call *c);
    // Builds the answer of c->in->replay again; NULL: by the kind of its reference (idem.c).
    void (*replay)(struct api_call *c);
};
extern const struct handler SANDBOX_HANDLERS[], SNAPSHOT_HANDLERS[], COMMAND_HANDLERS[], SIGNAL_HANDLERS[], STDIN_HANDLERS[], FILE_HANDLERS[], TRANSFER_HANDLERS[], LOG_HANDLERS[], TOKEN_HANDLERS[],
    EVIDENCE_HANDLERS[], META_HANDLERS[]; // each ends with an empty one

// ---- life (call.c) ------------------------------------------------------------------------------------------------
struct api_call *call_ref(struct api_call *c);
void call_unref(struct api_call *c);
void call_wake(struct api_call *c);
// Copies text into the call. "" when out of memory.
const char *call_text(struct api_call *c, const char *text);
const char *call_textf(struct api_call *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
// Runs fn on the pool with a reference that fn gives back (call_unref). When the pool is full or ends, in place.
void call_pool(struct api_call *c, void (*fn)(void *call));
// The response is complete: hands it to the adapter. Nothing of c->in may be used afterwards.
void call_answer(struct api_call *c);
struct faults *call_faults(struct api_call *c);
// Fails the call with c->in->err (and faults), from any thread that has it: evidence and idempotency are put in order
// on the pool, then the problem is answered.
void call_fail(struct api_call *c, const struct err *err);
void call_invalid(struct api_call *c);          // with the faults that were collected
bool call_has_faults(const struct api_call *c); // also unbuilt fields
void call_not_found(struct api_call *c);
// The handler may run: body is here, key is ours. Parses, validates, runs.
void call_run(struct api_call *c);
// Gives the answer of c->in->replay again.
void call_replay(struct api_call *c);
bool replay_is_problem(struct api_call *c);     // true: the stored answer was one, and was given again
// Claims the key of this call or waits for who has it; then call_run or the stored answer. Any thread.
void idem_begin(struct api_call *c);
void idem_release(struct api_call *c);          // the claim, if there is one: who waits looks again
int idem_store_refusal(struct api_call *c, int status, const char *problem); // pool
struct idem_table *idem_new(void);
void idem_free(struct idem_table *t);           // accepts NULL
// The body is complete: its handler or sink takes over.
void call_body_complete(struct api_call *c);
void stream_list_add(struct api_call *c);
void stream_list_remove(struct api_call *c);
void streams_end(struct api *a, const char *token_id); // NULL: all

// ---- parameters (params.c) ------------------------------------------------------------------------------------------
const struct param_value *call_param(const struct api_call *c, const char *name); // never NULL
int64_t call_param_integer(const struct api_call *c, const char *name, int64_t fallback);
bool call_param_flag(const struct api_call *c, const char *name);
const char *call_param_text(const struct api_call *c, const char *name, const char *fallback);
int64_t call_if_match(const struct api_call *c); // the generation asked for; 0: none or any; -1: one that nothing has
// Reads path, query and headers of the operation; adds faults.
int params_read(struct api_call *c, const struct api_request *req, const struct route_match *m);
void params_validate(struct api_call *c, const char *query);

// ---- admission (call_admit.c) -----------------------------------------------------------------------------------------
// The admission of this call: ids reserved on first use, as the operation's evidence asks.
struct admission *call_admission(struct api_call *c);
// Queues the audit entry of a read.
void call_audit(struct api_call *c, const char *decision, const char *outcome, const json_t *facts);
// user other than `sandbox` needs command:root; answers and returns false when it lacks.
bool call_user_allowed(struct api_call *c, const char *user);

#endif
