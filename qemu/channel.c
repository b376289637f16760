#include "qemu/channel.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/crypto.h"
#include "base/fd.h"

#define READ_PER_WAKE (1u << 20) // so that one flooding guest leaves the loop to the others

void channel_init(struct channel *c, struct loop *loop, size_t tx_max, const struct channel_callbacks *cb, void *arg)
{
    *c = (struct channel){.loop = loop, .cb = cb, .arg = arg, .fd = -1, .tx_limit = SIZE_MAX};
    pthread_mutex_init(&c->lock, NULL);
    buf_init(&c->tx, tx_max);
}

void channel_destroy(struct channel *c)
{
    buf_free(&c->tx);
    frame_parser_free(&c->parser);
    pthread_mutex_destroy(&c->lock);
}

// ---- writing ------------------------------------------------------------------------------------------------------
static void drop_done(struct channel *c)
{
    if (c->tx_done == c->tx.len)
        buf_clear(&c->tx);
    else
        buf_consume(&c->tx, c->tx_done);
    if (c->tx_limit != SIZE_MAX)
        c->tx_limit -= c->tx_done;
    c->tx_done = 0;
}

// True when everything is written that may be. Under the lock.
static bool flush_locked(struct channel *c)
{
    const size_t end = c->tx.len < c->tx_limit ? c->tx.len : c->tx_limit;
    while (c->tx_done < end) {
        const ssize_t n = send(c->fd, c->tx.data + c->tx_done, end - c->tx_done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break;
        c->tx_done += (size_t)n;
    }
    const bool all = c->tx_done == end;
    if (c->tx_done == c->tx.len || c->tx_done > 256 << 10)
        drop_done(c);
    return all;
}

static uint32_t events_of(const struct channel *c)
{
    return (c->held ? 0u : (uint32_t)EPOLLIN) | (c->want_write ? (uint32_t)EPOLLOUT : 0u);
}

static void rearm(void *arg)
{
    struct channel *c = arg;
    pthread_mutex_lock(&c->lock);
    c->post_pending = false;
    c->want_write = c->fd >= 0 && !flush_locked(c);
    pthread_mutex_unlock(&c->lock);
    if (c->watch)
        loop_watch_set(c->watch, events_of(c));
}

// With `freeze` nothing that is sent later goes out before channel_thaw.
static int send_frame(struct channel *c, uint8_t type, uint8_t flags, uint64_t id, const void *head, size_t head_len,
                      const void *data, size_t len, bool freeze)
{
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, type, flags, id, (uint32_t)(head_len + len));
    struct iovec iov[3] = {{h, sizeof h}, {(void *)head, head_len}, {(void *)data, len}};
    const size_t total = sizeof h + head_len + len;
    pthread_mutex_lock(&c->lock);
    if (c->fd < 0 || !c->up) {
        pthread_mutex_unlock(&c->lock);
        return -1;
    }
    if (c->tx.len - c->tx_done + total > c->tx.max) {
        pthread_mutex_unlock(&c->lock);
        return -2;
    }
    size_t done = 0;
    if (c->tx.len == 0 && c->tx_limit == SIZE_MAX) {
        const struct msghdr m = {.msg_iov = iov, .msg_iovlen = 3};
        const ssize_t n = sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        done = n > 0 ? (size_t)n : 0;
    }
    if (c->tx_done > 0 && c->tx.len + total > c->tx.max)
        drop_done(c);
    for (int i = 0; i < 3; i++) {
        const size_t skip = done < iov[i].iov_len ? done : iov[i].iov_len;
        done -= skip;
        if (iov[i].iov_len > skip)
            (void)buf_add(&c->tx, (const uint8_t *)iov[i].iov_base + skip, iov[i].iov_len - skip);
    }
    c->frames_out++;
    const bool post = c->tx.len > c->tx_done && c->tx_limit == SIZE_MAX && !c->post_pending && !c->want_write;
    if (freeze)
        c->tx_limit = c->tx.len;
    if (post)
        c->post_pending = true;
    pthread_mutex_unlock(&c->lock);
    if (post && loop_post(c->loop, rearm, c) != 0)
        return -2;
    return 0;
}

int channel_send(struct channel *c, uint8_t type, uint8_t flags, uint64_t id, const void *head, size_t head_len,
                 const void *data, size_t len)
{
    return send_frame(c, type, flags, id, head, head_len, data, len, false);
}

int channel_freeze(struct channel *c, uint8_t type, uint64_t id)
{
    return send_frame(c, type, 0, id, NULL, 0, NULL, 0, true);
}

void channel_thaw(struct channel *c)
{
    pthread_mutex_lock(&c->lock);
    c->tx_limit = SIZE_MAX;
    const bool post = c->fd >= 0 && c->tx.len > c->tx_done && !c->post_pending;
    c->post_pending |= post;
    pthread_mutex_unlock(&c->lock);
    if (post && loop_post(c->loop, rearm, c) != 0) {
        pthread_mutex_lock(&c->lock);
        c->post_pending = false; // the next frame tries again
        pthread_mutex_unlock(&c->lock);
    }
}

size_t channel_room(struct channel *c)
{
    pthread_mutex_lock(&c->lock);
    const size_t room = c->tx.max - (c->tx.len - c->tx_done);
    pthread_mutex_unlock(&c->lock);
    return room;
}

// ---- reading ------------------------------------------------------------------------------------------------------
static void lose(struct channel *c, const char *why)
{
    channel_close(c);
    c->cb->lost(c->arg, c, why);
}

// False when the channel is gone.
static bool parse(struct channel *c)
{
    struct frame f;
    for (;;) {
        switch (frame_parser_next(&c->parser, &f)) {
        case FRAME_NEED_MORE:
            return true;
        case FRAME_GOT:
            c->frames_in++;
            c->cb->frame(c->arg, c, &f);
            if (c->fd < 0)
                return false;
            break;
        case FRAME_SYNCED:
        case FRAME_RESET:
            break;
        case FRAME_VIOLATION:
            c->violations++;
            lose(c, "the guest broke the protocol");
            return false;
        }
    }
}

static void on_readable(struct channel *c)
{
    for (size_t total = 0; total < READ_PER_WAKE;) {
        size_t cap;
        uint8_t *to = frame_parser_space(&c->parser, &cap);
        const ssize_t n = recv(c->fd, to, cap, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            lose(c, "the connection was closed");
            return;
        }
        frame_parser_fed(&c->parser, (size_t)n);
        total += (size_t)n;
        if (!parse(c) || c->held)
            return;
    }
}

static void on_event(void *arg, uint32_t events)
{
    struct channel *c = arg;
    if (events & EPOLLOUT)
        rearm(c);
    if (c->fd >= 0 && !c->held && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        on_readable(c);
    else if (c->fd >= 0 && (events & (EPOLLHUP | EPOLLERR)))
        lose(c, "the connection broke");
}

void channel_hold(struct channel *c, bool hold)
{
    c->held = hold;
    if (c->watch)
        loop_watch_set(c->watch, events_of(c));
}

// ---- opening ------------------------------------------------------------------------------------------------------
int channel_open(struct channel *c, int fd_stolen, const struct buf *hello, const struct buf *first)
{
    uint8_t nonce[FRAME_NONCE_BYTES], h[FRAME_HEADER_BYTES];
    if (crypto_random(nonce, sizeof nonce) != 0) {
        close(fd_stolen);
        return -1;
    }
    frame_parser_free(&c->parser);
    if (frame_parser_init(&c->parser, FRAME_SIDE_HOST, nonce) != 0) {
        close(fd_stolen);
        return -1;
    }
    frame_header(h, FRAME_HELLO, 0, 0, (uint32_t)hello->len);
    pthread_mutex_lock(&c->lock);
    c->fd = fd_stolen;
    c->up = false;
    buf_clear(&c->tx);
    c->tx_done = 0;
    c->tx_limit = SIZE_MAX;
    (void)buf_add(&c->tx, FRAME_MAGIC, FRAME_MAGIC_BYTES);
    (void)buf_add(&c->tx, nonce, sizeof nonce);
    (void)buf_add(&c->tx, h, sizeof h);
    (void)buf_add(&c->tx, hello->data, hello->len);
    if (first)
        (void)buf_add(&c->tx, first->data, first->len);
    c->want_write = !flush_locked(c);
    pthread_mutex_unlock(&c->lock);
    c->watch = loop_watch_add(c->loop, c->fd, events_of(c), on_event, c);
    if (c->watch)
        return 0;
    channel_close(c);
    return -1;
}

void channel_up(struct channel *c, bool up)
{
    pthread_mutex_lock(&c->lock);
    c->up = up;
    pthread_mutex_unlock(&c->lock);
}

void channel_close(struct channel *c)
{
    loop_watch_remove(c->watch);
    c->watch = NULL;
    pthread_mutex_lock(&c->lock);
    fd_close(&c->fd);
    c->up = false;
    buf_free(&c->tx);
    c->tx_done = 0;
    c->tx_limit = SIZE_MAX;
    c->want_write = false;
    pthread_mutex_unlock(&c->lock);
}
