// api.h - the HTTP-shaped face of the product without HTTP's library: request value in, response value out. Owns
// routing (from the embedded OpenAPI document), principals, validation, handlers, views, problems, idempotent replay.
// Does not own sockets (server/) nor sandboxes (sandbox/). In-process tests use exactly these calls.
//
// Life of a call: api_begin (headers are complete) → api_body_push … api_body_end (also when there is no body) →
// api_response becomes non-NULL → for a streamed body api_stream_read until the end → api_call_end. A response may be
// there at any time, also before the body was pushed (refusals): the adapter then drains or cuts.
//
// Threads: calls about one api_call come from one thread at a time. wake(arg) may come from any thread, at any time
// between api_begin and the return of api_call_end, and says only: look again (window free, response there, stream
// readable). It must not call back into api. None of these functions blocks.
#ifndef AIRLOCK_API_API_H
#define AIRLOCK_API_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "sandbox/manager.h"

struct api;
struct api_call;

struct api_options {
    struct manager *manager;       // borrowed
    struct store *store;           // borrowed
    const char *spec_json;         // the OpenAPI document, JSON; borrowed for ever (embedded)
    size_t spec_len;
    const char *docs_html;         // borrowed for ever
    size_t docs_len;
    const char *server_version;
    unsigned workers;              // threads for handlers that touch the database; 4
    // What is missing before /readyz may say 200, from the server's side ("token file"); NULL or returns true: nothing.
    bool (*server_ready)(void *arg, char *out, size_t cap);
    void *server_arg;
    const char *state_dir;         // for GET /v1/audit/verify, which reads the files; borrowed. NULL: unavailable
};

// Fails (internal/spec) when the specification and the handler table are not equal: each operationId has exactly one
// handler and each handler an operation; each operation has scope and evidence.
struct api *api_new(const struct api_options *options, struct err *err);
void api_stop(struct api *a);      // ends streams, refuses new work (unavailable); then every call must be ended
void api_free(struct api *a);
// manager_options.render_problem.
char *api_render_problem(const struct err *err, const struct admission *a, int *ret_status);

struct api_request {
    const char *method;
    const char *path;              // raw as on the wire, up to '?', not decoded
    const char *query;             // raw after '?', "" for none
    const char *remote;            // "127.0.0.1", for audit
    int64_t content_length;        // -1: not given
    bool chunked;
    const char *(*header)(void *arg, const char *name); // first value or NULL; valid until api_begin returns
    void *header_arg;
};

// Never NULL but when out of memory. Everything in req is copied as needed.
struct api_call *api_begin(struct api *a, const struct api_request *req, void (*wake)(void *arg), void *wake_arg);
// Bytes taken; 0: none now, wait for wake. Less than len may be taken.
size_t api_body_push(struct api_call *c, const void *data, size_t len);
void api_body_end(struct api_call *c);

#define API_HEADERS_MAX 14
struct api_header {
    const char *name;
    const char *value;
};
struct api_response {
    int status;
    struct api_header headers[API_HEADERS_MAX];
    size_t n_headers;
    const char *body;              // NULL for a stream
    size_t body_len;
    bool head;                     // answer to HEAD: body_len is announced, no body is sent
    bool stream;
    int64_t stream_len;            // -1: unknown (chunked)
};
// NULL while there is none. Valid until api_call_end.
const struct api_response *api_response(struct api_call *c);
// > 0 bytes, 0: none now (wait for wake), -1: end, -2: broken (cut the connection, so that the client sees it).
int64_t api_stream_read(struct api_call *c, void *out, size_t cap);
// The exchange is over: completed (true) or the client went away. Frees; work in the guest goes on.
void api_call_end(struct api_call *c, bool completed);

// One access log line's worth: operation id ("" unknown), tenant ("" none), request id. Borrowed until the end.
void api_call_describe(struct api_call *c, const char **ret_operation, const char **ret_tenant, const char **ret_request_id);

#endif
