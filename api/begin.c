// The beginning of a call: route, request id, token, scope, parameters.
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "api/call.h"
#include "api/principal.h"
#include "api/reply.h"
#include "base/clock.h"
#include "base/fd.h"

// ---- who and whether ------------------------------------------------------------------------------------------------
static bool scope_held(struct api_call *c, unsigned scope)
{
    struct err err = {0};
    if (!scope || (c->who->row.scopes & scope))
        return true;
    c->in->ran = false; // decided before anything was looked up: no object is named
    err_set(&err, ERR_POLICY_DENIED, "scope_missing", "the token lacks the scope %s", scope_name((enum scope)scope));
    err_remedy(&err, "use a token with that scope");
    call_fail(c, &err);
    return false;
}

bool call_user_allowed(struct api_call *c, const char *user)
{
    return strcmp(user, "sandbox") == 0 || scope_held(c, SCOPE_COMMAND_ROOT);
}

static void unauthorized(struct api_call *c, const char *detail)
{
    err_set(&c->in->err, ERR_UNAUTHORIZED, "", "%s", detail);
    err_remedy(&c->in->err, "send Authorization: Bearer with a valid token");
    reply_problem(c);
}

static bool body_expected(const struct api_request *req)
{
    return req->content_length > 0 || req->chunked;
}

static bool check_body_headers(struct api_call *c, bool expected)
{
    struct input *in = c->in;
    struct err err = {0};
    if (!expected)
        return true;
    if (c->op->body_kind == BODY_NONE)
        faults_add(call_faults(c), "", "this request takes no body");
    else if (c->op->body_kind == BODY_JSON && !in->json_type) {
        err_set(&err, ERR_UNSUPPORTED_MEDIA_TYPE, "", "a JSON body is wanted");
        err_remedy(&err, "send Content-Type: application/json");
        call_fail(c, &err);
        return false;
    } else if (c->op->body_kind == BODY_JSON && in->content_length > LIMIT_BODY_JSON_BYTES) {
        err_set(&err, ERR_TOO_LARGE, "", "a JSON body holds at most %u bytes", LIMIT_BODY_JSON_BYTES);
        call_fail(c, &err);
        return false;
    }
    return true;
}

// The principal is known: scope, parameters, then the body may come. True when the call goes on.
static bool admit(struct api_call *c, const char *query, bool body)
{
    if (!scope_held(c, c->op->scope))
        return false;
    params_validate(c, query);
    for (size_t i = 0; i < c->op->n_params; i++) {
        const struct param *p = &c->op->params[i];
        if (p->root_scope && c->in->params[i].given && !call_user_allowed(c, c->in->params[i].text))
            return false;
    }
    if (!check_body_headers(c, body))
        return false;
    if (c->op->handler->begin || c->op->body_kind == BODY_NONE) {
        if (call_has_faults(c)) {
            call_invalid(c);
            return false;
        }
        if (c->op->handler->begin) {
            c->in->ran = true;
            c->op->handler->begin(c);
            return !atomic_load(&c->answered);
        }
    }
    return true;
}

// A token that is not in memory: the rest of the beginning happens here, on the pool.
static void auth_job(void *arg)
{
    struct api_call *c = arg;
    struct err err = {0};
    uint8_t hash[SHA256_BYTES];
    memcpy(hash, c->in->body_sha256, sizeof hash);
    c->who = principal_lookup(c->a->principals, hash, &err);
    CLEANUP_FREE char *query = STEAL(c->in->query);
    bool go = false;
    if (!c->who && err.kind == ERR_UNAUTHORIZED)
        unauthorized(c, err.detail);
    else if (!c->who)
        call_fail(c, &err);
    else
        go = admit(c, query ? query : "", c->in->content_length != 0);
    bool complete = false, gone = false;
    pthread_mutex_lock(&c->lock);
    if (go) {
        atomic_store(&c->phase, PHASE_BODY);
        complete = c->body_ended;
        gone = c->ended;
        if (c->wake)
            c->wake(c->wake_arg);
    }
    pthread_mutex_unlock(&c->lock);
    if (complete)
        call_body_complete(c);
    else if (gone && c->sink)
        c->sink->abort(c);
    call_unref(c);
}

// ---- begin ----------------------------------------------------------------------------------------------------------
static bool request_id_valid(const char *text)
{
    size_t n = 0;
    for (; text[n]; n++)
        if (!isalnum((unsigned char)text[n]) && text[n] != '.' && text[n] != '_' && text[n] != '-')
            return false;
    return n >= 1 && n <= LIMIT_REQUEST_ID;
}

static void set_request_id(struct api_call *c, const struct api_request *req)
{
    const char *given = req->header(req->header_arg, "X-Request-Id");
    if (given && request_id_valid(given)) {
        c->request_id = call_text(c, given);
        return;
    }
    static const char HEX[] = "0123456789abcdef";
    unsigned long long n = atomic_fetch_add_explicit(&c->a->requests, 1, memory_order_relaxed);
    char text[32];
    size_t at = 0;
    memcpy(text, "req-", 4);
    at += 4;
    for (const char *p = c->a->boot; *p; p++)
        text[at++] = *p;
    text[at++] = '-';
    int digits = 1;
    while (digits < 16 && n >> (4 * digits))
        digits++;
    while (digits-- > 0)
        text[at++] = HEX[n >> (4 * digits) & 15];
    text[at] = 0;
    c->request_id = call_text(c, text);
}

static bool media_is_json(const char *type)
{
    if (!type || strncasecmp(type, "application/json", 16) != 0)
        return false;
    const char *p = type + 16 + strspn(type + 16, " \t");
    if (!*p)
        return true;
    if (*p != ';')
        return false;
    p += 1 + strspn(p + 1, " \t");
    if (strncasecmp(p, "charset=", 8) != 0)
        return *p == 0;
    p += 8 + (p[8] == '"');
    return strncasecmp(p, "utf-8", 5) == 0 && (p[5] == 0 || p[5] == '"' || p[5] == ' ');
}

static bool prefers_async(const char *text)
{
    for (const char *p = text; p && *p; p += strcspn(p, ","), p += *p == ',') {
        p += strspn(p, " \t");
        if (strncasecmp(p, "respond-async", 13) == 0 && strchr(",; \t", p[13]))
            return true;
    }
    return false;
}

static void read_preferences(struct api_call *c, const struct api_request *req)
{
    struct input *in = c->in;
    if (c->op->body_kind == BODY_JSON)
        in->json_type = media_is_json(req->header(req->header_arg, "Content-Type"));
    in->prefer_async = prefers_async(call_param_text(c, "Prefer", NULL));
    const char *accept = req->header(req->header_arg, "Accept");
    in->accept_stream = accept && strcasestr(accept, "text/event-stream");
    in->accept_json = accept && strcasestr(accept, "application/json");
}

static void no_route(struct api_call *c, const struct api_request *req, const struct route_match *m)
{
    struct err *err = &c->in->err;
    if (m->allow) {
        err_set(err, ERR_METHOD_NOT_ALLOWED, "", "this path does not know the method");
        reply_header(c, "Allow", m->allow);
    } else {
        err_set(err, ERR_NOT_FOUND, "not_found", "no such object");
    }
    c->resp.head = strcmp(req->method, "HEAD") == 0;
    reply_problem(c);
}

// True when the principal is known (or none is needed) at once.
static bool authenticate(struct api_call *c, const struct api_request *req)
{
    if (!c->op->scope)
        return true;
    uint8_t hash[SHA256_BYTES];
    if (!principal_hash(req->header(req->header_arg, "Authorization"), hash)) {
        unauthorized(c, "no bearer token was sent, or it has not the form of one");
        return false;
    }
    c->who = principal_cached(c->a->principals, hash);
    if (c->who) {
        if (principal_live(c->who))
            return true;
        unauthorized(c, "the token is not known, has expired or was revoked");
        return false;
    }
    memcpy(c->in->body_sha256, hash, sizeof hash);
    c->in->query = strdup(req->query ? req->query : "");
    c->in->content_length = body_expected(req) ? (req->content_length > 0 ? req->content_length : -1) : 0;
    call_pool(c, auth_job);
    return false;
}

static struct api_call *call_new(struct api *a, void (*wake)(void *arg), void *wake_arg)
{
    struct api_call *c = malloc(sizeof *c);
    struct input *in = calloc(1, sizeof *in);
    if (!c || !in) {
        free(c);
        free(in);
        return NULL;
    }
    memset(c, 0, offsetof(struct api_call, text));
    c->a = a;
    c->in = in;
    c->wake = wake;
    c->wake_arg = wake_arg;
    atomic_init(&c->refs, 1);
    pthread_mutex_init(&c->lock, NULL);
    c->t0_us = clock_mono_us();
    buf_init(&in->body, LIMIT_BODY_JSON_BYTES);
    atomic_fetch_add_explicit(&a->calls, 1, memory_order_relaxed);
    return c;
}

struct api_call *api_begin(struct api *a, const struct api_request *req, void (*wake)(void *arg), void *wake_arg)
{
    struct api_call *c = call_new(a, wake, wake_arg);
    if (!c)
        return NULL;
    struct route_match m;
    spec_route(a->spec, req->method, req->path, &m);
    c->op = m.op;
    set_request_id(c, req);
    if (!m.op) {
        no_route(c, req, &m);
        return c;
    }
    c->resp.head = strcmp(m.op->method, "HEAD") == 0;
    c->in->content_length = req->content_length;
    if (atomic_load_explicit(&a->stopping, memory_order_relaxed)) {
        err_set(&c->in->err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
        reply_problem(c);
        return c;
    }
    if (c->op->keyed)
        c->in->path = strdup(req->path);
    if (params_read(c, req, &m) != 0 || (c->op->keyed && !c->in->path)) {
        err_set(&c->in->err, ERR_INTERNAL, "out_of_memory", "out of memory");
        reply_problem(c);
        return c;
    }
    if (c->op->n_params > m.n_captured + 1 || c->op->body_kind == BODY_JSON)
        read_preferences(c, req);
    const bool body = body_expected(req);
    if (!authenticate(c, req) || !admit(c, req->query ? req->query : "", body))
        return c;
    atomic_store(&c->phase, PHASE_BODY);
    if (!body && c->op->handler->mode == RUN_INLINE && c->op->body_kind == BODY_NONE)
        call_run(c);
    return c;
}

