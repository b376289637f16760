"""What is kept of memory is believed only as it was written: flipped bits, lost, added and older files, another QEMU, another
making of a template, a full disk. Each is refused by name, starts nothing, and works again when it is put right."""
import os
import shutil
import stat as st
import subprocess
import tempfile
import threading
import time

import harness
from saved import (BOX, COUNT, KEEP, LIFE, MARK, SNAP, differ, drop, end, fork, goes_on, hidden, jobs_ended, live, marked,
                   restore, snapshot, unique, who)

SMALL = {"vcpus": 1, "memory_mib": 128, "disk_mib": 64}
ARGS = ["--max-sandboxes-per-tenant", "8"]
OUTPUT = "echo to stdout; echo to stderr >&2; sleep 600"


# ---- damages: each returns what puts it right ---------------------------------------------------------------------------
def flip(where):
    def damage(path):
        def turn():
            with open(path, "r+b") as f:
                size = os.fstat(f.fileno()).st_size
                at = {"first": 0, "middle": size // 2, "last": size - 1}[where]
                byte = os.pread(f.fileno(), 1, at)[0]
                os.pwrite(f.fileno(), bytes([byte ^ 4]), at)
        turn()
        return turn
    damage.__name__ = f"a bit of the {where} byte"
    return damage


def truncated(path):
    with open(path, "r+b") as f:
        size = os.fstat(f.fileno()).st_size
        last = os.pread(f.fileno(), 1, size - 1)
        f.truncate(size - 1)

    def mend():
        with open(path, "r+b") as f:
            os.pwrite(f.fileno(), last, size - 1)
    return mend


def extended(path):
    size = os.stat(path).st_size
    os.truncate(path, size + 4096)
    return lambda: os.truncate(path, size)


def aside_of(path):
    """A name for it outside of what is checked, in the same filesystem."""
    top = path.split("/state/")[0]
    return os.path.join(top, "aside-" + os.path.basename(path))


def deleted(path):
    os.rename(path, aside_of(path))
    return lambda: os.rename(aside_of(path), path)


def linked(path):
    os.rename(path, aside_of(path))
    os.symlink(aside_of(path), path)

    def mend():
        os.unlink(path)
        os.rename(aside_of(path), path)
    return mend


def added(path):
    with open(path, "x"):
        pass
    return lambda: os.unlink(path)


DAMAGES = (flip("first"), flip("middle"), flip("last"), truncated, extended, deleted, linked)


# ---- what is refused ----------------------------------------------------------------------------------------------------
def pointers(a):
    return [e["pointer"].lstrip("/") for e in a.json["errors"]]


def mismatch(a, name):
    assert a.status == 409 and a.kind == "snapshot_mismatch", a
    assert name in pointers(a), (name, a)


def compat(s, snap):
    v = s.get(f"{SNAP}/{snap}/compat", expect=200).json
    assert v["compatible"] == (not v["mismatches"]), v
    return {m["field"]: m for m in v["mismatches"]}


def refused(s, snap, name, what=""):
    """compat, restore and fork name it, and no more than what damages it."""
    found = compat(s, snap)
    assert name in found and len(found) <= 2, (what, name, found)
    mismatch(s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE}), name)
    mismatch(s.post(f"{SNAP}/{snap}/fork", {"count": 2, "lifecycle": LIFE}), name)
    return found[name]


def files_of(folder):
    return sorted(os.path.relpath(os.path.join(d, n), folder) for d, _, names in os.walk(folder) for n in names)


def field(path):
    return "manifest" if path == "manifest.json" else path


def audit_tail(s, last):
    items = []
    while True:
        page = s.get(f"/v1/audit?limit=500&after_seq={last}").json
        items += page["items"]
        if len(page["items"]) < 500:
            return items
        last = page["items"][-1]["seq"]


def last_seq(s):
    return audit_tail(s, 0)[-1]["seq"]


def untouched(s, before, vms):
    """Nothing was started for what was refused, and nothing is left of it."""
    assert live(s) == before, live(s) - before
    assert set(harness.vm_pids(s.sandbox_ids())) == vms
    assert not hidden(s) and jobs_ended(s)
    with os.scandir(os.path.join(s.state, "sandboxes")) as d:
        left = {e.name for e in d if os.path.exists(os.path.join(e.path, "disk.raw"))}
    assert left <= before, left - before


def warm(s, **fields):
    """A sandbox that continues from a template: the first of its shape has it made."""
    fields = {"resources": SMALL, **fields}
    first = s.create(**fields)
    if first["backend"]["boot_path"] == "template":
        return first["id"]
    end(s, first["id"])
    box = s.create(**fields)
    assert box["backend"]["boot_path"] == "template", box["backend"]
    return box["id"]


def server(name, *args, **kw):
    return harness.Server("test_integrity." + name, args=[*ARGS, *args], **kw)


def again(s, args=None):
    """A new server on the same state; sandboxes run on."""
    assert s.terminate() == 0
    s.args = s.args if args is None else [*ARGS, *args]
    s.start()


def templates(s):
    folder = os.path.join(s.state, "templates")
    return [os.path.join(folder, n) for n in os.listdir(folder) if not n.startswith(".")]


# ---- files of a snapshot ------------------------------------------------------------------------------------------------
@harness.deadline(150)
def test_damaged_snapshot():
    """A flipped bit, a cut, longer, lost, linked or added file of a snapshot, of a command's output too, before it was ever loaded
    and after"""
    s = server("snapshot").start()
    try:
        box = warm(s)
        s.run(box, MARK)
        c = s.background(box, OUTPUT, timeout_seconds=600)
        harness.until(lambda: s.output(box, c) and s.output(box, c, "stderr"), 10, "its output")
        made = snapshot(s, box)
        snap, folder = made["id"], os.path.join(s.state, "snapshots", made["id"])
        spools = [f"spool/{c}.{n}" for n in ("order", "stderr", "stdout")]
        assert files_of(folder) == sorted(["manifest.json", "state", "memory", "disk.raw", *spools]), files_of(folder)
        assert set(spools) <= set(made["digests"]) and set(spools) <= set(made["sizes"]), made
        assert made["bytes"] == sum(made["sizes"].values()), made
        before, vms, seq = live(s), set(harness.vm_pids(s.sandbox_ids())), last_seq(s)
        for n, damages in enumerate((DAMAGES, (flip("middle"),))):
            for name in files_of(folder):
                for damage in damages:
                    mend = damage(os.path.join(folder, name))
                    found = refused(s, snap, field(name), f"{name}: {damage.__name__}")
                    assert damage is not deleted or found["found"] == "missing", found
                    mend()
                assert compat(s, snap) == {}, name
            for name in ("more", "spool/more", "spool/" + c + ".more"):
                mend = added(os.path.join(folder, name))
                assert refused(s, snap, name)["found"] == "unexpected"
                mend()
            untouched(s, before, vms)
            if n == 0:
                denied = [e for e in audit_tail(s, seq) if e["status"] == 409]
                for operation in ("sandbox.create", "snapshot.fork"):
                    mine = [e for e in denied if e["operation"] == operation]
                    assert len(mine) == 7 * 7 + 3, (operation, len(mine))
                    assert all(e["outcome"] == "failed" and e["receipt_id"] for e in mine), mine[0]
            kids = [restore(s, snap)["id"] for _ in range(2)]  # loaded, and kept in memory from here on
            for kid in kids:
                marked(s, kid)
                [go] = [x["command_id"] for x in s.get(f"{BOX}/{kid}/commands").json["items"] if x["state"] == "running"]
                assert s.output(kid, go) == b"to stdout\n" and s.output(kid, go, "stderr") == b"to stderr\n"
            end(s, *kids)
        marked(s, box)
        assert s.get("/v1/audit/verify", expect=200).json["verdict"] == "verified"
        end(s, box)
        drop(s, snap)
    finally:
        s.close()


def compat_read(s, snap, found=()):
    """Bytes of files that the server's thread for it has read for one compat."""
    def so_far():
        for task in os.listdir(f"/proc/{s.process.pid}/task"):
            with open(f"/proc/{s.process.pid}/task/{task}/comm") as f:
                if f.read() == "compat\n":
                    with open(f"/proc/{s.process.pid}/task/{task}/io") as io:
                        return int(io.read().split()[1])
        return 0
    before = so_far()
    assert set(compat(s, snap)) == set(found)
    return so_far() - before


@harness.deadline(90)
def test_remembered():
    """compat reads the files of a snapshot that nobody touched once, after a restore not at all; what is touched it reads again"""
    s = server("remembered").start()
    try:
        box = s.create(resources=SMALL)["id"]
        s.run(box, "head -c 8000000 /dev/urandom > /dev/shm/x")
        snap = snapshot(s, box)["id"]
        end(s, box)
        path = os.path.join(s.state, "snapshots", snap, "memory")
        size = os.stat(path).st_size

        def settled():
            harness.until(lambda: time.time() > os.stat(path).st_ctime + 0.5, 10, "time that tells a next change apart")
        assert size > 8000000
        settled()
        assert compat_read(s, snap) >= size
        assert compat_read(s, snap) < 1000000  # the manifest, the database
        mend = flip("middle")(path)
        settled()
        assert compat_read(s, snap, ["memory"]) >= size
        assert compat_read(s, snap, ["memory"]) < 1000000
        mend()
        settled()
        end(s, restore(s, snap)["id"])
        assert compat_read(s, snap) < 1000000
        flip("last")(path)
        assert compat_read(s, snap, ["memory"]) >= size
        drop(s, snap)
    finally:
        s.close()


@harness.deadline(90)
def test_another_directory(s):
    """A snapshot's directory that is lost, another's, or a link to itself is refused; the right one works again"""
    box = warm(s)
    one, two = snapshot(s, box)["id"], snapshot(s, box)["id"]
    folders = [os.path.join(s.state, "snapshots", i) for i in (one, two)]
    keep = os.path.join(s.state, "kept")
    os.rename(folders[1], keep)
    assert refused(s, two, "manifest")["found"] == "missing"
    shutil.copytree(folders[0], folders[1])  # of the same server, sealed, but of an earlier moment
    assert {"manifest", "id", "epoch"} <= set(compat(s, two))
    for path, body in ((BOX, {"snapshot_id": two, "lifecycle": LIFE}), (f"{SNAP}/{two}/fork", {"count": 1, "lifecycle": LIFE})):
        mismatch(s.post(path, body), "epoch")
    shutil.rmtree(folders[1])
    os.symlink(keep, folders[1])
    refused(s, two, "manifest")
    os.unlink(folders[1])
    os.rename(keep, folders[1])
    assert compat(s, two) == {}
    kid = restore(s, two)["id"]
    end(s, box, kid)
    drop(s, one, two)


@harness.deadline(60)
def test_modes(s):
    """Saved states are 0600 in 0700 directories, and no jail sees them"""
    box = warm(s)
    c = s.background(box, OUTPUT, timeout_seconds=600)
    harness.until(lambda: s.output(box, c), 10, "its output")
    snap = snapshot(s, box)["id"]
    cold = warm(s)
    s.post(f"{BOX}/{cold}/cold", expect=200)
    for top in (os.path.join(s.state, "snapshots"), os.path.join(s.state, "templates"), os.path.join(s.state, "sandboxes", cold, "cold")):
        assert files_of(top)
        for d, _, names in os.walk(top):
            assert st.S_IMODE(os.lstat(d).st_mode) == 0o700, d
            for n in names:
                mode = os.lstat(os.path.join(d, n)).st_mode
                assert st.S_ISREG(mode) and st.S_IMODE(mode) == 0o600, (n, oct(mode))
    kid = restore(s, snap)["id"]
    for pid in harness.vm_pids([box, kid]):
        with open(f"/proc/{pid}/mountinfo") as f:
            mounts = f.read()
        for word in ("snapshots", "templates", "/cold"):
            assert s.state + "/" + word not in mounts, mounts
        fds = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        assert not [x for x in fds if "/snapshots/" in x or "/templates/" in x or "/cold/" in x], fds
    pid = harness.qemu_pid(kid)
    assert not os.path.exists(f"/proc/{pid}/root{s.state}/snapshots") and not os.path.exists(f"/proc/{pid}/root{s.state}/templates")
    end(s, box, cold, kid)
    drop(s, snap)


# ---- cold ---------------------------------------------------------------------------------------------------------------
@harness.deadline(120)
def test_damaged_cold(s):
    """A cold sandbox whose memory, device state, manifest or disk was touched stays cold, and comes back when it is put right"""
    box = warm(s)
    s.run(box, MARK)
    s.post(f"{BOX}/{box}/cold", expect=200)
    home = os.path.join(s.state, "sandboxes", box)
    folder = os.path.join(home, "cold")
    assert files_of(folder) == ["manifest.json", "memory", "state"]
    seq = last_seq(s)

    def stays(name):
        mismatch(s.post(f"{BOX}/{box}/resume"), name)
        assert s.get(f"{BOX}/{box}").json["state"] == "cold" and not harness.vm_pids([box])
    for path in [os.path.join(folder, n) for n in files_of(folder)] + [os.path.join(home, "disk.raw")]:
        damages = (flip("first"), flip("middle"), flip("last"), extended) if path.endswith("disk.raw") else DAMAGES
        for damage in damages:
            mend = damage(path)
            stays(field(os.path.basename(path)))
            mend()
    mend = added(os.path.join(folder, "more"))
    stays("more")
    mend()
    mine = [e for e in audit_tail(s, seq) if e["operation"] == "sandbox.resume" and e["status"] == 409]
    assert len(mine) == 3 * 7 + 4 + 1 and all(e["outcome"] == "failed" for e in mine), mine
    # An older cold state of the same sandbox: sealed, but not the last.
    old = os.path.join(s.state, "old")
    shutil.copytree(folder, old)
    s.post(f"{BOX}/{box}/resume", expect=200)
    marked(s, box)
    s.post(f"{BOX}/{box}/cold", expect=200)
    os.rename(folder, folder + ".new")
    os.rename(old, folder)
    a = s.post(f"{BOX}/{box}/resume")
    mismatch(a, "epoch")
    assert "manifest" in pointers(a), a
    shutil.rmtree(folder)
    os.rename(folder + ".new", folder)
    s.post(f"{BOX}/{box}/resume", expect=200)
    marked(s, box)
    end(s, box)
    assert jobs_ended(s)


# ---- templates ----------------------------------------------------------------------------------------------------------
class Family:
    """A running sandbox, a snapshot and a cold sandbox of one template."""

    def __init__(self, s):
        self.s = s
        self.box = warm(s)
        s.run(self.box, MARK)
        self.command = s.background(self.box, COUNT, timeout_seconds=600)
        self.snap = snapshot(s, self.box)["id"]
        self.cold = warm(s)
        s.run(self.cold, MARK)
        s.post(f"{BOX}/{self.cold}/cold", expect=200)

    def refused(self, found):
        s = self.s
        assert compat(s, self.snap)["template"]["found"].startswith(found), compat(s, self.snap)
        refused(s, self.snap, "template")
        mismatch(s.post(f"{BOX}/{self.cold}/resume"), "template")
        assert s.get(f"{BOX}/{self.cold}").json["state"] == "cold"
        for path, body in (("snapshots", KEEP), ("fork", {"count": 2}), ("cold", None)):
            mismatch(s.post(f"{BOX}/{self.box}/{path}", body), "template")
        assert s.get(f"{BOX}/{self.box}").json["state"] == "running"
        marked(s, self.box)
        goes_on(s, self.box, self.command)
        assert not hidden(s), hidden(s)

    def works(self):
        s = self.s
        assert compat(s, self.snap) == {}
        kid = restore(s, self.snap)["id"]
        marked(s, kid)
        s.post(f"{BOX}/{self.cold}/resume", expect=200)
        marked(s, self.cold)
        s.post(f"{BOX}/{self.cold}/cold", expect=200)
        more = snapshot(s, self.box)["id"]
        other = restore(s, more)["id"]
        marked(s, other)
        [third] = [k["id"] for k in fork(s, self.box, 1)["items"]]
        marked(s, third)
        end(s, kid, other, third)
        drop(s, more)

    def create(self, boot_path):
        made = self.s.create(resources=SMALL)
        assert made["backend"]["boot_path"] == boot_path, made["backend"]
        assert self.s.run(made["id"], ["true"])["exit_code"] == 0
        return made["id"]


@harness.deadline(180)
def test_damaged_template():
    """A template that is needed and damaged is not used and not made anew: all that began from it is refused until it is right"""
    s = server("template").start()
    try:
        f = Family(s)
        [folder] = templates(s)
        for name, restart in (("memory", True), ("state", False), ("disk.raw", False), ("manifest.json", False)):
            mend = flip("middle")(os.path.join(folder, name))
            if restart:
                again(s)
            f.refused("damaged")
            if name in ("memory", "manifest.json"):
                end(s, f.create("cold"))
                assert templates(s) == [folder]
            mend()
            if restart or name == "manifest.json":
                f.works()
                end(s, f.create("template"))
        # Nobody needs it any more: it is made anew.
        end(s, f.box, f.cold)
        drop(s, f.snap)
        flip("middle")(os.path.join(folder, "memory"))
        end(s, f.create("cold"), f.create("template"))
    finally:
        s.close()


@harness.deadline(180)
def test_another_template():
    """A template that is lost and made anew is another: nothing that began from the old one goes on with it, or is saved on it"""
    s = server("another").start()
    try:
        f = Family(s)
        [folder] = templates(s)
        keep = os.path.join(s.state, "kept")
        os.rename(folder, keep)
        f.refused("missing")
        os.rename(keep, folder)
        f.works()
        os.rename(folder, keep)
        end(s, f.create("cold"))  # has it made anew
        new = f.create("template")
        assert templates(s) == [folder]
        for restart in (False, True):  # with the old one in memory, and all sandboxes adopted
            if restart:
                again(s)
            f.refused("sha256:")
        s.run(new, MARK)
        later = snapshot(s, new)["id"]
        kid = restore(s, later)["id"]
        marked(s, kid)
        end(s, kid)
        newer = os.path.join(s.state, "newer")
        os.rename(folder, newer)
        os.rename(keep, folder)
        f.works()
        assert compat(s, later)["template"]["found"].startswith("sha256:")
        refused(s, later, "template")
        mismatch(s.post(f"{BOX}/{new}/cold"), "template")
        end(s, new, f.box, f.cold)
        drop(s, later, f.snap)
    finally:
        s.close()


@harness.deadline(90)
def test_pool_of_another_template():
    """What a pool has of a template that was touched is given up: who gets a sandbox can save it"""
    s = server("pool", "--pool", "1").start()
    try:
        ready = "airlock_pool_ready 1\n"
        wait = lambda: harness.until(lambda: ready in s.get("/metrics").body.decode(), 60, "the pool is full")  # noqa: E731
        wait()
        [folder] = templates(s)
        flip("middle")(os.path.join(folder, "memory"))
        box = s.create()
        assert box["backend"]["boot_path"] == "cold", box["backend"]
        end(s, box["id"], s.create()["id"])
        wait()
        box = s.create()
        assert box["backend"]["boot_path"] == "pool", box["backend"]
        s.run(box["id"], MARK)
        snap = snapshot(s, box["id"])["id"]
        kid = restore(s, snap)["id"]
        marked(s, kid)
        end(s, box["id"], kid)
        drop(s, snap)
    finally:
        s.close()


# ---- another QEMU -------------------------------------------------------------------------------------------------------
@harness.deadline(150)
def test_another_qemu():
    """With another build of QEMU nothing is restored or resumed, or saved for it; what runs goes on; with the old one all works"""
    other = tempfile.mkdtemp(prefix="airlock-test-")  # 0700: the jail's user cannot go there
    s = server("qemu")
    try:
        qemu = os.path.join(other, "qemu-system-x86_64")
        shutil.copy(shutil.which("qemu-system-x86_64"), qemu)
        with open(qemu, "ab") as f:
            f.write(b"\0")
        f = Family(s.start())
        old = s.get(f"{SNAP}/{f.snap}").json["qemu"]["digest"]
        again(s, ["--qemu", qemu])
        assert set(compat(s, f.snap)) == {"qemu_digest"}, compat(s, f.snap)
        refused(s, f.snap, "qemu_digest")
        mismatch(s.post(f"{BOX}/{f.cold}/resume"), "qemu_digest")
        assert s.get(f"{BOX}/{f.cold}").json["state"] == "cold"
        marked(s, f.box)
        goes_on(s, f.box, f.command)
        for path, body in (("cold", None), ("fork", {"count": 2})):  # its VM is still by the old one
            mismatch(s.post(f"{BOX}/{f.box}/{path}", body), "qemu_digest")
        made = snapshot(s, f.box)
        assert made["qemu"]["digest"] == old and "qemu_digest" in compat(s, made["id"]), made["qemu"]
        new = f.create("cold")
        first = snapshot(s, new)
        assert first["qemu"]["digest"] != old and compat(s, first["id"]) == {}, first["qemu"]
        again(s, [])
        goes_on(s, f.box, f.command)
        f.works()
        kid = restore(s, made["id"])["id"]
        marked(s, kid)
        refused(s, first["id"], "qemu_digest")
        os.chmod(other, 0o755)  # now it can, and the file itself is shown to it
        again(s, ["--qemu", qemu])
        kin = restore(s, first["id"])["id"]
        marked(s, f.box)
        end(s, kin)
        again(s, [])
        end(s, kid, new, f.box, f.cold)
        drop(s, made["id"], first["id"], f.snap)
    finally:
        s.close()
        shutil.rmtree(other)


# ---- a full disk --------------------------------------------------------------------------------------------------------
@harness.deadline(150)
def test_disk_full_half_way():
    """A snapshot, fork or cold state that the disk has no room for is a 503; the sandbox goes on, nothing half is left"""
    with harness.small_disk(720) as mount:
        s = server("full", "--disk-reserve-mib", "16", state=os.path.join(mount, "state"))
        try:
            s.start()
            box = warm(s, resources={"vcpus": 1, "memory_mib": 256, "disk_mib": 128})
            s.run(box, MARK)
            s.run(box, "head -c 60000000 /dev/urandom > /dev/shm/big; head -c 60000000 /dev/urandom > /work/big; sync; "
                       "sha256sum /dev/shm/big /work/big > /work/big-sums", timeout_seconds=120)
            c = s.background(box, COUNT, timeout_seconds=600)
            goes_on(s, box, c)
            fill = os.path.join(mount, "fill")
            v = os.statvfs(mount)
            room = v.f_bavail * v.f_frsize - (36 << 20)  # above the reserve, below what is to be written
            assert room > 0, room
            with open(fill, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, room)
            before, vms, seq = live(s), set(harness.vm_pids(s.sandbox_ids())), last_seq(s)
            free = os.statvfs(mount).f_bavail
            for path, body in (("snapshots", KEEP), ("fork", {"count": 2}), ("cold", None)):
                a = s.post(f"{BOX}/{box}/{path}", body)
                assert a.status == 503 and a.code == "disk_full" and a.json["retryable"], (path, a)
                assert s.get(f"{BOX}/{box}").json["state"] == "running"
                goes_on(s, box, c)
                untouched(s, before, vms)
                assert s.get(f"{SNAP}?sandbox_id={box}").json["items"] == [] and not os.listdir(os.path.join(s.state, "snapshots"))
                assert not os.path.exists(os.path.join(s.state, "sandboxes", box, "cold"))
                harness.until(lambda: os.statvfs(mount).f_bavail > free - 1024, 10, "what was half written is gone")
            failed = [e for e in audit_tail(s, seq) if e["status"] == 503]
            assert sorted(e["operation"] for e in failed) == ["sandbox.cold", "snapshot.create"], failed  # the fork was not admitted
            for e in failed:
                assert s.get(f"/v1/receipts/{e['receipt_id']}", expect=200)
            marked(s, box)
            os.unlink(fill)
            snap = snapshot(s, box)["id"]
            assert compat(s, snap) == {}
            end(s, box)
            kid = restore(s, snap)["id"]
            marked(s, kid)
            s.post(f"{BOX}/{kid}/cold", expect=200)
            s.post(f"{BOX}/{kid}/resume", expect=200)
            marked(s, kid)
            assert s.run(kid, "sha256sum -c --quiet /work/big-sums")["exit_code"] == 0
            end(s, kid)
            drop(s, snap)
        finally:
            s.close()


# ---- generations --------------------------------------------------------------------------------------------------------
@harness.deadline(120)
def test_same_second(s):
    """Forks and restores that are made at the same time share no generation, entropy, uuid or id"""
    box = warm(s)
    snap = snapshot(s, box)["id"]
    made, lock = [], threading.Lock()

    def go(call, *args):
        a = call(*args)
        with lock:
            made.extend(a.get("items", [a]))
    calls = [(fork, s, box, 2), (restore, s, snap), (restore, s, snap)]
    threads = [threading.Thread(target=go, args=c) for c in calls]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(made) == 4
    assert len({unique(m) for m in made}) == 4, [m["uniqueness"] for m in made]
    differ(who(s, box), *[who(s, m["id"]) for m in made])
    snaps = [snapshot(s, m["id"]) for m in made[:2]]
    assert len({x["digests"]["manifest"] for x in snaps}) == 2
    end(s, box, *[m["id"] for m in made])
    drop(s, *[x["id"] for x in snaps], snap)


@harness.deadline(150)
def test_generations():
    """A snapshot of a restored sandbox, three times over, verifies and restores, also where a new server adopted what it is of"""
    s = server("generations").start()
    try:
        box = warm(s)
        s.run(box, MARK)
        c = s.background(box, COUNT, timeout_seconds=600)
        goes_on(s, box, c)
        snaps, boxes = [], [box]
        for n in range(3):
            snaps.append(snapshot(s, boxes[-1])["id"])
            boxes.append(restore(s, snaps[-1])["id"])
            s.run(boxes[-1], f"head -c 500000 /dev/urandom > /dev/shm/g{n}; sha256sum /dev/shm/g{n} >> /work/sums")
        [go] = [x["command_id"] for x in s.get(f"{BOX}/{boxes[-1]}/commands").json["items"] if x["state"] == "running"]
        goes_on(s, boxes[-1], go)
        again(s)
        last = snapshot(s, boxes[-1])
        assert last["parent_id"] == snaps[-1], last
        assert [compat(s, x) for x in (*snaps, last["id"])] == [{}] * 4
        kid = restore(s, last["id"])["id"]
        for one in (boxes[-1], kid):
            marked(s, one)
            assert s.run(one, "wc -l < /work/sums")["stdout"] == "5\n"
        [went] = [x["command_id"] for x in s.get(f"{BOX}/{kid}/commands").json["items"] if x["state"] == "running"]
        goes_on(s, kid, went)
        # What an adopted one has beside its template is believed only as it was written.
        again(s)
        runs = os.path.join(s.state, "sandboxes", boxes[-1], "base.runs")
        for damage in (flip("last"), deleted):
            mend = damage(runs)
            for path, body in (("snapshots", KEEP), ("fork", {"count": 1}), ("cold", None)):
                mismatch(s.post(f"{BOX}/{boxes[-1]}/{path}", body), "base.runs")
            mend()
        s.post(f"{BOX}/{boxes[-1]}/cold", expect=200)
        s.post(f"{BOX}/{boxes[-1]}/resume", expect=200)
        marked(s, boxes[-1])
        end(s, *boxes, kid)
        drop(s, last["id"], *reversed(snaps))
    finally:
        s.close()


@harness.deadline(90)
def test_past_the_cap(s):
    """A fork of a command that has written more than is kept goes on counting where the source was"""
    box = warm(s)
    c = s.background(box, "head -c 70000000 /dev/zero; while :; do echo x; sleep 0.1; done", timeout_seconds=600)
    count = lambda b, i: s.get(f"{BOX}/{b}/commands/{i}").json["stdout_bytes"]  # noqa: E731
    harness.until(lambda: count(box, c) > 70_000_000, 60, "more than is kept")
    kid = fork(s, box, 1)["items"][0]["id"]
    [go] = [x["command_id"] for x in s.get(f"{BOX}/{kid}/commands").json["items"]]
    at = count(kid, go)
    assert at >= 70_000_000, at
    harness.until(lambda: count(kid, go) > at and count(box, c) > at, 10, "both go on")
    end(s, box, kid)


if __name__ == "__main__":
    harness.main()
