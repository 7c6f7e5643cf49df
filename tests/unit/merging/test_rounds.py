"""Merges that are hidden, in fragments, weighted, in turns; and parts that are not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, GradientSync, Phase, Recipe, WeightSync, recipes
from abtrain.comm.checksums import digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.consistency.agreement import disagreeing
from abtrain.errors import ConfigurationError, NonFiniteError, RanksDisagreeError, UsageError
from abtrain.merging.selection import cut_into_fragments
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.merges import Mean, MergeRule, Outer, TrainedOnly, Weighted
from tests.cases import adamw, batch, build, largest_difference, sgd, train
from tests.gloo import run_gloo


class Slope(nn.Module):
    """Four tensors whose gradient is the input, whatever their value: what a worker changes is known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(3, dtype=torch.float64) for _ in range(4))

    def forward(self, slope: Tensor) -> Tensor:
        return sum((part * slope).sum() for part in self.parts)  # type: ignore[return-value]


def slopes(rank: int) -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (rank + 1)


def go_down(comm: Communicator, sync: WeightSync, steps: int = 40) -> list[Tensor]:
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ab = ABTraining(model, optimizer, Recipe("r", steps, cycle=(Phase("p", steps, sync=sync),)), communicator=comm)
    while not ab.finished:
        ab(slopes(comm.rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return [part.detach() for part in model.parts]


@pytest.mark.parametrize("merge", [Mean(), Outer(0.7, 0.9)], ids=["mean", "outer"])
@pytest.mark.parametrize("delay", [1, 3, 7])
def test_what_was_trained_during_a_hidden_merge_is_kept(merge: MergeRule, delay: int) -> None:
    """If gradients do not depend on the weights, a delay changes nothing: no step is lost or counted twice."""
    at_once = run_in_process(3, lambda comm: go_down(comm, WeightSync(8, merge)))
    hidden = run_in_process(3, lambda comm: go_down(comm, WeightSync(8, merge, delay=delay)))
    for mine, other in zip(hidden, at_once, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 2])
def test_fragments_merge_in_turns_and_all_of_them(delay: int) -> None:
    merged = run_in_process(3, lambda comm: go_down(comm, WeightSync(8, Mean(), delay=delay, fragments=4)))
    mean_slope = sum(slopes(rank) for rank in range(3)) / 3
    for part in merged[0]:
        torch.testing.assert_close(part, -0.1 * 40 * mean_slope)
    sync = WeightSync(8, fragments=4)
    assert [sync.fragments_after(step) for step in range(16)] == 2 * [(), (0,), (), (1,), (), (2,), (), (3,)]


@pytest.mark.parametrize("wire", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("recipe", ["diloco", "ab_outer"])
def test_hidden_merges_end_with_equal_weights_on_gloo_as_on_threads(recipe: str, wire: str) -> None:
    options: dict[str, Any] = {"every": 5, "delay": 2, "fragments": 2, "wire": wire, "steps": 33}
    if recipe == "ab_outer":
        options |= {"warmup_steps": 10, "rank_rule": FixedRank(3)}
    threads = run_in_process(3, lambda comm: train(comm, build("mlp", torch.float32), "mlp", recipe, "sgd", **options))
    ranks = run_gloo(3, hidden_run, recipe, options)
    for results in (threads, ranks):
        assert all(largest_difference(result, results[0]) == 0 for result in results)
    # Gloo adds float32 up in an order of its own; what is encoded is added up in rank order everywhere.
    assert largest_difference(ranks[0], threads[0]) <= (1e-5 if wire == "fp32" else 0)


def hidden_run(comm: Communicator, recipe: str, options: dict[str, Any]) -> dict[str, Tensor]:
    return train(comm, build("mlp", torch.float32), "mlp", recipe, "sgd", **options)


def test_validation_while_a_merge_is_under_way_sees_the_average_and_changes_nothing() -> None:
    def work(comm: Communicator, validate: bool) -> dict[str, Tensor]:
        model = build("mlp")
        optimizer = adamw(model.parameters())
        ab = ABTraining(model, optimizer, recipes.diloco(12, every=4, delay=3), communicator=comm, group_size=None)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
            if validate and ab.steps_done == 6:
                with ab.merged() as average:
                    gathered = comm.all_gather(average[0].weight.detach().contiguous())
                    assert all(torch.equal(row, gathered[0]) for row in gathered)
        return ab.dense_state_dict()

    once, seen = (run_in_process(2, lambda comm, v=v: work(comm, v)) for v in (False, True))
    assert largest_difference(once[0], seen[0]) == 0


@pytest.mark.parametrize(
    ("sync", "step"),
    [
        (WeightSync(4, delay=3, wire="int8"), 4),
        (WeightSync(4, delay=3, wire="int8"), 6),
        (WeightSync(4, delay=1, wire="int4"), 4),
        (WeightSync(6, Outer(0.9, 0.8), delay=5, fragments=3, wire="int8"), 5),
        (WeightSync(6, Outer(0.9, 0.8), delay=5, fragments=3), 8),
        (WeightSync(6, Outer(0.9, 0.8), delay=5, fragments=3, wire="int4"), 17),
    ],
    ids=["just begun", "half way", "short", "fragments", "fragments in full", "the last merge"],
)
def test_an_average_that_one_worker_requests_during_hidden_merges(sync: WeightSync, step: int) -> None:
    told = run_gloo(3, one_looks_at_the_average, sync, step)
    assert all("workers are at different places of the program" in words for words in told)


def one_looks_at_the_average(comm: Communicator, sync: WeightSync, step: int) -> str:
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, Recipe("r", 18, cycle=(Phase("p", 18, sync=sync),)), communicator=comm)
    with pytest.raises(RanksDisagreeError) as error:
        while True:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
            if comm.rank == 1 and ab.steps_done == step:
                with ab.merged():
                    raise AssertionError("an average of different steps was shown")
    return str(error.value)


class Counting(nn.Linear):
    """Counts the samples that it is trained on."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize("delay", [0, 3])
def test_counters_follow_one_worker_and_what_was_counted_since_is_not_lost(delay: int) -> None:
    def work(comm: Communicator) -> list[int]:
        model, counts = Counting(), []
        optimizer = sgd(model.parameters())
        recipe = recipes.local_sgd(8, every=4, delay=delay, rebound_steps=0)
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        while not ab.finished:
            ab(torch.ones(comm.rank + 1, 3)).sum().backward()
            optimizer.step()
            ab.step()
            ab.load_state_dict(copy.deepcopy(ab.state_dict()))
            counts.append(int(model.seen))
        return counts

    first, second = run_in_process(2, work)
    assert first == [1, 2, 3, 4, 5, 6, 7, 8]
    # A hidden merge arrives three steps after it began, and what was counted meanwhile stays on top.
    assert second == ([2, 4, 6, 8, 10, 12, 10, 8] if delay else [2, 4, 6, 4, 6, 8, 10, 8])


def test_fragments_are_even_and_keep_factors_together() -> None:
    tensors = {"a.A": torch.zeros(40), "a.B": torch.zeros(20), "b": torch.zeros(60), "c": torch.zeros(30)}
    assert [list(part) for part in cut_into_fragments(tensors, 2)] == [["a.A", "a.B", "b"], ["c"]]
    parts = cut_into_fragments(tensors, 8)
    assert len(parts) == 8 and [name for part in parts for name in part] == list(tensors)
    assert any({"a.A", "a.B"} <= part.keys() for part in parts)


def one_of_them_breaks(comm: Communicator, broken: int, sync: WeightSync, policy: str) -> tuple[list[Tensor], Any]:
    """Rank `broken` gets NaN as a gradient once, in step 2."""
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recipe = Recipe("r", 12, cycle=(Phase("p", 12, sync=sync),))
    ab = ABTraining(model, optimizer, recipe, communicator=comm, on_nonfinite=policy)
    while not ab.finished:
        slope = slopes(comm.rank)
        bad = comm.rank == broken and ab.steps_done == 2
        ab(slope * math.nan if bad else slope).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return [part.detach() for part in model.parts], optimizer


@pytest.mark.parametrize("sync", [WeightSync(4), WeightSync(4, wire="int8"), WeightSync(4, delay=2)], ids=str)
def test_a_part_that_is_not_finite_is_left_out_by_option(sync: WeightSync, caplog: pytest.LogCaptureFixture) -> None:
    results = run_in_process(3, lambda comm: one_of_them_breaks(comm, 1, sync, "drop_worker"))
    for parts, optimizer in results:
        assert all(torch.isfinite(part).all() for part in parts)
        assert all(torch.equal(part, other) for part, other in zip(parts, results[0][0], strict=True))
        assert all(torch.isfinite(state["momentum_buffer"]).all() for state in optimizer.state.values())
    assert "the merge excluded ranks [1] due to NaN or infinity" in caplog.text


@pytest.mark.parametrize("sync", [WeightSync(4, fragments=2), WeightSync(4, delay=2)], ids=str)
def test_a_worker_is_left_out_once_for_one_bad_step(sync: WeightSync) -> None:
    def work(comm: Communicator) -> list[int]:
        model = Slope()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = Recipe("r", 16, cycle=(Phase("p", 16, sync=sync),))
        ab = ABTraining(model, optimizer, recipe, communicator=comm, on_nonfinite="drop_worker")
        left_out = []
        while not ab.finished:
            bad = comm.rank == 1 and ab.steps_done == 2
            loss = ab(slopes(comm.rank) * (math.nan if bad else 1.0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = len(ab.dropped_parts)
            ab.step(loss)
            if len(ab.dropped_parts) > before:
                left_out.append(ab.steps_done)
        assert [entry["ranks"] for entry in ab.dropped_parts] == [[1]]
        assert ab.dropped_parts[0]["step"] <= left_out[0]
        assert all(torch.isfinite(part).all() for part in model.parts)
        return left_out

    assert [len(left_out) for left_out in run_in_process(2, work)] == [1, 1]


def test_a_part_that_is_not_finite_stops_all_before_anything_is_averaged() -> None:
    def work(comm: Communicator) -> str:
        with pytest.raises(
            NonFiniteError, match=r"found NaN or infinity on rank 1 \(parts\.\d.*\): nothing was averaged"
        ) as error:
            one_of_them_breaks(comm, 1, WeightSync(4), "stop")
        return str(error.value)

    assert len(set(run_in_process(3, work))) == 1
    assert NonFiniteError.exit_code == 7


def test_a_loss_that_is_not_finite_is_named() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(NonFiniteError, match=r"found NaN or infinity on rank 1 \(training loss\): nothing"):
            weighted_run(comm, [0.3, math.inf])

    run_in_process(2, work)


def test_with_no_finite_part_left_all_stop() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(NonFiniteError):
            one_of_them_breaks(comm, comm.rank, WeightSync(4), "drop_worker")

    run_in_process(2, work)


def weighted_run(comm: Communicator, losses: list[float] | None, temperature: float = 0.5) -> list[Tensor]:
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    phase = Phase("p", 2, sync=WeightSync(2, Weighted(temperature)))
    ab = ABTraining(model, optimizer, Recipe("r", 2, cycle=(phase,)), communicator=comm)
    while not ab.finished:
        ab(slopes(comm.rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step(None if losses is None else torch.tensor(losses[comm.rank]))
    return [part.detach() for part in model.parts]


def test_workers_are_weighted_by_their_loss() -> None:
    losses = [0.3, 1.3]
    merged = run_in_process(2, lambda comm: weighted_run(comm, losses))
    weights = torch.softmax(-torch.tensor(losses, dtype=torch.float64) / 0.5, 0)
    expected = -2 * (weights[0] * slopes(0) + weights[1] * slopes(1))
    torch.testing.assert_close(merged[0][0], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged[0][0], merged[1][0])


def test_weighted_without_losses_is_refused_before_anything_is_sent() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(UsageError, match=r"call ab.step\(loss\)"):
            weighted_run(comm, None)
        # In the warm-up too, that is at the first step.
        model = build("mlp")
        optimizer = adamw(model.parameters())
        ab = ABTraining(model, optimizer, recipes.ab(20, warmup_steps=8, merge="weighted"), communicator=comm)
        ab(batch("mlp", comm.rank, 0)[0]).sum().backward()
        optimizer.step()
        with pytest.raises(UsageError, match="phase 'group' weights workers by their training loss"):
            ab.step()

    run_in_process(2, work)


def test_a_worker_that_left_out_a_whole_round_has_no_weight_in_it() -> None:
    def work(comm: Communicator) -> list[Tensor]:
        model = Slope()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        recipe = Recipe("r", 4, cycle=(Phase("p", 4, sync=WeightSync(2, Weighted())),))
        ab = ABTraining(model, optimizer, recipe, communicator=comm, on_nonfinite="skip")
        while not ab.finished:
            # Worker 1 has a bad first round, and both a bad second one.
            bad = comm.rank == 1 or ab.steps_done >= 2
            loss = ab(slopes(comm.rank) * (math.nan if bad else 1.0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step(loss)
        return [part.detach() for part in model.parts]

    for parts in run_in_process(2, work):
        torch.testing.assert_close(parts[0], -2 * slopes(0), rtol=1e-6, atol=1e-6)


def test_in_turns_the_average_of_the_products_is_the_product_of_the_averages() -> None:
    def work(comm: Communicator) -> list[tuple[bool, bool]]:
        model = build("mlp")
        optimizer = sgd(model.parameters())
        recipe = recipes.ab(
            16, warmup_steps=1, ab_steps=12, every=4, rebound_steps=3, trains="a_then_b", rank_rule=FixedRank(3)
        )
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        turns = []
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            position = ab.position
            assert position is not None
            grouped = position.phase.name == "group"
            if grouped and position.step_in_phase % 4 == 0:
                turns.append((model[0].weight_A.requires_grad, model[0].weight_B.requires_grad))
            if grouped and position.merges and not position.last:
                products = comm.all_gather((model[0].weight_A @ model[0].weight_B).detach())
                ab.step()
                torch.testing.assert_close((model[0].weight_A @ model[0].weight_B).detach(), products.mean(0))
            else:
                ab.step()
        return turns

    assert run_in_process(2, work)[0] == [(True, False), (False, True), (True, False)]


def test_only_the_factor_whose_turn_it_is_travels() -> None:
    def sent(trains: str) -> int:
        def work(comm: Communicator) -> int:
            train(
                comm, build("mlp"), "mlp", steps=9, warmup_steps=1, ab_steps=8, every=8, rebound_steps=0,
                trains=trains, rank_rule=FixedRank(3),
            )  # fmt: skip
            return int(comm.meter.payload()["by_phase"]["group"])

        return run_in_process(2, work)[0]

    factors_of_b = 8 * 3 * (10 + 12 + 5)  # in float64, at rank 3: B of 16x10 and 16x12, and of 12x5 transposed
    assert sent("a_or_b") - sent("a_then_b") == factors_of_b


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        (WeightSync(10, delay=10), "delay=10 is not smaller than every=10"),
        (WeightSync(10, delay=-1), "delay=-1 is too small"),
        (WeightSync(10, fragments=0), "fragments=0 is too small"),
        (WeightSync(10, fragments=11), "fragments=11 is larger than every=10: use at most 10"),
        (WeightSync(10, Outer(0.7, 1.0)), "outer_momentum=1.0 is out of range"),
        (WeightSync(10, Outer(0.7, -0.1)), "outer_momentum=-0.1 is out of range"),
        (WeightSync(10, Weighted(0.0)), "temperature=0.0 is not a finite number above 0"),
        (WeightSync(10, wire="int5"), "unknown wire format 'int5': did you mean 'int"),
        (WeightSync(10, wire="lowrank"), "Known: .*CODE:REPLY"),
        (WeightSync(10, wire="fp32:int4"), "unknown wire format 'fp32:int4'"),
        (WeightSync(10, wire="int4:int5"), "unknown wire format 'int4:int5'"),
    ],
    ids=str,
)
def test_syncs_that_cannot_be(sync: WeightSync, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe("r", 100, cycle=(Phase("p", 50, sync=sync),))


def test_turns_need_merges_of_the_whole_model() -> None:
    phase = Phase("p", 20, "factored", "a_then_b", WeightSync(5, delay=2))
    with pytest.raises(ConfigurationError, match="use delay=0 and fragments=1"):
        Recipe("r", 100, cycle=(phase,), factoring=Factoring(FixedRank(2)))


def test_a_merge_on_one_rank_only_is_an_error_on_all() -> None:
    """Rank 0 takes a step more than the others before they meet."""

    def work(comm: Communicator) -> None:
        model = Slope()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ab = ABTraining(model, optimizer, recipes.diloco(12, every=4), communicator=comm)
        with pytest.raises(RanksDisagreeError, match="step is 4 on rank 0 and 8 on rank 1"):
            for step in range(8):
                ab(slopes(comm.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if comm.rank == 1 and step == 3:
                    ab._progress.steps_done = 7
                    ab._progress.position = ab.recipe.at(7)
                ab.step()

    run_in_process(2, work)


def last_merges(comm: Communicator, sync: WeightSync, with_loss: bool = True) -> dict[int, list[dict[str, Any]]]:
    """The last merges by step. Worker r has the loss r + step / 10, and worker 2 gets NaN as a gradient in step 5."""
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = (Phase("p", 8, sync=sync), Phase("q", 2, sync=GradientSync()))
    ab = ABTraining(model, optimizer, Recipe("r", 10, cycle=cycle), communicator=comm, on_nonfinite="drop_worker")
    found = {}
    while not ab.finished:
        bad = comm.rank == 2 and ab.steps_done == 5
        ab(slopes(comm.rank) * (math.nan if bad else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step(comm.rank + ab.steps_done / 10 if with_loss else None)
        if ab.last_merges:
            found[ab.steps_done] = ab.last_merges
    return found


@pytest.mark.parametrize(("delay", "ends"), [(0, [4, 8]), (3, [7, 8])])
def test_the_last_merges_tell_each_workers_loss_and_who_was_left_out(delay: int, ends: list[int]) -> None:
    results = run_in_process(3, lambda comm: last_merges(comm, WeightSync(4, delay=delay)))
    for result in results:
        assert list(result) == ends
        merges = [merge for step in ends for merge in result[step]]
        assert [(merge["step"], merge["dropped"]) for merge in merges] == [(4, []), (8, [2])]
        assert merges[0]["losses"] == pytest.approx([0.15, 1.15, 2.15])
        assert merges[1]["losses"] == pytest.approx([0.55, 1.55, 2.55])
        assert all(0 <= merge["wait_seconds"] <= merge["seconds"] for merge in merges)


def test_without_losses_the_last_merges_tell_none() -> None:
    for result in run_in_process(2, lambda comm: last_merges(comm, WeightSync(4), with_loss=False)):
        assert all(math.isnan(loss) for loss in result[4][0]["losses"])


def test_a_wire_that_workers_cannot_carry_is_refused_before_anything_is_sent() -> None:
    def work(comm: Communicator) -> int:
        model = build("mlp")
        for recipe in (recipes.powersgd(10), recipes.ddp(10, wire="bf16")):
            with pytest.raises(ConfigurationError, match="threads cannot send gradients as"):
                ABTraining(model, adamw(model.parameters()), recipe, communicator=comm)
        return int(comm.meter.payload()["total"])

    assert run_in_process(2, work) == [0, 0]
    assert "mpi" in run_gloo(2, on_an_unknown_backend)[0]


def on_an_unknown_backend(comm: Communicator) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_backend", lambda: "mpi")
        assert comm.cannot_carry(WeightSync(4)) == ""
        return comm.cannot_carry(WeightSync(4, wire="int4"))


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("merge", [Mean(), TrainedOnly(), Weighted(0.1), Outer()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("trains", ["all", "a_or_b", "a_then_b"])
def test_all_ranks_hold_the_same_bits_after_every_merge(merge: MergeRule, wire: str, trains: str) -> None:
    def work(comm: Communicator) -> int:
        model = build("mlp", torch.float32)
        optimizer = adamw(model.parameters())
        sync = WeightSync(3, merge, wire)
        recipe = Recipe(
            "r",
            14,
            (Phase("full", 6, sync=sync),),
            (Phase("low", 8, "factored", trains, sync),),
            Factoring(FixedRank(3)),
        )  # type: ignore[arg-type]
        ab, merges = ABTraining(model, optimizer, recipe, communicator=comm), 0
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            loss = F.cross_entropy(ab(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            merged = ab.recipe.at(ab.steps_done).merges
            ab.step(loss)
            if merged:
                held = [digest(tensor) for tensor in model.state_dict().values()]
                assert disagreeing(comm, held) == []
                merges += 1
        return merges

    assert run_in_process(3, work) == [5, 5, 5]


@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_workers_that_took_turns_stay_equal_while_they_share_gradients(optimizer_state: str) -> None:
    models = [build("mlp") for _ in range(2)]
    options = {"warmup_steps": 2, "ab_steps": 8, "every": 4, "rebound_steps": 4, "trains": "a_then_b"}
    results = run_in_process(
        2,
        lambda comm: train(
            comm, models[comm.rank], "mlp", steps=26, rank_rule=FixedRank(3), optimizer_state=optimizer_state, **options
        ),
    )
    assert largest_difference(results[0], results[1]) == 0
