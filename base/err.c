#include "base/err.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

int err_set(struct err *err, enum err_kind kind, const char *code, const char *fmt, ...)
{
    if (!err)
        return -1;
    va_list args;
    memset(err, 0, sizeof *err);
    err->kind = kind;
    snprintf(err->code, sizeof err->code, "%s", code ? code : "");
    va_start(args, fmt);
    vsnprintf(err->detail, sizeof err->detail, fmt, args);
    va_end(args);
    return -1;
}

int err_sys(struct err *err, int sys_errno, const char *fmt, ...)
{
    if (!err)
        return -1;
    char text[ERR_DETAIL_MAX];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    const bool full = sys_errno == ENOSPC || sys_errno == EDQUOT;
    memset(err, 0, sizeof *err);
    err->kind = full ? ERR_UNAVAILABLE : ERR_INTERNAL;
    err->sys_errno = sys_errno;
    snprintf(err->code, sizeof err->code, "%s", full ? "disk_full" : "system_error");
    snprintf(err->detail, sizeof err->detail, "%s", full ? "the host's disk is full" : "a system call failed on the host");
    snprintf(err->internal, sizeof err->internal, "%.240s: %s", text, strerror(sys_errno));
    return -1;
}

int err_wrap(struct err *err, const char *context)
{
    if (!err)
        return -1;
    char text[ERR_DETAIL_MAX];
    snprintf(text, sizeof text, "%.60s: %.250s", context, err->internal);
    memcpy(err->internal, text, sizeof text);
    return -1;
}

int err_remedy(struct err *err, const char *fmt, ...)
{
    if (!err)
        return -1;
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->remedy, sizeof err->remedy, fmt, args);
    va_end(args);
    return -1;
}

const char *err_kind_name(enum err_kind kind)
{
    switch (kind) {
    case ERR_NONE:
        return "none";
    case ERR_POLICY_DENIED:
        return "policy_denied";
    case ERR_ADMISSION_FAILED:
        return "admission_failed";
    case ERR_GUEST_COMMAND_FAILED:
        return "guest_command_failed";
    case ERR_TIMEOUT:
        return "timeout";
    case ERR_TRANSPORT_FAILED:
        return "transport_failed";
    case ERR_CLEANUP_FAILED:
        return "cleanup_failed";
    case ERR_SNAPSHOT_MISMATCH:
        return "snapshot_mismatch";
    case ERR_UNSUPPORTED_CAPABILITY:
        return "unsupported_capability";
    case ERR_VALIDATION:
    case ERR_RANGE:
        return "validation";
    case ERR_UNAUTHORIZED:
        return "unauthorized";
    case ERR_NOT_FOUND:
        return "not_found";
    case ERR_METHOD_NOT_ALLOWED:
        return "method_not_allowed";
    case ERR_CONFLICT:
        return "conflict";
    case ERR_PRECONDITION_FAILED:
        return "precondition_failed";
    case ERR_TOO_LARGE:
        return "too_large";
    case ERR_UNSUPPORTED_MEDIA_TYPE:
        return "unsupported_media_type";
    case ERR_RATE_LIMITED:
        return "rate_limited";
    case ERR_UNAVAILABLE:
        return "unavailable";
    case ERR_INTERNAL:
        return "internal";
    }
    return "internal";
}

int err_field(struct err *err, const char *name, const char *fmt, ...)
{
    char sentence[200], line[280];
    va_list args;
    if (!err)
        return -1;
    va_start(args, fmt);
    vsnprintf(sentence, sizeof sentence, fmt, args);
    va_end(args);
    for (char *p = sentence; *p; p++)
        if (*p == '\t' || *p == '\n')
            *p = ' ';
    const size_t at = strlen(err->fields);
    const int n = snprintf(line, sizeof line, "%.60s\t%s\n", name, sentence);
    if (n > 0 && (size_t)n < sizeof line && at + (size_t)n < sizeof err->fields)
        memcpy(err->fields + at, line, (size_t)n + 1);
    return -1;
}
