#include "store/dsse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"

// The bytes that are signed: "DSSEv1" SP len(type) SP type SP len(payload) SP payload.
static bool pae(struct buf *out, const char *type, const void *payload, size_t len)
{
    return buf_addf(out, "DSSEv1 %zu %s %zu ", strlen(type), type, len) && buf_add(out, payload, len);
}

static json_t *base64_json(const void *data, size_t len)
{
    CLEANUP_BUF struct buf text = BUF_INIT(DSSE_ENVELOPE_MAX);
    return enc_base64(&text, data, len) ? json_stringn(buf_text(&text), text.len) : NULL;
}

json_t *dsse_seal(const struct sign_key *key, const char *type, const char *payload, struct err *err)
{
    uint8_t sig[ED25519_SIG_BYTES];
    CLEANUP_BUF struct buf text = BUF_INIT(DSSE_ENVELOPE_MAX);
    const size_t len = strlen(payload);
    if (!pae(&text, type, payload, len) || sign_key_sign(key, text.data, text.len, sig) != 0) {
        err_set(err, ERR_INTERNAL, "signing_failed", "the record could not be signed");
        return NULL;
    }
    json_t *envelope = json_pack("{s:s, s:o, s:[{s:s, s:o}]}", "payloadType", type, "payload",
                                 base64_json(payload, len), "signatures", "keyid", sign_key_id(key), "sig",
                                 base64_json(sig, sizeof sig));
    if (!envelope)
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    return envelope;
}

static int decode(const json_t *text, struct buf *out)
{
    const size_t len = json_string_length(text);
    if (!json_is_string(text) || !buf_reserve(out, len + 1))
        return -1;
    const ssize_t n = enc_unbase64(json_string_value(text), len, out->data, len);
    if (n < 0)
        return -1;
    out->len = (size_t)n;
    out->data[n] = 0;
    return 0;
}

int dsse_open(const json_t *envelope, const char *type, struct dsse *ret)
{
    const json_t *one = json_array_get(json_object_get(envelope, "signatures"), 0);
    const char *is = json_get_str(envelope, "payloadType"), *keyid = json_get_str(one, "keyid");
    CLEANUP_BUF struct buf sig = BUF_INIT(256);
    *ret = (struct dsse){.payload = BUF_INIT(DSSE_ENVELOPE_MAX)};
    if (!is || strcmp(is, type) != 0 || !keyid || strlen(keyid) >= sizeof ret->keyid)
        return -1;
    if (json_array_size(json_object_get(envelope, "signatures")) != 1)
        return -1;
    if (decode(json_object_get(one, "sig"), &sig) != 0 || sig.len != sizeof ret->sig)
        return -1;
    if (decode(json_object_get(envelope, "payload"), &ret->payload) != 0) {
        dsse_free(ret);
        return -1;
    }
    strcpy(ret->keyid, keyid);
    memcpy(ret->sig, sig.data, sizeof ret->sig);
    return 0;
}

bool dsse_verify(const struct dsse *d, const char *type, const uint8_t pub[ED25519_PUB_BYTES])
{
    CLEANUP_BUF struct buf text = BUF_INIT(DSSE_ENVELOPE_MAX + 256);
    return pae(&text, type, buf_text(&d->payload), d->payload.len) && crypto_verify(pub, text.data, text.len, d->sig);
}

void dsse_free(struct dsse *d)
{
    buf_free(&d->payload);
}
