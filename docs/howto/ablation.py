"""The code of the page "Rerun an ablation": an ablation of one's own, with seeds, an interval and a verdict."""

# [run]
import lowbit
from lowbit.metrics import paired_difference
from lowbit.quantizers import get
from lowbit_suite import sweep


def run(method, seed):
    """Quantize the shipped checkpoint by ``method``, train one epoch, and return the test accuracy."""
    data = lowbit.data.load("digits").subset(train=256, seed=seed)
    model = lowbit.models.create("resnet20", 10, in_chans=1, img_size=8, pretrained="digits")
    lowbit.quantize_(model, lowbit.QuantConfig(weight=get(method)(bits=2)))
    record = lowbit.train(model, data, lowbit.TrainConfig(epochs=1, batch_size=64, lr=1e-3, seed=seed))
    return {"accuracy": 100 * record.final["test_acc"]}


# [sweep]
table = sweep(run, [{"method": "statsq"}, {"method": "lsq"}], seeds=range(5), workers=1)
accuracy = table.pivot(index="seed", columns="method", values="accuracy")
print(paired_difference(accuracy["statsq"], accuracy["lsq"]))
# [end]
