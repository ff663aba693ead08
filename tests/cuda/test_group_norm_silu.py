"""How the CUDA kernels of group_norm_silu are cut: slabs, clusters, both orders; run on a CPU (see emulation)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import fastddpm
from tests.ops.cases import DTYPES, LAYOUTS, Case, Inputs, drawn, norm_weights, randn
from tests.ops.test_contract import check_values, results

pytestmark = pytest.mark.skipif(not os.environ.get("FASTDDPM_EMULATED"), reason="runs with FASTDDPM_EMULATED alone")

Plan = Callable[[int, int], None]


@pytest.fixture
def plan() -> Iterator[Plan]:
    """Cut into slabs of this many channels and clusters of this many blocks, where that is possible."""
    cut = ctypes.CDLL(os.environ["FASTDDPM_EMULATED"]).fastddpm_group_norm_plan
    yield cut
    cut(0, 0)


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
    call(72, 1, (3, 8), rich=True),  # one group
    call(40, 40, (2, 4), rich=False),  # a channel is a group, and there is one part of 8 pixels
    call(32, 4, (1, 1), rich=True),
]


CUTS = [(0, 0), (1, 1), (24, 2), (64, 1), (64, 4), (1000, 8), (16, 16)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"slabs{cut[0]}x{cut[1]}")
@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_slabs_and_clusters(plan: Plan, case: Case, cut: tuple[int, int], layout: str) -> None:
    dtype = DTYPES[(CALLS.index(case) + CUTS.index(cut)) % len(DTYPES)]  # so that each cut meets all of them
    inputs = case.inputs(dtype, layout)
    plan(*cut)
    with fastddpm.use_backend("native"):
        found = results(case, inputs, dtype)
    check_values(case, found, inputs, dtype)
