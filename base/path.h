// path.h - the syntax half of the path policy: what a guest path may look like before the guest resolves it. The
// other half (symlinks, roots) is decided inside the guest. Pure; any thread. libc only. Fuzzed.
#ifndef AIRLOCK_BASE_PATH_H
#define AIRLOCK_BASE_PATH_H

#include <stdbool.h>
#include <stddef.h>

// NULL when the len bytes are an admissible absolute path; otherwise a constant sentence saying why not. Refused:
// empty, relative, NUL, a `.` or `..` segment, an empty segment (a trailing slash is one; `/` alone is valid),
// more than LIMIT_PATH_BYTES, invalid UTF-8.
const char *path_fault(const char *path, size_t len);

// True when the resolved path is `root` or lies below it, segment-wise, for one of the n roots.
bool path_below(const char *path, const char *const *roots, size_t n);

// The roots files may be written below unless policy widens it: /work, /tmp, /home. *ret_n gets the count.
const char *const *path_write_roots(size_t *ret_n);

#endif
