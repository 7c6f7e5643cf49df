"""Defines the settings of `abtrain export` and `abtrain inspect`. Does not import torch, which would delay `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from abtrain.commands.command_line import Shown

Form = Literal["plain", "dense", "torch-export", "onnx"]


@dataclass(frozen=True)
class ExportConfig:
    """Write the model of a finished run in a form that runs without abtrain, and check its outputs."""

    run: Annotated[Path, Shown(positional=True)]
    """Run folder of a finished `abtrain train`."""
    form: Annotated[Form, Shown(name="as")] = "plain"
    """plain: a pickled model of plain PyTorch modules; dense: safetensors of dense weights, by the names of the model;
    torch-export: a .pt2 file for torch.export.load; onnx: for ONNX Runtime."""
    out: Path | None = None
    """File to write; by default in the run folder. An existing file is not overwritten."""
    best: bool = False
    """Use the best model of all validations instead of the last one."""
    data: Path | None = None
    """Folder with the task's data; by default the one that the run used."""


@dataclass(frozen=True)
class InspectConfig:
    """Show what the factors of a model save: by weight, and, for a run, in size, top-1 and latency."""

    model: Annotated[Path, Shown(positional=True)]
    """Folder of a finished run, or a safetensors file."""
    best: bool = False
    """Use the best model of all validations instead of the last one."""
    data: Path | None = None
    """Folder with the task's data; by default the one that the run used."""
    plot: Path | None = None
    """PNG file for the spectra of the factored weights. An existing file is not overwritten."""
