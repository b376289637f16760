// The messages: what is encoded is decoded, what is cut, doubled or too much is refused, what is new is skipped.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/frame.h"
#include "proto/msg.h"

#define S(text) ((struct slice){(const uint8_t *)(text), sizeof(text) - 1})

static void assert_slice(struct slice s, const char *text)
{
    assert_int_equal(s.len, strlen(text));
    assert_memory_equal(s.data, text, s.len);
}

// The exact bytes in memory of their own, so that a sanitizer sees any read past them.
static uint8_t *exact(const struct buf *b, size_t len)
{
    uint8_t *copy = malloc(len ? len : 1);
    memcpy(copy, b->data, len);
    return copy;
}

typedef int (*decoder)(const uint8_t *data, size_t len, void *m);

static int d_hello(const uint8_t *p, size_t n, void *m) { return msg_hello_decode(p, n, m); }
static int d_reply(const uint8_t *p, size_t n, void *m) { return msg_hello_reply_decode(p, n, m); }
static int d_run(const uint8_t *p, size_t n, void *m) { return msg_run_decode(p, n, m); }
static int d_command(const uint8_t *p, size_t n, void *m) { return msg_command_decode(p, n, m); }
static int d_offsets(const uint8_t *p, size_t n, void *m) { return msg_offsets_decode(p, n, m); }
static int d_signal(const uint8_t *p, size_t n, void *m) { return msg_signal_decode(p, n, m); }
static int d_file(const uint8_t *p, size_t n, void *m) { return msg_file_decode(p, n, m); }
static int d_result(const uint8_t *p, size_t n, void *m) { return msg_file_result_decode(p, n, m); }
static int d_frozen(const uint8_t *p, size_t n, void *m) { return msg_frozen_decode(p, n, m); }
static int d_refresh(const uint8_t *p, size_t n, void *m) { return msg_refresh_decode(p, n, m); }
static int d_refreshed(const uint8_t *p, size_t n, void *m) { return msg_refreshed_decode(p, n, m); }

union any {
    struct msg_hello hello;
    struct msg_hello_reply reply;
    struct msg_run run;
    struct msg_command command;
    struct msg_offsets offsets;
    struct msg_signal signal;
    struct msg_file file;
    struct msg_file_result result;
    struct msg_frozen frozen;
    struct msg_refresh refresh;
    struct msg_refreshed refreshed;
};
static union any m, back;

static const struct msg_hello HELLO = {.port = MSG_PORT_BULK, .version_min = 1, .version_max = 3,
                                       .session = "fifteen bytes..", .wall_ms = -5, .hostname = {(const uint8_t *)"box", 3}};
static const struct msg_refresh REFRESH = {.generation = "fifteen of 16..", .wall_ms = 1700000000001,
                                           .seed = {(const uint8_t *)"0123456789abcdef0123456789abcde\xff", 32},
                                           .hostname = {(const uint8_t *)"box", 3},
                                           .machine_id = {(const uint8_t *)"0123456789abcdef0123456789abcdef", 32}};
static const struct msg_command COMMAND = {.command_id = {(const uint8_t *)"cmd1", 4}, .phase = 2, .outcome = 2,
                                           .exit_code = -1, .signal = 9, .spawn_stage = 1, .spawn_errno = 2, .pid = 77,
                                           .duration_ms = 12345, .stdout_bytes = 1ull << 40, .stderr_bytes = 3,
                                           .stdin_bytes = 4};
static const struct msg_file FILE_OP = {.op = MSG_FILE_MOVE, .path = {(const uint8_t *)"/a", 2},
                                        .to = {(const uint8_t *)"/b", 2}, .user = {(const uint8_t *)"sandbox", 7},
                                        .mode = 0755, .mkdirs = true, .recursive = true, .exclusive = true,
                                        .offset = 1, .length = 2, .depth = 3, .max_entries = 4};

// Fills `any` samples; one buffer per kind.
static int sample(int kind, struct buf *out, decoder *ret)
{
    static const decoder DECODERS[] = {d_hello, d_reply, d_run, d_command, d_offsets, d_signal, d_file, d_result,
                                       d_frozen, d_refresh, d_refreshed};
    memset(&m, 0, sizeof m);
    *ret = DECODERS[kind];
    switch (kind) {
    case 0:
        return msg_hello_encode(out, &HELLO);
    case 1:
        m.reply = (struct msg_hello_reply){.port = 1, .version = 1, .features = 15, .agent_version = S("0.1.0"),
                                           .kernel = S("6.1"), .boot_id = S("b"), .uptime_ms = 5, .n_commands = 6};
        return msg_hello_reply_encode(out, &m.reply);
    case 2:
        m.run = (struct msg_run){.command_id = S("cmd"), .args = {S("sh"), S(""), S("x")}, .n_args = 3, .env = {S("A=1")},
                                 .n_env = 1, .cwd = S("/work"), .user = S("root"), .timeout_ms = 9, .has_stdin = true,
                                 .raw_output = true, .write_dir = S("/tmp")};
        return msg_run_encode(out, &m.run);
    case 3:
        return msg_command_encode(out, &COMMAND);
    case 4:
        m.offsets = (struct msg_offsets){1, 2, 3, UINT64_MAX};
        return msg_offsets_encode(out, &m.offsets);
    case 5:
        m.signal = (struct msg_signal){15, true};
        return msg_signal_encode(out, &m.signal);
    case 6:
        return msg_file_encode(out, &FILE_OP);
    case 8:
        m.frozen = (struct msg_frozen){MSG_PORT_BULK, 1ull << 40, 5, 6};
        return msg_frozen_encode(out, &m.frozen);
    case 9:
        return msg_refresh_encode(out, &REFRESH);
    case 10:
        m.refreshed = (struct msg_refreshed){.generation = "a generation...", .done = MSG_REFRESH_ALL, .wall_ms = -7,
                                             .hostname = S("h"), .machine_id = S("m"), .boot_id = S("b"), .random = S("r"),
                                             .fault = S("clock: no")};
        return msg_refreshed_encode(out, &m.refreshed);
    default:
        m.result = (struct msg_file_result){.status = MSG_FILE_EXISTS, .sys_errno = 17, .kind = 1, .mode = 0644, .size = 5,
                                            .mtime_ms = -1, .uid = 1000, .gid = 1001, .created = true, .removed = 8,
                                            .truncated = true, .owner = S("o"), .group = S("g"), .target = S("t"),
                                            .n_entries = 2};
        m.result.entries[0] = (struct msg_entry){.name = S("n"), .kind = 3, .mode = 0777, .size = 1, .mtime_ms = -2,
                                                 .uid = 3, .gid = 4, .target = S("where")};
        m.result.entries[1] = (struct msg_entry){.name = S(""), .kind = 1};
        return msg_file_result_encode(out, &m.result);
    }
}
#define KINDS 11

static void round_trips(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    decoder d;
    for (int kind = 0; kind < KINDS; kind++) { // encode, decode, encode again: the same bytes
        CLEANUP_BUF struct buf again = BUF_INIT(FRAME_PAYLOAD_MAX);
        buf_clear(&b);
        assert_int_equal(sample(kind, &b, &d), 0);
        assert_int_equal(d(b.data, b.len, &back), 0);
        int (*const ENCODE[])(struct buf *, const void *) = {
            (int (*)(struct buf *, const void *))msg_hello_encode, (int (*)(struct buf *, const void *))msg_hello_reply_encode,
            (int (*)(struct buf *, const void *))msg_run_encode, (int (*)(struct buf *, const void *))msg_command_encode,
            (int (*)(struct buf *, const void *))msg_offsets_encode, (int (*)(struct buf *, const void *))msg_signal_encode,
            (int (*)(struct buf *, const void *))msg_file_encode,
            (int (*)(struct buf *, const void *))msg_file_result_encode, (int (*)(struct buf *, const void *))msg_frozen_encode,
            (int (*)(struct buf *, const void *))msg_refresh_encode, (int (*)(struct buf *, const void *))msg_refreshed_encode};
        assert_int_equal(ENCODE[kind](&again, &back), 0);
        assert_int_equal(again.len, b.len);
        assert_memory_equal(again.data, b.data, b.len);
    }
}

static void values_arrive(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    decoder d;
    assert_int_equal(sample(0, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_int_equal(back.hello.wall_ms, -5);
    assert_memory_equal(back.hello.session, HELLO.session, 16);
    assert_slice(back.hello.hostname, "box");
    buf_clear(&b);
    assert_int_equal(sample(2, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_int_equal(back.run.n_args, 3);
    assert_slice(back.run.args[1], "");
    assert_slice(back.run.env[0], "A=1");
    assert_true(back.run.has_stdin && back.run.raw_output);
    buf_clear(&b);
    assert_int_equal(sample(7, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_int_equal(back.result.n_entries, 2);
    assert_slice(back.result.entries[0].target, "where");
    assert_int_equal(back.result.entries[0].mtime_ms, -2);
    assert_true(back.result.created && back.result.truncated);
}

static void a_refresh_and_its_answer_arrive(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    decoder d;
    assert_int_equal(sample(8, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_int_equal(back.frozen.port, MSG_PORT_BULK);
    assert_int_equal(back.frozen.disk_bytes, 1ull << 40);
    assert_int_equal(back.frozen.disk_free_bytes, 5);
    assert_int_equal(back.frozen.n_commands, 6);
    buf_clear(&b);
    assert_int_equal(sample(9, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_memory_equal(back.refresh.generation, REFRESH.generation, 16);
    assert_int_equal(back.refresh.seed.len, MSG_SEED_BYTES);
    assert_int_equal(back.refresh.wall_ms, REFRESH.wall_ms);
    assert_slice(back.refresh.hostname, "box");
    assert_slice(back.refresh.machine_id, "0123456789abcdef0123456789abcdef");
    assert_slice(back.refresh.boot_id, "");
    buf_clear(&b);
    assert_int_equal(sample(10, &b, &d), 0);
    assert_int_equal(d(b.data, b.len, &back), 0);
    assert_int_equal(back.refreshed.done, MSG_REFRESH_ALL);
    assert_int_equal(back.refreshed.wall_ms, -7);
    assert_slice(back.refreshed.random, "r");
    assert_slice(back.refreshed.fault, "clock: no");
}

// Every shorter payload is refused, or is a whole message that says less.
static void every_truncation(void **state)
{
    for (int kind = 0; kind < KINDS; kind++) {
        CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
        decoder d;
        unsigned accepted = 0;
        assert_int_equal(sample(kind, &b, &d), 0);
        for (size_t len = 0; len < b.len; len++) {
            uint8_t *copy = exact(&b, len);
            accepted += d(copy, len, &back) == 0;
            free(copy);
        }
        assert_true(accepted < 20); // only at the ends of fields
        assert_true(kind == 4 || d(b.data, 0, &back) != 0); // only offsets have no required field
    }
}

static void flipped_bytes_are_harmless(void **state)
{
    unsigned seed = 7;
    for (int kind = 0; kind < KINDS; kind++) {
        CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
        decoder d;
        assert_int_equal(sample(kind, &b, &d), 0);
        for (int round = 0; round < 3000; round++) {
            uint8_t *copy = exact(&b, b.len);
            for (int n = rand_r(&seed) % 4; n >= 0; n--)
                copy[(size_t)rand_r(&seed) % b.len] = (uint8_t)rand_r(&seed);
            (void)d(copy, b.len, &back);
            free(copy);
        }
    }
}

static void add_field(struct buf *b, uint8_t tag, const void *data, uint32_t len)
{
    const uint8_t head[5] = {tag, (uint8_t)len, (uint8_t)(len >> 8), (uint8_t)(len >> 16), (uint8_t)(len >> 24)};
    assert_true(buf_add(b, head, 5) && buf_add(b, data, len));
}

static void unknown_tags_are_skipped(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    add_field(&b, 200, "something new", 13);
    add_field(&b, 0, "", 0);
    add_field(&b, 1, "\x0f\0\0\0\0\0\0\0", 8);
    add_field(&b, 63, "x", 1);
    add_field(&b, 200, "twice", 5);
    assert_int_equal(msg_signal_decode(b.data, b.len, &back.signal), 0);
    assert_int_equal(back.signal.signal, 15);
    assert_false(back.signal.group);
}

static void doubles_and_wrong_sizes_are_refused(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    add_field(&b, 1, "\x0f\0\0\0\0\0\0\0", 8);
    add_field(&b, 1, "\x0f\0\0\0\0\0\0\0", 8);
    assert_int_equal(msg_signal_decode(b.data, b.len, &back.signal), -1);
    buf_clear(&b);
    add_field(&b, 1, "\x0f\0\0\0", 4);
    assert_int_equal(msg_signal_decode(b.data, b.len, &back.signal), -1);
    buf_clear(&b);
    add_field(&b, 1, "\x0f\0\0\0\0\0\0\0", 8);
    add_field(&b, 2, "\1", 1);
    assert_int_equal(msg_signal_decode(b.data, b.len, &back.signal), -1);
    buf_clear(&b);
    assert_int_equal(msg_hello_encode(&b, &HELLO), 0);
    add_field(&b, 6, "a", 1);
    assert_int_equal(msg_hello_decode(b.data, b.len, &back.hello), -1);
}

static void malformed_refreshes_are_refused(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    add_field(&b, 3, "\1\0\0\0\0\0\0\0", 8); // no generation
    assert_int_equal(msg_refresh_decode(b.data, b.len, &back.refresh), -1);
    add_field(&b, 1, "fifteen bytes..", 15);
    assert_int_equal(msg_refresh_decode(b.data, b.len, &back.refresh), -1);
    buf_clear(&b);
    add_field(&b, 1, "sixteen bytes...", 16);
    assert_int_equal(msg_refresh_decode(b.data, b.len, &back.refresh), 0); // asks for nothing
    assert_true(back.refresh.seed.len == 0 && back.refresh.wall_ms == 0 && back.refresh.boot_id.len == 0);
    assert_int_equal(msg_refreshed_decode(b.data, b.len, &back.refreshed), -1); // says nothing of what was done
    add_field(&b, 2, "seed", 4);
    add_field(&b, 2, "seed", 4);
    assert_int_equal(msg_refresh_decode(b.data, b.len, &back.refresh), -1);
    assert_int_equal(msg_refreshed_decode(b.data, b.len, &back.refreshed), -1);
    buf_clear(&b);
    add_field(&b, 2, "\1\0\0\0\0\0\0\0", 8); // no port
    assert_int_equal(msg_frozen_decode(b.data, b.len, &back.frozen), -1);
    add_field(&b, 1, "\1", 1);
    assert_int_equal(msg_frozen_decode(b.data, b.len, &back.frozen), -1);
}

static void counts_are_limited(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX), c = BUF_INIT(FRAME_PAYLOAD_MAX);
    memset(&m, 0, sizeof m);
    m.run = (struct msg_run){.command_id = S("c"), .user = S("u"), .n_args = MSG_ARGS_MAX};
    for (size_t i = 0; i < MSG_ARGS_MAX; i++)
        m.run.args[i] = S("a");
    assert_int_equal(msg_run_encode(&b, &m.run), 0);
    assert_int_equal(msg_run_decode(b.data, b.len, &back.run), 0);
    assert_int_equal(back.run.n_args, MSG_ARGS_MAX);
    add_field(&b, 2, "one more", 8);
    assert_int_equal(msg_run_decode(b.data, b.len, &back.run), -1);
    m.run.n_args = MSG_ARGS_MAX + 1;
    assert_int_equal(msg_run_encode(&c, &m.run), -1);

    buf_clear(&b);
    memset(&m, 0, sizeof m);
    m.result.n_entries = MSG_ENTRIES_MAX;
    for (size_t i = 0; i < MSG_ENTRIES_MAX; i++)
        m.result.entries[i].name = S("e");
    assert_int_equal(msg_file_result_encode(&b, &m.result), 0);
    assert_int_equal(msg_file_result_decode(b.data, b.len, &back.result), 0);
    assert_int_equal(back.result.n_entries, MSG_ENTRIES_MAX);
    uint8_t entry[56] = {0};
    add_field(&b, 15, entry, sizeof entry);
    assert_int_equal(msg_file_result_decode(b.data, b.len, &back.result), -1);
}

static void entries_stay_within_their_field(void **state)
{
    uint8_t entry[60] = {0};
    for (uint64_t n = 0; n < 10; n++) {
        CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
        add_field(&b, 1, "\0\0\0\0\0\0\0\0", 8);
        entry[48] = (uint8_t)n;
        add_field(&b, 15, entry, sizeof entry);
        assert_int_equal(msg_file_result_decode(b.data, b.len, &back.result), n <= 4 ? 0 : -1);
    }
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    add_field(&b, 1, "\0\0\0\0\0\0\0\0", 8);
    add_field(&b, 15, entry, 55);
    assert_int_equal(msg_file_result_decode(b.data, b.len, &back.result), -1);
}

static void encoders_stay_within_the_buffer(void **state)
{
    for (int kind = 0; kind < KINDS; kind++) {
        CLEANUP_BUF struct buf whole = BUF_INIT(FRAME_PAYLOAD_MAX);
        decoder d;
        assert_int_equal(sample(kind, &whole, &d), 0);
        for (size_t max = 0; max < whole.len; max++) {
            CLEANUP_BUF struct buf b = BUF_INIT(max);
            assert_int_equal(sample(kind, &b, &d), -1);
            assert_true(b.len <= max);
        }
    }
}

// The largest RUN the product admits fits a frame.
static void largest_run_fits(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(FRAME_PAYLOAD_MAX);
    static uint8_t text[120];
    memset(text, 'x', sizeof text);
    memset(&m, 0, sizeof m);
    m.run = (struct msg_run){.command_id = S("cmd01234567890123456789012345"), .user = S("sandbox"), .n_args = MSG_ARGS_MAX,
                             .n_env = MSG_ARGS_MAX};
    for (size_t i = 0; i < MSG_ARGS_MAX; i++)
        m.run.args[i] = m.run.env[i] = (struct slice){text, sizeof text};
    assert_int_equal(msg_run_encode(&b, &m.run), 0);
    assert_false(frame_has_magic(b.data, b.len));
}

static void data_header(void **state)
{
    uint8_t head[MSG_DATA_HEADER + 3];
    struct msg_data d;
    msg_data_header(head, MSG_STDERR, 0x0102030405060708);
    memcpy(head + MSG_DATA_HEADER, "abc", 3);
    assert_int_equal(msg_data_decode(head, sizeof head, &d), 0);
    assert_int_equal(d.stream, MSG_STDERR);
    assert_int_equal(d.offset, 0x0102030405060708);
    assert_slice(d.bytes, "abc");
    assert_int_equal(msg_data_decode(head, MSG_DATA_HEADER, &d), 0);
    assert_int_equal(d.bytes.len, 0);
    for (size_t n = 0; n < MSG_DATA_HEADER; n++)
        assert_int_equal(msg_data_decode(head, n, &d), -1);
}

static void features_have_names(void **state)
{
    assert_string_equal(msg_feature_name(MSG_FEATURE_COMMANDS), "commands");
    assert_string_equal(msg_feature_name(MSG_FEATURE_FILES), "files");
    assert_string_equal(msg_feature_name(MSG_FEATURE_STDIN), "stdin");
    assert_string_equal(msg_feature_name(MSG_FEATURE_SHUTDOWN), "shutdown");
    assert_string_equal(msg_feature_name(MSG_FEATURE_FREEZE), "freeze");
    assert_string_equal(msg_feature_name(MSG_FEATURE_REFRESH), "refresh");
    assert_string_equal(msg_feature_name(MSG_FEATURE_EARLY_BULK), "early_bulk");
    assert_null(msg_feature_name(1ull << 40));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips),
        cmocka_unit_test(values_arrive),
        cmocka_unit_test(a_refresh_and_its_answer_arrive),
        cmocka_unit_test(every_truncation),
        cmocka_unit_test(flipped_bytes_are_harmless),
        cmocka_unit_test(unknown_tags_are_skipped),
        cmocka_unit_test(doubles_and_wrong_sizes_are_refused),
        cmocka_unit_test(malformed_refreshes_are_refused),
        cmocka_unit_test(counts_are_limited),
        cmocka_unit_test(entries_stay_within_their_field),
        cmocka_unit_test(encoders_stay_within_the_buffer),
        cmocka_unit_test(largest_run_fits),
        cmocka_unit_test(data_header),
        cmocka_unit_test(features_have_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
