// The command lines: equal to the golden files of tests/qemu/data, and what must hold of every one of them. A change that
// is meant is written to the golden files by AIRLOCK_GOLDEN=write.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <fcntl.h>

#include "base/buf.h"
#include "base/fd.h"
#include "qemu/argv.h"

static const struct argv_fds ALL = {.kernel = 10, .initrd = 11, .root = 12, .disk = 13, .control = 14, .bulk = 15,
                                    .qmp = 16, .console = 17, .disk_read = 18, .ram = -1},
                             NO_DISKS = {.kernel = 10, .initrd = 11, .root = -1, .disk = -1, .control = 14, .bulk = 15,
                                         .qmp = 16, .console = 17, .disk_read = -1, .ram = -1}; // as the probe launches

static struct vm_spec spec_of(enum vm_accel accel)
{
    // What belongs to the host and to the launch only: numbers that would be seen if they leaked.
    return (struct vm_spec){.id = "sbx01jbx3w8n0v9k2m4p6r8t0a2c4", .accel = accel, .vcpus = 2, .memory_mib = 768,
                            .tsc_khz = 2095231, .kernel_fd = 7001, .initrd_fd = 7002, .root_fd = 7003, .disk_fd = 7004,
                            .run_dirfd = 7005, .jail_uid = 610007, .cgroup_parent = "/sys/fs/cgroup/airlock"};
}

// Both command lines as one, as the launch puts them together.
static struct argv whole(const struct vm_spec *spec, const struct argv_fds *fds)
{
    struct argv a = {0};
    assert_int_equal(argv_jail(spec, 19, -1, &a), 0);
    assert_int_equal(argv_qemu(spec, fds, &a), 0);
    assert_true(a.n > 0 && a.words[a.n] == NULL);
    return a;
}

static size_t find(const struct argv *a, const char *word)
{
    for (size_t i = 0; i < a->n; i++)
        if (strcmp(a->words[i], word) == 0)
            return i;
    return SIZE_MAX;
}

static size_t count(const struct argv *a, const char *part)
{
    size_t n = 0;
    for (size_t i = 0; i < a->n; i++)
        n += strstr(a->words[i], part) != NULL;
    return n;
}

// The word after an option that is there once.
static const char *value_of(const struct argv *a, const char *option)
{
    const size_t at = find(a, option);
    assert_true(at != SIZE_MAX && at + 1 < a->n);
    for (size_t i = at + 1; i < a->n; i++)
        assert_string_not_equal(a->words[i], option);
    return a->words[at + 1];
}

static void golden(const char *name, const struct vm_spec *spec, const struct argv_fds *fds)
{
    CLEANUP_BUF struct buf got = BUF_INIT(1 << 16), want = BUF_INIT(1 << 16);
    CLEANUP_FD int data = open("tests/qemu/data", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct argv a = whole(spec, fds);
    for (size_t i = 0; i < a.n; i++)
        assert_true(buf_addf(&got, "%s\n", a.words[i]));
    argv_free(&a);
    const char *how = getenv("AIRLOCK_GOLDEN");
    if (how && strcmp(how, "write") == 0)
        assert_int_equal(fd_write_file_atomic(data, name, got.data, got.len, 0644), 0);
    assert_int_equal(fd_read_file(data, name, &want), 0);
    assert_string_equal(buf_text(&got), buf_text(&want));
}

static void equal_to_the_golden_files(void **state)
{
    const struct vm_spec tcg = spec_of(VM_ACCEL_TCG), kvm = spec_of(VM_ACCEL_KVM);
    golden("argv-tcg.txt", &tcg, &ALL);
    golden("argv-kvm.txt", &kvm, &ALL);
    golden("argv-kvm-diskless.txt", &kvm, &NO_DISKS);
}

// Paths are those of the descriptors, and in the jail's own part those of its fixed mounts.
static void no_path_of_the_host(void **state)
{
    for (int accel = VM_ACCEL_TCG; accel <= VM_ACCEL_KVM; accel++) {
        struct vm_spec spec = spec_of(accel);
        struct argv a = {0};
        assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
        for (size_t i = 0; i < a.n; i++)
            for (const char *at = a.words[i]; (at = strchr(at, '/')); at += 1) {
                const bool fd = strncmp(at, "/proc/self/fd/", 14) == 0, set = strncmp(at, "/dev/fdset/", 11) == 0;
                assert_true(fd || set);
                at += fd ? 13 : 10;
            }
        argv_free(&a);
        // Nothing of the launch's own descriptors, uid and directories.
        a = whole(&spec, &ALL);
        assert_int_equal(count(&a, "700") + count(&a, "610007") + count(&a, "cgroup/airlock"), 0);
        argv_free(&a);
    }
}

static void closed_by_default(void **state)
{
    for (int accel = VM_ACCEL_TCG; accel <= VM_ACCEL_KVM; accel++) {
        const struct vm_spec spec = spec_of(accel);
        struct argv a = whole(&spec, &ALL);
        assert_true(find(&a, "-nodefaults") != SIZE_MAX);
        assert_true(find(&a, "-no-user-config") != SIZE_MAX);
        assert_true(find(&a, "-no-reboot") != SIZE_MAX);
        assert_string_equal(value_of(&a, "-display"), "none");
        assert_string_equal(value_of(&a, "-sandbox"),
                            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        assert_int_equal(strncmp(value_of(&a, "-M"), "microvm,", 8), 0);
        argv_free(&a);
        // No network, no display, no debugger, no file sharing.
        static const char *const PARTS[] = {"netdev", "virtio-net", "vnc", "spice", "usb", "9p", "fsdev", "vhost", "gdb"},
                                 *const WORDS[] = {"-net", "-nic", "-s", "-S", "-monitor", "-daemonize", "-hda", "-drive"};
        assert_int_equal(argv_qemu(&spec, &NO_DISKS, &a), 0);
        for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
            assert_int_equal(count(&a, PARTS[i]), 0);
        for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS; i++)
            assert_int_equal(find(&a, WORDS[i]), SIZE_MAX);
        argv_free(&a);
    }
}

static void jail_shuts_every_namespace(void **state)
{
    static const char *const WANTED[] = {"--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc",
                                         "--unshare-uts", "--unshare-cgroup-try", "--clearenv", "--as-pid-1"};
    for (int accel = VM_ACCEL_TCG; accel <= VM_ACCEL_KVM; accel++) {
        const struct vm_spec spec = spec_of(accel);
        struct argv a = {0};
        assert_int_equal(argv_jail(&spec, 33, -1, &a), 0);
        assert_string_equal(a.words[0], "bwrap");
        assert_string_equal(a.words[a.n - 1], "--");
        assert_string_equal(value_of(&a, "--info-fd"), "33");
        assert_string_equal(value_of(&a, "--cap-drop"), "ALL");
        for (size_t i = 0; i < sizeof WANTED / sizeof *WANTED; i++)
            assert_true(find(&a, WANTED[i]) != SIZE_MAX);
        // Nothing of the host but /usr, read-only, and /dev/kvm where it is used.
        assert_string_equal(value_of(&a, "--ro-bind"), "/usr");
        assert_int_equal(find(&a, "--bind"), SIZE_MAX);
        if (accel == VM_ACCEL_KVM)
            assert_string_equal(value_of(&a, "--dev-bind"), "/dev/kvm");
        else
            assert_int_equal(count(&a, "kvm"), 0);
        argv_free(&a);
    }
}

// From outside /usr it lies over the host's own, by its path or as a copy.
static void a_foreign_qemu_lies_over_the_hosts(void **state)
{
    struct vm_spec spec = spec_of(VM_ACCEL_TCG);
    static const struct {
        const char *path;
        int fd;
        const char *shown, *run;
    } CASES[] = {{NULL, -1, NULL, "qemu-system-x86_64"},
                 {"/usr/local/bin/qemu", -1, NULL, "/usr/local/bin/qemu"},
                 {"/opt/qemu", -1, "--ro-bind /opt/qemu /usr/bin/qemu-system-x86_64 ", "/usr/bin/qemu-system-x86_64"},
                 {"/root/qemu", 20, "--perms 0555 --ro-bind-data 20 /usr/bin/qemu-system-x86_64 ", "/usr/bin/qemu-system-x86_64"}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        CLEANUP_BUF struct buf line = BUF_INIT(1 << 16);
        struct argv a = {0}, q = {0};
        spec.qemu_path = CASES[i].path;
        assert_int_equal(argv_jail(&spec, 19, CASES[i].fd, &a), 0);
        assert_int_equal(argv_qemu(&spec, &ALL, &q), 0);
        for (size_t k = 0; k < a.n; k++)
            assert_true(buf_addf(&line, "%s ", a.words[k]));
        if (CASES[i].shown)
            assert_non_null(strstr(buf_text(&line), CASES[i].shown));
        else
            assert_null(strstr(buf_text(&line), "qemu"));
        assert_string_equal(q.words[0], CASES[i].run);
        argv_free(&a);
        argv_free(&q);
    }
}

// QEMU opens a disk read-only before a device may write it: one set holds a descriptor for each.
static void disk_has_a_second_read_only_descriptor(void **state)
{
    const struct vm_spec spec = spec_of(VM_ACCEL_TCG);
    struct argv a = {0};
    assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
    assert_int_equal(count(&a, ",set=1"), 1);
    assert_int_equal(count(&a, ",set=2"), 2);
    assert_true(find(&a, "fd=12,set=1") != SIZE_MAX);
    assert_true(find(&a, "fd=13,set=2") != SIZE_MAX);
    assert_true(find(&a, "fd=18,set=2") != SIZE_MAX);
    for (size_t i = 0; i < a.n; i++) {
        if (strstr(a.words[i], "id=root,"))
            assert_non_null(strstr(a.words[i], ",read-only=on"));
        if (strstr(a.words[i], "id=data,")) {
            assert_null(strstr(a.words[i], "read-only"));
            assert_non_null(strstr(a.words[i], "werror=enospc"));
        }
    }
    argv_free(&a);
    struct argv_fds one = ALL;
    one.disk_read = -1;
    assert_int_equal(argv_qemu(&spec, &one, &a), 0);
    assert_int_equal(count(&a, ",set=2"), 1);
    argv_free(&a);
    one.disk = -1;
    assert_int_equal(argv_qemu(&spec, &one, &a), 0);
    assert_int_equal(count(&a, "set=2"), 0);
    assert_int_equal(count(&a, "data"), 0);
    argv_free(&a);
}

static void every_socket_has_its_descriptor(void **state)
{
    static const char *const WANTED[] = {"socket,id=control,fd=14,server=on,wait=off",
                                         "socket,id=bulk,fd=15,server=on,wait=off",
                                         "socket,id=qmp,fd=16,server=on,wait=off",
                                         "socket,id=console,fd=17,server=on,wait=off"};
    const struct vm_spec spec = spec_of(VM_ACCEL_KVM);
    struct argv a = {0};
    assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
    for (size_t i = 0; i < sizeof WANTED / sizeof *WANTED; i++)
        assert_true(find(&a, WANTED[i]) != SIZE_MAX);
    assert_int_equal(count(&a, "socket,"), 4);
    assert_string_equal(value_of(&a, "-kernel"), "/proc/self/fd/10");
    assert_string_equal(value_of(&a, "-initrd"), "/proc/self/fd/11");
    assert_string_equal(value_of(&a, "-serial"), "chardev:console");
    argv_free(&a);
}

static void what_was_asked_for(void **state)
{
    struct vm_spec spec = spec_of(VM_ACCEL_TCG);
    struct argv a = {0};
    spec.qemu_path = "/usr/local/bin/qemu-system-x86_64";
    spec.vcpus = 8;
    spec.memory_mib = 16384;
    assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
    assert_string_equal(a.words[0], spec.qemu_path);
    assert_string_equal(value_of(&a, "-name"), spec.id);
    assert_string_equal(value_of(&a, "-smp"), "8");
    assert_string_equal(value_of(&a, "-m"), "16384");
    assert_true(find(&a, "memory-backend-ram,id=ram,size=16384M") != SIZE_MAX);
    assert_int_equal(strncmp(value_of(&a, "-accel"), "tcg,", 4), 0);
    argv_free(&a);
    assert_int_equal(a.n, 0); // and may be used again
    spec.accel = VM_ACCEL_KVM;
    assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
    assert_string_equal(value_of(&a, "-accel"), "kvm");
    assert_string_equal(value_of(&a, "-cpu"), "host");
    argv_free(&a);
    assert_string_equal(vm_accel_name(VM_ACCEL_TCG), "tcg");
    assert_string_equal(vm_accel_name(VM_ACCEL_KVM), "kvm");
}

static void kernel_command_line(void **state)
{
    char text[512], small[512];
    for (int accel = VM_ACCEL_TCG; accel <= VM_ACCEL_KVM; accel++) {
        const struct vm_spec spec = spec_of(accel);
        struct argv a = {0};
        assert_int_equal(argv_kernel_cmdline(&spec, text, sizeof text), 0);
        assert_non_null(strstr(text, "tsc_early_khz=2095231 "));
        assert_non_null(strstr(text, "panic=-1 reboot=t")); // a panic ends the VM
        // Emulation guards nothing, hardware does: mitigations are given up only there.
        assert_true((strstr(text, "mitigations=off") != NULL) == (accel == VM_ACCEL_TCG));
        assert_int_equal(argv_qemu(&spec, &ALL, &a), 0);
        assert_string_equal(value_of(&a, "-append"), text);
        argv_free(&a);
        // What does not fit whole is refused, not cut.
        const size_t len = strlen(text);
        assert_int_equal(argv_kernel_cmdline(&spec, small, len + 1), 0);
        assert_string_equal(small, text);
        assert_int_equal(argv_kernel_cmdline(&spec, small, len), -1);
        assert_int_equal(argv_kernel_cmdline(&spec, small, 1), -1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equal_to_the_golden_files),
        cmocka_unit_test(no_path_of_the_host),
        cmocka_unit_test(closed_by_default),
        cmocka_unit_test(jail_shuts_every_namespace),
        cmocka_unit_test(a_foreign_qemu_lies_over_the_hosts),
        cmocka_unit_test(disk_has_a_second_read_only_descriptor),
        cmocka_unit_test(every_socket_has_its_descriptor),
        cmocka_unit_test(what_was_asked_for),
        cmocka_unit_test(kernel_command_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
