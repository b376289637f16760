#include "qemu/capture.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "qemu/vm_int.h"

#define DISK_IN_PAUSE (4u << 20)  // copied sooner than a job of QEMU's is made ready
#define BUFFER_SLACK (8u << 20) // what a guest may dirty between the look and the stop without a second mapping

void capture_free(struct capture *c)
{
    ram_runs_free(&c->runs);
    ram_runs_free(&c->disk_data);
    if (c->pages)
        munmap(c->pages, c->mapped);
    memset(c, 0, sizeof *c);
}

// ---- the buffer -----------------------------------------------------------------------------------------------------
// Pages of it are there before the VM stops: a page fault costs more than the copy.
static int buffer_make(struct capture *c, uint64_t want, uint64_t touch, struct err *err)
{
    if (c->pages)
        munmap(c->pages, c->mapped);
    c->pages = NULL;
    c->mapped = want + BUFFER_SLACK;
    void *p = mmap(NULL, c->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return err_sys(err, errno, "mapping a buffer for changed pages");
    c->pages = p;
    if (touch > 0)
        (void)madvise(p, touch < c->mapped ? touch : c->mapped, MADV_POPULATE_WRITE); // else the copy faults them in
    return 0;
}

static int look(const struct ram_guest *g, const struct ram_runs *base, struct ram_runs *ret, struct err *err)
{
    struct ram_runs dirty = {0};
    int failed = ram_guest_dirty(g, &dirty, err);
    if (!failed && base && base->n > 0) {
        if (ram_runs_union(&dirty, base, ret) != 0)
            failed = err_sys(err, ENOMEM, "listing changed pages");
        ram_runs_free(&dirty);
    } else {
        *ret = dirty;
    }
    return failed;
}

// ---- the pause --------------------------------------------------------------------------------------------------------
struct disk_copy {
    const struct capture_spec *spec;
    int64_t us;
    int failed;
    struct err err;
};

static void *copy_disk(void *arg)
{
    struct disk_copy *d = arg;
    const int64_t t = clock_mono_us();
    d->failed = ram_sparse_copy(d->spec->disk_from, d->spec->disk_to, NULL, &d->err);
    d->us = clock_mono_us() - t;
    return NULL;
}

static int copy_memory(const struct ram_guest *g, const struct capture_spec *spec, struct capture *c, struct err *err)
{
    const int64_t t = clock_mono_us();
    if (look(g, spec->base, &c->runs, err) != 0)
        return -1;
    const uint64_t bytes = ram_runs_bytes(&c->runs);
    if (bytes > c->mapped && buffer_make(c, bytes, 0, err) != 0)
        return -1;
    const int failed = ram_guest_read(g, &c->runs, c->pages, err);
    c->memory_us = clock_mono_us() - t;
    return failed;
}

static void step(const struct capture_spec *spec, const char *name)
{
    if (spec->at)
        spec->at(spec->arg, name);
}

static int in_pause(struct vm *vm, const struct ram_guest *g, const struct capture_spec *spec, struct capture *c,
                    struct err *err)
{
    struct disk_copy disk = {.spec = spec};
    pthread_t thread;
    const bool here = spec->disk_to >= 0 && !c->disk.open;
    const bool aside = here && pthread_create(&thread, NULL, copy_disk, &disk) == 0;
    const int64_t t = c->disk_began_us = clock_mono_us();
    step(spec, "save");
    int failed = c->disk.open ? disk_job_start(vm, &c->disk, err) : 0;
    if (!failed && c->disk.open)
        failed = ram_runs_of_file(spec->disk_from, c->disk_bytes, &c->disk_data, err);
    if (!failed)
        failed = vm_save_state(vm, spec->state_fd, spec->timeout_ms, err);
    c->save_us = clock_mono_us() - t;
    step(spec, "copy");
    if (!failed)
        failed = copy_memory(g, spec, c, err);
    if (aside)
        pthread_join(thread, NULL);
    else if (here)
        copy_disk(&disk);
    c->disk_us = disk.us;
    if (!failed && disk.failed) {
        *err = disk.err;
        failed = -1;
    }
    return failed;
}

// A disk with little on it is copied by us in the pause: that is sooner done than to begin a job of QEMU's. One with much is
// copied by QEMU after it, where the filesystem has room for all of the disk (QEMU allocates what it writes zeros to; those are
// given back afterwards). A VM that stands still has its disk copied by us.
static int prepare_disk(struct vm *vm, const struct capture_spec *spec, bool was_paused, struct capture *c, struct err *err)
{
    struct stat st;
    if (spec->disk_to < 0 || was_paused || !spec->go_on || !spec->copy_later)
        return 0;
    if (fstat(spec->disk_from, &st) != 0)
        return err_sys(err, errno, "reading a disk");
    if ((uint64_t)st.st_blocks * 512 <= DISK_IN_PAUSE)
        return 0;
    c->disk_bytes = (uint64_t)st.st_size;
    c->disk_to = spec->disk_to;
    return disk_job_open(vm, spec->disk_to, (uint64_t)st.st_size, &c->disk, err);
}

int vm_capture_disk(struct vm *vm, struct capture *c, struct err *err)
{
    if (!c->disk.open)
        return 0;
    const int failed = disk_job_wait(vm, err);
    if (!failed)
        ram_punch_rest(c->disk_to, c->disk_bytes, &c->disk_data);
    else
        (void)!ftruncate(c->disk_to, 0); // a guest that the full disk has stopped keeps QEMU from closing it: not its blocks too
    c->disk_us = clock_mono_us() - c->disk_began_us;
    disk_job_close(vm, &c->disk);
    return failed;
}

int vm_capture(struct vm *vm, const struct capture_spec *spec, struct capture *ret, struct err *err)
{
    struct capture c = {0};
    struct ram_guest g;
    struct ram_runs before = {0};
    struct err cont_err = {0};
    const bool was_paused = vm_is_paused(vm);
    if (ram_guest_open(vm_pid(vm), spec->ram_bytes, vm_ram_is_file(vm), &g, err) != 0)
        return -1;
    int failed = look(&g, spec->base, &before, err);
    const uint64_t bytes = ram_runs_bytes(&before);
    ram_runs_free(&before);
    if (!failed)
        failed = buffer_make(&c, bytes + bytes / 8, bytes, err);
    if (!failed)
        failed = prepare_disk(vm, spec, was_paused, &c, err);
    if (!failed && spec->go_on) // one that ends or goes cold may use up what is left
        failed = vm_save_room(vm, err);
    step(spec, "stop");
    const int64_t t = clock_mono_us();
    if (!failed) // also one that stands still: what is copied must not change, whoever said that it does
        failed = vm_pause(vm, err);
    c.stop_us = clock_mono_us() - t;
    if (!failed) {
        failed = in_pause(vm, &g, spec, &c, err);
        step(spec, "cont");
        if (spec->go_on && !was_paused && vm_go(vm, failed ? &cont_err : err) != 0)
            failed = -1;
        c.paused_us = clock_mono_us() - t;
    }
    ram_guest_close(&g);
    if (!vm_is_paused(vm))
        vm_save_done(vm);
    if (failed) {
        if (c.disk.open)
            (void)!ftruncate(spec->disk_to, 0);
        disk_job_close(vm, &c.disk);
        capture_free(&c);
    } else {
        *ret = c;
    }
    return failed;
}

int vm_put_pages(struct vm *vm, uint64_t ram_bytes, const struct ram_runs *runs, const void *pages, int timeout_ms,
                 struct err *err)
{
    struct ram_guest g;
    json_t *there = vm_qmp(vm, "query-status", NULL, timeout_ms, err); // it answers when its memory is mapped and reset
    json_decref(there);
    if (!there || ram_guest_open(vm_pid(vm), ram_bytes, true, &g, err) != 0)
        return -1;
    const int failed = ram_guest_write(&g, runs, pages, err);
    ram_guest_close(&g);
    return failed;
}
