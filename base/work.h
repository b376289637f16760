// work.h - a fixed pool of threads with a bounded queue, for straight-line work that may block. Owns its
// threads. Any thread may submit.
#ifndef AIRLOCK_BASE_WORK_H
#define AIRLOCK_BASE_WORK_H

#include <stddef.h>

#include "base/err.h"

struct work_pool;
typedef void (*work_fn)(void *arg);

// At most `threads` threads, started on need; at most max_queued waiting items.
struct work_pool *work_pool_new(const char *name, unsigned threads, size_t max_queued, struct err *err);
// -1 when the queue is full or the pool is ending: the caller answers `unavailable`.
int work_submit(struct work_pool *p, work_fn fn, void *arg);
// Starts all threads and has each run fn once, before anything else is submitted: what a thread opens for good is then
// there from the start. Waits at most two seconds for them.
void work_pool_warm(struct work_pool *p, work_fn fn, void *arg);
void work_pool_free(struct work_pool *p); // runs what is queued, joins; accepts NULL
size_t work_pool_queued(struct work_pool *p);

#endif
