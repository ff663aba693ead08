"""The package as an installer and an importer meet it: native module, reasons, imports."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fastddpm
from fastddpm import _native
from fastddpm.likelihood import bits_per_dim
from tests.training.toy import toy_trainer

ROOT = Path(__file__).parents[1]
OPTIONAL = {"datasets", "diffusers", "huggingface_hub", "matplotlib", "sklearn", "tensorboard", "triton"}


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python elsewhere; in a session of its own, so that setup.py has no terminal to write its box to."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        start_new_session=True,
    )


# --- the native module


def test_build_info_tells_versions_and_machine() -> None:
    info = _native.build_info()
    assert info["python"].endswith(platform.python_version())
    assert info["cpus"] >= 1
    assert info["cpu"]
    assert info["packages"]["torch"] == torch.__version__
    assert (info["native"] is None) == (info["reason"] is not None)
    assert _native.available() == (_native.reason() is None)
    assert info["cuda"] is not None or info["cuda_reason"]


@pytest.mark.skipif(not _native.available(), reason=f"no native module: {_native.reason()}")
def test_native_module_tells_how_it_was_built() -> None:
    native = _native.build_info()["native"]
    assert re.match(r"(GCC|Clang) \d+", native["compiler"])
    assert "-std=c++20" in native["flags"]
    assert native["cxx_standard"] > 201703
    assert tuple(int(n) for n in native["torch_headers"].split(".")[:2]) >= (2, 11)
    assert native["baseline_instruction_sets"]
    assert set(native["baseline_instruction_sets"]) <= set(native["cpu_instruction_sets"])
    assert native["instruction_set"] in native["kernel_instruction_sets"]
    assert native["multiplies_pairs"] in (False, "avx512bf16" in native["cpu_instruction_sets"])


@pytest.mark.parametrize("name", ["cuda_reason", "on_amd", "_load", "_load_cuda"])
def test_what_cannot_change_is_found_once(name: str) -> None:
    """`cuda_reason` is asked at every call of an op on a GPU."""
    assert hasattr(getattr(_native, name), "cache_info")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs, and the one module that tells the reason, without torch."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "README.md").write_text("# fastddpm\n", encoding="utf-8")
    (tmp_path / "fastddpm").mkdir()
    (tmp_path / "fastddpm" / "__init__.py").touch()
    for name in ("_native.py", "_gpu_defaults.py"):
        shutil.copy(ROOT / "fastddpm" / name, tmp_path / "fastddpm")
    return tmp_path


def told_reason(checkout: Path) -> str:
    """What the package in this checkout says about its native module."""
    code = "from fastddpm import _native; print(_native.reason())"
    # -S: without site-packages, where the finder of an editable install would answer for another checkout
    run = python("-S", "-c", code, cwd=checkout, PYTHONPATH=str(checkout))
    assert run.returncode == 0, run.stderr
    return run.stdout


def fake_torch(folder: Path, headers: list[str]) -> str:
    """A torch package with these headers and no others; returns what to put on PYTHONPATH."""
    for file in ("__init__.py", *(f"include/{header}" for header in headers)):
        (folder / "torch" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / file).touch()
    return str(folder)


@pytest.mark.parametrize(
    ("environment", "headers", "reason"),
    [
        ({"FASTDDPM_NO_NATIVE": "1"}, ["torch/headeronly/version.h"], "FASTDDPM_NO_NATIVE is set"),
        ({"CXX": "", "PATH": ""}, ["torch/headeronly/version.h"], "no C++ compiler (c++, g++ or clang++) on the path"),
        ({"CXX": "no-such -m64"}, ["torch/headeronly/version.h"], "CXX is no-such -m64, which is not there"),
        ({"CXX": "false"}, ["torch/headeronly/version.h"], "the compiler false failed"),
        ({"CXX": "true"}, ["torch/version.h"], "the headers of torch are older than 2.11"),
        ({"CXX": "true"}, [], "no torch headers; pip install torch"),
    ],
    ids=["not wanted", "no compiler", "CXX is nothing", "compiler fails", "old torch", "no torch"],
)
def test_install_without_native_code_says_why(
    checkout: Path, environment: dict[str, str], headers: list[str], reason: str
) -> None:
    stale = checkout / "fastddpm" / f"_C{EXTENSION_SUFFIXES[0]}"
    stale.touch()  # an older build must not survive this one
    elsewhere = fake_torch(checkout / "elsewhere", headers)
    environment = {"FASTDDPM_REQUIRE_NATIVE": "0", "PYTHONPATH": elsewhere} | environment
    build = python("setup.py", "build_ext", "--inplace", cwd=checkout, **environment)
    assert build.returncode == 0, build.stderr
    assert "installed WITHOUT native code" in build.stderr
    assert not stale.exists()
    assert reason in told_reason(checkout)


WHY = {
    "no torch headers; pip install torch, then pip install --no-build-isolation .": "isolation .",
    "no C++ compiler": "no C++ compiler; pip install --no-build-isolation . builds it, in the folder of the sources",
    "FASTDDPM_NO_NATIVE is set": None,
    None: None,
}


@pytest.mark.parametrize("why", WHY)
def test_missing_native_code_is_told_once_before_much_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str | None
) -> None:
    monkeypatch.setattr(_native, "reason", lambda: why)
    trainer = toy_trainer(tmp_path, num_images=8, warmup_images=0)
    works: list[Callable[[], object]] = [
        trainer.train,
        lambda: trainer.diffusion.sample(1, num_steps=1),
        lambda: bits_per_dim(trainer.diffusion, trainer.data.images[:2], batch_size=2),
    ]
    for first in range(3):
        _native.tell_missing.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for work in works[first:]:
                work()
        assert [str(w.message)[-len(WHY[why] or "") :] for w in told] == ([] if WHY[why] is None else [WHY[why]])
    _native.tell_missing.cache_clear()


def test_required_native_code_that_cannot_be_built_is_an_error(checkout: Path) -> None:
    build = python("setup.py", "build_ext", "--inplace", cwd=checkout, FASTDDPM_REQUIRE_NATIVE="1", CXX="no-such-c++")
    assert build.returncode != 0
    assert "FASTDDPM_REQUIRE_NATIVE is set: no C++ compiler: CXX is no-such-c++" in build.stderr


def test_a_source_tree_that_was_never_built_says_so(checkout: Path) -> None:
    assert "it was not built" in told_reason(checkout)


def test_a_module_of_another_python_says_so(checkout: Path) -> None:
    (checkout / "fastddpm" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert "it was built for another Python or system" in told_reason(checkout)


# --- imports


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert declared[1] == fastddpm.__version__


def test_no_module_imports_an_optional_package() -> None:
    code = textwrap.dedent("""
        import importlib, pkgutil, sys
        import torch
        before = set(sys.modules)
        import fastddpm
        for module in pkgutil.walk_packages(fastddpm.__path__, "fastddpm."):
            # those of Triton are imported on first use, and _cuda.so is no module
            if not module.name.endswith(("__main__", "triton_impl", "triton_common", "_cuda")):
                importlib.import_module(module.name)
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """)
    run = python("-c", code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "fastddpm" in run.stdout.split()
    assert not OPTIONAL & set(run.stdout.split())


def test_import_costs_little_beside_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import fastddpm; print(time.perf_counter() - t)"
    seconds = []
    while len(seconds) < 5 and not any(s < 0.3 for s in seconds):  # other processes may slow one run
        seconds.append(float(python("-c", code, cwd=ROOT).stdout))
    assert min(seconds) < 0.3, seconds


@pytest.mark.parametrize("op", sorted(path.parent.name for path in ROOT.glob("fastddpm/ops/*/reference.py")))
def test_reference_imports_torch_and_the_noise_alone(op: str) -> None:
    source = (ROOT / "fastddpm" / "ops" / op / "reference.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ["fastddpm", "ops", op][: 4 - node.level] if node.level else []
            if node.module:
                imported.add(".".join([*home, node.module]))
            else:  # from .. import name
                imported |= {".".join([*home, alias.name]) for alias in node.names}
    ours = {name for name in imported if name.startswith("fastddpm")}
    others = {name.partition(".")[0] for name in imported - ours} - sys.stdlib_module_names
    assert ours <= {"fastddpm.ops.philox"}
    assert others == {"torch"}
