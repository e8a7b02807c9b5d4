"""Run as a script by test_resume.py: train a quantized ViT with dropout, and die by SIGKILL at a given step.

python kill_and_resume.py OUT STEP     (STEP -1: live on; the final weights go to OUT/final.pt)
"""

import os
import signal
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from training_helpers import make_data

import lowbit


class Kill:
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(out, step):
    held = load_digits()
    x, y = torch.from_numpy(held.images * 15).to(torch.uint8)[:, None], torch.from_numpy(held.target).long()
    data = make_data(x[:160], y[:160], x[160:240], y[160:240], 10)
    resuming = Path(out, "checkpoint.pt").exists()
    torch.manual_seed(int(resuming))  # a resumed run must not depend on the weights it is handed
    model = lowbit.models.create(
        "vit_nano", in_chans=1, img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, proj_drop_rate=0.1
    )
    lsq = {"method": "lsq", "bits": 3}
    lowbit.quantize_(model, lowbit.QuantConfig(weight={"method": "statsq", "bits": 3}, activation=lsq, first_last=8))
    config = lowbit.TrainConfig(
        epochs=4, batch_size=32, lr=2e-3, warmup_epochs=1, augment="shift", label_smoothing=0.1, out=out, progress=False
    )
    record = lowbit.train(model, data, config, callbacks=[Kill(step)], device="cpu")
    torch.save(
        {"model": model.state_dict(), "loss": [row["train_loss"] for row in record.history]}, Path(out, "final.pt")
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
