"""ABTraining: trains a model by a recipe, inside the user's own loop.

The loop of every recipe:

    position = recipe.at(0); enter its phase
    for each training step:
        forward through ab(...)            DDP over the world, over the group, or the bare module
        backward                           gradients averaged over that scope
        optimizer.step                     learning rates times the factors of the phase and the LR rebound
        ab.step():
            if position.merges:            merge factors, dense parameters and buffers over the world, now or
                                           hidden behind the next steps
            if the next step is another phase:
                restore or factorize       parameters and optimizer state change shape
                start the LR rebound       if shapes changed
                freeze by role, wrap again

Three objects do the work: `FactoredModel` (weights and factors), `Rounds` (what merges, and how) and `OptimizerHooks`
(what happens around optimizer steps). `PhaseChange` takes them from one phase to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.communicator import Communicator
from abtrain.consistency.replicas import check_replicas
from abtrain.engine.beginning import begin
from abtrain.engine.call_order import CallOrder
from abtrain.engine.model_access import ModelAccess
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.optimizer_problems import NewState
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.problems import checked
from abtrain.engine.progress import Progress
from abtrain.engine.saved_state import EngineState
from abtrain.errors import OnNonFinite, UsageError
from abtrain.lowrank.classify import classify
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.merging.rounds import Rounds
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.modes import in_own_modes
from abtrain.recipes.recipe import Position, Recipe

log = logging.getLogger("abtrain")


class ABTraining(ModelAccess):
    """Trains a model by a recipe, inside the user's own loop.

        ab = ABTraining(model, optimizer, recipes.ab(total_steps=10_000))
        for x, y in loader:
            loss_fn(ab(x), y).backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            ab.step()

    Every call of `ab.step()` and `ab.merged()` is collective: all workers make it, at the same step.

    Args:
        model: the bare model, already on its device; changed in place. Not wrapped in DDP. Parameters and buffers that
            it tells DDP to ignore stay each worker's own.
        optimizer: an optimizer of the model's parameters, or a list of optimizers that share no parameters. They stay
            the same objects. Optimizers that wrap others (Accelerate's, SAM, Lookahead) need no preparation.
        recipe: what happens at which step.
        communicator: how to reach the other workers; default torch.distributed if it is initialised, else alone.
        group_size: workers per group; default the number of ranks per node under torchrun, else 1.
        grad_scaler: the loop's GradScaler, if it has one. Groups adapt their loss scales separately, so they are made
            equal before gradients are shared again.
        find_unused_parameters: whether the backward pass may leave some parameters without a gradient, as in DDP.
        on_nonfinite: what to do about NaN or infinity. `stop`: all workers stop before anything is averaged or changed.
            `drop_worker`: a merge leaves the worker's part out, and gives it the average of the others. `skip`: all
            workers that share such gradients skip the optimizer step. Under `drop_worker` and `skip`, all other cases
            stop all workers.
        average_buffers: globs of buffers that are averaged if they differ between workers. Running statistics are
            always averaged; all other buffers follow one worker, as under DDP.
        same_settings: whether to compare the optimizers' settings at the start, at each phase and before each merge.
            Use False if workers train with different settings on purpose.
        measure_divergence: whether to measure at every merge how far workers have diverged; each layer sends 2 numbers.

    Attributes:
        module: the model.
        optimizers: as given; `optimizer` is the first.
        recipe: as given.
        communicator: as given, or the default.

    Raises:
        ConfigurationError: the arguments are invalid; the message lists all problems.
        RanksDisagreeError: the workers' recipes or options differ, or their models in names, shapes or dtypes.
    """

    @in_own_modes
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        recipe: Recipe,
        *,
        communicator: Communicator | None = None,
        group_size: int | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        find_unused_parameters: bool = False,
        on_nonfinite: OnNonFinite = "stop",
        average_buffers: Sequence[str] = (),
        same_settings: bool = True,
        measure_divergence: bool = False,
    ) -> None:
        comm = checked(model, optimizer, recipe, communicator, group_size, on_nonfinite, average_buffers)
        self.module, self.recipe, self.communicator = model, recipe, comm
        optimizers = Optimizers(optimizer)
        self.optimizers, self.optimizer = optimizers.given, optimizers.given[0]
        treatments = classify(model, recipe.factoring, set(map(id, optimizers.parameters())))
        self._progress = Progress(recipe, comm)
        names = [treatment.name for treatment in treatments if treatment.kind == "factored"]
        optimizer_state = recipe.factoring.optimizer_state if recipe.factoring else "reset"
        self._model = FactoredModel(model, optimizers, names, optimizer_state)
        shared = SharedTensors(self._model, treatments, comm, average_buffers, same_settings)
        self._rounds = Rounds(shared, comm, on_nonfinite, measure_divergence)
        begin(
            shared,
            recipe,
            comm,
            grad_scaler=grad_scaler is not None and grad_scaler.is_enabled(),
            find_unused_parameters=find_unused_parameters,
            on_nonfinite=on_nonfinite,
            measure_divergence=measure_divergence,
            average_buffers=tuple(average_buffers),
        )
        self._new_state = NewState(shared, recipe, comm)
        # The optimizer is changed from here on. All checks that can raise come before.
        self._hooks = OptimizerHooks(
            self._model, shared.frozen(), self._progress, on_nonfinite, lambda: self._phases.whose_gradients()
        )
        self._phases = PhaseChange(self._model, self._rounds, self._hooks, comm, find_unused_parameters, grad_scaler)
        self._calls = CallOrder(self._progress, self._hooks)
        self._state = EngineState(self._progress, self._model, self._rounds, self._hooks, self._phases, grad_scaler)
        self._enter(recipe.at(0))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass. Gradients will be averaged as the phase says; disable them for validation.

        Raises:
            UsageError: gradients are enabled, and `ab.step()` was forgotten after the last optimizer step, the recipe
                has ended, or `close` was called.
        """
        if torch.is_grad_enabled():
            self._calls.forward()
            self._model.keep_frozen()
        return self._phases.parallel(*args, **kwargs)

    @property
    def require_backward_grad_sync(self) -> bool:
        """DDP's flag, for loops that read it. Setting it raises UsageError: use `no_sync`."""
        return True

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, value: bool) -> None:
        raise UsageError(
            f"require_backward_grad_sync = {value} has no effect on ABTraining: accumulate gradients under "
            "`with ab.no_sync():`, which covers forward and backward pass"
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulates gradients: forward and backward passes inside the block do not communicate, as with DDP."""
        return self._phases.parallel.no_sync()

    @in_own_modes
    def step(self, loss: float | Tensor | None = None) -> None:
        """Ends a training step: merges and changes of phase happen here. Call it after `optimizer.step()`.

        Call it also after a step that a GradScaler skipped, so that all workers stay at the same step. Call it after
        `scaler.update()`, so that merges equalize the loss scales of the next step.

        Args:
            loss: this worker's training loss in the step, for merges that weight workers by it.

        Raises:
            UsageError: the recipe has ended, the model was called directly instead of by `ab(...)`, no training step
                came before, or a merge rule needs a loss.
            RanksDisagreeError: the workers are at different steps, in different phases, or hold different shapes.
        """
        progress = self._progress
        self._calls.step(loss is not None)
        self._hooks.end_step()
        self._new_state.check(progress.steps_done)
        position, upcoming = progress.position, progress.advance()
        assert position is not None
        progress.workers_equal = position.phase.shares_gradients
        if position.phase.rounds is not None:
            number = loss.item() if isinstance(loss, Tensor) else loss
            progress.workers_equal = self._rounds.step(position, progress.steps_done, number)
            if upcoming is not None:
                self._phases.after_merge(position, upcoming)
        if position.phase.sync is not None and (upcoming is None or upcoming.first):
            where = f"step {progress.steps_done}, end of phase {position.phase.name}"
            shared = self._rounds.shared
            check_replicas(self.communicator, shared.replicated(), "world", where, shared.buffers())
        if upcoming is None and position.phase.rounds is not None and not progress.alone:
            self._rounds.shared.copies.average(self.communicator)
        self._enter(upcoming)

    def _enter(self, position: Position | None) -> None:
        """Prepares the step at a position; None if the recipe has ended."""
        self._progress.position = position
        if position is None or position.starts_round:
            self._hooks.round_began = True
        if position is None:
            self._hooks.rebound.start(0)
            self._phases.unwrap()
        elif position.first:
            self._phases.enter(position, self.recipe)
        self._hooks.watch()

    @in_own_modes
    def state_dict(self) -> dict[str, Any]:
        """Returns everything that `load_state_dict` needs to continue, in any phase: tensors and JSON values by name.

        The state is this worker's own: between merges, it differs between groups and between workers of a group. Its
        tensors are those in training: save or copy them before the next step. It contains neither gradients nor the
        loop's scheduler, sampler and generators. Sends no messages.

        Raises:
            UsageError: `ab.step()` was not called after the last optimizer step, or ABTraining was closed.
        """
        self._calls.save()
        return self._state.state_dict()

    @in_own_modes
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` of the same recipe, model and optimizer: bit by bit, on the same machine.

        Collective: each worker loads the state that it saved. The state of PyTorch's PowerSGD hook is not included.

        Raises:
            CheckpointError: a worker's state is malformed, or belongs to another recipe, model or optimizer; raised on
                all workers, and nothing has changed. Or the state could not be applied on this worker: the message
                says that its model must not be trained.
            RanksDisagreeError: workers load states of different steps, and nothing has changed; or workers that should
                hold the same weights do not, and the model must not be trained.
            NonFiniteError: the result of a merge that was under way is not finite; see `Merger.merge`.
            UsageError: ABTraining was closed.
        """
        self._calls.load()
        self._state.load_state_dict(state)

    @in_own_modes
    def close(self) -> None:
        """Turns model and optimizer back into plain PyTorch objects: dense, without hooks or wrapper.

        Save the compressed weights, `factored_state_dict()`, before. Sends no messages: within a round each worker
        keeps its own weights. To continue with abtrain, build ABTraining again. A second call does nothing.
        """
        if self._progress.closed:
            return
        if self._progress.within_round:
            log.warning(self._progress.within_round)
        self._phases.unwrap()
        self._model.restore()
        self._hooks.close()
        self._progress.position, self._progress.closed = None, True
