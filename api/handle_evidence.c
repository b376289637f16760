// Receipts, keys, the audit chain.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "store/verify.h"

static bool receipt_item(void *arg, const struct receipt_row *row)
{
    return list_add(arg, row->id, view_receipt_summary(row));
}

static void list_receipts(struct api_call *c)
{
    struct list l;
    struct err err = {0};
    if (list_begin(&l, c))
        list_reply(&l, receipt_list(c->a->store, &l.page, call_param_text(c, "sandbox_id", NULL), receipt_item, &l, &err),
                   &err);
}

static void get_receipt(struct api_call *c)
{
    struct receipt_row row = {0};
    struct err err = {0};
    const int got = receipt_get(c->a->store, c->who->row.tenant, c->in->ids[0], &row, &err);
    if (got > 0) {
        call_not_found(c);
    } else if (got < 0) {
        call_fail(c, &err);
    } else if (row.state != RECEIPT_FINAL) {
        err_set(&err, ERR_CONFLICT, "receipt_pending", "the outcome is not committed yet");
        err_remedy(&err, "ask again when the act has ended");
        call_fail(c, &err);
    } else {
        reply_json(c, 200, view_receipt(&row));
    }
    receipt_row_free(&row);
}

static void list_keys(struct api_call *c)
{
    struct err err = {0};
    char *text = evidence_keys(c->a->store, &err);
    json_t *items = text ? json_loads(text, 0, NULL) : NULL;
    free(text);
    if (!items) {
        if (err.kind == ERR_NONE)
            err_set(&err, ERR_INTERNAL, "keys", "the keys cannot be read");
        call_fail(c, &err);
        return;
    }
    json_t *j = json_object();
    json_put(j, "items", items);
    json_put(j, "next_cursor", json_null());
    reply_json(c, 200, j);
}

struct audit_page {
    json_t *items;
    int64_t last_seq;
};

static bool audit_item(void *arg, const struct audit_row *row)
{
    struct audit_page *p = arg;
    json_t *j = view_audit(row);
    if (j)
        json_array_append_new(p->items, j);
    p->last_seq = row->seq;
    return true;
}

static void list_audit(struct api_call *c)
{
    struct err err = {0};
    struct audit_page p = {json_array(), call_param_integer(c, "after_seq", 0)};
    const unsigned limit = (unsigned)call_param_integer(c, "limit", LIMIT_LIST_DEFAULT);
    store_flush(c->a->store); // what the client has an id of is there
    if (audit_list(c->a->store, c->who->row.tenant, p.last_seq, limit, audit_item, &p, &err) != 0) {
        json_decref(p.items);
        call_fail(c, &err);
        return;
    }
    json_t *j = json_object();
    json_put(j, "items", p.items);
    json_put_int(j, "last_seq", p.last_seq);
    call_admission(c);
    reply_json(c, 200, j);
}

static void get_checkpoint(struct api_call *c)
{
    struct err err = {0};
    store_flush(c->a->store);
    char *text = audit_checkpoint(c->a->store, &err);
    if (text)
        reply_text(c, 200, "application/json", text, strlen(text));
    else
        call_fail(c, &err);
}

// ---- verify -----------------------------------------------------------------------------------------------------------
static json_t *report_json(const struct verify_report *r)
{
    static const char *const VERDICTS[] = {"verified", "mismatch", "truncated", "unreadable"};
    static const char ZERO[] = "0000000000000000000000000000000000000000000000000000000000000000";
    json_t *j = json_object();
    json_put_str(j, "verdict", VERDICTS[r->verdict]);
    json_put_int(j, "entries", (int64_t)r->entries);
    json_put_int(j, "receipts", (int64_t)r->receipts);
    json_put_int(j, "pending_receipts", (int64_t)r->pending_receipts);
    json_put_int(j, "outputs_checked", (int64_t)r->outputs_checked);
    json_put_str(j, "head_hash", *r->head_hash ? r->head_hash : ZERO);
    json_put_str(j, "fault", *r->fault ? r->fault : NULL);
    return j;
}

// One walk at a time: it reads the whole chain.
static void verify(struct api_call *c)
{
    struct err err = {0};
    struct verify_report report = {0};
    if (!c->a->o.state_dir) {
        err_set(&err, ERR_UNAVAILABLE, "no_state_dir", "the server cannot tell where its files are");
        call_fail(c, &err);
        return;
    }
    if (atomic_exchange(&c->a->verifying, true)) {
        err_set(&err, ERR_UNAVAILABLE, "verifying", "another walk over the chain is under way");
        call_fail(c, &err);
        return;
    }
    verify_state(c->a->o.state_dir, NULL, NULL, 0, &report);
    atomic_store(&c->a->verifying, false);
    reply_json(c, 200, report_json(&report));
}

const struct handler EVIDENCE_HANDLERS[] = {
    {"receipt.list", RUN_POOLED, list_receipts, NULL, NULL},
    {"receipt.get", RUN_POOLED, get_receipt, NULL, NULL},
    {"key.list", RUN_POOLED, list_keys, NULL, NULL},
    {"audit.list", RUN_POOLED, list_audit, NULL, NULL},
    {"audit.checkpoint", RUN_POOLED, get_checkpoint, NULL, NULL},
    {"audit.verify", RUN_POOLED, verify, NULL, NULL},
    {0},
};
