// Log lines: whole, on one line whatever the arguments hold, and few of what others can trigger.
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
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/log.h"

struct fixture {
    int real, file; // standard error as it was; what it is meanwhile
    struct buf text;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    char path[] = "/tmp/airlock-log.XXXXXX";
    x->file = mkostemp(path, O_CLOEXEC | O_APPEND);
    unlink(path);
    x->real = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    buf_init(&x->text, 1 << 20);
    log_set_level(LOG_INFO_);
    *state = x;
    return x->file >= 0 && x->real >= 0 && dup2(x->file, STDERR_FILENO) >= 0 ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    dup2(x->real, STDERR_FILENO);
    close(x->real);
    close(x->file);
    buf_free(&x->text);
    free(x);
    return 0;
}

// What was written since the test began; standard error is itself again, so that a failure is seen.
static const char *written(struct fixture *x)
{
    char path[40];
    dup2(x->real, STDERR_FILENO);
    snprintf(path, sizeof path, "/proc/self/fd/%d", x->file);
    buf_clear(&x->text);
    assert_int_equal(fd_read_file(AT_FDCWD, path, &x->text), 0);
    return buf_text(&x->text);
}

static size_t lines(const char *text)
{
    size_t n = 0;
    for (; (text = strchr(text, '\n')); text++)
        n++;
    return n;
}

static void a_line_has_time_level_and_message(void **state)
{
    struct fixture *x = *state;
    log_warn("seven %d", 7);
    const char *text = written(x);
    char time[CLOCK_TEXT_MAX], level[8];
    int64_t ms;
    assert_int_equal(sscanf(text, "%31s %7s", time, level), 2);
    assert_int_equal(clock_parse(time, &ms), 0);
    assert_string_equal(level, "warn");
    assert_string_equal(text + strlen(time), " warn seven 7\n");
}

static void levels(void **state)
{
    struct fixture *x = *state;
    assert_int_equal(log_level(), LOG_INFO_);
    log_debug("not this");
    log_info("one");
    log_set_level(LOG_WARN_);
    log_info("nor this");
    log_error("two");
    log_set_level(LOG_DEBUG_);
    log_debug("three");
    const char *text = written(x);
    assert_int_equal(lines(text), 3);
    assert_true(strstr(text, " info one\n") && strstr(text, " error two\n") && strstr(text, " debug three\n"));
}

// Nobody can forge a line.
static void arguments_stay_within_their_line(void **state)
{
    struct fixture *x = *state;
    log_warn("name %s", "a\nb\r\x1b[31m\x7f\t\x01 \xc3\xa4");
    const char *text = written(x);
    assert_int_equal(lines(text), 1);
    assert_non_null(strstr(text, " warn name a?b??[31m??? \xc3\xa4\n"));
}

static void long_lines_are_cut(void **state)
{
    struct fixture *x = *state;
    char longer[5000];
    memset(longer, 'l', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    log_warn("%s", longer);
    log_warn("next");
    const char *text = written(x);
    assert_int_equal(lines(text), 2);
    assert_true(strcspn(text, "\n") < 1024);
    assert_non_null(strstr(text, " warn next\n"));
}

static void what_others_can_trigger_is_limited(void **state)
{
    struct fixture *x = *state;
    struct log_limit one = {0}, other = {0};
    int passed = 0;
    for (int i = 0; i < 1000; i++)
        passed += log_limit_pass(&one, 5);
    assert_int_equal(passed, 5);
    assert_int_equal(one.suppressed, 995);
    assert_int_equal(log_limit_pass(&other, 5), 1); // each place by itself
    one.window_start_ms -= 11000;                   // a while later
    assert_int_equal(log_limit_pass(&one, 5), 1);
    assert_int_equal(one.suppressed, 0);
    const char *text = written(x);
    assert_int_equal(lines(text), 1);
    assert_non_null(strstr(text, " warn 995 lines like the next were suppressed\n"));
}

static void *shout(void *arg)
{
    for (int i = 0; i < 200; i++)
        log_warn("%s", (const char *)arg);
    return NULL;
}

static void lines_do_not_mix(void **state)
{
    struct fixture *x = *state;
    static char words[4][401];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        memset(words[i], 'a' + i, 400);
        assert_int_equal(pthread_create(&threads[i], NULL, shout, words[i]), 0);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    char *save = strdup(written(x)), *rest = save, *line;
    int n = 0;
    while ((line = strsep(&rest, "\n")) && *line) {
        const char *word = strstr(line, " warn ") + 6;
        assert_int_equal(strlen(word), 400);
        assert_string_equal(word, words[word[0] - 'a']);
        n++;
    }
    assert_int_equal(n, 800);
    free(save);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_line_has_time_level_and_message),
        TEST(levels),
        TEST(arguments_stay_within_their_line),
        TEST(long_lines_are_cut),
        TEST(what_others_can_trigger_is_limited),
        TEST(lines_do_not_mix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
