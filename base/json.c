#include "base/json.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/limits.h"

// Nesting as jansson would see it, so that it never recurses deeper than we allow.
static bool too_deep(const char *text, size_t len)
{
    int depth = 0;
    bool string = false;
    for (size_t i = 0; i < len; i++) {
        const char c = text[i];
        if (string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                string = false;
        } else if (c == '"') {
            string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > LIMIT_JSON_DEPTH)
                return true;
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return false;
}

json_t *json_parse_strict(const char *text, size_t len, struct err *err)
{
    json_error_t fault;
    if (too_deep(text, len)) {
        err_set(err, ERR_VALIDATION, "malformed_json", "the JSON is nested deeper than %d levels", LIMIT_JSON_DEPTH);
        return NULL;
    }
    json_t *value = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &fault);
    if (!value)
        err_set(err, ERR_VALIDATION, "malformed_json", "line %d, column %d: %.200s", fault.line, fault.column, fault.text);
    return value;
}

char *json_canonical(const json_t *value)
{
    return json_dumps(value, JSON_SORT_KEYS | JSON_COMPACT | JSON_ENCODE_ANY);
}

int json_put(json_t *obj, const char *key, json_t *value)
{
    return json_object_set_new(obj, key, value);
}

int json_put_str(json_t *obj, const char *key, const char *text)
{
    return json_object_set_new(obj, key, text ? json_string(text) : json_null());
}

int json_put_int(json_t *obj, const char *key, int64_t v)
{
    return json_object_set_new(obj, key, json_integer(v));
}

int json_put_time(json_t *obj, const char *key, int64_t wall_ms)
{
    char text[CLOCK_TEXT_MAX];
    return json_put_str(obj, key, wall_ms ? clock_text(wall_ms, text) : NULL);
}

const char *json_get_str(const json_t *obj, const char *key)
{
    return json_string_value(json_object_get(obj, key));
}

int64_t json_get_int(const json_t *obj, const char *key, int64_t fallback)
{
    const json_t *v = json_object_get(obj, key);
    return json_is_integer(v) ? json_integer_value(v) : fallback;
}
