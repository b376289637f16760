// unfinished.h - admissions and jobs that an earlier server did not bring to their end, and how they are ended. Does not know
// what became of the sandboxes. Within the room; workers, and pending_load before any.
#ifndef AIRLOCK_SANDBOX_UNFINISHED_H
#define AIRLOCK_SANDBOX_UNFINISHED_H

#include "sandbox/internal.h"

// Admissions, by receipt; pending_take (internal.h) hands one out.
int pending_load(struct manager *m, struct err *err);
// Settles what nothing can settle any more as lost: file operations, signals, stdin.
void pending_lose(struct manager *m);

struct unfinished {
    struct job_row *rows;        // own their texts
    size_t n;
};
bool unfinished_add(struct unfinished *u, const struct job_row *row); // copies; false when out of memory
int unfinished_of(const struct sandbox *s, struct unfinished *to, struct err *err);
struct job_row *unfinished_kind(struct unfinished *u, const char *kind); // borrows; NULL for none
void unfinished_free(struct unfinished *u);

// The admission of a job; one of our own where the earlier one was settled or is unknown.
void job_admission(struct manager *m, const struct job_row *job, struct admission *a);
// Ends a job whose act is known to have become `outcome`.
void job_settle(struct manager *m, struct job_row *job, const struct admission *a, enum job_state state, const char *outcome,
                const struct err *why, int status);
// Ends a job that nothing goes on with: undone, or lost where nobody knows.
void job_give_up(struct manager *m, struct job_row *job);

#endif
