// The registry of live sandboxes and the reference-counted views of them.
#include "sandbox/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// ---- views ----------------------------------------------------------------------------------------------------
struct sandbox_info *sandbox_info_ref(const struct sandbox_info *i)
{
    __atomic_add_fetch(&((struct sandbox_info *)i)->refs_, 1, __ATOMIC_RELAXED);
    return (struct sandbox_info *)i;
}

void sandbox_info_unref(const struct sandbox_info *borrowed)
{
    struct sandbox_info *i = (struct sandbox_info *)borrowed;
    if (!i || __atomic_sub_fetch(&i->refs_, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    if (i->cache && i->cache_free)
        i->cache_free(i->cache);
    sandbox_row_free(&i->row);
    free(i);
}

static struct sandbox_info *info_new(struct sandbox_row *row_stolen)
{
    struct sandbox_info *i = calloc(1, sizeof *i);
    if (!i)
        return NULL;
    i->refs_ = 1;
    i->row = *row_stolen;
    memset(row_stolen, 0, sizeof *row_stolen);
    return i;
}

struct sandbox_info *sandbox_view(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    struct sandbox_info *i = sandbox_info_ref(s->info);
    pthread_mutex_unlock(&s->lock);
    return i;
}

int sandbox_present_state(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    const int state = s->info->row.state;
    pthread_mutex_unlock(&s->lock);
    return state;
}

void sandbox_publish(struct sandbox *s, struct sandbox_row *row_stolen)
{
    struct sandbox_info *fresh = info_new(row_stolen);
    if (!fresh) { // the store has it; the memory view stays one generation behind
        log_error("sandbox %s: out of memory while publishing a change", s->id);
        sandbox_row_free(row_stolen);
        return;
    }
    pthread_mutex_lock(&s->lock);
    struct sandbox_info *old = s->info;
    s->info = fresh;
    pthread_mutex_unlock(&s->lock);
    sandbox_info_unref(old);
    hub_notify(s->m->hub, s->id);
}

// ---- sandboxes --------------------------------------------------------------------------------------------------
static int open_dir(int parent, const char *name, bool make)
{
    if (make && mkdirat(parent, name, 0700) != 0 && errno != EEXIST)
        return -1;
    return openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
}

static int open_dirs(struct sandbox *s, bool make, struct err *err)
{
    s->dirfd = open_dir(s->m->sandboxes_dirfd, s->id, make);
    s->out_dirfd = s->dirfd < 0 ? -1 : open_dir(s->dirfd, "out", make);
    s->log_dirfd = s->dirfd < 0 ? -1 : open_dir(s->dirfd, "log", make);
    s->run_dirfd = open_dir(s->m->run_dirfd, s->id, make);
    if (make && (s->dirfd < 0 || s->out_dirfd < 0 || s->log_dirfd < 0 || s->run_dirfd < 0)) {
        if (errno == ENOSPC)
            return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for another sandbox");
        return err_sys(err, errno, "making the directories of a sandbox");
    }
    return 0;
}

struct sandbox *sandbox_new(struct manager *m, struct sandbox_row *row_stolen, bool make, struct err *err)
{
    struct sandbox *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    s->m = m;
    s->refs = 1;
    s->dirfd = s->out_dirfd = s->log_dirfd = s->run_dirfd = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->commands_gone, NULL);
    snprintf(s->id, sizeof s->id, "%s", row_stolen->id);
    snprintf(s->tenant, sizeof s->tenant, "%s", row_stolen->tenant);
    s->info = info_new(row_stolen);
    if (!s->info || open_dirs(s, make, err) != 0) {
        if (!s->info)
            err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        sandbox_unref(s);
        return NULL;
    }
    if (s->log_dirfd >= 0)
        s->log = logfile_open(s->log_dirfd, NULL); // without it, log lines are dropped and counted
    return s;
}

struct sandbox *sandbox_ref(struct sandbox *s)
{
    atomic_fetch_add(&s->refs, 1);
    return s;
}

void sandbox_unref(struct sandbox *s)
{
    if (!s || atomic_fetch_sub(&s->refs, 1) > 1)
        return;
    origin_map_unref(s->m, s->origin);
    sandbox_info_unref(s->info);
    logfile_close(s->log);
    fd_close(&s->out_dirfd);
    fd_close(&s->log_dirfd);
    fd_close(&s->run_dirfd);
    fd_close(&s->dirfd);
    pthread_cond_destroy(&s->commands_gone);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

#define ADMISSION_MS 1000 // an admitted sandbox is here by then

static unsigned bucket_of(const char *id)
{
    uint32_t h = 2166136261u;
    for (; *id; id++)
        h = (h ^ (uint8_t)*id) * 16777619u;
    return h % REGISTRY_BUCKETS;
}

void registry_add(struct manager *m, struct sandbox *s)
{
    pthread_mutex_lock(&m->lock);
    struct sandbox **head = &m->buckets[bucket_of(s->id)];
    s->hash_next = *head;
    *head = sandbox_ref(s);
    m->n_live++;
    pthread_mutex_unlock(&m->lock);
}

void registry_remove(struct manager *m, struct sandbox *s)
{
    bool found = false;
    pthread_mutex_lock(&m->lock);
    for (struct sandbox **at = &m->buckets[bucket_of(s->id)]; *at; at = &(*at)->hash_next)
        if (*at == s) {
            *at = s->hash_next;
            m->n_live--;
            found = true;
            break;
        }
    pthread_mutex_unlock(&m->lock);
    if (found)
        sandbox_unref(s);
}

struct err not_found_error(void)
{
    struct err e = {0};
    err_set(&e, ERR_NOT_FOUND, "not_found", "no such object");
    return e;
}

static struct sandbox *find_now(struct manager *m, const char *tenant, const char *id)
{
    struct sandbox *found = NULL;
    pthread_mutex_lock(&m->lock);
    for (struct sandbox *s = m->buckets[bucket_of(id)]; s; s = s->hash_next)
        if (strcmp(s->id, id) == 0 && (!tenant || strcmp(s->tenant, tenant) == 0)) {
            found = sandbox_ref(s);
            break;
        }
    pthread_mutex_unlock(&m->lock);
    return found;
}

// Its row can be read before it is here: between the commit of its admission and registry_add there are its directories.
// Only new rows are waited for: one that could not be taken over at a start must not hold up those who ask.
static bool is_new_row(struct manager *m, const char *tenant, const char *id)
{
    struct err err = {0};
    struct sandbox_row row = {0};
    if (sandbox_get(m->store, tenant, id, &row, &err) != 0)
        return false;
    const bool is_new = row.state == SANDBOX_STARTING && clock_wall_ms() - row.created_at_ms < 10 * ADMISSION_MS;
    sandbox_row_free(&row);
    return is_new;
}

struct sandbox *registry_find(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    struct sandbox *found = find_now(m, tenant, id);
    const int64_t until = clock_mono_ms() + ADMISSION_MS;
    while (!found && tenant && is_new_row(m, tenant, id) && clock_mono_ms() < until) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        found = find_now(m, tenant, id);
    }
    if (!found && err)
        *err = not_found_error();
    return found;
}

struct sandbox **registry_all(struct manager *m, size_t *ret_n)
{
    *ret_n = 0;
    pthread_mutex_lock(&m->lock);
    struct sandbox **all = calloc(m->n_live + 1, sizeof *all);
    for (unsigned b = 0; all && b < REGISTRY_BUCKETS; b++)
        for (struct sandbox *s = m->buckets[b]; s; s = s->hash_next)
            all[(*ret_n)++] = sandbox_ref(s);
    pthread_mutex_unlock(&m->lock);
    return all;
}

// ---- what api reads -----------------------------------------------------------------------------------------------
struct sandbox_info *manager_get(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    struct sandbox *s = find_now(m, tenant, id);
    if (s) {
        struct sandbox_info *i = sandbox_view(s);
        sandbox_unref(s);
        return i;
    }
    struct sandbox_row row = {0};
    const int found = sandbox_get(m->store, tenant, id, &row, err);
    if (found != 0) {
        if (found > 0)
            *err = not_found_error();
        return NULL;
    }
    struct sandbox_info *i = info_new(&row);
    if (!i) {
        sandbox_row_free(&row);
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    }
    return i;
}

struct list_ctx {
    bool (*fn)(void *arg, const struct sandbox_info *i);
    void *arg;
};

static bool list_one(void *arg, const struct sandbox_row *row)
{
    const struct list_ctx *ctx = arg;
    const struct sandbox_info view = {.row = *row, .refs_ = 1};
    return ctx->fn(ctx->arg, &view);
}

int manager_list(struct manager *m, const struct sandbox_filter *filter,
                 bool (*fn)(void *arg, const struct sandbox_info *i), void *arg, struct err *err)
{
    struct list_ctx ctx = {fn, arg};
    return sandbox_list(m->store, filter, list_one, &ctx, err);
}

int sandbox_require_running(struct sandbox *s, struct err *err)
{
    const struct sandbox_row *row = &s->info->row;
    if (row->state == SANDBOX_DESTROYED || s->delete_wanted) {
        err_set(err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is destroyed");
        return err_remedy(err, "create a new sandbox");
    }
    if (row->state != SANDBOX_RUNNING) {
        err_set(err, ERR_CONFLICT, "sandbox_not_running", "the sandbox is %s, not running",
                sandbox_state_name(row->state));
        return err_remedy(err, "%s", row->state == SANDBOX_STOPPED ? "start it first" : "wait until it is running");
    }
    if (!s->session && s->adopting)
        return err_set(err, ERR_UNAVAILABLE, "adopting", "the sandbox is being taken over after a restart of the server");
    if (!s->vm || !s->session) {
        err_set(err, ERR_TRANSPORT_FAILED, "agent_unreachable", "the sandbox's agent does not answer");
        return err_remedy(err, "try again; stop or delete the sandbox if it stays so");
    }
    return 0;
}
