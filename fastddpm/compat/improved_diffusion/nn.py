"""The small functions that improved-diffusion's networks and training are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ._exports import refuse

SiLU = nn.SiLU
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """A group norm that computes in float32 at least, and gives the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to the same."""
        return super().forward(input.float()).to(input.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The group norm of this family: 32 groups."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over 1, 2 or 3 axes."""
    convolution: nn.Module = CONVOLUTIONS[_dims("conv_nd", dims)](*args, **kwargs)
    return convolution


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over 1, 2 or 3 axes."""
    pool: nn.Module = POOLS[_dims("avg_pool_nd", dims)](*args, **kwargs)
    return pool


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """target <- rate target + (1 - rate) source, all tensors in two launches."""
    targets = [p.detach() for p in target_params]
    torch._foreach_mul_(targets, rate)
    torch._foreach_add_(targets, [p.detach() for p in source_params], alpha=1 - rate)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to 0; returns the module."""
    return scale_module(module, 0.0)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters; returns the module."""
    for p in module.parameters():
        p.zero_() if scale == 0 else p.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean of each row over all other axes: [B, ...] to [B]."""
    return tensor.flatten(1).mean(dim=1)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """[cos(w_i t) .. sin(w_i t)], w_i = max_period^(-i / (d / 2)): float32 [B, dim], the last 0 where dim is odd."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))
    angle = timesteps[:, None].float() * frequency
    return nn.functional.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """func(*inputs); with ``flag`` it is computed again in backward, in place of keeping what it made."""
    return torch_checkpoint(func, *inputs, use_reentrant=False) if flag else func(*inputs)


def _dims(op: str, dims: int) -> int:
    if dims not in CONVOLUTIONS:
        raise ValueError(f"{op}: expected dims to be 1, 2 or 3, got {dims!r}; images have 2")
    return dims


__getattr__ = refuse(
    __name__,
    (
        "SiLU", "GroupNorm32", "normalization", "conv_nd", "avg_pool_nd", "linear", "update_ema", "zero_module",
        "scale_module", "mean_flat", "timestep_embedding", "checkpoint",
    ),
)  # fmt: skip
