"""A call on a CPU as the flat list of operators that it came to.

Around its operators a network spends its time in modules, hooks, checks and choices, the same ones at each call. Where
a call only repeats one on other numbers, the list does the same work without them; and what depends on the weights
alone, such as a transformed filter or a weight in another dtype, is computed once.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What stands in the code of a list; anything else is held beside it."""


class CannotRepeatError(RuntimeError):
    """A function, which was called to its end, cannot be repeated; the message is the reason in words."""


def record(function: Callable[..., Any], tensors: list[Tensor]) -> tuple[Any, Callable[..., Any]]:
    """Call ``function(*tensors)``; returns the result, and what gives that of tensors of the same shapes and dtypes.

    Only operators of torch are repeated, those of backward among them. Values computed from other tensors than the
    arguments, as the weights are, are kept as they come out now, unless an operator writes to what they come of.

    Raises:
        CannotRepeatError: it reads numbers from a tensor, or its result is none that torch.utils._pytree takes apart.
    """
    with _as_autocast_sees_it(), _Tape(tensors) as tape:
        result = function(*tensors)
    return result, tape.replay(result)


@contextlib.contextmanager
def _as_autocast_sees_it() -> Iterator[None]:
    """In inference mode an operator that is made of others, such as einsum, reaches a tape whole, and what it is made
    of no longer meets autocast. Outside it, without gradients, the tape sees the parts with their casts."""
    if not (torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Tape(TorchDispatchMode):
    """Listens to the operators, and writes each into a graph.

    Attributes:
        nodes: tensor to the node that gives it. fixed: node to its value, where no argument has a part in it.
        written: addresses of the memory of such values that an operator wrote to.
        reason: why the call cannot be repeated, once that is clear; it goes on all the same.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = SimpleNamespace()
        self.graph = fx.Graph()
        self.nodes: Any = WeakIdKeyDictionary()
        self.fixed: dict[fx.Node, Any] = {}
        self.written: set[int] = set()
        self.reason: str | None = None
        for i, x in enumerate(tensors):
            self.nodes[x] = self.graph.placeholder(f"x{i}")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from importing its compiler, 170 MiB and a second or more, to have it leave this class alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        if _gives_numbers(func) and not any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # such as the dtype that two others promote to
        if _gives_numbers(func) or _has_shape_of_numbers(func, args):
            self.reason = "it reads a number from a tensor, or its shapes depend on the numbers"
        if self.reason is not None:
            return func(*args, **kwargs)
        node = self.graph.call_function(func, *pytree.tree_map(self._node_of, (args, kwargs)))
        fixed = all(x in self.fixed for x in node.all_input_nodes) and not _draws(func)
        self.written.update(_address(x) for x in _written(func, args, kwargs) if self.nodes[x] in self.fixed)
        result = func(*args, **kwargs)
        self._remember(node, result, fixed)
        return result

    def _node_of(self, x: Any) -> Any:
        if isinstance(x, PLAIN):
            return x
        if not isinstance(x, Tensor):
            return self._hold(x)
        if x not in self.nodes:
            self.nodes[x] = node = self._hold(x)
            self.fixed[node] = x
        return self.nodes[x]

    def _hold(self, x: Any) -> fx.Node:
        name = f"held{len(self.held.__dict__)}"
        setattr(self.held, name, x)
        return self.graph.create_node("get_attr", name)

    def _remember(self, node: fx.Node, result: Any, fixed: bool) -> None:
        if fixed:
            self.fixed[node] = result
        if isinstance(result, Tensor):
            self.nodes[result] = node
        elif isinstance(result, (list, tuple)):
            for i, item in enumerate(result):
                self._remember(self.graph.call_function(operator.getitem, (node, i)), item, fixed)

    def replay(self, result: Any) -> Callable[..., Any]:
        """The list as a function."""
        if self.reason is not None:
            raise CannotRepeatError(self.reason)
        leaves, structure = pytree.tree_flatten(result)
        if not all(isinstance(x, PLAIN) or (isinstance(x, Tensor) and x in self.nodes) for x in leaves):
            raise CannotRepeatError(f"tensors in its result, of type {type(result).__name__}, are not to be found")
        outputs = [x if isinstance(x, PLAIN) else self._own(self.nodes[x]) for x in leaves]
        self.graph.output(outputs)
        self._keep_values()
        for node in reversed(self.graph.nodes):
            if node.users or node.op not in ("call_function", "get_attr") or _has_effect(node.target):
                continue
            if node.op == "get_attr":  # what was computed on the way to a value that is kept
                delattr(self.held, node.target)
            self.graph.erase_node(node)
        code = self.graph.python_code("self")
        exec(code.src, code.globals)
        function, held = code.globals["forward"], self.held

        def call(*tensors: Tensor) -> Any:
            with torch.autocast("cpu", enabled=False):  # its casts are in the list
                return pytree.tree_unflatten(function(held, *tensors), structure)

        return call

    def _own(self, node: fx.Node) -> fx.Node:
        """Where it would be the same tensor at each call, a copy; the tensor that was given out is not kept."""
        if node not in self.fixed:
            return node
        if node.op == "call_function":
            self.fixed[node] = self.fixed[node].clone()
        return self.graph.call_function(torch.ops.aten.clone.default, (node,))

    def _keep_values(self) -> None:
        """Put the value in place of a node, unless somebody writes to it, or to what it was computed from."""
        changing = set()
        for node in list(self.graph.nodes):
            if node not in self.fixed:
                continue
            value = self.fixed[node]
            written = any(_address(x) in self.written for x in pytree.tree_leaves(value) if isinstance(x, Tensor))
            if written or any(x in changing for x in node.all_input_nodes):
                changing.add(node)
            elif node.op == "call_function" and isinstance(value, Tensor):
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._hold(value))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    if not _writes(func):
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (x for x in pytree.tree_leaves(given) if isinstance(x, Tensor))


def _gives_numbers(func: Any) -> bool:
    return any("Tensor" not in str(returned.type) for returned in func._schema.returns)


def _has_shape_of_numbers(func: Any, args: Any) -> bool:
    """Whether the shape of a result depends on numbers: that of x[i] does where i is a mask, not where it counts."""
    if func is torch.ops.aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable) and func is not torch.ops.aten.detach_.default  # which torch.tensor ends in


def _has_effect(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and (_writes(func) or _draws(func))


def _address(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor without a storage: nothing else can share it
        return id(x)
