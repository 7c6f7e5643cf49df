"""Checks the order of calls in a training loop: forward pass, optimizer step, `ab.step()`."""

from __future__ import annotations

from abtrain.engine.optimizer_hooks import OptimizerHooks
from abtrain.engine.progress import Progress
from abtrain.errors import UsageError
from abtrain.failpoints import fail_at


class CallOrder:
    """Raises an error if a training loop makes its calls in the wrong order."""

    def __init__(self, progress: Progress, hooks: OptimizerHooks) -> None:
        self._progress, self._hooks = progress, hooks
        self._forwards = 0

    def forward(self) -> None:
        """Checks that a forward pass with gradients may begin, and counts it.

        Raises:
            UsageError: the last step lacks `ab.step()`, the run has ended or was closed, or inside `ABTraining.merged`.
        """
        progress = self._progress
        progress.check_open()
        progress.refuse_in_view("a forward pass with gradients")
        if self._hooks.all_stepped:
            raise UsageError(
                f"a forward pass with gradients began, but ab.step() was not called after optimizer.step() of step "
                f"{progress.steps_done}: call ab.step() once after every optimizer.step(), and validate under no_grad"
            )
        progress.check_unfinished()
        if progress.shares_gradients:
            fail_at(progress.comm.rank, progress.steps_done, "sync.begin")
        self._forwards += 1

    def step(self, has_loss: bool) -> None:
        """Checks that `ab.step()` may be called, and resets the count of forward passes.

        Raises:
            UsageError: the recipe has ended, a merge rule needs a loss, or there was no forward pass in this step.
        """
        progress = self._progress
        progress.check_unfinished()
        weighted = None if has_loss else progress.recipe.phase_weighted_by_loss
        if weighted is not None:
            raise UsageError(
                f"phase {weighted!r} weights workers by their training loss, but ab.step() was called without one: "
                "call ab.step(loss) at every step"
            )
        fail_at(progress.comm.rank, progress.steps_done, "step")
        if not self._forwards and not progress.alone:
            raise UsageError(
                "optimizer.step() was called without an ab(...) call before it: call ab(x) in place of model(x)"
                if self._hooks.stepped
                else "ab(...) has not been called with gradients enabled since the last ab.step(): call it before each "
                "optimizer step, the same number of times on every worker, and not ab.step() after a validation"
            )
        progress.refuse_in_view("ab.step()")
        self._forwards = 0

    def save(self) -> None:
        """Raises UsageError if no state can be saved: within a step, after `close`, or inside `ABTraining.merged`."""
        self._progress.check_open()
        if self._hooks.stepped:
            raise UsageError("the state between optimizer.step() and ab.step() cannot be saved: call ab.step() first")
        self._progress.refuse_in_view("ab.state_dict()")

    def load(self) -> None:
        """Resets the count of forward passes. Raises UsageError after `close`, or inside `ABTraining.merged`."""
        self._progress.check_open()
        self._progress.refuse_in_view("ab.load_state_dict()")
        self._forwards = 0
