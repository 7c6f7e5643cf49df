"""Checks before each optimizer step that the optimizers have exactly the parameters that workers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from abtrain.checks import told_names
from abtrain.errors import UsageError
from abtrain.lowrank.classify import owner
from abtrain.lowrank.model import FactoredModel
from abtrain.own import own_names


class Ownership:
    """Checks that the optimizers train all parameters that workers share, and none of the `frozen` ones."""

    def __init__(self, model: FactoredModel, frozen: Sequence[str]) -> None:
        self._model = model
        self._names = model.parameters().keys()
        self._frozen = {name: model.model.get_parameter(name) for name in frozen}
        self._own = own_names(model.model)
        self._checked: list[int] = []
        self._modules = self._look()
        self._known = {id(parameter) for parameter in model.model.parameters()}
        self._dense = self._places()

    def check(self, optimizer: Optimizer) -> None:
        """Checks the parameters of all optimizers before an optimizer steps.

        Raises:
            UsageError: the optimizers have a parameter that is never merged, or lack a shared one. The error is also
                raised if a parameter was frozen, unfrozen or replaced after ABTraining was built.
        """
        held = [id(p) for one in self._model.optimizers.acting for group in one.param_groups for p in group["params"]]
        thawed = [name for name, p in self._frozen.items() if p.requires_grad and id(p) in held]
        if thawed:
            raise UsageError(
                "these parameters were unfrozen after ABTraining was built, so workers do not share them: "
                f"{told_names(thawed)}. Before building ABTraining, unfreeze all parameters that are to be trained"
            )
        modules = self._look()
        if modules != self._modules:
            self._check_modules()
            self._model.renew()
            self._modules = modules
        if held != self._checked:
            self._model.renew()
            self._check_held(held)
            self._dense = self._places()
            self._checked = held
        self._check_places(optimizer)

    def _look(self) -> list[tuple[int, int]]:
        """Returns the identifier of each module in the model, and how many buffers it has."""
        return [(id(module), len(module._buffers)) for module in self._model.model.modules()]

    def _check_modules(self) -> None:
        """Checks that every shared parameter is still in the model, after modules were added or removed."""
        now = dict(self._model.model.named_parameters())
        present = set(map(id, now.values()))
        expected = {place.name: place.parameter for place in self._dense if place.name not in self._model.records}
        expected |= self._model.factors()
        _refuse_moved([name for name, parameter in expected.items() if id(parameter) not in present])
        known = self._known | {id(parameter) for parameter in self._model.optimizers.parameters()}
        added = [name for name, p in now.items() if p.requires_grad and id(p) not in known]
        if added:
            raise UsageError(
                "these parameters were added to the model after ABTraining was built, and are in no optimizer: "
                f"{told_names(added)}. Add all parameters to the model and its optimizer first, then build ABTraining"
            )

    def _check_held(self, held: Sequence[int]) -> None:
        names = self._names | self._model.factors().keys()
        known = {id(p): name for name, p in self._model.parameters().items() if name in names}
        shapes = [str(tuple(p.shape)) for p in self._model.optimizers.parameters() if id(p) not in known]
        if shapes:
            raise UsageError(
                f"the optimizer has {len(shapes)} parameters that the model did not have when ABTraining was built "
                f"(shapes {told_names(shapes)}), so workers would not share them. Add all parameters to the model and "
                "its optimizer first, then build ABTraining"
            )
        unshared = self._own | self._frozen.keys()
        lost = [name for key, name in known.items() if name not in unshared and key not in held]
        if lost:
            raise UsageError(
                f"parameters that workers share are no longer in the optimizer: {told_names(lost)}. Leave the param "
                "groups as they were when ABTraining was built. To freeze a parameter, set its learning rate to 0"
            )

    def _places(self) -> list[_Place]:
        """Returns the shared parameters, except factors, with the modules that contain them."""
        places, excluded = [], self._model.factors().keys() | self._frozen.keys() | self._own
        for name, parameter in self._model.parameters().items():
            if name not in excluded:
                module, attribute = owner(self._model.model, name)
                # A scripted module returns new objects for its parameters at each access.
                if not isinstance(module, torch.jit.ScriptModule):
                    places.append(_Place(name, module._parameters, attribute, parameter))
        return places

    def _check_places(self, optimizer: Optimizer) -> None:
        _refuse_moved([one.name for one in self._dense if one.of_module.get(one.attribute) is not one.parameter])
        frozen = {one.name: one.parameter for one in self._dense if not one.parameter.requires_grad}
        frozen |= self._model.frozen_factors()
        stepped = [name for name, p in frozen.items() if self._model.optimizers.steps(p) is optimizer]
        if stepped:
            raise UsageError(
                f"these parameters were frozen after ABTraining was built: {told_names(stepped)}. Freeze parameters "
                "before building ABTraining, or set their learning rate to 0 instead"
            )


def _refuse_moved(names: Sequence[str]) -> None:
    if names:
        raise UsageError(
            f"the model no longer has these parameters: {told_names(names)}. Pruning, weight norm, parametrizations or "
            "new modules have replaced them: make such changes before building the optimizer and ABTraining"
        )


class _Place(NamedTuple):
    """A parameter, and the module attribute that refers to it."""

    name: str
    of_module: Mapping[str, Any]
    attribute: str
    parameter: nn.Parameter
