"""Workers of a group share the work of a merge: what is cut, what goes between groups, and what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, WeightSync, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.commands.train.resizing import resized
from abtrain.errors import CheckpointError, NonFiniteError
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.places import Places
from abtrain.recipes.recipe import Recipe
from abtrain.shards import piece, whole
from tests.cases import adamw, batch, build, largest_difference, seeded
from tests.gloo import run_gloo
from tests.unit.engine.test_saved_state import HIDDEN, RECIPES, Loop, stopped_and_resumed

OUTER: dict[str, Any] = {"every": 5, "warmup_steps": 10, "rank_rule": FixedRank(3)}
MERGING = {
    "local_sgd": recipes.local_sgd(16, every=4, wire="fp32"),
    "diloco hidden": recipes.diloco(17, every=5, delay=3, fragments=2, wire="fp32"),
    "ab_outer": recipes.ab_outer(20, **OUTER, wire="fp32", damping=0.0),
    "ab_outer refactored": recipes.ab_outer(30, **OUTER, wire="fp32", refactor_every=2, optimizer_state="project"),
    "ab": recipes.ab(18, warmup_steps=4, ab_steps=6, rebound_steps=2, rank_rule=FixedRank(3)),
}


def trained(comm: Communicator, recipe: Recipe, batches: int = 1) -> tuple[dict[str, Tensor], Any]:
    """Trains on `batches` batches a step. Returns the weights and the payload."""
    model = build("mlp")
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipe, communicator=comm)
    while not ab.finished:
        samples = [batch("mlp", comm.rank * batches + i, ab.steps_done) for i in range(batches)]
        x, y = (torch.cat(parts) for parts in zip(*samples, strict=True))
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab.dense_state_dict(), comm.meter.payload()


@pytest.mark.parametrize("name", MERGING)
def test_a_group_does_what_one_worker_with_all_its_samples_would_do(name: str) -> None:
    grouped = run_in_process(6, lambda comm: trained(comm, MERGING[name]), group_size=3)
    alone = run_in_process(2, lambda comm: trained(comm, MERGING[name], batches=3))
    for weights, _ in grouped:
        assert largest_difference(weights, grouped[0][0]) == 0
        assert largest_difference(weights, alone[0][0]) < 1e-7


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4", "ternary"])
@pytest.mark.parametrize("recipe", ["local_sgd", "diloco"])
def test_a_group_sends_what_one_worker_would_send(recipe: str, wire: str) -> None:
    def sent(comm: Communicator) -> int:
        with seeded():
            model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ab = ABTraining(model, optimizer, recipes.build(recipe, 8, every=4, wire=wire), communicator=comm)
        while not ab.finished:
            ab(torch.ones(2, 200)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        with ab.merged():
            pass
        return int(comm.meter.payload()["between_groups"])

    alone = run_in_process(2, sent)[0]
    for size in (2, 4):
        group = run_in_process(2 * size, sent, group_size=size)[:size]
        assert sum(group) == pytest.approx(alone, rel=0.03)


@pytest.mark.parametrize("name", ["ab in turns", "ab_outer", "ab_outer refactored", "ab_local", "diloco", "weighted"])
def test_a_run_in_groups_resumes_to_the_bit(name: str) -> None:
    recipe = RECIPES[name]
    expected = run_in_process(4, lambda comm: stopped_and_resumed(comm, recipe, "adamw", ()), group_size=2)
    stops = tuple(range(recipe.total_steps + 1))[1::4]
    resumed = run_in_process(4, lambda comm: stopped_and_resumed(comm, recipe, "adamw", stops), group_size=2)
    assert resumed == expected


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2, 1)), ((4, 1), (6, 2)), ((4, 2), (6, 3)), ((4, 4), (4, 2))])
def test_other_workers_in_other_groups_go_on(before: tuple[int, int], after: tuple[int, int]) -> None:
    recipe = recipes.ab_outer(30, every=5, wire="int8", warmup_steps=10, rank_rule=FixedRank(3))

    def first(comm: Communicator) -> tuple[Any, Any]:
        loop = Loop(comm, recipe)
        loop.run(15)
        merged = copy.deepcopy(loop.ab.dense_state_dict())
        loop.run(17)
        return copy.deepcopy(loop.ab.state_dict()), merged

    states, (merged, *_) = zip(*run_in_process(before[0], first, group_size=before[1]), strict=True)

    def go_on(comm: Communicator) -> tuple[int, float, str]:
        loop = Loop(comm, recipe, seed=9)
        loop.ab.load_state_dict(resized(states, comm.rank, recipe, after[1]))
        # Buffers are averaged as they are.
        buffers = dict(loop.model.named_buffers())
        done, began = loop.ab.steps_done, {n: t for n, t in loop.ab.dense_state_dict().items() if n not in buffers}
        apart = largest_difference(began, {name: merged[name] for name in began})
        loop.run(30)
        return done, apart, weights_digest(loop.ab.dense_state_dict())

    ended = run_in_process(after[0], go_on, group_size=after[1])
    assert {(done, apart) for done, apart, _ in ended} == {(15, 0)}
    assert len({digest for _, _, digest in ended}) == 1


def test_a_state_of_groups_of_another_size_is_refused() -> None:
    recipe = RECIPES["diloco"]

    def work(comm: Communicator) -> Any:
        loop = Loop(comm, recipe)
        loop.run(7)
        return copy.deepcopy(loop.ab.state_dict())

    states = run_in_process(4, work, group_size=2)

    def load(comm: Communicator) -> None:
        with pytest.raises(CheckpointError, match=r"groups of 2 workers.*groups of 1: pass group_size=2"):
            Loop(comm, recipe).ab.load_state_dict(states[comm.rank])

    run_in_process(4, load)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_group_is_excluded_whose_worker_finds_nan_in_its_piece(rank: int) -> None:
    """Both workers of a group have the NaN, but only one of them merges the row that has it."""

    def work(comm: Communicator, policy: Any) -> tuple[dict[str, Tensor], list[Any]]:
        model = build("mlp", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = recipes.local_sgd(8, every=4, wire="fp32")
        ab = ABTraining(model, optimizer, recipe, communicator=comm, on_nonfinite=policy)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if ab.steps_done == 3 and comm.topology.group_of(comm.rank) == rank // 2:
                with torch.no_grad():
                    model[0].weight[-1 if rank % 2 else 0, 0] = float("nan")
            ab.step()
        return ab.dense_state_dict(), ab.dropped_parts

    ended = run_in_process(4, lambda comm: work(comm, "drop_worker"), group_size=2)
    assert [dropped for _, dropped in ended] == 4 * [[{"step": 4, "ranks": [rank // 2 * 2, rank // 2 * 2 + 1]}]]
    assert all(bool(torch.isfinite(t).all()) and torch.equal(t, ended[0][0][n]) for w, _ in ended for n, t in w.items())
    with pytest.raises(NonFiniteError, match=rf"rank {rank}: 0\.weight"):
        run_in_process(4, lambda comm: work(comm, "stop"), group_size=2)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6), st.integers(1, 5))
def test_pieces_cover_every_tensor(shapes: list[list[int]], count: int) -> None:
    for i, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        pieces = [piece(tensor, place, count) for place in range(count)]
        assert sum(one.numel() for one in pieces) == tensor.numel()
        assert torch.equal(whole(pieces), tensor)
        if tensor.ndim:
            assert [len(one) for one in pieces if len(one)] == [len(one) for one in tensor.chunk(count) if len(one)]


def gathered(comm: Communicator) -> bool:
    """Each worker knows its own pieces only. Returns whether all have the whole tensors afterwards."""
    shapes: list[tuple[int, ...]] = [(7, 3), (1,), (), (2, 4, 2, 2), (0, 5), (9,)]
    true = {str(i): torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)}
    true["3"] = true["3"].to(memory_format=torch.channels_last)
    true["half"], true["counter"] = torch.arange(5).bfloat16(), torch.arange(6)
    places = Places(comm)
    known = {name: torch.zeros_like(tensor) for name, tensor in true.items()}
    for name, own in places.pieces(known).items():
        own.copy_(places.pieces(true)[name])
    places.spread(known)
    joined = places.joined(places.pieces(true), {name: tensor.shape for name, tensor in true.items()})
    return all(torch.equal(known[name], true[name]) and torch.equal(joined[name], true[name]) for name in true)


def test_spread_gives_all_workers_of_a_group_the_whole() -> None:
    assert all(run_in_process(6, gathered, group_size=3))
    assert all(run_gloo(4, gathered, group_size=2))


def in_groups(comm: Communicator) -> dict[str, Tensor]:
    return trained(comm, recipes.build("ab_outer", 21, **HIDDEN, warmup_steps=10, rank_rule=FixedRank(3)))[0]


def test_gloo_ranks_get_the_bits_of_threads() -> None:
    threads, ranks = run_in_process(4, in_groups, group_size=2), run_gloo(4, in_groups, group_size=2)
    assert all(largest_difference(ranks[0], result) == 0 for result in ranks)
    assert largest_difference(ranks[0], threads[0]) == 0


def test_an_average_that_overflows_in_one_piece_stops_all_workers() -> None:
    def work(comm: Communicator) -> bool:
        w = torch.zeros(4)
        merger = Merger(comm)
        merger.begin({"w": w})
        w[3] += 3e38
        with pytest.raises(NonFiniteError, match=r"average is not.* on rank 1, 3 .*No weight was changed"):
            finish(merger.merge(MergeInput(lambda: {"w": w}, WeightSync(1, wire="fp32"), {})))
        return w[3] == 3e38 and not merger.anchors["w"].any()

    assert all(run_in_process(4, work, group_size=2))
