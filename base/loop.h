// loop.h - one epoll thread: descriptors, timers, and work posted from other threads. Owns the thread and its
// tables; does not own the descriptors it watches. loop_post from any thread; everything else from the loop's
// own thread (callbacks run there) or before loop_start. Callbacks never block.
#ifndef AIRLOCK_BASE_LOOP_H
#define AIRLOCK_BASE_LOOP_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct loop;
struct loop_timer;
struct loop_watch;

typedef void (*loop_fn)(void *arg);
typedef void (*loop_fd_fn)(void *arg, uint32_t events); // EPOLLIN, EPOLLOUT, EPOLLHUP …

struct loop *loop_new(struct err *err);
int loop_start(struct loop *l, const char *thread_name, struct err *err);
void loop_stop(struct loop *l);   // joins; posted work that has not run is run first
void loop_free(struct loop *l);   // accepts NULL

// Runs fn(arg) on the loop's thread, in order of posting. -1 only when out of memory.
int loop_post(struct loop *l, loop_fn fn, void *arg);
bool loop_is_current(const struct loop *l);

// Level-triggered. Removing is safe inside any callback: no event of a removed watch is delivered after it.
struct loop_watch *loop_watch_add(struct loop *l, int fd, uint32_t events, loop_fd_fn fn, void *arg);
int loop_watch_set(struct loop_watch *w, uint32_t events);
void loop_watch_remove(struct loop_watch *w); // accepts NULL

// One shot after delay_ms (monotonic). Cancelling is safe inside any callback; a timer that fired is gone.
struct loop_timer *loop_timer_add(struct loop *l, int64_t delay_ms, loop_fn fn, void *arg);
void loop_timer_cancel(struct loop_timer *t); // accepts NULL

#endif
