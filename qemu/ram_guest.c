// A running guest's memory, through /proc: which pages it has changed, and their content. And what a VM costs.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/fd.h"
#include "qemu/ram.h"

#define PAGE_PRESENT (1ull << 63)
#define PAGE_SWAPPED (1ull << 62)
#define PAGE_OF_FILE (1ull << 61)
#define ENTRIES 32768 // of pagemap at a time: 128 MiB of guest memory
#define VECTORS 1024  // IOV_MAX

// ---- finding it -----------------------------------------------------------------------------------------------------
struct area {
    uint64_t begin, end, offset;
    bool writable, anonymous, ram;
};

static bool parse_area(const char *line, struct area *a)
{
    char rights[8] = "", path[128] = "";
    unsigned long long begin, end, offset;
    if (sscanf(line, "%llx-%llx %7s %llx %*s %*s %127[^\n]", &begin, &end, rights, &offset, path) < 4)
        return false;
    *a = (struct area){begin, end, offset, rights[1] == 'w', path[0] == 0,
                       strncmp(path, "/memfd:" RAM_MEMFD_NAME " ", sizeof "/memfd:" RAM_MEMFD_NAME) == 0};
    return true;
}

// Adjacent pieces of one mapping are one: madvise on a part splits them.
static bool continues(const struct area *whole, const struct area *next, bool file)
{
    return whole->end == next->begin && (!file || whole->offset + (whole->end - whole->begin) == next->offset);
}

static bool fits(const struct area *a, uint64_t bytes, bool file)
{
    return a->end - a->begin == bytes && (!file || a->offset == 0);
}

static unsigned find(FILE *maps, uint64_t bytes, bool file, uint64_t *ret_address)
{
    char line[512];
    struct area whole = {0}, a;
    unsigned found = 0;
    while (fgets(line, sizeof line, maps)) {
        if (!parse_area(line, &a) || !a.writable || (file ? !a.ram : !a.anonymous)) {
            whole = (struct area){0};
            continue;
        }
        if (file && whole.end && continues(&whole, &a, true))
            whole.end = a.end;
        else
            whole = a;
        if (fits(&whole, bytes, file)) {
            *ret_address = whole.begin;
            found++;
        }
    }
    return found;
}

static int no_access(struct err *err, const char *why)
{
    err_set(err, ERR_UNSUPPORTED_CAPABILITY, "memory_access", "the memory of the sandbox cannot be read: %s", why);
    return err_remedy(err, "run the server as root, or allow it to trace its own processes (kernel.yama.ptrace_scope)");
}

int ram_guest_open(pid_t pid, uint64_t bytes, bool file_backed, struct ram_guest *ret, struct err *err)
{
    char path[64];
    struct ram_guest g = {.pid = pid, .bytes = bytes, .pagemap_fd = -1, .mem_fd = -1, .file_backed = file_backed};
    snprintf(path, sizeof path, "/proc/%d/maps", (int)pid);
    FILE *maps = fopen(path, "re");
    const unsigned found = maps ? find(maps, bytes, file_backed, &g.address) : 0;
    if (maps)
        fclose(maps);
    if (found != 1)
        return no_access(err, maps ? "its mapping was not found" : "its process may not be looked at");
    snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
    g.pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/mem", (int)pid);
    g.mem_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (g.pagemap_fd < 0 || g.mem_fd < 0) {
        ram_guest_close(&g);
        return no_access(err, "its process may not be read");
    }
    *ret = g;
    return 0;
}

void ram_guest_close(struct ram_guest *g)
{
    fd_close(&g->pagemap_fd);
    fd_close(&g->mem_fd);
}

// ---- changed pages --------------------------------------------------------------------------------------------------
static bool changed(uint64_t entry)
{
    return (entry & (PAGE_PRESENT | PAGE_SWAPPED)) && !(entry & PAGE_OF_FILE);
}

int ram_guest_dirty(const struct ram_guest *g, struct ram_runs *ret, struct err *err)
{
    CLEANUP_FREE uint64_t *entries = malloc(ENTRIES * sizeof *entries);
    const uint64_t pages = g->bytes / RAM_PAGE;
    if (!entries)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    for (uint64_t first = 0; first < pages; first += ENTRIES) {
        const uint64_t n = pages - first < ENTRIES ? pages - first : ENTRIES;
        if (fd_pread_full(g->pagemap_fd, entries, n * 8, (off_t)((g->address / RAM_PAGE + first) * 8)) != 0)
            return err_sys(err, errno, "reading a page map");
        for (uint64_t i = 0; i < n; i++)
            if (changed(entries[i]) && ram_runs_add(ret, (first + i) * RAM_PAGE, 1) != 0)
                return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    }
    return 0;
}

#define MOVE_MOST (512u << 20) // at once: the kernel cuts one call at 2 GiB (MAX_RW_COUNT)

// process_vm_readv needs one call for a thousand runs where pread needs one for each.
static int move_batch(const struct ram_guest *g, const struct iovec *theirs, size_t n, uint8_t *our, uint64_t bytes, bool write,
                      struct err *err)
{
    const struct iovec ours = {our, bytes};
    const ssize_t got = write ? process_vm_writev(g->pid, &ours, 1, theirs, n, 0)
                              : process_vm_readv(g->pid, &ours, 1, theirs, n, 0);
    if (got == (ssize_t)bytes)
        return 0;
    if (got < 0 && (errno == EPERM || errno == ENOSYS))
        return no_access(err, "it is not permitted");
    if (got < 0 && errno == ESRCH)
        return err_set(err, ERR_TRANSPORT_FAILED, "vm_died", "the virtual machine ended before its memory was moved");
    return err_sys(err, got < 0 ? errno : EFAULT, "moving a guest's memory");
}

static int move(const struct ram_guest *g, const struct ram_runs *runs, uint8_t *at, bool write, struct err *err)
{
    struct iovec theirs[VECTORS];
    uint64_t done = 0; // of run i
    for (size_t i = 0; i < runs->n;) {
        size_t n = 0;
        uint64_t bytes = 0;
        while (n < VECTORS && i < runs->n && bytes < MOVE_MOST) {
            const uint64_t len = runs->v[i].pages * RAM_PAGE, left = len - done, room = MOVE_MOST - bytes;
            if (runs->v[i].offset > g->bytes || len > g->bytes - runs->v[i].offset)
                return err_set(err, ERR_INTERNAL, "bad_run", "a page is outside the guest's memory");
            const uint64_t part = left < room ? left : room;
            theirs[n++] = (struct iovec){(void *)(uintptr_t)(g->address + runs->v[i].offset + done), part};
            bytes += part;
            done += part;
            if (done == len) {
                done = 0;
                i++;
            }
        }
        if (move_batch(g, theirs, n, at, bytes, write, err) != 0)
            return -1;
        at += bytes;
    }
    return 0;
}

int ram_guest_read(const struct ram_guest *g, const struct ram_runs *runs, void *to, struct err *err)
{
    return move(g, runs, to, false, err);
}

int ram_guest_write(const struct ram_guest *g, const struct ram_runs *runs, const void *from, struct err *err)
{
    return move(g, runs, (uint8_t *)(uintptr_t)from, true, err); // not written to
}

// ---- what it costs --------------------------------------------------------------------------------------------------
// Not Private_*: smaps counts a page of the template as private where only one process maps it just now. "Anonymous" are the
// pages that are nobody's file: those that were copied when they were written, or that never had one. "SwapPss" are
// those of them that are swapped, without the template's (Linux Documentation/filesystems/proc.rst).
struct sums {
    uint64_t unique, guest, shared;
};

static void add_field(const char *line, bool guest, bool ram, struct sums *s)
{
    unsigned long long kb;
    char field[32];
    if (sscanf(line, "%31[^:]: %llu kB", field, &kb) != 2)
        return;
    const bool own = strcmp(field, "Anonymous") == 0;
    if (own || strcmp(field, "SwapPss") == 0) {
        s->unique += kb * 1024;
        s->guest += guest ? kb * 1024 : 0;
    }
    if (ram && strcmp(field, "Rss") == 0)
        s->shared += kb * 1024;
    else if (ram && own)
        s->shared -= kb * 1024; // after its Rss
}

static int add_smaps(pid_t pid, uint64_t guest_bytes, struct sums *s)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/smaps", (int)pid);
    FILE *f = fopen(path, "re");
    struct area a = {0};
    bool guest = false;
    if (!f)
        return -1;
    while (fgets(line, sizeof line, f)) {
        if (parse_area(line, &a))
            guest = guest_bytes > 0 && a.writable && (a.ram || (a.anonymous && a.end - a.begin == guest_bytes));
        else
            add_field(line, guest, guest && a.ram, s);
    }
    fclose(f);
    return 0;
}

int ram_cost_read(pid_t pid, pid_t outer, uint64_t guest_bytes, struct ram_cost *ret)
{
    struct sums s = {0};
    if (add_smaps(pid, guest_bytes, &s) != 0)
        return -1;
    if (outer > 0)
        (void)add_smaps(outer, 0, &s);
    *ret = (struct ram_cost){s.unique, s.shared, s.unique - s.guest, s.guest};
    return 0;
}
