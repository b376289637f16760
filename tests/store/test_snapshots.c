// Snapshots: what goes in comes out, for its tenant alone; a parent outlives its children; quota, expiry, pruning.
#include <pthread.h>

#include "fixture.h"
#include "store/int.h"

static unsigned quota;

static int insert_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return snapshot_insert(tx, arg, quota, err);
}

static int update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return snapshot_update(tx, arg, err);
}

static void refused(struct store *s, store_tx_fn fn, struct snapshot_row *row, enum err_kind kind, const char *code)
{
    struct err err = {0};
    assert_int_equal(store_write(s, fn, row, &err), -1);
    assert_err(err, kind, code);
}

static void delete(struct snapshot_row *row, int64_t at_ms)
{
    row->state = SNAPSHOT_DELETED;
    row->deleted_at_ms = at_ms;
    row->generation++;
}

struct ids {
    unsigned n;
    char id[32][ID_MAX];
};

static bool keep(void *arg, const struct snapshot_row *row)
{
    struct ids *ids = arg;
    assert_true(ids->n < 32);
    strcpy(ids->id[ids->n++], row->id);
    return true;
}

static bool keep_one(void *arg, const struct snapshot_row *row)
{
    keep(arg, row);
    return false;
}

static struct ids list(struct store *s, const struct snapshot_filter *f)
{
    struct ids ids = {0};
    struct err err = {0};
    assert_int_equal(snapshot_list(s, f, keep, &ids, &err), 0);
    return ids;
}

static int state_of(struct store *s, const struct snapshot_row *row)
{
    struct snapshot_row got;
    struct err err = {0};
    if (snapshot_get(s, row->tenant, row->id, &got, &err) != 0)
        return 0;
    const int st = got.state;
    snapshot_row_free(&got);
    return st;
}

// ---- one row ----------------------------------------------------------------------------------------------------------
static void fill_heap(struct snapshot_row *row)
{
    char **const heap[] = {&row->env_json,  &row->sizes_json,   &row->digests_json,
                           &row->qemu_json, &row->timings_json, &row->deletion_json};
    for (size_t i = 0; i < sizeof heap / sizeof heap[0]; i++)
        assert_true(asprintf(heap[i], "{\"n\":%zu}", i) > 0);
}

static void must_be_same(struct snapshot_row *a, struct snapshot_row *b)
{
    char **const heap[][2] = {{&a->env_json, &b->env_json},         {&a->sizes_json, &b->sizes_json},
                              {&a->digests_json, &b->digests_json}, {&a->qemu_json, &b->qemu_json},
                              {&a->timings_json, &b->timings_json}, {&a->deletion_json, &b->deletion_json}};
    struct snapshot_row x, y;
    assert_int_equal(snapshot_row_copy(&x, a), 0);
    assert_int_equal(snapshot_row_copy(&y, b), 0);
    for (size_t i = 0; i < sizeof heap / sizeof heap[0]; i++) {
        assert_ptr_not_equal(*heap[i][0], *heap[i][1]);
        assert_string_equal(*heap[i][0], *heap[i][1]);
    }
    snapshot_row_free(&x); // leaves NULL where there was heap: the rest is inline
    snapshot_row_free(&y);
    assert_memory_equal(&x, &y, sizeof x);
}

static void test_round_trip(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct snapshot_row parent = snapshot_of("a", "sbxa", ""), row, got, copy, first;
    put_snapshot(s, &parent);
    memset(&row, 0, sizeof row);
    id_new(ID_SNAPSHOT, row.id);
    row.state = SNAPSHOT_READY;
    char *const text[] = {row.tenant, row.name, row.sandbox_id, row.state_reason, row.kind, row.template_key,
                          row.image_ref, row.image_digest, row.accel, row.manifest_sha256, row.job_id, row.audit_id,
                          row.receipt_id};
    for (size_t i = 0; i < sizeof text / sizeof text[0]; i++)
        sprintf(text[i], "text-%zu", i);
    strcpy(row.parent_id, parent.id);
    int *const number[] = {&row.vcpus, &row.memory_mib, &row.disk_mib};
    for (int i = 0; i < 3; i++)
        *number[i] = 100 + i;
    int64_t *const wide[] = {&row.epoch, &row.bytes, &row.paused_us, &row.expires_at_ms, &row.generation, &row.created_at_ms};
    for (int i = 0; i < 6; i++)
        *wide[i] = ((int64_t)1 << 40) + i;
    fill_heap(&row);
    refused(s, insert_tx, &row, ERR_CONFLICT, "parent_deleted"); // it is of tenant "a", this one of "text-0"
    strncpy(row.tenant, "a", sizeof row.tenant); // zeros to the end: all bytes are compared
    put_snapshot(s, &row);
    assert_int_equal(snapshot_get(s, "a", row.id, &got, &err), 0);
    must_be_same(&row, &got);
    assert_int_equal(snapshot_row_copy(&copy, &got), 0);
    must_be_same(&got, &copy);
    snapshot_row_free(&got);
    must_be_same(&row, &copy);

    memcpy(&first, &row, sizeof first);
    strcpy(copy.name, "other");
    free(copy.deletion_json);
    copy.deletion_json = NULL;
    copy.epoch++;
    strcpy(copy.parent_id, "");        // lineage is not changed by an update
    strcpy(copy.sandbox_id, "sbxother");
    copy.created_at_ms = 1;
    must_write(s, update_tx, &copy);
    assert_int_equal(snapshot_get(s, "a", row.id, &got, &err), 0);
    assert_string_equal(got.name, "other");
    assert_null(got.deletion_json);
    assert_int_equal(got.epoch, row.epoch + 1);
    assert_string_equal(got.parent_id, parent.id);
    assert_string_equal(got.sandbox_id, first.sandbox_id);
    assert_int_equal(got.created_at_ms, first.created_at_ms);
    snapshot_row_free(&got);
    snapshot_row_free(&copy);
    snapshot_row_free(&row);
    snapshot_row_free(&row); // a freed row may be freed again
    struct snapshot_row zero = {0};
    snapshot_row_free(&zero);
    store_close(s);
}

static void test_ids_are_unique(void **state)
{
    struct store *s = open_store(*state);
    struct snapshot_row row = snapshot_of("a", "sbxa", "");
    put_snapshot(s, &row);
    refused(s, insert_tx, &row, ERR_CONFLICT, "constraint");
    store_close(s);
}

// Foreign and missing are the same, in every query and every write.
static void test_of_another_tenant(void **state)
{
    struct store *s = open_store(*state);
    struct err foreign = {0}, missing = {0};
    struct snapshot_row mine = snapshot_of("a", "sbxa", ""), theirs = snapshot_of("b", "sbxb", ""), got, stolen;
    put_snapshot(s, &mine);
    put_snapshot(s, &theirs);
    assert_int_equal(snapshot_get(s, "a", theirs.id, &got, &foreign), 1);
    assert_int_equal(snapshot_get(s, "a", "snp00000000000000000000000000", &got, &missing), 1);
    assert_memory_equal(&foreign, &missing, sizeof foreign);
    struct snapshot_filter f = {.page = {.tenant = "a", .limit = 10}};
    struct ids ids = list(s, &f);
    assert_int_equal(ids.n, 1);
    assert_string_equal(ids.id[0], mine.id);
    f.sandbox_id = "sbxb"; // theirs, by its name
    assert_int_equal(list(s, &f).n, 0);

    stolen = theirs;
    strcpy(stolen.tenant, "a");
    refused(s, update_tx, &stolen, ERR_NOT_FOUND, "");
    delete(&stolen, 9);
    refused(s, update_tx, &stolen, ERR_NOT_FOUND, "");
    strcpy(stolen.id, "snp00000000000000000000000000");
    refused(s, update_tx, &stolen, ERR_NOT_FOUND, "");
    assert_int_equal(state_of(s, &theirs), SNAPSHOT_READY);
    struct snapshot_row child = snapshot_of("a", "sbxa", theirs.id); // nor may a foreign one be held alive
    refused(s, insert_tx, &child, ERR_CONFLICT, "parent_deleted");
    delete(&theirs, 9);
    must_write(s, update_tx, &theirs);
    f = (struct snapshot_filter){.page = {.tenant = "a", .limit = 10}, .deleted = true};
    assert_int_equal(list(s, &f).n, 0);
    store_close(s);
}

// ---- parents and children ---------------------------------------------------------------------------------------------
static void test_parent_outlives_children(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct snapshot_row root = snapshot_of("a", "sbxa", ""), one, two, grandchild, late, self;
    put_snapshot(s, &root);
    one = snapshot_of("a", "sbxb", root.id);
    two = snapshot_of("a", "sbxc", root.id);
    put_snapshot(s, &one);
    put_snapshot(s, &two);
    grandchild = snapshot_of("a", "sbxd", one.id);
    put_snapshot(s, &grandchild);

    delete(&root, 50);
    assert_int_equal(store_write(s, update_tx, &root, &err), -1);
    assert_err(err, ERR_CONFLICT, "has_children");
    assert_string_equal(err.detail, "2 snapshots have it as their parent");
    assert_string_not_equal(err.remedy, "");
    assert_int_equal(state_of(s, &root), SNAPSHOT_READY);
    delete(&one, 51);
    refused(s, update_tx, &one, ERR_CONFLICT, "has_children");
    delete(&two, 52);
    must_write(s, update_tx, &two);
    refused(s, update_tx, &root, ERR_CONFLICT, "has_children"); // `one` is left
    delete(&grandchild, 53);
    must_write(s, update_tx, &grandchild);
    must_write(s, update_tx, &one);
    must_write(s, update_tx, &root);
    assert_int_equal(state_of(s, &root), SNAPSHOT_DELETED);
    late = snapshot_of("a", "sbxe", root.id);
    refused(s, insert_tx, &late, ERR_CONFLICT, "parent_deleted");
    late = snapshot_of("a", "sbxe", "snp00000000000000000000000000");
    refused(s, insert_tx, &late, ERR_CONFLICT, "parent_deleted");
    self = snapshot_of("a", "sbxe", "");
    strcpy(self.parent_id, self.id);
    refused(s, insert_tx, &self, ERR_CONFLICT, "parent_deleted");
    store_close(s);
}

// A child is made while its parent is deleted: one of the two is refused, whatever the order.
struct side {
    struct store *s;
    pthread_barrier_t *start;
    store_tx_fn fn;
    struct snapshot_row row;
    int result;
    struct err err;
};

static void *run_side(void *arg)
{
    struct side *x = arg;
    pthread_barrier_wait(x->start);
    x->result = store_write(x->s, x->fn, &x->row, &x->err);
    return NULL;
}

static void test_child_or_deletion(void **state)
{
    struct store *s = open_store(*state);
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, 2);
    quota = 0;
    for (int i = 0; i < 20; i++) {
        struct snapshot_row parent = snapshot_of("a", "sbxa", "");
        put_snapshot(s, &parent);
        struct side child = {.s = s, .start = &start, .fn = insert_tx, .row = snapshot_of("a", "sbxb", parent.id)};
        struct side end = {.s = s, .start = &start, .fn = update_tx, .row = parent};
        delete(&end.row, 77);
        pthread_t threads[2];
        assert_int_equal(pthread_create(&threads[0], NULL, run_side, i % 2 ? &child : &end), 0);
        assert_int_equal(pthread_create(&threads[1], NULL, run_side, i % 2 ? &end : &child), 0);
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        assert_int_equal(child.result + end.result, -1);
        if (child.result == 0)
            assert_err(end.err, ERR_CONFLICT, "has_children");
        else
            assert_err(child.err, ERR_CONFLICT, "parent_deleted");
    }
    pthread_barrier_destroy(&start);
    store_close(s);
}

static void test_never_comes_back(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct snapshot_row row = snapshot_of("a", "sbxa", ""), late = row, got;
    put_snapshot(s, &row);
    row.generation = 5;
    must_write(s, update_tx, &row);
    refused(s, update_tx, &late, ERR_INTERNAL, "stale_row");
    delete(&row, 1000);
    strcpy(row.state_reason, "expired");
    must_write(s, update_tx, &row);
    late.generation = 9; // believes to be newer
    refused(s, update_tx, &late, ERR_CONFLICT, "deleted");
    late = row; // another deletion, begun when it was alive
    late.deleted_at_ms = 1001;
    refused(s, update_tx, &late, ERR_CONFLICT, "deleted");
    row.deletion_json = (char *)"{}"; // its report may still be added
    must_write(s, update_tx, &row);
    assert_int_equal(snapshot_get(s, "a", row.id, &got, &err), 0);
    assert_int_equal(got.state, SNAPSHOT_DELETED);
    assert_int_equal(got.deleted_at_ms, 1000);
    assert_string_equal(got.state_reason, "expired");
    snapshot_row_free(&got);
    store_close(s);
}

static void test_state_and_time_agree(void **state)
{
    struct store *s = open_store(*state);
    struct snapshot_row row = snapshot_of("a", "sbxa", ""), half = row;
    half.deleted_at_ms = 5;
    refused(s, insert_tx, &half, ERR_INTERNAL, "snapshot_state");
    put_snapshot(s, &row);
    refused(s, update_tx, &half, ERR_INTERNAL, "snapshot_state");
    half = row;
    half.state = SNAPSHOT_DELETED;
    refused(s, update_tx, &half, ERR_INTERNAL, "snapshot_state");
    assert_int_equal(SNAPSHOT_READY, 1); // stored: pinned
    assert_int_equal(SNAPSHOT_DELETED, 2);
    store_close(s);
}

// ---- quota ------------------------------------------------------------------------------------------------------------
static void test_quota(void **state)
{
    struct store *s = open_store(*state);
    struct snapshot_row rows[3], other = snapshot_of("b", "sbxb", "");
    quota = 2;
    for (int i = 0; i < 3; i++)
        rows[i] = snapshot_of("a", "sbxa", "");
    must_write(s, insert_tx, &rows[0]);
    must_write(s, insert_tx, &rows[1]);
    refused(s, insert_tx, &rows[2], ERR_RATE_LIMITED, "quota_exceeded");
    must_write(s, insert_tx, &other); // another tenant's own
    delete(&rows[0], 9);
    must_write(s, update_tx, &rows[0]); // gives it back
    must_write(s, insert_tx, &rows[2]);
    quota = 0;
    rows[0] = snapshot_of("a", "sbxa", "");
    must_write(s, insert_tx, &rows[0]);
    store_close(s);
}

static void test_quota_race(void **state)
{
    enum { RACERS = 30, QUOTA = 4 };
    struct store *s = open_store(*state);
    pthread_barrier_t start;
    pthread_t threads[RACERS];
    static struct side sides[RACERS];
    int good = 0;
    quota = QUOTA;
    pthread_barrier_init(&start, NULL, RACERS);
    for (int i = 0; i < RACERS; i++) {
        sides[i] = (struct side){.s = s, .start = &start, .fn = insert_tx, .row = snapshot_of("a", "sbxa", "")};
        assert_int_equal(pthread_create(&threads[i], NULL, run_side, &sides[i]), 0);
    }
    for (int i = 0; i < RACERS; i++) {
        pthread_join(threads[i], NULL);
        good += sides[i].result == 0;
        if (sides[i].result != 0)
            assert_err(sides[i].err, ERR_RATE_LIMITED, "quota_exceeded");
    }
    quota = 0;
    assert_int_equal(good, QUOTA);
    pthread_barrier_destroy(&start);
    store_close(s);
}

// ---- lists ------------------------------------------------------------------------------------------------------------
static void test_lists(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct snapshot_row rows[6];
    for (int i = 0; i < 6; i++) {
        rows[i] = snapshot_of("a", i % 2 ? "sbxodd" : "sbxeven", "");
        if (i < 2)
            delete(&rows[i], 50 + i);
        put_snapshot(s, &rows[i]);
    }
    struct snapshot_filter f = {.page = {.tenant = "a", .limit = 3}};
    struct ids ids = list(s, &f); // newest first, without the deleted ones
    assert_int_equal(ids.n, 3);
    assert_string_equal(ids.id[0], rows[5].id);
    f.page.cursor = ids.id[2];
    struct ids rest = list(s, &f);
    assert_int_equal(rest.n, 1);
    assert_string_equal(rest.id[0], rows[2].id);
    f = (struct snapshot_filter){.page = {.tenant = "a", .limit = 10}, .sandbox_id = "sbxodd"};
    ids = list(s, &f);
    assert_int_equal(ids.n, 2);
    assert_string_equal(ids.id[0], rows[5].id);
    assert_string_equal(ids.id[1], rows[3].id);
    f.page.cursor = rows[5].id;
    assert_int_equal(list(s, &f).n, 1);
    f = (struct snapshot_filter){.page = {.tenant = "a", .limit = 10}, .deleted = true};
    ids = list(s, &f);
    assert_int_equal(ids.n, 2);
    assert_string_equal(ids.id[0], rows[1].id);
    f.sandbox_id = "sbxeven";
    ids = list(s, &f);
    assert_int_equal(ids.n, 1);
    assert_string_equal(ids.id[0], rows[0].id);
    f.sandbox_id = "x' OR 1=1 --";
    assert_int_equal(list(s, &f).n, 0);

    struct ids all = {0}, one = {0};
    assert_int_equal(snapshot_each_alive_all_tenants(s, keep, &all, &err), 0);
    assert_int_equal(all.n, 4);
    assert_int_equal(snapshot_each_alive_all_tenants(s, keep_one, &one, &err), 0); // stops when it is told to
    assert_int_equal(one.n, 1);
    store_close(s);
}

static struct ids expired(struct store *s, int64_t now_ms, unsigned limit)
{
    struct ids ids = {0};
    struct err err = {0};
    assert_int_equal(snapshot_each_expired_all_tenants(s, now_ms, limit, keep, &ids, &err), 0);
    return ids;
}

static void test_expiry(void **state)
{
    struct store *s = open_store(*state);
    struct snapshot_row kept = snapshot_of("a", "sbxa", ""), later = kept, sooner, parent, child, gone;
    put_snapshot(s, &kept);
    later = snapshot_of("a", "sbxa", "");
    later.expires_at_ms = 300;
    put_snapshot(s, &later);
    sooner = snapshot_of("b", "sbxb", "");
    sooner.expires_at_ms = 200;
    put_snapshot(s, &sooner);
    parent = snapshot_of("a", "sbxa", "");
    parent.expires_at_ms = 100;
    put_snapshot(s, &parent);
    child = snapshot_of("a", "sbxc", parent.id);
    put_snapshot(s, &child);
    gone = snapshot_of("a", "sbxa", "");
    gone.expires_at_ms = 50;
    delete(&gone, 60);
    put_snapshot(s, &gone);

    assert_int_equal(expired(s, 199, 10).n, 0); // the parent's time has come, but it cannot go
    assert_int_equal(expired(s, 200, 10).n, 1);
    struct ids ids = expired(s, 1000, 10);
    assert_int_equal(ids.n, 2);
    assert_string_equal(ids.id[0], sooner.id); // oldest first
    assert_string_equal(ids.id[1], later.id);
    ids = expired(s, 1000, 1);
    assert_int_equal(ids.n, 1);
    assert_string_equal(ids.id[0], sooner.id);
    delete(&child, 1000);
    must_write(s, update_tx, &child);
    ids = expired(s, 1000, 10);
    assert_int_equal(ids.n, 3);
    assert_string_equal(ids.id[0], parent.id);
    later.expires_at_ms = 0; // kept now
    later.generation++;
    must_write(s, update_tx, &later);
    assert_int_equal(expired(s, INT64_MAX, 10).n, 2);
    store_close(s);
}

// ---- pruning ----------------------------------------------------------------------------------------------------------
struct prune_args {
    struct retention r;
    unsigned sandboxes;
    int removed;
};

static void count_gone(void *arg, const char *id)
{
    assert_true(id_valid(ID_SANDBOX, id));
    ((struct prune_args *)arg)->sandboxes++;
}

static int prune_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct prune_args *p = arg;
    p->removed = store_prune(tx, &p->r, count_gone, p, err);
    return p->removed < 0 ? -1 : 0;
}

static void test_prune(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct sandbox_row source = sandbox_of("a", ""), got;
    source.destroyed_at_ms = 100;
    put_sandbox(s, &source);
    struct snapshot_row alive = snapshot_of("a", source.id, ""), young = snapshot_of("a", source.id, ""), old[5];
    alive.created_at_ms = 1;
    alive.env_json = (char *)"{\"A\":\"1\"}";
    put_snapshot(s, &alive);
    delete(&young, 300);
    put_snapshot(s, &young);
    for (int i = 0; i < 5; i++) {
        old[i] = snapshot_of("a", source.id, "");
        delete(&old[i], 110 + i);
        put_snapshot(s, &old[i]);
    }
    struct prune_args p = {.r = {.destroyed_before_ms = 114, .max_rows = 3}};
    must_write(s, prune_tx, &p); // the oldest, a few at once
    for (int i = 0; i < 5; i++)
        assert_int_equal(state_of(s, &old[i]), i < 3 ? 0 : SNAPSHOT_DELETED);
    must_write(s, prune_tx, &p);
    assert_int_equal(state_of(s, &old[3]), 0);
    assert_int_equal(state_of(s, &old[4]), SNAPSHOT_DELETED); // not older than that
    assert_int_equal(state_of(s, &young), SNAPSHOT_DELETED);
    // Its source is gone, with its row; the snapshot carries what it needs.
    assert_int_equal(p.sandboxes, 1);
    assert_int_equal(sandbox_get(s, "a", source.id, &got, &err), 1);
    struct snapshot_row left;
    assert_int_equal(snapshot_get(s, "a", alive.id, &left, &err), 0);
    assert_string_equal(left.sandbox_id, source.id);
    assert_string_equal(left.env_json, "{\"A\":\"1\"}");
    snapshot_row_free(&left);
    p.r.destroyed_before_ms = INT64_MAX;
    must_write(s, prune_tx, &p);
    assert_int_equal(state_of(s, &young), 0);
    assert_int_equal(state_of(s, &alive), SNAPSHOT_READY);
    assert_int_equal(p.removed, 0); // snapshots have no files left to erase: only sandboxes are told of
    store_close(s);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_round_trip), T(test_ids_are_unique), T(test_of_another_tenant), T(test_parent_outlives_children),
        T(test_child_or_deletion), T(test_never_comes_back), T(test_state_and_time_agree), T(test_quota),
        T(test_quota_race), T(test_lists), T(test_expiry), T(test_prune),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
