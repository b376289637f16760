"""The host's half of the agent protocol (proto/frame.h, proto/msg.h) and a bare QEMU to speak it to: no server, no
store, no jail. For tests/guest/refresh; kept simple, trusts the guest."""
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import time

MAGIC = bytes([0xf5, 0xfa, 0xff, 0xf7, 0xfe, 0xf9, 0xfc, 0xf6, 0xfd, 0xf8, 0xfb, 0xff, 0xf6, 0xfa, 0xf7, 0xfe])
(HELLO, HELLO_REPLY, PING, PONG, COMMAND_STATE, READY, RUN, STARTED, EXITED, ATTACH, ACK, SIGNAL, FORGET, OUTPUT, STDIN,
 STDIN_CREDIT, FILE, FILE_DATA, FILE_CREDIT, FILE_ABORT, FILE_RESULT, SHUTDOWN, LOG, FATAL, FILE_INFO, FREEZE, FROZEN,
 REFRESH, REFRESHED) = range(1, 30)
LAST = 1
STAT, READ, WRITE, DELETE, MOVE, LIST, MKDIR, CHECK = range(1, 9)
STATUS = ("OK NOT_FOUND PERMISSION OUTSIDE_ROOTS NOT_REGULAR EXISTS NOT_DIRECTORY NOT_EMPTY NO_SPACE RANGE PATH_INVALID "
          "USER_UNKNOWN ABORTED BUSY READ_ONLY IS_DIRECTORY LOOP NAME_TOO_LONG ERROR").split()
WINDOW = 1 << 20
PIECE = 65536 - 16


def frame(kind, ident=0, payload=b"", flags=0):
    return struct.pack("<BBHIQ", kind, flags, 0, len(payload), ident) + payload


def field(tag, value):
    if isinstance(value, (int, bool)):
        value = struct.pack("<Q", int(value) & (2**64 - 1))
    elif isinstance(value, str):
        value = value.encode()
    return struct.pack("<BI", tag, len(value)) + value


def fields(payload):
    """{tag: [bytes, …]}"""
    out, at = {}, 0
    while at < len(payload):
        tag, size = struct.unpack_from("<BI", payload, at)
        out.setdefault(tag, []).append(payload[at + 5:at + 5 + size])
        at += 5 + size
    return out


def number(f, tag):
    return struct.unpack("<q", f[tag][0])[0] if tag in f else 0


def data_pieces(kind, ident, stream, offset, data, last):
    """Frames of at most PIECE bytes; the magic is split wherever it stands."""
    out, at = [], 0
    while True:
        piece = data[at:at + PIECE]
        cut = piece.find(MAGIC)
        if cut >= 0:
            piece = piece[:cut + 8]
        done = at + len(piece) == len(data)
        out.append(frame(kind, ident, struct.pack("<QQ", stream, offset + at) + piece, LAST if last and done else 0))
        at += len(piece)
        if done:
            return b"".join(out)


class Gone(Exception):
    pass


class Port:
    """One of the two sockets: skips to our nonce, then frames."""

    def __init__(self, path, deadline):
        while True:
            try:
                self.sock = socket.socket(socket.AF_UNIX)
                self.sock.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.0005)
        self.sock.setblocking(False)
        self.nonce = secrets.token_bytes(16)
        self.buf, self.synced, self.out, self.held = bytearray(), False, bytearray(), False

    def send(self, data):
        self.out += data
        self.flush()

    def flush(self):
        while self.out:
            try:
                del self.out[:self.sock.send(memoryview(self.out)[:262144])]
            except BlockingIOError:
                return

    def read(self):
        try:
            while True:
                got = self.sock.recv(1 << 20)
                if not got:
                    raise Gone("the port was closed")
                self.buf += got
        except BlockingIOError:
            pass
        if not self.synced:
            at = self.buf.find(MAGIC + self.nonce)
            if at < 0:
                return
            del self.buf[:at + 32]
            self.synced = True
        at = 0
        while len(self.buf) - at >= 16:
            kind, flags, zero, length, ident = struct.unpack_from("<BBHIQ", self.buf, at)
            assert kind and not zero and length <= 262144, "violation"
            if len(self.buf) - at < 16 + length:
                break
            yield kind, flags, ident, bytes(self.buf[at + 16:at + 16 + length])
            at += 16 + length
        del self.buf[:at]


class Command:
    def __init__(self, ident, name):
        self.id, self.name, self.state, self.started, self.credit = ident, name, None, False, 0
        self.out, self.acked, self.auto_ack = {1: bytearray(), 2: bytearray()}, {1: 0, 2: 0}, True

    @property
    def exited(self):
        return self.state is not None and self.state["phase"] == 2

    @property
    def complete(self):
        return self.exited and len(self.out[1]) >= self.state["out"] and len(self.out[2]) >= self.state["err"]


class Op:
    def __init__(self, ident):
        self.id, self.info, self.result, self.data, self.credit, self.entries = ident, None, None, bytearray(), 0, []
        self.eof, self.credited, self.auto, self.size_only, self.got = False, 0, True, False, 0


def command_state(payload):
    f = fields(payload)
    names = "phase outcome code signal stage errno pid ms out err in received".split()
    return {"name": f[1][0].decode(), **{n: number(f, i + 2) for i, n in enumerate(names)}}


def file_result(payload):
    f = fields(payload)
    names = "status errno kind mode size mtime uid gid created removed truncated".split()
    r = {n: number(f, i + 1) for i, n in enumerate(names)}
    r["status"] = STATUS[r["status"]]
    r["owner"], r["group"], r["target"] = (f.get(t, [b""])[0] for t in (12, 13, 14))
    r["entries"] = []
    for e in f.get(15, []):
        kind, mode, size, mtime, uid, gid, n = struct.unpack_from("<QQQqQQQ", e)
        r["entries"].append({"name": e[56:56 + n], "kind": kind, "mode": mode, "size": size, "target": e[56 + n:]})
    return r


class Guest:
    """A session with an agent over two sockets."""
    ids = int(time.time()) << 16

    def __init__(self, control, bulk, wall_ms=None, bulk_first=False, deadline=120, versions=(1, 1), stale=b""):
        # stale: what bulk still brings of an old session when control has begun this one
        end = time.monotonic() + deadline
        self.session, self.commands, self.ops = secrets.token_bytes(16), {}, {}
        self.states, self.logs, self.pongs, self.fatal, self.ready, self.replies = [], [], {}, None, False, {}
        self.frozen, self.refreshed = {}, {}
        self.control, self.bulk = Port(control, end), Port(bulk, end)
        for which, port in ((2, self.bulk), (1, self.control)) if bulk_first else ((1, self.control), (2, self.bulk)):
            hello = field(1, which) + field(2, versions[0]) + field(3, versions[1]) + field(4, self.session) + \
                field(5, int(time.time() * 1000) if wall_ms is None else wall_ms) + field(6, "airlock-test")
            if stale and which == 2:
                self.wait(lambda: self.ready)
                port.send(stale)
                for _ in range(3):
                    self.ping()
            port.send(MAGIC + port.nonce + frame(HELLO, 0, hello))

    @classmethod
    def new_id(cls):
        cls.ids += 1
        return cls.ids

    def close(self):
        self.control.sock.close()
        self.bulk.sock.close()

    # ---- in
    def pump(self, timeout=0.0):
        ports = [p for p in (self.control, self.bulk) if not p.held]
        want = [p.sock for p in (self.control, self.bulk) if p.out]
        readable, writable, _ = select.select([p.sock for p in ports], want, [], timeout)
        for p in (self.control, self.bulk):
            if p.sock in writable:
                p.flush()
            if p.sock in readable:
                for f in p.read():
                    self.take(*f)

    def wait(self, done, timeout=30, what="the guest"):
        end = time.monotonic() + timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(what)
            self.pump(min(left, 1))

    def take(self, kind, flags, ident, payload):
        if kind == OUTPUT:
            stream, offset = struct.unpack_from("<QQ", payload)
            c = self.commands[ident]
            have = len(c.out[stream])
            assert offset <= have, f"a hole in the output: {offset} after {have}"
            c.out[stream] += payload[16 + have - offset:]
            if c.auto_ack and len(c.out[stream]) - c.acked[stream] >= 131072:
                self.ack(c)
        elif kind == FILE_DATA:
            self.take_data(self.ops.get(ident), flags, payload)
        elif kind == FILE_INFO and ident in self.ops:
            assert self.ops[ident].got == 0, "FILE_INFO after data"
            self.ops[ident].info = file_result(payload)
        elif kind == FILE_RESULT and ident in self.ops:
            r = file_result(payload)
            self.ops[ident].entries += r["entries"]
            if flags & LAST:
                self.ops[ident].result = r
        elif kind == FILE_CREDIT and ident in self.ops:
            self.ops[ident].credit = number(fields(payload), 4)
        elif kind == PONG:
            self.pongs[ident] = time.monotonic()
        elif kind == FROZEN:
            f = fields(payload)
            self.frozen[ident] = dict(zip(("port", "total", "free", "running"), (number(f, t) for t in range(1, 5))))
        elif kind == REFRESHED:
            f = fields(payload)
            self.refreshed[ident] = {"generation": f[1][0], "done": number(f, 2), "wall_ms": number(f, 3), "random": f[7][0],
                                     **{n: f[t][0].decode() for n, t in
                                        (("hostname", 4), ("machine_id", 5), ("boot_id", 6), ("fault", 8))}}
        elif kind in (STARTED, EXITED):
            c = self.commands.get(ident)
            if c:
                c.started, c.state = True, command_state(payload)
        elif kind == COMMAND_STATE:
            self.states.append((ident, command_state(payload)))
        elif kind == STDIN_CREDIT and ident in self.commands:
            self.commands[ident].credit = number(fields(payload), 3)
        elif kind == READY:
            self.ready = True
        elif kind == LOG:
            self.logs.append(payload.decode())
        elif kind == FATAL:
            self.fatal = payload.decode()
        elif kind == HELLO_REPLY:
            f = fields(payload)
            self.replies[number(f, 1)] = {"version": number(f, 2), "features": number(f, 3), "agent": f[4][0].decode(),
                                          "kernel": f[5][0].decode(), "uptime": number(f, 7), "n": number(f, 8)}

    def take_data(self, op, flags, payload):
        if op is None:
            return
        offset = struct.unpack_from("<Q", payload, 8)[0]
        assert offset == op.got, f"a hole in the file: {offset} after {op.got}"
        assert op.info is not None, "data before FILE_INFO"
        op.got += len(payload) - 16
        if not op.size_only:
            op.data += payload[16:]
        op.eof = bool(flags & LAST)
        assert op.got - op.credited <= WINDOW, "past the window"
        if op.auto and op.got - op.credited >= WINDOW // 4:
            op.credited = op.got
            self.control.send(frame(FILE_CREDIT, op.id, field(4, op.got)))

    # ---- commands
    def run(self, argv, env=(), cwd="", user="root", timeout_ms=60000, stdin=False, raw=False, write_dir="", name=None):
        c = Command(self.new_id(), name or "cmd" + secrets.token_hex(8))
        self.commands[c.id] = c
        p = field(1, c.name) + b"".join(field(2, a) for a in argv) + b"".join(field(3, e) for e in env) + \
            field(4, cwd) + field(5, user) + field(6, timeout_ms) + field(7, stdin) + field(8, raw) + field(9, write_dir)
        self.control.send(frame(RUN, c.id, p))
        return c

    def ack(self, c):
        c.acked = {s: len(c.out[s]) for s in (1, 2)}
        self.control.send(frame(ACK, c.id, field(1, c.acked[1]) + field(2, c.acked[2])))

    def attach(self, c):
        self.control.send(frame(ATTACH, c.id, field(1, len(c.out[1])) + field(2, len(c.out[2])) + field(3, c.credit)))

    def signal(self, c, sig, group=True):
        self.control.send(frame(SIGNAL, c.id, field(1, sig) + field(2, group)))

    def forget(self, c):
        self.control.send(frame(FORGET, c.id))
        self.commands.pop(c.id, None)

    def finish(self, c, timeout=60):
        self.wait(lambda: c.complete, timeout, f"command {c.name}: {c.state}")
        self.forget(c)
        return c

    def sh(self, line, **kw):
        """(exit code, stdout)"""
        c = self.finish(self.run(["/bin/sh", "-c", line], **kw))
        return c.state["code"], bytes(c.out[1])

    def feed(self, c, data, last=True, timeout=60):
        at = 0
        end = time.monotonic() + timeout
        while at < len(data) or not data:
            n = min(len(data) - at, WINDOW - (at - c.credit), 4 * PIECE)
            if n > 0 or not data:
                final = at + n == len(data)
                self.bulk.send(data_pieces(STDIN, c.id, 3, at, data[at:at + n], last and final))
                at += n
                if final:
                    return
            self.pump(0 if n > 0 else 0.5)
            assert time.monotonic() < end, "stdin is not taken"

    def ping(self, timeout=30):
        ident, t = self.new_id(), time.monotonic()
        self.control.send(frame(PING, ident))
        self.wait(lambda: ident in self.pongs, timeout, "pong")
        return (self.pongs.pop(ident) - t) * 1e3

    def freeze(self, port, timeout=30):
        """(what FROZEN says, ms)"""
        ident, t = self.new_id(), time.monotonic()
        port.send(frame(FREEZE, ident))
        self.wait(lambda: ident in self.frozen, timeout, "frozen")
        return self.frozen.pop(ident), (time.monotonic() - t) * 1e3

    def refresh(self, generation=None, seed=b"", wall_ms=0, hostname="", machine_id="", boot_id="", timeout=30):
        """(what REFRESHED says, ms)"""
        ident, t = self.new_id(), time.monotonic()
        self.control.send(frame(REFRESH, ident, field(1, generation or secrets.token_bytes(16)) + field(2, seed) +
                                field(3, wall_ms) + field(4, hostname) + field(5, machine_id) + field(6, boot_id)))
        self.wait(lambda: ident in self.refreshed, timeout, "refreshed")
        return self.refreshed.pop(ident), (time.monotonic() - t) * 1e3

    # ---- files
    def begin(self, op, path, to="", user="root", mode=0, mkdirs=False, recursive=False, exclusive=False, offset=0,
              length=0, depth=1, max_entries=4096):
        o = Op(self.new_id())
        self.ops[o.id] = o
        p = field(1, op) + field(2, path) + field(3, to) + field(4, user) + field(5, mode) + field(6, mkdirs) + \
            field(7, recursive) + field(8, exclusive) + field(9, offset) + field(10, length) + field(11, depth) + \
            field(12, max_entries)
        self.control.send(frame(FILE, o.id, p))
        return o

    def settle(self, o, timeout=60):
        self.wait(lambda: o.result is not None, timeout, f"file operation {o.id}")
        del self.ops[o.id]
        return o

    def call(self, op, path, **kw):
        o = self.settle(self.begin(op, path, **kw))
        o.result["entries"] = o.entries
        return o.result

    def read_file(self, path, **kw):
        """(status, info, bytes)"""
        o = self.settle(self.begin(READ, path, **kw))
        assert o.result["status"] != "OK" or o.eof, "the result came before the end of the data"
        return o.result["status"], o.info, bytes(o.data)

    def push(self, o, data, last=True, timeout=120):
        """Sends content from offset 0 within the window of credits; stops when a result is there."""
        at, end = 0, time.monotonic() + timeout
        while o.result is None:
            n = min(len(data) - at, WINDOW - (at - o.credit), 8 * PIECE)
            final = at + n == len(data)
            if n > 0 or final:
                self.bulk.send(data_pieces(FILE_DATA, o.id, 4, at, data[at:at + n], last and final))
                at += n
            if final:
                return
            self.pump(0 if n > 0 else 0.5)
            assert time.monotonic() < end, "the file is not taken"

    def write_file(self, path, data, **kw):
        o = self.begin(WRITE, path, **kw)
        self.push(o, data)
        return self.settle(o).result

    def abort(self, o):
        self.control.send(frame(FILE_ABORT, o.id))
        self.ops.pop(o.id, None)


# ---- a machine ------------------------------------------------------------------------------------------------------
def tsc_khz():
    for line in open("/proc/cpuinfo"):
        if line.startswith("bogomips"):
            return int(float(line.split(":")[1]) * 500)
    raise SystemExit("no bogomips in /proc/cpuinfo")


def make_disk(path, mib=1024):
    with open(path, "wb") as f:
        f.truncate(mib << 20)
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-F", "-O", "^has_journal", "-m", "0", "-E",
                    "lazy_itable_init=1,nodiscard", path], check=True)


class VM:
    def __init__(self, where, kernel, initrd, root, disk=None, memory=256, cpus=1, accel="tcg", extra=()):
        self.dir = where
        shutil.rmtree(where, ignore_errors=True)
        os.makedirs(where)
        cmdline = (f"console=ttyS0 panic=-1 reboot=t quiet tsc_early_khz={tsc_khz()} no_timer_check tsc=nowatchdog "
                   "mitigations=off")
        cpu = "host" if accel == "kvm" else "Nehalem,spec-ctrl=off,+arat"
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-M", "microvm,acpi=on,pit=off,pic=off,rtc=on,suppress-vmdesc=on", "-accel", accel, "-cpu", cpu,
                "-m", str(memory), "-smp", str(cpus),
                "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                "-kernel", kernel, "-initrd", initrd, "-append", cmdline,
                "-drive", f"id=root,if=none,format=raw,read-only=on,file={root}",
                "-device", "virtio-blk-device,drive=root,serial=root"]
        if disk:
            argv += ["-drive", f"id=data,if=none,format=raw,file={disk}",
                     "-device", "virtio-blk-device,drive=data,serial=data"]
        argv += ["-device", "virtio-rng-device", "-device", "virtio-serial-device"]
        for name in ("control", "bulk"):
            argv += ["-chardev", f"socket,id={name},path={where}/{name},server=on,wait=off",
                     "-device", f"virtserialport,chardev={name},name=airlock.{name}"]
        argv += ["-serial", f"file:{where}/serial", *extra]
        self.t0 = time.monotonic()
        self.proc = subprocess.Popen(argv, stderr=open(f"{where}/stderr", "w"))

    def guest(self, **kw):
        return Guest(f"{self.dir}/control", f"{self.dir}/bulk", **kw)

    def ready(self, timeout=120, **kw):
        """A session that is up."""
        g = self.guest(**kw)
        try:
            g.wait(lambda: (g.ready and 2 in g.replies) or g.fatal, timeout, "hello")
        except Exception:
            print(open(f"{self.dir}/serial", errors="replace").read()[-3000:])
            raise
        if g.fatal:
            raise RuntimeError(g.fatal)
        return g

    def cpu_s(self):
        f = open(f"/proc/{self.proc.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(f[11]) + int(f[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        self.proc.kill()
        self.proc.wait()
