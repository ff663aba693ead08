"""How a timing is taken, and the table that a run ends in: time, bytes, floor, share of the floor reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastddpm import _native


@dataclass(frozen=True)
class Row:
    """One timing: the best time, the bytes that the op must move, and the time to copy as many."""

    group: str
    implementation: str
    seconds: float
    bytes: int
    floor: float


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-threads", type=int, default=1, help="threads that torch computes with (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    torch.set_num_threads(config.getoption("--bench-threads"))


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Time one implementation of one case; ``size`` is the least number of bytes that the op reads and writes."""

    def run(function: Callable[[], object], *, group: str, implementation: str, size: int) -> None:
        benchmark.group = group
        benchmark(function)
        if benchmark.stats is not None:  # None where benchmarks are disabled, and each function only runs once
            row = Row(group, implementation, benchmark.stats.stats.min, size, copy_seconds(size))
            benchmark.extra_info.update(bytes=size, floor_seconds=row.floor, threads=torch.get_num_threads())
            pytestconfig.stash[ROWS].append(row)

    return run


def copy_seconds(size: int, repeats: int = 20) -> float:
    """The best time to read size / 2 bytes and write as many: the floor of an op that moves ``size`` bytes."""
    source = torch.ones(size // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return best


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    info = _native.build_info()
    write = terminalreporter.write_line
    terminalreporter.section("share of the floor")
    write(f"{info['cpu']}, {info['cpus']} processors, {torch.get_num_threads()} thread(s), {info['platform']}")
    write(f"{info['python']}, torch {torch.__version__}, native module: {info['reason'] or 'yes'}")
    write("times are the best of many; floor: the time to copy as many bytes as the op must move, measured beside it")
    write("")
    write(f"{'op and shape':<42}{'implementation':<15}{'ms':>9}{'MB':>8}{'floor ms':>10}{'share':>8}{'to eager':>14}")
    eager = {row.group: row.seconds for row in rows if row.implementation == "eager"}
    for row in sorted(rows, key=lambda row: (row.group, row.implementation)):
        ratio = f"{eager[row.group] / row.seconds:.2f}x" if row.group in eager else "not measured"
        write(
            f"{row.group:<42}{row.implementation:<15}{row.seconds * 1e3:>9.3f}{row.bytes / 1e6:>8.2f}"
            f"{row.floor * 1e3:>10.3f}{row.floor / row.seconds:>8.1%}{ratio:>14}"
        )
