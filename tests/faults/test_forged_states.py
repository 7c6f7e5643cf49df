"""States whose digests fit, and that abtrain never saved: refused on all workers before anything changes."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abtrain import ABTraining, FixedRank, recipes, weights_digest
from abtrain.checkpoint.trees import split
from abtrain.comm.checksums import digest
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import AbtrainError, CheckpointError, NonFiniteError, RanksDisagreeError
from abtrain.merging.merger import Merger
from abtrain.recipes.recipe import Recipe
from tests.cases import adamw, batch
from tests.unit.engine.test_saved_state import normed

NAN, INF, HUGE = math.nan, math.inf, 10**5000
REST: dict[str, Any] = {"rank_rule": FixedRank(3), "warmup_steps": 8}
RECIPES: dict[str, tuple[Recipe, int]] = {
    # Factors, hidden merges of fragments under way, a preconditioner.
    "hidden": (
        recipes.ab_outer(
            20, **REST, every=4, wire="int8", delay=2, fragments=2, keep_dense_if_larger=False, damping=0.1
        ),
        13,
    ),
    # Full weights and shared gradients after factors, with stale roots.
    "rebound": (recipes.ab(20, warmup_steps=3, ab_steps=6, rebound_steps=4, lr_rebound_steps=3, sigma_cutoff=0.2), 11),
    # During a round of factors, all merged at once.
    "factors": (recipes.ab_outer(24, **REST, every=4, warmup_every=2), 10),
    # During a round, with room for a merge under way.
    "quiet": (recipes.local_sgd(20, every=10, delay=5), 13),
    "ended": (recipes.diloco(8, every=4, wire="int4"), 8),
}


class Loop:
    """A user's loop over a model with buffers, with a GradScaler."""

    def __init__(self, comm: Communicator, recipe: Recipe, optimizer: Callable[..., Any] = adamw) -> None:
        self.comm, self.model = comm, normed()
        self.optimizer = optimizer(self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.ab = ABTraining(self.model, self.optimizer, recipe, communicator=comm, grad_scaler=self.scaler)

    def run(self, until: int) -> None:
        while self.ab.steps_done < until:
            x, y = batch("mlp", self.comm.rank, self.ab.steps_done, torch.float32)
            loss = F.cross_entropy(self.ab(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.ab.step(loss)

    def held(self) -> Any:
        """All that the loop holds, bit by bit, but for what it has counted."""
        state = self.ab.state_dict()
        del state["meter"]
        structure, tensors = split(state)
        return structure, {key: digest(tensor) for key, tensor in tensors.items()}

    def outcome(self) -> str:
        self.run(self.ab.recipe.total_steps)
        return weights_digest(self.ab.dense_state_dict())


class Made(NamedTuple):
    """The states of workers during a run, and their digests at its end."""

    recipe: Recipe
    states: list[dict[str, Any]]
    outcomes: list[str]


@functools.cache
def made(name: str, workers: int = 2) -> Made:
    recipe, step = RECIPES[name]

    def work(comm: Communicator) -> tuple[dict[str, Any], str]:
        loop = Loop(comm, recipe)
        loop.run(step)
        return copy.deepcopy(loop.ab.state_dict()), loop.outcome()

    parts = run_in_process(workers, work)
    return Made(recipe, [state for state, _ in parts], [outcome for _, outcome in parts])


Forgery = Callable[[dict[str, Any], int], Any]
"""Takes a worker's state and its rank; returns what it is given to load."""


def refused(name: str, *forgeries: Forgery, kind: type[AbtrainError] = CheckpointError) -> list[str]:
    """Returns the message of two workers for each forgery, and checks that none has changed anything."""
    run = made(name)

    def work(comm: Communicator) -> list[str]:
        loop, said = Loop(comm, run.recipe), []
        loop.ab.load_state_dict(run.states[comm.rank])
        before = loop.held()
        for forged in forgeries:
            with pytest.raises(kind) as told:
                loop.ab.load_state_dict(forged(copy.deepcopy(run.states[comm.rank]), comm.rank))
            assert type(told.value) is kind and loop.held() == before, told.value
            said.append(str(told.value))
        assert loop.outcome() == run.outcomes[comm.rank]
        return said

    first, second = run_in_process(2, work)
    assert first == second
    return first


def put_at(tree: Any, path: str, value: Any) -> None:
    """Sets a value, or what a function makes of the one that is there; `...` removes it."""
    *outer, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    for key in outer:
        tree = tree[key]
    if value is ...:
        del tree[last]
    else:
        tree[last] = value(tree[last]) if callable(value) else value


def wrong(tensor: Tensor) -> Tensor:
    return tensor[None]


def half(tensor: Tensor) -> Tensor:
    return tensor.half()


MODEL, GROUP, ADAM = "model", "model/optimizers/0/groups/0", "model/optimizers/0/state/0.weight.A"
UNDER_WAY, MERGER = "rounds/under_way/0", "merger"
FORGED: dict[tuple[str, str], list[Any]] = {
    ("hidden", "step"): [-1, 21, 10**30, HUGE, True, 13.0, NAN, INF, "13", [13], None, ..., 0, 8, 12, 14, 20],
    ("hidden", "version"): [5, True, 6.0, "6", torch.ones(2), ..., HUGE],
    ("hidden", "recipe"): [5, None, ["x"], ..., "0" * 64],
    ("hidden", "workers_equal"): [True, 0, None],
    ("rebound", "workers_equal"): [False, 1],
    ("hidden", "round_began"): [0, None, "no"],
    ("hidden", "skipped_steps"): [[13], [-1], [1.0], 3, [HUGE]],
    ("hidden", "rank_history"): [3, [3], [{"step": 1}]],
    ("hidden", "dense_this_cycle"): [[], {"x": 1}, {3: "x"}],
    ("hidden", "seconds"): [{}, {"svd": NAN}, {"svd": "1"}, 3],
    ("hidden", "arrivals"): [[5, 5], [0], [-1], [10**9], "ab", list(range(12))],
    ("hidden", f"{MODEL}/factored"): [
        None,
        [1],
        [[]],
        ["nope"],
        lambda names: [*names, names[0]],
        lambda names: names[1:],
    ],
    ("rebound", f"{MODEL}/factored"): [["0.weight"]],
    ("hidden", f"{MODEL}/damping"): [NAN, -1, "0", None],
    ("hidden", f"{MODEL}/compression"): [0, NAN, -2.0, INF, []],
    ("hidden", f"{MODEL}/weights/0.bias"): [
        3,
        ...,
        wrong,
        half,
        None,
        torch.ones(16, device="meta"),
        lambda bias: bias.to_sparse(),
    ],
    ("hidden", f"{MODEL}/weights/0.weight.A"): [wrong, half, lambda A: A[:, :2], lambda A: A[:, :0]],
    ("hidden", f"{MODEL}/weights/extra"): [torch.ones(2)],
    ("hidden", f"{MODEL}/buffers/1.running_mean"): [..., wrong, half, 0],
    ("hidden", f"{MODEL}/optimizers/0/kind"): ["SGD", 3, None],
    ("hidden", f"{MODEL}/optimizers/0/groups"): [[], [3], {}, lambda groups: groups * 2],
    ("hidden", f"{GROUP}/lr"): ["fast", NAN, INF, None, True, ..., [0.1], torch.ones(2), torch.tensor(NAN)],
    ("hidden", f"{GROUP}/betas"): [[0.9], [0.9, 1.0], [0.9, "x"], 0.9, [NAN, 0.9], None],
    ("hidden", f"{GROUP}/evil"): [[1], {}, NAN],
    ("hidden", f"{GROUP}/amsgrad"): [1, True],
    ("hidden", f"{GROUP}/foreach"): [1],
    ("hidden", f"{GROUP}/capturable"): [True],
    ("hidden", f"{GROUP}/weight_decay"): [True],
    ("hidden", f"{GROUP}/params"): [[]],
    ("hidden", f"{GROUP}/eps"): [-1.0],
    ("hidden", f"{MODEL}/optimizers/0/state"): [3, {"nope": {}}, {3: {}}, {"0.bias": 3}],
    ("hidden", f"{ADAM}/exp_avg"): [..., None, wrong, half, 3, lambda M: M.long(), lambda M: M[:1]],
    ("hidden", f"{ADAM}/step"): [3, torch.tensor(NAN), torch.tensor(-1.0), torch.ones(3), "3", ...],
    ("hidden", f"{MODEL}/optimizers/0/state/0.weight"): [{"exp_avg": torch.ones(16, 10)}],
    ("hidden", f"{MERGER}/anchors"): [{}, None, []],
    ("hidden", f"{MERGER}/anchors/0.bias"): [wrong, half, ..., 0.0],
    ("hidden", f"{MERGER}/momentum/0.bias"): [wrong, half, 0.0],
    ("hidden", f"{MERGER}/residuals/0.bias"): [wrong, half, 0.0],
    ("hidden", f"{MERGER}/momentum/0.weight"): [torch.ones(16, 10)],
    ("hidden", f"{MERGER}/residuals/0.weight"): [torch.ones(16, 10)],
    ("hidden", f"{MERGER}/anchors/0.weight"): [torch.ones(16, 10)],
    ("hidden", f"{MERGER}/buffers"): [{"nope": 1}, {"1.running_mean": 0.5}, {"1.running_mean": HUGE}, 3],
    ("hidden", "rounds/losses"): [3, [], wrong, half, None],
    ("hidden", "rounds/dropped"): [3, [1], [{"step": 1}], [{"step": HUGE, "ranks": []}]],
    ("hidden", "rounds/under_way"): [3, [1], [{}], None, lambda merges: merges * 9],
    ("hidden", f"{UNDER_WAY}/step"): [0, 8, 11, 14, 10**9, HUGE, "12", 12.0, ...],
    ("hidden", f"{UNDER_WAY}/progress"): [[10**9] * 2, [1, 99], [1, -1], [0, 0], [1], 1, [1, NAN]],
    ("hidden", f"{UNDER_WAY}/loss"): [1.0, wrong, "x"],
    ("hidden", f"{UNDER_WAY}/started"): [
        {},
        {"x": torch.ones(1)},
        3,
        lambda started: {name: wrong(tensor) for name, tensor in started.items()},
        lambda started: {name: half(tensor) for name, tensor in started.items()},
    ],
    ("rebound", "rounds/under_way"): [[{"step": 10, "progress": [1, 0], "loss": None, "started": {}}]],
    ("hidden", "rebound"): [{"length": 10**20, "done": 0}, {"length": 4, "done": 5}, {"length": 3}, 3],
    ("hidden", "rebound/done"): [-1, 0.5, True, NAN, HUGE],
    ("hidden", "preconditioner/roots"): [{}, [], {"nope": []}],
    ("hidden", "preconditioner/roots/0.weight"): [[], 3, lambda pair: pair[:1], lambda pair: [*map(wrong, pair)]],
    ("hidden", "preconditioner/damping"): [NAN, -1.0, "x"],
    ("hidden", "preconditioner/scale"): [NAN, -1.0, "x"],
    ("hidden", "grad_scaler/scale"): [0.0, NAN, INF, -1.0, 1e300, "x", ...],
    ("hidden", "grad_scaler/_growth_tracker"): [-1, 2**31, 0.5],
    ("hidden", "grad_scaler/evil"): [1],
    ("hidden", "meter"): [{}, 3],
    ("hidden", "meter/by_scope/between_groups"): [-1, 0.5, HUGE, "x", ...],
    ("hidden", "meter/by_phase"): [{"x": -1}, {3: 3}, []],
    ("hidden", "meter/phase"): [None, [], NAN],
    ("hidden", "meter/sync_seconds"): [None, [], NAN],
    **{(name, "evil"): [1] for name in RECIPES},
    **{(name, part): [..., 3, None] for name in ("ended", "rebound") for part in ("merger", "rounds", "meter")},
    ("quiet", "rounds/under_way"): [
        [{"step": step, "progress": [13 - step, 0], "loss": None, "started": {}}] for step in (12, 13)
    ],
    ("ended", "rounds/under_way"): [[{"step": 8}], [{"step": 7, "progress": [1, 0]}]],
    ("ended", "step"): [7],
}


@pytest.mark.parametrize(("name", "path"), FORGED)
def test_a_value_that_was_never_saved(name: str, path: str) -> None:
    def forgery(value: Any, *ranks: int) -> Forgery:
        def forged(state: dict[str, Any], rank: int) -> dict[str, Any]:
            if rank in ranks:
                put_at(state, path, value)
            return state

        return forged

    values = FORGED[name, path]
    *on_one, on_all = refused(name, *(forgery(value, 1) for value in values), forgery(values[0], 0, 1))
    assert all(message.startswith("on rank 1: ") for message in on_one)
    assert on_all.startswith("on rank 0, 1: ")


@pytest.mark.parametrize("state", [None, [], 3, "state", {}, torch.ones(2), [{}]], ids=str)
def test_what_is_no_state_at_all(state: Any) -> None:
    (message,) = refused("hidden", lambda own, rank: own if rank else state)
    assert message.startswith("on rank 0: this is not a state of version")


def test_states_that_are_right_alone_and_wrong_together() -> None:
    """Collectives of other shapes, or in another order, would hang or mix up numbers."""

    def factor(state: dict[str, Any]) -> None:
        lower = {name: tensor[:, :2] for name, tensor in state["model"]["weights"].items() if name == "3.weight.A"}
        lower |= {name: tensor[:2] for name, tensor in state["model"]["weights"].items() if name == "3.weight.B"}
        state["model"]["weights"] |= lower
        state["model"]["optimizers"][0]["state"] = {}
        state["merger"] |= {
            "anchors": state["merger"]["anchors"] | lower,
            "momentum": {},
            "residuals": {},
        }
        state["round_began"] = True

    def progress(state: dict[str, Any]) -> None:
        merge = state["rounds"]["under_way"][0]
        merge["progress"][1] = 1 - merge["progress"][1]

    def changes(*paths: str) -> Callable[[dict[str, Any]], None]:
        return lambda state: [put_at(state, path, {}) for path in paths] and None

    rate = functools.partial(put_at, path=f"{GROUP}/lr", value=0.5)
    forgotten = map(changes, ("merger/momentum", "merger/residuals"))
    for name, *every in (("factors", factor), ("hidden", progress, rate, *forgotten)):

        def forgery(change: Any) -> Forgery:
            return lambda state, rank: (change(state) if rank else None, state)[1]

        for message in refused(name, *map(forgery, every), kind=RanksDisagreeError):
            assert "workers load states that do not belong together" in message


class Lookahead(torch.optim.SGD):
    """Keeps what no optimizer of PyTorch does: settings that come with its first step, and lists in its state."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            group["plan"] = ["slow", None, (1, 2)]
        for state in self.state.values():
            state["slow"] = torch.zeros(7)
            state["notes"] = {"of": [1, None]}
        return loss


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **{
        kind: getattr(torch.optim, kind)
        for kind in (
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adam",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        )
    },
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "centered": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=torch.tensor(1e-2), amsgrad=True, foreach=False),
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "own": functools.partial(Lookahead, lr=1e-2, momentum=0.9),
}
SHORT = recipes.local_sgd(6, every=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_known_or_left_alone(name: str) -> None:
    loop = Loop(SingleProcess(), SHORT, OPTIMIZERS[name])
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 2)
    loop.run(3)
    schedule.step()
    saved, before = copy.deepcopy(loop.ab.state_dict()), loop.held()
    outcome = loop.outcome()
    fresh = Loop(SingleProcess(), SHORT, OPTIMIZERS[name])
    fresh.ab.load_state_dict(saved)
    assert fresh.held() == before and fresh.outcome() == outcome
    held = {} if name == "own" else saved["model"]["optimizers"][0]["state"].get("0.weight", {})
    for key, tensor in held.items():
        # Without any state, a parameter is one that has not been trained yet.
        for value in (torch.ones(3, 3, 3), "x", None, tensor.to(torch.int32), *([...] if len(held) > 1 else [])):
            forged = copy.deepcopy(saved)
            put_at(forged["model"]["optimizers"][0]["state"]["0.weight"], key, value)
            with pytest.raises(CheckpointError, match=r"for 0\.weight"):
                fresh.ab.load_state_dict(forged)


def test_rates_of_an_unknown_optimizer() -> None:
    loop = Loop(SingleProcess(), SHORT, OPTIMIZERS["own"])
    loop.run(3)
    for path, value in (
        (f"{GROUP}/lr", NAN),
        (f"{GROUP}/lr", ...),
        (f"{GROUP}/params", []),
        (f"{GROUP}/param_names", []),
    ):
        forged = copy.deepcopy(loop.ab.state_dict())
        put_at(forged, path, value)
        with pytest.raises(CheckpointError, match="param group 0"):
            loop.ab.load_state_dict(forged)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyError("x"), CheckpointError, r"must not be trained now.*\(KeyError: 'x'\)"),
        (RuntimeError("size mismatch"), CheckpointError, "must not be trained now"),
        (OverflowError(), CheckpointError, "must not be trained now"),
        (RecursionError(), CheckpointError, "must not be trained now"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "^DefaultCPUAllocator"),
        (MemoryError("x"), MemoryError, "x"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc] closed"), RuntimeError, "^./gloo"),
        (torch.distributed.DistNetworkError("x"), torch.distributed.DistNetworkError, "x"),
        (NonFiniteError("x"), NonFiniteError, "x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_still_fails_while_a_state_is_applied(
    error: Exception, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    loop = Loop(SingleProcess(), SHORT)
    monkeypatch.setattr(Merger, "load_state_dict", fail)
    with pytest.raises(kind, match=words):
        loop.ab.load_state_dict(loop.ab.state_dict())


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a state, of dicts and lists too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, item in items for place in nodes(item, (*path, key)))]


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**4000, -1, 0, 1, 2, 2**53, 2**63, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 17), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]),
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(RECIPES)), st.data())
def test_any_value_in_any_place(name: str, data: st.DataObject) -> None:
    """It is refused and changes nothing, or it can be trained with."""
    run = made(name, workers=1)
    path = data.draw(st.sampled_from(nodes(run.states[0])[1:]))
    state = copy.deepcopy(run.states[0])
    outer = functools.reduce(lambda tree, key: tree[key], path[:-1], state)
    outer[path[-1]] = data.draw(JSON | TENSORS)
    loop = Loop(SingleProcess(), run.recipe)
    loop.ab.load_state_dict(run.states[0])
    before = loop.held()
    try:
        loop.ab.load_state_dict(state)
    except CheckpointError as error:
        assert loop.held() == before and "must not be trained" not in str(error)
    else:
        with contextlib.suppress(AbtrainError):
            loop.run(run.recipe.total_steps)
