// The check finds what was changed, what was cut off and what cannot be read; and it writes nothing.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"
#include "store/spool.h"
#include "store/verify.h"

// ---- a state with something of everything -----------------------------------------------------------------------------
static int update_command_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return command_update(tx, arg, err);
}

struct settle_with {
    const struct admission *a;
    struct settlement s;
};

static int settle_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settle_with *w = arg;
    return evidence_settle(tx, w->a, &w->s, err);
}

static void run_command(const struct dir *d, struct store *s, const char *sandbox_id, const char *out)
{
    struct admission a = admission_of("t", "command.run");
    struct command_row row = command_of("t", sandbox_id);
    struct err err = {0};
    char path[400];
    strcpy(a.sandbox_id, sandbox_id);
    strcpy(row.receipt_id, a.receipt_id);
    admit(s, &a);
    put_command(s, &row);
    snprintf(path, sizeof path, "%s/sandboxes/%s/out", d->path, sandbox_id);
    assert_int_equal(fd_mkdirs(path, 0700), 0);
    CLEANUP_FD int outfd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct spool *sp = spool_open(outfd, row.id, &err);
    const struct spool_piece p = {SPOOL_STDOUT, 0, out, strlen(out)};
    assert_int_equal(spool_write(sp, &p, 1, &err), 0);
    spool_digest(sp, SPOOL_STDOUT, row.stdout_sha256);
    spool_digest(sp, SPOOL_STDERR, row.stderr_sha256);
    spool_close(sp);
    row.stdout_bytes = row.stdout_spooled = (int64_t)strlen(out);
    row.phase = COMMAND_FINISHED;
    must_write(s, update_command_fn, &row);
    CLEANUP_JSON json_t *facts =
        json_pack("{s:s, s:s, s:I, s:I}", "stdout_sha256", row.stdout_sha256, "stderr_sha256", row.stderr_sha256,
                  "stdout_kept_bytes", (json_int_t)row.stdout_spooled, "stderr_kept_bytes", (json_int_t)0);
    struct settle_with w = {&a, {.outcome = "exited", .status = 200, .ref = row.id, .facts = facts}};
    must_write(s, settle_fn, &w);
}

static void fill(const struct dir *d)
{
    struct store *s = open_store(d);
    char sandbox_id[ID_MAX];
    id_new(ID_SANDBOX, sandbox_id);
    for (int i = 0; i < 3; i++) {
        struct admission a = admission_of(i == 1 ? "u" : "t", "sandbox.create");
        strcpy(a.sandbox_id, sandbox_id);
        admit(s, &a);
        settle(s, &a, "succeeded", 201);
    }
    run_command(d, s, sandbox_id, "hello\n");
    struct admission pending = admission_of("t", "sandbox.delete");
    strcpy(pending.idem_key, "k");
    strcpy(pending.method, "POST");
    admit(s, &pending);
    const struct audit_note n = {.tenant = "t", .operation = "file.stat", .outcome = "succeeded"};
    assert_int_equal(audit_submit(s, &n), 0);
    store_close(s);
}

static enum verify_verdict check(const struct dir *d, struct verify_report *r)
{
    return verify_state(d->path, NULL, NULL, 1, r);
}

static void assert_verdict(const struct dir *d, const char *what, enum verify_verdict want)
{
    struct verify_report r;
    if (check(d, &r) != want)
        fail_msg("%s: verdict %d, not %d: %s", what, r.verdict, want, r.fault);
    assert_true((want == VERIFY_OK) == (r.fault[0] == 0));
}

static void test_verified(void **state)
{
    struct dir *d = *state;
    struct verify_report r;
    fill(d);
    assert_int_equal(check(d, &r), VERIFY_OK);
    assert_int_equal(r.entries, 10);
    assert_int_equal(r.receipts, 4);
    assert_int_equal(r.pending_receipts, 1);
    assert_int_equal(r.outputs_checked, 1);
    assert_int_equal(strlen(r.head_hash), 64);
    assert_int_equal(verify_state(d->path, NULL, NULL, 0, &r), VERIFY_OK);
    assert_int_equal(r.outputs_checked, 0);
}

static void test_an_empty_state(void **state)
{
    struct dir *d = *state;
    store_close(open_store(d));
    assert_verdict(d, "empty", VERIFY_OK);
}

// ---- changed columns ------------------------------------------------------------------------------------------------------
// One statement each: what somebody with the file in hand might change.
static const char *const CHANGES[] = {
    "UPDATE audit SET entry_json = replace(entry_json, '\"exited\"', '\"killed\"')",
    "UPDATE audit SET entry_json = entry_json || ' ' WHERE seq = 3",
    "UPDATE audit SET hash = '0' || substr(hash, 2) WHERE seq = (SELECT min(seq) FROM audit WHERE hash NOT LIKE '0%')",
    "UPDATE audit SET id = 'aud00000000000000000000000000' WHERE seq = 4",
    "UPDATE audit SET tenant = 'u' WHERE seq = 1",
    "UPDATE audit SET at_ms = at_ms + 1 WHERE seq = 2",
    "UPDATE audit SET settles = 'aud0' WHERE seq = 2",
    "UPDATE audit SET seq = 100 WHERE seq = 10",
    "DELETE FROM audit WHERE seq = 4",
    "INSERT INTO audit SELECT 11, id, tenant, at_ms, entry_json, hash, settles FROM audit WHERE seq = 10",
    "UPDATE receipts SET id = 'rct00000000000000000000000000' WHERE settle_seq = 2",
    "UPDATE receipts SET tenant = 'v' WHERE settle_seq = 2",
    "UPDATE receipts SET sandbox_id = 'sbx0' WHERE settle_seq = 2",
    "UPDATE receipts SET job_id = '' WHERE settle_seq = 2",
    "UPDATE receipts SET audit_id = 'aud0' WHERE settle_seq = 2",
    "UPDATE receipts SET operation = 'x.y' WHERE settle_seq = 2",
    "UPDATE receipts SET outcome = 'failed' WHERE settle_seq = 2",
    "UPDATE receipts SET state = 1 WHERE settle_seq = 2",
    "UPDATE receipts SET state = 2 WHERE state = 1",
    "UPDATE receipts SET state = 3 WHERE state = 1",
    "UPDATE receipts SET created_at_ms = created_at_ms - 1 WHERE settle_seq = 2",
    "UPDATE receipts SET settled_at_ms = settled_at_ms + 1 WHERE settle_seq = 2",
    "UPDATE receipts SET token_id = '' WHERE settle_seq = 2",
    "UPDATE receipts SET request_id = 'r' WHERE settle_seq = 2",
    "UPDATE receipts SET idem_key = 'k' WHERE settle_seq = 2",
    "UPDATE receipts SET settle_seq = 3 WHERE settle_seq = 2",
    "UPDATE receipts SET payload_sha256 = 'sha256:00' WHERE settle_seq = 2",
    "UPDATE receipts SET envelope_json = NULL WHERE settle_seq = 2",
    "UPDATE receipts SET envelope_json = (SELECT envelope_json FROM receipts WHERE settle_seq = 6) WHERE settle_seq = 2",
    "UPDATE receipts SET envelope_json = replace(envelope_json, '\"sig\":\"', '\"sig\": \"') WHERE settle_seq = 2",
    "UPDATE receipts SET operation = 'x.y' WHERE state = 1",
    "UPDATE receipts SET tenant = 'v' WHERE state = 1",
    "UPDATE receipts SET created_at_ms = 1 WHERE state = 1",
    "UPDATE receipts SET outcome = 'succeeded' WHERE state = 1",
    "DELETE FROM receipts WHERE settle_seq = 2",
    "DELETE FROM receipts WHERE state = 1",
    "INSERT INTO receipts SELECT 'rct1', tenant, sandbox_id, job_id, audit_id, operation, outcome, state,"
    " envelope_json, created_at_ms, settled_at_ms, token_id, request_id, idem_key, method, path, body_sha256,"
    " settle_seq, payload_sha256 FROM receipts WHERE settle_seq = 2",
    "INSERT INTO receipts SELECT 'rct1', tenant, sandbox_id, job_id, audit_id, operation, outcome, state,"
    " envelope_json, created_at_ms, settled_at_ms, token_id, request_id, idem_key, method, path, body_sha256,"
    " settle_seq, payload_sha256 FROM receipts WHERE state = 1",
    "UPDATE checkpoint SET size = size - 1",
    "UPDATE checkpoint SET head_hash = (SELECT hash FROM audit WHERE seq = 9)",
    "UPDATE checkpoint SET at_ms = at_ms + 1",
    "UPDATE checkpoint SET signed_json = replace(signed_json, '\"size\":10', '\"size\":11')",
    "UPDATE checkpoint SET signed_json = substr(signed_json, 2)",
    "DELETE FROM checkpoint",
    "UPDATE keys SET key_id = '0000000000000000' WHERE use = 'receipt'",
    "UPDATE keys SET public_pem = replace(public_pem, 'MCow', 'MCox')",
    "UPDATE commands SET stdout_sha256 = replace(stdout_sha256, 'sha256:', 'sha512:')",
    "UPDATE commands SET stdout_spooled = 5",
    "UPDATE commands SET receipt_id = ''",
};

static void test_changes(void **state)
{
    struct dir *d = *state, *copy;
    fill(d);
    for (size_t i = 0; i < sizeof CHANGES / sizeof CHANGES[0]; i++) {
        copy = dir_new();
        dir_copy(d->path, copy->path);
        poke(copy, CHANGES[i]);
        assert_verdict(copy, CHANGES[i], VERIFY_MISMATCH);
        dir_free(copy);
    }
}

// Every byte of an envelope and of an entry, one at a time.
static void test_every_byte_of_an_envelope(void **state)
{
    struct dir *d = *state;
    char sql[300];
    fill(d);
    poke(d, "CREATE TABLE kept AS SELECT settle_seq, envelope_json, length(envelope_json) AS n FROM receipts"
            " WHERE settle_seq = 2");
    assert_verdict(d, "another table", VERIFY_OK);
    for (int i = 1; i < 1500; i += 41) {
        snprintf(sql, sizeof sql,
                 "UPDATE receipts SET envelope_json = (SELECT substr(envelope_json, 1, %d) || char(unicode(substr("
                 "envelope_json, %d, 1)) + 1) || substr(envelope_json, %d) FROM kept WHERE n > %d) WHERE settle_seq = 2"
                 " AND (SELECT n FROM kept) > %d",
                 i - 1, i, i + 1, i, i);
        poke(d, sql);
        assert_verdict(d, sql, VERIFY_MISMATCH);
    }
}

// ---- cut off ------------------------------------------------------------------------------------------------------------------
static void test_removed_tail(void **state)
{
    struct dir *d = *state;
    fill(d);
    poke(d, "DELETE FROM audit WHERE seq > 7");
    assert_verdict(d, "tail", VERIFY_TRUNCATED);
    poke(d, "DELETE FROM audit");
    assert_verdict(d, "all", VERIFY_TRUNCATED);
}

static void add_entries(const struct dir *d, int n)
{
    struct store *s = open_store(d);
    for (int i = 0; i < n; i++) {
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
        settle(s, &a, "succeeded", 200);
    }
    store_close(s);
}

static void test_restored_old_copy(void **state)
{
    struct dir *d = *state, *old = dir_new(), *kept = dir_new();
    struct verify_report r;
    char checkpoint[300];
    fill(d);
    dir_copy(d->path, old->path);
    add_entries(d, 3);
    dir_copy(d->path, kept->path);
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint.json", kept->path);
    assert_int_equal(verify_state(d->path, checkpoint, NULL, 1, &r), VERIFY_OK);
    // The whole directory of yesterday: only the kept checkpoint tells.
    assert_verdict(old, "old", VERIFY_OK);
    assert_int_equal(verify_state(old->path, checkpoint, NULL, 1, &r), VERIFY_TRUNCATED);
    // The database alone: the checkpoint beside it tells.
    dir_copy(d->path, kept->path);
    char line[900];
    snprintf(line, sizeof line, "cp '%s/airlock.db' '%s/airlock.db'", old->path, kept->path);
    assert_int_equal(system(line), 0);
    assert_verdict(kept, "old database", VERIFY_TRUNCATED);
    // Somebody went on from there: as many entries, but others.
    add_entries(old, 5);
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint.json", d->path);
    assert_int_equal(verify_state(old->path, checkpoint, NULL, 1, &r), VERIFY_MISMATCH);
    dir_free(old);
    dir_free(kept);
}

static void test_server_keeps_a_checkpoint_that_knows_more(void **state)
{
    struct dir *d = *state, *old = dir_new();
    struct verify_report r;
    char line[900];
    fill(d);
    dir_copy(d->path, old->path);
    add_entries(d, 3);
    snprintf(line, sizeof line, "cp '%s/checkpoint.json' '%s/'", d->path, old->path);
    assert_int_equal(system(line), 0);
    store_close(open_store(old));
    assert_verdict(old, "restarted", VERIFY_OK); // its own file is of its own chain again
    snprintf(line, sizeof line, "%s/checkpoint-16.json", old->path);
    assert_int_equal(verify_state(old->path, line, NULL, 1, &r), VERIFY_TRUNCATED);
    dir_free(old);
}

// ---- checkpoint files and keys --------------------------------------------------------------------------------------------------
static void write_text(const struct dir *d, const char *name, const char *text)
{
    assert_int_equal(fd_write_file_atomic(d->fd, name, text, strlen(text), 0600), 0);
}

static void test_checkpoint_files(void **state)
{
    struct dir *d = *state;
    struct verify_report r;
    char path[300];
    fill(d);
    CLEANUP_BUF struct buf text = BUF_INIT(10000);
    assert_int_equal(fd_read_file(d->fd, "checkpoint.json", &text), 0);
    snprintf(path, sizeof path, "%s/given", d->path);
    assert_int_equal(verify_state(d->path, path, NULL, 0, &r), VERIFY_UNREADABLE); // there is none
    for (size_t i = 0; i < text.len; i += 7) {
        text.data[i] ^= 1;
        write_text(d, "given", buf_text(&text));
        assert_int_equal(verify_state(d->path, path, NULL, 0, &r), VERIFY_MISMATCH);
        write_text(d, "checkpoint.json", buf_text(&text));
        assert_verdict(d, "checkpoint.json", VERIFY_MISMATCH);
        text.data[i] ^= 1;
    }
    buf_adds(&text, "\n");
    write_text(d, "given", buf_text(&text));
    assert_int_equal(unlinkat(d->fd, "checkpoint.json", 0), 0);
    assert_int_equal(verify_state(d->path, path, NULL, 0, &r), VERIFY_OK);
}

static void test_keys(void **state)
{
    struct dir *d = *state, *other = dir_new();
    struct verify_report r;
    char path[300], line[1200];
    fill(d);
    store_close(open_store(other));
    snprintf(path, sizeof path, "%s/both.pem", d->path);
    snprintf(line, sizeof line, "cat '%s/keys/receipt.pub.pem' '%s/keys/checkpoint.pub.pem' > '%s'", d->path, d->path, path);
    assert_int_equal(system(line), 0);
    assert_int_equal(verify_state(d->path, NULL, path, 1, &r), VERIFY_OK);
    snprintf(line, sizeof line, "cat '%s/keys/receipt.pub.pem' '%s/keys/checkpoint.pub.pem' > '%s'", other->path, d->path,
             path);
    assert_int_equal(system(line), 0);
    assert_int_equal(verify_state(d->path, NULL, path, 1, &r), VERIFY_MISMATCH);
    assert_int_equal(verify_state(d->path, NULL, "/nonexistent", 1, &r), VERIFY_UNREADABLE);
    // A checkpoint key does not sign receipts.
    snprintf(line, sizeof line, "cd '%s/keys' && cp receipt.pub.pem keep && rm receipt*.pub.pem && cp keep checkpoint-x.pub.pem",
             d->path);
    assert_int_equal(system(line), 0);
    assert_verdict(d, "use", VERIFY_MISMATCH);
    assert_int_equal(fd_remove_tree(d->fd, "keys", NULL), 0);
    assert_verdict(d, "no keys", VERIFY_UNREADABLE);
    dir_free(other);
}

// ---- output -----------------------------------------------------------------------------------------------------------------------
static void test_output(void **state)
{
    struct dir *d = *state;
    char line[600];
    fill(d);
    snprintf(line, sizeof line, "for f in '%s'/sandboxes/*/out/*.stdout; do printf hellO > \"$f\"; done", d->path);
    assert_int_equal(system(line), 0);
    assert_verdict(d, "changed output", VERIFY_MISMATCH);
    struct verify_report r;
    assert_int_equal(verify_state(d->path, NULL, NULL, 0, &r), VERIFY_OK); // not looked at
    snprintf(line, sizeof line, "rm '%s'/sandboxes/*/out/*.stdout", d->path);
    assert_int_equal(system(line), 0);
    assert_verdict(d, "missing output", VERIFY_MISMATCH);
}

// ---- unreadable -------------------------------------------------------------------------------------------------------------------
static void test_unreadable(void **state)
{
    struct dir *d = *state;
    struct verify_report r;
    assert_int_equal(verify_state("/nonexistent", NULL, NULL, 1, &r), VERIFY_UNREADABLE);
    assert_int_equal(check(d, &r), VERIFY_UNREADABLE);
    fill(d);
    poke(d, "PRAGMA user_version = 1000");
    assert_verdict(d, "newer", VERIFY_UNREADABLE);
    static char garbage[8192];
    memset(garbage, 'g', sizeof garbage - 1);
    write_text(d, "airlock.db", garbage);
    assert_verdict(d, "garbage", VERIFY_UNREADABLE);
    write_text(d, "airlock.db", "");
    assert_verdict(d, "empty", VERIFY_UNREADABLE);
    assert_int_equal(unlinkat(d->fd, "airlock.db", 0), 0);
    assert_verdict(d, "missing", VERIFY_UNREADABLE);
}

static void test_torn_database(void **state)
{
    struct dir *d = *state;
    fill(d);
    CLEANUP_FD int fd = openat(d->fd, "airlock.db", O_RDWR | O_CLOEXEC);
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(ftruncate(fd, st.st_size / 2), 0);
    struct verify_report r;
    check(d, &r);
    assert_int_equal(r.verdict, VERIFY_UNREADABLE);
}

// ---- it writes nothing ------------------------------------------------------------------------------------------------------------
// Names, sizes, contents and times of everything there.
static void fingerprint(const struct dir *d, char out[200])
{
    char line[500];
    snprintf(line, sizeof line,
             "cd '%s' && find . -printf '%%p %%s %%T@ %%C@\\n' | sort > /tmp/fp.%d && find . -type f | sort | xargs sha256sum >>"
             " /tmp/fp.%d && sha256sum < /tmp/fp.%d; rm -f /tmp/fp.%d",
             d->path, getpid(), getpid(), getpid(), getpid());
    FILE *f = popen(line, "r");
    assert_non_null(fgets(out, 200, f));
    pclose(f);
}

static void test_it_writes_nothing(void **state)
{
    struct dir *d = *state;
    char before[200], after[200];
    fill(d);
    fingerprint(d, before);
    assert_verdict(d, "closed", VERIFY_OK);
    fingerprint(d, after);
    assert_string_equal(before, after);
}

// A server killed with -9 leaves a -wal and a -shm.
static void die_with_a_log(const struct dir *d, int report)
{
    struct store *s = open_store(d);
    for (int i = 0; i < 20; i++) {
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
        settle(s, &a, "succeeded", 200);
    }
    assert_int_equal(write(report, "x", 1), 1);
    for (;;)
        pause();
}

static void test_after_a_kill(void **state)
{
    struct dir *d = *state;
    char before[200], after[200], c;
    int fds[2];
    struct stat st;
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    const pid_t pid = fork();
    if (pid == 0)
        die_with_a_log(d, fds[1]);
    assert_int_equal(fd_read_full(fds[0], &c, 1), 0);
    struct verify_report r; // beside the working server of another process
    assert_int_equal(check(d, &r), VERIFY_OK);
    assert_int_equal(r.receipts, 20);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    close(fds[0]);
    close(fds[1]);
    assert_int_equal(fstatat(d->fd, "airlock.db-wal", &st, 0), 0);
    assert_true(st.st_size > 0);
    fingerprint(d, before);
    assert_int_equal(check(d, &r), VERIFY_OK);
    assert_int_equal(r.entries, 40);
    fingerprint(d, after);
    assert_string_equal(before, after);
}

// ---- beside a busy server ------------------------------------------------------------------------------------------------------------
static void write_for_ever(const struct dir *d)
{
    struct store *s = open_store(d);
    for (;;) {
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
        settle(s, &a, "succeeded", 200);
    }
}

static void test_beside_a_busy_server(void **state)
{
    struct dir *d = *state;
    struct verify_report r;
    store_close(open_store(d));
    const pid_t pid = fork();
    if (pid == 0)
        write_for_ever(d);
    uint64_t entries = 0;
    const int64_t until = clock_mono_ms() + 3000;
    while (clock_mono_ms() < until) {
        if (check(d, &r) != VERIFY_OK)
            fail_msg("verdict %d: %s", r.verdict, r.fault);
        assert_true(r.entries >= entries);
        entries = r.entries;
    }
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_true(entries > 100);
}

static bool writing;

static void *write_here(void *arg)
{
    struct store *s = arg;
    while (__atomic_load_n(&writing, __ATOMIC_RELAXED)) {
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
        settle(s, &a, "succeeded", 200);
    }
    return NULL;
}

static void test_inside_the_server(void **state)
{
    struct dir *d = *state;
    struct verify_report r;
    struct store *s = open_store(d);
    pthread_t thread;
    __atomic_store_n(&writing, true, __ATOMIC_RELAXED);
    assert_int_equal(pthread_create(&thread, NULL, write_here, s), 0);
    for (int i = 0; i < 15; i++)
        if (check(d, &r) != VERIFY_OK)
            fail_msg("verdict %d: %s", r.verdict, r.fault);
    __atomic_store_n(&writing, false, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    store_close(s);
}

// ---- one receipt --------------------------------------------------------------------------------------------------------------------
static void test_one_receipt(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    struct err err = {0};
    struct receipt_row row;
    struct verify_report r;
    struct admission a = admission_of("t", "x.y");
    admit(s, &a);
    settle(s, &a, "succeeded", 200);
    assert_int_equal(receipt_get(s, "t", a.receipt_id, &row, &err), 0);
    CLEANUP_BUF struct buf receipt = BUF_INIT(4096), checkpoint = BUF_INIT(4096);
    assert_int_equal(fd_read_file(d->fd, "keys/receipt.pub.pem", &receipt), 0);
    assert_int_equal(fd_read_file(d->fd, "keys/checkpoint.pub.pem", &checkpoint), 0);
    const char *pem = buf_text(&receipt);
    assert_int_equal(verify_receipt_text(row.envelope_json, pem, &r), VERIFY_OK);
    assert_int_equal(verify_receipt_text(row.envelope_json, buf_text(&checkpoint), &r), VERIFY_MISMATCH);
    assert_int_equal(verify_receipt_text(row.envelope_json, "no key", &r), VERIFY_UNREADABLE);
    assert_int_equal(verify_receipt_text("{", pem, &r), VERIFY_UNREADABLE);
    assert_int_equal(verify_receipt_text("{}", pem, &r), VERIFY_MISMATCH);
    CLEANUP_JSON json_t *envelope = json_loads(row.envelope_json, 0, NULL); // as the API gives it, laid out by jq
    json_put_str(envelope, "id", row.id);
    CLEANUP_FREE char *pretty = json_dumps(envelope, JSON_INDENT(2));
    assert_int_equal(verify_receipt_text(pretty, pem, &r), VERIFY_OK);
    char *payload = strstr(row.envelope_json, "\"payload\":\"") + 30;
    *payload = *payload == 'A' ? 'B' : 'A';
    assert_int_equal(verify_receipt_text(row.envelope_json, pem, &r), VERIFY_MISMATCH);
    receipt_row_free(&row);
    store_close(s);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_verified), T(test_an_empty_state), T(test_changes), T(test_every_byte_of_an_envelope),
        T(test_removed_tail), T(test_restored_old_copy), T(test_server_keeps_a_checkpoint_that_knows_more),
        T(test_checkpoint_files), T(test_keys), T(test_output), T(test_unreadable), T(test_torn_database),
        T(test_it_writes_nothing), T(test_after_a_kill), T(test_beside_a_busy_server), T(test_inside_the_server),
        T(test_one_receipt),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
