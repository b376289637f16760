"""Files, directories and archives: which paths are taken, what is written where, and what a cut transfer leaves."""
import hashlib
import io
import os
import socket
import tarfile
import threading
import urllib.parse

import harness


def stat(s, box, path, **query):
    return f"/v1/sandboxes/{box}/files/stat?" + urllib.parse.urlencode({"path": path, **query})


def dirs(s, box, path, **query):
    return f"/v1/sandboxes/{box}/dirs?" + urllib.parse.urlencode({"path": path, **query})


def test_round_trip(s, box):
    """What was written is read, with its digest; 201 is new, 200 replaced; empty files too"""
    path = s.file(box, "/work/a.bin")
    for data, status in ((os.urandom(3_000_000), 201), (b"", 200), (b"x", 200)):
        a = s.put(path, data, expect=status)
        assert a.json["bytes"] == len(data) and a.json["sha256"] == harness.sha256(data)
        assert s.get(path, expect=200).body == data


def test_stream_without_length(s, box):
    """An upload without a known length, in chunks"""
    parts = [os.urandom(n) for n in (1, 70_000, 5, 300_000)]
    a = s.put(s.file(box, "/work/chunked"), iter(parts), expect=201)
    assert a.json["sha256"] == harness.sha256(b"".join(parts))
    assert s.get(s.file(box, "/work/chunked")).body == b"".join(parts)


def test_ranges(s, box):
    """Range gives 206 with Content-Range; outside the file 416"""
    path = s.file(box, "/work/range")
    s.put(path, b"0123456789", expect=(200, 201))
    for value, body, where in (("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=7-", b"789", "bytes 7-9/10"),
                               ("bytes=-3", b"789", "bytes 7-9/10"), ("bytes=5-99", b"56789", "bytes 5-9/10")):
        a = s.get(path, headers={"Range": value}, expect=206)
        assert a.body == body and a.headers["Content-Range"] == where, (value, a, a.headers["Content-Range"])
    a = s.get(path, headers={"Range": "bytes=10-"}, expect=416)
    assert a.headers["Content-Range"] == "bytes */10"


def test_head_and_stat(s, box):
    """HEAD and stat tell size, kind, mode and owner"""
    s.put(s.file(box, "/work/mode", mode="0600"), b"12345", expect=(200, 201))
    a = s.req("HEAD", s.file(box, "/work/mode"), expect=200)
    assert a.headers["Content-Length"] == "5" and not a.body
    st = s.get(stat(s, box, "/work/mode"), expect=200).json
    assert (st["kind"], st["bytes"], st["mode"], st["uid"], st["owner"]) == ("file", 5, "0600", 1000, "sandbox"), st
    s.put(s.file(box, "/work/mode"), b"123", expect=200)
    assert s.get(stat(s, box, "/work/mode"), expect=200).json["mode"] == "0600", "a replaced file keeps its mode"
    s.put(s.file(box, "/work/plain"), b"1", expect=201)
    assert s.get(stat(s, box, "/work/plain"), expect=200).json["mode"] == "0644"
    assert s.get(stat(s, box, "/work"), expect=200).json["kind"] == "directory"
    assert s.get(stat(s, box, "/"), expect=200).json["kind"] == "directory"
    s.run(box, "ln -sf /etc/passwd /work/lnk")
    st = s.get(stat(s, box, "/work/lnk"), expect=200).json
    assert st["kind"] == "symlink" and st["target"] == "/etc/passwd", st
    assert s.req("HEAD", s.file(box, "/work/not-here")).status == 404
    assert s.get(stat(s, box, "/work/not-here")).status == 404


def test_exclusive(s, box):
    """If-None-Match: * writes only what is not there"""
    path = s.file(box, "/work/exclusive")
    s.put(path, b"first", headers={"If-None-Match": "*"}, expect=201)
    s.put(path, b"second", headers={"If-None-Match": "*"}, expect=412)
    assert s.get(path).body == b"first"


def test_mkdirs(s, box):
    """mkdirs makes the way; without it the way must be there"""
    s.put(s.file(box, "/work/m/k/d/file"), b"x", expect=404)
    s.put(s.file(box, "/work/m/k/d/file", mkdirs="true"), b"x", expect=201)
    assert s.get(stat(s, box, "/work/m/k")).json["uid"] == 1000


def test_bad_paths(s, box):
    """Dots, NUL, empty segments, relative paths and 4,097 bytes are path_invalid, in every encoding"""
    base = f"/v1/sandboxes/{box}/files?path="
    bad = ["work/x", "/work/../etc/passwd", "/work/./x", "/work//x", "/work/x/", "/..", "/work/%2e%2e/x", "/work/%2E./x",
           "%2fwork%2f..%2fx", "/work/a%00b", "/work/%00", "", "/" + "a" * 4096]
    for path in bad:
        for method, data in (("GET", None), ("PUT", b"x"), ("DELETE", None)):
            a = s.req(method, base + path, data=data)
            assert a.status == 422 and a.kind == "validation", (method, path, a)
            assert a.code == "path_invalid" or path == "", (method, path, a)
    a = s.put(base + "/work/" + "a" * 200 + ("/" + "b" * 200) * 19, b"x")
    assert a.status in (404, 422), a  # 4,026 bytes are a valid path: its directory is missing


def test_long_name(s, box):
    """A segment of 256 bytes is not a file name, and a valid path is not a reason to fall over"""
    a = s.put(s.file(box, "/work/" + "n" * 256), b"x")
    assert a.status in (404, 422), a
    s.put(s.file(box, "/work/" + "n" * 255), b"x", expect=201)


def test_odd_names(s, box):
    """Spaces, quotes, newlines and UTF-8 in names"""
    for name in ("a b", "q'\"q", "new\nline", "\u00e9\u4e16", "-rf", "%41", "+", "..x", "*"):
        path = s.file(box, "/work/odd/" + name, mkdirs="true")
        s.put(path, name.encode(), expect=201)
        assert s.get(s.file(box, "/work/odd/" + name)).body == name.encode()
    names = {e["name"] for e in s.get(dirs(s, box, "/work/odd"), expect=200).json["entries"]}
    assert "new\nline" in names and "%41" in names


def test_outside_roots(s, box):
    """Writes only below /work, /tmp and /home, after symlinks are resolved"""
    for path in ("/etc/x", "/x", "/usr/bin/x", "/proc/sys/kernel/hostname", "/sys/x", "/dev/x", "/workx/y", "/work"):
        for user in ("sandbox", "root"):
            a = s.put(s.file(box, path, user=user), b"x")
            assert a.status == 403 and a.code == "path_outside_roots" or path == "/work" and a.status in (403, 409, 422), (path, user, a)
    s.run(box, "ln -sfn /etc /work/etc; ln -sfn / /tmp/rootdir; ln -sf /etc/evil /work/dangling")
    for path in ("/work/etc/evil", "/tmp/rootdir/etc/evil", "/tmp/rootdir/evil"):
        a = s.put(s.file(box, path, user="root"), b"x", expect=403)
        # in a sticky directory the kernel itself does not follow another user's link (protected_symlinks)
        assert a.code in ("path_outside_roots", "permission_denied")[:1 + path.startswith("/tmp")], (path, a)
    a = s.put(s.file(box, "/work/dangling", user="root"), b"x")
    assert a.status in (200, 201, 403, 422), a
    assert s.run(box, "ls /etc/evil /evil", user="root")["exit_code"] != 0, "a write left the roots"
    a = s.delete(s.file(box, "/work/etc/passwd", user="root"), expect=403)
    assert a.code == "path_outside_roots", a
    s.put(s.file(box, "/tmp/fine"), b"x", expect=201)
    s.put(s.file(box, "/home/sandbox/fine"), b"x", expect=201)


def test_read_outside(s, box):
    """Reading follows the guest's own permissions"""
    assert b"sandbox:x:1000" in s.get(s.file(box, "/etc/passwd"), expect=200).body
    a = s.get(s.file(box, "/etc/shadow"), expect=403)
    assert (a.kind, a.code) == ("policy_denied", "permission_denied"), a
    s.get(s.file(box, "/etc/shadow", user="root"), expect=200)


def test_symlink_swap(s, box):
    """A directory swapped for a symlink during the calls never lets a write out"""
    s.run(box, "mkdir -p /work/swap/real /tmp/out; cp -a /work/swap/real /work/swap/d")
    c = s.background(box, "cd /work/swap; while [ ! -e stop ]; do rm -rf d; ln -s /etc d; rm -f d; mkdir d; done")
    seen = set()
    for n in range(60):
        seen.add(s.put(s.file(box, "/work/swap/d/f", user="root"), b"x").status)
    s.run(box, "touch /work/swap/stop")
    s.wait(box, c)
    assert s.run(box, ["test", "-e", "/etc/f"])["exit_code"] == 1, "a write went through a swapped link"
    assert seen <= {200, 201, 403, 404, 409, 422}, seen


def test_special(s, box):
    """FIFO, device, directory and socket are not_a_regular_file and block nothing"""
    s.run(box, "mkfifo /work/fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/work/sock\")'; mkdir /work/dir")
    for path in ("/work/fifo", "/work/sock", "/work/dir", "/dev/zero", "/dev/vda"):
        a = s.get(s.file(box, path, user="root"), timeout=20)
        assert a.status == 422 and a.code == "not_a_regular_file", (path, a)
    for path in ("/work/fifo", "/work/dir"):
        a = s.put(s.file(box, path), b"x", timeout=20)
        assert a.status == 422 and a.code == "not_a_regular_file", (path, a)


def test_proc(s, box):
    """A file of /proc, whose size is said to be 0, is read to its end"""
    a = s.get(s.file(box, "/proc/self/status"))
    assert a.status in (200, 422), a
    assert a.status == 422 or b"Name:" in a.body, a


def test_sparse(s, box):
    """A sparse file of 1 TiB: stat and a range of it"""
    r = s.run(box, "truncate -s 1T /work/sparse && printf end >> /work/sparse")
    if r["exit_code"] != 0:
        s.run(box, "truncate -s 15T /work/sparse")
        raise harness.Skip("the guest's filesystem holds no 1 TiB file")
    assert s.get(stat(s, box, "/work/sparse")).json["bytes"] == (1 << 40) + 3
    a = s.get(s.file(box, "/work/sparse"), headers={"Range": f"bytes={1 << 40}-"}, expect=206)
    assert a.body == b"end"
    s.run(box, "rm /work/sparse")


def cut_upload(s, box, path, sent, length):
    with socket.create_connection((s.host, s.port)) as c:
        c.sendall((f"PUT {s.file(box, path)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {s.token}\r\n"
                   f"Content-Length: {length}\r\n\r\n").encode() + sent)


def test_cut_upload(s, box):
    """An upload that is cut half-way leaves the old file, no rest of the new one, and a receipt that says aborted"""
    path = s.file(box, "/work/cut")
    s.put(path, b"old", expect=201)
    cut_upload(s, box, "/work/cut", b"n" * 1_000_000, 5_000_000)
    def aborted():
        return [r for r in s.get("/v1/receipts?limit=20").json["items"] if r["outcome"] == "aborted"]
    harness.until(aborted, 60, "a receipt with outcome aborted")
    assert s.get(path).body == b"old"
    names = s.run(box, ["ls", "-A", "/work"])["stdout"]
    assert not [n for n in names.split() if "cut" in n and n != "cut"], names


def test_cut_download(s, box):
    """A download that is cut ends as aborted, and the next one works"""
    s.run(box, "head -c 60000000 /dev/zero > /work/large")
    with socket.create_connection((s.host, s.port)) as c:
        c.sendall(f"GET {s.file(box, '/work/large')} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {s.token}\r\n\r\n".encode())
        c.recv(1000)
    harness.until(lambda: [r for r in s.get("/v1/receipts?limit=20").json["items"]
                           if r["operation"].endswith("read") and r["outcome"] == "aborted"
                           or r["outcome"] == "aborted" and "file" in r["operation"]], 60, "a receipt of the cut download")
    h = hashlib.sha256(s.get(s.file(box, "/work/large")).body).hexdigest()
    assert h == hashlib.sha256(bytes(60_000_000)).hexdigest()
    s.delete(s.file(box, "/work/large"), expect=200)


def test_two_writers(s, box):
    """Two writers at once: the file is one of the two, whole"""
    contents = [bytes([n]) * 2_000_000 for n in (1, 2)]
    def write(data):
        for _ in range(5):
            s.put(s.file(box, "/work/two"), data, expect=(200, 201))
    threads = [threading.Thread(target=write, args=(c,)) for c in contents]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert s.get(s.file(box, "/work/two")).body in contents


def test_move(s, box):
    """Move renames, refuses to overwrite unless asked, and stays inside the roots"""
    move = f"/v1/sandboxes/{box}/files/move"
    s.put(s.file(box, "/work/mv1"), b"1", expect=201)
    s.put(s.file(box, "/work/mv2"), b"2", expect=201)
    s.post(move, {"from": "/work/mv1", "to": "/work/mv2"}, expect=409)
    s.post(move, {"from": "/work/mv1", "to": "/work/mv2", "overwrite": True}, expect=200)
    assert s.get(s.file(box, "/work/mv2")).body == b"1"
    s.post(move, {"from": "/work/mv1", "to": "/work/mv3"}, expect=404)
    s.post(move, {"from": "/work/mv2", "to": "/work/new/dir/mv3"}, expect=404)
    s.post(move, {"from": "/work/mv2", "to": "/work/new/dir/mv3", "mkdirs": True}, expect=200)
    a = s.post(move, {"from": "/work/new/dir/mv3", "to": "/etc/mv3"}, expect=403)
    assert a.code == "path_outside_roots"


def test_delete(s, box):
    """DELETE of a file, of a directory only with recursive; a link, not what it names"""
    s.run(box, "mkdir -p /work/del/a/b; touch /work/del/a/b/c; ln -s /work/del/a /work/del/l; ln -s /tmp/kept-dir /work/del/m;"
               "mkdir -p /tmp/kept-dir; touch /tmp/kept-dir/f")
    s.delete(s.file(box, "/work/del/l"), expect=200)
    assert s.get(stat(s, box, "/work/del/a/b/c")).status == 200
    a = s.delete(s.file(box, "/work/del"))
    assert a.status in (409, 422), a
    a = s.delete(s.file(box, "/work/del", recursive="true"), expect=200)
    assert a.json["entries"] >= 4
    assert s.get(stat(s, box, "/work/del")).status == 404
    assert s.get(stat(s, box, "/tmp/kept-dir/f")).status == 200, "a recursive delete followed a link"
    s.delete(s.file(box, "/work/del"), expect=404)


def test_dirs(s, box):
    """Directories: made, listed to a depth, and cut at 4,096 entries with a flag"""
    make = f"/v1/sandboxes/{box}/dirs"
    s.post(make, {"path": "/work/tree"}, expect=201)
    s.post(make, {"path": "/work/tree"}, expect=(200, 409))
    s.post(make, {"path": "/work/tree/a/b", "mkdirs": True}, expect=201)
    s.put(s.file(box, "/work/tree/a/f"), b"123", expect=201)
    one = s.get(dirs(s, box, "/work/tree"), expect=200).json
    assert [e["name"] for e in one["entries"]] == ["a"] and not one["truncated"], one
    deep = s.get(dirs(s, box, "/work/tree", depth=3), expect=200).json
    assert {e["name"] for e in deep["entries"]} == {"a", "a/b", "a/f"}, deep
    s.run(box, "mkdir /work/many; cd /work/many; seq 5000 | xargs touch", check=True)
    many = s.get(dirs(s, box, "/work/many"), expect=200).json
    assert many["truncated"] and len(many["entries"]) == 4096
    assert s.get(dirs(s, box, "/work/tree/a/f")).status in (409, 422)
    s.get(dirs(s, box, "/work/none"), expect=404)


def test_archive(s, box):
    """A tar goes out and comes back the same: modes, links, names"""
    s.run(box, "mkdir -p /work/arc/d; cd /work/arc; printf one > d/one; chmod 755 d/one; ln -s d/one link; mkdir empty; head -c 500000 /dev/urandom > big",
          check=True)
    want = s.run(box, "cd /work/arc; find . | sort; sha256sum big d/one")["stdout"]
    path = f"/v1/sandboxes/{box}/archive?path="
    a = s.get(path + "/work/arc", expect=200)
    tar = tarfile.open(fileobj=io.BytesIO(a.body))
    names = {n.rstrip("/").removeprefix("./") for n in tar.getnames()}
    assert {"d/one", "link", "empty", "big"} <= {n.removeprefix("arc/") for n in names}, names
    s.put(path + "/work/back&mkdirs=true", a.body, expect=200)
    got = s.run(box, "cd /work/back; [ -d arc ] && cd arc; find . | sort; sha256sum big d/one; [ -x d/one ]; readlink link")["stdout"]
    assert got == want + "d/one\n", got


def test_archive_hostile(s, box):
    """Members that would leave the directory do not; a body that is no tar is refused"""
    out = io.BytesIO()
    tar = tarfile.open(fileobj=out, mode="w")
    for name in ("../escaped", "/tmp/absolute-member", "fine"):
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    tar.close()
    s.run(box, "mkdir -p /work/host/ile")
    s.put(f"/v1/sandboxes/{box}/archive?path=/work/host/ile", out.getvalue())
    for path in ("/work/host/escaped", "/tmp/absolute-member"):
        assert s.get(stat(s, box, path)).status == 404, path
    a = s.put(f"/v1/sandboxes/{box}/archive?path=/work/host/ile", b"this is no tar " * 100)
    assert a.status in (409, 422), a
    a = s.put(f"/v1/sandboxes/{box}/archive?path=/etc", out.getvalue())
    assert a.status == 403, a


def test_disk_full(s, box):
    """A guest disk that is full is told as such, leaves the old file, and the sandbox stays usable"""
    path = s.file(box, "/work/full")
    s.put(path, b"old", expect=201)
    s.run(box, "head -c 2000000000 /dev/zero > /work/fill", timeout_seconds=120)
    a = s.put(path, bytes(3_000_000))
    assert a.status in (409, 413, 422, 503), a
    assert s.get(path).body == b"old"
    s.run(box, "rm /work/fill")
    s.put(path, b"new", expect=200)


def test_refused_upload(s, box):
    """An upload that is refused at its headers still gets its answer, and the next request works"""
    a = s.put(s.file(box, "/etc/x", user="root"), bytes(4_000_000), expect=403)
    assert a.code == "path_outside_roots"
    s.put(s.file(box, "/work/../x"), bytes(4_000_000), expect=422)
    s.get(s.file(box, "/work/a.bin"))


if __name__ == "__main__":
    harness.main()
