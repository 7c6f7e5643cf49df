import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from abtrain.commands.train.join import meet
from abtrain.errors import PeerLostError


def test_what_an_earlier_attempt_left_is_out_of_sight(tmp_path: Path) -> None:
    """Rank 0 of the second attempt is there long before the others, and finds the hellos of the first."""
    seen: dict[tuple[int, int], str] = {}

    def work(attempt: int, rank: int) -> None:
        store = meet(dist.FileStore(str(tmp_path / "store"), 3), rank, 3, 60)
        store.set(f"address/{rank}", f"{attempt}")
        seen[attempt, rank] = store.get(f"address/{(rank + 1) % 3}").decode()

    for attempt in range(2):
        threads = [threading.Thread(target=work, args=(attempt, rank)) for rank in range(3)]
        for wait, thread in zip((0.5, 0, 0), threads, strict=True):
            thread.start()
            thread.join(wait)
        for thread in threads:
            thread.join(60)
    assert seen == {(attempt, rank): str(attempt) for attempt in range(2) for rank in range(3)}


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerLostError, match=r"2 of 3 workers did not connect within 0.2 s \(ranks: 1, 2\)"):
        meet(dist.FileStore(str(tmp_path / "store"), 3), 0, 3, 0.2)
    store = dist.FileStore(str(tmp_path / "other"), 3)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(PeerLostError, match=r"rank 2 waited 0.2 s at the start, and rank 0 did not connect"):
        meet(store, 2, 3, 0.2)
