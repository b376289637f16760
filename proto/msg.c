#include "proto/msg.h"

#include <string.h>

#include "proto/frame.h"

// ---- fields -------------------------------------------------------------------------------------------------------
// One table per message drives both directions: what a field is, where it lives, whether it must be there.
enum kind { U64, BOOL, SLICE, FIXED16, ARGS, ENTRIES };

struct field {
    uint8_t tag;
    uint8_t kind;
    bool required;
    uint16_t offset;       // of the value
    uint16_t count_offset; // ARGS, ENTRIES: of the size_t count
    uint16_t max;          // ARGS, ENTRIES: how many
};

#define F(t, k, req, type, member) {t, k, req, offsetof(struct type, member), 0, 0}
#define LIST(t, k, type, member, count, most) {t, k, false, offsetof(struct type, member), offsetof(struct type, count), most}

static uint64_t get64(const uint8_t *p)
{
    uint64_t v = 0;
    for (int i = 8; i-- > 0;)
        v = v << 8 | p[i];
    return v;
}

static void put64(uint8_t *p, uint64_t v)
{
    for (int i = 0; i < 8; i++, v >>= 8)
        p[i] = (uint8_t)v;
}

static bool put_field(struct buf *out, uint8_t tag, const void *data, size_t len)
{
    const uint8_t head[5] = {tag, (uint8_t)len, (uint8_t)(len >> 8), (uint8_t)(len >> 16), (uint8_t)(len >> 24)};
    return buf_reserve(out, sizeof head + len) && buf_add(out, head, sizeof head) && buf_add(out, data, len);
}

// ---- directory entries: fixed 6 numbers, then name and target, each with its length ------------------------------------
#define ENTRY_FIXED 56

static bool put_entry(struct buf *out, uint8_t tag, const struct msg_entry *e)
{
    uint8_t fixed[ENTRY_FIXED];
    const uint64_t numbers[7] = {e->kind, e->mode, e->size, (uint64_t)e->mtime_ms, e->uid, e->gid, e->name.len};
    const size_t len = sizeof fixed + e->name.len + e->target.len;
    const uint8_t head[5] = {tag, (uint8_t)len, (uint8_t)(len >> 8), (uint8_t)(len >> 16), (uint8_t)(len >> 24)};
    for (int i = 0; i < 7; i++)
        put64(fixed + 8 * i, numbers[i]);
    return buf_reserve(out, sizeof head + len) && buf_add(out, head, sizeof head) && buf_add(out, fixed, sizeof fixed) &&
           buf_add(out, e->name.data, e->name.len) && buf_add(out, e->target.data, e->target.len);
}

static bool get_entry(const uint8_t *p, size_t len, struct msg_entry *e)
{
    if (len < ENTRY_FIXED)
        return false;
    const uint64_t name_len = get64(p + 48);
    if (name_len > len - ENTRY_FIXED)
        return false;
    *e = (struct msg_entry){.kind = get64(p), .mode = get64(p + 8), .size = get64(p + 16),
                            .mtime_ms = (int64_t)get64(p + 24), .uid = get64(p + 32), .gid = get64(p + 40),
                            .name = {p + ENTRY_FIXED, (size_t)name_len},
                            .target = {p + ENTRY_FIXED + name_len, len - ENTRY_FIXED - (size_t)name_len}};
    return true;
}

// ---- both directions --------------------------------------------------------------------------------------------------
static bool encode_list(struct buf *out, const struct field *f, const uint8_t *base)
{
    const size_t n = *(const size_t *)(const void *)(base + f->count_offset);
    if (n > f->max)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (f->kind == ARGS) {
            const struct slice *s = (const struct slice *)(const void *)(base + f->offset) + i;
            if (!put_field(out, f->tag, s->data, s->len))
                return false;
        } else if (!put_entry(out, f->tag, (const struct msg_entry *)(const void *)(base + f->offset) + i)) {
            return false;
        }
    }
    return true;
}

static bool encode_field(struct buf *out, const struct field *f, const uint8_t *base)
{
    const void *value = base + f->offset;
    uint8_t number[8];
    switch ((enum kind)f->kind) {
    case U64:
        put64(number, *(const uint64_t *)value);
        return put_field(out, f->tag, number, sizeof number);
    case BOOL:
        put64(number, *(const bool *)value);
        return put_field(out, f->tag, number, sizeof number);
    case SLICE:
        return put_field(out, f->tag, ((const struct slice *)value)->data, ((const struct slice *)value)->len);
    case FIXED16:
        return put_field(out, f->tag, value, 16);
    case ARGS:
    case ENTRIES:
        return encode_list(out, f, base);
    }
    return false;
}

static int encode(struct buf *out, const struct field *fields, size_t n, const void *m)
{
    for (size_t i = 0; i < n; i++)
        if (!encode_field(out, &fields[i], m))
            return -1;
    return 0;
}

static bool decode_value(const struct field *f, const uint8_t *p, size_t len, uint8_t *base)
{
    void *value = base + f->offset;
    size_t *count = (size_t *)(void *)(base + f->count_offset);
    switch ((enum kind)f->kind) {
    case U64:
        if (len == 8)
            *(uint64_t *)value = get64(p);
        return len == 8;
    case BOOL:
        if (len == 8)
            *(bool *)value = get64(p) != 0;
        return len == 8;
    case SLICE:
        *(struct slice *)value = (struct slice){p, len};
        return true;
    case FIXED16:
        if (len == 16)
            memcpy(value, p, 16);
        return len == 16;
    case ARGS:
        if (*count == f->max)
            return false;
        ((struct slice *)value)[(*count)++] = (struct slice){p, len};
        return true;
    case ENTRIES:
        return *count < f->max && get_entry(p, len, (struct msg_entry *)value + (*count)++);
    }
    return false;
}

static const struct field *find(const struct field *fields, size_t n, uint8_t tag)
{
    for (size_t i = 0; i < n; i++)
        if (fields[i].tag == tag)
            return &fields[i];
    return NULL;
}

static int decode(const uint8_t *data, size_t len, const struct field *fields, size_t n, void *m)
{
    uint64_t seen = 0; // tags are below 64
    for (size_t at = 0; at < len;) {
        if (len - at < 5)
            return -1;
        const uint8_t tag = data[at];
        const size_t size = (size_t)data[at + 1] | (size_t)data[at + 2] << 8 | (size_t)data[at + 3] << 16 |
                            (size_t)data[at + 4] << 24;
        at += 5;
        if (size > len - at)
            return -1;
        const struct field *f = find(fields, n, tag);
        const bool list = f && (f->kind == ARGS || f->kind == ENTRIES);
        if (f && !list && (seen >> tag & 1))
            return -1;
        if (f && !decode_value(f, data + at, size, m))
            return -1;
        if (f)
            seen |= 1ull << tag;
        at += size;
    }
    for (size_t i = 0; i < n; i++)
        if (fields[i].required && !(seen >> fields[i].tag & 1))
            return -1;
    return 0;
}

#define MESSAGE(name, fields)                                                                                          \
    int name##_encode(struct buf *out, const struct name *m)                                                           \
    {                                                                                                                  \
        return encode(out, fields, sizeof fields / sizeof *fields, m);                                                 \
    }                                                                                                                  \
    int name##_decode(const uint8_t *data, size_t len, struct name *ret_m)                                             \
    {                                                                                                                  \
        memset(ret_m, 0, sizeof *ret_m);                                                                               \
        return decode(data, len, fields, sizeof fields / sizeof *fields, ret_m);                                       \
    }

// ---- the messages: tags are pinned ----------------------------------------------------------------------------------
static const struct field HELLO[] = {
    F(1, U64, true, msg_hello, port),           F(2, U64, true, msg_hello, version_min),
    F(3, U64, true, msg_hello, version_max),    F(4, FIXED16, true, msg_hello, session),
    F(5, U64, false, msg_hello, wall_ms),       F(6, SLICE, false, msg_hello, hostname),
};
MESSAGE(msg_hello, HELLO)

static const struct field HELLO_REPLY[] = {
    F(1, U64, true, msg_hello_reply, port),           F(2, U64, true, msg_hello_reply, version),
    F(3, U64, true, msg_hello_reply, features),       F(4, SLICE, false, msg_hello_reply, agent_version),
    F(5, SLICE, false, msg_hello_reply, kernel),      F(6, SLICE, false, msg_hello_reply, boot_id),
    F(7, U64, false, msg_hello_reply, uptime_ms),     F(8, U64, false, msg_hello_reply, n_commands),
};
MESSAGE(msg_hello_reply, HELLO_REPLY)

static const struct field RUN[] = {
    F(1, SLICE, true, msg_run, command_id),
    LIST(2, ARGS, msg_run, args, n_args, MSG_ARGS_MAX),
    LIST(3, ARGS, msg_run, env, n_env, MSG_ARGS_MAX),
    F(4, SLICE, false, msg_run, cwd),
    F(5, SLICE, true, msg_run, user),
    F(6, U64, true, msg_run, timeout_ms),
    F(7, BOOL, false, msg_run, has_stdin),
    F(8, BOOL, false, msg_run, raw_output),
    F(9, SLICE, false, msg_run, write_dir),
    F(10, BOOL, false, msg_run, make_dir),
    F(11, BOOL, false, msg_run, quiet),
};
MESSAGE(msg_run, RUN)

static const struct field COMMAND[] = {
    F(1, SLICE, true, msg_command, command_id),     F(2, U64, true, msg_command, phase),
    F(3, U64, false, msg_command, outcome),         F(4, U64, false, msg_command, exit_code),
    F(5, U64, false, msg_command, signal),          F(6, U64, false, msg_command, spawn_stage),
    F(7, U64, false, msg_command, spawn_errno),     F(8, U64, false, msg_command, pid),
    F(9, U64, false, msg_command, duration_ms),     F(10, U64, false, msg_command, stdout_bytes),
    F(11, U64, false, msg_command, stderr_bytes),   F(12, U64, false, msg_command, stdin_bytes),
    F(13, U64, false, msg_command, stdin_received), F(14, BOOL, false, msg_command, stdin_closed),
};
MESSAGE(msg_command, COMMAND)

static const struct field OFFSETS[] = {
    F(1, U64, false, msg_offsets, stdout_offset), F(2, U64, false, msg_offsets, stderr_offset),
    F(3, U64, false, msg_offsets, stdin_offset),  F(4, U64, false, msg_offsets, file_offset),
};
MESSAGE(msg_offsets, OFFSETS)

static const struct field SIGNAL[] = {
    F(1, U64, true, msg_signal, signal),
    F(2, BOOL, false, msg_signal, group),
};
MESSAGE(msg_signal, SIGNAL)

static const struct field FILE_OP[] = {
    F(1, U64, true, msg_file, op),          F(2, SLICE, true, msg_file, path),     F(3, SLICE, false, msg_file, to),
    F(4, SLICE, true, msg_file, user),      F(5, U64, false, msg_file, mode),      F(6, BOOL, false, msg_file, mkdirs),
    F(7, BOOL, false, msg_file, recursive), F(8, BOOL, false, msg_file, exclusive), F(9, U64, false, msg_file, offset),
    F(10, U64, false, msg_file, length),    F(11, U64, false, msg_file, depth),
    F(12, U64, false, msg_file, max_entries),
};
MESSAGE(msg_file, FILE_OP)

static const struct field FILE_RESULT[] = {
    F(1, U64, true, msg_file_result, status),      F(2, U64, false, msg_file_result, sys_errno),
    F(3, U64, false, msg_file_result, kind),       F(4, U64, false, msg_file_result, mode),
    F(5, U64, false, msg_file_result, size),       F(6, U64, false, msg_file_result, mtime_ms),
    F(7, U64, false, msg_file_result, uid),        F(8, U64, false, msg_file_result, gid),
    F(9, BOOL, false, msg_file_result, created),   F(10, U64, false, msg_file_result, removed),
    F(11, BOOL, false, msg_file_result, truncated), F(12, SLICE, false, msg_file_result, owner),
    F(13, SLICE, false, msg_file_result, group),   F(14, SLICE, false, msg_file_result, target),
    LIST(15, ENTRIES, msg_file_result, entries, n_entries, MSG_ENTRIES_MAX),
};
MESSAGE(msg_file_result, FILE_RESULT)

static const struct field FROZEN[] = {
    F(1, U64, true, msg_frozen, port),             F(2, U64, false, msg_frozen, disk_bytes),
    F(3, U64, false, msg_frozen, disk_free_bytes), F(4, U64, false, msg_frozen, n_commands),
};
MESSAGE(msg_frozen, FROZEN)

static const struct field REFRESH[] = {
    F(1, FIXED16, true, msg_refresh, generation), F(2, SLICE, false, msg_refresh, seed),
    F(3, U64, false, msg_refresh, wall_ms),       F(4, SLICE, false, msg_refresh, hostname),
    F(5, SLICE, false, msg_refresh, machine_id),  F(6, SLICE, false, msg_refresh, boot_id),
};
MESSAGE(msg_refresh, REFRESH)

static const struct field REFRESHED[] = {
    F(1, FIXED16, true, msg_refreshed, generation), F(2, U64, true, msg_refreshed, done),
    F(3, U64, false, msg_refreshed, wall_ms),       F(4, SLICE, false, msg_refreshed, hostname),
    F(5, SLICE, false, msg_refreshed, machine_id),  F(6, SLICE, false, msg_refreshed, boot_id),
    F(7, SLICE, false, msg_refreshed, random),      F(8, SLICE, false, msg_refreshed, fault),
};
MESSAGE(msg_refreshed, REFRESHED)

// ---- data -------------------------------------------------------------------------------------------------------
void msg_data_header(uint8_t out[MSG_DATA_HEADER], uint64_t stream, uint64_t offset)
{
    put64(out, stream);
    put64(out + 8, offset);
}

int msg_data_decode(const uint8_t *data, size_t len, struct msg_data *ret_m)
{
    if (len < MSG_DATA_HEADER)
        return -1;
    *ret_m = (struct msg_data){get64(data), get64(data + 8), {data + MSG_DATA_HEADER, len - MSG_DATA_HEADER}};
    return 0;
}

const char *msg_feature_name(uint64_t bit)
{
    switch (bit) {
    case MSG_FEATURE_COMMANDS:
        return "commands";
    case MSG_FEATURE_FILES:
        return "files";
    case MSG_FEATURE_STDIN:
        return "stdin";
    case MSG_FEATURE_FREEZE:
        return "freeze";
    case MSG_FEATURE_REFRESH:
        return "refresh";
    case MSG_FEATURE_SHUTDOWN:
        return "shutdown";
    case MSG_FEATURE_EARLY_BULK:
        return "early_bulk";
    default:
        return NULL;
    }
}
