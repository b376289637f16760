// command_int.h - a live command, shared by command.c (requests), command_life.c (what the guest says, the outcome) and
// command_io.c (output to its spool). All fields under sandbox.lock where not said otherwise.
#ifndef AIRLOCK_SANDBOX_COMMAND_INT_H
#define AIRLOCK_SANDBOX_COMMAND_INT_H

#include "proto/frame.h"
#include "sandbox/internal.h"

// A piece of output as it came, waiting for the spool.
struct piece {
    struct piece *next;
    uint64_t offset;
    uint32_t len;
    uint8_t stream;              // enum spool_stream
    uint8_t data[];
};

#define REDACT_TAIL 64

struct command {
    struct command *next;
    struct sandbox *s;           // borrowed: the sandbox outlives its commands
    struct command_row row;      // changes only before it is listed, and by the outcome
    struct admission a;
    int success_status;
    struct command_callbacks cb;
    struct buf run;              // the encoded RUN, until it is sent
    bool listed, sent, exited, finishing;
    bool known;                  // the guest said that it has it: what goes by the other port is not ahead of its RUN
    bool durable;                // admitted, and so recorded
    enum { TOLD_NOTHING, TELLING, TOLD } told; // cb.admitted
    bool concluded;              // the outcome is recorded; cb.done waits for the end of TELLING
    int64_t sent_ms;             // monotonic
    unsigned seen;               // session in which the agent is known to hold it
    // Outcome as the agent told it.
    uint64_t total[2];
    int64_t exit_seen_ms;        // monotonic
    int64_t retry_at_ms;         // the outcome could not be kept: again then
    // Output: received → spooled (durable). `tail` holds bytes that may become a secret.
    uint64_t recv[2], spooled[2];
    uint8_t tail[2][REDACT_TAIL];
    size_t tail_len[2];
    unsigned carry[2];           // redact.h
    struct piece *pending, *pending_last;
    bool io_busy, redacted;      // redacted: of the io job alone
    struct spool *spool;         // of the io job alone
    // Standard input.
    char *inline_stdin;          // kept until the guest took it
    size_t inline_len;
    uint64_t stdin_sent, stdin_credit;
    bool stdin_eof_sent;
    struct stdin_call *stdin_call; // at most one waits for credit
    struct transfer *archive;    // output and stdin are a client's stream instead of a spool; reference
    bool aborted;                // the client of the archive went away
    // The outcome's transaction.
    struct change change;
    struct job_row job;
    json_t *facts;
    char *problem;
    struct err err;
};

struct command *command_by_agent_id(struct sandbox *s, uint64_t id);  // under lock
struct command *command_by_id(struct sandbox *s, const char *id);     // under lock
void command_free(struct command *c);
void command_try_finish_locked(struct command *c);
void command_finish_locked(struct command *c, enum command_outcome outcome);
// Sends what stdin may go within the window. Under lock.
void command_feed_locked(struct command *c);
void stdin_call_end(struct command *c, const struct err *err);        // under lock; takes c->stdin_call
// archive.c: under lock; true where the client is to be woken after the unlock.
bool archive_output_locked(struct command *c, const struct msg_data *d);
// The command behind an archive has ended or was refused (c->err): tells the client. Not under the lock.
void archive_finished(struct command *c);
// The guest has the command: a transfer to wake after the unlock, or NULL.
struct transfer *archive_known_locked(struct command *c);
void archive_fill_row(struct command *c);
struct transfer *archive_ref(struct command *c);
void archive_wake(struct transfer *t);                   // drops the reference
// Encodes RUN. 0, or -1.
int command_encode(struct command *c, const struct command_request *r, const char *sandbox_env_json, struct err *err);
// Lists, journals and starts c (taken); answers by c->cb.
void command_launch(struct command *c, const struct command_request *r);
struct command *command_new(struct sandbox *s, const struct command_request *r, const struct admission *a, int status,
                            struct err *err);

// A live sandbox and a command of it that runs; NULL with the refusal otherwise. A reference.
struct sandbox *command_find(struct manager *m, const char *tenant, const char *sandbox_id, const char *id,
                             bool *ret_running, struct err *err);

#endif
