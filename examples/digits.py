"""Train on the handwritten digits that scikit-learn carries (8 x 8, 17 grey levels), sample, and measure bits per
dimension.

    python examples/digits.py --out demo            about four minutes on two cores
    python examples/digits.py --out demo --smoke    half a minute, to see that everything works
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import fastddpm
from fastddpm.likelihood import bits_per_dim, histogram_bits_per_dim, plot_bits_per_dim
from fastddpm.pictures import plot_loss, save_film, save_grid
from fastddpm.training import load_diffusion, make_configs

HELD_OUT = 297
LEVELS = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder for everything that is made (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a short training, to see that everything works")
    args = parser.parse_args()
    out = Path(args.out)

    digits = load_digits()
    shuffled = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)[shuffled]  # [1797, 1, 8, 8], values 0..16
    held_out, train = images[:HELD_OUT], images[HELD_OUT:]

    length = dict(num_images=6_400, warmup_images=640, log_every_images=640) if args.smoke else {}
    unet, diffusion, training = make_configs("digits", train=dict(output_dir=str(out), **length))
    model = fastddpm.GaussianDiffusion(fastddpm.UNet(unet), config=diffusion)
    data = fastddpm.load_images(train, levels=LEVELS)
    fastddpm.Trainer(model, data, training).train()

    model = load_diffusion(out)  # the averaged weights of the last checkpoint
    frames: list[torch.Tensor] = []

    def keep(i: int, num_steps: int, x: torch.Tensor, pred: torch.Tensor) -> None:
        if i % 2 == 1 or i == num_steps - 1:
            frames.append((x / 2 + 0.5).clamp(0, 1))

    samples = model.sample(64, seed=1, callback=keep)
    result = bits_per_dim(model, held_out)
    histogram = histogram_bits_per_dim(train, held_out, LEVELS)

    made = {
        "samples": save_grid(samples, out / "samples.png"),
        "real digits": save_grid(train[:64], out / "real.png", levels=LEVELS),
        "how noise becomes digits": save_film(frames, out / "denoising.gif"),
        "loss": plot_loss(out / "metrics.jsonl", out / "loss.png", "handwritten digits"),
        "bits per dimension by timestep": out / "bits_per_dim.png",
    }
    plot_bits_per_dim(result, out / "bits_per_dim.png")
    report = {**result.to_dict(), "histogram": histogram, "training_images_seen": training.num_images}
    (out / "bits_per_dim.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    print(f"\nbits per dimension of the {HELD_OUT} digits held out ({LEVELS} grey levels)")
    print(f"  this model           {result.total:.3f} +- {result.standard_error:.3f}")
    print(
        f"    prior {result.prior:.4f}, timesteps {result.total - result.prior - result.decoder:.3f}, "
        f"decoder {result.decoder:.3f}"
    )
    print(f"  per-pixel histogram  {histogram:.3f}")
    print("pictures")
    for name, path in made.items():
        print(f"  {name + ':':<32}{path}")


if __name__ == "__main__":
    main()
