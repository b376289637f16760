// airlock serve: opens everything in order, serves, and ends without taking sandboxes with it.
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/api.h"
#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/limits.h"
#include "base/log.h"
#include "qemu/host.h"
#include "server/commands.h"
#include "server/config.h"
#include "server/embedded.h"
#include "server/http.h"
#include "store/rows.h"
#include "store/store.h"

extern char **environ;

#define JAIL_UIDS 4096

struct server {
    struct config config;
    int state_fd, image_fd, lock_fd;
    struct store *store;
    struct loop *loop;
    struct manager *manager;
    struct api *api;
    struct http *http;
    bool token_there;
};

static int fail(const char *what, const struct err *err)
{
    fprintf(stderr, "airlock serve: %s: %s%s%s\n", what, err->detail, *err->internal ? ": " : "", err->internal);
    if (*err->remedy)
        fprintf(stderr, "  %s\n", err->remedy);
    return 1;
}

// ---- directories and the lock -------------------------------------------------------------------------------------------
static int open_dirs(struct server *s)
{
    if (fd_mkdirs(s->config.state_dir, 0700) != 0 ||
        (s->state_fd = open(s->config.state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) {
        fprintf(stderr, "airlock serve: %s: %s\n", s->config.state_dir, strerror(errno));
        return -1;
    }
    (void)fchmod(s->state_fd, 0700);
    s->image_fd = open(s->config.image_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->image_fd >= 0)
        return 0;
    fprintf(stderr, "airlock serve: %s: %s\n  build the images first: ./quickstart, or docker/guest/build\n",
            s->config.image_dir, strerror(errno));
    return -1;
}

// One server per state directory; the lock goes with the process, however it ends.
static int take_lock(struct server *s)
{
    char text[32] = "";
    s->lock_fd = openat(s->state_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock_fd < 0) {
        fprintf(stderr, "airlock serve: the lock: %s\n", strerror(errno));
        return -1;
    }
    if (fd_lock(s->lock_fd, FD_LOCK_PATIENCE_MS) != 0) {
        const ssize_t n = pread(s->lock_fd, text, sizeof text - 1, 0);
        text[n > 0 ? n : 0] = 0;
        text[strcspn(text, "\n")] = 0;
        fprintf(stderr, "airlock serve: the state directory %s is in use by process %s\n", s->config.state_dir,
                *text ? text : "(unknown)");
        return -1;
    }
    const int n = snprintf(text, sizeof text, "%d\n", (int)getpid());
    if (ftruncate(s->lock_fd, 0) != 0 || fd_pwrite_full(s->lock_fd, text, (size_t)n, 0) != 0)
        log_warn("the lock file could not be written");
    return 0;
}

static void raise_limits(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < r.rlim_max) {
        r.rlim_cur = r.rlim_max > 200000 ? 200000 : r.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &r);
    }
    umask(077);
    signal(SIGPIPE, SIG_IGN);
    mallopt(M_ARENA_MAX, 2);             // many threads, small heaps: resident memory counts
    mallopt(M_TRIM_THRESHOLD, 256 << 10);
    mallopt(M_MMAP_THRESHOLD, 256 << 10);
}

// ---- the first token ------------------------------------------------------------------------------------------------------
struct first_token {
    struct token_row row;
    uint8_t hash[SHA256_BYTES];
};

static int token_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct first_token *t = arg;
    return token_insert(tx, &t->row, t->hash, err);
}

static bool token_known(struct server *s)
{
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    uint8_t hash[SHA256_BYTES];
    struct token_row row;
    struct err err = {0};
    if (fd_read_file(s->state_fd, "token", &b) != 0)
        return false;
    crypto_sha256(b.data, strcspn(buf_text(&b), "\n"), hash);
    return token_find(s->store, hash, &row, &err) == 0;
}

// An admin token for the operator: written before its hash counts, so that no start leaves a token nobody has.
static int ensure_token(struct server *s, struct err *err)
{
    struct first_token t = {.row = {.tenant = "default", .name = "admin", .scopes = 255, .created_at_ms = clock_wall_ms()}};
    char text[TOKEN_TEXT_LEN + 2] = "alk_";
    if (token_known(s)) {
        s->token_there = true;
        return 0;
    }
    if (enc_random_base62(text + 4, 40) != 0)
        return err_sys(err, errno, "making a token");
    crypto_sha256(text, TOKEN_TEXT_LEN, t.hash);
    id_new(ID_TOKEN, t.row.id);
    strcat(text, "\n");
    if (fd_write_file_atomic(s->state_fd, "token", text, strlen(text), 0600) != 0)
        return err_sys(err, errno, "writing the token file");
    if (store_write(s->store, token_tx, &t, err) != 0)
        return -1;
    s->token_there = true;
    log_info("wrote an admin token to %s/token", s->config.state_dir);
    return 0;
}

static bool server_ready(void *arg, char *out, size_t cap)
{
    const struct server *s = arg;
    if (!s->token_there)
        snprintf(out, cap, "the token file");
    return s->token_there;
}

// ---- the host -----------------------------------------------------------------------------------------------------
// The same words as `airlock doctor`, for what keeps a sandbox from running here.
static void tell_host(const struct config *c)
{
    struct host_facts facts;
    struct host_check checks[HOST_CHECKS_MAX];
    struct err err = {0};
    if (host_facts_read(*c->qemu ? c->qemu : NULL, &facts, &err) != 0)
        return;
    const bool tcg = c->allow_emulation || strcmp(c->accel, "tcg") == 0;
    const int n = host_checks(&facts, tcg, checks);
    for (int i = 0; i < n; i++)
        if (checks[i].verdict == HOST_FAIL)
            log_error("doctor: %s: %s", checks[i].name, checks[i].text);
}

// ---- life -------------------------------------------------------------------------------------------------------
static int open_all(struct server *s)
{
    struct err err = {0};
    const struct config *c = &s->config;
    const struct store_options store = {.state_dirfd = s->state_fd, .reserve_bytes = (uint64_t)c->disk_reserve_mib << 20,
                                        .server_version = AIRLOCK_VERSION};
    if (!(s->store = store_open(&store, &err)))
        return fail("the database", &err);
    if (ensure_token(s, &err) != 0)
        return fail("the admin token", &err);
    if (!(s->loop = loop_new(&err)) || loop_start(s->loop, "loop", &err) != 0)
        return fail("the loop", &err);
    const struct manager_options manager = {
        .store = s->store, .loop = s->loop, .state_dirfd = s->state_fd, .image_dirfd = s->image_fd,
        .accel = strcmp(c->accel, "kvm") == 0 ? ACCEL_KVM_ONLY : strcmp(c->accel, "tcg") == 0 ? ACCEL_TCG_ONLY : ACCEL_AUTO,
        .allow_emulation = c->allow_emulation || strcmp(c->accel, "tcg") == 0, .qemu_path = *c->qemu ? c->qemu : NULL,
        .cgroup_parent = *c->cgroup_parent ? c->cgroup_parent : NULL, .uid_base = (unsigned)c->jail_uid_base,
        .uid_count = JAIL_UIDS, .max_live_per_tenant = (unsigned)c->max_sandboxes_per_tenant,
        .max_launches = (unsigned)c->max_launches, .retention_ms = c->retention_hours * 3600 * 1000,
        .disk_reserve_mib = (unsigned)c->disk_reserve_mib,
        .max_snapshots_per_tenant = (unsigned)c->max_snapshots_per_tenant, .templates = strcmp(c->templates, "on") == 0,
        .own_program = "/proc/self/exe",
        .template_memory_mib = (int)c->template_memory_mib, .template_disk_mib = (int)c->template_disk_mib,
        .pool = (unsigned)c->pool, .pool_parked = (unsigned)c->pool_parked, .pool_memory_mib = (int)c->pool_memory_mib,
        .memory_budget_mib = (int)c->memory_budget_mib,
        .boot_timeout_ms = (int)c->boot_timeout_seconds * 1000, .render_problem = api_render_problem};
    if (!(s->manager = manager_new(&manager, &err)))
        return fail("the sandboxes", &err);
    const struct api_options api = {
        .manager = s->manager, .store = s->store, .spec_json = embedded_openapi_json,
        .spec_len = embedded_openapi_json_len, .docs_html = embedded_docs_html,
        .docs_len = embedded_docs_html_len, .state_dir = c->state_dir, .server_version = AIRLOCK_VERSION, .workers = 4,
        .server_ready = server_ready, .server_arg = s};
    if (!(s->api = api_new(&api, &err)))
        return fail("the API", &err);
    if (manager_start(s->manager, &err) != 0)
        return fail("the sandboxes", &err);
    const struct http_options http = {.address = c->address, .port = c->port, .threads = (unsigned)c->http_threads, .api = s->api};
    if (!(s->http = http_start(&http, &err)))
        return fail("HTTP", &err);
    return 0;
}

static void tell_address(struct server *s)
{
    char text[128];
    const bool v6 = strchr(s->config.address, ':') != NULL;
    const int n = snprintf(text, sizeof text, v6 ? "[%s]:%u\n" : "%s:%u\n", s->config.address, http_port(s->http));
    if (fd_write_file_atomic(s->state_fd, "listen", text, (size_t)n, 0600) != 0)
        log_warn("the file listen could not be written");
    text[n - 1] = 0;
    log_info("serving on http://%s", text);
    if (!config_is_loopback(&s->config))
        log_warn("listening off loopback without TLS: tokens travel in the clear");
}

static void wait_for_signal(void)
{
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    while (sigwait(&set, &number) != 0)
        ;
    log_info("%s: stopping; sandboxes keep running", number == SIGTERM ? "SIGTERM" : "SIGINT");
    pthread_sigmask(SIG_UNBLOCK, &set, NULL); // a second one ends at once
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
}

int cmd_serve(int argc, char **argv)
{
    static struct server s = {.state_fd = -1, .image_fd = -1, .lock_fd = -1};
    CLEANUP_BUF struct buf faults = BUF_INIT(1 << 16);
    const int loaded = config_load(argc, argv, environ, &s.config, &faults);
    if (loaded == 1) {
        config_help(stdout);
        return 0;
    }
    if (loaded != 0) {
        fprintf(stderr, "airlock serve: the configuration is not right:\n%s", buf_text(&faults));
        return 2;
    }
    log_set_level(*s.config.log_level == 'd'   ? LOG_DEBUG_
                  : *s.config.log_level == 'w' ? LOG_WARN_
                  : *s.config.log_level == 'e' ? LOG_ERROR_
                                               : LOG_INFO_);
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ours, NULL); // before any thread, so that all inherit it
    raise_limits();
    if (open_dirs(&s) != 0 || take_lock(&s) != 0 || open_all(&s) != 0)
        return 1;
    tell_address(&s);
    tell_host(&s.config);
    wait_for_signal();
    http_quiesce(s.http);
    api_stop(s.api);
    manager_stop(s.manager);
    store_close(s.store);
    // What is left belongs to threads that may still be under way; all they have admitted is in the journal.
    fflush(NULL);
    _exit(0);
}
