"""The interface of denoising-diffusion-pytorch without that package: errors, hooks, memory, compilation."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from fastddpm.compat import denoising_diffusion_pytorch as ddp
from fastddpm.compat.denoising_diffusion_pytorch.blocks import Attention, LinearAttention
from fastddpm.ops.kept import is_kept
from tests.compat.peers import seeded
from tests.tolerance import assert_equal_to_rounding

SMALL: dict[str, Any] = dict(dim=8, dim_mults=(1, 2))


class Toy(nn.Module):
    """A network that costs nothing."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return torch.tanh(self.gain * x + t.reshape(-1, *[1] * (x.dim() - 1)) / 1000)


def toy(**options: Any) -> ddp.GaussianDiffusion:
    return ddp.GaussianDiffusion(Toy(), **{"image_size": 4, "timesteps": 24, **options})


# --- exports


def test_what_is_not_here_says_what_is() -> None:
    with pytest.raises(ImportError, match=r"expected one of .*Unet1D.*, got KarrasUnet; take that one from denoising"):
        from fastddpm.compat.denoising_diffusion_pytorch import KarrasUnet  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        from fastddpm.compat.denoising_diffusion_pytorch import Nonsense  # noqa: F401
    assert not hasattr(ddp, "nonsense")
    assert set(ddp.__all__) <= set(dir(ddp))


def test_needs_none_of_what_it_replaces() -> None:
    code = (
        "import sys; from fastddpm.compat.denoising_diffusion_pytorch import *; "
        "print(*sorted({'accelerate', 'denoising_diffusion_pytorch', 'einops', 'ema_pytorch', 'scipy', 'torchvision'} "
        "& set(sys.modules)))"
    )
    code = code.replace("import *", "import Unet, GaussianDiffusion, Unet1D, XMWrapper")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# --- errors

ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "dim": (lambda: ddp.Unet(7), "Unet: expected dim even and >= 4, got 7; "),
    "dim, 1-D": (lambda: ddp.Unet1D(2), "Unet1D: expected dim even and >= 4, got 2; "),
    "learned dim": (
        lambda: ddp.Unet(8, learned_sinusoidal_cond=True, learned_sinusoidal_dim=5),
        "expected learned_sinusoidal_dim even and >= 2, got 5; ",
    ),
    "levels": (lambda: ddp.Unet(8, attn_heads=(2, 4)), "expected attn_heads to be one value or 4, .* got 2; "),
    "channels of x": (
        lambda: ddp.Unet(**SMALL)(torch.zeros(1, 4, 8, 8), torch.zeros(1)),
        r"Unet: expected x of shape \[B, 3, H, W\], got \[1, 4, 8, 8\]; ",
    ),
    "size of x": (
        lambda: ddp.Unet(**SMALL)(torch.zeros(1, 3, 8, 7), torch.zeros(1)),
        "Unet: expected x with height and width divisible by 2, got 8x7; ",
    ),
    "time": (
        lambda: ddp.Unet(**SMALL)(torch.zeros(2, 3, 8, 8), torch.zeros(1)),
        r"Unet: expected time of shape \[2\], got \[1\]; ",
    ),
    "channels of x, 1-D": (
        lambda: ddp.Unet1D(**SMALL)(torch.zeros(1, 4, 8), torch.zeros(1)),
        r"Unet1D: expected x of shape \[B, 3, N\], got \[1, 4, 8\]; ",
    ),
    "length of x": (
        lambda: ddp.Unet1D(**SMALL)(torch.zeros(1, 3, 7), torch.zeros(1)),
        "Unet1D: expected x of a length divisible by 2, got 7; ",
    ),
    "image_size": (lambda: toy(image_size=(1, 2, 3)), r"expected image_size to be .*, got \(1, 2, 3\)"),
    "objective": (lambda: toy(objective="eps"), "expected objective to be one of .*, got 'eps'; "),
    "schedule": (lambda: toy(beta_schedule="log"), "expected beta_schedule to be one of .*, got 'log'; "),
    "few steps of linear": (
        lambda: toy(beta_schedule="linear", timesteps=20),
        "linear_beta_schedule: expected 0 < beta_start <= beta_end < 1, got 0.005 and 1.0",
    ),
    "sampling_timesteps": (lambda: toy(sampling_timesteps=25), r"expected sampling_timesteps in \[1, 24\], got 25; "),
    "eta": (
        lambda: toy(sampling_timesteps=5, ddim_sampling_eta=9.0).sample(1),
        "expected ddim_sampling_eta for which no step has a negative variance, got 9.0; ",
    ),
    "images": (lambda: toy()(torch.zeros(1, 3, 4, 5)), r"expected images of size \(4, 4\), got \(4, 5\); "),
    "reduction": (
        lambda: toy()(torch.zeros(1, 3, 4, 4), loss_reduction="sum"),
        "expected loss_reduction 'mean' or 'none', got 'sum'; ",
    ),
    "reduction, learned": (
        lambda: ddp.LearnedGaussianDiffusion(ddp.Unet(**SMALL, learned_variance=True), image_size=4)(
            torch.zeros(1, 3, 4, 4), loss_reduction="sum"
        ),
        "expected loss_reduction 'mean' or 'none', got 'sum'; ",
    ),
    "interpolated shapes": (
        lambda: toy().interpolate(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        r"interpolate: expected x1 and x2 of one shape, got \[1, 3, 4, 4\] and \[2, 3, 4, 4\]; ",
    ),
    "interpolated t": (
        lambda: toy().interpolate(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), t=24),
        r"interpolate: expected t in \[0, 24\), got 24; ",
    ),
    "too many outputs": (
        lambda: ddp.GaussianDiffusion(ddp.Unet(**SMALL, learned_variance=True), image_size=4),
        "expected a network that gives as many channels as it takes, got 3 and 6; ",
    ),
    "too few outputs": (
        lambda: ddp.LearnedGaussianDiffusion(ddp.Unet(**SMALL), image_size=4),
        "expected a network with 6 output channels, got 3; ",
    ),
    "learned and self-conditioned": (
        lambda: ddp.LearnedGaussianDiffusion(
            ddp.Unet(**SMALL, learned_variance=True, self_condition=True), image_size=4
        ),
        "expected a network without self-conditioning",
    ),
    "frequencies": (
        lambda: ddp.GaussianDiffusion(ddp.Unet(**SMALL, random_fourier_features=True), image_size=4),
        "expected a network that embeds integer times",
    ),
    "schedule, 1-D": (
        lambda: ddp.GaussianDiffusion1D(Toy(), seq_length=4, beta_schedule="sigmoid"),
        "GaussianDiffusion1D: expected beta_schedule to be one of linear, cosine, got 'sigmoid'; ",
    ),
    "length": (
        lambda: ddp.GaussianDiffusion1D(Toy(), seq_length=4)(torch.zeros(1, 3, 5)),
        "GaussianDiffusion1D: expected data of length 4, got 5; ",
    ),
    "candidates": (lambda: ddp.XMWrapper(toy(), candidates=0), "XMWrapper: expected candidates >= 1, got 0; "),
    "no tensor": (lambda: ddp.XMWrapper(toy(), candidates=2)(), "expected a tensor among the arguments, got none; "),
    "no times": (
        lambda: ddp.XMWrapper(toy(), candidates=2, random_time_method="draw")(torch.zeros(1, 3, 4, 4)),
        "expected flow_model with a method 'draw', got GaussianDiffusion; ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_immiscible_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="expected scipy for immiscible=True, got none; pip install scipy"):
        toy(immiscible=True)(torch.zeros(2, 3, 4, 4))


def test_what_a_learned_variance_leaves_aside_is_said() -> None:
    net = ddp.Unet(**SMALL, learned_variance=True)
    with pytest.warns(UserWarning, match="expected no offset_noise_strength or objective, which it leaves aside"):
        ddp.LearnedGaussianDiffusion(net, image_size=4, objective="pred_x0", offset_noise_strength=0.1)


# --- what a user's code relies on


class Guided(ddp.GaussianDiffusion):
    """A subclass that changes a step of the arithmetic."""

    calls = 0

    def model_predictions(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        eps, x_start = super().model_predictions(x, t, *args, **kwargs)
        return type(super().model_predictions(x, t))(eps, x_start * 0 + 0.25)


@pytest.mark.parametrize(("sampling_timesteps", "steps"), [(None, 24), (6, 6)])
def test_a_subclass_has_its_arithmetic_called(sampling_timesteps: int | None, steps: int) -> None:
    diffusion = Guided(Toy(), image_size=4, timesteps=24, sampling_timesteps=sampling_timesteps)
    images = diffusion.sample(2)
    assert diffusion.calls == steps
    assert torch.equal(images, torch.full_like(images, 0.625))


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("options", [{}, dict(sampling_timesteps=9, ddim_sampling_eta=0.6)], ids=["all steps", "ddim"])
def test_a_step_in_one_kernel_is_the_step_of_the_methods(options: dict[str, Any], objective: str) -> None:
    """A subclass that changes nothing, but could, goes the long way."""

    class Same(ddp.GaussianDiffusion):
        def model_predictions(self, *args: Any, **kwargs: Any) -> Any:
            return super().model_predictions(*args, **kwargs)

    options = dict(options, image_size=4, timesteps=24, objective=objective)
    fused, long = (seeded(kind(Toy(), **options).sample, 2) for kind in (ddp.GaussianDiffusion, Same))
    assert_equal_to_rounding(fused, long, ulps=1e3, scale=1.0)


def test_a_subclass_has_its_noising_called() -> None:
    class Blurred(ddp.GaussianDiffusion):
        def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x_start)

    seen = []
    net = Toy()
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    Blurred(net, image_size=4)(torch.rand(2, 3, 4, 4))
    assert torch.equal(seen[0], torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("options", [{}, dict(sampling_timesteps=5)], ids=["all steps", "ddim"])
def test_intermediate_images_are_not_kept(options: dict[str, Any]) -> None:
    alive: list[int] = []
    states: list[weakref.ref[Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(weakref.ref(args[0]))
        gc.collect()
        alive.append(sum(state() is not None for state in states))

    diffusion = toy(timesteps=6, **options)
    diffusion.model.register_forward_pre_hook(look)
    diffusion.sample(1)
    assert max(alive) <= 2


def test_weights_may_change_between_samplings_and_an_error_may_end_one() -> None:
    """What is kept of the weights in a sampling is gone after it."""
    diffusion = ddp.GaussianDiffusion(ddp.Unet(dim=16, dim_mults=(1,)), image_size=4, timesteps=3)
    seeded(diffusion.sample, 4)
    with torch.no_grad():
        for p in diffusion.parameters():
            p.add_(0.05 * torch.randn_like(p))
    expected = seeded(copy.deepcopy(diffusion).sample, 4)
    assert torch.equal(seeded(diffusion.sample, 4), expected)

    handle = diffusion.model.final_conv.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusion.sample(4)
    handle.remove()
    with torch.no_grad():
        assert not is_kept()


def test_a_noise_that_is_given_stays_as_it_is() -> None:
    noise = torch.randn(2, 3, 4, 4)
    before = noise.clone()
    toy(offset_noise_strength=0.5)(torch.rand(2, 3, 4, 4), noise)
    assert torch.equal(noise, before)


def test_gradients_with_respect_to_images_and_noise() -> None:
    diffusion = toy()
    x, noise = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    x, noise = x.detach().requires_grad_(), noise.detach().requires_grad_()
    t = torch.tensor([3, 9])
    diffusion = diffusion.double()
    assert torch.autograd.gradcheck(lambda x, e: diffusion.q_sample(x, t, e), (x, noise))
    assert torch.autograd.gradcheck(lambda x, e: diffusion.p_losses(x, t, e), (x, noise))


def test_corrected_interpolation_takes_and_gives_images_in_the_range_of_a_call() -> None:
    """With equal images, at t = 0 where an image is nearly as it was, each comes back."""
    diffusion = toy(objective="pred_noise", timesteps=1000)
    nn.init.zeros_(diffusion.model.gain)  # a network that says: almost no noise
    x = torch.rand(2, 3, 4, 4)
    y = diffusion.interpolate(x, x, t=0, corrected=True)
    assert y.shape == x.shape and bool((y >= 0).all()) and bool((y <= 1).all())
    assert (y - x).abs().max() < 0.1
    steps: list[int] = []
    diffusion.model.register_forward_pre_hook(lambda module, args: steps.append(int(args[1][0])))
    diffusion.interpolate(x, x, t=5, corrected=True)
    diffusion.interpolate(x, x, t=5)
    assert steps == [5, 4, 3, 2, 1, 0, 4, 3, 2, 1, 0]


def test_return_noise_is_what_the_sampling_started_from() -> None:
    diffusion = ddp.GaussianDiffusion1D(Toy(), seq_length=4, timesteps=24, sampling_timesteps=5)
    _, noise = seeded(diffusion.sample, 2, return_noise=True)
    assert torch.equal(noise, seeded(torch.randn, 2, 3, 4))


def test_copies_pickles_and_half_precision() -> None:
    diffusion = ddp.GaussianDiffusion(ddp.Unet(**SMALL), image_size=8, timesteps=24, sampling_timesteps=3)
    images = seeded(diffusion.sample, 2)
    assert torch.equal(seeded(copy.deepcopy(diffusion).sample, 2), images)
    stored = io.BytesIO()
    torch.save(diffusion, stored)
    stored.seek(0)
    assert torch.equal(seeded(torch.load(stored, weights_only=False).sample, 2), images)
    diffusion.to(torch.bfloat16)
    assert all(table.dtype == torch.float32 for table in diffusion.buffers())
    assert next(diffusion.parameters()).dtype == torch.bfloat16
    diffusion(torch.rand(2, 3, 8, 8)).backward()
    assert (seeded(diffusion.sample, 2).float() - images).abs().max() < 0.1


def test_weights_are_channels_last_and_no_weight_is_copied() -> None:
    for p in ddp.Unet(**SMALL).parameters():
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last)


# --- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [LinearAttention, Attention])
def test_one_graph_of_attention(kind: type[nn.Module], fresh_compiler: None) -> None:
    net, x = kind(8), torch.randn(2, 8, 2, 3).to(memory_format=torch.channels_last)
    assert_one_graph(net, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: ddp.Unet(dim=8, dim_mults=(1, 1), self_condition=True), (4, 3, 8, 8)),
        (lambda: ddp.Unet1D(dim=8, dim_mults=(1,)), (2, 3, 8)),
    ],
    ids=["Unet", "Unet1D"],
)
def test_one_graph(network: Callable[[], nn.Module], shape: tuple[int, ...], fresh_compiler: None) -> None:
    assert_one_graph(network(), torch.randn(shape), torch.arange(shape[0]))


def assert_one_graph(net: nn.Module, *inputs: Tensor) -> None:
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found, expected = (
        [y := f(*inputs), *torch.autograd.grad(y.square().sum(), list(net.parameters()))] for f in (compiled, net)
    )
    for a, b in zip(found, expected, strict=True):
        assert_equal_to_rounding(a, b, ulps=1e4, scale=b.abs().max().item())
