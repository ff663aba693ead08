"""The training loop (Ho et al. 2020, algorithm 1), with everything that a long run needs around it."""

from __future__ import annotations

import difflib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import _native
from .._allocator import keep_freed_memory
from .._calls import Repeated, forget
from .._graph import Replayed, can_record
from ..diffusion import GaussianDiffusion
from ..nn.layers import computes_in_float32
from ..nn.unet import UNet
from ..ops import philox
from ..pictures import save_grid
from .batches import Batch, Batches
from .checkpoint import (
    Checkpoint,
    check_config,
    environment,
    environment_differences,
    latest_checkpoint,
    pin_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig, choose_device, choose_precision, compile_network, free_on_resume
from .data import ImageDataset, load_images
from .ema import halflife_decay, warmed_decay, weights_of
from .metrics import Reading, Totals, append_metrics, set_aside, truncate_metrics
from .optimizer import AdamEMA, learning_rate
from .scale import FIRST

SECONDS_BETWEEN_LINES = 10.0
SECONDS_WITHOUT_A_LINE = 30.0
HALF = 2**31  # of the 32-bit words of the noise


class _Line(NamedTuple):
    """A line of metrics whose numbers are on their way: of the steps up to these images and steps."""

    images: int
    steps: int
    reading: Reading


class DivergenceError(RuntimeError):
    """The loss or a gradient was not finite."""


class InUseError(RuntimeError):
    """Another training runs in the same directory."""


class Trainer:
    """Trains a diffusion on images; writes checkpoints, metrics and sample grids; goes on where it stopped.

    Into ``output_dir`` go checkpoint-<images>/, metrics.jsonl (one JSON object per log interval), samples/<images>.png.
    Interrupted in any way, the same call goes on from the newest intact checkpoint, with the bits of a run that was
    never interrupted (on the same machine, build and thread count; another one warns).

    Args:
        diffusion: what to train; moved to the device.
        data: an `ImageDataset`, or anything that `load_images` reads: a folder (sub-folders are classes), a zip, an
            .npz, a uint8 array, a Hugging Face dataset.
        config: a `TrainConfig`; None is the default one.
        resume: "auto" goes on from the newest checkpoint in output_dir, if there is one; True expects one; False
            expects none.
        allow_changes: resume although training options differ that change the weights, and warn which. With another
            precision weights, moments and order of the images go on as they were, and a loss scale starts anew; an
            average that there was none of starts as the weights; one that is no longer wanted stays in the checkpoint,
            which is then kept for good.
        progress: show a bar, or a line now and then where output is no terminal.
        callbacks: called as callback(trainer) after every step; `stop` ends the training from there.
        **options: fields of the configuration to change, for example num_images=1_000_000.

    Attributes:
        diffusion, data, config, device: as given, resolved.
        images_seen, steps: progress. optimizer: weights, moments and the moving average, see `AdamEMA`.
        last_checkpoint: path of the newest one, or None.

    Raises:
        ValueError: images or labels that do not fit the diffusion; an option out of its range.
        CheckpointError: the run in output_dir has another configuration, or no intact checkpoint.
        FileExistsError: resume=False and there is a run. FileNotFoundError: resume=True and there is none.

    Numerics: noise, timesteps, flips and dropout belong to (seed, step, slot in the batch): splitting the batch into
        micro-batches leaves them as they are (t with "stratified" or "importance" sampling is drawn per micro-batch).
        bfloat16 and float16 are for the network alone, which then may read weights in them, kept beside those in
        float32 (``weight_mirror``; a weight changed through .data is seen when `train` begins, otherwise at once). In
        float16 a step whose gradients are not finite is left out, the average included, and counted as a step. No step
        waits for the device; metrics are copied to the host once per log interval, and written when they have come.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        data: object,
        config: TrainConfig | None = None,
        *,
        resume: bool | str = "auto",
        allow_changes: bool = False,
        progress: bool = True,
        callbacks: Sequence[Callable[[Trainer], None]] = (),
        **options: Any,
    ) -> None:
        self.config = c = _with_options(config or TrainConfig(), options)
        if resume not in (True, False, "auto"):
            raise ValueError(
                f"Trainer: expected resume to be 'auto', True or False, got {resume!r}; "
                "'auto' goes on where there is a run"
            )
        self.device = choose_device(c.device)
        self.data = _load(data, diffusion, progress)
        self.diffusion = diffusion.to(self.device)
        self.dtype = choose_precision(c.precision, self.device)
        self.progress, self.callbacks = progress, tuple(callbacks)
        self.directory = Path(c.output_dir)
        self._warmup = c.warmup  # images; of a run that is resumed, as it was begun
        self.images_seen, self.steps = 0, 0
        self.last_checkpoint: Path | None = None
        self._saved = -1  # images seen when it was written
        mirrored = _mirrored(c, diffusion.model, self.dtype, self.device)
        self.optimizer = AdamEMA(
            diffusion.model,
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_eps,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            gradients=getattr(torch, c.gradient_dtype or "float32"),
            mirror=self.dtype if mirrored else None,
            mirrored=mirrored,
            average=c.ema_decay is not None,
            scaled=self.dtype == torch.float16,
        )
        self._decay = (
            c.ema_decay if c.ema_halflife_images is None else halflife_decay(c.ema_halflife_images, c.batch_size)
        )
        self._seed = torch.tensor(c.seed, device=self.device)
        self._slots = torch.arange(c.batch_size, device=self.device)
        self._totals = Totals(diffusion.num_timesteps, self.device, scaled=self.dtype == torch.float16)
        self._batches = Batches(
            self.data,
            with_labels=diffusion.num_classes is not None,
            seed=c.seed,
            batch_size=c.batch_size,
            device=self.device,
            data_on=c.data_on,
        )
        # what a step works on lies always in the same place
        self._batch: Batch | None = None
        self._step = torch.zeros((), dtype=torch.int64, device=self.device)
        recorded = c.cuda_graph == "on" or (c.cuda_graph == "auto" and isinstance(diffusion.model, UNet))
        if c.cuda_graph == "auto" and not recorded and can_record(self.device):
            self._say(
                f"training goes on without a CUDA graph: nobody knows whether {type(diffusion.model).__name__} does "
                "the same work at each call; cuda_graph='on' tries it"
            )
        self._run = Replayed(self.device, "training", recorded)
        on_cpu = self.device.type == "cpu" and not self._run.records
        # a list of operators takes memory, which with recompute is what is short
        self._repeat = Repeated(diffusion.model, recorded and on_cpu and not c.compile and not c.recompute)
        self._seconds = 0.0  # of training, without checkpoints and grids
        self._logged = (0, 0.0)  # images and seconds at the last line of metrics
        self._line: _Line | None = None  # the one that is under way
        self._glance: _Line | None = None  # steps and loss so far, on their way
        self._shown: tuple[tqdm[Any], Any] | None = None  # the bar, and what writes for TensorBoard
        self._stopping = False
        self._signal: int | None = None
        self._clock = self._said = self._kept = 0.0  # when training went on, a line and a checkpoint were last written
        # on a processor all that is used here is deterministic anyway
        self._restricted = c.deterministic and (self.device.type == "cuda" or c.compile)
        if self._restricted:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        self._resume(resume, allow_changes)
        if isinstance(diffusion.model, UNet):
            diffusion.model.recompute(c.recompute)
        elif c.recompute:
            raise ValueError(
                f"Trainer: expected a fastddpm.UNet with recompute, got {type(diffusion.model).__name__}; leave "
                "recompute out, and let the network recompute by itself"
            )
        if self.device.type == "cpu":
            keep_freed_memory(not c.recompute)
        if c.compile:
            compile_network(diffusion.model, c.compile_mode)
        self._compiles = c.compile  # at the first step

    def train(self) -> None:
        """Train until num_images are seen (the last batch is a whole one), or `stop` is called.

        Ctrl-C (SIGINT) and SIGTERM save a checkpoint, tell how to go on, and raise SystemExit; a second one does not
        wait.

        Raises:
            DivergenceError: a loss or gradient was not finite; the last good checkpoint is kept and named.
            SystemExit: after SIGINT or SIGTERM.
            OSError: the disk is full; earlier checkpoints are as they were.
            InUseError: another training runs in output_dir.
        """
        c = self.config
        if self.images_seen >= c.num_images:
            self._say(f"{self.images_seen:,} of {c.num_images:,} images seen already; raise num_images to go on")
            return
        self._stopping = False
        if self.device.type == "cpu":
            _native.tell_missing()
        self.optimizer.follow(anyway=True)
        with ExitStack() as stack:
            stack.enter_context(self._open_directory())
            stack.enter_context(_deterministic(self._restricted))
            stack.enter_context(self._signals())
            stack.callback(self._batches.close)
            writer = stack.enter_context(_tensorboard(self.directory, self.images_seen)) if c.tensorboard else None
            bar = stack.enter_context(self._bar())
            self._shown = bar, writer
            self._said = self._kept = time.monotonic()
            self._glance = None
            self._announce()
            if self._due(c.sample_every_images, self.images_seen - c.batch_size) and not self._grid_path().exists():
                self._sample(writer)  # the run was killed between a checkpoint and its grid
            self._clock = time.perf_counter()
            while self.images_seen < c.num_images and not self._stopping:
                before = self.images_seen
                self._first_step() if self._compiles else self.step()
                for callback in self.callbacks:
                    callback(self)
                bar.update(min(c.batch_size, c.num_images - before))
                done = self.images_seen >= c.num_images
                if done or self._due(c.log_every_images, before):
                    self._tell()  # where the device is a whole interval behind, here it is waited for
                    self._line = _Line(self.images_seen, self.steps, self._totals.take(*self._asked()))
                checkpoint = done or self._due(c.checkpoint_every_images, before) or self._overdue()
                grid = c.sample_every_images > 0 and (done or self._due(c.sample_every_images, before))
                if checkpoint or grid or (self._line is not None and self._line.reading.is_there()):
                    self._tell()
                self._look()
                if checkpoint:
                    with self._clock_stopped():
                        self.save()
                if grid and not self._stopping:
                    with self._clock_stopped():
                        self._sample(writer)
            if self._stopping:
                self._tell()
                with self._clock_stopped():
                    self.save()
        if self._signal is not None:
            self._say(
                f"{signal.Signals(self._signal).name} after {self.images_seen:,} of {c.num_images:,} images; saved "
                f"{self.last_checkpoint}; start the same training again to go on from there",
                always=True,
            )
            raise SystemExit(128 + self._signal)

    def step(self) -> None:
        """One optimiser step on the next batch. Nothing is read from the device, and nothing is written to files."""
        c = self.config
        with _deterministic(self._restricted), self._products():
            batch = self._batches.get(self.images_seen)
            seen = self.images_seen + c.batch_size
            if self._batch is None:
                self._batch = batch
            else:
                self._batch.copy_(batch)
            self._step.fill_(self.steps)
            self.optimizer.learning_rate.fill_(self._learning_rate(seen))
            self.optimizer.ema_decay.fill_(self._ema_decay(self.steps) or 0.0)
            self.optimizer.follow()
            if self._repeat.wanted:
                changed = [self._step, self.optimizer.learning_rate, self.optimizer.ema_decay]
                self._repeat(self._compute, changed + [x for x in self._batch if isinstance(x, Tensor)])
            else:
                self._run(self._compute)
            self.optimizer.written()
        self.images_seen, self.steps = seen, self.steps + 1

    def _first_step(self) -> None:
        """A step in which the network is compiled, and how long that took."""
        start, self._compiles = time.perf_counter(), False
        self.step()
        self._totals.wait()
        self._say(f"compiled the network in {time.perf_counter() - start:.1f} s, in the first step")

    def stop(self) -> None:
        """End `train` after the step that runs, with a checkpoint."""
        self._stopping = True

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless there is one already. Returns its path.

        Raises:
            DivergenceError: a loss or gradient was not finite; nothing is written.
            OSError: the disk is full, or not writable.
        """
        self._tell()
        self._check_finite(int(self.optimizer.skipped), self.images_seen)
        self._kept = time.monotonic()
        if self.last_checkpoint is not None and self._saved == self.images_seen:
            return self.last_checkpoint
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.diffusion.model.state_dict(),
            **self.optimizer.groups(),
            "progress": self._totals.tensors,
        }
        if self.diffusion.timestep_sampler is not None:
            tensors["timesteps"] = self.diffusion.timestep_sampler.state_dict()
        state = {
            "images_seen": self.images_seen,
            "steps": self.steps,
            "seconds": self._seconds,
            "logged": list(self._logged),
            "trained": list(self.optimizer.parameters),
        }
        self.last_checkpoint = save_checkpoint(
            self.directory, self.images_seen, tensors, state, self.to_dict(), keep=self.config.keep_checkpoints
        )
        self._saved = self.images_seen
        return self.last_checkpoint

    def to_dict(self) -> dict[str, Any]:
        """The full configuration of the run as plain data for JSON: unet (None for another network), images, diffusion,
        train, data."""
        model = self.diffusion.model
        return {
            "unet": model.to_config() if isinstance(model, UNet) else None,
            "images": {"size": list(self.diffusion.image_size), "channels": self.diffusion.channels},
            "diffusion": self.diffusion.to_dict(),
            "train": {**self.config.to_dict(), "warmup_images": self._warmup},
            "data": {
                "fingerprint": self.data.fingerprint,
                "count": len(self.data),
                "class_names": None if self.data.class_names is None else list(self.data.class_names),
            },
        }

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, in a ``with`` block, to sample or evaluate; see `weights_of`."""
        with weights_of(self.diffusion.model, self.optimizer.ema):
            yield

    def sample_grid(self) -> Tensor:
        """Samples of the averaged weights, the same noise each time, as many as num_grid_samples: float [N, C, H, W].

        With a network of classes, image n is of class n mod num_classes.
        """
        c, diffusion = self.config, self.diffusion
        labels = None
        if diffusion.num_classes is not None:
            labels = torch.arange(c.num_grid_samples, device=self.device) % diffusion.num_classes
        with self.ema_weights(), self._autocast(), self._products(), ExitStack() as stack:
            stack.callback(forget, diffusion.model)  # a recording would keep its memory until the next grid
            return diffusion.sample(
                c.num_grid_samples,
                seed=c.seed,
                sampler=c.grid_sampler,
                num_steps=None if c.grid_steps is None else min(c.grid_steps, diffusion.num_timesteps),
                labels=labels,
                batch_size=min(64, c.num_grid_samples),
                callback=lambda *_: self._stopping,
            )

    def _compute(self) -> None:
        """What a step does on the device, with tensors that stay where they are alone: a CUDA graph may record it."""
        assert self._batch is not None
        with self.optimizer.keeping():
            loss = self._backward(self._batch, self._step)
        norm = self.optimizer.update(loss)
        self._totals.add_step(loss, norm)

    def _backward(self, batch: Batch, step: Tensor) -> Tensor:
        """Gradients of the mean loss of a batch, micro-batch by micro-batch. Returns that loss []."""
        c = self.config
        self.diffusion.train()
        total = torch.zeros((), device=self.device)
        share = c.micro_batch / c.batch_size
        for start in range(0, c.batch_size, c.micro_batch):
            slots = self._slots[start : start + c.micro_batch]
            images, labels, rows = batch.part(start, start + c.micro_batch)
            flip = None
            if c.horizontal_flip:
                flip = (
                    philox.integers(1, seed=self._seed, sample=slots, step=step, stream=philox.FLIP).squeeze(1) < HALF
                )
            with self._autocast():
                losses = self.diffusion.losses(
                    images, labels, index=rows, flip=flip, seed=self._seed, sample=slots, step=step
                )
            scale = self.optimizer.scale
            loss = losses.loss * share
            (loss if scale is None else loss * scale.scale).backward()
            total += losses.loss.detach() * share
            self._totals.add_samples(losses.t, losses.per_sample)
        return total

    def _autocast(self) -> torch.autocast:
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if half else torch.bfloat16, enabled=half)

    @contextmanager
    def _products(self) -> Iterator[None]:
        """On a GPU, products of float32 as the precision asks for, inside a ``with`` block: torch's own default is TF32
        for convolutions, and float32 for matrix products."""
        if self.device.type != "cuda":
            yield
            return
        with tf32(self.config.precision == "tf32"):
            yield

    def _learning_rate(self, images: int) -> float:
        return learning_rate(images, self.config, self._warmup)

    def _ema_decay(self, step: int) -> float | None:
        if self._decay is None:
            return None
        return warmed_decay(self._decay, step) if self.config.ema_warmup else self._decay

    def _due(self, every: int, before: int) -> bool:
        """Whether the images seen have come to, or past, a multiple of ``every`` since ``before``."""
        return every > 0 and before >= 0 and self.images_seen // every > before // every

    def _overdue(self) -> bool:
        """Whether the last checkpoint is as long ago as it may be; nothing that is trained depends on it."""
        minutes = self.config.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._kept >= 60 * minutes

    def _check_finite(self, skipped: int, images: int) -> None:
        """Stop where a loss or gradient was not finite. From that step on nothing was updated."""
        if not skipped:
            return
        c = self.config
        first = images - (skipped - 1) * c.batch_size
        kept = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint
            else "there was no checkpoint yet"
        )
        limits = [f"a lower learning_rate (it was {self._learning_rate(first):.3g})"]
        if self._warmup < 1000 * c.batch_size:
            limits.append(f"a longer warm-up (warmup_images={self._warmup:,})")
        if c.max_grad_norm is None or c.max_grad_norm > 1:
            limits.append("max_grad_norm=1")
        if self.dtype != torch.float32:
            limits.append("precision='float32'")
        raise DivergenceError(
            f"Trainer: expected finite losses and gradients, got NaN or Inf in the step that ended at {first:,} "
            f"images; {kept}, and the weights in memory are those before that step; go on with allow_changes=True and "
            f"{', or '.join(limits)}"
        )

    def _asked(self) -> list[Tensor]:
        """Numbers beside the totals that a line of metrics needs from the device."""
        scale = self.optimizer.scale
        return [self.optimizer.skipped, *([] if scale is None else [scale.scale])]

    def _tell(self) -> None:
        """Write the line of metrics that is under way, if there is one; waits where its numbers have not come."""
        line, self._line = self._line, None
        if line is None:
            return
        values = line.reading.wait()
        with self._clock_stopped():
            self._write(line, values)

    def _write(self, line: _Line, values: list[float]) -> None:
        assert self._shown is not None
        _, writer = self._shown
        asked = values[len(values) - len(self._asked()) :]
        self._check_finite(int(asked[0]), line.images)
        images, seconds = line.images - self._logged[0], self._seconds - self._logged[1]
        record = {
            "images": line.images,
            "step": line.steps,
            **self._totals.means(values),
            "learning_rate": self._learning_rate(line.images),
            "ema_decay": self._ema_decay(line.steps - 1),
            "images_per_second": images / max(seconds, 1e-9),
            "seconds": self._seconds,
            **({} if self.optimizer.scale is None else {"loss_scale": asked[1]}),
        }
        self._logged = line.images, self._seconds
        append_metrics(self.directory / "metrics.jsonl", record)
        if writer is not None:
            for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "loss_scale"):
                if record.get(name) is not None:
                    writer.add_scalar(name, record[name], line.images)
        self._show(line.images, record["loss"], record["images_per_second"])

    def _look(self) -> None:
        """Say how far the training is where no line of metrics has for a while; its numbers are not waited for."""
        if self._line is not None or self.images_seen == self._logged[0]:
            self._glance = None
        elif self.progress and self._glance is None and time.monotonic() - self._said >= SECONDS_WITHOUT_A_LINE:
            self._glance = _Line(self.images_seen, self.steps, self._totals.peek())
        if self._glance is not None and self._glance.reading.is_there():
            line, self._glance = self._glance, None
            steps, loss = line.reading.wait()
            seconds = self._seconds + time.perf_counter() - self._clock - self._logged[1]
            self._show(line.images, loss / steps, (line.images - self._logged[0]) / max(seconds, 1e-9))

    def _show(self, images: int, loss: float, per_second: float) -> None:
        """At the bar, or in a line now and then."""
        assert self._shown is not None
        (bar, _), total, rate = self._shown, self.config.num_images, self._learning_rate(images)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2g}", refresh=False)
        now = time.monotonic()
        if images < total and now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        if bar.disable:
            left = tqdm.format_interval(max(0, (total - images) / max(per_second, 1e-9)))
            speed = f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"
            self._say(f"{images:,} of {total:,} images, loss {loss:.4f}, lr {rate:.2g}, {speed} images/s, {left} left")

    def _announce(self) -> None:
        """Say what is trained on, and where it goes."""
        c, data = self.config, self.data
        parameters = sum(p.numel() for p in self.diffusion.model.parameters())
        precision = "tf32" if c.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        self._say(f"training {parameters:,} parameters on {self.device}, in {precision}, on {data.report or data}")
        self._say(
            f"{c.num_images:,} images in steps of {c.batch_size:,}, {c.num_images / len(data):,.1f} times each; "
            f"checkpoints, metrics and samples go to {self.directory}"
        )

    def _sample(self, writer: Any) -> None:
        """Write the grid of this moment, unless the sampling was stopped."""
        images = self.sample_grid()
        if self._stopping:
            return
        save_grid(images, self._grid_path())
        if writer is not None:
            writer.add_images("samples", images.float().clamp(0, 1).cpu(), self.images_seen)

    def _grid_path(self) -> Path:
        return self.directory / "samples" / f"{self.images_seen:010d}.png"

    @contextmanager
    def _open_directory(self) -> Iterator[None]:
        """Make the directory ready for this run, and keep other ones out meanwhile."""
        self.directory.mkdir(parents=True, exist_ok=True)
        metrics = self.directory / "metrics.jsonl"
        with _locked(self.directory / ".lock"):
            if self.last_checkpoint is None and self.images_seen == 0 and metrics.exists():
                set_aside(metrics)  # of a run that never came to a checkpoint
                set_aside(self.directory / "samples")
            truncate_metrics(metrics, self.images_seen)
            yield

    def _resume(self, resume: bool | str, allow_changes: bool) -> None:
        if resume is False:
            there = [*self.directory.glob("checkpoint-*"), *self.directory.glob("metrics.jsonl")]
            if there:
                raise FileExistsError(
                    f"Trainer: expected output_dir without a run for resume=False, got {there[0]}; "
                    "choose another output_dir, or resume='auto' to go on"
                )
            return
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is None:
            if resume is True:
                raise FileNotFoundError(
                    f"Trainer: expected a checkpoint in {self.directory} for resume=True, got none; "
                    "check output_dir, or start with resume='auto'"
                )
            return
        if self.config.warmup_images is None:
            self._warmup = checkpoint.config["train"].get("warmup_images", self._warmup)
        changed = self._compare(checkpoint, self.to_dict(), allow_changes)
        differences = environment_differences(checkpoint.environment, environment(self.device))
        if differences:
            warnings.warn(
                f"Trainer: {checkpoint.path} was written elsewhere ({'; '.join(differences)}): the weights will not be "
                "the bits of an uninterrupted run",
                stacklevel=3,
            )
        done = self._restore(checkpoint)
        if changed:
            told = "; ".join(changed + done)
            warnings.warn(f"Trainer: options changed on resuming {checkpoint.path}: {told}", stacklevel=3)
        self._say(f"going on from {checkpoint.path}, {self.images_seen:,} images seen")

    def _compare(self, checkpoint: Checkpoint, wanted: dict[str, Any], allow_changes: bool) -> list[str]:
        """The options that change the weights and differ, in words; where they may."""
        free = [f"train.{name}" for name in free_on_resume(self.config)]
        check_config(checkpoint.config, wanted, ["train"])
        if not allow_changes:
            remedy = "take the saved values, pass allow_changes=True to go on with others, or start a new run elsewhere"
            check_config(checkpoint.config, wanted, free, remedy)
        saved = checkpoint.config["train"]
        return [
            f"{name}: {saved.get(name)!r}, now {value!r}"
            for name, value in wanted["train"].items()
            if f"train.{name}" not in free and saved.get(name) != value
        ]

    def _restore(self, checkpoint: Checkpoint) -> list[str]:
        """Take over what the checkpoint holds; returns, in words, what another precision or average made of it."""
        done = []
        optimizer = self.optimizer
        checkpoint.copy_into("model", self.diffusion.model.state_dict())
        groups = optimizer.groups()
        if optimizer.ema and "ema" not in checkpoint.groups:
            for name, average in groups.pop("ema").items():
                average.copy_(optimizer.parameters[name].detach())
            done.append("the average starts as the weights")
        elif not optimizer.ema and "ema" in checkpoint.groups:
            pin_checkpoint(checkpoint.path)
            done.append(f"the average ends; it stays in {checkpoint.path}, which is kept for good")
        scaled, optional = checkpoint.config["train"]["precision"] == "float16", tuple[str, ...]()
        if scaled != (optimizer.scale is not None):
            optional = ("scale", "good_steps")
            done.append("the loss scale ends" if scaled else f"the loss scale starts at {FIRST:g}")
        for group, targets in groups.items():
            checkpoint.copy_into(group, targets, optional if group == "optimizer" else ())
        checkpoint.copy_into("progress", self._totals.tensors, optional=("skipped",))
        if self.diffusion.timestep_sampler is not None:
            checkpoint.copy_into("timesteps", self.diffusion.timestep_sampler.state_dict())
        state = checkpoint.state
        self.images_seen, self.steps, self._seconds = state["images_seen"], state["steps"], state["seconds"]
        self._logged = (state["logged"][0], state["logged"][1])
        self.last_checkpoint, self._saved = checkpoint.path, self.images_seen
        return done

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """The time of checkpoints and grids is not that of training."""
        self._seconds += time.perf_counter() - self._clock
        yield
        self._clock = time.perf_counter()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop after the step that runs; the second one acts as it would without us."""
        self._signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = (signal.SIGINT, signal.SIGTERM)
        before = {name: signal.getsignal(name) for name in names}

        def restore() -> None:
            for name, handler in before.items():
                signal.signal(name, handler)

        def ask(number: int, _: FrameType | None) -> None:
            self._signal = number
            self.stop()
            restore()

        for name in names:
            signal.signal(name, ask)
        try:
            yield
        finally:
            restore()

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.config.num_images,
            initial=self.images_seen,
            desc="training",
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=None if self.progress else True,
        )

    def _say(self, text: str, always: bool = False) -> None:
        if self.progress or always:
            tqdm.write(text)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """On GPUs, products of float32 in TF32 or not, inside a ``with`` block.

    Torch has two ways to say so. Where the newer one (fp32_precision) was used, the older one (allow_tf32) may refuse
    to be read; then it is left alone, as nobody can rely on it.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    places: list[Any] = [backends[0], backends[1].conv, backends[1].rnn]
    precisions = [place.fp32_precision for place in places]
    flags: list[tuple[Any, bool]] = []
    for backend in backends:
        with suppress(RuntimeError):
            flags.append((backend, backend.allow_tf32))
            backend.allow_tf32 = allowed
    for place in places:
        place.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for backend, flag in flags:
            backend.allow_tf32 = flag
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = "none"  # as where it was not set: then what is set for all decides, later on, too
            if place.fp32_precision != precision:
                place.fp32_precision = precision


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Only algorithms that give the same bits each time, inside a ``with`` block."""
    if not enabled:
        yield
        return
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it would write every new tensor once for nothing
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[3]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process; without effect where there are none (Windows, some network disks)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:  # whatever is in it stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(
                f"Trainer: expected no other training in {path.parent}, got one that runs; "
                "wait for it, or choose another output_dir"
            ) from error
        except OSError:
            pass
        yield


@contextmanager
def _tensorboard(directory: Path, images: int) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "Trainer: expected the package tensorboard for tensorboard=True, got none; "
            "pip install 'fastddpm[tensorboard]', or leave the option out"
        ) from error
    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=images + 1)
    try:
        yield writer
    finally:
        writer.close()


def _with_options(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    known = [f.name for f in fields(config)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose among {', '.join(known)}"
            raise ValueError(f"Trainer: expected options of TrainConfig, got {name}; {remedy}")
    return replace(config, **options)


def _mirrored(c: TrainConfig, network: nn.Module, dtype: torch.dtype, device: torch.device) -> set[str]:
    """Names of the parameters that a training reads in half precision, from the copy that the optimiser writes."""
    if dtype == torch.float32 or not isinstance(network, UNet):
        if c.weight_mirror != "on":
            return set()
        found = type(network).__name__ if dtype != torch.float32 else f"float32 and {type(network).__name__}"
        raise ValueError(
            f"Trainer: expected bfloat16 or float16 and a fastddpm.UNet with weight_mirror 'on', got {found}; leave "
            "weight_mirror out"
        )
    slow = computes_in_float32(torch.empty((), dtype=dtype, device=device))
    wanted = not slow if c.weight_mirror is None else c.weight_mirror == "on"
    return network.cast_parameters() if wanted else set()


def _load(source: object, diffusion: GaussianDiffusion, progress: bool) -> ImageDataset:
    """The images to train on, which fit the diffusion."""
    data = source
    if not isinstance(data, ImageDataset):
        data = load_images(
            source,
            image_size=diffusion.image_size,
            channels=diffusion.channels,
            levels=diffusion.config.levels,
            progress=progress,
        )
    found, wanted = (data.channels, *data.image_size), (diffusion.channels, *diffusion.image_size)
    if found != wanted:
        raise ValueError(
            f"Trainer: expected images of shape {list(wanted)}, got {list(found)}; load them with image_size and "
            "channels, or make the network for that size"
        )
    if data.levels != diffusion.config.levels:
        raise ValueError(
            f"Trainer: expected images of {diffusion.config.levels} grey levels, got {data.levels}; "
            f"load them with levels={diffusion.config.levels}, or set levels in the DiffusionConfig"
        )
    classes = diffusion.num_classes
    if classes is not None and (data.num_classes is None or data.num_classes > classes):
        raise ValueError(
            f"Trainer: expected images of at most {classes} classes for this network, got "
            f"{'no labels' if data.num_classes is None else data.num_classes}; "
            "give labels, or the network another num_classes"
        )
    return data
