#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/enc.h"
#include "base/fd.h"
#include "store/verify_int.h"

#define PEM_BEGIN "-----BEGIN PUBLIC KEY-----"
#define PEM_FILE_MAX (256u << 10)

int trust_add_pem(struct trust *t, const char *pem, unsigned uses)
{
    uint8_t hash[SHA256_BYTES];
    struct trusted key = {.uses = uses};
    if (crypto_public_from_pem(pem, key.pub) != 0)
        return -1;
    crypto_sha256(key.pub, sizeof key.pub, hash);
    enc_hex(hash, 8, key.id); // as sign_key_id
    struct trusted *more = realloc(t->keys, (t->n + 1) * sizeof *more);
    if (!more)
        return -1;
    t->keys = more;
    t->keys[t->n++] = key;
    return 0;
}

int trust_load_file(struct trust *t, const char *path)
{
    CLEANUP_BUF struct buf text = BUF_INIT(PEM_FILE_MAX);
    if (fd_read_file(AT_FDCWD, path, &text) != 0)
        return -1;
    for (const char *p = buf_text(&text); (p = strstr(p, PEM_BEGIN)); p += sizeof PEM_BEGIN - 1)
        if (trust_add_pem(t, p, KEY_RECEIPT | KEY_CHECKPOINT) != 0)
            return -1;
    return t->n > 0 ? 0 : -1;
}

static void add_file(struct trust *t, int dirfd, const char *name)
{
    CLEANUP_BUF struct buf text = BUF_INIT(PEM_FILE_MAX);
    const size_t len = strlen(name);
    const unsigned uses = strncmp(name, "receipt", 7) == 0      ? KEY_RECEIPT
                          : strncmp(name, "checkpoint", 10) == 0 ? KEY_CHECKPOINT
                                                                 : 0;
    if (uses && len > 8 && strcmp(name + len - 8, ".pub.pem") == 0 && fd_read_file(dirfd, name, &text) == 0)
        (void)trust_add_pem(t, buf_text(&text), uses);
}

int trust_load_dir(struct trust *t, int state_dirfd)
{
    const int fd = openat(state_dirfd, "keys", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    for (struct dirent *e; (e = readdir(dir));)
        add_file(t, fd, e->d_name);
    closedir(dir);
    return t->n > 0 ? 0 : -1;
}

const struct trusted *trust_find(const struct trust *t, enum key_use use, const char *id)
{
    for (size_t i = 0; i < t->n; i++)
        if ((t->keys[i].uses & use) && strcmp(t->keys[i].id, id) == 0)
            return &t->keys[i];
    return NULL;
}

void trust_free(struct trust *t)
{
    free(t->keys);
    *t = (struct trust){0};
}
