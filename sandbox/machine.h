// machine.h - everything that must be equal for a saved state to be loaded: one JSON object, the key made of it, and the
// comparison that names what differs. Pure but for the host facts it is given.
#ifndef AIRLOCK_SANDBOX_MACHINE_H
#define AIRLOCK_SANDBOX_MACHINE_H

#include <jansson.h>

#include "base/crypto.h"
#include "base/err.h"
#include "qemu/vm.h"
#include "sandbox/images.h"

#define MACHINE_LAYOUT 1 // counts changes of argv.c that device state depends on

struct machine_parts {
    const char *image_digest, *qemu_digest, *qemu_version;
    const struct image_runtime *runtime;
    enum vm_accel accel;
    int vcpus, memory_mib, disk_mib;
    unsigned tsc_khz;
    const char *host_cpu;      // digest; counts where the guest's CPU is the host's
};
// {"accel","cpu_model","disk_mib","host_cpu" (KVM),"image_digest","initramfs_digest","kernel_digest","layout","machine","memory_mib",
// "qemu_digest","qemu_version","tsc_mhz","vcpus"}; new.
json_t *machine_of(const struct machine_parts *p);
// The key of a template: SHA-256 of the object's canonical text. NULL out of memory.
char *machine_key(const json_t *machine, char out[static DIGEST_TEXT_MAX]);
// Adds {"field","expected","found"} for each member that a restore needs equal and that is not. The initramfs (with the
// agent) may differ: it was booted once and is in the memory; protocol versions are the agent's business.
void machine_compare(const json_t *saved, const json_t *here, json_t *mismatches);

#endif
