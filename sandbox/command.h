// command.h - commands of a sandbox: run, watch, feed, signal; their output lives in spools. Owns the life of a command
// from admission to settled receipt, across restarts of the server. Threads as in manager.h.
#ifndef AIRLOCK_SANDBOX_COMMAND_H
#define AIRLOCK_SANDBOX_COMMAND_H

#include "sandbox/manager.h"
#include "store/spool.h"

struct command_request {
    const json_t *argv;        // array of strings, or NULL with shell
    const char *shell;
    const char *cwd;           // NULL: default
    const json_t *env;         // object or NULL
    const char *user;          // "sandbox" or another name; root needs its scope (checked by api)
    const char *stdin_text;    // NULL: none
    size_t stdin_len;
    bool stdin_open;           // background commands: fed later by command_stdin
    int64_t timeout_ms;
    int64_t max_output_bytes;
    bool background, check;
    // Archive transfers: not listed, output not spooled but handed over. Private to sandbox/.
    bool internal, make_dir;
    bool tell_started;         // `admitted` is waited for; else it may come with the end only
};

struct command_callbacks {
    // Durable, and the guest says that it runs (or says nothing for a second): what is acknowledged now is still there
    // after a kill -9. Once, before done; not when admission failed.
    void (*admitted)(void *arg, const char *command_id, const char *job_id);
    // Finished and durable (row borrowed), or admission failed (row NULL, err).
    void (*done)(void *arg, const struct command_row *row, const struct err *err);
    void *arg;
};
// env_denied, sandbox_not_running, too_many_commands, spawn_failed (422 guest_command_failed) … come through done.
// A finished command with check and a non-zero result is settled as failed (guest_command_failed) but done gets the row.
int command_run(struct manager *m, const char *sandbox_id, const struct command_request *r, const struct admission *a,
                int success_status, const struct command_callbacks *cb);

// A copy of the present row (live or stored). 0, or -1 not_found. command_row_free it.
int command_info(struct manager *m, const char *tenant, const char *sandbox_id, const char *id, struct command_row *ret,
                 struct err *err);

// Bytes for the command's stdin at offset (must be where the last ended: conflict/stdin_offset; -1: append). async:
// done(arg, accepted_total, err) once the bytes were handed to the agent's window (bounded: waits for credit).
int command_stdin(struct manager *m, const char *sandbox_id, const char *id, const void *data, size_t len,
                  int64_t offset, bool eof, const struct admission *a, int success_status,
                  void (*done)(void *arg, int64_t total, const struct err *err), void *arg);
// name without SIG ("TERM"). conflict/not_running when finished. async.
int command_signal(struct manager *m, const char *sandbox_id, const char *id, const char *name, const struct admission *a,
                   int success_status, void (*done)(void *arg, const struct err *err), void *arg);
int command_signal_number(const char *name);       // -1: none such
const char *command_signal_name(int number);       // "KILL"; NULL

// A reader over the spool (live or finished, also of destroyed sandboxes). New, or NULL. News: hub key = command id.
struct spool_reader *command_output(struct manager *m, const char *tenant, const char *sandbox_id, const char *id,
                                    struct err *err);

#endif
