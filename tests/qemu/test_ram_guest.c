// What a VM's memory costs, of a process that maps a template as QEMU does: this one.
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "qemu/ram.h"

#define PAGES 4096ull // a size that no other mapping of this process has
#define TEMPLATE 2000ull
#define READ 1000ull
#define WRITTEN 300ull
#define SLACK (2ull << 20) // what the process itself takes from one look to the next

// ThreadSanitizer's shadow grows with what is touched, and is counted as this process's own.
#ifdef __SANITIZE_THREAD__
#define SHADOWED true
#else
#define SHADOWED false
#endif

// A template of which the first TEMPLATE pages hold something.
static int template_of(struct err *err)
{
    const int fd = ram_new(PAGES * RAM_PAGE, err);
    assert_true(fd >= 0);
    uint8_t *ram = mmap(NULL, PAGES * RAM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(ram != MAP_FAILED);
    for (uint64_t i = 0; i < TEMPLATE; i++)
        ram[i * RAM_PAGE] = 1;
    assert_int_equal(munmap(ram, PAGES * RAM_PAGE), 0);
    assert_int_equal(ram_seal(fd, err), 0);
    return fd;
}

static volatile uint8_t *fork_of(int fd)
{
    uint8_t *ram = mmap(NULL, PAGES * RAM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    assert_true(ram != MAP_FAILED);
    assert_int_equal(madvise(ram, PAGES * RAM_PAGE, MADV_RANDOM), 0); // no page comes without being asked for
    return ram;
}

static uint64_t read_pages(volatile uint8_t *ram)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < READ; i++)
        sum += ram[i * RAM_PAGE];
    return sum;
}

static struct ram_cost cost(void)
{
    struct ram_cost c = {0};
    assert_int_equal(ram_cost_read(getpid(), 0, PAGES * RAM_PAGE, &c), 0);
    assert_int_equal(c.unique_bytes, c.vmm_bytes + c.guest_bytes);
    return c;
}

// Alone or not: what it only reads is the template's. Around a fault the kernel may map some pages more.
static void a_fork_pays_for_what_it_wrote(void **state)
{
    if (SHADOWED)
        skip();
    struct err err = {0};
    const int fd = template_of(&err);
    (void)state;
    const struct ram_cost before = cost();
    assert_int_equal(before.guest_bytes + before.shared_bytes, 0);
    volatile uint8_t *ram = fork_of(fd);
    assert_int_equal(read_pages(ram), READ);
    struct ram_cost c = cost();
    assert_int_equal(c.guest_bytes, 0);
    assert_in_range(c.shared_bytes, READ * RAM_PAGE, TEMPLATE * RAM_PAGE);
    assert_true(c.vmm_bytes < before.vmm_bytes + SLACK);
    const uint64_t shared = c.shared_bytes;
    for (uint64_t i = 0; i < WRITTEN; i++)
        ram[i * RAM_PAGE] = 2;
    c = cost();
    assert_int_equal(c.guest_bytes, WRITTEN * RAM_PAGE);
    assert_int_equal(c.shared_bytes, shared - WRITTEN * RAM_PAGE);
    volatile uint8_t *other = mmap(NULL, PAGES * RAM_PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    assert_int_equal(read_pages(other), READ); // somebody else maps them too: nothing of it changes
    c = cost();
    assert_int_equal(c.guest_bytes, WRITTEN * RAM_PAGE);
    assert_int_equal(c.shared_bytes, shared - WRITTEN * RAM_PAGE);
    munmap((void *)other, PAGES * RAM_PAGE);
    munmap((void *)ram, PAGES * RAM_PAGE);
    close(fd);
}

// A guest that booted: all of its memory is its own.
static void a_booted_guest_has_all_of_its_own(void **state)
{
    if (SHADOWED)
        skip();
    (void)state;
    uint8_t *ram = mmap(NULL, PAGES * RAM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(ram != MAP_FAILED);
    assert_int_equal(madvise(ram, PAGES * RAM_PAGE, MADV_NOHUGEPAGE), 0);
    const struct ram_cost before = cost();
    for (uint64_t i = 0; i < WRITTEN; i++)
        ram[i * RAM_PAGE] = 2;
    const struct ram_cost c = cost();
    assert_int_equal(c.shared_bytes, 0);
    assert_in_range(c.unique_bytes - before.unique_bytes, WRITTEN * RAM_PAGE, WRITTEN * RAM_PAGE + SLACK);
    munmap(ram, PAGES * RAM_PAGE);
}

static void one_that_is_gone(void **state)
{
    struct ram_cost c;
    (void)state;
    const pid_t pid = fork();
    if (pid == 0)
        _exit(0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(ram_cost_read(pid, 0, PAGES * RAM_PAGE, &c), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_fork_pays_for_what_it_wrote), cmocka_unit_test(a_booted_guest_has_all_of_its_own),
                                       cmocka_unit_test(one_that_is_gone)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
