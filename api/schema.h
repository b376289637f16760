// schema.h - the part of JSON Schema that the specification uses, compiled once into compact nodes, and the validator
// over them. Owns the nodes; borrows names and enums from the parsed document. After compiling everything is read-only:
// any thread.
//
// Known: $ref, type (also as a list), properties, required, additionalProperties, propertyNames, enum, const, minimum,
// maximum, minLength, maxLength (code points), pattern (POSIX extended), items, minItems, maxItems, uniqueItems,
// minProperties, maxProperties, allOf, anyOf, oneOf, x-airlock-unbuilt, x-airlock-unbuilt-values. Annotations are
// skipped; any other keyword fails the compilation, so that a rule of the document is never silently ignored.
#ifndef AIRLOCK_API_SCHEMA_H
#define AIRLOCK_API_SCHEMA_H

#include <jansson.h>
#include <regex.h>
#include <stdbool.h>
#include <stdint.h>

#include "api/faults.h"
#include "base/err.h"

enum schema_type {
    SCHEMA_NULL = 1, SCHEMA_BOOLEAN = 2, SCHEMA_INTEGER = 4, SCHEMA_NUMBER = 8, SCHEMA_STRING = 16, SCHEMA_ARRAY = 32,
    SCHEMA_OBJECT = 64,
};

struct schema;

struct schema_property {
    const char *name;
    size_t name_len;
    const struct schema *schema;
};

struct schema_list {
    const struct schema **items;
    size_t n;
};

struct schema {
    struct schema *next;             // of the compiler, for freeing
    const json_t *source;
    unsigned types;                  // enum schema_type bits; 0: any
    struct schema_property *props;
    size_t n_props;
    const char **required;
    size_t n_required;
    bool closed;                     // additionalProperties: false
    const struct schema *extra;      // additionalProperties as a schema
    const struct schema *names;      // propertyNames
    const json_t *enums, *constant, *unbuilt_values;
    bool unbuilt;
    bool has_min, has_max;
    double min, max;                 // whole numbers up to 2^53 are exact
    bool guest_path;                 // path_fault applies, code path_invalid
    int64_t min_length, max_length;  // -1: none; likewise below
    int64_t min_items, max_items, min_props, max_props;
    bool unique_items;
    bool has_pattern;
    regex_t pattern;
    const char *pattern_text;
    const struct schema *items;
    struct schema_list all_of, any_of, one_of;
};

struct schema_compiler {
    const json_t *document;          // for $ref; borrowed
    struct schema *all;
};

// The compiled node of json (memoized by its place in the document), or NULL with internal/spec.
const struct schema *schema_compile(struct schema_compiler *c, const json_t *json, struct err *err);
// Follows $ref; NULL with internal/spec when it leads nowhere.
const json_t *schema_resolve(const json_t *document, const json_t *json, struct err *err);
void schema_compiler_free(struct schema_compiler *c);

// Adds every fault of value, with pointers that begin with `pointer` ("" for a body).
void schema_validate(const struct schema *s, const json_t *value, const char *pointer, struct faults *f);
// The same for a text that came in a query, path or header.
void schema_validate_text(const struct schema *s, const char *text, size_t len, const char *pointer, struct faults *f);
void schema_validate_number(const struct schema *s, double value, const char *pointer, struct faults *f);

#endif
