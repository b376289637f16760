// What sandboxes' memory really costs, read from /proc; and the gauges about it.
#include <stdlib.h>

#include "sandbox/internal.h"

// The VM stays while its sandbox's lock is held for the two numbers; /proc is read after it.
static bool vm_ids(struct sandbox *s, pid_t *pid, pid_t *outer, uint64_t *bytes, unsigned *worst)
{
    pthread_mutex_lock(&s->lock);
    const bool there = s->vm != NULL;
    if (there) {
        *pid = vm_pid(s->vm);
        *outer = vm_outer_pid(s->vm);
    }
    *bytes = (uint64_t)s->info->row.memory_mib << 20;
    *worst = s->reserved_mib;
    pthread_mutex_unlock(&s->lock);
    return there;
}

json_t *manager_memory(struct manager *m, const char *tenant, const char *id)
{
    pid_t pid, outer;
    uint64_t bytes;
    unsigned worst;
    struct ram_cost c = {0};
    struct sandbox *s = registry_find(m, tenant, id, NULL);
    const bool there = s && vm_ids(s, &pid, &outer, &bytes, &worst) && ram_cost_read(pid, outer, bytes, &c) == 0;
    sandbox_unref(s);
    if (!there)
        return NULL;
    json_t *o = json_object();
    json_put_int(o, "unique_bytes", (int64_t)c.unique_bytes);
    json_put_int(o, "shared_bytes", (int64_t)c.shared_bytes);
    json_put_int(o, "vmm_bytes", (int64_t)c.vmm_bytes);
    json_put_int(o, "worst_case_bytes", (int64_t)worst << 20);
    return o;
}

static void add(struct sandbox *s, struct ram_cost *sum)
{
    pid_t pid, outer;
    uint64_t bytes;
    unsigned worst;
    struct ram_cost c = {0};
    if (!vm_ids(s, &pid, &outer, &bytes, &worst) || ram_cost_read(pid, outer, bytes, &c) != 0)
        return;
    sum->unique_bytes += c.unique_bytes;
    sum->shared_bytes += c.shared_bytes;
    sum->vmm_bytes += c.vmm_bytes;
}

void memory_gauges(struct manager *m, json_t *g)
{
    struct ram_cost sum = {0};
    size_t n;
    struct sandbox **all = registry_all(m, &n);
    for (size_t i = 0; all && i < n; i++) {
        add(all[i], &sum);
        sandbox_unref(all[i]);
    }
    free(all);
    uint64_t held = 0, loaded = 0;
    pthread_mutex_lock(&m->origins.lock);
    for (const struct origin *o = m->origins.list; o; o = o->next)
        if (o->state == ORIGIN_READY) {
            held += o->held_bytes;
            loaded++;
        }
    held += m->origins.unlisted_bytes;
    const uint64_t made = m->origins.made, evicted = m->origins.evicted;
    pthread_mutex_unlock(&m->origins.lock);
    unsigned ready, parked, pool_mib;
    pool_count(m, &ready, &parked, &pool_mib);
    pthread_mutex_lock(&m->pool.lock);
    const uint64_t hits = m->pool.hits, misses = m->pool.misses;
    pthread_mutex_unlock(&m->pool.lock);
    pthread_mutex_lock(&m->lock);
    const uint64_t committed = m->committed_mib + m->pooled_mib;
    pthread_mutex_unlock(&m->lock);
    json_put_int(g, "airlock_memory_unique_bytes", (int64_t)sum.unique_bytes);
    json_put_int(g, "airlock_memory_shared_bytes", (int64_t)sum.shared_bytes);
    json_put_int(g, "airlock_memory_vmm_bytes", (int64_t)sum.vmm_bytes);
    json_put_int(g, "airlock_memory_templates_bytes", (int64_t)held);
    json_put_int(g, "airlock_memory_committed_bytes", (int64_t)(committed << 20));
    json_put_int(g, "airlock_memory_budget_bytes", (int64_t)(budget_mib(m) << 20));
    json_put_int(g, "airlock_templates_loaded", (int64_t)loaded);
    json_put_int(g, "airlock_templates_made_total", (int64_t)made);
    json_put_int(g, "airlock_templates_evicted_total", (int64_t)evicted);
    json_put_int(g, "airlock_pool_ready", ready);
    json_put_int(g, "airlock_pool_parked", parked);
    json_put_int(g, "airlock_pool_hits_total", (int64_t)hits);
    json_put_int(g, "airlock_pool_misses_total", (int64_t)misses);
}
