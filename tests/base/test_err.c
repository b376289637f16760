// What travels with a failure: kinds and their words, where text goes and where it must not, and that it always fits.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>

#include "base/err.h"

static void set_fills_and_fails(void **state)
{
    struct err err;
    memset(&err, 0xee, sizeof err);
    assert_int_equal(err_set(&err, ERR_CONFLICT, "name_taken", "%s is taken %d times", "box", 2), -1);
    assert_int_equal(err.kind, ERR_CONFLICT);
    assert_string_equal(err.code, "name_taken");
    assert_string_equal(err.detail, "box is taken 2 times");
    assert_string_equal(err.remedy, "");
    assert_string_equal(err.internal, "");
    assert_int_equal(err.sys_errno, 0);
    assert_int_equal(err_set(&err, ERR_TIMEOUT, NULL, "late"), -1);
    assert_string_equal(err.code, "");
}

static void nobody_need_ask_for_the_reason(void **state)
{
    assert_int_equal(err_set(NULL, ERR_CONFLICT, "x", "%s", "y"), -1);
    assert_int_equal(err_sys(NULL, ENOENT, "%s", "y"), -1);
    assert_int_equal(err_wrap(NULL, "context"), -1);
    assert_int_equal(err_remedy(NULL, "%s", "y"), -1);
}

// A client sees detail and remedy: what a system call failed on is in neither.
static void system_errors_tell_the_log_alone(void **state)
{
    struct err err = {0};
    assert_int_equal(err_sys(&err, EACCES, "opening %s", "/var/lib/secret"), -1);
    assert_int_equal(err.kind, ERR_INTERNAL);
    assert_int_equal(err.sys_errno, EACCES);
    assert_string_equal(err.code, "system_error");
    assert_null(strstr(err.detail, "secret"));
    assert_string_equal(err.remedy, "");
    assert_string_equal(err.internal, "opening /var/lib/secret: Permission denied");
}

static void a_full_disk_is_unavailable(void **state)
{
    static const int FULL[] = {ENOSPC, EDQUOT};
    for (size_t i = 0; i < 2; i++) {
        struct err err = {0};
        assert_int_equal(err_sys(&err, FULL[i], "writing"), -1);
        assert_int_equal(err.kind, ERR_UNAVAILABLE);
        assert_string_equal(err.code, "disk_full");
        assert_int_equal(err.sys_errno, FULL[i]);
    }
}

static void wrapping_touches_the_internal_text_alone(void **state)
{
    struct err err = {0};
    err_sys(&err, ENOENT, "opening %s", "file");
    const struct err before = err;
    assert_int_equal(err_wrap(&err, "making a disk"), -1);
    assert_int_equal(err_wrap(&err, "create"), -1);
    assert_string_equal(err.internal, "create: making a disk: opening file: No such file or directory");
    assert_string_equal(err.detail, before.detail);
    assert_string_equal(err.code, before.code);
    assert_int_equal(err.kind, before.kind);
    assert_int_equal(err.sys_errno, ENOENT);
}

static void a_remedy_is_added(void **state)
{
    struct err err = {0};
    err_set(&err, ERR_POLICY_DENIED, "env_denied", "no");
    assert_int_equal(err_remedy(&err, "leave %s out", "it"), -1);
    assert_string_equal(err.remedy, "leave it out");
    assert_string_equal(err.detail, "no");
    err_set(&err, ERR_NOT_FOUND, NULL, "another"); // a new failure takes nothing over
    assert_string_equal(err.remedy, "");
}

static void long_texts_are_cut_and_whole_strings(void **state)
{
    struct err err = {0};
    char text[2000];
    memset(text, 'l', sizeof text - 1);
    text[sizeof text - 1] = 0;
    err_set(&err, ERR_INTERNAL, text, "%s", text);
    assert_int_equal(strlen(err.code), ERR_CODE_MAX - 1);
    assert_int_equal(strlen(err.detail), ERR_DETAIL_MAX - 1);
    err_remedy(&err, "%s", text);
    assert_int_equal(strlen(err.remedy), ERR_REMEDY_MAX - 1);
    err_sys(&err, ENOENT, "%s", text);
    assert_non_null(strstr(err.internal, ": No such file or directory")); // the reason is not what is cut
    for (int i = 0; i < 20; i++)
        err_wrap(&err, text);
    assert_true(strlen(err.internal) < sizeof err.internal);
}

// The words of the wire contract.
static void kinds_have_their_words(void **state)
{
    static const struct {
        enum err_kind kind;
        const char *word;
    } WORDS[] = {
        {ERR_NONE, "none"}, {ERR_POLICY_DENIED, "policy_denied"}, {ERR_ADMISSION_FAILED, "admission_failed"},
        {ERR_GUEST_COMMAND_FAILED, "guest_command_failed"}, {ERR_TIMEOUT, "timeout"},
        {ERR_TRANSPORT_FAILED, "transport_failed"}, {ERR_CLEANUP_FAILED, "cleanup_failed"},
        {ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch"}, {ERR_UNSUPPORTED_CAPABILITY, "unsupported_capability"},
        {ERR_VALIDATION, "validation"}, {ERR_UNAUTHORIZED, "unauthorized"}, {ERR_NOT_FOUND, "not_found"},
        {ERR_METHOD_NOT_ALLOWED, "method_not_allowed"}, {ERR_CONFLICT, "conflict"},
        {ERR_PRECONDITION_FAILED, "precondition_failed"}, {ERR_TOO_LARGE, "too_large"},
        {ERR_UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"}, {ERR_RANGE, "validation"},
        {ERR_RATE_LIMITED, "rate_limited"}, {ERR_UNAVAILABLE, "unavailable"}, {ERR_INTERNAL, "internal"},
    };
    assert_int_equal(sizeof WORDS / sizeof *WORDS, ERR_INTERNAL + 1); // all of them
    for (size_t i = 0; i < sizeof WORDS / sizeof *WORDS; i++) {
        assert_int_equal(WORDS[i].kind, i);
        assert_string_equal(err_kind_name(WORDS[i].kind), WORDS[i].word);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(set_fills_and_fails),
        cmocka_unit_test(nobody_need_ask_for_the_reason),
        cmocka_unit_test(system_errors_tell_the_log_alone),
        cmocka_unit_test(a_full_disk_is_unavailable),
        cmocka_unit_test(wrapping_touches_the_internal_text_alone),
        cmocka_unit_test(a_remedy_is_added),
        cmocka_unit_test(long_texts_are_cut_and_whole_strings),
        cmocka_unit_test(kinds_have_their_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
