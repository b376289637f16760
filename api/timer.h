// timer.h - deadlines of calls: one thread, a heap of embedded timers. Owns the thread, not the timers. Any thread may add
// and cancel; functions run on the timer thread and only hand over (wake, submit).
#ifndef AIRLOCK_API_TIMER_H
#define AIRLOCK_API_TIMER_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct timers;

struct timer { // embedded in its user; zeroed: not armed
    int64_t due_ms;
    size_t slot;                 // 1 + place in the heap; 0: not armed
    void (*fn)(void *arg);
    void *arg;
};

struct timers *timers_new(struct err *err);
void timers_free(struct timers *ts);   // joins; nothing may be armed any more; accepts NULL

// Arms t (again: moves it). 0, or -1 when out of memory.
int timers_add(struct timers *ts, struct timer *t, int64_t delay_ms, void (*fn)(void *arg), void *arg);
// After it returns fn is not running and will not run. Never from within fn.
void timers_cancel(struct timers *ts, struct timer *t);

#endif
