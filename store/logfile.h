// logfile.h - a sandbox's log: bounded, append-only, readable after the sandbox is gone. One per sandbox, two segments
// of NDJSON under <state>/sandboxes/<sbx>/log/; when the younger is full the older is dropped and an explicit `gap`
// entry tells how many entries went. Any thread (own lock); appends are not fsynced: a log is not evidence.
#ifndef AIRLOCK_STORE_LOGFILE_H
#define AIRLOCK_STORE_LOGFILE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/id.h"

#define LOGFILE_SEGMENT_BYTES (2u << 20)

enum log_source { LOGSRC_CONSOLE = 1, LOGSRC_AGENT = 2, LOGSRC_VMM = 3, LOGSRC_COMMAND = 4 };
const char *log_source_name(enum log_source s);
int log_source_parse(const char *name); // -1: none such

struct log_entry {
    int64_t seq, at_ms;
    enum log_source source;
    char stream[16];        // "stdout", "stderr", "" (null), "gap"
    char command_id[ID_MAX];
    const char *text;       // UTF-8 (invalid bytes become U+FFFD when appended); at most LIMIT_LOG_TEXT bytes
    uint32_t text_len;
    bool truncated, redacted;
};

struct logfile;
struct logfile *logfile_open(int dirfd, struct err *err);  // continues after the last seq on disk
void logfile_close(struct logfile *l);                     // accepts NULL
// seq and at_ms (when 0) are assigned. 0, or -1 (a full disk drops the entry and counts it for the next gap).
int logfile_append(struct logfile *l, struct log_entry *entry);
// Entries with seq > after_seq, oldest first; source 0: all. fn returns false to stop. Works on a directory without
// an open logfile too (destroyed sandboxes).
int logfile_read(int dirfd, int64_t after_seq, int source, unsigned limit,
                 bool (*fn)(void *, const struct log_entry *), void *arg, struct err *err);
int64_t logfile_last_seq(struct logfile *l);

#endif
