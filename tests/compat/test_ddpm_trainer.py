"""Trainer and Trainer1D of compat.denoising_diffusion_pytorch: files, going on, precision, FID, errors."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import data

from fastddpm.compat import denoising_diffusion_pytorch as compat
from fastddpm.compat.denoising_diffusion_pytorch import batches, processes
from fastddpm.compat.denoising_diffusion_pytorch import trainer as module
from fastddpm.compat.denoising_diffusion_pytorch.trainer import Dataset1D, Trainer, Trainer1D, grid
from fastddpm.training import DivergenceError
from tests.compat.original import FORM, digest, form, write_checkpoint
from tests.compat.toy_diffusion import SIZE, Toy, Toy1D, make_folder
from tests.tolerance import assert_equal_to_rounding, assert_within

COUNT = 103  # six batches of 16, and one of 7


@pytest.fixture(autouse=True)
def _on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(processes, "choose_device", lambda name: torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "root", COUNT)


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Any:
    """Makes trainers that write into one folder."""

    def make(model: nn.Module | None = None, **options: Any) -> Trainer:
        usual = dict(
            train_num_steps=10, save_and_sample_every=5, num_samples=4, calculate_fid=False,
            results_folder=tmp_path / "results", ema_update_every=2, train_lr=1e-2,
        )  # fmt: skip
        torch.manual_seed(0)
        return Trainer(model or Toy(), folder, **{**usual, **options})

    return make


def weights(trainer: Any) -> list[Tensor]:
    return [*trainer.model.state_dict().values(), *trainer.ema.state_dict().values()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# --- files ---


def test_training_writes_what_the_original_writes(make: Any, tmp_path: Path) -> None:
    trainer = make()
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.step == 10
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png"]
    contents = torch.load(tmp_path / "results" / "model-2.pt", weights_only=True)
    assert list(contents)[:6] == ["step", "model", "opt", "ema", "scaler", "version"]
    assert (contents["step"], contents["scaler"], contents["version"]) == (10, None, "2.3.4")
    assert list(contents["model"]) == list(start)
    assert not torch.equal(contents["model"]["net.0.weight"], start["net.0.weight"])
    assert [int(s["step"]) for s in contents["opt"]["state"].values()] == [10] * 4
    assert int(contents["ema"]["step"]) == 10
    with Image.open(tmp_path / "results" / "sample-2.png") as picture:
        assert (picture.size, picture.mode) == ((2 * (SIZE + 2) + 2,) * 2, "RGB")


def test_checkpoints_have_the_form_of_the_original_ones(folder: Path, tmp_path: Path) -> None:
    """Names, order, shapes and types of every entry; what the original writes is written down in FORM."""
    assert digest(form(write_checkpoint(compat, folder, tmp_path))) == FORM


def test_grid_is_that_of_torchvision() -> None:
    """Row by row, two black pixels between and around, values rounded."""
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(-1, 3, 2, 3) / 10 + 0.3
    pixels = np.array(grid(images, 2))
    assert pixels.shape == (3 * 4 + 2, 2 * 5 + 2, 3)
    for i in range(5):
        top, left = i // 2 * 4 + 2, i % 2 * 5 + 2
        assert (pixels[top : top + 2, left : left + 3] == math.floor((i / 10 + 0.3) * 255 + 0.5)).all()
        pixels[top : top + 2, left : left + 3] = 0
    assert not pixels.any()
    assert grid(images[:1], 1).size == (3, 2)  # alone, without a frame
    assert grid(images[:, :1], 2).mode == "RGB"
    assert grid(torch.ones(4, 4, 2, 2), 2).mode == "RGBA"
    assert np.asarray(grid(torch.tensor([-1.0, 2.0, float("nan")]).reshape(1, 1, 1, 3), 1))[0, :, 0].tolist() == [
        0, 255, 0,
    ]  # fmt: skip


def test_a_file_is_whole_or_as_it_was(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = make()
    trainer.save(1)
    before = (tmp_path / "results" / "model-1.pt").read_bytes()

    def half(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        trainer.save(1)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["model-1.pt"]
    assert (tmp_path / "results" / "model-1.pt").read_bytes() == before


def test_files_of_another_run_keep_their_contents(make: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    make().train()
    first = (results / "model-2.pt").read_bytes(), (results / "sample-2.png").read_bytes()
    make().train()
    assert ((results / "model-2.pt.1").read_bytes(), (results / "sample-2.png.1").read_bytes()) == first
    going_on = make()
    going_on.load(2)
    going_on.save(2)  # its own
    assert not (results / "model-2.pt.2").exists()


# --- going on ---


def test_going_on_gives_the_bits_of_one_run(make: Any, tmp_path: Path) -> None:
    """With torch's generator where it was. A batch that ends an epoch is among the steps."""
    whole = make()
    whole.train()
    first = make()
    first.train_num_steps = 5
    first.train()
    generator = torch.get_rng_state()
    second = make(Toy())
    second.load(1)
    assert second.step == 5
    torch.set_rng_state(generator)
    second.train()
    assert same(second, whole)
    assert not same(first, second)


def test_loading_a_checkpoint_without_our_state_starts_an_epoch(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    path = tmp_path / "results" / "model-2.pt"
    contents = torch.load(path, weights_only=True)
    del contents["fastddpm"]
    torch.save(contents, path)
    trainer.load(2)
    assert trainer.dl.state() is None
    assert trainer.step == 10


def test_learning_rate_is_that_of_the_checkpoint(make: Any) -> None:
    make().save(1)
    again = make(adam_betas=(0.5, 0.5))
    again.load(1)
    assert (again.opt.param_groups[0]["lr"], again.opt.param_groups[0]["betas"]) == (1e-2, (0.9, 0.99))


def test_errors_of_loading(make: Any, tmp_path: Path) -> None:
    trainer = make()
    with pytest.raises(FileNotFoundError, match=r"expected .*model-7.pt to load, got no such file; there are none"):
        trainer.load(7)
    trainer.save(3)
    with pytest.raises(FileNotFoundError, match=r"there are model-3\.pt"):
        trainer.load(7)
    other = make(Toy(channels=1))
    before = copy.deepcopy(weights(other))
    shapes = r"net\.0\.weight \[4, 3, 3, 3\] for \[4, 1, 3, 3\], net\.2\.weight .*; make them with"
    with pytest.raises(
        ValueError, match=rf"expected .*model-3.pt of a network and a diffusion like these, got {shapes}"
    ):
        other.load(3)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), before, strict=True))
    torch.save(Toy().state_dict(), tmp_path / "results" / "model-4.pt")
    torch.save(torch.zeros(2), tmp_path / "results" / "model-5.pt")
    for milestone in (4, 5):
        with pytest.raises(ValueError, match="with step, model, opt and ema, got none of step, model, opt, ema"):
            trainer.load(milestone)
    whole = (tmp_path / "results" / "model-3.pt").read_bytes()
    for milestone, contents in ((8, whole[: len(whole) // 2]), (9, b""), (10, pickle.dumps(Path("x"), protocol=2))):
        (tmp_path / "results" / f"model-{milestone}.pt").write_bytes(contents)
        with pytest.raises(
            ValueError, match=rf"expected .*model-{milestone}.pt to be a whole file of tensors and numbers"
        ):
            trainer.load(milestone)


# --- steps ---


def test_accumulated_batches_are_one(make: Any) -> None:
    """Two batches of 16 are one of 32, where the noise is the same."""

    class Plain(Toy):
        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.net(images)
            return (found - images).square().mean()

    torch.manual_seed(1)
    model = Plain()
    losses = []
    for size, number in ((32, 1), (16, 2)):
        trainer = make(
            copy.deepcopy(model), augment_horizontal_flip=False, train_batch_size=size,
            gradient_accumulate_every=number,
        )  # fmt: skip
        losses.append([float(trainer._train_step()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize(
    ("amp", "kind", "expected"), [(False, "bf16", None), (True, "bf16", torch.bfloat16), (True, "no", None)]
)
def test_mixed_precision(make: Any, amp: bool, kind: str, expected: torch.dtype | None) -> None:
    seen: list[Any] = []

    class Watched(Toy):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(self.net(images).dtype)
            return super().forward(images)

    trainer = make(Watched(), amp=amp, mixed_precision_type=kind)
    assert trainer._train_step().dtype == torch.float32
    assert seen == [expected or torch.float32]
    assert trainer.scaler is None
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_float16_on_a_cpu_is_float32_and_says_so(make: Any) -> None:
    with pytest.warns(
        UserWarning, match="computes in float32, since mixed_precision_type='fp16' is for GPUs"
    ) as caught:
        trainer = make(amp=True)
    assert [Path(w.filename).name for w in caught] == ["test_ddpm_trainer.py"]
    assert trainer.dtype is None
    assert math.isfinite(float(trainer._train_step()))


def test_state_of_the_loss_scale_is_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.scaler = module.LossScale(trainer.device)
    trainer._train_step()
    trainer.save(1)
    contents = torch.load(tmp_path / "results" / "model-1.pt", weights_only=True)
    assert contents["scaler"] == {
        "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 1,
    }  # fmt: skip
    again = make()
    again.scaler = module.LossScale(again.device)
    again.load(1)
    assert again.scaler.state_dict() == contents["scaler"]


def test_the_loss_scale_leaves_the_steps_as_they_are(make: Any) -> None:
    """A power of two goes through the gradients without rounding; in float32 nothing overflows."""
    plain, scaled = make(), make()
    scaled.scaler = module.LossScale(scaled.device)
    for trainer in (plain, scaled):
        torch.manual_seed(3)
        for _ in range(3):
            trainer._train_step()
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert_equal_to_rounding(a, b, 64, scale=b.detach().abs().max())


class Breaks(Toy):
    """Its loss is not a number in some of its calls."""

    def __init__(self, bad: range) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) * (float("nan") if self.calls - 1 in self.bad else 1.0)


def test_steps_that_are_not_finite_change_nothing_and_are_told_of(make: Any) -> None:
    trainer = make(Breaks(range(2, 4)))
    with pytest.warns(UserWarning, match="2 of the 5 steps before step 5 changed nothing"):
        trainer.train()
    assert all(w.isfinite().all() for w in weights(trainer))


def test_training_that_has_diverged_ends(make: Any, tmp_path: Path) -> None:
    trainer = make(Breaks(range(5, 100)))
    with pytest.raises(DivergenceError, match="NaN or Inf in each of the 5 steps before step 10"):
        trainer.train()
    assert not (tmp_path / "results" / "model-2.pt").exists()
    again = make(Breaks(range(3)))
    again.load(1)
    again.train_num_steps = 8
    again.train()
    with pytest.raises(DivergenceError, match="NaN or Inf in each of the 3 steps before step 8"):
        again.save("last")
    assert all(w.isfinite().all() for w in weights(trainer))


def test_a_loss_scale_that_is_too_large_is_no_divergence(make: Any, tmp_path: Path) -> None:
    trainer = make(Breaks(range(3)))
    trainer.scaler = module.LossScale(trainer.device)
    trainer._train_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save(1)
    trainer.scaler.scale.fill_(1.0)
    trainer._train_step()
    with pytest.raises(DivergenceError, match="in each of the 1 steps before step 2"):
        trainer.save(2)


def test_batches_of_a_user_take_the_place_of_ours(make: Any, tmp_path: Path) -> None:
    class Counts(Toy):
        seen: ClassVar[list[float]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append(float(images[0, 0, 0, 0]))
            return super().forward(images)

    trainer = make(Counts())
    trainer.dl = (torch.full((16, 3, SIZE, SIZE), i / 10) for i in range(10))
    trainer.train()
    assert Counts.seen == pytest.approx([i / 10 for i in range(10)])
    trainer.load(1)
    assert trainer.step == 5


def test_the_average_copies_then_averages(make: Any) -> None:
    trainer = make()
    trainer.ema.update_after_step = 3
    for step in range(5):
        trainer._train_step()
        online, average = trainer.model.net[0].weight, trainer.ema.ema_model.net[0].weight
        assert torch.equal(online, average) == (step in (0, 2)), step  # s = 4 averages


def test_samples_are_those_of_the_average(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    with torch.no_grad():
        trainer.ema.ema_model.net[2].weight.zero_()
        trainer.ema.ema_model.net[2].bias.fill_(100.0)
    trainer._milestone(9)
    with Image.open(tmp_path / "results" / "sample-9.png") as picture:
        assert np.asarray(picture)[2 : 2 + SIZE, 2 : 2 + SIZE].min() == 255


# --- FID ---


class Inception(nn.Module):
    """Stands for that of pytorch-fid: 64 features, random but fixed."""

    BLOCK_INDEX_BY_DIM: ClassVar = {64: 0, 192: 1, 768: 2, 2048: 3}

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        assert blocks == [0]
        self.register_buffer("mix", torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> list[Tensor]:
        assert x.shape[1] == 3
        assert not self.training
        assert ((x * 255).round() / 255 == x).all()  # 8 bits
        return [nn.functional.conv2d(x, self.mix)]


@pytest.fixture
def pytorch_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    score, inception = types.ModuleType("pytorch_fid.fid_score"), types.ModuleType("pytorch_fid.inception")
    score.calculate_frechet_distance = lambda m1, s1, m2, s2: (  # type: ignore[attr-defined]
        np.square(m1 - m2).sum()
        + np.trace(s1 + s2)
        - 2 * np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).sum().real
    )
    inception.InceptionV3 = Inception  # type: ignore[attr-defined]
    package = types.ModuleType("pytorch_fid")
    for name, part in (
        ("pytorch_fid", package),
        ("pytorch_fid.fid_score", score),
        ("pytorch_fid.inception", inception),
    ):
        monkeypatch.setitem(sys.modules, name, part)


FID_OPTIONS = dict(calculate_fid=True, inception_block_idx=64, num_fid_samples=200)


@pytest.fixture
def with_fid(make: Any) -> Any:
    return lambda *args, **options: make(*args, **{**FID_OPTIONS, **options})


def test_fid_takes_each_image_once_as_it_is(pytorch_fid: None, with_fid: Any, tmp_path: Path) -> None:
    trainer = with_fid()
    place = trainer.dl.state()
    score = trainer.fid_scorer.score()
    assert trainer.dl.state() == place  # no batch of the training is taken
    pixels = torch.from_numpy(np.stack([trainer.ds.resized(i) for i in range(COUNT)])).float() / 255
    mix = Inception([0]).mix
    in64, in32 = (nn.functional.conv2d(pixels.to(d), mix.to(d)).mean((2, 3)) for d in (torch.float64, torch.float32))
    with np.load(tmp_path / "results" / "dataset_stats.npz") as stats:
        assert_within(torch.from_numpy(stats["m2"]), in64.mean(0), in32.mean(0), "mean of the features")
        assert_within(torch.from_numpy(stats["s2"]), in64.T.cov(), in32.T.cov(), "their covariance")
    assert score > 0
    again = with_fid()
    again._pixels = None  # the statistics are read
    assert again.fid_scorer.score() > 0


def test_best_and_latest(pytorch_fid: None, with_fid: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = iter([3.0, 5.0, 4.0, 2.0])
    monkeypatch.setattr(module.FID, "score", lambda self: next(scores))
    trainer = with_fid(save_best_and_latest_only=True)
    trainer.train()
    results = tmp_path / "results"
    assert sorted(p.name for p in results.glob("model-*")) == ["model-best.pt", "model-latest.pt"]
    steps = {name: torch.load(results / f"model-{name}.pt", weights_only=True)["step"] for name in ("best", "latest")}
    assert steps == {"best": 5, "latest": 10}
    again = with_fid(save_best_and_latest_only=True)
    again.train_num_steps = 20
    again.load("latest")
    assert again.best_fid == 3.0
    again.train()  # 4.0, then 2.0
    steps = {name: torch.load(results / f"model-{name}.pt", weights_only=True)["step"] for name in ("best", "latest")}
    assert steps == {"best": 20, "latest": 20}
    assert sorted(p.name for p in results.glob("model-*")) == ["model-best.pt", "model-latest.pt"]


def test_without_pytorch_fid_it_warns_once_and_trains(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match=r"trains without calculate_fid.*pytorch_fid.*; pip install") as caught:
        trainer = make(calculate_fid=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert (tmp_path / "results" / "model-2.pt").exists()
    with pytest.raises(RuntimeError, match="expected pytorch-fid and its weights for save_best_and_latest_only"):
        make(calculate_fid=True, save_best_and_latest_only=True)


def test_long_sampling_for_fid_is_told_of(pytorch_fid: None, with_fid: Any) -> None:
    class Slow(Toy):
        is_ddim_sampling = False

    with pytest.warns(UserWarning, match="each FID samples 200 images with every timestep"):
        with_fid(Slow())


# --- errors ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_samples": 5}, "expected num_samples to be the square of a number, got 5; 4 is near"),
        ({"num_samples": 14}, "square of a number, got 14; 9 is near"),
        ({"train_batch_size": 8}, r"expected train_batch_size \* gradient_accumulate_every >= 16, got 8 \* 1"),
        ({"ema_update_every": 0}, "expected ema_update_every >= 1, got 0"),
        ({"save_and_sample_every": 0}, "expected save_and_sample_every >= 1, got 0"),
        ({"gradient_accumulate_every": 0}, "gradient_accumulate_every >= 16, got 16"),
        ({"max_grad_norm": 0.0}, "expected max_grad_norm > 0, got 0.0; None does not clip"),
        (
            {"amp": True, "mixed_precision_type": "fp8"},
            "expected mixed_precision_type to be one of no, fp16, bf16, got 'fp8'",
        ),
        ({"save_best_and_latest_only": True}, "expected calculate_fid=True with save_best_and_latest_only, got False"),
        (
            {"calculate_fid": True, "inception_block_idx": 5},
            "inception_block_idx to be one of 64, 192, 768, 2048, got 5",
        ),
    ],
)
def test_errors_of_arguments(folder: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"Trainer: .*{text}"):
        Trainer(Toy(), folder, **{"calculate_fid": False, "results_folder": tmp_path, **options})


def test_errors_of_images_and_models(folder: Path, tmp_path: Path) -> None:
    few = make_folder(tmp_path / "few", 99)
    with pytest.raises(ValueError, match=r"expected at least 100 images in .*few, got 99"):
        Trainer(Toy(), few, results_folder=tmp_path)
    with pytest.raises(
        TypeError, match=r"expected diffusion_model to be a module.*got Linear without channels, image_size"
    ):
        Trainer(nn.Linear(2, 2), folder, results_folder=tmp_path)
    with pytest.raises(ValueError, match="Trainer1D: expected a dataset that is not empty"):
        Trainer1D(Toy1D(), Dataset1D(torch.zeros(0, 2, 8)), results_folder=tmp_path)


def test_convert_image_to_follows_the_channels(folder: Path, tmp_path: Path) -> None:
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        trainer = Trainer(Toy(channels), folder, results_folder=tmp_path, calculate_fid=False)
        assert trainer.ds.convert_image_to == mode
        assert next(trainer.dl).shape == (16, channels, SIZE, SIZE)
    chosen = Trainer(Toy(1), folder, results_folder=tmp_path, calculate_fid=False, convert_image_to="1")
    assert set(next(chosen.dl).unique().tolist()) == {0.0, 1.0}


# --- one dimension ---


def test_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.rand(40, 2, 8)
    trainer = Trainer1D(
        Toy1D(), Dataset1D(rows), train_num_steps=4, save_and_sample_every=2, num_samples=9, results_folder=tmp_path,
        train_batch_size=8, train_lr=1e-2,
    )  # fmt: skip
    first = next(trainer.dl)
    assert all((rows == row).all((1, 2)).any() for row in first)
    trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png"]
    samples = torch.load(tmp_path / "sample-2.png", weights_only=True)
    assert samples.shape == (9, 2, 8)
    again = Trainer1D(Toy1D(), Dataset1D(rows), results_folder=tmp_path)
    again.load(2)
    assert same(trainer, again)


def test_sequences_of_any_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Squares(data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> Tensor:
            return torch.full((2, 8), float(i * i))

    monkeypatch.setattr(batches, "cpu_count", lambda: 1)
    trainer = Trainer1D(Toy1D(), Squares(), train_num_steps=2, results_folder=tmp_path)
    seen = torch.cat([next(trainer.dl), next(trainer.dl)])[:, 0, 0]
    assert sorted(seen.tolist()) == [float(i * i) for i in range(20)]
    trainer.train()
    trainer.save("last")
    trainer.load("last")
    assert trainer.step == 2


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["no", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(make: Any, kind: str) -> None:
    trainer = make(amp=True, mixed_precision_type=kind)
    shown = module._Shown(trainer.device)
    for _ in range(5):
        shown.put(trainer._train_step())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):  # over the end of an epoch
            shown.put(trainer._train_step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    shown.put(torch.tensor(2.0, device=trainer.device))
    torch.cuda.synchronize()
    shown.put(torch.tensor(3.0, device=trainer.device))
    assert shown.value == 2.0


@pytest.mark.gpu
def test_float16_finds_its_scale_on_a_gpu(make: Any, tmp_path: Path) -> None:
    trainer = make(amp=True)
    trainer.scaler.scale.fill_(2.0**40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train_num_steps = 60
        trainer.train()
    assert trainer.scaler.state_dict()["scale"] < 2.0**40
    assert all(w.isfinite().all() for w in weights(trainer))
