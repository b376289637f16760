#include "sandbox/origin.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/cold.h"
#include "sandbox/saved.h"

#define RETRY_MS 60000 // a template that could not be made is tried again after this

int origins_open(struct manager *m, struct err *err)
{
    struct origins *os = &m->origins;
    pthread_condattr_t attr;
    pthread_mutex_init(&os->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&os->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (mkdirat(m->o.state_dirfd, "templates", 0700) != 0 && errno != EEXIST)
        return err_sys(err, errno, "making the templates' directory");
    os->templates_dirfd = openat(m->o.state_dirfd, "templates", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return os->templates_dirfd >= 0 ? 0 : err_sys(err, errno, "opening the templates' directory");
}

struct origin *origin_new(void)
{
    struct origin *o = calloc(1, sizeof *o);
    if (!o)
        return NULL;
    o->refs = 1;
    o->ram_fd = o->state_fd = o->disk_fd = o->spool_dirfd = -1;
    return o;
}

void origin_put_done(struct origin *o)
{
    ram_runs_free(&o->put_runs);
    if (o->put_pages)
        munmap(o->put_pages, o->put_mapped);
    o->put_pages = NULL;
}

static void origin_free(struct origin *o)
{
    origin_put_done(o);
    ram_hold_end(&o->hold);
    fd_close(&o->ram_fd);
    fd_close(&o->state_fd);
    fd_close(&o->disk_fd);
    fd_close(&o->spool_dirfd);
    json_decref(o->commands);
    ram_runs_free(&o->runs);
    free(o);
}

enum user { USER_ANY, USER_POOL, USER_MAP };

static struct origin *ref(struct manager *m, struct origin *o, enum user user)
{
    pthread_mutex_lock(&m->origins.lock);
    o->refs++;
    o->pool_refs += user == USER_POOL;
    o->map_refs += user == USER_MAP;
    pthread_mutex_unlock(&m->origins.lock);
    return o;
}

static void unref(struct manager *m, struct origin *o, enum user user)
{
    int files[3] = {-1, -1, -1};
    if (!o)
        return;
    pthread_mutex_lock(&m->origins.lock);
    o->used_ms = clock_mono_ms();
    o->pool_refs -= user == USER_POOL;
    o->map_refs -= user == USER_MAP;
    const bool last = --o->refs == 0;
    if (last) {
        m->origins.unlisted_bytes -= o->counted_bytes;
    } else if (!o->listed && o->refs == o->map_refs) {
        memcpy(files, (const int[]){o->state_fd, o->disk_fd, o->spool_dirfd}, sizeof files);
        o->state_fd = o->disk_fd = o->spool_dirfd = -1;
    }
    pthread_mutex_unlock(&m->origins.lock);
    for (size_t i = 0; i < 3; i++)
        fd_close(&files[i]);
    if (!last)
        return;
    struct origin *base = o->base;
    origin_free(o);
    unref(m, base, USER_ANY);
}

void origin_count(struct manager *m, struct origin *o)
{
    o->counted_bytes = ram_bytes(o->ram_fd);
    pthread_mutex_lock(&m->origins.lock);
    m->origins.unlisted_bytes += o->counted_bytes;
    pthread_mutex_unlock(&m->origins.lock);
}

struct origin *origin_ref(struct manager *m, struct origin *o) { return ref(m, o, USER_ANY); }
void origin_unref(struct manager *m, struct origin *o) { unref(m, o, USER_ANY); }
struct origin *origin_map_ref(struct manager *m, struct origin *o) { return ref(m, o, USER_MAP); }
void origin_map_unref(struct manager *m, struct origin *o) { unref(m, o, USER_MAP); }
struct origin *origin_pool_ref(struct manager *m, struct origin *o) { return ref(m, o, USER_POOL); }
void origin_pool_unref(struct manager *m, struct origin *o) { unref(m, o, USER_POOL); }

int origin_state_open(const struct origin *o, struct err *err)
{
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", o->state_fd);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : err_sys(err, errno, "opening device state");
}

// ---- the cache --------------------------------------------------------------------------------------------------------
// Under the lock.
static struct origin *find(struct origins *os, const char *key)
{
    for (struct origin *o = os->list; o; o = o->next)
        if (strcmp(o->key, key) == 0)
            return o;
    return NULL;
}

// Its memory counts on until its last user is gone (unref), who maps it.
static void unlink_locked(struct origins *os, struct origin *o)
{
    for (struct origin **at = &os->list; *at; at = &(*at)->next)
        if (*at == o) {
            *at = o->next;
            o->listed = false;
            o->counted_bytes = o->held_bytes;
            os->unlisted_bytes += o->counted_bytes;
            return;
        }
}

void origin_forget(struct manager *m, const char *key)
{
    pthread_mutex_lock(&m->origins.lock);
    struct origin *o = find(&m->origins, key);
    const bool making = o && o->state == ORIGIN_MAKING;
    if (making)
        o->forgotten = true;
    else if (o)
        unlink_locked(&m->origins, o);
    pthread_mutex_unlock(&m->origins.lock);
    if (!making)
        origin_unref(m, o);
}

// Drops the least recently used one where those that nobody uses hold more than that.
static bool drop_above(struct manager *m, uint64_t most)
{
    uint64_t idle = 0;
    struct origin *oldest = NULL;
    pthread_mutex_lock(&m->origins.lock);
    for (struct origin *o = m->origins.list; o; o = o->next) {
        if (o->state != ORIGIN_READY || o->refs > 1)
            continue;
        idle += o->held_bytes;
        if (!oldest || o->used_ms < oldest->used_ms)
            oldest = o;
    }
    const bool drop = oldest && idle > most;
    if (drop) {
        unlink_locked(&m->origins, oldest);
        m->origins.evicted++;
    }
    pthread_mutex_unlock(&m->origins.lock);
    if (!drop)
        return false;
    log_info("template %.20s: dropped from memory", oldest->key);
    origin_unref(m, oldest);
    return true;
}

// That one alone: another may have taken its place.
static void origin_drop(struct manager *m, struct origin *o)
{
    pthread_mutex_lock(&m->origins.lock);
    const bool there = find(&m->origins, o->key) == o;
    if (there)
        unlink_locked(&m->origins, o);
    pthread_mutex_unlock(&m->origins.lock);
    if (there)
        origin_unref(m, o);
}

void origins_trim(struct manager *m)
{
    while (drop_above(m, (uint64_t)m->o.template_memory_mib << 20))
        ;
}

bool origins_give_up(struct manager *m)
{
    return drop_above(m, 0);
}

bool origin_retire(struct manager *m, const char *name, const char *hidden)
{
    struct origins *os = &m->origins;
    struct origin *o;
    pthread_mutex_lock(&os->lock);
    for (o = os->list; o && strcmp(template_name(o->key), name) != 0;)
        o = o->next;
    const bool used = o && (o->state == ORIGIN_MAKING || o->refs > 1);
    const bool gone = !used && renameat(os->templates_dirfd, name, os->templates_dirfd, hidden) == 0;
    if (gone && o)
        unlink_locked(os, o);
    pthread_mutex_unlock(&os->lock);
    if (gone)
        origin_unref(m, o);
    return gone;
}

// Finds a ready one, or puts one into the list that the caller is to make. Waits for who makes it meanwhile.
struct ask {
    const char *key;
    int parent_dirfd;
    const char *name;                  // of its directory there
    bool again;                        // also one that could not be made a moment ago: it may be there now
    bool (*stop)(void *arg);           // NULL: never
    void *arg;
};

// 0: *ret referenced, ready; 1: *ret (the cache's) is the caller's to make; -1: it failed lately, or waiting was stopped.
static int claim(struct manager *m, const struct ask *a, struct origin **ret, struct err *err)
{
    struct origins *os = &m->origins;
    pthread_mutex_lock(&os->lock);
    for (;;) {
        struct origin *o = find(os, a->key);
        if (!o) {
            o = origin_new();
            if (!o) {
                pthread_mutex_unlock(&os->lock);
                return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
            }
            snprintf(o->key, sizeof o->key, "%s", a->key);
            o->next = os->list;
            os->list = o;
            o->listed = true;
            *ret = o;
            pthread_mutex_unlock(&os->lock);
            return 1;
        }
        if (o->state == ORIGIN_READY) {
            o->refs++;
            o->used_ms = clock_mono_ms();
            *ret = o;
            pthread_mutex_unlock(&os->lock);
            return 0;
        }
        if (o->state == ORIGIN_FAILED && clock_mono_ms() < o->retry_ms && !a->again) {
            *err = o->err;
            pthread_mutex_unlock(&os->lock);
            return -1;
        }
        if (o->state == ORIGIN_FAILED) {
            o->state = ORIGIN_MAKING;
            *ret = o;
            pthread_mutex_unlock(&os->lock);
            return 1;
        }
        pthread_mutex_unlock(&os->lock); // stop takes a sandbox's lock, under which others take ours
        if (a->stop && a->stop(a->arg))
            return err_set(err, ERR_CONFLICT, "cancelled", "the operation was cancelled");
        pthread_mutex_lock(&os->lock);
        if (find(os, a->key) != o || o->state != ORIGIN_MAKING)
            continue; // its end was told meanwhile
        const int64_t until = clock_mono_ms() + 250; // looks at stop again
        const struct timespec ts = {.tv_sec = until / 1000, .tv_nsec = until % 1000 * 1000000};
        (void)pthread_cond_timedwait(&os->changed, &os->lock, &ts);
    }
}

// The end of making: ready (one more reference for the caller), failed, or (keep_failed false, or told meanwhile) forgotten.
static void conclude(struct manager *m, struct origin *o, const struct err *err, bool keep_failed, bool want_ref)
{
    struct origins *os = &m->origins;
    pthread_mutex_lock(&os->lock);
    o->used_ms = clock_mono_ms();
    if (!err) {
        o->held_bytes = ram_bytes(o->ram_fd);
        o->state = ORIGIN_READY;
        o->refs += want_ref;
    } else {
        o->state = ORIGIN_FAILED;
        o->err = *err;
        o->retry_ms = clock_mono_ms() + RETRY_MS;
    }
    const bool forget = o->forgotten || (err && !keep_failed);
    if (forget)
        unlink_locked(os, o);
    pthread_cond_broadcast(&os->changed);
    pthread_mutex_unlock(&os->lock);
    if (forget)
        origin_unref(m, o);
}

// ---- memory for it ----------------------------------------------------------------------------------------------------
static unsigned file_mib(int dirfd, const char *name)
{
    char path[DIGEST_TEXT_MAX + sizeof "/memory"];
    struct stat st;
    snprintf(path, sizeof path, "%s/memory", name);
    return fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0 ? (unsigned)(st.st_size >> 20) + 1 : 0;
}

// Before it is loaded: what its file has, and of what differs from a template all of that one. Until conclude, which counts what
// it really holds; then budget_give. unavailable/memory_budget.
static int load_take(struct manager *m, const struct ask *a, const char *template_key, unsigned *ret_mib, struct err *err)
{
    unsigned mib = file_mib(a->parent_dirfd, a->name);
    if (mib > 0 && *template_key)
        mib += file_mib(m->origins.templates_dirfd, template_name(template_key));
    *ret_mib = 0;
    if (mib == 0) // there is nothing to load
        return 0;
    if (budget_take(m, mib, err) != 0)
        return -1;
    *ret_mib = mib;
    budget_make_room(m);
    return 0;
}

// ---- templates --------------------------------------------------------------------------------------------------------
struct making {
    struct manager *m;
    struct origin *o;
    struct machine_parts parts;
    struct image_runtime runtime;
    char image[DIGEST_TEXT_MAX];
    unsigned mib;                      // of the budget
};

static void *make_work(void *arg)
{
    struct making *w = arg;
    struct err err = {0};
    const int64_t t = clock_mono_ms();
    const int failed = template_make(w->m, &w->parts, w->o, &err);
    if (failed)
        log_warn("template %.20s: could not be made: %s (%s) %s", w->o->key, err.detail, err.code, err.internal);
    else
        log_info("template %.20s: made in %lld ms", w->o->key, (long long)(clock_mono_ms() - t));
    conclude(w->m, w->o, failed ? &err : NULL, true, false);
    budget_pool_give(w->m, w->mib);
    origins_trim(w->m);
    templates_evict(w->m);
    store_thread_done();
    struct manager *m = w->m;
    free(w);
    atomic_fetch_sub(&m->active, 1);
    return NULL;
}

static int make_aside(struct manager *m, const struct machine_parts *parts, struct origin *o, struct err *err)
{
    const unsigned mib = budget_need(parts->accel, parts->memory_mib);
    if (!budget_build_take(m, mib))
        return err_set(err, ERR_UNAVAILABLE, "memory_budget", "there is no memory to make a template now");
    struct making *w = calloc(1, sizeof *w);
    pthread_t thread;
    if (w) {
        *w = (struct making){.m = m, .o = o, .parts = *parts, .runtime = *parts->runtime};
        snprintf(w->image, sizeof w->image, "%s", parts->image_digest);
        w->parts.image_digest = w->image;
        w->parts.runtime = &w->runtime;
        w->mib = mib;
        atomic_fetch_add(&m->active, 1);
        // A thread of its own: those of the operations may all be waiting for this.
        if (pthread_create(&thread, NULL, make_work, w) == 0) {
            pthread_detach(thread); // the manager's end waits for `active`
            return 0;
        }
        atomic_fetch_sub(&m->active, 1);
        free(w);
    }
    budget_pool_give(m, mib);
    return err_set(err, ERR_UNAVAILABLE, "no_threads", "no thread is left to make a template");
}

static bool differs(int parent_dirfd, const char *name, const struct saved_signature *was)
{
    struct saved_signature now = {0};
    CLEANUP_FD int dir = openat(parent_dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (dir >= 0)
        saved_sign(dir, &now);
    return memcmp(&now, was, sizeof now) != 0;
}

// Its files, or those of the template that what is saved of its forks will need.
static bool touched(struct manager *m, int parent_dirfd, const char *name, const struct origin *o)
{
    if (differs(parent_dirfd, name, &o->signature))
        return true;
    return *o->template_key && strcmp(o->template_key, o->key) != 0 &&
           differs(m->origins.templates_dirfd, template_name(o->template_key), &o->base_signature);
}

bool origin_current(struct manager *m, const char *key, const char *manifest)
{
    pthread_mutex_lock(&m->origins.lock);
    struct origin *o = find(&m->origins, key);
    const bool is = o && o->state == ORIGIN_READY && strcmp(o->template_manifest, manifest) == 0;
    o = is ? o : NULL;
    if (o)
        o->refs++;
    pthread_mutex_unlock(&m->origins.lock);
    const bool current = is && !touched(m, m->origins.templates_dirfd, template_name(key), o);
    origin_unref(m, o);
    return current;
}

// claim, but an origin whose files were touched since they were checked is none: it is loaded, and checked, again.
static int claim_untouched(struct manager *m, const struct ask *a, struct origin **ret, struct err *err)
{
    int claimed = claim(m, a, ret, err);
    if (claimed == 0 && *ret && touched(m, a->parent_dirfd, a->name, *ret)) {
        log_warn("origin %.20s: its files were touched; they are checked again", a->key);
        origin_drop(m, *ret);
        origin_unref(m, *ret);
        *ret = NULL;
        claimed = claim(m, a, ret, err);
    }
    if (claimed == 0 && a->parent_dirfd == m->origins.templates_dirfd) // used now: eviction goes by it
        (void)utimensat(a->parent_dirfd, a->name, NULL, 0);
    return claimed;
}

int origin_template(struct manager *m, const struct machine_parts *parts, bool (*stop)(void *), void *arg,
                    struct origin **ret, struct err *err)
{
    char key[DIGEST_TEXT_MAX];
    CLEANUP_JSON json_t *machine = machine_of(parts);
    if (!machine_key(machine, key))
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    struct origin *o = NULL;
    const struct ask ask = {.key = key, .parent_dirfd = m->origins.templates_dirfd, .name = template_name(key), .stop = stop,
                            .arg = arg};
    const int claimed = claim_untouched(m, &ask, &o, err);
    if (claimed == 0)
        *ret = o;
    if (claimed <= 0)
        return claimed == 0 ? 0 : strcmp(err->code, "cancelled") == 0 ? -1 : 1;
    struct err load_err = {0};
    unsigned mib;
    const bool room = load_take(m, &ask, "", &mib, &load_err) == 0;
    const int loaded = room ? template_load(m, key, o, &load_err) : -1;
    if (loaded == 0)
        conclude(m, o, NULL, true, true);
    budget_give(m, mib);
    if (loaded == 0) {
        *ret = o;
        return 0;
    }
    const bool keep = loaded == TEMPLATE_DAMAGED && template_needed(m, key);
    if (keep) {
        log_warn_limited("template %.20s: it is damaged, and needed: it is not made anew, and sandboxes boot", key);
        err_set(&load_err, ERR_UNAVAILABLE, "template_damaged", "the template is damaged");
    } else if (loaded > 0 && make_aside(m, parts, o, &load_err) == 0) {
        return 1;
    }
    const bool full = strcmp(load_err.code, "memory_budget") == 0;
    if (full)
        log_warn_limited("template %.20s: the memory budget has no room for it, and sandboxes boot", key);
    conclude(m, o, &load_err, !keep && !full, false); // the next one looks whether it was repaired, or there is room
    return 1;
}

// By its key alone. 0; TEMPLATE_MISSING; TEMPLATE_DAMAGED; -1.
static int load_base(struct manager *m, const char *key, struct origin **ret, struct err *err)
{
    struct origin *o = NULL;
    const struct ask ask = {.key = key, .parent_dirfd = m->origins.templates_dirfd, .name = template_name(key), .again = true};
    const int claimed = claim_untouched(m, &ask, &o, err);
    if (claimed < 0 || !o)
        return -1;
    unsigned mib = 0;
    int loaded = claimed == 0 ? 0 : load_take(m, &ask, "", &mib, err);
    if (claimed > 0 && loaded == 0)
        loaded = template_load(m, key, o, err);
    if (loaded > 0)
        err_set(err, ERR_NOT_FOUND, "template_missing", "the template that this was built on is not there");
    if (claimed > 0)
        conclude(m, o, loaded == 0 ? NULL : err, false, true);
    budget_give(m, mib);
    if (loaded == 0)
        *ret = o;
    return loaded;
}

int origin_base(struct manager *m, const char *key, const char *manifest, struct origin **ret, json_t *mismatches,
                struct err *err)
{
    struct origin *o = NULL;
    const int loaded = load_base(m, key, &o, err);
    *ret = NULL;
    if (loaded < 0)
        return -1;
    if (loaded > 0)
        memset(err, 0, sizeof *err);
    if (template_same(manifest, loaded == 0 ? o->template_manifest : loaded == TEMPLATE_MISSING ? "missing" : "damaged",
                      mismatches))
        *ret = o;
    else
        origin_unref(m, o);
    return 0;
}

// ---- snapshots --------------------------------------------------------------------------------------------------------
// What was loaded becomes the cache's entry.
static void take_over(struct origin *to, struct origin *from)
{
    to->ram_fd = fd_steal(&from->ram_fd);
    to->state_fd = fd_steal(&from->state_fd);
    to->disk_fd = fd_steal(&from->disk_fd);
    to->spool_dirfd = fd_steal(&from->spool_dirfd);
    to->commands = from->commands;
    to->runs = from->runs;
    to->ram_bytes = from->ram_bytes;
    to->signature = from->signature;
    to->base_signature = from->base_signature;
    snprintf(to->template_key, sizeof to->template_key, "%s", from->template_key);
    snprintf(to->template_manifest, sizeof to->template_manifest, "%s", from->template_manifest);
    from->commands = NULL;
    from->runs = (struct ram_runs){0};
}

int origin_snapshot(struct manager *m, const struct snapshot_row *row, struct origin **ret, struct err *err)
{
    struct err ignored = {0};
    struct origin *o = NULL, *made = NULL;
    const struct ask ask = {.key = row->id, .parent_dirfd = m->snapshots_dirfd, .name = row->id, .again = true};
    const int claimed = claim_untouched(m, &ask, &o, err);
    if (claimed == 0)
        *ret = o;
    if (claimed <= 0 || !o)
        return claimed;
    unsigned mib;
    int failed = load_take(m, &ask, row->template_key, &mib, err);
    if (!failed)
        failed = snapshot_origin_make(m, row, &made, err);
    if (!failed) {
        take_over(o, made);
        *ret = o;
        if (snapshot_deleted_meanwhile(m, row, &ignored))
            origin_forget(m, row->id);
    } else if (err->kind == ERR_SNAPSHOT_MISMATCH) {
        (void)snapshot_deleted_meanwhile(m, row, err);
    }
    origin_unref(m, made);
    conclude(m, o, failed ? err : NULL, false, !failed);
    budget_give(m, mib);
    origins_trim(m);
    return failed;
}
