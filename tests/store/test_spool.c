// Output on disk: byte for byte, in order of arrival, bounded, found again after a kill.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/limits.h"
#include "fixture.h"
#include "store/spool_int.h"

#define ID "cmd00000000000000000000000000"

static struct spool *open_spool(const struct dir *d)
{
    struct err err = {0};
    struct spool *sp = spool_open(d->fd, ID, &err);
    assert_non_null(sp);
    return sp;
}

static struct spool_piece piece(enum spool_stream stream, uint64_t offset, const char *text)
{
    return (struct spool_piece){stream, offset, text, strlen(text)};
}

static void put(struct spool *sp, enum spool_stream stream, uint64_t offset, const char *text)
{
    struct err err = {0};
    const struct spool_piece p = piece(stream, offset, text);
    assert_int_equal(spool_write(sp, &p, 1, &err), 0);
}

// "o:text" and "e:text" pieces in order of arrival, joined by '|', read `cap` bytes at a time; merged runs.
static void transcript(const struct dir *d, uint64_t from, uint64_t cap, char *out, size_t room)
{
    struct err err = {0};
    struct spool_reader *r = spool_reader_open(d->fd, ID, &err);
    assert_non_null(r);
    uint64_t position = from, ends[2] = {UINT64_MAX, UINT64_MAX};
    int last = -1;
    size_t at = 0;
    char bytes[64];
    out[0] = 0;
    for (;;) {
        enum spool_stream stream;
        uint64_t offset;
        const int64_t n = spool_next(r, &position, &stream, &offset, bytes, cap, &err);
        assert_true(n >= 0);
        if (n == 0)
            break;
        assert_true(ends[stream] == UINT64_MAX || ends[stream] == offset);
        ends[stream] = offset + (uint64_t)n;
        if ((int)stream != last)
            at += (size_t)snprintf(out + at, room - at, "%s%s:", last < 0 ? "" : "|", stream ? "e" : "o");
        last = (int)stream;
        at += (size_t)snprintf(out + at, room - at, "%.*s", (int)n, bytes);
    }
    spool_reader_close(r);
}

static void assert_transcript(const struct dir *d, const char *want)
{
    char text[1000];
    for (uint64_t cap = 1; cap <= 64; cap *= 4) {
        transcript(d, 0, cap, text, sizeof text);
        assert_string_equal(text, want);
    }
}

static void assert_digests(const struct dir *d, struct spool *sp)
{
    static const char *const NAMES[] = {ID ".stdout", ID ".stderr"};
    for (int i = 0; i < 2; i++) {
        uint8_t hash[SHA256_BYTES];
        char want[DIGEST_TEXT_MAX], got[DIGEST_TEXT_MAX];
        struct err err = {0};
        crypto_sha256("", 0, hash);
        CLEANUP_FD int fd = openat(d->fd, NAMES[i], O_RDONLY | O_CLOEXEC);
        if (fd >= 0)
            assert_int_equal(crypto_sha256_fd(fd, hash, NULL, &err), 0);
        spool_digest(sp, (enum spool_stream)i, got);
        assert_string_equal(got, crypto_digest_text(hash, want));
    }
}

static int count_files(const struct dir *d)
{
    int n = 0;
    static const char *const NAMES[] = {ID ".stdout", ID ".stderr", ID ".order"};
    for (int i = 0; i < 3; i++)
        n += faccessat(d->fd, NAMES[i], F_OK, 0) == 0;
    return n;
}

static void test_nothing(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct spool_state st;
    spool_state(sp, &st);
    assert_int_equal(st.position, 0);
    assert_digests(d, sp);
    struct err err = {0};
    assert_int_equal(spool_write(sp, NULL, 0, &err), 0);
    put(sp, SPOOL_STDOUT, 0, "");
    spool_close(sp);
    assert_transcript(d, "");
    struct spool_reader *r = spool_reader_open(d->fd, ID, &err);
    char c;
    assert_int_equal(spool_read(r, SPOOL_STDERR, 0, &c, 1, &err), 0);
    uint64_t position = 1, offset;
    enum spool_stream stream;
    assert_int_equal(spool_next(r, &position, &stream, &offset, &c, 1, &err), -1);
    assert_int_equal(err.kind, ERR_RANGE);
    spool_reader_close(r);
    spool_reader_close(NULL);
    spool_close(NULL);
}

static void test_no_file_before_the_first_byte(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    assert_int_equal(count_files(d), 0);
    put(sp, SPOOL_STDERR, 0, "x");
    assert_int_equal(count_files(d), 2);
    struct stat st;
    assert_int_equal(fstatat(d->fd, ID ".stderr", &st, 0), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    spool_close(sp);
}

static void test_order_of_arrival(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct err err = {0};
    const struct spool_piece pieces[] = {piece(SPOOL_STDOUT, 0, "one "), piece(SPOOL_STDERR, 0, "bad "),
                                         piece(SPOOL_STDERR, 4, "news "), piece(SPOOL_STDOUT, 4, "two")};
    assert_int_equal(spool_write(sp, pieces, 4, &err), 0);
    put(sp, SPOOL_STDOUT, 7, " three"); // continues the run
    put(sp, SPOOL_STDERR, 9, "!");
    assert_transcript(d, "o:one |e:bad news |o:two three|e:!");
    assert_digests(d, sp);
    char text[100];
    transcript(d, 6, 64, text, sizeof text); // from the middle of a piece
    assert_string_equal(text, "e:d news |o:two three|e:!");
    struct spool_state st;
    spool_state(sp, &st);
    assert_int_equal(st.position, 23);
    assert_int_equal(st.kept[0], 13);
    assert_int_equal(st.produced[1], 10);
    spool_close(sp);
}

static void test_reading_one_stream(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct err err = {0};
    char bytes[32] = "";
    put(sp, SPOOL_STDOUT, 0, "0123456789");
    struct spool_reader *r = spool_reader_open(d->fd, ID, &err);
    assert_int_equal(spool_read(r, SPOOL_STDOUT, 4, bytes, 3, &err), 3);
    assert_memory_equal(bytes, "456", 3);
    assert_int_equal(spool_read(r, SPOOL_STDOUT, 8, bytes, 32, &err), 2);
    assert_int_equal(spool_read(r, SPOOL_STDOUT, 10, bytes, 32, &err), 0);
    assert_int_equal(spool_read(r, SPOOL_STDOUT, 1000, bytes, 32, &err), 0);
    assert_int_equal(spool_read(r, SPOOL_STDERR, 0, bytes, 32, &err), 0);
    put(sp, SPOOL_STDERR, 0, "late"); // a file that came after the reader
    assert_int_equal(spool_read(r, SPOOL_STDERR, 0, bytes, 32, &err), 4);
    spool_reader_close(r);
    spool_close(sp);
}

static void test_following(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct err err = {0};
    struct spool_reader *r = spool_reader_open(d->fd, ID, &err);
    uint64_t position = 0, offset;
    enum spool_stream stream;
    char bytes[32];
    for (int i = 0; i < 40; i++) {
        assert_int_equal(spool_next(r, &position, &stream, &offset, bytes, 32, &err), 0);
        put(sp, (enum spool_stream)(i % 3 == 0), (uint64_t)(i % 3 == 0 ? i / 3 : i - i / 3 - 1) * 2, "ab");
        assert_int_equal(spool_next(r, &position, &stream, &offset, bytes, 32, &err), 2);
        assert_int_equal(stream, i % 3 == 0);
        assert_int_equal(position, 2 * i + 2);
    }
    position = 3; // back again
    assert_int_equal(spool_next(r, &position, &stream, &offset, bytes, 32, &err), 3);
    assert_int_equal(stream, SPOOL_STDOUT);
    assert_int_equal(offset, 1);
    spool_reader_close(r);
    spool_close(sp);
}

static void test_overlap_and_gap(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct err err = {0};
    put(sp, SPOOL_STDOUT, 0, "hello");
    put(sp, SPOOL_STDOUT, 0, "hello");     // all of it again
    put(sp, SPOOL_STDOUT, 3, "lo world");  // some of it
    const struct spool_piece gap[] = {piece(SPOOL_STDERR, 0, "kept?"), piece(SPOOL_STDOUT, 12, "x")};
    assert_int_equal(spool_write(sp, gap, 2, &err), -1);
    assert_err(err, ERR_INTERNAL, "spool_gap");
    assert_transcript(d, "o:hello world"); // nothing of the refused call
    assert_digests(d, sp);
    spool_close(sp);
}

static void test_reopening_continues(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    put(sp, SPOOL_STDOUT, 0, "a");
    put(sp, SPOOL_STDERR, 0, "b");
    spool_close(sp);
    sp = open_spool(d);
    struct spool_state st;
    spool_state(sp, &st);
    assert_int_equal(st.kept[0], 1);
    assert_int_equal(st.kept[1], 1);
    put(sp, SPOOL_STDERR, 1, "c");
    put(sp, SPOOL_STDOUT, 1, "d");
    assert_transcript(d, "o:a|e:bc|o:d");
    assert_digests(d, sp);
    spool_close(sp);
}

static void test_cap(void **state)
{
    struct dir *d = *state;
    struct spool *sp = open_spool(d);
    struct err err = {0};
    struct spool_state st;
    enum { MIB = 1 << 20 };
    CLEANUP_FREE char *mib = malloc(MIB);
    memset(mib, 'x', MIB);
    for (uint64_t i = 0; i < 63; i++) {
        const struct spool_piece p = {SPOOL_STDOUT, i * MIB, mib, MIB};
        assert_int_equal(spool_write(sp, &p, 1, &err), 0);
    }
    const struct spool_piece over[] = {{SPOOL_STDOUT, 63ull * MIB, mib, MIB - 10},
                                       {SPOOL_STDOUT, 64ull * MIB - 10, mib, 30},
                                       {SPOOL_STDERR, 0, "still", 5},
                                       {SPOOL_STDOUT, 64ull * MIB + 20, mib, 1000}};
    assert_int_equal(spool_write(sp, over, 4, &err), 0);
    spool_state(sp, &st);
    assert_int_equal(st.kept[0], LIMIT_SPOOL_STREAM_BYTES);
    assert_int_equal(st.produced[0], 64ull * MIB + 1020);
    assert_int_equal(st.kept[1], 5);
    spool_close(sp);
    sp = open_spool(d); // what was counted is not forgotten
    spool_state(sp, &st);
    assert_int_equal(st.produced[0], 64ull * MIB + 1020);
    const struct spool_piece more = {SPOOL_STDOUT, st.produced[0], mib, 80};
    assert_int_equal(spool_write(sp, &more, 1, &err), 0);
    spool_state(sp, &st);
    assert_int_equal(st.produced[0], 64ull * MIB + 1100);
    assert_int_equal(st.kept[0], LIMIT_SPOOL_STREAM_BYTES);
    struct stat file;
    assert_int_equal(fstatat(d->fd, ID ".stdout", &file, 0), 0);
    assert_int_equal(file.st_size, LIMIT_SPOOL_STREAM_BYTES);
    assert_digests(d, sp);
    spool_close(sp);
}

// ---- repair -----------------------------------------------------------------------------------------------------------
static void fill_some(const struct dir *d)
{
    struct spool *sp = open_spool(d);
    put(sp, SPOOL_STDOUT, 0, "one");
    put(sp, SPOOL_STDERR, 0, "two");
    put(sp, SPOOL_STDOUT, 3, "three");
    spool_close(sp);
}

static void append_raw(const struct dir *d, const char *name, const void *data, size_t len)
{
    CLEANUP_FD int fd = openat(d->fd, name, O_WRONLY | O_APPEND | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fd_write_full(fd, data, len), 0);
}

static void reopen_and_check(const struct dir *d, const char *want)
{
    struct spool *sp = open_spool(d);
    assert_transcript(d, want);
    assert_digests(d, sp);
    struct spool_state st;
    spool_state(sp, &st);
    put(sp, SPOOL_STDERR, st.produced[1], "+");
    spool_close(sp);
    char more[200];
    snprintf(more, sizeof more, strrchr(want, '|') && strrchr(want, '|')[1] == 'e' ? "%s+" : "%s|e:+", want);
    assert_transcript(d, more);
}

static void test_bytes_without_order(void **state) // host power loss
{
    struct dir *d = *state;
    fill_some(d);
    append_raw(d, ID ".stdout", "XY", 2);
    append_raw(d, ID ".stderr", "Z", 1);
    assert_transcript(d, "o:one|e:two|o:three"); // not seen before it was put in order
    reopen_and_check(d, "o:one|e:two|o:threeXY|e:Z");
}

static void test_order_without_bytes(void **state) // killed between the two
{
    struct dir *d = *state;
    fill_some(d);
    const uint32_t records[] = {ORDER_RECORD(1, 4), ORDER_RECORD(0, 5)};
    append_raw(d, ID ".order", records, sizeof records);
    append_raw(d, ID ".stderr", "Zz", 2);
    reopen_and_check(d, "o:one|e:two|o:three|e:Zz");
}

static void test_order_grown_in_place(void **state)
{
    struct dir *d = *state;
    fill_some(d);
    CLEANUP_FD int fd = openat(d->fd, ID ".order", O_WRONLY | O_CLOEXEC);
    const uint32_t longer = ORDER_RECORD(0, 500);
    assert_int_equal(fd_pwrite_full(fd, &longer, 4, (off_t)sizeof(struct order_header) + 8), 0);
    assert_transcript(d, "o:one|e:two|o:three"); // the header bounds what is seen
    reopen_and_check(d, "o:one|e:two|o:three");
}

static void test_order_torn(void **state)
{
    struct dir *d = *state;
    fill_some(d);
    append_raw(d, ID ".order", "abc", 3);
    reopen_and_check(d, "o:one|e:two|o:three");
}

static void test_order_lost(void **state)
{
    struct dir *d = *state;
    fill_some(d);
    assert_int_equal(unlinkat(d->fd, ID ".order", 0), 0);
    reopen_and_check(d, "o:onethree|e:two");
}

static void test_order_zeroed(void **state)
{
    struct dir *d = *state;
    fill_some(d);
    CLEANUP_FD int fd = openat(d->fd, ID ".order", O_RDWR | O_TRUNC | O_CLOEXEC);
    assert_int_equal(ftruncate(fd, 100), 0);
    assert_transcript(d, "");
    reopen_and_check(d, "o:onethree|e:two");
}

// ---- a hostile guest: single bytes, alternating -------------------------------------------------------------------------
static void test_order_is_bounded(void **state)
{
    struct dir *d = *state;
    enum { N = 1 << 18, CALLS = 5 };
    CLEANUP_FREE struct spool_piece *pieces = calloc(2 * N, sizeof *pieces);
    struct err err = {0};
    uint64_t end = 0;
    struct spool *sp = open_spool(d);
    for (int call = 0; call < CALLS; call++) {
        for (int i = 0; i < N; i++, end++) {
            pieces[2 * i] = (struct spool_piece){SPOOL_STDOUT, end, "o", 1};
            pieces[2 * i + 1] = (struct spool_piece){SPOOL_STDERR, end, "e", 1};
        }
        assert_int_equal(spool_write(sp, pieces, 2 * N, &err), 0);
    }
    struct stat st;
    assert_int_equal(fstatat(d->fd, ID ".order", &st, 0), 0);
    assert_true(st.st_size <= (1 << 22) + 100);
    assert_digests(d, sp);
    spool_close(sp);
    sp = open_spool(d);
    struct spool_state s;
    spool_state(sp, &s);
    assert_int_equal(s.position, 2ull * N * CALLS);
    spool_close(sp);
}

// ---- kill -9 ----------------------------------------------------------------------------------------------------------------
// The byte of a stream at an offset.
static char byte_at(int stream, uint64_t offset)
{
    return (char)('A' + (int)((offset * 7 + (uint64_t)stream * 3 + offset / 251) % 50));
}

static void write_for_ever(const struct dir *d, int ack_fd)
{
    struct err err = {0};
    struct spool *sp = spool_open(d->fd, ID, &err);
    struct spool_state st;
    unsigned seed = (unsigned)getpid();
    static char data[4][3000];
    for (;;) {
        struct spool_piece pieces[4];
        spool_state(sp, &st);
        uint64_t ends[2] = {st.produced[0], st.produced[1]};
        for (int i = 0; i < 4; i++) {
            const int stream = rand_r(&seed) % 2;
            const uint64_t len = 1 + (uint64_t)rand_r(&seed) % sizeof data[0];
            for (uint64_t k = 0; k < len; k++)
                data[i][k] = byte_at(stream, ends[stream] + k);
            pieces[i] = (struct spool_piece){(enum spool_stream)stream, ends[stream], data[i], len};
            ends[stream] += len;
        }
        if (spool_write(sp, pieces, 4, &err) != 0)
            _exit(1);
        if (write(ack_fd, ends, sizeof ends) != sizeof ends)
            _exit(2);
    }
}

static void check_streams(const struct dir *d, const uint64_t acked[2])
{
    struct err err = {0};
    struct spool *sp = open_spool(d);
    struct spool_state st;
    spool_state(sp, &st);
    struct spool_reader *r = spool_reader_open(d->fd, ID, &err);
    uint64_t position = 0, ends[2] = {0, 0};
    static char bytes[8192];
    for (;;) {
        enum spool_stream stream;
        uint64_t offset;
        const int64_t n = spool_next(r, &position, &stream, &offset, bytes, sizeof bytes, &err);
        assert_true(n >= 0);
        if (n == 0)
            break;
        assert_int_equal(offset, ends[stream]);
        for (int64_t i = 0; i < n; i++)
            assert_int_equal(bytes[i], byte_at((int)stream, offset + (uint64_t)i));
        ends[stream] += (uint64_t)n;
    }
    for (int i = 0; i < 2; i++) {
        assert_true(st.kept[i] >= acked[i]);
        assert_int_equal(ends[i], st.kept[i]);
    }
    assert_digests(d, sp);
    spool_reader_close(r);
    spool_close(sp);
}

static void test_kill(void **state)
{
    struct dir *d = *state;
    uint64_t acked[2] = {0, 0};
    for (int round = 0; round < 6; round++) {
        int fds[2];
        assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
        const pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            close(fds[0]);
            write_for_ever(d, fds[1]);
        }
        close(fds[1]);
        for (int i = 0; i < 40 + round * 13; i++)
            assert_int_equal(fd_read_full(fds[0], acked, sizeof acked), 0);
        kill(pid, SIGKILL);
        while (read(fds[0], acked, sizeof acked) == sizeof acked)
            ;
        close(fds[0]);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        check_streams(d, acked);
    }
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_nothing), T(test_no_file_before_the_first_byte), T(test_order_of_arrival), T(test_reading_one_stream),
        T(test_following), T(test_overlap_and_gap), T(test_reopening_continues), T(test_cap),
        T(test_bytes_without_order), T(test_order_without_bytes), T(test_order_grown_in_place), T(test_order_torn),
        T(test_order_lost), T(test_order_zeroed), T(test_order_is_bounded), T(test_kill),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
