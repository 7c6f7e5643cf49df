"""Checkpoints whose digests fit, and whose JSON abtrain never wrote: an older one is taken, by all workers."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abtrain.checkpoint import store as checkpoint
from abtrain.checkpoint.dcp import TrainingState
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.train.resizing import resized
from abtrain.consistency.replicas import marked
from abtrain.errors import CheckpointError
from tests.faults.test_checkpoints import forge, put
from tests.faults.test_forged_states import HUGE, NAN, RECIPES, Loop, made, put_at

PART = "part-1.json"
WEIGHT = {"$tensor": "own", "file": "part-1.safetensors"}


def content(rank: int, step: int) -> dict[str, Any]:
    """One of everything that a tree may hold."""
    numbers = {1: math.inf, None: -math.inf, False: [0.5], 2.5: math.nan}
    own = torch.tensor([rank, step])
    weights = marked("weights", {"a.weight": torch.ones(3), "b": torch.ones(2, dtype=torch.complex64)}, "world")
    return {"own": own, **weights, "numbers": numbers, "often": Counter([3, 3, 1]), "digits": 10**3999}


def saved(folder: Path) -> Path:
    """Two checkpoints of two workers; the newer one."""
    for step in (1, 2):
        run_in_process(2, lambda comm, at=step: checkpoint.save(folder, at, content(comm.rank, at), comm))
    return folder / "step-000000000002"


def taken(folder: Path) -> set[int]:
    """The steps that two workers go on from."""
    return {found.step for found in run_in_process(2, lambda comm: checkpoint.latest(folder, comm)) if found}


def test_everything_that_a_tree_may_hold_comes_back(tmp_path: Path) -> None:
    saved(tmp_path)
    (found, _) = run_in_process(2, lambda comm: checkpoint.latest(tmp_path, comm))
    (tree,), wanted = found.states, content(0, 2)
    assert (
        tree["often"] == wanted["often"] and isinstance(tree["often"], Counter) and tree["digits"] == wanted["digits"]
    )
    assert tree["weights_same_on"] == "world" and torch.equal(tree["weights"]["b"], wanted["weights"]["b"])
    assert math.isnan(tree["numbers"].pop(2.5)) and tree["numbers"] == {1: math.inf, None: -math.inf, False: [0.5]}


def deep(levels: int) -> bytes:
    return b"[" * levels + b"1" + b"]" * levels


def at(path: str, value: Any) -> Callable[[bytes], bytes]:
    """A change of a JSON text."""

    def change(text: bytes) -> bytes:
        tree = json.loads(text)
        put_at(tree, path, value)
        return json.dumps(tree).encode()

    return change


FORGED: dict[str, Callable[[bytes], bytes]] = {
    **{f"{levels} levels": lambda _, n=levels: deep(n) for levels in (1000, 5000, 10**6)},
    **{name: lambda text, word=name: text.replace(b"0.5", word.encode()) for name in ("NaN", "-Infinity", "1e999")},
    "5000 digits": lambda text: text.replace(b"0.5", b"9" * 5000),
    "a key twice": lambda text: text[:-1] + b', "own": {}}',
    "not UTF-8": lambda _: b"\xff\xfe{}",
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "a reference without a file": at("own", {"$tensor": "own"}),
    "a file that is a list": at("own", {**WEIGHT, "file": []}),
    "a file that is a number": at("own", {**WEIGHT, "file": 1}),
    "a key that is a dict": at("own", {**WEIGHT, "$tensor": {}}),
    "a reference with more": at("own", {**WEIGHT, "more": 1}),
    "a real tensor as a complex one": at("own", {**WEIGHT, "complex": True}),
    "complex by a word": at("own", {**WEIGHT, "complex": "no"}),
    "another file": at("own", {**WEIGHT, "file": "../part-1.safetensors"}),
    "a missing tensor": at("own", {**WEIGHT, "$tensor": "missing"}),
    "a number of no kind": at("own", {"$number": "1e5"}),
    "a number that is a list": at("own", {"$number": []}),
    "a number with more": at("own", {"$number": "nan", "x": 1}),
    "items of one": at("numbers", {"$items": [[1]], "counter": False}),
    "items that are a number": at("numbers", {"$items": 3, "counter": False}),
    "items without a kind": at("numbers", {"$items": [[1, 2]]}),
    "items with a key twice": at("numbers", {"$items": [[1, 2], [1, 3]], "counter": False}),
    "items with an object as a key": at("numbers", {"$items": [[[{"a": 1}], 2]], "counter": False}),
    "items with a tensor as a key": at("numbers", {"$items": [[WEIGHT, 2]], "counter": False}),
    "a counter by a word": at("numbers", {"$items": [], "counter": "no"}),
    "a kind that is unknown": at("own", {"$unknown": 3}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_part_that_was_never_written(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = saved(tmp_path)
    put(newest, PART, FORGED[name]((newest / PART).read_bytes()))
    assert taken(tmp_path) == {1}
    assert str(newest) in caplog.text and "(rank 1)" in caplog.text


@pytest.mark.parametrize("levels", [300, 900, 940, 960, 980, 990, 995, 1000, 3000, 10**6])
@pytest.mark.parametrize("within", ["manifest", "part"])
def test_a_file_of_many_levels(within: str, levels: int, tmp_path: Path) -> None:
    """Python may reach its recursion limit while it reads, hashes, or looks for tensors."""
    newest = saved(tmp_path)
    if within == "part":
        put(newest, PART, b'{"weights_same_on": "world", "weights": {"x": ' + deep(levels) + b"}}")
    else:
        (newest / "manifest.json").write_bytes(b'{"manifest": ' + deep(levels) + b', "sha256": ""}')
    assert taken(tmp_path) == {1}


@pytest.mark.parametrize(
    "text", [b'{"manifest": {"step": NaN}}', b'{"manifest": {"step": ' + b"9" * 5000 + b"}}", b"[]", b"3"]
)
def test_a_manifest_that_was_never_written(text: bytes, tmp_path: Path) -> None:
    (saved(tmp_path) / "manifest.json").write_bytes(text)
    assert taken(tmp_path) == {1}


@pytest.mark.parametrize("levels", [1, 300, 700])
@pytest.mark.parametrize("field", ["format", "step", "workers", "files"])
def test_a_manifest_of_lists(field: str, levels: int, tmp_path: Path) -> None:
    forge(saved(tmp_path), lambda body: body.update({field: json.loads(deep(levels))}))
    assert taken(tmp_path) == {1}


def test_out_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    saved(tmp_path)
    monkeypatch.setattr(checkpoint, "join", join)
    with pytest.raises(torch.OutOfMemoryError):
        taken(tmp_path)


def body(text: bytes, tensors: bytes) -> bytes:
    whole = len(text).to_bytes(8, "little") + text + tensors
    return hashlib.sha256(whole).digest() + whole


DCP: dict[str, Callable[[bytes], Any]] = {
    "missing": lambda saved: ...,
    "a string": lambda saved: "state",
    "empty": lambda saved: b"",
    "digest alone": lambda saved: body(b"", b"")[:32],
    "no tensors": lambda saved: body(b"{}", b""),
    "a length past the end": lambda saved: body(b"{}", b"")[:32] + b"\xff" * 8,
    "a state of nothing": lambda saved: body(b"{}", (2).to_bytes(8, "little") + b"{}"),
    "a missing tensor": lambda saved: body(b'{"$tensor": "x", "file": ""}', (2).to_bytes(8, "little") + b"{}"),
    "NaN": lambda saved: body(b"NaN", (2).to_bytes(8, "little") + b"{}"),
    "many levels": lambda saved: body(deep(10**5), (2).to_bytes(8, "little") + b"{}"),
    "a bit flipped": lambda saved: saved[:-1] + bytes([saved[-1] ^ 1]),
}


@pytest.mark.parametrize("name", DCP)
def test_a_distributed_checkpoint_that_was_never_written(name: str) -> None:
    recipe, step = RECIPES["ended"]

    def work(comm: Communicator) -> str:
        loop = Loop(comm, recipe)
        loop.run(step - 3)
        adapter, before = TrainingState(loop.ab), loop.held()
        ((key, own),) = adapter.state_dict().items()
        forged = DCP[name](own) if comm.rank else own
        with pytest.raises(CheckpointError) as told:
            adapter.load_state_dict({} if forged is ... else {key: forged})
        assert loop.held() == before
        return str(told.value)

    (message,) = set(run_in_process(2, work))
    assert message.startswith("on rank 1: ")


STATES: dict[str, list[Any]] = {
    "step": [-1, 21, HUGE, NAN, "13", 13.5, ...],
    "merger/residuals": [{}, 3, {"0.bias": torch.ones(3)}],
    "merger/anchors": [3, {"0.bias": torch.ones(3)}, {}],
    "model/buffers/1.running_mean": [..., 3, torch.ones(3)],
    "rebound": [{}, {"length": "4", "done": 1}],
    "rounds": [{}, {"under_way": 1, "dropped": [3]}],
    "version": [3, ...],
    **{part: [...] for part in ("model", "workers_equal", "skipped_steps")},
}


@pytest.mark.parametrize("path", STATES)
def test_states_of_another_number_of_workers(path: str) -> None:
    """All workers look at all states: none is left waiting for one that has found a problem."""
    run = made("hidden")

    def forged(value: Any) -> list[dict[str, Any]]:
        states = copy.deepcopy(run.states)
        put_at(states[1], path, value)
        return states

    def work(comm: Communicator) -> None:
        loop = Loop(comm, run.recipe)
        before = loop.held()
        for value in STATES[path]:
            with pytest.raises(CheckpointError):
                loop.ab.load_state_dict(resized(forged(value), comm.rank, run.recipe))
        assert loop.held() == before

    run_in_process(3, work, timeout=20)
