"""Gaussian diffusion: the forward process, its posterior, the reverse process, and the module that trains and samples
a network.

Equations are those of Ho et al. 2020. Pure functions first; `GaussianDiffusion` puts them together.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _graph, _native, ops, sampling, weighting
from ._allocator import freed_memory_kept
from ._calls import Calls, forget, loops_of
from ._checks import is_dense
from .nn import UNet
from .ops import philox
from .ops.normal import normal
from .prediction import PREDICTIONS, check_prediction, x0_from
from .sampling import VARIANCES
from .sampling.memory import fitting_batch, free_memory
from .schedule import SCHEDULES, Schedule, extract, make_schedule

if TYPE_CHECKING:
    from typing_extensions import Self

LOSSES = ("simple", "vlb", "hybrid", "min_snr", "p2")
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "importance")
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
MOST_AT_A_TIME = (64, 256)
"""Images of a batch in sampling where no size is given: on a CPU, on a GPU."""
LEAST_PROBABILITY = 1e-12
OTHER_NAMES = {
    "beta_schedule": "schedule",
    "clip_sample": "clip_denoised",
    "diffusion_steps": "num_timesteps",
    "loss_type": "loss",
    "noise_schedule": "schedule",
    "num_train_timesteps": "num_timesteps",
    "objective": "prediction",
    "prediction_type": "prediction",
    "timesteps": "num_timesteps",
    "variance_type": "variance",
}
"""Options of other libraries, and what they are called here."""
OTHER_VALUES = {
    "epsilon": "eps",
    "pred_noise": "eps",
    "pred_v": "v",
    "pred_x0": "x0",
    "sample": "x0",
    "squaredcos_cap_v2": "cosine",
    "v_prediction": "v",
}
"""What they say, and what that is here."""
OF_SAMPLING = {
    "ddim_sampling_eta": "eta",
    "num_inference_steps": "num_steps",
    "sampling_timesteps": "num_steps",
    "timestep_respacing": "num_steps",
}
"""Options of theirs that are arguments of `GaussianDiffusion.sample` here."""
ACCEPTED_OUTSIDE = 0.1
"""How far float images may lie outside of [0, 1], as resized ones do, before that is taken for another range."""


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (eq. 4), in the dtype of x0. All [B, ...]; t int64 [B]."""
    signal, sigma = schedule.signal_sigma.to(x0.dtype).unbind(1)
    return extract(signal, t, x0.dim()) * x0 + extract(sigma, t, x0.dim()) * noise


def q_posterior(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (eq. 6-7).

    Args:
        x0, x_t: [B, ...]. t: int64 [B] in [0, T).

    Returns: the mean [B, ...], the variance and the clipped log-variance, each [B, 1, ...].
    """

    def at_t(table: Tensor) -> Tensor:
        return extract(table.to(x_t.dtype), t, x_t.dim())

    mean = at_t(schedule.posterior_mean_coef1) * x0 + at_t(schedule.posterior_mean_coef2) * x_t
    return mean, at_t(schedule.posterior_variance), at_t(schedule.posterior_log_variance_clipped)


def model_log_variance(variance: str, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Smallest and largest log-variance of p(x_{t-1} | x_t) for each t; equal where the variance is fixed (section
    3.2).

    fixed_small: sigma_q^2, optimal for data at a point. fixed_large: beta, optimal for x_0 ~ N(0, I); with
        first_log_variance="copy" its first entry is that of
    sigma_q^2, since there it is the width of the decoder. unit: 1. learned: (-1, 1), so that the network's v is the
    log-variance itself. learned_range:
    sigma_q^2 to beta (Nichol and Dhariwal 2021, eq. 15).

    Returns: two float64 [T].
    """
    small, large = schedule.posterior_log_variance_clipped, torch.log(schedule.betas)
    if variance == "learned_range":
        return small, large
    if variance == "learned":
        return -torch.ones_like(small), torch.ones_like(small)
    first = small if schedule.first_log_variance == "copy" else large
    fixed = {"fixed_small": small, "fixed_large": torch.cat([first[:1], large[1:]]), "unit": torch.zeros_like(small)}[
        variance
    ]
    return fixed, fixed


def p_mean_variance(
    out: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction: str, variance: str, clip: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of p_theta(x_{t-1} | x_t), and the x_0 behind them (eq. 1, 11; section 3.2).

    Args:
        out: output of the network [B, C, H, W], or [B, 2C, H, W] with a learned variance.
        x_t: [B, C, H, W]. t: int64 [B] in [0, T).
        prediction: "eps", "x0", "v" or "mu". variance: see `model_log_variance`.
        clip: keep x_0 in [-1, 1] before the mean is formed.

    Returns: mean, log-variance and pred_x0, each [B, C, H, W], in float32 (float64 for float64 x_t).
    """
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    x_t, out = x_t.to(dtype), out.to(dtype)
    channels = x_t.shape[1]
    pred_x0 = x0_from(prediction, out[:, :channels], x_t, t, schedule)
    if clip:
        pred_x0 = pred_x0.clamp(-1, 1)
    mean, _, _ = q_posterior(pred_x0, x_t, t, schedule)
    smallest, largest = (extract(bound.to(dtype), t, x_t.dim()) for bound in model_log_variance(variance, schedule))
    if variance.startswith("learned"):
        fraction = (out[:, channels:] + 1) / 2
        return mean, fraction * largest + (1 - fraction) * smallest, pred_x0
    return mean, smallest.expand_as(mean), pred_x0


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor | float, log_variance2: Tensor | float) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats: (lv2 - lv1 + e^(lv1 - lv2) + (m1 - m2)^2
    e^(-lv2) - 1) / 2."""
    log_variance2 = torch.as_tensor(log_variance2, dtype=log_variance1.dtype, device=log_variance1.device)
    squared = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(difference) - difference + squared)  # expm1: nearly equal variances do not cancel


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """log P(x_0) of each element under a Gaussian cut into grey levels (eq. 13), in nats.

    P(x_0) = Phi((x_0 + h - mean) / sigma) - Phi((x_0 - h - mean) / sigma), h = 1 / (levels - 1); the outermost levels
    take the whole tails, so that the
    probabilities of all levels sum to 1. Phi is exact (erfc); a probability below 1e-12 counts as 1e-12.

    Args:
        x0: [...], on the grid of ``levels`` values from -1 to 1.
        mean, log_variance: [...].
        levels: number of grey levels, >= 2.

    Raises:
        ValueError: levels < 2.
    """
    if levels < 2:
        raise ValueError(
            f"discretized_gaussian_log_likelihood: expected levels >= 2, got {levels}; images of 8 bits have 256"
        )
    half_bin = 1 / (levels - 1)
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = torch.where(x0 > 1 - half_bin, math.inf, (x0 + half_bin - mean) * inverse_std)
    lower = torch.where(x0 < -1 + half_bin, -math.inf, (x0 - half_bin - mean) * inverse_std)
    flip = lower > 0  # both tails on the negative side, where the difference does not cancel
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    probability = 0.5 * (torch.erfc(-b / math.sqrt(2)) - torch.erfc(-a / math.sqrt(2)))
    return torch.log(probability.clamp(min=LEAST_PROBABILITY))


def prior_kl(x0: Tensor, schedule: Schedule) -> Tensor:
    """L_T of each element in nats: KL(q(x_T | x_0) || N(0, I)) (eq. 5); per dimension in bits about abar_T x_0^2 / (2
    ln 2)."""
    log_variance = torch.log(schedule.one_minus_alphas_cumprod[-1]).to(x0)
    return normal_kl(schedule.alphas_cumprod[-1].sqrt().to(x0) * x0, log_variance.expand_as(x0), 0.0, 0.0)


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything that defines a diffusion, as plain data.

    Args:
        schedule: "linear", "cosine", "sigmoid", "quadratic" or "log_snr".
        num_timesteps: T >= 1.
        beta_start, beta_end: ends of "linear" and "quadratic"; None is 1e-4 and 0.02, which are meant for T = 1000.
        log_snr_max, log_snr_min: ends of "log_snr"; None is 9 and -9.
        zero_terminal_snr: rescale the schedule so that the last step holds no signal; not with prediction="eps".
        first_log_variance: "copy" or "tiny", see `Schedule.from_betas`.
        prediction: what the network predicts: "eps", "x0", "v" or "mu".
        variance: of the reverse process: "fixed_small", "fixed_large", "unit", "learned" or "learned_range".
        loss: "simple" (unweighted), "vlb" (weighted as in the bound), "hybrid" (simple plus the bound's term for a
            learned variance), "min_snr" or "p2".
        mu_target: for prediction="mu": compare with the posterior "mean", or with a "sample" of x_{t-1}.
        min_snr_gamma, p2_gamma: constants of those weights, > 0.
        timestep_sampling: "uniform", "stratified" or "importance" (by the second moment of the loss).
        levels: grey levels of the data, 2..256: uint8 images hold 0..levels-1, and the decoder has as many bins.
        label_dropout: probability in [0, 1] to train a labelled image without its label, for classifier-free guidance.
        clip_denoised: keep the predicted x_0 in [-1, 1] when sampling and evaluating.

    Raises:
        ValueError: an unknown option or a number out of its range.
    """

    schedule: str = "linear"
    num_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    log_snr_max: float | None = None
    log_snr_min: float | None = None
    zero_terminal_snr: bool = False
    first_log_variance: str = "copy"
    prediction: str = "eps"
    variance: str = "fixed_large"
    loss: str = "simple"
    mu_target: str = "mean"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    timestep_sampling: str = "uniform"
    levels: int = 256
    label_dropout: float = 0.1
    clip_denoised: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", tuple(SCHEDULES)),
            ("first_log_variance", ("copy", "tiny")),
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
            ("loss", LOSSES),
            ("mu_target", ("mean", "sample")),
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                other = OTHER_VALUES.get(value) if isinstance(value, str) else None
                raise ValueError(
                    f"DiffusionConfig: expected {name} to be one of {', '.join(allowed)}, got {value!r}; "
                    f"{f'that is {other!r} here' if other in allowed else 'choose one'}"
                )
        if not 2 <= self.levels <= 256:
            raise ValueError(
                f"DiffusionConfig: expected levels in [2, 256], got {self.levels}; images of 8 bits have 256"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(
                f"DiffusionConfig: expected label_dropout in [0, 1], got {self.label_dropout}; 0.1 is usual"
            )
        for name in ("min_snr_gamma", "p2_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DiffusionConfig: expected {name} > 0, got {getattr(self, name)}; 5 and 1 are usual")
        if self.loss == "hybrid" and not self.variance.startswith("learned"):
            raise ValueError(
                f"DiffusionConfig: expected a learned variance with loss 'hybrid', got {self.variance!r}; "
                "set variance='learned_range'"
            )
        if self.variance.startswith("learned") and self.loss != "hybrid":
            raise ValueError(
                f"DiffusionConfig: expected loss 'hybrid' with variance {self.variance!r}, got {self.loss!r}; "
                "the variance would not be trained"
            )
        if self.mu_target == "sample" and (self.prediction != "mu" or self.loss == "hybrid"):
            raise ValueError(
                f"DiffusionConfig: expected prediction 'mu' and another loss than 'hybrid' with mu_target 'sample', "
                f"got {self.prediction!r} and "
                f"{self.loss!r}; the bound's term needs the mean, set mu_target='mean'"
            )
        if self.loss == "vlb" and self.num_timesteps < 2:
            raise ValueError(
                "DiffusionConfig: expected num_timesteps >= 2 with loss 'vlb', got 1; "
                "the bound of one step is the decoder alone"
            )
        if self.loss == "min_snr" and self.prediction == "mu":
            raise ValueError(
                "DiffusionConfig: expected prediction 'eps', 'x0' or 'v' with loss 'min_snr', got 'mu'; "
                "choose one of these"
            )
        self.make_schedule()

    def make_schedule(self) -> Schedule:
        """The schedule that this configuration describes."""
        ends = ("log_snr_max", "log_snr_min") if self.schedule == "log_snr" else ("beta_start", "beta_end")
        given = {
            name for name in ("beta_start", "beta_end", "log_snr_max", "log_snr_min") if getattr(self, name) is not None
        }
        wrong = given - (set(ends) if self.schedule in ("log_snr", "linear", "quadratic") else set())
        if wrong:
            raise ValueError(
                f"DiffusionConfig: expected no {', '.join(sorted(wrong))} with schedule {self.schedule!r}, "
                "got a value; "
                ""
                "leave it out"
            )
        schedule = make_schedule(
            self.schedule,
            self.num_timesteps,
            zero_terminal_snr=self.zero_terminal_snr,
            first_log_variance=self.first_log_variance,
            **{name: getattr(self, name) for name in given},
        )
        check_prediction(self.prediction, schedule)
        return schedule


def _dense(images: Tensor) -> Tensor:
    """The images, or a copy in the order that they have."""
    if images.dim() != 4 or is_dense(images):
        return images
    nhwc = images.stride(1) == 1 and images.shape[1] > 1
    return images.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Expect options of a `DiffusionConfig`; of another one the message says what comes nearest to it."""
    known = [field.name for field in fields(DiffusionConfig)]
    for name, value in options.items():
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        if name in OTHER_NAMES:
            value = OTHER_VALUES.get(value, value) if isinstance(value, str) else value
            remedy = f"that is {OTHER_NAMES[name]}={value!r} here"
        elif name in OF_SAMPLING:
            remedy = f"that is {OF_SAMPLING[name]}= of sample here"
        else:
            remedy = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(known)}"
        raise ValueError(f"GaussianDiffusion: expected options of DiffusionConfig, got {name!r}; {remedy}")


class Losses(NamedTuple):
    """What one batch gave: the loss [] to call backward on, the weighted loss of each sample [B] (detached), and its
    t [B]."""

    loss: Tensor
    per_sample: Tensor
    t: Tensor


def _check_count(name: str, value: object, remedy: str) -> None:
    if not hasattr(value, "__index__"):
        raise TypeError(f"sample: expected {name} to be an int, got {value!r}; {remedy}")


def _check_seed(who: str, seed: object) -> None:
    if not isinstance(seed, (int, Tensor)):
        raise TypeError(
            f"{who}: expected seed to be an int in [0, 2^64), got {seed!r}; for other images at each call pass a "
            "random one, such as random.getrandbits(64)"
        )


class Frozen:
    """See `GaussianDiffusion.frozen`."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self.calls = Calls("sampling", "pass cuda_graph=False to leave out the attempt")
        self.before: list[Calls | None] = []

    def __enter__(self) -> None:
        self.before.append(self.diffusion._calls)
        self.diffusion._calls = self.before[-1] or self.calls

    def __exit__(self, *_: object) -> None:
        self.diffusion._calls = self.before.pop()


class GaussianDiffusion(nn.Module):
    """A network with the diffusion that trains and samples it. Images in [0, 1] or uint8 go in, a loss comes out;
    `sample` returns images in [0, 1].

    Training (Ho et al. 2020, algorithm 1): draw t and eps, form x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, and
    compare the network's prediction with its
    target. Sampling (algorithm 2, or a faster one): every sampler is a table of coefficients over the same network.

    Args:
        model: the network, called as model(x_t [B, C, H, W], t int64 [B]) or with labels as third argument; returns
            [B, C, H, W], or 2C channels with a learned
            variance. `fastddpm.UNet` says its own size and channels.
        image_size: (H, W) or one number for both; None takes it from the model's configuration.
        channels: C; None takes it from ``model.in_channels``.
        config: a `DiffusionConfig`; None is the default one.
        **overrides: fields of the configuration to change, for example prediction="v".

    Raises:
        ValueError: image_size or channels neither given nor known; an option that there is not; a configuration out of
            range, or one that the network does not fit.

    Numerics: tables are made in float64 and used in float32; x_t, the loss and the sampler's state are float32 under
        any autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        config: DiffusionConfig | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(overrides)
        self.config = replace(config or DiffusionConfig(), **overrides)
        size = image_size if image_size is not None else getattr(getattr(model, "config", None), "image_size", None)
        count = channels if channels is not None else getattr(model, "in_channels", None)
        if size is None or count is None:
            missing = "image_size" if size is None else "channels"
            raise ValueError(
                f"GaussianDiffusion: expected {missing}, got None and a model that does not say; pass {missing}="
            )
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.channels = int(count)
        self.model = model
        self._calls: Calls | None = None
        self._unseen = 3  # batches whose range is looked at
        if isinstance(model, UNet) and model.learned_variance != self.learned_variance:
            raise ValueError(
                f"GaussianDiffusion: expected a network with learned_variance={self.learned_variance} for variance "
                f"{self.config.variance!r}, "
                f"got learned_variance={model.learned_variance}; change one of the two"
            )
        self.schedule = self.config.make_schedule()
        self.timestep_sampler = (
            weighting.LossSecondMoment(self.num_timesteps) if self.config.timestep_sampling == "importance" else None
        )
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.config.num_timesteps

    @property
    def learned_variance(self) -> bool:
        """Whether the network's second half of channels gives the variance."""
        return self.config.variance.startswith("learned")

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network; None without."""
        count: int | None = getattr(self.model, "num_classes", None)
        return count

    @property
    def null_class(self) -> int | None:
        """The class that stands for none; None where the network has no such class."""
        return self.num_classes if getattr(self.model, "null_class", True) else None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data for JSON."""
        return asdict(self.config)

    def table(self, name: str, device: torch.device) -> Tensor:
        """A float32 table on a device, copied there once. Not a buffer: a module cast to bfloat16 keeps exact
        tables."""
        if (name, device) not in self._tables:
            s = self.schedule
            make: dict[str, Callable[[], Tensor]] = {
                "signal_sigma": lambda: self.schedule.signal_sigma,
                "loss_weight": self.loss_weight,
                "posterior": lambda: torch.stack(
                    [s.posterior_mean_coef1, s.posterior_mean_coef2, s.posterior_variance.sqrt()], 1
                ),
                "vlb": lambda: weighting.vlb_table(self.config.prediction, self.schedule, self.config.variance),
            }
            self._tables[name, device] = make[name]().to(device, torch.float32)
        return self._tables[name, device]

    def loss_weight(self) -> Tensor:
        """Weight of the squared error for each t, float64 [T]; see `fastddpm.weighting`."""
        c = self.config
        if c.loss == "vlb":
            return weighting.vlb_weight(c.prediction, self.schedule)
        if c.loss == "min_snr":
            return weighting.min_snr_weight(c.prediction, self.schedule, c.min_snr_gamma)
        if c.loss == "p2":
            return weighting.p2_weight(self.schedule, c.p2_gamma)
        return weighting.simple_weight(self.schedule)

    def pixel_range(self, images: Tensor) -> tuple[float, float]:
        """Scale and shift from stored values (uint8 0..levels-1, or float 0..1) to [-1, 1]."""
        return (2 / (self.config.levels - 1) if images.dtype == torch.uint8 else 2.0), -1.0

    def to_uint8(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as stored values: round(x (levels - 1)), uint8."""
        return (images.clamp(0, 1) * (self.config.levels - 1)).round().to(torch.uint8)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: Tensor | int | None = None,
        sample: Tensor | None = None,
        step: Tensor | int | None = None,
    ) -> Tensor:
        """The training loss [] of a batch. See `losses`.

        On a CPU, where looking at numbers is cheap, labels out of their range are refused, the one for none among them
        (label_dropout gives that), and images far out of theirs warned of, at the first batches.
        """
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_labels(labels)
            if self._unseen > 0:
                self._look_at_range(images)
        return self.losses(images, labels, t=t, noise=noise, seed=seed, sample=sample, step=step).loss

    def losses(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        index: Tensor | None = None,
        flip: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: Tensor | int | None = None,
        sample: Tensor | None = None,
        step: Tensor | int | None = None,
    ) -> Losses:
        """The training loss of a batch (algorithm 1), with what it is made of.

        Args:
            images: uint8 with values 0..levels-1, or float in [0, 1]; [N, C, H, W]. Where they are not dense, as
                a slice is not, those that are taken are copied.
            labels: int64 [N] in [0, num_classes), for a network with classes; `null_class` stands for none. Their
                values are not checked, since that would stop a GPU.
            index: int64 [B], the rows of images and labels to take; None takes all.
            flip: bool [B], True mirrors an image left to right.
            t: int64 [B] in [0, T); drawn when None.
            noise: eps [B, C, H, W]; drawn when None.
            seed, sample, step: where all is drawn (int or int64 [] / int64 [B] / int or int64 []); without a seed,
                one is taken from torch's generator.

        Raises:
            ValueError: no images; images or labels of another shape than the network expects. TypeError: a dtype.
        """
        self._check_images(images)
        count = images.shape[0] if index is None else index.shape[0]
        if count == 0:
            raise ValueError(
                f"GaussianDiffusion: expected at least one image, got a batch of shape {list(images.shape)}"
                f"{'' if index is None else ' and an index of no rows'}; leave out empty batches, whose mean is nan"
            )
        device = images.device
        if seed is None:
            seed = torch.randint(2**62, (), device=device)
        if sample is None:
            sample = torch.arange(count, device=device)
        step = 0 if step is None else step
        draw: dict[str, Any] = dict(seed=seed, sample=sample, step=step)
        if isinstance(noise, Tensor):
            noise = _dense(noise)

        correction = None
        if t is None:
            t, correction = self._draw_t(draw)
        labels = self._training_labels(labels, index, count, draw)
        if not is_dense(images):
            images, index = _dense(images if index is None else images[index]), None
        scale, shift = self.pixel_range(images)
        pixels: dict[str, Any] = dict(index=index, flip=flip, pixel_scale=scale, pixel_shift=shift)
        noising: dict[str, Any] = dict(noise=noise) if noise is not None else draw
        table = self.table("signal_sigma", device)

        kind, target = self.config.prediction, None
        if kind == "mu" or noise is not None:
            second = {"eps": "noise", "x0": "x0", "v": "v", "mu": "x0"}[kind]
            x_t, target = ops.q_sample(images, t, table, **pixels, **noising, returns=second)
            if kind == "mu":
                target = self._mu_target(target, x_t, t, draw)
        else:
            x_t = ops.q_sample(images, t, table, **pixels, **noising)
        assert isinstance(x_t, Tensor)
        out = self.predict(x_t, t, labels, **draw)

        weight = self.table("loss_weight", device)[t]
        vlb_weight = torch.full_like(weight, weighting.hybrid_vlb_weight(self.num_timesteps))
        if correction is not None:
            weight, vlb_weight = weight * correction, vlb_weight * correction
        loss, per_sample = ops.diffusion_loss(
            out, t, target=target, objective=kind if kind != "mu" else "eps", table=table, x0=images, **pixels,
            **draw, weight=weight,
            vlb=self.table("vlb", device) if self.learned_variance else None, vlb_weight=vlb_weight,
            levels=self.config.levels,
        )  # fmt: skip
        if correction is not None:
            per_sample = per_sample / correction
        if self.timestep_sampler is not None and self.training:
            self.timestep_sampler.update(t, per_sample)
        return Losses(loss, per_sample, t)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
        sample: Tensor | None = None,
        step: Tensor | int | None = None,
    ) -> Tensor:
        """Output of the network at x_t [B, C, H, W] in [-1, 1] and t int64 [B]; seed, sample and step are for its
        dropout."""
        if isinstance(self.model, UNet) and self.model.training and self.model.config.dropout > 0:
            out: Tensor = self.model(x_t, t, labels, seed=seed, sample=sample, step=step)
        elif labels is not None:
            out = self.model(x_t, t, labels)
        else:
            out = self.model(x_t, t)
        expected = (x_t.shape[0], (1 + self.learned_variance) * x_t.shape[1], *x_t.shape[2:])
        if tuple(out.shape) != expected:
            raise ValueError(
                f"GaussianDiffusion: expected the network to return {list(expected)} with variance "
                f"{self.config.variance!r}, "
                f"got {list(out.shape)}; "
                "a learned variance needs twice the channels, any other as many as the image has"
            )
        return out

    def p_mean_variance(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-variance and pred_x0 of p_theta(x_{t-1} | x_t), each [B, C, H, W]. See the function of the same
        name."""
        c = self.config
        return p_mean_variance(
            self.predict(x_t, t, labels), x_t, t, self.schedule, c.prediction, c.variance, c.clip_denoised
        )

    def p_sample(self, x_t: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of ancestral sampling over the full chain (algorithm 2): x_{t-1} = mu + sigma z, z = 0 at t = 0.

        Args:
            x_t, noise: [B, C, H, W]; noise is z. t: int64 [B] in [0, T). labels: int64 [B], as for `predict`.

        Returns: x_{t-1} and pred_x0, each [B, C, H, W], float32 (float64 for float64 x_t).
        """
        mean, log_variance, pred_x0 = self.p_mean_variance(x_t, t, labels)
        moves = (t > 0).reshape(-1, 1, 1, 1)
        return mean + torch.where(moves, torch.exp(0.5 * log_variance), 0) * noise, pred_x0

    def _draw_t(self, draw: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        if self.timestep_sampler is not None:
            u = philox.uniform(1, stream=philox.T, **draw).squeeze(1)
            return self.timestep_sampler.sample(u)
        sampler = (
            weighting.stratified_timesteps
            if self.config.timestep_sampling == "stratified"
            else weighting.uniform_timesteps
        )
        return sampler(self.num_timesteps, **draw), None

    def _mu_target(self, x0: Tensor, x_t: Tensor, t: Tensor, draw: dict[str, Any]) -> Tensor:
        """Mean of the posterior, or a sample of it: `q_posterior`, from tables that lie on the device."""
        of_x0, of_x_t, sigma = self.table("posterior", x_t.device)[t].reshape(-1, 3, 1, 1, 1).unbind(1)
        mean = of_x0 * x0 + of_x_t * x_t
        if self.config.mu_target == "mean":
            return mean
        return mean + sigma * normal(tuple(x_t.shape), stream=philox.SAMPLER_NOISE, **draw)

    def _training_labels(
        self, labels: Tensor | None, index: Tensor | None, count: int, draw: dict[str, Any]
    ) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError(
                    "GaussianDiffusion: expected no labels for a network without classes, got labels; "
                    "give the network num_classes="
                )
            return None
        if labels is None:
            raise ValueError(
                f"GaussianDiffusion: expected labels for a network with {self.num_classes} classes, got None; "
                "pass int64 labels [B]"
            )
        labels = labels if index is None else labels[index]
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(
                f"GaussianDiffusion: expected labels int64 [{count}], got {labels.dtype} {list(labels.shape)}; "
                "one class an image"
            )
        if not self.training or self.config.label_dropout == 0:
            return labels
        if self.null_class is None:
            raise ValueError(
                f"GaussianDiffusion: expected label_dropout=0 for a network without a null class, "
                f"got {self.config.label_dropout}; set it to 0, or give the network null_class=True"
            )
        dropped = philox.integers(2, stream=philox.FLIP, **draw)[:, 1] < round(self.config.label_dropout * 2**32)
        return torch.where(dropped, self.null_class, labels)

    def _look_at_range(self, images: Tensor) -> None:
        """Warn once of images that are far outside of the range of stored values, at the first batches."""
        self._unseen -= 1
        stored = images.dtype == torch.uint8
        if not images.numel() or not (stored or images.dtype.is_floating_point):
            return
        least, most = (float(x) for x in images.detach().aminmax())
        top = self.config.levels - 1 if stored else 1.0
        around = 0 if stored else ACCEPTED_OUTSIDE
        if (least >= -around and most <= top + around) or not math.isfinite(least + most):
            return
        self._unseen = 0
        remedy = (
            f"load them with levels={self.config.levels}, or set levels"
            if stored
            else "pass (images + 1) / 2 where they lie in [-1, 1], images / 255 where in [0, 255]"
        )
        warnings.warn(
            f"GaussianDiffusion: expected {'uint8' if stored else 'float'} images in [0, {top:g}], got values from "
            f"{least:.4g} to {most:.4g}; {remedy}",
            stacklevel=5,
        )

    def _check_labels(self, labels: Tensor | None) -> None:
        """Expect labels of the classes that there are; what is wrong with them besides, `_training_labels` says."""
        count = self.num_classes
        if labels is None or count is None or labels.dtype != torch.int64 or not labels.numel():
            return
        least, most = labels.aminmax()
        if least < 0 or most >= count:
            wrong = ", ".join(map(str, labels[(labels < 0) | (labels >= count)].unique().tolist()))
            null = "" if self.null_class is None else f" ({count}, which stands for none, is for `losses`)"
            raise ValueError(
                f"GaussianDiffusion: expected labels in [0, {count}), got {wrong}; number the classes from 0, and "
                f"leave it to label_dropout to train without them{null}"
            )

    def _check_images(self, images: Tensor) -> None:
        expected = (self.channels, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"GaussianDiffusion: expected images of shape [B, {', '.join(map(str, expected))}], "
                f"got {list(images.shape)}; "
                ""
                ""
                "resize them, or make the network for that size"
            )
        if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
            raise TypeError(
                f"GaussianDiffusion: expected uint8 images or float ones in [0, 1], got {images.dtype}; convert them"
            )

    @torch.inference_mode()
    def sample(
        self,
        num_images: int = 16,
        *,
        sampler: str = "ddpm",
        num_steps: int | None = None,
        eta: float = 0.0,
        spacing: str = "trailing",
        seed: int = 0,
        first_image: int = 0,
        batch_size: int | None = None,
        labels: Tensor | int | None = None,
        guidance_scale: float = 1.0,
        dynamic_threshold_ratio: float | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        cuda_graph: bool | str = "auto",
        callback: sampling.Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw images from the model.

        Image n of a seed is the same whatever part of the run is asked for, at the same batch_size, build and thread
        count: its noise belongs to it, and it is
        made in slot n mod batch_size of a full batch. With another batch_size it agrees as far as the network's
        rounding allows.

        Args:
            num_images: how many, >= 1.
            sampler: "ddpm" (algorithm 2; respaced with fewer steps), "ddim" (Song et al. 2021) or "dpmpp_2m"
                (DPM-Solver++(2M), Lu et al. 2022).
            num_steps: N in [1, T]; None is T for ddpm, and at most 50 for ddim and 20 for dpmpp_2m.
            eta: of ddim: 0 is deterministic, 1 is as random as ddpm.
            spacing: which timesteps: "trailing", "leading", "linspace" or "quadratic".
            seed: in [0, 2^64).
            first_image: index of the first image in the run of this seed, >= 0.
            batch_size: images in one call of the network (twice that with guidance); None is num_images, at most 64, on
                a GPU 256, and for a `fastddpm.UNet` at most what fits into half of the free memory. Give it to draw a
                part of a run: image 4,711 alone, as the whole run drew it, takes the time of a batch.
            labels: int64 [num_images], or one class for all; None is the null class of a network with classes.
            guidance_scale: w of the classifier-free guidance, out = uncond + w (cond - uncond); 1 is none.
            dynamic_threshold_ratio: in (0, 1], see `fastddpm.sampling.dynamic_threshold`; 0.995 is usual with strong
                guidance.
            known, mask: inpainting: keep the image ``known`` [num_images or 1, C, H, W] (in [0, 1], or uint8) where
                mask is 1. mask: float, broadcasts to it.
            cuda_graph: on a GPU, record a step and launch it as a whole, see `sampling.sample_loop`; the recording is
                kept, for each of the last four kinds of call, until the network is moved or cast. On a
                CPU, list the operators of the network at its second call, and run the list from the fourth on, which
                costs one call more. "auto" does so for a `fastddpm.UNet` where it pays: on a GPU for ten calls of the
                network and more, on a CPU for 50, or within `frozen`.
            callback: (i, num_steps, x, pred) after each step of each batch, with the state and the predicted image in
                [-1, 1] [B, C, H, W]; True ends there.
            progress: show a bar.

        Returns: float32 [num_images, C, H, W] in [0, 1].

        Raises:
            ValueError: an unknown sampler or spacing, a number out of its range, labels for a network without classes
                or guidance without them. TypeError: a number of another type.
        """
        size = [self.channels, *self.image_size]
        _check_count("num_images", num_images, f"pass how many images, each is {size}")
        _check_count("first_image", first_image, "pass the index of the first image")
        _check_seed("sample", seed)
        steps, table = self._sampler_table(sampler, num_steps, eta, spacing)
        if batch_size is None:
            batch_size = self._fitting_batch(num_images, guided=guidance_scale != 1)
        device = self.device
        if device.type == "cpu":
            _native.tell_missing()
        if cuda_graph == "auto":  # of another network nobody knows whether it does the same work at each call
            calls = len(steps) * -(-num_images // max(1, batch_size))
            pays = self._calls is not None or calls >= (10 if _graph.can_record(device) else 50)
            cuda_graph = isinstance(self.model, UNet) and pays
        elif not isinstance(cuda_graph, bool):
            raise ValueError(f"sample: expected cuda_graph to be 'auto', True or False, got {cuda_graph!r}; choose one")
        classes = self._sampling_labels(labels, num_images, guidance_scale)
        kept = self._known(known, mask, num_images)

        def sample_chunk(index: Tensor) -> Tensor:
            # slots that nobody asked for repeat the first or last row of what was given per image
            row = (index - first_image).clamp(0, num_images - 1).to(device)
            index = index.to(device)
            options: dict[str, Any] = {}
            if kept is not None:
                options = dict(
                    known=kept[0][row], mask=kept[1][row], known_table=sampling.blend_table(self.schedule, steps)
                )
            x = sampling.initial_noise((len(index), self.channels, *self.image_size), seed=seed, sample=index)
            return sampling.sample_loop(
                network, x, table, steps, labels=None if classes is None else classes[row],
                null_label=self.null_class,
                guidance_scale=guidance_scale, clamp=1.0 if self.config.clip_denoised else None,
                dynamic_threshold_ratio=dynamic_threshold_ratio, seed=seed, sample=index,
                loops=loops_of(self.model) if recorded else None, callback=callback, progress=progress, **options,
            )  # fmt: skip

        recorded = cuda_graph and _graph.can_record(device)
        listed = cuda_graph and device.type == "cpu" and not recorded and self.model._compiled_call_impl is None
        network = self._listed_network if listed else self._network
        with self.evaluating(), self.frozen():
            images = sampling.sample_in_chunks(sample_chunk, num_images, batch_size=batch_size, first_image=first_image)
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        weight: float | Tensor = 0.5,
        *,
        t: int | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        labels: Tensor | int | None = None,
        callback: sampling.Callback | None = None,
    ) -> Tensor:
        """Images between two images: both are noised to t with the same noise, mixed there, and denoised (Ho et al.
        2020, section 4.4).

        Args:
            a, b: [B, C, H, W], in [0, 1] or uint8.
            weight: share of b, a number or [B].
            t: how far to noise, in [0, T); None is the middle, T // 2. The larger, the coarser what is mixed.
            seed: of the noise.
            num_steps: steps of ddpm from t down; None visits every one.
            labels, callback: as in `sample`.

        Returns: float32 [B, C, H, W] in [0, 1].

        Raises:
            ValueError: images of the wrong shape, or t out of its range.
        """
        for images in (a, b):
            self._check_images(images)
        _check_seed("interpolate", seed)
        t = self.num_timesteps // 2 if t is None else t
        if not 0 <= t < self.num_timesteps:
            raise ValueError(
                f"interpolate: expected t in [0, {self.num_timesteps}), got {t}; "
                f"the middle is {self.num_timesteps // 2}"
            )
        device, batch = self.device, len(a)
        sample, times = torch.arange(batch, device=device), torch.full((batch,), t, device=device)
        table = self.table("signal_sigma", device)
        draw: dict[str, Any] = dict(seed=seed, sample=sample, step=0)

        def noised(images: Tensor) -> Tensor:
            scale, shift = self.pixel_range(images)
            x_t = ops.q_sample(images.to(device), times, table, pixel_scale=scale, pixel_shift=shift, **draw)
            assert isinstance(x_t, Tensor)
            return x_t

        steps = sampling.timesteps(t + 1, t + 1 if num_steps is None else min(num_steps, t + 1), "trailing")
        coefficients = sampling.ddpm_table(self.schedule, steps, self.config.prediction, self.config.variance)
        with self.evaluating():
            x = sampling.sample_loop(
                self._network, sampling.lerp(noised(a), noised(b), weight), coefficients, steps,
                labels=self._sampling_labels(labels, batch, 1.0),
                clamp=1.0 if self.config.clip_denoised else None, seed=seed, sample=sample, callback=callback,
            )  # fmt: skip
        return (x / 2 + 0.5).clamp(0, 1)

    def _fitting_batch(self, num_images: int, guided: bool) -> int:
        """Images at a time, by what the network takes for one."""
        most = MOST_AT_A_TIME[self.device.type == "cuda"]
        if num_images <= 1 or not isinstance(self.model, UNet):
            return max(1, min(num_images, most))
        size = next(self.model.parameters()).element_size()
        cost = (1 + guided) * size * self.model.config.live_elements
        return fitting_batch(num_images, most, cost, free_memory(self.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        forget(self.model)  # before the network is moved or cast: what is kept for it takes memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _network(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.predict(x, t, labels)

    def _listed_network(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert self._calls is not None
        out: Tensor = self._calls(self._network, x.device, (), (x, t, labels), {})
        return out

    def frozen(self) -> Frozen:
        """For many samplings, ``with diffusion.frozen():``, in which what one prepares is kept for the next.

        The network must not change meanwhile, neither its weights nor what it does. On a CPU its operators are listed
        for each shape that it is called with, and what depends on the weights alone, such as transformed filters, is
        computed once.

        Returns: a context manager, which may be entered again: all its blocks share what is kept.
        """
        return Frozen(self)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode (no dropout) and no gradients inside; the mode of each module is put back after.

        On a CPU glibc's allocator keeps inside what is freed (docs/memory.md).
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.inference_mode(), freed_memory_kept(self.device):
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _sampler_table(self, sampler: str, num_steps: int | None, eta: float, spacing: str) -> tuple[Tensor, Tensor]:
        if sampler not in SAMPLERS:
            raise ValueError(
                f"sample: expected sampler to be one of {', '.join(SAMPLERS)}, got {sampler!r}; choose one of these"
            )
        if sampler != "ddim" and eta != 0:
            raise ValueError(
                f"sample: expected eta only with sampler 'ddim', got eta={eta} with {sampler!r}; leave eta out"
            )
        c = self.config
        most = {"ddpm": c.num_timesteps, "ddim": 50, "dpmpp_2m": 20}[sampler]
        steps = sampling.timesteps(
            c.num_timesteps, min(most, c.num_timesteps) if num_steps is None else num_steps, spacing
        )
        if sampler == "ddpm":
            return steps, sampling.ddpm_table(self.schedule, steps, c.prediction, c.variance)
        if sampler == "ddim":
            return steps, sampling.ddim_table(self.schedule, steps, c.prediction, eta)
        return steps, sampling.dpmpp_2m_table(self.schedule, steps, c.prediction)

    def _sampling_labels(self, labels: Tensor | int | None, count: int, guidance_scale: float) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None or guidance_scale != 1:
                raise ValueError(
                    "sample: expected no labels or guidance for a network without classes; train one with num_classes="
                )
            return None
        if labels is None and guidance_scale != 1:
            raise ValueError(
                f"sample: expected labels with guidance_scale={guidance_scale}, got None; say which classes to draw"
            )
        if self.null_class is None and (labels is None or guidance_scale != 1):
            raise ValueError(
                "sample: expected labels, and no guidance, for a network without a null class, "
                f"got {'none' if labels is None else f'guidance_scale={guidance_scale}'}; say which classes to draw"
            )
        given = torch.as_tensor(self.num_classes if labels is None else labels, dtype=torch.int64)
        if given.dim() > 1 or (given.dim() == 1 and len(given) != count):
            raise ValueError(
                f"sample: expected labels [{count}] or one class, got shape {list(given.shape)}; "
                "give one class an image"
            )
        most = self.num_classes if self.null_class is not None else self.num_classes - 1
        wrong = ", ".join(map(str, given[(given < 0) | (given > most)].unique().tolist()))
        if wrong:
            null = f"{self.num_classes} is the null class" if most == self.num_classes else "there is no null class"
            raise ValueError(f"sample: expected labels in [0, {self.num_classes}), got {wrong}; {null}")
        return given.to(self.device).expand(count)

    def _known(self, known: Tensor | None, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor] | None:
        """The known image in [-1, 1] and its mask, one row an image."""
        if known is None and mask is None:
            return None
        if known is None or mask is None:
            raise ValueError(
                "sample: expected known and mask together, got one of them; pass the image and where to keep it"
            )
        self._check_images(known)
        scale, shift = self.pixel_range(known)
        shape = (count, self.channels, *self.image_size)
        image = (known.to(self.device).float() * scale + shift).expand(shape)
        return image, mask.to(self.device, torch.float32).expand(shape)
