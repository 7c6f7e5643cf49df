"""When to switch: what is measured at merges, and what is decided from it, alike on all workers.

The first worker measures and decides; the others take its word, since the last bits of an SVD differ between machines.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.recipes.phase import Until
from abtrain.recipes.recipe import Position, Recipe

log = logging.getLogger("abtrain")

_NEVER = math.inf


class Switch:
    """Watches the spectra of full-rank weights from merge to merge, and decides.

    Args:
        comm: of this worker.
        recipe: asks for decisions, or does not: then nothing is measured.
    """

    def __init__(self, comm: Communicator, recipe: Recipe) -> None:
        self._comm = comm
        self._for_factoring = recipe.factoring is not None and recipe.factoring.settled > 0
        self._for_phases = any(
            phase.until is not None and phase.until.measure == "spectrum_drift" for phase in recipe.phases
        )
        self._spectra: dict[str, Tensor] = {}
        self._drift: dict[str, float] = {}
        self._sizes: dict[str, int] = {}

    def observe(
        self, matrices: Callable[[], Mapping[str, Tensor]], recipe: Recipe, upcoming: Position | None, factored: bool
    ) -> None:
        """A merge has ended.

        Args:
            matrices: gives the weights that may be factored and are not at present, (m, n) by name.
            recipe: as it is now.
            upcoming: where the next step stands.
            factored: whether other weights are factors.
        """
        if self._comm.rank != 0 or upcoming is None:
            return
        if (self._for_phases and not factored) or (self._for_factoring and recipe.factors_from(upcoming.step)):
            for name, W in matrices().items():
                S, before = _spectrum(W), self._spectra.get(name)
                self._drift[name] = _NEVER if before is None else float((S - before).norm() / S.norm())
                self._spectra[name], self._sizes[name] = S, W.numel()

    def restored(self, matrices: Callable[[], Mapping[str, Tensor]]) -> None:
        """Weights are dense again: their next round begins with what factors have made of them."""
        if self._comm.rank == 0 and self._for_factoring:
            self._spectra |= {name: _spectrum(W) for name, W in matrices().items()}

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far; empty on all workers but the first."""
        drift = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._drift.items()}
        return {"spectra": dict(self._spectra), "drift": drift, "sizes": dict(self._sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces what was measured by the content of a `state_dict`."""
        self._spectra = {name: S.to("cpu", copy=True) for name, S in state["spectra"].items()}
        self._drift = {name: float(value) for name, value in state["drift"].items()}
        self._sizes = {name: int(size) for name, size in state["sizes"].items()}

    def ends(self, until: Until, agreement: float | None) -> tuple[bool, float]:
        """Whether the phase ends with this merge, and the measure. Collective over the world.

        Args:
            until: what ends the phase.
            agreement: of the merge, if it was measured.
        """
        value = self._mean_drift() if until.measure == "spectrum_drift" else agreement
        assert value is not None
        verdict = torch.tensor([float(value < until.below), value], dtype=torch.float64).to(self._comm.device)
        self._comm.broadcast(verdict, source=0)
        ended, value = verdict.tolist()
        return bool(ended), value

    def unsettled(self, names: Sequence[str], tolerance: float) -> dict[str, str]:
        """Of the weights, those whose spectrum drifted by more than `tolerance`, with the reason. Collective."""
        drift = torch.tensor([self._drift.get(name, _NEVER) for name in names], dtype=torch.float64)
        drift = drift.to(self._comm.device)
        self._comm.broadcast(drift, source=0)
        return {
            name: f"its spectrum still drifts by {value:.3g} a round, more than settled={tolerance}"
            if math.isfinite(value)
            else f"its spectrum was measured less than twice: settled={tolerance} asks how it drifts"
            for name, value in zip(names, drift.tolist(), strict=True)
            if value > tolerance
        }

    def _mean_drift(self) -> float:
        total = sum(self._sizes.values())
        return sum(self._drift[name] * size for name, size in self._sizes.items()) / total if total else _NEVER


def _spectrum(W: Tensor) -> Tensor:
    """Singular values over the largest."""
    S: Tensor = torch.linalg.svdvals(W.float()).cpu()
    return S / S[0].clamp_min(torch.finfo(S.dtype).tiny)
