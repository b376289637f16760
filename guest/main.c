// PID 1: boots the root, then one loop over the ports, the commands' pipes, children and deadlines.
#include "guest/agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

#define PUMP_FRAMES 8           // bulk frames per turn, so that control is looked at in between
#define READS_PER_TURN 64
#define CLOCK_SLACK_MS 500

struct port_source {
    struct source source;
    struct port *port;
};

static int epoll_fd = -1, signal_fd = -1, wake_fd = -1;
static struct port_source control_source = {{SOURCE_PORT}, &control_port}, bulk_source = {{SOURCE_PORT}, &bulk_port};
static struct source child_source = {SOURCE_CHILD}, wake_source = {SOURCE_WAKE};
static sigset_t child_ended;    // SIGCHLD, blocked
static uint8_t session[16];
static bool session_up;
static struct {                 // a hello on bulk whose session control has not begun yet
    bool there;
    uint8_t session[16];
    uint64_t version;
} early_bulk;

int loop_add(int fd, uint32_t events, void *source)
{
    struct epoll_event e = {.events = events, .data.ptr = source};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
}

int loop_mod(int fd, uint32_t events, void *source)
{
    struct epoll_event e = {.events = events, .data.ptr = source};
    return epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &e);
}

void loop_del(int fd)
{
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

void loop_wake(void)
{
    const uint64_t one = 1;
    if (write(wake_fd, &one, sizeof one) < 0)
        return; // awake already
}

// ---- sessions -------------------------------------------------------------------------------------------------------
static void set_clock(int64_t host_ms)
{
    const int64_t off = host_ms - clock_wall_ms();
    if (host_ms <= 0 || (off < CLOCK_SLACK_MS && off > -CLOCK_SLACK_MS))
        return;
    const struct timespec t = {.tv_sec = host_ms / 1000, .tv_nsec = host_ms % 1000 * 1000000};
    clock_settime(CLOCK_REALTIME, &t);
}

static struct slice text_slice(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

static void reply(struct port *p, uint64_t version)
{
    uint8_t room[1024];
    struct buf b = BUF_OVER(room);
    struct utsname uts;
    char boot_id[40] = "";
    const int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) {
        const ssize_t n = read(fd, boot_id, 36);
        boot_id[n > 0 ? n : 0] = 0;
        close(fd);
    }
    uname(&uts);
    const struct msg_hello_reply m = {.port = p->which, .version = version, .features = AGENT_FEATURES,
                                      .agent_version = text_slice(AGENT_VERSION), .kernel = text_slice(uts.release),
                                      .boot_id = text_slice(boot_id), .uptime_ms = clock_boot_ms(),
                                      .n_commands = command_count()};
    port_preamble(p, p->parser.nonce);
    if (msg_hello_reply_encode(&b, &m) == 0)
        port_send_buf(p, FRAME_HELLO_REPLY, 0, 0, &b);
}

static uint64_t choose(const struct msg_hello *m)
{
    const uint64_t most = m->version_max < PROTO_VERSION_MAX ? m->version_max : PROTO_VERSION_MAX;
    return most >= PROTO_VERSION_MIN && most >= m->version_min ? most : 0;
}

static void bulk_joins(uint64_t version)
{
    early_bulk.there = false;
    reply(&bulk_port, version);
    bulk_port.up = version != 0;
}

static void hello(struct port *p, const struct frame *f)
{
    struct msg_hello m;
    if (msg_hello_decode(f->payload, f->length, &m) != 0 || m.port != p->which)
        return;
    const uint64_t version = choose(&m);
    if (p == &bulk_port) {
        early_bulk.there = true;
        early_bulk.version = version;
        memcpy(early_bulk.session, m.session, sizeof m.session);
        if (session_up && memcmp(m.session, session, sizeof session) == 0)
            bulk_joins(version);
        return;
    }
    memcpy(session, m.session, sizeof session);
    session_up = true;
    set_clock(m.wall_ms);
    boot_hostname((const char *)m.hostname.data, m.hostname.len);
    reply(p, version);
    if (version == 0)
        return;
    p->up = true;
    if (early_bulk.there && memcmp(early_bulk.session, session, sizeof session) == 0)
        bulk_joins(early_bulk.version);
    command_tell_states();
    port_send(p, FRAME_READY, 0, 0, NULL, 0, NULL, 0);
    static bool told;
    if (!told)
        port_log("agent %s ready; ms since the kernel began: %lld (%s)", AGENT_VERSION, (long long)clock_boot_ms(),
                 boot_timings);
    told = true;
}

// A preamble came: whatever was under way with the host before is void.
static void session_reset(struct port *p)
{
    port_reset(p);
    if (p != &control_port)
        return;
    session_up = false;
    port_reset(&bulk_port);
    command_session_lost();
    fileop_session_lost();
}

// ---- frames -------------------------------------------------------------------------------------------------------
static void on_run(const struct frame *f)
{
    static struct msg_run m; // large: not on the stack
    if (msg_run_decode(f->payload, f->length, &m) == 0 && m.n_args > 0)
        command_run(f->id, &m);
}

static void on_offsets(const struct frame *f)
{
    struct msg_offsets o;
    if (msg_offsets_decode(f->payload, f->length, &o) != 0)
        return;
    if (f->type == FRAME_ATTACH)
        command_attach(f->id, &o);
    else if (f->type == FRAME_ACK)
        command_ack(f->id, &o);
    else
        fileop_credit(f->id, o.file_offset);
}

static void on_file(const struct frame *f)
{
    struct msg_file file;
    if (f->type == FRAME_FILE_ABORT)
        fileop_abort(f->id);
    else if (msg_file_decode(f->payload, f->length, &file) == 0)
        fileop_begin(f->id, &file);
}

// All that came before on this port has been taken: frames are handled in their order, and an upload's content goes to
// its thread. Nothing waits here for a disk. The overlay's figures are those of the disk its upper directory is on.
static void on_freeze(const struct port *p, uint64_t id)
{
    uint8_t room[256];
    struct buf b = BUF_OVER(room);
    struct statvfs fs;
    struct msg_frozen m = {.port = p->which, .n_commands = command_running()};
    fileop_settle();
    if (statvfs("/", &fs) == 0) {
        m.disk_bytes = (uint64_t)fs.f_blocks * fs.f_frsize;
        m.disk_free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    }
    if (msg_frozen_encode(&b, &m) == 0)
        port_send_buf(&control_port, FRAME_FROZEN, 0, id, &b);
}

// What cannot be read is answered too, as done by nobody: the host need not wait for its deadline.
static void on_refresh(const struct frame *f)
{
    uint8_t room[2048];
    struct buf b = BUF_OVER(room);
    struct msg_refresh m;
    struct refreshed r = {0};
    if (msg_refresh_decode(f->payload, f->length, &m) == 0)
        refresh_do(&m, &r);
    else
        r.m.fault = text_slice("the request cannot be read");
    if (msg_refreshed_encode(&b, &r.m) == 0)
        port_send_buf(&control_port, FRAME_REFRESHED, 0, f->id, &b);
}

static void on_control(const struct frame *f)
{
    struct msg_signal signal;
    switch (f->type) {
    case FRAME_HELLO:
        hello(&control_port, f);
        break;
    case FRAME_PING:
        port_send(&control_port, FRAME_PONG, 0, f->id, NULL, 0, NULL, 0);
        break;
    case FRAME_RUN:
        on_run(f);
        break;
    case FRAME_ATTACH:
    case FRAME_ACK:
    case FRAME_FILE_CREDIT:
        on_offsets(f);
        break;
    case FRAME_SIGNAL:
        if (msg_signal_decode(f->payload, f->length, &signal) == 0)
            command_signal(f->id, &signal);
        break;
    case FRAME_FORGET:
        command_forget(f->id);
        break;
    case FRAME_FILE:
    case FRAME_FILE_ABORT:
        on_file(f);
        break;
    case FRAME_FREEZE:
        on_freeze(&control_port, f->id);
        break;
    case FRAME_REFRESH:
        on_refresh(f);
        break;
    case FRAME_SHUTDOWN:
        boot_shutdown();
    default:
        break; // of a newer host: it asked for our features and knows what we ignore
    }
}

static void on_bulk(const struct frame *f)
{
    struct msg_data d;
    if (f->type == FRAME_HELLO)
        hello(&bulk_port, f);
    else if (!bulk_port.up)
        return; // of an old session: control has begun a new one, bulk's preamble is still to come
    else if (f->type == FRAME_FREEZE)
        on_freeze(&bulk_port, f->id);
    else if (f->type == FRAME_FILE || f->type == FRAME_FILE_ABORT)
        on_file(f);
    else if (f->type != FRAME_STDIN && f->type != FRAME_FILE_DATA)
        return;
    else if (msg_data_decode(f->payload, f->length, &d) != 0)
        return;
    else if (f->type == FRAME_STDIN)
        command_stdin(f->id, &d, f->flags & FRAME_LAST);
    else
        fileop_data(f->id, &d, f->flags & FRAME_LAST);
}

static void parse(struct port *p)
{
    struct frame f;
    for (;;) {
        switch (frame_parser_next(&p->parser, &f)) {
        case FRAME_NEED_MORE:
            return;
        case FRAME_RESET:
            session_reset(p);
            break;
        case FRAME_GOT:
            if (p == &control_port)
                on_control(&f);
            else
                on_bulk(&f);
            break;
        case FRAME_SYNCED:
        case FRAME_VIOLATION:
            break;
        }
    }
}

// False when there is nothing more to read now.
static bool read_port(struct port *p)
{
    for (int i = 0; i < READS_PER_TURN; i++) {
        size_t cap;
        uint8_t *to = frame_parser_space(&p->parser, &cap);
        const ssize_t n = read(p->fd, to, cap);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) // EAGAIN, or 0: nobody is connected
            return false;
        frame_parser_fed(&p->parser, (size_t)n);
        parse(p);
    }
    return true;
}

// ---- the loop -----------------------------------------------------------------------------------------------------
static void reap_all(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        command_reaped(pid, status);
}

static void reap(void)
{
    struct signalfd_siginfo info[4];
    while (read(signal_fd, info, sizeof info) == (ssize_t)sizeof info)
        ;
    reap_all();
}

static bool pump_bulk(void)
{
    for (int i = 0; i < PUMP_FRAMES; i++) {
        if (!port_flush(&bulk_port) || !port_idle(&bulk_port))
            return false; // the port tells when it takes more
        const bool output = command_pump(), file = port_flush(&bulk_port) && fileop_pump();
        if (!output && !file)
            return false;
    }
    return true; // there may be more
}

static void dispatch(const struct epoll_event *e)
{
    struct source *s = e->data.ptr;
    uint64_t count;
    switch (s->kind) {
    case SOURCE_PORT:
        break; // read below, each turn: the ports are edge-triggered
    case SOURCE_CHILD:
        reap();
        break;
    case SOURCE_PIPE:
        command_event(s, e->events);
        break;
    case SOURCE_WAKE:
        if (read(wake_fd, &count, sizeof count) < 0)
            break;
        break;
    }
}

static void __attribute__((noreturn)) loop(void)
{
    struct epoll_event events[32];
    for (;;) {
        const bool control_more = read_port(&control_port), bulk_more = read_port(&bulk_port);
        if (!bulk_more)
            fileop_settle();
        const bool flushed = port_flush(&control_port) & port_flush(&bulk_port);
        const bool pump_more = pump_bulk();
        const int64_t next = command_tick(clock_mono_ms());
        int timeout = next < 0 ? -1 : next > 3600000 ? 3600000 : (int)next;
        if (!flushed && (timeout < 0 || timeout > 1000))
            timeout = 1000; // an edge that was missed costs a second, not a session
        if (control_more || bulk_more || pump_more)
            timeout = 0;
        const int n = epoll_wait(epoll_fd, events, 32, timeout);
        for (int i = 0; i < n; i++)
            dispatch(&events[i]);
        // A closed output is mostly the beginning of an end: to wait a moment for the rest is cheaper than to be woken
        // for each of its parts, with another address space each time.
        if (command_leaving() && sigtimedwait(&child_ended, NULL, &(struct timespec){.tv_nsec = 1000000}) > 0)
            reap_all(); // the signal is taken; nothing is left for the descriptor
    }
}

static void open_sources(void)
{
    sigemptyset(&child_ended);
    sigaddset(&child_ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ended, NULL);
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    signal_fd = signalfd(-1, &child_ended, SFD_CLOEXEC | SFD_NONBLOCK);
    wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loop_add(signal_fd, EPOLLIN, &child_source);
    loop_add(wake_fd, EPOLLIN, &wake_source);
    loop_add(control_port.fd, EPOLLIN | EPOLLOUT | EPOLLET, &control_source);
    loop_add(bulk_port.fd, EPOLLIN | EPOLLOUT | EPOLLET, &bulk_source);
}

// The guest cannot be used: say so on the console and, as soon as a host says hello, to it.
static void __attribute__((noreturn)) fatal(const char *what)
{
    dprintf(2, "airlock-agent: %s\n", what);
    for (;;) {
        struct frame f;
        size_t cap;
        uint8_t *to = frame_parser_space(&control_port.parser, &cap);
        const ssize_t n = read(control_port.fd, to, cap);
        if (n > 0)
            frame_parser_fed(&control_port.parser, (size_t)n);
        enum frame_event e;
        while ((e = frame_parser_next(&control_port.parser, &f)) != FRAME_NEED_MORE)
            if (e == FRAME_GOT && f.type == FRAME_HELLO) {
                reply(&control_port, PROTO_VERSION_MAX);
                control_port.up = true;
                port_send(&control_port, FRAME_FATAL, 0, 0, what, strlen(what), NULL, 0);
            }
        port_flush(&control_port);
        usleep(10000);
    }
}

int main(void)
{
    boot_early();
    if (port_open(&control_port, "airlock.control", MSG_PORT_CONTROL) != 0 ||
        port_open(&bulk_port, "airlock.bulk", MSG_PORT_BULK) != 0)
        return 1; // PID 1 ends: the kernel panics, QEMU ends
    const char *fault = boot_root();
    if (fault)
        fatal(fault);
    boot_finish();
    open_sources();
    fileop_start();
    loop();
}
