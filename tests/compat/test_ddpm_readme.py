"""The scripts in the README of denoising-diffusion-pytorch, with another import line."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch

from fastddpm.compat.denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet, processes
from tests.compat.original import skip_unless_installed
from tests.compat.toy_diffusion import make_folder

SIZE, STEPS = 8, 2
SCRIPTS = {"usage": "training_images", "trainer": "Trainer(", "explorative": "XMWrapper(", "sequences": "Trainer1D("}


@pytest.fixture(autouse=True)
def _without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pytorch-fid is installed, it would fetch the weights of its network."""
    for name in ("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"):
        monkeypatch.setitem(sys.modules, name, None)


def scripts() -> list[str]:
    """Every block of Python code, as it stands in the package that is installed."""
    readme = importlib.metadata.metadata("denoising-diffusion-pytorch").get_payload()
    blocks = re.findall(r"^```python\n(.*?)^```", str(readme), flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "import" in block]


def ours(script: str, folder: Path) -> str:
    """The script with our import line, and with the path, train_num_steps and image_size of a short test."""
    script, changed = re.subn(r"^from denoising_diffusion_pytorch import", IMPORT, script, flags=re.MULTILINE)
    assert changed == 1
    script = script.replace("path/to/your/images", str(folder))
    script = re.sub(r"train_num_steps = \d+", f"train_num_steps = {STEPS}", script)
    return re.sub(r"image_size = 128", f"image_size = {SIZE}", script).replace("128, 128)", f"{SIZE}, {SIZE})")


IMPORT = "from fastddpm.compat.denoising_diffusion_pytorch import"


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:Trainer.*(pytorch-fid|GPUs)")  # which is what they say on this machine
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_the_readme_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_installed("denoising_diffusion_pytorch")
    monkeypatch.chdir(tmp_path)
    [script] = [
        block for block in scripts()
        if SCRIPTS[name] in block and not (name == "usage" and "XMWrapper" in block)
    ]  # fmt: skip
    names: dict[str, object] = {}
    exec(ours(script, make_folder(tmp_path / "images")), names)
    samples = names.get("sampled_images", names.get("sampled_seq"))
    if name == "trainer":
        trainer = names["trainer"]
        assert isinstance(trainer, Trainer)
        assert trainer.step == STEPS
    else:
        shape = (4, 32, 128) if name == "sequences" else (4, 3, SIZE, SIZE)
        assert isinstance(samples, torch.Tensor)
        assert samples.shape == shape
        assert 0 <= samples.min() < samples.max() <= 1


def test_every_script_of_the_readme_is_run() -> None:
    skip_unless_installed("denoising_diffusion_pytorch")
    assert len(scripts()) == len(SCRIPTS)


def test_a_script_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As short as a user writes it, with a small network."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images")
    model = Unet(dim=8, dim_mults=(1, 2), flash_attn=True)
    diffusion = GaussianDiffusion(model, image_size=SIZE, timesteps=20, sampling_timesteps=3)
    monkeypatch.setattr(processes, "choose_device", lambda name: torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"float32|pytorch-fid"):
        trainer = Trainer(
            diffusion, "images", train_batch_size=16, train_lr=8e-5, train_num_steps=4, gradient_accumulate_every=2,
            ema_decay=0.995, amp=True, calculate_fid=True, save_and_sample_every=2,
        )  # fmt: skip
    trainer.train()
    assert sorted(path.name for path in Path("results").iterdir()) == [
        "model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png",
    ]  # fmt: skip
    again = Trainer(diffusion, "images", calculate_fid=False)
    again.load(2)
    assert again.step == 4
    samples = again.ema.ema_model.sample(batch_size=4)  # type: ignore[operator]
    assert samples.shape == (4, 3, SIZE, SIZE)
