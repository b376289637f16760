// Parameters: decoded by length, every one declared, at most once, typed by its schema.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api/call.h"
#include "base/enc.h"
#include "base/path.h"

static const struct param_value ABSENT;

const struct param_value *call_param(const struct api_call *c, const char *name)
{
    for (size_t i = 0; i < c->op->n_params; i++)
        if (strcmp(c->op->params[i].name, name) == 0)
            return &c->in->params[i];
    return &ABSENT;
}

int64_t call_param_integer(const struct api_call *c, const char *name, int64_t fallback)
{
    const struct param_value *v = call_param(c, name);
    return v->given ? v->integer : fallback;
}

bool call_param_flag(const struct api_call *c, const char *name)
{
    return call_param_integer(c, name, 0) != 0;
}

const char *call_param_text(const struct api_call *c, const char *name, const char *fallback)
{
    const struct param_value *v = call_param(c, name);
    return v->given ? v->text : fallback;
}

int64_t call_if_match(const struct api_call *c)
{
    const char *text = call_param_text(c, "If-Match", NULL);
    const int64_t generation = text && *text == '"' ? strtoll(text + 1, NULL, 10) : 0;
    return text && *text == '"' && generation == 0 ? -1 : generation;
}

// ---- decoding -----------------------------------------------------------------------------------------------------
static int hex_digit(char ch)
{
    if (ch >= '0' && ch <= '9')
        return ch - '0';
    ch |= 0x20;
    return ch >= 'a' && ch <= 'f' ? ch - 'a' + 10 : -1;
}

// Decodes len bytes in place of out, which has room for them and a NUL; `+` is a space. -1: a broken escape.
static int64_t decode(const char *text, size_t len, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (text[i] != '%') {
            out[n++] = text[i] == '+' ? ' ' : text[i];
            continue;
        }
        const int high = i + 2 < len ? hex_digit(text[i + 1]) : -1, low = high >= 0 ? hex_digit(text[i + 2]) : -1;
        if (low < 0)
            return -1;
        out[n++] = (char)(high << 4 | low);
        i += 2;
    }
    out[n] = 0;
    return (int64_t)n;
}

static void type_integer(const struct param *p, struct param_value *v, struct faults *f)
{
    const size_t digits = v->text[0] == '-' ? v->len - 1 : v->len;
    bool fine = digits >= 1 && digits <= 18 && !memchr(v->text, 0, v->len);
    for (size_t i = v->len - digits; fine && i < v->len; i++)
        fine = v->text[i] >= '0' && v->text[i] <= '9';
    if (!fine) {
        faults_add(f, p->pointer, "must be an integer");
        return;
    }
    v->integer = strtoll(v->text, NULL, 10);
    schema_validate_number(p->schema, (double)v->integer, p->pointer, f);
}

static void type_number(const struct param *p, struct param_value *v, struct faults *f)
{
    char *end = NULL;
    bool fine = v->len > 0 && v->len <= 24 && strspn(v->text, "0123456789.-") == v->len;
    v->number = fine ? strtod(v->text, &end) : 0;
    if (!fine || end != v->text + v->len)
        faults_add(f, p->pointer, "must be a number");
    else
        schema_validate_number(p->schema, v->number, p->pointer, f);
}

static void type_flag(const struct param *p, struct param_value *v, struct faults *f)
{
    if (v->len == 4 && memcmp(v->text, "true", 4) == 0)
        v->integer = 1;
    else if (v->len != 5 || memcmp(v->text, "false", 5) != 0)
        faults_add(f, p->pointer, "must be true or false");
}

static void type_text(const struct param *p, struct param_value *v, struct faults *f)
{
    if (p->guest_path) {
        const char *why = path_fault(v->text, v->len);
        if (why) {
            faults_add(f, p->pointer, "%s", why);
            f->code = "path_invalid";
        }
    } else if (!enc_utf8_valid(v->text, v->len)) {
        faults_add(f, p->pointer, "must be UTF-8");
    } else if (memchr(v->text, 0, v->len)) {
        faults_add(f, p->pointer, "must not contain NUL");
    } else {
        schema_validate_text(p->schema, v->text, v->len, p->pointer, f);
    }
}

static void type_value(const struct param *p, struct param_value *v, struct faults *f)
{
    switch (p->kind) {
    case PARAM_TEXT:
        type_text(p, v, f);
        break;
    case PARAM_INTEGER:
        type_integer(p, v, f);
        break;
    case PARAM_NUMBER:
        type_number(p, v, f);
        break;
    case PARAM_BOOLEAN:
        type_flag(p, v, f);
        break;
    }
}

// ---- query ----------------------------------------------------------------------------------------------------------
static void name_fault(struct faults *f, const char *name, size_t len, const char *message)
{
    char pointer[160] = "/query/";
    size_t n = strlen(pointer);
    for (size_t i = 0; i < len && n + 3 < sizeof pointer; i++) {
        const unsigned char ch = (unsigned char)name[i];
        if (ch == '~' || ch == '/') {
            pointer[n++] = '~';
            pointer[n++] = ch == '~' ? '0' : '1';
        } else {
            pointer[n++] = ch >= 0x20 && ch < 0x7f ? (char)ch : '?';
        }
    }
    pointer[n] = 0;
    faults_add(f, pointer, "%s", message);
}

static int find_query(const struct operation *op, const char *name, size_t len)
{
    for (size_t i = 0; i < op->n_params; i++)
        if (op->params[i].in == PARAM_QUERY && op->params[i].name_len == len && memcmp(op->params[i].name, name, len) == 0)
            return (int)i;
    return -1;
}

static char *read_pair(struct api_call *c, const char *pair, size_t len, char *room)
{
    const char *eq = memchr(pair, '=', len);
    const size_t name_len = eq ? (size_t)(eq - pair) : len;
    const int64_t name_n = decode(pair, name_len, room);
    if (name_n < 0) {
        name_fault(call_faults(c), pair, name_len, "broken percent-encoding");
        return room;
    }
    const int at = find_query(c->op, room, (size_t)name_n);
    if (at < 0) {
        name_fault(call_faults(c), room, (size_t)name_n, "unknown query parameter");
        return room;
    }
    struct param_value *v = &c->in->params[at];
    const struct param *p = &c->op->params[at];
    if (v->given) {
        faults_add(call_faults(c), p->pointer, "must not be repeated");
        return room;
    }
    const char *value = eq ? eq + 1 : pair + len;
    const int64_t n = decode(value, (size_t)(pair + len - value), room);
    if (n < 0) {
        faults_add(call_faults(c), p->pointer, "broken percent-encoding");
        return room;
    }
    *v = (struct param_value){.text = room, .len = (size_t)n, .given = true};
    return room + n + 1;
}

void params_validate(struct api_call *c, const char *query)
{
    char *room = c->in->text;
    for (const char *p = query; *p;) {
        const size_t len = strcspn(p, "&");
        if (len > 0)
            room = read_pair(c, p, len, room);
        p += len + (p[len] == '&');
    }
    for (size_t i = 0; i < c->op->n_params; i++) {
        const struct param *p = &c->op->params[i];
        struct param_value *v = &c->in->params[i];
        if (p->in == PARAM_PATH)
            continue;
        if (v->given && p->id_type < 0)
            type_value(p, v, call_faults(c));
        else if (v->given && (v->len != ID_LEN || !id_valid((enum id_type)p->id_type, v->text)))
            *v = (struct param_value){.text = "sbx00000000000000000000000000", .len = ID_LEN, .given = true}; // matches nothing
        else if (!v->given && p->required)
            faults_add(call_faults(c), p->pointer, "is required");
    }
}

// ---- path and headers -------------------------------------------------------------------------------------------------
// A malformed id goes the way of a missing one: it is replaced by one that is never made (time 0, random part 0).
static void read_id(struct api_call *c, size_t nth, const struct param *p, const char *text, size_t len)
{
    char *id = c->in->ids[nth];
    if (len == ID_LEN) {
        memcpy(id, text, len);
        id[len] = 0;
        if (id_valid((enum id_type)p->id_type, id))
            return;
    }
    memset(id, '0', ID_LEN);
    id[ID_LEN] = 0;
    memcpy(id, id_prefix((enum id_type)p->id_type), 3);
}

int params_read(struct api_call *c, const struct api_request *req, const struct route_match *m)
{
    struct input *in = c->in;
    size_t nth = 0;
    // Room for every header value and for the whole query decoded, each value with its NUL.
    size_t room = req->query ? strlen(req->query) + SPEC_PARAMS_MAX + 1 : 1;
    const size_t n_query = room;
    const char *values[SPEC_PARAMS_MAX];
    for (size_t i = 0; i < c->op->n_params; i++) {
        const struct param *p = &c->op->params[i];
        values[i] = NULL;
        if (p->in == PARAM_PATH && nth < m->n_captured) {
            read_id(c, nth, p, m->captured[nth].text, m->captured[nth].len);
            nth++;
        } else if (p->in == PARAM_HEADER && (values[i] = req->header(req->header_arg, p->name))) {
            room += strlen(values[i]) + 1;
        }
    }
    if (room == 1)
        return 0;
    in->text = malloc(room);
    if (!in->text)
        return -1;
    char *at = in->text + n_query;
    for (size_t i = 0; i < c->op->n_params; i++) {
        if (!values[i])
            continue;
        const size_t len = strlen(values[i]);
        memcpy(at, values[i], len + 1);
        in->params[i] = (struct param_value){.text = at, .len = len, .given = true};
        at += len + 1;
    }
    return 0;
}
