"""A callback that hands the numbers of a run to a logger: TensorBoard, Weights & Biases, or a function of your own."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError
from lowbit.training.hooks import State

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """Callback of `lowbit.train` that logs the loss and the learning rate of steps, and all metrics of epochs.

    It belongs behind other callbacks, whose metrics it logs too. With Weights & Biases::

        lowbit.train(model, data, config, callbacks=[tracker, Log(wandb.init(...).log)])

    Args:
        write: takes a dict of numbers and the number of finished steps, as ``log`` of a Weights & Biases run does;
            `tensorboard` makes one of a SummaryWriter.
        every: how many steps lie between two logged ones; 0 logs epochs alone.

    Raises:
        LowbitError: ``every`` is negative.
    """

    def __init__(self, write: Callable[[dict[str, float], int], Any], every: int = 0):
        if every < 0:
            raise LowbitError(f"every={every!r} is not allowed; use a number of steps, or 0 to log epochs alone")
        self.write, self.every = write, every

    def on_step(self, state: State) -> None:
        """Callback of `lowbit.train`: log a step."""
        if self.every and (state.step + 1) % self.every == 0:
            numbers = {"lr": state.lr}
            if state.loss is not None:
                numbers["loss"] = float(state.loss)
            self.write(numbers, state.step + 1)

    def on_epoch(self, state: State) -> None:
        """Callback of `lowbit.train`: log an epoch."""
        numbers = {name: value for name, value in state.row.items() if isinstance(value, int | float)}
        self.write(numbers, state.step + 1)


def tensorboard(writer: "SummaryWriter") -> Callable[[dict[str, float], int], None]:
    """A function for `Log` that writes each number as a scalar of TensorBoard."""

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write
