"""Where a run took place: the machine, QEMU, the image, the binary; and what a disk write and an agent ping cost there."""
import hashlib
import json
import os
import platform

import floor as floor_room
import harness
from measure import Stand, first, output_of, p50


def cores():
    return len(os.sched_getaffinity(0))


def busy():
    """(busy, stolen, all) clock ticks of the machine since it started."""
    with open("/proc/stat") as f:
        t = [int(x) for x in f.readline().split()[1:9]]
    return sum(t) - t[3] - t[4], t[7], sum(t)


def shares(before):
    """Share of the machine that was busy and stolen since `before`, in percent."""
    now = busy()
    span = max(1, now[2] - before[2])
    return 100 * (now[0] - before[0]) / span, 100 * (now[1] - before[1]) / span


def binary():
    with open(harness.BIN, "rb") as f:
        return f"{output_of(harness.BIN, 'version')} sha256:{hashlib.sha256(f.read()).hexdigest()[:16]}"


def fingerprint(report):
    """Prints the host and puts it into the result. Starts a server and a floor VM for a moment."""
    with Stand("host", floor=True) as st:
        has = st.s.get("/v1/capabilities", expect=200).json
        with open(os.path.join(harness.IMAGES, "index.json")) as f:
            index = json.load(f)
        vm = st.boot()
        vm.sh("true")
        ping = [vm.timed("PING") for _ in range(300)]
        fsync = floor_room.fdatasync_ms(st.s.state)
    jail = [name if part["available"] else f"no {name} ({part['reason']})" for name, part in has["jail"].items()]
    memory_kib = int(first("/proc/meminfo", r"MemTotal: +(\d+)", "0"))
    host = {
        "system": first("/etc/os-release", r'^PRETTY_NAME="?([^"\n]+)'),
        "kernel": platform.release(),
        "CPU": first("/proc/cpuinfo", r"model name\s*: (.+)"),
        "cores": str(cores()),
        "memory": f"{memory_kib >> 10} MiB",
        "load at the start": " ".join(f"{x:.2f}" for x in os.getloadavg()),
        "QEMU": has["qemu_version"],
        "accelerator": f"{has['accel']['selected']} ({has['isolation']})",
        "jail": ", ".join(jail),
        "guest kernel": has["images"]["kernel_version"],
        "initramfs": index["runtime"]["initramfs"]["digest"][:23],
        "image": "debian " + index["images"]["debian"]["digest"][:23],
        "server": binary(),
        "floor script": floor_room.floor_digest(),
        "fdatasync p50": f"{p50(fsync):.2f} ms (4 KiB, in the server's state directory)",
        "agent ping p50": f"{p50(ping):.2f} ms (floor agent, no process, no HTTP)",
    }
    report.result["host"] = host
    report.result["beside"] = {"fdatasync_ms": fsync, "ping_ms": ping}
    for name, value in host.items():
        print(f"{name}: {value}", flush=True)
