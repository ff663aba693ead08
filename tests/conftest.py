"""What every test runs under, and the tests that this machine cannot run, skipped by name."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from typing import Any

import pytest
import torch

from fastddpm import _native


def _take_scalars_as_numpy_does() -> None:
    """In the interpreter of a Triton before 3.7.1, as torch 2.11 brings: numpy 2.4 makes no int of an array [1]."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available():
    # Triton decides when it is imported: kernels then run in its interpreter, on tensors in the memory of the host
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") and importlib.metadata.version("triton") in ("3.6.0", "3.7.0"):
        _take_scalars_as_numpy_does()

if os.environ.get("FASTDDPM_EMULATED"):  # tests/cuda: the CUDA kernels, on a CPU, take the place of those for it
    assert _native.available()  # which loads the module: what is registered last is what runs
    torch.ops.load_library(os.environ["FASTDDPM_EMULATED"])
    if os.environ.get("FASTDDPM_EMULATED_PLAN"):  # slab, cluster, way: how group_norm_silu is cut in all tests
        ctypes.CDLL(os.environ["FASTDDPM_EMULATED"]).fastddpm_group_norm_plan(
            *map(int, os.environ["FASTDDPM_EMULATED_PLAN"].split(","))
        )


# Why the CUDA C++ kernels may be missing; any other reason is a failure.
WITHOUT_NVCC = ("no nvcc", "FASTDDPM_NO_CUDA", "there is no native code", "this version has no kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA GPU"
    if torch.version.cuda is None:
        reasons["cuda"] = "needs a torch that is built for CUDA"
    if (_native.cuda_reason() or "").startswith(WITHOUT_NVCC):
        reasons["nvcc"] = f"needs the CUDA C++ kernels: {_native.cuda_reason()}"
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
    for marker in ("gpu", "cuda", "nvcc", "peer"):
        names = sorted(report.nodeid for report in skipped if f"Skipped: {marker}: " in str(report.longrepr))
        if names or marker == "gpu":
            terminalreporter.section(f"{marker} tests skipped: {len(names)}")
            for name in names:
                terminalreporter.write_line(name)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread, since results may depend on their number and xdist runs a process on each core; one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
