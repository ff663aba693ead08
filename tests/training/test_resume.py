"""A resumed run gives the bits of one that was never interrupted; what cannot be resumed is told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.training import (
    CheckpointError,
    Trainer,
    latest_checkpoint,
    load_checkpoint,
    load_diffusion,
    load_images,
    read_metrics,
)
from tests.training.toy import stripes, toy_diffusion, toy_trainer

TIMES = ("seconds", "images_per_second")


def stop_at(images: int) -> Callable[[Trainer], None]:
    return lambda trainer: trainer.stop() if trainer.images_seen == images else None


def contents(path: Path | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by group and name."""
    assert path is not None
    checkpoint = load_checkpoint(path)
    return {f"{g}.{name}": value for g in checkpoint.groups for name, value in checkpoint.tensors(g).items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())] == []


CASES: dict[str, dict[str, Any]] = {
    "plain": {"diffusion": {}, "train": {}},
    "dropout, classes, importance": {
        "diffusion": dict(dropout=0.2, num_classes=2, timestep_sampling="importance", num_timesteps=3),
        "train": dict(micro_batch_size=4, lr_decay="cosine"),
    },
    "bfloat16": {
        "diffusion": dict(prediction="v", loss="min_snr"),
        "train": dict(precision="bfloat16", gradient_dtype="bfloat16"),
    },
    "weights in half precision": {
        "diffusion": dict(dropout=0.1),
        "train": dict(precision="bfloat16", weight_mirror="on", micro_batch_size=4),
    },
    # a scale at which gradients overflow for some steps
    "float16": {"diffusion": {}, "train": dict(precision="float16", ema_decay=None), "scale": 2.0**27},
    "learned variance": {
        "diffusion": dict(
            learned_variance=True, loss="hybrid", variance="learned_range", timestep_sampling="stratified",
        ),
        "train": dict(weight_decay=0.1, ema_halflife_images=64, log_every_images=24, data_on="host"),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, case: str) -> None:
    options = CASES[case]

    def trainer(name: str) -> Trainer:
        diffusion = toy_diffusion(**options["diffusion"])
        data = stripes("num_classes" in options["diffusion"])
        made = toy_trainer(tmp_path / name, diffusion, data, num_images=96, **options["train"])
        if "scale" in options and made.images_seen == 0:
            assert made.optimizer.scale is not None
            made.optimizer.scale.scale.fill_(options["scale"])
            made.optimizer.scale.growth_interval = 3
        elif "scale" in options:
            made.optimizer.scale.growth_interval = 3  # type: ignore[union-attr]
        return made

    whole = trainer("whole")
    whole.train()

    cut = trainer("cut")
    cut.callbacks = (lambda t: t.stop() if t.images_seen == 40 else None,)
    cut.train()
    assert cut.images_seen == 40, "between two lines of metrics and two checkpoints"
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - the global state must play no part
    resumed = trainer("cut")
    assert resumed.images_seen == 40
    resumed.train()

    assert_same_bits(contents(whole.last_checkpoint), contents(resumed.last_checkpoint))
    lines = [
        [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    if "scale" in options:
        scales = [line["loss_scale"] for line in lines[0]]
        assert sum(line["skipped"] for line in lines[0]) > 0 and scales[0] < options["scale"]
        assert max(scales[1:]) > min(scales), "it grows, too"


def test_importance_sampling_has_left_its_uniform_start(tmp_path: Path) -> None:
    """So that the case above resumes a state that matters."""
    trainer = toy_trainer(tmp_path, toy_diffusion(**CASES["dropout, classes, importance"]["diffusion"]), stripes(True))
    for _ in range(5):
        trainer.step()
    sampler = trainer.diffusion.timestep_sampler
    assert sampler is not None and sampler.probabilities().std() > 0.01


def test_lines_behind_the_checkpoint_are_not_written_twice(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 48, "loss": 1}\n{"images": 6')
    toy_trainer(tmp_path, num_images=64).train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["images"] for record in records] == [16, 32, 48, 64]
    assert all(len(record) > 5 for record in records)


def test_grid_that_a_kill_prevented_is_drawn_on_resuming(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32, sample_every_images=16).train()
    (tmp_path / "samples" / "0000000032.png").unlink()
    toy_trainer(tmp_path, num_images=48, sample_every_images=16).train()
    assert len(list((tmp_path / "samples").iterdir())) == 3


def test_another_environment_warns_and_the_same_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_trainer(tmp_path, num_images=32).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_trainer(tmp_path)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r"written elsewhere \(threads: 1 when saved, 2 now\): the weights will not"):
        toy_trainer(tmp_path)
    torch.set_num_threads(1)
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    with pytest.warns(UserWarning, match=rf"torch: {version[:5]}.* when saved, 3.0.0 now"):
        toy_trainer(tmp_path)


def test_options_that_change_the_weights_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32).train()
    with pytest.raises(CheckpointError, match=r"train.learning_rate: saved 0.001, wanted 0.002"):
        toy_trainer(tmp_path, learning_rate=2e-3)
    with pytest.warns(UserWarning, match=r"options changed on resuming .*learning_rate: 0.001, now 0.002$"):
        trainer = toy_trainer(tmp_path, learning_rate=2e-3, num_images=40, allow_changes=True)
    trainer.train()
    free = dict(num_images=400, log_every_images=8, sample_every_images=80, keep_checkpoints=3, num_grid_samples=1)
    assert toy_trainer(tmp_path, learning_rate=2e-3, **free).images_seen == 40
    with pytest.raises(CheckpointError, match=r"diffusion.num_timesteps: saved 20, wanted 10"):
        toy_trainer(tmp_path, toy_diffusion(num_timesteps=10), allow_changes=True)
    with pytest.raises(CheckpointError, match=r"unet.dropout: saved 0.0, wanted 0.5"):
        toy_trainer(tmp_path, toy_diffusion(dropout=0.5), allow_changes=True)
    other = load_images(np.ones((64, 1, 8, 8), np.uint8), channels=1, levels=17)
    with pytest.raises(CheckpointError, match=r"data.fingerprint: saved"):
        toy_trainer(tmp_path, data=other, allow_changes=True)


@pytest.mark.parametrize("before, after", [("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "bfloat16")])
def test_a_run_goes_on_in_another_precision(tmp_path: Path, before: str, after: str) -> None:
    """With the weights, moments, average and order of the images that it had."""
    toy_trainer(tmp_path, num_images=40, precision=before).train()
    saved = contents(tmp_path / "checkpoint-0000000040")
    with pytest.raises(CheckpointError, match=rf"train.precision: saved '{before}', wanted '{after}'; .*allow_changes"):
        toy_trainer(tmp_path, precision=after)
    told = {"float16": "; the loss scale ends", "bfloat16": "; the loss scale starts at 65536", "float32": ""}[before]
    with pytest.warns(UserWarning, match=rf"resuming .*40: precision: '{before}', now '{after}'{told}$"):
        trainer = toy_trainer(tmp_path, num_images=64, precision=after, allow_changes=True)
    assert trainer.images_seen == 40 and int(trainer.optimizer.step) == 5
    for group, tensors in {**trainer.optimizer.groups(), "model": trainer.diffusion.model.state_dict()}.items():
        for name, value in tensors.items():
            if group != "optimizer":
                assert torch.equal(value, saved[f"{group}.{name}"]), name
    scale = trainer.optimizer.scale
    assert (scale is None) == (after != "float16") and (scale is None or float(scale.scale) == 65536)
    trainer.train()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["images"] == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toy_trainer(tmp_path, precision=after).images_seen == 64


def test_an_average_may_begin_later(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32, ema_decay=None).train()
    with pytest.warns(UserWarning, match=r"ema_decay: None, now 0.9; the average starts as the weights$"):
        trainer = toy_trainer(tmp_path, num_images=48, allow_changes=True)
    assert trainer.optimizer.ema
    for name, p in trainer.optimizer.parameters.items():
        assert torch.equal(trainer.optimizer.ema[name], p)
    trainer.train()
    assert not torch.equal(*(outputs(load_diffusion(tmp_path, ema=ema, device="cpu")) for ema in (True, False)))


def test_an_average_that_ends_is_not_lost(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32).train()
    old = tmp_path / "checkpoint-0000000032"
    averaged = outputs(load_diffusion(old, device="cpu"))
    with pytest.warns(UserWarning, match=r"now None; the average ends; it stays in .*032, which is kept for good$"):
        trainer = toy_trainer(tmp_path, num_images=160, ema_decay=None, allow_changes=True, keep_checkpoints=1)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-0000000032", "checkpoint-0000000160"]
    assert torch.equal(outputs(load_diffusion(old, device="cpu")), averaged)
    assert torch.equal(outputs(load_diffusion(tmp_path, device="cpu")), outputs(trainer.diffusion))


def test_steps_left_out_in_float16_are_counted_after_a_change_too(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, precision="float16", num_images=40, warmup_images=8)
    trainer.optimizer.scale.scale.fill_(2.0**100)  # type: ignore[union-attr]
    trainer.callbacks = (lambda t: t.stop(),)
    trainer.train()
    with pytest.warns(UserWarning, match="the loss scale ends"):
        toy_trainer(tmp_path, num_images=16, warmup_images=8, allow_changes=True).train()
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert line["skipped"] == 1 and 0.01 < line["grad_norm"] < 100


def test_run_that_depends_on_its_length_cannot_be_made_longer_in_silence(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=32, lr_decay="linear").train()
    with pytest.raises(CheckpointError, match=r"train.num_images: saved 32, wanted 64"):
        toy_trainer(tmp_path, num_images=64, lr_decay="linear")


@pytest.mark.parametrize("later", [320, 48])
def test_warm_up_that_was_not_given_stays_where_the_run_gets_another_length(tmp_path: Path, later: int) -> None:
    """So that it has the bits of a run that was to be as long as before."""
    toy_trainer(tmp_path, num_images=800, warmup_images=None, callbacks=[stop_at(32)]).train()
    trainer = toy_trainer(tmp_path, num_images=later, warmup_images=None)
    assert trainer.to_dict()["train"]["warmup_images"] == 80
    toy_trainer(tmp_path, num_images=48, warmup_images=None).train()
    toy_trainer(tmp_path / "whole", num_images=800, warmup_images=None, callbacks=[stop_at(48)]).train()
    assert_same_bits(*(contents(path / "checkpoint-0000000048") for path in (tmp_path, tmp_path / "whole")))
    assert toy_trainer(tmp_path, warmup_images=80).images_seen == 48
    with pytest.raises(CheckpointError, match=r"train.warmup_images: saved 80, wanted 16"):
        toy_trainer(tmp_path)


def test_resume_says_what_it_expects(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint in .* for resume=True, got none"):
        toy_trainer(tmp_path, resume=True)
    toy_trainer(tmp_path, num_images=32, resume=False).train()
    with pytest.raises(
        FileExistsError, match=r"expected output_dir without a run for resume=False, got .*checkpoint-0000000032"
    ):
        toy_trainer(tmp_path, resume=False)
    assert toy_trainer(tmp_path, resume=True).images_seen == 32


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    toy_trainer(tmp_path, num_images=64).train()
    (tmp_path / "checkpoint-0000000064" / "ema.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert toy_trainer(tmp_path).images_seen == 32


def test_checkpoint_is_written_once_at_each_moment(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, num_images=32)
    trainer.train()
    assert trainer.save() == trainer.save() == tmp_path / "checkpoint-0000000032"
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def outputs(diffusion: GaussianDiffusion) -> Tensor:
    return diffusion.sample(2, num_steps=2, batch_size=2)


def test_trained_diffusion_is_loaded_from_its_run_or_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, toy_diffusion(num_classes=2, prediction="v"), stripes(True), num_images=64)
    trainer.train()
    with trainer.ema_weights():
        averaged = outputs(trainer.diffusion)
    loaded = load_diffusion(tmp_path, device="cpu")
    assert not loaded.training and loaded.config == trainer.diffusion.config and loaded.num_classes == 2
    assert torch.equal(outputs(loaded), averaged)
    assert torch.equal(outputs(load_diffusion(tmp_path, ema=False, device="cpu")), outputs(trainer.diffusion))
    early = load_diffusion(tmp_path / "checkpoint-0000000032", device=torch.device("cpu"))
    assert not torch.equal(outputs(early), averaged)


class _Plain(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 1, 3, padding=1)
        self.first.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_another_network_is_trained_and_loaded_into_one_that_is_given(tmp_path: Path) -> None:
    diffusion = GaussianDiffusion(_Plain(), 8, 1, num_timesteps=20, levels=17)
    toy_trainer(tmp_path, diffusion, num_images=32).train()
    toy_trainer(tmp_path, diffusion, num_images=64).train()
    with pytest.raises(CheckpointError, match=r"expected model= for .* another network than a fastddpm.UNet, got None"):
        load_diffusion(tmp_path)
    loaded = load_diffusion(tmp_path, model=_Plain(), ema=False, device="cpu")
    assert torch.equal(outputs(loaded), outputs(diffusion))
    assert not torch.equal(outputs(load_diffusion(tmp_path, model=_Plain(), device="cpu")), outputs(diffusion))
    with pytest.raises(CheckpointError, match=r"expected group 'model' of .* to fit, got first.weight"):
        load_diffusion(tmp_path, model=_Plain(5))


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got nothing there; pass the output_dir"):
        load_diffusion(tmp_path / "none")
    with pytest.raises(CheckpointError, match="got a directory without checkpoints"):
        load_diffusion(tmp_path)
    toy_trainer(tmp_path, num_images=32).train()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    half = tmp_path / "checkpoint-0000000048"
    half.mkdir()
    (half / "model.safetensors").write_bytes((latest.path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"without the file state.json; delete it, .*checkpoint-0000000032 is intact"
    ):
        load_diffusion(half)
    with pytest.warns(UserWarning, match=r"using .*checkpoint-0000000032, which is intact"):
        load_diffusion(tmp_path, device="cpu")


def test_option_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path, num_images=32)
    original = trainer.to_dict
    monkeypatch.setattr(trainer, "to_dict", lambda: json.loads(json.dumps(original()).replace('"levels"', '"shades"')))
    trainer.train()
    with pytest.raises(CheckpointError, match=r"with options that this version knows, got .*shades.*fastddpm 0"):
        load_diffusion(tmp_path)
