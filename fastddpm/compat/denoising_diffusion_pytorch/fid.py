"""The Fréchet inception distance between the images of a folder and samples, with the network of pytorch-fid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...training.atomic import whole_file

FEATURES = (64, 192, 768, 2048)
"""How many features the layers of the network have that pytorch-fid offers."""

Float64Array = npt.NDArray[np.float64]


class Unavailable(RuntimeError):
    """pytorch-fid, or the weights of its network, cannot be had here."""


class FID:
    """d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the features of images and samples (Heusel et al.
    2017, equation 6).

    Images are taken once each, in order, as they are in the folder: neither mirrored nor twice. Samples are rounded to
    8 bits, as images are. Mean and covariance of the images are kept in ``dataset_stats.npz`` (m2, s2), and read from
    there the next time.

    Args:
        sampler: whose ``sample(batch_size=n)`` gives float [n, C, H, W] in [0, 1].
        images: gives batches of the images in order, float [n, C, H, W] in [0, 1], as many images as it is asked for.
        channels: C. batch_size: samples at a time. directory: of dataset_stats.npz. device: of the features.
        num_samples: of images and of samples. features: one of `FEATURES`.

    Raises:
        ValueError: another number of features. Unavailable: see there; the text is the reason.
    """

    def __init__(
        self,
        sampler: Any,
        images: Callable[[int], Iterator[Tensor]],
        *,
        channels: int,
        batch_size: int,
        directory: Path,
        device: torch.device,
        num_samples: int,
        features: int,
    ) -> None:
        if features not in FEATURES:
            raise ValueError(
                f"Trainer: expected inception_block_idx to be one of {', '.join(map(str, FEATURES))}, got {features}; "
                "2048 is usual"
            )
        if channels not in (1, 3):
            raise Unavailable(f"its network takes images of 1 or 3 channels, not of {channels}")
        self.sampler, self.images, self.batch_size, self.features = sampler, images, batch_size, features
        self.path, self.device, self.num_samples = directory / "dataset_stats.npz", device, num_samples
        self._inception, self._distance = _load(features)
        self._inception.to(device).eval()
        self._of_images: tuple[Float64Array, Float64Array] | None = None

    @torch.no_grad()
    def score(self) -> float:
        """The distance now."""
        if self._of_images is None:
            self._of_images = self._read() or self._measure_images()
        sizes = parts(self.num_samples, self.batch_size)
        samples = (self.sampler.sample(batch_size=n) for n in sizes)
        rounded = ((x.float().nan_to_num().clamp(0, 1) * 255).round() / 255 for x in samples)
        mean, covariance = self._statistics(rounded, len(sizes), "samples")
        return float(self._distance(mean, covariance, *self._of_images))

    def _read(self) -> tuple[Float64Array, Float64Array] | None:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                mean, covariance = file["m2"], file["s2"]
        except (OSError, ValueError, KeyError, EOFError):
            return None
        return (mean, covariance) if mean.shape == (self.features,) else None

    def _measure_images(self) -> tuple[Float64Array, Float64Array]:
        found = self._statistics(self.images(self.num_samples), None, "images")
        with whole_file(self.path) as path, open(path, "wb") as file:
            np.savez_compressed(file, m2=found[0], s2=found[1])
        return found

    def _statistics(self, batches: Iterator[Tensor], total: int | None, what: str) -> tuple[Float64Array, Float64Array]:
        """Mean and covariance of the features."""
        rows = []
        for batch in tqdm(batches, f"features of {what}", total, leave=False):
            x = batch.to(self.device)
            features = self._inception(x.expand(-1, 3, -1, -1))[0]
            rows.append(F.adaptive_avg_pool2d(features, 1).flatten(1).cpu())
        table = torch.cat(rows).double().numpy()
        return table.mean(0), np.cov(table, rowvar=False)


def parts(count: int, size: int) -> list[int]:
    """``count`` in parts of ``size``, the last one what is left."""
    return [min(size, count - start) for start in range(0, count, size)]


def _load(features: int) -> tuple[nn.Module, Callable[..., Any]]:
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance
        from pytorch_fid.inception import InceptionV3

        return InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[features]]), calculate_frechet_distance
    except Exception as error:  # packages that are missing or do not fit torch, no network, a damaged download
        raise Unavailable(f"{type(error).__name__}: {error}") from error
