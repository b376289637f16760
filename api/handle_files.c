// Files and directories that are asked for in one message: stat, delete, move, list, make.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/enc.h"
#include "base/fd.h"
#include "sandbox/files.h"

struct asked {
    struct api_call *c;       // a reference
    json_t *entries;          // of a directory
    bool truncated;
    struct msg_entry is;      // what is there: kind, mode, size …; no slices
    json_t *owner, *group, *target;
    bool created;
    uint64_t removed;
    struct err err;
    void (*answer)(struct asked *q);
};

static struct slice slice_of(const char *text, size_t len)
{
    return (struct slice){(const uint8_t *)text, len};
}

// Text from a guest: bytes that are not UTF-8 become U+FFFD.
static json_t *guest_text(struct slice s)
{
    json_t *plain = enc_utf8_valid(s.data, s.len) ? json_stringn_nocheck((const char *)s.data, s.len) : NULL;
    if (plain)
        return plain;
    CLEANUP_BUF struct buf b = BUF_INIT(3 * s.len + 4);
    for (size_t i = 0; i < s.len;) {
        size_t n = 4 < s.len - i ? 4 : s.len - i;
        while (n > 0 && !(enc_utf8_valid(s.data + i, n) && (n == 1 || !enc_utf8_valid(s.data + i, n - 1))))
            n--;
        if (n > 0)
            buf_add(&b, s.data + i, n);
        else
            buf_adds(&b, "\xef\xbf\xbd");
        i += n > 0 ? n : 1;
    }
    return json_stringn_nocheck(buf_text(&b), b.len);
}

static json_t *guest_text_or_null(struct slice s)
{
    return s.len > 0 ? guest_text(s) : json_null();
}

static void put_facts(json_t *j, const struct msg_entry *e)
{
    static const char *const KINDS[] = {"other", "file", "directory", "symlink", "other"};
    char mode[8];
    json_put_str(j, "kind", KINDS[e->kind <= MSG_KIND_OTHER ? e->kind : 0]);
    json_put_int(j, "bytes", (int64_t)e->size);
    snprintf(mode, sizeof mode, "%04o", (unsigned)(e->mode & 07777));
    json_put_str(j, "mode", mode);
    json_put_time(j, "modified_at", e->mtime_ms != 0 ? e->mtime_ms : 1); // 0 would be null
    json_put_int(j, "uid", (int64_t)e->uid);
    json_put_int(j, "gid", (int64_t)e->gid);
}

static void take_entries(struct asked *q, const struct msg_file_result *r)
{
    for (size_t i = 0; i < r->n_entries && json_array_size(q->entries) < LIMIT_DIR_ENTRIES; i++) {
        json_t *one = json_object();
        json_put(one, "name", guest_text(r->entries[i].name));
        put_facts(one, &r->entries[i]);
        json_put(one, "target", guest_text_or_null(r->entries[i].target));
        json_array_append_new(q->entries, one);
    }
    q->truncated = q->truncated || r->truncated;
}

static void asked_free(struct asked *q)
{
    call_unref(q->c);
    json_decref(q->entries);
    json_decref(q->owner);
    json_decref(q->group);
    json_decref(q->target);
    free(q);
}

static void answer_job(void *arg)
{
    struct asked *q = arg;
    if (q->err.kind != ERR_NONE)
        call_fail(q->c, &q->err);
    else
        q->answer(q);
    asked_free(q);
}

static void answer_stat(struct asked *q);

static void on_result(void *arg, const struct msg_file_result *r, bool last, const struct err *err)
{
    struct asked *q = arg;
    if (err) {
        q->err = *err;
    } else if (r) {
        q->is = (struct msg_entry){.kind = r->kind, .mode = r->mode, .size = r->size, .mtime_ms = r->mtime_ms,
                                   .uid = r->uid, .gid = r->gid};
        q->created = r->created;
        q->removed = r->removed;
        if (q->entries)
            take_entries(q, r);
        if (last && !q->entries) {
            q->owner = guest_text_or_null(r->owner);
            q->group = guest_text_or_null(r->group);
            q->target = guest_text_or_null(r->target);
        }
    }
    if (!last)
        return;
    // A stat's answer is a moment's work: made here, on the loop's thread. The rest may be long, or wait for the store.
    if ((!err && q->answer == answer_stat) || work_submit(q->c->a->pool, answer_job, q) != 0)
        answer_job(q);
}

static void ask(struct api_call *c, struct file_call *call, int status, bool list, void (*answer)(struct asked *q))
{
    struct asked *q = calloc(1, sizeof *q);
    if (q && list)
        q->entries = json_array();
    if (!q || (list && !q->entries)) {
        struct err err = {0};
        free(q);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    const char *user = call_param_text(c, "user", "sandbox");
    q->c = call_ref(c);
    q->answer = answer;
    call->sandbox_id = c->in->ids[0];
    call->msg.user = slice_of(user, strlen(user));
    c->in->settles_itself = true;
    c->in->audited = true;
    file_call(c->a->manager, call, call_admission(c), status, on_result, q);
}

static struct slice path_param(struct api_call *c)
{
    const struct param_value *v = call_param(c, "path");
    return slice_of(v->text, v->len);
}

static json_t *begin_answer(struct api_call *c)
{
    json_t *j = json_object();
    const struct param_value *v = call_param(c, "path");
    if (v->given)
        json_put(j, "path", json_stringn(v->text, v->len));
    return j;
}

static void put_ids(json_t *j, const struct api_call *c)
{
    json_put_str(j, "audit_id", c->in->a.audit_id);
    json_put_str(j, "receipt_id", c->in->a.receipt_id);
}

// ---- stat -----------------------------------------------------------------------------------------------------------
static void answer_stat(struct asked *q)
{
    json_t *j = begin_answer(q->c);
    put_facts(j, &q->is);
    json_put(j, "owner", STEAL(q->owner));
    json_put(j, "group", STEAL(q->group));
    json_put(j, "target", STEAL(q->target));
    reply_json(q->c, 200, j);
}

static void stat_(struct api_call *c)
{
    struct file_call call = {.msg = {.op = MSG_FILE_STAT, .path = path_param(c)}};
    ask(c, &call, 200, false, answer_stat);
}

// ---- delete -----------------------------------------------------------------------------------------------------------
static void answer_delete(struct asked *q)
{
    json_t *j = begin_answer(q->c);
    json_put_int(j, "entries", q->removed > 0 ? (int64_t)q->removed : 1);
    put_ids(j, q->c);
    reply_json(q->c, 200, j);
}

static void delete_(struct api_call *c)
{
    struct file_call call = {.msg = {.op = MSG_FILE_DELETE, .path = path_param(c),
                                     .recursive = call_param_flag(c, "recursive")}};
    ask(c, &call, 200, false, answer_delete);
}

// ---- move -----------------------------------------------------------------------------------------------------------
static struct slice body_text(const struct api_call *c, const char *key)
{
    const json_t *v = json_object_get(c->in->json, key);
    return slice_of(json_string_value(v), json_string_length(v));
}

static void reply_move(struct api_call *c)
{
    json_t *j = json_object();
    json_put_str(j, "from", json_get_str(c->in->json, "from"));
    json_put_str(j, "to", json_get_str(c->in->json, "to"));
    put_ids(j, c);
    reply_json(c, 200, j);
}

static void answer_move(struct asked *q)
{
    reply_move(q->c);
}

static void move(struct api_call *c)
{
    struct file_call call = {.msg = {.op = MSG_FILE_MOVE, .path = body_text(c, "from"), .to = body_text(c, "to"),
                                     .exclusive = !json_is_true(json_object_get(c->in->json, "overwrite")),
                                     .mkdirs = json_is_true(json_object_get(c->in->json, "mkdirs"))}};
    ask(c, &call, 200, false, answer_move);
}

static bool parse_again(struct api_call *c)
{
    struct err err = {0};
    c->in->json = json_parse_strict(buf_text(&c->in->body), c->in->body.len, &err);
    return c->in->json != NULL;
}

static void replay_move(struct api_call *c)
{
    if (!replay_is_problem(c) && parse_again(c))
        reply_move(c);
}

// ---- directories ------------------------------------------------------------------------------------------------------
static int by_name(const void *a, const void *b)
{
    return strcmp(json_get_str(*(json_t *const *)a, "name"), json_get_str(*(json_t *const *)b, "name"));
}

static json_t *sorted(json_t *entries)
{
    const size_t n = json_array_size(entries);
    json_t **all = calloc(n + 1, sizeof *all);
    json_t *list = json_array();
    for (size_t i = 0; all && i < n; i++)
        all[i] = json_array_get(entries, i);
    if (all && n > 1)
        qsort(all, n, sizeof(json_t *), by_name);
    for (size_t i = 0; all && i < n; i++)
        json_array_append(list, all[i]);
    free(all);
    return list;
}

static void answer_list(struct asked *q)
{
    json_t *j = begin_answer(q->c);
    json_put_int(j, "depth", call_param_integer(q->c, "depth", 1));
    json_put(j, "entries", sorted(q->entries));
    json_put(j, "truncated", json_boolean(q->truncated));
    reply_json(q->c, 200, j);
}

static void list(struct api_call *c)
{
    struct file_call call = {.msg = {.op = MSG_DIR_LIST, .path = path_param(c), .max_entries = LIMIT_DIR_ENTRIES,
                                     .depth = (uint64_t)call_param_integer(c, "depth", 1)}};
    ask(c, &call, 200, true, answer_list);
}

static void reply_made(struct api_call *c, bool created)
{
    json_t *j = json_object();
    json_put_str(j, "path", json_get_str(c->in->json, "path"));
    json_put(j, "created", json_boolean(created));
    put_ids(j, c);
    reply_json(c, created ? 201 : 200, j);
}

static void answer_make(struct asked *q)
{
    reply_made(q->c, q->created);
}

static void make(struct api_call *c)
{
    const char *mode = json_get_str(c->in->json, "mode");
    struct file_call call = {.msg = {.op = MSG_DIR_MAKE, .path = body_text(c, "path"),
                                     .mode = mode ? strtoul(mode, NULL, 8) : 0755,
                                     .mkdirs = json_is_true(json_object_get(c->in->json, "mkdirs"))}};
    ask(c, &call, 201, false, answer_make);
}

static void replay_make(struct api_call *c)
{
    if (!replay_is_problem(c) && parse_again(c))
        reply_made(c, c->in->replay->status == 201);
}

const struct handler FILE_HANDLERS[] = {
    {"file.stat", RUN_ASYNC, stat_, NULL, NULL},
    {"file.delete", RUN_ASYNC, delete_, NULL, NULL},
    {"file.move", RUN_ASYNC, move, NULL, replay_move},
    {"dir.list", RUN_ASYNC, list, NULL, NULL},
    {"dir.create", RUN_ASYNC, make, NULL, replay_make},
    {0},
};
