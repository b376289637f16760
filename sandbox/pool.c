#include "sandbox/pool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/disk.h"
#include "sandbox/internal.h"

#define RESTORE_MS 30000
#define READY_MS 60000
#define WARM_ROUNDS 4        // the second meets translated code, the third what ran only then
#define YIELD_MS 20          // a request launches something: look again after this
#define QUIET_LOOKS 50       // no launch and no command for so many of them: a second
#define YIELD_MOST_MS 5000   // … but a server that is never quiet fills its pool too
#define CLASSES_MAX 16
#define DEFAULT_VCPUS 1      // the wire contract's defaults
#define DEFAULT_MEMORY_MIB 256
#define DEFAULT_DISK_MIB 1024

struct pool_class {
    struct pool_class *next;
    char key[DIGEST_TEXT_MAX], image[DIGEST_TEXT_MAX];
    struct machine_parts parts;
    struct image_runtime runtime;
    struct origin *origin;     // reference; NULL: given up, until a create wants it again
    struct pool_entry *ready, *parked;
    unsigned n_ready, n_parked;
    int64_t used_ms, retry_ms;
};

int pool_open(struct manager *m, struct err *err)
{
    pthread_mutex_init(&m->pool.lock, NULL);
    (void)fd_remove_tree(m->o.state_dirfd, "pool", NULL); // disks of an earlier server's entries
    if (mkdirat(m->o.state_dirfd, "pool", 0700) != 0 && errno != EEXIST)
        return err_sys(err, errno, "making the pool's directory");
    m->pool.dirfd = openat(m->o.state_dirfd, "pool", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return m->pool.dirfd >= 0 ? 0 : err_sys(err, errno, "opening the pool's directory");
}

static bool enabled(const struct manager *m)
{
    return m->o.templates && (m->o.pool > 0 || m->o.pool_parked > 0);
}

// ---- classes ------------------------------------------------------------------------------------------------------
static struct pool_class *find_class(struct pool *p, const char *key)
{
    struct pool_class *c = p->classes;
    while (c && strcmp(c->key, key) != 0)
        c = c->next;
    return c;
}

void pool_want(struct manager *m, const struct machine_parts *parts, struct origin *o)
{
    struct pool *p = &m->pool;
    if (!enabled(m) || !*o->key)
        return;
    pthread_mutex_lock(&p->lock);
    struct pool_class *c = find_class(p, o->key);
    unsigned n = 0;
    for (const struct pool_class *one = p->classes; one; one = one->next)
        n++;
    if (!c && n < CLASSES_MAX && (c = calloc(1, sizeof *c))) {
        c->parts = *parts;
        c->runtime = *parts->runtime;
        snprintf(c->key, sizeof c->key, "%s", o->key);
        snprintf(c->image, sizeof c->image, "%s", parts->image_digest);
        c->parts.runtime = &c->runtime;
        c->parts.image_digest = c->image;
        c->next = p->classes;
        p->classes = c;
    }
    if (c) {
        c->origin = c->origin ? c->origin : origin_pool_ref(m, o);
        c->used_ms = clock_mono_ms();
    }
    pthread_mutex_unlock(&p->lock);
    pool_refill(m);
}

// ---- entries --------------------------------------------------------------------------------------------------------
void pool_entry_done(struct manager *m, struct pool_entry *e)
{
    (void)fd_remove_tree(m->pool.dirfd, e->name, NULL);
    (void)fd_remove_tree(m->run_dirfd, e->name, NULL);
    origin_pool_unref(m, e->origin);
    warm_free(&e->warm);
    free(e);
}

void pool_entry_end(struct manager *m, struct pool_entry *e)
{
    struct err err = {0};
    if (e->vm) {
        if (vm_end(e->vm, &err) != 0)
            log_error("pool: %s %s", err.detail, err.internal);
        vm_free(e->vm);
    }
    if (e->uid)
        manager_uid_give(m, e->uid);
    budget_pool_give(m, e->reserved_mib);
    pool_entry_done(m, e);
}

static void end_all(struct manager *m, struct pool_entry *list)
{
    while (list) {
        struct pool_entry *next = list->next;
        pool_entry_end(m, list);
        list = next;
    }
}

static int entry_launch(struct manager *m, struct pool_class *c, struct pool_entry *e, struct err *err)
{
    const unsigned need = budget_need(c->parts.accel, c->parts.memory_mib);
    if (mkdirat(m->pool.dirfd, e->name, 0700) != 0 || mkdirat(m->run_dirfd, e->name, 0700) != 0)
        return err_sys(err, errno, "making a pooled sandbox");
    CLEANUP_FD int dir = openat(m->pool.dirfd, e->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CLEANUP_FD int run = openat(m->run_dirfd, e->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0 || run < 0)
        return err_sys(err, errno, "opening a pooled sandbox");
    if (!budget_pool_take(m, need))
        return err_set(err, ERR_UNAVAILABLE, "memory_budget", "there is no memory for it");
    e->reserved_mib = need;
    CLEANUP_FD int root = images_open_blob(m->images, c->image, err);
    if (root < 0 || disk_copy(e->origin->disk_fd, dir, err) != 0 || manager_uid_take(m, &e->uid, err) != 0)
        return -1;
    CLEANUP_FD int disk = disk_open(dir, err);
    if (disk < 0)
        return -1;
    const struct vm_spec spec = {.id = e->name, .accel = c->parts.accel, .qemu_path = m->o.qemu_path,
                                 .vcpus = c->parts.vcpus, .memory_mib = c->parts.memory_mib, .tsc_khz = m->host.tsc_khz,
                                 .kernel_fd = -1, .initrd_fd = -1, .root_fd = root, .disk_fd = disk,
                                 .ram_fd = e->origin->ram_fd, .incoming = true, .background = true, .run_dirfd = run,
                                 .jail_uid = e->uid,
                                 .cgroup_parent = m->o.cgroup_parent};
    e->vm = vm_launch(&spec, m->loop, &WARM_CALLBACKS, &e->warm, err);
    if (!e->vm)
        return -1;
    pthread_mutex_lock(&m->pool.lock);
    m->pool.making = e; // from here on it can be ended by others
    pthread_mutex_unlock(&m->pool.lock);
    return manager_stopping(m) ? err_set(err, ERR_UNAVAILABLE, "stopping", "the server stops") : 0;
}

static int entry_restore(struct manager *m, struct pool_entry *e, struct err *err)
{
    CLEANUP_FD int state = origin_state_open(e->origin, err);
    (void)m;
    if (state < 0 || vm_restore(e->vm, state, RESTORE_MS, err) != 0)
        return -1;
    // Its identity is renewed when it is taken; done once before, that meets translated code as well.
    uint8_t seed[MSG_SEED_BYTES];
    struct vm_refreshed r = {0};
    const struct vm_identity id = {.seed = seed, .clock = true, .hostname = e->name, .machine_id = WARM_MACHINE_ID,
                                   .boot_id = WARM_BOOT_ID};
    if (crypto_random(seed, sizeof seed) != 0 ||
        vm_resume_as(e->vm, &id, clock_mono_ms() + READY_MS, WARM_REFRESH_MS, &r, err) != 0)
        return -1;
    if (warm_up(&e->warm, e->vm, WARM_ROUNDS, err) != 0)
        return -1;
    e->restored = true;
    return 0;
}

// Under the lock.
static void keep(struct pool *p, struct pool_class *c, struct pool_entry *e)
{
    struct pool_entry **list = e->restored ? &c->ready : &c->parked;
    while (*list) // used in the order in which they were made
        list = &(*list)->next;
    *list = e;
    c->n_ready += e->restored;
    c->n_parked += !e->restored;
    p->made++;
}

static bool entry_make(struct manager *m, struct pool_class *c, bool restore, struct err *err)
{
    struct pool *p = &m->pool;
    struct pool_entry *e = calloc(1, sizeof *e);
    if (!e) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return false;
    }
    warm_init(&e->warm);
    id_new(ID_SANDBOX, e->name);
    e->class = c;
    pthread_mutex_lock(&p->lock);
    e->origin = c->origin ? origin_pool_ref(m, c->origin) : NULL;
    pthread_mutex_unlock(&p->lock);
    bool made = e->origin && entry_launch(m, c, e, err) == 0 && (!restore || entry_restore(m, e, err) == 0);
    pthread_mutex_lock(&p->lock);
    p->making = NULL;
    if (e->unwanted)
        made = err_set(err, ERR_UNAVAILABLE, "memory_budget", "its memory is needed") == 0;
    if (made)
        keep(p, c, e);
    pthread_mutex_unlock(&p->lock);
    if (!made)
        pool_entry_end(m, e);
    return made;
}

// All of a template that was touched, lost or made anew meanwhile: what continues from it could not be saved.
static void forget(struct manager *m, const char *key)
{
    struct pool_entry *dead = NULL;
    struct origin *o = NULL;
    pthread_mutex_lock(&m->pool.lock);
    struct pool_class *c = find_class(&m->pool, key);
    for (struct pool_entry **list = c ? &c->ready : NULL; list; list = list == &c->ready ? &c->parked : NULL)
        while (*list) {
            struct pool_entry *e = *list;
            *list = e->next;
            e->next = dead;
            dead = e;
        }
    if (c) {
        c->n_ready = c->n_parked = 0;
        o = c->origin;
        c->origin = NULL;
    }
    pthread_mutex_unlock(&m->pool.lock);
    end_all(m, dead);
    origin_pool_unref(m, o);
}

struct pool_entry *pool_take(struct manager *m, const char *key)
{
    struct pool *p = &m->pool;
    struct pool_entry *e = NULL, *dead = NULL;
    if (!enabled(m))
        return NULL;
    pthread_mutex_lock(&p->lock);
    struct pool_class *c = find_class(p, key);
    while (c && !e && (c->ready || c->parked)) {
        struct pool_entry **list = c->ready ? &c->ready : &c->parked;
        unsigned *n = c->ready ? &c->n_ready : &c->n_parked;
        e = *list;
        *list = e->next;
        --*n;
        if (warm_gone(&e->warm)) {
            e->next = dead;
            dead = e;
            e = NULL;
        }
    }
    if (c)
        c->used_ms = clock_mono_ms();
    p->hits += e != NULL;
    p->misses += e == NULL;
    pthread_mutex_unlock(&p->lock);
    end_all(m, dead);
    if (!e || origin_current(m, key, e->origin->template_manifest))
        return e;
    log_warn("pool: template %.20s is not as it was: what was made of it is given up", key);
    pool_entry_end(m, e);
    forget(m, key);
    return NULL;
}

// ---- giving up ------------------------------------------------------------------------------------------------------
static unsigned n_of(const struct pool_class *c)
{
    return c->n_ready + c->n_parked;
}

bool pool_give_up(struct manager *m)
{
    struct pool *p = &m->pool;
    struct pool_class *c = NULL;
    struct pool_entry *e = NULL;
    struct origin *o = NULL;
    pthread_mutex_lock(&p->lock);
    for (struct pool_class *one = p->classes; one; one = one->next)
        if ((one->origin || n_of(one) > 0) && (!c || one->used_ms < c->used_ms))
            c = one;
    if (c && n_of(c) > 0) {
        struct pool_entry **list = c->parked ? &c->parked : &c->ready;
        *(c->parked ? &c->n_parked : &c->n_ready) -= 1;
        e = *list;
        *list = e->next;
    } else if (c) {
        o = c->origin;
        c->origin = NULL;
    }
    const bool unwanted = !c && p->making && !p->making->unwanted;
    if (unwanted) {
        p->making->unwanted = true;
        vm_kill(p->making->vm); // its maker ends it
    }
    pthread_mutex_unlock(&p->lock);
    if (e) {
        log_info("pool: one is given up: its memory is needed");
        pool_entry_end(m, e);
    }
    origin_pool_unref(m, o);
    return c || unwanted;
}

// Those whose QEMU ended: they count for nothing.
static void reap(struct manager *m)
{
    struct pool_entry *dead = NULL;
    pthread_mutex_lock(&m->pool.lock);
    for (struct pool_class *c = m->pool.classes; c; c = c->next)
        for (struct pool_entry **at = &c->ready, **list = at; list; list = list == &c->ready ? &c->parked : NULL, at = list)
            while (*at) {
                struct pool_entry *e = *at;
                if (!warm_gone(&e->warm)) {
                    at = &e->next;
                    continue;
                }
                *at = e->next;
                *(e->restored ? &c->n_ready : &c->n_parked) -= 1;
                e->next = dead;
                dead = e;
            }
    pthread_mutex_unlock(&m->pool.lock);
    if (dead)
        log_warn_limited("pool: a VM ended by itself; it is replaced");
    end_all(m, dead);
}

// ---- filling --------------------------------------------------------------------------------------------------------
void pool_count(struct manager *m, unsigned *ret_ready, unsigned *ret_parked, unsigned *ret_mib)
{
    *ret_ready = *ret_parked = *ret_mib = 0;
    pthread_mutex_lock(&m->pool.lock);
    for (const struct pool_class *c = m->pool.classes; c; c = c->next) {
        *ret_ready += c->n_ready;
        *ret_parked += c->n_parked;
        *ret_mib += (c->n_ready + c->n_parked) * budget_need(c->parts.accel, c->parts.memory_mib);
    }
    pthread_mutex_unlock(&m->pool.lock);
}

// The class used last that lacks something; what it lacks in *ret_restore. NULL: all is full, or the ceiling is reached.
static struct pool_class *lacking(struct manager *m, bool *ret_restore)
{
    struct pool_class *best = NULL;
    unsigned ready, parked, mib;
    pool_count(m, &ready, &parked, &mib);
    const int64_t left = budget_left(m);
    pthread_mutex_lock(&m->pool.lock);
    for (struct pool_class *c = m->pool.classes; c; c = c->next) {
        const bool lacks = c->n_ready < m->o.pool || c->n_parked < m->o.pool_parked;
        const unsigned need = budget_need(c->parts.accel, c->parts.memory_mib);
        const bool fits = mib + need <= (unsigned)m->o.pool_memory_mib && need <= left;
        if (c->origin && lacks && fits && clock_mono_ms() >= c->retry_ms && (!best || c->used_ms > best->used_ms))
            best = c;
    }
    if (best)
        *ret_restore = best->n_ready < m->o.pool;
    pthread_mutex_unlock(&m->pool.lock);
    return best;
}

static bool busy(struct manager *m)
{
    pthread_mutex_lock(&m->lock);
    const bool launching = m->launches > 0;
    pthread_mutex_unlock(&m->lock);
    return launching;
}

static void yield_to_requests(struct manager *m)
{
    const struct timespec pause = {.tv_nsec = YIELD_MS * 1000000l};
    unsigned long long before = atomic_load(&m->commands_run), now;
    int quiet = 0;
    for (int64_t until = clock_mono_ms() + YIELD_MOST_MS; quiet < QUIET_LOOKS && clock_mono_ms() < until; before = now) {
        nanosleep(&pause, NULL); // who launches and runs is another's business: nobody is there to wake us
        now = atomic_load(&m->commands_run);
        quiet = busy(m) || now != before ? 0 : quiet + 1;
        if (manager_stopping(m))
            return;
    }
}

static void fill_work(void *arg)
{
    struct manager *m = arg;
    bool restore = true;
    for (struct pool_class *c; !manager_stopping(m) && (c = lacking(m, &restore));) {
        struct err err = {0};
        yield_to_requests(m);
        if (manager_stopping(m) || entry_make(m, c, restore, &err))
            continue;
        log_warn_limited("pool: a sandbox could not be made ahead: %s (%s) %s", err.detail, err.code, err.internal);
        pthread_mutex_lock(&m->pool.lock);
        m->pool.failed++;
        c->retry_ms = clock_mono_ms() + 5000;
        pthread_mutex_unlock(&m->pool.lock);
    }
    pthread_mutex_lock(&m->pool.lock);
    m->pool.filling = false;
    pthread_mutex_unlock(&m->pool.lock);
    atomic_fetch_sub(&m->active, 1);
}

void pool_refill(struct manager *m)
{
    bool restore, go;
    if (!enabled(m) || manager_stopping(m))
        return;
    reap(m);
    if (!lacking(m, &restore))
        return;
    pthread_mutex_lock(&m->pool.lock);
    go = !m->pool.filling;
    m->pool.filling = true;
    pthread_mutex_unlock(&m->pool.lock);
    if (!go)
        return;
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, fill_work, m) == 0)
        return;
    atomic_fetch_sub(&m->active, 1);
    pthread_mutex_lock(&m->pool.lock);
    m->pool.filling = false;
    pthread_mutex_unlock(&m->pool.lock);
}

void pool_end(struct manager *m)
{
    struct pool_entry *all = NULL;
    pthread_mutex_lock(&m->pool.lock);
    for (struct pool_class *c = m->pool.classes; c; c = c->next)
        for (struct pool_entry **list = &c->ready; list; list = list == &c->ready ? &c->parked : NULL)
            while (*list) {
                struct pool_entry *e = *list;
                *list = e->next;
                e->next = all;
                all = e;
            }
    if (m->pool.making)
        vm_kill(m->pool.making->vm); // its maker ends it
    pthread_mutex_unlock(&m->pool.lock);
    end_all(m, all);
}

// ---- at start ---------------------------------------------------------------------------------------------------------
static bool take_digest(void *arg, const struct image_ref *i)
{
    char *digest = arg;
    if (!*digest || strcmp(i->name, "debian") == 0)
        snprintf(digest, DIGEST_TEXT_MAX, "%s", i->digest);
    return true;
}

static void begin_work(void *arg)
{
    struct manager *m = arg;
    struct err err = {0};
    struct image_runtime runtime;
    char digest[DIGEST_TEXT_MAX] = "";
    enum vm_accel accel;
    struct origin *o = NULL;
    if (accel_choose(m, NULL, &accel, &err) == 0 && images_runtime(m->images, &runtime, &err) == 0 &&
        images_each(m->images, take_digest, digest, &err) == 0 && *digest) {
        const struct machine_parts parts = {.image_digest = digest, .qemu_digest = m->host.qemu_sha256,
                                            .qemu_version = m->host.qemu_version, .runtime = &runtime, .accel = accel,
                                            .vcpus = DEFAULT_VCPUS, .memory_mib = DEFAULT_MEMORY_MIB,
                                            .disk_mib = DEFAULT_DISK_MIB, .tsc_khz = m->host.tsc_khz,
                                            .host_cpu = m->host.cpu_sha256};
        int got = origin_template(m, &parts, NULL, NULL, &o, &err);
        if (got == 1) // being made now: wait for it
            got = origin_template(m, &parts, NULL, NULL, &o, &err);
        if (got == 0)
            pool_want(m, &parts, o);
        origin_unref(m, o);
    }
    atomic_fetch_sub(&m->active, 1);
}

void pool_begin(struct manager *m)
{
    if (!enabled(m))
        return;
    atomic_fetch_add(&m->active, 1);
    if (work_submit(m->ops, begin_work, m) != 0)
        atomic_fetch_sub(&m->active, 1);
}
