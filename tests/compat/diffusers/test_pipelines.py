"""In the pipelines of diffusers: our steps are the ones that run, and the images are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastddpm.compat.diffusers as ours
from tests.tolerance import assert_near_peer

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
NAMES = ("DDPMScheduler", "DDIMScheduler")


def pipeline(name: str, **config: Any) -> Any:
    """A pipeline with the original scheduler and a small network."""
    import diffusers

    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    made = getattr(diffusers, name.replace("Scheduler", "Pipeline"))(network, getattr(diffusers, name)(**config))
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: Any, name: str, **options: Any) -> Tensor:
    """Of a pipeline, with its usual options."""
    options = {"eta": 0.6, **options} if name == "DDIMScheduler" else options
    options = dict(batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(4)) | options
    return torch.from_numpy(pipe(output_type="np", **options).images)


@pytest.mark.parametrize("how", ["install", "assignment"])
@pytest.mark.parametrize("name", NAMES)
def test_in_place_of_the_original(name: str, how: str) -> None:
    pipe = pipeline(name)
    expected = images(pipe, name)
    if how == "install":
        assert ours.install(pipe) is pipe
    else:
        pipe.scheduler = getattr(ours, name).from_config(pipe.scheduler.config)
    assert isinstance(pipe.scheduler, getattr(ours, name))
    step = getattr(ours, name).step
    with mock.patch.object(getattr(ours, name), "step", autospec=True, side_effect=step) as counted:
        assert_near_peer(images(pipe, name), expected)
    assert counted.call_count == 6


@pytest.mark.parametrize("generator", ["list", "global"])
@pytest.mark.parametrize("name", NAMES)
def test_generators_in_a_pipeline(name: str, generator: str) -> None:
    pipe = pipeline(name)
    found = []
    for _ in range(2):
        torch.manual_seed(8)
        each = [torch.Generator().manual_seed(i) for i in range(2)] if generator == "list" else None
        found.append(images(pipe, name, generator=each))
        ours.install(pipe)
    assert_near_peer(found[1], found[0])


def test_the_solver_in_a_pipeline() -> None:
    import diffusers

    pipe = pipeline("DDPMScheduler")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    expected = images(pipe, "DDPMScheduler")
    ours.install(pipe)
    assert isinstance(pipe.scheduler, ours.DPMSolverMultistepScheduler)
    assert_near_peer(images(pipe, "DDPMScheduler"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_our_scheduler_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Whoever loads it gets the scheduler of diffusers, unless they hand in ours."""
    import diffusers

    pipe = ours.install(pipeline(name, beta_end=0.015))
    expected = images(pipe, name)
    pipe.save_pretrained(tmp_path)
    load = getattr(diffusers, name.replace("Scheduler", "Pipeline")).from_pretrained
    original = load(tmp_path)
    assert type(original.scheduler) is getattr(diffusers, name) and original.scheduler.config.beta_end == 0.015
    made = getattr(ours, name).from_pretrained(tmp_path, subfolder="scheduler")
    with_ours = load(tmp_path, scheduler=made)  # the constructor of DDIMPipeline makes another of it
    assert isinstance(ours.install(with_ours).scheduler, getattr(ours, name))
    for again in (original, with_ours):
        again.set_progress_bar_config(disable=True)
        assert_near_peer(images(again, name), expected)


def test_a_pipeline_takes_ours_in_its_constructor() -> None:
    import diffusers

    pipe = pipeline("DDPMScheduler")
    made = diffusers.DDPMPipeline(pipe.unet, ours.DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    assert isinstance(made.scheduler, ours.DDPMScheduler) and isinstance(made.scheduler, diffusers.SchedulerMixin)
    assert_near_peer(images(made, "DDPMScheduler"), images(pipe, "DDPMScheduler"))


@pytest.mark.parametrize("name", [*NAMES, "DPMSolverMultistepScheduler"])
def test_classes_that_can_take_its_place(name: str) -> None:
    import diffusers

    expected = getattr(diffusers, name)().compatibles
    assert set(getattr(ours, name)().compatibles) == set(expected)


def test_options_of_install() -> None:
    pipe = ours.install(pipeline("DDPMScheduler"), corrected=True, noise_seed=3)
    assert pipe.scheduler.config.corrected and pipe.scheduler.noise_seed == 3
    generator = torch.Generator().manual_seed(4)
    first = images(pipe, "DDPMScheduler", generator=generator)
    fresh = torch.Generator().manual_seed(4)
    torch.randn(2, 3, 8, 8, generator=fresh)
    assert torch.equal(generator.get_state(), fresh.get_state())  # the steps drew nothing from it
    assert torch.equal(images(pipe, "DDPMScheduler"), first)
    assert ours.install(pipe).scheduler.noise_seed is None and pipe.scheduler.config.corrected  # kept
    assert "corrected" not in ours.install(pipe, corrected=False).scheduler.config


def test_what_cannot_be_installed() -> None:
    import diffusers

    pipe = pipeline("DDPMScheduler")
    pipe.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(TypeError, match=r"expected pipe\.scheduler to be one of DDPMScheduler, .*, got PNDMScheduler"):
        ours.install(pipe)
    with pytest.raises(TypeError, match="got NoneType"):
        ours.install(object())
