#include "base/path.h"

#include <string.h>

#include "base/enc.h"
#include "base/limits.h"

static bool dots(const char *segment, size_t len)
{
    return (len == 1 && segment[0] == '.') || (len == 2 && segment[0] == '.' && segment[1] == '.');
}

const char *path_fault(const char *path, size_t len)
{
    if (len == 0)
        return "the path is empty";
    if (len > LIMIT_PATH_BYTES)
        return "the path is longer than 4,096 bytes";
    if (memchr(path, 0, len))
        return "the path contains NUL";
    if (path[0] != '/')
        return "the path is not absolute";
    if (!enc_utf8_valid(path, len))
        return "the path is not UTF-8";
    if (len == 1)
        return NULL;
    for (size_t i = 1; i <= len;) {
        const char *slash = i < len ? memchr(path + i, '/', len - i) : NULL;
        const size_t n = slash ? (size_t)(slash - (path + i)) : len - i;
        if (n == 0)
            return "the path has an empty segment";
        if (dots(path + i, n))
            return "the path has a . or .. segment";
        i += n + 1;
        if (i > len)
            break;
    }
    return NULL;
}

bool path_below(const char *path, const char *const *roots, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const size_t len = strlen(roots[i]);
        if (strncmp(path, roots[i], len) == 0 && (path[len] == 0 || path[len] == '/'))
            return true;
    }
    return false;
}

const char *const *path_write_roots(size_t *ret_n)
{
    static const char *const ROOTS[] = {"/work", "/tmp", "/home"};
    *ret_n = sizeof ROOTS / sizeof *ROOTS;
    return ROOTS;
}
