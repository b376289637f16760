#include "sandbox/state.h"

#define TO(s) (1u << SANDBOX_##s)

// The table of allowed moves; the drawing is in state.h. Every state may move to destroyed: delete wins.
const struct sm_state SANDBOX_STATE_TABLE[SANDBOX_STATES] = {
    [0] = {"none", TO(STARTING), false},
    [SANDBOX_STARTING] = {"starting", TO(RUNNING) | TO(FAILED) | TO(STOPPED) | TO(DESTROYED), false},
    [SANDBOX_RUNNING] = {"running",
                         TO(PAUSED) | TO(COLD) | TO(STOPPING) | TO(STOPPED) | TO(FAILED) | TO(DESTROYED), false},
    [SANDBOX_PAUSED] = {"paused",
                        TO(RUNNING) | TO(COLD) | TO(STOPPING) | TO(STOPPED) | TO(FAILED) | TO(DESTROYED), false},
    [SANDBOX_COLD] = {"cold", TO(RESTORING) | TO(STOPPED) | TO(FAILED) | TO(DESTROYED), false}, // stopped: its ttl; failed: files left
    [SANDBOX_RESTORING] = {"restoring", TO(RUNNING) | TO(COLD) | TO(FAILED) | TO(DESTROYED), false},
    [SANDBOX_STOPPING] = {"stopping", TO(STOPPED) | TO(FAILED) | TO(DESTROYED), false},
    [SANDBOX_STOPPED] = {"stopped", TO(STARTING) | TO(FAILED) | TO(DESTROYED), false},
    [SANDBOX_FAILED] = {"failed", TO(STARTING) | TO(DESTROYED), false},
    [SANDBOX_DESTROYED] = {"destroyed", 0, true},
};

const char *sandbox_state_name(int state)
{
    return sm_name(SANDBOX_STATE_TABLE, SANDBOX_STATES, state);
}

int sandbox_state_parse(const char *name)
{
    const int state = sm_parse(SANDBOX_STATE_TABLE, SANDBOX_STATES, name);
    return state == 0 ? -1 : state;
}

bool sandbox_state_has_vm(int state)
{
    return state == SANDBOX_STARTING || state == SANDBOX_RUNNING || state == SANDBOX_PAUSED ||
           state == SANDBOX_STOPPING || state == SANDBOX_RESTORING;
}
