"""The training loop of improved-diffusion, over our optimiser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..._allocator import freed_memory_kept
from ...training.ema import weights_of
from ...training.loop import DivergenceError
from ...training.optimizer import AdamEMA
from . import dist_util, logger
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler

INITIAL_LOG_LOSS_SCALE = 20.0
LEAST_LOG_LOSS_SCALE = -20.0
"""Where training in float16 gives up."""
QUARTERS = 4


class TrainLoop:
    """Trains a network on batches of images, with AdamW and moving averages of the weights.

    A step is that of the original: the same timesteps, noise, loss and update for the same seeds; gradients of
    micro-batches add up. The update, of all weights and the first average, is one op, and the device is read from once
    in log_interval steps. Files have the original's names and contents, modelNNNNNN.pt, ema_0.9999_NNNNNN.pt and
    optNNNNNN.pt, and either library goes on from those of the other; but for optNNNNNN.pt of a run with use_fp16, which
    the original stores as one flat tensor (it is read, and not written).

    Args:
        model: a network on its device, called as model(x, t, **cond).
        diffusion: gives the loss.
        data: an endless iterator over (images [B, C, H, W], {name: tensor [B]}), such as `load_data`.
        batch_size: B, of each process. microbatch: how many go through the network at once; -1 for all.
        lr, weight_decay: of AdamW. ema_rate: decay of the moving average; a text with commas for several.
        log_interval, save_interval: in steps.
        resume_checkpoint: a file modelNNNNNN.pt to go on from, beside its others; "" to start. The learning rate is the
            one given here (the original takes that of the file).
        use_fp16: compute in float16 by autocast, the loss scaled by 2^lg_loss_scale; fp16_scale_growth: how much the
            exponent grows a step. Where a gradient is not finite the step is skipped, and the exponent falls by 1.
        schedule_sampler: draws timesteps; None draws uniformly.
        lr_anneal_steps: the learning rate falls linearly to 0 at this step, where training ends; 0 for neither.

    Attributes: step, from 0; resume_step, what came before; model, diffusion, ema_params, a list of {name: tensor} for
    each rate; opt, an `AdamEMA`.

    Raises:
        ValueError: an optimiser's file of another network.
        DivergenceError: (from run_loop) a gradient was not finite; the last files are those before.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size, self.microbatch = batch_size, microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        self.ema_rate = [float(rate) for rate in ema_rate.split(",")] if isinstance(ema_rate, str) else [ema_rate]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.resume_checkpoint = find_resume_checkpoint() or resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.step = self.resume_step = 0
        self.global_batch = batch_size * dist_util.world_size()
        self.device = next(model.parameters()).device

        if self.resume_checkpoint:
            self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
            logger.log(f"loading model from checkpoint: {self.resume_checkpoint}...")
            model.load_state_dict(dist_util.load_state_dict(self.resume_checkpoint, map_location="cpu"))
        dist_util.sync_params(model.parameters())
        self.opt = AdamEMA(model, weight_decay=weight_decay)
        more = [{name: p.detach().clone() for name, p in self.opt.parameters.items()} for _ in self.ema_rate[1:]]
        self.ema_params = [self.opt.ema, *more]
        self.opt.ema_decay.fill_(self.ema_rate[0])
        self.opt.learning_rate.fill_(lr)
        if self.resume_step:
            self._load_ema()
            self._load_optimizer()

        # nothing of this is read by the host but at a table of the logger
        self._lg_loss_scale = torch.full((), INITIAL_LOG_LOSS_SCALE, dtype=torch.float64, device=self.device)
        if use_fp16:
            self._loss_scale = torch.ones((), device=self.device)
            self.opt.options["grad_scale"] = self._loss_scale
        self._terms: tuple[str, ...] = ()
        self._sums = self._counts = torch.empty(0)
        self._norm = torch.zeros(2, device=self.device)  # sum and count

        self.use_ddp = dist_util.world_size() > 1
        self.ddp_model = model
        if self.use_ddp:
            here = [self.device] if self.device.type == "cuda" else None
            self.ddp_model = DistributedDataParallel(model, here, bucket_cap_mb=128)

    @property
    def lg_loss_scale(self) -> float:
        """The exponent of the loss scale; reading it waits for the device."""
        return float(self._lg_loss_scale)

    def run_loop(self) -> None:
        """Train until lr_anneal_steps, or for ever; write a table and files where they are due, and files at the end.

        Where DIFFUSION_TRAINING_TEST is set, until the first files after step 0.
        """
        with freed_memory_kept(self.device):
            while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                if self.step % self.log_interval == 0:
                    logger.dumpkvs()
                if self.step % self.save_interval == 0:
                    self.save()
                    if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.step > 0:
                        return
                self.step += 1
        if (self.step - 1) % self.save_interval != 0:
            self.save()

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One update from a batch [B, C, H, W]."""
        self.forward_backward(batch, cond)
        self.optimize()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Gradients of the loss, micro-batch by micro-batch."""
        if self.use_fp16:
            self._loss_scale.copy_(torch.exp2(self._lg_loss_scale))
        starts = range(0, batch.shape[0], self.microbatch)
        for start in starts:
            rows = slice(start, start + self.microbatch)
            micro = batch[rows].to(self.device, non_blocking=True)
            micro_cond = {name: value[rows].to(self.device, non_blocking=True) for name, value in cond.items()}
            t, weights = self.schedule_sampler.sample(micro.shape[0], self.device)
            alone = self.use_ddp and start != starts[-1]  # gradients of the processes are joined once
            with self.ddp_model.no_sync() if alone else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, torch.float16) if self.use_fp16 else nullcontext():
                    losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=micro_cond)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                loss = (losses["loss"] * weights).mean()
                self._add(t, {name: (value * weights).detach() for name, value in losses.items()})
                (loss * self._loss_scale if self.use_fp16 else loss).backward()

    def optimize(self) -> None:
        """Update weights and averages from the gradients."""
        self._anneal_lr()
        if self.use_fp16:
            self.opt.found_inf.zero_()
        norm = self.opt.update(torch.zeros((), device=self.device))
        found = self.opt.found_inf
        with torch.no_grad():
            self._norm += torch.stack([torch.where(found > 0, 0.0, norm.float()), 1 - found])
            if self.use_fp16:
                self._lg_loss_scale += torch.where(found > 0, -1.0, self.fp16_scale_growth)
        for rate, averaged in zip(self.ema_rate[1:], self.ema_params[1:], strict=True):
            # where the step was skipped the weights are as they were: the average moves towards them
            update_ema(averaged.values(), self.opt.parameters.values(), rate)

    def log_step(self) -> None:
        """Give the logger where training is, and what it found, if its table is due."""
        logger.logkv("step", self.step + self.resume_step)
        logger.logkv("samples", (self.step + self.resume_step + 1) * self.global_batch)
        if self.step % self.log_interval == 0:
            self._log_found()

    def save(self) -> None:
        """Write weights, averages and the optimiser's state. In several processes the first one writes.

        Raises:
            DivergenceError: a gradient was not finite; nothing is written.
        """
        self._check_finite()
        if dist_util.rank_and_size()[0] == 0:
            number = f"{self.step + self.resume_step:06d}"
            logger.log("saving model 0...")
            self._write(self.model.state_dict(), f"model{number}.pt")
            for rate, averaged in zip(self.ema_rate, self.ema_params, strict=True):
                logger.log(f"saving model {rate}...")
                with weights_of(self.model, averaged):
                    self._write(self.model.state_dict(), f"ema_{rate}_{number}.pt")
            self._write(self._optimizer_state(), f"opt{number}.pt")
        if self.use_ddp:
            dist.barrier()

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            done = (self.step + self.resume_step) / self.lr_anneal_steps
            self.opt.learning_rate.fill_(self.lr * (1 - done))

    def _add(self, t: Tensor, losses: dict[str, Tensor]) -> None:
        """Add up losses [B], all of them and by the quarter of the timesteps."""
        if self._terms != tuple(losses):
            self._terms = tuple(losses)
            self._sums = torch.zeros(len(losses), 1 + QUARTERS, device=self.device)
            self._counts = torch.zeros(1 + QUARTERS, device=self.device)
        quarter = t * QUARTERS // self.diffusion.num_timesteps
        member = torch.nn.functional.one_hot(quarter, QUARTERS).to(torch.float32)
        values = torch.stack(list(losses.values())).float()
        self._sums += torch.cat([values.mean(1, keepdim=True), values @ member], dim=1)
        self._counts += torch.cat([torch.ones(1, device=self.device), member.sum(0)])

    def _log_found(self) -> None:
        """Means since the last time, from the device to the logger."""
        self._check_finite()
        norm, steps = self._norm.tolist()
        counts = self._counts.tolist()
        for name, sums in zip(self._terms, self._sums.tolist(), strict=True):
            for key, total, count in zip(("", *(f"_q{i}" for i in range(QUARTERS))), sums, counts, strict=True):
                if count:
                    logger.logkv(f"{name}{key}", total / count)
        if steps:
            logger.logkv("grad_norm", norm / steps)
        if self.use_fp16:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)
        for value in (self._norm, self._sums, self._counts):
            value.zero_()

    def _check_finite(self) -> None:
        where = f"at or before step {self.step + self.resume_step}"
        if self.use_fp16:
            if self.lg_loss_scale < LEAST_LOG_LOSS_SCALE:
                raise DivergenceError(
                    f"TrainLoop: expected finite gradients, got none in float16 {where} whatever the loss scale; go on "
                    "from earlier files with a lower lr, or without use_fp16"
                )
        elif bool(self.opt.found_inf):
            raise DivergenceError(
                f"TrainLoop: expected finite gradients, got one that is not {where}; go on from the last files with a "
                "lower lr"
            )

    def _names(self) -> list[str]:
        """Names of the weights in a state dict, in the order of the original's optimiser."""
        buffers = dict(self.model.named_buffers())
        return [name for name in self.model.state_dict() if name not in buffers]

    def _moments(self) -> list[dict[str, Tensor]]:
        return [self.opt.exp_avg, self.opt.exp_avg_sq]

    def _optimizer_state(self) -> dict[str, Any]:
        """As `torch.optim.AdamW` has it, parameters in the order of the original."""
        names, moments = self._names(), []
        for moment in self._moments():
            with weights_of(self.model, moment):
                moments.append(dict(self.model.state_dict()))
        step = float(self.opt.step)
        group = torch.optim.AdamW(
            [torch.zeros(()) for _ in names], lr=float(self.opt.learning_rate), weight_decay=self.weight_decay
        ).state_dict()["param_groups"]
        state = {
            i: {"step": torch.tensor(step), "exp_avg": moments[0][name], "exp_avg_sq": moments[1][name]}
            for i, name in enumerate(names)
        }
        return {"state": state, "param_groups": group}

    def _load_optimizer(self) -> None:
        path = Path(self.resume_checkpoint).parent / f"opt{self.resume_step:06}.pt"
        if not path.exists():
            logger.warn(f"no {path.name} beside {self.resume_checkpoint}: the optimizer starts anew")
            return
        logger.log(f"loading optimizer state from checkpoint: {path}")
        state = dist_util.load_state_dict(str(path), map_location="cpu")["state"]
        names, weights = self._names(), self.model.state_dict()
        for moment, key in zip(self._moments(), ("exp_avg", "exp_avg_sq"), strict=True):
            found = [state[i][key] for i in sorted(state)]
            if len(found) == 1 < len(names):  # the original's use_fp16: one flat tensor
                found = list(found[0].split([weights[name].numel() for name in names]))
            if len(found) != len(names):
                raise ValueError(
                    f"TrainLoop: expected the state of {len(names)} tensors in {path}, got {len(found)}; make the "
                    "model with the flags it was trained with"
                )
            shaped = {name: value.reshape(weights[name].shape) for name, value in zip(names, found, strict=True)}
            with weights_of(self.model, moment):
                self.model.load_state_dict(shaped, strict=False)  # buffers are no moments
        self.opt.step.fill_(int(state[0]["step"]))

    def _load_ema(self) -> None:
        for rate, averaged in zip(self.ema_rate, self.ema_params, strict=True):
            path = find_ema_checkpoint(self.resume_checkpoint, self.resume_step, rate)
            if path:
                logger.log(f"loading EMA from checkpoint: {path}...")
                with weights_of(self.model, averaged):
                    self.model.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))

    @staticmethod
    def _write(state: dict[str, Any], name: str) -> None:
        """A file that appears whole or not at all."""
        path = Path(get_blob_logdir()) / name
        unfinished = path.with_name(f".{name}.unfinished")
        torch.save(_dense(state), unfinished)
        os.replace(unfinished, path)


def parse_resume_step_from_filename(filename: str) -> int:
    """NNNNNN of a path that ends in modelNNNNNN.pt; 0 of another."""
    _, found, number = filename.rpartition("model")
    number = number.split(".")[0]
    return int(number) if found and number.isdecimal() else 0


def get_blob_logdir() -> str:
    """Where files are written: DIFFUSION_BLOB_LOGDIR, else the logger's folder."""
    folder = os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()
    assert folder is not None
    return folder


def find_resume_checkpoint() -> str | None:
    """What to go on from in place of resume_checkpoint: nothing; replace it to find files of your own."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float) -> str | None:
    """The average of this rate beside a modelNNNNNN.pt, or None."""
    if main_checkpoint is None:
        return None
    path = Path(main_checkpoint).parent / f"ema_{rate}_{step:06d}.pt"
    return str(path) if path.exists() else None


def _dense(value: Any) -> Any:
    """Tensors on the CPU, contiguous and none a part of another, so that a file holds no more than they do."""
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value
