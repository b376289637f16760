// The session with the agent: hello on control, then on bulk, the commands it holds, then pings.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/crypto.h"
#include "base/fd.h"
#include "base/limits.h"
#include "base/log.h"
#include "qemu/vm_int.h"

#define FEATURES_NEEDED (MSG_FEATURE_COMMANDS | MSG_FEATURE_FILES | MSG_FEATURE_STDIN | MSG_FEATURE_SHUTDOWN)

static void reconnect_later(struct vm *vm);

// ---- connecting -----------------------------------------------------------------------------------------------------
// Both are connected before a saved state is loaded: a guest that finds its host as it left it has nothing to do about that.
void session_hold(struct vm *vm)
{
    vm->early_fds[0] = fd_unix_connect(vm->run_dirfd, "control");
    vm->early_fds[1] = fd_unix_connect(vm->run_dirfd, "bulk");
}

static int connected(struct vm *vm, const char *name, enum msg_port port)
{
    int *early = &vm->early_fds[port == MSG_PORT_BULK];
    return *early >= 0 ? fd_steal(early) : fd_unix_connect(vm->run_dirfd, name);
}

static int open_channel(struct vm *vm, struct channel *c, const char *name, enum msg_port port)
{
    CLEANUP_BUF struct buf hello = BUF_INIT(512);
    const struct msg_hello m = {.port = port, .version_min = PROTO_VERSION_MIN, .version_max = PROTO_VERSION_MAX,
                                .wall_ms = clock_wall_ms(), .hostname = {(const uint8_t *)vm->hostname, strlen(vm->hostname)}};
    struct msg_hello with = m;
    memcpy(with.session, vm->session, sizeof with.session);
    const int fd = connected(vm, name, port);
    if (fd < 0)
        return -1;
    if (msg_hello_encode(&hello, &with) != 0) {
        close(fd);
        return -1;
    }
    return channel_open(c, fd, &hello, port == MSG_PORT_CONTROL ? vm->first : NULL);
}

static void hello_late(void *arg)
{
    struct vm *vm = arg;
    vm->hello_timer = NULL;
    if (vm_is_paused(vm)) { // cannot answer; it does once it goes on
        vm->hello_timer = loop_timer_add(vm->loop, LIMIT_AGENT_HELLO_MS, hello_late, vm);
        return;
    }
    log_warn_limited("vm %s: no hello from the agent in time", vm->id);
    session_close(vm);
    reconnect_later(vm);
}

void session_connect(struct vm *vm)
{
    const bool early = vm->early_fds[1] >= 0;
    pthread_mutex_lock(&vm->lock);
    vm->sessions++;
    pthread_mutex_unlock(&vm->lock);
    vm->control_said = vm->bulk_said = vm->states_done = false;
    if (crypto_random(vm->session, sizeof vm->session) != 0 ||
        open_channel(vm, &vm->control, "control", MSG_PORT_CONTROL) != 0 ||
        (early && open_channel(vm, &vm->bulk, "bulk", MSG_PORT_BULK) != 0)) {
        session_close(vm);
        reconnect_later(vm);
        return;
    }
    // A guest that boots has the boot's deadline instead (vm_wait_ready).
    if (vm->ready || vm->adopted)
        vm->hello_timer = loop_timer_add(vm->loop, LIMIT_AGENT_HELLO_MS, hello_late, vm);
}

static void reconnect_now(void *arg)
{
    struct vm *vm = arg;
    vm->reconnect_timer = NULL;
    session_connect(vm);
}

static void reconnect_later(struct vm *vm)
{
    if (vm->reconnect_timer || !vm->attached)
        return;
    vm->reconnect_timer = loop_timer_add(vm->loop, vm->reconnect_ms, reconnect_now, vm);
    vm->reconnect_ms = 2 * vm->reconnect_ms < RECONNECT_MAX_MS ? 2 * vm->reconnect_ms : RECONNECT_MAX_MS;
}

static void cancel(struct loop_timer **t)
{
    loop_timer_cancel(*t);
    *t = NULL;
}

void session_close(struct vm *vm)
{
    const bool was_up = vm->session_up;
    vm->session_up = false;
    cancel(&vm->hello_timer);
    cancel(&vm->ping_timer);
    cancel(&vm->reconnect_timer);
    channel_close(&vm->control);
    channel_close(&vm->bulk);
    state_session_lost(vm);
    if (was_up && vm->attached)
        vm->cb->session(vm->arg, vm->mute, true);
}

// ---- pings ------------------------------------------------------------------------------------------------------
static void ping(void *arg)
{
    struct vm *vm = arg;
    vm->ping_timer = loop_timer_add(vm->loop, PING_MS, ping, vm);
    if (vm_is_paused(vm)) // what is open is answered after it; the wait begins anew then
        vm->pong_ms = clock_mono_ms();
    const bool late = vm->ping_open && clock_mono_ms() - vm->pong_ms > LIMIT_AGENT_MUTE_MS;
    if (late && !vm->mute) {
        vm->mute = true;
        vm->cb->session(vm->arg, true, false);
    }
    if (vm->ping_open || vm_is_paused(vm))
        return;
    vm->ping_open = true;
    vm->ping_sent_us = clock_mono_us();
    (void)channel_send(&vm->control, FRAME_PING, 0, 1, NULL, 0, NULL, 0);
}

static void on_pong(struct vm *vm)
{
    vm->ping_open = false;
    vm->pong_ms = clock_mono_ms();
    atomic_store(&vm->last_ping_us, clock_mono_us() - vm->ping_sent_us);
    if (!vm->mute)
        return;
    vm->mute = false;
    vm->cb->session(vm->arg, false, false);
}

// ---- hello ------------------------------------------------------------------------------------------------------
static void copy_text(char *out, size_t cap, struct slice s)
{
    const size_t n = s.len < cap - 1 ? s.len : cap - 1;
    size_t k = 0;
    for (size_t i = 0; i < n; i++)
        if (s.data[i] >= 0x20 && s.data[i] < 0x7f)
            out[k++] = (char)s.data[i];
    out[k] = 0;
}

static void refuse_agent(struct vm *vm, const struct msg_hello_reply *m)
{
    struct err err = {0};
    char version[MSG_VERSION_MAX];
    copy_text(version, sizeof version, m->agent_version);
    err_set(&err, ERR_ADMISSION_FAILED, "agent_version",
            "the guest's agent %s speaks no protocol this server knows, or lacks a feature it needs", version);
    vm_note_fatal(vm, &err);
}

static void maybe_ready(struct vm *vm)
{
    if (!vm->control_said || !vm->bulk_said || !vm->states_done || vm->session_up)
        return;
    cancel(&vm->hello_timer);
    vm->session_up = true;
    vm->reconnect_ms = RECONNECT_MS;
    vm->ping_open = false;
    vm->pong_ms = clock_mono_ms();
    if (!vm->ping_timer)
        vm->ping_timer = loop_timer_add(vm->loop, PING_MS, ping, vm);
    vm->cb->ready(vm->arg, &vm->hello);
    if (vm->mute) {
        vm->mute = false;
        vm->cb->session(vm->arg, false, false);
    }
    vm_note_ready(vm);
}

static void on_hello_reply(struct vm *vm, struct channel *c, const struct frame *f)
{
    struct msg_hello_reply m;
    if (msg_hello_reply_decode(f->payload, f->length, &m) != 0)
        return;
    if (c == &vm->bulk) {
        vm->bulk_said = m.version != 0;
        channel_up(c, true);
        maybe_ready(vm);
        return;
    }
    if (m.version < PROTO_VERSION_MIN || m.version > PROTO_VERSION_MAX ||
        (m.features & FEATURES_NEEDED) != FEATURES_NEEDED) {
        refuse_agent(vm, &m);
        return;
    }
    vm->hello = (struct vm_hello){.version = m.version, .features = m.features, .uptime_ms = m.uptime_ms};
    copy_text(vm->hello.agent_version, sizeof vm->hello.agent_version, m.agent_version);
    copy_text(vm->hello.kernel, sizeof vm->hello.kernel, m.kernel);
    copy_text(vm->hello.boot_id, sizeof vm->hello.boot_id, m.boot_id);
    vm->control_said = true;
    channel_up(c, true);
    // Bulk joins the session that control has begun; where it has said so before, an agent that knows that has it.
    if (vm->bulk.fd >= 0 && (m.features & MSG_FEATURE_EARLY_BULK)) {
        maybe_ready(vm);
        return;
    }
    channel_close(&vm->bulk);
    if (open_channel(vm, &vm->bulk, "bulk", MSG_PORT_BULK) != 0) {
        session_close(vm);
        reconnect_later(vm);
    }
}

// ---- frames -------------------------------------------------------------------------------------------------------
static void on_command(struct vm *vm, const struct frame *f)
{
    struct msg_command m;
    if (msg_command_decode(f->payload, f->length, &m) == 0)
        vm->cb->command(vm->arg, f->type, f->id, &m);
}

static void on_file_result(struct vm *vm, const struct frame *f)
{
    static _Thread_local struct msg_file_result r; // large; the loop's thread alone
    if (msg_file_result_decode(f->payload, f->length, &r) != 0)
        return;
    if (f->type == FRAME_FILE_INFO)
        vm->cb->file_info(vm->arg, f->id, &r);
    else
        vm->cb->file_result(vm->arg, f->id, &r, f->flags & FRAME_LAST);
}

static void on_offsets(struct vm *vm, const struct frame *f)
{
    struct msg_offsets o;
    if (msg_offsets_decode(f->payload, f->length, &o) != 0)
        return;
    if (f->type == FRAME_STDIN_CREDIT)
        vm->cb->stdin_credit(vm->arg, f->id, o.stdin_offset);
    else
        vm->cb->file_credit(vm->arg, f->id, o.file_offset);
}

static void on_data(struct vm *vm, const struct frame *f)
{
    struct msg_data d;
    if (msg_data_decode(f->payload, f->length, &d) != 0)
        return;
    if (f->type == FRAME_OUTPUT)
        vm->cb->output(vm->arg, f->id, &d);
    else
        vm->cb->file_data(vm->arg, f->id, &d, f->flags & FRAME_LAST);
}

static void on_fatal(struct vm *vm, const struct frame *f)
{
    struct err err = {0};
    vm->cb->fatal(vm->arg, (const char *)f->payload, f->length);
    err_set(&err, ERR_ADMISSION_FAILED, "guest_boot_failed", "the guest could not be made ready");
    vm_note_fatal(vm, &err);
}

static void on_frame(void *arg, struct channel *c, const struct frame *f)
{
    struct vm *vm = arg;
    switch (f->type) {
    case FRAME_HELLO_REPLY:
        on_hello_reply(vm, c, f);
        break;
    case FRAME_READY:
        vm->states_done = true;
        maybe_ready(vm);
        break;
    case FRAME_PONG:
        on_pong(vm);
        break;
    case FRAME_COMMAND_STATE:
    case FRAME_STARTED:
    case FRAME_EXITED:
        on_command(vm, f);
        break;
    case FRAME_FILE_INFO:
    case FRAME_FILE_RESULT:
        on_file_result(vm, f);
        break;
    case FRAME_STDIN_CREDIT:
    case FRAME_FILE_CREDIT:
        on_offsets(vm, f);
        break;
    case FRAME_OUTPUT:
    case FRAME_FILE_DATA:
        on_data(vm, f);
        break;
    case FRAME_FROZEN:
        state_frozen(vm, f);
        break;
    case FRAME_REFRESHED:
        state_refreshed(vm, f);
        break;
    case FRAME_LOG:
        vm->cb->agent_log(vm->arg, (const char *)f->payload, f->length);
        break;
    case FRAME_FATAL:
        on_fatal(vm, f);
        break;
    default:
        c->violations++; // a type that no guest sends
        log_warn_limited("vm %s: the guest sent a frame of type %u", vm->id, f->type);
        break;
    }
}

static void on_lost(void *arg, struct channel *c, const char *why)
{
    struct vm *vm = arg;
    (void)c;
    log_debug("vm %s: session lost: %s", vm->id, why);
    session_close(vm);
    reconnect_later(vm);
}

const struct channel_callbacks VM_CHANNEL_CALLBACKS = {on_frame, on_lost};
