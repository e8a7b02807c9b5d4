import copy

import pytest
import yaml

from lowbit.errors import LowbitError
from lowbit.training import RunConfig, TrainConfig, runfile

GIVEN = {
    "name": "a-run",
    "model": {"name": "vit_nano", "depth": 2},
    "data": {"name": "digits", "subset": {"train": 100}, "hold_out": 0.2},
    "train": {"epochs": 2, "lr": 0.01},
    "quant": {"weight": {"method": "statsq", "bits": 2}},
}


def write(folder, given):
    path = folder / "run.yaml"
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
    return path


def test_read_and_round_trip(tmp_path):
    run = runfile.read(write(tmp_path, GIVEN))
    assert run.train == TrainConfig(epochs=2, lr=0.01)
    assert run.quant_config().weight.bits == 2 and run.teacher is None
    assert RunConfig.from_dict(run.to_dict()) == run


def test_numbers_are_read_as_people_write_them(tmp_path):
    text = "name: n\nmodel: {name: m}\ndata: {name: d}\ntrain: {epochs: 1, lr: 1e-3, weight_decay: 5E-2, min_lr: .0}\n"
    train = runfile.read(write(tmp_path, text)).train
    assert (train.lr, train.weight_decay, train.min_lr) == (0.001, 0.05, 0.0)


def test_changes(tmp_path):
    path = write(tmp_path, GIVEN)
    run = runfile.read(path, ["train.epochs=7", "train.lr=1e-4", "model.depth=3", "quant=null", "train.augment=none"])
    assert (run.train.epochs, run.train.lr, run.model["depth"], run.quant) == (7, 1e-4, 3, None)
    assert runfile.read(path, ["teacher.name=vit_nano", "teacher.pretrained=digits"]).teacher["pretrained"] == "digits"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.epoch=3", ["epoch", "did you mean 'epochs'"]),
        ("trian.epochs=3", ["'trian'", "did you mean 'train'", "model, data"]),
        ("train.epochs", ["--set", "train.epochs=3"]),
        ("train.epochs=three", ["epochs='three'"]),
        ("name.x=3", ["name", "mapping"]),
        ("name=../up", ["name='../up'"]),
        ("model=vit_nano", ["model should be a mapping"]),
        ("model.name=3", ["model", "'name'"]),
        ("data.subset.tarin=5", ["data.subset", "'tarin'", "did you mean 'train'"]),
        ("data.subset.train=0", ["train=0"]),
        ("data.hold_out=2", ["hold_out=2"]),
        ("quant.wieght=null", ["wieght", "weight"]),
        ("quant.weight.bits=99", ["99"]),
        ("teacher.name=vit_nano", ["teacher", "pretrained"]),
        ("train.distill_weight=0.5", ["distill_weight=0.5", "teacher"]),
    ],
)
def test_mistakes_are_refused_by_name(tmp_path, change, told):
    path = write(tmp_path, GIVEN)
    with pytest.raises(LowbitError) as refused:
        runfile.read(path, [change])
    for words in [*told, "run.yaml"]:
        assert words in str(refused.value)


@pytest.mark.parametrize("key", ["name", "model", "data", "train"])
def test_missing_keys(tmp_path, key):
    given = copy.deepcopy(GIVEN)
    del given[key]
    with pytest.raises(LowbitError, match=f"needs the key '{key}'"):
        runfile.read(write(tmp_path, given))


def test_bad_files(tmp_path):
    with pytest.raises(LowbitError, match=r"cannot read the run file .*nothing"):
        runfile.read(tmp_path / "nothing.yaml")
    with pytest.raises(LowbitError, match="not YAML"):
        runfile.read(write(tmp_path, "train: [1"))
    with pytest.raises(LowbitError, match="mapping"):
        runfile.read(write(tmp_path, "- 1\n"))
    with pytest.raises(LowbitError, match="'lr' stands twice"):
        runfile.read(write(tmp_path, "name: n\nmodel: {name: m}\ndata: {name: d}\ntrain: {epochs: 1, lr: 1, lr: 2}\n"))
    with pytest.raises(LowbitError, match="not YAML"):
        runfile.read(write(tmp_path, "name: !!python/object/apply:os.system ['true']\n"))
