"""The data of the trackers: the discrete value of every weight of a model, read into one flat buffer."""

import fnmatch
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.metrics.layers import weight_of
from lowbit.nn.config import QuantConfig
from lowbit.nn.convert import QuantizedLayer, _plan, quantized_layers
from lowbit.nn.query_key import QueryKeyProduct
from lowbit.quantizers import Method, WeightQuantizer
from lowbit.quantizers.base import as_float, nearest

if TYPE_CHECKING:
    import pandas


def signed_ranks(levels: Tensor) -> Tensor:
    """The sign of each level times the rank of its size among all sizes (from 1; 0 for a zero): int16 ``[L]``.

    Two levels are equal, or have equal signs or sizes, exactly where their signed ranks do. This holds for every set:
    {-2, -1, 0, 1} gives -2, -1, 0, 1 and {±1, ±2, ±4, ±8} gives ±1, ±2, ±3, ±4. Ascending, as the levels are.
    """
    sizes = levels.abs()
    ordered = sizes[sizes > 0].unique()
    return (levels.sign() * (torch.searchsorted(ordered, sizes) + 1)).to(torch.int16)


class TrackedLayer:
    """One layer with discrete weights: a quantized one, or a full-precision one seen through a fixed grid.

    Args:
        found: the layer.
        grid: for a layer without a weight quantizer, the method that defines the grid: its levels times the scale that
            it gives to the current weight. The scale stays fixed from then on.

    Attributes:
        levels: float32 ``[L]``, the current value set. If a method learns its levels, their order by size is assumed to
            stay the same.
        fixed_scale: scale of the grid, broadcastable to the weight; None for a quantized layer.
    """

    def __init__(self, found: QuantizedLayer, grid: Method | None):
        self.name, self.found = found.name, found
        weight = weight_of(found.layer)
        self.shape, self.weights = weight.shape, weight.numel()
        self.fixed_scale: Tensor | None = None
        if found.weight is not None:
            self.levels = found.weight.levels.cpu()
            return
        if grid is None:
            raise LowbitError(f"layer {self.name!r} is in full precision; give a weight method as its grid, e.g. PoT()")
        with torch.no_grad():
            weight = as_float(weight)
            quantizer = grid.weight(weight)
            latents = quantizer.right_inverse(weight)
            self.fixed_scale = quantizer.scale(*(latents if isinstance(latents, tuple) else (latents,))).clone()
            self.levels = quantizer.levels.cpu()
            sizes = self.levels[self.codes().cpu().long()].abs()
        if (self.fixed_scale == 1).all() and len(self.levels.abs().unique()) > 1 and (sizes == sizes.max()).all():
            raise LowbitError(
                f"grid={grid!r} does not fit a full-precision model: it has no scale, and every weight of "
                f"{self.name!r} is nearest to a level of size {sizes.max():g}; use a method with a scale, e.g. "
                "PoT() or DenseShift(scale='statistical')"
            )

    @property
    def quantizer(self) -> WeightQuantizer:
        """The quantizer of the layer's weight.

        Raises:
            LowbitError: the layer is in full precision, seen through a grid.
        """
        if self.found.weight is None:
            raise LowbitError(f"layer {self.name!r} is in full precision: it has no weight quantizer")
        return self.found.weight

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """The tensors that are rounded: one of the weight's shape, or several for methods like DenseShift."""
        if isinstance(self.found.weight, QueryKeyProduct):
            return (self.found.weight.product(*self.found.latents),)
        return self.found.latents

    def codes(self) -> Tensor:
        """Indices into ``levels``, int16, of the weight's shape."""
        if self.fixed_scale is None:
            return self.found.codes()
        weight = as_float(self.latents[0].detach())
        self.fixed_scale = self.fixed_scale.to(weight.device)
        return nearest(weight / self.fixed_scale, self.levels.to(weight.device))

    def values(self) -> Tensor:
        """Scale times level, float, of the weight's shape: the weight itself for a quantized layer."""
        codes, levels, scale = self.codes().long(), self.levels, self.fixed_scale
        if scale is None:
            levels, scale = self.quantizer.levels, self.quantizer.scale(*self.found.latents)
        return levels.to(codes.device)[codes] * scale


def tracked_layers(model: nn.Module, grid: Method | None, layers: Sequence[str] | None = None) -> list[TrackedLayer]:
    """The layers of ``model`` to track, in order.

    Args:
        model: a quantized model, or one in full precision with a ``grid``.
        grid: a weight method through which the full-precision layers that `quantize_` would take are tracked too; None
            tracks layers with quantized weights only.
        layers: names of the layers to track, or patterns; None tracks all.

    Raises:
        LowbitError: there are none, or ``grid`` is no weight method.
    """
    tracked = [layer for layer in quantized_layers(model) if layer.weight is not None]
    if grid is not None:
        by_name = {layer.name: layer for layer in tracked}
        plan = {name: layer for name, layer, _ in _plan(model, QuantConfig(weight=grid))}
        for name, layer in plan.items():
            by_name.setdefault(name, QuantizedLayer(name, layer, None, None))
        tracked = [by_name[name] for name, _ in model.named_modules() if name in by_name]
    for pattern in layers or ():
        if not fnmatch.filter((layer.name for layer in tracked), pattern):
            names = ", ".join(layer.name for layer in tracked) or "none"
            raise LowbitError(f"layers: {pattern!r} matches no tracked layer; the tracked layers are {names}")
    if layers is not None:
        tracked = [layer for layer in tracked if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in layers)]
    if not tracked:
        raise LowbitError(
            f"{type(model).__name__} has no quantized weight to track; call lowbit.quantize_ first, or track a "
            "full-precision model through a grid, e.g. grid=PoT(bits=3)"
        )
    return [TrackedLayer(layer, grid) for layer in tracked]


class FlatCodes:
    """The signed ranks (`signed_ranks`) of all weights of ``layers`` in one int16 vector, layer after layer."""

    def __init__(self, layers: list[TrackedLayer]):
        self.layers = layers
        ends = list(itertools.accumulate(layer.weights for layer in layers))
        self.spans = [slice(end - layer.weights, end) for layer, end in zip(layers, ends, strict=True)]
        self.size = ends[-1]
        self.group()

    def group(self) -> None:
        """Build the tables from codes to ranks; neighboring layers with the same levels share one look-up."""
        self._groups: list[tuple[slice, Tensor]] = []
        for layer, span in zip(self.layers, self.spans, strict=True):
            ranks = signed_ranks(layer.levels)
            if self._groups and torch.equal(self._groups[-1][1], ranks):
                self._groups[-1] = (slice(self._groups[-1][0].start, span.stop), ranks)
            else:
                self._groups.append((span, ranks))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.layers[0].found.latents[0].device

    @torch.no_grad()
    def read(self, out: Tensor) -> Tensor:
        """Write the current ranks to ``out``, int16 ``[size]`` on `device`, and return it."""
        for layer, span in zip(self.layers, self.spans, strict=True):
            out[span].view(layer.shape).copy_(layer.codes())
        for span, ranks in self._groups:
            out[span] = ranks.to(out.device).index_select(0, out[span].int())
        return out

    def index(self, name: str) -> int:
        """The index of the layer ``name`` in ``layers``.

        Raises:
            LowbitError: no tracked layer has this name.
        """
        for i, layer in enumerate(self.layers):
            if layer.name == name:
                return i
        names = ", ".join(layer.name for layer in self.layers)
        raise LowbitError(f"no tracked layer is called {name!r}; the tracked layers are {names}")

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each layer of ``values [..., size]``: float64 or int64 ``[..., layers]``, on the CPU."""
        kind = torch.float64 if values.is_floating_point() else torch.int64
        return torch.stack([values[..., span].sum(-1, dtype=kind) for span in self.spans], -1).cpu()


class Trajectories:
    """Latents and value of chosen single weights, step by step."""

    def __init__(self) -> None:
        self._watched: dict[str, dict[str, Any]] = {}

    def add(self, layer: TrackedLayer, indices: list[int]) -> None:
        """Choose weights of ``layer`` by their indices in the flattened weight.

        Raises:
            LowbitError: no index, or one that is out of range.
        """
        wrong = [i for i in indices if not (isinstance(i, int) and 0 <= i < layer.weights)]
        if wrong or not indices:
            raise LowbitError(
                f"indices={indices!r} are not allowed: {layer.name!r} has the weights 0 to {layer.weights - 1} "
                f"({' x '.join(map(str, layer.shape))}, flattened)"
            )
        self._watched[layer.name] = {"indices": list(indices), "steps": [], "rows": []}

    @torch.no_grad()
    def record(self, step: int, layers: list[TrackedLayer]) -> None:
        """Record the current state of the chosen weights of ``layers``."""
        for layer in layers:
            if layer.name in self._watched:
                held = self._watched[layer.name]
                index = torch.tensor(held["indices"], device=layer.latents[0].device)
                columns = [*layer.latents, layer.values()]
                held["steps"].append(step)
                held["rows"].append(torch.stack([t.detach().reshape(-1)[index].float() for t in columns], 1))

    def frame(self) -> "pandas.DataFrame":
        """One row per layer, step and weight: layer, weight (flat index), step, latent_0, ..., value."""
        with extra("train", "the table of trajectories"):
            import pandas

        frames = []
        for name, held in self._watched.items():
            rows = torch.stack([row.cpu() for row in held["rows"]])  # [steps, weights, latents + 1]
            columns = [f"latent_{i}" for i in range(rows.shape[2] - 1)] + ["value"]
            frame = pandas.DataFrame(rows.flatten(0, 1).numpy(), columns=columns)
            frame.insert(0, "step", [step for step in held["steps"] for _ in held["indices"]])
            frame.insert(0, "weight", held["indices"] * len(held["steps"]))
            frame.insert(0, "layer", name)
            frames.append(frame)
        if not frames:
            raise LowbitError("no weight is watched; call watch(layer, indices) before training")
        whole = pandas.concat(frames, ignore_index=True)
        return whole[[*(column for column in whole.columns if column != "value"), "value"]]

    def state_dict(self) -> dict[str, Any]:
        """The recorded trajectories: tensors, numbers and strings."""
        return {
            name: {**held, "steps": list(held["steps"]), "rows": torch.stack([row.cpu() for row in held["rows"]])}
            for name, held in self._watched.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._watched = {
            name: {**held, "steps": list(held["steps"]), "rows": list(held["rows"].unbind())}
            for name, held in state.items()
        }
