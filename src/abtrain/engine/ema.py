"""An exponential moving average of the weights, which is dense even while the model is factored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.errors import CheckpointError, ConfigurationError
from abtrain.lowrank.names import tensors_of
from abtrain.modes import in_own_modes


class EMA:
    """The exponential moving average of a model's dense state. Each worker has an average of its own model.

    The average starts as the model's current state. Floating-point and complex tensors are averaged, 16-bit ones in
    float32. Other entries, such as counters and the extra state of modules, are copied from the model.

    Args:
        source: a function that returns the dense state of the model.
        decay: the weight of the old average in each update, at least 0 and below 1.

    Raises:
        ConfigurationError: `decay` is below 0, or not below 1.
    """

    @in_own_modes
    def __init__(self, source: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"decay={decay} is out of range: use 0 <= decay < 1, such as 0.999")
        self.decay = decay
        self._source = source
        state = source()
        # In 16 bits, the change of one update would be rounded away.
        self._average = {
            name: (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).detach().clone()
            for name, tensor in tensors_of(state).items()
        }
        self._more = _other_entries(state)

    @in_own_modes
    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current weights. The loop calls it after each `ab.step()`."""
        state = self._source()
        self._more = _other_entries(state)
        for name, tensor in tensors_of(state).items():
            average = self._average[name]
            if tensor.is_floating_point() or tensor.is_complex():
                average.lerp_(tensor.to(average), 1 - self.decay)
            else:
                average.copy_(tensor)

    @in_own_modes
    def state_dict(self) -> dict[str, Tensor]:
        """Returns a copy of the average. Both `load_state_dict` and the model in its original form can load it."""
        state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self._average.items()}
        return state | copy.deepcopy(self._more)

    @in_own_modes
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the average by a saved `state_dict`.

        Raises:
            CheckpointError: the state has other names or shapes than this model. The average has not changed.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(state).items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self._average.items()}
        different = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
        if different:
            raise CheckpointError(
                f"the saved average belongs to another model. Tensors have other shapes, or only one model has them: "
                f"{told_names(different)}. Load what EMA.state_dict() returned for the same model"
            )
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
        self._more = _other_entries(state)


def _other_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in state.items() if not isinstance(value, Tensor)}
