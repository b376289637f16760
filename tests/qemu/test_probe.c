// The kept verdict on KVM: believed while host, QEMU and kernel are the same, asked for again otherwise; and the end of a
// probe that nobody waits for any more. QEMU is this program, which hangs in the jail as a guest would: a probe that takes
// place says no, at its deadline.
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "qemu/probe.h"

#define KERNEL "sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"

#define HANGS_MS 300

struct fixture {
    char path[64], qemu[96];
    int dirfd, kernel_fd;
    struct vm_spec spec;
    struct probe_verdict v;
    atomic_bool cancelled;
};

static int put_qemu(struct fixture *x, const void *program, size_t len)
{
    return fd_write_file_atomic(x->dirfd, "qemu", program, len, 0755);
}

// One that hangs; `more` bytes longer than the program is, so that it is another file.
static int put_hanging(struct fixture *x, size_t more)
{
    CLEANUP_BUF struct buf b = BUF_INIT(64u << 20);
    if (fd_read_file(AT_FDCWD, "/proc/self/exe", &b) != 0)
        return -1;
    for (size_t i = 0; i < more; i++)
        buf_add(&b, "", 1);
    return put_qemu(x, b.data, b.len);
}

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->path, "/tmp/airlock-probe.XXXXXX");
    if (!mkdtemp(x->path))
        return -1;
    x->dirfd = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(x->qemu, sizeof x->qemu, "%s/qemu", x->path);
    if (put_hanging(x, 0) != 0 || fd_write_file_atomic(x->dirfd, "kernel", "no kernel", 9, 0644) != 0)
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

static int probe_once(struct fixture *x, const char *kernel, int timeout_ms, struct err *err)
{
    memset(&x->v, 0xff, sizeof x->v);
    x->v.kvm_usable = x->v.from_cache = true;
    return probe_kvm(x->dirfd, x->dirfd, &x->spec, kernel, timeout_ms, &x->cancelled, &x->v, err);
}

static struct probe_verdict probe(struct fixture *x, const char *kernel)
{
    struct err err = {0};
    if (probe_once(x, kernel, HANGS_MS, &err) != 0)
        fail_msg("%s %s", err.detail, err.internal);
    return x->v;
}

static bool exists(struct fixture *x, const char *name)
{
    struct stat st;
    return fstatat(x->dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

// Processes that have this directory's probe in their command lines.
static int processes(struct fixture *x)
{
    struct stat st;
    char name[64];
    int n = 0;
    assert_int_equal(fstat(x->dirfd, &st), 0);
    snprintf(name, sizeof name, "probe-%llx-%llx", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
    DIR *d = opendir("/proc");
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d));) {
        char path[300];
        CLEANUP_BUF struct buf b = BUF_INIT(65536);
        snprintf(path, sizeof path, "/proc/%s/cmdline", e->d_name);
        if (isdigit((unsigned char)e->d_name[0]) && fd_read_file(AT_FDCWD, path, &b) == 0 && b.len > 0)
            n += memmem(b.data, b.len, name, strlen(name) + 1) != NULL;
    }
    closedir(d);
    return n;
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
    assert_false(exists(x, "probe")); // its run directory is gone
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
    assert_int_equal(put_hanging(x, 1), 0); // an upgrade
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

// A QEMU that cannot run, or was killed: asked again, however quickly it went.
static void an_early_end_is_not_kept(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(put_qemu(x, "no program", 10), 0);
    for (int i = 0; i < 3; i++) {
        const struct probe_verdict v = probe(x, KERNEL);
        assert_false(v.from_cache);
        assert_false(v.kvm_usable);
        assert_string_equal(v.reason, "the virtual machine ended before its agent answered");
        assert_false(exists(x, "accel.json"));
    }
}

struct prober {
    struct fixture *x;
    struct err err;
    int result;
    atomic_bool over;
};

static void *prober(void *arg)
{
    struct prober *p = arg;
    p->result = probe_once(p->x, KERNEL, 60000, &p->err);
    atomic_store(&p->over, true);
    return NULL;
}

static void begin(struct prober *p, pthread_t *thread, int n)
{
    const int64_t until = clock_mono_ms() + 20000;
    atomic_store(&p->x->cancelled, false);
    assert_int_equal(pthread_create(thread, NULL, prober, p), 0);
    while (!(exists(p->x, "probe") && (n == 0 || processes(p->x) >= n)) && clock_mono_ms() < until)
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

static void cancelled(struct prober *p)
{
    assert_int_equal(p->result, -1);
    assert_string_equal(p->err.code, "stopping");
    assert_false(exists(p->x, "accel.json"));
}

// At any moment of it; what is cut off before it has processes must not get any afterwards.
static void a_probe_is_cancelled(void **state)
{
    struct fixture *x = *state;
    struct err err = {0};
    for (int round = 0; round < 8; round++) {
        struct prober p = {.x = x};
        pthread_t thread;
        begin(&p, &thread, round % 3); // nothing yet, its jail, QEMU too
        atomic_store(&x->cancelled, true);
        assert_int_equal(probe_end(x->dirfd, false, &err), 0); // once: the rest is the probe's own
        assert_int_equal(pthread_join(thread, NULL), 0);
        cancelled(&p);
        assert_false(exists(x, "probe"));
        assert_int_equal(processes(x), 0);
    }
    struct prober late = {.x = x};
    (void)prober(&late); // it is cancelled still
    cancelled(&late);
    assert_false(exists(x, "probe"));
}

// Of a server that is gone: found by what it left, and not by another's.
static void what_was_left_is_ended(void **state)
{
    struct fixture *x = *state;
    struct err err = {0};
    struct prober p = {.x = x};
    pthread_t thread;
    begin(&p, &thread, 2);
    void *other = NULL;
    assert_int_equal(setup(&other), 0);
    assert_int_equal(mkdirat(((struct fixture *)other)->dirfd, "probe", 0700), 0);
    assert_int_equal(probe_end(((struct fixture *)other)->dirfd, true, &err), 0);
    assert_false(exists(other, "probe"));
    assert_int_equal(teardown(&other), 0);
    assert_true(processes(x) >= 2);
    assert_false(atomic_load(&p.over));
    assert_int_equal(probe_end(x->dirfd, true, &err), 0);
    assert_false(exists(x, "probe"));
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(p.result, 0);
    assert_false(x->v.kvm_usable);
    assert_false(exists(x, "accel.json")); // it ended early
    assert_int_equal(processes(x), 0);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "-name") == 0) // as QEMU
        for (;;)
            pause();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_probe_is_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(the_file_is_believed, setup, teardown),
        cmocka_unit_test_setup_teardown(another_kernel_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(another_qemu_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(another_boot_is_probed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(what_cannot_be_read_is_as_good_as_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(an_early_end_is_not_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(a_probe_is_cancelled, setup, teardown),
        cmocka_unit_test_setup_teardown(what_was_left_is_ended, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
