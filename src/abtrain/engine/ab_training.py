"""ABTraining: the only module that sees every part.

The loop of every recipe:

    position = recipe.at(0); enter its phase
    for each training step:
        forward through ab(...)            DDP over the world, over the group, or the bare module
        backward                           gradients averaged over that scope
        optimizer.step                     learning rates times the phase's, and the LR rebound's
        ab.step():
            if position.merges:            merge factors, dense parameters and buffers over the world, now or
                                           hidden behind the next steps
            if the next step is another phase:
                restore or factorize       the parameters change shape, the optimizer's with them
                start the LR rebound       if they did
                freeze by role, wrap again
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.checks import as_checkpoint_error, told_names
from abtrain.comm.communicator import Communicator, Scope
from abtrain.consistency.agreement import raise_together
from abtrain.consistency.optimizers import equalize_grad_scaler
from abtrain.consistency.replicas import check_replicas
from abtrain.consistency.settings import check_loaded, optimizer_settings, settings_at_start
from abtrain.engine.beginning import announce, begin, levels
from abtrain.engine.description import Description
from abtrain.engine.ema import EMA
from abtrain.engine.lr_rebound import LRRebound
from abtrain.engine.merged_view import MergedView
from abtrain.engine.optimizer_hooks import Coming, StepHooks
from abtrain.engine.optimizer_problems import check_modes, doubts_about_optimizers, doubts_about_state, old_steps
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.problems import checked, doubts_about
from abtrain.engine.saved_state import VERSION, Parts, alike, recipe_fingerprint
from abtrain.engine.state_parts import Run
from abtrain.engine.state_problems import state_problem
from abtrain.engine.unfinished import forget, watch
from abtrain.errors import OnNonFinite, UsageError
from abtrain.failpoints import fail_at
from abtrain.lowrank.classify import classify
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.merging.buffers import is_finite
from abtrain.merging.copies import WeightCopies
from abtrain.merging.divergence import Divergence
from abtrain.merging.merger import Merger
from abtrain.merging.roles import trained_by
from abtrain.merging.rounds import Rounds
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.modes import in_own_modes
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Position, Recipe
from abtrain.recipes.sync import GradientSync, WeightSync

log = logging.getLogger("abtrain")

_FIRST_STEPS = 2
"""In which most optimizers make their state."""


class ABTraining:
    """Trains a model by a recipe, inside the user's own loop.

        ab = ABTraining(model, optimizer, recipes.ab(total_steps=10_000))
        for x, y in loader:
            loss_fn(ab(x), y).backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            ab.step()

    Every call of `ab.step()` and `ab.merged()` is collective: all workers make it, at the same step.

    Args:
        model: the bare model, already on its device; changed in place. Not wrapped in DDP. What it tells DDP to
            ignore is each worker's own.
        optimizer: over the model's parameters, or a list of them, each with parameters of its own; they stay the same
            objects. Those that wrap others (Accelerate's, SAM, Lookahead) are taken as they are.
        recipe: what happens at which step.
        communicator: how to reach the other workers; default torch.distributed if it is initialised, else alone.
        group_size: workers a group; default the number of ranks per node under torchrun, else 1.
        grad_scaler: the loop's GradScaler, if it has one. Groups adapt their loss scales apart, so they are made equal
            before gradients are shared again.
        find_unused_parameters: for models whose backward pass leaves some parameters without a gradient, as in DDP.
        on_nonfinite: where NaN or infinity turn up, `stop` on all workers before anything is averaged or changed;
            `drop_worker`: leave a worker's part of a merge out, and give it what the others agree on; `skip`: leave out
            optimizer steps by such gradients, on all who share them. What cannot be left out so stops.
        average_buffers: globs of buffers that are averaged where workers hold them differently. Running statistics
            always are; all other buffers follow one worker, as under DDP.
        same_settings: compare the optimizers' settings at the start, at each phase and before each merge. False for
            loops in which workers are meant to train by unlike ones.
        measure_divergence: at every merge, how far workers have come apart in each layer, for two numbers a layer.

    Attributes:
        optimizers: as given; `optimizer` is the first.
        recipe: as given.
        dropped_parts: of merges that left workers' parts out, the step and their ranks (`on_nonfinite="drop_worker"`).
        skipped_steps: indexes of the steps that were left out for their gradients (`on_nonfinite="skip"`).
        rank_history: of every factoring, the step, k of each weight, and why others stay dense.
        seconds: spent on decompositions (`svd`) in this run.
        divergence: of every merge in this process, where it is measured: step, phase, and by layer the distances.

    Raises:
        ConfigurationError: all that is wrong with the arguments, at once.
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
        self.module = model
        self.recipe = recipe
        self.communicator = comm
        self.steps_done = comm.meter.step = 0
        self._grad_scaler = grad_scaler
        optimizers = Optimizers(optimizer)
        self.optimizers, self.optimizer = optimizers.given, optimizers.given[0]
        self._treatments = classify(model, recipe.factoring, set(map(id, optimizers.parameters())))
        names = [treatment.name for treatment in self._treatments if treatment.kind == "factored"]
        state = recipe.factoring.optimizer_state if recipe.factoring else "reset"
        self._model = FactoredModel(model, optimizers, names, state)
        self._copies = WeightCopies(self._model)
        self._state = SharedTensors(self._model, self._treatments, comm, self._copies, average_buffers, same_settings)
        self._merger = Merger(comm, on_nonfinite)
        self.divergence: list[dict[str, Any]] = []
        self._divergence = Divergence(comm)
        if measure_divergence and comm.topology.world_size > 1:
            self._merger.observer = self._divergence.observe
        self._rounds = Rounds(self._state, self._merger, comm)
        self._view = MergedView(comm, optimizers, self._state, self._copies, self._rounds)
        self._forwards = 0
        self._closed = False
        self._workers_equal = True
        self._told_of_steps = bool(old_steps(optimizers))
        self._levels = comm.topology.world_size > 1 and levels(recipe)
        begin(
            self._state,
            self._model,
            recipe,
            comm,
            optimizers=optimizers.kinds,
            grad_scaler=grad_scaler is not None and grad_scaler.is_enabled(),
            find_unused_parameters=find_unused_parameters,
            on_nonfinite=on_nonfinite,
            measure_divergence=measure_divergence,
            average_buffers=tuple(average_buffers),
            param_groups=optimizer_settings(
                optimizers, self._model.parameters(), settings_at_start(optimizers) if same_settings else ()
            ),
        )
        if comm.rank == 0 and comm.topology.world_size > 1:
            announce(Description(recipe, comm.topology, tuple(self._treatments), {}).beginning())
        for doubt in [*doubts_about(recipe, comm), *doubts_about_optimizers(optimizers, recipe)]:
            if comm.rank == 0:
                log.warning(doubt)
        self._position: Position | None = recipe.at(0)
        # From here on the optimizer is changed: what can be refused has been.
        self._rebound = LRRebound(
            optimizers.acting, lambda: 1.0 if self._position is None else self._position.phase.local_lr
        )
        self._hooks = StepHooks(
            self._model, self._state.frozen(), on_nonfinite, comm.rank == 0, self._coming, self._whose_gradients
        )
        self._arrangement = PhaseChange(
            self._model,
            self._treatments,
            comm,
            self._merger,
            self._rounds,
            self._rebound,
            find_unused_parameters,
            same_settings,
        )
        self._arrangement.enter(self._position, recipe)
        self._copies.renew()
        self._hooks.watch()
        self._saved_step = 0
        watch(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; gradients will be averaged as the phase says. To validate, disable them.

        Raises:
            UsageError: with gradients enabled: `ab.step()` was forgotten after the last optimizer step, the recipe has
            ended, or `close` was called.
        """
        if torch.is_grad_enabled():
            if self._closed:
                raise UsageError(self._ended())
            self._view.refuse("a forward pass with gradients")
            if self._hooks.all_stepped:
                raise UsageError(
                    f"a forward pass with gradients began, but ab.step() was not called after optimizer.step() of step "
                    f"{self.steps_done}: call ab.step() once after every optimizer.step(), and validate under no_grad"
                )
            if self.finished:
                raise UsageError(self._ended())
            if self._shares_gradients:
                fail_at(self.communicator.rank, self.steps_done, "sync.begin")
            self._model.keep_frozen()
            self._forwards += 1
        return self._arrangement.parallel(*args, **kwargs)

    @property
    def position(self) -> Position | None:
        """Where the coming step stands in the recipe; None after the last."""
        return self._position

    @property
    def finished(self) -> bool:
        return self._position is None

    @property
    def amid_round(self) -> str:
        """Why the model is this worker's own, and has not been saved to go on from; empty if all hold the same."""
        alone, position = self.communicator.topology.world_size == 1, self._position
        if alone or position is None or self._workers_equal or not isinstance(position.phase.sync, WeightSync):
            return ""
        if self._saved_step == self.steps_done:
            return ""
        return (
            f"the run is left at step {self.steps_done}, amid a round of phase {position.phase.name!r}: the model of "
            "this worker is its own. Save what `with ab.merged() as model` shows, or ab.state_dict() to go on"
        )

    @property
    def lr_factor(self) -> float:
        """The factor of the learning rates in the next optimizer step: `Phase.local_lr` times the LR rebound."""
        return self._rebound.factor

    @property
    def compression(self) -> float:
        """Parameters of the full model over parameters as last factored."""
        return self._model.compression

    @property
    def rank_history(self) -> list[dict[str, Any]]:
        return self._arrangement.rank_history

    @property
    def seconds(self) -> dict[str, float]:
        return self._arrangement.seconds

    @property
    def dropped_parts(self) -> list[dict[str, Any]]:
        return self._rounds.dropped

    @property
    def skipped_steps(self) -> list[int]:
        return self._hooks.guard.skipped

    @property
    def require_backward_grad_sync(self) -> bool:
        """As DDP has it, for loops that look; to change it, use `no_sync`.

        Raises:
            UsageError: it is set.
        """
        return True

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, value: bool) -> None:
        raise UsageError(
            f"require_backward_grad_sync = {value} has no effect on ABTraining: accumulate gradients under "
            "`with ab.no_sync():`, which covers forward and backward pass"
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradient accumulation: forward and backward passes inside it do not communicate, as with DDP."""
        return self._arrangement.parallel.no_sync()

    @in_own_modes
    def step(self, loss: float | Tensor | None = None) -> None:
        """One training step is done: merges, and phase changes, happen here. Call it after `optimizer.step()`.

        Args:
            loss: this worker's training loss in the step, for merges that weight workers by it.

        Also after a step that a GradScaler skipped, so that all workers stay at the same step, and after
        `scaler.update()`, so that merges level the scales that the next step uses.

        Raises:
            UsageError: the recipe has ended, the model was called past `ab(...)`, no training step came before, or a
            rule needs a loss.
            RanksDisagreeError: the workers are at different steps, in different phases, or hold different shapes.
        """
        position = self._position
        if position is None:
            raise UsageError(self._ended())
        self._check_call(loss is not None)
        self._hooks.next_step()
        self._check_optimizers()
        self._forwards = 0
        self._rebound.advance()
        self.steps_done += 1
        self.communicator.meter.step = self.steps_done
        upcoming = self.recipe.at(self.steps_done) if self.steps_done < self.recipe.total_steps else None
        self._workers_equal = isinstance(position.phase.sync, GradientSync)
        if isinstance(position.phase.sync, WeightSync):
            self._sync_weights(position, upcoming, loss.item() if isinstance(loss, Tensor) else loss)
        if position.phase.sync is not None and (upcoming is None or upcoming.first):
            where = f"step {self.steps_done}, end of phase {position.phase.name}"
            check_replicas(self.communicator, self._state.replicated(), "world", where, self._state.buffers())
        self._move_to(upcoming, position)

    def _check_call(self, has_loss: bool) -> None:
        """Checks that `step` is called where it may be.

        Raises:
            UsageError: it is not.
        """
        weighted = None if has_loss else self.recipe.phase_weighted_by_loss
        if weighted is not None:
            raise UsageError(
                f"phase {weighted!r} weights workers by their training loss, but ab.step() was called without one: "
                "call ab.step(loss) at every step"
            )
        fail_at(self.communicator.rank, self.steps_done, "step")
        if not self._forwards and self.communicator.topology.world_size > 1:
            raise UsageError(
                "the optimizer stepped, but no ab(...) call came before: call ab(x) in place of model(x)"
                if self._hooks.stepped
                else "no ab(...) call came since the last ab.step(): call it once for each optimizer step, on every "
                "worker as often, and ab.merged() to look at the average amid a round"
            )
        self._view.refuse("ab.step()")

    def _move_to(self, upcoming: Position | None, position: Position) -> None:
        """Goes from a position to the next one, with all that changes there."""
        self._position = upcoming
        if upcoming is None or upcoming.starts_round:
            self._hooks.round_began = True
        if upcoming is None:
            if isinstance(position.phase.sync, WeightSync) and self.communicator.topology.world_size > 1:
                self._copies.average(self.communicator)
            self._rebound.start(0)
            self._arrangement.unwrap()
        elif upcoming.first:
            self._arrangement.enter(upcoming, self.recipe)
            self._copies.renew()
        self._hooks.watch()

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Inside it, the model holds the average of the groups: for validation. Collective on entry, not on exit.

        Where all workers hold the same weights, those buffers that differ are rank 0's meanwhile, as under DDP. A
        recipe without any sync has no average: the model stays the worker's own.
        """
        with self._view.shown(self.recipe, self.steps_done, self._position, self._workers_equal):
            yield self.module

    def describe(self) -> Description:
        """Every parameter with what becomes of it and why, the phases, and the groups."""
        dense_this_cycle = dict(self._arrangement.dense_this_cycle)
        averaged = self._state.averaged_buffers()
        buffers = {name: "averaged" if name in averaged else "follows one worker" for name in self._state.buffers()}
        own = own_names(self.module)
        buffers |= {name: f"own: in {IGNORED}" for name, _ in self.module.named_buffers() if name in own}
        return Description(self.recipe, self.communicator.topology, tuple(self._treatments), dense_this_cycle, buffers)

    @in_own_modes
    def dense_state_dict(self) -> dict[str, Tensor]:
        """The full-rank state dict, loadable into the model as it was built; factored weights as W = A B."""
        return self._model.dense_state_dict()

    @in_own_modes
    def factored_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the model as it is at present: NAME.A (m, k) and NAME.B (k, n) for a factored weight NAME.

        It is the compressed model: `abtrain.lowrank.matrix.MatrixShape` tells how W = A B is seen as a tensor.
        """
        return self._model.factored_state_dict()

    @in_own_modes
    def load_dense_state_dict(self, state: Mapping[str, Tensor], *, cut: bool = False) -> None:
        """Loads weights and buffers into the live model, by the names that it was built with; talks to nobody.

        Factored weights keep their ranks, and their factors where the product is the loaded weight already, or was
        before the last load. Other weights are written in the basis of the present factors.

        Args:
            state: as `dense_state_dict` gives it, equal on all workers: all of its names and no others.
            cut: whether weights of a higher rank may be cut, whatever that loses.

        Raises:
            RuntimeError: names or shapes differ, or cutting a weight to its rank would lose more than rounding does.
                Other weights may have been loaded then.
        """
        self._model.load_dense_state_dict(state, cut)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of the live parameters, factors among them, by their total norm; returns that norm.

        Args:
            max_norm: above which they are scaled down to it.
            norm_type: which norm; infinity: the largest element.
        """
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm, norm_type)

    def ema(self, decay: float) -> EMA:
        """A running average of this worker's dense weights: call its `update()` after each `ab.step()`.

        Raises:
            ConfigurationError: not 0 <= decay < 1.
        """
        return EMA(self.dense_state_dict, decay)

    @in_own_modes
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on from here, in any phase: tensors and JSON values by name.

        It is this worker's own: groups, and workers of a group, hold different things between merges. Tensors are those
        that are trained: save or copy them before the next step. Gradients are not in it, nor what belongs to the loop:
        scheduler, sampler, generators. Talks to nobody.

        Raises:
            UsageError: `ab.step()` was not called after the last optimizer step, or ABTraining was closed.
        """
        if self._closed:
            raise UsageError(self._ended())
        if self._hooks.stepped:
            raise UsageError("the state between optimizer.step() and ab.step() cannot be saved: call ab.step() first")
        self._view.refuse("ab.state_dict()")
        self._saved_step = self.steps_done
        return {
            "version": VERSION,
            "recipe": recipe_fingerprint(self.recipe),
            "step": self.steps_done,
            "workers_equal": self._workers_equal,
            "round_began": self._hooks.round_began,
            "skipped_steps": list(self.skipped_steps),
            **self._arrangement.state_dict(),
            **self._parts().state_dict(self._equal_scope),
        }

    @in_own_modes
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of the same recipe, model and optimizer: to the last bit, on the same machine.

        Collective: all workers load, each what it saved. PyTorch's PowerSGD hook is not in it, and starts anew.

        Raises:
            CheckpointError: a worker's state is malformed, or of another recipe, model or optimizer; on all workers,
                and nothing has changed. Or the state could not be applied on this worker: the message says that the
                model must not be trained then.
            RanksDisagreeError: workers load states of different steps, and nothing has changed; or those who ought to
                hold the same weights do not, and the model must not be trained.
            NonFiniteError: a merge that was under way is not finite; see `Merger.merge`.
            UsageError: ABTraining was closed.
        """
        if self._closed:
            raise UsageError(self._ended())
        comm = self.communicator
        run = Run(self.recipe, self._model, self._treatments, comm.topology, comm.rank, self._grad_scaler)
        raise_together(comm, state_problem(state, run))
        position = self.recipe.at(state["step"]) if state["step"] < self.recipe.total_steps else None
        check_loaded(comm, self.recipe, state, **alike(state, position))
        with as_checkpoint_error(
            "the state could not be applied, and the model must not be trained now: build model, optimizer and "
            "ABTraining again, and load another checkpoint"
        ):
            self._go_on(state, position)

    def _go_on(self, state: Mapping[str, Any], position: Position | None) -> None:
        """Makes everything what it was; the state fits, and so do those of the other workers."""
        comm = self.communicator
        self._arrangement.unwrap()
        comm.begin_run()
        self.steps_done, self._position = state["step"], position
        comm.meter.step, comm.meter.phase = self.steps_done, state["meter"]["phase"]
        self._workers_equal, self._hooks.round_began = state["workers_equal"], state["round_began"]
        self._hooks.guard.skipped = list(state["skipped_steps"])
        self._hooks.goes_on()
        self._forwards, self._saved_step = 0, self.steps_done
        self._parts().load_state_dict(state, self.recipe.at, self._trained_by)
        self._check_loaded_weights()
        self._arrangement.load_state_dict(state, self._position)
        # Last: what is sent to load was not sent by the run that goes on.
        comm.meter.load_state_dict(state["meter"])

    def _check_loaded_weights(self) -> None:
        """All workers ought to hold the same, or amid a round those of each group."""
        scope = self._equal_scope
        if scope is not None:
            where = f"step {self.steps_done} of the states that were loaded"
            check_replicas(self.communicator, self._state.replicated(), scope, where)

    @property
    def _equal_scope(self) -> Scope | None:
        """Whose workers hold the same weights now; None if each worker has its own."""
        if self._workers_equal:
            return "world"
        amid_round = self._position is not None and isinstance(self._position.phase.sync, WeightSync)
        return "group" if amid_round else None

    @property
    def _shares_gradients(self) -> bool:
        """Whether all workers step by the same gradients now."""
        alone, position = self.communicator.topology.world_size == 1, self._position
        return not alone and position is not None and isinstance(position.phase.sync, GradientSync)

    def _parts(self) -> Parts:
        return Parts(
            self._model,
            self._merger,
            self._rounds,
            self._rebound,
            self._hooks.preconditioner,
            self._copies,
            self._grad_scaler,
            self.communicator.meter,
        )

    def _check_optimizers(self) -> None:
        """Looks at the optimizers' state where it shows for the first time, and at their modes.

        Raises:
            UsageError: state can be neither made equal nor saved, or the optimizer is in its mode of evaluation.
        """
        optimizers = self._model.optimizers
        check_modes(optimizers)
        if self._copies.look() or self.steps_done < _FIRST_STEPS:
            doubts = doubts_about_state(optimizers, self.recipe, self._levels)
            if self.steps_done == 0 and not self._told_of_steps:
                doubts += [*filter(None, [old_steps(optimizers, most=1)])]
            for doubt in doubts if self.communicator.rank == 0 else ():
                log.warning(doubt)

    @in_own_modes
    def close(self) -> None:
        """Gives model and optimizer back: dense, without hooks or wrapper, as any code of PyTorch knows them.

        The compressed weights are `factored_state_dict()`, to be taken before. Talks to nobody: amid a round each
        worker keeps its own weights. To train on under abtrain, build it anew. A second call does nothing.
        """
        if self._closed:
            return
        if self.amid_round:
            log.warning(self.amid_round)
        forget(self)
        self._arrangement.unwrap()
        self._model.restore()
        self._rebound.close()
        self._hooks.close()
        self._position, self._closed = None, True

    def _sync_weights(self, position: Position, upcoming: Position | None, loss: float | None) -> None:
        """Merges after a step of a phase of rounds, and prepares for what the next step trains."""
        phase = position.phase
        with self._copies.following():
            self._workers_equal = self._rounds.step(position, self.steps_done, loss, self._trained_by(position))
        layers = self._divergence.take()
        if layers is not None:
            self.divergence.append({"step": self.steps_done, "phase": phase.name, "layers": layers})
        if upcoming is None:
            return
        if upcoming.first and isinstance(upcoming.phase.sync, GradientSync):
            self._arrangement.level(position)
            if self._grad_scaler is not None:
                equalize_grad_scaler(self._grad_scaler, self.communicator)
        if phase.trains == "a_then_b" and upcoming.turn != position.turn and not upcoming.first:
            self._arrangement.train(upcoming)

    def _trained_by(self, position: Position) -> dict[str, list[bool]]:
        """By the name of a factor, for each worker whether it trains it here; empty where all train all."""
        return trained_by(position, self.communicator.topology, self._model.factors())

    def _coming(self) -> Coming | None:
        """The step that the optimizer is about to make; None past the end of the recipe."""
        if self._position is None:
            return None
        self._view.refuse("optimizer.step()")
        if self._shares_gradients:
            fail_at(self.communicator.rank, self.steps_done, "sync.end")
        shared = self._shares_gradients
        in_group = isinstance(self._position.phase.sync, WeightSync) and self.communicator.topology.group_size > 1
        return Coming(self.steps_done, self._position.phase, shared, averaged=shared or in_group)

    def _whose_gradients(self) -> str:
        """Which worker brought shared gradients that are not finite, as far as this one can tell."""
        rank = self.communicator.rank
        if not self._arrangement.parallel.spoiled():
            return f", brought by another worker than rank {rank}"
        held = self._state.replicated() | {f"buffer {name}": one for name, one in self._state.buffers().items()}
        broken = told_names([name for name, tensor in held.items() if not is_finite(tensor)])
        return f", brought by rank {rank}{f' (it holds NaN or infinity in {broken})' if broken else ''}"

    def _ended(self) -> str:
        if self._closed:
            return "ABTraining was closed: build it anew to train on, or train the model without it"
        return (
            f"recipe {self.recipe.name!r} ended after its {self.recipe.total_steps} steps: "
            "stop the loop there, or build the recipe with more total_steps"
        )
