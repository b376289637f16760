// libmicrohttpd behind api.h. Each exchange is in one of three moods under its lock: running in the library's thread,
// suspended, or woken while it ran; a wake-up may come from any thread at any time and is never lost.
#include "server/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/limits.h"
#include "base/log.h"

#define CONNECTION_MEMORY (24u << 10)  // bounds request line and headers; a follower costs about this
#define STREAM_BLOCK 8192
#define FILE_BLOCK (64u << 10)
#define FIRST_REQUEST_MS 20000         // from connect to the first complete request line
#define KEEP_ALIVE_MS 75000
#define BODY_GRACE_MS 30000            // after it, a body must come with at least BODY_RATE bytes a second
#define BODY_RATE 256
#define DESCRIPTORS_KEPT 512           // of RLIMIT_NOFILE, for VMs, files and the store

enum phase { PHASE_IDLE, PHASE_HEADERS, PHASE_BODY, PHASE_ANSWER };

// One TCP connection, in the list of all for the deadlines.
struct conn {
    struct conn *next, **prev;
    int fd;
    enum phase phase;
    bool seen_request, waiting_for_us;
    bool end_seen; // the last sweep found the client's end and nothing to read before it
    int64_t since_ms;
    uint64_t body_bytes;
};

struct http {
    struct MHD_Daemon *daemon;
    struct api *api;
    unsigned port;
    int listen_fd;
    pthread_mutex_t lock;          // conns
    struct conn *conns;
    pthread_t sweeper;
    pthread_mutex_t sweep_lock;
    pthread_cond_t sweep_cond;
    bool stopping, sweeping;
};

// One request and its answer.
struct exchange {
    struct http *h;
    struct MHD_Connection *connection;
    struct conn *conn;
    pthread_mutex_t lock;
    bool suspended, woken;
    struct api_call *call;
    char *uri;                     // raw, as on the wire
    const char *method;
    bool begun, has_body, body_ended, queued;
    uint64_t discarded;
    int64_t t0_us;
};

// ---- deadlines ----------------------------------------------------------------------------------------------------
static void conn_phase(struct exchange *x, enum phase phase)
{
    if (!x->conn)
        return;
    pthread_mutex_lock(&x->h->lock);
    x->conn->phase = phase;
    x->conn->seen_request = true;
    x->conn->since_ms = clock_mono_ms();
    x->conn->body_bytes = 0;
    pthread_mutex_unlock(&x->h->lock);
}

static bool overdue(const struct conn *c, int64_t now)
{
    const int64_t age = now - c->since_ms;
    switch (c->phase) {
    case PHASE_IDLE:
        return age > (c->seen_request ? KEEP_ALIVE_MS : FIRST_REQUEST_MS);
    case PHASE_HEADERS:
        return age > LIMIT_HEADER_SECONDS * 1000;
    case PHASE_BODY:
        return !c->waiting_for_us && age > BODY_GRACE_MS && c->body_bytes < (uint64_t)age / 1000 * BODY_RATE;
    case PHASE_ANSWER:
        return false; // a slow reader costs one bounded buffer
    }
    return false;
}

// The library, on an edge-triggered epoll, stops reading at a short read: a client's end that arrived together with
// its last bytes is never seen. Two looks, so that the library has had its turn.
static bool left_unseen(struct conn *c)
{
    char byte;
    const bool ended = c->phase == PHASE_BODY && !c->waiting_for_us &&
                       recv(c->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
    const bool again = ended && c->end_seen;
    c->end_seen = ended;
    return again;
}

static void *sweep(void *arg)
{
    struct http *h = arg;
    pthread_mutex_lock(&h->sweep_lock);
    while (!h->stopping) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 1;
        pthread_cond_timedwait(&h->sweep_cond, &h->sweep_lock, &until);
        const int64_t now = clock_mono_ms();
        pthread_mutex_lock(&h->lock);
        for (struct conn *c = h->conns; c; c = c->next)
            if (overdue(c, now) || left_unseen(c)) {
                shutdown(c->fd, SHUT_RDWR); // the library sees the end and closes
                c->since_ms = now;
            }
        pthread_mutex_unlock(&h->lock);
    }
    pthread_mutex_unlock(&h->sweep_lock);
    return NULL;
}

static void on_connection(void *cls, struct MHD_Connection *connection, void **socket_context,
                          enum MHD_ConnectionNotificationCode code)
{
    struct http *h = cls;
    struct conn *c = *socket_context;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        c = calloc(1, sizeof *c);
        if (!c || !info)
            return;
        c->fd = info->connect_fd;
        c->since_ms = clock_mono_ms();
        pthread_mutex_lock(&h->lock);
        c->next = h->conns;
        c->prev = &h->conns;
        if (c->next)
            c->next->prev = &c->next;
        h->conns = c;
        pthread_mutex_unlock(&h->lock);
        *socket_context = c;
    } else if (c) {
        pthread_mutex_lock(&h->lock);
        *c->prev = c->next;
        if (c->next)
            c->next->prev = c->prev;
        pthread_mutex_unlock(&h->lock);
        free(c);
        *socket_context = NULL;
    }
}

// ---- waiting and waking ---------------------------------------------------------------------------------------------
static void wake(void *arg)
{
    struct exchange *x = arg;
    pthread_mutex_lock(&x->lock);
    if (x->suspended) {
        x->suspended = false;
        MHD_resume_connection(x->connection);
    } else {
        x->woken = true;
    }
    pthread_mutex_unlock(&x->lock);
}

// False when a wake-up came meanwhile: look again instead of waiting.
static bool suspend(struct exchange *x)
{
    pthread_mutex_lock(&x->lock);
    const bool wait = !x->woken;
    x->woken = false;
    if (wait) {
        x->suspended = true;
        MHD_suspend_connection(x->connection);
    }
    pthread_mutex_unlock(&x->lock);
    return wait;
}

// ---- answering ----------------------------------------------------------------------------------------------------
static ssize_t read_stream(void *cls, uint64_t pos, char *buf, size_t max)
{
    struct exchange *x = cls;
    (void)pos;
    for (;;) {
        const int64_t n = api_stream_read(x->call, buf, max);
        if (n > 0)
            return (ssize_t)n;
        if (n == -1)
            return MHD_CONTENT_READER_END_OF_STREAM;
        if (n < 0)
            return MHD_CONTENT_READER_END_WITH_ERROR;
        if (suspend(x))
            return 0;
    }
}

static ssize_t read_nothing(void *cls, uint64_t pos, char *buf, size_t max)
{
    (void)cls, (void)pos, (void)buf, (void)max;
    return MHD_CONTENT_READER_END_OF_STREAM;
}

static struct MHD_Response *make_response(struct exchange *x, const struct api_response *r)
{
    if (r->head)
        return MHD_create_response_from_callback(r->body_len, 1024, read_nothing, NULL, NULL);
    if (!r->stream)
        return MHD_create_response_from_buffer(r->body_len, (void *)r->body, MHD_RESPMEM_MUST_COPY);
    const uint64_t size = r->stream_len < 0 ? MHD_SIZE_UNKNOWN : (uint64_t)r->stream_len;
    return MHD_create_response_from_callback(size, r->stream_len < 0 ? STREAM_BLOCK : FILE_BLOCK, read_stream, x, NULL);
}

static enum MHD_Result queue(struct exchange *x, const struct api_response *r)
{
    struct MHD_Response *m = make_response(x, r);
    if (!m)
        return MHD_NO;
    for (size_t i = 0; i < r->n_headers; i++)
        MHD_add_response_header(m, r->headers[i].name, r->headers[i].value);
    if (x->discarded > 0)
        MHD_add_response_header(m, MHD_HTTP_HEADER_CONNECTION, "close");
    const enum MHD_Result ok = MHD_queue_response(x->connection, (unsigned)r->status, m);
    MHD_destroy_response(m);
    x->queued = true;
    conn_phase(x, PHASE_ANSWER);
    return ok;
}

// What HTTP itself forbids and the library lets through.
static enum MHD_Result refuse(struct exchange *x, unsigned status, const char *detail)
{
    char text[400];
    const int n = snprintf(text, sizeof text,
                           "{\"type\":\"urn:airlock:problem:validation\",\"title\":\"Bad request\",\"status\":%u,"
                           "\"detail\":\"%s\",\"kind\":\"validation\",\"code\":\"bad_http\",\"boundary\":\"sdk_client\","
                           "\"operation\":null,\"retryable\":false,\"remedy\":null,\"request_id\":null,\"sandbox_id\":null,"
                           "\"job_id\":null,\"audit_id\":null,\"errors\":[]}",
                           status, detail);
    struct MHD_Response *m = MHD_create_response_from_buffer((size_t)n, text, MHD_RESPMEM_MUST_COPY);
    if (!m)
        return MHD_NO;
    MHD_add_response_header(m, MHD_HTTP_HEADER_CONTENT_TYPE, "application/problem+json");
    MHD_add_response_header(m, MHD_HTTP_HEADER_CONNECTION, "close");
    const enum MHD_Result ok = MHD_queue_response(x->connection, status, m);
    MHD_destroy_response(m);
    x->queued = true;
    return ok;
}

// ---- requests -----------------------------------------------------------------------------------------------------
struct framing {
    unsigned lengths, hosts;
    bool chunked, coded, expect;
    int64_t length;
};

static enum MHD_Result look_at_header(void *cls, enum MHD_ValueKind kind, const char *key, const char *value)
{
    struct framing *f = cls;
    (void)kind;
    if (strcasecmp(key, "Content-Length") == 0) {
        f->lengths++;
        f->length = strtoll(value ? value : "0", NULL, 10);
    } else if (strcasecmp(key, "Transfer-Encoding") == 0) {
        f->coded = true;
        f->chunked = value && strcasecmp(value, "chunked") == 0;
    } else if (strcasecmp(key, "Host") == 0) {
        f->hosts++;
    } else if (strcasecmp(key, "Expect") == 0) {
        f->expect = value && strcasecmp(value, "100-continue") == 0;
    }
    return MHD_YES;
}

static const char *header(void *arg, const char *name)
{
    return MHD_lookup_connection_value(arg, MHD_HEADER_KIND, name);
}

static void remote_text(struct MHD_Connection *c, char out[static INET6_ADDRSTRLEN])
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    out[0] = 0;
    if (info && info->client_addr && info->client_addr->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)info->client_addr)->sin_addr, out, INET6_ADDRSTRLEN);
    else if (info && info->client_addr && info->client_addr->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)info->client_addr)->sin6_addr, out,
                  INET6_ADDRSTRLEN);
}

static enum MHD_Result begin(struct exchange *x, const char *method, const char *version)
{
    struct framing f = {.length = -1};
    char remote[INET6_ADDRSTRLEN];
    x->begun = true;
    x->method = method;
    MHD_get_connection_values(x->connection, MHD_HEADER_KIND, look_at_header, &f);
    if (f.lengths > 1 || (f.lengths && f.coded))
        return refuse(x, 400, "more than one Content-Length, or one beside Transfer-Encoding");
    if (f.coded && !f.chunked)
        return refuse(x, 400, "a Transfer-Encoding other than chunked");
    if (f.hosts != 1 && strcmp(version, MHD_HTTP_VERSION_1_1) == 0)
        return refuse(x, 400, "HTTP/1.1 needs exactly one Host");
    x->has_body = f.chunked || f.length > 0;
    char *query = strchr(x->uri, '?');
    if (query)
        *query = 0;
    remote_text(x->connection, remote);
    const struct api_request r = {.method = method, .path = x->uri, .query = query ? query + 1 : "", .remote = remote,
                                  .content_length = f.length, .chunked = f.chunked, .header = header,
                                  .header_arg = x->connection};
    x->call = api_begin(x->h->api, &r, wake, x);
    if (!x->call)
        return MHD_NO;
    if (!x->has_body) {
        x->body_ended = true;
        api_body_end(x->call);
    }
    // An answer in this first call makes the library close the connection and lose what is pipelined behind: it goes in
    // the second, which follows at once. Only a client that waits for our word before its body gets it here.
    const struct api_response *answer = x->has_body && f.expect ? api_response(x->call) : NULL;
    if (answer)
        return queue(x, answer);
    conn_phase(x, x->has_body ? PHASE_BODY : PHASE_ANSWER);
    return MHD_YES;
}

static void conn_progress(struct exchange *x, size_t bytes, bool waiting_for_us)
{
    if (!x->conn)
        return;
    pthread_mutex_lock(&x->h->lock);
    x->conn->body_bytes += bytes;
    if (x->conn->waiting_for_us && !waiting_for_us) { // our own slowness is not the client's
        x->conn->since_ms = clock_mono_ms();
        x->conn->body_bytes = 0;
    }
    x->conn->waiting_for_us = waiting_for_us;
    pthread_mutex_unlock(&x->h->lock);
}

// Hands over what api takes; the rest is given to us again. MHD_NO cuts the connection.
static enum MHD_Result take_body(struct exchange *x, const char *data, size_t *len)
{
    while (*len > 0) {
        if (api_response(x->call)) { // refused: read on so that the client sees the answer, up to a limit
            x->discarded += *len;
            *len = 0;
            return x->discarded > LIMIT_DISCARD_BYTES ? MHD_NO : MHD_YES;
        }
        const size_t n = api_body_push(x->call, data, *len);
        conn_progress(x, n, n == 0);
        data += n;
        *len -= n;
        if (n == 0 && suspend(x))
            break;
    }
    return MHD_YES;
}

static enum MHD_Result on_request(void *cls, struct MHD_Connection *connection, const char *url, const char *method,
                                  const char *version, const char *upload, size_t *upload_size, void **con_cls)
{
    struct exchange *x = *con_cls;
    (void)cls, (void)url;
    if (!x)
        return MHD_NO;
    if (!x->begun) {
        x->connection = connection;
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
        x->conn = info ? info->socket_context : NULL;
        return begin(x, method, version);
    }
    if (x->queued)
        return MHD_YES;
    if (*upload_size > 0)
        return take_body(x, upload, upload_size);
    if (!x->body_ended) {
        x->body_ended = true;
        api_body_end(x->call);
        conn_phase(x, PHASE_ANSWER);
    }
    for (;;) {
        const struct api_response *answer = api_response(x->call);
        if (answer)
            return queue(x, answer);
        if (suspend(x))
            return MHD_YES;
    }
}

// ---- beginning and end of an exchange -----------------------------------------------------------------------------------
static void *on_uri(void *cls, const char *uri, struct MHD_Connection *connection)
{
    struct exchange *x = calloc(1, sizeof *x);
    if (!x)
        return NULL;
    x->h = cls;
    x->connection = connection;
    x->uri = strdup(uri);
    x->t0_us = clock_mono_us();
    pthread_mutex_init(&x->lock, NULL);
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    x->conn = info ? info->socket_context : NULL;
    conn_phase(x, PHASE_HEADERS);
    if (x->uri)
        return x;
    free(x);
    return NULL;
}

// One line for each request that may change something; reads are in the metrics, and here at debug level.
static void access_log(struct exchange *x, bool completed)
{
    const char *operation, *tenant, *request_id;
    const bool read = strcmp(x->method, "GET") == 0 || strcmp(x->method, "HEAD") == 0;
    if (read && log_level() > LOG_DEBUG_)
        return;
    const struct api_response *r = api_response(x->call);
    api_call_describe(x->call, &operation, &tenant, &request_id);
    log_line(read ? LOG_DEBUG_ : LOG_INFO_, "%s %s %d %lld ms tenant=%s request=%s%s", x->method, operation,
             r ? r->status : 0, (long long)((clock_mono_us() - x->t0_us) / 1000), tenant, request_id,
             completed ? "" : " (client went away)");
}

static void on_completed(void *cls, struct MHD_Connection *connection, void **con_cls,
                         enum MHD_RequestTerminationCode code)
{
    struct exchange *x = *con_cls;
    (void)cls, (void)connection;
    if (!x)
        return;
    *con_cls = NULL;
    if (x->call) {
        const bool completed = code == MHD_REQUEST_TERMINATED_COMPLETED_OK;
        access_log(x, completed);
        api_call_end(x->call, completed);
    }
    conn_phase(x, PHASE_IDLE);
    pthread_mutex_destroy(&x->lock);
    free(x->uri);
    free(x);
}

// Percent-decoding is api's, by length.
static size_t no_unescape(void *cls, struct MHD_Connection *connection, char *text)
{
    (void)cls, (void)connection;
    return strlen(text);
}

static void mhd_log(void *cls, const char *fmt, va_list args) __attribute__((format(printf, 2, 0)));

static void mhd_log(void *cls, const char *fmt, va_list args)
{
    char text[256];
    (void)cls;
    vsnprintf(text, sizeof text, fmt, args);
    text[strcspn(text, "\n")] = 0;
    log_debug("http: %s", text);
}

// ---- listening ----------------------------------------------------------------------------------------------------
static int listen_at(const struct http_options *o, unsigned *ret_port, struct err *err)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o->port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)o->port)};
    const bool is4 = inet_pton(AF_INET, o->address, &v4.sin_addr) == 1;
    if (!is4 && inet_pton(AF_INET6, o->address, &v6.sin6_addr) != 1)
        return err_set(err, ERR_VALIDATION, "listen", "%s is no IP address", o->address);
    const struct sockaddr *address = is4 ? (const struct sockaddr *)(const void *)&v4 : (const struct sockaddr *)(const void *)&v6;
    socklen_t len = is4 ? sizeof v4 : sizeof v6;
    const int one = 1;
    CLEANUP_FD int fd = socket(is4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 || bind(fd, address, len) != 0 ||
        listen(fd, 1024) != 0)
        return err_sys(err, errno, "listening on %s port %u", o->address, o->port);
    struct sockaddr_storage bound;
    len = sizeof bound;
    if (getsockname(fd, (struct sockaddr *)&bound, &len) != 0)
        return err_sys(err, errno, "listening");
    *ret_port = ntohs(is4 ? ((struct sockaddr_in *)(void *)&bound)->sin_port : ((struct sockaddr_in6 *)(void *)&bound)->sin6_port);
    return fd_steal(&fd);
}

static unsigned connection_limit(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) != 0)
        return 16;
    if (r.rlim_cur < 2 * DESCRIPTORS_KEPT)
        return r.rlim_cur > 32 ? (unsigned)r.rlim_cur / 2 : 16;
    return r.rlim_cur > 100000 ? 100000 : (unsigned)(r.rlim_cur - DESCRIPTORS_KEPT);
}

struct http *http_start(const struct http_options *o, struct err *err)
{
    struct http *h = calloc(1, sizeof *h);
    if (!h) {
        err_sys(err, ENOMEM, "starting HTTP");
        return NULL;
    }
    h->api = o->api;
    pthread_mutex_init(&h->lock, NULL);
    pthread_mutex_init(&h->sweep_lock, NULL);
    pthread_cond_init(&h->sweep_cond, NULL);
    h->listen_fd = listen_at(o, &h->port, err);
    if (h->listen_fd < 0) {
        free(h);
        return NULL;
    }
    h->daemon = MHD_start_daemon(
        MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC | MHD_USE_ERROR_LOG, (uint16_t)h->port, NULL,
        NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, mhd_log, NULL, MHD_OPTION_LISTEN_SOCKET, h->listen_fd,
        MHD_OPTION_THREAD_POOL_SIZE, o->threads, MHD_OPTION_CONNECTION_LIMIT, connection_limit(),
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_MEMORY, MHD_OPTION_CONNECTION_TIMEOUT, 0u,
        MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_NOTIFY_COMPLETED, on_completed, h, MHD_OPTION_NOTIFY_CONNECTION,
        on_connection, h, MHD_OPTION_URI_LOG_CALLBACK, on_uri, h, MHD_OPTION_UNESCAPE_CALLBACK, no_unescape, NULL,
        MHD_OPTION_END);
    if (!h->daemon) {
        close(h->listen_fd);
        free(h);
        err_set(err, ERR_INTERNAL, "http", "the HTTP listener could not be started");
        return NULL;
    }
    h->sweeping = pthread_create(&h->sweeper, NULL, sweep, h) == 0;
    return h;
}

unsigned http_port(const struct http *h)
{
    return h->port;
}

unsigned http_connections(const struct http *h)
{
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_CURRENT_CONNECTIONS);
    return info ? info->num_connections : 0;
}

void http_quiesce(struct http *h)
{
    const int fd = MHD_quiesce_daemon(h->daemon);
    if (fd >= 0)
        close(fd);
}

void http_stop(struct http *h)
{
    if (!h)
        return;
    pthread_mutex_lock(&h->sweep_lock);
    h->stopping = true;
    pthread_cond_signal(&h->sweep_cond);
    pthread_mutex_unlock(&h->sweep_lock);
    if (h->sweeping)
        pthread_join(h->sweeper, NULL);
    MHD_stop_daemon(h->daemon);
    free(h);
}
