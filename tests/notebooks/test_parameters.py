"""Every parameter of every notebook at its edges: refused in the second cell by name, or accepted; nothing trains."""

import contextlib
import functools
import io
import math

import nbformat
import pytest

import lowbit
from lowbit_suite import parameters
from lowbit.errors import LowbitError
from lowbit_suite import notebooks, profiles

NOTEBOOKS = {name: path for name, path in notebooks.available().items() if name[:2].isdigit()}

SMALLEST = {  # the smallest that a notebook's analysis can do with, where it is not 1 (or 0 for a size, a decay)
    "03_weight_freezing": {"epochs": 2},
    "11_query_key_reparameterization": {"window": 2, "epochs": 3},
    "15_shift_kernel": {"repeats": 5},
}
FROM_ZERO = {
    "train_size",
    "test_size",
    "min_size",
    "seed",
    "weight_decay",
    "damping",
    "wide",
    "freeze_above",
    "freeze_above_end",
}
EMPTY = {"cost_models", "published_bits", "decays"}  # lists that may be empty
CHOSEN = {"bits", "activation_bits", "conv_bits", "batch_size", "compared_images", "repeats"}  # 1 is not their smallest

OWN = {  # values that exclude each other, or that only one notebook refuses
    "00_start_here": [
        {"model_name": "resnet8"},
        {"method": "s3"},
        {"bits": 9},
        {"train_size": 32},
        {"train_size": 9999},
    ],
    "01_quantization_basics": [{"methods": ["lsq", "banana"]}, {"bits_tried": [2, 9]}, {"model_name": "resnet8"}],
    "02_zero_free_shifting": [
        {"seeds": [1000], "lr_factors": [0.5, 1.0]},
        {"test_size": 300, "lr_factors": [0.5, 1.0]},
        {"lr_factors": [1, 1.0]},
        {"bits_tried": [1]},
    ],
    "03_weight_freezing": [{"decays": [0.0, 1e-4]}, {"methods": ["full precision"]}, {"epochs": 1}, {"bits": 1}],
    "04_sign_scale_decomposition": [{"methods": ["nested"]}, {"methods": ["denseshift"]}, {"bits": 7}],
    "05_low_variance_init_and_transfer": [
        {"sigmas": [1e-3, "0.001"]},
        {"sigmas": [1e-3, 0.001000000001]},
        {"target_size": 63},
        {"source_size": 0},
    ],
    "06_detection": [{"bits_tried": [32]}, {"test_size": 3}, {"source_size": 63}, {"method": "banana"}],
    "07_speech": [{"hold_out_speaker": True}, {"bits_tried": [2, 32]}, {"model_name": "resnet8"}],
    "08_shift_networks_compared": [
        {"bits_tried": [1]},
        {"bits_tried": [2, 8]},
        {"methods": ["ternary"], "bits_tried": [3]},
    ],
    "09_weight_oscillation": [
        {"watched": "nowhere"},
        {"granularities": ["row"]},
        {"schedule": "linear"},
        {"epochs": 1, "train_size": 64},
        {"pretrained": "banana"},
    ],
    "10_statsq": [{"pretrained": "cifar10-jpeg"}, {"model_name": "banana"}],
    "11_query_key_reparameterization": [
        {"model_name": "resnet8"},
        {"window": 11, "epochs": 1},
        {"test_size": 15},
        {"cost_models": ["resnet18"]},
        {"cost_models": ["vit_nano"]},
        {"window": 1},
    ],
    "12_confidence_guided_annealing": [{"boundary": 0.25}, {"boundaries": [0.005, 0.6]}, {"boundaries": [0.0, 0.005]}],
    "13_ofq_ladder": [{"published_bits": [3]}, {"cost_models": ["banana"]}, {"boundary": 0.6}],
    "14_where_the_papers_meet": [{"sigma": 0.02}, {"alike": 0.0}, {"model_name": "resnet20"}],
    "15_shift_kernel": [{"bits_tried": [8]}, {"bits_tried": [2, 5]}, {"repeats": 4}],
    "16_deploy": [
        {"batches_timed": [1, 512]},
        {"compared_images": 361},
        {"test_size": 100},
        {"activation_bits": 5},
        {"bits": 5},
    ],
    "17_what_a_bit_costs": [
        {"bits_tried": [1]},
        {"bits_tried": [5]},
        {"activation_bits": 5},
        {"methods": ["banana"]},
        {"bits_tried": [2, 8]},
    ],
    "18_open_questions": [
        {"conv_methods": ["s3", "pot", "lsq"]},
        {"boundary": 0.1},
        {"target_size": 63},
        {"conv_name": "banana"},
    ],
}


@functools.cache
def first_cells(name):
    tree = nbformat.read(NOTEBOOKS[name], as_version=4)
    second = [cell.source for cell in tree.cells if cell.cell_type == "code"][1]
    return notebooks.read(NOTEBOOKS[name]).defaults, compile(second, name, "exec")


def start(name, **changes):
    defaults, second = first_cells(name)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(second, {"__name__": "__main__", **defaults, **changes})


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Each data set is read once, and models are made once: the cells ask for the same ones a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.use", lambda *a, **k: None)
        patch.setattr(lowbit.data, "load", functools.cache(lowbit.data.load))
        patch.setattr(lowbit.models, "create", functools.cache(lowbit.models.create))
        patch.setattr("lowbit_suite.plotting.use_style", lambda: None)
        patch.setattr("torch.set_num_threads", lambda number: None)
        patch.setattr("tempfile.mkdtemp", lambda **options: ".")
        yield


def refused(default, name):
    """Values that no notebook can use in place of ``default``."""
    if isinstance(default, bool):
        return [1, "yes", None]
    if isinstance(default, int):
        return [-1, True, 1.5, "1", None, math.nan, *([] if name in FROM_ZERO else [0])]
    if isinstance(default, float):
        return [-1.0, math.nan, math.inf, True, "1", None, *([] if name in FROM_ZERO else [0.0])]
    if isinstance(default, list):
        wrong = [-1, 0] if name != "decays" else [-1]
        return [*([] if name in EMPTY else [[]]), [default[0], default[0]], default[0], None, [None], [[]],
                *([value] for value in (wrong if not isinstance(default[0], str) else [""]))]  # fmt: skip
    return [3, None, *([] if name == "pretrained" else [""]), *([] if name == "profile" else ["banana"])]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_parameter_is_refused_beyond_its_edges(name):
    for parameter, default in first_cells(name)[0].items():
        assert parameter in parameters.RULES, f"{parameter} has no rule in lowbit_suite/parameters.py"
        for value in refused(default, parameter):
            if (name[:2], parameter, value) == ("06", "source_size", 0) or (parameter, value) == ("seeds", [0]):
                continue  # these are allowed
            with pytest.raises(LowbitError):
                start(name, **{parameter: value})
                pytest.fail(f"{name} takes {parameter}={value!r}")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_parameter_is_taken_at_its_edges(name):
    start(name)
    least = SMALLEST.get(name, {})
    for parameter, default in first_cells(name)[0].items():
        if isinstance(default, list):
            start(name, **{parameter: default[-4:] if parameter == "conv_methods" else edge(name, parameter, default)})
        elif parameter in FROM_ZERO:
            start(name, **{parameter: type(default)(0)})
        elif (
            type(default) is int
            and parameter not in CHOSEN
            and not parameter.endswith("_size")
            and parameter != "window"
        ):
            start(name, **{parameter: least.get(parameter, 1)})


def edge(name, parameter, default):
    """The shortest list: one item, the one that another parameter names."""
    defaults = first_cells(name)[0]
    chosen = {"sigmas": "sigma", "boundaries": "boundary"}.get(parameter)
    if parameter in EMPTY:
        return []
    return [defaults[chosen]] if chosen in defaults else default[:1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_values_that_exclude_each_other_are_refused(name):
    for changes in OWN.get(name, []):
        with pytest.raises(LowbitError):
            start(name, **changes)
            pytest.fail(f"{name} takes {changes}")


def test_the_profiles_values_are_taken():
    held = profiles.load()
    for name, changes in held["embedded"].notebooks.items():
        start(name, **changes)


def test_a_refusal_names_the_value_and_what_is_allowed():
    with pytest.raises(
        LowbitError, match=r"seeds=\[0, 0\] is not allowed; give a list of 1 or more, each once: an integer"
    ):
        parameters.check({"seeds": [0, 0]})
    with pytest.raises(LowbitError, match=r"amp='fp8' is not allowed; give one of 'none', 'bf16'"):
        parameters.check({"amp": "fp8"})


def test_halves_share_no_class_and_have_the_sizes_asked_for():
    source, target = parameters.halves("digits", source_size=100, target_size=60, test_size=40)
    assert not set(source.classes) & set(target.classes)
    assert len(source.classes) + len(target.classes) == 10
    assert [len(task.train) for task in (source, target)] == [100, 60]
    assert [len(task.test) for task in (source, target)] == [40, 40]
