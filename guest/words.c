// What a command is started with: its arguments, environment and directory as the kernel takes them. Main thread only.
#include "guest/agent.h"

#include <string.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// The words of one command, until its exec: a message's text fits, and what words_env adds. No allocator: in a guest that was
// forked a moment ago each path through one is translated anew.
static struct {
    char text[FRAME_PAYLOAD_MAX + 4096];
    size_t used;
    char *argv[MSG_ARGS_MAX + 1], *envp[MSG_ARGS_MAX + 7];
} words;

void words_begin(void)
{
    words.used = 0;
}

// a, then b. NULL when it does not fit.
static char *word_new(struct slice a, struct slice b)
{
    char *to = words.text + words.used;
    if (a.len + b.len + 1 > sizeof words.text - words.used)
        return NULL;
    if (a.len)
        memcpy(to, a.data, a.len);
    if (b.len)
        memcpy(to + a.len, b.data, b.len);
    to[a.len + b.len] = 0;
    words.used += a.len + b.len + 1;
    return to;
}

static struct slice slice_of(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

char *words_text(struct slice s)
{
    return word_new(s, (struct slice){0});
}

char **words_argv(const struct msg_run *m)
{
    for (size_t i = 0; i < m->n_args; i++)
        words.argv[i] = words_text(m->args[i]);
    words.argv[m->n_args] = NULL;
    return words.argv;
}

static bool has_key(char **list, size_t n, const char *key)
{
    const size_t len = strlen(key);
    for (size_t i = 0; i < n; i++)
        if (list[i] && strncmp(list[i], key, len) == 0)
            return true;
    return false;
}

// The command's own variables, then what a login would have set and it did not.
char **words_env(const struct msg_run *m, const struct user *u, const char **ret_path)
{
    const char *const plain[6][2] = {{"PATH=", DEFAULT_PATH}, {"HOME=", u->home}, {"USER=", u->name},
                                     {"LOGNAME=", u->name}, {"SHELL=", u->shell}, {"LANG=", "C.UTF-8"}};
    size_t n = 0;
    for (size_t i = 0; i < m->n_env; i++)
        if (memchr(m->env[i].data, '=', m->env[i].len))
            words.envp[n++] = words_text(m->env[i]);
    for (size_t i = 0; i < 6; i++)
        if (!has_key(words.envp, n, plain[i][0]))
            words.envp[n++] = word_new(slice_of(plain[i][0]), slice_of(plain[i][1]));
    words.envp[n] = NULL;
    *ret_path = DEFAULT_PATH;
    for (size_t i = 0; i < n; i++)
        if (words.envp[i] && strncmp(words.envp[i], "PATH=", 5) == 0)
            *ret_path = words.envp[i] + 5;
    return words.envp;
}
