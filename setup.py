"""Builds the native module ``fastddpm._C`` with ninja, or installs without it and says why.

Everything else about the package stands in pyproject.toml. Environment:

- ``CXX``, ``CXXFLAGS``, ``LDFLAGS``: the compiler and further flags, as everywhere.
- ``FASTDDPM_NO_NATIVE=1``: install without native code.
- ``FASTDDPM_REQUIRE_NATIVE=1``: fail where the native module cannot be built.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
REASON_FILE = "_native_reason.txt"  # in the installed package; fastddpm/_native.py reads it

# No -march: the module must load on every machine of this architecture.
COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Kernels (<op>_cpu.cpp) are compiled once for each instruction set, and chosen at run time.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-maybe-uninitialized"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
KERNEL_SETS = {"baseline": []} | (
    {"avx2": ["-march=x86-64-v3"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]} if X86 else {}
)
# Only torch's stable headers, as of torch 2.11: what is built runs with that torch and every later one.
TORCH_DEFINES = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


class NoNativeError(Exception):
    """The native module cannot be built; the message is the reason in words."""


class BuildNative(build_ext):
    """Compile csrc/ with ninja; without it, leave the reason in the package."""

    def run(self) -> None:
        self.into_source = self.inplace  # setuptools clears inplace while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        homes = [target.parent, *([Path("fastddpm")] if self.into_source else [])]
        for home in homes:  # neither an older module nor an older reason may outlive this build
            (home / target.name).unlink(missing_ok=True)
            (home / REASON_FILE).unlink(missing_ok=True)
        try:
            if os.environ.get("FASTDDPM_NO_NATIVE", "0") != "0":
                raise NoNativeError("FASTDDPM_NO_NATIVE is set")
            build(ext.sources, target, Path(self.build_temp))
        except NoNativeError as reason:
            if os.environ.get("FASTDDPM_REQUIRE_NATIVE", "0") != "0":
                raise SystemExit(f"fastddpm: no native code, and FASTDDPM_REQUIRE_NATIVE is set: {reason}") from None
            for home in homes:
                home.mkdir(parents=True, exist_ok=True)
                (home / REASON_FILE).write_text(f"{reason}\n", encoding="utf-8")
            shout(f"fastddpm is installed WITHOUT native code: {reason}")


def build(sources: list[str], target: Path, temp: Path) -> None:
    """Write a build.ninja for these sources, run it and leave the module at ``target``."""
    cxx = find_compiler()
    ninja = find_ninja()
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        raise NoNativeError(f"no Python.h in {python_include}; install Python's development headers (python3-dev)")
    torch_include = find_torch_include()
    torch_lib = torch_include.parent / "lib"
    includes = [python_include, find_pybind11_include(torch_include), torch_include]
    defines = [*TORCH_DEFINES, *(["-DFASTDDPM_X86"] if X86 else [])]
    flags = [*COMPILE_FLAGS, *defines, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link_flags = [*LINK_FLAGS, f"-L{torch_lib}", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]

    temp, target = temp.resolve(), target.resolve()
    temp.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(temp / "fastddpm_build.h", f"#define FASTDDPM_COMPILE_FLAGS {json.dumps(shlex.join(flags))}\n")
    lines = [
        "rule cxx",
        f"  command = {shlex.join([*cxx, *flags])} $set $includes -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(cxx)} $in {shlex.join(link_flags)} -o $out",
        "includes = " + shlex.join([f"-I{CSRC.resolve()}", f"-I{temp}", *(f"-isystem{path}" for path in includes)]),
    ]
    objects = []
    for source in sources:
        kernel = source.endswith("_cpu.cpp")
        for name, set_flags in KERNEL_SETS.items() if kernel else {"": []}.items():
            suffix = f".{name}.o" if kernel else ".o"
            objects.append(str(Path(source).relative_to(CSRC).with_suffix(suffix)))
            lines.append(f"build {escape(objects[-1])}: cxx {escape(str(Path(source).resolve()))}")
            if kernel:
                lines.append(f"  set = {shlex.join([*KERNEL_FLAGS, *set_flags, f'-DFASTDDPM_ISA={name}'])}")
    lines.append(f"build {escape(str(target))}: link {' '.join(map(escape, objects))}")
    write_if_changed(temp / "build.ninja", "\n".join(lines) + "\n")

    run = subprocess.run([ninja, "-C", str(temp)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, flush=True)
    if run.returncode != 0:
        errors = [line.strip() for line in run.stdout.splitlines() if "error: " in line]
        raise NoNativeError(f"the compiler {shlex.join(cxx)} failed: {errors[0] if errors else 'see the log'}")


def find_compiler() -> list[str]:
    """$CXX, else the first C++ compiler on the path, as the start of a command line."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise NoNativeError(f"no C++ compiler: CXX is {shlex.join(wanted)}, which is not there")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise NoNativeError("no C++ compiler (c++, g++ or clang++) on the path; install one, or set CXX")


def find_ninja() -> str:
    """The ninja of this Python environment, which may not be on the path, else one on the path."""
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    if ninja is None:
        raise NoNativeError("no ninja; pip install ninja")
    return ninja


def find_torch_include() -> Path:
    """The headers of the torch in the target environment, found without importing it."""
    spec = find_spec("torch")
    # an isolated build does not see the packages of the environment it installs into, but their folder is known
    homes = (spec.submodule_search_locations or []) if spec else [str(Path(sysconfig.get_path("purelib"), "torch"))]
    for home in homes:
        if Path(home, "include", "torch", "headeronly", "version.h").exists():
            return Path(home, "include")
    if any(Path(home, "include").exists() for home in homes):
        raise NoNativeError("the headers of torch are older than 2.11; pip install --upgrade torch")
    raise NoNativeError("no torch headers; pip install torch, then pip install --no-build-isolation .")


def find_pybind11_include(torch_include: Path) -> Path:
    """The headers of the pybind11 package, else the copy that comes with torch's headers."""
    spec = find_spec("pybind11")
    homes = [Path(home, "include") for home in (spec.submodule_search_locations or [])] if spec else []
    for include in (*homes, torch_include):
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    raise NoNativeError("no pybind11; pip install pybind11")


def escape(path: str) -> str:
    """A path as ninja's build lines want it."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, but keep its time stamp where nothing changed, so that ninja builds nothing again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def shout(message: str) -> None:
    """Print a box; on the terminal too, since pip shows the output of a build that succeeds to nobody."""
    width = 88
    rows = [*textwrap.wrap(message, width), "Everything works; `fastddpm info` repeats this reason."]
    box = "\n".join(["", "*" * (width + 4), *(f"* {row:<{width}} *" for row in rows), "*" * (width + 4), ""])
    print(box, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(box + "\n")


setup(
    ext_modules=[
        Extension(
            "fastddpm._C",
            [str(path) for path in sorted(CSRC.glob("**/*.cpp")) if not path.name.endswith("_cuda.cpp")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
