"""diffusers' schedulers step by step, and published constants. Its tables are float32: agreement to 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.ops.solver_step import solver_step
from fastddpm.sampling import ddim_table, ddpm_table, sample_loop, timesteps
from fastddpm.schedule import Schedule, make_schedule
from tests.tolerance import assert_near_peer

pytestmark = pytest.mark.peer

KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("cosine", 1000)
SHAPE = (2, 3, 8, 8)


def peer(name: str, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(num_train_timesteps=1000, **config)


def walk(schedule: Schedule, steps: Tensor, kind: str, update: Callable[[int, int, Tensor, Tensor], None]) -> None:
    """States and outputs as a network meets them that knows the image, with errors of 10%."""
    torch.manual_seed(2)
    x0 = torch.rand(SHAPE, dtype=torch.float64) * 2.4 - 1.2  # beyond the clip, here and there
    for i, t in enumerate(steps.tolist()):
        signal, sigma = schedule.signal_sigma[t]
        eps, wrong = torch.randn(2, *SHAPE, dtype=torch.float64)
        out = {"eps": eps, "x0": x0, "v": signal * eps - sigma * x0}[kind] + 0.1 * wrong
        update(i, t, signal * x0 + sigma * eps, out)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_lists_of_timesteps(spacing: str) -> None:
    for num_steps in (2, 7, 10, 20, 25, 50, 100, 250, 333, 999, 1000):
        scheduler = peer("DDPMScheduler", timestep_spacing=spacing)
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps[:num_steps]  # trailing: their list of floats may hold one more
        assert timesteps(1000, num_steps, spacing).tolist() == theirs.tolist()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_steps", "spacing"), [(50, "leading"), (50, "trailing"), (50, "linspace"), (1000, "trailing")]
)
def test_ddpm(num_steps: int, spacing: str, kind: str, variance: str, schedule: Schedule) -> None:
    scheduler = peer(
        "DDPMScheduler",
        prediction_type=kind,
        variance_type=variance,
        timestep_spacing=spacing,
        beta_schedule="linear" if schedule is LINEAR else "squaredcos_cap_v2",
    )
    scheduler.set_timesteps(num_steps)
    steps = timesteps(1000, num_steps, spacing)
    table = ddpm_table(schedule, steps, KINDS[kind], variance)

    def update(i: int, t: int, x: Tensor, out: Tensor) -> None:
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        ours, pred = solver_step(x, out, table, i, clamp=1.0, noise=z)
        theirs = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(i))
        assert_near_peer(pred, theirs.pred_original_sample)
        if i + 1 < num_steps:
            assert_near_peer(ours, theirs.prev_sample)
        else:  # theirs adds noise here where the variance is large and the last t is not 0; the paper does not
            assert torch.equal(ours, pred)
            if variance == "fixed_small" or t == 0:
                assert_near_peer(ours, theirs.prev_sample)

    walk(schedule, steps, KINDS[kind], update)


@pytest.mark.parametrize("use_clipped", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [20, 50])
def test_ddim(num_steps: int, kind: str, eta: float, use_clipped: bool) -> None:
    """Leading alone: elsewhere their previous timestep, t - T // N, is not the one that is visited next."""
    scheduler = peer("DDIMScheduler", prediction_type=kind, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(num_steps)
    steps = timesteps(1000, num_steps, "leading")
    table = ddim_table(LINEAR, steps, KINDS[kind], eta, use_clipped=use_clipped)

    def update(i: int, t: int, x: Tensor, out: Tensor) -> None:
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        ours, pred = solver_step(x, out, table, i, clamp=1.0, noise=z)
        options = {"eta": eta, "use_clipped_model_output": use_clipped, "variance_noise": z}
        theirs = scheduler.step(out, t, x, **options)
        assert_near_peer(pred, theirs.pred_original_sample)
        assert_near_peer(ours, theirs.prev_sample)

    walk(LINEAR, steps, KINDS[kind], update)


def test_a_whole_run_of_ddim() -> None:
    """The loop in float32 beside their loop, with a network that both call."""

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return 0.9 * x + 0.1 * torch.tanh(x + t.reshape(-1, 1, 1, 1) / 500)

    scheduler = peer("DDIMScheduler", timestep_spacing="leading")
    scheduler.set_timesteps(50)
    steps = timesteps(1000, 50, "leading")
    start = torch.randn(SHAPE)
    ours = sample_loop(network, start, ddim_table(LINEAR, steps), steps)
    theirs = start
    for t in scheduler.timesteps:
        out = network(theirs, t.repeat(2), None)
        theirs = scheduler.step(out, t, theirs, use_clipped_model_output=True).prev_sample
    assert_near_peer(ours, theirs)


def test_published_constants() -> None:
    assert f"{LINEAR.alphas_cumprod[-1]:.3e}" == "4.036e-05"
    assert f"{LINEAR.alphas_cumprod[-1].sqrt():.5f}" == "0.00635"
    assert f"{COSINE.alphas_cumprod[-1]:.1e}" == "2.4e-09"
    k0, k1 = ddpm_table(LINEAR, timesteps(1000, 1000))[:, :2].unbind(1)
    assert f"{-k1[0]:.1f} {-k1[499]:.2f}" == "157.4 3.44"  # how much eps -> x0 amplifies errors at t = 999 and 500
    assert f"{k0[0]:.1f}" == "157.4"
