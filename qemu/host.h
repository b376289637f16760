// host.h - facts about this host that a launch or `airlock doctor` needs. Read once; any thread.
#ifndef AIRLOCK_QEMU_HOST_H
#define AIRLOCK_QEMU_HOST_H

#include <jansson.h>
#include <stdbool.h>

#include "base/err.h"

// The TSC's frequency, measured for 10 ms against CLOCK_MONOTONIC_RAW: the same within 1 MHz on a busy host too, since a saved
// guest goes on only where it is what it was. Where the kernel's bogomips agrees within 1 %, that. 0: no TSC.
unsigned host_tsc_khz(void);

struct host_facts {
    unsigned tsc_khz;              // host_tsc_khz
    char qemu_version[48];         // "7.2.22"; "" where QEMU is missing
    char qemu_path[256], bwrap_path[256];
    char qemu_sha256[72];          // digest of the binary: the build id of receipts
    char boot_id[48];
    char cpu_sha256[72];           // of the first CPU's model and flags: what `-cpu host` is under KVM
    bool is_root, userns, kvm_device;
    bool jail_works;               // bubblewrap was started with our namespaces and ended well
    char jail_reason[160];         // why not
    bool cgroup_v2;                // delegated and writable
    char cgroup_reason[160];
    long cpus, memory_mib;
};
// Looks everything up; missing parts are in the facts, not errors.
int host_facts_read(const char *qemu_path_or_null, struct host_facts *ret, struct err *err);

// One line per check for `airlock doctor` and for `serve`'s refusals: what, ok or not, and what to do about it.
struct host_check {
    const char *name;
    enum { HOST_OK, HOST_WARN, HOST_FAIL } verdict;
    char text[320];
};
#define HOST_CHECKS_MAX 24
int host_checks(const struct host_facts *f, bool allow_emulation, struct host_check out[static HOST_CHECKS_MAX]);

#endif
