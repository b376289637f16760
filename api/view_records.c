// Jobs, tokens, receipts, logs, events, audit entries.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"

// ---- jobs -----------------------------------------------------------------------------------------------------------
static json_t *job_result(const struct job_row *row)
{
    if (row->state != JOB_SUCCEEDED)
        return json_null();
    char href[128] = "";
    CLEANUP_JSON json_t *made = row->result_json ? json_loads(row->result_json, 0, NULL) : NULL;
    const json_t *forks = json_object_get(made, "sandbox_ids");
    bool created = strcmp(row->kind, "sandbox.create") == 0;
    if (json_array_size(forks) > 0) {
        snprintf(href, sizeof href, "/v1/sandboxes/%s", json_string_value(json_array_get(forks, 0)));
        created = true;
    } else if (strncmp(row->ref, "snp", 3) == 0) {
        snprintf(href, sizeof href, "/v1/snapshots/%s", row->ref);
        created = strcmp(row->kind, "snapshot.create") == 0;
    } else if (strncmp(row->ref, "cmd", 3) == 0) {
        snprintf(href, sizeof href, "/v1/sandboxes/%s/commands/%s", row->sandbox_id, row->ref);
    } else if (*row->sandbox_id || strncmp(row->ref, "sbx", 3) == 0) {
        snprintf(href, sizeof href, "/v1/sandboxes/%s", *row->sandbox_id ? row->sandbox_id : row->ref);
    } else {
        return json_null();
    }
    json_t *j = json_object();
    json_put_int(j, "status", created ? 201 : 200);
    json_put_str(j, "href", href);
    if (json_array_size(forks) > 0)
        json_put(j, "sandbox_ids", json_deep_copy(forks));
    return j;
}

json_t *view_job(const struct job_row *row)
{
    json_t *j = json_object(), *stages = row->stages_json ? json_loads(row->stages_json, 0, NULL) : NULL;
    json_t *problem = row->problem_json ? json_loads(row->problem_json, 0, NULL) : NULL;
    json_put_str(j, "id", row->id);
    json_put_str(j, "kind", row->kind);
    json_put_str(j, "state", job_state_name(row->state));
    view_put_text(j, "sandbox_id", row->sandbox_id);
    json_put_str(j, "command_id", strncmp(row->ref, "cmd", 3) == 0 ? row->ref : NULL);
    view_put_text(j, "stage", row->stage);
    json_put(j, "stages", stages ? stages : json_array());
    json_put(j, "problem", problem ? problem : json_null());
    json_put(j, "result", job_result(row));
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "updated_at", row->updated_at_ms);
    json_put_time(j, "finished_at", row->finished_at_ms);
    json_put_str(j, "audit_id", row->audit_id);
    json_put_str(j, "receipt_id", row->receipt_id);
    return j;
}

void view_reply_accepted(struct api_call *c)
{
    struct job_row job = {0};
    struct err err = {0};
    const int got = job_get(c->a->store, c->who->row.tenant, c->in->a.job_id, &job, &err);
    if (got != 0) {
        if (got > 0)
            err_set(&err, ERR_INTERNAL, "job_lost", "the job of this request is not there");
        call_fail(c, &err);
        return;
    }
    reply_header(c, "Location", call_textf(c, "/v1/jobs/%s", job.id));
    reply_header(c, "Preference-Applied", "respond-async");
    reply_json(c, 202, view_job(&job));
    job_row_free(&job);
}

// ---- tokens ---------------------------------------------------------------------------------------------------------
json_t *view_token(const struct token_row *row)
{
    json_t *j = json_object(), *scopes = json_array();
    for (unsigned bit = 1; bit <= SCOPE_ADMIN; bit <<= 1)
        if (row->scopes & bit)
            json_array_append_new(scopes, json_string(scope_name((enum scope)bit)));
    json_put_str(j, "id", row->id);
    json_put_str(j, "tenant", row->tenant);
    json_put_str(j, "name", row->name);
    json_put(j, "scopes", scopes);
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "expires_at", row->expires_at_ms);
    json_put_time(j, "revoked_at", row->revoked_at_ms);
    return j;
}

// ---- evidence -------------------------------------------------------------------------------------------------------
static void put_receipt(json_t *j, const struct receipt_row *row)
{
    json_put_str(j, "operation", row->operation);
    view_put_text(j, "outcome", row->outcome);
    view_put_text(j, "sandbox_id", row->sandbox_id);
    view_put_text(j, "job_id", row->job_id);
    json_put_str(j, "audit_id", row->audit_id);
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "settled_at", row->settled_at_ms);
}

json_t *view_receipt_summary(const struct receipt_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "id", row->id);
    json_put_str(j, "state", row->state == RECEIPT_FINAL ? "final" : "pending");
    put_receipt(j, row);
    return j;
}

json_t *view_receipt(const struct receipt_row *row)
{
    static const char *const ENVELOPE[] = {"payloadType", "payload", "signatures"};
    CLEANUP_JSON json_t *envelope = row->envelope_json ? json_loads(row->envelope_json, 0, NULL) : NULL;
    json_t *j = json_object();
    for (size_t i = 0; i < 3; i++)
        json_put(j, ENVELOPE[i], json_incref(json_object_get(envelope, ENVELOPE[i])));
    json_put_str(j, "id", row->id);
    put_receipt(j, row);
    return j;
}

// An entry as it was hashed, plus its hash; members that it left out stand as null.
json_t *view_audit(const struct audit_row *row)
{
    static const char *const MEMBERS[] = {"token_id", "request_id", "sandbox_id", "decision", "outcome", "of", "facts"};
    json_t *j = json_loads(row->entry_json, 0, NULL);
    if (!j)
        return NULL;
    for (size_t i = 0; i < sizeof MEMBERS / sizeof *MEMBERS; i++)
        if (!json_object_get(j, MEMBERS[i]))
            json_put(j, MEMBERS[i], json_null());
    json_put_str(j, "hash", row->hash);
    return j;
}

// ---- logs and events ------------------------------------------------------------------------------------------------
json_t *view_log_entry(const struct log_entry *e)
{
    json_t *j = json_object(), *text = json_stringn(e->text ? e->text : "", e->text_len);
    json_put_int(j, "seq", e->seq);
    json_put_time(j, "at", e->at_ms);
    json_put_str(j, "source", log_source_name(e->source));
    view_put_text(j, "stream", e->stream);
    view_put_text(j, "command_id", e->command_id);
    json_put(j, "text", text ? text : json_string(""));
    json_put(j, "truncated", json_boolean(e->truncated));
    json_put(j, "redacted", json_boolean(e->redacted));
    return j;
}

json_t *view_event(const struct event_row *row)
{
    json_t *j = json_object();
    json_put_int(j, "seq", row->seq);
    json_put_str(j, "id", row->id);
    json_put_time(j, "at", row->at_ms);
    json_put_str(j, "kind", row->kind);
    view_put_text(j, "sandbox_id", row->sandbox_id);
    json_t *data = row->data_json ? json_loads(row->data_json, 0, NULL) : NULL;
    json_put(j, "data", data ? data : json_object());
    return j;
}

// ---- lists ----------------------------------------------------------------------------------------------------------
bool list_begin(struct list *l, struct api_call *c)
{
    *l = (struct list){.c = c, .items = json_array()};
    l->limit = (unsigned)call_param_integer(c, "limit", LIMIT_LIST_DEFAULT);
    const struct param_value *cursor = call_param(c, "cursor");
    l->page = (struct page){.tenant = c->who->row.tenant, .limit = l->limit + 1};
    if (!cursor->given)
        return true;
    // Opaque to clients: a version digit and the last id that was shown.
    if (cursor->len == ID_LEN + 1 && cursor->text[0] == '1' && strspn(cursor->text, "0123456789abcdefghjkmnpqrstvwxyzilou") == cursor->len) {
        snprintf(l->cursor, sizeof l->cursor, "%s", cursor->text + 1);
        l->page.cursor = l->cursor;
        return true;
    }
    faults_add(call_faults(c), "/query/cursor", "is no cursor of this list");
    json_decref(l->items);
    call_invalid(c);
    return false;
}

bool list_add(struct list *l, const char *id, json_t *item)
{
    if (l->n == l->limit) {
        l->more = true;
        json_decref(item);
        return false;
    }
    json_array_append_new(l->items, item);
    l->n++;
    snprintf(l->last, sizeof l->last, "%s", id);
    return true;
}

void list_reply(struct list *l, int failed, const struct err *err)
{
    struct api_call *c = l->c;
    if (failed) {
        json_decref(l->items);
        call_fail(c, err);
        return;
    }
    json_t *j = json_object();
    char cursor[ID_MAX + 1];
    snprintf(cursor, sizeof cursor, "1%s", l->last);
    json_put(j, "items", l->items);
    json_put_str(j, "next_cursor", l->more ? cursor : NULL);
    call_admission(c);
    reply_json(c, 200, j);
}
