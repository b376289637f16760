// sm.h - the state-machine engine: a table of allowed moves, one function that moves and asserts. Knows no
// sandbox; each user keeps drawing, enum, table and invariant side by side in its own file. Any thread under the
// user's lock.
#ifndef AIRLOCK_BASE_SM_H
#define AIRLOCK_BASE_SM_H

#include <stdbool.h>
#include <stddef.h>

struct sm_state {
    const char *name;        // wire word
    unsigned allowed;        // bit n set: a move to state n is allowed
    bool final;
};

struct sm {
    const struct sm_state *states;
    size_t n_states;
    int state;
};

void sm_init(struct sm *m, const struct sm_state *states, size_t n_states, int initial);
bool sm_can(const struct sm *m, int to);
// Moves; a move that the table forbids is refused: returns false, state unchanged (callers treat it as a bug or
// a lost race, and say so).
bool sm_move(struct sm *m, int to);
const char *sm_name(const struct sm_state *states, size_t n_states, int state);
int sm_parse(const struct sm_state *states, size_t n_states, const char *name); // -1: no such state

#endif
