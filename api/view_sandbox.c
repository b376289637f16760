#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/reply.h"
#include "api/view.h"
#include "sandbox/state.h"

int view_put_text(json_t *obj, const char *key, const char *text)
{
    return json_put_str(obj, key, text && *text ? text : NULL);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

json_t *view_sorted_keys(const char *text)
{
    CLEANUP_JSON json_t *from = text ? json_loads(text, 0, NULL) : NULL;
    const size_t cap = json_is_array(from) ? json_array_size(from) : json_object_size(from);
    const char **names = calloc(cap + 1, sizeof *names);
    json_t *list = json_array(), *one;
    size_t n = 0, i;
    const char *key;
    if (names && json_is_array(from))
        json_array_foreach(from, i, one) names[n++] = json_string_value(one);
    else if (names)
        json_object_foreach(from, key, one) names[n++] = key;
    if (names && n > 1)
        qsort(names, n, sizeof *names, by_name);
    for (i = 0; i < n; i++)
        json_array_append_new(list, json_string(names[i] ? names[i] : ""));
    free(names);
    return list;
}

json_t *view_seconds(int64_t ms)
{
    return ms % 1000 == 0 ? json_integer(ms / 1000) : json_real((double)ms / 1000);
}

static json_t *parse_or(const char *text, json_t *fallback)
{
    json_t *v = text ? json_loads(text, 0, NULL) : NULL;
    if (!v)
        return fallback;
    json_decref(fallback);
    return v;
}

static json_t *image_of(const struct sandbox_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "ref", row->image_ref);
    json_put_str(j, "digest", row->image_digest);
    return j;
}

static json_t *resources_of(const struct sandbox_row *row)
{
    json_t *j = json_object();
    json_put_int(j, "vcpus", row->vcpus);
    json_put_int(j, "memory_mib", row->memory_mib);
    json_put_int(j, "disk_mib", row->disk_mib);
    return j;
}

static json_t *lifecycle_of(const struct sandbox_row *row)
{
    json_t *j = json_object();
    json_put_int(j, "ttl_seconds", row->ttl_seconds);
    json_put_str(j, "on_expiry", row->on_expiry);
    json_put(j, "detached", json_boolean(row->detached));
    view_put_text(j, "owner", row->owner);
    json_put_time(j, "expires_at", row->expires_at_ms);
    return j;
}

static json_t *parent_of(const struct sandbox_row *row)
{
    if (!*row->parent_sandbox_id && !*row->parent_snapshot_id)
        return json_null();
    json_t *j = json_object();
    view_put_text(j, "sandbox_id", row->parent_sandbox_id);
    view_put_text(j, "snapshot_id", row->parent_snapshot_id);
    return j;
}

json_t *view_sandbox(const struct sandbox_row *row, const struct admission *act)
{
    json_t *j = json_object();
    json_put_str(j, "id", row->id);
    view_put_text(j, "name", row->name);
    json_put_str(j, "state", sandbox_state_name(row->state));
    view_put_text(j, "state_reason", row->state_reason);
    json_put(j, "image", image_of(row));
    json_put(j, "resources", resources_of(row));
    json_put(j, "network", json_null());
    json_put(j, "env_keys", view_sorted_keys(row->env_json));
    json_put(j, "secrets", json_object());
    json_put(j, "labels", parse_or(row->labels_json, json_object()));
    json_put(j, "lifecycle", lifecycle_of(row));
    json_put(j, "backend", parse_or(row->backend_json, json_null()));
    json_put(j, "timings_ms", parse_or(row->timings_json, json_null()));
    json_put(j, "parent", parent_of(row));
    json_put(j, "uniqueness", parse_or(row->uniqueness_json, json_null()));
    json_put_int(j, "generation", row->generation);
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "updated_at", row->updated_at_ms);
    json_put_time(j, "destroyed_at", row->destroyed_at_ms);
    json_put_str(j, "job_id", act && *act->job_id ? act->job_id : row->job_id);
    json_put_str(j, "audit_id", act ? act->audit_id : row->audit_id);
    json_put_str(j, "receipt_id", act ? act->receipt_id : row->receipt_id);
    return j;
}

// ---- the rendered form, once per generation -----------------------------------------------------------------------
struct rendered {
    size_t len;
    char etag[24];
    char text[];
};

static struct rendered *render(const struct sandbox_row *row)
{
    CLEANUP_JSON json_t *j = view_sandbox(row, NULL);
    const size_t len = json_dumpb(j, NULL, 0, JSON_COMPACT);
    struct rendered *r = len > 0 ? malloc(sizeof *r + len + 1) : NULL;
    if (!r)
        return NULL;
    r->len = json_dumpb(j, r->text, len, JSON_COMPACT);
    snprintf(r->etag, sizeof r->etag, "\"%lld\"", (long long)row->generation);
    return r;
}

static struct rendered *rendered_of(struct sandbox_info *info)
{
    struct rendered *r = __atomic_load_n((struct rendered **)&info->cache, __ATOMIC_ACQUIRE);
    if (r)
        return r;
    struct rendered *fresh = render(&info->row);
    if (!fresh)
        return NULL;
    void *expected = NULL;
    // Every writer writes the same function, before the pointer is published.
    __atomic_store_n(&info->cache_free, free, __ATOMIC_RELAXED);
    if (__atomic_compare_exchange_n(&info->cache, &expected, fresh, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return fresh;
    free(fresh);
    return expected;
}

static void release_info(const void *info)
{
    sandbox_info_unref(info);
}

void view_reply_sandbox(struct api_call *c, int status, struct sandbox_info *info)
{
    const bool act = c->op->evidence == EVIDENCE_RECEIPT;
    if (act) {
        reply_header(c, "ETag", call_textf(c, "\"%lld\"", (long long)info->row.generation));
        if (status == 201)
            reply_header(c, "Location", call_textf(c, "/v1/sandboxes/%s", info->row.id));
        reply_json(c, status, view_sandbox(&info->row, &c->in->a));
        return;
    }
    const struct rendered *r = rendered_of(info);
    if (!r) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        call_fail(c, &err);
        return;
    }
    reply_header(c, "ETag", r->etag);
    reply_borrowed(c, status, "application/json", r->text, r->len, sandbox_info_ref(info), release_info);
}

// ---- deletion -----------------------------------------------------------------------------------------------------
json_t *view_deletion(const struct sandbox_row *row, const struct admission *act)
{
    static const char *const LISTS[] = {"erased", "retained", "failed"};
    CLEANUP_JSON json_t *report = parse_or(row->deletion_json, json_object());
    json_t *j = json_object();
    json_put_str(j, "sandbox_id", row->id);
    json_put_str(j, "state", sandbox_state_name(row->state));
    for (size_t i = 0; i < 3; i++) {
        json_t *list = json_object_get(report, LISTS[i]);
        json_put(j, LISTS[i], list ? json_incref(list) : json_array());
    }
    json_put_time(j, "destroyed_at", row->destroyed_at_ms);
    view_put_text(j, "job_id", act->job_id);
    json_put_str(j, "audit_id", act->audit_id);
    json_put_str(j, "receipt_id", act->receipt_id);
    return j;
}
