"""Threads also notice that ranks disagree, and free each other at once."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from abtrain.comm import Communicator, run_in_process
from abtrain.comm.communicator import SMALL
from abtrain.errors import ConfigurationError, PeerLostError, RanksDisagreeError


def test_results_come_in_rank_order() -> None:
    def late_first(comm: Communicator) -> tuple[int, str]:
        time.sleep(0.02 * (3 - comm.rank))
        return comm.rank, threading.current_thread().name

    assert run_in_process(3, late_first) == [(rank, f"rank {rank}") for rank in range(3)]


def test_sums_are_taken_in_rank_order() -> None:
    terms = [1e8, 1.0, -1e8, 1.0]

    def total(comm: Communicator) -> float:
        time.sleep(0.01 * (3 - comm.rank))
        tensor = torch.tensor(terms[comm.rank])
        comm.all_reduce(tensor)
        return tensor.item()

    assert run_in_process(4, total) == [1.0] * 4


def test_ranks_do_not_share_tensors() -> None:
    def scribble(comm: Communicator) -> None:
        for tensor in (comm.all_gather(torch.ones(2)), torch.ones(2)):
            comm.broadcast(tensor, 0)
            comm.barrier()
            tensor += comm.rank
            comm.barrier()
            assert tensor.flatten()[0] == 1 + comm.rank

    run_in_process(3, scribble)


@pytest.mark.parametrize("intra_op", [1, 2])
def test_each_rank_computes_on_one_thread(intra_op: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(intra_op)
    try:
        assert run_in_process(2, lambda comm: torch.get_num_threads()) == [1, 1]
        assert torch.get_num_threads() == intra_op
    finally:
        torch.set_num_threads(before)


def test_a_dying_rank_frees_the_others_and_its_error_is_raised() -> None:
    lost: list[str] = []

    def die(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            raise KeyError("no such weight")
        with pytest.raises(PeerLostError) as waiting:
            comm.all_reduce(torch.ones(1))
        with pytest.raises(PeerLostError) as later:
            comm.barrier()
        lost.extend([str(waiting.value), str(later.value)])

    began = time.monotonic()
    with pytest.raises(KeyError, match="no such weight"):
        run_in_process(3, die)
    assert time.monotonic() - began < 10
    assert len(lost) == 4
    assert all("rank 1 failed with KeyError: 'no such weight'" in message for message in lost)
    assert sum("lost a peer in all_reduce(sum) over ranks [0, 1, 2]" in message for message in lost) == 2


def test_the_error_raised_is_the_first_and_not_what_followed_from_it() -> None:
    def die(comm: Communicator) -> None:
        if comm.rank == 2:
            time.sleep(0.05)
            raise ZeroDivisionError
        comm.all_reduce(torch.ones(1))

    with pytest.raises(ZeroDivisionError):
        run_in_process(3, die)


def test_a_rank_that_dies_before_backward_frees_those_in_it() -> None:
    lost: list[str] = []

    def die(comm: Communicator) -> None:
        parallel = comm.data_parallel(torch.nn.Linear(1, 1), "world")
        loss = parallel(torch.ones(1, 1)).sum()
        if comm.rank == 0:
            raise KeyError("gone")
        with pytest.raises(PeerLostError) as error:
            loss.backward()
        lost.append(str(error.value))

    with pytest.raises(KeyError, match="gone"):
        run_in_process(2, die)
    assert lost == [
        f"rank 1 lost a peer in average of gradients over ranks [0, 1], step 0, phase 'setup', host {platform.node()}: "
        "rank 0 failed with KeyError: 'gone'"
    ]


def test_gradients_are_averaged_after_a_backward_pass_that_failed() -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise FloatingPointError

    def work(comm: Communicator) -> list[float]:
        model = torch.nn.Linear(2, 1)
        parallel = comm.data_parallel(model, "world")
        x = torch.ones(1, 2, requires_grad=True) * 1
        x.register_hook(fail)
        with pytest.raises(FloatingPointError):
            parallel(x).sum().backward()
        model.zero_grad()
        parallel(torch.full((1, 2), float(comm.rank))).sum().backward()
        assert model.weight.grad is not None
        return model.weight.grad.flatten().tolist()

    assert run_in_process(2, work) == [[0.5, 0.5]] * 2


def test_other_groups_go_on_without_the_dead() -> None:
    survived: list[int] = []

    def die(comm: Communicator) -> None:
        if comm.rank == 0:
            raise KeyError
        if comm.rank >= 2:
            for _ in range(3):
                comm.all_reduce(torch.ones(1), scope="group")
            survived.append(comm.rank)

    with pytest.raises(KeyError):
        run_in_process(4, die, group_size=2)
    assert sorted(survived) == [2, 3]


def test_a_rank_that_ends_early_is_not_waited_for() -> None:
    def end_early(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.barrier()

    with pytest.raises(PeerLostError, match="rank 1 has finished its work"):
        run_in_process(2, end_early)


def test_a_rank_that_does_not_come_is_named() -> None:
    released = threading.Event()

    def sleep(comm: Communicator) -> None:
        if comm.rank == 1:
            released.wait(10)
        else:
            try:
                comm.barrier()
            finally:
                released.set()

    with pytest.raises(PeerLostError, match=r"ranks \[1\] did not call it within 0.1 s"):
        run_in_process(2, sleep, timeout=0.1)


def all_reduce(comm: Communicator, *shape: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
    comm.all_reduce(torch.ones(shape, dtype=dtype), **kwargs)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (lambda comm: all_reduce(comm, 3), r"with float32\[2\], but rank 1 called .* with float32\[3\]"),
        (lambda comm: all_reduce(comm, 2, dtype=torch.int64), r"with float32\[2\], but rank 1 .* with int64\[2\]"),
        (lambda comm: all_reduce(comm, 2, op="max"), r"all_reduce\(sum\) .*, but rank 1 called all_reduce\(max\)"),
        (lambda comm: comm.broadcast(torch.ones(2), 0), r"rank 1 called broadcast\(from 0\)"),
        (lambda comm: comm.barrier(), r"all_reduce\(sum\) .* but rank 1 called barrier .* with nothing"),
    ],
)
def test_other_calls_on_another_rank_are_an_error_on_all(odd: Callable[[Communicator], None], says: str) -> None:
    def disagree(comm: Communicator) -> None:
        with pytest.raises(RanksDisagreeError, match=says):
            odd(comm) if comm.rank == 1 else all_reduce(comm, 2)
        comm.barrier()

    run_in_process(3, disagree)


@pytest.mark.parametrize("late", [0, 1])
def test_calls_over_other_scopes_are_an_error_and_not_a_hang(late: int) -> None:
    def disagree(comm: Communicator) -> None:
        if comm.rank == late:
            time.sleep(0.05)
        # A smaller tensor would be reduced inside the group first, by all ranks.
        all_reduce(comm, SMALL, scope="group" if comm.rank == 1 else "world")

    began = time.monotonic()
    with pytest.raises(
        RanksDisagreeError, match=r"over ranks \[0, 1\].*over ranks \[0, 1, 2, 3\]|\[0, 1, 2, 3\].*\[0, 1\]"
    ):
        run_in_process(4, disagree, group_size=2)
    assert time.monotonic() - began < 10


def test_the_world_has_to_be_possible() -> None:
    with pytest.raises(ConfigurationError, match="not a multiple of group size 2"):
        run_in_process(3, lambda comm: None, group_size=2)
