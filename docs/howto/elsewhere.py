"""The code of the page "Other people's models and trainers": a transformer of Hugging Face, trained by a loop."""

import torch
import transformers

import lowbit
from lowbit.metrics import OscillationTracker
from lowbit.nn import family_filter
from lowbit.quantizers import LSQ, StatsQ

torch.manual_seed(0)
EPOCHS = 2
words, labels = torch.randint(2, 100, (64, 12)), torch.randint(2, (64,))
loader = [{"input_ids": words[i : i + 16], "labels": labels[i : i + 16]} for i in range(0, 64, 16)]
settings = transformers.BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
# [quantize]
model = transformers.BertForSequenceClassification(settings)  # or .from_pretrained(...)
config = lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), attention=True, qkr=True)
lowbit.quantize_(model, config, family_filter(model))
lowbit.calibrate(model, loader[0])
# [train]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tracker = OscillationTracker(model)
hooks = lowbit.training.Hooks(model, optimizer, [tracker], epochs=EPOCHS, steps_per_epoch=len(loader))
for _ in range(EPOCHS):
    for batch in loader:
        hooks.before_forward()
        model(**batch).loss.backward()
        hooks.before_step()
        optimizer.step()
        optimizer.zero_grad()
        hooks.after_step()
    print(hooks.after_epoch())
# [deploy]
lowbit.save(model.eval(), "trained.safetensors")
packed = lowbit.pack(model, loader[0])
lowbit.save(packed, "packed.safetensors")
# [load]
again = transformers.BertForSequenceClassification(settings)
lowbit.load_into(again, "packed.safetensors")
with torch.no_grad():
    print("same answers", torch.equal(again(**loader[0]).logits, packed(**loader[0]).logits))
# [end]
