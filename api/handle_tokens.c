// Tokens: create, list, revoke. Pure database acts: admitted, done and settled in one transaction.
#include <stdio.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/clock.h"
#include "base/enc.h"

#define EXPIRY_DEFAULT_SECONDS 7776000 // 90 days
#define OPERATOR_TENANT "default"      // of the first token: may make tokens for others

struct token_act {
    const struct admission *a;
    struct token_row row;
    uint8_t hash[SHA256_BYTES];
    const char *outcome;
    int status;
    bool revoke;
};

static json_t *facts_of(const struct token_row *row)
{
    json_t *f = json_object();
    json_put_str(f, "token_id", row->id);
    json_put_str(f, "tenant", row->tenant);
    json_put_int(f, "scopes", row->scopes);
    return f;
}

static int token_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct token_act *t = arg;
    CLEANUP_JSON json_t *facts = facts_of(&t->row);
    const struct settlement s = {.outcome = t->outcome, .status = t->status, .ref = t->row.id, .facts = facts};
    if (evidence_admit(tx, t->a, facts, err) != 0)
        return -1;
    if (!t->revoke && token_insert(tx, &t->row, t->hash, err) != 0)
        return -1;
    if (t->revoke && t->row.revoked_at_ms == 0 &&
        token_revoke(tx, t->row.tenant, t->row.id, clock_wall_ms(), err) != 0)
        return -1;
    return evidence_settle(tx, t->a, &s, err);
}

static void put_ids(json_t *j, const struct api_call *c)
{
    json_put_str(j, "audit_id", c->in->a.audit_id);
    json_put_str(j, "receipt_id", c->in->a.receipt_id);
}

static void reply_created(struct api_call *c, const struct token_row *row, const char *secret)
{
    json_t *j = view_token(row);
    json_put_str(j, "token", secret);
    put_ids(j, c);
    reply_header(c, "Cache-Control", "no-store");
    reply_json(c, 201, j);
}

static unsigned scopes_of(const json_t *list)
{
    unsigned bits = 0;
    size_t i;
    const json_t *one;
    json_array_foreach(list, i, one) bits |= (unsigned)scope_parse(json_string_value(one));
    return bits;
}

static bool is_operator(const struct api_call *c)
{
    return strcmp(c->who->row.tenant, OPERATOR_TENANT) == 0;
}

static int find(struct api_call *c, const char *id, struct token_row *ret, struct err *err)
{
    return is_operator(c) ? token_get_any(c->a->store, id, ret, err)
                          : token_get(c->a->store, c->who->row.tenant, id, ret, err);
}

// A token never allows more than its maker's tenant may: another tenant is the operator's business.
static bool tenant_allowed(struct api_call *c, const char *tenant)
{
    struct err err = {0};
    if (!tenant || strcmp(tenant, c->who->row.tenant) == 0 || is_operator(c))
        return true;
    err_set(&err, ERR_POLICY_DENIED, "tenant_denied", "tokens of another tenant are the business of the operator's tenant only");
    err_remedy(&err, "leave tenant out");
    call_fail(c, &err);
    return false;
}

static void create(struct api_call *c)
{
    const json_t *body = c->in->json, *expiry = json_object_get(body, "expires_in_seconds");
    const char *tenant = json_get_str(body, "tenant");
    char secret[TOKEN_TEXT_LEN + 1] = "alk_";
    struct err err = {0};
    if (!tenant_allowed(c, tenant))
        return;
    struct token_act t = {.a = call_admission(c), .outcome = "succeeded", .status = 201};
    const int64_t now = clock_wall_ms();
    id_new(ID_TOKEN, t.row.id);
    snprintf(t.row.tenant, sizeof t.row.tenant, "%s", tenant ? tenant : c->who->row.tenant);
    snprintf(t.row.name, sizeof t.row.name, "%s", json_get_str(body, "name"));
    t.row.scopes = scopes_of(json_object_get(body, "scopes"));
    t.row.created_at_ms = now;
    if (!json_is_null(expiry))
        t.row.expires_at_ms = now + (expiry ? json_integer_value(expiry) : EXPIRY_DEFAULT_SECONDS) * 1000;
    if (enc_random_base62(secret + 4, TOKEN_TEXT_LEN - 4) != 0) {
        err_set(&err, ERR_INTERNAL, "no_randomness", "no randomness");
        call_fail(c, &err);
        return;
    }
    crypto_sha256(secret, TOKEN_TEXT_LEN, t.hash);
    if (store_write(c->a->store, token_tx, &t, &err) != 0)
        call_fail(c, &err);
    else
        reply_created(c, &t.row, secret);
    explicit_bzero(secret, sizeof secret);
}

static void replay_create(struct api_call *c)
{
    struct token_row row = {0};
    struct err err = {0};
    if (replay_is_problem(c))
        return;
    if (find(c, c->in->replay->ref, &row, &err) == 0) {
        reply_created(c, &row, NULL);
        return;
    }
    err_set(&err, ERR_INTERNAL, "replay", "the token of the stored answer is not there");
    c->in->admitted = false;
    call_fail(c, &err);
}

static bool list_one(void *arg, const struct token_row *row)
{
    return list_add(arg, row->id, view_token(row));
}

static void list(struct api_call *c)
{
    struct list l;
    struct err err = {0};
    const char *tenant = call_param_text(c, "tenant", c->who->row.tenant);
    if (!tenant_allowed(c, tenant) || !list_begin(&l, c))
        return;
    l.page.tenant = tenant;
    list_reply(&l, token_list(c->a->store, &l.page, list_one, &l, &err), &err);
}

static void revoke(struct api_call *c)
{
    struct err err = {0};
    struct token_act t = {.a = call_admission(c), .outcome = "succeeded", .status = 200, .revoke = true};
    const int got = find(c, c->in->ids[0], &t.row, &err);
    if (got > 0) {
        call_not_found(c);
        return;
    }
    if (got == 0 && t.row.revoked_at_ms > 0)
        t.outcome = "unchanged";
    if (got < 0 || store_write(c->a->store, token_tx, &t, &err) != 0 ||
        find(c, t.row.id, &t.row, &err) != 0) {
        call_fail(c, &err);
        return;
    }
    principal_revoke(c->a->principals, t.row.id);
    streams_end(c->a, t.row.id);
    json_t *j = view_token(&t.row);
    put_ids(j, c);
    reply_json(c, 200, j);
}

const struct handler TOKEN_HANDLERS[] = {
    {"token.create", RUN_POOLED, create, NULL, replay_create},
    {"token.list", RUN_POOLED, list, NULL, NULL},
    {"token.revoke", RUN_POOLED, revoke, NULL, NULL},
    {0},
};
