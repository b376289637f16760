#include "feed.h"
#include "proto/msg.h"

// Room for what an encoder adds to what was decoded: every field that was left out, each list entry's fixed part.
#define ENCODED_MAX (1u << 20)

static void within(struct slice s, const uint8_t *data, size_t len)
{
    if (s.len == 0)
        return;
    CLAIM(s.data >= data && s.len <= len && s.data + s.len <= data + len);
}

static void slices_run(const struct msg_run *m, const uint8_t *data, size_t len)
{
    CLAIM(m->n_args <= MSG_ARGS_MAX && m->n_env <= MSG_ARGS_MAX);
    within(m->command_id, data, len);
    within(m->cwd, data, len);
    within(m->user, data, len);
    within(m->write_dir, data, len);
    for (size_t i = 0; i < m->n_args; i++)
        within(m->args[i], data, len);
    for (size_t i = 0; i < m->n_env; i++)
        within(m->env[i], data, len);
}

static void slices_file_result(const struct msg_file_result *m, const uint8_t *data, size_t len)
{
    CLAIM(m->n_entries <= MSG_ENTRIES_MAX);
    within(m->owner, data, len);
    within(m->group, data, len);
    within(m->target, data, len);
    for (size_t i = 0; i < m->n_entries; i++) {
        within(m->entries[i].name, data, len);
        within(m->entries[i].target, data, len);
    }
}

static void slices_hello(const struct msg_hello *m, const uint8_t *data, size_t len)
{
    within(m->hostname, data, len);
}

static void slices_hello_reply(const struct msg_hello_reply *m, const uint8_t *data, size_t len)
{
    within(m->agent_version, data, len);
    within(m->kernel, data, len);
    within(m->boot_id, data, len);
}

static void slices_command(const struct msg_command *m, const uint8_t *data, size_t len)
{
    within(m->command_id, data, len);
}

static void slices_file(const struct msg_file *m, const uint8_t *data, size_t len)
{
    within(m->path, data, len);
    within(m->to, data, len);
    within(m->user, data, len);
}

static void slices_refresh(const struct msg_refresh *m, const uint8_t *data, size_t len)
{
    within(m->seed, data, len);
    within(m->hostname, data, len);
    within(m->machine_id, data, len);
    within(m->boot_id, data, len);
}

static void slices_refreshed(const struct msg_refreshed *m, const uint8_t *data, size_t len)
{
    within(m->hostname, data, len);
    within(m->machine_id, data, len);
    within(m->boot_id, data, len);
    within(m->random, data, len);
    within(m->fault, data, len);
}

static void slices_frozen(const struct msg_frozen *m, const uint8_t *data, size_t len)
{
    (void)m, (void)data, (void)len;
}

static void slices_offsets(const struct msg_offsets *m, const uint8_t *data, size_t len)
{
    (void)m, (void)data, (void)len;
}

static void slices_signal(const struct msg_signal *m, const uint8_t *data, size_t len)
{
    (void)m, (void)data, (void)len;
}

// What was accepted must be said again in one form, which decodes to itself.
#define ROUND(name)                                                                                                    \
    static void round_##name(const uint8_t *data, size_t len)                                                          \
    {                                                                                                                  \
        static struct msg_##name m, again; /* tens of KiB */                                                           \
        struct buf one = BUF_INIT(ENCODED_MAX), two = BUF_INIT(ENCODED_MAX);                                           \
        if (msg_##name##_decode(data, len, &m) != 0)                                                                   \
            return;                                                                                                    \
        slices_##name(&m, data, len);                                                                                  \
        CLAIM(msg_##name##_encode(&one, &m) == 0);                                                                     \
        CLAIM(msg_##name##_decode(one.data, one.len, &again) == 0);                                                    \
        slices_##name(&again, one.data, one.len);                                                                      \
        CLAIM(msg_##name##_encode(&two, &again) == 0);                                                                 \
        CLAIM(one.len == two.len && memcmp(one.data, two.data, one.len) == 0);                                         \
        buf_free(&two);                                                                                                \
        /* One byte less than it needs: refused, and nothing is written past the end. */                              \
        buf_init(&two, one.len - 1);                                                                                   \
        CLAIM(msg_##name##_encode(&two, &m) == -1 && two.len < one.len);                                               \
        buf_free(&two);                                                                                                \
        buf_free(&one);                                                                                                \
    }
ROUND(hello)
ROUND(hello_reply)
ROUND(run)
ROUND(command)
ROUND(offsets)
ROUND(signal)
ROUND(file)
ROUND(file_result)
ROUND(frozen)
ROUND(refresh)
ROUND(refreshed)

static void round_data(const uint8_t *data, size_t len)
{
    struct msg_data m;
    uint8_t head[MSG_DATA_HEADER];
    if (msg_data_decode(data, len, &m) != 0) {
        CLAIM(len < MSG_DATA_HEADER);
        return;
    }
    within(m.bytes, data, len);
    CLAIM(m.bytes.len == len - MSG_DATA_HEADER);
    msg_data_header(head, m.stream, m.offset);
    CLAIM(memcmp(head, data, sizeof head) == 0);
}

static void by_type_host(uint8_t type, const uint8_t *data, size_t len)
{
    if (type == FRAME_HELLO_REPLY)
        round_hello_reply(data, len);
    else if (type == FRAME_COMMAND_STATE || type == FRAME_STARTED || type == FRAME_EXITED)
        round_command(data, len);
    else if (type == FRAME_OUTPUT || type == FRAME_FILE_DATA)
        round_data(data, len);
    else if (type == FRAME_STDIN_CREDIT || type == FRAME_FILE_CREDIT)
        round_offsets(data, len);
    else if (type == FRAME_FILE_RESULT || type == FRAME_FILE_INFO)
        round_file_result(data, len);
    else if (type == FRAME_FROZEN)
        round_frozen(data, len);
    else if (type == FRAME_REFRESHED)
        round_refreshed(data, len);
}

static void by_type_guest(uint8_t type, const uint8_t *data, size_t len)
{
    if (type == FRAME_HELLO)
        round_hello(data, len);
    else if (type == FRAME_RUN)
        round_run(data, len);
    else if (type == FRAME_ATTACH || type == FRAME_ACK || type == FRAME_FILE_CREDIT)
        round_offsets(data, len);
    else if (type == FRAME_SIGNAL)
        round_signal(data, len);
    else if (type == FRAME_STDIN || type == FRAME_FILE_DATA)
        round_data(data, len);
    else if (type == FRAME_FILE)
        round_file(data, len);
    else if (type == FRAME_REFRESH)
        round_refresh(data, len);
}

void message_check(enum frame_side receiver, uint8_t type, const uint8_t *payload, size_t len)
{
    uint8_t *copy = exact_copy(payload, len);
    if (receiver == FRAME_SIDE_HOST)
        by_type_host(type, copy, len);
    else
        by_type_guest(type, copy, len);
    free(copy);
}
