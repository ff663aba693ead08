"""How the CUDA kernels of group_norm_silu are cut: slabs, clusters, teams; on a GPU or, emulated, on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastddpm
from benchmarks import gpu_cases, gpu_suite
from fastddpm import _native
from fastddpm._gpu_defaults import Cut
from tests.ops.cases import AT_HAND, DTYPES, LAYOUTS, OF_A_GPU, Case, Inputs, drawn, norm_weights, randn
from tests.ops.test_contract import check_values, poisoned_memory, results

EMULATED = os.environ.get("FASTDDPM_EMULATED")
LIBRARY = Path(EMULATED or Path(_native.__file__).with_name("_cuda.so"))
pytestmark = [
    *OF_A_GPU,
    pytest.mark.skipif(not EMULATED and AT_HAND == "cpu", reason="runs with FASTDDPM_EMULATED, or on a GPU"),
    pytest.mark.skipif(
        not EMULATED and _native.cuda_reason() is not None, reason=f"no CUDA C++ kernels: {_native.cuda_reason()}"
    ),
]
Plan = Callable[[int, int, int], None]


@pytest.fixture
def plan() -> Iterator[Plan]:
    """Cut into slabs of this many channels and clusters of this many blocks (for teams: parts), where possible."""
    cut = ctypes.CDLL(str(LIBRARY)).fastddpm_group_norm_plan
    yield cut
    cut(0, 0, 0)


def cooperative_launches() -> int | None:
    """So far, of all kernels; only the emulation counts them."""
    return ctypes.c_int.in_dll(ctypes.CDLL(str(LIBRARY)), "emulated_cooperative_launches").value if EMULATED else None


def launched(since: int | None, count: int) -> bool:
    now = cooperative_launches()
    return since is None or now is None or now == since + count


def check(case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    with fastddpm.use_backend("native"), poisoned_memory():
        found = results(case, inputs, dtype)
    check_values(case, found, inputs, dtype)


def call(channels: int, groups: int, size: tuple[int, int], *, batch: int = 2, rich: bool, first: int = 0) -> Case:
    """Plain, or with every option; ``first``: so many channels in x, the rest in x2."""

    def make(g: torch.Generator) -> Inputs:
        of_x = first or channels
        inputs: Inputs = dict(x=3 + randn(g, batch, of_x, *size), num_groups=groups, **norm_weights(g, channels))
        if first:
            inputs["x2"] = 3 + randn(g, batch, channels - first, *size)
        if rich:
            inputs |= dict(
                channel_bias=randn(g, batch, channels), scale=0.3 * randn(g, batch, channels),
                shift=0.3 * randn(g, batch, channels), residual=randn(g, batch, channels, *size), dropout=0.25, layer=2,
                **drawn(batch),
            )  # fmt: skip
        return inputs

    of_all = ("x", "weight", "bias")
    more = ("channel_bias", "scale", "shift", "residual") if rich else ()
    return Case(
        "group_norm_silu", f"{channels} / {groups}, {size}", make, gradients=of_all + more + (("x2",) if first else ())
    )


CALLS = [
    call(64, 16, (8, 8), rich=False),  # a cluster's smallest parts
    call(64, 16, (8, 8), rich=True, first=40),  # a slab of 64 straddles the seam
    call(96, 8, (6, 6), rich=True),  # slabs of 24, 48 and 96; a last part that is shorter
    call(48, 4, (5, 8), rich=False, first=24),  # groups of 12 channels: an access straddles two
    call(40, 5, (8, 8), rich=True),  # slabs of 24 channels, the last of 16
    call(80, 8, (16, 8), rich=True, batch=1),
    call(192, 32, (8, 8), rich=True, batch=1),  # groups of 6 channels: a slab of 64 straddles one
    call(72, 1, (3, 8), rich=True),  # one group
    call(40, 40, (2, 4), rich=False),  # a channel is a group, and there is one part of 8 pixels
    call(32, 4, (1, 1), rich=True),
]


TWO_READS, COOPERATIVE = 1, 2
CUTS = [
    (0, 0, 0), (1, 1, 0), (24, 2, 0), (64, 1, 0), (64, 4, 0), (1000, 8, 0), (16, 16, 0), (0, 0, TWO_READS),
    (0, 0, COOPERATIVE), (16, 2, COOPERATIVE), (24, 3, COOPERATIVE), (16, 5, COOPERATIVE), (1000, 16, COOPERATIVE),
]  # fmt: skip
NAMES = ("slabs{}x{}", "reads{}x{}", "teams{}x{}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: NAMES[cut[2]].format(*cut))
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_slabs_and_clusters(plan: Plan, case: Case, cut: tuple[int, int, int], layout: str) -> None:
    dtype = DTYPES[(CALLS.index(case) + CUTS.index(cut)) % len(DTYPES)]  # so that each cut meets all of them
    inputs = case.inputs(dtype, layout, AT_HAND)
    plan(*cut)
    before = cooperative_launches()
    check(case, inputs, dtype)
    if cut[2] != COOPERATIVE:
        assert launched(before, 0)
    elif layout == "NHWC" or "(1, 1)" in case.name:  # 16-byte accesses suit it
        assert launched(before, 2)  # forward and backward


@pytest.mark.parametrize("channels", sorted({c for n in gpu_cases.NETWORKS.values() for c, _ in n.norms}))
def test_widths_of_the_networks(channels: int) -> None:
    """Those of published U-Nets, which fill no power of two; few pixels, and a group of up to 80 channels."""
    for layout, dtype in zip(LAYOUTS, (torch.bfloat16, torch.float32), strict=True):
        case = call(channels, 32, (2, 4), batch=1, rich=layout == "NCHW")
        check(case, case.inputs(dtype, layout, AT_HAND), dtype)


def test_what_the_sanitizer_watches_on_a_gpu(plan: Plan) -> None:
    """Runs here, too, and takes every way through the kernels of group_norm_silu."""
    cuts = []

    def noted(*cut: int) -> None:
        cuts.append(cut)
        plan(*cut)

    before = cooperative_launches()
    gpu_suite.watched(AT_HAND, noted)
    assert {(0, 1, 0), (0, 4, 0), (0, 0, TWO_READS), (0, 3, COOPERATIVE)} < set(cuts) and cuts[-1] == (0, 0, 0)
    assert launched(before, 4)  # forward and backward, in both orders


@pytest.mark.parametrize(("pixels", "launches"), [(88 * 88, 1), (88 * 88 - 1, 0)])
def test_the_table_says_what_is_for_the_cooperative_kernel(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, pixels: int, launches: int
) -> None:
    """Backward of images of up to so many pixels; forward, and others, go by the estimates."""
    case = call(32, 1, (88, 88), batch=1, rich=False)
    inputs = case.inputs(torch.float32, "NHWC", AT_HAND)
    try:
        with monkeypatch.context() as patch, fastddpm.use_backend("native"):
            patch.setattr(_native, "CUTS", (Cut("backward", (32, 32), (1, pixels), 4, "cooperative"),))
            _native.hand_over_defaults(LIBRARY)
            before = cooperative_launches()
            found = results(case, inputs)
        assert launched(before, launches)
    finally:
        _native.hand_over_defaults(LIBRARY)
    check_values(case, found, inputs, torch.float32)


@pytest.mark.skipif(not os.environ.get("FASTDDPM_EMULATED"), reason="the emulation counts")
def test_what_a_device_has_told_or_been_told_is_kept(plan: Plan) -> None:
    """Of a call in clusters that take more than 48 KB: room for them, and leave to take it; by each thread once."""
    case = call(64, 2, (16, 32), batch=1, rich=False)
    inputs = case.inputs(torch.float32, "NHWC")

    def counted() -> list[int]:
        names = ("emulated_questions", "emulated_cluster_launches")
        return [ctypes.c_int.in_dll(ctypes.CDLL(str(LIBRARY)), name).value for name in names]

    def run() -> list[int]:
        before = counted()
        with fastddpm.use_backend("native"):
            results(case, inputs)
        return [after - number for after, number in zip(counted(), before, strict=True)]

    plan(64, 2, 0)  # 64 KB a block, and twice that in backward
    assert run()[1] == 2
    assert run() == [0, 2]
    plan(0, 0, 0)
    asked, launches = run()
    assert asked > 0 and launches == 2
    assert run() == [0, 2]
