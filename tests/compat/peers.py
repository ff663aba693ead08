"""denoising-diffusion-pytorch as it is installed: the parts that need no torchvision and no accelerate."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.peers.contestants import NOT_NEEDED, PACKAGES, stand_ins
from tests.compat.original import leave_out_kernels_of_torchvision

LUCIDRAINS = "denoising-diffusion-pytorch"
MISSING = [name for name in PACKAGES[LUCIDRAINS] if importlib.util.find_spec(name) is None]
with_lucidrains = [
    pytest.mark.peer,
    pytest.mark.skipif(bool(MISSING), reason=f"peer: needs {', '.join(MISSING)}; see `make bench-peers`"),
]
"""The marks of a test that compares with that package."""


def lucidrains(name: str = "denoising_diffusion_pytorch") -> Any:
    """A module of that package, without its progress bars."""
    leave_out_kernels_of_torchvision()
    with stand_ins(NOT_NEEDED):
        module: Any = importlib.import_module(f"denoising_diffusion_pytorch.{name}")
    if hasattr(module, "tqdm"):
        module.tqdm = lambda steps, **_: steps
    return module


def seeded(call: Callable[..., Any], *args: Any, seed: int = 3, **kwargs: Any) -> Any:
    """What a call returns after a user's seeds."""
    torch.manual_seed(seed)
    random.seed(seed)
    return call(*args, **kwargs)
