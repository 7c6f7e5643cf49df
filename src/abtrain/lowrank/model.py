"""A model whose weights change between full and factored, its optimizer with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.classify import UNSHARED, Treatment
from abtrain.lowrank.loading import cutting
from abtrain.lowrank.mark import FactoredMark
from abtrain.lowrank.matrix import MatrixShape
from abtrain.lowrank.names import factor_names, tensors_of, without_compiled
from abtrain.lowrank.optimizer import (
    fresh_state,
    is_projectable,
    project_to_factors,
    project_to_weight,
    replace_,
)
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.precondition import seen_through
from abtrain.lowrank.surgery import factorize_, restore_
from abtrain.lowrank.svd import Factors
from abtrain.lowrank.weight import FactoredWeight
from abtrain.recipes.factoring import OptimizerState

TrainedFactors = Literal["all", "A", "B"]


class FactoredModel:
    """The weights of `model` that may be factored, and the factors while they are.

    Args:
        model: changed in place.
        optimizers: changed in place; factors take the place of their weight in its param group.
        names: of the weights that may be factored.
        optimizer_state: at a change of shape, `reset` a weight's state or `project` it; `auto`: project it where the
            optimizer is known, and reset it elsewhere.
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
        self.records: dict[str, FactoredWeight] = {}
        self.names = tuple(names)
        self._optimizer_state = optimizer_state
        self._full_numel = sum(parameter.numel() for parameter in model.parameters())
        self._compression = 1.0
        self._damping = 0.0
        self._trains: TrainedFactors = "all"

    @property
    def projects(self) -> bool:
        """Whether what is known of a weight's changes follows it into its factors, as far as it can."""
        return self._optimizer_state != "reset"

    def projects_state_of(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's state of a weight follows it."""
        return self._optimizer_state == "project" or (self.projects and is_projectable(optimizer))

    def resets(self) -> set[str]:
        """Names of the factors whose optimizer state is dropped when they become weights."""
        dropped = set()
        for name, factor in self.factors().items():
            optimizer = self.optimizers.steps(factor)
            if optimizer is None or not self.projects_state_of(optimizer):
                dropped.add(name)
        return dropped

    @property
    def damping(self) -> float:
        """The preconditioner's damping, as last passed to `factorize`."""
        return self._damping

    @property
    def compression(self) -> float:
        """Parameters of the full model over parameters as last factored; 1 before that."""
        return self._compression

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors that live at present: `NAME.A` and `NAME.B` of every weight NAME that is factored."""
        factors: dict[str, nn.Parameter] = {}
        for name, record in self.records.items():
            factors |= zip(factor_names(name), (record.A, record.B), strict=True)
        return factors

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters as they are at present, frozen ones too: factors as `NAME.A` and `NAME.B`."""
        factors = self.factors()
        known = {id(parameter) for parameter in factors.values()}
        named = self.model.named_parameters()
        return factors | {name: p for name, p in named if id(p) not in known and not isinstance(p, FactoredMark)}

    def trained(self, treatments: Sequence[Treatment]) -> dict[str, nn.Parameter]:
        """All parameters that workers train together, as they are at present, in the order of `treatments`."""
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
        """The weights that may be factored and are dense at present, as (m, n) matrices, without gradients."""
        dense = [name for name in self.names if name not in self.records]
        weights = {name: self.model.get_parameter(name).detach() for name in dense}
        return {name: MatrixShape(weight.shape).to_matrix(weight) for name, weight in weights.items()}

    def factorize(self, factors: Mapping[str, Factors], damping: float = 0.0) -> None:
        """Puts the factors in the place of the weights that they are named after.

        Args:
            factors: by name.
            damping: of the preconditioner that will surround the optimizer's steps; 0: there is none.
        """
        self._damping = damping
        for name, pair in factors.items():
            record = factorize_(self.model, name, pair)
            for optimizer, (state,) in replace_(self.optimizers, [record.dense], [record.A, record.B]):
                if state and self.projects_state_of(optimizer):
                    pair_of_states = project_to_factors(state, record, *seen_through(record, damping))
                    for factor, held in zip((record.A, record.B), pair_of_states, strict=True):
                        optimizer.state[factor] = held
            self._begin_state(record.A, record.B)
            self.records[name] = record
        self._compression = self._full_numel / sum(parameter.numel() for parameter in self.parameters().values())

    def restore(self) -> None:
        """Makes every weight W = A B again."""
        for record in reversed(self.records.values()):
            states = replace_(self.optimizers, [record.A, record.B], [record.dense])
            seen = seen_through(record, self._damping) if self.projects else None
            restore_(record)
            for optimizer, (state_A, state_B) in states:
                if seen is not None and (state_A or state_B) and self.projects_state_of(optimizer):
                    optimizer.state[record.dense] = project_to_weight(state_A, state_B, record, *seen)
            self._begin_state(record.dense)
        self.records = {}

    def _begin_state(self, *parameters: Tensor) -> None:
        """Gives new parameters the state that their optimizer cannot do without."""
        for parameter in parameters:
            optimizer = self.optimizers.steps(parameter)
            if optimizer is not None and parameter not in optimizer.state:
                state = fresh_state(optimizer, self.optimizers.group_of(parameter), parameter)
                if state:
                    optimizer.state[parameter] = state

    def drop_state(self, parameter: Tensor) -> None:
        """Forgets what the optimizers know of a parameter."""
        for optimizer in self.optimizers.stateful:
            optimizer.state.pop(parameter, None)
        self._begin_state(parameter)

    def reshape(self, factors: Mapping[str, Factors], damping: float, compression: float) -> None:
        """Puts factors in the place of just these weights, whatever is factored now; for values that are loaded.

        What the optimizer knew of the weights is gone, and weights that become dense have values of no meaning.
        """
        for optimizer in self.optimizers.all:
            optimizer.state.clear()
        self._damping = 0.0
        self.restore()
        self.factorize(factors, damping)
        self._compression = compression

    def train_only(self, which: TrainedFactors) -> None:
        """Freezes the factors that are not trained."""
        self._trains = which
        for record in self.records.values():
            record.A.requires_grad_(which in ("all", "A"))
            record.B.requires_grad_(which in ("all", "B"))

    def keep_frozen(self) -> None:
        """Freezes the other factors again where a loop has thawed all parameters of a module."""
        if self._trains != "all":
            for record in self.records.values():
                (record.B if self._trains == "A" else record.A).requires_grad_(False)

    def frozen_factors(self) -> dict[str, nn.Parameter]:
        """Returns the factors that are to be trained and have been frozen, by the names of their weights."""
        trained = {name: record.A if self._trains == "A" else record.B for name, record in self.records.items()}
        return {name: factor for name, factor in trained.items() if not factor.requires_grad}

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The state of the full-rank model: loadable into the model as the user built it."""
        return {without_compiled(name): tensor for name, tensor in self.model.state_dict().items()}

    def factored_state_dict(self) -> dict[str, Tensor]:
        """The state of the model as it is: NAME.A (m, k) and NAME.B (k, n) in the place of a factored weight."""
        records = {without_compiled(name): record for name, record in self.records.items()}
        state: dict[str, Tensor] = {}
        for name, tensor in tensors_of(self.dense_state_dict()).items():
            record = records.get(name)
            if record is None:
                state[name] = tensor
            else:
                state |= zip(factor_names(name), (record.A.detach(), record.B.detach()), strict=True)
        return state

    def load_dense_state_dict(self, state: Mapping[str, Tensor], cut: bool) -> None:
        """Loads what `dense_state_dict` gives, factored weights at the ranks that they have.

        Args:
            state: of the full-rank model; all of its names and no others.
            cut: whether a weight may be cut to its rank, whatever that loses.

        Raises:
            RuntimeError: names or shapes differ, or a weight would lose more than rounding.
        """
        live = {without_compiled(name): name for name in self.model.state_dict()}
        with cutting(cut):
            self.model.load_state_dict({live.get(name, name): tensor for name, tensor in state.items()})
