// Becoming somebody else, in a directory of our own and with the calls that would change this machine replaced: what is
// asked for is checked, done and read back; what cannot be done is said and never counted as done.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct {
    char hostname[65];
    int64_t clock_ms, clock_off_ms; // what was set; what is read differs by so much
    unsigned seed_bytes, seed_bits, reseeds, mounts;
    int ioctl_errno, mount_errno, clock_errno, random_errno;
} machine_is;

static int fail_with(int code)
{
    errno = code;
    return code ? -1 : 0;
}

static int fake_sethostname(const char *name, size_t len)
{
    memset(machine_is.hostname, 0, sizeof machine_is.hostname);
    memcpy(machine_is.hostname, name, len);
    return 0;
}

static int fake_gethostname(char *out, size_t cap)
{
    snprintf(out, cap, "%s", machine_is.hostname);
    return 0;
}

static int fake_clock_settime(clockid_t id, const struct timespec *t)
{
    assert_int_equal(id, CLOCK_REALTIME);
    if (machine_is.clock_errno)
        return fail_with(machine_is.clock_errno);
    machine_is.clock_ms = (int64_t)t->tv_sec * 1000 + t->tv_nsec / 1000000;
    return 0;
}

static int64_t fake_wall_ms(void)
{
    return machine_is.clock_ms + machine_is.clock_off_ms;
}

static int fake_ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    if (machine_is.ioctl_errno)
        return fail_with(machine_is.ioctl_errno);
    if (request == _IO('R', 0x07)) {
        machine_is.reseeds++;
        return 0;
    }
    assert_int_equal(request, _IOW('R', 0x03, int[2]));
    va_start(args, request);
    const int *pool = va_arg(args, const int *);
    machine_is.seed_bits = (unsigned)pool[0];
    machine_is.seed_bytes = (unsigned)pool[1];
    va_end(args);
    return fd < 0 ? fail_with(EBADF) : 0;
}

static ssize_t fake_getrandom(void *out, size_t len, unsigned flags)
{
    if (machine_is.random_errno && (flags & GRND_NONBLOCK))
        return fail_with(machine_is.random_errno);
    return getrandom(out, len, 0);
}

// A binding of a file is the same file under a second name, as a hard link is. procfs is not mounted.
static int fake_mount(const char *from, const char *to, const char *type, unsigned long flags, const void *data)
{
    struct stat st;
    (void)data;
    if (type)
        return 0;
    assert_int_equal(flags, MS_BIND);
    machine_is.mounts++;
    if (machine_is.mount_errno)
        return fail_with(machine_is.mount_errno);
    if (stat(to, &st) != 0)
        return -1;
    if (!S_ISREG(st.st_mode))
        return fail_with(ENOTDIR);
    return unlink(to) == 0 ? link(from, to) : -1;
}

static int fake_mkdir(const char *path, mode_t mode)
{
    (void)path, (void)mode; // those of the guest's root
    return 0;
}

#define sethostname fake_sethostname
#define gethostname fake_gethostname
#define clock_settime fake_clock_settime
#define clock_wall_ms fake_wall_ms
#define ioctl fake_ioctl
#define getrandom fake_getrandom
#define mount fake_mount
#define mkdir fake_mkdir
#include "guest/refresh.c"
#undef mkdir
#undef clock_wall_ms

#include "base/fd.h"

#define S(text) ((struct slice){(const uint8_t *)(text), sizeof(text) - 1})
#define MACHINE_ID "0123456789abcdef0123456789abcdef"
#define BOOT_ID "01234567-89ab-4def-8123-456789abcdef"
#define KERNELS "fedcba98-7654-4210-8fed-cba987654321"

static char dir[64], paths[6][96];

static void put(const char *path, const char *text)
{
    (void)unlink(path);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

static void assert_file(const char *path, const char *text)
{
    struct buf b = BUF_INIT(200);
    assert_int_equal(fd_read_file(AT_FDCWD, path, &b), 0);
    assert_string_equal(buf_text(&b), text);
    buf_free(&b);
}

static int setup(void **state)
{
    static const char *const NAMES[] = {"machine-id", "own-machine-id", "boot_id", "own-boot-id", "dbus", "dbus.tmp"};
    (void)state;
    memset(&machine_is, 0, sizeof machine_is);
    strcpy(machine_is.hostname, "before");
    strcpy(dir, "/tmp/airlock-refresh.XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    for (size_t i = 0; i < 6; i++)
        snprintf(paths[i], sizeof paths[i], "%s/%s", dir, NAMES[i]);
    machine.path = paths[0];
    machine.file = paths[1];
    boot.path = paths[2];
    boot.file = paths[3];
    dbus_path = paths[4];
    dbus_temporary = paths[5];
    put(paths[2], KERNELS "\n");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    fd_close(&machine.fd);
    fd_close(&boot.fd);
    fd_close(&random_fd);
    return fd_remove_tree(AT_FDCWD, dir, NULL);
}

static bool found(const char *path, char *out, size_t cap)
{
    struct stat st;
    return read_line(path, out, cap, &st);
}

static bool bound(const struct identity *id, const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && is_ours(id, &st);
}

static struct refreshed done;

static void refresh(const struct msg_refresh *m)
{
    refresh_do(m, &done);
    assert_memory_equal(done.m.generation, m->generation, 16);
}

static const struct msg_refresh WHOLE = {.generation = "0123456789abcde", .seed = {(const uint8_t *)MACHINE_ID, 32},
                                         .wall_ms = 1900000000123, .hostname = {(const uint8_t *)"sbx-1", 5},
                                         .machine_id = {(const uint8_t *)MACHINE_ID, 32},
                                         .boot_id = {(const uint8_t *)BOOT_ID, 36}};

static void what_is_valid(void **state)
{
    (void)state;
    assert_true(hostname_valid(S("a")) && hostname_valid(S("sbx01hz-9")) && hostname_valid(S(MACHINE_ID "0123456789012345678901234567890")));
    assert_false(hostname_valid(S("")) || hostname_valid(S("-a")) || hostname_valid(S("A")) || hostname_valid(S("a.b")) ||
                 hostname_valid(S("a\0b")) || hostname_valid(S("a\n")) || hostname_valid(S(MACHINE_ID MACHINE_ID)));
    assert_true(machine_id_valid(S(MACHINE_ID)));
    assert_false(machine_id_valid(S("0123456789abcdef0123456789abcde")) || machine_id_valid(S(MACHINE_ID "0")) ||
                 machine_id_valid(S("0123456789ABCDEF0123456789ABCDEF")) || machine_id_valid(S("0123456789abcdef\0" "123456789abcdef")) ||
                 machine_id_valid(S("00000000000000000000000000000000")) || machine_id_valid(S("")));
    assert_true(boot_id_valid(S(BOOT_ID)));
    assert_false(boot_id_valid(S(MACHINE_ID)) || boot_id_valid(S("01234567-89ab-4def-8123-456789abcdeg")) ||
                 boot_id_valid(S("0123456-789ab-4def-8123-456789abcdef")) || boot_id_valid(S(BOOT_ID "0")) ||
                 boot_id_valid(S("01234567-89AB-4def-8123-456789abcdef")) || boot_id_valid(S("01234567-89ab-4def-8123-456789abcde\0")));
}

static void a_boot_makes_a_machine_id_and_keeps_the_boot_id(void **state)
{
    char first[40], second[40];
    (void)state;
    refresh_prepare();
    assert_true(found(machine.path, first, sizeof first));
    assert_true(machine_id_valid((struct slice){(const uint8_t *)first, strlen(first)}));
    assert_int_equal(first[12], '4');
    assert_true(strchr("89ab", first[16]) != NULL);
    assert_file(boot.path, KERNELS "\n");
    assert_true(bound(&machine, machine.path) && bound(&boot, boot.path));
    struct stat st;
    assert_int_equal(stat(machine.path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0444);
    fd_close(&random_fd);
    refresh_prepare();
    assert_true(found(machine.path, second, sizeof second));
    assert_string_not_equal(first, second);
}

static void all_of_it(void **state)
{
    (void)state;
    refresh_prepare();
    const unsigned mounts = machine_is.mounts;
    const int held = open(machine.path, O_RDONLY | O_CLOEXEC); // who has it open sees the new one
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL);
    assert_int_equal(done.m.fault.len, 0);
    assert_file(machine.path, MACHINE_ID "\n");
    assert_file(boot.path, BOOT_ID "\n");
    assert_string_equal(done.hostname, "sbx-1");
    assert_string_equal(done.machine_id, MACHINE_ID);
    assert_string_equal(done.boot_id, BOOT_ID);
    assert_int_equal(done.m.wall_ms, WHOLE.wall_ms);
    assert_int_equal(done.m.random.len, 16);
    assert_int_equal(machine_is.seed_bits, 256);
    assert_int_equal(machine_is.seed_bytes, 32);
    assert_int_equal(machine_is.reseeds, 1);
    assert_int_equal(machine_is.mounts, mounts); // rewritten in place
    char seen[33] = "";
    assert_int_equal(pread(held, seen, 32, 0), 32);
    assert_string_equal(seen, MACHINE_ID);
    close(held);
}

static void what_is_not_asked_for_stays(void **state)
{
    (void)state;
    refresh_prepare();
    refresh(&WHOLE);
    refresh(&(struct msg_refresh){.wall_ms = 1900000009000});
    assert_int_equal(done.m.done, MSG_REFRESH_CLOCK);
    assert_int_equal(done.m.fault.len, 0);
    assert_string_equal(done.machine_id, MACHINE_ID); // told all the same
    assert_string_equal(done.boot_id, BOOT_ID);
    assert_string_equal(done.hostname, "sbx-1");
    assert_int_equal(machine_is.reseeds, 1);
    refresh(&(struct msg_refresh){.hostname = S("other")});
    assert_int_equal(done.m.done, MSG_REFRESH_HOSTNAME);
    assert_int_equal(machine_is.clock_ms, 1900000009000);
}

static void bad_values_change_nothing(void **state)
{
    static uint8_t large[SEED_MAX + 1];
    (void)state;
    refresh_prepare();
    refresh(&WHOLE);
    const struct msg_refresh bad[] = {
        {.seed = {large, MSG_SEED_BYTES - 1}}, {.seed = {large, sizeof large}}, {.wall_ms = -1},
        {.wall_ms = INT64_MIN},                {.hostname = S("Not a name")},   {.machine_id = S("0123")},
        {.machine_id = S(MACHINE_ID "\n")},    {.boot_id = S(MACHINE_ID)},      {.boot_id = S("x")},
    };
    static const char *const WORD[] = {"entropy", "entropy", "clock", "clock", "hostname", "machine_id", "machine_id", "boot_id", "boot_id"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        refresh(&bad[i]);
        assert_int_equal(done.m.done, 0);
        assert_ptr_equal(strstr(done.fault, WORD[i]), done.fault);
        assert_string_equal(done.machine_id, MACHINE_ID);
        assert_string_equal(done.boot_id, BOOT_ID);
        assert_string_equal(done.hostname, "sbx-1");
    }
    assert_int_equal(machine_is.reseeds, 1);
    struct msg_refresh m = WHOLE; // one bad part does not keep the others back
    m.boot_id = S("x");
    refresh(&m);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)MSG_REFRESH_BOOT_ID);
}

static void what_fails_is_said_and_not_counted(void **state)
{
    (void)state;
    refresh_prepare();
    machine_is.ioctl_errno = EPERM;
    machine_is.clock_errno = EINVAL;
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)(MSG_REFRESH_ENTROPY | MSG_REFRESH_CLOCK));
    assert_non_null(strstr(done.fault, "entropy: "));
    assert_non_null(strstr(done.fault, "; clock: "));
    machine_is.ioctl_errno = machine_is.clock_errno = 0;
    machine_is.clock_off_ms = 5000;
    machine_is.random_errno = EAGAIN;
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)(MSG_REFRESH_ENTROPY | MSG_REFRESH_CLOCK));
    assert_int_equal(done.m.random.len, 0);
    for (size_t i = 0; i < 100; i++) // however much there is to say
        add_fault(&done, "a fault that is %s", "long");
    assert_true(strlen(done.fault) < sizeof done.fault);
}

static void a_binding_that_root_undid_is_made_again(void **state)
{
    (void)state;
    refresh_prepare();
    put(machine.path, "ffffffffffffffffffffffffffffffff\n"); // umount, and another file
    assert_int_equal(unlink(boot.path), 0);
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL);
    assert_file(machine.path, MACHINE_ID "\n");
    assert_true(bound(&machine, machine.path));
    put(machine.path, "ffffffffffffffffffffffffffffffff\n");
    machine_is.mount_errno = EPERM;
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)MSG_REFRESH_MACHINE_ID);
    assert_string_equal(done.machine_id, "ffffffffffffffffffffffffffffffff"); // what a program would read
    assert_ptr_equal(strstr(done.fault, "machine_id: "), done.fault);
}

static void what_root_wrote_into_it_is_gone(void **state)
{
    (void)state;
    refresh_prepare();
    assert_int_equal(ftruncate(boot.fd, 0), 0);
    assert_int_equal(pwrite(machine.fd, MACHINE_ID MACHINE_ID "\n\n", 66, 0), 66);
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL);
    assert_file(machine.path, MACHINE_ID "\n");
    assert_file(boot.path, BOOT_ID "\n");
}

static void a_place_that_cannot_be_made(void **state)
{
    char nowhere[128];
    (void)state;
    snprintf(nowhere, sizeof nowhere, "%s/missing/machine-id", dir);
    machine.path = nowhere;
    refresh_prepare();
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)MSG_REFRESH_MACHINE_ID);
    assert_string_equal(done.machine_id, "");
    assert_ptr_equal(strstr(done.fault, "machine_id: "), done.fault);
}

static void dbus_has_no_identity_of_its_own(void **state)
{
    char target[96] = "";
    (void)state;
    put(dbus_path, "ffffffffffffffffffffffffffffffff\n");
    put(dbus_temporary, "left over");
    refresh_prepare();
    assert_true(bound(&machine, dbus_path));
    assert_true(readlink(dbus_path, target, sizeof target - 1) > 0);
    assert_string_equal(target, machine.path);
    put(dbus_path, "ffffffffffffffffffffffffffffffff\n"); // a package made one later
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL);
    assert_file(dbus_path, MACHINE_ID "\n");
    assert_int_equal(unlink(dbus_path), 0);
    assert_int_equal(mkdir(dbus_path, 0755), 0); // cannot be replaced: said, not counted
    refresh(&WHOLE);
    assert_int_equal(done.m.done, MSG_REFRESH_ALL & ~(unsigned)MSG_REFRESH_MACHINE_ID);
    assert_ptr_equal(strstr(done.fault, "machine_id: "), done.fault);
}

static void lines_of_odd_files(void **state)
{
    char path[96], line[8];
    (void)state;
    snprintf(path, sizeof path, "%s/odd", dir);
    assert_false(found(path, line, sizeof line));
    put(path, "");
    assert_false(found(path, line, sizeof line));
    put(path, "\n");
    assert_false(found(path, line, sizeof line));
    put(path, "1234567");
    assert_true(found(path, line, sizeof line));
    assert_string_equal(line, "1234567");
    put(path, "12345678");
    assert_false(found(path, line, sizeof line));
    assert_string_equal(line, "");
    put(path, "ab\ncd");
    assert_true(found(path, line, sizeof line));
    assert_string_equal(line, "ab");
    assert_false(found(dir, line, sizeof line));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_false(found(path, line, sizeof line)); // and nobody waits for a writer
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_valid),
        cmocka_unit_test_setup_teardown(a_boot_makes_a_machine_id_and_keeps_the_boot_id, setup, teardown),
        cmocka_unit_test_setup_teardown(all_of_it, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_not_asked_for_stays, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_values_change_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(what_fails_is_said_and_not_counted, setup, teardown),
        cmocka_unit_test_setup_teardown(a_binding_that_root_undid_is_made_again, setup, teardown),
        cmocka_unit_test_setup_teardown(what_root_wrote_into_it_is_gone, setup, teardown),
        cmocka_unit_test_setup_teardown(a_place_that_cannot_be_made, setup, teardown),
        cmocka_unit_test_setup_teardown(dbus_has_no_identity_of_its_own, setup, teardown),
        cmocka_unit_test_setup_teardown(lines_of_odd_files, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
