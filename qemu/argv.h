// argv.h - the command lines, pure: no I/O, no environment; golden-tested for TCG and KVM (tests/qemu/data). What
// differs by accelerator is in one table here. Sources: QEMU 7.2 microvm documentation.
#ifndef AIRLOCK_QEMU_ARGV_H
#define AIRLOCK_QEMU_ARGV_H

#include "qemu/vm.h"

// Numbers the descriptors have inside QEMU.
struct argv_fds {
    int kernel, initrd, root, disk;     // -kernel/-initrd by /proc/self/fd/N; drives by -add-fd sets
    int disk_read;                      // the same disk, read-only: QEMU opens it so before a device may write
    int control, bulk, qmp, console;    // listening sockets
    int ram;                            // memory file; -1: anonymous memory
};

struct argv {
    char **words;   // NULL-terminated, owned
    size_t n, cap;
};
void argv_free(struct argv *a);

// qemu-system-x86_64 …  0, or -1 out of memory.
int argv_qemu(const struct vm_spec *spec, const struct argv_fds *fds, struct argv *ret);
// bwrap … -- (the jail in front of it). info_fd: where bubblewrap writes its child's pid. qemu_fd: of a foreign QEMU whose path
// the jail's user cannot reach, which bubblewrap copies; else -1.
int argv_jail(const struct vm_spec *spec, int info_fd, int qemu_fd, struct argv *ret);
// Its QEMU is not below /usr, which is all that the jail sees: it is put over the host's own.
bool argv_qemu_is_foreign(const struct vm_spec *spec);
// The kernel command line alone.
int argv_kernel_cmdline(const struct vm_spec *spec, char *out, size_t cap);

#endif
