// Segments are `older.ndjson` and `younger.ndjson`, one entry a line, each line beginning with {"seq":N, so that a place
// is found by halving. Entries are numbered without gaps, also those that a full disk refused: whatever number is
// missing on reading was dropped, and is told by a `gap` entry in its place.
#include "store/logfile.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/limits.h"

#define OLDER "older.ndjson"
#define YOUNGER "younger.ndjson"
#define SEGMENT_ENTRIES (LIMIT_LOG_ENTRIES / 2)
#define LINE_MAX_ (6 * LIMIT_LOG_TEXT + 512) // every byte escaped as \u00XX, and the rest

struct logfile {
    pthread_mutex_t lock;
    int dirfd;              // its own
    int fd;                 // the younger segment
    uint64_t bytes;
    unsigned entries;
    int64_t last_seq;
};

static const char *const SOURCES[] = {
    [LOGSRC_CONSOLE] = "console", [LOGSRC_AGENT] = "agent", [LOGSRC_VMM] = "vmm", [LOGSRC_COMMAND] = "command",
};

const char *log_source_name(enum log_source s)
{
    return s >= LOGSRC_CONSOLE && s <= LOGSRC_COMMAND ? SOURCES[s] : NULL;
}

int log_source_parse(const char *name)
{
    for (int i = LOGSRC_CONSOLE; i <= LOGSRC_COMMAND; i++)
        if (strcmp(SOURCES[i], name) == 0)
            return i;
    return -1;
}

// ---- lines ------------------------------------------------------------------------------------------------------------
static int64_t seq_of(const char *line)
{
    return strncmp(line, "{\"seq\":", 7) == 0 ? strtoll(line + 7, NULL, 10) : -1;
}

// Length of the valid UTF-8 sequence at the start; 0 where there is none. LIMIT: RFC 3629, 4 bytes.
static size_t sequence(const char *text, size_t len)
{
    for (size_t n = 1; n <= 4 && n <= len; n++)
        if (enc_utf8_valid(text, n))
            return n;
    return 0;
}

static bool add_escaped(struct buf *b, const char *text, size_t n)
{
    const unsigned char c = (unsigned char)*text;
    if (n > 1)
        return buf_add(b, text, n);
    if (c == '"' || c == '\\')
        return buf_addf(b, "\\%c", c);
    return c < 0x20 || c == 0x7f ? buf_addf(b, "\\u%04x", c) : buf_add(b, text, 1);
}

// At most LIMIT_LOG_TEXT bytes come out (U+FFFD takes three); *truncated tells whether that was all.
static bool add_text(struct buf *b, const char *text, size_t len, bool *truncated)
{
    static const char REPLACEMENT[] = "\xef\xbf\xbd";
    size_t out = 0;
    while (len > 0) {
        const size_t n = sequence(text, len), width = n ? n : sizeof REPLACEMENT - 1;
        if (out + width > LIMIT_LOG_TEXT) {
            *truncated = true;
            return true;
        }
        if (!(n ? add_escaped(b, text, n) : buf_adds(b, REPLACEMENT)))
            return false;
        out += width;
        text += n ? n : 1;
        len -= n ? n : 1;
    }
    return true;
}

static bool line_of(struct buf *b, const struct log_entry *e)
{
    bool truncated = e->truncated, ok = buf_addf(b, "{\"seq\":%lld,\"at\":%lld,\"source\":%d,\"stream\":\"",
                                                 (long long)e->seq, (long long)e->at_ms, (int)e->source);
    ok = ok && add_text(b, e->stream, strnlen(e->stream, sizeof e->stream), &truncated);
    ok = ok && buf_adds(b, "\",\"command_id\":\"") && add_text(b, e->command_id, strlen(e->command_id), &truncated);
    ok = ok && buf_adds(b, "\",\"text\":\"") && add_text(b, e->text ? e->text : "", e->text_len, &truncated);
    return ok && buf_addf(b, "\",\"truncated\":%s,\"redacted\":%s}\n", truncated ? "true" : "false",
                          e->redacted ? "true" : "false");
}

// text belongs to *o.
static bool parse_line(const char *line, size_t len, json_t **o, struct log_entry *e)
{
    *o = json_loadb(line, len, JSON_ALLOW_NUL, NULL);
    const json_t *text = json_object_get(*o, "text");
    const char *stream = json_get_str(*o, "stream"), *command = json_get_str(*o, "command_id");
    if (!json_is_string(text) || !stream || !command)
        return false;
    *e = (struct log_entry){.seq = json_get_int(*o, "seq", 0), .at_ms = json_get_int(*o, "at", 0),
                            .source = (enum log_source)json_get_int(*o, "source", 0),
                            .text = json_string_value(text), .text_len = (uint32_t)json_string_length(text),
                            .truncated = json_is_true(json_object_get(*o, "truncated")),
                            .redacted = json_is_true(json_object_get(*o, "redacted"))};
    snprintf(e->stream, sizeof e->stream, "%s", stream);
    snprintf(e->command_id, sizeof e->command_id, "%s", command);
    return log_source_name(e->source) != NULL;
}

// ---- appending --------------------------------------------------------------------------------------------------------
// Last complete line's number and end of a segment; counts lines. An unfinished line at the end is not counted.
static int scan_segment(int fd, int64_t *last_seq, uint64_t *ret_bytes, unsigned *ret_lines)
{
    char chunk[16 << 10];
    uint64_t at = 0, line_at = 0;
    *ret_bytes = 0;
    *ret_lines = 0;
    for (;;) {
        const ssize_t n = pread(fd, chunk, sizeof chunk, (off_t)at);
        if (n <= 0)
            break;
        for (const char *nl, *p = chunk; (nl = memchr(p, '\n', (size_t)(chunk + n - p))); p = nl + 1) {
            line_at = *ret_bytes;
            *ret_bytes = at + (uint64_t)(nl + 1 - chunk);
            ++*ret_lines;
        }
        at += (uint64_t)n;
    }
    char head[40] = "";
    if (*ret_lines && pread(fd, head, sizeof head - 1, (off_t)line_at) > 0 && seq_of(head) > *last_seq)
        *last_seq = seq_of(head);
    return 0;
}

static int open_younger(struct logfile *l)
{
    l->fd = openat(l->dirfd, YOUNGER, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    l->bytes = 0;
    l->entries = 0;
    return l->fd < 0 ? -1 : 0;
}

struct logfile *logfile_open(int dirfd, struct err *err)
{
    struct logfile *l = calloc(1, sizeof *l);
    if (!l) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    pthread_mutex_init(&l->lock, NULL);
    l->fd = -1;
    l->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    CLEANUP_FD int older = l->dirfd < 0 ? -1 : openat(l->dirfd, OLDER, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (l->dirfd < 0 || open_younger(l) != 0) {
        err_sys(err, errno, "opening a log");
        logfile_close(l);
        return NULL;
    }
    if (older >= 0)
        scan_segment(older, &l->last_seq, &l->bytes, &l->entries);
    scan_segment(l->fd, &l->last_seq, &l->bytes, &l->entries);
    (void)!ftruncate(l->fd, (off_t)l->bytes); // of a line that was cut
    return l;
}

void logfile_close(struct logfile *l)
{
    if (!l)
        return;
    fd_close(&l->fd);
    fd_close(&l->dirfd);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

static int rotate(struct logfile *l)
{
    if (renameat(l->dirfd, YOUNGER, l->dirfd, OLDER) != 0)
        return -1;
    fd_close(&l->fd);
    return open_younger(l);
}

static int append(struct logfile *l, const struct buf *line)
{
    const bool full = l->bytes + line->len > LOGFILE_SEGMENT_BYTES || l->entries >= SEGMENT_ENTRIES;
    if (l->fd < 0 ? open_younger(l) != 0 : full && rotate(l) != 0)
        return -1;
    if (fd_pwrite_full(l->fd, line->data, line->len, (off_t)l->bytes) != 0) {
        (void)!ftruncate(l->fd, (off_t)l->bytes);
        return -1;
    }
    l->bytes += line->len;
    l->entries++;
    return 0;
}

int logfile_append(struct logfile *l, struct log_entry *e)
{
    CLEANUP_BUF struct buf line = BUF_INIT(LINE_MAX_);
    pthread_mutex_lock(&l->lock);
    e->seq = ++l->last_seq; // taken even when the write fails: the missing number is the gap
    if (e->at_ms == 0)
        e->at_ms = clock_wall_ms();
    const int result = line_of(&line, e) ? append(l, &line) : -1;
    pthread_mutex_unlock(&l->lock);
    return result;
}

int64_t logfile_last_seq(struct logfile *l)
{
    pthread_mutex_lock(&l->lock);
    const int64_t seq = l->last_seq;
    pthread_mutex_unlock(&l->lock);
    return seq;
}

// ---- reading ------------------------------------------------------------------------------------------------------------
struct walk {
    int64_t last;             // number of the entry before the next
    int source;
    unsigned left;
    bool stopped;
    bool (*fn)(void *, const struct log_entry *);
    void *arg;
};

static void hand_over(struct walk *w, const struct log_entry *e)
{
    w->stopped = w->left == 0 || !w->fn(w->arg, e) || --w->left == 0;
}

// Told with the number of the last one that is missing, so that reading on after it does not tell it again.
static void hand_over_gap(struct walk *w, const struct log_entry *next)
{
    char text[80];
    const int64_t missing = next->seq - w->last - 1;
    const int n = snprintf(text, sizeof text, "%lld log entries were dropped", (long long)missing);
    const struct log_entry gap = {.seq = next->seq - 1, .at_ms = next->at_ms, .stream = "gap", .text = text,
                                  .source = w->source ? (enum log_source)w->source : next->source,
                                  .text_len = (uint32_t)n};
    hand_over(w, &gap);
}

static void walk_line(struct walk *w, const char *line, size_t len)
{
    CLEANUP_JSON json_t *o = NULL;
    struct log_entry e;
    const int64_t seq = seq_of(line);
    if (seq <= w->last || !parse_line(line, len, &o, &e))
        return; // an unreadable line counts as dropped
    if (seq > w->last + 1)
        hand_over_gap(w, &e);
    if (w->stopped)
        return;
    w->last = seq;
    if (!w->source || (int)e.source == w->source)
        hand_over(w, &e);
}

// Number of the first line that begins at or after offset, and where it begins. -1: none.
static int64_t line_from(int fd, uint64_t offset, uint64_t *ret_at)
{
    char chunk[LINE_MAX_ + 64];
    const ssize_t n = pread(fd, chunk, sizeof chunk - 1, (off_t)offset);
    if (n <= 0)
        return -1;
    chunk[n] = 0;
    const char *line = offset ? memchr(chunk, '\n', (size_t)n) : chunk;
    line = line && offset ? line + 1 : line;
    if (!line || !memchr(line, '\n', (size_t)(chunk + n - line)))
        return -1;
    *ret_at = offset + (uint64_t)(line - chunk);
    return seq_of(line);
}

// Where to start so that no entry past after_seq is missed; halving until it is near.
static uint64_t seek(int fd, int64_t after_seq)
{
    struct stat st;
    uint64_t low = 0, at;
    if (after_seq <= 0 || fstat(fd, &st) != 0)
        return 0;
    for (uint64_t high = (uint64_t)st.st_size; high > low + 2 * LINE_MAX_;) {
        const uint64_t middle = low + (high - low) / 2;
        const int64_t seq = line_from(fd, middle, &at);
        if (seq > 0 && seq <= after_seq)
            low = at;
        else
            high = middle;
    }
    return low;
}

static void walk_segment(struct walk *w, int fd)
{
    CLEANUP_FREE char *chunk = malloc(2 * LINE_MAX_ + 1);
    uint64_t at = seek(fd, w->last);
    while (chunk && !w->stopped) {
        const ssize_t n = pread(fd, chunk, 2 * LINE_MAX_, (off_t)at);
        if (n <= 0)
            return;
        chunk[n] = 0;
        const char *p = chunk;
        for (const char *nl; !w->stopped && (nl = memchr(p, '\n', (size_t)(chunk + n - p))); p = nl + 1)
            walk_line(w, p, (size_t)(nl - p));
        if (p == chunk)
            return; // an unfinished line
        at += (uint64_t)(p - chunk);
    }
}

// Both segments as of one moment: a rotation in between is noticed by the older one's being another file.
static int open_segments(int dirfd, int fds[2])
{
    for (int tries = 0; tries < 16; tries++) {
        struct stat was, is;
        fd_close(&fds[0]);
        fd_close(&fds[1]);
        fds[0] = openat(dirfd, OLDER, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fds[0] < 0 && errno != ENOENT)
            return -1;
        fds[1] = openat(dirfd, YOUNGER, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fds[1] < 0 && errno != ENOENT)
            return -1;
        const bool none = fstatat(dirfd, OLDER, &is, AT_SYMLINK_NOFOLLOW) != 0;
        if (fds[0] < 0 ? none : !none && fstat(fds[0], &was) == 0 && was.st_ino == is.st_ino)
            return 0;
    }
    errno = EAGAIN;
    return -1;
}

int logfile_read(int dirfd, int64_t after_seq, int source, unsigned limit, bool (*fn)(void *, const struct log_entry *),
                 void *arg, struct err *err)
{
    int fds[2] = {-1, -1};
    struct walk w = {.last = after_seq, .source = source, .left = limit, .stopped = limit == 0, .fn = fn, .arg = arg};
    const int result = open_segments(dirfd, fds) == 0 ? 0 : err_sys(err, errno, "reading a log");
    for (int i = 0; i < 2 && result == 0; i++)
        if (fds[i] >= 0)
            walk_segment(&w, fds[i]);
    fd_close(&fds[0]);
    fd_close(&fds[1]);
    return result;
}
