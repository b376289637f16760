#include "base/id.h"

#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/random.h>

#include "base/clock.h"

static const char ALPHABET[] = "0123456789abcdefghjkmnpqrstvwxyz"; // Crockford, lower case

static const char *const PREFIX[] = {
    [ID_SANDBOX] = "sbx", [ID_COMMAND] = "cmd", [ID_JOB] = "job",  [ID_SNAPSHOT] = "snp", [ID_IMAGE] = "img",
    [ID_RECEIPT] = "rct", [ID_AUDIT] = "aud",   [ID_PLAN] = "pln", [ID_TOKEN] = "tok",    [ID_EVENT] = "evt",
    [ID_WORKLOAD] = "wkl",
};

const char *id_prefix(enum id_type type)
{
    return PREFIX[type];
}

// 48 bits of time and 80 of randomness; within one millisecond, and while the clock is behind, the randomness counts up.
static void next(uint8_t out[16])
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static uint64_t last_ms;
    static uint8_t last[10];
    const uint64_t now = (uint64_t)clock_wall_ms();
    pthread_mutex_lock(&lock);
    if (now > last_ms) {
        last_ms = now;
        if (getrandom(last, sizeof last, 0) != (ssize_t)sizeof last)
            memset(last, 0, sizeof last);
        last[0] &= 0x7f; // room to count
    } else {
        uint8_t step[4] = {0};
        if (getrandom(step, sizeof step, 0) != (ssize_t)sizeof step)
            step[0] = 1;
        // Adds a random amount, so that one id does not give away its neighbour.
        uint32_t carry = 1u + (uint32_t)(step[0] | step[1] << 8 | step[2] << 16);
        for (int i = 9; i >= 0 && carry; i--) {
            carry += last[i];
            last[i] = (uint8_t)carry;
            carry >>= 8;
        }
    }
    for (int i = 0; i < 6; i++)
        out[i] = (uint8_t)(last_ms >> (40 - 8 * i));
    memcpy(out + 6, last, 10);
    pthread_mutex_unlock(&lock);
}

char *id_new(enum id_type type, char out[static ID_MAX])
{
    uint8_t raw[16];
    next(raw);
    memcpy(out, PREFIX[type], 3);
    // 128 bits in 26 characters of 5 bits: two zero bits lead.
    uint32_t bits = 0;
    int n_bits = 2;
    size_t at = 3;
    for (int i = 0; i < 16; i++) {
        bits = (bits << 8 | raw[i]) & 0xffff;
        n_bits += 8;
        while (n_bits >= 5) {
            out[at++] = ALPHABET[bits >> (n_bits - 5) & 31];
            n_bits -= 5;
        }
    }
    out[ID_LEN] = 0;
    return out;
}

bool id_valid(enum id_type type, const char *text)
{
    return strncmp(text, PREFIX[type], 3) == 0 && strlen(text) == ID_LEN && strspn(text + 3, ALPHABET) == ID_LEN - 3;
}
