"""Convolutions, linear layers and attention as the device at hand computes them fastest, no less precisely.

On a GPU, and in float32 where nothing better is known, these are torch's. On a CPU

- a 3x3 convolution over enough pixels is `fastddpm.ops.conv3x3`, which multiplies 2.25 times less, in half precision 4
  times (on x86 with native code: measured with AVX-512, AVX2 and SSE; elsewhere not); on small maps, and in float32
  behind an upsampling, it is a sum of such products (`patches`) where torch's products are quick, with stride 2 to a
  small map one product; a 1x1 convolution is a linear layer over the pixels;
- a linear layer is `fastddpm.ops.linear`, which converts and adds on the way, and attention
  `fastddpm.ops.self_attention`;
- layers in half precision keep what they read and write in half precision, and compute in float32, or bfloat16 in pairs
  where the processor multiplies those faster: for torch, x86 processors of Intel without matrix units (AMX) multiply
  bfloat16 at half the rate of float32 (measured: docs/benchmarks.md), and there is no fast gradient of a convolution in
  float16. Of AMD those with an instruction for pairs multiply bfloat16 at up to twice the rate: there a convolution
  that is none of the above is torch's in inference; in training the gradient of its weight is in float32.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _dispatch, _native
from .._checks import is_nhwc
from .._dispatch import _constant, once_differentiable
from ..ops.conv3x3 import conv3x3
from ..ops.kept import is_kept
from ..ops.linear import linear as own_linear
from ..ops.self_attention import self_attention as own_self_attention
from .patches import conv3x3_products, strided_conv3x3_product, upsampled_conv3x3_products

HALF = (torch.bfloat16, torch.float16)
X86 = platform.machine().lower() in ("x86_64", "amd64")
MATRIX_UNITS = bool(torch.cpu._is_amx_tile_supported())
LEAST_CHANNELS, FEW_CHANNELS = 16, 3
MOST_PIXELS, LEAST_PIXELS = 16, 128
"""Of a map on which a 3x3 convolution is a sum of products, and of all maps of the batch, behind an upsampling too."""
MOST_STRIDED = 64, 256
"""Pixels of a map that a 3x3 convolution of stride 2 makes by one product, and those where torch is slow with it."""
LEAST_TILES, LEAST_TRAINED, LEAST_KEPT = 128, 32, 4
"""Of 2x2 pixels, from which on transforming the weights pays if it is done at each call, for the gradients, too (or
where torch is slow with float32), or once for many calls."""
MOST_TOKENS = 1024
"""Of one image, up to which attention is our own: in training, where its weights [B, heads, tokens, tokens] are kept,
if these are at most two numbers for each of its result."""
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
    return X86 and not MATRIX_UNITS


@_constant
def _multiplies_slowly() -> bool:
    """Whether torch multiplies matrices of float32 at a half or a third of the rate of the kernels here: on AMD's
    processors, where it was measured on Zen 5."""
    return _native.on_amd()


@_constant
def _multiplies_bfloat16_quickly() -> bool:
    """Whether a convolution of bfloat16 takes torch down to half the time of one of float32 where there are no matrix
    units: on AMD's processors that multiply pairs, measured on Zen 5."""
    return _multiplies_slowly() and _native.multiplies_pairs()


@_constant
def _has_kernels() -> bool:
    """Whether conv3x3 and self_attention have their kernels, where they were measured."""
    return X86 and _native.available()


def computes_in_float32(x: Tensor) -> bool:
    """Whether a layer widens its half-precision inputs."""
    return x.device.type == "cpu" and x.dtype in HALF and not _plain and _multiplies_half_slowly()


def _is_quick(x: Tensor) -> bool:
    """Whether torch convolves x quickly as it is, and nothing is lost by it: no gradient."""
    return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and _multiplies_bfloat16_quickly()


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast would give a layer; the weights may stay in float32, and are not rounded."""
    device = x.device.type
    if device == "cpu" and not _plain and _multiplies_half_slowly() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _is_own(x: Tensor) -> bool:
    """Whether there is a choice: channels_last on a CPU, and float32 is what is computed in."""
    if x.device.type != "cpu" or _plain or not is_nhwc(x):
        return False
    return _multiplies_half_slowly() if x.dtype in HALF else not torch.is_autocast_enabled("cpu")


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """`torch.nn.functional.conv2d` of x [B, K, H, W] and weight [N, K, P, Q]."""
    x = _autocast(x)
    kind = (*weight.shape[2:], stride, padding)
    if _is_own(x):
        if kind == (1, 1, 1, 0):
            return conv1x1(x, weight, bias)
        if kind == (3, 3, 1, 1) and _is_transformed(x, weight):
            return conv3x3(x, weight, bias)
        if kind == (3, 3, 1, 1) and _is_small(x):
            return _in_float32(conv3x3_products, x, weight, bias)
        if kind[:3] == (3, 3, 2) and _makes_a_small_map(x, weight, padding):
            return strided_conv3x3_product(F.pad(x, (padding,) * 4) if padding else x, weight, bias)
    if computes_in_float32(x):
        if _is_quick(x):
            return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)
        return cast(Tensor, _Conv2d.apply(x, weight, bias, stride, padding))  # type: ignore[no-untyped-call]
    return F.conv2d(x, weight, bias, stride, padding)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 1x1 convolution of x [B, K, H, W], and x2 [B, K2, H, W] joined to it, with weight [N, K + K2, 1, 1]; +
    residual."""
    x, x2 = _autocast(x), None if x2 is None else _autocast(x2)
    if _is_own(x) and (residual is None or residual.dtype == x.dtype):
        rows = [None if p is None else p.permute(0, 2, 3, 1) for p in (x, x2, residual)]
        assert rows[0] is not None
        return linear(rows[0], weight, bias, x2=rows[1], residual=rows[2]).permute(0, 3, 1, 2)
    if x2 is None:
        y = conv2d(x, weight, bias)
    else:
        first, second = weight.split([x.shape[1], x2.shape[1]], dim=1)
        y = conv2d(x, first, bias) + conv2d(x2, second)
    return y if residual is None else y + residual


def reads_apart(x: Tensor) -> bool:
    """Whether a block reads what it joins from two tensors, in place of one that is their copy.

    The norm and the shortcut then read both, and the copy is neither written nor read nor kept for backward: 6 bytes an
    element in half precision less (on a GPU not measured).
    """
    return x.is_cuda or _is_own(x)


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Repeat each pixel of x [B, K, H, W] 2x2, then convolve with weight [N, K, 3, 3] within a border of zeros."""
    x = _autocast(x)
    # in half precision conv3x3 multiplies less than the products, and in float32 as often
    pays = x.dtype in HALF or _multiplies_slowly()
    if _is_own(x) and _pixels(x) >= LEAST_PIXELS and not (pays and _can_be_transformed(x, weight)):
        return _in_float32(upsampled_conv3x3_products, x, weight, bias)
    return conv2d(repeat_pixels(x), weight, bias, padding=1)


def repeat_pixels(x: Tensor) -> Tensor:
    """Each pixel of x [B, C, H, W] 2x2: [B, C, 2H, 2W], channels_last."""
    # A 1x1 map is NCHW and NHWC at once, and the strides that say which are lost on the way; then B*C elements are
    # copied so that the result is channels_last. Any other channels_last map passes untouched.
    return F.interpolate(x.to(memory_format=torch.channels_last), scale_factor=2.0, mode="nearest")


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _is_small(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] <= MOST_PIXELS and _pixels(x) >= LEAST_PIXELS and not _multiplies_slowly()


def _makes_a_small_map(x: Tensor, weight: Tensor, padding: int) -> bool:
    """With stride 2, from as many channels as were measured."""
    height, width = ((size + 2 * padding - 1) // 2 for size in x.shape[2:])
    if not X86 or _dispatch._forced == "triton" or min(weight.shape[:2]) < LEAST_CHANNELS:
        return False
    return 0 < height * width <= MOST_STRIDED[x.dtype in HALF and not _is_quick(x)]


def _can_be_transformed(x: Tensor, weight: Tensor) -> bool:
    # of few channels, too, where torch is slow with them: in half precision to few, and in training from few
    few = x.dtype in HALF and not _is_quick(x) and (torch.is_grad_enabled() or weight.shape[1] >= LEAST_CHANNELS)
    if min(weight.shape[:2]) < (FEW_CHANNELS if few else LEAST_CHANNELS):
        return False
    if x.dtype == torch.float64 or not _has_kernels():
        return False
    return _dispatch._forced != "triton"  # which has no kernel of it


def _is_transformed(x: Tensor, weight: Tensor) -> bool:
    if not _can_be_transformed(x, weight):
        return False
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    if is_kept():
        return tiles >= LEAST_KEPT
    soon = torch.is_grad_enabled() or (_multiplies_slowly() and not _is_quick(x))
    return tiles >= (LEAST_TRAINED if soon else LEAST_TILES)


def _in_float32(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A function of weights in float32 or float64, which takes x in half precision, too."""
    if x.dtype not in HALF:
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return function(x, weight.float(), None if bias is None else bias.float())


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` of x [.., K], and x2 [.., K2] beside it, with weight [N, K + K2], + residual."""
    x, x2 = _autocast(x), None if x2 is None else _autocast(x2)
    if _has_own_products(x):
        return own_linear(x, weight, bias, x2=x2, residual=residual, dtype=dtype)
    inputs, weight = x if x2 is None else torch.cat((x, x2), dim=-1), weight.flatten(1)
    if computes_in_float32(x):
        with torch.autocast("cpu", enabled=False):
            y = F.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
        dtype = dtype or x.dtype
    else:
        y = F.linear(inputs, weight, bias)
    y = y if residual is None else residual + y
    return y if dtype is None else y.to(dtype)


def _has_own_products(x: Tensor) -> bool:
    """Whether `fastddpm.linear` and `fastddpm.self_attention` compute it."""
    if x.device.type != "cpu" or _plain or _dispatch._forced == "triton":  # which has no kernel of it
        return False
    return computes_in_float32(x) or (X86 and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of tokens [B, tokens, 3 C], whose queries, keys and values lie side by side, C each: [B, tokens, C]."""
    if _has_own_attention(qkv, qkv.shape[2] // 3, heads):
        return own_self_attention(qkv, heads)
    q, k, v = qkv.chunk(3, dim=2)
    return _torch_attention(q, k, v, heads)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same of queries, keys and values of the same tokens apart, [B, tokens, C] each."""
    if _has_own_attention(q, q.shape[2], heads):
        return own_self_attention(torch.cat((q, k, v), dim=2), heads)
    return _torch_attention(q, k, v, heads)


def _has_own_attention(x: Tensor, channels: int, heads: int) -> bool:
    """Whether `fastddpm.self_attention` computes it."""
    tokens, training = x.shape[1], torch.is_grad_enabled() and x.requires_grad
    little = tokens <= MOST_TOKENS and (heads * tokens <= 2 * channels or not training)
    return little and _has_kernels() and _has_own_products(x)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in float32 where that is faster."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if computes_in_float32(q):
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)


class Conv2d(nn.Conv2d):
    """A convolution by `conv2d`: square filters, stride and border, and no other options."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] to [B, N, H', W']."""
        assert isinstance(self.padding, tuple)
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution by `conv1x1`, with no other options."""

    def forward(self, x: Tensor, *, x2: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """[B, K, H, W], and [B, K2, H, W] joined to it, to [B, N, H, W], + residual."""
        return conv1x1(x, self.weight, self.bias, x2=x2, residual=residual)


class UpsampledConv2d(nn.Conv2d):
    """A convolution by `upsampled_conv2d`: of kernel 3 and padding 1, behind a repetition of each pixel 2x2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] to [B, N, 2H, 2W]."""
        return upsampled_conv2d(x, self.weight, self.bias)


class Linear(nn.Linear):
    """A linear layer by `linear`."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """[.., K] to [.., N], + residual [.., N], in ``dtype``: that of x by default."""
        return linear(x, self.weight, self.bias, residual=residual, dtype=dtype)


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
