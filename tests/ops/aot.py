"""Compiles what the Triton implementations launch, for NVIDIA GPUs that need not be there, and reads the binaries.

    python -m tests.ops.aot group_norm_silu --arch 90           the hot shapes of an op, as lines of JSON
    python -m tests.ops.aot --table >docs/triton-binaries.md    all of them, as a table

The launchers run on tensors without values, and what they would launch is recorded: kernel, arguments, meta-parameters.
So what is compiled here cannot differ from what runs on a GPU. Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
NHWC = torch.channels_last
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what it is compiled from."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel needs of a GPU. ``local`` counts the instructions that touch local memory, spills among
    them; ``wide`` and ``narrow`` the accesses to device memory of 16 bytes, and of less."""

    case: str
    kernel: str
    arch: int
    threads: int
    registers: int
    stack: int
    local: int
    wide: int
    narrow: int


def recorded(op: str, call: Callable[[Any], object]) -> list[Launch]:
    """What ``call``, which is given the module of an implementation, would launch."""
    module = importlib.import_module(f"fastddpm.ops.{op}.triton_impl")
    launches = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        launches.append(Launch(kernel, grid, arguments, options))

    name = "launch" if hasattr(module, "launch") else "run"  # of an operator that torch.compile does not see into
    as_it_was = getattr(module, name)
    setattr(module, name, record)
    try:
        call(module)
    finally:
        setattr(module, name, as_it_was)
    return launches


def source_of(launch: Launch, floats: str = "fp32") -> Any:
    """What Triton's launcher would compile for these arguments; torch.compile makes floats "fp64"."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = type(value)
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif kind is float:
            signature[parameter.name] = floats
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, arch: int, floats: str = "fp32") -> Any:
    """The kernel of a launch, for a GPU of this architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source_of(launch, floats), target=GPUTarget("cuda", arch, 32), options=launch.options)


def dumped(result: Any, *options: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        run = subprocess.run([str(tool), *options, file.name], check=True, capture_output=True, text=True)
    return run.stdout


def used(name: str, dump: str) -> int:
    """A figure of the resource usage: REG, of a thread; STACK and LOCAL, its bytes of local memory."""
    found = re.search(rf"{name}:(\d+)", dump)
    assert found, dump
    return int(found.group(1))


def inspected(case: str, launch: Launch, arch: int) -> Binary:
    """Compile, and read the binary."""
    dump = dumped(compiled(launch, arch), "-res-usage", "-sass")
    memory = re.findall(r"\b(LDG|STG)\.E(\S*)", dump)
    wide = sum(".128" in width for _, width in memory)
    return Binary(
        case=case,
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        threads=32 * launch.options.get("num_warps", 4),
        registers=used("REG", dump),
        stack=used("STACK", dump),
        local=len(re.findall(r"\b(?:LDL|STL)\b", dump)),
        wide=wide,
        narrow=len(memory) - wide,
    )


# The hot shapes: those of the CIFAR-10 U-Net, and images.


def empty(*shape: int, dtype: torch.dtype = torch.float32, memory_format: Any = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def rows(count: int) -> Tensor:
    return empty(count, dtype=torch.int64)


DRAWN = dict(seed=rows(1)[0], step=rows(1)[0])
IMAGES = {"128x3x32x32": (128, 3, 32, 32), "8x3x256x256": (8, 3, 256, 256)}
ACTIVATIONS = {
    "128x128x32x32": (128, 128, 32, 32), "128x256x16x16": (128, 256, 16, 16), "128x512x8x8": (128, 512, 8, 8),
    "128x256x4x4": (128, 256, 4, 4), "4x128x256x256": (4, 128, 256, 256),
}  # fmt: skip
NONE = dict.fromkeys(("channel_bias", "scale", "shift", "residual", "x2"))


def unwrapped(module: Any) -> Any:
    """The module with its operators as the functions they were made from, which meta tensors can go through."""
    for name, value in list(vars(module).items()):
        if hasattr(value, "_init_fn"):
            setattr(module, name, value._init_fn)
    return module


def q_sample(module: Any, shape: tuple[int, ...]) -> None:
    unwrapped(module).forward(
        empty(*shape, dtype=torch.uint8), rows(shape[0]), empty(1000, 2), index=None, flip=None, pixel_scale=0.1,
        pixel_shift=-1.0, noise=None, sample=rows(shape[0]), returns="x_t", dtype=torch.bfloat16, **DRAWN,
    )  # fmt: skip


def normal(module: Any, shape: tuple[int, ...]) -> None:
    unwrapped(module).forward(shape, sample=rows(shape[0]), stream=1, dtype=torch.float32, **DRAWN)


def solver_step(module: Any, shape: tuple[int, ...]) -> None:
    unwrapped(module).forward(
        empty(*shape), empty(*shape, dtype=torch.bfloat16), empty(50, 9), DRAWN["step"],
        pred_prev=None, out_uncond=None,
        guidance_scale=1.0, clamp=1.0, noise=None, seed=DRAWN["seed"], sample=rows(shape[0]), mask=None, known=None,
        known_table=None, known_noise=None, inplace=False,
    )  # fmt: skip


def diffusion_loss(module: Any, shape: tuple[int, ...]) -> None:
    unwrapped(module).forward(
        empty(*shape, dtype=torch.bfloat16), rows(shape[0]), target=None, objective="eps", table=None, x0=None,
        index=None, flip=None, pixel_scale=0.1, pixel_shift=-1.0, sample=rows(shape[0]), weight=empty(shape[0]),
        vlb=None, vlb_weight=0.0, levels=256, gradient_scale=2.0**20, **DRAWN,
    )  # fmt: skip


def activation(shape: tuple[int, ...]) -> Tensor:
    return empty(*shape, dtype=torch.bfloat16, memory_format=NHWC)


def group_norm_silu(module: Any, shape: tuple[int, ...]) -> None:
    x, weight = activation(shape), empty(shape[1])
    nothing = dict(seed=None, sample=None, step=None, layer=0, dropout=0.0, activation=True)
    inputs = NONE | dict(channel_bias=empty(*shape[:2], dtype=torch.bfloat16))
    _, _, saved = unwrapped(module).forward(x, weight, weight, 32, eps=1e-6, **inputs, **nothing)
    module.backward(x, None, saved, x, weight, weight, 32, **inputs, **nothing)


def rms_norm_silu(module: Any, shape: tuple[int, ...]) -> None:
    x, weight = activation(shape), empty(shape[1])
    options = dict(scale=None, shift=None, eps=1e-12, activation=True)
    unwrapped(module).forward(x, weight, **options)
    module.backward(x, (), x, weight, **options)


def adam_ema(module: Any, shape: tuple[int, ...]) -> None:
    params = [torch.zeros(shape)]
    mirror = [torch.zeros(shape, dtype=torch.bfloat16)]
    unwrapped(module).forward(
        params, params, params, params, step=torch.zeros((), dtype=torch.int64), lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0, max_grad_norm=1.0, ema=params, ema_decay=0.99, mirror=mirror, grad_scale=None, found_inf=None,
    )  # fmt: skip


HOT: dict[str, tuple[Callable[[Any, tuple[int, ...]], None], dict[str, tuple[int, ...]]]] = {
    "q_sample": (q_sample, IMAGES),
    "normal": (normal, IMAGES),
    "solver_step": (solver_step, IMAGES),
    "diffusion_loss": (diffusion_loss, IMAGES),
    "group_norm_silu": (group_norm_silu, ACTIVATIONS),
    "rms_norm_silu": (rms_norm_silu, {name: ACTIVATIONS[name] for name in ("128x128x32x32", "128x512x8x8")}),
    "adam_ema": (adam_ema, {"256x256x3x3": (256, 256, 3, 3)}),
}


def binaries(op: str, arch: int) -> list[Binary]:
    """Those of the hot shapes of an op; a kernel that two shapes share in all it is compiled from comes twice."""
    call, shapes = HOT[op]
    found = []
    for name, shape in shapes.items():
        launches = recorded(op, lambda module, shape=shape: call(module, shape))
        hot = [launch for launch in launches if launch.kernel.fn.__name__ != "write_addresses_kernel"]
        found += [inspected(f"{op} {name}", launch, arch) for launch in hot]
    return found


def table(rows: list[Binary]) -> str:
    lines = [
        "# The Triton kernels as compiled",
        "",
        "What `python -m tests.ops.aot --table` read from the binaries: no figure here is a speed. `local` counts the",
        "instructions that touch local memory, spills among them; `16 bytes` and `less` the loads and stores of device",
        "memory by width: what belongs to a sample, a channel or a group is narrow.",
        "",
        "| case | kernel | sm | threads | registers | local | 16 bytes | less |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([
        *lines,
        *(
            f"| {b.case} | {b.kernel} | {b.arch} | {b.threads} | {b.registers} | {b.local} | {b.wide} | {b.narrow} |"
            for b in rows
        ),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="all by default")
    parser.add_argument("--arch", type=int, action="append", help="80, 90, 100: all by default")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    found = [b for op in options.ops or HOT for arch in options.arch or ARCHITECTURES for b in binaries(op, arch)]
    if options.table:
        print(table(found))
    else:
        for b in found:
            print(json.dumps(asdict(b)))


if __name__ == "__main__":
    main()
