// Validating: every fault of a value, each with its JSON pointer. Messages name rules, never the client's values.
#include "api/schema.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/enc.h"
#include "base/path.h"

#define POINTER_MAX 2048

struct walk {
    struct faults *f;
    struct buf *at; // the pointer of the value under the hand
};

static void check(struct walk *w, const struct schema *s, const json_t *v);

static const char *pointer_of(struct walk *w)
{
    return buf_text(w->at);
}

static void leave(struct walk *w, size_t before)
{
    w->at->len = before;
    if (w->at->data)
        w->at->data[before] = 0;
}

// Appends "/key" with RFC 6901 escapes; returns the length to come back to.
static size_t enter(struct walk *w, const char *key)
{
    const size_t before = w->at->len;
    bool room = buf_add(w->at, "/", 1);
    for (; room && *key; key++) {
        if (*key == '~' || *key == '/')
            room = buf_add(w->at, *key == '~' ? "~0" : "~1", 2);
        else
            room = buf_add(w->at, key, 1);
    }
    if (!room) { // a pointer that is too long stays cut, behind a whole character
        leave(w, enc_utf8_cut(w->at->data, w->at->len));
        w->at->failed = false;
    }
    return before;
}

static unsigned type_of(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return SCHEMA_OBJECT;
    case JSON_ARRAY:
        return SCHEMA_ARRAY;
    case JSON_STRING:
        return SCHEMA_STRING;
    case JSON_INTEGER:
        return SCHEMA_INTEGER | SCHEMA_NUMBER;
    case JSON_REAL:
        return SCHEMA_NUMBER;
    case JSON_TRUE:
    case JSON_FALSE:
        return SCHEMA_BOOLEAN;
    case JSON_NULL:
        break;
    }
    return SCHEMA_NULL;
}

static void type_fault(struct walk *w, unsigned types)
{
    static const char *const NAMES[] = {"null", "a boolean", "an integer", "a number", "a string", "an array", "an object"};
    char text[120] = "";
    for (unsigned i = 0; i < 7; i++)
        if (types & (1u << i))
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", *text ? " or " : "", NAMES[i]);
    faults_add(w->f, pointer_of(w), "must be %s", text);
}

static bool in_list(const json_t *list, const json_t *v)
{
    size_t i;
    const json_t *one;
    json_array_foreach(list, i, one) {
        if (json_equal(one, v))
            return true;
    }
    return false;
}

static void enum_fault(const json_t *enums, const char *pointer, struct faults *f)
{
    char text[400] = "";
    size_t i;
    const json_t *one;
    json_array_foreach(enums, i, one) {
        char *shown = json_is_string(one) ? strdup(json_string_value(one)) : json_dumps(one, JSON_ENCODE_ANY);
        if (strlen(text) + strlen(shown ? shown : "") + 3 < sizeof text)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", *text ? ", " : "", shown ? shown : "");
        free(shown);
    }
    faults_add(f, pointer, "must be one of %s", text);
}

static int64_t code_points(const char *text, size_t len)
{
    int64_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)text[i] & 0xc0) != 0x80;
    return n;
}

static void check_path(const char *text, size_t len, const char *at, struct faults *f)
{
    const char *why = path_fault(text, len);
    if (!why)
        return;
    faults_add(f, at, "%s", why);
    f->code = "path_invalid";
}

static void check_text(const struct schema *s, const char *text, size_t len, const char *at, struct faults *f)
{
    if (s->guest_path)
        check_path(text, len, at, f);
    if (s->min_length >= 0 || s->max_length >= 0) {
        const int64_t n = code_points(text, len);
        if (s->min_length >= 0 && n < s->min_length)
            faults_add(f, at, "must have at least %" PRId64 " character%s", s->min_length, s->min_length == 1 ? "" : "s");
        if (s->max_length >= 0 && n > s->max_length) {
            faults_add(f, at, "must have at most %" PRId64 " characters", s->max_length);
            return;
        }
    }
    if (s->has_pattern && (memchr(text, 0, len) || regexec(&s->pattern, text, 0, NULL, 0) != 0))
        faults_add(f, at, "must match %s", s->pattern_text);
}

static void check_bounds(const struct schema *s, double v, const char *at, struct faults *f)
{
    if (s->has_min && !(v >= s->min))
        faults_add(f, at, "must be at least %.16g", s->min);
    if (s->has_max && !(v <= s->max))
        faults_add(f, at, "must be at most %.16g", s->max);
}

void schema_validate_number(const struct schema *s, double v, const char *at, struct faults *f)
{
    check_bounds(s, v, at, f);
    for (size_t i = 0; i < s->all_of.n; i++)
        schema_validate_number(s->all_of.items[i], v, at, f);
}

static bool enum_has_text(const json_t *enums, const char *text, size_t len)
{
    size_t i;
    const json_t *one;
    json_array_foreach(enums, i, one) {
        if (json_is_string(one) && json_string_length(one) == len && memcmp(json_string_value(one), text, len) == 0)
            return true;
    }
    return false;
}

void schema_validate_text(const struct schema *s, const char *text, size_t len, const char *at, struct faults *f)
{
    for (size_t i = 0; i < s->all_of.n; i++)
        schema_validate_text(s->all_of.items[i], text, len, at, f);
    if (s->enums && !enum_has_text(s->enums, text, len)) {
        enum_fault(s->enums, at, f);
        return;
    }
    if (s->unbuilt || (s->unbuilt_values && enum_has_text(s->unbuilt_values, text, len)))
        faults_unbuilt(f, at);
    check_text(s, text, len, at, f);
}

static const struct schema_property *find_property(const struct schema *s, const char *key, size_t len)
{
    for (size_t i = 0; i < s->n_props; i++)
        if (s->props[i].name_len == len && memcmp(s->props[i].name, key, len) == 0)
            return &s->props[i];
    return NULL;
}

static void check_member(struct walk *w, const struct schema *s, const char *key, const json_t *v)
{
    const struct schema_property *p = find_property(s, key, strlen(key));
    const size_t before = enter(w, key);
    if (s->names) {
        const size_t n = w->f->n;
        schema_validate_text(s->names, key, strlen(key), pointer_of(w), w->f);
        for (size_t i = n; i < w->f->n; i++) { // the rule is about the name, not the value
            char *said = NULL;
            if (asprintf(&said, "the name %s", w->f->items[i].message) >= 0) {
                free(w->f->items[i].message);
                w->f->items[i].message = said;
            }
        }
    }
    if (p)
        check(w, p->schema, v);
    else if (s->extra)
        check(w, s->extra, v);
    else if (s->closed)
        faults_add(w->f, pointer_of(w), "unknown field");
    leave(w, before);
}

static void check_object(struct walk *w, const struct schema *s, const json_t *v)
{
    const int64_t n = (int64_t)json_object_size(v);
    if (s->min_props >= 0 && n < s->min_props)
        faults_add(w->f, pointer_of(w), "must have at least %" PRId64 " member%s", s->min_props,
                   s->min_props == 1 ? "" : "s");
    if (s->max_props >= 0 && n > s->max_props)
        faults_add(w->f, pointer_of(w), "must have at most %" PRId64 " members", s->max_props);
    for (size_t i = 0; i < s->n_required; i++) {
        if (json_object_get(v, s->required[i]))
            continue;
        const size_t before = enter(w, s->required[i]);
        faults_add(w->f, pointer_of(w), "is required");
        leave(w, before);
    }
    const char *key;
    json_t *one;
    json_object_foreach((json_t *)v, key, one) check_member(w, s, key, one);
}

static bool repeated(const json_t *list, size_t at)
{
    for (size_t i = 0; i < at; i++)
        if (json_equal(json_array_get(list, i), json_array_get(list, at)))
            return true;
    return false;
}

static void check_array(struct walk *w, const struct schema *s, const json_t *v)
{
    const int64_t n = (int64_t)json_array_size(v);
    if (s->min_items >= 0 && n < s->min_items)
        faults_add(w->f, pointer_of(w), "must have at least %" PRId64 " item%s", s->min_items, s->min_items == 1 ? "" : "s");
    if (s->max_items >= 0 && n > s->max_items) {
        faults_add(w->f, pointer_of(w), "must have at most %" PRId64 " items", s->max_items);
        return;
    }
    size_t i;
    const json_t *one;
    json_array_foreach(v, i, one) {
        char index[24];
        snprintf(index, sizeof index, "%zu", i);
        const size_t before = enter(w, index);
        if (s->items)
            check(w, s->items, one);
        if (s->unique_items && repeated(v, i))
            faults_add(w->f, pointer_of(w), "must not be repeated");
        leave(w, before);
    }
}

// ---- alternatives -------------------------------------------------------------------------------------------------
static bool only_requires(const struct schema_list *list)
{
    for (size_t i = 0; i < list->n; i++) {
        const struct schema *s = list->items[i];
        if (s->n_required == 0 || s->n_props > 0 || s->types & ~(unsigned)SCHEMA_OBJECT || s->closed || s->enums)
            return false;
    }
    return list->n > 0;
}

// "image, snapshot_id, plan_id" of branches that only name what must be there.
static void check_required_sets(struct walk *w, const struct schema_list *list, const json_t *v, bool one)
{
    char names[300] = "";
    size_t matched = 0;
    for (size_t i = 0; i < list->n; i++) {
        const struct schema *s = list->items[i];
        bool all = true;
        for (size_t k = 0; k < s->n_required; k++) {
            all = all && json_object_get(v, s->required[k]);
            const size_t at = strlen(names);
            snprintf(names + at, sizeof names - at, "%s%s", at == 0 ? "" : k == 0 ? ", " : " with ", s->required[k]);
        }
        matched += all;
    }
    if (matched == 0 || (one && matched > 1))
        faults_add(w->f, pointer_of(w), "%s one of %s must be given", one ? "exactly" : "at least", names);
}

static size_t try_branch(struct walk *w, const struct schema *s, const json_t *v, struct faults *ret)
{
    struct walk inner = {ret, w->at};
    memset(ret, 0, sizeof *ret);
    check(&inner, s, v);
    return ret->n;
}

static void take_faults(struct faults *to, struct faults *from)
{
    for (size_t i = 0; i < from->n; i++)
        faults_add(to, from->items[i].pointer, "%s", from->items[i].message);
    if (from->unbuilt)
        faults_unbuilt(to, from->unbuilt);
    faults_free(from);
}

// The branch that fits; where none does, the faults of the one that comes nearest. With `one`, two that fit are a fault.
static void check_branches(struct walk *w, const struct schema_list *list, const json_t *v, bool one)
{
    struct faults *best = calloc(2, sizeof *best);
    if (!best) {
        w->f->out_of_memory = true;
        return;
    }
    struct faults *now = best + 1;
    size_t matched = 0;
    for (size_t i = 0; i < list->n; i++) {
        const size_t bad = try_branch(w, list->items[i], v, now);
        matched += bad == 0;
        if (i == 0 || bad < best->n) {
            faults_free(best);
            *best = *now;
        } else {
            faults_free(now);
        }
    }
    if (one && matched > 1)
        faults_add(w->f, pointer_of(w), "must have exactly one of its forms");
    take_faults(w->f, best);
    free(best);
}

static void check_alternatives(struct walk *w, const struct schema *s, const json_t *v)
{
    for (size_t i = 0; i < s->all_of.n; i++)
        check(w, s->all_of.items[i], v);
    const struct schema_list *lists[] = {&s->any_of, &s->one_of};
    for (int i = 0; i < 2; i++) {
        if (lists[i]->n == 0)
            continue;
        if (json_is_object(v) && only_requires(lists[i]))
            check_required_sets(w, lists[i], v, i == 1);
        else
            check_branches(w, lists[i], v, i == 1);
    }
}

// null, false, {} and [] ask for nothing.
static bool says_something(const json_t *v)
{
    return !json_is_null(v) && !json_is_false(v) && !(json_is_object(v) && json_object_size(v) == 0) &&
           !(json_is_array(v) && json_array_size(v) == 0);
}

static void check(struct walk *w, const struct schema *s, const json_t *v)
{
    const unsigned type = type_of(v);
    if (s->types && !(s->types & type)) {
        type_fault(w, s->types);
        return;
    }
    if ((s->unbuilt && says_something(v)) || (s->unbuilt_values && in_list(s->unbuilt_values, v)))
        faults_unbuilt(w->f, pointer_of(w));
    if (s->enums && !in_list(s->enums, v)) {
        enum_fault(s->enums, pointer_of(w), w->f);
        return;
    }
    if (s->constant && !json_equal(s->constant, v))
        faults_add(w->f, pointer_of(w), "must be the one value that is allowed here");
    if (type == SCHEMA_STRING)
        check_text(s, json_string_value(v), json_string_length(v), pointer_of(w), w->f);
    else if (type & SCHEMA_NUMBER)
        check_bounds(s, json_number_value(v), pointer_of(w), w->f);
    else if (type == SCHEMA_OBJECT)
        check_object(w, s, v);
    else if (type == SCHEMA_ARRAY)
        check_array(w, s, v);
    check_alternatives(w, s, v);
}

void schema_validate(const struct schema *s, const json_t *value, const char *pointer, struct faults *f)
{
    CLEANUP_BUF struct buf at = BUF_INIT(POINTER_MAX);
    buf_adds(&at, pointer);
    struct walk w = {f, &at};
    check(&w, s, value);
}
