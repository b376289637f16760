// Loading: every path and method becomes an operation and a leaf of the route tree.
#include "api/spec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "store/rows.h"

static const char *const METHODS[SPEC_METHODS] = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"};

struct route {
    struct route *next;      // sibling
    struct route *literals;  // children by name
    struct route *any;       // child for {…}
    char *name;
    size_t name_len;
    const struct operation *ops[SPEC_METHODS];
    char allow[64];
};

struct spec {
    json_t *document;
    struct schema_compiler compiler;
    struct route root;
    struct operation *ops;
    size_t n_ops;
};

// ---- routes -----------------------------------------------------------------------------------------------------
static int method_index(const char *method)
{
    for (int i = 0; i < SPEC_METHODS; i++)
        if (strcmp(METHODS[i], method) == 0)
            return i;
    return -1;
}

static struct route *child(const struct route *at, const char *name, size_t len)
{
    for (struct route *r = at->literals; r; r = r->next)
        if (r->name_len == len && memcmp(r->name, name, len) == 0)
            return r;
    return NULL;
}

static struct route *child_make(struct route *at, const char *name, size_t len)
{
    const bool any = len > 2 && name[0] == '{';
    struct route *r = any ? at->any : child(at, name, len);
    if (r)
        return r;
    r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->name = strndup(name, len);
    r->name_len = len;
    if (any) {
        at->any = r;
    } else {
        r->next = at->literals;
        at->literals = r;
    }
    return r;
}

static int route_add(struct spec *s, const struct operation *op, struct err *err)
{
    struct route *at = &s->root;
    for (const char *p = op->path; *p == '/' && at;) {
        const size_t len = strcspn(++p, "/");
        at = child_make(at, p, len);
        p += len;
    }
    const int method = method_index(op->method);
    if (!at || !at->name)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (method < 0 || at->ops[method])
        return err_set(err, ERR_INTERNAL, "spec", "%s %s cannot be routed", op->method, op->path);
    at->ops[method] = op;
    at->allow[0] = 0;
    for (int i = 0; i < SPEC_METHODS; i++)
        if (at->ops[i])
            snprintf(at->allow + strlen(at->allow), sizeof at->allow - strlen(at->allow), "%s%s",
                     *at->allow ? ", " : "", METHODS[i]);
    return 0;
}

static void routes_free(struct route *r)
{
    if (!r)
        return;
    routes_free(r->any);
    for (struct route *one = r->literals, *next; one; one = next) {
        next = one->next;
        routes_free(one);
    }
    free(r->name);
    free(r);
}

void spec_route(const struct spec *s, const char *method, const char *path, struct route_match *ret)
{
    const struct route *at = &s->root;
    ret->op = NULL;
    ret->allow = NULL;
    ret->n_captured = 0;
    if (*path != '/')
        return;
    for (const char *p = path; *p;) {
        const char *segment = ++p;
        while (*p && *p != '/')
            p++;
        const size_t len = (size_t)(p - segment);
        const struct route *next = child(at, segment, len);
        if (!next && at->any && len > 0) {
            next = at->any;
            ret->captured[ret->n_captured].text = segment;
            ret->captured[ret->n_captured++].len = len;
        }
        if (!next)
            return;
        at = next;
    }
    if (!*at->allow)
        return;
    ret->allow = at->allow;
    const int i = method_index(method);
    ret->op = i >= 0 ? at->ops[i] : NULL;
}

// ---- parameters -------------------------------------------------------------------------------------------------
static int id_type_of(const char *prefix)
{
    for (int t = ID_SANDBOX; prefix && t <= ID_WORKLOAD; t++)
        if (strcmp(id_prefix((enum id_type)t), prefix) == 0)
            return t;
    return -1;
}

static int param_place(struct param *p, const json_t *json, struct err *err)
{
    const char *in = json_get_str(json, "in");
    if (in && strcmp(in, "query") == 0)
        p->in = PARAM_QUERY;
    else if (in && strcmp(in, "header") == 0)
        p->in = PARAM_HEADER;
    else if (in && strcmp(in, "path") == 0)
        p->in = PARAM_PATH;
    else
        return err_set(err, ERR_INTERNAL, "spec", "parameter %s stands nowhere", p->name);
    return 0;
}

static int param_load(struct spec *s, struct param *p, const json_t *json, struct err *err)
{
    p->name = json_get_str(json, "name");
    const json_t *schema = json_object_get(json, "schema");
    if (!p->name || !schema)
        return err_set(err, ERR_INTERNAL, "spec", "a parameter lacks name or schema");
    p->name_len = strlen(p->name);
    p->required = json_is_true(json_object_get(json, "required"));
    p->schema = schema_compile(&s->compiler, schema, err);
    if (!p->schema || param_place(p, json, err) != 0)
        return -1;
    const unsigned types = p->schema->types;
    p->kind = types & SCHEMA_BOOLEAN   ? PARAM_BOOLEAN
              : types & SCHEMA_INTEGER ? PARAM_INTEGER
              : types & SCHEMA_NUMBER  ? PARAM_NUMBER
                                       : PARAM_TEXT;
    const char *prefix = json_get_str(json, "x-airlock-id");
    p->id_type = id_type_of(prefix);
    if ((prefix || p->in == PARAM_PATH) && p->id_type < 0)
        return err_set(err, ERR_INTERNAL, "spec", "parameter %s is no id the server knows", p->name);
    p->root_scope = json_get_str(json, "x-airlock-root-scope") != NULL;
    p->guest_path = p->in == PARAM_QUERY && strcmp(p->name, "path") == 0;
    snprintf(p->pointer, sizeof p->pointer, "/%s/%s", p->in == PARAM_QUERY ? "query" : p->in == PARAM_HEADER ? "header" : "path",
             p->name);
    return 0;
}

// Path parameters come in the order of the path, then the others.
static int params_load(struct spec *s, struct operation *op, const json_t *list, struct err *err)
{
    size_t i;
    const json_t *one;
    json_array_foreach(list, i, one) {
        const json_t *json = schema_resolve(s->document, one, err);
        if (!json)
            return -1;
        if (op->n_params == SPEC_PARAMS_MAX)
            return err_set(err, ERR_INTERNAL, "spec", "%s has too many parameters", op->name);
        struct param *p = &op->params[op->n_params];
        if (param_load(s, p, json, err) != 0)
            return -1;
        op->n_params++;
        op->n_query += p->in == PARAM_QUERY;
        op->keyed = op->keyed || (p->in == PARAM_HEADER && strcmp(p->name, "Idempotency-Key") == 0);
    }
    return 0;
}

// The i-th {name} of the path must be the i-th path parameter.
static int params_agree(const struct operation *op, struct err *err)
{
    size_t n = 0, found = 0;
    for (const char *p = strchr(op->path, '{'); p; p = strchr(p + 1, '{'), n++) {
        const size_t len = strcspn(p + 1, "}");
        size_t seen = 0;
        for (size_t i = 0; i < op->n_params; i++) {
            if (op->params[i].in != PARAM_PATH)
                continue;
            if (seen++ == n)
                found += op->params[i].name_len == len && memcmp(op->params[i].name, p + 1, len) == 0;
        }
    }
    if (found != n || n > SPEC_PATH_PARAMS_MAX)
        return err_set(err, ERR_INTERNAL, "spec", "%s does not declare what stands in its path, in order", op->name);
    return 0;
}

// ---- operations -------------------------------------------------------------------------------------------------
static int scope_load(struct operation *op, const json_t *json, struct err *err)
{
    const char *scope = json_get_str(json, "x-airlock-scope");
    const int bit = !scope ? -1 : strcmp(scope, "none") == 0 ? 0 : scope_parse(scope);
    if (bit < 0)
        return err_set(err, ERR_INTERNAL, "spec", "%s has no scope", op->name);
    op->scope = (unsigned)bit;
    return 0;
}

static int evidence_load(struct operation *op, const json_t *json, struct err *err)
{
    const char *word = json_get_str(json, "x-airlock-evidence");
    if (word && strcmp(word, "receipt") == 0)
        op->evidence = EVIDENCE_RECEIPT;
    else if (word && strcmp(word, "audit") == 0)
        op->evidence = EVIDENCE_AUDIT;
    else if (word && strcmp(word, "none") == 0)
        op->evidence = EVIDENCE_NONE;
    else
        return err_set(err, ERR_INTERNAL, "spec", "%s does not say what evidence it leaves", op->name);
    return 0;
}

static int body_load(struct spec *s, struct operation *op, const json_t *json, struct err *err)
{
    const char *kind = json_get_str(json, "x-airlock-body");
    const json_t *body = json_object_get(json, "requestBody");
    if (body && !(body = schema_resolve(s->document, body, err)))
        return -1;
    op->body_required = json_is_true(json_object_get(body, "required"));
    if (kind && strcmp(kind, "none") == 0 && !body) {
        op->body_kind = BODY_NONE;
    } else if (kind && strcmp(kind, "raw") == 0 && body) {
        op->body_kind = BODY_RAW;
    } else if (kind && strcmp(kind, "json") == 0 && body) {
        op->body_kind = BODY_JSON;
        const json_t *media = json_object_get(json_object_get(body, "content"), "application/json");
        const json_t *schema = json_object_get(media, "schema");
        if (!schema)
            return err_set(err, ERR_INTERNAL, "spec", "the body of %s has no schema", op->name);
        op->body = schema_compile(&s->compiler, schema, err);
        return op->body ? 0 : -1;
    } else {
        return err_set(err, ERR_INTERNAL, "spec", "x-airlock-body of %s does not agree with its requestBody", op->name);
    }
    return 0;
}

static int operation_load(struct spec *s, const char *path, const char *method, const json_t *shared,
                          const json_t *json, struct err *err)
{
    struct operation *op = &s->ops[s->n_ops];
    char upper[12];
    size_t i = 0;
    for (; method[i] && i + 1 < sizeof upper; i++)
        upper[i] = (char)(method[i] & ~0x20);
    upper[i] = 0;
    const int m = method_index(upper);
    op->name = json_get_str(json, "x-airlock-operation");
    if (m < 0 || !op->name || !json_get_str(json, "operationId"))
        return err_set(err, ERR_INTERNAL, "spec", "%s %s has no operation", method, path);
    op->method = METHODS[m];
    op->path = strdup(path);
    op->index = s->n_ops++;
    if (!op->path)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (scope_load(op, json, err) != 0 || evidence_load(op, json, err) != 0 || body_load(s, op, json, err) != 0 ||
        params_load(s, op, shared, err) != 0 || params_load(s, op, json_object_get(json, "parameters"), err) != 0 ||
        params_agree(op, err) != 0)
        return -1;
    return route_add(s, op, err);
}

static bool is_method(const char *key)
{
    static const char *const NAMES[] = {"get", "head", "post", "put", "patch", "delete", "options"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(NAMES[i], key) == 0)
            return true;
    return false;
}

static int paths_load(struct spec *s, struct err *err)
{
    const json_t *paths = json_object_get(s->document, "paths");
    const char *path, *key;
    json_t *item, *op;
    size_t n = 0;
    json_object_foreach((json_t *)paths, path, item) n += json_object_size(item);
    s->ops = calloc(n + 1, sizeof *s->ops);
    if (!s->ops)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_object_foreach((json_t *)paths, path, item) {
        json_object_foreach(item, key, op) {
            if (is_method(key) && operation_load(s, path, key, json_object_get(item, "parameters"), op, err) != 0)
                return -1;
        }
    }
    return s->n_ops > 0 ? 0 : err_set(err, ERR_INTERNAL, "spec", "the specification has no paths");
}

struct spec *spec_load(const char *json, size_t len, struct err *err)
{
    struct spec *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    json_error_t at;
    s->document = json_loadb(json, len, JSON_REJECT_DUPLICATES, &at);
    s->compiler.document = s->document;
    if (!s->document)
        err_set(err, ERR_INTERNAL, "spec", "the specification is no JSON: line %d: %s", at.line, at.text);
    if (!s->document || paths_load(s, err) != 0) {
        spec_free(s);
        return NULL;
    }
    return s;
}

void spec_free(struct spec *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n_ops; i++)
        free(s->ops[i].path);
    free(s->ops);
    routes_free(s->root.any);
    for (struct route *r = s->root.literals, *next; r; r = next) {
        next = r->next;
        routes_free(r);
    }
    schema_compiler_free(&s->compiler);
    json_decref(s->document);
    free(s);
}

size_t spec_count(const struct spec *s)
{
    return s->n_ops;
}

struct operation *spec_at(struct spec *s, size_t index)
{
    return &s->ops[index];
}
