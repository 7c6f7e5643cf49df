"""ABTraining trains a model as a recipe prescribes, inside the user's own training loop.

The loop of every recipe:

    position = recipe.at(0); enter its phase
    for each training step:
        forward through ab(...)            DDP over the world, over the group, or the bare module
        backward                           gradients averaged over that scope
        optimizer.step                     learning rates times the factors of the phase and the LR rebound
        ab.step():
            if position.merges:            merge factors, dense parameters and buffers over the world, now or
                                           during the next steps
            if the next step is another phase:
                restore or factorize       parameters and optimizer state change shape
                start the LR rebound       if shapes changed
                freeze by role, wrap again

Five objects do the work. `FactoredModel` stores weights and factors. `Rounds` merges the workers' models.
`OptimizerHooks` acts before and after optimizer steps. `PhaseChange` prepares these three for the next phase.
`Progress` records the step and which workers have equal weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.communicator import Communicator
from abtrain.engine.beginning import begin
from abtrain.engine.call_order import CallOrder
from abtrain.engine.choosing import Choosing
from abtrain.engine.model_access import ModelAccess
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.optimizer_problems import NewState
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.problems import checked
from abtrain.engine.progress import Progress
from abtrain.engine.saved_state import EngineState
from abtrain.engine.shared_steps import share_steps, unshare_steps
from abtrain.engine.state_problems import recipe_of
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
    """Trains a model as a recipe prescribes, inside the user's own training loop.

        ab = ABTraining(model, optimizer, recipes.ab(total_steps=10_000))
        for x, y in loader:
            loss_fn(ab(x), y).backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            ab.step()

    The constructor, `step`, `merged` and `load_state_dict` are collective: all workers must call them at the same
    training step. So are `ab(...)` and its backward pass if they average gradients.

    Args:
        model: the model to train, on its device and not wrapped in DDP. ABTraining changes it in place. Workers do not
            share the parameters and buffers that the model tells DDP to ignore. FSDP2's `fully_shard` may have sharded
            it over each group, for recipes without factors or shared gradients, such as `local_sgd` and `diloco`.
        optimizer: an optimizer of the model's parameters, or a list of optimizers that share no parameters. ABTraining
            keeps these objects. Optimizers that wrap others (Accelerate's, SAM, Lookahead) need no preparation.
        recipe: the phases of training, with the number of steps of each phase.
        communicator: the connection to the other workers; default: torch.distributed if initialised, else one worker.
        group_size: the number of workers per group; default: the workers over which the model is sharded, else the
            ranks per node under torchrun, else 1.
        grad_scaler: the loop's GradScaler, if it has one. Groups adapt their loss scales separately. ABTraining makes
            the scales equal before all workers share gradients again.
        find_unused_parameters: whether the backward pass may leave some parameters without a gradient, as in DDP.
        on_nonfinite: the reaction to NaN or infinity. `stop`: all workers stop before they average or change anything.
            `drop_worker`: a merge excludes the affected worker and gives it the average of the others. `skip`: all
            workers that share the affected gradients skip the optimizer step. Under `drop_worker` and `skip`, every
            other case stops all workers.
        average_buffers: glob patterns for names of buffers to average if they differ between workers. Running
            statistics are always averaged. All other buffers take one worker's values, as under DDP.
        same_settings: whether to compare the workers' optimizer settings at the start, at each phase and before each
            merge. Use False if workers train with different settings on purpose.
        measure_divergence: whether to measure at each merge how far workers have diverged; sends 2 numbers per layer.

    Attributes:
        module: the model that is trained.
        optimizers: the optimizers that were passed in; `optimizer` is the first of them.
        recipe: the recipe that the run follows. `auto` is replaced by what it has chosen.
        communicator: the communicator that was passed in, or the default one.

    Raises:
        ConfigurationError: the arguments are invalid; the message lists all problems.
        RanksDisagreeError: workers have different recipes or options, or models of different names, shapes or dtypes.
    """

    module: nn.Module
    optimizers: tuple[Optimizer, ...]
    optimizer: Optimizer
    recipe: Recipe
    communicator: Communicator

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
        given = (recipe, communicator, group_size, on_nonfinite, average_buffers, measure_divergence)
        comm = checked(model, optimizer, *given)
        self.module, self.recipe, self.communicator = model, recipe, comm
        optimizers = Optimizers(optimizer)
        self.optimizers, self.optimizer = optimizers.given, optimizers.given[0]
        treatments = classify(model, recipe.factoring, set(map(id, optimizers.parameters())))
        self._progress = Progress(recipe, comm)
        state = recipe.factoring.optimizer_state if recipe.factoring else "reset"
        self._model = FactoredModel(model, optimizers, [t.name for t in treatments if t.kind == "factored"], state)
        shared = SharedTensors(self._model, treatments, comm, average_buffers, same_settings)
        self._rounds = Rounds(shared, comm, on_nonfinite, measure_divergence, recipe.outer_device)
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
        self._hooks = OptimizerHooks(self._model, shared.frozen_names(), self._progress, on_nonfinite)
        share_steps(optimizers, comm)
        self._phases = PhaseChange(self._model, self._rounds, self._hooks, comm, find_unused_parameters, grad_scaler)
        self._calls = CallOrder(self._progress, self._hooks)
        self._choosing = Choosing(recipe, model, optimizers, comm)
        self._state = EngineState(self._progress, self._model, self._rounds, self._hooks, self._phases, grad_scaler)
        try:
            self._enter(recipe.at(0))
        except BaseException:
            self.close()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass. The backward pass averages gradients, so disable them for validation.

        Raises:
            UsageError: gradients are enabled, and the loop did not call `ab.step()` after the last optimizer step, the
                recipe has ended, or `close` was called.
        """
        if torch.is_grad_enabled():
            self._calls.forward()
            self._model.keep_frozen()
        return self._phases.parallel(*args, **kwargs)

    def __getstate__(self) -> NoReturn:
        """Raises UsageError, since an ABTraining cannot be pickled or copied: save `state_dict()` or the model."""
        raise UsageError(
            "an ABTraining cannot be pickled or copied, since it is connected to other workers: to continue the run, "
            "save ab.state_dict(), such as by torch.save(ab.state_dict(), path); to keep the model, call "
            "ab.save(path), or copy ab.module"
        )

    @property
    def require_backward_grad_sync(self) -> bool:
        """Returns True, for loops that read this flag of DDP. Setting the flag raises UsageError: use `no_sync`."""
        return True

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, value: bool) -> None:
        raise UsageError(
            f"require_backward_grad_sync = {value} has no effect on ABTraining: accumulate gradients under "
            "`with ab.no_sync():`, with forward and backward pass inside it"
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns a context in which forward and backward passes accumulate gradients locally, as under DDP."""
        return self._phases.parallel.no_sync()

    @in_own_modes
    def step(self, loss: float | Tensor | None = None) -> None:
        """Ends a training step, merges models, and changes the phase, as the recipe prescribes. Collective.

        The loop calls it after `optimizer.step()` and `scaler.update()`, also if the GradScaler skipped the step. This
        keeps all workers at the same step, and lets merges equalize the loss scales of the next step.

        Args:
            loss: this worker's training loss in this step, for `last_merges` and for merges that weight workers by it.

        Raises:
            UsageError: the recipe has ended, the loop called the model directly instead of `ab(...)`, no forward pass
                was made since the last call, or a merge rule needs a loss.
            RanksDisagreeError: workers are at different steps, in different phases, or have tensors of other shapes.
            NonFiniteError: a merge found NaN or infinity (see `on_nonfinite`), or a weight to factor has them.
            PeerLostError: another worker does not answer.
        """
        progress = self._progress
        self._choosing.end_step()
        self._calls.step(loss is not None)
        self._model.reshard()
        self._hooks.end_step()
        self._new_state.check(progress.steps_done)
        position, upcoming = progress.position, progress.advance()
        assert position is not None
        progress.workers_equal = position.phase.shares_gradients
        self._rounds.ended = []
        if position.phase.rounds is not None:
            number = loss.item() if isinstance(loss, Tensor) else loss
            progress.workers_equal = self._rounds.step(position, progress.steps_done, number)
            if self._choosing.due(progress.steps_done):
                self._follow(self._choosing.completed(self._rounds.ended[-1]))
                upcoming = self.recipe.at(progress.steps_done)
            if upcoming is not None:
                self._phases.after_step(position, upcoming)
        if position.phase.sync is not None and (upcoming is None or upcoming.first):
            where = f"step {progress.steps_done}, end of phase {position.phase.name}"
            shared = self._rounds.shared
            shared.check_equal("world", where, shared.buffers())
        if upcoming is None and position.phase.rounds is not None and not progress.alone:
            self._rounds.shared.copies.average()
        self._enter(upcoming)
        self._choosing.begin_step()

    def _follow(self, recipe: Recipe) -> None:
        """Replaces the recipe by a completed one, whose prologue is the same."""
        self.recipe = self._progress.recipe = self._choosing.adopt(recipe)
        self._new_state = NewState(self._rounds.shared, recipe, self.communicator)

    def _enter(self, position: Position | None) -> None:
        """Prepares the training step at a position in the recipe; None means that the recipe has ended."""
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
        """Returns the state that `load_state_dict` needs to continue the run: tensors and JSON values by name.

        Each worker has a state of its own. Between merges, the states of workers differ, even within a group. The
        tensors are live, not copies: save or copy them before the next step. The state contains neither gradients
        nor the loop's scheduler, sampler and random generators. The call sends no messages.

        Raises:
            UsageError: the loop did not call `ab.step()` after the last optimizer step, or `close` was called.
        """
        self._calls.save()
        self._model.reshard()
        return self._state.state_dict()

    @in_own_modes
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run from a `state_dict` of the same recipe, model and optimizer. Collective.

        Each worker loads the state that it saved. On the same machine, results are bitwise those of an uninterrupted
        run, except with PyTorch's PowerSGD hook, whose state is not saved.

        Raises:
            CheckpointError: a worker's state is malformed, or belongs to another recipe, model or optimizer. All
                workers raise it, and none has changed. Or this worker cannot apply its state: the message says that
                its model must not be trained.
            RanksDisagreeError: workers load states of different steps, and none has changed. Or weights differ between
                workers that should have equal ones, and the model must not be trained.
            NonFiniteError: the state contains a merge that was under way, and its result is not finite.
            UsageError: `close` was called, or the call is inside `with ab.merged():`.
        """
        self._calls.load()
        if self.recipe.choice is not None:
            self._follow(recipe_of(state, self.recipe))
        self._state.load_state_dict(state)

    @in_own_modes
    def close(self) -> None:
        """Turns model and optimizer back into plain PyTorch objects: dense, without hooks or wrapper.

        Save the compressed weights of `factored_state_dict()` first. The call sends no messages, so between merges
        each worker keeps its own weights. Build ABTraining again to continue. A second call does nothing. Inside
        `merged()`, the call raises UsageError.
        """
        if self._progress.closed:
            return
        self._progress.refuse_in_view("ab.close()")
        self._progress.tell_of_close()
        self._phases.unwrap()
        self._model.restore()
        self._hooks.close()
        unshare_steps(self._model.optimizers)
        self._progress.position, self._progress.closed = None, True
