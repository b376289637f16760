"""snapshot: how long a source stands still, with memory and with disk changed; resume; cold to running; sixteen forks of one
snapshot. Each against the floor doing the same to a VM of its own."""
import json
import os
import shutil
import subprocess
import threading
import time

from floor_fork import ForkFloor, cold_ms, many_ms
from measure import BODY, Stand, Wire, interleave, ms, p50
from part_fork import command, create, wait_template

KEEP = {"retention": {"expires_in_seconds": 3600}}
MEMORY_MB, DISK_MB = 20, 20


class Ticker:
    """A loop in the guest that says something every few milliseconds; what is kept is when the host heard it. The guest's own
    clock stands still with it and cannot tell."""
    LOOP = "while :; do echo; read -t 0.002 x <> /dev/zero 2>/dev/null; done"
    PYTHON = "import time,sys\nwhile 1:\n sys.stdout.write('.');sys.stdout.flush();time.sleep(0.002)"

    def __init__(self, st, box):
        self.heard, self.stop = [], False
        r = st.s.stream("POST", f"/v1/sandboxes/{box}/commands", {"argv": ["python3", "-c", self.PYTHON], "timeout_seconds": 120})
        self.r = r
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        try:
            while not self.stop:
                e = self.r.next(timeout=10)
                if e is None:
                    return
                self.heard.append(time.perf_counter())
        except Exception:  # closed below
            return

    def gap(self, since, until):
        near = [t for t in self.heard if since - 0.05 <= t <= until + 0.2]
        return max((b - a for a, b in zip(near, near[1:])), default=0) * 1e3

    def close(self):
        self.stop = True
        self.r.close()


def pauses(report, options, st, wire):
    _, box = create(wire)
    box = box["id"]
    vm = st.floor.fork()
    folder = st.floor.work
    ticker = Ticker(st, box)

    def product(fill):
        def one():
            command(wire, box, ["sh", "-c", fill])
            t = time.perf_counter()
            snap = json.loads(wire.want(201, wire.request("POST", f"/v1/sandboxes/{box}/snapshots", KEEP)))
            took = time.perf_counter()
            time.sleep(0.3)  # the loop's next words
            gaps.append(ticker.gap(t, took))
            changed_mb.append(snap["sizes"]["memory_bytes"] / 1e6)
            totals.append((took - t) * 1e3)
            st.s.delete(f"/v1/snapshots/{snap['id']}", expect=200)
            return snap["paused_ms"]
        return one

    def floor(fill, disk):
        def one():
            vm.sh(fill)
            paused, dirty, *_ = vm.snapshot(folder, disk)
            floor_mb.append(sum(len(d) for _, d in dirty) / 1e6)
            return paused
        return one

    gaps, totals, changed_mb, floor_mb = [], [], [], []
    fill = f"head -c {MEMORY_MB}000000 /dev/urandom > /dev/shm/fill"
    mine, theirs = interleave(options.samples_snapshots, product(fill), floor(fill.replace("/dev/shm", "/tmp"), False))
    report.figure("snapshot: source paused, memory changed", "ms", mine, ("ratio<=", 1.2), theirs, "stop to cont", promised_n=5)
    report.figure("snapshot: longest gap of a loop in the guest", "ms", gaps, ("ratio<=", 1.2), theirs, "stop to cont", promised_n=5,
                  note="heard on the host: the loop's own period, 2 ms and more under emulation, is in it")
    report.figure("snapshot: POST to 201", "ms", totals, note="written, hashed, synced, sealed")
    report.note(f"memory changed when it was paused, p50: {p50(changed_mb):.1f} MB, the floor's {p50(floor_mb):.1f} MB")
    gaps.clear()
    totals.clear()
    fill = f"head -c {DISK_MB}000000 /dev/urandom > /work/fill"
    mine, theirs = interleave(options.samples_snapshots, product(fill), floor(fill, True))
    report.figure("snapshot: source paused, disk changed", "ms", mine, ("ratio<=", 1.2), theirs, "stop to cont with a raw copy",
                  promised_n=5)
    report.figure("snapshot: longest gap of a loop, disk changed", "ms", gaps, ("ratio<=", 1.2), theirs,
                  "stop to cont with a raw copy", promised_n=5, note="while QEMU copies the disk beside it")
    ticker.close()
    vm.kill()
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def resumes(report, options, st, wire):
    _, box = create(wire)
    box = box["id"]
    pause, resume = (wire.request("POST", f"/v1/sandboxes/{box}/{verb}", {}) for verb in ("pause", "resume"))
    took = []
    for _ in range(options.samples_resumes):
        wire.want(200, pause)
        took.append(ms(wire.want, 200, resume))
    report.figure("resume from pause", "ms", took, ("p50<=", 5), promised_n=30)
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def changed(st, fill):
    """A floor VM's snapshot: (dirty runs, state, disk)"""
    vm = st.floor.fork()
    vm.sh(fill)
    _, dirty, state, disk, _ = vm.snapshot(st.floor.work, True)
    vm.kill()
    return dirty, state, disk


def colds(report, options, st, wire):
    _, box = create(wire)
    box = box["id"]
    command(wire, box, ["sh", "-c", "head -c 20000000 /dev/urandom > /dev/shm/fill"])
    dirty, state, disk = changed(st, "head -c 20000000 /dev/urandom > /tmp/fill")

    def product():
        wire.want(200, wire.request("POST", f"/v1/sandboxes/{box}/cold", {}))
        t = time.perf_counter()
        wire.want(200, wire.request("POST", f"/v1/sandboxes/{box}/resume", {}))
        command(wire, box, ["sh", "-c", "echo hi"])
        return (time.perf_counter() - t) * 1e3
    mine, theirs = interleave(options.samples_snapshots, product, lambda: cold_ms(st.floor, dirty, state, disk))
    report.figure("cold to first output", "ms", mine, ("ratio<=", 1.2), theirs, "materialise, fork, run", promised_n=5)
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def sixteen(report, options, st, wire):
    _, box = create(wire)
    box = box["id"]
    command(wire, box, ["sh", "-c", "head -c 20000000 /dev/urandom > /dev/shm/fill"])
    dirty, state, disk = changed(st, "head -c 20000000 /dev/urandom > /tmp/fill")

    def product():
        snap = json.loads(wire.want(201, wire.request("POST", f"/v1/sandboxes/{box}/snapshots", KEEP)))["id"]
        t = time.perf_counter()
        body = {"count": 16, "lifecycle": BODY["lifecycle"]}
        items = json.loads(wire.want(201, wire.request("POST", f"/v1/snapshots/{snap}/fork", body)))["items"]

        def first(ids):
            own = Wire(st.s)
            for one in ids:
                command(own, one, ["sh", "-c", "echo hi"])
            own.close()
        ids = [i["id"] for i in items]
        threads = [threading.Thread(target=first, args=(ids[k::4],)) for k in range(4)]
        for th in threads:
            th.start()
        for th in threads:
            th.join()
        took = (time.perf_counter() - t) * 1e3
        for one in ids:
            st.s.delete(f"/v1/sandboxes/{one}", expect=200)
        st.s.delete(f"/v1/snapshots/{snap}", expect=200)
        return took
    mine, theirs = interleave(options.samples_sixteen, product, lambda: many_ms(st.floor, dirty, state, disk))
    report.figure("16 forks of one snapshot to 16 first outputs", "ms", mine, ("ratio<=", 1.15), theirs,
                  "16 forks, four at a time", promised_n=3)
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def measure(report, options):
    with Stand("snapshot", floor=True, args=("--pool", "0"), make=ForkFloor) as st:
        wait_template(st.s)
        st.floor.boot_template()
        wire = st.wire()
        pauses(report, options, st, wire)
        resumes(report, options, st, wire)
        colds(report, options, st, wire)
        sixteen(report, options, st, wire)
