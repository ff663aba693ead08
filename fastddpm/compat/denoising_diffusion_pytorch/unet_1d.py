"""The 1-D network of denoising-diffusion-pytorch, with its names: sequences as images of one row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import check_shape
from .blocks import Attention, LinearAttention, ResnetBlock, RMSNorm, RowConv
from .unet import run, time_mlp


class Unet1D(nn.Module):
    """The network for sequences: 2.3.4's signature, defaults, names in the state dict, first weights.

    It is `Unet` with convolutions of width 3 along the sequence, without learned keys and values; linear attention, of
    4 heads of 32 channels, at every level; full attention in the middle alone.

    Args:
        dim, init_dim, out_dim, dim_mults, channels, dropout, self_condition, learned_variance, learned_sinusoidal_cond,
            random_fourier_features, learned_sinusoidal_dim, sinusoidal_pos_emb_theta: as in `Unet`.
        attn_dim_head, attn_heads: of the attention in the middle.

    Attributes: channels, out_dim, self_condition, random_or_learned_sinusoidal_cond.

    Raises:
        ValueError: a number that does not fit.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        dropout: float = 0.0,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        attn_dim_head: int = 32,
        attn_heads: int = 4,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"Unet1D: expected dim even and >= 4, got {dim}; 64 is usual")
        self.channels, self.self_condition = channels, self_condition
        init_dim = dim if init_dim is None else init_dim
        self.init_conv = RowConv(channels * (2 if self_condition else 1), init_dim, 7, padding=3)

        width = dim * 4
        self.random_or_learned_sinusoidal_cond = learned_sinusoidal_cond or random_fourier_features
        self.time_mlp = time_mlp(
            dim, width, self.random_or_learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim,
            sinusoidal_pos_emb_theta,
        )  # fmt: skip
        block = partial(ResnetBlock, time_emb_dim=width, dropout=dropout, conv=RowConv)

        widths = [init_dim, *(dim * m for m in dim_mults)]
        pairs = list(pairwise(widths))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()  # in the order that an optimizer's state counts in
        for i, (c_in, c_out) in enumerate(pairs):
            parts: list[nn.Module] = [block(c_in, c_in), block(c_in, c_in), _linear(c_in)]
            last = i == len(pairs) - 1
            parts.append(RowConv(c_in, c_out, 3, padding=1) if last else RowConv(c_in, c_out, 4, 2, 1))
            self.downs.append(nn.ModuleList(parts))

        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        attention = Attention(middle, attn_heads, attn_dim_head, num_mem_kv=0, prenorm=False, conv=RowConv)
        self.mid_attn = Prenormed(middle, attention)
        self.mid_block2 = block(middle, middle)

        for i, (c_in, c_out) in reversed(list(enumerate(pairs))):
            parts = [block(c_out + c_in, c_out), block(c_out + c_in, c_out), _linear(c_out)]
            parts.append(RowConv(c_out, c_in, 3, padding=1) if i == 0 else RowUpsample(c_out, c_in))
            self.ups.append(nn.ModuleList(parts))

        self.out_dim = channels * (2 if learned_variance else 1) if out_dim is None else out_dim
        self.final_res_block = block(init_dim * 2, init_dim)
        self.final_conv = RowConv(init_dim, self.out_dim, 1)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict from noisy sequences at their times.

        Args:
            x: [B, C, N], float, N divisible by 2^(levels - 1).
            time: [B], integer or float.
            x_self_cond: [B, C, N], the last prediction; None is 0. Without effect unless ``self_condition``.

        Returns: [B, out_dim, N] in the dtype of the weights or of autocast.

        Raises:
            ValueError: a shape that does not fit.
        """
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise ValueError(
                f"Unet1D: expected x of shape [B, {self.channels}, N], got {list(x.shape)}; "
                "reshape it, or build the network with another channels"
            )
        factor = 2 ** (len(self.downs) - 1)
        if x.shape[2] % factor:
            raise ValueError(
                f"Unet1D: expected x of a length divisible by {factor}, got {x.shape[2]}; "
                "pad the sequences, or give dim_mults fewer levels"
            )
        check_shape("Unet1D", "time", time, (x.shape[0],))
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        x = x.unsqueeze(2).to(dtype=self.init_conv.weight.dtype, memory_format=torch.channels_last)
        return run(self, x, self.time_mlp(time)).squeeze(2).contiguous()


class Prenormed(nn.Module):
    """x to fn(norm(x)), under the names fn.norm and fn.fn."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"fn": fn, "norm": RMSNorm(dim, 3)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1, N] to the same."""
        out: Tensor = self.fn["fn"](self.fn["norm"](x))
        return out


class RowUpsample(nn.Sequential):
    """Twice the length: each element is repeated, then a convolution of width 3."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(nn.Identity(), RowConv(dim, dim_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, 1, N] to [B, dim_out, 1, 2N]."""
        x = F.interpolate(x.to(memory_format=torch.channels_last), scale_factor=(1.0, 2.0), mode="nearest")
        out: Tensor = self[1](x)
        return out


def _linear(dim: int) -> Prenormed:
    return Prenormed(dim, LinearAttention(dim, num_mem_kv=0, prenorm=False, conv=RowConv))
