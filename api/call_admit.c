// Admissions: who asks for what, with the ids that its evidence will have.
#include <stdio.h>
#include <string.h>

#include "api/call.h"
#include "api/principal.h"

struct admission *call_admission(struct api_call *c)
{
    struct input *in = c->in;
    struct admission *a = &in->a;
    if (in->has_admission)
        return a;
    in->has_admission = true;
    if (c->who) {
        snprintf(a->tenant, sizeof a->tenant, "%s", c->who->row.tenant);
        snprintf(a->token_id, sizeof a->token_id, "%s", c->who->row.id);
    }
    snprintf(a->request_id, sizeof a->request_id, "%s", c->request_id);
    snprintf(a->operation, sizeof a->operation, "%s", c->op->name);
    a->if_generation = call_if_match(c);
    if (c->op->n_params > 0 && c->op->params[0].in == PARAM_PATH && c->op->params[0].id_type == ID_SANDBOX)
        snprintf(a->sandbox_id, sizeof a->sandbox_id, "%s", in->ids[0]);
    if (c->op->evidence != EVIDENCE_NONE)
        id_new(ID_AUDIT, a->audit_id);
    if (c->op->evidence == EVIDENCE_RECEIPT)
        id_new(ID_RECEIPT, a->receipt_id);
    if (in->entry) {
        snprintf(a->idem_key, sizeof a->idem_key, "%s", call_param_text(c, "Idempotency-Key", ""));
        snprintf(a->method, sizeof a->method, "%s", c->op->method);
        snprintf(a->path, sizeof a->path, "%s", in->path);
        memcpy(a->body_sha256, in->body_sha256, sizeof a->body_sha256);
    }
    return a;
}

void call_audit(struct api_call *c, const char *decision, const char *outcome, const json_t *facts)
{
    struct admission *a = call_admission(c);
    if (!*a->audit_id)
        id_new(ID_AUDIT, a->audit_id); // a denial has an entry also where the operation itself leaves none
    const struct audit_note note = {.id = a->audit_id, .tenant = a->tenant, .token_id = a->token_id,
                                    .request_id = a->request_id, .operation = a->operation,
                                    .sandbox_id = c->in->ran && *a->sandbox_id ? a->sandbox_id : NULL,
                                    .decision = decision, .outcome = outcome, .facts = facts};
    c->in->noted = audit_submit(c->a->store, &note) == 0;
}
