// Signing keys: <state>/keys/receipt.pem and checkpoint.pem (0600), each with its public half beside it; argv.key for the
// keyed hashes of commands, snapshot.key for seals.
// Rotation: move receipt.pem away and start again. The old public key stays in the table and as <use>-<key id>.pub.pem.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "store/int.h"

#define SQL_RETIRE "UPDATE keys SET retired_at_ms = ?1 WHERE use = ?2 AND key_id <> ?3 AND retired_at_ms = 0"
#define SQL_INSERT                                                                                                     \
    "INSERT INTO keys (key_id, use, public_pem, created_at_ms, retired_at_ms) VALUES (?1, ?2, ?3, ?4, 0)"              \
    " ON CONFLICT (key_id, use) DO UPDATE SET retired_at_ms = 0 WHERE retired_at_ms <> 0"
#define SQL_LIST                                                                                                       \
    "SELECT key_id, use, public_pem, created_at_ms, retired_at_ms FROM keys"                                           \
    " ORDER BY retired_at_ms <> 0, use, key_id"

static int publish(int dirfd, const char *name, const char *pem, struct err *err)
{
    CLEANUP_BUF struct buf have = BUF_INIT(4096);
    if (fd_read_file(dirfd, name, &have) == 0 && strcmp(buf_text(&have), pem) == 0)
        return 0;
    return fd_write_file_atomic(dirfd, name, pem, strlen(pem), 0644) == 0 ? 0 : err_sys(err, errno, "writing %s", name);
}

static int keep(struct store *s, const char *use, const struct sign_key *key, struct err *err)
{
    const int64_t now = clock_wall_ms();
    CLEANUP_STMT struct stmt *retire = db_stmt(s->db, SQL_RETIRE, err);
    db_bind_int(retire, now);
    db_bind_text(retire, use);
    db_bind_text(retire, sign_key_id(key));
    if (db_run(retire, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *insert = db_stmt(s->db, SQL_INSERT, err);
    db_bind_text(insert, sign_key_id(key));
    db_bind_text(insert, use);
    db_bind_text(insert, sign_key_public_pem(key));
    db_bind_int(insert, now);
    return db_run(insert, err);
}

// Every public key as a file, for checks without the database: <use>.pub.pem is the one in force.
static int publish_all(struct store *s, int dirfd, struct err *err)
{
    char id[65], use[16], name[100];
    int got;
    CLEANUP_STMT struct stmt *st = db_stmt(s->db, SQL_LIST, err);
    while ((got = db_step(st, err)) > 0) {
        db_col_text(st, id, sizeof id);
        db_col_text(st, use, sizeof use);
        snprintf(name, sizeof name, "%s-%s.pub.pem", use, id);
        if (publish(dirfd, name, db_col_borrow(st, NULL), err) != 0)
            return -1;
    }
    if (got < 0 || publish(dirfd, "receipt.pub.pem", sign_key_public_pem(s->keys.receipt), err) != 0)
        return -1;
    return publish(dirfd, "checkpoint.pub.pem", sign_key_public_pem(s->keys.checkpoint), err);
}

// Made anew only where there is none: one that cannot be read just now is not lost.
static int load_hmac_key(int dirfd, const char *name, uint8_t key[static HMAC_KEY_BYTES], struct err *err)
{
    CLEANUP_BUF struct buf have = BUF_INIT(HMAC_KEY_BYTES);
    const int got = fd_read_file(dirfd, name, &have);
    if (got == 0 && have.len == HMAC_KEY_BYTES) {
        memcpy(key, have.data, HMAC_KEY_BYTES);
        explicit_bzero(have.data, have.len);
        return 0;
    }
    if (got == 0 || errno == EFBIG) {
        err_set(err, ERR_INTERNAL, "key_unreadable", "keys/%s is damaged", name);
        return err_remedy(err, "restore it from a backup, or move it away: a new one is made");
    }
    if (errno != ENOENT)
        return err_sys(err, errno, "reading %s", name);
    if (crypto_random(key, HMAC_KEY_BYTES) != 0)
        return err_sys(err, errno, "making %s", name);
    return fd_write_file_atomic(dirfd, name, key, HMAC_KEY_BYTES, 0600) == 0 ? 0
                                                                            : err_sys(err, errno, "writing %s", name);
}

int keys_open(struct store *s, struct err *err)
{
    if (mkdirat(s->dirfd, "keys", 0700) != 0 && errno != EEXIST)
        return err_sys(err, errno, "making keys/");
    CLEANUP_FD int dirfd = openat(s->dirfd, "keys", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0)
        return err_sys(err, errno, "opening keys/");
    s->keys.receipt = sign_key_load_or_make(dirfd, "receipt.pem", err);
    s->keys.checkpoint = s->keys.receipt ? sign_key_load_or_make(dirfd, "checkpoint.pem", err) : NULL;
    if (!s->keys.checkpoint || load_hmac_key(dirfd, "argv.key", s->keys.argv, err) != 0 ||
        load_hmac_key(dirfd, "snapshot.key", s->keys.snapshot, err) != 0)
        return -1;
    if (db_exec(s->db, "BEGIN IMMEDIATE", err) != 0)
        return -1;
    if (keep(s, "receipt", s->keys.receipt, err) == 0 && keep(s, "checkpoint", s->keys.checkpoint, err) == 0 &&
        db_exec(s->db, "COMMIT", err) == 0)
        return publish_all(s, dirfd, err);
    if (db_in_transaction(s->db))
        (void)db_exec(s->db, "ROLLBACK", NULL);
    return -1;
}

void keys_close(struct store *s)
{
    sign_key_free(s->keys.receipt);
    sign_key_free(s->keys.checkpoint);
    explicit_bzero(s->keys.argv, sizeof s->keys.argv);
    explicit_bzero(s->keys.snapshot, sizeof s->keys.snapshot);
}

static json_t *key_json(struct stmt *st)
{
    char id[65], use[16], pem[512];
    db_col_text(st, id, sizeof id);
    db_col_text(st, use, sizeof use);
    db_col_text(st, pem, sizeof pem);
    json_t *one = json_object();
    json_put_str(one, "key_id", id);
    json_put_str(one, "use", use);
    json_put_str(one, "algorithm", "Ed25519");
    json_put_str(one, "public_key_pem", pem);
    json_put_time(one, "created_at", db_col_int(st));
    json_put_time(one, "retired_at", db_col_int(st));
    return one;
}

char *evidence_keys(struct store *s, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, SQL_LIST, err) : NULL;
    CLEANUP_JSON json_t *all = json_array();
    int got;
    while ((got = db_step(st, err)) > 0)
        json_array_append_new(all, key_json(st));
    char *text = got == 0 ? json_dumps(all, JSON_COMPACT) : NULL;
    if (got == 0 && !text)
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    return text;
}

void evidence_argv_hmac(struct store *s, const void *data, size_t len, char out[static SHA256_HEX])
{
    uint8_t mac[SHA256_BYTES];
    crypto_hmac_sha256(s->keys.argv, HMAC_KEY_BYTES, data, len, mac);
    enc_hex(mac, sizeof mac, out);
}
