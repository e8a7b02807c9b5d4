"""The optimizer's moments, carried from one training over to others that go on from its end."""

import copy
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.training.loop import State


class Moments:
    """Keeps the optimizer's moments at the end of a training: a callback of `lowbit.train`.

    Several trainings can go on from there, each with a copy of the model and with `handed_on` as a callback:

        moments = Moments()
        lowbit.train(model, data, config, callbacks=[moments])
        lowbit.train(copy.deepcopy(model), data, other, callbacks=[moments.handed_on()])

    All of them need the same kind of optimizer and the same ``decay``: moments belong to parameters by their order.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] | None = None

    def on_epoch(self, state: "State") -> None:
        """Callback of `lowbit.train`."""
        self.held = copy.deepcopy(state.optimizer.state_dict()["state"])

    def handed_on(self) -> "HandedOn":
        """A callback that gives these moments to a training's optimizer before its first step."""
        if self.held is None:
            raise LowbitError("there are no moments yet: give this callback to a training first")
        return HandedOn(self.held)


class HandedOn:
    """See `Moments.handed_on`."""

    def __init__(self, held: dict[int, Any]):
        self.held = held

    def before_forward(self, state: "State") -> None:
        """Callback of `lowbit.train`."""
        if state.step == 0:
            groups = state.optimizer.state_dict()["param_groups"]
            if sum(len(group["params"]) for group in groups) != len(self.held):
                raise LowbitError(
                    f"moments of {len(self.held)} parameters do not fit an optimizer of "
                    f"{sum(len(group['params']) for group in groups)}; go on with a copy of the model they come from"
                )
            state.optimizer.load_state_dict({"state": copy.deepcopy(self.held), "param_groups": groups})
