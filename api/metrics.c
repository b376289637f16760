#include "api/metrics.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "api/spec.h"

// Upper bounds in microseconds; the last bucket is +Inf.
static const int64_t BOUNDS_US[] = {100, 250, 500, 1000, 2500, 5000, 10000, 50000, 100000, 500000, 1000000, 5000000,
                                    30000000};
#define BUCKETS (sizeof BOUNDS_US / sizeof *BOUNDS_US + 1)
static const int STATUSES[] = {200, 201, 202, 206, 401, 403, 404, 405, 409, 412, 413, 415, 416, 422, 429, 500,
                               501, 502, 503, 504, 0};
#define N_STATUSES (sizeof STATUSES / sizeof *STATUSES)

struct counters {
    atomic_ullong by_status[N_STATUSES];
    atomic_ullong buckets[BUCKETS];
    atomic_ullong sum_us;
} __attribute__((aligned(64)));

struct metrics {
    size_t n; // operations; counters[n] is for none
    struct counters counters[];
};

struct metrics *metrics_new(size_t n_operations)
{
    const size_t bytes = sizeof(struct metrics) + (n_operations + 1) * sizeof(struct counters);
    struct metrics *m = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!m)
        return NULL;
    m->n = n_operations;
    for (size_t i = 0; i <= n_operations; i++)
        m->counters[i] = (struct counters){0};
    return m;
}

void metrics_free(struct metrics *m)
{
    free(m);
}

static size_t status_index(int status)
{
    for (size_t i = 0; i < N_STATUSES; i++)
        if (STATUSES[i] == status)
            return i;
    return status_index(500);
}

void metrics_count(struct metrics *m, size_t index, int status, int64_t us)
{
    struct counters *c = &m->counters[index < m->n ? index : m->n];
    size_t bucket = 0;
    while (bucket < BUCKETS - 1 && us > BOUNDS_US[bucket])
        bucket++;
    atomic_fetch_add_explicit(&c->by_status[status_index(status)], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->buckets[bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->sum_us, us > 0 ? (unsigned long long)us : 0, memory_order_relaxed);
}

static unsigned long long get(const atomic_ullong *v)
{
    return atomic_load_explicit((atomic_ullong *)v, memory_order_relaxed);
}

static const char *name_of(const struct metrics *m, struct spec *spec, size_t i)
{
    return i < m->n ? spec_at(spec, i)->name : "none";
}

static void render_requests(const struct metrics *m, struct spec *spec, struct buf *out)
{
    buf_adds(out, "# HELP airlock_requests_total Requests by operation and status; status 0: the client left first.\n"
                  "# TYPE airlock_requests_total counter\n");
    for (size_t i = 0; i <= m->n; i++)
        for (size_t s = 0; s < N_STATUSES; s++) {
            const unsigned long long n = get(&m->counters[i].by_status[s]);
            if (n > 0)
                buf_addf(out, "airlock_requests_total{operation=\"%s\",status=\"%d\"} %llu\n", name_of(m, spec, i),
                         STATUSES[s], n);
        }
}

static void render_latency(const struct counters *c, const char *name, struct buf *out)
{
    unsigned long long sum = 0;
    for (size_t b = 0; b < BUCKETS; b++)
        sum += get(&c->buckets[b]);
    if (sum == 0)
        return;
    sum = 0;
    for (size_t b = 0; b < BUCKETS; b++) {
        sum += get(&c->buckets[b]);
        if (b < BUCKETS - 1)
            buf_addf(out, "airlock_request_seconds_bucket{operation=\"%s\",le=\"%g\"} %llu\n", name,
                     (double)BOUNDS_US[b] / 1e6, sum);
        else
            buf_addf(out, "airlock_request_seconds_bucket{operation=\"%s\",le=\"+Inf\"} %llu\n", name, sum);
    }
    buf_addf(out, "airlock_request_seconds_sum{operation=\"%s\"} %.6f\n", name, (double)get(&c->sum_us) / 1e6);
    buf_addf(out, "airlock_request_seconds_count{operation=\"%s\"} %llu\n", name, sum);
}

void metrics_render(const struct metrics *m, struct spec *spec, struct buf *out)
{
    render_requests(m, spec, out);
    buf_adds(out, "# HELP airlock_request_seconds Time from complete headers to the end of the answer.\n"
                  "# TYPE airlock_request_seconds histogram\n");
    for (size_t i = 0; i <= m->n; i++)
        render_latency(&m->counters[i], name_of(m, spec, i), out);
}
