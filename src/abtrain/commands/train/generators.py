"""Random generators as what can be saved: tensors and JSON values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch


def generators_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's generator, of torch's on the CPU, and of torch's on `device`."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_generators_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Lets the generators go on from a `generators_state`."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
