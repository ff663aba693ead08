"""The CUDA kernels as a library for the CPU: compiled as C++ against `emulation`, under ASan and UBSan.

Its operators take the place of those for the CPU (tests/conftest.py loads it where FASTDDPM_EMULATED names it), so that
each test of the native ops is one of the CUDA kernels and of their host code. By hand, with what pytest takes:

    python -m tests.cuda.emulated tests/ops/test_contract.py -k group_norm_silu-native

FASTDDPM_EMULATION_SEED decides the order of the threads, FASTDDPM_EMULATION_ARCH (80, 90 ..) what the device says that
it is, FASTDDPM_EMULATION_ERRORS (0 where it is not set) how many times the largest documented error its approximate
instructions err, FASTDDPM_EMULATED_PLAN (slab, cluster, way) how group_norm_silu is cut; see fastddpm_group_norm_plan.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulated"
EMULATION = ROOT / "tests" / "cuda" / "emulation"
TORCH = Path(torch.__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
FLAGS = ["-std=c++20", "-O0", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror=unused-result"]
FLAGS += ["-Wno-unknown-pragmas"]
DEFINES = ["-DFASTDDPM_EMULATED=1", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def compiler() -> str | None:
    """The C++ compiler, where it is one whose sanitizers can be loaded into Python."""
    cxx = os.environ.get("CXX", "g++")
    return cxx if shutil.which(cxx) and runtime(cxx, "libasan.so") else None


def runtime(cxx: str, name: str) -> str | None:
    """Where a library of the sanitizers lies."""
    path = subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


def ops(csrc: Path = ROOT / "csrc") -> list[str]:
    """The ops that have CUDA kernels."""
    return sorted({path.parent.name for path in csrc.glob("*/*_cuda.cu")})


def library(names: list[str] | None = None, csrc: Path = ROOT / "csrc") -> Path:
    """Build the library of these ops (all), unless it lies there built from the same sources; return its path."""
    wanted = ops(csrc) if names is None else names
    sources = [EMULATION / "emulator.cpp"]
    sources += [path for op in wanted for end in ("cu", "cpp") for path in csrc.glob(f"{op}/*_cuda.{end}")]
    return linked("emulated-", sources, ["-shared"], [f"-L{TORCH / 'lib'}", "-ltorch_cpu"], csrc)


def program(source: Path, *kernels: str) -> Path:
    """Build a program of one source, linked with the kernels of these ops; return its path."""
    sources = [source, EMULATION / "emulator.cpp"]
    sources += [path for op in kernels for path in (ROOT / "csrc").glob(f"{op}/*_cuda.cu")]
    return linked(f"{source.stem}-", sources, [], [], ROOT / "csrc")


def linked(name: str, sources: list[Path], options: list[str], libraries: list[str], csrc: Path) -> Path:
    """What is made of these sources, of which objects are made where there are none."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        objects = sorted(pool.map(lambda source: compiled(source, csrc), sources))
    target = BUILD / f"{name}{digest([*options, *SANITIZE], objects)}{'.so' if '-shared' in options else ''}"
    made(target, [compiler() or "g++", *options, *SANITIZE, *map(str, objects), *libraries])
    return target


def compiled(source: Path, csrc: Path) -> Path:
    """The object of a source."""
    options = [compiler() or "g++", *FLAGS, *SANITIZE, *DEFINES]
    used = [source, *headers_of(csrc), *source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    used += csrc.glob("*/*_cuda.h") if source.parent == EMULATION else []  # a program may call any kernel
    target = BUILD / f"{source.name}.{digest([*options, torch.__version__], used)}.o"
    includes = [f"-I{csrc}", f"-I{EMULATION}", f"-isystem{TORCH / 'include'}"]
    made(target, [*options, *includes, "-x", "c++", "-c", str(source)])
    return target


def headers_of(csrc: Path) -> list[Path]:
    """What every kernel may include."""
    return [*csrc.glob("common/*.h"), *csrc.glob("common/cuda/*.*h"), *EMULATION.glob("*.h")]


def digest(options: list[str], files: list[Path]) -> str:
    """Names what is made from these files with these options."""
    sha = hashlib.sha256("\0".join(options).encode())
    for path in sorted(files):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def made(target: Path, command: list[str]) -> None:
    """Run a command that writes ``target`` unless it is there: whole, or not at all. Others wait who want the same."""
    with locked(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return
        part = target.with_suffix(f".{os.getpid()}.part")
        run = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        part.replace(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other test processes wait for."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def environment(path: Path, **more: str) -> dict[str, str]:
    """What a Python that loads the library runs under."""
    cxx = compiler() or "g++"
    preload = " ".join(filter(None, (runtime(cxx, "libasan.so"), runtime(cxx, "libubsan.so"))))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python itself leaks on purpose
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "FASTDDPM_EMULATED": str(path),
        **more,
    }


def pytest(path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run tests with the kernels of a library. What a sanitizer prints at the end of a process is not captured."""
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += arguments
    return subprocess.run(
        command, cwd=ROOT, env=environment(path, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


if __name__ == "__main__":
    result = pytest(library(), *sys.argv[1:])
    print(result.stdout)
    raise SystemExit(result.returncode)
