"""The CUDA part of `make test-all` as a record: what ran, how it ended, and the kernels as compiled.

    python -m tests.cuda.record --jobs 2 >tests/cuda/records/test-all.json

It runs every test of tests/cuda and those of Triton's binaries, the slow ones too, on the library that is built. It may
share the machine with others, so no test has less than an hour.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastddpm import _native
from tests.cuda import binaries, emulated

TESTS = ("tests/cuda", "tests/ops/test_triton_binaries.py")
RECORD = Path(__file__).parent / "records" / "test-all.json"
SLOWEST = 12
PLUGIN = "tests.cuda.record"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As a plugin of pytest: an hour for each test."""
    for item in items:
        item.add_marker(pytest.mark.timeout(3600), append=False)


def outcomes(junit: Path) -> dict[str, Any]:
    """How the tests of a report ended, in what time, and how many tests ran inside them, under the emulation."""
    cases = list(ET.parse(junit).getroot().iter("testcase"))
    bad = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    counts = Counter({"passed": 0, "failed": 0, "skipped": 0})
    reasons: Counter[str] = Counter()
    failed: list[str] = []
    seconds: dict[str, float] = {}
    inside = 0
    for case in cases:
        name = f"{case.get('classname')}.{case.get('name')}"
        ended = next((child for child in case if child.tag in bad), None)
        counts["passed" if ended is None else bad[ended.tag]] += 1
        if ended is not None and ended.tag == "skipped":
            reasons[ended.get("message") or ""] += 1
        elif ended is not None:
            failed.append(name)
        inside += sum(int(p.get("value") or 0) for p in case.iter("property") if p.get("name") == "emulated tests")
        seconds[name] = round(float(case.get("time") or 0), 1)
    slowest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST])
    return {
        "tests": dict(counts),
        "failed": failed,
        "skipped because": dict(reasons),
        "tests under the emulation": inside,
        "slowest, seconds": slowest,
    }


def sources() -> str:
    """A digest of the kernels' sources and of the emulation: what a record is of."""
    of_cuda = [p for p in (emulated.ROOT / "csrc").rglob("*") if "cuda" in str(p.relative_to(emulated.ROOT / "csrc"))]
    files = sorted(p for p in (*of_cuda, *emulated.EMULATION.iterdir()) if p.is_file())
    return emulated.digest([str(p.relative_to(emulated.ROOT)) for p in files], files)


def kernels(arch: str) -> dict[str, int]:
    """What the library has for an architecture."""
    found = binaries.binaries(arch)
    return {
        "kernels": len(found),
        "most registers": max(b.registers for b in found),
        "with local memory": sum(b.stack + b.local > 0 for b in found),
        "hot kernels": len(binaries.hot(found)),
        "hot kernels not as planned": sum(bool(binaries.complaints(rule, b)) for rule, b in binaries.hot(found)),
    }


def said(command: list[str]) -> str | None:
    """The first line that a command prints, where it can be run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=emulated.ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(run.stdout.splitlines()), None)


def run(jobs: str, tests: tuple[str, ...] = TESTS, archs: list[str] | None = None) -> dict[str, Any]:
    """Run the tests, which may fail; the record says so."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", *tests, "--run-slow", "-n", jobs, "--dist", "worksteal"]
        command += ["-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(emulated.ROOT)}
        environment["PYTEST_ADDOPTS"] = f"-p {PLUGIN}"
        begin = time.perf_counter()
        done = subprocess.run(
            [*command, f"--junitxml={junit}"], cwd=emulated.ROOT, stdout=sys.stderr, stderr=sys.stderr, env=environment
        )
        seconds = time.perf_counter() - begin
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = outcomes(junit)
    info = _native.build_info()
    return {
        "command": " ".join(["python", *command[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": said(["git", "rev-parse", "--short", "HEAD"]),
        "changed": said(["git", "status", "--short", "--untracked-files=no"]) is not None,
        "sources": sources(),
        "exit status": done.returncode,
        **found,
        "seconds": round(seconds),
        "CPU seconds": round(used.ru_utime + used.ru_stime),
        "architectures": {arch: kernels(arch) for arch in archs or binaries.architectures()},
        "nvcc": info["cuda"]["nvcc"],
        "compiler": said([emulated.compiler() or "g++", "--version"]),
        "packages": {name: info["packages"].get(name) for name in ("torch", "triton")},
        "python": platform.python_version(),
        "cpu": info["cpu"],
        "cpus": info["cpus"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="auto", help="test processes (default: one for each core)")
    record = run(parser.parse_args().jobs)
    print(json.dumps(record, indent=2))
    raise SystemExit(record["exit status"])


if __name__ == "__main__":
    main()
