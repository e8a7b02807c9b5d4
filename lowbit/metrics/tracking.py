"""What the trackers look at: the discrete value of every weight of a model, read into one flat buffer."""

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
    """For each level its sign times the rank of its size among all sizes (from 1; a zero has 0): int16 ``[L]``.

    Two levels are equal, have equal signs or equal sizes exactly where their signed ranks do, whatever the set:
    {-2, -1, 0, 1} gives -2, -1, 0, 1 and {±1, ±2, ±4, ±8} gives ±1, ±2, ±3, ±4. Ascending, as the levels are.
    """
    sizes = levels.abs()
    ordered = sizes[sizes > 0].unique()
    return (levels.sign() * (torch.searchsorted(ordered, sizes) + 1)).to(torch.int16)


class TrackedLayer:
    """One layer with discrete weights: a quantized one, or a full-precision one seen through a fixed grid.

    Args:
        found: the layer.
        grid: for a layer without a weight quantizer, the method whose levels, times the scale that it gives to the
            weight of this moment, make the grid; the scale stays as it is from then on.

    Attributes:
        levels: float32 ``[L]``, the value set at this moment; where a method learns its levels, their order by size
            is taken to stay.
        fixed_scale: of the grid, broadcastable to the weight; None for a quantized layer.
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
            raise LowbitError(f"layer {self.name!r} is in full precision; give the grid through which to see it")
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
                f"{self.name!r} is nearest to a level of size {sizes.max():g}; take a method with a scale, e.g. "
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
        """What is rounded: one tensor of the weight's shape, or several for DenseShift-like methods."""
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
    """The layers with quantized weights and, with a ``grid``, those in full precision that `quantize_` would take.

    Only those whose names, or patterns, ``layers`` gives; None is all.

    Raises:
        LowbitError: there are none, or ``grid`` is no weight method.
    """
    found = [layer for layer in quantized_layers(model) if layer.weight is not None]
    if grid is not None:
        have = {layer.name: layer for layer in found}
        plan = {name: layer for name, layer, _ in _plan(model, QuantConfig(weight=grid))}
        for name, layer in plan.items():
            have.setdefault(name, QuantizedLayer(name, layer, None, None))
        found = [have[name] for name, _ in model.named_modules() if name in have]
    for pattern in layers or ():
        if not fnmatch.filter((layer.name for layer in found), pattern):
            there = ", ".join(layer.name for layer in found) or "none"
            raise LowbitError(f"layers: {pattern!r} is the name of no tracked layer; there are {there}")
    if layers is not None:
        found = [layer for layer in found if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in layers)]
    if not found:
        raise LowbitError(
            f"{type(model).__name__} has no quantized weight to track; call lowbit.quantize_ first, or give the grid "
            "through which to see a full-precision model, e.g. grid=PoT(bits=3)"
        )
    return [TrackedLayer(layer, grid) for layer in found]


class FlatCodes:
    """The signed ranks (`signed_ranks`) of all weights of ``layers`` in one int16 vector, layer after layer."""

    def __init__(self, layers: list[TrackedLayer]):
        self.layers = layers
        ends = list(itertools.accumulate(layer.weights for layer in layers))
        self.spans = [slice(end - layer.weights, end) for layer, end in zip(layers, ends, strict=True)]
        self.size = ends[-1]
        self.group()

    def group(self) -> None:
        """Prepares the tables from codes to ranks; neighbors with the same levels share one look-up."""
        self._groups: list[tuple[slice, Tensor]] = []
        for layer, span in zip(self.layers, self.spans, strict=True):
            ranks = signed_ranks(layer.levels)
            if self._groups and torch.equal(self._groups[-1][1], ranks):
                self._groups[-1] = (slice(self._groups[-1][0].start, span.stop), ranks)
            else:
                self._groups.append((span, ranks))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].found.latents[0].device

    @torch.no_grad()
    def read(self, out: Tensor) -> Tensor:
        """Writes the current ranks to ``out``, int16 ``[size]`` on `device`, and returns it."""
        for layer, span in zip(self.layers, self.spans, strict=True):
            out[span].view(layer.shape).copy_(layer.codes())
        for span, ranks in self._groups:
            out[span] = ranks.to(out.device).index_select(0, out[span].int())
        return out

    def index(self, name: str) -> int:
        """The place of the layer ``name`` in ``layers``."""
        for i, layer in enumerate(self.layers):
            if layer.name == name:
                return i
        raise LowbitError(f"no tracked layer is called {name!r}; there are {', '.join(la.name for la in self.layers)}")

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each layer of ``values [..., size]``: float64 or int64 ``[..., layers]``, on the CPU."""
        kind = torch.float64 if values.is_floating_point() else torch.int64
        return torch.stack([values[..., span].sum(-1, dtype=kind) for span in self.spans], -1).cpu()


class Trajectories:
    """Latents and value of chosen single weights, step by step."""

    def __init__(self) -> None:
        self._watched: dict[str, dict[str, Any]] = {}

    def add(self, layer: TrackedLayer, indices: list[int]) -> None:
        """Chooses weights of ``layer`` by their place in the flattened weight."""
        wrong = [i for i in indices if not (isinstance(i, int) and 0 <= i < layer.weights)]
        if wrong or not indices:
            raise LowbitError(
                f"indices={indices!r} are not allowed: {layer.name!r} has the weights 0 to {layer.weights - 1} "
                f"({' x '.join(map(str, layer.shape))}, flattened)"
            )
        self._watched[layer.name] = {"indices": list(indices), "steps": [], "rows": []}

    @torch.no_grad()
    def record(self, step: int, layers: list[TrackedLayer]) -> None:
        """Notes the chosen weights of ``layers`` as they are now."""
        for layer in layers:
            if layer.name in self._watched:
                held = self._watched[layer.name]
                index = torch.tensor(held["indices"], device=layer.latents[0].device)
                columns = [*layer.latents, layer.values()]
                held["steps"].append(step)
                held["rows"].append(torch.stack([t.detach().reshape(-1)[index].float() for t in columns], 1))

    def frame(self) -> "pandas.DataFrame":
        """One row a layer, step and weight: layer, weight (flat index), step, latent_0, ..., value."""
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
        """Tensors, numbers and strings."""
        return {
            name: {**held, "steps": list(held["steps"]), "rows": torch.stack([row.cpu() for row in held["rows"]])}
            for name, held in self._watched.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._watched = {
            name: {**held, "steps": list(held["steps"]), "rows": list(held["rows"].unbind())}
            for name, held in state.items()
        }
