"""The speech models: the front end against torchaudio's own, and what quantization and training need of the nets."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantConfig, TrainConfig, data, paths, quantize_, train
from lowbit.data import ArrayDataset, Data
from lowbit.errors import LowbitError
from lowbit.models import create, names
from lowbit.models.speech import LogMel, mel_bands
from lowbit.nn import quantized_layers
from lowbit.quantizers import LSQ, DenseShift
from lowbit.training import runfile

MODELS = names("speech")
CONFIGS = ["spoken_words_ds_cnn", "fsdd_ds_cnn"]


def sounds(n: int = 4, length: int = 8000) -> torch.Tensor:
    """Noise under another envelope in each clip, digital silence at the end; the last is a hundred times softer."""
    x = torch.randn(n, length, generator=torch.Generator().manual_seed(0)) * 0.1
    x = x * torch.linspace(0, 20, length).sin().abs() ** torch.arange(1, n + 1)[:, None]
    x[:, -length // 4 :] = 0
    x[-1] /= 100
    return x


def tiny_data(n: int = 32) -> Data:
    x = (sounds(n, 2000) * 10000).to(torch.int16)
    split = ArrayDataset(x, torch.arange(n) % 2)
    return Data("tiny", "speech", ("a", "b"), split, split, (2000,), sample_rate=8000)


def quick(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "progress": False, **settings})


@pytest.fixture
def torchaudio():
    """torchaudio, where it can be imported: its last release refuses torch built for another CUDA version."""
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchaudio cannot be imported: {error}")
    return torchaudio


@pytest.mark.parametrize(("rate", "window", "n_fft"), [(8000, 320, 512), (16000, 640, 1024)])
def test_front_end_is_torchaudios_spectrogram_of_each_clip(torchaudio, rate, window, n_fft):
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft, win_length=window, hop_length=window // 2, n_mels=20)
    decibels = torchaudio.transforms.AmplitudeToDB("power", 60.0)
    x = sounds(length=rate)
    made = LogMel(rate)(x)
    assert made.shape == (4, 1, 20, 51) and made.dtype == torch.float32
    assert torch.equal(LogMel(rate).bands, mel.mel_scale.fb)
    for clip, row in zip(x, made, strict=True):
        expected = decibels(mel(clip))
        assert torch.allclose(row[0], (expected - expected.mean()) / expected.std(), atol=1e-4)
    expected = decibels(mel(x)[:, None])  # the whole batch, to the last bit
    std, mean = torch.std_mean(expected, dim=(2, 3), keepdim=True)
    assert torch.equal(made, (expected - mean) / (std + 1e-5))


def test_masks_are_torchaudios(torchaudio):
    transforms = torchaudio.transforms
    x, front = sounds(16), LogMel(freq_mask=4, time_mask=9)
    torch.manual_seed(0)
    made = front.train()(x)
    torch.manual_seed(0)
    expected = transforms.FrequencyMasking(4, iid_masks=True)(front.eval()(x))
    assert torch.equal(made, transforms.TimeMasking(9, iid_masks=True)(expected))


def test_bands_by_hand():
    """One band over 0, 2000 and 4000 Hz: its peak is where half of 2595·log10(1 + 4000/700) mel lie, at 1114 Hz."""
    peak = 700 * ((1 + 4000 / 700) ** 0.5 - 1)
    assert mel_bands(3, 1, 8000).flatten().tolist() == pytest.approx([0, (4000 - 2000) / (4000 - peak), 0], abs=1e-6)


def test_a_tone_is_loudest_in_its_band_and_top_db_cuts_off_the_rest():
    time = torch.arange(8000) / 8000
    front = LogMel(top_db=30.0)
    band = int(front.bands[64].argmax())  # 1000 Hz is row 64 of 512 points at 8000 a second
    decibels = front._decibels((2 * torch.pi * 1000 * time).sin()[None])[0]
    assert (decibels[:, 10:-10].argmax(0) == band).all()
    assert decibels.max() - decibels.min() == pytest.approx(30, abs=1e-4)


@pytest.mark.parametrize("wrong", [{"n_mels": 0}, {"top_db": -1.0}, {"freq_mask": -1}, {"time_mask": -1}])
def test_front_end_refuses_sizes_below_its_least(wrong):
    (name,) = wrong
    with pytest.raises(LowbitError, match=name):
        LogMel(**wrong)


def test_front_end_knows_neither_loudness_nor_the_other_clips():
    front = LogMel()
    x = sounds()
    assert torch.allclose(front(x * 3), front(x), atol=1e-3)
    assert torch.allclose(front(x)[-1:], front(x[-1:]), atol=1e-5)
    silence = front(torch.zeros(2, 8000))
    assert torch.equal(silence, torch.zeros_like(silence))


def test_front_end_stores_nothing_and_ignores_autocast():
    front = LogMel(freq_mask=4, time_mask=4)
    assert not front.state_dict() and not list(front.parameters())
    x = sounds()
    expected = front.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(front(x), expected)
    assert all(buffer.dtype == torch.float64 for buffer in front.double().buffers())


@pytest.mark.parametrize(("option", "axis"), [("freq_mask", 2), ("time_mask", 3)])
def test_masks_hide_neighbors_of_each_clip_in_training_only(option, axis):
    front = LogMel(**{option: 6})
    x = sounds(64)
    assert torch.equal(front.eval()(x), LogMel()(x))
    torch.manual_seed(0)
    hidden = (front.train()(x) == 0).all(dim=5 - axis)[:, 0]  # [clip, band or frame]
    widths = hidden.sum(1)
    assert widths.max() < 6 and len(widths.unique()) > 3
    starts = hidden.int().diff(dim=1, prepend=torch.zeros(64, 1, dtype=torch.int32)) == 1
    assert (starts.sum(1) <= 1).all() and len(starts.int().argmax(1).unique()) > 5


@pytest.mark.parametrize("name", MODELS)
def test_models_take_sound_of_any_length_and_rate(name):
    model = create(name, num_classes=7)
    assert model(sounds(3)).shape == model(sounds(3, 4000)).shape == (3, 7)
    assert create(name, sample_rate=16000)(sounds(2, 16000)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 60_000
    assert model.spec == {"name": name, "num_classes": 7}
    with pytest.raises(LowbitError, match=r"\[N, T\].*\[2, 3, 32, 32\]"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(LowbitError, match="does not take"):
        create(name, depth=3)


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_model_and_eval_is_deterministic(name):
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(create(name).eval()(sounds()))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_normalized_so_that_its_scale_does_not_matter(name):
    """What lets raw ±2^p weights stand in for scaled ones."""
    torch.manual_seed(0)
    model = create(name)
    expected = model(sounds())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 16
    # Not exact: BatchNorm adds 1e-5 to each variance.
    assert torch.allclose(model(sounds()), expected, atol=2e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_denseshift_takes_every_layer_but_the_first_and_the_last(name, bits):
    model = create(name)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    quantize_(model, QuantConfig(weight=DenseShift(bits=bits)))
    assert [found.name for found in quantized_layers(model)] == convolutions[1:]
    y = model(sounds())
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    latents = {id(t) for found in quantized_layers(model) for t in found.latents}
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        assert id(p) in latents or p.grad.abs().sum() > 0, key
    for found in quantized_layers(model):  # a gate behind a closed one has no gradient, the master gate always has
        assert found.latents[0].grad.abs().sum() > 0 and found.latents[-1].grad.abs().sum() > 0


def test_depthwise_convolutions_are_among_them():
    model = quantize_(create("ds_cnn"), QuantConfig(weight=DenseShift(bits=3)))
    assert sum(found.layer.groups == 64 for found in quantized_layers(model)) == 4


@pytest.mark.parametrize("name", MODELS)
def test_weights_stay_on_the_grid_in_training_and_in_a_file(name, tmp_path):
    model = create(name, num_classes=2, freq_mask=4)
    config = QuantConfig(weight=DenseShift(bits=2, sigma=0.01), activation=LSQ(bits=4))
    quantize_(model, config)
    before = [found.codes() for found in quantized_layers(model)]
    train(model, tiny_data(), quick(augment="shift"), device="cpu")
    layers = list(quantized_layers(model))
    for found in layers:
        assert set(found.layer.weight.unique().tolist()) <= {-2.0, -1.0, 1.0, 2.0}
    assert any((old != found.codes()).any() for old, found in zip(before, layers, strict=True))

    lowbit.save(model, tmp_path / "model.safetensors")
    again = lowbit.load(tmp_path / "model.safetensors")
    assert torch.equal(again(sounds()), model(sounds()))
    assert again.spec["freq_mask"] == 4


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_trains_the_same_model(name):
    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = create(name, num_classes=2, time_mask=4)
        train(model, tiny_data(), quick(augment="shift", seed=seed), device="cpu")
        return model(sounds())

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_run_files_fit_the_model_to_the_sound():
    fast = Data("fast", "speech", ("a", "b"), None, None, (16000,), sample_rate=16000)
    model = runfile.create_for({"name": "ds_cnn"}, fast, "model")
    assert model.spec == {"name": "ds_cnn", "num_classes": 2, "sample_rate": 16000}
    with pytest.raises(LowbitError, match=r"model: .*'resnet20'.*sample_rate"):
        runfile.create_for({"name": "resnet20"}, fast, "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_in_the_repository_build(name):
    run = runfile.read(paths.project() / "configs" / f"{name}.yaml", ["quant.weight.method=denseshift"])
    model = run.build_model(tiny_data())
    assert run.name == name and model.spec["name"] == "ds_cnn"
    assert [found.weight.config.bits for found in quantized_layers(model)] == [4] * 8


@pytest.mark.slow
@pytest.mark.parametrize("weight", [None, DenseShift(bits=3)])
@pytest.mark.parametrize("name", MODELS)
def test_spoken_words_are_learnt(name, weight):
    """Unseen voices, ten words: chance is 0.1."""
    torch.manual_seed(0)
    model = create(name)
    if weight is not None:
        quantize_(model, QuantConfig(weight=weight))
    config = quick(epochs=10, batch_size=30, weight_decay=1e-4, decay="all", augment="shift", channels_last=True)
    record = train(model, data.load("spoken-words"), config, device="cpu")
    assert record.history[-1]["test_acc"] > 0.5
