// airlock doctor: what this host has, what is missing, and what to do about it.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "base/fd.h"
#include "qemu/host.h"
#include "sandbox/crash.h"
#include "sandbox/images.h"
#include "server/commands.h"

static const char *word(int verdict)
{
    return verdict == HOST_OK ? "ok  " : verdict == HOST_WARN ? "warn" : "FAIL";
}

static int images_check(const char *dir)
{
    struct err err = {0};
    struct image_runtime r;
    struct image_ref image;
    CLEANUP_FD int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct images *im = fd >= 0 ? images_open(fd, &err) : NULL;
    const bool ok = im && images_runtime(im, &r, &err) == 0 && images_resolve(im, "debian", &image, &err) == 0;
    if (ok)
        printf("ok   images       kernel %s, image debian\n", r.kernel_version);
    else
        printf("FAIL images       %s: %s; build them with ./quickstart or docker/guest/build\n", dir,
               fd < 0 ? "no such directory" : err.detail);
    images_free(im);
    return ok ? 0 : 1;
}

// Where a test build (-DAIRLOCK_CRASH_POINTS=ON) can be told to end by AIRLOCK_CRASH_AT.
static int stages(void)
{
    for (const char *const *at = CRASH_STAGES; *at; at++)
        puts(*at);
    if (!crash_points_built())
        fputs("this build does not honour AIRLOCK_CRASH_AT: configure with -DAIRLOCK_CRASH_POINTS=ON\n", stderr);
    return 0;
}

int cmd_doctor(int argc, char **argv)
{
    const char *image_dir = "var/images", *qemu = NULL;
    bool allow_emulation = false;
    struct host_facts facts;
    struct host_check checks[HOST_CHECKS_MAX];
    struct err err = {0};
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--image-dir") == 0 && i + 1 < argc) {
            image_dir = argv[++i];
        } else if (strcmp(argv[i], "--qemu") == 0 && i + 1 < argc) {
            qemu = argv[++i];
        } else if (strcmp(argv[i], "--stages") == 0) {
            return stages();
        } else if (strcmp(argv[i], "--allow-emulation") == 0) {
            allow_emulation = true;
        } else {
            const bool help = strcmp(argv[i], "--help") == 0;
            fputs("usage: airlock doctor [--image-dir DIR] [--qemu PATH] [--allow-emulation] [--stages]\n", help ? stdout : stderr);
            return help ? 0 : 2;
        }
    }
    if (host_facts_read(qemu, &facts, &err) != 0) {
        fprintf(stderr, "airlock doctor: %s %s\n", err.detail, err.internal);
        return 1;
    }
    int bad = 0;
    const int n = host_checks(&facts, allow_emulation, checks);
    for (int i = 0; i < n; i++) {
        printf("%s %-12s %s\n", word(checks[i].verdict), checks[i].name, checks[i].text);
        bad += checks[i].verdict == HOST_FAIL;
    }
    bad += images_check(image_dir);
    puts(bad ? "something that is needed is missing" : "ready");
    return bad ? 1 : 0;
}
