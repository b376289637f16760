// The least a guest can do on the product's devices, so that what bench/floor.py times is QEMU and the kernel. A line in
// on the first port, an answer there; bytes of PUT and GET go over the second. Not product code: no frames, no limits.
//   PING            -> EXIT 0                    (round trip, no process)
//   SPAWN path      -> output, EXIT n            (posix_spawn, no shell)
//   PUT bytes path  <- bytes on the second port  -> EXIT 0 once they are written
//   GET path        -> bytes on the second port, EXIT 0
//   anything        -> output of sh -c line, EXIT n
// After the agent of the plain floor (floor.py finds it where it is there); what is added: ext4 disk, two ports, PUT and GET.
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static char block[256 << 10];

static void load_modules(void)
{
    char path[160], name[128];
    FILE *order = fopen("/m/order", "re");
    while (order && fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/m/%s", name);
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        syscall(SYS_finit_module, fd, "", 0);
        close(fd);
    }
}

static void mount_root(void)
{
    static const char *const moved[] = {"dev", "proc", "sys"};
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    load_modules();
    mkdir("/lower", 0755), mkdir("/data", 0755), mkdir("/new", 0755);
    if (mount("/dev/vda", "/lower", "erofs", MS_RDONLY, "") || mount("/dev/vdb", "/data", "ext4", MS_NOATIME, ""))
        _exit(1);
    mkdir("/data/upper", 0755), mkdir("/data/work", 0700);
    if (mount("o", "/new", "overlay", MS_NOATIME, "lowerdir=/lower,upperdir=/data/upper,workdir=/data/work"))
        _exit(2);
    for (int i = 0; i < 3; i++) {
        char from[16], to[24];
        snprintf(from, sizeof from, "/%s", moved[i]);
        snprintf(to, sizeof to, "/new/%s", moved[i]);
        mount(from, to, 0, MS_MOVE, 0);
    }
    if (chdir("/new") || mount(".", "/", 0, MS_MOVE, 0) || chroot(".") || chdir("/"))
        _exit(3);
}

static int open_port(int number)
{
    for (int try = 0; try < 5000; try++, usleep(1000))
        for (int dev = 0; dev < 4; dev++) {
            char path[32];
            snprintf(path, sizeof path, "/dev/vport%dp%d", dev, number);
            const int fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0)
                return fd;
        }
    _exit(4);
}

static void send_all(int fd, const char *data, ssize_t len)
{
    for (ssize_t done = 0; done < len;) {
        const ssize_t n = write(fd, data + done, (size_t)(len - done));
        if (n > 0)
            done += n;
        else
            usleep(100);
    }
}

static int put(int bulk, const char *path, long left)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    while (left > 0) {
        const ssize_t n = read(bulk, block, left < (long)sizeof block ? (size_t)left : sizeof block);
        if (n <= 0) {
            usleep(100);
            continue;
        }
        if (write(fd, block, (size_t)n) != n)
            return 1;
        left -= n;
    }
    return close(fd) != 0;
}

static int get(int bulk, const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (ssize_t n; (n = read(fd, block, sizeof block)) > 0;)
        send_all(bulk, block, n);
    return close(fd) != 0;
}

static int run(int port, const char *line)
{
    const int shell = strncmp(line, "SPAWN ", 6) != 0;
    char *sh_argv[] = {"sh", "-c", (char *)line, 0}, *direct_argv[] = {(char *)line + 6, 0};
    int out[2], status = 0;
    pid_t pid;
    posix_spawn_file_actions_t actions;
    if (pipe2(out, O_CLOEXEC))
        return 127;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_adddup2(&actions, out[1], 2);
    const int failed = posix_spawn(&pid, shell ? "/bin/sh" : line + 6, &actions, 0, shell ? sh_argv : direct_argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(out[1]);
    for (ssize_t n; (n = read(out[0], block, 65536)) > 0;)
        send_all(port, block, n);
    close(out[0]);
    if (failed)
        return 127;
    waitpid(pid, &status, 0);
    return WEXITSTATUS(status);
}

int main(void)
{
    char line[4096], path[4096];
    long bytes;
    mount_root();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    const int port = open_port(1), bulk = open_port(2);
    dprintf(port, "READY\n");
    for (size_t len = 0;;) {
        char c;
        if (read(port, &c, 1) <= 0) {
            usleep(500);
            continue;
        }
        if (c != '\n') {
            if (len < sizeof line - 1)
                line[len++] = c;
            continue;
        }
        line[len] = 0;
        len = 0;
        int status = 0;
        if (sscanf(line, "PUT %ld %4095s", &bytes, path) == 2)
            status = put(bulk, path, bytes);
        else if (sscanf(line, "GET %4095s", path) == 1)
            status = get(bulk, path);
        else if (strcmp(line, "PING") != 0)
            status = run(port, line);
        dprintf(port, "\nEXIT %d\n", status);
    }
}
