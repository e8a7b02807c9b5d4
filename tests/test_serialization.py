"""Saved models: what comes back is what was written, and nothing doubtful is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, LowbitError
from lowbit.models import create
from lowbit.nn import QuantConfig, quantize_
from lowbit.quantizers import LSQ, get, names
from lowbit.serialization import FORMAT, _checksum, load, load_weights_, read, save


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
def test_a_quantised_model_comes_back_whole(tmp_path, weight):
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
    rewrite(saved, format=1, sha256=_checksum(tensors, {"format": 1}))
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
    with pytest.raises(CheckpointError, match="quantised"):
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


def test_unknown_storage_type_and_unnamed_model_are_refused(tmp_path):
    with pytest.raises(LowbitError, match="int8"):
        save(quantized(), tmp_path / "m", dtype="int8")
    with pytest.raises(LowbitError, match="spec"):
        save(torch.nn.Linear(2, 2), tmp_path / "m")


def test_the_file_is_plain_safetensors(saved):
    assert "layer1.0.conv1.parametrizations.weight.original" in load_file(saved)
