// For tests of what a restart does: ends the process at a named stage, as kill -9 would. Built only where asked for.
#include "sandbox/internal.h"

#include "sandbox/crash.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// journal: the VM runs and no row knows of it. claim: the row knows of a pooled VM whose directory is not its own yet.
// commit: before the outcome is durable. end: after it, before the answer. settle: what an earlier server left is undone or
// finished, but its job is not.
const char *const CRASH_STAGES[] = {
    "create.prepare", "create.launch", "create.journal", "create.claim", "create.restore", "create.agent", "create.commit",
    "create.end",
    "start.prepare", "start.launch", "start.journal", "start.agent", "start.commit", "start.end",
    "stop.shutdown", "stop.commit", "stop.end",
    "delete.erase", "delete.commit", "delete.end",
    "pause.pause", "pause.commit", "pause.end",
    "snapshot.freeze", "snapshot.stop", "snapshot.save", "snapshot.copy", "snapshot.cont", "snapshot.disk", "snapshot.write",
    "snapshot.commit", "snapshot.end",
    "snapshot_delete.erase", "snapshot_delete.commit", "snapshot_delete.end",
    "fork.freeze", "fork.stop", "fork.save", "fork.copy", "fork.cont", "fork.disk", "fork.prepare", "fork.launch", "fork.journal",
    "fork.restore", "fork.agent", "fork.commit", "fork.end",
    "cold.freeze", "cold.stop", "cold.save", "cold.copy", "cold.cont", "cold.disk", "cold.write", "cold.commit", "cold.end",
    "resume.resume", "resume.prepare", "resume.launch", "resume.journal", "resume.restore", "resume.agent",
    "resume.commit", "resume.end",
    "template.warm", "template.save", "template.write",
    "adopt.settle", NULL,
};

#ifdef AIRLOCK_CRASH_POINTS
void crash_point(struct sandbox *s, const char *stage)
{
    const char *at = getenv("AIRLOCK_CRASH_AT");
    char here[64];
    if (!at)
        return;
    if (s)
        pthread_mutex_lock(&s->lock);
    snprintf(here, sizeof here, "%s%s%s", s && s->ops ? s->ops->name : "", s ? "." : "", stage);
    if (s)
        pthread_mutex_unlock(&s->lock);
    if (strcmp(at, here) != 0)
        return;
    dprintf(STDERR_FILENO, "ends at %s\n", here); // for a test that wants to know that it was here
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
