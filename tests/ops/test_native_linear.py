"""The C++ kernels of linear: rows and panels around their edges, threads, kept weights, few rows, strides, no rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import _native
from fastddpm.ops.kept import is_kept, keep_transformed
from tests.ops.cases import FLOAT, Case, randn
from tests.ops.test_contract import Recorded, check_values, results
from tests.ops.test_native import check_threads_change_no_bit, instruction_set, pairs  # noqa: F401, the fixtures

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}")

HALF, SINGLE = torch.bfloat16, torch.float32
# rows, inputs of x and of x2, outputs: around a vector, the rows in registers, a panel, a block, an item of a gradient
SIZES = [
    (1, 15, 0, 16), (3, 16, 1, 31), (11, 33, 5, 32), (12, 64, 12, 33), (13, 65, 33, 8), (31, 1, 96, 128),
    (95, 12, 0, 97), (96, 127, 0, 12), (97, 128, 1, 129), (193, 31, 32, 65), (200, 129, 130, 64),
]  # fmt: skip


def product(rows: int, inputs: int, more: int, outputs: int, mean: float = 3.0) -> Case:
    return Case(
        "linear",
        f"{rows} rows of {inputs} and {more} columns to {outputs}",
        lambda g: dict(
            x=mean + randn(g, rows, inputs), weight=0.1 * randn(g, outputs, inputs + more), bias=randn(g, outputs),
            **(dict(x2=mean + randn(g, rows, more), residual=randn(g, rows, outputs)) if more else {}), dtype=FLOAT,
        ),
        gradients=("x", "weight", "bias", *(("x2", "residual") if more else ())),
    )  # fmt: skip


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_around_the_edges(dtype: torch.dtype) -> None:
    for size in SIZES:
        case = product(*size)
        inputs = case.inputs(dtype)
        with fastddpm.use_backend("native"):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype)


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("size", [(999, 300, 41, 260), (1500, 60, 0, 50)], ids=["many panels", "many slices"])
def test_threads_change_no_bit(size: tuple[int, ...]) -> None:
    case = product(*size)
    check_threads_change_no_bit(case, case.inputs(HALF), HALF)


# numbers of bfloat16 in pairs


@pytest.mark.usefixtures("instruction_set")
def test_every_number_of_a_pair_counts_once(pairs: bool) -> None:  # noqa: F811
    """Of whole numbers sums are exact: y and the gradients, of odd numbers of inputs, of x2 and of rows, too."""
    for rows, inputs, more, outputs in ((1, 1, 0, 1), (3, 7, 0, 5), (65, 9, 4, 33), (65, 8, 3, 33), (129, 131, 5, 130)):
        x, x2 = (torch.randint(-3, 4, (rows, n)).to(HALF).requires_grad_() for n in (inputs, more))
        weight = torch.randint(-3, 4, (outputs, inputs + more)).to(HALF).requires_grad_()
        dy = torch.randint(-1, 2, (rows, outputs)).to(HALF)
        beside = dict(x2=x2) if more else {}
        with fastddpm.use_backend("native"):
            y = fastddpm.linear(x, weight, **beside, dtype=SINGLE)
            half = fastddpm.linear(x, weight, **beside)
        given = [x, weight, *beside.values()]
        found = torch.autograd.grad(half, given, dy)
        both = torch.cat((x, x2), dim=1).double()
        assert torch.equal(y.double(), both @ weight.double().t()) and torch.equal(half, y.to(HALF))
        dboth = dy.double() @ weight.double()
        expected = [dboth[:, :inputs], dy.double().t() @ both, *([dboth[:, inputs:]] if more else [])]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other.to(HALF))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("beside", [None, SINGLE, HALF], ids=["no x2", "x2 in float32", "x2 in bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_where_a_float32_weight_is_rounded(
    dtype: torch.dtype, beside: torch.dtype | None, keep: bool, pairs: bool  # noqa: F811
) -> None:
    """To bfloat16, where pairs are multiplied and y is in half precision, and nowhere else: as torch.autocast rounds.

    The sum of each row but one is 2^-12 k, what rounding takes from 1 + 2^-12 k.
    """
    outputs, more = 40, 0 if beside is None else 3
    weight = torch.zeros(outputs, 17 + more)
    low = 2**-12 * torch.arange(1, outputs + 1)
    weight[:, 15], weight[:, 16] = 1 + low, -1.0
    x = torch.zeros(5, 17, dtype=HALF)
    x[:, 15:] = 1
    x2 = None if beside is None else torch.ones(5, more, dtype=beside)
    with fastddpm.use_backend("native"), keep_transformed() if keep else contextlib.nullcontext():
        y = fastddpm.linear(x, weight, x2=x2, dtype=dtype)
    rounded = pairs and dtype != SINGLE and beside != SINGLE
    expected = (1 + low).to(HALF).float() - 1 if rounded else low
    assert torch.equal(y, expected.to(dtype).expand(5, outputs))


@pytest.mark.usefixtures("instruction_set", "pairs")
def test_a_float32_weight_beside_bfloat16() -> None:
    """With a float32 y, it and the gradients have the precision of float32. In half precision only what the weight is a
    factor of knows that it is rounded, and then has the bits of the rounded weight."""
    for size in SIZES:
        inputs = product(*size).inputs(HALF)
        inputs["weight"] = inputs["weight"].float() * (1 + 2**-10)
        rounded = inputs | dict(weight=inputs["weight"].to(HALF).float())
        case = product(*size)
        with fastddpm.use_backend("native"):
            single = results(case, inputs | dict(dtype=SINGLE), SINGLE)
            half, of_rounded = results(case, inputs, HALF), results(case, rounded, HALF)
        check_values(case, single, inputs | dict(dtype=SINGLE), SINGLE)
        if _native.multiplies_pairs():
            check_values(case, half, rounded, HALF)
            for name, value in half.items():
                assert torch.equal(value, of_rounded[name]), (size, name)
        else:
            check_values(case, half, inputs, HALF)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("of_weight", [SINGLE, HALF, torch.float16])
def test_the_form_that_weights_are_kept_in(of_weight: torch.dtype) -> None:
    """As it is foretold for tensors without values."""
    for outputs, inputs in ((1, 1), (32, 7), (33, 8), (65, 129)):
        weight = torch.randn(outputs, inputs).to(of_weight)
        for of_x in range(3):
            for kind in range(3):
                call = (weight, of_x, kind)
                torch.library.opcheck(torch.ops.fastddpm.linear_weight, call, test_utils="test_faketensor")


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_reach_what_they_do_in_torch(what: float) -> None:
    """Those of an odd number of inputs, too, whose last has no other beside it, and not the first of the next row."""
    for name, where in (("x", (4, 8)), ("x", (3, 0)), ("weight", (20, 8)), ("weight", (20, 0)), ("weight", (33, 1))):
        case = product(7, 9, 0, 34)
        inputs = case.inputs(HALF)
        inputs[name][where] = what
        found = []
        for backend in ("native", "reference"):
            with fastddpm.use_backend(backend):
                found.append(results(case, inputs, HALF))
        for of, ours in found[0].items():
            assert torch.equal(ours.isnan(), found[1][of].isnan()), of
            assert torch.equal(ours.isposinf(), found[1][of].isposinf()), of
        assert not found[0]["output 0"].isfinite().all()


@pytest.mark.usefixtures("instruction_set", "pairs")
def test_nothing_is_left_of_the_call_before() -> None:
    """In memory that kernels keep from call to call, which holds NaN where the next has no number beside its last."""
    case, spoiling = product(7, 9, 0, 34), product(130, 260, 0, 130)
    inputs, nan = case.inputs(HALF), spoiling.inputs(HALF)
    nan["x"].fill_(torch.nan), nan["weight"].fill_(torch.nan)
    with fastddpm.use_backend("native"):
        results(spoiling, nan, HALF)
        found = results(case, inputs, HALF)
        with torch.no_grad(), keep_transformed():
            kept = fastddpm.linear(**inputs)  # its weights are in memory of their own
            fastddpm.linear(nan["x"], inputs["weight"][:, :1].expand(34, 260).contiguous())
            assert torch.equal(fastddpm.linear(**inputs), kept)
    check_values(case, found, inputs, HALF)


# weights in panels


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_give_the_bits_of_others(dtype: torch.dtype) -> None:
    for size in SIZES:
        inputs = product(*size).inputs(dtype)
        with fastddpm.use_backend("native"), torch.no_grad():
            first = fastddpm.linear(**inputs)
            with keep_transformed():
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    assert torch.equal(fastddpm.linear(**inputs), first), size


def test_weights_are_kept_within_the_block_alone() -> None:
    x, weight = torch.randn(20, 9), torch.nn.Parameter(torch.randn(8, 9))
    with fastddpm.use_backend("native"), torch.no_grad():
        first = fastddpm.linear(x, weight)
        with keep_transformed():
            assert is_kept()
            assert torch.equal(fastddpm.linear(x, weight), first)
            weight.mul_(2)  # which nobody may do here: what was kept is used
            assert torch.equal(fastddpm.linear(x, weight), first)
            with torch.enable_grad():  # nothing is kept where weights may be trained
                assert torch.equal(fastddpm.linear(x, weight).detach(), 2 * first)
        assert torch.equal(fastddpm.linear(x, weight), 2 * first)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_operators_of_kept_weights_pass_opcheck(dtype: torch.dtype) -> None:
    inputs = product(5, 20, 4, 33).inputs(HALF) | dict(dtype=dtype)
    with fastddpm.use_backend("native"), torch.no_grad(), keep_transformed(), Recorded() as recorded:
        fastddpm.linear(**inputs)
    registered = [call for call in recorded.calls if call[0].namespace == "fastddpm"]
    assert len(registered) == 2
    for func, args, kwargs in registered:
        torch.library.opcheck(func, args, kwargs)


# few rows, for which a weight is brought to panels one at a time


@pytest.mark.usefixtures("instruction_set", "pairs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_have_the_bits_of_many(dtype: torch.dtype) -> None:
    """Of y, and of the gradient of x, which takes the weight the other way round."""
    inputs, more, outputs = 150, 41, 77
    x, x2, residual = (torch.randn(200, n).to(dtype) for n in (inputs, more, outputs))
    weight, bias, dy = (torch.randn(n).to(dtype) for n in ((outputs, inputs + more), (outputs,), (200, outputs)))

    def calls(rows: int) -> list[Tensor]:
        given = x[:rows].requires_grad_()
        y = fastddpm.linear(given, weight, bias, x2=x2[:rows], residual=residual[:rows])
        return [y.detach(), *torch.autograd.grad(y, given, dy[:rows])]

    with fastddpm.use_backend("native"):
        many = calls(200)
        for rows in (1, 2, 3, 4, 7, 8, 11, 12, 15, 23, 95, 96, 97):
            for few, expected in zip(calls(rows), many, strict=True):
                assert torch.equal(few, expected[:rows]), rows


def test_where_weights_are_kept_they_are_for_few_rows_too() -> None:
    case = product(5, 200, 56, 70)
    inputs = case.inputs(HALF)
    with fastddpm.use_backend("native"), torch.no_grad():
        y = fastddpm.linear(**inputs)
        with keep_transformed(), Recorded() as recorded:
            kept = fastddpm.linear(**inputs)
    assert torch.equal(kept, y)
    names = {call[0].overloadpacket.__name__ for call in recorded.calls if call[0].namespace == "fastddpm"}
    assert names == {"linear_weight", "linear_packed"}


# strides, dtypes

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "within another": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 1))[1:-1, 3:-5],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_give_the_bits_of_what_is_dense(kind: str) -> None:
    view, case = VIEWS[kind], product(40, 30, 11, 37)
    inputs = case.inputs(HALF)
    dy = torch.randn(40, 37).to(HALF)

    def calls(**given: Tensor) -> list[Tensor]:
        given = {name: x.requires_grad_() for name, x in (inputs | given).items() if isinstance(x, Tensor)}
        y = fastddpm.linear(**given)  # type: ignore[arg-type]
        found = [y, *torch.autograd.grad(y, list(given.values()), view(dy) if changed else dy)]
        with torch.no_grad(), keep_transformed():
            return [*found, fastddpm.linear(**given)]  # type: ignore[arg-type]

    with fastddpm.use_backend("native"):
        changed = False
        dense = calls()
        changed = True
        for names in ((), ("x",), ("weight",), ("x2", "residual")):
            for one, other in zip(calls(**{n: view(inputs[n].detach()) for n in names}), dense, strict=True):
                assert torch.equal(one, other), names
        assert not view(inputs["weight"]).is_contiguous()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_and_columns_of_another_dtype(wide: torch.dtype, autocast: bool) -> None:
    """Each gradient has the precision of its dtype, as far as it is computed in float32; autocast changes none."""
    case = product(50, 30, 11, 37)
    inputs = case.inputs(HALF)
    inputs |= {name: inputs[name].to(wide) + 2**-15 for name in ("weight", "bias", "x2", "residual")}
    with fastddpm.use_backend("native"), torch.autocast("cpu", HALF, enabled=autocast):
        found = results(case, inputs, HALF)
    check_values(case, found, inputs, HALF)
    dtypes = {name: x.dtype for name, x in found.items()}
    assert dtypes.pop("output 0") == dtypes.pop("gradient of x") == HALF and set(dtypes.values()) == {wide}


def test_a_residual_is_not_rounded_before_it_is_added() -> None:
    """It may lie far above the sum: in float32 it is read as it is, whatever the dtype of y."""
    x, weight = torch.zeros(4, 8), torch.zeros(40, 8)
    x[:, 0], weight[:, 0] = -1.0, 1.0
    residual = 1 + 2**-12 * torch.randn(4, 40)
    with fastddpm.use_backend("native"):
        y = fastddpm.linear(x, weight, residual=residual, dtype=HALF)
    assert torch.equal(y, (residual - 1).to(HALF))


# no rows, no columns, no dimension


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "size",
    [(0, 7, 0, 9), (0, 7, 3, 40), (5, 0, 0, 33), (5, 0, 3, 9), (5, 3, 0, 0), (130, 0, 0, 200), (0, 0, 0, 8)],
)
def test_nothing_to_sum(backend: str, size: tuple[int, ...]) -> None:
    """Of no columns y is the bias, of no rows the gradients of the parameters are 0."""
    case = product(*size)
    inputs = case.inputs(SINGLE)
    with fastddpm.use_backend(backend):
        found = results(case, inputs)
        with torch.no_grad(), keep_transformed():
            assert torch.equal(fastddpm.linear(**inputs), found["output 0"])
    check_values(case, found, inputs, SINGLE)
    if size[0] == 0:
        assert found["output 0"].shape == (0, size[3])
        assert not found["gradient of weight"].any() and not found["gradient of bias"].any()
    elif size[1] + size[2] == 0:
        assert torch.equal(found["output 0"], inputs["bias"].expand(size[0], size[3]))


def test_a_single_row_without_a_dimension() -> None:
    case = product(1, 20, 4, 33)
    inputs = case.inputs(HALF)
    alone = {name: x[0] if name in ("x", "x2", "residual") else x for name, x in inputs.items()}
    with fastddpm.use_backend("native"):
        check_values(case, results(case, alone, HALF), alone, HALF)  # and so the reference takes it
        assert torch.equal(fastddpm.linear(**alone), fastddpm.linear(**inputs)[0])


# gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "x2", "residual"])
def test_a_gradient_alone_is_that_of_all(name: str, dtype: torch.dtype) -> None:
    case = product(150, 140, 20, 135)
    inputs = case.inputs(dtype)
    with fastddpm.use_backend("native"):
        every = results(case, inputs, dtype)
        alone = results(Case(case.op, case.name, case.make, gradients=(name,)), inputs, dtype)
    assert torch.equal(alone[f"gradient of {name}"], every[f"gradient of {name}"])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_of_the_gradient_is_refused(backend: str) -> None:
    x, weight = torch.randn(20, 9, requires_grad=True), torch.randn(8, 9, requires_grad=True)
    with fastddpm.use_backend(backend):
        (dx,) = torch.autograd.grad(fastddpm.linear(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no gradient of the gradient"):
            dx.sum().backward()
