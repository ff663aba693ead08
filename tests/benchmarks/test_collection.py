"""What `pytest benchmarks` collects: other libraries take part in a timing where they are asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS, STEP, PEERS = "benchmarks/test_ops.py", "benchmarks/test_training_step.py", "benchmarks/peers"


def collected(*arguments: str) -> str:
    """As a person at a terminal, not as a process of xdist, in which nothing is timed."""
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


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
