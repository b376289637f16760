// A read connection per thread and store, so that a read never waits for another thread.
#include <stdlib.h>

#include "store/int.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;      // struct reader *: those of this thread
static int key_code;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // every store's list, and reader.store

// At thread exit. The struct belongs to its thread; the connection to whoever comes first, thread or store_close.
static void thread_gone(void *arg)
{
    for (struct reader *next, *r = arg; r; r = next) {
        next = r->next_of_thread;
        pthread_mutex_lock(&lock);
        if (r->store)
            for (struct reader **at = &r->store->readers; *at; at = &(*at)->next_of_store)
                if (*at == r) {
                    *at = r->next_of_store;
                    break;
                }
        pthread_mutex_unlock(&lock);
        db_close(r->db);
        free(r);
    }
}

static void make_key(void)
{
    key_code = pthread_key_create(&key, thread_gone);
}

static struct reader *find(struct store *s, struct reader **mine)
{
    for (struct reader **at = mine; *at;) {
        struct reader *r = *at;
        pthread_mutex_lock(&lock);
        struct store *of = r->store;
        pthread_mutex_unlock(&lock);
        if (of == s)
            return r;
        if (of) {
            at = &r->next_of_thread;
            continue;
        }
        *at = r->next_of_thread; // its store was closed
        free(r);
    }
    return NULL;
}

struct db *reader_db(struct store *s, struct err *err)
{
    pthread_once(&once, make_key);
    if (key_code != 0) {
        err_sys(err, key_code, "a key for read connections");
        return NULL;
    }
    struct reader *mine = pthread_getspecific(key);
    struct reader *r = find(s, &mine);
    if (r || !(r = calloc(1, sizeof *r))) {
        pthread_setspecific(key, mine);
        return r ? r->db : NULL;
    }
    r->db = db_open(s->db_path, DB_READER, err);
    r->next_of_thread = mine;
    if (!r->db || pthread_setspecific(key, r) != 0) {
        pthread_setspecific(key, mine);
        db_close(r->db);
        free(r);
        return NULL;
    }
    pthread_mutex_lock(&lock);
    r->store = s;
    r->next_of_store = s->readers;
    s->readers = r;
    pthread_mutex_unlock(&lock);
    return r->db;
}

void readers_close(struct store *s)
{
    pthread_mutex_lock(&lock);
    for (struct reader *next, *r = s->readers; r; r = next) {
        next = r->next_of_store;
        db_close(r->db);
        r->db = NULL;
        r->next_of_store = NULL;
        r->store = NULL;
    }
    s->readers = NULL;
    pthread_mutex_unlock(&lock);
}

void store_thread_done(void)
{
    pthread_once(&once, make_key);
    struct reader *mine = key_code == 0 ? pthread_getspecific(key) : NULL;
    if (!mine)
        return;
    (void)pthread_setspecific(key, NULL);
    thread_gone(mine);
}

void store_warm(void *store)
{
    struct err ignored = {0};
    (void)reader_db(store, &ignored);
}
