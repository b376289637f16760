#include "store/seal.h"

#include <string.h>

#include "base/enc.h"
#include "store/int.h"

int store_seal(struct store *s, const void *data, size_t len, char out[static SHA256_HEX], struct err *err)
{
    static const uint8_t NONE[SHA256_BYTES];
    uint8_t mac[SHA256_BYTES];
    crypto_hmac_sha256(s->keys.snapshot, HMAC_KEY_BYTES, data, len, mac);
    if (crypto_equal(mac, NONE, sizeof mac)) // OpenSSL ran out of memory: zeros are a seal that anyone can write
        return err_set(err, ERR_INTERNAL, "seal_failed", "a seal could not be computed");
    enc_hex(mac, sizeof mac, out);
    return 0;
}

bool store_seal_ok(struct store *s, const void *data, size_t len, const char *seal)
{
    char want[SHA256_HEX];
    if (!seal || strlen(seal) != SHA256_HEX - 1 || store_seal(s, data, len, want, NULL) != 0)
        return false;
    return crypto_equal(want, seal, SHA256_HEX - 1);
}
