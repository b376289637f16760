#!/usr/bin/python3
"""What QEMU itself costs with the product's devices: its argv word for word, but no server, HTTP, store or jail.

    python3 bench/floor.py [-n RUNS]      needs a finished build and images (./quickstart --prepare)

The argv is read from a QEMU that the product started (/proc/PID/cmdline), so that the two cannot drift apart; only the
initramfs differs: bench/floor-agent.c instead of the guest agent. Prints `name: p50 p95 n` lines, as floor.py of the
project's notes does; its digest is printed too where it is found (AIRLOCK_FLOOR, or ../shared/floor/floor.py)."""
import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(TOP, "tests/integration"))
import harness  # noqa: E402

STREAM = 100 << 20


def floor_digest():
    path = os.environ.get("AIRLOCK_FLOOR", os.path.join(TOP, "../shared/floor/floor.py"))
    if not os.path.exists(path):
        return "(not found here)"
    with open(path, "rb") as f:
        return "sha256:" + hashlib.sha256(f.read()).hexdigest()


def copy_extents(source, target):
    """A reflink where the filesystem can, else the data alone, by the kernel: the cheapest copy of a sparse file there is."""
    with open(source, "rb", 0) as f, open(target, "wb", 0) as t:
        size = os.fstat(f.fileno()).st_size
        try:
            fcntl.ioctl(t.fileno(), 0x40049409, f.fileno())  # FICLONE
            return
        except OSError:
            t.truncate(size)
        at = 0
        while True:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:  # no more data
                return
            end = os.lseek(f.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.copy_file_range(f.fileno(), t.fileno(), end - at, at, at)


def kernel_room(version):
    """The folder of docker/guest/build that has this kernel's modules."""
    cache = os.environ.get("GUEST_CACHE_DIR", os.path.join(TOP, "var/cache"))
    for name in ("kernel", "kernel-tuned"):
        try:
            with open(os.path.join(cache, name, "version")) as f:
                if f.read().strip() == version:
                    return os.path.join(cache, name)
        except OSError:
            pass
    raise RuntimeError(f"{cache} has no kernel {version}: docker/guest/build makes it")


class Floor:
    """Makes VMs with the argv of one that the product runs."""

    def __init__(self, server, sandbox_id):
        self.work = tempfile.mkdtemp(prefix="airlock-floor-")
        pid = harness.qemu_pid(sandbox_id)
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            self.argv = f.read().decode().split("\0")[:-1]
        text = " ".join(self.argv)
        self.fds = {"kernel": int(re.search(r"-kernel /proc/self/fd/(\d+)", text)[1]),
                    "initrd": int(re.search(r"-initrd /proc/self/fd/(\d+)", text)[1]),
                    "root": int(re.search(r"fd=(\d+),set=1", text)[1])}
        data = [int(n) for n in re.findall(r"fd=(\d+),set=2", text)]  # the second one, where there is one, is read-only
        self.fds.update(zip(("data", "data_read"), data))
        for name in ("control", "bulk", "qmp", "console"):
            self.fds[name] = int(re.search(rf"socket,id={name},fd=(\d+)", text)[1])
        with open(os.path.join(harness.IMAGES, "index.json")) as f:
            index = json.load(f)
        blob = lambda d: os.path.join(harness.IMAGES, "blobs/sha256", d.removeprefix("sha256:"))  # noqa: E731
        self.kernel, self.root = blob(index["runtime"]["kernel"]["digest"]), blob(index["images"]["debian"]["digest"])
        self.kernel_version = index["runtime"]["kernel"].get("version", "?")
        agent = os.path.join(self.work, "agent")
        subprocess.run(["musl-gcc", "-static", "-O2", "-o", agent, os.path.join(HERE, "floor-agent.c")], check=True)
        self.initrd = os.path.join(self.work, "initrd")
        subprocess.run([os.path.join(TOP, "docker/guest/initramfs"), kernel_room(self.kernel_version), agent, self.initrd],
                       check=True, stdout=subprocess.DEVNULL)
        disks = os.path.join(server.state, "disks")  # the empty filesystem that the product copies for each sandbox
        self.template = os.path.join(disks, sorted(os.listdir(disks))[0])
        self.number = 0

    def close(self):
        shutil.rmtree(self.work, ignore_errors=True)

    def boot(self):
        self.number += 1
        return VM(self, os.path.join(self.work, str(self.number)))


class VM:
    def __init__(self, floor, folder):
        os.mkdir(folder)
        self.folder = folder
        self.t0 = time.monotonic()
        disk = os.path.join(folder, "disk")
        copy_extents(floor.template, disk)
        opened = {"kernel": os.open(floor.kernel, os.O_RDONLY), "initrd": os.open(floor.initrd, os.O_RDONLY),
                  "root": os.open(floor.root, os.O_RDONLY), "data": os.open(disk, os.O_RDWR)}
        if "data_read" in floor.fds:
            opened["data_read"] = os.open(disk, os.O_RDONLY)
        files = list(opened.values())
        listeners = {}
        for name in ("control", "bulk", "qmp", "console"):
            listeners[name] = socket.socket(socket.AF_UNIX)
            listeners[name].bind(os.path.join(folder, name))
            listeners[name].listen(1)
            opened[name] = listeners[name].fileno()
        high = {name: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for name, fd in opened.items()}
        log = os.path.join(folder, "stderr")
        actions = [(os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT, 0o600)]
        actions += [(os.POSIX_SPAWN_DUP2, high[name], number) for name, number in floor.fds.items()]
        program = shutil.which(os.path.basename(floor.argv[0])) or floor.argv[0]
        self.pid = os.posix_spawn(program, floor.argv, {"PATH": "/usr/bin"}, file_actions=actions)
        self.ports = {}
        for name in ("control", "bulk", "console"):
            c = socket.socket(socket.AF_UNIX)
            c.connect(os.path.join(folder, name))
            c.settimeout(120)
            self.ports[name] = c
        for fd in list(high.values()) + files:
            os.close(fd)
        for listener in listeners.values():
            listener.close()
        self.control, self.rest = self.ports["control"], b""
        while b"READY\n" not in self.rest:
            try:
                part = self.control.recv(4096)
            except ConnectionResetError:
                part = b""
            assert part, f"QEMU ended before the floor agent answered: {open(log).read()}"
            self.rest += part
        self.boot_ms = (time.monotonic() - self.t0) * 1e3
        self.rest = b""

    def sh(self, line):
        self.control.sendall(line.encode() + b"\n")
        return self.answer()

    def answer(self):
        parts, tail = [], b""
        while True:
            part = self.control.recv(1 << 18)
            assert part, "QEMU is gone"
            parts.append(part)
            tail = (tail + part)[-32:]
            m = re.search(rb"\nEXIT (\d+)\n$", tail)
            if m:
                return int(m[1]), b"".join(parts)[:-len(m[0])]

    def timed(self, line):
        t = time.perf_counter()
        code, _ = self.sh(line)
        assert code == 0, f"{line}: {code}"
        return (time.perf_counter() - t) * 1e3

    def upload(self, path, data):
        """MB/s of a stream written to path by the floor agent."""
        t = time.perf_counter()
        self.control.sendall(b"PUT %d %s\n" % (len(data), path.encode()))
        self.ports["bulk"].sendall(data)
        code, _ = self.answer()
        assert code == 0
        return len(data) / 1e6 / (time.perf_counter() - t)

    def download(self, path, size):
        t, got = time.perf_counter(), 0
        self.control.sendall(b"GET %s\n" % path.encode())
        buffer = bytearray(1 << 18)
        while got < size:
            n = self.ports["bulk"].recv_into(buffer)
            assert n, "QEMU is gone"
            got += n
        code, _ = self.answer()
        assert code == 0
        return size / 1e6 / (time.perf_counter() - t)

    def stream(self, size=STREAM):
        """Guest to host, as the plain floor measures it: dd from /dev/zero through the agent."""
        t = time.perf_counter()
        _, out = self.sh(f"dd if=/dev/zero bs=256k count={size // (256 << 10)} 2>/dev/null")
        assert len(out) >= size, len(out)
        return size / 1e6 / (time.perf_counter() - t)

    def kill(self):
        try:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        for c in self.ports.values():
            c.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def p(samples, q):
    s = sorted(samples)
    return s[min(len(s) - 1, int(len(s) * q))]


def show(name, samples, unit="ms"):
    print(f"{name:<44} p50 {statistics.median(samples):9.2f}  p95 {p(samples, .95):9.2f}  n {len(samples)}  {unit}", flush=True)


def fdatasync_ms(folder, n=200):
    path = os.path.join(folder, "fdatasync-probe")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    out = []
    for i in range(n):
        os.pwrite(fd, bytes(4096), 4096 * i)
        t = time.perf_counter()
        os.fdatasync(fd)
        out.append((time.perf_counter() - t) * 1e3)
    os.close(fd)
    os.unlink(path)
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("-n", type=int, default=10)
    n = ap.parse_args().n
    s = harness.Server("floor").start()
    floor = vm = None
    try:
        box = s.create()["id"]
        floor = Floor(s, box)
        s.delete(f"/v1/sandboxes/{box}", expect=200)
        print(f"floor.py {floor_digest()}\nkernel {floor.kernel_version}\nargv {' '.join(floor.argv)}")
        boots = []
        for _ in range(n):
            if vm:
                vm.kill()
            vm = floor.boot()
            boots.append(vm.boot_ms)
        show("cold boot to hello", boots)
        for _ in range(5):
            vm.sh("true")
        show("agent round trip (PING)", [vm.timed("PING") for _ in range(500)])
        show("spawn /bin/true", [vm.timed("SPAWN /bin/true") for _ in range(200)])
        show("sh -c true", [vm.timed("true") for _ in range(40)])
        data = os.urandom(1 << 20) * 100
        show("upload 100 MiB to /work", [vm.upload("/work/up", data) for _ in range(3)], "MB/s")
        show("download 100 MiB", [vm.download("/work/up", len(data)) for _ in range(3)], "MB/s")
        show("guest to host stream (dd)", [vm.stream() for _ in range(3)], "MB/s")
        show("fdatasync of 4 KiB", fdatasync_ms(s.state))
    finally:
        if vm:
            vm.kill()
        if floor:
            floor.close()
        s.close()


if __name__ == "__main__":
    main()
