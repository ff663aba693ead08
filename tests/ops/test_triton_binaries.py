"""The Triton kernels compiled for GPUs that need not be there: registers, spills, width of the memory accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.cases import QUICK

pytest.importorskip("triton", reason="the Triton kernels need Triton")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)

# Threads times registers that leave room for this many programs on a multiprocessor of 65,536 registers.
PROGRAMS = {"group_norm_silu": 1, "rms_norm_silu": 2, "adam_ema": 2, "normal": 8, "q_sample": 8, "solver_step": 8,
            "diffusion_loss": 8}  # fmt: skip

# The narrow accesses of a kernel: numbers of a sample, a channel or a group, and rows of tables; uint8 pixels are 8
# bytes a thread. Every other access is 16 bytes wide, or 8 for a bfloat16 beside a float32 of the same element.
NARROW = {
    "q_sample_kernel": 7, "normal_kernel": 4, "solver_step_kernel": 14, "diffusion_loss_kernel": 10,
    "moments_kernel": 4, "merge_moments_kernel": 4, "merge_sums_kernel": 6, "forward_kernel": 9, "backward_kernel": 16,
    "gradient_squares_kernel": 16, "adam_ema_kernel": 128,
}  # fmt: skip


def compiled(ops: list[str], arch: int) -> list[dict[str, object]]:
    """The binaries of the ops' hot shapes, from a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.aot", *ops, "--arch", str(arch)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.timeout(60)  # ptxas; a process of its own
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ops", [QUICK, *([op] for op in PROGRAMS if op not in QUICK)], ids=" and ".join)
def test_hot_kernels(ops: list[str], arch: int) -> None:
    """No local memory, registers for the programs planned, and narrow accesses where they must be."""
    found = compiled(ops, arch)
    assert {str(binary["case"]).split()[0] for binary in found} == set(ops)
    for binary in found:
        name = f"{binary['case']}: {binary['kernel']}, sm_{arch}: {binary}"
        assert int(binary["local"]) == 0, name
        programs = PROGRAMS[str(binary["case"]).split()[0]]
        assert int(binary["threads"]) * int(binary["registers"]) * programs <= 65_536, name
        assert int(binary["wide"]) >= 1, name
        assert int(binary["narrow"]) <= NARROW[str(binary["kernel"])], name
