"""The ImageNet recipe of `configs/` on a small folder of the same form: two processes, killed once, resumed."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import lowbit
from lowbit import paths
from lowbit.migration import ofq_config
from lowbit.nn import quantized_layers
from lowbit.training import runfile

CONFIGS = sorted(paths.project().glob("configs/imagenet_*denseshift.yaml"))
OFQ = sorted(paths.project().glob("configs/imagenet_*ofq*.yaml"))


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory):
    """Three classes of JPEG photographs (noise on a color) of several sizes: 8 to train on and 4 to test on, each."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(3):
            folder = root / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (60 + 7 * i, 80 + 5 * label, 3)) // 2
                pixels[..., label] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.JPEG")
    return root


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_recipe_is_the_published_one(file, bits):
    run = runfile.read(file, [f"quant.weight.bits={bits}"])
    train = run.train
    assert (train.optimizer, train.lr, train.momentum, train.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert (train.decay, train.batch_size, train.epochs, train.schedule, train.min_lr) == ("all", 256, 200, "cosine", 0)
    weight = run.quant_config().weight
    assert (weight.name, weight.bits, weight.sigma, weight.scale, weight.init, weight.surrogate, weight.recursion) == (
        "denseshift", bits, 1e-3, "none", "random", "sqrt", "nested"
    )  # fmt: skip
    assert run.quant_config().activation is None and run.quant_config().first_last is None


@pytest.mark.parametrize("file", OFQ, ids=lambda file: file.stem)
def test_the_ofq_recipes_are_the_published_ones(file):
    run = runfile.read(file)
    quant, train = run.quant_config(), run.train
    assert quant == ofq_config(quant.weight.bits)  # with which the authors' checkpoints load
    assert (train.optimizer, train.epochs, train.min_lr, train.augment) == ("adamw", 300, 1e-5, "deit")
    assert (train.cga_epochs, train.cga_lr, train.cga_boundary, train.distill_weight) == (30, 1e-5, 0.005, 0.5)
    assert run.teacher["name"] == run.model["name"]
    published = {  # batch, learning rate, decay, warm-up, mixup, repeats
        "imagenet_deit_tiny_ofq": (560, 5.47e-4, 0.05, 5, 0.0, 1),
        "imagenet_deit_small_ofq_w2a2": (560, 5.47e-4, 0.05, 5, 0.0, 1),
        "imagenet_deit_small_ofq_w3a3": (800, 3.2e-4, 0.0, 0, 0.8, 3),
        "imagenet_swin_tiny_ofq_w2a2": (512, 5e-4, 0.05, 5, 0.0, 1),
        "imagenet_swin_tiny_ofq_w3a3": (512, 2e-4, 0.0, 0, 0.8, 1),
    }[file.stem]
    own = (train.batch_size, train.lr, train.weight_decay, train.warmup_epochs, train.mixup, train.repeats)
    assert own == published and train.cutmix == (1.0 if train.mixup else 0.0)


def launch(folder, out, epochs, config="imagenet_resnet18_denseshift", changes=()):
    changes = [*changes]
    changes += [f"data.path={folder}", "data.img_size=64", "train.batch_size=12", f"train.epochs={epochs}"]
    if not config.endswith("ofq"):
        changes += ["model.channels=[16, 32, 64, 128]"]  # a quarter of the width, for the sake of the checkpoints
    changes += ["train.workers=0", "train.lr=0.02", "train.progress=false"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lowbit"]
    command += ["train", str(paths.project() / f"configs/{config}.yaml"), "--out", str(out)]
    command += ["--device", "cpu", *(part for change in changes for part in ("--set", change))]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_it_and_go_on_after_being_killed(imagenet_folder, tmp_path):
    out, epochs = tmp_path / "run", 6
    first = launch(imagenet_folder, out, epochs)
    deadline = time.monotonic() + 240
    while not (out / "checkpoint.pt").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1]
        time.sleep(0.05)
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:  # torchrun gives each rank its session
        process.kill()
    first.communicate()
    assert not (out / "run.json").exists(), "it finished before it could be killed"
    before = torch.load(out / "checkpoint.pt", weights_only=True)
    second = launch(imagenet_folder, out, epochs)
    _, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    card = json.loads((out / "run.json").read_text())
    assert card["processes"] == 2 and card["quantizers"] and len(card["history"]) == epochs
    kept = before["history"]
    assert 1 <= len(kept) < epochs and card["history"][: len(kept)] == kept  # went on, did not begin again
    model = lowbit.load(out / "model.safetensors")
    layers = list(quantized_layers(model))
    # 16 in the blocks, 4 downsampling (at full width 3); stem and classifier are not among them.
    assert len(layers) == 20
    allowed = {1.0, 2.0, 4.0, 8.0}
    assert all(set(layer.layer.weight.abs().unique().tolist()) <= allowed for layer in layers)


@pytest.mark.slow
def test_two_processes_run_ofq_and_go_on_in_the_annealing(imagenet_folder, tmp_path):
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    twin = lowbit.models.create("deit_tiny_distilled_patch16_224", 3, 3, 64, **shape)
    file = lowbit.save(twin, tmp_path / "twin.safetensors")
    small = [f"{part}.{key}={value}" for part in ("model", "teacher") for key, value in shape.items()]
    small += [f"{part}.pretrained={file}" for part in ("model", "teacher")]
    small += ["train.warmup_epochs=0", "train.cga_epochs=2", "train.cga_lr=5e-6", "train.min_lr=0"]
    out = tmp_path / "run"
    first = launch(imagenet_folder, out, 2, "imagenet_deit_tiny_ofq", small)
    deadline = time.monotonic() + 240
    while len(read_history(out)) < 3:  # one epoch of the annealing is done
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1]
        time.sleep(0.02)
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        process.kill()
    first.communicate()
    second = launch(imagenet_folder, out, 2, "imagenet_deit_tiny_ofq", small)
    _, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    card = json.loads((out / "run.json").read_text())
    assert card["processes"] == 2 and [row["lr"] for row in card["history"][2:]] == [5e-6, 5e-6]
    names = [found.name for found in quantized_layers(lowbit.load(out / "model.safetensors"))]
    assert "blocks.1.attn.qk" in names and "head_dist" in names


def read_history(out):
    file = out / "history.jsonl"
    return file.read_text().splitlines() if file.exists() else []
