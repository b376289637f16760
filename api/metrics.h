// metrics.h - counters and latencies by operation and status, as Prometheus text. Owns the counters. Any thread; counting
// is a few relaxed additions.
#ifndef AIRLOCK_API_METRICS_H
#define AIRLOCK_API_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

struct metrics;
struct spec;

struct metrics *metrics_new(size_t n_operations);
void metrics_free(struct metrics *m); // accepts NULL
// index: operation, or n_operations for requests without one. status 0: the client went away before the answer.
void metrics_count(struct metrics *m, size_t index, int status, int64_t us);
void metrics_render(const struct metrics *m, struct spec *spec, struct buf *out);

#endif
