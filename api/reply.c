#include "api/reply.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/problem.h"
#include "base/fd.h"

void reply_header(struct api_call *c, const char *name, const char *value)
{
    if (c->resp.n_headers < API_HEADERS_MAX)
        c->resp.headers[c->resp.n_headers++] = (struct api_header){name, value};
}

static void common_headers(struct api_call *c, const char *type)
{
    if (type)
        reply_header(c, "Content-Type", type);
    reply_header(c, "X-Request-Id", c->request_id);
    if (c->replayed)
        reply_header(c, "Idempotent-Replayed", "true");
}

static void evidence_headers(struct api_call *c)
{
    const struct admission *a = &c->in->a;
    if (!c->in->has_admission)
        return;
    if (*a->audit_id)
        reply_header(c, "Airlock-Audit-Id", call_text(c, a->audit_id));
    if (*a->receipt_id && !c->in->noted)
        reply_header(c, "Airlock-Receipt-Id", call_text(c, a->receipt_id));
}

static void free_text(const void *owner)
{
    free((void *)owner);
}

static void finish(struct api_call *c, int status, const char *type)
{
    c->resp.status = status;
    common_headers(c, type);
    if (c->op && c->op->evidence != EVIDENCE_NONE)
        evidence_headers(c);
    call_answer(c);
}

void reply_borrowed(struct api_call *c, int status, const char *type, const char *body, size_t len, const void *owner,
                    void (*release)(const void *owner))
{
    c->resp.body = body;
    c->resp.body_len = len;
    c->body_owner = owner;
    c->body_release = release;
    finish(c, status, type);
}

void reply_text(struct api_call *c, int status, const char *type, char *text_taken, size_t len)
{
    reply_borrowed(c, status, type, text_taken, len, text_taken, free_text);
}

void reply_json(struct api_call *c, int status, json_t *stolen)
{
    char *text = json_dumps(stolen, JSON_COMPACT);
    json_decref(stolen);
    if (text) {
        reply_text(c, status, "application/json", text, strlen(text));
        return;
    }
    struct err err = {0};
    err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    call_fail(c, &err);
}

void reply_stream(struct api_call *c, int status, const char *type, int64_t len)
{
    c->resp.stream = true;
    c->resp.stream_len = len;
    finish(c, status, type);
}

void reply_head(struct api_call *c, int status, const char *type, size_t len)
{
    c->resp.head = true;
    c->resp.body_len = len;
    finish(c, status, type);
}

// ---- problems -----------------------------------------------------------------------------------------------------
// Missing, foreign and malformed are one answer: nothing in it depends on which.
static bool is_nothing(const struct err *err)
{
    return err->kind == ERR_NOT_FOUND && (!*err->code || strcmp(err->code, "not_found") == 0);
}

bool reply_says_nothing(const struct api_call *c)
{
    return is_nothing(&c->in->err);
}

static bool names_sandbox(const struct api_call *c)
{
    return c->in->ran && c->op && c->op->n_params > 0 && c->op->params[0].id_type == ID_SANDBOX &&
           c->op->params[0].in == PARAM_PATH;
}

static json_t *problem_of(struct api_call *c)
{
    struct input *in = c->in;
    const bool nothing = is_nothing(&in->err);
    if (nothing) {
        err_set(&in->err, ERR_NOT_FOUND, "", "no such object");
        in->err.remedy[0] = 0;
    }
    const bool proven = !nothing && (in->admitted || in->noted);
    const struct problem_about about = {
        .operation = c->op ? c->op->name : NULL,
        .request_id = c->request_id,
        .sandbox_id = nothing || !names_sandbox(c) ? NULL : in->ids[0],
        .job_id = proven && in->admitted ? in->a.job_id : NULL,
        .audit_id = proven ? in->a.audit_id : NULL,
        .faults = &in->faults,
    };
    json_t *p = problem_json(&in->err, &about);
    if (in->extra)
        json_object_update(p, in->extra);
    return p;
}

char *reply_problem_text(struct api_call *c)
{
    CLEANUP_JSON json_t *p = problem_of(c);
    return json_dumps(p, JSON_COMPACT);
}

static void problem_headers(struct api_call *c)
{
    const struct input *in = c->in;
    if (in->err.kind == ERR_UNAUTHORIZED)
        reply_header(c, "WWW-Authenticate", "Bearer realm=\"airlock\"");
    if (in->err.kind == ERR_RATE_LIMITED || in->err.kind == ERR_UNAVAILABLE)
        reply_header(c, "Retry-After", "1");
    if (in->err.kind == ERR_RANGE && in->content_range)
        reply_header(c, "Content-Range", in->content_range);
}

void reply_problem(struct api_call *c)
{
    struct input *in = c->in;
    char *text = in->problem ? STEAL(in->problem) : reply_problem_text(c);
    const bool proven = !is_nothing(&in->err) && (in->admitted || in->noted);
    problem_headers(c);
    c->resp.status = problem_status(in->err.kind);
    c->resp.body = text;
    c->resp.body_len = text ? strlen(text) : 0;
    c->body_owner = text;
    c->body_release = free_text;
    common_headers(c, "application/problem+json");
    if (proven)
        evidence_headers(c);
    call_answer(c);
}
