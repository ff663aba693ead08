"""The 2-D network of denoising-diffusion-pytorch, with its names, over channels_last images and fused norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import check_shape
from ...nn.layers import Conv2d, UpsampledConv2d
from .blocks import (
    Attention,
    LinearAttention,
    RandomOrLearnedSinusoidalPosEmb,
    ResnetBlock,
    SinusoidalPosEmb,
    TimeMLP,
)

Value = TypeVar("Value")


class Unet(nn.Module):
    """The network of denoising-diffusion-pytorch: 2.3.4's signature, defaults, names in the state dict, first weights.

    With L = len(dim_mults) levels of H / 2^i x W / 2^i pixels, on the way down each level is residual block, residual
    block, attention, half the size; then residual block, full attention, residual block; on the way up each level joins
    one output of the way down before each of its two residual blocks. There is one more residual block at the end, over
    the result joined with that of the first convolution.

    Args:
        dim: width of the first level; the embedding of the time is four times as wide. Even and >= 4.
        init_dim: channels of the first convolution; None is dim.
        out_dim: channels of the result; None is ``channels``, twice that with a learned variance.
        dim_mults: width of each level in units of dim.
        channels: channels C of an image.
        self_condition: take a second image, the last prediction, beside the first.
        learned_variance: give 2C channels.
        learned_sinusoidal_cond, random_fourier_features: embed the time by trained, or by random frequencies.
        learned_sinusoidal_dim: twice the number of these, even.
        sinusoidal_pos_emb_theta: base of the frequencies that are neither.
        dropout: probability in [0, 1], in the residual blocks, in training.
        attn_dim_head, attn_heads: channels and number of the heads, a number or one for each level.
        full_attn: whether a level has full attention, not linear attention; one truth value or one for each level. None
            is the last level alone.
        flash_attn: accepted, and without effect: `torch.nn.functional.scaled_dot_product_attention` takes the fastest
            kernel that can run.

    Attributes: channels, out_dim, self_condition, random_or_learned_sinusoidal_cond, downsample_factor.

    Raises:
        ValueError: a number or a sequence that does not fit.

    Numerics: the result is that of denoising-diffusion-pytorch up to rounding, and so are the first weights after the
        same `torch.manual_seed`. What dropout drops depends on the seed alone, and is the same on a CPU.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        dropout: float = 0.0,
        attn_dim_head: int | Sequence[int] = 32,
        attn_heads: int | Sequence[int] = 4,
        full_attn: bool | Sequence[bool] | None = None,
        flash_attn: bool = False,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"Unet: expected dim even and >= 4, got {dim}; 64 is usual")
        self.channels, self.self_condition = channels, self_condition
        init_dim = dim if init_dim is None else init_dim
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), init_dim, 7, padding=3)

        width = dim * 4
        self.random_or_learned_sinusoidal_cond = learned_sinusoidal_cond or random_fourier_features
        self.time_mlp = time_mlp(
            dim, width, self.random_or_learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim,
            sinusoidal_pos_emb_theta,
        )  # fmt: skip

        levels = len(dim_mults)
        last_alone = tuple(i == levels - 1 for i in range(levels))
        full: tuple[bool, ...] = per_level("full_attn", full_attn or last_alone, levels)
        heads = per_level("attn_heads", attn_heads, levels)
        dim_heads = per_level("attn_dim_head", attn_dim_head, levels)
        block = partial(ResnetBlock, time_emb_dim=width, dropout=dropout)

        def attention(level: int, channels: int) -> nn.Module:
            kind = Attention if full[level] else LinearAttention
            return kind(channels, heads[level], dim_heads[level])

        widths = [init_dim, *(dim * m for m in dim_mults)]
        pairs = list(pairwise(widths))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()  # in the order that an optimizer's state counts in
        for i, (c_in, c_out) in enumerate(pairs):
            parts: list[nn.Module] = [block(c_in, c_in), block(c_in, c_in), attention(i, c_in)]
            parts.append(Conv2d(c_in, c_out, 3, padding=1) if i == levels - 1 else Downsample(c_in, c_out))
            self.downs.append(nn.ModuleList(parts))

        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        self.mid_attn = Attention(middle, heads[-1], dim_heads[-1])
        self.mid_block2 = block(middle, middle)

        for i, (c_in, c_out) in reversed(list(enumerate(pairs))):
            parts = [block(c_out + c_in, c_out), block(c_out + c_in, c_out), attention(i, c_out)]
            parts.append(Conv2d(c_out, c_in, 3, padding=1) if i == 0 else Upsample(c_out, c_in))
            self.ups.append(nn.ModuleList(parts))

        self.out_dim = channels * (2 if learned_variance else 1) if out_dim is None else out_dim
        self.final_res_block = block(init_dim * 2, init_dim)
        self.final_conv = Conv2d(init_dim, self.out_dim, 1)
        for p in self.parameters():
            if p.dim() == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

    @property
    def downsample_factor(self) -> int:
        """What height and width are divisible by."""
        return int(2 ** (len(self.downs) - 1))

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict from noisy images at their times.

        Args:
            x: [B, C, H, W], float, H and W divisible by ``downsample_factor``.
            time: [B], integer or float.
            x_self_cond: [B, C, H, W], the last prediction; None is 0. Without effect unless ``self_condition``.

        Returns: [B, out_dim, H, W], NCHW, in the dtype of the weights or of autocast.

        Raises:
            ValueError: a shape that does not fit.
        """
        self._check(x, time)
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        x = x.to(dtype=self.init_conv.weight.dtype, memory_format=torch.channels_last)
        return run(self, x, self.time_mlp(time)).contiguous()

    def _check(self, x: Tensor, time: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"Unet: expected x of shape [B, {self.channels}, H, W], got {list(x.shape)}; "
                "reshape it, or build the network with another channels"
            )
        factor = self.downsample_factor
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"Unet: expected x with height and width divisible by {factor}, got {x.shape[2]}x{x.shape[3]}; "
                "pad or resize the images, or give dim_mults fewer levels"
            )
        check_shape("Unet", "time", time, (x.shape[0],))


class Downsample(nn.Sequential):
    """Half the size: 2 x 2 pixels become one of four times the channels, then a 1x1 convolution.

    That is a 2x2 convolution of stride 2: channel (c, i, j) of the one is pixel (i, j) of channel c in the other.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(nn.Identity(), nn.Conv2d(dim * 4, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W], H and W even, to [B, dim_out, H / 2, W / 2]."""
        conv = cast(nn.Conv2d, self[1])
        weight = conv.weight.reshape(conv.out_channels, -1, 2, 2)
        return F.conv2d(x, weight, conv.bias, stride=2)


class Upsample(nn.Sequential):
    """Twice the size: each pixel is repeated 2 x 2, then a 3x3 convolution; both are in the second of its parts."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(nn.Identity(), UpsampledConv2d(dim, dim_out))


def time_mlp(dim: int, width: int, by_weights: bool, is_random: bool, weights_dim: int, theta: float) -> TimeMLP:
    """The embedding of the time, by frequencies that are weights or by those of theta."""
    if by_weights:
        return TimeMLP(RandomOrLearnedSinusoidalPosEmb(weights_dim, is_random), weights_dim + 1, width)
    return TimeMLP(SinusoidalPosEmb(dim, theta), dim, width)


def per_level(name: str, value: Value | Sequence[Value], levels: int) -> tuple[Value, ...]:
    """A value for each level, from one or from as many."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * levels
    if len(values) != levels:
        raise ValueError(
            f"Unet: expected {name} to be one value or {levels}, one for each of dim_mults, got {len(values)}; "
            "give as many as there are levels"
        )
    return values


def run(net: Any, x: Tensor, activated: Tensor) -> Tensor:
    """The way of an image [B, C, H, W] through a network of these names, to [B, out_dim, H, W]; both channels_last."""
    first = x = net.init_conv(x)
    skips = []
    for block1, block2, attention, resize in net.downs:
        x = block1(x, activated)
        skips.append(x)
        x = block2(x, activated)
        x = x + attention(x)
        skips.append(x)
        x = resize(x)

    x = net.mid_block1(x, activated)
    x = x + net.mid_attn(x)
    x = net.mid_block2(x, activated)

    for block1, block2, attention, resize in net.ups:
        x = block1(torch.cat([x, skips.pop()], dim=1), activated)
        x = block2(torch.cat([x, skips.pop()], dim=1), activated)
        x = x + attention(x)
        x = resize(x)

    x = net.final_res_block(torch.cat([x, first], dim=1), activated)
    out: Tensor = net.final_conv(x)
    return out
