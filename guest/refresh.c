// What makes this guest somebody: randomness, wall clock, hostname, machine id, boot id; and becoming somebody else after
// a restore. Main thread only. A refresh is system calls alone, no process, no disk that has to answer: some hundred µs.
//
// The two ids are files of ours on the tmpfs, bound once over the paths where programs look; a refresh rewrites them in
// place, so that it is seen wherever the binding is, in other mount namespaces too. Root in the guest can undo all of it,
// so nothing is taken as done that was not read back from the path.
#include "guest/agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/enc.h"

#define SEED_MAX 512
#define CLOCK_TOLERANCE_MS 1000 // between setting and reading back: the host may have stopped us there
// <linux/random.h>, which the C library here does not bring along.
#define ADD_ENTROPY _IOW('R', 0x03, int[2])
#define RESEED _IO('R', 0x07)

#define OWN_DIR "/run/airlock"

struct identity {
    const char *path;              // where programs look
    const char *file;              // ours, bound over it
    size_t len;
    int fd;                        // of file
};
static struct identity machine = {"/etc/machine-id", OWN_DIR "/machine-id", MACHINE_ID_LEN, -1};
static struct identity boot = {"/proc/sys/kernel/random/boot_id", OWN_DIR "/boot-id", BOOT_ID_LEN, -1};
static const char *dbus_path = "/var/lib/dbus/machine-id", *dbus_temporary = "/var/lib/dbus/.airlock-machine-id";
static int random_fd = -1;         // kept from the boot: a path could be made to lead elsewhere later

static void __attribute__((format(printf, 2, 3))) add_fault(struct refreshed *r, const char *fmt, ...)
{
    va_list args;
    size_t n = strlen(r->fault);
    n += (size_t)snprintf(r->fault + n, sizeof r->fault - n, "%s", n ? "; " : "");
    va_start(args, fmt);
    if (n < sizeof r->fault)
        vsnprintf(r->fault + n, sizeof r->fault - n, fmt, args);
    va_end(args);
}

// ---- what may be asked for ----------------------------------------------------------------------------------------------
static bool only(struct slice s, const char *set)
{
    for (size_t i = 0; i < s.len; i++)
        if (s.data[i] == 0 || !strchr(set, s.data[i]))
            return false;
    return true;
}

static bool hostname_valid(struct slice s)
{
    return s.len >= 1 && s.len <= HOSTNAME_LEN_MAX && s.data[0] != '-' && only(s, "abcdefghijklmnopqrstuvwxyz0123456789-");
}

// Not all zeros: machine-id(5) has them for none.
static bool machine_id_valid(struct slice s)
{
    return s.len == MACHINE_ID_LEN && only(s, "0123456789abcdef") && !only(s, "0");
}

static bool boot_id_valid(struct slice s)
{
    static const char SHAPE[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    if (s.len != BOOT_ID_LEN)
        return false;
    for (size_t i = 0; i < s.len; i++)
        if (SHAPE[i] == '-' ? s.data[i] != '-' : !only((struct slice){s.data + i, 1}, "0123456789abcdef"))
            return false;
    return true;
}

// ---- the files -------------------------------------------------------------------------------------------------------
// The first line of the file at path, at most cap - 1 bytes. False when there is none or it is longer.
static bool read_line(const char *path, char *out, size_t cap)
{
    *out = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); // whatever root has put there
    const ssize_t n = fd >= 0 ? read(fd, out, cap) : -1;
    if (fd >= 0)
        close(fd);
    char *end = n > 0 ? memchr(out, '\n', (size_t)n) : NULL;
    if (!end && n >= 0 && (size_t)n < cap)
        end = out + n;
    *(end ? end : out) = 0;
    return end && end > out;
}

static bool is_ours(const struct identity *id, const char *path)
{
    struct stat a, b;
    return id->fd >= 0 && fstat(id->fd, &a) == 0 && stat(path, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

static bool open_own(struct identity *id)
{
    if (id->fd < 0)
        id->fd = open(id->file, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0444);
    return id->fd >= 0;
}

// Binds our file over the path, an empty one where the image has none. 0, or -1 with errno.
static int place(const struct identity *id)
{
    if (is_ours(id, id->path) || mount(id->file, id->path, NULL, MS_BIND, NULL) == 0)
        return 0;
    if (errno != ENOENT)
        return -1;
    const int fd = open(id->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0444);
    if (fd < 0)
        return -1;
    close(fd);
    return mount(id->file, id->path, NULL, MS_BIND, NULL);
}

// The same length each time: no reader sees an empty file in between. 0, or -1 with errno.
static int store(struct identity *id, const char *text)
{
    char line[BOOT_ID_LEN + 2];
    const int n = snprintf(line, sizeof line, "%s\n", text);
    if (!open_own(id) || pwrite(id->fd, line, (size_t)n, 0) != n || ftruncate(id->fd, n) != 0)
        return -1;
    return place(id);
}

// D-Bus has a machine id of its own where the image was made with one; dbus-uuidgen(1) wants both to be the same.
static int dbus_follows(void)
{
    struct stat st;
    if ((stat(dbus_path, &st) != 0 && (errno == ENOENT || errno == ENOTDIR)) || is_ours(&machine, dbus_path))
        return 0;
    if (unlink(dbus_temporary) != 0 && errno != ENOENT)
        return -1;
    if (symlink(machine.path, dbus_temporary) != 0)
        return -1;
    return rename(dbus_temporary, dbus_path);
}

// ---- the boot --------------------------------------------------------------------------------------------------------
// A second, whole procfs, where nobody but root comes to: without one the binding over boot_id would forbid every user
// namespace of the guest a procfs of its own (mount_too_revealing in the kernel's fs/namespace.c).
static void keep_whole_proc(void)
{
    mkdir(OWN_DIR "/proc", 0700);
    mount("proc", OWN_DIR "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
}

static void fresh_machine_id(char out[static MACHINE_ID_LEN + 1])
{
    uint8_t raw[MACHINE_ID_LEN / 2] = {0};
    if (getrandom(raw, sizeof raw, 0) != (ssize_t)sizeof raw)
        dprintf(2, "airlock-agent: no randomness for the machine id\n");
    raw[6] = (uint8_t)((raw[6] & 0x0f) | 0x40); // RFC 9562, version 4, as systemd makes them
    raw[8] = (uint8_t)((raw[8] & 0x3f) | 0x80);
    enc_hex(raw, sizeof raw, out);
}

void refresh_prepare(void)
{
    char machine_id[MACHINE_ID_LEN + 1], boot_id[BOOT_ID_LEN + 2];
    random_fd = open("/dev/random", O_WRONLY | O_CLOEXEC);
    mkdir(OWN_DIR, 0700);
    keep_whole_proc();
    mkdir("/etc", 0755);
    fresh_machine_id(machine_id);
    if (store(&machine, machine_id) != 0 || dbus_follows() != 0)
        dprintf(2, "airlock-agent: the machine id has no place: %s\n", strerror(errno));
    if (!read_line(boot.path, boot_id, sizeof boot_id) || store(&boot, boot_id) != 0)
        dprintf(2, "airlock-agent: the boot id has no place: %s\n", strerror(errno));
}

// ---- a refresh: what was asked for, each part by itself --------------------------------------------------------------------
static void entropy(struct slice seed, struct refreshed *r)
{
    struct {
        int bits, bytes; // struct rand_pool_info
        uint8_t data[SEED_MAX];
    } pool = {.bits = (int)seed.len * 8, .bytes = (int)seed.len};
    if (seed.len < MSG_SEED_BYTES || seed.len > SEED_MAX) {
        add_fault(r, "entropy: a seed of %zu bytes", seed.len);
        return;
    }
    memcpy(pool.data, seed.data, seed.len);
    if (ioctl(random_fd, ADD_ENTROPY, &pool) != 0 || ioctl(random_fd, RESEED) != 0)
        add_fault(r, "entropy: %s", strerror(errno));
    else
        r->m.done |= MSG_REFRESH_ENTROPY;
    explicit_bzero(&pool, sizeof pool);
}

static void wall_clock(int64_t wall_ms, struct refreshed *r)
{
    const struct timespec t = {.tv_sec = wall_ms / 1000, .tv_nsec = wall_ms % 1000 * 1000000};
    if (wall_ms < 0 || clock_settime(CLOCK_REALTIME, &t) != 0) {
        add_fault(r, "clock: %s", strerror(wall_ms < 0 ? EINVAL : errno));
        return;
    }
    const int64_t off = clock_wall_ms() - wall_ms;
    if (off >= 0 && off < CLOCK_TOLERANCE_MS)
        r->m.done |= MSG_REFRESH_CLOCK;
    else
        add_fault(r, "clock: it stands %lld ms off", (long long)off);
}

static void hostname(struct slice name, struct refreshed *r)
{
    if (!hostname_valid(name))
        add_fault(r, "hostname: not of [a-z0-9-]");
    else if (sethostname((const char *)name.data, name.len) != 0)
        add_fault(r, "hostname: %s", strerror(errno));
}

static void identity(struct identity *id, const char *what, struct slice value, struct refreshed *r)
{
    char text[BOOT_ID_LEN + 1] = "";
    memcpy(text, value.data, id->len); // its length was looked at
    if (store(id, text) != 0 || (id == &machine && dbus_follows() != 0))
        add_fault(r, "%s: %s", what, strerror(errno));
}

// ---- reading back ------------------------------------------------------------------------------------------------------
static bool same(struct slice asked, const char *is)
{
    return asked.len > 0 && asked.len == strlen(is) && memcmp(asked.data, is, asked.len) == 0;
}

static struct slice text_slice(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

// A bit for what was asked for and a program would find now.
static void read_back(const struct msg_refresh *m, struct refreshed *r)
{
    struct stat st;
    if (getrandom(r->random, sizeof r->random, GRND_NONBLOCK) != (ssize_t)sizeof r->random) {
        r->m.done &= ~(uint64_t)MSG_REFRESH_ENTROPY;
        add_fault(r, "entropy: nothing comes out");
    } else {
        r->m.random = (struct slice){r->random, sizeof r->random};
    }
    gethostname(r->hostname, sizeof r->hostname - 1);
    (void)read_line(machine.path, r->machine_id, sizeof r->machine_id);
    (void)read_line(boot.path, r->boot_id, sizeof r->boot_id);
    if (same(m->hostname, r->hostname))
        r->m.done |= MSG_REFRESH_HOSTNAME;
    if (same(m->machine_id, r->machine_id) && (is_ours(&machine, dbus_path) || stat(dbus_path, &st) != 0))
        r->m.done |= MSG_REFRESH_MACHINE_ID;
    if (same(m->boot_id, r->boot_id))
        r->m.done |= MSG_REFRESH_BOOT_ID;
    r->m.hostname = text_slice(r->hostname);
    r->m.machine_id = text_slice(r->machine_id);
    r->m.boot_id = text_slice(r->boot_id);
    r->m.fault = text_slice(r->fault);
    r->m.wall_ms = clock_wall_ms();
}

void refresh_do(const struct msg_refresh *m, struct refreshed *ret)
{
    memset(ret, 0, sizeof *ret);
    memcpy(ret->m.generation, m->generation, sizeof ret->m.generation);
    if (m->seed.len > 0) // first: whatever is made from now on is made of it
        entropy(m->seed, ret);
    if (m->wall_ms != 0)
        wall_clock(m->wall_ms, ret);
    if (m->hostname.len > 0)
        hostname(m->hostname, ret);
    if (m->machine_id.len > 0 && !machine_id_valid(m->machine_id))
        add_fault(ret, "machine_id: not 32 lower-case hex digits");
    else if (m->machine_id.len > 0)
        identity(&machine, "machine_id", m->machine_id, ret);
    if (m->boot_id.len > 0 && !boot_id_valid(m->boot_id))
        add_fault(ret, "boot_id: not a UUID");
    else if (m->boot_id.len > 0)
        identity(&boot, "boot_id", m->boot_id, ret);
    read_back(m, ret);
}
