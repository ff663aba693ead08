"""The ops: each a folder with its interface, its reference in plain PyTorch and its faster implementations."""

from .adam_ema import adam_ema
from .conv3x3 import conv3x3
from .diffusion_loss import diffusion_loss
from .group_norm_silu import group_norm_silu
from .linear import linear
from .normal import normal
from .q_sample import q_sample
from .rms_norm_silu import rms_norm_silu
from .self_attention import self_attention
from .solver_step import solver_step

__all__ = [
    "adam_ema",
    "conv3x3",
    "diffusion_loss",
    "group_norm_silu",
    "linear",
    "normal",
    "q_sample",
    "rms_norm_silu",
    "self_attention",
    "solver_step",
]
