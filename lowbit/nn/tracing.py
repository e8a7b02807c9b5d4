"""A graph of a packed model's code by torch.fx, also of code that decides by the shapes of tensors.

torch.fx runs a model with stand-ins for tensors, which have no shape: code that compares one fails. With an example,
every stand-in here carries the tensors of two runs, for batches of one and of two items. What is the same in both is a
constant of the code; what differs depends on the number of items and stays a node of the graph.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from lowbit.nn.packed import PackedLayer
from lowbit.nn.products import LowBitProducts


def trace(root: nn.Module, example: Tensor | None) -> fx.Graph:
    """The graph of a module with one input; it enters only modules with packed layers and attention's products.

    Args:
        root: the module.
        example: an input batch, for code that torch.fx does not get through without one; or None.
    """
    try:
        return _Tracer().trace(root)
    except Exception:  # whatever the model's own code raises when it meets a stand-in for a tensor
        if example is None or not len(example):
            raise
    with torch.no_grad():
        return _ShapedTracer(example).trace(root)


# Results that a graph need not compute, if they do not depend on the number of items.
_CONSTANTS = (int, float, bool, str, torch.dtype, torch.device, type(None))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(isinstance(child, PackedLayer | LowBitProducts) for child in m.modules())
        return isinstance(m, PackedLayer) or not inside


class _Shaped(fx.Proxy):
    """A stand-in with its value in both runs."""

    values: tuple[Any, Any]

    def __init__(self, node: fx.Node, tracer: "_ShapedTracer"):
        super().__init__(node, tracer)
        self.values = tracer.pending

    @property
    def shape(self) -> tuple[Any, ...]:
        one, two = (value.shape for value in self.values)
        whole: Any = None  # the shape as a node, if the number of items is in it
        sizes: list[Any] = []
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            if a != b and whole is None:
                whole = self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})
            sizes.append(a if a == b else operator.getitem(whole, i))
        return tuple(sizes)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return self.values[0].ndim

    def dim(self) -> int:
        return self.values[0].ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, i) for i in range(len(self.values[0])))

    def __bool__(self) -> bool:
        if isinstance(self.values[0], Tensor) or bool(self.values[0]) != bool(self.values[1]):
            return super().__bool__()  # torch.fx's own error
        return bool(self.values[0])


class _ShapedTracer(_Tracer):
    """A tracer that runs every node as it records it.

    Args:
        example: a batch of at least one item.
    """

    def __init__(self, example: Tensor):
        super().__init__()
        self.inputs = (example[:1], example[:1].expand(2, *example.shape[1:]).contiguous())
        self.pending: tuple[Any, Any] = (None, None)
        self.running = False  # whether a node is being run: then modules are called and parameters read as always

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        if kind != "output":
            self.running = True
            try:
                one, two = (self._run(which, kind, target, args, kwargs) for which in (0, 1))
            finally:
                self.running = False
            if kind != "placeholder" and isinstance(one, _CONSTANTS) and one == two:
                return one
            self.pending = one, two
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)  # type: ignore[arg-type]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, which: int, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def value(each: Any) -> Any:
            return each.values[which] if isinstance(each, _Shaped) else each

        if kind == "placeholder":
            return self.inputs[which]
        if kind == "get_attr":
            found: Any = self.root
            for part in target.split("."):
                found = getattr(found, part)
            return found
        given: Any = map_aggregate(args, value)
        named: Any = map_aggregate(kwargs, value)
        if kind == "call_module":
            return self.root.get_submodule(target)(*given, **named)
        if kind == "call_method":
            return getattr(given[0], target)(*given[1:], **named)
        return target(*given, **named)
