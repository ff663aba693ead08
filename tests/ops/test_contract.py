"""What every implementation of every op promises, checked over the cases of `tests.ops.cases`."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastddpm
from fastddpm.ops import normal, philox
from tests.ops.cases import (
    AT_HAND,
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    LAYOUTS,
    OF_A_GPU,
    OPS,
    Case,
    Inputs,
    converted,
    copied,
    op_of,
)
from tests.tolerance import assert_normals_within, assert_within

aten = torch.ops.aten


def device_of(backend: str) -> str:
    """Where an implementation is tested: Triton on a GPU if there is one, and else in its interpreter."""
    return AT_HAND if backend == "triton" else "cpu"


EVERY = [
    pytest.param(backend, case, id=f"{case.op}-{backend}-{case.name}", marks=OF_A_GPU if backend == "triton" else [])
    for op, backend in IMPLEMENTATIONS
    for case in CASES
    if case.op == op
]
IMAGES = [p for p in EVERY if p.values[1].op != "adam_ema"]
# Without a GPU, Triton's kernels run in its interpreter, which torch.compile and opcheck cannot see into.
REGISTERED = [p for p in EVERY if p.values[0] != "triton" or torch.cuda.is_available()]
COMPILED = [p for p in REGISTERED if p.values[1].compiled]
OF_A_CPU = ("conv3x3", "linear", "self_attention")  # on a GPU the network takes those of cuDNN, cuBLAS and torch
ON_A_GPU = [(op, backend) for op, backend in IMPLEMENTATIONS if op not in OF_A_CPU]
FIRST = {op: next(case for case in CASES if case.op == op) for op in OPS}


def cotangent(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient for an output, the same numbers for every dtype and layout of it: those that ``dtype`` has.

    For a loss in half precision it is a power of two, as a gradient scale is: by any other number the gradient, which
    is kept in that precision, is rounded a second time (`tests/ops/test_diffusion_loss.py` says how).
    """
    if like.dim() == 0:
        return torch.full_like(like, 0.7 if dtype == torch.float32 else 0.125)
    g = torch.Generator().manual_seed(like.dim())
    numbers = torch.randn(like.shape, generator=g, dtype=torch.float64).to(dtype).to(like.device, like.dtype)
    return torch.empty_like(like).copy_(numbers)


def results(
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype = torch.float32,
    op: Callable[..., Any] | None = None,
    of_output: Callable[[Tensor, torch.dtype], Tensor] = cotangent,
) -> dict[str, Tensor]:
    """Run the op; return its outputs, what it wrote over, and each gradient, by name. The inputs stay as they are."""
    inputs = copied(inputs)
    for name in case.gradients:
        inputs[name].requires_grad_()
    outputs = tree_leaves((op or op_of(case.op))(**inputs))
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    for name in case.written:
        found |= {f"{name} {i}": x for i, x in enumerate(tree_leaves(inputs[name]))}
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        gradients = torch.autograd.grad(
            differentiable, [inputs[n] for n in case.gradients], [of_output(x, dtype) for x in differentiable]
        )
        found |= {f"gradient of {name}": x for name, x in zip(case.gradients, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def reference_results(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference in float64 and in float32 on these inputs."""
    with fastddpm.use_backend("reference"):
        in64, in32 = (results(case, converted(inputs, wide), dtype) for wide in (torch.float64, torch.float32))
    return in64, in32


ENOUGH = 1000
"""Normal numbers, for the norm of their errors to be one of many."""


@contextlib.contextmanager
def noise_of(backend: str) -> Iterator[None]:
    """The reference takes the normal numbers that an implementation draws, all within their bound, for its own.

    A GPU makes them by approximate instructions, whose errors are within the bound of normal numbers and not within the
    rule for all else, which is about what a kernel does with them.
    """
    exact = philox.normal

    def drawn(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, **where: Any) -> Tensor:
        n = math.prod(shape[1:])  # no number depends on how many there are
        more = (shape[0], max(n, ENOUGH // max(shape[0], 1)))
        with fastddpm.use_backend(backend):
            z = normal(more, **where)
        assert_normals_within(z, exact(more, dtype=torch.float64, **where))
        return z[:, :n].reshape(shape).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "normal", drawn)
        yield


def is_approximate(inputs: Inputs) -> bool:
    """Whether kernels for a GPU take these inputs: there, or emulated (tests/cuda)."""
    return "FASTDDPM_EMULATED" in os.environ or any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(inputs))


def check_values(
    case: Case, found: dict[str, Tensor], inputs: Inputs, dtype: torch.dtype, backend: str = "native"
) -> None:
    """Hold what an implementation has found against the reference, by the one tolerance rule."""
    drawn = noise_of(backend) if is_approximate(inputs) and backend != "reference" else contextlib.nullcontext()
    with drawn:
        in64, in32 = reference_results(case, inputs, dtype)
    assert found.keys() == in64.keys()
    for name, value in found.items():
        if value.is_floating_point() and in64[name].dtype == torch.float64:
            assert_within(value, in64[name], in32[name], f"{case.op}, {case.name}: {name}")
        else:
            assert torch.equal(value, in64[name]), name


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype, layout: str) -> None:
    """Within the one tolerance rule, in the dtypes and the memory order promised, with unwritten memory poisoned."""
    inputs = case.inputs(dtype, layout, device_of(backend))
    with fastddpm.use_backend(backend), poisoned_memory():
        found = results(case, inputs, dtype)
    check_values(case, found, inputs, dtype, backend)
    for name, value in found.items():
        if value.dim() == 4:
            assert value.is_contiguous(memory_format=LAYOUTS[layout]), name
        if name.startswith("gradient of "):
            given = inputs[name.removeprefix("gradient of ")]
            assert (value.shape, value.dtype) == (given.shape, given.dtype), name


@pytest.mark.parametrize(("backend", "case"), IMAGES)  # the tensors of adam_ema share strides by contract
def test_mixed_layouts(backend: str, case: Case) -> None:
    """Images of one call need not lie in one order; the outputs lie in that of the first, or where they are written."""
    first = next(iter(inspect.signature(op_of(case.op)).parameters))
    nchw, nhwc = (case.inputs(torch.float32, layout, device_of(backend)) for layout in LAYOUTS)
    for mixed in (nhwc | {first: nchw[first]}, nchw | {first: nhwc[first]}):
        with fastddpm.use_backend(backend):
            found = results(case, mixed)
        check_values(case, found, mixed, torch.float32, backend)
        for name, value in found.items():
            if name.startswith("output") and value.dim() == 4 and not case.written:
                same = [f for f in LAYOUTS.values() if mixed[first].is_contiguous(memory_format=f)]
                assert any(value.is_contiguous(memory_format=f) for f in same), name


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_two_runs_give_the_same_bits_and_leave_the_inputs(backend: str, case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "NHWC", device_of(backend))
    before = copied(inputs)
    with fastddpm.use_backend(backend):
        op_of(case.op)(**inputs)
        first, second = results(case, before), results(case, before)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, given in inputs.items():
        if name not in case.written:
            for x, y in zip(tree_leaves(given), tree_leaves(before[name]), strict=True):
                same = x == y if not isinstance(x, Tensor) else torch.equal(x, y) and x.stride() == y.stride()
                assert same, name


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_outputs_are_new_tensors(backend: str, case: Case) -> None:
    """No output shares memory with an input, but for those that the op writes over."""
    inputs = case.inputs(torch.float32, device=device_of(backend))
    with fastddpm.use_backend(backend):
        outputs = tree_leaves(op_of(case.op)(**inputs))
    given = [x for name, value in inputs.items() if name not in case.written for x in tree_leaves(value)]
    memory = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    assert not any(output.untyped_storage().data_ptr() in memory for output in outputs)


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_autocast_around_changes_nothing(backend: str, case: Case) -> None:
    inputs = case.inputs(torch.float32, device=device_of(backend))
    with fastddpm.use_backend(backend):
        expected = results(case, inputs)
        with torch.autocast(device_of(backend), torch.bfloat16):
            found = results(case, inputs)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "other order" and x.dim() == 4:
        other = torch.channels_last if x.is_contiguous() else torch.contiguous_format
        return x.contiguous(memory_format=other)
    if kind in ("other order", "transposed"):
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    assert kind == "with gaps"
    return torch.stack([x, x + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("kind", ["other order", "transposed", "with gaps", "expanded"])
@pytest.mark.parametrize(
    ("backend", "case"), [p for p in EVERY if p.values[1].gradients and p.values[1].op != "diffusion_loss"]
)
def test_a_gradient_of_other_strides_is_accepted(backend: str, case: Case, kind: str) -> None:
    inputs = case.inputs(torch.float32, "NHWC", device_of(backend))

    def of_output(x: Tensor, dtype: torch.dtype) -> Tensor:
        if kind == "expanded":
            return torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
        return strided(cotangent(x, dtype), kind)

    with fastddpm.use_backend(backend):
        found = results(case, inputs, of_output=of_output)
    with fastddpm.use_backend("reference"):
        wide = [results(case, converted(inputs, d), of_output=of_output) for d in (torch.float64, torch.float32)]
    for name, value in found.items():
        assert_within(value, wide[0][name], wide[1][name], name)


# shapes


def of_no_rows(case: Case, device: str) -> Inputs:
    """The same call on an empty batch."""
    inputs = case.inputs(torch.float32, "NHWC", device)
    batch = len(inputs["sample"] if inputs.get("sample") is not None else next(iter(inputs.values())))
    rows = {"t", "sample", "index", "flip", "weight", "vlb_weight", "clamp", "scale", "shift", "channel_bias"}
    per_channel = {"weight", "bias"} if case.op.endswith("norm_silu") or case.op == "linear" else set()
    for name, x in inputs.items():
        image = isinstance(x, Tensor) and (x.dim() == 4 or name in PICTURES) and x.shape[0] == batch
        of_batch = name in rows - per_channel and isinstance(x, Tensor) and x.shape[0] == batch
        if (image and not (name == "x0" and "index" in inputs)) or of_batch:
            inputs[name] = x[:0]
    return inputs


def of_no_pixels(case: Case, device: str) -> Inputs:
    """The same call on maps without a row of pixels; on rows without a token where an op takes rows."""
    inputs = case.inputs(torch.float32, "NHWC", device)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and (name in PICTURES or name == "mask"):
            rows = case.op in ("linear", "self_attention")
            inputs[name] = x[:, :, :0] if not rows else x[:, :0] if x.dim() > 2 else x[:0]
    return inputs


EMPTY = {"batch": of_no_rows, "map": of_no_pixels}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(("backend", "case"), IMAGES)
def test_empty(backend: str, case: Case, empty: str) -> None:
    """Nothing in, nothing out; the parameters' gradients are 0, and the mean of no losses, or of no pixels, is nan."""
    inputs = EMPTY[empty](case, device_of(backend))
    with fastddpm.use_backend(backend), poisoned_memory():
        found = results(case, inputs)
    for name, value in found.items():
        if case.op == "diffusion_loss" and name.startswith("output"):
            assert value.isnan().all()
        elif value.numel():
            assert name.startswith("gradient of ") and not value.any(), name


# other strides, and what else is refused

PICTURES = {
    "x",
    "x0",
    "x2",
    "pred",
    "target",
    "out",
    "out_uncond",
    "pred_prev",
    "noise",
    "known",
    "known_noise",
    "residual",
    "qkv",
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.op}-{case.name}-{name}")
        for case in CASES
        for name, x in case.inputs().items()
        if case.op not in ("linear", "self_attention")  # which take rows of any strides
        and name in PICTURES
        and isinstance(x, Tensor)
        and x.numel() > 6
    ],
)
def test_other_strides_raise_and_name_the_remedy(case: Case, name: str) -> None:
    for kind in ("transposed", "with gaps"):
        inputs = case.inputs()
        inputs[name] = strided(inputs[name], kind)
        if not (inputs[name].is_contiguous() or inputs[name].is_contiguous(memory_format=torch.channels_last)):
            with pytest.raises(
                ValueError, match=rf"expected {name} .*\.contiguous\(memory_format=torch.channels_last\)"
            ):
                op_of(case.op)(**inputs)


Change = dict[str, Any] | Callable[[Inputs], Inputs]


def without(*names: str) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {name: x for name, x in inputs.items() if name not in names}


def at(name: str, i: int, change: Callable[[Tensor], Any]) -> Callable[[Inputs], Inputs]:
    """Change one tensor of a list."""

    def changed(inputs: Inputs) -> Inputs:
        tensors = list(inputs[name])
        tensors[i] = change(tensors[i])
        return inputs | {name: tensors}

    return changed


F64, I64 = torch.float64, torch.int64
Z = torch.zeros
LOSS_VLB = "hybrid, 17 levels"
GUIDED = "learned variance, guidance, clamps, mask, drawn"
NORM_ALL = "bias of each sample, scale, shift, dropout"
ADAM_ALL = "every option"

# op, case (None: the first), what is changed, the error, a part of its text
ERRORS: list[tuple[str, str | None, Change, type[Exception], str]] = [
    # q_sample
    ("q_sample", None, dict(x0=None), TypeError, "x0 to be a torch.Tensor, got NoneType"),
    ("q_sample", None, dict(x0=Z(3, 5, 7)), ValueError, r"x0 of shape \[B, C, H, W\]"),
    ("q_sample", None, dict(x0=Z(6, 3, 5, 7, dtype=I64)), TypeError, "x0 of dtype uint8 or float32"),
    ("q_sample", None, dict(index=Z((), dtype=I64)), ValueError, r"index of shape \[rows\]"),
    ("q_sample", None, dict(index=Z(4)), TypeError, "index of dtype int64"),
    ("q_sample", None, dict(t=Z(3, dtype=I64)), ValueError, r"t of shape \[4\]"),
    ("q_sample", None, dict(t=Z(4)), TypeError, "t of dtype int64"),
    ("q_sample", None, dict(table=Z(())), ValueError, r"table of shape \[rows, 2\]"),
    ("q_sample", None, dict(table=Z(10, 3)), ValueError, r"table of shape \[rows, 2\]"),
    ("q_sample", None, dict(table=Z(10, 2).half()), TypeError, "table of dtype float32 or float64"),
    ("q_sample", None, dict(flip=Z(3).bool()), ValueError, r"flip of shape \[4\]"),
    ("q_sample", None, dict(flip=Z(4)), TypeError, "flip of dtype bool"),
    ("q_sample", None, dict(returns="mu"), ValueError, "returns to be one of x_t, noise, x0, v, got 'mu'"),
    ("q_sample", None, dict(dtype=I64), TypeError, "dtype to be a float dtype"),
    ("q_sample", None, dict(noise=Z(4, 3, 5, 7)), ValueError, "noise or seed, got both"),
    ("q_sample", None, dict(noise=Z(3, 3, 5, 7), seed=None), ValueError, r"noise of shape \[4, 3, 5, 7\]"),
    ("q_sample", None, dict(noise=Z(4, 3, 5, 7, dtype=I64), seed=None), TypeError, "noise of dtype float32"),
    ("q_sample", None, dict(seed=None), ValueError, "got no seed"),
    ("q_sample", None, dict(sample=None, step=None), ValueError, "got no sample, step"),
    ("q_sample", None, dict(seed=-1), ValueError, r"seed in \[0, 2\^64\), got -1"),
    ("q_sample", None, dict(seed=1.5), TypeError, "seed to be an int or a tensor"),
    ("q_sample", None, dict(seed=Z(1, dtype=I64)), ValueError, r"seed of shape \[\]"),
    ("q_sample", None, dict(seed=Z(())), TypeError, "seed of dtype int64"),
    ("q_sample", None, dict(step=2**32), ValueError, r"step in \[0, 2\^32\)"),
    ("q_sample", None, dict(sample=Z(3, dtype=I64)), ValueError, r"sample of shape \[4\]"),
    ("q_sample", None, dict(sample=Z(4)), TypeError, "sample of dtype int64"),
    ("q_sample", None, dict(t=Z(4, dtype=I64, device="meta")), ValueError, "t on cpu, got meta"),
    ("q_sample", None, dict(sample=Z(4, dtype=I64, device="meta")), ValueError, "sample on cpu, got meta"),
    # diffusion_loss
    ("diffusion_loss", None, dict(pred=Z(3, 5)), ValueError, r"pred of shape \[B, C, H, W\]"),
    ("diffusion_loss", None, dict(pred=Z(3, 3, 5, 7, dtype=I64)), TypeError, "pred of dtype float32"),
    ("diffusion_loss", None, dict(t=Z(2, dtype=I64)), ValueError, r"t of shape \[3\]"),
    ("diffusion_loss", None, dict(t=Z(3)), TypeError, "t of dtype int64"),
    ("diffusion_loss", None, dict(objective="mu"), ValueError, "objective to be one of eps, x0, v, got 'mu'"),
    ("diffusion_loss", None, dict(target=Z(3, 3, 5, 6)), ValueError, r"target of shape \[3, 3, 5, 7\]"),
    ("diffusion_loss", None, dict(target=Z(3, 3, 5, 7, dtype=I64)), TypeError, "target of dtype"),
    ("diffusion_loss", None, without("seed"), ValueError, "got no seed"),
    ("diffusion_loss", None, dict(objective="v", x0=Z(3, 3, 5, 7)), ValueError, "table for objective 'v'"),
    ("diffusion_loss", None, dict(objective="v", table=Z(10, 2)), ValueError, "x0 for objective 'v'"),
    ("diffusion_loss", None, dict(objective="x0"), ValueError, "x0 for objective 'x0'"),
    ("diffusion_loss", None, dict(x0=Z(3, 3, 5, 6)), ValueError, r"x0 of shape \[3, 3, 5, 7\]"),
    ("diffusion_loss", None, dict(x0=Z(3, 3, 5, 7, dtype=I64)), TypeError, "x0 of dtype uint8"),
    ("diffusion_loss", None, dict(index=Z(2, dtype=I64)), ValueError, r"index of shape \[3\]"),
    ("diffusion_loss", None, dict(index=Z(3)), TypeError, "index of dtype int64"),
    ("diffusion_loss", None, dict(flip=Z(2).bool()), ValueError, r"flip of shape \[3\]"),
    ("diffusion_loss", None, dict(flip=Z(3)), TypeError, "flip of dtype bool"),
    ("diffusion_loss", None, dict(table=Z(10)), ValueError, r"table of shape \[rows, 2\]"),
    ("diffusion_loss", None, dict(table=Z(10, 2).half()), TypeError, "table of dtype"),
    ("diffusion_loss", None, dict(weight=Z(2)), ValueError, r"weight of shape \[3\]"),
    ("diffusion_loss", None, dict(weight=Z(3, dtype=I64)), TypeError, "weight of dtype"),
    ("diffusion_loss", None, dict(weight=Z(3, requires_grad=True)), ValueError, r"weight without gradient.*detach"),
    ("diffusion_loss", None, dict(levels=1), ValueError, "levels >= 2, got 1"),
    ("diffusion_loss", None, dict(weight=Z(3, device="meta")), ValueError, "weight on cpu, got meta"),
    ("diffusion_loss", LOSS_VLB, dict(pred=Z(4, 5, 5, 3)), ValueError, "pred with 2C channels for vlb, got 5"),
    ("diffusion_loss", LOSS_VLB, dict(vlb=Z(10, 3)), ValueError, r"vlb of shape \[rows, 4\]"),
    ("diffusion_loss", LOSS_VLB, dict(vlb=Z(10, 4).half()), TypeError, "vlb of dtype"),
    ("diffusion_loss", LOSS_VLB, dict(x0=None), ValueError, "x0 for vlb, got None"),
    ("diffusion_loss", LOSS_VLB, dict(vlb_weight=Z(3)), ValueError, r"vlb_weight of shape \[4\] or \[\]"),
    ("diffusion_loss", LOSS_VLB, dict(vlb_weight=Z(4, dtype=I64)), TypeError, "vlb_weight of dtype"),
    # solver_step
    ("solver_step", None, dict(x=Z(3, 5)), ValueError, r"x of shape \[B, C, H, W\]"),
    ("solver_step", None, dict(x=Z(3, 3, 5, 7, dtype=I64)), TypeError, "x of dtype"),
    ("solver_step", None, dict(out=Z(3, 4, 5, 7)), ValueError, r"out of shape \[3, 3, 5, 7\] or \[3, 6, 5, 7\]"),
    ("solver_step", None, dict(out=Z(3, 3, 5, 7, dtype=I64)), TypeError, "out of dtype"),
    ("solver_step", None, dict(table=Z(7, 8)), ValueError, r"table of shape \[rows, 9\]"),
    ("solver_step", None, dict(table=Z(7, 9).half()), TypeError, "table of dtype"),
    ("solver_step", None, dict(step=7), ValueError, r"step in \[0, 7\), got 7"),
    ("solver_step", None, dict(step=1.0), TypeError, "step to be an int or a tensor"),
    ("solver_step", None, dict(step=Z(())), TypeError, "step of dtype int64"),
    ("solver_step", None, dict(out_uncond=Z(3, 6, 5, 7)), ValueError, r"out_uncond of shape \[3, 3, 5, 7\]"),
    ("solver_step", None, dict(guidance_scale="strong"), TypeError, "guidance_scale to be a number or a tensor"),
    ("solver_step", None, dict(guidance_scale=Z(3)), ValueError, r"guidance_scale of shape \[\]"),
    ("solver_step", None, dict(clamp=0.0), ValueError, "clamp > 0, got 0.0"),
    ("solver_step", None, dict(clamp=Z(2)), ValueError, r"clamp of shape \[3\]"),
    ("solver_step", None, dict(clamp=Z(3, dtype=I64)), TypeError, "clamp of dtype"),
    ("solver_step", None, dict(pred_prev=Z(3, 3, 5, 6)), ValueError, r"pred_prev of shape \[3, 3, 5, 7\]"),
    ("solver_step", None, dict(noise=Z(3, 3, 5, 7)), ValueError, "noise or seed, got both"),
    ("solver_step", None, without("sample"), ValueError, "got no sample"),
    ("solver_step", None, dict(mask=Z(1, 1, 5, 7)), ValueError, "known_table together, got mask alone"),
    ("solver_step", GUIDED, dict(mask=Z(1, 1, 4, 4)), ValueError, r"mask of shape .* or \[1, 1, 4, 5\]"),
    ("solver_step", GUIDED, dict(mask=Z(1, 1, 4, 5).bool()), TypeError, "mask of dtype"),
    ("solver_step", GUIDED, dict(known_table=Z(6, 2)), ValueError, r"known_table of shape \[7, 2\]"),
    ("solver_step", GUIDED, dict(known_table=Z(7, 2).half()), TypeError, "known_table of dtype"),
    ("solver_step", GUIDED, without("seed"), ValueError, "got no seed"),
    ("solver_step", GUIDED, dict(seed=None, noise=Z(2, 3, 4, 5)), ValueError, "known_noise where noise and a mask"),
    ("solver_step", GUIDED, dict(inplace=True, pred_prev=Z(2, 3, 4, 5).half()), TypeError, "pred_prev of dtype"),
    ("solver_step", GUIDED, dict(known=Z(2, 3, 4, 5, device="meta")), ValueError, "known on cpu, got meta"),
    # group_norm_silu
    ("group_norm_silu", None, dict(x=Z(2, 8)), ValueError, r"x of shape \[B, C, H, W\]"),
    ("group_norm_silu", None, dict(x=Z(2, 8, 5, 7, dtype=I64)), TypeError, "x of dtype"),
    ("group_norm_silu", None, dict(x2=Z(2, 4, 5, 6)), ValueError, r"x2 of shape \[2, 4, 5, 7\]"),
    ("group_norm_silu", None, dict(x2=Z(2, 4, 5, 7, dtype=F64)), TypeError, "x2 of dtype float32, got torch.float64"),
    ("group_norm_silu", None, dict(num_groups=3), ValueError, "num_groups to divide the 8 channels, got 3"),
    ("group_norm_silu", None, dict(num_groups=0), ValueError, "num_groups to divide"),
    ("group_norm_silu", None, dict(x=Z(2, 0, 5, 7)), ValueError, r"x with at least one channel, got shape \[2, 0"),
    ("group_norm_silu", None, dict(x=Z(2, 0, 5, 7), x2=Z(2, 8, 5, 7)), ValueError, "x with at least one channel"),
    ("group_norm_silu", None, dict(eps=0.0), ValueError, "eps > 0, got 0.0"),
    ("group_norm_silu", None, dict(dropout=1.0), ValueError, r"dropout in \[0, 1\), got 1.0"),
    ("group_norm_silu", None, dict(layer=-1), ValueError, r"layer in \[0, 2\^31\), got -1"),
    ("group_norm_silu", None, dict(weight=Z(4)), ValueError, r"weight of shape \[8\]"),
    ("group_norm_silu", None, dict(bias=Z(8, dtype=I64)), TypeError, "bias of dtype"),
    ("group_norm_silu", None, dict(channel_bias=Z(4)), ValueError, r"channel_bias of shape \[8\] or \[2, 8\]"),
    ("group_norm_silu", None, dict(channel_bias=Z(8, dtype=I64)), TypeError, "channel_bias of dtype"),
    ("group_norm_silu", None, dict(scale=Z(8)), ValueError, r"scale of shape \[2, 8\]"),
    ("group_norm_silu", None, dict(shift=Z(2, 8, dtype=I64)), TypeError, "shift of dtype"),
    ("group_norm_silu", None, dict(residual=Z(2, 4, 5, 7)), ValueError, r"residual of shape \[2, 8, 5, 7\]"),
    ("group_norm_silu", None, dict(dropout=0.5), ValueError, "got no seed, sample, step"),
    ("group_norm_silu", None, dict(bias=Z(8, device="meta")), ValueError, "bias on cpu, got meta"),
    ("group_norm_silu", NORM_ALL, dict(sample=Z(2, dtype=I64)), ValueError, r"sample of shape \[3\]"),
    # conv3x3
    ("conv3x3", None, dict(x=Z(2, 7)), ValueError, r"x of shape \[B, C, H, W\]"),
    ("conv3x3", None, dict(x=Z(2, 7, 5, 3, dtype=I64)), TypeError, "x of dtype"),
    ("conv3x3", None, dict(weight=Z(9, 6, 3, 3)), ValueError, r"weight of shape \[N, 7, 3, 3\]"),
    ("conv3x3", None, dict(weight=Z(9, 7, 1, 1)), ValueError, r"weight of shape \[N, 7, 3, 3\]"),
    ("conv3x3", None, dict(weight=Z(9, 7, 3, 3, dtype=I64)), TypeError, "weight of dtype"),
    ("conv3x3", None, dict(bias=Z(7)), ValueError, r"bias of shape \[9\]"),
    ("conv3x3", None, dict(bias=Z(9, dtype=I64)), TypeError, "bias of dtype"),
    ("conv3x3", None, dict(weight=Z(9, 7, 3, 3, device="meta")), ValueError, "weight on cpu, got meta"),
    # linear
    ("linear", None, dict(x=Z(())), ValueError, r"x of shape \[\.\., K\], got \[\]"),
    ("linear", None, dict(x=None), TypeError, "x to be a torch.Tensor, got NoneType"),
    ("linear", None, dict(x=Z(5, 7, dtype=I64)), TypeError, "x of dtype"),
    ("linear", None, dict(x2=Z(4, 3)), ValueError, r"x2 of shape \[5, K2\], got \[4, 3\]"),
    ("linear", None, dict(x2=Z(())), ValueError, r"x2 of shape \[5, K2\], got \[\]"),
    ("linear", None, dict(x2=Z(5, 3, dtype=I64)), TypeError, "x2 of dtype"),
    ("linear", None, dict(x2=Z(5, 3)), ValueError, r"weight of shape \[N, 10\], .*; x and x2 have 10 columns"),
    ("linear", None, dict(weight=Z(9, 6)), ValueError, r"weight of shape \[N, 7\], got \[9, 6\]; x has 7 columns"),
    ("linear", None, dict(weight=Z(7)), ValueError, r"weight of shape \[N, 7\], got \[7\]"),
    ("linear", None, dict(weight=Z(9, 7, 1)), ValueError, r"weight of shape \[N, 7\], got \[9, 7, 1\]"),
    ("linear", None, dict(weight=Z(9, 7, 3, 3)), ValueError, r"weight of shape \[N, 7\], got \[9, 7, 3, 3\]"),
    ("linear", None, dict(weight=Z(9, 7, dtype=I64)), TypeError, "weight of dtype"),
    ("linear", None, dict(bias=Z(7)), ValueError, r"bias of shape \[9\]"),
    ("linear", None, dict(bias=Z(9, dtype=I64)), TypeError, "bias of dtype"),
    ("linear", None, dict(residual=Z(5, 7)), ValueError, r"residual of shape \[5, 9\]"),
    ("linear", None, dict(residual=Z(5, 9, dtype=I64)), TypeError, "residual of dtype"),
    ("linear", None, dict(dtype=I64), TypeError, "dtype to be of a float, got torch.int64"),
    ("linear", None, dict(weight=Z(9, 7, device="meta")), ValueError, "weight on cpu, got meta"),
    ("linear", None, dict(residual=Z(5, 9, device="meta")), ValueError, "residual on cpu, got meta"),
    # self_attention
    ("self_attention", None, dict(qkv=None), TypeError, "qkv to be a torch.Tensor, got NoneType"),
    ("self_attention", None, dict(qkv=Z(2, 9, 21, dtype=I64)), TypeError, "qkv of dtype"),
    ("self_attention", None, dict(qkv=Z(9, 21)), ValueError, r"qkv of shape \[B, T, 3 C\], got \[9, 21\]"),
    ("self_attention", None, dict(qkv=Z(2, 9, 20)), ValueError, r"qkv of shape \[B, T, 3 C\], got \[2, 9, 20\]"),
    ("self_attention", None, dict(qkv=Z(2, 9, 0)), ValueError, r"qkv of shape \[B, T, 3 C\], got \[2, 9, 0\]"),
    ("self_attention", None, dict(heads=0), ValueError, "heads to divide 7, got 0"),
    ("self_attention", None, dict(heads=-1), ValueError, "heads to divide 7, got -1"),
    ("self_attention", None, dict(heads=2), ValueError, "heads to divide 7, got 2"),
    ("self_attention", None, dict(heads=14), ValueError, "heads to divide 7, got 14"),
    ("self_attention", None, dict(heads=True), ValueError, "heads to divide 7, got True"),
    ("self_attention", None, dict(heads=7.0), ValueError, "heads to divide 7, got 7.0"),
    # rms_norm_silu
    ("rms_norm_silu", None, dict(x=Z(2, 7)), ValueError, r"x of shape \[B, C, H, W\]"),
    ("rms_norm_silu", None, dict(x=Z(2, 7, 5, 3, dtype=I64)), TypeError, "x of dtype"),
    ("rms_norm_silu", None, dict(x=Z(2, 0, 5, 3)), ValueError, r"x with at least one channel, got shape \[2, 0"),
    ("rms_norm_silu", None, dict(weight=Z(1, 7, 1, 1)), ValueError, r"weight of shape \[7\]"),
    ("rms_norm_silu", None, dict(weight=Z(7, dtype=I64)), TypeError, "weight of dtype"),
    ("rms_norm_silu", None, dict(scale=Z(7)), ValueError, r"scale of shape \[2, 7\]"),
    ("rms_norm_silu", None, dict(shift=Z(2, 7, dtype=I64)), TypeError, "shift of dtype"),
    ("rms_norm_silu", None, dict(eps=0.0), ValueError, "eps > 0, got 0.0"),
    ("rms_norm_silu", None, dict(weight=Z(7, device="meta")), ValueError, "weight on cpu, got meta"),
    # adam_ema
    ("adam_ema", None, dict(params=[], grads=[]), ValueError, "params with at least one tensor"),
    ("adam_ema", None, at("params", 0, Tensor.bfloat16), TypeError, r"params\[0\] of dtype float32 or float64"),
    ("adam_ema", None, at("params", 1, Tensor.double), TypeError, r"params\[1\] of dtype float32"),
    ("adam_ema", None, at("params", 0, lambda p: p.transpose(0, 2)), ValueError, r"params\[0\] to be contiguous or"),
    ("adam_ema", None, lambda i: i | dict(grads=i["grads"][:2]), ValueError, "grads with a tensor for each of the 4"),
    ("adam_ema", None, at("grads", 2, lambda g: None), TypeError, r"grads\[2\] to be a torch.Tensor"),
    ("adam_ema", None, at("exp_avg", 1, Tensor.double), TypeError, r"exp_avg\[1\] of dtype float32"),
    ("adam_ema", None, at("params", 1, lambda p: None), TypeError, r"params\[1\] to be a torch.Tensor"),
    ("adam_ema", None, at("params", 3, lambda p: p.to("meta")), ValueError, r"params\[3\] on cpu, got meta"),
    ("adam_ema", None, at("params", 0, lambda p: p[:, ::2]), ValueError, r"params\[0\] to be contiguous or"),
    ("adam_ema", None, at("grads", 1, lambda g: g.long()), TypeError, r"grads\[1\] of dtype float32 or bfloat16 or"),
    ("adam_ema", None, at("grads", 0, lambda g: strided(g, "other order")), ValueError, r"grads\[0\] with shape"),
    ("adam_ema", None, at("grads", 3, lambda g: g.to("meta")), ValueError, r"grads\[3\] on cpu, got meta"),
    ("adam_ema", ADAM_ALL, at("mirror", 0, lambda m: strided(m, "with gaps")), ValueError, r"mirror\[0\] with shape"),
    ("adam_ema", ADAM_ALL, at("mirror", 1, lambda m: m.long()), TypeError, r"mirror\[1\] of dtype float32 or bfloat16"),
    (
        "adam_ema",
        None,
        at("exp_avg_sq", 1, lambda v: Z(8)),
        ValueError,
        r"exp_avg_sq\[1\] with shape \[7\].*zeros_like",
    ),
    ("adam_ema", None, dict(step=3), TypeError, "step to be a torch.Tensor"),
    ("adam_ema", None, dict(step=Z(())), TypeError, "step of dtype int64"),
    ("adam_ema", None, dict(step=Z(1, dtype=I64)), ValueError, r"step of shape \[\]"),
    ("adam_ema", None, dict(lr=-1.0), ValueError, "lr >= 0, got -1.0"),
    ("adam_ema", None, dict(lr=Z(1)), ValueError, r"lr of shape \[\]"),
    ("adam_ema", None, dict(lr="fast"), TypeError, "lr to be a number"),
    ("adam_ema", None, dict(betas=(0.9, 1.0)), ValueError, r"betas in \[0, 1\), got \(0.9, 1.0\)"),
    ("adam_ema", None, dict(eps=0.0), ValueError, "eps > 0, got 0.0"),
    ("adam_ema", None, dict(weight_decay=-0.1), ValueError, "weight_decay >= 0, got -0.1"),
    ("adam_ema", None, dict(max_grad_norm=0.0), ValueError, "max_grad_norm > 0, got 0.0"),
    ("adam_ema", None, dict(ema_decay=0.9), ValueError, "ema and ema_decay together, got no ema"),
    ("adam_ema", ADAM_ALL, dict(ema_decay=1.5), ValueError, r"ema_decay in \[0, 1\], got 1.5"),
    ("adam_ema", ADAM_ALL, dict(ema_decay=None), ValueError, "got no ema_decay"),
    ("adam_ema", ADAM_ALL, dict(grad_scale=Z(1)), ValueError, r"grad_scale of shape \[\]"),
    ("adam_ema", ADAM_ALL, dict(found_inf=Z((), dtype=I64)), TypeError, "found_inf of dtype float32"),
    ("adam_ema", ADAM_ALL, dict(grad_scale=Z((), device="meta")), ValueError, "grad_scale on cpu, got meta"),
    ("adam_ema", ADAM_ALL, at("ema", 1, lambda e: e.to("meta")), ValueError, r"ema\[1\] on cpu, got meta"),
]


@pytest.mark.parametrize(
    ("op", "name", "change", "error", "text"),
    [pytest.param(*row, id=f"{row[0]}-{i}-{row[4]}") for i, row in enumerate(ERRORS)],
)
def test_error_texts(op: str, name: str | None, change: Change, error: type[Exception], text: str) -> None:
    """Each names the op, the argument, what was expected, what was given, and a remedy."""
    case = FIRST[op] if name is None else next(c for c in CASES if (c.op, c.name) == (op, name))
    inputs = case.inputs()
    inputs = inputs | change if isinstance(change, dict) else change(inputs)
    with pytest.raises(error, match=text) as raised:
        op_of(op)(**inputs)
    assert type(raised.value) is error
    assert re.fullmatch(rf"{op}: expected .+, got .+; .+", str(raised.value), flags=re.DOTALL)


# no host sync, no copies


class Recorded(TorchDispatchMode):
    """Notes every operation; refuses one that waits for the device."""

    SYNCS = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket not in self.SYNCS, f"{func} waits for the device"
        if func.overloadpacket in (aten.index, aten.index_put_):
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask waits for the device"
        self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def on_device(inputs: Inputs, make: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
    """The inputs as a captured loop has them: every number that may be a device scalar is one."""
    scalars = {"seed": I64, "step": I64, "lr": F64, "ema_decay": F64, "guidance_scale": torch.float32}
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
    out = {}
    for name, x in inputs.items():
        if name in scalars and isinstance(x, int | float):
            x = torch.tensor(x - 2**64 if name == "seed" and x >= 2**63 else x, dtype=scalars[name], device=device)
        out[name] = tree_map_only(Tensor, make, x)
    return out


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_no_host_sync(backend: str, case: Case) -> None:
    inputs = on_device(case.inputs(torch.float32, "NHWC", device_of(backend)))
    with fastddpm.use_backend(backend), Recorded() as recorded:
        results(case, inputs)
    assert recorded.calls


@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_shapes_and_strides_without_data(backend: str, case: Case) -> None:
    """On fake tensors, which have no values to wait for: the shapes, dtypes and strides are those of a real run."""
    inputs = case.inputs(torch.bfloat16, "NHWC", device_of(backend))
    with fastddpm.use_backend(backend):
        real = results(case, on_device(inputs))
        with FakeTensorMode() as mode:
            fake = results(case, on_device(inputs, mode.from_tensor), of_output=lambda x, dtype: torch.empty_like(x))
    assert real.keys() == fake.keys()
    for name, value in fake.items():
        assert (value.shape, value.dtype, value.stride()) == (
            real[name].shape,
            real[name].dtype,
            real[name].stride(),
        ), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "case"), EVERY)
def test_dense_inputs_are_not_copied(backend: str, case: Case, layout: str) -> None:
    """Neither order is turned into the other, nor a copy made of what has the right dtype already."""
    inputs = case.inputs(torch.float32, layout, device_of(backend))
    with fastddpm.use_backend(backend), Recorded() as recorded:
        op_of(case.op)(**inputs)
    size = max(x.numel() for x in tree_leaves(inputs) if isinstance(x, Tensor))
    copies = [f for f, args, _ in recorded.calls if f.overloadpacket is aten.clone and args[0].numel() >= size > 1]
    assert not copies


@pytest.mark.parametrize(("backend", "case"), REGISTERED)
def test_library_ops_pass_opcheck(backend: str, case: Case) -> None:
    """What an implementation registers with torch.library passes opcheck; the reference is plain PyTorch: nothing."""
    with fastddpm.use_backend(backend), Recorded() as recorded:
        results(case, case.inputs(torch.float32, "NHWC", device_of(backend)))
    registered = [call for call in recorded.calls if call[0].namespace not in ("aten", "prim", "prims")]
    assert bool(registered) == (backend != "reference")
    for func, args, kwargs in registered:
        torch.library.opcheck(func, args, kwargs)


# torch.compile


def check_compiled(backend: str, case: Case, compiler: str, **options: Any) -> None:
    torch._dynamo.reset()
    inputs = case.inputs(torch.float32, "NHWC", device_of(backend))
    compiled = torch.compile(op_of(case.op), fullgraph=True, backend=compiler, **options)
    with fastddpm.use_backend(backend):
        found = results(case, inputs, op=compiled)
    check_values(case, found, inputs, torch.float32, backend)


@pytest.mark.parametrize(("backend", "case"), COMPILED)
def test_fullgraph(backend: str, case: Case) -> None:
    """No graph break, forward or backward, and any number of rows."""
    check_compiled(backend, case, "aot_eager", dynamic=True)


@pytest.mark.parametrize(("backend", "case"), COMPILED)
def test_inductor(backend: str, case: Case) -> None:
    check_compiled(backend, case, "inductor")


@pytest.mark.parametrize(
    ("backend", "case"), [p for p in COMPILED if p.values[1].gradients and p.values[0] != "reference"]
)
def test_a_compiled_backward_copies_no_gradient(backend: str, case: Case) -> None:
    """Dynamo makes a copy in NCHW order of every gradient that a backward asks for its strides, and we one in NHWC."""
    found = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.append([node for node in calls if node.target is aten.clone.default and node.meta["val"].dim() == 4])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=look)
    compiled = torch.compile(op_of(case.op), fullgraph=True, backend=compiler)
    inputs = case.inputs(torch.float32, "NHWC", device_of(backend))
    with fastddpm.use_backend(backend):
        results(case, inputs, op=compiled)
    assert found == [[]]


@pytest.mark.parametrize("op", ["conv3x3", "linear"])
def test_compiled_training_in_a_new_thread(op: str) -> None:
    """What a thread keeps is there from its first call on: a guard on it would fail at the second."""
    errors: list[BaseException] = []

    def train() -> None:
        try:
            compiled = torch.compile(op_of(op), fullgraph=True, backend="aot_eager")
            for _ in range(2):
                results(FIRST[op], FIRST[op].inputs(torch.float32, "NHWC"), op=compiled)
        except BaseException as error:
            errors.append(error)

    torch._dynamo.reset()
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors, errors[0]


def test_compiled_code_follows_use_backend() -> None:
    """Which implementation runs is part of what was compiled: a change of it compiles anew."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    case = FIRST["rms_norm_silu"]
    compiled = torch.compile(op_of(case.op), fullgraph=True, backend=counter)
    inputs = case.inputs()
    for context, count in (("reference", 1), (None, 2), ("reference", 2)):
        if context is None:
            compiled(**inputs)
        else:
            with fastddpm.use_backend(context):
                compiled(**inputs)
        assert counter.frame_count == count


# on a GPU


def on_gpu(case: Case, dtype: torch.dtype = torch.float32, layout: str = "NHWC") -> Inputs:
    return on_device(case.inputs(dtype, layout, "cuda"))


def ones(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones_like(like)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), ON_A_GPU)
def test_values_on_a_gpu(op: str, backend: str) -> None:
    for case, dtype, layout in itertools.product([c for c in CASES if c.op == op], DTYPES, LAYOUTS):
        inputs = on_gpu(case, dtype, layout)
        with fastddpm.use_backend(backend):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), ON_A_GPU)
def test_no_sync_on_a_gpu(op: str, backend: str) -> None:
    for case in [c for c in CASES if c.op == op]:
        inputs = on_gpu(case)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with fastddpm.use_backend(backend):
                results(case, inputs, of_output=ones)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), ON_A_GPU)
def test_graph_capture(op: str, backend: str) -> None:
    """Captured once, forward and backward; a replay gives the bits of a direct call, for rewritten inputs too."""
    for case in [c for c in CASES if c.op == op]:
        inputs = on_gpu(case)
        other = tree_map_only(
            Tensor, lambda x: x * 0.5 if x.is_floating_point() and x.dim() == 4 else x.clone(), inputs
        )
        with fastddpm.use_backend(backend):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results(case, inputs, of_output=ones)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = results(case, inputs, of_output=ones)
            for values in (copied(inputs), other):
                for x, y in zip(tree_leaves(inputs), tree_leaves(values), strict=True):
                    if isinstance(x, Tensor):
                        x.copy_(y)
                graph.replay()
                for name, value in results(case, inputs, of_output=ones).items():
                    assert torch.equal(captured[name], value), f"{case.name}: {name}"
