"""What the Triton kernels share: the noise, reading of images, and how a kernel is launched.

Imported by ``triton_impl`` modules alone, so that the package imports without Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import _dispatch

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
    c0, zero = block.to(tl.uint32), (block * 0).to(tl.uint32)
    c1, c2, c3 = zero + sample, zero + step, zero + stream
    k0, k1 = zero + seed_low, zero + seed_high
    for _ in tl.static_range(10):
        # 64 bits of two words of 32: one wide multiplication, in place of one for each half
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED: tl.constexpr, STEP: tl.constexpr):
    """Key and step as uint32: from tensors on the device where there are any, else from the numbers.

    By tl.cast, since a number equal to 1 may be a constant: torch.compile makes it one in every kernel.
    """
    if SEED:
        seed = tl.load(seed_tensor)
        low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        low, high = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    if STEP:
        step_word = (tl.load(step_tensor) & 0xFFFFFFFF).to(tl.uint32)
    else:
        step_word = tl.cast(step, tl.uint32)
    return low, high, step_word


@triton.jit
def as_float32(number):
    """A number of Python, which torch.compile hands over as float64: what meets it would be computed in that."""
    return tl.cast(number, tl.float32)


@triton.jit
def unit(word):
    """u = (word + 1/2) 2^-32"""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(word0, word1, APPROX: tl.constexpr):
    """z_0 = sqrt(-2 ln u_0) cos(2 pi u_1) and z_1, its sine.

    With approximate instructions ln is good to 2^-22 and sine and cosine to 2^-20.5, absolute: their error in z is
    at most 6e-4 (u_0 next to 1), 5e-7 in the root mean square. The exact functions would use local memory. Only a
    radius of 0 is subnormal: flushing (ftz) costs nothing and spares the scaling.
    """
    u0, angle = unit(word0), unit(word1) * 6.283185307179586
    if APPROX:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u0], tl.float32, True, 1)
        square = tl.maximum(log2 * -1.3862943611198906, 0.0)
        radius = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sine = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        radius = tl.sqrt(tl.log(u0) * -2.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals_of_four(counter, sample, step, stream, seed_low, seed_high, APPROX: tl.constexpr):
    """Standard normal numbers of elements 4 counter .. 4 counter + 3: [N] to [N, 4]; each row stays in its thread."""
    w0, w1, w2, w3 = philox_words(counter, sample, step, stream, seed_low, seed_high)
    z0, z1 = box_muller(w0, w1, APPROX)
    z2, z3 = box_muller(w2, w3, APPROX)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [counter.shape[0], 4])


@triton.jit
def places(part, channels, pixels, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers [rows, columns] of one of the programs of a sample: where they lie, and how `normals` draws them.

    LANES = 0: BLOCK elements in C, H, W order, in rows of VECTOR. Otherwise a tile of pixels, four for each counter of
    the noise, by LANES channels: the order of NHWC; the number of pixels is then a multiple of 4, and with VECTOR > 1
    that of the channels is one of LANES.

    Returns: counter [N], which `normals` takes; element (as the noise counts), channel, pixel, and whether it exists.
    """
    if LANES:
        slabs = (channels + LANES - 1) // LANES
        quad = part // slabs * (BLOCK // (4 * LANES)) + tl.arange(0, BLOCK // (4 * LANES))
        pixel = (part // slabs * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES))[:, None]
        channel = (part % slabs * LANES + tl.arange(0, LANES))[None, :]
        counter = tl.reshape(channel * (pixels // 4) + quad[:, None], [BLOCK // 4])
        inside = pixel < pixels if VECTOR > 1 else (pixel < pixels) & (channel < channels)
        return counter, channel * pixels + pixel, channel, pixel, inside
    else:
        counter = part * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)
        element = counter[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        return counter, element, element // pixels, element % pixels, element < channels * pixels


@triton.jit
def normals(
    counter, sample, step, stream, seed_low, seed_high, LANES: tl.constexpr, VECTOR: tl.constexpr, APPROX: tl.constexpr
):
    """Standard normal numbers of the elements of `places`: no words are drawn twice.

    Two draws make a row of eight, so that a thread holds 16 bytes of bfloat16 without an exchange with others.
    """
    counter = counter.to(tl.uint32)
    if LANES:
        z = normals_of_four(counter, sample, step, stream, seed_low, seed_high, APPROX)
        z = tl.permute(tl.reshape(z, [counter.shape[0] // LANES, LANES, 4]), (0, 2, 1))
        return tl.reshape(z, [counter.shape[0] // LANES * 4, LANES])
    elif VECTOR == 8:
        even = normals_of_four(counter * 2, sample, step, stream, seed_low, seed_high, APPROX)
        odd = normals_of_four(counter * 2 + 1, sample, step, stream, seed_low, seed_high, APPROX)
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), [counter.shape[0], 8])
    else:
        return normals_of_four(counter, sample, step, stream, seed_low, seed_high, APPROX)


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
def offsets(element, channel, pixel, channel_stride, pixel_stride, ORDER: tl.constexpr):
    """Where the numbers of `places` lie in a sample.

    ORDER: 1 for C, H, W; n > 1 for NHWC of n channels, which the compiler then knows; 0 for any, by its strides.
    """
    if ORDER == 1:
        return element
    elif ORDER:
        return pixel * ORDER + channel
    else:
        return channel * channel_stride + pixel * pixel_stride


@triton.jit
def turned(flip, element, pixel, width, LANES: tl.constexpr):
    """How far from each place of `places` that lies which takes it in the picture turned left to right; 0 if not."""
    column = (pixel if LANES else element) % width
    return tl.where(flip.to(tl.int1), width - 1 - 2 * column, 0)


def reason_against(x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot compute in ``dtype`` (that of x, by default) where x is."""
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the Triton kernels are for CUDA, and the tensors are on {x.device}"
    if INTERPRETED and _dispatch._forced != "triton":
        return "Triton's interpreter is for tests: it runs only where use_backend('triton') asks for it"
    if (dtype or x.dtype) == torch.float64:
        return "the Triton kernels compute in float32; the reference computes in float64"
    return None


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors, which need not be the current one; nothing for an empty grid."""
    if 0 not in grid:
        first = next(x for x in (*args, *options.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            kernel[grid](*args, **options)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """The same, in an operator that torch.compile can see into: of tensors that stand for others it notes the call."""
    if not any(isinstance(x, (FakeTensor, FunctionalTensor)) for x in (*args, *options.values())):
        run(kernel, grid, *args, **options)
    elif not INTERPRETED and 0 not in grid:
        torch.library.wrap_triton(kernel)[grid](*args, **options)


def strides(x: Tensor) -> tuple[int, int]:
    """From channel to channel and from pixel to pixel of a dense image, in elements."""
    pixels = x.shape[2] * x.shape[3]
    return (pixels, 1) if x.is_contiguous() else (1, x.shape[1])


def in_order(x: Tensor) -> bool:
    """Whether the elements of each sample lie in C, H, W order."""
    return x.is_contiguous() or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1


def tiling(written: Tensor, channels: int) -> tuple[int, dict[str, int]]:
    """How a sample of these channels is dealt out where results go to ``written``: programs, and what `places` takes.

    A thread writes 16 bytes at a time.
    """
    pixels, vector = written.shape[2] * written.shape[3], 4 if written.element_size() == 4 else 8
    if in_order(written) or pixels % 4:
        return triton.cdiv(channels * pixels, BLOCK), dict(LANES=0, VECTOR=vector, BLOCK=BLOCK)
    lanes = min(triton.next_power_of_2(int(channels)), 16)
    tile = dict(LANES=lanes, VECTOR=1 if channels % lanes else lanes, BLOCK=BLOCK)
    return triton.cdiv(channels, lanes) * triton.cdiv(pixels * lanes, BLOCK), tile


def order(image: Tensor | None, lanes: int, channels: int) -> int:
    """The ORDER of `offsets`, for the first ``channels`` of an image."""
    if image is None or image.is_contiguous() or (in_order(image) and channels == image.shape[1]):
        return 1
    return int(image.shape[1]) if lanes else 0


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
    """A new image in the memory order of ``like``.

    By its strides: what is asked for by a memory format Inductor fills with NaN first, in a kernel of its own.
    """
    batch, channels, height, width = like.shape if shape is None else shape
    channel, pixel = (height * width, 1) if like.is_contiguous() else (1, channels)
    by = (channels * height * width, channel, width * pixel, pixel)
    return torch.empty_strided((batch, channels, height, width), by, dtype=dtype or like.dtype, device=like.device)
