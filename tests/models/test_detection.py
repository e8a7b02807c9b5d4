"""Detectors: what the trunk takes along from the classifier, what comes out, what is refused."""

import json

import pytest
import torch
import torchvision
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.models.detection import detector
from lowbit.models.resnet import SmallResNet
from lowbit.nn import quantized_layers
from lowbit.quantizers import LSQ, DenseShift

HEADS = ("fcos", "retinanet")


@pytest.fixture
def classifier():
    """A ResNet-8, the same at every call."""

    def make(**options):
        torch.manual_seed(0)
        return SmallResNet(1, **options)

    return make


def scenes(n=2, size=64):
    """Noise with one box in the first image, two in the second and none in the others."""
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    boxes = [torch.tensor([[4.0, 8.0, 24.0, 30.0]]), torch.tensor([[0.0, 0.0, 12.0, 12.0], [30.0, 30.0, 60.0, 62.0]])]
    boxes += [torch.zeros(0, 4)] * (n - 2)
    labels = [torch.tensor([0]), torch.tensor([1, 2])] + [torch.zeros(0, dtype=torch.int64)] * (n - 2)
    return x, [{"boxes": b, "labels": y} for b, y in zip(boxes[:n], labels[:n], strict=True)]


def fit(model, steps, **options):
    x, targets = scenes(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(x, targets).values()).backward()
        optimizer.step()
    return x, targets


@pytest.mark.parametrize("head", HEADS)
def test_losses_in_training_boxes_in_evaluation(classifier, head):
    model = detector(classifier(), 3, head=head, score_thresh=0.0, detections_per_img=7)
    x, targets = scenes(3)
    losses = model(x, targets)
    sum(losses.values()).backward()
    assert {"classification", "bbox_regression"} <= set(losses)
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    found = model.eval()(x)
    assert len(found) == 3
    for image in found:
        assert image["boxes"].shape == (7, 4) and image["scores"].shape == image["labels"].shape == (7,)
        assert (image["boxes"] >= 0).all() and (image["boxes"] <= 64).all()
        assert image["labels"].min() >= 0 and image["labels"].max() <= 2


@pytest.mark.parametrize("head", HEADS)
def test_labels_start_at_zero_and_all_of_them_are_classes(classifier, head):
    """Two scenes learned by heart: the best detections are their boxes, with the labels 0, 1 and 2."""
    torch.manual_seed(0)
    model = detector(classifier(), 3, head=head, channels=32, score_thresh=0.3)
    x, targets = fit(model, 60)
    # Statistics of the batch, as in the last steps; the running ones lag behind after so few.
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        found = model(x)
    for image, target in zip(found, targets, strict=True):
        best = torchvision.ops.box_iou(target["boxes"], image["boxes"]).max(1)
        assert (best.values > 0.5).all()
        assert torch.equal(image["labels"][best.indices], target["labels"])


@pytest.mark.parametrize(
    ("options", "grids", "strides"),
    [
        ({}, [16, 8, 4], [4, 8, 16]),
        ({"stem_pool": False}, [32, 16, 8], [2, 4, 8]),
        ({"stages": 1}, [8, 4], [8, 16]),
        ({"stages": 3, "channels": 32}, [32, 16, 8, 4], [2, 4, 8, 16]),
    ],
)
def test_levels_of_the_pyramid(classifier, options, grids, strides):
    model = detector(classifier(), 3, **options)
    maps = list(model.backbone(torch.randn(1, 3, 64, 64)).values())
    assert [tuple(m.shape[1:]) for m in maps] == [(options.get("channels", 64), g, g) for g in grids]
    assert model.anchor_generator.sizes == tuple((stride,) for stride in strides)
    assert model.transform.size_divisible == strides[-1]


def test_anchors_of_retinanet_are_nine_a_position(classifier):
    model = detector(classifier(), 3, head="retinanet", anchor_size=4)
    assert model.anchor_generator.num_anchors_per_location() == [9, 9, 9]
    assert model.anchor_generator.sizes[0] == pytest.approx((16, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3)))
    assert model.head.classification_head.cls_logits.out_channels == 27


@pytest.mark.parametrize("convs", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_depth_of_the_head(classifier, head, convs):
    model = detector(classifier(), 3, head=head, head_convs=convs)
    for tower in (model.head.classification_head.conv, model.head.regression_head.conv):
        assert sum(isinstance(module, nn.Conv2d) for module in tower.modules()) == convs


def test_boxes_come_back_in_the_pixels_of_the_image_given(classifier):
    """Halving 64-pixel images (bilinear at 1/2 is the mean of 2x2 pixels) equals giving 32-pixel ones."""
    x, targets = scenes()
    full = detector(classifier(), 3, min_size=32, score_thresh=0.0).eval()
    half = detector(classifier(), 3, score_thresh=0.0).eval()
    half.load_state_dict(full.state_dict())
    small = nn.functional.avg_pool2d(x, 2)
    with torch.no_grad():
        for one, other in zip(full(x), half(small), strict=True):
            assert torch.allclose(one["boxes"], 2 * other["boxes"], atol=1e-3)
            assert torch.allclose(one["scores"], other["scores"], atol=1e-5)
    halved = [{"boxes": t["boxes"] / 2, "labels": t["labels"]} for t in targets]
    torch.testing.assert_close(full.train()(x, targets), half.train()(small, halved), rtol=1e-4, atol=1e-5)


def test_the_longer_side_is_limited(classifier):
    model = detector(classifier(), 3, min_size=48, max_size=64)
    images, _ = model.transform([torch.zeros(3, 96, 192)])
    assert images.image_sizes == [(32, 64)]


def quantized(classifier, **weight):
    config = lowbit.QuantConfig(weight=DenseShift(bits=3, **weight), activation=LSQ(bits=4))
    return lowbit.quantize_(classifier(), config)


@pytest.mark.parametrize("scale", ["none", "statistical", "pow2"])
def test_a_quantized_trunk_keeps_its_latents_and_stays_on_its_grid(classifier, scale):
    model = quantized(classifier, scale=scale)
    lowbit.calibrate(model, torch.randn(4, 3, 32, 32))
    before = {found.name: [t.clone() for t in found.latents] for found in quantized_layers(model)}
    found = detector(model, 3)
    taken = {layer.name: layer for layer in quantized_layers(found)}
    assert list(taken) == [f"backbone.body.{name}" for name in before]
    for name, latents in before.items():
        layer = taken[f"backbone.body.{name}"]
        assert all(torch.equal(a, b) for a, b in zip(layer.latents, latents, strict=True))
        assert layer.activation.calibrated
    codes = {name: layer.codes().clone() for name, layer in taken.items()}
    fit(found, 3)
    flipped = 0
    for name, layer in taken.items():
        weight = layer.layer.weight
        assert torch.equal(weight, layer.weight.scale(*layer.latents) * layer.weight.levels[layer.codes().long()])
        assert not any(torch.equal(a, b) for a, b in zip(layer.latents, before[name.split("body.")[1]], strict=True))
        flipped += (layer.codes() != codes[name]).sum()
    assert flipped > 0
    for layer in quantized_layers(model):  # the classifier is as it was
        assert all(torch.equal(a, b) for a, b in zip(layer.latents, before[layer.name], strict=True))


def test_building_does_not_calibrate(classifier):
    model = detector(quantized(classifier), 3)
    assert not any(found.activation.calibrated for found in quantized_layers(model))


def test_building_takes_no_notice_of_the_mode_and_leaves_statistics_alone(classifier):
    one, other = classifier(), classifier().eval()
    for model in (one, other):
        mode = model.training
        made = detector(model, 3)
        assert model.training == mode
        assert made.backbone.body.bn1.num_batches_tracked == 0 and made.training


def test_a_full_precision_detector_can_be_quantized_without_its_head(classifier):
    model = detector(classifier(), 3)
    lowbit.quantize_(model, lowbit.QuantConfig(weight=DenseShift()), lambda layer, name: "body.layer" in name)
    assert [found.name.split(".")[2] for found in quantized_layers(model)] == ["layer1"] * 2 + ["layer2"] * 3 + [
        "layer3"
    ] * 3


def test_frozen_batchnorm_stays_and_computes_the_same_in_evaluation(classifier):
    model = classifier()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
    free, frozen = detector(model, 3), detector(model, 3, frozen_batchnorm=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)  # in float32 the random scales let rounding grow
    kept = {name: value.clone() for name, value in frozen.named_buffers()}
    bodies = [one.backbone.double().eval().body(x).values() for one in (free, frozen)]
    for a, b in zip(*bodies, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    fit(frozen.float(), 2)
    assert kept and all(torch.equal(value, kept[name]) for name, value in frozen.named_buffers())
    assert isinstance(model.bn1, nn.BatchNorm2d) and not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert any(isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad for m in free.modules())


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: lowbit.models.create("resnet10t")])
def test_other_libraries_resnets(make):
    """Their stems have stride 4 and get no further pooling."""
    model = detector(make(), 2).eval()
    assert model.anchor_generator.sizes == ((16,), (32,), (64,))
    assert not any(name == "backbone.body.pool" for name, _ in model.named_modules())
    assert len(model(torch.randn(1, 3, 64, 64))) == 1


def test_spec_rebuilds_the_detector():
    torch.manual_seed(0)
    model = detector(lowbit.models.create("resnet20", width=8), 3, head="retinanet", channels=32).eval()
    spec = json.loads(json.dumps(model.spec))
    assert spec.pop("name") == "detector"
    again = detector(lowbit.models.create(**spec.pop("backbone")), **spec).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def frozen(net: nn.Module, **options: bool) -> nn.Module:
    """A detector that freezes a BatchNorm which lacks something."""
    net.layer2[0].bn1 = nn.BatchNorm2d(net.layer2[0].bn1.num_features, **options)
    return detector(net, 3, frozen_batchnorm=True)


class Tangled(nn.Module):
    """Has the names of a trunk, but its parts do not follow one another."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Conv2d(16, 8, 3)


WRONG = [
    (lambda net: detector(net, 3, head="ssd"), "head='ssd' is not allowed; 'fcos' and 'retinanet' are"),
    (lambda net: detector(net, 3, channels=48), "channels=48"),
    (lambda net: detector(net, 3, head_convs=5), "head_convs=5"),
    (lambda net: detector(net, 0), "num_classes=0"),
    (lambda net: detector(net, 3, min_size=8), "min_size=8"),
    (lambda net: detector(net, 3, max_size=100), "give min_size"),
    (lambda net: detector(net, 3, stages=4), "stages=4.*1 to 3"),
    (lambda net: detector(net, 3, anchor_size=0.0), "anchor_size=0.0"),
    (lambda net: detector(net, 3, score_thresh=1.5), "score_thresh=1.5"),
    (lambda net: detector(nn.Sequential(nn.Conv2d(3, 8, 3)), 3), "Sequential has no trunk.*layer1"),
    (lambda net: detector(nn.Sequential(), 3), "Sequential has no trunk.*it has none"),
    (lambda net: detector(Tangled(), 3, stages=1), "Tangled has no trunk.*'layer1'"),
    (lambda net: detector(lowbit.models.create("vit_nano"), 3), "VisionTransformer has no trunk.*blocks"),
    (lambda net: frozen(net, affine=False), r"frozen_batchnorm=True.*'layer2\.0\.bn1'.*frozen_batchnorm=False"),
    (lambda net: frozen(net, track_running_stats=False), r"BatchNorm 'layer2\.0\.bn1' has no running statistics"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refusals(classifier, make, message):
    with pytest.raises(LowbitError, match=message):
        make(classifier())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_detector_comes_back_with_its_quantizers(tmp_path, frozen):
    classifier = lowbit.models.create("resnet8", 4)
    lowbit.quantize_(classifier, lowbit.QuantConfig(weight=DenseShift(bits=3), activation=LSQ(bits=4)))
    model = detector(classifier, 3, head="retinanet", min_size=48, frozen_batchnorm=frozen, score_thresh=0.0)
    x, _ = fit(model, 1)
    again = lowbit.load(lowbit.save(model, tmp_path / "detector.safetensors"))
    kinds = [(found.name, type(found.weight)) for found in quantized_layers(model)]
    assert kinds and kinds == [(found.name, type(found.weight)) for found in quantized_layers(again)]
    for one, other in zip(model.eval()(x), again(x), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


@pytest.mark.parametrize("options", [{}, {"backbone": "resnet8"}, {"backbone": {"name": "resnet8"}, "scale": 2}])
def test_a_detector_by_name_needs_a_classifier_and_known_options(options):
    with pytest.raises(LowbitError, match=r"backbone=|scale"):
        lowbit.models.create("detector", 3, **options)
