"""Everything that a GPU is needed for: build, tests, sanitizer, timings of every op; training, sampling and scripts.

    python -m benchmarks.gpu_suite --out DIR                 the ops: as much as fits into 8.5 minutes
    python -m benchmarks.gpu_suite --out DIR --group steps   training and sampling; scripts: those of other libraries
    python -m benchmarks.gpu_suite --out DIR --only 'train cifar-10 128*'    these parts alone
    python -m benchmarks.gpu_suite --out DIR --parts         what there is, what it takes, and what is done
    python -m benchmarks.gpu_suite --out DIR --dry-run       every case that would be timed; needs no GPU
    python -m benchmarks.gpu_suite --out DIR --device cpu --tiny --group all --minutes 30    all code on a small network

Called again, it goes on. Each part runs in a process of its own with a time limit, and writes its lines to
DIR/record.jsonl as it goes; the kernels are built first, whatever is asked for. A part, or a case of one, that is there
already is not run again. DIR/log.txt has what the processes print; DIR/table.md and the pictures beside it are made of
the record at the end. Exit status, of the parts asked for: 0 where everything is complete and every check passed, 1
where a check or a contestant of ours failed, 2 without a GPU, 3 where another call must go on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_record, gpu_report
from benchmarks.gpu_cases import Case, Part, parts

Line = dict[str, Any]
ROOT = gpu_record.ROOT
LEAST = 15.0  # seconds: a process is not begun with less left
LOST = 75  # exit status of a process whose device is unusable: the next one goes on
LATER = 76  # exit status of one that did not begin a contestant, since the time would not have sufficed
GROUPS = ("ops", "steps", "scripts")
OPS = ("normal", "q_sample", "diffusion_loss", "solver_step", "group_norm_silu", "rms_norm_silu", "adam_ema")


@dataclass(frozen=True)
class Options:
    out: Path
    minutes: float = 8.5
    seconds: float = 0.15  # of turns for each case of an op
    step_seconds: float = 2.0  # of turns for each contestant of training and sampling
    without: frozenset[str] = frozenset()
    tiny: bool = False
    device: str = "cuda"

    @property
    def record(self) -> Path:
        return self.out / "record.jsonl"

    @property
    def log(self) -> Path:
        return self.out / "log.txt"


def every_part(tiny: bool = False) -> list[Part]:
    """In the order in which they run; ``tiny``: training, sampling and scripts on a small network."""
    from benchmarks import gpu_scripts, gpu_steps

    return [*([] if tiny else parts()), *gpu_steps.parts(tiny), *gpu_scripts.parts()]


# The process that sees to the others.


def pending(lines: list[Line], all_parts: list[Part]) -> list[Part]:
    """The parts that are not complete."""
    done = gpu_record.ended(lines)
    return [part for part in all_parts if part.name not in done]


def run_parts(options: Options, wanted: list[Part]) -> None:
    """One after the other, until the time is over."""
    end = time.monotonic() + 60 * options.minutes
    for part in wanted:
        left = end - time.monotonic()
        if left < part.least:
            print(f"{part.name}: not with {left:.0f} s left; the same command goes on from here", flush=True)
            return
        begin = time.monotonic()
        limit = min(part.limit, left)
        about = f"about {part.predicted:.0f} s, " if part.predicted else ""
        print(f"{part.name}: {about}at most {limit:.0f} s ..", end=" ", flush=True)
        reason = run_part(options, part, begin + limit)
        seconds = time.monotonic() - begin
        ended: Line = {"kind": "end" if reason is None else "stopped", "part": part.name, "seconds": round(seconds, 1)}
        gpu_record.append(options.record, [ended if reason is None else ended | {"reason": reason}])
        print(f"{'complete' if reason is None else reason}, {seconds:.0f} s", flush=True)


def run_part(options: Options, part: Part, end: float) -> str | None:
    """Run the process of a part. Returns why it is not complete, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(options.out), "--worker", part.name,
               "--seconds", str(options.seconds), "--step-seconds", str(options.step_seconds), "--device",
               options.device, *(["--tiny"] if options.tiny else []), "--without",
               *sorted(options.without)]  # fmt: skip
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else None
    before = -1
    while True:
        left = end - time.monotonic()
        status = run_logged([*command, "--left", f"{left:.0f}"], options.log, left, hidden)
        lines = gpu_record.read(options.record)
        harmed = sum(bool(row.get("lost")) for row in [*gpu_record.rows(lines), *gpu_record.steps(lines)])
        if status == LOST and harmed > before and time.monotonic() < end - LEAST:
            before = harmed
            continue
        if status is None or status == LATER:
            return "the time was over"
        return None if status == 0 else f"the process ended with status {status}; see {options.log.name}"


def run_logged(command: list[str], log: Path, limit: float, env: dict[str, str] | None = None) -> int | None:
    """Run a command, its output behind what is in the log. Returns its status; None where it took too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=os.environ | (env or {}),
        )  # fmt: skip
        try:
            return process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()


def about(device_name: str = "cuda") -> Line:
    """What a record belongs to."""
    import torch

    from fastddpm import _native

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    device: Line = {"device": _native.build_info()["cpu"]}
    if device_name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "L2 MB": properties.L2_cache_size / 2**20,
            "memory GB": properties.total_memory / 1e9,
            "CUDA of torch": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return {
        "kind": "about",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **device,
        "packages": {n: v for n, v in _native.build_info()["packages"].items() if v},
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "source": gpu_record.source(),
    }


def differs(recorded: Line | None, now: Line) -> str | None:
    """Why a record of another machine or source cannot be gone on with, in words."""
    if recorded is None:
        return None
    for name in ("device", "source"):
        if recorded.get(name) != now.get(name):
            return f"the record is of {name} {recorded.get(name)}, and this is {now.get(name)}; choose another --out"
    return None


def status_of(lines: list[Line], all_parts: list[Part]) -> int:
    names = {part.name for part in all_parts}
    checks = {(c["part"], c["name"]): c["ok"] for c in lines if c.get("kind") == "check" and c["part"] in names}
    if pending(lines, all_parts):
        return 3
    found = [row for row in gpu_record.rows(lines) if row["contestant"] in gpu_report.OURS]
    found += [row for row in gpu_record.steps(lines) if row["library"] == "fastddpm"]
    found += gpu_record.scripts(lines)
    failed = any(row.get("error") for row in found if row["part"] in names)
    return 0 if all(checks.values()) and not failed else 1


# The processes of the parts.


def check(options: Options, part: str, name: str, ok: bool, summary: str, failures: list[str] | None = None) -> None:
    line: Line = {"kind": "check", "part": part, "name": name, "ok": ok, "summary": summary}
    gpu_record.append(options.record, [line | ({"failures": failures[:20]} if failures else {})])


def captured(command: list[str], options: Options, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command inside a part; its output goes to the log in one piece, and is returned."""
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env=os.environ | (env or {}),
    )  # fmt: skip
    with options.log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n{run.stdout}\n")
    return run.returncode, run.stdout


def build(options: Options) -> None:
    """The native code, that for CUDA for the GPU at hand alone."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    status, output = captured(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        options,
        {"FASTDDPM_CUDA_ARCHS": f"{major}{minor}", "FASTDDPM_REQUIRE_NATIVE": "1", "FASTDDPM_REQUIRE_CUDA": "1"},
    )
    last = output.strip().splitlines()[-1:] or [""]
    check(options, "build", "build", status == 0, "built" if status == 0 else last[0])
    script = """
import json
import torch
from fastddpm import _native
info = _native.build_info()
print(json.dumps(info, default=str))
raise SystemExit(info["reason"] or info["cuda_reason"])
"""
    status, output = captured([sys.executable, "-c", script], options)
    check(options, "build", "import", status == 0, (output.strip().splitlines() or [""])[-1][:600])


def groups() -> dict[str, str]:
    """The GPU tests by what -k selects: a process for each op, and one for all others."""
    return {op: op for op in OPS} | {"others": " and ".join(f"not {op}" for op in OPS)}


def summary_of(output: str) -> tuple[str, list[str]]:
    """The last line that counts, and the tests that failed, of what pytest prints."""
    counts = re.findall(r"^=*\s*(.*\b(?:passed|failed|error|errors|skipped|deselected)\b.* in .*?)\s*=*$", output, re.M)
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", output, re.M)
    return (counts[-1] if counts else "no summary"), failures


def tests(options: Options) -> None:
    """The tests marked gpu, several processes at a time; a group that has passed is not run again."""
    passed = {c["name"] for c in gpu_record.read(options.record) if c.get("kind") == "check" and c["ok"]}

    def one(group: tuple[str, str]) -> None:
        name, selection = group
        status, output = captured(
            [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-k", selection, "-q", "-rfE",
             "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-o", "timeout=0",
             "--continue-on-collection-errors"],
            options,
        )  # fmt: skip
        counts, failures = summary_of(output)
        check(options, "tests", f"tests, {name}", status == 0, counts, failures)  # none selected is a failure, too

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, (g for g in groups().items() if f"tests, {g[0]}" not in passed)))


def sanitizer(options: Options) -> None:
    """compute-sanitizer over the CUDA kernels: a contract case of each op, and each way that a norm is cut. A tool that
    has found nothing is not run again."""
    passed = {c["name"] for c in gpu_record.read(options.record) if c.get("kind") == "check" and c["ok"]}
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        check(options, "sanitizer", "compute-sanitizer", True, "not installed: not run")
        return
    for kind in (kind for kind in ("memcheck", "racecheck", "synccheck") if kind not in passed):
        status, output = captured(
            [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite", "--out",
             str(options.out), "--worker", "selection"],
            options,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
        found = re.findall(r"=========\s*((?:ERROR|RACECHECK) SUMMARY.*)", output)
        check(options, "sanitizer", kind, status == 0, found[-1] if found else f"status {status}")


def selection(options: Options) -> None:
    """What the sanitizer watches."""
    import torch

    from benchmarks import gpu_timing

    hook = gpu_timing.plan_hook()
    assert hook is not None
    watched("cuda", hook)
    torch.cuda.synchronize()


def watched(device: str, hook: Callable[[int, int, int], None]) -> None:
    """A case of each op with CUDA kernels, forward and backward, in both orders; group_norm_silu by one block, by a
    cluster, by two reads and by the cooperative kernel. ``hook``: see `gpu_timing.plan_hook`."""
    import torch

    import fastddpm
    from benchmarks import gpu_timing
    from tests.ops.cases import CASES, LAYOUTS, Case, norm_weights, randn
    from tests.ops.test_contract import results

    norm = Case(
        "group_norm_silu", "cut", lambda g: dict(x=randn(g, 1, 32, 16, 16), num_groups=8, **norm_weights(g, 32)),
        gradients=("x", "weight", "bias"),
    )  # fmt: skip
    calls = [(next(c for c in CASES if c.op == op), (0, 0, gpu_timing.BY_PLAN)) for op in OPS if op != "normal"]
    ways = ((0, 1, gpu_timing.BY_PLAN), (0, 4, gpu_timing.BY_PLAN), (0, 0, gpu_timing.TWO_READS))
    calls += [(norm, cut) for cut in (*ways, (0, 3, gpu_timing.COOPERATIVE))]
    with fastddpm.use_backend("native"):
        fastddpm.ops.normal((2, 100), seed=0, sample=torch.arange(2, device=device), step=0, stream=1)
        for (case, cut), layout in itertools.product(calls, LAYOUTS):
            with gpu_timing.planned(hook, cut):
                results(case, case.inputs(torch.bfloat16, layout, device), torch.bfloat16)


def measure(options: Options, part: Part) -> None:
    """Time the cases of a part that have no rows yet."""
    import gc

    import torch
    import torch._functorch.config

    from benchmarks import gpu_timing

    torch._functorch.config.donated_buffer = False  # the gradient is timed many times on one graph
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rates = gpu_timing.Rates(cache)
    rate: Line = {"kind": "rates", "part": part.name, "copied bytes": rates.copied_bytes, "draws": rates.draws,
                  "launch": rates.launch}  # fmt: skip
    lines = gpu_record.read(options.record)
    gpu_record.append(options.record, [rate])
    done = gpu_record.timed(lines)
    hook = gpu_timing.plan_hook() if part.name == "sweep" else None
    if part.name == "sweep" and hook is None:
        check(options, "sweep", "sweep", True, f"the CUDA library has no {gpu_timing.HOOK}: not run")
        return
    for case in swept_cases() if hook else part.cases:
        key = f"sweep {case.key}" if hook else case.key
        if key in done:
            continue
        print(key, flush=True)
        try:
            rows = (
                gpu_timing.swept(case, hook, rates, cache, options.seconds / 2)
                if hook
                else gpu_timing.measured(
                    case, rates, cache, options.seconds, options.without | gpu_record.harmful(lines, case.key)
                )
            )
        except gpu_timing.DeviceLostError as error:
            rows = [{**row, "key": key, "part": part.name} for row in error.rows if row.get("lost")]
            gpu_record.append(options.record, rows)
            sys.stdout.flush()
            os._exit(LOST)  # nothing that would use the device
        gpu_record.append(options.record, rows)
        gc.collect()
        torch.cuda.empty_cache()


def train_or_sample(options: Options, part: Part, left: float) -> None:
    """The contestants of training or sampling that have no rows yet."""
    from benchmarks import gpu_steps

    end = time.monotonic() + left
    try:
        complete = gpu_steps.run_part(part, options.record, options.step_seconds, end)
    except gpu_steps.DeviceLostError:
        sys.stdout.flush()
        os._exit(LOST)  # nothing that would use the device
    if not complete:
        sys.exit(LATER)


def script(options: Options, part: Part) -> None:
    """A script of another library before and after, where that library is installed."""
    from benchmarks import gpu_scripts

    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        status, output = captured(gpu_scripts.command(part.name, options.tiny, reports), options)
        lines = gpu_scripts.lines_of(part.name, reports) if (reports / "junit.xml").exists() else []
    gpu_record.append(options.record, lines)
    counts, failures = summary_of(output)
    check(options, part.name, part.name, status in (0, 5), counts, failures)


def swept_cases() -> list[Case]:
    """The shape that each network spends most on, forward and backward."""
    return [case for part in parts() if part.name.startswith("group_norm_silu") for case in part.cases[:2]]


def work(options: Options, name: str, left: float = float("inf")) -> None:
    named = {"build": build, "tests": tests, "sanitizer": sanitizer, "selection": selection}
    if name in named:
        named[name](options)
        return
    part = next(part for part in every_part(options.tiny) if part.name == name)
    if part.group == "steps":
        train_or_sample(options, part, left)
    elif part.group == "scripts":
        script(options, part)
    else:
        measure(options, part)


# The command line.


def listing(lines: list[Line], all_parts: list[Part], with_cases: bool) -> list[str]:
    done, timed, stepped = gpu_record.ended(lines), gpu_record.timed(lines), gpu_record.stepped(lines)
    took = {line["part"]: line["seconds"] for line in lines if line.get("kind") == "end"}
    text = []
    for part in all_parts:
        is_steps = part.group == "steps"
        keys = [(c.key, name) for c in part.cases for name in (c.names() if is_steps else [""])]
        ready = [key in stepped if is_steps else key[0] in timed for key in keys]
        cases = f", {sum(ready)} of {len(keys)} {'contestants' if is_steps else 'cases'}" if keys else ""
        about = f", about {part.predicted:.0f} s" if part.predicted else ""
        state = f"to do{about}, at most {part.limit:.0f} s"
        if part.name in done:
            state = f"complete, {took[part.name]:.0f} s"
        text.append(f"{part.name:<42}{state}{cases}")
        if with_cases:
            text += [f"    {' '.join(key)}".rstrip() + ("  done" if there else "")
                     for key, there in zip(keys, ready, strict=True)]  # fmt: skip
    left = sum(part.predicted for part in all_parts if part.name not in done)
    return [*text, *([f"what is left with an estimate: about {left / 60:.0f} min"] if left else [])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where record, log, table and plot go")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="for all parts of this call (8.5)")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of turns for each case (0.15)")
    parser.add_argument("--step-seconds", type=float, default=Options.step_seconds,
                        help="of turns for each contestant of training and sampling (2)")  # fmt: skip
    parser.add_argument("--group", choices=(*GROUPS, "all"), default="ops", help="what to run or list (ops)")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="these parts alone; * and ? match")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --tiny, to try the code")
    parser.add_argument("--tiny", action="store_true", help="training, sampling and scripts of a small network")
    parser.add_argument("--again", nargs="*", default=[], metavar="PART", help="parts to run again though complete")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contestants to leave out: compile ..")
    parser.add_argument("--parts", action="store_true", help="list the parts, and what is done")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--left", type=float, default=float("inf"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.tiny:
        parser.error("expected --tiny with --device cpu: the networks are those for a GPU")
    all_parts = every_part(given.tiny)
    names = [part.name for part in all_parts]
    wanted_names = {name for pattern in given.only for name in fnmatch.filter(names, pattern)}
    unknown = {p for p in given.only if not fnmatch.filter(names, p)} | {*given.again} - {*names}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; see --parts --group all")
    options = Options(
        given.out.resolve(), given.minutes, given.seconds, given.step_seconds, frozenset(given.without), given.tiny,
        given.device,
    )  # fmt: skip
    if given.worker:
        work(options, given.worker, given.left)
        return 0
    asked = [part for part in all_parts if (part.name in wanted_names if given.only else
             given.group in ("all", part.group))]  # fmt: skip
    if not given.tiny and all_parts[0] not in asked and any(part.group != "ops" for part in asked):
        asked.insert(0, all_parts[0])  # the kernels are built first
    lines = gpu_record.read(options.record)
    if given.parts or given.dry_run:
        print("\n".join(listing(lines, asked, given.dry_run)))
        return 0

    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu_suite: expected a CUDA GPU, got none that torch can use; "
              "--parts, --dry-run and --device cpu --tiny need none", file=sys.stderr)  # fmt: skip
        return 2
    now = about(given.device)
    reason = differs(gpu_record.about(lines), now)
    if reason is not None:
        print(f"benchmarks.gpu_suite: {reason}", file=sys.stderr)
        return 2
    if not lines:
        gpu_record.append(options.record, [now])
    gpu_record.append(options.record, [{"kind": "again", "part": name} for name in given.again])
    run_parts(options, pending(gpu_record.read(options.record), asked))
    for path in gpu_report.write(options.record, names):
        print(path)
    status = status_of(gpu_record.read(options.record), asked)
    words = {0: "complete", 1: "complete, with failures: see the table", 3: "not complete: the same command goes on"}
    print(words[status])
    return status


if __name__ == "__main__":
    sys.exit(main())
