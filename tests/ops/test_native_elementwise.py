"""The C++ kernels that go element by element, on every instruction set: what tiles, threads and strides could break.

`tests.ops.test_native` runs the cases of the contract on every set. Here are sizes around the edge of a tile, channels
that no vector holds, halves of a learned variance, splits of a batch, numbers that are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import _native, ops
from fastddpm.ops import philox
from tests.ops.cases import (
    DTYPES,
    FLOAT,
    LAYOUTS,
    Case,
    Inputs,
    bound_table,
    drawn,
    images,
    rand,
    randn,
    signal_sigma,
    solver_table,
)
from tests.ops.test_contract import check_values, results
from tests.ops.test_native import using

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native module: {_native.reason()}")

OPS = ("q_sample", "solver_step", "diffusion_loss")
SETS = _native.build_info()["native"]["kernel_instruction_sets"] if _native.available() else ["none"]
TILE = 2048  # elements that a kernel takes at a time: TILE of csrc/common/host.h
Make = Callable[[torch.Generator], Inputs]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels run with this set during a test, and with the former one after it."""
    with using(request.param), fastddpm.use_backend("native"):
        yield request.param


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(case: Case, dtype: torch.dtype, layout: str) -> None:
    inputs = case.inputs(dtype, layout)
    check_values(case, results(case, inputs, dtype), inputs, dtype)


# noise


def test_far_tails_and_both_ends_of_the_uniform_numbers(instruction_set: str) -> None:
    """Words whose u is the smallest and the largest of a million: where a logarithm could go wrong."""
    where = dict(seed=5, sample=torch.tensor([1]), step=0, stream=philox.X_T)
    z = ops.normal((1, 2**20), **where)
    words = philox.integers(2**20, **where)[0, 0::2]
    for word in (words.argmin(), words.argmax()):
        pair = z[0, 2 * word : 2 * word + 2].double()
        u = (words[word].double() + 0.5) * 2.0**-32
        assert abs(torch.linalg.vector_norm(pair) - torch.sqrt(-2 * torch.log(u))) < 1e-3  # as assert_normals_within
    assert z.isfinite().all()


# tiles


def shapes_around_tiles() -> list[tuple[int, int, int]]:
    """C, H, W: tiles of NCHW end anywhere in a row; those of NHWC hold whole pixels, of H W % 4 = 0, 1, 2 and 3."""
    edges = [(1, 1, n) for n in (TILE - 1, TILE, 2 * TILE - 1, 2 * TILE)] + [
        (1, n, 1) for n in (TILE + 1, 2 * TILE + 1)
    ]
    channels = [(1, 37, 59), (2, 23, 61), (3, 31, 33), (4, 26, 41), (5, 37, 59), (7, 23, 61), (8, 26, 41)]
    return [*edges, *channels, (3, 2, 341), (3, 3, 683), (130, 4, 5), (TILE + 3, 1, 2), (5, 1, 1)]


def whole(shape: tuple[int, int, int]) -> dict[str, tuple[Make, tuple[str, ...]]]:
    """A call of each op that draws its noise, with inputs of this shape, and what to differentiate it by."""
    c, h, w = shape

    def q_sample(g: torch.Generator) -> Inputs:
        where = drawn(2) | dict(index=torch.tensor([1, 0]), flip=torch.tensor([True, False]))
        return dict(
            x0=images(g, 2, c, h, w), t=torch.tensor([3, 8]), table=signal_sigma(), returns="v", dtype=FLOAT, **where
        )  # fmt: skip

    def diffusion_loss(g: torch.Generator) -> Inputs:
        where = drawn(2) | dict(flip=torch.tensor([False, True]))
        return dict(
            pred=randn(g, 2, c, h, w), t=torch.tensor([3, 8]), table=signal_sigma(), objective="v",
            x0=images(g, 2, c, h, w), weight=0.5 + rand(g, 2), **where,
        )  # fmt: skip

    def solver_step(g: torch.Generator) -> Inputs:
        return dict(
            x=randn(g, 2, c, h, w), out=randn(g, 2, 2 * c, h, w), table=solver_table(g), clamp=1.0, seed=7, step=2,
            sample=torch.tensor([4, 9]), mask=rand(g, 2, 1, h, w), known=randn(g, 2, c, h, w),
            known_table=rand(g, 7, 2),
        )  # fmt: skip

    return {"q_sample": (q_sample, ()), "diffusion_loss": (diffusion_loss, ("pred",)), "solver_step": (solver_step, ())}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_tiles(instruction_set: str, op: str, layout: str) -> None:
    for shape in shapes_around_tiles():
        make, gradients = whole(shape)[op]
        check(Case(op, f"C, H, W = {shape}", make, gradients), torch.float32, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_channels_in_half_precision(instruction_set: str, layout: str) -> None:
    """Where every image is brought to floats, and the halves of a learned variance lie apart."""
    for op, dtype in itertools.product(OPS, DTYPES[1:]):
        for shape in ((2, 9, 5), (3, 7, 9), (4, 3, 3), (5, 5, 5), (7, 5, 3)):
            make, gradients = whole(shape)[op]
            check(Case(op, f"C, H, W = {shape}", make, gradients), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_variance_for_every_number_of_channels(instruction_set: str, layout: str) -> None:
    """Value and gradient of the bound: the halves of pred are read, and those of its gradient written, apart."""
    for channels, dtype in itertools.product((1, 2, 3, 4, 5, 7, 8), (torch.float32, torch.bfloat16)):

        def make(g: torch.Generator, c: int = channels) -> Inputs:
            return dict(
                pred=0.5 * randn(g, 3, 2 * c, 19, 41), t=torch.tensor([0, 1, 9]), target=0.5 * randn(g, 3, c, 19, 41),
                x0=images(g, 3, c, 19, 41), vlb=bound_table(), vlb_weight=0.1,
            )  # fmt: skip

        check(Case("diffusion_loss", f"{channels} channels", make, ("pred",)), dtype, layout)


# what results may not depend on


def call(op: str, inputs: Inputs) -> list[Tensor]:
    if op == "diffusion_loss":
        inputs = inputs | dict(pred=inputs["pred"].detach().requires_grad_())
    outputs = getattr(fastddpm, op)(**inputs)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if op == "diffusion_loss":
        found.append(torch.autograd.grad(found[0], inputs["pred"])[0])
    return [x.detach() for x in found]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_a_bit(instruction_set: str, op: str, layout: str) -> None:
    """Three threads share tiles of the same sample, and the sum of a loss is still taken in one order."""
    make, gradients = whole((3, 131, 127))[op]
    inputs = Case(op, "threads", make, gradients).inputs(torch.float32, layout)
    alone = call(op, inputs)
    torch.set_num_threads(3)
    try:
        together = call(op, inputs)
    finally:
        torch.set_num_threads(1)
    for x, y in zip(alone, together, strict=True):
        assert torch.equal(x, y)


def test_threads_do_not_change_the_noise(instruction_set: str) -> None:
    where = dict(seed=3, sample=torch.arange(2), step=1, stream=philox.X_T)
    alone = ops.normal((2, 50_001), **where)
    words = torch.ops.fastddpm.philox_words(50_001, 3, None, where["sample"], 1, None, 0)
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.normal((2, 50_001), **where), alone)
        assert torch.equal(torch.ops.fastddpm.philox_words(50_001, 3, None, where["sample"], 1, None, 0), words)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_a_batch_may_be_split(instruction_set: str, op: str, layout: str) -> None:
    """Each sample alone gives the bits that it gives in the batch: its noise belongs to it."""
    make, gradients = whole((3, 17, 41))[op]
    inputs = Case(op, "split", make, gradients).inputs(torch.float32, layout)
    together = call(op, inputs)
    of_batch = {"t", "index", "flip", "sample", "weight", "pred", "x", "out", "mask", "known"}
    of_batch |= {"x0"} if op == "diffusion_loss" else set()
    for b in range(2):
        alone = call(op, {name: x[b : b + 1] if name in of_batch else x for name, x in inputs.items()})
        if op == "diffusion_loss":  # the loss is a mean over the batch, and so its gradient
            assert torch.equal(alone[1], together[1][b : b + 1])
            assert torch.equal(alone[2], 2 * together[2][b : b + 1])
        else:
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x, y[b : b + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_op_draws_the_noise_of_normal(instruction_set: str, layout: str) -> None:
    """The same bits in both memory orders and in every op, so that a loss knows the noise that was put in."""
    where = dict(seed=2**63 + 5, sample=torch.tensor([7, 2**32 - 1]), step=0)
    for shape in ((2, 3, 17, 41), (2, 5, 9, 9), (2, 1, 50, 50), (2, 8, 3, 7), (2, 4, 31, 33), (2, 130, 3, 3)):
        training, sampler = (
            ops.normal(shape, stream=s, **where) for s in (philox.TRAINING_NOISE, philox.SAMPLER_NOISE)
        )
        zeros, t = torch.zeros(shape).contiguous(memory_format=LAYOUTS[layout]), torch.tensor([0, 1])
        _, noise = fastddpm.q_sample(zeros, t, torch.ones(2, 2), returns="noise", **where)
        assert torch.equal(noise, training), shape
        x, _ = fastddpm.solver_step(zeros, zeros, torch.tensor([[0.0, 0, 0, 0, 0, 1, 0, 0, 0]]), **where)
        assert torch.equal(x, sampler), shape
        x, _ = fastddpm.solver_step(
            zeros, zeros, torch.zeros(1, 9), mask=torch.ones(1, 1, *shape[2:]), known=zeros,
            known_table=torch.tensor([[0.0, 1.0]]), **where,
        )  # fmt: skip
        assert torch.equal(x, training), shape
        of_zero = call("diffusion_loss", dict(pred=zeros, t=t, **where))[2]  # -2 z / n
        of_given = call("diffusion_loss", dict(pred=zeros, t=t, target=training))[2]
        assert of_zero.any() and torch.equal(of_zero, of_given), shape


# strides, and numbers that are not


@pytest.mark.parametrize("op", OPS)
def test_vectors_with_gaps(instruction_set: str, op: str) -> None:
    """What is given for each sample may be a slice or expanded, tables may be slices, a mask may have any strides."""
    make, gradients = whole((3, 5, 7))[op]
    inputs = Case(op, "gaps", make, gradients).inputs()
    if op == "solver_step":
        inputs["clamp"] = torch.tensor([0.5, 0.75])
        inputs["mask"] = inputs["mask"].expand(2, 3, 5, 7).contiguous()
    inputs |= {"sample": torch.tensor([4, 4])}
    dense = call(op, inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.dim() in (1, 2) and name != "sample":
            inputs[name] = torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]
            assert not inputs[name].is_contiguous()
        if name == "mask":
            inputs[name] = x.transpose(2, 3).contiguous().transpose(2, 3)
    inputs["sample"] = torch.tensor([4]).expand(2)
    for x, y in zip(dense, call(op, inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_are_clamped_as_torch_does(instruction_set: str, layout: str) -> None:
    """At every place of a vector; a bound that is NaN makes all of its sample NaN, as in the reference."""
    table = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0, 0, 0]])  # pred = clamp(x): every number below is exact
    for at in range(67):
        x = torch.linspace(-2, 2, 67).repeat(3, 3, 1)[:, :, None, :]
        x[0, 1, 0, at], x[1, 2, 0, at], x[2, 0, 0, at] = math.nan, -math.inf, math.inf
        x = x.contiguous(memory_format=LAYOUTS[layout])
        for clamp in (0.5, torch.tensor([0.5, 0.25, 1.5]), torch.tensor([0.5, math.nan, 1.5]), None):
            found = fastddpm.solver_step(x, torch.zeros_like(x), table, 0, clamp=clamp)
            with fastddpm.use_backend("reference"):
                expected = fastddpm.solver_step(x, torch.zeros_like(x), table, 0, clamp=clamp)
            for y, z in zip(found, expected, strict=True):
                assert torch.equal(torch.where(y.isnan(), 9, y), torch.where(z.isnan(), 9, z))


def test_a_nan_reaches_the_loss_and_its_own_gradient_alone(instruction_set: str) -> None:
    pred, target = torch.zeros(2, 3, 1, 23), torch.zeros(2, 3, 1, 23)
    pred[1, 2, 0, 22] = math.nan
    loss, per_sample = fastddpm.diffusion_loss(pred.requires_grad_(), torch.tensor([0, 1]), target=target)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.isnan() and torch.equal(per_sample.isnan(), torch.tensor([False, True]))
    assert gradient.isnan().sum() == 1 and gradient[1, 2, 0, 22].isnan()


def test_guidance_is_exact_at_0_and_1(instruction_set: str) -> None:
    g = generator()
    x, out, uncond = (randn(g, 2, 3, 5, 7).float() for _ in range(3))
    table = torch.tensor([[0.0, 1, 0, 0, 0, 0, 1, 0, 0]])
    for scale, expected in ((0.0, uncond), (1.0, out), (torch.tensor(1.0), out)):
        x_next, pred = fastddpm.solver_step(x, out, table, 0, out_uncond=uncond, guidance_scale=scale)
        assert torch.equal(x_next, expected) and torch.equal(pred, expected)


def test_no_noise_where_the_table_has_none(instruction_set: str) -> None:
    """A step whose k5 is 0 gives the same with a seed and without, for a learned variance too."""
    g = generator()
    x, out, table = randn(g, 2, 3, 5, 7).float(), randn(g, 2, 6, 5, 7).float(), solver_table(g)
    last = len(table) - 1
    drawn_here = fastddpm.solver_step(x, out, table, last, seed=7, sample=torch.arange(2))
    for y, z in zip(drawn_here, fastddpm.solver_step(x, out, table, last), strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_gives_the_bits_of_a_new_tensor(instruction_set: str, dtype: torch.dtype, layout: str) -> None:
    """Also where pred is written in the other order, and in tiles that end inside a row."""
    g = generator()
    memory, other = LAYOUTS[layout], next(m for name, m in LAYOUTS.items() if name != layout)
    options = dict(clamp=1.0, seed=7, sample=torch.arange(2))
    for shape in ((2, 3, 27, 29), (2, 5, 3, 3)):
        x, out, prev = (randn(g, *shape).to(dtype).contiguous(memory_format=memory) for _ in range(3))
        for order in (memory, other):
            before = prev.contiguous(memory_format=order)
            expected = fastddpm.solver_step(x, out, solver_table(generator()), 1, pred_prev=before, **options)
            state, kept = x.clone(), before.clone()
            found = fastddpm.solver_step(
                state, out, solver_table(generator()), 1, pred_prev=kept, inplace=True, **options
            )
            assert found[0].data_ptr() == state.data_ptr() and found[1].data_ptr() == kept.data_ptr()
            assert torch.equal(state, expected[0]) and torch.equal(kept, expected[1])
