// files.h - files of a guest through its agent: everything is streamed in bounded windows, decided in the guest.
// Threads as in manager.h; handles are used by one request at a time, from any thread.
#ifndef AIRLOCK_SANDBOX_FILES_H
#define AIRLOCK_SANDBOX_FILES_H

#include "proto/msg.h"
#include "sandbox/manager.h"

// Calls without a stream: stat, delete, move, list, mkdir. result is borrowed; for DIR_LIST it comes in pieces
// (last false … true). err: not_found, policy_denied/path_outside_roots|permission_denied, validation/path_invalid|
// not_a_regular_file …, conflict/exists|not_empty, timeout/agent, transport_failed. With a->receipt_id set the act is
// admitted before and settled after (done comes after that); with a->audit_id alone an audit entry follows in a group.
struct file_call {
    struct msg_file msg;       // op, path, user …; slices borrowed until file_call returns
    const char *sandbox_id;
};
int file_call(struct manager *m, const struct file_call *call, const struct admission *a, int success_status,
              void (*done)(void *arg, const struct msg_file_result *result, bool last, const struct err *err), void *arg);

// ---- reading --------------------------------------------------------------------------------------------------
struct file_read;
struct file_read_callbacks {
    // First: size and so on (err NULL), or the refusal (result NULL) after which nothing comes.
    void (*info)(void *arg, const struct msg_file_result *result, const struct err *err);
    void (*readable)(void *arg); // more to take, or the end: call file_read_take until 0
    void *arg;
};
// Range: offset and length (0: to the end). sandbox_id, path and user are copied.
struct file_read *file_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                  const char *user, uint64_t offset, uint64_t length, const struct admission *a,
                                  int success_status, const struct file_read_callbacks *cb, struct err *err);
// Bytes copied, 0: nothing now, -1: end of content, -2: broke (the client's connection must be cut).
int64_t file_read_take(struct file_read *r, void *out, size_t cap);
// Ends in any state: settles the receipt (aborted when not at the end) with the bytes taken. No callback afterwards.
void file_read_end(struct file_read *r);

// ---- writing --------------------------------------------------------------------------------------------------
struct file_write_result {
    uint64_t bytes;
    char sha256[DIGEST_TEXT_MAX];
    bool created;
};
struct file_write;
struct file_write_callbacks {
    void (*writable)(void *arg);   // room in the window again
    // Once, after finish or a failure; durable. status for the receipt: 201 created, 200 replaced.
    void (*done)(void *arg, const struct file_write_result *result, const struct err *err);
    void *arg;
};
struct file_write_options {
    const char *user;
    unsigned mode;
    bool mkdirs, exclusive;
};
struct file_write *file_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                    const struct file_write_options *o, const struct admission *a,
                                    const struct file_write_callbacks *cb, struct err *err);
// Bytes accepted (0: wait for writable), -1: failed (done tells or has told why).
int64_t file_write_push(struct file_write *w, const void *data, size_t len);
void file_write_finish(struct file_write *w);
// The client went away: the old file stays; settles as aborted. done is still called.
void file_write_abort(struct file_write *w);
void file_write_free(struct file_write *w);       // after done

// ---- archives: tar streams made and read by the guest's tar, as the guest user ----------------------------------
struct file_read *archive_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                     const char *user, const struct admission *a, int success_status,
                                     const struct file_read_callbacks *cb, struct err *err);
struct file_write *archive_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                       const struct file_write_options *o, const struct admission *a,
                                       const struct file_write_callbacks *cb, struct err *err);

#endif
