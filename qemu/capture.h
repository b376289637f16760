// capture.h - one moment of a running VM: device state and disk into files, changed memory into a buffer, while the VM is
// stopped and for as short as it can be. The disk of a VM that goes on is copied after that, by QEMU (disk_job.h).
//
// Does not own the VM, nor the files. Blocking; worker threads; the caller excludes other acts on the VM and has frozen the
// agent (vm_freeze) where the guest runs. Which pages: ram.h.
#ifndef AIRLOCK_QEMU_CAPTURE_H
#define AIRLOCK_QEMU_CAPTURE_H

#include "qemu/disk_job.h"
#include "qemu/ram.h"
#include "qemu/vm.h"

struct capture_spec {
    uint64_t ram_bytes;
    int state_fd;                // written from its start
    int disk_from, disk_to;      // disk_to -1: the disk stays where it is
    const struct ram_runs *base; // pages that differed from the template before this VM began; NULL: none
    bool copy_later;             // the host has room for all of the disk: QEMU may copy it after the pause
    bool go_on;                  // the VM runs on afterwards, also after a failure
    int timeout_ms;              // of each QMP call
    // NULL, or called between the steps ("stop", "save", "copy", "cont") with arg.
    void (*at)(void *arg, const char *step);
    void *arg;
};

struct capture {
    struct ram_runs runs;        // pages that differ from the template
    void *pages;                 // packed, in the order of runs; mapped
    size_t mapped;
    int64_t paused_us, stop_us, save_us, memory_us, disk_us; // disk: until it was whole
    struct disk_job disk;        // under way where the VM goes on
    int64_t disk_began_us;
    struct ram_runs disk_data;   // where the disk had data at that moment
    uint64_t disk_bytes;
    int disk_to;                 // borrowed
};

// 0, or -1 with err: unsupported_capability/memory_access, unavailable/disk_full, transport_failed, timeout. Where the VM
// goes on, the disk is whole only after vm_capture_disk, which is due: it ends what QEMU holds for it, also in failure.
int vm_capture(struct vm *vm, const struct capture_spec *spec, struct capture *ret, struct err *err);
int vm_capture_disk(struct vm *vm, struct capture *c, struct err *err);
void capture_free(struct capture *c); // accepts a zeroed one

// Puts pages into a VM that was launched with a memory file and has not loaded its state yet. Errors: as vm_capture.
int vm_put_pages(struct vm *vm, uint64_t ram_bytes, const struct ram_runs *runs, const void *pages, int timeout_ms,
                 struct err *err);

#endif
