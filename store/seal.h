#ifndef AIRLOCK_STORE_SEAL_H
#define AIRLOCK_STORE_SEAL_H
#include "store/store.h"
#include "base/crypto.h"
int store_seal(struct store *s, const void *data, size_t len, char out[SHA256_HEX], struct err *err);
bool store_seal_ok(struct store *s, const void *data, size_t len, const char *seal);
#endif
