// migrate.h - the steps from an empty file to today's tables. Append-only: a released step is never changed, a new one
// is added below it with a test from a file the step before it made. Private to store/.
#ifndef AIRLOCK_STORE_MIGRATE_H
#define AIRLOCK_STORE_MIGRATE_H

#include <stddef.h>

#include "store/db.h"

extern const char *const MIGRATIONS[];
extern const size_t MIGRATIONS_COUNT;

// Runs the steps that are missing, each in a transaction of its own, counted in PRAGMA user_version.
// internal/store_newer: the file was made by a newer server.
int migrate_run(struct db *db, const char *const *steps, size_t n, struct err *err);

#endif
