// fileop.h - a file operation under way, shared by fileop.c (queue, streams) and fileact.c (what is done to files, with
// the user's credentials).
#ifndef AIRLOCK_GUEST_FILEOP_H
#define AIRLOCK_GUEST_FILEOP_H

#include "guest/agent.h"

#define CHUNK_BYTES (FRAME_DATA_MAX - MSG_DATA_HEADER)

struct chunk {
    struct chunk *next;
    uint64_t offset;
    size_t len;
    bool last;
    uint8_t data[];
};

struct fileop {
    struct fileop *next;         // all of them
    struct fileop *next_work;    // in the queue of the file threads
    uint64_t id;
    uint64_t op;                 // enum msg_file_op
    char *path, *to;
    struct user user;
    unsigned mode;
    bool mkdirs, recursive, exclusive;
    uint64_t offset, length, depth, max_entries;
    // Under file_lock.
    bool queued, working, aborted, done, opened;
    bool gathers;                // WRITE: has content that no thread was woken for yet
    struct chunk *in, *in_last;  // WRITE: received
    size_t in_bytes;
    uint64_t in_end;             // WRITE: where the next content begins
    struct chunk *out, *out_last; // READ: to send
    uint64_t credit;             // READ: consumed by the host. WRITE: what the host was told
    // Of the file thread that works on it.
    int fd, dirfd;
    char temporary[48], name[256];
    bool existed;
    unsigned old_mode;
    uint64_t at;                 // bytes read or written
    uint64_t end;                // READ: where the range ends, UINT64_MAX for the file's end
};

void fileact_credentials(const struct user *u);
// Each returns an enum msg_file_status; errno says more.
int fileact_simple(struct fileop *op, struct msg_file_result *r); // STAT, DELETE, MOVE, DIR_MAKE, CHECK_WRITE
int fileact_list(struct fileop *op, bool (*emit)(struct fileop *, const struct msg_file_result *, bool last));
int fileact_open_read(struct fileop *op, struct msg_file_result *r);
int fileact_open_write(struct fileop *op);
int fileact_commit(struct fileop *op, struct msg_file_result *r);
void fileact_discard(struct fileop *op);                           // closes, removes the temporary file
int fileact_status(int code);                                       // from errno

#endif
