"""self_attention in C++: sizes around the edges of its blocks, heads, samples in groups, what is not finite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import _native
from tests.ops.cases import Case, Inputs, randn
from tests.ops.test_contract import poisoned_memory, reference_results, results
from tests.ops.test_native import check_threads_change_no_bit, instruction_set, pairs  # noqa: F401, the fixtures
from tests.tolerance import assert_within

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}")

STATM = Path("/proc/self/statm")
HALF, SINGLE = torch.bfloat16, torch.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# samples, tokens, heads, numbers of each: around a vector, a panel, the queries of an item, an item of a gradient
SIZES = [
    (6, 1, 5, 7), (4, 2, 2, 16), (3, 15, 3, 1), (3, 16, 1, 15), (2, 17, 2, 31), (2, 31, 1, 33), (2, 32, 2, 17),
    (2, 33, 3, 2), (1, 47, 2, 32), (1, 48, 1, 65), (1, 49, 3, 3), (1, 64, 2, 64), (1, 95, 1, 129), (1, 97, 2, 12),
    (1, 128, 1, 63), (1, 129, 3, 5), (1, 145, 1, 128), (2, 65, 1, 130), (1, 256, 1, 3), (1, 20, 1, 257),
]  # fmt: skip


def attention(samples: int, tokens: int, heads: int, numbers: int, mean: float = 1.0) -> Case:
    return Case(
        "self_attention",
        f"{samples} samples of {tokens} tokens, {heads} heads of {numbers}",
        lambda g: dict(qkv=mean + 1.5 * randn(g, samples, tokens, 3 * heads * numbers), heads=heads),
        gradients=("qkv",),
    )


def parts(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of queries, keys and values apart: each must be right beside the largest of them."""
    y, gradient = found["output 0"], found["gradient of qkv"]
    return {"y": y} | dict(zip(("queries", "keys", "values"), gradient.chunk(3, dim=2), strict=True))


def check_parts(case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    with fastddpm.use_backend("native"), poisoned_memory():
        found = results(case, inputs, dtype)
    in64, in32 = (parts(wide) for wide in reference_results(case, inputs, dtype))
    for name, value in parts(found).items():
        assert value.dtype == dtype
        assert_within(value, in64[name], in32[name], f"{case.name}: {name}")


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_the_edges(dtype: torch.dtype) -> None:
    for size in SIZES:
        case = attention(*size)
        check_parts(case, case.inputs(dtype), dtype)


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_much_larger_than_the_deviation(dtype: torch.dtype) -> None:
    """Of values that is a mean of y and nothing of the scores, of keys an equal part of each score."""
    case = attention(2, 70, 2, 33)
    inputs = case.inputs(SINGLE)
    for part, mean in ((1, 30.0), (2, 100.0)):
        qkv = inputs["qkv"].clone()
        qkv.chunk(3, dim=2)[part].add_(mean)
        check_parts(case, inputs | dict(qkv=qkv.to(dtype)), dtype)


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("size", [(2, 200, 3, 33), (3, 40, 1, 140)], ids=["many queries", "many numbers"])
def test_threads_change_no_bit(size: tuple[int, ...]) -> None:
    case = attention(*size)
    check_threads_change_no_bit(case, case.inputs(HALF), HALF)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_many_samples_each_is_what_it_is_alone(dtype: torch.dtype) -> None:
    """They are taken in groups whose scores and panels take 1 MiB for each thread: here of 2, the last of 1."""
    samples, tokens, heads, numbers = 23, 200, 2, 4
    qkv = torch.randn(samples, tokens, 3 * heads * numbers).to(dtype)
    dy = torch.randn(samples, tokens, heads * numbers).to(dtype)

    def with_gradient(some: slice) -> tuple[Tensor, Tensor]:
        given = qkv[some].clone().requires_grad_()
        y = fastddpm.self_attention(given, heads)
        return y.detach(), torch.autograd.grad(y, given, dy[some])[0]

    with fastddpm.use_backend("native"):
        together = with_gradient(slice(None))
        assert torch.equal(fastddpm.self_attention(qkv, heads), together[0])
        for i in range(samples):
            for whole, alone in zip(together, with_gradient(slice(i, i + 1)), strict=True):
                assert torch.equal(whole[i : i + 1], alone), i


@pytest.mark.skipif(not STATM.exists(), reason="the memory of a process is read as Linux tells it")
def test_panels_of_few_tokens_are_kept_within_bounds() -> None:
    """A panel of one token takes the room of 32: together those of all samples would take 280 MB."""

    def resident() -> int:
        return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    qkv = torch.zeros(4096, 1, 3 * 512)
    _native.free_scratch()
    before = resident()
    with fastddpm.use_backend("native"):
        y = fastddpm.self_attention(qkv)
    more = resident() - before
    assert not y.any() and more < 30e6, f"{more / 1e6:.0f} MB more"
    _native.free_scratch()


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_gradient_y_has_the_same_bits(dtype: torch.dtype) -> None:
    for size in SIZES:
        inputs = attention(*size).inputs(dtype)
        with fastddpm.use_backend("native"):
            y = fastddpm.self_attention(**inputs)
            assert torch.equal(fastddpm.self_attention(inputs["qkv"].requires_grad_(), inputs["heads"]), y), size


@pytest.mark.usefixtures("instruction_set")
def test_pairs_are_of_bfloat16_alone() -> None:
    """Other dtypes have the same bits with them and without."""
    from fastddpm import _C

    case = attention(2, 50, 2, 33)
    differ = {}
    try:
        for dtype in DTYPES:
            found = []
            for wanted in (True, False):
                _C.use_pairs(wanted)
                with fastddpm.use_backend("native"):
                    found.append(results(case, case.inputs(dtype), dtype))
            differ[dtype] = any(not torch.equal(x, found[1][name]) for name, x in found[0].items())
    finally:
        _C.use_pairs(None)
    assert not differ[torch.float32] and not differ[torch.float16]


# heads, samples


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_and_samples_are_apart(dtype: torch.dtype) -> None:
    """Each is what it is alone, y and gradient, bit by bit."""
    samples, tokens, heads, numbers = 2, 50, 3, 21
    qkv = torch.randn(samples, tokens, 3, heads, numbers).to(dtype)
    dy = torch.randn(samples, tokens, heads, numbers).to(dtype)

    def with_gradient(some: Tensor, upstream: Tensor) -> list[Tensor]:
        given = some.flatten(2).requires_grad_()
        y = fastddpm.self_attention(given, some.shape[3])
        (gradient,) = torch.autograd.grad(y, given, upstream.flatten(2))
        return [y.detach().view(upstream.shape), gradient.view(some.shape)]

    with fastddpm.use_backend("native"):
        y, gradient = with_gradient(qkv, dy)
        for b in range(samples):
            for h in range(heads):
                one, of_one = with_gradient(qkv[b : b + 1, :, :, h : h + 1], dy[b : b + 1, :, h : h + 1])
                assert torch.equal(one[0, :, 0], y[b, :, h]) and torch.equal(of_one[0, :, :, 0], gradient[b, :, :, h])


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart_pick_one_value(dtype: torch.dtype) -> None:
    """Query i is key i + 1, and orthogonal to the others: y is the next value, bit by bit; no exponential overflows."""
    tokens = 37
    keys = 256.0 * torch.eye(tokens)
    values = torch.randn(tokens, tokens)
    qkv = torch.cat((keys.roll(-1, 0), keys, values), dim=1)[None].to(dtype)
    with fastddpm.use_backend("native"):
        y = fastddpm.self_attention(qkv)
    assert torch.equal(y[0], values.roll(-1, 0).to(dtype))


# what is not finite

ELEMENTS = {
    "query": (0, 5, 0, 1, 2), "key": (0, 40, 1, 1, 2), "value": (1, 40, 2, 0, 20), "last key": (1, 49, 1, 0, 20),
}  # fmt: skip


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ELEMENTS)
def test_nan_and_infinity_reach_what_they_do_in_torch(name: str, what: float) -> None:
    """Of y and of the gradient: those heads and rows, and no other."""
    heads, numbers = 2, 21
    for dtype in DTYPES:
        qkv = attention(2, 50, heads, numbers).inputs(dtype)["qkv"]
        qkv.view(2, 50, 3, heads, numbers)[ELEMENTS[name]] = what
        dy = torch.randn(2, 50, heads * numbers).to(dtype)
        found = []
        for backend in ("native", "reference"):
            given = qkv.clone().requires_grad_()
            with fastddpm.use_backend(backend):
                y = fastddpm.self_attention(given, heads)
                found.append([y.detach(), *torch.autograd.grad(y, given, dy)])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isposinf(), theirs.isposinf()) and torch.equal(ours.isneginf(), theirs.isneginf())
            assert not ours.isfinite().all() and ours[1 - ELEMENTS[name][0]].isfinite().all()


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("what", [float("nan"), float("inf")], ids=str)
def test_a_gradient_that_is_not_finite_spoils_its_head_alone(what: float) -> None:
    for dtype in DTYPES:
        qkv = attention(2, 50, 2, 21).inputs(dtype)["qkv"].requires_grad_()
        dy = torch.randn(2, 50, 2, 21)
        dy[1, 30, 1, 4] = what
        with fastddpm.use_backend("native"):
            (gradient,) = torch.autograd.grad(fastddpm.self_attention(qkv, 2), qkv, dy.flatten(2).to(dtype))
        spoiled = ~gradient.view(2, 50, 3, 2, 21).isfinite()
        assert not spoiled[0].any() and not spoiled[1, :, :, 0].any()
        queries, keys, values = spoiled[1, :, :, 1].unbind(1)
        assert queries[30].all() and queries.sum() == 21 and keys.all() and values[:, 4].all() and values.sum() == 50


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_the_call_before(dtype: torch.dtype) -> None:
    """In memory that kernels keep from call to call."""
    spoiling = attention(3, 130, 2, 70)
    nan = spoiling.inputs(dtype)
    nan["qkv"].fill_(torch.nan)
    for size in ((2, 9, 2, 7), (2, 50, 1, 33)):
        with fastddpm.use_backend("native"):
            results(spoiling, nan, dtype)
        check_parts(attention(*size), attention(*size).inputs(dtype), dtype)


# no samples, no tokens, strides


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 9, 42), (3, 0, 42), (0, 0, 6)], ids=str)
def test_nothing_to_look_at(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    qkv = torch.randn(shape, dtype=dtype, requires_grad=True)
    with fastddpm.use_backend(backend):
        y = fastddpm.self_attention(qkv, 2)
        (gradient,) = torch.autograd.grad(y, qkv, torch.ones_like(y))
        assert fastddpm.self_attention(qkv.detach(), 2).shape == y.shape
    assert y.shape == (*shape[:2], shape[2] // 3) and gradient.shape == shape
    assert y.dtype == gradient.dtype == dtype


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns": lambda x: x.mT.contiguous().mT,
    "every second sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second number": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "within another": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 1))[:, 1:-1, 3:-5],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", VIEWS)
def test_views_give_the_bits_of_what_is_dense(kind: str, dtype: torch.dtype) -> None:
    view = VIEWS[kind]
    qkv, dy = (attention(3, 20, 2, 7).inputs(dtype)["qkv"], torch.randn(3, 20, 14).to(dtype))
    found = []
    with fastddpm.use_backend("native"):
        for given, upstream in ((qkv, dy), (view(qkv), view(dy))):
            given = given.detach().requires_grad_()
            y = fastddpm.self_attention(given, 2)
            found.append([y, *torch.autograd.grad(y, given, upstream)])
    assert not view(qkv).is_contiguous()
    for dense, other in zip(*found, strict=True):
        assert torch.equal(dense, other)
        assert other.is_contiguous()


# which implementation


def test_explain_says_who_computes_it() -> None:
    text = fastddpm.explain(fastddpm.self_attention, torch.zeros(1, 4, 6))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert "chosen" in lines["native"] and "can run" in lines["reference"]
    text = fastddpm.explain(fastddpm.self_attention, torch.zeros(1, 4, 6, dtype=torch.float64))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert "the reference computes in float64" in lines["native"] and "chosen" in lines["reference"]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_of_the_gradient_is_refused(backend: str) -> None:
    qkv = torch.randn(2, 9, 12, requires_grad=True)
    with fastddpm.use_backend(backend):
        (gradient,) = torch.autograd.grad(fastddpm.self_attention(qkv, 2).square().sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="no gradient of the gradient"):
            gradient.sum().backward()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_operators_pass_opcheck(dtype: torch.dtype, training: bool) -> None:
    qkv, dy = torch.randn(2, 9, 30).to(dtype), torch.randn(2, 9, 10).to(dtype)
    torch.library.opcheck(torch.ops.fastddpm.self_attention, (qkv, 2, training))
    if training:
        _, weights = torch.ops.fastddpm.self_attention(qkv, 2, True)
        assert weights.dtype == SINGLE and weights.shape == (2, 2, 9, 9)
        torch.library.opcheck(torch.ops.fastddpm.self_attention_backward, (dy, qkv, weights, 2))
