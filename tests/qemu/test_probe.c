// The kept verdict on KVM: believed while host, QEMU and kernel are the same, asked for again otherwise. QEMU is a file that
// cannot run in the jail, so that a probe that takes place says no.
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fd.h"
#include "base/json.h"
#include "qemu/probe.h"

#define KERNEL "sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"

struct fixture {
    char path[64], qemu[96];
    int dirfd, kernel_fd;
    struct vm_spec spec;
    struct probe_verdict v;
    atomic_bool cancelled;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->path, "/tmp/airlock-probe.XXXXXX");
    if (!mkdtemp(x->path))
        return -1;
    x->dirfd = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(x->qemu, sizeof x->qemu, "%s/qemu", x->path);
    if (fd_write_file_atomic(x->dirfd, "qemu", "no program", 10, 0644) != 0 ||
        fd_write_file_atomic(x->dirfd, "kernel", "no kernel", 9, 0644) != 0)
        return -1;
    x->kernel_fd = openat(x->dirfd, "kernel", O_RDONLY | O_CLOEXEC);
    x->spec = (struct vm_spec){.accel = VM_ACCEL_TCG, .qemu_path = x->qemu, .vcpus = 1, .memory_mib = 128,
                               .tsc_khz = 2000000, .kernel_fd = x->kernel_fd, .initrd_fd = x->kernel_fd, .root_fd = -1,
                               .disk_fd = -1, .run_dirfd = -1};
    *state = x;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    fd_close(&x->dirfd);
    fd_close(&x->kernel_fd);
    const int failed = fd_remove_tree(AT_FDCWD, x->path, NULL);
    free(x);
    return failed;
}

static struct probe_verdict probe(struct fixture *x, const char *kernel)
{
    struct err err = {0};
    memset(&x->v, 0xff, sizeof x->v);
    x->v.kvm_usable = x->v.from_cache = true;
    if (probe_kvm(x->dirfd, x->dirfd, &x->spec, kernel, 20000, &x->cancelled, &x->v, &err) != 0)
        fail_msg("%s %s", err.detail, err.internal);
    if (!x->v.from_cache)
        assert_string_equal(x->v.reason, "the virtual machine ended before its agent answered");
    return x->v;
}

// The file as it is now, new.
static json_t *kept(struct fixture *x)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    assert_int_equal(fd_read_file(x->dirfd, "accel.json", &b), 0);
    json_t *o = json_parse_strict(buf_text(&b), b.len, NULL);
    assert_non_null(o);
    return o;
}

static void keep_stolen(struct fixture *x, json_t *o)
{
    CLEANUP_FREE char *text = json_dumps(o, 0);
    assert_int_equal(fd_write_file_atomic(x->dirfd, "accel.json", text, strlen(text), 0600), 0);
    json_decref(o);
}

// A verdict that no probe here could have given.
static void keep_a_yes(struct fixture *x)
{
    json_t *o = kept(x);
    json_put(o, "kvm_usable", json_true());
    json_put_str(o, "reason", "from the file");
    json_put_int(o, "probed_at_ms", 12345);
    keep_stolen(x, o);
}

static void a_probe_is_kept(void **state)
{
    struct fixture *x = *state;
    struct probe_verdict v = probe(x, KERNEL);
    assert_false(v.from_cache);
    assert_false(v.kvm_usable);
    assert_true(v.reason[0] != 0);
    assert_true(v.probed_at_ms > 1600000000000);
    const struct probe_verdict first = v;
    struct stat st;
    assert_int_equal(fstatat(x->dirfd, "accel.json", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(fstatat(x->dirfd, "probe", &st, 0), -1); // its run directory is gone
    v = probe(x, KERNEL);
    assert_true(v.from_cache);
    assert_false(v.kvm_usable);
    assert_string_equal(v.reason, first.reason);
    assert_int_equal(v.probed_at_ms, first.probed_at_ms);
}

static void the_file_is_believed(void **state)
{
    struct fixture *x = *state;
    (void)probe(x, KERNEL);
    keep_a_yes(x);
    const struct probe_verdict v = probe(x, KERNEL);
    assert_true(v.from_cache);
    assert_true(v.kvm_usable);
    assert_string_equal(v.reason, "from the file");
    assert_int_equal(v.probed_at_ms, 12345);
}

static void another_kernel_is_probed_again(void **state)
{
    struct fixture *x = *state;
    (void)probe(x, KERNEL);
    keep_a_yes(x);
    struct probe_verdict v = probe(x, "sha256:another");
    assert_false(v.from_cache);
    assert_false(v.kvm_usable);
    CLEANUP_JSON json_t *o = kept(x);
    assert_string_equal(json_get_str(o, "kernel"), "sha256:another");
    assert_true(probe(x, "sha256:another").from_cache);
    assert_false(probe(x, KERNEL).from_cache); // one verdict is kept
}

static void another_qemu_is_probed_again(void **state)
{
    struct fixture *x = *state;
    (void)probe(x, KERNEL);
    keep_a_yes(x);
    assert_int_equal(fd_write_file_atomic(x->dirfd, "qemu", "an upgrade", 10, 0644), 0); // of the same size
    assert_false(probe(x, KERNEL).from_cache);
    assert_true(probe(x, KERNEL).from_cache);
}

static void another_boot_is_probed_again(void **state)
{
    struct fixture *x = *state;
    (void)probe(x, KERNEL);
    keep_a_yes(x);
    json_t *o = kept(x);
    assert_int_equal(strlen(json_get_str(o, "boot_id")), 36);
    json_put_str(o, "boot_id", "00000000-0000-0000-0000-000000000000");
    keep_stolen(x, o);
    assert_false(probe(x, KERNEL).from_cache);
}

static void what_cannot_be_read_is_as_good_as_nothing(void **state)
{
    static const char *const FIELDS[] = {"boot_id", "qemu", "kernel", "reason"};
    struct fixture *x = *state;
    (void)probe(x, KERNEL);
    for (size_t i = 0; i < sizeof FIELDS / sizeof *FIELDS; i++) {
        keep_a_yes(x);
        json_t *o = kept(x);
        json_put_int(o, FIELDS[i], 1); // of the wrong type
        keep_stolen(x, o);
        assert_false(probe(x, KERNEL).from_cache);
    }
    static const char *const TEXTS[] = {"", "{", "[]", "null", "{}"};
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++) {
        assert_int_equal(fd_write_file_atomic(x->dirfd, "accel.json", TEXTS[i], strlen(TEXTS[i]), 0600), 0);
        assert_false(probe(x, KERNEL).from_cache);
    }
    keep_a_yes(x);
    json_t *o = kept(x);
    json_put_str(o, "kvm_usable", "true"); // no yes, whatever it is
    keep_stolen(x, o);
    const struct probe_verdict v = probe(x, KERNEL);
    assert_true(v.from_cache);
    assert_false(v.kvm_usable);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_probe_is_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(the_file_is_believed, setup, teardown),
        cmocka_unit_test_setup_teardown(another_kernel_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(another_qemu_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(another_boot_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(what_cannot_be_read_is_as_good_as_nothing, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
