"""Noise that belongs to the sample: published answers, the order of elements, and independence of everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.ops import philox
from tests.tolerance import assert_normals_within

# Random123 1.14, kat_vectors: philox4x32-10 as counter, key, answer
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def draw(**changes: Any) -> Tensor:
    given: dict[str, Any] = dict(seed=7, sample=torch.arange(3), step=2, stream=philox.TRAINING_NOISE)
    return philox.integers(10, **{**given, **changes})


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = [torch.tensor([word]) for word in counter]
    assert tuple(int(w) for w in philox.philox_4x32(tuple(words), key)) == answer  # type: ignore[arg-type]


def test_the_counter_is_element_sample_step_stream() -> None:
    """Words 4c..4c+3 of a sample are the lanes of counter (c, sample, step, stream) under key (low, high)."""
    seed, sample, step = 2**63 + 2**40 + 17, 2**31 + 3, 12345
    words = philox.integers(11, seed=seed, sample=torch.tensor([sample]), step=step, stream=philox.T)[0]
    for c in range(3):
        counter = tuple(torch.tensor([v]) for v in (c, sample, step, philox.T))
        lanes = philox.philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))  # type: ignore[arg-type]
        assert words[4 * c : 4 * c + 4].tolist() == [int(lane) for lane in lanes][: 11 - 4 * c]


def test_any_split_of_the_batch_draws_the_same() -> None:
    whole = draw()
    parts = [draw(sample=torch.tensor([n])) for n in (2, 0, 1)]
    assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))


@pytest.mark.parametrize("changes", [dict(seed=8), dict(seed=7 + 2**32), dict(step=3), dict(stream=philox.X_T)])
def test_another_seed_step_or_stream_is_other_noise(changes: dict[str, int]) -> None:
    assert (draw() != draw(**changes)).float().mean() > 0.9


def test_tensors_and_ints_agree() -> None:
    assert torch.equal(draw(), draw(seed=torch.tensor(7), step=torch.tensor(2)))
    signed = torch.tensor(-1)  # the int64 with the bits of 2^64 - 1
    assert torch.equal(draw(seed=2**64 - 1), draw(seed=signed))


def test_box_muller_pairs() -> None:
    u = philox.uniform(8, seed=1, sample=torch.arange(2), step=0, stream=0, dtype=torch.float64)
    z = philox.normal((2, 2, 2, 2), seed=1, sample=torch.arange(2), step=0, stream=0, dtype=torch.float64).flatten(1)
    for pair in range(4):
        r = (-2 * u[:, 2 * pair].log()).sqrt()
        angle = 2 * math.pi * u[:, 2 * pair + 1]
        assert_normals_within(z[:, 2 * pair], r * angle.cos())
        assert_normals_within(z[:, 2 * pair + 1], r * angle.sin())


def test_uniforms_are_half_steps_of_the_words() -> None:
    words = draw()
    u = philox.uniform(10, seed=7, sample=torch.arange(3), step=2, stream=philox.TRAINING_NOISE, dtype=torch.float64)
    assert torch.equal(u * 2**32 - 0.5, words.double())


def test_float32_normals_are_within_the_bound() -> None:
    given: dict[str, Any] = dict(seed=3, sample=torch.arange(64), step=9, stream=philox.SAMPLER_NOISE)
    single = philox.normal((64, 3, 16, 16), **given)
    assert single.dtype == torch.float32
    assert_normals_within(single, philox.normal((64, 3, 16, 16), dtype=torch.float64, **given))


def test_moments_and_distribution() -> None:
    """2^20 numbers: moments within five standard errors, Kolmogorov-Smirnov below the 1e-6 quantile."""
    z = philox.normal((64, 2**14), seed=0, sample=torch.arange(64), step=0, stream=1, dtype=torch.float64).flatten()
    n = z.numel()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(moment).mean() - expected) < 5 * math.sqrt(variance / n)
    ordered = torch.special.ndtr(z.sort().values)
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (ordered - ranks).abs().max() < math.sqrt(-0.5 * math.log(1e-6 / 2) / n)
    lag = (z[:-1] * z[1:]).mean()
    assert abs(lag) < 5 / math.sqrt(n)
