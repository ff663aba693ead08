"""Builds the native code with ninja, or installs without it and says why.

``fastddpm._C`` is a Python module: the operators and their kernels for the CPU. ``fastddpm/_cuda.so`` is a library that
torch loads: their kernels for NVIDIA GPUs, built wherever nvcc is, beside a torch without CUDA, too. What there is to
tell, how a library was built or why it was not, stays in ``fastddpm/<name>_build.json`` for fastddpm/_native.py.

Everything else about the package stands in pyproject.toml. Environment:

- ``CXX``, ``CXXFLAGS``, ``LDFLAGS``: the compiler and further flags, as everywhere.
- ``CUDA_HOME``: the CUDA toolkit; without it nvcc is looked for on the path, in /usr/local/cuda and among the packages
  of the environment (pip install "cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]").
- ``FASTDDPM_CUDA_ARCHS="80;90"``: the GPUs to compile for, by compute capability; 8.0 is 80, a comma does, too.
- ``FASTDDPM_NO_NATIVE=1``, ``FASTDDPM_NO_CUDA=1``: install without native code, or without that for NVIDIA GPUs.
- ``FASTDDPM_REQUIRE_NATIVE=1``, ``FASTDDPM_REQUIRE_CUDA=1``: fail where it cannot be built.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")

# No -march: the libraries must load on every machine of this architecture.
COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Kernels (<op>_cpu.cpp) are compiled once for each instruction set, and chosen at run time.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# Of these GCC suspects its own header for AVX-512; Clang does not know the first.
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
KERNEL_SETS = {"baseline": []} | (
    {"avx2": ["-march=x86-64-v3"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]} if X86 else {}
)
# Kernels for NVIDIA GPUs (<op>_cuda.cu) are compiled for each of these that nvcc knows, and as PTX of the newest.
CUDA_ARCHS = ["80", "86", "89", "90", "100", "120"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# Only torch's stable headers, as of torch 2.11: what is built runs with that torch and every later one.
TORCH_DEFINES = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


class CannotBuildError(Exception):
    """A library cannot be built; the message is the reason in words. ``expected``: no user would be surprised."""

    def __init__(self, reason: str, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


class Library(NamedTuple):
    """A library of the package: its name in messages, its part in the names of switches, and what builds it there."""

    title: str
    switch: str
    build: Callable[[Path, Path], dict[str, Any]]  # (target, folder for what lies between) -> how it was built


class Object(NamedTuple):
    """A source to compile: by which compiler, with which flags of its own, for which variant of the object."""

    source: Path
    compiler: str = "cxx"
    flags: tuple[str, ...] = ()
    variant: str = ""


class BuildNative(build_ext):
    """Compile csrc/ with ninja; where that cannot be, leave the reason in the package."""

    def run(self) -> None:
        self.into_source = self.inplace  # setuptools clears inplace while it builds
        self.missing: list[str] = []
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """torch loads the CUDA library, whatever the Python; so its name has none in it."""
        name: str = super().get_ext_filename(fullname)
        return str(Path(name).with_name("_cuda.so")) if fullname.endswith("_cuda") else name

    def build_extension(self, ext: Extension) -> None:
        library, name = LIBRARIES[ext.name], ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        homes = [target.parent, *([Path("fastddpm")] if self.into_source else [])]
        for home in homes:  # neither an older library nor an older record may outlive this build
            (home / target.name).unlink(missing_ok=True)
            (home / f"{name}_build.json").unlink(missing_ok=True)
        try:
            if os.environ.get(f"FASTDDPM_NO_{library.switch}", "0") != "0":
                raise CannotBuildError(f"FASTDDPM_NO_{library.switch} is set", expected=True)
            if self.missing:
                raise CannotBuildError("there is no native code at all", expected=True)
            record = library.build(target, self.objects() / name)
        except CannotBuildError as reason:
            self.give_up(library, reason)
            record = {"reason": str(reason)}
        for home in homes if record else []:
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{name}_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def objects(self) -> Path:
        """Where objects are kept: in this checkout, by an editable installation, too, so that what is built next, a
        wheel or the same again, compiles what has changed alone."""
        return Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def give_up(self, library: Library, reason: CannotBuildError) -> None:
        """Stop where the library is required; else say that it is not there."""
        self.missing.append(library.title)
        required = f"FASTDDPM_REQUIRE_{library.switch}"
        if os.environ.get(required, "0") != "0":
            raise SystemExit(f"fastddpm: no {library.title}, and {required} is set: {reason}")
        message = f"fastddpm is installed WITHOUT {library.title}: {reason}"
        if reason.expected:
            print(message, file=sys.stderr)
        else:
            shout(message)


def build_module(target: Path, temp: Path) -> dict[str, Any]:
    """The Python module: operators, and kernels for the CPU."""
    cxx = find_compiler()
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        raise CannotBuildError(f"no Python.h in {python_include}; install Python's development headers (python3-dev)")
    torch_include = find_torch_include()
    includes = [python_include, find_pybind11_include(torch_include), torch_include]
    flags = [*COMPILE_FLAGS, *TORCH_DEFINES, *(["-DFASTDDPM_X86"] if X86 else []), *words("CXXFLAGS")]
    temp.mkdir(parents=True, exist_ok=True)
    write_if_changed(temp / "fastddpm_build.h", f"#define FASTDDPM_COMPILE_FLAGS {json.dumps(shlex.join(flags))}\n")

    objects = []
    for source in host_sources():
        if source.name.endswith("_cpu.cpp"):
            for name, of_set in KERNEL_SETS.items():
                own = (*KERNEL_FLAGS, *of_set, f"-DFASTDDPM_ISA={name}")
                objects.append(Object(source, flags=own, variant=f".{name}"))
        else:
            objects.append(Object(source))
    compiler = [*cxx, *flags, *include_flags([CSRC, temp], includes)]
    link = [*LINK_FLAGS, f"-L{torch_include.parent / 'lib'}", "-ltorch_cpu", *words("LDFLAGS")]
    run_ninja(temp, target, {"cxx": compiler}, objects, cxx, link, [version_of(torch_include)])
    return {}


def build_cuda(target: Path, temp: Path) -> dict[str, Any]:
    """The library of kernels for NVIDIA GPUs: device code by nvcc, which sees no torch; host code by the compiler."""
    kernels, hosts = sorted(CSRC.glob("**/*.cu")), sorted(CSRC.glob("**/*_cuda.cpp"))
    if not kernels:
        raise CannotBuildError("this version has no kernels in CUDA C++", expected=True)
    cxx = find_compiler()
    torch_include = find_torch_include()
    nvcc = find_nvcc(torch_include)
    home, version = about_nvcc(nvcc)
    cuda_include, cudart = find_cudart(home)
    archs = wanted_archs(nvcc)
    temp = temp.resolve()
    temp.mkdir(parents=True, exist_ok=True)

    flags = [*COMPILE_FLAGS, *TORCH_DEFINES, "-DUSE_CUDA", *words("CXXFLAGS")]
    host_compiler = ["-ccbin", *cxx] if len(words("CXX")) == 1 else []  # one with flags is not for nvcc to call
    nvcc_flags = [*NVCC_FLAGS, *host_compiler, *gencode(archs), f"--threads={threads_for(len(kernels))}"]
    compilers = {
        "cxx": [*cxx, *flags, *include_flags([CSRC], [torch_include, cuda_include])],
        "nvcc": [nvcc, *nvcc_flags, *include_flags([CSRC], [])],
    }
    objects = [*(Object(source, "nvcc") for source in kernels), *(Object(source) for source in hosts)]
    # the library must name libtorch_cuda.so, so that its symbols are found; a torch without CUDA has no such file
    run([*cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-xc++", os.devnull, "-o", str(temp / "libtorch_cuda.so")])
    torch = ["-Wl,--no-as-needed", f"-L{torch_include.parent / 'lib'}", "-ltorch_cpu", f"-L{temp}", "-ltorch_cuda"]
    link = [*LINK_FLAGS, *torch, *cudart, *words("LDFLAGS")]
    run_ninja(temp, target, compilers, objects, cxx, link, [version_of(torch_include), Path(nvcc)])
    return {"nvcc": version, "architectures": [*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"],
            "flags": shlex.join(NVCC_FLAGS)}  # fmt: skip


LIBRARIES = {
    "fastddpm._C": Library("native code", "NATIVE", build_module),
    "fastddpm._cuda": Library("CUDA C++ kernels", "CUDA", build_cuda),
}


def host_sources() -> list[Path]:
    """What the module is made of; <op>_cuda.cpp belongs to the other library."""
    return [path for path in sorted(CSRC.glob("**/*.cpp")) if not path.name.endswith("_cuda.cpp")]


# --- compiling


def run_ninja(
    temp: Path, target: Path, compilers: dict[str, list[str]], objects: list[Object], linker: list[str],
    link: list[str], others: list[Path],
) -> None:  # fmt: skip
    """Write a build.ninja, run it and leave the library at ``target``. ``others``: what objects are older than is not
    what they were made with, beside their sources and our headers."""
    temp, target = temp.resolve(), target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, command in compilers.items():
        lines += [
            f"rule {name}",
            f"  command = {shlex.join(command)} $own -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += ["rule link", f"  command = {shlex.join(linker)} $in {shlex.join(link)} -o $out"]
    made = []
    beside = " ".join(escape(str(path)) for path in others)
    for source, compiler, own, variant in objects:
        made.append(escape(f"{source.relative_to(CSRC)}{variant}.o"))
        lines.append(f"build {made[-1]}: {compiler} {escape(str(source.resolve()))} | {beside}")
        lines.append(f"  own = {shlex.join(own)}")
    lines.append(f"build {escape(str(target))}: link {' '.join(made)}")
    write_if_changed(temp / "build.ninja", "\n".join(lines) + "\n")
    print(run([find_ninja(), "-C", str(temp)], " and ".join(command[0] for command in compilers.values())), flush=True)


def run(command: list[str], compiler: str = "") -> str:
    """What a compiler prints, or the tool that runs ``compiler``; where it fails, its first error is the reason."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        print(done.stdout, flush=True)
        errors = [line.strip() for line in done.stdout.splitlines() if re.search(r"\berror\b.*: |\bfatal\b", line)]
        reason = errors[0] if errors else "see the log"
        raise CannotBuildError(f"the compiler {compiler or command[0]} failed: {reason}")
    return done.stdout


def include_flags(ours: list[Path], others: list[Path]) -> list[str]:
    """Folders of headers; those of others give no warnings."""
    return [*(f"-I{path.resolve()}" for path in ours), *(f"-isystem{path}" for path in others)]


def threads_for(files: int) -> int:
    """In how many threads an nvcc compiles for several architectures, so that all of them take every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, -(-cores // files))


def gencode(archs: list[str]) -> list[str]:
    """Flags of nvcc: machine code for each architecture; the last as PTX, too, for GPUs to come."""
    code = {arch: f"sm_{arch}" for arch in archs} | {archs[-1]: f"[sm_{archs[-1]},compute_{archs[-1]}]"}
    return [f"-gencode=arch=compute_{arch},code={code[arch]}" for arch in archs]


def wanted_archs(nvcc: str) -> list[str]:
    """$FASTDDPM_CUDA_ARCHS in order, else those of ours that this nvcc knows."""
    known = re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"]))
    wanted = re.split(r"[;,\s]+", os.environ.get("FASTDDPM_CUDA_ARCHS", "").strip(";, "))
    if wanted == [""]:
        return [arch for arch in CUDA_ARCHS if arch in known]
    archs = {arch.replace(".", "") for arch in wanted}
    for arch in archs:
        if re.sub("[af]$", "", arch) not in known:
            raise CannotBuildError(f"FASTDDPM_CUDA_ARCHS has {arch}, and {nvcc} knows {', '.join(known)}")
    return sorted(archs, key=lambda arch: (int(re.sub(r"\D", "", arch)), arch))


# --- finding


def find_compiler() -> list[str]:
    """$CXX, else the first C++ compiler on the path, as the start of a command line."""
    wanted = words("CXX")
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise CannotBuildError(f"no C++ compiler: CXX is {shlex.join(wanted)}, which is not there")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise CannotBuildError("no C++ compiler (c++, g++ or clang++) on the path; install one, or set CXX")


def find_ninja() -> str:
    """The ninja of this Python environment, which may not be on the path, else one on the path."""
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    if ninja is None:
        raise CannotBuildError("no ninja; pip install ninja")
    return ninja


def find_torch_include() -> Path:
    """The headers of the torch in the target environment, found without importing it."""
    homes = package_homes("torch")
    for home in homes:
        if version_of(home / "include").exists():
            return home / "include"
    if any((home / "include").exists() for home in homes):
        raise CannotBuildError("the headers of torch are older than 2.11; pip install --upgrade torch")
    raise CannotBuildError("no torch headers; pip install torch, then pip install --no-build-isolation .")


def version_of(torch_include: Path) -> Path:
    """The header that says which torch the others belong to."""
    return torch_include / "torch" / "headeronly" / "version.h"


def find_pybind11_include(torch_include: Path) -> Path:
    """The headers of the pybind11 package, else the copy that comes with torch's headers."""
    for include in (*(home / "include" for home in package_homes("pybind11")), torch_include):
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    raise CannotBuildError("no pybind11; pip install pybind11")


def find_nvcc(torch_include: Path) -> str:
    """nvcc of $CUDA_HOME, else the one on the path, of /usr/local/cuda, or of the newest package of NVIDIA."""
    wanted = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    packages = [path for home in package_homes("nvidia") for path in sorted(home.glob("cu*/bin/nvcc"), reverse=True)]
    elsewhere = [*([Path(on_path)] if on_path else []), Path("/usr/local/cuda/bin/nvcc"), *packages]
    for nvcc in [Path(wanted, "bin", "nvcc")] if wanted else elsewhere:
        if os.access(nvcc, os.X_OK):
            return str(nvcc)
    if wanted:
        raise CannotBuildError(f"no nvcc: CUDA_HOME is {wanted}, which has no bin/nvcc")
    raise CannotBuildError(
        "no nvcc on the path or in /usr/local/cuda; install the CUDA toolkit, set CUDA_HOME, "
        "or pip install 'cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]'",
        expected=not has_cuda(torch_include.parent),
    )


def has_cuda(torch: Path) -> bool:
    """Whether the torch in this folder is built for CUDA."""
    version = torch / "version.py"
    text = version.read_text(encoding="utf-8") if version.exists() else ""
    return re.search(r"^cuda\b.*= '", text, re.MULTILINE) is not None


def about_nvcc(nvcc: str) -> tuple[Path, str]:
    """The home and the version of the toolkit; the nvcc on the path may be a script that calls another."""
    top = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]), re.MULTILINE)
    version = re.search(r"\bV([\d.]+)", run([nvcc, "--version"]))
    if top is None or version is None:
        raise CannotBuildError(f"{nvcc} does not say where it is, and which version; set CUDA_HOME")
    return Path(top[1].strip()).resolve(), version[1]


def find_cudart(home: Path) -> tuple[Path, list[str]]:
    """The headers of the CUDA runtime, and what links it: whole and hidden, else the library that torch brings."""
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    roots = [home, home / "targets" / f"{machine}-linux"]
    includes = [root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").exists()]
    folders = [root / name for root in roots for name in ("lib64", "lib")]
    static = [path for folder in folders for path in folder.glob("libcudart_static.a")]
    shared = [path for folder in folders for path in sorted(folder.glob("libcudart.so*"))]
    if not includes or not (static or shared):
        raise CannotBuildError(f"no CUDA runtime beside the nvcc in {home}; pip install nvidia-cuda-runtime")
    hidden = [*map(str, static[:1]), "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
    return includes[0], hidden if static else [str(shared[0])]


def package_homes(package: str) -> list[Path]:
    """The folders of a package, found without importing it; an isolated build knows where it would be."""
    spec = find_spec(package)
    found = (spec.submodule_search_locations or []) if spec else [Path(sysconfig.get_path("purelib"), package)]
    return [Path(home) for home in found]


# --- and more


def words(variable: str) -> list[str]:
    """An environment variable as words of a command line."""
    return shlex.split(os.environ.get(variable, ""))


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
        Extension("fastddpm._C", [str(path) for path in host_sources()], optional=True),
        Extension("fastddpm._cuda", [str(path) for path in sorted(CSRC.glob("**/*_cuda.*"))], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
)
