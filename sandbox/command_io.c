// Commands, output: from the guest's frames through redaction into the spool, acknowledged once it is durable.
#include "sandbox/command_int.h"
#include "sandbox/redact.h"

#include <stdlib.h>
#include <string.h>

// ---- receiving (loop) -----------------------------------------------------------------------------------------------
static void append_piece(struct command *c, int stream, const uint8_t *data, size_t len)
{
    struct piece *p = malloc(sizeof *p + len);
    if (!p)
        return; // not received: the agent keeps it, and sends it again with the next session
    *p = (struct piece){.offset = c->recv[stream], .len = (uint32_t)len, .stream = (uint8_t)stream};
    memcpy(p->data, data, len);
    if (c->pending)
        c->pending_last->next = p;
    else
        c->pending = p;
    c->pending_last = p;
    c->recv[stream] += len;
}

void commands_on_output(struct sandbox *s, uint64_t id, const struct msg_data *d)
{
    if (d->stream != MSG_STDOUT && d->stream != MSG_STDERR)
        return;
    const int stream = d->stream == MSG_STDERR;
    pthread_mutex_lock(&s->lock);
    struct command *c = command_by_agent_id(s, id);
    struct transfer *wake = NULL;
    if (c && c->archive) {
        wake = archive_output_locked(c, d) ? archive_ref(c) : NULL;
        command_try_finish_locked(c);
    } else if (c && !c->finishing && d->offset <= c->recv[stream]) {
        const uint64_t known = c->recv[stream] - d->offset; // bytes that a resend repeats
        const uint64_t waiting = c->recv[stream] - c->spooled[stream];
        const size_t fresh = known < d->bytes.len ? d->bytes.len - (size_t)known : 0;
        // An honest agent never has more on the way than it may keep; what is past that is not taken.
        if (fresh > 0 && waiting + fresh <= LIMIT_UNACKED_STREAM_BYTES + REDACT_TAIL) {
            append_piece(c, stream, d->bytes.data + known, fresh);
            io_schedule_locked(s);
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (wake)
        archive_wake(wake);
}

// ---- storing (io job) -------------------------------------------------------------------------------------------------
// One piece after redaction: `text` is the tail of before plus the piece, of which `settled` bytes may be kept now.
struct settled {
    uint8_t *text;
    size_t len, settled;
    int stream;
};

struct batch {
    struct settled *items;
    struct spool_piece *pieces;
    size_t n;
    uint64_t end[2];
    uint8_t tail[2][REDACT_TAIL];
    size_t tail_len[2];
    unsigned carry[2];
    bool redacted;
};

static bool settle_one(struct batch *b, int stream, const uint8_t *data, size_t len, bool final)
{
    struct settled *it = &b->items[b->n];
    it->text = malloc(b->tail_len[stream] + len + 1);
    if (!it->text)
        return false;
    memcpy(it->text, b->tail[stream], b->tail_len[stream]);
    if (len)
        memcpy(it->text + b->tail_len[stream], data, len);
    it->len = b->tail_len[stream] + len;
    it->stream = stream;
    it->settled = redact(it->text, it->len, final, &b->carry[stream], &b->redacted);
    b->tail_len[stream] = it->len - it->settled;
    memcpy(b->tail[stream], it->text + it->settled, b->tail_len[stream]);
    b->pieces[b->n] = (struct spool_piece){.stream = (enum spool_stream)stream, .offset = b->end[stream],
                                           .data = it->text, .len = it->settled};
    b->end[stream] += it->settled;
    b->n += 1;
    return true;
}

static void batch_free(struct batch *b)
{
    for (size_t i = 0; i < b->n; i++)
        free(b->items[i].text);
    free(b->items);
    free(b->pieces);
}

static bool batch_build(struct batch *b, const struct command *c, const struct piece *pieces, bool final)
{
    size_t n = 2;
    for (const struct piece *p = pieces; p; p = p->next)
        n++;
    b->items = calloc(n, sizeof *b->items);
    b->pieces = calloc(n, sizeof *b->pieces);
    memcpy(b->end, c->spooled, sizeof b->end);
    memcpy(b->tail, c->tail, sizeof b->tail);
    memcpy(b->tail_len, c->tail_len, sizeof b->tail_len);
    memcpy(b->carry, c->carry, sizeof b->carry);
    if (!b->items || !b->pieces)
        return false;
    for (const struct piece *p = pieces; p; p = p->next)
        if (!settle_one(b, p->stream, p->data, p->len, false))
            return false;
    for (int stream = 0; final && stream < 2; stream++)
        if (b->tail_len[stream] > 0 && !settle_one(b, stream, NULL, 0, true))
            return false;
    return true;
}

static void log_output(struct command *c, const struct batch *b)
{
    for (size_t i = 0; i < b->n; i++)
        if (b->items[i].settled > 0)
            sandbox_log(c->s, LOGSRC_COMMAND, b->items[i].stream ? "stderr" : "stdout", c->row.id, b->items[i].text,
                        b->items[i].settled);
}

static void acknowledge_locked(struct command *c)
{
    struct err err = {0};
    CLEANUP_BUF struct buf out = BUF_INIT(256);
    const struct msg_offsets o = {.stdout_offset = c->spooled[0], .stderr_offset = c->spooled[1],
                                  .stdin_offset = c->stdin_credit};
    if (c->s->vm && c->s->session && msg_offsets_encode(&out, &o) == 0)
        (void)vm_send(c->s->vm, FRAME_ACK, c->row.agent_id, &out, &err);
}

static bool store_batch(struct command *c, const struct batch *b, struct err *err)
{
    if (!c->spool)
        c->spool = spool_open(c->s->out_dirfd, c->row.id, err);
    return c->spool && spool_write(c->spool, b->pieces, (unsigned)b->n, err) == 0;
}

// Puts back what could not be stored, before what came meanwhile.
static void put_back_locked(struct command *c, struct piece *pieces)
{
    struct piece *last = pieces;
    while (last && last->next)
        last = last->next;
    if (!last)
        return;
    last->next = c->pending;
    if (!c->pending)
        c->pending_last = last;
    c->pending = pieces;
}

static void free_pieces(struct piece *p)
{
    while (p) {
        struct piece *next = p->next;
        free(p);
        p = next;
    }
}

static bool wants_io(const struct command *c)
{
    if (c->finishing || c->io_busy || c->archive)
        return false;
    const bool flush = c->exited && !c->pending && c->recv[0] >= c->total[0] && c->recv[1] >= c->total[1] &&
                       (c->tail_len[0] || c->tail_len[1]);
    return c->pending || flush;
}

// One command's turn. True when something was done (and the list may have changed).
static void io_one(struct sandbox *s, struct command *c, struct piece *pieces, bool final)
{
    struct batch b = {0};
    struct err err = {0};
    const bool kept = batch_build(&b, c, pieces, final) && store_batch(c, &b, &err);
    if (kept)
        log_output(c, &b);
    pthread_mutex_lock(&s->lock);
    c->io_busy = false;
    if (kept) {
        memcpy(c->spooled, b.end, sizeof c->spooled);
        memcpy(c->tail, b.tail, sizeof c->tail);
        memcpy(c->tail_len, b.tail_len, sizeof c->tail_len);
        memcpy(c->carry, b.carry, sizeof c->carry);
        c->redacted |= b.redacted;
        acknowledge_locked(c);
    } else {
        put_back_locked(c, pieces);
        s->io_retry_at_ms = clock_mono_ms() + 500;
    }
    char id[ID_MAX];
    memcpy(id, c->row.id, sizeof id);
    command_try_finish_locked(c); // c may be gone after the unlock
    pthread_mutex_unlock(&s->lock);
    if (kept) {
        hub_notify(s->m->hub, id);
        free_pieces(pieces);
    } else {
        log_warn_limited("command %s: output waits for the disk: %s", id, err.detail);
    }
    batch_free(&b);
}

bool commands_want_io_locked(struct sandbox *s)
{
    if (s->io_retry_at_ms)
        return false; // the tick brings it back
    for (const struct command *c = s->commands; c; c = c->next)
        if (wants_io(c))
            return true;
    return false;
}

void commands_io(struct sandbox *s)
{
    for (;;) {
        pthread_mutex_lock(&s->lock);
        struct command *c = s->io_retry_at_ms ? NULL : s->commands;
        while (c && !wants_io(c))
            c = c->next;
        struct piece *pieces = NULL;
        bool final = false;
        if (c) {
            pieces = c->pending;
            c->pending = c->pending_last = NULL;
            c->io_busy = true;
            final = c->exited && c->recv[0] >= c->total[0] && c->recv[1] >= c->total[1];
        }
        pthread_mutex_unlock(&s->lock);
        if (!c)
            return;
        io_one(s, c, pieces, final);
    }
}
