// The life of a call: begin → (token) → body → handler → answer → end. See call.h for who has it when.
#include "api/call.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/metrics.h"
#include "api/principal.h"
#include "api/problem.h"
#include "api/pump.h"
#include "api/reply.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/log.h"

// ---- memory -----------------------------------------------------------------------------------------------------
struct api_call *call_ref(struct api_call *c)
{
    atomic_fetch_add_explicit(&c->refs, 1, memory_order_relaxed);
    return c;
}

static void input_free(struct api_call *c)
{
    struct input *in = c->in;
    if (!in)
        return;
    idem_release(c);
    c->in = NULL;
    json_decref(in->json);
    json_decref(in->extra);
    buf_free(&in->body);
    faults_free(&in->faults);
    if (in->replay)
        idem_row_free(in->replay);
    free(in->replay);
    free(in->problem);
    free(in->query);
    free(in->text);
    free(in->path);
    free(in);
}

void call_unref(struct api_call *c)
{
    if (atomic_fetch_sub(&c->refs, 1) > 1)
        return;
    struct api *a = c->a;
    if (c->sink && c->sink->free)
        c->sink->free(c);
    if (c->stream && c->stream->free)
        c->stream->free(c);
    input_free(c);
    if (c->body_release)
        c->body_release(c->body_owner);
    for (struct call_text *t = c->texts, *next; t; t = next) {
        next = t->next;
        free(t);
    }
    principal_unref(c->who);
    pthread_mutex_destroy(&c->lock);
    free(c);
    atomic_fetch_sub(&a->calls, 1); // the last touch of a: api_free looks for zero
}

static char *text_room(struct api_call *c, size_t len)
{
    if (c->text_used + len <= sizeof c->text) {
        char *at = c->text + c->text_used;
        c->text_used += len;
        return at;
    }
    struct call_text *t = malloc(sizeof *t + len);
    if (!t)
        return NULL;
    t->next = c->texts;
    c->texts = t;
    return t->text;
}

const char *call_text(struct api_call *c, const char *text)
{
    const size_t len = strlen(text) + 1;
    char *at = text_room(c, len);
    return at ? memcpy(at, text, len) : "";
}

const char *call_textf(struct api_call *c, const char *fmt, ...)
{
    char line[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    return call_text(c, line);
}

void call_wake(struct api_call *c)
{
    pthread_mutex_lock(&c->lock);
    if (c->wake)
        c->wake(c->wake_arg);
    pthread_mutex_unlock(&c->lock);
}

void call_pool(struct api_call *c, void (*fn)(void *call))
{
    call_ref(c);
    if (work_submit(c->a->pool, fn, c) != 0)
        fn(c);
}

// ---- failing ------------------------------------------------------------------------------------------------------
struct faults *call_faults(struct api_call *c)
{
    return &c->in->faults;
}

bool call_has_faults(const struct api_call *c)
{
    return c->in->faults.n > 0 || c->in->faults.unbuilt || c->in->faults.out_of_memory;
}

// A refusal under a key is an answer to be kept; one of a read that should have a receipt is to be proven.
static bool to_be_stored(const struct api_call *c)
{
    return (c->in->entry || (c->in->prove && !reply_says_nothing(c))) && !c->in->admitted && !c->replayed && problem_storable(problem_status(c->in->err.kind)) &&
           strcmp(c->in->err.code, "idempotency_mismatch") != 0;
}

// An act that was admitted has its problem in its job: the same text for the client, the job and a replay.
static void take_job_problem(struct api_call *c)
{
    struct job_row job = {0};
    struct err err = {0};
    if (!*c->in->a.job_id || job_get(c->a->store, c->in->a.tenant, c->in->a.job_id, &job, &err) != 0)
        return;
    json_t *problem = c->in->extra && job.problem_json ? json_loads(job.problem_json, 0, NULL) : NULL;
    if (problem) { // the job's plus what only this answer carries
        json_object_update(problem, c->in->extra);
        c->in->problem = json_dumps(problem, JSON_COMPACT);
        json_decref(problem);
    } else {
        c->in->problem = STEAL(job.problem_json);
    }
    job_row_free(&job);
}

static void note_denial(struct api_call *c)
{
    if (c->in->err.kind != ERR_POLICY_DENIED || !c->who)
        return;
    if (c->in->audited) // sandbox/ wrote it, under our id
        c->in->noted = true;
    else
        call_audit(c, "denied", *c->in->err.code ? c->in->err.code : "policy_denied", NULL);
}

// A refusal that came before any admission, but under a key: admitted and settled in one step, so that it is kept.
static void store_refusal(struct api_call *c)
{
    struct input *in = c->in;
    call_admission(c);
    in->admitted = !reply_says_nothing(c);
    in->problem = reply_problem_text(c);
    if (in->problem && idem_store_refusal(c, problem_status(in->err.kind), in->problem) == 0)
        return;
    in->admitted = false;
    free(in->problem);
    in->problem = NULL;
}

static void fail_job(void *arg)
{
    struct api_call *c = arg;
    struct input *in = c->in;
    struct err ignored = {0};
    if (in->settles_itself && !in->admitted && *in->a.receipt_id) {
        struct receipt_row receipt = {0};
        in->admitted = receipt_get(c->a->store, in->a.tenant, in->a.receipt_id, &receipt, &ignored) == 0;
        receipt_row_free(&receipt);
    }
    if (in->admitted)
        take_job_problem(c);
    else if (to_be_stored(c))
        store_refusal(c);
    else
        note_denial(c);
    reply_problem(c);
    call_unref(c);
}

void call_fail(struct api_call *c, const struct err *err)
{
    struct input *in = c->in;
    if (&in->err != err)
        in->err = *err;
    problem_adjust(&in->err, c->op ? c->op->name : "");
    if (in->err.kind == ERR_INTERNAL)
        log_warn_limited("%s: %s %s", c->op ? c->op->name : "request", in->err.code, in->err.internal);
    if (in->admitted || to_be_stored(c) || (in->settles_itself && in->has_admission))
        call_pool(c, fail_job);
    else {
        note_denial(c);
        reply_problem(c);
    }
}

void call_not_found(struct api_call *c)
{
    struct err err = {0};
    err_set(&err, ERR_NOT_FOUND, "not_found", "no such object");
    call_fail(c, &err);
}

void call_invalid(struct api_call *c)
{
    struct faults *f = call_faults(c);
    struct err err = {0};
    c->in->ran = false; // whether the objects in the path exist was not looked at
    if (f->out_of_memory) {
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    } else if (f->n > 0) {
        err_set(&err, ERR_VALIDATION, f->code ? f->code : "", "%zu fault%s in the request%s", f->n, f->n == 1 ? "" : "s",
                f->more ? ", and more than are listed" : "");
        err_remedy(&err, "correct what errors[] names; /openapi.json has the rules");
    } else {
        err_set(&err, ERR_UNSUPPORTED_CAPABILITY, f->unbuilt, "%s is not built yet", f->unbuilt);
        err_remedy(&err, "leave the field out");
        faults_add(f, f->unbuilt, "is not built yet");
    }
    call_fail(c, &err);
}

// ---- running ------------------------------------------------------------------------------------------------------
static void run_pooled(void *arg)
{
    struct api_call *c = arg;
    c->op->handler->run(c);
    call_unref(c);
}

static bool parse_body(struct api_call *c)
{
    struct input *in = c->in;
    struct err err = {0};
    if (in->body.len == 0) {
        if (c->op->body_required)
            faults_add(call_faults(c), "", "a body is required");
        return true;
    }
    in->json = json_parse_strict(buf_text(&in->body), in->body.len, &err);
    if (!in->json) {
        char *near = strstr(err.detail, " near '"); // what follows is the client's own text: it may hold a secret
        if (near)
            *near = 0;
        call_fail(c, &err);
        return false;
    }
    schema_validate(c->op->body, in->json, "", call_faults(c));
    return true;
}

void call_run(struct api_call *c)
{
    if (c->op->body_kind == BODY_JSON && !parse_body(c))
        return;
    if (call_has_faults(c)) {
        call_invalid(c);
        return;
    }
    c->in->ran = true;
    if (c->op->handler->mode == RUN_POOLED)
        call_pool(c, run_pooled);
    else
        c->op->handler->run(c);
}

// The body is complete (or there is none).
static void call_body_done(struct api_call *c)
{
    struct input *in = c->in;
    atomic_store(&c->phase, PHASE_RUN);
    const struct param_value *key = c->op->keyed ? call_param(c, "Idempotency-Key") : NULL;
    // A key that is a fault itself cannot be claimed.
    bool bad_key = false;
    for (size_t i = 0; i < in->faults.n; i++)
        bad_key = bad_key || strcmp(in->faults.items[i].pointer, "/header/Idempotency-Key") == 0;
    if (key && key->given && !bad_key) {
        crypto_sha256(buf_text(&in->body), in->body.len, in->body_sha256);
        idem_begin(c);
    } else {
        call_run(c);
    }
}

// ---- body -----------------------------------------------------------------------------------------------------------
size_t api_body_push(struct api_call *c, const void *data, size_t len)
{
    if (atomic_load(&c->answered))
        return len;
    if (atomic_load(&c->phase) == PHASE_AUTH)
        return 0;
    if (c->sink)
        return c->sink->push(c, data, len);
    if (atomic_load(&c->phase) != PHASE_BODY)
        return len; // failed on the way: the answer comes
    if (buf_add(&c->in->body, data, len))
        return len;
    struct err err = {0};
    atomic_store(&c->phase, PHASE_RUN);
    err_set(&err, ERR_TOO_LARGE, "", "a body of this kind holds at most %u bytes", LIMIT_BODY_JSON_BYTES);
    call_fail(c, &err);
    return len;
}

void call_body_complete(struct api_call *c)
{
    if (atomic_load(&c->answered))
        return;
    if (c->sink)
        c->sink->end(c);
    else
        call_body_done(c);
}

void api_body_end(struct api_call *c)
{
    pthread_mutex_lock(&c->lock);
    const bool first = !c->body_ended;
    c->body_ended = true;
    const bool ready = atomic_load(&c->phase) == PHASE_BODY;
    pthread_mutex_unlock(&c->lock);
    if (first && ready)
        call_body_complete(c);
}

// ---- answer and end ---------------------------------------------------------------------------------------------------
static void close_state(struct api_call *c, bool completed)
{
    if (c->resp.stream && c->stream)
        c->stream->close(c, completed);
}

void call_answer(struct api_call *c)
{
    if (c->op && c->op->evidence == EVIDENCE_AUDIT && c->in->has_admission && !c->in->audited && !c->in->noted &&
        c->resp.status < 400)
        call_audit(c, "allowed", "succeeded", NULL);
    input_free(c);
    if (c->resp.stream)
        stream_list_add(c);
    pthread_mutex_lock(&c->lock);
    const bool gone = c->ended;
    atomic_store(&c->answered, true);
    if (c->wake)
        c->wake(c->wake_arg);
    pthread_mutex_unlock(&c->lock);
    if (gone) {
        if (c->resp.stream)
            stream_list_remove(c);
        close_state(c, false);
    }
}

const struct api_response *api_response(struct api_call *c)
{
    return atomic_load(&c->answered) ? &c->resp : NULL;
}

int64_t api_stream_read(struct api_call *c, void *out, size_t cap)
{
    if (!c->stream)
        return -1;
    return c->stream->read(c, out, cap);
}

void api_call_end(struct api_call *c, bool completed)
{
    pthread_mutex_lock(&c->lock);
    c->wake = NULL;
    c->ended = true;
    const bool answered = atomic_load(&c->answered);
    const bool begun = atomic_load(&c->phase) != PHASE_AUTH; // else the pool sees that we left
    if (c->pump)
        pump_signal(c->pump);
    pthread_mutex_unlock(&c->lock);
    if (answered) {
        if (c->resp.stream)
            stream_list_remove(c);
        close_state(c, completed);
    } else if (begun && c->sink && !c->body_ended) {
        c->sink->abort(c);
    }
    metrics_count(c->a->metrics, c->op ? c->op->index : (size_t)-1, answered ? c->resp.status : 0,
                  clock_mono_us() - c->t0_us);
    call_unref(c);
}

void api_call_describe(struct api_call *c, const char **ret_operation, const char **ret_tenant, const char **ret_request_id)
{
    *ret_operation = c->op ? c->op->name : "";
    // While the token is looked up on another thread there is no tenant to tell.
    const bool known = atomic_load(&c->answered) || atomic_load(&c->phase) != PHASE_AUTH;
    *ret_tenant = known && c->who ? c->who->row.tenant : "";
    *ret_request_id = c->request_id;
}
