#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"


// ---- world ----------------------------------------------------------------------------------------------------------
static void load_spec(struct world *w)
{
    char path[96], command[256];
    snprintf(path, sizeof path, "%s/spec.json", w->dir);
    snprintf(command, sizeof command, "python3 openapi/to_json.py openapi/openapi.yaml %s", path);
    assert_int_equal(system(command), 0);
    struct buf b = BUF_INIT(8u << 20);
    assert_int_equal(fd_read_file(AT_FDCWD, path, &b), 0);
    w->spec_len = b.len;
    w->spec = buf_steal(&b);
    w->spec_json = json_loadb(w->spec, w->spec_len, 0, NULL);
    assert_non_null(w->spec_json);
    w->compiler.document = w->spec_json;
}

static void start(struct world *w)
{
    struct err err = {0};
    const struct store_options so = {.state_dirfd = w->dirfd, .reserve_bytes = 1, .server_version = "0.1.0"};
    w->store = store_open(&so, &err);
    if (!w->store)
        fail_msg("store: %s %s", err.detail, err.internal);
    w->m = fake_new(w->store, w->dirfd);
    const struct api_options ao = {.manager = w->m, .store = w->store, .spec_json = w->spec, .spec_len = w->spec_len,
                                   .docs_html = "<!doctype html>", .docs_len = 15, .server_version = "0.1.0",
                                   .workers = 4, .state_dir = w->dir};
    w->api = api_new(&ao, &err);
    if (!w->api)
        fail_msg("api: %s %s", err.detail, err.internal);
}

static void stop(struct world *w)
{
    api_stop(w->api);
    api_free(w->api);
    fake_free(w->m);
    store_close(w->store);
}

struct world *world_new(void)
{
    struct world *w = calloc(1, sizeof *w);
    snprintf(w->dir, sizeof w->dir, "/tmp/airlock-api-XXXXXX");
    assert_non_null(mkdtemp(w->dir));
    w->dirfd = open(w->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    load_spec(w);
    start(w);
    world_token(w, "default", 255, 0, w->admin, NULL);
    world_token(w, "other", 255, 0, w->other, NULL);
    return w;
}

void world_restart(struct world *w)
{
    stop(w);
    start(w);
}

void world_free(struct world *w)
{
    stop(w);
    schema_compiler_free(&w->compiler);
    json_decref(w->spec_json);
    free(w->spec);
    close(w->dirfd);
    fd_remove_tree(AT_FDCWD, w->dir, NULL);
    free(w);
}

struct token_ctx {
    struct token_row row;
    uint8_t hash[SHA256_BYTES];
};

static int token_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct token_ctx *t = arg;
    return token_insert(tx, &t->row, t->hash, err);
}

void world_token(struct world *w, const char *tenant, unsigned scopes, int64_t expires_at_ms, char out[TOKEN_TEXT_LEN + 1],
                 char *ret_id)
{
    struct err err = {0};
    struct token_ctx t = {.row = {.scopes = scopes, .created_at_ms = clock_wall_ms(), .expires_at_ms = expires_at_ms}};
    memcpy(out, "alk_", 4);
    enc_random_base62(out + 4, 40);
    crypto_sha256(out, TOKEN_TEXT_LEN, t.hash);
    id_new(ID_TOKEN, t.row.id);
    snprintf(t.row.tenant, sizeof t.row.tenant, "%s", tenant);
    snprintf(t.row.name, sizeof t.row.name, "test");
    assert_int_equal(store_write(w->store, token_tx, &t, &err), 0);
    if (ret_id)
        memcpy(ret_id, t.row.id, ID_MAX);
}

// ---- driving a call ---------------------------------------------------------------------------------------------------
struct headers {
    const struct ask *a;
    char auth[96];
};

static const char *header_of(void *arg, const char *name)
{
    struct headers *h = arg;
    for (size_t i = 0; i + 1 < 16 && h->a->headers[i]; i += 2)
        if (strcasecmp(h->a->headers[i], name) == 0)
            return h->a->headers[i + 1];
    if (strcasecmp(name, "Authorization") == 0 && *h->auth)
        return h->auth;
    if (strcasecmp(name, "Content-Type") == 0 && h->a->body)
        return "application/json";
    return NULL;
}

static void on_wake(void *arg)
{
    struct driven *d = arg;
    pthread_mutex_lock(&d->lock);
    d->wakes++;
    pthread_cond_broadcast(&d->cond);
    pthread_mutex_unlock(&d->lock);
}

static unsigned wakes_of(struct driven *d)
{
    pthread_mutex_lock(&d->lock);
    const unsigned n = d->wakes;
    pthread_mutex_unlock(&d->lock);
    return n;
}

static void wait_wake(struct driven *d, unsigned seen)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE_MS / 1000;
    pthread_mutex_lock(&d->lock);
    while (d->wakes == seen)
        if (pthread_cond_timedwait(&d->cond, &d->lock, &until) != 0) {
            pthread_mutex_unlock(&d->lock);
            fail_msg("no wake-up within %d ms", PATIENCE_MS);
            return;
        }
    pthread_mutex_unlock(&d->lock);
}

static void push(struct driven *d, const struct ask *a)
{
    const size_t len = a->body ? a->body_len ? a->body_len : strlen(a->body) : 0;
    for (size_t done = 0; done < len;) {
        const unsigned seen = wakes_of(d);
        const size_t piece = a->piece && a->piece < len - done ? a->piece : len - done;
        const size_t n = api_body_push(d->call, a->body + done, piece);
        if (n == 0)
            wait_wake(d, seen);
        done += n;
    }
    api_body_end(d->call);
}

struct driven *drive_begin(struct world *w, const struct ask *a)
{
    struct driven *d = calloc(1, sizeof *d);
    struct headers h = {.a = a};
    d->w = w;
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->cond, NULL);
    const char *token = a->token ? a->token : w->admin;
    if (*token)
        snprintf(h.auth, sizeof h.auth, "Bearer %s", token);
    const size_t len = a->body ? a->body_len ? a->body_len : strlen(a->body) : 0;
    const struct api_request req = {.method = a->method, .path = a->path, .query = a->query ? a->query : "",
                                    .remote = "127.0.0.1", .chunked = a->chunked,
                                    .content_length = a->body && !a->chunked ? (int64_t)len : -1, .header = header_of,
                                    .header_arg = &h};
    d->call = api_begin(w->api, &req, on_wake, d);
    assert_non_null(d->call);
    return d;
}

struct driven *drive(struct world *w, const struct ask *a)
{
    struct driven *d = drive_begin(w, a);
    push(d, a);
    return d;
}

const struct api_response *drive_response(struct driven *d)
{
    for (;;) {
        const unsigned seen = wakes_of(d);
        const struct api_response *r = api_response(d->call);
        if (r)
            return r;
        wait_wake(d, seen);
    }
}

char *drive_read(struct driven *d, const char *until, int *ret_end)
{
    struct buf b = BUF_INIT(64u << 20);
    *ret_end = 0;
    buf_adds(&b, "");
    buf_reserve(&b, 1);
    while (!until || !strstr(buf_text(&b), until)) {
        char piece[777]; // not a divisor of anything
        const unsigned seen = wakes_of(d);
        const int64_t n = api_stream_read(d->call, piece, sizeof piece);
        if (n < 0) {
            *ret_end = (int)n;
            break;
        }
        if (n == 0)
            wait_wake(d, seen);
        else
            buf_add(&b, piece, (size_t)n);
    }
    return buf_steal(&b);
}

void wait_held(struct world *w, int n)
{
    for (int i = 0; i < PATIENCE_MS && atomic_load(&w->m->held) < n; i++)
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    assert_int_equal(atomic_load(&w->m->held), n);
}

static void free_driven(struct driven *d)
{
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->cond);
    free(d);
}

void drive_leave(struct driven *d)
{
    api_call_end(d->call, false);
    free_driven(d);
}

// ---- answers against the specification ----------------------------------------------------------------------------------
static const json_t *operation_of(struct world *w, const char *name)
{
    const char *path, *method;
    json_t *item, *op;
    json_object_foreach(json_object_get(w->spec_json, "paths"), path, item) json_object_foreach(item, method, op)
    {
        const char *is = json_get_str(op, "x-airlock-operation");
        if (is && strcmp(is, name) == 0)
            return op;
    }
    return NULL;
}

static void validate(struct world *w, const struct answer *r)
{
    struct err err = {0};
    char status[8], type[64] = "";
    const json_t *op = *r->operation ? operation_of(w, r->operation) : NULL;
    if (!op || w->loose || r->status == 405)
        return;
    snprintf(status, sizeof status, "%d", r->status);
    const json_t *response = json_object_get(json_object_get(op, "responses"), status);
    if (!response)
        fail_msg("%s answers %s, which the specification does not know", r->operation, status);
    response = schema_resolve(w->spec_json, response, &err);
    const char *name;
    json_t *header;
    json_object_foreach(json_object_get(response, "headers"), name, header) {
        const json_t *h = schema_resolve(w->spec_json, header, &err);
        const char *value = answer_header(r, name);
        struct faults f = {0};
        if (!value && json_is_true(json_object_get(h, "required")) && !r->stream && strcmp(name, "Location") != 0)
            fail_msg("%s %s lacks the header %s", r->operation, status, name);
        const struct schema *s = value ? schema_compile(&w->compiler, json_object_get(h, "schema"), &err) : NULL;
        if (s)
            schema_validate_text(s, value, strlen(value), name, &f);
        if (f.n > 0)
            fail_msg("%s %s: header %s: %s", r->operation, status, name, f.items[0].message);
        faults_free(&f);
    }
    if (r->head || !r->json)
        return;
    snprintf(type, sizeof type, "%.*s", (int)strcspn(answer_header(r, "Content-Type"), ";"), answer_header(r, "Content-Type"));
    const json_t *schema = json_object_get(json_object_get(json_object_get(response, "content"), type), "schema");
    if (!schema)
        fail_msg("%s %s: no schema for %s", r->operation, status, type);
    const struct schema *s = schema_compile(&w->compiler, schema, &err);
    if (!s)
        fail_msg("%s %s: %s", r->operation, status, err.detail);
    struct faults f = {0};
    schema_validate(s, r->json, "", &f);
    if (f.n > 0)
        fail_msg("%s %s: %s %s in %s", r->operation, status, f.items[0].pointer, f.items[0].message, r->body);
    faults_free(&f);
}

struct answer *drive_finish(struct driven *d)
{
    const struct api_response *resp = drive_response(d);
    struct answer *r = calloc(1, sizeof *r);
    const char *op, *tenant, *request;
    r->status = resp->status;
    r->stream = resp->stream;
    r->head = resp->head;
    r->stream_len = resp->stream_len;
    r->len = resp->body_len;
    for (size_t i = 0; i < resp->n_headers; i++) {
        r->headers[r->n_headers++] = strdup(resp->headers[i].name);
        r->headers[r->n_headers++] = strdup(resp->headers[i].value);
    }
    if (resp->stream) {
        r->body = drive_read(d, NULL, &r->end);
        r->len = strlen(r->body);
    } else if (resp->body) {
        r->body = malloc(resp->body_len + 1);
        memcpy(r->body, resp->body, resp->body_len);
        r->body[resp->body_len] = 0;
    }
    api_call_describe(d->call, &op, &tenant, &request);
    snprintf(r->operation, sizeof r->operation, "%s", op);
    const char *type = answer_header(r, "Content-Type");
    if (!r->stream && r->body && type && strstr(type, "json"))
        r->json = json_loadb(r->body, r->len, 0, NULL);
    api_call_end(d->call, true);
    struct world *w = d->w;
    free_driven(d);
    validate(w, r);
    return r;
}

struct answer *ask(struct world *w, const struct ask *a)
{
    return drive_finish(drive(w, a));
}

struct answer *get(struct world *w, const char *path, const char *query)
{
    return ask(w, &(struct ask){.method = "GET", .path = path, .query = query});
}

struct answer *post(struct world *w, const char *path, const char *json)
{
    return ask(w, &(struct ask){.method = "POST", .path = path, .body = json});
}

void answer_free(struct answer *r)
{
    for (size_t i = 0; i < r->n_headers; i++)
        free(r->headers[i]);
    json_decref(r->json);
    free(r->body);
    free(r);
}

const char *answer_header(const struct answer *r, const char *name)
{
    for (size_t i = 0; i < r->n_headers; i += 2)
        if (strcasecmp(r->headers[i], name) == 0)
            return r->headers[i + 1];
    return NULL;
}

const char *answer_text(const struct answer *r, const char *key)
{
    return json_get_str(r->json, key);
}

void answer_is(const struct answer *r, int status, const char *kind, const char *code)
{
    if (r->status != status)
        fail_msg("%s: %d instead of %d: %s", r->operation, r->status, status, r->body ? r->body : "");
    if (!kind)
        return;
    assert_string_equal(answer_text(r, "kind"), kind);
    if (code)
        assert_string_equal(answer_text(r, "code"), code);
    else
        assert_null(answer_text(r, "code"));
}

bool answer_faults(const struct answer *r, const char *pointer)
{
    size_t i;
    const json_t *one;
    json_array_foreach(json_object_get(r->json, "errors"), i, one) {
        if (strcmp(json_get_str(one, "pointer"), pointer) == 0)
            return true;
    }
    return false;
}

void make_sandbox(struct world *w, const char *token, char out[ID_MAX])
{
    struct answer *r = ask(w, &(struct ask){.method = "POST", .path = "/v1/sandboxes", .token = token,
                                            .body = "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":60,"
                                                    "\"on_expiry\":\"destroy\"}}"});
    answer_is(r, 201, NULL, NULL);
    snprintf(out, ID_MAX, "%s", answer_text(r, "id"));
    answer_free(r);
}

char *path_of(const char *fmt, ...)
{
    static char ring[8][512];
    static unsigned at;
    char *out = ring[at++ % 8];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out, sizeof ring[0], fmt, ap);
    va_end(ap);
    return out;
}
