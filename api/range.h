// range.h - one byte range of RFC 9110, section 14. Pure; any thread.
#ifndef AIRLOCK_API_RANGE_H
#define AIRLOCK_API_RANGE_H

#include <stdint.h>

enum range_verdict { RANGE_WHOLE, RANGE_PART, RANGE_NONE }; // RANGE_NONE: 416

// text: "bytes=a-b", "bytes=a-" or "bytes=-n". Several ranges, a reversed one and one past the end are RANGE_NONE.
enum range_verdict range_parse(const char *text, uint64_t size, uint64_t *ret_offset, uint64_t *ret_length);

#endif
