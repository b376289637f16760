// spec.h - the specification as the server uses it: a route tree and, per operation, parameters, body schema, scope and
// evidence. Owns the parsed document and everything compiled from it. Read-only once loaded: any thread.
#ifndef AIRLOCK_API_SPEC_H
#define AIRLOCK_API_SPEC_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "api/schema.h"
#include "base/err.h"
#include "base/id.h"

#define SPEC_PARAMS_MAX 20
#define SPEC_PATH_PARAMS_MAX 3
#define SPEC_METHODS 7

enum evidence { EVIDENCE_NONE = 0, EVIDENCE_AUDIT = 1, EVIDENCE_RECEIPT = 2 };
enum body_kind {
    BODY_NONE = 0,
    BODY_JSON,       // collected, parsed, validated
    BODY_RAW,        // bytes: the handler says whether they are collected or handed on piece by piece
};
enum param_in { PARAM_QUERY, PARAM_HEADER, PARAM_PATH };
enum param_kind { PARAM_TEXT, PARAM_INTEGER, PARAM_NUMBER, PARAM_BOOLEAN };

struct param {
    const char *name;
    size_t name_len;
    enum param_in in;
    enum param_kind kind;
    bool required;
    bool guest_path;         // path_fault applies, code path_invalid
    int id_type;             // enum id_type; -1: none. A malformed id is answered like one that does not exist
    bool root_scope;         // a value other than `sandbox` needs command:root
    const struct schema *schema;
    char pointer[64];        // "/query/limit", "/header/If-Match"
};

struct handler;
struct operation {
    const char *name;        // "sandbox.create"
    const char *method;
    char *path;              // "/v1/sandboxes/{id}"
    unsigned scope;          // bit; 0: public
    enum evidence evidence;
    enum body_kind body_kind;
    bool body_required;
    const struct schema *body;
    struct param params[SPEC_PARAMS_MAX];
    size_t n_params;
    size_t n_query;          // of them in the query
    bool keyed;              // takes Idempotency-Key
    size_t index;            // 0 … n_operations-1
    const struct handler *handler;
};

struct spec;
struct spec *spec_load(const char *json, size_t len, struct err *err); // new, or NULL with internal/spec
void spec_free(struct spec *s);                                        // accepts NULL
size_t spec_count(const struct spec *s);
struct operation *spec_at(struct spec *s, size_t index);

struct route_match {
    const struct operation *op;      // NULL: no such method here, or no such path
    const char *allow;               // set when the path is known: value for Allow
    struct {
        const char *text;
        size_t len;
    } captured[SPEC_PATH_PARAMS_MAX]; // raw segments for {…}, borrowed from path
    size_t n_captured;
};
void spec_route(const struct spec *s, const char *method, const char *path, struct route_match *ret);

#endif
