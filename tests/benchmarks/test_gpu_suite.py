"""The suite for a GPU, as far as it goes without one: its cases run, its records resume, its report can be read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastddpm
from benchmarks import gpu_suite
from benchmarks.gpu_suite import PARTS, Part, Record, fastest, is_complete, main, measure, read, report, run_parts

RATES = {"copy": 3e12, "draw": 5e11, "launch": 2e-6}


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--parts", "ops,tets"])
    assert "no part is called 'tets'" in capsys.readouterr().err


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run once, on the CPU, and take a microsecond."""

    def seconds_of(calls: Sequence[Any], rounds: int = 5) -> float:
        for call in calls:
            call()
        return 1e-6

    monkeypatch.setattr(gpu_suite, "seconds_of", seconds_of)
    monkeypatch.setattr(gpu_suite, "rotated", lambda size: 2)
    monkeypatch.setattr(gpu_suite, "BACKENDS", ("reference", "native"))


@pytest.mark.parametrize("op", sorted({case[0] for case in gpu_suite.cases()}))
def test_every_op_runs_with_every_contestant(op: str, tmp_path: Path, by_the_clock: None) -> None:
    record = Record(tmp_path / "ops.jsonl")
    shape = {"adam_ema": (4, 4, 3, 3), "normal": (2, 3, 4, 4)}.get(op, (2, 32, 4, 4))
    shape = (2, 3, 4, 4) if op in ("q_sample", "diffusion_loss", "solver_step") else shape
    measure(record, RATES, op, shape, torch.float32, "somewhere", False)
    lines = read(tmp_path / "ops.jsonl")
    assert [line["contestant"] for line in lines] == ["reference", "native", "eager"]
    assert all("error" not in line and line["seconds"] == 1e-6 and line["floor"] > 0 for line in lines), lines
    measure(Record(tmp_path / "ops.jsonl"), RATES, op, shape, torch.float32, "somewhere", False)
    assert read(tmp_path / "ops.jsonl") == lines  # what is there is not measured again


def test_what_a_contestant_raises_is_a_line(tmp_path: Path, by_the_clock: None) -> None:
    measure(Record(tmp_path / "ops.jsonl"), RATES, "group_norm_silu", (2, 33, 4, 4), torch.float32, "somewhere", False)
    lines = read(tmp_path / "ops.jsonl")
    assert len(lines) == 3 and all("ValueError" in line["error"] or "RuntimeError" in line["error"] for line in lines)
    assert any("raised" in line for line in report(tmp_path))


def test_the_cases_cover_the_networks() -> None:
    cases = list(gpu_suite.cases())
    assert len({(op, tuple(shape), dtype) for op, shape, dtype, *_ in cases}) == len(cases)
    norms = {tuple(shape[1:3]) for op, shape, *_ in cases if op == "group_norm_silu_backward"}
    assert {(128, 256), (192, 64), (576, 16), (1152, 16), (320, 64), (2560, 8), (512, 4)} <= norms
    assert all(hasattr(gpu_suite.test_ops, case[0]) for case in cases)


def test_parts_resume_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def run(command: list[str], *, timeout: float, **_: Any) -> Any:
        called.append(command[-1])
        if command[-1] == "second" and called.count("second") == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=1 if command[-1] == "third" else 0)

    monkeypatch.setattr(gpu_suite, "PARTS", {name: Part(lambda _: None, 60) for name in ("first", "second", "third")})
    monkeypatch.setattr(subprocess, "run", run)
    assert not run_parts(tmp_path, ["first", "second", "third"], 100)
    assert is_complete(tmp_path, "first") and not is_complete(tmp_path, "second")
    assert run_parts(tmp_path, ["first", "second"], 100)
    assert called == ["first", "second", "third", "second"]
    assert not run_parts(tmp_path, ["third"], 1)  # no time left: not started
    assert called[-1] == "second"


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    path.write_text(json.dumps({"case": "a"}) + "\n" + '{"case": "b', encoding="utf-8")
    assert [line["case"] for line in read(path)] == ["a"]


def record_of(out: Path) -> None:
    """Of a GPU that never was: Triton is the faster one for small images, CUDA C++ for large ones."""
    ops = Record(out / "ops.jsonl")
    ops.add(rates=RATES, device="a GPU that never was")
    for batch in (1, 16, 256, 4096):
        for dtype in ("torch.float32", "torch.bfloat16"):
            for name, seconds in (("triton", 2e-6 + batch * 3e-9), ("native", 3e-6 + batch * 2e-9), ("eager", 1e-5)):
                ops.add(
                    case=f"q_sample {batch} {dtype} {name}", op="q_sample", shape=[batch, 3, 32, 32], dtype=dtype,
                    source="pictures", contestant=name, seconds=seconds, bytes=batch * 15360, floor=batch * 5e-9,
                    launch=2e-6,
                )  # fmt: skip
    Record(out / "tests.jsonl").add(case="tests/ops", returncode=1, output="1 failed, 20 passed in 3 s")


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    record_of(tmp_path)
    assert fastest(read(tmp_path / "ops.jsonl")) == {"q_sample": [(256 * 3072, "triton"), (4096 * 3072, "native")]}
    assert main(["--out", str(tmp_path), "--report"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "a GPU that never was" in text and "tests/ops: FAILED; 1 failed, 20 passed" in text
    assert "| q_sample 16 torch.bfloat16 | pictures | 0.1 | 2.0 (4%) | 3.0 (3%) | 10.0 (1%) |" in text
    defaults = (tmp_path / "defaults.md").read_text(encoding="utf-8")
    assert "\"q_sample\": ((786_432, 'triton'), (12_582_912, 'native'), )," in defaults
    pytest.importorskip("matplotlib")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_every_part_has_a_limit_within_that_of_the_suite() -> None:
    assert all(0 < part.seconds < gpu_suite.SECONDS < 540 for part in PARTS.values())
    assert fastddpm is gpu_suite.fastddpm
