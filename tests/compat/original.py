"""denoising-diffusion-pytorch 2.3.4 itself with its trainers, where it and what these need is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest

PACKAGE = "denoising_diffusion_pytorch"
NEEDED = (PACKAGE, "einops", "scipy", "torchvision", "accelerate", "ema_pytorch")


def skip_unless_installed(*needed: str) -> None:
    """Skip the test, by the name of the first package that is missing."""
    missing = next((name for name in needed if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        pytest.skip(f"peer: needs {missing}; pip install --no-deps {' '.join(NEEDED)}")


def original() -> types.ModuleType:
    """The package. torchvision is imported without its kernels, which no test uses: those on the package index are for
    CUDA, and do not load beside a torch for CPUs."""
    skip_unless_installed(*NEEDED)
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    with contextlib.suppress(ImportError):
        if "torchvision" not in sys.modules:
            kernels = "torchvision._meta_registrations"
            sys.modules[kernels] = types.ModuleType(kernels)
    return importlib.import_module(PACKAGE)
