// logs.h - reading a sandbox's log, live or gone. News: hub key = "log:" + sandbox id. Threads as in manager.h (may read
// a small file: not from the loop).
#ifndef AIRLOCK_SANDBOX_LOGS_H
#define AIRLOCK_SANDBOX_LOGS_H

#include "sandbox/manager.h"
#include "store/logfile.h"

// source 0: all. 0, or -1 not_found.
int sandbox_logs(struct manager *m, const char *tenant, const char *id, int64_t after_seq, int source, unsigned limit,
                 bool (*fn)(void *, const struct log_entry *), void *arg, struct err *err);

#endif
