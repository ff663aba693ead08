"""The Triton kernels compiled for GPUs that need not be there: registers, spills, width of the memory accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.cases import LAYOUTS

pytest.importorskip("triton", reason="the Triton kernels need Triton")

from tests.ops import configurations

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)

# Threads times registers that leave room for this many programs on a multiprocessor of 65,536 registers.
PROGRAMS = {"group_norm_silu": 1, "rms_norm_silu": 2, "adam_ema": 2, "normal": 8, "q_sample": 8, "solver_step": 8,
            "diffusion_loss": 8}  # fmt: skip

# Of each launch of the hot shapes: accesses of 16 bytes, at least, and narrower ones, at most. Numbers of a sample, a
# channel or a group are narrow, rows of tables too, and what adam_ema does where an address is no multiple of 16;
# uint8 pixels are 8 bytes a thread. Every other access is 16 bytes wide, or 8 for a bfloat16 beside a float32 of the
# same element: one that gets narrower is several.
ACCESSES = {
    "q_sample 128x3x32x32": [(1, 7)],
    "q_sample 8x3x256x256": [(1, 7)],
    "normal 128x3x32x32": [(2, 3)],
    "normal 8x3x256x256": [(2, 3)],
    "solver_step 128x3x32x32": [(6, 11)],
    "solver_step 8x3x256x256": [(6, 11)],
    "diffusion_loss 128x3x32x32": [(2, 5)],
    "diffusion_loss 8x3x256x256": [(2, 5)],
    "group_norm_silu 128x128x32x32": [(21, 3), (29, 9)],
    "group_norm_silu 128x256x16x16": [(21, 3), (17, 7)],
    "group_norm_silu 128x512x8x8": [(16, 6), (17, 7)],
    "group_norm_silu 128x256x4x4": [(8, 9), (6, 9)],
    "group_norm_silu 4x128x256x256": [(5, 3), (10, 3), (13, 6), (13, 10), (17, 6), (17, 10)],
    "rms_norm_silu 128x128x32x32": [(10, 0), (14, 2)],
    "rms_norm_silu 128x512x8x8": [(8, 1), (12, 3)],
    "adam_ema 256x256x3x3": [(2, 13), (19, 112)],
}
# For sm_100 the compiler makes fewer of the kernel that merges 12 bytes of each chunk.
WIDE_OF_SM_100 = {"merge_moments_kernel": 4}

# Bytes of local memory of a thread, by architecture, of those configurations that have any, none of them hot: the
# most of Triton 3.6 and 3.9, in any dtype and layout. Every other has none.
LOCAL = {
    ("solver_step", "in place, two steps", "solver_step_kernel"): {100: 40},
    ("solver_step", "learned variance, guidance, clamps, mask, drawn", "solver_step_kernel"): {80: 8},
    ("diffusion_loss", "hybrid, 17 levels", "diffusion_loss_kernel"): {100: 8},
    ("group_norm_silu", "mean much larger than the deviation", "backward_kernel"): {80: 64, 90: 72, 100: 56},
    ("group_norm_silu", "5 channels of 7x59", "forward_kernel"): {90: 1688},
    ("group_norm_silu", "5 channels of 7x59", "backward_kernel"): {90: 16, 100: 32},
    ("group_norm_silu", "32 channels in 8 groups, 64x64, dropout, conditioned", "merge_sums_kernel"): {90: 8},
    ("group_norm_silu", "45 channels in 9 groups, 61x67, two inputs, residual", "moments_kernel"): {90: 8},
}


def lines_of(module: str, *options: str) -> list[dict[str, Any]]:
    """What a module prints of its binaries, in a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


# the norm of most kernels in a process of its own; each takes seconds to start
HALVES = [["group_norm_silu"], [op for op in PROGRAMS if op != "group_norm_silu"]]


@pytest.mark.timeout(120)  # ptxas
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ops", HALVES, ids=["group_norm_silu", "others"])
def test_hot_kernels(ops: list[str], arch: int) -> None:
    """No local memory, registers for the programs planned, and accesses as wide as they can be."""
    found: dict[str, list[dict[str, Any]]] = {}
    for binary in lines_of("tests.ops.aot", *ops, "--arch", str(arch)):
        found.setdefault(binary["case"], []).append(binary)
    assert set(found) == {case for case in ACCESSES if case.split()[0] in ops}
    for case in found:
        for binary, (wide, narrow) in zip(found[case], ACCESSES[case], strict=True):
            assert binary["local"] == 0, binary
            assert binary["threads"] * binary["registers"] * PROGRAMS[case.split()[0]] <= 65_536, binary
            assert binary["wide"] >= (WIDE_OF_SM_100.get(binary["kernel"], wide) if arch == 100 else wide), binary
            assert binary["narrow"] <= narrow, binary


def test_configurations_are_dealt_out() -> None:
    """Every case to one architecture; each op meets all architectures, dtypes and layouts."""
    hands = {arch: list(configurations.dealt(arch)) for arch in ARCHITECTURES}
    cases = [case for hand in hands.values() for case, _ in hand]
    assert sorted((c.op, c.name) for c in cases) == sorted(
        (c.op, c.name) for op in PROGRAMS for c in configurations.cases_of(op)
    )
    for op in PROGRAMS:
        of_op = [(arch, *way) for arch, hand in hands.items() for case, way in hand if case.op == op]
        assert [len(set(met)) for met in zip(*of_op, strict=True)] == [3, 3, len(LAYOUTS)], op


def check_every_configuration(arch: int, *options: str) -> None:
    found = lines_of("tests.ops.configurations", "--arch", str(arch), *options)
    assert {kernel["op"] for kernel in found} == set(PROGRAMS)
    for kernel in found:
        allowed = LOCAL.get((kernel["op"], kernel["case"], kernel["kernel"]), {})
        assert kernel["local"] <= allowed.get(arch, 0), (arch, kernel)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_configurations(arch: int) -> None:
    """Whatever a contract case launches compiles, and keeps its numbers in registers: each for one architecture."""
    check_every_configuration(arch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_on_every_architecture(arch: int) -> None:
    check_every_configuration(arch, "--all")
