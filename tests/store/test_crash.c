// kill -9 in the middle of everything: what was acknowledged is there, and the chain holds.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"
#include "store/verify.h"

enum { WRITERS = 4, ROUNDS = 5 };

struct ack {
    char receipt_id[ID_MAX];
    bool settled;
};

static struct {
    struct store *s;
    int fd;
} child;

static int admit_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct admission *a = arg;
    struct job_row job = {.kind = "x.y", .state = JOB_RUNNING, .created_at_ms = 1, .updated_at_ms = 1};
    strcpy(job.id, a->job_id);
    strcpy(job.tenant, a->tenant);
    return evidence_admit(tx, a, NULL, err) == 0 && job_insert(tx, &job, err) == 0 ? 0 : -1;
}

static int settle_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct admission *a = arg;
    const struct settlement s = {.outcome = "succeeded", .status = 200};
    struct job_row job = {.kind = "x.y", .state = JOB_SUCCEEDED, .finished_at_ms = 2, .updated_at_ms = 2};
    strcpy(job.id, a->job_id);
    strcpy(job.tenant, a->tenant);
    return job_update(tx, &job, err) == 0 ? evidence_settle(tx, a, &s, err) : -1;
}

static void acknowledge(const struct admission *a, bool settled)
{
    struct ack ack = {.settled = settled};
    strcpy(ack.receipt_id, a->receipt_id);
    if (write(child.fd, &ack, sizeof ack) != sizeof ack) // one write: never mixed
        _exit(1);
}

static void *work(void *arg)
{
    struct err err = {0};
    for (;;) {
        struct admission a = admission_of("t", "x.y");
        if (store_write(child.s, admit_fn, &a, &err) != 0)
            _exit(2);
        acknowledge(&a, false);
        if (store_write(child.s, settle_fn, &a, &err) != 0)
            _exit(3);
        acknowledge(&a, true);
    }
    return NULL;
}

static void run_child(const struct dir *d, int fd)
{
    pthread_t threads[WRITERS];
    child.s = open_store(d);
    child.fd = fd;
    for (int i = 0; i < WRITERS; i++)
        pthread_create(&threads[i], NULL, work, NULL);
    for (;;)
        pause();
}

static void check_ack(struct store *s, const struct ack *ack)
{
    struct err err = {0};
    struct receipt_row row;
    struct job_row job;
    if (receipt_get(s, "t", ack->receipt_id, &row, &err) != 0)
        fail_msg("receipt %s is lost", ack->receipt_id);
    assert_int_equal(job_get(s, "t", row.job_id, &job, &err), 0);
    if (ack->settled) {
        assert_int_equal(row.state, RECEIPT_FINAL);
        assert_int_equal(job.state, JOB_SUCCEEDED);
    }
    job_row_free(&job);
    receipt_row_free(&row);
}

static bool settle_lost(void *arg, const struct admission *a)
{
    settle(arg, a, "lost", 503);
    return true;
}

static void test_kill(void **state)
{
    struct dir *d = *state;
    static struct ack acks[20000];
    struct err err = {0};
    size_t n = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int fds[2];
        assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
        const pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0)
            run_child(d, fds[1]);
        close(fds[1]);
        for (int i = 0; i < 200 + 77 * round; i++)
            assert_int_equal(fd_read_full(fds[0], &acks[n++], sizeof acks[0]), 0);
        kill(pid, SIGKILL);
        while (n < 20000 && fd_read_full(fds[0], &acks[n], sizeof acks[0]) == 0)
            n++;
        close(fds[0]);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        struct verify_report r; // before anybody opened it again
        if (verify_state(d->path, NULL, NULL, 1, &r) != VERIFY_OK)
            fail_msg("verdict %d: %s", r.verdict, r.fault);
        struct store *s = open_store(d);
        for (size_t i = 0; i < n; i++)
            check_ack(s, &acks[i]);
        assert_int_equal(receipt_each_pending_all_tenants(s, settle_lost, s, &err), 0);
        store_close(s);
        assert_int_equal(verify_state(d->path, NULL, NULL, 1, &r), VERIFY_OK);
        assert_int_equal(r.pending_receipts, 0);
    }
    print_message("%zu acknowledgements, all kept\n", n);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_kill, dir_setup, dir_teardown)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
