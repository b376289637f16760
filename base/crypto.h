// crypto.h - the only door to OpenSSL outside TLS: SHA-256, HMAC, Ed25519, randomness, constant-time compare.
// Owns key objects it returns. Any thread; one struct per user.
#ifndef AIRLOCK_BASE_CRYPTO_H
#define AIRLOCK_BASE_CRYPTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define SHA256_BYTES 32
#define SHA256_HEX 65        // with NUL
#define DIGEST_TEXT_MAX 72   // "sha256:" + 64 hex + NUL
#define ED25519_SIG_BYTES 64
#define ED25519_PUB_BYTES 32

// Streaming hash. The algorithm is fetched once per process (crypto_init, called on first use).
struct sha256;
struct sha256 *sha256_new(void);                       // NULL: out of memory
void sha256_update(struct sha256 *h, const void *data, size_t len);
void sha256_peek(const struct sha256 *h, uint8_t out[SHA256_BYTES]); // digest so far; h goes on
void sha256_free(struct sha256 *h);                    // accepts NULL

void crypto_sha256(const void *data, size_t len, uint8_t out[SHA256_BYTES]);
// "sha256:<hex>" of data.
char *crypto_digest_text(const uint8_t hash[SHA256_BYTES], char out[static DIGEST_TEXT_MAX]);
// Whole descriptor from offset 0 (pread; the offset is not moved).
int crypto_sha256_fd(int fd, uint8_t out[SHA256_BYTES], uint64_t *ret_bytes, struct err *err);
void crypto_hmac_sha256(const void *key, size_t key_len, const void *data, size_t len,
                        uint8_t out[SHA256_BYTES]);
int crypto_random(void *out, size_t len);              // 0, or -1
bool crypto_equal(const void *a, const void *b, size_t len); // constant time

struct sign_key; // an Ed25519 private key with its key id
// PKCS#8 PEM file below dirfd, 0600; made when missing (fd_write_file_atomic). Returns new, or NULL.
struct sign_key *sign_key_load_or_make(int dirfd, const char *name, struct err *err);
void sign_key_free(struct sign_key *key);              // accepts NULL
// First 16 hex digits of SHA-256 over the raw public key.
const char *sign_key_id(const struct sign_key *key);
const uint8_t *sign_key_public(const struct sign_key *key); // ED25519_PUB_BYTES
// SubjectPublicKeyInfo PEM; borrowed.
const char *sign_key_public_pem(const struct sign_key *key);
int sign_key_sign(const struct sign_key *key, const void *data, size_t len,
                  uint8_t out[ED25519_SIG_BYTES]);     // 0, or -1
bool crypto_verify(const uint8_t pub[ED25519_PUB_BYTES], const void *data, size_t len,
                   const uint8_t sig[ED25519_SIG_BYTES]);
// Raw public key out of a SubjectPublicKeyInfo PEM text. 0, or -1.
int crypto_public_from_pem(const char *pem, uint8_t out[ED25519_PUB_BYTES]);

#endif
