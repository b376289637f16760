// Which environment names a request may set.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/json.h"
#include "sandbox/policy.h"

static void names_that_run_code_first_are_denied(void **state)
{
    static const char *const DENIED[] = {
        "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_", "DYLD_INSERT_LIBRARIES", "BASH_FUNC_ls%%", "BASH_ENV", "ENV",
        "SHELLOPTS", "BASHOPTS", "PS4", "PROMPT_COMMAND", "GLIBC_TUNABLES", "GCONV_PATH", "NODE_OPTIONS", "PYTHONSTARTUP",
        "PYTHONHOME", "PERL5OPT", "PERL5DB", "RUBYOPT", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "GIT_SSH_COMMAND",
        "PYTHONBREAKPOINT",
    };
    for (size_t i = 0; i < sizeof DENIED / sizeof *DENIED; i++)
        if (!policy_env_name_denied(DENIED[i]))
            fail_msg("%s is allowed", DENIED[i]);
}

static void others_are_not(void **state)
{
    static const char *const ALLOWED[] = {"PATH", "HOME", "LANG", "TERM", "USER", "PYTHONPATH", "PERL5LIB", "NODE_ENV", "LD",
                                          "LDFLAGS", "MY_LD_PRELOAD", "BASH", "BASH_VERSION", "ENVIRONMENT", "MYENV", "PS1",
                                          "env", "ld_preload", "bash_env", "A", "_", "GIT_DIR"};
    for (size_t i = 0; i < sizeof ALLOWED / sizeof *ALLOWED; i++)
        if (policy_env_name_denied(ALLOWED[i]))
            fail_msg("%s is denied", ALLOWED[i]);
}

static void an_environment_without_them_passes(void **state)
{
    struct err err = {0};
    CLEANUP_JSON json_t *env = json_pack("{s:s, s:s}", "PATH", "/usr/bin", "LANG", "C"), *none = json_object(),
                        *null = json_null();
    assert_int_equal(policy_env(env, &err), 0);
    assert_int_equal(policy_env(none, &err), 0);
    assert_int_equal(policy_env(null, &err), 0);
    assert_int_equal(policy_env(NULL, &err), 0);
    assert_int_equal(err.kind, ERR_NONE);
}

static void the_name_is_told_and_the_value_is_not(void **state)
{
    struct err err = {0};
    CLEANUP_JSON json_t *env = json_pack("{s:s, s:s, s:s}", "PATH", "/usr/bin", "LD_PRELOAD", "/work/secret.so", "LANG", "C");
    assert_int_equal(policy_env(env, &err), -1);
    assert_int_equal(err.kind, ERR_POLICY_DENIED);
    assert_string_equal(err.code, "env_denied");
    assert_non_null(strstr(err.detail, "LD_PRELOAD"));
    assert_null(strstr(err.detail, "secret"));
    assert_true(err.remedy[0] != 0);
}

static void whatever_the_value_is(void **state)
{
    struct err err = {0};
    CLEANUP_JSON json_t *empty = json_pack("{s:s}", "BASH_ENV", ""), *null = json_pack("{s:n}", "BASH_ENV");
    assert_int_equal(policy_env(empty, &err), -1);
    assert_int_equal(policy_env(null, &err), -1);
}

static void a_long_name_is_cut_in_the_telling(void **state)
{
    struct err err = {0};
    char name[1000];
    memset(name, 'X', sizeof name - 1);
    memcpy(name, "LD_", 3);
    name[sizeof name - 1] = 0;
    CLEANUP_JSON json_t *env = json_object();
    json_put_str(env, name, "v");
    assert_int_equal(policy_env(env, &err), -1);
    assert_non_null(strstr(err.detail, "before it runs")); // the sentence is whole
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_that_run_code_first_are_denied),
        cmocka_unit_test(others_are_not),
        cmocka_unit_test(an_environment_without_them_passes),
        cmocka_unit_test(the_name_is_told_and_the_value_is_not),
        cmocka_unit_test(whatever_the_value_is),
        cmocka_unit_test(a_long_name_is_cut_in_the_telling),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
