"""The code of the page "Deploy it", ExecuTorch: a packed model as a program of Meta's runtime for devices."""

from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.runtime import Runtime

import lowbit
from lowbit.nn.onnx import standard
from lowbit.quantizers import LSQ, StatsQ

torch.manual_seed(0)
images = torch.rand(8, 1, 8, 8)
model = lowbit.models.create("resnet8", num_classes=10, in_chans=1, img_size=8)
lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last=8))
lowbit.calibrate(model, images)
packed = lowbit.pack(model.eval())

# [export]
with torch.no_grad():
    exported = torch.export.export(standard(packed), (images,))
exported = constant_prop_pass(exported)  # float32 weights, computed once
program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
Path("model.pte").write_bytes(program.buffer)
# [end]
scores = Runtime.get().load_program("model.pte").load_method("forward").execute([images])[0]
with torch.no_grad():
    print("same answers", torch.allclose(scores, packed(images), rtol=1e-5, atol=1e-5))
