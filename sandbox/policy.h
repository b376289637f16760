// policy.h - what a request may ask for, decided without a guest: environment names. Pure; any thread.
#ifndef AIRLOCK_SANDBOX_POLICY_H
#define AIRLOCK_SANDBOX_POLICY_H

#include <jansson.h>
#include <stdbool.h>

#include "base/err.h"

// True for names that change what a program loads or runs before its own first line (docs/security.md).
bool policy_env_name_denied(const char *name);
// Every key of an environment object (NULL: fine). 0, or -1 with policy_denied/env_denied naming the first.
int policy_env(const json_t *env, struct err *err);

#endif
