"""The parameters of the course's notebooks: allowed values, checked before a notebook trains anything.

A notebook's second cell calls `check` with its own names: ``parameters.check(globals(), load, using=methods)``.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError

LARGEST_SEED = 2**32 - 2000  # notebooks add 1000 to a seed, and NumPy takes 32 bits
TRIAL_SEED = 1000  # seed of the learning-rate trials; judged seeds have to differ from it


@dataclass(frozen=True)
class Rule:
    """The allowed values of a parameter: ``holds`` tests a value, ``says`` completes "give ..."."""

    says: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Rule:
    """Integers from ``least`` to ``most``."""
    says = f"an integer from {least}" + (f" to {most}" if most is not None else "")
    return Rule(says, lambda v: type(v) is int and v >= least and (most is None or v <= most))


def number(above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Rule:
    """Finite numbers above ``above``, from ``least`` to ``most``."""
    bounds = [f"above {above:g}"] * (above > -math.inf) + [f"from {least:g}"] * (least > -math.inf)
    bounds += [f"up to {most:g}"] * (most < math.inf)
    return Rule(
        " ".join(["a finite number", *bounds]),
        lambda v: type(v) in (int, float) and math.isfinite(v) and above < v and least <= v <= most,
    )


def one_of(*allowed: Any) -> Rule:
    """One of a few values."""
    return Rule(f"one of {', '.join(map(repr, allowed))}", lambda v: type(v) in map(type, allowed) and v in allowed)


def either(one: Rule, other: Rule) -> Rule:
    """Values that at least one of two rules allows."""
    return Rule(f"{one.says}, or {other.says}", lambda v: one.holds(v) or other.holds(v))


def several(item: Rule, least: int = 1, most: int | None = None) -> Rule:
    """A list of ``least`` to ``most`` different items, each allowed by ``item``."""
    many = f"{least} or more" if most is None else f"{least} to {most}"
    return Rule(
        f"a list of {many}, each once: {item.says}",
        lambda v: (
            isinstance(v, list | tuple)
            and least <= len(v)
            and (most is None or len(v) <= most)
            and all(item.holds(part) for part in v)
            and len({f"{part:g}" if type(part) in (int, float) else part for part in v}) == len(v)
        ),
    )


TEXT = Rule("a text", lambda v: type(v) is str)
NAME = Rule("a name", lambda v: type(v) is str and bool(v))
COUNT, SIZE, SWITCH = whole(1), whole(0), one_of(True, False)
POSITIVE, FROM_ZERO = number(above=0), number(least=0)
BOUNDARY = number(above=0, most=0.5)
SHARE = number(least=0, most=1)

RULES: dict[str, Rule] = {
    "profile": NAME,
    "dataset": one_of("digits", "cifar10-jpeg"),
    "pretrained": NAME,
    **dict.fromkeys(("model_name", "conv_name", "method", "watched"), NAME),
    **dict.fromkeys(("methods", "conv_methods", "models"), several(NAME)),
    "cost_models": several(NAME, least=0),
    **dict.fromkeys(("bits", "activation_bits", "conv_bits"), COUNT),
    "bits_tried": several(COUNT),
    "published_bits": several(COUNT, least=0),
    "granularities": several(one_of("channel", "tensor")),
    **dict.fromkeys(("epochs", "watch_epochs", "source_epochs", "transfer_epochs", "cga_epochs", "batch_size"), COUNT),
    **dict.fromkeys(("train_size", "test_size", "min_size"), SIZE),
    **dict.fromkeys(("source_size", "target_size"), COUNT),
    "seed": whole(0, LARGEST_SEED),
    "seeds": several(whole(0, LARGEST_SEED)),
    **dict.fromkeys(("lr", "lr_resnet", "lr_vit", "transfer_lr", "cga_lr", "sigma", "least_ms", "alike"), POSITIVE),
    "lr_factors": several(POSITIVE),
    **dict.fromkeys(("weight_decay", "damping", "wide"), FROM_ZERO),
    "decays": several(FROM_ZERO, least=0),
    "sigmas": several(POSITIVE),
    "boundary": BOUNDARY,
    "boundaries": several(BOUNDARY),
    **dict.fromkeys(("freeze_above", "freeze_above_end"), SHARE),
    "amp": one_of("none", "bf16"),
    "schedule": one_of("constant", "cosine"),
    **dict.fromkeys(("hold_out_speaker", "compiled_form"), SWITCH),
    **dict.fromkeys(("sizes", "rows_tried", "batches_timed"), several(COUNT)),
    **dict.fromkeys(("compared", "floats", "memory_mb", "compared_images", "repeats", "window"), COUNT),
    "threads": whole(1, 256),
}
"""The rule of each parameter in all notebooks; a notebook may set a stricter one (see `check`)."""

AMONG = {
    "boundary": "boundaries",
    "sigma": "sigmas",
    "published_bits": "bits_tried",
}  # only values in the second list are run
ALIASES = {"s3_low_variance": "s3", "ttq": "ternary"}  # arms that are not named after a quantizer


def load(dataset: str, train_size: int, test_size: int, validation: bool = False, **_: Any):
    """The images that a notebook's settings name: ``parameters.load(**settings)``.

    Args:
        dataset: name in `lowbit.data`.
        train_size: number of training images; 0 takes all of them.
        test_size: number of test images; 0 takes all of them.
        validation: whether to test on a fifth of the training split, for learning-rate trials, instead of the test
            split.

    Returns:
        `lowbit.data.Data`.
    """
    from lowbit import data

    whole = data.load(dataset)
    return (whole.hold_out(0.2) if validation else whole).subset(train=train_size or None, test=test_size or None)


def halves(
    dataset: str, source_size: int, target_size: int, test_size: int, validation: bool = False, **_: Any
) -> list[Any]:
    """Two tasks that share no class, to carry a network from one to the other: ``parameters.halves(**settings)``.

    Args:
        dataset: name in `lowbit.data`; the source task has the first half of its classes, the target task the rest.
        source_size: number of training images of the source task.
        target_size: number of training images of the target task.
        test_size: number of test images of each task; 0 takes all of them.
        validation: as for `load`.

    Returns:
        The source and the target task, `lowbit.data.Data` each.
    """
    whole = load(dataset, train_size=0, test_size=0, validation=validation)
    half = whole.num_classes // 2
    parts = (whole.classes[:half], source_size), (whole.classes[half:], target_size)
    return [whole.only(part).subset(train=size, test=test_size or None) for part, size in parts]


def summary(profile: str, data: Any, seeds: Sequence[int]) -> str:
    """One line that says which profile, data and seeds are in use."""
    return (
        f"profile {profile}: {data.name}, {len(data.train):,} training and {len(data.test):,} test images, "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )


def check(
    given: Mapping[str, Any],
    load: Callable[..., Any] | None = None,
    *,
    using: Sequence[str] = (),
    each: Sequence[str] = (),
    transformer: bool = False,
    steps: int = 1,
    test_items: int = 1,
    checkpoint: str | None = None,
    **rules: Rule | tuple | list | int,
) -> None:
    """Refuse parameters with which a later cell would fail; call this before any training.

    Args:
        given: the notebook's ``globals()``.
        load: returns the training data, one `lowbit.data.Data` or several; with ``validation=True`` the smaller data
            of the learning-rate trials.
        using: quantizers that run at every bit width of ``bits``, ``bits_tried`` and ``conv_bits``; the name of a
            parameter stands for the quantizers in it.
        each: quantizers that run only at the widths that they support, given like ``using``. At least one of them has
            to support one of the widths, and DenseShift, their baseline, has to support all.
        transformer: whether ``model_name`` has to be a vision transformer with ``blocks``.
        steps: smallest number of steps that ``epochs`` have to give, in addition to those of ``window``.
        test_items: smallest number of items in the test split.
        checkpoint: the checkpoint that every training starts from, if no parameter ``pretrained`` names one.
        rules: rules that replace those in `RULES`, by parameter. A tuple stands for `one_of`, a list for `several` of
            its items, and a number for the smallest integer.

    Raises:
        LowbitError: a parameter is not allowed; the message names the first one and the allowed values.
    """
    for name, rule in {**RULES, **rules}.items():
        rule = _rule(rule)
        if name in given and not rule.holds(given[name]):
            raise LowbitError(f"{name}={given[name]!r} is not allowed; give {rule.says}")
    for one, tried in AMONG.items():
        if one in given and tried in given and not {*_items(given[one])} <= {*given[tried]}:
            raise LowbitError(
                f"{one}={given[one]} is not in {tried}={given[tried]}, so it would not be run; add it there"
            )
    if len(given.get("lr_factors", ())) > 1 and TRIAL_SEED in given["seeds"]:
        raise LowbitError(
            f"seeds={given['seeds']}: seed {TRIAL_SEED} is reserved for the learning-rate trials; give other seeds"
        )
    _check_widths(given, _quantizers(given, using), _quantizers(given, each))
    if load is not None:
        _check_data(given, load, steps + given.get("window", 0), test_items)
        for model in given.get("models", [given["model_name"]] if "model_name" in given else []):
            _check_model(given, model, load(), transformer, checkpoint or given.get("pretrained"))


def _rule(given: Rule | tuple | list | int) -> Rule:
    if isinstance(given, list):
        return several(one_of(*given))
    return one_of(*given) if isinstance(given, tuple) else whole(given) if isinstance(given, int) else given


def _widths(given: Mapping[str, Any]) -> dict[str, list[int]]:
    widths = {name: [given[name]] for name in ("bits", "conv_bits") if name in given}
    return widths | {name: list(given[name]) for name in ("bits_tried",) if name in given}


def _quantizers(given: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = [one for name in names for one in _items(given.get(name, name))]
    return [ALIASES.get(name, name) for name in found]


@functools.cache
def _refusal(method: str, bits: int) -> str:
    """The reason why this quantizer cannot be made; empty if it can."""
    from lowbit.quantizers import get

    try:
        get(method)(bits=bits)
    except LowbitError as error:
        return str(error)
    return ""


def _check_widths(given: Mapping[str, Any], using: Sequence[str], each: Sequence[str]) -> None:
    from lowbit import quantizers

    allowed = quantizers.names("weight")
    if unknown := [name for name in (*using, *each) if name not in allowed]:
        raise LowbitError(f"there is no quantizer {unknown[0]!r} for weights; there are {', '.join(allowed)}")
    everywhere = [*using, *(name for name in each if name == "denseshift")]
    for name, widths in _widths(given).items():
        for bits in widths:
            if why := next(filter(None, (_refusal(method, bits) for method in everywhere)), ""):
                raise LowbitError(f"{name}={given[name]}: {why}")
        if each and all(_refusal(method, bits) for method in each for bits in (1, *widths)):
            raise LowbitError(f"{name}={given[name]}: none of {', '.join(each)} supports any of these widths")


def _check_data(given: Mapping[str, Any], load: Callable[..., Any], steps: int, test_items: int) -> None:
    found = _items(load())
    if len(given.get("lr_factors", ())) > 1:
        found += _items(load(validation=True))
    for data in found:
        train, test, batch = len(data.train), len(data.test), given.get("batch_size", 1)
        made = given.get("epochs", steps) * (train // batch)
        if batch > train:
            raise LowbitError(f"batch_size={batch} is more than the {train} training items of {data.name}; give fewer")
        if made < steps:
            raise LowbitError(
                f"epochs={given['epochs']} and batch_size={batch} give {made} steps with {train} training items, but "
                f"{steps} are needed: give more epochs or a smaller batch"
            )
        if test < test_items:
            raise LowbitError(f"the test split has {test} items, but {test_items} are needed")


def _items(found: Any) -> list[Any]:
    return list(found) if isinstance(found, list | tuple) else [found]


@functools.cache
def _has_attention(name: str) -> bool:
    """Whether a model for 224x224 photographs has attention layers; it is built without its weights."""
    import torch

    from lowbit import models

    with torch.device("meta"):
        return any(hasattr(module, "qkv") for module in models.create(name, 10, 3, 224).modules())


def _check_model(given: Mapping[str, Any], name: str, loaded: Any, transformer: bool, pretrained: str | None) -> None:
    from lowbit import models

    data = _items(loaded)[0]
    if data.task == "speech":
        models.create(name, data.num_classes, sample_rate=data.sample_rate)
        return
    classes, shape = (10, (3, 32, 32)) if data.task == "detection" else (data.num_classes, data.input_shape)
    model = models.create(name, classes, shape[0], shape[-1], pretrained=pretrained or False)
    if transformer and not (hasattr(model, "blocks") and hasattr(model.blocks[0].attn, "qkv")):
        raise LowbitError(f"model_name={name!r} is not a vision transformer with blocks; give one such as 'vit_nano'")
    layers = [layer for layer, _ in model.named_modules()]
    if given.get("watched") is not None and given["watched"] not in layers:
        raise LowbitError(
            f"watched={given['watched']!r} is not a layer of {name}; give one such as {', '.join(layers[-4:])}"
        )
    if twice := set(given.get("cost_models", ())) & {name, "vit_nano"}:
        raise LowbitError(f"cost_models={given['cost_models']}: {twice.pop()!r} is already counted; leave it out")
    for other in given.get("cost_models", ()):
        if not _has_attention(other):
            raise LowbitError(
                f"cost_models={given['cost_models']}: {other!r} is not a vision transformer; leave it out"
            )
    if "conv_name" in given:
        models.create(given["conv_name"], 5, shape[0], shape[-1])
