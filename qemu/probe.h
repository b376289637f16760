// probe.h - which accelerator really works here: the kernel booted under KVM to the agent's hello, with a deadline,
// because a /dev/kvm that opens proves nothing. A yes, and the no of a guest that hangs until the deadline, are kept per (host
// boot id, QEMU build, kernel digest) in a small JSON file and asked for again when any of them changes; a QEMU that ended
// early is asked again at the next start: it may have been killed, and it costs little. Blocking; worker threads.
#ifndef AIRLOCK_QEMU_PROBE_H
#define AIRLOCK_QEMU_PROBE_H

#include <stdatomic.h>

#include "qemu/vm.h"

struct probe_verdict {
    bool kvm_usable;
    char reason[160];          // for people: "guest did not reach its agent within 10 s" …
    int64_t probed_at_ms;
    bool from_cache;
};

// state_dirfd: where accel.json is kept; run_dirfd_parent: where a scratch run directory may be made; spec template
// gives kernel, initrd (root and disk may be -1: the agent answers hello with FATAL or READY, both prove the boot); its id
// is not used. -1 with err unavailable/stopping once *cancelled: there is no verdict then.
int probe_kvm(int state_dirfd, int run_parent_dirfd, const struct vm_spec *spec, const char *kernel_digest,
              int timeout_ms, const atomic_bool *cancelled, struct probe_verdict *ret, struct err *err);

// Ends the processes of a probe that is under way in run_parent_dirfd (after *cancelled was set), or was when its server was
// killed: nobody else will. tidy: nobody probes now, so that what it left can go. 0, or -1 with err: cleanup_failed; what names
// the processes stays then.
int probe_end(int run_parent_dirfd, bool tidy, struct err *err);

#endif
