// sse.h - server-sent events, pull-based: a source makes a bounded text when the last one was taken, and nothing is kept
// while there is nothing to say. Owns framing, comments, the end by token or shutdown.
#ifndef AIRLOCK_API_SSE_H
#define AIRLOCK_API_SSE_H

#include "api/call.h"

#define SSE_TEXT_MAX (48u << 10) // a source stops adding past SSE_TEXT_ENOUGH, one event may be that much more
#define SSE_TEXT_ENOUGH (16u << 10)

enum sse_more { SSE_WAIT, SSE_AGAIN, SSE_END };

struct sse_source {
    // Appends events to out; on the pool. SSE_AGAIN: there is more right away; SSE_END: this is all.
    enum sse_more (*produce)(void *state, struct api_call *c, struct buf *out);
    void (*free)(void *state);
};

// Answers with the stream. state is taken (freed by the source's free). key: of the hub, copied.
void sse_reply(struct api_call *c, const struct sse_source *source, void *state, const char *key);
// One event; data is stolen.
void sse_event(struct buf *out, const char *event, int64_t id, json_t *data);

#endif
