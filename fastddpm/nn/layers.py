"""Convolutions, linear layers and attention as the device at hand computes them fastest, no less precisely.

On a GPU, and in float32 where nothing better is known, these are torch's. On a CPU

- a 3x3 convolution over enough pixels is `fastddpm.ops.conv3x3`, which multiplies 2.25 times less;
- layers in half precision compute in float32, and keep what they read and write in half precision: x86 processors
  without matrix units (AMX) multiply bfloat16 at half the rate of float32 (measured: docs/benchmarks.md), and torch has
  no fast gradient of a convolution in float16 there.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import is_nhwc
from .._dispatch import _constant
from ..ops.conv3x3 import conv3x3, is_kept

HALF = (torch.bfloat16, torch.float16)
LEAST_CHANNELS = 16
LEAST_TILES = 256
"""Of 2x2 pixels, from which on transforming the weights pays if it is done at each call; if it is done once, 64."""
_plain = False


@contextlib.contextmanager
def torch_layers() -> Iterator[None]:
    """Within the block all layers are torch's, in the dtype of their inputs: to count them, or to compare."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


@_constant
def _multiplies_half_slowly() -> bool:
    """Whether this processor multiplies float32 faster than half precision: x86 without matrix units."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_amx_tile_supported()


def computes_in_float32(x: Tensor) -> bool:
    """Whether a layer widens its half-precision inputs."""
    return x.device.type == "cpu" and x.dtype in HALF and not _plain and _multiplies_half_slowly()


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast would give a layer; the weights may stay in float32, and are not rounded."""
    device = x.device.type
    if device == "cpu" and not _plain and _multiplies_half_slowly() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """`torch.nn.functional.conv2d` of x [B, K, H, W] and weight [N, K, P, Q]."""
    x = _autocast(x)
    if _is_transformed(x, weight, stride, padding):
        return conv3x3(x, weight, bias)
    if computes_in_float32(x):
        y: Tensor = _Conv2d.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]
        return y
    return F.conv2d(x, weight, bias, stride, padding)


def _is_transformed(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    if _plain or x.device.type != "cpu" or weight.shape[2:] != (3, 3) or stride != 1 or padding != 1:
        return False
    if min(weight.shape[:2]) < LEAST_CHANNELS or x.dtype not in (torch.float32, *HALF) or not is_nhwc(x):
        return False
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    return tiles >= (64 if is_kept() else LEAST_TILES)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear` of x [.., K] and weight [N, K]."""
    x = _autocast(x)
    if computes_in_float32(x):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of [B, heads, tokens, d]."""
    if computes_in_float32(q):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class Conv2d(nn.Conv2d):
    """A convolution by `conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] to [B, N, H', W']."""
        assert isinstance(self.padding, tuple)
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


class Linear(nn.Linear):
    """A linear layer by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] to [.., N]."""
        return linear(x, self.weight, self.bias)


class _Conv2d(torch.autograd.Function):
    """In float32, with what is kept for backward in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stride, ctx.padding = (stride, stride), (padding, padding)
        with torch.autocast("cpu", enabled=False):
            b = None if bias is None else bias.float()
            return F.conv2d(x.float(), weight.float(), b, stride, padding).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        outputs = None if bias is None else [weight.shape[0]]
        mask = (*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        found = torch.ops.aten.convolution_backward(
            dy.float(), x.float(), weight.float(), outputs, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, mask
        )
        of = zip(found, (x, weight, bias), mask, strict=True)
        gradients = (g.to(p.dtype) if wanted else None for g, p, wanted in of)
        return *gradients, None, None


class _Linear(torch.autograd.Function):
    """In float32, with what is kept for backward in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        g = dy.float().flatten(0, -2)
        dx = (g @ weight.float()).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = (g.t() @ x.float().flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, g.sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
