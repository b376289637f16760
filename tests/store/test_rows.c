// Every table: what goes in comes out, for its tenant alone, in order, by an index.
// Snapshots have test_snapshots.c, the plans of all statements test_plans.c.
#include <pthread.h>

#include "fixture.h"
#include "store/int.h"

// ---- tokens -------------------------------------------------------------------------------------------------------
struct token_args {
    struct token_row row;
    uint8_t hash[SHA256_BYTES];
};

static int token_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct token_args *t = arg;
    return token_insert(tx, &t->row, t->hash, err);
}

static struct token_args put_token(struct store *s, const char *tenant, uint8_t first_byte)
{
    struct token_args t = {.row = {.scopes = SCOPE_SANDBOX_READ | SCOPE_ADMIN, .created_at_ms = 5}, .hash = {first_byte}};
    id_new(ID_TOKEN, t.row.id);
    snprintf(t.row.tenant, sizeof t.row.tenant, "%s", tenant);
    strcpy(t.row.name, "ci");
    must_write(s, token_tx, &t);
    return t;
}

static int revoke_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct token_row *row = arg;
    return token_revoke(tx, row->tenant, row->id, 77, err);
}

static int revoke_again_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct token_row *row = arg;
    return token_revoke(tx, row->tenant, row->id, 99, err);
}

struct ids {
    unsigned n;
    char id[64][ID_MAX];
};

static void keep(struct ids *ids, const char *id)
{
    assert_true(ids->n < 64);
    strcpy(ids->id[ids->n++], id);
}

static bool keep_token(void *arg, const struct token_row *row)
{
    keep(arg, row->id);
    return true;
}

static void test_tokens(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct token_row row;
    const struct token_args a = put_token(s, "a", 1), b = put_token(s, "b", 2);
    uint8_t unknown[SHA256_BYTES] = {3};
    assert_int_equal(token_find(s, a.hash, &row, &err), 0);
    assert_string_equal(row.id, a.row.id);
    assert_string_equal(row.tenant, "a");
    assert_int_equal(row.scopes, SCOPE_SANDBOX_READ | SCOPE_ADMIN);
    assert_int_equal(token_find(s, unknown, &row, &err), 1);
    assert_int_equal(token_get(s, "a", a.row.id, &row, &err), 0);
    assert_int_equal(token_get(s, "a", b.row.id, &row, &err), 1);
    struct ids ids = {0};
    const struct page page = {.tenant = "a", .limit = 10};
    assert_int_equal(token_list(s, &page, keep_token, &ids, &err), 0);
    assert_int_equal(ids.n, 1);

    struct token_row foreign = b.row;
    strcpy(foreign.tenant, "a");
    assert_int_equal(store_write(s, revoke_tx, &foreign, &err), -1);
    assert_int_equal(err.kind, ERR_NOT_FOUND);
    must_write(s, revoke_tx, (void *)&a.row);
    must_write(s, revoke_again_tx, (void *)&a.row);
    assert_int_equal(token_find(s, a.hash, &row, &err), 0);
    assert_int_equal(row.revoked_at_ms, 77);
    store_close(s);
}

static void test_token_secret_is_unique(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct token_args a = put_token(s, "a", 1);
    id_new(ID_TOKEN, a.row.id);
    assert_int_equal(store_write(s, token_tx, &a, &err), -1);
    assert_err(err, ERR_CONFLICT, "constraint");
    store_close(s);
}

static void test_scopes(void **state)
{
    static const char *const NAMES[] = {"sandbox:read", "sandbox:write", "command:run", "command:root",
                                        "files:read",   "files:write",   "audit:read",  "admin"};
    for (int i = 0; i < 8; i++) { // stored as bits: pinned
        assert_int_equal(scope_parse(NAMES[i]), 1 << i);
        assert_string_equal(scope_name((enum scope)(1 << i)), NAMES[i]);
    }
    assert_int_equal(scope_parse("admin "), -1);
    assert_null(scope_name((enum scope)3));
}

// ---- sandboxes ------------------------------------------------------------------------------------------------------
static int sandbox_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_update(tx, arg, err);
}

static int sandbox_insert_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_insert(tx, arg, 3, err);
}

static bool keep_sandbox(void *arg, const struct sandbox_row *row)
{
    keep(arg, row->id);
    return true;
}

static struct ids list_sandboxes(struct store *s, const struct sandbox_filter *f)
{
    struct ids ids = {0};
    struct err err = {0};
    assert_int_equal(sandbox_list(s, f, keep_sandbox, &ids, &err), 0);
    return ids;
}

static void test_sandbox_round_trip(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row row = sandbox_of("a", "one"), got, copy;
    row.labels_json = strdup("{\"team\":\"infra\"}");
    row.env_json = strdup("{\"A\":\"1\"}");
    row.detached = true;
    strcpy(row.owner, "me");
    strcpy(row.parent_sandbox_id, "sbxa");
    strcpy(row.parent_snapshot_id, "snpb");
    row.origin_json = strdup("{\"o\":1}");
    strcpy(row.state_reason, "why");
    put_sandbox(s, &row);
    row.generation = 2;
    row.state = 2;
    row.backend_json = strdup("{}");
    row.uniqueness_json = strdup("{\"u\":2}");
    must_write(s, sandbox_update_tx, &row);
    assert_int_equal(sandbox_get(s, "a", row.id, &got, &err), 0);
    assert_int_equal(sandbox_row_copy(&copy, &got), 0);
    sandbox_row_free(&got);
    assert_string_equal(copy.labels_json, row.labels_json);
    assert_string_equal(copy.backend_json, "{}");
    assert_null(copy.runtime_json);
    assert_string_equal(copy.origin_json, "{\"o\":1}");
    assert_string_equal(copy.uniqueness_json, "{\"u\":2}");
    assert_string_equal(copy.parent_sandbox_id, "sbxa");
    assert_string_equal(copy.parent_snapshot_id, "snpb");
    // All that is inline is the same, byte for byte.
    struct sandbox_row a = copy, b = row;
    char **const heap[] = {&a.labels_json, &a.env_json, &a.backend_json, &b.labels_json, &b.env_json, &b.backend_json};
    for (size_t i = 0; i < sizeof heap / sizeof heap[0]; i++)
        *heap[i] = NULL;
    assert_string_equal(a.name, b.name);
    assert_string_equal(a.owner, b.owner);
    assert_true(a.detached);
    assert_int_equal(a.state, b.state);
    assert_int_equal(a.generation, 2);
    assert_int_equal(a.created_at_ms, b.created_at_ms);
    assert_int_equal(a.ttl_seconds, b.ttl_seconds);
    sandbox_row_free(&copy);
    sandbox_row_free(&row);
    sandbox_row_free(&row); // a freed row may be freed again
    store_close(s);
}

static void test_sandbox_of_another_tenant(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row mine = sandbox_of("a", "same"), theirs = sandbox_of("b", "same"), got;
    put_sandbox(s, &mine);
    put_sandbox(s, &theirs); // names are the tenant's own
    assert_int_equal(sandbox_get(s, "a", theirs.id, &got, &err), 1);
    assert_int_equal(sandbox_get(s, "a", "sbx00000000000000000000000000", &got, &err), 1);
    struct sandbox_filter f = {.page = {.tenant = "a", .limit = 10}, .state = -1};
    struct ids ids = list_sandboxes(s, &f);
    assert_int_equal(ids.n, 1);
    assert_string_equal(ids.id[0], mine.id);
    struct sandbox_row stolen = theirs;
    strcpy(stolen.tenant, "a");
    assert_int_equal(store_write(s, sandbox_update_tx, &stolen, &err), -1);
    assert_int_equal(err.kind, ERR_NOT_FOUND);
    store_close(s);
}

static void test_sandbox_name_and_quota(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row one = sandbox_of("a", "x"), two = sandbox_of("a", "x"), anonymous = sandbox_of("a", ""),
                       more = sandbox_of("a", ""), fourth = sandbox_of("a", "");
    put_sandbox(s, &one);
    assert_int_equal(store_write(s, sandbox_insert_tx, &two, &err), -1);
    assert_err(err, ERR_CONFLICT, "name_taken");
    must_write(s, sandbox_insert_tx, &anonymous);
    must_write(s, sandbox_insert_tx, &more);
    assert_int_equal(store_write(s, sandbox_insert_tx, &fourth, &err), -1);
    assert_err(err, ERR_RATE_LIMITED, "quota_exceeded");
    one.destroyed_at_ms = 9; // gives back both
    one.state = 9;
    must_write(s, sandbox_update_tx, &one);
    must_write(s, sandbox_insert_tx, &two);
    store_close(s);
}

static void test_sandbox_never_comes_back(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row row = sandbox_of("a", ""), late, got;
    put_sandbox(s, &row);
    late = row;
    row.generation = 5;
    must_write(s, sandbox_update_tx, &row);
    assert_int_equal(store_write(s, sandbox_update_tx, &late, &err), -1);
    assert_err(err, ERR_INTERNAL, "stale_row");
    row.generation = 6;
    row.destroyed_at_ms = 1000;
    row.state = 9;
    must_write(s, sandbox_update_tx, &row);
    late.generation = 7; // a late update that believes to be newer
    assert_int_equal(store_write(s, sandbox_update_tx, &late, &err), -1);
    assert_err(err, ERR_CONFLICT, "deleted");
    row.deletion_json = (char *)"{}"; // its report may still be added
    must_write(s, sandbox_update_tx, &row);
    assert_int_equal(sandbox_get(s, "a", row.id, &got, &err), 0);
    assert_int_equal(got.destroyed_at_ms, 1000);
    assert_int_equal(got.state, 9);
    sandbox_row_free(&got);
    store_close(s);
}

static void test_sandbox_lists(void **state)
{
    struct store *s = open_store(*state);
    struct sandbox_row rows[6];
    for (int i = 0; i < 6; i++) {
        rows[i] = sandbox_of("a", "");
        rows[i].state = i < 2 ? 9 : i == 2 ? 7 : 2;
        rows[i].destroyed_at_ms = i < 2 ? 50 : 0;
        rows[i].labels_json = (char *)(i % 2 ? "{\"k\":\"odd\",\"quote\\\"d\":\"1\"}" : "{\"k\":\"even\"}");
        put_sandbox(s, &rows[i]);
    }
    struct sandbox_filter f = {.page = {.tenant = "a", .limit = 2}, .state = -1};
    struct ids ids = list_sandboxes(s, &f); // newest first
    assert_int_equal(ids.n, 2);
    assert_string_equal(ids.id[0], rows[5].id);
    f.page.cursor = ids.id[1];
    f.page.limit = 10;
    struct ids rest = list_sandboxes(s, &f);
    assert_int_equal(rest.n, 2); // without the destroyed ones
    assert_string_equal(rest.id[1], rows[2].id);
    f = (struct sandbox_filter){.page = {.tenant = "a", .limit = 10}, .state = 9};
    assert_int_equal(list_sandboxes(s, &f).n, 2);
    f.state = 7;
    assert_int_equal(list_sandboxes(s, &f).n, 1);
    f.state = -1;
    f.label_key = "k";
    f.label_value = "odd";
    assert_int_equal(list_sandboxes(s, &f).n, 2);
    f.label_key = "quote\"d";
    f.label_value = "1";
    assert_int_equal(list_sandboxes(s, &f).n, 2);
    f.label_value = "1' OR 1=1 --";
    assert_int_equal(list_sandboxes(s, &f).n, 0);
    struct ids live = {0};
    struct err err = {0};
    assert_int_equal(sandbox_each_live_all_tenants(s, keep_sandbox, &live, &err), 0);
    assert_int_equal(live.n, 4);
    store_close(s);
}

// ---- 50 at once against a quota -----------------------------------------------------------------------------------------
enum { RACERS = 50, QUOTA = 7 };
struct racer {
    struct store *s;
    pthread_barrier_t *start;
    int result;
    struct err err;
};

static int race_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_insert(tx, arg, QUOTA, err);
}

static void *race(void *arg)
{
    struct racer *r = arg;
    struct sandbox_row row = sandbox_of("a", "");
    pthread_barrier_wait(r->start);
    r->result = store_write(r->s, race_tx, &row, &r->err);
    return NULL;
}

static void test_quota_race(void **state)
{
    struct store *s = open_store(*state);
    pthread_barrier_t start;
    pthread_t threads[RACERS];
    static struct racer racers[RACERS];
    int good = 0;
    pthread_barrier_init(&start, NULL, RACERS);
    for (int i = 0; i < RACERS; i++) {
        racers[i] = (struct racer){.s = s, .start = &start};
        assert_int_equal(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
    }
    for (int i = 0; i < RACERS; i++) {
        pthread_join(threads[i], NULL);
        good += racers[i].result == 0;
        if (racers[i].result != 0)
            assert_err(racers[i].err, ERR_RATE_LIMITED, "quota_exceeded");
    }
    assert_int_equal(good, QUOTA);
    pthread_barrier_destroy(&start);
    store_close(s);
}

// ---- jobs -----------------------------------------------------------------------------------------------------------------
static int job_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return job_update(tx, arg, err);
}

static bool keep_job(void *arg, const struct job_row *row)
{
    keep(arg, row->id);
    return true;
}

static void test_jobs(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct job_row mine = job_of("a", "sbxa"), other = job_of("a", "sbxb"), theirs = job_of("b", "sbxa"), got;
    put_job(s, &mine);
    put_job(s, &other);
    put_job(s, &theirs);
    assert_int_equal(job_get(s, "a", theirs.id, &got, &err), 1);
    struct ids all = {0}, of = {0}, unfinished = {0};
    const struct page page = {.tenant = "a", .limit = 10};
    assert_int_equal(job_list(s, &page, NULL, keep_job, &all, &err), 0);
    assert_int_equal(all.n, 2);
    assert_string_equal(all.id[0], other.id);
    assert_int_equal(job_list(s, &page, "sbxa", keep_job, &of, &err), 0);
    assert_int_equal(of.n, 1); // the other tenant's job of the same sandbox id is not there
    assert_string_equal(of.id[0], mine.id);

    mine.state = JOB_CANCELLED;
    mine.stages_json = (char *)"[]";
    mine.finished_at_ms = 12;
    must_write(s, job_update_tx, &mine);
    mine.state = JOB_SUCCEEDED; // too late: it stays as it ended
    must_write(s, job_update_tx, &mine);
    assert_int_equal(job_get(s, "a", mine.id, &got, &err), 0);
    assert_int_equal(got.state, JOB_CANCELLED);
    assert_string_equal(got.stages_json, "[]");
    assert_int_equal(got.created_at_ms, mine.created_at_ms);
    job_row_free(&got);
    assert_int_equal(job_each_unfinished_all_tenants(s, keep_job, &unfinished, &err), 0);
    assert_int_equal(unfinished.n, 2);
    struct job_row nobody = job_of("a", "");
    assert_int_equal(store_write(s, job_update_tx, &nobody, &err), -1);
    assert_int_equal(err.kind, ERR_NOT_FOUND);
    assert_string_equal(job_state_name(JOB_RUNNING), "running");
    store_close(s);
}

// ---- commands -------------------------------------------------------------------------------------------------------------
static int command_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return command_update(tx, arg, err);
}

static int command_insert_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return command_insert(tx, arg, 2, err);
}

static bool keep_command(void *arg, const struct command_row *row)
{
    keep(arg, row->id);
    return true;
}

static void test_commands(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct command_row one = command_of("a", "sbxa"), two = command_of("a", "sbxa"), three = command_of("a", "sbxa"), got;
    one.agent_id = UINT64_MAX;
    one.env_names_json = (char *)"[\"A\"]";
    two.internal = true;
    must_write(s, command_insert_tx, &one);
    must_write(s, command_insert_tx, &two);
    assert_int_equal(store_write(s, command_insert_tx, &three, &err), -1);
    assert_err(err, ERR_RATE_LIMITED, "too_many_commands");
    struct command_row elsewhere = command_of("a", "sbxb");
    must_write(s, command_insert_tx, &elsewhere);

    one.phase = COMMAND_FINISHED;
    one.outcome = OUTCOME_EXITED;
    one.exit_code = 3;
    must_write(s, command_update_tx, &one);
    must_write(s, command_insert_tx, &three);
    one.exit_code = 0;
    one.phase = COMMAND_RUNNING_;
    must_write(s, command_update_tx, &one); // finished stays finished
    assert_int_equal(command_get(s, "a", "sbxa", one.id, &got, &err), 0);
    assert_int_equal(got.phase, COMMAND_FINISHED);
    assert_int_equal(got.exit_code, 3);
    assert_true(got.agent_id == UINT64_MAX);
    assert_string_equal(got.env_names_json, "[\"A\"]");
    struct command_row copy;
    assert_int_equal(command_row_copy(&copy, &got), 0);
    assert_ptr_not_equal(copy.env_names_json, got.env_names_json);
    command_row_free(&copy);
    command_row_free(&got);

    assert_int_equal(command_get(s, "b", "sbxa", one.id, &got, &err), 1);
    assert_int_equal(command_get(s, "a", "sbxb", one.id, &got, &err), 1);
    struct ids mine = {0}, foreign = {0}, unfinished = {0};
    const struct page page = {.tenant = "a", .limit = 10}, other = {.tenant = "b", .limit = 10};
    assert_int_equal(command_list(s, &page, "sbxa", keep_command, &mine, &err), 0);
    assert_int_equal(mine.n, 2); // not the internal one
    assert_string_equal(mine.id[0], three.id);
    assert_int_equal(command_list(s, &other, "sbxa", keep_command, &foreign, &err), 0);
    assert_int_equal(foreign.n, 0);
    assert_int_equal(command_each_unfinished_all_tenants(s, keep_command, &unfinished, &err), 0);
    assert_int_equal(unfinished.n, 3);
    strcpy(three.tenant, "b");
    assert_int_equal(store_write(s, command_update_tx, &three, &err), -1);
    assert_int_equal(err.kind, ERR_NOT_FOUND);
    assert_null(command_outcome_name(OUTCOME_NONE));
    assert_string_equal(command_outcome_name(OUTCOME_SPAWN_FAILED), "spawn_failed");
    store_close(s);
}

// ---- events -----------------------------------------------------------------------------------------------------------------
static int event_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return event_append(tx, arg, "sandbox.state", "sbxa", "{\"to\":\"running\"}", err);
}

static int event_undone_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return event_append(tx, arg, "sandbox.state", NULL, "{}", err) == 0 ? err_set(err, ERR_CONFLICT, "no", "no") : -1;
}

static bool sum_events(void *arg, const struct event_row *row)
{
    int64_t *last = arg;
    assert_true(row->seq > *last);
    assert_string_equal(row->tenant, "a");
    assert_true(id_valid(ID_EVENT, row->id));
    *last = row->seq;
    return true;
}

static void count_wake(void *arg)
{
    ++*(int *)arg;
}

static void test_events(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    int wakes = 0;
    int64_t last = 0;
    event_notify_set(s, count_wake, &wakes);
    for (int i = 0; i < 3; i++) {
        must_write(s, event_tx, (void *)"a");
        must_write(s, event_tx, (void *)"b");
    }
    assert_int_equal(store_write(s, event_undone_tx, (void *)"a", &err), -1);
    assert_int_equal(event_list(s, "a", 0, 2, sum_events, &last, &err), 0);
    assert_int_equal(last, 3);
    assert_int_equal(event_list(s, "a", last, 10, sum_events, &last, &err), 0);
    assert_int_equal(last, 5);
    store_close(s);
    assert_int_equal(wakes, 6);
}

// ---- retention --------------------------------------------------------------------------------------------------------------
struct prune_args {
    struct retention r;
    struct ids gone;
    int removed;
};

static void keep_gone(void *arg, const char *id)
{
    keep(&((struct prune_args *)arg)->gone, id);
}

static int prune_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct prune_args *p = arg;
    p->gone.n = 0;
    p->removed = store_prune(tx, &p->r, keep_gone, p, err);
    return p->removed < 0 ? -1 : 0;
}

static void test_prune(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row old = sandbox_of("a", ""), young = sandbox_of("a", ""), live = sandbox_of("a", ""), got;
    old.destroyed_at_ms = 100;
    young.destroyed_at_ms = 300;
    put_sandbox(s, &old);
    put_sandbox(s, &young);
    put_sandbox(s, &live);
    for (int i = 0; i < 5; i++) {
        struct command_row c = command_of("a", old.id);
        c.phase = COMMAND_FINISHED;
        put_command(s, &c);
        struct job_row j = job_of("a", old.id);
        j.state = JOB_SUCCEEDED;
        put_job(s, &j);
    }
    struct admission a = admission_of("a", "sandbox.create");
    strcpy(a.sandbox_id, old.id);
    strcpy(a.idem_key, "k");
    strcpy(a.method, "POST");
    strcpy(a.path, "/v1/sandboxes");
    admit(s, &a);
    settle(s, &a, "succeeded", 201);
    must_write(s, event_tx, (void *)"a");
    must_write(s, event_tx, (void *)"a");

    struct prune_args p = {.r = {.destroyed_before_ms = 200, .events_before_ms = INT64_MAX, .max_rows = 4}};
    int rounds = 0;
    do { // a few rows at once
        must_write(s, prune_tx, &p);
        rounds++;
    } while (p.removed == 0 && rounds < 10);
    assert_int_equal(rounds, 3);
    assert_int_equal(p.gone.n, 1);
    assert_string_equal(p.gone.id[0], old.id);
    assert_int_equal(sandbox_get(s, "a", old.id, &got, &err), 1);
    const struct page page = {.tenant = "a", .limit = 10};
    struct ids jobs = {0}, commands = {0};
    assert_int_equal(job_list(s, &page, old.id, keep_job, &jobs, &err), 0);
    assert_int_equal(command_list(s, &page, old.id, keep_command, &commands, &err), 0);
    assert_int_equal(jobs.n + commands.n, 0);
    assert_int_equal(sandbox_get(s, "a", young.id, &got, &err), 0);
    sandbox_row_free(&got);
    struct receipt_row receipt; // the proof stays
    assert_int_equal(receipt_get(s, "a", a.receipt_id, &receipt, &err), 0);
    receipt_row_free(&receipt);

    // Events went, but for the newest: numbers go on.
    int64_t last = 0;
    must_write(s, event_tx, (void *)"a");
    assert_int_equal(event_list(s, "a", 0, 10, sum_events, &last, &err), 0);
    assert_int_equal(last, 3);
    struct idem_row idem;
    assert_int_equal(idem_find(s, "a", "POST", "/v1/sandboxes", "k", &idem, &err), 0);
    idem_row_free(&idem);
    p.r.idem_before_ms = INT64_MAX;
    must_write(s, prune_tx, &p);
    assert_int_equal(idem_find(s, "a", "POST", "/v1/sandboxes", "k", &idem, &err), 1);
    store_close(s);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_tokens), T(test_token_secret_is_unique), T(test_scopes), T(test_sandbox_round_trip),
        T(test_sandbox_of_another_tenant), T(test_sandbox_name_and_quota), T(test_sandbox_never_comes_back),
        T(test_sandbox_lists), T(test_quota_race), T(test_jobs), T(test_commands), T(test_events), T(test_prune),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
