// Logs, events, jobs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/sse.h"
#include "api/view.h"
#include "sandbox/logs.h"

// A sequence being made: items after a number, oldest first.
struct sequence {
    json_t *items;
    int64_t last_seq;
};

static void reply_sequence(struct api_call *c, struct sequence *s, int failed, const struct err *err)
{
    if (failed) {
        json_decref(s->items);
        call_fail(c, err);
        return;
    }
    json_t *j = json_object();
    json_put(j, "items", s->items);
    json_put_int(j, "last_seq", s->last_seq);
    call_admission(c);
    reply_json(c, 200, j);
}

// Where a follower begins: after Last-Event-ID, else after_seq, else fallback.
static int64_t begin_after(const struct api_call *c, int64_t fallback)
{
    const char *last = call_param_text(c, "Last-Event-ID", NULL);
    return last ? (int64_t)strtoull(last, NULL, 10) : call_param_integer(c, "after_seq", fallback);
}

// ---- logs -----------------------------------------------------------------------------------------------------------
#define LOG_BATCH 100

struct log_follow {
    int64_t after_seq;
    int source;
    char id[ID_MAX];
    struct buf *out; // while producing
};

static bool log_event(void *arg, const struct log_entry *e)
{
    struct log_follow *f = arg;
    sse_event(f->out, "log", e->seq, view_log_entry(e));
    f->after_seq = e->seq;
    return f->out->len < SSE_TEXT_ENOUGH;
}

// Ends when the sandbox is gone and everything was said.
static enum sse_more produce_log(void *state, struct api_call *c, struct buf *out)
{
    struct log_follow *f = state;
    struct err err = {0};
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, f->id, &err);
    if (!info)
        return SSE_END;
    const bool gone = info->row.state == SANDBOX_DESTROYED;
    sandbox_info_unref(info);
    const int64_t before = f->after_seq;
    f->out = out;
    if (sandbox_logs(c->a->manager, c->who->row.tenant, f->id, f->after_seq, f->source, LOG_BATCH, log_event, f, &err) != 0)
        return SSE_END;
    if (f->after_seq != before)
        return SSE_AGAIN;
    return gone ? SSE_END : SSE_WAIT;
}

static const struct sse_source LOG_SOURCE = {produce_log, free};

static bool log_item(void *arg, const struct log_entry *e)
{
    struct sequence *s = arg;
    json_array_append_new(s->items, view_log_entry(e));
    s->last_seq = e->seq;
    return true;
}

static void follow_logs(struct api_call *c, int source)
{
    struct err err = {0};
    if (call_param(c, "limit")->given) {
        faults_add(call_faults(c), "/query/limit", "must not stand beside follow");
        call_invalid(c);
        return;
    }
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    struct log_follow *f = info ? calloc(1, sizeof *f) : NULL;
    sandbox_info_unref(info);
    if (!f) {
        if (err.kind == ERR_NONE)
            err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    char key[ID_MAX + 8];
    f->after_seq = begin_after(c, 0);
    f->source = source;
    memcpy(f->id, c->in->ids[0], sizeof f->id);
    snprintf(key, sizeof key, "log:%s", f->id);
    call_admission(c);
    sse_reply(c, &LOG_SOURCE, f, key);
}

static void logs(struct api_call *c)
{
    const char *name = call_param_text(c, "source", NULL);
    const int source = name ? log_source_parse(name) : 0;
    if (call_param_flag(c, "follow")) {
        follow_logs(c, source);
        return;
    }
    struct err err = {0};
    struct sequence s = {json_array(), call_param_integer(c, "after_seq", 0)};
    const unsigned limit = (unsigned)call_param_integer(c, "limit", LIMIT_LIST_DEFAULT);
    const int failed = sandbox_logs(c->a->manager, c->who->row.tenant, c->in->ids[0], s.last_seq, source, limit, log_item,
                                    &s, &err);
    reply_sequence(c, &s, failed, &err);
}

// ---- events -----------------------------------------------------------------------------------------------------------
struct event_follow {
    int64_t after_seq;
    struct buf *out;
};

static bool event_event(void *arg, const struct event_row *row)
{
    struct event_follow *f = arg;
    sse_event(f->out, row->kind, row->seq, view_event(row));
    f->after_seq = row->seq;
    return f->out->len < SSE_TEXT_ENOUGH;
}

static enum sse_more produce_events(void *state, struct api_call *c, struct buf *out)
{
    struct event_follow *f = state;
    struct err err = {0};
    const int64_t before = f->after_seq;
    f->out = out;
    if (event_list(c->a->store, c->who->row.tenant, f->after_seq, 100, event_event, f, &err) != 0)
        return SSE_WAIT; // the store is busy: the next news or comment looks again
    return f->after_seq != before ? SSE_AGAIN : SSE_WAIT;
}

static const struct sse_source EVENT_SOURCE = {produce_events, free};

static bool take_seq(void *arg, const struct event_row *row)
{
    *(int64_t *)arg = row->seq;
    return false;
}

// First seq after `after`, or 0.
static int64_t first_after(struct api_call *c, int64_t after)
{
    struct err err = {0};
    int64_t seq = 0;
    return event_list(c->a->store, c->who->row.tenant, after, 1, take_seq, &seq, &err) == 0 ? seq : 0;
}

// The newest seq, by doubling steps and halving back: a few dozen look-ups whatever the number of events.
static int64_t newest(struct api_call *c)
{
    int64_t last = first_after(c, 0), step = 1, seq;
    while (last > 0 && (seq = first_after(c, last + step - 1)) > 0) {
        last = seq;
        step *= 2;
    }
    for (; step > 0; step /= 2)
        while ((seq = last > 0 ? first_after(c, last + step - 1) : 0) > 0)
            last = seq;
    return last;
}

static bool event_item(void *arg, const struct event_row *row)
{
    struct sequence *s = arg;
    json_array_append_new(s->items, view_event(row));
    s->last_seq = row->seq;
    return true;
}

static void events(struct api_call *c)
{
    struct err err = {0};
    if (!c->in->accept_stream && (c->in->accept_json || call_param(c, "limit")->given)) {
        struct sequence s = {json_array(), call_param_integer(c, "after_seq", 0)};
        const unsigned limit = (unsigned)call_param_integer(c, "limit", LIMIT_LIST_DEFAULT);
        const int failed = event_list(c->a->store, c->who->row.tenant, s.last_seq, limit, event_item, &s, &err);
        reply_sequence(c, &s, failed, &err);
        return;
    }
    if (call_param(c, "limit")->given) {
        faults_add(call_faults(c), "/query/limit", "is for a page only: ask for application/json");
        call_invalid(c);
        return;
    }
    struct event_follow *f = calloc(1, sizeof *f);
    if (!f) {
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    f->after_seq = begin_after(c, -1);
    if (f->after_seq < 0)
        f->after_seq = newest(c);
    sse_reply(c, &EVENT_SOURCE, f, "events");
}

// ---- jobs -------------------------------------------------------------------------------------------------------------
static bool job_item(void *arg, const struct job_row *row)
{
    return list_add(arg, row->id, view_job(row));
}

static void list_jobs(struct api_call *c)
{
    struct list l;
    struct err err = {0};
    if (list_begin(&l, c))
        list_reply(&l, job_list(c->a->store, &l.page, call_param_text(c, "sandbox_id", NULL), job_item, &l, &err), &err);
}

// The job in the path (or the replayed one), shown with the ids of a cancelling request.
static void reply_job(struct api_call *c, const struct admission *act)
{
    struct job_row row = {0};
    struct err err = {0};
    const int got = job_get(c->a->store, c->who->row.tenant, c->in->ids[0], &row, &err);
    if (got != 0) {
        if (got > 0)
            call_not_found(c);
        else
            call_fail(c, &err);
        return;
    }
    json_t *j = view_job(&row);
    job_row_free(&row);
    if (act) {
        json_put_str(j, "audit_id", act->audit_id);
        json_put_str(j, "receipt_id", act->receipt_id);
    }
    reply_json(c, 200, j);
}

static void get_job(struct api_call *c)
{
    reply_job(c, NULL);
}

static int unchanged_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct admission *a = arg;
    const struct settlement s = {.outcome = "unchanged", .status = 200, .ref = a->job_id};
    return evidence_admit(tx, a, NULL, err) != 0 ? -1 : evidence_settle(tx, a, &s, err);
}

// A cancelled job stays cancelled; the request is proven all the same.
static void cancel_job(struct api_call *c)
{
    struct job_row row = {0};
    struct err err = {0};
    struct admission *a = call_admission(c);
    const int got = job_get(c->a->store, a->tenant, c->in->ids[0], &row, &err);
    const bool cancelled = got == 0 && row.state == JOB_CANCELLED;
    if (got == 0) {
        snprintf(a->job_id, sizeof a->job_id, "%s", row.id);
        snprintf(a->sandbox_id, sizeof a->sandbox_id, "%s", row.sandbox_id);
    }
    job_row_free(&row);
    c->in->settles_itself = true;
    int failed;
    if (got > 0)
        failed = err_set(&err, ERR_NOT_FOUND, "not_found", "no such object");
    else if (cancelled)
        failed = store_write(c->a->store, unchanged_tx, a, &err);
    else
        failed = got < 0 ? -1 : manager_job_cancel(c->a->manager, a->tenant, c->in->ids[0], a, &err);
    if (failed) {
        a->job_id[0] = 0;
        call_fail(c, &err);
    } else {
        reply_job(c, a);
    }
}

static void replay_cancel(struct api_call *c)
{
    if (!replay_is_problem(c))
        reply_job(c, &c->in->a);
}

const struct handler LOG_HANDLERS[] = {
    {"sandbox.logs", RUN_POOLED, logs, NULL, NULL},
    {"event.list", RUN_POOLED, events, NULL, NULL},
    {"job.list", RUN_POOLED, list_jobs, NULL, NULL},
    {"job.get", RUN_POOLED, get_job, NULL, NULL},
    {"job.cancel", RUN_POOLED, cancel_job, NULL, replay_cancel},
    {0},
};
