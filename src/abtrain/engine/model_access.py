"""Views of the model in training, and the records of its run: the part of ABTraining that does not train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from abtrain.engine.description import Description
from abtrain.engine.ema import EMA
from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.phase_change import PhaseChange
from abtrain.engine.progress import Progress
from abtrain.lowrank.model import FactoredModel
from abtrain.merging.rounds import Rounds
from abtrain.modes import in_own_modes, own_modes
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Position


class ModelAccess:
    """Dense, factored and averaged views of the model in training, and the records of its run."""

    module: nn.Module
    _progress: Progress
    _model: FactoredModel
    _rounds: Rounds
    _hooks: OptimizerHooks
    _phases: PhaseChange

    @property
    def steps_done(self) -> int:
        """The number of steps that are done."""
        return self._progress.steps_done

    @property
    def position(self) -> Position | None:
        """The position of the next step in the recipe; None after the last."""
        return self._progress.position

    @property
    def finished(self) -> bool:
        """Whether the recipe has ended."""
        return self.position is None

    @property
    def lr_factor(self) -> float:
        """The factor of the learning rates in the next optimizer step: `Phase.local_lr` times the LR rebound."""
        return self._hooks.rebound.factor

    @property
    def compression(self) -> float:
        """Parameters of the full model over parameters as last factored."""
        return self._model.compression

    @property
    def rank_history(self) -> list[dict[str, Any]]:
        """For each factoring: the step, the rank k of each weight, and why others stay dense."""
        return self._phases.rank_history

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this run that were spent on decompositions (`svd`)."""
        return self._phases.seconds

    @property
    def divergence(self) -> list[dict[str, Any]]:
        """For each merge in this process: step, phase, and distances by layer; empty if they are not measured."""
        return self._rounds.divergence

    @property
    def dropped_parts(self) -> list[dict[str, Any]]:
        """For each merge that left workers' parts out: its step and their ranks (`on_nonfinite="drop_worker"`)."""
        return self._rounds.dropped

    @property
    def skipped_steps(self) -> list[int]:
        """Indexes of the steps that were skipped because of NaN or infinity (`on_nonfinite="skip"`)."""
        return self._hooks.guard.skipped

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Puts the average of the groups into the model, for validation. Collective on entry, not on exit.

        If all workers hold the same weights, buffers that differ take rank 0's values inside the block, as under DDP.
        A recipe without any sync has no average: each worker sees its own model.
        """
        progress = self._progress
        with own_modes():
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
            # The restored weights belong to the mode that a schedule-free optimizer had before the block.
            for group, mode in zip(groups, modes, strict=True):
                group["train_mode"] = mode

    def _average(self) -> AbstractContextManager[None]:
        """Returns the context in which the model shows the average. Collective if workers have to agree on anything."""
        progress, shared = self._progress, self._rounds.shared
        if not progress.workers_equal and progress.in_rounds:
            self._meet()
            return shared.averaged()
        # Without any sync, workers do not communicate. If all hold equal weights, only buffers may differ.
        unsynchronized = progress.position is not None and progress.position.phase.sync is None
        if progress.alone or unsynchronized or not progress.workers_equal or not shared.buffers():
            return nullcontext()
        equal = self._meet(shared.buffers_fingerprint())
        return nullcontext() if equal else shared.with_first_buffers()

    def _meet(self, number: int = 0) -> bool:
        """Checks that all workers are at the same step. Returns whether they sent the same number. Collective."""
        progress, recipe = self._progress, self._progress.recipe
        phase = len(recipe.phases) if progress.position is None else progress.position.phase_index
        rows = self._rounds.roll_call(progress.steps_done, phase, recipe.at, (number, 0.0))
        return len({row[0] for row in rows}) == 1

    def describe(self) -> Description:
        """Describes the phases, the groups, and the treatment of every parameter and buffer, with the reason."""
        shared = self._rounds.shared
        averaged = shared.averaged_buffers()
        buffers = {name: "averaged" if name in averaged else "follows one worker" for name in shared.buffers()}
        own = own_names(self.module)
        buffers |= {name: f"own: in {IGNORED}" for name, _ in self.module.named_buffers() if name in own}
        topology, dense = self._progress.comm.topology, dict(self._phases.dense_this_cycle)
        return Description(self._progress.recipe, topology, tuple(shared.treatments), dense, buffers)

    @in_own_modes
    def dense_state_dict(self) -> dict[str, Tensor]:
        """Returns the full-rank state dict of the model as it was built, with W = A B for factored weights."""
        return self._model.dense_state_dict()

    @in_own_modes
    def factored_state_dict(self) -> dict[str, Tensor]:
        """Returns the compressed model: NAME.A (m, k) and NAME.B (k, n) in place of each factored weight NAME.

        `abtrain.lowrank.svd.MatrixShape` gives the product W = A B the shape of the weight.
        """
        return self._model.factored_state_dict()

    @in_own_modes
    def load_dense_state_dict(self, state: Mapping[str, Tensor], *, cut: bool = False) -> None:
        """Loads weights and buffers into the live model, by the names that it was built with. Sends no messages.

        Factored weights keep their ranks. They keep their factors if the product is the loaded weight already, or was
        before the last load. Otherwise, the loaded weight is written in the basis of the present factors.

        Args:
            state: as `dense_state_dict` returns it, with the same names, and equal on all workers.
            cut: whether a weight of a higher rank may be cut to the rank of its factors, however much is lost.

        Raises:
            RuntimeError: names or shapes differ, or cutting a weight to its rank would lose more than rounding does.
                Other weights may have been loaded before.
        """
        self._model.load_dense_state_dict(state, cut)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips the gradients of the live parameters, factors included, by their total norm, and returns that norm.

        Args:
            max_norm: the largest norm; gradients above it are scaled down to it.
            norm_type: the order of the norm; infinity: the largest element.
        """
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm, norm_type)

    def ema(self, decay: float) -> EMA:
        """Returns a running average of this worker's dense weights. Call its `update()` after each `ab.step()`.

        Raises:
            ConfigurationError: not 0 <= decay < 1.
        """
        return EMA(self.dense_state_dict, decay)
