// The two virtio-serial ports. A write never blocks: what does not fit waits in a bounded queue.
#include "guest/agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TX_MAX (2u << 20)

struct port control_port = {.fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER};
struct port bulk_port = {.fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER};

static bool has_name(const char *device, const char *name)
{
    char path[320], text[64] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", device);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
    if (fd >= 0)
        close(fd);
    return n > 0 && strncmp(text, name, strlen(name)) == 0 && (text[strlen(name)] == '\n' || text[strlen(name)] == 0);
}

static int find_port(const char *name)
{
    DIR *d = opendir("/sys/class/virtio-ports");
    int fd = -1;
    if (!d)
        return -1;
    for (const struct dirent *e; fd < 0 && (e = readdir(d));)
        if (e->d_name[0] != '.' && has_name(e->d_name, name)) {
            char path[300];
            snprintf(path, sizeof path, "/dev/%.255s", e->d_name);
            fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
        }
    closedir(d);
    return fd;
}

int port_open(struct port *p, const char *name, uint64_t which)
{
    p->which = which;
    // The name comes by a control message after the device: normally there at the first or second look.
    for (int i = 0; i < 20000 && (p->fd = find_port(name)) < 0; i++)
        usleep(500);
    return p->fd >= 0 ? frame_parser_init(&p->parser, FRAME_SIDE_GUEST, NULL) : -1;
}

void port_reset(struct port *p)
{
    pthread_mutex_lock(&p->lock);
    p->tx_start = p->tx_end = 0;
    p->up = false;
    pthread_mutex_unlock(&p->lock);
}

static bool reserve(struct port *p, size_t more)
{
    if (p->tx_start == p->tx_end)
        p->tx_start = p->tx_end = 0;
    if (p->tx_end + more <= p->tx_cap)
        return true;
    if (p->tx_start > 0) {
        memmove(p->tx, p->tx + p->tx_start, p->tx_end - p->tx_start);
        p->tx_end -= p->tx_start;
        p->tx_start = 0;
        if (p->tx_end + more <= p->tx_cap)
            return true;
    }
    if (p->tx_end + more > TX_MAX)
        return false;
    size_t cap = p->tx_cap ? p->tx_cap : 131072;
    while (cap < p->tx_end + more)
        cap *= 2;
    uint8_t *tx = realloc(p->tx, cap);
    if (!tx)
        return false;
    p->tx = tx;
    p->tx_cap = cap;
    return true;
}

static void append(struct port *p, const void *data, size_t len)
{
    if (len)
        memcpy(p->tx + p->tx_end, data, len);
    p->tx_end += len;
}

static bool flush_locked(struct port *p)
{
    while (p->tx_start < p->tx_end) {
        const ssize_t n = write(p->fd, p->tx + p->tx_start, p->tx_end - p->tx_start);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p->tx_start += (size_t)n;
    }
    return true;
}

bool port_flush(struct port *p)
{
    pthread_mutex_lock(&p->lock);
    const bool empty = flush_locked(p);
    pthread_mutex_unlock(&p->lock);
    return empty;
}

bool port_idle(struct port *p)
{
    pthread_mutex_lock(&p->lock);
    const bool idle = p->up && p->tx_start == p->tx_end;
    pthread_mutex_unlock(&p->lock);
    return idle;
}

bool port_send(struct port *p, uint8_t type, uint8_t flags, uint64_t id, const void *head, size_t head_len,
               const void *data, size_t len)
{
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, type, flags, id, (uint32_t)(head_len + len));
    pthread_mutex_lock(&p->lock);
    const bool fits = (p->up || type == FRAME_HELLO_REPLY) && reserve(p, sizeof h + head_len + len);
    if (fits) {
        append(p, h, sizeof h);
        append(p, head, head_len);
        append(p, data, len);
        (void)flush_locked(p);
    }
    pthread_mutex_unlock(&p->lock);
    return fits;
}

bool port_send_buf(struct port *p, uint8_t type, uint8_t flags, uint64_t id, const struct buf *payload)
{
    return port_send(p, type, flags, id, payload ? payload->data : NULL, payload ? payload->len : 0, NULL, 0);
}

void port_preamble(struct port *p, const uint8_t nonce[FRAME_NONCE_BYTES])
{
    pthread_mutex_lock(&p->lock);
    if (reserve(p, FRAME_PREAMBLE_BYTES)) {
        append(p, FRAME_MAGIC, FRAME_MAGIC_BYTES);
        append(p, nonce, FRAME_NONCE_BYTES);
    }
    pthread_mutex_unlock(&p->lock);
}

void port_log(const char *fmt, ...)
{
    char text[512];
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (n > 0)
        port_send(&control_port, FRAME_LOG, 0, 0, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1, NULL, 0);
}
