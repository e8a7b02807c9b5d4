"""Saved models: what comes back is what was written, and nothing doubtful is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import models
from lowbit.container import checksum
from lowbit.errors import CheckpointError, LowbitError
from lowbit.models import create
from lowbit.nn import QuantConfig, quantize_
from lowbit.quantizers import LSQ, get, names
from lowbit.serialization import FORMAT, load, load_weights_, read, save


def quantized(weight: str = "statsq"):
    torch.manual_seed(0)
    model = create("resnet20", in_chans=1, img_size=8)
    quantize_(model, QuantConfig(weight=get(weight)(), activation=LSQ(bits=4), first_last=8))
    model(torch.randn(4, 1, 8, 8))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    return save(quantized(), tmp_path / "model.safetensors", card={"note": "a test"})


@pytest.mark.parametrize("weight", names("weight"))
def test_a_quantized_model_comes_back_whole(tmp_path, weight):
    model = quantized(weight)
    x = torch.randn(2, 1, 8, 8)
    again = load(save(model, tmp_path / "m.safetensors"))
    assert torch.equal(again(x), model(x))


def test_full_precision_weights_go_into_a_model_made_elsewhere(tmp_path):
    model = create("vit_nano", in_chans=1, img_size=8).eval()
    other = create("vit_nano", in_chans=1, img_size=8).eval()
    path = save(model, tmp_path / "m.safetensors", dtype="float16")
    load_weights_(other, path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(other(x), model(x), atol=0.02) and not torch.equal(other(x), model(x))
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in model.parameters())


def test_truncation_is_refused(saved):
    whole = saved.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(saved)


def test_an_altered_byte_is_refused(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load(saved)


def rewrite(path, **changes):
    header, tensors = read(path)
    save_file(tensors, path, metadata={"lowbit": json.dumps(header | changes)})


def test_a_newer_format_is_refused(saved):
    rewrite(saved, format=FORMAT + 1)
    with pytest.raises(CheckpointError, match="update"):
        load(saved)


def test_an_older_format_is_read(saved):
    _, tensors = read(saved)
    rewrite(saved, format=1, sha256=checksum(tensors, {"format": 1}))
    load(saved)


def test_an_altered_header_is_refused(saved):
    header, _ = read(saved)
    rewrite(saved, model=header["model"] | {"num_classes": 3})
    with pytest.raises(CheckpointError, match="altered"):
        load(saved)


@pytest.mark.parametrize("changes", [{"format": "x"}, {"sha256": 3}, {"format": None}])
def test_a_damaged_header_is_refused(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError):
        load(saved)


def test_a_foreign_or_missing_file_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="did not write"):
        load(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        load(tmp_path / "missing.safetensors")


def test_another_models_weights_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="quantized"):
        load_weights_(create("resnet20", in_chans=1), saved)
    path = save(create("resnet20"), tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights_(create("vit_nano"), path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(quantized(), saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_an_unknown_storage_type_is_refused(tmp_path):
    with pytest.raises(LowbitError, match="int8"):
        save(quantized(), tmp_path / "m", dtype="int8")


def test_the_file_is_plain_safetensors(saved):
    assert "layer1.0.conv1.parametrizations.weight.original" in load_file(saved)


HOSTILE = [
    {"name": "resnet18", "checkpoint_path": "weights.pth"},
    {"name": "resnet18", "pretrained": True},
    {"name": "resnet8", "pretrained": "weights.pth"},
    {"name": "resnet18", "pretrained_cfg": {"file": "weights.pth"}},
    {"name": "resnet18", "pretrained_cfg_overlay": {"url": "https://example.org/w.pth"}},
    {"name": "resnet18", "cache_dir": "."},
    {"name": "mobilenet_v2", "weights": "DEFAULT"},
    {"name": "fasterrcnn_resnet50_fpn", "weights_backbone": "DEFAULT"},
    {"name": "hf-hub:someone/something"},
    {"name": "local-dir:."},
    {"name": "../resnet8"},
    {"name": 3},
    {},
    {"name": "detector", "backbone": {"name": "resnet18", "checkpoint_path": "weights.pth"}},
    {"name": "detector", "backbone": "resnet18"},
    {"name": "resnet8", "width": 10**9},
    {"name": "resnet8", "width": -1},
    {"name": "resnet8", "width": True},
    {"name": "resnet8", "num_classes": 1.5},
    {"name": "resnet8", "unheard_of": 1},
    {"name": "vit_nano", "drop_rate": float("nan")},
    {"name": "vit_nano", "global_pool": "__import__"},
    {"name": "swin_tiny_patch4_window7_224", "depths": [1] * 1000},
]


def forge(path, spec, quantization=None, **other):
    """A file without tensors whose checksum is right: anybody can make one."""
    header = {"format": FORMAT, "model": spec, "quantization": quantization, "packed": None, "card": {}}
    header["sha256"] = checksum({}, header)
    save_file({}, path, metadata={"lowbit": json.dumps(header | other)})
    return path


@pytest.mark.parametrize("spec", HOSTILE, ids=str)
def test_a_file_names_sizes_and_nothing_that_is_opened_or_fetched(spec, tmp_path, monkeypatch):
    for constructor in ("timm.create_model", "torchvision.models.get_model", "lowbit.models.create"):
        monkeypatch.setattr(constructor, lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(CheckpointError):
        load(forge(tmp_path / "m.safetensors", spec))
    model = torch.nn.Linear(1, 1)
    model.spec = spec
    with pytest.raises(LowbitError):  # save writes nothing that load refuses
        save(model, tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50"])
def test_torchvision_s_models_that_fetch_a_backbone_are_not_ours(name, tmp_path):
    with pytest.raises(CheckpointError, match="no model"):
        load(forge(tmp_path / "m.safetensors", {"name": name}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "2"},
        {"format": True},
        {"format": None},
        {"sha256": 3},
        {"model": [1]},
        {"quantization": "x"},
        {"packed": [1]},
        {"card": None},
    ],
    ids=str,
)
def test_entries_of_another_kind_are_refused(changes, tmp_path):
    with pytest.raises(CheckpointError, match="damaged header"):
        load(forge(tmp_path / "m.safetensors", {"name": "resnet8"}, **changes))


@pytest.mark.parametrize(
    "quantization",
    [
        {},
        {"layers": 3},
        {"layers": {"conv1": {"weight": {"method": "s4"}}}},
        {"layers": {"conv1": {"weight": {"method": "lsq", "bits": 99}}}},
        {"layers": {"bn1": {"weight": {"method": "lsq"}}}},
        {"layers": {"conv1": {"weight": 7}}},
        {"layers": {}, "attention": {"conv1": {}}},
        {"layers": {}, "attention": [1]},
    ],
    ids=str,
)
def test_a_quantization_that_does_not_fit_is_refused(quantization, tmp_path):
    with pytest.raises(CheckpointError):
        load(forge(tmp_path / "m.safetensors", {"name": "resnet8"}, quantization))


def test_a_small_file_of_a_large_model_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    path = forge(tmp_path / "m.safetensors", {"name": "vit_giant_patch14_224", "img_size": 224})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match="does not hold its weights"):
        load(path)


def test_everything_that_the_project_builds_can_be_saved():
    from lowbit.models.spec import check

    for name in [*models.names(), *models.names("speech")]:
        check(create(name).spec)
    check(create("resnet18", zero_init_last=False).spec)
    check(create("swin_tiny_patch4_window7_224", depths=[1, 1], num_heads=[1, 2], embed_dim=16, window_size=4).spec)
    backbone = {"name": "resnet20", "num_classes": 10}
    check({"name": "detector", "num_classes": 3, "backbone": backbone, "head": "retinanet", "min_size": None})
