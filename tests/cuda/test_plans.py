"""What the cooperative kernel of group_norm_silu takes of the levels of large images, for each architecture."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda import emulated

pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="needs g++ with AddressSanitizer and UBSan"),
    pytest.mark.timeout(120),  # compiles
]


@dataclass(frozen=True)
class Plan:
    way: str
    slab: int
    parts: int
    pixels: int
    threads: int
    shared: int


@pytest.fixture(scope="session")
def plans() -> Path:
    """The program that prints a plan; see there."""
    return emulated.program(emulated.EMULATION / "plans.cu", "group_norm_silu")


def plan(program: Path, height: int, images: int, *, nhwc: bool = True, wide: bool = False, arch: int = 90) -> Plan:
    """Of 128 channels."""
    arguments = [str(int(x)) for x in (128, height, images, nhwc, wide)]
    environment = os.environ | {"FASTDDPM_EMULATION_ARCH": str(arch)}
    run = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=True)
    way, *numbers = run.stdout.split()
    return Plan(way, *map(int, numbers))


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may take


@pytest.mark.parametrize("arch", SHARED)
def test_levels_of_256_by_256(plans: Path, arch: int) -> None:
    for wide in (False, True):
        for images in (1, 2, 3):  # forward, backward, backward with a residual
            found = plan(plans, 256, images, wide=wide, arch=arch)
            assert found.way == ("two" if arch == 86 else "team"), found  # its cache holds no such image
            assert found.shared <= 1024 * SHARED[arch]
            if found.way == "team":
                assert found.slab * (4 if wide else 2) >= 64 and found.slab % 4 == 0, found
                assert found.parts * found.pixels >= 256 * 256 > (found.parts - 1) * found.pixels


def test_smaller_levels_stay_with_clusters_and_larger_ones_with_two_reads(plans: Path) -> None:
    assert plan(plans, 64, 2).way == plan(plans, 64, 1, wide=True).way == "cluster"
    assert plan(plans, 64, 2, arch=80).way == "team"  # no clusters there
    assert plan(plans, 128, 1).way == plan(plans, 256, 1, nhwc=False).way == "cluster"
    assert plan(plans, 128, 2).way == "team"  # would fit a cluster in runs of 48 bytes
    assert plan(plans, 512, 2).way == "two" and plan(plans, 512, 2, nhwc=False).way == "team"
