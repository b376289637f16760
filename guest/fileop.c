// File operations: a queue and a few threads, so that control never waits for a disk. A stream takes a thread only for one
// chunk at a time; a slow host holds none.
#include "guest/fileop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILE_THREADS 3
#define OPS_MAX 64
#define BATCH_BYTES (256u << 10) // of an upload, before a thread is woken for it while more is coming
#define READ_AHEAD LIMIT_UNACKED_STREAM_BYTES
#define IN_MAX (LIMIT_UNACKED_STREAM_BYTES + CHUNK_BYTES)

static pthread_mutex_t file_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t file_work = PTHREAD_COND_INITIALIZER;
static struct fileop *ops, *queue_head, *queue_tail;
static unsigned n_ops;
static bool gathering; // the main thread's: some upload has content that no thread was woken for

// ---- answering (any thread) ---------------------------------------------------------------------------------------------
static bool send_result(struct fileop *op, int type, const struct msg_file_result *r, bool last)
{
    struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    const bool ok = msg_file_result_encode(&b, r) == 0 &&
                    port_send_buf(&control_port, (uint8_t)type, last ? FRAME_LAST : 0, op->id, &b);
    buf_free(&b);
    return ok;
}

static void answer(struct fileop *op, int status, struct msg_file_result *r)
{
    r->status = (uint64_t)status;
    r->sys_errno = status == MSG_FILE_OK ? 0 : (uint64_t)errno;
    send_result(op, FRAME_FILE_RESULT, r, true);
}

static bool emit(struct fileop *op, const struct msg_file_result *r, bool last)
{
    return send_result(op, FRAME_FILE_RESULT, r, last);
}

static void credit(struct fileop *op)
{
    struct buf b = BUF_INIT(256);
    const struct msg_offsets o = {.file_offset = op->at};
    op->credit = op->at;
    if (msg_offsets_encode(&b, &o) == 0)
        port_send_buf(&control_port, FRAME_FILE_CREDIT, 0, op->id, &b);
    buf_free(&b);
}

// ---- the operation's life -------------------------------------------------------------------------------------------------
static void free_chunks(struct chunk *c)
{
    while (c) {
        struct chunk *next = c->next;
        free(c);
        c = next;
    }
}

// Under file_lock; nobody works on it any more.
static void unlink_op(struct fileop *op)
{
    for (struct fileop **at = &ops; *at; at = &(*at)->next)
        if (*at == op) {
            *at = op->next;
            n_ops--;
            break;
        }
    free_chunks(op->in);
    free_chunks(op->out);
    free(op->path);
    free(op->to);
    free(op);
}

static struct fileop *by_id(uint64_t id)
{
    struct fileop *op = ops;
    while (op && (op->id != id || op->done))
        op = op->next;
    return op;
}

static bool append(struct fileop *op)
{
    if (op->queued || op->working)
        return false; // it looks again when it is through
    op->queued = true;
    op->next_work = NULL;
    if (queue_tail)
        queue_tail->next_work = op;
    else
        queue_head = op;
    queue_tail = op;
    return true;
}

static void enqueue(struct fileop *op)
{
    if (append(op))
        pthread_cond_signal(&file_work);
}

// ---- steps (file threads, not under the lock) ---------------------------------------------------------------------------
enum step { STEP_WAIT, STEP_AGAIN, STEP_DONE };

static enum step read_step(struct fileop *op)
{
    struct msg_file_result r = {0};
    struct chunk *c = malloc(sizeof *c + CHUNK_BYTES);
    if (!c)
        return STEP_WAIT;
    size_t want = CHUNK_BYTES;
    if (op->end - op->at < want)
        want = (size_t)(op->end - op->at);
    ssize_t n = 0;
    size_t have = 0;
    while (have < want && (n = pread(op->fd, c->data + have, want - have, (off_t)(op->offset + op->at + have))) != 0) {
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break;
        have += (size_t)n;
    }
    if (n < 0) {
        free(c);
        answer(op, MSG_FILE_ERROR, &r);
        return STEP_DONE;
    }
    c->next = NULL; // by member: the content begins in the structure's own padding
    c->offset = op->at;
    c->len = have;
    c->last = have < want || op->at + have == op->end;
    op->at += have;
    pthread_mutex_lock(&file_lock);
    if (op->out)
        op->out_last->next = c;
    else
        op->out = c;
    op->out_last = c;
    const bool last = c->last, room = op->at - op->credit + CHUNK_BYTES <= READ_AHEAD;
    pthread_mutex_unlock(&file_lock);
    loop_wake();
    if (last)
        fileact_discard(op); // the descriptor; the record stays until its last chunk is sent
    return last ? STEP_WAIT : room ? STEP_AGAIN : STEP_WAIT;
}

static enum step write_step(struct fileop *op)
{
    struct msg_file_result r = {0};
    pthread_mutex_lock(&file_lock);
    struct chunk *c = op->in;
    if (c && !(op->in = c->next))
        op->in_last = NULL;
    pthread_mutex_unlock(&file_lock);
    if (!c)
        return STEP_WAIT;
    const bool last = c->last;
    int status = MSG_FILE_OK;
    for (size_t done = 0; done < c->len && status == MSG_FILE_OK;) {
        const ssize_t n = write(op->fd, c->data + done, c->len - done);
        if (n > 0)
            done += (size_t)n;
        else if (n < 0 && errno != EINTR)
            status = fileact_status(errno);
    }
    op->at += c->len;
    pthread_mutex_lock(&file_lock);
    op->in_bytes -= c->len;
    const bool more = op->in != NULL;
    pthread_mutex_unlock(&file_lock);
    free(c);
    if (status == MSG_FILE_OK && !last) {
        if (!more || op->at - op->credit >= BATCH_BYTES)
            credit(op);
        return more ? STEP_AGAIN : STEP_WAIT;
    }
    if (status == MSG_FILE_OK)
        status = fileact_commit(op, &r);
    const int code = errno;
    fileact_discard(op);
    errno = code;
    answer(op, status, &r);
    return STEP_DONE;
}

static enum step begin(struct fileop *op)
{
    struct msg_file_result r = {0};
    int status;
    switch ((enum msg_file_op)op->op) {
    case MSG_FILE_READ:
        status = fileact_open_read(op, &r);
        if (status != MSG_FILE_OK)
            break;
        r.status = MSG_FILE_OK;
        send_result(op, FRAME_FILE_INFO, &r, false);
        return STEP_AGAIN;
    case MSG_FILE_WRITE:
        status = fileact_open_write(op);
        if (status != MSG_FILE_OK)
            break;
        return STEP_AGAIN;
    case MSG_DIR_LIST:
        status = fileact_list(op, emit);
        if (status == MSG_FILE_OK)
            return STEP_DONE;
        break;
    case MSG_FILE_STAT:
    case MSG_FILE_DELETE:
    case MSG_FILE_MOVE:
    case MSG_DIR_MAKE:
    case MSG_FILE_CHECK_WRITE:
        status = fileact_simple(op, &r);
        break;
    default:
        status = MSG_FILE_ERROR;
        errno = ENOSYS;
        break;
    }
    answer(op, status, &r);
    return STEP_DONE;
}

static enum step work(struct fileop *op)
{
    fileact_credentials(&op->user);
    if (!op->opened) {
        op->opened = true;
        return begin(op);
    }
    return op->op == MSG_FILE_READ ? read_step(op) : write_step(op);
}

static bool wants_more(const struct fileop *op)
{
    if (op->op == MSG_FILE_WRITE)
        return op->in != NULL;
    return op->op == MSG_FILE_READ && op->fd >= 0 && op->at - op->credit + CHUNK_BYTES <= READ_AHEAD;
}

static void *thread(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&file_lock);
    for (;;) {
        while (!queue_head)
            pthread_cond_wait(&file_work, &file_lock);
        struct fileop *op = queue_head;
        queue_head = op->next_work;
        if (!queue_head)
            queue_tail = NULL;
        op->queued = false;
        op->working = true;
        const bool aborted = op->aborted;
        pthread_mutex_unlock(&file_lock);
        enum step s = STEP_DONE;
        if (aborted) {
            fileact_credentials(&op->user);
            fileact_discard(op);
        } else {
            s = work(op);
        }
        pthread_mutex_lock(&file_lock);
        op->working = false;
        if (s == STEP_DONE) {
            op->done = true;
            unlink_op(op);
        } else if (op->aborted || s == STEP_AGAIN || wants_more(op)) {
            (void)append(op); // this thread is the next to look: no other is woken
        }
    }
    return NULL;
}

void fileop_start(void)
{
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 128 << 10);
    for (int i = 0; i < FILE_THREADS; i++) {
        pthread_t id;
        pthread_create(&id, &attr, thread, NULL);
    }
    pthread_attr_destroy(&attr);
}

// ---- from the host (main thread) --------------------------------------------------------------------------------------------
static char *text_of(struct slice s)
{
    char *text = s.len <= LIMIT_PATH_BYTES ? malloc(s.len + 1) : NULL;
    if (text) {
        memcpy(text, s.data, s.len);
        text[s.len] = 0;
    }
    return text;
}

static void refuse(uint64_t id, int status)
{
    struct fileop none = {.id = id};
    struct msg_file_result r = {0};
    errno = 0;
    answer(&none, status, &r);
}

void fileop_begin(uint64_t id, const struct msg_file *m)
{
    struct fileop *op = n_ops < OPS_MAX ? calloc(1, sizeof *op) : NULL;
    if (!op) {
        refuse(id, MSG_FILE_BUSY);
        return;
    }
    *op = (struct fileop){.id = id, .op = m->op, .path = text_of(m->path), .to = text_of(m->to),
                          .mode = (unsigned)m->mode & 07777, .mkdirs = m->mkdirs, .recursive = m->recursive,
                          .exclusive = m->exclusive, .offset = m->offset, .length = m->length, .depth = m->depth,
                          .max_entries = m->max_entries, .fd = -1, .dirfd = -1};
    const int status = !op->path || !op->to || memchr(m->path.data, 0, m->path.len) ? MSG_FILE_PATH_INVALID
                       : user_find((const char *)m->user.data, m->user.len, &op->user) != 0
                           ? MSG_FILE_USER_UNKNOWN
                           : MSG_FILE_OK;
    if (status != MSG_FILE_OK) {
        free(op->path);
        free(op->to);
        free(op);
        refuse(id, status);
        return;
    }
    pthread_mutex_lock(&file_lock);
    op->next = ops;
    ops = op;
    n_ops++;
    enqueue(op);
    pthread_mutex_unlock(&file_lock);
}

// What does not fit in, or is not next, is dropped and so is all behind it: the host's deadline ends a transfer that
// stalls, a file with a hole would be a lie.
void fileop_data(uint64_t id, const struct msg_data *d, bool last)
{
    struct chunk *c = malloc(sizeof *c + d->bytes.len);
    if (!c)
        return;
    *c = (struct chunk){.offset = d->offset, .len = d->bytes.len, .last = last};
    if (d->bytes.len)
        memcpy(c->data, d->bytes.data, d->bytes.len);
    pthread_mutex_lock(&file_lock);
    struct fileop *op = by_id(id);
    const bool take = op && op->op == MSG_FILE_WRITE && !op->aborted && d->offset == op->in_end &&
                      op->in_bytes + c->len <= IN_MAX;
    if (take) {
        op->in_end += c->len;
        if (op->in_last)
            op->in_last->next = c;
        else
            op->in = c;
        op->in_last = c;
        op->in_bytes += c->len;
        if (last || op->in_bytes >= BATCH_BYTES)
            enqueue(op);
        else
            op->gathers = gathering = true;
    }
    pthread_mutex_unlock(&file_lock);
    if (!take)
        free(c);
}

void fileop_settle(void)
{
    if (!gathering)
        return;
    pthread_mutex_lock(&file_lock);
    for (struct fileop *op = ops; op; op = op->next) {
        if (op->gathers && op->in)
            enqueue(op);
        op->gathers = false;
    }
    gathering = false;
    pthread_mutex_unlock(&file_lock);
}

void fileop_credit(uint64_t id, uint64_t offset)
{
    pthread_mutex_lock(&file_lock);
    struct fileop *op = by_id(id);
    if (op && op->op == MSG_FILE_READ && offset > op->credit && offset <= op->at) {
        op->credit = offset;
        if (op->working || wants_more(op))
            enqueue(op);
    }
    pthread_mutex_unlock(&file_lock);
}

static void abort_locked(struct fileop *op)
{
    op->aborted = true;
    enqueue(op); // a thread closes its files and removes what was temporary
}

void fileop_abort(uint64_t id)
{
    pthread_mutex_lock(&file_lock);
    struct fileop *op = by_id(id);
    if (op)
        abort_locked(op);
    pthread_mutex_unlock(&file_lock);
}

void fileop_session_lost(void)
{
    pthread_mutex_lock(&file_lock);
    for (struct fileop *op = ops; op; op = op->next)
        abort_locked(op);
    pthread_mutex_unlock(&file_lock);
}

bool fileop_pump(void)
{
    pthread_mutex_lock(&file_lock);
    struct fileop *op = ops;
    while (op && (!op->out || op->aborted))
        op = op->next;
    struct chunk *c = op ? op->out : NULL;
    bool sent = false;
    if (c) {
        uint8_t head[MSG_DATA_HEADER];
        msg_data_header(head, MSG_FILE, c->offset);
        sent = port_send(&bulk_port, FRAME_FILE_DATA, c->last ? FRAME_LAST : 0, op->id, head, sizeof head, c->data,
                         c->len);
    }
    if (sent) {
        if (!(op->out = c->next))
            op->out_last = NULL;
        if (c->last) {
            struct msg_file_result r = {.status = MSG_FILE_OK, .size = op->at};
            send_result(op, FRAME_FILE_RESULT, &r, true);
            op->aborted = true; // nothing is left to do but to let go
            enqueue(op);
        }
        free(c);
    }
    pthread_mutex_unlock(&file_lock);
    return sent;
}
