"""How the CUDA C++ kernels are built, packaged and loaded; none of it needs a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm import _native, cli
from tests.test_package import python

ROOT = Path(__file__).parents[2]
LIBRARY = Path(_native.__file__).with_name("_cuda.so")

KERNEL = """
#include <cuda_runtime_api.h>
__global__ void tiny_kernel(float* x) { x[threadIdx.x] = 1; }
void tiny(float* x, cudaStream_t stream) { tiny_kernel<<<1, 32, 0, stream>>>(x); }
"""
HOST = """
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>
void tiny(float* x, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) void run(float* x) { tiny(x, nullptr); }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package whose native code compiles in seconds: an empty module, and one kernel."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    files = {"README.md": "", "fastddpm/__init__.py": "", "csrc/module.cpp": ""}
    files |= {"csrc/tiny/tiny_cuda.cu": KERNEL, "csrc/tiny/tiny_cuda.cpp": HOST}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def build(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = {"FASTDDPM_REQUIRE_CUDA": "0", "FASTDDPM_REQUIRE_NATIVE": "0", "FASTDDPM_CUDA_ARCHS": "90"}
    return python("setup.py", *(command or ("build_ext", "--inplace")), cwd=checkout, **unset | environment)


def record(checkout: Path) -> dict[str, Any]:
    """What the package says about its CUDA kernels."""
    told: dict[str, Any] = json.loads((checkout / "fastddpm" / "_cuda_build.json").read_text(encoding="utf-8"))
    return told


def fake_toolkit(home: Path, script: str) -> str:
    """A toolkit whose nvcc is this script, to be CUDA_HOME."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    nvcc.chmod(0o755)
    return str(home)


# --- a build, by itself


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("archs", "built"),
    [
        ("9.0;8.0", ["sm_80", "sm_90", "compute_90"]),
        pytest.param("90", ["sm_90", "compute_90"], marks=pytest.mark.slow),  # each is a build
        pytest.param("80,100", ["sm_80", "sm_100", "compute_100"], marks=pytest.mark.slow),
    ],
)
def test_a_wheel_has_the_kernels_for_the_architectures_asked_for(checkout: Path, archs: str, built: list[str]) -> None:
    run = build(checkout, "bdist_wheel", FASTDDPM_CUDA_ARCHS=archs)
    assert run.returncode == 0, run.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert json.loads(files.read("fastddpm/_cuda_build.json"))["architectures"] == built
        library = files.read("fastddpm/_cuda.so")
    for name in (b"libtorch_cuda.so", b"libtorch_cpu.so"):  # whose symbols it is to find
        assert name in library
    assert b"libcudart.so" not in library  # it has a runtime of its own


@pytest.mark.nvcc
@pytest.mark.timeout(300)  # where sources have changed since, it compiles them
@pytest.mark.skipif(not any(ROOT.glob("build/temp.*/_cuda/*/*.o")), reason="was not installed from this checkout")
def test_the_wheel_of_this_checkout(tmp_path: Path) -> None:
    """Has both libraries, of the objects that the installation has left."""
    archs = [name.removeprefix("sm_") for name in _native.build_info()["cuda"]["architectures"][:-1]]
    commands = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-lib", str(tmp_path / "lib")]
    commands += ["bdist_wheel", "--bdist-dir", str(tmp_path / "wheel"), "--dist-dir", str(tmp_path)]
    required = {"FASTDDPM_REQUIRE_NATIVE": "1", "FASTDDPM_REQUIRE_CUDA": "1"}
    run = build(ROOT, *commands, FASTDDPM_CUDA_ARCHS=";".join(archs), **required)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert json.loads(files.read("fastddpm/_cuda_build.json")) == _native.build_info()["cuda"]
        assert files.getinfo("fastddpm/_cuda.so").file_size == LIBRARY.stat().st_size
        assert any(re.fullmatch(r"fastddpm/_C\..*\.so", name) for name in files.namelist())


@pytest.mark.nvcc
def test_no_library_outlives_a_build_without_it(checkout: Path) -> None:
    assert build(checkout).returncode == 0
    assert (checkout / "fastddpm" / "_cuda.so").exists()
    assert record(checkout)["architectures"] == ["sm_90", "compute_90"]
    run = build(checkout, FASTDDPM_NO_CUDA="1")
    assert "installed WITHOUT CUDA C++ kernels: FASTDDPM_NO_CUDA is set" in run.stderr
    assert not list(checkout.rglob("_cuda.so"))
    assert record(checkout) == {"reason": "FASTDDPM_NO_CUDA is set"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no nvcc: CUDA_HOME is "),
        ("echo 'nvcc fatal : nothing works'; exit 1", "failed: nvcc fatal : nothing works"),
        ("echo 'nvcc of nowhere'", "does not say where it is"),
        ("echo '#$ TOP=/nowhere/bin/..'; echo 'V13.0.88'", "no CUDA runtime beside the nvcc in /nowhere"),
    ],
    ids=["no nvcc", "nvcc fails", "nvcc without a home", "no runtime"],
)
def test_a_package_without_the_kernels_says_why(checkout: Path, script: str | None, reason: str) -> None:
    home = str(checkout / "toolkit") if script is None else fake_toolkit(checkout / "toolkit", script)
    run = build(checkout, CUDA_HOME=home)
    assert run.returncode == 0, run.stderr
    assert "installed WITHOUT CUDA C++ kernels" in run.stderr
    assert reason in record(checkout)["reason"]
    required = build(checkout, CUDA_HOME=home, FASTDDPM_REQUIRE_CUDA="1")
    assert required.returncode != 0
    assert "FASTDDPM_REQUIRE_CUDA is set: " in required.stderr


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["20", "all", "90x"])
def test_an_architecture_that_nvcc_does_not_know_is_told(checkout: Path, arch: str) -> None:
    assert build(checkout, FASTDDPM_CUDA_ARCHS=f"80;{arch}").returncode == 0
    assert record(checkout)["reason"].startswith(f"FASTDDPM_CUDA_ARCHS has {arch}, and ")


@pytest.mark.nvcc
def test_an_error_in_a_kernel_is_the_reason(checkout: Path) -> None:
    (checkout / "csrc" / "tiny" / "tiny_cuda.cu").write_text("int x = y;\n", encoding="utf-8")
    assert build(checkout).returncode == 0
    assert 'identifier "y" is undefined' in record(checkout)["reason"]


def test_without_native_code_there_are_no_cuda_kernels(checkout: Path) -> None:
    assert build(checkout, FASTDDPM_NO_NATIVE="1").returncode == 0
    assert record(checkout)["reason"].startswith("there is no native code")


# --- what it says of a GPU


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(11, 0)]),
        ("compute_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("compute_75", [(7, 5), (8, 6)], [(9, 0)]),
        ("compute_90", [(9, 0), (10, 3), (12, 1)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_gpus_an_architecture_serves(
    architecture: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    assert all(_native._serves(architecture, gpu) for gpu in runs_on)
    assert not any(_native._serves(architecture, gpu) for gpu in not_on)


def test_for_a_gpu_that_it_does_not_serve_it_tells_what_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the PTX of another GPU would start, too, and compute something else."""
    monkeypatch.setattr(_native, "_load_cuda", lambda: None)
    monkeypatch.setattr(_native, "_cuda_build", lambda: {"architectures": ["sm_80", "sm_86", "compute_86"]})
    reason = _native.cuda_reason.__wrapped__
    assert reason((8, 9)) is None
    assert reason((9, 0)) == (
        "they were built for sm_80, sm_86, compute_86; build with FASTDDPM_CUDA_ARCHS=90 for this GPU"
    )


# --- the library of this installation


@pytest.mark.nvcc
def test_the_library_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    """And `fastddpm info` says with which nvcc, and for which GPUs."""
    how = _native.build_info()["cuda"]
    assert how is not None, _native.cuda_reason()
    assert how["nvcc"].split(".")[0].isdigit()
    newest = how["architectures"][-2].removeprefix("sm_")
    assert how["architectures"][-1] == f"compute_{newest}"
    assert cli.main(["info"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA kernels"))
    assert how["nvcc"] in told and ",".join(how["architectures"]) in told


@pytest.mark.nvcc
def test_it_takes_from_others_what_they_promise() -> None:
    """Versioned symbols of the system, and functions of torch's stable ABI: no C++ of torch, and no CUDA."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True)
    symbols = [line.split() for line in listed.stdout.splitlines()]
    names = [name for kind, name in symbols if kind == "U" and "@" not in name]
    assert names
    assert [name for name in names if not name.startswith(("aoti_torch_", "torch_"))] == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="is for a torch that is built without CUDA")
@pytest.mark.nvcc
def test_beside_a_torch_without_cuda_the_library_stays_where_it_is() -> None:
    assert _native.cuda_reason() == f"torch {torch.__version__} is built without CUDA"


@pytest.mark.nvcc
@pytest.mark.cuda
@(pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.cuda)  # of those that a GPU is asked for
def test_it_loads_beside_a_torch_for_cuda() -> None:
    assert _native.cuda_reason() is None
    assert _native.cuda_reason((9, 0)) is None
    assert "FASTDDPM_CUDA_ARCHS=75" in str(_native.cuda_reason((7, 5)))
    hosts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*/*_cuda.cpp"))
    operators = re.findall(r'm\.impl\("(\w+)"', hosts)
    assert operators
    for name in operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastddpm::{name}", "CUDA"), name


@pytest.mark.nvcc
@pytest.mark.cuda
def test_a_library_of_another_cuda_is_not_loaded(tmp_path: Path) -> None:
    package = tmp_path / "fastddpm"
    shutil.copytree(LIBRARY.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "_cuda_build.json").write_text('{"nvcc": "12.4.131"}', encoding="utf-8")
    code = "from fastddpm import _native; print(_native.cuda_reason())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "they were built with CUDA 12.4.131, and torch with " in run.stdout, run.stderr
