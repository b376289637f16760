// airlock verify: receipts and the audit chain from the files alone. 0 verified, 1 mismatch, 2 truncated, 3 unreadable.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "base/buf.h"
#include "base/fd.h"
#include "server/commands.h"
#include "store/verify.h"

static int usage(FILE *out, int status)
{
    fputs("usage: airlock verify --state-dir DIR [--checkpoint FILE] [--keys PEM] [--deep]\n"
          "       airlock verify --receipt FILE --key PEM\n\n"
          "exit status: 0 verified, 1 mismatch, 2 truncated, 3 unreadable\n",
          out);
    return status;
}

static const char *const WORDS[] = {"verified", "mismatch", "truncated", "unreadable"};

static int tell(enum verify_verdict v, const struct verify_report *r)
{
    if (v == VERIFY_OK)
        printf("verified: %llu audit entries, %llu receipts (%llu pending), %llu outputs, head %s\n",
               (unsigned long long)r->entries, (unsigned long long)r->receipts, (unsigned long long)r->pending_receipts,
               (unsigned long long)r->outputs_checked, r->head_hash);
    else
        printf("%s: %s\n", WORDS[v], r->fault);
    return (int)v;
}

static int verify_one(const char *receipt, const char *key)
{
    CLEANUP_BUF struct buf envelope = BUF_INIT(1 << 20), pem = BUF_INIT(1 << 16);
    struct verify_report r = {0};
    if (fd_read_file(AT_FDCWD, receipt, &envelope) != 0 || fd_read_file(AT_FDCWD, key, &pem) != 0) {
        printf("unreadable: %s\n", strerror(errno));
        return VERIFY_UNREADABLE;
    }
    const enum verify_verdict v = verify_receipt_text(buf_text(&envelope), buf_text(&pem), &r);
    if (v == VERIFY_OK)
        puts("verified: the receipt was signed with this key");
    else
        printf("%s: %s\n", WORDS[v], r.fault);
    return (int)v;
}

int cmd_verify(int argc, char **argv)
{
    const char *state = "var/state", *checkpoint = NULL, *keys = NULL, *receipt = NULL, *key = NULL;
    int deep = 0;
    const struct {
        const char *flag;
        const char **to;
    } FLAGS[] = {{"--state-dir", &state}, {"--checkpoint", &checkpoint}, {"--keys", &keys}, {"--receipt", &receipt}, {"--key", &key}};
    for (int i = 0; i < argc; i++) {
        bool known = strcmp(argv[i], "--deep") == 0;
        deep |= known;
        if (strcmp(argv[i], "--help") == 0)
            return usage(stdout, 0);
        for (size_t k = 0; !known && k < sizeof FLAGS / sizeof *FLAGS; k++)
            if (strcmp(argv[i], FLAGS[k].flag) == 0 && i + 1 < argc) {
                *FLAGS[k].to = argv[++i];
                known = true;
            }
        if (!known) {
            fprintf(stderr, "airlock verify: unknown or incomplete argument %s\n", argv[i]);
            return usage(stderr, 3);
        }
    }
    if (receipt || key)
        return receipt && key ? verify_one(receipt, key) : usage(stderr, 3);
    struct verify_report r = {0};
    const enum verify_verdict v = verify_state(state, checkpoint, keys, deep, &r);
    return tell(v, &r);
}
