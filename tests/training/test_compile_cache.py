"""What torch.compile made of the network is there for the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = """
import json, sys, time, torch, fastddpm
from fastddpm.training.config import compile_network
unet = fastddpm.UNet(image_size=8, base_channels=8, channel_mult=(1,), num_groups=4, attention_resolutions=())
compile_network(unet)
begin = time.perf_counter()
y = unet(torch.ones(2, 3, 8, 8), torch.zeros(2))
if sys.argv[1] == "train":
    y.sum().backward()
from torch._dynamo.utils import counters
print(json.dumps({"seconds": time.perf_counter() - begin, **counters["inductor"]}))
"""


def process(cache: Path, what: str) -> dict[str, Any]:
    """What a new process counted and took."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, what], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["sample", "train"])
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path, what: str) -> None:
    first, second = process(tmp_path, what), process(tmp_path, what)
    assert first["fxgraph_cache_miss"] > 0 and "fxgraph_cache_hit" not in first
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"] and "fxgraph_cache_miss" not in second
    assert second["seconds"] < first["seconds"] / 1.5
