"""`fuse`: a packed model whose layers hand integers on to each other, with ReLU and residuals inside the kernels.

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
from torch.utils._pytree import tree_leaves

from lowbit.errors import LowbitError
from lowbit.kernels import ops  # noqa: F401  (registers the operators)
from lowbit.nn.calls import computes_as
from lowbit.nn.deploy import made_up
from lowbit.nn.packed import PackedConv2d, PackedLayer, PackedLinear

ATTENTION = ("keep", "plain")
FUSED = {"made_by": "lowbit.fuse"}
"""``meta`` of what `fuse` returns."""
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_IDENTITIES = (nn.Identity, nn.Dropout)  # in evaluation mode
_OPERATORS = {True: torch.ops.lowbit.shift_conv2d.default, False: torch.ops.lowbit.shift_linear.default}


def fuse(model: nn.Module, example: Tensor | None = None, attention: str = "keep") -> fx.GraphModule:
    """The packed ``model`` as one graph, for inference: save the packed model, and fuse it after loading.

    1. ReLU behind a packed layer goes into its kernel, and so does a residual addition, the ReLU behind it included.
    2. A packed layer whose output nothing but packed layers read, which all round it alike (a calibrated step), writes
       those integers, int8 or uint8, itself.
    3. What does nothing in evaluation mode disappears.

    The result equals ``model``'s output to the bit; on the CPU this is checked with the example. Under autocast it is
    more precise: fused layers put out float32.

    Layers are fused where activations are float32, as the example shows (without one, as the model's own dtype says).
    Where they are of another dtype, the packed layers stay what they are.

    Args:
        model: made by `lowbit.pack` (or loaded), of one input; it stays as it is, its tensors are shared.
        example: an input batch, of the size of later ones (their number may differ). By it additions that broadcast or
            change the layout, which kernels don't do, are told from residual ones. None makes one up for models of
            `lowbit.models.create`, and else leaves additions alone and checks nothing. Its dtype is the one that the
            fused model takes.
        attention: "keep" leaves attention alone. "plain" writes PyTorch's fused attention out as two products and a
            softmax, which some CPUs do quicker and others slower, so measure it; equal up to the rounding of float32
            sums.

    Raises:
        LowbitError: the model is not packed, its code cannot be traced by torch.fx, or what was traced says something
            else of the example.
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
    example = made_up(model, random=True) if example is None else example
    made = fx.GraphModule(root, graph, f"Fused{type(model).__name__}")
    _redirect(made)
    _simplify(made)
    if example is not None:
        _note_shapes(made, example)
    _inline_layers(made)
    if example is not None:
        _note_shapes(made, example)
    for node in list(graph.nodes):
        if _is_layer(node):
            _take_in(made, node)
    _hand_on(graph)
    _finish(made)
    if example is not None and example.device.type == "cpu":  # elsewhere a float layer may differ from itself
        _check_equal(made, model, example)
    if attention == "plain":
        _write_attention_out(graph)
        _finish(made)
    made.meta.update(FUSED)
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
    return list(module) if computes_as(module, nn.Sequential) else [module]


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a call of ``module`` runs the code of one of these classes, and nothing else."""
    return any(computes_as(module, kind) for kind in kinds)


def _calls(node: fx.Node | None, targets: set) -> bool:
    return node is not None and node.op in ("call_function", "call_method") and node.target in targets


def _changed(made: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place and returns; None if it changes none."""
    if node.op == "call_module":
        parts = [part for part in _parts(made, node) if not _is(part, _IDENTITIES)]
        in_place = bool(parts) and getattr(parts[0], "inplace", False) is True
    elif node.op in ("call_function", "call_method"):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace", False)
        in_place = in_place or node.target is operator.iadd
    else:
        in_place = False
    return node.args[0] if in_place and node.args and isinstance(node.args[0], fx.Node) else None


def _redirect(made: fx.GraphModule) -> None:
    """Who reads a tensor after it was changed in place reads the changing node's result: then order is in the edges."""
    place = {node: i for i, node in enumerate(made.graph.nodes)}
    for node in made.graph.nodes:
        changed = _changed(made, node)
        for user in list(changed.users) if changed is not None else ():
            if place[user] > place[node]:
                user.replace_input_with(changed, node)


def _simplify(made: fx.GraphModule) -> None:
    """Drops what does nothing, and makes every ReLU a ``torch.relu``."""
    for node in list(made.graph.nodes):
        if _calls(node, _RELUS):
            relu = True
        elif node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            rest = [part for part in _parts(made, node) if not _is(part, _IDENTITIES)]
            if not all(_is(part, (nn.ReLU,)) for part in rest):
                continue
            relu = bool(rest)
        else:
            continue
        x = node.args[0] if node.args else node.kwargs["input"]
        with made.graph.inserting_before(node):
            node.replace_all_uses_with(made.graph.call_function(torch.relu, (x,)) if relu else x)
        made.graph.erase_node(node)


def _inline_layers(made: fx.GraphModule) -> None:
    """Calls of packed layers become calls of their operators, with all their arguments by name."""
    graph = made.graph
    for node in list(graph.nodes):
        layer = made.get_submodule(node.target) if node.op == "call_module" else None
        if not _is(layer, (PackedLinear, PackedConv2d)) or layer.before is not None or len(node.args) != 1:
            continue
        dtypes = {dtype for _, dtype, _ in node.args[0].meta.get("shapes", ())}
        floats = {dtype for dtype in dtypes if dtype.is_floating_point}
        if (floats or {layer.like.dtype}) != {torch.float32}:  # the layer's output is rounded to that dtype
            continue
        if layer.x_scale is not None and layer.x_scale.numel() > 1:  # a step for each token: the layer's own business
            continue
        tensors = {"packed": layer.data, "scale": layer.scale, "sums": layer.sums, "bias": layer.bias}
        tensors["x_scale"] = None if layer.x_scale is None else layer.x_scale.reshape(1)
        with graph.inserting_before(node):
            # As the layer does, lest integers that come from elsewhere are taken for steps.
            kwargs: dict[str, Any] = {"x": graph.call_function(as_floats, (node.args[0],)), "bits": layer.bits}
            kwargs |= {"levels": list(layer.weight.table), "low": layer.low, "high": layer.high}
            for name, tensor in tensors.items():
                # On the root: each step of a path of modules costs every call half a microsecond.
                held = f"{node.name}_{name}"
                if tensor is not None:
                    made.register_buffer(held, tensor)
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
    """``x`` as float32, as a packed layer takes it.

    Raises:
        LowbitError: ``x`` is of another floating-point dtype than the graph was fused for, so that a packed layer would
            have rounded its output to it.
    """
    if x.is_floating_point() and x.dtype != torch.float32 and not torch.is_autocast_enabled(x.device.type):
        raise LowbitError(
            f"this model was fused for float32 activations and got {str(x.dtype).removeprefix('torch.')}; fuse it for "
            "that dtype: lowbit.fuse(packed, example) with an example of it"
        )
    return x.float()


class _Shapes(fx.Interpreter):
    """Appends each tensor's shape, dtype and strides (0 where there is but one index) to ``meta["shapes"]``."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            strides = tuple(step * (size > 1) for step, size in zip(result.stride(), result.shape, strict=True))
            n.meta.setdefault("shapes", []).append((result.shape, result.dtype, strides))
        return result


@torch.no_grad()
def _note_shapes(made: fx.GraphModule, example: Tensor) -> None:
    """With one input more, too, so that shapes that only agree at that number are seen to differ."""
    made.graph.lint()
    for node in made.graph.nodes:
        node.meta.pop("shapes", None)
    for batch in (example, torch.cat([example, example[:1]])):
        _Shapes(made).run(batch.clone())


def _is_layer(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _OPERATORS.values()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _take_in(made: fx.GraphModule, layer: fx.Node) -> None:
    """The addition and the ReLU that alone follow a layer go into it; it moves to where they were."""
    user = _only_user(layer)
    if _calls(user, _ADDITIONS) and len(user.args) == 2 and not user.kwargs and _can_move(made, layer, user):
        other = user.args[1] if user.args[0] is layer else user.args[0]
        if isinstance(other, fx.Node) and other is not layer and _same_sum(layer, other, user):
            layer = _replace(made.graph, user, layer, add=other)
            user = _only_user(layer)
    if _calls(user, {torch.relu}) and _can_move(made, layer, user):
        _replace(made.graph, user, layer, relu=True)


def _can_move(made: fx.GraphModule, layer: fx.Node, to: fx.Node) -> bool:
    """Whether nothing on the way to ``to`` changes a tensor, which the layer might read, in place."""
    node = layer.next
    while node is not to:
        if _changed(made, node) is not None:
            return False
        node = node.next
    return True


def _same_sum(layer: fx.Node, other: fx.Node, total: fx.Node) -> bool:
    """Whether the addition is known to broadcast, convert and lay out nothing otherwise than the layer alone does.

    Layouts matter since a sum over a float tensor (pooling) is done in the order of its memory.
    """
    own, summed, others = (node.meta.get("shapes", []) for node in (layer, total, other))
    return bool(own) and own == summed and [known[:2] for known in own] == [known[:2] for known in others]


def _replace(graph: fx.Graph, at: fx.Node, layer: fx.Node, **more: Any) -> fx.Node:
    """Puts the layer with further arguments where ``at`` is, which alone used it."""
    with graph.inserting_before(at):
        new = graph.call_function(layer.target, (), {**layer.kwargs, **more})
    new.meta.update(layer.meta)
    at.replace_all_uses_with(new)
    graph.erase_node(at)
    graph.erase_node(layer)
    return new


def _hand_on(graph: fx.Graph) -> None:
    """Layers that only layers read write what these would round to.

    Not through max-pooling: PyTorch's does not take integers in channels-last memory, but of the smallest images.
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


def _finish(made: fx.GraphModule) -> None:
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.graph.lint()
    made.recompile()


@torch.no_grad()
def _check_equal(made: fx.GraphModule, model: nn.Module, example: Tensor) -> None:
    """Tracing does not see everything: Python's own numbers, views that are changed in place."""
    found, expected = (
        [leaf for leaf in tree_leaves(run(example.clone())) if isinstance(leaf, Tensor)] for run in (made, model)
    )
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        raise LowbitError(
            f"{type(model).__name__} cannot be fused, what torch.fx made of it gives other results for the example; "
            "use the packed model as it is, or under torch.compile"
        ) from error


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
