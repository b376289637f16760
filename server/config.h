// config.h - what the operator set: file, environment, flags, in that order of rising precedence. One table declares
// every key; flags (--state-dir), variables (AIRLOCK_STATE_DIR) and file keys (state_dir) all come from it. Unknown keys
// and bad values are errors, all listed. Pure but for reading the file; main thread.
#ifndef AIRLOCK_SERVER_CONFIG_H
#define AIRLOCK_SERVER_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/buf.h"

struct config {
    char listen[80], state_dir[1024], image_dir[1024], accel[8], qemu[512], log_level[8], cgroup_parent[512],
        templates[4];
    bool insecure_listen, allow_emulation;
    int64_t max_snapshots_per_tenant, pool, pool_parked, pool_memory_mib, template_memory_mib, template_disk_mib,
        memory_budget_mib;
    int64_t max_sandboxes_per_tenant, max_launches, retention_hours, disk_reserve_mib, boot_timeout_seconds, jail_uid_base,
        http_threads;
    // From listen.
    char address[64];
    unsigned port;
};

// argv after the subcommand. 0; 1: --help was asked for (printed by the caller); -1: every fault, a line each, in faults.
int config_load(int argc, char **argv, char **environ_, struct config *ret, struct buf *faults);
void config_help(FILE *out);
bool config_is_loopback(const struct config *c);

#endif
