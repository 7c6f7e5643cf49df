"""Who is missing when a worker is lost, and how long the others wait for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store  # type: ignore[attr-defined]

from abtrain.comm import peers
from abtrain.comm.peers import Peers, host_key
from abtrain.commands.train import worker
from abtrain.commands.train.config import TrainConfig, resolve
from abtrain.commands.train.join import meet
from abtrain.errors import AbtrainError, NonFiniteError, OutOfMemoryError, PeerLostError
from tests import forks


def told(store: Store, ranks: list[int], size: int, losses: dict[int, BaseException | None]) -> dict[int, str]:
    """Runs a roll call of workers, which are threads; a worker with an error in `losses` leaves word of it instead."""
    heard: dict[int, str] = {}

    def work(rank: int) -> None:
        one = Peers(store, rank, size)
        error = losses.get(rank)
        if error is None:
            heard[rank] = one.roll_call()
        else:
            one.leave_word(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return heard


@pytest.fixture
def store() -> Store:
    store = HashStore()
    for rank in range(4):
        store.set(host_key(rank), f"host{rank}")
    return store


def test_who_is_silent_is_named_with_its_host(store: Store) -> None:
    heard = told(store, [0, 2], 4, {})
    assert heard[0] == heard[2]
    assert heard[0].startswith("No message from rank 1 on host1, rank 3 on host3: it died, froze, is out of reach, ")
    assert heard[0].endswith("waits elsewhere, or ended early because it has fewer batches")


def test_who_ended_by_itself_is_quoted(store: Store) -> None:
    heard = told(
        store, [0, 1, 2, 3], 4, {1: NonFiniteError("the loss is nan\nat step 7"), 3: OutOfMemoryError("no room")}
    )
    said = "Rank 1 on host1 ended (NonFiniteError: the loss is nan); rank 3 on host3 ended (OutOfMemoryError: no room)"
    assert heard == {0: said, 2: said}


def test_where_all_are_there_it_was_a_link(store: Store) -> None:
    began = time.monotonic()
    heard = told(store, [0, 1, 2, 3], 4, {})
    assert set(heard.values()) == {"All others responded and lost a worker too: a link between them failed or is slow"}
    assert time.monotonic() - began < 2


def test_a_process_that_starts_no_threads_any_more_leaves_word(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.12 does while it shuts down."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        Peers(store, 1, 2).leave_word(ValueError("gone"))
    assert Peers(store, 0, 2).roll_call() == "Rank 1 on host1 ended (ValueError: gone)"


def test_one_of_those_that_come_to_a_place_is_the_first(store: Store) -> None:
    one, other = (Peers(store, rank, 2) for rank in range(2))
    assert [one.is_first("step 3"), other.is_first("step 3"), other.is_first("step 4")] == [True, False, True]
    # Again, as in a second run of the same workers.
    assert [other.is_first("step 3"), one.is_first("step 3")] == [True, False]
    assert Peers(Gone(), 0, 2).is_first("step 3")


class Gone(HashStore):
    """A store that was reached once, and is no more."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer")

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    def add(self, key: str, amount: int) -> int:
        raise dist.DistNetworkError("Connection reset by peer")


class Stuck(HashStore):
    """A store that does not answer, as if its link were cut."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(60)
        return False


@pytest.mark.parametrize("kind", [Gone, Stuck])
def test_a_store_that_is_gone_neither_hangs_nor_raises(kind: type[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(peers, "_STORE_SECONDS", 0.2)
    one = Peers(kind(), 0, 2)
    one.learn_hosts()
    one.leave_word(ValueError("x"))
    assert "torch.distributed's store cannot be reached" in one.roll_call()


def test_hosts_are_known_when_the_store_is_gone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Peers(store, 0, 2)
    one.learn_hosts()
    monkeypatch.setattr(peers, "_WAIT_SECONDS", 0.1)
    store.delete_key(host_key(1))
    assert one.roll_call().startswith("No message from rank 1 on host1")


def test_no_worker_waits_for_the_others_in_native_code(tmp_path: Path) -> None:
    """A request to stop would not be seen there."""
    store = FileStore(str(tmp_path / "store"), 2)
    stopped: list[BaseException] = []

    class Stop(Exception):
        pass

    def stop(number: int, frame: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    try:
        timer.start()
        began = time.monotonic()
        try:
            meet(store, 1, 2, 20)
        except Stop as error:
            stopped.append(error)
        assert stopped and time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_store_that_ends_during_the_meeting_is_a_lost_peer() -> None:
    with pytest.raises(
        PeerLostError, match="rank 1 of 2 cannot connect to the other workers: it cannot reach the store"
    ):
        meet(Gone(), 1, 2, 20)


def _start(rank: int, folder: Path, at: str, options: dict[str, Any]) -> None:
    """A worker; rank 1 dies where `at` says."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", GLOO_SOCKET_IFNAME="lo")
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT, 0o644), 2)
    if rank == 1:
        owner, name = LOST[at]
        setattr(owner, name, lambda *args, **kwargs: os._exit(9))
    worker._START_SECONDS = 2.0
    config = resolve(TrainConfig("ddp", workers=3, steps=3, device="cpu", out=folder / "run", **options))
    began = time.monotonic()
    try:
        worker.train_together(config, FileStore(str(folder / "store"), 3))
    except AbtrainError as error:
        (folder / str(rank)).write_text(f"{error.exit_code} {time.monotonic() - began:.0f} {error}")
    os._exit(0)


LOST: dict[str, tuple[Any, str]] = {
    "before connections are made": (dist, "init_process_group"),
    "before groups are made": (worker, "default_communicator"),
}


@pytest.mark.parametrize("at", LOST)
def test_a_worker_lost_after_the_meeting_is_not_waited_for_long(at: str, tmp_path: Path) -> None:
    """With a time-out of ten minutes for everything else; the message names who is missing."""
    processes = [
        forks.context().Process(target=_start, args=(rank, tmp_path, at, {"timeout": 600})) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    for rank in (0, 2):
        code, seconds, message = (tmp_path / str(rank)).read_text().split(maxsplit=2)
        assert (code, int(seconds) < 20) == ("6", True)
        assert f"No message from rank 1 on {os.uname().nodename}" in message


def _slow(rank: int, folder: Path) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    worker._START_SECONDS = 1.0
    store = meet(FileStore(str(folder / "store"), 4), rank, 4, 60)
    config = TrainConfig("ddp", workers=4, group_size=2, device="cpu", timeout=60)
    comm = worker._join(config, store, rank)
    if rank == 1:
        time.sleep(3)
    for scope in ("world", "group"):
        tensor = torch.ones(2)
        comm.all_reduce(tensor, scope=scope)  # type: ignore[arg-type]
    (folder / str(rank)).write_text(str(tensor[0].item()))
    os._exit(0)


def test_the_short_time_of_the_start_ends_with_it(tmp_path: Path) -> None:
    """A worker that is late afterwards is waited for as long as --timeout says, in groups too."""
    run_all(lambda rank: (_slow, (rank, tmp_path)), 4)
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == ["2.0"] * 4


def run_all(target: Callable[[int], tuple[Callable[..., None], tuple[Any, ...]]], workers: int) -> None:
    processes = [forks.context().Process(target=work, args=args) for work, args in map(target, range(workers))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/build/gloo/transport/tcp/pair.cc:469] writev [10.0.0.2]:4711: No route to host"), True),
        (RuntimeError("[/build/gloo/transport/tcp/pair.cc:469] read [10.0.0.2]:4711: Network is unreachable"), True),
        (RuntimeError("[/build/gloo/transport/tcp/pair.cc:469] writev [10.0.0.2]:4711: Broken pipe"), True),
        (RuntimeError("Timeout waiting for key: vote/1 after 8000 ms"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("[/build/gloo/transport/tcp/device.cc:83] Unable to find interface for: eth9"), False),
        (RuntimeError("DataLoader timed out after 60 seconds"), False),
    ],
)
@pytest.mark.parametrize("at", ["init_process_group", "train"])
def test_any_sign_of_a_lost_worker_is_a_lost_peer(
    error: RuntimeError, lost: bool, at: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error when the process groups are destroyed does not hide it."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    def cannot_be_destroyed() -> None:
        leave()
        raise RuntimeError("not the first error")

    leave = dist.destroy_process_group
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist if at == "init_process_group" else worker, at, fails)
    monkeypatch.setattr(dist, "destroy_process_group", cannot_be_destroyed)
    config = resolve(TrainConfig("ddp", workers=1, steps=3, device="cpu"))
    with pytest.raises(PeerLostError if lost else RuntimeError) as raised:
        worker.train_together(config, FileStore(str(tmp_path / "store"), 1))
    assert not dist.is_initialized()
    assert str(error)[:60] in str(raised.value)
