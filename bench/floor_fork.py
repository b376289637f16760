#!/usr/bin/python3
"""What QEMU itself costs for forks, snapshots and cold state: the recipe of the shared floor (template by shared memory, forks
by private mappings of it, device state without RAM, changed pages from /proc), with the product's disk, jail and ports, but
no server. What the product tuned for itself is taken back out of its command line: the floor boots with `-kernel` in every
fork, QEMU's own tb-size, and a kernel that randomises addresses.

    python3 bench/floor_fork.py [-n RUNS]     needs a finished build and images (./quickstart --prepare)
"""
import argparse
import array
import concurrent.futures
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import floor as plain  # noqa: E402
import harness  # noqa: E402

MIB = 256
UNTUNED = ((",tb-size=64", ""), (" norandmaps", ""), (" psi=0 lsm=landlock,yama hardened_usercopy=off init_on_alloc=0 randomize_kstack_offset=off sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=60", ""), ("cache=unsafe", "cache=writeback"))


def ms(t):
    return (time.perf_counter() - t) * 1e3


class ForkFloor(plain.Floor):
    """Made beside a running cold sandbox of a server with --templates off; template() is due before fork()."""

    def __init__(self, server, sandbox_id):
        super().__init__(server, sandbox_id)
        pid = harness.qemu_pid(sandbox_id)
        with open(f"/proc/{pid}/stat") as f:
            outer = int(f.read().rsplit(")", 1)[1].split()[1])
        with open(f"/proc/{outer}/cmdline", "rb") as f:
            whole = f.read().decode().split("\0")[:-1]
        assert "bwrap" in whole[0], whole[0]
        cut = whole.index("--")
        info = whole.index("--info-fd")
        self.jail = ["bwrap", "--die-with-parent"] + whole[1:info] + whole[info + 2:cut + 1]
        text = " ".join(self.argv)
        for old, _ in UNTUNED:
            assert old in text, f"the product's command line has no {old!r} any more: correct UNTUNED"
        self.argv = [self.untuned(w) for w in self.argv]
        self.ram, self.state = os.path.join(self.work, "template.ram"), os.path.join(self.work, "template.state")
        self.disk = os.path.join(self.work, "template.disk")
        self.ram_fd = 40

    @staticmethod
    def untuned(word):
        for old, new in UNTUNED:
            word = word.replace(old, new)
        return word

    def command(self, ram_share, incoming):
        argv = list(self.argv)
        at = argv.index("-object") + 1
        argv[at] = (f"memory-backend-file,id=ram,size={MIB}M,mem-path=/proc/self/fd/{self.ram_fd},"
                    f"share={'on' if ram_share else 'off'}")
        if incoming:
            argv += ["-incoming", "defer", "-global", "migration.send-configuration=off"]
        return self.jail + argv

    def boot_template(self):
        """Boots, warms, stops and keeps; returns how long the keeping took."""
        with open(self.ram, "wb") as f:
            f.truncate(MIB << 20)
        vm = ForkVM(self, self.ram, True, False, self.template)
        vm.ready()
        for _ in range(10):
            vm.sh("true")
        t = time.perf_counter()
        vm.cmd("stop")
        vm.save(self.state)
        took = ms(t)
        plain.copy_extents(vm.disk, self.disk)
        vm.kill()
        return took

    def fork(self, ram=None, state=None, disk=None, in_place=False):
        vm = ForkVM(self, ram or self.ram, False, True, disk or self.disk, in_place)
        vm.restore(state or self.state)
        return vm

    def fork_ms(self, **what):
        """From nothing to the first command's output."""
        t = time.perf_counter()
        vm = self.fork(**what)
        vm.sh("echo hi")
        took = ms(t)
        vm.kill()
        return took


class ForkVM:
    def __init__(self, floor, ram, share, incoming, disk, in_place=False):
        floor.number += 1
        self.floor, self.ram = floor, ram
        self.folder = os.path.join(floor.work, f"f{floor.number}")
        os.mkdir(self.folder)
        self.disk = disk if in_place else os.path.join(self.folder, "disk")
        if not in_place:
            plain.copy_extents(disk, self.disk)
        opened = {"kernel": os.open(floor.kernel, os.O_RDONLY), "initrd": os.open(floor.initrd, os.O_RDONLY),
                  "root": os.open(floor.root, os.O_RDONLY), "data": os.open(self.disk, os.O_RDWR),
                  "data_read": os.open(self.disk, os.O_RDONLY), "ram": os.open(ram, os.O_RDWR)}
        listeners = {}
        for name in ("control", "bulk", "qmp", "console"):
            listeners[name] = socket.socket(socket.AF_UNIX)
            listeners[name].bind(os.path.join(self.folder, name))
            listeners[name].listen(1)
        numbers = {**floor.fds, "ram": floor.ram_fd}
        held = {**opened, **{n: s.fileno() for n, s in listeners.items()}}
        high = {n: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for n, fd in held.items() if n in numbers}
        actions = [(os.POSIX_SPAWN_OPEN, 2, os.path.join(self.folder, "stderr"), os.O_WRONLY | os.O_CREAT, 0o600)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, numbers[n]) for n, fd in high.items()]
        self.pid = os.posix_spawn(shutil.which("bwrap"), floor.command(share, incoming), {"PATH": "/usr/bin"},
                                  file_actions=actions)
        self.ports = {}
        for name in ("control", "bulk", "console", "qmp"):
            c = socket.socket(socket.AF_UNIX)
            c.connect(os.path.join(self.folder, name))
            c.settimeout(120)
            self.ports[name] = c
        for fd in list(high.values()) + list(opened.values()):
            os.close(fd)
        for listener in listeners.values():
            listener.close()
        self.control, self.rest = self.ports["control"], b""
        self.lines = self.ports["qmp"].makefile("r")
        self.lines.readline()
        self.cmd("qmp_capabilities")

    # ---- QMP
    def reply(self):
        while True:
            text = self.lines.readline()
            assert text, f"QEMU ended: {open(os.path.join(self.folder, 'stderr')).read()}"
            r = json.loads(text)
            assert "error" not in r, r
            if "return" in r:
                return r["return"]

    def cmd(self, name, fd=None, **arguments):
        text = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        anc = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self.ports["qmp"].sendmsg([text], anc)
        return self.reply()

    def save(self, path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        number = self.cmd("add-fd", fd=fd)["fdset-id"]
        os.close(fd)
        self.cmd("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False)

    def restore(self, state):
        fd = os.open(state, os.O_RDONLY)
        self.cmd("getfd", fd=fd, fdname="state")
        os.close(fd)
        self.cmd("migrate-incoming", uri="fd:state")
        while self.cmd("query-migrate").get("status") != "completed":
            time.sleep(0.0003)
        self.cmd("cont")

    # ---- the agent
    ready_text = b"READY\n"

    def ready(self):
        while self.ready_text not in self.rest:
            part = self.control.recv(4096)
            assert part, f"QEMU ended: {open(os.path.join(self.folder, 'stderr')).read()}"
            self.rest += part
        self.rest = b""

    sh = plain.VM.sh
    answer = plain.VM.answer
    timed = plain.VM.timed

    # ---- memory
    def qemu(self):
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as f:
            return int(f.read().split()[0])

    def own_mb(self):
        total = 0
        for pid in (self.pid, self.qemu()):
            with open(f"/proc/{pid}/smaps_rollup") as f:
                total += sum(int(x.split()[1]) for x in f if x.startswith("Private_Dirty:"))
        return total / 1000

    def dirty(self):
        """(offset, bytes) runs that this VM wrote: private anonymous pages over the file mapping."""
        pid, inode = self.qemu(), os.stat(self.ram).st_ino
        with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap, open(f"/proc/{pid}/mem", "rb", 0) as mem:
            for line in open(f"/proc/{pid}/maps"):
                words = line.split()
                if words[4] != str(inode):
                    continue
                lo, hi = (int(x, 16) for x in words[0].split("-"))
                pagemap.seek(lo // 4096 * 8)
                entries = struct.unpack(f"<{(hi - lo) // 4096}Q", pagemap.read((hi - lo) // 4096 * 8))
                run = None
                for i, e in enumerate(entries + (0,)):
                    written = e >> 63 & 1 and not e >> 61 & 1
                    if written and run is None:
                        run = i
                    elif not written and run is not None:
                        mem.seek(lo + run * 4096)
                        yield run * 4096, mem.read((i - run) * 4096)
                        run = None

    def snapshot(self, folder, with_disk=False):
        """Stop, save, copy, go on. Returns (paused ms, dirty runs, paths of state and disk)."""
        state, disk = os.path.join(folder, "snap.state"), os.path.join(folder, "snap.disk")
        t = time.perf_counter()
        self.cmd("stop")
        self.save(state)
        dirty = list(self.dirty())
        disk_ms = 0.0
        if with_disk:
            t1 = time.perf_counter()
            plain.copy_extents(self.disk, disk)
            disk_ms = ms(t1)
        self.cmd("cont")
        return ms(t), dirty, state, disk, disk_ms

    def kill(self):
        try:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        for c in self.ports.values():
            c.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def materialise(floor, dirty, path):
    """Base and changed pages into one file, as a restore has to."""
    plain.copy_extents(floor.ram, path)
    with open(path, "r+b") as f:
        for offset, data in dirty:
            f.seek(offset)
            f.write(data)


def cold_ms(floor, dirty, state, disk):
    """From files to the first output: materialise, fork, run."""
    path = os.path.join(floor.work, "cold.ram")
    t = time.perf_counter()
    materialise(floor, dirty, path)
    vm = floor.fork(ram=path, state=state, disk=disk, in_place=True)  # a cold sandbox has its own disk
    vm.sh("echo hi")
    took = ms(t)
    vm.kill()
    os.unlink(path)
    return took


def many_ms(floor, dirty, state, disk, n=16, at_once=4):
    """n forks of one snapshot to n first outputs, at_once at a time."""
    path = os.path.join(floor.work, "many.ram")
    t = time.perf_counter()
    materialise(floor, dirty, path)

    def one(_):
        vm = floor.fork(ram=path, state=state, disk=disk)
        vm.sh("echo hi")
        return vm
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        vms = list(pool.map(one, range(n)))
    took = ms(t)
    for vm in vms:
        vm.kill()
    os.unlink(path)
    return took


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("-n", type=int, default=10)
    n = ap.parse_args().n
    s = harness.Server("floor-fork", args=["--templates", "off"]).start()
    floor = vm = None
    try:
        floor = ForkFloor(s, s.create()["id"])
        plain.show("template capture", [floor.boot_template()])
        plain.show("fork: request to first output", [floor.fork_ms() for _ in range(n)])
        vm = floor.fork()
        for _ in range(5):
            vm.sh("true")
        time.sleep(10)  # what is measured is an idle fork
        plain.show("memory one idle fork adds", [vm.own_mb()], "MB")
        vm.sh("head -c 20000000 /dev/urandom > /tmp/fill")
        paused, dirty, state, disk, _ = vm.snapshot(floor.work, True)
        plain.show("live snapshot: source paused", [paused])
        plain.show("live snapshot: dirty memory", [sum(len(d) for _, d in dirty) / 1e6], "MB")
        plain.show("cold to first output", [cold_ms(floor, dirty, state, disk) for _ in range(3)])
        plain.show("16 forks, four at a time", [many_ms(floor, dirty, state, disk)])
    finally:
        if vm:
            vm.kill()
        if floor:
            floor.close()
        s.close()


if __name__ == "__main__":
    main()
