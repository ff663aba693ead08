"""The training loop: against AdamW and averages written out, its files, and the original where it is there."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

import fastddpm.compat.improved_diffusion as ours
from benchmarks.peers.improved_diffusion import is_there, original
from fastddpm.compat.improved_diffusion import (
    SpacedDiffusion,
    UNetModel,
    create_gaussian_diffusion,
    create_named_schedule_sampler,
    logger,
)
from fastddpm.compat.improved_diffusion.image_datasets import ImageDataset, load_data
from fastddpm.compat.improved_diffusion.train_util import TrainLoop, parse_resume_step_from_filename
from fastddpm.training.loop import DivergenceError
from tests.tolerance import assert_near_peer

needs_original = pytest.mark.skipif(
    not is_there(), reason="peer: needs a checkout of openai/improved-diffusion on PYTHONPATH"
)
SIZE = (4, 3, 8, 8)
RATES = (0.9, 0.5)


@pytest.fixture(autouse=True)
def _logger(tmp_path: Path) -> Iterator[None]:
    logger.configure(str(tmp_path), ["csv"])
    yield
    logger.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def small(library: Any = ours) -> Any:
    """A network, whose last layers are not 0 so that every weight has a gradient."""
    torch.manual_seed(0)
    model = library.unet.UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True)
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    model.load_state_dict({n: v + 0.05 * torch.randn(v.shape, generator=generator) for n, v in state.items()})
    return model


def diffusion(library: Any = ours) -> Any:
    return library.script_util.create_gaussian_diffusion(steps=40, learn_sigma=True, rescale_learned_sigmas=True)


def batches(dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randn(SIZE, generator=generator).clamp(-1, 1).to(dtype), {}


def loop(model: nn.Module, d: SpacedDiffusion | None = None, **options: Any) -> TrainLoop:
    kept: dict[str, Any] = dict(
        data=batches(), batch_size=SIZE[0], microbatch=-1, lr=1e-2, ema_rate="0.9,0.5", log_interval=2,
        save_interval=2, resume_checkpoint="", weight_decay=0.1, lr_anneal_steps=4,
    )  # fmt: skip
    return TrainLoop(model=model, diffusion=d or diffusion(), **{**kept, **options})


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_a_step_is_adamw_with_averages(microbatch: int, tmp_path: Path) -> None:
    """The same steps by torch's AdamW, one after the other; in float64, since Adam divides gradients by their size."""
    trained, d = small().double(), diffusion()
    np.random.seed(1)  # noqa: NPY002  # the generator of the original
    torch.manual_seed(3)
    loop(trained, d, data=batches(torch.float64), microbatch=microbatch).run_loop()

    model, data = small().double(), batches(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    averages = [[p.detach().clone() for p in model.parameters()] for _ in RATES]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(3)
    norms = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        optimizer.zero_grad()
        batch, _ = next(data)
        for micro in batch.split(microbatch if microbatch > 0 else 4):
            t, weights = create_named_schedule_sampler("uniform", d).sample(len(micro), "cpu")
            (d.training_losses(model, micro, t)["loss"] * weights).mean().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        optimizer.step()
        for averaged, rate in zip(averages, RATES, strict=True):
            for a, p in zip(averaged, model.parameters(), strict=True):
                a.lerp_(p.detach(), 1 - rate)
    for p, q in zip(trained.parameters(), model.parameters(), strict=True):
        assert_near_peer(p, q, 1e-9)
    for rate, averaged in zip(RATES, averages, strict=True):
        state = torch.load(tmp_path / f"ema_{rate}_000004.pt", weights_only=True)
        model.load_state_dict(state)
        for p, q in zip(model.parameters(), averaged, strict=True):
            assert_near_peer(p, q, 1e-9)
    rows = (tmp_path / "progress.csv").read_text().splitlines()
    found = dict(zip(rows[0].split(","), rows[2].split(","), strict=True))  # of steps 1 and 2
    assert float(found["grad_norm"]) == pytest.approx((norms[1] + norms[2]) / 2, rel=1e-4)
    assert found["step"] == "2"
    assert found["samples"] == "12"
    assert float(found["loss"]) == pytest.approx(float(found["mse"]) + float(found["vb"]), rel=1e-5)
    quarters = {name[-1] for name in found if name.startswith("vb_q")}
    assert {f"{name}_q{i}" for name in ("loss", "mse", "vb") for i in quarters} <= found.keys()
    assert len(quarters) > 1


def test_files_and_going_on(tmp_path: Path) -> None:
    """Stopped and resumed it comes to the weights of a run that was never stopped; torch's AdamW takes its state."""
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(3)
    whole = loop(small(), lr_anneal_steps=0, ema_rate=0.5)
    steps = [whole.run_step(*next(whole.data)) for whole.step in range(4)]
    assert len(steps) == 4

    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(3)
    data = batches()
    first = loop(small(), data=data, lr_anneal_steps=0, ema_rate=0.5)
    for first.step in range(2):
        first.run_step(*next(data))
    first.step = 2
    first.save()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["ema_0.5_000002.pt", "model000002.pt", "opt000002.pt", "progress.csv"]
    drawn = torch.get_rng_state()
    second = loop(
        UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True),
        data=data, lr_anneal_steps=0, ema_rate=0.5, resume_checkpoint=str(tmp_path / "model000002.pt"),
    )  # fmt: skip
    assert second.resume_step == 2
    torch.set_rng_state(drawn)
    for second.step in range(2):
        second.run_step(*next(data))
    pairs = [(whole.opt.parameters, second.opt.parameters), (whole.opt.ema, second.opt.ema)]
    pairs += [(whole.opt.exp_avg, second.opt.exp_avg), (whole.opt.exp_avg_sq, second.opt.exp_avg_sq)]
    for before, after in pairs:
        for name in before:
            assert torch.equal(before[name], after[name]), name

    state = torch.load(tmp_path / "opt000002.pt", weights_only=True)
    shapes = [value.shape for value in first.model.state_dict().values()]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=0.5)
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-2), 0.1)
    assert state["state"][0]["step"] == 2
    assert [state["state"][i]["exp_avg"].shape for i in range(len(shapes))] == shapes


def test_the_flat_state_of_half_precision_is_read(tmp_path: Path) -> None:
    first = loop(small(), lr_anneal_steps=2, ema_rate="0.5")
    first.run_loop()
    path = tmp_path / "opt000002.pt"
    state = torch.load(path, weights_only=True)["state"]
    flat = {key: torch.cat([value[key].flatten() for value in state.values()]) for key in ("exp_avg", "exp_avg_sq")}
    torch.save({"state": {0: {"step": torch.tensor(2.0), **flat}}, "param_groups": []}, path)
    again = loop(small(), resume_checkpoint=str(tmp_path / "model000002.pt"), ema_rate="0.5")
    for name, value in first.opt.exp_avg_sq.items():
        assert torch.equal(again.opt.exp_avg_sq[name], value)
    torch.save({"state": dict(enumerate([state[0], state[1]])), "param_groups": []}, path)
    with pytest.raises(ValueError, match=r"expected the state of .* tensors in .*opt000002.pt, got 2"):
        loop(small(), resume_checkpoint=str(tmp_path / "model000002.pt"), ema_rate="0.5")
    path.unlink()
    assert loop(small(), resume_checkpoint=str(tmp_path / "model000002.pt")).opt.step == 0  # says so, and goes on


def test_any_network_can_be_trained(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.layer = nn.Conv2d(3, 6, 1)
            self.labels: list[list[int]] = []

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.labels.append(y.tolist())
            out: Tensor = self.layer(x)
            return out

    data = ((images, {"y": torch.arange(4)}) for images, _ in batches())

    model = Plain()
    loop(model, data=data, microbatch=3, lr_anneal_steps=2).run_loop()
    assert model.labels == [[0, 1, 2], [3]] * 2
    state = torch.load(tmp_path / "opt000002.pt", weights_only=True)["state"]
    assert [state[i]["exp_avg"].shape for i in state] == [(6, 3, 1, 1), (6,)]
    loop(Plain(), data=data, resume_checkpoint=str(tmp_path / "model000002.pt"), lr_anneal_steps=4).run_loop()
    assert (tmp_path / "ema_0.5_000004.pt").exists()


def test_half_precision_finds_its_scale(tmp_path: Path) -> None:
    training = loop(small(), use_fp16=True, lr_anneal_steps=0)
    weights = [p.detach().clone() for p in training.model.parameters()]
    training.step = 1  # of which nothing is logged
    training._lg_loss_scale.fill_(200.0)  # far beyond float16
    training.run_step(*next(training.data))
    assert training.lg_loss_scale == 199
    assert all(torch.equal(p, w) for p, w in zip(training.model.parameters(), weights, strict=True))
    assert training.opt.step == 0
    assert training._norm.tolist() == [0, 0]  # it has no part in the mean that is logged
    training._lg_loss_scale.fill_(8.0)
    training.run_step(*next(training.data))
    assert training.lg_loss_scale == pytest.approx(8.001)
    assert training.opt.step == 1
    exact = loop(small())
    exact.step = 1
    training._norm.zero_()
    training.model.load_state_dict(small().state_dict())
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    training.run_step(*next(batches()))
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    exact.run_step(*next(batches()))
    assert training._norm[0].item() == pytest.approx(exact._norm[0].item(), rel=2e-2)  # not multiplied by the scale
    training._lg_loss_scale.fill_(-30.0)
    with pytest.raises(DivergenceError, match="whatever the loss scale"):
        training.save()


def test_training_that_diverges_stops(tmp_path: Path) -> None:
    training = loop(small(), data=itertools.repeat((torch.full(SIZE, torch.nan), {})))
    with pytest.raises(DivergenceError, match="expected finite gradients, got one that is not at or before step 0"):
        training.run_loop()
    assert [path.name for path in tmp_path.iterdir()] == ["progress.csv"]


def test_the_number_of_a_file() -> None:
    assert parse_resume_step_from_filename("a/model/model012345.pt") == 12345
    assert parse_resume_step_from_filename("a/ema_0.9999_012345.pt") == 0
    assert parse_resume_step_from_filename("a/modelbest.pt") == 0


def folder_of_images(folder: Path, count: int = 11) -> Path:
    """Of several sizes, modes and classes, in a sub-folder too."""
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    generator = np.random.default_rng(0)
    for i in range(count):
        height, width = 16 + 7 * i % 40, 16 + 11 * i % 50
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        path = folder / ("more" if i % 3 else ".") / f"c{i % 2}_{i}.{'PNG' if i % 4 else 'jpg'}"
        (image.convert("L") if i == 5 else image).save(path)
    return folder


def test_images_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "images")
    first = load_data(data_dir=str(folder), batch_size=4, image_size=8, class_cond=True, deterministic=True)
    images, cond = next(first)
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.2 < 0.2 < images.max() <= 1
    files = sorted(folder.glob("*.*"))[:1]
    assert cond["y"][0] == int(files[0].name[1])
    exact = np.zeros((8, 8, 3), dtype=np.uint8)
    exact[2, 3] = 255, 0, 128
    Image.fromarray(exact).save(tmp_path / "exact.png")
    values, labels = ImageDataset(8, [str(tmp_path / "exact.png")])[0]
    assert labels == {}
    assert values.shape == (3, 8, 8)
    assert values[:, 2, 3] == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-6)
    wide = np.concatenate([np.full((16, 16, 3), v, dtype=np.uint8) for v in (0, 100, 200)], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    values, _ = ImageDataset(8, [str(tmp_path / "wide.png")])[0]  # halved, then the middle of three
    assert values == pytest.approx(100 / 127.5 - 1, abs=1e-6)
    shards = [ImageDataset(8, list("abcdefg"), None, i, 3).local_images for i in range(3)]
    assert shards == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    with pytest.raises(ValueError, match="expected data_dir"):
        next(load_data(data_dir="", batch_size=1, image_size=8))
    with pytest.raises(ValueError, match=r"expected at least 12 images, a batch, in .*, got 11"):
        next(load_data(data_dir=str(folder), batch_size=12, image_size=8))


@needs_original
@pytest.mark.peer
@pytest.mark.parametrize("deterministic", [True, False])
def test_images_come_as_from_the_original(deterministic: bool, tmp_path: Path) -> None:
    folder, sides = folder_of_images(tmp_path / "images"), []
    for library in (original(), ours):
        torch.manual_seed(1)
        data = library.image_datasets.load_data(
            data_dir=str(folder), batch_size=4, image_size=8, class_cond=True, deterministic=deterministic
        )
        found = [next(data) for _ in range(7)]  # two of a pass, so three passes and more
        sides.append((found, torch.get_rng_state()))
    assert torch.equal(sides[0][1], sides[1][1])
    for (images, cond), (expected, labels) in zip(sides[1][0], sides[0][0], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(cond["y"], labels["y"])


@needs_original
@pytest.mark.peer
@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_training_agrees_with_the_original(sampler: str, tmp_path: Path) -> None:
    """Losses, moments and weights of six steps; then each goes on from the files of the other."""
    theirs = original()
    ours.dist_util.setup_dist()  # the original trains in a process group alone

    def train(library: Any, name: str, resume: str) -> Path:
        np.random.seed(4)  # noqa: NPY002
        torch.manual_seed(4)
        library.logger.configure(str(tmp_path / name), ["csv"])
        d = diffusion(library)
        options: dict[str, Any] = dict(
            model=small(library), diffusion=d, data=batches(), batch_size=4, microbatch=2, lr=1e-3,
            ema_rate="0.9,0.5", log_interval=2, save_interval=3, resume_checkpoint=resume, weight_decay=0.1,
            schedule_sampler=library.resample.create_named_schedule_sampler(sampler, d),
            lr_anneal_steps=8 if resume else 5,
        )  # fmt: skip
        library.train_util.TrainLoop(**options).run_loop()
        return tmp_path / name

    def compare(found: Path, expected: Path) -> None:
        names = sorted(path.name for path in expected.iterdir())
        assert sorted(path.name for path in found.iterdir()) == names
        for number in sorted({name[-9:-3] for name in names if name.endswith(".pt")}):
            sides = [torch.load(folder / f"opt{number}.pt", weights_only=True) for folder in (found, expected)]
            groups = [side["param_groups"][0] for side in sides]
            assert groups[0].pop("lr") == pytest.approx(groups[1].pop("lr"))
            assert groups[0] == groups[1]
            a, b = (side["state"] for side in sides)
            for i in b:
                assert a[i]["step"] == b[i]["step"]
                for key in ("exp_avg", "exp_avg_sq"):
                    assert_near_peer(a[i][key], b[i][key], 1e-5)
            for kind in ("model", "ema_0.9_", "ema_0.5_"):
                mine, told = (
                    torch.load(folder / f"{kind}{number}.pt", weights_only=True) for folder in (found, expected)
                )
                assert list(mine) == list(told)
                # Adam divides a gradient by its size: of the few that are all rounding, the step is, too
                weights, wanted = (torch.cat([v.flatten() for v in state.values()]) for state in (mine, told))
                sure = torch.cat([b[i]["exp_avg_sq"].flatten() for i in b]) > 1e-12
                assert sure.float().mean() > 0.9
                assert_near_peer((weights - wanted)[sure].norm() / wanted[sure].norm(), torch.zeros(()), 2e-5)
        tables = [np.genfromtxt(folder / "progress.csv", delimiter=",", names=True) for folder in (found, expected)]
        for column in tables[1].dtype.names:
            mine, told = (np.nan_to_num(np.atleast_1d(table[column])) for table in tables)
            assert mine == pytest.approx(told, rel=1e-3)

    first = [train(library, name, "") for library, name in ((ours, "ours"), (theirs, "theirs"))]
    compare(*first)
    second = [
        train(library, name, str(folder / "model000003.pt"))
        for library, name, folder in ((ours, "ours, on", first[1]), (theirs, "theirs, on", first[0]))
    ]
    compare(*second)


WORKER = """
import os, sys, torch, numpy as np, torch.distributed as dist
from fastddpm.compat.improved_diffusion import dist_util, logger, create_named_schedule_sampler
from tests.compat.improved_diffusion.test_training import small, diffusion, batches, loop
torch.set_num_threads(1)
dist_util.setup_dist(); dist_util.setup_dist()
rank = dist.get_rank()
logger.configure(sys.argv[1], [])
sampler = create_named_schedule_sampler("loss-second-moment", diffusion())
count = 2 - rank  # two of the first process, one of the second
sampler.update_with_local_losses(torch.arange(count) + 3 * rank, torch.arange(count) + 10.0 * rank)
assert sampler._loss_counts[:5].tolist() == [1, 1, 0, 1, 0], sampler._loss_counts
assert sampler._loss_history[[0, 1, 3], 0].tolist() == [0.0, 1.0, 10.0]
model = small()
torch.manual_seed(rank); np.random.seed(rank)
with torch.no_grad():
    next(model.parameters()).add_(rank)  # the values of the first process count
train = loop(model, lr_anneal_steps=2, microbatch=2)
assert train.global_batch == 8 and train.use_ddp
train.run_loop()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(both, weights)
assert torch.equal(*both)
dist.barrier()
os._exit(0)  # threads of gloo that still run at an exit abort it now and then
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def start(rank: int) -> subprocess.Popen[str]:
        environment = dict(
            os.environ, OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE="2", MASTER_PORT=port,
            PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1",
        )  # fmt: skip
        command = [sys.executable, "-c", WORKER, str(tmp_path / "run")]
        return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)

    processes = [start(0), start(1)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert (tmp_path / "run" / "model000002.pt").exists()


def test_the_scripts_run_as_they_are(tmp_path: Path) -> None:
    """What scripts of the original call, in their order: train, then sample, then evaluate."""
    from fastddpm.compat.improved_diffusion import dist_util

    folder = folder_of_images(tmp_path / "images", 6)
    flags = ours.model_and_diffusion_defaults()
    flags.update(
        image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, class_cond=True, diffusion_steps=30,
        attention_resolutions="8", noise_schedule="cosine",
    )  # fmt: skip
    dist_util.setup_dist()
    assert dist.get_world_size() == 1
    model, made = ours.create_model_and_diffusion(**flags)
    model.to(dist_util.dev())
    data = load_data(data_dir=str(folder), batch_size=4, image_size=32, class_cond=True)
    loop(
        model, made, data=data, schedule_sampler=create_named_schedule_sampler("loss-second-moment", made),
        lr_anneal_steps=2, ema_rate="0.9999",
    ).run_loop()  # fmt: skip

    path = str(tmp_path / "ema_0.9999_000002.pt")
    model, made = ours.create_model_and_diffusion(**dict(flags, timestep_respacing="ddim5"))
    model.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
    model.to(dist_util.dev()).eval()
    y = torch.randint(0, ours.script_util.NUM_CLASSES, (2,), device=dist_util.dev())
    for sample in (made.p_sample_loop, made.ddim_sample_loop):
        images = sample(model, (2, 3, 32, 32), clip_denoised=True, model_kwargs={"y": y})
        images = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        gathered = [torch.zeros_like(images)]
        dist.all_gather(gathered, images)
        assert gathered[0].shape == (2, 32, 32, 3)

    data = load_data(data_dir=str(folder), batch_size=1, image_size=32, class_cond=True, deterministic=True)
    images, cond = next(data)
    found = made.calc_bpd_loop(model, images, clip_denoised=True, model_kwargs=cond)
    dist.all_reduce(found["total_bpd"])
    assert 0 < found["total_bpd"].item() < 20
    dist.barrier()


def test_the_defaults_of_the_diffusion() -> None:
    d = create_gaussian_diffusion()
    assert d.num_timesteps == 1000
    assert d.model_var_type == ours.ModelVarType.FIXED_LARGE
    assert d.loss_type == ours.LossType.MSE
    assert not d.rescale_timesteps
    assert create_gaussian_diffusion(use_kl=True, rescale_learned_sigmas=True).loss_type == ours.LossType.RESCALED_KL
    assert create_gaussian_diffusion(sigma_small=True).model_var_type == ours.ModelVarType.FIXED_SMALL
    assert create_gaussian_diffusion(predict_xstart=True).model_mean_type == ours.ModelMeanType.START_X
