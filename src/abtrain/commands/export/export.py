"""Writes the model of a run in a form that runs without abtrain."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from abtrain.commands.export.finished import FinishedRun, inputs, largest_difference
from abtrain.errors import CheckpointError, ConfigurationError

Form = Literal["plain", "dense", "torch-export", "onnx"]
_SUFFIX: dict[Form, str] = {
    "plain": "-plain.pt",
    "dense": "-dense-weights.safetensors",
    "torch-export": ".pt2",
    "onnx": ".onnx",
}
_ALLOWED = 1e-4
"""The largest difference between outputs that rounding errors explain."""


def export(run: FinishedRun, form: Form, out: Path | None, data: Path | None) -> tuple[Path, float]:
    """Writes the model of a run as a file, and compares the outputs of both on 64 inputs of the test set.

    Returns:
        The path of the file, and the largest absolute difference between the outputs.

    Raises:
        ConfigurationError: the form is unknown, a package is missing, or the file already exists.
        DataError: the task's data is missing.
        CheckpointError: the file cannot be written, or its outputs differ by more than rounding errors explain.
    """
    target = out or run.folder / f"{run.name}{_SUFFIX.get(form, '')}"
    problems = _problems(form, target)
    if problems:
        raise ConfigurationError(problems)
    x, trained = inputs(run, run.data(data), 64), run.trained().requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # The exporters warn about their own internals.
            warnings.simplefilter("ignore")
            exported = _WRITERS[form](run, target, x)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    difference = largest_difference(trained, exported, x)
    if not difference <= _ALLOWED * max(1.0, float(trained(x).abs().max())):
        target.unlink()
        raise CheckpointError(
            f"the exported model's outputs differ by {difference:.1e} from the trained model's: no file was kept. "
            "Please report it"
        )
    return target, difference


def _problems(form: str, target: Path) -> list[str]:
    problems = []
    if form not in get_args(Form):
        problems.append(f"--as {form!r} is unknown: use {', '.join(get_args(Form))}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        problems.append(f"--as onnx needs {', '.join(missing)}: pip install 'abtrain[onnx]'")
    if target.exists() or target.is_symlink():
        problems.append(f"--out {target} exists: name another file, or remove it")
    elif not target.parent.is_dir():
        problems.append(f"--out {target}: the folder {target.parent} does not exist")
    return problems


def _write_plain(run: FinishedRun, target: Path, x: Tensor) -> nn.Module:
    torch.save(run.plain(), target)
    loaded: nn.Module = torch.load(target, weights_only=False)
    return loaded


def _write_dense(run: FinishedRun, target: Path, x: Tensor) -> nn.Module:
    model = run.dense()
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, target)
    return model


def _write_export(run: FinishedRun, target: Path, x: Tensor) -> nn.Module:
    batch = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(run.plain(), (x,), dynamic_shapes=batch), target)
    return torch.export.load(target).module()


def _write_onnx(run: FinishedRun, target: Path, x: Tensor) -> nn.Module:
    import onnxruntime

    batch = ({0: torch.export.Dim.AUTO},)
    program = torch.onnx.export(run.plain(), (x,), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert program is not None
    program.save(str(target))
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    class Runtime(nn.Module):
        """Runs an ONNX file in ONNX Runtime as if it were a module."""

        def forward(self, x: Tensor) -> Tensor:
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            return torch.from_numpy(found)

    return Runtime()


_WRITERS: dict[Form, Callable[[FinishedRun, Path, Tensor], Any]] = {
    "plain": _write_plain,
    "dense": _write_dense,
    "torch-export": _write_export,
    "onnx": _write_onnx,
}


def needed_packages(run: FinishedRun) -> list[str]:
    """Returns the packages other than torch that must be installed to load the run's model from a `plain` file."""
    return sorted({type(module).__module__.split(".")[0] for module in run.plain().modules()} - {"torch"})
