"""Who takes part: a library with a setting. Each gives a training step and a sampling as calls that take no argument.

diffusers trains as its example train_unconditional does, and samples by its pipeline ("default") or by the loop inside
it. denoising-diffusion-pytorch trains and samples by its GaussianDiffusion around the network of diffusers, which is
the same network as ours; its own Unet of about as many parameters takes part as another network, with its own floor.
"torch" is the same network on torch's own ops, for where no other library is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stock import on_stock_ops
from fastddpm import GaussianDiffusion, UNet
from fastddpm.bench import Work
from fastddpm.bench.work import fill_zeros
from fastddpm.nn.layers import torch_layers

Call = Callable[[], object]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = {
    "diffusers": ("diffusers",),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", "einops", "scipy"),
}
NOT_NEEDED = ("torchvision", "pytorch_fid", "ema_pytorch", "accelerate")  # by what is used of that library here


@dataclass(frozen=True)
class Network:
    """One network, as the fields of our configuration and of that of diffusers."""

    name: str
    unet: dict[str, Any]
    peer: dict[str, Any]
    own_width: int = 64  # of the Unet of denoising-diffusion-pytorch that takes part as another network

    @property
    def size(self) -> int:
        """Height and width of its images."""
        return int(self.unet["image_size"])


@dataclass(frozen=True)
class Contestant:
    """A library with a setting.

    ``default`` is the library as its example uses it: eager, float32, NCHW, torch's default AdamW, its own pipeline.
    ``compiled`` is the mode of torch.compile, or "" for eager. ``own`` is the network of denoising-diffusion-pytorch.
    ``recompute``, ``gradients``, ``mirror``, ``graph`` and ``deterministic`` are options of ours: whether blocks are
    computed again in backward, in which dtype gradients wait for the update, whether weights lie in half precision, too
    (None, "on", "off"), whether a step is recorded as a CUDA graph ("auto", "on", "off"), whether training gives
    the same bits each time.
    """

    library: str
    dtype: str = "float32"
    channels_last: bool = False
    compiled: str = ""
    ema: bool = False
    default: bool = False
    own: bool = False
    recompute: bool = False
    gradients: str | None = None
    mirror: str | None = None
    graph: str = "auto"
    deterministic: bool = True

    @property
    def setting(self) -> str:
        """In words."""
        words = ["default"] if self.default else []
        words += ["compiled" if self.compiled == "default" else f"compiled, {self.compiled}"] if self.compiled else []
        words += {"auto": [], "on": ["CUDA graph"], "off": ["no CUDA graph"]}[self.graph]
        words += ["own Unet"] if self.own else []
        words += [self.dtype, *(["channels_last"] if self.channels_last else []), *(["EMA"] if self.ema else [])]
        words += ["recompute"] if self.recompute else []
        words += [f"{self.gradients} gradients"] if self.gradients else []
        words += [f"weight mirror {self.mirror}"] if self.mirror else []
        words += [] if self.deterministic else ["not deterministic"]
        return ", ".join(words)

    @property
    def missing(self) -> str | None:
        """The first package that it needs and that is not installed."""
        needed = PACKAGES.get(self.library, ())
        needed = needed if self.own or not needed else (*needed, "diffusers")
        return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _network(
    name: str, size: int, widths: tuple[int, ...], attention: tuple[int, ...], groups: int, blocks: int
) -> Network:
    """Of Ho et al. 2020: widths of the levels, heights of those with attention, blocks of a level."""
    has_attention = [size >> i in attention for i in range(len(widths))]
    down = ["AttnDownBlock2D" if there else "DownBlock2D" for there in has_attention]
    up = ["AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(has_attention)]
    unet = dict(
        image_size=size, base_channels=widths[0], channel_mult=tuple(w // widths[0] for w in widths),
        attention_resolutions=attention, num_groups=groups, num_res_blocks=blocks,
    )  # fmt: skip
    peer = dict(
        sample_size=size, block_out_channels=list(widths), down_block_types=down, up_block_types=up,
        layers_per_block=blocks, norm_num_groups=groups, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, act_fn="silu",
    )  # fmt: skip
    return Network(name, unet, peer)


CIFAR10 = _network("CIFAR-10", 32, (128, 256, 256, 256), (16,), 32, 2)
LARGE = _network("256x256", 256, (128, 128, 256, 256, 512, 512), (16,), 32, 2)
TINY = replace(_network("tiny", 8, (8, 16), (4,), 4, 1), own_width=8)

OURS = "fastddpm"
DIFFUSERS = "diffusers"
LUCIDRAINS = "denoising-diffusion-pytorch"
TORCH = "torch"


def contestants(which: str, device: str = DEVICE) -> list[Contestant]:
    """All that take part.

    Args:
        which: "eager" leaves out torch.compile; "some" compiles channels_last alone; "all" compiles everything.
    """
    layouts = {"eager": (), "some": (True,), "all": (False, True)}[which]
    modes = ["default", "reduce-overhead"] if device == "cuda" else ["default"]
    ours = [Contestant(OURS, dtype, True, ema=True) for dtype in ("float32", "bfloat16")]
    ours += [replace(c, compiled="default") for c in ours if which != "eager"]
    found = [*ours, Contestant(DIFFUSERS, default=True), Contestant(DIFFUSERS, default=True, ema=True)]
    found.append(Contestant(LUCIDRAINS, default=True))
    for library in (DIFFUSERS, LUCIDRAINS):
        for dtype in ("float32", "bfloat16"):
            found += [Contestant(library, dtype, layout) for layout in (False, True)]
            found += [Contestant(library, dtype, layout, mode) for mode in modes for layout in layouts]
            if library == LUCIDRAINS:
                found += [Contestant(library, dtype, layout, own=True) for layout in (False, True)]
    return found


def memory_contestants() -> list[Contestant]:
    """Those whose peak memory in training is compared: ours with and without an average of the weights and recompute;
    diffusers as its example uses it and in bfloat16, each with EMA, too; the other library by default."""
    ours = [Contestant(OURS, dtype, True, ema=ema, recompute=recompute) for dtype in ("float32", "bfloat16")
            for ema in (True, False) for recompute in (False, True)]  # fmt: skip
    ours += [Contestant(OURS, "bfloat16", True, ema=ema, recompute=True, gradients="bfloat16") for ema in (True, False)]
    theirs = [Contestant(DIFFUSERS, default=True, ema=ema) for ema in (False, True)]
    theirs += [Contestant(DIFFUSERS, "bfloat16", ema=ema) for ema in (False, True)]
    return [*ours, *theirs, Contestant(LUCIDRAINS, default=True)]


class Workshop:
    """Makes the calls of contestants. Peers in the same setting share a network, and so what torch.compile made of it.

    Args:
        network: what all but "own" train.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._made: dict[Any, Any] = {}

    def training_step(self, who: Contestant, batch: int) -> Call:
        """One optimiser step on ``batch`` images."""
        if who.library == OURS:
            return self._our_training(who, batch)
        network = self._peer_network(who, training=True)
        images = torch.randint(0, 256, (batch, 3, self.network.size, self.network.size), dtype=torch.uint8)
        images = images.to(DEVICE)
        losses = {DIFFUSERS: _diffusers_loss, TORCH: _torch_loss}
        make = losses.get(who.library)
        loss = self._lucidrains_loss(who, images) if make is None else make(network, images)
        # the default of AdamW is a loop over parameters on the CPU; a good user takes the fused one
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=not who.default or None)
        average = _diffusers_ema(network) if who.ema else None

        def step() -> None:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=who.dtype == "bfloat16"):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.step(network.parameters())

        return step

    def sampling(self, who: Contestant, batch: int, steps: int) -> Call:
        """``batch`` images by ``steps`` steps of ancestral sampling."""
        if who.library == OURS:
            return self._our_sampling(who, batch, steps)
        network = self._peer_network(who, training=False)
        if who.library == LUCIDRAINS:
            diffusion = self._lucidrains(who, network, steps)
            return torch.inference_mode()(lambda: diffusion.sample(batch))
        make = _torch_sampling if who.library == TORCH else _diffusers_sampling
        return make(who, network, (batch, 3, self.network.size, self.network.size), steps)

    def _our_training(self, who: Contestant, batch: int) -> Call:
        train: dict[str, Any] = dict(
            batch_size=batch, precision=who.dtype, compile=bool(who.compiled), cuda_graph=who.graph,
            deterministic=who.deterministic, recompute=who.recompute, gradient_dtype=who.gradients,
            weight_mirror=who.mirror,
        )  # fmt: skip
        return Work("train", self.network.unet, {}, train if who.ema else train | {"ema_decay": None}).prepare()

    def _our_sampling(self, who: Contestant, batch: int, steps: int) -> Call:
        """As `fastddpm.bench` samples, with one network for any number of steps."""
        if who not in self._made:
            made = GaussianDiffusion(UNet(**self.network.unet)).to(DEVICE).eval()
            fill_zeros(made.model)
            made.model.to(getattr(torch, who.dtype))
            if who.compiled:
                made.model.compile()
            self._made[who] = made, made.frozen()
        diffusion, frozen = self._made[who]
        graph: Any = {"auto": "auto", "on": True, "off": False}[who.graph]

        def call() -> object:
            with frozen:  # a short sampling stands for a long one
                return diffusion.sample(batch, batch_size=batch, num_steps=steps, cuda_graph=graph)

        return call

    def _peer_network(self, who: Contestant, training: bool) -> nn.Module:
        """Weights are float32 in training, under autocast, and in the dtype of the setting in sampling."""
        dtype = torch.float32 if training else getattr(torch, who.dtype)
        key = who.channels_last, who.compiled, dtype, who.own, training, who.library == TORCH
        if key not in self._made:
            kind = TorchNetwork if who.library == TORCH else PeerNetwork
            made = lucidrains().Unet(self.network.own_width) if who.own else kind(self.network)
            made = made.to(DEVICE, dtype).train(training)
            if who.channels_last:
                made = made.to(memory_format=torch.channels_last)
            if who.compiled:
                # the inner network: its inputs look the same from either library, so one graph serves both
                made.unet.compile(mode=who.compiled, dynamic=False)
            self._made[key] = made
        return self._made[key]

    def _lucidrains_loss(self, who: Contestant, images: Tensor) -> Callable[[], Tensor]:
        diffusion = self._lucidrains(who, self._peer_network(who, training=True), 1000)
        return lambda: diffusion(images.float() / 255)

    def _lucidrains(self, who: Contestant, network: nn.Module, steps: int) -> Any:
        if who.own and next(network.parameters()).dtype != torch.float32:
            network = Cast(network)
        options = dict(image_size=self.network.size, timesteps=steps, objective="pred_noise", beta_schedule="linear")
        return lucidrains().GaussianDiffusion(network, **options).to(DEVICE)


class PeerNetwork(nn.Module):
    """The network of diffusers, called as the others are, with what denoising-diffusion-pytorch asks of a network.

    Inputs are brought to the dtype and the memory order of its weights, where they are not so already.
    """

    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self, network: Network) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(**network.peer)
        self.channels = self.out_dim = 3

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        """[B, C, H, W] and [B] to [B, C, H, W] in the dtype of x."""
        out: Tensor = self.unet(x.to(self.unet.dtype, memory_format=self.layout), t, return_dict=False)[0]
        return out.to(x.dtype)

    @property
    def layout(self) -> torch.memory_format:
        """Of its weights."""
        return torch.contiguous_format if self.unet.conv_in.weight.is_contiguous() else torch.channels_last


class TorchNetwork(nn.Module):
    """The same network on torch's own ops, called as the others are; it is channels_last."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.unet = on_stock_ops(UNet(**network.unet))
        self.layout = torch.channels_last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, C, H, W] and [B] to [B, C, H, W] in the dtype of x."""
        with torch_layers():
            out: Tensor = self.unet(x.to(next(self.unet.parameters()).dtype), t)
        return out.to(x.dtype)


class Cast(nn.Module):
    """A network in half precision whose input and output are float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name in ("channels", "out_dim", "self_condition", "random_or_learned_sinusoidal_cond"):
            setattr(self, name, getattr(network, name))

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        """[B, C, H, W] and [B] to [B, C, H, W] in float32."""
        with torch.autocast(DEVICE, torch.bfloat16):
            out: Tensor = self.network(x, t)
        return out.float()


def _eps_loss(
    network: Any, images: Tensor, add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """||eps - eps_theta(x_t, t)||^2, with x_t = add_noise(x_0, eps, t)."""

    def loss() -> Tensor:
        clean = (images.float() / 127.5 - 1).to(memory_format=network.layout)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        return F.mse_loss(network(add_noise(clean, noise, t), t).float(), noise)

    return loss


def _diffusers_loss(network: Any, images: Tensor) -> Callable[[], Tensor]:
    """As in examples/unconditional_image_generation/train_unconditional.py."""
    from diffusers import DDPMScheduler

    return _eps_loss(network, images, DDPMScheduler().add_noise)


def _torch_loss(network: Any, images: Tensor) -> Callable[[], Tensor]:
    abar = _alphas_cumprod()

    def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal = abar[t][:, None, None, None]
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    return _eps_loss(network, images, add_noise)


def _torch_sampling(who: Contestant, network: nn.Module, shape: tuple[int, ...], steps: int) -> Call:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) at every timestep of the last ``steps``."""
    abar = _alphas_cumprod()
    dtype = getattr(torch, who.dtype)

    @torch.inference_mode()
    def sample() -> Tensor:
        x = torch.randn(shape, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
        for i in range(steps - 1, -1, -1):
            eps = network(x, torch.full((len(x),), i, device=DEVICE))
            alpha = abar[i] / abar[i - 1] if i else abar[0]
            mean = (x - (1 - alpha) / (1 - abar[i]).sqrt() * eps) / alpha.sqrt()
            x = (mean + (1 - alpha).sqrt() * torch.randn_like(x) if i else mean).to(dtype)
        return (x / 2 + 0.5).clamp(0, 1)

    return sample


def _alphas_cumprod() -> Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=DEVICE), 0)


def _diffusers_ema(network: nn.Module) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(network.parameters(), decay=0.9999)


def _diffusers_sampling(who: Contestant, network: nn.Module, shape: tuple[int, ...], steps: int) -> Call:
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler = DDPMScheduler(variance_type="fixed_large")
    if who.default:
        pipeline = DDPMPipeline(network.unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return lambda: pipeline(batch_size=shape[0], num_inference_steps=steps, output_type="np")
    layout = torch.channels_last if who.channels_last else torch.contiguous_format
    dtype = getattr(torch, who.dtype)

    @torch.inference_mode()
    def sample() -> Tensor:
        x = torch.randn(shape, dtype=dtype, device=DEVICE).to(memory_format=layout)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.to(DEVICE).repeat(len(x))), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)

    return sample


def lucidrains() -> types.ModuleType:
    """denoising-diffusion-pytorch with its network and diffusion; what only its trainer needs may be missing."""
    with stand_ins(NOT_NEEDED):
        module = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    module.tqdm = lambda steps, **_: steps  # type: ignore[attr-defined]  # no bar
    return module


@contextlib.contextmanager
def stand_ins(packages: tuple[str, ...]) -> Iterator[None]:
    """Modules with empty classes in place of packages that are not installed, while another is imported."""
    missing = [name for name in packages if name not in sys.modules and importlib.util.find_spec(name) is None]
    finder = _StandIns(missing)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]


class _StandIns:
    """Finds a module of any name inside the packages that are missing."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
