"""The native code: whether it is there, how it was built, and otherwise why it is not.

It is two libraries: the module ``fastddpm._C`` with the operators and their kernels for the CPU, and ``_cuda.so`` with
their kernels for NVIDIA GPUs, which torch loads.

It stands below everything else but the table of `_gpu_defaults`, and imports only the standard library, so that it can
answer wherever Python runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from ._gpu_defaults import CUTS

_CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")
_BUILD = "pip install --no-build-isolation ."
_NOT_BUILT = f"it was not built; {_BUILD} (or -e . for a checkout)"
_PACKAGES = ("torch", "numpy", "pillow", "safetensors", "triton")


def available() -> bool:
    """Whether the native module is there and loads."""
    return _load()[0] is not None


def reason() -> str | None:
    """Why there is no native module, in words; None where there is one."""
    return _load()[1]


@functools.cache
def tell_missing() -> None:
    """Warn, once, before much work on a CPU, where there is no native module and nobody wanted that."""
    why = reason()
    if why is None or "FASTDDPM_NO_NATIVE" in why:
        return
    remedy = "" if _BUILD in why else f"; {_BUILD} builds it, in the folder of the sources"
    warnings.warn(
        f"fastddpm: expected the native module for work on a CPU, got none, and its ops run in plain PyTorch, which is "
        f"slower: {why}{remedy}",
        stacklevel=3,
    )


def free_scratch() -> None:
    """Free what the kernels for the CPU keep for this thread from call to call; the next call takes it anew."""
    module = _load()[0]
    if module is not None:
        module.free_scratch()


@functools.cache
def on_amd() -> bool:
    """Whether this processor is one of AMD, as far as the native module is there to tell."""
    module, _ = _load()
    return module is not None and bool(module.on_amd())


def multiplies_pairs() -> bool:
    """Whether the kernels multiply bfloat16 numbers in pairs, for which this processor has a faster instruction."""
    module, _ = _load()
    return module is not None and bool(module.multiplies_pairs())


@functools.cache
def cuda_reason(capability: tuple[int, int] | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot run beside this torch, in words; None where they are loaded.

    Args:
        capability: that of a GPU, as torch.cuda.get_device_capability tells it: whether they run on it, too.
    """
    why = _load_cuda()
    if why is not None or capability is None:
        return why
    built = _cuda_build()["architectures"]
    if any(_serves(architecture, capability) for architecture in built):
        return None
    number = "{}{}".format(*capability)
    return f"they were built for {', '.join(built)}; build with FASTDDPM_CUDA_ARCHS={number} for this GPU"


def build_info() -> dict[str, Any]:
    """Versions and machine, and how the native code was built.

    Returns:
        ``python``, ``platform``, ``cpu`` (its model), ``cpus`` (how many this process may use), ``packages`` (name to
        version, None where a package is not installed), ``reason`` and ``cuda_reason`` (see there), ``cuda`` (None, or
        ``nvcc``, its version, ``architectures`` and ``flags``), and ``native``: None, or

        - ``compiler``, ``cxx_standard`` (the value of __cplusplus), ``flags``;
        - ``torch_headers``: the version of the headers it was compiled with;
        - ``baseline_instruction_sets``: what the module needs; ``cpu_instruction_sets``: what this processor has;
        - ``kernel_instruction_sets``: what the kernels were compiled for; ``instruction_set``: what they run with;
        - ``multiplies_pairs``: whether they multiply bfloat16 numbers in pairs, as they do where that is faster.
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
        "cuda": _cuda_build() or None,
        "cuda_reason": cuda_reason(),
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


@functools.cache
def _load_cuda() -> str | None:
    """Load the CUDA C++ kernels where they fit, or give the reason why not."""
    if not available():
        return f"there is no native code: {reason()}"
    built = _cuda_build()
    if not built:
        return str(_record("_cuda").get("reason", _NOT_BUILT))
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if built["nvcc"].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"they were built with CUDA {built['nvcc']}, and torch with {torch.version.cuda}; build with that nvcc"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"they were built for another torch or system: {error.__cause__ or error}"
    hand_over_defaults(_CUDA_LIBRARY)
    return None


def hand_over_defaults(library: Path) -> None:
    """Tell a library of CUDA C++ kernels, which is loaded, what `_gpu_defaults` says about how they cut a call."""
    numbers = [number for cut in CUTS for number in cut.numbers()]
    function = ctypes.CDLL(str(library)).fastddpm_group_norm_cuts
    function.argtypes, function.restype = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int64), None
    function((ctypes.c_int64 * len(numbers))(*numbers), len(CUTS))


def _cuda_build() -> dict[str, Any]:
    """How the CUDA C++ kernels were built; empty where they were not."""
    record = _record("_cuda")
    return record if _CUDA_LIBRARY.exists() and "nvcc" in record else {}


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for it runs on a GPU: sm_86 on 8.6 and 8.9, sm_90a on 9.0 alone, compute_90 (PTX) on all since.

    PTX of 8.x would start on 9.0, too, and compute something else: it has no clusters and waits for no kernel in front
    of it (csrc/common/cuda/platform.cuh), while the host launches by the GPU that is there.
    """
    kind, _, number = architecture.partition("_")
    digits = number.rstrip("af")
    since = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return capability == since
    if since < (9, 0) <= capability:
        return False
    return capability >= since and (capability[0] == since[0] or (kind == "compute" and number == digits))


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
