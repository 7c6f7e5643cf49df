"""The average of the workers, shown in the model for validation: `ABTraining.merged`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from abtrain.engine.progress import Progress
from abtrain.merging.rounds import Rounds
from abtrain.modes import own_modes


@contextmanager
def merged_view(progress: Progress, rounds: Rounds) -> Iterator[None]:
    """Shows the average of the workers inside the block. Collective on entry, not on exit.

    Args:
        progress: of the run.
        rounds: the owner of the shared tensors; messages of its merges under way are sent first.
    """
    with own_modes():
        average, before = _average(progress, rounds), progress.shows_average
        average.__enter__()
    progress.shows_average = before or not isinstance(average, nullcontext)
    groups = [group for group in rounds.shared.model.optimizers.groups() if "train_mode" in group]
    modes = [group["train_mode"] for group in groups]
    # The block runs in the caller's modes.
    try:
        yield
    finally:
        progress.shows_average = before
        with own_modes():
            average.__exit__(None, None, None)
        # The restored weights are those of the mode that a schedule-free optimizer was in.
        for group, mode in zip(groups, modes, strict=True):
            group["train_mode"] = mode


def _average(progress: Progress, rounds: Rounds) -> AbstractContextManager[None]:
    """Returns the context in which the model shows the average. Collective if workers have to agree on anything."""
    shared = rounds.shared
    if not progress.workers_equal and progress.in_rounds:
        _meet(progress, rounds)
        return shared.averaged()
    # Without any sync, workers do not meet. Where all hold equal weights, only buffers may differ.
    unsynchronized = progress.position is not None and progress.position.phase.sync is None
    if progress.alone or unsynchronized or not progress.workers_equal or not shared.buffers():
        return nullcontext()
    equal = _meet(progress, rounds, shared.buffers_fingerprint())
    return nullcontext() if equal else shared.with_first_buffers()


def _meet(progress: Progress, rounds: Rounds, number: int = 0) -> bool:
    """Checks that all workers are at the same step. Returns whether they sent the same number. Collective."""
    recipe, position = progress.recipe, progress.position
    phase = len(recipe.phases) if position is None else position.phase_index
    rows = rounds.roll_call(progress.steps_done, phase, recipe.at, (number, 0.0))
    return len({row[0] for row in rows}) == 1
