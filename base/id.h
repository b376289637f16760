// id.h - typed, time-ordered ids: three letters + 26 lower-case Crockford base32 characters (48 bits of wall ms,
// 80 bits of randomness, as ULID), so that each is a valid DNS label. Any thread; needs getrandom(2).
#ifndef AIRLOCK_BASE_ID_H
#define AIRLOCK_BASE_ID_H

#include <stdbool.h>

#define ID_LEN 29
#define ID_MAX 30 // with NUL

enum id_type { ID_SANDBOX, ID_COMMAND, ID_JOB, ID_SNAPSHOT, ID_IMAGE, ID_RECEIPT, ID_AUDIT, ID_PLAN,
               ID_TOKEN, ID_EVENT, ID_WORKLOAD };

// Later ids of one process sort after earlier ones, also within one millisecond and when the clock steps back.
char *id_new(enum id_type type, char out[static ID_MAX]);
bool id_valid(enum id_type type, const char *text);
const char *id_prefix(enum id_type type);

#endif
