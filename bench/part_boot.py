"""boot: POST /v1/sandboxes to its 201, against the floor's QEMU from the copy of its disk to the agent's hello."""
import json
import time

from measure import BODY, Stand, Wire, interleave, p50


def measure(report, options):
    with Stand("boot", floor=True) as st:
        timings = []

        def product():
            wire = Wire(st.s)
            data = wire.request("POST", "/v1/sandboxes", BODY)
            t = time.perf_counter()
            status, body = wire.exchange(data)
            took = (time.perf_counter() - t) * 1e3
            wire.close()
            assert status == 201, f"create: {status} {body[:400]!r}"
            box = json.loads(body)
            st.s.ids.add(box["id"])
            assert box["backend"]["boot_path"] == "cold", box["backend"]
            timings.append(box["timings_ms"])
            st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
            return took

        def floor():
            vm = st.boot()
            st.kill(vm)
            return vm.boot_ms

        interleave(1, product, floor)  # page cache and disk template: both have them from now on
        timings.clear()
        created, booted = interleave(options.samples_boots, product, floor)
        report.figure("create (cold)", "ms", created, ("ratio<=", 1.15), booted, "boot to hello", promised_n=10)
        report.note("within a create, as the server times it, p50: " + ", ".join(
            f"{stage} {p50([x[stage] or 0 for x in timings]):.0f} ms" for stage in timings[0]))

