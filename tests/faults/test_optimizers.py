"""Other people's optimizers: several side by side, inside others, with state of any form and copies of the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Muon, RMSprop

from abtrain import ABTraining, FixedRank, optim, recipes
from abtrain.checkpoint.trees import join, refer, split
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.engine import progress
from abtrain.errors import ConfigurationError, NonFiniteError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import batch, build, largest_difference, sgd
from tests.faults.loops import HIDDEN, Loop, told
from tests.faults.optimizers import (
    Accumulating,
    CallsParent,
    Codes,
    EarlyMasters,
    Lists,
    Lookahead,
    Masters,
    Objects,
    RebindingSam,
    Renamed,
    RowsAndColumns,
    Sam,
    ScheduleFree,
    Silent,
    SlowInAttribute,
    muon_and_adamw,
)
from tests.gloo import run_gloo

LOCAL = recipes.local_sgd(16, every=4, rebound_steps=2)
OUTER = recipes.ab_outer(20, every=4, warmup_steps=8, rank_rule=FixedRank(3))
PAPER = recipes.ab(18, warmup_steps=4, ab_steps=4, rebound_steps=3, lr_rebound_steps=2, sigma_cutoff=0.2)
RECIPES = {"rounds": LOCAL, "outer": OUTER, "paper": PAPER, "hidden": HIDDEN}

MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "muon and adamw": muon_and_adamw,
    "lists": lambda model: Lists(model.parameters()),
    "codes": lambda model: Codes(model.parameters()),
    "rows": lambda model: RowsAndColumns(model.parameters()),
    "adafactor": lambda model: Adafactor(model.parameters(), 1e-2),
    "adagrad": lambda model: Adagrad(model.parameters(), 1e-2, initial_accumulator_value=0.1),
    "fused": lambda model: SGD(model.parameters(), 0.05, momentum=0.9, fused=True),
    "centred": lambda model: RMSprop(model.parameters(), 1e-3, momentum=0.9, centered=True),
    "parent": lambda model: CallsParent(model.parameters(), 1e-2),
    "lookahead": lambda model: Lookahead(sgd(model.parameters())),
    "early lookahead": lambda model: Lookahead(AdamW(model.parameters(), 1e-2), early=True),
    "schedule-free": lambda model: ScheduleFree(model.parameters()),
}


def reread(state: Any) -> Any:
    """A state as it comes back from a checkpoint."""
    structure, tensors = split(state)
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    return join(json.loads(json.dumps(refer(structure, dict.fromkeys(kept, "")))), lambda _, key: kept[key].clone())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("maker", MAKERS)
def test_workers_end_equal_and_an_interrupted_run_ends_with_the_same_bits(maker: str, recipe: str) -> None:
    def whole(comm: Communicator) -> dict[str, Tensor]:
        return Loop(comm, RECIPES[recipe], make=MAKERS[maker]).run()

    def cut(comm: Communicator) -> dict[str, Tensor]:
        first = Loop(comm, RECIPES[recipe], make=MAKERS[maker])
        first.run(11)
        state = reread(first.ab.state_dict())
        second = Loop(comm, RECIPES[recipe], make=MAKERS[maker])
        second.ab.load_state_dict(state)
        return second.run()

    one, other = run_in_process(2, whole)
    resumed, _ = run_in_process(2, cut)
    for name, weight in one.items():
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, other[name])
        assert torch.equal(weight, resumed[name])


def test_two_optimizers_train_on_gloo_ranks() -> None:
    first, second = run_gloo(2, _two_optimizers)
    assert first == second


def _two_optimizers(comm: Communicator) -> list[float]:
    end = Loop(comm, PAPER, make=muon_and_adamw).run()
    return [float(weight.sum()) for weight in end.values()]


def test_optimizers_may_step_after_backward_passes_of_their_own() -> None:
    """As generator and discriminator do."""
    model = build("mlp")
    first, second = SGD(model[0].parameters(), 0.05), SGD([*model[2].parameters(), *model[4].parameters()], 0.05)
    ab = ABTraining(model, [first, second], recipes.local_sgd(4, every=2))
    while not ab.finished:
        for optimizer in (first, second):
            x, y = batch("mlp", 0, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ab.step()
    assert ab.optimizers == (first, second)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: [], "the list of optimizers is empty"),
        (lambda model: [sgd(model.parameters()), 3], "has an int, not a torch.optim.Optimizer"),
        (lambda model: 2 * [sgd(model.parameters())], "contains the same optimizer twice"),
        (
            lambda model: [sgd(model.parameters()), sgd([model[0].bias])],
            "two optimizers have the same parameters: 0.bias",
        ),
        (
            lambda model: [sgd(model[0].parameters()), sgd(model[2].parameters())],
            "but are in no optimizer: 4.weight, 4.bias",
        ),
        (lambda model: (p for p in model.parameters()), "is a generator, not a torch.optim.Optimizer"),
    ],
)
def test_an_invalid_list_of_optimizers_is_reported(make: Callable[[nn.Module], Any], words: str) -> None:
    model = build("mlp")
    with pytest.raises(ConfigurationError, match=words):
        ABTraining(model, make(model), recipes.local_sgd(4, every=2))


def one_weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def test_what_a_wrapper_steps_is_scaled() -> None:
    model = one_weight()
    optimizer = Sam(model.parameters(), SGD, lr=0.1)
    ab = ABTraining(model, optimizer, recipes.local_sgd(2, every=2))
    ab._hooks.rebound.start(1)
    ab(-torch.ones(1, 1)).sum().backward()
    optimizer.first_step()
    ab(-torch.ones(1, 1)).sum().backward()
    optimizer.second_step()
    ab.step()
    assert model.weight.item() == pytest.approx(0.05)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_wrapper_that_calls_for_gradients_itself_is_seen_once() -> None:
    model = one_weight()
    optimizer = Sam(model.parameters(), SGD, lr=0.1)
    ab = ABTraining(model, optimizer, recipes.local_sgd(2, every=2))
    ab._hooks.rebound.start(1)

    def closure() -> None:
        ab(-torch.ones(1, 1)).sum().backward()

    for _ in range(2):
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        ab.step()
    assert model.weight.item() == pytest.approx(0.15)


def test_a_wrapper_that_makes_no_step_makes_none_here() -> None:
    model = one_weight()
    optimizer = Accumulating(SGD(model.parameters(), 0.1))
    ab = ABTraining(model, optimizer, recipes.local_sgd(2, every=2))
    ab._hooks.rebound.start(1)
    for call in range(4):
        ab(-torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if call % 2:
            ab.step()
    assert model.weight.item() == pytest.approx(0.3)  # two steps of two gradients each


@pytest.mark.parametrize("kind", [CallsParent, Renamed])
def test_a_class_below_a_known_one_trains_as_that_one_does(kind: type[AdamW]) -> None:
    """Steps inside steps are preconditioned and scaled once, and the state of the renamed one is projected."""
    state = "project" if kind is Renamed else "reset"
    ends = []
    for one in (AdamW, kind):
        options = {"rank_rule": FixedRank(3), "optimizer_state": state}
        recipe = recipes.ab_outer(20, every=4, warmup_steps=8, **options)
        loop = run_in_process(
            1, lambda comm, one=one, r=recipe: Loop(comm, r, make=lambda m: one(m.parameters(), 1e-2))
        )
        ends.append(loop[0].run())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_weights_changed_without_a_step_are_reported_at_the_first_step() -> None:
    model = build("mlp")
    optimizer = Silent(model.parameters(), 0.05)
    ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=2))
    x, y = batch("mlp", 0, 0)
    F.cross_entropy(ab(x), y).backward()
    optimizer.update()
    with pytest.raises(UsageError, match=r"0\.weight changed, but abtrain saw no call to step\(\) of Silent"):
        ab.step()


def test_an_optimizer_without_hooks_is_refused() -> None:
    model = build("mlp")
    optimizer = Accumulating(sgd(model.parameters()))
    groups = optimizer.optimizer.param_groups
    optimizer.optimizer = None
    type(optimizer).param_groups, kept = property(lambda self: groups), type(optimizer).param_groups
    type(optimizer).state, state = property(lambda self: {}), type(optimizer).state
    try:
        with pytest.raises(ConfigurationError, match=r"Accumulating does not call Optimizer\.__init__"):
            ABTraining(model, optimizer, recipes.local_sgd(4, every=2))
    finally:
        type(optimizer).param_groups, type(optimizer).state = kept, state


def test_a_step_inside_backward_is_reported_where_gradients_are_averaged() -> None:
    errors = run_gloo(2, _step_in_backward)
    assert all("inside the backward pass" in error for error in errors)


def _step_in_backward(comm: Communicator) -> str:
    model = build("mlp")
    optimizers = {p: sgd([p]) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    ab = ABTraining(model, list(optimizers.values()), recipes.ddp(4), communicator=comm)
    x, y = batch("mlp", comm.rank, 0)
    with pytest.raises(UsageError) as error:
        F.cross_entropy(ab(x), y).backward()
    return str(error.value)


def test_steps_inside_the_backward_pass_of_a_worker_alone_are_merged() -> None:
    def work(comm: Communicator) -> Tensor:
        model = build("mlp")
        optimizers = {p: sgd([p]) for p in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        ab = ABTraining(model, list(optimizers.values()), recipes.local_sgd(4, every=2), communicator=comm)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            model.zero_grad()
            ab.step()
        return model[0].weight.detach()

    one, other = run_in_process(2, work)
    assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_gradients_that_a_closure_makes_are_looked_at(policy: Any) -> None:
    model = build("mlp")
    before = model[0].weight.detach().clone()
    optimizer = sgd(model.parameters())
    ab = ABTraining(model, optimizer, recipes.ddp(4), on_nonfinite=policy)

    def closure() -> Tensor:
        loss = ab(batch("mlp", 0, 0)[0]).sum() * float("inf")
        loss.backward()
        return loss

    # Alone, nobody shares gradients: only `skip` looks at them.
    optimizer.step(closure)
    ab.step()
    assert ab.skipped_steps == ([0] if policy == "skip" else [])
    assert torch.equal(before, model[0].weight) == (policy == "skip")


def test_gradients_that_a_closure_makes_stop_all_where_they_are_shared() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        optimizer = sgd(model.parameters())
        ab = ABTraining(model, optimizer, recipes.ddp(4), communicator=comm)

        def closure() -> Tensor:
            loss = ab(batch("mlp", comm.rank, 0)[0]).sum() * float("inf")
            loss.backward()
            return loss

        optimizer.step(closure)

    assert all(isinstance(e, NonFiniteError) and "may have changed weights" in str(e) for e in told(2, work))


def test_a_bad_gradient_leaves_the_steps_of_all_optimizers_out() -> None:
    model = build("mlp")
    first, second = SGD(model[0].parameters(), 0.05), SGD([*model[2].parameters(), *model[4].parameters()], 0.05)
    before = [p.detach().clone() for p in model.parameters()]
    ab = ABTraining(model, [first, second], recipes.local_sgd(4, every=2), on_nonfinite="skip")
    x, y = batch("mlp", 0, 0)
    F.cross_entropy(ab(x), y).backward()
    model[4].bias.grad.fill_(float("nan"))
    first.step()
    second.step()
    ab.step()
    assert ab.skipped_steps == [0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("recipe", [recipes.local_sgd(12, every=4), recipes.diloco(12, every=4), HIDDEN])
def test_masters_of_half_precision_follow_merges(recipe: Recipe) -> None:
    """With gradients of zero after a merge, the optimizer writes back what it holds: what was merged."""

    def work(comm: Communicator) -> list[float]:
        model = nn.Linear(16, 8).bfloat16()
        nn.init.constant_(model.weight, 1.0)
        nn.init.constant_(model.bias, 0.5)
        optimizer, gaps = Masters(model.parameters(), 0.1), []
        ab = ABTraining(model, optimizer, recipes.local_sgd(12, every=4), communicator=comm)
        while not ab.finished:
            rest = ab.steps_done % 4 == 0
            x = torch.full((2, 16), 1.0 + comm.rank).bfloat16()
            (ab(x).sum() * (0 if rest else 0.01)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if rest:
                gaps.append(float(model.weight.detach().double().sum()))
            ab.step()
        return gaps

    one, other = run_in_process(2, work)
    assert one == other and len(set(one)) == len(one)


def test_slow_weights_follow_merges() -> None:
    """Without it, an average would go halfway back to what each worker held before."""

    def work(comm: Communicator) -> float:
        model = nn.Linear(4, 4)
        nn.init.constant_(model.weight, 2.0)
        nn.init.constant_(model.bias, 1.0)
        optimizer = Lookahead(SGD(model.parameters(), 0.01), every=3)
        ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=2), communicator=comm)
        for step in range(3):
            (ab(torch.full((1, 4), 1.0 + comm.rank)).sum() * (step < 2)).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        # Rank i has moved by -0.02 (1 + i); all became the mean, -0.03, and slow weights moved along.
        return float(model.weight.detach().mean())

    one, other = run_in_process(2, work)
    assert one == pytest.approx(2 - 0.03 + 0.5 * 0.02, abs=1e-6)
    assert other == pytest.approx(2 - 0.03 + 0.5 * 0.04, abs=1e-6)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_parameter_that_takes_the_memory_of_its_copy_is_merged_once(delay: int) -> None:
    def work(comm: Communicator, kind: type[Sam]) -> dict[str, Tensor]:
        model = build("mlp")
        optimizer = kind(model.parameters(), SGD, lr=0.05)
        ab = ABTraining(model, optimizer, recipes.diloco(12, every=4, delay=delay), communicator=comm)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            for half_a_step in (optimizer.first_step, optimizer.second_step):
                F.cross_entropy(ab(x), y).backward()
                half_a_step()
            optimizer.zero_grad()
            ab.step()
        return ab.dense_state_dict()

    copied, rebound = (run_in_process(2, lambda comm, k=kind: work(comm, k)) for kind in (Sam, RebindingSam))
    assert all(largest_difference(end, copied[0]) == 0 for end in rebound)


def test_masters_that_are_made_at_the_start_are_made_for_factors_too() -> None:
    # The preconditioner would change what an optimizer writes to its parameters.
    recipe = recipes.ab_outer(20, every=4, warmup_steps=8, rank_rule=FixedRank(3), damping=0.0)

    def work(comm: Communicator) -> None:
        model = build("mlp", torch.bfloat16)
        loop = Loop(comm, recipe, model, make=lambda model: EarlyMasters(model.parameters()))
        loop.run()
        for parameter, state in loop.optimizer.state.items():
            assert state["master"].dtype == torch.float32
            assert torch.equal(state["master"].bfloat16(), parameter)

    run_in_process(2, work)


@pytest.mark.parametrize("bad", [2, 3])
@pytest.mark.parametrize("kind", ["masters", "early masters", "lookahead"])
def test_copies_of_a_worker_that_was_left_out_begin_from_the_merge(kind: str, bad: int) -> None:
    make: dict[str, Callable[[nn.Module], Any]] = {
        "masters": lambda model: Masters(model.parameters()),
        "early masters": lambda model: EarlyMasters(model.parameters()),
        "lookahead": lambda model: Lookahead(SGD(model.parameters(), 0.05), every=3, early=True),
    }

    def work(comm: Communicator) -> dict[str, Tensor]:
        recipe = recipes.local_sgd(12, every=4)
        loop = Loop(comm, recipe, build("mlp", torch.float32), make=make[kind], on_nonfinite="drop_worker")
        while not loop.ab.finished:
            loop.step(float("nan") if comm.rank == 1 and loop.ab.steps_done == bad else 1.0)
        assert [entry["ranks"] for entry in loop.ab.dropped_parts] == [[1]]
        return loop.ab.dense_state_dict()

    one, other = run_in_process(2, work)
    assert all(torch.isfinite(weight).all() and torch.equal(weight, other[name]) for name, weight in one.items())


def test_copies_that_cannot_be_found_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    with caplog.at_level(logging.WARNING, "abtrain"):
        ABTraining(model, SlowInAttribute(model.parameters()), recipes.local_sgd(4, every=2))
    assert "SlowInAttribute keeps copies of the weights in its attribute 'slow'" in caplog.text
    model = build("mlp")
    with pytest.raises(
        ConfigurationError, match="attribute 'slow', which abtrain cannot convert when weights are factored"
    ):
        ABTraining(model, SlowInAttribute(model.parameters()), OUTER)


def test_a_merge_while_the_optimizer_evaluates_is_refused() -> None:
    model = build("mlp")
    optimizer = ScheduleFree(model.parameters())
    ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=2))
    x, y = batch("mlp", 0, 0)
    F.cross_entropy(ab(x), y).backward()
    optimizer.step()
    optimizer.eval()
    with pytest.raises(UsageError, match=r"evaluation mode at ab\.step\(\): call optimizer\.train\(\)"):
        ab.step()


def test_state_that_can_only_be_copied_is_refused_by_name() -> None:
    def work(comm: Communicator) -> None:
        Loop(comm, LOCAL, make=lambda model: Objects(model.parameters())).run()

    assert all(isinstance(e, UsageError) and "Objects keeps 'graft' (an Identity)" in str(e) for e in told(2, work))


@pytest.mark.parametrize("maker", ["lists", "codes", "rows"])
def test_state_missing_on_one_worker_is_equalized(maker: str) -> None:
    """A part of the model that some workers never used, until all share its gradients."""

    def work(comm: Communicator) -> Tensor:
        model = build("mlp")
        optimizer = MAKERS[maker](model)
        recipe = recipes.local_sgd(8, every=2, rebound_steps=4)
        ab = ABTraining(model, optimizer, recipe, communicator=comm, find_unused_parameters=True)
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            alone = ab.position is not None and ab.position.phase.name == "local"
            hidden = model[:2](x)
            ab(x) if not alone or comm.rank else hidden
            loss = F.cross_entropy(ab(x), y)
            loss.backward()
            if alone and comm.rank == 0:
                model[4].weight.grad = model[4].bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    one, other = run_in_process(2, work)
    assert torch.equal(one, other) and torch.isfinite(one).all()


def test_counts_in_param_groups_are_equalized() -> None:
    def work(comm: Communicator) -> list[int]:
        recipe = recipes.local_sgd(6, every=4, rebound_steps=2)
        loop = Loop(comm, recipe, make=lambda model: ScheduleFree(model.parameters()))
        loop.run(1)
        loop.optimizer.param_groups[0]["k"] += 3 * comm.rank
        loop.run()
        return [loop.optimizer.param_groups[0]["k"]]

    assert run_in_process(2, work) == [[9], [9]]


def test_an_optimizer_that_starts_with_state_may_start_factored() -> None:
    model = build("mlp")
    recipe = recipes.ab(9, warmup_steps=0, ab_steps=3, rebound_steps=0, sigma_cutoff=0.2)
    ab = ABTraining(model, Adagrad(model.parameters(), 1e-2), recipe)
    while not ab.finished:
        x, y = batch("mlp", 0, ab.steps_done)
        F.cross_entropy(ab(x), y).backward()
        ab.optimizer.step()
        ab.optimizer.zero_grad()
        ab.step()


def test_unknown_state_is_reset_where_weights_are_factored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "abtrain"):
        run_in_process(1, lambda comm: Loop(comm, OUTER, make=lambda model: Lists(model.parameters())).run())
        told_of = [record.message for record in caplog.records if "is reset" in record.message]
        assert told_of == [
            "the state of Lists cannot be converted to factors: it is reset whenever weights are factored"
        ]
        caplog.clear()
        run_in_process(1, lambda comm: Loop(comm, OUTER, make=lambda model: Renamed(model.parameters())).run())
        assert not caplog.records or "is reset" not in caplog.text


def test_a_new_run_with_an_old_optimizer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    optimizer = AdamW(model.parameters())
    F.cross_entropy(model(batch("mlp", 0, 0)[0]), batch("mlp", 0, 0)[1]).backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "abtrain"):
        ABTraining(model, optimizer, recipes.local_sgd(4, every=2))
    assert "has already made 1 steps, but the recipe begins at step 0" in caplog.text


def test_an_optimizer_whose_own_state_cannot_be_saved_is_refused() -> None:
    class Broken(SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "generator": torch.Generator()}

    model = build("mlp")
    with pytest.raises(ConfigurationError, match=r"Broken\.state_dict\(\) cannot be saved: generator"):
        ABTraining(model, Broken(model.parameters(), 0.1), recipes.local_sgd(4, every=2))


def test_an_optimizer_that_talks_itself_is_refused() -> None:
    class Gathering(SGD):
        def step(self, closure: Any = None) -> None:
            torch.distributed.all_reduce(self.param_groups[0]["params"][0].grad)

    model = build("mlp")
    with pytest.raises(ConfigurationError, match=r"Gathering communicates with other workers itself \("):
        ABTraining(model, Gathering(model.parameters(), 0.1), recipes.local_sgd(4, every=2))


def test_a_rate_that_is_not_there_cannot_be_scaled() -> None:
    model = build("mlp")
    optimizer = sgd(model.parameters())
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ConfigurationError, match="a param group of SGD has no 'lr'"):
        ABTraining(model, optimizer, recipes.ab_outer(4, every=2, warmup_steps=0))


@pytest.mark.parametrize("kind", [Muon, optim.Muon])
def test_muon_follows_weights_into_their_factors(kind: type[Muon]) -> None:
    model = build("mlp")
    ab = ABTraining(model, muon_and_adamw(model, kind), OUTER)
    moments = []
    while not ab.finished:
        x, y = batch("mlp", 0, ab.steps_done)
        F.cross_entropy(ab(x), y).backward()
        for optimizer in ab.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ab.step()
        moments.append(len(ab.optimizers[0].state))
        if len(moments) == 8:
            # The factors begin with the momentum of their weights.
            momenta = [held["momentum_buffer"] for held in ab.optimizers[0].state.values()]
            assert len(momenta) > 3 and all(momentum.any() for momentum in momenta)
    assert isinstance(ab.optimizer, Muon)
    assert moments[0] == 3 and moments[8] == len(ab.optimizers[0].param_groups[0]["params"]) > 3


def test_old_state_loaded_later_is_reported_at_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mlp")
    old = AdamW(model.parameters())
    F.cross_entropy(model(batch("mlp", 0, 0)[0]), batch("mlp", 0, 0)[1]).backward()
    old.step()
    optimizer = AdamW(model.parameters())
    with caplog.at_level(logging.WARNING, "abtrain"):
        ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=2))
        assert "already" not in caplog.text
        optimizer.load_state_dict(old.state_dict())
        F.cross_entropy(ab(batch("mlp", 0, 0)[0]), batch("mlp", 0, 0)[1]).backward()
        optimizer.step()
        ab.step()
    assert "has already made 1 steps" in caplog.text


def test_a_run_left_during_a_round_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    loops: list[Loop] = []

    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.local_sgd(8, every=4))
        loops.append(loop)
        loop.run(6 if comm.rank else 5)
        if comm.rank:
            loop.ab.state_dict()

    # Rank 1 is a step ahead, which no merge sees.
    run_in_process(2, work)
    with caplog.at_level(logging.WARNING, "abtrain"):
        progress.warn()
    told_of = [record.message for record in caplog.records]
    assert any("ends at step 5, 3 steps before recipe 'local_sgd' ends, within a round" in text for text in told_of)
    assert not any("ends at step 6" in text for text in told_of)
