"""GaussianDiffusion: what it trains on and with which loss, what it draws and from where, and what it refuses."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.diffusion import OF_SAMPLING, OTHER_NAMES, DiffusionConfig, GaussianDiffusion
from fastddpm.likelihood import vlb_term
from fastddpm.nn import UNet
from fastddpm.ops import normal, philox
from fastddpm.prediction import value_from_x0
from tests.tolerance import assert_equal_to_rounding

F64 = torch.float64
SHORT: dict[str, Any] = dict(schedule="linear", num_timesteps=8, beta_start=0.02, beta_end=0.4)
KINDS = ["eps", "x0", "v", "mu"]


class Spy(nn.Module):
    """Notes what it is given; returns one number everywhere, or the tensor ``out``."""

    def __init__(self, out: Tensor | None = None, num_classes: int | None = None) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.tensor(0.25) if out is None else out)
        self.num_classes = num_classes
        self.x, self.t, self.labels = torch.empty(0), torch.empty(0), None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.x, self.t, self.labels = x, t, labels
        return self.out.expand_as(x).contiguous() if self.out.dim() == 0 else self.out


def spied(**options: Any) -> tuple[GaussianDiffusion, Spy]:
    spy = Spy(num_classes=options.pop("num_classes", None))
    return GaussianDiffusion(spy, 4, 2, **SHORT | options), spy


def images_of(count: int, levels: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(levels, (count, 2, 4, 4), generator=generator, dtype=torch.uint8)


def unet(**options: Any) -> UNet:
    return UNet(
        image_size=(8, 8), in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4,
        attention_resolutions=(4,), **options,
    )  # fmt: skip


# what it is made of


def test_the_network_says_its_size_and_channels() -> None:
    diffusion = GaussianDiffusion(unet(), num_timesteps=10)
    assert (diffusion.image_size, diffusion.channels, diffusion.num_timesteps) == ((8, 8), 1, 10)
    assert (diffusion.num_classes, diffusion.learned_variance) == (None, False)
    assert GaussianDiffusion(unet(num_classes=3)).num_classes == 3
    assert GaussianDiffusion(Spy(), (4, 6), 2).image_size == (4, 6)
    assert diffusion.device == torch.device("cpu")


def test_configuration_and_overrides() -> None:
    config = DiffusionConfig(num_timesteps=20, prediction="v")
    diffusion = GaussianDiffusion(Spy(), 4, 2, config, prediction="x0")
    assert diffusion.config == DiffusionConfig(num_timesteps=20, prediction="x0")
    assert DiffusionConfig(**diffusion.to_dict()) == diffusion.config
    assert config.prediction == "v"  # the one given stays as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(no_such_option=1), "'no_such_option'; choose among schedule, num_timesteps, "),
        (dict(num_timestep=1), "'num_timestep'; did you mean 'num_timesteps'?"),
        (dict(timesteps=100), "'timesteps'; that is num_timesteps=100 here"),
        (dict(objective="pred_v"), "'objective'; that is prediction='v' here"),
        (dict(prediction_type="epsilon"), "'prediction_type'; that is prediction='eps' here"),
        (dict(beta_schedule="linear"), "'beta_schedule'; that is schedule='linear' here"),
        (dict(sampling_timesteps=50), "'sampling_timesteps'; that is num_steps= of sample here"),
    ],
)
def test_options_that_there_are_not_are_told_with_what_comes_nearest(options: dict[str, Any], message: str) -> None:
    told = f"GaussianDiffusion: expected options of DiffusionConfig, got {message}"
    with pytest.raises(ValueError, match=re.escape(told)):
        GaussianDiffusion(Spy(), 4, 2, **options)


def test_options_of_other_libraries_are_those_of_ours() -> None:
    known = {field.name for field in fields(DiffusionConfig)}
    assert set(OTHER_NAMES.values()) <= known and not {*OTHER_NAMES, *OF_SAMPLING} & known
    assert set(OF_SAMPLING.values()) <= inspect.signature(GaussianDiffusion.sample).parameters.keys()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "exponential"}, "expected schedule to be one of linear, cosine, .*got 'exponential'; choose one"),
    ({"first_log_variance": "zero"}, "expected first_log_variance to be one of copy, tiny, got 'zero'"),
    ({"prediction": "score"}, "expected prediction to be one of eps, x0, v, mu, got 'score'; choose one"),
    ({"prediction": "v_prediction"}, "one of eps, x0, v, mu, got 'v_prediction'; that is 'v' here"),
    ({"variance": "small"}, "expected variance to be one of fixed_small, .*got 'small'"),
    ({"loss": "l1"}, "expected loss to be one of simple, vlb, hybrid, min_snr, p2, got 'l1'"),
    ({"mu_target": "median"}, "expected mu_target to be one of mean, sample, got 'median'"),
    ({"timestep_sampling": "random"}, "expected timestep_sampling to be one of uniform, .*got 'random'"),
    ({"num_timesteps": 0}, "expected an integer num_timesteps >= 1, got 0"),
    ({"levels": 1}, r"expected levels in \[2, 256\], got 1"),
    ({"levels": 257}, r"expected levels in \[2, 256\], got 257"),
    ({"label_dropout": 1.5}, r"expected label_dropout in \[0, 1\], got 1.5"),
    ({"label_dropout": math.nan}, r"expected label_dropout in \[0, 1\], got nan"),
    ({"min_snr_gamma": 0.0}, "expected min_snr_gamma > 0, got 0.0"),
    ({"p2_gamma": -1.0}, "expected p2_gamma > 0, got -1.0"),
    ({"loss": "hybrid"}, "expected a learned variance with loss 'hybrid', got 'fixed_large'; set variance"),
    ({"variance": "learned_range"}, "expected loss 'hybrid' with variance 'learned_range', got 'simple'; the variance"),
    ({"loss": "min_snr", "prediction": "mu"}, "expected prediction 'eps', 'x0' or 'v' with loss 'min_snr', got 'mu'"),
    ({"loss": "vlb", "num_timesteps": 1}, "expected num_timesteps >= 2 with loss 'vlb', got 1"),
    (
        {"mu_target": "sample"},
        "expected prediction 'mu' and another loss than 'hybrid' with mu_target 'sample', got 'eps'",
    ),
    (
        {"mu_target": "sample", "prediction": "mu", "loss": "hybrid", "variance": "learned"},
        "another loss than 'hybrid' .*got 'mu' and 'hybrid'; the bound's term needs the mean",
    ),
    ({"log_snr_max": 5.0}, "expected no log_snr_max with schedule 'linear', got a value; leave it out"),
    ({"schedule": "log_snr", "beta_end": 0.1}, "expected no beta_end with schedule 'log_snr'"),
    ({"schedule": "cosine", "beta_end": 0.1}, "expected no beta_end with schedule 'cosine'"),
    ({"beta_end": 2.0}, "expected 0 < beta_start <= beta_end < 1, got 0.0001 and 2.0"),
    (
        {"zero_terminal_snr": True},
        r"got 'eps' with zero terminal SNR, where x_T is pure noise and x_0 = \(x_T - eps\) / 0",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_configurations_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(Spy(), 4, 2, **options)


@pytest.mark.parametrize("kind", ["x0", "v", "mu"])
def test_zero_terminal_snr_is_trained_with_another_kind(kind: str) -> None:
    diffusion, _ = spied(prediction=kind, zero_terminal_snr=True)
    t = torch.full((3,), 7)
    assert diffusion.losses(images_of(3), t=t, seed=0).loss.isfinite()


def test_networks_that_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected image_size, got None and a model that does not say; pass image_size="
    ):
        GaussianDiffusion(Spy())
    with pytest.raises(ValueError, match=r"expected channels, got None and a model that does not say; pass channels="):
        GaussianDiffusion(Spy(), 4)
    with pytest.raises(
        ValueError, match="with learned_variance=True for variance 'learned_range', got learned_variance=False"
    ):
        GaussianDiffusion(unet(), variance="learned_range", loss="hybrid")
    with pytest.raises(
        ValueError, match="with learned_variance=False for variance 'fixed_large', got learned_variance=True"
    ):
        GaussianDiffusion(unet(learned_variance=True))
    # of any other network the output tells
    for options, channels, expected in (({}, 4, 2), (dict(variance="learned", loss="hybrid"), 2, 4)):
        diffusion = GaussianDiffusion(Spy(torch.zeros(3, channels, 4, 4)), 4, 2, **SHORT | options)
        with pytest.raises(
            ValueError, match=rf"expected the network to return \[3, {expected}, 4, 4\] .*got \[3, {channels}"
        ):
            diffusion(images_of(3))


# images and labels


def test_stored_and_float_images_give_the_same_loss() -> None:
    for levels in (256, 17):
        diffusion, spy = spied(levels=levels, prediction="v")
        images = images_of(6, levels)
        stored = diffusion.losses(images, seed=1)
        x_t = spy.x
        given = diffusion.losses(images.float() / (levels - 1), seed=1)
        assert_equal_to_rounding(spy.x, x_t, ulps=8, scale=1 + x_t.abs())
        assert_equal_to_rounding(given.per_sample, stored.per_sample, ulps=64)
        assert (diffusion.to_uint8(images.float() / (levels - 1)) == images).all()


def test_x_t_is_made_of_images_between_minus_one_and_one() -> None:
    diffusion, spy = spied(levels=17)
    images = torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 2, 4, 4).contiguous()
    t, noise = torch.tensor([0, 3, 7]), torch.randn(3, 2, 4, 4)
    diffusion(images, t=t, noise=noise)
    signal, sigma = diffusion.schedule.signal_sigma[t].reshape(3, 2, 1, 1, 1).unbind(1)
    x0 = torch.tensor([-1.0, -0.5, 1.0]).reshape(3, 1, 1, 1)
    assert_equal_to_rounding(spy.x, signal * x0 + sigma * noise, ulps=8, scale=2 + noise.abs())
    assert (spy.t == t).all() and spy.x.dtype == torch.float32


def test_rows_and_flips() -> None:
    diffusion, spy = spied()
    images, index, flip = images_of(5), torch.tensor([3, 3, 0]), torch.tensor([True, False, True])
    noise, t = torch.zeros(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)
    diffusion.losses(images, index=index, flip=flip, t=t, noise=noise)
    signal = diffusion.schedule.signal_sigma[0, 0]
    x0 = images[index].double() / 127.5 - 1
    x0 = torch.where(flip.reshape(3, 1, 1, 1), x0.flip(3), x0)
    assert_equal_to_rounding(spy.x, signal * x0, ulps=8, scale=1)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "slices", [(slice(None, None, 2),), (slice(None), slice(1, 3)), (..., slice(2, 6), slice(1, 5))]
)
@pytest.mark.parametrize("kind", ["eps", "mu"])
def test_slices_of_images_are_made_dense(kind: str, slices: Any, order: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.zeros(4, 2 + (len(slices) == 2) * 2, *((8, 8) if len(slices) == 3 else (4, 4)))
    images = torch.rand(whole.shape, generator=generator).contiguous(memory_format=order)[slices]
    noise = torch.randn(whole.shape, generator=generator).contiguous(memory_format=order)[slices]
    before = images.stride()
    diffusion, spy = spied(prediction=kind)
    given = diffusion.losses(images, seed=1, t=torch.zeros(len(images), dtype=torch.int64))
    assert spy.x.is_contiguous(memory_format=order)
    rows = torch.tensor([1, 0, 1])
    drawn = dict(seed=1, t=torch.zeros(3, dtype=torch.int64))
    taken = [diffusion.losses(x, index=rows, flip=rows == 1, **drawn) for x in (images, images.contiguous())]
    assert_equal_to_rounding(taken[0].per_sample, taken[1].per_sample, ulps=8)
    assert diffusion(images, noise=noise, seed=1).isfinite() and images.stride() == before
    expected = diffusion.losses(images.contiguous(), seed=1, t=torch.zeros(len(images), dtype=torch.int64))
    assert_equal_to_rounding(given.per_sample, expected.per_sample, ulps=8)


@pytest.mark.parametrize(
    ("scale", "shift", "told"),
    [
        (
            2,
            -1,
            "float images in [0, 1], got values from -1 to 1; pass (images + 1) / 2 where they lie in [-1, 1], images",
        ),
        (255, 0, "float images in [0, 1], got values from 0 to 255; pass "),
        (None, 0, "uint8 images in [0, 16], got values from 0 to 255; load them with levels=17, or set levels"),
    ],
)
def test_images_of_another_range_are_told_once(scale: float | None, shift: float, told: str) -> None:
    images = torch.linspace(0, 1, 96).reshape(3, 2, 4, 4)
    wrong = (images * 255).to(torch.uint8) if scale is None else images * scale + shift
    diffusion, _ = spied(levels=17)
    with pytest.warns(UserWarning, match=f"GaussianDiffusion: expected {re.escape(told)}") as got:
        for _ in range(3):
            diffusion(wrong)
    assert len(got) == 1 and got[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near, late = spied(levels=17)[0], spied()[0]
        near(images * 1.1 - 0.05)
        near((images * 16).to(torch.uint8))
        for _ in range(3):
            late(images)
        late(wrong)  # looked at no more
        spied()[0].losses(wrong.float())
        spied()[0](images * torch.inf)


def test_a_batch_without_images_is_refused() -> None:
    diffusion, _ = spied()
    with pytest.raises(
        ValueError, match=r"expected at least one image, got a batch of shape \[0, 2, 4, 4\]; leave out"
    ):
        diffusion(images_of(3)[:0])
    with pytest.raises(ValueError, match=r"got a batch of shape \[3, 2, 4, 4\] and an index of no rows; leave out"):
        diffusion.losses(images_of(3), index=torch.arange(0))


def test_errors_of_images_and_labels() -> None:
    plain, classes = spied()[0], spied(num_classes=3)[0]
    images = images_of(3)
    for wrong in (images[0], images[:, :1], images[..., :3]):
        with pytest.raises(ValueError, match=r"expected images of shape \[B, 2, 4, 4\], got \["):
            plain(wrong)
    with pytest.raises(TypeError, match=r"expected uint8 images or float ones in \[0, 1\], got torch.int64"):
        plain(images.long())
    with pytest.raises(ValueError, match="expected no labels for a network without classes"):
        plain(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected labels for a network with 3 classes, got None"):
        classes(images)
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"expected labels int64 \[3\], got"):
            classes(images, wrong)


def test_labels_out_of_range_are_told_on_a_cpu() -> None:
    diffusion, spy = spied(num_classes=10, label_dropout=0.0)
    for labels, told in (([1, 2, 10], "10"), ([11, 0, -1], "-1, 11")):
        with pytest.raises(
            ValueError, match=rf"expected labels in \[0, 10\), got {told}; number the classes from 0, .*"
        ):
            diffusion(images_of(3), torch.tensor(labels))
    with pytest.raises(
        ValueError, match=r"label_dropout to train without them \(10, which stands for none, is for `losse"
    ):
        diffusion(images_of(3), torch.tensor([1, 2, 10]))
    diffusion(images_of(3), torch.tensor([0, 9, 1]))
    diffusion.losses(images_of(3), torch.tensor([0, 10, 1]))
    assert spy.labels is not None and spy.labels.tolist() == [0, 10, 1]
    spy.null_class = False
    with pytest.raises(ValueError, match=r"got 10; .* label_dropout to train without them$"):
        diffusion(images_of(3), torch.tensor([1, 2, 10]))


def test_labels_are_dropped_as_often_as_asked() -> None:
    count = 20_000
    images, labels = images_of(1).expand(count, -1, -1, -1).contiguous(), torch.arange(count) % 3
    for probability in (0.0, 0.1, 0.5, 1.0):
        diffusion, spy = spied(num_classes=3, label_dropout=probability)
        diffusion(images, labels, seed=5)
        assert spy.labels is not None
        dropped = spy.labels == 3
        assert (spy.labels[~dropped] == labels[~dropped]).all()
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(int(dropped.sum()) - count * probability) <= 5 * deviation
        # no class is dropped more often than another, and evaluation drops none
        by_class = torch.bincount(labels[dropped], minlength=3)
        assert (by_class - count * probability / 3).abs().max() <= 5 * deviation / math.sqrt(3) + 1
        diffusion.eval()
        diffusion(images, labels, seed=5)
        assert (spy.labels == labels).all()


def test_labels_cannot_be_dropped_without_a_class_for_none() -> None:
    diffusion, spy = spied(num_classes=3)
    spy.null_class = False
    images, labels = images_of(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"expected label_dropout=0 for a network without a null class, got 0\.1"):
        diffusion(images, labels)
    diffusion.eval()
    diffusion(images, labels)
    diffusion, spy = spied(num_classes=3, label_dropout=0.0)
    spy.null_class = False
    diffusion(images, labels)
    assert spy.labels is not None and spy.labels.tolist() == [0, 1, 2]


def test_labels_follow_the_index() -> None:
    diffusion, spy = spied(num_classes=3, label_dropout=0.0)
    diffusion.losses(images_of(3), torch.tensor([0, 1, 2]), index=torch.tensor([2, 0, 2, 1]))
    assert spy.labels is not None and spy.labels.tolist() == [2, 0, 2, 1]


# what is drawn


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "importance"])
def test_the_seed_says_everything(sampling: str) -> None:
    diffusion, spy = spied(timestep_sampling=sampling, prediction="v", num_classes=3, num_timesteps=500)
    images, labels = images_of(64), torch.arange(64) % 3

    def draw(**draw: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        losses = diffusion.losses(images, labels, **draw)
        return spy.x, spy.t, spy.labels, losses.per_sample

    diffusion.eval()  # importance sampling learns in training only
    first = draw(seed=3, step=2)
    for a, b in zip(first, draw(seed=torch.tensor(3), step=torch.tensor(2)), strict=True):
        assert a is not None and b is not None and (a == b).all()
    for other in (draw(seed=4, step=2), draw(seed=3, step=3), draw(), draw()):
        assert (other[0] != first[0]).all() and (other[1] != first[1]).any()


def test_without_a_seed_torch_s_generator_gives_one() -> None:
    diffusion, images = spied()[0], images_of(16)
    torch.manual_seed(9)
    first, second = diffusion(images), diffusion(images)
    torch.manual_seed(9)
    assert diffusion(images) == first != second


def test_noise_and_t_belong_to_the_sample_whatever_the_batch() -> None:
    diffusion, spy = spied(prediction="mu", mu_target="sample", num_classes=3)
    images, labels, sample = images_of(12), torch.arange(12) % 3, torch.arange(100, 112)
    whole = diffusion.losses(images, labels, seed=3, sample=sample, step=7)
    x, t, seen = spy.x, spy.t, spy.labels
    assert seen is not None
    for part in (slice(0, 5), slice(5, 12)):
        losses = diffusion.losses(images[part], labels[part], seed=3, sample=sample[part], step=7)
        assert (spy.t == t[part]).all() and (spy.x == x[part]).all()
        assert spy.labels is not None and (spy.labels == seen[part]).all()
        assert (losses.per_sample == whole.per_sample[part]).all() and (losses.t == t[part]).all()
    # the loss of a batch is the mean, so that of equal parts is the mean of their losses
    assert_equal_to_rounding(whole.loss, whole.per_sample.double().mean())


def test_drawn_noise_is_the_training_stream() -> None:
    diffusion, spy = spied()
    images, sample = images_of(6), torch.arange(6) + 3
    diffusion.losses(images, seed=8, sample=sample, step=5)
    noise = normal((6, 2, 4, 4), seed=8, sample=sample, step=5, stream=philox.TRAINING_NOISE)
    drawn = spy.x
    diffusion.losses(images, seed=8, sample=sample, step=5, noise=noise)
    assert (spy.x == drawn).all()


def test_given_t_and_noise_leave_nothing_to_chance() -> None:
    for kind in KINDS:
        diffusion, _ = spied(prediction=kind)
        t, noise = torch.tensor([0, 3, 7]), torch.randn(3, 2, 4, 4)
        first, second = (diffusion.losses(images_of(3), t=t, noise=noise) for _ in range(2))
        assert first.loss == second.loss and (first.t == t).all()


# the losses


def by_hand(diffusion: GaussianDiffusion, images: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and x_t in float64."""
    x0 = images.double() / 127.5 - 1
    signal, sigma = diffusion.schedule.signal_sigma[t].reshape(-1, 2, 1, 1, 1).unbind(1)
    return x0, signal * x0 + sigma * noise.double()


@pytest.mark.parametrize("kind", KINDS)
def test_simple_loss(kind: str) -> None:
    diffusion, spy = spied(prediction=kind)
    images, t, noise = images_of(8), torch.arange(8), torch.randn(8, 2, 4, 4)
    s = diffusion.schedule
    losses = diffusion.losses(images, t=t, noise=noise)
    x0, x_t = by_hand(diffusion, images, t, noise)
    abar, before, alpha = (
        table[t].reshape(-1, 1, 1, 1) for table in (s.alphas_cumprod, s.alphas_cumprod_prev, s.alphas)
    )
    target = {
        "eps": noise.double(),
        "x0": x0,
        "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0,
        "mu": (alpha.sqrt() * (1 - before) * x_t + before.sqrt() * (1 - alpha) * x0) / (1 - abar),
    }[kind]
    expected = (0.25 - target).square().mean(dim=(1, 2, 3))
    assert_equal_to_rounding(losses.per_sample, expected, ulps=32)
    assert_equal_to_rounding(losses.loss, expected.mean(), ulps=32)
    # drawn again by the loss itself, the target is the same
    sample = torch.arange(8)
    noise = philox.normal((8, 2, 4, 4), seed=1, sample=sample, step=0, stream=philox.TRAINING_NOISE)
    drawn, given = (diffusion.losses(images, t=t, seed=1, sample=sample, noise=n).loss for n in (None, noise))
    assert_equal_to_rounding(drawn, given, ulps=32)
    drawn.backward()
    assert spy.out.grad is not None and spy.out.grad.isfinite()


def test_sampled_mu_is_x_prev() -> None:
    diffusion, _ = spied(prediction="mu", mu_target="sample")
    images, t, sample = images_of(8), torch.arange(8), torch.arange(8)
    noise = torch.randn(8, 2, 4, 4)
    losses = diffusion.losses(images, t=t, noise=noise, seed=2, sample=sample, step=3)
    x0, x_t = by_hand(diffusion, images, t, noise)
    mean = value_from_x0("mu", x0, x_t, t, diffusion.schedule)
    z = philox.normal((8, 2, 4, 4), seed=2, sample=sample, step=3, stream=philox.SAMPLER_NOISE, dtype=F64)
    target = mean + diffusion.schedule.posterior_variance.sqrt().reshape(-1, 1, 1, 1) * z
    assert_equal_to_rounding(losses.per_sample, (0.25 - target).square().mean(dim=(1, 2, 3)), ulps=64)
    # at t = 0 the sample is x_0 itself
    assert_equal_to_rounding(losses.per_sample[0], (0.25 - x0[0]).square().mean(), ulps=64)


def test_sampled_x_prev_has_the_distribution_of_the_chain() -> None:
    # x_{t-1} and x_t of training, against q(x_{t-1} | x_0): mean sqrt(abar_{t-1}) x_0, variance 1 - abar_{t-1}
    count, step = 20_000, 4
    diffusion, spy = spied(prediction="mu", mu_target="sample")
    images = torch.full((count, 2, 4, 4), 191, dtype=torch.uint8)
    spy.out = nn.Parameter(torch.tensor(0.0))
    squares = diffusion.losses(images, t=torch.full((count,), step), seed=6).per_sample
    abar = float(diffusion.schedule.alphas_cumprod[step - 1])
    x0 = 191 / 127.5 - 1
    error = squares.std() / math.sqrt(count)
    assert abs(squares.mean() - (abar * x0**2 + 1 - abar)) < 5 * error


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss", ["vlb", "min_snr", "p2"])
def test_weighted_losses(loss: str, kind: str) -> None:
    options: dict[str, Any] = {"min_snr_gamma": 2.0} if loss == "min_snr" else {"p2_gamma": 0.5} if loss == "p2" else {}
    plain, weighted = spied(prediction=kind)[0], spied(prediction=kind, loss=loss, **options)[0]
    images, t, noise = images_of(8), torch.arange(8), torch.randn(8, 2, 4, 4)
    s = plain.schedule
    snr = s.alphas_cumprod / (1 - s.alphas_cumprod)
    if loss == "p2":
        expected = (1 + snr) ** -0.5
    elif loss == "min_snr":
        expected = snr.clamp(max=2.0) / {"eps": snr, "x0": torch.ones(8), "v": snr + 1}[kind]
    else:
        beta, before = s.betas, s.alphas_cumprod_prev
        of_x0 = before * beta**2 / (1 - s.alphas_cumprod) ** 2 / (2 * s.posterior_variance)
        expected = of_x0 / {"eps": snr, "x0": torch.ones(8), "v": snr + 1}[kind]
        expected[0] = expected[1]
    ratio = weighted.losses(images, t=t, noise=noise).per_sample / plain.losses(images, t=t, noise=noise).per_sample
    assert_equal_to_rounding(ratio, expected, ulps=16)


def test_weighted_error_is_the_term_of_the_bound() -> None:
    # for variance sigma_q^2 and t > 0 the loss "vlb" is the KL term in nats, summed over nothing but the mean of pixels
    for kind in ("eps", "x0", "v", "mu"):
        diffusion, _ = spied(prediction=kind, loss="vlb", variance="fixed_small", clip_denoised=False)
        images, t, noise = images_of(7), torch.arange(1, 8), torch.randn(7, 2, 4, 4)
        losses = diffusion.losses(images, t=t, noise=noise)
        x0 = images.double() / 127.5 - 1
        assert_equal_to_rounding(losses.per_sample, vlb_term(diffusion, x0, t, noise.double()), ulps=256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hybrid_loss_and_its_gradient(kind: str, variance: str) -> None:
    out = 0.5 * torch.randn(8, 4, 4, 4)
    images, t, noise = images_of(8), torch.arange(8), torch.randn(8, 2, 4, 4)
    spy = Spy(out)
    diffusion = GaussianDiffusion(
        spy, 4, 2, **SHORT, prediction=kind, variance=variance, loss="hybrid", clip_denoised=False
    )
    losses = diffusion.losses(images, t=t, noise=noise)
    losses.loss.backward()
    gradient = spy.out.grad
    assert gradient is not None

    simple = GaussianDiffusion(Spy(out[:, :2].clone()), 4, 2, **SHORT, prediction=kind)
    mean_part = simple.losses(images, t=t, noise=noise)
    mean_part.loss.backward()
    assert isinstance(simple.model, Spy) and simple.model.out.grad is not None
    # the bound's term gives the mean no gradient: what it has is that of the simple loss
    assert_equal_to_rounding(gradient[:, :2], simple.model.out.grad, ulps=32)

    exact = Spy(out.double())
    bound = GaussianDiffusion(exact, 4, 2, config=diffusion.config)
    bits = vlb_term(bound, images.double() / 127.5 - 1, t, noise.double()) / math.log(2)
    assert_equal_to_rounding(losses.per_sample, mean_part.per_sample + 8 / 1000 * bits, ulps=256)
    (8 / 1000 * bits.mean()).backward()
    assert exact.out.grad is not None and (exact.out.grad[:, :2] != 0).any()
    wanted = exact.out.grad[:, 2:]
    assert_equal_to_rounding(gradient[:, 2:], wanted, ulps=1024, scale=wanted.abs() + wanted.abs().mean())


# importance sampling


def test_importance_sampling_learns_and_corrects() -> None:
    diffusion, spy = spied(timestep_sampling="importance", loss="vlb", num_timesteps=3)
    images = images_of(64)
    sampler = diffusion.timestep_sampler
    assert sampler is not None
    diffusion.eval()
    diffusion.losses(images, seed=0)
    assert (sampler.counts == 0).all()  # evaluation teaches it nothing
    diffusion.train()
    for step in range(10):
        diffusion.losses(images, seed=0, step=step)
    p = sampler.probabilities()
    assert p.max() > 2 * p.min()
    before = [buffer.clone() for buffer in sampler.buffers()]
    losses = diffusion.losses(images, seed=0, step=10)
    # the loss is corrected by 1 / (T p_t), what is told of each sample is not
    assert_equal_to_rounding(losses.loss, (losses.per_sample / (3 * p[losses.t])).mean(), ulps=64)
    plain = spied(loss="vlb", num_timesteps=3)[0].losses(images, t=losses.t, seed=0, step=10)
    assert_equal_to_rounding(losses.per_sample, plain.per_sample, ulps=8)
    assert any((a != b).any() for a, b in zip(before, sampler.buffers(), strict=True))
    assert {"timestep_sampler.losses", "timestep_sampler.counts"} <= set(diffusion.state_dict())
    assert spy.t.dtype == torch.int64


def test_given_t_is_not_corrected() -> None:
    diffusion, _ = spied(timestep_sampling="importance")
    t, noise = torch.arange(8), torch.randn(8, 2, 4, 4)
    assert (
        diffusion.losses(images_of(8), t=t, noise=noise).loss == spied()[0].losses(images_of(8), t=t, noise=noise).loss
    )


# dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_state_and_loss_in_float32(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            self.seen += [x.dtype, out.dtype]
            return out

    net = Net()
    diffusion = GaussianDiffusion(net, 4, 2, **SHORT, prediction=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = diffusion.losses(images_of(8), seed=0)
        mean, log_variance, pred_x0 = diffusion.p_mean_variance(torch.randn(8, 2, 4, 4), torch.arange(8))
        images = diffusion.sample(2)
    losses.loss.backward()
    assert net.seen == [torch.float32, torch.bfloat16] * (len(net.seen) // 2)
    for result in (losses.loss, losses.per_sample, mean, log_variance, pred_x0, images, net.conv.weight.grad):
        assert result is not None and result.dtype == torch.float32
    exact = diffusion.losses(images_of(8), seed=0)
    assert ((losses.loss - exact.loss).abs() < 0.02 * exact.loss).all()


def test_a_network_in_bfloat16_keeps_exact_tables() -> None:
    diffusion, spy = spied()
    t, noise = torch.zeros(3, dtype=torch.int64), torch.randn(3, 2, 4, 4)
    diffusion(images_of(3), t=t, noise=noise)
    x_t = spy.x
    diffusion.to(torch.bfloat16)
    diffusion(images_of(3), t=t, noise=noise)
    assert (spy.x == x_t).all()


def test_any_network_and_any_shape() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1 * 3 * 5 + 1, 1 * 3 * 5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.layer(torch.cat([x.flatten(1), t[:, None] / 8], dim=1))
            return out.view_as(x)

    diffusion = GaussianDiffusion(Plain(), (3, 5), 1, **SHORT)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=0.01)
    images = torch.rand(32, 1, 3, 5)
    first = diffusion.eval().losses(images, seed=0).loss.item()
    for step in range(100):
        optimizer.zero_grad()
        diffusion(images, seed=1, step=step).backward()
        optimizer.step()
    assert diffusion.losses(images, seed=0).loss < 0.8 * first
    drawn = diffusion.sample(3, seed=1)
    assert drawn.shape == (3, 1, 3, 5) and ((drawn >= 0) & (drawn <= 1)).all()
    diffusion(images).backward()  # what was made while sampling does not stand in the way


def test_dropout_of_the_network_is_drawn_from_the_same_seed() -> None:
    diffusion = GaussianDiffusion(unet(dropout=0.5), **SHORT)
    for parameter in diffusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.rand(4, 1, 8, 8)
    first, again, other = (
        diffusion.losses(images, t=torch.arange(4), noise=torch.ones(4, 1, 8, 8), seed=s).loss for s in (1, 1, 2)
    )
    assert first == again != other
    diffusion.eval()
    quiet, still = (
        diffusion.losses(images, t=torch.arange(4), noise=torch.ones(4, 1, 8, 8), seed=s).loss for s in (1, 2)
    )
    assert quiet == still
