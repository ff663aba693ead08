"""The Triton kernels of the two norms without a GPU: how a call is cut, both paths, shapes, what compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastddpm
from fastddpm.ops import philox
from tests.ops.cases import DTYPES, Case, converted, drawn, norm_weights, randn
from tests.ops.test_contract import check_values, results
from tests.tolerance import assert_within

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton")

from fastddpm.ops import triton_common  # noqa: E402
from fastddpm.ops.group_norm_silu import reference as group_reference  # noqa: E402
from fastddpm.ops.group_norm_silu import triton_impl as group_norm  # noqa: E402
from fastddpm.ops.rms_norm_silu import reference as rms_reference  # noqa: E402
from fastddpm.ops.rms_norm_silu import triton_impl as rms_norm  # noqa: E402

ROOT = Path(__file__).parents[2]
interpreted = pytest.mark.skipif(not triton_common.INTERPRETED, reason="runs in Triton's interpreter")

WIDTHS = (128, 192, 256, 320, 384, 512, 576, 640, 768, 960, 1024, 1152, 1280, 1344, 1536, 1920, 2560)
"""Channels of the norms of the CIFAR-10, ADM-64, Stable Diffusion 1.5 and 256x256 networks."""

SMALL = dict(TILE=16, BACKWARD_TILE=16, CHUNK_TILE=64)  # no tile fits: everything goes in chunks


def ways(backward: bool) -> dict[str, Any]:
    tile, width = ("BACKWARD_TILE", "BACKWARD_WIDTH") if backward else ("TILE", "WIDTH")
    return dict(tile=getattr(group_norm, tile), width=getattr(group_norm, width), backward=backward)


# how a call is cut


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels", WIDTHS)
def test_slabs_of_the_networks_begin_at_16_bytes(channels: int, backward: bool) -> None:
    """In NHWC each slab is a run of whole sectors from each pixel, whatever the size of a group."""
    for batch in (1, 8, 128):
        for side in (4, 8, 16, 32, 64, 128, 256):
            cut = group_norm.plan(batch, channels, side * side, 32, **ways(backward))
            of_slab = cut.groups * channels // 32
            assert of_slab % group_norm.VECTOR == 0 and of_slab >= group_norm.SECTOR, (batch, side, cut)
            assert of_slab > cut.columns // 2, (batch, side, cut)


def test_every_cut_covers_the_image_once() -> None:
    """Any channels, groups and pixels: columns hold the slab, tiles are as large as planned, chunks reach the end."""
    for channels in (1, 2, 3, 6, 7, 16, 30, 97, 192, 1000, 4096, 30_030):
        for num_groups in (g for g in (1, 2, 3, 5, 7, 10, 32, 97, 192, 1000, 4096) if channels % g == 0):
            for pixels in (0, 1, 2, 35, 1023, 1024, 1025, 65_536):
                for batch, nhwc, backward in ((0, True, False), (1, False, True), (200, True, True)):
                    way = ways(backward)
                    cut = group_norm.plan(batch, channels, pixels, num_groups, nhwc=nhwc, **way)
                    of_slab = cut.groups * (channels // num_groups)
                    assert 1 <= cut.groups <= num_groups and cut.chunks == -(-max(pixels, 1) // cut.pixels)
                    assert of_slab <= cut.columns == triton.next_power_of_2(of_slab)
                    assert cut.columns * cut.pixels <= max(way["tile"], cut.columns)
                    assert cut.pixels == triton.next_power_of_2(cut.pixels) and 1 <= cut.warps <= 16


# values


def options_of(name: str, g: torch.Generator, shape: tuple[int, ...], first: int) -> dict[str, Any]:
    batch, channels, *size = shape
    everything: dict[str, dict[str, Any]] = {
        "dropout": dict(dropout=0.3, layer=2, **drawn(batch, tensors=True)),
        "conditioned": dict(scale=0.3 * randn(g, batch, channels), shift=0.3 * randn(g, batch, channels)),
        "residual": dict(residual=randn(g, *shape), channel_bias=randn(g, batch, channels)),
        "two inputs": dict(x2=randn(g, batch, channels - first, *size)),
    }
    return everything[name]


def normed(channels: int, groups: int, size: tuple[int, int], *options: str) -> Case:
    """A norm of so many channels; of two inputs, the first has a channel more than a third of them."""
    first = channels // 3 + 1 if "two inputs" in options else channels

    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = dict(x=3 + randn(g, 2, first, *size), num_groups=groups, **norm_weights(g, channels))
        for name in options:
            inputs |= options_of(name, g, (2, channels, *size), first)
        return inputs

    tensors = make(torch.Generator())
    named = ("x", "weight", "bias", "channel_bias", "scale", "shift", "residual", "x2")
    name = f"{channels} channels in {groups} groups, {size[0]}x{size[1]}, {', '.join(options)}"
    return Case("group_norm_silu", name, make, gradients=tuple(n for n in named if n in tensors))


def check(case: Case, layout: str, dtype: torch.dtype = torch.float32) -> None:
    inputs = case.inputs(dtype, layout)
    with fastddpm.use_backend("triton"):
        found = results(case, inputs, dtype)
    check_values(case, found, inputs, dtype)


GROUPED = [
    normed(24, 4, (4, 4), "dropout", "conditioned"),  # 6 of 8 columns, four pixels a counter
    normed(24, 4, (3, 5), "dropout", "residual"),  # a counter for each element
    normed(32, 8, (4, 8), "dropout"),  # nothing is masked
    normed(45, 9, (5, 3), "two inputs", "residual"),  # a group of both inputs
    normed(7, 7, (4, 5), "two inputs", "dropout"),
    normed(11, 1, (4, 4), "conditioned"),
]


@interpreted
@pytest.mark.parametrize("chunks", [False, True], ids=["one read", "chunks"])
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_groups_that_are_no_power_of_two(case: Case, chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of several groups, the last of them not full; chunks merged a few at a time."""
    narrow = dict(WIDTH=8, BACKWARD_WIDTH=8, WIDEST=16, SECTOR=4, MERGED=8, VECTOR=2)
    for name, value in (narrow | SMALL if chunks else narrow).items():
        monkeypatch.setattr(group_norm, name, value)
    inputs = case.inputs()
    _, _, height, width = inputs["x"].shape
    cut = group_norm.plan(2, inputs["weight"].shape[0], height * width, inputs["num_groups"], **ways(False))
    assert (cut.chunks > 1) == chunks
    check(case, "NHWC", torch.bfloat16)
    if not chunks:
        check(case, "NCHW")


@interpreted
@pytest.mark.parametrize("pixels", [15, 16, 17, 31, 33, 64])
def test_sizes_around_the_edge_of_a_chunk(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SMALL | dict(MERGED=2)).items():
        monkeypatch.setattr(group_norm, name, value)
    assert group_norm.plan(2, 4, pixels, 2, **ways(False)).pixels == 16
    check(normed(4, 2, (1, pixels), "dropout", "residual"), "NHWC")


@interpreted
@pytest.mark.parametrize("chunks", [False, True], ids=["one read", "chunks"])
@pytest.mark.parametrize("size", [(4, 6), (5, 5)], ids=["four pixels a counter", "one pixel a counter"])
def test_dropout_keeps_the_elements_of_the_reference(
    size: tuple[int, int], chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: with weight 0 and bias 1, and no activation, the output is 1 / (1 - p) or 0."""
    for name, value in (SMALL if chunks else {}).items():
        monkeypatch.setattr(group_norm, name, value)
    shape, draw = (3, 6, *size), drawn(3, tensors=True)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with fastddpm.use_backend("triton"):
        y = fastddpm.group_norm_silu(
            x, torch.zeros(6), torch.ones(6), 3, dropout=0.4, layer=7, activation=False, **draw
        )  # fmt: skip
    words = philox.integers(6 * size[0] * size[1], stream=philox.DROPOUT + 7, **draw).reshape(shape)
    assert torch.equal(y != 0, words >= round(0.4 * 2**32))


@interpreted
@pytest.mark.parametrize("chunks", [False, True], ids=["one read", "chunks"])
@pytest.mark.parametrize("used", [0, 1], ids=["y alone", "h alone"])
def test_gradient_of_one_output(used: int, chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has none, and backward is not given zeros in its place."""
    for name, value in (SMALL if chunks else {}).items():
        monkeypatch.setattr(group_norm, name, value)
    case = normed(12, 4, (4, 4), "residual", "dropout")
    inputs = case.inputs(torch.float32, "NHWC")

    def gradients(backend: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        with fastddpm.use_backend(backend):
            found = results(case, inputs, op=lambda **inputs: fastddpm.group_norm_silu(**inputs)[used])
        return {name: x for name, x in found.items() if name.startswith("gradient")}

    in64, in32 = (gradients("reference", converted(inputs, wide)) for wide in (torch.float64, torch.float32))
    for name, value in gradients("triton", inputs).items():
        assert_within(value, in64[name], in32[name], name)


@interpreted
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [2, 31, 32, 33])
def test_rms_norm_around_a_power_of_two(channels: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few pixels, the last of them not full."""
    monkeypatch.setattr(rms_norm, "TILE", 128)

    def make(g: torch.Generator) -> dict[str, Any]:
        weight = 1 + 0.3 * randn(g, channels)
        return dict(x=randn(g, 2, channels, 7, 3), weight=weight, scale=0.3 * randn(g, 2, channels))

    case = Case("rms_norm_silu", f"{channels} channels", make, gradients=("x", "weight", "scale"))
    for dtype in DTYPES:
        check(case, layout, dtype)


# shapes on a device that is not there


def on_device(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, layout: str = "NHWC") -> Tensor:
    if len(shape) == 4 and layout == "NHWC":
        _, c, h, w = shape
        return torch.empty_strided(shape, (c * h * w, 1, c * w, c), dtype=dtype, device="cuda")
    return torch.empty(shape, dtype=dtype, device="cuda")


def traced(call: Any) -> tuple[list[Tensor], list[str]]:
    """The outputs, and the names of the operators called."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(call, tracing_mode="fake")().graph
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    return [node.meta["val"] for node in outputs], [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("size", [(8, 8), (64, 64)], ids=["one read", "chunks"])
def test_group_norm_on_a_fake_gpu(size: tuple[int, int]) -> None:
    """Images of one call in different orders: each gradient is in the order and dtype of its input."""
    with FakeTensorMode():
        x, x2, residual = (
            on_device((2, c, *size), dtype, layout)
            for c, dtype, layout in (
                (24, torch.bfloat16, "NHWC"), (8, torch.bfloat16, "NCHW"), (32, torch.float32, "NHWC")
            )
        )  # fmt: skip
        weight, row = on_device((32,), torch.float32), on_device((2, 32))
        scalar, sample = on_device((), torch.int64), on_device((2,), torch.int64)
        inputs = dict(channel_bias=row, scale=row, shift=row, residual=residual, x2=x2)
        options = dict(dropout=0.1, seed=scalar, sample=sample, step=scalar, layer=1, activation=True)
        dy = on_device((2, 32, *size))

        def call() -> list[Tensor]:
            y, h, saved = group_norm.forward(x, weight, weight, 8, eps=1e-6, **inputs, **options)
            gradients = group_norm.backward(dy, dy, saved, x, weight, weight, 8, **inputs, **options)
            return [y, h, *gradients]

        found, called = traced(call)
        for value, like in zip(found, [dy, dy, x, weight, weight, *inputs.values()], strict=True):
            assert (value.shape, value.dtype, value.stride(), value.device) == (
                like.shape, like.dtype, like.stride(), like.device
            )  # fmt: skip
    assert not any("clone" in name or "contiguous" in name for name in called), called


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_rms_norm_on_a_fake_gpu(layout: str) -> None:
    with FakeTensorMode():
        x, weight, row = on_device((2, 12, 8, 8), layout=layout), on_device((12,), torch.float32), on_device((2, 12))
        options = dict(scale=row, shift=row, eps=1e-12, activation=True)

        def call() -> list[Tensor]:
            y, saved = rms_norm.forward(x, weight, **options)
            return [y, *rms_norm.backward(y, saved, x, weight, **options)]

        found, called = traced(call)
        for value, like in zip(found, [x, x, weight, row, row], strict=True):
            assert (value.shape, value.dtype, value.stride()) == (like.shape, like.dtype, like.stride())
    assert not any("clone" in name or "contiguous" in name for name in called), called


def test_signatures_are_those_of_the_reference() -> None:
    import inspect

    for ours, theirs in ((group_norm, group_reference), (rms_norm, rms_reference)):
        for name in ("forward", "backward"):
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(
                inspect.signature(getattr(theirs, name)).parameters
            )


# what the interpreter cannot tell: the compiler's view


def compiled_elsewhere(*what: str) -> list[str]:
    """Compile for sm_90 in a process in which kernels are not interpreted; the lines it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.test_triton_norms", *what],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def launched(op: str, shape: tuple[int, ...], *options: str, groups: int = 32) -> list[Any]:
    """What a call in bfloat16 and NHWC launches, forward and backward."""
    from tests.ops import aot

    batch, channels = shape[:2]
    x, weight, row = aot.activation(shape), aot.empty(channels), aot.empty(batch, channels, dtype=torch.bfloat16)
    condition = row if "conditioned" in options else None

    def rms(module: Any) -> None:
        named = dict(scale=condition, shift=condition, eps=1e-12, activation=True)
        aot.unwrapped(module).forward(x, weight, **named)
        module.backward(x, (), x, weight, **named)

    def group(module: Any) -> None:
        draw = dict(dropout=0.1, sample=aot.rows(batch), **aot.DRAWN)
        draw = draw if "dropout" in options else dict(dropout=0.0, sample=None, seed=None, step=None)
        residual = x if "residual" in options else None
        inputs = dict(channel_bias=row, scale=condition, shift=condition, residual=residual, x2=None)
        call = dict(num_groups=min(groups, channels), **inputs, layer=0, activation=True, **draw)
        _, _, saved = aot.unwrapped(module).forward(x, weight, weight, eps=1e-6, **call)
        module.backward(x, residual, saved, x, weight, weight, **call)

    return aot.recorded(op, group if op == "group_norm_silu" else rms)


@pytest.mark.timeout(60)  # ptxas; a process of its own
def test_sizes_of_one_compile() -> None:
    """An integer that is 1 is a constant to Triton, without the methods of its numbers: the interpreter has them."""
    lines = compiled_elsewhere("ones")
    assert len(lines) == 12 and set(lines) == {"compiled"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", ["128x128x32x32", "128x256x16x16", "8x320x64x64", "64x576x16x16"])
def test_dropout_and_the_widths_of_other_networks(shape: str) -> None:
    """Groups of 10 and 18 channels are read 16 bytes at a time, too; dropout draws once for four pixels."""
    lines = [line.split("; ") for line in compiled_elsewhere(shape)]
    assert len(lines) == {"8x320x64x64": 6, "64x576x16x16": 4}.get(shape, 2)
    for name, local, wide, multiplications, of_thread in lines:
        over_the_image = "merge" not in name
        assert int(wide) > 0 or not over_the_image, name
        # the backward tile of the 32x32 level takes every register: with dropout two numbers a thread do not fit
        assert int(local) <= (4 if name.startswith("128x128x32x32 dropout backward") else 0), (name, local)
        if "dropout" in name and over_the_image:
            # ten rounds of two products for four elements, not for one; other products are few
            assert int(multiplications) <= 20 * int(of_thread) // 4 + 8, (name, multiplications, of_thread)


def main(what: str) -> None:
    import re

    from tests.ops import aot

    if what == "ones":
        for op in ("group_norm_silu", "rms_norm_silu"):
            for shape in ((1, 1, 1, 1), (1, 8, 1, 1), (2, 1, 7, 5)):
                for launch in launched(op, shape, "conditioned", "dropout", "residual"):
                    aot.compiled(launch, 90)
                    print("compiled")
        return
    options = {"128x128x32x32": ("dropout",), "128x256x16x16": ("dropout", "conditioned")}.get(what, ())
    for launch in launched("group_norm_silu", tuple(map(int, what.split("x"))), *options):
        name = f"{what} {' '.join(options)} {launch.kernel.fn.__name__}"
        binary, arguments = aot.inspected(name, launch, 90), launch.arguments
        products = len(re.findall(r"mul\.(?:wide\.u32|hi)", aot.compiled(launch, 90).asm["ptx"]))
        elements = arguments["ROWS"] * arguments["WIDE"] // binary.threads if "WIDE" in arguments else 0
        print(f"{name}; {binary.local}; {binary.wide}; {products}; {elements}")


if __name__ == "__main__":
    main(sys.argv[1])
