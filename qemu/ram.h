// ram.h - guest memory as files: sealed memfds that forks map, the pages a running guest has changed, the memory file
// of a snapshot, and what a VM's memory really costs.
//
// Owns nothing but what its calls return. Does not know sandboxes, snapshots' other files, QMP. Blocking; worker
// threads; no locks. Everything read from a QEMU process is bounded by the size that the caller gives: the process is
// not trusted to map what we told it.
//
// Sources: Linux Documentation/admin-guide/mm/pagemap.rst (bits 63 present, 62 swapped, 61 file or shared), memfd_create(2),
// fcntl(2) F_ADD_SEALS, proc(5) smaps.
#ifndef AIRLOCK_QEMU_RAM_H
#define AIRLOCK_QEMU_RAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/crypto.h"
#include "base/err.h"

#define RAM_PAGE 4096u
#define RAM_MEMFD_NAME "airlock-ram" // /proc/PID/maps shows "/memfd:airlock-ram (deleted)"

// ---- memory files -------------------------------------------------------------------------------------------------
// A new memfd of that size, all holes (MFD_CLOEXEC | MFD_ALLOW_SEALING), named RAM_MEMFD_NAME; QEMU opens it again under
// its own uid, by the descriptor it was given. -1 with err.
int ram_new(uint64_t bytes, struct err *err);
// Copies the data extents of one (memfd or file) into another of the same size. 0, or -1 with err
// (unavailable/out_of_memory on ENOMEM, unavailable/disk_full on ENOSPC).
int ram_copy(int from_fd, int to_fd, uint64_t bytes, struct err *err);
// WRITE|SHRINK|GROW|SEAL, after the last shared writable mapping is gone. 0, or -1.
int ram_seal(int fd, struct err *err);
bool ram_is_sealed(int fd);
// Bytes that the file really holds (st_blocks).
uint64_t ram_bytes(int fd);

// ---- runs: which pages ----------------------------------------------------------------------------------------------
struct ram_run {
    uint64_t offset;       // in guest memory, a multiple of RAM_PAGE
    uint64_t pages;
};
// Ordered, not touching, not overlapping.
struct ram_runs {
    struct ram_run *v;     // owned
    size_t n, cap;
};
void ram_runs_free(struct ram_runs *r);
int ram_runs_add(struct ram_runs *r, uint64_t offset, uint64_t pages); // at the end; joins; -1 out of memory or disorder
uint64_t ram_runs_bytes(const struct ram_runs *r);
// The pages in either. 0, or -1 out of memory.
int ram_runs_union(const struct ram_runs *a, const struct ram_runs *b, struct ram_runs *ret);
// Those of a that are not in b.
int ram_runs_minus(const struct ram_runs *a, const struct ram_runs *b, struct ram_runs *ret);
// The data extents of a file (SEEK_DATA), whole pages.
int ram_runs_of_file(int fd, uint64_t bytes, struct ram_runs *ret, struct err *err);
// Makes holes of all that runs do not name. Best effort.
void ram_punch_rest(int fd, uint64_t bytes, const struct ram_runs *data);

// ---- a running guest ------------------------------------------------------------------------------------------------
// Guest memory inside a QEMU process.
struct ram_guest {
    pid_t pid;
    uint64_t address, bytes;
    int pagemap_fd, mem_fd;
    bool file_backed;      // private copy of a memfd; else anonymous: every page that is there counts
};
// Finds the one mapping of `bytes`: of RAM_MEMFD_NAME where file_backed, else the one anonymous writable mapping of
// exactly that size (QEMU's memory-backend-ram). unsupported_capability/memory_access where /proc does not let us, or
// not exactly one mapping fits: the caller falls back to a migration stream.
int ram_guest_open(pid_t pid, uint64_t bytes, bool file_backed, struct ram_guest *ret, struct err *err);
void ram_guest_close(struct ram_guest *g);
// Pages that differ from the backing file (or from nothing): present or swapped, and not file-backed. Appends to *ret,
// which is empty. About 1 ms per GiB of pagemap.
int ram_guest_dirty(const struct ram_guest *g, struct ram_runs *ret, struct err *err);
// Copies the pages of runs, packed one after the other, into to (ram_runs_bytes(runs) bytes).
int ram_guest_read(const struct ram_guest *g, const struct ram_runs *runs, void *to, struct err *err);
// … and back: of a guest that has not run yet. Its mapping is private: the pages become its own.
int ram_guest_write(const struct ram_guest *g, const struct ram_runs *runs, const void *from, struct err *err);

// ---- the memory file of a snapshot ----------------------------------------------------------------------------------
// Header: "AIRLOCK-PAGES-1\n" (16 bytes), page size u64, number of runs u64, per run offset u64 and pages u64 (all little
// endian), zeros up to a multiple of RAM_PAGE; then the pages. Pages come from packed memory (`from`), whose runs are
// `runs`. Writes fd from its start; the SHA-256 is of the bytes written. Errors: unavailable/disk_full.
int ram_file_write(int fd, const struct ram_runs *runs, const void *from, uint8_t ret_hash[SHA256_BYTES],
                   uint64_t *ret_bytes, struct err *err);
// Reads such a file into a memory file of `bytes`, checking the form (runs ordered and inside bytes, sizes exact) and
// hashing all of it: ret_hash is to be compared by the caller before anything is started. ret_runs (NULL allowed).
// Errors: conflict/snapshot_corrupt for a bad form.
int ram_file_load(int fd, int ram_fd, uint64_t bytes, uint8_t ret_hash[SHA256_BYTES], struct ram_runs *ret_runs,
                  struct err *err);
// The same into a mapping of its own, packed: *ret_pages (munmap *ret_mapped bytes; NULL where there are none).
int ram_file_read(int fd, uint64_t bytes, uint8_t ret_hash[SHA256_BYTES], struct ram_runs *ret_runs, void **ret_pages,
                  size_t *ret_mapped, struct err *err);
// The runs alone, as a small file (the same header without pages), and back.
int ram_runs_save(int fd, const struct ram_runs *runs, struct err *err);
int ram_runs_load(int fd, uint64_t bytes, struct ram_runs *ret, struct err *err);

// ---- digests of sparse files ------------------------------------------------------------------------------------------
// SHA-256 over (offset u64 little endian, block) of every 4,096-byte block that is not all zeros, the last one padded
// with zeros, and at the end the size (u64): a hole and a block of zeros are the same. Reads data extents only.
int ram_sparse_digest(int fd, uint8_t ret_hash[SHA256_BYTES], uint64_t *ret_data_bytes, struct err *err);
// ram_copy for disks with the digest of what was copied; reflinks where the filesystem can (then it hashes the copy).
// Truncates `to` to the size of `from`.
int ram_sparse_copy(int from_fd, int to_fd, uint8_t *ret_hash_or_null, struct err *err);

// ---- what a VM's memory costs -----------------------------------------------------------------------------------------
struct ram_cost {
    uint64_t unique_bytes;  // pages that are no file's, of QEMU and its jail: gone when it ends
    uint64_t shared_bytes;  // of the guest's memory: pages of the template that it maps, whoever else does
    uint64_t vmm_bytes;     // of unique_bytes: not the guest's memory
    uint64_t guest_bytes;   // of unique_bytes: the guest's memory
};
// Sums /proc/PID/smaps of both processes (outer 0: none). 0, or -1 (gone, or not ours to read).
int ram_cost_read(pid_t pid, pid_t outer, uint64_t guest_bytes, struct ram_cost *ret);

#endif
