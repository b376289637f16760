// dsse.h - signed envelopes (https://github.com/secure-systems-lab/dsse, v1.0.2): sealing and opening. Pure but for the
// key. Private to store/.
//
// By hand, with the envelope of GET /v1/receipts/{id} in receipt.json and the key of GET /v1/keys in receipt.pub.pem:
//
//   jq -r .payload receipt.json | base64 -d > payload.json
//   printf 'DSSEv1 %d %s %d ' 36 application/vnd.airlock.receipt+json "$(stat -c %s payload.json)" > pae
//   cat payload.json >> pae
//   jq -r '.signatures[0].sig' receipt.json | base64 -d > sig
//   openssl pkeyutl -verify -pubin -inkey receipt.pub.pem -rawin -in pae -sigfile sig
//
// which says "Signature Verified Successfully" and exits 0. (36 is the length of the type; 39 for a checkpoint, whose
// type is application/vnd.airlock.checkpoint+json and whose key is checkpoint.pub.pem.)
#ifndef AIRLOCK_STORE_DSSE_H
#define AIRLOCK_STORE_DSSE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/crypto.h"
#include "base/err.h"

#define DSSE_ENVELOPE_MAX (4u << 20)

// {"payloadType","payload","signatures":[{"keyid","sig"}]}. New, or NULL with err.
json_t *dsse_seal(const struct sign_key *key, const char *type, const char *payload, struct err *err);

struct dsse {
    struct buf payload;
    char keyid[65];
    uint8_t sig[ED25519_SIG_BYTES];
};
// Takes an envelope of that type apart; other members beside the three are passed over. 0, or -1: not of that form.
int dsse_open(const json_t *envelope, const char *type, struct dsse *ret);
bool dsse_verify(const struct dsse *d, const char *type, const uint8_t pub[ED25519_PUB_BYTES]);
void dsse_free(struct dsse *d);

#endif
