"""The code of the page "Quantize my model": a network of one's own, quantized and trained."""

# [quantize]
import torch
from torch import nn

import lowbit
from lowbit.nn import quantized_layers
from lowbit.quantizers import LSQ, StatsQ

torch.manual_seed(0)


def network() -> nn.Module:
    """Yours takes its place."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


model = network()
config = lowbit.QuantConfig(StatsQ(bits=2), LSQ(bits=4), first_last=8)
lowbit.quantize_(model, config)
# [calibrate]
images, labels = torch.rand(256, 3, 16, 16), torch.randint(10, (256,))  # your data
lowbit.calibrate(model, images[:32])
# [train]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for batch in range(0, 256, 64):
    loss = nn.functional.cross_entropy(model(images[batch : batch + 64]), labels[batch : batch + 64])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
# [look]
for layer in quantized_layers(model):
    used = layer.weight.levels[layer.codes().long()] * layer.weight.scale(*layer.latents)
    print(layer.name, len(layer.weight.levels), "levels", torch.equal(used, layer.layer.weight))
# [save]
lowbit.save(model, "trained.safetensors")
again = lowbit.load_into(network(), "trained.safetensors")
# [pack]
packed = lowbit.pack(again, images[:32])
lowbit.save(packed, "packed.safetensors")
deployed = lowbit.load_into(network(), "packed.safetensors")
# [end]
with torch.no_grad():
    print("same answers", torch.equal(deployed(images), packed(images)))
    print("as trained", torch.allclose(packed(images), model.eval()(images), atol=0.01))
