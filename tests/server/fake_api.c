#include "fake_api.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct api_call {
    struct api *a;
    void (*wake)(void *arg);
    void *wake_arg;
    char method[16], path[256];
    struct buf body, text;
    struct api_response response;
    pthread_mutex_t lock; // ready, open, pending
    pthread_cond_t idle;
    bool ready, open;     // the answer is there; the stream or the sip may go on
    int pending;          // wake-ups under way
    size_t streamed;
};

// ---- what the tests see -----------------------------------------------------------------------------------------------
struct api *fake_api_new(void)
{
    struct err err = {0};
    struct api *a = calloc(1, sizeof *a);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, NULL);
    a->pool = work_pool_new("wakers", 2, 1000, &err);
    return a;
}

void fake_api_free(struct api *a)
{
    work_pool_free(a->pool);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

void fake_api_wait_begun(struct api *a, int n)
{
    pthread_mutex_lock(&a->lock);
    while (a->begun < n)
        pthread_cond_wait(&a->changed, &a->lock);
    pthread_mutex_unlock(&a->lock);
}

void fake_api_wait_ended(struct api *a, int n)
{
    pthread_mutex_lock(&a->lock);
    while (a->ended < n)
        pthread_cond_wait(&a->changed, &a->lock);
    pthread_mutex_unlock(&a->lock);
}

int fake_api_completed(struct api *a)
{
    pthread_mutex_lock(&a->lock);
    const int n = a->completed;
    pthread_mutex_unlock(&a->lock);
    return n;
}

char sized_byte(size_t at)
{
    return (char)('a' + at % 26);
}

// ---- calls ------------------------------------------------------------------------------------------------------------
static bool is(const struct api_call *c, const char *path)
{
    return strncmp(c->path, path, strlen(path)) == 0;
}

static void answer(struct api_call *c, int status, const char *type)
{
    c->response.status = status;
    c->response.headers[0] = (struct api_header){"Content-Type", type};
    c->response.headers[1] = (struct api_header){"X-Answer", "yes"};
    c->response.n_headers = 2;
    c->response.body = buf_text(&c->text);
    c->response.body_len = c->text.len;
    c->response.head = strcmp(c->method, "HEAD") == 0;
    pthread_mutex_lock(&c->lock);
    c->ready = true;
    pthread_mutex_unlock(&c->lock);
}

static void wake_now(void *arg)
{
    struct api_call *c = arg;
    pthread_mutex_lock(&c->lock);
    c->open = true;
    if (is(c, "/later"))
        c->ready = true;
    pthread_mutex_unlock(&c->lock);
    c->wake(c->wake_arg);
    pthread_mutex_lock(&c->lock);
    c->pending--;
    pthread_cond_broadcast(&c->idle);
    pthread_mutex_unlock(&c->lock);
}

static void wake_soon(struct api_call *c)
{
    pthread_mutex_lock(&c->lock);
    c->pending++;
    pthread_mutex_unlock(&c->lock);
    if (work_submit(c->a->pool, wake_now, c) != 0)
        abort();
}

struct api_call *api_begin(struct api *a, const struct api_request *req, void (*wake)(void *arg), void *wake_arg)
{
    struct api_call *c = calloc(1, sizeof *c);
    c->a = a;
    c->wake = wake;
    c->wake_arg = wake_arg;
    snprintf(c->method, sizeof c->method, "%s", req->method);
    snprintf(c->path, sizeof c->path, "%s", req->path);
    buf_init(&c->body, 8 << 20);
    buf_init(&c->text, 8 << 20);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->idle, NULL);
    const char *word = req->header(req->header_arg, "x-word");
    buf_addf(&c->text, "%s path=%s query=%s remote=%s length=%lld chunked=%d word=%s\n", req->method, req->path, req->query,
             req->remote, (long long)req->content_length, req->chunked, word ? word : "(none)");
    pthread_mutex_lock(&a->lock);
    a->begun++;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    if (is(c, "/refuse"))
        answer(c, 403, "application/problem+json");
    return c;
}

size_t api_body_push(struct api_call *c, const void *data, size_t len)
{
    if (is(c, "/sip")) {
        pthread_mutex_lock(&c->lock);
        const bool open = c->open;
        c->open = false;
        pthread_mutex_unlock(&c->lock);
        if (!open) {
            wake_soon(c);
            return 0;
        }
        len = len < 700 ? len : 700;
    }
    return buf_add(&c->body, data, len) ? len : 0;
}

void api_body_end(struct api_call *c)
{
    if (is(c, "/refuse") || is(c, "/hang"))
        return;
    c->response.stream = is(c, "/stream") || is(c, "/sized") || is(c, "/broken");
    c->response.stream_len = is(c, "/sized") ? SIZED_BYTES : -1;
    buf_add(&c->text, c->body.data, c->body.len);
    answer(c, 200, "text/plain");
    if (is(c, "/later")) { // not yet
        pthread_mutex_lock(&c->lock);
        c->ready = false;
        pthread_mutex_unlock(&c->lock);
        wake_soon(c);
    }
}

const struct api_response *api_response(struct api_call *c)
{
    pthread_mutex_lock(&c->lock);
    const bool ready = c->ready;
    pthread_mutex_unlock(&c->lock);
    return ready ? &c->response : NULL;
}

int64_t api_stream_read(struct api_call *c, void *out, size_t cap)
{
    if (is(c, "/sized")) {
        size_t n = SIZED_BYTES - c->streamed < cap ? SIZED_BYTES - c->streamed : cap;
        for (size_t i = 0; i < n; i++)
            ((char *)out)[i] = sized_byte(c->streamed + i);
        c->streamed += n;
        return n ? (int64_t)n : -1;
    }
    if (c->streamed == 5)
        return is(c, "/broken") ? -2 : -1;
    pthread_mutex_lock(&c->lock);
    const bool open = c->open;
    c->open = false;
    pthread_mutex_unlock(&c->lock);
    if (!open) {
        wake_soon(c);
        return 0;
    }
    return snprintf(out, cap, "piece %zu\n", ++c->streamed);
}

void api_call_end(struct api_call *c, bool completed)
{
    struct api *a = c->a;
    pthread_mutex_lock(&c->lock);
    while (c->pending > 0) // no wake after this
        pthread_cond_wait(&c->idle, &c->lock);
    pthread_mutex_unlock(&c->lock);
    pthread_cond_destroy(&c->idle);
    pthread_mutex_destroy(&c->lock);
    buf_free(&c->body);
    buf_free(&c->text);
    free(c);
    pthread_mutex_lock(&a->lock);
    a->ended++;
    a->completed += completed;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
}

void api_call_describe(struct api_call *c, const char **ret_operation, const char **ret_tenant, const char **ret_request_id)
{
    *ret_operation = c->path;
    *ret_tenant = *ret_request_id = "";
}
