// The api as a whole: made, stopped, freed; equality of specification and handlers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "api/call.h"
#include "api/metrics.h"
#include "api/principal.h"
#include "base/clock.h"
#include "base/enc.h"
#include "base/log.h"

// More waiting work than connections could ask for: submitting fails only while the pool ends.
#define POOL_QUEUE 65536
#define COMPAT_QUEUE 16 // each may be gigabytes to read: who comes later asks again
#define FREE_WAIT_MS 10000

static const struct handler *const TABLES[] = {SANDBOX_HANDLERS, SNAPSHOT_HANDLERS, COMMAND_HANDLERS, SIGNAL_HANDLERS, STDIN_HANDLERS, FILE_HANDLERS, TRANSFER_HANDLERS, LOG_HANDLERS,
                                               TOKEN_HANDLERS,   EVIDENCE_HANDLERS, META_HANDLERS};

static int bind_handler(struct spec *spec, const struct handler *h, struct err *err)
{
    for (size_t i = 0; i < spec_count(spec); i++) {
        struct operation *op = spec_at(spec, i);
        if (strcmp(op->name, h->operation) != 0)
            continue;
        if (op->handler)
            return err_set(err, ERR_INTERNAL, "spec", "the operation %s has two handlers", op->name);
        op->handler = h;
        return 0;
    }
    return err_set(err, ERR_INTERNAL, "spec", "the handler %s has no operation in the specification", h->operation);
}

static int bind_handlers(struct spec *spec, struct err *err)
{
    for (size_t t = 0; t < sizeof TABLES / sizeof *TABLES; t++)
        for (const struct handler *h = TABLES[t]; h->operation; h++)
            if (bind_handler(spec, h, err) != 0)
                return -1;
    for (size_t i = 0; i < spec_count(spec); i++)
        if (!spec_at(spec, i)->handler)
            return err_set(err, ERR_INTERNAL, "spec", "the operation %s has no handler", spec_at(spec, i)->name);
    return 0;
}

static void release(struct api *a)
{
    work_pool_free(a->compat);
    work_pool_free(a->pool);
    timers_free(a->timers);
    idem_free(a->idem);
    principals_free(a->principals);
    metrics_free(a->metrics);
    spec_free(a->spec);
    pthread_mutex_destroy(&a->streams_lock);
    free(a);
}

struct api *api_new(const struct api_options *options, struct err *err)
{
    struct api *a = calloc(1, sizeof *a);
    if (!a) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    a->o = *options;
    a->manager = options->manager;
    a->store = options->store;
    a->hub = manager_hub(options->manager);
    pthread_mutex_init(&a->streams_lock, NULL);
    a->spec = spec_load(options->spec_json, options->spec_len, err);
    if (!a->spec || bind_handlers(a->spec, err) != 0) {
        release(a);
        return NULL;
    }
    enc_random_base62(a->boot, 8);
    a->metrics = metrics_new(spec_count(a->spec));
    a->principals = principals_new(a->store);
    a->idem = idem_new();
    a->timers = timers_new(err);
    a->pool = a->timers ? work_pool_new("api", options->workers ? options->workers : 4, POOL_QUEUE, err) : NULL;
    a->compat = a->pool ? work_pool_new("compat", 1, COMPAT_QUEUE, err) : NULL;
    if (a->metrics && a->principals && a->idem && a->compat) {
        work_pool_warm(a->pool, store_warm, a->store);
        return a;
    }
    if (err && err->kind == ERR_NONE)
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    release(a);
    return NULL;
}

void api_stop(struct api *a)
{
    atomic_store(&a->stopping, true);
    streams_end(a, NULL);
}

// Work under way may hold calls for a moment longer than the adapter: waits for it, bounded.
void api_free(struct api *a)
{
    if (!a)
        return;
    atomic_store(&a->stopping, true);
    const int64_t deadline = clock_mono_ms() + FREE_WAIT_MS;
    while (atomic_load(&a->calls) > 0 && clock_mono_ms() < deadline)
        nanosleep(&(struct timespec){0, 2000000}, NULL);
    if (atomic_load(&a->calls) > 0) { // the process ends anyway
        log_warn("api: %u calls were not ended; their memory is left alone", atomic_load(&a->calls));
        return;
    }
    release(a);
}
