"""kernel: the tuned guest kernel against Debian's, one server each, in turns. Nothing is promised of either here: it helps to choose."""
import os
import time

from measure import BODY, NotMeasured, Stand, Wire, harness, interleave
from part_fork import command, create, private_dirty_mb, qemu_of, wait_template

TUNED = os.environ.get("AIRLOCK_IMAGES_TUNED", os.path.join(harness.TOP, "var/images-tuned"))
STOCK_IS = "the stock kernel"
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as f:
            total += sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13]))
    return total / TICKS


def created(st, path, argv=None):
    """Milliseconds of a create, and of a first command where there is one; the sandbox is deleted."""
    wire = Wire(st.s)
    t = time.perf_counter()
    _, box = create(wire, path)
    if argv:
        command(wire, box["id"], argv)
    took = (time.perf_counter() - t) * 1e3
    wire.close()
    st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
    return took


def compare(report, name, unit, tuned, stock, note=""):
    report.figure(name, unit, tuned, None, stock, STOCK_IS, note=note)


def boots(report, options):
    with Stand("kernel-boot") as stock, Stand("kernel-boot-tuned", images=TUNED) as tuned:
        both = [lambda st=st: created(st, "cold") for st in (tuned, stock)]
        interleave(1, *both)
        compare(report, "create (cold), tuned kernel", "ms", *interleave(options.samples_boots, *both))


def idle(report, options, sides):
    """Memory and CPU of one that does nothing, after five commands."""
    boxes = []
    for st in sides:
        wire = Wire(st.s)
        _, box = create(wire, "template")
        for _ in range(5):
            command(wire, box["id"], ["sh", "-c", "true"])
        wire.close()
        boxes.append(box)
    time.sleep(10)
    pids = [qemu_of(st.s, box) for st, box in zip(sides, boxes)]
    memory = [private_dirty_mb(p) for p in pids]
    before = [cpu_s(p) for p in pids]
    time.sleep(options.idle_seconds)
    cpu = [(cpu_s(p) - b) / options.idle_seconds * 100 for p, b in zip(pids, before)]
    for st, box in zip(sides, boxes):
        st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
    compare(report, "memory one idle fork adds, tuned kernel", "MB", memory[:1], memory[1:], "Private_Dirty of QEMU and jail")
    compare(report, "CPU of an idle sandbox, tuned kernel", "%", cpu[:1], cpu[1:], "of a core; QEMU and jail")


def commands(report, options, sides):
    wires = [Wire(st.s) for st in sides]
    boxes = [create(wire, "template")[1]["id"] for wire in wires]
    for argv, n in ((["true"], options.samples_calls), (["sh", "-c", "true"], options.samples_calls),
                    (["python3", "-c", "print(1)"], options.samples_forks)):
        both = [lambda w=w, b=b: command(w, b, argv) for w, b in zip(wires, boxes)]
        interleave(3, *both)
        compare(report, f"{argv[0]}{' -c' if len(argv) > 1 else ''} over HTTP, tuned kernel", "ms", *interleave(n, *both))
    for wire, st, box in zip(wires, sides, boxes):
        wire.close()
        st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def measure(report, options):
    if not os.path.exists(os.path.join(TUNED, "index.json")):
        raise NotMeasured(f"no images with the tuned kernel: GUEST_KERNEL=tuned docker/guest/build {os.path.relpath(TUNED)} "
                          "build/airlock build/guest/airlock-agent")
    boots(report, options)
    with Stand("kernel", args=("--pool", "0")) as stock, Stand("kernel-tuned", images=TUNED, args=("--pool", "0")) as tuned:
        sides = (tuned, stock)
        for st in sides:
            st.s.delete(f"/v1/sandboxes/{st.s.create(lifecycle=BODY['lifecycle'])['id']}", expect=200)
            wait_template(st.s)
        both = [lambda st=st: created(st, "template", ["sh", "-c", "echo hi"]) for st in sides]
        interleave(2, *both)
        compare(report, "fork create to first output, tuned kernel", "ms", *interleave(options.samples_forks, *both))
        commands(report, options, sides)
        idle(report, options, sides)
