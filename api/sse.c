#include "api/sse.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/pump.h"
#include "api/reply.h"
#include "base/clock.h"

// An idle follower costs this, its pump and its call.
struct sse {
    const struct sse_source *source;
    void *state;
    char *text;              // under c->lock, with off, len, end: what waits for the reader
    uint32_t off, len;
    bool end;                // nothing comes after text
    int64_t said_ms;         // when something was last handed over
    char key[ID_MAX + 8];
};

void sse_event(struct buf *out, const char *event, int64_t id, json_t *data)
{
    char *text = json_dumps(data, JSON_COMPACT);
    json_decref(data);
    if (text)
        buf_addf(out, "event: %s\nid: %" PRId64 "\ndata: ", event, id);
    if (text)
        buf_adds(out, text);
    if (text)
        buf_adds(out, "\n\n");
    free(text);
}

static bool must_end(struct api_call *c)
{
    return atomic_load(&c->ending) || atomic_load(&c->a->stopping) || (c->who && !principal_live(c->who));
}

static void hand_over(struct api_call *c, struct sse *s, struct buf *out, bool end)
{
    const size_t len = out->len;
    char *text = len > 0 ? buf_steal(out) : NULL;
    s->said_ms = clock_mono_ms();
    pthread_mutex_lock(&c->lock);
    s->text = text;
    s->off = 0;
    s->len = (uint32_t)len;
    s->end = end;
    if (c->wake)
        c->wake(c->wake_arg);
    pthread_mutex_unlock(&c->lock);
}

// Until the next comment, or the end of the token's life where that comes first.
static int64_t quiet_ms(const struct api_call *c, const struct sse *s)
{
    int64_t left = s->said_ms + LIMIT_SSE_COMMENT_SECONDS * 1000 - clock_mono_ms();
    const int64_t expires = c->who ? c->who->row.expires_at_ms : 0;
    if (expires > 0 && expires - clock_wall_ms() < left)
        left = expires - clock_wall_ms() + 1;
    return left > 1 ? left : 1;
}

static enum pump_next step(struct pump *p)
{
    struct api_call *c = p->c;
    struct sse *s = c->state;
    pthread_mutex_lock(&c->lock);
    const bool full = s->text != NULL, gone = c->ended, ended = s->end;
    pthread_mutex_unlock(&c->lock);
    if (gone || ended)
        return PUMP_DONE;
    if (full && !must_end(c)) { // the reader signals when it took all
        pump_after(p, quiet_ms(c, s) + 1000);
        return PUMP_WAIT;
    }
    CLEANUP_BUF struct buf out = BUF_INIT(1u << 20);
    if (must_end(c)) {
        if (!full)
            hand_over(c, s, &out, true);
        else {
            pthread_mutex_lock(&c->lock);
            s->end = true;
            pthread_mutex_unlock(&c->lock);
        }
        return PUMP_DONE;
    }
    const enum sse_more more = s->source->produce(s->state, c, &out);
    if (out.len == 0 && more == SSE_WAIT && clock_mono_ms() - s->said_ms >= LIMIT_SSE_COMMENT_SECONDS * 1000)
        buf_adds(&out, ":\n\n");
    if (out.len > 0 || more == SSE_END)
        hand_over(c, s, &out, more == SSE_END);
    if (more == SSE_END)
        return PUMP_DONE;
    pump_after(p, quiet_ms(c, s));
    return PUMP_WAIT;
}

static int64_t sse_read(struct api_call *c, void *out, size_t cap)
{
    struct sse *s = c->state;
    char *done = NULL;
    int64_t n = 0;
    pthread_mutex_lock(&c->lock);
    if (s->text) {
        const size_t left = s->len - s->off;
        n = (int64_t)(left < cap ? left : cap);
        memcpy(out, s->text + s->off, (size_t)n);
        s->off += (uint32_t)n;
        if (s->off == s->len) {
            done = s->text;
            s->text = NULL;
            if (c->pump)
                pump_signal(c->pump);
        }
    } else if (s->end) {
        n = -1;
    }
    pthread_mutex_unlock(&c->lock);
    free(done);
    return n;
}

static void sse_close(struct api_call *c, bool completed)
{
    (void)c;
    (void)completed; // the pump sees that the client left and ends itself
}

static void sse_free(struct api_call *c)
{
    struct sse *s = c->state;
    if (!s)
        return;
    s->source->free(s->state);
    free(s->text);
    free(s);
}

static const struct stream_ops SSE_OPS = {sse_read, sse_close, sse_free};

void sse_reply(struct api_call *c, const struct sse_source *source, void *state, const char *key)
{
    struct sse *s = calloc(1, sizeof *s);
    if (s) {
        s->source = source;
        s->state = state;
        s->said_ms = clock_mono_ms();
        snprintf(s->key, sizeof s->key, "%s", key);
        c->state = s;
        c->stream = &SSE_OPS;
    }
    if (!s || pump_start(c, s->key, step) != 0) {
        struct err err = {0};
        if (!s)
            source->free(state);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    reply_header(c, "Cache-Control", "no-store");
    reply_stream(c, 200, "text/event-stream", -1);
}

// ---- the list of streams, for revocation and shutdown -----------------------------------------------------------------
void stream_list_add(struct api_call *c)
{
    struct api *a = c->a;
    pthread_mutex_lock(&a->streams_lock);
    c->stream_prev = NULL;
    c->stream_next = a->streams;
    if (a->streams)
        a->streams->stream_prev = c;
    a->streams = c;
    pthread_mutex_unlock(&a->streams_lock);
}

void stream_list_remove(struct api_call *c)
{
    struct api *a = c->a;
    pthread_mutex_lock(&a->streams_lock);
    if (c->stream_prev)
        c->stream_prev->stream_next = c->stream_next;
    else
        a->streams = c->stream_next;
    if (c->stream_next)
        c->stream_next->stream_prev = c->stream_prev;
    pthread_mutex_unlock(&a->streams_lock);
}

void streams_end(struct api *a, const char *token_id)
{
    pthread_mutex_lock(&a->streams_lock);
    for (struct api_call *c = a->streams; c; c = c->stream_next) {
        if (token_id && (!c->who || strcmp(c->who->row.id, token_id) != 0))
            continue;
        atomic_store(&c->ending, true);
        pthread_mutex_lock(&c->lock);
        if (c->pump)
            pump_signal(c->pump);
        if (c->wake)
            c->wake(c->wake_arg);
        pthread_mutex_unlock(&c->lock);
    }
    pthread_mutex_unlock(&a->streams_lock);
}
