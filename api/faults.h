// faults.h - what is wrong with a request, all of it: JSON pointers with a sentence each, up to FAULTS_MAX. Owns the
// texts. Does not own how they are answered (problem.c). One request's, one thread.
#ifndef AIRLOCK_API_FAULTS_H
#define AIRLOCK_API_FAULTS_H

#include <stdbool.h>
#include <stddef.h>

#define FAULTS_MAX 64

struct fault {
    char *pointer;
    char *message;
};

struct faults {
    struct fault items[FAULTS_MAX];
    size_t n;
    bool more;               // there were further ones
    bool out_of_memory;
    char *unbuilt;           // pointer of the first field that is named but not built
    const char *code;        // the problem's code where one fault has a word of its own ("path_invalid")
};

// pointer is copied, message is formatted. A fault that finds no room is counted in `more`.
void faults_add(struct faults *f, const char *pointer, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void faults_unbuilt(struct faults *f, const char *pointer);
void faults_free(struct faults *f); // the texts; accepts NULL

#endif
