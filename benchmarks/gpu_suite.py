"""Everything that a GPU has to tell, by one command: builds, tests, checks memory accesses, times, and writes it down.

    python -m benchmarks.gpu_suite --out DIR

Parts run one behind the other, each in a process of its own and with a limit of time, and append JSON lines to
DIR/PART.jsonl, the last of which says that the part is complete. Called again with the same DIR the suite goes on with
the first part that is not; it stops starting parts after --seconds. From the lines come DIR/report.md, DIR/report.png
(with matplotlib) and DIR/defaults.md, the table for fastddpm/_gpu_defaults.py.

It needs torch, triton, nvcc, pytest and pytest-benchmark, and no network. What a contestant raises becomes a line with
the message, and the suite goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastddpm
from benchmarks import test_ops

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530.0
BACKENDS = ("triton", "native")
Line = dict[str, Any]

# Channels and sizes of the group norms of four U-Nets, with the batch that they are timed at and their name.
CIFAR = [
    (128, 32),
    (256, 32),
    (384, 32),
    (128, 16),
    (256, 16),
    (384, 16),
    (512, 16),
    (256, 8),
    (512, 8),
    (256, 4),
    (512, 4),
]
LSUN = [
    (128, 256),
    (256, 256),
    (128, 128),
    (256, 128),
    (384, 128),
    (256, 64),
    (512, 64),
    (256, 32),
    (512, 16),
    (1024, 16),
]
ADM = [
    (192, 64),
    (384, 64),
    (576, 64),
    (192, 32),
    (384, 32),
    (576, 32),
    (960, 32),
    (576, 16),
    (1152, 16),
    (768, 8),
    (1536, 8),
]
SD = [(320, 64), (640, 64), (960, 64), (640, 32), (1280, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8), (2560, 8)]
NETWORKS = {"CIFAR-10": (128, CIFAR), "LSUN-256": (8, LSUN), "ADM-64": (64, ADM), "SD-1.5": (16, SD)}
HOT = [(128, 128, 32, 32), (128, 256, 16, 16), (64, 384, 32, 32), (16, 320, 64, 64)]  # torch.compile takes part
PICTURES = [
    (128, 3, 32, 32),
    (1024, 3, 32, 32),
    (16, 4, 64, 64),
    (8, 3, 256, 256),
    (64, 3, 256, 256),
    (256, 3, 256, 256),
]


@dataclass(frozen=True)
class Part:
    """A part of the suite: what runs in its process, and the seconds that this may take."""

    run: Callable[[Path], None]
    seconds: float


# Recording


def read(path: Path) -> list[Line]:
    """The lines of a part, but for one that was cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def is_complete(out: Path, part: str) -> bool:
    return any(line.get("complete") for line in read(out / f"{part}.jsonl"))


class Record:
    """Appends lines to the file of a part, and tells which cases are there already."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {line["case"] for line in read(path) if "case" in line}

    def add(self, **line: Any) -> None:
        """Write it at once: the process may be stopped behind any line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# Timing


def rotated(size: int) -> int:
    """Copies of the inputs of a call that moves ``size`` bytes that fill three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, math.ceil(3 * cache / max(size, 1))))


def seconds_of(calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
    """The least time of a call on the device, over rounds in each of which all are called, twice.

    The device sleeps until the calls are queued, so that a launch is not waited for.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    count, best = 2 * len(calls), math.inf
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(1.0, 2 * 2 * host + 1e-4) * 2e9))  # cycles, of about 2 GHz
        first.record()
        for _ in range(2):
            for call in calls:
                call()
        last.record()
        torch.cuda.synchronize()
        best = min(best, first.elapsed_time(last) / 1e3 / count)
    return best


def copy_rate() -> float:
    """Bytes a second, read and written, of memory that the cache does not hold."""
    n = 3 * torch.cuda.get_device_properties(0).L2_cache_size // 4 + (1 << 26)
    pairs = [(torch.ones(n, device="cuda"), torch.empty(n, device="cuda")) for _ in range(2)]
    return 8 * n / seconds_of([lambda a=a, b=b: b.copy_(a) for a, b in pairs])  # type: ignore[misc]


def draw_rate() -> float:
    """Normal numbers a second of the CUDA kernel that does nothing else."""
    sample = torch.arange(64, device="cuda")

    def call() -> object:
        return fastddpm.ops.normal((64, 1 << 18), seed=0, sample=sample, step=0, stream=1)

    with fastddpm.use_backend("native"):
        return (64 << 18) / seconds_of([call, call])


def empty_launch() -> float:
    """Seconds of a kernel that does next to nothing."""
    x = torch.zeros(1, device="cuda")
    return seconds_of([x.zero_] * 16)


# Cases


def cases() -> Iterator[tuple[str, Sequence[int], torch.dtype, str, bool]]:
    """Op, shape, dtype, where it comes from, and whether torch.compile takes part."""
    half, full = torch.bfloat16, torch.float32
    for shape in PICTURES:
        for op in ("normal", "q_sample", "diffusion_loss", "solver_step"):
            for dtype in (full, half):
                yield op, shape, dtype, "pictures", shape == PICTURES[0] and op in ("q_sample", "solver_step")
    for network, (batch, shapes) in NETWORKS.items():
        for channels, size in shapes:
            shape = (batch, channels, size, size)
            for op in ("group_norm_silu", "group_norm_silu_backward"):
                yield op, shape, half, network, shape in HOT
    for direction in ("", "_backward"):
        yield f"group_norm_silu{direction}", HOT[0], full, "CIFAR-10", False
        for dtype in (full, half):
            yield f"rms_norm_silu{direction}", HOT[0], dtype, "CIFAR-10", False
    yield "adam_ema", (512, 512, 3, 3), full, "94 million parameters", False


def contestants(
    op: str, shape: Sequence[int], dtype: torch.dtype, compiled: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name, and what makes a `test_ops.Contest` with the call to be timed as ``ours``."""
    make = getattr(test_ops, op)
    grad = "backward" in op or op == "diffusion_loss"

    def ours(backend: str) -> Callable[[], Any]:
        def build() -> Any:
            with fastddpm.use_backend(backend), torch.set_grad_enabled(grad):
                return make(shape, dtype)

        return build

    def eager() -> Any:
        with torch.set_grad_enabled(grad):
            contest = make(shape, dtype)
        return test_ops.Contest(contest.eager, contest.eager, contest.size, contest.normals)

    def inductor() -> Any:
        contest = eager()
        torch._dynamo.reset()
        call = torch.compile(contest.eager)
        return test_ops.Contest(call, call, contest.size, contest.normals)

    for backend in BACKENDS:
        yield backend, ours(backend)
    yield "eager", eager
    if compiled:
        yield "compile", inductor
    if op == "group_norm_silu":
        apex = apex_norm(shape, dtype)
        if apex is not None:
            yield "apex", apex


def apex_norm(shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Any] | None:
    """GroupNorm and SiLU of NVIDIA's apex, where it is installed."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError:
        return None

    def build() -> Any:
        norm = GroupNorm(32, shape[1], eps=1e-6, act="silu").to("cuda", dtype)
        x = torch.randn(*shape, dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)

        def call() -> object:
            return norm(x)

        return test_ops.Contest(call, call, 2 * x.numel() * dtype.itemsize)

    return build


def timed(name: str, build: Callable[[], Any], op: str) -> tuple[float, Any]:
    """Seconds of a call, and a contest, of a contestant."""
    grad = "backward" in op or op == "diffusion_loss"
    forced = fastddpm.use_backend(name) if name in BACKENDS else nullcontext()
    with forced, torch.set_grad_enabled(grad):
        first = build()
        copies = min(rotated(first.size), 3 if name == "compile" else 64)  # each of those is compiled anew
        contests = [first, *(build() for _ in range(copies - 1))]
        return seconds_of([contest.ours for contest in contests]), first


def measure(
    record: Record,
    rates: dict[str, float],
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    source: str,
    compiled: bool,
) -> None:
    """Add a line for each contestant of a case."""
    case = f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    for name, build in contestants(op, shape, dtype, compiled):
        if f"{case} {name}" in record.done:
            continue
        line: Line = dict(
            case=f"{case} {name}", op=op, shape=list(shape), dtype=str(dtype), source=source, contestant=name
        )
        try:
            seconds, contest = timed(name, build, op)
            floor = max(contest.size / rates["copy"], contest.normals / rates["draw"])
            line.update(seconds=seconds, bytes=contest.size, floor=floor, launch=rates["launch"])
        except Exception as error:
            traceback.print_exc()
            line.update(error=f"{type(error).__name__}: {error}"[:500])
        record.add(**line)
        torch.cuda.empty_cache()


# Parts


def build(out: Path) -> None:
    """Compile for the GPU at hand, in place."""
    major, minor = torch.cuda.get_device_capability()
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
        env={**environment(), "FASTDDPM_CUDA_ARCHS": f"{major}{minor}", "FASTDDPM_REQUIRE_CUDA": "1"},
    )  # fmt: skip
    line: Line = dict(case="build", seconds=time.perf_counter() - begin, returncode=run.returncode)
    if run.returncode:
        line["error"] = (run.stdout + run.stderr)[-4000:]
    Record(out / "build.jsonl").add(**line)


def tests(out: Path) -> None:
    """The tests marked gpu, one line each folder with the end of what it printed."""
    record = Record(out / "tests.jsonl")
    for folder in ("tests/ops", "tests/nn", "tests/sampling", "tests/training", "tests/cuda"):
        if folder in record.done:
            continue
        command = [sys.executable, "-m", "pytest", "-m", "gpu", folder, "-q", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]  # the machine need not have every package of the tests
        run = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        record.add(case=folder, returncode=run.returncode, output=run.stdout[-6000:])


def sanitizer(out: Path) -> None:
    """compute-sanitizer on a case or two of each op."""
    record = Record(out / "sanitizer.jsonl")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        record.add(case="sanitizer", skipped="compute-sanitizer is not installed")
        return
    for op in ("q_sample", "solver_step", "group_norm_silu", "rms_norm_silu", "diffusion_loss", "adam_ema"):
        if op in record.done:
            continue
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        command += ["-p", "no:cacheprovider", f"tests/ops/test_contract.py::test_values_on_a_gpu[{op}-native]"]
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
                timeout=60,
            )
            record.add(case=op, returncode=run.returncode, output=run.stdout[-3000:])
        except subprocess.TimeoutExpired:
            record.add(case=op, skipped="took more than 60 seconds")


def ops(out: Path) -> None:
    """Time every op at the shapes of real networks."""
    record = Record(out / "ops.jsonl")
    rates = dict(copy=copy_rate(), draw=draw_rate(), launch=empty_launch())
    record.add(rates=rates, device=torch.cuda.get_device_name())
    for op, shape, dtype, source, compiled in cases():
        measure(record, rates, op, shape, dtype, source, compiled)


def sweep(out: Path) -> None:
    """Time group_norm_silu by slab width and cluster size."""
    record = Record(out / "sweep.jsonl")
    for op in ("group_norm_silu", "group_norm_silu_backward"):
        for shape in HOT:
            for slab in (32, 64, 96, 128, 192, 256):
                for cluster in (1, 2, 4, 8, 16):
                    if shape[1] % slab == 0:
                        with plan(slab, cluster):
                            sweep_case(record, op, shape, slab, cluster)


def sweep_case(record: Record, op: str, shape: Sequence[int], slab: int, cluster: int) -> None:
    case = f"{op} {'x'.join(map(str, shape))} slab {slab} cluster {cluster}"
    if case in record.done:
        return
    line: Line = dict(case=case, op=op, shape=list(shape), slab=slab, cluster=cluster)
    try:
        ours = dict(contestants(op, shape, torch.bfloat16, False))["native"]
        line["seconds"], _ = timed("native", ours, op)
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:300]
    record.add(**line)


@contextmanager
def plan(slab: int, cluster: int) -> Iterator[None]:
    """Make the CUDA kernels of group_norm_silu take slabs and clusters of this size; 0 leaves the choice to them."""
    library = ctypes.CDLL(str(ROOT / "fastddpm" / "_cuda.so"))  # the one that torch has loaded
    library.fastddpm_group_norm_plan(slab, cluster)
    try:
        yield
    finally:
        library.fastddpm_group_norm_plan(0, 0)


PARTS = {
    "build": Part(build, 240), "tests": Part(tests, 240), "ops": Part(ops, 240), "sanitizer": Part(sanitizer, 200),
    "sweep": Part(sweep, 120),
}  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# Report


def fastest(lines: list[Line]) -> dict[str, list[tuple[int, str]]]:
    """For each op the ranges of elements in which one backend is the faster, as `fastddpm._gpu_defaults` takes them."""
    times: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        if line.get("contestant") in BACKENDS and "seconds" in line:
            op = line["op"].removesuffix("_backward")
            sizes = times.setdefault(op, {}).setdefault(math.prod(line["shape"]), {})
            sizes[line["contestant"]] = sizes.get(line["contestant"], 0.0) + line["seconds"]
    table = {}
    for op, sizes in times.items():
        ranges: list[tuple[int, str]] = []
        for elements, seconds in sorted(sizes.items()):
            best = min(seconds, key=seconds.__getitem__)
            if ranges and ranges[-1][1] == best:
                ranges.pop()
            ranges.append((elements, best))
        table[op] = ranges
    return table


def report(out: Path) -> list[str]:
    """The page: what was built and tested, and a row for each case."""
    lines = read(out / "ops.jsonl")
    rates = next((line for line in reversed(lines) if "rates" in line), None)
    text = ["# Kernels on a GPU", ""]
    if rates is not None:
        text += [
            f"{rates['device']}; {datetime.date.today().isoformat()}; torch {torch.__version__}. Copy rate "
            f"{rates['rates']['copy'] / 1e9:.0f} GB/s, {rates['rates']['draw'] / 1e9:.0f} G normal numbers/s, an empty "
            f"launch {rates['rates']['launch'] * 1e6:.1f} us.", "",
            "The floor is the larger of bytes over the copy rate and normal numbers over the rate of the kernel that",
            "only draws them. Inputs rotate over three times the second-level cache.", "",
        ]  # fmt: skip
    for part in ("build", "tests", "sanitizer"):
        for line in read(out / f"{part}.jsonl"):
            if "case" in line:
                verdict = line.get("skipped") or ("passed" if line.get("returncode") == 0 else "FAILED")
                last = line.get("output", "").strip().splitlines()[-1:]
                text.append(f"- {part}: {line['case']}: {verdict}{'; ' + last[0] if last else ''}")
    names = ("triton", "native", "eager", "compile", "apex")
    text += ["", "| case | of | floor us | " + " | ".join(f"{name} us (share)" for name in names) + " |"]
    text.append("| --- " * (3 + len(names)) + "|")
    grouped: dict[str, dict[str, Line]] = {}
    for line in lines:
        if "contestant" in line:
            grouped.setdefault(line["case"].removesuffix(f" {line['contestant']}"), {})[line["contestant"]] = line
    for case, found in grouped.items():
        floor = next((line["floor"] for line in found.values() if "floor" in line), math.nan)
        cells = []
        for name in names:
            line = found.get(name, {})
            if "seconds" in line:
                cells.append(f"{line['seconds'] * 1e6:.1f} ({floor / line['seconds']:.0%})")
            else:
                cells.append("raised" if "error" in line else "")
        source = next(iter(found.values()))["source"]
        text.append(f"| {case} | {source} | {floor * 1e6:.1f} | {' | '.join(cells)} |")
    errors = [line for part in PARTS for line in read(out / f"{part}.jsonl") if "error" in line]
    text += ["", *(f"- {line['case']}: {line['error'].splitlines()[-1]}" for line in errors if line["error"])]
    return text


def defaults(out: Path) -> str:
    """The table for fastddpm/_gpu_defaults.py, and the fastest slab and cluster of each swept shape."""
    text = ['RECORD = "benchmarks/results/..."', "FASTEST = {"]
    for op, ranges in fastest(read(out / "ops.jsonl")).items():
        text.append(f'    "{op}": ({"".join(f"({most:_}, {backend!r}), " for most, backend in ranges)}),')
    text += ["}", ""]
    best: dict[str, Line] = {}
    for line in read(out / "sweep.jsonl"):
        if "seconds" in line:
            key = f"{line['op']} {line['shape']}"
            if key not in best or line["seconds"] < best[key]["seconds"]:
                best[key] = line
    text += [f"{key}: slab {b['slab']}, cluster {b['cluster']}, {b['seconds'] * 1e6:.1f} us" for key, b in best.items()]
    return "\n".join(text) + "\n"


def plot(lines: list[Line], path: Path) -> bool:
    """Share of the floor over the bytes moved, a panel for each op; False without matplotlib or anything to show."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [line for line in lines if "floor" in line]
    names = sorted({line["op"] for line in rows})
    if not rows:
        return False
    columns = min(3, len(names))
    figure, panels = plt.subplots(math.ceil(len(names) / columns), columns, figsize=(4.6 * columns, 9.6), squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, op in zip(panels.flat, names, strict=False):
        for name in ("eager", "compile", "apex", "triton", "native"):
            points = sorted((line["bytes"] / 1e6, line["floor"] / line["seconds"]) for line in rows
                            if line["op"] == op and line["contestant"] == name)  # fmt: skip
            if points:
                panel.plot(*zip(*points, strict=True), "o-", ms=3, lw=0.8, label=name)
        panel.axhline(1, color="grey", lw=0.6)
        panel.set(title=op, xscale="log", xlabel="MB moved", ylabel="share of the floor", ylim=(0, 1.2))
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


# The command


def run_parts(out: Path, wanted: Sequence[str], seconds: float) -> bool:
    """Run what is not complete, while there is time. Returns whether everything is."""
    end = time.monotonic() + seconds
    for name in wanted:
        if is_complete(out, name):
            continue
        left = min(PARTS[name].seconds, end - time.monotonic())
        if left < 5:
            print(f"{name}: no time left; call again to go on", flush=True)
            return False
        print(f"{name}: at most {left:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(out), "--only", name]
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment(), timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped; call again to go on", flush=True)
            continue
        if code == 0:
            Record(out / f"{name}.jsonl").add(complete=True)
        else:
            print(f"{name}: ended with {code}", flush=True)
    return all(is_complete(out, name) for name in wanted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for records and report; may hold a part of them"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which, of {','.join(PARTS)} (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"start no part after this time (default {SECONDS:.0f})"
    )
    parser.add_argument("--report", action="store_true", help="write the report from what is there, and run nothing")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args(argv)
    wanted = args.parts.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; choose of {', '.join(PARTS)}")
    if not args.report and not torch.cuda.is_available():
        print(
            "gpu_suite: no CUDA GPU here, so there is nothing to measure; --report writes a report of a record",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        PARTS[args.only].run(args.out)
        return 0
    complete = True if args.report else run_parts(args.out.resolve(), wanted, args.seconds)
    (args.out / "report.md").write_text("\n".join(report(args.out)) + "\n", encoding="utf-8")
    (args.out / "defaults.md").write_text(defaults(args.out), encoding="utf-8")
    plot(read(args.out / "ops.jsonl"), args.out / "report.png")
    print(f"{args.out / 'report.md'}: {'complete' if complete else 'not complete; call again to go on'}")
    return 0 if complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
