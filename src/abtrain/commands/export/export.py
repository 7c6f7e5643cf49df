"""Writes the model of a run in a form that runs without abtrain."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from abtrain.commands.export.finished import FinishedRun, inputs, largest_difference
from abtrain.commands.export.settings import Form
from abtrain.errors import CheckpointError, ConfigurationError
from abtrain.files import replacing

_ALLOWED = 1e-4
"""The largest difference that rounding errors explain, for outputs of at most 1. It grows with larger outputs."""


def export(run: FinishedRun, form: Form, out: Path | None, data: Path | None) -> tuple[Path, float]:
    """Writes the model of a run as a file, and compares the file's outputs with the model's on 64 test inputs.

    Returns:
        The path of the file, and the largest absolute difference between the outputs.

    Raises:
        ConfigurationError: the form is unknown, a package is missing, or the file exists or has no folder.
        DataError: the task's data is missing.
        CheckpointError: the file cannot be written, or its outputs differ by more than rounding errors explain.
    """
    target = out or run.folder / f"{run.name}{_FORMATS[form].suffix if form in _FORMATS else ''}"
    problems = _problems(form, target)
    if problems:
        raise ConfigurationError(problems)
    x, trained = inputs(run, run.data(data), 64), run.trained().requires_grad_(False)
    with warnings.catch_warnings():
        # The exporters warn about their own internals.
        warnings.simplefilter("ignore")
        content = _FORMATS[form].content(run, x)
        try:
            with replacing(target) as temporary:
                temporary.write_bytes(content)
                difference = largest_difference(trained, _FORMATS[form].loaded(run, temporary), x)
                if not difference <= _ALLOWED * max(1.0, float(trained(x).abs().max())):
                    raise CheckpointError(
                        f"the exported model's outputs differ by {difference:.1e} from the trained model's: no file "
                        "was kept. This is a bug: report it, and try another --as"
                    )
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}. Name another file with --out") from error
    return target, difference


def new_file_problems(option: str, path: Path) -> list[str]:
    """Returns a message for each reason why an option cannot name `path` as a new file; empty if there is none."""
    if path.exists() or path.is_symlink():
        return [f"{option} {path} exists: name another file, or remove it"]
    if not path.parent.is_dir():
        return [f"{option} {path}: the folder {path.parent} does not exist: create it, or name another file"]
    return []


def _problems(form: str, target: Path) -> list[str]:
    problems = new_file_problems("--out", target)
    if form not in get_args(Form):
        problems.append(f"--as {form!r} is unknown: use one of {', '.join(get_args(Form))}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        problems.append(f"--as onnx needs {', '.join(missing)}: pip install 'abtrain[onnx]'")
    return problems


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    """Returns the bytes that `save` writes. They stay in memory, because libraries report disk errors differently."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _dense(run: FinishedRun, path: Path) -> nn.Module:
    model = run.dense()
    model.load_state_dict(load_file(path))
    return model


def _program(run: FinishedRun, path: Path) -> nn.Module:
    # torch warns about a path whose name does not end in .pt2.
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx_bytes(run: FinishedRun, x: Tensor) -> bytes:
    program = torch.onnx.export(run.plain(), (x,), dynamo=True, dynamic_shapes=_BATCH, verbose=False)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _onnx(run: FinishedRun, path: Path) -> nn.Module:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    class Runtime(nn.Module):
        """Runs an ONNX file in ONNX Runtime as if it were a module."""

        def forward(self, x: Tensor) -> Tensor:
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            return torch.from_numpy(found)

    return Runtime()


class _Format(NamedTuple):
    """The file format of one form of a model.

    Attributes:
        suffix: the end of the file's name.
        content: a function that takes a run and inputs for its model, and returns the content of the file.
        loaded: a function that takes a run and the path of such a file, and returns the model in the file.
    """

    suffix: str
    content: Callable[[FinishedRun, Tensor], bytes]
    loaded: Callable[[FinishedRun, Path], nn.Module]


_BATCH = ({0: torch.export.Dim.AUTO},)
"""The shapes for the exporters: the batch, which is the first dimension of the input, may have any size."""
_FORMATS: dict[Form, _Format] = {
    "plain": _Format(
        "-plain.pt",
        lambda run, x: _saved(partial(torch.save, run.plain())),
        lambda run, path: torch.load(path, weights_only=False),
    ),
    "dense": _Format(
        "-dense-weights.safetensors",
        lambda run, x: save({name: W.contiguous().clone() for name, W in run.dense().state_dict().items()}),
        _dense,
    ),
    "torch-export": _Format(
        ".pt2",
        lambda run, x: _saved(
            partial(torch.export.save, torch.export.export(run.plain(), (x,), dynamic_shapes=_BATCH))
        ),
        _program,
    ),
    "onnx": _Format(".onnx", _onnx_bytes, _onnx),
}


def needed_packages(run: FinishedRun) -> list[str]:
    """Returns the packages other than torch that must be installed to load the run's model from a `plain` file."""
    return sorted({type(module).__module__.split(".")[0] for module in run.plain().modules()} - {"torch"})
