// Short acts with evidence: admit → do → settle, each step handed to the next by a callback.
#include "sandbox/internal.h"

#include <stdlib.h>
#include <string.h>

static int change_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct act *act = arg;
    return change_apply(tx, &act->change, err);
}

static void finish(struct act *act, const struct err *err)
{
    json_decref(act->facts);
    act->facts = NULL;
    free(act->problem);
    act->problem = NULL;
    act->done(act, err);
}

static void admitted(void *arg, const struct err *err)
{
    struct act *act = arg;
    if (err)
        finish(act, err);
    else
        act->go(act);
}

void act_begin(struct act *act)
{
    if (!*act->a.receipt_id) {
        act->go(act);
        return;
    }
    act->change = (struct change){.admit = &act->a};
    if (store_submit(act->m->store, change_tx, admitted, act) == 0)
        return;
    struct err err = {0};
    err_set(&err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
    finish(act, &err);
}

static void settled(void *arg, const struct err *err)
{
    struct act *act = arg;
    if (err)
        act->err = *err;
    finish(act, act->err.kind != ERR_NONE ? &act->err : NULL);
}

// Reads leave one audit entry, in whatever group comes next; the answer does not wait for it.
static void note(struct act *act)
{
    const struct audit_note n = {.id = act->a.audit_id, .tenant = act->a.tenant, .token_id = act->a.token_id,
                                 .request_id = act->a.request_id, .operation = act->a.operation,
                                 .sandbox_id = act->a.sandbox_id, .decision = "allowed", .outcome = act->change.outcome,
                                 .facts = act->facts};
    if (*act->a.audit_id)
        audit_submit(act->m->store, &n);
}

void act_end(struct act *act, const struct err *err)
{
    act->change = (struct change){.settle = &act->a, .outcome = "succeeded", .status = act->status, .facts = act->facts};
    memset(&act->err, 0, sizeof act->err);
    if (err) {
        act->err = *err;
        act->problem = change_set_failure(act->m, &act->change, &act->a, err);
    }
    if (act->outcome)
        act->change.outcome = act->outcome;
    if (*act->a.receipt_id && store_submit(act->m->store, change_tx, settled, act) == 0)
        return;
    if (!*act->a.receipt_id)
        note(act);
    settled(act, NULL);
}
