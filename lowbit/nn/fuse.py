"""`fuse`: a packed model whose layers pass integers to each other, with ReLU and residuals inside the kernels.

Between two packed layers, `lowbit.pack` leaves a float tensor: one layer writes it, ReLU and a residual addition each
pass over it, and the next layer rounds it to 8 bits. Kernels can do all of that while a sum is still in a register. The
float operations and their order do not change, so the result is the same to the bit.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError
from lowbit.kernels import ops  # noqa: F401  (registers the operators)
from lowbit.nn.calls import computes_as
from lowbit.nn.deploy import made_up
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear
from lowbit.nn.tracing import trace

ATTENTION = ("keep", "plain")
FUSED = {"made_by": "lowbit.fuse"}
"""``meta`` of the graph that `fuse` returns."""
Target = Callable[..., Any] | str
_ADDITIONS: set[Target] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS: set[Target] = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_IDENTITIES = (nn.Identity, nn.Dropout)  # in evaluation mode
_OPERATORS = {True: torch.ops.lowbit.shift_conv2d.default, False: torch.ops.lowbit.shift_linear.default}


def fuse(
    model: nn.Module, example: Tensor | None = None, attention: Literal["keep", "plain"] = "keep"
) -> fx.GraphModule:
    """The packed ``model`` as one graph for inference.

    1. The kernel of a packed layer takes in a ReLU that follows it, or a residual addition with the ReLU after it.
    2. If only packed layers read a packed layer's output, and all round it by the same calibrated step, the layer
       writes those integers itself, as int8 or uint8.
    3. Modules that do nothing in evaluation mode are removed.

    The result equals ``model``'s output to the bit; on the CPU this is checked with the example. Under autocast it is
    more precise, because fused layers return float32. A fused model cannot be saved: save the packed model, and fuse it
    after loading.

    Layers are fused where activations are float32 in the example (without one: if the model's own dtype is float32).
    With another dtype, the packed layers do not change.

    Args:
        model: a model with one input from `lowbit.pack` (or loaded). It does not change; its tensors are shared.
        example: an input batch of the size and dtype of later ones, except for the number of items. It is used to tell
            residual additions from those that broadcast or change the memory layout, which kernels do not support.
            None uses a generated input for models of `lowbit.models.create`; in other models additions are not fused
            and nothing is checked.
        attention: "keep" does not change attention. "plain" replaces PyTorch's fused attention by two products and a
            softmax, equal up to the rounding of float32 sums; it is faster on some CPUs and slower on others.

    Returns:
        The graph, in evaluation mode.

    Raises:
        LowbitError: the model is not packed, torch.fx cannot trace its code, or the graph gives another output for the
            example.
    """
    if attention not in ATTENTION:
        raise LowbitError(f"attention={attention!r} is not allowed; {' or '.join(map(repr, ATTENTION))} is")
    if not any(isinstance(module, PackedLayer) for module in model.modules()):
        raise LowbitError("this model is not packed, so there is nothing to fuse; lowbit.pack(model) does that")
    example = made_up(model, random=True) if example is None else example
    try:
        graph = trace(root := _OneInput(model.eval()), example)
    except Exception as error:  # whatever the model's own code raises when it meets a stand-in for a tensor
        first = (str(error).splitlines() or [""])[0]
        raise LowbitError(
            f"{type(model).__name__} cannot be fused, torch.fx does not get through it ({first}); use the packed model "
            "as it is, or under torch.compile"
        ) from error
    fused = fx.GraphModule(root, graph, f"Fused{type(model).__name__}")
    _redirect(fused)
    _simplify(fused)
    if example is not None:
        _note_shapes(fused, example)
    _inline_layers(fused)
    if example is not None:
        _note_shapes(fused, example)
    for node in list(graph.nodes):
        if _is_layer(node):
            _take_in(fused, node)
    _hand_on(graph)
    _finish(fused)
    if example is not None and example.device.type == "cpu":  # elsewhere a float layer may differ from itself
        _check_equal(fused, model, example)
    if attention == "plain":
        _write_attention_out(graph)
        _finish(fused)
    fused.meta.update(FUSED)
    return fused.eval()


class _OneInput(nn.Module):
    """The model with its other arguments (a mask, say) at their defaults, which tracing would turn into inputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# ---- passes ----


def _parts(model: nn.Module, node: fx.Node) -> list[nn.Module]:
    """The modules that a node calls: one, or the children of a Sequential in order."""
    module = model.get_submodule(str(node.target))
    if isinstance(module, nn.Sequential) and computes_as(module, nn.Sequential):
        return list(module)
    return [module]


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a call of ``module`` runs exactly the code of one of these classes."""
    return any(computes_as(module, kind) for kind in kinds)


def _calls(node: fx.Node, targets: set[Target]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _changed(fused: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place and returns; None if it changes none."""
    if node.op == "call_module":
        parts = [part for part in _parts(fused, node) if not _is(part, _IDENTITIES)]
        in_place = bool(parts) and getattr(parts[0], "inplace", False) is True
    elif node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace", False))
        in_place = in_place or node.target is operator.iadd
    else:
        in_place = False
    return node.args[0] if in_place and node.args and isinstance(node.args[0], fx.Node) else None


def _redirect(fused: fx.GraphModule) -> None:
    """Let nodes that read a tensor after a change in place read the changing node, so edges express the order."""
    place = {node: i for i, node in enumerate(fused.graph.nodes)}
    for node in fused.graph.nodes:
        changed = _changed(fused, node)
        if changed is None:
            continue
        for user in list(changed.users):
            if place[user] > place[node]:
                user.replace_input_with(changed, node)


def _simplify(fused: fx.GraphModule) -> None:
    """Remove nodes that do nothing, write every ReLU as ``torch.relu``, and give modules their input by place."""
    for node in fused.graph.nodes:
        if node.op == "call_module" and not node.args and node.kwargs.keys() == {"input"}:
            node.args, node.kwargs = (node.kwargs["input"],), {}
    for node in list(fused.graph.nodes):
        if _calls(node, _RELUS):
            relu = True
        elif node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            rest = [part for part in _parts(fused, node) if not _is(part, _IDENTITIES)]
            if not all(_is(part, (nn.ReLU,)) for part in rest):
                continue
            relu = bool(rest)
        else:
            continue
        x = node.args[0] if node.args else node.kwargs["input"]
        with fused.graph.inserting_before(node):
            node.replace_all_uses_with(fused.graph.call_function(torch.relu, (x,)) if relu else x)
        fused.graph.erase_node(node)


def _inline_layers(fused: fx.GraphModule) -> None:
    """Replace calls of packed layers by calls of their operators, with all arguments by name."""
    graph = fused.graph
    for node in list(graph.nodes):
        layer = fused.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, PackedLayer) or not _is(layer, (PackedLinear, PackedConv2d)):
            continue
        if layer.before is not None or len(node.args) != 1:
            continue
        dtypes = {dtype for _, dtype, _ in node.args[0].meta.get("shapes", ())}
        floats = {dtype for dtype in dtypes if dtype.is_floating_point}
        if (floats or {layer.like.dtype}) != {torch.float32}:  # the layer's output is rounded to that dtype
            continue
        if layer.x_scale is not None and layer.x_scale.numel() > 1:  # operators do not take a step for each token
            continue
        tensors = {"packed": layer.data, "scale": layer.scale, "sums": layer.sums, "bias": layer.bias}
        tensors["x_scale"] = None if layer.x_scale is None else layer.x_scale.reshape(1)
        with graph.inserting_before(node):
            # As the layer does, so that integers from other operations are not mistaken for quantized activations.
            kwargs: dict[str, Any] = {"x": graph.call_function(as_floats, (node.args[0],)), "bits": layer.bits}
            kwargs |= {"levels": list(layer.weight.table), "low": layer.low, "high": layer.high}
            for name, tensor in tensors.items():
                # On the root, because each level of nested modules costs every call half a microsecond.
                held = f"{node.name}_{name}"
                if tensor is not None:
                    fused.register_buffer(held, tensor)
                kwargs[name] = None if tensor is None else graph.get_attr(held)
            convolution = isinstance(layer, PackedConv2d)
            if convolution:
                pairs = {name: list(layer.geometry[name]) for name in ("stride", "padding", "dilation")}
                kwargs |= {"kernel_size": list(layer.weight.kernel), **pairs}
            new = graph.call_function(_OPERATORS[convolution], (), kwargs)
        new.meta["step"] = None if layer.x_scale is None else float(layer.x_scale)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def as_floats(x: Tensor) -> Tensor:
    """``x`` as float32, the input of a packed layer.

    Raises:
        LowbitError: ``x`` has another floating-point dtype than the graph was fused for; a packed layer would have
            rounded its output to that dtype.
    """
    if x.is_floating_point() and x.dtype != torch.float32 and not torch.is_autocast_enabled(x.device.type):
        raise LowbitError(
            f"this model was fused for float32 activations and got {str(x.dtype).removeprefix('torch.')}; fuse it for "
            "that dtype: lowbit.fuse(packed, example) with an example of it"
        )
    return x.float()


class _Shapes(fx.Interpreter):
    """Append each tensor's shape, dtype and strides (0 for dims of size 1) to ``meta["shapes"]``."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            strides = tuple(step * (size > 1) for step, size in zip(result.stride(), result.shape, strict=True))
            n.meta.setdefault("shapes", []).append((result.shape, result.dtype, strides))
        return result


@torch.no_grad()
def _note_shapes(fused: fx.GraphModule, example: Tensor) -> None:
    """Record shapes for the example, and for one item more, so that shapes that agree only by chance are told apart."""
    fused.graph.lint()
    for node in fused.graph.nodes:
        node.meta.pop("shapes", None)
    for batch in (example, torch.cat([example, example[:1]])):
        _Shapes(fused).run(batch.clone())


def _is_layer(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _OPERATORS.values()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _take_in(fused: fx.GraphModule, layer: fx.Node) -> None:
    """Move an addition and a ReLU that are the only users of a layer into it; it takes their place in the graph."""
    user = _only_user(layer)
    if user is None:
        return
    if _calls(user, _ADDITIONS) and len(user.args) == 2 and not user.kwargs and _can_move(fused, layer, user):
        summand = user.args[1] if user.args[0] is layer else user.args[0]
        if isinstance(summand, fx.Node) and summand is not layer and _same_sum(layer, summand, user):
            layer = _replace(fused.graph, user, layer, add=summand)
            user = _only_user(layer)
    if user is not None and _calls(user, {torch.relu}) and _can_move(fused, layer, user):
        _replace(fused.graph, user, layer, relu=True)


def _can_move(fused: fx.GraphModule, layer: fx.Node, to: fx.Node) -> bool:
    """Whether no node between the layer and ``to`` changes a tensor in place, since the layer might read it."""
    node = layer.next
    while node is not to:
        if _changed(fused, node) is not None:
            return False
        node = node.next
    return True


def _same_sum(layer: fx.Node, summand: fx.Node, total: fx.Node) -> bool:
    """Whether shape, dtype and memory layout of the sum are known to be those of the layer's output.

    Layouts matter, since a sum over a float tensor (pooling) follows the order of its memory.
    """
    own, summed, others = (node.meta.get("shapes", []) for node in (layer, total, summand))
    return bool(own) and own == summed and [known[:2] for known in own] == [known[:2] for known in others]


def _replace(graph: fx.Graph, at: fx.Node, layer: fx.Node, **more: Any) -> fx.Node:
    """Replace ``at``, the only user of the layer, by the layer with further arguments."""
    assert callable(layer.target)
    with graph.inserting_before(at):
        new = graph.call_function(layer.target, (), {**layer.kwargs, **more})
    new.meta.update(layer.meta)
    at.replace_all_uses_with(new)
    graph.erase_node(at)
    graph.erase_node(layer)
    return new


def _hand_on(graph: fx.Graph) -> None:
    """Let layers that only layers read write the integers to which their readers round.

    Max-pooling between layers prevents that: PyTorch's does not take integers in channels-last memory, except for the
    smallest images.
    """
    for node in list(graph.nodes):
        if node.target is as_floats and _is_layer(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in graph.nodes:
        if not _is_layer(node) or not node.users:
            continue
        wanted = {_wanted(user, node) for user in node.users}
        if len(wanted) != 1 or None in wanted:
            continue
        if (rounding := wanted.pop()) is not None:
            step, low, high = rounding
            node.kwargs = {**node.kwargs, "out_scale": step, "out_low": low, "out_high": high}


def _wanted(user: fx.Node, node: fx.Node) -> tuple[float, int, int] | None:
    """The step and range by which ``user`` rounds ``node``; None if it needs the floats."""
    if not _is_layer(user) or user.kwargs["x"] is not node or user.kwargs.get("add") is node:
        return None
    step, low, high = user.meta["step"], user.kwargs["low"], user.kwargs["high"]
    if step is None or not math.isfinite(step) or step <= 0:
        return None
    assert isinstance(low, int) and isinstance(high, int)
    return step, low, high


def _finish(fused: fx.GraphModule) -> None:
    fused.graph.eliminate_dead_code()
    fused.delete_all_unused_submodules()
    fused.graph.lint()
    fused.recompile()


@torch.no_grad()
def _check_equal(fused: fx.GraphModule, model: nn.Module, example: Tensor) -> None:
    """Refuse a graph that missed something in tracing, such as Python's own numbers or views changed in place."""
    actual, expected = (
        [leaf for leaf in tree_leaves(run(example.clone())) if isinstance(leaf, Tensor)] for run in (fused, model)
    )
    try:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        raise LowbitError(
            f"{type(model).__name__} cannot be fused, its graph by torch.fx gives other results for the example; use "
            "the packed model as it is, or under torch.compile"
        ) from error


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(q·kᵀ·scale)·v`` for float ``[..., tokens, features]``; None means a scale of 1/√features."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1) @ v


def _write_attention_out(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not _calls(node, {F.scaled_dot_product_attention}) or len(node.args) != 3:
            continue
        others = {name: value for name, value in node.kwargs.items() if name != "scale"}
        if any(others.values()):  # a mask, dropout, causal
            continue
        node.target, node.kwargs = plain_attention, {"scale": node.kwargs.get("scale")}
