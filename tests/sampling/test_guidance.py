"""Classifier-free guidance and dynamic thresholding, alone and in the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastddpm.ops.solver_step import solver_step
from fastddpm.sampling import (
    ddim_table,
    ddpm_table,
    dpmpp_2m_table,
    dynamic_threshold,
    guided_output,
    initial_noise,
    sample_loop,
    thresholded_output,
    timesteps,
)
from fastddpm.schedule import make_schedule
from tests.sampling.networks import ConvNet
from tests.tolerance import assert_equal_to_rounding

SCHEDULE = make_schedule("linear", 1000)
STEPS = timesteps(1000, 5)
NULL = 4


class Recorder:
    """Passes on to a network what it is called with, and keeps the batch sizes and labels."""

    def __init__(self, network: ConvNet) -> None:
        self.network, self.calls = network, []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == x.shape[:1]
        self.calls.append((len(x), None if labels is None else labels.tolist()))
        return self.network(x, t, labels)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return initial_noise((2, 3, 8, 8), seed=1, sample=torch.arange(2), dtype=dtype)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_guidance_combines_predictions_and_takes_the_conditional_variance(
    weight: float, learned_variance: bool
) -> None:
    """One step of the loop against the formula: out_uncond + w (out - out_uncond)."""
    network = Recorder(ConvNet(learned_variance=learned_variance).double())
    labels, x = torch.tensor([2, 0]), start()
    table = ddpm_table(SCHEDULE, STEPS, "eps", "learned_range" if learned_variance else "fixed_small")
    ours = sample_loop(
        network, x, table[:1], STEPS[:1], labels=labels, null_label=NULL, guidance_scale=weight, clamp=None, seed=5
    )
    assert network.calls == [(2, [2, 0]) if weight == 1 else (4, [2, 0, NULL, NULL])]
    t = STEPS[:1].repeat(2)
    with torch.no_grad():
        conditional = network.network(x, t, labels)
        unconditional = network.network(x, t, torch.full((2,), NULL))
    out = conditional.clone()
    out[:, :3] = (1 - weight) * unconditional[:, :3] + weight * conditional[:, :3]
    expected, _ = solver_step(x, out, table, 0, seed=5, sample=torch.arange(2))
    assert_equal_to_rounding(ours, expected, 64, scale=expected.abs().max())
    if weight == 0:
        assert not torch.equal(out[:, :3], conditional[:, :3])


def test_guidance_scale_may_live_on_the_device() -> None:
    network, labels = ConvNet().double(), torch.tensor([2, 0])
    table = dpmpp_2m_table(SCHEDULE, STEPS)
    given = {"labels": labels, "null_label": NULL}
    ours = sample_loop(network, start(), table, STEPS, guidance_scale=torch.tensor(3.0), **given)
    assert torch.equal(ours, sample_loop(network, start(), table, STEPS, guidance_scale=3.0, **given))
    plain = sample_loop(network, start(), table, STEPS, labels=labels)
    one = sample_loop(network, start(), table, STEPS, guidance_scale=torch.tensor(1.0), **given)
    assert_equal_to_rounding(one, plain, 2**12)
    assert not torch.equal(ours, plain)


def test_labels_reach_the_network_without_guidance() -> None:
    network = Recorder(ConvNet())
    x = start(torch.float32)
    sample_loop(network, x, ddim_table(SCHEDULE, STEPS), STEPS, labels=torch.tensor([1, 3]), null_label=NULL)
    sample_loop(network, x, ddim_table(SCHEDULE, STEPS), STEPS)
    assert network.calls == [(2, [1, 3])] * 5 + [(2, None)] * 5


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
def test_the_bound_is_the_quantile_of_each_sample(ratio: float) -> None:
    x, out, uncond = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    table = ddim_table(SCHEDULE, STEPS, "v")
    step = torch.tensor(2)
    k0, k1 = table[2, :2]
    for guidance, o in (({}, out), ({"out_uncond": uncond, "guidance_scale": 3.0}, uncond + 3.0 * (out - uncond))):
        pred = k0 * x + k1 * o
        bound = dynamic_threshold(x, out, table, step, ratio, **guidance)
        quantile = torch.quantile(pred.abs().flatten(1), ratio, dim=1)
        assert_equal_to_rounding(bound, quantile.clamp(min=1))
        given = thresholded_output(x, out, table, step, bound, **guidance)
        _, ours = solver_step(x, given, table, step)
        s = bound.reshape(-1, 1, 1, 1)
        assert_equal_to_rounding(ours, pred.clamp(-s, s) / s, 64, scale=1.0)
        assert ratio < 0.9 or bool((bound > 1).any())


def test_images_within_the_range_are_left_as_they_are() -> None:
    x, out = torch.rand(2, 4, 3, 8, 8) * 0.2
    table = ddim_table(SCHEDULE, STEPS, "x0").float()
    assert dynamic_threshold(x, out, table, 0, 0.995).tolist() == [1.0] * 4
    unchanged = thresholded_output(x, torch.cat([out, x], dim=1), table, 0, torch.ones(4))
    assert torch.equal(unchanged, torch.cat([out, x], dim=1))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dynamic_thresholding_in_the_loop(guidance_scale: float) -> None:
    network, labels = ConvNet(learned_variance=True), torch.tensor([2, 0])
    table = ddpm_table(SCHEDULE, STEPS, "eps", "learned_range")
    given = {"labels": labels, "null_label": NULL, "guidance_scale": guidance_scale, "seed": 3}
    seen: list[Tensor] = []
    x = start(torch.float32)
    ours = sample_loop(
        network,
        x,
        table,
        STEPS,
        dynamic_threshold_ratio=0.8,
        callback=lambda i, n, x, p: seen.append(p.clone()),
        **given,
    )
    plain = sample_loop(network, x, table, STEPS, **given)
    assert ours.abs().max() <= 1 and not torch.equal(ours, plain)
    t = STEPS[:1].repeat(2)
    with torch.no_grad():
        out, uncond = guided_output(network, x, t, labels, torch.full((2,), NULL))
        assert uncond is not None
        plain_out = network(x, t, labels)
    eps = (uncond + guidance_scale * (out - uncond) if guidance_scale != 1 else plain_out)[:, :3]
    pred = table[0, 0].float() * x + table[0, 1].float() * eps
    s = torch.quantile(pred.abs().flatten(1), 0.8, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    # eps -> x0 -> eps -> x0: each has terms of size |x| / sqrt(abar), about 500 here
    assert_equal_to_rounding(seen[0], pred.clamp(-s, s) / s, 64, scale=float(pred.abs().max()))


def test_errors() -> None:
    x = torch.randn(2, 3, 8, 8)
    table = ddim_table(SCHEDULE, STEPS, "v")
    with pytest.raises(ValueError, match=r"dynamic_threshold: expected ratio in \(0, 1\], got 1.5; 0.995 is usual"):
        dynamic_threshold(x, x, table, 0, 1.5)
    with pytest.raises(ValueError, match=r"dynamic_threshold: expected out of shape \[2, 3, 8, 8\] or \[2, 6, 8, 8\]"):
        dynamic_threshold(x, x[:1], table, 0, 0.9)
    with pytest.raises(ValueError, match=r"thresholded_output: expected bound of shape \[2\], got \[3\]"):
        thresholded_output(x, x, table, 0, torch.ones(3))
    with pytest.raises(ValueError, match=r"thresholded_output: expected x of shape \[B, C, H, W\], got \[3, 8, 8\]"):
        thresholded_output(x[0], x, table, 0, torch.ones(3))
    with pytest.raises(ValueError, match=r"guided_output: expected labels with null_labels, got None; pass the class"):
        guided_output(ConvNet(), x, torch.zeros(2).long(), None, torch.zeros(2).long())
    for missing, given in (("labels", {"null_label": 4}), ("null_label", {"labels": torch.tensor([0, 1])})):
        message = rf"sample_loop: expected labels and null_label with guidance_scale 3.0, got no {missing}; pass both"
        with pytest.raises(ValueError, match=message):
            sample_loop(ConvNet(), x, table, STEPS, guidance_scale=3.0, **given)
    raw = ddim_table(SCHEDULE, STEPS, "v", use_clipped=False)
    with pytest.raises(ValueError, match=r"sample_loop: expected a table without k6 \(the raw output\) with"):
        sample_loop(ConvNet(), x, raw, STEPS, dynamic_threshold_ratio=0.9)
