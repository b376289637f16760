// For tests of what a restart does: ends the process at a named stage, as kill -9 would. Built only where asked for.
#include "sandbox/internal.h"

#include "sandbox/crash.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const CRASH_STAGES[] = {
    "create.prepare", "create.launch", "create.restore", "create.agent", "create.commit",
    "snapshot.freeze", "snapshot.stop", "snapshot.save", "snapshot.copy", "snapshot.cont", "snapshot.disk", "snapshot.write",
    "snapshot.commit", "snapshot.end",
    "fork.freeze", "fork.stop", "fork.save", "fork.copy", "fork.cont", "fork.disk", "fork.prepare", "fork.launch", "fork.restore",
    "fork.agent", "fork.commit",
    "cold.freeze", "cold.stop", "cold.save", "cold.copy", "cold.cont", "cold.disk", "cold.write", "cold.commit", "cold.end",
    "resume.prepare", "resume.launch", "resume.restore", "resume.agent", "resume.commit",
    "pause.pause", "resume.resume", NULL,
};

#ifdef AIRLOCK_CRASH_POINTS
void crash_point(struct sandbox *s, const char *stage)
{
    const char *at = getenv("AIRLOCK_CRASH_AT");
    char here[64];
    if (!at)
        return;
    pthread_mutex_lock(&s->lock);
    snprintf(here, sizeof here, "%s.%s", s->ops ? s->ops->name : "none", stage);
    pthread_mutex_unlock(&s->lock);
    if (strcmp(at, here) == 0)
        (void)kill(getpid(), SIGKILL);
}

bool crash_points_built(void)
{
    return true;
}
#else
bool crash_points_built(void)
{
    return false;
}
#endif
