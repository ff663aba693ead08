"""Numbers that either library gives for the same calls: ours in the tests, those of the original once, in golden.json.

    PYTHONPATH=<checkout of openai/improved-diffusion> python -m tests.compat.improved_diffusion.golden

writes golden.json anew, from commit 1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5 as it was made. The network is a formula
and the noise of a call is a sequence of low discrepancy, so nothing depends on a generator but the part "drawn".
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.improved_diffusion import original

GOLDEN = Path(__file__).with_name("golden.json")
SHAPE = (3, 1, 2, 2)
TOTAL = 40
OPTIONS = ("schedule", "mean", "var", "loss", "respacing", "rescale")
CASES = (
    ("linear", "EPSILON", "FIXED_LARGE", "MSE", [TOTAL], False),
    ("cosine", "EPSILON", "LEARNED_RANGE", "RESCALED_MSE", [TOTAL], True),
    ("cosine", "EPSILON", "LEARNED_RANGE", "RESCALED_KL", "10", True),
    ("linear", "EPSILON", "LEARNED", "KL", "ddim8", False),
    ("linear", "EPSILON", "FIXED_SMALL", "RESCALED_KL", "7,3", True),
    ("cosine", "EPSILON", "FIXED_LARGE", "KL", "ddim8", True),
    ("linear", "START_X", "LEARNED_RANGE", "MSE", "10", False),
    ("cosine", "START_X", "FIXED_SMALL", "RESCALED_MSE", "7,3", True),
    ("cosine", "START_X", "LEARNED", "RESCALED_KL", [TOTAL], False),
    ("linear", "PREVIOUS_X", "FIXED_LARGE", "MSE", [TOTAL], True),
    ("cosine", "PREVIOUS_X", "LEARNED_RANGE", "RESCALED_MSE", "ddim8", False),
    ("linear", "PREVIOUS_X", "LEARNED", "RESCALED_KL", "10", True),
)
NETWORKS: dict[str, dict[str, Any]] = {
    "scale and shift": dict(learn_sigma=True, num_heads=4),
    "classes, other heads on the way up": dict(class_cond=True, num_heads_upsample=2),
    "a bias, one head": dict(use_scale_shift_norm=False, num_heads=1, use_checkpoint=True),
}


class Formula(nn.Module):
    """A network that is linear in x, and takes its classes: [B, C, H, W] to the same, or to twice the channels."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What it gives depends on t as it is given."""
        of_t = 0.2 * torch.sin(t.float() / 200).reshape(-1, 1, 1, 1)
        of_y = 0.0 if y is None else 0.01 * y.float().reshape(-1, 1, 1, 1)
        out = self.slope * x + of_t + of_y
        return torch.cat([out, 1.3 * torch.tanh(0.5 * x.flip(-1) - out)], dim=1) if self.learned else out


def spread(shape: tuple[int, ...], number: int) -> Tensor:
    """Normal numbers, the same ones on every machine."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    u = (i * 0.6180339887498949 + number * 0.7548776662466927 + 0.5) % 1
    return (torch.erfinv(2 * u - 1) * math.sqrt(2)).reshape(shape).float()


@contextlib.contextmanager
def given_noise() -> Iterator[None]:
    """torch.randn and randn_like give `spread`, one number after the other."""
    kept, calls = (torch.randn, torch.randn_like), iter(range(1, 10_000))
    torch.randn = lambda *shape, device=None: spread(shape, next(calls))  # type: ignore[assignment]
    torch.randn_like = lambda x: spread(tuple(x.shape), next(calls))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn, torch.randn_like = kept  # type: ignore[assignment]


def images() -> Tensor:
    """Grey levels, both ends among them, in [-1, 1]."""
    levels = (torch.arange(math.prod(SHAPE)) * 53 % 256).reshape(SHAPE)
    levels[0, 0, 0, 0], levels[0, 0, 0, 1] = 0, 255
    return levels / 127.5 - 1


def diffusion(library: Any, case: tuple[Any, ...]) -> Any:
    """The diffusion of a case."""
    option, gd = dict(zip(OPTIONS, case, strict=True)), library.gaussian_diffusion
    return library.respace.SpacedDiffusion(
        use_timesteps=library.respace.space_timesteps(TOTAL, option["respacing"]),
        betas=gd.get_named_beta_schedule(option["schedule"], TOTAL),
        model_mean_type=gd.ModelMeanType[option["mean"]],
        model_var_type=gd.ModelVarType[option["var"]],
        loss_type=gd.LossType[option["loss"]],
        rescale_timesteps=option["rescale"],
    )


def calls_of(d: Any, case: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """Every method, by what it is called with."""
    network, x0, noise = Formula("LEARNED" in case[2]), images(), spread(SHAPE, 0)
    t = torch.tensor([0, d.num_timesteps // 2, d.num_timesteps - 1])
    classes = dict(y=torch.tensor([3, 1, 4]))
    x = d.q_sample(x0, t, noise=noise)

    def halved(x: Tensor) -> Tensor:
        return 0.5 * x

    def gradient() -> Tensor:
        network.slope.grad = None
        d.training_losses(network, x0, t, noise=noise)["loss"].mean().backward()
        assert network.slope.grad is not None
        return network.slope.grad.reshape(1)

    def bound() -> dict[str, Tensor]:
        found: dict[str, Tensor] = d.calc_bpd_loop(network.eval(), x0, model_kwargs=classes)
        return {name: value[:, ::13] if value.dim() == 2 else value for name, value in found.items()}

    calls: dict[str, Callable[[], Any]] = {
        "q_mean_variance": lambda: d.q_mean_variance(x0, t),
        "q_sample": lambda: d.q_sample(x0, t),
        "q_posterior": lambda: d.q_posterior_mean_variance(x0, x, t),
        "training_losses": lambda: d.training_losses(network, x0, t, model_kwargs=classes),
        "gradient": gradient,
    }
    for clip in (True, False):
        options: dict[str, Any] = dict(clip_denoised=clip, model_kwargs=classes)
        calls |= {
            f"p_mean_variance {clip}": lambda o=options: d.p_mean_variance(network, x, t, **o),
            f"p_sample_loop {clip}": lambda o=options: d.p_sample_loop(network, SHAPE, **o),
            f"ddim_sample_loop {clip}": lambda o=options: d.ddim_sample_loop(network, SHAPE, eta=0.7, **o),
        }
    calls |= {
        "p_mean_variance, function": lambda: d.p_mean_variance(network, x, t, denoised_fn=halved),
        "p_sample": lambda: d.p_sample(network, x, t),
        "ddim_sample": lambda: d.ddim_sample(network, x, t, eta=0.5),
        "ddim_reverse_sample": lambda: d.ddim_reverse_sample(network, x, t),
        "p_sample_loop, noise and function": lambda: d.p_sample_loop(network, SHAPE, noise=noise, denoised_fn=halved),
        "ddim_sample_loop": lambda: d.ddim_sample_loop(network, SHAPE),
        "progressive": lambda: torch.stack(
            [s["pred_xstart"] for s in d.ddim_sample_loop_progressive(network, SHAPE, noise=noise)][::13]
        ),
        "calc_bpd_loop": bound,
    }
    return calls


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """A tensor, a tuple or a dict as named tensors."""
    if isinstance(value, Tensor):
        return {name: value.detach()}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {f"{name}.{key}": part.detach() for key, part in parts}


def of_network(library: Any, case: str) -> dict[str, Tensor]:
    """What a small network of `create_model` starts with, and gives with the weights of a formula."""
    flags = dict(library.script_util.model_and_diffusion_defaults(), **NETWORKS[case])
    flags.update(image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="16,8")
    torch.manual_seed(5)
    model, _ = library.script_util.create_model_and_diffusion(**flags)
    state = model.state_dict()
    found = {f"drawn {name}": torch.stack([state[name].sum(), state[name].std()]) for name in list(state)[:24:5]}
    found["drawn after"] = torch.rand(2)
    model.load_state_dict({name: 0.1 * spread(tuple(v.shape), i) for i, (name, v) in enumerate(state.items())})
    x, t = spread((2, 3, 32, 32), 3), torch.tensor([3.5, 700.0])
    with torch.no_grad():
        out = model(x, t, torch.tensor([3, 999]) if flags["class_cond"] else None)
    found["output"] = torch.cat([out[:, :, 7, ::11].flatten(), out.std().reshape(1)])
    return found


def of_flags(library: Any) -> dict[str, Any]:
    """Names and shapes of the published CIFAR-10 network, respacings, and what a seed of NumPy draws."""
    flags = dict(library.script_util.model_and_diffusion_defaults())
    flags.update(image_size=32, num_res_blocks=3, learn_sigma=True, dropout=0.3, diffusion_steps=4000)
    script_util = library.script_util
    with torch.device("meta"):
        names = list(inspect.signature(script_util.create_model).parameters)
        model = script_util.create_model(**{name: flags[name] for name in names})
    _, made = script_util.create_model_and_diffusion(**dict(flags, num_channels=32, noise_schedule="cosine"))
    shapes = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    respace = library.respace.space_timesteps
    np.random.seed(7)  # noqa: NPY002  # the original's generator
    sampler = library.resample.create_named_schedule_sampler("loss-second-moment", SimpleNamespace(num_timesteps=5))
    sampled = [tensors_of(sampler.sample(6, "cpu"))]
    for i in range(12):
        sampler.update_with_all_losses([0, 1, 2, 3, 4], [0.1 * i, 0.5, 1.0 + i % 3, 2.0, 0.2])
    sampled.append(tensors_of(sampler.sample(6, "cpu")))
    return {
        "flags": flags,
        "super-resolution flags": library.script_util.sr_model_and_diffusion_defaults(),
        "names and shapes": [len(shapes), hashlib.sha256(json.dumps(shapes).encode()).hexdigest()],
        "parameters": sum(p.numel() for p in model.parameters()),
        "cosine": [made.num_timesteps, *(float(f"{made.betas[i]:.12g}") for i in (0, 1, 2000, 3999))],
        "respacings": {
            f"{total} {counts}": sorted(respace(total, counts))
            for total, counts in (
                (300, [10, 15, 20]),
                (4000, "50"),
                (1000, "ddim25"),
                (10, "3,3"),
                (7, "1,2"),
                (97, "31"),
            )
        },
        "timesteps": [{name: value.tolist() for name, value in found.items()} for found in sampled],
    }


def of_case(library: Any, case: tuple[Any, ...]) -> dict[str, dict[str, Tensor]]:
    """What every method gives."""
    found = {}
    for name, call in calls_of(diffusion(library, case), case).items():
        with given_noise():
            found[name] = tensors_of(call())
    return found


def _write() -> None:
    library = original()

    def plain(found: dict[str, Tensor]) -> dict[str, list[float]]:
        return {name: [float(f"{v:.7g}") for v in value.flatten().tolist()] for name, value in found.items()}

    golden = {
        "flags": of_flags(library),
        "networks": {name: plain(of_network(library, name)) for name in NETWORKS},
        "cases": [{name: plain(found) for name, found in of_case(library, case).items()} for case in CASES],
    }
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    _write()
