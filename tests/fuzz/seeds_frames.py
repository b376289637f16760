"""Seeds of the two frame targets: streams as bytes, and as the programs of stream.h."""
import random
import struct

MAGIC = bytes([0xF5, 0xFA, 0xFF, 0xF7, 0xFE, 0xF9, 0xFC, 0xF6, 0xFD, 0xF8, 0xFB, 0xFF, 0xF6, 0xFA, 0xF7, 0xFE])
NONCE = b"0123456789abcdef"
PREAMBLE = MAGIC + NONCE
PROGRAM, WITH_PREAMBLE, SENDER = 1, 2, 4
BYTES, SESSION, SHOW_MAGIC, FRAME, FIELDS, CUT, HEADER, NONCE_OF, LARGE = range(9)

# What each side is sent: type -> how its payload looks.
TO_HOST = {2: "hello_reply", 4: "empty", 5: "command", 6: "empty", 8: "command", 9: "command", 14: "data", 16: "offsets",
           18: "data", 19: "offsets", 21: "file_result", 23: "text", 24: "text", 25: "file_result"}
TO_GUEST = {1: "hello", 3: "empty", 7: "run", 10: "offsets", 11: "offsets", 12: "signal", 13: "empty", 15: "data",
            17: "file", 18: "data", 19: "offsets", 20: "empty", 22: "empty"}
# By themselves, so that the draws above stay what they were and the corpora grow by these alone.
LATER_TO_HOST = {27: "frozen", 29: "refreshed"}
LATER_TO_GUEST = {26: "empty", 28: "refresh"}


def number(v):
    return struct.pack("<Q", v & (2**64 - 1))


def field(tag, value):
    if isinstance(value, int):
        value = number(value)
    return struct.pack("<BI", tag, len(value)) + value


def entry(name, target=b"", kind=1, size=7):
    return struct.pack("<QQQqQQQ", kind, 0o644, size, -1, 1000, 1000, len(name)) + name + target


def message(*fields):
    return b"".join(field(tag, value) for tag, value in fields)


MESSAGES = {
    "empty": [b""],
    "text": [b"", b"root: no /dev/vda", "agent: ä".encode()],
    "data": [number(1) + number(0) + b"out", number(4) + number(2**63), number(0)[:7], number(1) + number(5) + MAGIC],
    "offsets": [b"", message((1, 5), (2, 0)), message((3, 2**64 - 1)), message((4, 9), (4, 9)), message((4, b"short"))],
    "signal": [message((1, 15)), message((1, 9), (2, 1)), message((2, 1)), message((1, 15), (2, b"\1"))],
    "hello": [message((1, 1), (2, 1), (3, 1), (4, b"s" * 16), (5, 1700000000000), (6, b"box")),
              message((1, 2), (2, 1), (3, 9), (4, b"s" * 16)), message((1, 1), (2, 1), (3, 1), (4, b"s" * 15)),
              message((1, 1), (2, 1), (3, 1))],
    "hello_reply": [message((1, 1), (2, 1), (3, 15), (4, b"0.1.0"), (5, b"6.1.0"), (6, b"a-b-c"), (7, 123), (8, 2)),
                    message((1, 1), (2, 0), (3, 0)), message((2, 1)), message((1, 1), (2, 1), (3, 15), (99, b"later"))],
    "command": [message((1, b"cmd" + b"0" * 26), (2, 1), (8, 77)),
                message((1, b"cmd"), (2, 2), (3, 1), (4, -1), (9, 5), (10, 1), (11, 2), (12, 3)),
                message((1, b"cmd"), (2, 2), (3, 5), (6, 1), (7, 2)), message((1, b"cmd"))],
    "run": [message((1, b"cmd"), (2, b"sh"), (2, b"-c"), (2, b"echo"), (3, b"A=1"), (4, b"/work"), (5, b"sandbox"), (6, 60000)),
            message((1, b"cmd"), (5, b"root"), (6, 0), (7, 1), (8, 1), (9, b"/work/a"), (10, 1)),
            message((1, b"cmd"), (5, b"u"), (6, 1)), message((5, b"u"), (6, 1))],
    "file": [message((1, 3), (2, b"/work/a"), (4, b"sandbox"), (5, 0o600), (6, 1), (8, 1)),
             message((1, 5), (2, b"/work/a"), (3, b"/work/b"), (4, b"root"), (8, 2)),
             message((1, 2), (2, b"/work/a"), (4, b"sandbox"), (9, 10), (10, 20)),
             message((1, 6), (2, b"/"), (4, b"sandbox"), (11, 3), (12, 100)), message((1, 4), (2, b"/work/a"), (4, b"s"), (7, 1)),
             message((1, 1), (2, b"/work/a"))],
    "file_result": [message((1, 0), (2, 0), (3, 1), (4, 0o644), (5, 12), (6, 99), (7, 0), (8, 0), (12, b"root"), (13, b"root")),
                    message((1, 0), (15, entry(b"a")), (15, entry(b"b/c", b"", 2)), (15, entry(b"l", b"../a", 3))),
                    message((1, 1), (2, 2)), message((1, 0), (9, 1), (10, 3), (11, 1), (14, b"target")),
                    message((1, 0), (15, entry(b"a")[:50])), message((1, 0), (15, number(1) * 6 + number(99) + b"short"))],
    "frozen": [message((1, 1), (2, 2**30), (3, 2**29), (4, 3)), message((1, 2)), message((2, 1)), message((1, 1), (4, b"\1"))],
    "refresh": [message((1, b"g" * 16), (2, b"s" * 32), (3, 1700000000000), (4, b"box"), (5, b"0123456789abcdef" * 2),
                        (6, b"01234567-89ab-4def-8123-456789abcdef")),
                message((1, b"g" * 16), (3, -1), (4, b""), (6, b"x")), message((1, b"g" * 15), (2, b"s")), message((2, b"s" * 32))],
    "refreshed": [message((1, b"g" * 16), (2, 31), (3, 1700000000000), (4, b"box"), (5, b"0123456789abcdef" * 2),
                          (6, b"01234567-89ab-4def-8123-456789abcdef"), (7, b"r" * 16), (8, b"clock: no")),
                  message((1, b"g" * 16), (2, 0)), message((1, b"g" * 16), (2, b"\1")), message((1, b"g" * 16))],
}


def frame(kind, payload, flags=0, number_of=1, length=None):
    return struct.pack("<BBHIQ", kind, flags, 0, len(payload) if length is None else length, number_of) + payload


def many_lists():
    args = message((1, b"cmd"), (5, b"u"), (6, 1))
    return {
        7: [args + field(2, b"") * n for n in (1023, 1024, 1025)] + [args + field(3, b"A=") * 1025],
        21: [message((1, 0)) + field(15, entry(b"")) * n for n in (255, 256, 257)],
    }


def streams(types):
    rnd = random.Random(1)
    frames = [frame(t, m, rnd.randrange(2), rnd.randrange(2**56)) for t, form in types.items() for m in MESSAGES[form]]
    for f in frames:
        yield PREAMBLE + f
    broken = [frame(0, b""), frame(9, b"", length=2**18 + 1), frame(9, b"", length=2**32 - 1), frame(9, b"x", length=2**18),
              b"\x07\0\1\0" + b"\0" * 12, b"\x07\0\0\1" + b"\0" * 12, b"\x07\0\0\0" + b"\0" * 4 + b"\xff" * 8, frame(77, b"new")]
    for f in broken:
        yield PREAMBLE + f
        yield PREAMBLE + frames[0] + f + PREAMBLE + frames[1]
    for n in range(1, 32, 3):
        yield PREAMBLE[:n] + PREAMBLE + frames[0]
        yield b"old bytes" + PREAMBLE + frames[2][:n] + PREAMBLE + frames[1]
    for _ in range(30):
        some = b"".join(rnd.choice(frames) for _ in range(rnd.randrange(2, 6)))
        yield rnd.choice([b"", b"junk", MAGIC, MAGIC + b"x" * 16, PREAMBLE + frames[0]]) + PREAMBLE + some
    yield b""
    yield MAGIC + PREAMBLE
    yield PREAMBLE * 3
    yield MAGIC + NONCE[:8] + MAGIC + NONCE
    yield MAGIC * 2 + NONCE


def program_bytes(data):
    return b"".join(bytes([BYTES, len(data[i:i + 255])]) + data[i:i + 255] for i in range(0, len(data), 255))


def program_frame(kind, payload, flags=0, number_of=1):
    return struct.pack("<BBBBH", FRAME, kind, flags, number_of, len(payload)) + payload


def program_fields(kind, *fields):
    out = bytes([FIELDS, kind, len(fields)])
    for tag, value in fields:
        out += bytes([tag]) + (bytes([0, value]) if isinstance(value, int) else bytes([6]) + bytes([len(value)]) + value)
    return out


def programs(types):
    rnd = random.Random(2)
    start = bytes([SESSION])
    frames = [program_frame(t, m) for t, form in types.items() for m in MESSAGES[form] if len(m) < 300]
    for f in frames:
        yield start + f
    for t in types:
        yield start + program_fields(t, (1, 1), (2, b"/work/a"), (3, b"x"), (4, b"u"), (5, b"u"), (6, 6))
        yield start + bytes([CUT, t, 40, 0, 20]) + b"x" * 20 + start + rnd.choice(frames)
    for n in range(0, 17, 4):
        yield start + bytes([SHOW_MAGIC, n]) + start + rnd.choice(frames)
        yield bytes([NONCE_OF]) + b"n" * 16 + rnd.choice(frames) + bytes([SHOW_MAGIC, n])
    yield start + bytes([HEADER]) + frame(9, b"", length=2**18 + 1)
    yield start + bytes([FIELDS, 21, 2, 1, 0, 0, 15, 4, 1, 2]) + b"ab" + bytes([FIELDS, 21, 1, 15, 5, 3]) + b"abc\x05"
    for n in (3, 120, 200, 255):
        large = bytes([LARGE, 23, n])
        yield start + large + frames[0] + large + frames[1] + large + large + frames[2]
        yield large + start + frames[0] + bytes([SHOW_MAGIC, n % 17]) + large + start + frames[1]
    for _ in range(25):
        yield start + b"".join(rnd.choice(frames) for _ in range(rnd.randrange(2, 6)))


def inputs(types):
    for i, s in enumerate(streams(types)):
        yield bytes([0, i % 256]) + s
    for i, s in enumerate(programs(types)):
        yield bytes([PROGRAM, i % 256]) + s
    for kind, payloads in many_lists().items():
        if kind in types:
            yield from (bytes([0, 1]) + PREAMBLE + frame(kind, p) for p in payloads)


def later(types):
    for kind, form in types.items():
        for i, m in enumerate(MESSAGES[form]):
            yield bytes([0, i]) + PREAMBLE + frame(kind, m)
            yield bytes([PROGRAM, i, SESSION]) + program_frame(kind, m) + program_frame(kind, m[:-1])
        yield bytes([PROGRAM, 1, SESSION]) + program_fields(kind, (1, 1), (2, b"x"), (3, 3), (4, b"u"), (7, b"r"), (8, b"f"))


def host():
    yield from inputs(TO_HOST)
    yield from later(LATER_TO_HOST)


def guest():
    yield from inputs(TO_GUEST)
    yield from later(LATER_TO_GUEST)
    content = [b"", b"plain", MAGIC, MAGIC * 3, b"x" * 20 + MAGIC + b"y" * 5 + MAGIC[:9], MAGIC[8:] + MAGIC[:8] + MAGIC[8:], MAGIC[:15]]
    yield from (bytes([SENDER, 0]) + c for c in content)
    yield from (bytes([SENDER | PROGRAM, 0, SHOW_MAGIC, a, SHOW_MAGIC, b, SHOW_MAGIC, 16]) for a in (3, 8, 16) for b in (5, 15))
