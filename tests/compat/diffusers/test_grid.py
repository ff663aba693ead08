"""Samplings by schedulers of every configuration agree with diffusers, step by step and as a whole."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compat.diffusers.cases import (
    NAMES,
    Party,
    Walk,
    exact,
    laid_out,
    mine,
    network,
    noise_of,
    outputs,
    peer,
    walks,
)
from tests.tolerance import assert_near_peer, assert_within

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
CHUNK = 20


def compare(walk: Walk) -> bool:
    """Each step from the state that the original is in, and, in float32, a sampling by itself. False for NaN there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native, ours = Party(walk, peer(walk), walk.dtype), Party(walk, mine(walk), walk.dtype)
        alone = Party(walk, mine(walk), walk.dtype)
        reference, reference_alone = (Party(walk, peer(walk), torch.float64) for _ in range(2))
    exact(reference.scheduler)
    exact(reference_alone.scheduler)
    steps = native.scheduler.timesteps
    assert torch.equal(ours.scheduler.timesteps, steps) and ours.scheduler.timesteps.dtype == steps.dtype
    x = laid_out(torch.randn(walk.shape, generator=torch.Generator().manual_seed(3)).to(walk.dtype), walk)
    own, true_own = x, x.double()
    for i, drawn in enumerate(outputs(walk, len(steps))):
        out = network(walk, drawn, x)
        theirs, mine_ = native.step(out, i, x), ours.step(out, i, x)
        with noise_of(walk.dtype):
            true = reference.step(out, i, x)
            true_own = reference_alone.step(network(walk, drawn, true_own), i, true_own).prev_sample
        assert list(mine_) == list(theirs)
        for key in theirs:
            if not (theirs[key].isfinite().all() and true[key].isfinite().all()):
                return False
            assert mine_[key].dtype == theirs[key].dtype
            close(mine_[key], true[key], theirs[key], f"{key} of step {i}, t = {int(steps[i])}, {walk}")
        own = alone.step(network(walk, drawn, own), i, own).prev_sample
        assert in_order(mine_.prev_sample) or not in_order(x)
        x = theirs.prev_sample
    if walk.dtype in (torch.float32, torch.float64) and is_near(x, true_own, 3e-5):
        assert_near_peer(own, x)  # elsewhere a sampling makes more of every rounding, and its steps must do
    for a, b in zip(states(native), states(ours), strict=True):
        assert torch.equal(a, b), f"another number of draws: {walk}"
    return True


def is_near(theirs: Tensor, true: Tensor, precision: float) -> bool:
    """Whether the original is near to its own result in float64."""
    return float((theirs.double() - true).abs().max()) <= precision * max(1.0, float(true.abs().max()))


def close(ours: Tensor, true: Tensor, theirs: Tensor, what: str) -> None:
    """In half precision within the rule, with the original itself as the plain way to compute it.

    In float32 to the precision of its tables, or, where it is itself farther than that from its own result in float64,
    within the rule, too.
    """
    if ours.dtype in (torch.bfloat16, torch.float16) or not is_near(theirs, true, 1e-5):
        assert_within(ours, true.double(), theirs.float(), what)
    else:
        assert_near_peer(ours, theirs, precision=3e-5)


def in_order(x: Tensor) -> bool:
    """Whether x is channels_last in memory."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def states(party: Party) -> list[Tensor]:
    """Of its generators."""
    if party.generator is None:
        return [party.state]
    one = party.generator if isinstance(party.generator, list) else [party.generator]
    return [generator.get_state() for generator in one]


def check(name: str, count: int, seed: int) -> None:
    drawn = walks(name, count, seed)
    finite = sum(compare(walk) for walk in drawn)
    assert finite >= 0.7 * count, f"the original gives NaN in {count - finite} of {count}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_any_configuration(name: str, seed: int) -> None:
    check(name, 40, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 85))
@pytest.mark.parametrize("name", NAMES)
def test_any_configuration_at_length(name: str, seed: int) -> None:
    check(name, 40, seed)


OF_THE_SOLVER: list[dict[str, Any]] = [
    # v and flow sigmas do not fit, so it matters which image the thresholds are taken of
    dict(algorithm_type="dpmsolver", prediction_type="v_prediction", use_flow_sigmas=True, thresholding=True),
    dict(algorithm_type="sde-dpmsolver", prediction_type="sample", thresholding=True, sample_max_value=2.0),
]


@pytest.mark.parametrize("case", range(len(OF_THE_SOLVER)))
def test_thresholds_of_a_solver_for_noise(case: int) -> None:
    walk = Walk("DPMSolverMultistepScheduler", dict(OF_THE_SOLVER[case], final_sigmas_type="sigma_min"), 8)
    assert compare(walk)


def test_a_sampling_that_begins_at_one_of_two_equal_timesteps_begins_at_the_second() -> None:
    walk = Walk("DPMSolverMultistepScheduler", {}, 5, timesteps=(900, 600, 600, 300, 0))
    native, ours = Party(walk, peer(walk), walk.dtype), Party(walk, mine(walk), walk.dtype)
    right = Party(walk, mine(walk, corrected=True), walk.dtype)
    out, x = torch.randn(2, *walk.shape).unbind()
    for party in (native, ours, right):
        party.scheduler.set_begin_index(None)
    theirs, result, _ = (party.step(out, 1, x).prev_sample for party in (native, ours, right))
    assert_near_peer(result, theirs)
    assert [party.scheduler.step_index for party in (native, ours, right)] == [3, 3, 2]


VARIANTS: list[dict[str, Any]] = [
    dict(), dict(timestep_spacing="trailing", variance_type="fixed_large"), dict(prediction_type="v_prediction"),
]  # fmt: skip


@pytest.mark.parametrize("config", VARIANTS)
def test_the_whole_chain(config: dict[str, Any]) -> None:
    """All 1000 steps, where errors of the tables add up: beta is that of the original, with its rounding."""
    walk = Walk("DDPMScheduler", config, 1000)
    native, ours = Party(walk, peer(walk), torch.float32), Party(walk, mine(walk), torch.float32)
    x = y = torch.randn(walk.shape)
    for i, drawn in enumerate(outputs(walk, 1000)):
        x = native.step(network(walk, drawn, x), i, x).prev_sample
        y = ours.step(network(walk, drawn, y), i, y).prev_sample
    assert_near_peer(y, x, precision=1e-5)


def test_before_set_timesteps_the_previous_timestep_is_one_less() -> None:
    walk = Walk("DDPMScheduler", {}, 1)
    native, ours = peer(walk), mine(walk)
    out, x = torch.randn(2, *walk.shape).unbind()
    for t in (999, 500, 1, 0):
        theirs = native.step(out, t, x, generator=torch.Generator().manual_seed(1))
        assert_near_peer(
            ours.step(out, t, x, generator=torch.Generator().manual_seed(1)).prev_sample, theirs.prev_sample
        )


def test_a_timestep_of_ddim_need_not_be_one_that_is_visited() -> None:
    walk = Walk("DDIMScheduler", {}, 10)
    native, ours = Party(walk, peer(walk), walk.dtype), Party(walk, mine(walk), walk.dtype)
    out, x = torch.randn(2, *walk.shape).unbind()
    for t in (999, 123, 50):
        theirs = native.scheduler.step(out, t, x).prev_sample
        assert_near_peer(ours.scheduler.step(out, t, x).prev_sample, theirs)


@pytest.mark.parametrize("begin", [0, 3, 8])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_sampling_may_begin_anywhere(order: int, begin: int) -> None:
    walk = Walk("DPMSolverMultistepScheduler", dict(solver_order=order), 10)
    native, ours = Party(walk, peer(walk), walk.dtype), Party(walk, mine(walk), walk.dtype)
    x = y = torch.randn(walk.shape)
    for party in (native, ours):
        party.scheduler.set_begin_index(begin if order == 2 else None)  # None: by the first timestep
    for i, drawn in list(enumerate(outputs(walk, 10)))[begin:]:
        x = native.step(network(walk, drawn, x), i, x).prev_sample
        y = ours.step(network(walk, drawn, y), i, y).prev_sample
        assert ours.scheduler.step_index == native.scheduler.step_index == i + 1
    assert_near_peer(y, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_dtypes_of_sample_and_output_may_differ(name: str, half: torch.dtype) -> None:
    """As under autocast: the result has the wider one."""
    walk = Walk(name, {}, 5)
    for of_out, of_x in ((half, torch.float32), (torch.float32, half)):
        parties = [Party(walk, scheduler, walk.dtype) for scheduler in (peer(walk), mine(walk), peer(walk))]
        native, ours, reference = parties
        out, x = torch.randn(walk.shape).to(of_out), torch.randn(walk.shape).to(of_x)
        t = native.scheduler.timesteps[0]
        theirs, result = (p.scheduler.step(out, t, x, generator=p.generator).prev_sample for p in (native, ours))
        assert result.dtype == theirs.dtype == torch.float32
        exact(reference.scheduler)
        with noise_of(of_out):
            true = reference.scheduler.step(out.double(), t, x.double(), generator=reference.generator).prev_sample
        assert_within(result, true.double(), theirs)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_may_be_given(name: str) -> None:
    config = dict(algorithm_type="sde-dpmsolver++") if name.startswith("DPM") else {}
    walk = Walk(name, config, 5, options={} if name.startswith("DPM") else dict(eta=1.0))
    native, ours = Party(walk, peer(walk), walk.dtype), Party(walk, mine(walk), walk.dtype)
    out, x, noise = torch.randn(3, *walk.shape).unbind()
    t = native.scheduler.timesteps[0]
    a, b = (p.scheduler.step(out, t, x, variance_noise=noise, **walk.options).prev_sample for p in (native, ours))
    assert_near_peer(b, a)


@pytest.mark.parametrize("name", NAMES)
def test_tables_made_in_inference_mode_serve_outside(name: str) -> None:
    walk = Walk(name, {}, 5, dtype=torch.float64)  # in float32 a table is copied anyway
    x = torch.randn(walk.shape, dtype=walk.dtype)
    party = Party(walk, mine(walk), walk.dtype)
    with torch.inference_mode():
        party.step(x, 0, x)
        party.scheduler.add_noise(x, x, torch.tensor([3, 4]))
    y = x.clone().requires_grad_()
    party.step(y, 1, x).prev_sample.sum().backward()
    party.scheduler.add_noise(y, x, torch.tensor([3, 4])).sum().backward()
    assert y.grad is not None and y.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_result_can_be_differentiated(name: str) -> None:
    walk = Walk(name, dict(prediction_type="v_prediction"), 5)
    gradients = []
    for scheduler in (peer(walk), mine(walk)):
        party = Party(walk, scheduler, walk.dtype)
        out, x = (t.requires_grad_() for t in torch.randn(2, *walk.shape, generator=torch.Generator().manual_seed(2)))
        y = party.step(network(walk, out, x), 1, party.step(out, 0, x).prev_sample).prev_sample
        gradients.append(torch.autograd.grad(y.square().sum(), (out, x)))
    for theirs, result in zip(*gradients, strict=True):
        assert_near_peer(result, theirs)
