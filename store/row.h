// row.h - a struct and the columns of its table, described once: binding, reading, copying and freeing go by the
// description. Private to store/.
#ifndef AIRLOCK_STORE_ROW_H
#define AIRLOCK_STORE_ROW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "store/db.h"

enum field_type {
    FIELD_TEXT,  // char[]: "" is stored as ''
    FIELD_HEAP,  // char *: NULL is stored as NULL; owned by the row
    FIELD_INT,   // int or an enum
    FIELD_INT64, // int64_t or uint64_t
    FIELD_BOOL,
    FIELD_BLOB,  // uint8_t[]
};
struct field {
    enum field_type type;
    size_t offset, size;
};
#define FIELD(kind, s, member) {FIELD_##kind, offsetof(struct s, member), sizeof(((struct s *)0)->member)}

struct row_type {
    const struct field *fields; // in the order of the columns
    unsigned n;
    size_t size;                // of the struct
};
#define ROW_TYPE(s, table) {(table), sizeof(table) / sizeof(table)[0], sizeof(struct s)}

// Binds the fields [first, n).
void row_bind(struct stmt *st, const struct row_type *t, const void *row, unsigned first);
// Steps; reads the row (zeroed first) from the first columns. 1, 0 at the end, -1; members only after 1.
int row_next(struct stmt *st, const struct row_type *t, void *row, struct err *err);
void row_free(const struct row_type *t, void *row);
int row_copy(const struct row_type *t, void *to, const void *from); // 0, or -1: out of memory, *to is zeroed

#endif
