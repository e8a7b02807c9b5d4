"""`fuse`: a packed model whose layers hand whole numbers on to each other, with ReLU and residuals inside the kernels.

Between two packed layers `lowbit.pack` leaves a tensor of floats: one layer writes it, ReLU and a residual are passes
over it, and the next layer rounds it to 8 bits. Kernels can do all of that while a sum is still in a register. The
float operations and their order stay what they are, so that the result is the same to the bit.
"""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.errors import LowbitError
from lowbit.kernels import ops  # noqa: F401  (registers the operators)
from lowbit.nn.packed import PackedConv2d, PackedLayer

ATTENTION = ("keep", "plain")
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_IDENTITIES = (nn.Identity, nn.Dropout)  # in evaluation mode
_OPERATORS = {True: torch.ops.lowbit.shift_conv2d.default, False: torch.ops.lowbit.shift_linear.default}


def fuse(model: nn.Module, attention: str = "keep") -> fx.GraphModule:
    """The packed ``model`` as one graph, for inference: save the packed model, and fuse it after loading.

    1. ReLU behind a packed layer goes into its kernel, and so does a residual addition, the ReLU behind it included.
    2. A packed layer whose output nothing but packed layers read, which all round it alike (a calibrated step), writes
       those whole numbers, int8 or uint8, itself.
    3. What does nothing in evaluation mode disappears.

    The result equals ``model``'s output to the bit.

    Args:
        model: made by `lowbit.pack` (or loaded), of one input; it stays as it is, its tensors are shared.
        attention: "keep" leaves attention alone. "plain" writes PyTorch's fused attention out as two products and a
            softmax, which is quicker for the few and short sequences of one image on a CPU; equal up to the rounding of
            float32 sums.

    Raises:
        LowbitError: the model is not packed, or its code cannot be traced by torch.fx.
    """
    if attention not in ATTENTION:
        raise LowbitError(f"attention={attention!r} is not allowed; {' or '.join(map(repr, ATTENTION))} is")
    if not any(isinstance(module, PackedLayer) for module in model.modules()):
        raise LowbitError("this model is not packed, so there is nothing to fuse; lowbit.pack(model) does that")
    try:
        graph = _Tracer().trace(root := _OneInput(model.eval()))
    except Exception as error:  # whatever the model's own code raises when it meets a stand-in for a tensor
        first = (str(error).splitlines() or [""])[0]
        raise LowbitError(
            f"{type(model).__name__} cannot be fused, torch.fx does not get through it ({first}); use the packed model "
            "as it is, or under torch.compile"
        ) from error
    made = fx.GraphModule(root, graph, f"Fused{type(model).__name__}")
    _drop_identities(made)
    _inline_layers(made)
    for node in list(graph.nodes):
        if _is_layer(node):
            _take_in(made, node)
    _hand_on(made)
    if attention == "plain":
        _write_attention_out(graph)
    graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    graph.lint()
    made.recompile()
    return made.eval()


class _OneInput(nn.Module):
    """The model with all its other arguments at their defaults, which tracing would leave open (a mask, say)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Looks only into modules that hold packed layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PackedLayer) or not any(isinstance(child, PackedLayer) for child in m.modules())


# ---- passes ----


def _parts(model: nn.Module, node: fx.Node) -> list[nn.Module]:
    """The modules that a call of one means, one after the other."""
    module = model.get_submodule(node.target)
    return list(module) if isinstance(module, nn.Sequential) else [module]


def _drop_identities(made: fx.GraphModule) -> None:
    for node in list(made.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        rest = [part for part in _parts(made, node) if not isinstance(part, _IDENTITIES)]
        if all(isinstance(part, nn.ReLU) for part in rest):
            x = node.args[0]
            with made.graph.inserting_before(node):
                new = made.graph.call_function(torch.relu, (x,)) if rest else x
            node.replace_all_uses_with(new)
            made.graph.erase_node(node)


def _inline_layers(made: fx.GraphModule) -> None:
    """Calls of packed layers become calls of their operators, with all their arguments by name."""
    graph = made.graph
    for node in list(graph.nodes):
        layer = made.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, PackedLayer) or layer.before is not None:
            continue
        if layer.x_scale is not None and layer.x_scale.numel() > 1:  # a step for each token: the layer's own business
            continue
        convolution = isinstance(layer, PackedConv2d)
        scale = layer.x_scale
        with graph.inserting_before(node):
            kwargs: dict[str, Any] = {"x": node.args[0], "levels": list(layer.weight.table), "bits": layer.bits}
            kwargs |= {"low": layer.low, "high": layer.high, "x_scale": None, "bias": None}
            for name, attribute in (("packed", "data"), ("scale", "scale"), ("sums", "sums"), ("bias", "bias")):
                if getattr(layer, attribute) is not None:
                    kwargs[name] = graph.get_attr(f"{node.target}.{attribute}")
            if scale is not None:
                made.register_buffer(f"step_{node.name}", scale.reshape(1))
                kwargs["x_scale"] = graph.get_attr(f"step_{node.name}")
            if convolution:
                pairs = {name: list(layer.geometry[name]) for name in ("stride", "padding", "dilation")}
                kwargs |= {"kernel_size": list(layer.weight.kernel), **pairs}
            new = graph.call_function(_OPERATORS[convolution], (), kwargs)
        new.meta["step"] = None if scale is None else float(scale)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_layer(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _OPERATORS.values()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node | None, targets: set) -> bool:
    return node is not None and node.op in ("call_function", "call_method") and node.target in targets


def _take_in(made: fx.GraphModule, layer: fx.Node) -> None:
    """The addition and the ReLU that alone follow a layer go into it; it moves to where they were."""
    user = _only_user(layer)
    if _calls(user, _ADDITIONS) and len(user.args) == 2 and not user.kwargs:
        other = user.args[1] if user.args[0] is layer else user.args[0]
        if isinstance(other, fx.Node) and other is not layer and _same_shape(made, layer, other):
            layer = _replace(made.graph, user, layer, add=other)
            user = _only_user(layer)
    if _calls(user, _RELUS):
        _replace(made.graph, user, layer, relu=True)


def _same_shape(made: fx.GraphModule, layer: fx.Node, other: fx.Node) -> bool:
    """Whether the addition certainly does not broadcast: the other is an image, too, or rows of as many features."""
    if _is_layer(other) and other.target is layer.target:
        return True
    return layer.target is _OPERATORS[True] and _is_image(other)


def _is_image(node: fx.Node) -> bool:
    """Whether a node is the result of a convolution with what follows it in a residual network."""
    while not _is_layer(node):
        if not (_calls(node, _RELUS | _ADDITIONS) or "pool" in str(node.target)) or not node.args:
            return False
        node = node.args[0]
    return node.target is _OPERATORS[True]


def _replace(graph: fx.Graph, at: fx.Node, layer: fx.Node, **more: Any) -> fx.Node:
    """Puts the layer with further arguments where ``at`` is, which alone used it."""
    with graph.inserting_before(at):
        new = graph.call_function(layer.target, (), {**layer.kwargs, **more})
    new.meta.update(layer.meta)
    at.replace_all_uses_with(new)
    graph.erase_node(at)
    graph.erase_node(layer)
    return new


def _hand_on(made: fx.GraphModule) -> None:
    for node in made.graph.nodes:
        if not _is_layer(node) or not node.users:
            continue
        wanted = {_wanted(user, node) for user in node.users}
        if len(wanted) != 1 or None in wanted:
            continue
        step, low, high = wanted.pop()
        node.kwargs = {**node.kwargs, "out_scale": step, "out_low": low, "out_high": high}


def _wanted(user: fx.Node, node: fx.Node) -> tuple[float, int, int] | None:
    """Step and range to which ``user`` rounds ``node``; None if it needs the floats."""
    if not _is_layer(user) or user.kwargs["x"] is not node or user.kwargs.get("add") is node:
        return None
    step = user.meta["step"]
    if step is None or not math.isfinite(step) or step <= 0:
        return None
    return step, user.kwargs["low"], user.kwargs["high"]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(q·kᵀ·scale)·v`` of ``[..., tokens, features]``, scale 1/√features unless given."""
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
