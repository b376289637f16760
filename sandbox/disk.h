// disk.h - the writable disks: one sparse raw file per sandbox with an ext4 filesystem made by us, never mounted by the
// host. An empty filesystem is made once per size (mke2fs) in <state>/disks/ and copied by extents. Worker threads.
#ifndef AIRLOCK_SANDBOX_DISK_H
#define AIRLOCK_SANDBOX_DISK_H

#include <stdint.h>

#include "base/err.h"

// Makes <sandbox dir>/disk.raw (0600) of `mib` MiB from the formatted template of that size, which is made first when
// missing. Durable enough to boot from after a crash is not needed before the sandbox is running. Errors:
// unavailable/disk_full, unsupported_capability/mke2fs.
int disk_make(int state_dirfd, int sandbox_dirfd, int mib, struct err *err);
// The same into an empty file that is open already.
int disk_fill(int state_dirfd, int to_fd, int mib, struct err *err);
// Makes <sandbox dir>/disk.raw as a copy of another disk: reflink, or its data extents.
int disk_copy(int from_fd, int sandbox_dirfd, struct err *err);
// O_RDWR descriptor, close-on-exec; -1 with err.
int disk_open(int sandbox_dirfd, struct err *err);

#endif
