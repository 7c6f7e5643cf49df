"""The `abtrain` command: runs a subcommand and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from abtrain.commands.process import (
    SIGNALS,
    Requests,
    ends_with_its_reader,
    handling,
    ignore_all,
    leave,
    stopped_message,
)
from abtrain.commands.train.world import WorldError, check_world, is_first, is_joined
from abtrain.errors import AbtrainError, ConfigurationError, StoppedError
from abtrain.version import __version__

# Each command imports its modules when it is called, and torch, which takes seconds, only after it has parsed its
# arguments. `--help` and mistakes are therefore answered immediately.


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the subcommand that the arguments name, and exits with 0 or with the exit code of its error."""
    parser = argparse.ArgumentParser(
        prog="abtrain", description="Train PyTorch models on machines joined by slow links.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"abtrain {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (purpose, _) in COMMANDS.items():
        # The command parses its own arguments, including --help.
        commands.add_parser(name, help=purpose, add_help=False)
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Arguments after -- belong to another program and are passed on unchanged.
    own = given.index("--") if "--" in given else len(given)
    with ends_with_its_reader():
        chosen, rest = parser.parse_known_args(given[:own])
        _, command = COMMANDS[chosen.command]
        is_program = arguments is None
        code = _run(command, [*rest, *given[own:]], last=is_program)
        if chosen.command == "train" and (is_program or is_joined()):
            # A signal during Python's shutdown would end the process and lose the exit code.
            leave(code)
        sys.exit(code)


def _train(arguments: Sequence[str]) -> None:
    check_world()
    with handling(_ended_at_once):
        from abtrain.commands.command_line import parse
        from abtrain.commands.train.config import TrainConfig
        from abtrain.commands.train.config_file import from_toml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(arguments)[0].config
    config = parse(TrainConfig, "train", arguments, TrainConfig() if file is None else from_toml(file))

    with handling(_ended_at_once):
        from abtrain.commands.train.launch import run

    run(config)


def _recipes(arguments: Sequence[str]) -> None:
    from abtrain.commands.command_line import parse
    from abtrain.commands.plan.settings import RecipesConfig

    config = parse(RecipesConfig, "recipes", arguments)

    from abtrain.commands.plan.recipes_command import list_recipes

    list_recipes(config)


def _plan(arguments: Sequence[str]) -> None:
    from abtrain.commands.command_line import parse
    from abtrain.commands.plan.settings import PLAN_EXAMPLE, PlanConfig

    config = parse(PlanConfig, "plan", arguments, examples=f"example for a model of one's own:\n  {PLAN_EXAMPLE}")

    from abtrain.commands.plan.plan_command import plan

    plan(config)


def _export(arguments: Sequence[str]) -> None:
    from abtrain.commands.command_line import parse
    from abtrain.commands.export.settings import ExportConfig

    config = parse(ExportConfig, "export", arguments)

    from abtrain.commands.export.command import export_run

    export_run(config)


def _inspect(arguments: Sequence[str]) -> None:
    from abtrain.commands.command_line import parse
    from abtrain.commands.export.settings import InspectConfig

    config = parse(InspectConfig, "inspect", arguments)

    from abtrain.commands.export.inspect_command import inspect_model

    inspect_model(config)


def _compare(arguments: Sequence[str]) -> None:
    from abtrain.commands.compare.arguments import parser

    given = parser().read(arguments)

    from abtrain.commands.compare.command import compare

    compare(given, shlex.join(("abtrain", "compare", *arguments)))


def _paper(arguments: Sequence[str]) -> None:
    from abtrain.commands.paper.arguments import parse_arguments

    request = parse_arguments(arguments)

    from abtrain.commands.paper.command import paper

    paper(request, shlex.join(("abtrain", "paper", *arguments)))


def _lab(arguments: Sequence[str]) -> None:
    from abtrain.commands.lab import command

    command.main(arguments)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "train": ("train a task with a recipe", _train),
    "export": ("write the model of a run in a form that runs without abtrain", _export),
    "inspect": ("show how much smaller and faster factors make a model", _inspect),
    "recipes": ("list the recipes with their phases and predicted traffic", _recipes),
    "plan": ("recommend a recipe for your links, and predict bytes and seconds", _plan),
    "compare": ("compare recipes on an emulated cluster, and write a report (Linux, root)", _compare),
    "paper": ("run the paper's experiments, and write its tables and figures", _paper),
    "lab": ("run a script on an emulated cluster with slow links (Linux, root)", _lab),
}


def _run(command: Callable[[Sequence[str]], None], arguments: Sequence[str], last: bool = False) -> int:
    """Runs a command and returns its exit code.

    If this is the `last` action of the program, requests to stop that arrive after the command are ignored.
    """
    requests, over = Requests(), False

    def stop(number: int, frame: FrameType | None) -> None:
        first = not requests.number
        # A repetition of the same request must not interrupt what the first one has started.
        if (requests.note(number) or first) and not over:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(stopped_message(number))

    # Commands set their own handlers only after imports that take seconds.
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        command(arguments)
    except AbtrainError as error:
        over = True
        return _fail(error)
    except KeyboardInterrupt:
        over = True
        return _fail(StoppedError(stopped_message(signal.SIGINT)))
    finally:
        over = True
        if last:
            ignore_all()
        for number, handler in before.items():
            # A worker that is about to end ignores signals, and must keep ignoring them.
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
    return 0


def _ended_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at a request to stop. A module that is being imported could catch an exception instead."""
    os._exit(_fail(StoppedError(stopped_message(number))))


def _fail(error: AbtrainError) -> int:
    """Prints an error and returns its exit code. If all workers have the same error, only the first prints it."""
    # Wrong settings and requests to stop concern all workers: the first one reports them.
    shared = isinstance(error, ConfigurationError | StoppedError) and not isinstance(error, WorldError)
    if is_first() or not shared:
        problems = error.problems if isinstance(error, ConfigurationError) else (str(error),)
        for problem in problems:
            print(f"abtrain: error: {problem}", file=sys.stderr, flush=True)
    return error.exit_code
