// QMP over a scripted monitor: calls find their answers, events have their consequences, what breaks fails the calls.
// Longer than 600 lines: all of it speaks to one scripted monitor, whose states its parts share.
#include "stand_in.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qemu/qmp_parse.h"

static struct stand_in *begin(void)
{
    struct stand_in *s = stand_in_new();
    stand_in_adopt(s);
    return s;
}

// A call from a thread of its own.
struct call {
    pthread_t thread;
    struct vm *vm;
    struct loop *loop;
    const char *command;
    json_t *arguments, *ret;
    int timeout_ms;
    struct err err;
};

static void *run_call(void *arg)
{
    struct call *c = arg;
    c->ret = vm_qmp(c->vm, c->command, c->arguments, c->timeout_ms, &c->err);
    return NULL;
}

static void call_begin(struct call *c, struct stand_in *s, const char *command, json_t *arguments)
{
    *c = (struct call){.vm = s->vm, .loop = s->loop, .command = command, .arguments = arguments, .timeout_ms = PEER_MS};
    assert_int_equal(pthread_create(&c->thread, NULL, run_call, c), 0);
}

// The loop has let go of the object that the value came in before the test looks at it.
static json_t *call_end(struct call *c)
{
    assert_int_equal(pthread_join(c->thread, NULL), 0);
    loop_settle(c->loop);
    return c->ret;
}

static void assert_failed(struct call *c, enum err_kind kind, const char *code)
{
    assert_null(call_end(c));
    assert_int_equal(c->err.kind, kind);
    assert_string_equal(c->err.code, code);
}

// The command that was heard must be this one; its id.
static long long hear(struct stand_in *s, const char *command)
{
    CLEANUP_JSON json_t *o = stand_in_hear(s);
    assert_string_equal(json_get_str(o, "execute"), command);
    const long long id = json_get_int(o, "id", 0);
    assert_true(id > 0);
    return id;
}

static void answer(struct stand_in *s, long long id, const char *value)
{
    char text[300];
    snprintf(text, sizeof text, "{\"return\": %s, \"id\": %lld}", value, id);
    stand_in_say(s, text);
}

// ---- calls ------------------------------------------------------------------------------------------------------------
static void a_call_gets_its_value(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    stand_in_greet(s);
    call_begin(&c, s, "query-status", json_pack("{s:s, s:i}", "some", "text", "n", 5));
    CLEANUP_JSON json_t *o = stand_in_hear(s);
    assert_string_equal(json_get_str(o, "execute"), "query-status");
    assert_string_equal(json_get_str(json_object_get(o, "arguments"), "some"), "text");
    assert_int_equal(json_get_int(json_object_get(o, "arguments"), "n", 0), 5);
    answer(s, json_get_int(o, "id", 0), "{\"status\": \"running\"}");
    CLEANUP_JSON json_t *ret = call_end(&c);
    assert_string_equal(json_get_str(ret, "status"), "running");
    stand_in_free(s);
}

static void a_call_without_arguments(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    stand_in_greet(s);
    call_begin(&c, s, "quit", NULL);
    answer(s, hear(s, "quit"), "{}");
    CLEANUP_JSON json_t *ret = call_end(&c);
    assert_true(json_is_object(ret));
    stand_in_free(s);
}

static void a_call_waits_for_the_greeting(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    call_begin(&c, s, "query-status", NULL);
    stand_in_say(s, "{\"QMP\": {}}");
    CLEANUP_JSON json_t *first = stand_in_hear(s);
    assert_string_equal(json_get_str(first, "execute"), "qmp_capabilities"); // before anything else
    for (int i = 0; i < 2; i++) { // the call and our own command are in no order
        CLEANUP_JSON json_t *o = stand_in_hear(s);
        if (strcmp(json_get_str(o, "execute"), "query-status") == 0)
            answer(s, json_get_int(o, "id", 0), "1");
        else
            assert_string_equal(json_get_str(o, "execute"), "cont");
    }
    CLEANUP_JSON json_t *ret = call_end(&c);
    assert_int_equal(json_integer_value(ret), 1);
    stand_in_free(s);
}

static void an_error_is_a_failure_with_its_reason(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    char text[200];
    stand_in_greet(s);
    call_begin(&c, s, "device_del", NULL);
    snprintf(text, sizeof text, "{\"id\": %lld, \"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no such device\"}}",
             hear(s, "device_del"));
    stand_in_say(s, text);
    assert_failed(&c, ERR_TRANSPORT_FAILED, "qmp_failed");
    assert_non_null(strstr(c.err.detail, "no such device"));
    stand_in_free(s);
}

static void answers_find_their_calls_in_any_order(void **state)
{
    enum { CALLS = 6 };
    static const char *const NAMES[CALLS] = {"c0", "c1", "c2", "c3", "c4", "c5"};
    struct stand_in *s = begin();
    struct call calls[CALLS];
    long long ids[CALLS] = {0};
    stand_in_greet(s);
    for (int i = 0; i < CALLS; i++)
        call_begin(&calls[i], s, NAMES[i], NULL);
    for (int i = 0; i < CALLS; i++) {
        CLEANUP_JSON json_t *o = stand_in_hear(s);
        const int which = json_get_str(o, "execute")[1] - '0';
        assert_true(which >= 0 && which < CALLS && ids[which] == 0);
        ids[which] = json_get_int(o, "id", 0);
        for (int k = 0; k < CALLS; k++)
            assert_true(k == which || ids[k] != ids[which]);
    }
    static const int ORDER[CALLS] = {3, 0, 5, 1, 4, 2};
    stand_in_say(s, "{\"return\": \"nobody asked\", \"id\": 999999}");
    for (int i = 0; i < CALLS; i++) {
        char value[8];
        snprintf(value, sizeof value, "%d", 100 + ORDER[i]);
        stand_in_say(s, "not even JSON");
        answer(s, ids[ORDER[i]], value);
    }
    for (int i = 0; i < CALLS; i++) {
        CLEANUP_JSON json_t *ret = call_end(&calls[i]);
        assert_int_equal(json_integer_value(ret), 100 + i);
    }
    stand_in_free(s);
}

static void a_late_answer_belongs_to_nobody(void **state)
{
    struct stand_in *s = begin();
    struct call c = {.vm = s->vm, .command = "slow", .timeout_ms = 20};
    stand_in_greet(s);
    run_call(&c);
    assert_null(c.ret);
    assert_int_equal(c.err.kind, ERR_TIMEOUT);
    assert_string_equal(c.err.code, "qmp_timeout");
    const long long late = hear(s, "slow");
    call_begin(&c, s, "next", NULL);
    const long long id = hear(s, "next");
    assert_int_not_equal(id, late);
    answer(s, late, "\"late\"");
    answer(s, id, "\"mine\"");
    CLEANUP_JSON json_t *ret = call_end(&c);
    assert_string_equal(json_string_value(ret), "mine");
    stand_in_free(s);
}

static void no_greeting_in_time_is_a_timeout(void **state)
{
    struct stand_in *s = begin();
    struct call c = {.vm = s->vm, .command = "query-status", .timeout_ms = 20};
    c.arguments = json_pack("{s:i}", "freed", 1);
    run_call(&c);
    assert_null(c.ret);
    assert_int_equal(c.err.kind, ERR_TIMEOUT);
    stand_in_free(s);
}

// ---- what breaks ------------------------------------------------------------------------------------------------------
static void the_end_of_the_connection_fails_the_call(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    stand_in_greet(s);
    call_begin(&c, s, "query-status", NULL);
    hear(s, "query-status");
    fd_close(&s->qmp);
    assert_failed(&c, ERR_TRANSPORT_FAILED, "qmp_failed");
    stand_in_free(s);
}

static void the_end_of_the_vm_fails_the_call(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    stand_in_greet(s);
    call_begin(&c, s, "query-status", NULL);
    hear(s, "query-status");
    stand_in_kill(s);
    notes_expect(&s->notes, "gone 2: QEMU ended unexpectedly");
    assert_failed(&c, ERR_TRANSPORT_FAILED, "qmp_failed");
    stand_in_free(s);
}

static void a_line_without_end_closes_the_connection(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    struct peer p = {.fd = s->qmp};
    stand_in_greet(s);
    call_begin(&c, s, "query-status", NULL);
    hear(s, "query-status");
    CLEANUP_FREE char *text = malloc(QMP_LINE_MAX);
    memset(text, 'x', QMP_LINE_MAX);
    peer_send(&p, text, QMP_LINE_MAX);
    peer_send(&p, "more", 4);
    assert_failed(&c, ERR_TRANSPORT_FAILED, "qmp_failed");
    peer_expect_end(&p);
    char *rest = notes_rest(&s->notes); // the VM itself goes on
    assert_string_equal(rest, "");
    free(rest);
    stand_in_free(s);
}

// ---- events -----------------------------------------------------------------------------------------------------------
#define EVENT(name, data) "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 0}, \"event\": \"" name "\", \"data\": " data "}"

static void a_full_host_disk_pauses_and_goes_on(void **state)
{
    struct stand_in *s = begin();
    stand_in_greet(s);
    stand_in_say(s, EVENT("BLOCK_IO_ERROR", "{\"nospace\": false, \"action\": \"report\"}")); // not this
    stand_in_say(s, EVENT("RESUME", "{}"));                                                    // nothing was paused
    stand_in_say(s, EVENT("BLOCK_IO_ERROR", "{\"nospace\": true, \"action\": \"stop\"}"));
    stand_in_say(s, EVENT("BLOCK_IO_ERROR", "{\"nospace\": true, \"action\": \"stop\"}")); // told once
    notes_expect(&s->notes, "vmm: the host's disk is full: the VM is stopped until there is room");
    notes_expect(&s->notes, "io error paused 1");
    CLEANUP_JSON json_t *o = stand_in_hear(s); // it tries to go on
    assert_string_equal(json_get_str(o, "execute"), "cont");
    stand_in_say(s, EVENT("RESUME", "{}"));
    notes_expect(&s->notes, "io error paused 0");
    stand_in_free(s);
}

static void a_shutdown_of_the_guest_is_told_apart(void **state)
{
    static const struct {
        const char *events[2], *notes[2], *gone;
    } CASES[] = {
        {{EVENT("SHUTDOWN", "{\"guest\": true, \"reason\": \"guest-shutdown\"}")},
         {"vmm: qmp: SHUTDOWN guest-shutdown"},
         "gone 1: the guest shut down"},
        {{EVENT("SHUTDOWN", "{\"guest\": false, \"reason\": \"host-signal\"}")},
         {"vmm: qmp: SHUTDOWN host-signal"},
         "gone 2: QEMU ended unexpectedly"},
        {{EVENT("GUEST_PANICKED", "{\"action\": \"poweroff\"}"),
          EVENT("SHUTDOWN", "{\"guest\": true, \"reason\": \"guest-panic\"}")},
         {"vmm: qmp: GUEST_PANICKED", "vmm: qmp: SHUTDOWN guest-panic"},
         "gone 2: QEMU ended unexpectedly"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct stand_in *s = begin();
        stand_in_greet(s);
        for (int k = 0; k < 2 && CASES[i].events[k]; k++) {
            stand_in_say(s, CASES[i].events[k]);
            notes_expect(&s->notes, CASES[i].notes[k]);
        }
        stand_in_kill(s);
        notes_expect(&s->notes, CASES[i].gone);
        stand_in_free(s);
    }
}

// Keeps the loop from looking until it is let go.
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool inside, open;
};

static void wait_at_gate(void *arg)
{
    struct gate *g = arg;
    pthread_mutex_lock(&g->lock);
    g->inside = true;
    pthread_cond_broadcast(&g->changed);
    while (!g->open)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

// What QEMU said right before its end counts, whether the loop hears of the end or of the words first.
static void last_words_are_heard(void **state)
{
    for (int end_first = 0; end_first < 2; end_first++) {
        struct stand_in *s = begin();
        struct gate g = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, false};
        stand_in_greet(s);
        loop_settle(s->loop); // nothing else is on its way
        assert_int_equal(loop_post(s->loop, wait_at_gate, &g), 0);
        pthread_mutex_lock(&g.lock);
        while (!g.inside)
            pthread_cond_wait(&g.changed, &g.lock);
        pthread_mutex_unlock(&g.lock);
        if (end_first)
            stand_in_kill(s);
        stand_in_say(s, EVENT("SHUTDOWN", "{\"guest\": true, \"reason\": \"guest-reset\"}"));
        fd_close(&s->qmp);
        if (!end_first)
            stand_in_kill(s);
        pthread_mutex_lock(&g.lock);
        g.open = true;
        pthread_cond_broadcast(&g.changed);
        pthread_mutex_unlock(&g.lock);
        notes_expect(&s->notes, "vmm: qmp: SHUTDOWN guest-reset");
        notes_expect(&s->notes, "gone 1: the guest shut down");
        stand_in_free(s);
    }
}

static void events_that_mean_nothing_here_are_passed_over(void **state)
{
    struct stand_in *s = begin();
    struct call c;
    stand_in_greet(s);
    stand_in_say(s, EVENT("RTC_CHANGE", "{\"offset\": 1}"));
    stand_in_say(s, "{\"event\": 7}");
    stand_in_say(s, "{\"event\": \"SHUTDOWN\"}"); // without data: not the guest's
    notes_expect(&s->notes, "vmm: qmp: SHUTDOWN");
    stand_in_say(s, "{\"unknown\": true}");
    call_begin(&c, s, "query-status", NULL);
    answer(s, hear(s, "query-status"), "true");
    CLEANUP_JSON json_t *ret = call_end(&c);
    assert_true(json_is_true(ret));
    char *rest = notes_rest(&s->notes);
    assert_string_equal(rest, "");
    free(rest);
    stand_in_free(s);
}

// ---- saved state ------------------------------------------------------------------------------------------------------
struct act {
    pthread_t thread;
    int (*fn)(struct act *);
    struct vm *vm;
    int fd, failed;
    struct err err;
};

static int save(struct act *a) { return vm_save_state(a->vm, a->fd, PEER_MS, &a->err); }
static int room(struct act *a) { return vm_save_room(a->vm, &a->err); }
static int load(struct act *a) { return vm_restore(a->vm, a->fd, PEER_MS, &a->err); }
static int stop(struct act *a) { return vm_pause(a->vm, &a->err); }
static int go(struct act *a) { return vm_resume(a->vm, &a->err); }

static void *run_act(void *arg)
{
    struct act *a = arg;
    a->failed = a->fn(a);
    return NULL;
}

static void act_begin(struct act *a, struct stand_in *s, int (*fn)(struct act *), int fd)
{
    *a = (struct act){.fn = fn, .vm = s->vm, .fd = fd};
    assert_int_equal(pthread_create(&a->thread, NULL, run_act, a), 0);
}

static int act_end(struct act *a)
{
    assert_int_equal(pthread_join(a->thread, NULL), 0);
    return a->failed;
}

// The descriptor that comes with a line; the line is left for stand_in_hear.
static int take_fd(struct stand_in *s)
{
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    char text[1024];
    struct iovec iov = {text, sizeof text};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    struct pollfd w = {.fd = s->qmp, .events = POLLIN};
    int fd;
    assert_int_equal(poll(&w, 1, PEER_MS), 1);
    const ssize_t n = recvmsg(s->qmp, &m, MSG_CMSG_CLOEXEC);
    assert_true(n > 0 && CMSG_FIRSTHDR(&m));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    assert_true(buf_add(&s->qmp_in, text, (size_t)n));
    return fd;
}

static void refuse(struct stand_in *s, long long id)
{
    char text[120];
    snprintf(text, sizeof text, "{\"id\": %lld, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}", id);
    stand_in_say(s, text);
}

static int file(void)
{
    const int fd = memfd_create("test", MFD_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static void hear_save(struct stand_in *s, const char *filename, int to, const char *state)
{
    CLEANUP_JSON json_t *o = stand_in_hear(s);
    assert_string_equal(json_get_str(o, "execute"), "xen-save-devices-state");
    assert_string_equal(json_get_str(json_object_get(o, "arguments"), "filename"), filename);
    if (state)
        assert_int_equal(fd_write_full(to, state, strlen(state)), 0);
    state ? answer(s, json_get_int(o, "id", 0), "{}") : refuse(s, json_get_int(o, "id", 0));
}

static void holds(int fd, const char *state)
{
    char text[64] = "";
    assert_int_equal(pread(fd, text, sizeof text - 1, 0), strlen(state));
    assert_string_equal(text, state);
    assert_int_equal(ftruncate(fd, 0) | (int)lseek(fd, 0, SEEK_SET), 0);
}

static void pause_vm(struct stand_in *s)
{
    struct act a;
    act_begin(&a, s, stop, -1);
    answer(s, hear(s, "stop"), "{}");
    assert_int_equal(act_end(&a), 0);
}

// QEMU gives a descriptor back only while its guest runs: as long as it stands still it gets one, and no more.
static void a_vm_that_stands_still_is_saved_into_one_file(void **state)
{
    static const char *const STATES[] = {"a first and long one", "the second", "3"};
    struct stand_in *s = begin();
    struct act a;
    stand_in_greet(s);
    pause_vm(s);
    CLEANUP_FD int to = file();
    CLEANUP_FD int theirs = -1;
    for (int i = 0; i < 3; i++) {
        act_begin(&a, s, save, to);
        if (i == 0) {
            theirs = take_fd(s);
            answer(s, hear(s, "add-fd"), "{\"fdset-id\": 7, \"fd\": 20}");
        }
        hear_save(s, "/dev/fdset/7", theirs, STATES[i]);
        assert_int_equal(act_end(&a), 0);
        holds(to, STATES[i]);
    }
    // What failed may be written to yet.
    act_begin(&a, s, save, to);
    hear_save(s, "/dev/fdset/7", theirs, NULL);
    assert_int_equal(act_end(&a), -1);
    act_begin(&a, s, save, to);
    fd_close(&theirs);
    theirs = take_fd(s);
    answer(s, hear(s, "add-fd"), "{\"fdset-id\": 8, \"fd\": 21}");
    hear_save(s, "/dev/fdset/8", theirs, "of another file");
    assert_int_equal(act_end(&a), 0);
    holds(to, "of another file");
    // All of it goes when it runs.
    act_begin(&a, s, go, -1);
    answer(s, hear(s, "cont"), "{}");
    answer(s, hear(s, "query-fdsets"), "[{\"fdset-id\": 7, \"fds\": [{\"fd\": 20, \"opaque\": \"airlock-state\"}]}, {\"fdset-id\": 1, "
                                       "\"fds\": [{\"fd\": 3}]}, {\"fdset-id\": 8, \"fds\": [{\"fd\": 21, \"opaque\": \"airlock-state\"}]}]");
    answer(s, hear(s, "remove-fd"), "{}");
    answer(s, hear(s, "remove-fd"), "{}");
    assert_int_equal(act_end(&a), 0);
    assert_int_equal(room(&a), 0); // nobody is asked
    stand_in_free(s);
}

// Of servers that were killed while they saved it, or of saves that failed.
static void what_is_left_in_a_vm_is_bounded(void **state)
{
    struct stand_in *s = begin();
    struct act a;
    stand_in_greet(s);
    for (int n = 63; n <= 64; n++) {
        CLEANUP_JSON json_t *sets = json_array();
        for (int i = 0; i < n; i++)
            json_array_append_new(sets, json_pack("{s:i, s:[{s:i, s:s}]}", "fdset-id", i, "fds", "fd", 20 + i, "opaque",
                                                  "airlock-state"));
        act_begin(&a, s, room, -1);
        CLEANUP_JSON json_t *reply = json_pack("{s:O, s:I}", "return", sets, "id", (json_int_t)hear(s, "query-fdsets"));
        CLEANUP_FREE char *text = json_dumps(reply, JSON_COMPACT);
        stand_in_say(s, text);
        assert_int_equal(act_end(&a), n < 64 ? 0 : -1);
    }
    assert_int_equal(a.err.kind, ERR_UNAVAILABLE);
    assert_string_equal(a.err.code, "state_descriptors");
    stand_in_free(s);
}

static void a_state_without_end_is_not_kept(void **state)
{
    struct stand_in *s = begin();
    struct act a;
    struct stat st;
    stand_in_greet(s);
    pause_vm(s);
    CLEANUP_FD int to = file();
    act_begin(&a, s, save, to);
    CLEANUP_FD int theirs = take_fd(s);
    answer(s, hear(s, "add-fd"), "{\"fdset-id\": 0, \"fd\": 20}");
    const long long id = hear(s, "xen-save-devices-state");
    assert_int_equal(ftruncate(theirs, VM_STATE_MAX + 1), 0);
    answer(s, id, "{}");
    assert_int_equal(act_end(&a), -1);
    assert_string_equal(a.err.code, "device_state");
    assert_true(fstat(to, &st) == 0 && st.st_size == 0);
    assert_true(fstat(theirs, &st) == 0 && st.st_size == 0); // nor in memory
    stand_in_free(s);
}

static void a_refused_state_is_a_mismatch(void **state)
{
    struct stand_in *s = begin();
    struct act a;
    stand_in_greet(s);
    CLEANUP_FD int from = file();
    act_begin(&a, s, load, from);
    answer(s, hear(s, "getfd"), "{}");
    answer(s, hear(s, "migrate-incoming"), "{}");
    answer(s, hear(s, "query-migrate"), "{\"status\": \"active\"}");
    answer(s, hear(s, "query-migrate"), "{\"status\": \"failed\"}");
    assert_int_equal(act_end(&a), -1);
    assert_int_equal(a.err.kind, ERR_SNAPSHOT_MISMATCH);
    assert_string_equal(a.err.code, "snapshot_mismatch");
    assert_int_equal(strncmp(a.err.fields, "state\t", 6), 0);
    stand_in_free(s);
}

// A VM that is paused while the host's disk is full is let go by its owner alone.
static void a_full_disk_does_not_end_a_pause(void **state)
{
    struct stand_in *s = begin();
    struct act a;
    stand_in_greet(s);
    stand_in_say(s, EVENT("BLOCK_IO_ERROR", "{\"nospace\": true, \"action\": \"stop\"}"));
    notes_until(&s->notes, "io error paused 1");
    pause_vm(s);
    struct pollfd w = {.fd = s->qmp, .events = POLLIN};
    assert_int_equal(poll(&w, 1, 1500), 0); // longer than it waits before it tries
    act_begin(&a, s, go, -1);
    answer(s, hear(s, "cont"), "{}");
    answer(s, hear(s, "query-fdsets"), "[]");
    assert_int_equal(act_end(&a), 0);
    CLEANUP_JSON json_t *o = stand_in_hear(s); // and now it tries again
    assert_string_equal(json_get_str(o, "execute"), "cont");
    stand_in_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_gets_its_value),
        cmocka_unit_test(a_call_without_arguments),
        cmocka_unit_test(a_call_waits_for_the_greeting),
        cmocka_unit_test(an_error_is_a_failure_with_its_reason),
        cmocka_unit_test(answers_find_their_calls_in_any_order),
        cmocka_unit_test(a_late_answer_belongs_to_nobody),
        cmocka_unit_test(no_greeting_in_time_is_a_timeout),
        cmocka_unit_test(the_end_of_the_connection_fails_the_call),
        cmocka_unit_test(the_end_of_the_vm_fails_the_call),
        cmocka_unit_test(a_line_without_end_closes_the_connection),
        cmocka_unit_test(a_full_host_disk_pauses_and_goes_on),
        cmocka_unit_test(a_shutdown_of_the_guest_is_told_apart),
        cmocka_unit_test(last_words_are_heard),
        cmocka_unit_test(events_that_mean_nothing_here_are_passed_over),
        cmocka_unit_test(a_vm_that_stands_still_is_saved_into_one_file),
        cmocka_unit_test(what_is_left_in_a_vm_is_bounded),
        cmocka_unit_test(a_state_without_end_is_not_kept),
        cmocka_unit_test(a_refused_state_is_a_mismatch),
        cmocka_unit_test(a_full_disk_does_not_end_a_pause),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
