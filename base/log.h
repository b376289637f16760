// log.h - one line of structured text per decision, to stderr. Owns the process-wide level and rate limits.
// Does not own log files or sandbox logs. Any thread; one write(2) per line, so lines never mix.
#ifndef AIRLOCK_BASE_LOG_H
#define AIRLOCK_BASE_LOG_H

#include <stdint.h>

enum log_level { LOG_DEBUG_ = 0, LOG_INFO_, LOG_WARN_, LOG_ERROR_ };

void log_set_level(enum log_level level);
enum log_level log_level(void);

// Writes `time level message` (control bytes in arguments become `?`; at most 1,024 bytes per line).
void log_line(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) ((void)(log_level() <= LOG_DEBUG_ && (log_line(LOG_DEBUG_, __VA_ARGS__), 0)))
#define log_info(...) log_line(LOG_INFO_, __VA_ARGS__)
#define log_warn(...) log_line(LOG_WARN_, __VA_ARGS__)
#define log_error(...) log_line(LOG_ERROR_, __VA_ARGS__)

// For what a guest or client can trigger: at most `burst` lines per 10 s from one place; the number that was
// suppressed is said with the next line that passes. One static struct per call site.
struct log_limit {
    int64_t window_start_ms;
    uint32_t seen, suppressed;
};
int log_limit_pass(struct log_limit *limit, uint32_t burst);

#define log_warn_limited(...)                                                                      \
    do {                                                                                           \
        static struct log_limit limit_;                                                            \
        if (log_limit_pass(&limit_, 10))                                                           \
            log_warn(__VA_ARGS__);                                                                 \
    } while (0)

#endif
