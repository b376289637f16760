// warm.h - commands in a VM that is nobody's yet: templates and pooled sandboxes are warmed by them. Owns its VM's
// callbacks while it is bound to it.
#ifndef AIRLOCK_SANDBOX_WARM_H
#define AIRLOCK_SANDBOX_WARM_H

#include <pthread.h>

#include "qemu/vm.h"

// Nobody's: replaced before a sandbox is handed out.
#define WARM_MACHINE_ID "00000000000040008000000000000001"
#define WARM_BOOT_ID "00000000-0000-4000-8000-000000000001"
#define WARM_REFRESH_MS 10000

struct warm {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t running;          // agent's id; 0: none
    bool exited, gone;
    int exit_code;
};
extern const struct vm_callbacks WARM_CALLBACKS; // arg: struct warm *

void warm_init(struct warm *w);
void warm_free(struct warm *w);
// Runs argv (NULL-terminated, at most 8 words) as the guest user `sandbox` and waits for its end. 0: it ran, whatever its
// exit code; -1 with err.
int warm_run(struct warm *w, struct vm *vm, const char *const *argv, int timeout_ms, struct err *err);
// What a first command meets cold: shell and python, some times.
int warm_up(struct warm *w, struct vm *vm, unsigned rounds, struct err *err);
bool warm_gone(struct warm *w);

#endif
