// Stdin of a running command: the body is handed on in bounded pieces as the guest takes them. One admission before the
// first piece and one settlement after the last, whatever the number of pieces.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/problem.h"
#include "api/reply.h"
#include "base/fd.h"
#include "sandbox/command.h"

#define PIECE_MAX (256u << 10)

// The piece in `sending` is with the guest; `filling` takes what comes meanwhile. Both under c->lock but for `sending`,
// which belongs to the piece under way.
struct feeding {
    struct buf filling, sending;
    bool open;               // admitted: pieces may go
    bool busy;               // one is under way
    bool ended;              // the body is complete: the next piece is the last
    bool last;               // the piece under way is
    bool left;               // the client went away in the middle
    bool over;               // nothing goes any more
    int64_t offset;          // of the next piece; -1: append
    int64_t total;
    uint64_t taken;
    struct admission silent; // for pieces: no evidence of their own
    struct err err;
};

static void next_piece(struct api_call *c);

// ---- evidence -------------------------------------------------------------------------------------------------------
static int admit_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct api_call *c = arg;
    CLEANUP_JSON json_t *facts = json_object();
    json_put_str(facts, "command_id", c->in->ids[1]);
    return evidence_admit(tx, &c->in->a, facts, err);
}

struct settling {
    const struct api_call *c;
    struct settlement s;
};

static int settle_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settling *s = arg;
    return evidence_settle(tx, &s->c->in->a, &s->s, err);
}

static json_t *answer_of(struct api_call *c, const struct feeding *f)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", c->in->ids[1]);
    json_put_int(j, "next_offset", f->total);
    json_put(j, "eof", json_boolean(call_param_flag(c, "eof")));
    json_put_str(j, "audit_id", c->in->a.audit_id);
    json_put_str(j, "receipt_id", c->in->a.receipt_id);
    return j;
}

// After the last piece, or the first that failed. Gives back the reference of the feeding.
static void settle_job(void *arg)
{
    struct api_call *c = arg;
    struct feeding *f = c->state;
    struct err err = {0};
    CLEANUP_JSON json_t *facts = json_object();
    json_put_str(facts, "command_id", c->in->ids[1]);
    json_put_int(facts, "bytes", (int64_t)f->taken);
    const bool failed = f->err.kind != ERR_NONE;
    struct settling s = {c, {.outcome = f->left ? "aborted" : failed ? "failed" : "succeeded", .status = 200, .facts = facts}};
    c->in->err = f->err;
    CLEANUP_FREE char *problem = failed ? reply_problem_text(c) : NULL;
    if (failed) {
        s.s.status = problem_status(f->err.kind);
        s.s.problem_json = problem;
    }
    if (store_write(c->a->store, settle_tx, &s, &err) != 0 && !failed)
        f->err = err;
    if (f->err.kind != ERR_NONE)
        call_fail(c, &f->err);
    else
        reply_json(c, 200, answer_of(c, f));
    call_unref(c);
}

// ---- pieces -----------------------------------------------------------------------------------------------------------
static void on_taken(void *arg, int64_t total, const struct err *err)
{
    struct api_call *c = arg;
    struct feeding *f = c->state;
    pthread_mutex_lock(&c->lock);
    f->busy = false;
    if (err) {
        f->err = *err;
    } else {
        f->taken += f->sending.len;
        f->total = total;
        f->offset = f->offset < 0 ? -1 : f->offset + (int64_t)f->sending.len;
    }
    buf_clear(&f->sending);
    f->over = f->over || err || f->last;
    const bool over = f->over;
    pthread_mutex_unlock(&c->lock);
    if (over && work_submit(c->a->pool, settle_job, c) != 0)
        settle_job(c);
    if (!over) {
        call_wake(c);
        next_piece(c);
    }
}

// Sends what has gathered, if no piece is under way: a full one, or all there is once the body ended.
static void next_piece(struct api_call *c)
{
    struct feeding *f = c->state;
    pthread_mutex_lock(&c->lock);
    const bool idle = f->open && !f->busy && !f->over;
    const bool told = idle && f->ended && f->filling.len == 0 && f->taken > 0 && !call_param_flag(c, "eof");
    const bool stop = idle && (f->left || told);
    const bool go = !stop && idle && (f->ended || f->filling.len >= PIECE_MAX);
    if (stop)
        f->over = true;
    if (stop && !told)
        err_set(&f->err, ERR_TRANSPORT_FAILED, "aborted", "the client went away");
    if (go) {
        f->busy = true;
        const struct buf empty = f->sending;
        f->sending = f->filling;
        f->filling = empty;
        f->last = f->ended;
    }
    const bool eof = f->last && call_param_flag(c, "eof");
    pthread_mutex_unlock(&c->lock);
    if (stop && work_submit(c->a->pool, settle_job, c) != 0)
        settle_job(c);
    if (go)
        command_stdin(c->a->manager, c->in->ids[0], c->in->ids[1], buf_text(&f->sending), f->sending.len, f->offset, eof,
                      &f->silent, 200, on_taken, c);
}

static size_t feeding_push(struct api_call *c, const void *data, size_t len)
{
    struct feeding *f = c->state;
    pthread_mutex_lock(&c->lock);
    size_t n = PIECE_MAX - f->filling.len;
    n = n < len ? n : len;
    if (f->over)
        n = len; // failed: the answer is on its way
    else if (n > 0 && !buf_add(&f->filling, data, n))
        n = 0;
    pthread_mutex_unlock(&c->lock);
    next_piece(c);
    return n;
}

static void feeding_end(struct api_call *c)
{
    struct feeding *f = c->state;
    pthread_mutex_lock(&c->lock);
    f->ended = true;
    pthread_mutex_unlock(&c->lock);
    next_piece(c);
}

static void feeding_abort(struct api_call *c)
{
    struct feeding *f = c->state;
    pthread_mutex_lock(&c->lock);
    f->left = true;
    pthread_mutex_unlock(&c->lock);
    next_piece(c);
}

static void feeding_free(struct api_call *c)
{
    struct feeding *f = c->state;
    buf_free(&f->filling);
    buf_free(&f->sending);
    free(f);
    c->state = NULL;
}

static const struct sink_ops FEEDING_OPS = {feeding_push, feeding_end, feeding_abort, feeding_free};

// ---- begin ------------------------------------------------------------------------------------------------------------
// Is there such a command? Then the intent becomes durable, and the pieces may go.
static void admit_job(void *arg)
{
    struct api_call *c = arg;
    struct feeding *f = c->state;
    struct err err = {0};
    struct command_row row = {0};
    int failed = command_info(c->a->manager, c->who->row.tenant, c->in->ids[0], c->in->ids[1], &row, &err);
    command_row_free(&row);
    if (!failed)
        failed = store_write(c->a->store, admit_tx, c, &err);
    pthread_mutex_lock(&c->lock);
    f->over = failed;
    f->open = !failed;
    pthread_mutex_unlock(&c->lock);
    if (failed) {
        call_fail(c, &err);
        call_wake(c);
        call_unref(c);
        return;
    }
    c->in->admitted = true;
    call_wake(c);
    next_piece(c);
}

static void begin_stdin(struct api_call *c)
{
    struct feeding *f = calloc(1, sizeof *f);
    if (!f) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    buf_init(&f->filling, PIECE_MAX);
    buf_init(&f->sending, PIECE_MAX);
    f->offset = call_param_integer(c, "offset", -1);
    f->silent = *call_admission(c);
    f->silent.audit_id[0] = f->silent.receipt_id[0] = 0;
    c->state = f;
    c->sink = &FEEDING_OPS;
    call_pool(c, admit_job);
}

const struct handler STDIN_HANDLERS[] = {
    {"command.stdin", RUN_ASYNC, NULL, begin_stdin, NULL},
    {0},
};
