"""Noise that belongs to the sample: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller, in plain PyTorch.

Key = the 64-bit seed (low word, high word); counter = (element // 4, sample, step, stream). Lanes 0..3 of a counter are
elements 4c..4c+3 of the sample in C, H, W order, whatever its memory format; lanes (0, 1) and (2, 3) are Box-Muller
pairs. Known answer: key 0, counter 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8. The words are int64 tensors with values
in [0, 2^32): a product wraps modulo 2^64, which keeps both of its halves exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

X_T, TRAINING_NOISE, SAMPLER_NOISE, T, FLIP, DROPOUT = range(6)
"""Streams. FLIP: lane 0 flips, lane 1 drops the label. DROPOUT is the last: layer n draws from stream DROPOUT + n."""

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor | int, Tensor | int], rounds: int = 10) -> Words:
    """Four 32-bit words from a counter of four and a key of two.

    Each round: (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)), and between two
    rounds (k0, k1) <- (k0 + W0, k1 + W1), all modulo 2^32.

    Args:
        counter: int64 tensors that broadcast, values in [0, 2^32).
        key: ints or int64 tensors, values in [0, 2^32).
        rounds: 10 everywhere in this library.

    Numerics: exact integers, the same on every device.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def integers(n: int, *, seed: Tensor | int, sample: Tensor, step: Tensor | int, stream: int) -> Tensor:
    """The first n words of each sample. Returns int64 [B, n], values in [0, 2^32).

    Args:
        n: words a sample.
        seed: 64 bits, an int or an int64 tensor [].
        sample: int64 [B], the index of each sample in the run.
        step: an int or an int64 tensor [], in [0, 2^32); or [B, 1], one for each sample.
        stream: what the noise is for, see `X_T` and its neighbours.
    """
    element = torch.arange((n + 3) // 4, device=sample.device)
    zero = torch.zeros_like(element)
    row = (sample & _WORD).unsqueeze(1)
    words = philox_4x32(
        (element + zero, row, zero + (step & _WORD), zero + stream), (seed & _WORD, (seed >> 32) & _WORD)
    )
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]


def uniform(
    n: int, *, seed: Tensor | int, sample: Tensor, step: Tensor | int, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """u = (i + 1/2) 2^-32 for each word i. Returns [B, n] in (0, 1] (float32 rounds the largest to 1)."""
    return integers(n, seed=seed, sample=sample, step=step, stream=stream).to(dtype) * 2.0**-32 + 2.0**-33


def normal(
    shape: tuple[int, ...],
    *,
    seed: Tensor | int,
    sample: Tensor,
    step: Tensor | int,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of a batch of samples, by Box-Muller on each pair of lanes.

    z_0 = sqrt(-2 ln u_0) cos(2 pi u_1),  z_1 = sqrt(-2 ln u_0) sin(2 pi u_1).

    Args:
        shape: [B, ...] with B = len(sample); elements are counted in the order of the remaining dimensions.
        dtype: float32 or float64; the arithmetic is done in it. The remaining arguments are those of `integers`.

    Returns: a contiguous tensor [B, ...].
    """
    n = math.prod(shape[1:])
    u = uniform(2 * ((n + 1) // 2), seed=seed, sample=sample, step=step, stream=stream, dtype=dtype).unflatten(
        1, (-1, 2)
    )
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), 2.0 * math.pi * u[..., 1]
    z = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return z.flatten(1)[:, :n].reshape(shape)
