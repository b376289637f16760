// Idempotency-Key: one claim per (tenant, method, path, key) at a time in this process; the rows of the store say what was
// answered before, also by an earlier process.
//
//   no row            ours: run; the admission writes the row, the settlement completes it
//   row, other body   409 idempotency_mismatch
//   row, done         the answer is rebuilt from status and reference
//   row, running      an earlier process began it: wait for its settlement (reconciliation), or for the claim of this one
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/call.h"
#include "api/principal.h"
#include "api/reply.h"
#include "base/clock.h"
#include "base/fd.h"

#define BUCKETS 256
#define LOOK_AGAIN_MS 150
#define WAIT_MAX_MS 180000

struct waiting {
    struct waiting *next;
    struct api_call *c; // a reference
};

struct idem_entry {
    struct idem_entry *next;
    char *name;
    struct waiting *waiting;
    // While a row of an earlier process is waited for.
    struct timer timer;
    int64_t since_ms;
};

struct idem_table {
    pthread_mutex_t lock;
    struct idem_entry *buckets[BUCKETS];
};

struct idem_table *idem_new(void)
{
    struct idem_table *t = calloc(1, sizeof *t);
    if (t)
        pthread_mutex_init(&t->lock, NULL);
    return t;
}

void idem_free(struct idem_table *t)
{
    if (!t)
        return;
    pthread_mutex_destroy(&t->lock); // every call is gone, so is every claim
    free(t);
}

static unsigned bucket_of(const char *name)
{
    uint32_t h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 16777619u;
    return h % BUCKETS;
}

// The claim goes to c, or c waits for who has it: true when it is c's.
static bool claim(struct idem_table *t, struct api_call *c, struct idem_entry *fresh, struct waiting *w)
{
    struct idem_entry **head = &t->buckets[bucket_of(fresh->name)];
    pthread_mutex_lock(&t->lock);
    struct idem_entry *e = *head;
    while (e && strcmp(e->name, fresh->name) != 0)
        e = e->next;
    if (e) {
        w->c = call_ref(c);
        w->next = e->waiting;
        e->waiting = w;
    } else {
        fresh->next = *head;
        *head = fresh;
    }
    pthread_mutex_unlock(&t->lock);
    return !e;
}

static void look(void *arg);

static void out_of_memory(struct api_call *c)
{
    struct err err = {0};
    err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    call_fail(c, &err);
}

void idem_begin(struct api_call *c)
{
    struct idem_entry *e = calloc(1, sizeof *e);
    struct waiting *w = calloc(1, sizeof *w);
    if (e && w &&
        asprintf(&e->name, "%s %s %s %s", c->who->row.tenant, c->op->method, c->in->path,
                 call_param_text(c, "Idempotency-Key", "")) >= 0) {
        if (claim(c->a->idem, c, e, w)) {
            free(w);
            c->in->entry = e;
            call_pool(c, look);
            return;
        }
        free(e->name);
        free(e);
        return;
    }
    free(e);
    free(w);
    out_of_memory(c);
}

void idem_release(struct api_call *c)
{
    struct idem_entry *e = c->in->entry;
    struct idem_table *t = c->a->idem;
    if (!e)
        return;
    c->in->entry = NULL;
    pthread_mutex_lock(&t->lock);
    struct idem_entry **at = &t->buckets[bucket_of(e->name)];
    while (*at != e)
        at = &(*at)->next;
    *at = e->next;
    struct waiting *waiting = e->waiting;
    pthread_mutex_unlock(&t->lock);
    for (struct waiting *w = waiting, *next; w; w = next) {
        next = w->next;
        pthread_mutex_lock(&w->c->lock);
        const bool gone = w->c->ended;
        pthread_mutex_unlock(&w->c->lock);
        if (!gone) // one who left has started nothing: it is forgotten
            idem_begin(w->c);
        call_unref(w->c);
        free(w);
    }
    free(e->name);
    free(e);
}

// ---- looking for the row -------------------------------------------------------------------------------------------
static void refuse(struct api_call *c, enum err_kind kind, const char *code, const char *detail)
{
    struct err err = {0};
    err_set(&err, kind, code, "%s", detail);
    call_fail(c, &err);
}

static void look_again(void *arg) // timer
{
    struct api_call *c = arg;
    if (work_submit(c->a->pool, look, c) != 0)
        look(c);
}

static void wait_for_row(struct api_call *c)
{
    struct idem_entry *e = c->in->entry;
    const int64_t now = clock_mono_ms();
    if (e->since_ms == 0)
        e->since_ms = now;
    if (now - e->since_ms > WAIT_MAX_MS || atomic_load(&c->a->stopping)) {
        refuse(c, ERR_UNAVAILABLE, "still_running", "the first request with this key has not ended yet");
        return;
    }
    pthread_mutex_lock(&c->lock);
    const bool gone = c->ended;
    pthread_mutex_unlock(&c->lock);
    if (gone)
        return; // nothing was started: the claim goes with the call
    call_ref(c);
    if (timers_add(c->a->timers, &e->timer, LOOK_AGAIN_MS, look_again, c) != 0) {
        call_unref(c);
        out_of_memory(c);
    }
}

// A request that was answered with 202 has its answer already, also while the work goes on.
static bool answered_early(const struct api_call *c, const struct idem_row *row)
{
    if (!*row->job_id)
        return false;
    if (c->in->prefer_async)
        return true;
    if (strcmp(c->op->name, "command.run") != 0)
        return false;
    struct err ignored = {0};
    CLEANUP_JSON json_t *body = json_parse_strict(buf_text(&c->in->body), c->in->body.len, &ignored);
    return c->in->accept_stream || json_is_true(json_object_get(body, "background"));
}

static void take_row(struct api_call *c, struct idem_row *row)
{
    struct admission *a = call_admission(c);
    snprintf(a->audit_id, sizeof a->audit_id, "%s", row->audit_id);
    snprintf(a->receipt_id, sizeof a->receipt_id, "%s", row->receipt_id);
    snprintf(a->job_id, sizeof a->job_id, "%s", row->job_id);
    c->replayed = true;
    c->in->admitted = true;
    c->in->replay = row;
}

static void found(struct api_call *c, struct idem_row *row)
{
    if (!crypto_equal(row->body_sha256, c->in->body_sha256, SHA256_BYTES)) {
        idem_row_free(row);
        free(row);
        refuse(c, ERR_CONFLICT, "idempotency_mismatch", "the key was used with another body");
        return;
    }
    if (row->state == IDEM_RUNNING && !answered_early(c, row)) {
        idem_row_free(row);
        free(row);
        wait_for_row(c);
        return;
    }
    take_row(c, row);
    call_replay(c);
}

static void look(void *arg)
{
    struct api_call *c = arg;
    struct err err = {0};
    struct idem_row *row = calloc(1, sizeof *row);
    const int got = !row ? err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory")
                         : idem_find(c->a->store, c->who->row.tenant, c->op->method, c->in->path,
                                     call_param_text(c, "Idempotency-Key", ""), row, &err);
    if (row && got == 0) {
        found(c, row);
    } else {
        free(row);
        if (got < 0)
            call_fail(c, &err);
        else
            call_run(c);
    }
    call_unref(c);
}

// ---- a refusal that is kept -------------------------------------------------------------------------------------------
struct refusal {
    const struct admission *a;
    struct settlement s;
};

static int refusal_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct refusal *r = arg;
    return evidence_admit(tx, r->a, NULL, err) != 0 ? -1 : evidence_settle(tx, r->a, &r->s, err);
}

int idem_store_refusal(struct api_call *c, int status, const char *problem)
{
    struct err err = {0};
    struct refusal r = {.a = call_admission(c), .s = {.outcome = "refused", .status = status, .problem_json = problem}};
    if (status == 403)
        r.s.outcome = "denied";
    return store_write(c->a->store, refusal_tx, &r, &err);
}
