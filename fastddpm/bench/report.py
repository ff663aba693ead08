"""Measure a `Work`, and say what was found: images per second, share of the floor, utilisation, parts, memory."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _native
from ..nn.unet import UNet, UNetConfig
from .floor import Floor, floor, flops
from .memory import peak_of_work, peak_on_gpu
from .parts import time_by_part
from .timing import product_rate, times, wait
from .work import Work


@dataclass(frozen=True)
class Report:
    """What one `Work` took. Times are in seconds and of one step: an optimiser step, or one call of the network.

    Attributes:
        work: its fields. device, dtype, threads: where it ran. parameters: of the network.
        first: of the first call, which sets up libraries, and compiles.
        best, median: of the steps; of a sampling, of whole samplings over their steps.
        images_per_second: seen in training, or drawn, each by all steps of the sampler.
        flops: operations of a step: three forward passes in training, one in sampling.
        peak_flops: operations a second that the machine can do: what was given, or those of a large matrix product.
        floor: the least time, by kind of layer, see `fastddpm.bench.floor`. parts: time by kind of op.
        memory: bytes at the most, None where that cannot be measured.
    """

    work: dict[str, Any]
    device: str
    dtype: str
    threads: int
    parameters: int
    first: float
    best: float
    median: float
    images_per_second: float
    flops: int
    peak_flops: float
    peak_is_measured: bool
    floor: dict[str, float]
    parts: dict[str, float]
    memory: int | None

    @property
    def floor_step(self) -> float:
        """The least time of a step, in seconds."""
        return sum(self.floor.values())

    @property
    def ratio(self) -> float:
        """Step over floor: 1 is a step that does nothing but convolve, multiply matrices and update weights."""
        return self.best / self.floor_step

    @property
    def utilisation(self) -> float:
        """Model FLOP utilisation: operations a second that the network needs, as a share of ``peak_flops``."""
        return self.flops / self.best / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON, with what follows from it."""
        derived = {"floor_step": self.floor_step, "ratio": self.ratio, "utilisation": self.utilisation}
        return {**asdict(self), **derived}


def measure(
    work: Work,
    *,
    repeat: int = 20,
    seconds: float = 60.0,
    peak_flops: float | None = None,
    trace: Path | None = None,
) -> Report:
    """Run a work, its floor, the profiler and, on a CPU, a second process for the memory.

    Args:
        repeat: steps, and calls of each layer of the floor, >= 1; the best counts.
        seconds: stop the steps there once three are timed, > 0; a layer has a tenth of it.
        peak_flops: operations a second of the device by its data sheet, > 0; None measures a large matrix product.
        trace: where to write a trace for Perfetto; None writes none.

    Raises:
        ValueError: a number out of its range, and what the configurations refuse.
    """
    if peak_flops is not None and not peak_flops > 0:
        raise ValueError(f"measure: expected peak_flops > 0, got {peak_flops}; take it from the data sheet, or None")
    device, dtype, training = work.device, work.dtype, work.kind == "train"
    layers = work.layers()
    call = work.prepare()
    begin = time.perf_counter()
    call()
    wait(device)
    first = time.perf_counter() - begin
    found = [taken / work.steps for taken in times(call, device, repeat, seconds)]
    memory = None
    if device.type == "cuda":  # a CUDA graph is one launch to the profiler, and allocates nothing
        del call
        gc.collect()  # else the network that was timed would be counted, too
        call = work.unrecorded().prepare()
        memory = peak_on_gpu(call, device)
    parts = {name: s / work.steps for name, s in time_by_part(call, device, trace=trace).items()}
    del call
    parameters = parameters_of(work)
    least = floor(layers, dtype, device, parameters=parameters, training=training, repeat=repeat, seconds=seconds / 10)
    if device.type == "cpu":
        memory = peak_of_work(work.to_dict(), torch.get_num_threads())
    return Report(
        work=work.to_dict(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _native.build_info()["cpu"],
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        parameters=parameters,
        first=first,
        best=min(found),
        median=statistics.median(found),
        images_per_second=work.config.batch_size / (min(found) * work.image_steps),
        flops=flops(layers) * (3 if training else 1),
        peak_flops=product_rate(dtype, device) if peak_flops is None else peak_flops,
        peak_is_measured=peak_flops is None,
        floor=by_part(least, training),
        parts=parts,
        memory=memory,
    )


def by_part(least: Floor, training: bool) -> dict[str, float]:
    """The floor of a step by kind of layer, with the optimiser's share in training."""
    return {**least.train, "optimizer": least.optimizer} if training else dict(least.forward)


def parameters_of(work: Work) -> int:
    """Of the network, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(UNetConfig(**work.unet)).parameters())


def lines_of(report: Report) -> list[str]:
    """The report as text, a line for each thing measured."""
    work, config = report.work, Work(**report.work).config
    training = work["kind"] == "train"
    what = "training" if training else f"sampling ({work['sampler']}, {Work(**work).image_steps} steps)"
    on = f"{report.device}, {report.threads} thread{'s' if report.threads > 1 else ''}"
    peak = "of a large matrix product here" if report.peak_is_measured else "given"
    share = "less than torch takes for those layers and that update alone"
    if report.ratio >= 1:
        share = f"{1 / report.ratio:.0%} of the step are those layers and that update"
    spent = sum(report.parts.values())
    shares = ", ".join(f"{name} {seconds / spent:.0%}" for name, seconds in report.parts.items())
    least = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in report.floor.items())
    return [
        f"{what}, batch {config.batch_size}, {report.dtype}, {report.parameters:,} parameters; {on}",
        f"  images/s      {report.images_per_second:,.3g}",
        f"  step          {_ms(report.best)} ms at best, {_ms(report.median)} ms in the median",
        f"  first call    {report.first:,.3g} s{', compiling' if config.compile else ''}",
        f"  floor         {_ms(report.floor_step)} ms ({least})",
        f"  step/floor    {report.ratio:.2f}: {share}",
        f"  utilisation   {report.utilisation:.0%}: {report.flops / 1e9:,.4g} GFLOP a step, "
        f"{report.flops / report.best / 1e9:,.4g} GFLOP/s of {report.peak_flops / 1e9:,.4g} ({peak})",
        f"  time by part  {shares}",
        f"  peak memory   {'not measured' if report.memory is None else f'{report.memory / 2**20:,.0f} MiB'}",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g}"
