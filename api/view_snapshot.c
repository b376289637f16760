#include <stdio.h>

#include "api/view.h"
#include "sandbox/state.h"

static json_t *parse_or_empty(const char *text)
{
    json_t *v = text ? json_loads(text, 0, NULL) : NULL;
    return v ? v : json_object();
}

static json_t *retention_of(const struct snapshot_row *row)
{
    json_t *j = json_object();
    json_put(j, "keep", json_boolean(row->expires_at_ms == 0));
    json_put_time(j, "expires_at", row->expires_at_ms);
    return j;
}

static json_t *shape_of(const struct snapshot_row *row)
{
    json_t *j = json_object();
    json_put_int(j, "vcpus", row->vcpus);
    json_put_int(j, "memory_mib", row->memory_mib);
    json_put_int(j, "disk_mib", row->disk_mib);
    return j;
}

static json_t *image_of(const struct snapshot_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "ref", row->image_ref);
    json_put_str(j, "digest", row->image_digest);
    return j;
}

json_t *view_snapshot(const struct snapshot_row *row, const struct admission *act)
{
    json_t *j = json_object();
    json_put_str(j, "id", row->id);
    view_put_text(j, "name", row->name);
    json_put_str(j, "sandbox_id", row->sandbox_id);
    view_put_text(j, "parent_id", row->parent_id);
    json_put_str(j, "state", row->state == SNAPSHOT_READY ? "ready" : "deleted");
    view_put_text(j, "state_reason", row->state_reason);
    json_put_str(j, "kind", row->kind);
    json_put_str(j, "sensitivity", "may_contain_secrets");
    json_put(j, "sizes", parse_or_empty(row->sizes_json));
    json_put(j, "digests", parse_or_empty(row->digests_json));
    json_put(j, "qemu", parse_or_empty(row->qemu_json));
    json_put_str(j, "accel", row->accel);
    json_put(j, "image", image_of(row));
    json_put(j, "resources", shape_of(row));
    json_put_int(j, "bytes", row->bytes);
    json_put(j, "retention", retention_of(row));
    json_put(j, "paused_ms", json_real((double)row->paused_us / 1000));
    json_put(j, "timings_ms", parse_or_empty(row->timings_json));
    json_put_int(j, "generation", row->generation);
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "deleted_at", row->deleted_at_ms);
    json_put_str(j, "job_id", row->job_id);
    json_put_str(j, "audit_id", act ? act->audit_id : row->audit_id);
    json_put_str(j, "receipt_id", act ? act->receipt_id : row->receipt_id);
    return j;
}

json_t *view_snapshot_deletion(const struct snapshot_row *row, const struct admission *act)
{
    static const char *const LISTS[] = {"erased", "retained", "failed"};
    CLEANUP_JSON json_t *report = parse_or_empty(row->deletion_json);
    json_t *j = json_object();
    json_put_str(j, "snapshot_id", row->id);
    json_put_str(j, "state", row->state == SNAPSHOT_READY ? "ready" : "deleted");
    for (size_t i = 0; i < 3; i++) {
        json_t *list = json_object_get(report, LISTS[i]);
        json_put(j, LISTS[i], list ? json_incref(list) : json_array());
    }
    json_put_time(j, "deleted_at", row->deleted_at_ms);
    json_put_str(j, "audit_id", act->audit_id);
    json_put_str(j, "receipt_id", act->receipt_id);
    return j;
}
