#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

#define LINE_MAX_BYTES 1024

static atomic_int present_level = LOG_INFO_;

void log_set_level(enum log_level level)
{
    atomic_store(&present_level, (int)level);
}

enum log_level log_level(void)
{
    return (enum log_level)atomic_load_explicit(&present_level, memory_order_relaxed);
}

void log_line(enum log_level level, const char *fmt, ...)
{
    static const char *const NAMES[] = {"debug", "info", "warn", "error"};
    if (level < log_level())
        return;
    char line[LINE_MAX_BYTES], at[CLOCK_TEXT_MAX];
    int n = snprintf(line, sizeof line, "%s %s ", clock_text(clock_wall_ms(), at), NAMES[level]);
    va_list args;
    va_start(args, fmt);
    const int more = vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, args);
    va_end(args);
    n = more < 0 ? n : n + more < LINE_MAX_BYTES - 2 ? n + more : LINE_MAX_BYTES - 2;
    for (int i = 0; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    line[n] = '\n';
    if (write(STDERR_FILENO, line, (size_t)n + 1) < 0)
        return; // nowhere left to say so
}

int log_limit_pass(struct log_limit *limit, uint32_t burst)
{
    const int64_t now = clock_mono_ms();
    int64_t start = __atomic_load_n(&limit->window_start_ms, __ATOMIC_RELAXED);
    if (start == 0 || now - start > 10000) {
        const uint32_t dropped = __atomic_exchange_n(&limit->suppressed, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&limit->window_start_ms, now, __ATOMIC_RELAXED);
        __atomic_store_n(&limit->seen, 0, __ATOMIC_RELAXED);
        if (dropped)
            log_warn("%u lines like the next were suppressed", dropped);
    }
    if (__atomic_add_fetch(&limit->seen, 1, __ATOMIC_RELAXED) <= burst)
        return 1;
    __atomic_add_fetch(&limit->suppressed, 1, __ATOMIC_RELAXED);
    return 0;
}
