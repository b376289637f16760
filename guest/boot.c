// From the initramfs to a root: modules, devices, the read-only image under a writable overlay.
#include "guest/agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

char boot_timings[256];

static void phase(const char *name)
{
    static int64_t last;
    const int64_t now = clock_mono_us();
    const size_t n = strlen(boot_timings);
    snprintf(boot_timings + n, sizeof boot_timings - n, "%s%s %lld", n ? ", " : "", name,
             (long long)((now - last) / 1000));
    last = now;
}

static void load(const char *name)
{
    char path[160];
    snprintf(path, sizeof path, "/m/%s", name);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return; // built into the kernel
    syscall(SYS_finit_module, fd, "", 0);
    close(fd);
}

// One file name per line, in load order.
static void load_modules(void)
{
    char text[4096];
    const int fd = open("/m/order", O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return;
    text[n] = 0;
    char *save;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        load(line);
}

void boot_early(void)
{
    phase("kernel");
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    load_modules();
    phase("modules");
}

// The block device with that serial number.
static bool find_disk(const char *serial, char out[static 32])
{
    for (char letter = 'a'; letter <= 'd'; letter++) {
        char path[64], text[32] = "";
        snprintf(path, sizeof path, "/sys/block/vd%c/serial", letter);
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        const ssize_t n = read(fd, text, sizeof text - 1);
        close(fd);
        if (n > 0 && strncmp(text, serial, strlen(serial)) == 0) {
            snprintf(out, 32, "/dev/vd%c", letter);
            return true;
        }
    }
    return false;
}

static const char *mount_parts(void)
{
    char device[32];
    mkdir("/lower", 0755);
    mkdir("/data", 0755);
    mkdir("/new", 0755);
    if (!find_disk("root", device))
        return "root: the image's device is missing";
    if (mount(device, "/lower", "erofs", MS_RDONLY | MS_NOATIME, "") != 0)
        return "root: the image cannot be mounted";
    if (!find_disk("data", device))
        return "data: the writable disk is missing";
    // noinit_itable: the disk is sparse and its inode tables are zeros; a thread that wrote
    // them would fill each fork's copy. Nor does one read ahead what a fork never asks for.
    if (mount(device, "/data", "ext4", MS_NOATIME | MS_NODEV, "errors=remount-ro,noinit_itable,no_prefetch_block_bitmaps") != 0)
        return "data: the writable disk cannot be mounted";
    mkdir("/data/upper", 0755);
    mkdir("/data/work", 0700);
    phase("disks");
    if (mount("overlay", "/new", "overlay", MS_NOATIME, "lowerdir=/lower,upperdir=/data/upper,workdir=/data/work") != 0)
        return "overlay: the root cannot be put together";
    return NULL;
}

const char *boot_root(void)
{
    static const char *const MOVED[] = {"dev", "proc", "sys"};
    const char *fault = mount_parts();
    if (fault)
        return fault;
    for (size_t i = 0; i < 3; i++) {
        char from[16], to[24];
        snprintf(from, sizeof from, "/%s", MOVED[i]);
        snprintf(to, sizeof to, "/new/%s", MOVED[i]);
        mkdir(to, 0755);
        if (mount(from, to, NULL, MS_MOVE, NULL) != 0)
            return "overlay: the kernel's file systems cannot be moved";
    }
    if (chdir("/new") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        return "overlay: the root cannot be entered";
    phase("root");
    return NULL;
}

static void loopback_up(void)
{
    struct ifreq r = {0};
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    strcpy(r.ifr_name, "lo");
    if (ioctl(fd, SIOCGIFFLAGS, &r) == 0) {
        r.ifr_flags |= IFF_UP | IFF_RUNNING;
        ioctl(fd, SIOCSIFFLAGS, &r);
    }
    close(fd);
}

void boot_finish(void)
{
    struct user u;
    mkdir("/run", 0755);
    mount("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=16m");
    mkdir("/dev/pts", 0755);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5");
    mkdir("/dev/shm", 01777);
    mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    (void)!symlink("/proc/self/fd", "/dev/fd");
    (void)!symlink("/proc/self/fd/0", "/dev/stdin");
    (void)!symlink("/proc/self/fd/1", "/dev/stdout");
    (void)!symlink("/proc/self/fd/2", "/dev/stderr");
    loopback_up();
    if (mkdir("/work", 0755) == 0 && user_find("sandbox", 7, &u) == 0)
        (void)!chown("/work", u.uid, u.gid);
    mkdir("/tmp", 01777);
    refresh_prepare();
    phase("rest");
}

void boot_hostname(const char *name, size_t len)
{
    if (len > 0 && len <= HOSTNAME_LEN_MAX)
        sethostname(name, len);
}

// Everybody goes, what was written reaches the disk, the machine ends.
void boot_shutdown(void)
{
    kill(-1, SIGTERM);
    for (int i = 0; i < 50; i++) {
        if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
            break;
        usleep(20000);
    }
    kill(-1, SIGKILL);
    sync();
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT); // no power to turn off: -no-reboot ends QEMU as well
    for (;;)
        pause();
}
