// crash.h - the places where a test build can be told to end, for `airlock doctor --stages`. Any thread.
#ifndef AIRLOCK_SANDBOX_CRASH_H
#define AIRLOCK_SANDBOX_CRASH_H

#include <stdbool.h>

extern const char *const CRASH_STAGES[]; // "<operation>.<stage>", NULL at the end
bool crash_points_built(void);           // AIRLOCK_CRASH_AT has an effect

#endif
