"""Trainer and Trainer1D of compat.denoising_diffusion_pytorch beside the original ones."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastddpm.compat import denoising_diffusion_pytorch as compat
from fastddpm.compat.denoising_diffusion_pytorch import batches, processes
from fastddpm.compat.denoising_diffusion_pytorch.optimizer import EMA
from tests.compat.original import FORM, digest, form, original, write_checkpoint
from tests.compat.toy_diffusion import make_folder
from tests.tolerance import assert_equal_to_rounding, assert_near_peer

pytestmark = pytest.mark.peer
WORKERS = 2
COUNT = 103  # six batches of 16, and one of 7
OPTIONS: dict[str, Any] = dict(num_samples=4, ema_update_every=2, train_lr=1e-3, save_and_sample_every=9)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The package with two workers, since flips depend on their number; accelerate as in a new process, on a CPU."""
    package = original()
    for name in (
        f"{package.__name__}.denoising_diffusion_pytorch",
        f"{package.__name__}.denoising_diffusion_pytorch_1d",
    ):
        monkeypatch.setattr(f"{name}.cpu_count", lambda: WORKERS)
        monkeypatch.setattr(f"{name}.tqdm", tqdm)  # which tests of networks take away
    monkeypatch.setattr(batches, "cpu_count", lambda: WORKERS)
    monkeypatch.setattr(processes, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    return package


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "root", COUNT)


def diffusion(library: Any, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    network = library.Unet(dim=8, dim_mults=(1, 2))
    return library.GaussianDiffusion(network, **{**dict(image_size=8, timesteps=20, sampling_timesteps=2), **options})


def diffusion_1d(library: Any) -> nn.Module:
    torch.manual_seed(1)
    network = library.Unet1D(dim=8, dim_mults=(1, 2), channels=2)
    return library.GaussianDiffusion1D(network, seq_length=8, timesteps=20, sampling_timesteps=2, objective="pred_v")


def alike(peer: Any, make: Any) -> tuple[nn.Module, nn.Module]:
    """Theirs, and ours with its weights."""
    theirs, ours = make(peer), make(compat)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def average_soon(*trainers: Any) -> None:
    """Let the average be one from step 4 on, where it would be a copy for 100 steps."""
    for trainer in trainers:
        trainer.ema.update_after_step = 3


def losses_of(trainer: Any) -> list[float]:
    """What the bar shows while it trains."""
    shown: list[float] = []

    class Bar(tqdm):
        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            shown.append(float(str(desc).split()[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(trainer).__module__}.tqdm", Bar)
        torch.manual_seed(5)
        trainer.train()
    return shown


def assert_same_training(ours: Any, theirs: Any, precision: float | None = None) -> None:
    """Weights, average and moments, but for rounding; or to a precision, where rounding to bfloat16 tips over."""
    pairs = [(ours.ema.state_dict()[k], v, k) for k, v in theirs.ema.state_dict().items()]
    assert ours.ema.state_dict().keys() == theirs.ema.state_dict().keys()
    found, expected = ours.opt.state_dict(), theirs.opt.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    pairs += [(found["state"][i][k], v, k) for i, s in expected["state"].items() for k, v in s.items()]
    for a, b, name in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if not b.is_floating_point():
            assert torch.equal(a, b), name
        elif precision is not None:
            assert_near_peer(a, b, precision)
        else:
            assert_equal_to_rounding(a, b, 2000, scale=b.abs().max())


def test_signatures(peer: Any) -> None:
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

    for name, theirs in (
        ("Trainer", peer.Trainer), ("Trainer1D", peer.Trainer1D), ("Dataset1D", peer.Dataset1D),
        ("Dataset", module.Dataset),
    ):  # fmt: skip
        ours = inspect.signature(getattr(compat, name)).parameters
        expected = inspect.signature(theirs).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ], name


@pytest.mark.parametrize("size", [(8, 8), (5, 11), 6, 9])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_images_are_the_same(peer: Any, tmp_path: Path, size: Any, mode: str) -> None:
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

    folder = make_folder(tmp_path / "images", 12, mode)
    sets = [
        d(folder, size, augment_horizontal_flip=True, convert_image_to=mode) for d in (module.Dataset, compat.Dataset)
    ]
    assert sets[0].paths == sets[1].paths
    found = []
    for dataset in sets:
        torch.manual_seed(2)
        found.append([dataset[i] for i in range(12)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("accumulate", "amp"), [(1, False), (2, False), (1, True)])
def test_one_seed_gives_one_training(peer: Any, folder: Path, tmp_path: Path, accumulate: int, amp: bool) -> None:
    """Their diffusion in both trainers, for more than two epochs with milestones: the same bits but for rounding."""
    model = diffusion(peer)
    runs = []
    for trainer, name in ((peer.Trainer, "theirs"), (compat.Trainer, "ours")):
        torch.manual_seed(7)
        runs.append(
            trainer(copy.deepcopy(model), folder, train_num_steps=20, calculate_fid=False,
                    gradient_accumulate_every=accumulate, amp=amp, mixed_precision_type="bf16",
                    results_folder=tmp_path / name, **OPTIONS)
        )  # fmt: skip
    average_soon(*runs)
    expected, found = (losses_of(run) for run in runs)
    assert found == pytest.approx(expected, abs=1.5e-4)  # of four digits
    assert_same_training(runs[1], runs[0], 1e-3 if amp else None)
    for name in ("sample-1.png", "sample-2.png"):
        ours, theirs = ((tmp_path / who / name).read_bytes() for who in ("ours", "theirs"))
        assert pixels(ours) == pytest.approx(pixels(theirs), abs=1)


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_our_networks_train_as_theirs(peer: Any, folder: Path, tmp_path: Path) -> None:
    theirs, ours = alike(peer, diffusion)
    runs = [
        trainer(model, folder, train_num_steps=9, calculate_fid=False, results_folder=tmp_path / name, **OPTIONS)
        for trainer, model, name in ((peer.Trainer, theirs, "theirs"), (compat.Trainer, ours, "ours"))
    ]
    average_soon(*runs)
    expected, found = (losses_of(run) for run in runs)
    assert found == pytest.approx(expected, abs=3e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near_peer(a.detach(), b.detach(), 1e-3)


def test_sequences_train_as_theirs(peer: Any, tmp_path: Path) -> None:
    theirs, ours = alike(peer, diffusion_1d)
    rows = torch.rand(40, 2, 8)
    runs = [
        library.Trainer1D(model, library.Dataset1D(rows), train_num_steps=9, results_folder=tmp_path / name, **OPTIONS)
        for library, model, name in ((peer, theirs, "theirs"), (compat, ours, "ours"))
    ]
    average_soon(*runs)
    expected, found = (losses_of(run) for run in runs)
    assert found == pytest.approx(expected, abs=3e-4)
    samples = [torch.load(tmp_path / who / "sample-1.png", weights_only=True) for who in ("ours", "theirs")]
    assert_near_peer(samples[0], samples[1], 1e-2)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_checkpoints_go_either_way(peer: Any, folder: Path, tmp_path: Path, kind: str) -> None:
    """Each trainer loads what the other wrote, then both make the same steps."""
    data = folder if kind == "images" else torch.rand(40, 2, 8)
    theirs, ours = alike(peer, diffusion if kind == "images" else diffusion_1d)
    classes = [peer.Trainer, compat.Trainer] if kind == "images" else [peer.Trainer1D, compat.Trainer1D]
    options = dict(OPTIONS, train_num_steps=3, save_and_sample_every=3, results_folder=tmp_path)
    if kind == "images":
        options["calculate_fid"] = False
    first = classes[0](theirs, data, **options)
    average_soon(first)
    losses_of(first)  # theirs writes model-1.pt
    middle = classes[1](ours, data, **options)
    average_soon(middle)
    middle.load(1)
    assert_same_training(middle, first)
    middle.train_num_steps = 6
    losses_of(middle)  # ours goes on, and writes model-2.pt
    last = classes[0](copy.deepcopy(theirs), data, **options)
    average_soon(last)
    last.load(2)
    assert last.step == 6
    assert_same_training(middle, last)
    names = [set(torch.load(tmp_path / f"model-{n}.pt", weights_only=True)) for n in (1, 2)]
    assert names[0] == names[1] - {"fastddpm"}


def test_form_of_the_checkpoints_is_the_one_written_down(peer: Any, folder: Path, tmp_path: Path) -> None:
    lines = form(write_checkpoint(peer, folder, tmp_path / "theirs"))
    assert form(write_checkpoint(compat, folder, tmp_path / "ours")) == lines
    assert digest(lines) == FORM


def test_the_average_is_that_of_ema_pytorch(peer: Any) -> None:
    from ema_pytorch import EMA as Theirs

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.register_buffer("level", torch.zeros(2))
    for options in (
        dict(beta=0.9, update_every=10),
        dict(beta=0.995, update_every=1, update_after_step=5, min_value=0.2),
    ):
        theirs, ours = Theirs(model, **options), EMA(model, **options)  # type: ignore[arg-type]
        for _ in range(170):
            for x in (*model.parameters(), model.level):
                x.data.add_(torch.randn(x.shape))  # type: ignore[operator, union-attr]
            theirs.update()
            ours.update()
            for a, b in zip(ours.ema_model.state_dict().values(), theirs.ema_model.state_dict().values(), strict=True):
                assert_equal_to_rounding(a, b, 64, scale=b.abs().max())
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())


def test_grids_are_those_of_torchvision(peer: Any, tmp_path: Path) -> None:
    from torchvision.utils import save_image

    from fastddpm.compat.denoising_diffusion_pytorch.trainer import grid

    for count, channels in ((4, 3), (9, 1), (1, 3), (4, 4)):
        images: Tensor = torch.rand(count, channels, 5, 7) * 1.2 - 0.1
        columns = round(count**0.5)
        save_image(images, tmp_path / "theirs.png", nrow=columns)
        grid(images, columns).save(tmp_path / "ours.png")
        assert (pixels((tmp_path / "theirs.png").read_bytes()) == pixels((tmp_path / "ours.png").read_bytes())).all()
