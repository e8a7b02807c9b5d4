"""Carry the optimizer's moments from one training over to others that continue from its end."""

import copy
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.training.hooks import State


class Moments:
    """Callback of `lowbit.train` that keeps the optimizer's moments at the end of a training.

    Several trainings can continue from there, each with a copy of the model and with `handed_on` as a callback:

        moments = Moments()
        lowbit.train(model, data, config, callbacks=[moments])
        lowbit.train(copy.deepcopy(model), data, other, callbacks=[moments.handed_on()])

    All of them need the same kind of optimizer and the same ``decay``, since the order of the parameters assigns the
    moments to them.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] | None = None

    def on_epoch(self, state: "State") -> None:
        """Callback of `lowbit.train`: copy the moments."""
        self.held = copy.deepcopy(state.optimizer.state_dict()["state"])

    def handed_on(self) -> "HandedOn":
        """A callback that loads these moments into a training's optimizer before its first step."""
        if self.held is None:
            raise LowbitError("there are no moments yet: pass this callback to lowbit.train first")
        return HandedOn(self.held)


class HandedOn:
    """Callback of `lowbit.train` that loads kept moments into the optimizer; see `Moments.handed_on`."""

    def __init__(self, held: dict[int, Any]):
        self.held = held

    def before_forward(self, state: "State") -> None:
        """Callback of `lowbit.train`: load the moments before the first step.

        Raises:
            LowbitError: the optimizer has another number of parameters.
        """
        if state.step == 0:
            groups = state.optimizer.state_dict()["param_groups"]
            if sum(len(group["params"]) for group in groups) != len(self.held):
                raise LowbitError(
                    f"moments of {len(self.held)} parameters do not fit an optimizer of "
                    f"{sum(len(group['params']) for group in groups)}; train a copy of the model they come from"
                )
            state.optimizer.load_state_dict({"state": copy.deepcopy(self.held), "param_groups": groups})
