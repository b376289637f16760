// airlock image: the content-addressed image directory.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fd.h"
#include "sandbox/images.h"
#include "server/commands.h"

static int usage(FILE *out, int status)
{
    fputs("usage: airlock image add     --image-dir DIR --name NAME --root ROOT.erofs\n"
          "       airlock image runtime --image-dir DIR --kernel FILE --initramfs FILE --kernel-version V\n"
          "       airlock image list    --image-dir DIR\n"
          "       airlock image verify  --image-dir DIR\n"
          "       airlock image remove  --image-dir DIR --name NAME\n"
          "       airlock image prune   --image-dir DIR\n",
          out);
    return status;
}

struct args {
    const char *image_dir, *name, *root, *kernel, *initramfs, *kernel_version;
};

static int parse(int argc, char **argv, struct args *a)
{
    const struct {
        const char *flag;
        const char **to;
    } FLAGS[] = {{"--image-dir", &a->image_dir}, {"--name", &a->name},           {"--root", &a->root},
                 {"--kernel", &a->kernel},       {"--initramfs", &a->initramfs}, {"--kernel-version", &a->kernel_version}};
    for (int i = 0; i < argc; i++) {
        bool known = false;
        for (size_t k = 0; k < sizeof FLAGS / sizeof *FLAGS; k++)
            if (strcmp(argv[i], FLAGS[k].flag) == 0 && i + 1 < argc) {
                *FLAGS[k].to = argv[++i];
                known = true;
                break;
            }
        if (!known) {
            fprintf(stderr, "airlock image: unknown or incomplete argument %s\n", argv[i]);
            return -1;
        }
    }
    return 0;
}

static int fail(const struct err *err)
{
    fprintf(stderr, "airlock image: %s%s%s\n", err->detail, *err->internal ? ": " : "", err->internal);
    if (*err->remedy)
        fprintf(stderr, "  %s\n", err->remedy);
    return 1;
}

static bool print_one(void *arg, const struct image_ref *i)
{
    (void)arg;
    printf("%-16s %s %12llu bytes\n", i->name, i->digest, (unsigned long long)i->bytes);
    return true;
}

static int list(int dirfd)
{
    struct err err = {0};
    struct image_runtime r;
    struct images *im = images_open(dirfd, &err);
    if (!im)
        return fail(&err);
    int failed = images_each(im, print_one, NULL, &err);
    if (!failed && images_runtime(im, &r, &err) == 0)
        printf("%-16s %s (%s)\n%-16s %s\n", "[kernel]", r.kernel_digest, r.kernel_version, "[initramfs]", r.initramfs_digest);
    images_free(im);
    return failed ? fail(&err) : 0;
}

static bool print_check(void *arg, const char *what, const char *digest, bool ok)
{
    (void)arg;
    printf("%-8s %-16s %s\n", ok ? "ok" : "CORRUPT", what, digest);
    return true;
}

int cmd_image(int argc, char **argv)
{
    struct args a = {.image_dir = "var/images"};
    struct err err = {0};
    if (argc < 1 || strcmp(argv[0], "--help") == 0)
        return usage(argc < 1 ? stderr : stdout, argc < 1 ? 2 : 0);
    if (parse(argc - 1, argv + 1, &a) != 0)
        return usage(stderr, 2);
    const char *verb = argv[0];
    const bool writes = strcmp(verb, "add") == 0 || strcmp(verb, "runtime") == 0;
    if (writes && fd_mkdirs(a.image_dir, 0755) != 0) {
        fprintf(stderr, "airlock image: %s: %s\n", a.image_dir, strerror(errno));
        return 1;
    }
    CLEANUP_FD int dirfd = open(a.image_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dirfd < 0) {
        fprintf(stderr, "airlock image: %s: %s\n", a.image_dir, strerror(errno));
        return 1;
    }
    char digest[DIGEST_TEXT_MAX];
    uint64_t bytes = 0;
    if (strcmp(verb, "add") == 0 && a.name && a.root) {
        if (images_add(dirfd, a.name, a.root, digest, &err) != 0)
            return fail(&err);
        printf("%s %s\n", a.name, digest);
    } else if (strcmp(verb, "runtime") == 0 && a.kernel && a.initramfs) {
        if (images_set_runtime(dirfd, a.kernel, a.initramfs, a.kernel_version ? a.kernel_version : "unknown", &err) != 0)
            return fail(&err);
    } else if (strcmp(verb, "list") == 0) {
        return list(dirfd);
    } else if (strcmp(verb, "verify") == 0) {
        return images_verify(dirfd, print_check, NULL, &err) == 0 ? 0 : fail(&err);
    } else if (strcmp(verb, "remove") == 0 && a.name) {
        if (images_remove(dirfd, a.name, &err) != 0)
            return fail(&err);
    } else if (strcmp(verb, "prune") == 0) {
        if (images_prune(dirfd, &bytes, &err) != 0)
            return fail(&err);
        printf("%llu bytes freed\n", (unsigned long long)bytes);
    } else {
        return usage(stderr, 2);
    }
    return 0;
}
