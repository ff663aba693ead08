"""The schedule samplers, the functions of nn, and the logger."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm.compat.improved_diffusion import LossAwareSampler, create_named_schedule_sampler, logger
from fastddpm.compat.improved_diffusion import nn as small
from fastddpm.compat.improved_diffusion.script_util import add_dict_to_argparser, args_to_dict, str2bool
from fastddpm.nn import sinusoidal_embedding
from fastddpm.weighting import LossSecondMoment
from tests.tolerance import assert_near_peer

DIFFUSION: Any = SimpleNamespace(num_timesteps=6)


@pytest.fixture(autouse=True)
def _no_logger() -> Iterator[None]:
    yield
    logger.reset()


def test_uniform_timesteps() -> None:
    sampler = create_named_schedule_sampler("uniform", DIFFUSION)
    np.random.seed(3)  # noqa: NPY002  # the generator of the original
    t, weights = sampler.sample(6000, "cpu")
    assert t.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert_near_peer(weights, torch.ones(6000), 1e-6)
    assert t.bincount().min() > 850  # 5 deviations below 1000
    np.random.seed(3)  # noqa: NPY002
    assert torch.equal(sampler.sample(6000, "cpu")[0], t)
    with pytest.raises(NotImplementedError, match="'uniform' or 'loss-second-moment', got 'x'"):
        create_named_schedule_sampler("x", DIFFUSION)


def test_the_second_moment_is_that_of_our_own_sampler() -> None:
    sampler: Any = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    ours = LossSecondMoment(6)
    for i in range(15):
        assert (sampler.weights() == 1).all() == (i < 10)
        t = torch.randperm(6)
        losses = torch.rand(6) * (1 + t)
        sampler.update_with_local_losses(t, losses.requires_grad_())
        ours.update(t, losses.detach())
    assert_near_peer(torch.from_numpy(sampler.weights()), ours.probabilities(), 1e-6)
    t, correction = sampler.sample(5, "cpu")
    assert_near_peer(correction.double(), 1 / (6 * ours.probabilities()[t]), 1e-6)


def test_a_sampler_of_ones_own_is_told_the_losses() -> None:
    class Told(LossAwareSampler):  # without __init__ of the base class, as in the original
        def __init__(self) -> None:
            self.told: list[Any] = []

        def weights(self) -> Any:
            return np.ones(4)

        def update_with_all_losses(self, ts: Any, losses: Any) -> None:
            self.told.append((ts, losses))

    sampler = Told()
    sampler.update_with_local_losses(torch.tensor([1, 3]), torch.tensor([0.5, 2.0]))
    sampler.sample(2, "cpu")
    assert sampler.told == [([1, 3], [0.5, 2.0])]
    # on a GPU losses are on their way to the host until timesteps are drawn again
    arrived: list[bool] = []
    event: Any = SimpleNamespace(synchronize=lambda: arrived.append(True))
    sampler._pending = [(torch.tensor([2]), torch.tensor([4.0]), event)]
    sampler.sample(2, "cpu")
    assert arrived
    assert sampler.told[1:] == [([2], [4.0])]
    sampler.sample(2, "cpu")
    assert len(sampler.told) == 2


def test_functions_of_nn() -> None:
    t = torch.tensor([0.0, 3.5, 999.0])
    for width in (8, 9):
        found = small.timestep_embedding(t, width)
        assert_near_peer(found, sinusoidal_embedding(t, width, "adm"), 1e-6)
    assert small.timestep_embedding(t, 4, max_period=100)[1, 1] == pytest.approx(np.cos(0.35), rel=1e-6)
    x = torch.randn(2, 64, 4, 4)
    assert small.normalization(64)(x.half()).dtype == torch.float16
    assert_near_peer(small.normalization(64)(x).detach(), nn.GroupNorm(32, 64)(x).detach(), 1e-6)
    assert isinstance(small.conv_nd(1, 2, 2, 3), nn.Conv1d)
    assert isinstance(small.avg_pool_nd(3, 2), nn.AvgPool3d)
    with pytest.raises(ValueError, match="expected dims to be 1, 2 or 3, got 4"):
        small.conv_nd(4, 2, 2, 3)
    layer = small.linear(3, 2)
    averaged = [p.detach().clone() for p in layer.parameters()]
    before = [p.clone() for p in averaged]
    small.scale_module(layer, 3.0)
    small.update_ema(averaged, layer.parameters(), rate=0.9)
    for a, b in zip(averaged, before, strict=True):
        assert_near_peer(a, 1.2 * b, 1e-6)
    assert not any(p.any() for p in small.zero_module(layer).parameters())
    assert_near_peer(small.mean_flat(x), x.mean(dim=(1, 2, 3)), 1e-6)
    y = x.clone().requires_grad_()
    small.checkpoint(torch.sin, (y,), (), True).sum().backward()
    assert_near_peer(y.grad, x.cos(), 1e-6)


def test_flags_of_a_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, dict(a=1, b=True, c=None, d="x", e=0.5))
    args = parser.parse_args(["--a", "3", "--b", "no", "--c", "word", "--e", "2"])
    assert args_to_dict(args, "abcde") == dict(a=3, b=False, c="word", d="x", e=2.0)
    assert str2bool(True)
    with pytest.raises(argparse.ArgumentTypeError, match="got 'perhaps'"):
        str2bool("perhaps")


def test_the_logger_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger.configure(str(tmp_path), ["stdout", "log", "csv", "json"])
    assert logger.get_dir() == str(tmp_path)
    logger.log("a", "line", 3)
    logger.debug("not this one")
    logger.logkv("loss", 1.0)
    logger.logkv_mean("mean", 1.0)
    logger.logkv_mean("mean", 2.0)
    assert logger.getkvs() == {"loss": 1.0, "mean": 1.5}
    assert logger.dumpkvs() == {"loss": 1.0, "mean": 1.5}
    logger.logkvs({"loss": np.float32(0.5), "with, a comma": torch.tensor(2.0)})
    logger.dumpkvs()
    assert logger.dumpkvs() == {}
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert rows == [
        {"loss": "1.0", "mean": "1.5", "with, a comma": ""},
        {"loss": "0.5", "mean": "", "with, a comma": "2.0"},
    ]
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"loss": 1.0, "mean": 1.5}, {"loss": 0.5, "with, a comma": 2.0}]
    text = (tmp_path / "log.txt").read_text()
    assert "a line 3\n" in text
    assert "not this one" not in text
    assert "| mean | 1.5      |" in text
    assert "| mean | 1.5      |" in capsys.readouterr().out


def test_the_logger_takes_its_places_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "here"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    logger.warn("the first line starts a logger")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["progress.csv"]
    with logger.scoped_configure(str(tmp_path / "there"), ["log"]):
        logger.error("elsewhere")
    assert logger.get_dir() == str(tmp_path / "here")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    logger.configure()
    assert (tmp_path / "here" / "log-rank002.txt").exists()


def test_the_logger_measures_time(tmp_path: Path) -> None:
    logger.configure(str(tmp_path), [])

    @logger.profile("work")
    def work(x: int) -> int:
        return x + 1

    assert work(2) == 3
    assert logger.getkvs()["wait_work"] >= 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: logger.configure(path, ["xml"]), ValueError, "got 'xml'"),
        (lambda path: logger.configure(path, comm=object()), NotImplementedError, "expected comm=None"),
    ],
)
def test_the_logger_refuses(call: Callable[[str], None], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        call(str(tmp_path))
