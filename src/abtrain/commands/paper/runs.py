"""Plans the runs of an experiment, executes them, and reads their outcomes.

Each run has a folder that is named after its settings. Experiments with equal settings thus share runs. The folder
contains the request (see `abtrain.commands.runs.request`), and either result.json or the run folder of `abtrain train`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from abtrain.comm.topology import Topology
from abtrain.commands.files import write_json
from abtrain.commands.paper.experiments import Cell, ScaleName
from abtrain.commands.paper.launcher import exit_code_of
from abtrain.commands.paper.published import BACKWARD_SHARE
from abtrain.commands.plan.collectives import Cluster, NodeLink
from abtrain.commands.plan.forecast import WorkerSeconds, forecast
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.shapes import ModelShapes, shapes_of
from abtrain.commands.plan.totals import payload_ratio
from abtrain.commands.runs.folder_run import FolderRun, check_folders, run_once, writing
from abtrain.commands.runs.request import RECORD_FILE, REQUEST_FILE, TRAIN_FOLDER, request_differences, write_request
from abtrain.commands.runs.result_files import JsonRecord, is_empty, read_record
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, group_size_of, recipe_of, resolve
from abtrain.commands.train.config_file import from_toml
from abtrain.commands.train.folder_content import RESULT_FILE
from abtrain.errors import AbtrainError, ConfigurationError

CHECKPOINTS, LEAST_BETWEEN_CHECKPOINTS = 50, 100
"""A run at full scale writes about 50 checkpoints, but not more often than every 100 steps."""
TINY_LINK = NodeLink(rate=1e9, latency=1e-4)
"""The links of the cluster for which the seconds of simulated runs are forecast: 1 Gbit/s, 0.1 ms."""
_FAILURE_FILE = ".failed"


@dataclass(frozen=True)
class PaperRun(FolderRun):
    """One run of an experiment: the settings of a cell of its table, with a seed."""

    cell: Cell
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"

    @property
    def config(self) -> TrainConfig:
        return dataclasses.replace(self.cell.config, seed=self.seed)

    @property
    def result_file(self) -> Path:
        """The path of the result file, which may not exist yet. Simulated runs have no folder of `abtrain train`."""
        trained = self.folder / TRAIN_FOLDER / RESULT_FILE
        return trained if os.path.lexists(trained) else self.folder / RESULT_FILE

    @property
    def results(self) -> tuple[Path, ...]:
        return (self.result_file,)

    def check_results(self) -> None:
        result = self.result_file
        # A simulated run replaces an empty file, but `abtrain train` refuses a folder with an empty result file.
        if os.path.lexists(result) and not (result.parent == self.folder and is_empty(result)):
            outcome(self)


@dataclass(frozen=True)
class PaperOutcome:
    """The outcome of one run.

    Attributes:
        cell, seed: the cell and the seed of the run.
        top1: the validation accuracy in percent.
        compression: the parameters of the full model divided by those of the factored model.
        payload: the bytes that a worker passed to collectives between nodes in the whole run.
        internode_ratio: the bytes that a node passed to other nodes, divided by those of DDP, which sends all gradients
            in float32 at every step.
        seconds: the seconds of training. For a simulated run, this is a forecast for a cluster with `TINY_LINK`.
        traffic: the scaled traffic of a node in GB/s, as defined for Table II.
        version: the version of abtrain that executed the run; None if the result file does not contain it.
    """

    cell: Cell
    seed: int
    top1: float
    compression: float
    payload: float
    internode_ratio: float
    seconds: float
    traffic: float
    version: str | None = None


def plan_runs(cells: Iterable[Cell], seeds: int, out: Path) -> list[PaperRun]:
    """Returns the runs of these cells with all seeds. A run that several cells share is listed once.

    The runs with the first seed come first, so that all cells have a result early.
    """
    chosen = list(cells)
    runs = [PaperRun(cell, seed, out / "runs" / _name(cell, seed)) for seed in range(seeds) for cell in chosen]
    return list({run.folder: run for run in runs}.values())


def run_all(
    runs: Sequence[PaperRun],
    scale: ScaleName,
    launcher: str,
    data: Path | None,
    say: Callable[[str], None],
    overwrite: bool = False,
) -> None:
    """Executes all unfinished runs, one after the other. An error does not remove finished runs.

    Args:
        runs: the runs of an experiment.
        scale: the size of the runs. At scale `tiny`, runs are simulated in this process. At scale `full`, the launcher
            starts them.
        launcher: the command line that starts the workers. Its placeholders are {nodes} and {workers_per_node}.
        data: the folder with the data; None for its default place.
        say: a function that is called with a line of text for each run.
        overwrite: whether runs with other settings are replaced.

    Raises:
        ConfigurationError: some folders contain runs with other settings. No run has started.
        DataError: some result files are damaged. No run has started.
        AbtrainError: a run failed.
    """
    check_folders(runs, overwrite)
    load = cache(lambda task: TASKS[task].load(data))

    def run_one(run: PaperRun) -> None:
        if scale == "tiny":
            samples = load(run.config.task)
            prepare_folder(run, overwrite)
            _simulate(run, samples)
        else:
            prepare_folder(run, overwrite, checkpoints=True)
            _launch(run, launcher, data)

    run_once(runs, nullcontext(run_one), say, lambda run: _in_short(outcome(run)))


def _in_short(result: PaperOutcome) -> str:
    return f"top-1 {result.top1:.2f}, {100 * result.internode_ratio:.2f} % of DDP's bytes"


def _simulate(run: PaperRun, data: Any) -> None:
    from abtrain.commands.train.simulate import simulate

    result = simulate(resolve(dataclasses.replace(run.config, device="cpu")), data)
    with writing(run.folder):
        write_json(run.folder / RESULT_FILE, result)


def _launch(run: PaperRun, launcher: str, data: Path | None) -> None:
    """Executes a run at full scale with the launcher. It resumes from its last checkpoint if there is one.

    Raises:
        StoppedError: this process received a request to stop, and the launcher has ended.
        AbtrainError: the run failed. The error has the exit code of the worker that failed first.
    """
    command = launch_command(run, launcher, data)
    try:
        code = exit_code_of(command, run.folder / _FAILURE_FILE)
    except OSError as error:
        raise AbtrainError(f"{run}: {command[0]} cannot be started: {error}. Name another --launcher") from error
    if code:
        failure = AbtrainError(
            f"{run}: `{shlex.join(command)}` ended with exit code {code}: look at its output, and run again to continue"
        )
        failure.exit_code = code if code > 0 else AbtrainError.exit_code
        raise failure


def launch_command(run: PaperRun, launcher: str, data: Path | None) -> list[str]:
    """Returns the command line that starts a run at full scale."""
    per_node = run.config.workers // run.cell.nodes
    start = shlex.split(launcher.format(nodes=run.cell.nodes, workers_per_node=per_node))
    place = ["--out", str(run.folder / TRAIN_FOLDER), *(["--data", str(data)] if data is not None else [])]
    return [*start, "-m", "abtrain", "train", "--config", str(run.folder / REQUEST_FILE), *place]


def prepare_folder(run: PaperRun, overwrite: bool = False, checkpoints: bool = False) -> None:
    """Writes the request of a run, which is its settings, into its folder, unless that has an equal request.

    Args:
        run: the run whose folder is prepared.
        overwrite: whether a run with other settings is removed.
        checkpoints: whether the run writes checkpoints. Runs that differ only in this count as equal.

    Raises:
        ConfigurationError: the folder contains a run with other settings.
    """
    run.make_room(overwrite)
    config = run.config
    if checkpoints:
        assert config.steps is not None
        every = max(LEAST_BETWEEN_CHECKPOINTS, config.steps // CHECKPOINTS)
        config = dataclasses.replace(config, checkpoint_every=every)
    if not (run.done or _asks_for(run, checkpoints)):
        write_request(run.folder, config)


def _asks_for(run: PaperRun, checkpoints: bool) -> bool:
    """Returns whether the folder has a request for this run, in which checkpoints are on if `checkpoints` is set."""
    if not (run.folder / RECORD_FILE).exists() or request_differences(run.folder, run.config):
        return False
    try:
        return not checkpoints or from_toml(run.folder / REQUEST_FILE).checkpoint_every > 0
    except ConfigurationError:  # a version of abtrain with other settings wrote it
        return False


def outcome(run: PaperRun) -> PaperOutcome:
    """Reads the outcome of a finished run.

    Raises:
        DataError: the result file is damaged.
    """
    result = read_record(run.result_file)
    payload = result.number("payload_bytes", "between_groups")
    by_phase = result.content["payload_bytes"].get("of_group", {})
    of_node = sum(result.number("payload_bytes", "of_group", phase) for phase in by_phase) if by_phase else payload
    seconds = result.positive("seconds", "total")
    if "cpu_seconds_per_step" in result.content:
        seconds = _forecast(run.config, result)
    return PaperOutcome(
        cell=run.cell,
        seed=run.seed,
        top1=result.number("top1"),
        compression=result.positive("compression"),
        payload=payload,
        internode_ratio=payload_ratio(of_node, result.positive("parameters"), result.positive("steps")),
        seconds=seconds,
        traffic=payload * group_size_of(run.config) / (BACKWARD_SHARE * seconds) / 1e9,
        version=result.optional_text("versions", "abtrain"),
    )


def _forecast(config: TrainConfig, result: JsonRecord) -> float:
    """Forecasts the seconds of a simulated run on a cluster with `TINY_LINK`. The ranks come from the run's result."""
    import torch

    recipe = recipe_of(config)
    with torch.device("meta"):
        shapes = shapes_of(TASKS[config.task].model(), recipe.factoring)
    topology = Topology(config.workers, group_size_of(config))
    ranks = [_ranks(entry, shapes) for entry in result.records("ranks")]
    stretches = predict(recipe, shapes, topology, ranks)
    cluster = Cluster(config.workers // group_size_of(config), TINY_LINK, group_size_of(config))
    alone = WorkerSeconds(result.positive("cpu_seconds_per_step"))
    return forecast(stretches, cluster, alone, group_size=group_size_of(config)).seconds


def _ranks(entry: JsonRecord, shapes: ModelShapes) -> dict[str, int]:
    """Returns the rank k of each weight after one decomposition.

    Raises:
        DataError: a rank in the result file is not possible for the weights of the model.
    """
    found, matrices = entry.counts("ranks"), shapes.matrices()
    for name, k in found.items():
        if name not in matrices or not 1 <= k <= matrices[name].n:
            raise entry.error(("ranks", name), k, "a possible rank for a weight of this model")
    return found


def _name(cell: Cell, seed: int) -> str:
    config = cell.config
    size = f"{config.workers}x{config.batch_size}-{config.steps}"
    variant = f"-{re.sub('[^A-Za-z0-9.]+', '-', cell.variant).strip('-')}" if cell.variant else ""
    return f"{config.task}-{config.recipe_name}-{size}{variant}-seed{seed}"
