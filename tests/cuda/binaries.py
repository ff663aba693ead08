"""Reads the CUDA C++ kernels as compiled: registers, local memory, width of the memory accesses. Needs no GPU.

    python -m tests.cuda.binaries --arch sm_90                      every kernel, as lines of JSON
    python -m tests.cuda.binaries --table >docs/cuda-binaries.md    the hot ones, as a table

The disassembler comes with Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fastddpm import _native

LIBRARY = Path(_native.__file__).with_name("_cuda.so")
TABLE_OF = ("sm_80", "sm_90", "sm_100")  # whose hot kernels have a line each


@dataclass(frozen=True)
class Hot:
    """What a kernel that takes the time of a training step or of a sampling step must look like.

    ``kernel`` is a regular expression for its whole name, ``registers`` what leaves room for the blocks planned (65,536
    on a multiprocessor), ``narrow`` how many accesses to device memory may move less than 16 bytes: numbers of a
    sample, a channel or a group. ``loads`` and ``stores``: whether there must be any of 16 bytes.
    """

    kernel: str
    registers: int
    narrow: int
    loads: bool = True
    stores: bool = True


# 64 registers leave room for 1,024 threads on a multiprocessor, 80 for 768, 128 for 512; blocks have 128 or 256.
HOT = [
    Hot(r"normal_kernel<Tile<4, [03]>, float>", registers=40, narrow=3, loads=False),
    Hot(r"normal_kernel<Tile<8, 0>, bf16>", registers=32, narrow=3, loads=False),
    Hot(r"q_sample_kernel<Elements<., .>, unsigned char, (float|bf16)>", registers=48, narrow=12, loads=False),
    Hot(r"q_sample_kernel<Pixels<3>, unsigned char, (float|bf16)>", registers=64, narrow=13, loads=False),
    Hot(r"diffusion_loss_kernel<\(Path\)0, Elements<., .>, .*, (float|bf16)>", registers=48, narrow=9),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Elements<., .>, .*, (float|bf16)>", registers=48, narrow=19),
    Hot(r"solver_step_kernel<Tile<4, 0>, float, float, true>", registers=48, narrow=20),
    Hot(r"solver_step_kernel<Tile<4, 0>, float, bf16, true>", registers=48, narrow=21),
    # forward and backward: three blocks of 256; two with a residual
    Hot(r"one_read_kernel<Copied<(bf16|f16), .*>, false>", registers=80, narrow=62),
    Hot(r"one_read_kernel<Copied<.*>, true>", registers=128, narrow=66),
    # of NHWC images three blocks of 256, forward and backward, with a residual or without
    Hot(r"cooperative_kernel<Copied<.*, true> >", registers=80, narrow=134),
    Hot(r"cooperative_kernel<Copied<.*, false> >", registers=128, narrow=134),
    Hot(r"forward_rows<bf16, [123]>", registers=72, narrow=55),
    Hot(r"backward_rows<bf16, 1>", registers=104, narrow=17),
    Hot(r"gradient_squares_kernel<.*>", registers=64, narrow=39, stores=False),
    Hot(r"adam_ema_kernel<.*>", registers=64, narrow=62),
]

@dataclass(frozen=True)
class Binary:
    """A kernel as compiled for one architecture. ``stack`` is in bytes; ``local`` counts the instructions that touch
    local memory, spills among them; ``loads`` and ``stores`` those to device memory, by the bytes that one moves."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int]

    @property
    def narrow(self) -> int:
        return sum(n for accesses in (self.loads, self.stores) for width, n in accesses.items() if width < 16)

    def wide(self, accesses: dict[int, int]) -> int:
        return sum(n for width, n in accesses.items() if width >= 16)


def disassembler() -> str | None:
    """Triton's cuobjdump, else the one on the path."""
    triton = importlib.util.find_spec("triton")
    homes = (triton.submodule_search_locations or []) if triton else []
    tools = (Path(home, "backends", "nvidia", "bin", "cuobjdump") for home in homes)
    return next((str(tool) for tool in tools if tool.exists()), shutil.which("cuobjdump"))


def binaries(arch: str, library: Path = LIBRARY, sass: bool = True) -> list[Binary]:
    """Every kernel of a library (or cubin) for an architecture such as sm_90, by name. Without ``sass`` none is
    disassembled, which takes most of the time, and nothing counted."""
    code = dict(instructions(dumped("-sass", "-arch", arch, str(library)))) if sass else {}
    found = []
    for symbol, usage in resources(dumped("-res-usage", "-arch", arch, str(library))).items():
        opcodes = code.get(symbol, [])
        loads, stores = (accesses(opcodes, names) for names in (("LDG", "LDGSTS"), ("STG",)))
        local = sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes)
        stack = usage["STACK"] + usage["LOCAL"]
        found.append(Binary(symbol, arch, usage["REG"], usage["SHARED"], stack, local, loads, stores))
    names = demangled([binary.kernel for binary in found])
    return sorted((Binary(**asdict(b) | {"kernel": names[b.kernel]}) for b in found), key=lambda b: b.kernel)


def architectures(library: Path = LIBRARY) -> list[str]:
    """What a library has machine code for."""
    archs = set(re.findall(r"\.(sm_\w+)\.cubin", dumped("--list-elf", str(library))))
    return sorted(archs, key=lambda arch: (len(arch), arch))


def dumped(*options: str) -> str:
    tool = disassembler()
    assert tool is not None, "no cuobjdump; pip install triton"
    return subprocess.run([tool, *options], check=True, capture_output=True, text=True).stdout


def resources(text: str) -> dict[str, dict[str, int]]:
    """Symbol to what cuobjdump -res-usage says that it needs."""
    found = re.findall(r"^ Function (\S+):\n\s+(REG:.*)$", text, re.MULTILINE)
    return {symbol: {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", usage)} for symbol, usage in found}


def instructions(text: str) -> Iterator[tuple[str, list[str]]]:
    """The symbol and the opcodes of each kernel, of what cuobjdump -sass prints."""
    for part in text.split("\t\tFunction : ")[1:]:
        symbol, _, lines = part.partition("\n")
        yield symbol.strip(), re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", lines, re.MULTILINE)


def accesses(code: list[str], opcodes: tuple[str, ...]) -> dict[int, int]:
    """Bytes that one instruction moves, to how many such there are."""
    parts = [opcode.split(".") for opcode in code]
    return dict(sorted(Counter(width(rest) for name, *rest in parts if name in opcodes).items()))


def width(modifiers: list[str]) -> int:
    """Bytes a thread moves: LDG.E.LTC128B.64 has 8, STG.E.U16 has 2, LDG.E has 4."""
    bits = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US](8|16)|64|128|256", m)]
    return bits[0] // 8 if bits else 4


def demangled(symbols: list[str]) -> dict[str, str]:
    """Symbol to the name in the source: without namespaces, return type and parameters."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    without = re.sub(r"\(anonymous namespace\)::|\bfastddpm::|\bcuda::|^void ", "", run.stdout, flags=re.MULTILINE)
    names = re.sub(r"\([^()]*\)$", "", without, flags=re.MULTILINE).splitlines()
    return dict(zip(symbols, names, strict=True))


def hot(found: list[Binary]) -> list[tuple[Hot, Binary]]:
    """The kernels that HOT names, in its order."""
    return [(rule, binary) for rule in HOT for binary in found if re.fullmatch(rule.kernel, binary.kernel)]


def complaints(rule: Hot, binary: Binary) -> list[str]:
    """In what a kernel is not what it must be; empty where it is."""
    checks = {
        f"{binary.registers} registers, and {rule.registers} are planned": binary.registers > rule.registers,
        f"{binary.narrow} accesses of less than 16 bytes, and {rule.narrow} are planned": binary.narrow > rule.narrow,
        "no load of 16 bytes": rule.loads and not binary.wide(binary.loads),
        "no store of 16 bytes": rule.stores and not binary.wide(binary.stores),
    }
    return [f"{binary.kernel} for {binary.arch}: {words}" for words, wrong in checks.items() if wrong]


def table(found: dict[str, list[Binary]], nvcc: str) -> str:
    """A page about the kernels of each architecture."""
    lines = [
        "# The CUDA C++ kernels as compiled",
        "",
        f"What `python -m tests.cuda.binaries --table` read from the library that nvcc {nvcc} made: no figure here is",
        "a speed. `local` counts the instructions that touch local memory, spills among them; `16 bytes` and `less`",
        "the loads and stores of device memory by width: what belongs to a sample, a channel or a group is narrow.",
        "",
        "| architecture | kernels | most registers | with local memory | hot ones | not as planned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arch, every in found.items():
        local, rows = sum(b.stack + b.local > 0 for b in every), hot(every)
        wrong = sum(bool(complaints(rule, b)) for rule, b in rows)
        most = max(b.registers for b in every)
        lines.append(f"| {arch} | {len(every)} | {most} | {local} | {len(rows)} | {wrong} |")
    lines += [
        "",
        f"The hot ones, for {', '.join(arch for arch in found if arch in TABLE_OF or len(found) == 1)}:",
        "",
        "| kernel | architecture | registers | shared bytes | local | 16 bytes | less |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for arch, every in found.items() if arch in TABLE_OF or len(found) == 1 for row in hot(every)]
    for _, b in sorted(rows, key=lambda row: HOT.index(row[0])):
        wide = b.wide(b.loads) + b.wide(b.stores)
        lines.append(f"| `{b.kernel}` | {b.arch} | {b.registers} | {b.shared} | {b.local} | {wide} | {b.narrow} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="or a cubin; by default that of this package")
    parser.add_argument("--arch", action="append", help="such as sm_90; by default all")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    found = {arch: binaries(arch, options.library) for arch in options.arch or architectures(options.library)}
    if options.table:
        print(table(found, _native.build_info()["cuda"]["nvcc"]))
    else:
        for every in found.values():
            for binary in every:
                print(json.dumps(asdict(binary)))


if __name__ == "__main__":
    main()
