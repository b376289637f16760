// channel.h - the host's side of one agent port: connect, preamble, parser, bounded sending. Owns its socket. The loop's
// thread connects, reads and closes; channel_send may be called from any thread. What frames mean is vm.c's business.
#ifndef AIRLOCK_QEMU_CHANNEL_H
#define AIRLOCK_QEMU_CHANNEL_H

#include <pthread.h>

#include "base/buf.h"
#include "base/loop.h"
#include "proto/frame.h"

struct channel;

struct channel_callbacks {
    void (*frame)(void *arg, struct channel *c, const struct frame *f);
    void (*lost)(void *arg, struct channel *c, const char *why); // closed; connect again when you like
};

struct channel {
    struct loop *loop;
    const struct channel_callbacks *cb;
    void *arg;
    int fd;
    struct loop_watch *watch;
    struct frame_parser parser;
    pthread_mutex_t lock;      // fd for writing, tx
    bool up;                   // others than the hello may be sent
    struct buf tx;
    size_t tx_done;            // bytes of tx already written
    size_t tx_limit;           // bytes of tx that may be written; SIZE_MAX: all. Less: frozen
    bool want_write, post_pending;
    bool held;                 // not read
    uint64_t frames_in, frames_out, violations;
};

void channel_init(struct channel *c, struct loop *loop, size_t tx_max, const struct channel_callbacks *cb, void *arg);
// Takes a connected, non-blocking socket; sends preamble and hello, and behind it `first`: whole frames that need not wait for
// the answer, or NULL. Loop thread. 0, or -1.
int channel_open(struct channel *c, int fd_stolen, const struct buf *hello, const struct buf *first);
void channel_up(struct channel *c, bool up);
void channel_close(struct channel *c);   // loop thread
void channel_destroy(struct channel *c); // closed before
void channel_hold(struct channel *c, bool hold); // loop thread
// Header, then head and data. 0, -1 no session, -2 the bounded queue is full.
int channel_send(struct channel *c, uint8_t type, uint8_t flags, uint64_t id, const void *head, size_t head_len,
                 const void *data, size_t len);

// Sends one last frame; what is sent after it waits, within the queue's bound, until thaw. 0, or as channel_send. Any
// thread.
int channel_freeze(struct channel *c, uint8_t type, uint64_t id);
void channel_thaw(struct channel *c);

// Bytes that channel_send still takes. Grows behind the caller's back only, where senders exclude each other.
size_t channel_room(struct channel *c);

#endif
