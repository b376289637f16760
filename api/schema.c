// Compiling: from the document's JSON to nodes. Refuses keywords it does not know.
#include "api/schema.h"

#include <stdlib.h>
#include <string.h>

static const struct schema *compile(struct schema_compiler *c, const json_t *json, struct err *err);

const json_t *schema_resolve(const json_t *document, const json_t *json, struct err *err)
{
    for (int depth = 0; depth < 16; depth++) {
        const char *ref = json_string_value(json_object_get(json, "$ref"));
        if (!ref)
            return json;
        if (strncmp(ref, "#/", 2) != 0)
            break;
        const json_t *at = document;
        for (const char *p = ref + 2; at && *p;) {
            const size_t len = strcspn(p, "/");
            char name[128];
            if (len >= sizeof name)
                break;
            memcpy(name, p, len);
            name[len] = 0;
            at = json_object_get(at, name);
            p += len + (p[len] == '/');
        }
        if (!at)
            break;
        json = at;
    }
    err_set(err, ERR_INTERNAL, "spec", "a $ref of the specification leads nowhere: %s",
            json_string_value(json_object_get(json, "$ref")));
    return NULL;
}

static unsigned type_bit(const char *name)
{
    static const struct {
        const char *name;
        unsigned bit;
    } TYPES[] = {{"null", SCHEMA_NULL},       {"boolean", SCHEMA_BOOLEAN}, {"integer", SCHEMA_INTEGER},
                 {"number", SCHEMA_NUMBER},   {"string", SCHEMA_STRING},   {"array", SCHEMA_ARRAY},
                 {"object", SCHEMA_OBJECT}};
    for (size_t i = 0; name && i < sizeof TYPES / sizeof *TYPES; i++)
        if (strcmp(TYPES[i].name, name) == 0)
            return TYPES[i].bit;
    return 0;
}

static int compile_type(struct schema *s, const json_t *value, struct err *err)
{
    size_t i;
    const json_t *one;
    if (json_is_string(value))
        s->types = type_bit(json_string_value(value));
    json_array_foreach(value, i, one) s->types |= type_bit(json_string_value(one));
    return s->types ? 0 : err_set(err, ERR_INTERNAL, "spec", "a schema's type is unknown");
}

static int compile_properties(struct schema_compiler *c, struct schema *s, const json_t *value, struct err *err)
{
    const char *name;
    json_t *one;
    s->props = calloc(json_object_size(value) + 1, sizeof *s->props);
    if (!s->props)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_object_foreach((json_t *)value, name, one) {
        struct schema_property *p = &s->props[s->n_props];
        *p = (struct schema_property){name, strlen(name), compile(c, one, err)};
        if (!p->schema)
            return -1;
        if (strcmp(name, "cwd") == 0)
            ((struct schema *)p->schema)->guest_path = true;
        s->n_props++;
    }
    return 0;
}

static int compile_required(struct schema *s, const json_t *value, struct err *err)
{
    size_t i;
    const json_t *one;
    s->required = calloc(json_array_size(value) + 1, sizeof *s->required);
    if (!s->required)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_array_foreach(value, i, one) s->required[s->n_required++] = json_string_value(one);
    return 0;
}

static int compile_extra(struct schema_compiler *c, struct schema *s, const json_t *value, struct err *err)
{
    if (json_is_boolean(value)) {
        s->closed = json_is_false(value);
        return 0;
    }
    s->extra = compile(c, value, err);
    return s->extra ? 0 : -1;
}

static int compile_pattern(struct schema *s, const json_t *value, struct err *err)
{
    s->pattern_text = json_string_value(value);
    if (!s->pattern_text || regcomp(&s->pattern, s->pattern_text, REG_EXTENDED | REG_NOSUB) != 0)
        return err_set(err, ERR_INTERNAL, "spec", "a pattern does not compile: %s", s->pattern_text);
    s->has_pattern = true;
    return 0;
}

static int compile_list(struct schema_compiler *c, struct schema_list *list, const json_t *value, struct err *err)
{
    size_t i;
    const json_t *one;
    list->items = calloc(json_array_size(value) + 1, sizeof *list->items);
    if (!list->items)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_array_foreach(value, i, one) {
        list->items[list->n] = compile(c, one, err);
        if (!list->items[list->n++])
            return -1;
    }
    return 0;
}

// The specification's component for paths in a guest; a command's cwd follows the same rules.
static bool is_guest_path(const struct schema_compiler *c, const json_t *json)
{
    const json_t *schemas = json_object_get(json_object_get(c->document, "components"), "schemas");
    return json == json_object_get(schemas, "GuestPathText");
}

// Keywords that say nothing about which values are valid.
static bool is_annotation(const char *key)
{
    static const char *const NAMES[] = {"title",      "description", "default",    "example",      "examples",
                                        "format",     "deprecated",  "readOnly",   "writeOnly",    "$comment",
                                        "contentEncoding", "contentMediaType", "externalDocs", "discriminator"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(NAMES[i], key) == 0)
            return true;
    return strncmp(key, "x-", 2) == 0;
}

static int compile_nested(struct schema_compiler *c, struct schema *s, const char *key, const json_t *v,
                          struct err *err)
{
    if (strcmp(key, "properties") == 0)
        return compile_properties(c, s, v, err);
    if (strcmp(key, "additionalProperties") == 0 || strcmp(key, "unevaluatedProperties") == 0)
        return compile_extra(c, s, v, err);
    if (strcmp(key, "propertyNames") == 0)
        return (s->names = compile(c, v, err)) ? 0 : -1;
    if (strcmp(key, "items") == 0)
        return (s->items = compile(c, v, err)) ? 0 : -1;
    if (strcmp(key, "allOf") == 0)
        return compile_list(c, &s->all_of, v, err);
    if (strcmp(key, "anyOf") == 0)
        return compile_list(c, &s->any_of, v, err);
    if (strcmp(key, "oneOf") == 0)
        return compile_list(c, &s->one_of, v, err);
    if (is_annotation(key))
        return 0;
    return err_set(err, ERR_INTERNAL, "spec", "the specification uses a keyword the server does not know: %s", key);
}

static int compile_keyword(struct schema_compiler *c, struct schema *s, const char *key, const json_t *v,
                           struct err *err)
{
    const struct {
        const char *name;
        int64_t *to;
    } counts[] = {
        {"minLength", &s->min_length},   {"maxLength", &s->max_length},
        {"minItems", &s->min_items},     {"maxItems", &s->max_items},
        {"minProperties", &s->min_props}, {"maxProperties", &s->max_props},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (strcmp(key, counts[i].name) == 0) {
            *counts[i].to = json_integer_value(v);
            return 0;
        }
    if (strcmp(key, "minimum") == 0) {
        s->has_min = true;
        s->min = json_number_value(v);
        return 0;
    }
    if (strcmp(key, "maximum") == 0) {
        s->has_max = true;
        s->max = json_number_value(v);
        return 0;
    }
    if (strcmp(key, "type") == 0)
        return compile_type(s, v, err);
    if (strcmp(key, "required") == 0)
        return compile_required(s, v, err);
    if (strcmp(key, "pattern") == 0)
        return compile_pattern(s, v, err);
    if (strcmp(key, "enum") == 0)
        s->enums = v;
    else if (strcmp(key, "const") == 0)
        s->constant = v;
    else if (strcmp(key, "uniqueItems") == 0)
        s->unique_items = json_is_true(v);
    else if (strcmp(key, "x-airlock-unbuilt") == 0)
        s->unbuilt = json_is_true(v);
    else if (strcmp(key, "x-airlock-unbuilt-values") == 0)
        s->unbuilt_values = v;
    else
        return compile_nested(c, s, key, v, err);
    return 0;
}

// A $ref may stand beside keywords of its own (3.1): the same as allOf with it.
static int compile_ref_with_siblings(struct schema_compiler *c, struct schema *s, const json_t *json,
                                     struct err *err)
{
    const json_t *target = schema_resolve(c->document, json, err);
    if (!target)
        return -1;
    s->all_of.items = calloc(1, sizeof *s->all_of.items);
    if (!s->all_of.items)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    s->all_of.items[0] = compile(c, target, err);
    s->all_of.n = 1;
    return s->all_of.items[0] ? 0 : -1;
}

static bool only_ref(const json_t *json)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)json, key, value) {
        const bool unbuilt = strncmp(key, "x-airlock-unbuilt", 17) == 0;
        if (strcmp(key, "$ref") != 0 && (unbuilt || !is_annotation(key)))
            return false;
    }
    return true;
}

static struct schema *node_new(struct schema_compiler *c, const json_t *source)
{
    struct schema *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->source = source;
    s->guest_path = is_guest_path(c, source);
    s->min_length = s->max_length = s->min_items = s->max_items = s->min_props = s->max_props = -1;
    s->next = c->all;
    c->all = s;
    return s;
}

static const struct schema *compile(struct schema_compiler *c, const json_t *json, struct err *err)
{
    if (json_object_get(json, "$ref") && only_ref(json)) {
        json = schema_resolve(c->document, json, err);
        if (!json)
            return NULL;
    }
    for (const struct schema *s = c->all; s; s = s->next)
        if (s->source == json)
            return s; // also breaks cycles: a node under way is found here
    struct schema *s = node_new(c, json);
    if (!s) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)json, key, value) {
        const bool ref = strcmp(key, "$ref") == 0;
        if ((ref ? compile_ref_with_siblings(c, s, json, err) : compile_keyword(c, s, key, value, err)) != 0)
            return NULL;
    }
    return s;
}

const struct schema *schema_compile(struct schema_compiler *c, const json_t *json, struct err *err)
{
    return compile(c, json, err);
}

void schema_compiler_free(struct schema_compiler *c)
{
    for (struct schema *s = c->all, *next; s; s = next) {
        next = s->next;
        free(s->props);
        free(s->required);
        free(s->all_of.items);
        free(s->any_of.items);
        free(s->one_of.items);
        if (s->has_pattern)
            regfree(&s->pattern);
        free(s);
    }
    c->all = NULL;
}
