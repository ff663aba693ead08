"""The example of the README runs, with a smaller network and less of everything."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
SMALLER = {
    "2_000_000": "64",
    "base_channels=64": "base_channels=32",
    "batch_size=64": "batch_size=4, num_grid_samples=1, grid_steps=1",
    "sample(64": "sample(2",
    'schedule="cosine"': 'schedule="cosine", num_timesteps=50',
    "num_steps=50": "num_steps=2",
    "image_size=32": "image_size=16",
}


def test_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    example = found[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    for large, small in SMALLER.items():
        assert large in example
        example = example.replace(large, small)
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for n in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open(tmp_path / "samples.png").width > 16
    assert "bits per dimension" in capsys.readouterr().out


def test_the_readme_names_what_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    for linked in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (README.parent / linked).exists(), linked
    for variable in re.findall(r"FASTDDPM_\w+", text):
        assert variable in (README.parent / "setup.py").read_text(encoding="utf-8"), variable


def test_as_many_ops_have_kernels_for_gpus_as_is_said() -> None:
    numbers = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    ops = {path.parent.name for path in README.parent.glob("fastddpm/ops/*/interface.py")}
    on_gpu = {path.parent.name for path in README.parent.glob("fastddpm/ops/*/triton_impl.py")}
    assert on_gpu == {path.parent.name for path in README.parent.glob("csrc/*/*_cuda.cpp")} & ops
    said = f"{numbers[len(on_gpu)]} of {numbers[len(ops)]} in Triton or CUDA C++"
    assert said in README.read_text(encoding="utf-8")
    changes = (README.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    listed = re.search(rf"{numbers[len(ops)].title()} ops behind their final interfaces(.*?)\n- ", changes, re.DOTALL)
    assert listed is not None and set(re.findall(r"`(\w+)`", listed[1])) == ops | {"use_backend", "explain"}
