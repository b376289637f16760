"""The host under the server: where its directories may lie, what happens when they are full, and what is left over."""
import contextlib
import http.client
import os
import shutil
import signal
import sqlite3
import stat as st
import subprocess
import tempfile
import threading
import time

import harness

BOX = "/v1/sandboxes"
LIFE = {"ttl_seconds": 1800, "on_expiry": "destroy"}


def tree(folder):
    return {os.path.relpath(os.path.join(d, n), folder): (s.st_size, s.st_mtime_ns, s.st_mode)
            for d, _, names in os.walk(folder) for n in names for s in [os.lstat(os.path.join(d, n))]}


@harness.deadline(150)
def test_private_directories():
    """State and images below a 0700 directory of root: a sandbox boots all the same"""
    top = tempfile.mkdtemp(prefix="airlock-private-")
    os.chmod(top, 0o700)
    images = os.path.join(top, "images")
    shutil.copytree(harness.IMAGES, images)
    for d, _, _ in os.walk(images):
        os.chmod(d, 0o700)
    s = harness.Server("test_host.private", state=os.path.join(top, "deep", "state"), images=images)
    try:
        s.start()
        box = s.create()["id"]
        assert s.run(box, ["python3", "-c", "print(1)"])["stdout"] == "1\n"
        s.delete(f"{BOX}/{box}", expect=200)
    finally:
        s.close()
        shutil.rmtree(top, ignore_errors=True)


@harness.deadline(200)
def test_shared_images():
    """Two servers on one image directory, which neither writes to"""
    before = tree(harness.IMAGES)
    servers = [harness.Server(f"test_host.shared{n}") for n in (1, 2)]
    try:
        boxes = [(s, s.start().create()["id"]) for s in servers]
        for s, box in boxes:
            assert s.run(box, ["true"])["exit_code"] == 0
            s.delete(f"{BOX}/{box}", expect=200)
    finally:
        [s.close() for s in servers]
    assert tree(harness.IMAGES) == before, "a server wrote to the image directory"


@harness.deadline(150)
def test_read_only_images():
    """An image directory on a read-only mount, with an empty state directory"""
    if os.geteuid() != 0:
        raise harness.Skip("only root can mount")
    mount = tempfile.mkdtemp(prefix="airlock-ro-")
    if subprocess.run(["mount", "--bind", harness.IMAGES, mount], capture_output=True).returncode != 0:
        os.rmdir(mount)
        raise harness.Skip("mounting is not allowed here")
    s = None
    try:
        if subprocess.run(["mount", "-o", "remount,bind,ro", mount], capture_output=True).returncode != 0:
            raise harness.Skip("a read-only bind mount is not allowed here")
        s = harness.Server("test_host.readonly", images=mount).start()
        box = s.create()["id"]
        assert s.run(box, ["true"])["exit_code"] == 0
    finally:
        if s:
            s.close()
        harness.until(lambda: subprocess.run(["umount", mount], capture_output=True).returncode == 0, 15, "nothing holds the mount")
        os.rmdir(mount)


@harness.deadline(240)
def test_disk_full():
    """The state's filesystem fills up: admission is refused, nothing acknowledged is dropped, and it recovers"""
    with harness.small_disk(400) as mount:
        s = harness.Server("test_host.full", state=os.path.join(mount, "state"), args=["--disk-reserve-mib", "64"])
        fill = os.path.join(mount, "fill")
        try:
            s.start()
            box = s.create(resources={"disk_mib": 64})["id"]
            kept = s.run(box, "seq 10000")
            # A command that writes more than is left, while the filesystem is full to the last byte.
            c = s.background(box, "seq 3000000; echo end >&2", timeout_seconds=120)
            harness.fill(fill)
            for method, path, body in (("POST", BOX, {"image": "debian", "lifecycle": LIFE}), ("POST", f"{BOX}/{box}/commands", {"argv": ["true"]})):
                a = s.req(method, path, body, expect=503)
                assert a.kind == "unavailable" and a.json["retryable"], a
            s.get(f"{BOX}/{box}", expect=200)
            assert s.output(box, kept["command_id"]) == b"".join(b"%d\n" % n for n in range(1, 10001))
            os.unlink(fill)
            r = s.wait(box, c, 90)
            assert r["outcome"] == "exited" and r["exit_code"] == 0, r
            assert s.output(box, c) == b"".join(b"%d\n" % n for n in range(1, 3000001)), "output was lost while the disk was full"
            harness.until(lambda: s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}).status == 200, 20, "admission is back")
            s.get(f"/v1/receipts/{r['receipt_id']}", expect=200)
            assert s.get("/v1/audit/verify", expect=200).json["verdict"] == "verified"
            s.delete(f"{BOX}/{box}", expect=200)
        finally:
            s.close()


@harness.deadline(120)
def test_disk_full_at_the_end():
    """What the full disk kept from being recorded is made up for: a ttl that passed, a delete, a VM's end"""
    with harness.small_disk(400) as mount:
        s = harness.Server("test_host.full_end", state=os.path.join(mount, "state"), args=["--disk-reserve-mib", "64"])
        fill = os.path.join(mount, "fill")
        try:
            s.start()
            small = {"disk_mib": 64, "memory_mib": 128}
            kept = s.create(resources=small)["id"]
            dead = s.create(resources=small)["id"]
            due = s.create(resources=small, lifecycle={"ttl_seconds": 600, "on_expiry": "destroy"})["id"]
            s.req("PATCH", f"{BOX}/{due}", {"lifecycle": {"ttl_seconds": 4}}, expect=200)
            harness.fill(fill)
            a = s.req("DELETE", f"{BOX}/{kept}", expect=(200, 503))  # 200 where the log of the database had room left
            assert a.status == 200 or (a.json["code"] == "disk_full" and a.json["retryable"]), a
            pid = harness.qemu_pid(dead)
            os.kill(pid, signal.SIGKILL)
            harness.until(lambda: not os.path.isdir(f"/proc/{pid}"), 10, "the VM's end")
            time.sleep(6)  # the ttl passes, and none of it can be recorded
            os.unlink(fill)
            harness.until(lambda: s.get(f"{BOX}/{due}").json["state"] == "destroyed", 20, "the ttl that passed")
            harness.until(lambda: s.get(f"{BOX}/{dead}").json["state"] == "failed", 20, "the VM's end is recorded")
            assert s.get(f"{BOX}/{dead}").json["state_reason"] == "vm_died"
            if a.status == 503:
                assert s.run(kept, "echo here")["stdout"] == "here\n", "a delete that was refused changed something"
                s.delete(f"{BOX}/{kept}", expect=200)
            s.delete(f"{BOX}/{dead}", expect=200)
            assert s.get("/v1/audit/verify", expect=200).json["verdict"] == "verified"
        finally:
            s.close()


@harness.deadline(200)
def test_nothing_left(s):
    """Create-run-delete cycles leave no process, descriptor, socket or run file"""
    def cycle():
        box = s.create()["id"]
        s.run(box, "sleep 60 & echo x")
        s.put(s.file(box, "/work/x"), b"x" * 100_000, expect=201)
        s.get(s.file(box, "/work/x"), expect=200)
        s.delete(f"{BOX}/{box}", expect=200)
        return box
    cycle()
    fds = lambda: len(os.listdir(f"/proc/{s.process.pid}/fd"))  # noqa: E731
    before = harness.until(fds, 1, "descriptors")
    boxes = [cycle() for _ in range(5)]
    harness.until(lambda: not harness.vm_pids(boxes), 10, "no process is left")
    harness.until(lambda: fds() <= before, 15, f"{fds()} descriptors, {before} before")
    run = os.path.join(s.state, "run")
    assert not os.path.isdir(run) or not os.listdir(run), os.listdir(run)
    with open("/proc/net/unix") as f:
        assert not [x for x in f if s.state in x]
    disks = [n for d, _, names in os.walk(os.path.join(s.state, "sandboxes")) for n in names if n.endswith(".raw")]
    assert not disks, disks


HANGS = r"""#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int n, char **words)
{
    if (n > 1 && strcmp(words[1], "--version") == 0)
        return puts("QEMU emulator version 7.2.99") < 0;
    for (;;)
        pause();
}
"""


@harness.deadline(60)
def test_probe_ends_with_the_server():
    """A probe of KVM that hangs is ended by the next start after kill -9 and by a stop; nothing is decided by its end"""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise harness.Skip("no /dev/kvm, so nothing is probed")
    top = tempfile.mkdtemp(prefix="airlock-hangs-")
    s = harness.Server("test_host.probe", args=["--qemu", os.path.join(top, "qemu")])
    run = os.path.join(s.state, "run")
    try:
        os.chmod(top, 0o755)
        subprocess.run(["cc", "-o", os.path.join(top, "qemu"), "-xc", "-"], input=HANGS, text=True, check=True)
        s.spawn()  # not until it is ready: a probe lasts ten seconds
        first = set(harness.until(lambda: len(s.probes()) >= 2 and s.probes(), 10, "a probe and its jail"))
        s.kill()
        assert first == set(s.probes()), "it lives on: that is what is mended here"
        s.start()
        harness.until(lambda: not any(map(harness.alive, first)), 10, "end of the old probe")
        harness.until(lambda: len(s.probes()) >= 2, 10, "a new one")
        answers = []

        def create():
            try:
                answers.append(s.post(BOX, {"image": "debian", "lifecycle": LIFE}).json["code"])
            except (ConnectionError, http.client.HTTPException):
                answers.append("stopping")  # it ended before it could say so
        waiting = threading.Thread(target=create)
        waiting.start()
        harness.until(lambda: "airlock_calls 2" in s.get("/metrics").body.decode() or not waiting.is_alive(), 10, "a create that waits")
        assert s.terminate() == 0
        waiting.join(10)
        assert answers == ["stopping"], answers
        with contextlib.closing(sqlite3.connect(os.path.join(s.state, "airlock.db"))) as db:
            assert db.execute("SELECT count(*) FROM sandboxes").fetchone() == (0,), "it was made without KVM"
        harness.until(lambda: not s.probes(), 5, "end of the new one")
        assert not os.listdir(run) and not os.path.exists(os.path.join(s.state, "accel.json"))
    finally:
        s.close()
        shutil.rmtree(top)


def test_close_on_exec(s, box):
    """QEMU has no descriptor of the server's that it was not given, and a session of its own"""
    pid = harness.qemu_pid(box)
    names = harness.fd_names(pid)
    for bad in ("airlock.db", "/token", "/keys", "/lock"):
        assert not [n for n in names if bad in n], (bad, names)
    assert os.getsid(pid) != os.getsid(s.process.pid)


def test_jail(s, box):
    """QEMU runs without the host's files, network and capabilities, under a user of its own where the server is root"""
    c = s.get("/v1/capabilities").json["jail"]
    if not c["bubblewrap"]["available"]:
        raise harness.Skip(c["bubblewrap"]["reason"])
    pid = harness.qemu_pid(box)
    with open(f"/proc/{pid}/status") as f:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    assert int(status["CapEff"], 16) == 0, status["CapEff"]
    assert status["Seccomp"] == "2", status["Seccomp"]
    for ns in ("net", "pid", "mnt", "user"):
        assert os.readlink(f"/proc/{pid}/ns/{ns}") != os.readlink("/proc/self/ns/" + ns), ns
    if os.geteuid() == 0 and c["uid_separation"]["available"]:
        assert status["Uid"].split("\t")[0] != "0", status["Uid"]
    assert not os.path.exists(f"/proc/{pid}/root/etc/shadow") and not os.path.exists(f"/proc/{pid}/root/root")


def test_private_files(s, box):
    """What the server writes is nobody else's to read"""
    assert st.S_IMODE(os.stat(s.state).st_mode) == 0o700
    for d, folders, names in os.walk(s.state):
        for n in names:
            mode = os.lstat(os.path.join(d, n)).st_mode
            assert n.endswith(".pub.pem") or not st.S_ISREG(mode) or not mode & 0o077, (n, oct(mode))


def run_serve(*args, env=None):
    with tempfile.TemporaryDirectory() as d:
        argv = [harness.BIN, "serve", "--state-dir", os.path.join(d, "s"), "--image-dir", harness.IMAGES, *args]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK_")}
        return subprocess.run(argv, env={**clean, **(env or {})}, capture_output=True, text=True, timeout=20)


def test_configuration():
    """An unknown key is an error that names it, in flags, environment and file; so is a public address without TLS"""
    for p, word in ((run_serve("--colour", "red"), "colour"), (run_serve(env={"AIRLOCK_COLOUR": "red"}), "AIRLOCK_COLOUR"),
                    (run_serve("--listen", "0.0.0.0:0"), "insecure"), (run_serve("--listen", "nonsense"), "listen"),
                    (run_serve("--http-threads", "0"), "http_threads"), (run_serve("--image-dir", "/nowhere/at/all"), "/nowhere/at/all")):
        assert p.returncode != 0 and word in p.stderr, (word, p.returncode, p.stderr)
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
        f.write("# a comment\nlisten = 127.0.0.1:0\nflavour = sour\n")
        f.flush()
        p = run_serve("--config", f.name)
        assert p.returncode != 0 and "flavour" in p.stderr and ":3" in p.stderr, p.stderr


def test_subcommands():
    """version, doctor and --help answer"""
    def airlock(*args):
        return subprocess.run([harness.BIN, *args], capture_output=True, text=True, timeout=60)
    assert airlock("version").returncode == 0 and airlock("version").stdout.strip()
    p = airlock("doctor")
    assert p.returncode in (0, 1) and "kvm" in (p.stdout + p.stderr).lower(), p
    assert airlock("serve", "--help").returncode == 0
    assert airlock("nonsense").returncode not in (0, -11, -6)


@harness.deadline(120)
def test_descriptor_limit():
    """With few descriptors the server says no, and goes on"""
    import socket
    s = harness.Server("test_host.emfile")
    argv = s.argv
    s.argv = lambda: ["prlimit", "--nofile=300:300", *argv()]
    try:
        s.spawn()
        s.wait_ready()
        many = []
        for _ in range(600):
            try:
                many.append(socket.create_connection((s.host, s.port), timeout=2))
            except OSError:
                break
        for c in many:
            c.close()
        harness.until(lambda: s.get("/healthz", timeout=5).status == 200, 30, "it answers again")
        assert s.process.poll() is None
    finally:
        s.close()


if __name__ == "__main__":
    harness.main()
