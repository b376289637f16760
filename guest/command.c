// Commands: started at most once, watched by deadline, their output kept until the host has stored it. Main thread only.
//
// A command lives from RUN to FORGET. Its output pipes are read into windows of at most 1 MiB of unacknowledged bytes;
// a full window stops the reading, so that the command blocks, nothing is dropped, and control goes on. When its leader
// has ended, exactly what the pipes hold at that moment still counts as its output; a child in the background that
// keeps them open is read on and its bytes thrown away, so that it neither holds the answer nor dies of SIGPIPE.
#include "guest/agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

#define COMMANDS_MAX 64 // 32 running, as many ended ones that the host has not recorded
#define KILL_GRACE_MS LIMIT_COMMAND_KILL_GRACE_MS
#define GIVE_UP_MS 1000 // after KILL: the answer comes even when the process cannot die

struct pipe_end {
    struct source source;
    struct command *c;
    int index;                   // 0 stdin, 1 stdout, 2 stderr
    int fd;
    bool armed;                  // in the epoll set
};

struct command {
    bool used;
    uint64_t id;
    char command_id[40];
    pid_t pid;
    bool ended, told;            // leader reaped; EXITED sent
    bool forgotten;              // drop the record as soon as the leader is reaped
    bool live;                   // output may be sent in this session
    int64_t started_ms, deadline_ms, ended_ms;
    int term_sent;               // 0, then 1 TERM, 2 KILL
    bool timed_out, killed;
    struct msg_command state;
    struct pipe_end ends[3];
    struct window out[2];
    uint64_t drain[2];           // after the end: bytes that still count
    // stdin
    uint8_t *in;                 // ring of WINDOW_MAX, allocated with the first byte
    uint64_t in_start, in_end;   // taken by the pipe, received
    bool in_last, has_stdin;
};

static struct command commands[COMMANDS_MAX];
static unsigned turn;            // round robin over the commands' windows
static bool leaving;             // an output was closed since command_leaving was asked

static struct command *by_id(uint64_t id)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].used && commands[i].id == id)
            return &commands[i];
    return NULL;
}

size_t command_count(void)
{
    size_t n = 0;
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        n += commands[i].used && !commands[i].forgotten;
    return n;
}

size_t command_running(void)
{
    size_t n = 0;
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        n += commands[i].used && !commands[i].ended;
    return n;
}

// ---- telling ------------------------------------------------------------------------------------------------------
static void tell(struct command *c, int type)
{
    uint8_t room[1024];
    struct buf b = BUF_OVER(room);
    c->state.command_id = (struct slice){(const uint8_t *)c->command_id, strlen(c->command_id)};
    c->state.stdin_bytes = c->in_start;
    c->state.stdin_received = c->in_end;
    c->state.stdin_closed = c->in_last;
    c->state.stdout_bytes = c->out[0].end;
    c->state.stderr_bytes = c->out[1].end;
    if (msg_command_encode(&b, &c->state) == 0)
        (void)port_send_buf(&control_port, (uint8_t)type, 0, c->id, &b);
}

void command_tell_states(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].used && !commands[i].forgotten)
            tell(&commands[i], FRAME_COMMAND_STATE);
}

void command_session_lost(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        commands[i].live = false;
}

// ---- pipes ----------------------------------------------------------------------------------------------------------
static void end_close(struct pipe_end *e)
{
    if (e->fd < 0)
        return;
    close(e->fd); // and leaves the epoll set: nobody else has it, a child closes it before its exec returns to us
    e->fd = -1;
    e->armed = false;
}

static void end_arm(struct pipe_end *e, bool on, uint32_t events)
{
    if (e->fd < 0 || e->armed == on)
        return;
    if (on)
        e->armed = loop_add(e->fd, events, e) == 0;
    else {
        loop_del(e->fd);
        e->armed = false;
    }
}

static void release(struct command *c)
{
    for (int i = 0; i < 3; i++)
        end_close(&c->ends[i]);
    window_free(&c->out[0]);
    window_free(&c->out[1]);
    free(c->in);
    memset(c, 0, sizeof *c);
}

// Still open after everything was told: bytes nobody counts.
static void discard(struct pipe_end *e)
{
    static char sink[65536];
    for (int i = 0; i < 16; i++) {
        const ssize_t n = read(e->fd, sink, sizeof sink);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0 || (n < 0 && errno != EAGAIN))
            end_close(e);
        if (n <= 0)
            return;
    }
}

static bool drained(const struct command *c)
{
    return (c->drain[0] == 0 || c->ends[1].fd < 0) && (c->drain[1] == 0 || c->ends[2].fd < 0);
}

static void try_tell_exit(struct command *c)
{
    if (!c->ended || c->told || !drained(c))
        return;
    c->told = true;
    c->state.phase = MSG_COMMAND_EXITED;
    c->state.duration_ms = c->ended_ms - c->started_ms;
    end_close(&c->ends[0]);
    if (c->live)
        tell(c, FRAME_EXITED);
    for (int i = 1; i < 3; i++) // from now on: read and forget
        end_arm(&c->ends[i], true, EPOLLIN);
}

// Reads what the window has room for. Stops at EAGAIN, at the end, or when full (then the pipe waits for an ACK).
static void take_output(struct pipe_end *e)
{
    struct command *c = e->c;
    const int stream = e->index - 1;
    struct window *w = &c->out[stream];
    for (int i = 0; i < 16 && e->fd >= 0; i++) {
        size_t room = window_room(w);
        if (c->ended && room > c->drain[stream])
            room = (size_t)c->drain[stream];
        uint8_t *to = room ? window_space(w, room < 65536 ? room : 65536, &room) : NULL;
        if (!to) { // full, or all that counts is read: the pipe is looked at again by an ACK, or to throw away
            end_arm(e, false, 0);
            break;
        }
        const ssize_t n = read(e->fd, to, room);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            c->drain[stream] = c->ended ? 0 : c->drain[stream];
            break;
        }
        if (n <= 0) {
            end_close(e);
            c->drain[stream] = 0;
            leaving = leaving || !c->ended;
            break;
        }
        window_added(w, (size_t)n);
        c->drain[stream] -= c->ended ? (uint64_t)n : 0;
    }
    try_tell_exit(c);
}

// ---- stdin ------------------------------------------------------------------------------------------------------
static void credit_stdin(struct command *c)
{
    uint8_t room[256];
    struct buf b = BUF_OVER(room);
    const struct msg_offsets o = {.stdin_offset = c->in_start};
    if (msg_offsets_encode(&b, &o) == 0)
        (void)port_send_buf(&control_port, FRAME_STDIN_CREDIT, 0, c->id, &b);
}

static void give_stdin(struct command *c)
{
    struct pipe_end *e = &c->ends[0];
    const uint64_t before = c->in_start;
    while (e->fd >= 0 && c->in_start < c->in_end) {
        const size_t at = (size_t)(c->in_start % WINDOW_MAX), have = (size_t)(c->in_end - c->in_start);
        const ssize_t n = write(e->fd, c->in + at, have < WINDOW_MAX - at ? have : WINDOW_MAX - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) // nobody reads any more: taken and thrown away
            end_close(e);
        else
            c->in_start += (uint64_t)n;
    }
    if (e->fd < 0)
        c->in_start = c->in_end;
    if (c->in_start != before)
        credit_stdin(c);
    if (c->in_last && c->in_start == c->in_end)
        end_close(e);
    end_arm(e, c->in_start < c->in_end, EPOLLOUT);
}

void command_stdin(uint64_t id, const struct msg_data *d, bool last)
{
    struct command *c = by_id(id);
    if (!c || !c->has_stdin || c->in_last || d->offset > c->in_end)
        return;
    if (!c->in && !(c->in = malloc(WINDOW_MAX)))
        return;
    const uint64_t known = c->in_end - d->offset; // repeated after a new session
    if (known <= d->bytes.len) {
        const uint8_t *data = d->bytes.data + known;
        size_t len = d->bytes.len - (size_t)known;
        if (len > WINDOW_MAX - (size_t)(c->in_end - c->in_start))
            return; // more than the window: not what our host does
        while (len > 0) {
            const size_t at = (size_t)(c->in_end % WINDOW_MAX), n = len < WINDOW_MAX - at ? len : WINDOW_MAX - at;
            memcpy(c->in + at, data, n);
            c->in_end += n;
            data += n;
            len -= n;
        }
        c->in_last = last;
    }
    give_stdin(c);
}

void command_event(void *source, uint32_t events)
{
    struct pipe_end *e = source;
    struct command *c = e->c;
    if (e->index == 0) {
        if (events & EPOLLERR) { // the reader is gone
            end_close(e);
            c->in_start = c->in_end;
            credit_stdin(c);
            return;
        }
        give_stdin(c);
    } else if (c->told) {
        discard(e);
    } else if ((events & (EPOLLIN | EPOLLHUP)) == EPOLLHUP) { // closed and empty: no buffer is made to learn it by
        end_close(e);
        c->drain[e->index - 1] = 0;
        leaving = leaving || !c->ended;
        try_tell_exit(c);
    } else {
        take_output(e);
    }
}

// ---- sending, acknowledging ---------------------------------------------------------------------------------------------
bool command_pump(void)
{
    for (unsigned i = 0; i < 2 * COMMANDS_MAX; i++) {
        struct command *c = &commands[turn / 2 % COMMANDS_MAX];
        const unsigned stream = turn % 2;
        turn = (turn + 1) % (2 * COMMANDS_MAX);
        size_t n;
        const uint8_t *data = c->used && c->live ? window_unsent(&c->out[stream], &n) : NULL;
        if (!data)
            continue;
        uint8_t head[MSG_DATA_HEADER];
        if (n > FRAME_DATA_MAX - MSG_DATA_HEADER)
            n = FRAME_DATA_MAX - MSG_DATA_HEADER;
        msg_data_header(head, stream ? MSG_STDERR : MSG_STDOUT, c->out[stream].sent);
        if (!port_send(&bulk_port, FRAME_OUTPUT, 0, c->id, head, sizeof head, data, n))
            return false;
        c->out[stream].sent += n;
        return true;
    }
    return false;
}

static void resume_reading(struct command *c)
{
    for (int i = 1; i < 3; i++)
        if (c->ends[i].fd >= 0 && !c->ends[i].armed && window_room(&c->out[i - 1]) > 0)
            take_output(&c->ends[i]), end_arm(&c->ends[i], true, EPOLLIN);
}

void command_ack(uint64_t id, const struct msg_offsets *o)
{
    struct command *c = by_id(id);
    if (!c)
        return;
    window_ack(&c->out[0], o->stdout_offset);
    window_ack(&c->out[1], o->stderr_offset);
    resume_reading(c);
}

void command_attach(uint64_t id, const struct msg_offsets *o)
{
    struct command *c = by_id(id);
    if (!c)
        return;
    window_rewind(&c->out[0], o->stdout_offset);
    window_rewind(&c->out[1], o->stderr_offset);
    c->live = true;
    resume_reading(c);
    if (c->told)
        tell(c, FRAME_EXITED);
}

// ---- starting -----------------------------------------------------------------------------------------------------
static void exec_failure(struct command *c, int err)
{
    c->state.outcome = MSG_EXITED;
    c->state.exit_code = err == ENOENT || err == ENOTDIR ? 127 : 126;
    c->state.spawn_stage = MSG_SPAWN_EXEC;
    c->state.spawn_errno = (uint64_t)err;
}

static void spawn_failure(struct command *c, int stage, int err)
{
    c->state.outcome = MSG_SPAWN_FAILED;
    c->state.spawn_stage = (uint64_t)stage;
    c->state.spawn_errno = (uint64_t)err;
}

static void end_now(struct command *c)
{
    c->ended = true;
    c->ended_ms = clock_mono_ms();
    try_tell_exit(c);
}

static bool dir_exists(const char *path)
{
    const int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

static void start(struct command *c, const struct msg_run *m)
{
    struct user user;
    struct spawn_pipes p = {{-1, -1, -1}, {-1, -1, -1}};
    if (user_find((const char *)m->user.data, m->user.len, &user) != 0) {
        spawn_failure(c, MSG_SPAWN_USER, ENOENT);
        end_now(c);
        return;
    }
    const char *path;
    words_begin();
    const char *cwd = m->cwd.len ? words_text(m->cwd) : dir_exists("/work") ? "/work" : "/";
    const char *write_dir = m->write_dir.len ? words_text(m->write_dir) : NULL;
    char **argv = words_argv(m), **envp = words_env(m, &user, &path);
    struct spawn s = {.user = &user, .cwd = cwd, .argv = argv, .envp = envp, .path = path, .write_dir = write_dir,
                      .make_dir = m->make_dir};
    if (!cwd || !argv[0] || !spawn_pipes(&p, c->has_stdin)) {
        spawn_failure(c, MSG_SPAWN_SYSTEM, errno ? errno : ENOMEM);
    } else {
        s.stdin_fd = c->has_stdin ? p.theirs[0] : spawn_null();
        s.stdout_fd = p.theirs[1];
        s.stderr_fd = p.theirs[2];
        c->pid = spawn_run(&s);
        c->state.pid = c->pid > 0 ? (uint64_t)c->pid : 0;
        if (s.stage == MSG_SPAWN_EXEC)
            exec_failure(c, s.err);
        else if (s.stage != MSG_SPAWN_OK)
            spawn_failure(c, s.stage, s.err);
    }
    for (int i = 0; i < 3; i++) {
        c->ends[i].fd = p.ours[i];
        p.ours[i] = -1;
    }
    spawn_pipes_close(p.theirs);
    if (c->pid <= 0) {
        spawn_pipes_close((int[3]){-1, -1, -1});
        end_now(c);
        return;
    }
    end_arm(&c->ends[1], true, EPOLLIN);
    end_arm(&c->ends[2], true, EPOLLIN);
}

static struct command *free_slot(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (!commands[i].used)
            return &commands[i];
    // All taken: one whose record is gone and that only reads on behind a child in the background makes room.
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].forgotten && commands[i].ended) {
            release(&commands[i]);
            return &commands[i];
        }
    return NULL;
}

static struct command *by_command_id(struct slice id)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].used && strlen(commands[i].command_id) == id.len &&
            memcmp(commands[i].command_id, id.data, id.len) == 0)
            return &commands[i];
    return NULL;
}

static void refuse(uint64_t id, const struct msg_run *m)
{
    struct command none = {.id = id, .state = {.phase = MSG_COMMAND_EXITED}};
    snprintf(none.command_id, sizeof none.command_id, "%.*s", (int)m->command_id.len, (const char *)m->command_id.data);
    spawn_failure(&none, MSG_SPAWN_SYSTEM, EAGAIN);
    tell(&none, FRAME_EXITED);
}

void command_run(uint64_t id, const struct msg_run *m)
{
    struct command *c = by_command_id(m->command_id);
    if (c) { // at most once: a repeated RUN only learns of it
        tell(c, c->told ? FRAME_EXITED : FRAME_STARTED);
        return;
    }
    c = m->command_id.len < sizeof c->command_id ? free_slot() : NULL;
    if (!c) {
        refuse(id, m);
        return;
    }
    *c = (struct command){.used = true, .id = id, .live = true, .has_stdin = m->has_stdin,
                          .started_ms = clock_mono_ms(), .state = {.phase = MSG_COMMAND_RUNNING}};
    memcpy(c->command_id, m->command_id.data, m->command_id.len);
    const uint64_t most = (uint64_t)LIMIT_COMMAND_TIMEOUT_S_MAX * 1000;
    c->deadline_ms = c->started_ms + (int64_t)(m->timeout_ms < most ? m->timeout_ms : most);
    for (int i = 0; i < 3; i++)
        c->ends[i] = (struct pipe_end){.source = {SOURCE_PIPE}, .c = c, .index = i, .fd = -1};
    start(c, m);
    if (!c->told && !m->quiet)
        tell(c, FRAME_STARTED);
}

// ---- ending -------------------------------------------------------------------------------------------------------
static void group_signal(struct command *c, int number)
{
    if (c->pid > 0 && !c->ended)
        kill(-c->pid, number);
}

void command_signal(uint64_t id, const struct msg_signal *m)
{
    struct command *c = by_id(id);
    if (!c || c->pid <= 0 || c->ended || m->signal == 0 || m->signal > 64)
        return;
    kill(m->group ? -c->pid : c->pid, (int)m->signal);
}

void command_forget(uint64_t id)
{
    struct command *c = by_id(id);
    if (!c)
        return;
    if (c->ended && c->told) {
        // Pipes that a background child holds stay open until it closes them, with nobody's record behind them.
        for (int i = 1; i < 3; i++)
            if (c->ends[i].fd >= 0)
                discard(&c->ends[i]);
        window_free(&c->out[0]);
        window_free(&c->out[1]);
        free(c->in);
        c->in = NULL;
        c->forgotten = true;
        c->command_id[0] = 0;
        c->id = 0;
        if (c->ends[1].fd < 0 && c->ends[2].fd < 0)
            release(c);
        return;
    }
    c->killed = true;
    c->forgotten = true;
    group_signal(c, SIGKILL);
}

bool command_leaving(void)
{
    const bool was = leaving;
    leaving = false;
    return was;
}

static struct command *by_pid(pid_t pid)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].used && commands[i].pid == pid && !commands[i].ended)
            return &commands[i];
    return NULL;
}

void command_reaped(pid_t pid, int status)
{
    struct command *c = by_pid(pid);
    if (!c)
        return; // an orphan that PID 1 inherited
    c->ended = true;
    c->ended_ms = clock_mono_ms();
    if (c->state.spawn_stage == MSG_SPAWN_OK) {
        c->state.outcome = c->timed_out ? MSG_TIMED_OUT : WIFSIGNALED(status) ? MSG_SIGNALED : MSG_EXITED;
        c->state.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
        c->state.signal = WIFSIGNALED(status) ? (uint64_t)WTERMSIG(status) : 0;
    }
    for (int i = 1; i < 3; i++) {
        int waiting = 0;
        if (c->ends[i].fd >= 0 && ioctl(c->ends[i].fd, FIONREAD, &waiting) == 0 && waiting > 0)
            c->drain[i - 1] = (uint64_t)waiting;
    }
    for (int i = 1; i < 3; i++)
        if (c->ends[i].fd >= 0 && c->drain[i - 1] > 0)
            take_output(&c->ends[i]);
    try_tell_exit(c);
    if (c->forgotten)
        release(c);
}

// A command past its deadline: TERM, two seconds later KILL, and the answer at the latest one second after that.
static int64_t enforce(struct command *c, int64_t now)
{
    static const int SIGNALS[] = {SIGTERM, SIGKILL};
    if (c->ended)
        return -1;
    if (now < c->deadline_ms)
        return c->deadline_ms - now;
    c->timed_out = true;
    if (c->term_sent < 2) {
        group_signal(c, SIGNALS[c->term_sent++]);
        c->deadline_ms = now + (c->term_sent == 1 ? KILL_GRACE_MS : GIVE_UP_MS);
        return c->deadline_ms - now;
    }
    c->state.outcome = MSG_TIMED_OUT; // it cannot be killed: told all the same
    c->state.signal = SIGKILL;
    c->ended = true;
    c->ended_ms = now;
    try_tell_exit(c);
    return -1;
}

int64_t command_tick(int64_t now)
{
    int64_t next = -1;
    for (size_t i = 0; i < COMMANDS_MAX; i++) {
        struct command *c = &commands[i];
        if (c->used && c->forgotten && c->ended && c->ends[1].fd < 0 && c->ends[2].fd < 0)
            release(c);
        const int64_t left = c->used ? enforce(c, now) : -1;
        if (left >= 0 && (next < 0 || left < next))
            next = left;
    }
    return next;
}

void command_kill_all(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (commands[i].used)
            group_signal(&commands[i], SIGTERM);
}
