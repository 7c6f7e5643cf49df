"""A model whose weights change between full and factored, with its optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.classify import UNSHARED, Treatment
from abtrain.lowrank.kept import FactoredMark
from abtrain.lowrank.loading import cutting
from abtrain.lowrank.names import factor_letter, factor_names, tensors_of, weight_name, without_compiled
from abtrain.lowrank.optimizer import PROJECTABLE, fresh_state, project_to_factors, project_to_weight
from abtrain.lowrank.optimizers import Optimizers, is_a
from abtrain.lowrank.precondition import seen_through
from abtrain.lowrank.surgery import factorize_, restore_
from abtrain.lowrank.svd import Factors, MatrixShape
from abtrain.lowrank.weight import FactoredWeight
from abtrain.recipes.factoring import OptimizerState

TrainedFactors = Literal["all", "A", "B"]


class FactoredModel:
    """A model in which some weights may be factored, with its optimizers. Changes both in place.

    Args:
        names: names of the weights that may be factored.
        optimizer_state: whether a change of shape resets a weight's state (`reset`) or projects it (`project`);
            `auto`: projects it if the optimizer is known, and resets it otherwise.

    Attributes:
        records: the weights that are currently factored, by name.
        damping: the preconditioner's damping, as last passed to `factorize`.
        compression: parameters of the full model over parameters of the model as last factored; 1 before that.
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
        self._optimizer_state = optimizer_state
        self._full_numel = sum(parameter.numel() for parameter in model.parameters())
        self._trains: TrainedFactors = "all"

    @property
    def projects(self) -> bool:
        """Whether momentum and residuals of a weight are converted into those of its factors, and back."""
        return self._optimizer_state != "reset"

    def _projects_state_of(self, optimizer: Optimizer) -> bool:
        return self._optimizer_state == "project" or (self.projects and is_a(optimizer, PROJECTABLE))

    def resets(self) -> set[str]:
        """Returns the names of the factors whose optimizer state is dropped when they become weights."""
        holders = {name: self.optimizers.steps(factor) for name, factor in self.factors().items()}
        return {name for name, holder in holders.items() if holder is None or not self._projects_state_of(holder)}

    def factors(self) -> dict[str, nn.Parameter]:
        """Returns the current factors: `NAME.A` and `NAME.B` of every factored weight NAME."""
        factors: dict[str, nn.Parameter] = {}
        for name, record in self.records.items():
            factors |= zip(factor_names(name), record.factors, strict=True)
        return factors

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns all parameters in their current form, frozen ones included: factors as `NAME.A` and `NAME.B`."""
        factors = self.factors()
        known = {id(parameter) for parameter in factors.values()}
        named = self.model.named_parameters()
        return factors | {name: p for name, p in named if id(p) not in known and not isinstance(p, FactoredMark)}

    def trained(self, treatments: Sequence[Treatment]) -> dict[str, nn.Parameter]:
        """Returns the parameters that workers train together, in their current form, in the order of `treatments`."""
        factors = self.factors()
        trained: dict[str, nn.Parameter] = {}
        for treatment in treatments:
            name = treatment.name
            if name in self.records:
                trained |= {factor: factors[factor] for factor in factor_names(name)}
            elif treatment.kind not in UNSHARED:
                trained[name] = self.model.get_parameter(name)
        return trained

    def matrices(self) -> dict[str, Tensor]:
        """Returns the weights that may be factored and are currently dense, as (m, n) matrices, without gradients."""
        weights = {n: self.model.get_parameter(n).detach() for n in self.names if n not in self.records}
        return {name: MatrixShape(weight.shape).to_matrix(weight) for name, weight in weights.items()}

    def factorize(self, factors: Mapping[str, Factors], damping: float = 0.0) -> None:
        """Replaces the named weights by factors. `damping` is the preconditioner's in the next steps; 0: none."""
        self.damping = damping
        for name, pair in factors.items():
            record = factorize_(self.model, name, pair)
            for optimizer, (state,) in self.optimizers.replace([record.dense], record.factors):
                if state and self._projects_state_of(optimizer):
                    states = project_to_factors(state, record, *seen_through(record, damping))
                    optimizer.state[record.A], optimizer.state[record.B] = states
            self._begin_state(*record.factors)
            self.records[name] = record
        self.compression = self._full_numel / sum(parameter.numel() for parameter in self.parameters().values())

    def restore(self) -> None:
        """Turns every factored weight back into W = A B."""
        for record in reversed(self.records.values()):
            states = self.optimizers.replace(record.factors, [record.dense])
            restore_(record)
            for optimizer, (state_A, state_B) in states:
                if (state_A or state_B) and self._projects_state_of(optimizer):
                    seen = seen_through(record, self.damping)
                    optimizer.state[record.dense] = project_to_weight(state_A, state_B, record, *seen)
            self._begin_state(record.dense)
        self.records = {}

    def _begin_state(self, *parameters: Tensor) -> None:
        """Gives new parameters the state that their optimizer needs before its first step."""
        for parameter in parameters:
            optimizer = self.optimizers.steps(parameter)
            if optimizer is not None and parameter not in optimizer.state:
                state = fresh_state(optimizer, parameter)
                if state:
                    optimizer.state[parameter] = state

    def drop_state(self, parameter: Tensor) -> None:
        """Drops the optimizers' state of a parameter."""
        for optimizer in self.optimizers.stateful:
            optimizer.state.pop(parameter, None)
        self._begin_state(parameter)

    def reshape(self, factors: Mapping[str, Factors], damping: float, compression: float) -> None:
        """Factors exactly these weights, so that a saved state can be loaded.

        Drops the optimizers' state. Weights that become dense get meaningless values.
        """
        for optimizer in self.optimizers.all:
            optimizer.state.clear()
        self.restore()
        self.factorize(factors, damping)
        self.compression = compression

    def train_only(self, which: TrainedFactors) -> None:
        """Freezes the factors that do not train, and unfreezes the others."""
        self._trains = which
        for name, factor in self.factors().items():
            factor.requires_grad_(self._trains_factor(name))

    def keep_frozen(self) -> None:
        """Freezes the factors that do not train again, in case the loop has unfrozen all parameters of a module."""
        for name, factor in self.factors().items():
            if not self._trains_factor(name):
                factor.requires_grad_(False)

    def frozen_factors(self) -> dict[str, nn.Parameter]:
        """Returns the factors that should train but were frozen by the loop, by the names of their weights."""
        trained = {name: factor for name, factor in self.factors().items() if self._trains_factor(name)}
        return {weight_name(name): factor for name, factor in trained.items() if not factor.requires_grad}

    def _trains_factor(self, name: str) -> bool:
        return self._trains in ("all", factor_letter(name))

    def dense_state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the full-rank model, which can be loaded into the model as the user built it."""
        return {without_compiled(name): tensor for name, tensor in self.model.state_dict().items()}

    def factored_state_dict(self) -> dict[str, Tensor]:
        """Returns the model's tensors in their current form: NAME.A (m, k) and NAME.B (k, n) for a factored weight."""
        records = {without_compiled(name): record for name, record in self.records.items()}
        state: dict[str, Tensor] = {}
        for name, tensor in tensors_of(self.dense_state_dict()).items():
            if name in records:
                state |= zip(factor_names(name), (factor.detach() for factor in records[name].factors), strict=True)
            else:
                state[name] = tensor
        return state

    def load_dense_state_dict(self, state: Mapping[str, Tensor], cut: bool) -> None:
        """Loads a `dense_state_dict`. Factored weights keep their ranks; with `cut`, the rest of a value may be lost.

        Raises:
            RuntimeError: names or shapes differ, or a weight would lose more than rounding without `cut`.
        """
        live = {without_compiled(name): name for name in self.model.state_dict()}
        with cutting(cut):
            self.model.load_state_dict({live.get(name, name): tensor for name, tensor in state.items()})
