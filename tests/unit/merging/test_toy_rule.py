"""A merge rule of one's own: its class, and one line where recipes find it by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.plan.recipe_words import phases_in_words
from abtrain.errors import ConfigurationError, UsageError
from abtrain.recipes.merges import BY_NAME, MergeRule
from abtrain.recipes.numbers import share_problems

STEPS, EVERY, LR = 6, 3, 0.1


@dataclass(frozen=True)
class Cautious(MergeRule):
    """A share of the average change; the first worker counts twice."""

    share: float = 0.5

    words = "cautious"

    def problems(self) -> list[str]:
        return share_problems("share", self.share)

    def shares(self, alive: Any, trained: Any, parts: Any) -> list[float]:
        weights = [well * (2 if rank == 0 else 1) for rank, well in enumerate(alive)]
        return [weight / sum(weights) for weight in weights]

    def step(self, change: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.share * change, None


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_NAME, "cautious", Cautious)


def gradient_of(rank: int, step: int) -> Tensor:
    return torch.randn(1, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def run(comm: Communicator, options: dict[str, Any], loss: bool = True) -> Tensor:
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    ab = ABTraining(model, optimizer, recipes.local_sgd(STEPS, every=EVERY, **options), communicator=comm)
    for step in range(STEPS):
        output = ab(gradient_of(comm.rank, step)).sum()
        output.backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step(output if loss else None)
    return model.weight.detach()


def by_hand() -> Tensor:
    weight = torch.zeros(1, 4)
    for start in range(0, STEPS, EVERY):
        changes = [-LR * sum(gradient_of(rank, start + step) for step in range(EVERY)) for rank in range(2)]
        weight = weight + 0.5 * (2 * changes[0] + changes[1]) / 3
    return weight


@pytest.mark.parametrize("options", [{"merge": "cautious"}, {"merge": Cautious(0.5)}])
@pytest.mark.parametrize("delay", [0, 1])
def test_it_merges_by_name_and_as_an_object(options: dict[str, Any], delay: int) -> None:
    one, other = run_in_process(2, lambda comm: run(comm, {**options, "delay": delay}))
    assert torch.equal(one, other)
    # Gradients of this model do not depend on its weights: hidden merges come to the same.
    torch.testing.assert_close(one, by_hand())


def test_its_name_for_people() -> None:
    assert "(cautious, fp32)" in phases_in_words(recipes.local_sgd(STEPS, every=EVERY, merge="cautious"))[0]


def test_its_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"share=2\.0 is out of range"):
        recipes.local_sgd(STEPS, every=EVERY, merge=Cautious(2.0))


def test_a_rule_that_needs_losses_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cautious, "needs_losses", True)
    with pytest.raises(UsageError, match="without one"):
        run_in_process(2, lambda comm: run(comm, {"merge": "cautious"}, loss=False))
