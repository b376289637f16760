// fixture.h - a state directory of its own per test, and rows to put into it. For tests/store only.
#ifndef AIRLOCK_TESTS_STORE_FIXTURE_H
#define AIRLOCK_TESTS_STORE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "store/evidence.h"
#include "store/store.h"

struct dir {
    char path[256];
    int fd;
};
// setup and teardown for cmocka: *state is a struct dir *.
int dir_setup(void **state);
int dir_teardown(void **state);
struct dir *dir_new(void);
void dir_free(struct dir *d);
// Copies a whole directory tree (cp -a).
void dir_copy(const char *from, const char *to);

struct store *open_store(const struct dir *d);
// A write that must succeed.
void must_write(struct store *s, store_tx_fn fn, void *arg);
// An update by hand, through SQLite, of a closed store.
void poke(const struct dir *d, const char *sql);

struct admission admission_of(const char *tenant, const char *operation);
struct sandbox_row sandbox_of(const char *tenant, const char *name);
struct command_row command_of(const char *tenant, const char *sandbox_id);
struct job_row job_of(const char *tenant, const char *sandbox_id);
struct snapshot_row snapshot_of(const char *tenant, const char *sandbox_id, const char *parent_id);

void put_sandbox(struct store *s, const struct sandbox_row *row);
void put_command(struct store *s, const struct command_row *row);
void put_job(struct store *s, const struct job_row *row);
void put_snapshot(struct store *s, const struct snapshot_row *row);
void admit(struct store *s, const struct admission *a);
void settle(struct store *s, const struct admission *a, const char *outcome, int status);

#define assert_err(err, k, c)                                                                                          \
    do {                                                                                                               \
        assert_int_equal((err).kind, (k));                                                                             \
        assert_string_equal((err).code, (c));                                                                          \
    } while (0)

#endif
