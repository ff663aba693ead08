"""The schedulers of diffusers 0.42.1, each step one kernel: change the import line, or call `install` on a pipeline.

    from fastddpm.compat.diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, install

They have its constructor arguments, configuration files and methods, give its results, draw from torch's generators in
its order, and reproduce its rules where these are open to question; the docstring of each scheduler names those, and
``corrected=True`` selects ours. diffusers need not be installed, unless its pipelines are used.
"""

from __future__ import annotations

from typing import Any

from .ddim import DDIMScheduler, DDIMSchedulerOutput
from .ddpm import DDPMScheduler, DDPMSchedulerOutput
from .dpm_solver import DPMSolverMultistepScheduler
from .outputs import SchedulerOutput
from .pipelines import install

__all__ = [
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DDPMSchedulerOutput",
    "DPMSolverMultistepScheduler",
    "SchedulerOutput",
    "install",
]


def __getattr__(name: str) -> Any:
    if name[:1].isupper():  # a class of the original; Python itself asks for modules and for what begins with _
        raise ImportError(
            f"{__name__}: expected one of {', '.join(__all__)}, got {name}; take that one from diffusers itself",
            name=name,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
