"""The most memory that a training of one contestant takes, in a process of its own: `peak_of`.

On the CPU it is the peak of the resident size less what the process had after its imports; on a GPU it is what torch
allocated at the most.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.peers.contestants import CIFAR10, DIFFUSERS, LARGE, OURS, TINY, Contestant, Network, Workshop
from fastddpm._calls import Repeated
from fastddpm.bench.memory import peak_of_child, peak_since, resident

ROOT = Path(__file__).parents[2]
NETWORKS = {network.name: network for network in (CIFAR10, LARGE, TINY)}


def peak_of(who: Contestant, network: Network, batch: int, threads: int) -> int | None:
    """Bytes of two training steps, of ours of two more than it takes until it repeats them from a list of their
    operators; None where the system does not tell."""
    argument = json.dumps({"who": asdict(who), "network": network.name, "batch": batch})
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import do_and_tell; do_and_tell(sys.argv[1])"
    )
    return peak_of_child([sys.executable, "-c", code, argument], threads)


def do_and_tell(argument: str) -> None:
    """Train as the argument says, and print the bytes."""
    work = json.loads(argument)
    who = Contestant(**work["who"])
    if who.library == DIFFUSERS:
        for name in ("UNet2DModel", "DDPMScheduler"):
            getattr(importlib.import_module("diffusers"), name)
    before = resident("VmRSS")
    step = Workshop(NETWORKS[work["network"]]).training_step(who, work["batch"])
    for _ in range(2 + (Repeated.WARM_UP if who.library == OURS else 0)):
        step()
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_since(before))
