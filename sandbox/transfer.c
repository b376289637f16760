// A transfer's life: who holds it, its window, its one end, and what the guest's refusals mean to a client.
#include "sandbox/transfer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/crypto.h"
#include "base/path.h"

// ---- a transfer's life ----------------------------------------------------------------------------------------------
static void act_done(struct act *act, const struct err *err);
static void act_go(struct act *act);

struct transfer *transfer_new(struct manager *m, enum transfer_kind kind, const char *sandbox_id,
                              const struct admission *a, int status, struct err *err)
{
    struct sandbox *s = registry_find(m, a->tenant, sandbox_id, NULL);
    if (!s) {
        struct sandbox_info *view = manager_get(m, a->tenant, sandbox_id, err);
        if (view) {
            sandbox_info_unref(view);
            err_set(err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is destroyed");
        }
        return NULL;
    }
    struct transfer *t = calloc(1, sizeof *t);
    if (!t) {
        sandbox_unref(s);
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    t->act = (struct act){.m = m, .a = *a, .status = status, .go = act_go, .done = act_done};
    snprintf(t->act.a.sandbox_id, sizeof t->act.a.sandbox_id, "%s", sandbox_id);
    t->s = s;
    t->kind = kind;
    t->refs = 2;
    t->deadline_ms = clock_mono_ms() + FILE_DEADLINE_MS;
    buf_init(&t->request, FRAME_PAYLOAD_MAX);
    return t;
}

static void held_free(struct msg_file_result *r)
{
    free(r);
}

void transfer_unref(struct transfer *t)
{
    if (atomic_fetch_sub(&t->refs, 1) > 1)
        return;
    buf_free(&t->request);
    sha256_free(t->hash);
    free(t->ring.data);
    held_free(t->held);
    sandbox_unref(t->s);
    free(t);
}

void transfer_list_locked(struct transfer *t)
{
    t->next = t->s->transfers;
    t->s->transfers = t;
    t->listed = true;
}

void transfer_unlist_locked(struct transfer *t)
{
    for (struct transfer **at = &t->s->transfers; *at; at = &(*at)->next)
        if (*at == t) {
            *at = t->next;
            break;
        }
    t->listed = false;
}

// By the port of its request, behind it.
void transfer_abort_locked(struct transfer *t)
{
    struct err ignored = {0};
    (void)(t->kind == TRANSFER_WRITE ? vm_send_bulk : vm_send)(t->s->vm, FRAME_FILE_ABORT, t->id, NULL, &ignored);
}

// What the receipt or audit entry says: byte counts and hashes, never names or content.
void transfer_facts(struct transfer *t)
{
    json_t *f = t->act.facts ? t->act.facts : json_object();
    t->act.facts = f;
    json_put_str(f, "path_hmac", t->path_digest);
    if (t->kind == TRANSFER_CALL)
        return;
    json_put_int(f, "bytes", (int64_t)t->bytes);
    if (t->hash) {
        uint8_t sum[SHA256_BYTES];
        char text[DIGEST_TEXT_MAX];
        sha256_peek(t->hash, sum);
        json_put_str(f, "sha256", crypto_digest_text(sum, text));
    }
}

void transfer_end(struct transfer *t, const struct err *err)
{
    transfer_facts(t);
    if (err && strcmp(err->code, "aborted") == 0)
        t->act.outcome = "aborted";
    if (t->kind == TRANSFER_WRITE && !err)
        t->act.status = t->result.created ? 201 : 200;
    act_end(&t->act, err);
}

// Admitted: to the guest.
static void act_go(struct act *act)
{
    struct transfer *t = (struct transfer *)act;
    struct sandbox *s = t->s;
    struct err err = {0};
    pthread_mutex_lock(&s->lock);
    if (t->over) {
        err = t->err;
    } else if (sandbox_require_running(s, &err) == 0) {
        t->id = vm_next_id(s->vm);
        transfer_list_locked(t);
        // An upload's content must find its request there: both go by the bulk port.
        const bool write = t->kind == TRANSFER_WRITE;
        if ((write ? vm_send_bulk : vm_send)(s->vm, FRAME_FILE, t->id, &t->request, &err) != 0)
            transfer_unlist_locked(t);
        else
            t->opened = true;
        if (t->opened && t->finish_wanted)
            transfer_write_finish_locked(t);
    }
    buf_free(&t->request);
    if (err.kind != ERR_NONE) {
        t->over = true;
        t->err = err;
    }
    pthread_mutex_unlock(&s->lock);
    if (err.kind != ERR_NONE)
        transfer_end(t, &err);
    else if (t->kind == TRANSFER_WRITE)
        t->write_cb.writable(t->write_cb.arg);
}

static void tell_call(struct transfer *t, const struct err *err)
{
    if (t->call_done)
        t->call_done(t->call_arg, err ? NULL : t->held, true, err);
}

static void tell_read(struct transfer *t, const struct err *err)
{
    pthread_mutex_lock(&t->s->lock);
    const bool told = t->info_told, gone = t->client_gone;
    t->info_told = true;
    pthread_mutex_unlock(&t->s->lock);
    if (gone)
        return;
    if (!told)
        t->read_cb.info(t->read_cb.arg, NULL, err);
    else
        t->read_cb.readable(t->read_cb.arg);
}

// Settled (or never admitted): tell the client, give up the operation's reference.
static void act_done(struct act *act, const struct err *err)
{
    struct transfer *t = (struct transfer *)act;
    pthread_mutex_lock(&t->s->lock);
    t->over = true;
    if (err)
        t->err = *err;
    pthread_mutex_unlock(&t->s->lock);
    switch (t->kind) {
    case TRANSFER_CALL:
        tell_call(t, err);
        break;
    case TRANSFER_READ:
        if (err)
            tell_read(t, err);
        break;
    case TRANSFER_WRITE:
        t->write_cb.done(t->write_cb.arg, err ? NULL : &t->result, err);
        break;
    }
    if (t->kind == TRANSFER_CALL)
        transfer_unref(t); // calls have no handle
    transfer_unref(t);
}

// ---- the guest's refusals -----------------------------------------------------------------------------------------
void transfer_refusal(const struct msg_file_result *r, struct err *err)
{
    switch ((enum msg_file_status)r->status) {
    case MSG_FILE_OK:
        return;
    case MSG_FILE_NOT_FOUND:
        err_set(err, ERR_NOT_FOUND, "file_not_found", "no such file or directory in the guest");
        return;
    case MSG_FILE_PERMISSION:
        err_set(err, ERR_POLICY_DENIED, "permission_denied", "the guest's file permissions do not allow it");
        return;
    case MSG_FILE_OUTSIDE_ROOTS:
        err_set(err, ERR_POLICY_DENIED, "path_outside_roots", "writes go below /work, /tmp and /home only");
        err_remedy(err, "choose a path below one of them; symbolic links are resolved first");
        return;
    case MSG_FILE_NOT_REGULAR:
        err_set(err, ERR_VALIDATION, "not_a_regular_file", "the path is not a regular file");
        return;
    case MSG_FILE_IS_DIRECTORY:
        err_set(err, ERR_VALIDATION, "not_a_regular_file", "the path is a directory");
        return;
    case MSG_FILE_EXISTS:
        err_set(err, ERR_PRECONDITION_FAILED, "exists", "the path exists already");
        return;
    case MSG_FILE_NOT_DIRECTORY:
        err_set(err, ERR_VALIDATION, "not_a_directory", "a component of the path is not a directory");
        return;
    case MSG_FILE_NOT_EMPTY:
        err_set(err, ERR_CONFLICT, "not_empty", "the directory is not empty");
        err_remedy(err, "use recursive=true to remove it with its content");
        return;
    case MSG_FILE_NO_SPACE:
        err_set(err, ERR_CONFLICT, "guest_disk_full", "the sandbox's disk is full");
        return;
    case MSG_FILE_RANGE:
        err_set(err, ERR_RANGE, "range_not_satisfiable", "the range begins past the end of the file");
        return;
    case MSG_FILE_PATH_INVALID:
        err_set(err, ERR_VALIDATION, "path_invalid", "the path is not valid");
        return;
    case MSG_FILE_USER_UNKNOWN:
        err_set(err, ERR_VALIDATION, "user_unknown", "no such user in the guest");
        return;
    case MSG_FILE_ABORTED:
        err_set(err, ERR_TRANSPORT_FAILED, "aborted", "the transfer was cut");
        return;
    case MSG_FILE_BUSY:
        err_set(err, ERR_RATE_LIMITED, "too_many_transfers", "the guest serves as many file operations as it can");
        return;
    case MSG_FILE_READ_ONLY:
        err_set(err, ERR_POLICY_DENIED, "read_only", "that part of the guest's filesystem is read-only");
        return;
    case MSG_FILE_LOOP:
        err_set(err, ERR_VALIDATION, "symlink_loop", "too many symbolic links in the path");
        return;
    case MSG_FILE_NAME_TOO_LONG:
        err_set(err, ERR_VALIDATION, "path_invalid", "a name in the path is too long for the guest");
        return;
    case MSG_FILE_ERROR:
        break;
    }
    err_set(err, ERR_TRANSPORT_FAILED, "guest_io_error", "the guest could not do it (error %llu)",
            (unsigned long long)r->sys_errno);
}

// ---- rings ------------------------------------------------------------------------------------------------------
size_t ring_put(struct ring *r, const uint8_t *data, size_t len)
{
    if (!r->data && !(r->data = malloc(RING_BYTES)))
        return 0;
    const size_t room = RING_BYTES - (size_t)(r->tail - r->head);
    const size_t n = len < room ? len : room;
    for (size_t done = 0; done < n;) {
        const size_t at = (size_t)((r->tail + done) % RING_BYTES);
        const size_t piece = n - done < RING_BYTES - at ? n - done : RING_BYTES - at;
        memcpy(r->data + at, data + done, piece);
        done += piece;
    }
    r->tail += n;
    return n;
}

size_t ring_take(struct ring *r, uint8_t *out, size_t cap)
{
    const size_t have = (size_t)(r->tail - r->head);
    const size_t n = cap < have ? cap : have;
    for (size_t done = 0; done < n;) {
        const size_t at = (size_t)((r->head + done) % RING_BYTES);
        const size_t piece = n - done < RING_BYTES - at ? n - done : RING_BYTES - at;
        memcpy(out + done, r->data + at, piece);
        done += piece;
    }
    r->head += n;
    return n;
}
