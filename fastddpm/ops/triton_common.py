"""What the Triton kernels share: the noise, reading of images, and how a kernel is launched.

Imported by ``triton_impl`` modules alone, so that the package imports without Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter, on tensors in the memory of the host; decided when Triton is imported."""

BY_HAND = tl.constexpr(INTERPRETED)  # the interpreter cuts off what it should round
BLOCK = 1024  # elements of an elementwise program


@triton.jit
def philox_words(block, sample, step, stream, seed_low, seed_high):
    """The four words of counter (block, sample, step, stream) under key (seed_low, seed_high): Philox 4x32-10.

    Element e of a sample takes lane e % 4 of block e // 4 (see `fastddpm.ops.philox`). All uint32; ``block`` has any
    shape, the others are scalars.
    """
    zero = block * 0
    return tl.philox_impl(block, zero + sample, zero + step, zero + stream, seed_low, seed_high, 10)


@triton.jit
def drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED: tl.constexpr, STEP: tl.constexpr):
    """Key and step as uint32: from tensors on the device where there are any, else from the numbers."""
    if SEED:
        seed = tl.load(seed_tensor)
        low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if STEP:
        step_word = (tl.load(step_tensor) & 0xFFFFFFFF).to(tl.uint32)
    else:
        step_word = step.to(tl.uint32)
    return low, high, step_word


@triton.jit
def unit(word):
    """u = (word + 1/2) 2^-32"""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(word0, word1, APPROX: tl.constexpr):
    """z_0 = sqrt(-2 ln u_0) cos(2 pi u_1) and z_1, its sine.

    With approximate instructions ln is good to 2^-22 and sine and cosine to 2^-20.5, absolute: their error in z is
    at most 6e-4 (u_0 next to 1), 5e-7 in the root mean square. The exact functions would use local memory.
    """
    u0, angle = unit(word0), unit(word1) * 6.283185307179586
    if APPROX:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [u0], tl.float32, True, 1)
        square = tl.maximum(log2 * -1.3862943611198906, 0.0)
        radius = tl.inline_asm_elementwise("sqrt.approx.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        radius = tl.sqrt(tl.log(u0) * -2.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def four_lanes(a, b, c, d):
    """[N] each to [4 N], in turn."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def normals(block, sample, step, stream, seed_low, seed_high, APPROX: tl.constexpr):
    """Standard normal numbers of elements 4 block .. 4 block + 3: [N] to [4 N]."""
    w0, w1, w2, w3 = philox_words(block, sample, step, stream, seed_low, seed_high)
    z0, z1 = box_muller(w0, w1, APPROX)
    z2, z3 = box_muller(w2, w3, APPROX)
    return four_lanes(z0, z1, z2, z3)


@triton.jit
def save(pointer, x, mask):
    """Store float32 x, rounded once to the dtype of the pointer: to nearest, ties to even."""
    if BY_HAND and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointer, nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def offsets(element, pixels, channel_stride, pixel_stride, IN_ORDER: tl.constexpr):
    """Where elements, counted in C, H, W order, lie in a sample."""
    if IN_ORDER:
        return element
    else:
        return element // pixels * channel_stride + element % pixels * pixel_stride


@triton.jit
def mirrored(element, width):
    """The element that takes the place of this one in the picture turned left to right."""
    return element + (width - 1) - 2 * (element % width)


def reason_against(x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot compute in ``dtype`` (that of x, by default) where x is."""
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the Triton kernels are for CUDA, and the tensors are on {x.device}"
    if (dtype or x.dtype) == torch.float64:
        return "the Triton kernels compute in float32; the reference computes in float64"
    return None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel, as torch.compile can see it; nothing for an empty grid."""
    if not math.prod(grid):
        return
    if not INTERPRETED:
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    elif not any(isinstance(x, FakeTensor) for x in (*args, *options.values())):  # which have shapes alone
        kernel[grid](*args, **options)


def strides(x: Tensor) -> tuple[int, int]:
    """From channel to channel and from pixel to pixel of a dense image, in elements."""
    pixels = x.shape[2] * x.shape[3]
    return (pixels, 1) if x.is_contiguous() else (1, x.shape[1])


def in_order(x: Tensor) -> bool:
    """Whether the elements of each sample lie in C, H, W order."""
    return x.is_contiguous() or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1


def word(x: int) -> int:
    """32 bits as a signed number: Triton then sees one type whatever the value."""
    x &= 0xFFFFFFFF
    return x - 2**32 if x >= 2**31 else x


def number_or_tensor(x: Tensor | int | None) -> tuple[int, Tensor | None]:
    """An argument that may be either, as the pair that an operator takes; 64 bits, with or without a sign."""
    if isinstance(x, Tensor):
        return 0, x
    x = x or 0
    return x - 2**64 if x >= 2**63 else x, None


def float_or_tensor(x: Tensor | float | None) -> tuple[float | None, Tensor | None]:
    """The same for a float, or None for none."""
    return (None, x) if isinstance(x, Tensor) else (None if x is None else float(x), None)


def draw_arguments(
    seed: int, seed_tensor: Tensor | None, step: int, step_tensor: Tensor | None, stand_in: Tensor
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Where noise is drawn as kernels take it, by name: numbers, or tensors on the device that take their place."""
    arguments = dict(
        seed_tensor=stand_in if seed_tensor is None else seed_tensor, seed_low=word(seed), seed_high=word(seed >> 32),
        step_tensor=stand_in if step_tensor is None else step_tensor, step=word(step),
    )  # fmt: skip
    return arguments, dict(SEED=seed_tensor is not None, STEP=step_tensor is not None)


def like_in_order(like: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """A new image in the memory order of ``like``."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    shape = like.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
