"""Defines the part of ABTraining that gives access to the model and to the records of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from abtrain.engine.description import Description
from abtrain.engine.ema import EMA
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.progress import Progress
from abtrain.errors import ConfigurationError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.model_file import save_model
from abtrain.merging.rounds import Rounds
from abtrain.modes import in_own_modes, own_modes
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Position
from abtrain.shards import gathered

_Form = Literal["factored", "dense"]


class ModelAccess:
    """Gives access to the trained model, as dense, factored or averaged weights, and to the records of the run."""

    module: nn.Module
    _progress: Progress
    _model: FactoredModel
    _rounds: Rounds
    _hooks: OptimizerHooks
    _phases: PhaseChange

    @property
    def steps_done(self) -> int:
        """The number of completed training steps."""
        return self._progress.steps_done

    @property
    def position(self) -> Position | None:
        """The position of the next step in the recipe; None after the last step."""
        return self._progress.position

    @property
    def finished(self) -> bool:
        """Whether the recipe has ended."""
        return self.position is None

    @property
    def lr_factor(self) -> float:
        """The factor by which the LR rebound multiplies learning rates in the next optimizer step."""
        return self._hooks.rebound.factor

    @property
    def compression(self) -> float:
        """The number of parameters of the dense model, divided by their number when it was last factored."""
        return self._model.compression

    @property
    def rank_history(self) -> list[dict[str, Any]]:
        """One entry for each time that weights were factored: step, rank k by weight, and why some stay dense."""
        return self._phases.rank_history

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that this run has spent on singular value decompositions, under the key `svd`."""
        return self._phases.seconds

    @property
    def divergence(self) -> list[dict[str, Any]]:
        """One entry per merge in this process: step, phase, distances by layer. Needs `measure_divergence`."""
        return self._rounds.divergence

    @property
    def last_merges(self) -> list[dict[str, Any]]:
        """One entry per merge that ended in the last `step`; empty after other steps.

        `step`: the number of steps done when it began. `dropped`: the ranks that were excluded. `losses`: by rank, the
        mean loss since the last merge; NaN if `step` got none. `seconds`: how long the merge interrupted training here.
        `wait_seconds`: how long this worker waited for the slowest worker.
        """
        return self._rounds.ended

    def progress(self) -> str:
        """Returns one line about the run: steps done and remaining, the phase, and the bytes sent by this worker."""
        done, total = self.steps_done, self._progress.recipe.total_steps
        phase = self.position.phase.name if self.position else "ended"
        sent = self._progress.comm.meter.payload()["total"] / 1e6
        return f"step {done}/{total}  {total - done} to go  {phase}  {sent:,.1f} MB sent"

    @property
    def dropped_parts(self) -> list[dict[str, Any]]:
        """One entry per merge that excluded workers: the step and the workers' ranks (`on_nonfinite="drop_worker"`)."""
        return self._rounds.dropped

    @property
    def skipped_steps(self) -> list[int]:
        """The indexes of steps that were skipped because of NaN or infinity (`on_nonfinite="skip"`)."""
        return self._hooks.guard.skipped

    @property
    def bytes_sent(self) -> int:
        """The number of bytes that this worker has passed to collectives in this run (its payload)."""
        return int(self._progress.comm.meter.payload()["total"])

    def train(self, mode: bool = True) -> Self:
        """Sets the model to training mode, or to evaluation mode if `mode` is False. Returns this object."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Sets the model to evaluation mode. Returns this object."""
        return self.train(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the model's current parameters: the factors A and B of factored weights, and all other parameters."""
        self._model.reshard()
        yield from self._model.parameters().values()

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Gives the model the average weights inside a `with` block, for validation. Collective on entry, not on exit.

        If all workers have the same weights, buffers that differ take rank 0's values inside the block, as under DDP.
        In a phase without `sync` there is no average, and each worker sees its own model. All workers of a group run a
        sharded model together.
        """
        progress = self._progress
        with own_modes():
            self._model.reshard()
            average, before = self._average(), progress.shows_average
            average.__enter__()
        progress.shows_average = before or not isinstance(average, nullcontext)
        groups = [group for group in self._model.optimizers.groups() if "train_mode" in group]
        modes = [group["train_mode"] for group in groups]
        # The block runs in the caller's modes.
        try:
            yield self.module
        finally:
            progress.shows_average = before
            with own_modes():
                average.__exit__(None, None, None)
                self._model.reshard()
            # The restored weights belong to the mode that a schedule-free optimizer had before the block.
            for group, mode in zip(groups, modes, strict=True):
                group["train_mode"] = mode

    def _average(self) -> AbstractContextManager[None]:
        """Returns a context in which the model has the average weights. Collective, unless no averaging is needed."""
        progress, shared = self._progress, self._rounds.shared
        if not progress.workers_equal and progress.in_rounds:
            self._meet()
            return shared.averaged()
        # Workers do not communicate in a phase without sync. If their weights are equal, only buffers may differ.
        unsynchronized = progress.position is not None and progress.position.phase.sync is None
        if progress.alone or unsynchronized or not progress.workers_equal or not shared.buffers():
            return nullcontext()
        equal = self._meet(shared.buffers_fingerprint())
        return nullcontext() if equal else shared.with_first_buffers()

    def _meet(self, number: int = 0) -> bool:
        """Checks that all workers are at the same step. Returns whether all passed the same number. Collective."""
        progress, recipe = self._progress, self._progress.recipe
        phase = len(recipe.phases) if progress.position is None else progress.position.phase_index
        rows = self._rounds.roll_call(progress.steps_done, phase, recipe.at, (number, 0.0))
        return len({row[0] for row in rows}) == 1

    def describe(self) -> Description:
        """Returns a report: phases, groups, and the treatment of each parameter and buffer, with the reason."""
        shared = self._rounds.shared
        averaged = shared.averaged_buffers()
        buffers = {name: "averaged" if name in averaged else "follows one worker" for name in shared.buffers()}
        own = own_names(self.module)
        buffers |= {name: f"own: in {IGNORED}" for name, _ in self.module.named_buffers() if name in own}
        factored = {name: sum(map(Tensor.numel, record.factors)) for name, record in self._model.records.items()}
        topology, dense = self._progress.comm.topology, dict(self._phases.dense_this_cycle)
        return Description(self._progress.recipe, topology, tuple(shared.treatments), factored, dense, buffers)

    @in_own_modes
    def dense_state_dict(self) -> dict[str, Tensor]:
        """Returns the state dict of the model in its original, dense form, with W = A B for factored weights.

        If the model is sharded, the call is collective in each group, and weights are whole, on the CPU.
        """
        self._tell_whose("dense_state_dict()")
        return self._model.dense_state_dict()

    @in_own_modes
    def factored_state_dict(self) -> dict[str, Tensor]:
        """Returns the compressed state dict, with NAME.A (m, k) and NAME.B (k, n) for each factored weight NAME.

        `abtrain.lowrank.svd.MatrixShape` reshapes the product W = A B to the shape of the weight. Collective in each
        group if the model is sharded, as `dense_state_dict`.
        """
        self._tell_whose("factored_state_dict()")
        return self._model.factored_state_dict()

    @in_own_modes
    def save(self, path: str | os.PathLike[str], form: _Form = "factored") -> None:
        """Writes the model as a safetensors file, for `abtrain.load`. A former file is replaced. Sends no messages.

        Call it on one worker. Within a round, workers have different models: call it inside `with ab.merged()`. If the
        model is sharded, call it on all workers of a group. They gather the weights, and the first of them writes.

        Args:
            path: the path of the file; its folder exists.
            form: `factored` for the compressed weights of `factored_state_dict`; `dense` for `dense_state_dict`, which
                any code can load with safetensors and `load_state_dict`.

        Raises:
            ConfigurationError: the form is unknown.
            CheckpointError: the file cannot be written; a former file is unchanged.
            UsageError: the model's state has entries that are not tensors.
        """
        if form not in get_args(_Form):
            raise ConfigurationError(f"form={form!r} is unknown: use 'factored' or 'dense'")
        self._tell_whose("ab.save()")
        if form == "factored" and not self._model.records:
            form = "dense"
            self._tell_unfactored()
        state = self._model.factored_state_dict() if form == "factored" else self._model.dense_state_dict()
        about = {"form": form, "recipe": self._progress.recipe.name, "step": self.steps_done}
        topology, rank = self._progress.comm.topology, self._progress.comm.rank
        if not self._model.sharded or topology.place_of(rank) == 0:
            save_model(path, state, about)

    @in_own_modes
    def load_dense_state_dict(self, state: Mapping[str, Tensor], *, cut: bool = False) -> None:
        """Loads a dense state dict into the model. Training can continue. Sends no messages.

        Factored weights keep their ranks. Factors stay unchanged if their product equals the loaded weight, or equalled
        it before the last load. Otherwise, new factors represent the loaded weight in the basis of the current ones.

        Args:
            state: a result of `dense_state_dict` of the same model, equal on all workers.
            cut: whether to reduce a weight of higher rank to the rank of its factors, whatever accuracy is lost.

        Raises:
            RuntimeError: names or shapes differ, or the reduction of a weight to its rank would lose more than rounding
                does. Other weights may have been loaded already.
            UsageError: the call is inside `with ab.merged():`.
        """
        self._progress.refuse_in_view("ab.load_dense_state_dict()")
        self._model.load_dense_state_dict(state, cut)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of all current parameters, factors included. Returns their total norm before clipping.

        Collective in each group if the model is sharded.

        Args:
            max_norm: the largest total norm; larger gradients are scaled down to it.
            norm_type: the order p of the p-norm; infinity means the largest absolute element.
        """
        self._model.reshard()
        return gathered(torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm, norm_type))

    def ema(self, decay: float) -> EMA:
        """Returns a moving average of this worker's dense weights. Call its `update()` after each `ab.step()`.

        Raises:
            ConfigurationError: `decay` is below 0, or not below 1; or the model is sharded.
        """
        if self._model.sharded:
            raise ConfigurationError(
                "ema() would keep all weights on each worker, but the model is sharded over the workers of a group: "
                "validate and save inside `with ab.merged():`, which averages shards over the groups"
            )
        return EMA(self._model.dense_state_dict, decay)

    def _tell_unfactored(self) -> None:
        """Logs a warning, once, if the recipe has factors, but the model that is saved has none."""
        if self._progress.recipe.factored:
            why = (
                "ab.close() has multiplied the factors out: save before it"
                if self._progress.closed
                else "no weight is factored at this step: ab.describe() says why"
            )
            self._progress.warn_once("saved dense", f"ab.save() writes dense weights, since {why}")

    def _tell_whose(self, call: str) -> None:
        """Logs a warning, once, if a call returns weights that other groups of workers do not have."""
        progress = self._progress
        if progress.weights_differ and not progress.shows_average:
            progress.warn_once(
                "own weights",
                f"{call} at step {progress.steps_done}, within a round: these are the weights of rank 0's group, and "
                "other groups have others. For the average, all workers enter `with ab.merged():`; save inside it",
            )
