"""What every test runs under, and the tests that this machine cannot run, skipped by name."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported: kernels then run in its interpreter, on tensors in the memory of the host
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("FASTDDPM_EMULATED"):  # tests/cuda: the CUDA kernels, on a CPU, take the place of those written for it
    from fastddpm import _native

    assert _native.available()  # which loads the module: what is registered last is what runs
    torch.ops.load_library(os.environ["FASTDDPM_EMULATED"])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA GPU"
    if importlib.util.find_spec("diffusers") is None:
        reasons["peer"] = "needs the extra: pip install fastddpm[peer]"
    if not config.getoption("--run-slow"):
        reasons["slow"] = "needs --run-slow"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that this machine could not run, and count them."""
    skipped = terminalreporter.stats.get("skipped", [])
    for marker in ("gpu", "peer"):
        names = sorted(report.nodeid for report in skipped if marker in report.keywords)
        if names or marker == "gpu":
            terminalreporter.section(f"{marker} tests skipped: {len(names)}")
            for name in names:
                terminalreporter.write_line(name)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread, since results may depend on their number and xdist runs a process on each core; one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
