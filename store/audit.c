// The audit chain: entries that hash the one before them, and the checkpoint that signs how many there are.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/log.h"
#include "store/dsse.h"
#include "store/int.h"

#define GENESIS "0000000000000000000000000000000000000000000000000000000000000000"
#define CHECKPOINT_TEXT_MAX 8192

// ---- appending ------------------------------------------------------------------------------------------------------
static int put_word(json_t *o, const char *key, const char *text)
{
    return json_put_str(o, key, text && *text ? text : NULL);
}

// The entry without its hash; new. NULL: out of memory, or a text that is not UTF-8.
static char *entry_text(const struct store_tx *tx, const struct audit_entry *e)
{
    CLEANUP_JSON json_t *o = json_object();
    int bad = 0;
    bad |= json_put_int(o, "seq", tx->head.size + 1);
    bad |= put_word(o, "id", e->id);
    bad |= json_put_time(o, "at", tx->now_ms);
    bad |= json_put_str(o, "tenant", e->tenant ? e->tenant : "");
    bad |= put_word(o, "token_id", e->token_id);
    bad |= put_word(o, "request_id", e->request_id);
    bad |= json_put_str(o, "operation", e->operation ? e->operation : "");
    bad |= put_word(o, "sandbox_id", e->sandbox_id);
    bad |= put_word(o, "job_id", e->job_id);
    bad |= put_word(o, "decision", e->decision);
    bad |= put_word(o, "outcome", e->outcome);
    bad |= put_word(o, "receipt_id", e->receipt_id);
    bad |= put_word(o, "of", e->of);
    bad |= put_word(o, "receipt_sha256", e->receipt_sha256);
    bad |= e->status ? json_put_int(o, "status", e->status) : json_put(o, "status", json_null());
    bad |= e->facts ? json_object_set(o, "facts", (json_t *)e->facts) : json_put(o, "facts", json_null());
    bad |= json_put_str(o, "prev_hash", tx->head.hash);
    return bad ? NULL : json_canonical(o);
}

int audit_add(struct store_tx *tx, const struct audit_entry *e, struct err *err)
{
    char made[ID_MAX], hash[SHA256_HEX];
    uint8_t raw[SHA256_BYTES];
    struct audit_entry copy = *e;
    if (!copy.id || !*copy.id)
        copy.id = id_new(ID_AUDIT, made);
    CLEANUP_FREE char *text = entry_text(tx, &copy);
    if (!text)
        return err_set(err, ERR_INTERNAL, "audit_entry", "the audit entry could not be written");
    crypto_sha256(text, strlen(text), raw);
    enc_hex(raw, sizeof raw, hash);
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "INSERT INTO audit (seq, id, tenant, at_ms, entry_json, hash, settles)"
                                                   " VALUES (?, ?, ?, ?, ?, ?, ?)", err);
    db_bind_int(st, tx->head.size + 1);
    db_bind_text(st, copy.id);
    db_bind_text(st, copy.tenant ? copy.tenant : "");
    db_bind_int(st, tx->now_ms);
    db_bind_text(st, text);
    db_bind_text(st, hash);
    db_bind_text(st, copy.of && *copy.of && !(copy.receipt_id && *copy.receipt_id) ? copy.of : NULL);
    if (db_run(st, err) != 0)
        return -1;
    tx->head.size++;
    memcpy(tx->head.hash, hash, sizeof hash);
    return 0;
}

int audit_append(struct store_tx *tx, const struct audit_note *n, struct err *err)
{
    const struct audit_entry e = {.id = n->id, .tenant = n->tenant, .token_id = n->token_id,
                                  .request_id = n->request_id, .operation = n->operation,
                                  .sandbox_id = n->sandbox_id, .decision = n->decision, .outcome = n->outcome,
                                  .facts = n->facts};
    return audit_add(tx, &e, err);
}

// ---- without waiting --------------------------------------------------------------------------------------------------
struct note_copy {
    struct audit_note note;
    json_t *facts;
    char text[];
};

static const char *keep_text(char **at, const char *text)
{
    if (!text)
        return NULL;
    const size_t n = strlen(text) + 1;
    char *copy = memcpy(*at, text, n);
    *at += n;
    return copy;
}

static struct note_copy *note_copy(const struct audit_note *n)
{
    const char *const texts[] = {n->id, n->tenant, n->token_id, n->request_id, n->operation, n->sandbox_id, n->decision,
                                 n->outcome};
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        bytes += texts[i] ? strlen(texts[i]) + 1 : 0;
    struct note_copy *c = malloc(sizeof *c + bytes);
    if (!c)
        return NULL;
    char *at = c->text;
    c->facts = n->facts ? json_deep_copy(n->facts) : NULL;
    c->note = (struct audit_note){.id = keep_text(&at, n->id), .tenant = keep_text(&at, n->tenant),
                                  .token_id = keep_text(&at, n->token_id),
                                  .request_id = keep_text(&at, n->request_id),
                                  .operation = keep_text(&at, n->operation),
                                  .sandbox_id = keep_text(&at, n->sandbox_id),
                                  .decision = keep_text(&at, n->decision), .outcome = keep_text(&at, n->outcome),
                                  .facts = c->facts};
    return c;
}

static int note_run(struct store_tx *tx, void *arg, struct err *err)
{
    return audit_append(tx, &((struct note_copy *)arg)->note, err);
}

static void note_free(void *arg)
{
    json_decref(((struct note_copy *)arg)->facts);
    free(arg);
}

static void note_done(void *arg, const struct err *err)
{
    if (err)
        log_warn_limited("an audit entry was lost: %s %s", err->detail, err->internal);
    note_free(arg);
}

int audit_submit(struct store *s, const struct audit_note *note)
{
    struct note_copy *c = note_copy(note);
    if (!c)
        return -1;
    if (store_submit_later(s, note_run, note_done, c) == 0)
        return 0;
    note_free(c);
    return -1;
}

// ---- checkpoint -------------------------------------------------------------------------------------------------------
int audit_sign_head(struct store_tx *tx, struct err *err)
{
    CLEANUP_JSON json_t *o = json_object();
    int bad = json_put_str(o, "schema", "airlock.checkpoint.v1");
    bad |= json_put_int(o, "size", tx->head.size);
    bad |= json_put_str(o, "head_hash", tx->head.hash);
    bad |= json_put_time(o, "at", tx->now_ms);
    CLEANUP_FREE char *payload = bad ? NULL : json_canonical(o);
    CLEANUP_JSON json_t *sealed =
        payload ? dsse_seal(tx->store->keys.checkpoint, CHECKPOINT_PAYLOAD_TYPE, payload, err) : NULL;
    if (!sealed)
        return payload ? -1 : err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    json_object_del(o, "schema");
    CLEANUP_FREE char *text = json_object_update(sealed, o) == 0 ? json_canonical(sealed) : NULL;
    if (!text)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "INSERT INTO checkpoint (one, size, head_hash, at_ms, signed_json)"
                                                   " VALUES (1, ?, ?, ?, ?) ON CONFLICT (one) DO UPDATE SET"
                                                   " size = excluded.size, head_hash = excluded.head_hash,"
                                                   " at_ms = excluded.at_ms, signed_json = excluded.signed_json", err);
    db_bind_int(st, tx->head.size);
    db_bind_text(st, tx->head.hash);
    db_bind_int(st, tx->now_ms);
    db_bind_text(st, text);
    return db_run(st, err);
}

static char *checkpoint_text(struct db *db, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, "SELECT signed_json FROM checkpoint", err) : NULL;
    const int got = db_step(st, err);
    char *text = got > 0 ? db_col_dup(st) : NULL;
    if (got >= 0 && !text)
        err_set(err, ERR_INTERNAL, "store_corrupt", "the database is damaged");
    return text;
}

char *audit_checkpoint(struct store *s, struct err *err)
{
    return checkpoint_text(reader_db(s, err), err);
}

int audit_write_file(struct store *s, struct err *err)
{
    CLEANUP_FREE char *text = checkpoint_text(s->db, err);
    if (!text)
        return -1;
    return fd_write_file_atomic(s->dirfd, "checkpoint.json", text, strlen(text), 0600) == 0
               ? 0
               : err_sys(err, errno, "writing checkpoint.json");
}

// ---- opening ----------------------------------------------------------------------------------------------------------
static int load_head(struct store *s, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(s->db, "SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1", err);
    const int got = db_step(st, err);
    s->head.size = got > 0 ? db_col_int(st) : 0;
    strcpy(s->head.hash, GENESIS);
    if (got > 0)
        db_col_text(st, s->head.hash, sizeof s->head.hash);
    return got < 0 ? -1 : 0;
}

static int sign_first(struct store *s, struct err *err)
{
    struct store_tx tx = {.store = s, .db = s->db, .now_ms = clock_wall_ms(), .head = s->head};
    return audit_sign_head(&tx, err);
}

// The table's checkpoint must be of this head: both are written in one transaction.
static int check_head(struct store *s, struct err *err)
{
    char hash[SHA256_HEX];
    CLEANUP_STMT struct stmt *st = db_stmt(s->db, "SELECT size, head_hash FROM checkpoint", err);
    const int got = db_step(st, err);
    if (got < 0)
        return -1;
    if (got == 0 && s->head.size == 0)
        return sign_first(s, err);
    const int64_t size = got > 0 ? db_col_int(st) : -1;
    if (got > 0)
        db_col_text(st, hash, sizeof hash);
    if (got > 0 && size == s->head.size && strcmp(hash, s->head.hash) == 0)
        return 0;
    err_set(err, ERR_INTERNAL, "store_corrupt", "the audit chain does not end where its checkpoint says");
    return err_remedy(err, "run airlock verify on the state directory");
}

// A checkpoint.json that knows more than the database tells of an older database put in its place. It is kept, for
// `airlock verify --checkpoint`, instead of being written over.
static void keep_newer_file(struct store *s)
{
    char name[64];
    CLEANUP_BUF struct buf text = BUF_INIT(CHECKPOINT_TEXT_MAX);
    if (fd_read_file(s->dirfd, "checkpoint.json", &text) != 0)
        return;
    CLEANUP_JSON json_t *o = json_loadb(buf_text(&text), text.len, 0, NULL);
    const int64_t size = json_get_int(o, "size", 0);
    if (size <= s->head.size)
        return;
    snprintf(name, sizeof name, "checkpoint-%lld.json", (long long)size);
    log_error("checkpoint.json knows of %lld audit entries, the database of %lld: is it an old copy? kept as %s",
              (long long)size, (long long)s->head.size, name);
    if (renameat(s->dirfd, "checkpoint.json", s->dirfd, name) != 0)
        log_error("checkpoint.json could not be kept");
}

int audit_open(struct store *s, struct err *err)
{
    if (load_head(s, err) != 0 || check_head(s, err) != 0)
        return -1;
    keep_newer_file(s);
    s->checkpoint_due = true;
    return 0;
}

// ---- reading ------------------------------------------------------------------------------------------------------------
static const struct field AUDIT_FIELDS[] = {
    FIELD(INT64, audit_row, seq), FIELD(TEXT, audit_row, id), FIELD(TEXT, audit_row, tenant),
    FIELD(INT64, audit_row, at_ms), FIELD(HEAP, audit_row, entry_json), FIELD(TEXT, audit_row, hash),
};
static const struct row_type AUDIT = ROW_TYPE(audit_row, AUDIT_FIELDS);

int audit_list(struct store *s, const char *tenant, int64_t after_seq, unsigned limit,
               bool (*fn)(void *, const struct audit_row *), void *arg, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT seq, id, tenant, at_ms, entry_json, hash FROM audit"
                         " WHERE tenant = ? AND seq > ? ORDER BY seq LIMIT ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_int(st, after_seq);
    db_bind_int(st, limit);
    struct audit_row row;
    int got;
    while ((got = row_next(st, &AUDIT, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&AUDIT, &row);
        if (!more)
            return 0;
    }
    return got;
}
