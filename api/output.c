// Positions and tails. The `id` of an event is a position q in arrival order. What a client that saw q has of one stream
// is: all bytes of it before q, but for a tail of at most 3 bytes that begin a code point whose rest comes later. The tail
// follows from the bytes before q alone, so that a resumed stream continues exactly: nothing twice, nothing lost.
#include "api/output.h"

#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/view.h"
#include "base/enc.h"
#include "base/fd.h"
#include "sandbox/command.h"

#define PIECE_MAX 4096
#define TAIL_MAX 3

struct output {
    struct spool_reader *reader;
    uint64_t position;
    int8_t only;
    bool started;          // the `started` event went out (or is not due)
    bool placed;           // end[] and tails are known
    uint8_t tail_len[2];
    uint8_t tail[2][TAIL_MAX];
    uint64_t end[2];       // bytes of each stream before position
    char sandbox_id[ID_MAX], command_id[ID_MAX];
};

static const char *const NAMES[2] = {"stdout", "stderr"};

static void chunk_event(struct buf *out, int stream, uint64_t offset, const uint8_t *data, size_t len, uint64_t id)
{
    json_t *j = json_object();
    const bool utf8 = enc_utf8_valid(data, len);
    json_put_str(j, "stream", NAMES[stream]);
    json_put_int(j, "offset", (int64_t)offset);
    json_put_str(j, "encoding", utf8 ? "utf8" : "base64");
    if (utf8) {
        json_put(j, "data", json_stringn_nocheck((const char *)data, len));
    } else {
        CLEANUP_BUF struct buf text = BUF_INIT(len / 3 * 4 + 8);
        enc_base64(&text, data, len);
        json_put(j, "data", json_stringn_nocheck(buf_text(&text), text.len));
    }
    sse_event(out, NAMES[stream], (int64_t)id, j);
}

void output_piece(struct output *o, enum spool_stream stream, uint64_t offset, const uint8_t *data, size_t len,
                  uint64_t position, struct buf *out)
{
    uint8_t whole[TAIL_MAX + PIECE_MAX];
    const size_t before = o->tail_len[stream];
    memcpy(whole, o->tail[stream], before);
    memcpy(whole + before, data, len);
    size_t cut = enc_utf8_cut(whole, before + len);
    if (before + len - cut > TAIL_MAX)
        cut = before + len;
    o->tail_len[stream] = (uint8_t)(before + len - cut);
    memcpy(o->tail[stream], whole + cut, o->tail_len[stream]);
    o->end[stream] = offset + len;
    if (cut > 0 && (o->only < 0 || o->only == (int)stream))
        chunk_event(out, stream, offset - before, whole, cut, position);
}

// The tail that the bytes before `end` leave.
static void find_tail(struct output *o, enum spool_stream stream, uint64_t end)
{
    uint8_t last[TAIL_MAX];
    struct err err = {0};
    const uint64_t n = end < TAIL_MAX ? end : TAIL_MAX;
    o->end[stream] = end;
    o->tail_len[stream] = 0;
    if (n == 0 || spool_read(o->reader, stream, end - n, last, n, &err) != (int64_t)n)
        return;
    const size_t cut = enc_utf8_cut(last, n);
    o->tail_len[stream] = (uint8_t)(n - cut);
    memcpy(o->tail[stream], last + cut, n - cut);
}

static void place(struct output *o, uint64_t position, enum spool_stream stream, uint64_t offset)
{
    o->placed = true;
    find_tail(o, stream, offset);
    find_tail(o, stream == SPOOL_STDOUT ? SPOOL_STDERR : SPOOL_STDOUT, position - offset);
}

struct output *output_new(struct api_call *c, const char *sandbox_id, const char *command_id, int only,
                          uint64_t position, struct err *err)
{
    struct output *o = calloc(1, sizeof *o);
    if (!o) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    o->only = (int8_t)only;
    o->position = position;
    o->started = position > 0;
    o->placed = position == 0;
    memcpy(o->sandbox_id, sandbox_id, sizeof o->sandbox_id);
    memcpy(o->command_id, command_id, sizeof o->command_id);
    o->reader = command_output(c->a->manager, c->who->row.tenant, sandbox_id, command_id, err);
    if (!o->reader) {
        free(o);
        return NULL;
    }
    uint8_t byte;
    uint64_t probe = position, offset;
    enum spool_stream stream;
    struct err past = {0};
    if (position > 0 && spool_next(o->reader, &probe, &stream, &offset, &byte, 1, &past) < 0) {
        err_set(err, ERR_VALIDATION, "", "the position lies past the end of the output");
        output_free(o);
        return NULL;
    }
    return o;
}

void output_free(void *arg)
{
    struct output *o = arg;
    if (!o)
        return;
    spool_reader_close(o->reader);
    free(o);
}

// ---- the end --------------------------------------------------------------------------------------------------------
// Code points that were never completed, what was not kept, and the exit.
static void say_end(struct output *o, const struct command_row *row, struct buf *out)
{
    const uint64_t spooled[2] = {(uint64_t)row->stdout_spooled, (uint64_t)row->stderr_spooled};
    const uint64_t produced[2] = {(uint64_t)row->stdout_bytes, (uint64_t)row->stderr_bytes};
    for (int s = 0; s < 2; s++) {
        if (o->only >= 0 && o->only != s)
            continue;
        if (!o->placed)
            find_tail(o, s ? SPOOL_STDERR : SPOOL_STDOUT, spooled[s]);
        if (o->tail_len[s] > 0)
            chunk_event(out, s, spooled[s] - o->tail_len[s], o->tail[s], o->tail_len[s], o->position);
        if (produced[s] > spooled[s]) {
            json_t *gap = json_object();
            json_put_str(gap, "stream", NAMES[s]);
            json_put_int(gap, "offset", (int64_t)spooled[s]);
            json_put_int(gap, "bytes", (int64_t)(produced[s] - spooled[s]));
            sse_event(out, "gap", (int64_t)o->position, gap);
        }
    }
    sse_event(out, "exit", (int64_t)o->position, view_command_exit(row));
}

static enum sse_more read_pieces(struct output *o, struct buf *out)
{
    uint8_t piece[PIECE_MAX];
    struct err err = {0};
    while (out->len < SSE_TEXT_ENOUGH) {
        enum spool_stream stream;
        uint64_t offset, at = o->position;
        const int64_t n = spool_next(o->reader, &at, &stream, &offset, piece, sizeof piece, &err);
        if (n <= 0)
            return n < 0 ? SSE_END : SSE_WAIT;
        if (!o->placed)
            place(o, at - (uint64_t)n, stream, offset);
        o->position = at;
        output_piece(o, stream, offset, piece, (size_t)n, at, out);
    }
    return SSE_AGAIN;
}

static enum sse_more produce(void *state, struct api_call *c, struct buf *out)
{
    struct output *o = state;
    struct command_row row = {0};
    struct err err = {0};
    // The row is looked at before the spool: once it says finished, the spool is whole.
    if (command_info(c->a->manager, c->who->row.tenant, o->sandbox_id, o->command_id, &row, &err) != 0)
        return SSE_END;
    if (!o->started) {
        o->started = true;
        sse_event(out, "started", 0, view_command_started(&row));
    }
    enum sse_more more = read_pieces(o, out);
    if (more == SSE_WAIT && row.phase == COMMAND_FINISHED) {
        say_end(o, &row, out);
        more = SSE_END;
    }
    command_row_free(&row);
    return more;
}

const struct sse_source OUTPUT_SOURCE = {produce, output_free};
