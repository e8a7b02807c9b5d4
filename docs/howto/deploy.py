"""The code of the page "Deploy it": from a trained quantized model to a file that runs without Python."""

from pathlib import Path

import numpy as np
import torch

import lowbit
from lowbit.nn.onnx import export_onnx
from lowbit.quantizers import LSQ, StatsQ

torch.manual_seed(0)
images = torch.rand(8, 1, 8, 8)
model = lowbit.models.create("resnet20", num_classes=10, in_chans=1, img_size=8)
lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last=8))
lowbit.calibrate(model, images)

# [pack]
# a copy: BatchNorm folded in, weights of 3 bits stored as 3 bits
packed = lowbit.pack(model.eval())
lowbit.save(packed, "packed.safetensors")
packed = lowbit.load("packed.safetensors")
# [fuse]
# layers pass integers to each other: faster, with bit-identical outputs
fast = lowbit.fuse(packed)
assert torch.equal(fast(images), packed(images))
# [plan]
# for a network of your own: lowbit.plan(packed, example_input)
plan = lowbit.plan(packed)
plan.save("model.lbp")
# [run]
plan = lowbit.load_plan("model.lbp")  # needs numpy alone, not torch
scores = plan(images.numpy())
# [onnx]
export_onnx(packed, images, "model.onnx")
# [end]
assert scores.shape == (8, 10)
assert np.array_equal(scores.argmax(1), packed(images).argmax(1).numpy())
assert Path("model.lbp").stat().st_size < Path("packed.safetensors").stat().st_size * 2
