// peer.h - what the tests of this room share: the guest's end of a socket, notes that callbacks leave and tests wait for,
// and calls on the loop's thread. Nothing waits longer than PEER_MS; what is late fails the test.
#ifndef AIRLOCK_TESTS_QEMU_PEER_H
#define AIRLOCK_TESTS_QEMU_PEER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>

#include "base/buf.h"
#include "base/fd.h"
#include "base/loop.h"
#include "proto/frame.h"
#include "proto/msg.h"

#define PEER_MS 30000

// ---- notes: one line each, from any thread --------------------------------------------------------------------------
struct notes {
    pthread_mutex_t lock;
    pthread_cond_t added;
    struct buf text;
    size_t read;        // what the test has seen
};
void notes_init(struct notes *n);
void notes_free(struct notes *n);
void notes_add(struct notes *n, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
// Waits for the next line and compares it.
void notes_expect(struct notes *n, const char *line);
// Waits until this line comes, passing over others.
void notes_until(struct notes *n, const char *line);
// Lines that nobody has asked for yet; new text.
char *notes_rest(struct notes *n);

// ---- the loop -------------------------------------------------------------------------------------------------------
struct loop *loop_running(void);
// fn(arg) on the loop's thread; returns when it has run.
void loop_call(struct loop *l, loop_fn fn, void *arg);
// Two turns: what was readable before has been read after it.
void loop_settle(struct loop *l);

// ---- the guest's end ------------------------------------------------------------------------------------------------
struct peer {
    int fd;
    struct frame_parser in;
};
void peer_init(struct peer *p, int fd_stolen);
void peer_free(struct peer *p);
// The next event but FRAME_NEED_MORE. f is valid until the next call.
enum frame_event peer_next(struct peer *p, struct frame *f);
// A frame must come next, of this type.
void peer_expect(struct peer *p, uint8_t type, struct frame *f);
void peer_send(struct peer *p, const void *data, size_t len);
void peer_preamble(struct peer *p, const uint8_t nonce[FRAME_NONCE_BYTES]);
void peer_frame(struct peer *p, uint8_t type, uint8_t flags, uint64_t id, const void *data, size_t len);
// The host's end must be closed, with nothing more to read.
void peer_expect_end(struct peer *p);

#endif
