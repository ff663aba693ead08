"""The C++ kernels of conv3x3: tiles of both sizes, blocks and panels around their edges, threads, kept weights."""

from __future__ import annotations

import threading

import pytest
import torch

import fastddpm
from fastddpm.ops.conv3x3 import native_impl
from fastddpm.ops.kept import is_kept, keep_transformed
from tests.ops.cases import LAYOUTS, Case, randn
from tests.ops.test_contract import check_values, results
from tests.ops.test_native import check_threads_change_no_bit, instruction_set  # noqa: F401, the fixture
from tests.tolerance import assert_within

# batch, channels, outputs, height, width: around a vector, a panel, a block of tiles, an item of the gradient
SIZES = [(1, 1, 8, 2, 2), (2, 15, 31, 4, 5), (1, 16, 32, 9, 3), (3, 17, 33, 8, 8), (1, 129, 65, 7, 6),
         (5, 3, 64, 14, 15)]  # fmt: skip


def convolution(batch: int, channels: int, outputs: int, height: int, width: int) -> Case:
    return Case(
        "conv3x3",
        f"{channels} to {outputs} channels, {batch} of {height}x{width}",
        lambda g: dict(
            x=3 + randn(g, batch, channels, height, width), weight=0.1 * randn(g, outputs, channels, 3, 3),
            bias=randn(g, outputs),
        ),
        gradients=("x", "weight", "bias"),
    )  # fmt: skip


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tile"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float16, 4)]
)
def test_sizes_around_the_edges(dtype: torch.dtype, tile: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_impl, "_tile", lambda *_: tile)
    for size in SIZES:
        case = convolution(*size)
        inputs = case.inputs(dtype, layout)
        with fastddpm.use_backend("native"):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype)


def test_tiles_are_large_in_half_precision_alone() -> None:
    def tiles(*shape: int, x: torch.dtype, output: torch.dtype) -> list[int]:
        given = torch.empty(shape, dtype=x)
        found = (native_impl.READ, native_impl.TRANSFORMED, native_impl.PACKED)
        return [native_impl._tile(given, output, w) for w in found]

    half, single = torch.bfloat16, torch.float32
    assert tiles(8, 1, 32, 32, x=half, output=half) == tiles(8, 1, 31, 30, x=half, output=half) == [4, 4, 4]
    assert tiles(1, 1, 16, 16, x=half, output=half) == [4, 2, 4]  # 16 tiles of 4x4
    assert tiles(1, 1, 8, 8, x=half, output=half) == [2, 2, 2]
    assert tiles(64, 1, 2, 2, x=half, output=half) == [2, 2, 2]  # a map that is smaller than a tile
    # the second is the gradient of a float32 weight
    for x, output in ((single, single), (half, single), (single, half)):
        assert tiles(8, 1, 32, 32, x=x, output=output) == [2, 2, 2]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_float32_weight(dtype: torch.dtype, autocast: bool) -> None:
    """It has the precision of float32; under autocast that of x, which the weight is rounded to there."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 14, 15, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, 33, 3, 3, generator=g), torch.randn(64, generator=g)
    dy = torch.randn(2, 64, 14, 15, generator=g).to(dtype)

    def gradients(wide: torch.dtype | None = None, autocast: bool = False) -> tuple[torch.Tensor, ...]:
        given = [p.clone() if wide is None else p.to(wide) for p in (x, weight, bias)]
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = fastddpm.conv3x3(*(p.requires_grad_() for p in given))
        return torch.autograd.grad(y, given, dy.to(y.dtype))

    with fastddpm.use_backend("native"):
        found, other = gradients(autocast=autocast), gradients(autocast=not autocast)
    with fastddpm.use_backend("reference"):
        in64, in32 = gradients(torch.float64), gradients(torch.float32)
    assert [p.dtype for p in found] == [dtype, torch.float32, torch.float32]
    rounded = (found[0], found[1].to(dtype) if autocast else found[1], found[2])
    for name, one, exact, single in zip(("x", "weight", "bias"), rounded, in64, in32, strict=True):
        assert_within(one, exact, single, name)
    assert [torch.equal(one, two) for one, two in zip(found, other, strict=True)] == [True, False, True]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tile"), [(torch.float32, 2), (torch.bfloat16, 4)])
def test_rows_waves_and_blocks_come_to_the_same(dtype: torch.dtype, tile: int, layout: str) -> None:
    """Rows of frequencies, with weights as they are, in one wave or two and of one block or two; what weights are
    transformed to before, in waves to many outputs, and in blocks to few."""
    ops = torch.ops.fastddpm
    for batch, channels, outputs, height, width in ((1, 161, 170, 5, 6), (4, 161, 170, 40, 39), (2, 600, 40, 38, 39)):
        inputs = convolution(batch, channels, outputs, height, width).inputs(dtype, layout)
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        turned = weight.flip(2, 3).transpose(0, 1).contiguous()
        for of in (weight.contiguous(), weight.contiguous(memory_format=torch.channels_last)):
            y = ops.conv3x3(x, of, bias, False, tile)
            for some in (slice(0, outputs), slice(0, 30), slice(outputs - 20, outputs)):
                transformed = ops.conv3x3_weights(weight[some], False, tile)
                one = ops.conv3x3_transformed(x, transformed, bias[some], len(bias[some]))
                assert torch.equal(y[:, some], one)
        for of in (turned, turned.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(y, ops.conv3x3(x, of, bias, True, tile))


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [((40, 70), torch.float32), ((161, 170), torch.float32), ((70, 70), torch.bfloat16)],
    ids=["in blocks", "in waves", "slices of the gradient that keep x"],
)
def test_threads_change_no_bit(channels: tuple[int, int], dtype: torch.dtype) -> None:
    case = convolution(4, *channels, 32, 32)
    check_threads_change_no_bit(case, case.inputs(dtype, "NHWC"), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("tile", "most"), [(2, 1.6), (4, 6.0)])
def test_rounding_error_beside_that_of_a_direct_sum(tile: int, most: float) -> None:
    """In the mean, of float32: what the docstring says."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 16, 16, generator=g), torch.randn(64, 64, 3, 3, generator=g)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    error = (torch.ops.fastddpm.conv3x3(x, weight, None, False, tile).double() - exact).norm()
    direct = torch.zeros(2, 64, 16, 16)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for k in range(64):
        for i in range(3):
            for j in range(3):
                moved = padded[:, k, None, i : i + 16, j : j + 16]
                direct = direct + weight[:, k, i, j].reshape(1, -1, 1, 1) * moved
    assert error <= most * (direct.double() - exact).norm()


def test_weights_are_kept_for_their_thread_alone() -> None:
    entered, left = threading.Event(), threading.Event()
    inside: list[bool] = []

    def another() -> None:
        with torch.no_grad(), keep_transformed():
            entered.set()
            assert left.wait(10)
            inside.append(is_kept())

    thread = threading.Thread(target=another)
    with torch.no_grad():
        with keep_transformed():
            thread.start()
            assert entered.wait(10)
        left.set()  # this block ends while the other one, which began within it, goes on
        thread.join()
        assert inside == [True]
        assert not is_kept()


def test_weights_are_kept_within_the_block_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    with fastddpm.use_backend("native"), torch.no_grad():
        first = fastddpm.conv3x3(x, weight)
        with keep_transformed():
            assert is_kept()
            assert torch.equal(fastddpm.conv3x3(x, weight), first)
            weight.mul_(2)  # which nobody may do here: what was kept is used
            assert torch.equal(fastddpm.conv3x3(x, weight), first)
            with torch.enable_grad():  # nothing is kept where weights may be trained
                assert not is_kept()
                assert torch.equal(fastddpm.conv3x3(x, weight).detach(), 2 * first)
        assert not is_kept()
        assert torch.equal(fastddpm.conv3x3(x, weight), 2 * first)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tile"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float16, 4)]
)
def test_packed_weights_give_the_bits_of_transformed_ones(
    dtype: torch.dtype, tile: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_impl, "_tile", lambda *_: tile)
    for size in [*SIZES, (1, 70, 20, 20, 20), (2, 0, 3, 4, 4), (0, 4, 3, 4, 4)]:
        inputs = convolution(*size).inputs(dtype, layout)
        with fastddpm.use_backend("native"), torch.no_grad():
            first = fastddpm.conv3x3(**inputs)
            with keep_transformed():
                assert torch.equal(fastddpm.conv3x3(**inputs), first), size


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("tile", "size"), [(2, (2, 70, 40, 13, 13)), (4, (3, 70, 40, 30, 30))])
def test_packed_weights_give_the_same_bits_on_any_number_of_threads(
    tile: int, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads begin and end within the tiles of a pack, and within a block."""
    monkeypatch.setattr(native_impl, "_tile", lambda *_: tile)
    inputs = convolution(*size).inputs(torch.bfloat16, "NHWC")
    with fastddpm.use_backend("native"), torch.no_grad():
        first = fastddpm.conv3x3(**inputs)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with keep_transformed():
                assert torch.equal(fastddpm.conv3x3(**inputs), first), threads


@pytest.mark.parametrize("of_weight", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_of_any_dtype(of_weight: torch.dtype) -> None:
    x = torch.randn(2, 20, 8, 8)
    weight = torch.randn(18, 20, 3, 3).to(of_weight)
    with fastddpm.use_backend("native"), torch.no_grad():
        first = fastddpm.conv3x3(x, weight)
        with keep_transformed():
            assert torch.equal(fastddpm.conv3x3(x, weight), first)


def test_the_gradient_of_a_float64_weight() -> None:
    case = convolution(2, 20, 18, 8, 8)
    inputs = case.inputs(torch.float32, "NHWC")
    inputs |= {name: inputs[name].double() for name in ("weight", "bias")}
    with fastddpm.use_backend("native"):
        found = results(case, inputs)
    check_values(case, found, inputs, torch.float32)


def test_weights_are_kept_for_each_size_of_tiles() -> None:
    weight = torch.randn(40, 17, 3, 3)
    maps = [torch.randn(1, 17, n, n, dtype=torch.bfloat16) for n in (72, 64, 4)]
    maps += [torch.randn(1, 17, n, n) for n in (72, 64)]
    with fastddpm.use_backend("native"), torch.no_grad():
        anew = [fastddpm.conv3x3(x, weight) for x in maps]
        with keep_transformed():
            for _ in range(2):
                for x, y in zip(maps, anew, strict=True):
                    assert torch.equal(fastddpm.conv3x3(x, weight), y)
