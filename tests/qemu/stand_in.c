#include "stand_in.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "qemu/process.h"

extern char **environ;

// ---- callbacks --------------------------------------------------------------------------------------------------------
static struct notes *notes_of(void *arg)
{
    return &((struct stand_in *)arg)->notes;
}

static void on_ready(void *arg, const struct vm_hello *h)
{
    notes_add(notes_of(arg), "ready version %llu agent %s kernel %s boot %s up %lld", (unsigned long long)h->version,
              h->agent_version, h->kernel, h->boot_id, (long long)h->uptime_ms);
}

static void on_command(void *arg, int type, uint64_t id, const struct msg_command *m)
{
    notes_add(notes_of(arg), "command type %d id %llu phase %llu exit %lld", type, (unsigned long long)id,
              (unsigned long long)m->phase, (long long)m->exit_code);
}

static void on_output(void *arg, uint64_t id, const struct msg_data *d)
{
    notes_add(notes_of(arg), "output id %llu stream %llu offset %llu: %.*s", (unsigned long long)id,
              (unsigned long long)d->stream, (unsigned long long)d->offset, (int)d->bytes.len, (const char *)d->bytes.data);
}

static void on_stdin_credit(void *arg, uint64_t id, uint64_t offset)
{
    notes_add(notes_of(arg), "stdin credit id %llu: %llu", (unsigned long long)id, (unsigned long long)offset);
}

static void on_file_info(void *arg, uint64_t id, const struct msg_file_result *r)
{
    notes_add(notes_of(arg), "file info id %llu size %llu", (unsigned long long)id, (unsigned long long)r->size);
}

static void on_file_data(void *arg, uint64_t id, const struct msg_data *d, bool last)
{
    notes_add(notes_of(arg), "file data id %llu last %d: %.*s", (unsigned long long)id, last, (int)d->bytes.len,
              (const char *)d->bytes.data);
}

static void on_file_credit(void *arg, uint64_t id, uint64_t offset)
{
    notes_add(notes_of(arg), "file credit id %llu: %llu", (unsigned long long)id, (unsigned long long)offset);
}

static void on_file_result(void *arg, uint64_t id, const struct msg_file_result *r, bool last)
{
    notes_add(notes_of(arg), "file result id %llu last %d status %llu", (unsigned long long)id, last,
              (unsigned long long)r->status);
}

static void on_console(void *arg, const uint8_t *data, size_t len, uint64_t dropped)
{
    const size_t text = len > 0 && data[len - 1] == '\n' ? len - 1 : len;
    notes_add(notes_of(arg), "console%s dropped %llu: %.*s", text < len ? " line" : "", (unsigned long long)dropped,
              (int)text, (const char *)data);
}

static void on_agent_log(void *arg, const char *text, size_t len)
{
    notes_add(notes_of(arg), "agent: %.*s", (int)len, text);
}

static void on_vmm_log(void *arg, const char *text, size_t len)
{
    notes_add(notes_of(arg), "vmm: %.*s", (int)len, text);
}

static void on_fatal(void *arg, const char *text, size_t len)
{
    notes_add(notes_of(arg), "fatal: %.*s", (int)len, text);
}

static void on_session(void *arg, bool mute, bool lost)
{
    notes_add(notes_of(arg), "session mute %d lost %d", mute, lost);
}

static void on_io_error(void *arg, bool paused)
{
    notes_add(notes_of(arg), "io error paused %d", paused);
}

static void on_gone(void *arg, enum vm_gone how, const char *detail)
{
    notes_add(notes_of(arg), "gone %d: %s", (int)how, detail);
}

static const struct vm_callbacks CALLBACKS = {
    .ready = on_ready, .command = on_command, .output = on_output, .stdin_credit = on_stdin_credit,
    .file_info = on_file_info, .file_data = on_file_data, .file_credit = on_file_credit, .file_result = on_file_result,
    .console = on_console, .agent_log = on_agent_log, .vmm_log = on_vmm_log, .fatal = on_fatal, .session = on_session,
    .io_error = on_io_error, .gone = on_gone,
};

// ---- life -------------------------------------------------------------------------------------------------------------
// A shell that says that it is there and waits for the end of its standard input.
static void start_process(struct stand_in *s)
{
    const char *const argv[] = {"sh", "-c", "echo; read nothing", "-name", s->id, NULL};
    int ends[2], said[2];
    char c;
    posix_spawn_file_actions_t actions;
    assert_int_equal(pipe2(ends, O_CLOEXEC) | pipe2(said, O_CLOEXEC), 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
    posix_spawn_file_actions_adddup2(&actions, said[1], 1);
    assert_int_equal(posix_spawn(&s->pid, "/bin/sh", &actions, NULL, (char *const *)argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[0]);
    close(said[1]);
    assert_int_equal(fd_read_full(said[0], &c, 1), 0);
    close(said[0]);
    s->stdin_fd = ends[1];
}

struct stand_in *stand_in_new(void)
{
    struct stand_in *s = calloc(1, sizeof *s);
    CLEANUP_BUF struct buf boot = BUF_INIT(64);
    assert_non_null(s);
    id_new(ID_SANDBOX, s->id);
    strcpy(s->path, "/tmp/airlock-stand-in.XXXXXX");
    assert_non_null(mkdtemp(s->path));
    s->dirfd = open(s->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    s->control_listen = fd_unix_listen(s->dirfd, "control", 8);
    s->bulk_listen = fd_unix_listen(s->dirfd, "bulk", 8);
    s->qmp_listen = fd_unix_listen(s->dirfd, "qmp", 8);
    s->console_listen = fd_unix_listen(s->dirfd, "console", 8);
    assert_true(s->dirfd >= 0 && s->control_listen >= 0 && s->bulk_listen >= 0 && s->qmp_listen >= 0 &&
                s->console_listen >= 0);
    s->qmp = s->console = s->control.fd = s->bulk.fd = -1;
    buf_init(&s->qmp_in, 1 << 20);
    notes_init(&s->notes);
    start_process(s);
    assert_int_equal(fd_read_file(AT_FDCWD, "/proc/sys/kernel/random/boot_id", &boot), 0);
    char boot_id[40];
    snprintf(boot_id, sizeof boot_id, "%.36s", buf_text(&boot));
    s->runtime = json_pack("{s:i, s:I, s:i, s:I, s:s, s:s, s:i, s:s, s:b}", "outer", -1, "outer_start", (json_int_t)0, "pid",
                           (int)s->pid, "start", (json_int_t)process_start_time(s->pid), "accel", "kvm", "boot_id", boot_id,
                           "uid", 610001, "name", s->id, "ram_file", 0);
    assert_non_null(s->runtime);
    s->loop = loop_running();
    return s;
}

void stand_in_reap(struct stand_in *s)
{
    int status;
    assert_int_equal(waitpid(s->pid, &status, 0), s->pid);
    s->pid = 0;
}

void stand_in_kill(struct stand_in *s)
{
    assert_int_equal(kill(s->pid, SIGKILL), 0);
    stand_in_reap(s);
}

static void close_ends(struct stand_in *s)
{
    fd_close(&s->qmp);
    fd_close(&s->console);
    peer_free(&s->control);
    peer_free(&s->bulk);
    buf_clear(&s->qmp_in);
}

void stand_in_leave(struct stand_in *s)
{
    vm_free(s->vm);
    s->vm = NULL;
    close_ends(s);
}

void stand_in_free(struct stand_in *s)
{
    stand_in_leave(s);
    loop_free(s->loop);
    if (s->pid)
        stand_in_kill(s);
    json_decref(s->runtime);
    fd_close(&s->stdin_fd);
    fd_close(&s->control_listen);
    fd_close(&s->bulk_listen);
    fd_close(&s->qmp_listen);
    fd_close(&s->console_listen);
    fd_close(&s->dirfd);
    buf_free(&s->qmp_in);
    notes_free(&s->notes);
    assert_int_equal(fd_remove_tree(AT_FDCWD, s->path, NULL), 0);
    free(s);
}

static int accept_one(int listen_fd)
{
    struct pollfd w = {.fd = listen_fd, .events = POLLIN};
    if (poll(&w, 1, PEER_MS) != 1)
        fail_msg("nobody connected");
    const int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    assert_true(fd >= 0);
    return fd;
}

enum vm_adopt_verdict stand_in_try(struct stand_in *s, struct err *err)
{
    const enum vm_adopt_verdict v = vm_adopt(s->runtime, s->id, s->dirfd, s->loop, &CALLBACKS, s, &s->vm, err);
    return v != VM_ADOPTED || vm_connect(s->vm, false, err) == 0 ? v : VM_ADOPT_FAILED;
}

void stand_in_adopt(struct stand_in *s)
{
    struct err err = {0};
    assert_int_equal(stand_in_try(s, &err), VM_ADOPTED);
    s->qmp = accept_one(s->qmp_listen);
    s->console = accept_one(s->console_listen);
}

// ---- the monitor ------------------------------------------------------------------------------------------------------
void stand_in_say(struct stand_in *s, const char *text)
{
    struct peer p = {.fd = s->qmp};
    peer_send(&p, text, strlen(text));
    peer_send(&p, "\r\n", 2);
}

json_t *stand_in_hear(struct stand_in *s)
{
    for (;;) {
        const char *text = buf_text(&s->qmp_in), *nl = strchr(text, '\n');
        if (nl) {
            json_t *o = json_parse_strict(text, (size_t)(nl - text), NULL);
            buf_consume(&s->qmp_in, (size_t)(nl - text) + 1);
            assert_non_null(o);
            return o;
        }
        char chunk[4096];
        struct pollfd w = {.fd = s->qmp, .events = POLLIN};
        if (poll(&w, 1, PEER_MS) != 1)
            fail_msg("the monitor heard nothing");
        const ssize_t n = recv(s->qmp, chunk, sizeof chunk, MSG_DONTWAIT);
        if (n <= 0)
            fail_msg("the monitor's connection ended");
        assert_true(buf_add(&s->qmp_in, chunk, (size_t)n));
    }
}

static void hear_command(struct stand_in *s, const char *name)
{
    CLEANUP_JSON json_t *o = stand_in_hear(s);
    assert_string_equal(json_get_str(o, "execute"), name);
    stand_in_say(s, "{\"return\": {}}");
}

void stand_in_greet(struct stand_in *s)
{
    stand_in_say(s, "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}}, \"capabilities\": []}}");
    hear_command(s, "qmp_capabilities");
    hear_command(s, "cont"); // an adopted VM may have been left stopped
}

// ---- the agent --------------------------------------------------------------------------------------------------------
void stand_in_take(struct stand_in *s, int listen_fd, uint64_t port, struct peer *p)
{
    struct msg_hello m;
    peer_free(p);
    peer_init(p, accept_one(listen_fd));
    assert_int_equal(peer_next(p, &s->f), FRAME_RESET);
    peer_expect(p, FRAME_HELLO, &s->f);
    assert_int_equal(msg_hello_decode(s->f.payload, s->f.length, &m), 0);
    assert_int_equal(m.port, port);
    assert_int_equal(m.version_min, PROTO_VERSION_MIN);
    assert_int_equal(m.version_max, PROTO_VERSION_MAX);
    assert_int_equal(m.hostname.len, strlen(s->id));
    assert_memory_equal(m.hostname.data, s->id, m.hostname.len);
    if (port == MSG_PORT_CONTROL)
        memcpy(s->session, m.session, sizeof s->session);
    else // bulk joins the session of control
        assert_memory_equal(m.session, s->session, sizeof s->session);
}

void stand_in_reply(struct peer *p, uint64_t port, uint64_t version, uint64_t features)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1024);
    const struct msg_hello_reply m = {.port = port, .version = version, .features = features,
                                      .agent_version = {(const uint8_t *)"0.1.0", 5}, .kernel = {(const uint8_t *)"6.1.0", 5},
                                      .boot_id = {(const uint8_t *)"boot", 4}, .uptime_ms = 42};
    assert_int_equal(msg_hello_reply_encode(&b, &m), 0);
    peer_preamble(p, p->in.nonce);
    peer_frame(p, FRAME_HELLO_REPLY, 0, 0, b.data, b.len);
}

void stand_in_session(struct stand_in *s)
{
    stand_in_take(s, s->control_listen, MSG_PORT_CONTROL, &s->control);
    stand_in_reply(&s->control, MSG_PORT_CONTROL, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    peer_frame(&s->control, FRAME_READY, 0, 0, NULL, 0);
    stand_in_take(s, s->bulk_listen, MSG_PORT_BULK, &s->bulk);
    stand_in_reply(&s->bulk, MSG_PORT_BULK, PROTO_VERSION_MAX, STAND_IN_FEATURES);
    notes_expect(&s->notes, "ready version 1 agent 0.1.0 kernel 6.1.0 boot boot up 42");
}
