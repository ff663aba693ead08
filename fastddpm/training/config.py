"""The options of a training run, as plain data, each with its range and help, which the command line reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

import torch
from torch import nn

PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "auto")
DECAYS = ("constant", "cosine", "linear")
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""By name what torch.compile is told: a step is recorded as a CUDA graph by this library, as a whole."""
CUDA_GRAPHS = ("auto", "on", "off")
DATA_PLACES = ("auto", "device", "host")
WARMUP_IMAGES, WARMUP_SHARE = 640_000, 10
"""The warm-up where none is given: that of Ho et al. 2020, and at most one in so many images of the training."""

FREE_ON_RESUME = (
    "output_dir",
    "device",
    "log_every_images",
    "checkpoint_every_images",
    "checkpoint_every_minutes",
    "sample_every_images",
    "num_grid_samples",
    "grid_sampler",
    "grid_steps",
    "keep_checkpoints",
    "tensorboard",
    "data_on",
    "cuda_graph",
    "recompute",
)
"""Options that do not change the weights, so a resumed run may have others; num_images too, if lr_decay is constant: a
warm-up that was not given stays as long as it was."""


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and its range: least (>=), above (>), below (<), choices."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """What a `Trainer` does with a diffusion and a data set. Progress counts images, not steps.

    Args: see the help of each field.

    Raises:
        ValueError: a number out of its range, or options that do not fit together. TypeError: a value of another type.
    """

    output_dir: str = _option("run", "directory for checkpoints, metrics and sample grids")
    num_images: int = _option(12_800_000, "images to train on in all, each pass over the data counted anew", least=1)
    batch_size: int = _option(128, "images per optimiser step", least=1)
    micro_batch_size: int | None = _option(
        None, "images per forward and backward pass, a divisor of batch_size: gradients add up over them; "
        "smaller needs less memory (default: the whole batch)", least=1,
    )  # fmt: skip
    learning_rate: float = _option(2e-4, "peak learning rate of Adam", above=0)
    warmup_images: int | None = _option(
        None, f"images over which the learning rate rises linearly from 0 (none: {WARMUP_IMAGES:,}, at most a tenth of "
        "num_images)", least=0,
    )  # fmt: skip
    lr_decay: str = _option(
        "constant", "what the learning rate does after the warm-up, until num_images", choices=DECAYS
    )
    final_learning_rate: float = _option(0.0, "where lr_decay cosine or linear ends", least=0)
    adam_beta1: float = _option(0.9, "decay of Adam's first moment", least=0, below=1)
    adam_beta2: float = _option(0.999, "decay of Adam's second moment", least=0, below=1)
    adam_eps: float = _option(1e-8, "added to the root of Adam's second moment", above=0)
    weight_decay: float = _option(0.0, "decoupled weight decay (AdamW)", least=0)
    max_grad_norm: float | None = _option(1.0, "clip the norm of all gradients to this (none: no clipping)", above=0)
    ema_decay: float | None = _option(
        0.9999, "decay per step of the average of the weights that samples are drawn with (none: no average, which "
        "saves the memory of the weights once)", least=0, below=1,
    )  # fmt: skip
    ema_halflife_images: float | None = _option(
        None, "give the decay of the average as a half-life in images, in place of ema_decay", above=0
    )
    ema_warmup: bool = _option(True, "average faster at first: no decay above (1 + steps) / (10 + steps)")
    horizontal_flip: bool = _option(True, "mirror every second image, at random")
    precision: str = _option(
        "auto",
        "of the network: bfloat16 and float16 are autocast, loss and weights stay float32, float16 scales the loss; "
        "on a GPU float32 multiplies in float32, tf32 in TensorFloat-32 (10 bits); auto is bfloat16 on a GPU that has "
        "it, else float32",
        choices=PRECISIONS,
    )  # fmt: skip
    gradient_dtype: str | None = _option(
        None, "bfloat16 keeps gradients in half of their memory until the update, rounded to 8 bits, sums over "
        "micro-batches likewise (none: float32, or, of weights in half precision, as they come)", choices=("bfloat16",),
    )  # fmt: skip
    weight_mirror: str | None = _option(
        None, "in bfloat16 and float16 keep the weights in half precision, too: the optimiser writes them in the pass "
        "that updates those in float32, the U-Net reads them, and no step casts a weight or its gradient (none: on, "
        "but for x86 processors without AMX, where half precision computes in float32)", choices=("on", "off"),
    )  # fmt: skip
    recompute: bool = _option(
        False, "keep less in memory: residual blocks, attention and downsampling of the U-Net are computed again for "
        "their gradients, and on a CPU the process gives freed memory back at once, which takes time, too",
    )  # fmt: skip
    compile: bool = _option(
        False, "compile the network with torch.compile (minutes at the start, faster afterwards; the next process "
        "finds what this one compiled)",
    )  # fmt: skip
    compile_mode: str | None = _option(
        None, "how much torch.compile tries: max-autotune times kernels against each other, on a GPU (none: its "
        "default)", choices=tuple(COMPILE_MODES),
    )  # fmt: skip
    cuda_graph: str = _option(
        "auto", "on a GPU, record a training step and launch it as a whole, which leaves nothing to do for Python; on "
        "a CPU, list its operators, and repeat them alone (auto: for the U-Net of this library)", choices=CUDA_GRAPHS,
    )  # fmt: skip
    deterministic: bool = _option(
        True, "use only algorithms that give the same bits each time, so that resuming is exact"
    )
    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    data_on: str = _option(
        "auto", "where the images lie, in memory of the device or of the host (auto: device, if they fill at most a "
        "quarter of it)", choices=DATA_PLACES,
    )  # fmt: skip
    seed: int = _option(0, "of data order, noise, timesteps, flips and dropout", least=0, below=2**63)
    log_every_images: int = _option(12_800, "images between two lines of metrics", least=1)
    checkpoint_every_images: int = _option(128_000, "images between two checkpoints", least=1)
    checkpoint_every_minutes: float | None = _option(
        10.0, "minutes after which a checkpoint is written even so, of those that are kept (none: by images alone)",
        above=0,
    )  # fmt: skip
    keep_checkpoints: int = _option(2, "newest checkpoints to keep", least=1)
    sample_every_images: int = _option(640_000, "images between two grids of samples (0: none)", least=0)
    num_grid_samples: int = _option(64, "images on a grid", least=1)
    grid_sampler: str = _option("ddim", "sampler for grids", choices=SAMPLERS)
    grid_steps: int | None = _option(50, "sampling steps for grids (none: every timestep)", least=1)
    tensorboard: bool = _option(False, "write metrics and grids for TensorBoard, too (needs fastddpm[tensorboard])")

    def __post_init__(self) -> None:
        kinds = get_type_hints(TrainConfig)
        for f in fields(self):
            value = check_option(f.name, kinds[f.name], f.metadata, getattr(self, f.name), f.default)
            object.__setattr__(self, f.name, value)
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"TrainConfig: expected micro_batch_size to divide batch_size {self.batch_size}, "
                f"got {self.micro_batch}; choose one of {', '.join(str(n) for n in self._divisors())}"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"TrainConfig: expected final_learning_rate <= learning_rate {self.learning_rate}, "
                f"got {self.final_learning_rate}; the learning rate never rises after the warm-up"
            )
        if self.ema_decay is None and self.ema_halflife_images is not None:
            raise ValueError(
                f"TrainConfig: expected no ema_halflife_images without an average (ema_decay None), got "
                f"{self.ema_halflife_images}; leave one of them out"
            )
        if self.compile_mode is not None and not self.compile:
            raise ValueError(
                f"TrainConfig: expected compile=True with compile_mode, got compile_mode {self.compile_mode!r} alone; "
                "give both"
            )
        if self.warmup_images is not None and self.warmup_images >= self.num_images:
            raise ValueError(
                f"TrainConfig: expected warmup_images < num_images {self.num_images}, got {self.warmup_images}; the "
                f"learning rate would not reach its peak, give fewer, or none for {_default_warmup(self.num_images)}"
            )
        try:
            torch.device(self.device if self.device != "auto" else "cpu")
        except RuntimeError as error:
            raise ValueError(
                f"TrainConfig: expected device to be auto, cpu, cuda or cuda:<number>, got {self.device!r}; choose one"
            ) from error

    @property
    def micro_batch(self) -> int:
        """Images per forward and backward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def warmup(self) -> int:
        """Images of the warm-up: warmup_images, or what stands for none there."""
        return _default_warmup(self.num_images) if self.warmup_images is None else self.warmup_images

    def _divisors(self) -> list[int]:
        return [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data for JSON, with the number of warmup_images."""
        return {**asdict(self), "warmup_images": self.warmup}


def _default_warmup(num_images: int) -> int:
    return min(WARMUP_IMAGES, num_images // WARMUP_SHARE)


def check_option(name: str, kind: Any, limits: Mapping[str, Any], value: Any, default: Any) -> Any:
    """The value of an option, an int made a float where a float is meant.

    Args:
        name: of the option. kind: its type, such as ``int | None``. limits: least, above, below, choices.
        value: what was given. default: named in the message.

    Raises:
        ValueError, TypeError: see `TrainConfig`.
    """
    kinds = getattr(kind, "__args__", (kind,))
    if value is None and type(None) in kinds:
        return None
    wanted = next(k for k in kinds if k is not type(None))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(
            f"TrainConfig: expected {name} of type {wanted.__name__}, got {value!r}; the default is {default!r}"
        )
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(
            f"TrainConfig: expected {name} to be one of {', '.join(limits['choices'])}, got {value!r}; "
            f"the default is {default!r}"
        )
    for limit, sign, holds in (("least", ">=", operator.ge), ("above", ">", operator.gt), ("below", "<", operator.lt)):
        if limit in limits and not holds(value, limits[limit]):
            raise ValueError(
                f"TrainConfig: expected {name} {sign} {limits[limit]}, got {value}; the default is {default!r}"
            )
    if wanted is float and not value < float("inf"):
        raise ValueError(f"TrainConfig: expected {name} to be finite, got {value}; the default is {default!r}")
    return value


def free_on_resume(config: TrainConfig) -> tuple[str, ...]:
    """The options that a resumed run may have changed and still give the weights of an uninterrupted one."""
    return (*FREE_ON_RESUME, *(("num_images",) if config.lr_decay == "constant" else ()))


def choose_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        ValueError: there is no such device here, or it is neither a processor nor a CUDA GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"choose_device: expected device cpu or cuda, got {name}; use one of these, or auto")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU that torch can use"
        raise ValueError(f"choose_device: expected device {name} to exist, got {found}; use device='auto' or 'cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def compile_network(network: nn.Module, mode: str | None = None) -> None:
    """Have torch.compile compile a network at its next call, in place.

    Args:
        mode: "default" or "max-autotune"; None is "default".

    Raises:
        ValueError: another mode.

    torch keeps what it compiled in a folder ($TORCHINDUCTOR_CACHE_DIR, or one under the system's temporary folder),
    where the next process finds it.
    """
    if mode is not None and mode not in COMPILE_MODES:
        raise ValueError(f"compile_network: expected mode {' or '.join(COMPILE_MODES)}, got {mode!r}; choose one")
    network.compile(mode=COMPILE_MODES[mode or "default"])


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that the network computes in: torch.bfloat16, torch.float16 or torch.float32.

    Raises:
        ValueError: "tf32" on a processor, which has no such products.
    """
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"choose_precision: expected a GPU for precision tf32, got {device}; use float32, or auto")
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if fast else torch.float32
    found: torch.dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    return found
