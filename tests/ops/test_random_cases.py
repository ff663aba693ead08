"""Random calls against the reference: none differs, and planted faults are found."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import _native
from tests.ops import random_cases
from tests.ops.cases import holder_of
from tests.ops.random_cases import MAKE, OPTIONS, check, make_case, numbered, pairwise
from tests.ops.test_contract import ON_A_GPU as CALLED_ON_A_GPU

NATIVE, TRITON, PART = 2000, 150, 50


@pytest.mark.parametrize("first", range(0, NATIVE, PART))
def test_native(first: int) -> None:
    lacks = holder_of("q_sample").implementation("native").unsupported(x0=torch.zeros(1, 1, 1, 1), dtype=torch.float32)
    if lacks:
        pytest.skip(f"native: {lacks}")
    for op, number in numbered(PART, first):
        check(op, number, "native")


@pytest.mark.parametrize("first", range(0, TRITON, 10))
def test_triton(first: int) -> None:
    pytest.importorskip("triton")
    from fastddpm.ops import triton_common

    if not triton_common.INTERPRETED:
        pytest.skip("on a GPU the contract tests run these kernels: the cases here are on the CPU")
    for op, number in numbered(10, first, "triton"):
        check(op, number, "triton", most=512)


ON_A_GPU = {"native": 50, "triton": 12}  # of each op; of Triton's each compiles kernels
LARGE = 2**16  # elements: more than a block, or a cluster, of most kernels


def check_on(device: str, op: str, backend: str, count: int, most: int) -> None:
    for number in range(count):
        check(op, number, backend, most, device)


@pytest.mark.gpu
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("op", "backend"), [(o, b) for o, b in CALLED_ON_A_GPU if b in ON_A_GPU])
def test_on_a_gpu(op: str, backend: str) -> None:
    check_on("cuda", op, backend, ON_A_GPU[backend], LARGE)


def test_the_same_on_a_cpu() -> None:
    """A few, of the code that runs on a GPU."""
    for op, backend in CALLED_ON_A_GPU:
        if backend == "native" and not _native.available():
            continue
        check_on("cpu", op, backend, 2, 512 if backend == "triton" else LARGE)


@pytest.mark.parametrize("op", sorted(MAKE))
def test_every_pair_of_options_occurs(op: str) -> None:
    rows, options = pairwise(op), OPTIONS[op]
    for a, b in itertools.combinations(options, 2):
        found = {(row[a], row[b]) for row in rows}
        assert found == set(itertools.product(options[a], options[b])), (a, b)
    assert len(rows) <= NATIVE // len(MAKE)
    assert make_case(op, 5)[1] == make_case(op, 5)[1]


def test_the_cases_of_one_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["random_cases", "--backend", "reference", "--most", "64", *arguments])
        with pytest.raises(SystemExit) as ended:
            random_cases.main()
        return ended.value.code

    for op in MAKE:  # the reference against itself
        monkeypatch.setattr(holder_of(op), "present", ("reference",))
    assert main("--op", "q_sample", "--cases", "3", "--processes", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["cases of each op"] == {"q_sample": 3} and record["command"].endswith(" --op q_sample")
    assert main("--number", "1") == 2 and "give --op" in capsys.readouterr().err


def test_the_committed_record_is_of_these_kernels(request: pytest.FixtureRequest) -> None:
    """A change of a kernel does not fail `make test`, which warns; it does fail `make test-all`."""
    record = json.loads(random_cases.RECORD.read_text(encoding="utf-8"))
    assert record["cases"] == 20000 and record["mismatches"] == 0
    assert set(record["cases of each op"]) == set(MAKE)
    if record.get("sources") == random_cases.sources():
        return
    text = "tests/ops/records/random-cases.json is of other kernels than those in csrc: build these, and renew it with "
    text += f"{record['command']} --record tests/ops/records/random-cases.json"
    if request.config.getoption("--run-slow"):
        pytest.fail(text)
    warnings.warn(text, stacklevel=1)


def test_a_change_of_a_kernel_is_seen_and_one_of_a_comment_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(random_cases, "CSRC", tmp_path)

    def digest_of(file: str, text: str) -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
        return random_cases.sources()

    before = digest_of("op/op_cpu.cpp", 'int a = 1;  // one\nconst char* url = "a//b";\n')
    assert digest_of("op/op_cpu.cpp", '/* of\ntwo lines */ int a = 1;\n\nconst char* url = "a//b";') == before
    number = digest_of("op/op_cpu.cpp", 'int a = 2;\nconst char* url = "a//b";')
    string = digest_of("op/op_cpu.cpp", 'int a = 1;\nconst char* url = "a//c";')
    assert len({before, number, string, digest_of("common/vec.h", "int b;")}) == 4
    assert random_cases.sources() == digest_of("op/op_cuda.cu", "int c;") == digest_of("op/op_cuda.cu", "int d;")


# Faults, each put into the reference under the name of another implementation.

Fault = Callable[[Any], Any]


def wrong_tail(reference: Any) -> Any:
    """The last element of an image whose size is 1 more than a multiple of 16 is not written."""

    def forward(x: Tensor, *args: Any, **options: Any) -> Any:
        y, *rest = reference.forward(x, *args, **options)
        if y.numel() % 16 == 1:
            y.flatten()[-1] = 0
        return y, *rest

    return SimpleNamespace(forward=forward)


def uncentred_variance(reference: Any) -> Any:
    """E[x^2] - E[x]^2 in place of the centred variance."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, **options: Any) -> Any:
        y, h, saved = reference.forward(x, weight, bias, num_groups, **options)
        plain = all(options[n] is None for n in ("channel_bias", "residual", "x2", "scale", "shift"))
        if not plain or options["activation"] or options["dropout"]:
            return y, h, saved
        groups = x.float().reshape(x.shape[0], num_groups, -1)
        variance = groups.square().mean(2) - groups.mean(2).square()
        n = ((groups - groups.mean(2)[..., None]) / (variance + options["eps"]).sqrt()[..., None]).reshape(x.shape)
        return torch.empty_like(y).copy_(n * weight[:, None, None] + bias[:, None, None]), h, saved

    return SimpleNamespace(forward=forward)


def shift_of_the_first_sample(reference: Any) -> Any:
    def forward(*args: Any, shift: Tensor | None, **options: Any) -> Any:
        first = None if shift is None else shift[:1].expand_as(shift)
        return reference.forward(*args, shift=first, **options)

    return SimpleNamespace(forward=forward)


def lane_off_by_one(reference: Any) -> Any:
    """The noise of an element is that of its neighbour."""

    def forward(x0: Tensor, *args: Any, **options: Any) -> Any:
        out = reference.forward(x0, *args, **options)
        if options["returns"] == "noise" and options["noise"] is None:
            return out[0], out[1].roll(1, -1)
        return out

    return SimpleNamespace(forward=forward)


def flip_ignored_for_odd_widths(reference: Any) -> Any:
    def forward(x0: Tensor, *args: Any, flip: Tensor | None, **options: Any) -> Any:
        return reference.forward(x0, *args, flip=None if x0.shape[3] % 2 else flip, **options)

    return SimpleNamespace(forward=forward)


def mask_of_the_first_channel(reference: Any) -> Any:
    def forward(*args: Any, mask: Tensor | None, **options: Any) -> Any:
        return reference.forward(*args, mask=None if mask is None else mask[:, :1], **options)

    return SimpleNamespace(forward=forward)


def weight_left_out(reference: Any) -> Any:
    def forward(*args: Any, weight: Tensor | None, **options: Any) -> Any:
        return reference.forward(*args, weight=None if weight is None else weight.mean().expand_as(weight), **options)

    return SimpleNamespace(forward=forward)


def decay_a_tenth_too_large(reference: Any) -> Any:
    def forward(*args: Any, weight_decay: float, **options: Any) -> Any:
        return reference.forward(*args, weight_decay=1.1 * weight_decay, **options)

    return SimpleNamespace(forward=forward)


def scale_of_all_heads(reference: Any) -> Any:
    """sqrt(C) in place of sqrt(d)."""

    def forward(qkv: Tensor, heads: int, training: bool) -> Any:
        queries, others = qkv.tensor_split((qkv.shape[2] // 3,), dim=2)
        return reference.forward(torch.cat((queries * heads**-0.5, others), dim=2), heads, training)

    return SimpleNamespace(forward=forward)


FAULTS = [
    ("rms_norm_silu", wrong_tail), ("rms_norm_silu", shift_of_the_first_sample),
    ("group_norm_silu", uncentred_variance), ("group_norm_silu", shift_of_the_first_sample),
    ("q_sample", lane_off_by_one), ("q_sample", flip_ignored_for_odd_widths),
    ("solver_step", mask_of_the_first_channel), ("diffusion_loss", weight_left_out),
    ("adam_ema", decay_a_tenth_too_large), ("linear", wrong_tail),
    ("self_attention", wrong_tail), ("self_attention", scale_of_all_heads),
]  # fmt: skip


@pytest.mark.parametrize(("op", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_fault_is_found(op: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = holder_of(op)
    reference = holder.loaded["reference"]
    planted = fault(reference)
    planted.unsupported = lambda **_: None
    planted.backward = getattr(reference, "backward", None)
    monkeypatch.setattr(holder, "present", ("reference", "native"))
    monkeypatch.setitem(holder.loaded, "native", planted)
    with pytest.raises(AssertionError, match=f"python -m tests.ops.random_cases --op {op} --number"):
        for number in range(NATIVE // len(MAKE)):
            check(op, number, "native")
