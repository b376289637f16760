// A VM over its sockets, with a process in QEMU's place: adoption, the session with the agent, what is sent, the end.
// Longer than 600 lines: one VM with one stand-in from its adoption to its end; the monitor has test_vm_qmp.c.
#include "stand_in.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/limits.h"
#include "qemu/process.h"

static struct stand_in *begin(void)
{
    struct stand_in *s = stand_in_new();
    stand_in_adopt(s);
    return s;
}

static struct stand_in *begin_ready(void)
{
    struct stand_in *s = begin();
    stand_in_session(s);
    return s;
}

static void finish(struct stand_in *s)
{
    loop_settle(s->loop);
    char *rest = notes_rest(&s->notes);
    assert_string_equal(rest, "");
    free(rest);
    stand_in_free(s);
}

#define assert_err(err, k, c)                                                                                          \
    do {                                                                                                               \
        assert_int_equal((err).kind, (k));                                                                             \
        assert_string_equal((err).code, (c));                                                                          \
    } while (0)

// ---- adoption ---------------------------------------------------------------------------------------------------------
static void only_the_same_process_is_adopted(void **state)
{
    struct err err = {0};
    struct stand_in *s = stand_in_new();
    json_t *good = s->runtime;
    // A recycled pid: the same number, another beginning.
    s->runtime = json_deep_copy(good);
    json_put_int(s->runtime, "start", json_get_int(good, "start", 0) + 1);
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_GONE);
    assert_err(err, ERR_TRANSPORT_FAILED, "vm_gone");
    json_decref(s->runtime);
    // A process that is there, but not ours: its command line has no such name.
    s->runtime = json_deep_copy(good);
    json_put_int(s->runtime, "pid", getpid());
    json_put_int(s->runtime, "start", (int64_t)process_start_time(getpid()));
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_GONE);
    json_decref(s->runtime);
    // The host was started again since.
    s->runtime = json_deep_copy(good);
    json_put_str(s->runtime, "boot_id", "00000000-0000-0000-0000-000000000000");
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_HOST_REBOOTED);
    json_decref(s->runtime);
    s->runtime = json_object();
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_HOST_REBOOTED);
    json_decref(s->runtime);
    s->runtime = good;
    assert_null(s->vm);
    stand_in_adopt(s);
    finish(s);
}

static void a_process_that_ended_is_gone(void **state)
{
    struct err err = {0};
    struct stand_in *s = stand_in_new();
    // Dead, though nobody has waited for it yet.
    assert_int_equal(kill(s->pid, SIGKILL), 0);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)s->pid, &info, WEXITED | WNOWAIT), 0);
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_GONE);
    stand_in_reap(s);
    assert_int_equal(stand_in_try(s, &err), VM_ADOPT_GONE);
    finish(s);
}

// A server that starts with few descriptors left does not take a VM for gone.
static void a_look_that_fails_is_no_end(void **state)
{
    struct stand_in *s = stand_in_new();
    struct rlimit all, few;
    int v = VM_ADOPT_FAILED, spare = 0;
    const int lowest = fcntl(s->dirfd, F_DUPFD_CLOEXEC, 3);
    close(lowest);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &all), 0);
    few = all;
    for (; spare < 12 && v == VM_ADOPT_FAILED; spare++) {
        struct err err = {0};
        few.rlim_cur = (rlim_t)(lowest + spare);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
        v = stand_in_try(s, &err);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &all), 0);
        assert_true(v == VM_ADOPTED || err.sys_errno == EMFILE);
        if (v != VM_ADOPTED) { // also one that could be held, and not spoken with
            vm_free(s->vm);
            s->vm = NULL;
        }
    }
    assert_int_equal(v, VM_ADOPTED);
    assert_true(spare > 4);
    assert_int_equal(kill(s->pid, 0), 0);
    stand_in_free(s);
}

static void a_second_server_goes_on_where_the_first_left(void **state)
{
    struct stand_in *s = begin_ready();
    uint8_t first[16];
    memcpy(first, s->session, sizeof first);
    json_t *runtime = vm_runtime(s->vm);
    assert_true(json_equal(runtime, s->runtime));
    json_decref(s->runtime);
    s->runtime = runtime;
    stand_in_leave(s);
    assert_int_equal(kill(s->pid, 0), 0); // the process is not touched
    stand_in_adopt(s);
    stand_in_session(s);
    assert_memory_not_equal(first, s->session, sizeof first);
    finish(s);
}

// ---- the session ------------------------------------------------------------------------------------------------------
struct refresh {
    struct vm *vm;
    int failed;
    struct vm_refreshed said;
    struct err err;
};

static void *run_refresh(void *arg)
{
    struct refresh *r = arg;
    const struct vm_identity id = {.clock = true};
    r->failed = vm_refresh(r->vm, &id, PEER_MS, &r->said, &r->err);
    return NULL;
}

// What a guest says its clock is can be any number.
static void a_clock_far_off_is_not_set(void **state)
{
    const int64_t now = clock_wall_ms();
    const struct {
        int64_t wall_ms;
        bool good;
    } CASES[] = {{INT64_MIN, false}, {INT64_MAX, false}, {-now, false}, {0, false}, {now - 60000, false}, {-1, true}};
    struct stand_in *s = begin();
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, STAND_IN_FEATURES | MSG_FEATURE_REFRESH);
    peer_frame(&s->control, FRAME_READY, 0, 0, NULL, 0);
    stand_in_take(s, s->bulk_listen, MSG_PORT_BULK, &s->bulk);
    stand_in_reply(&s->bulk, MSG_PORT_BULK, PROTO_VERSION_MAX, STAND_IN_FEATURES | MSG_FEATURE_REFRESH);
    notes_until(&s->notes, "ready version 1 agent 0.1.0 kernel 6.1.0 boot boot up 42");
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        CLEANUP_BUF struct buf b = BUF_INIT(1024);
        struct refresh r = {.vm = s->vm};
        struct msg_refresh asked;
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, run_refresh, &r), 0);
        peer_expect(&s->control, FRAME_REFRESH, &s->f);
        assert_int_equal(msg_refresh_decode(s->f.payload, s->f.length, &asked), 0);
        struct msg_refreshed m = {.done = MSG_REFRESH_CLOCK, .wall_ms = CASES[i].good ? clock_wall_ms() : CASES[i].wall_ms};
        memcpy(m.generation, asked.generation, sizeof m.generation);
        assert_int_equal(msg_refreshed_encode(&b, &m), 0);
        peer_frame(&s->control, FRAME_REFRESHED, 0, s->f.id, b.data, b.len);
        assert_int_equal(pthread_join(thread, NULL), 0);
        assert_int_equal(r.failed, CASES[i].good ? 0 : -1);
        if (!CASES[i].good)
            assert_err(r.err, ERR_TRANSPORT_FAILED, "not_unique");
    }
    stand_in_free(s);
}

static void put_command(struct peer *p, uint8_t type, uint64_t id, uint64_t phase, int64_t exit_code)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1024);
    const struct msg_command m = {.command_id = {(const uint8_t *)"cmd1", 4}, .phase = phase, .exit_code = exit_code,
                                  .outcome = phase == MSG_COMMAND_EXITED ? MSG_EXITED : 0};
    assert_int_equal(msg_command_encode(&b, &m), 0);
    peer_frame(p, type, 0, id, b.data, b.len);
}

static void ready_comes_after_the_commands_that_are_there(void **state)
{
    struct stand_in *s = begin();
    struct err err = {0};
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    stand_in_take(s, s->bulk_listen, MSG_PORT_BULK, &s->bulk);
    stand_in_reply(&s->bulk, MSG_PORT_BULK, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    put_command(&s->control, FRAME_COMMAND_STATE, 11, MSG_COMMAND_RUNNING, 0);
    put_command(&s->control, FRAME_COMMAND_STATE, 12, MSG_COMMAND_EXITED, 3);
    notes_expect(&s->notes, "command type 5 id 11 phase 1 exit 0");
    notes_expect(&s->notes, "command type 5 id 12 phase 2 exit 3");
    assert_false(vm_wait_ready(s->vm, clock_mono_ms(), &err)); // not before it has said that these are all
    assert_err(err, ERR_TIMEOUT, "boot_timeout");
    peer_frame(&s->control, FRAME_READY, 0, 0, NULL, 0);
    notes_expect(&s->notes, "ready version 1 agent 0.1.0 kernel 6.1.0 boot boot up 42");
    err = (struct err){0};
    assert_true(vm_wait_ready(s->vm, clock_mono_ms() + PEER_MS, &err));
    assert_int_equal(err.kind, ERR_NONE);
    finish(s);
}

static void ready_needs_both_ports(void **state)
{
    struct stand_in *s = begin();
    struct err err = {0};
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    peer_frame(&s->control, FRAME_READY, 0, 0, NULL, 0);
    stand_in_take(s, s->bulk_listen, MSG_PORT_BULK, &s->bulk);
    loop_settle(s->loop);
    assert_false(vm_wait_ready(s->vm, clock_mono_ms(), &err));
    stand_in_reply(&s->bulk, MSG_PORT_BULK, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    notes_expect(&s->notes, "ready version 1 agent 0.1.0 kernel 6.1.0 boot boot up 42");
    finish(s);
}

static void an_agent_that_does_not_fit_is_refused(void **state)
{
    static const struct {
        uint64_t version, features;
    } CASES[] = {{0, STAND_IN_FEATURES}, {PROTO_VERSION_MAX + 1, STAND_IN_FEATURES},
                 {PROTO_VERSION_MAX, STAND_IN_FEATURES & ~MSG_FEATURE_STDIN}, {PROTO_VERSION_MAX, 0}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct stand_in *s = begin();
        struct err err = {0};
        stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
        stand_in_reply(&s->control, MSG_PORT_CONTROL, CASES[i].version, CASES[i].features);
        assert_false(vm_wait_ready(s->vm, clock_mono_ms() + PEER_MS, &err));
        assert_err(err, ERR_ADMISSION_FAILED, "agent_version");
        assert_non_null(strstr(err.detail, "0.1.0"));
        finish(s);
    }
}

static void features_that_are_new_do_no_harm(void **state)
{
    struct stand_in *s = begin();
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, UINT64_MAX);
    peer_frame(&s->control, FRAME_READY, 0, 0, NULL, 0);
    stand_in_take(s, s->bulk_listen, MSG_PORT_BULK, &s->bulk);
    stand_in_reply(&s->bulk, MSG_PORT_BULK, PROTO_VERSION_MAX, UINT64_MAX);
    notes_expect(&s->notes, "ready version 1 agent 0.1.0 kernel 6.1.0 boot boot up 42");
    finish(s);
}

static void a_fatal_word_ends_the_wait(void **state)
{
    struct stand_in *s = begin();
    struct err err = {0};
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    peer_frame(&s->control, FRAME_FATAL, 0, 0, "root: no such disk", 18);
    assert_false(vm_wait_ready(s->vm, clock_mono_ms() + PEER_MS, &err));
    assert_err(err, ERR_ADMISSION_FAILED, "guest_boot_failed");
    assert_null(strstr(err.detail, "no such disk")); // the guest's words are no detail of ours
    notes_expect(&s->notes, "fatal: root: no such disk");
    stand_in_free(s);
}

static void the_end_of_the_process_ends_the_wait(void **state)
{
    struct stand_in *s = begin();
    struct err err = {0};
    stand_in_kill(s);
    assert_false(vm_wait_ready(s->vm, clock_mono_ms() + PEER_MS, &err));
    assert_err(err, ERR_TRANSPORT_FAILED, "vm_died");
    notes_expect(&s->notes, "gone 2: QEMU ended unexpectedly");
    finish(s);
}

// The session is made anew by itself; what was sent to the old one is void.
static void a_lost_session_is_made_again(void **state)
{
    struct stand_in *s = begin_ready();
    for (int round = 0; round < 2; round++) {
        struct peer *broken = round == 0 ? &s->control : &s->bulk;
        uint8_t old[16];
        memcpy(old, s->session, sizeof old);
        fd_close(&broken->fd);
        notes_expect(&s->notes, "session mute 0 lost 1");
        peer_expect_end(round == 0 ? &s->bulk : &s->control); // both ports or none
        stand_in_session(s);
        assert_memory_not_equal(old, s->session, sizeof old);
    }
    finish(s);
}

static void a_guest_that_breaks_the_protocol_loses_its_session(void **state)
{
    struct stand_in *s = begin_ready();
    peer_frame(&s->bulk, FRAME_OUTPUT, 0, 1, "much too short", 14); // undecodable: nothing happens
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, FRAME_OUTPUT, 0, 1, FRAME_PAYLOAD_MAX);
    h[6] = 255;
    peer_send(&s->bulk, h, sizeof h);
    notes_expect(&s->notes, "session mute 0 lost 1");
    stand_in_session(s);
    finish(s);
}

// ---- what the agent says ----------------------------------------------------------------------------------------------
static void data_frame(struct peer *p, uint8_t type, uint8_t flags, uint64_t id, uint64_t stream, uint64_t offset,
                       const char *text)
{
    uint8_t payload[200];
    const size_t n = strlen(text);
    msg_data_header(payload, stream, offset);
    memcpy(payload + MSG_DATA_HEADER, text, n);
    peer_frame(p, type, flags, id, payload, MSG_DATA_HEADER + n);
}

static void offsets_frame(struct peer *p, uint8_t type, uint64_t id, const struct msg_offsets *m)
{
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    assert_int_equal(msg_offsets_encode(&b, m), 0);
    peer_frame(p, type, 0, id, b.data, b.len);
}

static void result_frame(struct peer *p, uint8_t type, uint8_t flags, uint64_t id, uint64_t status, uint64_t size)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    struct msg_file_result *m = calloc(1, sizeof *m);
    m->status = status;
    m->size = size;
    assert_int_equal(msg_file_result_encode(&b, m), 0);
    free(m);
    peer_frame(p, type, flags, id, b.data, b.len);
}

static void every_frame_has_its_callback(void **state)
{
    struct stand_in *s = begin_ready();
    put_command(&s->control, FRAME_STARTED, 5, MSG_COMMAND_RUNNING, 0);
    notes_expect(&s->notes, "command type 8 id 5 phase 1 exit 0");
    data_frame(&s->bulk, FRAME_OUTPUT, 0, 5, MSG_STDERR, 70, "words");
    notes_expect(&s->notes, "output id 5 stream 2 offset 70: words");
    put_command(&s->control, FRAME_EXITED, 5, MSG_COMMAND_EXITED, 126);
    notes_expect(&s->notes, "command type 9 id 5 phase 2 exit 126");
    offsets_frame(&s->control, FRAME_STDIN_CREDIT, 6, &(struct msg_offsets){.stdin_offset = 99, .file_offset = 1});
    notes_expect(&s->notes, "stdin credit id 6: 99");
    offsets_frame(&s->control, FRAME_FILE_CREDIT, 7, &(struct msg_offsets){.stdin_offset = 1, .file_offset = 98});
    notes_expect(&s->notes, "file credit id 7: 98");
    result_frame(&s->bulk, FRAME_FILE_INFO, 0, 8, MSG_FILE_OK, 1234);
    notes_expect(&s->notes, "file info id 8 size 1234");
    data_frame(&s->bulk, FRAME_FILE_DATA, 0, 8, MSG_FILE, 0, "cont");
    notes_expect(&s->notes, "file data id 8 last 0: cont");
    data_frame(&s->bulk, FRAME_FILE_DATA, FRAME_LAST, 8, MSG_FILE, 4, "ent");
    notes_expect(&s->notes, "file data id 8 last 1: ent");
    result_frame(&s->bulk, FRAME_FILE_RESULT, 0, 8, MSG_FILE_OK, 0);
    notes_expect(&s->notes, "file result id 8 last 0 status 0");
    result_frame(&s->control, FRAME_FILE_RESULT, FRAME_LAST, 9, MSG_FILE_NO_SPACE, 0);
    notes_expect(&s->notes, "file result id 9 last 1 status 8");
    peer_frame(&s->control, FRAME_LOG, 0, 0, "said", 4);
    notes_expect(&s->notes, "agent: said");
    finish(s);
}

static void frames_that_no_guest_sends_are_counted_and_skipped(void **state)
{
    struct stand_in *s = begin_ready();
    struct vm_stats stats;
    peer_frame(&s->control, FRAME_RUN, 0, 1, "x", 1);
    peer_frame(&s->control, 200, 0, 1, NULL, 0);
    peer_frame(&s->control, FRAME_STARTED, 0, 1, "\1\377\377\377\377", 5); // does not decode
    peer_frame(&s->control, FRAME_LOG, 0, 0, "still here", 10);
    notes_expect(&s->notes, "agent: still here");
    vm_stats(s->vm, &stats);
    assert_int_equal(stats.violations, 2);
    assert_int_equal(stats.pid, s->pid);
    finish(s);
}

// ---- what is sent -----------------------------------------------------------------------------------------------------
static void nothing_is_sent_without_a_session(void **state)
{
    struct stand_in *s = begin();
    struct err err = {0};
    assert_int_equal(vm_send(s->vm, FRAME_FORGET, 1, NULL, &err), -1);
    assert_err(err, ERR_TRANSPORT_FAILED, "agent_unreachable");
    assert_int_equal(vm_send_data(s->vm, FRAME_STDIN, 1, MSG_STDIN, 0, "x", 1, true, &err), -1);
    assert_err(err, ERR_TRANSPORT_FAILED, "agent_unreachable");
    stand_in_session(s);
    assert_int_equal(vm_send(s->vm, FRAME_FORGET, 1, NULL, &err), 0);
    peer_expect(&s->control, FRAME_FORGET, &s->f);
    assert_int_equal(s->f.id, 1);
    assert_int_equal(s->f.length, 0);
    fd_close(&s->control.fd);
    notes_expect(&s->notes, "session mute 0 lost 1");
    assert_int_equal(vm_send(s->vm, FRAME_FORGET, 1, NULL, &err), -1);
    finish(s);
}

static void data_is_split_into_frames(void **state)
{
    enum { LEN = 200000 };
    static uint8_t data[LEN];
    struct stand_in *s = begin_ready();
    struct err err = {0};
    for (size_t i = 0; i < LEN; i++)
        data[i] = (uint8_t)(i % 251);
    memcpy(data + 50000, FRAME_MAGIC, FRAME_MAGIC_BYTES); // content may hold it, the stream may not
    assert_int_equal(vm_send_data(s->vm, FRAME_STDIN, 3, MSG_STDIN, 1000, data, LEN, true, &err), 0);
    size_t got = 0;
    bool within = false;
    for (bool last = false; !last;) {
        struct msg_data d;
        peer_expect(&s->bulk, FRAME_STDIN, &s->f); // a new preamble would be FRAME_RESET
        assert_true(s->f.length <= FRAME_DATA_MAX);
        assert_int_equal(msg_data_decode(s->f.payload, s->f.length, &d), 0);
        assert_int_equal(s->f.id, 3);
        assert_int_equal(d.stream, MSG_STDIN);
        assert_int_equal(d.offset, 1000 + got);
        assert_true(d.bytes.len > 0 && got + d.bytes.len <= LEN);
        assert_memory_equal(d.bytes.data, data + got, d.bytes.len);
        got += d.bytes.len;
        within |= got > 50000 && got < 50000 + FRAME_MAGIC_BYTES;
        last = s->f.flags & FRAME_LAST;
        assert_int_equal(last, got == LEN);
    }
    assert_true(within);
    finish(s);
}

static void an_end_without_data_is_one_empty_frame(void **state)
{
    struct stand_in *s = begin_ready();
    struct err err = {0};
    struct msg_data d;
    assert_int_equal(vm_send_data(s->vm, FRAME_STDIN, 3, MSG_STDIN, 7, "", 0, true, &err), 0);
    assert_int_equal(vm_send_data(s->vm, FRAME_FILE_DATA, 4, MSG_FILE, 0, "part", 4, false, &err), 0);
    peer_expect(&s->bulk, FRAME_STDIN, &s->f);
    assert_int_equal(s->f.flags, FRAME_LAST);
    assert_int_equal(msg_data_decode(s->f.payload, s->f.length, &d), 0);
    assert_int_equal(d.offset, 7);
    assert_int_equal(d.bytes.len, 0);
    peer_expect(&s->bulk, FRAME_FILE_DATA, &s->f);
    assert_int_equal(s->f.flags, 0);
    finish(s);
}

static void a_full_queue_is_busy_not_broken(void **state)
{
    static uint8_t data[VM_WINDOW_BYTES];
    struct stand_in *s = begin_ready();
    struct err err = {0};
    unsigned sent = 0;
    while (vm_send_data(s->vm, FRAME_STDIN, 3, MSG_STDIN, (uint64_t)sent * sizeof data, data, sizeof data, false, &err) == 0)
        assert_true(++sent < 40); // the bound is 16 MiB, beside what the socket takes
    assert_err(err, ERR_UNAVAILABLE, "channel_busy");
    assert_true(sent >= 12);
    assert_int_equal(vm_send(s->vm, FRAME_FORGET, 2, NULL, &err), 0); // control goes on
    peer_expect(&s->control, FRAME_FORGET, &s->f);
    finish(s);
}

static void bulk_is_held_and_control_goes_on(void **state)
{
    struct stand_in *s = begin_ready();
    vm_hold_bulk(s->vm, true);
    loop_settle(s->loop);
    data_frame(&s->bulk, FRAME_OUTPUT, 0, 5, MSG_STDOUT, 0, "held");
    loop_settle(s->loop);
    peer_frame(&s->control, FRAME_LOG, 0, 0, "not held", 8);
    notes_expect(&s->notes, "agent: not held");
    vm_hold_bulk(s->vm, false);
    notes_expect(&s->notes, "output id 5 stream 1 offset 0: held");
    finish(s);
}

static void ids_are_used_once(void **state)
{
    struct stand_in *s = begin();
    uint64_t last = 0;
    for (int i = 0; i < 1000; i++) {
        const uint64_t id = vm_next_id(s->vm);
        assert_true(id > last && id <= FRAME_ID_MAX);
        last = id;
    }
    stand_in_leave(s);
    // Another server does not use them again: a thousand take less than a millisecond's share of 16,384.
    const int64_t now = clock_wall_ms();
    while (clock_wall_ms() == now)
        ;
    stand_in_adopt(s);
    assert_true(vm_next_id(s->vm) > last);
    finish(s);
}

// ---- the console ------------------------------------------------------------------------------------------------------
static void console_say(struct stand_in *s, const char *text)
{
    struct peer p = {.fd = s->console};
    peer_send(&p, text, strlen(text));
}

static void the_console_comes_in_lines(void **state)
{
    struct stand_in *s = begin();
    console_say(s, "[    0.0");
    loop_settle(s->loop);
    console_say(s, "00000] Linux\r\nsecond\nthi");
    notes_expect(&s->notes, "console line dropped 0: [    0.000000] Linux");
    notes_expect(&s->notes, "console line dropped 0: second");
    console_say(s, "rd without end");
    loop_settle(s->loop);
    fd_close(&s->console);
    notes_expect(&s->notes, "console dropped 0: third without end");
    finish(s);
}

static void a_line_without_end_is_cut(void **state)
{
    struct stand_in *s = begin();
    char text[1025], want[512];
    memset(text, 'l', sizeof text - 1);
    text[1024] = 0;
    console_say(s, text);
    snprintf(want, sizeof want, "console dropped 0: %.512s", text); // as far as a note goes
    notes_expect(&s->notes, want);
    notes_expect(&s->notes, want);
    finish(s);
}

// All of it is taken, so that the guest never waits for us; what is not kept is counted to the byte.
static void a_shouting_console_is_read_and_counted(void **state)
{
    struct stand_in *s = begin();
    CLEANUP_BUF struct buf flood = BUF_INIT(8 << 20);
    while (flood.len < 16 * LIMIT_CONSOLE_BYTES_PER_S)
        buf_adds(&flood, "0123456789012345678901234567890123456789012345678901234567890\n");
    console_say(s, buf_text(&flood));
    fd_close(&s->console);
    for (int i = 0; i < 20; i++) // a turn takes 128 KiB, the socket holds less than three
        loop_settle(s->loop);
    CLEANUP_FREE char *got = notes_rest(&s->notes);
    unsigned long long kept = 0, dropped = 0, n;
    for (char *save = got, *line; (line = strsep(&save, "\n"));) {
        if (sscanf(line, "console line dropped %llu:", &n) == 1)
            kept += 1;
        else if (sscanf(line, "console dropped %llu:", &n) != 1)
            continue;
        kept += strlen(strstr(line, ": ") + 2);
        dropped += n;
    }
    assert_true(dropped > 0);
    assert_true(kept > LIMIT_CONSOLE_BYTES_PER_S - 4096);
    assert_int_equal(kept + dropped, flood.len);
    finish(s);
}

// ---- the end ----------------------------------------------------------------------------------------------------------
struct stopping {
    struct vm *vm;
    bool ended;
};

static void *stop(void *arg)
{
    struct stopping *s = arg;
    s->ended = vm_stop(s->vm, PEER_MS);
    return NULL;
}

static void a_stop_asks_the_agent_and_waits(void **state)
{
    struct stand_in *s = begin_ready();
    struct stopping stopping = {s->vm, false};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, stop, &stopping), 0);
    peer_expect(&s->control, FRAME_SHUTDOWN, &s->f);
    stand_in_kill(s); // the guest powers off
    pthread_join(thread, NULL);
    assert_true(stopping.ended);
    struct err err = {0};
    assert_int_equal(vm_end(s->vm, &err), 0);
    stand_in_free(s);
}

static void a_stop_that_is_not_heard_ends_in_time(void **state)
{
    struct stand_in *s = begin_ready();
    assert_false(vm_stop(s->vm, 0));
    peer_expect(&s->control, FRAME_SHUTDOWN, &s->f);
    assert_int_equal(kill(s->pid, 0), 0);
    // Without a session there is nobody to ask, and no reason to wait.
    fd_close(&s->control.fd);
    notes_expect(&s->notes, "session mute 0 lost 1");
    assert_false(vm_stop(s->vm, INT32_MAX));
    finish(s);
}

static void a_kill_ends_it_at_once(void **state)
{
    struct stand_in *s = begin_ready();
    struct err err = {0};
    vm_kill(s->vm);
    stand_in_reap(s);
    notes_until(&s->notes, "gone 2: QEMU ended unexpectedly");
    assert_int_equal(vm_end(s->vm, &err), 0);
    char *rest = notes_rest(&s->notes); // told once
    assert_string_equal(rest, "");
    free(rest);
    stand_in_free(s);
}

static void an_end_leaves_no_process(void **state)
{
    struct stand_in *s = begin_ready();
    struct err err = {0};
    assert_int_equal(vm_end(s->vm, &err), 0);
    stand_in_reap(s); // it has ended: this does not block
    stand_in_free(s);
}

static void a_stray_is_found_by_its_facts_or_its_name(void **state)
{
    struct err err = {0};
    for (int how = 0; how < 3; how++) {
        struct stand_in *s = stand_in_new();
        if (how == 1) // facts of another process: nothing but the name finds ours
            json_put_int(s->runtime, "start", 1);
        assert_int_equal(vm_end_stray(how == 2 ? NULL : s->runtime, "sbx00000000000000000000000000", NULL, &err), 0);
        assert_int_equal(kill(s->pid, 0), 0); // another's name is not ours
        assert_int_equal(vm_end_stray(how == 2 ? NULL : s->runtime, s->id, NULL, &err), 0);
        stand_in_reap(s);
        assert_int_equal(vm_end_stray(s->runtime, s->id, NULL, &err), 0); // nothing left is no failure
        stand_in_free(s);
    }
}

static void no_callback_after_it_is_freed(void **state)
{
    for (int i = 0; i < 10; i++) {
        struct stand_in *s = begin_ready();
        put_command(&s->control, FRAME_STARTED, 5, MSG_COMMAND_RUNNING, 0);
        console_say(s, "line\n");
        vm_free(s->vm);
        s->vm = NULL;
        free(notes_rest(&s->notes)); // up to here they may come
        stand_in_kill(s);
        fd_close(&s->console);
        finish(s);
    }
}

// The last, as it takes a ping's time.
static void a_ping_is_sent_and_answered(void **state)
{
    struct stand_in *s = begin_ready();
    peer_expect(&s->control, FRAME_PING, &s->f);
    peer_frame(&s->control, FRAME_PONG, 0, s->f.id, NULL, 0);
    peer_frame(&s->control, FRAME_LOG, 0, 0, "after", 5);
    notes_expect(&s->notes, "agent: after");
    struct vm_stats stats;
    vm_stats(s->vm, &stats);
    assert_true(stats.last_ping_us > 0);
    finish(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_the_same_process_is_adopted),
        cmocka_unit_test(a_process_that_ended_is_gone),
        cmocka_unit_test(a_look_that_fails_is_no_end),
        cmocka_unit_test(a_clock_far_off_is_not_set),
        cmocka_unit_test(a_second_server_goes_on_where_the_first_left),
        cmocka_unit_test(ready_comes_after_the_commands_that_are_there),
        cmocka_unit_test(ready_needs_both_ports),
        cmocka_unit_test(an_agent_that_does_not_fit_is_refused),
        cmocka_unit_test(features_that_are_new_do_no_harm),
        cmocka_unit_test(a_fatal_word_ends_the_wait),
        cmocka_unit_test(the_end_of_the_process_ends_the_wait),
        cmocka_unit_test(a_lost_session_is_made_again),
        cmocka_unit_test(a_guest_that_breaks_the_protocol_loses_its_session),
        cmocka_unit_test(every_frame_has_its_callback),
        cmocka_unit_test(frames_that_no_guest_sends_are_counted_and_skipped),
        cmocka_unit_test(nothing_is_sent_without_a_session),
        cmocka_unit_test(data_is_split_into_frames),
        cmocka_unit_test(an_end_without_data_is_one_empty_frame),
        cmocka_unit_test(a_full_queue_is_busy_not_broken),
        cmocka_unit_test(bulk_is_held_and_control_goes_on),
        cmocka_unit_test(ids_are_used_once),
        cmocka_unit_test(the_console_comes_in_lines),
        cmocka_unit_test(a_line_without_end_is_cut),
        cmocka_unit_test(a_shouting_console_is_read_and_counted),
        cmocka_unit_test(a_stop_asks_the_agent_and_waits),
        cmocka_unit_test(a_stop_that_is_not_heard_ends_in_time),
        cmocka_unit_test(a_kill_ends_it_at_once),
        cmocka_unit_test(an_end_leaves_no_process),
        cmocka_unit_test(a_stray_is_found_by_its_facts_or_its_name),
        cmocka_unit_test(no_callback_after_it_is_freed),
        cmocka_unit_test(a_ping_is_sent_and_answered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
