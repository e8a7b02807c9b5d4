"""Lowering: from the graph of `lowbit.fuse` to the operations of a plan.

The graph is interpreted once for a batch of one, with a `Value` in the place of each tensor: the numbers of the
elements it consists of. So every view and rearrangement (flatten, transpose, slices, windows of Swin, concatenation) is
computed by torch itself, on these numbers; what an operation reads is then known exactly, and is copied only where it
does not lie in memory as rows. Integers between layers are not values of their own: a layer asks for its input rounded
by its step, and the operation before writes it so, if it can.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from lowbit.engine.elementwise import rounded
from lowbit.engine.operations import FUNCTIONS, lower_known
from lowbit.engine.runtime import Plan
from lowbit.engine.values import Lowering, Value
from lowbit.errors import LowbitError
from lowbit.nn.attention import INPUT
from lowbit.nn.deploy import HOOKS, made_up
from lowbit.nn.fuse import FUSED, fuse

CLOSE = 0.25
"""Largest allowed difference between the outputs of plan and model for the example, as a share of the output's norm.
Float operations may differ in their last bits, which may round single activations to the neighboring step."""


def plan(model: nn.Module, example: Tensor | None = None, threads: int | None = None) -> Plan:
    """Lower a packed model to a plan that C code runs in one call.

    Products on integers give the same bits as ``model``. Float operations (LayerNorm, GELU, softmax, averages) are
    defined in ``lowbit/kernels/csrc/vector.h``, the same to the bit on every processor; they differ from PyTorch's in
    the last bits. The plan's output for the example is compared with the model's.

    Args:
        model: a packed model with one input, from `lowbit.pack` or `lowbit.fuse`.
        example: an input batch. Later batches must have the same shape, but may have any number of items. None uses a
            generated input for models of `lowbit.models.create`.
        threads: number of threads of a call, as in `Plan`.

    Raises:
        LowbitError: the model is not packed; it has an operation that plans do not support (the message names the
            module and the operation; `lowbit.fuse` supports more); or the plan's output for the example differs.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get("made_by") == FUSED["made_by"]:
        graph = model
    else:
        graph = fuse(model, example)
    if example is None:
        example = made_up(model, random=True)
        if example is None:
            raise LowbitError("the shape of this model's input is not known: pass an example, lowbit.plan(model, x)")
    if example.dtype != torch.float32:
        raise LowbitError(f"the example is {example.dtype}; plans take float32")
    lowering = Lowering(tuple(example.shape[1:]))
    with torch.no_grad():
        x = lowering.value(lowering.x, (1, *lowering.shape))
        y = _interpret(lowering, graph, x)
    made = Plan(lowering.finish(y), threads)
    _compare(made, model, example, exact=lowering.exact)
    return made


@torch.no_grad()
def _compare(made: Plan, model: nn.Module, example: Tensor, exact: bool) -> None:
    """Refuse a plan whose output differs from the model's, for a batch made of the example."""
    batch = torch.cat([example, example.flip(0)])[:3].cpu()
    expected = model.eval()(batch.to(example.device)).cpu().flatten(1)
    actual = made(batch)
    if exact:
        same = torch.equal(actual, expected)
    else:
        same = bool((actual - expected).norm() <= CLOSE * expected.norm()) or torch.equal(actual, expected)
    if actual.shape != expected.shape or not same:
        raise LowbitError(
            f"the plan of {type(model).__name__} gives another output than the model for the example; use the model "
            "itself, or lowbit.fuse"
        )


class _Interpreter(fx.Interpreter):
    """Runs a graph with `Value` in the place of tensors."""

    def __init__(self, graph: fx.GraphModule, lowering: Lowering):
        super().__init__(graph, garbage_collect_values=True)
        self.lowering = lowering
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except LowbitError:
            raise
        except Exception as error:
            raise LowbitError(
                f"{n.format_node()}: not an operation of plans ({error}); lowbit.fuse takes it"
            ) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _holds_value((args, kwargs)):
            return super().call_function(target, args, kwargs)
        return self.lower(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _holds_value((args, kwargs)):
            return super().call_method(target, args, kwargs)
        return self.lower(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not _holds_value((args, kwargs)):
            return super().call_module(target, args, kwargs)
        return _lower_module(self.lowering, str(target), module, args, kwargs)

    def lower(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Lower a call of a function, or of a method given by its name."""
        handler = FUNCTIONS.get(target) or FUNCTIONS.get(getattr(target, "__name__", ""))
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if handler is not None:
            result = handler(self.lowering, *args, **kwargs)
            if _is_in_place(target, handler, args, kwargs):
                _overwrite(args[0], result)
            return result
        if name in _VIEWS:
            return _view(target, args, kwargs, self.lowering)
        raise LowbitError(f"{name} is not an operation of plans; lowbit.fuse takes the model as it is")


_IN_PLACE = frozenset((operator.iadd, operator.isub, operator.imul, operator.itruediv))


def _is_in_place(target: Any, handler: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether the call changes its first argument, for all that read it later."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    given = inspect.signature(handler).bind(None, *args, **kwargs).arguments
    return target in _IN_PLACE or name.endswith("_") or bool(given.get("inplace"))


def _overwrite(x: Any, result: Any) -> None:
    if isinstance(x, Value) and isinstance(result, Value):
        x.ids = result.ids


def _holds_value(tree: Any) -> bool:
    return any(isinstance(leaf, Value) for leaf in tree_leaves(tree))


_VIEWS = frozenset((
    "flatten", "transpose", "permute", "reshape", "view", "unbind", "getitem", "unsqueeze", "squeeze", "contiguous",
    "expand", "chunk", "split", "cat", "concat", "stack", "roll", "movedim", "swapaxes", "detach", "unflatten",
    "select", "narrow", "flip", "repeat", "t", "clone", "tile", "expand_as",
    "reshape_as", "view_as", "repeat_interleave", "unfold",
))  # fmt: skip


def _view(target: Any, args: Any, kwargs: Any, lowering: Lowering) -> Any:
    """Rearrange a value by torch's own function on the numbers of its elements."""
    args, kwargs = tree_map(
        lambda x: (
            lowering.of(x).ids if isinstance(x, Value) or (isinstance(x, Tensor) and x.is_floating_point()) else x
        ),
        (args, kwargs),
    )
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    made = function(*args, **kwargs)
    return tree_map(lambda x: Value(x) if isinstance(x, Tensor) else x, made)


def _lower_module(lowering: Lowering, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Lower a module that the graph calls: as one operation if plans know it, otherwise by its own graph."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Value):
        known = lower_known(lowering, module, args[0])
        if known is not None:
            if getattr(module, "inplace", False):
                _overwrite(args[0], known)
            return known
    if module._forward_hooks or any(hook not in HOOKS for hook in module._forward_pre_hooks.values()):
        raise LowbitError(
            f"{name}, a {type(module).__name__}, has hooks, which plans do not call; lowbit.fuse takes it"
        )
    if module._forward_pre_hooks:  # the input's quantizer, which a graph of the module's forward does not have
        args = (rounded(lowering, getattr(module, INPUT), lowering.of(args[0])), *args[1:])
    try:
        graph = fx.symbolic_trace(module)
    except Exception as error:
        raise LowbitError(
            f"{name}, a {type(module).__name__}, is not an operation of plans; lowbit.fuse takes it"
        ) from error
    if any(node.op == "call_module" and graph.get_submodule(str(node.target)) is module for node in graph.graph.nodes):
        raise LowbitError(f"{name}, a {type(module).__name__}, is not an operation of plans; lowbit.fuse takes it")
    try:
        return _interpret(lowering, graph, *args)
    except LowbitError as error:
        raise LowbitError(f"{name}, a {type(module).__name__}: {error}") from error


def _interpret(lowering: Lowering, graph: fx.GraphModule, *inputs: Any) -> Any:
    """Run the graph with these inputs and return its output."""
    return _Interpreter(graph, lowering).run(*inputs)
