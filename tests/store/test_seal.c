// Seals: what this server sealed is told from everything else, for as long as the key is the same.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/enc.h"
#include "fixture.h"
#include "store/seal.h"

static const char DATA[] = "{\"epoch\":1}";
enum { LEN = sizeof DATA - 1 };

static void test_good_and_bad(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    char seal[SHA256_HEX], other[SHA256_HEX + 1], changed[sizeof DATA];
    assert_int_equal(store_seal(s, DATA, LEN, seal, &err), 0);
    assert_int_equal(strlen(seal), 64);
    assert_true(store_seal_ok(s, DATA, LEN, seal));
    for (size_t i = 0; i < LEN; i++) {
        memcpy(changed, DATA, sizeof DATA);
        changed[i] ^= 1;
        assert_false(store_seal_ok(s, changed, LEN, seal));
    }
    assert_false(store_seal_ok(s, DATA, LEN - 1, seal));
    for (size_t i = 0; i < 64; i++) {
        strcpy(other, seal);
        other[i] = other[i] == '0' ? '1' : '0';
        assert_false(store_seal_ok(s, DATA, LEN, other));
    }
    seal[63] = 0; // cut
    assert_false(store_seal_ok(s, DATA, LEN, seal));
    assert_int_equal(store_seal(s, DATA, LEN, seal, &err), 0);
    snprintf(other, sizeof other, "%s0", seal);
    assert_false(store_seal_ok(s, DATA, LEN, other));
    assert_false(store_seal_ok(s, DATA, LEN, ""));
    assert_false(store_seal_ok(s, DATA, LEN, NULL));
    assert_int_equal(store_seal(s, "", 0, seal, &err), 0);
    assert_true(store_seal_ok(s, "", 0, seal));
    store_close(s);
}

// The key as it lies there gives the seal, by the words of RFC 2104: nothing else goes in.
static void test_is_hmac_of_the_file(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct stat st;
    char seal[SHA256_HEX], want[SHA256_HEX];
    uint8_t mac[SHA256_BYTES];
    CLEANUP_BUF struct buf key = BUF_INIT(64);
    struct store *s = open_store(d);
    assert_int_equal(fstatat(d->fd, "keys/snapshot.key", &st, AT_SYMLINK_NOFOLLOW), 0);
    assert_int_equal(st.st_mode, S_IFREG | 0600);
    assert_int_equal(fd_read_file(d->fd, "keys/snapshot.key", &key), 0);
    assert_int_equal(key.len, 32);
    crypto_hmac_sha256(key.data, key.len, DATA, LEN, mac);
    enc_hex(mac, sizeof mac, want);
    assert_int_equal(store_seal(s, DATA, LEN, seal, &err), 0);
    assert_string_equal(seal, want);
    evidence_argv_hmac(s, DATA, LEN, want); // a key of its own
    assert_string_not_equal(seal, want);
    char *public = evidence_keys(s, &err);
    assert_null(strstr(public, "snapshot"));
    free(public);
    store_close(s);
}

static void test_key_stays_and_goes(void **state)
{
    struct dir *d = *state, *foreign = dir_new();
    struct err err = {0};
    char seal[SHA256_HEX];
    struct snapshot_row row = snapshot_of("a", "sbxa", ""), got;
    struct store *s = open_store(d);
    put_snapshot(s, &row);
    assert_int_equal(store_seal(s, DATA, LEN, seal, &err), 0);
    store_close(s);
    s = open_store(d);
    assert_true(store_seal_ok(s, DATA, LEN, seal));
    store_close(s);
    s = open_store(foreign);
    assert_false(store_seal_ok(s, DATA, LEN, seal));
    store_close(s);
    // Lost beside a snapshot: the server starts, the snapshot is told, its seal is none any more.
    assert_int_equal(unlinkat(d->fd, "keys/snapshot.key", 0), 0);
    s = open_store(d);
    assert_int_equal(snapshot_get(s, "a", row.id, &got, &err), 0);
    snapshot_row_free(&got);
    assert_false(store_seal_ok(s, DATA, LEN, seal));
    assert_int_equal(store_seal(s, DATA, LEN, seal, &err), 0);
    assert_true(store_seal_ok(s, DATA, LEN, seal));
    store_close(s);
    dir_free(foreign);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_good_and_bad), T(test_is_hmac_of_the_file), T(test_key_stays_and_goes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
