"""The native module ``fastddpm._C``: whether it is there, how it was built, and otherwise why it is not.

It stands below everything else and imports only the standard library, so that it can answer wherever Python runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_NOT_BUILT = "it was not built; pip install --no-build-isolation . (or -e . for a checkout)"
_PACKAGES = ("torch", "numpy", "pillow", "safetensors", "triton")


def available() -> bool:
    """Whether the native module is there and loads."""
    return _load()[0] is not None


def reason() -> str | None:
    """Why there is no native module, in words; None where there is one."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """Versions and machine, and how the native module was built.

    Returns:
        ``python``, ``platform``, ``cpu`` (its model), ``cpus`` (how many this process may use), ``packages`` (name to
        version, None where a package is not installed), ``reason`` (see `reason`), and ``native``: None, or

        - ``compiler``, ``cxx_standard`` (the value of __cplusplus), ``flags``;
        - ``torch_headers``: the version of the headers it was compiled with;
        - ``baseline_instruction_sets``: what the module needs; ``cpu_instruction_sets``: what this processor has;
        - ``kernel_instruction_sets``: what the kernels were compiled for; ``instruction_set``: what they run with;
        - ``cuda_architectures``: empty, since no CUDA source was compiled.
    """
    module, why = _load()
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "native": module.build_info() if module is not None else None,
        "reason": why,
    }


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The native module, or the reason why there is none."""
    if importlib.util.find_spec("fastddpm._C") is None:
        return None, _record("_C").get("reason", _NOT_BUILT)
    try:
        importlib.import_module("torch")  # whose library the module is linked with
        return importlib.import_module("fastddpm._C"), None
    except ImportError as error:
        return None, f"it was built for another Python or system: {error}"


def _record(library: str) -> dict[str, Any]:
    """What setup.py left beside a library: how it was built, or the reason why it was not; empty without a build."""
    path = Path(__file__).with_name(f"{library}_build.json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record


def _version(package: str) -> str | None:
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)  # 2.11.0+cu130, where the wheel from PyPI calls itself 2.11.0
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
