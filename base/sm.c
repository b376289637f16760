#include "base/sm.h"

#include <string.h>

void sm_init(struct sm *m, const struct sm_state *states, size_t n_states, int initial)
{
    *m = (struct sm){states, n_states, initial};
}

bool sm_can(const struct sm *m, int to)
{
    return m->state >= 0 && (size_t)m->state < m->n_states && to >= 0 && (size_t)to < m->n_states &&
           (m->states[m->state].allowed >> to & 1u);
}

bool sm_move(struct sm *m, int to)
{
    if (!sm_can(m, to))
        return false;
    m->state = to;
    return true;
}

const char *sm_name(const struct sm_state *states, size_t n_states, int state)
{
    return state >= 0 && (size_t)state < n_states && states[state].name ? states[state].name : "unknown";
}

int sm_parse(const struct sm_state *states, size_t n_states, const char *name)
{
    for (size_t i = 0; i < n_states; i++)
        if (states[i].name && strcmp(states[i].name, name) == 0)
            return (int)i;
    return -1;
}
