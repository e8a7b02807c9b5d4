import numpy as np
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.training import augment, seeds


def ramp(n=2, channels=1, side=4):
    return torch.arange(1, n * channels * side * side + 1, dtype=torch.uint8).view(n, channels, side, side)


def test_shift_moves_each_image_by_its_own_offset():
    x = ramp()
    moved = augment.shift(x, torch.tensor([[1, 0], [0, -2]]))
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[0, 0, 0], torch.zeros(4, dtype=torch.uint8))
    assert torch.equal(moved[0, 0, 1:], x[0, 0, :3])
    assert torch.equal(moved[1, 0, :, :2], x[1, 0, :, 2:])
    assert not moved[1, 0, :, 2:].any()


def test_shift_of_sounds():
    x = torch.tensor([[1, 2, 3, -4], [5, 6, 7, 8]], dtype=torch.int16)
    moved = augment.shift(x, torch.tensor([[1], [-1]]))
    assert torch.equal(moved, torch.tensor([[0, 1, 2, 3], [6, 7, 8, 0]], dtype=torch.int16))


def test_flip_only_where_asked():
    x = ramp(channels=2)
    flipped = augment.flip(x, torch.tensor([True, False]))
    assert torch.equal(flipped[0], x[0].flip(-1)) and torch.equal(flipped[1], x[1])


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 23)])
def test_draw_and_apply(kind, shape):
    x = torch.randint(1, 256, (16, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def once(step):
        drawn = augment.draw(kind, 16, shape, seeds.generator(0, seeds.AUGMENT, 0, step))
        return drawn, augment.apply(x, drawn)

    (drawn, out), (_, again), (_, other) = once(0), once(0), once(1)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert torch.equal(out, again)
    assert torch.equal(out, other) == (kind == "none")
    assert ("flips" in drawn) == (kind == "crop_flip")
    # An image only loses what was pushed over the edge: its center is still there, as often as before.
    far = augment.reach(shape)
    if kind != "none":
        assert drawn["offsets"].abs().amax(0).tolist() == list(far)
        for i, (down, right) in enumerate(drawn["offsets"].tolist()):
            expected = torch.roll(x[i], (down, right), (1, 2))
            expected = expected.flip(-1) if kind == "crop_flip" and drawn["flips"][i] else expected
            kept = out[i] != 0
            assert torch.equal(out[i][kept], expected[kept])
            assert kept.sum() == shape[0] * (shape[1] - abs(down)) * (shape[2] - abs(right))


def test_how_far_a_shift_reaches():
    assert augment.reach((3, 32, 16)) == (4, 2) and augment.reach((8000,)) == (800,)


def test_a_share_of_the_batch_is_the_same_share_of_the_whole():
    x = ramp(6)
    drawn = augment.draw("crop_flip", 6, (1, 8, 8), torch.Generator().manual_seed(0))
    whole = augment.apply(x, drawn)
    share = slice(3, 6)
    assert torch.equal(augment.apply(x[share], {k: v[share] for k, v in drawn.items()}), whole[share])


def test_refusals():
    with pytest.raises(LowbitError, match=r"at least 64×64 pixels, these are 32×32"):
        augment.check("randaugment", (3, 32, 32), True)
    with pytest.raises(LowbitError, match="allowed for sounds: none, shift"):
        augment.check("crop_flip", (8000,), True)
    with pytest.raises(LowbitError, match="held in memory"):
        augment.check("shift", (3, 64, 64), False)
    augment.check("randaugment", (3, 64, 64), True)


class Pictures(torch.utils.data.Dataset):
    """PIL images of different sizes, like an image folder's."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(index).integers(0, 256, (70 + index, 90, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 2


@pytest.mark.parametrize("kind", ["none", "crop_flip", "randaugment"])
def test_samples_depend_on_epoch_and_index_only(kind):
    transform = augment.sample_transform(kind, (3, 64, 64), in_memory=False)
    samples = augment.Samples(Pictures(), transform, seed=3)
    torch.manual_seed(0)
    first, label = samples[0, 4]
    state = torch.get_rng_state()
    again, _ = samples[0, 4]
    assert torch.equal(torch.get_rng_state(), state)  # nothing taken from the caller's generator
    assert first.shape == (3, 64, 64) and first.dtype == torch.uint8 and label == 0
    assert torch.equal(first, again)
    assert torch.equal(first, samples[1, 4][0]) == (kind == "none")


def test_mixup_blends_images_and_labels_alike():
    x = torch.stack([torch.full((3, 4, 4), float(i)) for i in range(4)])
    y = torch.tensor([0, 1, 2, 3])
    mixed, labels = augment.mix(x, y, 4, mixup=0.8, cutmix=0.0, seed=1)
    share = labels[0, 0].item()
    assert 0 < share < 1 and torch.allclose(labels.sum(1), torch.ones(4))
    assert torch.allclose(mixed[:, 0, 0, 0], share * x[:, 0, 0, 0] + (1 - share) * x.flip(0)[:, 0, 0, 0])
    assert labels[0, 3].item() == pytest.approx(1 - share)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_labels_are_the_areas(seed):
    x = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(2)])
    mixed, labels = augment.mix(x, torch.tensor([0, 1]), 2, mixup=0.0, cutmix=1.0, seed=seed)
    for i in range(2):
        kept = (mixed[i] == i).double().mean().item()
        assert labels[i, i].item() == pytest.approx(kept) and set(mixed[i].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_cuts_the_rectangle_that_was_drawn(seed):
    """A side of sqrt(1-λ) of the image's, around a pixel drawn uniformly, cut off at the image's edges."""
    random = np.random.default_rng(seed)
    side = (1 - random.beta(1.0, 1.0)) ** 0.5
    x = torch.stack([torch.full((1, 16, 32), float(i)) for i in range(2)])
    mixed, _ = augment.mix(x, torch.tensor([0, 1]), 2, mixup=0.0, cutmix=1.0, seed=seed)
    expected = torch.zeros(16, 32)
    middle, half = (random.integers(16), random.integers(32)), (round(side * 8), round(side * 16))
    (top, left), (bottom, right) = (
        [max(0, c + sign * h) for c, h in zip(middle, half, strict=True)] for sign in (-1, 1)
    )
    expected[top:bottom, left:right] = 1
    assert expected.sum() > 0 and torch.equal(mixed[0, 0], expected) and torch.equal(mixed[1, 0], 1 - expected)


def test_erasing_changes_a_rectangle_and_nothing_else():
    torch.manual_seed(0)
    x = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    changed = (augment.Erase(1.0)(x) != x).any(0)
    rows, columns = changed.nonzero().T
    inside = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert 0.01 < changed.double().mean() < 0.4 and inside.double().mean() > 0.95
    assert torch.equal(augment.Erase(0.0)(x), x)
    noise = augment.Erase(1.0)(torch.full((3, 256, 256), 7, dtype=torch.uint8)).double()
    noise = noise[(noise != 7).any(0).expand(3, -1, -1)]
    assert 115 < noise.mean() < 125 and 50 < noise.std() < 60  # 120 and 58, less what leaves 0 to 255


def test_copies_of_an_image_are_augmented_differently_and_repeatably():
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8))
    samples = augment.Samples([(picture, 1)], augment.sample_transform("deit", (3, 64, 64), in_memory=False), seed=0)
    first, again, copy = samples[0, 0, 0][0], samples[0, 0, 0][0], samples[0, 0, 1][0]
    assert first.shape == (3, 64, 64) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, copy)
