from typing import get_args

import pytest

from abtrain import Recipe, recipes
from abtrain.comm.communicator import Traffic
from abtrain.comm.topology import Topology
from abtrain.commands.plan.bench import Bench, measure_decompositions
from abtrain.commands.plan.collectives import Cluster, NodeLink, cost_of, ring
from abtrain.commands.plan.forecast import FactorSeconds, Forecast, WorkerSeconds, forecast
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.shapes import ModelShapes, assumed_shapes
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.plan.stretches import Merging, Stretch
from abtrain.commands.tasks.task import TASKS
from abtrain.recipes.sync import GradientSync, GradientWire, WeightSync

LINK = NodeLink(100e6, 1e-3)
CLUSTER = Cluster(4, LINK)
LATENCY = 6 * LINK.latency  # of the messages of one all-reduce
MIB = 2**20


def of_recipe(name: str, model: ModelShapes, steps: int = 100, step: float = 0.1, **options: object) -> Forecast:
    recipe = recipes.build(name, steps, **options)
    return forecast(predict(recipe, model, Topology(4)), CLUSTER, WorkerSeconds(step))


def test_solo_only_computes() -> None:
    expected = of_recipe("solo", assumed_shapes(10**6))
    assert expected.utilisation == pytest.approx(1, abs=0.01)
    assert expected.seconds == pytest.approx(10, rel=0.01)


def test_gradients_are_hidden_while_backward_runs() -> None:
    """Forward 1 s, backward 2 s. The first bucket is ready at 2 s, the last at 3 s, when the first has been through."""
    sizes = (1_000_000, 1_000_000)
    buckets = tuple(
        Traffic("gradients", "world", size, ready=share) for size, share in zip(sizes, (0.5, 1), strict=True)
    )
    expected = forecast([Stretch("full", 1, scope="world", step=buckets)], CLUSTER, WorkerSeconds(3))
    assert expected.phases[0].communication == pytest.approx(ring(CLUSTER, 1e6).seconds)
    # Ten times as much: the first, sent at 2 s, is not through at 3 s, and the last waits for it, on its way already.
    buckets = tuple(Traffic("gradients", "world", 10_000_000, ready=one.ready) for one in buckets)
    expected = forecast([Stretch("full", 1, scope="world", step=buckets)], CLUSTER, WorkerSeconds(3))
    assert expected.phases[0].communication == pytest.approx(2 * ring(CLUSTER, 10e6).seconds - 1 - LATENCY)


def test_broadcasts_of_buffers_are_under_way_at_once() -> None:
    step = tuple(Traffic("broadcast", "world", size) for size in (1000, 2000))
    expected = forecast([Stretch("full", 1, scope="world", step=step)], CLUSTER, WorkerSeconds(0.1))
    each = [cost_of("broadcast", CLUSTER, size).seconds for size in (1000, 2000)]
    hops = cost_of("broadcast", CLUSTER, 1000).seconds - cost_of("broadcast", CLUSTER.swift, 1000).seconds
    assert expected.phases[0].communication == pytest.approx(sum(each) - hops)


def test_merges_are_not_hidden() -> None:
    model = assumed_shapes(10**6, 1000)
    expected = of_recipe("diloco", model, every=10)
    once = ring(CLUSTER, 4e6).seconds + cost_of("all_gather", CLUSTER, 24).seconds
    proof = cost_of("all_reduce", CLUSTER, 16).seconds  # that all hold the same, at the end
    settings = cost_of("all_gather", CLUSTER, 24).seconds  # compared at the start of the phase
    assert expected.phases[-1].communication == pytest.approx(10 * once + proof + settings)
    assert expected.payload == pytest.approx(10 * 4e6, rel=1e-3)


def test_the_steps_of_its_delay_hide_a_merge() -> None:
    """Two stages in 5 steps of 0.1 s: the second is begun after the first of them, and has 4 to arrive in."""
    stages = ((Traffic("all_reduce", "world", 256),), (Traffic("all_reduce", "world", 6_000_000),))
    stretch = Stretch("local", 10, "group", merges=(Merging(1, stages, WeightSync(10, delay=5), 1, hidden=5),))
    expected = forecast([stretch], CLUSTER, WorkerSeconds(0.1))
    left = ring(CLUSTER, 6e6).seconds - 0.4
    assert expected.phases[0].communication == pytest.approx(left)
    # Steps of a second hide all of it.
    assert forecast([stretch], CLUSTER, WorkerSeconds(1)).phases[0].communication == 0


def test_what_a_worker_computes_in_a_merge_takes_time() -> None:
    """It computes its part of the numbers of its group."""
    model, recipe = assumed_shapes(10**6, 1000), recipes.diloco(40, every=20, wire="int4")

    def seconds(sync: WeightSync, groups: int, numbers: int) -> float:
        assert (sync.wire, groups) == ("int4", 2)
        return numbers * 1e-6

    def total(alone: WorkerSeconds) -> float:
        stretches = predict(recipe, model, Topology(4, 2))
        return forecast(stretches, Cluster(2, LINK, 2), alone, group_size=2).seconds

    without, with_merges = total(WorkerSeconds(0.1)), total(WorkerSeconds(0.1, merge=seconds))
    slower = total(WorkerSeconds(0.05, merge=seconds).times(2))
    assert with_merges - without == pytest.approx(2 * model.numel / 2 * 1e-6)
    assert slower - without == pytest.approx(2 * 2 * model.numel / 2 * 1e-6)


def test_hidden_merges_use_a_slow_link_better() -> None:
    model = assumed_shapes(10**6, 1000)
    waited, hidden = (of_recipe("diloco", model, step=0.05, every=20, delay=delay) for delay in (0, 19))
    assert hidden.payload == waited.payload
    assert hidden.wire == waited.wire
    assert hidden.utilisation > waited.utilisation + 0.1


def test_fragments_merge_in_turns() -> None:
    model = assumed_shapes(4 * 10**6, 1000)
    stretch = predict(recipes.diloco(40, every=20, fragments=4), model, Topology(4))[-1]
    # Four times in the first round, three times in the second, and all that is left, which is all, at the end.
    assert stretch.merge_count == 8
    assert sum(merging.times for merging in stretch.merges if len(merging.calls) >= 2) == 8
    assert sum(t.nbytes * n for t, n in stretch.all()) == 7 * 4_000_000 + 16_000_000 + (1 + 8) * 24 + 16


def test_rounds_of_powersgd_take_their_latency() -> None:
    step = (Traffic("gradients", "world", 300, rounds=3),)
    expected = forecast([Stretch("full", 10, scope="world", step=step)], CLUSTER, WorkerSeconds(0.1))
    assert expected.seconds == pytest.approx(10 * (0.1 + 3 * ring(CLUSTER, 100).seconds))


def test_ddp_fills_its_buckets_from_the_models_end() -> None:
    model = assumed_shapes(30 * MIB // 4, 512)  # weights of 1 MiB
    stretch = predict(recipes.ddp(1), model, Topology(2))[-1]
    assert [traffic.nbytes // MIB for traffic in stretch.step] == [1, 25, 4]
    assert [traffic.ready for traffic in stretch.step] == pytest.approx([1 / 30, 26 / 30, 1])
    low_rank = recipes.powersgd(3, rank=4)
    assert isinstance(low_rank.phases[0].sync, GradientSync)
    assert [one.rounds for one in predict(low_rank, model, Topology(2))[-1].step] == [3, 3, 3]


def test_groups_keep_their_gradients_inside_a_node() -> None:
    model, topology = assumed_shapes(10**6, 1000), Topology(8, 4)
    stretches = predict(recipes.diloco(20, every=20), model, topology)
    cluster = Cluster(2, LINK, per_node=4)
    expected = forecast(stretches, cluster, WorkerSeconds(0.1), group_size=4)
    flat = forecast(predict(recipes.diloco(20, every=20), model, Topology(8)), cluster, WorkerSeconds(0.1))
    assert expected.payload == pytest.approx(flat.payload, rel=1e-3)
    assert expected.wire < 0.6 * flat.wire


@pytest.mark.parametrize(("nodes", "per_node", "size"), [(2, 4, 4), (4, 2, 2), (2, 4, 2)])
@pytest.mark.parametrize("wire", ["fp32", "int4"])
def test_a_node_sends_what_one_worker_would_send(nodes: int, per_node: int, size: int, wire: str) -> None:
    model, recipe = assumed_shapes(10**6, 1000), recipes.diloco(40, every=20, wire=wire)

    def sent(nodes: int, per_node: int, size: int) -> float:
        stretches = predict(recipe, model, Topology(nodes * per_node, size))
        return forecast(stretches, Cluster(nodes, LINK, per_node), WorkerSeconds(0.1), group_size=size).wire

    alone = sent(nodes, per_node // size, 1)
    assert alone > 2 * 10**5
    assert sent(nodes, per_node, size) == pytest.approx(alone, rel=0.1)


def test_those_who_meet_rarely_wait_less_for_jitter() -> None:
    model, speeds = assumed_shapes(10**5), Speeds(4, jitter=0.3)

    def waiting(name: str) -> float:
        stretches = predict(recipes.build(name, 100), model, Topology(4))
        return sum(phase.waiting for phase in forecast(stretches, CLUSTER, WorkerSeconds(0.1), speeds=speeds).phases)

    assert 0 < waiting("diloco") < 0.5 * waiting("ddp")


def test_phases_sum_to_the_run() -> None:
    expected = of_recipe("ab", assumed_shapes(10**6, 1000), steps=300)
    assert [phase.phase for phase in expected.phases] == ["setup", "warmup", "group", "rebound"]
    assert sum(phase.steps for phase in expected.phases) == 300
    assert expected.seconds == pytest.approx(sum(phase.seconds for phase in expected.phases))
    assert expected.wire > expected.payload


def test_decompositions_take_their_time() -> None:
    """Once for every group phase, by every worker; or shared by all."""
    model = assumed_shapes(10**6, 500)
    for svd, each in (("each", 2.0), ("shared", 0.5)):
        recipe = recipes.ab(100, warmup_steps=20, ab_steps=16, rebound_steps=4, svd=svd)
        stretches = predict(recipe, model, Topology(4))
        with_them = forecast(stretches, CLUSTER, WorkerSeconds(0.1, decompositions=2.0))
        without = forecast(stretches, CLUSTER, WorkerSeconds(0.1))
        assert with_them.seconds - without.seconds == pytest.approx(4 * each)
        assert {phase.phase for phase in with_them.phases if phase.decomposing} == {"group"}


def test_averaging_gradients_takes_its_time_beside_sending_them() -> None:
    """In steps that share gradients, by their wire: among all workers, or inside a group."""
    model, averaging = assumed_shapes(10**6, 1000), {"fp32": 0.01, "bf16": 0.02, "powersgd": 0.05}

    def added(recipe: Recipe, topology: Topology) -> float:
        cluster = Cluster(topology.n_groups, LINK, topology.group_size)
        stretches = predict(recipe, model, topology)
        with_it, without = (
            forecast(stretches, cluster, WorkerSeconds(0.1, seconds), group_size=topology.group_size).seconds
            for seconds in (averaging, {})
        )
        return with_it - without

    flat = Topology(4)
    assert added(recipes.ddp(100), flat) == pytest.approx(100 * 0.01)
    assert added(recipes.ddp(100, wire="bf16"), flat) == pytest.approx(100 * 0.02)
    # The first two steps of PowerSGD's share gradients as they are.
    assert added(recipes.powersgd(100), flat) == pytest.approx(2 * 0.01 + 98 * 0.05)
    assert added(recipes.local_sgd(100, warmup_steps=20), flat) == pytest.approx(20 * 0.01)
    assert added(recipes.diloco(100), flat) == pytest.approx(0)
    assert added(recipes.diloco(100), Topology(8, 4)) == pytest.approx(100 * 0.01)


def test_factors_add_to_their_steps_and_whenever_they_come() -> None:
    model = assumed_shapes(10**6, 1000)
    recipe = recipes.ab(100, warmup_steps=20, ab_steps=16, rebound_steps=4)
    stretches = predict(recipe, model, Topology(4))

    def phases(factors: FactorSeconds) -> dict[str, float]:
        alone = WorkerSeconds(0.1, factors=factors)
        return {phase.phase: phase.seconds for phase in forecast(stretches, CLUSTER, alone).phases}

    plain = phases(FactorSeconds())
    for factors in (FactorSeconds(0.03), FactorSeconds(0.03, 0.5)):
        added = {name: seconds - plain[name] for name, seconds in phases(factors).items()}
        assert added.pop("group") == pytest.approx(64 * factors.step + 4 * factors.reshaping)
        assert list(added.values()) == pytest.approx([0, 0, 0], abs=1e-12)


def test_slower_workers_take_longer_for_everything() -> None:
    alone = WorkerSeconds(1.0, {"fp32": 0.1}, 2.0, FactorSeconds(0.5, 0.25), muon=0.4)
    assert alone.times(2) == WorkerSeconds(2.0, {"fp32": 0.2}, 4.0, FactorSeconds(1.0, 0.5), muon=0.8)


def test_the_workers_of_a_group_share_what_muon_does() -> None:
    shared = WorkerSeconds(1.0, muon=0.4).shared_by(4)
    assert (shared.step, shared.muon) == pytest.approx((0.7, 0.1))


def test_what_a_worker_does_is_measured() -> None:
    bench = Bench(TASKS["digits-mlp"])
    averaging, factors = bench.averaging(), bench.factors({"0.weight": 64, "2.weight": 64})
    assert 0 < bench.step()[0] < 1
    assert set(averaging) == set(get_args(GradientWire))
    # PowerSGD factors every gradient, which no machine does for nothing.
    assert 0 < averaging["powersgd"] < 1
    assert 0 <= factors.step < 1
    assert 0 < factors.reshaping < 1
    assert bench.factors({"0.weight": 64, "2.weight": 64}) is factors


def test_a_worker_alone_factors_too() -> None:
    recipe = recipes.ab(100, warmup_steps=20, ab_steps=16, rebound_steps=4)
    alone = WorkerSeconds(0.1, decompositions=2.0, factors=FactorSeconds(0.03, 0.5))
    expected = forecast(predict(recipe, assumed_shapes(10**6, 1000), Topology(1)), Cluster(1, LINK), alone)
    assert expected.seconds == pytest.approx(100 * 0.1 + 64 * 0.03 + 4 * (2.0 + 0.5))


def test_decompositions_are_measured() -> None:
    small, large = (measure_decompositions(assumed_shapes(2 * n * n, n)) for n in (64, 512))
    assert 0 < small < large
