"""What torch.compile generates of the ops for an H100 that is not there.

    python -m tests.ops.inductor_for_gpu              prints how many kernels of each kind

Tensors are fake ones on "cuda", and torch is told of a GPU; Inductor then writes the code that would run. It is stopped
there, and our kernels in it are compiled by Triton with the signatures that it gives them. Must run where
TRITON_INTERPRET is not set. A whole network does not pass: torch looks for a GPU to trace its other layers.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastddpm

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="", uuid="", clock_rate=1980000, memory_clock_rate=2619000,
    memory_bus_width=5120,
)  # fmt: skip
NHWC = torch.channels_last
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class GeneratedError(Exception):
    """Carries the code out of Inductor."""


def _pretend() -> None:
    """Tell torch and Triton of an H100; nothing in this process can run on one."""
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch._subclasses.fake_tensor as fake_tensor
    import triton
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", 90, 32)), get_current_device=always(0),
            get_current_stream=always(0), is_active=always(True),
        )
    )  # fmt: skip
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_properties=H100, get_device_capability=(9, 0),
        is_bf16_supported=True, _exchange_device=0, _maybe_exchange_device=0, _lazy_init=None, synchronize=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None,
    )  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    torch.cuda.random._lazy_init = always(None)
    of_cuda = device_interface.CudaInterface
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "is_bf16_supported"):
        setattr(of_cuda, name, staticmethod(always(answers[name])))
    of_cuda.get_compute_capability = staticmethod(always(90))
    of_cuda.Worker.get_device_properties = staticmethod(always(H100))
    of_cuda.Worker.current_device = staticmethod(always(0))
    joint_graph.lazy_init = post_grad.lazy_init = always(None)
    fake_tensor.init_gpu_context = always(None)
    torch.accelerator.is_available = always(False)
    config.compile_threads, config.fx_graph_cache = 1, False

    def stop(code: str) -> None:
        raise GeneratedError(code)

    GraphLowering.save_output_code = staticmethod(stop)


def generated(function: Callable[..., Any], *args: Any) -> str:
    """The code that Inductor writes for a call without gradients."""
    torch._dynamo.reset()
    with FAKE, torch.no_grad():
        try:
            torch.compile(function, fullgraph=True)(*args)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, GeneratedError):
                cause = cause.__cause__ or getattr(cause, "inner_exception", None)
            if cause is None:
                raise
            return str(cause)
    raise AssertionError("Inductor was not asked for code")


def kernels(code: str, folder: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, function and metadata of each kernel of ours in generated code."""
    from torch._inductor.runtime.hints import DeviceProperties

    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S):
        if "user_autotune" not in source:
            assert "empty" not in name, "Inductor fills a result with NaN before a kernel writes it"
            continue
        meta = re.search(r"triton_meta=(\{.*?\}),\n", source, re.S)
        assert meta, name
        plain = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n", "", source, flags=re.S)
        written = folder / f"{len(list(folder.iterdir()))}.py"  # which Triton reads again to compile it
        written.write_text(plain)
        spec = importlib.util.spec_from_file_location(written.stem, written)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield name, getattr(module, name), eval(meta[1], dict(DeviceProperties=DeviceProperties))


def empty(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype, device="cuda", memory_format=NHWC if nhwc else torch.contiguous_format)


def calls() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """What is compiled: each op, forward and backward."""
    from fastddpm.ops.group_norm_silu import triton_impl as group_norm
    from fastddpm.ops.rms_norm_silu import triton_impl as rms_norm

    x, of_channel = empty(4, 64, 16, 16, dtype=torch.bfloat16, nhwc=True), empty(64)
    of_sample, image = empty(4, 64, dtype=torch.bfloat16), empty(4, 3, 16, 16, nhwc=True)
    rows, scalar = empty(4, dtype=torch.int64), empty(dtype=torch.int64)
    none = dict.fromkeys(("channel_bias", "scale", "shift", "residual", "x2"))
    drawn = dict(dropout=0.1, step=3, layer=0, activation=True)
    saved = empty(4, 8, 2), empty(4, 8)

    def group_norm_backward(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, sample: Tensor) -> Any:
        return group_norm.backward(dy, None, (mean, rstd), x, w, w, 8, seed=5, sample=sample, **none, **drawn)

    def step(x: Tensor, out: Tensor, table: Tensor, step: Tensor, sample: Tensor) -> Any:
        return fastddpm.solver_step(x, out, table, step, clamp=1.0, seed=5, sample=sample)

    def loss(pred: Tensor, t: Tensor, x0: Tensor, vlb: Tensor, sample: Tensor) -> Tensor:
        return fastddpm.diffusion_loss(pred, t, x0=x0, vlb=vlb, seed=5, sample=sample, step=3)[0]

    options = dict(channel_bias=of_sample, scale=of_sample, shift=of_sample)
    return {
        "q_sample": (
            lambda x0, t, table, sample: fastddpm.q_sample(x0, t, table, seed=5, sample=sample, step=3),
            [empty(4, 3, 16, 16, dtype=torch.uint8), rows, empty(10, 2), rows],
        ),
        "diffusion_loss": (loss, [empty(4, 6, 16, 16, nhwc=True), rows, image, empty(10, 4), rows]),
        "solver_step": (step, [image, image, empty(10, 9), scalar, rows]),
        "group_norm_silu": (lambda x, w: fastddpm.group_norm_silu(x, w, w, 8), [x, of_channel]),
        "group_norm_silu, options": (
            lambda x, w, r, sample, options: fastddpm.group_norm_silu(
                x, w, w, 8, residual=r, dropout=0.1, seed=5, sample=sample, step=3, **options
            ),
            [x, of_channel, x, rows, options],
        ),
        "group_norm_silu backward": (group_norm_backward, [x, x, of_channel, *saved, rows]),
        "rms_norm_silu": (fastddpm.rms_norm_silu, [x, of_channel]),
        "rms_norm_silu backward": (
            lambda dy, x, w: rms_norm.backward(dy, (), x, w, scale=None, shift=None, eps=1e-12, activation=True),
            [x, x, of_channel],
        ),
    }


def main() -> None:
    """Generate, compile, and refuse what a GPU should not do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _pretend()
    fastddpm.use_backend("triton").__enter__()
    with tempfile.TemporaryDirectory() as name:
        for what, (function, arguments) in calls().items():
            count, code = 0, generated(function, *arguments)
            for kernel, compiled, meta in kernels(code, Path(name)):
                source = ASTSource(compiled, meta["signature"], meta["constants"], meta["configs"][0])
                ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
                assert not re.search(r"(?:add|mul|fma|div|sub)\.(?:rn\.)?f64", ptx), (what, kernel)
                count += 1
            others = code.count("async_compile.triton(") - count
            print(f"{what}: {count} kernels of ours, {others} of Inductor", flush=True)


if __name__ == "__main__":
    main()
