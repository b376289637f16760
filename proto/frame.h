// frame.h - the byte layer between host and guest agent: frames, the session preamble, and the parser both ends
// use. No I/O, no policy. Pure over caller-owned memory; any thread, one parser per port. libc only.
//
// Layout of a frame, little endian, FRAME_HEADER_BYTES long, then `length` payload bytes:
//
//     0      1      2      4            8                       16
//     | type | flags| zero | length u32 | id u64 (< 2^56)        | payload …
//
// A connection begins with a preamble: FRAME_MAGIC (16 bytes, each >= 0xF5, none of which occurs in UTF-8), then
// a 16-byte session nonce chosen by the host, then a HELLO frame. virtio-serial neither tells the guest of a lost
// host nor separates old bytes from new, so the guest looks for FRAME_MAGIC *everywhere*, also within a payload,
// and starts over at it. A sender therefore never lets the magic appear elsewhere: a header cannot contain it (its
// zero bytes), a data frame is split inside it (frame_data_cut), and a message frame that would contain it is
// refused (frame_has_magic). The host, in turn, throws away everything until FRAME_MAGIC followed by the nonce it
// sent: a 128-bit random number that old bytes cannot contain; after that it does not look for it again (so the guest
// may send any byte).
#ifndef AIRLOCK_PROTO_FRAME_H
#define AIRLOCK_PROTO_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER_BYTES 16
#define FRAME_MAGIC_BYTES 16
#define FRAME_NONCE_BYTES 16
#define FRAME_PREAMBLE_BYTES (FRAME_MAGIC_BYTES + FRAME_NONCE_BYTES)
#define FRAME_PAYLOAD_MAX (256u << 10) // a RUN with 128 KiB of argv and as much environment is the largest
#define FRAME_DATA_MAX (64u << 10)     // what a data frame carries at most: keeps control quick beside bulk
#define FRAME_ID_MAX ((1ull << 56) - 1)

// The protocol versions this build speaks; a hello carries the range and the answer the choice.
#define PROTO_VERSION_MIN 1
#define PROTO_VERSION_MAX 1

extern const uint8_t FRAME_MAGIC[FRAME_MAGIC_BYTES];

// Pinned: numbers are never reused. h: host sends, g: guest sends; c: control port, b: bulk port.
enum frame_type {
    FRAME_HELLO = 1,         // h c,b  struct msg_hello, right after a preamble
    FRAME_HELLO_REPLY = 2,   // g c,b  struct msg_hello_reply, right after a preamble with the host's nonce
    FRAME_PING = 3,          // h c    empty; id echoed
    FRAME_PONG = 4,          // g c
    FRAME_COMMAND_STATE = 5, // g c    struct msg_command: one per command the agent still holds, after HELLO_REPLY
    FRAME_READY = 6,         // g c    empty: all COMMAND_STATE are sent
    FRAME_RUN = 7,           // h c    struct msg_run; id names the command from here on
    FRAME_STARTED = 8,       // g c    struct msg_command
    FRAME_EXITED = 9,        // g c    struct msg_command, totals final
    FRAME_ATTACH = 10,       // h c    struct msg_offsets: send output again from there (after COMMAND_STATE)
    FRAME_ACK = 11,          // h c    struct msg_offsets: stored durably up to there, may be dropped
    FRAME_SIGNAL = 12,       // h c    struct msg_signal
    FRAME_FORGET = 13,       // h c    empty: the exit is recorded (kills the command if it still runs)
    FRAME_OUTPUT = 14,       // g b    struct msg_data + bytes
    FRAME_STDIN = 15,        // h b    struct msg_data + bytes; flag FRAME_LAST closes it
    FRAME_STDIN_CREDIT = 16, // g c    struct msg_offsets.stdin_offset: accepted by the command's pipe up to there
    FRAME_FILE = 17,         // h c,b  struct msg_file: begins a file operation; id names it. On b for a WRITE
    FRAME_FILE_DATA = 18,    // h,g b  struct msg_data + bytes; FRAME_LAST ends the content
    FRAME_FILE_CREDIT = 19,  // h,g c  struct msg_offsets.file_offset: the receiver has consumed up to there
    FRAME_FILE_ABORT = 20,   // h c,b  empty: give up, remove the temporary file; by the port of its FILE
    FRAME_FILE_RESULT = 21,  // g c    struct msg_file_result; one with FRAME_LAST per FRAME_FILE. Not ordered
                             //        against a READ's content, which ends by FRAME_LAST
    FRAME_SHUTDOWN = 22,     // h c    empty: end the processes, sync, power off
    FRAME_LOG = 23,          // g c    text: what the agent has to say (logs?source=agent)
    FRAME_FATAL = 24,        // g c    text: the guest cannot be made ready (bad root, no disk); stage first word
    FRAME_FILE_INFO = 25,    // g c    struct msg_file_result: size and kind, before the first FRAME_FILE_DATA
    FRAME_FREEZE = 26,       // h c,b  empty: the host sends nothing more on this port until it has seen FROZEN
    FRAME_FROZEN = 27,       // g c    struct msg_frozen, once per FREEZE, id echoed: all that came before it on the
                             //        port it names has been taken
    FRAME_REFRESH = 28,      // h c    struct msg_refresh: become somebody else, or only set the clock
    FRAME_REFRESHED = 29,    // g c    struct msg_refreshed, id echoed: what was done, read back
};
// The two ports are not ordered against each other: EXITED may overtake OUTPUT (its totals say what is still to come)
// what the host sends. What must be in order shares a port (an upload's FILE, FILE_DATA and FILE_ABORT) or waits for a word
// of the other side (STDIN for STARTED or COMMAND_STATE). Data for an id that the guest does not have are dropped.

#define FRAME_LAST 1u // flag: nothing follows in this direction for this id

struct frame {
    uint8_t type, flags;
    uint64_t id;
    const uint8_t *payload; // borrowed from the parser until its next call
    uint32_t length;
};

// Writes the 16 header bytes.
void frame_header(uint8_t out[FRAME_HEADER_BYTES], uint8_t type, uint8_t flags, uint64_t id, uint32_t length);

bool frame_has_magic(const uint8_t *data, size_t len);
// How many of the first len bytes of a payload may go into one data frame so that the magic does not appear
// whole in the stream: len, or a shorter cut inside the magic (never 0 for len > 0).
size_t frame_data_cut(const uint8_t *data, size_t len);

enum frame_side { FRAME_SIDE_HOST, FRAME_SIDE_GUEST };

enum frame_event {
    FRAME_NEED_MORE,   // feed more bytes
    FRAME_GOT,         // *frame is valid
    FRAME_RESET,       // guest: a preamble was read, parser->nonce holds it, state of the old session is void
    FRAME_SYNCED,      // host: our nonce came back; frames follow
    FRAME_VIOLATION,   // bounded rules broken (length, type 0, zero bytes): host closes; guest skips to the next magic
};

// Feed: give bytes with frame_parser_space/_fed, then call frame_parser_next until FRAME_NEED_MORE. The buffer is
// allocated once (FRAME_PAYLOAD_MAX + header + preamble); memory is bounded whatever the peer sends.
struct frame_parser {
    enum frame_side side;
    bool synced;
    uint8_t nonce[FRAME_NONCE_BYTES]; // host: what we sent; guest: what came last
    uint8_t *data;
    size_t start, end, cap;
    size_t scanned;                   // guest: bytes after start known to hold no magic
    size_t carried;                   // guest: what was taken last ends with so many bytes of a magic
    uint64_t skipped;                 // bytes thrown away while out of sync
};

// 0, or -1 when out of memory. nonce: the host's, NULL for the guest.
int frame_parser_init(struct frame_parser *p, enum frame_side side, const uint8_t *nonce);
void frame_parser_free(struct frame_parser *p);
// Where to read the next bytes to, and how many fit (>= 1 after frame_parser_next said FRAME_NEED_MORE).
uint8_t *frame_parser_space(struct frame_parser *p, size_t *ret_cap);
void frame_parser_fed(struct frame_parser *p, size_t n);
enum frame_event frame_parser_next(struct frame_parser *p, struct frame *ret_frame);

#endif
