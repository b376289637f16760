// Names from a guest's own passwd and group files, whatever stands in them.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "guest/user.c"

struct files {
    char path[64], passwd[96], group[96];
    int fd;
};

static int setup(void **state)
{
    struct files *f = calloc(1, sizeof *f);
    strcpy(f->path, "/tmp/airlock-user.XXXXXX");
    if (!mkdtemp(f->path))
        return -1;
    f->fd = open(f->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(f->passwd, sizeof f->passwd, "%s/passwd", f->path);
    snprintf(f->group, sizeof f->group, "%s/group", f->path);
    passwd = (struct cached){.path = f->passwd};
    group = (struct cached){.path = f->group};
    *state = f;
    return f->fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct files *f = *state;
    free(passwd.text);
    free(group.text);
    fd_close(&f->fd);
    const int failed = fd_remove_tree(AT_FDCWD, f->path, NULL);
    free(f);
    return failed;
}

static void passwd_is(struct files *f, const char *text)
{
    assert_int_equal(fd_write_file_atomic(f->fd, "passwd", text, strlen(text), 0644), 0);
}

static void group_is(struct files *f, const char *text)
{
    assert_int_equal(fd_write_file_atomic(f->fd, "group", text, strlen(text), 0644), 0);
}

static int find(const char *name, struct user *ret)
{
    return user_find(name, strlen(name), ret);
}

#define USUAL                                                                                                          \
    "root:x:0:0:root:/root:/bin/bash\n"                                                                                \
    "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"                                                                \
    "user:x:1000:1001:A User,,,:/home/user:/bin/sh\n"

static void users_are_found(void **state)
{
    struct user u;
    passwd_is(*state, USUAL);
    assert_int_equal(find("user", &u), 0);
    assert_string_equal(u.name, "user");
    assert_int_equal(u.uid, 1000);
    assert_int_equal(u.gid, 1001);
    assert_string_equal(u.home, "/home/user");
    assert_string_equal(u.shell, "/bin/sh");
    assert_int_equal(u.n_groups, 1); // no group file: the first one alone
    assert_int_equal(u.groups[0], 1001);
    assert_int_equal(find("root", &u), 0);
    assert_int_equal(u.uid, 0);
    assert_string_equal(u.home, "/root");
}

static void only_whole_names_match(void **state)
{
    static const char *const NONE[] = {"use", "users", "User", "x", "1000", "ser", "A User,,,", "", " user", "user ", "user:x",
                                       "user:", ":", "\n", "root\nuser"};
    struct user u;
    passwd_is(*state, USUAL);
    for (size_t i = 0; i < sizeof NONE / sizeof *NONE; i++)
        if (find(NONE[i], &u) == 0)
            fail_msg("%s is found", NONE[i]);
    char longest[80];
    memset(longest, 'n', sizeof longest);
    assert_int_equal(user_find(longest, 64, &u), -1);
    assert_int_equal(user_find("user:x:1000", 4, &u), 0); // by length
    assert_int_equal(user_find("userx", 4, &u), 0);
}

static void broken_lines_are_passed_over(void **state)
{
    struct user u;
    passwd_is(*state, "\n"
                      "user\n"
                      "user:\n"
                      "user:x:7\n"
                      "user:x:7:7:no home\n"
                      "user:x:7:7:no shell:/home\n"
                      "user:x:1000000000000000000000:7:a number too long:/home:/bin/sh\n"
                      "# user:x:8:8:::\n"
                      "user:x:1000:1000::/home/user:/bin/sh:and more\n");
    assert_int_equal(find("user", &u), 0);
    assert_int_equal(u.uid, 1000);
    assert_string_equal(u.shell, "/bin/sh");
}

static void the_first_of_two_counts_and_the_last_line_needs_no_end(void **state)
{
    struct user u;
    passwd_is(*state, "twice:x:1:1::/one:/bin/sh\ntwice:x:2:2::/two:/bin/sh\nlast:x:3:3::/three:");
    assert_int_equal(find("twice", &u), 0);
    assert_int_equal(u.uid, 1);
    assert_int_equal(find("last", &u), 0);
    assert_int_equal(u.uid, 3);
    assert_string_equal(u.shell, "");
}

static void texts_that_do_not_fit_are_refused(void **state)
{
    char text[1000], long_[400];
    struct user u;
    memset(long_, 'h', sizeof long_ - 1);
    long_[sizeof long_ - 1] = 0;
    snprintf(text, sizeof text, "user:x:1:1::/%s:/bin/sh\n", long_);
    passwd_is(*state, text);
    assert_int_equal(find("user", &u), -1);
    snprintf(text, sizeof text, "user:x:1:1::/%.254s:/bin/sh\n", long_); // 255: the most
    passwd_is(*state, text);
    assert_int_equal(find("user", &u), 0);
    assert_int_equal(strlen(u.home), 255);
}

static void without_a_passwd_there_is_root(void **state)
{
    struct files *f = *state;
    struct user u;
    assert_int_equal(find("root", &u), 0);
    assert_int_equal(u.uid, 0);
    assert_int_equal(u.gid, 0);
    assert_string_equal(u.home, "/");
    assert_string_equal(u.shell, "/bin/sh");
    assert_int_equal(find("user", &u), -1);
    assert_int_equal(mkdirat(f->fd, "passwd", 0755), 0); // nor with a directory in its place
    assert_int_equal(find("root", &u), 0);
    assert_int_equal(find("user", &u), -1);
}

static void a_huge_passwd_is_not_read(void **state)
{
    struct files *f = *state;
    struct user u;
    CLEANUP_FD int fd = openat(f->fd, "passwd", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    assert_int_equal(fd_write_full(fd, USUAL, strlen(USUAL)), 0);
    assert_int_equal(ftruncate(fd, 2 << 20), 0);
    assert_int_equal(find("user", &u), -1);
}

// ---- groups -----------------------------------------------------------------------------------------------------------
static void groups_by_membership(void **state)
{
    struct user u;
    passwd_is(*state, USUAL);
    group_is(*state, "root:x:0:\n"
                     "none:x:20:user2,auser,use\n"
                     "first:x:21:user\n"
                     "middle:x:22:root,user,daemon\n"
                     "last:x:23:root,user\n"
                     "own:x:1001:user\n"
                     "broken\n"
                     "broken:x:24\n");
    assert_int_equal(find("user", &u), 0);
    assert_int_equal(u.n_groups, 4);
    assert_int_equal(u.groups[0], 1001); // the own one first, and once
    assert_int_equal(u.groups[1], 21);
    assert_int_equal(u.groups[2], 22);
    assert_int_equal(u.groups[3], 23);
    assert_int_equal(find("daemon", &u), 0);
    assert_int_equal(u.n_groups, 2);
    assert_int_equal(u.groups[1], 22);
}

static void more_groups_than_are_kept(void **state)
{
    struct user u;
    CLEANUP_BUF struct buf b = BUF_INIT(10000);
    passwd_is(*state, USUAL);
    for (int i = 0; i < 2 * USER_GROUPS_MAX; i++)
        buf_addf(&b, "g%d:x:%d:user\n", i, 100 + i);
    group_is(*state, buf_text(&b));
    assert_int_equal(find("user", &u), 0);
    assert_int_equal(u.n_groups, USER_GROUPS_MAX);
    assert_int_equal(u.groups[USER_GROUPS_MAX - 1], 100 + USER_GROUPS_MAX - 2);
}

// ---- names of numbers -------------------------------------------------------------------------------------------------
static void names_of_numbers(void **state)
{
    char name[64], small[4];
    passwd_is(*state, USUAL "nouid:x::5::/:/bin/sh\nhuge:x:4294967294:5::/:/bin/sh\n");
    group_is(*state, "wheel:x:10:root\nuser:x:1001:\n");
    user_name_of(1000, name, sizeof name);
    assert_string_equal(name, "user");
    user_name_of(0, name, sizeof name);
    assert_string_equal(name, "root"); // not of the line without a number
    user_name_of(4294967294u, name, sizeof name);
    assert_string_equal(name, "huge");
    user_name_of(4711, name, sizeof name);
    assert_string_equal(name, "");
    group_name_of(1001, name, sizeof name);
    assert_string_equal(name, "user");
    group_name_of(1000, name, sizeof name);
    assert_string_equal(name, "");
    user_name_of(1000, small, sizeof small); // does not fit: not cut
    assert_string_equal(small, "");
}

static void changed_files_are_read_again(void **state)
{
    struct user u;
    passwd_is(*state, USUAL);
    assert_int_equal(find("new", &u), -1);
    passwd_is(*state, USUAL "new:x:5:5::/:/bin/sh\n");
    assert_int_equal(find("new", &u), 0);
    passwd_is(*state, "new:x:6:6::/:/bin/sh\n");
    assert_int_equal(find("new", &u), 0);
    assert_int_equal(u.uid, 6);
    assert_int_equal(find("user", &u), -1);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(users_are_found),
        TEST(only_whole_names_match),
        TEST(broken_lines_are_passed_over),
        TEST(the_first_of_two_counts_and_the_last_line_needs_no_end),
        TEST(texts_that_do_not_fit_are_refused),
        TEST(without_a_passwd_there_is_root),
        TEST(a_huge_passwd_is_not_read),
        TEST(groups_by_membership),
        TEST(more_groups_than_are_kept),
        TEST(names_of_numbers),
        TEST(changed_files_are_read_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
