// What a guest path may look like, and what lies below a root.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/limits.h"
#include "base/path.h"

static void admissible_paths(void **state)
{
    static const char *const GOOD[] = {"/", "/work", "/work/a", "/a/b/c/d/e/f/g", "/.a", "/..a", "/a.", "/a..", "/...", "/a/.b/..c",
                                       "/with space", "/new\nline", "/tab\t", "/-rf", "/~", "/\\", "/*", "/\xc3\xa4/\xf0\x9f\x98\x80"};
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++)
        if (path_fault(GOOD[i], strlen(GOOD[i])))
            fail_msg("%s: %s", GOOD[i], path_fault(GOOD[i], strlen(GOOD[i])));
}

static void each_fault_has_its_sentence(void **state)
{
    static const struct {
        const char *path;
        size_t len;
        const char *part;
    } CASES[] = {
        {"", 0, "empty"},
        {"a", 1, "not absolute"}, {"work/a", 6, "not absolute"}, {"./a", 3, "not absolute"}, {" /a", 3, "not absolute"},
        {"~/a", 3, "not absolute"},
        {"\0", 1, "NUL"}, {"/a\0b", 4, "NUL"}, {"/work\0", 6, "NUL"}, {"a\0/b", 4, "NUL"},
        {"/.", 2, ". or .."}, {"/..", 3, ". or .."}, {"/a/.", 4, ". or .."}, {"/a/..", 5, ". or .."},
        {"/a/../b", 7, ". or .."}, {"/./a", 4, ". or .."}, {"/../a", 5, ". or .."},
        {"//", 2, "empty segment"}, {"//a", 3, "empty segment"}, {"/a//b", 5, "empty segment"}, {"/a/", 3, "empty segment"},
        {"/a//", 4, "empty segment"}, {"/work/", 6, "empty segment"},
        {"/\xff", 2, "UTF-8"}, {"/a\xc3", 3, "UTF-8"}, {"/\xc0\xae\xc0\xae/etc", 9, "UTF-8"}, // dots, overlong
        {"/\xc0\xaf", 3, "UTF-8"}, {"/\xed\xa0\x80", 4, "UTF-8"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        const char *fault = path_fault(CASES[i].path, CASES[i].len);
        if (!fault)
            fail_msg("case %zu is let through", i);
        if (!strstr(fault, CASES[i].part))
            fail_msg("case %zu: %s", i, fault);
    }
}

// Only the bytes that were given count, whatever lies behind them.
static void the_length_counts(void **state)
{
    assert_null(path_fault("/work/../etc", 5));
    assert_null(path_fault("/work/", 5));
    assert_null(path_fault("/..", 1));
    assert_non_null(path_fault("/..", 2));
    assert_null(path_fault("/work\xff", 5));
    char *exact = malloc(5); // nothing behind the end is read
    memcpy(exact, "/work", 5);
    assert_null(path_fault(exact, 5));
    memcpy(exact, "/a/..", 5);
    assert_non_null(path_fault(exact, 5));
    free(exact);
}

static void the_longest_path(void **state)
{
    char path[LIMIT_PATH_BYTES + 2];
    memset(path, 'p', sizeof path);
    path[0] = '/';
    assert_null(path_fault(path, LIMIT_PATH_BYTES));
    assert_non_null(strstr(path_fault(path, LIMIT_PATH_BYTES + 1), "longer"));
    for (size_t i = 0; i < LIMIT_PATH_BYTES; i += 2)
        path[i] = '/';
    assert_null(path_fault(path, LIMIT_PATH_BYTES)); // of 2,048 segments
}

// Against another reading: split by slashes, every segment but none looked at.
static void any_path_by_another_reading(void **state)
{
    static const char BYTES[] = "//..ab";
    unsigned seed = 2;
    for (int round = 0; round < 50000; round++) {
        char path[9];
        const size_t len = (size_t)rand_r(&seed) % 8 + 1;
        for (size_t i = 0; i < len; i++)
            path[i] = BYTES[(size_t)rand_r(&seed) % 6];
        path[len] = 0;
        bool good = path[0] == '/';
        if (good && len > 1) {
            char copy[9], *save = copy, *segment;
            strcpy(copy, path + 1);
            while ((segment = strsep(&save, "/")))
                good = good && *segment && strcmp(segment, ".") != 0 && strcmp(segment, "..") != 0;
        }
        if ((path_fault(path, len) == NULL) != good)
            fail_msg("%s", path);
    }
}

static void below_a_root(void **state)
{
    static const char *const ROOTS[] = {"/work", "/home/user"};
    static const char *const BELOW[] = {"/work", "/work/a", "/work/a/b", "/home/user", "/home/user/x"},
                             *const OUTSIDE[] = {"/", "/workshop", "/work2/a", "/wor", "/home", "/home/user2", "/home/other/x",
                                                 "/etc/work", "", "work", "/a/work"};
    for (size_t i = 0; i < sizeof BELOW / sizeof *BELOW; i++)
        assert_true(path_below(BELOW[i], ROOTS, 2));
    for (size_t i = 0; i < sizeof OUTSIDE / sizeof *OUTSIDE; i++)
        assert_false(path_below(OUTSIDE[i], ROOTS, 2));
    assert_false(path_below("/work", ROOTS, 0));
    assert_false(path_below("/home/user", ROOTS, 1)); // only as many as were given
}

static void the_write_roots(void **state)
{
    size_t n = 0;
    const char *const *roots = path_write_roots(&n);
    assert_int_equal(n, 3);
    assert_string_equal(roots[0], "/work");
    assert_string_equal(roots[1], "/tmp");
    assert_string_equal(roots[2], "/home");
    assert_true(path_below("/tmp/x", roots, n));
    assert_false(path_below("/etc/passwd", roots, n));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(admissible_paths),
        cmocka_unit_test(each_fault_has_its_sentence),
        cmocka_unit_test(the_length_counts),
        cmocka_unit_test(the_longest_path),
        cmocka_unit_test(any_path_by_another_reading),
        cmocka_unit_test(below_a_root),
        cmocka_unit_test(the_write_roots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
