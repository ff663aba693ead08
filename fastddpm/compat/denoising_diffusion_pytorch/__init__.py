"""The interface of denoising-diffusion-pytorch 2.3.4 over our kernels: a script changes its import line.

    from fastddpm.compat.denoising_diffusion_pytorch import Unet, GaussianDiffusion, Trainer

Signatures, defaults, names in a state dict and the order in which random numbers are drawn are those of that package,
so weights move either way and a seed gives the same images. docs/migrate/denoising-diffusion-pytorch.md says what
differs.
"""

from __future__ import annotations

import importlib
from typing import Any

from .diffusion import GaussianDiffusion, LearnedGaussianDiffusion
from .diffusion_1d import GaussianDiffusion1D
from .explorative import XMWrapper
from .unet import Unet
from .unet_1d import Unet1D

__all__ = [
    "Dataset",
    "Dataset1D",
    "GaussianDiffusion",
    "GaussianDiffusion1D",
    "LearnedGaussianDiffusion",
    "Trainer",
    "Trainer1D",
    "Unet",
    "Unet1D",
    "XMWrapper",
]
_OF_TRAINER = ("Dataset", "Dataset1D", "Trainer", "Trainer1D")  # imported when they are asked for
_NOT_HERE = (
    "ContinuousTimeGaussianDiffusion",
    "ElucidatedDiffusion",
    "InvSqrtDecayLRSched",
    "KarrasUnet",
    "KarrasUnet1D",
    "KarrasUnet3D",
    "VParamContinuousTimeGaussianDiffusion",
    "WeightedObjectiveGaussianDiffusion",
)
"""What that package exports beside these."""


def __getattr__(name: str) -> Any:
    if name in _OF_TRAINER:
        return getattr(importlib.import_module(".trainer", __name__), name)
    if name in _NOT_HERE:
        raise ImportError(
            f"fastddpm.compat.denoising_diffusion_pytorch: expected one of {', '.join(__all__)}, got {name}; "
            "take that one from denoising_diffusion_pytorch itself",
            name=name,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_TRAINER])
