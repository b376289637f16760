// fake_api.h - the calls of api.h that the listener makes, answered by the request's path, for the tests of server/http.c:
//
//   /echo…    what was asked, and the body, once that has ended
//   /sip…     the same, but the body is taken in sips, with a pause after each
//   /later…   the same, but the answer comes from another thread
//   /stream…  a body without a length, a piece at a time, with pauses
//   /sized…   300,000 bytes with a length
//   /broken…  some bytes of a body, and then no more
//   /refuse…  403 before the body
//   /hang…    no answer
#ifndef AIRLOCK_TESTS_SERVER_FAKE_API_H
#define AIRLOCK_TESTS_SERVER_FAKE_API_H

#include <pthread.h>
#include <stdbool.h>

#include "api/api.h"
#include "base/buf.h"
#include "base/work.h"

struct api {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct work_pool *pool;
    int begun, ended, completed; // calls
};

struct api *fake_api_new(void);
void fake_api_free(struct api *a);
// Waits until so many calls have begun and ended.
void fake_api_wait_begun(struct api *a, int n);
void fake_api_wait_ended(struct api *a, int n);
int fake_api_completed(struct api *a);

#define SIZED_BYTES 300000
char sized_byte(size_t at);

#endif
