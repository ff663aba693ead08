"""normal in Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    BLOCK,
    INTERPRETED,
    draw_arguments,
    drawing,
    launch,
    normals,
    number_or_tensor,
    places,
    reason_against,
    save,
)

NUMBERS = ["seed_low", "seed_high", "step", "stream"]  # of any value: not worth a kernel each


@triton.jit(do_not_specialize=NUMBERS)
def normal_kernel(
    out, sample, seed_tensor, seed_low, seed_high, step_tensor, step, stream, elements, blocks,
    SEED: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, APPROX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = Box-Muller of Philox. A program draws BLOCK elements of one sample, four from each counter.

    Bytes an element: 2 or 4 written. What limits it are the integer multiplications of Philox.
    """
    b, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    low, high, step_word = drawing(seed_tensor, seed_low, seed_high, step_tensor, step, SEED, STEP)
    row = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
    counter, element, _, _, inside = places(part, elements, 1, 0, VECTOR, BLOCK)
    z = normals(counter, row, step_word, tl.cast(stream, tl.uint32), low, high, 0, VECTOR, APPROX)
    save(out + b.to(tl.int64) * elements + element, z, inside)


def unsupported(*, sample: Tensor, dtype: torch.dtype, **_: Any) -> str | None:
    """Why this kernel cannot run, or None."""
    return reason_against(sample, dtype)


@torch.library.triton_op("fastddpm::triton_normal", mutates_args=())
def _normal(
    shape: list[int], seed: int, seed_tensor: Tensor | None, sample: Tensor, step: int, step_tensor: Tensor | None,
    stream: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=sample.device)
    elements = math.prod(shape[1:])
    blocks = triton.cdiv(elements, BLOCK)
    draw, given = draw_arguments(seed, seed_tensor, step, step_tensor, sample)
    launch(
        normal_kernel, (shape[0] * blocks,), out, sample, stream=stream, elements=elements, blocks=blocks,
        **draw, **given, VECTOR=4 if dtype == torch.float32 else 8, APPROX=not INTERPRETED, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def forward(
    shape: tuple[int, ...],
    *,
    seed: Tensor | int,
    sample: Tensor,
    step: Tensor | int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the interface."""
    where = (*number_or_tensor(seed), sample.contiguous(), *number_or_tensor(step))
    z: Tensor = _normal(list(shape), *where, stream, dtype)
    return z
