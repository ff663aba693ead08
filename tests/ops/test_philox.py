"""The noise: published known answers, what it may depend on, and its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm.ops import philox
from tests.tolerance import assert_equal_to_rounding, assert_normals_within

KNOWN = [  # counter, key, answer: the vectors published with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    for k0, k1 in (key, tuple(torch.tensor(k) for k in key)):
        assert tuple(int(word) for word in philox.philox_4x32((c0, c1, c2, c3), (k0, k1))) == answer


def one_by_one(n: int, seed: int, sample: int, step: int, stream: int) -> list[int]:
    """The words of a sample from Python's integers, which do not wrap."""
    words: list[int] = []
    for block in range(math.ceil(n / 4)):
        c, k = [block, sample, step, stream], [seed % 2**32, seed >> 32]
        for _ in range(10):
            low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [high >> 32 ^ c[1] ^ k[0], high % 2**32, low >> 32 ^ c[3] ^ k[1], low % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words += c
    return words[:n]


SEEDS = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_key_and_counter(seed: int) -> None:
    """Key = the seed's two words; counter = element // 4, sample, step, stream; the same from numbers and tensors."""
    samples, steps = (0, 1, 2**32 - 1), (0, 7, 2**32 - 1)
    sample = torch.tensor(samples)
    for step in steps:
        words = philox.integers(11, seed=seed, sample=sample, step=step, stream=philox.FLIP)
        assert words.shape == (3, 11)
        assert words.tolist() == [one_by_one(11, seed, s, step, 4) for s in samples]
        signed = seed - 2**64 if seed >= 2**63 else seed
        from_tensors = philox.integers(
            11, seed=torch.tensor(signed), sample=sample, step=torch.tensor(step), stream=philox.FLIP
        )
        assert torch.equal(words, from_tensors)


def test_streams_are_those_of_the_specification() -> None:
    streams = philox.X_T, philox.TRAINING_NOISE, philox.SAMPLER_NOISE, philox.T, philox.FLIP, philox.DROPOUT
    assert streams == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 17])
def test_a_longer_draw_starts_with_the_shorter(n: int) -> None:
    """No element depends on how many are drawn."""
    sample = torch.arange(3)
    longest = philox.integers(17, seed=5, sample=sample, step=1, stream=0)
    assert torch.equal(philox.integers(n, seed=5, sample=sample, step=1, stream=0), longest[:, :n])
    normal = philox.normal((3, 17), seed=5, sample=sample, step=1, stream=0)
    assert torch.equal(philox.normal((3, n), seed=5, sample=sample, step=1, stream=0), normal[:, :n])


def test_uniform_and_normal_from_the_integers() -> None:
    sample = torch.tensor([3, 2**31])
    draw = dict(seed=2**40 + 3, sample=sample, step=9, stream=2)
    u = (philox.integers(10, **draw).double() + 0.5) / 2**32
    assert_equal_to_rounding(philox.uniform(10, dtype=torch.float64, **draw), u, ulps=1)
    assert_equal_to_rounding(philox.uniform(10, **draw), u.float(), ulps=1)
    pair = u.unflatten(1, (5, 2))
    z = torch.polar(torch.sqrt(-2 * torch.log(pair[..., 0])), 2 * math.pi * pair[..., 1])
    expected = torch.view_as_real(z).flatten(1)
    scale = expected.abs().max().item()
    assert_equal_to_rounding(philox.normal((2, 10), dtype=torch.float64, **draw), expected, scale=scale)


def test_ends_of_the_uniform() -> None:
    """The largest word gives 1 in float32, and so a normal number 0; the smallest gives the largest one."""
    word = torch.tensor([0, 2**32 - 1])
    u = word.float() * 2.0**-32 + 2.0**-33
    assert u.tolist() == [2.0**-33, 1.0]
    assert_equal_to_rounding(torch.sqrt(-2 * torch.log(u[0])).item(), math.sqrt(66 * math.log(2)), ulps=2**30)


def test_float32_normals_are_within_their_bound() -> None:
    draw = dict(seed=1, sample=torch.arange(4), step=0, stream=0)
    z32, z64 = (philox.normal((4, 3, 100, 100), dtype=d, **draw) for d in (torch.float32, torch.float64))
    assert z32.dtype == torch.float32 and z64.dtype == torch.float64
    assert_normals_within(z32, z64)


def test_elements_count_in_channel_row_column_order() -> None:
    """Whatever the memory format of the images: the noise of NHWC images is that of NCHW images."""
    flat = philox.normal((2, 3 * 4 * 5), seed=3, sample=torch.arange(2), step=0, stream=philox.TRAINING_NOISE)
    expected = flat.reshape(2, 3, 4, 5)
    table, t = torch.tensor([[0.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x0 = torch.zeros(2, 3, 4, 5).contiguous(memory_format=memory_format)
        x_t = fastddpm.q_sample(x0, t, table, seed=3, sample=torch.arange(2), step=0)
        assert isinstance(x_t, Tensor) and x_t.is_contiguous(memory_format=memory_format)
        assert_normals_within(x_t, expected)


def test_the_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    sample = torch.tensor([11, 2, 7, 4_711, 2, 0])
    whole = philox.normal((6, 3, 5, 7), seed=9, sample=sample, step=3, stream=2)
    for split in (1, 2, 4):
        parts = [philox.normal((len(s), 3, 5, 7), seed=9, sample=s, step=3, stream=2) for s in sample.split(split)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole[1], whole[4])
    assert not torch.equal(whole[1], whole[2])


# distribution: each bound is five standard deviations of the statistic, or a probability of 1e-6, at a fixed seed

N = 200_000


def kolmogorov_smirnov(cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution of these values and the uniform one."""
    n = cdf.numel()
    cdf, i = cdf.double().flatten().sort().values, torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * max((cdf - i / n).max().item(), ((i + 1) / n - cdf).max().item())


KS_BOUND = math.sqrt(math.log(2 / 1e-6) / 2)  # P(sqrt(n) D > x) <= 2 exp(-2 x^2)


def z_score(values: Tensor, mean: float) -> float:
    return abs(values.double().mean().item() - mean) / (values.double().std().item() / math.sqrt(values.numel()))


@pytest.mark.parametrize("stream", range(7))
def test_uniform_distribution(stream: int) -> None:
    u = philox.uniform(N // 100, seed=2**63 + stream, sample=torch.arange(100), step=stream, stream=stream).double()
    for power in (1, 2, 3, 4):
        assert z_score(u**power, 1 / (power + 1)) < 5
    assert kolmogorov_smirnov(u) < KS_BOUND
    assert u.min() > 0
    assert u.max() <= 1


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 + 7])
def test_normal_distribution(seed: int) -> None:
    z = philox.normal((100, N // 100), seed=seed, sample=torch.arange(100), step=5, stream=philox.X_T).double()
    for power, moment in enumerate((0.0, 1.0, 0.0, 3.0, 0.0, 15.0), start=1):
        assert z_score(z**power, moment) < 5
    assert kolmogorov_smirnov(torch.special.ndtr(z)) < KS_BOUND


def test_bits_are_fair() -> None:
    words = philox.integers(N // 100, seed=3, sample=torch.arange(100), step=0, stream=1)
    ones = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    count = ones.double().mean(dim=(0, 1))
    assert ((count - 0.5).abs() * 2 * math.sqrt(N) < 5).all()


def test_independence_of_all_that_is_counted() -> None:
    """No correlation between neighbouring elements, lanes, samples, steps, streams and seeds."""

    def draw(seed: int = 1, first: int = 0, step: int = 0, stream: int = 0) -> Tensor:
        sample = torch.arange(first, first + 50)
        return philox.normal((50, 2000), seed=seed, sample=sample, step=step, stream=stream).double()

    z = draw()
    pairs = [
        (z, draw(seed=2)), (z, draw(seed=1 + 2**32)), (z, draw(step=1)), (z, draw(stream=1)), (z[1:], z[:-1]),
        (z[:, 1:], z[:, :-1]), (z[:, 2:], z[:, :-2]), (z[:, 4:], z[:, :-4]), (z[:, ::2] ** 2, z[:, 1::2] ** 2),
    ]  # fmt: skip
    for a, b in pairs:
        product = (a - a.mean()) * (b - b.mean())
        assert z_score(product, 0.0) < 5
    assert torch.equal(draw(first=3)[:-3], z[3:])
