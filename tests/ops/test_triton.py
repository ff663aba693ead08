"""The Triton kernels without a GPU: their noise, sizes around a block, both ways to cut a norm, shapes on a device."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastddpm
from fastddpm.ops import normal, philox
from tests.ops.cases import (
    AT_HAND,
    CASES,
    LAYOUTS,
    OF_A_GPU,
    Case,
    Inputs,
    drawn,
    holder_of,
    op_of,
    rand,
    randn,
    solver_table,
)
from tests.ops.test_contract import Recorded, check_values, results
from tests.ops.test_native import sized
from tests.tolerance import assert_normals_within

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytestmark = OF_A_GPU
tl = triton.language

from fastddpm.ops import triton_common  # noqa: E402
from fastddpm.ops.adam_ema import triton_impl as adam_ema  # noqa: E402
from fastddpm.ops.diffusion_loss import triton_impl as diffusion_loss  # noqa: E402
from fastddpm.ops.group_norm_silu import triton_impl as group_norm  # noqa: E402

interpreted = pytest.mark.skipif(not triton_common.INTERPRETED, reason="runs in Triton's interpreter")


@triton.jit
def words_kernel(out, sample, seed_low, seed_high, step, stream, BLOCKS: tl.constexpr):
    b = tl.program_id(0)
    number = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
    block = tl.arange(0, BLOCKS)
    key = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)  # where one is 1, it is a constant
    counter = number, tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    w0, w1, w2, w3 = triton_common.philox_words(block.to(tl.uint32), *counter, *key)
    at = out + b * 4 * BLOCKS + block * 4
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 11, 2**64 - 1])
def test_the_integers_are_those_of_the_reference(seed: int) -> None:
    sample = torch.tensor([0, 5, 2**32 - 1], device=AT_HAND)
    out = torch.empty(3, 64, dtype=torch.int64, device=AT_HAND)
    low, high = (triton_common.word(x) for x in (seed, seed >> 32))
    words_kernel[(3,)](out, sample, low, high, triton_common.word(2**32 - 2), 3, BLOCKS=16)
    assert torch.equal(out, philox.integers(64, seed=seed, sample=sample, step=2**32 - 2, stream=3))


@pytest.mark.parametrize("n", [1, 5, 1023, 1024, 1025])
def test_normal_numbers(n: int) -> None:
    draw = drawn(2, tensors=True)
    with fastddpm.use_backend("triton"):
        z = normal((2, n), stream=1, **{name: x.to(AT_HAND) for name, x in draw.items()}).cpu()
    assert_normals_within(z, philox.normal((2, n), stream=1, dtype=torch.float64, **draw))


def test_error_of_the_approximate_instructions_is_within_the_bound() -> None:
    """Errors as large as NVIDIA's tables give for lg2, sin and cos.approx, of either sign, keep the bound of noise."""
    words = philox.integers(2**20, seed=1, sample=torch.tensor([0]), step=0, stream=1).double()
    u0, u1 = ((words[0, i::2] * 2.0**-32 + 2.0**-33) for i in (0, 1))
    sign = torch.where(torch.arange(len(u0)) % 2 == 0, 1.0, -1.0).double()
    exact = torch.stack([(-2 * u0.log()).sqrt() * f(2 * torch.pi * u1) for f in (torch.cos, torch.sin)])
    log2 = u0.log2()
    log2 = log2 + sign * torch.where(u0 > 0.5, 2.0**-22, 2.0**-22 * log2.abs())
    radius = (log2 * -2 * torch.log(torch.tensor(2.0))).clamp(min=0).sqrt()
    approximate = torch.stack([radius * (f(2 * torch.pi * u1) + sign * 2.0**-20.5) for f in (torch.cos, torch.sin)])
    assert_normals_within(approximate.float(), exact)


@interpreted
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "group_norm_silu", "rms_norm_silu"])
def test_sizes_around_the_edges(op: str, layout: str) -> None:
    for channels, pixels in ((1, (1, 1023)), (1, (32, 32)), (3, (11, 31)), (5, (7, 3)), (65, (3, 3))):
        case = sized(op, channels, pixels)
        inputs = case.inputs(torch.float32, layout)
        with fastddpm.use_backend("triton"):
            found = results(case, inputs)
        check_values(case, found, inputs, torch.float32)


NORMS = [case for case in CASES if case.op == "group_norm_silu"]


@interpreted
@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_a_norm_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit in one tile is merged from chunks: both passes, forward and backward."""
    for name, value in (("TILE", 16), ("BACKWARD_TILE", 16), ("CHUNK_TILE", 64)):
        monkeypatch.setattr(group_norm, name, value)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(dtype, "NHWC")
        _, _, height, width = inputs["x"].shape
        channels, groups = inputs["weight"].shape[0], inputs["num_groups"]
        cut = group_norm.plan(2, channels, height * width, groups, group_norm.TILE, group_norm.WIDTH)
        assert cut.chunks > 1 or height * width == 1
        with fastddpm.use_backend("triton"):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype)


def test_how_a_norm_is_cut() -> None:
    """One read where a slab fits in registers and the slabs fill the GPU; a batch of one is cut into many programs."""
    for shape in ((128, 128, 1024), (128, 256, 256), (128, 512, 64), (128, 256, 16), (128, 384, 1024), (64, 576, 256)):
        assert group_norm.plan(*shape, 32, group_norm.TILE, group_norm.WIDTH).chunks == 1, shape
    for batch, channels, pixels in ((1, 128, 65_536), (4, 128, 65_536), (1, 128, 4096), (8, 192, 4096)):
        cut = group_norm.plan(batch, channels, pixels, 32, group_norm.TILE, group_norm.WIDTH)
        programs = batch * cut.chunks * triton.cdiv(32, cut.groups)
        assert programs >= group_norm.FULL, (batch, channels, pixels, cut)
        assert cut.pixels * cut.chunks >= pixels


ON_DEVICE = [case for case in CASES if case.op not in ("adam_ema", "conv3x3", "linear", "self_attention")]


@pytest.mark.parametrize("case", ON_DEVICE, ids=lambda case: f"{case.op}-{case.name}")
def test_shapes_and_strides_on_a_fake_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with tensors of a CUDA device that is not there: the outputs are as promised, and nothing is copied."""
    from torch.fx.experimental.proxy_tensor import make_fx

    if triton_common.INTERPRETED:
        # in the module that took it by name: one imported while triton_common is patched would keep the patch
        for module in _implementations(case.op):
            monkeypatch.setattr(module, "reason_against", lambda *_, **__: None)
    inputs = case.inputs(torch.bfloat16, "NHWC")
    with fastddpm.use_backend("reference"):
        real = tree_leaves(fastddpm_op(case)(**inputs))
    with FakeTensorMode() as mode, fastddpm.use_backend("triton"):
        fake = tree_map_only(Tensor, lambda x: _on_cuda(mode, x), inputs)
        traced = make_fx(lambda: tree_leaves(fastddpm_op(case)(**fake)), tracing_mode="fake")()
        outputs = [node.meta["val"] for node in tree_leaves([n.args for n in traced.graph.nodes if n.op == "output"])]
    assert [(x.shape, x.dtype, x.stride()) for x in outputs] == [(x.shape, x.dtype, x.stride()) for x in real]
    assert all(x.device.type == "cuda" for x in outputs)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not any("clone" in name or "contiguous" in name for name in called), called


def fastddpm_op(case: Case) -> Any:
    return getattr(fastddpm, case.op)


def _implementations(op: str) -> list[Any]:
    import importlib

    return [importlib.import_module(f"fastddpm.ops.{op}.triton_impl")]


def _on_cuda(mode: FakeTensorMode, x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


# tiles of pixels by channels, in which NHWC is written


def stepped(channels: int, pixels: tuple[int, int]) -> Case:
    """A step of a sampler with every image that it can read, a learned variance among them."""

    def make(g: torch.Generator) -> Inputs:
        shape, wide = (2, channels, *pixels), (2, 2 * channels, *pixels)
        return dict(
            x=randn(g, *shape), out=randn(g, *wide), out_uncond=randn(g, *wide), guidance_scale=1.5, step=2,
            table=solver_table(g), pred_prev=randn(g, *shape), mask=rand(g, *shape), known=randn(g, *shape),
            known_table=rand(g, 7, 2), **{name: x for name, x in drawn(2).items() if name != "step"},
        )  # fmt: skip

    return Case("solver_step", f"{channels} channels of {pixels[0]}x{pixels[1]}", make)


@interpreted
@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "solver_step"])
def test_tiles_of_channels(op: str) -> None:
    """Channels that fill the lanes or do not, one slab of them or two, and pixels around the edge of a tile."""
    for channels, pixels, lanes in ((2, (4, 129), 2), (3, (1, 260), 4), (4, (16, 16), 4), (17, (2, 34), 16)):
        case = stepped(channels, pixels) if op == "solver_step" else sized(op, channels, pixels)
        inputs = case.inputs(torch.float32, "NHWC")
        written = next(x for x in inputs.values() if isinstance(x, Tensor) and x.dim() == 4)
        assert triton_common.tiling(written, channels)[1]["LANES"] == lanes
        for mixed in (inputs, case.inputs(torch.float32, "NCHW") | {next(iter(inputs)): next(iter(inputs.values()))}):
            with fastddpm.use_backend("triton"):
                found = results(case, mixed)
            check_values(case, found, mixed, torch.float32)


@interpreted
@pytest.mark.parametrize("n", [7, 8, 9, 1023, 1024, 1025])
def test_rows_of_eight(n: int) -> None:
    """In half precision a thread has eight numbers, of two counters: those of float32, rounded."""
    with fastddpm.use_backend("triton"):
        z = normal((2, n), stream=1, **drawn(2))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(normal((2, n), stream=1, dtype=dtype, **drawn(2)), z.to(dtype))


@interpreted
@pytest.mark.parametrize("op", ["q_sample", "solver_step", "diffusion_loss", "group_norm_silu"])
def test_the_interpreter_runs_only_where_it_is_asked_for(op: str) -> None:
    """Where no other implementation can run, a call is not left to what takes a thousand times as long."""
    inputs = next(case for case in CASES if case.op == op).inputs()

    def line() -> str:
        return next(x for x in fastddpm.explain(op_of(op), **inputs).splitlines() if x.startswith("  triton"))

    assert "only where use_backend" in line()
    with fastddpm.use_backend("triton"):
        assert "chosen" in line()


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)], ids=str)
def test_a_mask_is_read_where_it_lies(shape: tuple[int, int], layout: str) -> None:
    """In either order, of each sample and channel or of all: no copy of it is made."""
    case = stepped(3, (4, 5))
    inputs = case.inputs(torch.float32, "NHWC")
    mask = rand(torch.Generator().manual_seed(1), *shape, 4, 5).float().contiguous(memory_format=LAYOUTS[layout])
    inputs["mask"] = mask
    with fastddpm.use_backend("triton"), Recorded() as recorded:
        found = results(case, inputs, op=lambda **named: op_of("solver_step")(**named | dict(mask=mask)))
    check_values(case, found, inputs, torch.float32)
    assert not any(func.overloadpacket is torch.ops.aten.clone and args[0] is mask for func, args, _ in recorded.calls)


@interpreted
@pytest.mark.parametrize("kind", ["expanded", "a column"])
def test_bounds_of_each_sample_lie_anywhere(kind: str) -> None:
    case = stepped(3, (4, 5))
    inputs = case.inputs(torch.float32, "NHWC")
    bounds = torch.tensor([[0.5, 0.1], [0.7, 0.2]])
    inputs["clamp"] = bounds[:1, 0].expand(2) if kind == "expanded" else bounds[:, 0]
    with fastddpm.use_backend("triton"):
        found = results(case, inputs, op=lambda **named: op_of("solver_step")(**named | dict(clamp=inputs["clamp"])))
    check_values(case, found, inputs, torch.float32)


@triton.jit
def erfc_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, diffusion_loss.erfc(tl.load(x + at)))


def step_of(size: int) -> Any:
    """A step over one parameter of this many elements; returns the tables that it left for the next."""
    one = [torch.ones(size, device=AT_HAND) for _ in range(4)]
    with fastddpm.use_backend("triton"):
        fastddpm.adam_ema(*([x] for x in one), step=torch.tensor(0, device=AT_HAND), lr=0.1)
    assert one[0].lt(1).all()
    return list(adam_ema._tables.values())[-1]


def test_few_tables_of_addresses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the sets of parameters stepped last; a set that is stepped again keeps its own."""
    monkeypatch.setattr(adam_ema, "_tables", {})
    first = step_of(1)
    gone = weakref.ref(step_of(2))
    for size in range(3, 3 + adam_ema.KEPT - 1):
        step_of(size)
        assert step_of(1) is first
    gc.collect()
    assert len(adam_ema._tables) == adam_ema.KEPT and gone() is None
    step_of(2)
    assert len(adam_ema._tables) == adam_ema.KEPT and step_of(1) is first


def test_the_tables_that_a_graph_reads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_ema, "_tables", {})
    monkeypatch.setattr(adam_ema, "_of_graphs", set())
    with monkeypatch.context() as patch:
        patch.setattr(adam_ema, "_is_capturing", lambda device: True)
        captured = weakref.ref(step_of(1))
    for size in range(2, 2 + adam_ema.KEPT):
        step_of(size)
    gc.collect()
    assert captured() not in [None, *adam_ema._tables.values()] and len(adam_ema._of_graphs) == 1


@interpreted
def test_erfc() -> None:
    """To a relative 5e-7 where it is a normal number, and right at the ends."""
    x = torch.cat([torch.linspace(-6, 9, 8187), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    y = torch.empty_like(x)
    erfc_kernel[(1,)](x, y, N=8192)
    expected = torch.erfc(x[:-3].double())
    assert ((y[:-3] - expected).abs() <= 5e-7 * expected)[expected > 1e-36].all()
    assert y[-3:-1].tolist() == [0.0, 2.0] and y[-1].isnan()


# what torch.compile sees, in a process without the interpreter: nothing is launched


def check_graphs() -> None:
    """Dynamo and AOTAutograd take each op apart: no graph break, one kernel, and no copy of what it reads or writes."""
    import torch._dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import BackendCompilerFailed
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Says for which GPU kernels are analysed: with it, torch finds out what each writes."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

    class TakenApartError(Exception):
        pass

    triton.runtime.driver.set_active(Driver())
    for op in ELEMENTWISE:
        holder_of(op).implementation("triton").unsupported = lambda **_: None  # type: ignore[attr-defined]
    for case in [case for case in CASES if case.op in ELEMENTWISE and (case.compiled or case.written)]:
        for dynamic in (False, True):
            graphs: list[Any] = []

            def keep(graph: Any, *_: Any, graphs: list[Any] = graphs, **__: Any) -> Any:
                graphs.append(graph)
                raise TakenApartError

            torch._dynamo.reset()
            inputs = case.inputs(torch.bfloat16, "NHWC")
            for name in case.gradients:
                inputs[name].requires_grad_()
            backend = aot_autograd(fw_compiler=keep, partition_fn=keep)
            compiled = torch.compile(op_of(case.op), fullgraph=True, dynamic=dynamic, backend=backend)
            try:
                with fastddpm.use_backend("triton"):
                    compiled(**inputs)
            except (BackendCompilerFailed, TakenApartError):
                assert graphs
            calls = Counter(str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function")
            assert calls["triton_kernel_wrapper_functional"] == 1, (case, calls)
            assert not calls["aten.clone.default"], (case, calls)
            assert not calls["aten.empty.memory_format"], (case, calls)  # Inductor fills these with NaN first


ELEMENTWISE = ("q_sample", "solver_step", "diffusion_loss")


def check_numbers() -> None:
    """In every kernel that torch.compile generates a number equal to 1 is a constant, whatever the kernel asks for, and
    floats come as float64: nothing is computed in that."""
    from tests.ops import aot

    image, table, rows = aot.empty(2, 3, 4, 4), aot.empty(10, 2), aot.rows(2)
    x, of_channel, of_sample = aot.activation((2, 32, 4, 4)), aot.empty(32), aot.empty(2, 32)
    draw, learned = dict(seed=2**32 + 1, sample=rows), aot.empty(2, 6, 4, 4)

    def norm(m: Any, x: Tensor, layer: int = 0) -> None:
        options: dict[str, Any] = dict(step=1, dropout=0.5, activation=True, layer=layer, **aot.NONE, **draw)
        _, _, saved = m.forward(x, of_channel, of_channel, 4, eps=1e-6, **options)
        m.backward(x, None, saved, x, of_channel, of_channel, 4, **options)

    def rms(m: Any) -> None:
        options = dict(scale=of_sample, shift=of_sample, eps=1e-12, activation=True)
        m.forward(x, of_channel, **options)
        m.backward(x, (), x, of_channel, **options)

    loss = dict(
        target=None, objective="eps", table=None, x0=None, index=None, flip=None, pixel_scale=1.0, pixel_shift=0.0,
        step=1, weight=None, vlb=None, vlb_weight=1.0, levels=2, gradient_scale=1.0, **draw,
    )  # fmt: skip
    calls = {
        "normal": [lambda m: m.forward((2, 8), step=1, stream=1, dtype=torch.float32, **draw)],
        "q_sample": [lambda m: m.forward(
            image, rows, table, index=None, flip=None, pixel_scale=1.0, pixel_shift=0.0, noise=None, step=1,
            returns="v", dtype=torch.float32, **draw,
        )],
        "solver_step": [lambda m: m.forward(
            image, image, aot.empty(10, 9), 1, pred_prev=None, out_uncond=image, guidance_scale=1.0, clamp=1.0,
            noise=None, mask=None, known=None, known_table=None, known_noise=None, inplace=False, **draw,
        )],
        "diffusion_loss": [
            lambda m: m.forward(image, rows, **loss),
            lambda m: m.forward(learned, rows, **loss | dict(x0=image, vlb=aot.empty(10, 4))),
        ],
        "group_norm_silu": [lambda m: norm(m, x), lambda m: norm(m, aot.activation((2, 32, 64, 64)))],
        "rms_norm_silu": [rms],
    }  # fmt: skip
    for op, call in [(op, call) for op, of_op in calls.items() for call in of_op]:
        for launch in aot.recorded(op, lambda module, call=call: call(aot.unwrapped(module))):
            for parameter in launch.kernel.params:
                vars(parameter)["do_not_specialize"] = False
            ptx = aot.compiled(launch, 90, floats="fp64").asm["ptx"]
            assert not re.findall(r"(?:add|mul|fma|div|sub)\.(?:rn\.)?f64", ptx), (op, launch.kernel.fn.__name__)


@pytest.mark.timeout(60)  # a process of its own, in which kernels are not interpreted
@pytest.mark.parametrize("check", ["test_triton.check_graphs", "test_triton.check_numbers", "inductor_for_gpu.main"])
def test_what_torch_compile_sees(check: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.ops import {check.partition('.')[0]}; {check}()"],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
