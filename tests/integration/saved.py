"""What the tests of saved and forked sandboxes share: asking for one, and what must be so of it."""
import http.client
import os
import select
import threading
import time

import harness

BOX = "/v1/sandboxes"
SNAP = "/v1/snapshots"
LIFE = {"ttl_seconds": 1800, "on_expiry": "destroy"}
KEEP = {"retention": {"keep": True}}
COUNT = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"
# A pattern in the guest's memory, a file on its disk, and their digest.
MARK = "head -c 3000000 /dev/urandom > /dev/shm/x; head -c 300000 /dev/urandom > /work/x; sha256sum /dev/shm/x /work/x > /work/sums"
WHO = ("cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; hostname; head -c 32 /dev/urandom | sha256sum; "
       "cat /proc/sys/kernel/random/uuid")
WHO_WORDS = ("machine_id", "boot_id", "hostname", "urandom", "uuid")



def snapshot(s, box, expect=201, headers=None, **fields):
    return s.post(f"{BOX}/{box}/snapshots", {**KEEP, **fields}, expect=expect, headers=headers).json


def restore(s, snap, expect=201, **fields):
    return s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE, **fields}, expect=expect).json


def fork(s, box, count, expect=201, headers=None, **fields):
    return s.post(f"{BOX}/{box}/fork", {"count": count, **fields}, expect=expect, headers=headers).json


def end(s, *boxes):
    for box in boxes:
        s.delete(f"{BOX}/{box}", expect=200)


def drop(s, *snaps):
    for snap in snaps:
        s.delete(f"{SNAP}/{snap}", expect=200)


def who(s, box):
    words = dict(zip(WHO_WORDS, s.run(box, WHO)["stdout"].replace("  -", "").split("\n")))
    assert all(words.values()) and len(words) == len(WHO_WORDS), words
    return words


def differ(*all_of_them):
    """Every word of every one differs from that of every other."""
    for word in WHO_WORDS:
        got = [w[word] for w in all_of_them]
        assert len(set(got)) == len(got), f"{word} twice: {got}"


def unique(box):
    """The agent's evidence that it is one of its own."""
    u = box["uniqueness"]
    assert u and all(u[k] for k in ("entropy", "clock", "hostname", "machine_id", "boot_id")), u
    assert abs(u["clock_offset_ms"]) <= 2000, u
    return u["generation"]


def marked(s, box):
    r = s.run(box, "sha256sum -c --quiet /work/sums")
    assert r["exit_code"] == 0, r


def lines(s, box, command):
    """The counter's output so far: every number once, in order. Returns how many."""
    whole = s.output(box, command).rsplit(b"\n", 1)[0]
    got = [int(x) for x in whole.split(b"\n")] if whole else []
    wrong = next((i for i, n in enumerate(got) if n != i + 1), None)
    assert wrong is None, f"after {got[max(0, wrong - 2):wrong]} comes {got[wrong:wrong + 3]}"
    return len(got)


def goes_on(s, box, command):
    """The counter prints more than it had."""
    before = lines(s, box, command)
    harness.until(lambda: lines(s, box, command) > before + 2, 20, f"{command} goes on")


def hidden(s):
    """What a cut or failed operation would leave."""
    found = [f for f in os.listdir(os.path.join(s.state, "snapshots")) if f.startswith(".")]
    for box in os.listdir(os.path.join(s.state, "sandboxes")):
        try:
            found += [f"{box}/{f}" for f in os.listdir(os.path.join(s.state, "sandboxes", box)) if f.startswith(".")]
        except (NotADirectoryError, FileNotFoundError):
            pass
    return found


def live(s):
    return {i["id"] for i in s.get(f"{BOX}?limit=500").json["items"]}


def jobs_ended(s):
    kept = ("command.run", "command.continue")
    return not [j for j in s.get("/v1/jobs?limit=500").json["items"] if j["state"] in ("queued", "running") and j["kind"] not in kept]


def aside(fn, *args, **kw):
    """Runs a call beside; returns (thread, answers)."""
    answers = []

    def work():
        try:
            answers.append(fn(*args, **kw))
        except (ConnectionError, http.client.HTTPException, OSError) as e:
            answers.append(e)
    t = threading.Thread(target=work)
    t.start()
    return t, answers


def after(seconds):
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        select.select([], [], [], left)
