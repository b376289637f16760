// Files of a guest: calls, reads and writes over the agent, in bounded windows.
#include "sandbox/transfer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/crypto.h"
#include "base/path.h"

static struct transfer *find_locked(struct sandbox *s, uint64_t id)
{
    struct transfer *t = s->transfers;
    while (t && t->id != id)
        t = t->next;
    return t;
}

// ---- calls ------------------------------------------------------------------------------------------------------
static int encode(struct transfer *t, const struct msg_file *msg, struct err *err)
{
    const char *fault = path_fault((const char *)msg->path.data, msg->path.len);
    if (!fault && msg->op == MSG_FILE_MOVE)
        fault = path_fault((const char *)msg->to.data, msg->to.len);
    if (fault)
        return err_set(err, ERR_VALIDATION, "path_invalid", "%s", fault);
    evidence_argv_hmac(t->act.m->store, msg->path.data, msg->path.len, t->path_digest);
    if (msg_file_encode(&t->request, msg) != 0 || frame_has_magic(t->request.data, t->request.len))
        return err_set(err, ERR_VALIDATION, "path_invalid", "the path cannot be sent to the guest");
    return 0;
}

int file_call(struct manager *m, const struct file_call *call, const struct admission *a, int success_status,
              void (*done)(void *arg, const struct msg_file_result *result, bool last, const struct err *err), void *arg)
{
    struct err err = {0};
    struct transfer *t = transfer_new(m, TRANSFER_CALL, call->sandbox_id, a, success_status, &err);
    if (!t || encode(t, &call->msg, &err) != 0) {
        if (t) {
            transfer_unref(t);
            transfer_unref(t);
        }
        done(arg, NULL, true, &err);
        return 0;
    }
    t->call_done = done;
    t->call_arg = arg;
    act_begin(&t->act);
    return 0;
}

// A result that must outlive its frame: settled acts answer later. Their results carry no slices that matter.
static void hold(struct transfer *t, const struct msg_file_result *r, struct err *err)
{
    t->held = malloc(sizeof *t->held);
    if (!t->held) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return;
    }
    *t->held = *r;
    t->held->owner = t->held->group = t->held->target = (struct slice){0};
    t->held->n_entries = 0;
}

// With a receipt the result is held until the act is settled; without, the client gets it as it came.
static void call_result(struct transfer *t, const struct msg_file_result *r, bool last)
{
    struct err err = {0};
    transfer_refusal(r, &err);
    const bool receipt = *t->act.a.receipt_id;
    if (err.kind != ERR_NONE || receipt) {
        if (err.kind == ERR_NONE)
            hold(t, r, &err);
        transfer_end(t, err.kind != ERR_NONE ? &err : NULL);
        return;
    }
    t->call_done(t->call_arg, r, last, NULL);
    if (!last)
        return;
    t->call_done = NULL;
    transfer_end(t, NULL);
}

// ---- reads ------------------------------------------------------------------------------------------------------
struct file_read *file_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                  const char *user, uint64_t offset, uint64_t length, const struct admission *a,
                                  int success_status, const struct file_read_callbacks *cb, struct err *err)
{
    struct transfer *t = transfer_new(m, TRANSFER_READ, sandbox_id, a, success_status, err);
    if (!t)
        return NULL;
    const struct msg_file msg = {.op = MSG_FILE_READ, .path = {(const uint8_t *)path, path_len},
                                 .user = {(const uint8_t *)user, strlen(user)}, .offset = offset, .length = length};
    t->read_cb = *cb;
    t->hash = sha256_new();
    if (encode(t, &msg, err) != 0) {
        transfer_unref(t);
        transfer_unref(t);
        return NULL;
    }
    act_begin(&t->act);
    return (struct file_read *)t;
}

// Tells the guest that window is free again, in steps so that small takes do not become many frames.
static void credit_read_locked(struct transfer *t)
{
    struct err err = {0};
    if (t->over || !t->s->vm || t->ring.head - t->credited < VM_WINDOW_BYTES / 4)
        return;
    if (t->archive) {
        archive_credit_locked(t);
        return;
    }
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    const struct msg_offsets o = {.file_offset = t->ring.head};
    if (msg_offsets_encode(&b, &o) == 0 && vm_send(t->s->vm, FRAME_FILE_CREDIT, t->id, &b, &err) == 0)
        t->credited = t->ring.head;
}

int64_t file_read_take(struct file_read *r, void *out, size_t cap)
{
    struct transfer *t = (struct transfer *)r;
    pthread_mutex_lock(&t->s->lock);
    int64_t n = (int64_t)ring_take(&t->ring, out, cap);
    if (n > 0) {
        t->bytes += (uint64_t)n;
        t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
        credit_read_locked(t);
    } else if (t->eof) {
        n = -1;
    } else if (t->over) {
        n = -2;
    }
    pthread_mutex_unlock(&t->s->lock);
    if (n > 0 && t->hash)
        sha256_update(t->hash, out, (size_t)n);
    return n;
}

void file_read_end(struct file_read *r)
{
    struct transfer *t = (struct transfer *)r;
    struct sandbox *s = t->s;
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    const bool complete = t->eof && t->ring.head == t->ring.tail;
    if (t->archive) { // its command settles it
        t->client_gone = true;
        if (!complete)
            archive_stop_locked(t);
        pthread_mutex_unlock(&s->lock);
        transfer_unref(t);
        return;
    }
    const bool settle = !t->over && (t->listed || t->eof);
    const bool early = !t->over && !t->listed && !t->eof; // not yet admitted: go() sees over
    t->client_gone = true;
    if (!complete)
        err_set(&err, ERR_TRANSPORT_FAILED, "aborted", "the client went away");
    if (t->listed) {
        transfer_unlist_locked(t);
        if (s->vm && s->session)
            transfer_abort_locked(t);
    }
    if (settle || early) {
        t->over = true;
        t->err = err;
    }
    pthread_mutex_unlock(&s->lock);
    if (settle)
        transfer_end(t, complete ? NULL : &err);
    transfer_unref(t);
}

void transfers_on_info(struct sandbox *s, uint64_t id, const struct msg_file_result *r)
{
    pthread_mutex_lock(&s->lock);
    struct transfer *t = find_locked(s, id);
    const bool tell = t && t->kind == TRANSFER_READ && !t->info_told && !t->client_gone;
    if (tell) {
        t->info_told = true;
        atomic_fetch_add(&t->refs, 1);
    }
    pthread_mutex_unlock(&s->lock);
    if (!tell)
        return;
    t->read_cb.info(t->read_cb.arg, r, NULL);
    transfer_unref(t);
}

void transfers_on_data(struct sandbox *s, uint64_t id, const struct msg_data *d, bool last)
{
    pthread_mutex_lock(&s->lock);
    struct transfer *t = find_locked(s, id);
    bool tell = false, broken = false;
    if (t && t->kind == TRANSFER_READ && !t->client_gone && !t->eof && d->offset == t->ring.tail) {
        t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
        broken = ring_put(&t->ring, d->bytes.data, d->bytes.len) != d->bytes.len;
        t->eof = last && !broken;
        tell = true;
        atomic_fetch_add(&t->refs, 1);
        if (broken) { // more than the window: not an honest agent
            transfer_unlist_locked(t);
            t->over = true;
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (!tell)
        return;
    if (broken) {
        struct err err = {0};
        err_set(&err, ERR_TRANSPORT_FAILED, "agent_violation", "the guest sent more than it may");
        transfer_end(t, &err);
    } else {
        t->read_cb.readable(t->read_cb.arg);
    }
    transfer_unref(t);
}

// ---- writes -----------------------------------------------------------------------------------------------------
struct file_write *file_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                    const struct file_write_options *o, const struct admission *a,
                                    const struct file_write_callbacks *cb, struct err *err)
{
    if (store_reserve_check(m->store, err) != 0)
        return NULL;
    struct transfer *t = transfer_new(m, TRANSFER_WRITE, sandbox_id, a, 200, err);
    if (!t)
        return NULL;
    const struct msg_file msg = {.op = MSG_FILE_WRITE, .path = {(const uint8_t *)path, path_len},
                                 .user = {(const uint8_t *)o->user, strlen(o->user)}, .mode = o->mode,
                                 .mkdirs = o->mkdirs, .exclusive = o->exclusive};
    t->write_cb = *cb;
    t->hash = sha256_new();
    if (encode(t, &msg, err) != 0) {
        transfer_unref(t);
        transfer_unref(t);
        return NULL;
    }
    act_begin(&t->act);
    return (struct file_write *)t;
}

static size_t write_locked(struct transfer *t, const uint8_t *data, size_t len)
{
    struct err err = {0};
    const uint64_t window = VM_WINDOW_BYTES - (t->sent - t->credit);
    const size_t n = len < window ? len : (size_t)window;
    if (n == 0)
        return 0;
    t->blocked = vm_send_data(t->s->vm, FRAME_FILE_DATA, t->id, MSG_FILE, t->sent, data, n, false, &err) != 0;
    if (t->blocked)
        return 0; // others have filled the channel: transfers_tick asks again
    t->sent += n;
    return n;
}

int64_t file_write_push(struct file_write *w, const void *data, size_t len)
{
    struct transfer *t = (struct transfer *)w;
    int64_t n = 0;
    pthread_mutex_lock(&t->s->lock);
    if (t->over)
        n = -1;
    else if (t->archive)
        n = (int64_t)archive_write_locked(t, data, len);
    else if (t->opened && t->s->vm && t->s->session)
        n = (int64_t)write_locked(t, data, len);
    if (n > 0) {
        t->bytes += (uint64_t)n;
        t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
    }
    pthread_mutex_unlock(&t->s->lock);
    if (n > 0 && t->hash)
        sha256_update(t->hash, data, (size_t)n);
    return n;
}

void transfer_write_finish_locked(struct transfer *t)
{
    struct err err = {0};
    if (t->finished || t->over || !t->s->vm || !(t->archive || t->opened))
        return;
    t->finished = true;
    t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
    if (t->archive)
        archive_finish_locked(t);
    else
        t->finished = vm_send_data(t->s->vm, FRAME_FILE_DATA, t->id, MSG_FILE, t->sent, NULL, 0, true, &err) == 0;
}

void file_write_finish(struct file_write *w)
{
    struct transfer *t = (struct transfer *)w;
    pthread_mutex_lock(&t->s->lock);
    t->finish_wanted = true;
    transfer_write_finish_locked(t);
    pthread_mutex_unlock(&t->s->lock);
}

void file_write_abort(struct file_write *w)
{
    struct transfer *t = (struct transfer *)w;
    struct sandbox *s = t->s;
    struct err err = {0};
    err_set(&err, ERR_TRANSPORT_FAILED, "aborted", "the client went away");
    pthread_mutex_lock(&s->lock);
    if (t->archive) { // its command settles it
        archive_stop_locked(t);
        pthread_mutex_unlock(&s->lock);
        return;
    }
    const bool settle = !t->over && t->listed && !t->finished;
    if (settle) {
        transfer_unlist_locked(t);
        if (s->vm && s->session)
            transfer_abort_locked(t);
    }
    if (settle || (!t->over && !t->listed)) {
        t->over = true;
        t->err = err;
    }
    pthread_mutex_unlock(&s->lock);
    if (settle)
        transfer_end(t, &err);
}

void file_write_free(struct file_write *w)
{
    if (w)
        transfer_unref((struct transfer *)w);
}

void transfers_on_credit(struct sandbox *s, uint64_t id, uint64_t offset)
{
    pthread_mutex_lock(&s->lock);
    struct transfer *t = find_locked(s, id);
    bool tell = false;
    if (t && t->kind == TRANSFER_WRITE && offset <= t->sent && offset > t->credit) {
        t->credit = offset;
        t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
        tell = !t->over;
        if (tell)
            atomic_fetch_add(&t->refs, 1);
    }
    pthread_mutex_unlock(&s->lock);
    if (!tell)
        return;
    t->write_cb.writable(t->write_cb.arg);
    transfer_unref(t);
}

// ---- results, losses, deadlines ---------------------------------------------------------------------------------------
static void write_result(struct transfer *t, const struct msg_file_result *r, const struct err *err)
{
    uint8_t sum[SHA256_BYTES];
    if (t->hash) {
        sha256_peek(t->hash, sum);
        crypto_digest_text(sum, t->result.sha256);
    }
    t->result.bytes = t->bytes;
    t->result.created = r && r->created;
    transfer_end(t, err);
}

void transfers_on_result(struct sandbox *s, uint64_t id, const struct msg_file_result *r, bool last)
{
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    struct transfer *t = find_locked(s, id);
    // A read ends by its data, on the other port: it stays listed until the client took the rest.
    const bool read_through = t && t->kind == TRANSFER_READ && r->status == MSG_FILE_OK;
    if (!read_through && t && (last || r->status != MSG_FILE_OK)) {
        last = true;
        transfer_unlist_locked(t);
    }
    if (t)
        t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
    pthread_mutex_unlock(&s->lock);
    if (!t || read_through)
        return;
    transfer_refusal(r, &err);
    switch (t->kind) {
    case TRANSFER_CALL:
        call_result(t, r, last);
        break;
    case TRANSFER_READ: // the end of content came with the data; a refusal or an error ends it here
        transfer_end(t, &err);
        break;
    case TRANSFER_WRITE:
        if (err.kind == ERR_NONE && r->size != t->bytes)
            err_set(&err, ERR_TRANSPORT_FAILED, "short_write", "the guest wrote another number of bytes");
        write_result(t, r, err.kind != ERR_NONE ? &err : NULL);
        break;
    }
}

// A read that is complete here, or whose client is slow, does not fail for the guest's silence.
static bool spared(const struct transfer *t, int64_t now_ms)
{
    if (t->kind == TRANSFER_READ && (t->eof || (now_ms && t->ring.tail > t->ring.head)))
        return true;
    return now_ms && now_ms < t->deadline_ms;
}

// Ends those that are not spared; each is taken off the list first, outside any callback.
static void fail_where(struct sandbox *s, int64_t now_ms, const struct err *err)
{
    for (;;) {
        pthread_mutex_lock(&s->lock);
        struct transfer *t = s->transfers;
        while (t && spared(t, now_ms))
            t = t->next;
        if (t) {
            transfer_unlist_locked(t);
            t->over = true;
            t->err = *err;
            if (now_ms && s->vm && s->session)
                transfer_abort_locked(t);
        }
        pthread_mutex_unlock(&s->lock);
        if (!t)
            return;
        transfer_end(t, err);
    }
}

void transfers_fail_all(struct sandbox *s, const struct err *err)
{
    fail_where(s, 0, err);
}

// Uploads that found the channel full try again.
static void unblock(struct sandbox *s)
{
    struct transfer *blocked[8];
    size_t n = 0;
    pthread_mutex_lock(&s->lock);
    for (struct transfer *t = s->transfers; t; t = t->next) {
        if (t->kind != TRANSFER_WRITE || t->archive || t->over)
            continue;
        if (t->finish_wanted)
            transfer_write_finish_locked(t);
        if (t->blocked && n < sizeof blocked / sizeof *blocked) {
            t->blocked = false;
            atomic_fetch_add(&t->refs, 1);
            blocked[n++] = t;
        }
    }
    pthread_mutex_unlock(&s->lock);
    for (size_t i = 0; i < n; i++) {
        blocked[i]->write_cb.writable(blocked[i]->write_cb.arg);
        transfer_unref(blocked[i]);
    }
}

void transfers_tick(struct sandbox *s, int64_t now_ms)
{
    struct err err = {0};
    unblock(s);
    err_set(&err, ERR_TIMEOUT, "agent_timeout", "the guest did not answer a file operation in time");
    fail_where(s, now_ms, &err);
}
