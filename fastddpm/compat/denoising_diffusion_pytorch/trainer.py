"""`Trainer` and `Trainer1D` of denoising-diffusion-pytorch 2.3.4: the same arguments, files and images, sooner."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import data
from tqdm import tqdm

from ..._allocator import freed_memory_kept
from ...sampling.memory import available_memory
from ...training.atomic import whole_file
from ...training.decode import SMALL, usable_cores
from ...training.loop import DivergenceError
from ...training.metrics import set_aside
from ...training.scale import LossScale
from .batches import Batches, of_dataset
from .dataset import Dataset, Dataset1D, Pixels
from .fid import FID, Unavailable, parts
from .optimizer import EMA, Adam
from .processes import Processes

__all__ = ["Dataset", "Dataset1D", "Trainer", "Trainer1D"]

VERSION = "2.3.4"
"""Of the package whose files these are."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LEAST_IMAGES, LEAST_BATCH = 100, 16
PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class _Training:
    """What both trainers do: steps, the average, checkpoints; see `Trainer`."""

    name = "Trainer"

    def __init__(
        self,
        diffusion_model: nn.Module,
        *,
        train_batch_size: int,
        gradient_accumulate_every: int,
        train_lr: float,
        train_num_steps: int,
        ema_update_every: int,
        ema_decay: float,
        adam_betas: tuple[float, float],
        save_and_sample_every: int,
        num_samples: int,
        results_folder: str | Path,
        amp: bool,
        mixed_precision_type: str,
        split_batches: bool,
        max_grad_norm: float | None,
    ) -> None:
        _check_diffusion(self.name, diffusion_model)
        for name, value in (
            ("train_batch_size", train_batch_size), ("gradient_accumulate_every", gradient_accumulate_every),
            ("ema_update_every", ema_update_every), ("save_and_sample_every", save_and_sample_every),
            ("num_samples", num_samples),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{self.name}: expected {name} >= 1, got {value}; leave it out for the usual one")
        if math.isqrt(num_samples) ** 2 != num_samples:
            raise ValueError(
                f"{self.name}: expected num_samples to be the square of a number, got {num_samples}; "
                f"{math.isqrt(num_samples) ** 2} is near"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{self.name}: expected max_grad_norm > 0, got {max_grad_norm}; None does not clip")
        self.accelerator = Processes()
        self.dtype = _precision(self.name, mixed_precision_type, self.device) if amp else None
        self.scaler = LossScale(self.device) if self.dtype == torch.float16 else None
        self.channels: int = diffusion_model.channels  # type: ignore[assignment]
        self.num_samples, self.save_and_sample_every = num_samples, save_and_sample_every
        self.batch_size, self.gradient_accumulate_every = train_batch_size, gradient_accumulate_every
        self.train_num_steps, self.max_grad_norm = train_num_steps, max_grad_norm
        self.split_batches = split_batches
        self.step = 0
        self.model = self.accelerator.prepare(diffusion_model)
        self.opt = Adam(diffusion_model.parameters(), lr=train_lr, betas=adam_betas)
        if self.accelerator.is_main_process:
            self.ema = EMA(diffusion_model, beta=ema_decay, update_every=ema_update_every).to(self.device)
        self.results_folder = Path(results_folder)
        self.results_folder.mkdir(parents=True, exist_ok=True)
        # files of another run, which keep their contents when this one writes files of their names
        self._others = {path for kind in ("model-*.pt", "sample-*.png") for path in self.results_folder.glob(kind)}
        self._skipped = torch.zeros((), device=self.device)  # steps since the last look that changed nothing
        self._looked = 0  # step of the last look
        self.dl: Iterator[Tensor]

    @property
    def device(self) -> torch.device:
        """Where it trains: a GPU where there is one."""
        return self.accelerator.device

    def save(self, milestone: int | str) -> None:
        """Write ``model-<milestone>.pt`` in the results folder: whole, or not at all.

        A file of that name which another run left there is renamed to ``model-<milestone>.pt.1`` first.

        Raises:
            DivergenceError: no step since the last milestone had finite gradients.
        """
        if not self.accelerator.is_main_process:
            return
        self._check_finite()
        contents = {
            "step": self.step,
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "opt": self.opt.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "version": VERSION,
            "fastddpm": self._own_state(),
        }
        with whole_file(self._file(f"model-{milestone}.pt")) as path, path.open("wb") as file:
            torch.save(contents, file)  # not the path: torch takes no name that begins with a dot

    def load(self, milestone: int | str) -> None:
        """Go on from ``model-<milestone>.pt`` in the results folder, which this or the original package wrote.

        The learning rate is that of the checkpoint. One of ours also goes on with the images that were next.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is of another network, or no checkpoint.
        """
        path = self.results_folder / f"model-{milestone}.pt"
        if not path.exists():
            there = ", ".join(sorted(p.name for p in self.results_folder.glob("model-*.pt")))
            raise FileNotFoundError(
                f"{self.name}: expected {path} to load, got no such file; there are {there or 'none in this folder'}"
            )
        try:
            contents = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.name}: expected {path} to be a whole file of tensors and numbers, got {error}; load an earlier "
                "milestone, as the original leaves half a file where it is interrupted while it writes"
            ) from error
        has = contents if isinstance(contents, dict) else {}
        missing = [key for key in ("step", "model", "opt", "ema") if key not in has]
        if missing:
            raise ValueError(
                f"{self.name}: expected {path} with step, model, opt and ema, got none of {', '.join(missing)}; "
                "load weights alone with trainer.model.load_state_dict"
            )
        model = self.accelerator.unwrap_model(self.model)
        wanted, given = ({k: list(v.shape) for k, v in s.items()} for s in (model.state_dict(), contents["model"]))
        if wanted != given:  # told before anything is changed
            names = [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]
            shapes = ", ".join(f"{name} {given.get(name)} for {wanted.get(name)}" for name in names[:4])
            raise ValueError(
                f"{self.name}: expected {path} of a network and a diffusion like these, got {shapes}"
                f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}; make them with the arguments that they "
                "were trained with"
            )
        model.load_state_dict(contents["model"])
        self.opt.load_state_dict(contents["opt"])
        if self.accelerator.is_main_process:
            self.ema.load_state_dict(contents["ema"])
        self.step = self._looked = contents["step"]
        self._skipped.zero_()
        if self.scaler is not None and contents.get("scaler"):
            self.scaler.load_state_dict(contents["scaler"])
        self._others.discard(path)
        self._take_own_state(contents.get("fastddpm") or {})
        self.accelerator.print(f"{path}: step {self.step:,}, written by version {contents.get('version', 'unknown')}")

    def train(self) -> None:
        """Train until ``train_num_steps``; every ``save_and_sample_every`` steps write samples and a checkpoint."""
        shown = _Shown(self.device)
        main = self.accelerator.is_main_process
        with (
            tqdm(initial=self.step, total=self.train_num_steps, disable=not main) as bar,
            freed_memory_kept(self.device),
        ):
            while self.step < self.train_num_steps:
                shown.put(self._train_step())
                if shown.value is not None:
                    bar.set_description(f"loss: {shown.value:.4f}", refresh=False)
                if self.step % self.save_and_sample_every == 0:
                    self.accelerator.wait_for_everyone()
                    if main:
                        self._milestone(self.step // self.save_and_sample_every)
                    self.accelerator.wait_for_everyone()
                bar.update(1)
        self.accelerator.print(f"trained for {self.step:,} steps")

    def _train_step(self) -> Tensor:
        """One step of the optimiser and the average. Returns the loss, []; reads nothing from the device."""
        if not self.model.training:
            self.model.train()
        total: Tensor | None = None
        for _ in range(self.gradient_accumulate_every):
            images = next(self.dl).to(self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                loss: Tensor = self.model(images).float() / self.gradient_accumulate_every
            (loss if self.scaler is None else loss * self.scaler.scale).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        decay = self.ema.next_decay() if self.accelerator.is_main_process else None
        pairs = [] if decay is None else self.ema.pairs()
        norm = self.opt.update(self.max_grad_norm, pairs, decay or 0.0, self.scaler)
        self._skipped += ~norm.isfinite()
        if self.accelerator.is_main_process:
            self.ema.count()
        self.step += 1
        return total

    def _milestone(self, milestone: int) -> None:
        """Samples of the average, then a checkpoint."""
        self._save_samples(self._samples(), milestone)
        self.save(milestone)

    @torch.no_grad()
    def _samples(self) -> Tensor:
        self.ema.ema_model.eval()
        sample: Any = self.ema.ema_model.sample
        return torch.cat([sample(batch_size=n) for n in parts(self.num_samples, self.batch_size)])

    def _save_samples(self, samples: Tensor, milestone: int) -> None:
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        """What the original does not write down; it passes over it."""
        return {"images": self.dl.state() if isinstance(self.dl, Batches) else None}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        if isinstance(self.dl, Batches):
            self.dl.go_on(state.get("images"))

    def _file(self, name: str) -> Path:
        """The path of a file to write; one of another run makes way for it."""
        path = self.results_folder / name
        if path in self._others:
            self._others.discard(path)
            set_aside(path)
        return path

    def _check_finite(self) -> None:
        """Tell of the steps whose gradients were not finite; in float16 that is how the scale is found."""
        steps, skipped = self.step - self._looked, int(self._skipped)
        self._looked = self.step
        self._skipped.zero_()
        if steps and skipped == steps and (self.scaler is None or float(self.scaler.scale) < 1):
            raise DivergenceError(
                f"{self.name}: expected finite losses and gradients, got NaN or Inf in each of the {steps:,} steps "
                f"before step {self.step:,}; the weights are those before them; go on from the last checkpoint with a "
                "lower train_lr, or without amp"
            )
        if skipped and self.scaler is None:
            warnings.warn(
                f"{self.name}: {skipped:,} of the {steps:,} steps before step {self.step:,} changed nothing, since "
                "their gradients were not finite; try a lower train_lr",
                stacklevel=2,
            )


class Trainer(_Training):
    """Trains a diffusion on the images of a folder, and writes samples and checkpoints into ``results_folder``.

    With one ``torch.manual_seed`` and on one machine, images, flips, noise and times come in the order of the
    original, and so do the weights, but for rounding. What is different:

    - A file is decoded and resized once, in threads, and kept as uint8 where half of the free memory is enough.
    - Clipping, Adam and the average are one pass, and no step waits for the device.
    - A step whose gradients are not finite changes nothing; the original's weights become NaN.
    - Checkpoints are whole or not written, and say where in the epoch they were made: `load` goes on there. Files of
      another run are renamed, not written over.
    - float16 on a CPU computes in float32, and warns.
    - The FID takes each image once, as it is in the folder, and rounds samples to 8 bits; the original takes images
      from the training batches, mirrored and in turns, and does not round. Its dataset_stats.npz is read.
    - The best FID is in the checkpoint, so going on from "latest" does not forget it.

    Args:
        diffusion_model: a `GaussianDiffusion`, or a module with channels, image_size, is_ddim_sampling,
            ``sample(batch_size=n)`` and a call that gives the loss of images [B, C, H, W] in [0, 1].
        folder: of at least 100 images; see `Dataset`.
        train_batch_size, gradient_accumulate_every: images of a batch, batches of a step; at least 16 images a step.
        augment_horizontal_flip: mirror each second image.
        train_lr, adam_betas: of Adam, without weight decay. train_num_steps: its steps, of all calls of `train`.
        ema_update_every, ema_decay: see `EMA`. max_grad_norm: clips gradients; None does not.
        save_and_sample_every: steps from one milestone to the next. num_samples: of a grid, the square of a number.
        results_folder: gets model-<milestone>.pt, sample-<milestone>.png and dataset_stats.npz.
        amp: compute in mixed precision; mixed_precision_type: "fp16" with loss scaling, "bf16" or "no".
        split_batches: several processes share each batch; otherwise each takes a whole one.
        convert_image_to: mode of Pillow; by the channels: "L" for 1, "RGB" for 3, "RGBA" for 4.
        calculate_fid: at each milestone, where pytorch-fid and its weights are there; otherwise warn now, and train.
        inception_block_idx: features of the FID: 64, 192, 768 or 2048. num_fid_samples: images of it, at most.
        save_best_and_latest_only: write model-latest.pt, and model-best.pt when the FID is the lowest yet.

    Attributes:
        step: steps made. model, ema, opt: what is trained, its `EMA`, its Adam. ds, dl: images, endless batches.
        accelerator: the `Processes`. device: where it trains.

    Raises:
        ValueError: an argument out of its range, too few images. TypeError: something else than a diffusion.
        RuntimeError: save_best_and_latest_only where there is no FID.
    """

    def __init__(
        self,
        diffusion_model: nn.Module,
        folder: str | Path,
        *,
        train_batch_size: int = 16,
        gradient_accumulate_every: int = 1,
        augment_horizontal_flip: bool = True,
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        ema_update_every: int = 10,
        ema_decay: float = 0.995,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        save_and_sample_every: int = 1000,
        num_samples: int = 25,
        results_folder: str | Path = "./results",
        amp: bool = False,
        mixed_precision_type: str = "fp16",
        split_batches: bool = True,
        convert_image_to: str | None = None,
        calculate_fid: bool = True,
        inception_block_idx: int = 2048,
        max_grad_norm: float | None = 1.0,
        num_fid_samples: int = 50000,
        save_best_and_latest_only: bool = False,
    ) -> None:
        if train_batch_size * gradient_accumulate_every < LEAST_BATCH:
            raise ValueError(
                f"Trainer: expected train_batch_size * gradient_accumulate_every >= {LEAST_BATCH}, got "
                f"{train_batch_size} * {gradient_accumulate_every}; raise either"
            )
        if save_best_and_latest_only and not calculate_fid:
            raise ValueError(
                "Trainer: expected calculate_fid=True with save_best_and_latest_only, got False; the best checkpoint "
                "is that of the lowest FID"
            )
        super().__init__(
            diffusion_model, train_batch_size=train_batch_size, gradient_accumulate_every=gradient_accumulate_every,
            train_lr=train_lr, train_num_steps=train_num_steps, ema_update_every=ema_update_every,
            ema_decay=ema_decay, adam_betas=adam_betas, save_and_sample_every=save_and_sample_every,
            num_samples=num_samples, results_folder=results_folder, amp=amp,
            mixed_precision_type=mixed_precision_type, split_batches=split_batches, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self.image_size: Sequence[int] | int = diffusion_model.image_size  # type: ignore[assignment]
        self.ds = Dataset(
            folder,
            self.image_size,
            augment_horizontal_flip=augment_horizontal_flip,
            convert_image_to=convert_image_to or MODES.get(self.channels),
        )
        if len(self.ds) < LEAST_IMAGES:
            raise ValueError(
                f"Trainer: expected at least {LEAST_IMAGES} images in {folder}, got {len(self.ds)}; files end in "
                ".jpg, .jpeg, .png or .tiff, and 10,000 of them are better"
            )
        neighbours = self.accelerator.local_processes
        self._pixels = Pixels(self.ds, self.channels, available_memory() // (2 * neighbours))
        self.dl = Batches(
            lambda indices, flips: torch.from_numpy(self._pixels.batch(indices, flips)),
            len(self.ds),
            train_batch_size,
            self.device,
            finish=_to_unit_range,
            flips=augment_horizontal_flip,
            threads=_threads(self.ds.paths[0], neighbours),
            share=self.accelerator.share(train_batch_size, split_batches),
            agree=self.accelerator.agree,
        )
        self.save_best_and_latest_only, self.best_fid = save_best_and_latest_only, math.inf
        self.calculate_fid = calculate_fid and self.accelerator.is_main_process
        if self.calculate_fid:
            self._make_fid_scorer(inception_block_idx, num_fid_samples)

    def _make_fid_scorer(self, features: int, num_samples: int) -> None:
        try:
            self.fid_scorer = FID(
                self.ema.ema_model,
                self._images,
                channels=self.channels,
                batch_size=self.batch_size,
                directory=self.results_folder,
                device=self.device,
                num_samples=num_samples,
                features=features,
            )
        except Unavailable as reason:
            if self.save_best_and_latest_only:
                raise RuntimeError(
                    f"Trainer: expected pytorch-fid and its weights for save_best_and_latest_only, got {reason}; "
                    "pip install pytorch-fid, or set save_best_and_latest_only=False"
                ) from reason
            self.calculate_fid = False
            warnings.warn(
                f"Trainer: trains without calculate_fid, since pytorch-fid cannot be used here ({reason}); "
                "pip install pytorch-fid, or set calculate_fid=False",
                stacklevel=3,
            )
            return
        if not getattr(self.ema.ema_model, "is_ddim_sampling", True):
            warnings.warn(
                f"Trainer: each FID samples {num_samples:,} images with every timestep, which takes long; set "
                "sampling_timesteps of the diffusion, or a smaller num_fid_samples",
                stacklevel=3,
            )

    def _milestone(self, milestone: int) -> None:
        self._save_samples(self._samples(), milestone)
        fid = None
        if self.calculate_fid:
            fid = self.fid_scorer.score()
            self.accelerator.print(f"fid_score: {fid}")
        if not self.save_best_and_latest_only:
            self.save(milestone)
            return
        best = fid is not None and fid < self.best_fid
        if best:
            self.best_fid = float(fid or 0.0)
            self.save("best")
        self.save("latest")

    def _save_samples(self, samples: Tensor, milestone: int) -> None:
        with whole_file(self._file(f"sample-{milestone}.png")) as path:
            grid(samples, math.isqrt(self.num_samples)).save(path, format="PNG")

    def _images(self, count: int) -> Iterator[Tensor]:
        """The first ``count`` images as they are in the folder, in batches on the device."""
        indices = list(range(min(count, len(self.ds))))
        for start in range(0, len(indices), self.batch_size):
            pixels = self._pixels.batch(indices[start : start + self.batch_size])
            yield _to_unit_range(torch.from_numpy(pixels).to(self.device))

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "best_fid": self.best_fid}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        super()._take_own_state(state)
        if "best_fid" in state:
            self.best_fid = state["best_fid"]
            self._others -= {self.results_folder / f"model-{name}.pt" for name in ("best", "latest")}


class Trainer1D(_Training):
    """Trains a diffusion of sequences; otherwise as `Trainer`, without flips and FID.

    Batches of a `Dataset1D` are taken from its tensor; those of any other dataset come from processes, one for each
    core, which live for the whole training where the original starts them anew for each epoch. As there, samples are
    written by torch.save, though the file is named sample-<milestone>.png.

    Args:
        diffusion_model: a `GaussianDiffusion1D`, or a module with channels, ``sample(batch_size=n)`` and a call that
            gives the loss of a batch.
        dataset: anything with a length that gives tensors by index.

    The others are those of `Trainer`.

    Raises:
        ValueError: an argument out of its range, an empty dataset. TypeError: something else than a diffusion.
    """

    name = "Trainer1D"

    def __init__(
        self,
        diffusion_model: nn.Module,
        dataset: data.Dataset[Any] | Sequence[Any],
        *,
        train_batch_size: int = 16,
        gradient_accumulate_every: int = 1,
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        ema_update_every: int = 10,
        ema_decay: float = 0.995,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        save_and_sample_every: int = 1000,
        num_samples: int = 25,
        results_folder: str | Path = "./results",
        amp: bool = False,
        mixed_precision_type: str = "fp16",
        split_batches: bool = True,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(
            diffusion_model, train_batch_size=train_batch_size, gradient_accumulate_every=gradient_accumulate_every,
            train_lr=train_lr, train_num_steps=train_num_steps, ema_update_every=ema_update_every,
            ema_decay=ema_decay, adam_betas=adam_betas, save_and_sample_every=save_and_sample_every,
            num_samples=num_samples, results_folder=results_folder, amp=amp,
            mixed_precision_type=mixed_precision_type, split_batches=split_batches, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        count = len(dataset)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError("Trainer1D: expected a dataset that is not empty, got one of length 0; give it sequences")
        share = self.accelerator.share(train_batch_size, split_batches)
        if type(dataset) is Dataset1D:
            rows = dataset.tensor
            self.dl = Batches(
                lambda indices, _: rows[indices], count, train_batch_size, self.device,
                share=share, agree=self.accelerator.agree,
            )  # fmt: skip
        else:
            self.dl = of_dataset(dataset, train_batch_size, self.device, share, self.accelerator.agree)

    def _save_samples(self, samples: Tensor, milestone: int) -> None:
        with whole_file(self._file(f"sample-{milestone}.png")) as path, path.open("wb") as file:
            torch.save(samples, file)


class _Shown:
    """The newest loss that has come to the host, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.value: float | None = None
        self._waits = device.type == "cuda"
        if self._waits:
            self._copy = torch.empty((), pin_memory=True)
            self._arrived: torch.cuda.Event | None = None

    def put(self, loss: Tensor) -> None:
        """Ask for a loss [], unless one is still on its way."""
        if not self._waits:
            self.value = float(loss)
            return
        if self._arrived is not None:
            if not self._arrived.query():
                return
            self.value = float(self._copy)
        self._copy.copy_(loss, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()


def grid(images: Tensor, columns: int) -> Image.Image:
    """One picture of many, row by row, with two black pixels around each, as torchvision's save_image draws it.

    Args:
        images: float [N, C, H, W] in [0, 1], C = 1 to 4; one image alone has no frame.
        columns: images a row.
    """
    pixels = (images.float().nan_to_num().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu()
    count, channels, height, width = pixels.shape
    if channels == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    gap = 2 if count > 1 else 0
    columns = min(columns, count)
    tall, wide = height + gap, width + gap
    canvas = torch.zeros(pixels.shape[1], -(-count // columns) * tall + gap, columns * wide + gap, dtype=torch.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * tall + gap, i % columns * wide + gap
        canvas[:, top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def _to_unit_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def _threads(first: Path, processes: int) -> int:
    """How many threads decode images like this one, where so many processes do."""
    try:
        with Image.open(first) as image:
            small = image.width * image.height < SMALL
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        small = False  # its turn to be named comes
    return 1 if small else max(1, usable_cores() // processes)


def _check_diffusion(trainer: str, diffusion: Any) -> None:
    needed = ("channels", "sample") if trainer == "Trainer1D" else ("channels", "image_size", "sample")
    missing = [name for name in needed if not hasattr(diffusion, name)]
    if missing or not isinstance(diffusion, nn.Module):
        raise TypeError(
            f"{trainer}: expected diffusion_model to be a module with {', '.join(needed)}, got "
            f"{type(diffusion).__name__} without {', '.join(missing) or 'parameters'}; wrap the network in a "
            f"GaussianDiffusion{'1D' if trainer == 'Trainer1D' else ''}"
        )


def _precision(trainer: str, name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None computes in that of the weights."""
    if name not in PRECISIONS:
        raise ValueError(
            f"{trainer}: expected mixed_precision_type to be one of {', '.join(PRECISIONS)}, got {name!r}; "
            "'bf16' needs no loss scaling"
        )
    if name == "fp16" and device.type == "cpu":
        warnings.warn(
            f"{trainer}: computes in float32, since mixed_precision_type='fp16' is for GPUs; 'bf16' is there on a "
            "CPU, too",
            stacklevel=5,
        )
        return None
    return PRECISIONS[name]
