"""A picture of where the bits of a bound go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..pictures import plot_metadata
from .bits_per_dim import BitsPerDim


def plot_bits_per_dim(result: BitsPerDim, path: str | Path) -> None:
    """Draw what each t adds to the bound, and the share that is reached up to t, into a file.

    Left axis, logarithmic: bits per dimension of each t; the decoder (t = 0) and the prior (at t = T) are points of
    their own. Right axis: the sum from t = 0 on as a share of the total. With more than 64 steps t is logarithmic, too,
    since most bits lie at the first ones.

    Args:
        result: of `bits_per_dim`.
        path: file to write; the ending chooses the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed. ValueError: an ending that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plot_bits_per_dim: expected matplotlib, got none installed; pip install 'fastddpm[plot]'"
        ) from missing

    line, mark, shade, shade_text, grey = "#1f5fa8", "#b3282d", "#e3a04a", "#9a6414", "#666666"
    bits, steps = result.per_timestep, result.num_timesteps
    t = torch.arange(steps)
    many = steps > 64
    known = bits[bits > 0]
    floor = float(known.min()) / 2 if len(known) else 1e-12  # a term of exactly 0 is drawn at the bottom
    decoder, prior = (max(value, floor) for value in (result.decoder, result.prior))

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    cumulative = axes.twinx()
    axes.set_zorder(cumulative.get_zorder() + 1)  # the line lies on the shade
    axes.patch.set_visible(False)

    share = 100 * torch.cumsum(bits, 0) / result.total
    cumulative.fill_between(t, share, color=shade, alpha=0.18, linewidth=0)
    cumulative.plot(t, share, color=shade, linewidth=1)
    cumulative.set_ylim(0, 112)
    cumulative.set_yticks(range(0, 101, 20))
    cumulative.set_ylabel("share of the total up to t  (%)", color=shade_text)
    cumulative.tick_params(axis="y", colors=shade_text)

    axes.semilogy(
        t[1:], bits[1:].clamp(min=floor), color=line, linewidth=1.6, marker=None if many else "o", markersize=3.5
    )
    label: dict[str, Any] = {"textcoords": "offset points", "color": mark, "fontsize": 10}
    axes.semilogy([0], [decoder], color=mark, marker="o", markersize=6, clip_on=False)
    axes.annotate(f"decoder {result.decoder:.3f}", (0, decoder), xytext=(10, 0), va="center", **label)
    axes.semilogy([steps], [prior], color=mark, marker="D", markersize=5, clip_on=False)
    axes.annotate(f"prior {result.prior:.2g}", (steps, prior), xytext=(-28, 0), ha="right", va="center", **label)
    axes.set_ylim(bottom=floor)
    if many:
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        axes.set_xlim(-0.1, steps * 1.15)
        ticks = [0, *(10**k for k in range(math.ceil(math.log10(steps + 1))))]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    else:
        axes.set_xlim(-0.02 * steps, 1.02 * steps)
    axes.set_xlabel("t   (0 = least noise)")
    axes.set_ylabel("bits per dimension of each t", color=line)
    axes.tick_params(axis="y", colors=line)
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
    for spines in (axes.spines, cumulative.spines):
        spines["top"].set_visible(False)

    error = "" if math.isnan(result.standard_error) else f" ± {result.standard_error:.2g}"
    axes.set_title(f"{result.total:.3f}{error} bits per dimension", fontsize=14, fontweight="bold", loc="left", pad=24)
    axes.text(
        0, 1.03,
        f"decoder {result.decoder:.3f}  +  {steps - 1} steps {float(bits[1:].sum()):.3f}  +  prior {result.prior:.2g}"
        f"        {result.num_images:,} images, {result.levels} levels",
        transform=axes.transAxes, fontsize=9.5, color=grey,
    )  # fmt: skip
    figure.savefig(path, metadata=plot_metadata(Path(path)))
