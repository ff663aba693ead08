"""denoising-diffusion-pytorch 2.3.4 itself with its trainers, where it and what these need is installed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGE = "denoising_diffusion_pytorch"
NEEDED = (PACKAGE, "einops", "scipy", "torchvision", "accelerate", "ema_pytorch")


def skip_unless_installed(*needed: str) -> None:
    """Skip the test, by the name of the first package that is missing."""
    missing = next((name for name in needed if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        pytest.skip(f"peer: needs {missing}; pip install --no-deps {' '.join(NEEDED)}")


def original() -> types.ModuleType:
    """The package."""
    skip_unless_installed(*NEEDED)
    leave_out_kernels_of_torchvision()
    return importlib.import_module(PACKAGE)


def leave_out_kernels_of_torchvision() -> None:
    """Let it be imported without them, since no test uses them: those of the package index are for CUDA, and do not
    load beside a torch for CPUs."""
    if "torchvision" not in sys.modules:
        kernels = "torchvision._meta_registrations"
        sys.modules.setdefault(kernels, types.ModuleType(kernels))


def form(contents: Any, name: str = "") -> list[str]:
    """What is in a checkpoint, in order: names with types, shapes and dtypes, but not the numbers in tensors."""
    if isinstance(contents, dict):
        return [line for key, value in contents.items() for line in form(value, f"{name}/{key}") if key != "fastddpm"]
    if isinstance(contents, torch.Tensor):
        return [f"{name} {list(contents.shape)} {contents.dtype} {contents.device}"]
    return [f"{name} {type(contents).__name__} {contents}"]


def write_checkpoint(library: Any, folder: Path, results: Path) -> Any:
    """The contents of a checkpoint of two steps of a small network, by the original or by ours."""
    diffusion = library.GaussianDiffusion(library.Unet(dim=8, dim_mults=(1, 2)), image_size=8, timesteps=5)
    trainer = library.Trainer(
        diffusion, folder, train_num_steps=2, save_and_sample_every=2, num_samples=1, calculate_fid=False,
        results_folder=results,
    )  # fmt: skip
    trainer.train()
    return torch.load(results / "model-1.pt", weights_only=True)


FORM = (891, "2b55e264dceb27ba")
"""Lines of `form` of what the original writes, and the first digits of their SHA-256."""


def digest(lines: list[str]) -> tuple[int, str]:
    """As in `FORM`."""
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
