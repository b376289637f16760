// carry.h - commands that run at the moment of a snapshot: which they are, how far their output is kept, and their
// continuation in a fork under ids of their own. Within the room.
#ifndef AIRLOCK_SANDBOX_CARRY_H
#define AIRLOCK_SANDBOX_CARRY_H

#include "sandbox/internal.h"

struct carried {
    struct command_row row;      // as it was
    uint64_t spooled[2];         // bytes of its streams that are kept
    bool there;                  // still listed when the guest stood still
};
struct carry {
    struct carried v[LIMIT_COMMANDS_RUNNING + 1];
    size_t n;
};
// The commands whose RUN was sent: under sandbox.lock, together with the freeze.
void carry_sent_locked(struct sandbox *s, struct carry *c);
// Of a VM that is paused already.
void carry_all(struct sandbox *s, struct carry *c);
// How far each has come: while the guest stands still.
void carry_offsets(struct sandbox *s, struct carry *c);
json_t *carry_json(const struct carry *c);      // array for a manifest; new
void carry_free(struct carry *c);

// Copies what is kept of each command's output from one `out` directory to another, under the same ids.
int carry_spools(int from_dirfd, int to_dirfd, const json_t *commands, struct err *err);

// A fork's own commands: rows with new ids, admissions of their own. For one transaction, then for the registry.
struct continued {
    struct command_row row;
    struct admission a;
    struct job_row job;
    json_t *facts;
};
// Prepares n rows (array new, *ret_n) for child s and copies their spools from from_dirfd (`out` of the source or snapshot).
int carry_prepare(struct sandbox *s, const struct admission *by, const json_t *commands, int from_dirfd,
                  struct continued **ret, size_t *ret_n, struct err *err);
int carry_insert(struct store_tx *tx, const struct continued *c, size_t n, struct err *err);
// Lists them in s before its agent's session begins: what the agent knows goes on, what it does not is lost.
int carry_list(struct sandbox *s, struct continued *c, size_t n, struct err *err);
void carry_discard(struct continued *c, size_t n);

#endif
