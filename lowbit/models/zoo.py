"""Models by name: the small ones of this project, then timm's, then torchvision's.

`create` records its arguments in ``model.spec``, so that `lowbit.load` can rebuild the model from a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lowbit.errors import LowbitError
from lowbit.extras import extra
from lowbit.models.spec import note_

CHECKPOINTS = Path(__file__).parent / "checkpoints"

_small: dict[str, Callable[..., nn.Module]] = {}
_speech: set[str] = set()  # names of the small models that take sound


def _register(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    _small[make.__name__] = make
    return make


def _register_speech(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    _speech.add(make.__name__)
    return _register(make)


@_register
def resnet8(num_classes: int = 10, in_chans: int = 3, img_size: int = 32, **options: Any) -> nn.Module:
    """ResNet-8, 0.08 M parameters: one block in each stage, for experiments with many runs."""
    from lowbit.models.resnet import SmallResNet

    return SmallResNet(1, num_classes, in_chans, **options)


@_register
def resnet20(num_classes: int = 10, in_chans: int = 3, img_size: int = 32, **options: Any) -> nn.Module:
    """ResNet-20, 0.27 M parameters; takes images of any size."""
    from lowbit.models.resnet import SmallResNet

    return SmallResNet(3, num_classes, in_chans, **options)


@_register
def vit_nano(
    num_classes: int = 10, in_chans: int = 3, img_size: int = 32, patch_size: int = 4, **options: Any
) -> nn.Module:
    """A vision transformer of timm's parts: 128 wide, 4 blocks, 4 heads, 4x4 patches; 0.8 M parameters.

    64 tokens for 32x32 images, 4 for 8x8 ones.
    """
    with extra("models", "the model vit_nano"):
        from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {"embed_dim": 128, "depth": 4, "num_heads": 4, "class_token": False}
    settings |= {"global_pool": "avg"} | options
    return VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        **settings,
    )


@_register
def vit_nano_patch8(num_classes: int = 10, in_chans: int = 3, img_size: int = 32, **options: Any) -> nn.Module:
    """`vit_nano` with 8x8 patches: 16 tokens for 32x32 images, so that a step costs a quarter of `vit_nano`'s."""
    return vit_nano(num_classes, in_chans, img_size, patch_size=8, **options)


@_register_speech
def ds_cnn(num_classes: int = 10, sample_rate: int = 8000, **options: Any) -> nn.Module:
    """Depthwise-separable CNN for keywords, 23 k parameters; takes sound ``[N, T]`` of any length."""
    from lowbit.models.speech import DSCNN

    return DSCNN(num_classes, sample_rate, **options)


@_register_speech
def kws_resnet(num_classes: int = 10, sample_rate: int = 8000, **options: Any) -> nn.Module:
    """Residual net of ordinary convolutions for keywords, 56 k parameters; takes sound ``[N, T]`` of any length."""
    from lowbit.models.speech import KWSResNet

    return KWSResNet(num_classes, sample_rate, **options)


def names(task: Literal["classification", "speech"] = "classification") -> list[str]:
    """Names of the project's own models for images or for sound; `create` takes timm's and torchvision's too.

    Args:
        task: "classification" for models of images, "speech" for models of sound.
    """
    return sorted(name for name in _small if (name in _speech) == (task == "speech"))


def create(
    name: str,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int = 32,
    pretrained: bool | str = False,
    **options: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of `names`, a timm model (``deit_tiny_patch16_224``), a torchvision model (``mobilenet_v2``), or
            "detector". A detector needs ``backbone={"name": ...}``, the arguments of `create` for its classifier.
        num_classes: number of outputs.
        in_chans: number of input channels; torchvision's models take 3, and models of sound ignore it.
        img_size: height and width of the images in pixels; models that take images of any size ignore it.
        pretrained: the name of a data set whose checkpoint the project ships (``"digits"``, see `checkpoints`), or
            the path of a file written by `lowbit.save`; True downloads timm's or torchvision's own weights.
        options: further arguments of the model's constructor, e.g. ``sample_rate`` (Hz, default 8000) for sound.

    Returns:
        The model. Its attribute ``spec`` holds the arguments, and ``example_shape`` the shape of one input.

    Raises:
        LowbitError: ``name`` or an option is unknown, or there is no such checkpoint.
    """
    if name == "detector":
        return _detector(num_classes, pretrained, **options)
    shape = {} if name in _speech else {"in_chans": in_chans, "img_size": img_size}
    spec = {"name": name, "num_classes": num_classes, **shape, **options}
    try:
        model = _build(name, num_classes, in_chans, img_size, pretrained is True, options)
    except TypeError as error:
        raise LowbitError(f"the model {name!r} does not take these options: {error}") from None
    # The shape of one input for `lowbit.pack`, without the batch: a second of sound, or an image.
    example_shape = (options.get("sample_rate", 8000),) if name in _speech else (in_chans, img_size, img_size)
    note_(model, spec=spec, example_shape=example_shape)
    if isinstance(pretrained, str | Path):
        _load_checkpoint(model, name, pretrained)
    return model


def _build(
    name: str, num_classes: int, in_chans: int, img_size: int, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    if name in _small:
        if pretrained:
            have = ", ".join(sorted(checkpoints().get(name, {}))) or "none"
            raise LowbitError(f"pretrained=True: say which checkpoint of {name!r} to load; there is {have}")
        shape = {} if name in _speech else {"in_chans": in_chans, "img_size": img_size}
        return _small[name](num_classes=num_classes, **shape, **options)
    with extra("models", f"the model {name!r}"):
        import timm
        import torchvision

    if timm.is_model(name):
        if "vit" in name or "deit" in name or "swin" in name:
            options = {"img_size": img_size, **options}
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)
    if name in torchvision.models.list_models(module=torchvision.models):  # detectors and the like fetch a backbone
        if in_chans != 3:
            raise LowbitError(f"in_chans={in_chans} is not allowed for torchvision's {name!r}; 3 is")
        weights = "DEFAULT" if pretrained else None
        return torchvision.models.get_model(name, weights=weights, num_classes=num_classes, **options)
    import difflib

    every = [*_small, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
    close = ", ".join(difflib.get_close_matches(name, every, n=3)) or ", ".join(names())
    raise LowbitError(f"there is no model {name!r} here, in timm or in torchvision; closest: {close}")


def _detector(num_classes: int, pretrained: bool | str, backbone: Any = None, **options: Any) -> nn.Module:
    from lowbit.models.detection import detector

    if pretrained or not isinstance(backbone, dict):
        raise LowbitError(
            f"a detector is built on a classifier: give backbone={{'name': 'resnet20', 'pretrained': ...}}, not "
            f"backbone={backbone!r}, pretrained={pretrained!r}"
        )
    try:
        return detector(create(**backbone), num_classes, **options)
    except TypeError as error:
        raise LowbitError(f"the detector does not take these options: {error}") from None


def checkpoints() -> dict[str, dict[str, Path]]:
    """The checkpoints that the project ships: ``{model: {data set: path}}``."""
    shipped: dict[str, dict[str, Path]] = {}
    for path in sorted(CHECKPOINTS.glob("*.safetensors")):
        model, _, data = path.stem.partition(".")
        shipped.setdefault(model, {})[data] = path
    return shipped


def _load_checkpoint(model: nn.Module, name: str, which: str | Path) -> None:
    from lowbit.container import load_weights_

    shipped = checkpoints().get(name, {})
    path = shipped.get(str(which), Path(which))
    if not path.is_file():
        have = ", ".join(sorted(shipped)) or "none"
        raise LowbitError(
            f"pretrained={str(which)!r}: {name!r} has no checkpoint of that name (it has {have}), and there is no "
            "such file"
        )
    load_weights_(model, path)
