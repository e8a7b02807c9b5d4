"""Detectors on the trunk of a small classifier: torchvision's FCOS or RetinaNet with a slim feature pyramid.

Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv 1904.01355; Lin et al., "Focal
Loss for Dense Object Detection" (RetinaNet), ICCV 2017, arXiv 1708.02002; Lin et al., "Feature Pyramid Networks for
Object Detection", CVPR 2017, arXiv 1612.03144.
"""

import copy
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.extras import extra

with extra("detection", "a detector"):
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.ops import FrozenBatchNorm2d

__all__ = ["detector"]

HEADS = ("fcos", "retinanet")
GROUPS = 32  # of the GroupNorm in both heads
PROBE = 64  # pixels; side of the image used to measure the channels and strides of feature maps


def detector(
    backbone: nn.Module,
    num_classes: int,
    *,
    head: Literal["fcos", "retinanet"] = "fcos",
    min_size: int | None = None,
    max_size: int | None = None,
    stages: int = 2,
    channels: int = 64,
    head_convs: int = 2,
    anchor_size: float | None = None,
    stem_pool: bool = True,
    frozen_batchnorm: bool = False,
    score_thresh: float = 0.05,
    nms_thresh: float = 0.6,
    detections_per_img: int = 100,
) -> nn.Module:
    """A detector on a copy of a classifier's trunk, with its weights, quantizers and latents.

    In training, ``model(images, targets)`` returns a dictionary of losses; in evaluation, ``model(images)`` returns a
    dictionary for each image: ``boxes`` float32 ``[n, 4]`` (x1, y1, x2, y2, pixels of the image as given), ``labels``
    int64 ``[n]``, ``scores`` float32 ``[n]``. Images are float32 ``[N, C, H, W]`` or a list of ``[C, H, W]``,
    normalized as for the classifier; targets have ``boxes`` and ``labels`` (from 0, no background class).
    `lowbit.train` trains it on a detection set.

    The trunk keeps the quantizers of the classifier (`lowbit.quantize_`); pyramid and head are in full precision. The
    trunk keeps its BatchNorm, the head uses GroupNorm. The pyramid has one level for each of the last ``stages``
    stages, and one at half the resolution of the last: with a CIFAR-style ResNet and ``stem_pool`` the strides are 4,
    8 and 16 pixels.

    Args:
        backbone: a classifier whose stages are its children ``layer1``, ``layer2``, ... and run one after the other
            after the stem: the project's ``resnet20``, torchvision's and timm's ResNets. It does not change.
        num_classes: number of object classes.
        head: "fcos" (no anchors; a box is the four distances from a point, published with 4 convolutions) or
            "retinanet" (nine anchors a position, published with 4 convolutions and without normalization).
        min_size: shorter side of images after resizing, in pixels; None does not resize them.
        max_size: limit of the longer side after resizing, in pixels, or None.
        stages: number of stages, counted from the last, that feed the pyramid.
        channels: number of channels in the pyramid and the head, a multiple of 32; 256 as published.
        head_convs: number of convolutions in each of the head's two towers, 1 to 4.
        anchor_size: side of a level's (smallest) anchor, in strides of that level. FCOS uses it to assign boxes to
            levels and as the unit of distance; it is 1 as published, and for None. RetinaNet has 4 as published; None
            means 2, which suits objects of 8 pixels and more.
        stem_pool: whether to add ResNet's 3x3 max-pooling of stride 2 after a stem that keeps the resolution. The
            trunk then costs a quarter.
        frozen_batchnorm: whether to freeze the statistics and affine parameters of the trunk's BatchNorm layers.
        score_thresh: lowest score of a detection, 0 to 1.
        nms_thresh: overlap (IoU) of two boxes of a class above which the one with the lower score is dropped, 0 to 1.
        detections_per_img: largest number of detections in an image.

    Raises:
        LowbitError: ``head`` is unknown, a value is out of range, or the classifier has no such trunk.
    """
    options = {key: value for key, value in locals().items() if key not in ("backbone", "num_classes")}
    _check(num_classes, options)
    body, shapes = _trunk(backbone, stages, stem_pool)
    if frozen_batchnorm:
        _freeze_batchnorm_(body)
    pyramid = BackboneWithFPN(body, {name: name for name in shapes}, [c for c, _ in shapes.values()], channels)
    strides = [stride for _, stride in shapes.values()]
    strides.append(2 * strides[-1])  # BackboneWithFPN's extra level
    build = _fcos if head == "fcos" else _retinanet
    model = build(
        pyramid,
        num_classes,
        strides,
        head_convs,
        anchor_size,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
    )
    model.transform = _Resize(min_size, max_size, size_divisible=strides[-1])
    model.num_classes = num_classes
    spec = getattr(backbone, "spec", None)
    if spec is not None:
        model.spec = {"name": "detector", "num_classes": num_classes, "backbone": spec, **options}
    return model


def _fcos(
    pyramid: BackboneWithFPN, num_classes: int, strides: list[int], convs: int, size: float | None, **options: Any
) -> FCOS:
    sizes = tuple((stride * (size or 1),) for stride in strides)
    head = FCOSHead(pyramid.out_channels, 1, num_classes, convs)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    return FCOS(pyramid, num_classes, anchor_generator=anchors, head=head, **options)


def _retinanet(
    pyramid: BackboneWithFPN, num_classes: int, strides: list[int], convs: int, size: float | None, **options: Any
) -> RetinaNet:
    sizes = tuple(tuple(stride * (size or 2) * 2 ** (k / 3) for k in range(3)) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    norm = partial(nn.GroupNorm, GROUPS)
    head = RetinaNetHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes, norm)
    for tower in (head.classification_head, head.regression_head):
        tower.conv = tower.conv[:convs]
    head.regression_head._loss_type = "giou"  # with GroupNorm, torchvision's second recipe (retinanet_resnet50_fpn_v2)
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **options)


class _Resize(GeneralizedRCNNTransform):
    """A transform that resizes and pads a batch, or only pads it; `lowbit.training` normalizes before."""

    def __init__(self, min_size: int | None, max_size: int | None, size_divisible: int):
        longest = float("inf") if max_size is None else max_size
        super().__init__(min_size, longest, image_mean=[0.0], image_std=[1.0], size_divisible=size_divisible)
        self.as_given = min_size is None

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return (image, target) if self.as_given else super().resize(image, target)


def _trunk(classifier: nn.Module, stages: int, stem_pool: bool) -> tuple[nn.Sequential, dict[str, tuple[int, int]]]:
    """A copy of the classifier up to its last stage, and (channels, stride) of each stage that feeds the pyramid."""
    children = dict(classifier.named_children())
    layers = [name for name in children if re.fullmatch(r"layer\d+", name)]
    if not layers:
        raise LowbitError(
            f"{type(classifier).__name__} has no trunk to detect with: its stages should be children named layer1, "
            f"layer2, ..., as in resnet20; it has {', '.join(children) or 'none'}"
        )
    if not 1 <= stages <= len(layers):
        raise LowbitError(f"stages={stages!r} is not allowed: {type(classifier).__name__} has 1 to {len(layers)}")
    stem: OrderedDict[str, nn.Module] = OrderedDict()
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in children.items():
        (parts if parts or name == layers[0] else stem)[name] = copy.deepcopy(child)
        if name == layers[-1]:
            break
    if stem_pool and all(stride == 1 for _, stride in _shapes(classifier, stem).values()):
        stem["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    body = stem | parts
    shapes = _shapes(classifier, body)
    return nn.Sequential(body), {name: shapes[name] for name in layers[-stages:]}


@torch.no_grad()
def _shapes(classifier: nn.Module, body: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Channels and stride of each part's output, measured on a copy, so that quantizers are not calibrated by it."""
    convolution = next((m for m in classifier.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise LowbitError(f"{type(classifier).__name__} has no trunk to detect with: it has no nn.Conv2d")
    x = torch.rand(1, convolution.in_channels, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
    x = x.to(convolution.weight)
    shapes = {}
    for name, module in body.items():
        try:
            x = copy.deepcopy(module).eval()(x)
            shapes[name] = (x.shape[1], PROBE // x.shape[-1])
        except Exception as error:
            raise LowbitError(
                f"{type(classifier).__name__} has no trunk to detect with: its parts up to the last stage should run "
                f"one after the other on images, but {name!r} does not ({str(error).splitlines()[0]})"
            ) from error
    return shapes


def _freeze_batchnorm_(module: nn.Module, prefix: str = "") -> None:
    """Replace every BatchNorm in ``module`` by a constant one; ``prefix`` begins their names in messages."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if child.running_mean is None or not child.affine:
                raise LowbitError(
                    f"frozen_batchnorm=True is not allowed for this classifier: the BatchNorm {prefix + name!r} has no "
                    "running statistics or no affine parameters; use frozen_batchnorm=False"
                )
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(
                {key: value for key, value in child.state_dict().items() if "num_batches" not in key}
            )
            setattr(module, name, frozen.to(child.running_mean.device))
        else:
            _freeze_batchnorm_(child, f"{prefix}{name}.")


def _check(num_classes: int, options: dict[str, Any]) -> None:
    """Refuse values out of range, by name."""
    if options["head"] not in HEADS:
        raise LowbitError(f"head={options['head']!r} is not allowed; {' and '.join(map(repr, HEADS))} are")
    if options["channels"] < GROUPS or options["channels"] % GROUPS:
        raise LowbitError(
            f"channels={options['channels']!r} is not allowed; a multiple of {GROUPS} is: 32, 64, 96, ..."
        )
    if options["head_convs"] not in range(1, 5):
        raise LowbitError(f"head_convs={options['head_convs']!r} is not allowed; 1 to 4 are")
    for name, value in {"num_classes": num_classes, **options}.items():
        least = {"num_classes": 1, "min_size": 16, "max_size": 16, "detections_per_img": 1}.get(name)
        if least is not None and value is not None and value < least:
            raise LowbitError(f"{name}={value!r} is not allowed; it is at least {least}")
    if options["max_size"] is not None and options["min_size"] is None:
        raise LowbitError(f"max_size={options['max_size']!r} limits what min_size asks for; give min_size too")
    if options["anchor_size"] is not None and not options["anchor_size"] > 0:
        raise LowbitError(f"anchor_size={options['anchor_size']!r} is not allowed; it is above 0")
    for name in ("score_thresh", "nms_thresh"):
        if not 0 <= options[name] <= 1:
            raise LowbitError(f"{name}={options[name]!r} is not allowed; it lies between 0 and 1")
