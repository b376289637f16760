// Runs of pages, and the memory file of a snapshot.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"
#include "qemu/ram.h"

static const char MAGIC[16] = {'A', 'I', 'R', 'L', 'O', 'C', 'K', '-', 'P', 'A', 'G', 'E', 'S', '-', '1', '\n'};
#define HEADER 32        // magic, page size, number of runs
#define CHUNK (4u << 20)

// ---- runs -------------------------------------------------------------------------------------------------------
void ram_runs_free(struct ram_runs *r)
{
    free(r->v);
    *r = (struct ram_runs){0};
}

static uint64_t end_of(const struct ram_run *r)
{
    return r->offset + r->pages * RAM_PAGE;
}

int ram_runs_add(struct ram_runs *r, uint64_t offset, uint64_t pages)
{
    if (pages == 0)
        return 0;
    if (r->n > 0 && offset < end_of(&r->v[r->n - 1]))
        return -1;
    if (r->n > 0 && offset == end_of(&r->v[r->n - 1])) {
        r->v[r->n - 1].pages += pages;
        return 0;
    }
    if (r->n == r->cap) {
        const size_t cap = r->cap ? 2 * r->cap : 256;
        struct ram_run *v = realloc(r->v, cap * sizeof *v);
        if (!v)
            return -1;
        r->v = v;
        r->cap = cap;
    }
    r->v[r->n++] = (struct ram_run){offset, pages};
    return 0;
}

uint64_t ram_runs_bytes(const struct ram_runs *r)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < r->n; i++)
        pages += r->v[i].pages;
    return pages * RAM_PAGE;
}

// Walks both lists by their borders; keeps what `want` says of (in a, in b).
static int combine(const struct ram_runs *a, const struct ram_runs *b, bool (*want)(bool, bool), struct ram_runs *ret)
{
    struct ram_runs out = {0};
    size_t i = 0, k = 0;
    uint64_t at = 0;
    while (i < a->n || k < b->n) {
        const struct ram_run *x = i < a->n ? &a->v[i] : NULL, *y = k < b->n ? &b->v[k] : NULL;
        const bool in_a = x && at >= x->offset, in_b = y && at >= y->offset;
        uint64_t next = UINT64_MAX;
        if (x)
            next = in_a ? end_of(x) : x->offset;
        if (y) {
            const uint64_t border = in_b ? end_of(y) : y->offset;
            next = border < next ? border : next;
        }
        if (want(in_a, in_b) && ram_runs_add(&out, at, (next - at) / RAM_PAGE) != 0) {
            ram_runs_free(&out);
            return -1;
        }
        at = next;
        i += x && at >= end_of(x);
        k += y && at >= end_of(y);
    }
    *ret = out;
    return 0;
}

static bool either(bool a, bool b)
{
    return a || b;
}

static bool only_first(bool a, bool b)
{
    return a && !b;
}

int ram_runs_union(const struct ram_runs *a, const struct ram_runs *b, struct ram_runs *ret)
{
    return combine(a, b, either, ret);
}

int ram_runs_minus(const struct ram_runs *a, const struct ram_runs *b, struct ram_runs *ret)
{
    return combine(a, b, only_first, ret);
}

int ram_runs_of_file(int fd, uint64_t bytes, struct ram_runs *ret, struct err *err)
{
    struct ram_runs out = {0};
    for (off_t at = 0; at < (off_t)bytes;) {
        const off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        const off_t end = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
        // Extents of smaller blocks than a page can share one: it is in the run before then.
        const uint64_t last = out.n ? out.v[out.n - 1].offset + out.v[out.n - 1].pages * RAM_PAGE : 0;
        const uint64_t start = (uint64_t)data / RAM_PAGE * RAM_PAGE, from = start < last ? last : start;
        const uint64_t to = ((uint64_t)end + RAM_PAGE - 1) / RAM_PAGE * RAM_PAGE;
        if (end < 0 || (to > from && ram_runs_add(&out, from, (to - from) / RAM_PAGE) != 0)) {
            ram_runs_free(&out);
            return err_sys(err, errno, "listing data");
        }
        at = end;
    }
    *ret = out;
    return 0;
}

void ram_punch_rest(int fd, uint64_t bytes, const struct ram_runs *data)
{
    uint64_t at = 0;
    for (size_t i = 0; i <= data->n; i++) {
        const uint64_t next = i < data->n ? data->v[i].offset : bytes;
        if (next > at)
            (void)fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)(next - at));
        if (i < data->n)
            at = next + data->v[i].pages * RAM_PAGE;
    }
}

// ---- header -----------------------------------------------------------------------------------------------------
static void put64(uint8_t *p, uint64_t v)
{
    for (int i = 0; i < 8; i++, v >>= 8)
        p[i] = (uint8_t)v;
}

static uint64_t get64(const uint8_t *p)
{
    uint64_t v = 0;
    for (int i = 8; i-- > 0;)
        v = v << 8 | p[i];
    return v;
}

static size_t header_bytes(uint64_t runs)
{
    return (HEADER + runs * 16 + RAM_PAGE - 1) / RAM_PAGE * RAM_PAGE;
}

static uint8_t *header_new(const struct ram_runs *runs)
{
    uint8_t *h = calloc(1, header_bytes(runs->n));
    if (!h)
        return NULL;
    memcpy(h, MAGIC, sizeof MAGIC);
    put64(h + 16, RAM_PAGE);
    put64(h + 24, runs->n);
    for (size_t i = 0; i < runs->n; i++) {
        put64(h + HEADER + 16 * i, runs->v[i].offset);
        put64(h + HEADER + 16 * i + 8, runs->v[i].pages);
    }
    return h;
}

static int no_room(struct err *err, int code)
{
    if (code == ENOSPC || code == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the saved memory");
    return err_sys(err, code, "writing memory");
}

static int write_hashed(int fd, struct sha256 *h, const uint8_t *data, uint64_t len, off_t at, struct err *err)
{
    for (uint64_t done = 0; done < len;) {
        const size_t n = len - done < CHUNK ? (size_t)(len - done) : CHUNK;
        if (fd_pwrite_full(fd, data + done, n, at + (off_t)done) != 0)
            return no_room(err, errno);
        sha256_update(h, data + done, n);
        done += n;
    }
    return 0;
}

int ram_file_write(int fd, const struct ram_runs *runs, const void *from, uint8_t ret_hash[SHA256_BYTES],
                   uint64_t *ret_bytes, struct err *err)
{
    const size_t head = header_bytes(runs->n);
    const uint64_t bytes = ram_runs_bytes(runs);
    CLEANUP_FREE uint8_t *h = header_new(runs);
    struct sha256 *sha = sha256_new();
    int failed = h && sha ? 0 : err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (!failed)
        failed = write_hashed(fd, sha, h, head, 0, err) != 0 || write_hashed(fd, sha, from, bytes, (off_t)head, err) != 0;
    if (!failed) {
        sha256_peek(sha, ret_hash);
        *ret_bytes = head + bytes;
    }
    sha256_free(sha);
    return failed ? -1 : 0;
}

// ---- reading ----------------------------------------------------------------------------------------------------
static int corrupt(struct err *err)
{
    return err_set(err, ERR_CONFLICT, "snapshot_corrupt", "the saved memory is not in order");
}

static int parse_runs(const uint8_t *h, uint64_t n, uint64_t bytes, struct ram_runs *ret)
{
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t offset = get64(h + HEADER + 16 * i), pages = get64(h + HEADER + 16 * i + 8);
        if (offset % RAM_PAGE || pages == 0 || offset >= bytes || pages > (bytes - offset) / RAM_PAGE ||
            ram_runs_add(ret, offset, pages) != 0)
            return -1;
    }
    return 0;
}

// The header of fd, whose size must be exactly what it says where `whole`. *ret_head new.
static int read_header(int fd, uint64_t bytes, bool whole, struct ram_runs *ret, uint8_t **ret_head, size_t *ret_len,
                       struct err *err)
{
    struct stat st;
    uint8_t fixed[HEADER];
    if (fstat(fd, &st) != 0)
        return err_sys(err, errno, "reading memory");
    if (st.st_size < HEADER || fd_pread_full(fd, fixed, sizeof fixed, 0) != 0)
        return corrupt(err);
    const uint64_t n = get64(fixed + 24);
    if (memcmp(fixed, MAGIC, sizeof MAGIC) != 0 || get64(fixed + 16) != RAM_PAGE || n > bytes / RAM_PAGE)
        return corrupt(err);
    const size_t len = header_bytes(n);
    if ((uint64_t)st.st_size < len)
        return corrupt(err);
    uint8_t *h = malloc(len);
    if (!h)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (fd_pread_full(fd, h, len, 0) != 0 || parse_runs(h, n, bytes, ret) != 0 ||
        (uint64_t)st.st_size != len + (whole ? ram_runs_bytes(ret) : 0)) {
        free(h);
        ram_runs_free(ret);
        return corrupt(err);
    }
    *ret_head = h;
    *ret_len = len;
    return 0;
}

static int load_pages(int fd, off_t at, const struct ram_runs *runs, uint8_t *map, struct sha256 *sha, struct err *err)
{
    for (size_t i = 0; i < runs->n; i++) {
        const uint64_t len = runs->v[i].pages * RAM_PAGE;
        for (uint64_t done = 0; done < len;) {
            const size_t n = len - done < CHUNK ? (size_t)(len - done) : CHUNK;
            uint8_t *to = map + runs->v[i].offset + done;
            if (fd_pread_full(fd, to, n, at) != 0)
                return err_sys(err, errno, "reading memory");
            sha256_update(sha, to, n);
            at += (off_t)n;
            done += n;
        }
    }
    return 0;
}

int ram_file_load(int fd, int ram_fd, uint64_t bytes, uint8_t ret_hash[SHA256_BYTES], struct ram_runs *ret_runs,
                  struct err *err)
{
    struct ram_runs runs = {0};
    uint8_t *head = NULL;
    size_t len;
    if (read_header(fd, bytes, true, &runs, &head, &len, err) != 0)
        return -1;
    struct sha256 *sha = sha256_new();
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
    int failed = !sha || map == MAP_FAILED ? err_sys(err, ENOMEM, "mapping memory") : 0;
    if (!failed) {
        sha256_update(sha, head, len);
        failed = load_pages(fd, (off_t)len, &runs, map, sha, err);
    }
    if (!failed)
        sha256_peek(sha, ret_hash);
    if (map != MAP_FAILED)
        munmap(map, bytes);
    sha256_free(sha);
    free(head);
    if (!failed && ret_runs)
        *ret_runs = runs;
    else
        ram_runs_free(&runs);
    return failed;
}

int ram_file_read(int fd, uint64_t bytes, uint8_t ret_hash[SHA256_BYTES], struct ram_runs *ret_runs, void **ret_pages,
                  size_t *ret_mapped, struct err *err)
{
    struct ram_runs runs = {0};
    uint8_t *head = NULL;
    size_t len;
    if (read_header(fd, bytes, true, &runs, &head, &len, err) != 0)
        return -1;
    const size_t want = (size_t)ram_runs_bytes(&runs);
    struct sha256 *sha = sha256_new();
    uint8_t *pages = want ? mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : NULL;
    int failed = !sha || pages == MAP_FAILED ? err_sys(err, ENOMEM, "mapping memory") : 0;
    if (!failed)
        sha256_update(sha, head, len);
    for (size_t done = 0; !failed && done < want;) {
        const size_t n = want - done < CHUNK ? want - done : CHUNK;
        failed = fd_pread_full(fd, pages + done, n, (off_t)(len + done)) != 0 ? err_sys(err, errno, "reading memory") : 0;
        if (!failed)
            sha256_update(sha, pages + done, n);
        done += n;
    }
    if (!failed)
        sha256_peek(sha, ret_hash);
    sha256_free(sha);
    free(head);
    if (failed) {
        if (pages && pages != MAP_FAILED)
            munmap(pages, want);
        ram_runs_free(&runs);
        return -1;
    }
    *ret_runs = runs;
    *ret_pages = pages;
    *ret_mapped = want;
    return 0;
}

int ram_runs_save(int fd, const struct ram_runs *runs, struct err *err)
{
    CLEANUP_FREE uint8_t *h = header_new(runs);
    if (!h)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    return fd_pwrite_full(fd, h, header_bytes(runs->n), 0) == 0 ? 0 : no_room(err, errno);
}

int ram_runs_load(int fd, uint64_t bytes, struct ram_runs *ret, struct err *err)
{
    uint8_t *head = NULL;
    size_t len;
    if (read_header(fd, bytes, false, ret, &head, &len, err) != 0)
        return -1;
    free(head);
    return 0;
}
