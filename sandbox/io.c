// What waits for the disk, per sandbox and in order: log lines, then command output. One io job per sandbox at a time on
// a small pool, so that neither the loop nor a request ever waits for a write.
#include "sandbox/internal.h"
#include "sandbox/redact.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct log_line {
    struct log_line *next;
    enum log_source source;
    char stream[16], command_id[ID_MAX];
    int64_t at_ms;
    bool gap;
    uint32_t len;
    uint8_t text[];
};

static void io_run(void *arg);

// ---- scheduling -------------------------------------------------------------------------------------------------
void io_schedule_locked(struct sandbox *s)
{
    if (s->io_scheduled)
        return;
    atomic_fetch_add(&s->m->active, 1);
    sandbox_ref(s);
    if (work_submit(s->m->io, io_run, s) == 0) {
        s->io_scheduled = true;
        return;
    }
    atomic_fetch_sub(&s->m->active, 1);
    atomic_fetch_sub(&s->refs, 1); // never the last: the caller has one
    s->io_retry_at_ms = clock_mono_ms() + 500;
}

void io_schedule(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    io_schedule_locked(s);
    pthread_mutex_unlock(&s->lock);
}

// ---- log lines --------------------------------------------------------------------------------------------------
static void enqueue_line(struct sandbox *s, enum log_source source, const char *stream, const char *command_id,
                         const void *text, size_t len, bool gap)
{
    if (len > LIMIT_LOG_TEXT + 1)
        len = LIMIT_LOG_TEXT + 1; // one more than fits: the log says `truncated`
    struct log_line *line = calloc(1, sizeof *line + len + 1);
    if (line) {
        line->source = source;
        line->gap = gap;
        line->at_ms = clock_wall_ms();
        line->len = (uint32_t)len;
        strncpy(line->stream, stream, sizeof line->stream - 1);
        strncpy(line->command_id, command_id, sizeof line->command_id - 1);
        memcpy(line->text, text, len);
    }
    pthread_mutex_lock(&s->lock);
    if (!line || s->log_pending >= LOG_PENDING_MAX) {
        s->log_dropped++;
        free(line);
    } else {
        if (s->log_tail)
            s->log_tail->next = line;
        else
            s->log_head = line;
        s->log_tail = line;
        s->log_pending++;
        io_schedule_locked(s);
    }
    pthread_mutex_unlock(&s->lock);
}

void sandbox_log(struct sandbox *s, enum log_source source, const char *stream, const char *command_id, const void *text,
                 size_t len)
{
    const uint8_t *at = text;
    while (len > 0) { // a long chunk becomes several entries, cut at line ends where there are any
        size_t n = len;
        if (n > LIMIT_LOG_TEXT) {
            n = LIMIT_LOG_TEXT;
            const uint8_t *nl = memrchr(at, '\n', n);
            if (nl)
                n = (size_t)(nl - at) + 1;
        }
        enqueue_line(s, source, stream, command_id, at, n, false);
        at += n;
        len -= n;
    }
}

void sandbox_log_gap(struct sandbox *s, enum log_source source, uint64_t bytes)
{
    char text[96];
    const int n = snprintf(text, sizeof text, "%llu bytes were not kept", (unsigned long long)bytes);
    enqueue_line(s, source, "gap", "", text, (size_t)n, true);
}

static void write_lines(struct sandbox *s)
{
    pthread_mutex_lock(&s->lock);
    struct log_line *line = s->log_head;
    const uint64_t dropped = s->log_dropped;
    s->log_head = s->log_tail = NULL;
    s->log_pending = 0;
    s->log_dropped = 0;
    pthread_mutex_unlock(&s->lock);
    const bool any = line != NULL;
    while (line) {
        struct log_line *next = line->next;
        struct log_entry e = {.at_ms = line->at_ms, .source = line->source};
        bool found = false;
        unsigned carry = 0;
        redact(line->text, line->len, true, &carry, &found);
        e.redacted = found;
        e.text = (const char *)line->text;
        e.text_len = line->len;
        memcpy(e.stream, line->stream, sizeof e.stream);
        memcpy(e.command_id, line->command_id, sizeof e.command_id);
        if (s->log)
            logfile_append(s->log, &e);
        free(line);
        line = next;
    }
    if (dropped && s->log) {
        char text[96];
        struct log_entry e = {.source = LOGSRC_VMM, .stream = "gap", .text = text};
        e.text_len = (uint32_t)snprintf(text, sizeof text, "%llu log entries were not kept", (unsigned long long)dropped);
        logfile_append(s->log, &e);
    }
    if (any || dropped) {
        char key[48];
        snprintf(key, sizeof key, "log:%s", s->id);
        hub_notify(s->m->hub, key);
    }
}

static bool more_work(struct sandbox *s)
{
    return s->log_head != NULL || s->log_dropped > 0;
}

static void io_run(void *arg)
{
    struct sandbox *s = arg;
    write_lines(s);
    commands_io(s);
    pthread_mutex_lock(&s->lock);
    s->io_scheduled = false;
    if (more_work(s) || commands_want_io_locked(s))
        io_schedule_locked(s);
    pthread_mutex_unlock(&s->lock);
    atomic_fetch_sub(&s->m->active, 1);
    sandbox_unref(s);
}
