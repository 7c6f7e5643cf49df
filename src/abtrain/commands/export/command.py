"""`abtrain export`: writes the model of a finished run in a form that runs without abtrain."""

from __future__ import annotations

import logging

from abtrain.commands.export.export import export, needed_packages
from abtrain.commands.export.finished import find_run
from abtrain.commands.export.settings import ExportConfig
from abtrain.commands.output import Output
from abtrain.commands.units import human_bytes


def export_run(config: ExportConfig) -> None:
    """Runs `abtrain export`.

    Raises:
        ConfigurationError: the run or the file cannot be used, or a package is missing.
        DataError: the task's data is missing.
        CheckpointError: the file cannot be written, or its outputs differ from those of the run's model.
    """
    # The exporters log their own progress.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    run = find_run(config.run, config.best)
    file, difference = export(run, config.form, config.out, config.data)
    console = Output()
    console.plain(f"written to {file} ({human_bytes(file.stat().st_size)})")
    console.print(f"Its outputs are within {difference:.0e} of the trained model's.")
    larger = run.multiplied_out() if config.form != "dense" else ""
    if larger:
        console.print(f"In this file, {larger}.")
    needed = needed_packages(run) if config.form == "plain" else []
    if needed:
        console.print(
            f"To load it, install {', '.join(needed)} as well, for the model's own modules. "
            "For a file that needs only torch, use --as torch-export."
        )
