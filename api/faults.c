#include "api/faults.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void faults_add(struct faults *f, const char *pointer, const char *fmt, ...)
{
    if (f->n == FAULTS_MAX) {
        f->more = true;
        return;
    }
    struct fault one = {strdup(pointer), NULL};
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&one.message, fmt, ap) < 0)
        one.message = NULL;
    va_end(ap);
    if (one.pointer && one.message) {
        f->items[f->n++] = one;
        return;
    }
    f->out_of_memory = true;
    free(one.pointer);
    free(one.message);
}

void faults_unbuilt(struct faults *f, const char *pointer)
{
    if (!f->unbuilt)
        f->unbuilt = strdup(pointer);
}

void faults_free(struct faults *f)
{
    if (!f)
        return;
    for (size_t i = 0; i < f->n; i++) {
        free(f->items[i].pointer);
        free(f->items[i].message);
    }
    free(f->unbuilt);
    memset(f, 0, sizeof *f);
}
