"""The interface of improved-diffusion (Nichol and Dhariwal 2021), over our network, our tables and our ops.

A script of it runs with its import lines changed: `from improved_diffusion.script_util import ...` becomes
`from fastddpm.compat.improved_diffusion.script_util import ...`, and so on for the modules named below; what is asked
for most is here, too. Neither mpi4py nor blobfile is needed. docs/migrate/improved-diffusion.md says what is the same
and what is not.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._exports import refuse
from .gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from .resample import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from .respace import SpacedDiffusion, space_timesteps
from .script_util import (
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from .unet import SuperResModel, UNetModel

MODULES = (
    "dist_util", "gaussian_diffusion", "image_datasets", "logger", "losses", "nn", "resample", "respace", "script_util",
    "train_util", "unet",
)  # fmt: skip
__all__ = [
    "GaussianDiffusion",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "ScheduleSampler",
    "SpacedDiffusion",
    "SuperResModel",
    "UNetModel",
    "UniformSampler",
    "betas_for_alpha_bar",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "create_named_schedule_sampler",
    "get_named_beta_schedule",
    "model_and_diffusion_defaults",
    "space_timesteps",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return refuse(__name__, (*__all__, *MODULES))(name)
