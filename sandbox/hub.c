#include "sandbox/hub.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HUB_BUCKETS 1024
#define HUB_KEY_MAX 48

// A waiter is in its bucket until it fires or is cancelled. Firing happens outside the lock; `firing` tells cancel to
// wait for it on the hub's condition.
struct hub_waiter {
    struct hub_waiter *next, **prev;
    void (*wake)(void *arg);
    void *arg;
    bool queued, firing;
    char key[HUB_KEY_MAX];
};

struct hub {
    pthread_mutex_t lock;
    pthread_cond_t fired;
    struct hub_waiter *buckets[HUB_BUCKETS];
};

static unsigned bucket_of(const char *key)
{
    uint32_t h = 2166136261u; // FNV-1a
    for (; *key; key++)
        h = (h ^ (uint8_t)*key) * 16777619u;
    return h % HUB_BUCKETS;
}

struct hub *hub_new(void)
{
    struct hub *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->fired, NULL);
    return h;
}

void hub_free(struct hub *h)
{
    if (!h)
        return;
    pthread_cond_destroy(&h->fired);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

struct hub_waiter *hub_wait(struct hub *h, const char *key, void (*wake)(void *arg), void *arg)
{
    struct hub_waiter *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    strncpy(w->key, key, sizeof w->key - 1);
    w->wake = wake;
    w->arg = arg;
    w->queued = true;
    pthread_mutex_lock(&h->lock);
    struct hub_waiter **head = &h->buckets[bucket_of(w->key)];
    w->next = *head;
    w->prev = head;
    if (*head)
        (*head)->prev = &w->next;
    *head = w;
    pthread_mutex_unlock(&h->lock);
    return w;
}

static void unqueue(struct hub_waiter *w)
{
    *w->prev = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->next = NULL;
    w->queued = false;
}

void hub_cancel(struct hub *h, struct hub_waiter *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&h->lock);
    if (w->queued)
        unqueue(w);
    while (w->firing)
        pthread_cond_wait(&h->fired, &h->lock);
    pthread_mutex_unlock(&h->lock);
    free(w);
}

// Takes the waiters of one bucket that match (NULL: all) and fires them.
static void fire(struct hub *h, unsigned bucket, const char *key)
{
    struct hub_waiter *due = NULL;
    pthread_mutex_lock(&h->lock);
    for (struct hub_waiter *w = h->buckets[bucket], *next; w; w = next) {
        next = w->next;
        if (key && strcmp(w->key, key) != 0)
            continue;
        unqueue(w);
        w->firing = true;
        w->next = due;
        due = w;
    }
    pthread_mutex_unlock(&h->lock);
    while (due) {
        struct hub_waiter *w = due;
        due = w->next;
        w->wake(w->arg);
        pthread_mutex_lock(&h->lock);
        w->firing = false;
        pthread_cond_broadcast(&h->fired);
        pthread_mutex_unlock(&h->lock);
    }
}

void hub_notify(struct hub *h, const char *key)
{
    fire(h, bucket_of(key), key);
}

void hub_notify_all(struct hub *h)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        fire(h, i, NULL);
}
