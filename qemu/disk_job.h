// disk_job.h - a copy of a running VM's disk as it was at one moment, made by QEMU after the VM goes on: what the guest
// overwrites meanwhile is copied first (docs/interop/live-block-operations in QEMU's sources, blockdev-backup). So the pause
// does not grow with the disk. Within the room.
//
// Owns the job and its target node in QEMU. Does not own the file. Blocking; worker threads; one at a time per VM.
#ifndef AIRLOCK_QEMU_DISK_JOB_H
#define AIRLOCK_QEMU_DISK_JOB_H

#include "qemu/vm.h"

struct disk_job {
    bool open, started;
};

// Opens the target: to_fd, read-write, is made as long as `bytes`. Ends what an earlier server left of a copy.
int disk_job_open(struct vm *vm, int to_fd, uint64_t bytes, struct disk_job *ret, struct err *err);
// From here on the target will be the disk of this moment: called while the VM is stopped.
int disk_job_start(struct vm *vm, struct disk_job *j, struct err *err);
// Waits until it is copied, as long as it gets on. Errors: unavailable/disk_full, internal/disk_copy, timeout, transport_failed.
int disk_job_wait(struct vm *vm, struct err *err);
// Ends it, done or not, and closes the target. Accepts one that was never opened, and a VM that is gone.
void disk_job_close(struct vm *vm, struct disk_job *j);
// Of an adopted VM: ends what an earlier server left.
void disk_job_sweep(struct vm *vm);

#endif
