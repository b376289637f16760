// A request's way from the socket to the handler's door: route, parameters, body. Input, as text:
//
//     METHOD /path?query
//     Name: value
//
//     body
//
// The header `Schema: Name` has the body judged by that component of the specification as well, also one that only
// answers use.
//
// Claims: what is captured lies in the path; a value that had no fault obeys its parameter's rules; every fault has a
// JSON pointer and a message in UTF-8; a body judged again, and judged after being written anew, has the same faults;
// a range lies within the content.
#include <strings.h>

#include "api/call.h"
#include "api/range.h"
#include "base/enc.h"
#include "base/path.h"
#include "fuzz.h"

#define HEADERS_MAX 24

static struct schema_compiler compiler; // of components that are asked for by name

struct request {
    char *text;                       // cut in place
    const char *method, *path, *query;
    const char *names[HEADERS_MAX], *values[HEADERS_MAX];
    size_t n_headers;
    const uint8_t *body;
    size_t body_len;
};

// What the linked files need of rooms that are not under test.
struct faults *call_faults(struct api_call *c)
{
    return &c->in->faults;
}

int scope_parse(const char *name)
{
    return name && *name ? 1 : -1;
}

// ---- the request --------------------------------------------------------------------------------------------------
static char *line_of(struct bytes *in, char *room, char **ret_next)
{
    size_t n = 0;
    while (n < in->left && in->data[n] != '\n')
        n++;
    memcpy(room, in->data, n);
    room[n] = 0;
    in->data += n < in->left ? n + 1 : n;
    in->left -= n < in->left ? n + 1 : n;
    *ret_next = room + n + 1;
    return room;
}

static const char *cut_at(char *text, const char *at)
{
    char *found = strstr(text, at);
    if (!found)
        return "";
    *found = 0;
    return found + strlen(at);
}

static void request_read(struct request *r, struct bytes *in)
{
    *r = (struct request){.text = malloc(2 * in->left + 2)};
    CLAIM(r->text);
    char *room, *line = line_of(in, r->text, &room);
    r->method = line;
    r->path = cut_at(line, " ");
    r->query = *r->path ? cut_at((char *)r->path, "?") : "";
    while (in->left > 0 && *(line = line_of(in, room, &room))) {
        if (r->n_headers == HEADERS_MAX)
            continue;
        r->values[r->n_headers] = cut_at(line, ": ");
        r->names[r->n_headers++] = line;
    }
    r->body = in->data;
    r->body_len = in->left;
}

static const char *header(void *arg, const char *name)
{
    const struct request *r = arg;
    for (size_t i = 0; i < r->n_headers; i++)
        if (strcasecmp(r->names[i], name) == 0)
            return r->values[i];
    return NULL;
}

// ---- claims -------------------------------------------------------------------------------------------------------
static bool pointer_is(const char *p)
{
    for (; *p; p++)
        if (*p == '~' && p[1] != '0' && p[1] != '1')
            return false;
    return true;
}

static void check_faults(const struct faults *f)
{
    CLAIM(f->n <= FAULTS_MAX && !f->out_of_memory);
    CLAIM(!f->more || f->n == FAULTS_MAX);
    for (size_t i = 0; i < f->n; i++) {
        const char *pointer = f->items[i].pointer, *message = f->items[i].message;
        CLAIM(*pointer == 0 || *pointer == '/');
        CLAIM(pointer_is(pointer));
        CLAIM(enc_utf8_valid(pointer, strlen(pointer)));
        CLAIM(*message && enc_utf8_valid(message, strlen(message)));
    }
}

static bool faulty(const struct faults *f, const char *pointer)
{
    for (size_t i = 0; i < f->n; i++)
        if (strcmp(f->items[i].pointer, pointer) == 0)
            return true;
    return f->more || f->unbuilt;
}

static void check_route(const struct request *r, const struct route_match *m)
{
    CLAIM(m->n_captured <= SPEC_PATH_PARAMS_MAX);
    CLAIM(!m->op || m->allow);
    CLAIM(!m->allow || *m->allow);
    for (size_t i = 0; i < m->n_captured; i++) {
        CLAIM(m->captured[i].len > 0 && m->captured[i].text > r->path);
        CLAIM(m->captured[i].text + m->captured[i].len <= r->path + strlen(r->path));
        CLAIM(!memchr(m->captured[i].text, '/', m->captured[i].len));
    }
    if (m->op)
        CLAIM(strcmp(m->op->method, r->method) == 0 && strstr(m->allow, r->method));
}

// As handlers ask for it.
static void check_lookup(const struct api_call *c, const struct param *p, const struct param_value *v)
{
    CLAIM(call_param(c, p->name) == v);
    CLAIM(!call_param(c, "no such parameter")->given);
    CLAIM(call_param_integer(c, p->name, -7) == (v->given ? v->integer : -7));
    CLAIM(call_param_flag(c, p->name) == (v->given && v->integer != 0));
    CLAIM(call_param_text(c, p->name, "") == v->text || !v->given);
}

static void check_value(const struct param *p, const struct param_value *v)
{
    if (p->id_type >= 0) {
        CLAIM(strlen(v->text) == ID_LEN && v->len == ID_LEN);
        return;
    }
    CLAIM(v->text[v->len] == 0);
    if (p->kind == PARAM_INTEGER) {
        CLAIM(!p->schema->has_min || v->integer >= p->schema->min);
        CLAIM(!p->schema->has_max || v->integer <= p->schema->max);
    } else if (p->kind == PARAM_NUMBER) {
        CLAIM(!p->schema->has_min || v->number >= p->schema->min);
        CLAIM(!p->schema->has_max || v->number <= p->schema->max);
    } else if (p->kind == PARAM_BOOLEAN) {
        CLAIM(v->integer == (v->len == 4));
    } else {
        CLAIM(strlen(v->text) == v->len && enc_utf8_valid(v->text, v->len));
        CLAIM(!p->guest_path || !path_fault(v->text, v->len));
        CLAIM(p->schema->max_length < 0 || v->len <= 4 * (size_t)p->schema->max_length);
    }
}

static void check_params(const struct api_call *c)
{
    for (size_t i = 0, nth = 0; i < c->op->n_params; i++) {
        const struct param *p = &c->op->params[i];
        const struct param_value *v = &c->in->params[i];
        if (p->in == PARAM_PATH) {
            CLAIM(id_valid((enum id_type)p->id_type, c->in->ids[nth++]));
            continue;
        }
        check_lookup(c, p, v);
        if (v->given && !faulty(&c->in->faults, p->pointer))
            check_value(p, v);
        CLAIM(v->given || !p->required || c->in->faults.n > 0);
    }
}

// ---- body and range -------------------------------------------------------------------------------------------------
static struct faults *judge(const struct schema *s, const json_t *value)
{
    struct faults *f = calloc(1, sizeof *f);
    CLAIM(f);
    schema_validate(s, value, "", f);
    check_faults(f);
    return f;
}

static void same_faults(struct faults *a, struct faults *b)
{
    CLAIM(a->n == b->n && a->more == b->more && !a->unbuilt == !b->unbuilt);
    faults_free(a);
    faults_free(b);
    free(a);
    free(b);
}

static void run_body(const struct schema *schema, const uint8_t *body, size_t len)
{
    struct err err = {0};
    uint8_t *copy = exact_copy(body, len);
    CLEANUP_JSON json_t *value = len > 0 ? json_parse_strict((const char *)copy, len, &err) : NULL;
    free(copy);
    if (!value) {
        CLAIM(len == 0 || (err.kind == ERR_VALIDATION && strcmp(err.code, "malformed_json") == 0));
        return;
    }
    char *text = json_canonical(value);
    CLAIM(text);
    CLEANUP_JSON json_t *anew = json_parse_strict(text, strlen(text), &err);
    free(text);
    CLAIM(anew && json_equal(value, anew));
    same_faults(judge(schema, value), judge(schema, anew));
}

static void run_range(const char *text)
{
    static const uint64_t SIZES[] = {0, 1, 2, 1000, 1ull << 40, UINT64_MAX};
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES; i++) {
        uint64_t offset = 0, length = 0;
        if (range_parse(text, SIZES[i], &offset, &length) != RANGE_PART)
            continue;
        CLAIM(length > 0 && offset < SIZES[i] && length <= SIZES[i] - offset);
    }
}

// ---- one input ------------------------------------------------------------------------------------------------------
static void run_operation(const struct request *r, const struct route_match *m)
{
    struct input *in = calloc(1, sizeof *in);
    struct api_call *c = calloc(1, sizeof *c);
    CLAIM(in && c);
    c->op = m->op;
    c->in = in;
    const struct api_request req = {.method = r->method, .path = r->path, .query = r->query, .content_length = -1,
                                    .header = header, .header_arg = (void *)r};
    CLAIM(params_read(c, &req, m) == 0);
    params_validate(c, r->query);
    check_faults(&in->faults);
    check_params(c);
    if (m->op->body_kind == BODY_JSON)
        run_body(m->op->body, r->body, r->body_len);
    faults_free(&in->faults);
    free(in->text);
    free(in);
    free(c);
}

static const struct schema *component(const char *name)
{
    const json_t *schemas = json_object_get(json_object_get(compiler.document, "components"), "schemas");
    const json_t *one = json_object_get(schemas, name);
    struct err err = {0};
    const struct schema *s = one ? schema_compile(&compiler, one, &err) : NULL;
    CLAIM(s || !one);
    return s;
}

static void run_request(const struct spec *spec, struct bytes *bytes)
{
    struct request r;
    struct route_match m;
    request_read(&r, bytes);
    spec_route(spec, r.method, r.path, &m);
    check_route(&r, &m);
    if (header(&r, "Range"))
        run_range(header(&r, "Range"));
    const struct schema *named = header(&r, "Schema") ? component(header(&r, "Schema")) : NULL;
    if (named)
        run_body(named, r.body, r.body_len);
    if (m.op)
        run_operation(&r, &m);
    free(r.text);
}

// As the build made it.
static struct spec *specification(void)
{
    struct err err = {0};
    struct buf b = BUF_INIT(8u << 20);
    FILE *f = fopen(FUZZ_SPECIFICATION, "r");
    CLAIM(f);
    char piece[65536];
    for (size_t n; (n = fread(piece, 1, sizeof piece, f)) > 0;)
        CLAIM(buf_add(&b, piece, n));
    fclose(f);
    struct spec *s = spec_load(buf_text(&b), b.len, &err);
    compiler.document = json_loadb(buf_text(&b), b.len, 0, NULL);
    CLAIM(s && compiler.document);
    buf_free(&b);
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct spec *spec;
    if (!spec)
        spec = specification();
    struct bytes bytes = {data, size};
    run_request(spec, &bytes);
    return 0;
}
