"""The C++ kernels: every instruction set, any number of threads, sizes around the edges of a tile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastddpm
from fastddpm import _native
from fastddpm.ops import normal, philox
from tests.ops.cases import CASES, DEVICES, DTYPES, LAYOUTS, Case, Inputs, drawn, images, randn, signal_sigma
from tests.ops.test_contract import check_values, results
from tests.tolerance import assert_near_peer, assert_normals_within, assert_within

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}")

SETS = _native.build_info()["native"]["kernel_instruction_sets"] if _native.available() else []


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernels with this set, where the processor has it."""
    from fastddpm import _C

    before = _C.instruction_set()
    try:
        _C.use_instruction_set(name)
    except ValueError as lacks:
        pytest.skip(f"{name}: {lacks}")
    try:
        yield
    finally:
        _C.use_instruction_set(before)


def check_threads_change_no_bit(case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    """Of the results and the gradients; the number of threads is put back after each test."""
    found = []
    with fastddpm.use_backend("native"):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(case, inputs, dtype))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the kernels with each set that the processor has."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=[True, False], ids=["pairs", "numbers"])
def pairs(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Multiply numbers of bfloat16 in pairs, or one by one, whichever is faster here."""
    from fastddpm import _C

    _C.use_pairs(request.param)
    try:
        yield request.param
    finally:
        _C.use_pairs(None)


@pytest.fixture(name="device", params=[*SETS, *DEVICES[1:]])
def device_fixture(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where to run the kernels: on the CPU with each set that it has, or on a GPU."""
    on_cpu = request.param in SETS
    with using(request.param) if on_cpu else contextlib.nullcontext():
        yield "cpu" if on_cpu else request.param


def test_an_unknown_instruction_set_is_refused() -> None:
    from fastddpm import _C

    with pytest.raises(ValueError, match="no kernels were built for mmx"):
        _C.use_instruction_set("mmx")


def test_pairs_are_multiplied_where_asked_for() -> None:
    """Else as it is faster, which is never without the instruction for it; every call asks anew."""
    from fastddpm import _C

    before = _native.multiplies_pairs()
    try:
        for wanted in (True, False, True):
            _C.use_pairs(wanted)
            assert _native.multiplies_pairs() is wanted is _native.build_info()["native"]["multiplies_pairs"]
    finally:
        _C.use_pairs(None)
    assert _native.multiplies_pairs() is before
    for name in SETS[:-1]:
        with using(name):
            assert not _native.multiplies_pairs()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_every_instruction_set(instruction_set: str, case: Case, layout: str) -> None:
    for dtype in DTYPES:
        inputs = case.inputs(dtype, layout)
        with fastddpm.use_backend("native"):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 63, 64, 65, 1000])
def test_the_integers_are_those_of_the_reference(device: str, n: int) -> None:
    sample = torch.tensor([0, 5, 2**32 - 1], device=device)
    for seed, step in ((2**63 + 11, 2**32 - 1), (torch.tensor(-5, device=device), torch.tensor(7, device=device))):
        numbers = (*_pair(seed), sample, *_pair(step), 3)
        words = torch.ops.fastddpm.philox_words(n, *numbers)
        assert torch.equal(words, philox.integers(n, seed=seed, sample=sample, step=step, stream=3))


def _pair(x: torch.Tensor | int) -> tuple[int, torch.Tensor | None]:
    return (0, x) if isinstance(x, torch.Tensor) else (x - 2**64 if x >= 2**63 else x, None)


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 2047), (2, 2048), (2, 2049), (1, 3, 40, 37)])
def test_normal_numbers(device: str, shape: tuple[int, ...]) -> None:
    draw = drawn(shape[0])
    draw["sample"] = draw["sample"].to(device)
    with fastddpm.use_backend("native"):
        z = normal(shape, stream=1, **draw)
        halves = [normal((1, *shape[1:]), stream=1, **draw | dict(sample=draw["sample"][[i]])) for i in range(shape[0])]
        rounded = normal(shape, stream=1, dtype=torch.bfloat16, **draw)
    assert_normals_within(z, philox.normal(shape, stream=1, dtype=torch.float64, **draw))
    assert torch.equal(torch.cat(halves), z)  # the same in any split of the batch
    assert torch.equal(rounded, z.bfloat16())


def sized(op: str, channels: int, pixels: tuple[int, int]) -> Case:
    """A call with these sizes: odd, or around the edge of a tile or of a block."""
    height, width = pixels

    def make(g: torch.Generator) -> dict[str, Any]:
        shape = (2, channels, height, width)
        if op == "q_sample":
            return dict(
                x0=images(g, *shape), t=torch.tensor([1, 2]), table=signal_sigma(), flip=torch.tensor([True, False]),
                dtype=torch.float32, **drawn(2),
            )  # fmt: skip
        if op == "diffusion_loss":
            return dict(pred=randn(g, *shape), t=torch.tensor([1, 2]), **drawn(2))
        if op == "group_norm_silu":
            weight, bias = 1 + 0.3 * randn(g, channels), 0.3 * randn(g, channels)
            return dict(x=randn(g, *shape), weight=weight, bias=bias, num_groups=1, dropout=0.2, **drawn(2))
        return dict(x=randn(g, *shape), weight=1 + 0.3 * randn(g, channels))

    # of one channel the gradient of the weight is one number, whose error the rule has nothing to average over
    norm = ("x", "weight") if channels > 1 else ("x",)
    gradients = {"q_sample": (), "diffusion_loss": ("pred",)}.get(op, norm)
    return Case(op, f"{channels} channels of {height}x{width}", make, gradients=gradients)


SIZES = [(1, (1, 2047)), (1, (32, 64)), (2, (1025, 1)), (3, (13, 53)), (4, (16, 33)), (5, (7, 59)), (17, (11, 13)),
         (129, (5, 3)), (260, (3, 3))]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "group_norm_silu", "rms_norm_silu"])
def test_sizes_around_the_edges(op: str, layout: str) -> None:
    for channels, pixels in SIZES:
        case = sized(op, channels, pixels)
        inputs = case.inputs(torch.float32, layout)
        with fastddpm.use_backend("native"):
            found = results(case, inputs)
        check_values(case, found, inputs, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "group_norm_silu", "rms_norm_silu"])
def test_threads_change_no_bit(op: str, layout: str) -> None:
    for channels, pixels in ((3, (181, 191)), (64, (64, 64))):
        case = sized(op, channels, pixels)
        check_threads_change_no_bit(case, case.inputs(torch.float32, layout), torch.float32)


def test_samples_that_threads_share_are_the_same() -> None:
    """Group norm of more samples than threads: a thread that has a part of one finds the moments of the whole."""
    x = torch.randn(5, 64, 24, 24).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(64), torch.rand(64)
    found = []
    with fastddpm.use_backend("native"):
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(fastddpm.group_norm_silu(x, weight, bias, 32))
        alone = [fastddpm.group_norm_silu(x[i : i + 1], weight, bias, 32) for i in range(5)]
    assert all(torch.equal(y, found[0]) for y in [*found[1:], torch.cat(alone)])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("channels", "layout"), [(64, "NHWC"), (72, "NHWC"), (64, "NCHW")])
def test_what_is_written_past_the_caches_is_the_same(channels: int, layout: str, threads: int) -> None:
    """Group norm of float32 writes y and dx of 16 MiB and more past the caches, those of one sample alone not."""
    torch.set_num_threads(threads)
    x, dy = (torch.randn(4, channels, 128, 128).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias = torch.rand(channels), torch.rand(channels)

    def norm(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = fastddpm.group_norm_silu(x, weight, bias, 8)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    with fastddpm.use_backend("native"):
        found = norm(x, dy)
        alone = [norm(*parts) for parts in zip(x.split(1), dy.split(1), strict=True)]
    for all_of_it, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert all_of_it.nbytes >= 2**24 and parts[0].nbytes < 2**23
        assert torch.equal(all_of_it, torch.cat(parts))


def test_a_step_of_the_optimiser_with_channels_last_parameters() -> None:
    """All tensors of a parameter lie as it does: moments of other strides raise, and those of its own are right.

    (torch's fused AdamW on the CPU pairs elements by their place in memory, whatever their strides.)
    """
    g = torch.Generator().manual_seed(0)
    p, grad = (torch.randn(4, 3, 5, 5, generator=g).contiguous(memory_format=torch.channels_last) for _ in range(2))
    moments = [torch.zeros(4, 3, 5, 5), torch.zeros(4, 3, 5, 5)]
    with pytest.raises(ValueError, match=r"exp_avg\[0\] with shape .* and strides"):
        fastddpm.adam_ema([p], [grad], [moments[0]], [moments[1]], step=torch.tensor(0), lr=0.1)
    expected, m, v = p.clone(), *(torch.zeros_like(p) for _ in range(2))
    fastddpm.adam_ema([p], [grad], [m], [v], step=torch.tensor(0), lr=0.1)
    assert_near_peer(p, expected - 0.1 * grad.sign())  # what a first step of Adam is


def test_the_gradient_of_a_float64_residual() -> None:
    g = torch.Generator().manual_seed(0)
    x, residual = randn(g, 2, 8, 3, 5).float(), randn(g, 2, 8, 3, 5)
    found = []
    for given in (residual, residual.float()):
        given = given.requires_grad_()
        with fastddpm.use_backend("native"):
            y, h = fastddpm.group_norm_silu(x, torch.ones(8), torch.zeros(8), 4, residual=given)
        found.append(torch.autograd.grad((y * x).sum() + h.square().sum(), given)[0])
    assert found[0].dtype == torch.float64
    assert_within(found[0].float(), found[1].double(), found[1], "a residual")
