// err.h - the one error object every room returns its failures in.
//
// Owns: kinds, and the text that travels with a failure. Does not own: HTTP statuses (api/problem.c maps
// kinds to them) and logging (log where you decide, not where you fail). Any thread; a struct err belongs
// to the caller who declared it. libc only: the guest agent uses it too.
#ifndef AIRLOCK_BASE_ERR_H
#define AIRLOCK_BASE_ERR_H

#include <stdarg.h>
#include <stdbool.h>

// The kinds of the wire contract (docs/errors.md), each asking for another recovery by the caller.
enum err_kind {
    ERR_NONE = 0,
    ERR_POLICY_DENIED,
    ERR_ADMISSION_FAILED,
    ERR_GUEST_COMMAND_FAILED,
    ERR_TIMEOUT,
    ERR_TRANSPORT_FAILED,
    ERR_CLEANUP_FAILED,
    ERR_SNAPSHOT_MISMATCH,
    ERR_UNSUPPORTED_CAPABILITY,
    ERR_VALIDATION,
    ERR_UNAUTHORIZED,
    ERR_NOT_FOUND,
    ERR_METHOD_NOT_ALLOWED,
    ERR_CONFLICT,
    ERR_PRECONDITION_FAILED,
    ERR_TOO_LARGE,
    ERR_UNSUPPORTED_MEDIA_TYPE,
    ERR_RANGE, // answered 416 with kind validation
    ERR_RATE_LIMITED,
    ERR_UNAVAILABLE,
    ERR_INTERNAL,
};

#define ERR_CODE_MAX 64
#define ERR_DETAIL_MAX 320
#define ERR_REMEDY_MAX 256
#define ERR_FIELDS_MAX 1024

// detail and remedy may reach a client: never a host path, argv, secret or environment value in them.
// internal is for the log alone (paths, errno text).
struct err {
    enum err_kind kind;
    int sys_errno;              // 0 where no system call failed
    char code[ERR_CODE_MAX];    // stable word, e.g. "name_taken"; "" where the kind says all
    char detail[ERR_DETAIL_MAX];
    char remedy[ERR_REMEDY_MAX];
    char internal[ERR_DETAIL_MAX];
    char fields[ERR_FIELDS_MAX]; // what of it, one "name\tsentence\n" each: a problem's errors[]; "" for none
};

// Fills *err (NULL is allowed and ignored) and returns -1, so that `return err_set(err, …)` reads well.
int err_set(struct err *err, enum err_kind kind, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

// As err_set with kind internal, keeps errno; the formatted text goes to internal, detail stays general.
int err_sys(struct err *err, int sys_errno, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// Puts "context: " before internal (and nothing before detail): call when an error crosses a room. Returns -1.
int err_wrap(struct err *err, const char *context);

// Sets the remedy. Returns -1.
int err_remedy(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// Names one field that is at fault; what finds no room is left out. Returns -1.
int err_field(struct err *err, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// Wire word of a kind ("policy_denied"); ERR_RANGE gives "validation"; ERR_NONE gives "none".
const char *err_kind_name(enum err_kind kind);

#endif
