"""Adam, the average and the loss scale of compat.denoising_diffusion_pytorch against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.compat.denoising_diffusion_pytorch.optimizer import EMA, Adam, lerp
from fastddpm.training.scale import LossScale
from tests.compat.toy_diffusion import Toy
from tests.tolerance import assert_equal_to_rounding

CPU = torch.device("cpu")
MAX_NORM = 0.2


def network() -> nn.Module:
    """With a channels_last weight, one that has no part in the loss, and one that needs no gradient."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    net.register_parameter("idle", nn.Parameter(torch.ones(3)))
    net.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))
    return net


def backward(net: nn.Module, step: int, scale: float | Tensor = 1.0) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=next(net.parameters()).dtype)
    (net(x).square().mean() * scale).backward()


def torch_step(opt: torch.optim.Adam, net: nn.Module) -> Tensor:
    """What a good user writes."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
    opt.step()
    opt.zero_grad()
    return norm


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.optim.Adam, nn.Module, Adam]:
    """The same network twice, with torch's optimiser and ours."""
    theirs = network().to(dtype)
    ours = copy.deepcopy(theirs)
    options = dict(lr=1e-2, betas=(0.9, 0.99))
    return theirs, torch.optim.Adam(theirs.parameters(), **options), ours, Adam(ours.parameters(), **options)  # type: ignore[arg-type]


def assert_same(ours: nn.Module, theirs: nn.Module, roundings: float = 64) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal_to_rounding(a, b, roundings, scale=b.detach().abs().max())


def test_steps_are_those_of_torch() -> None:
    theirs, their_opt, ours, our_opt = pair()
    average, expected = copy.deepcopy(ours), copy.deepcopy(theirs)
    for step in range(6):
        backward(theirs, step)
        backward(ours, step)
        norm = torch_step(their_opt, theirs)
        decay = (0.0, 0.9, 0.5)[step % 3]
        lerp(list(zip(expected.parameters(), theirs.parameters(), strict=True)), decay)
        found = our_opt.update(MAX_NORM, list(zip(average.parameters(), ours.parameters(), strict=True)), decay)
        assert_equal_to_rounding(found, norm, 64)
        assert all(p.grad is None for p in ours.parameters())
        assert norm > MAX_NORM or step > 0  # it clips at first
        assert_same(ours, theirs)
        assert_same(average, expected)


def test_one_pass_makes_the_step_and_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ours, opt = pair(torch.float32)
    calls: list[dict[str, Any]] = []
    adam_ema = ops.adam_ema
    monkeypatch.setattr(
        ops, "adam_ema", lambda *args, **options: (calls.append(options), adam_ema(*args, **options))[1]
    )
    average = copy.deepcopy(ours)
    backward(ours, 0)
    opt.update(MAX_NORM, list(zip(average.parameters(), ours.parameters(), strict=True)), 0.5)
    assert len(calls) == 1
    assert len(calls[0]["ema"]) == 4  # of two convolutions; idle and fixed have no gradient
    assert calls[0]["max_grad_norm"] == MAX_NORM


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_dicts_go_either_way(dtype: torch.dtype) -> None:
    """Also where the parameters need torch's own loop, as bfloat16 ones do."""
    theirs, their_opt, ours, our_opt = pair(dtype)
    for step in range(3):
        backward(theirs, step)
        backward(ours, step)
        torch_step(their_opt, theirs)
        our_opt.update(MAX_NORM)
    state, expected = our_opt.state_dict(), their_opt.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()  # neither has one for idle or fixed
    for i, entries in expected["state"].items():
        assert list(state["state"][i]) == list(entries)
        for name, value in entries.items():
            found = state["state"][i][name]
            assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
            assert_equal_to_rounding(found, value, 64, scale=value.abs().max())
    state, expected = copy.deepcopy(state), copy.deepcopy(expected)
    for value in expected["state"].values():
        value["exp_avg"] = value["exp_avg"].contiguous()  # as a network in NCHW leaves it
    their_opt.load_state_dict(state)
    our_opt.load_state_dict(expected)
    for step in range(3, 6):
        backward(theirs, step)
        backward(ours, step)
        torch_step(their_opt, theirs)
        our_opt.update(MAX_NORM)
    assert_same(ours, theirs)
    assert {int(s["step"]) for s in our_opt.state_dict()["state"].values()} == {6}


def test_own_steps_of_torch_may_come_between() -> None:
    theirs, their_opt, ours, our_opt = pair()
    for step in range(6):
        backward(theirs, step)
        backward(ours, step)
        torch_step(their_opt, theirs)
        if step % 2:
            our_opt.update(MAX_NORM)
        else:
            torch_step(our_opt, ours)
    assert_same(ours, theirs)


def test_a_parameter_that_joins_later_has_its_own_count() -> None:
    theirs, their_opt, ours, our_opt = pair()
    for step in range(6):
        for net in (theirs, ours):
            backward(net, step)
            if step >= 2:
                (net.idle.square().sum() / (step + 1)).backward()  # type: ignore[union-attr, operator]
        torch_step(their_opt, theirs)
        our_opt.update(MAX_NORM)
    assert_same(ours, theirs)
    counts = [int(s["step"]) for s in our_opt.state_dict()["state"].values()]
    assert sorted(set(counts)) == [4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    _, _, ours, opt = pair(dtype)
    backward(ours, 0)
    opt.update(MAX_NORM)
    before, average = copy.deepcopy(ours), copy.deepcopy(ours)
    backward(ours, 1, float("inf"))
    norm = opt.update(MAX_NORM, list(zip(average.parameters(), ours.parameters(), strict=True)), 0.5)
    assert not norm.isfinite()
    for a, b, c in zip(ours.parameters(), before.parameters(), average.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


# --- loss scale ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_scale_is_that_of_torch(dtype: torch.dtype) -> None:
    """Over losses of which some overflow: the same scales, weights and state as torch.amp.GradScaler."""
    theirs, their_opt, ours, our_opt = pair(dtype)
    scaler, scale = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(CPU)
    scale.load_state_dict({**scale.state_dict(), "growth_interval": 3})
    for step in range(12):
        factor = float("inf") if step in (0, 1, 6) else 1.0
        backward(theirs, step, scaler.scale(torch.tensor(factor)))
        backward(ours, step, factor * scale.scale)
        scaler.unscale_(their_opt)
        nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        scaler.step(their_opt)
        scaler.update()
        their_opt.zero_grad()
        our_opt.update(MAX_NORM, scale=scale)
        assert scale.state_dict() == scaler.state_dict(), step
        assert_same(ours, theirs, 200 if dtype == torch.float32 else 8)
    assert scale.state_dict()["scale"] != 65536
    again = LossScale(CPU)
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()


def test_averages_are_taken_though_a_scaled_step_is_left_out() -> None:
    _, _, ours, opt = pair()
    average, start = copy.deepcopy(ours), copy.deepcopy(ours)
    backward(ours, 0)
    opt.update(None)
    backward(ours, 1, float("inf"))
    opt.update(None, list(zip(average.parameters(), ours.parameters(), strict=True)), 0.25, LossScale(CPU))
    for a, p, s in zip(average.parameters(), ours.parameters(), start.parameters(), strict=True):
        assert_equal_to_rounding(a, 0.25 * s + 0.75 * p)


# --- the average ---


def test_decays_of_the_average() -> None:
    """A copy at multiples of 10 up to 100; then (1 + n)^(-2/3) of the weights, n = 10, 20, ..., at least 1/10."""
    ema = EMA(Toy(), beta=0.9, update_every=10)
    found = []
    for _ in range(161):
        found.append(ema.next_decay())
        ema.update()
    assert all(decay is None for s, decay in enumerate(found) if s % 10)
    assert found[0:101:10] == [0.0] * 11
    for s, decay in zip(range(110, 161, 10), found[110::10], strict=True):
        assert decay is not None
        weight = {110: 11 ** (-2 / 3), 120: 21 ** (-2 / 3), 130: 31 ** (-2 / 3)}.get(s, 0.1)
        assert_equal_to_rounding(1 - decay, max(0.1, weight), 16)
    assert int(ema.step) == 161
    assert bool(ema.initted)


def test_the_average_follows_weights_and_buffers() -> None:
    model = Toy()
    ema = EMA(model, beta=0.5, update_every=1, update_after_step=2)
    weight, average = model.net[0].bias, ema.ema_model.net[0].bias  # type: ignore[union-attr, index]
    for value, expected in ((1.0, 1.0), (2.0, 2.0), (3.0, 3.0)):
        weight.data.fill_(value)  # type: ignore[union-attr]
        model.level.fill_(value)
        ema.update()
        assert average.tolist() == [expected] * 4  # type: ignore[union-attr]
    weight.data.fill_(7.0)  # type: ignore[union-attr]
    model.level.fill_(7.0)
    ema.update()  # s = 3: 1 - 2^(-2/3) = 0.370 of the old ones
    expected_now = 3 + 4 * 2 ** (-2 / 3)
    assert_equal_to_rounding(average.mean(), expected_now, 16)  # type: ignore[union-attr]
    assert_equal_to_rounding(ema.ema_model.level, expected_now, 16)  # type: ignore[arg-type]
    frozen = EMA(model, beta=1.0, update_every=1, update_after_step=-1)
    assert frozen.next_decay() is None


def test_state_of_the_average() -> None:
    ema = EMA(Toy())
    names = {*(f"online_model.{n}" for n in Toy().state_dict()), *(f"ema_model.{n}" for n in Toy().state_dict())}
    assert set(ema.state_dict()) == names | {"initted", "step"}
    assert (ema.initted.dtype, ema.step.dtype, ema.step.shape) == (torch.bool, torch.int64, ())
    ema.update()
    again = EMA(Toy(), update_every=10)
    older = {k: v.reshape(1) if k in ("initted", "step") else v for k, v in ema.state_dict().items()}
    again.load_state_dict(older)
    assert again.next_decay() is None  # its update 1, not its first
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
