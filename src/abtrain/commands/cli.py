"""The `abtrain` command: finds the subcommand, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from abtrain.commands.train.requests import SIGNALS, Requests, ignore_all
from abtrain.commands.train.world import WorldError, check_world
from abtrain.errors import AbtrainError, ConfigurationError, StoppedError
from abtrain.version import __version__

# Each command imports what it needs when it is called, so that `abtrain --help` answers at once.


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, and exits with its code: 0, or that of the error."""
    parser = argparse.ArgumentParser(
        prog="abtrain", description="Train PyTorch models on machines joined by slow links.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"abtrain {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (purpose, _) in COMMANDS.items():
        # The command parses its own arguments, --help among them.
        commands.add_parser(name, help=purpose, add_help=False)
    given = sys.argv[1:] if arguments is None else list(arguments)
    # What stands behind -- belongs to another program, and is handed on as it is.
    own = given.index("--") if "--" in given else len(given)
    chosen, rest = parser.parse_known_args(given[:own])
    _, command = COMMANDS[chosen.command]
    is_program = arguments is None
    code = _run(command, [*rest, *given[own:]], last=is_program)
    if chosen.command == "train" and (is_program or "RANK" in os.environ):
        # While Python takes itself apart a signal would end the process, and the code would be lost.
        from abtrain.commands.process import leave

        leave(code)
    sys.exit(code)


def _train(arguments: Sequence[str]) -> None:
    check_world()
    with _ended_at_once():
        import tyro

        from abtrain.commands.train.config import TrainConfig
        from abtrain.commands.train.config_file import from_toml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(arguments)[0].config
    defaults = TrainConfig() if file is None else from_toml(file)
    config = tyro.cli(TrainConfig, prog="abtrain train", args=arguments, default=defaults)

    with _ended_at_once():
        from abtrain.commands.train.launch import run

    run(config)


def _recipes(arguments: Sequence[str]) -> None:
    import tyro

    from abtrain.commands.plan.settings import RecipesConfig

    config = tyro.cli(RecipesConfig, prog="abtrain recipes", args=arguments)

    from abtrain.commands.plan.recipes_command import list_recipes

    list_recipes(config)


def _plan(arguments: Sequence[str]) -> None:
    import tyro

    from abtrain.commands.plan.settings import PlanConfig

    config = tyro.cli(PlanConfig, prog="abtrain plan", args=arguments)

    from abtrain.commands.plan.plan_command import plan

    plan(config)


def _lab(arguments: Sequence[str]) -> None:
    from abtrain.commands.lab.command import main

    main(arguments)


def _compare(arguments: Sequence[str]) -> None:
    from abtrain.commands.compare.command import main

    main(arguments)


def _paper(arguments: Sequence[str]) -> None:
    from abtrain.commands.paper.command import main

    main(arguments)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "train": ("train a task by a recipe", _train),
    "recipes": ("list the recipes, and what each would send", _recipes),
    "plan": ("predict bytes and seconds on given links, and recommend a recipe", _plan),
    "compare": ("train a task by several recipes on an emulated cluster, and report (Linux, root)", _compare),
    "paper": ("the paper's experiments, tables, figures and arithmetic", _paper),
    "lab": ("run a script on an emulated cluster with slow links (Linux, root)", _lab),
}


def _run(command: Callable[[Sequence[str]], None], arguments: Sequence[str], last: bool = False) -> int:
    """Runs a command; its exit code.

    Args:
        command: to run.
        arguments: of it.
        last: whether the program ends with it. A request that comes once the code is decided changes nothing then.
    """
    requests, over = Requests(), False

    def stop(number: int, frame: FrameType | None) -> None:
        first = not requests.number
        # The same request, seen again, must not disturb what the first one has begun.
        if (requests.note(number) or first) and not over:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(_stopped(number))

    # What a command does about signals itself comes later, behind imports that take seconds.
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        command(arguments)
    except AbtrainError as error:
        over = True
        return _fail(error)
    except KeyboardInterrupt:
        over = True
        return _fail(StoppedError(_stopped(signal.SIGINT)))
    finally:
        over = True
        if last:
            ignore_all()
        for number, handler in before.items():
            # A worker at its end ignores signals from here on, and has to.
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
    return 0


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Inside it, a request to stop ends the process at once: amid an import, an error may be caught and lost."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(_fail(StoppedError(_stopped(number))))

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: int) -> str:
    return f"stopped on request ({signal.Signals(number).name})"


def _fail(error: AbtrainError) -> int:
    """Says what went wrong, once for all workers; the exit code."""
    rank = os.environ.get("RANK", "0")
    # Settings are wrong on all workers, and all are stopped: the first speaks for them.
    alike = isinstance(error, ConfigurationError | StoppedError) and not isinstance(error, WorldError)
    if rank == "0" or not alike:
        problems = error.problems if isinstance(error, ConfigurationError) else (str(error),)
        for problem in problems:
            print(f"abtrain: error: {problem}", file=sys.stderr, flush=True)
    return error.exit_code
