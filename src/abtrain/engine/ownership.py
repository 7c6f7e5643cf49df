"""Which parameters the optimizers hold, checked before each step: those that workers share, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from abtrain.errors import UsageError
from abtrain.lowrank.classify import owner
from abtrain.lowrank.model import FactoredModel
from abtrain.own import own_names


class Ownership:
    """Makes sure that optimizers train the parameters that workers share, and no others.

    Args:
        model: with its optimizers, and all parameters that were there when training began.
        frozen: names of those that were not trained then.
    """

    def __init__(self, model: FactoredModel, frozen: Sequence[str]) -> None:
        self._model = model
        self._names = model.parameters().keys()
        self._frozen = {name: model.model.get_parameter(name) for name in frozen}
        self._own = own_names(model.model)
        self._checked: list[int] = []
        self._modules = [id(module) for module in model.model.modules()]
        self._known = {id(parameter) for parameter in model.model.parameters()}
        self._dense = self._places()

    def check(self, optimizer: Optimizer) -> None:
        """Checks the parameters of all optimizers before one of them steps.

        Raises:
            UsageError: they hold a parameter that no merge knows, or lack one that workers share; or one of these was
                frozen, thawed or replaced since training began.
        """
        held = [id(p) for one in self._model.optimizers.acting for group in one.param_groups for p in group["params"]]
        thawed = [name for name, p in self._frozen.items() if p.requires_grad and id(p) in held] if self._frozen else []
        if thawed:
            raise UsageError(
                f"{', '.join(thawed)} was frozen when ABTraining was built and is not shared, but is trained now: "
                "build ABTraining with every parameter that is to be trained"
            )
        modules = [id(module) for module in self._model.model.modules()]
        if modules != self._modules:
            self._check_modules()
            self._modules = modules
        if held != self._checked:
            self._check_held(held)
            self._dense = self._places()
            self._checked = held
        self._check_places(optimizer)

    def _check_modules(self) -> None:
        """Checks that every parameter is still in the model, once modules have come or gone."""
        now = {id(parameter) for parameter in self._model.model.parameters()}
        held = {id(parameter) for parameter in self._model.optimizers.parameters()}
        factored = self._model.records
        lost = [one.name for one in self._dense if id(one.parameter) not in now and one.name not in factored]
        lost += [name for name, factor in self._model.factors().items() if id(factor) not in now]
        if lost:
            raise UsageError(_moved(lost))
        added = [
            n for n, p in self._model.model.named_parameters() if p.requires_grad and id(p) not in held | self._known
        ]
        if added:
            raise UsageError(
                f"{', '.join(added[:4])} came to the model after ABTraining was built, and no optimizer holds it: "
                "build the model, the optimizer and then ABTraining with every parameter that is to be trained"
            )

    def _check_held(self, held: Sequence[int]) -> None:
        names = self._names | self._model.factors().keys()
        known = {id(p): name for name, p in self._model.parameters().items() if name in names}
        shapes = [str(tuple(p.shape)) for p in self._model.optimizers.parameters() if id(p) not in known]
        if shapes:
            raise UsageError(
                f"the optimizer holds {len(shapes)} parameters that the model did not have when ABTraining was built "
                f"(shapes {', '.join(shapes[:4])}): no worker would share them. Build the model and the optimizer with "
                "every parameter that is to be trained, and ABTraining after them"
            )
        unshared = self._own | self._frozen.keys()
        lost = [name for key, name in known.items() if name not in unshared and key not in held]
        if lost:
            raise UsageError(
                f"the optimizer no longer holds {', '.join(lost[:4])}, which workers share: leave the param groups as "
                "they were when ABTraining was built, and freeze parameters by a learning rate of 0"
            )

    def _places(self) -> list[_Place]:
        """Returns the places of the parameters that workers train together, factors aside."""
        factors, places = self._model.factors(), []
        for name, parameter in self._model.parameters().items():
            if name not in factors and name not in self._frozen and name not in self._own:
                module, attribute = owner(self._model.model, name)
                # A scripted module hands out its parameters anew at each call.
                if not isinstance(module, torch.jit.ScriptModule):
                    places.append(_Place(name, module._parameters, attribute, parameter))
        return places

    def _check_places(self, optimizer: Optimizer) -> None:
        moved = [one.name for one in self._dense if one.of_module.get(one.attribute) is not one.parameter]
        if moved:
            raise UsageError(_moved(moved))
        steps = self._model.optimizers.steps
        frozen = [
            one.name for one in self._dense if not one.parameter.requires_grad and steps(one.parameter) is optimizer
        ]
        frozen += [name for name, factor in self._model.frozen_factors().items() if steps(factor) is optimizer]
        if frozen:
            raise UsageError(
                f"{', '.join(frozen[:4])} was trained when ABTraining was built, and is frozen now: freeze parameters "
                "before ABTraining is built, or by a learning rate of 0"
            )


def _moved(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names[:4])} is no longer a parameter of the model: pruning, weight norm, parametrizations, new "
        "modules and the like replace it. Apply them before the optimizer and ABTraining are built"
    )


class _Place(NamedTuple):
    """A parameter, and where it belongs."""

    name: str
    of_module: Mapping[str, Any]
    attribute: str
    parameter: nn.Parameter
