"""Run files: read the YAML description of a run, change single values, build its data and models."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import yamls
from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.training.config import TrainConfig

with extra("train", "a run file"):
    pass

if TYPE_CHECKING:
    from torch import nn

    from lowbit.data import Data

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunConfig:
    """One training run as a file describes it.

    Args:
        name: name of the run: letters, digits, ``. _ -``. The default output folder is ``results/scratch/<name>``.
        model: ``name`` and further arguments of :func:`lowbit.models.create` (``pretrained``, ...).
        data: ``name`` and further arguments of :func:`lowbit.data.load`; ``subset: {train, test, seed}`` takes a part
            of it, ``hold_out: fraction`` evaluates on a part of the training split instead of the test split, and
            ``only: [names]`` keeps only these classes.
        train: the fields of :class:`TrainConfig`.
        quant: the fields of :class:`lowbit.QuantConfig`, or None for full precision.
        teacher: like ``model``, with ``pretrained``, or None.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    train: TrainConfig
    quant: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, given: Any) -> "RunConfig":
        """Check a plain dictionary, as read from YAML.

        Raises:
            LowbitError: a key or a value is not allowed; the message names it and says what is.
        """
        _require_mapping("the run file", given)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        refuse_unknown("the run file", given, fields)
        for key in ("name", "model", "data", "train"):
            if key not in given:
                raise LowbitError(f"the run file needs the key {key!r}; its keys are {', '.join(fields)}")
        if not isinstance(given["name"], str) or not NAME.fullmatch(given["name"]):
            raise LowbitError(f"name={given['name']!r} should consist of letters, digits, '.', '_' and '-'")
        for key in ("model", "data", "teacher"):
            part = given.get(key)
            if part is None and key == "teacher":
                continue
            _require_mapping(key, part)
            if not isinstance(part.get("name"), str):
                kind = "data set" if key == "data" else "model"
                raise LowbitError(f"{key}: it needs the key 'name', the name of a {kind}")
        _check_data(given["data"])
        if given.get("teacher") is not None and not given["teacher"].get("pretrained"):
            raise LowbitError(
                "teacher: it needs the key 'pretrained' (a checkpoint's name, a path, or true); an untrained model has "
                "nothing to teach"
            )
        _require_mapping("train", given["train"])
        train = TrainConfig(**given["train"])
        if train.distill_weight is not None and given.get("teacher") is None:
            raise LowbitError(f"train: distill_weight={train.distill_weight:g} needs a teacher; add the key 'teacher'")
        run = cls(**{**given, "train": train})
        run.quant_config()
        return run

    def quant_config(self) -> Any:
        """The :class:`lowbit.QuantConfig` of the run, or None for full precision."""
        if self.quant is None:
            return None
        from lowbit.nn import QuantConfig

        _require_mapping("quant", self.quant)
        return QuantConfig(**self.quant)

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values, which :meth:`from_dict` reads."""
        return dataclasses.asdict(self)

    def load_data(self) -> "Data":
        """Load the data set, reduced as the file says."""
        from lowbit import data

        options = dict(self.data)
        name, subset, fraction = options.pop("name"), options.pop("subset", None), options.pop("hold_out", None)
        only = options.pop("only", None)
        loaded = data.load(name, **options)
        if only is not None:
            loaded = loaded.only(only)
        if fraction is not None:
            loaded = loaded.hold_out(fraction)
        return loaded.subset(**subset) if subset else loaded

    def build_model(self, data: "Data") -> "nn.Module":
        """The model for ``data``, quantized as the file says, its weights drawn from the run's seed."""
        import torch

        from lowbit.nn import quantize_

        torch.manual_seed(self.train.seed)
        model = create_for(self.model, data, "model")
        quant = self.quant_config()
        return model if quant is None else quantize_(model, quant)

    def build_teacher(self, data: "Data") -> "nn.Module | None":
        """The teacher for ``data``, if there is one."""
        return None if self.teacher is None else create_for(self.teacher, data, "teacher")


def read(path: str | Path, changes: Iterable[str] = ()) -> RunConfig:
    """Read a run file, with ``changes`` such as ``"train.epochs=3"`` (values are YAML) made to it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LowbitError(f"cannot read the run file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LowbitError(f"{path} is not YAML: it is no text ({error})") from None
    given = yamls.load(text, str(path))
    try:
        _require_mapping("the run file", given)
        changes = list(changes)
        refuse_repeated("--set", changes)
        for change in changes:
            apply_change(given, change)
        return RunConfig.from_dict(given)
    except LowbitError as error:
        raise LowbitError(f"{path}: {error}") from None


def apply_change(given: dict[str, Any], change: str) -> None:
    """Set one value in place: ``"train.lr=1e-3"``; the name is checked later, with all the others."""
    key, equals, text = change.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last:
        raise LowbitError(f"--set {change!r} should be of the form train.epochs=3")
    place = given
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        _require_mapping(f"--set {change!r}: {parent}", place)
    place[last] = yamls.load(text, f"--set {change!r}: the value")


def refuse_repeated(option: str, assignments: Iterable[str]) -> None:
    """Raise LowbitError if ``name=value`` words give a name twice: one of the values would be lost."""
    seen = set()
    for text in assignments:
        name = text.partition("=")[0].strip()
        if name in seen:
            raise LowbitError(f"{option} gives {name!r} twice; give it once")
        seen.add(name)


def create_for(spec: Mapping[str, Any], data: "Data", where: str) -> "nn.Module":
    """Build the model that ``spec`` names, for the classes and the input shape of ``data``."""
    from lowbit.models.zoo import create

    shape = tuple(data.input_shape)
    image = len(shape) == 3
    fitting = {"in_chans": shape[0], "img_size": shape[-1]} if image else {"sample_rate": data.sample_rate}
    try:
        return create(**{"num_classes": data.num_classes, **fitting, **spec})
    except LowbitError as error:
        raise LowbitError(f"{where}: {error}") from None
    except Exception as error:  # timm's and torchvision's constructors raise anything for an unknown option
        raise LowbitError(
            f"{where}: {spec['name']!r} cannot be built with these options ({type(error).__name__}: {error})"
        ) from error


def refuse_unknown(where: str, given: Iterable[Any], allowed: Iterable[str]) -> None:
    """Raise LowbitError for the first key of ``given`` that is not ``allowed``, naming the closest and all that are."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise LowbitError(f"{where} has no key {key!r}{meant}; its keys are {', '.join(allowed)}")


def _check_data(data: dict[str, Any]) -> None:
    subset, fraction, only = data.get("subset"), data.get("hold_out"), data.get("only")
    if only is not None and not (isinstance(only, list) and only and all(isinstance(name, str) for name in only)):
        raise LowbitError(f"data: only={only!r} should be a list of class names")
    if subset is not None:
        _require_mapping("data.subset", subset)
        refuse_unknown("data.subset", subset, ("train", "test", "seed"))
        for key, value in subset.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < (key != "seed"):
                least = "an integer from 0" if key == "seed" else "a number of items, 1 or more"
                raise LowbitError(f"data.subset: {key}={value!r} should be {least}")
    if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
        raise LowbitError(f"data: hold_out={fraction!r} should be a fraction between 0 and 1")


def _require_mapping(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise LowbitError(f"{where} should be a mapping (key: value), not {value!r}")
