"""A training of compat.denoising_diffusion_pytorch in two processes, as torchrun or `accelerate launch` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastddpm.compat.denoising_diffusion_pytorch import processes
from tests.compat.one_of_several import train
from tests.compat.toy_diffusion import make_folder
from tests.tolerance import assert_equal_to_rounding

ROOT = str(Path(__file__).parents[2])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of each batch, gradients averaged: the weights of one process, and each file written once."""
    monkeypatch.setattr(processes, "choose_device", lambda name: torch.device("cpu"))
    folder = make_folder(tmp_path / "images", 112)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": ROOT,
              "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    command = [sys.executable, "-m", "tests.compat.one_of_several", str(folder), str(tmp_path / "several")]
    running = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors.decode()
    found = [torch.load(tmp_path / "several" / f"weights-of-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(found[0], found[1])
    alone = train(str(folder), str(tmp_path / "alone"), seed=0)
    expected = torch.cat([p.detach().flatten() for p in alone.model.parameters()])
    assert_equal_to_rounding(found[0], expected, 2000, scale=expected.abs().max())
    files = {path.name for path in (tmp_path / "several").iterdir()} - {"weights-of-0.pt", "weights-of-1.pt"}
    assert files == {"model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png"}
    alone.load(2)
    contents = torch.load(tmp_path / "several" / "model-2.pt", weights_only=True)
    assert list(contents["model"]) == list(alone.model.state_dict())  # without a prefix of the wrapper
