// commands.h - the subcommands of `airlock`, one function each: argv after the subcommand, exit status back.
#ifndef AIRLOCK_SERVER_COMMANDS_H
#define AIRLOCK_SERVER_COMMANDS_H

#define AIRLOCK_VERSION "0.1.0"

int cmd_serve(int argc, char **argv);
int cmd_token(int argc, char **argv);
int cmd_image(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_doctor(int argc, char **argv);

#endif
