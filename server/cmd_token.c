// airlock token: creates, lists and revokes tokens of a running server, over its own API, with the admin token of its state
// directory. The database has one owner, and that is the server.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fd.h"
#include "base/json.h"
#include "server/commands.h"

static int usage(FILE *out, int status)
{
    fputs("usage: airlock token create --name NAME --scopes a,b,c [--tenant T] [--expires-in-seconds N] [--state-dir DIR]\n"
          "       airlock token list   [--state-dir DIR]\n"
          "       airlock token revoke --id ID [--state-dir DIR]\n\n"
          "scopes: sandbox:read sandbox:write command:run command:root files:read files:write audit:read admin\n",
          out);
    return status;
}

struct args {
    const char *state_dir, *name, *scopes, *tenant, *expires, *id;
};

static int parse(int argc, char **argv, struct args *a)
{
    const struct {
        const char *flag;
        const char **to;
    } FLAGS[] = {{"--state-dir", &a->state_dir}, {"--name", &a->name}, {"--scopes", &a->scopes}, {"--tenant", &a->tenant},
                 {"--expires-in-seconds", &a->expires}, {"--id", &a->id}};
    for (int i = 0; i < argc; i++) {
        bool known = false;
        for (size_t k = 0; k < sizeof FLAGS / sizeof *FLAGS && !known; k++)
            if (strcmp(argv[i], FLAGS[k].flag) == 0 && i + 1 < argc) {
                *FLAGS[k].to = argv[++i];
                known = true;
            }
        if (!known) {
            fprintf(stderr, "airlock token: unknown or incomplete argument %s\n", argv[i]);
            return -1;
        }
    }
    return 0;
}

static int read_small(const char *dir, const char *name, char *out, size_t cap)
{
    char path[1200];
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    snprintf(path, sizeof path, "%.1024s/%s", dir, name);
    if (fd_read_file(AT_FDCWD, path, &b) != 0) {
        fprintf(stderr, "airlock token: %s: %s (is the server running with this state directory?)\n", path, strerror(errno));
        return -1;
    }
    snprintf(out, cap, "%s", buf_text(&b));
    out[strcspn(out, "\r\n")] = 0;
    return 0;
}

static int dial(const char *listen)
{
    char host[64];
    const char *colon = strrchr(listen, ':');
    struct sockaddr_in v4 = {.sin_family = AF_INET};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6};
    if (!colon)
        return -1;
    snprintf(host, sizeof host, "%.*s", (int)(colon - listen), listen);
    const uint16_t port = htons((uint16_t)atoi(colon + 1));
    v4.sin_port = v6.sin6_port = port;
    if (inet_pton(AF_INET, host, &v4.sin_addr) == 1) {
        const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        return fd >= 0 && connect(fd, (struct sockaddr *)&v4, sizeof v4) == 0 ? fd : -1;
    }
    host[strcspn(host, "]")] = 0;
    if (inet_pton(AF_INET6, host + (host[0] == '['), &v6.sin6_addr) != 1)
        return -1;
    const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return fd >= 0 && connect(fd, (struct sockaddr *)&v6, sizeof v6) == 0 ? fd : -1;
}

// One request, one answer, connection closed. Status, or -1; the body (after the headers) is at *ret_body in out.
static int call(const struct args *a, const char *method, const char *path, const char *body, struct buf *out,
                const char **ret_body)
{
    char token[128], listen[128];
    if (read_small(a->state_dir, "token", token, sizeof token) != 0 || read_small(a->state_dir, "listen", listen, sizeof listen) != 0)
        return -1;
    CLEANUP_FD int fd = dial(listen);
    CLEANUP_BUF struct buf request = BUF_INIT(65536);
    buf_addf(&request, "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nConnection: close\r\n", method, path, listen, token);
    if (body)
        buf_addf(&request, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
    buf_addf(&request, "\r\n%s", body ? body : "");
    if (fd < 0 || fd_write_full(fd, request.data, request.len) != 0) {
        fprintf(stderr, "airlock token: the server at %s does not answer\n", listen);
        return -1;
    }
    char chunk[4096];
    for (ssize_t n; (n = read(fd, chunk, sizeof chunk)) > 0;)
        buf_add(out, chunk, (size_t)n);
    const char *end = strstr(buf_text(out), "\r\n\r\n");
    int status = -1;
    sscanf(buf_text(out), "HTTP/1.1 %d", &status);
    *ret_body = end ? end + 4 : "";
    return status;
}

static json_t *scopes_of(const char *text)
{
    json_t *list = json_array();
    char copy[512];
    snprintf(copy, sizeof copy, "%s", text);
    char *save = NULL;
    for (char *one = strtok_r(copy, ", ", &save); one; one = strtok_r(NULL, ", ", &save))
        json_array_append_new(list, json_string(one));
    return list;
}

static int finish(int status, const char *body)
{
    if (status < 0)
        return 1;
    puts(body);
    return status < 400 ? 0 : 1;
}

int cmd_token(int argc, char **argv)
{
    struct args a = {.state_dir = "var/state"};
    CLEANUP_BUF struct buf out = BUF_INIT(1 << 20);
    const char *body = "";
    if (argc < 1 || strcmp(argv[0], "--help") == 0)
        return usage(argc < 1 ? stderr : stdout, argc < 1 ? 2 : 0);
    if (parse(argc - 1, argv + 1, &a) != 0)
        return usage(stderr, 2);
    if (strcmp(argv[0], "list") == 0)
        return finish(call(&a, "GET", "/v1/tokens", NULL, &out, &body), body);
    if (strcmp(argv[0], "revoke") == 0 && a.id) {
        char path[128];
        snprintf(path, sizeof path, "/v1/tokens/%.64s", a.id);
        return finish(call(&a, "DELETE", path, NULL, &out, &body), body);
    }
    if (strcmp(argv[0], "create") != 0 || !a.name || !a.scopes)
        return usage(stderr, 2);
    CLEANUP_JSON json_t *o = json_object();
    json_put_str(o, "name", a.name);
    json_put(o, "scopes", scopes_of(a.scopes));
    if (a.tenant)
        json_put_str(o, "tenant", a.tenant);
    if (a.expires)
        json_put_int(o, "expires_in_seconds", strtoll(a.expires, NULL, 10));
    CLEANUP_FREE char *text = json_dumps(o, JSON_COMPACT);
    return finish(call(&a, "POST", "/v1/tokens", text, &out, &body), body);
}
