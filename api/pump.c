#include "api/pump.h"

#include <stdlib.h>

static void run(void *arg);

// signals counts what came since the last step ended; only the one that makes it 1 starts a run.
void pump_signal(struct pump *p)
{
    if (atomic_fetch_add(&p->signals, 1) > 0)
        return;
    if (work_submit(p->c->a->pool, run, p) != 0)
        atomic_store(&p->signals, 0); // the pool ends only after every call has
}

static void on_news(void *arg)
{
    pump_signal(arg);
}

void pump_after(struct pump *p, int64_t delay_ms)
{
    (void)timers_add(p->c->a->timers, &p->timer, delay_ms, on_news, p);
}

bool pump_gone(struct pump *p)
{
    pthread_mutex_lock(&p->c->lock);
    const bool gone = p->c->ended;
    pthread_mutex_unlock(&p->c->lock);
    return gone;
}

static void end(struct pump *p)
{
    struct api_call *c = p->c;
    pthread_mutex_lock(&c->lock);
    c->pump = NULL; // from here on nobody signals but hub and timer
    pthread_mutex_unlock(&c->lock);
    hub_cancel(c->a->hub, p->waiter);
    timers_cancel(c->a->timers, &p->timer);
    free(p);
    call_unref(c);
}

static void run(void *arg)
{
    struct pump *p = arg;
    for (;;) {
        const unsigned seen = atomic_load(&p->signals);
        if (p->key) {
            hub_cancel(p->c->a->hub, p->waiter);
            p->waiter = hub_wait(p->c->a->hub, p->key, on_news, p);
        }
        if (p->step(p) == PUMP_DONE) {
            end(p);
            return;
        }
        if (atomic_fetch_sub(&p->signals, seen) == seen)
            return;
    }
}

int pump_start(struct api_call *c, const char *key, enum pump_next (*step)(struct pump *p))
{
    struct pump *p = calloc(1, sizeof *p);
    if (!p)
        return -1;
    p->c = call_ref(c);
    p->key = key;
    p->step = step;
    pthread_mutex_lock(&c->lock);
    c->pump = p;
    pthread_mutex_unlock(&c->lock);
    pump_signal(p);
    return 0;
}
