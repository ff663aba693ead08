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
    on a multiprocessor). ``loads`` and ``stores``: how many instructions at least move 16 bytes or more of device
    memory, so that one that is taken apart is missed; ``narrow`` how many at most move less: numbers of a sample, a
    channel or a group.
    """

    kernel: str
    registers: int
    loads: int
    stores: int
    narrow: int


# 64 registers leave room for 1,024 threads on a multiprocessor, 80 for 768, 128 for 512; blocks have 128 or 256.
HALF = "(?:bf16|f16)"
HOT = [
    Hot(r"normal_kernel<Tile<4, 0>, float>", 32, 0, 1, 3),
    Hot(r"normal_kernel<Tile<4, 3>, float>", 40, 0, 3, 3),
    Hot(r"normal_kernel<Tile<4, 4>, float>", 40, 0, 4, 3),
    Hot(rf"normal_kernel<Tile<8, 0>, {HALF}>", 32, 0, 1, 3),
    Hot(rf"normal_kernel<Tile<8, 3>, {HALF}>", 48, 0, 3, 3),
    Hot(rf"normal_kernel<Tile<8, 4>, {HALF}>", 64, 0, 4, 3),
    Hot(r"q_sample_kernel<Elements<4, 2>, unsigned char, float>", 48, 0, 8, 12),
    Hot(r"q_sample_kernel<Elements<4, 2>, float, float>", 48, 2, 8, 10),
    Hot(rf"q_sample_kernel<Elements<8, 1>, unsigned char, {HALF}>", 48, 0, 4, 11),
    Hot(rf"q_sample_kernel<Elements<8, 1>, {HALF}, {HALF}>", 48, 1, 4, 10),
    # a thread reads 24 bytes of half-precision RGB 8 at a time, and writes them by way of shared memory
    Hot(r"q_sample_kernel<Pixels<3>, unsigned char, float>", 64, 0, 12, 13),
    Hot(r"q_sample_kernel<Pixels<3>, float, float>", 64, 3, 12, 10),
    Hot(rf"q_sample_kernel<Pixels<3>, (?:unsigned char|{HALF}), {HALF}>", 64, 0, 8, 13),
    Hot(r"q_sample_kernel<Pixels<4>, unsigned char, float>", 80, 1, 16, 10),
    Hot(r"q_sample_kernel<Pixels<4>, float, float>", 80, 4, 16, 10),
    Hot(rf"q_sample_kernel<Pixels<4>, unsigned char, {HALF}>", 64, 1, 8, 10),
    Hot(rf"q_sample_kernel<Pixels<4>, {HALF}, {HALF}>", 64, 2, 8, 10),
    Hot(r"diffusion_loss_kernel<\(Path\)0, Elements<4, 2>, .*, float>", 48, 2, 2, 9),
    Hot(rf"diffusion_loss_kernel<\(Path\)0, Elements<8, 1>, .*, {HALF}>", 48, 1, 1, 9),
    Hot(r"diffusion_loss_kernel<\(Path\)0, Pixels<3>, .*, float>", 64, 3, 3, 9),
    Hot(rf"diffusion_loss_kernel<\(Path\)0, Pixels<3>, .*, {HALF}>", 48, 0, 2, 12),
    Hot(r"diffusion_loss_kernel<\(Path\)0, Pixels<4>, .*, float>", 64, 4, 4, 9),
    Hot(rf"diffusion_loss_kernel<\(Path\)0, Pixels<4>, .*, {HALF}>", 64, 2, 2, 9),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Elements<4, 2>, unsigned char, float>", 48, 2, 2, 18),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Elements<4, 2>, float, float>", 48, 4, 2, 16),
    Hot(rf"diffusion_loss_kernel<\(Path\)1, Elements<8, 1>, unsigned char, {HALF}>", 48, 1, 1, 17),
    Hot(rf"diffusion_loss_kernel<\(Path\)1, Elements<8, 1>, {HALF}, {HALF}>", 48, 2, 1, 16),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Pixels<3>, unsigned char, float>", 64, 3, 3, 19),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Pixels<3>, float, float>", 64, 6, 3, 16),
    Hot(rf"diffusion_loss_kernel<\(Path\)1, Pixels<3>, .*, {HALF}>", 64, 0, 2, 22),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Pixels<4>, unsigned char, float>", 80, 5, 4, 16),
    Hot(r"diffusion_loss_kernel<\(Path\)1, Pixels<4>, float, float>", 80, 8, 4, 16),
    Hot(rf"diffusion_loss_kernel<\(Path\)1, Pixels<4>, unsigned char, {HALF}>", 64, 3, 2, 16),
    Hot(rf"diffusion_loss_kernel<\(Path\)1, Pixels<4>, {HALF}, {HALF}>", 64, 4, 2, 16),
    # the plain step; then that with every option
    Hot(r"solver_step_kernel<Tile<4, 0>, float, float, true>", 48, 2, 2, 20),
    Hot(rf"solver_step_kernel<Tile<4, 0>, float, {HALF}, true>", 48, 1, 2, 21),
    Hot(rf"solver_step_kernel<Tile<8, 0>, {HALF}, {HALF}, true>", 64, 2, 2, 20),
    Hot(r"solver_step_kernel<Tile<4, 3>, float, float, true>", 80, 6, 6, 20),
    Hot(rf"solver_step_kernel<Tile<4, 3>, float, {HALF}, true>", 80, 3, 6, 23),
    Hot(rf"solver_step_kernel<Tile<4, 3>, {HALF}, {HALF}, true>", 80, 0, 0, 32),  # 24 bytes a thread: 8 at a time
    Hot(r"solver_step_kernel<Tile<4, 4>, float, float, true>", 128, 8, 8, 20),
    Hot(rf"solver_step_kernel<Tile<4, 4>, float, {HALF}, true>", 128, 6, 8, 20),
    Hot(rf"solver_step_kernel<Tile<4, 4>, {HALF}, {HALF}, true>", 128, 4, 4, 20),
    Hot(r"solver_step_kernel<Tile<4, 0>, float, float, false>", 80, 8, 2, 45),
    Hot(rf"solver_step_kernel<Tile<4, 0>, float, {HALF}, false>", 80, 5, 2, 48),
    Hot(rf"solver_step_kernel<Tile<8, 0>, {HALF}, {HALF}, false>", 128, 8, 2, 53),
    Hot(r"solver_step_kernel<Tile<4, 3>, float, float, false>", 255, 29, 6, 65),
    Hot(rf"solver_step_kernel<Tile<4, 3>, float, {HALF}, false>", 255, 20, 6, 69),
    Hot(rf"solver_step_kernel<Tile<4, 3>, {HALF}, {HALF}, false>", 255, 5, 0, 90),  # 8 at a time
    Hot(r"solver_step_kernel<Tile<4, 4>, float, float, false>", 255, 40, 8, 69),
    Hot(rf"solver_step_kernel<Tile<4, 4>, float, {HALF}, false>", 255, 28, 8, 73),
    Hot(rf"solver_step_kernel<Tile<4, 4>, {HALF}, {HALF}, false>", 255, 18, 4, 73),
    # group_norm_silu, forward: four blocks of 256 in half precision, three in float32; two with a residual (true)
    Hot(rf"one_read_kernel<Copied<{HALF}, .*>, false>", 64, 8, 1, 30),
    Hot(r"one_read_kernel<Copied<float, .*>, false>", 80, 8, 1, 30),
    Hot(r"one_read_kernel<Copied<.*>, true>", 128, 12, 2, 30),
    Hot(r"moments_kernel<Copied<.*, false> >", 128, 12, 1, 0),  # NCHW
    Hot(r"moments_kernel<Copied<.*, true> >", 128, 12, 4, 0),  # NHWC
    Hot(r"apply_kernel<Copied<.*> >", 128, 12, 2, 30),
    Hot(r"cooperative_kernel<Copied<.*, false> >", 80, 26, 3, 47),
    Hot(r"cooperative_kernel<Copied<.*, true> >", 80, 26, 6, 47),
    # backward: three blocks, two with a residual
    Hot(r"one_read_backward_kernel<Copied<.*>, false>", 80, 8, 1, 62),
    Hot(rf"one_read_backward_kernel<Copied<{HALF}, true>, true>", 128, 13, 2, 63),
    Hot(r"one_read_backward_kernel<Copied<(?:.*, false|float, true)>, true>", 128, 14, 2, 62),
    Hot(r"sums_kernel<Copied<.*, false> >", 128, 13, 1, 30),
    Hot(rf"sums_kernel<Copied<{HALF}, true> >", 128, 12, 4, 31),
    Hot(r"sums_kernel<Copied<float, true> >", 128, 13, 4, 30),
    Hot(r"dx_kernel<Copied<.*> >", 128, 13, 2, 32),
    Hot(r"cooperative_backward_kernel<Copied<.*, false> >", 128, 28, 4, 133),
    Hot(rf"cooperative_backward_kernel<Copied<{HALF}, true> >", 80, 27, 7, 134),
    Hot(r"cooperative_backward_kernel<Copied<float, true> >", 80, 28, 7, 133),
    *(Hot(rf"forward_rows<{HALF}, {n}>", 72, 2 * n, n, 55) for n in (1, 2, 3)),
    *(Hot(rf"forward_rows<float, {n}>", 80, 2 * n, n, 60) for n in (1, 2, 3, 4)),
    *(Hot(rf"backward_rows<{HALF}, {n}>", (104, 128, 168)[n - 1], 4 * n, n, 17) for n in (1, 2, 3)),
    *(Hot(rf"backward_rows<float, {n}>", 128, 4 * n, n, 17) for n in (1, 2, 3, 4)),
    Hot(r"forward_tiles<.*>", 64, 2, 2, 45),
    Hot(r"backward_tiles<.*>", 80, 4, 2, 51),
    Hot(r"gradient_squares_kernel<.*>", 64, 24, 0, 39),
    Hot(r"adam_ema_kernel<.*>", 64, 5, 5, 62),
]
# What may not start before the kernel in front of it has ended: words on their own, and cooperative launches.
NEVER_EARLY = r"philox_words_kernel|cooperative_(?:backward_)?kernel<.*>"
DEVICE_MEMORY = ("LD", "ST", "LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG")  # and what else points there


@dataclass(frozen=True)
class Binary:
    """A kernel as compiled for one architecture. ``stack`` is in bytes; ``local`` counts the instructions that touch
    local memory, spills among them; ``loads`` and ``stores`` those to device memory, by the bytes that one moves.
    ``early``: how many touch it before they wait for the kernel in front, or None where the kernel does not wait;
    ``kept``: how many loads may take what the processor has kept, which another kernel may have written over."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int]
    early: int | None
    kept: int

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
        kept = sum(opcode.startswith("LDG.") and "CONSTANT" in opcode.split(".") for opcode in opcodes)
        numbers = (usage["REG"], usage["SHARED"], stack, local)
        found.append(Binary(symbol, arch, *numbers, loads, stores, before_wait(opcodes), kept))
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


def before_wait(code: list[str]) -> int | None:
    """Accesses to device memory in front of the wait for the kernel before (griddepcontrol.wait); None without one."""
    names = [opcode.split(".")[0] for opcode in code]
    return sum(name in DEVICE_MEMORY for name in names[: names.index("ACQBULK")]) if "ACQBULK" in names else None


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
    loads, stores = binary.wide(binary.loads), binary.wide(binary.stores)
    checks = {
        f"{binary.registers} registers, and {rule.registers} are planned": binary.registers > rule.registers,
        f"{binary.narrow} accesses of less than 16 bytes, and {rule.narrow} are planned": binary.narrow > rule.narrow,
        f"{loads} loads of 16 bytes, and {rule.loads} are planned": loads < rule.loads,
        f"{stores} stores of 16 bytes, and {rule.stores} are planned": stores < rule.stores,
    }
    return [f"{binary.kernel} for {binary.arch}: {words}" for words, wrong in checks.items() if wrong]


def table(found: dict[str, list[Binary]], nvcc: str) -> str:
    """A page about the kernels of each architecture."""
    lines = [
        "# The CUDA C++ kernels as compiled",
        "",
        f"What `python -m tests.cuda.binaries --table` read from the library that nvcc {nvcc} made: no figure here is",
        "a speed. `local`: those that use local memory. `loads` and `stores` count the instructions that move 16 bytes",
        "of device memory, `less` those that move fewer: what belongs to a sample, a channel or a group is narrow.",
        "",
        "| architecture | kernels | most registers | local | hot ones | not as planned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arch, every in found.items():
        local, rows = sum(b.stack + b.local > 0 for b in every), hot(every)
        wrong = sum(bool(complaints(rule, b)) for rule, b in rows)
        most = max(b.registers for b in every)
        lines.append(f"| {arch} | {len(every)} | {most} | {local} | {len(rows)} | {wrong} |")
    archs = [arch for arch in found if arch in TABLE_OF or len(found) == 1]
    lines += ["", f"The hot ones, for {', '.join(archs)}; one number where these agree:", ""]
    lines += ["| kernel | registers | loads | stores | less |", "| --- | --- | --- | --- | --- |"]
    kernels: dict[str, list[Binary]] = {}
    rows = [row for arch in archs for row in hot(found[arch])]
    for _, b in sorted(rows, key=lambda row: HOT.index(row[0])):
        kernels.setdefault(b.kernel, []).append(b)
    for name, each in kernels.items():
        numbers = [[b.registers, b.wide(b.loads), b.wide(b.stores), b.narrow] for b in each]
        cells = [" / ".join(map(str, n if len(set(n)) > 1 else n[:1])) for n in zip(*numbers, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
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
