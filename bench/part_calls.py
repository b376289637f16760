"""calls: short calls of a running sandbox over one keep-alive connection, against the floor agent's own."""
from urllib.parse import quote

from measure import Stand, interleave, ms, p50

WARM = 10


def measure(report, options):
    with Stand("calls", floor=True) as st:
        box = "/v1/sandboxes/" + st.box()
        wire, vm = st.wire(), st.boot()
        wire.want(201, wire.request("PUT", f"{box}/files?path={quote('/work/file')}", b"x"))
        true = wire.request("POST", f"{box}/commands", {"argv": ["true"]})
        stat = wire.request("GET", f"{box}/files/stat?path={quote('/work/file')}")
        health = wire.request("GET", "/healthz")

        def command():
            body = wire.want(200, true)
            assert b'"exit_code":0' in body, body

        def spawn():
            return vm.timed("SPAWN /bin/true")
        runs = (lambda: ms(command), spawn)
        stats = (lambda: ms(wire.want, 200, stat), lambda: vm.timed("PING"), lambda: ms(wire.want, 200, health))
        interleave(WARM, *runs, *stats)
        ran, spawned = interleave(options.samples_calls, *runs)
        statted, pinged, asked = interleave(options.samples_calls, *stats)
        report.figure("true over HTTP", "ms", ran, ("over<=", 2.0), spawned, "spawn of /bin/true", promised_n=200,
                      note=f"floor + {p50(ran) - p50(spawned):.2f} ms")
        report.figure("file stat over HTTP", "ms", statted, ("p50<=", 1.0), pinged, "agent ping", promised_n=200)
        report.figure("GET /healthz", "ms", asked, note="no guest, no store: what HTTP and the client cost")
