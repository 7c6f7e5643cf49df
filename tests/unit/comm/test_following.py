"""Buffers that follow the first rank, and change their shapes on all ranks or on some."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from abtrain.comm.following import Following
from abtrain.comm.link import Link
from abtrain.errors import RanksDisagreeError


class Wire:
    """A link on which the first of two ranks has spoken before the other listens. Messages have the size expected."""

    def __init__(self, rank: int, messages: list[Tensor]) -> None:
        self.rank, self.ranks, self.messages = rank, (0, 1), messages

    def broadcast(self, tensor: Tensor, source: int) -> None:
        if self.rank == source:
            self.messages.append(tensor.clone())
            return
        message = self.messages.pop(0)
        assert (message.nbytes, source) == (tensor.nbytes, 0)
        tensor.view(torch.uint8).copy_(message.view(torch.uint8))


def buffers(rank: int, size: int = 4, **more: Tensor) -> dict[str, Tensor]:
    return {"steps": torch.tensor(rank), "mean": torch.full((size,), float(rank)), **more}


def two_ranks(held: dict[str, Tensor]) -> list[Following]:
    messages: list[Tensor] = []
    return [Following(cast(Link, Wire(rank, messages)), held) for rank in range(2)]


def passed(ranks: list[Following], *held: dict[str, Tensor]) -> list[dict[str, Any]]:
    for following, own in zip(ranks, held, strict=True):
        following.follow(own)
    return [{name: tensor.tolist() for name, tensor in own.items()} for own in held]


def test_the_first_rank_is_followed() -> None:
    one, other = passed(two_ranks(buffers(0)), buffers(0), buffers(1))
    assert one == other == {"steps": 0, "mean": [0.0] * 4}


@pytest.mark.parametrize("size", [2, 8])
def test_buffers_that_change_on_both_ranks_are_followed_on(size: int) -> None:
    ranks = two_ranks(buffers(0))
    for now in (4, size, size, 6):
        one, other = passed(ranks, buffers(0, now), buffers(1, now))
        assert one == other == {"steps": 0, "mean": [0.0] * now}


@pytest.mark.parametrize("size", [2, 8])
def test_a_change_on_the_first_rank_alone_is_found_by_the_other(size: int) -> None:
    ranks = two_ranks(buffers(0))
    with pytest.raises(RanksDisagreeError, match="changed on rank 0, whose log names them, but not on rank 1"):
        passed(ranks, buffers(0, size), buffers(1))


def test_all_buffers_may_disappear() -> None:
    assert passed(two_ranks(buffers(0)), {}, {}) == [{}, {}]
    with pytest.raises(RanksDisagreeError, match="buffer steps is gone, mean is gone on rank 1, but not on rank 0"):
        passed(two_ranks(buffers(0)), buffers(0), {})


@pytest.mark.parametrize("sizes", [(4, 8), (8, 16), (8, 2)])
def test_a_change_that_the_first_rank_did_not_make_is_named(sizes: tuple[int, int]) -> None:
    ranks, own = two_ranks(buffers(0)), buffers(1, sizes[1])
    with pytest.raises(RanksDisagreeError, match=rf"mean is \({sizes[1]},\) of torch.float32 on rank 1"):
        passed(ranks, buffers(0, sizes[0]), own)
    assert own["mean"].tolist() == [1.0] * sizes[1]


def test_a_buffer_that_is_gone_or_new_is_named() -> None:
    ranks = two_ranks(buffers(0))
    with pytest.raises(RanksDisagreeError, match=r"seen is \(2,\) of torch.int64 on rank 1"):
        passed(ranks, buffers(0), buffers(1, seen=torch.zeros(2, dtype=torch.int64)))
    ranks = two_ranks(buffers(0, seen=torch.zeros(2)))
    with pytest.raises(RanksDisagreeError, match="seen is gone on rank 1"):
        passed(ranks, buffers(0, seen=torch.zeros(2)), buffers(1))


def test_the_log_names_a_buffer_once(caplog: pytest.LogCaptureFixture) -> None:
    following = two_ranks(buffers(0))[0]
    for size in (5, 6, 7):
        following.follow(buffers(0, size))
    assert caplog.text.count("mean is (5,)") == caplog.text.count("mean is") == 1
