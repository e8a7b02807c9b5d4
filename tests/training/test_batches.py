import pytest
import torch
from training_helpers import make_data

from lowbit.errors import LowbitError
from lowbit.training.batches import Batches, normalize, order
from lowbit.training.distributed import Processes

ONE = Processes(0, 1, torch.device("cpu"))


def test_order_covers_each_item_once_and_is_a_function_of_seed_and_epoch():
    rows = order(103, 10, seed=5, epoch=2)
    assert rows.shape == (10, 10)
    assert len(set(rows.flatten().tolist())) == 100 and rows.min() >= 0 and rows.max() < 103
    assert torch.equal(rows, order(103, 10, 5, 2))
    assert not torch.equal(rows, order(103, 10, 5, 3))
    assert not torch.equal(rows, order(103, 10, 6, 2))
    assert sorted(order(100, 10, 0, 0).flatten().tolist()) == list(range(100))


def test_normalize_by_hand():
    x = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    out = normalize(x, (0.5, 0.2), (0.5, 0.1))
    assert torch.allclose(out, torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]]]]), atol=1e-6)
    assert normalize(torch.tensor([[-32768, 16384]], dtype=torch.int16), (), ()).tolist() == [[-1.0, 0.5]]
    with pytest.raises(LowbitError, match=r"uint8 images or int16 sounds, not torch\.float32"):
        normalize(torch.zeros(1, 1, 2, 2), (), ())


@pytest.mark.parametrize("augmented", ["none", "shift", "crop_flip"])
def test_ranks_share_the_batches_of_one_process(few, quick, augmented):
    config = quick(augment=augmented)
    whole = list(Batches(few, config, ONE).epoch(1))
    parts = [list(Batches(few, config, Processes(rank, 2, ONE.device)).epoch(1)) for rank in range(2)]
    assert len(whole) == 3
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([parts[0][step][0], parts[1][step][0]]), x)
        assert torch.equal(torch.cat([parts[0][step][1], parts[1][step][1]]), y)


def test_each_epoch_has_its_own_order(few, quick):
    batches = Batches(few, quick(), ONE)
    first, again, second = (torch.cat([y for _, y in batches.epoch(epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_test_items_are_all_seen_once_by_two_processes(few, quick):
    seen = [x for rank in range(3) for x, _ in Batches(few, quick(batch_size=3), Processes(rank, 3, ONE.device)).test()]
    seen = torch.cat(seen).flatten(1).tolist()
    assert sorted(seen) == sorted(normalize(few.test.x, few.mean, few.std).flatten(1).tolist())


def test_first_batch_is_plain(few, quick):
    batches = Batches(few, quick(augment="crop_flip"), ONE)
    rows = order(30, 10, 0, 0)[0]
    assert torch.equal(batches.first(), normalize(few.train.x[rows], few.mean, few.std))


def test_channels_last(few, quick):
    x, _ = next(Batches(few, quick(channels_last=True), ONE).epoch(0))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_refusals(few, quick):
    with pytest.raises(LowbitError, match="batch_size=31 should be at most the 30"):
        Batches(few, quick(batch_size=31), ONE)
    with pytest.raises(LowbitError, match=r"batch_size=10.*multiple of the 3 processes"):
        Batches(few, quick(), Processes(0, 3, ONE.device))


@pytest.mark.parametrize("workers", [0, 2])
def test_large_images_come_through_workers_unchanged(quick, workers):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=random)
    data = make_data(x, torch.arange(8) % 2, x, torch.arange(8) % 2, 2)
    reference = list(Batches(data, quick(batch_size=4, augment="randaugment"), ONE).epoch(0))
    got = list(Batches(data, quick(batch_size=4, augment="randaugment", workers=workers), ONE).epoch(0))
    assert len(got) == 2
    for (x, y), (other_x, other_y) in zip(reference, got, strict=True):
        assert x.shape == (4, 3, 64, 64) and torch.equal(x, other_x) and torch.equal(y, other_y)


def test_image_folder_to_batches(tmp_path, quick):
    import numpy as np
    from PIL import Image
    from torchvision.datasets import ImageFolder

    for index in range(8):
        folder = tmp_path / ("ab"[index % 2])
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (80, 70 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    data = make_data(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1), None, None, 2)
    data.train = data.test = ImageFolder(str(tmp_path))
    batches = Batches(data, quick(batch_size=4, augment="randaugment"), ONE)
    assert batches.first().shape == (4, 3, 64, 64)
    assert [x.shape[0] for x, _ in batches.epoch(0)] == [4, 4]
    assert torch.cat([y for _, y in batches.test()]).tolist() == [0] * 4 + [1] * 4


def test_repeated_augmentation_keeps_the_length_and_sees_fewer_images():
    rows = order(100, 10, seed=0, epoch=0, repeats=3)
    counts = torch.bincount(rows.flatten(), minlength=100)
    assert rows.shape == (10, 10) and sorted(counts.unique().tolist()) == [0, 1, 3] and (counts == 3).sum() == 33
