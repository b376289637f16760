// Once a second on the loop: what has expired ends, what waits too long is told, what is past its retention goes.
#include "sandbox/cold.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PRUNE_EVERY_MS 60000

// What an act could not record, the disk being full, or not finish.
static void go_on(struct sandbox *s, int64_t now_mono_ms)
{
    struct admission a;
    pthread_mutex_lock(&s->lock);
    const bool idle = !s->ops && !s->adopting, ended = idle && s->end_unrecorded && !s->vm && !s->delete_wanted;
    const bool remove = idle && s->delete_wanted && s->delete_again_ms > 0 && now_mono_ms >= s->delete_again_ms;
    const enum vm_gone how = s->gone_how;
    pthread_mutex_unlock(&s->lock);
    if (!remove && !ended)
        return;
    system_admission(&a, s->tenant, remove ? "sandbox.delete" : "sandbox.state", s->id);
    if (remove) {
        manager_delete_by_system(s, &a, "");
    } else {
        struct op *op = op_new("gone", gone_run, &a, 200, NULL);
        if (!op)
            return;
        op->gone = how;
        op_enqueue(s, op);
    }
}

// A ttl that passed: destroy, stop or cold, once. A stopped sandbox that was to be stopped stays as it is.
static void expire(struct sandbox *s, int64_t now_wall_ms)
{
    struct sandbox_info *view = sandbox_view(s);
    const struct sandbox_row *row = &view->row;
    const bool due = row->expires_at_ms > 0 && now_wall_ms >= row->expires_at_ms;
    const bool cold = strcmp(row->on_expiry, "cold") == 0;
    const bool stop = cold || strcmp(row->on_expiry, "stop") == 0;
    const bool is_cold = row->state == SANDBOX_COLD;
    const bool act = due && (stop ? row->state == SANDBOX_RUNNING || row->state == SANDBOX_PAUSED || (is_cold && !cold)
                                  : row->state != SANDBOX_DESTROYED);
    sandbox_info_unref(view);
    pthread_mutex_lock(&s->lock);
    const bool idle = !s->ops && !s->delete_wanted;
    pthread_mutex_unlock(&s->lock);
    if (!act || (stop && !idle) || (!stop && !idle && sandbox_present_state(s) != SANDBOX_STARTING))
        return;
    struct admission a;
    if (stop) {
        system_admission(&a, s->tenant, cold ? "sandbox.cold" : "sandbox.stop", s->id);
        struct op *op = op_new(cold ? "cold" : "expire", cold ? expire_cold_run : is_cold ? cold_to_stopped_run : stop_run, &a, 200, NULL);
        if (!op)
            return;
        strcpy(op->cause, "expired");
        id_new(ID_JOB, op->a.job_id);
        op_enqueue(s, op);
    } else {
        pthread_mutex_lock(&s->lock);
        const bool already = s->delete_wanted;
        pthread_mutex_unlock(&s->lock);
        if (already) // or it goes on by itself
            return;
        log_info("sandbox %s: expired", s->id);
        system_admission(&a, s->tenant, "sandbox.delete", s->id);
        manager_delete_by_system(s, &a, "expired");
    }
}

// ---- retention ----------------------------------------------------------------------------------------------------
struct prune {
    struct manager *m;
    struct retention r;
    json_t *ids;
};

static void prune_one(void *arg, const char *id)
{
    json_array_append_new(((struct prune *)arg)->ids, json_string(id));
}

static int prune_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct prune *p = arg;
    return store_prune(tx, &p->r, prune_one, p, err) < 0 ? -1 : 0;
}

static void prune_work(void *arg)
{
    struct manager *m = arg;
    struct err err = {0};
    const int64_t now = clock_wall_ms();
    struct prune p = {.m = m, .ids = json_array()};
    p.r = (struct retention){.destroyed_before_ms = now - m->o.retention_ms,
                             .idem_before_ms = now - (int64_t)LIMIT_IDEMPOTENCY_HOURS * 3600 * 1000,
                             .events_before_ms = now - m->o.retention_ms, .max_rows = 500};
    if (store_write(m->store, prune_tx, &p, &err) != 0) {
        log_warn_limited("retention: %s %s", err.detail, err.internal);
    } else {
        size_t i;
        json_t *id;
        json_array_foreach(p.ids, i, id) {
            uint64_t bytes = 0;
            if (fd_remove_tree(m->sandboxes_dirfd, json_string_value(id), &bytes) != 0)
                log_warn_limited("sandbox %s: its records could not be erased", json_string_value(id));
        }
    }
    json_decref(p.ids);
    templates_evict(m); // what a deleted sandbox or snapshot needed
    atomic_fetch_sub(&m->active, 1);
}

// Directories of sandboxes whose rows are past their retention: a prune was cut between the two. Listed before the rows are
// read: a create's row is there before its directory is. One with a disk or a memory was not deleted: a database from a backup
// does not know it, and its data are not ours to erase.
struct record_dir {
    char id[ID_MAX];
    bool known;
};
struct record_dirs {
    struct record_dir *v;
    size_t n, cap;
};

static int by_id(const void *a, const void *b)
{
    return strcmp(((const struct record_dir *)a)->id, ((const struct record_dir *)b)->id);
}

static void mark_known(void *arg, const char *id)
{
    struct record_dirs *r = arg;
    struct record_dir key = {.known = true};
    snprintf(key.id, sizeof key.id, "%s", id);
    struct record_dir *d = bsearch(&key, r->v, r->n, sizeof *r->v, by_id);
    if (d)
        d->known = true;
}

static bool record_add(struct record_dirs *r, const char *name)
{
    if (r->n == r->cap) {
        const size_t cap = r->cap ? r->cap * 2 : 256;
        struct record_dir *v = realloc(r->v, cap * sizeof *v);
        if (!v)
            return false;
        r->v = v;
        r->cap = cap;
    }
    r->v[r->n] = (struct record_dir){.known = false};
    snprintf(r->v[r->n++].id, ID_MAX, "%s", name);
    return true;
}

static bool has_data(int dirfd, const char *id)
{
    char path[ID_MAX + 16];
    bool has = false;
    static const char *const NAMES[] = {"disk.raw", "cold"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        snprintf(path, sizeof path, "%s/%s", id, NAMES[i]);
        has = has || faccessat(dirfd, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    }
    return has;
}

void retention_sweep(struct manager *m)
{
    struct record_dirs r = {0};
    struct err err = {0};
    const int fd = openat(m->sandboxes_dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        fd_close(&(int){fd});
        return;
    }
    for (const struct dirent *e; (e = readdir(d));)
        if (id_valid(ID_SANDBOX, e->d_name) && !has_data(fd, e->d_name) && !record_add(&r, e->d_name))
            break; // the rest at the next start
    closedir(d);
    if (r.n > 0)
        qsort(r.v, r.n, sizeof *r.v, by_id);
    const bool all = r.n > 0 && sandbox_each_id_all_tenants(m->store, mark_known, &r, &err) == 0;
    for (size_t i = 0; all && i < r.n && !manager_stopping(m); i++)
        if (!r.v[i].known && fd_remove_tree(m->sandboxes_dirfd, r.v[i].id, NULL) != 0)
            log_warn("sandbox %s: its records could not be erased", r.v[i].id);
    free(r.v);
}

// What is past its retention, and what a pool lacks; reads the store, so not on the loop.
static void expire_work(void *arg)
{
    struct manager *m = arg;
    snapshots_expire(m);
    origins_trim(m);
    pool_refill(m);
    atomic_fetch_sub(&m->active, 1);
}

void reaper_tick(void *arg)
{
    struct manager *m = arg;
    static int64_t last_prune_ms; // of the loop's thread
    const int64_t mono = clock_mono_ms(), wall = clock_wall_ms();
    pthread_mutex_lock(&m->lock);
    const bool go = !m->stopping, reconciled = m->reconciled;
    m->tick = go ? loop_timer_add(m->loop, 1000, reaper_tick, m) : NULL;
    pthread_mutex_unlock(&m->lock);
    if (!go)
        return;
    size_t n;
    struct sandbox **all = registry_all(m, &n);
    for (size_t i = 0; all && i < n; i++) {
        commands_tick(all[i], mono);
        transfers_tick(all[i], mono);
        sandbox_session_tick(all[i], mono);
        if (reconciled) {
            go_on(all[i], mono);
            expire(all[i], wall);
        }
        sandbox_unref(all[i]);
    }
    free(all);
    if (reconciled) {
        atomic_fetch_add(&m->active, 1);
        if (work_submit(m->io, expire_work, m) != 0)
            atomic_fetch_sub(&m->active, 1);
    }
    if (reconciled && mono - last_prune_ms > PRUNE_EVERY_MS) {
        last_prune_ms = mono;
        atomic_fetch_add(&m->active, 1);
        if (work_submit(m->io, prune_work, m) != 0)
            atomic_fetch_sub(&m->active, 1);
    }
}
