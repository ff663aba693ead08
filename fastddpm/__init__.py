"""Denoising diffusion models (DDPM), trained and sampled at hardware speed.

The two objects to know are `GaussianDiffusion`, which turns a network into a model of images, and `Trainer`, which
trains it.
"""

from ._dispatch import explain, use_backend
from .diffusion import DiffusionConfig, GaussianDiffusion
from .nn import UNet, UNetConfig
from .ops import (
    adam_ema,
    conv3x3,
    diffusion_loss,
    group_norm_silu,
    linear,
    q_sample,
    rms_norm_silu,
    self_attention,
    solver_step,
)
from .optimization import optimize, restore
from .schedule import Schedule, make_schedule
from .training import TrainConfig, Trainer, load_diffusion, load_images

__version__ = "0.1.0"
__all__ = [
    "DiffusionConfig",
    "GaussianDiffusion",
    "Schedule",
    "TrainConfig",
    "Trainer",
    "UNet",
    "UNetConfig",
    "adam_ema",
    "conv3x3",
    "diffusion_loss",
    "explain",
    "group_norm_silu",
    "linear",
    "load_diffusion",
    "load_images",
    "make_schedule",
    "optimize",
    "q_sample",
    "restore",
    "rms_norm_silu",
    "self_attention",
    "solver_step",
    "use_backend",
]
