"""The emulation finds the mistakes that it is there to find: in a kernel of its own, and planted in ours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="needs g++ with AddressSanitizer and UBSan"),
    pytest.mark.timeout(120),  # compiles
]
SEEDS = range(1, 9)
RIGHT = sum(range(128))
COOPERATIVE = 12  # the right one of cooperative blocks


@pytest.fixture(scope="session")
def mistakes() -> Path:
    """The program that makes one mistake each time it runs."""
    return emulated.program(emulated.EMULATION / "mistakes.cu")


def run(program: Path, number: int, seed: int) -> subprocess.CompletedProcess[str]:
    environment = {"FASTDDPM_EMULATION_SEED": str(seed)}
    return subprocess.run([str(program), str(number)], capture_output=True, text=True, env=environment)


def test_the_right_kernel_is_right_in_every_order(mistakes: Path) -> None:
    for seed in SEEDS:
        for number in (0, COOPERATIVE):
            result = run(mistakes, number, seed)
            assert (result.returncode, result.stdout) == (0, f"{RIGHT}\n"), result.stderr


MISTAKES = {
    1: ("a missing barrier of the block", "nan|-nan|wrong"),
    2: ("a missing barrier of the cluster", "nan|-nan|wrong"),
    3: ("a block that ends too early", "has ended|heap-use-after-free"),
    4: ("a copy that is not waited for", "nan|-nan|wrong"),
    5: ("a barrier that some do not reach", "deadlock"),
    6: ("a shuffle that a lane does not reach", "deadlock"),
    7: ("a read behind an array", "heap-buffer-overflow"),
    8: ("a write behind the shared memory", "heap-buffer-overflow"),
    9: ("shared memory that nobody has written", "nan|-nan"),
    10: ("16 bytes from an odd address", "not a multiple of it"),
    11: ("more shared memory than there is", "cannot launch"),
    13: ("blocks of a cooperative launch that do not meet", "nan|-nan|wrong"),
    14: ("a meeting that a block does not come to", "deadlock"),
    15: ("more blocks at once than there is room for", "cannot launch"),
    16: ("a kernel that may start early and does not wait", "ends and does not wait for the one before it"),
    17: ("a kernel that copies before it waits", "copies and does not wait for the one before it"),
    18: ("an arrival at the barrier of the cluster before the last read", "has ended|heap-use-after-free"),
    19: ("a wait at the barrier of the cluster without an arrival", "has not arrived there"),
    20: ("two arrivals without a wait", "has not waited there"),
    21: ("an end behind an arrival", "ends without waiting"),
}


def test_a_launch_that_nobody_checks_does_not_compile(tmp_path: Path) -> None:
    """Of an error that is forgotten the compiler complains; no kernel is launched in another way."""
    source = tmp_path / "unchecked.cu"
    source.write_text(
        '#include "common/cuda/platform.cuh"\n'
        "__global__ void kernel() {}\n"
        "void unchecked() { fastddpm::cuda::launch(kernel, {}); }\n",
        encoding="utf-8",
    )
    with pytest.raises(RuntimeError, match="unused-result"):
        emulated.program(source)
    kernels = "".join(path.read_text(encoding="utf-8") for path in (emulated.ROOT / "csrc").glob("**/*.cu*"))
    assert re.findall(r"<<<|cudaLaunch\w*Kernel\w*", kernels) == ["cudaLaunchKernelEx"]


@pytest.mark.parametrize("number", MISTAKES, ids=lambda number: MISTAKES[number][0])
def test_mistakes_are_found(mistakes: Path, number: int) -> None:
    """In one order of the threads or another."""
    wanted = MISTAKES[number][1].split("|")
    found = []
    for seed in SEEDS:
        result = run(mistakes, number, seed)
        output = result.stdout + result.stderr
        if "wrong" in wanted and result.returncode == 0 and result.stdout != f"{RIGHT}\n":
            output += "wrong"
        found.append(any(text in output for text in wanted))
    assert any(found), output
    if number not in (1, 2, 3, 13, 18):  # what does not depend on the order is found in every one
        assert all(found), output
