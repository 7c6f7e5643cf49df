"""The predicted bytes of state against those of the real engine, part by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, Recipe, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.comm.topology import Topology
from abtrain.commands.memory import peak_memories, peak_memory, present_memory
from abtrain.commands.plan import memory_command
from abtrain.commands.plan.memory import OptimizerName, StepMemory, peak_of, predict_memory
from abtrain.commands.plan.memory_command import plan_memory
from abtrain.commands.plan.settings import PlanConfig
from abtrain.commands.plan.shapes import shapes_of
from abtrain.commands.plan.step_memory import measure_task
from abtrain.errors import ConfigurationError
from abtrain.lowrank.svd import decompose, used_by_decompose
from abtrain.merging.held import Held
from abtrain.merging.memory import used_by_merges
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.store import Store
from abtrain.optim import muon_and_adamw
from abtrain.recipes.merges import Outer

K = 4
RANK: dict[str, Any] = {"rank_rule": FixedRank(K)}
AROUND = {"warmup_steps": 4, "ab_steps": 6, "rebound_steps": 4, **RANK}
NOTHING = StepMemory(0, 0, 0)
RECIPES: dict[str, Recipe] = {
    "ddp": recipes.ddp(3),
    "solo": recipes.solo(3),
    "local_sgd": recipes.local_sgd(6, every=2),
    "local_sgd hidden": recipes.local_sgd(8, every=4, delay=2),
    "diloco": recipes.diloco(6, every=2),
    "diloco int4": recipes.diloco(6, every=2, wire="int4"),
    "diloco hidden": recipes.diloco(12, every=4, delay=2, wire="int4"),
    "diloco in fragments": recipes.diloco(12, every=4, delay=2, fragments=2, wire="int4"),
    "ab": recipes.ab(24, **AROUND, every=2),
    "ab in turns": recipes.ab(24, **AROUND, every=2, trains="a_then_b", warmup_every=2, wire="int8"),
    "ab_no_groups": recipes.ab_no_groups(24, **AROUND),
    "ab_local": recipes.ab_local(12, every=2, warmup_steps=4, **RANK),
    "ab_outer": recipes.ab_outer(12, every=2, warmup_steps=4, **RANK),
    "ab_outer refactored": recipes.ab_outer(24, every=2, warmup_steps=4, refactor_every=2, rebound_steps=4, **RANK),
}


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 128), nn.BatchNorm1d(128), nn.Tanh(), nn.Linear(128, 64))


def bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def real_parts(ab: ABTraining) -> dict[str, int]:
    merger = ab._rounds.merger
    states = [value for one in ab.optimizers for state in one.state.values() for value in state.values()]
    return {
        "parameters": bytes_of(ab._model.parameters().values()) + bytes_of(ab.module.buffers()),
        "optimizer state": bytes_of(value for value in states if isinstance(value, Tensor) and value.ndim),
        "anchors": bytes_of(merger.anchors.values()),
        "outer momentum": bytes_of(merger.momentum.values()),
        "residuals": bytes_of(merger.residuals.values()),
        "started": sum(bytes_of(merge.started.values()) for merge in ab._rounds._under_way),
    }


def watched(comm: Communicator, recipe: Recipe, make: Any) -> dict[str, dict[str, int]]:
    """Returns the largest number of bytes of each part, by phase, after the optimizer's steps."""
    model = net()
    optimizers = make(model)
    ab = ABTraining(model, optimizers, recipe, communicator=comm)
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for step in range(recipe.total_steps):
        x = torch.randn(4, 96, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        F.cross_entropy(ab(x), torch.zeros(4, dtype=torch.int64)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert ab.position is not None
        of_phase = found[ab.position.phase.name]
        for part, nbytes in real_parts(ab).items():
            of_phase[part] = max(of_phase.get(part, 0), nbytes)
        ab.step()
    return found


KINDS: dict[str, OptimizerName] = {
    **dict.fromkeys(("diloco", "ab_outer"), "momentum"),
    **dict.fromkeys(("ddp", "diloco int4", "ab", "ab_local", "ab_outer refactored"), "muon"),
}


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 1) for name in RECIPES), *((name, 2) for name in ("diloco hidden", "ab", "ab_outer refactored"))],
)
def test_state_is_predicted(name: str, size: int) -> None:
    """In groups of one worker, and of two."""
    recipe, workers = RECIPES[name], 2 * size
    kind: OptimizerName = KINDS.get(name, "adamw")
    optimizers: dict[str, Any] = {
        "momentum": lambda model: [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)],
        "adamw": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-3)],
        "muon": partial(muon_and_adamw, lr=1e-3),
    }
    make = optimizers[kind]
    real = run_in_process(workers, lambda comm: watched(comm, recipe, make), group_size=size)[0]
    model = shapes_of(net(), recipe.factoring)
    ranks = dict.fromkeys(model.matrices(), K) if recipe.factored else {}
    topology = Topology(workers, size)
    moments = predict_memory(recipe, model, topology, NOTHING, ranks, kind)
    for phase, parts in real.items():
        steps = [one.parts for one in moments if one.phase == phase and one.when == "training step"]
        predicted = {part: max(step[part] for step in steps) for part in steps[0]}
        for part, nbytes in parts.items():
            if part == "started":
                assert nbytes <= predicted["hidden merges"], (phase, part)
            else:
                assert predicted[part] == pytest.approx(nbytes, rel=0.05), (phase, part)


def allocations(events: Any) -> Iterator[Any]:
    """Yields the allocations and frees in a profiler's tree of events."""
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from allocations(event.children)


def measured_peak(prof: Any) -> int:
    """Returns the largest number of bytes that the profiled thread has allocated on the CPU and not freed."""
    held = dict[int, int]()
    now = peak = 0
    tree = prof.profiler.kineto_results.experimental_event_tree()
    for event in sorted(allocations(tree), key=lambda one: one.start_time_ns):
        address, nbytes = event.extra_fields.ptr, event.extra_fields.alloc_size
        # This thread may also free what another one has allocated, which does not count.
        now -= held.pop(address, 0)
        if nbytes > 0:
            held[address] = nbytes
            now += nbytes
        peak = max(peak, now)
    return peak


def profiled(act: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        act()
    return measured_peak(prof)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("wire", "workers"), [("fp32", 2), ("int4", 2), ("int4", 3)])
def test_temporary_tensors_of_a_merge_are_predicted(
    wire: str, workers: int, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abtrain.merging.batches.CAPACITY", 2**16)
    sync = WeightSync(4, Outer(), wire, delay=2 * hidden)

    def merge(comm: Communicator) -> int:
        tensors = {"w": torch.zeros(512, 512), "v": torch.zeros(512, 512)}
        merger = Merger(comm)
        merger.begin(tensors)
        peak = 0
        for _ in range(2):
            for tensor in tensors.values():
                tensor += torch.randn(512, 512, generator=torch.Generator().manual_seed(comm.rank))
            started = Store.of(Held(tensors)) if hidden else None
            part = MergeInput(lambda: tensors, sync, {}, started=started)
            act = partial(lambda given: finish(merger.merge(given)), part)
            # One thread at a time can be profiled.
            if comm.rank == 0:
                peak = profiled(act)
            else:
                act()
        return peak

    real = run_in_process(workers, merge)[0]
    tensors = {"w": torch.empty(512, 512, device="meta"), "v": torch.empty(512, 512, device="meta")}
    predicted = used_by_merges(sync, tensors, {}, [], Topology(workers, 1))
    most = predicted.most - hidden * bytes_of(tensors.values())
    # What other workers' threads free stays in the count of this one.
    assert 0.6 * most < real < 2 * most, (real, most)


@pytest.mark.parametrize(("m", "n", "k"), [(512, 512, 64), (2048, 128, 32), (2048, 256, 256)])
def test_temporary_tensors_of_a_decomposition_are_predicted(m: int, n: int, k: int) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    real = profiled(lambda: decompose(W, FixedRank(k)))
    # LAPACK's own memory is not in torch's count.
    assert 0.5 * used_by_decompose(m, n, k) < real < 1.1 * used_by_decompose(m, n, k)


def test_the_peak_is_the_largest_moment_and_adds_up_its_parts() -> None:
    recipe = RECIPES["diloco int4"]
    moments = predict_memory(recipe, shapes_of(net()), Topology(2, 1), StepMemory(1000, 10**9, 0))
    peak = peak_of(moments)
    assert peak.when == "training step" and peak.total == sum(peak.parts.values())
    assert peak.parts["process"] == 1000 and peak.parts["activations"] == 10**9
    weights = bytes_of(net().parameters())
    assert peak.parts["gradients"] == peak.parts["anchors"] == peak.parts["residuals"] == weights


def test_averaged_gradients_need_buckets_and_what_the_hook_keeps() -> None:
    moments = predict_memory(recipes.ddp(3), shapes_of(net()), Topology(2, 1), NOTHING)
    assert peak_of(moments).parts["gradient buckets"] == bytes_of(net().parameters())
    errors = predict_memory(recipes.powersgd(3), shapes_of(net()), Topology(2, 1), NOTHING)
    assert peak_of(errors).parts["gradient buckets"] > 2 * bytes_of(net().parameters())
    alone = predict_memory(recipes.ddp(3), shapes_of(net()), Topology(1, 1), NOTHING)
    assert peak_of(alone).parts["gradient buckets"] == 0


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory_command, "measured_process", lambda: 3 * 10**8)
    recipe = "diloco:wire=int4,outer_device=cpu"
    plan_memory(PlanConfig(recipe=recipe, parameters="10M", nodes=2, activations="250MB", memory=True))
    said = capsys.readouterr().out
    assert "On a GPU, 120 MB are in host memory: anchors, outer momentum, residuals." in said
    assert f"{recipe}: at most" in said and "in phase local (training step)" in " ".join(said.split())
    assert "activations of a step: by --activations" in said
    for part in ("anchors", "outer momentum", "residuals"):
        assert any(line.startswith(part) and "40 MB" in line for line in said.splitlines()), part


def test_the_command_with_a_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory_command, "measure_task", lambda *given: (3 * 10**8, 10**6 if given[-1] else 5 * 10**6))
    plan_memory(PlanConfig(task="digits-mlp", memory=True, optimizer="sgd"))
    said = capsys.readouterr().out
    assert "measured here" in said and "300 MB" in said
    assert all(any(line.startswith(f"{name} ") for line in said.splitlines()) for name in recipes.RECIPES)


def test_steps_are_measured_in_a_process_of_their_own() -> None:
    for optimizer in ("momentum", "muon"):
        process, step = measure_task("digits-mlp", None, 64, optimizer, {"0.weight": 4})  # type: ignore[arg-type]
        assert 10**8 < process < 10**10 and 0 <= step < process


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(ConfigurationError) as raised:
        plan_memory(PlanConfig(task="digits-mlp", activations="much", batch_size=0, memory=True))
    told = str(raised.value)
    assert "--batch-size" in told and "size 'much' cannot be read" in told and "leave out one" in told


def test_this_process_has_memory() -> None:
    assert 10**7 < present_memory() <= peak_memory()
    assert peak_memories(torch.device("cpu"))["host"] >= peak_memory() // 2
