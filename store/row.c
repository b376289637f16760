#include "store/row.h"

#include <stdlib.h>
#include <string.h>

void row_bind(struct stmt *st, const struct row_type *t, const void *row, unsigned first)
{
    for (unsigned i = first; i < t->n; i++) {
        const struct field *f = &t->fields[i];
        const char *at = (const char *)row + f->offset;
        int number;
        int64_t wide;
        switch (f->type) {
        case FIELD_TEXT:
            db_bind_text(st, at);
            break;
        case FIELD_HEAP:
            db_bind_text(st, *(char *const *)(const void *)at);
            break;
        case FIELD_INT:
            memcpy(&number, at, sizeof number);
            db_bind_int(st, number);
            break;
        case FIELD_INT64:
            memcpy(&wide, at, sizeof wide);
            db_bind_int(st, wide);
            break;
        case FIELD_BOOL:
            db_bind_int(st, *(const bool *)at);
            break;
        case FIELD_BLOB:
            db_bind_blob(st, at, f->size);
            break;
        }
    }
}

static void read_field(struct stmt *st, const struct field *f, char *at)
{
    int number;
    int64_t wide;
    switch (f->type) {
    case FIELD_TEXT:
        db_col_text(st, at, f->size);
        break;
    case FIELD_HEAP:
        *(char **)(void *)at = db_col_dup(st);
        break;
    case FIELD_INT:
        number = (int)db_col_int(st);
        memcpy(at, &number, sizeof number);
        break;
    case FIELD_INT64:
        wide = db_col_int(st);
        memcpy(at, &wide, sizeof wide);
        break;
    case FIELD_BOOL:
        *(bool *)at = db_col_int(st) != 0;
        break;
    case FIELD_BLOB:
        db_col_blob(st, at, f->size);
        break;
    }
}

int row_next(struct stmt *st, const struct row_type *t, void *row, struct err *err)
{
    const int got = db_step(st, err);
    if (got <= 0)
        return got;
    memset(row, 0, t->size);
    for (unsigned i = 0; i < t->n; i++)
        read_field(st, &t->fields[i], (char *)row + t->fields[i].offset);
    if (!db_col_failed(st))
        return 1;
    row_free(t, row);
    return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
}

void row_free(const struct row_type *t, void *row)
{
    for (unsigned i = 0; row && i < t->n; i++) {
        if (t->fields[i].type != FIELD_HEAP)
            continue;
        char **at = (char **)(void *)((char *)row + t->fields[i].offset);
        free(*at);
        *at = NULL;
    }
}

int row_copy(const struct row_type *t, void *to, const void *from)
{
    bool failed = false;
    memcpy(to, from, t->size);
    for (unsigned i = 0; i < t->n; i++) {
        if (t->fields[i].type != FIELD_HEAP)
            continue;
        char **at = (char **)(void *)((char *)to + t->fields[i].offset);
        if (*at) {
            *at = strdup(*at);
            failed |= !*at;
        }
    }
    if (!failed)
        return 0;
    row_free(t, to);
    memset(to, 0, t->size);
    return -1;
}
