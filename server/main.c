// airlock: the subcommands.
#include <stdio.h>
#include <string.h>

#include "qemu/ram_hold.h"
#include "server/commands.h"

static int version(int argc, char **argv)
{
    (void)argc, (void)argv;
    puts("airlock " AIRLOCK_VERSION);
    return 0;
}

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} COMMANDS[] = {
    {"serve", cmd_serve, "run the server"},
    {"token", cmd_token, "create, list and revoke tokens of a running server"},
    {"image", cmd_image, "add, list, verify and remove images"},
    {"verify", cmd_verify, "check receipts and the audit chain from the files alone"},
    {"doctor", cmd_doctor, "say what this host has and what is missing"},
    {"version", version, "print the version"},
};

static int usage(FILE *out, int status)
{
    fputs("usage: airlock COMMAND [options]\n\n", out);
    for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++)
        fprintf(out, "  %-8s %s\n", COMMANDS[i].name, COMMANDS[i].help);
    fputs("\nairlock COMMAND --help tells more.\n", out);
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage(stderr, 2);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0)
        return usage(stdout, 0);
    if (strcmp(argv[1], "--version") == 0)
        return version(0, NULL);
    if (strcmp(argv[1], RAM_HOLD_COMMAND) == 0) // the server's own: it starts itself so
        return ram_hold_main(argc - 2, argv + 2);
    for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++)
        if (strcmp(argv[1], COMMANDS[i].name) == 0)
            return COMMANDS[i].run(argc - 2, argv + 2);
    fprintf(stderr, "airlock: unknown command %s\n", argv[1]);
    return usage(stderr, 2);
}
