"""fork: a create that forks its template, from POST to the first command's output, against the floor's own fork; what one idle
fork adds in memory; and the pool: POST to 201, and first commands against the same ones repeated."""
import json
import time

import floor_shared
from floor_fork import ForkFloor
from measure import BODY, Stand, Wire, harness, interleave, ms, p50

IDLE_SECONDS = 10


def create(wire, path=None):
    """(milliseconds, the sandbox)"""
    data = wire.request("POST", "/v1/sandboxes", BODY)
    t = time.perf_counter()
    status, body = wire.exchange(data)
    took = (time.perf_counter() - t) * 1e3
    assert status == 201, f"create: {status} {body[:400]!r}"
    box = json.loads(body)
    assert path is None or box["backend"]["boot_path"] == path, box["backend"]
    return took, box


def command(wire, box, argv):
    """Milliseconds of one command over HTTP."""
    data = wire.request("POST", f"/v1/sandboxes/{box}/commands", {"argv": argv})
    t = time.perf_counter()
    body = wire.want(200, data)
    took = (time.perf_counter() - t) * 1e3
    assert b'"exit_code":0' in body, body[:300]
    return took


def gauge(server, name):
    for line in server.get("/metrics", check=False).body.decode().splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    return 0.0


def qemu_of(server, box):
    """Processes of a sandbox, also of one from the pool: by its run directory's name in the journal."""
    pid = harness.qemu_pid(box["id"])
    with open(f"/proc/{pid}/stat") as f:
        return pid, int(f.read().rsplit(")", 1)[1].split()[1])


def private_dirty_mb(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            total += sum(int(x.split()[1]) for x in f if x.startswith("Private_Dirty:"))
    return total / 1000


def wait_template(server):
    harness.until(lambda: gauge(server, "airlock_templates_loaded") >= 1, 60, "the template")


def forks(report, options, st):
    def product():
        wire = Wire(st.s)
        t = time.perf_counter()
        _, box = create(wire, "template")
        command(wire, box["id"], ["sh", "-c", "echo hi"])
        took = (time.perf_counter() - t) * 1e3
        wire.close()
        stages.append(box["timings_ms"])
        st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
        return took
    stages = []
    interleave(2, product, st.floor.fork_ms)
    stages.clear()
    made, floor = interleave(options.samples_forks, product, st.floor.fork_ms)
    report.figure("fork create to first output", "ms", made, ("ratio<=", 1.15), floor, "fork to first output", promised_n=30)
    report.note("within a fork, p50: " + ", ".join(
        f"{k} {p50([x[k] for x in stages if x[k] is not None] or [0]):.0f} ms" for k in stages[0]))


def settled(st, wire):
    """A fork of each side after five commands and ten idle seconds."""
    _, box = create(wire, "template")
    vm = st.floor.fork()
    for _ in range(5):
        command(wire, box["id"], ["sh", "-c", "true"])
        vm.sh("true")
    time.sleep(IDLE_SECONDS)  # what is measured is an idle fork
    return box, vm


def memory(report, st):
    """smaps counts a page of the template as private where one fork alone maps it, and a memory file's as dirty: the first figure
    has them on the product's side. With a second fork beside it they are what they are: shared."""
    wire, alone, floor, beside = Wire(st.s), [], [], []
    for _ in range(3):
        box, vm = settled(st, wire)
        alone.append(private_dirty_mb(qemu_of(st.s, box)))
        floor.append(vm.own_mb())
        told = st.s.get(f"/v1/sandboxes/{box['id']}/memory").json
        other, other_vm = settled(st, wire)
        beside.append(private_dirty_mb(qemu_of(st.s, other)))
        for v in (vm, other_vm):
            v.kill()
        for one in (box, other):
            st.s.delete(f"/v1/sandboxes/{one['id']}", expect=200)
    report.figure("memory one idle fork adds", "MB", alone, ("ratio<=", 0.9), floor, "Private_Dirty of QEMU and jail")
    report.figure("memory a second idle fork adds", "MB", beside, note="Private_Dirty; the template's pages are not in it")
    report.note("the server says of the first: " + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in told.items()))
    wire.close()


def pooled(report, options):
    with Stand("pool", args=("--pool", "2")) as st:
        created, first_sh, next_sh, first_py, next_py, memory_mb = [], [], [], [], [], []
        for _ in range(options.samples_pool):
            harness.until(lambda: gauge(st.s, "airlock_pool_ready") >= 2, 120, "a full pool")
            time.sleep(1.0)  # the pool's last making is over; nothing else runs while this is timed
            wire = Wire(st.s)
            took, box = create(wire, "pool")
            created.append(took)
            first_sh.append(command(wire, box["id"], ["sh", "-c", "true"]))
            next_sh += [command(wire, box["id"], ["sh", "-c", "true"]) for _ in range(5)]
            first_py.append(command(wire, box["id"], ["python3", "-c", "print(1)"]))
            next_py += [command(wire, box["id"], ["python3", "-c", "print(1)"]) for _ in range(5)]
            told = st.s.get(f"/v1/sandboxes/{box['id']}/memory").json
            memory_mb.append(told["unique_bytes"] / 1e6)
            st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
            wire.close()
        report.figure("create from the pool", "ms", created, ("p50<=", 8), promised_n=30)
        report.figure("create from the pool, tail", "ms", created, ("p99<=", 25), promised_n=30)
        report.figure("first sh -c true of a pooled sandbox", "ms", first_sh, ("ratio<=", 1.2), next_sh, "the same repeated",
                      promised_n=30)
        report.figure("first python3 of a pooled sandbox", "ms", first_py, ("ratio<=", 1.2), next_py, "the same repeated",
                      promised_n=30)
        report.figure("memory a pooled sandbox adds", "MB", memory_mb, note="by its own page tables, after eleven commands")


def measure(report, options):
    with Stand("fork", floor=True, args=("--pool", "0"), make=ForkFloor) as st:
        wait_template(st.s)
        st.floor.boot_template()
        forks(report, options, st)
        memory(report, st)
        floor_shared.note(report, st.floor.root, 10, "fork: request to first output", "memory one idle fork adds",
                          "agent round trip (PING)", "sh -c true", "live snapshot: source paused")
    pooled(report, options)
