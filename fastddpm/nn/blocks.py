"""The parts of the U-Net: residual block, downsampling and upsampling.

Residual block (Ho et al. 2020, appendix B), e being what it takes of the time embedding:

    h = conv1(silu(groupnorm(x)));   h = conv2(drop(silu(groupnorm(h + e))));   y = shortcut(x) + h

With scale and shift (Nichol and Dhariwal 2021; "adaptive group normalization" in Dhariwal and Nichol 2021, section 3.1)
e = [scale, shift] and

    h = conv2(drop(silu(groupnorm(h) * (1 + scale) + shift)))

conv1 runs without its bias. The bias, and e in the first form, reach the second norm as one bias per channel, which the
norm adds on its way.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv1x1, Conv2d, UpsampledConv2d, conv2d, reads_apart, repeat_pixels
from .norm import GroupNormSiLU
from .recompute import recomputed

Padding = Literal["same", "symmetric"]
PADDINGS: tuple[str, ...] = get_args(Padding)


class DropoutKey(NamedTuple):
    """Where dropout draws: seed, int or int64 []; index of each sample, int64 [B]; step, int or int64 []."""

    seed: Tensor | int
    sample: Tensor
    step: Tensor | int


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep.

    Args:
        in_channels, out_channels: both divisible by num_groups. Where they differ the shortcut is a 1x1 convolution.
        num_groups, eps: of both group norms.
        scale_shift: condition by scale and shift after the second norm, not by a bias before it.
        dropout: probability in [0, 1), in training.
        layer: number of the block in its network, >= 0: each draws dropout of its own.
        resample: "down" averages 2x2 pixels, "up" repeats each pixel 2x2, on both branches, on the main one after the
            first activation (Dhariwal and Nichol 2021, section 3).
        output_scale: y is divided by it.

    Attributes:
        recompute: in training keep nothing but the inputs, and compute the block again in backward, see `recomputed`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int = 32,
        eps: float = 1e-6,
        *,
        scale_shift: bool = False,
        dropout: float = 0.0,
        layer: int = 0,
        resample: Literal["down", "up"] | None = None,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.dropout, self.layer, self.resample = scale_shift, dropout, layer, resample
        self.output_scale = output_scale
        self.recompute = False
        self.embedding_width = 2 * out_channels if scale_shift else out_channels
        self.norm1 = GroupNormSiLU(in_channels, num_groups, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_channels, num_groups, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = Conv1x1(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, e: Tensor, key: DropoutKey | None = None, skip: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, in_channels, H, W]; with ``skip`` the two together have in_channels.
            skip: joined to x along the channels: an output of the way down.
            e: projection of the time embedding, [B, embedding_width]: a bias, or scale then shift.
            key: where dropout draws; needed in training with dropout > 0.

        Returns: [B, out_channels, H', W'], where H' is H, H / 2 ("down") or 2H ("up"), W' likewise.
        """
        if self.recompute and self.training and torch.is_grad_enabled():
            # dropout belongs to its key, so no generator's state needs to be kept
            return recomputed(lambda x, e, skip: self._forward(x, e, skip, key), x, e, skip)
        return self._forward(x, e, skip, key)

    def _forward(self, x: Tensor, e: Tensor, skip: Tensor | None, key: DropoutKey | None) -> Tensor:
        bias = self.conv1.bias
        assert bias is not None
        scale, shift = e.chunk(2, dim=1) if self.scale_shift else (None, None)
        noise = key._asdict() if key is not None else {}
        if skip is not None and not reads_apart(x):
            x, skip = _joined(x, skip), None

        h = conv2d(self._resampled(self.norm1(x, x2=skip)), self.conv1.weight, padding=1)
        h = self.norm2(
            h,
            channel_bias=bias if self.scale_shift else bias + e,
            scale=scale,
            shift=shift,
            dropout=self.dropout if self.training else 0.0,
            layer=self.layer,
            **noise,
        )
        out = self._shortcut(x, skip, self.conv2(h))
        return out if self.output_scale == 1 else out / self.output_scale

    def _shortcut(self, x: Tensor, skip: Tensor | None, h: Tensor) -> Tensor:
        """What the input gives, + h."""
        if skip is None:
            x = self._resampled(x)
        if self.shortcut is None:
            return x + h
        assert skip is None or self.resample is None  # what joins has more channels than it gives
        out: Tensor = self.shortcut(x, x2=skip, residual=h)
        return out

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return repeat_pixels(x)
        return x

    def extra_repr(self) -> str:
        return f"scale_shift={self.scale_shift}, dropout={self.dropout}, layer={self.layer}, resample={self.resample}"


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2.

    Args:
        channels: C.
        padding: "same" adds zeros at the right and the bottom (Ho et al. 2020, whose framework pads so), "symmetric" on
            every side (Nichol and Dhariwal 2021).

    Attributes:
        recompute: in training keep nothing but the input, not its copy within zeros either, see `recomputed`.
    """

    def __init__(self, channels: int, padding: Padding = "same") -> None:
        super().__init__()
        self.padding = padding
        self.recompute = False
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if padding == "same" else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], H and W even, to [B, C, H / 2, W / 2]."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == "same" else x)
        return out


class Upsample(nn.Module):
    """Double height and width: each pixel is repeated 2x2, then a 3x3 convolution (Ho et al. 2020).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        out: Tensor = self.conv(x)
        return out


def _joined(x: Tensor, skip: Tensor) -> Tensor:
    """[B, C1, H, W] and [B, C2, H, W] as [B, C1 + C2, H, W]."""
    if not torch.is_grad_enabled():
        return torch.cat([x, skip], dim=1)
    both: Tensor = _Joined.apply(x, skip)  # type: ignore[no-untyped-call]
    return both


class _Joined(torch.autograd.Function):
    """torch.cat, with a copy for the gradient of each: a view of the whole would keep it all, that of a skip until
    backward has come to the way down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        ctx.channels = [x.shape[1], skip.shape[1]]
        return torch.cat([x, skip], dim=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in dy.split(ctx.channels, dim=1))
