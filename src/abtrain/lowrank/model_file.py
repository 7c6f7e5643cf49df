"""Saves and loads trained models as safetensors files, with dense weights or with factors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from abtrain.checks import brief
from abtrain.errors import CheckpointError, UsageError
from abtrain.files import replacing
from abtrain.lowrank.layers import Factored
from abtrain.lowrank.names import factor_names, without_compiled
from abtrain.lowrank.surgery import factorize_, restore_
from abtrain.lowrank.svd import Factors, MatrixShape
from abtrain.lowrank.weight import FactoredWeight
from abtrain.modes import own_modes
from abtrain.shards import fit_to, is_sharded, reshard

_loaded: WeakSet[FactoredWeight] = WeakSet()
"""Weights that `load` has factored and that no ABTraining trains. Another `load` may therefore replace them."""


def save_model(path: str | os.PathLike[str], state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a model as a safetensors file. A former file is replaced only once the new one is complete.

    Args:
        path: the path of the file.
        state: the model's tensors by name.
        about: a description of the model as JSON values. The file's metadata contains it under the key `abtrain`.

    Raises:
        UsageError: a value in `state` is not a tensor, such as the extra state of a module.
        CheckpointError: the file cannot be written; a former file is unchanged.
    """
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UsageError(f"{others[0]} is not a tensor, but model files contain only tensors: use torch.save instead")
    # safetensors rejects tensors that share memory, as tied weights do.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    try:
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, {"format": "pt", "abtrain": json.dumps(about)})
            _sort_metadata(partial)
            partial.chmod(0o644)  # safetensors lets only the owner read it
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a file's header: safetensors writes them in random order, and equal models in unlike files.

    The header is a JSON object after its length in 8 bytes. Spaces may follow it.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


@own_modes()
def load(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads a saved model into a model of the same architecture, and returns its description.

    A weight becomes factored if the file contains it as two factors A and B. All other weights become dense. Tensors
    are converted to the model's dtypes and devices. `abtrain.to_plain(model)` returns a copy that runs without abtrain.

    Args:
        model: a model of the same architecture, such as a newly built one; changed in place. Each worker of a sharded
            model reads the whole file, and keeps its shards.
        path: a file that `save_model` wrote, or a safetensors file of the model's `state_dict()`.

    Returns:
        The form (`dense` or `factored`), the recipe and the step of the model, as `save_model` wrote them into the
        file; an empty dict if another program wrote the file.

    Raises:
        CheckpointError: the file cannot be read, or its names or shapes differ from the model's. The model is
            unchanged.
        UsageError: an ABTraining is training the model, or the model is sharded and the file has factors. The model is
            unchanged.
    """
    records = [one for m in model.modules() if isinstance(m, Factored) for one in m._abtrain_weights.values()]
    if any(record not in _loaded for record in records):
        raise UsageError(
            "the model is still being trained by an ABTraining (ab): call ab.close() first, or use "
            "ab.load_dense_state_dict(state) to load dense weights without ending the training"
        )
    reshard(model)
    tensors, about = _read(Path(path))
    state = model.state_dict()
    names = {without_compiled(name): name for name in state}
    pairs = {name: pair for name in names if (pair := factor_names(name))[0] in tensors and name not in tensors}
    if pairs and any(map(is_sharded, state.values())):
        raise UsageError(
            f"{path} has factors, which a sharded model cannot have: load it before fully_shard, with a model of "
            "abtrain.to_plain(model)"
        )
    _check(model, Path(path), tensors, names, pairs)
    for record in records:
        restore_(record)
    model.load_state_dict(
        fit_to({names[name]: tensors[name] for name in names if name in tensors}, model), strict=False
    )
    for name, pair in pairs.items():
        weight = model.get_parameter(names[name])
        A, B = (tensors[one].to(weight.device, weight.dtype) for one in pair)
        _loaded.add(factorize_(model, names[name], Factors(A, B)))
    return about


def describe(path: Path) -> dict[str, Any]:
    """Returns the description that `save_model` wrote into a file; empty if there is none. Reads no tensors.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with _opened(path) as file:
        return _about(file)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _about(file)  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a model file (safetensors): {brief(error)}") from error


def _about(file: Any) -> dict[str, Any]:
    about = json.loads((file.metadata() or {}).get("abtrain", "{}"))
    return about if isinstance(about, dict) else {}


def _check(
    model: nn.Module, path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str], pairs: Mapping[str, Any]
) -> None:
    """Compares the names and shapes of a file's tensors with the model's, and changes neither.

    Raises:
        CheckpointError: names or shapes differ.
    """
    known = set(names) | {factor for pair in pairs.values() for factor in pair}
    state, wrong = model.state_dict(), []
    missing = [name for name in names if name not in tensors and name not in pairs]
    extra = [name for name in tensors if name not in known]
    wrong += [f"lacks {', '.join(missing[:4])}"] if missing else []
    wrong += [f"has {', '.join(extra[:4])}, which the model does not have"] if extra else []
    for name in (name for name in names if name not in missing):
        expected = tuple(state[names[name]].shape)
        if name in pairs:
            wrong += _misfit_of_factors(name, expected, [tensors.get(factor) for factor in pairs[name]])
        elif (held := tuple(tensors[name].shape)) != expected:
            wrong.append(f"has {name} of shape {held} instead of {expected}")
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the model: it {'; '.join(wrong[:4])}. Load it into a model of the same architecture"
        )


def _misfit_of_factors(name: str, expected: tuple[int, ...], pair: list[Tensor | None]) -> list[str]:
    """Returns what is wrong with the factors of a weight of this shape; empty if they fit."""
    A, B = pair
    if A is None or B is None or not A.ndim == B.ndim == 2 or A.shape[1] != B.shape[0] or len(expected) < 2:
        shapes = " and ".join("missing" if factor is None else str(tuple(factor.shape)) for factor in pair)
        return [f"has factors of {name} that do not belong together ({shapes}), for a weight of shape {expected}"]
    shape = MatrixShape(torch.Size(expected))
    if (len(A), B.shape[1]) == (shape.m, shape.n):
        return []
    return [f"has factors of a {len(A)} x {B.shape[1]} matrix for {name}, which is {shape.m} x {shape.n} here"]
