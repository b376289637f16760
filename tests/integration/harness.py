"""What the integration tests stand on: a server of their own, requests whose every answer is checked against
openapi/openapi.yaml, streams, deadlines, and a runner. No test sleeps: it waits for an event, or asks until a deadline.

    AIRLOCK_BIN      the server's binary (default build/airlock)
    AIRLOCK_IMAGES   a finished image directory (default var/images)
"""
import base64
import contextlib
import hashlib
import http.client
import inspect
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
import warnings

warnings.simplefilter("ignore")
sys.dont_write_bytecode = True
import jsonschema  # noqa: E402
import yaml  # noqa: E402

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
BIN = os.environ.get("AIRLOCK_BIN", os.path.join(TOP, "build/airlock"))
IMAGES = os.environ.get("AIRLOCK_IMAGES", os.path.join(TOP, "var/images"))
LOGS = os.path.join(TOP, "var/check/integration")


class Skip(Exception):
    """This host cannot show what the test is about; the message says why."""


# ---- the specification ------------------------------------------------------------------------------------------------
def _load_spec():
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(loader):
        pass

    Loader.yaml_implicit_resolvers = {
        k: [(t, r) for t, r in v if t != "tag:yaml.org,2002:timestamp"] for k, v in loader.yaml_implicit_resolvers.items()}
    with open(os.path.join(TOP, "openapi/openapi.yaml"), encoding="utf-8") as f:
        return yaml.load(f, Loader)


class Spec:
    def __init__(self):
        self.doc = _load_spec()
        self.resolver = jsonschema.RefResolver("", self.doc)
        self.validators = {}
        self.routes = []
        for path in self.doc["paths"]:
            pattern = re.compile("^" + re.sub(r"\{[^}]+\}", "[^/]+", path) + "$")
            self.routes.append((path.count("{"), pattern, path))
        self.routes.sort(key=lambda r: r[0])

    def resolve(self, node):
        while isinstance(node, dict) and "$ref" in node:
            target = self.doc
            for part in node["$ref"][2:].split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")]
            node = target
        return node

    def item(self, path):
        for _, pattern, template in self.routes:
            if pattern.match(path):
                return self.doc["paths"][template]
        return None

    def check(self, schema, value, what):
        key = id(schema)
        if key not in self.validators:
            self.validators[key] = jsonschema.Draft202012Validator(schema, resolver=self.resolver)
        fault = next(iter(self.validators[key].iter_errors(value)), None)
        assert fault is None, f"{what}: {fault.message[:300]} at /{'/'.join(map(str, fault.absolute_path))}"

    def schema(self, name):
        return {"$ref": f"#/components/schemas/{name}"}

    def problem(self, a, what):
        assert a.type == "application/problem+json", f"{what}: {a.status} with {a.type}: {a.body[:200]!r}"
        self.check(self.doc["components"]["schemas"]["Problem"], a.json, what)
        assert a.json["status"] == a.status, f"{what}: status {a.status} but the problem says {a.json['status']}"
        assert a.json["request_id"] == a.headers.get("X-Request-Id"), f"{what}: request_id is not X-Request-Id"
        assert a.json["type"] == "urn:airlock:problem:" + a.json["kind"], f"{what}: type {a.json['type']}"

    def answer(self, method, target, a):
        """Status, media type, headers and body of an answer are what the document says."""
        path = target.split("?")[0]
        what = f"{method} {path}"
        item = self.item(path)
        operation = (item or {}).get(method.lower())
        if operation is None:
            if method == "HEAD" and not a.body:
                assert a.status in (404, 405) or (item and "get" in item), f"{what}: {a.status}"
                return
            if method == "OPTIONS" and a.status in (200, 204):
                assert a.headers.get("Allow"), f"{what}: {a.status} without Allow"
                return
            assert a.status in (401, 404, 405), f"{what}: {a.status} for what is not in the document"
            if method != "HEAD":
                self.problem(a, what)
            if a.status == 405:
                assert a.headers.get("Allow"), f"{what}: 405 without Allow"
            return
        responses = operation["responses"]
        assert str(a.status) in responses, f"{what}: {a.status} is not documented: {a.body[:300]!r}"
        response = self.resolve(responses[str(a.status)])
        assert a.headers.get("X-Request-Id"), f"{what}: no X-Request-Id"
        if a.status < 400:
            for name in ("Airlock-Audit-Id", "Airlock-Receipt-Id"):
                if name in response.get("headers", {}):
                    assert a.headers.get(name), f"{what}: no {name}"
        if method == "HEAD":
            assert not a.body, f"{what}: a body"
            return
        content = response.get("content", {})
        if not content:
            assert not a.body, f"{what}: {a.status} has a body"
            return
        if a.status >= 400:
            self.problem(a, what)
        assert a.type in content or "*/*" in content, f"{what}: {a.status} is {a.type}, not {list(content)}"
        if a.type.endswith("json"):
            schema = content[a.type].get("schema")
            if schema:
                self.check(schema, a.json, f"{what} {a.status}")
            if a.status < 400 and isinstance(a.json, dict) and operation["x-airlock-evidence"] == "receipt":
                for key, name in (("audit_id", "Airlock-Audit-Id"), ("receipt_id", "Airlock-Receipt-Id")):
                    if key in a.json and name in a.headers and a.headers.get("Idempotent-Replayed") != "true":
                        assert a.json[key] == a.headers[name], f"{what}: {key} is not {name}"

    def event(self, method, target, kind, data):
        item = self.item(target.split("?")[0])
        for response in item[method.lower()]["responses"].values():
            content = self.resolve(response).get("content", {}).get("text/event-stream", {})
            events = content.get("x-airlock-events", {})
            if kind in events:
                self.check(events[kind], data, f"event {kind} of {target}")
                return
            if "*" in events:
                self.check(events["*"], data, f"event {kind} of {target}")
                return
        raise AssertionError(f"event {kind} of {target} is not documented")


SPEC = Spec()


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body
        self.type = (headers.get("Content-Type") or "").split(";")[0].strip()
        self.json = None
        if self.type.endswith("json") and body:
            self.json = json.loads(body)

    @property
    def code(self):
        return self.json.get("code") if isinstance(self.json, dict) else None

    @property
    def kind(self):
        return self.json.get("kind") if isinstance(self.json, dict) else None

    def __repr__(self):
        return f"{self.status} {self.body[:400]!r}"


# ---- waiting ----------------------------------------------------------------------------------------------------------
def until(ask, seconds, what):
    """Asks until the answer is true; the deadline is the only clock. Returns the answer."""
    deadline = time.monotonic() + seconds
    while True:
        got = ask()
        if got:
            return got
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        select.select([], [], [], 0.02)


def fill(path):
    """A file there, of all that its filesystem has room for."""
    with open(path, "wb", buffering=0) as f:  # with a buffer the last write would be that of close
        try:
            while True:
                f.write(bytes(1 << 16))
        except OSError:
            pass


def fd_names(pid):
    """What its descriptors lead to."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            pass  # closed meanwhile
    return names


@contextlib.contextmanager
def small_disk(mib):
    """A directory on a filesystem of its own with room for `mib`; it goes with the block"""
    if os.geteuid() != 0:
        raise Skip("only root can mount")
    mount = tempfile.mkdtemp(prefix="airlock-small-")
    try:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", mount], capture_output=True).returncode != 0:
            raise Skip("mounting is not allowed here")
        try:
            yield mount
        finally:
            subprocess.run(["umount", "-l", mount], check=True)
    finally:
        os.rmdir(mount)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def vm_pids(sandbox_ids):
    """{pid: cmdline words} of every process that carries one of these sandboxes (QEMU and what jails it)."""
    found = {}
    wanted = set(sandbox_ids)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                words = f.read().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if "-name" in words and words[words.index("-name") + 1] in wanted:
            found[int(pid)] = words
    return found


def disks(state):
    """{pid: (folder, name)} of every QEMU that has a disk below a state directory open: ("sandboxes", id), ("pool", name) or
    ("templates", key). One that was made ahead keeps its first name in its command line; its disk says whose it is."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if b"\0-name\0sbx" not in f.read():
                    continue
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        for link in links:
            if link.startswith(state + "/") and "/disk.raw" in link:
                folder, name = link[len(state) + 1:].split("/")[:2]
                found[int(pid)] = (folder, name)
    return found


def qemu_pid(sandbox_id):
    pids = [p for p, words in vm_pids([sandbox_id]).items() if "qemu" in os.path.basename(words[0])]
    assert len(pids) == 1, f"{len(pids)} QEMU processes of {sandbox_id}"
    return pids[0]


# ---- a stream of events -----------------------------------------------------------------------------------------------
class Stream:
    """Server-sent events over a socket; each event's data is checked against the document."""

    def __init__(self, server, method, target, headers, body=None):
        self.server, self.method, self.target = server, method, target
        self.connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        self.connection.connect()
        self.sock = self.connection.sock
        self.connection.request(method, target, body=body, headers=headers)
        self.response = self.connection.getresponse()
        self.comments = 0
        if self.response.status != 200 or "event-stream" not in self.response.getheader("Content-Type", ""):
            answer = Answer(self.response.status, self.response.headers, self.response.read())
            self.close()
            raise AssertionError(f"{method} {target}: no stream but {answer}")

    def next(self, timeout=30):
        """(kind, id, data) or None at the end of the stream."""
        self.sock.settimeout(timeout)
        kind, ident, data = "message", None, []
        while True:
            line = self.response.readline()
            if not line:
                return None
            line = line.decode("utf-8").rstrip("\r\n")
            if not line:
                if not data:
                    continue
                value = json.loads("\n".join(data))
                SPEC.event(self.method, self.target, kind, value)
                return kind, ident, value
            if line.startswith(":"):
                self.comments += 1
                continue
            name, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if name == "event":
                kind = value
            elif name == "id":
                ident = value
            elif name == "data":
                data.append(value)

    def comment(self, timeout):
        """Reads until the next comment line."""
        self.sock.settimeout(timeout)
        while True:
            line = self.response.readline()
            assert line, "the stream ended"
            if line.startswith(b":"):
                return

    def all(self, timeout=60):
        events = []
        while (event := self.next(timeout)) is not None:
            events.append(event)
        return events

    def close(self):
        self.response.close()
        self.connection.close()


def chunk(event):
    """The bytes of a stdout or stderr event."""
    data = event[2]
    return base64.b64decode(data["data"]) if data["encoding"] == "base64" else data["data"].encode()


def text_of(result, name="stdout"):
    """The bytes of a stream in a command's result."""
    value = result[name]
    return base64.b64decode(value) if result[name + "_encoding"] == "base64" else value.encode()


# ---- a server ---------------------------------------------------------------------------------------------------------
class Server:
    def __init__(self, name="server", state=None, images=None, env=None, args=(), binary=None):
        self.top = tempfile.mkdtemp(prefix="airlock-test-") if state is None else None
        self.state = state or os.path.join(self.top, "state")
        self.images = images or IMAGES
        self.binary = binary or BIN
        self.env, self.args = env or {}, list(args)
        os.makedirs(LOGS, exist_ok=True)
        self.log_path = os.path.join(LOGS, name + ".log")
        open(self.log_path, "w").close()
        self.process = None
        self.ids = set()

    def argv(self, listen="127.0.0.1:0"):
        return [self.binary, "serve", "--listen", listen, "--state-dir", self.state, "--image-dir", self.images,
                "--allow-emulation", *self.args]

    def environment(self):
        # An AIRLOCK_ variable that is no key is an error to the server: the tests' own stay here.
        return {**{k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK_")}, **self.env}

    def spawn(self):
        """Starts the process only; wait_ready does the rest."""
        listen = os.path.join(self.state, "listen")
        if os.path.exists(listen):
            os.unlink(listen)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.argv(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                            env=self.environment(), start_new_session=True)
        return self

    def address(self):
        try:
            with open(os.path.join(self.state, "listen")) as f:
                text = f.read().strip()
        except OSError:
            return None
        if ":" not in text:
            return None
        host, _, port = text.removeprefix("http://").rpartition(":")
        self.host, self.port = host, int(port)
        return True

    def wait_ready(self, seconds=30):
        def ask():
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.log_tail()}")
            if not self.address():
                return False
            try:
                return self.get("/readyz", token=False).status == 200
            except (ConnectionError, OSError, http.client.HTTPException):
                return False
        until(ask, seconds, "/readyz")
        with open(os.path.join(self.state, "token")) as f:
            self.token = f.read().strip()
        return self

    def start(self, seconds=30):
        return self.spawn().wait_ready(seconds)

    def log_tail(self, lines=5):
        with open(self.log_path, errors="replace") as f:
            return " | ".join(f.read().splitlines()[-lines:])

    def kill(self):
        """kill -9, as a crash would."""
        self.process.kill()
        self.process.wait(30)

    def terminate(self):
        self.process.terminate()
        return self.process.wait(30)

    def vms(self, folder="sandboxes"):
        """{name: pid} of this server's QEMUs: of sandboxes, of the "pool", or "templates" in the making."""
        return {name: pid for pid, (where, name) in disks(self.state).items() if where == folder}

    def sandbox_ids(self):
        ids = set(self.ids)
        for sub in ("sandboxes", "run"):
            folder = os.path.join(self.state, sub)
            if os.path.isdir(folder):
                ids.update(n for n in os.listdir(folder) if n.startswith("sbx"))
        return ids

    def probes(self):
        """Its probe of KVM, where one is under way."""
        try:
            at = os.stat(os.path.join(self.state, "run"))
        except FileNotFoundError:
            return {}
        return vm_pids([f"probe-{at.st_dev:x}-{at.st_ino:x}"])

    def close(self):
        """Ends the server and every VM it had; returns the pids of VMs that had to be ended."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        left = list({**vm_pids(self.sandbox_ids()), **disks(self.state), **self.probes()})
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for pid in left:
            until(lambda p=pid: not alive(p), 10, f"end of process {pid}")
        if self.top:
            shutil.rmtree(self.top, ignore_errors=True)
        return left

    # ---- requests
    def headers(self, token=None, headers=None):
        out = {}
        if token is not False:
            out["Authorization"] = "Bearer " + (token or self.token)
        out.update(headers or {})
        return out

    def req(self, method, path, body=None, token=None, headers=None, expect=None, timeout=90, check=True, data=None):
        """One request on a connection of its own. body: JSON; data: bytes, a file or an iterable of bytes."""
        out = self.headers(token, headers)
        if body is not None:
            data = json.dumps(body).encode()
            out.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body=data, headers=out)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
        finally:
            connection.close()
        if check:
            SPEC.answer(method, path, answer)
        if expect is not None:
            wanted = expect if isinstance(expect, tuple) else (expect,)
            assert answer.status in wanted, f"{method} {path}: expected {expect}, got {answer}"
        if method == "POST" and answer.status == 201 and path == "/v1/sandboxes":
            self.ids.add(answer.json["id"])
        return answer

    def get(self, path, **kw):
        return self.req("GET", path, **kw)

    def post(self, path, body=None, **kw):
        return self.req("POST", path, body, **kw)

    def put(self, path, data, **kw):
        return self.req("PUT", path, data=data, **kw)

    def patch(self, path, body, **kw):
        return self.req("PATCH", path, body, **kw)

    def delete(self, path, **kw):
        return self.req("DELETE", path, **kw)

    def stream(self, method, path, body=None, token=None, headers=None):
        out = self.headers(token, {"Accept": "text/event-stream", **(headers or {})})
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            out["Content-Type"] = "application/json"
        return Stream(self, method, path, out, data)

    def raw(self, data, timeout=10, shut=False):
        """Sends bytes as they are and returns everything until the server closes or is quiet for `timeout`."""
        with socket.create_connection((self.host, self.port), timeout=timeout) as c:
            c.sendall(data)
            if shut:
                c.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while part := c.recv(65536):
                    got += part
            except (TimeoutError, ConnectionResetError):
                pass
            return got

    # ---- shorthands
    def create(self, token=None, expect=201, **fields):
        body = {"image": "debian", "lifecycle": {"ttl_seconds": 1800, "on_expiry": "destroy"}, **fields}
        return self.post("/v1/sandboxes", body, token=token, expect=expect, timeout=150).json

    def run(self, box, what, token=None, expect=200, **fields):
        body = {"argv": what} if isinstance(what, list) else {"shell": what}
        return self.post(f"/v1/sandboxes/{box}/commands", {**body, **fields}, token=token, expect=expect).json

    def background(self, box, what, **fields):
        return self.run(box, what, expect=202, background=True, **fields)["command_id"]

    def wait(self, box, command, seconds=60):
        a = self.get(f"/v1/sandboxes/{box}/commands/{command}/wait?timeout_seconds={seconds}", expect=200, timeout=seconds + 30)
        assert a.json["state"] == "finished", f"{command} still runs after {seconds} s"
        return a.json

    def output(self, box, command, stream="stdout"):
        """Every kept byte of a stream, page by page."""
        got = b""
        while True:
            a = self.get(f"/v1/sandboxes/{box}/commands/{command}/output?stream={stream}&offset={len(got)}", expect=200)
            got += a.body
            assert int(a.headers["Airlock-Next-Offset"]) == len(got)
            if a.headers["Airlock-Complete"] == "true" or not a.body:
                return got

    def reach(self, box, state, seconds=30):
        a = self.get(f"/v1/sandboxes/{box}/wait?state={state}&timeout_seconds={seconds}", expect=200, timeout=seconds + 30)
        assert a.json["state"] == state, f"{box} is {a.json['state']} ({a.json['state_reason']}), not {state}"
        return a.json

    def file(self, box, path, **query):
        return f"/v1/sandboxes/{box}/files?" + urllib.parse.urlencode({"path": path, **query})


# ---- running tests ----------------------------------------------------------------------------------------------------
def deadline(seconds):
    def mark(fn):
        fn.deadline = seconds
        return fn
    return mark


class Fixtures:
    """What a test asks for by the names of its arguments: `s` the module's server, `box` a sandbox of the module. A module
    with a server of another kind has a function `server(name)`."""

    def __init__(self, name, make):
        self.name, self.make, self.server, self.shared = name, make, None, None

    def s(self):
        if self.server is None:
            self.server = self.make(self.name)
            self.server.start()
        return self.server

    def box(self):
        if self.shared is None:
            self.shared = self.s().create()["id"]
        return self.shared

    def close(self):
        if self.server:
            self.server.close()


def _timeout(signum, frame):
    raise AssertionError("the test's deadline passed")


def run_module(module, only=()):
    """Runs the test_* functions in the order they are written; returns (passed, failed, skipped)."""
    name = os.path.splitext(os.path.basename(module.__file__))[0]
    tests = [f for n, f in vars(module).items() if n.startswith("test_") and inspect.isfunction(f)]
    tests = [f for f in tests if not only or f.__name__ in only]
    make = getattr(module, "server", Server)
    fixtures = Fixtures(name, make)
    passed = failed = skipped = 0
    signal.signal(signal.SIGALRM, _timeout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers and VMs are ended too
    try:
        for test in tests:
            title = f"{name}: {(test.__doc__ or test.__name__).strip().splitlines()[0].rstrip('.')}"
            began = time.monotonic()
            signal.alarm(getattr(test, "deadline", 90))
            try:
                test(*[getattr(fixtures, a)() for a in inspect.signature(test).parameters])
            except Skip as why:
                skipped += 1
                print(f"ok - {title} # SKIP {why}", flush=True)
            except KeyboardInterrupt:
                raise
            except BaseException as e:
                failed += 1
                print(f"not ok - {title} ({test.__name__}, {time.monotonic() - began:.1f} s)", flush=True)
                print(f"#   {type(e).__name__}: {str(e)[:1500]}")
                for line in traceback.format_tb(e.__traceback__)[-3:]:
                    print("#   " + line.strip().replace(TOP + "/", "").replace("\n", " "))
                server = fixtures.server
                if server and server.process and server.process.poll() is not None:
                    print(f"#   the server is gone ({server.process.returncode}): {server.log_tail()}")
                    fixtures.close()
                    fixtures = Fixtures(name, make)
            else:
                passed += 1
                print(f"ok - {title} ({time.monotonic() - began:.1f} s)", flush=True)
            finally:
                signal.alarm(0)
    finally:
        signal.alarm(0)
        fixtures.close()
    return passed, failed, skipped


def main():
    """For `python3 tests/integration/test_x.py [test_name …]`."""
    module = sys.modules["__main__"]
    passed, failed, skipped = run_module(module, sys.argv[1:])
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(1 if failed else 0)


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()
