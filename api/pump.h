// pump.h - looking again: runs a step of a call on the work pool whenever there is news (hub), time (timer), a reader that
// wants more, or an end. Steps of one call never overlap. Owns the waiting; the step decides.
#ifndef AIRLOCK_API_PUMP_H
#define AIRLOCK_API_PUMP_H

#include "api/call.h"

enum pump_next { PUMP_WAIT, PUMP_DONE };

struct pump {
    struct api_call *c;          // a reference
    struct hub_waiter *waiter;
    const char *key;             // of the hub; lives as long as the call
    struct timer timer;
    atomic_uint signals;
    // Registered with the hub before each step, so that no news is lost. Not on the adapter's or the hub's thread.
    enum pump_next (*step)(struct pump *p);
};

// Begins: the first step runs soon. 0, or -1 when out of memory. key NULL: no hub.
int pump_start(struct api_call *c, const char *key, enum pump_next (*step)(struct pump *p));
void pump_signal(struct pump *p);                  // any thread; under c->lock where p might just end
void pump_after(struct pump *p, int64_t delay_ms); // in a step: look again then, whatever happens
bool pump_gone(struct pump *p);                    // the client left

#endif
