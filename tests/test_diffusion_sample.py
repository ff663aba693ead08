"""GaussianDiffusion.sample and interpolate: the algorithm itself, which image is which, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.nn import UNet
from fastddpm.ops import philox
from tests.likelihood.networks import small_diffusion
from tests.tolerance import assert_equal_to_rounding


def class_diffusion(**options: Any) -> GaussianDiffusion:
    """An untrained U-Net with 3 classes, its last layer not zero."""
    torch.manual_seed(1)
    network = UNet(
        image_size=(8, 8), in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4,
        attention_resolutions=(4,), num_classes=3,
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return GaussianDiffusion(network, **(dict(num_timesteps=5, beta_end=0.5, prediction="x0") | options))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "unit", "learned", "learned_range"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "mu"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_is_algorithm_2(variance: str, kind: str, clip: bool) -> None:
    loss = "hybrid" if variance.startswith("learned") else "simple"
    diffusion = small_diffusion(prediction=kind, variance=variance, loss=loss, clip_denoised=clip)
    sample, shape = torch.arange(3) + 4, (3, 1, 4, 4)
    x = philox.normal(shape, seed=9, sample=sample, step=0, stream=philox.X_T)
    with torch.no_grad():
        for i, step in enumerate(reversed(range(6))):
            mean, log_variance, _ = diffusion.p_mean_variance(x, torch.full((3,), step))
            z = philox.normal(shape, seed=9, sample=sample, step=i, stream=philox.SAMPLER_NOISE)
            expected = mean + torch.exp(0.5 * log_variance) * z if step > 0 else mean
            x, _ = diffusion.p_sample(x, torch.full((3,), step), z)
            assert torch.equal(x, expected)
    images = diffusion.sample(3, seed=9, first_image=4, batch_size=4)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert_equal_to_rounding(images, (x / 2 + 0.5).clamp(0, 1), ulps=100, scale=1 + x.abs().max())


@pytest.mark.parametrize(
    "options", [{}, dict(sampler="ddim", eta=0.5, num_steps=3), dict(sampler="dpmpp_2m", num_steps=3)]
)
def test_an_image_keeps_its_bits_in_any_part_of_the_run(options: dict[str, Any]) -> None:
    diffusion = class_diffusion()
    options |= dict(seed=2, batch_size=4, guidance_scale=2.0)
    labels = torch.arange(10) % 3
    whole = diffusion.sample(10, labels=labels, **options)
    assert (diffusion.sample(1, first_image=7, labels=labels[7:8], **options) == whole[7:8]).all()
    assert (diffusion.sample(5, first_image=2, labels=labels[2:7], **options) == whole[2:7]).all()
    assert (diffusion.sample(10, labels=labels, **options | {"seed": 3}) != whole).any()
    assert len({image.numpy().tobytes() for image in whole}) == 10


def test_one_label_for_all_and_none() -> None:
    diffusion = class_diffusion()
    one = diffusion.sample(3, labels=2, seed=1)
    assert (one == diffusion.sample(3, labels=torch.full((3,), 2), seed=1)).all()
    null = diffusion.sample(3, seed=1)
    assert (null == diffusion.sample(3, labels=3, seed=1)).all() and (null != one).any()
    assert (diffusion.sample(3, labels=2, seed=1, guidance_scale=3.0) != one).any()


def test_guidance_leads_away_from_the_null_class() -> None:
    diffusion = class_diffusion()
    guided = diffusion.sample(2, labels=2, seed=1, guidance_scale=2.0)
    for row, matters in ((0, False), (1, False), (2, True), (3, True)):
        with torch.no_grad():
            embedding: Tensor = diffusion.model.class_embedding.weight  # type: ignore[union-attr, assignment]
            kept = embedding[row].clone()
            embedding[row] += 1
            assert (diffusion.sample(2, labels=2, seed=1, guidance_scale=2.0) != guided).any() == matters
            embedding[row] = kept


def test_a_network_without_a_null_class_is_told_each_class() -> None:
    diffusion = class_diffusion()
    assert diffusion.null_class == 3
    network = UNet(diffusion.model.config, null_class=False)  # type: ignore[arg-type]
    state = diffusion.model.state_dict()
    network.load_state_dict({**state, "class_embedding.weight": state["class_embedding.weight"][:3]})
    plain = GaussianDiffusion(network, config=diffusion.config)
    assert plain.null_class is None
    assert (plain.sample(3, labels=2, seed=1) == diffusion.sample(3, labels=2, seed=1)).all()
    for options in ({}, dict(labels=2, guidance_scale=2.0)):
        with pytest.raises(ValueError, match="expected labels, and no guidance, for a network without a null class"):
            plain.sample(3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected labels in \[0, 3\), got 3; there is no null class"):
        plain.sample(3, labels=3)


def test_options_reach_the_loop(capfd: pytest.CaptureFixture[str]) -> None:
    diffusion = small_diffusion(prediction="eps")  # whose predicted images leave the range
    seen: list[tuple[int, int]] = []

    def note(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        assert x.shape == pred.shape == (2, 1, 4, 4)
        seen.append((i, num_steps))

    diffusion.sample(2, batch_size=2, sampler="ddim", num_steps=3, callback=note, progress=True)
    assert seen == [(0, 3), (1, 3), (2, 3)] and "3/3" in capfd.readouterr().err
    plain, spaced = (diffusion.sample(2, sampler="ddim", num_steps=3, spacing=s) for s in ("trailing", "leading"))
    assert (plain != spaced).any()
    assert (diffusion.sample(2, dynamic_threshold_ratio=0.5) != diffusion.sample(2)).any()


def test_numbers_of_steps_when_none_is_given() -> None:
    calls: list[int] = []
    diffusion = small_diffusion(100, beta_end=0.1)
    diffusion.model.register_forward_pre_hook(lambda _, args: calls.append(int(args[1][0])))
    for sampler, count in (("ddpm", 100), ("ddim", 50), ("dpmpp_2m", 20)):
        calls.clear()
        diffusion.sample(1, batch_size=1, sampler=sampler)
        assert len(calls) == count and calls[0] == 99


def test_a_single_step_with_a_learned_variance() -> None:
    for variance in ("learned", "learned_range"):
        diffusion = small_diffusion(1, beta_end=0.05, variance=variance, loss="hybrid")
        assert diffusion.sample(2).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_inpainting_keeps_what_is_known(dtype: torch.dtype) -> None:
    diffusion = small_diffusion()
    known = torch.randint(17, (1, 1, 4, 4), dtype=torch.uint8)
    exact = known.float() / 16
    known = known if dtype == torch.uint8 else exact
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    images = diffusion.sample(5, known=known, mask=mask, batch_size=2, seed=1)
    assert_equal_to_rounding(images[..., :2], exact[..., :2].expand(5, 1, 4, 2), ulps=8, scale=1)
    assert (images[..., 2:] != diffusion.sample(5, batch_size=2, seed=1)[..., 2:]).any()
    several = diffusion.sample(5, known=known.expand(5, 1, 4, 4), mask=mask[:, :, :1], batch_size=2, seed=1)
    assert (several == images).all()


def test_interpolation_runs_from_one_image_to_the_other() -> None:
    diffusion = small_diffusion()
    a, b = torch.rand(2, 3, 1, 4, 4)
    ends = [diffusion.interpolate(a, b, weight, t=3, seed=1) for weight in (0.0, 1.0)]
    for (first, second), end in zip(((a, a), (b, b)), ends, strict=True):
        assert_equal_to_rounding(diffusion.interpolate(first, second, t=3, seed=1), end, ulps=64, scale=1)
    # the same noise on both: there and back is one way
    there, back = diffusion.interpolate(a, b, 0.25, t=3, seed=1), diffusion.interpolate(b, a, 0.75, t=3, seed=1)
    assert_equal_to_rounding(there, back, ulps=64, scale=1)
    weights = torch.tensor([0.0, 0.25, 1.0])
    each = diffusion.interpolate(a, b, weights, t=3, seed=1)
    for i, one in enumerate((ends[0], there, ends[1])):
        assert_equal_to_rounding(each[i], one[i], ulps=64, scale=1)
    assert (diffusion.interpolate(a, b) == diffusion.interpolate(a, b, t=3)).all()  # the middle of 6 steps
    stored = (a * 16).round().to(torch.uint8)
    assert_equal_to_rounding(
        diffusion.interpolate(stored, stored, t=2),
        diffusion.interpolate(stored / 16, stored / 16, t=2),
        ulps=64,
        scale=1,
    )
    assert diffusion.interpolate(a, b, t=5, num_steps=2).shape == a.shape


def test_modes_are_put_back_and_training_goes_on() -> None:
    diffusion = class_diffusion().train()
    images = torch.rand(2, 1, 8, 8)
    diffusion.sample(1, batch_size=1, num_steps=2)
    diffusion.interpolate(images, images, num_steps=2)
    assert all(module.training for module in diffusion.modules())
    diffusion(images, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in diffusion.parameters())


PLAIN: list[tuple[dict[str, Any], str]] = [
    (
        dict(sampler="euler"),
        "sample: expected sampler to be one of ddpm, ddim, dpmpp_2m, got 'euler'; choose one of these",
    ),
    (dict(eta=0.5), "sample: expected eta only with sampler 'ddim', got eta=0.5 with 'ddpm'; leave eta out"),
    (dict(num_steps=0), "num_steps"),
    (dict(num_steps=7), "num_steps"),
    (dict(spacing="random"), "got 'random'"),
    (dict(num_images=0), "expected num_images >= 1, got 0"),
    (dict(batch_size=0), "expected batch_size >= 1, got 0"),
    (dict(first_image=-1), "expected first_image >= 0, got -1"),
    (dict(labels=1), "sample: expected no labels or guidance for a network without classes"),
    (dict(guidance_scale=2.0), "sample: expected no labels or guidance for a network without classes"),
    (dict(known=torch.rand(1, 1, 4, 4)), "sample: expected known and mask together, got one of them"),
    (dict(mask=torch.ones(1, 1, 4, 4)), "sample: expected known and mask together, got one of them"),
    (dict(known=torch.rand(1, 1, 5, 5), mask=torch.ones(1)), "expected images of shape [B, 1, 4, 4], got [1, 1, 5, 5]"),
]


@pytest.mark.parametrize(("options", "message"), PLAIN)
def test_errors_of_sample(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_diffusion().sample(**options)


CLASSES: list[tuple[dict[str, Any], str]] = [
    (dict(guidance_scale=2.0), "sample: expected labels with guidance_scale=2.0, got None; say which classes to draw"),
    (dict(labels=torch.tensor([0, 1])), "sample: expected labels [3] or one class, got shape [2]"),
    (dict(labels=4), "sample: expected labels in [0, 3), got 4; 3 is the null class"),
    (dict(labels=torch.tensor([0, -1, 2])), "sample: expected labels in [0, 3), got -1; 3 is the null class"),
]


@pytest.mark.parametrize(("options", "message"), CLASSES)
def test_errors_of_classes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        class_diffusion().sample(3, **options)


def test_errors_of_interpolate() -> None:
    diffusion, a = small_diffusion(), torch.rand(2, 1, 4, 4)
    for t in (-1, 6):
        with pytest.raises(ValueError, match=rf"interpolate: expected t in \[0, 6\), got {t}; the middle is 3"):
            diffusion.interpolate(a, a, t=t)
    for wrong in (a[..., :3], a[0]):
        with pytest.raises(ValueError, match=r"expected images of shape \[B, 1, 4, 4\], got"):
            diffusion.interpolate(a, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(num_images=(2, 3, 32, 32)),
            "num_images to be an int, got (2, 3, 32, 32); pass how many images, each is [1",
        ),
        (dict(num_images=2.5), "num_images to be an int, got 2.5; pass how many images"),
        (dict(first_image=None), "first_image to be an int, got None; pass the index of the first image"),
        (dict(seed=None), "seed to be an int in [0, 2^64), got None; for other images at each call pass a random one"),
        (dict(seed="a"), "seed to be an int in [0, 2^64), got 'a'; for other images"),
    ],
)
def test_numbers_of_another_type_are_told(options: dict[str, Any], message: str) -> None:
    diffusion = small_diffusion()
    with pytest.raises(TypeError, match=re.escape(f"sample: expected {message}")):
        diffusion.sample(**options)
    images = torch.zeros(1, diffusion.channels, *diffusion.image_size)
    if "seed" in options:
        with pytest.raises(TypeError, match=re.escape(f"interpolate: expected {message}")):
            diffusion.interpolate(images, images, **options)


def test_the_batch_is_as_large_as_what_is_asked_for() -> None:
    diffusion = small_diffusion()
    rows: list[int] = []
    diffusion.model.register_forward_hook(lambda model, inputs, out: rows.append(len(out)))
    images = diffusion.sample(5, num_steps=1, seed=3)
    assert rows == [5]
    assert torch.equal(images, diffusion.sample(5, num_steps=1, seed=3, batch_size=5))


def lists(network: nn.Module) -> list[int]:
    """How often a network's forward is called, from now on."""
    seen: list[int] = []
    network.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_listed_network_draws_the_same_images(sampler: str, guidance_scale: float) -> None:
    diffusion = class_diffusion(num_timesteps=30)
    options: dict[str, Any] = dict(sampler=sampler, num_steps=25, batch_size=2, labels=1, guidance_scale=guidance_scale)
    plain = diffusion.sample(4, cuda_graph=False, **options)
    seen = lists(diffusion.model)
    assert torch.equal(diffusion.sample(4, **options), plain)
    assert len(seen) == 3  # a first call, one that is recorded, one to compare; none for the second batch
    diffusion.sample(2, **options)
    assert len(seen) == 3 + 25  # for so few calls it does not pay


def test_what_is_frozen_stays_from_one_sampling_to_the_next() -> None:
    diffusion = class_diffusion()
    network = diffusion.model
    plain = diffusion.sample(2, num_steps=5, cuda_graph=False)
    frozen, seen = diffusion.frozen(), lists(network)
    for _ in range(2):
        with frozen:
            assert torch.equal(diffusion.sample(2, num_steps=5), plain)
    assert len(seen) == 3
    with torch.no_grad():
        assert isinstance(network, UNet)
        network.conv_out.weight.mul_(2)
    assert not torch.equal(diffusion.sample(2, num_steps=5), plain)  # outside nothing is kept
    assert len(seen) == 8
