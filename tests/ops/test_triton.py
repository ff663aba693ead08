"""The Triton kernels without a GPU: their noise, sizes around a block, both ways to cut a norm, shapes on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastddpm
from fastddpm.ops import normal, philox
from tests.ops.cases import CASES, Case, drawn
from tests.ops.test_contract import check_values, results
from tests.ops.test_native import sized
from tests.tolerance import assert_normals_within

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton")
tl = triton.language

from fastddpm.ops import triton_common  # noqa: E402
from fastddpm.ops.group_norm_silu import triton_impl as group_norm  # noqa: E402

interpreted = pytest.mark.skipif(not triton_common.INTERPRETED, reason="runs in Triton's interpreter")
DEVICE = "cpu" if triton_common.INTERPRETED else "cuda"


@triton.jit
def words_kernel(out, sample, seed_low, seed_high, step, stream, BLOCKS: tl.constexpr):
    b = tl.program_id(0)
    number = (tl.load(sample + b) & 0xFFFFFFFF).to(tl.uint32)
    block = tl.arange(0, BLOCKS)
    key = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    counter = number, step.to(tl.uint32), stream.to(tl.uint32)
    w0, w1, w2, w3 = triton_common.philox_words(block.to(tl.uint32), *counter, *key)
    at = out + b * 4 * BLOCKS + block * 4
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 11, 2**64 - 1])
def test_the_integers_are_those_of_the_reference(seed: int) -> None:
    sample = torch.tensor([0, 5, 2**32 - 1], device=DEVICE)
    out = torch.empty(3, 64, dtype=torch.int64, device=DEVICE)
    low, high = (triton_common.word(x) for x in (seed, seed >> 32))
    words_kernel[(3,)](out, sample, low, high, triton_common.word(2**32 - 2), 3, BLOCKS=16)
    assert torch.equal(out, philox.integers(64, seed=seed, sample=sample, step=2**32 - 2, stream=3))


@pytest.mark.parametrize("n", [1, 5, 1023, 1024, 1025])
def test_normal_numbers(n: int) -> None:
    draw = drawn(2, tensors=True)
    with fastddpm.use_backend("triton"):
        z = normal((2, n), stream=1, **{name: x.to(DEVICE) for name, x in draw.items()}).cpu()
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


ON_DEVICE = [case for case in CASES if case.op != "adam_ema"]


@pytest.mark.parametrize("case", ON_DEVICE, ids=lambda case: f"{case.op}-{case.name}")
def test_shapes_and_strides_on_a_fake_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with tensors of a CUDA device that is not there: the outputs are as promised, and nothing is copied."""
    from torch.fx.experimental.proxy_tensor import make_fx

    if triton_common.INTERPRETED:
        monkeypatch.setattr(triton_common, "reason_against", lambda *_, **__: None)
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
