"""Bits per dimension of a data set: the exact sum, the estimate from a part of it, and the yardstick."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddpm.diffusion import GaussianDiffusion, prior_kl
from fastddpm.likelihood import BitsPerDim, bits_per_dim, histogram_bits_per_dim, vlb_terms
from fastddpm.nn import UNet
from fastddpm.ops import philox
from tests.likelihood.networks import random_images, small_diffusion
from tests.tolerance import assert_equal_to_rounding

F64 = torch.float64


def assert_same(a: BitsPerDim, b: BitsPerDim, ulps: float = 256) -> None:
    for name in ("total", "prior", "standard_error"):
        assert_equal_to_rounding(getattr(a, name), getattr(b, name), ulps=ulps)
    for name in ("per_timestep", "eps_mse", "x0_mse"):
        assert_equal_to_rounding(getattr(a, name), getattr(b, name), ulps=ulps)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "unit", "learned", "learned_range"])
def test_every_t_of_every_image(variance: str) -> None:
    options: dict[str, Any] = {"loss": "hybrid"} if variance.startswith("learned") else {}
    diffusion = small_diffusion(variance=variance, channels=2, **options).double()
    images = random_images(5, channels=2)
    result = bits_per_dim(diffusion, images, seed=3, batch_size=7)

    x0 = images.double() / 8 - 1
    totals = prior_kl(x0, diffusion.schedule).flatten(1).mean(1)
    assert_equal_to_rounding(result.prior, totals.mean() / math.log(2), ulps=64)
    for i in range(6):
        t = torch.full((5,), i)
        noise = philox.normal(
            tuple(x0.shape), seed=3, sample=torch.arange(5), step=i, stream=philox.TRAINING_NOISE, dtype=F64
        )
        with torch.no_grad():
            nats, eps_mse, x0_mse = vlb_terms(diffusion, x0, t, noise)
        totals = totals + nats
        assert_equal_to_rounding(result.per_timestep[i], nats.mean() / math.log(2), ulps=256)
        assert_equal_to_rounding(result.eps_mse[i], eps_mse.mean(), ulps=256)
        assert_equal_to_rounding(result.x0_mse[i], x0_mse.mean(), ulps=256)
    assert_equal_to_rounding(result.total, totals.mean() / math.log(2), ulps=64)
    assert_equal_to_rounding(result.standard_error, totals.std() / math.sqrt(5) / math.log(2), ulps=4000)
    assert result.decoder == float(result.per_timestep[0])
    assert (result.num_images, result.levels, result.num_timesteps, result.network_calls) == (5, 17, 6, 30)
    assert result.timesteps_per_image is None and result.seconds > 0


@pytest.mark.parametrize("timesteps_per_image", [None, 2])
def test_batches_and_the_kind_of_array_change_nothing(tmp_path: Path, timesteps_per_image: int | None) -> None:
    diffusion, images = small_diffusion().double(), random_images(11)
    whole = bits_per_dim(diffusion, images, timesteps_per_image=timesteps_per_image)
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for given, batch_size in ((images, 7), (images.numpy(), 1), (mapped, 5), (mapped, 20)):
        assert_same(
            bits_per_dim(diffusion, given, timesteps_per_image=timesteps_per_image, batch_size=batch_size), whole
        )
    assert bits_per_dim(diffusion, images, seed=1).total != whole.total


def test_images_are_read_in_order_and_never_all_at_once() -> None:
    reads: list[tuple[int, int]] = []

    class Recorder(np.ndarray[Any, np.dtype[np.uint8]]):
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, slice) and key.stop is not None:
                reads.append((key.start, key.stop))
            return super().__getitem__(key)

    images = random_images(40).numpy().view(Recorder)
    calls: list[int] = []
    diffusion = small_diffusion()
    diffusion.model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    bits_per_dim(diffusion, images, batch_size=16)
    assert calls == [16] * 15  # 240 evaluations: every batch is full
    assert [start for start, _ in reads] == sorted(start for start, _ in reads)
    assert all(stop - start <= 4 for start, stop in reads)


class Recording(nn.Module):
    """A network that notes which t it saw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(t)
        out: Tensor = self.inner(x, t)
        return out


@pytest.mark.parametrize(("count", "per_image"), [(10, 1), (7, 3), (13, 4), (3, 5), (2, 5), (50, 2)])
def test_evaluations_are_spread_evenly_over_t(count: int, per_image: int) -> None:
    diffusion = small_diffusion()
    diffusion.model = network = Recording(diffusion.model)
    result = bits_per_dim(diffusion, random_images(count), timesteps_per_image=per_image)
    t = torch.cat(network.seen).reshape(count, 1 + per_image)
    assert (t[:, 0] == 0).all()
    assert (t[:, 1:].diff(dim=1) > 0).all() and (t[:, 1:] >= 1).all()  # an image has no t twice
    counts = torch.bincount(t[:, 1:].flatten(), minlength=6)[1:]
    assert counts.max() - counts.min() <= 1
    assert result.network_calls == count * (1 + per_image)
    assert result.timesteps_per_image == per_image


def test_all_steps_but_the_decoder_is_the_exact_sum() -> None:
    diffusion, images = small_diffusion().double(), random_images(6)
    assert_same(bits_per_dim(diffusion, images, timesteps_per_image=5), bits_per_dim(diffusion, images))


def test_a_part_of_the_steps_estimates_the_sum_without_bias() -> None:
    diffusion, images = small_diffusion(), random_images(11)
    differences, decoders = [], []
    for seed in range(250):
        whole = bits_per_dim(diffusion, images, seed=seed)
        part = bits_per_dim(diffusion, images, seed=seed, timesteps_per_image=1)
        differences.append(part.total - whole.total)
        decoders.append(part.decoder - whole.decoder)
    error = torch.tensor(differences, dtype=F64)
    assert error.std() > 0.01  # the two do differ
    assert abs(error.mean() / (error.std() / math.sqrt(len(error)))) < 5
    assert_equal_to_rounding(torch.tensor(decoders).abs().max() + 1, 1.0, ulps=64)


@pytest.mark.parametrize("timesteps_per_image", [None, 1])
def test_standard_error_is_the_deviation_between_data_sets(timesteps_per_image: int | None) -> None:
    diffusion = small_diffusion(variance="fixed_large")
    totals, squares, replicates = [], [], 300
    for seed in range(replicates):
        images = random_images(20, seed=seed)
        result = bits_per_dim(diffusion, images, seed=seed, timesteps_per_image=timesteps_per_image)
        totals.append(result.total)
        squares.append(result.standard_error**2)
    ratio = sum(squares) / replicates / float(torch.tensor(totals, dtype=F64).var())
    # a variance of n normal numbers has a relative error of sqrt(2 / n)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / replicates)


def test_no_code_beats_the_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(17, (200, 1, 4, 4), generator=generator, dtype=torch.uint8)
    for variance in ("fixed_small", "fixed_large"):
        result = bits_per_dim(small_diffusion(variance=variance), images)
        assert result.total > math.log2(17) - 5 * result.standard_error


def test_one_image_has_no_standard_error_and_json_says_so() -> None:
    result = bits_per_dim(small_diffusion(), random_images(4), max_images=1)
    assert result.num_images == 1 and math.isnan(result.standard_error)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["standard_error"] is None
    assert data["total"] == result.total and data["per_timestep"] == result.per_timestep.tolist()
    assert set(data) == {
        "total", "standard_error", "prior", "decoder", "per_timestep", "eps_mse", "x0_mse", "num_images", "levels",
        "num_timesteps", "timesteps_per_image", "network_calls", "seconds",
    }  # fmt: skip


def test_first_images_only() -> None:
    diffusion, images = small_diffusion().double(), random_images(9)
    assert_same(bits_per_dim(diffusion, images, max_images=4), bits_per_dim(diffusion, images[:4]))
    assert bits_per_dim(diffusion, images, max_images=100).num_images == 9


def test_a_single_step_is_prior_and_decoder() -> None:
    result = bits_per_dim(small_diffusion(1, beta_end=0.05), random_images(3))
    assert result.num_timesteps == 1 and result.total == result.prior + result.decoder


def test_zero_terminal_snr_has_no_prior() -> None:
    result = bits_per_dim(small_diffusion(prediction="v", zero_terminal_snr=True), random_images(3))
    assert result.prior == 0 and math.isfinite(result.total)
    assert result.eps_mse[-1] == 0  # x_T is eps


def test_conventions_of_the_first_log_variance_change_bits_but_not_samples() -> None:
    images = random_images(4)
    for variance in ("fixed_small", "fixed_large"):
        copy, tiny = (small_diffusion(variance=variance, first_log_variance=c) for c in ("copy", "tiny"))
        assert (copy.sample(2, seed=3) == tiny.sample(2, seed=3)).all()
        a, b = bits_per_dim(copy, images), bits_per_dim(tiny, images)
        assert abs(a.decoder - b.decoder) > 0.01
        assert (a.per_timestep[1:] == b.per_timestep[1:]).all()


def unet(**options: Any) -> UNet:
    return UNet(
        image_size=(8, 8), in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4,
        attention_resolutions=(4,), **options,
    )  # fmt: skip


def test_labels_reach_the_network() -> None:
    diffusion = GaussianDiffusion(unet(num_classes=3), num_timesteps=4, beta_end=0.5, levels=17).double()
    for parameter in diffusion.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = random_images(5, size=8)
    labels = torch.tensor([0, 1, 2, 1, 0])
    with_labels = bits_per_dim(diffusion, images, labels)
    assert_same(bits_per_dim(diffusion, images.numpy(), labels.numpy(), batch_size=3), with_labels, ulps=4000)
    assert bits_per_dim(diffusion, images, labels.flip(0) * 0).total != with_labels.total
    null = bits_per_dim(diffusion, images, torch.full((5,), 3))
    assert_same(bits_per_dim(diffusion, images), null)


def test_modes_are_put_back_and_training_goes_on() -> None:
    diffusion = GaussianDiffusion(unet(dropout=0.5), num_timesteps=4, beta_end=0.5, levels=17)
    diffusion.train()
    diffusion.model.eval()  # a mixture of modes
    before = [module.training for module in diffusion.modules()]
    images = random_images(3, size=8)
    first = bits_per_dim(diffusion, images)
    assert [module.training for module in diffusion.modules()] == before
    diffusion.train()
    assert bits_per_dim(diffusion, images).total == first.total  # dropout is off in here
    diffusion(images).backward()
    assert all(p.grad is not None for p in diffusion.parameters())

    def fail(*_: object) -> None:
        raise RuntimeError("a network that breaks")

    diffusion.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a network that breaks"):
        bits_per_dim(diffusion, images)
    assert all(module.training for module in diffusion.modules())


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    bits_per_dim(small_diffusion(), random_images(2), progress=True)
    assert "12/12" in capfd.readouterr().err
    bits_per_dim(small_diffusion(), random_images(2))
    assert capfd.readouterr().err == ""


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": random_images(3, size=5)}, ValueError, r"expected images of shape .* got \[3, 1, 5, 5\]"),
    ({"images": random_images(3)[:0]}, ValueError, r"expected images of shape \[N, 1, 4, 4\] with N >= 1, got \[0"),
    ({"images": random_images(3)[0]}, ValueError, r"expected images of shape \[N, 1, 4, 4\]"),
    ({"images": random_images(3).float()}, TypeError, "expected images of dtype uint8, got torch.float32"),
    ({"images": random_images(3).numpy().astype(np.int64)}, TypeError, "expected images of dtype uint8, got int64"),
    ({"images": random_images(3) + 17}, ValueError, r"expected pixels in 0\.\.16, got \d+; set levels"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected no labels for a network without classes"),
    ({"batch_size": 0}, ValueError, "expected batch_size >= 1, got 0"),
    ({"max_images": 0}, ValueError, "expected max_images >= 1, got 0"),
    ({"seed": -1}, ValueError, r"expected seed in \[0, 2\^63\), got -1"),
    ({"timesteps_per_image": 0}, ValueError, r"expected timesteps_per_image in \[1, 5\], got 0; None evaluates"),
    ({"timesteps_per_image": 6}, ValueError, r"expected timesteps_per_image in \[1, 5\], got 6"),
    ({"timesteps_per_image": 3}, ValueError, "expected .* twice, got 3; use with 3 images at least 4, or None"),
    ({"timesteps_per_image": 5, "max_images": 1}, ValueError, "expected .* use at least 2 images, not 1, or None"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"images": random_images(3)} | changed
    with pytest.raises(error, match=f"bits_per_dim: {message}"):
        bits_per_dim(small_diffusion(), **arguments)


def test_errors_of_labels() -> None:
    diffusion = GaussianDiffusion(unet(num_classes=3), num_timesteps=4, beta_end=0.5, levels=17)
    images = random_images(3, size=8)
    with pytest.raises(TypeError, match=r"expected labels of dtype int64, got torch.int32; convert them"):
        bits_per_dim(diffusion, images, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected labels of shape \[3\], got \[2\]; pass one class an image"):
        bits_per_dim(diffusion, images, torch.zeros(2, dtype=torch.int64))


def test_histogram_by_hand() -> None:
    train = torch.tensor([[0, 3], [0, 1], [2, 1]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    test = torch.tensor([[0, 3], [1, 1]], dtype=torch.uint8).reshape(2, 1, 1, 2)
    p = torch.tensor([2.5, 1.5, 0.5, 2.5], dtype=F64) / (3 + 4 / 2)
    expected = float(-torch.log2(p).mean())
    assert_equal_to_rounding(histogram_bits_per_dim(train, test, levels=4), expected)
    assert_equal_to_rounding(histogram_bits_per_dim(train.numpy(), test.numpy(), levels=4), expected)
    # channels have histograms of their own
    two = torch.cat([train, 3 - train], dim=1), torch.cat([test, 3 - test], dim=1)
    assert_equal_to_rounding(histogram_bits_per_dim(*two, levels=4), expected)


def test_histogram_of_the_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra: pip install fastddpm[digits]")
    digits = datasets.load_digits().images.astype(np.uint8)[:, None]
    order = np.random.Generator(np.random.Philox(0)).permutation(len(digits))
    value = histogram_bits_per_dim(digits[order[:1500]], digits[order[1500:]], levels=17)
    assert abs(value - 2.42) < 0.05


def test_errors_of_the_histogram() -> None:
    images = random_images(3)
    for levels in (1, 257):
        with pytest.raises(ValueError, match=rf"histogram_bits_per_dim: expected levels in \[2, 256\], got {levels}"):
            histogram_bits_per_dim(images, images, levels)
    with pytest.raises(ValueError, match=r"expected test_images of shape \[N, 1, 4, 4\] .* got \[3, 1, 5, 5\]"):
        histogram_bits_per_dim(images, random_images(3, size=5), 17)
    with pytest.raises(ValueError, match=r"expected train_images of shape .* got \[0, 1, 4, 4\]"):
        histogram_bits_per_dim(images[:0], images, 17)
    with pytest.raises(TypeError, match=r"expected train_images of dtype uint8, got torch\.int64"):
        histogram_bits_per_dim(images.long(), images, 17)
    with pytest.raises(ValueError, match=r"expected pixels in 0\.\.3, got \d+; set levels"):
        histogram_bits_per_dim(images, images, 4)
