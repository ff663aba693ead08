"""`fastddpm bench`, on a tiny network."""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastddpm import cli
from fastddpm.bench import Floor, Work, lines_of, measure, measure_ops, report, time_by_part
from fastddpm.bench.memory import peak_of_child, peak_of_work, resident
from fastddpm.bench.parts import part_of
from fastddpm.bench.work import fill_zeros
from fastddpm.nn import UNet
from fastddpm.outputs import is_own
from tests.recorded import record_on_cpu

UNET = dict(
    image_size=(8, 8), base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)  # fmt: skip
TRAIN = dict(batch_size=4, micro_batch_size=2, precision="float32", device="cpu")
TINY = [
    "--base-channels", "8", "--channel-mult", "1,2", "--num-res-blocks", "1", "--attention-resolutions", "4",
    "--num-groups", "4", "--image-size", "8", "--num-timesteps", "8", "--batch-size", "2", "--device", "cpu",
    "--repeat", "1",
]  # fmt: skip


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second process and the large matrix product: both take seconds."""
    monkeypatch.setattr(report, "peak_of_work", lambda *_: 2**20)
    monkeypatch.setattr(report, "product_rate", lambda *_: 1e12)


def test_a_training_step_is_measured(no_child: None, tmp_path: Path) -> None:
    work = Work("train", UNET, {}, TRAIN)
    found = measure(work, repeat=2, trace=tmp_path / "deep" / "trace.json")
    assert found.images_per_second == pytest.approx(4 / found.best)
    assert found.floor.keys() == {"attention", "convolution", "linear", "optimizer"}
    assert found.ratio > 1
    assert found.utilisation == pytest.approx(found.flops / found.best / 1e12)
    assert found.to_dict()["ratio"] == found.ratio
    assert {"convolution", "norm, activation", "optimizer"} <= found.parts.keys()
    events = json.loads((tmp_path / "deep" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert any("group_norm_silu" in event.get("name", "") for event in events)
    text = "\n".join(lines_of(found))
    for word in ("images/s", "floor", "step/floor", "utilisation", "time by part", "peak memory"):
        assert word in text
    assert "% of the step are those layers" in text
    faster = replace(found, best=found.best / 1e6)
    assert "less than torch takes for those layers" in "\n".join(lines_of(faster))


def test_weights_are_those_of_a_network_that_has_learnt() -> None:
    """A new network gives 0, and gradients whose squares are denormal after a few steps of a warm-up."""
    network = UNet(**UNET)
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    assert not network(x, t).any()
    fill_zeros(network)
    network(x, t).square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None
        assert float(p.grad.square().sum()) > torch.finfo(torch.float32).tiny or "bias" in name, name


def test_micro_batches_do_the_work_of_a_batch() -> None:
    """Three forward passes of four images, in two halves."""
    halves, whole = (Work("train", UNET, {}, {**TRAIN, "micro_batch_size": n}) for n in (2, None))
    per_image = {layer.flops / layer.operands[0].shape[0] * n for layer, n in whole.layers().items()}
    assert per_image
    total = [sum(layer.flops * n for layer, n in work.layers().items()) for work in (halves, whole)]
    assert total[0] == total[1]
    assert all(layer.operands[0].shape[0] == 2 for layer in halves.layers())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_is_measured(no_child: None, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "time_by_part", lambda *_, **__: {"convolution": 1.0})
    unet = {**UNET, "num_classes": 3}
    work = Work("sample", unet, {"num_timesteps": 10}, {**TRAIN, "precision": precision}, measured_steps=2)
    found = measure(work, repeat=1, peak_flops=5e12)
    assert found.dtype == precision
    assert found.images_per_second == pytest.approx(4 / (10 * found.best))  # each takes all steps
    assert "optimizer" not in found.floor
    assert not found.peak_is_measured
    assert found.peak_flops == 5e12


def test_ops_are_measured_at_the_shapes_of_the_network() -> None:
    work = Work("sample", UNET, {}, TRAIN)
    found = measure_ops(work, repeat=1)
    assert {"q_sample", "diffusion_loss", "solver_step", "adam_ema"} <= {row.op for row in found}
    norms = {row.shape: row.calls for row in found if row.op == "group_norm_silu"}
    assert norms[4, 24, 8, 8] == 1  # 16 channels from below join 8 of the way down
    assert sum(row.calls for row in found if row.op == "group_norm") == 4  # before attention
    assert all(row.seconds > 0 and row.floor > 0 for row in found)
    assert {row.op for row in measure_ops(work, repeat=1, only="solver_step")} == {"solver_step"}


def test_a_trace_has_each_op_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, record = tmp_path / "deep" / "trace.json", tmp_path / "record.json"
    options = ["--only", "group_norm_silu", "--repeat", "1", "--trace", str(trace), "--json", str(record)]
    assert cli.main(["bench", "op", *TINY, *options]) == 0
    assert f"made {trace}" in capsys.readouterr().out
    assert is_own(trace), "the same call may replace it"
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    rows = json.loads(record.read_text(encoding="utf-8"))
    wanted = [f"{row['op']} {'x'.join(map(str, row['shape']))}" for row in rows]
    assert [event["name"] for event in named] == wanted and len(rows) > 2
    inside = {
        event["name"]
        for event in events
        for of in named
        if event.get("cat") == "cpu_op" and of["ts"] <= event["ts"] < of["ts"] + of["dur"]
    }
    assert any("group_norm_silu" in name for name in inside) and "aten::randn" not in inside


def test_on_a_gpu_a_work_is_recorded_and_profiled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = record_on_cpu(monkeypatch)
    for kind in ("train", "sample"):
        work = Work(kind, UNET, {}, TRAIN, measured_steps=5)
        call = work.prepare()
        for _ in range(5):
            call()
        assert happened == ["record", *["replay"] * (2 if kind == "train" else 22)]
        happened.clear()
        call = work.unrecorded().prepare()
        for _ in range(5):
            call()
        assert not happened


class Allocator:
    """Bytes as torch counts those of a GPU: now, and the most since they were asked to be forgotten."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def forget(self, device: torch.device) -> None:
        self.most = self.now


class Step:
    """A step of a network of 100 bytes with activations of 50, for which cuDNN takes 900 at first; a replay takes none.

    It refers to itself, as what refers to the network may.
    """

    def __init__(self, memory: Allocator, recorded: bool) -> None:
        self.memory, self.recorded, self.calls, self.itself = memory, recorded, 0, self
        memory.add(100)
        weakref.finalize(self, memory.add, -100)

    def __call__(self) -> None:
        taken = 900 if self.calls == 0 else 0 if self.recorded else 50
        self.memory.add(taken)
        self.memory.add(-taken)
        self.calls += 1


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
def test_on_a_gpu_memory_is_that_of_a_step_without_a_graph(cuda_graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Allocator()
    device = torch.device("cuda")
    for name, value in (("device", device), ("dtype", torch.float32)):
        monkeypatch.setattr(Work, name, property(lambda _, value=value: value))
    monkeypatch.setattr(Work, "layers", lambda _: Counter())
    monkeypatch.setattr(Work, "prepare", lambda work: Step(memory, work.config.cuda_graph != "off"))
    monkeypatch.setattr(report, "floor", lambda *_, **__: Floor({}, {}, 1.0, 1.0))
    monkeypatch.setattr(report, "time_by_part", lambda *_, **__: {"convolution": 1.0})
    for name, fake in (
        ("reset_peak_memory_stats", memory.forget), ("max_memory_allocated", lambda _: memory.most),
        ("synchronize", lambda _: None), ("get_device_name", lambda _: "a GPU"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    work = Work("train", UNET, {}, {**TRAIN, "cuda_graph": cuda_graph})
    assert measure(work, repeat=5, peak_flops=1e12).memory == 150


@pytest.mark.gpu
def test_memory_on_a_gpu_has_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that is replayed when it is timed: at the least 20 tensors of [B, 8, 8, 8] in float32."""
    monkeypatch.setattr(report, "floor", lambda *_, **__: Floor({}, {}, 1.0, 1.0))
    monkeypatch.setattr(report, "time_by_part", lambda *_, **__: {"convolution": 1.0})
    found = []
    for batch in (64, 64, 1024):  # once for the workspaces of libraries, which stay
        train = {**TRAIN, "batch_size": batch, "micro_batch_size": None, "device": "cuda", "cuda_graph": "on"}
        memory = measure(Work("train", UNET, {}, train), repeat=5, peak_flops=1e12).memory
        assert memory is not None
        found.append(memory)
    assert found[2] - found[1] > (1024 - 64) * 20 * 8 * 8 * 8 * 4


def test_parts_add_up_and_know_the_ops() -> None:
    x, w = torch.randn(2, 8, 16, 16), torch.randn(8, 8, 3, 3)
    parts = time_by_part(lambda: torch.conv2d(x, w).add_(1), torch.device("cpu"), steps=2)
    assert max(parts, key=lambda name: parts[name]) == "convolution" or len(parts) > 1
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    names = {
        "aten::mkldnn_convolution": "convolution", "aten::addmm": "linear", "aten::bmm": "linear", "aten::mm": "linear",
        "fastddpm::group_norm_silu": "norm, activation", "_GroupNormSiLUBackward": "norm, activation",
        "_DiffusionLoss": "noise, loss, solver", "fastddpm::adam_ema_": "optimizer", "aten::copy_": "copies",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "fastddpm::q_sample": "noise, loss, solver",
        "aten::add_": "other",
    }  # fmt: skip
    assert {name: part_of(name) for name in names} == names


@pytest.mark.skipif(resident("VmHWM") is None, reason="the system does not tell")
def test_memory_is_that_of_a_child() -> None:
    size = 64 * 2**20
    code = (
        "from fastddpm.bench.memory import peak_since, resident\n"
        f"before = resident('VmRSS'); x = bytearray({size}); x[::4096] = b'1' * ({size} // 4096); del x\n"
        "print('words'); print(peak_since(before))"
    )
    found = peak_of_child([sys.executable, "-c", code])
    assert found is not None
    assert found == pytest.approx(size, rel=0.1)  # the system counts pages in batches
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_of_child([sys.executable, "-c", "1 / 0"])


@pytest.mark.skipif(resident("VmHWM") is None, reason="the system does not tell")
def test_memory_of_a_work() -> None:
    found = peak_of_work(Work("train", UNET, {}, TRAIN).to_dict(), threads=1)
    assert found is not None
    assert 2**20 < found < 2**30


@pytest.mark.parametrize("what", ["op", "train", "sample"])
def test_on_the_command_line(
    no_child: None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "time_by_part", lambda *_, **__: {"convolution": 1.0})  # the profiler takes seconds
    record = tmp_path / "record.json"
    assert cli.main(["bench", what, *TINY, "--json", str(record)]) == 0
    printed = capsys.readouterr().out
    assert "batch 2" in printed
    assert json.loads(record.read_text(encoding="utf-8"))
    assert is_own(record), "the same call may replace it"
    record.write_text('{"mine": 1}')
    assert cli.main(["bench", what, *TINY, "--json", str(record)]) == 2
    assert "fastddpm did not write" in capsys.readouterr().err
    assert record.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--learning-rate=-3"], "--learning-rate"),
        (["op", "--only", "softmax"], "q_sample, diffusion_loss"),
        (["sample", "--num-steps", "9"], "[1, 8]"),
        (["train", "missing", "--preset", "cifar10"], "both"),
        (["train", "missing"], "nothing there"),
        (["train", "--peak-tflops", "0"], "peak_flops > 0"),
        (["sample", "--measured-step", "2"], "did you mean --measured-steps"),
    ],
)
def test_what_cannot_work_is_told(
    no_child: None, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, *rest = arguments
    try:
        code = cli.main(["bench", what, *([] if "missing" in rest else TINY), *rest])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    assert told in capsys.readouterr().err


def test_another_kind_of_work() -> None:
    for fields, told in (
        (dict(kind="dance"), "train, sample"),
        (dict(kind="sample", sampler="euler"), "dpmpp_2m"),
        (dict(kind="sample", measured_steps=0), "measured_steps >= 1"),
    ):
        with pytest.raises(ValueError, match=told):
            Work(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["op", "train", "sample"])
def test_help_shows_an_example(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", what, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  fastddpm bench {what}" in capsys.readouterr().out
