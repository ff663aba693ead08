"""B6, the weights of B7, and B8 of the theory."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastddpm.diffusion import (
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    q_posterior,
    q_sample,
)
from fastddpm.ops import diffusion_loss, philox
from fastddpm.prediction import PREDICTIONS, value_from_x0
from fastddpm.schedule import Schedule, make_schedule
from fastddpm.weighting import (
    LossSecondMoment,
    hybrid_vlb_weight,
    min_snr_weight,
    p2_weight,
    simple_weight,
    stratified_timesteps,
    uniform_timesteps,
    vlb_table,
    vlb_weight,
)
from tests.tolerance import assert_equal_to_rounding

SCHEDULES = {
    "linear": make_schedule("linear", 1000),
    "log_snr": make_schedule("log_snr", 20),
    "zero terminal SNR": make_schedule("linear", 50, zero_terminal_snr=True),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def kinds(schedule: Schedule) -> list[str]:
    return [kind for kind in PREDICTIONS if not (kind == "eps" and schedule.zero_terminal_snr)]


def predicted(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the true x_0 and a wrong one, [T, 3] each; the error is 1 to 2, so that differences keep their digits."""
    x0, error, eps = torch.randn(3, schedule.num_timesteps, 3, dtype=torch.float64)
    x_t = schedule.signal_sigma[:, :1] * x0 + schedule.signal_sigma[:, 1:] * eps
    return x_t, x0, x0 + 1 + error.sigmoid()


def errors(schedule: Schedule) -> dict[str, Tensor]:
    """Mean squared error [T] of one wrong network, seen as each kind of prediction."""
    t, (x_t, x0, wrong) = torch.arange(schedule.num_timesteps), predicted(schedule)
    return {
        kind: (value_from_x0(kind, wrong, x_t, t, schedule) - value_from_x0(kind, x0, x_t, t, schedule))
        .square()
        .mean(1)
        for kind in PREDICTIONS
    }


# weights


@every_schedule
def test_b6_the_term_of_the_bound_in_each_parameterisation(schedule: Schedule) -> None:
    """1 / (2 sigma_q^2) times each of the squares of the theory: one number, and the one that the weight gives."""
    error = {kind: square[1:] for kind, square in errors(schedule).items()}
    alpha, beta, abar_prev, noise, variance = (
        table[1:]
        for table in (
            schedule.alphas,
            schedule.betas,
            schedule.alphas_cumprod_prev,
            schedule.one_minus_alphas_cumprod,
            schedule.posterior_variance,
        )
    )
    terms = {
        "mu": error["mu"] / (2 * variance),
        "x0": abar_prev * beta**2 / noise**2 * error["x0"] / (2 * variance),
        "eps": beta**2 / (noise * alpha) * error["eps"] / (2 * variance),
        "v": abar_prev * beta**2 / noise * error["v"] / (2 * variance),
    }
    for kind in kinds(schedule):
        # the values that are compared are up to 1 / sigma_1 = 100 times their difference
        assert_equal_to_rounding(terms[kind], terms["x0"], ulps=1e4)
        assert_equal_to_rounding(vlb_weight(kind, schedule)[1:] * error[kind], terms["x0"], ulps=1e4)


@every_schedule
def test_vlb_weight_of_x0_is_half_the_fall_of_the_snr(schedule: Schedule) -> None:
    """L_{t-1} = (s_{t-1} - s_t) / 2 times the squared error of x_0 (Kingma et al. 2021, eq. 13)."""
    snr = schedule.alphas_cumprod / schedule.one_minus_alphas_cumprod
    weight = vlb_weight("x0", schedule)
    assert_equal_to_rounding(weight[1:], (snr[:-1] - snr[1:]) / 2, ulps=100, scale=snr[:-1])


@every_schedule
def test_vlb_weight_at_the_first_step_is_that_of_the_second(schedule: Schedule) -> None:
    for kind in kinds(schedule):
        weight = vlb_weight(kind, schedule)
        assert weight[0] == weight[1] and weight.isfinite().all() and (weight > 0).all()


def test_min_snr_and_p2_by_hand() -> None:
    """abar = 0.9, 0.5, 0.1 and 0: s = 9, 1, 1/9 and 0."""
    abar = torch.tensor([1, 0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    zero = Schedule.from_betas(1 - abar[1:] / abar[:-1])
    some = Schedule.from_betas((1 - abar[1:] / abar[:-1])[:3])

    def expect(weight: Tensor, *values: float) -> None:
        assert_equal_to_rounding(weight, torch.tensor(values, dtype=torch.float64), ulps=20)

    expect(min_snr_weight("eps", some), 5 / 9, 1, 1)
    expect(min_snr_weight("x0", zero), 5, 1, 1 / 9, 0)
    expect(min_snr_weight("v", zero), 5 / 10, 1 / 2, 1 / 10, 0)
    expect(min_snr_weight("v", zero, gamma=0.5), 0.5 / 10, 0.5 / 2, 1 / 10, 0)
    expect(p2_weight(zero), 1 / 10, 1 / 2, 9 / 10, 1)
    expect(p2_weight(zero, gamma=2), 1 / 100, 1 / 4, 81 / 100, 1)
    expect(p2_weight(zero, gamma=0), 1, 1, 1, 1)
    expect(simple_weight(zero), 1, 1, 1, 1)
    assert hybrid_vlb_weight(1000) == 1 and hybrid_vlb_weight(4000) == 4


@every_schedule
def test_min_snr_is_one_loss_for_each_kind(schedule: Schedule) -> None:
    error = errors(schedule)
    for kind in kinds(schedule):
        if kind != "mu":
            found = min_snr_weight(kind, schedule) * error[kind]
            assert_equal_to_rounding(found, min_snr_weight("x0", schedule) * error["x0"], ulps=1e4)


@every_schedule
@pytest.mark.parametrize("first", ["copy", "tiny"])
def test_vlb_table(schedule: Schedule, first: str) -> None:
    schedule = Schedule.from_betas(schedule.betas, first)
    error = errors(schedule)
    ln_beta, ln_q = torch.log(schedule.betas), schedule.posterior_log_variance_clipped
    for kind in kinds(schedule):
        table = vlb_table(kind, schedule, "learned_range")
        assert table.shape == (schedule.num_timesteps, 4) and table.dtype == torch.float64
        # mu_theta - mu_q; at the first step mu_theta is the predicted x_0, and m its error by that of the prediction
        assert_equal_to_rounding(table[:, 0].square() * error[kind], error["mu"], ulps=1e4)
        assert_equal_to_rounding(table[0, 0].square() * error[kind][0], error["x0"][0], ulps=1e4)
        assert torch.equal(table[:, 1:], torch.stack([ln_q, ln_beta, ln_q], dim=1))
        learned = vlb_table(kind, schedule, "learned")
        assert torch.equal(learned[:, [0, 3]], table[:, [0, 3]])
        v = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
        f = (v + 1) / 2
        assert torch.equal(f * learned[:, 2] + (1 - f) * learned[:, 1], v.expand(7, schedule.num_timesteps))


def test_slope_of_the_mean_has_its_sign() -> None:
    """The mean rises with mu and x_0, and falls with eps and v."""
    schedule = SCHEDULES["linear"]
    t, (x_t, x0, wrong) = torch.arange(1000), predicted(schedule)
    for kind in PREDICTIONS:
        difference = value_from_x0(kind, wrong, x_t, t, schedule) - value_from_x0(kind, x0, x_t, t, schedule)
        mean_error = vlb_table(kind, schedule, "learned_range")[:, :1] * difference
        assert_equal_to_rounding(mean_error, schedule.posterior_mean_coef1[:, None] * (wrong - x0), ulps=1e4)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_vlb_table_makes_the_term_of_the_bound(kind: str, variance: str) -> None:
    """B7: the op with this table gives KL(q || p_theta), at t = 0 the decoder, in bits, and no gradient to the mean."""
    schedule = SCHEDULES["log_snr"]
    t = torch.arange(20)
    x0 = torch.randint(0, 17, (20, 1, 3, 3)).double() / 8 - 1
    x_t = q_sample(x0, t, torch.randn(20, 1, 3, 3, dtype=torch.float64), schedule)
    target = value_from_x0(kind, x0, x_t, t, schedule)
    out = torch.cat([target + 0.1 * torch.randn_like(target), torch.rand_like(target) - 0.5], dim=1).requires_grad_()

    mean, log_variance, _ = p_mean_variance(out.detach(), x_t, t, schedule, kind, variance, clip=False)
    mean_q, _, log_variance_q = q_posterior(x0, x_t, t, schedule)
    kl = normal_kl(mean_q, log_variance_q, mean, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, mean, log_variance, levels=17)
    bits = torch.where((t == 0)[:, None, None, None], decoder, kl).mean(dim=(1, 2, 3)) / math.log(2)

    loss, per_sample = diffusion_loss(
        out,
        t,
        target=target,
        x0=(x0 + 1) / 2,
        pixel_scale=2.0,
        weight=torch.zeros(20, dtype=torch.float64),
        vlb=vlb_table(kind, schedule, variance),
        vlb_weight=hybrid_vlb_weight(3000),
        levels=17,
    )
    loss.backward()
    assert_equal_to_rounding(per_sample, 3 * bits, ulps=1e4)
    assert out.grad is not None and (out.grad[:, 0] == 0).all()
    assert (out.grad[1:, 1] != 0).all()  # at t = 0 a decoder that is sure has a slope of 0


def test_errors_of_weights() -> None:
    schedule, one, zero = SCHEDULES["linear"], make_schedule("linear", 1), SCHEDULES["zero terminal SNR"]
    for refused, text in (
        (lambda: vlb_weight("x0", one), "vlb_weight: expected a schedule of at least 2 steps, got 1;"),
        (lambda: vlb_weight("noise", schedule), "expected kind to be one of eps, x0, v, mu, got 'noise'"),
        (lambda: vlb_weight("eps", zero), "got 'eps' with zero terminal SNR"),
        (lambda: min_snr_weight("eps", zero), "got 'eps' with zero terminal SNR"),
        (lambda: min_snr_weight("mu", schedule), "min_snr_weight: expected prediction 'eps', 'x0' or 'v', got 'mu';"),
        (lambda: min_snr_weight("v", schedule, gamma=0.0), "min_snr_weight: expected gamma > 0, got 0.0; 5 is usual"),
        (lambda: p2_weight(schedule, gamma=-1.0), "p2_weight: expected gamma >= 0, got -1.0; 1 is usual"),
        (
            lambda: vlb_table("eps", schedule, "fixed_large"),
            "expected variance 'learned' or 'learned_range', got 'fixed",
        ),
        (lambda: LossSecondMoment(0), "LossSecondMoment: expected num_timesteps >= 1, got 0;"),
        (lambda: LossSecondMoment(10, history=0), "LossSecondMoment: expected history >= 1, got 0; 10 is usual"),
    ):
        with pytest.raises(ValueError, match=text):
            refused()


# draws of t


def draws(sampler: Callable[..., Tensor], num_timesteps: int, batch: int, steps: int) -> Tensor:
    """t of ``steps`` batches: [steps, batch]."""
    sample = torch.arange(batch)
    return torch.stack([sampler(num_timesteps, seed=7, sample=sample, step=step) for step in range(steps)])


def assert_uniform(t: Tensor, num_timesteps: int) -> None:
    """Each value as often as the others: 5 standard deviations of its binomial count."""
    counts, n, p = torch.bincount(t.flatten(), minlength=num_timesteps), t.numel(), 1 / num_timesteps
    assert len(counts) == num_timesteps
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("sampler", [uniform_timesteps, stratified_timesteps])
def test_timesteps_belong_to_the_sample_and_the_step(sampler: Callable[..., Tensor]) -> None:
    t = draws(sampler, 1000, 64, 3)
    assert t.dtype == torch.int64 and t.shape == (3, 64) and t.min() >= 0 and t.max() < 1000
    assert torch.equal(t, draws(sampler, 1000, 64, 3)) and not torch.equal(t[0], t[1])
    as_tensors = sampler(1000, seed=torch.tensor(7), sample=torch.arange(64), step=torch.tensor(2))
    assert torch.equal(as_tensors, t[2])
    assert sampler(1000, seed=7, sample=torch.arange(0), step=0).shape == (0,)
    assert (sampler(1, seed=7, sample=torch.arange(9), step=0) == 0).all()


def test_uniform_timesteps() -> None:
    t = draws(uniform_timesteps, 10, 500, 40)
    assert_uniform(t, 10)
    assert torch.equal(uniform_timesteps(10, seed=7, sample=torch.arange(300, 400), step=3), t[3, 300:400])
    # two in a row are independent
    assert_uniform(t[:, 1:] * 10 + t[:, :-1], 100)


def test_stratified_timesteps() -> None:
    t = draws(stratified_timesteps, 12, 4, 2000)
    for row in range(4):
        assert_uniform(t[:, row], 12)
    assert (t.sort(dim=1).values // 3 == torch.arange(4)).all()  # one in each quarter
    assert (draws(stratified_timesteps, 100, 100, 20).sort(dim=1).values == torch.arange(100)).all()


def test_stratified_batches_vary_less() -> None:
    loss = torch.exp(-torch.arange(100, dtype=torch.float64) / 25)
    batches = {s: loss[draws(s, 100, 16, 400)].mean(dim=1) for s in (uniform_timesteps, stratified_timesteps)}
    for means in batches.values():
        assert (means.mean() - loss.mean()).abs() < 5 * means.std() / 400**0.5
    assert batches[stratified_timesteps].var() < batches[uniform_timesteps].var() / 10


# importance sampling


def trained(loss: Tensor, history: int = 4) -> LossSecondMoment:
    """A sampler that has seen loss[t] (1 + noise) at each t, as often as it remembers."""
    sampler = LossSecondMoment(len(loss), history)
    t = torch.arange(len(loss)).repeat(history)
    sampler.update(t, loss[t] * (0.8 + 0.4 * torch.rand(len(t))))
    return sampler


LOSS = torch.exp(-torch.arange(40) / 4.0)  # as in L_vlb: nearly all of it at the first steps


def test_importance_starts_uniform_and_waits_for_every_t() -> None:
    sampler, u = LossSecondMoment(10, history=3), torch.rand(50, dtype=torch.float64)
    for t in range(10):
        found, correction = sampler.sample(u)
        assert torch.equal(found, (u * 10).long()) and (correction == 1).all() and correction.dtype == torch.float32
        assert_equal_to_rounding(sampler.probabilities(), torch.full((10,), 0.1, dtype=torch.float64), ulps=1)
        sampler.update(torch.tensor([t, t, t]), torch.tensor([1.0, 2.0, 3.0]) * (t + 1))
    assert sampler.probabilities().argmax() == 9 and (sampler.sample(u)[1] != 1).all()


def test_importance_probabilities() -> None:
    """p_t is the root of the mean square, with a thousandth of a uniform distribution, to 40 bits."""
    sampler = LossSecondMoment(3, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 7.0, 5.0, 5.0, 0.0, 0.0]))
    root = [math.sqrt((1 + 49) / 2), 5.0, 0.0]
    for p, r in zip(sampler.probabilities().tolist(), root, strict=True):
        assert abs(p - (0.999 * r / sum(root) + 0.001 / 3)) < 2**-40


def test_importance_draws_with_its_probabilities() -> None:
    sampler = trained(LOSS)
    p = sampler.probabilities()
    n = 2**16
    t, correction = sampler.sample((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    # every quantile once: counts are exact but for the two ends of each t
    assert ((torch.bincount(t, minlength=40) - n * p).abs() <= 1).all()
    assert_equal_to_rounding(correction, (1 / (40 * p))[t].float(), ulps=1)
    assert sampler.sample(torch.tensor([0.0, 1.0]))[0].tolist() == [0, 39]
    assert LossSecondMoment(4).sample(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))[0].tolist() == [0, 1, 2, 3, 3]


def test_importance_is_unbiased_and_lowers_the_variance() -> None:
    sampler, loss, n = trained(LOSS), LOSS.double(), 20_000
    p = sampler.probabilities()
    correction_of = 1 / (40 * p)
    assert_equal_to_rounding((p * correction_of * loss).sum(), loss.mean())
    variance = (p * (correction_of * loss - loss.mean()) ** 2).sum()
    variance_of_uniform = (loss - loss.mean()).square().mean()
    assert variance < variance_of_uniform / 10

    u = philox.uniform(1, seed=3, sample=torch.arange(n), step=0, stream=philox.T).squeeze(1)
    t, correction = sampler.sample(u)
    estimates = correction * loss[t]
    assert (estimates.mean() - loss.mean()).abs() < 5 * (variance / n) ** 0.5
    assert (estimates.var() / variance - 1).abs() < 5 * (
        (estimates - loss.mean()).pow(4).mean() / variance**2 / n
    ) ** 0.5


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_importance_keeps_the_last_losses(batch: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a ring written one loss at a time, with batches that hold a t more often than it is remembered.

    The state may not depend on the order in which the device writes a batch.
    """
    scatter_ = torch.Tensor.scatter_
    if order == "backwards":
        backwards = lambda x, dim, index, values: scatter_(x, dim, index.flip(0), values.flip(0))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "scatter_", backwards)
    sampler, rings, seen = LossSecondMoment(5, history=3), torch.zeros(5, 3), [0] * 5
    for _ in range(20):
        t, losses = torch.randint(5, (batch,)), torch.rand(batch)
        sampler.update(t, losses)
        for s, loss in zip(t.tolist(), losses.tolist(), strict=True):
            rings[s, seen[s] % 3] = loss
            seen[s] += 1
        assert torch.equal(sampler.losses, rings) and sampler.counts.tolist() == seen


def test_importance_survives_losses_that_are_not_numbers() -> None:
    sampler = trained(LOSS)
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([math.nan, math.inf, -math.inf]))
    assert sampler.losses.isfinite().all()
    assert sampler.probabilities().argmax() == 0 and sampler.probabilities().argmin() > 30
    assert_equal_to_rounding(sampler.probabilities().sum(), 1.0)
    nothing = LossSecondMoment(4, history=1)
    nothing.update(torch.arange(4), torch.zeros(4))
    assert_equal_to_rounding(nothing.probabilities(), torch.full((4,), 0.25, dtype=torch.float64), ulps=1)


def test_importance_resumes_exactly() -> None:
    def run(sampler: LossSecondMoment, first: int, last: int) -> list[Tensor]:
        seen = []
        for step in range(first, last):
            u = philox.uniform(1, seed=5, sample=torch.arange(32), step=step, stream=philox.T).squeeze(1)
            t, correction = sampler.sample(u)
            sampler.update(t, LOSS[t % 8] * (1 + u))
            seen += [t, correction]
        return seen

    whole = run(LossSecondMoment(8, history=3), 0, 30)
    sampler = LossSecondMoment(8, history=3)
    before = run(sampler, 0, 17)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    resumed = LossSecondMoment(8, history=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(before + run(resumed, 17, 30), whole, strict=True):
        assert torch.equal(a, b)
    assert set(sampler.state_dict()) == {"losses", "counts"}
    with pytest.raises(RuntimeError, match="size mismatch for losses"):
        LossSecondMoment(9, history=3).load_state_dict(sampler.state_dict())


def test_no_draw_stops_the_device() -> None:
    """On the meta device, where tensors have no values, whatever asks the host for one, or for a copy, raises."""
    with torch.device("meta"):
        sampler, u = LossSecondMoment(10), torch.rand(6)
        seed, step, sample = (torch.zeros(shape, dtype=torch.int64) for shape in ((), (), (6,)))
    for draw in (uniform_timesteps, stratified_timesteps):
        assert draw(10, seed=seed, sample=sample, step=step).is_meta
    t, correction = sampler.sample(u)
    sampler.update(t, correction)
    assert t.is_meta and correction.is_meta and t.shape == correction.shape == (6,)
    with pytest.raises(RuntimeError, match="meta tensors"):
        sampler.counts.sum().item()


@pytest.mark.gpu
def test_importance_in_a_cuda_graph() -> None:
    """One step, captured once and replayed, draws and remembers what the host does."""
    step, losses = torch.zeros((), dtype=torch.int64, device="cuda"), LOSS[:8].cuda()
    sampler = LossSecondMoment(8, history=3).cuda()

    def train(sampler: LossSecondMoment, step: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        sample = torch.arange(32, device=step.device)
        u = philox.uniform(1, seed=5, sample=sample, step=step, stream=philox.T).squeeze(1)
        t, correction = sampler.sample(u)
        sampler.update(t, losses[t] * (1 + u))
        return t, correction

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train(LossSecondMoment(8, history=3).cuda(), step, losses)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        t, correction = train(sampler, step, losses)
    twin = LossSecondMoment(8, history=3)
    for n in range(30):
        step.fill_(n)
        graph.replay()
        expected_t, expected_correction = train(twin, torch.tensor(n), LOSS[:8])
        assert torch.equal(t.cpu(), expected_t)
        assert_equal_to_rounding(correction.cpu(), expected_correction, ulps=4)
    assert torch.equal(sampler.losses.cpu(), twin.losses) and torch.equal(sampler.counts.cpu(), twin.counts)
