"""The result of a run: result.json."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import Any

import torch

from abtrain.checkpoint.digest import weights_digest
from abtrain.commands.train.config import TrainConfig
from abtrain.engine.ab_training import ABTraining
from abtrain.version import __version__


def result_of(
    config: TrainConfig, ab: ABTraining, parameters: int, total: float, scores: dict[str, float | None]
) -> dict[str, Any]:
    """The content of result.json."""
    meter, topology = ab.communicator.meter, ab.communicator.topology
    payload, svd = meter.payload(), ab.seconds["svd"]
    return {
        "recipe": config.recipe_name,
        "task": config.task,
        "seed": config.seed,
        "world_size": topology.world_size,
        "group_size": topology.group_size,
        "steps": ab.steps_done,
        **scores,
        "seconds": {
            "total": total,
            "compute": total - meter.sync_seconds - svd,
            "sync": meter.sync_seconds,
            "svd": svd,
        },
        "payload_bytes": payload,
        # DDP hands over every parameter's gradient, 4 bytes each, at every step.
        "payload_ratio": payload["total"] / (4 * parameters * ab.steps_done),
        "parameters": parameters,
        "compression": ab.compression,
        "ranks": ab.rank_history,
        "dropped_parts": ab.dropped_parts,
        "weights_digest": weights_digest(ab.dense_state_dict()),
        "schedule": repr(ab.recipe),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "abtrain": __version__},
        "hardware": {
            "platform": platform.platform(),
            "device": _device_name(ab.communicator.device),
            "cores": os.cpu_count(),
            "threads_per_worker": torch.get_num_threads(),
        },
        "config": dataclasses.asdict(config),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
