// What makes this guest somebody: randomness, wall clock, hostname, machine id, boot id; and becoming somebody else after
// a restore. Main thread only. A refresh is system calls alone, no process, no wait for a disk.
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
struct identity {
    const char *what, *path;       // its name in a fault; where programs look
    const char *file;              // ours, bound over it
    size_t len;
    bool (*valid)(struct slice s);
    int fd;                        // of file, kept
    dev_t dev;
    ino_t ino;
};
static struct identity machine = {.what = "machine_id", .path = "/etc/machine-id", .file = OWN_DIR "/machine-id",
                                  .len = MACHINE_ID_LEN, .valid = machine_id_valid, .fd = -1};
static struct identity boot = {.what = "boot_id", .path = "/proc/sys/kernel/random/boot_id", .file = OWN_DIR "/boot-id",
                               .len = BOOT_ID_LEN, .valid = boot_id_valid, .fd = -1};

// The first line of the file at path, at most cap - 1 bytes, and whose file it is. False when there is none or it is longer.
static bool read_line(const char *path, char *out, size_t cap, struct stat *ret_st)
{
    memset(ret_st, 0, sizeof *ret_st);
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); // whatever root has put there
    const ssize_t n = fd >= 0 && fstat(fd, ret_st) == 0 ? read(fd, out, cap) : -1;
    if (fd >= 0)
        close(fd);
    char *end = n > 0 ? memchr(out, '\n', (size_t)n) : NULL;
    if (!end && n >= 0 && (size_t)n < cap)
        end = out + n;
    *(end ? end : out) = 0;
    return end && end > out;
}

static bool is_ours(const struct identity *id, const struct stat *st)
{
    return id->fd >= 0 && st->st_dev == id->dev && st->st_ino == id->ino;
}

// What a program finds at the path, out being of len + 2 bytes. True when it is in our file.
static bool look(const struct identity *id, char *out)
{
    struct stat st;
    (void)read_line(id->path, out, id->len + 2, &st);
    if (is_ours(id, &st) && (size_t)st.st_size > id->len + 1)
        (void)!ftruncate(id->fd, (off_t)id->len + 1); // root wrote more into it
    return is_ours(id, &st);
}

static bool open_own(struct identity *id)
{
    struct stat st;
    if (id->fd >= 0)
        return true;
    id->fd = open(id->file, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0444);
    if (id->fd < 0 || fstat(id->fd, &st) != 0)
        return false;
    id->dev = st.st_dev;
    id->ino = st.st_ino;
    return true;
}

// In place and of one length: no reader finds it empty. 0, or -1 with errno.
static int store(struct identity *id, const char *text)
{
    char line[BOOT_ID_LEN + 2];
    const size_t n = strlen(text);
    if (n >= sizeof line)
        return -1;
    memcpy(line, text, n);
    line[n] = '\n';
    return open_own(id) && pwrite(id->fd, line, n + 1, 0) == (ssize_t)n + 1 ? 0 : -1;
}

// Binds our file over the path, over an empty one where the image has none. 0, or -1 with errno.
static int place(const struct identity *id)
{
    if (mount(id->file, id->path, NULL, MS_BIND, NULL) == 0)
        return 0;
    if (errno != ENOENT)
        return -1;
    const int fd = open(id->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0444);
    if (fd < 0)
        return -1;
    close(fd);
    return mount(id->file, id->path, NULL, MS_BIND, NULL);
}

// D-Bus has a machine id of its own where the image was made with one; dbus-uuidgen(1) wants both to be the same.
static int dbus_follows(void)
{
    struct stat st;
    if (stat(dbus_path, &st) != 0 ? errno == ENOENT || errno == ENOTDIR : is_ours(&machine, &st))
        return 0;
    if (unlink(dbus_temporary) != 0 && errno != ENOENT)
        return -1;
    return symlink(machine.path, dbus_temporary) == 0 ? rename(dbus_temporary, dbus_path) : -1;
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
    struct stat st;
    random_fd = open("/dev/random", O_WRONLY | O_CLOEXEC);
    mkdir(OWN_DIR, 0700);
    keep_whole_proc();
    mkdir("/etc", 0755);
    fresh_machine_id(machine_id);
    if (store(&machine, machine_id) != 0 || place(&machine) != 0 || dbus_follows() != 0)
        dprintf(2, "airlock-agent: the machine id has no place: %s\n", strerror(errno));
    if (!read_line(boot.path, boot_id, sizeof boot_id, &st) || store(&boot, boot_id) != 0 || place(&boot) != 0)
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

static void hostname(struct slice asked, struct refreshed *r)
{
    if (asked.len > 0 && !hostname_valid(asked))
        add_fault(r, "hostname: not of [a-z0-9-]");
    else if (asked.len > 0 && sethostname((const char *)asked.data, asked.len) != 0)
        add_fault(r, "hostname: %s", strerror(errno));
    gethostname(r->hostname, sizeof r->hostname - 1);
    if (asked.len > 0 && strlen(r->hostname) == asked.len && memcmp(r->hostname, asked.data, asked.len) == 0)
        r->m.done |= MSG_REFRESH_HOSTNAME;
}

// Changes the id when a good one is asked for, and finds what is there then. True when that is what was asked for.
static bool identity(struct identity *id, struct slice asked, char *found, struct refreshed *r)
{
    char text[BOOT_ID_LEN + 1] = "";
    const bool valid = id->valid(asked);
    if (asked.len > 0 && !valid)
        add_fault(r, "%s: not of its form", id->what);
    if (!valid) {
        (void)look(id, found);
        return false;
    }
    memcpy(text, asked.data, id->len);
    if (store(id, text) != 0)
        add_fault(r, "%s: %s", id->what, strerror(errno));
    if (!look(id, found)) { // root undid the binding, or the boot could not make it
        if (place(id) != 0)
            add_fault(r, "%s: %s", id->what, strerror(errno));
        (void)look(id, found);
    }
    return strcmp(found, text) == 0;
}

static void identities(const struct msg_refresh *m, struct refreshed *r)
{
    if (identity(&machine, m->machine_id, r->machine_id, r)) {
        if (dbus_follows() == 0)
            r->m.done |= MSG_REFRESH_MACHINE_ID;
        else
            add_fault(r, "machine_id: that of D-Bus: %s", strerror(errno));
    }
    if (identity(&boot, m->boot_id, r->boot_id, r))
        r->m.done |= MSG_REFRESH_BOOT_ID;
}

// What a program gets from now on, where the seed alone would not show that it does.
static void draw(struct refreshed *r)
{
    if (getrandom(r->random, sizeof r->random, GRND_NONBLOCK) == (ssize_t)sizeof r->random) {
        r->m.random = (struct slice){r->random, sizeof r->random};
        return;
    }
    add_fault(r, "entropy: %s", strerror(errno));
    r->m.done &= ~(uint64_t)MSG_REFRESH_ENTROPY;
}

static struct slice text_slice(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

void refresh_do(const struct msg_refresh *m, struct refreshed *ret)
{
    memset(ret, 0, sizeof *ret);
    memcpy(ret->m.generation, m->generation, sizeof ret->m.generation);
    if (m->seed.len > 0) // first: whatever is made from now on is made of it
        entropy(m->seed, ret);
    if (m->wall_ms != 0)
        wall_clock(m->wall_ms, ret);
    hostname(m->hostname, ret);
    identities(m, ret);
    draw(ret);
    ret->m.hostname = text_slice(ret->hostname);
    ret->m.machine_id = text_slice(ret->machine_id);
    ret->m.boot_id = text_slice(ret->boot_id);
    ret->m.fault = text_slice(ret->fault);
    ret->m.wall_ms = clock_wall_ms();
}
