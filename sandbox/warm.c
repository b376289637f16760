#include "sandbox/warm.h"

#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "base/clock.h"
#include "proto/frame.h"

#define WARM_COMMAND_MS 20000

static void on_command(void *arg, int type, uint64_t id, const struct msg_command *c)
{
    struct warm *w = arg;
    if (type != FRAME_EXITED)
        return;
    pthread_mutex_lock(&w->lock);
    if (id == w->running) {
        w->exited = true;
        w->exit_code = c->outcome == MSG_EXITED ? (int)c->exit_code : -1;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
}

static void on_gone(void *arg, enum vm_gone how, const char *detail)
{
    struct warm *w = arg;
    (void)how, (void)detail;
    pthread_mutex_lock(&w->lock);
    w->gone = true;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

static void no_ready(void *arg, const struct vm_hello *h) { (void)arg, (void)h; }
static void no_output(void *arg, uint64_t id, const struct msg_data *d) { (void)arg, (void)id, (void)d; }
static void no_offset(void *arg, uint64_t id, uint64_t o) { (void)arg, (void)id, (void)o; }
static void no_info(void *arg, uint64_t id, const struct msg_file_result *r) { (void)arg, (void)id, (void)r; }
static void no_data(void *arg, uint64_t id, const struct msg_data *d, bool l) { (void)arg, (void)id, (void)d, (void)l; }
static void no_result(void *arg, uint64_t id, const struct msg_file_result *r, bool l) { (void)arg, (void)id, (void)r, (void)l; }
static void no_console(void *arg, const uint8_t *d, size_t n, uint64_t x) { (void)arg, (void)d, (void)n, (void)x; }
static void no_text(void *arg, const char *t, size_t n) { (void)arg, (void)t, (void)n; }
static void no_session(void *arg, bool m, bool l) { (void)arg, (void)m, (void)l; }
static void no_io(void *arg, bool p) { (void)arg, (void)p; }

const struct vm_callbacks WARM_CALLBACKS = {
    .ready = no_ready, .command = on_command, .output = no_output, .stdin_credit = no_offset, .file_info = no_info,
    .file_data = no_data, .file_credit = no_offset, .file_result = no_result, .console = no_console, .agent_log = no_text,
    .vmm_log = no_text, .fatal = no_text, .session = no_session, .io_error = no_io, .gone = on_gone,
};

void warm_init(struct warm *w)
{
    pthread_condattr_t attr;
    memset(w, 0, sizeof *w);
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &attr);
    pthread_condattr_destroy(&attr);
}

void warm_free(struct warm *w)
{
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
}

bool warm_gone(struct warm *w)
{
    pthread_mutex_lock(&w->lock);
    const bool gone = w->gone;
    pthread_mutex_unlock(&w->lock);
    return gone;
}

static struct slice slice_of(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

static int encode(struct buf *b, const char *const *argv)
{
    static _Thread_local struct msg_run m; // large
    memset(&m, 0, sizeof m);
    m.command_id = slice_of("warm");
    m.user = slice_of("sandbox");
    m.timeout_ms = WARM_COMMAND_MS;
    m.quiet = true;
    for (; argv[m.n_args] && m.n_args < 8; m.n_args++)
        m.args[m.n_args] = slice_of(argv[m.n_args]);
    return msg_run_encode(b, &m);
}

int warm_run(struct warm *w, struct vm *vm, const char *const *argv, int timeout_ms, struct err *err)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    const int64_t until = clock_mono_ms() + timeout_ms;
    const struct timespec ts = {.tv_sec = until / 1000, .tv_nsec = until % 1000 * 1000000};
    const uint64_t id = vm_next_id(vm);
    if (encode(&b, argv) != 0)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    pthread_mutex_lock(&w->lock);
    w->running = id;
    w->exited = false;
    pthread_mutex_unlock(&w->lock);
    if (vm_send(vm, FRAME_RUN, id, &b, err) != 0)
        return -1;
    pthread_mutex_lock(&w->lock);
    int waited = 0;
    while (!w->exited && !w->gone && waited == 0)
        waited = pthread_cond_timedwait(&w->changed, &w->lock, &ts);
    const bool exited = w->exited;
    w->running = 0;
    pthread_mutex_unlock(&w->lock);
    struct err ignored = {0};
    (void)vm_send(vm, FRAME_FORGET, id, NULL, &ignored);
    return exited ? 0 : err_set(err, ERR_TIMEOUT, "warm_up", "the guest did not run a command in time");
}

int warm_up(struct warm *w, struct vm *vm, unsigned rounds, struct err *err)
{
    static const char *const SHELL[] = {"sh", "-c", "true", NULL}, *const PYTHON[] = {"python3", "-c", "print(1)", NULL};
    for (unsigned i = 0; i < rounds; i++)
        if (warm_run(w, vm, SHELL, WARM_COMMAND_MS, err) != 0 || warm_run(w, vm, PYTHON, WARM_COMMAND_MS, err) != 0)
            return -1;
    return 0;
}
