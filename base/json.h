// json.h - helpers over jansson: strict parsing, canonical text, building. Owns nothing but what it returns.
// Any thread; a json_t belongs to one thread at a time.
#ifndef AIRLOCK_BASE_JSON_H
#define AIRLOCK_BASE_JSON_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

// Strict parse of len bytes: UTF-8, no duplicate keys, no NUL in strings, depth <= LIMIT_JSON_DEPTH (checked
// before jansson recurses), nothing after the value. Returns new, or NULL with kind validation, code
// malformed_json and line and column in detail.
json_t *json_parse_strict(const char *text, size_t len, struct err *err);

// One text for one value: keys sorted by their UTF-8 bytes, no spaces, integers only where we write numbers. Like RFC 8785
// for the keys and values that we write; control characters are escaped in upper case. Returns new text.
char *json_canonical(const json_t *value);

// obj[key] = value, stealing value; a NULL value (out of memory) is an error. 0, or -1.
int json_put(json_t *obj, const char *key, json_t *value);
int json_put_str(json_t *obj, const char *key, const char *text_or_null); // null for NULL
int json_put_int(json_t *obj, const char *key, int64_t v);
int json_put_time(json_t *obj, const char *key, int64_t wall_ms_or_0);    // null for 0
// Borrowed text of obj[key], or NULL where it is missing or no string.
const char *json_get_str(const json_t *obj, const char *key);
int64_t json_get_int(const json_t *obj, const char *key, int64_t fallback);

__attribute__((unused)) static inline void json_cleanup_(json_t **j) { json_decref(*j); }
#define CLEANUP_JSON __attribute__((cleanup(json_cleanup_)))

#endif
