// QMP: one connection, calls from workers, events on the loop. And the console, drained and rate-limited.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/limits.h"
#include "base/log.h"
#include "qemu/vm_int.h"

#define RESUME_MS 1000

// ---- events -------------------------------------------------------------------------------------------------------
static void say(struct vm *vm, const char *text)
{
    vm->cb->vmm_log(vm->arg, text, strlen(text));
}

// Under vm->lock.
static int send_line_locked(struct vm *vm, const char *text)
{
    const size_t len = strlen(text);
    return vm->qmp_fd >= 0 && send(vm->qmp_fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)len ? 0 : -1;
}

static int send_line(struct vm *vm, const char *text)
{
    pthread_mutex_lock(&vm->lock);
    const int failed = send_line_locked(vm, text);
    pthread_mutex_unlock(&vm->lock);
    return failed;
}

void qmp_send(struct vm *vm, const char *command)
{
    char text[80];
    snprintf(text, sizeof text, "{\"execute\":\"%.40s\"}\n", command);
    (void)send_line(vm, text);
}

// One hold of the lock for the look and the words: vm_pause says that it is paused before it sends its `stop`, so that no
// `cont` of ours can come after that.
void qmp_go_on(struct vm *vm, bool or_stop)
{
    pthread_mutex_lock(&vm->lock);
    if (!vm->paused)
        (void)send_line_locked(vm, "{\"execute\":\"cont\"}\n");
    else if (or_stop)
        (void)send_line_locked(vm, "{\"execute\":\"stop\"}\n");
    pthread_mutex_unlock(&vm->lock);
}

// QEMU stopped the VM because the host's disk was full: look whether it can go on.
static void try_resume(void *arg)
{
    struct vm *vm = arg;
    vm->resume_timer = NULL;
    if (!vm->io_paused)
        return;
    qmp_go_on(vm, false); // one that is paused goes on when its owner says so
    vm->resume_timer = loop_timer_add(vm->loop, RESUME_MS, try_resume, vm);
}

static void on_event(struct vm *vm, const json_t *o)
{
    const char *name = json_get_str(o, "event");
    const json_t *data = json_object_get(o, "data");
    char text[160];
    if (!name)
        return;
    const char *reason = json_get_str(data, "reason");
    snprintf(text, sizeof text, "qmp: %.60s%s%.60s", name, reason ? " " : "", reason ? reason : "");
    if (strcmp(name, "SHUTDOWN") == 0) {
        vm->shutdown_seen = json_is_true(json_object_get(data, "guest"));
        say(vm, text);
    } else if (strcmp(name, "GUEST_PANICKED") == 0) {
        vm->panic_seen = true;
        say(vm, text);
    } else if (strcmp(name, "BLOCK_IO_ERROR") == 0) {
        if (json_is_true(json_object_get(data, "nospace")) && !vm->io_paused) {
            vm->io_paused = true;
            say(vm, "the host's disk is full: the VM is stopped until there is room");
            vm->cb->io_error(vm->arg, true);
            if (!vm->resume_timer)
                vm->resume_timer = loop_timer_add(vm->loop, RESUME_MS, try_resume, vm);
        }
    } else if (strcmp(name, "RESUME") == 0 && vm->io_paused) {
        vm->io_paused = false;
        vm->cb->io_error(vm->arg, false);
    }
}

// ---- answers ------------------------------------------------------------------------------------------------------
static void on_answer(struct vm *vm, json_t *o, enum qmp_kind kind)
{
    const uint64_t id = (uint64_t)json_get_int(o, "id", 0);
    pthread_mutex_lock(&vm->lock);
    for (struct qmp_call **at = &vm->calls; *at; at = &(*at)->next) {
        struct qmp_call *call = *at;
        if (call->id != id)
            continue;
        *at = call->next;
        call->done = true;
        if (kind == QMP_RETURN) {
            call->ret = json_incref(json_object_get(o, "return"));
            (void)json_object_del(o, "return"); // from here on it is the caller's thread's alone
        } else {
            const char *desc = json_get_str(json_object_get(o, "error"), "desc");
            snprintf(call->error, sizeof call->error, "%s", desc ? desc : "QMP error");
        }
        pthread_cond_broadcast(&vm->changed);
        break;
    }
    pthread_mutex_unlock(&vm->lock);
}

static void on_object(struct vm *vm, json_t *o, enum qmp_kind kind)
{
    switch (kind) {
    case QMP_GREETING:
        (void)send_line(vm, "{\"execute\":\"qmp_capabilities\"}\n");
        pthread_mutex_lock(&vm->lock);
        vm->qmp_up = true;
        pthread_cond_broadcast(&vm->changed);
        pthread_mutex_unlock(&vm->lock);
        if (vm->adopted) // stopped while nobody was there to hear why; or let go on by a server that had no time to say so
            qmp_go_on(vm, true);
        break;
    case QMP_EVENT:
        on_event(vm, o);
        break;
    case QMP_RETURN:
    case QMP_ERROR:
        on_answer(vm, o, kind);
        break;
    case QMP_OTHER:
        break;
    }
}

void qmp_drain(struct vm *vm)
{
    char chunk[8192];
    for (int i = 0; i < 64 && vm->qmp_fd >= 0; i++) {
        const ssize_t n = recv(vm->qmp_fd, chunk, sizeof chunk, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0 || qmp_parser_feed(&vm->qmp, chunk, (size_t)n) != 0) {
            qmp_close(vm);
            return;
        }
        enum qmp_kind kind;
        for (json_t *o; (o = qmp_parser_next(&vm->qmp, &kind, NULL)); json_decref(o))
            on_object(vm, o, kind);
    }
}

static void on_qmp(void *arg, uint32_t events)
{
    (void)events;
    qmp_drain(arg);
}

void qmp_connect(struct vm *vm, int fd_stolen)
{
    qmp_parser_init(&vm->qmp);
    pthread_mutex_lock(&vm->lock);
    vm->qmp_fd = fd_stolen;
    pthread_mutex_unlock(&vm->lock);
    if (vm->qmp_fd >= 0)
        vm->qmp_watch = loop_watch_add(vm->loop, vm->qmp_fd, EPOLLIN, on_qmp, vm);
}

void qmp_close(struct vm *vm)
{
    loop_watch_remove(vm->qmp_watch);
    vm->qmp_watch = NULL;
    pthread_mutex_lock(&vm->lock);
    fd_close(&vm->qmp_fd);
    vm->qmp_up = false;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    qmp_parser_free(&vm->qmp);
}

static void deadline_in(struct timespec *ts, int ms)
{
    clock_gettime(CLOCK_MONOTONIC, ts);
    ts->tv_sec += ms / 1000;
    ts->tv_nsec += ms % 1000 * 1000000l;
    if (ts->tv_nsec >= 1000000000l) {
        ts->tv_nsec -= 1000000000l;
        ts->tv_sec++;
    }
}

static void unlist(struct vm *vm, const struct qmp_call *call)
{
    for (struct qmp_call **at = &vm->calls; *at; at = &(*at)->next)
        if (*at == call) {
            *at = call->next;
            return;
        }
}

// One line, whole or not at all, with a descriptor where there is one.
static bool send_with_fd(int socket, const char *text, size_t len, int fd)
{
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {(void *)text, len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = control.room;
        m.msg_controllen = sizeof control.room;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    return sendmsg(socket, &m, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)len;
}

json_t *vm_qmp(struct vm *vm, const char *command, json_t *arguments, int timeout_ms, struct err *err)
{
    return vm_qmp_fd(vm, command, arguments, -1, timeout_ms, err);
}

json_t *vm_qmp_fd(struct vm *vm, const char *command, json_t *arguments, int fd, int timeout_ms, struct err *err)
{
    struct qmp_call call = {0};
    struct timespec until;
    deadline_in(&until, timeout_ms);
    pthread_mutex_lock(&vm->lock);
    int waited = 0;
    while (!vm->qmp_up && !vm->gone && waited == 0)
        waited = pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
    call.id = ++vm->next_qmp_id;
    json_t *o = json_pack("{s:s, s:I, s:o*}", "execute", command, "id", (json_int_t)call.id, "arguments", arguments);
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    const size_t len = text ? strlen(text) : 0;
    bool sent = false;
    if (vm->qmp_up && text) {
        text[len] = '\n';
        sent = send_with_fd(vm->qmp_fd, text, len + 1, fd);
    }
    json_decref(o);
    free(text);
    if (sent) {
        call.next = vm->calls;
        // cppcheck-suppress autoVariables ; unlisted below before it ends
        vm->calls = &call;
        while (!call.done && !vm->gone && vm->qmp_up && waited == 0)
            waited = pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
        if (!call.done)
            unlist(vm, &call);
    }
    pthread_mutex_unlock(&vm->lock);
    if (call.ret)
        return call.ret;
    if (waited == ETIMEDOUT)
        err_set(err, ERR_TIMEOUT, "qmp_timeout", "the virtual machine monitor did not answer in time");
    else
        err_set(err, ERR_TRANSPORT_FAILED, "qmp_failed", "the virtual machine monitor refused: %.100s",
                *call.error ? call.error : "no connection");
    return NULL;
}

// ---- console ------------------------------------------------------------------------------------------------------
// At most LIMIT_CONSOLE_BYTES_PER_S are kept; the rest is read and counted, so that a guest that shouts is never held up
// by us nor we by it.
static void console_flush(struct vm *vm)
{
    const uint64_t dropped = vm->console_dropped;
    if (vm->console_len == 0 && dropped == 0)
        return;
    vm->console_dropped = 0;
    vm->cb->console(vm->arg, vm->console_line, vm->console_len, dropped);
    vm->console_len = 0;
}

// Whole lines: the serial port delivers a few bytes at a time.
static void console_add(struct vm *vm, const uint8_t *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (data[i] == '\r')
            continue;
        vm->console_line[vm->console_len++] = data[i];
        if (data[i] == '\n' || vm->console_len == sizeof vm->console_line)
            console_flush(vm);
    }
}

static void on_console(void *arg, uint32_t events)
{
    struct vm *vm = arg;
    uint8_t chunk[4096];
    (void)events;
    for (int i = 0; i < 32; i++) {
        const ssize_t n = recv(vm->console_fd, chunk, sizeof chunk, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0 || (n < 0 && errno != EAGAIN))
            console_close(vm);
        if (n <= 0)
            return;
        const int64_t now = clock_mono_ms();
        if (now - vm->console_window_ms >= 1000) {
            vm->console_window_ms = now;
            vm->console_bytes = 0;
        }
        vm->console_bytes += (uint64_t)n;
        if (vm->console_bytes > LIMIT_CONSOLE_BYTES_PER_S)
            vm->console_dropped += (uint64_t)n;
        else
            console_add(vm, chunk, (size_t)n);
    }
}

void console_connect(struct vm *vm, int fd_stolen)
{
    vm->console_fd = fd_stolen;
    if (fd_stolen >= 0)
        vm->console_watch = loop_watch_add(vm->loop, fd_stolen, EPOLLIN, on_console, vm);
}

void console_close(struct vm *vm)
{
    if (vm->attached)
        console_flush(vm);
    loop_watch_remove(vm->console_watch);
    vm->console_watch = NULL;
    fd_close(&vm->console_fd);
}

// What QEMU has written to its standard error since the last look.
void stderr_tell(struct vm *vm)
{
    char text[2048];
    struct process *p = &vm->process;
    if (p->stderr_fd < 0)
        return;
    for (ssize_t n; (n = pread(p->stderr_fd, text, sizeof text, (off_t)p->stderr_told)) > 0;) {
        const size_t len = strnlen(text, (size_t)n); // the rest of the file is zeros
        if (len == 0)
            return;
        vm->cb->vmm_log(vm->arg, text, len);
        p->stderr_told += len;
    }
}
