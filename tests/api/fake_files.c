#include "fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

static struct fake_file *find(struct manager *m, const void *path, size_t len)
{
    struct fake_file *f = m->files;
    while (f && (strlen(f->path) != len || memcmp(f->path, path, len) != 0))
        f = f->next;
    return f;
}

void fake_file_put(struct manager *m, const char *path, const void *data, size_t len)
{
    struct fake_file *f = find(m, path, strlen(path));
    if (!f) {
        f = calloc(1, sizeof *f);
        snprintf(f->path, sizeof f->path, "%s", path);
        f->next = m->files;
        m->files = f;
    }
    free(f->data);
    f->data = malloc(len + 1);
    memcpy(f->data, data, len);
    f->len = len;
    f->proc = strncmp(path, "/proc/", 6) == 0;
}

static bool running(struct manager *m, const struct admission *a, const char *sandbox_id, struct err *err)
{
    struct sandbox_info *i = manager_get(m, a->tenant, sandbox_id, err);
    if (i && i->row.state != SANDBOX_RUNNING)
        err_set(err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is not running");
    sandbox_info_unref(i);
    return err->kind == ERR_NONE;
}

struct proof {
    const struct admission *a;
    const char *problem;
    int status;
};

static int proof_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct proof *p = arg;
    const struct settlement s = {.outcome = p->problem ? "failed" : "succeeded", .status = p->status, .problem_json = p->problem};
    return evidence_admit(tx, p->a, NULL, err) != 0 ? -1 : evidence_settle(tx, p->a, &s, err);
}

static void prove(struct manager *m, const struct admission *a, int status)
{
    struct err err = {0};
    struct proof p = {a, NULL, status};
    if (*a->receipt_id)
        store_write(m->store, proof_tx, &p, &err);
}

struct call {
    struct manager *m;
    struct admission a;
    uint64_t op;
    char path[256];
    struct err err;
    int status;
    void (*done)(void *arg, const struct msg_file_result *result, bool last, const struct err *err);
    void *arg;
};

static void call_work(void *arg)
{
    struct call *c = arg;
    struct msg_file_result *r = calloc(1, sizeof *r);
    struct fake_file *f = find(c->m, c->path, strlen(c->path));
    if (strncmp(c->path, "/etc", 4) == 0 && c->op != MSG_FILE_STAT)
        err_set(&c->err, ERR_POLICY_DENIED, "path_outside_roots", "writes go below /work, /tmp and /home only");
    else if (!f && c->op != MSG_DIR_MAKE && c->op != MSG_DIR_LIST)
        err_set(&c->err, ERR_NOT_FOUND, "file_not_found", "no such file or directory in the guest");
    prove(c->m, &c->a, c->status);
    r->kind = MSG_KIND_FILE;
    r->mode = 0100644;
    r->mtime_ms = 1700000000123;
    r->size = f ? f->len : 0;
    r->created = true;
    r->removed = 1;
    r->owner = (struct slice){(const uint8_t *)"sandbox", 7};
    if (c->op == MSG_DIR_LIST) { // in two pieces, one name no UTF-8
        r->n_entries = 1;
        r->entries[0] = (struct msg_entry){.name = {(const uint8_t *)"b\xff", 2}, .kind = MSG_KIND_FILE, .mode = 0644};
        c->done(c->arg, r, false, NULL);
        r->entries[0] = (struct msg_entry){.name = {(const uint8_t *)"a", 1}, .kind = MSG_KIND_DIRECTORY, .mode = 0755};
    }
    c->done(c->arg, c->err.kind != ERR_NONE ? NULL : r, true, c->err.kind != ERR_NONE ? &c->err : NULL);
    free(r);
    free(c);
}

int file_call(struct manager *m, const struct file_call *call, const struct admission *a, int success_status,
              void (*done)(void *arg, const struct msg_file_result *result, bool last, const struct err *err), void *arg)
{
    struct err err = {0};
    if (!running(m, a, call->sandbox_id, &err)) {
        done(arg, NULL, true, &err);
        return 0;
    }
    struct call *c = calloc(1, sizeof *c);
    *c = (struct call){.m = m, .a = *a, .op = call->msg.op, .status = success_status, .done = done, .arg = arg};
    snprintf(c->path, sizeof c->path, "%.*s", (int)call->msg.path.len, (const char *)call->msg.path.data);
    return work_submit(m->pool, call_work, c);
}

// ---- reads --------------------------------------------------------------------------------------------------------
struct file_read {
    struct manager *m;
    struct admission a;
    const char *data;
    uint64_t left;
};

struct file_read *file_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                  const char *user, uint64_t offset, uint64_t length, const struct admission *a,
                                  int success_status, const struct file_read_callbacks *cb, struct err *err)
{
    (void)user, (void)success_status;
    if (!running(m, a, sandbox_id, err))
        return NULL;
    struct fake_file *f = find(m, path, path_len);
    struct file_read *r = calloc(1, sizeof *r);
    r->m = m;
    r->a = *a;
    if (!f) {
        prove(m, a, 404);
        r->a.receipt_id[0] = 0;
        struct err why = {0};
        err_set(&why, ERR_NOT_FOUND, "file_not_found", "no such file or directory in the guest");
        cb->info(cb->arg, NULL, &why);
        return r;
    }
    r->data = f->data + offset;
    r->left = length && length < f->len - offset ? length : f->len - offset;
    const struct msg_file_result info = {.kind = MSG_KIND_FILE, .size = f->proc ? 0 : f->len};
    cb->info(cb->arg, &info, NULL);
    return r;
}

int64_t file_read_take(struct file_read *r, void *out, size_t cap)
{
    const size_t n = r->left < cap ? (size_t)r->left : cap;
    if (n == 0)
        return -1;
    memcpy(out, r->data, n);
    r->data += n;
    r->left -= n;
    return (int64_t)n;
}

void file_read_end(struct file_read *r)
{
    prove(r->m, &r->a, 200);
    free(r);
}

struct file_read *archive_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                     const char *user, const struct admission *a, int success_status,
                                     const struct file_read_callbacks *cb, struct err *err)
{
    return file_read_begin(m, sandbox_id, path, path_len, user, 0, 0, a, success_status, cb, err);
}

// ---- writes -------------------------------------------------------------------------------------------------------
struct file_write {
    struct manager *m;
    struct admission a;
    struct file_write_callbacks cb;
    char path[256];
    char *data;
    size_t len;
    bool exclusive, stalled;
};

static void wrote(void *arg)
{
    struct file_write *w = arg;
    struct file_write_result r = {.bytes = w->len, .created = !find(w->m, w->path, strlen(w->path))};
    struct err err = {0};
    if (w->exclusive && !r.created) {
        err_set(&err, ERR_PRECONDITION_FAILED, "exists", "the path exists already");
        prove(w->m, &w->a, 412);
        w->cb.done(w->cb.arg, NULL, &err);
        return;
    }
    uint8_t sum[SHA256_BYTES];
    crypto_sha256(w->data ? w->data : "", w->len, sum);
    crypto_digest_text(sum, r.sha256);
    fake_file_put(w->m, w->path, w->data ? w->data : "", w->len);
    prove(w->m, &w->a, 201);
    w->cb.done(w->cb.arg, &r, NULL);
}

struct file_write *file_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                    const struct file_write_options *o, const struct admission *a,
                                    const struct file_write_callbacks *cb, struct err *err)
{
    if (!running(m, a, sandbox_id, err))
        return NULL;
    struct file_write *w = calloc(1, sizeof *w);
    w->m = m;
    w->a = *a;
    w->cb = *cb;
    w->exclusive = o->exclusive;
    snprintf(w->path, sizeof w->path, "%.*s", (int)path_len, path);
    return w;
}

static void unstall(void *arg)
{
    struct file_write *w = arg;
    w->cb.writable(w->cb.arg);
}

int64_t file_write_push(struct file_write *w, const void *data, size_t len)
{
    if (w->m->window && !w->stalled) { // full at first, then room
        w->stalled = true;
        work_submit(w->m->pool, unstall, w);
        return 0;
    }
    w->stalled = false;
    if (w->m->window && len > w->m->window)
        len = w->m->window;
    w->data = realloc(w->data, w->len + len + 1);
    memcpy(w->data + w->len, data, len);
    w->len += len;
    return (int64_t)len;
}

void file_write_finish(struct file_write *w)
{
    work_submit(w->m->pool, wrote, w);
}

static void aborted(void *arg)
{
    struct file_write *w = arg;
    struct err err = {0};
    err_set(&err, ERR_TRANSPORT_FAILED, "aborted", "the client went away");
    prove(w->m, &w->a, 502);
    w->cb.done(w->cb.arg, NULL, &err);
}

void file_write_abort(struct file_write *w)
{
    work_submit(w->m->pool, aborted, w);
}

void file_write_free(struct file_write *w)
{
    if (w)
        free(w->data);
    free(w);
}

struct file_write *archive_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                       const struct file_write_options *o, const struct admission *a,
                                       const struct file_write_callbacks *cb, struct err *err)
{
    return file_write_begin(m, sandbox_id, path, path_len, o, a, cb, err);
}
