"""Random calls of every op: options that cover all pairs of their values, sizes around the edges of blocks.

    python -m tests.ops.random_cases --cases 20000 --backend native --most 8192 \\
        --record tests/ops/records/random-cases.json
    python -m tests.ops.random_cases --op group_norm_silu --cases 500      of one op alone
    python -m tests.ops.random_cases --op group_norm_silu --number 17      one of them again

A case is a function of its op and its number alone. Its result is held against the reference by the one tolerance rule,
output by output and gradient by gradient.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastddpm
from fastddpm import _native
from tests.ops.cases import (
    FLOAT,
    LAYOUTS,
    Case,
    Inputs,
    bound_table,
    drawn,
    holder_of,
    images,
    norm_weights,
    optimizer_state,
    rand,
    randn,
    signal_sigma,
    solver_table,
)
from tests.ops.test_contract import check_values, results

Choice = dict[str, Any]

RECORD = Path(__file__).parent / "records" / "random-cases.json"
CSRC = Path(__file__).parents[2] / "csrc"
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)  # or a string, in which there is none
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
YES_NO = (False, True)
FEW = 8
"""Of fewer sums the gradient is not asked for. The rule compares the norms of two rounding errors, each the sum
of as many random numbers; of one or two, either may be small by luck."""
COMMON: dict[str, Sequence[Any]] = {"dtype": tuple(DTYPES), "layout": tuple(LAYOUTS), "other layout": YES_NO}
PIXELS: dict[str, Sequence[Any]] = {"stored": ("uint8", "float"), "index": YES_NO, "flip": YES_NO}

OPTIONS: dict[str, dict[str, Sequence[Any]]] = {
    "q_sample": COMMON | PIXELS | {"returns": ("x_t", "noise", "x0", "v"), "given": YES_NO, "tensors": YES_NO},
    "diffusion_loss": COMMON
    | PIXELS
    | {
        "target": ("eps", "x0", "v", "given"), "weight": YES_NO, "vlb": ("none", "number", "samples"),
        "levels": (17, 256), "tensors": YES_NO,
    },
    "solver_step": COMMON
    | {
        "learned": YES_NO, "guidance": ("none", "number", "tensor"), "clamp": ("none", "number", "samples"),
        "noise": ("none", "given", "drawn"), "prev": YES_NO, "mask": ("none", "11", "1C", "B1", "BC"),
        "known noise": YES_NO, "tensors": YES_NO, "inplace": YES_NO,
    },
    "group_norm_silu": COMMON
    | {
        "groups": ("one", "some", "all"), "bias": ("none", "C", "BC"), "scale": YES_NO, "shift": YES_NO,
        "residual": YES_NO, "x2": YES_NO, "dropout": (0.0, 0.1, 0.5), "activation": YES_NO, "mean": (0.0, 100.0),
        "tensors": YES_NO,
    },
    "rms_norm_silu": COMMON | {"scale": YES_NO, "shift": YES_NO, "activation": YES_NO, "eps": (1e-12, 3.0)},
    "conv3x3": COMMON | {"bias": YES_NO, "outputs": (8, 31, 32, 33, 65, 170), "mean": (0.0, 100.0)},
    "linear": {
        "dtype": tuple(DTYPES), "layout": tuple(LAYOUTS), "bias": YES_NO, "residual": YES_NO, "x2": (0, 1, 12, 33, 128),
        "outputs": (8, 12, 16, 31, 32, 33, 64, 65, 128, 170), "weight": ("matrix", "filters", "columns"),
        "mean": (0.0, 100.0), "float32 y": YES_NO,
    },
    "self_attention": {
        "dtype": tuple(DTYPES), "layout": tuple(LAYOUTS), "heads": (1, 2, 3, 4),
        "numbers of a head": (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129), "mean": (0.0, 3.0),
        "scores": ("close", "far apart"), "order": ((0, 1, 2), (1, 0, 2), (0, 2, 1)),
    },
    "adam_ema": {
        "dtype": tuple(DTYPES), "layout": tuple(LAYOUTS), "clip": YES_NO, "ema": YES_NO, "mirror": YES_NO,
        "scale": YES_NO, "found_inf": ("none", "no", "yes"), "tensors": YES_NO, "decay": (0.0, 0.1),
    },
}  # fmt: skip


@cache
def pairwise(op: str) -> list[Choice]:
    """Choices of every option in which each pair of values of two options occurs: greedy, from a seed."""
    options = OPTIONS[op]
    rng = random.Random(op)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(options, 2) for x in options[a] for y in options[b]}

    def covered(choice: Choice) -> set[Any]:
        return {((a, choice[a]), (b, choice[b])) for a, b in itertools.combinations(options, 2)}

    rows = []
    while missing:
        tries = [{name: rng.choice(list(values)) for name, values in options.items()} for _ in range(30)]
        wanted = sorted(missing, key=repr)[0]
        for choice in tries:
            choice.update(dict(wanted))
        rows.append(max(tries, key=lambda choice: len(covered(choice) & missing)))
        missing -= covered(rows[-1])
    return rows


def sizes(rng: random.Random, most: int) -> tuple[int, int, int, int]:
    """B, C, H, W at the edges of blocks, of no more than ``most`` elements, and not so few that chance decides."""
    while True:
        shape = rng.choice((1, 2, 3)), rng.choice(EDGES), rng.choice(EDGES), rng.choice(EDGES)
        if most // 40 <= shape[0] * shape[1] * shape[2] * shape[3] <= most:
            return shape


def make_case(op: str, number: int, most: int = 8192) -> tuple[Case, Choice]:
    """Case ``number`` of an op, and what was chosen for it: the pairs in turn, with sizes and values of its own."""
    rows = pairwise(op)
    choice = rows[number % len(rows)]
    shape = sizes(random.Random(f"{op} {number}"), most)
    case = MAKE[op](choice, shape)
    case = replace(case, name=f"number {number}: {list(shape)} {choice}")

    def make(_: torch.Generator) -> Inputs:
        return case.make(torch.Generator().manual_seed(number))

    return replace(case, make=make), choice


def _draw(choice: Choice, batch: int) -> Inputs:
    return drawn(batch, tensors=choice["tensors"])


def _pixels(choice: Choice, shape: Sequence[int], g: torch.Generator, levels: int = 256) -> Inputs:
    """x0 and how it is read: ``shape`` is that of the result."""
    batch, rest = shape[0], shape[1:]
    stored = batch + 2 if choice["index"] else batch
    whole = choice["stored"] == "uint8"
    inputs: Inputs = dict(
        x0=images(g, stored, *rest, levels=levels) if whole else rand(g, stored, *rest),
        pixel_scale=2 / (levels - 1) if whole else 2.0,
    )
    if choice["index"]:
        inputs["index"] = torch.randint(stored, (batch,), generator=g)
    if choice["flip"]:
        inputs["flip"] = torch.rand(batch, generator=g) < 0.5
    return inputs


def _q_sample(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs = _pixels(choice, shape, g)
        t = torch.randint(10, shape[:1], generator=g)
        noise = dict(noise=randn(g, *shape)) if choice["given"] else _draw(choice, shape[0])
        return inputs | dict(t=t, table=signal_sigma(), returns=choice["returns"], dtype=FLOAT) | noise

    return Case("q_sample", "", make)


def _diffusion_loss(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    def make(g: torch.Generator) -> Inputs:
        bound = choice["vlb"] != "none"
        batch, channels, *size = shape
        pred = 0.5 * randn(g, batch, 2 * channels if bound else channels, *size)
        # t = 0, of which the decoder's bits are ill-conditioned where it is far off, has cases in the contract
        inputs: Inputs = dict(pred=pred, t=torch.randint(1, 10, (batch,), generator=g))
        inputs |= _pixels(choice, shape, g, choice["levels"]) | dict(levels=choice["levels"], table=signal_sigma())
        if choice["target"] == "given":
            inputs["target"] = 0.5 * randn(g, *shape)
        else:
            inputs |= dict(objective=choice["target"]) | _draw(choice, batch)
        if choice["weight"]:
            inputs["weight"] = 0.5 + rand(g, batch)
        if bound:
            inputs |= dict(vlb=bound_table(), vlb_weight=rand(g, batch) if choice["vlb"] == "samples" else 0.01)
        return inputs

    return Case("diffusion_loss", "", make, gradients=("pred",))


def _solver_step(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    batch, channels, height, width = shape

    def make(g: torch.Generator) -> Inputs:
        of_out = (batch, 2 * channels if choice["learned"] else channels, height, width)
        step = int(torch.randint(7, (), generator=g))
        inputs: Inputs = dict(
            x=randn(g, *shape), out=randn(g, *of_out), table=solver_table(g), inplace=choice["inplace"],
            step=torch.tensor(step) if choice["tensors"] else step,
        )  # fmt: skip
        seed = dict(seed=torch.tensor(7) if choice["tensors"] else 7, sample=torch.arange(batch) * 3)
        if choice["guidance"] != "none":
            number = choice["guidance"] == "number"
            inputs |= dict(out_uncond=randn(g, *of_out), guidance_scale=2.5 if number else torch.tensor(0.3))
        if choice["clamp"] != "none":
            inputs["clamp"] = 0.7 if choice["clamp"] == "number" else 0.5 + rand(g, batch)
        if choice["prev"]:
            inputs["pred_prev"] = randn(g, *shape)
        if choice["noise"] == "given":
            inputs["noise"] = randn(g, *shape)
        elif choice["noise"] == "drawn":
            inputs |= seed
        if choice["mask"] != "none":
            of_mask = batch if "B" in choice["mask"] else 1, channels if "C" in choice["mask"] else 1
            inputs |= dict(mask=rand(g, *of_mask, height, width), known=randn(g, *shape), known_table=rand(g, 7, 2))
            if choice["known noise"] or choice["noise"] != "drawn":
                inputs["known_noise"] = randn(g, *shape)
        return inputs

    written = ("x", "pred_prev") if choice["prev"] else ("x",)
    return Case("solver_step", "", make, written=written if choice["inplace"] else ())


def _group_norm_silu(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    batch, channels, *size = shape
    more = channels if choice["x2"] else 0
    total = channels + more
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    groups = {"one": 1, "some": divisors[len(divisors) // 2], "all": total}[choice["groups"]]
    if total // groups * size[0] * size[1] < 4:  # a group of few elements has hardly a deviation
        groups = 1

    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = dict(
            x=choice["mean"] + randn(g, *shape), num_groups=groups, activation=choice["activation"],
            **norm_weights(g, total)
        )  # fmt: skip
        if choice["x2"]:
            inputs["x2"] = choice["mean"] + randn(g, batch, more, *size)
        if choice["bias"] != "none":
            inputs["channel_bias"] = randn(g, total) if choice["bias"] == "C" else randn(g, batch, total)
        for name in ("scale", "shift"):
            if choice[name]:
                inputs[name] = 0.3 * randn(g, batch, total)
        if choice["residual"]:
            inputs["residual"] = randn(g, batch, total, *size)
        if choice["dropout"]:
            inputs |= dict(dropout=choice["dropout"], layer=3) | _draw(choice, batch)
        return inputs

    optional = {"x2": choice["x2"], "residual": choice["residual"], "scale": choice["scale"], "shift": choice["shift"]}
    # The gradient of a bias is the sum of dx over the pixels: where a channel is a group it is 0 but for rounding.
    if choice["bias"] != "none" and groups < total:
        optional["channel_bias"] = True
    several = ("weight", "bias")
    if total < FEW:
        several, optional = (), {name: on and name in ("x2", "residual") for name, on in optional.items()}
    return Case("group_norm_silu", "", make, gradients=("x", *several, *(name for name, on in optional.items() if on)))


def _rms_norm_silu(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    batch, channels = shape[:2]

    def make(g: torch.Generator) -> Inputs:
        scaled = {name: 0.3 * randn(g, batch, channels) for name in ("scale", "shift") if choice[name]}
        weight = 1 + 0.3 * randn(g, channels)
        return dict(x=randn(g, *shape), weight=weight, activation=choice["activation"], eps=choice["eps"], **scaled)

    given = ["weight", *(name for name in ("scale", "shift") if choice[name])] if channels >= FEW else []
    # x / |x| of one channel does not depend on |x|: its gradient is 0 but for rounding
    of_x = ["x"] if channels > 1 or choice["eps"] > 1 else []
    return Case("rms_norm_silu", "", make, gradients=(*of_x, *given))


def _conv3x3(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    def make(g: torch.Generator) -> Inputs:
        weight = randn(g, choice["outputs"], shape[1], 3, 3) / (9 * shape[1]) ** 0.5
        bias = {"bias": randn(g, choice["outputs"])} if choice["bias"] else {}
        return dict(x=choice["mean"] + randn(g, *shape), weight=weight, **bias)

    return Case("conv3x3", "", make, gradients=("x", "weight", *(["bias"] if choice["bias"] else [])))


def _linear(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    batch, inputs, height, width = shape
    outputs, more = choice["outputs"], choice["x2"]
    rows = (batch, height * width)

    def make(g: torch.Generator) -> Inputs:
        columns = randn(g, inputs + more, outputs) / (inputs + more) ** 0.5
        weight = columns.t() if choice["weight"] == "columns" else columns.t().contiguous()
        given: Inputs = dict(x=choice["mean"] + randn(g, *rows, inputs))
        given["weight"] = weight[:, :, None, None] if choice["weight"] == "filters" else weight
        if choice["bias"]:
            given["bias"] = randn(g, outputs)
        if more:
            given["x2"] = choice["mean"] + randn(g, *rows, more)
        if choice["residual"]:
            given["residual"] = randn(g, *rows, outputs)
        return given | (dict(dtype=torch.float32) if choice["float32 y"] else {})

    optional = {"bias": choice["bias"], "x2": more, "residual": choice["residual"]}
    return Case("linear", "", make, gradients=("x", "weight", *(name for name, on in optional.items() if on)))


def _self_attention(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    tokens, columns = shape[1], choice["heads"] * choice["numbers of a head"]
    batch = max(shape[0], 1024 // (tokens * choice["heads"]))  # not so few queries that chance decides

    def make(g: torch.Generator) -> Inputs:
        qkv = randn(g, batch, tokens, 3, columns)
        qkv[:, :, 0] *= 2.0 if choice["scores"] == "far apart" else 0.5
        qkv[:, :, 1:] += choice["mean"]
        order = choice["order"]  # of the dimensions in memory; each of these is its own inverse
        return dict(qkv=qkv.flatten(2).permute(order).contiguous().permute(order), heads=choice["heads"])

    return Case("self_attention", "", make, gradients=("qkv",))


def _adam_ema(choice: Choice, shape: tuple[int, int, int, int]) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs = optimizer_state(g, shape, shape[1:2], ()) | dict(weight_decay=choice["decay"])
        params = inputs["params"]
        if not choice["tensors"]:
            inputs["lr"] = 1e-3
        if choice["clip"]:
            inputs["max_grad_norm"] = 0.5
        if choice["ema"]:
            decay = torch.tensor(0.99, dtype=torch.float64) if choice["tensors"] else 0.99
            inputs |= dict(ema=[p + 0.1 for p in params], ema_decay=decay)
        if choice["mirror"]:
            inputs["mirror"] = [p - 0.5 for p in params]
        if choice["scale"]:
            inputs["grad_scale"] = torch.tensor(8.0, dtype=torch.float64)
        if choice["found_inf"] != "none":
            inputs["found_inf"] = torch.tensor(float(choice["found_inf"] == "yes"), dtype=torch.float64)
        return inputs

    options = [n for n in ("ema", "mirror") if choice[n]] + (["found_inf"] if choice["found_inf"] != "none" else [])
    return Case("adam_ema", "", make, written=("params", "exp_avg", "exp_avg_sq", "step", *options))


MAKE = {
    "q_sample": _q_sample, "diffusion_loss": _diffusion_loss, "solver_step": _solver_step,
    "group_norm_silu": _group_norm_silu, "rms_norm_silu": _rms_norm_silu, "adam_ema": _adam_ema,
    "conv3x3": _conv3x3, "linear": _linear, "self_attention": _self_attention,
}  # fmt: skip


def check(op: str, number: int, backend: str, most: int = 8192, device: str = "cpu") -> None:
    """Run a case on a device, and hold its results against the reference.

    Raises:
        AssertionError: a mismatch, with the command that runs the case again.
    """
    case, choice = make_case(op, number, most)
    dtype = DTYPES[choice["dtype"]]
    inputs = case.inputs(dtype, choice["layout"], device)
    if choice.get("other layout"):  # every second image lies in the other order
        other = LAYOUTS["NHWC" if choice["layout"] == "NCHW" else "NCHW"]
        pictures = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() == 4]
        for name in pictures[1::2]:
            inputs[name] = inputs[name].contiguous(memory_format=other)
    try:
        with fastddpm.use_backend(backend):
            found = results(case, inputs, dtype)
        check_values(case, found, inputs, dtype, backend)
    except Exception as error:
        again = f"python -m tests.ops.random_cases --op {op} --number {number} --backend {backend} --most {most}"
        again += f" --device {device}" if device != "cpu" else ""
        raise AssertionError(f"{op}, {case.name}\n{error}\n{again}") from error


def numbered(count: int, first: int = 0, backend: str = "native", only: str | None = None) -> list[tuple[str, int]]:
    """The ops that have this backend, in turn: ``only`` one, or those of $FASTDDPM_RANDOM_OPS where it names some."""
    named = [only] if only else os.environ.get("FASTDDPM_RANDOM_OPS", " ".join(MAKE)).split()
    ops = [op for op in MAKE if op in named and backend in holder_of(op).present]
    return [(ops[i % len(ops)], i // len(ops)) for i in range(first, first + count)]


def sources() -> str:
    """A digest of the native code for CPUs, but for its comments and how its lines are broken: what a record is of."""
    sha = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file() and "cuda" not in str(p.relative_to(CSRC))):
        text = COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else " ", path.read_text(encoding="utf-8"))
        sha.update("\0".join([str(path.relative_to(CSRC)), *text.split()]).encode())
    return sha.hexdigest()[:16]


def _mismatches(first: int, count: int, backend: str, most: int, only: str | None) -> list[str]:
    torch.set_num_threads(1)
    found = (_mismatch(op, number, backend, most) for op, number in numbered(count, first, backend, only))
    return [text for text in found if text is not None]


def _mismatch(op: str, number: int, backend: str, most: int) -> str | None:
    try:
        check(op, number, backend, most)
    except AssertionError as error:
        return str(error)
    return None


def run(
    count: int, backend: str, most: int, processes: int, only: str | None = None, part: int = 100
) -> dict[str, Any]:
    """Many cases over processes, of all ops in turn or of one, as a record."""
    begin = time.time()
    firsts = range(0, count, part)
    with ProcessPoolExecutor(processes) as pool:
        counts = [min(part, count - first) for first in firsts]
        shared = ([x] * len(firsts) for x in (backend, most, only))
        parts = pool.map(_mismatches, firsts, counts, *shared)
        mismatches = [text for found in parts for text in found]
    native = _native.build_info()
    return {
        "command": f"python -m tests.ops.random_cases --cases {count} --backend {backend} --most {most}"
        + (f" --op {only}" if only else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "sources": sources() if backend == "native" else None,
        "cases": count,
        "mismatches": len(mismatches),
        "first mismatches": mismatches[:10],
        "cases of each op": dict(Counter(op for op, _ in numbered(count, 0, backend, only))),
        "choices that cover all pairs": {op: len(pairwise(op)) for op in MAKE},
        "seconds": round(time.time() - begin),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": native["cpu"],
        "instruction set": native["native"]["instruction_set"] if native["native"] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--most", type=int, default=8192, help="elements of an image")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--op", choices=sorted(MAKE))
    parser.add_argument("--number", type=int)
    parser.add_argument("--device", default="cpu", help="of the one case")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.number is not None:
        if options.op is None:
            parser.error("--number is that of a case of one op: give --op, too")
        check(options.op, options.number, options.backend, options.most, options.device)
        print("within the tolerance rule")
        return
    record = run(options.cases, options.backend, options.most, options.processes, options.op)
    text = json.dumps(record, indent=2) + "\n"
    print(text)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(text, encoding="utf-8")
    raise SystemExit(bool(record["mismatches"]))


if __name__ == "__main__":
    main()
