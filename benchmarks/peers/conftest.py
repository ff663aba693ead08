"""The rows of a run, its summary and its record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from benchmarks.conftest import machine
from benchmarks.peers.records import Row
from benchmarks.peers.report import lines_of, verdicts

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> Iterator[list[Row]]:
    """Where rows go that the end of the run shows."""
    yield pytestconfig.stash.setdefault(ROWS, [])


def versions() -> dict[str, str]:
    """Of the libraries that take part and are installed."""
    found = {}
    for name in ("diffusers", "denoising-diffusion-pytorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = [asdict(row) for row in config.stash.get(ROWS, [])]
    if not found:
        return
    about = machine()
    about["packages"].update(versions())
    terminalreporter.section("against other libraries")
    for line in (f"{name}: {value}" for name, value in about.items()):
        terminalreporter.write_line(line)
    for line in ["", *lines_of(found), "", *verdicts(found)]:
        terminalreporter.write_line(line)
    record = config.getoption("--peers-record")
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("\n".join(json.dumps(row) for row in [about, *found]) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"record: {record}")
