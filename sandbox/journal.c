// One durable step of a sandbox or job, with everything that proves it, in one transaction.
#include "sandbox/carry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct sandbox_row *row_of(const struct change *c)
{
    return c->insert ? c->insert : c->update;
}

static int tell_state(struct store_tx *tx, const struct change *c, struct err *err)
{
    const struct sandbox_row *row = row_of(c);
    if (c->from_state > 0) {
        struct sm sm;
        sm_init(&sm, SANDBOX_STATE_TABLE, SANDBOX_STATES, c->from_state);
        if (!sm_move(&sm, row->state))
            return err_set(err, ERR_INTERNAL, "forbidden_move", "the sandbox cannot go from %s to %s",
                           sandbox_state_name(c->from_state), sandbox_state_name(row->state));
    }
    CLEANUP_JSON json_t *facts = json_object();
    json_put_str(facts, "from", c->from_state > 0 ? sandbox_state_name(c->from_state) : NULL);
    json_put_str(facts, "to", sandbox_state_name(row->state));
    json_put_str(facts, "cause", c->cause ? c->cause : "request");
    json_put_str(facts, "state_reason", *row->state_reason ? row->state_reason : NULL);
    const struct audit_note note = {.tenant = row->tenant, .operation = "sandbox.state", .sandbox_id = row->id,
                                    .decision = "allowed", .outcome = sandbox_state_name(row->state),
                                    .facts = facts};
    if (audit_append(tx, &note, err) != 0)
        return -1;
    CLEANUP_FREE char *data = json_dumps(facts, JSON_COMPACT);
    return event_append(tx, row->tenant, "sandbox.state", row->id, data, err);
}

static int settle(struct store_tx *tx, const struct change *c, struct err *err)
{
    const struct settlement s = {.outcome = c->outcome, .status = c->status, .ref = c->ref,
                                 .problem_json = c->problem_json, .facts = c->facts, .forget_idem = c->forget_idem};
    return evidence_settle(tx, c->settle, &s, err);
}

static int each_row(struct store_tx *tx, const struct change *c, struct err *err)
{
    for (size_t i = 0; i < c->n_rows; i++) {
        const struct change one = {.insert = c->rows_insert ? &c->rows[i] : NULL,
                                   .update = c->rows_insert ? NULL : &c->rows[i], .max_live = c->max_live,
                                   .from_state = c->rows_from, .cause = c->cause};
        if (change_apply(tx, &one, err) != 0)
            return -1;
    }
    return 0;
}

static int snapshot_rows(struct store_tx *tx, const struct change *c, struct err *err)
{
    const struct snapshot_row *row = c->snapshot_insert ? c->snapshot_insert : c->snapshot_update;
    char data[80];
    if (!row)
        return 0;
    if (c->snapshot_insert ? snapshot_insert(tx, row, c->max_snapshots, err) != 0 : snapshot_update(tx, row, err) != 0)
        return -1;
    if (!c->event_kind)
        return 0;
    snprintf(data, sizeof data, "{\"snapshot_id\":\"%s\"}", row->id);
    return event_append(tx, row->tenant, c->event_kind, row->sandbox_id, data, err);
}

int change_apply(struct store_tx *tx, const struct change *c, struct err *err)
{
    if (c->admit && evidence_admit(tx, c->admit, c->admit_facts, err) != 0)
        return -1;
    if (c->insert && sandbox_insert(tx, c->insert, c->max_live, err) != 0)
        return -1;
    if (c->update && sandbox_update(tx, c->update, err) != 0)
        return -1;
    if (each_row(tx, c, err) != 0 || snapshot_rows(tx, c, err) != 0)
        return -1;
    if (c->n_continued && carry_insert(tx, c->continued, c->n_continued, err) != 0)
        return -1;
    if (c->job_insert && job_insert(tx, c->job_insert, err) != 0)
        return -1;
    if (c->job_update && job_update(tx, c->job_update, err) != 0)
        return -1;
    if (row_of(c) && c->from_state != row_of(c)->state && c->from_state != 0 && tell_state(tx, c, err) != 0)
        return -1;
    if (c->settle && settle(tx, c, err) != 0)
        return -1;
    return 0;
}

static int apply_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return change_apply(tx, arg, err);
}

static void show(void *arg)
{
    const struct change *c = arg;
    for (size_t i = 0; i < c->n_shown; i++)
        sandbox_publish(c->shown[i].s, c->shown[i].row);
}

int change_commit(struct manager *m, const struct change *c, struct err *err)
{
    return store_write_then(m->store, apply_fn, show, (void *)c, err);
}

int change_show(struct sandbox *s, const struct change *c, struct sandbox_row *row, struct err *err)
{
    struct shown one = {s, row};
    struct change whole = *c;
    whole.update = row;
    whole.shown = &one;
    whole.n_shown = 1;
    return change_commit(s->m, &whole, err);
}

int change_show_once(struct sandbox *s, const struct change *c, struct sandbox_row *row, struct err *err)
{
    const int failed = change_show(s, c, row, err);
    if (failed)
        sandbox_row_free(row);
    return failed;
}

char *problem_of(struct manager *m, const struct err *err, const struct admission *a, int *ret_status)
{
    return m->o.render_problem(err, a, ret_status);
}

char *change_set_failure(struct manager *m, struct change *c, const struct admission *a, const struct err *err)
{
    char *problem = problem_of(m, err, a, &c->status);
    const bool called_off = err->kind == ERR_CONFLICT &&
                            (strcmp(err->code, "deleted") == 0 || strcmp(err->code, "cancelled") == 0);
    c->outcome = called_off ? "cancelled" : "failed";
    c->problem_json = problem;
    c->forget_idem = c->status == 401 || c->status == 429 || c->status >= 500;
    return problem;
}

void system_admission(struct admission *a, const char *tenant, const char *operation, const char *sandbox_id)
{
    memset(a, 0, sizeof *a);
    snprintf(a->tenant, sizeof a->tenant, "%s", tenant);
    snprintf(a->operation, sizeof a->operation, "%s", operation);
    snprintf(a->sandbox_id, sizeof a->sandbox_id, "%s", sandbox_id);
    snprintf(a->request_id, sizeof a->request_id, "system");
    id_new(ID_AUDIT, a->audit_id);
    id_new(ID_RECEIPT, a->receipt_id);
}
