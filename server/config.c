#include "server/config.h"

#include "sandbox/crash.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/limits.h"

enum kind { TEXT, FLAG, NUMBER };

struct key {
    const char *name;
    enum kind kind;
    size_t offset, size;
    int64_t low, high;
    const char *preset, *words, *help; // words: the only values, separated by |
};

#define T(n, d, w, h) {#n, TEXT, offsetof(struct config, n), sizeof(((struct config *)0)->n), 0, 0, d, w, h}
#define B(n, h) {#n, FLAG, offsetof(struct config, n), 0, 0, 0, "false", NULL, h}
#define N(n, lo, hi, d, h) {#n, NUMBER, offsetof(struct config, n), 0, lo, hi, d, NULL, h}

static const struct key KEYS[] = {
    T(listen, "127.0.0.1:7070", NULL, "address and port to serve on; [::1]:7070 for IPv6, port 0 for any"),
    B(insecure_listen, "allow listening off loopback without TLS"),
    T(state_dir, "var/state", NULL, "database, keys, sandboxes' disks, logs and output"),
    T(image_dir, "var/images", NULL, "kernel, initramfs and images by digest; may be shared read-only"),
    B(allow_emulation, "accept TCG where KVM cannot be used; it is no security boundary"),
    T(accel, "auto", "auto|kvm|tcg", "accelerator"),
    T(qemu, "", NULL, "QEMU to run instead of qemu-system-x86_64 from the usual places"),
    T(log_level, "info", "debug|info|warn|error", "what is written to standard error"),
    T(cgroup_parent, "", NULL, "delegated cgroup v2 directory for the VMs"),
    N(max_sandboxes_per_tenant, 1, 100000, "200", "live sandboxes a tenant may have"),
    N(max_launches, 0, 1000, "0", "guests that boot at once; 0: as many as CPUs"),
    N(max_snapshots_per_tenant, 1, 100000, "100", "snapshots a tenant may have"),
    T(templates, "on", "on|off", "fork sandboxes from templates; off: every create boots"),
    N(pool, 0, 64, "0", "sandboxes restored ahead, per template"),
    N(pool_parked, 0, 64, "0", "QEMU processes that wait before the restore, per template"),
    N(pool_memory_mib, 0, 16777216, "4096", "what all of them together may take at worst"),
    N(template_memory_mib, 0, 16777216, "2048", "memory of templates and snapshots that nobody uses now, kept for the next"),
    N(template_disk_mib, 0, 16777216, "8192", "templates on disk; those that a snapshot or a cold sandbox needs stay"),
    N(memory_budget_mib, 0, 16777216, "0", "what all VMs may take at worst; 0: 90 % of the host's memory"),
    N(retention_hours, 0, 87600, "168", "how long records of destroyed sandboxes stay"),
    N(disk_reserve_mib, 1, 1048576, "256", "free space kept for outcomes: admissions stop below it"),
    N(boot_timeout_seconds, 1, 3600, "120", "from QEMU's start to the agent's hello"),
    N(jail_uid_base, 1, 4000000000, "610000", "first of 4,096 host uids for the jails, where the server is root"),
    N(http_threads, 1, 64, "2", "threads that serve connections"),
};
#define N_KEYS (sizeof KEYS / sizeof *KEYS)

static void fault(struct buf *faults, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void fault(struct buf *faults, const char *fmt, ...)
{
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    buf_addf(faults, "%s\n", text);
}

static bool one_of(const char *words, const char *value)
{
    const size_t n = strlen(value);
    if (strchr(value, '|'))
        return false;
    for (const char *at = words; at; at = strchr(at, '|')) {
        at += *at == '|';
        if (strncmp(at, value, n) == 0 && (at[n] == '|' || at[n] == 0))
            return true;
    }
    return false;
}

static void set(struct config *c, const struct key *k, const char *value, const char *where, struct buf *faults)
{
    char *at = (char *)c + k->offset, *end;
    switch (k->kind) {
    case TEXT:
        if (strlen(value) >= k->size)
            fault(faults, "%s: %s is longer than %zu characters", where, k->name, k->size - 1);
        else if (k->words && !one_of(k->words, value))
            fault(faults, "%s: %s is one of %s, not %.60s", where, k->name, k->words, value);
        else
            strcpy(at, value);
        break;
    case FLAG:
        if (strcmp(value, "true") == 0 || strcmp(value, "1") == 0)
            *(bool *)(void *)at = true;
        else if (strcmp(value, "false") == 0 || strcmp(value, "0") == 0)
            *(bool *)(void *)at = false;
        else
            fault(faults, "%s: %s is true or false, not %.60s", where, k->name, value);
        break;
    case NUMBER:
        errno = 0;
        const long long v = strtoll(value, &end, 10);
        if (errno || end == value || *end || v < k->low || v > k->high)
            fault(faults, "%s: %s is a whole number from %lld to %lld, not %.60s", where, k->name, (long long)k->low,
                  (long long)k->high, value);
        else
            *(int64_t *)(void *)at = v;
        break;
    }
}

static const struct key *find(const char *name)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (strcmp(KEYS[i].name, name) == 0)
            return &KEYS[i];
    return NULL;
}

// ---- the file: `key = value` lines, # begins a comment -------------------------------------------------------------------
static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        *--end = 0;
    return text;
}

static void read_file(struct config *c, const char *path, struct buf *faults)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    if (fd_read_file(AT_FDCWD, path, &b) != 0) {
        fault(faults, "%s: %s", path, strerror(errno));
        return;
    }
    int number = 0;
    char *save = (char *)b.data;
    for (char *line; save && (line = strsep(&save, "\n"));) {
        char where[300];
        number++;
        line = trim(line);
        if (!*line || *line == '#')
            continue;
        snprintf(where, sizeof where, "%.250s:%d", path, number);
        char *eq = strchr(line, '=');
        if (!eq) {
            fault(faults, "%s: not `key = value`", where);
            continue;
        }
        *eq = 0;
        const char *name = trim(line);
        const struct key *k = find(name);
        if (k)
            set(c, k, trim(eq + 1), where, faults);
        else
            fault(faults, "%s: unknown key %.60s", where, name);
    }
}

// ---- the environment ------------------------------------------------------------------------------------------------
static void read_environment(struct config *c, char **env, struct buf *faults)
{
    for (; env && *env; env++) {
        char name[64];
        size_t n = 0;
        if (strncmp(*env, "AIRLOCK_", 8) != 0)
            continue;
        const char *eq = strchr(*env, '=');
        for (const char *at = *env + 8; eq && at < eq && n < sizeof name - 1; at++)
            name[n++] = (char)tolower((unsigned char)*at);
        name[n] = 0;
        const struct key *k = find(name);
        if (strcmp(name, "config") == 0)
            continue; // names the file, read before
        if (strcmp(name, "crash_at") == 0 && crash_points_built())
            continue; // of a test build
        if (k)
            set(c, k, eq + 1, "environment", faults);
        else
            fault(faults, "environment: unknown variable %.*s", (int)(eq ? eq - *env : 40), *env);
    }
}

// ---- flags ------------------------------------------------------------------------------------------------------
// The flag's key name in name, its value (NULL: none given with =).
static const char *split(const char *arg, char name[static 64])
{
    const char *eq = strchr(arg, '=');
    size_t n = 0;
    for (const char *p = arg + 2; *p && p != eq && n < 63; p++)
        name[n++] = *p == '-' ? '_' : *p;
    name[n] = 0;
    return eq ? eq + 1 : NULL;
}

static int read_flags(struct config *c, int argc, char **argv, bool config_only, const char **ret_file, struct buf *faults)
{
    for (int i = 0; i < argc; i++) {
        char name[64];
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return 1;
        if (strncmp(argv[i], "--", 2) != 0) {
            if (!config_only)
                fault(faults, "unexpected argument %.60s", argv[i]);
            continue;
        }
        const char *value = split(argv[i], name);
        const bool is_file = strcmp(name, "config") == 0;
        const struct key *k = is_file ? NULL : find(name);
        if (!k && !is_file) {
            if (!config_only)
                fault(faults, "unknown flag %.60s", argv[i]);
            continue;
        }
        if (!value && (is_file || k->kind != FLAG))
            value = i + 1 < argc ? argv[++i] : NULL;
        if (!value && k && k->kind == FLAG)
            value = "true";
        if (!value) {
            if (!config_only)
                fault(faults, "%.60s needs a value", argv[i]);
        } else if (is_file) {
            *ret_file = value;
        } else if (!config_only) {
            set(c, k, value, "flags", faults);
        }
    }
    return 0;
}

// ---- listen -------------------------------------------------------------------------------------------------------
static void split_listen(struct config *c, struct buf *faults)
{
    char host[64] = "";
    const char *colon = strrchr(c->listen, ':');
    char *end;
    unsigned char raw[16];
    const size_t n = colon ? (size_t)(colon - c->listen) : 0;
    if (n > 0 && n < sizeof host)
        memcpy(host, c->listen, n);
    const size_t len = strlen(host);
    if (len > 2 && host[0] == '[' && host[len - 1] == ']') {
        memmove(host, host + 1, len - 2);
        host[len - 2] = 0;
    }
    if (strcmp(host, "localhost") == 0)
        strcpy(host, "127.0.0.1");
    const long port = colon ? strtol(colon + 1, &end, 10) : -1;
    const bool address = inet_pton(AF_INET, host, raw) == 1 || inet_pton(AF_INET6, host, raw) == 1;
    if (!address || port < 0 || port > 65535 || end == colon + 1 || *end) {
        fault(faults, "listen: ADDRESS:PORT is wanted, not %.70s", c->listen);
        return;
    }
    snprintf(c->address, sizeof c->address, "%s", host);
    c->port = (unsigned)port;
    if (!config_is_loopback(c) && !c->insecure_listen)
        fault(faults, "listen: %.70s is not loopback and there is no TLS: give --insecure-listen if that is meant", c->listen);
}

bool config_is_loopback(const struct config *c)
{
    return strncmp(c->address, "127.", 4) == 0 || strcmp(c->address, "::1") == 0;
}

int config_load(int argc, char **argv, char **env, struct config *ret, struct buf *faults)
{
    const char *file = NULL;
    memset(ret, 0, sizeof *ret);
    for (size_t i = 0; i < N_KEYS; i++)
        set(ret, &KEYS[i], KEYS[i].preset, "default", faults);
    if (read_flags(ret, argc, argv, true, &file, faults) == 1)
        return 1;
    for (char **e = env; !file && e && *e; e++)
        if (strncmp(*e, "AIRLOCK_CONFIG=", 15) == 0)
            file = *e + 15;
    if (file)
        read_file(ret, file, faults);
    read_environment(ret, env, faults);
    read_flags(ret, argc, argv, false, &file, faults);
    split_listen(ret, faults);
    if (ret->max_launches == 0)
        ret->max_launches = sysconf(_SC_NPROCESSORS_ONLN) > 0 ? sysconf(_SC_NPROCESSORS_ONLN) : 1;
    return faults->len == 0 ? 0 : -1;
}

void config_help(FILE *out)
{
    fputs("usage: airlock serve [--config FILE] [flags]\n\nEvery flag is also a key of the file (state_dir = …) and a variable "
          "(AIRLOCK_STATE_DIR);\nflags win over the environment, the environment over the file.\n\n", out);
    for (size_t i = 0; i < N_KEYS; i++) {
        char flag[64];
        snprintf(flag, sizeof flag, "--%s", KEYS[i].name);
        for (char *p = flag + 2; *p; p++)
            *p = *p == '_' ? '-' : *p;
        fprintf(out, "  %-28s %s", flag, KEYS[i].help);
        if (KEYS[i].kind != FLAG && *KEYS[i].preset)
            fprintf(out, " (%s)", KEYS[i].preset);
        fputc('\n', out);
    }
}
