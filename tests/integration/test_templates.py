"""Templates, the pool, what memory costs, and the budget: what continues from what, what is shared, and what gives way to whom.
One state directory for all; each test starts the server over it as it needs it."""
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
import time

import harness
from saved import BOX, KEEP, LIFE, after, differ, drop, end, restore, snapshot, unique, who
from test_tour import receipt

DEFAULT = {"vcpus": 1, "memory_mib": 256, "disk_mib": 1024}
SMALL = {"vcpus": 1, "memory_mib": 128, "disk_mib": 1024}
WIDE = {"vcpus": 2, "memory_mib": 256, "disk_mib": 1024}
FLAT = {"vcpus": 1, "memory_mib": 256, "disk_mib": 64}
OVERHEAD_MIB = 112  # under emulation (docs/configuration.md)
MIB = 1 << 20
SEALS = 0x2 | 0x4 | 0x8  # F_SEAL_SHRINK, _GROW, _WRITE
F_GET_SEALS = 1034


# ---- what they ask ----------------------------------------------------------------------------------------------------
def serve(s, *args, env=None):
    """The server over the same state, with these flags."""
    if s.args == list(args) and s.env == (env or {}) and s.process.poll() is None:
        return
    if s.process.poll() is None:
        s.terminate()
    s.args, s.env = list(args), env or {}
    s.start()


def begin(s, *args, **kw):
    """The same, at the beginning of a test: nothing of another is left."""
    serve(s, *args, **kw)
    end(s, *[i["id"] for i in s.get(f"{BOX}?limit=500").json["items"]])
    drop(s, *[i["id"] for i in s.get("/v1/snapshots?limit=500").json["items"]])


def gauge(s, name):
    for line in s.get("/metrics", expect=200).body.decode().splitlines():
        if line.startswith(name + " "):
            return int(float(line.split()[1]))
    raise AssertionError(f"no gauge {name}")


def reaches(s, name, value, seconds=60):
    harness.until(lambda: gauge(s, name) == value, seconds, f"{name} is {value}")


def path_of(box):
    return box["backend"]["boot_path"]


def kept(s):
    """{name: seconds of its last use} of the templates on disk."""
    top = os.path.join(s.state, "templates")
    return {n: os.stat(os.path.join(top, n)).st_mtime for n in os.listdir(top) if n[0] != "."}


def kept_bytes(s, name):
    top = os.path.join(s.state, "templates", name)
    return sum(os.stat(os.path.join(top, f)).st_blocks * 512 for f in ("state", "memory", "disk.raw"))


def template_of(s, box):
    """The template that a sandbox continues from, as its receipt has it: the name of its directory."""
    key = receipt(s, box["receipt_id"])["facts"]["template"]
    return key and key.removeprefix("sha256:")


def together(n, fn):
    """n calls at once; their answers."""
    got, faults = [], []

    def work(i):
        try:
            got.append(fn(i))
        except BaseException as e:  # told by the thread that waits
            faults.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    if faults:
        raise faults[0]
    return got


def have(s, shape):
    """A running sandbox of that shape which continues from a template; makes the template where it is missing."""
    box = s.create(resources=shape)
    if path_of(box) == "cold":
        end(s, box["id"])
        box = s.create(resources=shape)
    assert path_of(box) in ("template", "pool"), box["backend"]
    return box


def nothing_pooled(s):
    assert not s.vms("pool"), s.vms("pool")
    assert os.listdir(os.path.join(s.state, "pool")) == []


def only(s, *boxes):
    """No process, run directory or uid beside those of these sandboxes."""
    harness.until(lambda: set(s.vms()) == set(boxes) and not s.vms("pool"), 10, f"only {boxes} run")
    harness.until(lambda: set(os.listdir(os.path.join(s.state, "run"))) - {"probe"} <= set(boxes), 10, "no run directory is left")


def uid(pid):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(r"^Uid:\s+(\d+)", f.read(), re.M).group(1))


# ---- templates --------------------------------------------------------------------------------------------------------
@harness.deadline(120)
def test_first_is_cold(s):
    """The first create boots cold; those that come while its template is in the making wait for it; one template is made"""
    boxes = together(4, lambda i: s.create())
    assert sorted(path_of(b) for b in boxes) == ["cold", "template", "template", "template"], [b["backend"] for b in boxes]
    assert gauge(s, "airlock_templates_made_total") == 1 and gauge(s, "airlock_templates_loaded") == 1
    assert len(kept(s)) == 1 and not s.vms("templates")
    later = s.create()
    assert path_of(later) == "template", later["backend"]
    t = later["timings_ms"]
    assert t["restore"] is not None and t["agent"] is not None and t["total"] >= t["restore"] + t["agent"] - 2, t
    [cold] = [b for b in boxes if path_of(b) == "cold"]
    assert cold["timings_ms"]["restore"] is None and cold["uniqueness"] is None, cold
    assert template_of(s, cold) is None and {template_of(s, b) for b in boxes if b != cold} == set(kept(s))
    forks = [later] + [b for b in boxes if b != cold]
    assert len({unique(b) for b in forks}) == len(forks)
    differ(*[who(s, b["id"]) for b in boxes + [later]])
    assert gauge(s, "airlock_pool_ready") == 0 and not s.vms("pool"), "a pool that nobody asked for"
    end(s, later["id"], *[b["id"] for b in boxes])


@harness.deadline(120)
def test_shapes(s):
    """Another memory size, number of vcpus or disk size is another template"""
    begin(s)
    have(s, DEFAULT)
    before = gauge(s, "airlock_templates_made_total")
    shapes = (SMALL, WIDE, FLAT)
    first = together(3, lambda i: s.create(resources=shapes[i]))
    assert {path_of(b) for b in first} == {"cold"}, [b["backend"] for b in first]
    again = [s.create(resources=r) for r in shapes]
    assert {path_of(b) for b in again} == {"template"}, [b["backend"] for b in again]
    assert gauge(s, "airlock_templates_made_total") == before + 3 and len({template_of(s, b) for b in again}) == 3
    for b, shape in zip(again, shapes):
        assert b["resources"] == shape, b["resources"]
        r = s.run(b["id"], "nproc; grep MemTotal /proc/meminfo; df -m /work | tail -1")["stdout"].split()
        assert int(r[0]) == shape["vcpus"] and int(r[2]) < shape["memory_mib"] * 1024 < int(r[2]) * 1.5, r
        assert int(r[5]) < shape["disk_mib"], r
    end(s, *[b["id"] for b in first + again])


@harness.deadline(90)
def test_survives(s):
    """A template survives a restart and kill -9 of the server: nothing is made anew"""
    begin(s)
    end(s, have(s, DEFAULT)["id"])
    names = set(kept(s))
    for how in (s.terminate, s.kill):
        how()
        s.start()
        box = s.create()
        assert path_of(box) == "template" and template_of(s, box) in names, box["backend"]
        assert gauge(s, "airlock_templates_made_total") == 0 and set(kept(s)) == names
        end(s, box["id"])


@harness.deadline(90)
def test_sealed(s):
    """A fork maps a sealed memfd privately as its memory; no file of a template is open or mapped in its QEMU"""
    begin(s)
    box = have(s, DEFAULT)["id"]
    pid = s.vms()[box]
    with open(f"/proc/{pid}/maps") as f:
        maps = f.read().splitlines()
    ram = [m.split(maxsplit=5) for m in maps if "/memfd:airlock-ram" in m]
    size = sum(int(b, 16) - int(a, 16) for a, b in (m[0].split("-") for m in ram))
    assert size == DEFAULT["memory_mib"] * MIB and {m[1] for m in ram} == {"rw-p"}, ram
    inode = {m[4] for m in ram}
    held = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
        assert "/templates/" not in link and "/snapshots/" not in link, link
        if link.startswith("/memfd:airlock-ram"):
            held.append(fd)
    assert held, "its memory is no descriptor of its own"
    for fd in held:
        assert str(os.stat(f"/proc/{pid}/fd/{fd}").st_ino) in inode
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
        try:
            seals = fcntl.fcntl(own, F_GET_SEALS)
        finally:
            os.close(own)
        assert seals & SEALS == SEALS, f"seals {seals:#x}"
        try:
            with open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as f:
                f.write(b"x")
            raise AssertionError("a template's memory was written to")
        except PermissionError:
            pass
    assert not [m for m in maps if "/templates/" in m or "/snapshots/" in m]
    end(s, box)


# ---- memory -----------------------------------------------------------------------------------------------------------
class Smaps:
    """Own reading of a process: bytes of pages that are no file's, and of the guest memory's mapping of the template."""

    def __init__(self, pid):
        self.own = self.guest = self.shared = 0
        ram = False
        with open(f"/proc/{pid}/smaps") as f:
            for line in f:
                words = line.split()
                if "-" in words[0]:
                    ram = "/memfd:airlock-ram" in line
                    first, last = (int(x, 16) // 4096 for x in words[0].split("-"))
                    if ram:
                        self.look(pid, first, last)
                elif words[0] == "Private_Dirty:" and not ram:
                    self.own += int(words[1]) * 1024

    def look(self, pid, first, last):
        """Page by page: bit 63 is there, bit 61 of a file."""
        with open(f"/proc/{pid}/pagemap", "rb") as f:
            f.seek(first * 8)
            entries = memoryview(f.read((last - first) * 8)).cast("Q")
        there = [e for e in entries if e >> 63]
        self.shared += 4096 * sum(1 for e in there if e >> 61 & 1)
        self.guest += 4096 * sum(1 for e in there if not e >> 61 & 1)


def near(told, seen, slack, what):
    assert abs(told - seen) <= slack, f"{what}: {told / MIB:.1f} MiB are told, {seen / MIB:.1f} MiB are there"


def check_memory(s, box):
    """What it tells is what its page tables say; returns it."""
    def same():
        pid = s.vms()[box]
        seen, told, then = Smaps(pid), s.get(f"{BOX}/{box}/memory", expect=200).json, Smaps(pid)
        if (seen.guest, seen.shared) != (then.guest, then.shared):
            return None  # it runs: looked at a guest that has just changed
        near(told["shared_bytes"], seen.shared, 0, "shared")
        near(told["unique_bytes"] - told["vmm_bytes"], seen.guest, 0, "the guest's own")
        near(told["vmm_bytes"], seen.own, 4 * MIB, "QEMU's own")  # and its jail's
        return told
    return harness.until(same, 20, "a guest that is quiet for a moment")


@harness.deadline(120)
def test_memory(s):
    """What a fork's memory costs: the same for one and for several, as the page tables have it; the gauges are the sums"""
    begin(s)
    one = have(s, DEFAULT)["id"]
    alone = check_memory(s, one)
    assert alone["shared_bytes"] > 4 * MIB, f"the only fork shares nothing: {alone}"
    assert alone["worst_case_bytes"] == (256 + OVERHEAD_MIB) * MIB, alone
    assert alone["unique_bytes"] < alone["worst_case_bytes"] and alone["vmm_bytes"] <= alone["unique_bytes"], alone
    more = [s.create()["id"] for _ in range(2)]
    now = check_memory(s, one)
    near(now["shared_bytes"], alone["shared_bytes"], 4 * MIB, "shared, with others")
    near(now["unique_bytes"], alone["unique_bytes"], 8 * MIB, "unique, with others")
    s.run(one, "head -c 20000000 /dev/urandom > /dev/shm/x")
    wrote = check_memory(s, one)
    assert wrote["unique_bytes"] - wrote["vmm_bytes"] > now["unique_bytes"] - now["vmm_bytes"] + 18 * MIB, (now, wrote)
    told = [check_memory(s, b) for b in (one, *more)]
    for name in ("unique", "shared", "vmm"):
        near(gauge(s, f"airlock_memory_{name}_bytes"), sum(t[name + "_bytes"] for t in told), 8 * MIB, name)
    assert gauge(s, "airlock_memory_committed_bytes") == sum(t["worst_case_bytes"] for t in told)
    end(s, one, *more)
    assert gauge(s, "airlock_memory_committed_bytes") == gauge(s, "airlock_memory_unique_bytes") == 0


# ---- another QEMU, none, and what is dropped ----------------------------------------------------------------------------
@harness.deadline(150)
def test_other_qemu(s):
    """Another QEMU is another template: the old one is never used for it, nor the new one for the old; a pool follows"""
    begin(s)
    old = have(s, DEFAULT)
    before = kept(s)
    old_key = template_of(s, old)
    try:
        folder = tempfile.mkdtemp(prefix="airlock-qemu-", dir="/usr")  # whose modules are found from its own place
    except OSError as e:
        raise harness.Skip(f"/usr is not to be written to: {e.strerror}")
    try:
        os.chmod(folder, 0o755)
        copy = shutil.copy(shutil.which("qemu-system-x86_64"), folder)
        with open(copy, "ab") as f:
            f.write(b"\0")
        serve(s, "--qemu", copy)
        first = s.create()
        assert path_of(first) == "cold", "a template of another QEMU was used"
        second = s.create()
        [new_key] = set(kept(s)) - set(before)
        assert path_of(second) == "template" and template_of(s, second) == new_key != old_key, second["backend"]
        assert gauge(s, "airlock_templates_made_total") == 1 and kept(s)[old_key] == before[old_key]
        assert s.run(old["id"], ["true"])["exit_code"] == 0, "the old one does not go on"
        serve(s, "--qemu", copy, "--pool", "1")
        reaches(s, "airlock_pool_ready", 1)
        third = s.create()
        assert path_of(third) == "pool" and template_of(s, third) == new_key, third
        end(s, first["id"], second["id"], third["id"])
        serve(s, "--pool", "1")
        reaches(s, "airlock_pool_ready", 1)
        fourth = s.create()
        assert path_of(fourth) == "pool" and template_of(s, fourth) == old_key, fourth
        end(s, old["id"], fourth["id"])
    finally:
        shutil.rmtree(folder)


@harness.deadline(120)
def test_off(s):
    """--templates off: every create boots, nothing is made, also with a pool asked for"""
    begin(s, "--templates", "off", "--pool", "1")
    before = kept(s)
    boxes = together(2, lambda i: s.create(resources=SMALL))
    assert {path_of(b) for b in boxes} == {"cold"} and kept(s) == before
    assert gauge(s, "airlock_templates_made_total") == gauge(s, "airlock_templates_loaded") == gauge(s, "airlock_pool_ready") == 0
    end(s, *[b["id"] for b in boxes])


@harness.deadline(180)
def test_evicted_from_disk(s):
    """Above --template-disk-mib the least recently used go, but none that a snapshot, a live or a cold sandbox needs"""
    begin(s)
    saved, cold, live = have(s, DEFAULT), have(s, SMALL), have(s, WIDE)
    spare = have(s, FLAT)
    end(s, spare["id"])
    saved_key, cold_key, live_key, spare_key = (template_of(s, b) for b in (saved, cold, live, spare))
    s.run(cold["id"], "echo mine > /work/x")
    snap = snapshot(s, saved["id"])["id"]
    s.post(f"{BOX}/{cold['id']}/cold", expect=200)
    end(s, saved["id"])
    end(s, s.create(resources=WIDE)["id"])  # used last: it would stay in any case
    assert set(kept(s)) >= {saved_key, cold_key, live_key, spare_key}
    serve(s, "--template-disk-mib", "1")
    harness.until(lambda: set(kept(s)) == {saved_key, cold_key, live_key}, 20, "only what is needed stays")
    again = restore(s, snap)
    assert s.run(again["id"], ["true"])["exit_code"] == 0
    s.post(f"{BOX}/{cold['id']}/resume", expect=200)
    assert s.run(cold["id"], "cat /work/x")["stdout"] == "mine\n"
    late = snapshot(s, live["id"])["id"]
    more = restore(s, late)
    end(s, again["id"], cold["id"], live["id"], more["id"])
    drop(s, snap, late)
    # Nothing needs them any more: of three that are a little too much, one goes.
    uses = kept(s)
    oldest = min(uses, key=uses.get)
    assert oldest == saved_key, (oldest, uses)
    serve(s, "--template-disk-mib", str(sum(kept_bytes(s, n) for n in uses) // MIB - 1))
    harness.until(lambda: oldest not in kept(s), 20, "the one used least recently goes")
    assert set(kept(s)) == {cold_key, live_key}
    # Loaded ones that nobody uses go too, when another is made.
    for shape in (WIDE, SMALL):
        box = s.create(resources=shape)
        assert path_of(box) == "template", box["backend"]
        end(s, box["id"])
    first = s.create(resources=FLAT)
    assert path_of(first) == "cold", first["backend"]
    end(s, first["id"], have(s, FLAT)["id"])
    first = s.create()
    assert path_of(first) == "cold", first["backend"]
    harness.until(lambda: live_key not in kept(s), 30, "the one used least recently goes")
    assert cold_key in kept(s), "one that was used later went"
    box = s.create()
    assert path_of(box) == "template" and template_of(s, box) == saved_key, box["backend"]
    end(s, first["id"], box["id"])


@harness.deadline(120)
def test_evicted_from_memory(s):
    """Above --template-memory-mib templates that nobody uses leave memory, not the disk; one in use stays"""
    begin(s, "--template-memory-mib", "1")
    box = have(s, SMALL)["id"]
    before = kept(s)
    made = gauge(s, "airlock_templates_made_total")
    after(2.5)
    assert gauge(s, "airlock_templates_loaded") == 1 and gauge(s, "airlock_memory_templates_bytes") > 16 * MIB
    end(s, box)
    reaches(s, "airlock_templates_loaded", 0, 10)
    assert gauge(s, "airlock_memory_templates_bytes") == 0 and gauge(s, "airlock_templates_evicted_total") >= 1
    assert set(kept(s)) == set(before)
    box = s.create(resources=SMALL)
    assert path_of(box) == "template" and gauge(s, "airlock_templates_made_total") == made
    # A cold sandbox needs it on disk, not in memory.
    s.post(f"{BOX}/{box['id']}/cold", expect=200)
    reaches(s, "airlock_templates_loaded", 0, 10)
    s.post(f"{BOX}/{box['id']}/resume", expect=200)
    assert s.run(box["id"], ["true"])["exit_code"] == 0
    end(s, box["id"])


@harness.deadline(90)
def test_stopped_in_the_making(s):
    """A clean stop while a template is made leaves no QEMU of it; the next start sweeps its files"""
    begin(s)
    shape = {"vcpus": 1, "memory_mib": 192, "disk_mib": 64}
    before = set(kept(s))
    a = s.post(BOX, {"image": "debian", "lifecycle": LIFE, "resources": shape}, headers={"Prefer": "respond-async"}, expect=202)
    harness.until(lambda: s.vms("templates"), 20, "a template is in the making")
    s.terminate()
    assert not s.vms("templates"), "its QEMU is left"
    s.start()
    assert set(os.listdir(os.path.join(s.state, "templates"))) == before
    box = a.json["sandbox_id"]
    harness.until(lambda: s.get(f"{BOX}/{box}").json["state"] in ("running", "failed", "destroyed"), 30, "its create ends")
    end(s, box)
    only(s)


# ---- the pool -----------------------------------------------------------------------------------------------------------
@harness.deadline(150)
def test_pool(s):
    """--pool 2: two creates are somebody of their own at once, with what they asked for; an emptied pool makes nobody wait"""
    begin(s, "--pool", "2")
    reaches(s, "airlock_pool_ready", 2)
    assert len(s.vms("pool")) == 2 and gauge(s, "airlock_pool_parked") == 0
    asked = {"name": "pooled", "labels": {"team": "x"}, "env": {"MODE": "ci"}, "lifecycle": {"ttl_seconds": 77, "on_expiry": "stop"}}
    boxes = together(3, lambda i: s.create(**asked) if i == 0 else s.create())
    assert sorted(path_of(b) for b in boxes) == ["pool", "pool", "template"], [b["backend"] for b in boxes]
    for b in boxes:
        if path_of(b) == "pool":
            t = b["timings_ms"]
            assert t["prepare"] is None and t["restore"] is None and None not in (t["launch"], t["agent"]), t
        facts = receipt(s, b["receipt_id"])["facts"]
        assert facts["boot_path"] == path_of(b), facts
        evidence = {**b["uniqueness"], "refreshed_at": None, "clock_offset_ms": None}
        assert evidence == {**facts["uniqueness"], "refreshed_at": None, "clock_offset_ms": None}, (evidence, facts)
        words = who(s, b["id"])
        assert words["hostname"] == b["id"], words
    assert len({unique(b) for b in boxes}) == 3
    differ(*[who(s, b["id"]) for b in boxes])
    [mine] = [b for b in boxes if b["name"] == "pooled"]
    assert mine["labels"] == asked["labels"] and mine["env_keys"] == ["MODE"], mine
    assert mine["lifecycle"]["ttl_seconds"] == 77 and mine["lifecycle"]["on_expiry"] == "stop", mine["lifecycle"]
    assert s.run(mine["id"], "echo $MODE")["stdout"] == "ci\n"
    assert {s.run(b["id"], "echo -$MODE")["stdout"] for b in boxes if b != mine} == {"-\n"}
    check_memory(s, mine["id"])
    end(s, *[b["id"] for b in boxes])
    harness.until(lambda: not s.vms(), 10, "they end")


@harness.deadline(150)
def test_pool_deleted_at_once(s):
    """Deletes right after pooled creates leave nothing: no process, directory, uid, share of the budget"""
    begin(s, "--pool", "2")
    for _ in range(2):
        reaches(s, "airlock_pool_ready", 2)
        got = together(2, lambda i: s.create())
        together(2, lambda i: s.delete(f"{BOX}/{got[i]['id']}", expect=200))
    reaches(s, "airlock_pool_ready", 2)
    harness.until(lambda: not s.vms() and len(s.vms("pool")) == 2, 10, "only the pool is left")
    base = min(uid(p) for p in s.vms("pool").values())
    assert {uid(p) for p in s.vms("pool").values()} <= set(range(base, base + 8)), "uids leak"
    assert gauge(s, "airlock_memory_committed_bytes") == 2 * (256 + OVERHEAD_MIB) * MIB
    assert set(os.listdir(os.path.join(s.state, "run"))) - {"probe"} == set(s.vms("pool"))
    # One that is asked for and deleted before it is there.
    a = s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202).json["sandbox_id"]
    end(s, a)
    reaches(s, "airlock_pool_ready", 2)
    harness.until(lambda: not s.vms(), 10, "it ends")


@harness.deadline(120)
def test_pool_killed(s):
    """A pooled VM that dies or is stuck is never handed out, and is replaced"""
    begin(s, "--pool", "2")
    reaches(s, "airlock_pool_ready", 2)
    first = s.vms("pool")
    for pid in first.values():
        os.kill(pid, signal.SIGKILL)
    box = s.create()
    assert path_of(box) == "template" and s.run(box["id"], ["true"])["exit_code"] == 0, box["backend"]
    harness.until(lambda: len(s.vms("pool")) == 2 and gauge(s, "airlock_pool_ready") == 2, 60, "they are replaced")
    second = s.vms("pool")
    assert not set(first) & set(second)
    for pid in second.values():
        os.kill(pid, signal.SIGKILL)
    harness.until(lambda: len(s.vms("pool")) == 2 and gauge(s, "airlock_pool_ready") == 2 and not set(s.vms("pool")) & set(second),
                  60, "they are replaced without a create")
    for pid in s.vms("pool").values():
        os.kill(pid, signal.SIGSTOP)
    other = s.create()  # waits for the answer of one that is stuck, in vain
    assert path_of(other) == "template" and s.run(other["id"], ["true"])["exit_code"] == 0, other["backend"]
    assert unique(other) != unique(box)
    for pid in s.vms("pool").values():
        os.kill(pid, signal.SIGCONT)
    end(s, box["id"], other["id"])
    harness.until(lambda: not s.vms(), 10, "they end")


@harness.deadline(120)
def test_pool_and_server(s):
    """kill -9 of the server: the next start ends what was pooled. SIGTERM leaves none of it, also while it is being filled"""
    begin(s, env={"AIRLOCK_POOL": "2"})
    reaches(s, "airlock_pool_ready", 2)
    box = s.create()
    assert path_of(box) == "pool", box["backend"]
    s.kill()
    pooled = s.vms("pool")
    assert pooled
    s.env = {}
    s.start()
    harness.until(lambda: not [p for p in pooled.values() if harness.alive(p)], 20, "what was pooled ends")
    only(s, box["id"])
    nothing_pooled(s)
    a = s.get(f"{BOX}/{box['id']}").json
    assert a["state"] == "running" and path_of(a) == "pool" and a["uniqueness"] == box["uniqueness"], a
    assert s.run(box["id"], "hostname")["stdout"] == box["id"] + "\n"
    assert gauge(s, "airlock_memory_committed_bytes") == (256 + OVERHEAD_MIB) * MIB
    other = s.create()
    assert {uid(p) for p in s.vms().values()} <= set(range(uid(s.vms()[box["id"]]) - 2, uid(s.vms()[box["id"]]) + 3)), "uids leak"
    end(s, other["id"])
    for wanted in ("1", "4"):
        serve(s, "--pool", wanted)
        reaches(s, "airlock_pool_ready", 1)
        if wanted == "4":
            harness.until(lambda: len(s.vms("pool")) >= 2, 30, "another is in the making")
        assert s.terminate() == 0
        only(s, box["id"])
        nothing_pooled(s)
        s.start()
    end(s, box["id"])


@harness.deadline(90)
def test_parked(s):
    """--pool-parked: a QEMU waits before the restore; its create is as unique, and says pool with a restore"""
    begin(s, "--pool-parked", "2")
    reaches(s, "airlock_pool_parked", 2)
    assert gauge(s, "airlock_pool_ready") == 0 and len(s.vms("pool")) == 2
    boxes = together(2, lambda i: s.create(env={"N": str(i)}))
    for b in boxes:
        t = b["timings_ms"]
        assert path_of(b) == "pool" and t["prepare"] is None and t["restore"] is not None and t["agent"] is not None, b
    assert len({unique(b) for b in boxes}) == 2
    differ(*[who(s, b["id"]) for b in boxes])
    assert {s.run(b["id"], "echo $N")["stdout"] for b in boxes} == {"0\n", "1\n"}
    end(s, *[b["id"] for b in boxes])


@harness.deadline(120)
def test_pool_keys(s):
    """A pool's VM is of its shape alone; the ceiling of --pool-memory-mib is kept over all of them"""
    begin(s)
    end(s, have(s, SMALL)["id"])
    serve(s, "--pool", "2", "--pool-memory-mib", str(2 * (256 + OVERHEAD_MIB) + 128 + OVERHEAD_MIB))
    reaches(s, "airlock_pool_ready", 2)
    box = s.create(resources=SMALL)
    assert path_of(box) == "template", box["backend"]
    reaches(s, "airlock_pool_ready", 3)
    after(3)  # longer than the pool waits for quiet
    assert gauge(s, "airlock_pool_ready") == 3 and len(s.vms("pool")) == 3, "above the ceiling"
    two = [s.create(resources=SMALL), s.create()]
    assert [path_of(b) for b in two] == ["pool", "pool"], [b["backend"] for b in two]
    assert [b["resources"] for b in two] == [SMALL, DEFAULT] and template_of(s, two[0]) == template_of(s, box)
    for b in two:
        total = int(s.run(b["id"], "grep MemTotal /proc/meminfo")["stdout"].split()[1])
        assert total < b["resources"]["memory_mib"] * 1024 < total * 1.5, total
    end(s, box["id"], *[b["id"] for b in two])


# ---- the budget -----------------------------------------------------------------------------------------------------------
def refused(a):
    """The MiB that a 503 says would have to end."""
    assert a.status == 503 and a.code == "memory_budget" and a.kind == "unavailable", a
    found = re.search(r"worth (\d+) MiB", a.json["remedy"])
    assert found and int(found.group(1)) > 0, a.json["remedy"]
    return int(found.group(1))


def ask(s, shape, expect=None):
    return s.post(BOX, {"image": "debian", "lifecycle": LIFE, "resources": shape}, expect=expect)


@harness.deadline(150)
def test_budget(s):
    """What does not fit is refused with what would have to end: create, fork, restore, resume; a restart counts right"""
    share = 128 + OVERHEAD_MIB
    begin(s)
    end(s, have(s, SMALL)["id"])
    serve(s, "--memory-budget-mib", str(3 * share + 130))
    boxes = [s.create(resources=SMALL)["id"] for _ in range(3)]
    snap = snapshot(s, boxes[0])["id"]
    assert refused(ask(s, SMALL)) <= share
    assert refused(s.post(f"{BOX}/{boxes[0]}/fork", {"count": 2})) > share
    refused(s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE}))
    a = ask(s, {**SMALL, "memory_mib": 4096})
    assert a.status == 503 and a.code == "memory_budget" and "ask for less" in a.json["remedy"], a
    s.post(f"{BOX}/{boxes[2]}/cold", expect=200)
    boxes.append(ask(s, SMALL, 201).json["id"])
    refused(s.post(f"{BOX}/{boxes[2]}/resume"))
    assert s.get(f"{BOX}/{boxes[2]}").json["state"] == "cold"
    for how in (s.kill, s.terminate):
        how()
        s.start()
        assert gauge(s, "airlock_memory_committed_bytes") == 3 * share * MIB
        refused(ask(s, SMALL))
    end(s, boxes[3])
    s.post(f"{BOX}/{boxes[2]}/resume", expect=200)
    assert s.run(boxes[2], ["true"])["exit_code"] == 0
    refused(ask(s, SMALL))
    end(s, boxes[1])
    boxes[1] = ask(s, SMALL, 201).json["id"]
    end(s, *boxes[:3])
    drop(s, snap)
    assert gauge(s, "airlock_memory_committed_bytes") == 0
    assert s.get("/v1/capabilities").json["limits"]["sandboxes_max"] == 200


@harness.deadline(120)
def test_deleted_counts(s):
    """What a sandbox was restored from counts as long as it is mapped, also when the snapshot is deleted; then no more"""
    begin(s)
    end(s, have(s, SMALL)["id"])
    box = s.create(resources=SMALL)["id"]
    snap = snapshot(s, box)["id"]
    kid = restore(s, snap)["id"]
    both = gauge(s, "airlock_memory_templates_bytes")
    drop(s, snap)
    assert gauge(s, "airlock_memory_templates_bytes") == both
    end(s, kid)
    reaches(s, "airlock_templates_loaded", 1, 10)
    harness.until(lambda: 0 < gauge(s, "airlock_memory_templates_bytes") < both - 16 * MIB, 10, "its memory is gone")
    end(s, box)


@harness.deadline(150)
def test_budget_of_origins(s):
    """Memory that is loaded is in the budget first: a restore without room is refused, a create boots and makes no template"""
    share = 128 + OVERHEAD_MIB

    def mib(folder, name):
        return (os.stat(os.path.join(s.state, folder, name, "memory")).st_size >> 20) + 1
    begin(s)
    box = have(s, SMALL)
    template = mib("templates", template_of(s, box))
    s.run(box["id"], "head -c 20000000 /dev/urandom > /dev/shm/x")
    snap = snapshot(s, box["id"])["id"]
    end(s, box["id"])
    need = 2 * template + mib("snapshots", snap)  # the template while it is copied, and the copy
    serve(s, "--memory-budget-mib", str(share + need - 8))
    refused(s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE}))
    refused(s.post(f"/v1/snapshots/{snap}/fork", {"count": 1, "lifecycle": LIFE}))
    assert gauge(s, "airlock_memory_committed_bytes") == 0 and not s.vms()
    end(s, *[i["id"] for i in s.get(f"{BOX}?limit=500").json["items"]])
    budget = share + need + 8
    serve(s, "--memory-budget-mib", str(budget))
    kid = restore(s, snap)["id"]
    assert gauge(s, "airlock_memory_committed_bytes") == share * MIB
    held = gauge(s, "airlock_memory_committed_bytes") + gauge(s, "airlock_memory_templates_bytes")
    assert held <= budget * MIB, f"{held / MIB:.0f} of {budget} MiB"
    end(s, kid)
    drop(s, snap)
    for left, path in ((template - 8, "cold"), (template + 8, "template")):
        serve(s, "--memory-budget-mib", str(share + left))
        box = s.create(resources=SMALL)
        assert path_of(box) == path, (left, box["backend"])
        end(s, box["id"])
    before = kept(s)
    serve(s, "--memory-budget-mib", str(2 * share))
    for _ in range(2):  # 144 MiB: no room for a second such VM
        box = s.create(resources={**SMALL, "memory_mib": 144})
        assert path_of(box) == "cold" and not s.vms("templates"), box["backend"]
        assert gauge(s, "airlock_memory_committed_bytes") == (144 + OVERHEAD_MIB) * MIB
        end(s, box["id"])
    assert set(kept(s)) == set(before) and gauge(s, "airlock_templates_made_total") == 0


@harness.deadline(150)
def test_pool_gives_way(s):
    """A pool is a cache: it is no reason to refuse a sandbox, is given up for it, and comes back"""
    share, small = 256 + OVERHEAD_MIB, 128 + OVERHEAD_MIB
    begin(s)
    end(s, have(s, SMALL)["id"], have(s, DEFAULT)["id"])
    # Room for one VM beside the template: it is the pool's, and then the client's.
    serve(s, "--pool", "1", "--memory-budget-mib", str(share + 150))
    reaches(s, "airlock_pool_ready", 1)
    box = s.create()
    assert path_of(box) == "pool", box["backend"]
    refused(ask(s, DEFAULT))
    end(s, box["id"])
    reaches(s, "airlock_pool_ready", 1)
    pooled = s.vms("pool")
    box = s.create(resources=SMALL)  # of another shape: the pooled one has to end
    assert path_of(box) == "template" and s.run(box["id"], ["true"])["exit_code"] == 0, box["backend"]
    assert not [p for p in pooled.values() if harness.alive(p)] and gauge(s, "airlock_pool_ready") == 0
    assert gauge(s, "airlock_memory_committed_bytes") == small * MIB
    end(s, box["id"])
    # Several at once, with a pool that has taken all there is.
    budget = 4 * small + 230
    serve(s, "--pool", "8", "--memory-budget-mib", str(budget))
    reaches(s, "airlock_pool_ready", (budget - 100) // share)
    boxes = together(4, lambda i: s.create(resources=SMALL))
    assert {path_of(b) for b in boxes} == {"template"}, [b["backend"] for b in boxes]
    assert len(s.vms()) == 4 and gauge(s, "airlock_memory_committed_bytes") <= budget * MIB
    held = gauge(s, "airlock_memory_committed_bytes") + gauge(s, "airlock_memory_templates_bytes")
    assert held <= budget * MIB, f"{held / MIB:.0f} of {budget} MiB"
    end(s, *[b["id"] for b in boxes])
    harness.until(lambda: gauge(s, "airlock_pool_ready") >= 1, 60, "the pool comes back")


@harness.deadline(150)
def test_many(s):
    """Twelve creates at once within the budget all succeed; a quota is not overshot"""
    begin(s)
    end(s, have(s, SMALL)["id"])
    serve(s, "--memory-budget-mib", str(12 * (128 + OVERHEAD_MIB) + 130))
    boxes = together(12, lambda i: s.create(resources=SMALL))
    assert {path_of(b) for b in boxes} == {"template"} and len({unique(b) for b in boxes}) == 12
    refused(ask(s, SMALL))
    together(12, lambda i: end(s, boxes[i]["id"]))
    only(s)
    serve(s, "--max-sandboxes-per-tenant", "3", "--pool", "2")
    reaches(s, "airlock_pool_ready", 2)
    got = together(8, lambda i: ask(s, DEFAULT))
    assert sorted(a.status for a in got) == [201] * 3 + [429] * 5, got
    assert {a.code for a in got if a.status == 429} == {"quota_exceeded"}
    end(s, *[a.json["id"] for a in got if a.status == 201])
    assert s.get("/v1/capabilities").json["limits"]["sandboxes_max"] == 3


if __name__ == "__main__":
    harness.main()
