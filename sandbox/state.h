// state.h - the states of a sandbox, the moves between them, and the invariant; pure.
//
//   (create) ---> starting ---> running <---> paused
//                    ^  |          |  |          |
//            (start) |  |          |  +--> stopping ---> stopped ---> starting (boots from its disk)
//                    |  v          v                        ^
//                 stopped       cold <---> restoring        |  (the guest shut down, the host rebooted)
//                       |                                   |
//                       +--> failed <--- (VM died) --- starting, running, paused, stopping, restoring
//                              |
//                              +--> starting (boots from its disk, where there is one)
//
//   cold ---> stopped (its ttl, with on_expiry stop), failed (a delete that left files)
//   every state ---> destroyed (delete wins)
//
// Invariant: a VM (struct vm) exists only in starting, running, paused, stopping and restoring; destroyed is final.
#ifndef AIRLOCK_SANDBOX_STATE_H
#define AIRLOCK_SANDBOX_STATE_H

#include "base/sm.h"

enum sandbox_state { // stored: pinned
    SANDBOX_STARTING = 1, SANDBOX_RUNNING = 2, SANDBOX_PAUSED = 3, SANDBOX_COLD = 4, SANDBOX_RESTORING = 5,
    SANDBOX_STOPPING = 6, SANDBOX_STOPPED = 7, SANDBOX_FAILED = 8, SANDBOX_DESTROYED = 9,
};
#define SANDBOX_STATES 10 // index 0 is unused

extern const struct sm_state SANDBOX_STATE_TABLE[SANDBOX_STATES];

const char *sandbox_state_name(int state);      // "running"
int sandbox_state_parse(const char *name);      // -1: none such
bool sandbox_state_has_vm(int state);

#endif
