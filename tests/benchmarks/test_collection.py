"""What `pytest benchmarks` collects: other libraries take part in a timing where they are asked for, and rounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.conftest import BEST, best_so_far

ROOT = Path(__file__).parents[2]
OPS, STEP, PEERS = "benchmarks/test_ops.py", "benchmarks/test_training_step.py", "benchmarks/peers"


def pytest_of(*arguments: str) -> str:
    """As a person at a terminal, not as a process of xdist, in which nothing is timed."""
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def collected(*arguments: str) -> str:
    return pytest_of("--collect-only", *arguments)


def test_a_timing_of_the_ops_leaves_other_libraries_out() -> None:
    text = collected("benchmarks/", "--benchmark-only")
    assert f"{OPS}::test_op" in text and f"{STEP}::test_training_step" in text and f"{PEERS}/test_" not in text
    told = re.search(r"(\d+) tests of benchmarks/peers left out; for these: pytest benchmarks/peers --benchmark-", text)
    deselected = re.search(r"\((\d+) deselected\)", text)
    assert told and deselected and int(told[1]) == int(deselected[1]) > 0


@pytest.mark.parametrize(
    "arguments",
    [("benchmarks",), (f"{PEERS}/test_peers.py::test_memory", "--benchmark-only"), (PEERS, OPS, "--benchmark-only")],
    ids=["tests", "a file", "the folder and another"],
)
def test_other_libraries_are_there_where_they_are_asked_for(arguments: tuple[str, ...]) -> None:
    text = collected(*arguments)
    assert f"{PEERS}/test_peers.py::test_memory" in text and "left out" not in text


def test_rounds_go_through_all_cases_one_after_the_other() -> None:
    chosen = ("benchmarks/", "--benchmark-only", "--bench-threads=1", "-k", "(normal and bfloat16) or test_call")
    once = [line for line in collected(*chosen).splitlines() if "::" in line]
    twice = [line for line in collected(*chosen, "--bench-rounds=2").splitlines() if "::" in line]
    n = len(once)
    assert n > 2 and len(twice) == 2 * n
    assert all("round 1" in line for line in twice[:n]) and all("round 2" in line for line in twice[n:])


def test_the_best_of_all_rounds_counts(tmp_path: Path) -> None:
    """Each contestant has one row, and what it took in the slower round is not in it."""
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    config = SimpleNamespace(stash={BEST: best})
    case = ("an op", "float32", 1)
    assert best_so_far(config, case, {"eager": 3.0, "fastddpm": 2.0}) == {"eager": 3.0, "fastddpm": 2.0}
    assert best_so_far(config, case, {"eager": 2.5, "fastddpm": 4.0}) == {"eager": 2.5, "fastddpm": 2.0}
    assert best_so_far(config, ("an op", "float32", 3), {"eager": 9.0}) == {"eager": 9.0}

    record = tmp_path / "record.jsonl"
    chosen = ("benchmarks/test_ops.py", "--benchmark-only", "-k", "normal and bfloat16", "--bench-threads=1")
    pytest_of(*chosen, "--bench-seconds=0", "--bench-rounds=2", f"--bench-record={record}")
    about, *rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert about["rounds"] == 2 and [row["contestant"] for row in rows] == ["eager", "fastddpm"]
    assert rows[1]["to_eager"] == rows[0]["seconds"] / rows[1]["seconds"]
