// Sandboxes: create, list, get, update, stop, start, detach, delete, wait.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/pump.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/clock.h"

// ---- an operation of the manager under way --------------------------------------------------------------------------
struct act {
    struct api_call *c;          // a reference
    int status;
    bool deletion, keeps_report;
    struct sandbox_info *info;   // reference
    struct err err;
};

static void act_free(struct act *act)
{
    call_unref(act->c);
    sandbox_info_unref(act->info);
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

// A deletion that left something behind carries its report.
static void add_report(struct act *act)
{
    struct api_call *c = act->c;
    struct err err = {0};
    struct sandbox_info *info = manager_get(c->a->manager, c->in->a.tenant, c->in->ids[0], &err);
    if (info && info->row.deletion_json) {
        c->in->extra = json_object();
        json_put(c->in->extra, "report", view_deletion(&info->row, &c->in->a));
    }
    sandbox_info_unref(info);
}

static void finish(void *arg)
{
    struct act *act = arg;
    struct api_call *c = act->c;
    if (act->err.kind != ERR_NONE) {
        if (act->deletion && act->err.kind == ERR_CLEANUP_FAILED)
            add_report(act);
        call_fail(c, &act->err);
    } else if (act->deletion) {
        reply_json(c, act->status, view_deletion(&act->info->row, &c->in->a));
    } else {
        view_reply_sandbox(c, act->status, act->info);
    }
    act_free(act);
}

static void on_done(void *arg, const struct sandbox_info *info, const struct err *err)
{
    struct act *act = arg;
    if (act->c->handed) {
        act_free(act);
        return;
    }
    if (err)
        act->err = *err;
    else
        act->info = sandbox_info_ref(info);
    if (work_submit(act->c->a->pool, finish, act) != 0)
        finish(act);
}

static struct act *act_new(struct api_call *c, int status, struct op_callbacks *ret)
{
    struct act *act = calloc(1, sizeof *act);
    if (!act) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return NULL;
    }
    act->c = call_ref(c);
    act->status = status;
    *ret = (struct op_callbacks){on_admitted, on_done, act};
    call_admission(c);
    return act;
}

// ---- create -----------------------------------------------------------------------------------------------------
static bool env_fits(struct api_call *c)
{
    const json_t *body = c->in->json;
    if (!json_object_get(body, "snapshot_id") || !json_object_get(body, "env"))
        return true;
    faults_add(call_faults(c), "/env", "must not stand beside snapshot_id: the snapshot's is restored");
    call_invalid(c);
    return false;
}

static void create(struct api_call *c)
{
    const json_t *body = c->in->json, *resources = json_object_get(body, "resources");
    const json_t *lifecycle = json_object_get(body, "lifecycle"), *require = json_object_get(body, "require");
    const bool restore = json_object_get(body, "snapshot_id") != NULL; // has a shape and an environment of its own
    const struct sandbox_request r = {
        .image = json_get_str(body, "image"),
        .snapshot_id = json_get_str(body, "snapshot_id"),
        .name = json_get_str(body, "name"),
        .labels = json_object_get(body, "labels"),
        .env = json_object_get(body, "env"),
        .vcpus = (int)json_get_int(resources, "vcpus", restore ? 0 : 1),
        .memory_mib = (int)json_get_int(resources, "memory_mib", restore ? 0 : 256),
        .disk_mib = (int)json_get_int(resources, "disk_mib", restore ? 0 : 1024),
        .ttl_seconds = json_get_int(lifecycle, "ttl_seconds", 0),
        .on_expiry = json_get_str(lifecycle, "on_expiry"),
        .detached = json_is_true(json_object_get(lifecycle, "detached")),
        .owner = json_get_str(lifecycle, "owner"),
        .require_accel = json_get_str(require, "accel"),
    };
    struct op_callbacks cb;
    if (env_fits(c) && act_new(c, 201, &cb))
        manager_create(c->a->manager, &r, &c->in->a, c->in->prefer_async ? 202 : 201, &cb);
}

// ---- verbs ------------------------------------------------------------------------------------------------------
static void verb(struct api_call *c, enum sandbox_verb v, const char *owner)
{
    struct op_callbacks cb;
    if (v == VERB_DETACH)
        c->in->prefer_async = false; // done at once, without a job to point to
    if (act_new(c, 200, &cb))
        manager_verb(c->a->manager, c->in->ids[0], v, owner, &c->in->a, c->in->prefer_async ? 202 : 200, &cb);
}

static void stop(struct api_call *c)
{
    verb(c, VERB_STOP, NULL);
}

static void pause_(struct api_call *c)
{
    verb(c, VERB_PAUSE, NULL);
}

static void resume(struct api_call *c)
{
    verb(c, VERB_RESUME, NULL);
}

static void cold(struct api_call *c)
{
    verb(c, VERB_COLD, NULL);
}

static void start(struct api_call *c)
{
    verb(c, VERB_START, NULL);
}

// Without a new owner the one it has stays.
static void detach(struct api_call *c)
{
    struct err err = {0};
    const char *owner = json_get_str(c->in->json, "owner");
    char kept[LIMIT_OWNER_MAX] = "";
    if (!owner) {
        struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
        if (!info) {
            call_fail(c, &err);
            return;
        }
        snprintf(kept, sizeof kept, "%s", info->row.owner);
        sandbox_info_unref(info);
    }
    verb(c, VERB_DETACH, owner ? owner : *kept ? kept : NULL);
}

// Of a delete, which waits for nobody: looked at when it is asked for.
static bool generation_fits(struct api_call *c)
{
    struct err err = {0};
    const int64_t wanted = call_if_match(c);
    if (wanted == 0)
        return true;
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    if (info && info->row.generation != wanted)
        err_set(&err, ERR_PRECONDITION_FAILED, "generation_mismatch", "the sandbox is at generation %" PRId64,
                info->row.generation);
    sandbox_info_unref(info);
    if (err.kind != ERR_NONE)
        call_fail(c, &err);
    return err.kind == ERR_NONE;
}

static void delete_(struct api_call *c)
{
    struct op_callbacks cb;
    if (!generation_fits(c))
        return;
    struct act *act = act_new(c, 200, &cb);
    if (!act)
        return;
    act->deletion = true;
    c->in->a.if_generation = 0; // what comes before its turn does not stop it
    manager_delete(c->a->manager, c->in->ids[0], &c->in->a, 200, &cb);
}

static void update(struct api_call *c)
{
    const json_t *body = c->in->json, *lifecycle = json_object_get(body, "lifecycle");
    if (json_object_get(body, "ttl_seconds") && json_object_get(lifecycle, "ttl_seconds")) {
        faults_add(call_faults(c), "/ttl_seconds", "must not stand beside lifecycle.ttl_seconds");
        call_invalid(c);
        return;
    }
    const struct sandbox_patch p = {
        .labels = json_object_get(body, "labels"),
        .ttl_seconds = json_get_int(body, "ttl_seconds", json_get_int(lifecycle, "ttl_seconds", 0)),
        .on_expiry = json_get_str(lifecycle, "on_expiry"),
    };
    struct op_callbacks cb;
    if (act_new(c, 200, &cb))
        manager_patch(c->a->manager, c->in->ids[0], &p, &c->in->a, 200, &cb);
}

// ---- reads ------------------------------------------------------------------------------------------------------
static void get(struct api_call *c)
{
    struct err err = {0};
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, c->in->ids[0], &err);
    if (!info) {
        call_fail(c, &err);
        return;
    }
    view_reply_sandbox(c, 200, info);
    sandbox_info_unref(info);
}

static bool list_one(void *arg, const struct sandbox_info *i)
{
    return list_add(arg, i->row.id, view_sandbox(&i->row, NULL));
}

static void list(struct api_call *c)
{
    struct list l;
    struct err err = {0};
    char label[512];
    if (!list_begin(&l, c))
        return;
    struct sandbox_filter filter = {.page = l.page, .state = -1};
    const char *state = call_param_text(c, "state", NULL), *pair = call_param_text(c, "label", NULL);
    if (state)
        filter.state = sandbox_state_parse(state);
    if (pair) { // the specification's pattern wants a `=`
        snprintf(label, sizeof label, "%s", pair);
        char *eq = strchr(label, '=');
        *eq = 0;
        filter.label_key = label;
        filter.label_value = strchr(pair, '=') + 1;
    }
    list_reply(&l, manager_list(c->a->manager, &filter, list_one, &l, &err), &err);
}

// ---- wait -------------------------------------------------------------------------------------------------------
struct wait {
    char id[ID_MAX];
    int state;
    int64_t until_ms;
};

// What is under way leads nowhere else any more.
static bool is_resting(int state)
{
    return state == SANDBOX_PAUSED || state == SANDBOX_COLD || state == SANDBOX_STOPPED || state == SANDBOX_FAILED || state == SANDBOX_DESTROYED;
}

static void wait_over(struct api_call *c)
{
    free((void *)c->body_owner);
    c->body_owner = NULL;
    c->body_release = NULL;
}

static enum pump_next wait_step(struct pump *p)
{
    struct api_call *c = p->c;
    const struct wait *w = c->body_owner;
    struct err err = {0};
    if (pump_gone(p))
        return PUMP_DONE;
    struct sandbox_info *info = manager_get(c->a->manager, c->who->row.tenant, w->id, &err);
    if (!info) {
        wait_over(c);
        call_fail(c, &err);
        return PUMP_DONE;
    }
    const int64_t left = w->until_ms - clock_mono_ms();
    const int state = info->row.state;
    const bool over = state == w->state || is_resting(state) || left <= 0 || atomic_load(&c->a->stopping);
    if (over) {
        wait_over(c);
        view_reply_sandbox(c, 200, info);
    } else {
        pump_after(p, left < 1000 ? left : 1000);
    }
    sandbox_info_unref(info);
    return over ? PUMP_DONE : PUMP_WAIT;
}

static void free_wait(const void *w)
{
    free((void *)w);
}

static void wait_for(struct api_call *c)
{
    struct wait *w = calloc(1, sizeof *w);
    const struct param_value *timeout = call_param(c, "timeout_seconds");
    if (w) {
        memcpy(w->id, c->in->ids[0], sizeof w->id);
        w->state = sandbox_state_parse(call_param_text(c, "state", "running"));
        w->until_ms = clock_mono_ms() + (timeout->given ? (int64_t)(timeout->number * 1000) : 60000);
        c->body_owner = w;
        c->body_release = free_wait;
    }
    if (!w || pump_start(c, w->id, wait_step) != 0) {
        struct err err = {0};
        wait_over(c);
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
    }
}

const struct handler SANDBOX_HANDLERS[] = {
    {"sandbox.create", RUN_ASYNC, create, NULL, NULL},
    {"sandbox.list", RUN_POOLED, list, NULL, NULL},
    {"sandbox.get", RUN_INLINE, get, NULL, NULL},
    {"sandbox.update", RUN_ASYNC, update, NULL, NULL},
    {"sandbox.delete", RUN_ASYNC, delete_, NULL, NULL},
    {"sandbox.stop", RUN_ASYNC, stop, NULL, NULL},
    {"sandbox.pause", RUN_ASYNC, pause_, NULL, NULL},
    {"sandbox.resume", RUN_ASYNC, resume, NULL, NULL},
    {"sandbox.cold", RUN_ASYNC, cold, NULL, NULL},
    {"sandbox.start", RUN_ASYNC, start, NULL, NULL},
    {"sandbox.detach", RUN_ASYNC, detach, NULL, NULL},
    {"sandbox.wait", RUN_ASYNC, wait_for, NULL, NULL},
    {0},
};
