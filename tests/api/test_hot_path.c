// GET /v1/sandboxes/{id} is answered inside api_begin. With an argument, test_hot_path SECONDS, it also says what that
// costs: begin, answer, end, in one thread, with token, validation and metrics; nanoseconds per call.
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

static const char *auth;

static const char *header_of(void *arg, const char *name)
{
    (void)arg;
    return strcmp(name, "Authorization") == 0 ? auth : NULL;
}

static void no_wake(void *arg)
{
    (void)arg;
}

static void measure(struct world *w, const char *label, const char *path, double seconds)
{
    const struct api_request req = {.method = "GET", .path = path, .query = "", .remote = "127.0.0.1", .content_length = -1,
                                    .header = header_of};
    const int64_t begin = clock_mono_us(), until = begin + (int64_t)(seconds * 1e6);
    uint64_t n = 0, bytes = 0;
    while (clock_mono_us() < until)
        for (int i = 0; i < 1000; i++, n++) {
            struct api_call *c = api_begin(w->api, &req, no_wake, NULL);
            api_body_end(c);
            const struct api_response *r = api_response(c);
            if (!r || r->status != 200) {
                fprintf(stderr, "%s: not answered in place\n", label);
                exit(1);
            }
            bytes += r->body_len;
            api_call_end(c, true);
        }
    const double us = (double)(clock_mono_us() - begin);
    printf("%-24s %7.0f ns/call  %9.0f calls/s  %6.0f bytes each\n", label, us * 1000 / (double)n, (double)n / us * 1e6,
           (double)bytes / (double)n);
}

int main(int argc, char **argv)
{
    const double seconds = argc > 1 ? atof(argv[1]) : 0.05;
    struct world *w = world_new();
    char id[ID_MAX], text[96], path[64];
    make_sandbox(w, NULL, id);
    snprintf(text, sizeof text, "Bearer %s", w->admin);
    snprintf(path, sizeof path, "/v1/sandboxes/%s", id);
    auth = text;
    measure(w, "GET /v1/sandboxes/{id}", path, seconds);
    measure(w, "GET /healthz", "/healthz", seconds);
    world_free(w);
    return 0;
}
