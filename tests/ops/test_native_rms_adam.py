"""The C++ kernels of rms_norm_silu and adam_ema: rows around a vector, chunks around an edge, numbers at the ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastddpm
from fastddpm import _native
from tests.ops.cases import DTYPES, LAYOUTS, STATE, Case, Inputs, converted, copied, optimizer_state, rand, randn
from tests.ops.test_contract import check_values, poisoned_memory, results
from tests.ops.test_native import device_fixture, instruction_set  # noqa: F401, the fixtures
from tests.tolerance import assert_equal_to_rounding

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}")

ALL_DTYPES = (*DTYPES, torch.float64)
CHUNK = 8192  # elements, as in csrc/adam_ema/adam_ema.cpp


# rms_norm_silu

CHANNELS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 128, 129)  # around vectors of 4, 8 and 16 lanes
SPATIAL = ((1, 1), (1, 3), (2, 4), (5, 3), (4, 4), (17, 1), (3, 11), (13, 11))
MANY = 15  # gradients of fewer numbers are sums whose errors the rule has nothing to average over


def norm_case(channels: int, spatial: tuple[int, int], **options: Any) -> Case:
    def make(g: torch.Generator) -> Inputs:
        return dict(
            x=randn(g, 3, channels, *spatial), weight=1 + 0.3 * randn(g, channels), scale=0.3 * randn(g, 3, channels),
            shift=0.3 * randn(g, 3, channels), **options,
        )  # fmt: skip

    given = ("weight", "scale", "shift") if channels >= MANY else ()
    name = f"{channels} channels of {spatial[0]}x{spatial[1]}"
    # x / |x| of one channel does not depend on |x|: its gradient is 0 but for rounding
    return Case("rms_norm_silu", name, make, gradients=("x", *given) if channels > 1 else ())


Run = Callable[..., Any]


@pytest.fixture
def native(device: str) -> Run:
    """Run a case on each device; what it finds is on the CPU."""

    def run(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        with fastddpm.use_backend("native"), poisoned_memory():
            return on("cpu", results(case, on(device, inputs), dtype))

    return run


def on(device: str, values: dict[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = tree_map_only(Tensor, lambda x: x.to(device), values)
    return moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", SPATIAL, ids=lambda s: f"{s[0]}x{s[1]}")
def test_rows_around_a_vector(native: Run, spatial: tuple[int, int], layout: str) -> None:
    """A row is the channels of a pixel in NHWC order, the pixels of a channel in NCHW order: short, whole, or more."""
    for i, channels in enumerate(CHANNELS):
        case, dtype = norm_case(channels, spatial, activation=i % 4 != 3), DTYPES[i % 3]
        inputs = case.inputs(dtype, layout)
        check_values(case, native(case, inputs, dtype), inputs, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [127, 128, 129, 255, 256, 257, 1025])  # a block has about 128 where channels are few
def test_pixels_around_a_block(native: Run, pixels: int, layout: str) -> None:
    for channels, dtype in ((3, torch.bfloat16), (16, torch.float16), (21, torch.float32)):
        case = norm_case(channels, (1, pixels))
        inputs = case.inputs(dtype, layout)
        check_values(case, native(case, inputs, dtype), inputs, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_a_batch_is_that_sample_alone(native: Run, layout: str) -> None:
    for channels, spatial in itertools.product((3, 20, 129), ((1, 1), (3, 3), (9, 15))):
        case = norm_case(channels, spatial)
        inputs = case.inputs(torch.bfloat16, layout)
        whole = native(case, inputs, torch.bfloat16)["output 0"]
        for i in range(3):
            one = {k: v if k == "weight" else v[i : i + 1] for k, v in inputs.items()}
            assert torch.equal(native(case, one, torch.bfloat16)["output 0"], whole[i : i + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_that_are_none_stay_in_their_pixel(native: Run, layout: str) -> None:
    """Vectors overlap and rows are padded: what is NaN or infinite in one pixel reaches no other."""
    for channels, spatial in itertools.product((3, 5, 20, 37), ((1, 3), (3, 3), (5, 7))):
        case = norm_case(channels, spatial)
        inputs = case.inputs(torch.float32, layout)
        expected = native(case, inputs)
        for bad in (math.nan, math.inf):
            changed = copied(inputs)
            changed["x"][1, channels - 1, -1, -1] = bad
            found = native(case, changed)
            for name in ("output 0", "gradient of x"):
                same = torch.ones_like(changed["x"], dtype=torch.bool)
                same[1, :, -1, -1] = False
                assert torch.equal(found[name][same], expected[name][same]), (name, channels, spatial)
                assert found[name][1, channels - 1, -1, -1].isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_of_zeros(native: Run, layout: str) -> None:
    """There eps is the divisor, a constant."""
    for channels in (3, 16, 21):
        case = norm_case(channels, (5, 7), eps=1e-3)
        inputs = case.inputs(torch.float32, layout)
        inputs["x"][:, :, 1:3] = 0
        check_values(case, native(case, inputs), inputs, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit_of_the_norm(native: Run, layout: str) -> None:
    for channels, spatial in ((3, (101, 97)), (129, (31, 33)), (512, (3, 3))):
        case = norm_case(channels, spatial)
        inputs = case.inputs(torch.bfloat16, layout)
        of_threads(lambda case=case, inputs=inputs: native(case, inputs, torch.bfloat16))


def of_threads(run: Any) -> None:
    """The same bits with one thread and with three."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        three = run()
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        assert torch.equal(value, three[name]), name


# adam_ema


def step_case(*sizes: int, mixed: bool = True) -> Case:
    """Tensors of these sizes; with ``mixed`` every dtype that gradients and mirrors may have."""

    def make(g: torch.Generator) -> Inputs:
        params = [randn(g, n) for n in sizes]
        return dict(
            params=params, grads=[randn(g, n) for n in sizes], exp_avg=[0.1 * randn(g, n) for n in sizes],
            exp_avg_sq=[0.01 * rand(g, n) for n in sizes], step=torch.tensor(3), lr=1e-3, weight_decay=0.1,
            max_grad_norm=0.5, ema=[p + 0.1 for p in params], ema_decay=0.99, mirror=[p - 0.5 for p in params],
            grad_scale=torch.tensor(8.0, dtype=torch.float64), found_inf=torch.tensor(0.0),
        )  # fmt: skip

    return Case("adam_ema", f"sizes {sizes}", make, written=(*STATE, "ema", "mirror", "found_inf"))


def step_inputs(case: Case, first: int = 0) -> Inputs:
    """Gradients and mirrors in every dtype, in turn."""
    inputs = case.inputs()
    for name, offset in (("grads", first), ("mirror", first + 1)):
        inputs[name] = [x.to(ALL_DTYPES[(i + offset) % 4]) for i, x in enumerate(inputs[name])]
    return inputs


@pytest.mark.parametrize("first", range(4), ids=lambda i: str(ALL_DTYPES[i]).removeprefix("torch."))
def test_sizes_around_a_chunk(native: Run, first: int) -> None:
    # large enough, all of them, that the rule has something to average over
    case = step_case(3 * CHUNK + 5, CHUNK - 1, CHUNK, CHUNK + 1, 1023, 1025, 65)
    inputs = step_inputs(case, first)
    found = native(case, inputs)
    check_values(case, found, inputs, torch.float32)
    for i, mirror in enumerate(inputs["mirror"]):
        assert torch.equal(found[f"mirror {i}"], found[f"params {i}"].to(mirror.dtype))


@pytest.mark.parametrize("count", [57, 505])
def test_more_tensors_than_a_launch_takes(native: Run, count: int) -> None:
    """The kernels for a GPU take a table of 56 tensors, or of 504, in their parameters; empty ones take no place."""
    case = step_case(CHUNK + 1, *(0 if i % 9 == 5 else 30 + i % 7 for i in range(count + count // 8)))
    inputs = step_inputs(case)
    for name in ("params", "grads", "exp_avg", "exp_avg_sq", "ema", "mirror"):  # those of the same kind end to end
        inputs[name][1:] = [x.to(inputs[name][1].dtype) for x in inputs[name][1:]]
    names = ("params", "exp_avg", "exp_avg_sq", "ema", "mirror")
    joined = {name: [x[0], torch.cat(x[1:])] for name, x in inputs.items() if name in (*names, "grads")}
    unclipped = dict(max_grad_norm=None)
    found, expected = native(case, inputs | unclipped), native(step_case(1, 1), copied(inputs | joined | unclipped))
    assert_equal_to_rounding(found["output 0"], expected["output 0"])
    for name in names:
        assert torch.equal(
            torch.cat([found[f"{name} {i}"] for i in range(1, len(inputs["params"]))]), expected[f"{name} 1"]
        )


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_no_element_beyond_the_end_is_touched(native: Run, device: str, size: int) -> None:
    """Short tensors amid memory that must stay as it is, beside a longer one to compare numbers with."""
    case = step_case(512)
    inputs = step_inputs(case)
    whole = native(case, inputs)
    names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema", "mirror")
    memory = on(device, {name: inputs[name][0].clone() for name in names})
    part = {name: [x[32 : 32 + size]] for name, x in memory.items()}
    alone = on(device, inputs | dict(step=torch.tensor(3), found_inf=torch.tensor(0.0))) | part
    unclipped = native(case, inputs | dict(max_grad_norm=None))
    with fastddpm.use_backend("native"):
        fastddpm.adam_ema(**alone | dict(max_grad_norm=None))
    for name, x in on("cpu", memory).items():
        before = inputs[name][0]
        changed = unclipped.get(f"{name} 0", before)[32 : 32 + size]
        assert torch.equal(x, torch.cat([before[:32], changed, before[32 + size :]])), name
    assert not torch.equal(whole["params 0"], unclipped["params 0"])  # clipping was on, and did something


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-22, 1e-18, 1e-12, 1.0, 1e15, 1e18, 1e19, 1e30])
def test_the_norm_of_gradients_of_any_size(device: str, size: float) -> None:
    """Their squares do not fit a float; the norm does."""
    g = torch.Generator().manual_seed(0)
    grads = [size * torch.randn(n, generator=g) for n in (CHUNK + 3, 17, 1)]
    grads[1] *= 1e-3
    expected = torch.cat(grads).double().norm().float()
    norm = step_from_zero(device, grads)["norm"]
    assert (norm - expected).abs() <= 1e-6 * expected + 1e-45, (norm, expected)
    assert step_from_zero(device, [torch.zeros(100)])["norm"] == 0


def test_the_norm_where_large_and_small_gradients_are_neighbours(device: str) -> None:
    """What is too small for the square of a float counts neither twice nor not at all beside what is not."""
    for dtype, small in itertools.product((torch.float32, torch.bfloat16), (1e-30, 1e-14, 1e18)):
        for begin, end in ((0, 4), (4, 1024), (1, CHUNK - 1), (CHUNK // 2, CHUNK)):
            grads = [torch.full((CHUNK + 5,), small, dtype=dtype)]
            grads[0][begin:end] = 1.5
            expected = grads[0].double().norm().float()
            norm = step_from_zero(device, grads)["norm"]
            assert (norm - expected).abs() <= 1e-6 * expected, (dtype, small, begin, end)


def step_from_zero(device: str, grads: list[Tensor]) -> dict[str, Any]:
    """A step from zero moments; everything that it may write, by name."""
    numbers = torch.arange(max(len(x) for x in grads), dtype=torch.float32)
    state: dict[str, Any] = {name: [numbers[: len(x)].clone() for x in grads] for name in ("params", "ema")}
    state |= {name: [torch.zeros(len(x)) for x in grads] for name in ("exp_avg", "exp_avg_sq")}
    state |= dict(mirror=[x.bfloat16() for x in state["params"]], step=torch.tensor(5), found_inf=torch.tensor(0.0))
    there = on(device, state | dict(grads=grads))
    with fastddpm.use_backend("native"):
        norm = fastddpm.adam_ema(lr=0.1, ema_decay=0.5, **there)
    return on("cpu", there | dict(norm=norm))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_gradient_that_is_no_number_skips_the_step(device: str, dtype: torch.dtype, bad: float) -> None:
    sizes = (CHUNK + 3, 17, 1)
    for which, size in enumerate(sizes):
        grads = [torch.ones(n, dtype=dtype) for n in sizes]
        grads[which][size - 1] = bad
        found = step_from_zero(device, grads)
        assert not found["norm"].isfinite() and found["found_inf"] == 1 and found["step"] == 5
        for i, n in enumerate(sizes):
            numbers = torch.arange(n, dtype=torch.float32)
            assert torch.equal(found["params"][i], numbers) and torch.equal(found["ema"][i], numbers)
            assert torch.equal(found["mirror"][i], numbers.bfloat16())
            assert not found["exp_avg"][i].any() and not found["exp_avg_sq"][i].any()


def test_a_norm_too_large_for_a_float_skips_the_step(device: str) -> None:
    found = step_from_zero(device, [torch.full((100,), 3e38)])
    assert found["norm"] == math.inf and found["found_inf"] == 1 and found["step"] == 5


def test_threads_change_no_bit_of_the_step(native: Run) -> None:
    case = step_case(*(CHUNK * k + k - 2 for k in range(2, 6)), *range(40), 3 * CHUNK)
    inputs = step_inputs(case)
    of_threads(lambda: native(case, inputs))


@pytest.mark.parametrize("name", ["params", "exp_avg", "exp_avg_sq", "ema", "mirror", "step", "found_inf"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.usefixtures("instruction_set")
def test_autograd_knows_what_was_written_over(backend: str, name: str) -> None:
    """A graph that kept one of these values does not go backward with another in its place."""
    inputs = step_case(7).inputs()
    written = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
    factor = torch.ones((), requires_grad=True)
    kept = (factor * written).sum()
    with fastddpm.use_backend(backend):
        fastddpm.adam_ema(**inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.usefixtures("instruction_set")
def test_memory_orders_of_a_step() -> None:
    """In any dense order the step gives the same numbers; tensors of a parameter that lie differently are refused."""
    shape = (4, 3, 5, 7)
    case = step_case(math.prod(shape))
    flat = case.inputs()
    names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema", "mirror")

    def laid_out(order: torch.memory_format) -> Inputs:
        images = {name: [flat[name][0].reshape(shape).clone(memory_format=order)] for name in names}
        return copied(flat) | images | dict(max_grad_norm=None)  # the norm is summed in the order of memory

    steps = [laid_out(order) for order in LAYOUTS.values()]
    for inputs in steps:
        with fastddpm.use_backend("native"):
            fastddpm.adam_ema(**inputs)
    for name in names:
        first, second = (inputs[name][0] for inputs in steps)
        assert first.stride() != second.stride()
        if name == "grads":
            continue
        assert torch.equal(first, second), name
    for name in names[1:]:
        mixed = laid_out(torch.channels_last) | {name: laid_out(torch.contiguous_format)[name]}
        with pytest.raises(ValueError, match=rf"expected {name}\[0\] with shape .* and strides"):
            fastddpm.adam_ema(**mixed)


def test_the_first_tensor_that_does_not_fit_is_named() -> None:
    """Lists come in order, tensors in the order of their list, and of one tensor its dtype, strides and device."""
    wrong: list[Callable[[Tensor], Any]] = [Tensor.t, lambda x: x.to("meta"), lambda x: None]
    for i, text in enumerate([r"grads\[0\] with shape", r"grads\[1\] on cpu", r"grads\[2\] to be a torch.Tensor"]):
        inputs = converted(optimizer_state(torch.Generator().manual_seed(0), *((4, 3),) * 3), torch.float32)
        for name in ("grads", "exp_avg"):
            inputs[name][i:] = [wrong[k](inputs[name][k]) for k in range(i, 3)]
        with pytest.raises((TypeError, ValueError), match=text):
            fastddpm.adam_ema(**inputs)


def test_a_stride_over_one_element_says_nothing() -> None:
    """The gradient of a 1x1 convolution in channels_last has other strides than its weight, and the same memory."""
    inputs = converted(optimizer_state(torch.Generator().manual_seed(0), (4, 3, 1, 1), (3,)), torch.float32)
    inputs["grads"][0] = inputs["grads"][0].as_strided((4, 3, 1, 1), (3, 1, 7, 5))
    expected = copied(inputs)
    expected["grads"][0] = expected["grads"][0].reshape(4, 3, 1, 1)
    for given in (inputs, expected):
        fastddpm.adam_ema(**given)
    assert inputs["grads"][0].stride() != inputs["params"][0].stride()
    assert torch.equal(inputs["params"][0], expected["params"][0])


def adamw(moments: torch.memory_format, **options: bool) -> Tensor:
    """A step of torch's on a channels_last parameter, with the same moments in this memory order."""
    g = torch.Generator().manual_seed(0)
    order = torch.channels_last
    p, grad, m, v = (torch.rand(2, 3, 4, 5, generator=g).contiguous(memory_format=order) for _ in range(4))
    p = torch.nn.Parameter(p)
    p.grad = grad
    optimizer = torch.optim.AdamW([p], lr=0.1, **options)
    m, v = (x.contiguous(memory_format=moments) for x in (m, v))
    optimizer.state[p] = dict(step=torch.tensor(3.0), exp_avg=m, exp_avg_sq=v)
    optimizer.step()
    return p.detach()


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="what torch 2.13 does; others may do it right")
def test_why_moments_of_other_strides_are_refused() -> None:
    """torch's fused step on the CPU pairs elements by their place in memory, and says nothing."""
    right = adamw(torch.channels_last, foreach=False)
    assert torch.equal(adamw(torch.contiguous_format, foreach=False), right)
    torch.testing.assert_close(adamw(torch.channels_last, fused=True), right)
    assert (adamw(torch.contiguous_format, fused=True) - right).abs().max() > 0.01
