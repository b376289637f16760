// What the VM tells us, on the loop's thread: handed to commands, transfers, the log, or queued as an operation.
#include "sandbox/internal.h"

#include <stdio.h>
#include <string.h>

// A system operation that changes state_reason or state after something happened to the VM.
static void enqueue_system(struct sandbox *s, const char *name, void (*run)(struct sandbox *, struct op *),
                           const char *cause, bool flag, enum vm_gone how)
{
    struct admission a;
    system_admission(&a, s->tenant, "sandbox.state", s->id);
    struct op *op = op_new(name, run, &a, 200, NULL);
    if (!op) {
        log_error("sandbox %s: out of memory, %s not recorded", s->id, name);
        return;
    }
    snprintf(op->cause, sizeof op->cause, "%s", cause);
    op->flag = flag;
    op->gone = how;
    pthread_mutex_lock(&s->lock);
    op->vm_no = s->vm_no;
    pthread_mutex_unlock(&s->lock);
    op_enqueue(s, op);
}

static void note_mute(struct sandbox *s, bool mute)
{
    pthread_mutex_lock(&s->lock);
    const bool tell = mute != s->mute_noted;
    s->mute_noted = mute;
    pthread_mutex_unlock(&s->lock);
    if (tell)
        enqueue_system(s, "note", note_run, "agent_unresponsive", mute, 0);
}

static void on_ready(void *arg, const struct vm_hello *hello)
{
    struct sandbox *s = arg;
    pthread_mutex_lock(&s->lock);
    s->session = true;
    s->session_no++;
    s->ready_no++;
    pthread_mutex_unlock(&s->lock);
    log_debug("sandbox %s: agent %s, protocol %llu", s->id, hello->agent_version,
              (unsigned long long)hello->version);
    commands_on_ready(s);
    note_mute(s, false);
    hub_notify(s->m->hub, s->id);
}

static void on_command(void *arg, int type, uint64_t id, const struct msg_command *c)
{
    commands_on_frame(arg, type, id, c);
}

static void on_output(void *arg, uint64_t id, const struct msg_data *d)
{
    commands_on_output(arg, id, d);
}

static void on_stdin_credit(void *arg, uint64_t id, uint64_t offset)
{
    commands_on_stdin_credit(arg, id, offset);
}

static void on_file_info(void *arg, uint64_t id, const struct msg_file_result *r)
{
    transfers_on_info(arg, id, r);
}

static void on_file_data(void *arg, uint64_t id, const struct msg_data *d, bool last)
{
    transfers_on_data(arg, id, d, last);
}

static void on_file_credit(void *arg, uint64_t id, uint64_t offset)
{
    transfers_on_credit(arg, id, offset);
}

static void on_file_result(void *arg, uint64_t id, const struct msg_file_result *r, bool last)
{
    transfers_on_result(arg, id, r, last);
}

static void on_console(void *arg, const uint8_t *data, size_t len, uint64_t dropped)
{
    sandbox_log(arg, LOGSRC_CONSOLE, "", "", data, len);
    if (dropped)
        sandbox_log_gap(arg, LOGSRC_CONSOLE, dropped);
}

static void on_agent_log(void *arg, const char *text, size_t len)
{
    sandbox_log(arg, LOGSRC_AGENT, "", "", text, len);
}

static void on_vmm_log(void *arg, const char *text, size_t len)
{
    sandbox_log(arg, LOGSRC_VMM, "", "", text, len);
}

// The guest's own words are untrusted: into the log in full, into the error only as its first word.
static void on_fatal(void *arg, const char *text, size_t len)
{
    struct sandbox *s = arg;
    sandbox_log(s, LOGSRC_AGENT, "", "", text, len);
    char word[32];
    size_t n = 0;
    while (n < len && n < sizeof word - 1 && ((text[n] >= 'a' && text[n] <= 'z') || text[n] == '_'))
        n++;
    snprintf(word, sizeof word, "%.*s", (int)n, text);
    pthread_mutex_lock(&s->lock);
    err_set(&s->fatal, ERR_ADMISSION_FAILED, "guest_boot_failed", "the guest could not be made ready (stage %s)",
            *word ? word : "unknown");
    pthread_mutex_unlock(&s->lock);
}

static void on_session(void *arg, bool mute, bool session_lost)
{
    struct sandbox *s = arg;
    pthread_mutex_lock(&s->lock);
    const bool was = s->mute_noted;
    if (session_lost) {
        s->session = false;
        s->session_lost_ms = clock_mono_ms();
    }
    pthread_mutex_unlock(&s->lock);
    if (session_lost) {
        struct err e = {0};
        err_set(&e, ERR_TRANSPORT_FAILED, "agent_session_lost", "the channel to the guest was interrupted");
        transfers_fail_all(s, &e);
    }
    note_mute(s, mute || (session_lost && was)); // a lost session is no sign of life
}

void sandbox_session_tick(struct sandbox *s, int64_t now_ms)
{
    pthread_mutex_lock(&s->lock);
    const bool mute = s->vm && !s->session && s->session_lost_ms && now_ms - s->session_lost_ms > LIMIT_AGENT_MUTE_MS;
    pthread_mutex_unlock(&s->lock);
    if (mute)
        note_mute(s, true);
}

static void on_io_error(void *arg, bool paused)
{
    struct sandbox *s = arg;
    pthread_mutex_lock(&s->lock);
    const bool tell = paused != s->disk_full_noted;
    s->disk_full_noted = paused;
    pthread_mutex_unlock(&s->lock);
    if (tell)
        enqueue_system(s, "note", note_run, "host_disk_full", paused, 0);
}

static void on_gone(void *arg, enum vm_gone how, const char *detail)
{
    struct sandbox *s = arg;
    if (detail && *detail)
        sandbox_log(s, LOGSRC_VMM, "", "", detail, strlen(detail));
    pthread_mutex_lock(&s->lock);
    s->session = false;
    pthread_mutex_unlock(&s->lock);
    struct err e = {0};
    err_set(&e, ERR_TRANSPORT_FAILED, "vm_gone", "the virtual machine has ended");
    transfers_fail_all(s, &e);
    enqueue_system(s, "gone", gone_run, "vm", false, how);
}

const struct vm_callbacks SANDBOX_VM_CALLBACKS = {
    .ready = on_ready,
    .command = on_command,
    .output = on_output,
    .stdin_credit = on_stdin_credit,
    .file_info = on_file_info,
    .file_data = on_file_data,
    .file_credit = on_file_credit,
    .file_result = on_file_result,
    .console = on_console,
    .agent_log = on_agent_log,
    .vmm_log = on_vmm_log,
    .fatal = on_fatal,
    .session = on_session,
    .io_error = on_io_error,
    .gone = on_gone,
};
