// view.h - objects as the specification shows them. Views return new JSON; view_reply_… answer the call. Those that take
// a call may read the database or a spool: not from the adapter's thread, but for view_reply_sandbox.
#ifndef AIRLOCK_API_VIEW_H
#define AIRLOCK_API_VIEW_H

#include "api/call.h"
#include "store/logfile.h"

// ---- sandboxes ----------------------------------------------------------------------------------------------------
// act: the request that changed it, whose ids stand in the answer; NULL: those of its creation.
json_t *view_sandbox(const struct sandbox_row *row, const struct admission *act);
// With ETag, and Location for 201. A read is rendered once per generation.
void view_reply_sandbox(struct api_call *c, int status, struct sandbox_info *info);
// act: the request that made it; NULL: those of its creation.
json_t *view_snapshot(const struct snapshot_row *row, const struct admission *act);
json_t *view_snapshot_deletion(const struct snapshot_row *row, const struct admission *act);
json_t *view_deletion(const struct sandbox_row *row, const struct admission *act);

// ---- commands -----------------------------------------------------------------------------------------------------
json_t *view_command_result(struct api_call *c, const struct command_row *row);
json_t *view_command_result_by_id(struct api_call *c, const char *id); // NULL: none such
json_t *view_command(struct api_call *c, const struct command_row *row);
json_t *view_command_summary(const struct command_row *row);
json_t *view_command_exit(const struct command_row *row);
json_t *view_command_started(const struct command_row *row);

// ---- the rest -----------------------------------------------------------------------------------------------------
json_t *view_job(const struct job_row *row);
// 202 with the job of the call's admission. Pool.
void view_reply_accepted(struct api_call *c);
json_t *view_token(const struct token_row *row);
json_t *view_receipt_summary(const struct receipt_row *row);
json_t *view_receipt(const struct receipt_row *row);
json_t *view_log_entry(const struct log_entry *e);
json_t *view_event(const struct event_row *row);
json_t *view_audit(const struct audit_row *row);

// The security model without its isolation (model.c).
json_t *model_json(void);

// ---- helpers ------------------------------------------------------------------------------------------------------
int view_put_text(json_t *obj, const char *key, const char *text_or_empty); // null for ""
json_t *view_sorted_keys(const char *json_object_or_array_text);            // ["A","B"]
json_t *view_seconds(int64_t ms);

// ---- lists --------------------------------------------------------------------------------------------------------
// A page being made: asks the store for one more than is shown.
struct list {
    struct api_call *c;
    json_t *items;
    unsigned limit, n;
    char last[ID_MAX];
    bool more;
    char cursor[ID_MAX];
    struct page page;        // for the query
};
// Reads limit and cursor; false when it answered with a fault.
bool list_begin(struct list *l, struct api_call *c);
// Takes one view (stolen) with its id; false: enough.
bool list_add(struct list *l, const char *id, json_t *item);
void list_reply(struct list *l, int failed, const struct err *err);

#endif
