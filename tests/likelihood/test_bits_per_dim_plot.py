"""The picture of a bound: that it is drawn, whatever the numbers are."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.likelihood import BitsPerDim, bits_per_dim, plot_bits_per_dim
from tests.likelihood.networks import random_images, small_diffusion


def result_of(per_timestep: torch.Tensor, prior: float) -> BitsPerDim:
    zeros = torch.zeros_like(per_timestep)
    return BitsPerDim(
        prior + float(per_timestep.sum()), prior, per_timestep, zeros, zeros, 0.01, 10, 256, None, 10 * len(zeros), 1.0
    )


def test_a_result_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "bound.png"
    plot_bits_per_dim(bits_per_dim(small_diffusion(), random_images(4)), path)
    with Image.open(path) as image:
        assert image.size == (1200, 675)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0)}
    # the line, the decoder and prior, and the edge of the shade
    assert {(0x1F, 0x5F, 0xA8), (0xB3, 0x28, 0x2D)} <= colours
    assert 0.3 < (pixels == 255).all(1).mean() < 0.95


@pytest.mark.parametrize(
    "result",
    [
        result_of(torch.logspace(0, -5, 1000, dtype=torch.float64), 7e-6),
        result_of(torch.tensor([2.0], dtype=torch.float64), 0.1),
        result_of(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0.0),
        dataclasses.replace(result_of(torch.ones(3, dtype=torch.float64), 0.1), standard_error=float("nan")),
    ],
    ids=["1000 steps", "1 step", "terms of zero", "one image"],
)
def test_odd_results_are_drawn_without_a_warning(
    result: BitsPerDim, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    plot_bits_per_dim(result, tmp_path / "bound.svg")
    text = (tmp_path / "bound.svg").read_text()
    assert text.count("<path") > 20
    assert [str(warning.message) for warning in recwarn] == []


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(torch.ones(3, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        plot_bits_per_dim(result, tmp_path / "bound.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"expected matplotlib, got none installed; pip install 'fastddpm\[plot\]'"):
        plot_bits_per_dim(result, tmp_path / "bound.png")
