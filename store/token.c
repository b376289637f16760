#include <string.h>

#include "store/int.h"

static const struct {
    enum scope bit;
    const char *name;
} SCOPES[] = {
    {SCOPE_SANDBOX_READ, "sandbox:read"}, {SCOPE_SANDBOX_WRITE, "sandbox:write"}, {SCOPE_COMMAND_RUN, "command:run"},
    {SCOPE_COMMAND_ROOT, "command:root"}, {SCOPE_FILES_READ, "files:read"},       {SCOPE_FILES_WRITE, "files:write"},
    {SCOPE_AUDIT_READ, "audit:read"},     {SCOPE_ADMIN, "admin"},
};

const char *scope_name(enum scope one)
{
    for (size_t i = 0; i < sizeof SCOPES / sizeof SCOPES[0]; i++)
        if (SCOPES[i].bit == one)
            return SCOPES[i].name;
    return NULL;
}

int scope_parse(const char *name)
{
    for (size_t i = 0; i < sizeof SCOPES / sizeof SCOPES[0]; i++)
        if (strcmp(SCOPES[i].name, name) == 0)
            return (int)SCOPES[i].bit;
    return -1;
}

#define TOKEN_COLUMNS "id, tenant, name, scopes, created_at_ms, expires_at_ms, revoked_at_ms"
static const struct field TOKEN_FIELDS[] = {
    FIELD(TEXT, token_row, id), FIELD(TEXT, token_row, tenant), FIELD(TEXT, token_row, name),
    FIELD(INT, token_row, scopes), FIELD(INT64, token_row, created_at_ms), FIELD(INT64, token_row, expires_at_ms),
    FIELD(INT64, token_row, revoked_at_ms),
};
static const struct row_type TOKEN = ROW_TYPE(token_row, TOKEN_FIELDS);

int token_insert(struct store_tx *tx, const struct token_row *row, const uint8_t hash[SHA256_BYTES], struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO tokens (" TOKEN_COLUMNS ", hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", err);
    row_bind(st, &TOKEN, row, 0);
    db_bind_blob(st, hash, SHA256_BYTES);
    return db_run(st, err);
}

// The first revocation stands: its time is what stopped the streams.
int token_revoke(struct store_tx *tx, const char *tenant, const char *id, int64_t at_ms, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "UPDATE tokens SET revoked_at_ms = CASE revoked_at_ms WHEN 0 THEN ? ELSE revoked_at_ms END"
                        " WHERE tenant = ? AND id = ?", err);
    db_bind_int(st, at_ms);
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    if (db_run(st, err) != 0)
        return -1;
    return db_changes(tx->db) == 1 ? 0 : err_set(err, ERR_NOT_FOUND, "", "no such token");
}

static int one(struct stmt *st, struct token_row *ret, struct err *err)
{
    struct token_row row;
    const int got = row_next(st, &TOKEN, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

int token_find(struct store *s, const uint8_t hash[SHA256_BYTES], struct token_row *ret, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, "SELECT " TOKEN_COLUMNS " FROM tokens WHERE hash = ?", err) : NULL;
    db_bind_blob(st, hash, SHA256_BYTES);
    return one(st, ret, err);
}

int token_get(struct store *s, const char *tenant, const char *id, struct token_row *ret, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " TOKEN_COLUMNS " FROM tokens WHERE tenant = ? AND id = ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    return one(st, ret, err);
}

int token_get_any(struct store *s, const char *id, struct token_row *ret, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, "SELECT " TOKEN_COLUMNS " FROM tokens WHERE id = ?", err) : NULL;
    db_bind_text(st, id);
    return one(st, ret, err);
}

int token_list(struct store *s, const struct page *page, bool (*fn)(void *, const struct token_row *), void *arg,
               struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " TOKEN_COLUMNS " FROM tokens WHERE tenant = ? AND id < ? ORDER BY id DESC LIMIT ?",
                     err) : NULL;
    db_bind_text(st, page->tenant);
    db_bind_text(st, page->cursor ? page->cursor : "~"); // sorts after every id
    db_bind_int(st, page->limit);
    struct token_row row;
    int got;
    while ((got = row_next(st, &TOKEN, &row, err)) > 0)
        if (!fn(arg, &row))
            return 0;
    return got;
}
