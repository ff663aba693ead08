"""The CUDA kernels on a CPU: the contract of every op, random calls, and mistakes planted in their source.

Each runs in a process of its own, with the sanitizers; `tests.cuda.emulated` says how. But where a test says otherwise,
the approximate instructions err by as much as NVIDIA allows them to.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda import emulated
from tests.ops.cases import QUICK
from tests.ops.test_native import SETS
from tests.ops.test_random_cases import NATIVE, PART

pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="needs g++ with AddressSanitizer and UBSan"),
    pytest.mark.timeout(600),  # compiles and runs many tests
]
OPS = emulated.ops()
ERRORS = {"FASTDDPM_EMULATION_ERRORS": "1"}
Passed = Callable[..., int]
CONTRACT = "values or mixed or two_runs or new_tensors or other_strides or test_empty"
ONE_SET = SETS[0] if SETS else "none"  # of the instructions for a CPU, of which none run
NORMAL = f"{ONE_SET} and (normal_numbers or integers)"  # not an op of the contract tests


@pytest.fixture(scope="session")
def library() -> Path:
    return emulated.library()


@pytest.fixture
def passed(record_property: Callable[[str, object], None]) -> Passed:
    """Run tests with a library; they all pass. Returns how many they were, which a report has, too."""

    def run(path: Path, *arguments: str, **environment: str) -> int:
        result = emulated.pytest(path, *arguments, **{**ERRORS, **environment})
        assert result.returncode == 0, result.stdout[-6000:]
        count = re.search(r"(\d+) passed", result.stdout)
        assert count is not None, result.stdout
        record_property("emulated tests", count.group(1))
        return int(count.group(1))

    return run


def contract(ops: list[str], of: str = CONTRACT) -> list[str]:
    native = " or ".join(f"{op}-native" for op in ops)
    return ["tests/ops/test_contract.py", "tests/ops/test_native.py", "-k", f"({native}) and ({of})"]


@pytest.mark.parametrize("ops", [QUICK, *([op] for op in OPS if op not in QUICK)], ids=" and ".join)
def test_contract(passed: Passed, library: Path, ops: list[str]) -> None:
    *files, cases = contract(ops)
    assert passed(library, *files, f"{cases} or {NORMAL}" if "normal" in ops else cases) > 10 * len(ops)


def test_vectors_chunks_and_tables(passed: Passed, library: Path) -> None:
    """What the cases of the contract are too small for, or too few."""
    adam = f"{ONE_SET} and (more_tensors or around_a_chunk or beyond)"
    pictures = "cpu- and (pictures_from or velocity or losses and eps-) and (float32-NHWC or bfloat16-NCHW)"
    files = ("tests/ops/test_native_rms_adam.py", "tests/ops/test_native_pictures.py")
    assert passed(library, *files, "-k", f"{adam} or {pictures}", "--timeout=0") == 2 + 4 + 15 + 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_adam", "pictures"])
def test_every_vector_chunk_and_table(passed: Passed, library: Path, name: str) -> None:
    one = ONE_SET if name == "rms_adam" else "cpu-"  # there each test runs with one
    passed(library, f"tests/ops/test_native_{name}.py", "-k", f"{one} and not threads", "--timeout=0")


@pytest.mark.slow
def test_values_without_errors_of_the_instructions(passed: Passed, library: Path) -> None:
    *files, cases = contract(OPS, "values")
    passed(library, *files, f"{cases} or {NORMAL}", "--timeout=0", FASTDDPM_EMULATION_ERRORS="0")


def test_errors_a_hundred_times_as_large_are_found(library: Path) -> None:
    """Those of the normal numbers, and of what a norm makes of its sums."""
    cases = "(q_sample-native-one or rms_norm_silu-native-plain) and values and float32"
    environment = {"FASTDDPM_EMULATION_ERRORS": "100"}
    result = emulated.pytest(library, "tests/ops/test_contract.py", "-k", cases, "--tb=short", **environment)
    failed = re.findall(r"^FAILED .*\[(\w+)-native", result.stdout, re.M)
    assert set(failed) == {"q_sample", "rms_norm_silu"}, result.stdout[-6000:]
    assert "normal numbers is" in result.stdout and " of the error is " in result.stdout


CUT = {
    "group_norm_silu": "(slabs64x4 or teams16x5 and 96) and NHWC or for_the_coop or is_kept or "
    "widths and (192 or 576 or 1152)",
    "rms_norm_silu": "2x8x or 1x24x or 1x192x or 2x33x or 5x1x",
}


@pytest.mark.parametrize("op", CUT)
def test_how_the_kernels_are_cut(passed: Passed, library: Path, op: str) -> None:
    assert passed(library, f"tests/cuda/test_{op}.py", "-k", CUT[op], "--timeout=120") > 8


@pytest.mark.slow
@pytest.mark.parametrize("op", CUT)
def test_every_way_the_kernels_are_cut(passed: Passed, library: Path, op: str) -> None:
    passed(library, f"tests/cuda/test_{op}.py", "--timeout=0")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "seed"), [("80", "2"), ("89", "3"), ("90", "4"), ("100", "5"), ("120", "6")])
def test_contract_on_other_devices(passed: Passed, library: Path, architecture: str, seed: str) -> None:
    """What they can do differs: clusters, shared memory; the threads run in another order."""
    environment = {"FASTDDPM_EMULATION_ARCH": architecture, "FASTDDPM_EMULATION_SEED": seed}
    passed(library, "tests/ops/test_contract.py", "-k", f"native and ({CONTRACT})", "--timeout=0", **environment)


COOPERATIVE = {"FASTDDPM_EMULATED_PLAN": "0,3,2"}  # in three parts, wherever it is possible


def test_contract_of_the_cooperative_kernel(passed: Passed, library: Path) -> None:
    """Of what a plan would leave to it for its size alone; here at every size, without clusters."""
    cases = "group_norm_silu-native and (values_and_gradients and NHWC and bfloat16 or test_empty)"
    environment = COOPERATIVE | {"FASTDDPM_EMULATION_ARCH": "80"}
    assert passed(library, "tests/ops/test_contract.py", "-k", cases, **environment) > 12


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "random_calls"), [("80", 300), ("89", 100), ("90", 100)])
def test_every_contract_and_random_call_of_the_cooperative_kernel(
    passed: Passed, library: Path, architecture: str, random_calls: int
) -> None:
    environment = COOPERATIVE | {"FASTDDPM_EMULATION_ARCH": architecture, "FASTDDPM_EMULATION_SEED": architecture}
    contract = ["tests/ops/test_contract.py", "-k", f"group_norm_silu-native and ({CONTRACT})", "--timeout=0"]
    passed(library, *contract, **environment)
    environment["FASTDDPM_RANDOM_OPS"] = "group_norm_silu"
    passed(library, *random_tests(0, random_calls), "--timeout=0", **environment)


@pytest.mark.slow
def test_offsets_have_64_bits() -> None:
    """Elements that lie more than 2^32 apart are found."""
    far = emulated.program(emulated.EMULATION / "far.cu", "group_norm_silu", "q_sample", "solver_step")
    run = subprocess.run([far], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == 30, run.stderr
    assert [line for line in lines if not line.endswith(": same")] == []


def random_tests(first: int, end: int, step: int = PART) -> list[str]:
    return [f"tests/ops/test_random_cases.py::test_native[{n}]" for n in range(first, end, step)]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NATIVE // 2, 5 * PART))
def test_many_random_calls(passed: Passed, library: Path, first: int) -> None:
    """Of each op as many as meet every pair of its options several times."""
    tests = random_tests(first, first + 5 * PART)
    assert passed(library, *tests, "--timeout=0", FASTDDPM_RANDOM_OPS=" ".join(OPS)) == 5


@dataclass(frozen=True)
class Plant:
    """A mistake in the source of an op, and what finds it."""

    file: str
    right: str
    wrong: str
    op: str
    test: list[str]
    found: str  # by a regular expression


WRONG = r"of the error is (\d\.\d+e[+-]\d+|nan), allowed"
WRONG_NORMALS = "of (two|the difference of) normal numbers is"
TEAMS = ["tests/cuda/test_group_norm_silu.py", "-k", "teams16x5 and NHWC and 96"]
ADAM = ["tests/ops/test_contract.py", "-k", "adam_ema-native and values"]
PLANTED = {
    "missing barrier": Plant(  # in what compiles in two seconds
        "adam_ema/adam_ema_cuda.cu",
        "    __syncthreads();\n    if (threadIdx.x == 0)\n        for (int i = 1; i < WARPS",
        "    if (threadIdx.x == 0)\n        for (int i = 1; i < WARPS",
        "adam_ema",
        ADAM,
        WRONG,
    ),
    "read out of bounds": Plant(
        "adam_ema/adam_ema_cuda.cu",
        "const int64_t end = begin + (left < PIECE ? left : PIECE);",
        "const int64_t end = begin + PIECE;",
        "adam_ema",
        ADAM,
        r"AddressSanitizer: heap-buffer-overflow(.*\n)+?READ (.*\n)+?.* in .*update_one.*adam_ema_cuda\.cu",
    ),
    "missing barrier of a slab": Plant(
        "group_norm_silu/group_norm_silu_forward_cuda.cu",
        "    __syncthreads();\n    centre_channels(part",
        "    centre_channels(part",
        "group_norm_silu",
        ["tests/cuda/test_group_norm_silu.py", "-k", "slabs64x4 and NHWC"],
        WRONG,
    ),
    "missing barrier of the cluster": Plant(
        "group_norm_silu/group_norm_silu_forward_cuda.cu",
        "    if (plan.parts > 1) cluster_sync();\n    else __syncthreads();\n",
        "    __syncthreads();\n",
        "group_norm_silu",
        ["tests/cuda/test_group_norm_silu.py", "-k", "slabs64x4 and NHWC"],
        WRONG,
    ),
    "missing meeting of a team": Plant(
        "group_norm_silu/group_norm_silu_cuda.cuh",
        "        meet_team();\n        const Part any",
        "        __syncthreads();\n        const Part any",
        "group_norm_silu",
        TEAMS,
        WRONG,
    ),
    "counters that are not set to 0": Plant(
        "group_norm_silu/group_norm_silu_cuda.cuh",
        "    error = cudaMemsetAsync(a.counters, 0, ",
        "    error = cudaMemsetAsync(a.counters, 0, 0 * ",
        "group_norm_silu",
        TEAMS,
        "CUDA emulation: deadlock",
    ),
    "read of a tile out of bounds": Plant(
        "common/cuda/tile.cuh",
        "x[i] = has(i) ? read(",
        "x[i] = true ? read(",
        "solver_step",
        ["tests/ops/test_contract.py", "-k", "solver_step-native and values"],
        r"AddressSanitizer: heap-buffer-overflow(.*\n)+?READ (.*\n)+?.* in .*AnyTile::load.*tile\.cuh",
    ),
    "wrong tail": Plant(
        "common/cuda/tile.cuh",
        "return first + i < elements;",
        "return first + i + 1 < elements;",
        "normal",
        ["tests/ops/test_native.py", "-k", NORMAL],
        WRONG_NORMALS,
    ),
}


QUICKLY_FOUND = ("missing barrier", "read out of bounds", "wrong tail")


def needed(plant: Plant) -> list[str]:
    """The op, and the normal numbers that it is held against."""
    return sorted({plant.op, "normal"})


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICKLY_FOUND else [pytest.mark.slow]) for n in PLANTED]
)
def test_a_planted_mistake_is_found(name: str, tmp_path: Path) -> None:
    """By tests that the right kernels pass: they are among those above."""
    plant = PLANTED[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", csrc)
    source = (csrc / plant.file).read_text(encoding="utf-8")
    assert source.count(plant.right) == 1, f"{plant.file} has {plant.right!r} {source.count(plant.right)} times"
    (csrc / plant.file).write_text(source.replace(plant.right, plant.wrong), encoding="utf-8")
    result = emulated.pytest(emulated.library(needed(plant), csrc), *plant.test)
    assert result.returncode != 0 and re.search(plant.found, result.stdout), result.stdout[-6000:]
    if plant.found in (WRONG, WRONG_NORMALS):
        failed = re.findall(r"^FAILED ([\w/.]+)::", result.stdout, re.M)
        assert set(failed) == {plant.test[0]}, result.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_where_none_is_planted_nothing_is_found(passed: Passed, name: str) -> None:
    """By the same tests, of a library of the same ops."""
    plant = PLANTED[name]
    assert passed(emulated.library(needed(plant)), *plant.test) > 0
