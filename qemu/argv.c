#include "qemu/argv.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// All that differs by accelerator. The CPU model for TCG: Nehalem runs guest code faster than `max`; +arat lets the
// guest's timer go one-shot, so that an idle guest sleeps; spec-ctrl is nothing TCG could honour. norandmaps: TCG finds
// translated code again by its virtual address, so that a process of which every copy lies elsewhere is translated anew each
// time (25 ms against 6 for `sh -c true`, and a buffer that fills with copies); emulation is no security boundary anyway.
// psi=0 lsm=…: what each switch and exec would run through for nobody (pressure accounting, AppArmor and TOMOYO without a
// profile), hardened_usercopy, init_on_alloc, randomize_kstack_offset: hardening of a kernel that is no boundary here;
// sysctl.vm.…: threads that would wake twice a second to look. All of it a fork has to translate anew.
static const struct {
    const char *accel, *cpu, *cmdline;
} BY_ACCEL[] = {
    [VM_ACCEL_TCG] = {"tcg,tb-size=64", "Nehalem,spec-ctrl=off,+arat",
                      " no_timer_check mitigations=off norandmaps psi=0 lsm=landlock,yama hardened_usercopy=off "
                      "init_on_alloc=0 randomize_kstack_offset=off sysctl.vm.compaction_proactiveness=0 "
                      "sysctl.vm.stat_interval=60"},
    [VM_ACCEL_KVM] = {"kvm", "host", ""},
};

#define TB_SIZE_MIB 64  // as in BY_ACCEL
#define QEMU_OWN_MIB 48 // measured: 33 MB before a guest has run anything, below 48 MiB after hours of commands
static const char MACHINE[] = "microvm,acpi=on,pit=off,pic=off,rtc=on,suppress-vmdesc=on,memory-backend=ram";

const char *vm_machine_name(void)
{
    return MACHINE;
}

const char *vm_cpu_model(enum vm_accel a)
{
    return BY_ACCEL[a].cpu;
}

const char *vm_kernel_words(enum vm_accel a)
{
    return BY_ACCEL[a].cmdline;
}

int vm_overhead_mib(enum vm_accel a)
{
    return a == VM_ACCEL_TCG ? TB_SIZE_MIB + QEMU_OWN_MIB : QEMU_OWN_MIB;
}

const char *vm_accel_name(enum vm_accel a)
{
    return a == VM_ACCEL_KVM ? "kvm" : "tcg";
}

void argv_free(struct argv *a)
{
    for (size_t i = 0; i < a->n; i++)
        free(a->words[i]);
    free(a->words);
    memset(a, 0, sizeof *a);
}

static int __attribute__((format(printf, 2, 3))) add(struct argv *a, const char *fmt, ...)
{
    if (a->n + 1 >= a->cap) {
        const size_t cap = a->cap ? 2 * a->cap : 64;
        char **words = realloc(a->words, cap * sizeof *words);
        if (!words)
            return -1;
        a->words = words;
        a->cap = cap;
    }
    va_list args;
    va_start(args, fmt);
    char *word = NULL;
    const int n = vasprintf(&word, fmt, args);
    va_end(args);
    if (n < 0)
        return -1;
    a->words[a->n++] = word;
    a->words[a->n] = NULL;
    return 0;
}

// QEMU looks for its firmware and modules from where it lies, so one from outside /usr lies over the host's own.
#define QEMU_IN_JAIL "/usr/bin/qemu-system-x86_64"

static int add_all(struct argv *a, const char *const *words)
{
    int failed = 0;
    for (; *words; words++)
        failed |= add(a, "%s", *words);
    return failed;
}

// A TCG guest reads the host's TSC and cannot calibrate it on a busy host: it is told. random.trust_cpu lets the guest's
// pool be ready at once; virtio-rng adds the host's entropy.
int argv_kernel_cmdline(const struct vm_spec *spec, char *out, size_t cap)
{
    const int n = snprintf(out, cap,
                           "console=ttyS0 panic=-1 reboot=t quiet loglevel=4 tsc_early_khz=%u tsc=nowatchdog "
                           "random.trust_cpu=on cryptomgr.notests 8250.nr_uarts=1%s",
                           spec->tsc_khz, BY_ACCEL[spec->accel].cmdline);
    return n > 0 && (size_t)n < cap ? 0 : -1;
}

static int add_drive(struct argv *a, const char *id, int fd, int read_fd, int set, bool read_only)
{
    int failed = add(a, "-add-fd") | add(a, "fd=%d,set=%d", fd, set);
    if (read_fd >= 0)
        failed |= add(a, "-add-fd") | add(a, "fd=%d,set=%d", read_fd, set);
    return failed | add(a, "-drive") |
           add(a, "id=%s,if=none,format=raw,file=/dev/fdset/%d,file.locking=off%s", id, set,
               read_only ? ",read-only=on" : ",cache=unsafe,werror=enospc,rerror=report") |
           add(a, "-device") | add(a, "virtio-blk-device,drive=%s,serial=%s", id, id);
}

// A fork maps a sealed memory file privately; the boot that becomes a template writes through to it. The state of
// xen-save-devices-state has no configuration section, so the reader must not ask for one.
static int add_memory(struct argv *a, const struct vm_spec *spec, int ram)
{
    int failed = add(a, "-object");
    if (ram < 0)
        return failed | add(a, "memory-backend-ram,id=ram,size=%dM", spec->memory_mib);
    return failed | add(a, "memory-backend-file,id=ram,size=%dM,mem-path=/proc/self/fd/%d,share=%s", spec->memory_mib,
                        ram, spec->ram_shared ? "on" : "off");
}

static int add_socket(struct argv *a, const char *id, int fd)
{
    return add(a, "-chardev") | add(a, "socket,id=%s,fd=%d,server=on,wait=off", id, fd);
}

int argv_qemu(const struct vm_spec *spec, const struct argv_fds *fds, struct argv *ret)
{
    static const char *const FIXED[] = {"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox",
                                        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                                        "-M", MACHINE,
                                        NULL};
    char cmdline[512];
    if (argv_kernel_cmdline(spec, cmdline, sizeof cmdline) != 0)
        return -1;
    int failed = add(ret, "%s", argv_qemu_is_foreign(spec) ? QEMU_IN_JAIL : spec->qemu_path ? spec->qemu_path : "qemu-system-x86_64");
    failed |= add(ret, "-name") | add(ret, "%s", spec->id) | add_all(ret, FIXED);
    failed |= add(ret, "-accel") | add(ret, "%s", BY_ACCEL[spec->accel].accel);
    failed |= add(ret, "-cpu") | add(ret, "%s", BY_ACCEL[spec->accel].cpu);
    failed |= add(ret, "-m") | add(ret, "%d", spec->memory_mib) | add(ret, "-smp") | add(ret, "%d", spec->vcpus);
    failed |= add_memory(ret, spec, fds->ram);
    if (spec->incoming) { // what was booted is in the memory: loading it again would cost time and 14 MB
        failed |= add(ret, "-S"); // else QEMU lets it run as soon as the state is loaded, before we know
        failed |= add(ret, "-incoming") | add(ret, "defer");
        failed |= add(ret, "-global") | add(ret, "migration.send-configuration=off");
    } else {
        failed |= add(ret, "-kernel") | add(ret, "/proc/self/fd/%d", fds->kernel);
        failed |= add(ret, "-initrd") | add(ret, "/proc/self/fd/%d", fds->initrd);
        failed |= add(ret, "-append") | add(ret, "%s", cmdline);
    }
    if (fds->root >= 0)
        failed |= add_drive(ret, "root", fds->root, -1, 1, true);
    if (fds->disk >= 0)
        failed |= add_drive(ret, "data", fds->disk, fds->disk_read, 2, false);
    failed |= add(ret, "-device") | add(ret, "virtio-rng-device") | add(ret, "-device") | add(ret, "virtio-serial-device");
    failed |= add_socket(ret, "control", fds->control) | add(ret, "-device") |
              add(ret, "virtserialport,chardev=control,name=airlock.control");
    failed |= add_socket(ret, "bulk", fds->bulk) | add(ret, "-device") |
              add(ret, "virtserialport,chardev=bulk,name=airlock.bulk");
    failed |= add_socket(ret, "console", fds->console) | add(ret, "-serial") | add(ret, "chardev:console");
    failed |= add_socket(ret, "qmp", fds->qmp) | add(ret, "-mon") | add(ret, "chardev=qmp,mode=control");
    return failed ? -1 : 0;
}

bool argv_qemu_is_foreign(const struct vm_spec *spec)
{
    return spec->qemu_path && strncmp(spec->qemu_path, "/usr/", 5) != 0;
}

int argv_jail(const struct vm_spec *spec, int info_fd, int qemu_fd, struct argv *ret)
{
    static const char *const FIXED[] = {
        "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--as-pid-1", "--hostname", "jail", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink",
        "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin", "--symlink", "usr/sbin", "/sbin", "--proc", "/proc",
        "--dev", "/dev", "--chdir", "/", "--cap-drop", "ALL", "--clearenv", "--setenv", "PATH", "/usr/bin", NULL};
    int failed = add(ret, "bwrap") | add_all(ret, FIXED);
    if (spec->accel == VM_ACCEL_KVM)
        failed |= add(ret, "--dev-bind") | add(ret, "/dev/kvm") | add(ret, "/dev/kvm");
    if (argv_qemu_is_foreign(spec)) {
        if (qemu_fd < 0)
            failed |= add(ret, "--ro-bind") | add(ret, "%s", spec->qemu_path);
        else
            failed |= add(ret, "--perms") | add(ret, "0555") | add(ret, "--ro-bind-data") | add(ret, "%d", qemu_fd);
        failed |= add(ret, QEMU_IN_JAIL);
    }
    failed |= add(ret, "--info-fd") | add(ret, "%d", info_fd) | add(ret, "--");
    return failed ? -1 : 0;
}
