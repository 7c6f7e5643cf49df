"""Particulars of torch.distributed: starting, defaults, and peers that die."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from abtrain.comm import Communicator, SingleProcess, Topology, TorchCommunicator, default_communicator
from abtrain.errors import ConfigurationError, PeerLostError
from tests.gloo import RankFailed, run_gloo


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert isinstance(default_communicator(), SingleProcess)
    assert isinstance(default_communicator(group_size=1), SingleProcess)


def test_alone_there_are_no_larger_groups() -> None:
    with pytest.raises(ConfigurationError, match="world size 1 is not a multiple of group size 2"):
        default_communicator(group_size=2)


def test_forgetting_to_join_is_not_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigurationError, match=r"WORLD_SIZE is 4.*init_process_group"):
        default_communicator()


def test_torch_distributed_has_to_be_initialized() -> None:
    with pytest.raises(ConfigurationError, match=r"init_process_group\(\) first"):
        TorchCommunicator(Topology(2))


@pytest.mark.usefixtures("world_of_one")
def test_the_topology_has_to_be_that_of_the_world() -> None:
    with pytest.raises(ConfigurationError, match=r"for 2 workers, but torch\.distributed has 1"):
        TorchCommunicator(Topology(2))


@pytest.mark.usefixtures("world_of_one")
def test_a_torch_world_of_one_is_not_held_up_by_anything() -> None:
    comm = default_communicator()
    assert isinstance(comm, TorchCommunicator)
    comm.all_reduce(torch.ones(2))
    comm.barrier()
    comm.data_parallel(nn.Linear(1, 1), "world")(torch.ones(1)).backward()
    assert comm.meter.payload()["total"] == 0


def default_group_sizes(comm: Communicator) -> list[int]:
    """By the workers that a launcher announces on each machine: 1, 2, 4, nothing it can say, and nothing at all."""
    sizes = []
    for local_size in (1, 2, 4, "many"):
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
        os.environ["LOCAL_RANK"] = str(comm.rank % local_size) if isinstance(local_size, int) else "none"
        sizes.append(default_communicator().topology.group_size)
    del os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"]
    return [*sizes, default_communicator().topology.group_size, default_communicator(4).topology.group_size]


def test_by_default_a_group_is_a_machine_and_on_one_machine_a_worker() -> None:
    assert run_gloo(4, default_group_sizes) == [[1, 2, 1, 1, 1, 4]] * 4


def unlike_machines(comm: Communicator) -> tuple[str, int]:
    """Ranks 0, 1 on one machine, and 2 on another."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = ("1", "0") if comm.rank == 2 else ("2", str(comm.rank))
    with pytest.raises(ConfigurationError) as error:
        default_communicator()
    return str(error.value), default_communicator(1).topology.group_size


def test_machines_with_different_numbers_of_workers_need_a_group_size() -> None:
    told = run_gloo(3, unlike_machines)
    assert [size for _, size in told] == [1] * 3
    part = "2 on rank 0's machine, 1 on rank 2's machine"
    assert all(part in text and "set group_size to 1," in text for text, _ in told)


def unlike_group_sizes(comm: Communicator) -> str:
    with pytest.raises(ConfigurationError) as error:
        default_communicator([None, 2, 1, 2][comm.rank])
    return str(error.value)


def test_group_sizes_that_differ_are_told_on_all_workers() -> None:
    assert all("(none on rank 0, 2 on rank 1, 1 on rank 2, " in text for text in run_gloo(4, unlike_group_sizes))


def timeouts(comm: TorchCommunicator) -> timedelta:
    group = comm._link("group").group
    assert group is not None
    return group._get_backend(comm.device).options._timeout  # type: ignore[no-any-return]


def test_groups_have_the_timeout_of_the_world() -> None:
    assert run_gloo(4, timeouts, group_size=2) == [timedelta(seconds=60)] * 4


def lose_rank_1(comm: Communicator) -> dict[str, str]:
    comm.meter.phase, comm.meter.step = "warm-up", 7
    once, twice = (comm.data_parallel(nn.Linear(1, 1), "world") for _ in range(2))
    loss = once(torch.ones(1))
    twice(torch.ones(1)).backward()
    comm.barrier()
    if comm.rank == 1:
        os._exit(9)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce of gradients": loss.backward,
        "all_reduce(sum)": lambda: comm.all_reduce(torch.ones(1)),
        "all_gather": lambda: comm.all_gather(torch.ones(1)),
        "broadcast": lambda: comm.broadcast(torch.ones(1), source=1),
        "barrier": comm.barrier,
        # Its second pass, where DDP itself sends something.
        "DDP's forward pass": lambda: twice(torch.ones(1)),
    }
    messages = {}
    began = time.monotonic()
    for name, call in calls.items():
        with pytest.raises(PeerLostError) as lost:
            call()
        assert isinstance(lost.value.__cause__, RuntimeError)
        messages[name] = str(lost.value)
    assert time.monotonic() - began < 10
    return messages


def test_a_dead_worker_is_noticed_at_once() -> None:
    messages, dead = run_gloo(2, lose_rank_1, may_die=[1])
    assert dead is None
    for name, message in messages.items():
        where = f"step 7, phase 'warm-up', host {platform.node()}"
        assert message.startswith(f"rank 0 lost a peer in {name} over ranks [0, 1], {where}: ")


def fail(comm: Communicator) -> None:
    raise ValueError(f"the weights of rank {comm.rank} are gone")


def test_errors_of_ranks_come_back_with_their_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0 raised\nTraceback.*in fail\n.*the weights of rank 0 are gone"):
        run_gloo(1, fail)
