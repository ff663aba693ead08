"""GroupNorm followed by SiLU, as a module over the op `fastddpm.ops.group_norm_silu`.

    y = silu((h - mean) / sqrt(var + eps) * weight + bias),   silu(a) = a / (1 + exp(-a))

Mean and variance are those of each group of channels of each sample (Wu and He 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import group_norm_silu


class GroupNormSiLU(nn.Module):
    """The weights of a group norm; what else the op takes is given at the call.

    Args:
        channels: C, divisible by num_groups.
        num_groups: number of groups.
        eps: added to the variance, > 0.
        activation: False leaves out the SiLU.
    """

    def __init__(self, channels: int, num_groups: int = 32, eps: float = 1e-6, *, activation: bool = True) -> None:
        super().__init__()
        self.num_groups, self.eps, self.activation = num_groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        dropout: float = 0.0,
        seed: Tensor | int | None = None,
        sample: Tensor | None = None,
        step: Tensor | int | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Normalise x [B, C, H, W] in its own memory format; the options are those of the op."""
        y = group_norm_silu(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            eps=self.eps,
            x2=x2,
            channel_bias=channel_bias,
            scale=scale,
            shift=shift,
            dropout=dropout,
            seed=seed,
            sample=sample,
            step=step,
            layer=layer,
            activation=self.activation,
        )
        assert isinstance(y, Tensor)  # a pair comes only of a call with a residual
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, num_groups={self.num_groups}, eps={self.eps}, activation={self.activation}"
