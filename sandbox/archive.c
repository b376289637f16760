// Archives: tar streams that the guest's own tar makes and reads, as the guest user, run as a command that is not listed
// and whose streams are the client's. What tar may write is decided in the guest: its directory must resolve below the
// writable roots before it starts, and it runs with the user's rights.
#include "sandbox/command_int.h"
#include "sandbox/transfer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/path.h"

#define ARCHIVE_SECONDS 3600
#define EXIT_NO_SUCH_PATH 44
// $1 directory, $2 whole path, $3 last segment.
#define READ_SCRIPT                                                                                                    \
    "[ -e \"$2\" ] || [ -L \"$2\" ] || exit 44; command -v tar >/dev/null || exit 127; exec tar -C \"$1\" -cf - -- \"$3\""
#define WRITE_SCRIPT "command -v tar >/dev/null || exit 127; exec tar --no-same-owner -xf -"

struct transfer *archive_ref(struct command *c)
{
    atomic_fetch_add(&c->archive->refs, 1);
    return c->archive;
}

void archive_wake(struct transfer *t)
{
    pthread_mutex_lock(&t->s->lock);
    const bool gone = t->client_gone, told = t->info_told;
    t->info_told = true;
    pthread_mutex_unlock(&t->s->lock);
    if (!gone && t->kind == TRANSFER_WRITE) {
        t->write_cb.writable(t->write_cb.arg);
    } else if (!gone) {
        const struct msg_file_result info = {.kind = MSG_KIND_OTHER};
        if (!told)
            t->read_cb.info(t->read_cb.arg, &info, NULL);
        t->read_cb.readable(t->read_cb.arg);
    }
    transfer_unref(t);
}

static void acknowledge_locked(struct command *c, uint64_t stdout_offset)
{
    struct err err = {0};
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    const struct msg_offsets o = {.stdout_offset = stdout_offset, .stderr_offset = c->recv[1],
                                  .stdin_offset = c->stdin_credit};
    if (c->s->vm && c->s->session && msg_offsets_encode(&b, &o) == 0)
        (void)vm_send(c->s->vm, FRAME_ACK, c->row.agent_id, &b, &err);
}

void archive_credit_locked(struct transfer *t)
{
    if (!t->tar)
        return;
    acknowledge_locked(t->tar, t->ring.head);
    t->credited = t->ring.head;
}

bool archive_output_locked(struct command *c, const struct msg_data *d)
{
    struct transfer *t = c->archive;
    const int stream = d->stream == MSG_STDERR;
    if (d->offset != c->recv[stream])
        return false;
    if (stream == 1 || t->kind == TRANSFER_WRITE || t->client_gone) { // tar's words, or nobody listens
        c->recv[stream] += d->bytes.len;
        acknowledge_locked(c, t->client_gone ? c->recv[0] : t->ring.head);
        return false;
    }
    c->recv[0] += ring_put(&t->ring, d->bytes.data, d->bytes.len);
    return true;
}

size_t archive_write_locked(struct transfer *t, const uint8_t *data, size_t len)
{
    struct err err = {0};
    struct command *c = t->tar;
    if (!c || !c->known || c->exited || !t->s->vm || !t->s->session)
        return 0;
    const uint64_t window = VM_WINDOW_BYTES - (c->stdin_sent - c->stdin_credit);
    const size_t n = len < window ? len : (size_t)window;
    if (n == 0 ||
        vm_send_data(t->s->vm, FRAME_STDIN, c->row.agent_id, MSG_STDIN, c->stdin_sent, data, n, false, &err) != 0)
        return 0;
    c->stdin_sent += n;
    return n;
}

void archive_finish_locked(struct transfer *t)
{
    struct err err = {0};
    struct command *c = t->tar;
    if (c && c->known && t->s->vm) {
        (void)vm_send_data(t->s->vm, FRAME_STDIN, c->row.agent_id, MSG_STDIN, c->stdin_sent, NULL, 0, true, &err);
        c->stdin_eof_sent = true;
    } else {
        t->finished = false; // admitted() asks again
    }
}

void archive_stop_locked(struct transfer *t)
{
    struct err err = {0};
    struct command *c = t->tar;
    if (!c)
        return;
    c->aborted = true;
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    const struct msg_signal m = {.signal = 9, .group = true};
    if (c->sent && !c->exited && t->s->vm && msg_signal_encode(&b, &m) == 0)
        (void)vm_send(t->s->vm, FRAME_SIGNAL, c->row.agent_id, &b, &err);
    if (t->kind == TRANSFER_READ)
        acknowledge_locked(c, c->recv[0]); // so that tar is not held back while it dies
}

void archive_fill_row(struct command *c)
{
    struct transfer *t = c->archive;
    c->row.stdout_bytes = c->row.stdout_spooled = 0;
    uint8_t sum[SHA256_BYTES];
    if (t->kind == TRANSFER_READ)
        c->row.stdout_bytes = (int64_t)c->recv[0];
    else
        c->row.stdin_bytes = (int64_t)c->stdin_sent;
    if (t->hash && t->kind == TRANSFER_WRITE) {
        sha256_peek(t->hash, sum);
        crypto_digest_text(sum, t->result.sha256);
    }
}

static void judge(const struct command_row *row, bool read, struct err *err)
{
    if (row->outcome == OUTCOME_EXITED && row->exit_code == 0)
        return;
    if (row->outcome == OUTCOME_EXITED && row->exit_code == EXIT_NO_SUCH_PATH && read)
        err_set(err, ERR_NOT_FOUND, "file_not_found", "no such file or directory in the guest");
    else if (row->outcome == OUTCOME_EXITED && row->exit_code == 127) {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "archive", "the image has no tar");
        err_remedy(err, "use an image with tar, or transfer single files");
    } else if (read)
        err_set(err, ERR_GUEST_COMMAND_FAILED, "archive_failed", "the guest's tar could not read everything");
    else
        err_set(err, ERR_GUEST_COMMAND_FAILED, "archive_failed", "the guest's tar could not unpack the archive");
}

void archive_finished(struct command *c)
{
    struct transfer *t = c->archive;
    struct err err = c->err;
    const bool read = t->kind == TRANSFER_READ;
    if (err.kind == ERR_NONE)
        judge(&c->row, read, &err);
    if (err.kind == ERR_GUEST_COMMAND_FAILED && strncmp(err.detail, "working directory", 17) == 0)
        err_set(&err, ERR_NOT_FOUND, "file_not_found", "no such directory in the guest");
    pthread_mutex_lock(&t->s->lock);
    t->tar = NULL;
    c->archive = NULL;
    const bool told = t->info_told, gone = t->client_gone;
    t->info_told = true;
    if (err.kind == ERR_NONE) {
        t->eof = true;
    } else {
        t->over = true;
        t->err = err;
    }
    pthread_mutex_unlock(&t->s->lock);
    if (!read) {
        t->result.bytes = t->bytes;
        t->write_cb.done(t->write_cb.arg, err.kind == ERR_NONE ? &t->result : NULL, err.kind == ERR_NONE ? NULL : &err);
    } else if (!gone && !told && err.kind != ERR_NONE) {
        t->read_cb.info(t->read_cb.arg, NULL, &err);
    } else if (!gone) {
        const struct msg_file_result info = {.kind = MSG_KIND_OTHER};
        if (!told)
            t->read_cb.info(t->read_cb.arg, &info, NULL);
        t->read_cb.readable(t->read_cb.arg);
    }
    transfer_unref(t);
}

// ---- beginning ----------------------------------------------------------------------------------------------------
struct transfer *archive_known_locked(struct command *c)
{
    struct transfer *t = c->archive;
    if (!t || t->kind != TRANSFER_WRITE)
        return NULL;
    if (t->finish_wanted && !t->finished) { // an empty archive: the end was asked for before tar was there
        t->finished = true;
        archive_finish_locked(t);
    }
    return archive_ref(c);
}

static int launch(struct transfer *t, const char *const *words, const char *cwd, const char *user, bool make_dir,
                  struct err *err)
{
    CLEANUP_JSON json_t *argv = json_array();
    for (; *words; words++)
        json_array_append_new(argv, json_string(*words));
    const struct command_request r = {.argv = argv, .cwd = cwd, .user = user, .timeout_ms = ARCHIVE_SECONDS * 1000,
                                      .stdin_open = t->kind == TRANSFER_WRITE, .internal = true,
                                      .make_dir = make_dir};
    struct command *c = command_new(t->s, &r, &t->act.a, t->act.status, err);
    if (!c)
        return -1;
    c->archive = t;
    t->tar = c;
    command_launch(c, &r);
    return 0;
}

static struct transfer *begin(struct manager *m, enum transfer_kind kind, const char *sandbox_id, const char *path,
                              size_t path_len, const struct admission *a, int status, struct err *err)
{
    const char *fault = path_fault(path, path_len);
    if (fault) {
        err_set(err, ERR_VALIDATION, "path_invalid", "%s", fault);
        return NULL;
    }
    struct transfer *t = transfer_new(m, kind, sandbox_id, a, status, err);
    if (!t)
        return NULL;
    t->archive = true;
    t->hash = sha256_new();
    evidence_argv_hmac(m->store, path, path_len, t->path_digest);
    return t;
}

static void give_up(struct transfer *t)
{
    transfer_unref(t);
    transfer_unref(t);
}

struct file_read *archive_read_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                     const char *user, const struct admission *a, int success_status,
                                     const struct file_read_callbacks *cb, struct err *err)
{
    struct transfer *t = begin(m, TRANSFER_READ, sandbox_id, path, path_len, a, success_status, err);
    if (!t)
        return NULL;
    t->read_cb = *cb;
    char whole[LIMIT_PATH_BYTES + 1], dir[LIMIT_PATH_BYTES + 1];
    snprintf(whole, sizeof whole, "%.*s", (int)path_len, path);
    snprintf(dir, sizeof dir, "%s", whole);
    char *slash = strrchr(dir, '/');
    const char *last = whole[1] ? whole + (slash - dir) + 1 : ".";
    slash[slash == dir] = 0;
    const char *const words[] = {"/bin/sh", "-c", READ_SCRIPT, "archive", dir, whole, last, NULL};
    if (launch(t, words, "/", user, false, err) == 0)
        return (struct file_read *)t;
    give_up(t);
    return NULL;
}

struct file_write *archive_write_begin(struct manager *m, const char *sandbox_id, const char *path, size_t path_len,
                                       const struct file_write_options *o, const struct admission *a,
                                       const struct file_write_callbacks *cb, struct err *err)
{
    struct transfer *t = begin(m, TRANSFER_WRITE, sandbox_id, path, path_len, a, 200, err);
    if (!t)
        return NULL;
    t->write_cb = *cb;
    char whole[LIMIT_PATH_BYTES + 1];
    snprintf(whole, sizeof whole, "%.*s", (int)path_len, path);
    const char *const words[] = {"/bin/sh", "-c", WRITE_SCRIPT, "archive", NULL};
    if (launch(t, words, whole, o->user, o->mkdirs, err) == 0)
        return (struct file_write *)t;
    give_up(t);
    return NULL;
}
