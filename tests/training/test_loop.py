"""The training loop: what it computes, what it writes, and how it stops."""

from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import _tape
from fastddpm._calls import Repeated
from fastddpm.diffusion import GaussianDiffusion
from fastddpm.training import (
    DivergenceError,
    InUseError,
    Trainer,
    latest_checkpoint,
    load_checkpoint,
    load_diffusion,
    load_images,
    read_metrics,
)
from fastddpm.training.metrics import Reading, Totals
from tests.recorded import record_on_cpu, waits
from tests.tolerance import assert_equal_to_rounding
from tests.training.toy import stripes, toy_diffusion, toy_trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.optimizer.parameters.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def after(steps: int, action: Callable[[], object]) -> Callable[[Trainer], None]:
    """A callback that acts once, behind that step."""
    return lambda trainer: action() if trainer.steps == steps else None  # type: ignore[return-value]


def test_loss_falls(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path, num_images=960, learning_rate=5e-3, log_every_images=160, checkpoint_every_images=960
    )
    trainer.train()
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_gradient_of_micro_batches_is_that_of_the_whole_batch(tmp_path: Path, loss: str) -> None:
    """Noise, timesteps and flips have the same bits; dropout and labels the same mask; so the moments agree."""
    seen: dict[int, list[Tensor]] = {}
    trainers = {}
    for micro in (12, 4):
        learned = loss == "hybrid"
        diffusion = toy_diffusion(
            dropout=0.3, num_classes=2, learned_variance=learned, loss=loss,
            variance="learned_range" if learned else "fixed_small",
        )  # fmt: skip
        nn.init.normal_(diffusion.model.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        seen[micro] = []
        diffusion.model.register_forward_pre_hook(lambda _, args, m=micro: seen[m].append(args[0].clone()))
        trainers[micro] = toy_trainer(
            tmp_path / str(micro), diffusion, stripes(True), batch_size=12, micro_batch_size=micro, max_grad_norm=None
        )
        trainers[micro].step()
    assert [len(x) for x in seen.values()] == [1, 3]
    assert torch.equal(seen[12][0], torch.cat(seen[4]))
    moments = trainers[12].optimizer.exp_avg
    largest = max(float(whole.abs().max()) for whole in moments.values())
    for name, whole in moments.items():
        assert_equal_to_rounding(trainers[4].optimizer.exp_avg[name], whole, ulps=64, scale=largest)


def test_half_of_the_images_is_mirrored_and_none_without_the_option(tmp_path: Path) -> None:
    diffusion = toy_diffusion(num_timesteps=2, log_snr_max=9.0, log_snr_min=8.0)
    seen: list[Tensor] = []
    diffusion.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    images = np.zeros((64, 1, 8, 8), np.uint8)
    images[..., 0] = 16  # a bright left edge
    data = load_images(images, channels=1, levels=17)
    for flip in (True, False):
        seen.clear()
        trainer = toy_trainer(tmp_path, diffusion, data, horizontal_flip=flip, batch_size=64)
        for _ in range(4):
            trainer.step()
        x = torch.cat(seen)
        mirrored = int((x[..., 7].mean((1, 2)) > x[..., 0].mean((1, 2))).sum())
        spread = (256 * 0.25) ** 0.5
        assert abs(mirrored - 128) < 5 * spread if flip else mirrored == 0


class _NoSync(TorchDispatchMode):
    """Refuses to read a value from the device, or to count elements there: by any operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert not waits(func, given), f"a value was read from the device by {func}"
        return func(*args, **(kwargs or {}))


STEPS: dict[str, dict[str, Any]] = {
    "float16": dict(train=dict(precision="float16", micro_batch_size=4, weight_mirror="on")),
    "bfloat16": dict(diffusion=dict(timestep_sampling="stratified"), train=dict(precision="bfloat16", recompute=True)),
    "importance": dict(diffusion=dict(timestep_sampling="importance"), train=dict(max_grad_norm=None, ema_decay=None)),
    "min-SNR, v": dict(diffusion=dict(loss="min_snr", prediction="v"), train=dict(data_on="host")),
    "learned variance": dict(
        diffusion=dict(learned_variance=True, loss="hybrid", variance="learned_range"),
        train=dict(lr_decay="cosine", weight_decay=0.1),
    ),
    "mu": dict(diffusion=dict(prediction="mu", mu_target="sample"), train=dict(ema_halflife_images=64)),
}


def stepping(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A training with dropout, classes that are left out, flips and all that a case asks for."""
    monkeypatch.setattr("fastddpm.training.loop.keep_freed_memory", lambda keep: None)
    diffusion = toy_diffusion(dropout=0.1, num_classes=2, **STEPS[case].get("diffusion", {}))
    return toy_trainer(tmp_path, diffusion, stripes(True), **STEPS[case]["train"])


@pytest.mark.parametrize("case", STEPS)
def test_step_reads_nothing_from_the_device(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an operator nor Python asks for a number; on a CPU these look the same as anything else."""
    trainer = stepping(tmp_path, case, monkeypatch)
    trainer.step()  # which makes tables on the host

    def ask(*_: Any, **__: Any) -> Any:
        raise AssertionError("a value was read from the device by Python")

    with _NoSync(), monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            patched.setattr(Tensor, name, ask)
        trainer.step()
        trainer.step()
        with pytest.raises(AssertionError, match="by Python"):
            trainer.save()
    with pytest.raises(AssertionError, match="a value was read"), _NoSync():
        trainer.save()


@pytest.mark.parametrize("case", [case for case in STEPS if "float16" not in case])  # autocast knows no such device
def test_step_runs_where_there_are_no_values(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors a copy to the host, or a choice by a value, cannot be made: data, noise, forward, loss, backward,
    clip, AdamW and EMA need none."""
    meta = torch.device("meta")
    monkeypatch.setattr("fastddpm.training.loop.choose_device", lambda name: meta)
    monkeypatch.setattr(Trainer, "_autocast", lambda self: nullcontext())
    trainer = stepping(tmp_path, case, monkeypatch)
    trainer.step()
    trainer.step()
    assert trainer.steps == 2
    assert {x.device for x in (*trainer.diffusion.parameters(), *trainer.optimizer.exp_avg.values())} == {meta}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        trainer.save()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_network_alone_computes_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    diffusion = toy_diffusion()
    dtypes: dict[str, torch.dtype] = {}
    diffusion.model.register_forward_hook(
        lambda _, args, out: dtypes.update(x_t=args[0].dtype, t=args[1].dtype, out=out.dtype)
    )
    diffusion.model.conv_in.register_forward_hook(lambda _, args, out: dtypes.update(conv=out.dtype))
    losses = diffusion.losses

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = losses(*args, **kwargs)
        dtypes.update(loss=result.loss.dtype, per_sample=result.per_sample.dtype)
        return result

    diffusion.losses = recorded  # type: ignore[method-assign]
    trainer = toy_trainer(tmp_path, diffusion, precision=str(dtype).removeprefix("torch."))
    trainer.step()
    assert (dtypes["conv"], dtypes["out"]) == (dtype, dtype)
    assert (dtypes["x_t"], dtypes["loss"], dtypes["per_sample"], dtypes["t"]) == (*[torch.float32] * 3, torch.int64)
    assert {p.dtype for p in trainer.optimizer.parameters.values()} == {torch.float32}


def test_metrics_are_means_over_their_interval(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, num_images=32, warmup_images=24)
    losses: list[float] = []
    original = trainer._backward
    trainer._backward = lambda *a: losses.append(loss := original(*a)) or loss  # type: ignore[func-returns-value]
    trainer.train()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["images"], second["images"], first["step"], second["step"]) == (16, 32, 2, 4)
    for record, pair in ((first, losses[:2]), (second, losses[2:])):
        assert record["loss"] == float(f"{sum(map(float, pair)) / 2:.6g}")
    assert (first["learning_rate"], second["learning_rate"]) == (float(f"{1e-3 * 16 / 24:.6g}"), 1e-3)
    assert (first["ema_decay"], second["ema_decay"]) == (float(f"{2 / 11:.6g}"), float(f"{4 / 13:.6g}"))
    assert first["timesteps"] == list(range(20)) and len(first["loss_by_t"]) == 20
    assert 0 < first["seconds"] < second["seconds"]


@pytest.mark.parametrize("late", [2, 1000])
def test_metrics_are_written_when_they_have_come(tmp_path: Path, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the host asks now and then, and waits at the next line, a checkpoint or the end alone."""
    happened: list[str] = []

    class Late(Reading):
        def __init__(self, numbers: Tensor) -> None:
            super().__init__(numbers)
            self.asked = 0

        def is_there(self) -> bool:
            self.asked += 1
            return self.asked > late

        def wait(self) -> list[float]:
            happened.append("there" if self.asked > late else "wait")
            return super().wait()

    options: dict[str, Any] = dict(num_images=160, log_every_images=32, checkpoint_every_images=80)
    toy_trainer(tmp_path / "at once", **options).train()
    monkeypatch.setattr("fastddpm.training.metrics.Reading", Late)
    toy_trainer(tmp_path / "late", callbacks=[lambda t: happened.append(str(t.images_seen))], **options).train()
    waits = [(happened[i - 1], what) for i, what in enumerate(happened) if not what.isdigit()]
    if late == 2:  # 32 comes with the third step, 160 with the checkpoint at the end
        assert waits == [("48", "there"), ("80", "wait"), ("112", "there"), ("144", "there"), ("160", "wait")]
    else:
        assert waits == [("64", "wait"), ("80", "wait"), ("128", "wait"), ("160", "wait"), ("wait", "wait")]
    found = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("at once", "late")]
    lines = [[{k: v for k, v in line.items() if "second" not in k} for line in of_run] for of_run in found]
    assert lines[0] == lines[1] and [line["images"] for line in lines[0]] == [32, 64, 96, 128, 160]


def test_loss_by_timestep_is_the_mean_of_each_group() -> None:
    totals = Totals(30, torch.device("cpu"))
    t = torch.tensor([0, 1, 29, 29, 28])
    totals.add_samples(t, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]))
    totals.add_step(torch.tensor(5.0), torch.tensor(0.5))
    means = totals.means(totals.take().wait())
    assert means["timesteps"] == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]
    assert means["loss_by_t"] == [2.0, *[None] * 17, 9.0, 6.0]
    assert not any(value.any() for value in totals.tensors.values())


def test_grids_are_drawn_from_the_average_and_leave_the_training_alone(tmp_path: Path) -> None:
    plain = toy_trainer(tmp_path / "a", num_images=48)
    plain.train()
    trainer = toy_trainer(tmp_path / "b", num_images=48, sample_every_images=16)
    trainer.train()
    assert_same_bits(weights(plain), weights(trainer))
    assert sorted(p.name for p in (tmp_path / "b" / "samples").iterdir()) == [f"{n:010d}.png" for n in (16, 32, 48)]
    before, grid = weights(trainer), trainer.sample_grid()
    assert torch.equal(grid, trainer.sample_grid())
    with torch.no_grad():
        for p in trainer.optimizer.parameters.values():
            p.zero_()
    assert torch.equal(grid, trainer.sample_grid()), "the weights themselves play no part"
    assert not any(p.any() for p in trainer.optimizer.parameters.values()), "and are back"
    assert any(value.any() for value in before.values())


def test_grid_of_a_network_with_classes_has_each_class(tmp_path: Path) -> None:
    diffusion = toy_diffusion(num_classes=2)
    trainer = toy_trainer(tmp_path, diffusion, stripes(True))
    with trainer.ema_weights():
        expected = diffusion.sample(
            4, seed=5, sampler="ddim", num_steps=2, labels=torch.tensor([0, 1, 0, 1]), batch_size=4
        )
    assert torch.equal(trainer.sample_grid(), expected)


def test_gathering_batches_on_the_host_gives_the_same_bits(tmp_path: Path) -> None:
    trainers = []
    for place in ("device", "host"):
        diffusion = toy_diffusion(num_classes=2)
        trainer = toy_trainer(tmp_path / place, diffusion, stripes(True), num_images=96, batch_size=24, data_on=place)
        trainer.train()
        trainers.append(trainer)
    assert_same_bits(weights(trainers[0]), weights(trainers[1]))


def test_half_life_of_the_average_is_used(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, ema_halflife_images=16, ema_warmup=False)
    trainer.step()
    assert_equal_to_rounding(float(trainer.optimizer.ema_decay), 0.5**0.5)


def poison(trainer: Trainer) -> None:
    next(iter(trainer.optimizer.parameters.values())).data.fill_(float("nan"))


def test_divergence_stops_with_the_last_good_checkpoint_kept(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=64).train()
    good = latest_checkpoint(tmp_path)
    assert good is not None
    with pytest.warns(UserWarning, match="learning_rate: 0.001, now 1e"):
        trainer = toy_trainer(tmp_path, learning_rate=1e30, num_images=256, allow_changes=True)
    with pytest.raises(DivergenceError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "got NaN or Inf in the step that ended at 80 images" in message, message
    assert f"the last good checkpoint is {good.path}" in message
    assert "a lower learning_rate (it was 1e+30), or a longer warm-up (warmup_images=16)" in message
    with pytest.raises(DivergenceError):
        trainer.save()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-0000000032", "checkpoint-0000000064"]
    assert [record["images"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [16, 32, 48, 64]
    resumed = toy_trainer(tmp_path, num_images=96)
    resumed.train()
    assert latest_checkpoint(tmp_path).images == 96  # type: ignore[union-attr]


def test_divergence_between_two_log_lines_is_found_before_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path, log_every_images=1000, checkpoint_every_images=48, precision="bfloat16", max_grad_norm=None,
        callbacks=[lambda t: poison(t) if t.steps == 3 else None],
    )  # fmt: skip
    with pytest.raises(
        DivergenceError, match=r"at 32 images; there was no checkpoint yet.*max_grad_norm=1, or precision"
    ):
        trainer.train()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("micro", [8, 4])
def test_gradients_wait_in_bfloat16_where_they_are_to(tmp_path: Path, micro: int) -> None:
    found = {}
    for dtype in (None, "bfloat16"):
        trainer = toy_trainer(
            tmp_path / str(dtype), toy_diffusion(), gradient_dtype=dtype, micro_batch_size=micro, max_grad_norm=None
        )
        nn.init.normal_(trainer.diffusion.model.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        seen: list[Tensor | None] = []
        update = trainer.optimizer.update
        trainer.optimizer.update = lambda loss, o=trainer.optimizer, s=seen, u=update: (  # type: ignore[method-assign]
            s.extend(p.grad for p in o.parameters.values()) or u(loss)
        )
        trainer.step()
        assert all((g is None) == (dtype is not None) for g in seen)
        assert all(not p._post_accumulate_grad_hooks for p in trainer.optimizer.parameters.values())
        found[dtype] = trainer.optimizer
    whole, half = (found[dtype].exp_avg for dtype in (None, "bfloat16"))
    largest = max(float(moment.abs().max()) for moment in whole.values())
    for name, moment in whole.items():
        assert_equal_to_rounding(half[name].bfloat16(), moment.bfloat16(), ulps=8 // micro, scale=largest)
    assert not all(torch.equal(half[name], moment) for name, moment in whole.items())
    assert not found["bfloat16"]._kept


def test_float16_leaves_out_a_step_whose_gradients_overflow_and_scales_less(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, precision="float16", micro_batch_size=4)
    optimizer, model = trainer.optimizer, trainer.diffusion.model
    assert optimizer.scale is not None and float(optimizer.scale.scale) == 65536
    trainer.step()

    def state() -> list[Tensor]:
        groups = {**optimizer.groups(), "model": model.state_dict()}
        return [x.clone() for name in ("model", "ema", "exp_avg", "exp_avg_sq") for x in groups[name].values()]

    before = state()
    optimizer.scale.scale.fill_(2.0**100)
    trainer.step()
    assert all(map(torch.equal, before, state())) and int(optimizer.step) == 1
    assert float(optimizer.scale.scale) == 2.0**99 and int(optimizer.scale.good) == 0
    assert trainer.steps == 2 and float(optimizer.skipped) == 0
    optimizer.scale.scale.fill_(1024.0)
    trainer.step()
    assert not all(map(torch.equal, before, state())) and int(optimizer.step) == 2
    means = trainer._totals.means(trainer._totals.take().wait())
    assert means["skipped"] == 1 and 0 < means["grad_norm"] < 100
    trainer.save()


def test_gradients_in_float16_are_those_of_the_loss_before_it_was_scaled(tmp_path: Path) -> None:
    norms = {}
    for precision in ("float32", "float16"):
        trainer = toy_trainer(tmp_path / precision, toy_diffusion(), precision=precision)
        trainer.step()
        norms[precision] = trainer._totals.means(trainer._totals.take().wait())["grad_norm"]
    assert abs(norms["float16"] / norms["float32"] - 1) < 0.02  # 11 bits, and as many layers


@pytest.mark.parametrize("what", ["loss", "scale"])
def test_float16_stops_where_a_smaller_scale_does_not_help(tmp_path: Path, what: str) -> None:
    trainer = toy_trainer(tmp_path, precision="float16", num_images=64)
    if what == "loss":
        poison(trainer)
    else:
        trainer.optimizer.scale.scale.fill_(0.5)  # type: ignore[union-attr]
    with pytest.raises(DivergenceError, match=r"at 8 images; .*precision='float32'"):
        trainer.train()


def test_products_of_a_gpu_are_float32_or_tf32_as_asked_for(tmp_path: Path) -> None:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    trainer = toy_trainer(tmp_path)
    trainer.device = torch.device("cuda")
    for precision in ("tf32", "float32"):
        trainer.config = replace(trainer.config, precision=precision)
        with trainer._products():
            assert [backend.allow_tf32 for backend in backends] == [precision == "tf32"] * 2
    assert [backend.allow_tf32 for backend in backends] == before


def multiplying() -> dict[str, Any]:
    """How torch multiplies on a GPU, by its newer names and, unless it refuses to tell, by the older ones."""
    cudnn = torch.backends.cudnn
    places = dict(matmul=torch.backends.cuda.matmul, conv=cudnn.conv, rnn=cudnn.rnn, cudnn=cudnn, all=torch.backends)
    found: dict[str, Any] = {name: place.fp32_precision for name, place in places.items()}
    for name, backend in dict(matmul=torch.backends.cuda.matmul, cudnn=cudnn).items():
        with suppress(RuntimeError):
            found[f"{name} flag"] = backend.allow_tf32
    return found


def choose(places: str, value: object) -> None:
    """Write it to each of these attributes of torch.backends."""
    for place in places.split():
        *path, name = place.split(".")
        setattr(reduce(getattr, path, torch.backends), name, value)


@pytest.fixture
def back_to_default() -> Iterator[None]:
    """Afterwards torch multiplies as when it was loaded."""
    before = multiplying()
    yield
    choose("cuda.matmul.allow_tf32", False)
    choose("cudnn.allow_tf32", True)
    choose("fp32_precision cuda.matmul.fp32_precision cudnn.fp32_precision", "none")
    assert multiplying() == before


CHOICES = [
    ("cuda.matmul.allow_tf32 cudnn.allow_tf32", True),
    ("cuda.matmul.allow_tf32 cudnn.allow_tf32", False),
    ("cuda.matmul.fp32_precision", "tf32"),
    ("cudnn.conv.fp32_precision", "ieee"),
    ("cudnn.fp32_precision", "ieee"),
    ("fp32_precision", "tf32"),
    ("fp32_precision cuda.matmul.fp32_precision cudnn.conv.fp32_precision cudnn.rnn.fp32_precision", "ieee"),
]


@pytest.mark.usefixtures("back_to_default")
@pytest.mark.parametrize(("places", "value"), CHOICES)
def test_either_way_to_choose_tf32_is_the_users_again_after_a_step(tmp_path: Path, places: str, value: object) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.device = torch.device("cuda")
    choose(places, value)
    before = multiplying()
    for precision, expected in (("tf32", "tf32"), ("float32", "ieee")):
        trainer.config = replace(trainer.config, precision=precision)
        with trainer._products():
            inside = multiplying()
            assert [inside[name] for name in ("matmul", "conv", "rnn")] == [expected] * 3
            assert before.keys() <= inside.keys()  # what could be read can be read by a network, too
        assert multiplying() == before
    if places == "fp32_precision":  # which still decides for what was not chosen by itself
        choose(places, "ieee")
        assert multiplying()["matmul"] == "ieee"


def test_the_time_of_the_first_step_is_told_where_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastddpm.training.loop.compile_network", lambda network, mode: None)
    toy_trainer(tmp_path, compile=True, num_images=16, warmup_images=8, progress=True).train()
    assert capsys.readouterr().out.count(" s, in the first step") == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_freed_memory_is_kept_but_where_memory_is_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("fastddpm.training.loop.keep_freed_memory", calls.append)
    toy_trainer(tmp_path, recompute=recompute).step()
    assert calls == [not recompute]


def test_without_an_average_samples_are_of_the_weights(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, ema_decay=None, num_images=32, sample_every_images=32)
    trainer.train()
    assert trainer.optimizer.ema == {} and read_metrics(tmp_path / "metrics.jsonl")[-1]["ema_decay"] is None
    loaded, weights = load_diffusion(tmp_path).model.state_dict(), trainer.diffusion.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert toy_trainer(tmp_path, ema_decay=None, num_images=40).images_seen == 32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_leaves_and_the_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole = toy_trainer(tmp_path / "whole", num_images=64)
    whole.train()
    trainer = toy_trainer(tmp_path / "cut", num_images=64, callbacks=[after(5, lambda: os.kill(os.getpid(), number))])
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 128 + number
    path = tmp_path / "cut" / "checkpoint-0000000040"
    message = f"{number.name} after 40 of 64 images; saved {path}; start the same training again to go on from there"
    assert message in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = toy_trainer(tmp_path / "cut", num_images=64)
    assert resumed.images_seen == 40
    resumed.train()
    assert_same_bits(weights(whole), weights(resumed))


def test_second_ctrl_c_does_not_wait(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # a shell starts what it runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)  # in this thread and at once: two that wait may become one
        signal.raise_signal(signal.SIGINT)

    trainer = toy_trainer(tmp_path, callbacks=[after(1, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert latest_checkpoint(tmp_path) is None


def test_callback_may_stop_the_training(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, sample_every_images=8)
    trainer.callbacks = (after(3, trainer.stop),)
    trainer.train()
    assert trainer.last_checkpoint is not None and load_checkpoint(trainer.last_checkpoint).images == 24
    assert not (tmp_path / "samples" / "0000000024.png").exists()


def test_stop_while_sampling_leaves_a_checkpoint_and_no_grid(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, sample_every_images=24)
    trainer.diffusion.model.register_forward_hook(lambda model, *_: None if model.training else trainer.stop())
    trainer.train()
    assert trainer.last_checkpoint is not None and load_checkpoint(trainer.last_checkpoint).images == 24
    assert not (tmp_path / "samples").exists()


def test_what_a_run_without_a_checkpoint_left_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images": 5}\n')
    (tmp_path / "notes.txt").write_text("mine")
    toy_trainer(tmp_path, num_images=16, warmup_images=8).train()
    assert (tmp_path / "metrics.jsonl.1").read_text() == '{"images": 5}\n'
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [record["images"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [16]


def test_second_training_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, num_images=8, warmup_images=0)
    other = toy_trainer(tmp_path, num_images=8, warmup_images=0)
    trainer.callbacks = (lambda _: other.train(),)
    with pytest.raises(InUseError, match=r"expected no other training in .*, got one that runs; wait for it"):
        trainer.train()


def test_last_batch_is_a_whole_one(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, num_images=20)
    trainer.train()
    assert trainer.images_seen == read_metrics(tmp_path / "metrics.jsonl")[-1]["images"] == 24
    assert trainer.last_checkpoint == tmp_path / "checkpoint-0000000024"


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_trainer(tmp_path, num_images=32, progress=True).train()
    toy_trainer(tmp_path, num_images=48, progress=True).train()
    toy_trainer(tmp_path, num_images=48, progress=True).train()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "training 10,593 parameters on cpu, in float32, on 64 images of 1 x 8 x 8 from an array"
    assert out[1] == (f"32 images in steps of 8, 0.5 times each; checkpoints, metrics and samples go to {tmp_path}")
    assert out[2].startswith("32 of 32 images, loss ") and out[2].endswith("left")
    assert out[3] == f"going on from {tmp_path / 'checkpoint-0000000032'}, 32 images seen"
    assert out[-1] == "48 of 48 images seen already; raise num_images to go on"
    toy_trainer(tmp_path / "quiet", num_images=16, warmup_images=8).train()
    assert capsys.readouterr().out == ""


class Clock:
    """A minute for each two steps, in place of the module time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def step(self, _: Trainer) -> None:
        self.now += 30


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("fastddpm.training.loop.time", made)
    return made


@pytest.mark.parametrize("late", [False, True])
def test_progress_is_told_by_the_clock_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock, late: bool
) -> None:
    """With what the metrics would say so far, and without a change of theirs; where numbers come late, a step later."""
    trainer = toy_trainer(tmp_path / "told", progress=True, log_every_images=48, num_images=96, callbacks=[clock.step])
    losses: list[float] = []
    original = trainer._backward
    trainer._backward = lambda *a: losses.append(loss := original(*a)) or loss  # type: ignore[func-returns-value]
    if late:
        asked = iter([False, True] * 100)
        monkeypatch.setattr("fastddpm.training.metrics.Reading.is_there", lambda _: next(asked))
    trainer.train()
    found = [line for line in capsys.readouterr().out.splitlines() if " of 96 images, " in line]
    assert (found[0].split()[0], found[-1].split()[0]) == ("8", "96")
    assert f"loss {float(losses[0]):.4f}, lr 0.0005, {'0.13' if late else '0.27'} images/s" in found[0]
    if not late:
        assert [line.split()[0] for line in found] == [str(8 * n) for n in range(1, 13)]
        assert found[0].endswith("05:30 left") and found[1].endswith("05:00 left")
        assert f"loss {sum(map(float, losses[:2])) / 2:.4f}" in found[1]
    toy_trainer(tmp_path / "silent", log_every_images=48, num_images=96).train()
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("told", "silent"))
    assert [{k: v for k, v in line.items() if "second" not in k} for line in ours] == [
        {k: v for k, v in line.items() if "second" not in k} for line in theirs
    ]


def test_checkpoints_are_written_by_the_clock_too(tmp_path: Path, clock: Clock) -> None:
    """Of which as many are kept as of others, and no weight depends on them."""
    written: list[int] = []

    def look(trainer: Trainer) -> None:
        clock.step(trainer)
        if trainer._saved >= 0 and trainer._saved not in written:
            written.append(trainer._saved)

    options: dict[str, Any] = dict(checkpoint_every_images=88, num_images=112)
    timed = toy_trainer(tmp_path / "timed", callbacks=[look], checkpoint_every_minutes=2.0, **options)
    timed.train()
    assert written == [32, 64, 88], "by time, by time, by images, and from there 2 minutes are not over at the end"
    assert [p.name[-3:] for p in sorted((tmp_path / "timed").glob("checkpoint-*"))] == ["088", "112"]
    plain = toy_trainer(tmp_path / "plain", callbacks=[clock.step], checkpoint_every_minutes=None, **options)
    plain.train()
    assert_same_bits(weights(timed), weights(plain))
    assert toy_trainer(tmp_path / "timed", checkpoint_every_minutes=5.0).images_seen == 112, "resumed with another"


def test_bar_shows_loss_learning_rate_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    toy_trainer(tmp_path, num_images=32, progress=True).train()
    assert "training:" in terminal.text and "32.0/32.0" in terminal.text and "img/s" in terminal.text
    assert "loss 0." in terminal.text or "loss 1." in terminal.text
    assert "lr 0.001" in terminal.text


def test_deterministic_algorithms_are_used_while_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda _, **__: None)  # without it a processor needs no restriction
    inside = []
    for wanted in (True, False):
        trainer = toy_trainer(tmp_path / str(wanted), num_images=8, warmup_images=0, deterministic=wanted, compile=True)
        trainer.callbacks = (lambda _: inside.append(torch.are_deterministic_algorithms_enabled()),)
        trainer.train()
    assert inside == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_network_has_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode: compile_module(self, backend="aot_eager", fullgraph=True)
    )
    trainers = [toy_trainer(tmp_path / str(c), num_images=24, compile=c) for c in (False, True)]
    for trainer in trainers:
        trainer.step()
        trainer.step()
    assert trainers[1].diffusion.model._compiled_call_impl is not None
    eager, compiled = (trainer.optimizer.exp_avg for trainer in trainers)
    largest = max(float(moment.abs().max()) for moment in eager.values())
    for name, moment in eager.items():
        assert_equal_to_rounding(compiled[name], moment, ulps=256, scale=largest)


NARROW = load_images(np.zeros((4, 1, 8, 4), np.uint8), channels=1, levels=17)
EIGHT_BITS = load_images(np.zeros((4, 1, 8, 8), np.uint8), channels=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data=np.zeros((4, 1, 8, 8), np.uint8)), None),
        (dict(data=NARROW), r"expected images of shape \[1, 8, 8\], got \[1, 8, 4\]"),
        (dict(data=EIGHT_BITS), "expected images of 17 grey levels, got 256"),
        (dict(diffusion=toy_diffusion(num_classes=2)), "expected images of at most 2 classes .*, got no labels"),
        (dict(diffusion=toy_diffusion(num_classes=1), data=stripes(True)), "at most 1 classes for this network, got 2"),
        (dict(batchsize=3), "expected options of TrainConfig, got batchsize; did you mean batch_size?"),
        (dict(resume="sometimes"), "expected resume to be 'auto', True or False, got 'sometimes'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert len(toy_trainer(tmp_path, **options).data) == 4, "anything that load_images reads is fine"
    else:
        with pytest.raises(ValueError, match=message):
            toy_trainer(tmp_path, **options)


def test_tensorboard_gets_metrics_and_grids(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=16, warmup_images=8, tensorboard=True, sample_every_images=16).train()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"images_per_second" in content and b"samples" in content


def test_missing_tensorboard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"expected the package tensorboard .* pip install 'fastddpm\[tensorboard\]'"):
        toy_trainer(tmp_path, tensorboard=True).train()


def test_a_step_reads_the_same_memory_each_time(tmp_path: Path) -> None:
    """What a recorded step would find there again: batch, counter, rates, weights, moments."""
    places = []

    def look(trainer: Trainer) -> None:
        batch = [x.data_ptr() for x in trainer._batch or () if x is not None]
        scalars = [trainer._step, trainer.optimizer.learning_rate, trainer.optimizer.ema_decay]
        others = [*scalars, *trainer.optimizer.parameters.values(), *trainer.optimizer.exp_avg.values()]
        places.append((batch, [x.data_ptr() for x in others]))

    rows = []
    for data_on in ("device", "host"):
        trainer = toy_trainer(tmp_path / data_on, data_on=data_on, num_images=48, callbacks=[look])
        trainer.diffusion.model.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
        trainer.train()
        assert len(places) >= 4 and all(place == places[0] for place in places)
        places.clear()
    half = len(rows) // 2
    assert all(map(torch.equal, rows[:half], rows[half:]))  # and finds another batch there each time
    assert not torch.equal(rows[0], rows[1])


RECORDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": dict(data_on="host", horizontal_flip=False),
    "bfloat16": dict(precision="bfloat16", micro_batch_size=4, ema_decay=None, gradient_dtype="bfloat16"),
    "float16": dict(precision="float16", weight_mirror="on"),
    "recompute": dict(recompute=True, learning_rate=2e-3),
}


def list_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the CPU list the operators of the fourth step; returns what happens from now on: "record" and "replay"."""
    happened: list[str] = []
    record = _tape.record

    def listen(*args: Any) -> Any:
        happened.append("record")
        result, replay = record(*args)
        return result, lambda *tensors: happened.append("replay") or replay(*tensors)  # type: ignore[func-returns-value]

    monkeypatch.setattr(Repeated, "WARM_UP", 3)
    monkeypatch.setattr(_tape, "record", listen)
    return happened


@pytest.mark.parametrize("kind", ["graph", "list"])
@pytest.mark.parametrize("case", RECORDED)
def test_a_step_recorded_on_a_cpu_has_the_bits_of_one_that_is_not(
    tmp_path: Path, case: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded from the fourth step on: batches, rates, counters and scales are read anew, and so are the weights."""
    monkeypatch.setattr("fastddpm.training.loop.keep_freed_memory", lambda keep: None)
    happened = record_on_cpu(monkeypatch) if kind == "graph" else list_steps(monkeypatch)
    found = []
    for cuda_graph in ("on", "off"):
        options = dict(log_every_images=24, warmup_images=48, cuda_graph=cuda_graph) | RECORDED[case]
        diffusion = toy_diffusion(dropout=0.1, num_classes=2, timestep_sampling="importance")
        trainer = toy_trainer(tmp_path / cuda_graph, diffusion, stripes(True), num_images=64, **options)
        trainer.train()
        lines = read_metrics(tmp_path / cuda_graph / "metrics.jsonl")
        found.append((weights(trainer), [line["loss"] for line in lines], [line["grad_norm"] for line in lines]))
    if kind == "list" and case == "recompute":  # which saves the memory of a list
        assert not happened
    else:
        assert happened == ["record", *["replay"] * (5 if kind == "graph" else 4)]  # to record a graph runs nothing
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("options", [{}, dict(gradient_dtype="bfloat16"), dict(precision="bfloat16")])
def test_gradients_of_a_recording_that_fails_are_dropped(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two micro-batches: what the first one left is of a step that never ran."""
    happened, calls, found = record_on_cpu(monkeypatch), list[str](), []

    def wait(module: nn.Module, args: Any) -> None:
        calls.extend(happened)
        if calls == ["record"] * 2:
            args[0].sum().item()

    for cuda_graph in ("on", "off"):
        trainer = toy_trainer(tmp_path / cuda_graph, cuda_graph=cuda_graph, micro_batch_size=4, **options)
        trainer.diffusion.model.register_forward_pre_hook(wait)
        for step in range(5):
            fails = cuda_graph == "on" and step == 3
            with pytest.warns(UserWarning, match="without a CUDA graph") if fails else nullcontext():
                trainer.step()
        found.append(weights(trainer))
    assert happened == ["record"]
    assert_same_bits(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("data_on", ["device", "host"])
def test_a_recorded_step_has_the_bits_of_one_that_is_not(tmp_path: Path, data_on: str) -> None:
    found = []
    for cuda_graph in ("on", "off"):
        trainer = toy_trainer(
            tmp_path / cuda_graph, toy_diffusion(dropout=0.1), device="cuda", cuda_graph=cuda_graph, data_on=data_on
        )
        for _ in range(6):
            trainer.step()
        found.append(weights(trainer))
    assert_same_bits(*found)


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, device="cuda")
    trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recomputing_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        trainer = toy_trainer(tmp_path / str(recompute), toy_diffusion(dropout=0.2), recompute=recompute)
        trainer.step()
        found.append(weights(trainer))
    assert_same_bits(*found)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def test_why_another_network_is_not_recorded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    happened = record_on_cpu(monkeypatch)
    monkeypatch.setattr("fastddpm.training.loop.can_record", lambda device: True)
    for cuda_graph in ("off", "auto", "on"):
        diffusion = GaussianDiffusion(Other(), image_size=8, channels=1, num_timesteps=20, levels=17)
        trainer = toy_trainer(tmp_path / cuda_graph, diffusion, cuda_graph=cuda_graph, progress=True)
        told = capsys.readouterr().out
        assert ("without a CUDA graph: nobody knows whether Other does the same" in told) == (cuda_graph == "auto")
        for _ in range(5):
            trainer.step()
        assert happened == (["record", "replay", "replay"] if cuda_graph == "on" else [])


def test_recomputing_another_network_is_refused(tmp_path: Path) -> None:
    diffusion = GaussianDiffusion(Other(), image_size=8, channels=1, num_timesteps=20, levels=17)
    with pytest.raises(ValueError, match=r"expected a fastddpm\.UNet with recompute, got Other"):
        toy_trainer(tmp_path, diffusion, recompute=True)
