// The configuration: file < environment < flags, every fault named, nothing unknown taken.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <unistd.h>

#include "base/fd.h"
#include "server/config.h"

struct fixture {
    char file[64];
    struct config c;
    struct buf faults;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    strcpy(x->file, "/tmp/airlock-config.XXXXXX");
    const int fd = mkstemp(x->file);
    if (fd < 0)
        return -1;
    close(fd);
    buf_init(&x->faults, 1 << 16);
    *state = x;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    unlink(x->file);
    buf_free(&x->faults);
    free(x);
    return 0;
}

static void file_is(struct fixture *x, const char *text)
{
    FILE *f = fopen(x->file, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

// Words separated by blanks; %F stands for the file's name.
static int split(struct fixture *x, const char *text, char *out[32], char *space, size_t cap)
{
    int n = 0;
    size_t at = 0;
    for (const char *p = text; *p && at + 80 < cap; p++) {
        if (p[0] == '%' && p[1] == 'F') {
            at += (size_t)snprintf(space + at, cap - at, "%s", x->file);
            p++;
        } else {
            space[at++] = *p;
        }
    }
    space[at] = 0;
    for (char *save = space, *word; (word = strsep(&save, " "));)
        if (*word)
            out[n++] = word;
    out[n] = NULL;
    return n;
}

static int load(struct fixture *x, const char *flags, const char *env)
{
    char *argv[32], *envp[32], a[2048], b[2048];
    const int argc = split(x, flags, argv, a, sizeof a);
    (void)split(x, env, envp, b, sizeof b);
    buf_clear(&x->faults);
    memset(&x->c, 0xee, sizeof x->c);
    return config_load(argc, argv, envp, &x->c, &x->faults);
}

static void load_good(struct fixture *x, const char *flags, const char *env)
{
    if (load(x, flags, env) != 0)
        fail_msg("%s", buf_text(&x->faults));
    assert_int_equal(x->faults.len, 0);
}

// It must fail with these faults, a line each, in this order.
static void load_bad(struct fixture *x, const char *flags, const char *env, const char *faults)
{
    assert_int_equal(load(x, flags, env), -1);
    assert_string_equal(buf_text(&x->faults), faults);
}

// ---- where values come from -------------------------------------------------------------------------------------------
static void defaults(void **state)
{
    struct fixture *x = *state;
    load_good(x, "", "");
    assert_string_equal(x->c.listen, "127.0.0.1:7070");
    assert_string_equal(x->c.address, "127.0.0.1");
    assert_int_equal(x->c.port, 7070);
    assert_string_equal(x->c.state_dir, "var/state");
    assert_string_equal(x->c.image_dir, "var/images");
    assert_string_equal(x->c.accel, "auto");
    assert_string_equal(x->c.qemu, "");
    assert_string_equal(x->c.log_level, "info");
    assert_false(x->c.insecure_listen); // what is not safe is not on
    assert_false(x->c.allow_emulation);
    assert_int_equal(x->c.max_sandboxes_per_tenant, 200);
    assert_true(x->c.max_launches >= 1); // 0 means as many as CPUs
    assert_int_equal(x->c.retention_hours, 168);
    assert_int_equal(x->c.disk_reserve_mib, 256);
    assert_int_equal(x->c.boot_timeout_seconds, 120);
    assert_int_equal(x->c.jail_uid_base, 610000);
    assert_true(config_is_loopback(&x->c));
}

static void each_source_alone(void **state)
{
    struct fixture *x = *state;
    file_is(x, "state_dir = /from/file\nmax_launches=3\nallow_emulation = true\n");
    load_good(x, "--config %F", "");
    assert_string_equal(x->c.state_dir, "/from/file");
    assert_int_equal(x->c.max_launches, 3);
    assert_true(x->c.allow_emulation);
    load_good(x, "", "AIRLOCK_STATE_DIR=/from/env AIRLOCK_MAX_LAUNCHES=4 AIRLOCK_ALLOW_EMULATION=1 PATH=/bin HOME=/");
    assert_string_equal(x->c.state_dir, "/from/env");
    assert_int_equal(x->c.max_launches, 4);
    assert_true(x->c.allow_emulation);
    load_good(x, "--state-dir /from/flag --max-launches=5 --allow-emulation", "");
    assert_string_equal(x->c.state_dir, "/from/flag");
    assert_int_equal(x->c.max_launches, 5);
    assert_true(x->c.allow_emulation);
}

static void flags_over_environment_over_file(void **state)
{
    struct fixture *x = *state;
    file_is(x, "state_dir = /file\nimage_dir = /file\nqemu = /file\nallow_emulation = true\ninsecure_listen = true\n");
    load_good(x, "--state-dir=/flag --allow-emulation=false", "AIRLOCK_CONFIG=%F AIRLOCK_STATE_DIR=/env AIRLOCK_IMAGE_DIR=/env");
    assert_string_equal(x->c.state_dir, "/flag");
    assert_string_equal(x->c.image_dir, "/env");
    assert_string_equal(x->c.qemu, "/file");
    assert_false(x->c.allow_emulation); // also from true to false
    assert_true(x->c.insecure_listen);
    load_good(x, "--state-dir /first --state-dir /last", ""); // and the last of two
    assert_string_equal(x->c.state_dir, "/last");
}

static void which_file(void **state)
{
    struct fixture *x = *state;
    file_is(x, "max_launches = 9\n");
    load_good(x, "", "AIRLOCK_CONFIG=%F");
    assert_int_equal(x->c.max_launches, 9);
    load_good(x, "--config=%F", "AIRLOCK_CONFIG=/does/not/exist"); // the flag names another
    assert_int_equal(x->c.max_launches, 9);
    load_good(x, "--state-dir /s --config %F --qemu /q", ""); // among others
    assert_int_equal(x->c.max_launches, 9);
    assert_string_equal(x->c.state_dir, "/s");
    assert_string_equal(x->c.qemu, "/q");
    load_bad(x, "--config /does/not/exist", "", "/does/not/exist: No such file or directory\n");
}

static void the_file_s_form(void **state)
{
    struct fixture *x = *state;
    file_is(x, "# a comment\n\n   \t\n  # another = one\n\tstate_dir\t=\t/with/tabs  \r\nqemu =\nimage_dir=/a = b # c\nmax_launches = 2");
    load_good(x, "--config %F", "");
    assert_string_equal(x->c.state_dir, "/with/tabs");
    assert_string_equal(x->c.qemu, "");
    assert_string_equal(x->c.image_dir, "/a = b # c"); // all behind the first =
    assert_int_equal(x->c.max_launches, 2);            // the last line needs no end
    file_is(x, "");
    load_good(x, "--config %F", "");
}

// ---- faults -----------------------------------------------------------------------------------------------------------
static void what_is_unknown_is_named(void **state)
{
    struct fixture *x = *state;
    file_is(x, "state_dir = /ok\nstate-dir = /no\n\nStateDir = /no\njust words\n = 5\n");
    char want[500];
    snprintf(want, sizeof want,
             "%s:2: unknown key state-dir\n%s:4: unknown key StateDir\n%s:5: not `key = value`\n%s:6: unknown key \n", x->file,
             x->file, x->file, x->file);
    load_bad(x, "--config %F", "", want);
    load_bad(x, "", "AIRLOCK_STATEDIR=/x", "environment: unknown variable AIRLOCK_STATEDIR\n");
    load_bad(x, "--statedir /x", "", "unknown flag --statedir\nunexpected argument /x\n");
    load_bad(x, "--statedir=/x", "", "unknown flag --statedir=/x\n");
    load_bad(x, "serve", "", "unexpected argument serve\n");
    load_bad(x, "-v", "", "unexpected argument -v\n");
    load_bad(x, "--", "", "unknown flag --\n");
    load_good(x, "", "AIRLOCKX=1 NOT_AIRLOCK_STATE_DIR=/x");
}

static void bad_values_are_named(void **state)
{
    struct fixture *x = *state;
    load_bad(x, "--accel=xen", "", "flags: accel is one of auto|kvm|tcg, not xen\n");
    load_bad(x, "--accel=", "", "flags: accel is one of auto|kvm|tcg, not \n");
    load_bad(x, "--accel=KVM", "", "flags: accel is one of auto|kvm|tcg, not KVM\n");
    load_bad(x, "--accel=kv", "", "flags: accel is one of auto|kvm|tcg, not kv\n");
    load_bad(x, "--log-level=trace", "", "flags: log_level is one of debug|info|warn|error, not trace\n");
    load_bad(x, "", "AIRLOCK_ALLOW_EMULATION=yes", "environment: allow_emulation is true or false, not yes\n");
    load_bad(x, "--allow-emulation=", "", "flags: allow_emulation is true or false, not \n");
    static const char *const NUMBERS[] = {"", "x", "5x", "0x5", "5.0", "99999999999999999999", "-1", "0", "100001"};
    for (size_t i = 0; i < sizeof NUMBERS / sizeof *NUMBERS; i++) {
        char flag[80], want[200];
        snprintf(flag, sizeof flag, "--max-sandboxes-per-tenant=%s", NUMBERS[i]);
        snprintf(want, sizeof want, "flags: max_sandboxes_per_tenant is a whole number from 1 to 100000, not %s\n", NUMBERS[i]);
        load_bad(x, flag, "", want);
    }
    load_good(x, "--max-sandboxes-per-tenant=1", "");
    load_good(x, "--max-sandboxes-per-tenant=100000", "");
    assert_int_equal(x->c.max_sandboxes_per_tenant, 100000);
}

static void missing_values_are_named(void **state)
{
    struct fixture *x = *state;
    load_bad(x, "--state-dir", "", "--state-dir needs a value\n");
    load_bad(x, "--allow-emulation --max-launches", "", "--max-launches needs a value\n");
    load_bad(x, "--config", "", "--config needs a value\n");
    load_good(x, "--state-dir --max-launches", ""); // it has one, whatever it looks like
    assert_string_equal(x->c.state_dir, "--max-launches");
}

static void all_faults_are_listed(void **state)
{
    struct fixture *x = *state;
    char want[800];
    file_is(x, "nonsense = 1\naccel = xen\n");
    snprintf(want, sizeof want,
             "%s:1: unknown key nonsense\n%s:2: accel is one of auto|kvm|tcg, not xen\n"
             "environment: unknown variable AIRLOCK_OTHER\nunknown flag --what\n"
             "flags: max_launches is a whole number from 0 to 1000, not many\nlisten: ADDRESS:PORT is wanted, not nowhere\n",
             x->file, x->file);
    load_bad(x, "--config %F --what --max-launches many --listen nowhere", "AIRLOCK_OTHER=1", want);
}

static void texts_that_do_not_fit_are_refused(void **state)
{
    struct fixture *x = *state;
    char flag[1200] = "--state-dir=", want[100];
    const size_t n = strlen(flag);
    memset(flag + n, 'd', 1023);
    load_good(x, flag, "");
    assert_int_equal(strlen(x->c.state_dir), 1023);
    flag[n + 1023] = 'd';
    snprintf(want, sizeof want, "flags: state_dir is longer than 1023 characters\n");
    load_bad(x, flag, "", want);
}

static void help_is_only_asked_for(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(load(x, "--help", ""), 1);
    assert_int_equal(load(x, "-h", ""), 1);
    assert_int_equal(load(x, "--state-dir x --nonsense --help", ""), 1); // whatever else is wrong
    assert_int_equal(x->faults.len, 0);
    load_good(x, "--state-dir --help", "");
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    config_help(f);
    fclose(f);
    static const char *const FLAGS[] = {"--listen", "--insecure-listen", "--state-dir", "--image-dir", "--allow-emulation", "--accel",
                                        "--qemu", "--log-level", "--cgroup-parent", "--max-sandboxes-per-tenant",
                                        "--max-launches", "--retention-hours", "--disk-reserve-mib", "--boot-timeout-seconds",
                                        "--jail-uid-base", "--http-threads"};
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
        if (!strstr(text, FLAGS[i]))
            fail_msg("%s is not in the help", FLAGS[i]);
    free(text);
}

// ---- listen -----------------------------------------------------------------------------------------------------------
static void addresses_to_listen_on(void **state)
{
    static const struct {
        const char *listen, *address;
        unsigned port;
        bool loopback;
    } GOOD[] = {{"127.0.0.1:80", "127.0.0.1", 80, true}, {"127.9.8.7:0", "127.9.8.7", 0, true},
                {"localhost:7070", "127.0.0.1", 7070, true}, {"[::1]:65535", "::1", 65535, true},
                {"0.0.0.0:1", "0.0.0.0", 1, false}, {"[::]:1", "::", 1, false}, {"10.0.0.1:1", "10.0.0.1", 1, false},
                {"[fe80::1]:1", "fe80::1", 1, false}};
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        char flags[200];
        snprintf(flags, sizeof flags, "--listen %s --insecure-listen", GOOD[i].listen);
        load_good(x, flags, "");
        assert_string_equal(x->c.address, GOOD[i].address);
        assert_int_equal(x->c.port, GOOD[i].port);
        assert_true(config_is_loopback(&x->c) == GOOD[i].loopback);
        // Without a word of the operator's nothing but loopback.
        snprintf(flags, sizeof flags, "--listen %s", GOOD[i].listen);
        assert_int_equal(load(x, flags, ""), GOOD[i].loopback ? 0 : -1);
        assert_true(GOOD[i].loopback || strstr(buf_text(&x->faults), "--insecure-listen") != NULL);
    }
}

static void addresses_that_are_none(void **state)
{
    static const char *const BAD[] = {"127.0.0.1", ":7070", "7070", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70x", "127.0.0.1:65536",
                                      "127.0.0.1:-1", "127.0.0:80", "example.com:80", "[::1]", "[::1:80", "[]:80", "256.0.0.1:80",
                                      "*:80", "127.0.0.1:80:90", "http://127.0.0.1:80"};
    struct fixture *x = *state;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        char flags[200], want[200];
        snprintf(flags, sizeof flags, "--insecure-listen --listen=%s", BAD[i]);
        snprintf(want, sizeof want, "listen: ADDRESS:PORT is wanted, not %s\n", BAD[i]);
        load_bad(x, flags, "", want);
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(defaults),
        TEST(each_source_alone),
        TEST(flags_over_environment_over_file),
        TEST(which_file),
        TEST(the_file_s_form),
        TEST(what_is_unknown_is_named),
        TEST(bad_values_are_named),
        TEST(missing_values_are_named),
        TEST(all_faults_are_listed),
        TEST(texts_that_do_not_fit_are_refused),
        TEST(help_is_only_asked_for),
        TEST(addresses_to_listen_on),
        TEST(addresses_that_are_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
