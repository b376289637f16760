// clock.h - time: wall clock in ms since the epoch, monotonic ms and µs, RFC 3339. Any thread. libc only.
#ifndef AIRLOCK_BASE_CLOCK_H
#define AIRLOCK_BASE_CLOCK_H

#include <stdint.h>

#define CLOCK_TEXT_MAX 32

int64_t clock_wall_ms(void);
int64_t clock_mono_ms(void);  // CLOCK_MONOTONIC: deadlines
int64_t clock_mono_us(void);
int64_t clock_boot_ms(void);  // CLOCK_BOOTTIME

// "2026-01-31T12:00:00.123Z"; returns out.
char *clock_text(int64_t wall_ms, char out[static CLOCK_TEXT_MAX]);
// Reads that form (fraction optional, Z only). 0, or -1.
int clock_parse(const char *text, int64_t *ret_wall_ms);

#endif
