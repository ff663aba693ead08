"""``corrected=True`` gives our samplers, and noise from its counter belongs to the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddpm.compat.diffusers as ours
from fastddpm.sampling import initial_noise, sample_ddim, sample_ddpm, sample_dpmpp_2m
from fastddpm.schedule import Schedule, cosine_beta_schedule, linear_beta_schedule
from tests.tolerance import assert_equal_to_rounding, assert_near_peer

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (3, 3, 4, 4)
LINEAR = Schedule.from_betas(linear_beta_schedule(1000))
COSINE = Schedule.from_betas(cosine_beta_schedule(1000))


def network(learned: bool = False) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """Some function of x and t."""

    def call(x: Tensor, t: Tensor, labels: Any = None) -> Tensor:
        out = torch.sin(3 * x + t.reshape(-1, 1, 1, 1) / 100)
        return torch.cat([out, torch.cos(x)], dim=1) if learned else out

    return call


def sampled(scheduler: Any, steps: int, learned: bool = False, **options: Any) -> Tensor:
    """By the loop of a pipeline."""
    scheduler.set_timesteps(steps)
    x = initial_noise(SHAPE, seed=5, sample=torch.arange(SHAPE[0]))
    for t in scheduler.timesteps:
        x = scheduler.step(network(learned)(x, t.repeat(len(x))), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "fixed_large_log", "learned", "learned_range"])
def test_ancestral_sampling_is_ours(variance: str, steps: int) -> None:
    scheduler = ours.DDPMScheduler(variance_type=variance, prediction_type="v_prediction", corrected=True)
    learned = variance.startswith("learned")
    expected = sample_ddpm(
        network(learned), LINEAR, SHAPE, prediction="v", variance=variance.removesuffix("_log"), num_steps=steps, seed=5
    )
    assert torch.equal(sampled(scheduler.set_noise_seed(5), steps, learned), expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("use_clipped", [False, True])
def test_ddim_is_ours(eta: float, use_clipped: bool) -> None:
    scheduler = ours.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", corrected=True)
    expected = sample_ddim(
        network(), COSINE, SHAPE, prediction="x0", eta=eta, use_clipped=use_clipped, num_steps=7, seed=5
    )
    found = sampled(scheduler.set_noise_seed(5), 7, eta=eta, use_clipped_model_output=use_clipped)
    assert torch.equal(found, expected)


def test_thresholds_are_ours() -> None:
    """Where the raw output plays no part, ours takes another way to the same step."""
    config = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6, corrected=True)
    expected = sample_ddpm(network(), LINEAR, SHAPE, num_steps=9, seed=5, dynamic_threshold_ratio=0.9)
    found = sampled(ours.DDPMScheduler(variance_type="fixed_large", **config).set_noise_seed(5), 9)
    assert_near_peer(found, expected)


def test_the_solver_is_ours() -> None:
    scheduler = ours.DPMSolverMultistepScheduler(timestep_spacing="trailing", corrected=True)
    expected = sample_dpmpp_2m(network(), LINEAR, SHAPE, num_steps=20, seed=5, clamp=None)
    assert_near_peer(sampled(scheduler, 20), expected, precision=1e-5)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_solver_of_order_n_is_exact_for_polynomials_below_it(algorithm: str, order: int) -> None:
    """Predictions that are polynomials in lambda: a step is their integral against e^lambda (Lu et al. 2022, eq. 3.4).

    Noise apart; of second order with the "heun" weights, which are the exact ones.
    """
    if algorithm == "sde-dpmsolver" and order == 3:
        return  # there is none
    of_data, twice = algorithm.endswith("++"), 2.0 if algorithm.startswith("sde") else 1.0
    scheduler = ours.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=order, solver_type="heun", final_sigmas_type="sigma_min",
        prediction_type="sample" if of_data else "epsilon", lower_order_final=False, corrected=True,
    )  # fmt: skip
    scheduler.set_timesteps(8)
    levels = scheduler._levels.tolist()

    def prediction(lam: float) -> float:
        return [1.0, 0.3 * lam, 0.05 * lam**2][order - 1] + 0.2

    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        begin, end = levels[i], levels[i + 1]
        (alpha, sigma), (alpha_next, sigma_next) = (
            (1 / (s**2 + 1) ** 0.5, s / (s**2 + 1) ** 0.5) for s in (begin, end)
        )
        h = float(np.log(begin) - np.log(end))
        s = h / 2 * (nodes + 1)
        values = np.array([prediction(-np.log(begin) + float(v)) for v in s])
        if of_data:
            integral = alpha_next * float((weights * twice * np.exp(-twice * (h - s)) * values).sum()) * h / 2
            kept = sigma_next / sigma * np.exp(-(twice - 1) * h)
        else:
            integral = -sigma_next * twice * float((weights * np.exp(h - s) * values).sum()) * h / 2
            kept = alpha_next / alpha
        out = torch.full_like(x, prediction(-float(np.log(begin))))
        found = scheduler.step(out, t, x, variance_noise=torch.zeros_like(x)).prev_sample
        if i >= order - 1:  # before that there are not yet as many predictions
            assert_equal_to_rounding(found.item(), float(kept * x.item() + integral), ulps=1e5, scale=1.0)
        x = found


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_by_its_counter_belongs_to_the_image(name: str) -> None:
    """Images 2 and 3 of a run are the same by themselves."""
    options = {} if name == "DDPMScheduler" else dict(algorithm_type="sde-dpmsolver++", solver_order=3)
    scheduler = getattr(ours, name)(**options)
    x, out = torch.randn(2, 20, 4, 3, 4, 4).unbind()
    whole, part = x[0], x[0, 2:]
    for first in (0, 2):
        scheduler.set_timesteps(20)
        scheduler.set_noise_seed(9, first_image=first)
        for i, t in enumerate(scheduler.timesteps):
            if first == 0:
                whole = scheduler.step(out[i], t, whole).prev_sample
            else:
                part = scheduler.step(out[i, 2:], t, part).prev_sample
    assert torch.equal(whole[2:], part)
    scheduler.set_timesteps(20)
    scheduler.set_noise_seed(10)
    assert not torch.equal(
        scheduler.step(out[0], scheduler.timesteps[0], x[0]).prev_sample[2:],
        scheduler.set_noise_seed(9).step(out[0], scheduler.timesteps[1], x[0]).prev_sample[2:],
    )


def test_a_solver_in_float64() -> None:
    """Which the original computes in float32."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        scheduler = ours.DPMSolverMultistepScheduler(solver_order=3)
        scheduler.set_timesteps(20)
        x = torch.ones(1, 3, 2, 2, dtype=dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x + t), t, x).prev_sample
        found[dtype] = x
    assert found[torch.float64].dtype == torch.float64
    assert_near_peer(found[torch.float32], found[torch.float64])


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("DDPMScheduler", dict(beta_schedule="cosine"), "expected beta_schedule to be one of 'linear', .*, got 'cosine'"),
    ("DDIMScheduler", dict(beta_schedule="sigmoid"), "expected beta_schedule to be one of .*, got 'sigmoid'"),
    ("DDPMScheduler", dict(prediction_type="x0"), "expected prediction_type to be one of .*, got 'x0'"),
    ("DDPMScheduler", dict(variance_type="large"), "expected variance_type to be one of .*, got 'large'"),
    ("DDIMScheduler", dict(timestep_spacing="even"), "expected timestep_spacing to be one of .*, got 'even'"),
    ("DPM", dict(algorithm_type="heun"), "expected algorithm_type to be one of .*, got 'heun'"),
    ("DPM", dict(solver_type="rk"), "expected solver_type to be one of .*, got 'rk'"),
    ("DPM", dict(solver_order=4), "expected solver_order to be one of 1, 2, 3, got 4"),
    ("DPM", dict(final_sigmas_type="one"), "expected final_sigmas_type to be one of .*, got 'one'"),
    ("DDIMScheduler", dict(trained_betas=[0.1, 0.2]), "expected as many trained_betas .*, 1000, got 2"),
    ("DPM", dict(time_shift_type="linear"), "expected time_shift_type to be one of 'exponential', got 'linear'"),
    ("DPM", dict(algorithm_type="dpmsolver"), "expected final_sigmas_type='sigma_min' with algorithm_type='dpmsolver'"),
    (
        "DPM", dict(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"),
        "expected solver_order <= 2 with algorithm_type='sde-dpmsolver', got 3",
    ),
    (
        "DPM", dict(algorithm_type="dpmsolver", prediction_type="flow_prediction", final_sigmas_type="sigma_min"),
        "with prediction_type='flow_prediction', got 'dpmsolver'",
    ),
    (
        "DPM", dict(use_karras_sigmas=True, use_beta_sigmas=True),
        "expected at most one way to choose sigmas, got use_karras_sigmas and use_beta_sigmas",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_what_a_constructor_refuses(case: int) -> None:
    name, config, message = ERRORS[case]
    cls = ours.DPMSolverMultistepScheduler if name == "DPM" else getattr(ours, name)
    with pytest.raises(ValueError, match=message):
        cls(**config)


Call = Callable[[], Any]


def solver(**config: Any) -> Any:
    """A solver."""
    return ours.DPMSolverMultistepScheduler(**config)


X = torch.zeros(1, 3, 2, 2)


def stepped(scheduler: Any, steps: int | None = 5, out: Tensor = X, t: Any = None, **options: Any) -> Any:
    """One step."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler.step(out, scheduler.timesteps[0] if t is None else t, X, **options)


CALLS: list[tuple[Call, str]] = [
    (lambda: ours.DDPMScheduler().set_timesteps(), "expected num_inference_steps or timesteps, got neither"),
    (lambda: ours.DDPMScheduler().set_timesteps(3, timesteps=[3]), "num_inference_steps or timesteps, got both"),
    (
        lambda: ours.DDPMScheduler().set_timesteps(timesteps=[3, 3]),
        r"expected timesteps to descend strictly in \[0, 1000",
    ),
    (lambda: ours.DDPMScheduler().set_timesteps(timesteps=[1000]), r"expected timesteps to descend .*, got \[1000\]"),
    (lambda: ours.DDIMScheduler().set_timesteps(1001), r"expected num_inference_steps in \[1, 1000\], got 1001"),
    (
        lambda: ours.DDIMScheduler(steps_offset=1).set_timesteps(1000),
        "expected steps_offset to keep .*, got 1 for 1000",
    ),
    (lambda: stepped(ours.DDPMScheduler(), t=3), "expected one of the timesteps that set_timesteps chose, got 3"),
    (
        lambda: stepped(ours.DDPMScheduler(variance_type="fixed_large_log")),
        "not to be 'fixed_large_log'.*corrected=True",
    ),
    (lambda: stepped(ours.DDPMScheduler(), out=X.repeat(1, 2, 1, 1)), r"expected model_output of shape \[1, 3, 2, 2\]"),
    (lambda: stepped(ours.DDPMScheduler(variance_type="learned")), r"expected model_output of shape \[1, 6, 2, 2\]"),
    (
        lambda: stepped(
            ours.DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing")
        ),
        r"expected rescale_betas_zero_snr with a prediction_type other than 'epsilon'.*timestep 999",
    ),
    (lambda: stepped(ours.DDIMScheduler(), None), "expected set_timesteps to have been called"),
    (lambda: stepped(ours.DDIMScheduler(), out=X[:, :2]), r"expected model_output of shape \[1, 3, 2, 2\]"),
    (
        lambda: stepped(ours.DDIMScheduler(), eta=1.0, generator=torch.Generator(), variance_noise=X),
        "expected generator or variance_noise, got both",
    ),
    (lambda: solver().set_timesteps(), "expected num_inference_steps or timesteps, got neither"),
    (lambda: solver().set_timesteps(0), "expected num_inference_steps >= 1, got 0"),
    (lambda: solver().set_timesteps(3, mu=0.1), "expected use_dynamic_shifting with mu, got False"),
    (
        lambda: solver(use_karras_sigmas=True).set_timesteps(timesteps=[3]),
        "expected no timesteps with use_karras_sigmas",
    ),
    (lambda: solver().set_timesteps(timesteps=[1000]), r"expected timesteps in \[0, 1000\), got \[1000\]"),
    (lambda: stepped(solver(), None), "expected set_timesteps to have been called"),
    (lambda: stepped(solver(), out=X[:, :2]), r"expected model_output of shape \[1, 3, 2, 2\]"),
    (lambda: [stepped(s, 1 if i == 0 else None) for s in [solver()] for i in range(2)], "at most 1 steps, got another"),
    (lambda: ours.DDPMScheduler().add_noise(X, X, torch.tensor([1000])), r"timesteps in \[0, 1000\), got 1000 to 1000"),
]


@pytest.mark.parametrize("case", range(len(CALLS)))
def test_what_a_call_refuses(case: int) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_generators_that_do_not_fit() -> None:
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(5)
    x = torch.zeros(3, 3, 2, 2)
    with pytest.raises(ValueError, match="expected a generator for each of 3 samples, got 2"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator(), torch.Generator()])


def test_timesteps_that_are_no_integers() -> None:
    with pytest.raises(TypeError, match="expected timesteps to be a tensor of integers, got torch"):
        ours.DDPMScheduler().add_noise(X, X, torch.zeros(1))
    with pytest.raises(TypeError, match="expected timesteps to be a tensor of integers, got int"):
        ours.DDIMScheduler().get_velocity(X, X, 3)
    with pytest.raises(TypeError, match="expected timesteps to be a tensor, got int"):
        solver().add_noise(X, X, 3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_full_noise_leaves_no_root_of_a_negative_number(schedule: str) -> None:
    """1 - abar' - std^2 is 0 at eta = 1 where abar = 0, and rounding may make it less."""
    for zero_snr in (False, True):
        scheduler = ours.DDIMScheduler(
            beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
        )
        for steps in range(1, 200, 7):
            scheduler.set_timesteps(steps)
            table, _ = scheduler._rows(1.0, False).at(0, torch.device("cpu"))
            assert table[:-1].isfinite().all()
