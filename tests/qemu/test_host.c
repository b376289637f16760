// What is read of the host, with scripts in QEMU's place, and what the checks make of it.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/crypto.h"
#include "base/fd.h"
#include "qemu/host.h"

struct dir {
    char path[64];
    int fd;
};

static int setup(void **state)
{
    struct dir *d = calloc(1, sizeof *d);
    strcpy(d->path, "/tmp/airlock-host.XXXXXX");
    if (!mkdtemp(d->path))
        return -1;
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *state = d;
    return d->fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct dir *d = *state;
    fd_close(&d->fd);
    const int failed = fd_remove_tree(AT_FDCWD, d->path, NULL);
    free(d);
    return failed;
}

// Facts with this shell script as QEMU.
static struct host_facts facts_with(struct dir *d, const char *script, mode_t mode)
{
    char path[96], text[512];
    struct host_facts f;
    struct err err = {0};
    snprintf(path, sizeof path, "%s/qemu", d->path);
    const int n = snprintf(text, sizeof text, "#!/bin/sh\n%s\n", script);
    assert_int_equal(fd_write_file_atomic(d->fd, "qemu", text, (size_t)n, mode), 0);
    assert_int_equal(host_facts_read(path, &f, &err), 0);
    assert_string_equal(f.qemu_path, path);
    return f;
}

static void version_and_build_of_qemu(void **state)
{
    uint8_t hash[SHA256_BYTES];
    char want[DIGEST_TEXT_MAX];
    static const char SCRIPT[] = "test \"$*\" = --version && echo 'QEMU emulator version 9.1.50 (Debian 1:9.1+dfsg-7)'";
    const struct host_facts f = facts_with(*state, SCRIPT, 0755);
    assert_string_equal(f.qemu_version, "9.1.50");
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    assert_int_equal(fd_read_file(AT_FDCWD, f.qemu_path, &b), 0);
    crypto_sha256(b.data, b.len, hash);
    assert_string_equal(f.qemu_sha256, crypto_digest_text(hash, want));
}

static void a_qemu_that_cannot_be_run_has_no_version(void **state)
{
    struct host_facts f;
    struct err err = {0};
    assert_string_equal(facts_with(*state, "echo 'QEMU emulator version 7.2.0'; exit 1", 0755).qemu_version, "");
    assert_string_equal(facts_with(*state, "echo 'QEMU emulator version 7.2.0'; kill -9 $$", 0755).qemu_version, "");
    assert_string_equal(facts_with(*state, "echo something else", 0755).qemu_version, "");
    assert_string_equal(facts_with(*state, ":", 0755).qemu_version, "");
    assert_string_equal(facts_with(*state, "echo QEMU emulator version ", 0755).qemu_version, "");
    assert_string_equal(facts_with(*state, "echo 'QEMU emulator version 7.2.0'", 0644).qemu_version, "");
    assert_int_equal(host_facts_read("/does/not/exist", &f, &err), 0);
    assert_string_equal(f.qemu_version, "");
    assert_string_equal(f.qemu_sha256, "");
}

// What a program prints is bounded, and read to its end all the same.
static void a_chattering_qemu(void **state)
{
    struct host_facts f = facts_with(*state,
                                     "echo version 8.0.1; i=0; while [ $i -lt 300 ]; do printf '%01000d' 0; i=$((i+1)); done", 0755);
    assert_string_equal(f.qemu_version, "8.0.1");
    f = facts_with(*state, "printf '%01000d' 0; echo version 8.0.1", 0755); // past what is looked at
    assert_string_equal(f.qemu_version, "");
    f = facts_with(*state, "echo version 1111111111222222222233333333334444444444555555555566666666667777777777", 0755);
    assert_int_equal(strlen(f.qemu_version), sizeof f.qemu_version - 1);
    f = facts_with(*state, "echo error version 5.0.0 >&2", 0755); // both outputs count
    assert_string_equal(f.qemu_version, "5.0.0");
}

static void facts_of_this_host(void **state)
{
    const struct host_facts f = facts_with(*state, ":", 0755);
    CLEANUP_BUF struct buf b = BUF_INIT(64);
    assert_int_equal(fd_read_file(AT_FDCWD, "/proc/sys/kernel/random/boot_id", &b), 0);
    assert_int_equal(strlen(f.boot_id), 36);
    assert_memory_equal(f.boot_id, b.data, 36);
    assert_int_equal(f.cpus, sysconf(_SC_NPROCESSORS_ONLN));
    assert_true(f.memory_mib > 0);
    assert_true(f.is_root == (geteuid() == 0));
    assert_true(f.jail_works == (f.jail_reason[0] == 0)); // what does not work has a reason
    assert_true(f.cgroup_reason[0] != 0);
#if defined(__x86_64__)
    assert_true(f.tsc_khz > 100000 && f.tsc_khz < 10000000);
#endif
}

static void *busy(void *stop)
{
    while (!atomic_load((atomic_bool *)stop)) { }
    return NULL;
}

// One measurement that was interrupted half way would refuse the resume of every sandbox that is cold.
static void the_tsc_is_measured_alike_on_a_busy_host(void **state)
{
    (void)state;
#if defined(__x86_64__)
    pthread_t threads[8];
    atomic_bool stop = false;
    unsigned low = UINT32_MAX, high = 0;
    for (size_t i = 0; i < 8; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, busy, &stop), 0);
    for (int i = 0; i < 150; i++) {
        const unsigned khz = host_tsc_khz();
        low = khz < low ? khz : low;
        high = khz > high ? khz : high;
    }
    atomic_store(&stop, true);
    for (size_t i = 0; i < 8; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    assert_in_range(high - low, 0, 1000);
#else
    skip();
#endif
}

static void no_descriptor_is_left_open(void **state)
{
    (void)facts_with(*state, ":", 0755); // what libraries open once
    const int before = fd_count_open();
    (void)facts_with(*state, "echo version 7.2.0", 0755);
    (void)facts_with(*state, "exit 3", 0755);
    assert_int_equal(fd_count_open(), before);
}

// ---- checks -----------------------------------------------------------------------------------------------------------
static const struct host_facts GOOD = {.tsc_khz = 2000000, .qemu_version = "7.2.22", .qemu_path = "/usr/bin/qemu",
                                       .is_root = true, .userns = true, .kvm_device = true, .jail_works = true,
                                       .cgroup_reason = "for a reason", .cpus = 4, .memory_mib = 8000};

static const struct host_check *check_of(const struct host_facts *f, bool allow_emulation, const char *name)
{
    static struct host_check out[HOST_CHECKS_MAX];
    const struct host_check *found = NULL;
    const int n = host_checks(f, allow_emulation, out);
    assert_true(n > 0 && n <= HOST_CHECKS_MAX);
    for (int i = 0; i < n; i++) {
        assert_true(out[i].name[0] != 0 && out[i].text[0] != 0);
        if (strcmp(out[i].name, name) != 0)
            continue;
        assert_null(found); // one line per check
        found = &out[i];
    }
    assert_non_null(found);
    return found;
}

static void a_good_host(void **state)
{
    assert_int_equal(check_of(&GOOD, false, "qemu")->verdict, HOST_OK);
    assert_non_null(strstr(check_of(&GOOD, false, "qemu")->text, "7.2.22"));
    assert_int_equal(check_of(&GOOD, false, "jail")->verdict, HOST_OK);
    assert_int_equal(check_of(&GOOD, false, "kvm")->verdict, HOST_OK);
    assert_int_equal(check_of(&GOOD, false, "uids")->verdict, HOST_OK);
    assert_int_equal(check_of(&GOOD, false, "tsc")->verdict, HOST_OK);
    assert_non_null(strstr(check_of(&GOOD, false, "host")->text, "4 CPUs, 8000 MiB"));
}

static void what_is_missing_fails_and_says_what_to_do(void **state)
{
    struct host_facts f = GOOD;
    f.qemu_version[0] = 0;
    assert_int_equal(check_of(&f, true, "qemu")->verdict, HOST_FAIL);
    assert_non_null(strstr(check_of(&f, true, "qemu")->text, "install"));
    f = GOOD;
    f.jail_works = false;
    strcpy(f.jail_reason, "bubblewrap failed: no namespaces for you");
    assert_int_equal(check_of(&f, true, "jail")->verdict, HOST_FAIL);
    assert_non_null(strstr(check_of(&f, true, "jail")->text, "no namespaces for you"));
    f = GOOD;
    f.tsc_khz = 0;
    assert_int_equal(check_of(&f, true, "tsc")->verdict, HOST_FAIL);
    f = GOOD;
    f.is_root = false;
    assert_int_equal(check_of(&f, true, "uids")->verdict, HOST_WARN);
}

// Emulation is no boundary: without a word of the operator's, a host without KVM is refused.
static void emulation_must_be_asked_for(void **state)
{
    struct host_facts f = GOOD;
    f.kvm_device = false;
    assert_int_equal(check_of(&f, false, "kvm")->verdict, HOST_FAIL);
    assert_non_null(strstr(check_of(&f, false, "kvm")->text, "--allow-emulation"));
    assert_int_equal(check_of(&f, true, "kvm")->verdict, HOST_WARN);
    assert_non_null(strstr(check_of(&f, true, "kvm")->text, "no security boundary"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(version_and_build_of_qemu, setup, teardown),
        cmocka_unit_test_setup_teardown(a_qemu_that_cannot_be_run_has_no_version, setup, teardown),
        cmocka_unit_test_setup_teardown(a_chattering_qemu, setup, teardown),
        cmocka_unit_test_setup_teardown(facts_of_this_host, setup, teardown),
        cmocka_unit_test(the_tsc_is_measured_alike_on_a_busy_host),
        cmocka_unit_test_setup_teardown(no_descriptor_is_left_open, setup, teardown),
        cmocka_unit_test(a_good_host),
        cmocka_unit_test(what_is_missing_fails_and_says_what_to_do),
        cmocka_unit_test(emulation_must_be_asked_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
