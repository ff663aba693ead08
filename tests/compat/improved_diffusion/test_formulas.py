"""The diffusion of the compat module against our own theory, against itself by another way, and its errors."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddpm import diffusion as theory
from fastddpm.compat.improved_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    UNetModel,
    betas_for_alpha_bar,
    create_gaussian_diffusion,
    get_named_beta_schedule,
    space_timesteps,
)
from fastddpm.compat.improved_diffusion import gaussian_diffusion as module
from fastddpm.compat.improved_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from fastddpm.compat.improved_diffusion.nn import mean_flat
from fastddpm.likelihood.bound import vlb_terms
from fastddpm.schedule import make_schedule
from tests.compat.improved_diffusion.golden import Formula
from tests.tolerance import assert_equal_to_rounding, assert_near_peer

MEANS = {ModelMeanType.EPSILON: "eps", ModelMeanType.START_X: "x0", ModelMeanType.PREVIOUS_X: "mu"}
SHAPE = (4, 3, 4, 6)


def made(**options: Any) -> GaussianDiffusion:
    kept: dict[str, Any] = dict(
        betas=get_named_beta_schedule("cosine", 12),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
    )
    return GaussianDiffusion(**{**kept, **options})


def pixels(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Grey levels in [-1, 1]."""
    x = torch.randint(0, 256, shape) / 127.5 - 1
    x[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    return x


def ours(d: GaussianDiffusion, network: nn.Module, variance: str, **options: Any) -> theory.GaussianDiffusion:
    """The same diffusion by `fastddpm.GaussianDiffusion`; its network is called with timesteps as they are."""
    made = theory.GaussianDiffusion(
        network, SHAPE[2:], SHAPE[1], schedule="cosine", num_timesteps=d.num_timesteps, variance=variance,
        prediction=MEANS[d.model_mean_type], **options,
    )  # fmt: skip
    assert_equal_to_rounding(made.schedule.betas, torch.from_numpy(d.betas), 100)
    return made


def test_named_schedules() -> None:
    linear = get_named_beta_schedule("linear", 250)
    assert isinstance(linear, np.ndarray)
    assert linear.dtype == np.float64
    assert (linear[0], linear[-1]) == pytest.approx((4e-4, 0.08), rel=1e-12)  # 1000 / 250 times 1e-4 and 0.02
    cosine = betas_for_alpha_bar(50, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    assert get_named_beta_schedule("cosine", 50) == pytest.approx(cosine, rel=1e-9)
    assert betas_for_alpha_bar(3, lambda u: 1 - u)[-1] == 0.999
    with pytest.raises(NotImplementedError, match="expected schedule_name 'linear' or 'cosine', got 'sigmoid'"):
        get_named_beta_schedule("sigmoid", 10)


def test_the_spaced_chain_has_the_signal_of_the_long_one() -> None:
    betas = get_named_beta_schedule("cosine", 100)
    long = made(betas=betas)
    steps = space_timesteps(100, "7,3")
    spaced = SpacedDiffusion(
        steps, betas=betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE, rescale_timesteps=True,
    )  # fmt: skip
    assert spaced.timestep_map == sorted(steps)
    assert spaced.original_num_steps == 100
    assert spaced.num_timesteps == 10
    kept = torch.from_numpy(long.alphas_cumprod[sorted(steps)])
    assert_equal_to_rounding(torch.from_numpy(spaced.alphas_cumprod), kept, 10, scale=1.0)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    spaced.p_sample(network, torch.zeros(2, 1, 2, 2), torch.tensor([0, 9]))
    assert seen[0].tolist() == [0.0, pytest.approx(max(steps) * 1000 / 100)]
    assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("rescale", [True, False])
def test_the_network_gets_its_timesteps(rescale: bool) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.cat([x, x], dim=1)

    d, t = made(rescale_timesteps=rescale), torch.tensor([0, 3, 7, 11])
    d.p_mean_variance(network, pixels(), t)
    d.training_losses(network, pixels(), t)
    for given in seen:
        assert given.tolist() == [pytest.approx(i * 1000 / 12) if rescale else i for i in t.tolist()]
        assert given.dtype == (torch.float32 if rescale else torch.int64)


@pytest.mark.parametrize(
    ("total", "counts", "expected"),
    [
        (10, "ddim5", {0, 2, 4, 6, 8}),
        (10, [10], set(range(10))),
        (10, "2,3", {0, 4, 5, 7, 9}),
        (5, "1", {0}),
        (6, "0,2", {3, 5}),
    ],
)
def test_respacing(total: int, counts: Any, expected: set[int]) -> None:
    assert space_timesteps(total, counts) == expected


@pytest.mark.parametrize(("counts", "message"), [("11", "at most 10 for section 0"), ("ddim7", "a stride over 10")])
def test_respacing_refuses(counts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_timesteps(10, counts)


@pytest.mark.parametrize(("mean", "variance"), list(itertools.product(ModelMeanType, ModelVarType)))
@pytest.mark.parametrize("clip", [True, False])
def test_the_loops_are_their_steps_one_by_one(mean: ModelMeanType, variance: ModelVarType, clip: bool) -> None:
    """The loops run on the sampler's table; the steps, on the equations as they are written."""
    d = made(model_mean_type=mean, model_var_type=variance)
    network = Formula(d._learned)
    for loop, step in (
        (d.p_sample_loop, d.p_sample),
        (d.ddim_sample_loop, d.ddim_sample),
        (lambda *a, **k: d.ddim_sample_loop(*a, eta=0.6, **k), lambda *a, **k: d.ddim_sample(*a, eta=0.6, **k)),
    ):
        torch.manual_seed(3)
        found = loop(network, SHAPE, clip_denoised=clip)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        x = torch.randn(SHAPE)
        with torch.no_grad():
            for i in reversed(range(d.num_timesteps)):
                x = step(network, x, torch.full((len(x),), i), clip_denoised=clip)["sample"]
        assert torch.equal(state, torch.get_rng_state())
        assert_near_peer(found, x, 5e-6)


def test_a_loop_takes_the_steps_of_a_subclass() -> None:
    class Grey(GaussianDiffusion):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_mean_variance(*args, **kwargs)
            return dict(out, mean=out["mean"] * 0, log_variance=out["log_variance"] * 0 - 50)

    d = made()
    grey = Grey(
        betas=d.betas, model_mean_type=d.model_mean_type, model_var_type=d.model_var_type, loss_type=d.loss_type
    )
    assert grey.p_sample_loop(Formula(True), SHAPE).abs().max() < 1e-6
    assert d.p_sample_loop(Formula(True), SHAPE).abs().max() > 0.1


@pytest.mark.parametrize("clip", [True, False])
def test_a_loop_in_one_go_is_the_one_that_shows_its_steps(clip: bool) -> None:
    d, network = made(), Formula(True)
    for loop, steps in (
        (d.p_sample_loop, d.p_sample_loop_progressive),
        (d.ddim_sample_loop, d.ddim_sample_loop_progressive),
    ):
        given = torch.randn(SHAPE)
        kept = given.clone()
        torch.manual_seed(8)
        found = loop(network, SHAPE, noise=given, clip_denoised=clip)
        assert torch.equal(given, kept)  # x_T is the user's
        torch.manual_seed(8)
        seen = list(steps(network, SHAPE, noise=given, clip_denoised=clip))
        assert len(seen) == 12
        assert torch.equal(seen[-1]["sample"], found)
        assert torch.equal(seen[-1]["pred_xstart"], found)  # the last step adds no noise
        assert not torch.equal(seen[-2]["sample"], found)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["p_sample_loop", "ddim_sample_loop"])
def test_a_recorded_step_draws_what_the_others_draw(kind: str) -> None:
    """A step launched from a CUDA graph takes torch's generator on as one without."""
    torch.manual_seed(0)
    model = UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_heads=2).cuda().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    d, shape = made(betas=get_named_beta_schedule("cosine", 30)), (4, 3, 8, 8)
    torch.manual_seed(8)
    found = getattr(d, kind)(model, shape)
    after = torch.cuda.get_rng_state()
    torch.manual_seed(8)
    for seen in getattr(d, f"{kind}_progressive")(model, shape):
        expected = seen["sample"]
    assert torch.equal(after, torch.cuda.get_rng_state())
    assert_near_peer(found, expected, 1e-4)


def test_noise_keeps_its_order_in_memory() -> None:
    """x_T as given, channels_last or not, in float64, or of another shape than an image."""
    d, network = made(), Formula(True)
    noise = torch.randn(SHAPE)
    torch.manual_seed(1)
    expected = d.p_sample_loop(network, SHAPE, noise=noise)
    torch.manual_seed(1)
    exact = d.p_sample_loop(network, SHAPE, noise=noise.double())
    assert exact.dtype == torch.float64
    torch.manual_seed(1)
    half = d.p_sample_loop(network, SHAPE, noise=noise.half())
    assert half.dtype == torch.float32
    last = d.p_sample_loop(network, SHAPE, noise=noise.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    line = d.p_sample_loop(lambda x, t: torch.cat([x, x], 1), [2, 3, 5], device="cpu")
    assert line.shape == (2, 3, 5)


def test_forward_process_and_its_gradient() -> None:
    d, x0, noise = made(), pixels(), torch.randn(SHAPE)
    t = torch.tensor([0, 3, 7, 11])
    mean, variance, log_variance = d.q_mean_variance(x0, t)
    assert_near_peer(d.q_sample(x0, t, noise), mean + variance.sqrt() * noise, 1e-6)
    assert_near_peer(log_variance.exp(), variance, 1e-6)
    plain = d.q_sample(x0.requires_grad_(), t, noise)  # the op has no gradient to x_0, the equation has
    assert_near_peer(d.q_sample(x0.detach(), t, noise), plain.detach(), 1e-6)
    (slope,) = torch.autograd.grad(plain.sum(), x0)
    assert_near_peer(slope[:, 0, 0, 0], torch.from_numpy(d.sqrt_alphas_cumprod)[t], 1e-6)


def test_the_posterior_is_that_of_our_theory() -> None:
    d, x0, x, t = made(), pixels().double(), torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0, 3, 7, 11])
    schedule = make_schedule("cosine", 12)
    for found, expected in zip(
        d.q_posterior_mean_variance(x0, x, t), theory.q_posterior(x0, x, t, schedule), strict=True
    ):
        assert found.dtype == torch.float64
        assert_equal_to_rounding(found, expected.expand_as(found), 100)


def test_ddim_follows_the_line_between_image_and_noise() -> None:
    """Where the network tells the noise, x_t stays sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, both ways (eq. 12)."""
    d = made(model_var_type=ModelVarType.FIXED_SMALL)
    x0, eps = pixels().double(), torch.randn(SHAPE, dtype=torch.float64)
    for i in range(1, 11):
        t = torch.full((len(x0),), i)
        x = d.q_sample(x0, t, eps)
        back = d.ddim_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
        assert_equal_to_rounding(back, d.q_sample(x0, t - 1, eps), 1000, scale=1.0)
        ahead = d.ddim_reverse_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
        assert_equal_to_rounding(ahead, d.q_sample(x0, t + 1, eps), 1000, scale=1.0)


@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_the_corrected_hybrid_loss_is_our_own(mean: ModelMeanType) -> None:
    """Against the op that computes it in one pass (Nichol and Dhariwal 2021, eq. 16)."""
    d, network, x0 = made(model_mean_type=mean, corrected=True), Formula(True), pixels()
    noise, t = torch.randn(SHAPE), torch.tensor([0, 2, 6, 11])
    found = d.training_losses(network, x0, t, noise=noise)
    expected = ours(d, network, "learned_range", loss="hybrid").losses((x0 + 1) / 2, t=t, noise=noise)
    assert_near_peer(found["loss"].detach(), expected.per_sample.detach(), 1e-5)
    assert_near_peer((found["mse"] + found["vb"]).detach(), found["loss"].detach(), 1e-6)
    gradients = [torch.autograd.grad(loss, network.slope)[0] for loss in (found["loss"].mean(), expected.loss)]
    assert_near_peer(gradients[0], gradients[1], 1e-5)


@pytest.mark.parametrize("variance", list(ModelVarType))
@pytest.mark.parametrize("clip", [True, False])
def test_the_corrected_bound_is_our_own(variance: ModelVarType, clip: bool) -> None:
    d, x0 = made(model_var_type=variance, corrected=True), pixels()
    network = Formula(d._learned).eval().requires_grad_(False)
    name = module.VARIANCES[variance]
    mine = ours(d, network, name, loss="hybrid" if d._learned else "simple", clip_denoised=clip)
    torch.manual_seed(4)
    found = d.calc_bpd_loop(network, x0, clip_denoised=clip)
    torch.manual_seed(4)
    for column in range(d.num_timesteps):
        t = torch.full((len(x0),), d.num_timesteps - 1 - column)
        terms = vlb_terms(mine, x0, t, torch.randn_like(x0))
        assert_near_peer(found["vb"][:, column], terms.nats / math.log(2), 2e-5)
        assert_near_peer(found["xstart_mse"][:, column], terms.x0_mse, 2e-5)
        if not clip:
            assert_near_peer(found["mse"][:, column], terms.eps_mse, 2e-5)
    prior = mean_flat(theory.prior_kl(x0, mine.schedule)) / math.log(2)
    assert_near_peer(found["prior_bpd"], prior, 1e-6)
    assert_near_peer(found["total_bpd"], found["vb"].sum(1) + prior, 1e-6)


def test_the_losses_of_the_bound_are_its_terms() -> None:
    x0, noise, t = pixels(), torch.randn(SHAPE), torch.tensor([0, 2, 6, 11])
    network = Formula(True)
    kl, scaled = (
        made(loss_type=kind).training_losses(network, x0, t, noise=noise)
        for kind in (LossType.KL, LossType.RESCALED_KL)
    )
    assert list(kl) == ["loss"]
    assert_near_peer(scaled["loss"].detach(), 12 * kl["loss"].detach(), 1e-6)
    mse, rescaled = (
        made(loss_type=kind).training_losses(network, x0, t, noise=noise)
        for kind in (LossType.MSE, LossType.RESCALED_MSE)
    )
    assert_near_peer(mse["vb"].detach(), kl["loss"].detach(), 1e-6)
    assert_near_peer(rescaled["vb"].detach(), mse["vb"].detach() * 12 / 1000, 1e-6)
    (slope,) = torch.autograd.grad(mse["mse"].sum(), network.slope)
    network.zero_grad()
    assert slope != 0


@pytest.mark.parametrize("at_once", [1, 5, 12])
def test_the_bound_draws_its_noise_however_many_timesteps_go_together(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, network, x0 = made(), Formula(True).eval(), pixels()
    labels = torch.arange(len(x0))
    monkeypatch.setattr(module, "BOUND_PIXELS", 0)
    torch.manual_seed(2)
    expected = d.calc_bpd_loop(network, x0, model_kwargs={"y": labels})
    batches: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    monkeypatch.setattr(module, "BOUND_PIXELS", at_once * x0[:, :1].numel())
    torch.manual_seed(2)
    found = d.calc_bpd_loop(network, x0, model_kwargs={"y": labels})
    assert max(batches) == at_once * len(x0)
    for name in expected:
        assert_near_peer(found[name], expected[name], 1e-6)
    assert found["vb"].shape == (len(x0), 12)
    batches.clear()
    d.calc_bpd_loop(network.train(), x0, model_kwargs={"y": labels})  # it may draw numbers of its own
    assert batches == [len(x0)] * 12


def test_the_likelihood_of_all_levels() -> None:
    """Exact probabilities add up to 1; those by the approximation of the normal's distribution, to 1 as well, but each
    is off."""
    levels = torch.arange(256) / 127.5 - 1
    mean, log_scale = torch.full_like(levels, 0.1), torch.full_like(levels, -3.0)
    approximate = discretized_gaussian_log_likelihood(levels, means=mean, log_scales=log_scale)
    exact = theory.discretized_gaussian_log_likelihood(levels, mean, 2 * log_scale)
    assert_near_peer(approximate.exp().sum(), torch.ones(()), 1e-5)
    assert_near_peer(exact.exp().sum(), torch.ones(()), 1e-5)
    assert 1e-4 < (approximate - exact)[exact > -8].abs().max() < 0.1
    x = torch.linspace(-4, 4, 100)
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 3e-4
    assert_near_peer(x * approx_standard_normal_cdf(x), nn.functional.gelu(x, approximate="tanh"), 1e-6)  # the same one
    with pytest.raises(ValueError, match="expected means and log_scales of the shape of x"):
        discretized_gaussian_log_likelihood(levels, means=mean[:1], log_scales=log_scale)


def test_normal_kl_takes_numbers() -> None:
    mean = torch.tensor([0.5, -1.0])
    assert_near_peer(normal_kl(mean, 0.0, 0.0, 0.0), mean**2 / 2, 1e-6)
    assert_near_peer(normal_kl(0.0, 0.0, mean, 0.0), mean**2 / 2, 1e-6)
    with pytest.raises(ValueError, match="expected at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_it_is_copied_and_stored() -> None:
    d = create_gaussian_diffusion(steps=25, timestep_respacing="5")
    d.p_sample_loop(Formula(False), SHAPE)
    for again in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert again.timestep_map == d.timestep_map
        assert (again.betas == d.betas).all()


def test_a_bar_and_the_default_device(capsys: pytest.CaptureFixture[str]) -> None:
    made().p_sample_loop(Formula(True), SHAPE, progress=True)
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.q_sample(pixels(), torch.zeros(4).long(), torch.zeros(1)), ValueError, "expected noise of shape"),
        (lambda d: d.q_posterior_mean_variance(pixels(), torch.zeros(1), 0), ValueError, "expected x_start of shape"),
        (lambda d: d.p_sample(Formula(True), pixels(), torch.tensor(3)), ValueError, "expected t of shape"),
        (lambda d: d.p_sample(Formula(False), pixels(), torch.zeros(4).long()), ValueError, "twice the channels"),
        (lambda d: d.p_sample_loop(Formula(False), SHAPE), ValueError, "twice the channels"),
        (lambda d: d.p_sample_loop(Formula(True), 4), TypeError, "expected shape to be a tuple or list"),
        (lambda d: d.p_sample_loop(lambda x, t: x, SHAPE), TypeError, "expected device with a model that is no module"),
        (lambda d: d.ddim_reverse_sample(None, pixels(), 0, eta=0.5), ValueError, "expected eta = 0, got 0.5"),
        (lambda d: d.ddim_sample_loop(Formula(True), SHAPE, eta=-1.0), ValueError, "expected eta in"),
        (lambda d: made(betas=[0.1, 1.5]), ValueError, "expected betas in"),
        (lambda d: SpacedDiffusion([12], betas=d.betas), ValueError, "expected use_timesteps in"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(made())
