"""A teacher's logits for fixed augmentations, computed once and shared by all runs that need the same ones.

Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv 2112.01528, keep soft
labels of fixed crops. Here the crops are those of ``TrainConfig.crops``.
"""

import hashlib

import torch
from torch import nn

from lowbit import paths
from lowbit.extras import extra
from lowbit.files import write_atomically
from lowbit.training import distillation
from lowbit.training.batches import Batches

ITEMS = 256  # training items in one batch of the teacher


@torch.no_grad()
def stored_answers(teacher: nn.Module, batches: Batches) -> torch.Tensor:
    """The logits of ``teacher`` for every fixed version of every training item: float16 [items, crops, classes].

    They are read from the cache folder if the same teacher has answered before. Otherwise one process at a time asks
    the teacher and writes the answers there.

    Args:
        teacher: a model prepared by `lowbit.training.distillation.prepare_teacher`, on the device of ``batches``.
        batches: the batches of a run with ``crops`` above 0.
    """
    from safetensors.torch import load_file, save

    with extra("train", "keeping a teacher's answers"):
        from filelock import FileLock

    path = paths.create_cache("answers") / f"{_key(teacher, batches)}.safetensors"
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return load_file(path)["answers"]
        answers = _ask(teacher, batches)
        write_atomically(path, lambda file: file.write(save({"answers": answers})))
    return answers


def _ask(teacher: nn.Module, batches: Batches) -> torch.Tensor:
    parts = []
    for items in torch.arange(batches.n).split(ITEMS):
        for version in range(batches.config.crops):
            x, _ = batches.versions(items, torch.full_like(items, version))
            parts.append(distillation.target(teacher, x).to("cpu", torch.float16))
    grouped = [parts[i : i + batches.config.crops] for i in range(0, len(parts), batches.config.crops)]
    return torch.cat([torch.stack(group, 1) for group in grouped])


def _key(teacher: nn.Module, batches: Batches) -> str:
    """A checksum of everything that the answers depend on."""
    digest = hashlib.sha256(f"{batches.config.augment} {batches.config.crops} {teacher.training}".encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(f"{batches.data.mean} {batches.data.std} {list(batches.x.shape)}".encode())
    digest.update(batches.x.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
