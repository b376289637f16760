// Snapshots and forks: take, list, get, delete, compare, fork. And what a sandbox's memory costs.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/clock.h"

// ---- an operation under way -----------------------------------------------------------------------------------------
struct act {
    struct api_call *c;          // a reference
    bool deletion;
    struct snapshot_row row;     // of a snapshot's operation
    struct sandbox_info **items; // of a fork; references
    size_t n;
    char job_id[ID_MAX];         // of a fork; the call's own is gone with its 202
    struct err err;
};

static void act_free(struct act *act)
{
    for (size_t i = 0; act->items && i < act->n; i++)
        sandbox_info_unref(act->items[i]);
    free(act->items);
    snapshot_row_free(&act->row);
    call_unref(act->c);
    free(act);
}

static void accepted(void *arg)
{
    struct api_call *c = arg;
    view_reply_accepted(c);
    call_unref(c);
}

static void on_admitted(void *arg, const char *job_id)
{
    struct act *act = arg;
    struct api_call *c = act->c;
    c->in->admitted = true;
    snprintf(c->in->a.job_id, sizeof c->in->a.job_id, "%s", job_id ? job_id : "");
    if (!c->in->prefer_async)
        return;
    c->handed = true;
    call_pool(c, accepted);
}

static struct act *act_new(struct api_call *c)
{
    struct act *act = calloc(1, sizeof *act);
    if (!act) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return NULL;
    }
    act->c = call_ref(c);
    call_admission(c);
    return act;
}

// ---- answers --------------------------------------------------------------------------------------------------------
static void reply_snapshot(struct api_call *c, int status, const struct snapshot_row *row, const struct admission *act)
{
    reply_header(c, "ETag", call_textf(c, "\"%lld\"", (long long)row->generation));
    if (status == 201)
        reply_header(c, "Location", call_textf(c, "/v1/snapshots/%s", row->id));
    reply_json(c, status, view_snapshot(row, act));
}

static void reply_fork(struct api_call *c, struct sandbox_info *const *items, size_t n, const char *job_id)
{
    json_t *j = json_object(), *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, view_sandbox(&items[i]->row, NULL));
    json_put(j, "items", list);
    json_put_str(j, "job_id", job_id);
    json_put_str(j, "audit_id", c->in->a.audit_id);
    json_put_str(j, "receipt_id", c->in->a.receipt_id);
    reply_json(c, 201, j);
}

// A deletion that left something behind carries its report.
static void add_report(struct api_call *c)
{
    struct snapshot_row row = {0};
    struct err err = {0};
    if (snapshot_get(c->a->store, c->in->a.tenant, c->in->ids[0], &row, &err) == 0) {
        c->in->extra = json_object();
        json_put(c->in->extra, "report", view_snapshot_deletion(&row, &c->in->a));
        snapshot_row_free(&row);
    }
}

static void finish(void *arg)
{
    struct act *act = arg;
    struct api_call *c = act->c;
    if (act->err.kind != ERR_NONE) {
        if (act->deletion && act->err.kind == ERR_CLEANUP_FAILED)
            add_report(c);
        call_fail(c, &act->err);
    } else if (act->items) {
        reply_fork(c, act->items, act->n, act->job_id);
    } else if (act->deletion) {
        reply_json(c, 200, view_snapshot_deletion(&act->row, &c->in->a));
    } else {
        reply_snapshot(c, 201, &act->row, &c->in->a);
    }
    act_free(act);
}

static void end(struct act *act)
{
    if (act->c->handed)
        act_free(act);
    else if (work_submit(act->c->a->pool, finish, act) != 0)
        finish(act);
}

static void on_snapshot(void *arg, const struct snapshot_row *row, const struct err *err)
{
    struct act *act = arg;
    if (err)
        act->err = *err;
    else if (snapshot_row_copy(&act->row, row) != 0)
        err_set(&act->err, ERR_INTERNAL, "out_of_memory", "out of memory");
    end(act);
}

static void on_fork(void *arg, const struct sandbox_info *const *items, size_t n, const struct err *err)
{
    struct act *act = arg;
    if (err) {
        act->err = *err;
    } else if ((act->items = calloc(n, sizeof *act->items))) {
        for (; act->n < n; act->n++)
            act->items[act->n] = sandbox_info_ref(items[act->n]);
        snprintf(act->job_id, sizeof act->job_id, "%s", n ? items[0]->row.job_id : "");
    } else {
        err_set(&act->err, ERR_INTERNAL, "out_of_memory", "out of memory");
    }
    end(act);
}

// ---- snapshots ------------------------------------------------------------------------------------------------------
static void create(struct api_call *c)
{
    const json_t *body = c->in->json, *retention = json_object_get(body, "retention");
    const struct snapshot_request r = {
        .name = json_get_str(body, "name"),
        .expires_in_seconds = json_get_int(retention, "expires_in_seconds", 0),
        .keep = json_is_true(json_object_get(retention, "keep")),
        .stop = json_is_true(json_object_get(body, "stop")),
    };
    struct act *act = act_new(c);
    if (!act)
        return;
    const struct snapshot_callbacks cb = {on_admitted, on_snapshot, act};
    manager_snapshot(c->a->manager, c->in->ids[0], &r, &c->in->a, c->in->prefer_async ? 202 : 201, &cb);
}

static bool find(struct api_call *c, const char *id, struct snapshot_row *ret)
{
    struct err err = {0};
    const int got = snapshot_get(c->a->store, c->who->row.tenant, id, ret, &err);
    if (got > 0)
        call_not_found(c);
    else if (got < 0)
        call_fail(c, &err);
    return got == 0;
}

static void get(struct api_call *c)
{
    struct snapshot_row row = {0};
    if (!find(c, c->in->ids[0], &row))
        return;
    reply_snapshot(c, 200, &row, NULL);
    snapshot_row_free(&row);
}

static bool list_one(void *arg, const struct snapshot_row *row)
{
    return list_add(arg, row->id, view_snapshot(row, NULL));
}

static void list(struct api_call *c)
{
    struct list l;
    struct err err = {0};
    if (!list_begin(&l, c))
        return;
    const char *state = call_param_text(c, "state", "ready");
    const struct snapshot_filter f = {.page = l.page, .sandbox_id = call_param_text(c, "sandbox_id", NULL),
                                      .deleted = strcmp(state, "deleted") == 0};
    list_reply(&l, snapshot_list(c->a->store, &f, list_one, &l, &err), &err);
}

static void delete_(struct api_call *c)
{
    struct act *act = act_new(c);
    if (!act)
        return;
    act->deletion = true;
    c->in->prefer_async = false; // done at once, without a job
    const struct snapshot_callbacks cb = {on_admitted, on_snapshot, act};
    manager_snapshot_delete(c->a->manager, c->in->ids[0], &c->in->a, 200, &cb);
}

// May read gigabytes: on a thread of its own, so that nothing else waits for it.
static void compat_work(void *arg)
{
    struct api_call *c = arg;
    struct err err = {0};
    json_t *verdict = NULL;
    if (atomic_load(&c->a->stopping))
        err_set(&err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
    else
        verdict = manager_snapshot_compat(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    if (verdict)
        reply_json(c, 200, verdict);
    else
        call_fail(c, &err);
    call_unref(c);
    store_thread_done();
}

// What is not there is said at once.
static void compat(struct api_call *c)
{
    struct err err = {0};
    struct snapshot_row row = {0};
    call_admission(c);
    if (!find(c, c->in->ids[0], &row))
        return;
    snapshot_row_free(&row);
    if (work_submit(c->a->compat, compat_work, call_ref(c)) == 0)
        return;
    call_unref(c);
    err_set(&err, ERR_UNAVAILABLE, "busy", "too many snapshots wait to be compared already");
    call_fail(c, &err);
}

static void replay_create(struct api_call *c)
{
    struct snapshot_row row = {0};
    if (replay_is_problem(c))
        return;
    if (c->in->replay->status == 202 || c->in->prefer_async) {
        view_reply_accepted(c);
        return;
    }
    if (!find(c, c->in->replay->ref, &row))
        return;
    reply_snapshot(c, 201, &row, &c->in->a);
    snapshot_row_free(&row);
}

static void replay_delete(struct api_call *c)
{
    struct snapshot_row row = {0};
    if (replay_is_problem(c) || !find(c, c->in->replay->ref, &row))
        return;
    reply_json(c, 200, view_snapshot_deletion(&row, &c->in->a));
    snapshot_row_free(&row);
}

// ---- forks ----------------------------------------------------------------------------------------------------------
static void fork_(struct api_call *c)
{
    const json_t *body = c->in->json, *lifecycle = json_object_get(body, "lifecycle");
    const struct fork_request r = {
        .count = (unsigned)json_get_int(body, "count", 1),
        .ttl_seconds = json_get_int(lifecycle, "ttl_seconds", 0),
        .on_expiry = json_get_str(lifecycle, "on_expiry"),
        .detached = json_is_true(json_object_get(lifecycle, "detached")),
        .owner = json_get_str(lifecycle, "owner"),
    };
    struct act *act = act_new(c);
    if (!act)
        return;
    const struct fork_callbacks cb = {on_admitted, on_fork, act};
    manager_fork(c->a->manager, c->in->ids[0], &r, &c->in->a, c->in->prefer_async ? 202 : 201, &cb);
}

// The job remembers which they were: {"sandbox_ids":[…]}.
static void replay_fork(struct api_call *c)
{
    struct job_row job = {0};
    struct err err = {0};
    if (replay_is_problem(c))
        return;
    if (c->in->replay->status == 202 || c->in->prefer_async) {
        view_reply_accepted(c);
        return;
    }
    const int got = job_get(c->a->store, c->who->row.tenant, c->in->replay->ref, &job, &err);
    CLEANUP_JSON json_t *result = got == 0 && job.result_json ? json_loads(job.result_json, 0, NULL) : NULL;
    const json_t *ids = json_object_get(result, "sandbox_ids");
    const size_t n = json_array_size(ids);
    struct sandbox_info **items = calloc(n + 1, sizeof *items);
    bool all = items && n > 0;
    for (size_t i = 0; all && i < n; i++)
        all = (items[i] = manager_get(c->a->manager, c->who->row.tenant, json_string_value(json_array_get(ids, i)), &err));
    if (all) {
        reply_fork(c, items, n, job.id);
    } else {
        err_set(&err, ERR_INTERNAL, "replay", "the stored answer cannot be rebuilt");
        c->in->admitted = false;
        call_fail(c, &err);
    }
    for (size_t i = 0; items && i < n; i++)
        sandbox_info_unref(items[i]);
    free(items);
    if (got == 0)
        job_row_free(&job);
}

// ---- memory -----------------------------------------------------------------------------------------------------------
static void memory(struct api_call *c)
{
    struct err err = {0};
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    if (!info) {
        call_fail(c, &err);
        return;
    }
    json_t *m = manager_memory(c->a->manager, c->who->row.tenant, c->in->ids[0]);
    if (m) {
        reply_json(c, 200, m);
    } else {
        err_set(&err, ERR_CONFLICT, "sandbox_not_running", "the sandbox has no virtual machine now");
        call_fail(c, &err);
    }
    sandbox_info_unref(info);
}

const struct handler SNAPSHOT_HANDLERS[] = {
    {"snapshot.create", RUN_ASYNC, create, NULL, replay_create},
    {"snapshot.list", RUN_POOLED, list, NULL, NULL},
    {"snapshot.get", RUN_POOLED, get, NULL, NULL},
    {"snapshot.delete", RUN_ASYNC, delete_, NULL, replay_delete},
    {"snapshot.compat", RUN_POOLED, compat, NULL, NULL},
    {"snapshot.fork", RUN_ASYNC, fork_, NULL, replay_fork},
    {"sandbox.fork", RUN_ASYNC, fork_, NULL, replay_fork},
    {"sandbox.memory", RUN_POOLED, memory, NULL, NULL},
    {0},
};
