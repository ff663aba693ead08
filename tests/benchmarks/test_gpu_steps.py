"""Training, sampling and scripts in the GPU suite, without a GPU: what runs, the record, going on, the page."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo

from benchmarks import conv_floor, gpu_record, gpu_report, gpu_report_steps, gpu_scripts, gpu_steps, gpu_suite
from benchmarks.gpu_steps import StepCase
from benchmarks.peers import contestants
from benchmarks.peers.contestants import DIFFUSERS, LARGE, OURS, TINY, TORCH, Contestant
from fastddpm import UNet
from tests.launched import launch_on_cpu

PARTS = gpu_steps.parts()
CASES = [case for part in PARTS for case in part.cases]
TINY_PARTS = {part.name: part for part in gpu_steps.parts(tiny=True)}
LATER = float("inf")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One turn, on the CPU; torch.compile compiles nothing."""
    monkeypatch.setattr(gpu_steps, "WARM_UP", 0)
    monkeypatch.setattr(gpu_steps, "TURNS", 1)
    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu")
    monkeypatch.setattr(contestants, "DEVICE", "cpu")
    with torch._dynamo.config.patch(disable=True):
        yield


def alone(monkeypatch: pytest.MonkeyPatch, *everyone: Contestant) -> None:
    monkeypatch.setattr(StepCase, "contestants", lambda case: list(everyone))


# what is measured


def test_every_setting_that_was_asked_for_has_a_case() -> None:
    batches = {(c.task, c.batch) for c in CASES if c.network == "cifar-10"}
    assert batches == set(itertools.product(("train", "sample"), (1, 16, 128, 256, 512)))
    assert {(c.task, c.batch) for c in CASES if c.network == "256x256"} >= {("train", 8), ("sample", 8)}
    assert len({c.key for c in CASES}) == len(CASES) and len({p.name for p in PARTS}) == len(PARTS)
    for task, network, batch in gpu_steps.KINDS:
        mine = [c for c in CASES if (c.task, c.network, c.batch) == (task, network, batch)]
        ours = {(who.dtype, bool(who.compiled), who.graph) for c in mine for who in c.contestants()
                if who.library == OURS}  # fmt: skip
        assert ours >= set(itertools.product(("bfloat16",), (False, True), ("on", "off")))
        assert {c.precision for c in mine} == {"bfloat16", "tf32", "float32", "default"}
        others = {who.compiled for c in mine for who in c.contestants() if who.library in (DIFFUSERS, TORCH)}
        assert others == {"", "default", "reduce-overhead"}
    for case in CASES:
        assert len(set(case.names())) == len(case.names())
        if case.task == "sample":
            assert not any(who.ema or who.mirror or not who.deterministic for who in case.contestants())
    assert [c.key for c in CASES if any(who.mirror for who in c.contestants())] == ["train cifar-10 128 bfloat16"]


def test_the_plain_network_stands_in_where_diffusers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY_PARTS["train tiny 2"].cases[0]
    monkeypatch.setitem(contestants.PACKAGES, DIFFUSERS, ())
    assert TORCH not in {who.library for who in case.contestants()}
    monkeypatch.setitem(contestants.PACKAGES, DIFFUSERS, ("no_such_package",))
    everyone = case.contestants()
    assert TORCH in {who.library for who in everyone}
    assert [who.missing is None for who in everyone] == sorted((who.missing is None for who in everyone), reverse=True)


def test_a_part_fits_into_a_call() -> None:
    """Of ten minutes, by the estimates; and is not begun where its longest contestant would not end."""
    for part in PARTS:
        assert 0 < part.predicted < part.limit < 560
        assert part.least < part.predicted + gpu_steps.FLOOR
    for part in gpu_scripts.parts():
        assert 0 < part.predicted <= part.limit


def test_estimates_are_of_the_networks() -> None:
    assert conv_floor.flops(conv_floor.CIFAR10) == pytest.approx(1e9 * gpu_steps.GFLOP["cifar-10"], rel=0.01)
    with torch.device("meta"):
        counts = [p.numel() for p in UNet(**LARGE.unet).parameters()]
    assert sum(counts) == 113_673_219


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_estimate_for_large_images() -> None:
    shapes = gpu_steps.shapes_of("256x256")
    assert shapes.parameters == 113_673_219
    assert conv_floor.flops(shapes) == pytest.approx(1e9 * gpu_steps.GFLOP["256x256"], rel=0.02)


# measuring, on the CPU


@pytest.mark.parametrize(
    ("name", "precisions"),
    [("train tiny 2", ("default",)), ("sample tiny 2", ("bfloat16",)), ("train tiny 2 compiled", ("bfloat16",))],
)
def test_everyone_is_measured(name: str, precisions: tuple[str, ...], quick: None, tmp_path: Path) -> None:
    part, record = TINY_PARTS[name], tmp_path / "record.jsonl"
    cases = tuple(case for case in part.cases if case.precision in precisions)
    assert cases
    part = type(part)(part.name, part.limit, cases)
    assert gpu_steps.run_part(part, record, 0.0, LATER)
    lines = gpu_record.read(record)
    rows = gpu_record.steps(lines)
    assert {(row["key"], row["contestant"]) for row in rows} == {(c.key, n) for c in cases for n in c.names()}
    assert OURS in {row["library"] for row in rows} or precisions == ("default",)
    for row in rows:
        assert "error" not in row, row
        if "not installed" not in row.get("note", ""):
            assert row["seconds"] > 0 and row["first"] > 0 and row["floor"] > 0
            assert set(row["launches"]) == set(gpu_steps.LAUNCHES)
            assert (sum(row.get("parts", {"": 1}).values()) > 0) and ("parts" in row) == (
                not row["compiled"] and row["graph"] != "on"
            )
    floors = [line for line in lines if line["kind"] == "floor"]
    assert {line["key"] for line in floors} == {row["key"] for row in rows if row["seconds"]}
    assert all(line["floor"] and len(line["layers"]) > 5 for line in floors)
    assert gpu_steps.run_part(part, record, 0.0, 0.0)  # complete: nothing is done again
    assert gpu_record.read(record) == lines


def test_the_plain_network_trains_and_samples(quick: None) -> None:
    """As another library's would; compared with itself under torch's own optimiser there is nothing to be wrong."""
    for task in ("train", "sample"):
        case = StepCase("", task, "tiny", 2, "float32")
        row = gpu_steps.attempt(case, Contestant(TORCH, channels_last=True), 0.0)
        assert row["seconds"] > 0 and "error" not in row
    workshop = contestants.Workshop(TINY)
    images = workshop.sampling(Contestant(TORCH, channels_last=True), 2, 3)()
    assert isinstance(images, torch.Tensor) and images.shape == (2, 3, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1 and float(images.std()) > 0.01


def test_out_of_memory_is_a_row(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [
        torch.OutOfMemoryError("Tried to allocate 80 GiB"), RuntimeError("CUDA error: out of memory\nmore"),
        ValueError("wrong"),
    ]  # fmt: skip
    everyone = [Contestant(OURS, graph=graph) for graph in ("on", "off", "auto")]
    alone(monkeypatch, *everyone)

    def training_step(self: Any, who: Contestant, batch: int) -> Any:
        raise errors[everyone.index(who)]

    monkeypatch.setattr(contestants.Workshop, "training_step", training_step)
    part, record = TINY_PARTS["train tiny 2"], tmp_path / "record.jsonl"
    part = type(part)(part.name, part.limit, part.cases[:1])
    assert gpu_steps.run_part(part, record, 0.0, LATER)
    found = [row["error"] for row in gpu_record.steps(gpu_record.read(record))]
    assert found == [
        "out of memory: OutOfMemoryError: Tried to allocate 80 GiB",
        "out of memory: RuntimeError: CUDA error: out of memory", "ValueError: wrong",
    ]  # fmt: skip
    lines = [*gpu_record.read(record), {"kind": "end", "part": part.name, "seconds": 1.0}]
    assert gpu_suite.status_of(lines, [part]) == 1  # ours failed
    assert "out of memory: OutOfMemoryError" in "\n".join(gpu_report_steps.markdown(lines))


def test_a_floor_that_cannot_be_measured_is_told(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_floor, "conv_floor", mock.Mock(side_effect=RuntimeError("no engine")))
    alone(monkeypatch, Contestant(OURS, channels_last=True))
    part = TINY_PARTS["sample tiny 2"]
    part = type(part)(part.name, part.limit, part.cases[:1])
    assert gpu_steps.run_part(part, tmp_path / "record.jsonl", 0.0, LATER)
    lines = gpu_record.read(tmp_path / "record.jsonl")
    (row,) = gpu_record.steps(lines)
    assert row["seconds"] > 0 and row["floor"] is None
    page = gpu_report.markdown(lines, [])
    assert "floor: RuntimeError: no engine" in page


def test_nothing_is_begun_that_would_not_end(quick: None, tmp_path: Path) -> None:
    part, record = TINY_PARTS["train tiny 2"], tmp_path / "record.jsonl"
    assert not gpu_steps.run_part(part, record, 0.0, time.monotonic() + 1)
    assert gpu_record.steps(gpu_record.read(record)) == []


def test_who_ends_its_process_twice_is_left_out(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, Contestant(OURS, channels_last=True))
    part, record = TINY_PARTS["train tiny 2"], tmp_path / "record.jsonl"
    part = type(part)(part.name, part.limit, part.cases[:1])
    case = part.cases[0]
    begun = {"kind": "begun", "part": part.name, "key": case.key, "contestant": case.names()[0]}
    gpu_record.append(record, [begun] * gpu_steps.TRIES)
    assert gpu_steps.run_part(part, record, 0.0, LATER)
    assert "2 times" in gpu_record.steps(gpu_record.read(record))[0]["error"]


def test_a_lost_device_ends_the_process(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, Contestant(OURS), Contestant(OURS, graph="off"))
    monkeypatch.setattr(gpu_steps, "attempt", lambda *_: {"error": "illegal access", "lost": True})
    part, record = TINY_PARTS["train tiny 2"], tmp_path / "record.jsonl"
    part = type(part)(part.name, part.limit, part.cases[:1])
    with pytest.raises(gpu_steps.DeviceLostError, match="illegal access"):
        gpu_steps.run_part(part, record, 0.0, LATER)
    assert len(gpu_record.steps(gpu_record.read(record))) == 1  # the next process goes on behind it


def test_a_step_is_what_a_sampling_takes_more() -> None:
    def sleeping(steps: int) -> Any:
        return lambda: time.sleep(0.01 + 0.002 * steps)

    assert gpu_steps.marginal(sleeping(2), sleeping(12), (2, 12), 0.0) == pytest.approx(0.002, rel=0.3)
    assert gpu_steps.steady(lambda: time.sleep(0.002), 0.02) == pytest.approx(0.002, rel=0.3)


def test_precisions_are_those_of_the_case_alone() -> None:
    def flags() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark

    before = flags()
    wanted = {"bfloat16": (False, False, True), "float32": (False, False, True), "tf32": (True, True, True)}
    for precision, expected in (wanted | {"default": before}).items():
        with gpu_steps.multiplying(precision):
            assert flags() == expected
        assert flags() == before


# what needs a GPU, as far as its calls go


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_calls_of_the_device(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "DEVICE", "cuda")
    gpu = launch_on_cpu(monkeypatch)
    names = ("synchronize", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved", "empty_cache")
    fakes = {name: mock.create_autospec(getattr(torch.cuda, name), return_value=2**20) for name in names}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    case = StepCase("", "train", "tiny", 2, "bfloat16")
    row = gpu_steps.measured(case, Contestant(OURS, "bfloat16", True, graph="on"), 0.0)
    gpu_steps.clean_up(Contestant(OURS, compiled="default"))
    assert row["memory"] == row["reserved"] == 2**20 and all(fake.called for fake in fakes.values())
    assert conv_floor.least(lambda: gpu.launch(5e-3, 1e-3), 3, "cuda") == pytest.approx(1e-3)


def test_launches_are_counted_by_kind() -> None:
    events = {"cudaLaunchKernel": 3, "cuLaunchKernelEx": 2, "cudaLaunchKernelExC": 1, "cudaLaunchCooperativeKernel": 1,
              "cudaGraphLaunch": 1, "cudaMemcpyAsync": 4, "cudaMemsetAsync": 1, "Memcpy DtoD": 9, "aten::copy_": 7,
              "cudaStreamSynchronize": 2}  # fmt: skip
    assert gpu_steps.counted(events) == {"graphs": 1.0, "kernels": 7.0, "copies": 5.0}


# scripts before and after


def test_scripts_are_those_that_there_are() -> None:
    there = {path.stem.removeprefix(gpu_scripts.BEGINS) for path in gpu_scripts.FOLDER.glob("test_migration_*.py")}
    assert set(gpu_scripts.CASES) == there
    assert Path(gpu_scripts.command("script optimize", True, Path())[3]).exists()


SCRIPT = """
import pytest

@pytest.mark.parametrize("n", [1])
def test_timed(benchmark, n):
    benchmark.extra_info.update(seconds={"before": 0.004, "after": 0.002})
    benchmark.pedantic(lambda: None, rounds=1)

def test_skipped(benchmark):
    pytest.skip("peer: other is not installed")

def test_fails(benchmark):
    raise RuntimeError("no such thing")
"""


def test_what_pytest_reports_of_a_script_becomes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_migration_thing.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu_scripts, "FOLDER", tmp_path)
    command = gpu_scripts.command("script thing", False, tmp_path)
    options = ("--bench-threads", "1", "--peers-seconds", str(gpu_scripts.SECONDS))  # of this repository's conftest
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # which turns timing off
    run = subprocess.run(
        [c for c in command if c not in options], cwd=tmp_path, capture_output=True, text=True, env=alone
    )
    assert run.returncode == 1, run.stdout
    lines = gpu_scripts.lines_of("script thing", tmp_path)
    assert [line["seconds"] for line in lines] == [{"before": 0.004, "after": 0.002}, {}, {}]
    assert "other is not installed" in lines[1]["note"] and "no such thing" in lines[2]["error"]
    text = "\n".join(gpu_report_steps.scripts(lines))
    assert "before 4 ms; after 2 ms (2.00x)" in text and "other is not installed" in text


def test_a_script_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(command: list[str], options: Any) -> tuple[int, str]:
        junit = next(c.partition("=")[2] for c in command if c.startswith("--junitxml"))
        Path(junit).write_text('<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>')
        return 0, "1 passed in 1.0s"

    monkeypatch.setattr(gpu_suite, "captured", captured)
    options = gpu_suite.Options(tmp_path, tiny=True, device="cpu")
    gpu_suite.work(options, "script optimize")
    lines = gpu_record.read(options.record)
    assert [line["kind"] for line in lines] == ["script", "check"] and lines[1]["ok"]


# the command


def test_groups_have_times_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--parts", "--group", "steps"]) == 0
    text = capsys.readouterr().out
    assert all(part.name in text for part in PARTS) and "elementwise" not in text
    assert "train cifar-10 128 " in text and f"about {PARTS[0].predicted:.0f} s" in text and "contestants" in text
    assert "what is left with an estimate" in text
    assert gpu_suite.main(["--out", str(tmp_path), "--dry-run", "--only", "sample cifar-10 1 *"]) == 0
    assert "sample cifar-10 1 bfloat16 compiled fastddpm, compiled, CUDA graph" in capsys.readouterr().out


def test_the_process_of_a_part_stops_in_time(tmp_path: Path) -> None:
    options = gpu_suite.Options(tmp_path, tiny=True, device="cpu")
    with pytest.raises(SystemExit) as ended:
        gpu_suite.work(options, "train tiny 2", left=1.0)
    assert ended.value.code == gpu_suite.LATER


# the page


def rows(task: str, batch: int, **times: float) -> list[dict[str, Any]]:
    """Ours, diffusers by default, under autocast and compiled with graphs."""
    about = dict(kind="step", part="p", task=task, network="cifar-10", batch=batch, first=1.0, floor=0.01,
                 launches={"graphs": 1.0, "kernels": 4.0, "copies": 1.0}, ema=False)  # fmt: skip
    who = {
        "ours": dict(library=OURS, precision="bfloat16", compiled="", graph="on", default=False, memory=6 * 2**20),
        "default": dict(library=DIFFUSERS, precision="default", compiled="", graph="auto", default=True),
        "half": dict(
            library=DIFFUSERS, precision="bfloat16", compiled="", graph="auto", default=False, memory=10 * 2**20
        ),
        "graphs": dict(
            library=DIFFUSERS, precision="bfloat16", compiled="reduce-overhead", graph="auto", default=False
        ),
    }
    return [about | who[name] | {"key": f"{task} {batch} {who[name]['precision']}", "contestant": name, "seconds": s}
            for name, s in times.items()]  # fmt: skip


def test_verdicts() -> None:
    found = rows("train", 128, ours=0.0125, default=0.05, half=0.026, graphs=0.014)
    found += rows("sample", 256, ours=0.0135) + rows("sample", 1, ours=0.001, default=0.02, graphs=0.0015)
    told = {line.partition(":")[0]: line for line in gpu_report_steps.verdicts(found)}
    assert "at most 1.35x: 1.25x, met" in told["training step / floor, batch 128, bfloat16"]
    assert "at least 3x: 4.00x, met" in told["training with EMA, to diffusers by default"]
    assert "2.08x, met" in told["training with EMA, to diffusers eager under bfloat16 autocast"]
    assert "at least 1.2x: 1.12x, NOT MET" in told["training, to compiled diffusers"]
    assert "1.35x, NOT MET" in told["sampling step / floor, batch 256, bfloat16"]
    assert "20.00x, met" in told["sampling at batch 1, to diffusers eager"]
    assert "1.50x, NOT MET" in told["sampling at batch 1, to compiled diffusers with graphs"]
    assert "not measured" in told["sampling at batch 16, to diffusers eager"]
    assert "0.60x, met" in told["peak training memory, to diffusers, bfloat16"]
    assert "1 graphs, 4 kernels, 1 copies, met" in told["launches of a training step of ours"]


def test_the_page_and_the_pictures(tmp_path: Path) -> None:
    found = rows("train", 128, ours=0.0125, default=0.05)
    found.append(found[0] | {"contestant": "gone", "seconds": None, "note": "diffusers is not installed"})
    record = tmp_path / "record.jsonl"
    gpu_record.append(record, [{"kind": "about", "device": "a GPU"}, *found])
    names = [part.name for part in gpu_suite.every_part()]
    page, *pictures = gpu_report.write(record, names, tmp_path / "gpu.md")
    text = page.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| bfloat16 | ours"))
    assert line == "| bfloat16 | ours | 12.50 | 1.024e+04 | 10.00 | 1.25 | 6 |  | 1 | 4 | 1 | 1.0 |"
    assert "| gone | diffusers is not installed |" in text and "- train cifar-10 128: not run" in text
    assert json.dumps(found[0])  # plain data
    if importlib.util.find_spec("matplotlib"):
        assert [p.name for p in pictures] == ["gpu-steps.png"] and pictures[0].stat().st_size > 10_000
        assert "(gpu-steps.png)" in text


def test_nothing_measured_is_said() -> None:
    text = gpu_report.markdown([], [part.name for part in gpu_suite.every_part()])
    assert "## Training and sampling\n\nnot measured" in text and "before and after\n\nnot measured" in text
