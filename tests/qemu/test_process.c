// Processes by pid and start time, and what is read of one.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fd.h"
#include "base/id.h"
#include "base/json.h"
#include "qemu/process.h"

extern char **environ;

static char ID[ID_MAX]; // nobody else's on this host, as a name ends all that have it

// A process with these words on its command line, which ends with its standard input. Its pid; *ret_fd keeps it.
static pid_t start(const char *option, const char *id, int *ret_fd)
{
    const char *const argv[] = {"sh", "-c", "echo; read nothing", option, id, NULL};
    int ends[2], said[2];
    char c;
    pid_t pid;
    posix_spawn_file_actions_t actions;
    assert_int_equal(pipe2(ends, O_CLOEXEC) | pipe2(said, O_CLOEXEC), 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
    posix_spawn_file_actions_adddup2(&actions, said[1], 1);
    assert_int_equal(posix_spawn(&pid, "/bin/sh", &actions, NULL, (char *const *)argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[0]);
    close(said[1]);
    assert_int_equal(fd_read_full(said[0], &c, 1), 0); // from here on its command line is its own
    close(said[0]);
    *ret_fd = ends[1];
    return pid;
}

// How it ended: its status, or 1000 + signal.
static int reap(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void start_time_is_field_22(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    const uint64_t start_time = process_start_time(getpid());
    assert_true(start_time > 0);
    assert_int_equal(fd_read_file(AT_FDCWD, "/proc/self/stat", &b), 0);
    char *save = strrchr((char *)b.data, ')') + 2, *field = NULL;
    for (int i = 3; i <= 22; i++)
        field = strsep(&save, " ");
    assert_int_equal(strtoull(field, NULL, 10), start_time);
    assert_int_equal(process_start_time(0), 0);
    assert_int_equal(process_start_time(-1), 0);
}

// A process names itself as it likes.
static void a_name_cannot_forge_it(void **state)
{
    char old[16];
    const uint64_t start_time = process_start_time(getpid());
    assert_int_equal(prctl(PR_GET_NAME, old), 0);
    assert_int_equal(prctl(PR_SET_NAME, ") S 1 2 3 4 5 6"), 0);
    assert_int_equal(process_start_time(getpid()), start_time);
    assert_int_equal(prctl(PR_SET_NAME, "a b) (c d"), 0);
    assert_int_equal(process_start_time(getpid()), start_time);
    assert_int_equal(prctl(PR_SET_NAME, old), 0);
}

static void opened_by_all_its_facts(void **state)
{
    struct process p;
    int keep;
    const pid_t pid = start("-name", ID, &keep);
    const uint64_t start_time = process_start_time(pid);
    assert_int_equal(process_open(-1, 0, pid, start_time, ID, &p), 0);
    assert_int_equal(p.outer_pidfd, -1);
    assert_true(p.pidfd >= 0 && p.pid == pid && p.start == start_time && !p.ours);
    process_close(&p);
    assert_int_equal(p.pidfd, -1);
    assert_int_equal(process_open(pid, start_time, pid, start_time, ID, &p), 0);
    assert_true(p.outer_pidfd >= 0);
    process_close(&p);
    // One fact wrong each.
    const int before = fd_count_open();
    assert_int_equal(process_open(pid, start_time, pid, start_time + 1, ID, &p), 1);
    assert_int_equal(process_open(pid, start_time, getppid(), start_time, ID, &p), 1);
    char other[ID_MAX];
    assert_int_equal(process_open(pid, start_time, pid, start_time, id_new(ID_SANDBOX, other), &p), 1);
    memcpy(other, ID, sizeof other);
    other[ID_LEN - 1] = 0; // a part of it
    assert_int_equal(process_open(pid, start_time, pid, start_time, other, &p), 1);
    assert_int_equal(process_open(pid, start_time, -1, 0, ID, &p), 1);
    assert_int_equal(fd_count_open(), before);
    close(keep);
    assert_int_equal(reap(pid), 1);
    assert_int_equal(process_open(-1, 0, pid, start_time, ID, &p), 1);
}

static void the_id_must_be_the_name(void **state)
{
    struct process p;
    int keep;
    const pid_t pid = start("-notname", ID, &keep); // mentioned, but not as the name
    assert_int_equal(process_open(-1, 0, pid, process_start_time(pid), ID, &p), 1);
    assert_int_equal(process_end_named(ID, 1000), 0);
    assert_int_equal(kill(pid, 0), 0);
    close(keep);
    reap(pid);
}

static void an_end_kills_and_waits(void **state)
{
    struct process p;
    int keep;
    const pid_t pid = start("-name", ID, &keep);
    assert_int_equal(process_open(-1, 0, pid, process_start_time(pid), ID, &p), 0);
    assert_int_equal(process_exit_status(&p), -1); // no child of the server that adopted it
    assert_int_equal(process_end(&p, 20000), 0);
    assert_int_equal(process_end(&p, 20000), 0); // and again
    process_close(&p);
    assert_int_equal(reap(pid), 1000 + SIGKILL);
    close(keep);
}

static void our_own_child_is_reaped(void **state)
{
    int keep;
    struct process p;
    const pid_t pid = start("-name", ID, &keep);
    assert_int_equal(process_open(pid, process_start_time(pid), pid, process_start_time(pid), ID, &p), 0);
    p.ours = true;
    assert_int_equal(process_exit_status(&p), -1); // it runs
    close(keep);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
    assert_int_equal(process_exit_status(&p), 1);
    assert_false(p.ours);
    assert_int_equal(process_exit_status(&p), -1); // said once
    assert_int_equal(waitpid(pid, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
    process_close(&p);
}

static void all_of_a_name_are_ended(void **state)
{
    int keep[3];
    char longer[ID_MAX + 1];
    snprintf(longer, sizeof longer, "%sx", ID);
    const pid_t a = start("-name", ID, &keep[0]), b = start("-name", ID, &keep[1]),
                other = start("-name", longer, &keep[2]);
    assert_int_equal(process_end_named(ID, 20000), 0);
    assert_int_equal(reap(a), 1000 + SIGKILL);
    assert_int_equal(reap(b), 1000 + SIGKILL);
    assert_int_equal(kill(other, 0), 0);
    for (int i = 0; i < 3; i++)
        close(keep[i]);
    assert_int_equal(reap(other), 1);
}

// With too few descriptors a look fails; that is no end of the process.
static void a_look_that_fails_is_no_end(void **state)
{
    struct process p;
    struct rlimit all, few;
    int keep, found = -1, spare = 0;
    const pid_t pid = start("-name", ID, &keep);
    const uint64_t start_time = process_start_time(pid);
    const int before = fd_count_open(), lowest = fcntl(0, F_DUPFD_CLOEXEC, 3);
    close(lowest);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &all), 0);
    few = all;
    for (; spare < 6 && found != 0; spare++) {
        few.rlim_cur = (rlim_t)(lowest + spare);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
        found = process_open(pid, start_time, pid, start_time, ID, &p);
        const int why = errno;
        const int ended_now = found != 0 && spare < 2 ? process_end_named(ID, 1000) : -1; // none left for its directory and a look
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &all), 0);
        assert_int_equal(ended_now, -1);
        assert_true(found == 0 || (found == -1 && why == EMFILE && p.pidfd == -1 && p.outer_pidfd == -1));
    }
    assert_int_equal(found, 0);
    assert_true(spare > 2);
    process_close(&p);
    assert_int_equal(fd_count_open(), before);
    assert_int_equal(kill(pid, 0), 0);
    close(keep);
    reap(pid);
}

static void isolation_is_read_back(void **state)
{
    const struct process self = {.pid = getpid()}, none = {.pid = 0x7fffffff};
    CLEANUP_JSON json_t *o = process_isolation(&self), *n = process_isolation(&none);
    char uid[16];
    snprintf(uid, sizeof uid, "%d", (int)getuid());
    assert_string_equal(json_get_str(o, "uid"), uid);
    assert_non_null(json_get_str(o, "seccomp"));
    assert_non_null(json_get_str(o, "no_new_privs"));
    assert_int_equal(strlen(json_get_str(o, "capabilities")), 16);
    assert_int_equal(json_array_size(json_object_get(o, "namespaces")), 0); // the server's own are none of its own
    assert_non_null(json_get_str(json_object_get(o, "rlimits"), "nofile"));
    // Nothing is claimed of a process that is not there.
    assert_null(json_get_str(n, "uid"));
    assert_null(json_get_str(n, "seccomp"));
    assert_int_equal(json_array_size(json_object_get(n, "namespaces")), 0);
    assert_int_equal(json_object_size(json_object_get(n, "rlimits")), 0);
}

static void usage_is_read(void **state)
{
    const struct process self = {.pid = getpid()}, none = {.pid = -1};
    uint64_t cpu, rss;
    process_usage(&self, &cpu, &rss);
    assert_true(rss > 100000);
    process_usage(&none, &cpu, &rss);
    assert_int_equal(cpu, 0);
    assert_int_equal(rss, 0);
}

int main(void)
{
    id_new(ID_SANDBOX, ID);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(start_time_is_field_22),
        cmocka_unit_test(a_name_cannot_forge_it),
        cmocka_unit_test(opened_by_all_its_facts),
        cmocka_unit_test(the_id_must_be_the_name),
        cmocka_unit_test(an_end_kills_and_waits),
        cmocka_unit_test(our_own_child_is_reaped),
        cmocka_unit_test(all_of_a_name_are_ended),
        cmocka_unit_test(a_look_that_fails_is_no_end),
        cmocka_unit_test(isolation_is_read_back),
        cmocka_unit_test(usage_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
