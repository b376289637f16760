// What the children of a live fork continue from: one moment of the source, in memory and in files without a name.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sandbox/cold.h"

// Memory of the moment: the base's pages were copied before it, the changed ones are put over them now.
static int put_pages(struct origin *o, const struct moment *mo, struct err *err)
{
    uint8_t *map = mmap(NULL, o->ram_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, o->ram_fd, 0);
    const uint8_t *from = mo->capture.pages;
    if (map == MAP_FAILED)
        return err_sys(err, errno, "mapping a fork's memory");
    for (size_t i = 0; i < mo->capture.runs.n; i++) {
        const struct ram_run *r = &mo->capture.runs.v[i];
        memcpy(map + r->offset, from, r->pages * RAM_PAGE);
        from += r->pages * RAM_PAGE;
    }
    munmap(map, o->ram_bytes);
    return ram_seal(o->ram_fd, err);
}

// The memory that the source itself began with: what it shares with others.
static int copy_base(struct sandbox *s, struct origin *o, struct err *err)
{
    struct base b = {0};
    struct origin *base = NULL;
    if (base_of(s, &b, err) != 0)
        return -1;
    CLEANUP_JSON json_t *mismatches = json_array();
    snprintf(o->template_key, sizeof o->template_key, "%s", b.template_key);
    snprintf(o->template_manifest, sizeof o->template_manifest, "%s", b.template_manifest);
    int failed = 0;
    if (*b.template_key)
        failed = origin_base(s->m, b.template_key, b.template_manifest, &base, mismatches, err);
    base_free(&b);
    if (!failed)
        failed = saved_refuse(mismatches, err);
    if (base)
        failed = ram_copy(base->ram_fd, o->ram_fd, o->ram_bytes, err);
    origin_unref(s->m, base);
    return failed;
}

// Files without a name: they end with the last descriptor.
static int unnamed(struct manager *m, struct err *err)
{
    const int fd = openat(m->sandboxes_dirfd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    return fd >= 0 ? fd : err_sys(err, errno, "making a file for a fork");
}

static int take(struct sandbox *s, struct origin *o, struct err *err)
{
    struct moment mo = {0};
    struct sandbox_info *view = sandbox_view(s);
    o->ram_bytes = (uint64_t)view->row.memory_mib << 20;
    sandbox_info_unref(view);
    o->ram_fd = ram_new(o->ram_bytes, err);
    o->state_fd = o->ram_fd < 0 ? -1 : unnamed(s->m, err);
    o->disk_fd = o->state_fd < 0 ? -1 : unnamed(s->m, err);
    if (o->disk_fd < 0 || copy_base(s, o, err) != 0 || moment_take(s, o->state_fd, o->disk_fd, true, &mo, err) != 0)
        return -1;
    const int failed = put_pages(o, &mo, err);
    origin_count(s->m, o);
    o->runs = mo.capture.runs;
    mo.capture.runs = (struct ram_runs){0};
    o->commands = mo.commands;
    mo.commands = NULL;
    o->spool_dirfd = fcntl(s->out_dirfd, F_DUPFD_CLOEXEC, 3);
    moment_free(&mo);
    return failed;
}

int fork_moment(struct sandbox *s, struct origin **ret, struct err *err)
{
    if (machine_fits(s, err) != 0)
        return -1;
    struct origin *o = origin_new();
    if (!o)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (take(s, o, err) != 0) {
        origin_unref(s->m, o);
        return -1;
    }
    *ret = o;
    return 0;
}
