"""The command line: fastddpm train | sample | evaluate | bench | info. Options of a training are made from the
configurations."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib.util
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import __version__, _native, bench, diffusion, outputs, pictures
from .diffusion import SAMPLERS, DiffusionConfig, GaussianDiffusion
from .likelihood import BitsPerDim, bits_per_dim, histogram_bits_per_dim, plot_bits_per_dim
from .nn import UNet, UNetConfig
from .prediction import PREDICTIONS
from .sampling import SPACINGS, VARIANCES, Callback
from .schedule import SCHEDULES
from .training import (
    PRESETS,
    DivergenceError,
    ImageDataset,
    InUseError,
    TrainConfig,
    Trainer,
    load_checkpoint,
    load_diffusion,
    load_images,
    make_configs,
)
from .training.atomic import megabytes
from .training.config import COMPILE_MODES, compile_network
from .training.data import cache_directory
from .training.load import open_checkpoint

PARTS: dict[str, tuple[type, str]] = {
    "unet": (UNetConfig, "network"),
    "diffusion": (DiffusionConfig, "diffusion"),
    "train": (TrainConfig, "training"),
}
FLAG_OF = {"in_channels": "channels", "output_dir": "out"}  # where the flag is not the name of the field
CHOICES = {
    "schedule": tuple(SCHEDULES),
    "first_log_variance": ("copy", "tiny"),
    "prediction": PREDICTIONS,
    "variance": VARIANCES,
    "loss": diffusion.LOSSES,
    "mu_target": ("mean", "sample"),
    "timestep_sampling": diffusion.TIMESTEP_SAMPLINGS,
}
OTHER_FLAGS = {  # of arguments of the library, by what tells of them
    "sample": {"dynamic_threshold_ratio": "--dynamic-threshold"},
    "dynamic_threshold": {"ratio": "--dynamic-threshold"},
    "interpolate": {"t": "--interpolate-at"},
}
NO_FLAGS = ("run", "flags", "checkpoint", "data", "what", "weights")  # in a namespace, and no names of options
IN_IMAGES = ", which counts images, each pass over the data anew"
ALIASES = {  # how other programs call an option, and what it may be here
    "--lr": ("--learning-rate",),
    "--ema": ("--ema-decay", "--weights"),
    "--batch": ("--batch-size",),
    "--bs": ("--batch-size",),
    "--epochs": ("--num-images",),
    "--steps": ("--num-steps", "--num-images"),
    "--timesteps": ("--num-timesteps", "--num-steps", "--timesteps-per-image"),
    "--size": ("--image-size",),
    "--resolution": ("--image-size",),
    "--output": ("--out",),
    "--gpu": ("--device",),
}
EXTRAS = {"plot": "matplotlib", "tensorboard": "tensorboard", "datasets": "datasets", "digits": "sklearn"}
MOST_FRAMES = 60
LONGEST_NUMBER = 30  # digits
BENCH_EXAMPLES = {
    "op": "fastddpm bench op --preset cifar10 --batch-size 16 --only group_norm_silu",
    "train": "fastddpm bench train --preset cifar10 --batch-size 8 --trace trace.json",
    "sample": "fastddpm bench sample runs/photos --batch-size 16 --sampler ddim",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 for a run that failed, 2 for a call that cannot work."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parse(_parser(), arguments)
    try:
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the output, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written goes there
        return 141  # 128 + SIGPIPE, as other programs end
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, DivergenceError, InUseError) as error:
        if args.debug or os.environ.get("FASTDDPM_DEBUG"):
            raise
        failed = isinstance(error, DivergenceError) or getattr(error, "errno", None) == errno.ENOSPC
        return _fail(_name_flags(str(error), args), 1 if failed else 2)


def train(args: argparse.Namespace) -> None:
    """fastddpm train DATA --out DIR."""
    given = {part: _given(args, part) for part in PARTS}
    preset = {part: dict(PRESETS[args.preset][part]) if args.preset else {} for part in PARTS}
    fields = {part: {**preset[part], **given[part]} for part in PARTS}
    levels = fields["diffusion"].get("levels", DiffusionConfig.levels)
    out = Path(fields["train"].get("output_dir", TrainConfig.output_dir))
    outputs.check_folder(out, "train", "--out")
    if not args.data.startswith("hf:"):
        outputs.check_apart(args.data, out, "train", "--out")
    if not outputs.is_run(out):
        pngs = [path for path in out.glob("samples/*.png") if path.stem.isdecimal()]
        remedy = "choose another folder, or move it away"
        outputs.check_replaceable({"--out": [out / "loss.png", *pngs]}, "train", remedy=remedy)
    # a number out of range is told before the data is read; the network is checked with the size of the images
    make_configs(args.preset, diffusion=given["diffusion"], train=given["train"])
    data = load_images(
        args.data, image_size=fields["unet"].get("image_size"), channels=fields["unet"].get("in_channels"),
        cache_dir=args.cache_dir, on_corrupt=args.on_corrupt, resize=args.resize, levels=levels,
    )  # fmt: skip
    found: dict[str, Any] = {"image_size": data.image_size, "in_channels": data.channels}
    if args.class_conditional:
        if data.num_classes is None:
            raise ValueError(
                f"train: expected classes for --class-conditional, got none in {args.data}; use sub-folders"
            )
        found["num_classes"] = data.num_classes
    if fields["diffusion"].get("variance", "").startswith("learned"):
        found["learned_variance"] = True
    unet, config, training = make_configs(
        args.preset, unet={**found, **given["unet"]}, diffusion=given["diffusion"], train=given["train"]
    )
    model = GaussianDiffusion(UNet(unet), config=config)
    if args.dry_run:
        _print_plan(model, unet, training, data, args)
        return
    resume: bool | str = "auto" if args.resume is None else args.resume
    Trainer(model, data, training, resume=resume, allow_changes=args.allow_changes).train()

    made = [out / "metrics.jsonl", *sorted((out / "samples").glob("*.png"))[-1:]]
    made += _drawn(lambda path: pictures.plot_loss(out / "metrics.jsonl", path), out / "loss.png")
    print("\n".join(["made:", *(f"  {path}" for path in made), f"  {open_checkpoint(out).path}"]))
    print(f"next:\n  fastddpm sample {out} --out {out / 'grid.png'}\n  fastddpm evaluate {out} TEST_IMAGES --out {out}")


def sample(args: argparse.Namespace) -> None:
    """fastddpm sample RUN --out grid.png."""
    _check_pictures(args)
    model = load_diffusion(args.checkpoint, ema=args.weights == "ema", device=args.device)
    labels = _labels(args.labels, args.num_images, model)
    if args.dry_run:
        print(f"would write {args.num_images} images of {args.checkpoint} to {args.out}")
        return
    first = None
    if args.compile is not None:
        compile_network(model.model, args.compile)
        first = _telling_first(model.device)
    if args.interpolate:
        a, b = (_open_image(path, model) for path in args.interpolate)
        weight = torch.linspace(0, 1, args.num_images)
        shape = (args.num_images, -1, -1, -1)
        images = model.interpolate(
            a.expand(shape).contiguous(), b.expand(shape).contiguous(), weight, t=args.interpolate_at, seed=args.seed,
            num_steps=args.num_steps, labels=labels, callback=first,
        )  # fmt: skip
    else:
        frames: list[Tensor] = []
        known = mask = None
        if (args.inpaint is None) != (args.mask is None):
            raise ValueError("sample: expected --inpaint and --mask together, got one of them; pass both pictures")
        if args.inpaint is not None:
            known = _open_image(args.inpaint, model)
            mask = (_open_image(args.mask, model).mean(1, keepdim=True) >= 0.5).float()
        images = model.sample(
            args.num_images, sampler=args.sampler, num_steps=args.num_steps, eta=args.eta, spacing=args.spacing,
            seed=args.seed, first_image=args.first_image, batch_size=args.batch_size, labels=labels,
            guidance_scale=args.guidance_scale, dynamic_threshold_ratio=args.dynamic_threshold, known=known, mask=mask,
            callback=_both(first, _filming(frames, min(args.num_images, args.batch_size or 64)) if args.film else None),
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        if args.film:
            print(f"made {pictures.save_film(frames, args.film, args.columns)}")
    print(f"made {pictures.save_grid(images, args.out, args.columns)}")
    if args.save_images:
        Path(args.save_images).mkdir(parents=True, exist_ok=True)
        for image, path in zip(images, _image_files(args), strict=True):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            pictures.save_signed(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), path)
        print(f"made {args.num_images} images in {args.save_images}")


def _check_pictures(args: argparse.Namespace) -> None:
    """Expect that all that a sampling is to write can be written."""
    pictures.check_grid_path(args.out, "sample", "--out")
    outputs.check_folder(Path(args.out).parent, "sample", "--out")
    if args.film:
        pictures.check_film_path(args.film, "sample", "--film")
        outputs.check_folder(Path(args.film).parent, "sample", "--film")
    if args.save_images:
        outputs.check_folder(args.save_images, "sample", "--save-images")
    files = {"--out": [Path(args.out)], "--film": [Path(args.film)] if args.film else []}
    files["--save-images"] = _image_files(args) if args.save_images else []
    read = [Path(path) for path in (args.inpaint, args.mask, *(args.interpolate or ())) if path is not None]
    outputs.check_replaceable(files, "sample", overwrite=args.overwrite, read=read)


def _image_files(args: argparse.Namespace) -> list[Path]:
    """Where --save-images puts each image: by its index, six digits at least."""
    first, folder = args.first_image, Path(args.save_images)
    return [folder / f"{n:06d}.png" for n in range(first, first + args.num_images)]


def _telling_first(device: torch.device) -> Callback:
    """Says once, after the first step, how long it took: the network is compiled in it."""
    begin, told = time.perf_counter(), False

    def tell(*_: Any) -> None:
        nonlocal told
        if not told:
            bench.timing.wait(device)
            print(f"compiled the network in {time.perf_counter() - begin:.1f} s, in the first step", flush=True)
        told = True

    return tell


def _both(first: Callback | None, second: Callback | None) -> Callback | None:
    """One callback for two, where there are two."""
    if first is None or second is None:
        return first or second

    def call(*step: Any) -> bool:
        return bool(first(*step)) | bool(second(*step))

    return call


def evaluate(args: argparse.Namespace) -> None:
    """fastddpm evaluate RUN DATA --out DIR."""
    outputs.check_folder(args.out, "evaluate", "--out")
    made = [Path(args.out) / f"bits_per_dim.{suffix}" for suffix in ("json", "png")]
    outputs.check_replaceable({"--out": made}, "evaluate", overwrite=args.overwrite)
    model = load_diffusion(args.checkpoint, ema=args.weights == "ema", device=args.device)
    levels = model.config.levels

    def load(source: str) -> ImageDataset:
        return load_images(
            source, image_size=model.image_size, channels=model.channels, cache_dir=args.cache_dir,
            on_corrupt=args.on_corrupt, resize=args.resize, levels=levels,
        )  # fmt: skip

    data = load(args.data)
    if model.num_classes is not None and data.labels is None:
        raise ValueError(
            f"evaluate: expected classes for a network with {model.num_classes}, got none in {args.data}; "
            "use sub-folders"
        )
    labels = None if model.num_classes is None else data.labels
    yardstick = None
    if args.histogram_baseline:  # before the evaluation, whose result an unreadable one would cost
        limit = args.max_images or len(data)
        yardstick = histogram_bits_per_dim(load(args.histogram_baseline).images, data.images[:limit], levels)
    result = bits_per_dim(
        model, data.images, labels, timesteps_per_image=args.timesteps_per_image, batch_size=args.batch_size,
        seed=args.seed, max_images=args.max_images, progress=sys.stderr.isatty(),
    )  # fmt: skip
    report = result.to_dict()
    print(_breakdown(result))
    if yardstick is not None:
        report["histogram"] = yardstick
        print(f"  per-pixel histogram of {args.histogram_baseline}: {yardstick:.3f} bits/dim")
    path, picture = made
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    drawn = _drawn(lambda picture: plot_bits_per_dim(result, picture), picture)
    print("\n".join(f"made {p}" for p in [path, *drawn]))


def bench_what(args: argparse.Namespace) -> None:
    """fastddpm bench op | train | sample [RUN]."""
    for flag, file in (("--json", args.json), ("--trace", args.trace)):
        if file is not None:
            outputs.check_folder(Path(file).parent, "bench", flag)
            outputs.check_replaceable({flag: [Path(file)]}, "bench", overwrite=args.overwrite)
    given = {part: _given(args, part) for part in PARTS}
    if args.checkpoint is not None and args.preset is not None:
        raise ValueError("bench: expected a RUN or --preset, got both; leave one of them out")
    options = _configured(args.checkpoint, args.preset, given)
    if args.what == "sample":
        options.update(sampler=args.sampler, num_steps=args.num_steps, measured_steps=args.measured_steps)
    work = bench.Work("train" if args.what == "train" else "sample", **options)
    trace = None if args.trace is None else Path(args.trace)
    if args.what == "op":
        found = bench.measure_ops(work, repeat=args.repeat, seconds=args.seconds, only=args.only, trace=trace)
        print(f"ops of one step, batch {work.config.batch_size}, {torch.get_num_threads()} threads")
        print("\n".join(bench.table_of(found)))
        record: Any = [row.to_dict() for row in found]
    else:
        peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
        report = bench.measure(work, repeat=args.repeat, seconds=args.seconds, peak_flops=peak, trace=trace)
        print("\n".join(bench.lines_of(report)))
        record = report.to_dict()
    if trace is not None:
        print(f"made {trace}; open it at https://ui.perfetto.dev")
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"made {args.json}")


def info(args: argparse.Namespace) -> None:
    """fastddpm info [RUN]."""
    built = _native.build_info()
    print(f"fastddpm {__version__} on {built['python']}, {built['platform']}")
    print("packages     " + ", ".join(f"{n} {v or 'not installed'}" for n, v in built["packages"].items()))
    print(f"processor    {built['cpu']}, {built['cpus']} cores, {torch.get_num_threads()} threads")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    print(f"GPUs         {', '.join(gpus) or 'none that torch can use'}")
    if built["native"] is None:
        print(f"native code  none: {built['reason']}")
    else:
        print(f"native code  {_told(built['native'])}")
    if built["cuda"] is None:
        print(f"CUDA kernels none: {built['cuda_reason']}")
    else:
        loaded = "loaded" if built["cuda_reason"] is None else f"not loaded: {built['cuda_reason']}"
        print(f"CUDA kernels {loaded}; {_told(built['cuda'])}")
    for extra, package in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        print(f"extra        {extra}: {'present' if there else f'pip install fastddpm[{extra}]'}")
    print(f"image cache  {_cached(cache_directory())}")
    if args.checkpoint is not None:
        checkpoint = (
            load_checkpoint(args.checkpoint) if _is_checkpoint(args.checkpoint) else open_checkpoint(args.checkpoint)
        )
        print(
            f"\n{checkpoint.path}: {checkpoint.images:,} images seen, {checkpoint.state['seconds']:,.0f} s of training"
        )
        print(json.dumps(checkpoint.config, indent=1))


def _cached(folder: Path) -> str:
    """What a cache of decoded images holds."""
    entries = list(folder.glob("images-*"))
    if not entries:
        return f"{folder}, empty"
    size = sum(file.stat().st_size for entry in entries for file in entry.glob("*"))
    sets = "1 data set" if len(entries) == 1 else f"{len(entries)} data sets"
    return f"{folder}, {megabytes(size)} in {sets}; may be deleted, images are decoded again when they are needed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastddpm", allow_abbrev=False,
        description="Train denoising diffusion models on your images, draw new images, and measure bits per dimension.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="train | sample | evaluate | bench | info")

    def command(run: Callable[[argparse.Namespace], None], help: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            run.__name__, help=help, description=help, epilog=f"example:\n  {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made.set_defaults(run=run, flags={})
        return made

    p = command(train, "Train on a folder or zip of images, an .npz, or a Hugging Face data set.",
                "fastddpm train photos/ --out runs/photos --image-size 32 --num-images 2000000")  # fmt: skip
    p.usage = "fastddpm train DATA --out DIR [--preset NAME] [options]"
    p.add_argument("data", help="a folder (sub-folders are classes), .zip, .npz, .npy, or hf:name")
    p.add_argument("--preset", choices=PRESETS, help="start from a named recipe; other options change it")
    p.add_argument("--class-conditional", action="store_true", help="teach the network the classes of the data")
    p.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="expect a run in --out to go on with, or none (default: go on where there is one)",
    )
    p.add_argument("--allow-changes", action="store_true", help="go on although training options have changed")
    p.add_argument(
        "--dry-run", action="store_true",
        help="print what would be done, and do nothing but decode the images, which are kept for the next run "
        "(--cache-dir)",
    )  # fmt: skip
    _add_data_options(p)
    p.add_argument(
        "--resize",
        choices=("resize", "refuse"),
        default="resize",
        help="what to do with images of another size (default: resize)",
    )
    _add_parts(p)

    p = command(sample, "Draw images from a trained model, into one picture.",
                "fastddpm sample runs/photos --out grid.png --sampler ddim --num-steps 50 --film film.gif")  # fmt: skip
    p.add_argument(
        "checkpoint",
        metavar="RUN",
        help="directory of a training run, or one of its checkpoints; or a DDPM pipeline of diffusers, "
        "a folder or a repository such as google/ddpm-cifar10-32",
    )
    p.add_argument("--out", default="samples.png", help="picture to write (default: %(default)s)")
    p.add_argument("--num-images", type=_at_least(1), default=64, help="how many (default: %(default)s)")
    p.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(default: %(default)s)")
    p.add_argument(
        "--num-steps",
        type=_at_least(1),
        help="calls of the network an image (default: all for ddpm, 50 for ddim, 20 for dpmpp_2m)",
    )
    p.add_argument("--eta", type=_number(0), default=0.0, help="randomness of ddim: 0 none, 1 as ddpm (default: 0)")
    p.add_argument(
        "--spacing", choices=SPACINGS, default="trailing", help="which timesteps to visit (default: %(default)s)"
    )
    p.add_argument("--seed", type=_at_least(0), default=0, help="image n of a seed is always the same (default: 0)")
    p.add_argument("--first-image", type=_at_least(0), default=0, help="index of the first image (default: 0)")
    p.add_argument(
        "--batch-size", type=_at_least(1),
        help="images at a time (default: all, at most 64 or on a GPU 256, and at most what fits into memory)",
    )  # fmt: skip
    p.add_argument(
        "--compile", choices=tuple(COMPILE_MODES),
        help="compile the network with torch.compile at the first step, and say how long it took; the next process "
        "finds what was compiled (default: no)",
    )  # fmt: skip
    p.add_argument("--labels", help="classes to draw: numbers such as 0,3,7 in turn, or all")
    p.add_argument(
        "--guidance-scale", type=_number(0), default=1.0, help="of classifier-free guidance; 1 is none (default: 1)"
    )
    p.add_argument(
        "--dynamic-threshold", type=_number(0), help="quantile in (0, 1] for strong guidance; 0.995 is usual"
    )
    p.add_argument("--film", help="write a film of the denoising, too: a path that ends in .gif or .webp")
    p.add_argument("--save-images", metavar="DIR", help="write each image into this folder, too")
    _add_overwrite(p)
    p.add_argument("--columns", type=_at_least(1), help="images a row (default: about a square)")
    p.add_argument("--inpaint", metavar="IMAGE", help="keep this picture where --mask is white, and draw the rest")
    p.add_argument("--mask", metavar="IMAGE", help="white: keep, black: draw")
    p.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="draw --num-images images from picture A to picture B"
    )
    p.add_argument(
        "--interpolate-at", type=_at_least(0), metavar="T", help="timestep to mix them at (default: the middle)"
    )
    p.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    _add_model_options(p)

    p = command(evaluate, "Bits per dimension of a data set: prior, each timestep, decoder.",
                "fastddpm evaluate runs/photos held-out/ --out runs/photos --timesteps-per-image 20")  # fmt: skip
    p.add_argument(
        "checkpoint",
        metavar="RUN",
        help="directory of a training run, or one of its checkpoints; or a DDPM pipeline of diffusers, "
        "a folder or a repository such as google/ddpm-cifar10-32",
    )
    p.add_argument("data", help="as for train; of the size the model has")
    p.add_argument("--out", default=".", help="folder for bits_per_dim.json and .png (default: here)")
    p.add_argument(
        "--timesteps-per-image",
        type=_at_least(1),
        help="estimate from that many timesteps of each image (default: all)",
    )
    p.add_argument("--max-images", type=_at_least(1), help="evaluate the first so many images (default: all)")
    p.add_argument("--batch-size", type=_at_least(1), default=256, help="images at a time (default: %(default)s)")
    p.add_argument("--seed", type=_at_least(0), default=0, help="of the noise (default: 0)")
    _add_overwrite(p)
    p.add_argument("--histogram-baseline", metavar="DATA", help="compare with a per-pixel histogram of these images")
    p.add_argument(
        "--resize",
        choices=("resize", "refuse"),
        default="refuse",
        help="for images of another size; bits of resized images are not those of the data (default: refuse)",
    )
    _add_data_options(p)
    _add_model_options(p)

    p = commands.add_parser(
        "bench", help="How fast a configuration runs here: images per second, share of the floor, peak memory.",
        description="Measure random images on this machine, with a network that is made or that of a RUN.",
        allow_abbrev=False,
    )  # fmt: skip
    kinds = p.add_subparsers(required=True, metavar="op | train | sample")
    for what, help in (
        ("op", "Each op at the shapes of the network, against a copy of as many bytes."),
        ("train", "A training step."),
        ("sample", "Sampling, by a few steps."),
    ):
        _add_bench(kinds, what, help)

    p = command(info, "Versions, hardware, native code; with RUN, a training run.", "fastddpm info runs/photos")
    p.add_argument("checkpoint", metavar="RUN", nargs="?", help="directory of a training run, or a checkpoint")
    return parser


def _add_parts(p: argparse.ArgumentParser) -> None:
    """An option for each field of the three configurations."""
    flags: dict[str, str] = {}
    for part, (config, title) in PARTS.items():
        _add_fields(p.add_argument_group(f"{title} (defaults are those without a preset)"), part, config, flags)
    p.set_defaults(flags=flags)


def _add_bench(kinds: Any, what: str, help: str) -> None:
    p = kinds.add_parser(
        what, help=help, description=help, epilog=f"example:\n  {BENCH_EXAMPLES[what]}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.usage = f"fastddpm bench {what} [RUN | --preset NAME] [options]"
    p.set_defaults(run=bench_what, what=what)
    p.add_argument("checkpoint", metavar="RUN", nargs="?", help="directory of a training run, or a checkpoint")
    p.add_argument("--preset", choices=PRESETS, help="start from a named recipe; other options change it")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p.add_argument("--repeat", type=_at_least(1), default=20, help="calls of each, the best counts (default: 20)")
    p.add_argument("--json", metavar="FILE", help="write what was found, too")
    _add_overwrite(p)
    if what == "op":
        p.add_argument("--only", metavar="OP", help="one op by its name (default: all that a step calls)")
    if what == "sample":
        p.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(default: %(default)s)")
        p.add_argument(
            "--num-steps", type=_at_least(1),
            help="calls of the network an image (default: all for ddpm, 50 for ddim, 20 for dpmpp_2m)",
        )  # fmt: skip
        p.add_argument(
            "--measured-steps", type=_at_least(1), default=5, help="how many of them are measured (default: 5)"
        )
    p.add_argument("--trace", metavar="FILE", help="write what ran when, as JSON for https://ui.perfetto.dev")
    if what != "op":
        p.add_argument(
            "--peak-tflops", type=_number(0), metavar="X",
            help="what the device can do by its data sheet (default: that of a large matrix product, measured)",
        )  # fmt: skip
    p.add_argument(
        "--seconds", type=_number(0), default=2.0 if what == "op" else 60.0,
        help="end a measurement there once three calls are timed (default: %(default)s)",
    )  # fmt: skip
    _add_parts(p)


def _add_data_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cache-dir", help="where decoded images are kept (default: the folder that fastddpm info shows)")
    p.add_argument(
        "--on-corrupt",
        choices=("skip", "raise"),
        default="skip",
        help="what to do with a damaged image: skip it and name it, or stop (default: skip)",
    )


def _add_overwrite(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that fastddpm did not write, too (default: refuse; those it wrote are replaced)",
    )


def _add_model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="the average of the weights, or the last ones (default: ema)",
    )
    p.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one (default: auto)"
    )


def _add_fields(group: Any, part: str, config: type, flags: dict[str, str]) -> None:
    """One option for each field of a configuration; what is not given is not in the namespace."""
    kinds, explained = typing.get_type_hints(config), _arguments_of(config)
    for field in dataclasses.fields(config):
        flag = "--" + FLAG_OF.get(field.name, field.name).replace("_", "-")
        flags[field.name] = flag
        text = field.metadata.get("help") or explained.get(field.name, "")
        options: dict[str, Any] = dict(dest=f"{part}.{field.name}", default=argparse.SUPPRESS)
        shown = "none" if field.default is None else _listed(field.default)
        options["help"] = f"{text.rstrip('.')} (default: {shown})".replace("%", "%%")
        kind = _inner(kinds[field.name])
        choices = field.metadata.get("choices") or CHOICES.get(field.name)
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices:
            options["choices"] = choices
        else:
            options["type"] = _reader(kind, optional=type(None) in typing.get_args(kinds[field.name]))
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}.get(kind, "N,N,..")
        group.add_argument(flag, **options)


def _inner(kind: Any) -> Any:
    """X of X | None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _reader(kind: Any, optional: bool) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if typing.get_origin(kind) is tuple:
            inside = "" if text.lower() == "none" else text.strip(" ()[],")
            values = tuple(_whole(v) for v in re.split(r"[,x ]+", inside)) if inside else ()
            return values * 2 if len(values) == 1 and typing.get_args(kind) == (int, int) else values
        return _whole(text) if kind is int else kind(text)

    read.__name__ = "list of whole numbers" if typing.get_origin(kind) is tuple else _name_of(kind)
    return read


def _arguments_of(config: type) -> dict[str, str]:
    """What the Args section of a docstring says of each argument."""
    section = (config.__doc__ or "").partition("Args:")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        start = re.match(r"^ {8}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, start[2].strip()))
        elif line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _name_of(kind: type) -> str:
    """How argparse is to call a kind of value that it cannot read."""
    return {int: "whole number", float: "number"}.get(kind, kind.__name__)


def _whole(text: str) -> int:
    """A whole number, written 2000000, 2_000_000 or 2e6."""
    try:
        value = Decimal(text)
        if value == value.to_integral_value() and value.adjusted() < LONGEST_NUMBER:
            return int(value)
    except ArithmeticError:  # what decimal raises for other text
        pass
    raise ValueError(f"no whole number: {text!r}")


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = _whole(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a number >= {least}, got {value}")
        return value

    read.__name__ = _name_of(int)
    return read


def _number(least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number >= {least:g}, got {text}")
        return value

    read.__name__ = "number"
    return read


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse, and name the nearest option where one is unknown."""
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = ["bench", args.what] if args.run is bench_what else [args.run.__name__]
        for name in command:
            chosen: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = chosen.choices[name]
        known = [flag for action in parser._actions for flag in action.option_strings]
        given = unknown[0].partition("=")[0]
        near = [flag for flag in ALIASES.get(given, ()) if flag in known] or difflib.get_close_matches(given, known)
        told = IN_IMAGES if given in ("--epochs", "--steps") and near[:1] == ["--num-images"] else ""
        hint = f"; did you mean {near[0]}{told}?" if near else f"; see fastddpm {' '.join(command)} --help"
        _exit(_fail(f"unknown option {unknown[0]}{hint}", 2))
    return args


def _configured(run: str | None, preset: str | None, given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of the three configurations: those of a run or preset, with what the call sets."""
    base: Any = PRESETS[preset] if preset is not None else {part: {} for part in PARTS}
    if run is not None:
        base = open_checkpoint(run).config
        if base["unet"] is None:
            raise ValueError(f"bench: expected a run of a fastddpm.UNet, got {run} of another network; use --preset")
    fields: dict[str, Any] = {part: {**base[part], **given[part]} for part in PARTS}
    if fields["diffusion"].get("variance", "").startswith("learned"):
        fields["unet"]["learned_variance"] = True
    make_configs(**fields)  # a number out of its range is told here
    return fields


def _given(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """The fields of one configuration that the call sets."""
    return {key.partition(".")[2]: value for key, value in vars(args).items() if key.startswith(f"{part}.")}


def _name_flags(message: str, args: argparse.Namespace) -> str:
    """The message in the words of this command: options in place of names, and of values in Python's form."""
    who, expected, text = message.partition(": expected ")
    if not expected:
        return message
    names = {**args.flags, **{flag[2:].replace("-", "_"): flag for flag in args.flags.values()}}
    names |= {name: f"--{name.replace('_', '-')}" for name in vars(args) if "." not in name and name not in NO_FLAGS}
    text = re.sub(r" \(\w+=\)", "", text.replace("resume='auto'", "neither --resume nor --no-resume"))
    for name, flag in {**names, **OTHER_FLAGS.get(who, {})}.items():
        here = rf"(?<![\w/.-]){name}"
        text = re.sub(rf"(?<![\w/.-])({'|'.join(PARTS)})\.{name}(?!\w)", flag, text)
        text = re.sub(rf"{here}=(\([\d, ]*\)|'[^']*'|[\w.,+-]*\w)", partial(_as_option, flag), text)
        text = re.sub(rf"{here}=(?=\W|$)(?!\.)", flag, text)
        if "_" in name or text.startswith(f"{name} "):
            text = re.sub(rf"{here}(?![\w(=/]|\.\w)", flag, text)
    text = re.sub(r" \((--[\w-]+)[\w ]*\)", lambda m: "" if m[1] in text[: m.start()] else m[0], text)
    return f"{who}{expected}{text}"


def _as_option(flag: str, found: re.Match[str]) -> str:
    """An option with the value that Python's form has: --image-size 8,8 of image_size=(8, 8)."""
    value = found[1].strip("()',").replace(", ", ",") or "none"
    return {"True": flag, "False": f"--no-{flag[2:]}", "None": f"{flag} none"}.get(value, f"{flag} {value}")


def _fail(message: str, code: int) -> int:
    print(f"fastddpm: error: {message}", file=sys.stderr)
    return code


def _exit(code: int) -> NoReturn:
    raise SystemExit(code)


def _print_plan(
    model: GaussianDiffusion, unet: UNetConfig, c: TrainConfig, data: ImageDataset, args: argparse.Namespace
) -> None:
    parameters = sum(p.numel() for p in model.model.parameters())
    steps = math.ceil(c.num_images / c.batch_size)
    print(data.report)
    print(f"network      {parameters:,} parameters")
    print(
        f"state        {parameters * 20 / 2**20:,.0f} MiB for weights, gradients, moments and average (not activations)"
    )
    print(
        f"training     {c.num_images:,} images in {steps:,} steps of {c.batch_size}: "
        f"{c.num_images / len(data):,.1f} times each image"
    )
    print(f"would write  {c.output_dir}/checkpoint-*, metrics.jsonl, samples/*.png, loss.png")
    print(json.dumps({"unet": dataclasses.asdict(unet), "diffusion": model.to_dict(), "train": c.to_dict()}, indent=1))


def _breakdown(result: BitsPerDim) -> str:
    steps = result.num_timesteps
    each = (
        "every timestep" if result.timesteps_per_image is None else f"{result.timesteps_per_image} timesteps an image"
    )
    middle = float(result.per_timestep[1:].sum())
    rows = [
        f"bits per dimension of {result.num_images:,} images with {result.levels} grey levels, {each} "
        f"({result.network_calls:,} network calls, {result.seconds:,.0f} s)",
        f"  prior            {result.prior:10.6f}",
        f"  t = {steps - 1} .. 1     {middle:10.6f}",
        f"  decoder (t = 0)  {result.decoder:10.6f}",
        f"  total            {result.total:10.6f} +- {result.standard_error:.4f} (standard error over images)",
    ]
    return "\n".join(rows)


def _drawn(draw: Callable[[Path], object], path: Path) -> list[Path]:
    """Draw a plot; without matplotlib say so. Returns what was made."""
    try:
        draw(path)
        return [path]
    except ImportError as error:
        print(f"not drawn: {path} ({error})")
        return []


def _labels(text: str | None, count: int, model: GaussianDiffusion) -> Tensor | None:
    """Classes of the images: those named, in turn."""
    if text is None:
        return None
    if model.num_classes is None:
        raise ValueError(
            "sample: expected no --labels for a network without classes, got some; train with --class-conditional"
        )
    try:
        named = range(model.num_classes) if text == "all" else [int(v) for v in text.split(",")]
    except ValueError:
        raise ValueError(f"sample: expected --labels such as 0,3,7 or all, got {text!r}; classes are numbers") from None
    return torch.tensor(list(named)).repeat(math.ceil(count / len(named)))[:count]


def _open_image(path: str, model: GaussianDiffusion) -> Tensor:
    """A picture as float [1, C, H, W] in [0, 1], cropped and resized to the model's size."""
    height, width = model.image_size
    try:
        with Image.open(path) as opened:
            colour = ImageOps.exif_transpose(opened).convert("L" if model.channels == 1 else "RGB")
            image = ImageOps.fit(colour, (width, height))
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        reason = (getattr(error, "strerror", None) or str(error)).replace(f" {str(path)!r}", "")
        raise ValueError(
            f"sample: expected a picture that can be read, got {path} ({reason}); check the path and the file"
        ) from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, height, width, -1)
    return (pixels.permute(0, 3, 1, 2).float() / 255).contiguous()


def _filming(frames: list[Tensor], count: int) -> Callback:
    """Keep the state now and then, of the first batch."""

    def keep(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        every = math.ceil(num_steps / MOST_FRAMES)
        first_batch = len(frames) < math.ceil(num_steps / every)
        if first_batch and (i % every == every - 1 or i == num_steps - 1):
            frames.append((x[:count] / 2 + 0.5).clamp(0, 1).cpu())

    return keep


def _is_checkpoint(path: str) -> bool:
    return (Path(path) / "state.json").exists()


def _told(how_built: dict[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {_listed(value)}" for name, value in how_built.items())


def _listed(value: object) -> str:
    return ",".join(str(v) for v in value) or "none" if isinstance(value, (list, tuple)) else str(value)
