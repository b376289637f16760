// Names of the guest's users, read from its own /etc/passwd and /etc/group, bounded, again when they changed.
#include "guest/agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"

#define FILE_MAX_BYTES (1u << 20)

struct cached {
    const char *path;
    struct stat st;
    char *text;
};

static struct cached passwd = {.path = "/etc/passwd"}, group = {.path = "/etc/group"};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
           a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static const char *text_of(struct cached *c)
{
    struct stat st;
    if (stat(c->path, &st) != 0) {
        free(c->text);
        *c = (struct cached){.path = c->path};
        return "";
    }
    if (c->text && same_file(&st, &c->st))
        return c->text;
    struct buf b = BUF_INIT(FILE_MAX_BYTES);
    if (!S_ISREG(st.st_mode) || fd_read_file(AT_FDCWD, c->path, &b) != 0) {
        buf_free(&b);
        return "";
    }
    free(c->text);
    c->text = buf_steal(&b);
    c->st = st;
    return c->text ? c->text : "";
}

// Field i of a colon-separated line into out. False when it is missing or too long.
static bool field(const char *line, size_t len, int i, char *out, size_t cap)
{
    const char *end = line + len;
    for (; i > 0; i--) {
        line = memchr(line, ':', (size_t)(end - line));
        if (!line)
            return false;
        line++;
    }
    const char *stop = memchr(line, ':', (size_t)(end - line));
    const size_t n = (size_t)((stop ? stop : end) - line);
    if (n >= cap)
        return false;
    memcpy(out, line, n);
    out[n] = 0;
    return true;
}

static const char *next_line(const char **at, size_t *ret_len)
{
    const char *line = *at;
    if (!*line)
        return NULL;
    const char *nl = strchr(line, '\n');
    *ret_len = nl ? (size_t)(nl - line) : strlen(line);
    *at = nl ? nl + 1 : line + *ret_len;
    return line;
}

static bool listed(const char *members, const char *name)
{
    const size_t n = strlen(name);
    for (const char *at = members; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == 0))
            return true;
    }
    return false;
}

// A number of passwd or group: digits alone, within 32 bits, and not the id that stands for none. What is anything else
// must not be read as 0, which is root.
static bool id_of(const char *text, unsigned *ret)
{
    char *end;
    errno = 0;
    const unsigned long n = strtoul(text, &end, 10);
    if (!*text || strspn(text, "0123456789") != strlen(text) || *end || errno != 0 || n >= UINT32_MAX)
        return false;
    *ret = (unsigned)n;
    return true;
}

static void fill_groups(struct user *u)
{
    const char *at = text_of(&group), *line;
    size_t len;
    u->groups[u->n_groups++] = u->gid;
    while ((line = next_line(&at, &len)) && u->n_groups < USER_GROUPS_MAX) {
        char gid[16], members[1024];
        if (!field(line, len, 2, gid, sizeof gid) || !field(line, len, 3, members, sizeof members))
            continue;
        unsigned g;
        if (id_of(gid, &g) && g != u->gid && *members && listed(members, u->name))
            u->groups[u->n_groups++] = g;
    }
}

// The last one that was found, while both files are as they were then.
static struct {
    struct user user;
    struct stat passwd, group;
} last;

static bool known(const char *name, size_t len, struct user *ret)
{
    if (strlen(last.user.name) != len || memcmp(last.user.name, name, len) != 0 || !same_file(&last.passwd, &passwd.st) ||
        !same_file(&last.group, &group.st))
        return false;
    *ret = last.user;
    return true;
}

int user_find(const char *name, size_t name_len, struct user *ret)
{
    bool found = false;
    memset(ret, 0, sizeof *ret);
    if (name_len == 0 || name_len >= sizeof ret->name || memchr(name, ':', name_len) || memchr(name, '\n', name_len))
        return -1;
    pthread_mutex_lock(&lock);
    const char *at = text_of(&passwd), *line;
    size_t len;
    (void)text_of(&group);
    if (known(name, name_len, ret)) {
        pthread_mutex_unlock(&lock);
        return 0;
    }
    while (!found && (line = next_line(&at, &len))) {
        char uid[16], gid[16];
        found = len > name_len && line[name_len] == ':' && memcmp(line, name, name_len) == 0 &&
                field(line, len, 0, ret->name, sizeof ret->name) && field(line, len, 2, uid, sizeof uid) &&
                field(line, len, 3, gid, sizeof gid) && field(line, len, 5, ret->home, sizeof ret->home) &&
                field(line, len, 6, ret->shell, sizeof ret->shell) && id_of(uid, &ret->uid) && id_of(gid, &ret->gid);
    }
    if (!found && name_len == 4 && memcmp(name, "root", 4) == 0) { // an image without a passwd still has a root
        memcpy(ret->name, "root", 5);
        memcpy(ret->home, "/", 2);
        memcpy(ret->shell, "/bin/sh", 8);
        ret->uid = ret->gid = 0;
        found = true;
    }
    if (found) {
        fill_groups(ret);
        last.user = *ret;
        last.passwd = passwd.st;
        last.group = group.st;
    }
    pthread_mutex_unlock(&lock);
    return found ? 0 : -1;
}

static void name_of(struct cached *c, unsigned id, char *out, size_t cap)
{
    *out = 0;
    pthread_mutex_lock(&lock);
    const char *at = text_of(c), *line;
    size_t len;
    while ((line = next_line(&at, &len))) {
        char number[16];
        unsigned n;
        if (field(line, len, 2, number, sizeof number) && id_of(number, &n) && n == id &&
            field(line, len, 0, out, cap))
            break;
        *out = 0;
    }
    pthread_mutex_unlock(&lock);
}

void user_name_of(uid_t uid, char *out, size_t cap)
{
    name_of(&passwd, uid, out, cap);
}

void group_name_of(gid_t gid, char *out, size_t cap)
{
    name_of(&group, gid, out, cap);
}
