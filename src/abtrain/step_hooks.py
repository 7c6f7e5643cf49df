"""What surrounds the optimizer's steps: a look at the gradients, and factors' steps in coordinates of the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from abtrain.errors import UsageError
from abtrain.lowrank.classify import owner
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.precondition import Preconditioner
from abtrain.modes import in_own_modes
from abtrain.nonfinite import GradientGuard, OnNonFinite
from abtrain.own import own_names
from abtrain.phase import Phase


class Coming(NamedTuple):
    """The step that an optimizer is about to make.

    Attributes:
        step: its index.
        phase: that it belongs to.
        shared: whether all workers have its gradients.
    """

    step: int
    phase: Phase
    shared: bool


class Ownership:
    """Makes sure that an optimizer trains the parameters that workers share, and no others.

    Args:
        model: with all parameters that were there when training began.
        frozen: names of those that were not trained then.
    """

    def __init__(self, model: FactoredModel, frozen: Sequence[str]) -> None:
        self._model = model
        self._names = model.parameters().keys()
        self._frozen = {name: model.model.get_parameter(name) for name in frozen}
        self._own = own_names(model.model)
        self._checked: list[int] = []
        self._dense: list[_Place] = []

    def check(self, optimizer: Optimizer) -> None:
        """Looks at the optimizer's parameters, before it steps.

        Raises:
            UsageError: it holds a parameter that no merge knows, or lacks one that workers share; or one of these was
                frozen, thawed or replaced since training began.
        """
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        thawed = [name for name, p in self._frozen.items() if p.requires_grad and id(p) in held] if self._frozen else []
        if thawed:
            raise UsageError(
                f"{', '.join(thawed)} was frozen when ABTraining was built and is not shared, but is trained now: "
                "build ABTraining with every parameter that is to be trained"
            )
        if held != self._checked:
            self._check_held(optimizer, held)
            self._dense = self._places()
            self._checked = held
        self._check_places()

    def _check_held(self, optimizer: Optimizer, held: Sequence[int]) -> None:
        names = self._names | self._model.factors().keys()
        known = {id(p): name for name, p in self._model.parameters().items() if name in names}
        shapes = [str(tuple(p.shape)) for g in optimizer.param_groups for p in g["params"] if id(p) not in known]
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
        """Where the parameters are that workers train together, as far as they are not factored."""
        factors, places = self._model.factors(), []
        for name, parameter in self._model.parameters().items():
            if name not in factors and name not in self._frozen and name not in self._own:
                module, attribute = owner(self._model.model, name)
                places.append(_Place(name, module._parameters, attribute, parameter))
        return places

    def _check_places(self) -> None:
        moved = [one.name for one in self._dense if one.of_module.get(one.attribute) is not one.parameter]
        if moved:
            raise UsageError(
                f"{', '.join(moved[:4])} is no longer a parameter of the model: pruning, weight norm, parametrizations "
                "and the like replace it. Apply them before the optimizer and ABTraining are built"
            )
        frozen = [one.name for one in self._dense if not one.parameter.requires_grad]
        if frozen:
            raise UsageError(
                f"{', '.join(frozen[:4])} was trained when ABTraining was built, and is frozen now: freeze parameters "
                "before ABTraining is built, or by a learning rate of 0"
            )


class _Place(NamedTuple):
    """A parameter, and where it belongs."""

    name: str
    of_module: Mapping[str, Any]
    attribute: str
    parameter: nn.Parameter


class StepHooks:
    """Hooks on an optimizer, from here until `close`.

    Args:
        optimizer: over the model's parameters.
        model: whose factors are preconditioned.
        frozen: names of the parameters that were not trained when training began.
        on_nonfinite: what becomes of gradients that are not finite.
        speaks: whether this worker logs what happens on all workers.
        coming: tells of the step that is about to be made; None: of none that a recipe knows.
        whose: tells, after shared gradients that are not finite, which worker brought them.

    Attributes:
        count: steps that the optimizer has made since this was last set to 0.
        round_began: whether a round begins with the next step. One that a gradient scaler skips calls no hook, so it
            stays due.
        preconditioner: of the round.
        guard: what looks at the gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: FactoredModel,
        frozen: Sequence[str],
        on_nonfinite: OnNonFinite,
        speaks: bool,
        coming: Callable[[], Coming | None],
        whose: Callable[[], str] = str,
    ) -> None:
        self.count = 0
        self.round_began = True
        self.preconditioner = Preconditioner(optimizer, damping=0)
        own = own_names(model.model)
        self.guard = GradientGuard(optimizer, on_nonfinite, speaks, model.parameters, own, whose)
        self._model = model
        self._ownership = Ownership(model, frozen)
        self._coming = coming
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def close(self) -> None:
        """Takes the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    @in_own_modes
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        coming = self._coming()
        if coming is None:
            return
        if self.count:
            raise UsageError(
                f"optimizer.step() was called again before ab.step(), after step {coming.step}: call ab.step() once "
                "after every optimizer.step(), and accumulate gradients under ab.no_sync()"
            )
        self._ownership.check(optimizer)
        self.guard.look(coming.step, coming.shared)
        if not coming.phase.damping:
            return
        # PyTorch hands over the arguments of optimizer.step, the optimizer itself the first of them.
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise UsageError(
                "optimizer.step(closure) makes gradients after they ought to be preconditioned: "
                "call backward before optimizer.step(), or set damping=0"
            )
        records = self._model.records
        if self.round_began:
            self.preconditioner = Preconditioner(optimizer, coming.phase.damping, coming.phase.factor_lr)
            self.preconditioner.refresh(records.values())
            self.round_began = False
        self.preconditioner.before_step(records.values())

    @in_own_modes
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count += 1
        self.preconditioner.after_step()
