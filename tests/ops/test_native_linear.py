"""The C++ kernels of linear: rows and panels around their edges, threads, kept weights, few rows, strides, no rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import _native
from fastddpm.ops.kept import is_kept, keep_transformed
from fastddpm.ops.linear import native_impl
from tests.ops.cases import FLOAT, Case, randn
from tests.ops.test_contract import Recorded, check_values, results
from tests.ops.test_native import instruction_set  # noqa: F401, the fixture

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


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_around_the_edges(dtype: torch.dtype) -> None:
    for size in SIZES:
        case = product(*size)
        inputs = case.inputs(dtype)
        with fastddpm.use_backend("native"):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", [(999, 300, 41, 260), (1500, 60, 0, 50)], ids=["many panels", "many slices"])
def test_threads_change_no_bit(size: tuple[int, ...]) -> None:
    case = product(*size)
    inputs = case.inputs(HALF)
    found = []
    with fastddpm.use_backend("native"):
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(case, inputs, HALF))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


# weights in panels


@pytest.mark.usefixtures("instruction_set")
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


def test_operators_of_kept_weights_pass_opcheck() -> None:
    inputs = product(5, 20, 4, 33).inputs(HALF) | dict(dtype=SINGLE)
    with fastddpm.use_backend("native"), torch.no_grad(), keep_transformed(), Recorded() as recorded:
        fastddpm.linear(**inputs)
    registered = [call for call in recorded.calls if call[0].namespace == "fastddpm"]
    assert len(registered) == 2
    for func, args, kwargs in registered:
        torch.library.opcheck(func, args, kwargs)


# few rows, of which torch makes the product


def kernels(case: Case, inputs: dict[str, object], dtype: torch.dtype, keep: bool = False) -> set[str]:
    """Check the values; the names of our operators that ran."""
    with fastddpm.use_backend("native"), Recorded() as recorded:
        if keep:
            with torch.no_grad(), keep_transformed():
                found = {"output 0": fastddpm.linear(**inputs)}  # type: ignore[arg-type]
        else:
            found = results(case, inputs, dtype)
    check_values(Case(case.op, case.name, case.make) if keep else case, found, inputs, dtype)
    return {call[0].overloadpacket.__name__ for call in recorded.calls if call[0].namespace == "fastddpm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_a_large_weight(dtype: torch.dtype) -> None:
    """Neither is it brought to panels for them, forward or backward; where it is kept, it is once."""
    inputs, more = 200, 56
    outputs = native_impl.LARGE // (inputs + more)
    few = product(native_impl.FEW - 1, inputs, more, outputs)
    assert kernels(few, few.inputs(dtype), dtype) == {"linear_gradient"}
    assert kernels(few, few.inputs(dtype), dtype, keep=True) == {"linear_weight", "linear_packed"}
    for case in (product(native_impl.FEW, inputs, more, outputs), product(2, inputs, more, outputs - 1)):
        assert kernels(case, case.inputs(dtype), dtype) == {"linear", "linear_gradient"}


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
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
