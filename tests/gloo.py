"""Real Gloo ranks for tests: processes that stay alive from test to test.

    results = run_gloo(2, worker, "an argument", group_size=1)

`worker` is a module-level function `(comm, *args) -> result`; arguments and results have to be picklable. Inside a rank
warnings are errors, as they are for pytest. Ranks find each other through a file and talk over the loopback device.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from abtrain.comm import Meter, Topology, TorchCommunicator
from tests import forks

RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

# Time for the other ranks to end by themselves once one has failed.
GRACE_SECONDS = 5.0


class RankFailed(Exception):
    """Ranks that raised, died or did not end, with their tracebacks."""


def run_gloo(
    world_size: int,
    worker: Callable[..., Any],
    *args: Any,
    group_size: int = 1,
    timeout: float = 60.0,
    environments: Sequence[Mapping[str, str]] | None = None,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Runs `worker(comm, *args)` on every rank of a Gloo world; returns the results in rank order.

    Args:
        world_size: how many ranks.
        worker: a picklable function.
        args: its arguments after the communicator.
        group_size: ranks in a group.
        timeout: seconds after which the ranks are killed.
        environments: for each rank, variables to set before it starts. If there are any, its process is a new one that
            imports torch itself, so that variables read on import take effect.
        may_die: ranks whose process may end; their result is then None. All processes are then new ones.

    Raises:
        RankFailed: a rank raised an error, died or did not end in time.
    """
    crew = _shared_crew() if environments is None and not may_die else _Crew(environments or [{}] * world_size)
    try:
        results = crew.run(world_size, worker, args, group_size, timeout, may_die)
    except BaseException:
        # Ranks may hang in a collective: the next test gets new ones.
        crew.close()
        raise
    if crew is not _shared:
        crew.close()
    return results


class _Crew:
    """Processes that form one world after another."""

    def __init__(self, environments: Sequence[Mapping[str, str]] = ()) -> None:
        self.closed = False
        self._folder = Path(tempfile.mkdtemp(prefix="gloo-"))
        self._worlds = 0
        self._size = 0
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        for environment in environments:
            self._start(environment)

    def run(
        self,
        world_size: int,
        worker: Callable[..., Any],
        args: tuple[Any, ...],
        group_size: int,
        timeout: float,
        may_die: Collection[int],
    ) -> list[Any]:
        while len(self._pipes) < world_size:
            self._start({})
        if world_size != self._size:
            self._size, self._worlds = world_size, self._worlds + 1
        store = str(self._folder / f"world-{self._worlds}")
        for rank in range(world_size):
            # Plain pickle copies a tensor; that of `Connection.send` would share its memory.
            self._pipes[rank].send_bytes(pickle.dumps((store, rank, world_size, group_size, worker, args)))
        return self._collect(time.monotonic() + timeout, may_die)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn") if environment else forks.context()
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, RANK_ENVIRONMENT), daemon=True)
        with _environment({**RANK_ENVIRONMENT, **environment}):
            process.start()
        there.close()
        self._processes.append(process)
        self._pipes.append(here)

    def _collect(self, deadline: float, may_die: Collection[int]) -> list[Any]:
        results: dict[int, Any] = {}
        errors: list[str] = []
        while len(results) < self._size:
            pending = [rank for rank in range(self._size) if rank not in results]
            ready = wait([self._pipes[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"ranks {pending} did not end")
                break
            for rank in [rank for rank in pending if self._pipes[rank] in ready]:
                results[rank], error = self._receive(rank, may_die)
                if error:
                    errors.append(f"rank {rank} {error}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if errors:
            raise RankFailed("\n".join(errors))
        return [results[rank] for rank in range(self._size)]

    def _receive(self, rank: int, may_die: Collection[int]) -> tuple[Any, str]:
        try:
            result, error = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return None, "" if rank in may_die else f"died with exit code {self._processes[rank].exitcode}"
        return result, error


_shared: _Crew | None = None


def _shared_crew() -> _Crew:
    global _shared
    if _shared is None or _shared.closed:
        _shared = _Crew()
        atexit.register(_shared.close)
    return _shared


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, environment: Mapping[str, str]) -> None:
    """Runs one worker after another until the pipe closes."""
    os.environ.update(environment)
    warnings.simplefilter("error")
    joined = ""
    communicators: dict[int, TorchCommunicator] = {}
    while True:
        try:
            store, rank, world_size, group_size, worker, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if store != joined:
                _join(store, rank, world_size)
                joined = store
                # Process groups cannot be destroyed one by one, so each group size keeps its own.
                communicators = {}
            if group_size not in communicators:
                communicators[group_size] = TorchCommunicator(Topology(world_size, group_size))
            comm = communicators[group_size]
            comm.meter = Meter()
            reply = pickle.dumps((worker(comm, *args), ""))
        except BaseException:
            reply = pickle.dumps((None, f"raised\n{traceback.format_exc()}"))
        pipe.send_bytes(reply)


def _join(store: str, rank: int, world_size: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
