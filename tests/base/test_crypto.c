// Hashes, MACs and signatures against published vectors, and keys that survive their file.
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
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/crypto.h"
#include "base/enc.h"
#include "base/fd.h"

static void assert_hex(const uint8_t *got, size_t len, const char *want)
{
    char text[2 * 64 + 1];
    enc_hex(got, len, text);
    assert_string_equal(text, want);
}

// FIPS 180-4's examples.
static const struct {
    const char *text, *hash;
} SHA[] = {
    {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
};

static void sha256_vectors(void **state)
{
    uint8_t hash[SHA256_BYTES];
    for (size_t i = 0; i < sizeof SHA / sizeof *SHA; i++) {
        crypto_sha256(SHA[i].text, strlen(SHA[i].text), hash);
        assert_hex(hash, sizeof hash, SHA[i].hash);
    }
    char *million = malloc(1000000);
    memset(million, 'a', 1000000);
    crypto_sha256(million, 1000000, hash);
    assert_hex(hash, sizeof hash, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

static void streaming_peeks_and_goes_on(void **state)
{
    uint8_t hash[SHA256_BYTES];
    struct sha256 *h = sha256_new();
    assert_non_null(h);
    sha256_peek(h, hash);
    assert_hex(hash, sizeof hash, SHA[0].hash);
    sha256_update(h, "a", 1);
    sha256_update(h, "", 0);
    sha256_peek(h, hash);
    sha256_update(h, "bc", 2);
    for (int i = 0; i < 3; i++) {
        sha256_peek(h, hash); // looking changes nothing
        assert_hex(hash, sizeof hash, SHA[1].hash);
    }
    sha256_free(h);
    sha256_free(NULL);
}

static void digests_as_text(void **state)
{
    uint8_t hash[SHA256_BYTES];
    char text[DIGEST_TEXT_MAX];
    crypto_sha256("abc", 3, hash);
    assert_string_equal(crypto_digest_text(hash, text),
                        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

static void a_descriptor_is_hashed_from_its_start(void **state)
{
    char path[] = "/tmp/airlock-crypto.XXXXXX";
    CLEANUP_FD int fd = mkstemp(path);
    struct err err = {0};
    uint8_t hash[SHA256_BYTES], want[SHA256_BYTES];
    uint64_t bytes = 99;
    assert_int_equal(unlink(path), 0);
    assert_int_equal(crypto_sha256_fd(fd, hash, &bytes, &err), 0);
    assert_int_equal(bytes, 0);
    assert_hex(hash, sizeof hash, SHA[0].hash);
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    while (b.len < 700000) // more than one piece
        buf_adds(&b, "0123456789abcdef!");
    assert_int_equal(fd_write_full(fd, b.data, b.len), 0);
    assert_int_equal(lseek(fd, 5, SEEK_SET), 5);
    assert_int_equal(crypto_sha256_fd(fd, hash, &bytes, &err), 0);
    assert_int_equal(bytes, b.len);
    assert_int_equal(lseek(fd, 0, SEEK_CUR), 5);
    crypto_sha256(b.data, b.len, want);
    assert_memory_equal(hash, want, sizeof hash);
    assert_int_equal(crypto_sha256_fd(-1, hash, &bytes, &err), -1);
    assert_int_equal(err.kind, ERR_INTERNAL);
    CLEANUP_FD int dir = open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(crypto_sha256_fd(dir, hash, NULL, &err), -1);
}

// RFC 4231.
static void hmac_vectors(void **state)
{
    uint8_t key[131], out[SHA256_BYTES];
    memset(key, 0x0b, 20);
    crypto_hmac_sha256(key, 20, "Hi There", 8, out);
    assert_hex(out, sizeof out, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    crypto_hmac_sha256("Jefe", 4, "what do ya want for nothing?", 28, out);
    assert_hex(out, sizeof out, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    memset(key, 0xaa, sizeof key); // longer than a block
    crypto_hmac_sha256(key, sizeof key, "Test Using Larger Than Block-Size Key - Hash Key First", 54, out);
    assert_hex(out, sizeof out, "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

static void randomness_and_comparison(void **state)
{
    uint8_t a[64] = {0}, b[64] = {0}, zero[64] = {0};
    assert_int_equal(crypto_random(a, sizeof a), 0);
    assert_int_equal(crypto_random(b, sizeof b), 0);
    assert_int_equal(crypto_random(b, 0), 0);
    assert_false(crypto_equal(a, b, sizeof a));
    assert_false(crypto_equal(a, zero, sizeof a));
    memcpy(b, a, sizeof b);
    assert_true(crypto_equal(a, b, sizeof a));
    b[63] ^= 0x80;
    assert_false(crypto_equal(a, b, 64));
    assert_true(crypto_equal(a, b, 63));
    assert_true(crypto_equal(a, zero, 0));
}

// ---- Ed25519 ----------------------------------------------------------------------------------------------------------
static void unhex(const char *text, uint8_t *out)
{
    assert_int_equal(enc_unhex(text, strlen(text), out), 0);
}

// RFC 8032, section 7.1, tests 1 to 3.
static const struct {
    const char *secret, *public, *message, *signature;
} ED[] = {
    {"9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
     "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
     "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe2465514143"
     "8e7a100b"},
    {"4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
     "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
     "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d2916"
     "12bb0c00"},
    {"c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
     "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
     "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027bece"
     "ea1ec40a"},
};

static void published_signatures_verify(void **state)
{
    for (size_t i = 0; i < sizeof ED / sizeof *ED; i++) {
        uint8_t pub[ED25519_PUB_BYTES], message[4], sig[ED25519_SIG_BYTES];
        const size_t len = strlen(ED[i].message) / 2;
        unhex(ED[i].public, pub);
        unhex(ED[i].message, message);
        unhex(ED[i].signature, sig);
        assert_true(crypto_verify(pub, message, len, sig));
        for (size_t bit = 0; bit < 8 * sizeof sig; bit += 37) { // one bit anywhere
            sig[bit / 8] ^= (uint8_t)(1 << bit % 8);
            assert_false(crypto_verify(pub, message, len, sig));
            sig[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        assert_false(crypto_verify(pub, "another", 7, sig));
        pub[0] ^= 1;
        assert_false(crypto_verify(pub, message, len, sig));
    }
}

struct dir {
    char path[64];
    int fd;
};

static int setup(void **state)
{
    struct dir *d = calloc(1, sizeof *d);
    strcpy(d->path, "/tmp/airlock-crypto.XXXXXX");
    if (!mkdtemp(d->path))
        return -1;
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *state = d;
    return d->fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    struct dir *d = *state;
    fd_close(&d->fd);
    const int failed = fd_remove_tree(AT_FDCWD, d->path, NULL);
    free(d);
    return failed;
}

// PKCS#8 of a raw Ed25519 secret: RFC 8410's fixed beginning, then the 32 bytes.
static void write_key(struct dir *d, const char *name, const char *secret)
{
    uint8_t der[48];
    CLEANUP_BUF struct buf b = BUF_INIT(1000);
    unhex("302e020100300506032b657004220420", der);
    unhex(secret, der + 16);
    buf_adds(&b, "-----BEGIN PRIVATE KEY-----\n");
    assert_true(enc_base64(&b, der, sizeof der));
    buf_adds(&b, "\n-----END PRIVATE KEY-----\n");
    assert_int_equal(fd_write_file_atomic(d->fd, name, b.data, b.len, 0600), 0);
}

static void published_keys_sign_as_published(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    for (size_t i = 0; i < sizeof ED / sizeof *ED; i++) {
        uint8_t message[4], sig[ED25519_SIG_BYTES], hash[SHA256_BYTES], pub[ED25519_PUB_BYTES];
        char id[17];
        write_key(d, "key.pem", ED[i].secret);
        unhex(ED[i].message, message);
        struct sign_key *key = sign_key_load_or_make(d->fd, "key.pem", &err);
        assert_non_null(key);
        assert_hex(sign_key_public(key), ED25519_PUB_BYTES, ED[i].public);
        assert_int_equal(sign_key_sign(key, message, strlen(ED[i].message) / 2, sig), 0);
        assert_hex(sig, sizeof sig, ED[i].signature);
        crypto_sha256(sign_key_public(key), ED25519_PUB_BYTES, hash);
        enc_hex(hash, 8, id);
        assert_string_equal(sign_key_id(key), id);
        assert_int_equal(crypto_public_from_pem(sign_key_public_pem(key), pub), 0);
        assert_memory_equal(pub, sign_key_public(key), sizeof pub);
        sign_key_free(key);
    }
}

static void a_key_is_made_once_and_read_again(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct stat st;
    uint8_t sig[ED25519_SIG_BYTES];
    struct sign_key *made = sign_key_load_or_make(d->fd, "signing.pem", &err);
    assert_non_null(made);
    assert_int_equal(fstatat(d->fd, "signing.pem", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(sign_key_sign(made, "message", 7, sig), 0);
    struct sign_key *again = sign_key_load_or_make(d->fd, "signing.pem", &err), *other = sign_key_load_or_make(d->fd, "x.pem", &err);
    assert_string_equal(sign_key_id(again), sign_key_id(made));
    assert_string_equal(sign_key_public_pem(again), sign_key_public_pem(made));
    assert_true(crypto_verify(sign_key_public(again), "message", 7, sig));
    assert_false(crypto_verify(sign_key_public(other), "message", 7, sig));
    assert_string_not_equal(sign_key_id(other), sign_key_id(made));
    assert_int_equal(err.kind, ERR_NONE);
    sign_key_free(made);
    sign_key_free(again);
    sign_key_free(other);
    sign_key_free(NULL);
}

// A key that cannot be read is a failure; it is never replaced by a new one.
static void an_unreadable_key_is_kept(void **state)
{
    static const char *const TEXTS[] = {"", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"};
    struct dir *d = *state;
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++) {
        struct err err = {0};
        CLEANUP_BUF struct buf b = BUF_INIT(1000);
        assert_int_equal(fd_write_file_atomic(d->fd, "key.pem", TEXTS[i], strlen(TEXTS[i]), 0600), 0);
        assert_null(sign_key_load_or_make(d->fd, "key.pem", &err));
        assert_int_equal(err.kind, ERR_INTERNAL);
        assert_int_equal(fd_read_file(d->fd, "key.pem", &b), 0);
        assert_string_equal(buf_text(&b), TEXTS[i]);
    }
    struct err err = {0};
    assert_int_equal(mkdirat(d->fd, "dir.pem", 0700), 0);
    assert_null(sign_key_load_or_make(d->fd, "dir.pem", &err));
    assert_int_equal(err.kind, ERR_INTERNAL);
}

// Of the curve P-256, made for this test.
static const char OTHER_KEY[] =
    "-----BEGIN PRIVATE KEY-----\n"
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvtDHETF8OuAdcfng\n"
    "+nvPK8L+0/JXczBdncNSU7PABu6hRANCAAQoMa1hliLLPh+zGz9nN0u+7Rxqeojh\n"
    "XPtP2mANfE8NbEHJ9wS444uYOf99lQPmG9C7HZZOtYFuwEGqtNo4ulo0\n"
    "-----END PRIVATE KEY-----\n",
                  OTHER_PUBLIC[] =
    "-----BEGIN PUBLIC KEY-----\n"
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEKDGtYZYiyz4fsxs/ZzdLvu0canqI\n"
    "4Vz7T9pgDXxPDWxByfcEuOOLmDn/fZUD5hvQux2WTrWBbsBBqrTaOLpaNA==\n"
    "-----END PUBLIC KEY-----\n";

static void a_key_of_another_kind_is_refused(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    uint8_t pub[ED25519_PUB_BYTES];
    assert_int_equal(fd_write_file_atomic(d->fd, "key.pem", OTHER_KEY, strlen(OTHER_KEY), 0600), 0);
    assert_null(sign_key_load_or_make(d->fd, "key.pem", &err));
    assert_string_equal(err.code, "key_unreadable");
    assert_int_equal(crypto_public_from_pem(OTHER_PUBLIC, pub), -1);
}

static void a_public_key_from_its_text(void **state)
{
    uint8_t der[44], pub[ED25519_PUB_BYTES];
    CLEANUP_BUF struct buf b = BUF_INIT(1000);
    unhex("302a300506032b6570032100", der);
    unhex(ED[0].public, der + 12);
    buf_adds(&b, "-----BEGIN PUBLIC KEY-----\n");
    assert_true(enc_base64(&b, der, sizeof der));
    buf_adds(&b, "\n-----END PUBLIC KEY-----\n");
    assert_int_equal(crypto_public_from_pem(buf_text(&b), pub), 0);
    assert_hex(pub, sizeof pub, ED[0].public);
    assert_int_equal(crypto_public_from_pem("", pub), -1);
    assert_int_equal(crypto_public_from_pem("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", pub), -1);
}

// ---- threads ----------------------------------------------------------------------------------------------------------
static void *hash_many(void *arg)
{
    uint8_t hash[SHA256_BYTES];
    char text[65];
    for (int i = 0; i < 500; i++) {
        const size_t which = (size_t)i % (sizeof SHA / sizeof *SHA);
        crypto_sha256(SHA[which].text, strlen(SHA[which].text), hash);
        enc_hex(hash, sizeof hash, text);
        if (strcmp(text, SHA[which].hash) != 0)
            *(int *)arg = 1;
    }
    return NULL;
}

static void any_thread_may_hash(void **state)
{
    pthread_t threads[4];
    int wrong[4] = {0};
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, hash_many, &wrong[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++)
        assert_int_equal(wrong[i], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_vectors),
        cmocka_unit_test(streaming_peeks_and_goes_on),
        cmocka_unit_test(digests_as_text),
        cmocka_unit_test(a_descriptor_is_hashed_from_its_start),
        cmocka_unit_test(hmac_vectors),
        cmocka_unit_test(randomness_and_comparison),
        cmocka_unit_test(published_signatures_verify),
        cmocka_unit_test_setup_teardown(published_keys_sign_as_published, setup, teardown),
        cmocka_unit_test_setup_teardown(a_key_is_made_once_and_read_again, setup, teardown),
        cmocka_unit_test_setup_teardown(an_unreadable_key_is_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(a_key_of_another_kind_is_refused, setup, teardown),
        cmocka_unit_test(a_public_key_from_its_text),
        cmocka_unit_test(any_thread_may_hash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
