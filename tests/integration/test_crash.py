"""The server's end at every stage that `airlock doctor --stages` lists, and what the next start makes of it: the table of
docs/restart.md, row by row. A test build (-DAIRLOCK_CRASH_POINTS=ON) is made in build-crash; it ends itself by SIGKILL.

One state directory is led through all of it, from end to end. After each: the operation is finished or undone and its job and
receipt say which, what ran runs on with its files, memory and output, nothing is left over, and the same Idempotency-Key
gives what the table says.
"""
import contextlib
import functools
import http.client
import itertools
import os
import signal
import subprocess
import time

import harness
from saved import BOX, KEEP, LIFE, SNAP, goes_on, lines, marked

KEYS, TEMPLATED = itertools.count(1), set()
BUILD = os.path.join(harness.TOP, "build-crash")
SMALL = {"vcpus": 1, "memory_mib": 128, "disk_mib": 64}
NEW = {"image": "debian", "lifecycle": LIFE, "resources": SMALL}
COUNT = ["bash", "-c", "n=0; while :; do echo $((++n)); read -t 0.05; done"]  # its stdin stays open and empty
MARK = "head -c 300000 /dev/urandom > /dev/shm/x; head -c 100000 /dev/urandom > /work/x; sha256sum /dev/shm/x /work/x > /work/sums"
# What goes through which stages: (operation, the only ones it is led through again or None for all, the ones it has not).
# None twice: a new stage of the operation is met, or the test fails.
PATHS = {
    "template": ("create", None, ("claim",)),
    "boot": ("create", ("journal", "agent"), ()),
    "restore": ("create", None, ("claim",)),
    "pool": ("create", ("journal", "claim", "agent", "commit"), ()),
    "parked": ("create", ("claim", "restore", "agent"), ()),
    "start": ("start", None, ()),
    "stop": ("stop", None, ()),
    "delete": ("delete", None, ()),
    "pause": ("pause", None, ()),
    "resume": ("resume", ("resume", "commit", "end"), ()),
    "snapshot": ("snapshot", None, ()),
    "snapshot of a paused one": ("snapshot", ("save", "commit"), ()),
    "snapshot and stop": ("snapshot", ("cont", "write", "commit", "end"), ()),
    "snapshot's delete": ("snapshot_delete", None, ()),
    "fork": ("fork", None, ()),
    "fork of a paused one": ("fork", ("copy",), ()),
    "fork of a snapshot": ("fork", ("prepare", "agent", "end"), ()),
    "cold": ("cold", None, ()),
    "cold of a paused one": ("cold", ("write", "end"), ()),
    "wake": ("resume", None, ("resume",)),
    "a template in the making": ("template", None, ()),
}
# Where the next server ends as well, while it makes up for the first end.
THEN = {
    "template": {"launch": "adopt.settle", "agent": "create.commit"},
    "start": {"launch": "adopt.settle"},
    "stop": {"shutdown": "adopt.settle"},
    "delete": {"erase": "delete.commit"},
    "fork": {"agent": "adopt.settle"},
    "wake": {"launch": "adopt.settle", "agent": "resume.commit"},
}


@functools.cache
def binary():
    """A build that honours AIRLOCK_CRASH_AT, as new as the sources."""
    steps = [["cmake", "--build", BUILD, "--target", "airlock"]]
    if not os.path.exists(os.path.join(BUILD, "build.ninja")):
        steps.insert(0, ["cmake", "-S", harness.TOP, "-B", BUILD, "-G", "Ninja", "-DAIRLOCK_CRASH_POINTS=ON"])
    for step in steps:
        p = subprocess.run(step, capture_output=True, text=True)
        assert p.returncode == 0, [line for line in (p.stdout + p.stderr).splitlines() if "rror" in line][-5:]
    return os.path.join(BUILD, "airlock")


@functools.cache
def listed():
    p = subprocess.run([binary(), "doctor", "--stages"], capture_output=True, text=True)
    assert p.returncode == 0 and not p.stderr, p
    return p.stdout.split()


def stages(path):
    """[(stage, the second server's or None)]"""
    operation, only, but = PATHS[path]
    have = [at.partition(".")[2] for at in listed() if at.partition(".")[0] == operation]
    assert set(only or ()) | set(but) <= set(have), (path, have)
    mine = [at for at in have if (only is None or at in only) and at not in but]
    return [(at, None) for at in mine] + list(THEN.get(path, {}).items())


def server(name):
    return harness.Server(name, binary=binary())


def gone_files(pid, state):
    """Deleted files of the state directory that a process holds: their blocks are not free."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if link.startswith(state) and link.endswith(" (deleted)"):
            found.append(link)
    return found


class World:
    """The state directory, and what is known of it."""

    def __init__(self, s):
        self.s, self.names = s, set()

    def key(self):
        return {"Idempotency-Key": f"crash-{next(KEYS)}"}

    def items(self, path):
        """A list's first page, newest first; checked against the document elsewhere."""
        return self.s.get(path + ("&" if "?" in path else "?") + "limit=200", expect=200, check=False).json["items"]

    def note(self):
        """Every name that a QEMU of this state directory may have."""
        self.names |= set(os.listdir(os.path.join(self.s.state, "run"))) | set(os.listdir(os.path.join(self.s.state, "sandboxes")))
        return True

    def jobs(self):
        return {j["id"]: j for j in self.items("/v1/jobs")}

    def boxes(self):
        return {i["id"]: i for i in self.items(BOX)}

    def dead(self):
        return {i["id"]: i for i in self.items(f"{BOX}?state=destroyed")}

    def serve(self, *args):
        """A new server with these flags."""
        self.note()
        self.s.kill()
        self.s.args = list(args)
        self.again()

    def arm(self, at):
        """A new server that will end there."""
        self.s.kill()
        self.s.env = {"AIRLOCK_CRASH_AT": at}
        self.s.start()

    def dies(self, at):
        assert self.s.process.wait(30) == -signal.SIGKILL, self.s.process.returncode
        assert f"ends at {at}" in self.s.log_tail(), self.s.log_tail()
        self.note()

    def again(self):
        self.s.env = {}
        self.s.start()

    def crash(self, at, then, method, path, body=None, headers=None, armed=False):
        """The server ends at this stage of the request, and the next one at `then` where there is one; now there is another."""
        if not armed:
            self.arm(at)
        try:
            answer = self.s.req(method, path, body, headers=headers)
        except (ConnectionError, http.client.HTTPException):
            answer = None
        assert answer is None, f"it was not reached: {answer}"
        self.dies(at)
        if then:
            self.s.env = {"AIRLOCK_CRASH_AT": then}
            self.s.spawn()
            self.dies(then)
        self.again()

    # ---- what must be so afterwards
    def settled(self):
        """Every job has ended and no receipt is pending, but those of commands that run."""
        def look():
            run = {c["receipt_id"] for b in self.boxes() for c in self.items(f"{BOX}/{b}/commands") if c["state"] == "running"}
            jobs = [j for j in self.jobs().values() if j["state"] in ("queued", "running") and j["receipt_id"] not in run]
            self.left = jobs, [r for r in self.items("/v1/receipts") if r["state"] == "pending" and r["id"] not in run]
            return not any(self.left)
        try:
            harness.until(look, 20, "every job and receipt ends")
        except AssertionError as e:
            raise AssertionError(f"{e}: {self.left}") from None

    def ended(self, before, kind, done, code=None):
        """The job of the operation that was cut, told as what was made of it."""
        self.settled()
        jobs = [j for i, j in self.jobs().items() if i not in before and j["kind"] == kind]
        assert jobs, f"no job of {kind}"
        job = min(jobs, key=lambda j: j["id"])
        receipt = self.s.get(f"/v1/receipts/{job['receipt_id']}", expect=200).json
        got = job["state"], receipt["outcome"], (job["problem"] or {}).get("code")
        assert got == (("succeeded", "succeeded", None) if done else ("failed", "undone", code)), got
        return job

    def cut(self, verb, at, then, box, done):
        """One of a sandbox's verbs, cut at this stage; its job says whether it was done. Returns the key it was asked with."""
        key, before = self.key(), self.jobs()
        self.crash(f"{verb}.{at}", then, "POST", f"{BOX}/{box}/{verb}", headers=key)
        self.ended(before, f"sandbox.{verb}", done, f"{verb}_undone")
        return key

    def clean(self):
        """Processes, run/, sandboxes/, snapshots/, templates/, pool/ hold what belongs to somebody, and the chain verifies."""
        s, state = self.s, self.s.state
        pools = any("pool" in a for a in s.args)
        self.settled()
        self.note()
        boxes = {i["id"]: i["state"] for i in s.get(f"{BOX}?limit=200", expect=200).json["items"]}
        assert set(boxes.values()) <= {"running", "paused", "cold", "stopped"}, boxes
        ls = {d: set(os.listdir(os.path.join(state, d))) for d in ("run", "sandboxes", "snapshots", "templates", "pool")}
        assert pools or not ls["pool"], ls["pool"]
        up = [b for b, at in boxes.items() if at in ("running", "paused")]
        vms = {}
        for words in harness.vm_pids(self.names - ls["pool"]).values():
            vms.setdefault(words[words.index("-name") + 1], []).append(os.path.basename(words[0]))
        assert len(vms) == len(up), f"{vms} but {boxes}"
        assert all(len([w for w in vm if "qemu" in w]) == 1 for vm in vms.values()), vms
        for pid, (folder, name) in harness.disks(state).items():
            if folder == "sandboxes" and boxes.get(name) == "running":
                harness.until(lambda p=pid: not gone_files(p, state), 10, f"QEMU lets go of what was cut: {gone_files(pid, state)}")
        assert ls["run"] - ls["pool"] - {"probe"} == set(boxes), (ls["run"], boxes)
        assert set(boxes) <= ls["sandboxes"], (ls["sandboxes"], boxes)
        for box in ls["sandboxes"]:
            has = set(os.listdir(os.path.join(state, "sandboxes", box)))
            may = {"log", "out"} | ({"disk.raw", "base.runs"} if box in boxes else set()) | ({"cold"} if boxes.get(box) == "cold" else set())
            must = {"disk.raw"} if box in boxes else set()
            assert must <= has <= may, f"sandboxes/{box} ({boxes.get(box)}) has {has}"
        snaps = {i["id"]: i for i in s.get(f"{SNAP}?limit=500", expect=200).json["items"]}
        assert set(snaps) == ls["snapshots"] and all(i["state"] == "ready" for i in snaps.values()), (snaps, ls["snapshots"])
        for snap in snaps:
            verdict = s.get(f"{SNAP}/{snap}/compat", expect=200).json
            assert verdict["compatible"] and not verdict["mismatches"], verdict
        assert not [t for t in ls["templates"] if t.startswith(".")], ls["templates"]
        p = subprocess.run([binary(), "verify", "--state-dir", state], capture_output=True, text=True)
        assert p.returncode == 0, p.stdout + p.stderr

    def end(self, *boxes):
        for box in boxes:
            self.s.delete(f"{BOX}/{box}", expect=200)

    def drop(self, *snaps):
        for snap in snaps:
            self.s.delete(f"{SNAP}/{snap}", expect=200)


@contextlib.contextmanager
def world(s):
    w = World(s)
    try:
        yield w
        if s.args:
            w.serve()
        w.clean()
        assert not w.boxes() and not os.listdir(os.path.join(s.state, "snapshots"))
    except BaseException:
        s.process.kill()  # the next test gets a state directory of its own
        s.process.wait()
        raise


@contextlib.contextmanager
def stage(w, path, at, then=None):
    """Says where it was in what fails."""
    began, at = time.monotonic(), f"{at}, {then}" if then else at
    try:
        yield
    except Exception as e:
        raise AssertionError(f"{path}, {at}: {type(e).__name__}: {str(e)[:1200]}; the server: {w.s.log_tail(3)[:600]}") from e
    if os.environ.get("VERBOSE"):
        print(f"#   {path}, {at}: {time.monotonic() - began:.2f} s", flush=True)


def templated(w):
    """The first create of its kind boots and has a template made beside it."""
    if w.s.state in TEMPLATED:
        return
    folder = os.path.join(w.s.state, "templates")
    had = len(os.listdir(folder))
    w.end(w.s.create(resources=SMALL)["id"])
    harness.until(lambda: len([t for t in os.listdir(folder) if not t.startswith(".")]) > had, 60, "the template is made")
    harness.until(lambda: not os.listdir(os.path.join(w.s.state, "run")), 20, "its VM has ended")
    TEMPLATED.add(w.s.state)


def source(w):
    """A sandbox with a pattern on its disk and in its memory, and a command that counts."""
    box = w.s.create(resources=SMALL)["id"]
    w.s.run(box, MARK + "; head -c 6000000 /dev/urandom > /work/much; sync")  # that is copied after the pause
    command = w.s.background(box, COUNT, timeout_seconds=3600)
    goes_on(w.s, box, command)
    return box, command


def whole(w, box, command=None):
    """It runs, with all that it had; its command goes on without a gap."""
    assert w.s.get(f"{BOX}/{box}").json["state"] == "running"
    if command is None:
        command = counter(w, box)
    marked(w.s, box)
    goes_on(w.s, box, command)


def counter(w, box):
    [command] = [c["command_id"] for c in w.s.get(f"{BOX}/{box}/commands", expect=200).json["items"] if c["state"] == "running"]
    return command


def stands(w, box, command):
    """It is paused, and prints nothing while another sandbox lives its whole life."""
    assert w.s.get(f"{BOX}/{box}").json["state"] == "paused"
    had = lines(w.s, box, command)
    other = w.s.create(resources=SMALL)["id"]
    assert w.s.run(other, "sleep 0.3")["exit_code"] == 0
    w.end(other)
    assert lines(w.s, box, command) == had, "it ran while it was paused"
    assert w.s.get(f"{BOX}/{box}").json["state"] == "paused"


def verb(w, box, name, expect="running", **kw):
    a = w.s.post(f"{BOX}/{box}/{name}", expect=200, **kw)
    assert a.json["state"] == expect, a
    return a


def replayed(a):
    return a.headers.get("Idempotent-Replayed") == "true"


def test_stages():
    """Every stage that the binary lists is on somebody's path"""
    met = {f"{PATHS[path][0]}.{at}" for path in PATHS for at, _ in stages(path)} | {at for two in THEN.values() for at in two.values()}
    assert met == set(listed()), met ^ set(listed())


# ---- create -----------------------------------------------------------------------------------------------------------
def creates(w, path, body, adopted, look=None, ready=None):
    """Leads a create through its stages; from those in `adopted` on its VM is taken over and it succeeds."""
    for at, then in stages(path):
        with stage(w, path, at, then):
            key, before, asked = w.key(), w.jobs(), {**body, "name": "made"}
            w.arm(f"create.{at}")
            if ready:
                ready()
            w.crash(f"create.{at}", then, "POST", BOX, asked, key, armed=True)
            done = at in adopted
            box = w.ended(before, "sandbox.create", done, "create_undone")["sandbox_id"]
            if not done:
                was = w.s.get(f"{BOX}/{box}", expect=200).json
                assert (was["state"], was["state_reason"]) == ("destroyed", "create_undone"), was
            a = w.s.post(BOX, asked, headers=key, expect=201)
            assert replayed(a) == done and (a.json["id"] == box) == done, a
            assert w.s.run(a.json["id"], "true")["exit_code"] == 0
            if look:
                look(a.json)
            w.clean()
            w.end(a.json["id"])


def unique(box):
    u = box["uniqueness"]
    assert u and all(u[k] for k in ("entropy", "clock", "hostname", "machine_id", "boot_id")), u


@harness.deadline(120)
def test_create_from_template(s):
    """create from a template: undone before `agent`, then adopted"""
    with world(s) as w:
        templated(w)
        creates(w, "template", NEW, ("agent", "commit", "end"), unique)


@harness.deadline(120)
def test_create_by_boot_start_stop(s):
    """create by a boot, start and stop: undone while no row knows of the VM, then adopted; a stop is finished"""
    with world(s) as w:
        w.serve("--templates", "off")
        creates(w, "boot", NEW, ("agent", "commit", "end"))
        box = s.create(resources=SMALL)["id"]
        s.run(box, "head -c 300000 /dev/urandom > /work/x; sha256sum /work/x > /work/sums")
        verb(w, box, "stop", "stopped")
        for at, then in stages("start"):
            with stage(w, "start", at, then):
                done = at in ("agent", "commit", "end")
                key = w.cut("start", at, then, box, done)
                was = s.get(f"{BOX}/{box}").json
                assert (was["state"], was["state_reason"]) == (("running", None) if done else ("stopped", "start_undone")), was
                w.clean()
                assert replayed(verb(w, box, "start", headers=key)) == done
                marked(s, box)
                w.clean()
                verb(w, box, "stop", "stopped")
        for at, then in stages("stop"):
            with stage(w, "stop", at, then):
                verb(w, box, "start")
                command = s.background(box, "sleep 100")
                key, before = w.key(), w.jobs()
                w.crash(f"stop.{at}", then, "POST", f"{BOX}/{box}/stop", headers=key)
                w.ended(before, "sandbox.stop", True)
                assert replayed(verb(w, box, "stop", "stopped", headers=key))
                assert s.get(f"{BOX}/{box}/commands/{command}").json["outcome"] == "killed"
                w.clean()
        verb(w, box, "start")
        marked(s, box)
        w.end(box)


@harness.deadline(120)
def test_create_from_pool(s):
    """create from the pool: undone until a row knows of the VM, then adopted under its pooled name"""
    with world(s) as w:
        w.serve("--pool", "1")

        def full():
            harness.until(lambda: "airlock_pool_ready 1" in w.s.get("/metrics").body.decode() and w.note(), 60, "the pool is full")
        creates(w, "pool", {"image": "debian", "lifecycle": LIFE}, ("claim", "agent", "commit", "end"), unique, full)


@harness.deadline(120)
def test_create_from_parked(s):
    """create from a parked VM: undone before `agent`, then adopted"""
    with world(s) as w:
        w.serve("--pool-parked", "1")

        def full():
            harness.until(lambda: "airlock_pool_parked 1" in w.s.get("/metrics").body.decode() and w.note(), 60, "the pool is full")
        creates(w, "parked", {"image": "debian", "lifecycle": LIFE}, ("agent",), unique, full)


@harness.deadline(120)
def test_restore_and_fork_of_snapshot(s):
    """create from a snapshot and fork of one: undone before `agent` and before the commit; the pattern and the command go on"""
    with world(s) as w:
        templated(w)
        box, command = source(w)
        snap = s.post(f"{BOX}/{box}/snapshots", KEEP, expect=201).json["id"]
        w.end(box)
        body = {"snapshot_id": snap, "lifecycle": LIFE}

        def look(made):
            unique(made)
            whole(w, made["id"])
        creates(w, "restore", body, ("agent", "commit", "end"), look)
        forks(w, "fork of a snapshot", f"{SNAP}/{snap}/fork", {"count": 2, "lifecycle": LIFE}, "snapshot.fork")
        w.drop(snap)


@harness.deadline(90)
def test_template_in_the_making(s):
    """a template in the making: its VM is ended and its files are removed; the create beside it is there"""
    with world(s) as w:
        for n, (at, _) in enumerate(stages("a template in the making")):
            with stage(w, "a template in the making", at):
                body = {**NEW, "resources": {**SMALL, "disk_mib": 80 + n}}  # of a kind of its own
                key = w.key()
                w.arm(f"template.{at}")
                with contextlib.suppress(ConnectionError, http.client.HTTPException):
                    s.post(BOX, body, headers=key)
                w.dies(f"template.{at}")
                w.again()
                w.clean()
                assert s.run(s.post(BOX, body, headers=key, expect=201).json["id"], "true")["exit_code"] == 0
                w.end(*w.boxes())
        harness.until(lambda: s.post(BOX, body, expect=201).json["backend"]["boot_path"] == "template", 60, "it is made again")
        w.end(*w.boxes())
        harness.until(lambda: not os.listdir(os.path.join(s.state, "run")), 20, "no VM is left")


# ---- fork -------------------------------------------------------------------------------------------------------------
def forks(w, path, url, body, kind, look=lambda: None):
    s = w.s
    for at, then in stages(path):
        with stage(w, path, at, then):
            key, before, done = w.key(), w.jobs(), at == "end"
            dead, had = set(w.dead()), set(w.boxes())
            w.crash(f"fork.{at}", then, "POST", url, body, key)
            w.ended(before, kind, done, "fork_undone")
            look()
            left = set(w.boxes()) - had
            assert len(left) == (2 if done else 0), left
            if not done:
                undone = [i["state_reason"] for n, i in w.dead().items() if n not in dead]
                assert len([u for u in undone if u in ("fork_undone", "create_undone")]) == 2, undone
            a = s.post(url, body, headers=key, expect=201)
            kids = {i["id"] for i in a.json["items"]}
            assert replayed(a) == done and len(kids) == 2 and (kids == left) == done, a
            for i in a.json["items"][:2 if done else 1]:
                unique(i)
                whole(w, i["id"])
            look()
            w.clean()
            w.end(*kids)


@harness.deadline(150)
def test_fork(s):
    """fork: undone before its commit, all children end and the source goes on; after it all are there"""
    with world(s) as w:
        templated(w)
        box, command = source(w)
        url = f"{BOX}/{box}/fork"
        forks(w, "fork", url, {"count": 2}, "sandbox.fork", lambda: whole(w, box, command))
        verb(w, box, "pause", "paused")
        forks(w, "fork of a paused one", url, {"count": 2}, "sandbox.fork", lambda: stands(w, box, command))
        verb(w, box, "resume")
        whole(w, box, command)
        w.end(box)


# ---- snapshot ---------------------------------------------------------------------------------------------------------
def restored(w, snap):
    """A snapshot restores: pattern and command are there. Returns the sandbox."""
    made = w.s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE}, expect=201).json["id"]
    whole(w, made)
    return made


def snapshots(w, path, box, body, look):
    """Leads snapshots through their stages; look(snapshot or None) after the end and after the retry."""
    s = w.s
    for at, then in stages(path):
        with stage(w, path, at, then):
            key, before, done = w.key(), w.jobs(), at == "end"
            w.crash(f"snapshot.{at}", then, "POST", f"{BOX}/{box}/snapshots", body, key)
            w.ended(before, "snapshot.create", done, "snapshot_undone")
            there = [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}").json["items"]]
            assert len(there) == done, there
            look(done)
            w.clean()
            a = s.post(f"{BOX}/{box}/snapshots", body, headers=key, expect=201)
            snap = a.json["id"]
            assert replayed(a) == done and there in ([], [snap]), a
            look(True)
            made = restored(w, snap)
            w.clean()
            w.drop(snap)
            if not body.get("stop"):
                w.end(made)
                continue
            w.end(box)  # what was stopped lives on in its snapshot
            box = made
    return box


@harness.deadline(150)
def test_snapshot(s):
    """snapshot, of one that runs, is paused or is to stop: undone before its commit, there after it"""
    with world(s) as w:
        templated(w)
        box, command = source(w)
        snapshots(w, "snapshot", box, KEEP, lambda taken: whole(w, box, command))
        verb(w, box, "pause", "paused")
        snapshots(w, "snapshot of a paused one", box, KEEP, lambda taken: stands(w, box, command))
        verb(w, box, "resume")
        whole(w, box, command)
        w.end(box)


@harness.deadline(120)
def test_snapshot_and_stop(s):
    """snapshot with stop: the source goes on before the commit, and is stopped after it"""
    with world(s) as w:
        templated(w)
        box, _ = source(w)

        def look(taken):
            [at] = w.boxes().values()
            if not taken:
                whole(w, at["id"])
                return
            assert (at["state"], at["state_reason"]) == ("stopped", "snapshot"), at
            assert {c["outcome"] for c in w.s.get(f"{BOX}/{at['id']}/commands").json["items"] if c["outcome"] != "exited"} == {"killed"}
        box = snapshots(w, "snapshot and stop", box, {**KEEP, "stop": True}, look)
        whole(w, box)
        w.end(box)


@harness.deadline(90)
def test_deletes(s):
    """delete of a sandbox and of a snapshot: finished, and told so"""
    with world(s) as w:
        templated(w)
        for at, then in stages("delete"):
            with stage(w, "delete", at, then):
                box = s.create(resources=SMALL)["id"]
                before = w.jobs()
                w.crash(f"delete.{at}", then, "DELETE", f"{BOX}/{box}")
                w.ended(before, "sandbox.delete", True)
                assert s.get(f"{BOX}/{box}").json["state"] == "destroyed"
                assert not s.delete(f"{BOX}/{box}", expect=200).json["failed"]
                w.clean()
        box = s.create(resources=SMALL)["id"]
        for at, then in stages("snapshot's delete"):
            with stage(w, "snapshot's delete", at, then):
                snap = s.post(f"{BOX}/{box}/snapshots", KEEP, expect=201).json["id"]
                w.crash(f"snapshot_delete.{at}", then, "DELETE", f"{SNAP}/{snap}")
                w.settled()
                newest = next(r for r in w.items("/v1/receipts") if r["operation"] == "snapshot.delete")
                assert newest["outcome"] == "succeeded", newest
                a = s.get(f"{SNAP}/{snap}", expect=200).json
                assert (a["state"], a["state_reason"]) == ("deleted", "deleted"), a
                assert not s.delete(f"{SNAP}/{snap}", expect=200).json["failed"]
                w.clean()
        w.end(box)


# ---- pause, cold, and back --------------------------------------------------------------------------------------------
@harness.deadline(120)
def test_pause_and_resume(s):
    """pause and resume: what is running is let go on, what is paused stands still"""
    with world(s) as w:
        templated(w)
        box, command = source(w)
        for at, then in stages("pause"):
            with stage(w, "pause", at, then):
                done = at == "end"
                key = w.cut("pause", at, then, box, done)
                stands(w, box, command) if done else whole(w, box, command)
                assert replayed(verb(w, box, "pause", "paused", headers=key)) == done
                stands(w, box, command)
                w.clean()
                verb(w, box, "resume")
        for at, then in stages("resume"):
            with stage(w, "resume", at, then):
                verb(w, box, "pause", "paused")
                done = at == "end"
                key = w.cut("resume", at, then, box, done)
                whole(w, box, command) if done else stands(w, box, command)
                assert replayed(verb(w, box, "resume", headers=key)) == done
                whole(w, box, command)
                w.clean()
        w.end(box)


@harness.deadline(150)
def test_cold_and_back(s):
    """cold and the resume of it: undone before the commit and before `agent`, finished after; the command goes on"""
    with world(s) as w:
        templated(w)
        box, command = source(w)
        for path in ("cold", "cold of a paused one"):
            for at, then in stages(path):
                with stage(w, path, at, then):
                    paused = path != "cold"
                    if paused:
                        verb(w, box, "pause", "paused")
                    done = at == "end"
                    key = w.cut("cold", at, then, box, done)
                    if not done:
                        stands(w, box, command) if paused else whole(w, box, command)
                    w.clean()
                    assert replayed(verb(w, box, "cold", "cold", headers=key)) == done
                    w.clean()
                    verb(w, box, "resume")
                    whole(w, box, command)
        for at, then in stages("wake"):
            with stage(w, "wake", at, then):
                verb(w, box, "cold", "cold")
                done = at in ("agent", "commit", "end")
                key = w.cut("resume", at, then, box, done)
                if done:
                    whole(w, box, command)
                else:
                    assert w.s.get(f"{BOX}/{box}").json["state"] == "cold"
                w.clean()
                a = verb(w, box, "resume", headers=key)
                assert replayed(a) == done and all(a.json["uniqueness"][k] for k in ("entropy", "clock", "boot_id")), a
                whole(w, box, command)
        w.clean()
        w.end(box)


@harness.deadline(120)
def test_one_uid_one_jail(s):
    """A row that still names the uid of a VM that is gone does not free it for a second jail: it is another's since"""
    if os.geteuid() != 0:
        raise harness.Skip("jails have uids of their own where the server is root")

    def uid(box):
        return os.stat(f"/proc/{harness.qemu_pid(box)}").st_uid
    with world(s) as w:
        templated(w)
        w.serve("--pool", "0", "--templates", "off")
        old, _ = source(w)
        w.s.post(f"{BOX}/{old}/snapshots", {**KEEP, "stop": True}, expect=201)
        first = w.s.create(resources=SMALL)["id"]
        w.arm("start.launch")
        w.crash("start.launch", None, "POST", f"{BOX}/{old}/start", armed=True)
        second = w.s.create(resources=SMALL)["id"]
        assert uid(first) != uid(second), f"{uid(first)} twice"
        w.s.delete(f"{SNAP}/{w.items(SNAP)[0]['id']}", expect=200)
        w.end(first, second, old)


if __name__ == "__main__":
    harness.main()
