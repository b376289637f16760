"""stream: 100 MiB into a file below /work and back over HTTP, against the floor agent's bytes on the same devices."""
import os
import time
from urllib.parse import quote

from measure import Stand, interleave

SIZE = 100 << 20
PATH = "/work/stream"


def measure(report, options):
    data = os.urandom(1 << 20) * (SIZE >> 20)
    with Stand("stream", floor=True) as st:
        box = "/v1/sandboxes/" + st.box()
        wire, vm = st.wire(), st.boot()
        file = f"{box}/files?path={quote(PATH)}"
        got = bytearray(SIZE)

        def rate(began):
            return SIZE / 1e6 / (time.perf_counter() - began)

        def settle():
            """Both guests have nothing left to write, so that no transfer pays for the one before."""
            body = wire.want(200, wire.request("POST", f"{box}/commands", {"argv": ["sync"]}))
            assert b'"exit_code":0' in body, body
            assert vm.sh("sync")[0] == 0

        def up():
            wire.exchange(wire.request("DELETE", file))
            settle()
            head = wire.request("PUT", file, length=SIZE)
            t = time.perf_counter()
            wire.sock.sendall(head)
            wire.sock.sendall(data)
            status, body = wire.answer()
            mb_s = rate(t)
            assert status == 201, f"PUT: {status} {body[:400]!r}"
            return mb_s

        def floor_up():
            assert vm.sh("rm -f " + PATH)[0] == 0
            settle()
            return vm.upload(PATH, data)

        def down():
            settle()
            t = time.perf_counter()
            wire.sock.sendall(wire.request("GET", file))
            status, head, rest, length = wire.head()
            assert status == 200 and length == SIZE, f"GET: {status} {head!r} {rest[:400]!r}"
            got[:len(rest)] = rest
            view, n = memoryview(got), len(rest)
            while n < SIZE:
                part = wire.sock.recv_into(view[n:], min(1 << 18, SIZE - n))
                assert part, f"the server closed the connection after {n} of {SIZE} bytes"
                n += part
            mb_s = rate(t)
            assert got == data, "the bytes that came back are not those that went up"
            return mb_s

        def floor_stream():
            settle()
            return vm.stream(SIZE)

        def floor_down():
            settle()
            return vm.download(PATH, SIZE)

        interleave(1, up, floor_up)  # the disks' blocks, and the guests' caches of translated code
        ups, floor_ups = interleave(options.samples_streams, up, floor_up)
        downs, streams, floor_downs = interleave(options.samples_streams, down, floor_stream, floor_down)
        report.figure("upload of 100 MiB", "MB/s", ups, ("ratio>=", .6), floor_ups, "floor agent, same path", promised_n=3)
        report.figure("download of 100 MiB", "MB/s", downs, ("ratio>=", .6), streams, "guest to host stream", promised_n=3)
        report.figure("download against a bare read", "MB/s", downs, None, floor_downs, "floor agent, same file",
                      note="the floor agent only reads and writes: no frames, no digest, no HTTP")

