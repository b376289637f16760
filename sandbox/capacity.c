// What a host can give: the accelerator, host uids for jails, and memory.
#include <stdio.h>
#include <string.h>

#include "sandbox/internal.h"

// ---- accelerator ------------------------------------------------------------------------------------------------
int accel_choose(struct manager *m, const char *require, enum vm_accel *ret, struct err *err)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LIMIT_PROBE_MS / 1000 + 5;
    pthread_mutex_lock(&m->accel_lock);
    int waited = 0;
    while (m->accel_known == ACCEL_UNKNOWN && waited == 0 && !atomic_load(&m->probe_cancelled))
        waited = pthread_cond_timedwait(&m->accel_cond, &m->accel_lock, &until);
    const bool known = m->accel_known == ACCEL_KNOWN, kvm = m->kvm_usable;
    char reason[sizeof m->accel_reason];
    snprintf(reason, sizeof reason, "%s", m->accel_reason);
    pthread_mutex_unlock(&m->accel_lock);
    if (!known && atomic_load(&m->probe_cancelled))
        return err_set(err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
    if (!known)
        return err_set(err, ERR_UNAVAILABLE, "accel_unknown", "the accelerator is still being probed");
    const bool tcg_allowed = m->o.accel == ACCEL_TCG_ONLY || (m->o.accel == ACCEL_AUTO && m->o.allow_emulation);
    const bool want_kvm = require && strcmp(require, "kvm") == 0, want_tcg = require && strcmp(require, "tcg") == 0;
    if (kvm && m->o.accel != ACCEL_TCG_ONLY && !want_tcg)
        *ret = VM_ACCEL_KVM;
    else if (tcg_allowed && !want_kvm)
        *ret = VM_ACCEL_TCG;
    else if (want_tcg) {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "tcg", "emulation is not allowed on this server");
        return err_remedy(err, "start the server with --allow-emulation, or do not require tcg");
    } else {
        err_set(err, ERR_UNSUPPORTED_CAPABILITY, "kvm", "KVM cannot be used here: %s", reason);
        return err_remedy(err, want_kvm && tcg_allowed
                                   ? "leave out require.accel to accept emulation, which is no security boundary"
                                   : "start the server with --allow-emulation to accept emulation, which is no "
                                     "security boundary");
    }
    return 0;
}

int accel_again(struct manager *m, const struct sandbox_row *row, enum vm_accel *ret, struct err *err)
{
    CLEANUP_JSON json_t *backend = row->backend_json ? json_loads(row->backend_json, 0, NULL) : NULL;
    return accel_choose(m, json_get_str(backend, "accel"), ret, err);
}

int manager_uid_take(struct manager *m, unsigned *ret_uid, struct err *err)
{
    *ret_uid = 0;
    if (!m->host.is_root || m->o.uid_count == 0)
        return 0;
    pthread_mutex_lock(&m->lock);
    unsigned i = 0;
    while (i < m->o.uid_count && m->uids[i])
        i++;
    if (i < m->o.uid_count) {
        m->uids[i] = 1;
        *ret_uid = m->o.uid_base + i;
    }
    pthread_mutex_unlock(&m->lock);
    if (*ret_uid == 0)
        return err_set(err, ERR_UNAVAILABLE, "uids_exhausted", "no host uid is left for another jail");
    return 0;
}

void manager_uid_give(struct manager *m, unsigned uid)
{
    pthread_mutex_lock(&m->lock);
    if (uid >= m->o.uid_base && uid < m->o.uid_base + m->o.uid_count && m->uids[uid - m->o.uid_base] > 0)
        m->uids[uid - m->o.uid_base]--;
    pthread_mutex_unlock(&m->lock);
}

void sandbox_uid_release(struct sandbox *s)
{
    manager_uid_give(s->m, s->vm_uid);
    s->vm_uid = 0;
    budget_give(s->m, s->reserved_mib);
    s->reserved_mib = 0;
}

// ---- memory -----------------------------------------------------------------------------------------------------
unsigned budget_need(enum vm_accel accel, int memory_mib)
{
    return (unsigned)(memory_mib + vm_overhead_mib(accel));
}

uint64_t budget_mib(const struct manager *m)
{
    return m->o.memory_budget_mib > 0 ? (uint64_t)m->o.memory_budget_mib : (uint64_t)m->host.memory_mib * 9 / 10;
}

// What templates and loaded snapshots hold: each once, however many share it. In use: by sandboxes, now.
static uint64_t shared_mib(struct manager *m, bool in_use)
{
    uint64_t bytes = 0;
    pthread_mutex_lock(&m->origins.lock);
    for (const struct origin *o = m->origins.list; o; o = o->next)
        if (o->state == ORIGIN_READY && (!in_use || o->refs > 1 + o->pool_refs))
            bytes += o->held_bytes;
    bytes += m->origins.unlisted_bytes;
    pthread_mutex_unlock(&m->origins.lock);
    return bytes >> 20;
}

int budget_take(struct manager *m, unsigned mib, struct err *err)
{
    const uint64_t budget = budget_mib(m), shared = shared_mib(m, true);
    pthread_mutex_lock(&m->lock);
    const uint64_t used = m->committed_mib + shared;
    const bool fits = used + mib <= budget;
    if (fits)
        m->committed_mib += mib;
    pthread_mutex_unlock(&m->lock);
    if (fits)
        return 0;
    err_set(err, ERR_UNAVAILABLE, "memory_budget",
            "%u MiB at worst do not fit: %llu of %llu MiB are promised to sandboxes and the templates they use", mib,
            (unsigned long long)used, (unsigned long long)budget);
    if (mib > budget)
        return err_remedy(err, "ask for less: no more than %llu MiB are there for all sandboxes (guest memory and %d MiB each)",
                          (unsigned long long)budget, vm_overhead_mib(VM_ACCEL_TCG));
    return err_remedy(err, "end, stop or cool down sandboxes worth %llu MiB (guest memory and %d MiB each)",
                      (unsigned long long)(used + mib - budget), vm_overhead_mib(VM_ACCEL_TCG));
}

int64_t budget_left(struct manager *m)
{
    const uint64_t budget = budget_mib(m), shared = shared_mib(m, false);
    pthread_mutex_lock(&m->lock);
    const int64_t left = (int64_t)budget - (int64_t)(m->committed_mib + m->pooled_mib + shared);
    pthread_mutex_unlock(&m->lock);
    return left;
}

bool budget_pool_take(struct manager *m, unsigned mib)
{
    const uint64_t budget = budget_mib(m), shared = shared_mib(m, false);
    pthread_mutex_lock(&m->lock);
    const bool fits = m->committed_mib + m->pooled_mib + shared + mib <= budget;
    if (fits)
        m->pooled_mib += mib;
    pthread_mutex_unlock(&m->lock);
    return fits;
}

void budget_pool_give(struct manager *m, unsigned mib)
{
    pthread_mutex_lock(&m->lock);
    m->pooled_mib -= mib < m->pooled_mib ? mib : m->pooled_mib;
    pthread_mutex_unlock(&m->lock);
}

// Given back by budget_pool_give: like the pool, it is in no admission's way.
bool budget_build_take(struct manager *m, unsigned mib)
{
    const uint64_t budget = budget_mib(m), shared = shared_mib(m, true);
    pthread_mutex_lock(&m->lock);
    const bool may = m->committed_mib + shared + mib <= budget; // else nothing is given up in vain
    if (may)
        m->pooled_mib += mib;
    pthread_mutex_unlock(&m->lock);
    if (!may)
        return false;
    budget_make_room(m);
    if (budget_left(m) >= 0)
        return true;
    budget_pool_give(m, mib);
    return false;
}

void budget_make_room(struct manager *m)
{
    while (budget_left(m) < 0 && (pool_give_up(m) || origins_give_up(m)))
        ;
}

void budget_force(struct manager *m, unsigned mib)
{
    pthread_mutex_lock(&m->lock);
    m->committed_mib += mib;
    pthread_mutex_unlock(&m->lock);
}

void budget_give(struct manager *m, unsigned mib)
{
    pthread_mutex_lock(&m->lock);
    m->committed_mib -= mib < m->committed_mib ? mib : m->committed_mib;
    pthread_mutex_unlock(&m->lock);
}

int sandbox_budget_take(struct sandbox *s, enum vm_accel accel, int memory_mib, struct err *err)
{
    const unsigned need = budget_need(accel, memory_mib);
    if (s->reserved_mib == 0) { // not at its admission
        if (budget_take(s->m, need, err) != 0)
            return -1;
        s->reserved_mib = need;
    }
    budget_make_room(s->m);
    return 0;
}
