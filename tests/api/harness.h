// harness.h - request value in, response value out: an api over the fake manager and a real store in a directory of its
// own, and calls driven as the adapter would. Every answer is validated against the specification.
#ifndef TESTS_API_HARNESS_H
#define TESTS_API_HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "api/api.h"
#include "api/call.h"
#include "fake.h"

struct world {
    char dir[64];
    int dirfd;
    char *spec;
    size_t spec_len;
    json_t *spec_json;
    struct schema_compiler compiler;
    struct store *store;
    struct manager *m;
    struct api *api;
    char admin[TOKEN_TEXT_LEN + 1];   // every scope, tenant default
    char other[TOKEN_TEXT_LEN + 1];   // every scope, tenant other
    bool loose;                       // answers are not validated
};

struct world *world_new(void);
void world_free(struct world *w);
void world_restart(struct world *w);  // store, manager and api anew on the same files
// A token of its own; ret_id may be NULL.
void world_token(struct world *w, const char *tenant, unsigned scopes, int64_t expires_at_ms, char out[TOKEN_TEXT_LEN + 1],
                 char *ret_id);

struct ask {
    const char *method, *path, *query;
    const char *token;                // NULL: the admin's; "" none
    const char *headers[16];          // name, value, …
    const char *body;
    size_t body_len;                  // 0: strlen
    size_t piece;                     // pushed in pieces of that size; 0: whole
    bool chunked;
};

struct answer {
    int status;
    bool stream, head;
    int64_t stream_len;
    int end;                          // -1 or -2 of a stream
    char *body;
    size_t len;                       // announced, for HEAD
    json_t *json;                     // of JSON bodies
    char *headers[2 * API_HEADERS_MAX];
    size_t n_headers;
    char operation[64];
};

struct answer *ask(struct world *w, const struct ask *a);
struct answer *get(struct world *w, const char *path, const char *query);
struct answer *post(struct world *w, const char *path, const char *json);
void answer_free(struct answer *r);
const char *answer_header(const struct answer *r, const char *name); // NULL: none
const char *answer_text(const struct answer *r, const char *key);    // of the JSON body
void answer_is(const struct answer *r, int status, const char *kind, const char *code);
bool answer_faults(const struct answer *r, const char *pointer);     // errors[] has it

#define PATIENCE_MS 10000 // of every wait

// A call step by step.
struct driven {
    struct world *w;
    struct api_call *call;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    unsigned wakes;
};
struct driven *drive(struct world *w, const struct ask *a);          // with its whole body
struct driven *drive_begin(struct world *w, const struct ask *a);    // headers only
const struct api_response *drive_response(struct driven *d);         // waits
// Reads until the text holds `until` or the stream ends (returns -1 or -2 in *ret_end). New text so far.
char *drive_read(struct driven *d, const char *until, int *ret_end);
struct answer *drive_finish(struct driven *d);                       // reads to the end, ends the call
void drive_leave(struct driven *d);                                  // the client goes away

void wait_held(struct world *w, int n); // until n operations are held in the manager

// A running sandbox of the tenant of the token (NULL: admin); its id.
void make_sandbox(struct world *w, const char *token, char out[ID_MAX]);
char *path_of(const char *fmt, ...) __attribute__((format(printf, 1, 2))); // static ring of 8

#endif
