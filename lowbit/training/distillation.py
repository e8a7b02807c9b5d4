"""The training loss: cross-entropy, and the distillation from a teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
import torch.nn.functional as F

from lowbit.errors import LowbitError

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Taught(NamedTuple):
    """The labels of a batch, with the stored answers of a teacher.

    Attributes:
        labels: int64 [N].
        answers: the teacher's logits, float32 [N,K].
    """

    labels: torch.Tensor
    answers: torch.Tensor


class TwoHeaded(Protocol):
    """A distilled DeiT of timm: ``distilled_training`` says whether both heads' logits are returned in training."""

    distilled_training: bool

    def set_distilled_training(self, enable: bool) -> None:
        """Set ``distilled_training``."""


def _two_headed(model: torch.nn.Module) -> TypeGuard[TwoHeaded]:
    return hasattr(model, "set_distilled_training")


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """-Σ softmax(teacher/T)·log softmax(student/T), mean over the batch; logits [N,K] in, scalar out."""
    target = F.softmax(teacher.float() / temperature, dim=-1)
    return -(target * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1).mean()


def loss(
    output: Logits,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    teacher: torch.Tensor | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """(1-w)·CE(labels) + w·T²·soft-CE(teacher), a float32 scalar; ``labels`` int64 [N], or probabilities [N,K].

    T² keeps the soft term's gradient at the size it has for T = 1 (Hinton et al., 2015). A model with a
    distillation head returns two logits in training (class head, distillation head): the first learns from the
    labels, the second from the teacher (DeiT, eq. 3).
    """
    by_label, by_teacher = output if isinstance(output, tuple) else (output, output)
    hard = F.cross_entropy(by_label.float(), labels, label_smoothing=label_smoothing)
    if teacher is None or weight == 0:
        return hard
    soft = soft_cross_entropy(by_teacher, teacher, temperature)
    return (1 - weight) * hard + weight * temperature**2 * soft


def prepare_teacher(teacher: torch.nn.Module, mode: str = "eval") -> None:
    """Put ``teacher`` into evaluation mode, or with "as_published" into training mode with separate heads."""
    teacher.train(mode == "as_published")
    if mode == "as_published" and _two_headed(teacher):
        teacher.set_distilled_training(True)


@contextmanager
def separate_heads(model: torch.nn.Module) -> Iterator[None]:
    """Make a distilled DeiT of timm return both heads' logits in training mode, within the ``with`` block."""
    if not _two_headed(model):
        yield
        return
    before = model.distilled_training
    model.set_distilled_training(True)
    try:
        yield
    finally:
        model.set_distilled_training(before)


def target(teacher: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The teacher's logits [N,K] for the batch ``x``; of two heads (training mode only), those of the class head."""
    output = teacher(x)
    return output[0] if isinstance(output, tuple) else output


def check_outputs(output: Any, items: int, classes: int, name: str, who: str) -> None:
    """Refuse an output that is neither logits ``[items, classes]`` nor two of them.

    Args:
        output: the value that a model returned for a batch.
        items: number of items in the batch.
        classes: number of classes of the data set.
        name: name of the data set.
        who: "the model" or "the teacher", for the message.

    Raises:
        LowbitError: the output has another type or shape; the message says what to do.
    """
    heads = output if isinstance(output, tuple) else (output,)
    shapes = [list(head.shape) if isinstance(head, torch.Tensor) else type(head).__name__ for head in heads]
    if len(heads) > 2 or any(shape != [items, classes] for shape in shapes):
        raise LowbitError(
            f"{who} returned {' and '.join(map(str, shapes)) or 'nothing'} for a batch of {items}, but {name} has "
            f"{classes} classes: create it with num_classes={classes}"
        )


def merge(output: Logits) -> torch.Tensor:
    """The prediction [N,K] in a model's output: the mean of two heads, or the output itself."""
    return (output[0] + output[1]) / 2 if isinstance(output, tuple) else output
