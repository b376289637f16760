// The end of snapshots: deletion, retention, and what an earlier server had half written.
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sandbox/cold.h"

#define EXPIRE_AT_ONCE 20
#define DELETE_STRIPES 32

void snapshot_erase(struct manager *m, const char *id, uint64_t *ret_bytes, int *ret_failed)
{
    *ret_failed = fd_remove_tree(m->snapshots_dirfd, id, ret_bytes);
    if (*ret_failed)
        log_warn("snapshot %s: its files could not be erased", id);
}

// ---- deleting -----------------------------------------------------------------------------------------------------------
struct deletion {
    struct manager *m;
    struct snapshot_callbacks cb;
    struct admission a;
    int status;
    char id[ID_MAX], cause[WORD_MAX];
    bool admitted;
};

static void report_add(json_t *report, const char *list, const char *kind, uint64_t bytes)
{
    json_t *one = json_object();
    json_put_str(one, "kind", kind);
    json_put_int(one, "bytes", (int64_t)bytes);
    json_array_append_new(json_object_get(report, list), one);
}

static json_t *report_of(uint64_t bytes, bool failed)
{
    json_t *r = json_pack("{s:[],s:[],s:[]}", "erased", "retained", "failed");
    report_add(r, failed ? "failed" : "erased", "snapshot", bytes);
    report_add(r, "retained", "receipts", 0);
    return r;
}

static int delete_again(struct deletion *d, const struct snapshot_row *row, struct err *err)
{
    const struct change c = {.admit = &d->a, .settle = &d->a, .outcome = "unchanged", .status = d->status, .ref = row->id};
    return change_commit(d->m, &c, err);
}

// Nothing is built on it any more from this on.
static int delete_begin(struct deletion *d, struct snapshot_row *row, struct err *err)
{
    row->state = SNAPSHOT_DELETED;
    snprintf(row->state_reason, sizeof row->state_reason, "%s", d->cause);
    row->deleted_at_ms = clock_wall_ms();
    row->generation++;
    const struct change begin = {.admit = &d->a, .snapshot_update = row, .event_kind = "snapshot.deleted"};
    if (change_commit(d->m, &begin, err) != 0)
        return -1;
    d->admitted = true;
    if (d->cb.admitted)
        d->cb.admitted(d->cb.arg, d->a.job_id);
    return 0;
}

// Then the files go; again by the next DELETE where some are left.
static int delete_files(struct deletion *d, struct snapshot_row *row, struct err *err)
{
    uint64_t bytes = 0;
    int left = 0;
    crash_point(NULL, "snapshot_delete.erase");
    origin_forget(d->m, row->id);
    snapshot_erase(d->m, row->id, &bytes, &left);
    CLEANUP_JSON json_t *report = report_of(bytes, left != 0);
    free(row->deletion_json);
    row->deletion_json = json_dumps(report, JSON_COMPACT);
    struct change c = {.admit = d->admitted ? NULL : &d->a, .settle = &d->a, .snapshot_update = row, .outcome = "succeeded",
                       .status = d->status, .ref = row->id, .facts = report};
    CLEANUP_FREE char *problem = NULL;
    struct err why = {0};
    if (left) {
        err_set(&why, ERR_CLEANUP_FAILED, "cleanup_failed", "the snapshot's files could not be erased");
        problem = change_set_failure(d->m, &c, &d->a, &why);
    }
    crash_point(NULL, "snapshot_delete.commit");
    if (change_commit(d->m, &c, err) != 0)
        return -1;
    crash_point(NULL, "snapshot_delete.end");
    if (left)
        *err = why;
    return left ? -1 : 0;
}

static bool erased_whole(const struct snapshot_row *row)
{
    CLEANUP_JSON json_t *report = row->deletion_json ? json_loads(row->deletion_json, 0, NULL) : NULL;
    return report && json_array_size(json_object_get(report, "failed")) == 0;
}

static int delete_now(struct deletion *d, struct snapshot_row *row, struct err *err)
{
    if (d->a.if_generation != 0 && d->a.if_generation != row->generation)
        return err_set(err, ERR_PRECONDITION_FAILED, "generation_mismatch", "the snapshot is at generation %lld",
                       (long long)row->generation);
    if (row->state == SNAPSHOT_DELETED && erased_whole(row))
        return delete_again(d, row, err);
    if (row->state != SNAPSHOT_DELETED && delete_begin(d, row, err) != 0)
        return -1;
    return delete_files(d, row, err);
}

static void delete_work(void *arg)
{
    // After the other: two of the same have the same report, and no generation passes between its comparison and the change.
    static pthread_mutex_t stripes[DELETE_STRIPES] = {[0 ... DELETE_STRIPES - 1] = PTHREAD_MUTEX_INITIALIZER};
    struct deletion *d = arg;
    struct manager *m = d->m;
    struct err err = {0};
    struct snapshot_row row = {0};
    pthread_mutex_t *one = &stripes[(unsigned char)d->id[strlen(d->id) - 1] % DELETE_STRIPES];
    pthread_mutex_lock(one);
    int failed = snapshot_get(m->store, d->a.tenant, d->id, &row, &err);
    if (failed > 0)
        err = not_found_error();
    if (!failed)
        failed = delete_now(d, &row, &err);
    pthread_mutex_unlock(one);
    if (d->cb.done)
        d->cb.done(d->cb.arg, failed ? NULL : &row, failed ? &err : NULL);
    else if (failed)
        log_warn("snapshot %s: %s: %s %s", d->id, d->cause, err.detail, err.internal);
    snapshot_row_free(&row);
    free(d);
    store_thread_done();
    atomic_fetch_sub(&m->active, 1);
}

int manager_snapshot_delete(struct manager *m, const char *id, const struct admission *a,
                            int success_status, const struct snapshot_callbacks *cb)
{
    struct err err = {0};
    struct deletion *d = calloc(1, sizeof *d);
    if (d) {
        *d = (struct deletion){.m = m, .cb = *cb, .a = *a, .status = success_status,
                               .cause = "deleted"};
        snprintf(d->id, sizeof d->id, "%s", id);
        atomic_fetch_add(&m->active, 1);
        if (work_submit(m->ops, delete_work, d) == 0)
            return 0;
        atomic_fetch_sub(&m->active, 1);
        free(d);
    }
    err_set(&err, ERR_UNAVAILABLE, "busy", "too many operations wait already");
    cb->done(cb->arg, NULL, &err);
    return 0;
}

// ---- retention ----------------------------------------------------------------------------------------------------------
struct expired {
    struct manager *m;
    struct deletion *list[EXPIRE_AT_ONCE];
    size_t n;
};

static bool expire_one(void *arg, const struct snapshot_row *row)
{
    struct expired *x = arg;
    struct deletion *d = x->n < EXPIRE_AT_ONCE ? calloc(1, sizeof *d) : NULL;
    if (!d)
        return false;
    d->m = x->m;
    d->status = 200;
    system_admission(&d->a, row->tenant, "snapshot.delete", row->sandbox_id);
    snprintf(d->id, sizeof d->id, "%s", row->id);
    snprintf(d->cause, sizeof d->cause, "expired");
    x->list[x->n++] = d;
    return true;
}

// Here and now, one after the other: the next look finds none of them again.
void snapshots_expire(struct manager *m)
{
    struct err err = {0};
    struct expired x = {.m = m};
    if (atomic_exchange(&m->expiring, true))
        return;
    if (snapshot_each_expired_all_tenants(m->store, clock_wall_ms(), EXPIRE_AT_ONCE, expire_one, &x, &err) != 0)
        log_warn_limited("snapshots: %s %s", err.detail, err.internal);
    for (size_t i = 0; i < x.n; i++) {
        log_info("snapshot %s: expired", x.list[i]->id);
        atomic_fetch_add(&m->active, 1);
        delete_work(x.list[i]);
    }
    atomic_store(&m->expiring, false);
}

static bool keep_id(void *arg, const struct snapshot_row *row)
{
    json_object_set_new(arg, row->id, json_true());
    return true;
}

void snapshots_sweep(struct manager *m)
{
    struct err err = {0};
    CLEANUP_JSON json_t *alive = json_object();
    if (snapshot_each_alive_all_tenants(m->store, keep_id, alive, &err) != 0)
        return;
    const int fd = openat(m->snapshots_dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        fd_close(&(int){fd});
        return;
    }
    for (const struct dirent *e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || json_object_get(alive, e->d_name))
            continue;
        if (fd_remove_tree(m->snapshots_dirfd, e->d_name, NULL) != 0)
            log_warn("snapshot %s: what was left of it could not be removed", e->d_name);
    }
    closedir(d);
}
