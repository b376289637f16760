// transfer.h - a file operation under way, shared by files.c (calls, reads, writes) and archive.c. All fields under
// sandbox.lock where not said otherwise.
#ifndef AIRLOCK_SANDBOX_TRANSFER_H
#define AIRLOCK_SANDBOX_TRANSFER_H

#include "sandbox/internal.h"

#define FILE_DEADLINE_MS 30000 // without any sign of the guest
#define RING_BYTES VM_WINDOW_BYTES

enum transfer_kind { TRANSFER_CALL, TRANSFER_READ, TRANSFER_WRITE };

// A ring that is allocated with the first byte. head and tail only grow; tail - head <= RING_BYTES.
struct ring {
    uint8_t *data;
    uint64_t head, tail;
};

struct transfer {
    struct act act;              // first: act callbacks cast back
    struct transfer *next;
    struct sandbox *s;           // reference
    enum transfer_kind kind;
    uint64_t id;                 // of the frames; 0 until sent
    atomic_int refs;             // the client's handle, and the operation itself
    bool listed, over;           // over: the guest has answered or will not; err says how
    bool client_gone;            // no callbacks any more
    struct err err;
    struct buf request;          // encoded FILE message, until sent
    int64_t deadline_ms;
    uint64_t bytes;              // moved so far
    struct sha256 *hash;         // of what was moved
    char path_digest[SHA256_HEX];

    // CALL
    void (*call_done)(void *arg, const struct msg_file_result *result, bool last, const struct err *err);
    void *call_arg;
    struct msg_file_result *held; // result of an act with a receipt, until it is settled

    // READ
    struct file_read_callbacks read_cb;
    struct ring ring;
    bool info_told, eof;
    uint64_t credited;

    // WRITE
    struct file_write_callbacks write_cb;
    bool opened, finish_wanted, finished;
    bool blocked;                // the channel was full
    uint64_t sent, credit;
    struct file_write_result result;

    // Archives: the guest's tar behind it.
    struct command *tar;         // set while it runs
    bool archive;
};

struct transfer *transfer_new(struct manager *m, enum transfer_kind kind, const char *sandbox_id,
                              const struct admission *a, int status, struct err *err);
void transfer_unref(struct transfer *t);
void transfer_list_locked(struct transfer *t);
void transfer_unlist_locked(struct transfer *t);
// Ends the act (settles or notes) once; err NULL: it went well. Not under the lock.
void transfer_end(struct transfer *t, const struct err *err);
void transfer_abort_locked(struct transfer *t);            // the guest is told to give it up
void transfer_write_finish_locked(struct transfer *t);     // files.c: its end is sent when there is room
void transfer_refusal(const struct msg_file_result *r, struct err *err); // leaves err alone where it is none
size_t ring_put(struct ring *r, const uint8_t *data, size_t len);
size_t ring_take(struct ring *r, uint8_t *out, size_t cap);
void transfer_facts(struct transfer *t);

// archive.c
void archive_credit_locked(struct transfer *t);           // READ: acknowledge what was taken
size_t archive_write_locked(struct transfer *t, const uint8_t *data, size_t len);
void archive_finish_locked(struct transfer *t);
void archive_stop_locked(struct transfer *t);             // the client went away: end tar

#endif
