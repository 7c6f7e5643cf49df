"""`abtrain export`: writes the model of a finished run in a form that runs without abtrain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from abtrain.commands.command_line import Shown, parse
from abtrain.commands.export.export import Form, export, needed_packages
from abtrain.commands.export.finished import find_run
from abtrain.commands.output import Output
from abtrain.commands.units import human_bytes


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


def main(arguments: Sequence[str]) -> None:
    """Runs `abtrain export`.

    Raises:
        ConfigurationError: the run or the file cannot be used, or a package is missing.
        DataError: the task's data is missing.
        CheckpointError: the file cannot be written, or its outputs differ from those of the run's model.
    """
    config = parse(ExportConfig, "export", arguments)
    # The exporters log their own progress.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    run = find_run(config.run, config.best)
    file, difference = export(run, config.form, config.out, config.data)
    console = Output()
    console.plain(f"written to {file} ({human_bytes(file.stat().st_size)})")
    console.print(f"Its outputs are within {difference:.0e} of the trained model's.")
    needed = needed_packages(run) if config.form == "plain" else []
    if needed:
        console.print(
            f"To load it, install {', '.join(needed)} as well, for the model's own modules. "
            "For a file that needs only torch, use --as torch-export."
        )
