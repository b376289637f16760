#include "base/clock.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static int64_t now_us(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int64_t clock_wall_ms(void)
{
    return now_us(CLOCK_REALTIME) / 1000;
}

int64_t clock_mono_ms(void)
{
    return now_us(CLOCK_MONOTONIC) / 1000;
}

int64_t clock_mono_us(void)
{
    return now_us(CLOCK_MONOTONIC);
}

int64_t clock_boot_ms(void)
{
    return now_us(CLOCK_BOOTTIME) / 1000;
}

char *clock_text(int64_t wall_ms, char out[static CLOCK_TEXT_MAX])
{
    int64_t seconds = wall_ms / 1000, ms = wall_ms % 1000;
    if (ms < 0) {
        ms += 1000;
        seconds--;
    }
    const time_t t = (time_t)seconds;
    struct tm tm;
    char date[24];
    gmtime_r(&t, &tm);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out, CLOCK_TEXT_MAX, "%s.%03dZ", date, (int)ms);
    return out;
}

// Digits where RFC 3339 has digits, and a day that exists: what the fields say is what comes back from them.
static bool shaped(const char *text)
{
    static const char SHAPE[] = "0000-00-00T00:00:00";
    for (size_t i = 0; i < sizeof SHAPE - 1; i++)
        if (SHAPE[i] == '0' ? text[i] < '0' || text[i] > '9' : text[i] != SHAPE[i])
            return false;
    return true;
}

int clock_parse(const char *text, int64_t *ret_wall_ms)
{
    struct tm tm = {0};
    int ms = 0, scale = 100;
    if (!shaped(text) || sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &tm.tm_hour,
                                &tm.tm_min, &tm.tm_sec) != 6)
        return -1;
    const char *at = text + 19;
    if (*at == '.' && at[1] == 'Z')
        return -1;
    if (*at == '.')
        for (at++; *at >= '0' && *at <= '9'; at++, scale /= 10)
            ms += (*at - '0') * scale;
    if (strcmp(at, "Z") != 0 || tm.tm_mon < 1 || tm.tm_hour > 23 || tm.tm_min > 59 || tm.tm_sec > 60)
        return -1;
    tm.tm_year -= 1900;
    tm.tm_mon -= 1;
    const struct tm said = tm;
    const time_t t = timegm(&tm);
    if (said.tm_sec < 60 && (tm.tm_mon != said.tm_mon || tm.tm_mday != said.tm_mday))
        return -1;
    *ret_wall_ms = (int64_t)t * 1000 + ms;
    return 0;
}
