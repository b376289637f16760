#include "base/crypto.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/pem.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/enc.h"
#include "base/fd.h"

#define KEY_FILE_MAX 4096

static pthread_once_t once = PTHREAD_ONCE_INIT;
static EVP_MD *sha256_md;
static pthread_key_t thread_ctx; // an EVP_MD_CTX per thread, so that hashing a token allocates nothing

static void free_ctx(void *ctx)
{
    EVP_MD_CTX_free(ctx);
}

static void init(void)
{
    sha256_md = EVP_MD_fetch(NULL, "SHA256", NULL);
    pthread_key_create(&thread_ctx, free_ctx);
}

// ---- hashing ----------------------------------------------------------------------------------------------------
struct sha256 {
    EVP_MD_CTX *ctx;
};

struct sha256 *sha256_new(void)
{
    pthread_once(&once, init);
    struct sha256 *h = calloc(1, sizeof *h);
    if (h && (h->ctx = EVP_MD_CTX_new()) && EVP_DigestInit_ex2(h->ctx, sha256_md, NULL) == 1)
        return h;
    sha256_free(h);
    return NULL;
}

void sha256_update(struct sha256 *h, const void *data, size_t len)
{
    EVP_DigestUpdate(h->ctx, data, len);
}

void sha256_peek(const struct sha256 *h, uint8_t out[SHA256_BYTES])
{
    EVP_MD_CTX *copy = EVP_MD_CTX_new();
    memset(out, 0, SHA256_BYTES);
    if (copy && EVP_MD_CTX_copy_ex(copy, h->ctx) == 1)
        EVP_DigestFinal_ex(copy, out, NULL);
    EVP_MD_CTX_free(copy);
}

void sha256_free(struct sha256 *h)
{
    if (!h)
        return;
    EVP_MD_CTX_free(h->ctx);
    free(h);
}

void crypto_sha256(const void *data, size_t len, uint8_t out[SHA256_BYTES])
{
    pthread_once(&once, init);
    EVP_MD_CTX *ctx = pthread_getspecific(thread_ctx);
    if (!ctx) {
        ctx = EVP_MD_CTX_new();
        pthread_setspecific(thread_ctx, ctx);
    }
    memset(out, 0, SHA256_BYTES);
    if (ctx && EVP_DigestInit_ex2(ctx, sha256_md, NULL) == 1 && EVP_DigestUpdate(ctx, data, len) == 1)
        EVP_DigestFinal_ex(ctx, out, NULL);
}

char *crypto_digest_text(const uint8_t hash[SHA256_BYTES], char out[static DIGEST_TEXT_MAX])
{
    memcpy(out, "sha256:", 7);
    enc_hex(hash, SHA256_BYTES, out + 7);
    return out;
}

int crypto_sha256_fd(int fd, uint8_t out[SHA256_BYTES], uint64_t *ret_bytes, struct err *err)
{
    enum { CHUNK = 256 << 10 };
    CLEANUP_FREE uint8_t *chunk = malloc(CHUNK);
    struct sha256 *h = sha256_new();
    uint64_t at = 0;
    ssize_t n = chunk && h ? 1 : -1;
    while (n > 0) {
        n = pread(fd, chunk, CHUNK, (off_t)at);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0) {
            sha256_update(h, chunk, (size_t)n);
            at += (uint64_t)n;
        }
    }
    const int code = errno;
    if (n == 0)
        sha256_peek(h, out);
    sha256_free(h);
    if (n < 0)
        return err_sys(err, code, "hashing a file");
    if (ret_bytes)
        *ret_bytes = at;
    return 0;
}

void crypto_hmac_sha256(const void *key, size_t key_len, const void *data, size_t len, uint8_t out[SHA256_BYTES])
{
    size_t n = SHA256_BYTES;
    memset(out, 0, SHA256_BYTES);
    (void)EVP_Q_mac(NULL, "HMAC", NULL, "SHA256", NULL, key, key_len, data, len, out, SHA256_BYTES, &n);
}

int crypto_random(void *out, size_t len)
{
    for (size_t done = 0; done < len;) {
        const ssize_t n = getrandom((char *)out + done, len - done, 0);
        if (n < 0 && errno != EINTR)
            return -1;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

bool crypto_equal(const void *a, const void *b, size_t len)
{
    return CRYPTO_memcmp(a, b, len) == 0;
}

// ---- signing ----------------------------------------------------------------------------------------------------
struct sign_key {
    EVP_PKEY *pkey;
    uint8_t public[ED25519_PUB_BYTES];
    char id[17];
    char pem[256];
};

void sign_key_free(struct sign_key *key)
{
    if (!key)
        return;
    EVP_PKEY_free(key->pkey);
    free(key);
}

static int bio_text(BIO *bio, char *out, size_t cap)
{
    char *data;
    const long n = BIO_get_mem_data(bio, &data);
    if (n <= 0 || (size_t)n >= cap)
        return -1;
    memcpy(out, data, (size_t)n);
    out[n] = 0;
    return 0;
}

// Derives id and public forms. 0, or -1.
static int describe(struct sign_key *key)
{
    size_t n = ED25519_PUB_BYTES;
    uint8_t hash[SHA256_BYTES];
    if (!EVP_PKEY_is_a(key->pkey, "ED25519") || EVP_PKEY_get_raw_public_key(key->pkey, key->public, &n) != 1 || n != ED25519_PUB_BYTES)
        return -1;
    crypto_sha256(key->public, n, hash);
    enc_hex(hash, 8, key->id);
    BIO *bio = BIO_new(BIO_s_mem());
    const int failed = !bio || PEM_write_bio_PUBKEY(bio, key->pkey) != 1 || bio_text(bio, key->pem, sizeof key->pem) != 0;
    BIO_free(bio);
    return failed ? -1 : 0;
}

static EVP_PKEY *make_key(int dirfd, const char *name, struct err *err)
{
    char text[KEY_FILE_MAX];
    EVP_PKEY *pkey = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    BIO *bio = BIO_new(BIO_s_mem());
    const bool made = pkey && bio && PEM_write_bio_PKCS8PrivateKey(bio, pkey, NULL, NULL, 0, NULL, NULL) == 1 &&
                      bio_text(bio, text, sizeof text) == 0;
    BIO_free(bio);
    if (made && fd_write_file_atomic(dirfd, name, text, strlen(text), 0600) == 0) {
        OPENSSL_cleanse(text, sizeof text);
        return pkey;
    }
    err_sys(err, made ? errno : ENOMEM, "making key %s", name);
    EVP_PKEY_free(pkey);
    return NULL;
}

struct sign_key *sign_key_load_or_make(int dirfd, const char *name, struct err *err)
{
    struct sign_key *key = calloc(1, sizeof *key);
    CLEANUP_BUF struct buf text = BUF_INIT(KEY_FILE_MAX);
    if (!key) {
        err_sys(err, ENOMEM, "loading key %s", name);
        return NULL;
    }
    if (fd_read_file(dirfd, name, &text) == 0) {
        BIO *bio = BIO_new_mem_buf(text.data, (int)text.len);
        key->pkey = bio ? PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL) : NULL;
        BIO_free(bio);
        if (!key->pkey)
            err_set(err, ERR_INTERNAL, "key_unreadable", "a signing key cannot be read");
    } else if (errno == ENOENT) {
        key->pkey = make_key(dirfd, name, err);
    } else {
        err_sys(err, errno, "reading key %s", name);
    }
    if (key->pkey && describe(key) == 0)
        return key;
    if (key->pkey)
        err_set(err, ERR_INTERNAL, "key_unreadable", "a signing key is no Ed25519 key");
    sign_key_free(key);
    return NULL;
}

const char *sign_key_id(const struct sign_key *key)
{
    return key->id;
}

const uint8_t *sign_key_public(const struct sign_key *key)
{
    return key->public;
}

const char *sign_key_public_pem(const struct sign_key *key)
{
    return key->pem;
}

int sign_key_sign(const struct sign_key *key, const void *data, size_t len, uint8_t out[ED25519_SIG_BYTES])
{
    size_t n = ED25519_SIG_BYTES;
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    const bool ok = ctx && EVP_DigestSignInit(ctx, NULL, NULL, NULL, key->pkey) == 1 &&
                    EVP_DigestSign(ctx, out, &n, data, len) == 1 && n == ED25519_SIG_BYTES;
    EVP_MD_CTX_free(ctx);
    return ok ? 0 : -1;
}

bool crypto_verify(const uint8_t pub[ED25519_PUB_BYTES], const void *data, size_t len,
                   const uint8_t sig[ED25519_SIG_BYTES])
{
    EVP_PKEY *pkey = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, pub, ED25519_PUB_BYTES);
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    const bool ok = pkey && ctx && EVP_DigestVerifyInit(ctx, NULL, NULL, NULL, pkey) == 1 &&
                    EVP_DigestVerify(ctx, sig, ED25519_SIG_BYTES, data, len) == 1;
    EVP_MD_CTX_free(ctx);
    EVP_PKEY_free(pkey);
    return ok;
}

int crypto_public_from_pem(const char *pem, uint8_t out[ED25519_PUB_BYTES])
{
    size_t n = ED25519_PUB_BYTES;
    BIO *bio = BIO_new_mem_buf(pem, -1);
    EVP_PKEY *pkey = bio ? PEM_read_bio_PUBKEY(bio, NULL, NULL, NULL) : NULL;
    const bool ok = pkey && EVP_PKEY_is_a(pkey, "ED25519") && EVP_PKEY_get_raw_public_key(pkey, out, &n) == 1 && n == ED25519_PUB_BYTES;
    EVP_PKEY_free(pkey);
    BIO_free(bio);
    return ok ? 0 : -1;
}
