#include "store/evidence.h"
#include <string.h>
#include "store/seal.h"
int store_seal(struct store *s, const void *data, size_t len, char out[SHA256_HEX], struct err *err) { (void)s;(void)err; evidence_argv_hmac(s, data, len, out); return 0; }
bool store_seal_ok(struct store *s, const void *data, size_t len, const char *seal) { char x[SHA256_HEX]; evidence_argv_hmac(s, data, len, x); return seal && strcmp(x, seal)==0; }
