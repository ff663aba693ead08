"""Learning rate, moving average, and the update of all parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastddpm.training import TrainConfig
from fastddpm.training.config import DECAYS
from fastddpm.training.ema import halflife_decay, warmed_decay, weights_of
from fastddpm.training.optimizer import AdamEMA, learning_rate
from tests.tolerance import assert_equal_to_rounding


def test_learning_rate_rises_linearly_then_stays() -> None:
    c = TrainConfig(learning_rate=1e-3, warmup_images=1000, num_images=5000)
    for images, share in ((1, 0.001), (250, 0.25), (999, 0.999), (1000, 1), (4000, 1), (9000, 1)):
        assert_equal_to_rounding(learning_rate(images, c), 1e-3 * share)


@pytest.mark.parametrize("lr_decay", DECAYS)
def test_learning_rate_with_the_warm_up_of_a_run_that_was_made_shorter(lr_decay: str) -> None:
    c = TrainConfig(learning_rate=1e-3, num_images=500, lr_decay=lr_decay)
    assert_equal_to_rounding(learning_rate(100, c, warmup=1000), 1e-4)
    assert_equal_to_rounding(learning_rate(1000, c, warmup=1000), 1e-3)
    assert_equal_to_rounding(learning_rate(25, c), 5e-4)


def test_learning_rate_decays_by_a_line_or_a_cosine_to_its_end() -> None:
    c = TrainConfig(
        learning_rate=1e-3, warmup_images=1000, num_images=5000, final_learning_rate=1e-4, lr_decay="linear"
    )
    for images, value in ((1000, 1e-3), (3000, 5.5e-4), (5000, 1e-4), (6000, 1e-4)):
        assert_equal_to_rounding(learning_rate(images, c), value)
    c = TrainConfig(
        learning_rate=1e-3, warmup_images=1000, num_images=5000, final_learning_rate=1e-4, lr_decay="cosine"
    )
    for images, value in ((1000, 1e-3), (3000, 5.5e-4), (5000, 1e-4), (2000, 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2)):
        assert_equal_to_rounding(learning_rate(images, c), value)


def test_half_life_counts_images() -> None:
    assert_equal_to_rounding(halflife_decay(128_000, 128) ** 1000, 0.5, ulps=2000)
    assert halflife_decay(10, 10) == 0.5
    with pytest.raises(ValueError, match="expected halflife_images > 0 and batch_size >= 1, got 0 and 1"):
        halflife_decay(0, 1)


def test_decay_is_small_at_first() -> None:
    assert [warmed_decay(0.9, s) for s in (0, 8, 89)] == [0.1, 0.5, 0.9]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(2, 1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.unused = nn.Parameter(torch.tensor([7.0]))


def test_average_of_the_weights_is_that_of_its_equation() -> None:
    model = _Two()
    optimizer = AdamEMA(model)
    assert list(optimizer.parameters) == ["a", "b", "unused"]
    optimizer.learning_rate.fill_(0.1)
    average = [model.a.detach().double()]
    for decay in (0.1, 0.5, 0.9):
        optimizer.ema_decay.fill_(decay)
        loss = model.a.square().sum() + model.b.sum()
        loss.backward()
        optimizer.update(loss.detach())
        average.append(decay * average[-1] + (1 - decay) * model.a.detach().double())
    assert_equal_to_rounding(optimizer.ema["a"], average[-1])
    assert int(optimizer.step) == 3
    assert model.a.grad is None
    assert model.unused.item() == 7.0, "a parameter without a gradient stays"


def test_update_is_that_of_torch_adam_after_clipping() -> None:
    model, theirs = _Two(), _Two()
    optimizer = AdamEMA(model, betas=(0.8, 0.99), eps=1e-6, max_grad_norm=1.0)
    adam = torch.optim.Adam([theirs.a, theirs.b], lr=0.01, betas=(0.8, 0.99), eps=1e-6)
    optimizer.learning_rate.fill_(0.01)
    for _ in range(5):
        for m in (model, theirs):
            (m.a.pow(3).sum() + m.b.square().sum() * 5).backward()
        expected = torch.nn.utils.clip_grad_norm_([theirs.a, theirs.b], 1.0)
        norm = optimizer.update(torch.zeros(()))
        assert_equal_to_rounding(norm, expected)
        adam.step()
        adam.zero_grad()
    assert_equal_to_rounding(model.a, theirs.a, ulps=32)
    assert_equal_to_rounding(model.b, theirs.b, ulps=32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_changes_any_more_after_a_value_that_is_not_finite(bad: float, where: str) -> None:
    model = _Two()
    optimizer = AdamEMA(model)
    optimizer.learning_rate.fill_(0.1)

    def step(loss: float, gradient: float) -> None:
        model.a.grad = torch.tensor([1.0, gradient])
        optimizer.update(torch.tensor(loss))

    step(1.0, 1.0)
    before = [t.clone() for group in (optimizer.parameters, *optimizer.groups().values()) for t in group.values()]
    step(bad if where == "loss" else 1.0, bad if where == "gradient" else 1.0)
    step(1.0, 1.0)
    after = [t for group in (optimizer.parameters, *optimizer.groups().values()) for t in group.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert int(optimizer.skipped) == 2


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with parameters that need a gradient, got none"):
        AdamEMA(nn.Identity())


def test_weights_are_swapped_in_without_a_copy_and_restored_after_an_error() -> None:
    model = _Two()
    own, other = model.a.data_ptr(), torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="inside"), weights_of(model, {"a": other}):
        assert model.a.data_ptr() == other.data_ptr()
        raise RuntimeError("inside")
    assert model.a.data_ptr() == own and model.a.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "weights", [{"c": torch.ones(2)}, {"a": torch.ones(3)}, {"a": torch.ones(2, dtype=torch.float64)}]
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, torch.Tensor]) -> None:
    with (
        pytest.raises(ValueError, match=r"weights_of: expected weights that fit the model, got [ca]"),
        weights_of(_Two(), weights),
    ):
        pass
