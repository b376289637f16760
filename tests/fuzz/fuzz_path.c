// The syntax half of the path policy. Input: mode (1: repeated to about 4,096 bytes; 128: once more), text.
//
// Claims: path_fault agrees with the rules written down a second time below; path_below agrees with "the root, or
// the root and a slash"; what lies below stays below with another segment, and never by a name that only begins alike.
#include "base/limits.h"
#include "base/path.h"
#include "fuzz.h"

// RFC 3629, in numbers rather than byte ranges.
static size_t code_point(const uint8_t *p, size_t len)
{
    static const uint32_t LEAST[] = {0, 0, 0x80, 0x800, 0x10000};
    const size_t n = p[0] < 0x80 ? 1 : p[0] >> 5 == 6 ? 2 : p[0] >> 4 == 14 ? 3 : p[0] >> 3 == 30 ? 4 : 0;
    if (n == 0 || n > len)
        return 0;
    uint32_t v = n == 1 ? p[0] : p[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if (p[i] >> 6 != 2)
            return 0;
        v = v << 6 | (p[i] & 0x3f);
    }
    return v < LEAST[n] || v > 0x10ffff || (v >= 0xd800 && v <= 0xdfff) ? 0 : n;
}

static bool text(const uint8_t *p, size_t len)
{
    for (size_t i = 0, n; i < len; i += n)
        if (p[i] == 0 || !(n = code_point(p + i, len - i)))
            return false;
    return true;
}

static bool has(const char *path, const char *what)
{
    return strstr(path, what) != NULL;
}

static bool ends(const char *path, const char *what)
{
    const size_t n = strlen(path), k = strlen(what);
    return n >= k && strcmp(path + n - k, what) == 0;
}

static bool admissible(const uint8_t *p, size_t len)
{
    if (len == 0 || len > 4096 || p[0] != '/' || !text(p, len))
        return false;
    char *path = strndup((const char *)p, len);
    CLAIM(path);
    const bool fine = len == 1 || (!has(path, "//") && !has(path, "/./") && !has(path, "/../") && !ends(path, "/") &&
                                   !ends(path, "/.") && !ends(path, "/.."));
    free(path);
    return fine;
}

static bool below(const char *path, const char *const *roots, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(path, roots[i]) == 0 ||
            (strncmp(path, roots[i], strlen(roots[i])) == 0 && path[strlen(roots[i])] == '/'))
            return true;
    return false;
}

static void check_roots(const char *path)
{
    static const char *const OTHERS[] = {"/srv/a", "/work/deep/er", "/\xc3\xa4"};
    size_t n;
    const char *const *roots = path_write_roots(&n);
    CLAIM(path_below(path, roots, n) == below(path, roots, n));
    CLAIM(path_below(path, OTHERS, 3) == below(path, OTHERS, 3));
    CLAIM(!path_below(path, roots, 0));
    char *longer = malloc(strlen(path) + 8);
    CLAIM(longer);
    sprintf(longer, "%s/x", path);
    CLAIM(!path_below(path, roots, n) || path_below(longer, roots, n));
    const char *self = path;
    sprintf(longer, "%s.x", path);
    CLAIM(path_below(path, &self, 1) && !path_below(longer, &self, 1));
    free(longer);
}

// Repeated until about as long as a path may be.
static uint8_t *repeat(const uint8_t *text, size_t len, size_t more, size_t *ret_len)
{
    const size_t times = LIMIT_PATH_BYTES / len + more;
    uint8_t *made = malloc(times * len + 1);
    CLAIM(made);
    for (size_t i = 0; i < times; i++)
        memcpy(made + i * len, text, len);
    *ret_len = times * len;
    return made;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes in = {data, size};
    const uint8_t mode = take_u8(&in);
    size_t len = in.left;
    uint8_t *made = mode & 1 && len > 0 ? repeat(in.data, len, mode >> 7, &len) : NULL;
    uint8_t *path = exact_copy(made ? made : in.data, len);
    free(made);
    const char *fault = path_fault((const char *)path, len);
    CLAIM((fault == NULL) == admissible(path, len));
    CLAIM(!fault || strncmp(fault, "the path ", 9) == 0);
    if (!fault) {
        char *terminated = strndup((const char *)path, len);
        CLAIM(terminated);
        check_roots(terminated);
        free(terminated);
    }
    free(path);
    return 0;
}
