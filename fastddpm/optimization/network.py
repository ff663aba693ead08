"""The walk through a network: what is replaced in it, and how all is put back."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native
from .blocks import fit
from .capture import CALLS, Captured, Frozen
from .fused import Fused, exchange, give_back, patterns, untouched
from .layers import fast_layer, lies_by_pixels
from .norms import (
    ActivatedGroupNorm,
    FusedGroupNorm,
    FusedRMSNorm,
    FusedSequential,
    KnownSiLU,
    PassedSiLU,
    computes_group_norm,
    computes_rms_norm,
    computes_silu,
    is_norm,
)
from .report import Kept, Replaced, Report
from .residual import Block

STRIDES = "_fastddpm_strides"
"""Where a module keeps the strides that its weights had."""
COMPILED = "_fastddpm_compiled"
"""Set on a module that `optimize` compiled."""


def optimize(
    module: nn.Module,
    *,
    channels_last: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
    frozen: bool = False,
) -> Report:
    """Make an existing network faster in place, with the same weights under the same names.

    Group norms and channel RMSNorms run with the SiLU behind them as one op: in nn.Sequential of any network, and, with
    the time embedding and the bias of the convolution before, in the residual blocks of diffusers,
    denoising-diffusion-pytorch, improved-diffusion, guided-diffusion and ddim. A block is replaced only if its other
    forward gives the same on a trial. `restore` puts all back.

    Args:
        module: the network, on the device where it will run. Call this before an optimizer is made, whose state would
            have the memory order of the weights before.
        channels_last: order the weights of 2-D convolutions, and so the activations between them, by pixels. What the
            network returns keeps the order of what it is given.
        compile: compile the network with torch.compile when it is first called.
        cuda_graph: on a GPU, in inference, record each kind of call of the network and replay it.
        frozen: the network stays as it is until `restore`, weights, hooks and switches: in inference each kind of call
            is recorded on a CPU, too, as the list of its operators, and what depends on the weights alone is kept. The
            fastest there for small batches. Weights that are changed by torch's in-place operators or by assignment
            are noticed, and recorded anew; changed through ``.data`` they are not.

    Returns: what was replaced, what was left as it is and why; print it. A second call changes nothing and returns the
        same.

    Raises:
        TypeError: module is not an nn.Module, or is one of TorchScript.

    Numerics: outputs and gradients agree up to rounding; the norms have one rounding where they had several. Dropout
        draws from torch's generator, as before. Gradients of gradients are not there.
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"optimize: expected module to be an nn.Module that is not of TorchScript, got {type(module).__name__}; "
            f"pass the network itself"
        )
    kept: list[Kept] = []
    why = _against_ops(module)
    if why is None:
        claimed = _blocks(module, kept)
        _tails(module, kept, claimed)
        _sequences(module, kept, claimed)
        _single_norms(module, kept, claimed)
        _layers(module)
    else:
        kept += [Kept(name, type(m).__name__, why) for name, m in module.named_modules() if is_norm(m)]
    if channels_last:
        _order_weights(module)
        if keep_order not in module._forward_hooks.values():
            module.register_forward_hook(keep_order, with_kwargs=True)
    record = Frozen if frozen else Captured
    if (cuda_graph or frozen) and not isinstance(module, record):
        exchange(module, record)
    if compile and module._compiled_call_impl is None:
        module.compile()
        module.__dict__[COMPILED] = True
    return _report(module, kept)


def restore(module: nn.Module) -> nn.Module:
    """Undo `optimize`: forwards, memory order of the weights, hook, compilation; returns the module.

    Args:
        module: what was given to `optimize`, or a copy of it. What is inside another module that was given to it keeps
            the order of that module's output to itself.

    Raises:
        TypeError: module is not an nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"restore: expected module to be an nn.Module, got {type(module).__name__}; pass what optimize was given"
        )
    for m in module.modules():
        give_back(m)
        m.__dict__.pop(CALLS, None)
        for name, strides in m.__dict__.pop(STRIDES, {}).items():
            p = m._parameters[name]
            if p is not None and p.stride() != strides:
                p.data = torch.empty_strided(p.shape, strides, dtype=p.dtype, device=p.device).copy_(p.data)
        for key in [key for key, hook in m._forward_hooks.items() if hook is keep_order]:
            del m._forward_hooks[key]
            m._forward_hooks_with_kwargs.pop(key, None)
    if module.__dict__.pop(COMPILED, False):
        module._compiled_call_impl = None
    return module


# --- what is replaced, one kind after the other; ``claimed`` are modules that a block calls as it likes


def _blocks(module: nn.Module, kept: list[Kept]) -> set[nn.Module]:
    claimed: set[nn.Module] = set()
    for name, m in list(module.named_modules()):
        if not isinstance(m, Block):
            block, why = fit(m)
            if block is not None and "forward" not in m.__dict__:
                exchange(m, block)
            elif block is not None or why is not None:
                kept.append(Kept(name, type(m).__name__, why or "its forward was set on the module"))
        if isinstance(m, Block):
            claimed.update(m.modules())
    return claimed


def _tails(module: nn.Module, kept: list[Kept], claimed: set[nn.Module]) -> None:
    """The end of a network of diffusers: conv_out(conv_act(conv_norm_out(x)))."""
    for name, m in module.named_modules():
        norm, activation = getattr(m, "conv_norm_out", None), getattr(m, "conv_act", None)
        if norm is None or activation is None or not type(m).__module__.startswith("diffusers."):
            continue
        claimed.update((norm, activation))
        if isinstance(norm, ActivatedGroupNorm):
            continue
        if not (computes_group_norm(norm) and computes_silu(activation)):
            why = f"it is followed by {type(activation).__name__}, or is no GroupNorm with weight and bias"
        elif not untouched(norm, activation):
            why = "it or its activation has hooks"
        elif [m for parent in module.modules() for m in parent._modules.values()].count(activation) > 1:
            why = "its activation is called elsewhere, too"
        else:
            exchange(norm, ActivatedGroupNorm)
            exchange(activation, PassedSiLU)
            continue
        kept.append(Kept(f"{name}.conv_norm_out".removeprefix("."), type(norm).__name__, why))


def _sequences(module: nn.Module, kept: list[Kept], claimed: set[nn.Module]) -> None:
    for name, m in module.named_modules():
        if not isinstance(m, nn.Sequential) or m in claimed or isinstance(m, FusedSequential):
            continue
        layers = list(m)
        pairs = [(a, b) for a, b in itertools.pairwise(layers) if _is_pair(a, b)]
        if not pairs:
            continue
        if type(m).forward is not nn.Sequential.forward or "forward" in m.__dict__:
            kept.append(Kept(name, type(m).__name__, "it has a forward of its own"))
            continue
        exchange(m, FusedSequential)
        for norm, activation in pairs:
            exchange(norm, FusedGroupNorm)
            if type(activation) is not nn.SiLU:
                exchange(activation, KnownSiLU)


def _single_norms(module: nn.Module, kept: list[Kept], claimed: set[nn.Module]) -> None:
    for name, m in module.named_modules():
        if not is_norm(m) or m in claimed or isinstance(m, Fused):
            continue
        if "forward" in m.__dict__:
            kept.append(Kept(name, type(m).__name__, "its forward was set on the module"))
        elif isinstance(m, nn.GroupNorm) and computes_group_norm(m):
            exchange(m, FusedGroupNorm)
        elif computes_rms_norm(m):
            exchange(m, FusedRMSNorm)
        else:
            kept.append(Kept(name, type(m).__name__, "it does not give what its name says, or has no weight and bias"))


def _layers(module: nn.Module) -> None:
    """On a GPU these are torch's."""
    weight = next(module.parameters(), None)
    if weight is not None and weight.device.type == "cpu":
        for m in module.modules():
            layer = fast_layer(m)
            if layer is not None:
                exchange(m, layer)


def _order_weights(module: nn.Module) -> None:
    for m in module.modules():
        weight = m._parameters.get("weight") if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) else None
        if weight is not None and not lies_by_pixels(weight):
            m.__dict__.setdefault(STRIDES, {}).setdefault("weight", weight.stride())
            weight.data = torch.empty_like(weight.data, memory_format=torch.channels_last).copy_(weight.data)


def keep_order(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: what is given in NCHW order is given back so, as elementwise drawing and views rely on."""
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4), None)
    if given is None or not given.is_contiguous():
        return output
    if isinstance(output, Tensor):
        return _in_order(output)
    if isinstance(output, tuple):
        parts = [_in_order(x) for x in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if isinstance(output, dict):  # as the outputs of diffusers are
        for key, x in output.items():
            output[key] = _in_order(x)
    return output


def _in_order(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) and x.dim() == 4 else x


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    plain = computes_group_norm(norm) and computes_silu(activation)
    return plain and "forward" not in norm.__dict__ and "forward" not in activation.__dict__


def _against_ops(module: nn.Module) -> str | None:
    """Why there is no fast op where the network is, or None."""
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return None
    if weight.dtype == torch.float64:
        return "it is in float64, in which the ops are not faster"
    if weight.device.type == "cpu":
        return None if _native.available() else f"fastddpm has no native code here: {_native.reason()}"
    if weight.device.type == "cuda":
        triton = importlib.util.find_spec("triton") is not None
        return None if triton else _native.cuda_reason(torch.cuda.get_device_capability(weight.device))
    return f"the ops have no kernels for {weight.device.type}"


def _report(module: nn.Module, kept: list[Kept]) -> Report:
    replaced = tuple(
        Replaced(name, pattern)
        for name, m in module.named_modules()
        for pattern in patterns(m)
        if not isinstance(m, (PassedSiLU, KnownSiLU))
    )
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    orders = [(w.is_contiguous(), w.is_contiguous(memory_format=torch.channels_last)) for w in weights]
    told_apart = [by_pixels for by_channels, by_pixels in orders if not (by_channels and by_pixels)]
    return Report(
        replaced=replaced,
        kept=tuple(kept),
        memory_format=f"channels_last in {sum(told_apart)} of {len(told_apart)} convolutions larger than 1x1",
        compiled=module._compiled_call_impl is not None,
        captured=isinstance(module, Captured),
        frozen=isinstance(module, Frozen),
    )
