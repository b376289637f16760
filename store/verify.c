// The check of chain, checkpoints and receipts, one entry at a time.
#include "store/verify.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "store/evidence.h"
#include "store/migrate.h"
#include "store/verify_int.h"

#define GENESIS "0000000000000000000000000000000000000000000000000000000000000000"
#define PAGE_ENTRIES 256 // read at once; between pages a server in this process is free to move its log
#define CHECKPOINT_FILE_MAX (64u << 10)

int verify_fault(struct verifier *v, enum verify_verdict verdict, const char *fmt, ...)
{
    if (v->report->verdict != VERIFY_OK)
        return -1;
    va_list args;
    va_start(args, fmt);
    vsnprintf(v->report->fault, sizeof v->report->fault, fmt, args);
    va_end(args);
    v->report->verdict = verdict;
    return -1;
}

int verify_unreadable(struct verifier *v, const struct err *err)
{
    return verify_fault(v, VERIFY_UNREADABLE, "%.150s (%.150s)", err->detail, err->internal);
}

bool verify_same(const char *a, const char *b)
{
    return strcmp(a ? a : "", b ? b : "") == 0;
}

json_t *verify_envelope(const struct trust *t, enum key_use use, const char *text, uint8_t ret_hash[SHA256_BYTES])
{
    const char *type = use == KEY_RECEIPT ? RECEIPT_PAYLOAD_TYPE : CHECKPOINT_PAYLOAD_TYPE;
    CLEANUP_JSON json_t *envelope = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    CLEANUP_FREE char *again = envelope ? json_canonical(envelope) : NULL;
    struct dsse d;
    if (!again || strcmp(again, text) != 0 || dsse_open(envelope, type, &d) != 0)
        return NULL;
    const struct trusted *key = trust_find(t, use, d.keyid);
    json_t *payload = key && dsse_verify(&d, type, key->pub)
                          ? json_loadb(buf_text(&d.payload), d.payload.len, JSON_REJECT_DUPLICATES, NULL)
                          : NULL;
    if (ret_hash)
        crypto_sha256(buf_text(&d.payload), d.payload.len, ret_hash);
    dsse_free(&d);
    return payload;
}

// ---- checkpoints --------------------------------------------------------------------------------------------------------
struct checkpoint {
    bool there;
    int64_t size;
    char head[SHA256_HEX];
};

// The signed payload and what stands beside it must be the same.
static int read_checkpoint(struct verifier *v, const char *what, const char *text, struct checkpoint *ret)
{
    CLEANUP_JSON json_t *payload = verify_envelope(&v->trust, KEY_CHECKPOINT, text, NULL);
    CLEANUP_JSON json_t *beside = payload ? json_loads(text, 0, NULL) : NULL;
    const char *head = json_get_str(payload, "head_hash");
    if (!beside || !head || strlen(head) != SHA256_HEX - 1)
        return verify_fault(v, VERIFY_MISMATCH, "%s: its signature does not hold", what);
    if (json_get_int(payload, "size", -1) != json_get_int(beside, "size", -2) ||
        !verify_same(head, json_get_str(beside, "head_hash")) ||
        !verify_same(json_get_str(payload, "at"), json_get_str(beside, "at")))
        return verify_fault(v, VERIFY_MISMATCH, "%s: it differs from what is signed", what);
    ret->there = true;
    ret->size = json_get_int(payload, "size", 0);
    strcpy(ret->head, head);
    return 0;
}

// A file that is missing is a fault only where it was asked for.
static int read_checkpoint_file(struct verifier *v, int dirfd, const char *path, bool asked, struct checkpoint *ret)
{
    CLEANUP_BUF struct buf text = BUF_INIT(CHECKPOINT_FILE_MAX);
    if (fd_read_file(dirfd, path, &text) != 0) {
        if (!asked && errno == ENOENT)
            return 0;
        return verify_fault(v, VERIFY_UNREADABLE, "the checkpoint file cannot be read: %s", strerror(errno));
    }
    if (text.len > 0 && text.data[text.len - 1] == '\n') // an editor's or curl's
        text.data[--text.len] = 0;
    return read_checkpoint(v, asked ? "the given checkpoint" : "checkpoint.json", buf_text(&text), ret);
}

static int read_table_checkpoint(struct verifier *v, struct checkpoint *ret)
{
    struct err err = {0};
    char head[SHA256_HEX];
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, "SELECT size, head_hash, at_ms, signed_json FROM checkpoint", &err);
    const int got = db_step(st, &err);
    if (got < 0)
        return verify_unreadable(v, &err);
    if (got == 0)
        return verify_fault(v, VERIFY_MISMATCH, "the database has no checkpoint");
    const int64_t size = db_col_int(st);
    db_col_text(st, head, sizeof head);
    char at[CLOCK_TEXT_MAX];
    clock_text(db_col_int(st), at);
    CLEANUP_FREE char *text = db_col_dup(st);
    if (read_checkpoint(v, "the database's checkpoint", text ? text : "", ret) != 0)
        return -1;
    CLEANUP_JSON json_t *beside = json_loads(text, 0, NULL);
    if (size != ret->size || strcmp(head, ret->head) != 0 || !verify_same(at, json_get_str(beside, "at")))
        return verify_fault(v, VERIFY_MISMATCH, "the database's checkpoint differs from what is signed");
    return 0;
}

// The chain was walked: its entry `size` must be the one that the checkpoint signs.
static int hold_against(struct verifier *v, const char *what, const struct checkpoint *c)
{
    struct err err = {0};
    char hash[SHA256_HEX] = GENESIS;
    if (!c->there)
        return 0;
    if (c->size > (int64_t)v->report->entries)
        return verify_fault(v, VERIFY_TRUNCATED, "%s knows of %lld audit entries, there are %llu", what,
                            (long long)c->size, (unsigned long long)v->report->entries);
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, "SELECT hash FROM audit WHERE seq = ?", &err);
    db_bind_int(st, c->size);
    const int got = db_step(st, &err);
    if (got < 0)
        return verify_unreadable(v, &err);
    if (got > 0)
        db_col_text(st, hash, sizeof hash);
    return strcmp(hash, c->head) == 0
               ? 0
               : verify_fault(v, VERIFY_MISMATCH, "%s: audit entry %lld is another one", what, (long long)c->size);
}

// ---- the chain ------------------------------------------------------------------------------------------------------------
struct entry_columns {
    int64_t seq, at_ms;
    char id[ID_MAX], hash[SHA256_HEX], tenant[128], settles[ID_MAX];
    const char *text;
    size_t len;
};

static void read_columns(struct stmt *st, struct entry_columns *c)
{
    c->seq = db_col_int(st);
    db_col_text(st, c->id, sizeof c->id);
    db_col_text(st, c->tenant, sizeof c->tenant);
    c->at_ms = db_col_int(st);
    db_col_text(st, c->hash, sizeof c->hash);
    db_col_text(st, c->settles, sizeof c->settles);
    c->text = db_col_borrow(st, &c->len);
}

static bool columns_agree(const struct entry_columns *c, const json_t *e)
{
    char at[CLOCK_TEXT_MAX];
    const char *of = json_get_str(e, "of");
    const char *settles = json_get_str(e, "receipt_id") ? NULL : of;
    return json_get_int(e, "seq", -1) == c->seq && verify_same(json_get_str(e, "id"), c->id) &&
           verify_same(json_get_str(e, "tenant"), c->tenant) && verify_same(settles, c->settles) &&
           verify_same(json_get_str(e, "at"), clock_text(c->at_ms, at));
}

static int check_entry(struct verifier *v, const struct entry_columns *c)
{
    uint8_t raw[SHA256_BYTES];
    char hash[SHA256_HEX];
    if (c->seq != (int64_t)v->report->entries + 1)
        return verify_fault(v, VERIFY_MISMATCH, "audit entry %llu is missing",
                            (unsigned long long)v->report->entries + 1);
    crypto_sha256(c->text, c->len, raw);
    enc_hex(raw, sizeof raw, hash);
    if (strcmp(hash, c->hash) != 0)
        return verify_fault(v, VERIFY_MISMATCH, "audit entry %lld (%s): its hash is another", (long long)c->seq, c->id);
    CLEANUP_JSON json_t *e = json_loadb(c->text, c->len, JSON_REJECT_DUPLICATES, NULL);
    if (!e || !columns_agree(c, e))
        return verify_fault(v, VERIFY_MISMATCH, "audit entry %lld (%s): it differs from what is hashed",
                            (long long)c->seq, c->id);
    if (!verify_same(json_get_str(e, "prev_hash"), v->report->head_hash))
        return verify_fault(v, VERIFY_MISMATCH, "audit entry %lld (%s): it does not follow the one before it",
                            (long long)c->seq, c->id);
    if (json_get_str(e, "receipt_id") &&
        (json_get_str(e, "of") ? verify_settlement(v, e) : verify_admission(v, e)) != 0)
        return -1;
    v->report->entries++;
    strcpy(v->report->head_hash, hash);
    return 0;
}

// 1: there may be more, 0: the end, -1.
static int check_page(struct verifier *v)
{
    struct err err = {0};
    struct entry_columns c;
    int got, n = 0;
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, "SELECT seq, id, tenant, at_ms, hash, settles, entry_json"
                                                      " FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", &err);
    db_bind_int(st, (int64_t)v->report->entries);
    db_bind_int(st, PAGE_ENTRIES);
    while ((got = db_step(st, &err)) > 0) {
        read_columns(st, &c);
        if (v->src.moving && c.seq > v->size)
            return 0; // appended while we look
        if (check_entry(v, &c) != 0)
            return -1;
        n++;
    }
    return got < 0 ? verify_unreadable(v, &err) : n == PAGE_ENTRIES;
}

static int check_chain(struct verifier *v)
{
    int more;
    strcpy(v->report->head_hash, GENESIS);
    do
        more = check_page(v);
    while (more > 0);
    return more;
}

// ---- keys in the database ---------------------------------------------------------------------------------------------------
static int check_keys(struct verifier *v)
{
    struct err err = {0};
    int got;
    char id[65], use[16];
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, "SELECT key_id, use, public_pem FROM keys", &err);
    while ((got = db_step(st, &err)) > 0) {
        struct trust one = {0};
        db_col_text(st, id, sizeof id);
        db_col_text(st, use, sizeof use);
        const enum key_use is = strcmp(use, "receipt") == 0 ? KEY_RECEIPT : KEY_CHECKPOINT;
        const bool good = trust_add_pem(&one, db_col_borrow(st, NULL), is) == 0 && strcmp(one.keys[0].id, id) == 0;
        trust_free(&one);
        if (!good)
            return verify_fault(v, VERIFY_MISMATCH, "key %.32s of the database is another", id);
    }
    return got < 0 ? verify_unreadable(v, &err) : 0;
}

// ---- all of it ----------------------------------------------------------------------------------------------------------------
static int open_database(struct verifier *v)
{
    struct err err = {0};
    if (source_open(&v->src, v->dirfd, &err) != 0)
        return verify_unreadable(v, &err);
    const int64_t version = db_number(v->src.db, "PRAGMA user_version", &err);
    if (version < 0)
        return verify_unreadable(v, &err);
    // No step so far has touched what is read here, so that a backup can be checked before it is opened for good.
    if (version < 1 || version > (int64_t)MIGRATIONS_COUNT)
        return verify_fault(v, VERIFY_UNREADABLE, "the database has schema %lld, not 1 to %zu", (long long)version,
                            MIGRATIONS_COUNT);
    return 0;
}

static int check_state(struct verifier *v, const char *checkpoint_path, const char *keys_pem_path, int deep)
{
    struct checkpoint given = {0}, file = {0}, table = {0};
    if (v->dirfd < 0)
        return verify_fault(v, VERIFY_UNREADABLE, "the state directory cannot be opened");
    if (keys_pem_path ? trust_load_file(&v->trust, keys_pem_path) : trust_load_dir(&v->trust, v->dirfd))
        return verify_fault(v, VERIFY_UNREADABLE, "there are no public keys to check against");
    // Files first: beside a working server they are never newer than the database that is read after them.
    if (checkpoint_path && read_checkpoint_file(v, AT_FDCWD, checkpoint_path, true, &given) != 0)
        return -1;
    if (read_checkpoint_file(v, v->dirfd, "checkpoint.json", false, &file) != 0)
        return -1;
    if (open_database(v) != 0 || read_table_checkpoint(v, &table) != 0)
        return -1;
    v->size = table.size;
    if (check_keys(v) != 0 || check_chain(v) != 0)
        return -1;
    if (hold_against(v, "the database's checkpoint", &table) != 0 || hold_against(v, "checkpoint.json", &file) != 0 ||
        hold_against(v, "the given checkpoint", &given) != 0)
        return -1;
    if (!v->src.moving && (int64_t)v->report->entries > table.size)
        return verify_fault(v, VERIFY_MISMATCH, "audit entry %lld is past the checkpoint", (long long)table.size + 1);
    if (verify_counts(v) != 0)
        return -1;
    return deep ? verify_outputs(v) : 0;
}

enum verify_verdict verify_state(const char *state_dir, const char *checkpoint_path, const char *keys_pem_path,
                                 int deep, struct verify_report *ret)
{
    CLEANUP_FD int dirfd = open(state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct verifier v = {.report = ret, .dirfd = dirfd};
    memset(ret, 0, sizeof *ret);
    strcpy(ret->head_hash, GENESIS);
    (void)check_state(&v, checkpoint_path, keys_pem_path, deep);
    source_close(&v.src);
    trust_free(&v.trust);
    return ret->verdict;
}

// For one receipt as a client keeps it: laid out in whatever way, perhaps with other members beside the three.
enum verify_verdict verify_receipt_text(const char *envelope_json, const char *public_pem, struct verify_report *ret)
{
    struct dsse d;
    uint8_t pub[ED25519_PUB_BYTES];
    struct verifier v = {.report = ret, .dirfd = -1};
    memset(ret, 0, sizeof *ret);
    CLEANUP_JSON json_t *envelope = json_loads(envelope_json, JSON_REJECT_DUPLICATES, NULL);
    if (crypto_public_from_pem(public_pem, pub) != 0)
        verify_fault(&v, VERIFY_UNREADABLE, "the key is no Ed25519 public key in PEM");
    else if (!envelope)
        verify_fault(&v, VERIFY_UNREADABLE, "the receipt is no JSON");
    else if (dsse_open(envelope, RECEIPT_PAYLOAD_TYPE, &d) != 0)
        verify_fault(&v, VERIFY_MISMATCH, "the receipt is no envelope of " RECEIPT_PAYLOAD_TYPE);
    else {
        if (!dsse_verify(&d, RECEIPT_PAYLOAD_TYPE, pub))
            verify_fault(&v, VERIFY_MISMATCH, "the receipt's signature does not hold");
        dsse_free(&d);
        ret->receipts = 1;
    }
    return ret->verdict;
}
