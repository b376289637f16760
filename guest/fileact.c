// What file operations do, with the user's own rights: paths are resolved by the kernel as that user, writes go below
// the writable roots as the kernel sees the directory after all symbolic links, and the last step is relative to a
// descriptor of that directory, so that nothing swapped meanwhile is followed.
// Longer than 600 lines: every operation goes through the same resolving and the same check of the roots, which are static here
// so that none can be written without them.
#include "guest/fileop.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/enc.h"
#include "base/path.h"

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#define NO_MAGICLINKS 0x02ull // RESOLVE_NO_MAGICLINKS, linux/openat2.h
#define LINKS_MAX 40
#define DEPTH_MAX 64

struct how {
    uint64_t flags, mode, resolve;
};

static int open2(int dirfd, const char *path, int flags)
{
    const struct how how = {(uint64_t)(flags | O_CLOEXEC), 0, NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, dirfd, path, &how, sizeof how);
}

// Credentials of this thread alone: the file-system uid takes the matching capabilities with it.
void fileact_credentials(const struct user *u)
{
    static __thread struct user now;
    static __thread bool known;
    if (known && memcmp(&now, u, sizeof now) == 0)
        return;
    known = true;
    memcpy(&now, u, sizeof now);
    syscall(SYS_setfsuid, 0); // back to root's capabilities, to be allowed the rest
    syscall(SYS_setgroups, u->n_groups, u->groups);
    syscall(SYS_setfsgid, u->gid);
    syscall(SYS_setfsuid, u->uid);
}

int fileact_status(int code)
{
    switch (code) {
    case ENOENT:
        return MSG_FILE_NOT_FOUND;
    case EACCES:
    case EPERM:
        return MSG_FILE_PERMISSION;
    case EEXIST:
        return MSG_FILE_EXISTS;
    case ENOTDIR:
        return MSG_FILE_NOT_DIRECTORY;
    case ENOTEMPTY:
        return MSG_FILE_NOT_EMPTY;
    case ENOSPC:
    case EDQUOT:
        return MSG_FILE_NO_SPACE;
    case EROFS:
        return MSG_FILE_READ_ONLY;
    case EISDIR:
        return MSG_FILE_IS_DIRECTORY;
    case ELOOP:
        return MSG_FILE_LOOP;
    case ENAMETOOLONG:
        return MSG_FILE_NAME_TOO_LONG;
    case ENXIO: // a FIFO nobody reads, a socket
        return MSG_FILE_NOT_REGULAR;
    default:
        return MSG_FILE_ERROR;
    }
}

static void close_fd(int *fd)
{
    const int code = errno;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    errno = code;
}

// Where the kernel says a directory is.
static int real_path(int dirfd, char out[static PATH_MAX])
{
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    const ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n <= 0)
        return MSG_FILE_ERROR;
    out[n] = 0;
    return MSG_FILE_OK;
}

int fileop_dir_allowed(int dirfd)
{
    char real[PATH_MAX];
    size_t n;
    const char *const *roots = path_write_roots(&n);
    if (real_path(dirfd, real) != MSG_FILE_OK)
        return MSG_FILE_ERROR;
    return path_below(real, roots, n) ? MSG_FILE_OK : MSG_FILE_OUTSIDE_ROOTS;
}

// ---- parents --------------------------------------------------------------------------------------------------------
// Opens the directory, making missing components as the user where asked for. Those are made below what is there, so
// the first existing ancestor must already be inside the roots.
static int open_dir(const char *path, bool make, int *ret_fd)
{
    int fd = open2(AT_FDCWD, path, O_PATH | O_DIRECTORY);
    if (fd < 0 && errno == ENOENT && make && strcmp(path, "/") != 0) {
        char parent[PATH_MAX];
        snprintf(parent, sizeof parent, "%s", path);
        char *slash = strrchr(parent, '/');
        const char *name = path + (slash - parent) + 1;
        slash[slash == parent] = 0;
        int up = -1;
        const int status = open_dir(parent, true, &up);
        if (status != MSG_FILE_OK)
            return status;
        int made = fileop_dir_allowed(up);
        if (made == MSG_FILE_OK && mkdirat(up, name, 0755) != 0 && errno != EEXIST)
            made = fileact_status(errno);
        if (made == MSG_FILE_OK)
            fd = open2(up, name, O_PATH | O_DIRECTORY | O_NOFOLLOW);
        close_fd(&up);
        if (made != MSG_FILE_OK)
            return made;
    }
    if (fd < 0)
        return fileact_status(errno);
    *ret_fd = fd;
    return MSG_FILE_OK;
}

// Splits path into its directory (opened) and last segment. The root itself has no last segment.
static int open_parent(const char *path, bool make, int *ret_fd, char name[static 256])
{
    char dir[PATH_MAX];
    if (strlen(path) >= sizeof dir || path_fault(path, strlen(path)))
        return MSG_FILE_PATH_INVALID;
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (!slash[1])
        return MSG_FILE_IS_DIRECTORY;
    if (strlen(slash + 1) > 255) {
        errno = ENAMETOOLONG;
        return MSG_FILE_NAME_TOO_LONG;
    }
    snprintf(name, 256, "%s", slash + 1);
    slash[slash == dir] = 0;
    return open_dir(dir, make, ret_fd);
}

// A directory that is not there: whether it would be inside the roots is decided by what is there above it.
static int missing_where(const char *path)
{
    char dir[PATH_MAX];
    snprintf(dir, sizeof dir, "%s", path);
    for (char *slash; (slash = strrchr(dir, '/'));) {
        slash[slash == dir] = 0;
        int fd = open2(AT_FDCWD, dir, O_PATH | O_DIRECTORY);
        if (fd >= 0) {
            const int status = fileop_dir_allowed(fd);
            close_fd(&fd);
            errno = ENOENT;
            return status == MSG_FILE_OUTSIDE_ROOTS ? MSG_FILE_OUTSIDE_ROOTS : MSG_FILE_NOT_FOUND;
        }
        if (slash == dir)
            break;
    }
    return MSG_FILE_NOT_FOUND;
}

int fileop_make_dirs(const char *path)
{
    int fd = -1;
    const int status = strlen(path) < PATH_MAX && !path_fault(path, strlen(path)) ? open_dir(path, true, &fd)
                                                                                  : MSG_FILE_PATH_INVALID;
    close_fd(&fd);
    return status;
}

// As open_parent, but allowed to be written to: follows a final symbolic link by hand to where it points, so that the
// directory that is judged is the one that is used.
static int open_target(const char *path, bool make, bool follow, int *ret_fd, char name[static 256])
{
    char at[PATH_MAX], link[PATH_MAX];
    snprintf(at, sizeof at, "%s", path);
    for (int hops = 0; hops < LINKS_MAX; hops++) {
        int fd = -1;
        int status = open_parent(at, make, &fd, name);
        if (status == MSG_FILE_NOT_FOUND)
            return missing_where(at);
        if (status == MSG_FILE_OK && (status = fileop_dir_allowed(fd)) != MSG_FILE_OK)
            close_fd(&fd);
        if (status != MSG_FILE_OK)
            return status;
        const ssize_t n = follow ? readlinkat(fd, name, link, sizeof link - 1) : -1;
        if (n < 0) {
            *ret_fd = fd;
            return MSG_FILE_OK;
        }
        link[n] = 0;
        char real[PATH_MAX];
        status = real_path(fd, real);
        close_fd(&fd);
        if (status != MSG_FILE_OK)
            return status;
        const int len = link[0] == '/' ? snprintf(at, sizeof at, "%s", link)
                                       : snprintf(at, sizeof at, "%s/%s", strcmp(real, "/") ? real : "", link);
        if (len < 0 || (size_t)len >= sizeof at)
            return MSG_FILE_NAME_TOO_LONG;
        // The link's own text may hold `..` and the like: let the kernel resolve its directory.
        char *slash = strrchr(at, '/');
        if (!slash || !slash[1] || strcmp(slash + 1, "..") == 0 || strcmp(slash + 1, ".") == 0)
            return MSG_FILE_NOT_REGULAR;
        char last[256];
        snprintf(last, sizeof last, "%.255s", slash + 1);
        slash[slash == at] = 0;
        int dir = open2(AT_FDCWD, at, O_PATH | O_DIRECTORY);
        if (dir < 0)
            return fileact_status(errno);
        status = real_path(dir, real);
        close_fd(&dir);
        if (status != MSG_FILE_OK)
            return status;
        if ((size_t)snprintf(at, sizeof at, "%s/%s", strcmp(real, "/") ? real : "", last) >= sizeof at)
            return MSG_FILE_NAME_TOO_LONG;
    }
    errno = ELOOP;
    return MSG_FILE_LOOP;
}

// ---- stat -------------------------------------------------------------------------------------------------------
static uint64_t kind_of(mode_t mode)
{
    return S_ISREG(mode) ? MSG_KIND_FILE : S_ISDIR(mode) ? MSG_KIND_DIRECTORY : S_ISLNK(mode) ? MSG_KIND_SYMLINK
                                                                                              : MSG_KIND_OTHER;
}

static int64_t mtime_ms(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000 + st->st_mtim.tv_nsec / 1000000;
}

static struct slice keep(const char *text)
{
    return (struct slice){(const uint8_t *)text, strlen(text)};
}

static void fill_stat(struct msg_file_result *r, const struct stat *st)
{
    r->kind = kind_of(st->st_mode);
    r->mode = st->st_mode & 07777;
    r->size = (uint64_t)st->st_size;
    r->mtime_ms = mtime_ms(st);
    r->uid = st->st_uid;
    r->gid = st->st_gid;
}

static int do_stat(struct fileop *op, struct msg_file_result *r)
{
    static _Thread_local char owner[64], group[64], target[PATH_MAX];
    struct stat st;
    if (path_fault(op->path, strlen(op->path)))
        return MSG_FILE_PATH_INVALID;
    if (lstat(op->path, &st) != 0)
        return fileact_status(errno);
    fill_stat(r, &st);
    user_name_of(st.st_uid, owner, sizeof owner);
    group_name_of(st.st_gid, group, sizeof group);
    r->owner = keep(owner);
    r->group = keep(group);
    if (S_ISLNK(st.st_mode)) {
        const ssize_t n = readlink(op->path, target, sizeof target - 1);
        target[n > 0 ? n : 0] = 0;
        r->target = keep(target);
    }
    return MSG_FILE_OK;
}

// ---- delete -----------------------------------------------------------------------------------------------------
static int remove_tree(int dirfd, const char *name, dev_t dev, int depth, uint64_t *removed)
{
    struct stat st;
    int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return fileact_status(errno);
    if (depth > DEPTH_MAX || fstat(fd, &st) != 0 || st.st_dev != dev) {
        close_fd(&fd);
        errno = EXDEV;
        return MSG_FILE_ERROR;
    }
    DIR *d = fdopendir(fd);
    if (!d) {
        close_fd(&fd);
        return MSG_FILE_ERROR;
    }
    int status = MSG_FILE_OK;
    for (const struct dirent *e; status == MSG_FILE_OK && (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (unlinkat(fd, e->d_name, 0) == 0)
            (*removed)++;
        else if (errno == EISDIR || errno == EPERM)
            status = remove_tree(fd, e->d_name, dev, depth + 1, removed);
        else if (errno != ENOENT)
            status = fileact_status(errno);
    }
    const int code = errno;
    closedir(d);
    errno = code;
    if (status != MSG_FILE_OK)
        return status;
    if (unlinkat(dirfd, name, AT_REMOVEDIR) != 0)
        return fileact_status(errno);
    (*removed)++;
    return MSG_FILE_OK;
}

static bool is_root(const char *path)
{
    size_t n;
    const char *const *roots = path_write_roots(&n);
    for (size_t i = 0; i < n; i++)
        if (strcmp(path, roots[i]) == 0)
            return true;
    return false;
}

static int do_delete(struct fileop *op, struct msg_file_result *r)
{
    int dir = -1;
    char name[256];
    struct stat st;
    int status = is_root(op->path) ? MSG_FILE_OUTSIDE_ROOTS : open_target(op->path, false, false, &dir, name);
    if (status != MSG_FILE_OK)
        return status;
    memset(&st, 0, sizeof st);
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) != 0)
        status = fileact_status(errno);
    else if (!S_ISDIR(st.st_mode))
        status = unlinkat(dir, name, 0) == 0 ? (r->removed = 1, MSG_FILE_OK) : fileact_status(errno);
    else if (op->recursive)
        status = remove_tree(dir, name, st.st_dev, 0, &r->removed);
    else
        status = unlinkat(dir, name, AT_REMOVEDIR) == 0 ? (r->removed = 1, MSG_FILE_OK) : fileact_status(errno);
    r->kind = kind_of(st.st_mode);
    close_fd(&dir);
    return status;
}

// ---- move, make -------------------------------------------------------------------------------------------------
static int do_move(struct fileop *op, struct msg_file_result *r)
{
    int from = -1, to = -1;
    char from_name[256], to_name[256];
    (void)r;
    if (is_root(op->path) || is_root(op->to))
        return MSG_FILE_OUTSIDE_ROOTS;
    int status = open_target(op->path, false, false, &from, from_name);
    if (status == MSG_FILE_OK)
        status = open_target(op->to, op->mkdirs, false, &to, to_name);
    if (status == MSG_FILE_OK &&
        syscall(SYS_renameat2, from, from_name, to, to_name, op->exclusive ? 1u /* RENAME_NOREPLACE */ : 0u) != 0)
        status = fileact_status(errno);
    close_fd(&from);
    close_fd(&to);
    return status;
}

static int do_mkdir(struct fileop *op, struct msg_file_result *r)
{
    int dir = -1;
    char name[256];
    struct stat st;
    int status = open_target(op->path, op->mkdirs, false, &dir, name);
    if (status != MSG_FILE_OK)
        return status;
    const unsigned mode = op->mode ? op->mode : 0755;
    if (mkdirat(dir, name, mode) == 0) {
        (void)fchmodat(dir, name, mode, 0);
        r->created = true;
    } else if (errno != EEXIST || fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
        status = fileact_status(errno);
    } else if (!S_ISDIR(st.st_mode)) {
        status = MSG_FILE_EXISTS;
    }
    close_fd(&dir);
    return status;
}

static int do_check(struct fileop *op)
{
    int dir = -1;
    char name[256];
    const int status = open_target(op->path, false, true, &dir, name);
    close_fd(&dir);
    return status;
}

int fileact_simple(struct fileop *op, struct msg_file_result *r)
{
    switch ((enum msg_file_op)op->op) {
    case MSG_FILE_STAT:
        return do_stat(op, r);
    case MSG_FILE_DELETE:
        return do_delete(op, r);
    case MSG_FILE_MOVE:
        return do_move(op, r);
    case MSG_DIR_MAKE:
        return do_mkdir(op, r);
    case MSG_FILE_CHECK_WRITE:
        return do_check(op);
    case MSG_FILE_READ:
    case MSG_FILE_WRITE:
    case MSG_DIR_LIST:
        break;
    }
    return MSG_FILE_ERROR;
}

// ---- directories ------------------------------------------------------------------------------------------------
struct list {
    struct fileop *op;
    bool (*emit)(struct fileop *, const struct msg_file_result *, bool);
    struct msg_file_result r;
    char *names[2 * MSG_ENTRIES_MAX];
    size_t n_names, bytes;       // bytes: of the texts in this frame
    uint64_t total;
};

static void list_flush(struct list *l, bool last)
{
    l->emit(l->op, &l->r, last);
    for (size_t i = 0; i < l->n_names; i++)
        free(l->names[i]);
    l->n_names = l->r.n_entries = l->bytes = 0;
}

static struct slice list_keep(struct list *l, char *text)
{
    l->names[l->n_names++] = text;
    l->bytes += text ? strlen(text) : 0;
    return text ? keep(text) : (struct slice){0};
}

static void list_add(struct list *l, int dirfd, const char *prefix, const char *name, const struct stat *st)
{
    struct msg_entry *e = &l->r.entries[l->r.n_entries];
    char *relative = NULL;
    if (asprintf(&relative, "%s%s%s", prefix, *prefix ? "/" : "", name) < 0)
        return;
    if (strlen(relative) > LIMIT_PATH_BYTES) { // nobody could ask for it either
        l->r.truncated = true;
        free(relative);
        return;
    }
    *e = (struct msg_entry){.kind = kind_of(st->st_mode), .mode = st->st_mode & 07777, .size = (uint64_t)st->st_size,
                            .mtime_ms = mtime_ms(st), .uid = st->st_uid, .gid = st->st_gid};
    e->name = list_keep(l, relative);
    if (S_ISLNK(st->st_mode)) {
        char *target = calloc(1, 1024);
        const ssize_t n = target ? readlinkat(dirfd, name, target, 1023) : -1;
        if (n > 0 && enc_utf8_valid(target, (size_t)n))
            e->target = list_keep(l, target);
        else
            free(target);
    }
    l->r.n_entries++;
    l->total++;
    if (l->r.n_entries == MSG_ENTRIES_MAX / 4 || l->bytes > FRAME_PAYLOAD_MAX / 2) // with the rest it must fit one frame
        list_flush(l, false);
}

// A directory, then those in it, as deep as asked. Names that are not UTF-8 cannot be said in JSON and are left out.
static void list_dir(struct list *l, int parent, const char *name, const char *prefix, uint64_t depth)
{
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (*prefix ? O_NOFOLLOW : 0));
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        close_fd(&fd);
        return;
    }
    for (const struct dirent *e; !l->r.truncated && (e = readdir(d));) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            !enc_utf8_valid(e->d_name, strlen(e->d_name)) || fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        if (l->total == l->op->max_entries) {
            l->r.truncated = true;
            break;
        }
        list_add(l, fd, prefix, e->d_name, &st);
        if (depth > 1 && S_ISDIR(st.st_mode)) {
            char *below = NULL;
            if (asprintf(&below, "%s%s%s", prefix, *prefix ? "/" : "", e->d_name) >= 0)
                list_dir(l, fd, e->d_name, below, depth - 1);
            free(below);
        }
    }
    closedir(d);
}

int fileact_list(struct fileop *op, bool (*emit)(struct fileop *, const struct msg_file_result *, bool last))
{
    struct stat st;
    if (path_fault(op->path, strlen(op->path)))
        return MSG_FILE_PATH_INVALID;
    int probe = open(op->path, O_RDONLY | O_DIRECTORY | O_NONBLOCK | O_CLOEXEC);
    if (probe < 0)
        return errno == ENOTDIR && stat(op->path, &st) != 0 ? fileact_status(errno) : fileact_status(errno);
    close_fd(&probe);
    struct list *l = calloc(1, sizeof *l);
    if (!l)
        return MSG_FILE_ERROR;
    l->op = op;
    l->emit = emit;
    if (op->max_entries == 0 || op->max_entries > LIMIT_DIR_ENTRIES)
        op->max_entries = LIMIT_DIR_ENTRIES;
    list_dir(l, AT_FDCWD, op->path, "", op->depth < 1 ? 1 : op->depth > DEPTH_MAX ? DEPTH_MAX : op->depth);
    list_flush(l, true);
    free(l);
    return MSG_FILE_OK;
}

// ---- streams ----------------------------------------------------------------------------------------------------
int fileact_open_read(struct fileop *op, struct msg_file_result *r)
{
    struct stat st = {0};
    if (path_fault(op->path, strlen(op->path)))
        return MSG_FILE_PATH_INVALID;
    op->fd = open2(AT_FDCWD, op->path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (op->fd < 0)
        return fileact_status(errno);
    if (fstat(op->fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close_fd(&op->fd);
        errno = 0;
        return S_ISDIR(st.st_mode) ? MSG_FILE_IS_DIRECTORY : MSG_FILE_NOT_REGULAR;
    }
    fill_stat(r, &st);
    if (op->offset > 0 && op->offset >= (uint64_t)st.st_size) {
        close_fd(&op->fd);
        errno = 0;
        return MSG_FILE_RANGE;
    }
    op->end = op->length ? op->length : UINT64_MAX;
    // A size is a promise to the client: no more than that is sent, even when the file grows. Files of /proc and the like
    // say 0 and are read to their end.
    if (st.st_size > 0 && op->end > (uint64_t)st.st_size - op->offset)
        op->end = (uint64_t)st.st_size - op->offset;
    return MSG_FILE_OK;
}

int fileact_open_write(struct fileop *op)
{
    struct stat st;
    int status = open_target(op->path, op->mkdirs, !op->exclusive, &op->dirfd, op->name);
    if (status != MSG_FILE_OK)
        return status;
    op->existed = fstatat(op->dirfd, op->name, &st, AT_SYMLINK_NOFOLLOW) == 0;
    if (op->existed && op->exclusive)
        status = MSG_FILE_EXISTS;
    else if (op->existed && !S_ISREG(st.st_mode))
        status = S_ISDIR(st.st_mode) ? MSG_FILE_IS_DIRECTORY : MSG_FILE_NOT_REGULAR;
    op->old_mode = op->existed ? st.st_mode & 07777 : 0644;
    // Replacing a file needs the right to write it, as writing into it would.
    if (status == MSG_FILE_OK && op->existed && op->user.uid != 0) {
        const int test = openat(op->dirfd, op->name, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (test < 0)
            status = fileact_status(errno);
        else
            close(test);
    }
    if (status == MSG_FILE_OK) {
        snprintf(op->temporary, sizeof op->temporary, ".airlock-%llx.tmp", (unsigned long long)op->id);
        op->fd = openat(op->dirfd, op->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (op->fd < 0) {
            status = fileact_status(errno);
            op->temporary[0] = 0;
        }
    }
    if (status != MSG_FILE_OK)
        fileact_discard(op);
    return status;
}

int fileact_commit(struct fileop *op, struct msg_file_result *r)
{
    if (fchmod(op->fd, op->mode ? op->mode : op->old_mode) != 0)
        return fileact_status(errno);
    // No fsync: the sandbox's disk lives as long as the sandbox, and the host's page cache outlives the guest.
    if (syscall(SYS_renameat2, op->dirfd, op->temporary, op->dirfd, op->name, op->exclusive ? 1u : 0u) != 0)
        return fileact_status(errno);
    op->temporary[0] = 0;
    r->created = !op->existed;
    r->size = op->at;
    r->kind = MSG_KIND_FILE;
    return MSG_FILE_OK;
}

void fileact_discard(struct fileop *op)
{
    const int code = errno;
    if (op->temporary[0] && op->dirfd >= 0)
        (void)unlinkat(op->dirfd, op->temporary, 0);
    op->temporary[0] = 0;
    close_fd(&op->fd);
    close_fd(&op->dirfd);
    errno = code;
}
