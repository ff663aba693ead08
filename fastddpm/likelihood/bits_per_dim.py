"""Bits per dimension of a data set: the variational bound, term by term, and a yardstick that knows no neighbours."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from .. import _native
from ..diffusion import GaussianDiffusion, prior_kl
from ..ops import philox
from .bound import vlb_terms

Images = Tensor | npt.NDArray[np.uint8]
Labels = Tensor | npt.NDArray[np.int64]

_PENDING_BATCHES = 16  # results that wait on the device before they are fetched together


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound on -log2 p(x_0) of a data set, in bits per dimension: total = prior + sum(per_timestep).

    Attributes:
        total: the bound.
        prior: L_T = KL(q(x_T | x_0) || N(0, I)).
        per_timestep: what each t adds, float64 [T]; index 0 is the decoder.
        eps_mse: mean squared error of the prediction at each t, turned into eps, float64 [T].
        x0_mse: mean squared error of the predicted x_0 at each t, clipped as configured, float64 [T].
        standard_error: of total, from the differences between images (which hold those between draws of the noise,
            too); NaN for a single image.
        num_images: images evaluated.
        levels: grey levels of the decoder.
        timesteps_per_image: of t > 0; None when every t of every image was evaluated.
        network_calls: evaluations of the network, one image at one t each.
        seconds: wall-clock time.
    """

    total: float
    prior: float
    per_timestep: Tensor
    eps_mse: Tensor
    x0_mse: Tensor
    standard_error: float
    num_images: int
    levels: int
    timesteps_per_image: int | None
    network_calls: int
    seconds: float

    @property
    def decoder(self) -> float:
        """L_0 = -log2 p(x_0 | x_1)."""
        return float(self.per_timestep[0])

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.per_timestep)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a standard error that is not known becomes None."""
        return {
            "total": self.total,
            "standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "prior": self.prior,
            "decoder": self.decoder,
            "per_timestep": self.per_timestep.tolist(),
            "eps_mse": self.eps_mse.tolist(),
            "x0_mse": self.x0_mse.tolist(),
            "num_images": self.num_images,
            "levels": self.levels,
            "num_timesteps": self.num_timesteps,
            "timesteps_per_image": self.timesteps_per_image,
            "network_calls": self.network_calls,
            "seconds": self.seconds,
        }


def bits_per_dim(
    diffusion: GaussianDiffusion,
    images: Images,
    labels: Labels | None = None,
    *,
    timesteps_per_image: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    max_images: int | None = None,
    progress: bool = False,
) -> BitsPerDim:
    """Evaluate the variational bound over a data set, with its breakdown: prior, each t, decoder.

    L_T + sum_{t>1} L_{t-1} + L_0 (Ho et al. 2020, eq. 5), divided by C H W ln 2. One draw of x_t stands for each image
    and t evaluated. With ``timesteps_per_image`` = k, the k N evaluations at t > 0 are laid out evenly over the T - 1
    steps and dealt to the images at random, those of one image (T - 1) / k steps apart: every t is evaluated on equally
    many images, to one, and the mean over them estimates that over all without bias. The decoder is evaluated for every
    image, always.

    Args:
        diffusion: the network to evaluate, in evaluation mode while this runs, on its device.
        images: uint8 [N, C, H, W], values 0..levels-1: a tensor, an array or a memory-mapped one. They are read in
            order, and go to the device batch by batch.
        labels: int64 [N] for a network with classes; None evaluates it without class.
        timesteps_per_image: k in 1..T-1, N k >= 2 (T - 1), N >= 2; None evaluates every t of every image.
        batch_size: images in one call of the network, >= 1; different t share a call, and only the last is smaller.
        seed: of all draws, in [0, 2^63).
        max_images: evaluate the first ones only, >= 1.
        progress: show a bar.

    Returns: `BitsPerDim`.

    Raises:
        ValueError: images or labels of a shape that does not fit, a pixel above levels - 1, a number out of its range.
        TypeError: images that are not uint8, labels that are not int64.

    Numerics: noise is counter-based, a function of (seed, image, t): results do not depend on batch_size beyond the
    rounding of the network. Terms in float32 (float64 for a float64 network), sums in float64. Keeps 4 bytes of host
    memory for every evaluation.
    """
    start = time.perf_counter()
    _check_numbers(batch_size, max_images, seed)
    images, labels = images[:max_images], None if labels is None else labels[:max_images]
    _check_data(diffusion, images, labels)
    if diffusion.device.type == "cpu":
        _native.tell_missing()
    count, steps = len(images), diffusion.num_timesteps
    ts = _timesteps(count, steps, timesteps_per_image, seed)
    width = ts.shape[1]
    nats = torch.empty(count * width, dtype=_dtype(diffusion))
    evaluations = torch.zeros(steps, dtype=torch.int64)
    errors = torch.zeros(2, steps, dtype=torch.float64)
    done = 0

    def fetch(pending: list[Tensor]) -> None:
        nonlocal done
        rows = torch.cat(pending, dim=1).cpu()
        pairs = torch.arange(done, done + rows.shape[1])
        nats[pairs] = rows[0]
        t = ts[pairs // width, pairs % width]
        evaluations.add_(torch.bincount(t, minlength=steps))
        for error, row in zip(errors, rows[1:], strict=True):
            error += torch.bincount(t, weights=row.double(), minlength=steps)
        done += rows.shape[1]

    prior = torch.empty(count, dtype=torch.float64)
    pending: list[Tensor] = []
    bar = tqdm(total=count * width, desc="bits per dim", unit="call", disable=not progress)
    with diffusion.evaluating(), bar:
        for first in range(0, count * width, batch_size):
            pairs = torch.arange(first, min(first + batch_size, count * width))
            image = pairs // width
            pending.append(_evaluate(diffusion, images, labels, image, ts[image, pairs % width], seed, prior))
            if len(pending) == _PENDING_BATCHES:
                fetch(pending)
                pending.clear()
            bar.update(len(pairs))
        if pending:
            fetch(pending)

    per_timestep, standard_error = _mean_and_standard_error(nats.reshape(count, width), ts, evaluations, prior)
    per_timestep = per_timestep / math.log(2)
    prior_bits = float(prior.mean()) / math.log(2)
    return BitsPerDim(
        total=prior_bits + float(per_timestep.sum()),
        prior=prior_bits,
        per_timestep=per_timestep,
        eps_mse=errors[0] / evaluations,
        x0_mse=errors[1] / evaluations,
        standard_error=standard_error / math.log(2),
        num_images=count,
        levels=diffusion.config.levels,
        timesteps_per_image=timesteps_per_image,
        network_calls=count * width,
        seconds=time.perf_counter() - start,
    )


def histogram_bits_per_dim(train_images: Images, test_images: Images, levels: int = 256) -> float:
    """Bits per dimension of a code that knows each pixel's histogram, and nothing of its neighbours.

    p(value at a position) = (count + 1/2) / (N + levels / 2), counted on the N training images for each channel and
    place (add-1/2 smoothing). A model of images has to do better than this.

    Args:
        train_images: uint8 [N, C, H, W], what is counted. test_images: uint8 [M, C, H, W], what is coded.
        levels: values a pixel may take, 2..256.

    Raises:
        ValueError: shapes that do not fit, no images, a pixel above levels - 1, levels out of range.
        TypeError: images that are not uint8.
    """
    if not 2 <= levels <= 256:
        raise ValueError(
            f"histogram_bits_per_dim: expected levels in [2, 256], got {levels}; images of 8 bits have 256"
        )
    for name, images in (("train_images", train_images), ("test_images", test_images)):
        _check_images("histogram_bits_per_dim", name, images, tuple(train_images.shape[1:]))
    places = math.prod(train_images.shape[1:])
    place = torch.arange(places)
    counts = torch.zeros(places * levels, dtype=torch.int64)
    for rows in _blocks("histogram_bits_per_dim", train_images, levels):
        counts += torch.bincount((place * levels + rows.flatten(1)).flatten(), minlength=places * levels)
    bits = -torch.log2((counts.double() + 0.5) / (len(train_images) + levels / 2))
    total = sum(
        float(bits[place * levels + rows.flatten(1)].sum())
        for rows in _blocks("histogram_bits_per_dim", test_images, levels)
    )
    return total / (len(test_images) * places)


def _evaluate(
    diffusion: GaussianDiffusion,
    images: Images,
    labels: Labels | None,
    image: Tensor,
    t: Tensor,
    seed: int,
    prior: Tensor,
) -> Tensor:
    """Terms and errors [3, B] of a batch of pairs (image, t), on the device; L_T of its images goes to ``prior``."""
    device = diffusion.device
    start, end = int(image[0]), int(image[-1]) + 1  # pairs are in the order of the images
    rows = _rows("bits_per_dim", images, start, end, diffusion.config.levels)
    scale, shift = diffusion.pixel_range(rows)
    # the prior is a small difference of larger numbers: float64
    prior[start:end] = prior_kl(rows.double() * scale + shift, diffusion.schedule).flatten(1).mean(1)
    x0 = rows.to(device, non_blocking=True)[(image - start).to(device)].to(_dtype(diffusion)) * scale + shift
    t, sample = t.to(device), image.to(device)
    step = t.unsqueeze(1)  # one for each row
    noise = philox.normal(
        tuple(x0.shape), seed=seed, sample=sample, step=step, stream=philox.TRAINING_NOISE, dtype=x0.dtype
    )
    classes = None if labels is None else torch.as_tensor(labels[start:end])[image - start].to(device)
    return torch.stack(vlb_terms(diffusion, x0, t, noise, classes))


def _timesteps(count: int, steps: int, per_image: int | None, seed: int) -> Tensor:
    """Which t each image is evaluated at: int64 [N, 1 + k], the first column 0; all T of them when per_image is None.

    Slot s = 0 .. k N - 1 has t = 1 + floor(s (T - 1) / (k N)); the image at place p of a random order gets slots
    p, p + N, .., p + (k - 1) N.
    """
    if per_image is None:
        return torch.arange(steps).expand(count, steps)
    if not 1 <= per_image < steps:
        raise ValueError(
            f"bits_per_dim: expected timesteps_per_image in [1, {steps - 1}], got {per_image}; None evaluates every t"
        )
    least = math.ceil(2 * (steps - 1) / count)
    if per_image < least or count < 2:
        enough = f"with {count} images at least {least}" if least < steps else f"at least 2 images, not {count}"
        raise ValueError(
            f"bits_per_dim: expected timesteps_per_image large enough to see each of {steps - 1} steps twice, "
            f"got {per_image}; use {enough}, or None"
        )
    words = philox.integers(2, seed=seed, sample=torch.arange(count), step=0, stream=philox.T)
    place = torch.argsort(torch.argsort(words[:, 0] * 2**31 + words[:, 1] // 2, stable=True))
    slot = place.unsqueeze(1) + count * torch.arange(per_image)
    later = 1 + slot * (steps - 1) // (count * per_image)
    return torch.cat([torch.zeros(count, 1, dtype=torch.int64), later], dim=1)


def _mean_and_standard_error(values: Tensor, ts: Tensor, evaluations: Tensor, prior: Tensor) -> tuple[Tensor, float]:
    """Mean over the images of the term at each t, float64 [T], and the standard error of prior plus the sum of these.

    An image moves the sum by psi = sum over its t of (value - mean_t) / n_t, with n_t evaluations at t; the variance of
    the sum is that of independent images, sum psi^2, each deviation enlarged by sqrt(n_t / (n_t - 1)) as usual.
    """
    count, steps = len(values), len(evaluations)
    blocks = range(0, count, max(1, 2**20 // ts.shape[1]))
    sums = torch.zeros(steps, dtype=torch.float64)
    for start in blocks:
        block = slice(start, start + blocks.step)
        sums += torch.bincount(ts[block].flatten(), weights=values[block].double().flatten(), minlength=steps)
    means = sums / evaluations
    if count < 2:
        return means, math.nan
    share = torch.rsqrt(evaluations.double() * (evaluations - 1))
    squares = 0.0
    for start in blocks:
        block = slice(start, start + blocks.step)
        psi = ((values[block].double() - means[ts[block]]) * share[ts[block]]).sum(1)
        psi += (prior[block] - prior.mean()) / math.sqrt(count * (count - 1))
        squares += float(psi.square().sum())
    return means, math.sqrt(squares)


def _rows(op: str, images: Images, start: int, end: int, levels: int) -> Tensor:
    """Images start..end-1 as a uint8 tensor on the CPU, checked against the number of levels."""
    part = images[start:end]
    rows = part.cpu() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    if levels < 256 and int(rows.max()) >= levels:
        raise ValueError(
            f"{op}: expected pixels in 0..{levels - 1}, got {int(rows.max())}; "
            "set levels to the number of grey levels of the data"
        )
    return rows


def _blocks(op: str, images: Images, levels: int) -> Iterator[Tensor]:
    """The images, some at a time, as int64."""
    block = max(1, 2**22 // math.prod(images.shape[1:]))
    for start in range(0, len(images), block):
        yield _rows(op, images, start, start + block, levels).long()


def _dtype(diffusion: GaussianDiffusion) -> torch.dtype:
    """Float64 for a float64 network, else float32."""
    double = any(p.dtype == torch.float64 for p in diffusion.model.parameters())
    return torch.float64 if double else torch.float32


def _check_images(op: str, name: str, images: Images, shape: tuple[int, ...]) -> None:
    if len(images.shape) != 4 or tuple(images.shape[1:]) != shape or len(images) < 1:
        raise ValueError(
            f"{op}: expected {name} of shape [N, {', '.join(map(str, shape))}] with N >= 1, got {list(images.shape)}; "
            "resize or transpose them"
        )
    if images.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise TypeError(f"{op}: expected {name} of dtype uint8, got {images.dtype}; pass the stored grey levels")


def _check_numbers(batch_size: int, max_images: int | None, seed: int) -> None:
    for name, value in (("batch_size", batch_size), ("max_images", max_images)):
        if value is not None and value < 1:
            raise ValueError(f"bits_per_dim: expected {name} >= 1, got {value}; pass a larger number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"bits_per_dim: expected seed in [0, 2^63), got {seed}; choose a non-negative integer")


def _check_data(diffusion: GaussianDiffusion, images: Images, labels: Labels | None) -> None:
    _check_images("bits_per_dim", "images", images, (diffusion.channels, *diffusion.image_size))
    if labels is None:
        return
    if diffusion.num_classes is None:
        raise ValueError("bits_per_dim: expected no labels for a network without classes, got labels; leave them out")
    if labels.dtype not in (torch.int64, np.dtype(np.int64)):
        raise TypeError(f"bits_per_dim: expected labels of dtype int64, got {labels.dtype}; convert them")
    if tuple(labels.shape) != (len(images),):
        raise ValueError(
            f"bits_per_dim: expected labels of shape [{len(images)}], got {list(labels.shape)}; pass one class an image"
        )
