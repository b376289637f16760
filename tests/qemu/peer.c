#include "peer.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// ---- notes ----------------------------------------------------------------------------------------------------------
void notes_init(struct notes *n)
{
    pthread_condattr_t attr;
    memset(n, 0, sizeof *n);
    buf_init(&n->text, 1 << 20);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&n->lock, NULL);
    pthread_cond_init(&n->added, &attr);
    pthread_condattr_destroy(&attr);
}

void notes_free(struct notes *n)
{
    buf_free(&n->text);
    pthread_cond_destroy(&n->added);
    pthread_mutex_destroy(&n->lock);
}

void notes_add(struct notes *n, const char *fmt, ...)
{
    char line[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    pthread_mutex_lock(&n->lock);
    buf_adds(&n->text, line);
    buf_adds(&n->text, "\n");
    pthread_cond_broadcast(&n->added);
    pthread_mutex_unlock(&n->lock);
}

// The next line into out; false when none came in time.
static bool next_line(struct notes *n, char *out, size_t cap)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PEER_MS / 1000;
    int waited = 0;
    pthread_mutex_lock(&n->lock);
    while (n->read == n->text.len && waited == 0)
        waited = pthread_cond_timedwait(&n->added, &n->lock, &until);
    const bool there = n->read < n->text.len;
    if (there) {
        const char *at = buf_text(&n->text) + n->read;
        const size_t len = strcspn(at, "\n");
        snprintf(out, cap, "%.*s", (int)len, at);
        n->read += len + 1;
    }
    pthread_mutex_unlock(&n->lock);
    return there;
}

void notes_expect(struct notes *n, const char *line)
{
    char got[512];
    if (!next_line(n, got, sizeof got))
        fail_msg("nothing came, expected: %s", line);
    assert_string_equal(got, line);
}

void notes_until(struct notes *n, const char *line)
{
    char got[512];
    do
        if (!next_line(n, got, sizeof got))
            fail_msg("it never came: %s", line);
    while (strcmp(got, line) != 0);
}

char *notes_rest(struct notes *n)
{
    pthread_mutex_lock(&n->lock);
    char *rest = strdup(buf_text(&n->text) + n->read);
    n->read = n->text.len;
    pthread_mutex_unlock(&n->lock);
    return rest;
}

// ---- the loop -------------------------------------------------------------------------------------------------------
struct loop *loop_running(void)
{
    struct err err = {0};
    struct loop *l = loop_new(&err);
    assert_non_null(l);
    assert_int_equal(loop_start(l, "test", &err), 0);
    return l;
}

struct call {
    loop_fn fn;
    void *arg;
    pthread_mutex_t lock;
    pthread_cond_t done_cond;
    bool done;
};

static void run_call(void *arg)
{
    struct call *c = arg;
    c->fn(c->arg);
    pthread_mutex_lock(&c->lock);
    c->done = true;
    pthread_cond_signal(&c->done_cond);
    pthread_mutex_unlock(&c->lock);
}

void loop_call(struct loop *l, loop_fn fn, void *arg)
{
    struct call c = {fn, arg, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
    assert_int_equal(loop_post(l, run_call, &c), 0);
    pthread_mutex_lock(&c.lock);
    while (!c.done)
        pthread_cond_wait(&c.done_cond, &c.lock);
    pthread_mutex_unlock(&c.lock);
    pthread_mutex_destroy(&c.lock);
    pthread_cond_destroy(&c.done_cond);
}

static void nothing(void *arg)
{
    (void)arg;
}

void loop_settle(struct loop *l)
{
    for (int i = 0; i < 3; i++)
        loop_call(l, nothing, NULL);
}

// ---- the guest's end ------------------------------------------------------------------------------------------------
void peer_init(struct peer *p, int fd_stolen)
{
    p->fd = fd_stolen;
    assert_int_equal(frame_parser_init(&p->in, FRAME_SIDE_GUEST, NULL), 0);
}

void peer_free(struct peer *p)
{
    fd_close(&p->fd);
    frame_parser_free(&p->in);
}

static void wait_for(int fd, short events)
{
    struct pollfd w = {.fd = fd, .events = events};
    int n;
    do
        n = poll(&w, 1, PEER_MS);
    while (n < 0 && errno == EINTR);
    if (n != 1)
        fail_msg("the other end did nothing for %d ms", PEER_MS);
}

enum frame_event peer_next(struct peer *p, struct frame *f)
{
    for (;;) {
        const enum frame_event e = frame_parser_next(&p->in, f);
        if (e != FRAME_NEED_MORE)
            return e;
        size_t cap;
        uint8_t *to = frame_parser_space(&p->in, &cap);
        wait_for(p->fd, POLLIN);
        const ssize_t n = recv(p->fd, to, cap, MSG_DONTWAIT);
        if (n <= 0)
            fail_msg("the connection ended where a frame was expected");
        frame_parser_fed(&p->in, (size_t)n);
    }
}

void peer_expect(struct peer *p, uint8_t type, struct frame *f)
{
    assert_int_equal(peer_next(p, f), FRAME_GOT);
    assert_int_equal(f->type, type);
}

void peer_send(struct peer *p, const void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        wait_for(p->fd, POLLOUT);
        const ssize_t n = send(p->fd, (const char *)data + done, len - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            continue;
        assert_true(n > 0);
        done += (size_t)n;
    }
}

void peer_preamble(struct peer *p, const uint8_t nonce[FRAME_NONCE_BYTES])
{
    peer_send(p, FRAME_MAGIC, FRAME_MAGIC_BYTES);
    peer_send(p, nonce, FRAME_NONCE_BYTES);
}

void peer_frame(struct peer *p, uint8_t type, uint8_t flags, uint64_t id, const void *data, size_t len)
{
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, type, flags, id, (uint32_t)len);
    peer_send(p, h, sizeof h);
    peer_send(p, data, len);
}

void peer_expect_end(struct peer *p)
{
    char c;
    wait_for(p->fd, POLLIN);
    const ssize_t n = recv(p->fd, &c, 1, MSG_DONTWAIT);
    assert_true(n == 0 || (n < 0 && errno == ECONNRESET));
}
