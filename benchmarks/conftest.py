"""How contestants are timed, and the table and record that a run ends in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastddpm
from fastddpm import _native
from fastddpm._allocator import keep_freed_memory
from fastddpm.bench import GpuClock

Call = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Row:
    """One contestant of one case: the best time, and the least that the work can take.

    ``floor`` is the larger of the time to move as many bytes, measured in the same turns, and of the time in which the
    kernel that only draws draws as many normal numbers.
    """

    case: str
    dtype: str
    threads: int
    contestant: str
    seconds: float
    bytes: int
    floor: float
    to_eager: float


# By case, dtype, threads and contestant.
ROWS = pytest.StashKey[dict[tuple[str, str, int, str], Row]]()
BEST = pytest.StashKey[dict[tuple[str, str, int], dict[str, float]]]()
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastddpm")
    group.addoption("--bench-threads", default=None, help="threads, such as 1,3 (default: 1 and all cores but one)")
    group.addoption("--bench-seconds", type=float, default=0.7, help="seconds for each case (default 0.7)")
    group.addoption("--bench-rounds", type=int, default=1, help="times through all cases; the best counts (default 1)")
    group.addoption("--bench-record", type=Path, default=None, help="where the record goes (default: none is written)")
    # of benchmarks/peers; here, since pytest reads the options before it looks there
    settings = ("eager", "some", "all")
    least = "some" if torch.cuda.is_available() else "eager"  # Inductor takes a quarter of an hour on a few cores
    group.addoption("--peers-settings", choices=settings, default=least, help=f"what is compiled (default {least})")
    group.addoption("--peers-seconds", type=float, default=15.0, help="seconds for each contestant (default 15)")
    group.addoption("--peers-record", type=Path, default=None, help="where the record goes (default: none is written)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[BEST] = {}, {}
    if config.getoption("--bench-rounds") < 1:
        raise pytest.UsageError("--bench-rounds: all cases are gone through at least once: give 1 or more")
    keep_memory()


def peers_are_asked_for(config: pytest.Config) -> bool:
    """Whether one of the paths on the command line lies in benchmarks/peers."""
    paths = (config.invocation_params.dir / arg.partition("::")[0] for arg in config.args)
    return any(path.resolve().is_relative_to(PEERS) for path in paths)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Round after round. Other libraries, which take longer than all the ops, are timed when they are asked for."""
    items.sort(key=round_of)
    if not config.getoption("benchmark_only") or peers_are_asked_for(config):
        return
    left_out = [item for item in items if item.path.is_relative_to(PEERS)]
    config.stash[LEFT_OUT] = len(left_out)
    if left_out:
        items[:] = [item for item in items if not item.path.is_relative_to(PEERS)]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    count = config.stash.get(LEFT_OUT, 0)
    how = "pytest benchmarks/peers --benchmark-only, or make bench-peers"
    return [f"other libraries: {count} tests of benchmarks/peers left out; for these: {how}"] if count else []


def keep_memory() -> None:
    """Let the allocator keep what is freed, as it does in a long run, whatever samplers ask for: else a call may pay
    for new pages or not."""
    keep_freed_memory(True)


def threads_to_try(config: pytest.Config) -> list[int]:
    """OpenMP with as many threads as cores stalls when anything else runs: one core is left free. Where nothing
    is timed other tests run: all cores but one are."""
    if config._benchmarksession.disabled:  # type: ignore[attr-defined]
        return [1]
    wanted = config.getoption("--bench-threads")
    if wanted:
        return [int(n) for n in wanted.split(",")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, max(1, cores - 1)})


def round_of(item: pytest.Item) -> int:
    """A machine may be slowed down by others for minutes: all cases are gone through, then all again."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("bench_round", 0) if callspec else 0


@pytest.fixture(autouse=True)
def bench_round() -> None:
    """What `pytest_generate_tests` gives each round as."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rounds, of_peers = metafunc.config.getoption("--bench-rounds"), metafunc.definition.path.is_relative_to(PEERS)
    if rounds > 1 and "benchmark" in metafunc.fixturenames and not of_peers:
        names = [f"round {n + 1}" for n in range(rounds)]
        metafunc.parametrize("bench_round", range(rounds), ids=names, indirect=True)
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", threads_to_try(metafunc.config), ids=lambda n: f"{n} threads")


@pytest.fixture
def compare(benchmark: Any, pytestconfig: pytest.Config) -> Iterator[Callable[..., None]]:
    """Time the contestants of a case in turns; "eager" and "fastddpm" are among them."""
    before = torch.get_num_threads()

    def run(
        contestants: dict[str, Call], *, case: str, dtype: str, threads: int, size: int, normals: int = 0,
        updates: bool = False, seconds: float = 0.0, launches: bool = False,
    ) -> None:
        benchmark.group = f"{case} {dtype}, {threads} thread(s)"
        if benchmark.disabled:  # each runs once, to see that it runs
            for call in contestants.values():
                call()
            benchmark(lambda: None)
            return
        torch.set_num_threads(threads)
        floors = {"move": moving(size, updates)} | ({"draw": drawing(normals)} if normals else {})
        seconds = max(seconds, pytestconfig.getoption("--bench-seconds"))
        timed = turns({**contestants, **floors}, seconds, launches=launches)
        best = best_so_far(pytestconfig, (case, dtype, threads), timed)
        floor = max(best[name] for name in floors)
        for name in contestants:
            ratio = best["eager"] / best[name]
            keep_row(pytestconfig, Row(case, dtype, threads, name, best[name], size, floor, ratio))
        benchmark.extra_info.update(bytes=size, floor=floor, to_eager=best["eager"] / best["fastddpm"])
        benchmark.pedantic(contestants["fastddpm"], rounds=3)

    yield run
    torch.set_num_threads(before)


def keep_row(config: pytest.Config, row: Row) -> None:
    """In place of that of the round before."""
    config.stash[ROWS][row.case, row.dtype, row.threads, row.contestant] = row


def best_so_far(config: pytest.Config, case: tuple[str, str, int], timed: dict[str, float]) -> dict[str, float]:
    """The best time of each contestant in this round and those before it."""
    best = config.stash[BEST].setdefault(case, {})
    for name, seconds in timed.items():
        best[name] = min(seconds, best.get(name, seconds))
    return best


def turns(calls: dict[str, Call], seconds: float, *, launches: bool = True) -> dict[str, float]:
    """The best time of each, in turns for so many seconds, at least three.

    On a GPU ``launches`` says whether what the host does is in it. A step, a sampling or a script takes what its user
    waits for, until the device is idle. An op is one among many, whose launches need not be waited for: `GpuClock`.

    A turn is two to twenty calls in a row, about 4 ms of them: after a contestant that uses one thread the others
    sleep, and the first call to want them pays some 100 us for waking them, which a network that keeps them busy does
    not. And what fits in a cache is to be found there, by each contestant and by the floors alike: five calls do not
    make good what a large copy before them has driven out. The order of the turns is drawn anew each time: else one
    contestant would always come after that copy.
    """
    for call in calls.values():
        call()
    timed = {name: partial(waited, call) if launches else clock_of(call) for name, call in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    end, count, order = time.perf_counter() + seconds, 0, list(timed.items())
    draw = random.Random(0)
    while count < 3 or time.perf_counter() < end:
        draw.shuffle(order)
        for name, read in order:
            left, begin = 20, time.perf_counter()
            while left > 18 or (left > 0 and time.perf_counter() < begin + 4e-3):
                best[name] = min(best[name], read())
                left -= 1
        count += 1
    return best


def clock_of(call: Call) -> Callable[[], float]:
    """What reads the seconds of a call without its launches, of which a CPU has none."""
    return GpuClock(call).read if torch.cuda.is_available() else partial(waited, call)


def waited(call: Call) -> float:
    """Seconds until the device, which was idle, is so again."""
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def moving(size: int, updates: bool) -> Call:
    """Read size / 2 bytes and write as many, where they were read or elsewhere, at each call the same.

    A CPU first reads the memory that it writes, unless it has read it before: a copy moves half as many bytes again as
    it counts, and is no floor to what ``updates`` memory in place.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(max(1, size // 8), device=device)
    if updates:
        return source.neg_
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def drawing(normals: int) -> Call:
    """Draw so many normal numbers, and write them."""
    sample = torch.arange(1, device="cuda" if torch.cuda.is_available() else "cpu")
    return lambda: fastddpm.ops.normal((1, normals), seed=0, sample=sample, step=0, stream=1)


def machine() -> dict[str, Any]:
    """What a figure belongs to."""
    info = _native.build_info()
    native = info["native"] or {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else info["cpu"],
        "cpus": info["cpus"],
        "instruction set": native.get("instruction_set"),
        "compiler": native.get("compiler"),
        "packages": {name: version for name, version in info["packages"].items() if version},
        "python": info["python"],
        "platform": platform.platform(),
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = list(config.stash[ROWS].values())
    if not rows:
        return
    from benchmarks.report import TURNS, UPDATED, calls_in, lines_of, verdicts

    settings = {name: config.getoption(f"--bench-{name}") for name in ("seconds", "rounds")}
    about = machine() | {"floor": UPDATED, "turns": TURNS} | settings
    terminalreporter.section("against eager PyTorch")
    for line in (f"{name}: {value}" for name, value in about.items()):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    dicts = [asdict(row) for row in rows]
    for line in [*lines_of(dicts), "", *verdicts(dicts), *calls_in(dicts)]:
        terminalreporter.write_line(line)
    record = config.getoption("--bench-record")
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(json.dumps(row) for row in [about, *dicts])
        record.write_text(text + "\n", encoding="utf-8")
        terminalreporter.write_line(f"record: {record}")
