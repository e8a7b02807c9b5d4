import math

import pytest
import torch

from lowbit.training import distillation

STUDENT = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4, 1/4
TEACHER = torch.tensor([[0.0, math.log(4.0)]])  # 1/5, 4/5
LABEL = torch.tensor([0])


def test_cross_entropy_and_label_smoothing_by_hand():
    assert distillation.loss(STUDENT, LABEL).item() == pytest.approx(math.log(4 / 3))
    # a smoothing of 0.2 over two classes makes the target 0.9, 0.1
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert distillation.loss(STUDENT, LABEL, label_smoothing=0.2).item() == pytest.approx(expected)


def test_soft_cross_entropy_by_hand():
    expected = 0.2 * math.log(4 / 3) + 0.8 * math.log(4)
    assert distillation.soft_cross_entropy(STUDENT, TEACHER).item() == pytest.approx(expected)
    mixed = distillation.loss(STUDENT, LABEL, teacher=TEACHER, weight=0.25)
    assert mixed.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * expected)


def test_temperature_by_hand():
    # T=2 takes square roots of the odds: student √3:1, teacher 1:2
    student = [math.sqrt(3) / (math.sqrt(3) + 1), 1 / (math.sqrt(3) + 1)]
    soft = -(1 / 3) * math.log(student[0]) - (2 / 3) * math.log(student[1])
    mixed = distillation.loss(STUDENT, LABEL, teacher=TEACHER, weight=1.0, temperature=2.0)
    assert mixed.item() == pytest.approx(4 * soft)


def test_two_heads_learn_from_label_and_teacher_apart():
    heads = (STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_())
    mixed = distillation.loss(heads, LABEL, teacher=TEACHER, weight=0.5)
    mixed.backward()
    assert torch.allclose(heads[0].grad, 0.5 * torch.tensor([[-0.25, 0.25]]))  # p - onehot
    assert torch.allclose(heads[1].grad, 0.5 * torch.tensor([[0.55, -0.55]]))  # p - teacher's
    assert torch.equal(distillation.merge((STUDENT, TEACHER)), (STUDENT + TEACHER) / 2)


def test_half_precision_logits_give_a_float_loss():
    assert distillation.loss(STUDENT.bfloat16(), LABEL).dtype == torch.float32


class TwoHeads(torch.nn.Module):
    """What timm's distilled DeiT does: two logits in training, if asked for, else their mean."""

    def __init__(self):
        super().__init__()
        self.distilled_training = False

    def set_distilled_training(self, enable=True):
        self.distilled_training = enable

    def forward(self, x):
        return (STUDENT, TEACHER) if self.distilled_training and self.training else (STUDENT + TEACHER) / 2


@pytest.mark.parametrize("mode, expected", [("eval", (STUDENT + TEACHER) / 2), ("as_published", STUDENT)])
def test_who_teaches(mode, expected):
    teacher = TwoHeads()
    distillation.prepare_teacher(teacher, mode)
    assert torch.equal(distillation.target(teacher, torch.ones(1)), expected)


def test_a_distilled_student_shows_both_heads_for_as_long_as_it_is_taught():
    student = TwoHeads()
    with distillation.separate_heads(student):
        assert isinstance(student(None), tuple)
    assert not isinstance(student(None), tuple)
    with distillation.separate_heads(torch.nn.Linear(1, 1)):
        pass
