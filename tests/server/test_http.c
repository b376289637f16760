// The listener on loopback, with an api of the test's own behind it.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/limits.h"
#include "base/log.h"
#include "fake_api.h"
#include "server/http.h"

#define DEADLINE_MS 30000

struct fixture {
    struct api *api;
    struct http *http;
    int fd;              // the client's connection
    struct buf in;       // what it has got
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    struct err err = {0};
    log_set_level(LOG_ERROR_);
    x->api = fake_api_new();
    x->http = http_start(&(struct http_options){.address = "127.0.0.1", .port = 0, .threads = 2, .api = x->api}, &err);
    x->fd = -1;
    buf_init(&x->in, 64 << 20);
    *state = x;
    return x->http ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    fd_close(&x->fd);
    http_stop(x->http);
    const bool all_ended = x->api->begun == x->api->ended; // all calls have ended after it
    fake_api_free(x->api);
    buf_free(&x->in);
    free(x);
    return all_ended ? 0 : -1;
}

// ---- a client -----------------------------------------------------------------------------------------------------------
static int try_connect(unsigned port)
{
    const struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)(const void *)&a, sizeof a) == 0)
        return fd;
    close(fd);
    return -1;
}

static void connect_(struct fixture *x)
{
    fd_close(&x->fd);
    buf_clear(&x->in);
    x->fd = try_connect(http_port(x->http));
    assert_true(x->fd >= 0);
}

static void say(struct fixture *x, const char *text)
{
    assert_int_equal(send(x->fd, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

// More from the server; false at the end of the connection.
static bool more(struct fixture *x)
{
    char chunk[65536];
    struct pollfd w = {.fd = x->fd, .events = POLLIN};
    if (poll(&w, 1, DEADLINE_MS) != 1)
        fail_msg("the server said nothing more than: %s", buf_text(&x->in));
    const ssize_t n = recv(x->fd, chunk, sizeof chunk, MSG_DONTWAIT);
    if (n <= 0)
        return false;
    assert_true(buf_add(&x->in, chunk, (size_t)n));
    return true;
}

static void read_to_the_end(struct fixture *x)
{
    while (more(x))
        ;
}

static void read_until(struct fixture *x, const char *text)
{
    while (!strstr(buf_text(&x->in), text))
        if (!more(x))
            fail_msg("%s did not come in: %s", text, buf_text(&x->in));
}

// One request on a connection of its own, to the end.
static const char *ask(struct fixture *x, const char *request)
{
    connect_(x);
    say(x, request);
    read_to_the_end(x);
    return buf_text(&x->in);
}

static bool status_is(struct fixture *x, int status)
{
    char line[40];
    snprintf(line, sizeof line, "HTTP/1.1 %d ", status);
    return strncmp(buf_text(&x->in), line, strlen(line)) == 0;
}

static const char *body_of(struct fixture *x)
{
    const char *at = strstr(buf_text(&x->in), "\r\n\r\n");
    assert_non_null(at);
    return at + 4;
}

static size_t count(const char *text, const char *part)
{
    size_t n = 0;
    for (const char *at = text; (at = strstr(at, part)); at++)
        n++;
    return n;
}

// ---- requests ---------------------------------------------------------------------------------------------------------
static void a_request_reaches_the_api(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /echo/a?b=c&d HTTP/1.1\r\nHost: h\r\nX-Word: some words\r\nConnection: close\r\n\r\n");
    assert_true(status_is(x, 200));
    assert_string_equal(body_of(x), "GET path=/echo/a query=b=c&d remote=127.0.0.1 length=-1 chunked=0 word=some words\n");
    assert_non_null(strstr(buf_text(&x->in), "\r\nX-Answer: yes\r\n"));
    assert_non_null(strstr(buf_text(&x->in), "\r\nContent-Type: text/plain\r\n"));
    fake_api_wait_ended(x->api, 1);
    assert_int_equal(fake_api_completed(x->api), 1);
}

// Decoding and judging paths is not the listener's business.
static void paths_and_queries_arrive_raw(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /echo/%2e%2E/a%2Fb//..?x=%20%00&y=a+b?c HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_non_null(strstr(body_of(x), " path=/echo/%2e%2E/a%2Fb//.. query=x=%20%00&y=a+b?c "));
    ask(x, "GET /echo? HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_non_null(strstr(body_of(x), " path=/echo query= "));
    static const char *const METHODS[] = {"PUT", "DELETE", "PATCH", "POST", "OPTIONS", "BREW"};
    for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; i++) {
        char request[200];
        snprintf(request, sizeof request, "%s /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", METHODS[i]);
        ask(x, request);
        assert_true(status_is(x, 200));
        assert_memory_equal(body_of(x), METHODS[i], strlen(METHODS[i]));
    }
}

static void a_head_has_a_length_and_no_body(void **state)
{
    struct fixture *x = *state;
    char length[60];
    ask(x, "GET /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    snprintf(length, sizeof length, "Content-Length: %zu\r\n", strlen(body_of(x)) + 1); // HEAD has a letter more
    assert_null(strstr(buf_text(&x->in), length));
    ask(x, "HEAD /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_true(status_is(x, 200));
    assert_non_null(strstr(buf_text(&x->in), length));
    assert_string_equal(body_of(x), "");
}

static void one_connection_many_requests(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    for (int i = 0; i < 20; i++) {
        char request[100], want[40];
        snprintf(request, sizeof request, "GET /echo/%d HTTP/1.1\r\nHost: h\r\n\r\n", i);
        snprintf(want, sizeof want, "path=/echo/%d ", i);
        say(x, request);
        read_until(x, want);
    }
    // And all at once: answered in their order.
    buf_clear(&x->in);
    say(x, "GET /later/1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /echo/2 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody"
           "GET /stream/3 HTTP/1.1\r\nHost: h\r\n\r\nGET /echo/4 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    read_to_the_end(x);
    const char *first = strstr(buf_text(&x->in), "path=/later/1"), *second = strstr(buf_text(&x->in), "path=/echo/2"),
               *third = strstr(buf_text(&x->in), "piece 5"), *fourth = strstr(buf_text(&x->in), "path=/echo/4");
    assert_true(first && second && third && fourth && first < second && second < third && third < fourth);
    assert_int_equal(count(buf_text(&x->in), "HTTP/1.1 200 "), 4);
}

static void an_answer_may_come_later(void **state)
{
    struct fixture *x = *state;
    for (int i = 0; i < 30; i++) {
        ask(x, "GET /later HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
        assert_true(status_is(x, 200));
        assert_non_null(strstr(body_of(x), "path=/later"));
    }
}

// ---- bodies -------------------------------------------------------------------------------------------------------------
static void bodies_with_a_length(void **state)
{
    struct fixture *x = *state;
    ask(x, "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 11\r\n\r\nhello, body");
    assert_string_equal(body_of(x), "POST path=/echo query= remote=127.0.0.1 length=11 chunked=0 word=(none)\nhello, body");
    ask(x, "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    assert_non_null(strstr(body_of(x), "length=0 "));
    connect_(x); // one byte a time
    for (const char *p = "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"; *p; p++) {
        const char byte[2] = {*p, 0};
        say(x, byte);
    }
    read_to_the_end(x);
    assert_non_null(strstr(body_of(x), "\nabc"));
}

static void bodies_in_chunks(void **state)
{
    struct fixture *x = *state;
    ask(x, "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
           "5\r\nhello\r\n7;ext=1\r\n, again\r\n0\r\n\r\n");
    assert_non_null(strstr(body_of(x), "length=-1 chunked=1 word=(none)\nhello, again"));
}

// An api that takes little and pauses gets all of it, in order.
static void a_body_is_taken_in_sips(void **state)
{
    struct fixture *x = *state;
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    buf_adds(&b, "POST /sip HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 60000\r\n\r\n");
    const size_t head = b.len;
    for (unsigned i = 0; b.len < head + 60000; i++)
        buf_addf(&b, "%u,", i);
    b.len = head + 60000;
    b.data[b.len] = 0;
    ask(x, buf_text(&b));
    const char *body = strchr(body_of(x), '\n');
    assert_non_null(body);
    assert_string_equal(body + 1, buf_text(&b) + head);
}

static void a_refusal_does_not_wait_for_the_body(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /refuse HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nsome of it");
    char part[10000];
    memset(part, 'b', sizeof part);
    size_t sent = 10;
    while (sent < 1000000) { // it is read, so that a client that writes first gets to see the answer
        const size_t n = 1000000 - sent < sizeof part ? 1000000 - sent : sizeof part;
        assert_int_equal(fd_write_full(x->fd, part, n), 0);
        sent += n;
    }
    read_to_the_end(x);
    assert_true(status_is(x, 403));
    assert_non_null(strcasestr(buf_text(&x->in), "\r\nConnection: close\r\n"));
    assert_int_equal(x->api->begun, 1);
}

// What is refused is read up to a limit; then the connection is cut.
static void a_refused_flood_is_cut(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /refuse HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n");
    static char chunk[65536 + 16];
    const int n = snprintf(chunk, sizeof chunk, "10000\r\n");
    memset(chunk + n, 'f', 65536);
    memcpy(chunk + n + 65536, "\r\n", 2);
    uint64_t sent = 0;
    while (fd_write_full(x->fd, chunk, (size_t)n + 65538) == 0) {
        sent += 65536;
        assert_true(sent < 4 * (uint64_t)LIMIT_DISCARD_BYTES); // beside it, what the sockets hold
    }
    assert_true(errno == ECONNRESET || errno == EPIPE);
    assert_true(sent > LIMIT_DISCARD_BYTES / 2);
}

static void a_client_that_expects_a_word_gets_one(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    read_until(x, "HTTP/1.1 100 Continue\r\n\r\n");
    say(x, "body");
    read_to_the_end(x);
    assert_non_null(strstr(buf_text(&x->in), "HTTP/1.1 200 "));
    assert_non_null(strstr(buf_text(&x->in), "\nbody"));
    // Where the answer is known already, it is that, and the body is not asked for.
    connect_(x);
    say(x, "POST /refuse HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    read_until(x, "path=/refuse");
    assert_true(status_is(x, 403));
}

// ---- streams ----------------------------------------------------------------------------------------------------------
static void a_stream_comes_piece_by_piece(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /stream HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_true(status_is(x, 200));
    assert_non_null(strstr(buf_text(&x->in), "\r\nTransfer-Encoding: chunked\r\n"));
    const char *at = body_of(x);
    for (int i = 1; i <= 5; i++) {
        char piece[16];
        snprintf(piece, sizeof piece, "piece %d\n", i);
        at = strstr(at, piece);
        assert_non_null(at);
    }
    assert_non_null(strstr(at, "\r\n0\r\n\r\n")); // its end is told
    fake_api_wait_ended(x->api, 1);
    assert_int_equal(fake_api_completed(x->api), 1);
}

static void a_stream_with_a_length_is_whole(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /sized HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_non_null(strstr(buf_text(&x->in), "\r\nContent-Length: 300000\r\n"));
    const char *body = body_of(x);
    assert_int_equal(strlen(body), SIZED_BYTES);
    for (size_t i = 0; i < SIZED_BYTES; i++)
        assert_int_equal(body[i], sized_byte(i));
}

// A stream that breaks must not look like one that has ended.
static void a_broken_stream_is_cut(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /broken HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_true(status_is(x, 200));
    assert_non_null(strstr(buf_text(&x->in), "piece 5"));
    assert_null(strstr(buf_text(&x->in), "\r\n0\r\n\r\n"));
    fake_api_wait_ended(x->api, 1);
    assert_int_equal(fake_api_completed(x->api), 0);
}

// ---- what HTTP forbids --------------------------------------------------------------------------------------------------
static void ambiguous_requests_are_refused(void **state)
{
    static const char *const BAD[] = {
        "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nbody",
        "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody",
        "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: -4\r\n\r\nbody",
        "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4x\r\n\r\nbody",
        "GET /echo HTTP/1.1\r\n\r\n",
        "GET /echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    };
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        ask(x, BAD[i]); // and the connection ends, so that nothing behind it is taken for a request
        if (!status_is(x, 400))
            fail_msg("%s gives %s", BAD[i], buf_text(&x->in));
    }
    assert_int_equal(x->api->begun, 0);
    ask(x, "GET /echo HTTP/1.0\r\n\r\n"); // which knows no Host
    assert_non_null(strstr(buf_text(&x->in), " 200 "));
}

static void our_own_refusals_are_problems(void **state)
{
    struct fixture *x = *state;
    ask(x, "GET /echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n");
    assert_true(status_is(x, 400));
    assert_non_null(strstr(buf_text(&x->in), "\r\nContent-Type: application/problem+json\r\n"));
    assert_non_null(strstr(body_of(x), "\"code\":\"bad_http\""));
    assert_non_null(strstr(body_of(x), "\"status\":400"));
}

static void a_header_too_large(void **state)
{
    struct fixture *x = *state;
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    buf_adds(&b, "GET /echo HTTP/1.1\r\nHost: h\r\nX-Large: ");
    while (b.len < 60000)
        buf_adds(&b, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    buf_adds(&b, "\r\n\r\n");
    ask(x, buf_text(&b));
    assert_true(status_is(x, 431) || status_is(x, 413));
    assert_int_equal(x->api->begun, 0);
}

// ---- clients that go, servers that end ----------------------------------------------------------------------------------
static void a_client_that_goes_ends_its_call(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nnot all of it");
    fake_api_wait_begun(x->api, 1);
    fd_close(&x->fd);
    fake_api_wait_ended(x->api, 1);
    assert_int_equal(fake_api_completed(x->api), 0);
    connect_(x); // others are served
    say(x, "GET /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    read_to_the_end(x);
    assert_true(status_is(x, 200));
}

static void many_clients_at_once(void **state)
{
    enum { N = 60 };
    struct fixture *x = *state;
    int fds[N];
    for (int i = 0; i < N; i++) {
        char request[120];
        fds[i] = try_connect(http_port(x->http));
        assert_true(fds[i] >= 0);
        snprintf(request, sizeof request, "GET /%s/%d HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
                 i % 3 == 0 ? "stream" : i % 3 == 1 ? "later" : "echo", i);
        assert_int_equal(fd_write_full(fds[i], request, strlen(request)), 0);
    }
    for (int i = 0; i < N; i++) {
        char want[40];
        buf_clear(&x->in);
        x->fd = fds[i];
        read_to_the_end(x);
        assert_true(status_is(x, 200));
        snprintf(want, sizeof want, "path=/%s/%d ", i % 3 == 1 ? "later" : "echo", i);
        assert_non_null(strstr(buf_text(&x->in), i % 3 == 0 ? "piece 5" : want));
        fd_close(&x->fd);
    }
    fake_api_wait_ended(x->api, N);
    assert_int_equal(fake_api_completed(x->api), N);
}

static void quiet_means_no_new_connections(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbo");
    fake_api_wait_begun(x->api, 1);
    assert_true(http_connections(x->http) >= 1);
    http_quiesce(x->http);
    assert_int_equal(try_connect(http_port(x->http)), -1);
    say(x, "dy"); // who is there is served to the end
    read_to_the_end(x);
    assert_true(status_is(x, 200));
    assert_non_null(strstr(body_of(x), "\nbody"));
}

static void a_stop_ends_calls_under_way(void **state)
{
    struct fixture *x = *state;
    connect_(x);
    say(x, "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbo");
    fake_api_wait_begun(x->api, 1);
    http_quiesce(x->http);
    http_stop(x->http);
    x->http = NULL; // as the teardown accepts it
    assert_int_equal(x->api->ended, 1);
    assert_int_equal(x->api->completed, 0);
}

static void where_it_listens(void **state)
{
    struct fixture *x = *state;
    struct err err = {0};
    assert_true(http_port(x->http) > 0);
    const struct http_options same = {.address = "127.0.0.1", .port = http_port(x->http), .threads = 1, .api = x->api};
    assert_null(http_start(&same, &err));
    assert_int_equal(err.sys_errno, EADDRINUSE);
    err = (struct err){0};
    assert_null(http_start(&(struct http_options){.address = "nowhere", .threads = 1, .api = x->api}, &err));
    assert_int_equal(err.kind, ERR_VALIDATION);
    struct http *six = http_start(&(struct http_options){.address = "::1", .threads = 1, .api = x->api}, &err);
    if (six) { // where there is IPv6
        const struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)http_port(six)),
                                       .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        buf_clear(&x->in);
        x->fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(x->fd, (const struct sockaddr *)(const void *)&a, sizeof a), 0);
        say(x, "GET /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
        read_to_the_end(x);
        assert_non_null(strstr(body_of(x), " remote=::1 "));
        http_stop(six);
    }
    http_stop(NULL);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_request_reaches_the_api),
        TEST(paths_and_queries_arrive_raw),
        TEST(a_head_has_a_length_and_no_body),
        TEST(one_connection_many_requests),
        TEST(an_answer_may_come_later),
        TEST(bodies_with_a_length),
        TEST(bodies_in_chunks),
        TEST(a_body_is_taken_in_sips),
        TEST(a_refusal_does_not_wait_for_the_body),
        TEST(a_refused_flood_is_cut),
        TEST(a_client_that_expects_a_word_gets_one),
        TEST(a_stream_comes_piece_by_piece),
        TEST(a_stream_with_a_length_is_whole),
        TEST(a_broken_stream_is_cut),
        TEST(ambiguous_requests_are_refused),
        TEST(our_own_refusals_are_problems),
        TEST(a_header_too_large),
        TEST(a_client_that_goes_ends_its_call),
        TEST(many_clients_at_once),
        TEST(quiet_means_no_new_connections),
        TEST(a_stop_ends_calls_under_way),
        TEST(where_it_listens),
    };
    signal(SIGPIPE, SIG_IGN); // a server that cuts is no end of the client
    return cmocka_run_group_tests(tests, NULL, NULL);
}
