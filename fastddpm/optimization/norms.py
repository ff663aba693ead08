"""Norms and what follows them, by the fused ops: single modules, and pairs inside nn.Sequential.

group norm:  y = silu((h - mean) / sqrt(var + eps) weight + bias), h = x + channel_bias, over groups of channels
RMS norm:    y = silu(sqrt(C) x / max(||x||, eps) g (1 + scale) + shift), over the channels of a pixel
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import is_dense
from ..ops import group_norm_silu, rms_norm_silu
from .fused import Fused, untouched


def group_norm(
    norm: Any,
    x: Tensor,
    *,
    activation: bool = True,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The op with the parameters of an nn.GroupNorm.

    Args:
        norm: the module.
        x: [B, C, ...].
        channel_bias: [C] or [B or 1, C]. scale, shift: [B or 1, C].

    Returns: of the shape, dtype and memory order of x.
    """
    image = as_image(x)
    rows = len(image)
    y = group_norm_silu(
        image, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, activation=activation,
        channel_bias=for_each(channel_bias, rows), scale=for_each(scale, rows), shift=for_each(shift, rows),
    )  # fmt: skip
    assert isinstance(y, Tensor)  # a pair comes only of a call with a residual
    return y.view(x.shape)


def rms_norm(
    gain: Tensor, x: Tensor, *, activation: bool = True, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The op with g of any shape of C elements; see `group_norm`."""
    image = as_image(x)
    scale, shift = for_each(scale, len(image)), for_each(shift, len(image))
    return rms_norm_silu(image, gain.flatten(), scale=scale, shift=shift, activation=activation).view(x.shape)


def as_image(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, H, W], dense in NCHW or NHWC order: a view, where x is dense in either."""
    if x.dim() == 3:
        x = x.unsqueeze(3)
    elif x.dim() > 4:
        channels_last = x.movedim(1, -1).is_contiguous()
        x = x.movedim(1, -1).flatten(1, -2).movedim(-1, 1).unsqueeze(3) if channels_last else x.flatten(2).unsqueeze(3)
    if is_dense(x):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def for_each(p: Tensor | None, rows: int) -> Tensor | None:
    """What is the same for all samples, once for each."""
    return p if p is None or p.dim() == 1 or len(p) == rows else p.expand(rows, -1)


def widened(y: Tensor, x: Tensor) -> Tensor:
    """In float32 where autocast on a GPU would have the norm give that."""
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda")
    return y.float() if half else y


class FusedGroupNorm(Fused):
    """A group norm alone: what follows it is elsewhere."""

    pattern = "GroupNorm"
    weight: Tensor
    bias: Tensor
    num_groups: int
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same."""
        return widened(group_norm(self, x, activation=False), x) if x.dim() > 2 else super().forward(x)


class FusedRMSNorm(Fused):
    """A channel RMSNorm alone."""

    pattern = "channel RMSNorm"
    g: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same."""
        return rms_norm(self.g, x, activation=False) if x.dim() > 2 else super().forward(x)


class KnownSiLU(Fused):
    """A SiLU that is not torch's: as it is, known to be one."""

    pattern = "SiLU"

    def forward(self, x: Tensor) -> Tensor:
        """As it was."""
        return super().forward(x)  # type: ignore[no-any-return]


class ActivatedGroupNorm(Fused):
    """A group norm whose model calls a SiLU on the result and does no more with it: both at once."""

    pattern = "GroupNorm + SiLU"
    weight: Tensor
    bias: Tensor
    num_groups: int
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same, through the SiLU."""
        return group_norm(self, x)


class PassedSiLU(Fused):
    """The SiLU of such a model, which is done before."""

    pattern = "SiLU (in the norm before)"

    def forward(self, x: Tensor) -> Tensor:
        """The same."""
        return x


NARROWING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What autocast brings to half precision again."""


class FusedSequential(Fused):
    """nn.Sequential in which a norm and the SiLU behind it are one op.

    What is paired is found at the call, so that a slice of it, or a module put in place of another, is what it says.
    """

    pattern = "GroupNorm + SiLU in nn.Sequential"

    def forward(self, x: Any) -> Any:
        """One after the other."""
        layers = list(self._modules.values())
        while layers:
            layer = layers.pop(0)
            assert layer is not None
            if layers and makes_pair(layer, layers[0]) and isinstance(x, Tensor) and x.dim() > 2:
                layers.pop(0)
                y = group_norm(layer, x)
                x = y if layers and isinstance(layers[0], NARROWING) else widened(y, x)
            else:
                x = layer(x)
        return x


def makes_pair(norm: Any, activation: Any) -> bool:
    """Whether the two are a group norm and a SiLU that nobody watches."""
    return isinstance(norm, FusedGroupNorm) and is_silu(activation) and untouched(norm, activation)


def is_silu(module: Any) -> bool:
    """torch's SiLU, or another that `computes_silu`."""
    return type(module) is nn.SiLU or isinstance(module, KnownSiLU)


# --- what a module of another library is, asked of the module itself


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of those that this is about, by its class."""
    return isinstance(module, nn.GroupNorm) or (type(module).__name__ == "RMSNorm" and "g" in module._parameters)


def computes_group_norm(module: nn.Module) -> bool:
    """Whether an nn.GroupNorm, or a class made of it, normalises and no more (some do so in float32)."""
    if not isinstance(module, nn.GroupNorm) or not module.affine:
        return False
    if type(module).forward is nn.GroupNorm.forward:
        return True
    x = example(2, module.num_channels, 5, like=module.weight)
    with torch.no_grad():
        try:
            y = module.forward(x)
        except Exception:  # it takes other arguments
            return False
    expected = F.group_norm(x, module.num_groups, module.weight.to(x.dtype), module.bias.to(x.dtype), module.eps)
    return agree(y, expected)


def computes_silu(module: nn.Module) -> bool:
    """Whether a module without parameters, of a name that says SiLU or Swish, is one."""
    if type(module) is nn.SiLU:
        return True
    if not any(name in type(module).__name__.lower() for name in ("silu", "swish")):
        return False
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return False
    x = example(2, 8, 4, like=torch.empty(0))
    with torch.no_grad():
        try:
            return agree(module.forward(x), F.silu(x))
        except Exception:  # it takes other arguments
            return False


def computes_rms_norm(module: nn.Module) -> bool:
    """Whether a module with one parameter g, of C elements, is g sqrt(C) x / ||x|| over the channels."""
    g = module._parameters.get("g")
    if len(list(module.parameters())) != 1 or g is None or g.shape.numel() != max(g.shape):
        return False
    x = example(2, g.numel(), *([3] * (g.dim() - 2)), like=g)
    with torch.no_grad():
        try:
            y = module.forward(x)
        except Exception:  # it takes other arguments
            return False
    return g.dim() > 2 and agree(y, F.normalize(x, dim=1) * g * math.sqrt(g.numel()))


def example(*shape: int, like: Tensor) -> Tensor:
    """Numbers of about the size of activations, as a weight in dtype and device; torch's generator is left alone."""
    return torch.arange(float(torch.Size(shape).numel())).mul_(1.7).sin_().mul_(2).reshape(shape).to(like)


def agree(a: Any, b: Tensor) -> bool:
    """Up to rounding; on a device without values, the shape alone."""
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    if a.is_meta:
        return True
    allowed = max(1e-4, 16 * torch.finfo(b.dtype).eps) * max(1.0, float(b.detach().abs().max()))
    return bool((a.to(b) - b).abs().max() <= allowed)  # NaN is not
