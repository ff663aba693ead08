"""Standard normal numbers that belong to their sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import FLOATS, check_draw
from ..._dispatch import Op
from . import reference

OP = Op(__package__, reference)


def normal(
    shape: Sequence[int],
    *,
    seed: Tensor | int,
    sample: Tensor,
    step: Tensor | int,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of a batch of samples: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller.

    z_0 = sqrt(-2 ln u_0) cos(2 pi u_1),  z_1 = sqrt(-2 ln u_0) sin(2 pi u_1), u = (word + 1/2) 2^-32; elements 4c..4c+3
    of a sample, in the order of its dimensions, come of the words of counter (c, sample, step, stream) under key seed.

    Args:
        shape: [B, ...], B = len(sample).
        seed, sample, step: int or int64 [] / int64 [B] / int or int64 [].
        stream: what the noise is for, in [0, 2^32): see `fastddpm.ops.philox`.
        dtype: float.

    Returns: a contiguous tensor of that shape, on the device of ``sample``.

    Raises:
        ValueError: a shape, device or range that does not fit. TypeError: a dtype.

    Numerics: float32 arithmetic (float64 for float64), one rounding; the integers are the same on every device and in
    any split of a batch. Not differentiable.
    """
    shape = tuple(shape)
    if not shape or any(n < 0 for n in shape):
        raise ValueError(f"normal: expected shape [B, ...], got {list(shape)}; give one size for each dimension")
    if dtype not in FLOATS:
        raise TypeError(f"normal: expected dtype to be a float dtype, got {dtype}; torch.float32 is usual")
    if not 0 <= stream < 2**32:
        raise ValueError(f"normal: expected stream in [0, 2^32), got {stream}; fastddpm.ops.philox names the streams")
    check_draw("normal", shape[0], sample, seed, sample, step)
    z: Tensor = OP.run(sample, dict(shape=shape, seed=seed, sample=sample, step=step, stream=stream, dtype=dtype))
    return z
