#include "sandbox/policy.h"

#include <string.h>

// Loader, shell, interpreter and tool start-up hooks. PYTHONPATH, PERL5LIB and the like only add search paths that the
// command's own argv could name as well, and stay allowed.
static const char *const PREFIXES[] = {"LD_", "DYLD_", "BASH_FUNC_"};
static const char *const NAMES[] = {
    "BASH_ENV",       "ENV",         "SHELLOPTS",         "BASHOPTS",      "PS4",           "PROMPT_COMMAND",
    "GLIBC_TUNABLES", "GCONV_PATH",  "NODE_OPTIONS",      "PYTHONSTARTUP", "PYTHONHOME",    "PYTHONINSPECT",
    "PERL5OPT",       "PERL5DB",     "RUBYOPT",           "RUBYLIB",       "JAVA_TOOL_OPTIONS",
    "_JAVA_OPTIONS",  "JDK_JAVA_OPTIONS", "GIT_SSH_COMMAND", "GIT_EXTERNAL_DIFF", "PYTHONBREAKPOINT", "MALLOC_CONF",
};

bool policy_env_name_denied(const char *name)
{
    for (size_t i = 0; i < sizeof PREFIXES / sizeof *PREFIXES; i++)
        if (strncmp(name, PREFIXES[i], strlen(PREFIXES[i])) == 0)
            return true;
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(name, NAMES[i]) == 0)
            return true;
    return false;
}

int policy_env(const json_t *env, struct err *err)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)env, name, value) {
        if (!policy_env_name_denied(name))
            continue;
        err_set(err, ERR_POLICY_DENIED, "env_denied",
                "the environment variable %.64s changes what a program loads before it runs", name);
        return err_remedy(err, "leave it out; set it inside the command where it is really needed");
    }
    return 0;
}
