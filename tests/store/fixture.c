#include "fixture.h"

#include <fcntl.h>
#include <unistd.h>

#include "store/db.h"

struct dir *dir_new(void)
{
    const char *base = getenv("TMPDIR");
    struct dir *d = calloc(1, sizeof *d);
    assert_non_null(d);
    snprintf(d->path, sizeof d->path, "%s/airlock-store.XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(d->path));
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(d->fd >= 0);
    return d;
}

void dir_free(struct dir *d)
{
    if (!d)
        return;
    fd_close(&d->fd);
    assert_int_equal(fd_remove_tree(AT_FDCWD, d->path, NULL), 0);
    free(d);
}

int dir_setup(void **state)
{
    *state = dir_new();
    return 0;
}

int dir_teardown(void **state)
{
    dir_free(*state);
    return 0;
}

void dir_copy(const char *from, const char *to)
{
    char line[700];
    snprintf(line, sizeof line, "cp -a '%s/.' '%s/'", from, to);
    assert_int_equal(system(line), 0);
}

struct store *open_store(const struct dir *d)
{
    struct err err = {0};
    const struct store_options o = {.state_dirfd = d->fd, .server_version = "test"};
    struct store *s = store_open(&o, &err);
    if (!s)
        print_error("store_open: %s %s %s\n", err.code, err.detail, err.internal);
    assert_non_null(s);
    return s;
}

void must_write(struct store *s, store_tx_fn fn, void *arg)
{
    struct err err = {0};
    const int result = store_write(s, fn, arg, &err);
    if (result != 0)
        print_error("store_write: %s %s %s\n", err.code, err.detail, err.internal);
    assert_int_equal(result, 0);
}

void poke(const struct dir *d, const char *sql)
{
    char path[300];
    struct err err = {0};
    snprintf(path, sizeof path, "%s/airlock.db", d->path);
    struct db *db = db_open(path, DB_WRITER, &err);
    assert_non_null(db);
    if (db_exec(db, sql, &err) != 0)
        fail_msg("%s: %s", sql, err.internal);
    db_close(db);
}

struct admission admission_of(const char *tenant, const char *operation)
{
    struct admission a = {.request_id = "req-1"};
    snprintf(a.tenant, sizeof a.tenant, "%s", tenant);
    snprintf(a.operation, sizeof a.operation, "%s", operation);
    id_new(ID_TOKEN, a.token_id);
    id_new(ID_AUDIT, a.audit_id);
    id_new(ID_RECEIPT, a.receipt_id);
    id_new(ID_JOB, a.job_id);
    return a;
}

struct sandbox_row sandbox_of(const char *tenant, const char *name)
{
    struct sandbox_row r = {.state = 1, .image_ref = "debian", .vcpus = 1, .memory_mib = 256, .disk_mib = 1024,
                            .ttl_seconds = 60, .on_expiry = "destroy", .generation = 1};
    id_new(ID_SANDBOX, r.id);
    snprintf(r.tenant, sizeof r.tenant, "%s", tenant);
    snprintf(r.name, sizeof r.name, "%s", name);
    r.created_at_ms = r.updated_at_ms = clock_wall_ms();
    return r;
}

struct command_row command_of(const char *tenant, const char *sandbox_id)
{
    struct command_row r = {.phase = COMMAND_ADMITTED, .user = "sandbox", .timeout_ms = 1000};
    id_new(ID_COMMAND, r.id);
    snprintf(r.tenant, sizeof r.tenant, "%s", tenant);
    snprintf(r.sandbox_id, sizeof r.sandbox_id, "%s", sandbox_id);
    r.created_at_ms = clock_wall_ms();
    return r;
}

struct job_row job_of(const char *tenant, const char *sandbox_id)
{
    struct job_row r = {.kind = "sandbox.create", .state = JOB_RUNNING, .stage = "admit"};
    id_new(ID_JOB, r.id);
    snprintf(r.tenant, sizeof r.tenant, "%s", tenant);
    snprintf(r.sandbox_id, sizeof r.sandbox_id, "%s", sandbox_id);
    r.created_at_ms = r.updated_at_ms = clock_wall_ms();
    return r;
}

struct snapshot_row snapshot_of(const char *tenant, const char *sandbox_id, const char *parent_id)
{
    struct snapshot_row r = {.state = SNAPSHOT_READY, .kind = "delta", .vcpus = 1, .memory_mib = 256, .disk_mib = 1024,
                             .epoch = 1, .generation = 1};
    id_new(ID_SNAPSHOT, r.id);
    snprintf(r.tenant, sizeof r.tenant, "%s", tenant);
    snprintf(r.sandbox_id, sizeof r.sandbox_id, "%s", sandbox_id);
    snprintf(r.parent_id, sizeof r.parent_id, "%s", parent_id);
    r.created_at_ms = clock_wall_ms();
    return r;
}

static int sandbox_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_insert(tx, arg, 0, err);
}

void put_sandbox(struct store *s, const struct sandbox_row *row)
{
    must_write(s, sandbox_tx, (void *)row);
}

static int command_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return command_insert(tx, arg, 0, err);
}

void put_command(struct store *s, const struct command_row *row)
{
    must_write(s, command_tx, (void *)row);
}

static int job_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return job_insert(tx, arg, err);
}

void put_job(struct store *s, const struct job_row *row)
{
    must_write(s, job_tx, (void *)row);
}

static int snapshot_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return snapshot_insert(tx, arg, 0, err);
}

void put_snapshot(struct store *s, const struct snapshot_row *row)
{
    must_write(s, snapshot_tx, (void *)row);
}

static int admit_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return evidence_admit(tx, arg, NULL, err);
}

void admit(struct store *s, const struct admission *a)
{
    must_write(s, admit_tx, (void *)a);
}

struct settle_args {
    const struct admission *a;
    struct settlement s;
};

static int settle_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settle_args *args = arg;
    return evidence_settle(tx, args->a, &args->s, err);
}

void settle(struct store *s, const struct admission *a, const char *outcome, int status)
{
    CLEANUP_JSON json_t *facts = json_pack("{s:i}", "exit_code", 0);
    struct settle_args args = {a, {.outcome = outcome, .status = status, .ref = a->job_id, .facts = facts}};
    must_write(s, settle_tx, &args);
}
