#include "guest/agent.h"

#include <stdlib.h>
#include <string.h>

size_t window_room(const struct window *w)
{
    return WINDOW_MAX - (size_t)(w->end - w->acked);
}

// Rings of the first size, kept for the next command: to map and unmap one costs as much as a short command's output.
#define FIRST_CAP 65536
#define SPARE_MAX 4
static uint8_t *spare[SPARE_MAX];
static unsigned n_spare;

static uint8_t *ring_new(size_t cap)
{
    return cap == FIRST_CAP && n_spare > 0 ? spare[--n_spare] : malloc(cap);
}

static void ring_free(uint8_t *data, size_t cap)
{
    if (data && cap == FIRST_CAP && n_spare < SPARE_MAX)
        spare[n_spare++] = data;
    else
        free(data);
}

// Doubles the ring; the kept bytes move to their places in the larger one.
static bool grow(struct window *w)
{
    const size_t cap = w->cap ? 2 * w->cap : FIRST_CAP;
    if (cap > WINDOW_MAX)
        return false;
    uint8_t *data = ring_new(cap);
    if (!data)
        return false;
    for (uint64_t at = w->acked; at < w->end;) {
        const size_t from = (size_t)(at & (w->cap - 1)), to = (size_t)(at & (cap - 1));
        size_t n = (size_t)(w->end - at);
        n = n < w->cap - from ? n : w->cap - from;
        n = n < cap - to ? n : cap - to;
        memcpy(data + to, w->data + from, n);
        at += n;
    }
    ring_free(w->data, w->cap);
    w->data = data;
    w->cap = cap;
    return true;
}

uint8_t *window_space(struct window *w, size_t want, size_t *ret_n)
{
    *ret_n = 0;
    size_t room = w->cap - (size_t)(w->end - w->acked);
    if (room == 0) {
        if (!grow(w))
            return NULL;
        room = w->cap - (size_t)(w->end - w->acked);
    }
    const size_t at = (size_t)(w->end & (w->cap - 1));
    size_t n = room < w->cap - at ? room : w->cap - at;
    *ret_n = n < want ? n : want;
    return w->data + at;
}

void window_added(struct window *w, size_t n)
{
    w->end += n;
}

const uint8_t *window_unsent(const struct window *w, size_t *ret_n)
{
    *ret_n = 0;
    if (w->sent == w->end)
        return NULL;
    const size_t at = (size_t)(w->sent & (w->cap - 1)), have = (size_t)(w->end - w->sent);
    *ret_n = have < w->cap - at ? have : w->cap - at;
    return w->data + at;
}

void window_ack(struct window *w, uint64_t offset)
{
    if (offset > w->end || offset <= w->acked)
        return;
    w->acked = offset;
    if (w->sent < offset)
        w->sent = offset;
    if (w->acked == w->end && w->cap > FIRST_CAP)
        window_free(w);
}

void window_rewind(struct window *w, uint64_t offset)
{
    window_ack(w, offset);
    w->sent = offset > w->end ? w->end : offset < w->acked ? w->acked : offset;
}

void window_free(struct window *w)
{
    ring_free(w->data, w->cap);
    w->data = NULL;
    w->cap = 0;
}
