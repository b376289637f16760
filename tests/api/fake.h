// fake.h - a manager without guests: sandboxes are rows of a real store, commands run at once or are held, files live in
// memory. Implements the functions of sandbox/*.h that api/ calls. For tests of api/ only.
#ifndef TESTS_API_FAKE_H
#define TESTS_API_FAKE_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/work.h"
#include "sandbox/command.h"
#include "sandbox/files.h"
#include "sandbox/logs.h"
#include "sandbox/manager.h"
#include "store/logfile.h"
#include "store/store.h"

struct fake_file {
    struct fake_file *next;
    char path[256];
    char *data;
    size_t len;
    bool directory, proc; // proc: says it is empty
};

struct fake_command {
    struct fake_command *next;
    struct command_row row;
    struct admission a;
    int status;
    struct command_callbacks cb;
    struct spool *spool;
};

struct manager {
    struct store *store;
    struct hub *hub;
    struct work_pool *pool;
    int dirfd;                        // spools
    pthread_mutex_t lock;
    struct sandbox_info *live[64];
    size_t n_live;
    struct fake_command *commands;    // held
    struct fake_file *files;
    struct log_entry logs[256];
    char *log_texts[256];
    size_t n_logs;
    bool not_ready;
    atomic_bool hold;                 // creates stop between admission and outcome …
    atomic_int held;                  // … and are counted here
    atomic_int created;               // creates that were begun
    struct err fail_next;             // the next operation is refused with it
    bool fail_cleanup;
    size_t stdin_len, stdin_calls;
    size_t window;                    // bytes an upload takes at once; 0: all
};

struct manager *fake_new(struct store *store, int dirfd);
void fake_free(struct manager *m);
void fake_file_put(struct manager *m, const char *path, const void *data, size_t len);
void fake_log(struct manager *m, const char *sandbox_id, enum log_source source, const char *text);
void fake_event(struct manager *m, const char *tenant, const char *kind, const char *sandbox_id);
// Output and end of a held command.
void fake_output(struct manager *m, const char *id, enum spool_stream stream, const void *data, size_t len);
void fake_exit(struct manager *m, const char *id, int code);
char *fake_problem(const struct err *err, const struct admission *a, int *ret_status);
struct fake_command *fake_command_find(struct manager *m, const char *id); // under m->lock

#endif
