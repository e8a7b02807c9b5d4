"""Splits, subsets and the registry."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lowbit
from lowbit.data import ArrayDataset, Data, DetectionDataset, card, labels, load, names
from lowbit.data.base import _registry, _stratified_order, dataset, pixel_statistics
from lowbit.errors import DataError, LowbitError


def made(per_class=20, classes=4) -> Data:
    y = torch.arange(classes).repeat(per_class)
    x = torch.arange(len(y), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    split = ArrayDataset(x, y, pd.DataFrame({"id": range(len(y))}))
    return Data("made", "classification", tuple("abcd"[:classes]), split, split, (1, 2, 2), (0.5,), (0.2,))


def ids(split) -> list[int]:
    return split.x[:, 0, 0, 0].tolist()


@given(classes=st.integers(1, 5), per_class=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_prefix_of_the_order_is_balanced(classes, per_class, seed):
    y = torch.arange(classes).repeat(per_class)
    order = _stratified_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(y)))
    for end in range(1, len(y) + 1):
        counts = torch.bincount(y[order[:end]], minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_subset_is_balanced_deterministic_and_keeps_rows_together():
    data = made()
    part = data.subset(train=10, test=8, seed=3)
    assert len(part.train) == 10 and len(part.test) == 8
    assert part.train.y.bincount().tolist() in (
        [3, 3, 2, 2],
        [3, 2, 3, 2],
        [2, 3, 3, 2],
        [3, 2, 2, 3],
        [2, 3, 2, 3],
        [2, 2, 3, 3],
    )
    assert ids(part.train) == ids(data.subset(train=10, seed=3).train) != ids(data.subset(train=10, seed=4).train)
    assert part.train.meta.id.tolist() == ids(part.train)
    assert data.subset().train is data.train


def test_hold_out_splits_the_training_set_and_forgets_the_test_set():
    data = made()
    held = data.hold_out(0.25, seed=1)
    assert sorted(ids(held.train) + ids(held.test)) == sorted(ids(data.train))
    assert held.test.y.bincount().tolist() == [5] * 4


@example(counts=[1, 1, 1, 8], fraction=0.375, seed=0)  # four of the eight: more than one above their share
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_hold_out_is_a_stratified_partition_of_the_training_items(counts, fraction, seed):
    y = torch.tensor([label for label, n in enumerate(counts) for _ in range(n)])
    train = ArrayDataset(torch.arange(len(y))[:, None], y)
    data = Data("made", "classification", tuple(map(str, range(len(counts)))), train, None, (1,))
    held = data.hold_out(fraction, seed)
    assert torch.cat([held.train.x, held.test.x]).flatten().sort().values.tolist() == list(range(len(y)))
    assert len(held.test) == max(1, round(fraction * len(y)))
    # A class of n items has n t of them below the cut t of the common order, to half an item; so t itself is
    # len(test) / len(y) but for half an item a class, shared by all of them.
    share = held.test.y.bincount(minlength=len(counts)) - len(held.test) / len(y) * torch.tensor(counts)
    assert (share.abs() <= 0.5 + len(counts) / 2 * torch.tensor(counts) / len(y) + 1e-6).all()
    assert torch.equal(held.test.x, data.hold_out(fraction, seed).test.x)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99)
)
def test_hold_out_by_a_column_holds_out_whole_groups(sizes, fraction, seed):
    who = [f"speaker {i}" for i, n in enumerate(sizes) for _ in range(n)]
    train = ArrayDataset(
        torch.arange(len(who))[:, None], torch.zeros(len(who), dtype=torch.int64), pd.DataFrame({"who": who})
    )
    held = Data("made", "speech", ("a",), train, None, (1,)).hold_out(fraction, seed, by="who")
    inside, outside = set(held.test.meta.who), set(held.train.meta.who)
    assert not inside & outside and inside | outside == set(who)
    assert len(inside) == min(max(1, round(fraction * len(sizes))), len(sizes) - 1)
    assert sorted(held.train.x.flatten().tolist() + held.test.x.flatten().tolist()) == list(range(len(who)))
    assert all(who[i] == name for i, name in zip(held.test.x.flatten().tolist(), held.test.meta.who, strict=True))


def test_hold_out_by_a_column_draws_by_seed_and_says_what_it_can_not():
    data = made()
    assert len({tuple(data.hold_out(0.01, seed, by="id").test.meta.id) for seed in range(9)}) > 1
    with pytest.raises(LowbitError, match="made has no column 'speaker' to hold out by; it has id"):
        data.hold_out(0.2, by="speaker")
    with pytest.raises(LowbitError, match="it has none"):
        Data("plain", "speech", ("a",), ArrayDataset(torch.zeros(2, 1), torch.zeros(2)), None, (1,)).hold_out(
            0.2, by="id"
        )
    alone = ArrayDataset(torch.zeros(2, 1), torch.zeros(2), pd.DataFrame({"id": [7, 7]}))
    with pytest.raises(LowbitError, match="same id"):
        Data("alone", "speech", ("a",), alone, None, (1,)).hold_out(0.2, by="id")


@pytest.mark.parametrize("call", [lambda d: d.subset(train=81), lambda d: d.subset(test=0), lambda d: d.hold_out(1.0)])
def test_impossible_sizes_are_refused(call):
    with pytest.raises(LowbitError, match=r"81|0 items|fraction"):
        call(made())


def test_subsets_of_other_kinds_of_data_set():
    class Folder(torch.utils.data.Dataset):
        targets = [0, 1] * 10

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return index, self.targets[index]

    data = Data("folder", "classification", ("a", "b"), Folder(), Folder(), (3, 8, 8))
    assert labels(data.subset(train=6).train).bincount().tolist() == [3, 3]
    assert labels(data.hold_out(0.5).test).bincount().tolist() == [5, 5]
    boxes = tuple(torch.zeros(i, 4) for i in range(5))
    found = DetectionDataset(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), boxes, tuple(torch.zeros(i) for i in range(5)))
    assert len(Data("d", "detection", ("a",), found, found, (3, 8, 8)).subset(train=2).train) == 2


def test_labels_and_items_have_to_match():
    with pytest.raises(DataError, match="3 items but 2 labels"):
        ArrayDataset(torch.zeros(3, 1, 2, 2), torch.zeros(2))


def test_pixel_statistics_equal_numpys():
    x = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = pixel_statistics(x)
    array = x.numpy() / 255
    assert np.allclose(mean, array.mean((0, 2, 3)), atol=1e-6) and np.allclose(std, array.std((0, 2, 3)), atol=1e-6)


def test_unknown_names_options_and_doubles_are_refused():
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        load("cifar-10")
    with pytest.raises(DataError, match="no option 'sise'; it has size"):
        load("shapes", sise=3)
    with pytest.raises(LowbitError, match="two data sets"):
        dataset("digits")(lambda: None)


@pytest.mark.parametrize("name", names())
def test_every_set_says_what_it_is(name):
    known = card(name)
    assert known.title and known.license and known.source and known.task in ("classification", "speech", "detection")
    assert lowbit.data.manifest(name)["files"] == known.files


def test_manifest_of_a_generated_set_follows_its_code():
    assert len(lowbit.data.manifest("shapes")["generator_sha256"]) == 64


def test_a_generated_set_without_its_code_has_no_manifest(monkeypatch):
    loader = eval("lambda: None")  # there is no file with its code
    monkeypatch.setitem(_registry, "shapes", dataclasses.replace(card("shapes"), loader=loader))
    with pytest.raises(DataError, match="the code that generates shapes"):
        lowbit.data.manifest("shapes")


def test_only_some_classes_in_the_order_given():
    whole = load("digits")
    part = whole.only(["7", "2"])
    assert part.classes == ("7", "2") and part.num_classes == 2
    for split, before in ((part.train, whole.train), (part.test, whole.test)):
        kept = (before.y == 7) | (before.y == 2)
        assert torch.equal(split.x, before.x[kept])
        assert torch.equal(split.y, (before.y[kept] == 2).long())


@pytest.mark.parametrize("chosen", [["7", "ten"], ["7", "7"], []])
def test_only_refuses_what_is_not_there(chosen):
    with pytest.raises(LowbitError, match=r"ten|once"):
        load("digits").only(chosen)


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_takes_two_splits_in_memory(split):
    data = made()
    part = torch.utils.data.Subset(getattr(data, split), range(8))
    with pytest.raises(LowbitError, match=r"(?s)made.*Subset.*ArrayDataset"):
        dataclasses.replace(data, **{split: part}).only(["a"])
