"""How group_norm_silu is cut at the shapes of the U-Nets, for each architecture, as shipped and by a table."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.gpu_cases import NETWORKS
from fastddpm._gpu_defaults import CUTS, RECORD, Cut
from tests.cuda import emulated

pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="needs g++ with AddressSanitizer and UBSan"),
    pytest.mark.timeout(120),  # compiles
]


@dataclass(frozen=True)
class Call:
    channels: int
    height: int
    batch: int = 8
    backward: bool = False
    residual: bool = False
    nhwc: bool = True
    wide: bool = False  # float32, not bfloat16

    @property
    def images(self) -> int:
        return 1 + self.backward + self.residual


@dataclass(frozen=True)
class Plan:
    way: str
    slab: int
    parts: int
    pixels: int
    threads: int
    shared: int


Planned = Callable[..., list[Plan]]


@pytest.fixture(scope="session")
def planned() -> Planned:
    """The plans of calls, as the kernels make them; see plans.cu."""
    program = emulated.program(emulated.EMULATION / "plans.cu", "group_norm_silu")

    def run(calls: list[Call], cuts: tuple[Cut, ...] = CUTS, **environment: str) -> list[Plan]:
        numbers = [str(n) for cut in cuts for n in cut.numbers()]
        lines = (
            " ".join(str(int(n)) for n in (c.channels, c.height, c.batch, c.backward, c.residual, c.nhwc, c.wide))
            for c in calls
        )
        result = subprocess.run(
            [program, *numbers], input="\n".join(lines), capture_output=True, text=True, env=os.environ | environment
        )
        assert result.returncode == 0, result.stderr
        return [Plan(way, *map(int, rest)) for way, *rest in map(str.split, result.stdout.splitlines())]

    return run


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may take
LEVELS = [(c, h, network.batch) for network in NETWORKS.values() for c, h in network.norms]
CALLS = [
    Call(c, h, batch, backward, residual, nhwc, wide)
    for c, h, batch in LEVELS
    for backward in (False, True)
    for residual in (False, True)
    for nhwc in (False, True)
    for wide in (False, True)
]


@pytest.mark.parametrize("arch", SHARED)
def test_every_level_of_the_networks_as_shipped(planned: Planned, arch: int) -> None:
    """No cluster moves short runs of memory: a slab has 128 bytes side by side, or all of its image."""
    for call, plan in zip(CALLS, planned(CALLS, FASTDDPM_EMULATION_ARCH=str(arch)), strict=True):
        assert plan.shared <= 1024 * SHARED[arch], (call, plan)
        assert plan.parts * plan.pixels >= call.height**2 > (plan.parts - 1) * plan.pixels, (call, plan)
        if plan.way != "cluster":
            continue
        assert plan.parts <= (8 if arch >= 90 else 1), (call, plan)
        assert plan.slab % (call.channels // 32) == 0, (call, plan)  # whole groups
        size, of_image = 4 if call.wide else 2, plan.slab >= call.channels
        run = plan.slab if call.nhwc else plan.pixels
        assert run * size >= 128 or of_image or (not call.nhwc and plan.parts == 1), (call, plan)


# Of NHWC in bfloat16 on sm_90 (channels, height, backward): what fits no cluster with 64 channels to a slab.
TWO_READS = {(c, 256, d) for c in (128, 256) for d in (False, True)}
TWO_READS |= {(c, 128, d) for c in (128, 256, 384) for d in (False, True)} | {(960, 64, True)}


def test_one_read_wherever_64_channels_fit(planned: Planned) -> None:
    calls = [Call(c, h, batch, backward) for c, h, batch in LEVELS for backward in (False, True)]
    for call, plan in zip(calls, planned(calls), strict=True):
        two = (call.channels, call.height, call.backward) in TWO_READS
        assert plan.way == ("two" if two else "cluster"), (call, plan)
        assert two or plan.slab >= 64, (call, plan)


BY_HAND = {  # slab and cluster
    Call(256, 32, 128): (64, 2), Call(256, 32, 128, True): (64, 4), Call(384, 32, 128): (96, 2),
    Call(384, 32, 128, True): (96, 4), Call(256, 16, 128, True): (64, 1), Call(192, 64, 64): (96, 8),
    Call(192, 64, 64, True): (96, 8), Call(384, 32, 64): (96, 2), Call(576, 16, 64): (72, 1),
    Call(576, 16, 64, True): (72, 1), Call(320, 64, 16): (80, 8), Call(320, 64, 16, True): (80, 8),
    Call(640, 32, 16): (80, 2), Call(640, 32, 16, True): (80, 4), Call(128, 64): (64, 8),
    Call(256, 64, 8, True): (64, 8),
}  # fmt: skip


def test_slabs_and_clusters_by_estimate(planned: Planned) -> None:
    """Those that were worked out by hand for an H100, clusters of up to 8."""
    found = {call: (plan.slab, plan.parts) for call, plan in zip(BY_HAND, planned(list(BY_HAND), ()), strict=True)}
    assert found == BY_HAND


def everywhere(way: str, size: int, **more: int) -> tuple[Cut, ...]:
    return tuple(Cut(d, (1, 4096), (1, 1 << 24), size, way, **more) for d in ("forward", "backward"))


TEAMS = everywhere("cooperative", 2) + everywhere("cooperative", 4)


@pytest.mark.parametrize("arch", SHARED)
def test_teams_at_levels_of_256_by_256(planned: Planned, arch: int) -> None:
    """The cooperative kernel, where a table of measurements says so, by what the cache holds."""
    calls = [Call(128, 256, 8, d, d and r, True, wide) for wide in (False, True) for d in (False, True) for r in (0, 1)]
    for call, plan in zip(calls, planned(calls, TEAMS, FASTDDPM_EMULATION_ARCH=str(arch)), strict=True):
        assert plan.way == ("two" if arch == 86 else "team"), plan  # its cache holds no such image
        assert plan.shared <= 1024 * SHARED[arch]
        if plan.way == "team":
            assert plan.slab * (4 if call.wide else 2) >= 64 and plan.slab % 4 == 0, plan
            assert plan.parts * plan.pixels >= 256 * 256 > (plan.parts - 1) * plan.pixels


def test_the_table_in_the_code_was_measured() -> None:
    assert not CUTS or RECORD is not None
    assert all(cut.numbers() and cut.channels[0] <= cut.channels[1] and cut.pixels[0] <= cut.pixels[1] for cut in CUTS)


def test_the_table_decides_what_it_fits(planned: Planned) -> None:
    """The first row of that pass, channels, pixels and size; the estimates where there is none, or it cannot be."""
    small, large = Call(256, 32, 128), Call(128, 256)
    row = Cut("forward", (256, 256), (1024, 1024), 2, "cluster", slab=128, parts=8)
    assert planned([small], (row,))[0] == planned([small], (row, *everywhere("two reads", 2)))[0]
    assert [(p.slab, p.parts) for p in planned([small], (row,))] == [(128, 8)]
    for other in (Call(256, 32, 128, True), Call(256, 16, 128), Call(128, 32, 128), Call(256, 32, 128, wide=True)):
        assert planned([other], (row,)) == planned([other], ())
    assert planned([small], everywhere("two reads", 2))[0].way == "two"
    for impossible in (everywhere("cluster", 2, slab=128), everywhere("cluster", 2, parts=2)):
        assert planned([large], impossible) == planned([large], ())
    assert [p.parts for p in planned([small], everywhere("cluster", 2, parts=16))] == [16]
    assert planned([small], everywhere("cluster", 2, parts=8), FASTDDPM_EMULATION_ARCH="80") == planned(
        [small], (), FASTDDPM_EMULATION_ARCH="80"
    )


def test_clusters_that_the_device_has_no_room_for(planned: Planned) -> None:
    """A slice of a GPU: smaller ones, or two reads."""
    calls = [Call(c, h, batch, True) for c, h, batch in LEVELS]
    whole, slices = planned(calls, ()), planned(calls, (), FASTDDPM_EMULATION_CLUSTER="2")
    assert max(plan.parts for plan in whole if plan.way == "cluster") == 8
    assert max(plan.parts for plan in slices if plan.way == "cluster") == 2
    assert all(a == b for a, b in zip(whole, slices, strict=True) if a.way == "two" or a.parts <= 2)
    assert planned([calls[0]], everywhere("cluster", 2, parts=8), FASTDDPM_EMULATION_CLUSTER="4")[0].parts != 8
