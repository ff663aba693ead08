"""Each op against its equations, written out here in other words than in its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastddpm
from fastddpm.ops import philox
from tests.ops.cases import IMPLEMENTATIONS
from tests.tolerance import assert_equal_to_rounding, assert_within

DRAW: dict[str, Any] = dict(seed=5, sample=torch.arange(3), step=4)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: rand(*shape, seed=n).requires_grad_() for n, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("activation", [True, False])
def test_group_norm_silu_with_everything(activation: bool) -> None:
    """Value and every gradient against torch's own group_norm, silu and autograd."""
    p = leaves(
        x=(3, 10, 3, 5), x2=(3, 2, 3, 5), weight=(12,), bias=(12,), channel_bias=(3, 12), scale=(3, 12), shift=(3, 12),
        residual=(3, 12, 3, 5),
    )  # fmt: skip
    y, total = fastddpm.group_norm_silu(
        **p, num_groups=4, eps=1e-5, dropout=0.25, layer=3, activation=activation, **DRAW
    )
    h = torch.cat([p["x"], p["x2"]], 1) + p["channel_bias"][..., None, None] + p["residual"]
    n = F.group_norm(h, 4, p["weight"], p["bias"], 1e-5)
    n = n * (1 + p["scale"])[..., None, None] + p["shift"][..., None, None]
    n = F.silu(n) if activation else n
    words = philox.integers(12 * 15, stream=philox.DROPOUT + 3, **DRAW).reshape(3, 12, 3, 5)
    expected = n * (words >= 2**30) / 0.75
    assert_equal_to_rounding(y, expected, ulps=64, scale=10.0)
    assert torch.equal(total, h)
    upstream = rand(3, 12, 3, 5, seed=20), rand(3, 12, 3, 5, seed=21)
    ours = torch.autograd.grad([y, total], list(p.values()), upstream)
    theirs = torch.autograd.grad([expected, h], list(p.values()), upstream)
    for name, a, b in zip(p, ours, theirs, strict=True):
        assert_equal_to_rounding(a, b, ulps=256, scale=max(1.0, float(b.abs().max()))), name


def test_group_norm_silu_gradient_by_differences() -> None:
    p = leaves(x=(2, 4, 2, 3), weight=(4,), bias=(4,), channel_bias=(4,))
    assert torch.autograd.gradcheck(
        lambda x, w, b, c: fastddpm.group_norm_silu(x, w, b, 2, channel_bias=c, eps=1e-3), tuple(p.values())
    )


def test_dropout_belongs_to_the_sample_and_the_layer() -> None:
    x, ones, zeros = rand(3, 8, 16, 16), torch.ones(8), torch.zeros(8)

    def dropped(rows: slice, **changes: Any) -> Tensor:
        given = {**DRAW, "sample": DRAW["sample"][rows], **changes}
        y = fastddpm.group_norm_silu(x[rows], ones, zeros, 2, dropout=0.3, **given)
        assert isinstance(y, Tensor)
        return y == 0

    whole = dropped(slice(None))
    assert torch.equal(whole[1:], dropped(slice(1, 3)))
    assert (whole != dropped(slice(None), layer=1)).any()
    assert (whole != dropped(slice(None), step=5)).any()
    n = whole.numel()
    assert abs(float(whole.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)


def test_rms_norm_silu() -> None:
    """x / ||x||_2 over channels, sqrt(C) g, with torch's own normalize."""
    p = leaves(x=(3, 6, 2, 5), weight=(6,), scale=(3, 6), shift=(3, 6))
    y = fastddpm.rms_norm_silu(**p)
    n = F.normalize(p["x"], dim=1) * math.sqrt(6) * p["weight"][:, None, None]
    expected = F.silu(n * (1 + p["scale"])[..., None, None] + p["shift"][..., None, None])
    assert_equal_to_rounding(y, expected, ulps=32, scale=5.0)
    upstream = rand(3, 6, 2, 5, seed=9)
    for a, b in zip(
        torch.autograd.grad(y, list(p.values()), upstream),
        torch.autograd.grad(expected, list(p.values()), upstream),
        strict=True,
    ):
        assert_equal_to_rounding(a, b, ulps=128, scale=max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("heads", [1, 3])
def test_self_attention(heads: int) -> None:
    """Value and gradient against torch's own attention and autograd."""
    qkv = leaves(qkv=(2, 5, 18))["qkv"]
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = fastddpm.self_attention(qkv, heads)
    assert_equal_to_rounding(y, expected, ulps=64, scale=10.0)
    upstream = rand(2, 5, 6, seed=9)
    (ours,), (theirs,) = torch.autograd.grad(y, qkv, upstream), torch.autograd.grad(expected, qkv, upstream)
    assert_equal_to_rounding(ours, theirs, ulps=64, scale=10.0)


def test_self_attention_of_one_token_is_its_value() -> None:
    """And of equal keys the mean of the values."""
    qkv = rand(4, 1, 3, 6)
    assert torch.equal(fastddpm.self_attention(qkv.flatten(2), 2), qkv[:, :, 2])
    qkv = rand(4, 7, 3, 6)
    qkv[:, :, 1] = 2.0
    expected = qkv[:, :, 2].mean(1, keepdim=True).expand(4, 7, 6)
    assert_equal_to_rounding(fastddpm.self_attention(qkv.flatten(2), 2), expected, ulps=64, scale=10.0)


def test_self_attention_gradient_by_differences() -> None:
    qkv = leaves(qkv=(2, 4, 12))["qkv"]
    assert torch.autograd.gradcheck(lambda x: fastddpm.self_attention(x, 2), qkv)


def test_q_sample_from_stored_pixels() -> None:
    images = torch.arange(4 * 2 * 2 * 3, dtype=torch.uint8).reshape(4, 2, 2, 3) * 5
    index, flip, t = torch.tensor([3, 0, 3]), torch.tensor([True, False, False]), torch.tensor([1, 0, 1])
    table = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    x_t, v = fastddpm.q_sample(images, t, table, index=index, flip=flip, returns="v", dtype=torch.float64, **DRAW)
    eps = philox.normal((3, 2, 2, 3), stream=philox.TRAINING_NOISE, dtype=torch.float64, **DRAW)
    for b in range(3):
        x0 = images[index[b]].double() / 127.5 - 1
        x0 = x0[..., [2, 1, 0]] if flip[b] else x0
        a, s = table[t[b]]
        assert_equal_to_rounding(x_t[b], a * x0 + s * eps[b], scale=4.0)
        assert_equal_to_rounding(v[b], a * eps[b] - s * x0, scale=4.0)


def test_diffusion_loss_draws_what_q_sample_drew() -> None:
    images, t = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8), torch.tensor([0, 2, 1])
    abar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    table = torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1)
    pred = rand(3, 3, 4, 5)
    for objective, returns in (("eps", "noise"), ("x0", "x0"), ("v", "v")):
        _, target = fastddpm.q_sample(images, t, table, returns=returns, dtype=torch.float64, **DRAW)
        drawn, _ = fastddpm.diffusion_loss(pred, t, objective=objective, x0=images, table=table, **DRAW)
        assert_equal_to_rounding(drawn, (pred - target).square().mean(), ulps=32)


def test_gradient_of_the_loss_with_the_term_of_the_bound() -> None:
    """Against autograd of the decoder and the KL divergence; the mean gets the gradient of the squared error alone."""
    pred = rand(3, 4, 3, 3).requires_grad_()
    t, x0 = torch.tensor([0, 2, 1]), torch.randint(17, (3, 2, 3, 3), dtype=torch.uint8)
    target, weight = rand(3, 2, 3, 3, seed=3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    vlb = torch.tensor([[0.05, -6, -3, -5.0], [0.2, -5, -2, -4], [0.3, -4, -1, -3]], dtype=torch.float64)
    loss, per_sample = fastddpm.diffusion_loss(
        pred, t, target=target, x0=x0, pixel_scale=2 / 16, weight=weight, vlb=vlb, vlb_weight=0.3, levels=17
    )

    mean, v = pred.chunk(2, 1)
    mse = weight * (mean - target).square().mean((1, 2, 3))
    bits = []
    for b in range(3):
        slope, low, high, logvar_q = vlb[t[b]]
        logvar = (v[b] + 1) / 2 * high + (1 - v[b]) / 2 * low
        error = (slope * (mean[b] - target[b])).detach()
        if t[b] == 0:
            clean, std = x0[b] / 8 - 1.0, torch.exp(logvar / 2)
            upper = torch.where(x0[b] == 16, 1.0, torch.special.ndtr((1 / 16 - error) / std))
            lower = torch.where(x0[b] == 0, 0.0, torch.special.ndtr((-1 / 16 - error) / std))
            assert clean.shape == error.shape
            nats = -torch.log(upper - lower)
        else:
            q = torch.distributions.Normal(torch.zeros_like(error), torch.exp(logvar_q / 2))
            nats = torch.distributions.kl_divergence(q, torch.distributions.Normal(error, torch.exp(logvar / 2)))
        bits.append(nats.mean() / math.log(2))
    expected = mse + 0.3 * torch.stack(bits)
    assert_equal_to_rounding(per_sample, expected, ulps=512)
    assert_equal_to_rounding(loss, expected.mean(), ulps=512)
    (ours,), (theirs,) = (torch.autograd.grad(3 * value, pred, retain_graph=True) for value in (loss, expected.mean()))
    assert_equal_to_rounding(ours, theirs, ulps=2048, scale=float(theirs.abs().max()))
    (of_mse,) = torch.autograd.grad(3 * mse.mean(), pred)
    assert_equal_to_rounding(ours[:, :2], of_mse[:, :2], ulps=16)


WITH_A_GRADIENT: dict[str, Callable[[Tensor], Tensor]] = {
    "diffusion_loss": lambda x: fastddpm.diffusion_loss(x, torch.tensor([0, 0]), target=torch.zeros_like(x))[0],
    "group_norm_silu": lambda x: fastddpm.group_norm_silu(x, torch.ones(4), torch.zeros(4), 2).sum(),
    "rms_norm_silu": lambda x: fastddpm.rms_norm_silu(x, torch.ones(4)).sum(),
    "conv3x3": lambda x: fastddpm.conv3x3(x, torch.ones(2, 4, 3, 3)).sum(),
    "linear": lambda x: fastddpm.linear(x, torch.ones(2, 4)).sum(),
    "self_attention": lambda x: fastddpm.self_attention(x.flatten(2).mT.repeat(1, 1, 3)).sum(),
}


@pytest.mark.parametrize("upstream", ["a loss", "another gradient"])
@pytest.mark.parametrize("op", WITH_A_GRADIENT)
def test_gradient_of_the_gradient_is_refused(op: str, upstream: str) -> None:
    """A penalty on the gradient raises: without that it would be missing from the gradient of what lies before."""
    before = rand(1).requires_grad_()
    x = rand(2, 4, 4, 4) * before
    y = WITH_A_GRADIENT[op](x)
    loss = y if upstream == "a loss" else y.square()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of the gradient"):
        (loss + gradient.square().sum()).backward()


def test_the_losses_of_the_samples_have_no_gradient() -> None:
    pred = rand(1, 1, 2, 2).requires_grad_()
    _, per_sample = fastddpm.diffusion_loss(pred, torch.tensor([0]), target=torch.zeros(1, 1, 2, 2))
    assert not per_sample.requires_grad


def test_solver_step_is_the_ddpm_update() -> None:
    """x_{t-1} = (x_t - (1 - alpha) / sqrt(1 - abar) eps) / sqrt(alpha) + sigma z (Ho et al. 2020, algorithm 2)."""
    alpha, abar = 0.97, 0.4
    x, eps, z = (rand(2, 3, 4, 4, seed=n) for n in range(3))
    k0, k1 = 1 / math.sqrt(abar), -math.sqrt(1 - abar) / math.sqrt(abar)
    before = abar / alpha
    k2, k3 = math.sqrt(before) * (1 - alpha) / (1 - abar), math.sqrt(alpha) * (1 - before) / (1 - abar)
    table = torch.tensor([[k0, k1, k2, k3, 0, math.sqrt(1 - alpha), 0, 0, 0]], dtype=torch.float64)
    x_next, pred = fastddpm.solver_step(x, eps, table, 0, noise=z)
    expected = (x - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha) + math.sqrt(1 - alpha) * z
    assert_equal_to_rounding(x_next, expected, ulps=16, scale=4.0)
    assert_equal_to_rounding(pred, (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar), ulps=16, scale=4.0)


def test_solver_step_options() -> None:
    x, out, uncond = rand(2, 3, 4, 4), rand(2, 6, 4, 4, seed=1), rand(2, 6, 4, 4, seed=2)
    table = torch.tensor(
        [[0.5, 2, 1, 0.3, 0.2, 0.7, 0.1, -3, -1], [0.5, 2, 1, 0, 0, 0, 0, -3, -1]], dtype=torch.float64
    )
    z, previous = rand(2, 3, 4, 4, seed=3), rand(2, 3, 4, 4, seed=4)
    given: dict[str, Any] = dict(noise=z, pred_prev=previous, out_uncond=uncond)
    for w in (0.0, 1.0, 3.0):
        o = (1 - w) * uncond[:, :3] + w * out[:, :3]
        f = (out[:, 3:] + 1) / 2  # the variance is that of the conditional half
        bound = torch.tensor([0.5, 2.0], dtype=torch.float64)
        pred = torch.minimum(torch.maximum(0.5 * x + 2 * o, -bound.view(2, 1, 1, 1)), bound.view(2, 1, 1, 1))
        deviation = torch.exp(0.5 * (-1 * f - 3 * (1 - f)))
        expected = pred + 0.3 * x + 0.2 * previous + deviation * z + 0.1 * o
        got, got_pred = fastddpm.solver_step(x, out, table, 0, guidance_scale=w, clamp=bound, **given)
        assert_equal_to_rounding(got_pred, pred, ulps=16, scale=8.0)
        assert_equal_to_rounding(got, expected, ulps=32, scale=8.0)
    last, pred = fastddpm.solver_step(x, out, table, torch.tensor(1), clamp=1.0, **given)
    assert torch.equal(last, pred)  # k5 = 0 is no noise, whatever the learned variance
    assert float(pred.abs().max()) == 1.0


def test_solver_step_keeps_the_known_part_and_writes_in_place() -> None:
    x, out, known = rand(3, 1, 4, 4), rand(3, 1, 4, 4, seed=1), rand(3, 1, 4, 4, seed=2)
    table = torch.tensor([[0.5, 0.5, 1, 0, 0, 0.1, 0, 0, 0]] * 2, dtype=torch.float64)
    mask = (torch.arange(4) < 2).double().expand(1, 1, 4, 4).contiguous()
    levels = torch.tensor([[0.8, 0.6], [1.0, 0.0]], dtype=torch.float64)
    given: dict[str, Any] = dict(seed=1, sample=torch.arange(3), mask=mask, known=known, known_table=levels)
    free, _ = fastddpm.solver_step(x, out, table, 0, seed=1, sample=torch.arange(3))
    noised, _ = fastddpm.solver_step(x, out, table, 0, **given)
    eps = philox.normal(
        (3, 1, 4, 4), seed=1, sample=torch.arange(3), step=0, stream=philox.TRAINING_NOISE, dtype=x.dtype
    )
    assert_equal_to_rounding(noised[..., :2], (0.8 * known + 0.6 * eps)[..., :2], scale=4.0)
    assert torch.equal(noised[..., 2:], free[..., 2:])
    state, previous = x.clone(), torch.zeros_like(x)
    ended, pred = fastddpm.solver_step(state, out, table, 1, inplace=True, pred_prev=previous, **given)
    assert ended is state
    assert pred is previous
    assert torch.equal(ended[..., :2], known[..., :2])


def parameters(layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    made = [rand(4, 3, 3, 3, seed=1).float(), rand(5, 2, seed=2).float(), rand(7, seed=3).float()]
    return [x.to(memory_format=layout) if x.dim() == 4 else x for x in made]


def test_adam_ema_is_adamw_with_clipping_over_20_steps() -> None:
    stock = [p.double().requires_grad_() for p in parameters()]
    optimizer = torch.optim.AdamW(stock, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    average = [p.detach().clone() for p in stock]
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = [p.double() for p in parameters(layout)]
        m, v, ema = ([torch.zeros_like(p) for p in ours] for _ in range(3))
        for e, p in zip(ema, ours, strict=True):
            e.copy_(p)
        mirror = [torch.zeros_like(p, dtype=torch.bfloat16) for p in ours]
        step = torch.tensor(0)
        for n in range(20):
            grads = [torch.empty_like(p).copy_(rand(*p.shape, seed=100 * n + i)) for i, p in enumerate(ours)]
            norm = fastddpm.adam_ema(
                ours, [64 * g for g in grads], m, v, step=step, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1,
                max_grad_norm=1.5, ema=ema, ema_decay=0.9, mirror=mirror, grad_scale=torch.tensor(64.0),
            )  # fmt: skip
            if layout == torch.contiguous_format:
                for p, g in zip(stock, grads, strict=True):
                    p.grad = g.clone()
                assert_equal_to_rounding(norm, torch.nn.utils.clip_grad_norm_(stock, 1.5), ulps=64)
                optimizer.step()
                for e, p in zip(average, stock, strict=True):
                    e.mul_(0.9).add_(p.detach(), alpha=0.1)
        assert int(step) == 20
        for p, e, h, q, a in zip(ours, ema, mirror, stock, average, strict=True):
            assert_equal_to_rounding(p, q, ulps=4096, scale=1.0)
            assert_equal_to_rounding(e, a, ulps=4096, scale=1.0)
            assert torch.equal(h, p.bfloat16())


@pytest.mark.parametrize("cause", ["found_inf", "gradient"])
def test_adam_ema_skips_everything(cause: str) -> None:
    p = parameters()
    grads, m, v, ema = ([torch.ones_like(x) for x in p] for _ in range(4))
    mirror = [x.bfloat16() for x in p]
    before = [x.clone() for x in (*p, *m, *v, *ema, *mirror)]
    found_inf, step = torch.tensor(1.0 if cause == "found_inf" else 0.0), torch.tensor(3)
    if cause == "gradient":
        grads[1][0, 0] = math.inf
    fastddpm.adam_ema(
        p, grads, m, v, step=step, lr=torch.tensor(0.1), ema=ema, ema_decay=0.5, mirror=mirror, weight_decay=0.1,
        found_inf=found_inf,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, (*p, *m, *v, *ema, *mirror), strict=True))
    assert int(step) == 3
    assert float(found_inf) == 1


@pytest.mark.parametrize("backend", [name for op, name in IMPLEMENTATIONS if op == "adam_ema"])
def test_adam_ema_takes_gradients_and_mirrors_of_several_dtypes(backend: str) -> None:
    """As where weights have half-precision gradients, and norms others: the step of the same numbers in float32."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    sizes = (2055, 7, 0, 16, 33, 9, 1)
    grads = [rand(n, seed=i).to(dtypes[i % 3]) for i, n in enumerate(sizes)]
    found = []
    for mixed in (False, True):
        p, m, v = ([rand(n, seed=10 * k + i).float().abs() for i, n in enumerate(sizes)] for k in range(1, 4))
        mirror = [torch.zeros_like(x, dtype=dtypes[(i // 2) % 3] if mixed else torch.bfloat16) for i, x in enumerate(p)]
        given, step = (grads if mixed else [g.float() for g in grads]), torch.tensor(3)
        with fastddpm.use_backend(backend):
            options: Any = dict(step=step, lr=0.1, mirror=mirror, found_inf=torch.tensor(0.0))
            norm = fastddpm.adam_ema(p, given, m, v, **options)
            assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mirror, p, strict=True))
            before = [x.clone() for x in (*p, *m, *v, *mirror)]
            fastddpm.adam_ema(p, given, m, v, **options | dict(found_inf=torch.tensor(1.0)))
        assert int(step) == 4 and all(torch.equal(a, b) for a, b in zip(before, (*p, *m, *v, *mirror), strict=True))
        found.append((norm, torch.cat([*p, *m, *v])))
    assert_equal_to_rounding(found[1][0], found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def test_adam_ema_refuses_moments_in_another_order() -> None:
    """The stock fused AdamW is silently wrong with channels_last parameters and contiguous moments."""
    p = parameters(torch.channels_last)
    wrong = [torch.zeros(x.shape) for x in p]
    right = [torch.zeros_like(x) for x in p]
    with pytest.raises(ValueError, match=r"exp_avg\[0\].*torch.zeros_like"):
        fastddpm.adam_ema(p, right, wrong, right, step=torch.tensor(0), lr=0.1)


def test_float32_ops_are_near_float64_ones() -> None:
    """The arithmetic is float32 throughout, whatever the dtype of x: bf16 input has float32 statistics."""
    x = (20 + 0.1 * rand(2, 8, 16, 16)).bfloat16()
    weight, bias = torch.ones(8), torch.zeros(8)
    y = fastddpm.group_norm_silu(x, weight, bias, 4)
    exact = F.silu(F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6))
    assert isinstance(y, Tensor)
    assert_within(y, exact, exact.float())


def test_gradient_of_the_sum_alone_or_of_few_inputs() -> None:
    """An output that nobody uses and an input that needs no gradient are left out, the others stay right."""
    p = leaves(x=(2, 4, 3, 3), weight=(4,), bias=(4,), residual=(2, 4, 3, 3))
    upstream = rand(2, 4, 3, 3, seed=9)
    _, total = fastddpm.group_norm_silu(**p, num_groups=2)
    of_sum = torch.autograd.grad(total, list(p.values()), upstream)
    assert torch.equal(of_sum[0], upstream)
    assert torch.equal(of_sum[3], upstream)
    assert not of_sum[1].any()
    y, _ = fastddpm.group_norm_silu(**p, num_groups=2)
    expected = torch.autograd.grad(y, [p["x"], p["bias"]], upstream)
    frozen = p | {name: p[name].detach() for name in ("weight", "residual")}
    y, _ = fastddpm.group_norm_silu(**frozen, num_groups=2)
    for a, b in zip(torch.autograd.grad(y, [p["x"], p["bias"]], upstream), expected, strict=True):
        assert torch.equal(a, b)


def test_rms_norm_silu_gradient_by_differences() -> None:
    """Also where eps is the divisor, and so a constant."""
    p = leaves(x=(2, 4, 2, 3), weight=(4,), scale=(2, 4), shift=(2, 4))
    for eps in (1e-12, 50.0):
        assert torch.autograd.gradcheck(
            lambda x, w, s, b, eps=eps: fastddpm.rms_norm_silu(x, w, scale=s, shift=b, eps=eps), tuple(p.values())
        )
    pixel = torch.zeros(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    y = fastddpm.rms_norm_silu(pixel, p["weight"], activation=False)
    assert not y.any()
    (gradient,) = torch.autograd.grad(y.sum(), pixel)
    assert_equal_to_rounding(gradient.flatten(), 2e12 * p["weight"])


def test_the_gradient_of_the_loss_survives_half_precision() -> None:
    """At 128 CIFAR-10 images 1 / n is 2.5e-6, where float16 has 5 bits left; with a gradient scale no more are lost.

    What is kept is the gradient of 2^k loss, 2^k > n; the upstream gradient multiplies in float32, then all is rounded.
    """
    t = torch.zeros(128, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16):
        pred, target = rand(128, 3, 32, 32).to(dtype).requires_grad_(), rand(128, 3, 32, 32, seed=1).float()
        loss, _ = fastddpm.diffusion_loss(pred, t, target=target)
        (of_scaled,) = torch.autograd.grad(loss * 2**16, pred, retain_graph=True)
        exact = 2**17 * (pred.detach().double() - target.double()) / pred.numel()
        assert_within(of_scaled, exact, exact.float())
        (kept,) = torch.autograd.grad(loss * 2**19, pred, retain_graph=True)
        (of_other,) = torch.autograd.grad(loss, pred, torch.tensor(0.7 * 2**16))
        assert torch.equal(of_other, (kept.float() * torch.tensor(0.7 * 2**16 / 2**19)).to(dtype))


def test_the_loss_is_the_same_without_a_gradient() -> None:
    pred, t = rand(2, 4, 3, 3).float(), torch.tensor([0, 1])
    given: dict[str, Any] = dict(
        target=rand(2, 2, 3, 3, seed=1), x0=torch.zeros(2, 2, 3, 3, dtype=torch.uint8), vlb=torch.zeros(2, 4),
        vlb_weight=1.0,
    )  # fmt: skip
    plain = fastddpm.diffusion_loss(pred, t, **given)
    with_gradient = fastddpm.diffusion_loss(pred.clone().requires_grad_(), t, **given)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_gradient, strict=True))
    assert not plain[0].requires_grad


def test_an_impossible_pixel_counts_as_the_least_probability() -> None:
    """The decoder's probability is bounded below, and there its gradient is 0: no inf, no nan."""
    pred = torch.tensor([60.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    vlb = torch.tensor([[1.0, -9.0, -8.0, -9.0]])
    zero = torch.zeros(1, 1, 1, 1)
    for t, bits in ((0, -math.log2(1e-12)), (1, None)):
        loss, _ = fastddpm.diffusion_loss(
            pred, torch.tensor([t]), target=zero, x0=zero, pixel_scale=1.0, pixel_shift=0.0, weight=torch.zeros(1),
            vlb=vlb.repeat(2, 1), vlb_weight=1.0,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, pred)
        assert torch.isfinite(gradient).all()
        if bits is not None:
            assert_equal_to_rounding(loss, torch.tensor(bits))
            assert not gradient.any()


def test_adam_ema_takes_either_stride_of_a_single_element() -> None:
    """A 1x1 convolution has two stride patterns for one memory order, and both are taken."""
    p = torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3), dtype=torch.float64).copy_(rand(4, 3, 1, 1))
    g = rand(4, 3, 1, 1, seed=1)
    assert p.stride() != g.stride()
    state = [torch.zeros(4, 3, 1, 1, dtype=torch.float64) for _ in range(2)]
    before = p.clone()
    norm = fastddpm.adam_ema([p], [g], state[:1], state[1:], step=torch.tensor(0), lr=0.1)
    assert_equal_to_rounding(norm, g.norm())
    assert_equal_to_rounding(p, before - 0.1 * g.sign(), ulps=2**30)  # the first step is lr sign(g), but for eps
