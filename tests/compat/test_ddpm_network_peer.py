"""The networks beside those of denoising-diffusion-pytorch: names, first weights, outputs and gradients."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.compat import denoising_diffusion_pytorch as ours
from tests.compat.peers import lucidrains, seeded, with_lucidrains
from tests.tolerance import assert_near_peer

pytestmark = with_lucidrains

SMALL: dict[str, Any] = dict(dim=8, dim_mults=(1, 2))
MODULES = {
    "Unet": "denoising_diffusion_pytorch",
    "GaussianDiffusion": "denoising_diffusion_pytorch",
    "LearnedGaussianDiffusion": "learned_gaussian_diffusion",
    "Unet1D": "denoising_diffusion_pytorch_1d",
    "GaussianDiffusion1D": "denoising_diffusion_pytorch_1d",
    "XMWrapper": "xm",
}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "default": ("Unet", dict(dim=8), (2, 3, 16, 8)),
    "one pixel at the bottom": ("Unet", dict(dim=8, channels=1), (2, 1, 8, 8)),
    "many small maps": ("Unet", dict(dim=8), (8, 3, 16, 16)),
    "maps large enough for minimal filtering": ("Unet", dict(dim=16, dim_mults=(1, 2)), (4, 3, 16, 16)),
    "self-conditioning": ("Unet", dict(SMALL, self_condition=True), (3, 3, 8, 8)),
    "learned variance": ("Unet", dict(SMALL, learned_variance=True, init_dim=12), (2, 3, 8, 8)),
    "full attention": ("Unet", dict(SMALL, full_attn=(True, False), flash_attn=True), (2, 3, 4, 8)),
    "full attention everywhere": ("Unet", dict(SMALL, full_attn=True), (2, 3, 8, 8)),
    "heads by level": ("Unet", dict(SMALL, attn_heads=(2, 3), attn_dim_head=(16, 8)), (2, 3, 8, 8)),
    "learned frequencies": ("Unet", dict(SMALL, learned_sinusoidal_cond=True, out_dim=5), (2, 3, 8, 8)),
    "random frequencies": ("Unet", dict(SMALL, random_fourier_features=True, learned_sinusoidal_dim=6), (2, 3, 8, 8)),
    "theta": ("Unet", dict(SMALL, sinusoidal_pos_emb_theta=500), (2, 3, 8, 8)),
    "dropout": ("Unet", dict(SMALL, dropout=0.4), (2, 3, 8, 8)),
    "1-D": ("Unet1D", dict(dim=8), (2, 3, 32)),
    "1-D, self-conditioning": ("Unet1D", dict(SMALL, self_condition=True, channels=5, attn_heads=2), (3, 5, 8)),
    "1-D, learned variance": ("Unet1D", dict(SMALL, learned_variance=True, init_dim=12, attn_dim_head=8), (2, 3, 8)),
    "1-D, random frequencies": ("Unet1D", dict(SMALL, random_fourier_features=True, dropout=0.4), (2, 3, 16)),
}  # fmt: skip


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Theirs and ours after the same seed."""
    theirs = seeded(getattr(lucidrains(MODULES[name]), name), **options)
    return theirs, seeded(getattr(ours, name), **options)


def shaken(theirs: nn.Module, mine: nn.Module) -> None:
    """Weights away from the first ones, whose gains are all one, the same in both."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mine.load_state_dict(theirs.state_dict(), strict=True)


def inputs_of(network: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    x, t = torch.randn(shape), torch.randint(0, 1000, shape[:1])
    return x, t, torch.randn(shape) if network.self_condition else None


@pytest.mark.parametrize("name", MODULES)
def test_signatures(name: str) -> None:
    """Every public method; what we add is by name alone, and has a default."""
    theirs, mine = getattr(lucidrains(MODULES[name]), name), getattr(ours, name)
    methods = [m for m, f in vars(theirs).items() if inspect.isfunction(f) and not m.startswith("_")]
    for method in ["__init__", *methods]:
        expected, found = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(c, method)).parameters.values()]
            for c in (theirs, mine)
        )
        # theirs takes t: int in p_sample; annotations aside, an empty dict is an empty mapping
        added = [p for p in found if p[0] not in [e[0] for e in expected]]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in added), method
        assert [p for p in found if p not in added] == expected, method
        assert not added or (method, [p[0] for p in added]) == ("interpolate", ["corrected"])


@pytest.mark.parametrize("case", CASES)
def test_names_and_first_weights(case: str) -> None:
    name, options, _ = CASES[case]
    theirs, mine = pair(name, options)
    expected, found = theirs.state_dict(), mine.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in theirs.parameters()]
    for attribute in ("channels", "out_dim", "self_condition", "random_or_learned_sinusoidal_cond"):
        assert getattr(mine, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str) -> None:
    name, options, shape = CASES[case]
    theirs, mine = pair(name, options)
    shaken(theirs, mine)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x, t, condition = inputs_of(mine, shape)
    x = x.requires_grad_()
    expected, found = (seeded(network, x, t, condition) for network in (theirs, mine))
    assert found.is_contiguous() and expected.is_contiguous()  # as torch fills memory of their likes
    assert_near_peer(found, expected)
    upstream = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad(y, [x, *(p for p in network.parameters() if p.requires_grad)], upstream)
        for y, network in ((found, mine), (expected, theirs))
    )
    for a, b in zip(*gradients, strict=True):
        assert_near_peer(a / b.abs().max(), b / b.abs().max())
    if mine.self_condition:
        assert_near_peer(seeded(mine, x, t), seeded(theirs, x, t))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_options(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def choose(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    one_dimensional = choose(True, False, False)
    levels = choose(1, 2, 3)
    options: dict[str, Any] = dict(
        dim=choose(8, 12), dim_mults=tuple(choose(1, 2, 3) for _ in range(levels)), init_dim=choose(None, 6),
        channels=choose(1, 3, 4), self_condition=choose(True, False), learned_variance=choose(True, False),
        learned_sinusoidal_cond=choose(True, False, False), dropout=choose(0.0, 0.2), out_dim=choose(None, None, 2),
    )  # fmt: skip
    if one_dimensional:
        options |= dict(attn_heads=choose(1, 4), attn_dim_head=choose(8, 32))
        shape: tuple[int, ...] = (choose(1, 2, 5), options["channels"], 4 * choose(1, 2, 3))
    else:
        # one head leaves their activations channels_last, where dropout draws in another order
        least = 1 if options["dropout"] == 0 else 2
        options |= dict(
            attn_heads=tuple(choose(least, 4) for _ in range(levels)), attn_dim_head=choose(8, 16),
            full_attn=tuple(choose(True, False) for _ in range(levels)), flash_attn=choose(True, False),
        )  # fmt: skip
        shape = (choose(1, 2, 5, 16), options["channels"], 4 * choose(1, 2, 3), 4 * choose(1, 2, 4))
    CASES["drawn"] = ("Unet1D" if one_dimensional else "Unet", options, shape)
    try:
        test_names_and_first_weights("drawn")
        test_outputs_and_gradients("drawn")
    finally:
        del CASES["drawn"]


def test_the_published_size() -> None:
    with torch.device("meta"):
        theirs, mine = lucidrains().Unet(64), ours.Unet(64)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters()) == 35_711_491
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_under_autocast_no_farther_from_the_truth_than_theirs() -> None:
    theirs, mine = pair("Unet", dict(dim=16))
    shaken(theirs, mine)
    x, t, _ = inputs_of(mine, (4, 3, 16, 16))
    exact = mine(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = mine(x, t), theirs(x, t)
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a.float() - exact).norm() <= 1.5 * (b.float() - exact).norm()


def test_an_optimizer_s_state_counts_parameters_as_there() -> None:
    theirs, mine = pair("Unet", SMALL)
    for network in (theirs, mine):
        torch.manual_seed(0)
        network.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for p in network.parameters():
            p.grad = torch.randn(p.shape)
        network.optimizer.step()
    mine.optimizer.load_state_dict(theirs.optimizer.state_dict())
    for (name, a), (other, b) in itertools.zip_longest(mine.named_parameters(), theirs.named_parameters()):
        assert name == other
        assert torch.equal(mine.optimizer.state[a]["exp_avg"], theirs.optimizer.state[b]["exp_avg"])
