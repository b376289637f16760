#include "sandbox/logs.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "sandbox/internal.h"

int sandbox_logs(struct manager *m, const char *tenant, const char *id, int64_t after_seq, int source, unsigned limit,
                 bool (*fn)(void *, const struct log_entry *), void *arg, struct err *err)
{
    struct sandbox_info *view = manager_get(m, tenant, id, err);
    if (!view)
        return -1;
    sandbox_info_unref(view);
    char path[ID_MAX + 8];
    snprintf(path, sizeof path, "%s/log", id);
    CLEANUP_FD int dirfd = openat(m->sandboxes_dirfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0) // erased with its retention between the two looks, or never made: nothing to tell
        return 0;
    return logfile_read(dirfd, after_seq, source, limit, fn, arg, err);
}
