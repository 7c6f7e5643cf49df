"""Saves an ABTraining with PyTorch's distributed checkpoints (DCP), for trusted storage.

DCP pickles its metadata and all values except tensors: whoever can write to such a checkpoint can have code executed by
those who load it. Use it if your platform requires it, and `abtrain.checkpoint.store` otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import safetensors.torch

from abtrain.checkpoint.trees import join, parse_json, refer, split
from abtrain.checks import as_checkpoint_error
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import raise_together
from abtrain.errors import CheckpointError

_LENGTH, _DIGEST = 8, 32  # bytes


class Saveable(Protocol):
    """Declares the methods of ABTraining that saving and loading require."""

    @property
    def communicator(self) -> Communicator: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TrainingState:
    """Gives an `ABTraining` the interface that DCP saves and loads. FOR TRUSTED STORAGE ONLY: DCP unpickles metadata.

        dcp.save({"ab": TrainingState(ab)}, checkpoint_id=folder)
        dcp.load({"ab": TrainingState(ab)}, checkpoint_id=folder)

    Each worker's state is saved as one `bytes` value, since DCP loads tensors only into existing ones of equal shapes,
    but shapes change from phase to phase. A state can be loaded only by the same number of workers that saved it.

    Args:
        ab: an ABTraining with the same recipe, model and optimizer as the one that was saved.
    """

    def __init__(self, ab: Saveable) -> None:
        self._ab = ab
        self._key = f"rank-{ab.communicator.rank}"

    def state_dict(self) -> dict[str, bytes]:
        """Returns this worker's state as bytes: SHA-256, length of the JSON part, JSON, safetensors."""
        structure, tensors = split(self._ab.state_dict())
        text = json.dumps(refer(structure, dict.fromkeys(tensors, ""))).encode()
        held = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        body = len(text).to_bytes(_LENGTH, "little") + text + safetensors.torch.save(held)
        return {self._key: hashlib.sha256(body).digest() + body}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a result of `state_dict`. Collective over the world.

        Raises:
            CheckpointError: a worker's state is missing or damaged, or belongs to another recipe, model or optimizer.
                All workers raise it.
        """
        problem, tree = "", dict[str, Any]()
        try:
            tree = self._tree(state)
        except CheckpointError as error:
            problem = str(error)
        raise_together(self._ab.communicator, problem)
        self._ab.load_state_dict(tree)

    def _tree(self, state: Mapping[str, Any]) -> Any:
        """Returns this worker's part of a saved state, verified and decoded."""
        saved = state.get(self._key) if isinstance(state, Mapping) else None
        if not isinstance(saved, bytes):
            raise CheckpointError(f"the checkpoint lacks {self._key}: load it with the number of workers that saved it")
        digest, body = saved[:_DIGEST], saved[_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise CheckpointError(f"the state of {self._key} is damaged: it does not match its SHA-256 checksum")
        end = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
        with as_checkpoint_error(f"the state of {self._key} is malformed"):
            tensors = safetensors.torch.load(body[end:])
            return join(parse_json(body[_LENGTH:end]), lambda _, key: tensors[key])
