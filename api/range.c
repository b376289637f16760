#include "api/range.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool read_number(const char **at, uint64_t *ret)
{
    const char *p = *at;
    uint64_t v = 0;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (v > (UINT64_MAX - 9) / 10)
            return false;
        v = v * 10 + (uint64_t)(*p - '0');
    }
    if (p == *at)
        return false;
    *at = p;
    *ret = v;
    return true;
}

static enum range_verdict suffix(const char *p, uint64_t size, uint64_t *ret_offset, uint64_t *ret_length)
{
    uint64_t n;
    if (!read_number(&p, &n) || *p || n == 0 || size == 0)
        return RANGE_NONE;
    *ret_length = n < size ? n : size;
    *ret_offset = size - *ret_length;
    return RANGE_PART;
}

enum range_verdict range_parse(const char *text, uint64_t size, uint64_t *ret_offset, uint64_t *ret_length)
{
    uint64_t first, last = UINT64_MAX;
    if (strncasecmp(text, "bytes=", 6) != 0)
        return RANGE_WHOLE; // a unit that we do not know is ignored, as RFC 9110 wants
    const char *p = text + 6 + strspn(text + 6, " ");
    if (*p == '-')
        return suffix(p + 1, size, ret_offset, ret_length);
    if (!read_number(&p, &first) || *p++ != '-')
        return RANGE_NONE;
    if (*p && !read_number(&p, &last))
        return RANGE_NONE;
    if (*p || last < first || first >= size)
        return RANGE_NONE;
    *ret_offset = first;
    *ret_length = (last < size - 1 ? last : size - 1) - first + 1;
    return RANGE_PART;
}
