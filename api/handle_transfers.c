// File contents and archives, streamed both ways in the windows of the agent.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/range.h"
#include "api/reply.h"
#include "base/fd.h"
#include "sandbox/files.h"

// ---- reading ------------------------------------------------------------------------------------------------------
// A range and a HEAD need the size first: a probe of one byte, without evidence of its own, tells it.
enum reading_phase { READING_PROBE, READING_CONTENT };

struct reading {
    struct file_read *file;
    enum reading_phase phase;
    bool archive, ranged;
    uint64_t size, offset, length;
    bool known;              // file is set: begin has returned
    struct err err;
};

static void begin_content(struct api_call *c);

static void reading_free(struct api_call *c)
{
    free(c->state);
    c->state = NULL;
}

static int64_t reading_read(struct api_call *c, void *out, size_t cap)
{
    struct reading *r = c->state;
    if (atomic_load(&c->ending) || !principal_live(c->who))
        return -2;
    return file_read_take(r->file, out, cap);
}

static void reading_close(struct api_call *c, bool completed)
{
    struct reading *r = c->state;
    (void)completed; // the transfer itself knows whether everything went
    file_read_end(r->file);
    r->file = NULL;
}

static const struct stream_ops READING_OPS = {reading_read, reading_close, reading_free};

static void content_headers(struct api_call *c)
{
    reply_header(c, "X-Content-Type-Options", "nosniff");
    if (!((struct reading *)c->state)->archive)
        reply_header(c, "Accept-Ranges", "bytes");
    reply_header(c, "Content-Disposition", "attachment");
}

static void range_refused(struct api_call *c, uint64_t size)
{
    struct err err = {0};
    c->in->content_range = call_textf(c, "bytes */%" PRIu64, size);
    c->in->prove = true;
    err_set(&err, ERR_RANGE, "range_not_satisfiable", "the range does not lie within the file's %" PRIu64 " bytes", size);
    call_fail(c, &err);
}

static void probed(struct api_call *c)
{
    struct reading *r = c->state;
    file_read_end(STEAL(r->file));
    if (c->resp.head) {
        content_headers(c);
        c->in->audited = false;
        call_admission(c);
        reply_head(c, 200, "application/octet-stream", r->size);
        return;
    }
    const enum range_verdict verdict = range_parse(call_param_text(c, "Range", ""), r->size, &r->offset, &r->length);
    if (verdict == RANGE_NONE) {
        range_refused(c, r->size);
        return;
    }
    r->ranged = verdict == RANGE_PART;
    r->phase = READING_CONTENT;
    begin_content(c);
}

static void reply_content(struct api_call *c)
{
    struct reading *r = c->state;
    c->in->admitted = true;
    content_headers(c);
    if (r->ranged)
        reply_header(c, "Content-Range",
                     call_textf(c, "bytes %" PRIu64 "-%" PRIu64 "/%" PRIu64, r->offset, r->offset + r->length - 1, r->size));
    // Files like those of /proc say 0 and have content: their length is not known.
    const int64_t len = r->ranged ? (int64_t)r->length : !r->archive && r->size > 0 ? (int64_t)r->size : -1;
    c->stream = &READING_OPS;
    reply_stream(c, r->ranged ? 206 : 200, r->archive ? "application/x-tar" : "application/octet-stream", len);
}

static void info_job(void *arg)
{
    struct api_call *c = arg;
    struct reading *r = c->state;
    if (r->err.kind != ERR_NONE) {
        if (r->file)
            file_read_end(STEAL(r->file));
        if (c->resp.head)
            call_audit(c, "allowed", "failed", NULL);
        c->in->prove = r->phase == READING_PROBE && !c->resp.head;
        call_fail(c, &r->err);
    } else if (r->phase == READING_PROBE) {
        probed(c);
    } else {
        reply_content(c);
    }
    call_unref(c);
}

static void on_info(void *arg, const struct msg_file_result *result, const struct err *err)
{
    struct api_call *c = arg;
    struct reading *r = c->state;
    if (err)
        r->err = *err;
    else
        r->size = result->size;
    // begin may not have returned yet: whoever comes second goes on.
    if (__atomic_exchange_n(&r->known, true, __ATOMIC_ACQ_REL) && work_submit(c->a->pool, info_job, c) != 0)
        info_job(c);
}

static void on_readable(void *arg)
{
    call_wake(arg);
}

// The reference of c goes to info_job.
static void begin_content(struct api_call *c)
{
    struct reading *r = c->state;
    struct err err = {0};
    const struct param_value *path = call_param(c, "path");
    const char *user = call_param_text(c, "user", "sandbox");
    const struct file_read_callbacks cb = {on_info, on_readable, call_ref(c)};
    const bool probe = r->phase == READING_PROBE;
    struct admission silent = *call_admission(c);
    silent.audit_id[0] = silent.receipt_id[0] = 0;
    c->in->settles_itself = !probe;
    r->known = false;
    r->err = (struct err){0};
    struct file_read *file =
        r->archive ? archive_read_begin(c->a->manager, c->in->ids[0], path->text, path->len, user, &c->in->a, 200, &cb, &err)
                   : file_read_begin(c->a->manager, c->in->ids[0], path->text, path->len, user, r->offset,
                                     probe ? 1 : r->length, probe ? &silent : &c->in->a, r->ranged ? 206 : 200, &cb, &err);
    if (!file) {
        call_fail(c, &err);
        call_unref(c);
        return;
    }
    r->file = file;
    if (__atomic_exchange_n(&r->known, true, __ATOMIC_ACQ_REL) && work_submit(c->a->pool, info_job, c) != 0)
        info_job(c);
}

static void begin_reading(struct api_call *c, bool archive, bool probe)
{
    struct reading *r = calloc(1, sizeof *r);
    if (!r) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    r->archive = archive;
    r->phase = probe ? READING_PROBE : READING_CONTENT;
    c->state = r;
    c->stream = &READING_OPS; // frees the state, also when it never becomes a stream
    begin_content(c);
}

static void read_file(struct api_call *c)
{
    const char *range = call_param_text(c, "Range", NULL);
    begin_reading(c, false, range != NULL);
}

static void head_file(struct api_call *c)
{
    begin_reading(c, false, true);
}

static void read_archive(struct api_call *c)
{
    begin_reading(c, true, false);
}

// ---- writing ------------------------------------------------------------------------------------------------------
struct writing {
    struct file_write *file;
    bool archive;
    struct file_write_result result;
    struct err err;
};

static size_t writing_push(struct api_call *c, const void *data, size_t len)
{
    struct writing *w = c->state;
    const int64_t n = w->file ? file_write_push(w->file, data, len) : -1;
    return n < 0 ? len : (size_t)n; // failed: the answer is on its way, the rest is thrown away
}

static void writing_end(struct api_call *c)
{
    struct writing *w = c->state;
    if (w->file)
        file_write_finish(w->file);
}

static void writing_abort(struct api_call *c)
{
    struct writing *w = c->state;
    if (w->file)
        file_write_abort(w->file);
}

static void writing_free(struct api_call *c)
{
    struct writing *w = c->state;
    if (w)
        file_write_free(w->file);
    free(w);
    c->state = NULL;
}

static const struct sink_ops WRITING_OPS = {writing_push, writing_end, writing_abort, writing_free};

static void written_job(void *arg)
{
    struct api_call *c = arg;
    struct writing *w = c->state;
    if (w->err.kind != ERR_NONE) {
        call_fail(c, &w->err);
    } else {
        const struct param_value *path = call_param(c, "path");
        json_t *j = json_object();
        json_put(j, "path", json_stringn(path->text, path->len));
        json_put_int(j, "bytes", (int64_t)w->result.bytes);
        json_put_str(j, "sha256", w->result.sha256);
        json_put_str(j, "audit_id", c->in->a.audit_id);
        json_put_str(j, "receipt_id", c->in->a.receipt_id);
        reply_json(c, w->result.created && !w->archive ? 201 : 200, j);
    }
    call_unref(c);
}

static void on_writable(void *arg)
{
    call_wake(arg);
}

static void on_written(void *arg, const struct file_write_result *result, const struct err *err)
{
    struct api_call *c = arg;
    struct writing *w = c->state;
    if (err)
        w->err = *err;
    else
        w->result = *result;
    if (work_submit(c->a->pool, written_job, c) != 0)
        written_job(c);
}

static void begin_writing(struct api_call *c, bool archive)
{
    struct err err = {0};
    const struct param_value *path = call_param(c, "path");
    const char *mode = call_param_text(c, "mode", "0"); // 0: as it was, or 0644
    const struct file_write_options o = {.user = call_param_text(c, "user", "sandbox"),
                                         .mode = (unsigned)strtoul(mode, NULL, 8),
                                         .mkdirs = call_param_flag(c, "mkdirs"),
                                         .exclusive = call_param(c, "If-None-Match")->given};
    struct writing *w = calloc(1, sizeof *w);
    if (!w) {
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    w->archive = archive;
    c->state = w;
    c->in->settles_itself = true;
    call_admission(c);
    const struct file_write_callbacks cb = {on_writable, on_written, call_ref(c)};
    w->file = archive ? archive_write_begin(c->a->manager, c->in->ids[0], path->text, path->len, &o, &c->in->a, &cb, &err)
                      : file_write_begin(c->a->manager, c->in->ids[0], path->text, path->len, &o, &c->in->a, &cb, &err);
    c->sink = &WRITING_OPS;
    if (w->file)
        return;
    call_fail(c, &err);
    call_unref(c);
}

static void write_file(struct api_call *c)
{
    begin_writing(c, false);
}

static void write_archive(struct api_call *c)
{
    begin_writing(c, true);
}

const struct handler TRANSFER_HANDLERS[] = {
    {"file.read", RUN_ASYNC, read_file, NULL, NULL},
    {"file.head", RUN_ASYNC, head_file, NULL, NULL},
    {"file.write", RUN_ASYNC, NULL, write_file, NULL},
    {"archive.read", RUN_ASYNC, read_archive, NULL, NULL},
    {"archive.write", RUN_ASYNC, NULL, write_archive, NULL},
    {0},
};
