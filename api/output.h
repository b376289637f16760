// output.h - a command's output as events: where a position is in both streams, and text that never splits a code point.
// Owns the reader and what a stream still owes. Used by one stream at a time, on the work pool.
#ifndef AIRLOCK_API_OUTPUT_H
#define AIRLOCK_API_OUTPUT_H

#include "api/sse.h"
#include "store/spool.h"

struct output;
extern const struct sse_source OUTPUT_SOURCE;

// only: -1 both streams, else an enum spool_stream. position: go on after this one. NULL with err: not_found, or
// validation for a position past the end.
struct output *output_new(struct api_call *c, const char *sandbox_id, const char *command_id, int only,
                          uint64_t position, struct err *err);
void output_free(void *output);

// Exposed for tests: appends one piece's events. position is the one after the piece.
void output_piece(struct output *o, enum spool_stream stream, uint64_t offset, const uint8_t *data, size_t len,
                  uint64_t position, struct buf *out);

#endif
