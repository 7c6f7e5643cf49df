"""ABTraining in a user's own loop: rules, metering, accumulation, scaling, validation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from abtrain import ABTraining, FixedRank, GradientSync, Phase, Recipe, WeightSync, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import ConfigurationError, UsageError
from tests.cases import SCHEDULE, adamw, batch, build, largest_difference, sgd, train


def mlp_run(comm: Communicator | None, recipe: Recipe, model: nn.Module | None = None, **options: Any) -> Any:
    model = build("mlp") if model is None else model
    optimizer = adamw(model.parameters())
    return model, optimizer, ABTraining(model, optimizer, recipe, communicator=comm, **options)


def one_step(ab: ABTraining, optimizer: Any, rank: int = 0) -> None:
    x, y = batch("mlp", rank, ab.steps_done)
    F.cross_entropy(ab(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    ab.step()


def test_alone_without_init_process_group() -> None:
    model, optimizer, ab = mlp_run(None, recipes.ab(30, **SCHEDULE, rank_rule=FixedRank(2)))
    before = model[0].weight
    phases = []
    while not ab.finished:
        phases.append(ab.position.phase.name)
        one_step(ab, optimizer)
    assert phases[:9] == ["warmup"] * 3 + ["group"] * 4 + ["rebound"] * 2
    assert ab.communicator.meter.payload()["total"] == 0
    assert [entry["cycle"] for entry in ab.rank_history] == [0, 1, 2, 3, 4]
    assert ab.compression > 1
    assert dict(model.named_parameters()).get("0.weight", before) is before


def test_progress_tells_what_is_left_of_the_recipe_and_what_was_sent() -> None:
    def work(comm: Communicator) -> list[str]:
        _, optimizer, ab = mlp_run(comm, recipes.ddp(3))
        lines = [ab.progress()]
        while not ab.finished:
            one_step(ab, optimizer, comm.rank)
            lines.append(ab.progress())
        return lines

    for lines in run_in_process(2, work):
        assert lines[0] == "step 0/3  3 to go  full  0.0 MB sent"
        assert lines[2].startswith("step 2/3  1 to go  full  ")
        assert lines[3].startswith("step 3/3  0 to go  ended  ")


@pytest.mark.parametrize(("warmup_steps", "warned"), [(0, False), (20, True), (99, True), (100, False)])
def test_weights_that_are_factored_early_draw_a_warning(
    warmup_steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    mlp_run(None, recipes.ab_outer(1000, every=20, warmup_steps=warmup_steps))
    assert (f"factored after {warmup_steps} steps" in caplog.text) is warned


def test_one_group_alone_takes_turns(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, ab = mlp_run(None, recipes.ab(15, **SCHEDULE))
    assert "trains the factors A and B in turn" in caplog.text
    assert "in turn" in str(ab.describe())
    trained = []
    while not ab.finished:
        if ab.position.phase.name == "group" and ab.position.first:
            trained.append((model[0].weight_A.requires_grad, model[0].weight_B.requires_grad))
        one_step(ab, optimizer)
    assert trained == [(True, False), (False, True)]


def test_equal_phases_of_prologue_and_cycle_are_told_apart() -> None:
    phase = Phase("shared", 4, sync=GradientSync())
    _, _, ab = mlp_run(None, Recipe("r", 12, prologue=(phase,), cycle=(phase,)))
    assert [line.split(",")[0] for line in str(ab.describe()).splitlines()[1:3]] == [
        "  shared: 4 steps once",
        "  shared: 4 steps each cycle",
    ]


def test_describe_accounts_for_every_parameter() -> None:
    model, _, ab = mlp_run(None, recipes.ab(30, **SCHEDULE))
    description = ab.describe()
    assert sum(description.parameters.values()) == sum(p.numel() for p in model.parameters())
    text = str(description)
    assert "0.weight" in text
    assert "Linear, computed in factored form" in text
    assert "a vector or scalar" in text
    assert "warmup: 3 steps once" in text


@pytest.mark.parametrize("recipe", ["ddp", "solo", "local_sgd", "diloco", "ab", "ab_no_groups", "ab_outer"])
def test_every_recipe_ends_with_equal_workers_but_solo(recipe: str) -> None:
    models = [build("mlp") for _ in range(3)]
    every = {"every": 4} if recipe in ("local_sgd", "diloco", "ab_outer") else {}
    options = {**every, **({"warmup_steps": 4} if recipe == "ab_outer" else {})}
    results = run_in_process(3, lambda comm: train(comm, models[comm.rank], "mlp", recipe, steps=13, **options))
    equal = largest_difference(results[0], results[1]) == largest_difference(results[0], results[2]) == 0
    assert equal == (recipe != "solo")


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "int4"])
def test_narrow_merges_keep_workers_equal_and_learn_the_same(wire: str) -> None:
    def losses(comm: Communicator, models: list[nn.Module]) -> Any:
        recipe = recipes.ab_outer(60, every=5, warmup_steps=20, wire=wire, rank_rule=FixedRank(4))
        model, optimizer, ab = mlp_run(comm, recipe, models[comm.rank])
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done % 2)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        with torch.no_grad():
            x, y = batch("mlp", 0, 0)
            return F.cross_entropy(model(x), y).item(), ab.dense_state_dict(), comm.meter.payload()["total"]

    models = [build("mlp", torch.float32) for _ in range(2)]
    for model in models:
        model.double()
    (loss, one, _), (_, other, _) = run_in_process(2, lambda comm: losses(comm, models))
    assert largest_difference(one, other) == 0
    assert loss < 0.5


def test_a_factored_phase_after_another_decomposes_again() -> None:
    """Algorithm 1 without rebound: every cycle begins with a decomposition, and ranks may fall."""
    _, optimizer, ab = mlp_run(None, recipes.ab(9, warmup_steps=0, ab_steps=3, rebound_steps=0, sigma_cutoff=0.2))
    while not ab.finished:
        one_step(ab, optimizer)
    assert [entry["step"] for entry in ab.rank_history] == [0, 3, 6]


def test_payload_of_ab_is_gradients_plus_merges() -> None:
    """fp64 elements on the wire: 5 full-rank gradients, one merge of factors and biases, and small change."""
    models = [build("mlp") for _ in range(2)]

    def work(comm: Communicator) -> Any:
        recipe = recipes.ab(9, **SCHEDULE, rank_rule=FixedRank(2))
        _, optimizer, ab = mlp_run(comm, recipe, models[comm.rank])
        while not ab.finished:
            one_step(ab, optimizer, comm.rank)
        return comm.meter.payload(), ab.rank_history

    (payload, history), _ = run_in_process(2, work)
    biases = 16 + 12 + 5
    full = 10 * 16 + 16 * 12 + 12 * 5 + biases
    factors = 2 * (10 + 16 + 16 + 12 + 12 + 5)
    proof = 16  # that all hold the same, at the end of each phase
    settings = 24  # are compared at the start of each phase
    assert payload["by_phase"]["warmup"] == settings + 3 * full * 8 + proof
    moments = 2 * biases
    merge = (factors + biases + moments) * 8
    assert merge <= payload["by_phase"]["group"] < merge + 2500
    # At its start, workers also check that the multiplied-out weights are equal.
    assert payload["by_phase"]["rebound"] == settings + 2 * full * 8 + 2 * proof
    assert payload["between_groups"] == payload["total"]
    assert history[0]["ranks"] == {"0.weight": 2, "2.weight": 2, "4.weight": 2}


def test_payload_within_groups_is_counted_apart() -> None:
    models = [build("mlp") for _ in range(4)]

    def work(comm: Communicator) -> Any:
        train(comm, models[comm.rank], "mlp", steps=9)
        return comm.meter.payload()

    apart = run_in_process(4, work, group_size=2)[0]
    assert apart["within_groups"] > 0
    assert apart["total"] == apart["within_groups"] + apart["between_groups"] == sum(apart["by_phase"].values())


def test_merged_shows_the_average_and_puts_back_what_was_there() -> None:
    models = [build("mlp") for _ in range(2)]

    def work(comm: Communicator) -> Any:
        model, optimizer, ab = mlp_run(comm, recipes.local_sgd(20, every=10), models[comm.rank])
        for _ in range(3):
            one_step(ab, optimizer, comm.rank)
        own = copy.deepcopy(model.state_dict())
        with ab.merged() as average:
            shown = copy.deepcopy(average.state_dict())
        assert largest_difference(own, model.state_dict()) == 0
        return own, shown

    (own0, shown0), (own1, shown1) = run_in_process(2, work)
    assert largest_difference(own0, own1) > 0
    assert largest_difference(shown0, shown1) == 0
    assert largest_difference(shown0, {name: (own0[name] + own1[name]) / 2 for name in own0}) < 1e-12


def test_merged_talks_to_nobody_where_all_are_equal() -> None:
    models = [build("mlp") for _ in range(2)]

    def work(comm: Communicator) -> int:
        _, optimizer, ab = mlp_run(comm, recipes.ddp(3), models[comm.rank])
        one_step(ab, optimizer, comm.rank)
        before = comm.meter.payload()["total"]
        if comm.rank == 0:
            with ab.merged() as model, torch.no_grad():
                model(torch.zeros(1, 10, dtype=torch.float64))
        return comm.meter.payload()["total"] - before

    assert run_in_process(2, work) == [0, 0]


def test_accumulation_under_no_sync_equals_one_large_batch() -> None:
    def work(comm: Communicator, models: list[nn.Module], parts: int) -> Any:
        model = models[comm.rank]
        optimizer = sgd(model.parameters())
        ab = ABTraining(model, optimizer, recipes.ddp(3), communicator=comm)
        for step in range(3):
            x, y = batch("mlp", comm.rank, step)
            pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
            for piece in pieces[:-1]:
                with ab.no_sync():
                    (F.cross_entropy(ab(piece[0]), piece[1]) / parts).backward()
            (F.cross_entropy(ab(pieces[-1][0]), pieces[-1][1]) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return ab.dense_state_dict(), comm.meter.payload()["total"]

    runs = {}
    for parts in (1, 3):
        models = [build("mlp") for _ in range(2)]
        runs[parts] = run_in_process(2, lambda comm, m=models, p=parts: work(comm, m, p))[0]
    assert largest_difference(runs[1][0], runs[3][0]) < 1e-12
    assert runs[1][1] == runs[3][1]


def test_gradient_clipping_sees_the_factors() -> None:
    model, optimizer, ab = mlp_run(None, recipes.ab(9, **SCHEDULE))
    while not ab.finished:
        x, y = batch("mlp", 0, ab.steps_done)
        F.cross_entropy(ab(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert torch.stack(norms).norm() <= 1.01e-3
        optimizer.step()
        optimizer.zero_grad()
        ab.step()


def test_a_step_skipped_by_the_grad_scaler_keeps_workers_together() -> None:
    models = [build("mlp", torch.float32) for _ in range(2)]

    def work(comm: Communicator) -> Any:
        model = models[comm.rank]
        optimizer = sgd(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        ab = ABTraining(model, optimizer, recipes.ab(15, **SCHEDULE), communicator=comm, grad_scaler=scaler)
        skipped = []
        for step in range(15):
            x, y = batch("mlp", comm.rank, step, torch.float32)
            loss = F.cross_entropy(ab(x), y)
            if step == 4 and comm.rank == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ab.step()
            skipped.append(scaler.get_scale() < before and step == 4)
        return ab.dense_state_dict(), scaler.get_scale(), any(skipped)

    (one, scale_one, skipped_one), (other, scale_other, skipped_other) = run_in_process(2, work)
    assert (skipped_one, skipped_other) == (False, True)
    assert scale_one == scale_other == 1024.0
    assert largest_difference(one, other) == 0


@pytest.mark.parametrize("rebound", [0, 2])
def test_a_worker_that_always_overflows_leaves_the_others_their_loss_scale(rebound: int) -> None:
    """When gradients are shared next, all workers continue from the largest scale."""

    def work(comm: Communicator) -> tuple[float, float]:
        model = build("mlp", torch.float32)
        before = next(model.parameters()).detach().clone()
        optimizer = sgd(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        recipe = recipes.local_sgd(40, every=10, rebound_steps=rebound)
        ab = ABTraining(model, optimizer, recipe, communicator=comm, grad_scaler=scaler)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            alone = ab.position is not None and isinstance(ab.position.phase.sync, WeightSync)
            loss = F.cross_entropy(ab(x), y) * (float("inf") if comm.rank == 1 and alone else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ab.step()
        return scaler.get_scale(), float((next(model.parameters()) - before).detach().abs().max())

    (healthy, moved), (sick, moved_too) = run_in_process(2, work)
    assert healthy == 2.0**16 and moved == moved_too > 0
    assert sick < (2.0**16 if rebound else 1e-3)


def test_autocast_runs_through_all_phases() -> None:
    models = [build("attention", torch.float32) for _ in range(2)]

    def work(comm: Communicator) -> Any:
        model = models[comm.rank]
        optimizer = adamw(model.parameters())
        ab = ABTraining(model, optimizer, recipes.ab(15, **SCHEDULE), communicator=comm)
        dtypes = set()
        for step in range(15):
            x, y = batch("attention", comm.rank, step, torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = ab(x)
                loss = F.cross_entropy(output, y)
            dtypes.add(output.dtype)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return ab.dense_state_dict(), dtypes

    (one, dtypes), (other, _) = run_in_process(2, work)
    assert dtypes == {torch.bfloat16}
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in one.values())
    assert largest_difference(one, other) == 0


def test_a_scheduler_and_param_groups_go_on_beside_the_phases() -> None:
    model = build("mlp")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=9)
    ab = ABTraining(model, optimizer, recipes.ab(9, **SCHEDULE))
    for step in range(9):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(1 - step / 9)
        one = optimizer.param_groups[0]["params"]
        assert len(one) == (6 if ab.position is not None and ab.position.phase.name == "group" else 3)
        x, y = batch("mlp", 0, step)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ab.step()


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
)
def test_workers_stay_equal_in_full_rank_phases_with_any_optimizer(name: str) -> None:
    models = [build("mlp") for _ in range(3)]

    def work(comm: Communicator) -> Any:
        model = models[comm.rank]
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
        ab = ABTraining(model, optimizer, recipes.ab(15, **SCHEDULE), communicator=comm)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            # Steps that one worker skips, as a gradient scaler would: its counts fall behind.
            if comm.rank != 1 or ab.position.phase.name != "group":
                optimizer.step()
            optimizer.zero_grad()
            ab.step()
            if ab.position is not None and ab.position.phase.name == "rebound":
                rebound = {n: value.clone() for n, value in model.state_dict().items()}
        return rebound

    one, *others = run_in_process(3, work)
    assert all(largest_difference(one, other) == 0 for other in others)


def test_memory_layouts_survive_phases_for_fused_optimizers() -> None:
    def final(fused: bool, state: str) -> Any:
        model = build("conv", torch.float32).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        recipe = recipes.ab(15, **SCHEDULE, optimizer_state=state)
        ab = ABTraining(model, optimizer, recipe)
        strides = {name: p.stride() for name, p in model.named_parameters()}
        while not ab.finished:
            x, y = batch("conv", 0, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        assert {name: p.stride() for name, p in model.named_parameters()} == strides
        return ab.dense_state_dict()

    for state in ("reset", "project"):
        assert largest_difference(final(True, state), final(False, state)) < 1e-4


def test_the_dense_state_of_a_factored_model_can_be_saved(tmp_path: Any) -> None:
    model, _optimizer, ab = mlp_run(None, recipes.ab(9, **{**SCHEDULE, "warmup_steps": 0}))
    assert "0.weight.A" in ab.factored_state_dict()
    for state in (ab.dense_state_dict(), model.state_dict()):
        save_file(state, tmp_path / "model.safetensors")
        build("mlp").load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_factors_are_saved_under_their_own_names_in_the_place_of_their_weight() -> None:
    model, optimizer, ab = mlp_run(None, recipes.ab(15, **SCHEDULE, sigma_cutoff=0.3))
    assert list(ab.factored_state_dict()) == list(model.state_dict())
    while ab.position.phase.weights != "factored":
        one_step(ab, optimizer)
    state = ab.factored_state_dict()
    assert list(state)[:3] == ["0.weight.A", "0.weight.B", "0.bias"]
    torch.testing.assert_close(state["0.weight.A"] @ state["0.weight.B"], model.state_dict()["0.weight"])


def test_names_are_those_of_the_model_that_was_compiled() -> None:
    model = build("mlp")
    model[0] = torch.compile(model[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(compiled.parameters())
    ab = ABTraining(compiled, optimizer, recipes.ab(9, **{**SCHEDULE, "warmup_steps": 0}, exclude=("4.*",)))
    plain = build("mlp")
    assert list(ab.dense_state_dict()) == list(plain.state_dict())
    assert list(ab.factored_state_dict())[:2] == ["0.weight.A", "0.weight.B"]
    ab.load_dense_state_dict(plain.state_dict(), cut=True)
    assert largest_difference(ab.dense_state_dict(), plain.state_dict()) < 0.1
    assert weights_digest(compiled) == weights_digest(ab.dense_state_dict())


def test_a_dense_state_is_loaded_into_a_factored_model_at_its_ranks() -> None:
    model, optimizer, ab = mlp_run(None, recipes.ab(15, **SCHEDULE, sigma_cutoff=0.3))
    while ab.position.phase.weights != "factored":
        one_step(ab, optimizer)
    kept = {name: tensor.clone() for name, tensor in ab.dense_state_dict().items()}
    one_step(ab, optimizer)
    ab.load_dense_state_dict(kept)
    assert largest_difference(kept, model.state_dict()) < 1e-12
    other = build("mlp", seed=5).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight is factored with rank .*would lose [0-9.]+% of it.*cut=True"):
        ab.load_dense_state_dict(other)
    ab.load_dense_state_dict(other, cut=True)
    assert largest_difference(other, model.state_dict()) < 0.5
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        ab.load_dense_state_dict({name: tensor for name, tensor in other.items() if name != "0.weight"}, cut=True)


def test_a_parameter_that_is_thawed_later_is_not_left_unsynced() -> None:
    models = [build("mlp") for _ in range(2)]

    def work(comm: Communicator) -> None:
        models[comm.rank][0].requires_grad_(False)
        model, optimizer, ab = mlp_run(comm, recipes.local_sgd(20, every=4), models[comm.rank])
        model[0].requires_grad_(True)
        while not ab.finished:
            one_step(ab, optimizer, comm.rank)

    with pytest.raises(UsageError, match=r"were unfrozen after ABTraining was built, .*: 0\.weight, 0\.bias"):
        run_in_process(2, work)


def test_a_closure_cannot_be_preconditioned() -> None:
    _, optimizer, _ = mlp_run(None, recipes.ab_outer(20, every=5, warmup_steps=0))
    with pytest.raises(UsageError, match="call backward before"):
        optimizer.step(lambda: 0.0)


def test_dense_optimizer_state_is_level_before_full_rank_phases() -> None:
    models = [build("mlp") for _ in range(3)]

    def work(comm: Communicator) -> Any:
        _, optimizer, ab = mlp_run(comm, recipes.ab(9, **SCHEDULE), models[comm.rank])
        while ab.steps_done < 7:
            one_step(ab, optimizer, comm.rank)
        state = optimizer.state[models[comm.rank][0].bias]
        return {key: value.clone() for key, value in state.items()}

    states = run_in_process(3, work)
    assert states[0]["step"] == 7
    assert all(largest_difference(states[0], state) == 0 for state in states)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_projected_state_keeps_workers_equal_and_finite(optimizer: str) -> None:
    models = [build("mlp") for _ in range(3)]
    results = run_in_process(
        3, lambda comm: train(comm, models[comm.rank], "mlp", optimizer=optimizer, optimizer_state="project")
    )
    assert all(torch.isfinite(value).all() for value in results[0].values())
    assert largest_difference(results[0], results[2]) == 0


def test_batchnorm_statistics_are_averaged_at_merges() -> None:
    models = [nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5)).double() for _ in range(2)]

    def work(comm: Communicator) -> Any:
        model = models[comm.rank]
        optimizer = sgd(model.parameters())
        ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=2), communicator=comm)
        own = None
        for step in range(2):
            x, y = batch("mlp", comm.rank, step)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            own = model[1].running_mean.clone()
            ab.step()
        return own, model[1].running_mean.clone(), model[1].num_batches_tracked.item()

    (own0, mean0, count0), (own1, mean1, count1) = run_in_process(2, work)
    assert not torch.equal(own0, own1)
    assert torch.equal(mean0, mean1)
    torch.testing.assert_close(mean0, (own0 + own1) / 2)
    assert count0 == count1 == 2


class TestRulesOfTheLoop:
    def test_a_forgotten_ab_step(self) -> None:
        _, optimizer, ab = mlp_run(None, recipes.ddp(5))
        x, y = batch("mlp", 0, 0)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            ab(x)
        with pytest.raises(UsageError, match=r"ab\.step\(\) was not called"):
            ab(x)

    def test_a_step_after_the_end(self) -> None:
        _, optimizer, ab = mlp_run(None, recipes.ddp(1))
        one_step(ab, optimizer)
        with pytest.raises(UsageError, match="ended after its 1 steps"):
            ab.step()
        with pytest.raises(UsageError, match="larger total_steps"):
            ab(batch("mlp", 0, 0)[0])

    def test_the_model_called_past_abtrain(self) -> None:
        def work(comm: Communicator) -> None:
            model, optimizer, ab = mlp_run(comm, recipes.ddp(5), build("mlp"))
            F.cross_entropy(model(batch("mlp", 0, 0)[0]), batch("mlp", 0, 0)[1]).backward()
            optimizer.step()
            ab.step()

        with pytest.raises(UsageError, match=r"call ab\(x\) in place of model\(x\)"):
            run_in_process(2, work)

    def test_one_ab_step_too_many(self) -> None:
        def work(comm: Communicator) -> None:
            _, optimizer, ab = mlp_run(comm, recipes.local_sgd(20, every=5), build("mlp"))
            one_step(ab, optimizer, comm.rank)
            with pytest.raises(UsageError, match=r"ab\(\.\.\.\) has not been called with gradients enabled since"):
                ab.step()
            assert ab.steps_done == 1

        run_in_process(2, work)


class TestWhatIsRefused:
    def test_an_optimizer_of_another_model(self) -> None:
        model, other = build("mlp"), nn.Linear(3, 3)
        optimizer = adamw([*model.parameters(), *other.parameters()])
        with pytest.raises(
            ConfigurationError, match=r"has 2 parameters that the model does not have \(shapes \(3, 3\)"
        ):
            ABTraining(model, optimizer, recipes.ddp(5))

    def test_a_model_without_any_eligible_weight(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
        with pytest.raises(
            ConfigurationError, match=r"no weight of the model is eligible \(0.weight \[5, 4\]: an embedding"
        ):
            ABTraining(model, adamw(model.parameters()), recipes.ab(100))

    def test_an_exclude_pattern_that_matches_nothing(self) -> None:
        model = build("mlp")
        with pytest.raises(
            ConfigurationError, match=r"exclude '0.weigth' matches no parameter: did you mean '0.weight'"
        ):
            ABTraining(model, adamw(model.parameters()), recipes.ab(100, exclude=("0.weigth", "2.*")))

    def test_eligible_weights_that_the_optimizer_does_not_hold(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        with pytest.raises(ConfigurationError, match="not in the optimizer"):
            ABTraining(model, adamw(model[1].parameters()), recipes.ab(100))

    def test_sync_batch_norm_without_anybody_to_synchronize_with(self) -> None:
        models = [nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)) for _ in range(2)]
        with pytest.raises(ConfigurationError, match="1 SyncBatchNorm layers, but in phase 'group'"):
            run_in_process(2, lambda comm: mlp_run(comm, recipes.ab(100), models[comm.rank]))

    def test_what_is_no_recipe(self) -> None:
        model = build("mlp")
        with pytest.raises(ConfigurationError, match="recipe is a function, not a Recipe: build one"):
            ABTraining(model, adamw(model.parameters()), recipes.ab)  # type: ignore[arg-type]

    def test_a_wrapped_model(self) -> None:
        model = nn.DataParallel(nn.Linear(3, 3))
        with pytest.raises(ConfigurationError, match="pass the bare model"):
            ABTraining(model, adamw(model.parameters()), recipes.ddp(5))

    def test_projection_for_an_unknown_optimizer(self) -> None:
        model = build("mlp", torch.float32)
        optimizer = torch.optim.Adadelta(model.parameters())
        with pytest.raises(ConfigurationError, match="cannot convert the state of Adadelta"):
            ABTraining(model, optimizer, recipes.ab(9, **SCHEDULE, optimizer_state="project"))


def test_all_zero_and_no_smaller_weights_stay_dense() -> None:
    model = build("mlp")
    with torch.no_grad():
        model[4].weight.zero_()
    recipe = recipes.ab(9, **{**SCHEDULE, "warmup_steps": 0}, rank_rule=FixedRank(7), keep_dense_if_larger=True)
    _, _, ab = mlp_run(None, recipe, model)
    text = str(ab.describe())
    assert "all zero: its factors would never get a gradient" in text
    assert "factors of rank 7 would save less than 10 %" in text
    assert ab.rank_history[0]["ranks"] == {}
