// limits.h - every number the product promises, in one place, with its source. No code.
#ifndef AIRLOCK_BASE_LIMITS_H
#define AIRLOCK_BASE_LIMITS_H

// Sandboxes.
#define LIMIT_VCPUS_MAX 8
#define LIMIT_MEMORY_MIB_MIN 128
#define LIMIT_MEMORY_MIB_MAX 16384
#define LIMIT_DISK_MIB_MIN 64
#define LIMIT_DISK_MIB_MAX 65536
#define LIMIT_TTL_SECONDS_MAX 2592000 // 30 days
#define LIMIT_LABELS 32
#define LIMIT_LABEL_KEY 64
#define LIMIT_LABEL_VALUE 256
#define LIMIT_TENANT_SANDBOXES 200    // live ones; default quota
#define LIMIT_TENANT_SNAPSHOTS 100    // alive ones; default quota
#define LIMIT_FORK_MAX 64             // children of one call
#define LIMIT_SNAPSHOT_SECONDS_MAX 31536000 // a year

// Commands (section 4).
#define LIMIT_COMMANDS_RUNNING 32
#define LIMIT_COMMAND_TIMEOUT_S_DEFAULT 60
#define LIMIT_COMMAND_TIMEOUT_S_MAX 86400
#define LIMIT_COMMAND_KILL_GRACE_MS 2000
#define LIMIT_OUTPUT_ANSWER_DEFAULT 65536
#define LIMIT_OUTPUT_ANSWER_MAX (16u << 20)
#define LIMIT_SPOOL_STREAM_BYTES (64ull << 20)
#define LIMIT_UNACKED_STREAM_BYTES (1u << 20) // kept by the agent until the host has stored it
#define LIMIT_STDIN_INLINE_BYTES (1u << 20)
#define LIMIT_ARGS 1024
#define LIMIT_ARGS_BYTES (128u << 10)

// Files (section 5).
#define LIMIT_PATH_BYTES 4096
#define LIMIT_DIR_ENTRIES 4096

// Requests.
#define LIMIT_BODY_JSON_BYTES (2u << 20)
#define LIMIT_JSON_DEPTH 32
#define LIMIT_LIST_DEFAULT 50
#define LIMIT_LIST_MAX 500
#define LIMIT_REQUEST_ID 128
#define LIMIT_OWNER_MAX 129 // 128 characters + NUL
#define LIMIT_DISCARD_BYTES (16u << 20)    // a refused upload is drained this far, then cut
#define LIMIT_HEADER_SECONDS 10
#define LIMIT_SSE_COMMENT_SECONDS 10
#define LIMIT_IDEMPOTENCY_HOURS 24

// Lifecycle.
#define LIMIT_STOP_GRACE_MS 5000
#define LIMIT_PROBE_MS 10000
#define LIMIT_BOOT_MS 120000               // from QEMU's start; TCG on a loaded host is slow
#define LIMIT_AGENT_HELLO_MS 5000          // on attach to a running VM
#define LIMIT_AGENT_MUTE_MS 10000          // a ping unanswered this long: agent_unresponsive
#define LIMIT_STARTED_MS 1000             // a command is acknowledged after this even if the guest did not say that it runs
#define LIMIT_DISK_RESERVE_MIB 256         // admission stops here, so that outcomes still fit

// Logs per sandbox.
#define LIMIT_LOG_ENTRIES 10000
#define LIMIT_LOG_TEXT 4096
#define LIMIT_CONSOLE_BYTES_PER_S (64u << 10)

#endif
