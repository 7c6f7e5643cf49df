"""Switches the weights of a model between full and factored, and converts the state of its optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.classify import UNSHARED, Treatment
from abtrain.lowrank.kept import FactoredMark
from abtrain.lowrank.loading import cutting
from abtrain.lowrank.names import factor_letter, factor_names, tensors_of, weight_name, without_compiled
from abtrain.lowrank.optimizer import PROJECTABLE, fresh_state, project_to_factors, project_to_weight
from abtrain.lowrank.optimizers import Optimizers, is_a
from abtrain.lowrank.precondition import preconditions, seen_through
from abtrain.lowrank.surgery import factorize_, restore_
from abtrain.lowrank.svd import Factors, MatrixShape
from abtrain.lowrank.weight import FactoredWeight
from abtrain.own import shared_buffers
from abtrain.recipes.factoring import OptimizerState
from abtrain.shards import fit_to, gathered, is_sharded, reshard

TrainedFactors = Literal["all", "A", "B"]


def used_by_restore(m: int, n: int, projects: bool) -> int:
    """Returns the bytes of temporary tensors while `FactoredModel.restore` multiplies out the factors of (m, n).

    `projects` is True if optimizer state is converted, which takes about four such matrices in float64.
    """
    return m * n * (4 * torch.float64.itemsize if projects else torch.float32.itemsize)


class FactoredModel:
    """Factors and restores weights of a model, and converts the state of its optimizers. Changes them in place.

    Args:
        names: the names of the weights that may be factored.
        optimizer_state: the treatment of optimizer state for a weight that is factored or restored: `reset` (drop),
            `project` (convert), or `auto`, which projects the state of known optimizers and resets that of others.

    Attributes:
        records: the records of the weights that are currently factored, by name.
        damping: the preconditioner's damping that was last passed to `factorize`.
        compression: the parameter count of the full model divided by that after weights were last factored; 1 before.
        sharded: the names of the parameters that FSDP2 has sharded over the workers of a group.
        version: a number that changes whenever the model may have other parameters or modules.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        names: Sequence[str],
        optimizer_state: OptimizerState = "reset",
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.names = tuple(names)
        self.records: dict[str, FactoredWeight] = {}
        self.damping, self.compression = 0.0, 1.0
        self.sharded = tuple(name for name, parameter in model.named_parameters() if is_sharded(parameter))
        self._optimizer_state = optimizer_state
        self._full_numel = sum(parameter.numel() for parameter in model.parameters())
        self._trains: TrainedFactors = "all"
        self.version = 0
        self.renew()

    def renew(self) -> None:
        """Looks for parameters, and for modules with buffers, anew, since the model may have others."""
        self.version += 1
        self._with_buffers: list[tuple[str, nn.Module]] | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._trained: dict[str, nn.Parameter] = {}

    @property
    def projects(self) -> bool:
        """Whether a weight's momentum is converted when the weight is factored or restored; otherwise it is dropped."""
        return self._optimizer_state != "reset"

    def _projects_state_of(self, optimizer: Optimizer) -> bool:
        return self._optimizer_state == "project" or (self.projects and is_a(optimizer, PROJECTABLE))

    def resets(self) -> set[str]:
        """Returns the names of the factors whose optimizer state is dropped when their weight becomes dense."""
        holders = {name: self.optimizers.steps(factor) for name, factor in self.factors().items()}
        return {name for name, holder in holders.items() if holder is None or not self._projects_state_of(holder)}

    def factors(self) -> dict[str, nn.Parameter]:
        """Returns the factors of all factored weights. Those of weight NAME are named `NAME.A` and `NAME.B`."""
        factors: dict[str, nn.Parameter] = {}
        for name, record in self.records.items():
            factors |= zip(factor_names(name), record.factors, strict=True)
        return factors

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns all parameters by name, frozen ones included, with `NAME.A` and `NAME.B` for a factored weight."""
        if not self._parameters:
            factors = self.factors()
            known = {id(parameter) for parameter in factors.values()}
            named = self.model.named_parameters()
            dense = {name: p for name, p in named if id(p) not in known and not isinstance(p, FactoredMark)}
            self._parameters = factors | dense
        return self._parameters

    def buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that workers share, by name. Tied buffers appear once."""
        if self._with_buffers is None:
            self._with_buffers = [(name, module) for name, module in self.model.named_modules() if module._buffers]
        return shared_buffers(self.model, self._with_buffers)

    def trained(self, treatments: Sequence[Treatment]) -> dict[str, nn.Parameter]:
        """Returns the parameters or factors that workers train together, by name, in the order of `treatments`."""
        if self._trained:
            return self._trained
        factors = self.factors()
        trained: dict[str, nn.Parameter] = {}
        for treatment in treatments:
            name = treatment.name
            if name in self.records:
                trained |= {factor: factors[factor] for factor in factor_names(name)}
            elif treatment.kind not in UNSHARED:
                trained[name] = self.model.get_parameter(name)
        self._trained = trained
        return trained

    def matrices(self) -> dict[str, Tensor]:
        """Returns the weights that may be factored but are dense, as detached (m, n) matrices by name."""
        weights = {n: self.model.get_parameter(n).detach() for n in self.names if n not in self.records}
        return {name: MatrixShape(weight.shape).to_matrix(weight) for name, weight in weights.items()}

    def factorize(self, factors: Mapping[str, Factors], damping: float = 0.0) -> None:
        """Replaces weights by `factors`, by name. `damping` is that of the preconditioner; 0 if there is none."""
        self.damping = damping
        self.renew()  # first, so that weights are freed one by one
        for name, pair in factors.items():
            record = factorize_(self.model, name, pair)
            for optimizer, (state,) in self.optimizers.replace([record.dense], record.factors):
                if state and self._projects_state_of(optimizer):
                    states = project_to_factors(state, record, *self._seen_through(record, optimizer))
                    optimizer.state[record.A], optimizer.state[record.B] = states
            self._begin_state(*record.factors)
            self.records[name] = record
        self.renew()
        self.compression = self._full_numel / sum(parameter.numel() for parameter in self.parameters().values())

    def restore(self) -> None:
        """Replaces the factors of every factored weight by the dense weight W = A B."""
        self.renew()  # first, so that factors are freed one by one
        for record in reversed(self.records.values()):
            states = self.optimizers.replace(record.factors, [record.dense])
            restore_(record)
            for optimizer, (state_A, state_B) in states:
                if (state_A or state_B) and self._projects_state_of(optimizer):
                    seen = self._seen_through(record, optimizer)
                    optimizer.state[record.dense] = project_to_weight(state_A, state_B, record, *seen)
            self._begin_state(record.dense)
        self.records = {}
        self.renew()

    def _seen_through(self, record: FactoredWeight, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        return seen_through(record, self.damping if preconditions(optimizer) else 0.0)

    def _begin_state(self, *parameters: Tensor) -> None:
        """Creates the state that an optimizer needs before its first step with a new parameter."""
        for parameter in parameters:
            optimizer = self.optimizers.steps(parameter)
            if optimizer is not None and parameter not in optimizer.state:
                state = fresh_state(optimizer, parameter)
                if state:
                    optimizer.state[parameter] = state

    def drop_state(self, parameter: Tensor) -> None:
        """Drops all optimizers' state for a parameter, and creates the state that they need before the first step."""
        for optimizer in self.optimizers.stateful:
            optimizer.state.pop(parameter, None)
        self._begin_state(parameter)

    def reshape(self, factors: Mapping[str, Factors], damping: float, compression: float) -> None:
        """Prepares for loading a saved state: factors exactly the weights in `factors`, and restores all others.

        Drops the optimizers' state. The other weights have their old values until the state is loaded.
        """
        for optimizer in self.optimizers.all:
            optimizer.state.clear()
        self.restore()
        self.factorize(factors, damping)
        self.compression = compression

    def preconditions(self, name: str) -> bool:
        """Returns whether the factors of a weight, which may be dense now, are preconditioned if there is damping."""
        held = self.records[name].A if name in self.records else self.model.get_parameter(name)
        return preconditions(self.optimizers.steps(held))

    def train_only(self, which: TrainedFactors) -> None:
        """Unfreezes the factors A, the factors B or all factors, and freezes the other factors."""
        self._trains = which
        for name, factor in self.factors().items():
            factor.requires_grad_(self._trains_factor(name))

    def keep_frozen(self) -> None:
        """Freezes the factors that must not be trained, in case the training loop has unfrozen all parameters."""
        for name, factor in self.factors().items():
            if not self._trains_factor(name):
                factor.requires_grad_(False)

    def frozen_factors(self) -> dict[str, nn.Parameter]:
        """Returns factors that the training loop has frozen although they must be trained, by their weights' names."""
        trained = {name: factor for name, factor in self.factors().items() if self._trains_factor(name)}
        return {weight_name(name): factor for name, factor in trained.items() if not factor.requires_grad}

    def _trains_factor(self, name: str) -> bool:
        return self._trains in ("all", factor_letter(name))

    def reshard(self) -> None:
        """Makes the parameters of a sharded model its shards again; see `abtrain.shards.reshard`."""
        if self.sharded:
            reshard(self.model)

    def dense_state_dict(self) -> dict[str, Tensor]:
        """Returns a state dict with dense weights. A model as the user built it can load this dict.

        Collective in the group if the model is sharded. Its weights are then whole, on the CPU.
        """
        self.reshard()
        state = {without_compiled(name): tensor for name, tensor in self.model.state_dict().items()}
        return {name: gathered(tensor) if is_sharded(tensor) else tensor for name, tensor in state.items()}

    def factored_state_dict(self) -> dict[str, Tensor]:
        """Returns the model's tensors by name, with NAME.A (m, k) and NAME.B (k, n) for a factored weight NAME."""
        records = {without_compiled(name): record for name, record in self.records.items()}
        state: dict[str, Tensor] = {}
        for name, tensor in tensors_of(self.dense_state_dict()).items():
            if name in records:
                state |= zip(factor_names(name), (factor.detach() for factor in records[name].factors), strict=True)
            else:
                state[name] = tensor
        return state

    def load_dense_state_dict(self, state: Mapping[str, Tensor], cut: bool) -> None:
        """Loads a `dense_state_dict`. Factored weights keep their ranks. `cut` permits truncation to these ranks.

        Raises:
            RuntimeError: names or shapes differ, or a weight would lose more than rounding errors and `cut` is false.
        """
        live = {without_compiled(name): name for name in self.model.state_dict()}
        named = {live.get(name, name): tensor for name, tensor in state.items()}
        self.reshard()
        with cutting(cut):
            self.model.load_state_dict(fit_to(named, self.model) if self.sharded else named)
