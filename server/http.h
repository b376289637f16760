// http.h - the HTTP listener: libmicrohttpd behind api.h. Owns the daemon, its connections and their deadlines. Contains no
// decision about requests but the few that HTTP itself demands. docs/http.md says what the library does on its own.
#ifndef AIRLOCK_SERVER_HTTP_H
#define AIRLOCK_SERVER_HTTP_H

#include <stdbool.h>

#include "api/api.h"
#include "base/err.h"

struct http;

struct http_options {
    const char *address;      // "127.0.0.1", "::1"
    unsigned port;            // 0: any
    unsigned threads;         // of the pool
    struct api *api;          // borrowed
};

// Binds and serves. Errors: internal with the reason (address in use …).
struct http *http_start(const struct http_options *options, struct err *err);
unsigned http_port(const struct http *h);
unsigned http_connections(const struct http *h);
// No new connections; those that are there end with their request.
void http_quiesce(struct http *h);
void http_stop(struct http *h); // all calls have ended after it; accepts NULL

#endif
