"""The one loop behind every sampler, and the samplers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .._allocator import freed_memory_kept
from .._calls import Loop, Loops
from .._checks import check_dtype, check_shape
from .._graph import Replayed
from ..ops import philox
from ..ops.kept import keep_transformed
from ..ops.normal import normal
from ..ops.solver_step import solver_step
from ..schedule import Schedule
from .coefficients import blend_table, ddim_table, ddpm_table, dpmpp_2m_table
from .guidance import Network, dynamic_threshold, guided_output, thresholded_output
from .timesteps import timesteps

if TYPE_CHECKING:
    from typing_extensions import Unpack

Callback = Callable[[int, int, Tensor, Tensor], bool | None]
"""(i, num_steps, x, pred), called after step i = 0 .. num_steps - 1; True ends the sampling there."""


class LoopOptions(TypedDict, total=False):
    """Options that `sample_ddpm`, `sample_ddim` and `sample_dpmpp_2m` pass on to `sample_loop`, where they are told."""

    labels: Tensor | None
    null_label: int | None
    guidance_scale: Tensor | float
    clamp: Tensor | float | None
    dynamic_threshold_ratio: float | None
    mask: Tensor | None
    known: Tensor | None
    cuda_graph: bool
    loops: Loops | None
    callback: Callback | None
    progress: bool


def initial_noise(
    shape: tuple[int, ...], *, seed: Tensor | int, sample: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x_T ~ N(0, I), which belongs to the sample and not to the batch: Philox stream X_T, counter step 0.

    Args:
        shape: [B, C, H, W]. seed: int or int64 tensor []. sample: int64 [B], the index of each image in the run.
        dtype: float32 or float64.

    Returns: [B, C, H, W] on the device of ``sample``, contiguous.

    Raises:
        ValueError: sample not of shape [B].
    """
    check_shape("initial_noise", "sample", sample, tuple(shape[:1]))
    return normal(tuple(shape), seed=seed, sample=sample, step=0, stream=philox.X_T, dtype=dtype)


def sample_loop(
    network: Network,
    x: Tensor,
    table: Tensor,
    steps: Tensor,
    *,
    labels: Tensor | None = None,
    null_label: int | None = None,
    guidance_scale: Tensor | float = 1.0,
    clamp: Tensor | float | None = 1.0,
    dynamic_threshold_ratio: float | None = None,
    seed: Tensor | int | None = None,
    sample: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_table: Tensor | None = None,
    cuda_graph: bool = False,
    loops: Loops | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Run a sampler: for each row of its table, call the network at that row's timestep and make one `solver_step`.

    Args:
        network: (x_t [B, C, H, W], t int64 [B], labels or None) -> [B, C, H, W], or 2C channels to learn the variance.
        x: where to start [B, C, H, W], float32 or float64: `initial_noise`, or x_t at t = steps[0].
        table: [N, 9], see `ddpm_table`, `ddim_table`, `dpmpp_2m_table`. steps: int64 [N], the timesteps it is made for.
        labels: int64 [B], passed to the network. null_label: the class that stands for none.
        guidance_scale: w of out_uncond + w (out - out_uncond), a number or a float tensor []; 1 is the network as it
            is, in one call on B images; any other takes 2B.
        clamp: bound of the predicted image: a number, a float tensor [B], or None.
        dynamic_threshold_ratio: in place of clamp, keep that quantile of each |pred| within 1 by clamping and dividing,
            see `dynamic_threshold`; 0.995 is usual. Not with a table that takes the raw output (k6).
        seed, sample: where noise is drawn: int or int64 [], and int64 [B], the index of each image in the run (0..B-1
            when None). Row i draws with counter step i. May be left out where nothing is drawn.
        mask, known, known_table: inpainting: keep ``known`` [B, C, H, W] in [-1, 1] where mask is 1, see `solver_step`
            and `blend_table`.
        cuda_graph: on a GPU, record one step and launch it as a whole N times, which leaves nothing to do for Python.
            The network must do the same work each time, without waiting for the device; where it cannot be recorded
            the loop runs as without, and warns. The first steps run without; worth it from some ten on.
        loops: recordings of this network, see `fastddpm._calls.loops_of`: in place of cuda_graph, and kept for the next
            call of the same kind, whose first step is recorded already.
        callback: (i, num_steps, x, pred) after step i, with the state and the predicted image; True ends the sampling.
            Both tensors are written over later: copy what you keep.
        progress: show a bar.

    Returns: [B, C, H, W] in the dtype and layout of x: the image, or the state where the callback ended the sampling.

    Raises:
        ValueError: a table and steps that do not fit together, guidance without labels, noise without a seed, a table
            for a learned variance with a network that has none; and what `solver_step` refuses. TypeError: a dtype.

    Numerics: the state is kept in the dtype of x whatever the network computes in; the table is rounded to it once. The
    same bits for the same x, seed, batch shape, build and thread count. Memory for two states beside the network's; no
    host sync between the first step and the last.
    """
    check_dtype("sample_loop", "x", x, torch.float32, torch.float64)
    check_shape("sample_loop", "table", table, (table.shape[0], 9))
    check_shape("sample_loop", "steps", steps, (table.shape[0],))
    check_dtype("sample_loop", "steps", steps, torch.int64)
    guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1
    if guided and (labels is None or null_label is None):
        raise ValueError(
            f"sample_loop: expected labels and null_label with guidance_scale {guidance_scale}, got no "
            f"{'labels' if labels is None else 'null_label'}; pass both, or guidance_scale=1"
        )
    has_previous, has_noise, has_raw = (bool((table[:, column] != 0).any()) for column in (4, 5, 6))
    learned, draws = bool((table[:, 7] != table[:, 8]).any()), has_noise or mask is not None
    if draws and seed is None:
        raise ValueError("sample_loop: expected seed for a sampler that draws noise, got None; pass an int")
    if dynamic_threshold_ratio is not None and has_raw:
        raise ValueError(
            "sample_loop: expected a table without k6 (the raw output) with dynamic_threshold_ratio, got one; "
            "make it with use_clipped=True"
        )

    num_steps, batch, device = len(steps), len(x), x.device
    sample = torch.arange(batch, device=device) if sample is None else sample
    null_labels = None
    if guided and labels is not None and null_label is not None:
        null_labels = torch.full_like(labels, null_label)
    given: dict[str, Any] = dict(
        x=x, table=table.to(device, x.dtype), steps=steps.to(device), labels=labels, null_labels=null_labels,
        row=torch.zeros((), dtype=torch.int64, device=device), sample=sample, seed=seed if draws else None,
        pred=torch.zeros_like(x) if has_previous else None,  # what the first row multiplies by k4 = 0
        guidance_scale=guidance_scale, clamp=clamp, ratio=dynamic_threshold_ratio, learned=learned, mask=mask,
        known=known, known_table=None if known_table is None else known_table.to(device, x.dtype),
    )  # fmt: skip
    if loops is None:
        loop = Loop(SimpleNamespace(**{**given, "x": x.clone()}), Replayed(device, "sampling", cuda_graph))
    else:
        loop = loops.take({**given, "seed": _as_tensor(given["seed"], device)}, device)
    at = loop.at

    def step() -> None:
        """One row of the table, in place: x, pred and row are where they were."""
        t = at.steps.index_select(0, at.row.reshape(1)).repeat(batch)
        out, out_uncond = guided_output(network, at.x, t, at.labels, at.null_labels)
        if learned and out.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"sample_loop: expected a network with {2 * x.shape[1]} output channels for a learned variance, "
                f"got {out.shape[1]}; use such a network, or a table with a fixed variance"
            )
        bound = at.clamp
        if dynamic_threshold_ratio is not None:
            guidance: dict[str, Any] = dict(out_uncond=out_uncond, guidance_scale=at.guidance_scale)
            thresholds = dynamic_threshold(at.x, out, at.table, at.row, dynamic_threshold_ratio, **guidance)
            out = thresholded_output(at.x, out, at.table, at.row, thresholds, **guidance)
            out_uncond, bound = None, 1.0  # where the division leaves the prediction, rounding aside
        if not has_previous:
            at.pred = None  # free it before its successor is made
        _, at.pred = solver_step(
            at.x, out, at.table, at.row, pred_prev=at.pred, out_uncond=out_uncond, guidance_scale=at.guidance_scale,
            clamp=bound, seed=at.seed, sample=at.sample, mask=at.mask, known=at.known, known_table=at.known_table,
            inplace=True,
        )  # fmt: skip
        at.row.add_(1)

    with torch.no_grad(), keep_transformed(), freed_memory_kept(device):
        for i in _counted(num_steps, progress):
            if loops is None:
                loop.run(step)
            else:
                loops.run(loop, step)
            if callback is not None and callback(i, num_steps, at.x, at.pred):
                break
    images: Tensor = at.x
    if loops is not None:
        images = images.clone()  # the next loop writes over it
        loops.give_back(loop)
    return images


def sample_ddpm(
    network: Network,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    num_steps: int | None = None,
    spacing: str = "trailing",
    seed: Tensor | int = 0,
    sample: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Unpack[LoopOptions],
) -> Tensor:
    """Images by ancestral sampling (Ho et al. 2020, algorithm 2). See `ddpm_table`.

    Args:
        network: see `sample_loop`. schedule: T steps. shape: [B, C, H, W] of the images.
        prediction, variance: what the network predicts, and the variance of a step, see `ddpm_table`.
        num_steps, spacing: N in [1, T] timesteps to visit, all T when None, and which, see `timesteps`.
        seed, sample: the images are those of this seed (int or int64 tensor []) with these indexes (int64 [B]; 0..B-1
            when None).
        device: where to sample.
        **options: labels, null_label, guidance_scale, clamp, dynamic_threshold_ratio, mask, known, cuda_graph, loops,
            callback and progress, see `sample_loop`.

    Returns: [B, C, H, W], float32, in [-1, 1] with the default clamp.

    Raises:
        ValueError, TypeError: see `timesteps`, `ddpm_table` and `sample_loop`.
    """
    steps = _visited(schedule, num_steps, spacing)
    table = ddpm_table(schedule, steps, prediction, variance)
    return _sample(network, schedule, shape, table, steps, seed, sample, device, options)


def sample_ddim(
    network: Network,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    use_clipped: bool = True,
    num_steps: int | None = 50,
    spacing: str = "trailing",
    seed: Tensor | int = 0,
    sample: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Unpack[LoopOptions],
) -> Tensor:
    """Images by the sampler of Song et al. 2021 (DDIM). See `ddim_table` for eta, `sample_ddpm` for the rest."""
    steps = _visited(schedule, num_steps, spacing)
    table = ddim_table(schedule, steps, prediction, eta, use_clipped=use_clipped)
    return _sample(network, schedule, shape, table, steps, seed, sample, device, options)


def sample_dpmpp_2m(
    network: Network,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    prediction: str = "eps",
    num_steps: int | None = 20,
    spacing: str = "trailing",
    seed: Tensor | int = 0,
    sample: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Unpack[LoopOptions],
) -> Tensor:
    """Images by DPM-Solver++(2M) (Lu et al. 2022b). See `dpmpp_2m_table`, and `sample_ddpm` for the arguments."""
    steps = _visited(schedule, num_steps, spacing)
    table = dpmpp_2m_table(schedule, steps, prediction)
    return _sample(network, schedule, shape, table, steps, seed, sample, device, options)


def sample_in_chunks(
    sample_chunk: Callable[[Tensor], Tensor], num_images: int, *, batch_size: int, first_image: int = 0
) -> Tensor:
    """Images first_image .. first_image + num_images - 1 of a run, made in batches of batch_size.

    Image n is always made in slot n mod batch_size of a full batch, whose other slots hold its true neighbours, images
    that nobody asked for included. So whatever part of a run is asked for, an image has the same bits, as far as the
    network gives the same bits for the same batch on the same machine, build and thread count. One image takes the time
    of a batch: choose batch_size by how many are wanted.

    Args:
        sample_chunk: from the indexes of its images, int64 [batch_size] on the CPU, to these images [batch_size, ...].
        num_images: >= 1. batch_size: >= 1. first_image: >= 0.

    Returns: [num_images, ...].

    Raises:
        ValueError: a number out of its range.
    """
    _at_least("num_images", num_images, 1)
    _at_least("batch_size", batch_size, 1)
    _at_least("first_image", first_image, 0)
    end = first_image + num_images
    images = []
    for start in range(first_image - first_image % batch_size, end, batch_size):
        chunk = sample_chunk(torch.arange(start, start + batch_size))
        images.append(chunk[max(first_image - start, 0) : end - start])
    return torch.cat(images)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"sample_in_chunks: expected {name} >= {least}, got {value}; images are counted from 0")


def _as_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor | int | None:
    """A seed that another may take the place of; what is none is left to `solver_step` to refuse."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        return seed
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)


def _visited(schedule: Schedule, num_steps: int | None, spacing: str) -> Tensor:
    total = schedule.num_timesteps
    return timesteps(total, total if num_steps is None else num_steps, spacing)


def _sample(
    network: Network,
    schedule: Schedule,
    shape: tuple[int, ...],
    table: Tensor,
    steps: Tensor,
    seed: Tensor | int,
    sample: Tensor | None,
    device: torch.device | str,
    options: LoopOptions,
) -> Tensor:
    sample = torch.arange(shape[0], device=device) if sample is None else sample.to(device)
    known_table = None if options.get("mask") is None else blend_table(schedule, steps)
    x = initial_noise(shape, seed=seed, sample=sample)
    return sample_loop(network, x, table, steps, seed=seed, sample=sample, known_table=known_table, **options)


def _counted(num_steps: int, progress: bool) -> Iterable[int]:
    """0 .. num_steps - 1, with a bar where it is asked for."""
    if not progress:
        return range(num_steps)
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(range(num_steps), desc="sampling", unit="step")
    return bar
