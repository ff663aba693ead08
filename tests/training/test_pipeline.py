"""A pipeline of diffusers as a diffusion that samples: what its scheduler means, and one step beside its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import DiffusionConfig, UNet, load_diffusion
from fastddpm.cli import main
from fastddpm.training.checkpoint import CheckpointError
from fastddpm.training.pipeline import DEFAULTS, diffusion_config
from tests.fake_hub import put_in_place
from tests.nn.networks import TINY, filled, variant
from tests.tolerance import assert_near_peer

# as google/ddpm-cifar10-32 has it
CIFAR10: dict[str, Any] = dict(
    _class_name="DDPMScheduler", beta_end=0.02, beta_schedule="linear", beta_start=0.0001, clip_sample=True,
    num_train_timesteps=1000, trained_betas=None, variance_type="fixed_large",
)  # fmt: skip


def pipeline(folder: Path, flat: bool = True, unet: UNet | None = None, **scheduler: Any) -> Path:
    """A folder as of google/ddpm-cifar10-32, flat or with a sub-folder for each part, of a small network."""
    (filled(UNet(**TINY)) if unet is None else unet).save_pretrained(folder / ("" if flat else "unet"), "diffusers")
    place = folder / ("" if flat else "scheduler") / "scheduler_config.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps({**CIFAR10, **scheduler}))
    return folder


def test_the_published_scheduler_is_the_default_diffusion() -> None:
    """Ho et al. 2020: 1000 steps, beta from 1e-4 to 0.02, the large variance."""
    ours = diffusion_config(CIFAR10)
    assert ours == DiffusionConfig(beta_start=1e-4, beta_end=0.02)
    assert torch.equal(ours.make_schedule().betas, DiffusionConfig().make_schedule().betas)
    assert diffusion_config({}).variance == "fixed_small"  # the default of DDPMScheduler, which churches and cats have


@pytest.mark.parametrize("flat", [True, False])
def test_three_lines_to_images(flat: bool, tmp_path: Path) -> None:
    folder = pipeline(tmp_path, flat, num_train_timesteps=5)
    model = load_diffusion(folder, device="cpu")
    images = model.sample(2, seed=0)
    assert images.shape == (2, 3, 8, 8)
    assert images.std() > 0.01
    assert not model.training
    network = UNet.from_pretrained(folder)
    config = diffusion_config({**CIFAR10, "num_train_timesteps": 5})
    assert torch.equal(fastddpm.GaussianDiffusion(network, config=config).sample(2, seed=0), images)


@pytest.mark.parametrize("flat", [True, False])
def test_three_lines_from_the_hub(flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = put_in_place(tmp_path, monkeypatch)
    folder = pipeline(hub / "google" / "ddpm-tiny", flat, num_train_timesteps=5)
    images = load_diffusion("google/ddpm-tiny", device="cpu").sample(2, seed=0)
    assert torch.equal(images, load_diffusion(folder, device="cpu").sample(2, seed=0))
    with pytest.raises(CheckpointError, match="no folder, and the hub says: 404 Client Error"):
        load_diffusion("google/ddpm-absent")
    filled(UNet(**TINY)).save_pretrained(hub / "someone" / "network")
    with pytest.raises(
        CheckpointError, match=r"expected scheduler_config.json or scheduler/.*, got neither; for a net"
    ):
        load_diffusion("someone/network")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline(tmp_path / "pipeline", num_train_timesteps=5)
    assert main(["sample", str(folder), "--out", str(tmp_path / "grid.png"), "--num-images", "2"]) == 0
    assert Image.open(tmp_path / "grid.png").width > 8
    assert "made" in capsys.readouterr().out


def test_a_learned_variance_and_classes(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, unet=variant("adm"), num_train_timesteps=5, variance_type="learned_range")
    model = load_diffusion(folder, device="cpu")
    assert model.config.variance == "learned_range"
    assert model.sample(2, labels=1).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (dict(beta_schedule="scaled_linear"), dict(schedule="quadratic")),
        (dict(beta_schedule="squaredcos_cap_v2"), dict(schedule="cosine", beta_start=None, beta_end=None)),
        (dict(prediction_type="sample"), dict(prediction="x0")),
        (
            dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            dict(prediction="v", zero_terminal_snr=True),
        ),
        (dict(variance_type="fixed_small_log"), dict(variance="fixed_small")),
        (dict(variance_type="learned_range"), dict(variance="learned_range", loss="hybrid")),
        (dict(clip_sample=False, clip_sample_range=3.0), dict(clip_denoised=False)),
        (dict(num_train_timesteps=4000, timestep_spacing="trailing", steps_offset=1), dict(num_timesteps=4000)),
        (dict(_class_name="DDIMScheduler", set_alpha_to_one=False), dict()),
    ],
)
def test_what_the_keys_mean(keys: dict[str, Any], options: dict[str, Any]) -> None:
    expected = DiffusionConfig(**{"beta_start": 1e-4, "beta_end": 0.02, **options})
    assert diffusion_config({**CIFAR10, **keys}) == expected


def test_all_keys_at_fault_are_named() -> None:
    faults = dict(
        _class_name="PNDMScheduler", beta_schedule="sigmoid", trained_betas=[0.1], variance_type="fixed_large_log",
        prediction_type="flow", thresholding=True, clip_sample_range=2.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^load_diffusion: expected a scheduler that a DiffusionConfig can") as error:
        diffusion_config({**CIFAR10, **faults})
    for key, value in faults.items():
        assert f"{key} {value!r} (supported: " in str(error.value)
    assert str(error.value).endswith("use GaussianDiffusion(UNet.from_pretrained(path), ...) with a configuration of "
                                     "your own")  # fmt: skip


def test_paths_that_are_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled(UNet(**TINY)).save_pretrained("network")
    with pytest.raises(CheckpointError, match="got a directory without checkpoints"):
        load_diffusion("network")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"expected .*scheduler_config.json to be JSON"):
        load_diffusion(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub to get runs/mispelt \(there is no folder of that name\)"):
        load_diffusion("runs/mispelt")


@pytest.mark.peer
def test_missing_keys_have_the_defaults_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler().config
    assert {key: theirs[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.peer
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_step_is_that_of_their_scheduler(prediction: str, variance: str, schedule: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    keys = dict(prediction_type=prediction, variance_type=variance, beta_schedule=schedule)
    learned = variance == "learned_range"
    model = load_diffusion(
        pipeline(tmp_path, unet=filled(UNet(**TINY, learned_variance=learned)), **keys), device="cpu"
    )
    theirs = DDPMScheduler.from_pretrained(tmp_path)
    assert_near_peer(model.schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert_near_peer(model.schedule.betas, theirs.betas)
    # its tables are float32, in which 1 - abar is off by up to 3e-3 at the first steps; with exact ones it is exact
    theirs.alphas_cumprod = model.schedule.alphas_cumprod
    x = torch.randn(2, 3, 8, 8)
    for t in (0, 1, 400, 998):
        times = torch.full((2,), t)
        with torch.no_grad():
            out = model.predict(x, times)
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            ours, pred_x0 = model.p_sample(x, times, z)
        expected = theirs.step(out, t, x, generator=torch.Generator().manual_seed(t))
        assert_near_peer(pred_x0, expected.pred_original_sample)
        assert_near_peer(ours, expected.prev_sample)
