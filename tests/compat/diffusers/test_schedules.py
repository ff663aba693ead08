"""Tables, timesteps and the noising of training are those of diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddpm.compat.diffusers as ours
from tests.compat.diffusers.cases import NAMES
from tests.tolerance import assert_near_peer, assert_within

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """The original and ours."""
    import diffusers

    return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


@pytest.mark.parametrize("name", NAMES)
def test_constructors_have_the_same_arguments_and_defaults(name: str) -> None:
    import diffusers

    theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
    mine = dict(inspect.signature(getattr(ours, name).__init__).parameters)
    assert mine.pop("corrected").kind is inspect.Parameter.KEYWORD_ONLY
    assert {key: p.default for key, p in mine.items()} == {key: p.default for key, p in theirs.items()}
    assert list(mine) == list(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_methods_take_the_same_arguments(name: str) -> None:
    import diffusers

    for method in ("set_timesteps", "step", "add_noise", "get_velocity", "scale_model_input", "previous_timestep"):
        theirs = getattr(getattr(diffusers, name), method, None)
        if theirs is None:
            continue
        expected, found = (inspect.signature(f).parameters for f in (theirs, getattr(getattr(ours, name), method)))
        if method != "scale_model_input":
            assert {key: p.default for key, p in found.items()} == {key: p.default for key, p in expected.items()}


SCHEDULES: dict[str, dict[str, Any]] = {
    name: dict(beta_schedule=name) for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
} | {
    "betas": dict(trained_betas=[0.001 * (i + 1) for i in range(20)], num_train_timesteps=20),
    "zero SNR": dict(rescale_betas_zero_snr=True),
    "ends": dict(beta_start=0.00085, beta_end=0.012, num_train_timesteps=77),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_betas_and_their_products_are_the_same_numbers(case: str) -> None:
    theirs, mine = pair("DDPMScheduler", **SCHEDULES[case])
    for table in ("betas", "alphas", "alphas_cumprod"):
        expected, found = getattr(theirs, table), getattr(mine, table)
        assert found.dtype == expected.dtype and found.device == expected.device
        assert_near_peer(found, expected, precision=2e-7)
        assert (found == expected).float().mean() >= 0.99  # the cosine of float64 may round the other way
    assert torch.equal(mine.one, theirs.one) and torch.equal(mine.timesteps, theirs.timesteps)
    assert (mine.init_noise_sigma, mine.order, len(mine)) == (theirs.init_noise_sigma, theirs.order, len(theirs))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", NAMES)
def test_timesteps_of_any_number_of_steps(name: str, spacing: str) -> None:
    """The one difference: no -1 at the end, where the rounding of T / N makes diffusers visit it."""
    theirs, mine = pair(name, timestep_spacing=spacing)
    overruns = 0
    for steps in range(1, 999 if name.startswith("DPM") else 1001):
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
        expected = theirs.timesteps
        overruns += int(expected[-1] == -1)
        assert torch.equal(mine.timesteps, expected[expected >= 0]), steps
        assert len(mine.timesteps) == mine.num_inference_steps or name != "DDPMScheduler"
    assert (overruns > 0) == (spacing == "trailing")


def test_61_steps_of_trailing_are_61() -> None:
    theirs, mine = pair("DDIMScheduler", timestep_spacing="trailing")
    theirs.set_timesteps(61)
    mine.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and theirs.timesteps[-1] == -1
    assert len(mine.timesteps) == 61 and mine.timesteps[-1] == 15


SIGMAS: list[dict[str, Any]] = [
    dict(), dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True), dict(use_beta_sigmas=True),
    dict(use_lu_lambdas=True), dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    dict(lambda_min_clipped=-5.1, timestep_spacing="trailing"),
]  # fmt: skip


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("case", range(len(SIGMAS)))
def test_sigmas_of_the_solver(case: int, final: str, schedule: str) -> None:
    theirs, mine = pair("DPMSolverMultistepScheduler", **SIGMAS[case], beta_schedule=schedule, final_sigmas_type=final)
    assert_near_peer(mine.lambda_t, theirs.lambda_t)
    assert_near_peer(mine.sigmas, theirs.sigmas)
    for steps in (1, 2, 10, 50) if case != 3 else (2, 10):
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
        assert torch.equal(mine.timesteps, theirs.timesteps)
        assert mine.num_inference_steps == theirs.num_inference_steps
        assert mine.sigmas.dtype == theirs.sigmas.dtype == torch.float32
        assert_near_peer(mine.sigmas, theirs.sigmas, precision=1e-6)


def test_sigmas_shifted_by_mu() -> None:
    theirs, mine = pair(
        "DPMSolverMultistepScheduler",
        use_dynamic_shifting=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )
    theirs.set_timesteps(8, mu=0.7)
    mine.set_timesteps(8, mu=0.7)
    assert_near_peer(mine.sigmas, theirs.sigmas, precision=1e-6)
    assert torch.equal(mine.timesteps, theirs.timesteps)


def test_sigma_min_and_max_of_another_configuration() -> None:
    """Keys that this scheduler has not, and that a configuration of another brought along."""
    import diffusers

    config = diffusers.EulerDiscreteScheduler(sigma_min=0.1, sigma_max=20.0, use_karras_sigmas=True).config
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
    mine = ours.DPMSolverMultistepScheduler.from_config(config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(9)
    assert mine.config.sigma_max == 20
    assert_near_peer(mine.sigmas, theirs.sigmas, precision=1e-6)


@pytest.mark.parametrize("steps", [None, 7, 20])
def test_previous_timestep(steps: int | None) -> None:
    theirs, mine = pair("DDPMScheduler", timestep_spacing="linspace")
    for scheduler in (theirs, mine):
        if steps:
            scheduler.set_timesteps(steps)
    for t in theirs.timesteps[::3]:
        assert int(mine.previous_timestep(t)) == int(theirs.previous_timestep(t))
        assert int(mine.previous_timestep(int(t))) == int(theirs.previous_timestep(int(t)))
    theirs.set_timesteps(timesteps=[900, 20, 3])
    mine.set_timesteps(timesteps=[900, 20, 3])
    assert [int(mine.previous_timestep(t)) for t in (900, 20, 3)] == [20, 3, -1]
    with pytest.raises(ValueError, match="expected one of the timesteps"):
        mine.previous_timestep(21)


SHAPES = [(4, 3, 5, 5), (4, 6), (4, 3, 7), (4, 3, 2, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_noising(name: str, dtype: torch.dtype) -> None:
    theirs, mine = pair(name)
    exact, _ = pair(name)
    exact.alphas_cumprod = exact.alphas_cumprod.to(dtype).double()  # rounded as the original rounds it
    for shape in SHAPES:
        x, noise = torch.randn(2, *shape).to(dtype).unbind()
        for t in (torch.tensor([0, 3, 500, 999]), torch.tensor([7]), torch.tensor(41, dtype=torch.int32)):
            for method in ("add_noise", "get_velocity"):
                expected, found = getattr(theirs, method)(x, noise, t), getattr(mine, method)(x, noise, t)
                assert found.dtype == expected.dtype and found.shape == expected.shape
                true = getattr(exact, method)(x.double(), noise.double(), t)
                if dtype == torch.float64:
                    assert_near_peer(found, true)
                else:
                    assert_within(found, true, expected.float())


def test_noising_in_bfloat16_leaves_no_noise_at_first_unless_corrected() -> None:
    theirs, mine = pair("DDPMScheduler")
    right = ours.DDPMScheduler(corrected=True)
    x, noise, t = torch.zeros(10, 3, 2, 2).bfloat16(), torch.ones(10, 3, 2, 2).bfloat16(), torch.arange(10)
    assert not theirs.add_noise(x, noise, t).any() and not mine.add_noise(x, noise, t).any()
    sigma = (1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)).sqrt()[:10]
    assert torch.equal(right.add_noise(x, noise, t)[:, 0, 0, 0], sigma.bfloat16())


def test_noising_keeps_the_memory_order_and_passes_gradients_on() -> None:
    theirs, mine = pair("DDPMScheduler")
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    noise, t = torch.randn(4, 3, 5, 5), torch.tensor([0, 3, 500, 999])
    assert mine.add_noise(x, noise, t).is_contiguous(memory_format=torch.channels_last)
    gradients = []
    for scheduler in (theirs, mine):
        a, b = x.clone().requires_grad_(), noise.clone().requires_grad_()
        gradients.append(torch.autograd.grad(scheduler.add_noise(a, b, t).square().sum(), (a, b)))
    for expected, found in zip(*gradients, strict=True):
        assert_near_peer(found, expected)


CASES: list[dict[str, Any]] = [dict(), dict(use_karras_sigmas=True), dict(use_flow_sigmas=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_noising_by_the_solver(case: int, dtype: torch.dtype) -> None:
    """Before set_timesteps, in its steps, where a sampling begins, and where it has come."""
    theirs, mine = pair("DPMSolverMultistepScheduler", **CASES[case])

    def agree(t: Tensor, shape: tuple[int, ...] = SHAPES[0]) -> None:
        x, noise = torch.randn(2, *shape).to(dtype).unbind()
        expected, found = theirs.add_noise(x, noise, t), mine.add_noise(x, noise, t)
        assert found.dtype == expected.dtype
        # one rounding against several: the original within the rule of what it rounds once
        table = theirs.sigmas.to(dtype)
        exact = _noised(theirs, x.double(), noise.double(), t, table)
        assert_within(found, exact, expected.float())

    agree(torch.tensor([0, 3, 500, 999]))
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    for shape in SHAPES:
        agree(theirs.timesteps[[0, 3, 9, 5]], shape)
    agree(torch.tensor([1, 2, 3, 4]))  # none of which is visited
    if "use_karras_sigmas" in CASES[case]:
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(300)
        visited = theirs.timesteps.tolist()
        twice = [t for t in visited if visited.count(t) > 1][:4]  # rounded, with sigmas that differ: the second counts
        assert len(twice) == 4
        agree(torch.tensor(twice))
    for scheduler in (theirs, mine):
        scheduler.set_begin_index(4)
    agree(torch.tensor([1, 2, 3, 4]))
    for scheduler in (theirs, mine):
        scheduler.step(torch.zeros(SHAPES[0]), scheduler.timesteps[4], torch.zeros(SHAPES[0]))
    agree(torch.tensor([1, 2, 3, 4]))


def _noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """By the noise levels that the original finds, with its rounding of alpha and sigma."""
    visited = scheduler.timesteps.tolist()
    places = []
    for value in t.tolist():
        found = [i for i, v in enumerate(visited) if v == value]
        places.append(found[min(1, len(found) - 1)] if found else len(visited) - 1)
    if scheduler.begin_index is not None:
        places = [scheduler.begin_index if scheduler.step_index is None else scheduler.step_index] * len(places)
    shape = (-1, *[1] * (x.dim() - 1))
    alpha, sigma = (v.double().reshape(shape) for v in scheduler._sigma_to_alpha_sigma_t(table[places]))
    return alpha * x + sigma * noise


def test_the_solver_takes_noise_levels_in_the_wrong_order_unless_corrected() -> None:
    theirs, mine = pair("DPMSolverMultistepScheduler")
    right = ours.DPMSolverMultistepScheduler(corrected=True)
    ddpm = ours.DDPMScheduler()
    x, noise = torch.randn(2, 3, 3, 4, 4).unbind()
    t = torch.tensor([0, 200, 999])
    for scheduler in (theirs, mine):
        assert_near_peer(scheduler.add_noise(x, noise, t), ddpm.add_noise(x, noise, 999 - t))
    assert_near_peer(right.add_noise(x, noise, t), ddpm.add_noise(x, noise, t))
