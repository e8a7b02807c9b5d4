"""Models by name."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.models import checkpoints, create, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_own_models_take_small_images(name, channels, size):
    model = create(name, num_classes=7, in_chans=channels, img_size=size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_resnet20_has_the_papers_size():
    """0.27 M parameters (table 6 of arXiv 1512.03385); 2,752 of ours are the projection shortcuts of option B."""
    count = sum(p.numel() for p in create("resnet20").parameters())
    assert count == 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "mobilenet_v2"])
def test_other_libraries_models_by_name(name):
    size = 64
    model = create(name, num_classes=3, img_size=size)
    assert model(torch.randn(1, 3, size, size)).shape == (1, 3)
    assert model.spec["name"] == name


def test_unknown_model_option_and_checkpoint_are_refused():
    with pytest.raises(LowbitError, match=r"'resnet21'.*resnet20|closest"):
        create("resnet21")
    with pytest.raises(LowbitError, match="does not take"):
        create("resnet20", depths=3)
    with pytest.raises(LowbitError, match="no checkpoint"):
        create("resnet20", pretrained="cifar1000")
    with pytest.raises(LowbitError, match="say which"):
        create("resnet20", pretrained=True)


@pytest.mark.parametrize(("model", "data"), [(m, d) for m, sets in checkpoints().items() for d in sets])
def test_shipped_checkpoints_load_and_are_small(model, data):
    path = checkpoints()[model][data]
    assert path.stat().st_size <= 2 * 1024 * 1024
    from lowbit.serialization import read

    header, _ = read(path)
    assert header["card"], "a checkpoint says how it was made"
    options = {k: v for k, v in header["model"].items() if k != "name"}
    create(model, **options, pretrained=data)
