"""The diffusions beside those of denoising-diffusion-pytorch: tables, every method, losses and images of a seed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.compat import denoising_diffusion_pytorch as ours
from tests.compat.peers import lucidrains, seeded, with_lucidrains
from tests.compat.test_ddpm_network_peer import MODULES, SMALL
from tests.tolerance import assert_equal_to_rounding, assert_near_peer

pytestmark = with_lucidrains

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
SIZE = (8, 4)
STEPS = 24


def pair(name: str = "GaussianDiffusion", network: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Their diffusion and ours of one network, whose prediction is small enough that no error grows in a sampling."""
    one_dimensional = name.endswith("1D")
    kind = "Unet1D" if one_dimensional else "Unet"
    options = dict({"seq_length": 8} if one_dimensional else {"image_size": SIZE}, timesteps=STEPS) | options
    made = []
    for of in (lambda n: getattr(lucidrains(MODULES[n]), n), lambda n: getattr(ours, n)):
        net = seeded(of(kind), **{**SMALL, **(network or {})})
        with torch.no_grad():
            net.final_conv.weight.mul_(0.3)
        made.append(of(name)(net, **options))
    theirs, mine = made
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    return theirs, mine


def images(batch: int = 3, channels: int = 3, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.rand(batch, channels, *size)


def assert_same(mine: Any, theirs: Any) -> None:
    """Tensors, or tuples of them."""
    if isinstance(theirs, tuple):
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    else:
        assert_near_peer(mine.detach(), theirs.detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [24, 1000])
def test_tables(timesteps: int, beta_schedule: str, objective: str) -> None:
    """Before any state dict is loaded: the same names in the same order, and float32 of the same float64."""
    options: dict[str, Any] = dict(timesteps=timesteps, beta_schedule=beta_schedule, objective=objective)
    options |= {"linear": {}, "cosine": {"schedule_fn_kwargs": {"s": 0.02}}, "sigmoid": {}}[beta_schedule]
    net = ours.Unet(**SMALL)
    theirs = lucidrains().GaussianDiffusion(net, image_size=8, min_snr_loss_weight=True, min_snr_gamma=3, **options)
    mine = ours.GaussianDiffusion(net, image_size=8, min_snr_loss_weight=True, min_snr_gamma=3, **options)
    expected, found = dict(theirs.named_buffers()), dict(mine.named_buffers())
    assert list(found) == list(expected)
    for name, table in expected.items():
        assert found[name].dtype == table.dtype
        assert_equal_to_rounding(found[name], table)


def test_sigmoid_of_other_ends() -> None:
    options = dict(beta_schedule="sigmoid", schedule_fn_kwargs=dict(start=0, end=3, tau=0.7, clamp_min=1e-4))
    theirs, mine = pair(**options)
    fresh = ours.GaussianDiffusion(mine.model, image_size=SIZE, timesteps=STEPS, **options)
    for a, b in zip(fresh.buffers(), theirs.buffers(), strict=True):
        assert_equal_to_rounding(a, b)


@pytest.mark.parametrize("name", ["GaussianDiffusion", "GaussianDiffusion1D"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_method(objective: str, name: str) -> None:
    theirs, mine = pair(name, dict(self_condition=True), objective=objective)
    shape = (4, 3, 8) if name.endswith("1D") else (4, 3, *SIZE)
    x, y, condition = torch.randn(3, *shape)
    t = torch.tensor([0, 3, 11, STEPS - 1])
    calls: dict[str, list[tuple[Any, ...]]] = {
        "predict_start_from_noise": [(x, t, y)], "predict_noise_from_start": [(x, t, y)],
        "predict_v": [(x, t, y)], "predict_start_from_v": [(x, t, y)], "q_posterior": [(x, y, t)],
        "q_sample": [(x, t), (x, t, y)], "random_times": [(7,)],
        "model_predictions": [(x, t), (x, t, condition, True), (x, t, condition, True, True)],
        "p_mean_variance": [(x, t), (x, t, condition, False)],
        "p_sample": [(x, STEPS - 1), (x, 0, condition)],
    }  # fmt: skip
    with torch.no_grad():
        for method, arguments in calls.items():
            for args in arguments:
                assert_same(seeded(getattr(mine, method), *args), seeded(getattr(theirs, method), *args))
    assert mine.model_predictions(x, t)._fields == theirs.model_predictions(x, t)._fields
    assert mine.device == theirs.device
    for image in (x, torch.rand(2)):
        assert torch.equal(mine.normalize(image), theirs.normalize(image))
        assert torch.equal(mine.unnormalize(image), theirs.unnormalize(image))


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "self-conditioning": (dict(self_condition=True), {}),
    "offset noise": ({}, dict(offset_noise_strength=0.2)),
    "min-SNR": ({}, dict(min_snr_loss_weight=True, min_snr_gamma=2)),
    "as it is": ({}, dict(auto_normalize=False)),
}


@pytest.mark.parametrize(("objective", "beta_schedule"), list(zip(OBJECTIVES, SCHEDULES, strict=True)))
@pytest.mark.parametrize("case", LOSSES)
def test_losses(case: str, objective: str, beta_schedule: str) -> None:
    network, options = LOSSES[case]
    theirs, mine = pair(network=network, objective=objective, beta_schedule=beta_schedule, **options)
    x = images()
    for seed in (1, 2, 3):  # with and without a first prediction, where there is self-conditioning
        found, expected = (seeded(d, x, seed=seed) for d in (mine, theirs))
        assert_same(found, expected)
    gradients = (torch.autograd.grad(loss, list(d.parameters())) for loss, d in ((found, mine), (expected, theirs)))
    for a, b in zip(*gradients, strict=True):
        assert_near_peer(a, b)
    assert_same(seeded(mine, x, loss_reduction="none"), seeded(theirs, x, loss_reduction="none"))
    t = torch.tensor([0, 5, STEPS - 1])
    assert_same(seeded(mine, x, times=t), seeded(theirs, x, times=t))
    noise = torch.randn_like(x)
    assert_same(
        seeded(mine, x, noise.clone(), times=t, offset_noise_strength=0.5),
        seeded(theirs, x, noise.clone(), times=t, offset_noise_strength=0.5),
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_immiscible_compares_with_the_noise_that_is_in_x_t(objective: str) -> None:
    """Theirs compares with the noise of another image: so the expected loss is theirs of the assigned noise."""
    theirs, mine = pair(objective=objective, immiscible=True)
    plain, _ = pair(objective=objective)
    x, t = images(6) * 2 - 1, torch.arange(6) * 4
    noise = torch.randn_like(x)
    assigned = noise[theirs.noise_assignment(x, noise)]
    assert not torch.equal(assigned, noise)
    assert torch.equal(mine.noise_assignment(x, noise), theirs.noise_assignment(x, noise))
    assert_same(mine.q_sample(x, t, noise), theirs.q_sample(x, t, noise))
    assert_same(mine.p_losses(x, t, noise), plain.p_losses(x, t, assigned))


def assert_same_images(mine: Any, theirs: Any, steps: int) -> None:
    """Every state of a sampling, its result alone, and what the generator gives afterwards."""
    found, after = seeded(mine.sample, 2, return_all_timesteps=True), torch.rand(3)
    expected, expected_after = seeded(theirs.sample, 2, return_all_timesteps=True), torch.rand(3)
    assert found.shape == (2, steps + 1, 3, *SIZE)
    assert_same(found, expected)
    assert torch.equal(after, expected_after)
    assert torch.equal(seeded(mine.sample, 2), found[:, -1])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("beta_schedule", "self_condition"), [("cosine", False), ("sigmoid", True)])
def test_images_by_all_steps(beta_schedule: str, self_condition: bool, objective: str) -> None:
    theirs, mine = pair(network=dict(self_condition=self_condition), objective=objective, beta_schedule=beta_schedule)
    assert_same_images(mine, theirs, STEPS)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("eta", "steps"), [(0.0, 7), (0.5, 23), (1.0, 10)])
def test_images_by_ddim(eta: float, steps: int, objective: str) -> None:
    options = dict(objective=objective, sampling_timesteps=steps, ddim_sampling_eta=eta, beta_schedule="linear")
    theirs, mine = pair(network=dict(self_condition=eta == 0.5), **options)
    assert_same_images(mine, theirs, steps)


@pytest.mark.parametrize("sampling_timesteps", [None, 4])
def test_images_of_a_wider_network(sampling_timesteps: int | None) -> None:
    """Its convolutions take weights that are transformed once for all steps."""
    options: dict[str, Any] = dict(image_size=16, timesteps=6, sampling_timesteps=sampling_timesteps)
    theirs, mine = pair(network=dict(dim=16, dim_mults=(1, 2, 2)), **options)
    assert_same(*(seeded(d.sample, 5) for d in (mine, theirs)))


@pytest.mark.parametrize(("t", "lam"), [(None, 0.5), (9, 0.2), (0, 0.7)])
def test_interpolation(t: int | None, lam: float) -> None:
    theirs, mine = pair()
    a, b = images(2), images(2)
    assert_same(*(seeded(d.interpolate, a, b, t=t, lam=lam) for d in (mine, theirs)))


def test_a_schedule_that_comes_with_the_state_dict() -> None:
    """Theirs samples by the tables that were loaded, whatever it was made with."""
    theirs, mine = pair(beta_schedule="linear", sampling_timesteps=8)
    cosine, _ = pair(beta_schedule="cosine")
    for d in (mine, theirs):
        d.load_state_dict(cosine.state_dict())
        d.sampling_timesteps = 8
    assert_same(*(seeded(d.sample, 2) for d in (mine, theirs)))
    for d in (mine, theirs):
        d.is_ddim_sampling = False
    assert_same(*(seeded(d.sample, 2) for d in (mine, theirs)))


# --- a variance that is learned

LEARNED = dict(network=dict(learned_variance=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hybrid_loss(reduction: str) -> None:
    """Theirs leaves out the factor T."""
    theirs, mine = pair("LearnedGaussianDiffusion", **LEARNED)
    theirs.vb_loss_weight = mine.vb_loss_weight * STEPS
    x = torch.randint(0, 256, (6, 3, *SIZE)) / 255
    x[0, :, 0], x[1, :, 0] = 0, 1  # the outermost levels
    t = torch.tensor([0, 0, 1, 8, 16, STEPS - 1])
    found, expected = (seeded(d, x, times=t, loss_reduction=reduction) for d in (mine, theirs))
    assert_same(found, expected)
    gradients = (torch.autograd.grad(y.sum(), list(d.parameters())) for y, d in ((found, mine), (expected, theirs)))
    for a, b in zip(*gradients, strict=True):
        assert_near_peer(a, b)
    assert_same(seeded(mine, x, clip_denoised=True), seeded(theirs, x, clip_denoised=True))


def test_learned_variance_step_by_step_and_images() -> None:
    theirs, mine = pair("LearnedGaussianDiffusion", **LEARNED)
    x, t = torch.randn(3, 3, *SIZE), torch.tensor([0, 9, STEPS - 1])
    with torch.no_grad():
        for clip in (True, False):
            assert_same(*(d.p_mean_variance(x=x, t=t, clip_denoised=clip) for d in (mine, theirs)))
        for time in (0, 9):
            assert_same(*(seeded(d.p_sample, x, time) for d in (mine, theirs)))
    assert_same(*(seeded(d.sample, 2) for d in (mine, theirs)))


def test_learned_variance_by_ddim() -> None:
    """Theirs raises; the mean does not depend on the variance, so its GaussianDiffusion of the first half is right."""
    options: dict[str, Any] = dict(sampling_timesteps=7, ddim_sampling_eta=0.3)
    theirs, mine = pair("LearnedGaussianDiffusion", objective="pred_noise", **LEARNED, **options)
    with pytest.raises(NameError):
        theirs.sample(1)
    net = theirs.model

    class Half(torch.nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def forward(self, x: Tensor, t: Tensor, _: None) -> Tensor:
            return net(x, t)[:, :3]

    right = lucidrains().GaussianDiffusion(Half(), image_size=SIZE, timesteps=STEPS, objective="pred_noise", **options)
    assert_same(*(seeded(d.sample, 2) for d in (mine, right)))


# --- sequences


@pytest.mark.parametrize(
    ("objective", "beta_schedule", "self_condition"),
    [("pred_noise", "linear", True), ("pred_x0", "cosine", False), ("pred_v", "cosine", True)],
)
def test_sequences(objective: str, beta_schedule: str, self_condition: bool) -> None:
    options: dict[str, Any] = dict(
        network=dict(self_condition=self_condition), objective=objective, beta_schedule=beta_schedule
    )
    theirs, mine = pair("GaussianDiffusion1D", **options)
    x = images(size=(8,))
    for seed in (1, 2):
        for extra in ({}, {"loss_reduction": "none"}, {"return_reduced_loss": False}):
            assert_same(*(seeded(d, x, seed=seed, **extra) for d in (mine, theirs)))
    assert_same(*(seeded(d.sample, 2, return_noise=True) for d in (mine, theirs)))
    assert_same(*(seeded(d.interpolate, x, x.flip(0), t=9) for d in (mine, theirs)))
    theirs, mine = pair("GaussianDiffusion1D", sampling_timesteps=9, ddim_sampling_eta=0.4, **options)
    assert_same(*(seeded(d.sample, 2) for d in (mine, theirs)))
    assert_same(*(seeded(d.ddim_sample, (2, 3, 8), clip_denoised=False) for d in (mine, theirs)))


class TokensLast(torch.nn.Module):
    """A network of [B, N, C] that takes another argument."""

    channels, self_condition = 5, True

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, gain: float = 1.0) -> Tensor:
        out: Tensor = self.linear(x).tanh() * gain + t[:, None, None] / 100
        return out if x_self_cond is None else out + 0.1 * x_self_cond


@pytest.mark.parametrize("sampling_timesteps", [None, 6])
def test_sequences_with_channels_last_and_arguments_of_the_network(sampling_timesteps: int | None) -> None:
    net = seeded(TokensLast)
    options: dict[str, Any] = dict(seq_length=8, timesteps=STEPS, channel_first=False, auto_normalize=False)
    options |= dict(sampling_timesteps=sampling_timesteps)
    theirs = lucidrains(MODULES["GaussianDiffusion1D"]).GaussianDiffusion1D(net, **options)
    mine = ours.GaussianDiffusion1D(net, **options)
    gain = {"model_forward_kwargs": {"gain": 0.5}}
    for seed in (1, 2):
        assert_same(*(seeded(d, torch.ones(3, 8, 5), seed=seed, **gain) for d in (mine, theirs)))
    assert_same(*(seeded(d.sample, 2, **gain) for d in (mine, theirs)))
    assert seeded(mine.sample, 2).shape == (2, 8, 5)


# --- the best of several candidates


@pytest.mark.parametrize("max_batch_size", [None, 1, 4, 100])
@pytest.mark.parametrize("name", ["GaussianDiffusion", "GaussianDiffusion1D"])
def test_candidates(name: str, max_batch_size: int | None) -> None:
    theirs, mine = pair(name)
    x = images(size=(8,)) if name.endswith("1D") else images()
    wrapped = lucidrains("xm").XMWrapper(theirs, candidates=3), ours.XMWrapper(mine, candidates=3)
    expected, found = (seeded(w, x, max_batch_size=max_batch_size) for w in wrapped)
    assert_same(found, expected)
    t = torch.tensor([1, 2, 3])
    expected, found = (seeded(w, x, times=t, candidates=2, max_batch_size=max_batch_size) for w in wrapped)
    assert_same(found, expected)
    expected, found = (seeded(w, x, candidates=1) for w in wrapped)
    assert_same(found, expected)
    expected, found = (seeded(w.sample, 1) for w in wrapped)
    assert_same(found, expected)


class Plain(torch.nn.Module):
    """A model of flows that returns one loss, shares a draw among the candidates, and has times of its own."""

    data_shape = (3,)

    def xm_shared_random_kwargs(self, batch: int) -> dict[str, Tensor]:
        return {"shared": torch.rand(batch)}

    def draw_times(self, batch: int) -> Tensor:
        return torch.rand(batch)

    def forward(self, x: Tensor, shared: Tensor, at: Tensor) -> Tensor:
        return (x + shared[:, None] + at[:, None] * torch.randn_like(x)).square().mean()


def test_candidates_of_a_model_without_loss_reduction() -> None:
    model, options = Plain(), dict(candidates=3, random_time_method="draw_times", random_time_kwarg="at")
    wrapped = lucidrains("xm").XMWrapper(model, **options), ours.XMWrapper(model, **options)
    expected, found = (seeded(w, torch.ones(4, 3)) for w in wrapped)
    assert_same(found, expected)
    assert wrapped[1].data_shape == wrapped[0].data_shape == (3,)
    wrapped[1].data_shape = (5,)
    assert model.data_shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "schedule", "self_condition", "eta", "normalize"),
    itertools.product(OBJECTIVES, SCHEDULES, [False, True], [None, 0.0, 0.7], [True, False]),
)
def test_grid_of_options(
    objective: str, schedule: str, self_condition: bool, eta: float | None, normalize: bool
) -> None:
    options: dict[str, Any] = dict(objective=objective, beta_schedule=schedule, auto_normalize=normalize)
    if eta is not None:
        options |= dict(sampling_timesteps=11, ddim_sampling_eta=eta)
    theirs, mine = pair(network=dict(self_condition=self_condition, full_attn=(True, False)), **options)
    x = images()
    for seed in (1, 2):
        assert_same(*(seeded(d, x, seed=seed, loss_reduction="none") for d in (mine, theirs)))
        assert_same(*(seeded(d.sample, 2, seed=seed, return_all_timesteps=True) for d in (mine, theirs)))
    assert_same(*(seeded(d.interpolate, x, x.flip(0), t=9) for d in (mine, theirs)))
