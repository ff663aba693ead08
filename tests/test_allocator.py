"""What is freed is kept while a sampler or a training runs on a CPU, and only then."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastddpm
from fastddpm import _allocator
from fastddpm._allocator import GIVEN_BACK, KEPT, USUAL, freed_memory_kept, keep_freed_memory

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the allocator is asked for, in a process where nothing was decided."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(_allocator, "_set", found.append)
    monkeypatch.setattr(_allocator, "_decided", False)
    return found


def test_kept_within_the_outermost_block_also_where_it_fails(asked: list[tuple[int, int]]) -> None:
    with freed_memory_kept(CPU):
        with pytest.raises(KeyError), freed_memory_kept(CPU):
            raise KeyError
        assert asked == [KEPT]
    assert asked == [KEPT, USUAL]
    with pytest.raises(KeyError), freed_memory_kept(CPU):
        raise KeyError
    assert asked == [KEPT, USUAL] * 2


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_training_decided_holds(asked: list[tuple[int, int]], keep: bool) -> None:
    keep_freed_memory(keep)
    with freed_memory_kept(CPU):
        pass
    assert asked == [KEPT if keep else GIVEN_BACK]
    with freed_memory_kept(CPU):
        keep_freed_memory(keep)
    assert asked == [KEPT if keep else GIVEN_BACK] * 2


def test_a_gpu_has_its_own_allocator(asked: list[tuple[int, int]]) -> None:
    with freed_memory_kept(torch.device("cuda", 0)):
        pass
    assert asked == []


def test_samplers_and_evaluations_keep_it(asked: list[tuple[int, int]]) -> None:
    inside: list[int] = []

    class Network(nn.Module):
        channels, image_size = 3, (8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            inside.append(len(asked))
            return x * 0

    diffusion = fastddpm.GaussianDiffusion(Network(), image_size=8, channels=3)
    diffusion.sample(2, sampler="ddim", num_steps=2, batch_size=1)
    assert asked == [KEPT, USUAL] and inside == [1] * 4
    fastddpm.sampling.sample_ddim(lambda x, t, labels: x, diffusion.schedule, (1, 3, 8, 8), num_steps=2, seed=0)
    assert asked == [KEPT, USUAL] * 2


PAGES = 4 * 48 // 2  # of the large kind, of 2 MiB
FAULTS = """
import resource, torch
from fastddpm._allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(12 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with freed_memory_kept(torch.device("cpu")):
    for _ in range(3):
        faults()  # aligned blocks move for a while
    print(outside, faults())
"""


def faults(**environment: str) -> tuple[int, int]:
    """Pages that the system had to map for 48 MiB, four times: outside, and within a block that had them before."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    run = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, env=env)
    outside, inside = map(int, run.stdout.split())
    return outside, inside


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not has_glibc(), reason="not glibc's allocator")
def test_no_page_is_mapped_anew_within_a_block() -> None:
    outside, inside = faults()
    assert outside >= PAGES and inside < outside / 4


@pytest.mark.skipif(not has_glibc(), reason="not glibc's allocator")
def test_what_the_user_chose_stays() -> None:
    _, inside = faults(MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert inside >= PAGES
