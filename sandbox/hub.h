// hub.h - who waits for news of what: one-shot wake-ups by key (a sandbox id, a command id, "events"). Carries no data:
// a woken waiter looks again. Owns the waiters. Any thread; wake functions run on the notifier's thread, without the
// hub's lock, and must only hand over (resume, post).
//
// Use: w = hub_wait(…); look; if there is news: hub_cancel(w). Registering before looking loses no wake-up.
#ifndef AIRLOCK_SANDBOX_HUB_H
#define AIRLOCK_SANDBOX_HUB_H

struct hub;
struct hub_waiter;

struct hub *hub_new(void);
void hub_free(struct hub *h);
// One shot. NULL: out of memory.
struct hub_waiter *hub_wait(struct hub *h, const char *key, void (*wake)(void *arg), void *arg);
// After it returns wake is not running and will not run (waits for a running one; never call it from within the same
// waiter's wake). Frees the waiter; also needed after it fired. Accepts NULL.
void hub_cancel(struct hub *h, struct hub_waiter *w);
void hub_notify(struct hub *h, const char *key);
void hub_notify_all(struct hub *h); // shutdown: everybody looks again

#endif
