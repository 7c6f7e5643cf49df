"""Searches hyperparameters of the recipes `ab` and `ab_outer` with optuna.

For `ab` these are the paper's four (Section IV.C), and the steps in which the learning rate rises again. At tiny scale,
trials are simulated runs (`abtrain.commands.train.simulate`). At full scale, they are runs on one node. A trial begins
with a short run. If its result is bad, or the loss is not finite, the trial is pruned: it ends without a long run. A
file stores the trials, so the same command continues a search, and a larger --trials extends it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from abtrain import recipes
from abtrain.commands.figures import COLOURS, Figure, save
from abtrain.commands.files import write_json
from abtrain.commands.output import Output
from abtrain.commands.page import Table
from abtrain.commands.paper.arguments import PaperRequest
from abtrain.commands.paper.experiments import Cell
from abtrain.commands.paper.pages import write_paper_page
from abtrain.commands.paper.runs import PaperRun, outcome, run_all
from abtrain.commands.runs.folder_run import writing
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.simulate import simulate
from abtrain.errors import AbtrainError, ConfigurationError, NonFiniteError
from abtrain.recipes.paper import AB_SHARE

FILE = "search.db"
RUNGS = (0.25, 1.0)
"""The lengths of a trial's runs, as shares of the steps. A trial may be pruned after the short run."""
_WORKERS, _BATCH, _FULL_BATCH = 4, 32, 256
_RECIPES = ("ab", "ab_outer")


def suggested(recipe: str, trial: Any, steps: int) -> dict[str, Any]:
    """Returns options for a recipe, with the values that optuna suggests for a trial.

    Args:
        recipe: the recipe, `ab` or `ab_outer`.
        trial: a trial of optuna.
        steps: the number of steps of the run. Options that are numbers of steps depend on it.
    """
    if recipe == "ab":
        group = max(2, round(steps * trial.suggest_float("ab_share", AB_SHARE / 4, AB_SHARE * 4, log=True)))
        return {
            "warmup_steps": round(steps * trial.suggest_float("warmup_share", 0.05, 0.5)),
            "ab_steps": group,
            "rebound_steps": max(1, round(group * trial.suggest_float("rebound_share", 0.05, 1.0))),
            "sigma_cutoff": trial.suggest_float("sigma_cutoff", 0.05, 0.5),
            "lr_rebound_steps": round(group * trial.suggest_float("lr_rebound_share", 0.0, 1.0)),
            "svd": "shared",
        }
    every = min(trial.suggest_int("every", 5, 80, log=True), max(steps // 4, 1))
    warmup = every * max(1, round(steps * trial.suggest_float("warmup_share", 0.05, 0.5) / every))
    return {
        "every": every,
        "warmup_steps": min(warmup, steps // 2),
        "sigma_cutoff": trial.suggest_float("sigma_cutoff", 0.05, 0.5),
        "outer_lr": trial.suggest_float("outer_lr", 0.3, 1.2),
        "outer_momentum": trial.suggest_float("outer_momentum", 0.0, 0.95),
        "svd": "shared",
    }


def search(request: PaperRequest, console: Output, command: str) -> None:
    """Runs trials until each recipe has the requested number, and writes hpo-RECIPE.json, the figures and hpo.html.

    Trials that were pruned or failed count as well.

    Args:
        request: the settings from the command line.
        console: the console for progress.
        command: the command line that the page shows.

    Raises:
        ConfigurationError: optuna is not installed, or the folder cannot be written.
        DataError: the data is not available.
    """
    optuna = _optuna()
    with writing(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
        # An empty file is a valid database. optuna's own error for a folder that cannot be written has a traceback.
        (request.out / FILE).touch()
    base = _base(request)
    train = _trainer(request, base)
    tables, figures = list[Table](), list[Figure]()
    for recipe in _RECIPES:
        study = optuna.create_study(
            study_name=f"{base.task}-{recipe}",
            storage=f"sqlite:///{(request.out / FILE).absolute()}",
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=0),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        )
        finished = [trial for trial in study.trials if trial.state.is_finished()]
        console.plain(f"{recipe}: {len(finished)} of {request.trials} trials done before")
        objective = functools.partial(_objective, recipe=recipe, base=base, train=train, say=console.plain)
        study.optimize(objective, n_trials=max(request.trials - len(finished), 0))
        with writing(request.out):
            table, figure = _written(study, recipe, request.out)
        tables.append(table)
        figures += figure
    parts: list[Table | Figure] = [*tables, *figures]
    with writing(request.out):
        page = write_paper_page("hpo", f"Hyperparameters of {base.task}", parts, request.out, command)
    console.plain(f"written to {page}")


def _base(request: PaperRequest) -> TrainConfig:
    """Returns the settings that all trials share. The model is the paper's mini ViT on CIFAR-100, or the small CNN."""
    task, batch = ("fashion-cnn", _BATCH) if request.scale.name == "tiny" else ("cifar100-mini-vit", _FULL_BATCH)
    steps = 240 if request.scale.name == "tiny" else TASKS[task].steps
    device = "cpu" if request.scale.name == "tiny" else "auto"
    return TrainConfig(task=task, workers=_WORKERS, batch_size=batch, steps=steps, device=device)


def _trainer(request: PaperRequest, base: TrainConfig) -> Callable[[TrainConfig, int], float]:
    """Returns a function that trains with the settings of a trial and returns the top-1 accuracy in percent."""
    if request.scale.name == "tiny":
        data = TASKS[base.task].load(request.data)
        return lambda config, trial: float(simulate(resolve(config), data)["top1"])
    TASKS[base.task].find(request.data)

    def on_a_node(config: TrainConfig, trial: int) -> float:
        folder = request.out / "trials" / f"{config.recipe_name}-{trial}-{config.steps}"
        run = PaperRun(Cell("global", config.task, config.recipe_name, 1, config), config.seed, folder)
        run_all([run], "full", request.launcher, request.data, lambda line: None, request.overwrite)
        return outcome(run).top1

    return on_a_node


def _objective(
    trial: Any, recipe: str, base: TrainConfig, train: Callable[[TrainConfig, int], float], say: Callable[[str], None]
) -> float:
    """Returns the top-1 accuracy of a trial in percent.

    Prunes the trial if its short run is worse than the median of earlier trials, or if a loss is not finite.
    """
    import optuna

    assert base.steps is not None
    top1 = 0.0
    for share in RUNGS:
        steps = max(round(share * base.steps), 10)
        config = dataclasses.replace(base, recipe=recipes.write(recipe, suggested(recipe, trial, steps)), steps=steps)
        try:
            top1 = train(config, trial.number)
        except AbtrainError as error:
            # A launched worker has this exit code; a simulated one raises the error.
            if error.exit_code != NonFiniteError.exit_code:
                raise
            raise optuna.TrialPruned(str(error)) from error
        trial.report(top1, round(100 * share))
        if share < 1 and trial.should_prune():
            raise optuna.TrialPruned(f"{top1:.2f} after {steps} steps")
    say(f"{recipe}, trial {trial.number}: top-1 {top1:.2f} with {_short(trial.params)}")
    return top1


def _short(parameters: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in parameters.items())


def _written(study: Any, recipe: str, out: Path) -> tuple[Table, list[Figure]]:
    """Writes hpo-RECIPE.json, and returns a table of the best trials and a figure of the parameters' importance.

    There is no figure if fewer than three trials are complete.
    """
    import optuna

    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    best = sorted(done, key=lambda trial: -trial.value)[:10]
    record = [{"top1": trial.value, **trial.params} for trial in best]
    names = sorted({name for trial in best for name in trial.params})
    lines = tuple((f"{t.value:.2f}", *(f"{t.params[name]:.3g}" for name in names)) for t in best)
    note = f"{len(done)} trials are complete, {len(study.trials) - len(done)} were pruned or stopped."
    table = Table(f"The best trials of {recipe}", ("top-1 %", *names), lines, note)
    importance: dict[str, float] = {}
    if len(done) > 2:
        importance = dict(optuna.importance.get_param_importances(study))
    write_json(out / f"hpo-{recipe}.json", {"best": record, "importance": importance, "trials": len(study.trials)})
    if not importance:
        return table, []
    file = f"hpo-{recipe}.png"
    save(out / file, 1.2 + 0.4 * len(importance), lambda axes: _bars(axes, importance))
    caption = "The share of the variance of top-1 that each parameter explains (fANOVA), over complete trials."
    return table, [Figure(file, f"Importance of the parameters of {recipe}", caption)]


def _bars(axes: Any, importance: Mapping[str, float]) -> None:
    names = list(importance)[::-1]
    axes.barh(names, [100 * importance[name] for name in names], color=COLOURS[1], height=0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("importance in %")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("the search needs optuna: pip install 'abtrain[hpo]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
