// The targets without libFuzzer: every file of the directories (or files) named on the command line goes through
// LLVMFuzzerTestOneInput once. Prints how many there were; a finding ends the process as the sanitizers or CLAIM do,
// after the name of the input.
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

#define INPUT_MAX (1u << 20)

static char current[PATH_MAX];

// Before main, and from abort() alone: the sanitizers call it as well.
static void say_which(int signal)
{
    static const char HEAD[] = "input: ";
    if (write(STDERR_FILENO, HEAD, sizeof HEAD - 1) < 0 || write(STDERR_FILENO, current, strlen(current)) < 0 ||
        write(STDERR_FILENO, "\n", 1) < 0)
        _exit(1);
    _exit(1);
}

static unsigned run_file(const char *path)
{
    uint8_t *data = malloc(INPUT_MAX);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    CLAIM(data && fd >= 0);
    size_t len = 0;
    for (ssize_t n; len < INPUT_MAX && (n = read(fd, data + len, INPUT_MAX - len)) > 0;)
        len += (size_t)n;
    close(fd);
    snprintf(current, sizeof current, "%s", path);
    uint8_t *exact = exact_copy(data, len);
    free(data);
    LLVMFuzzerTestOneInput(exact, len);
    free(exact);
    return 1;
}

static unsigned run_path(const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0) {
        perror(path);
        exit(2);
    }
    if (!S_ISDIR(st.st_mode))
        return run_file(path);
    unsigned n = 0;
    DIR *d = opendir(path);
    CLAIM(d);
    for (const struct dirent *e; (e = readdir(d));) {
        char one[PATH_MAX];
        if (e->d_name[0] == '.')
            continue;
        snprintf(one, sizeof one, "%s/%s", path, e->d_name);
        n += run_file(one);
    }
    closedir(d);
    return n;
}

int main(int argc, char **argv)
{
    unsigned n = 0;
    signal(SIGABRT, say_which); // ASAN_OPTIONS=abort_on_error=1 brings the sanitizers here too
    for (int i = 1; i < argc; i++)
        n += run_path(argv[i]);
    printf("%u inputs\n", n);
    return 0;
}
