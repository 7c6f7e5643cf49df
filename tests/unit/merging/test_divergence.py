"""The distance of groups at merges: what it is, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from abtrain import Phase, Recipe, WeightSync, recipes
from abtrain.checkpoint.digest import weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.engine.ab_training import ABTraining
from abtrain.merging.divergence import divergence, local_terms
from tests import cases

FACTORS = ("v.A", "v.B")
SUBSPACE = pytest.approx(0.5**0.5)


def observed(changes: list[dict[str, torch.Tensor]], anchors: dict[str, torch.Tensor]) -> dict[str, Any]:
    mean = {name: torch.stack([change[name] for change in changes]).mean(dim=0) for name in anchors}

    terms = [local_terms(own, mean, anchors, FACTORS) for own in changes]
    results = run_in_process(len(changes), lambda comm: divergence(comm, terms[comm.rank]))
    assert all(found == results[0] for found in results)
    return results[0]


def test_distance_and_subspace_by_hand() -> None:
    anchors = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "v.A": torch.tensor([[1.0], [0.0]]), "b": torch.ones(2)}
    ahead = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "v.A": torch.tensor([[0.0], [1.0]]), "b": torch.ones(2)}
    behind = {name: -change for name, change in ahead.items()}
    found = observed([ahead, behind], anchors)
    assert found.keys() == {"w", "v.A"}  # vectors have no directions to lose
    assert found["w"] == {"distance": pytest.approx(1 / 5)}
    # (1, 1) and (1, -1) against (1, 0): 45 degrees, cos^2 = 1/2.
    assert found["v.A"] == {"distance": pytest.approx(1.0), "subspace": SUBSPACE}


def test_factors_that_are_scaled_keep_their_subspace() -> None:
    B = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    found = observed([{"v.B": 0.5 * B}, {"v.B": -0.5 * B}], {"v.B": B})
    assert found["v.B"]["distance"] == pytest.approx(0.5)
    assert found["v.B"]["subspace"] == pytest.approx(0, abs=1e-6)


def test_workers_that_hold_the_same_are_at_no_distance() -> None:
    same = {"w": torch.eye(3)}
    assert observed([same, same], {"w": torch.ones(3, 3)})["w"] == {"distance": 0.0}


class StateSpace(nn.Module):
    """Names its parameters as papers on state-space models do; they are no factors."""

    def __init__(self) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
        self.layers = nn.ParameterDict({"A": torch.eye(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.B @ x.to(self.B.dtype)).abs() @ self.layers["A"]


def diverging(comm: Communicator, steps: int, sync: WeightSync) -> list[dict[str, Any]]:
    model = StateSpace()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe("r", steps, cycle=(Phase("p", steps, sync=sync),))
    ab = ABTraining(model, optimizer, recipe, communicator=comm, measure_divergence=True)
    while not ab.finished:
        ab(torch.full((3,), 1.0 + comm.rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab.divergence


def test_a_parameter_with_the_name_of_a_factor_has_no_subspace() -> None:
    one, other = run_in_process(2, lambda comm: diverging(comm, 4, WeightSync(2)))
    assert one == other and len(one) == 2
    assert all(layer.keys() == {"distance"} for entry in one for layer in entry["layers"].values())


def test_every_merge_is_measured_when_several_end_in_one_step() -> None:
    sync = WeightSync(4, delay=3, fragments=2)
    for entries in run_in_process(2, lambda comm: diverging(comm, 8, sync)):
        assert [(entry["step"], list(entry["layers"])) for entry in entries] == [
            (2, ["B"]),
            (4, ["layers.A"]),
            (6, ["B"]),
            (8, ["B", "layers.A"]),
        ]


@pytest.mark.parametrize("recipe", ["ab", "ab_outer", "local_sgd"])
def test_training_is_the_same_with_it(recipe: str) -> None:
    options: dict[str, Any] = {"ab": {"ab_steps": 3}, "ab_outer": {"every": 4, "delay": 1}}.get(recipe, {"every": 5})

    def run(measured: bool) -> list[Any]:
        def worker(comm: Communicator) -> Any:
            model = cases.build("mlp")
            optimizer = cases.adamw(model.parameters())
            built = recipes.build(recipe, 20, **options)
            ab = ABTraining(model, optimizer, built, communicator=comm, measure_divergence=measured)
            for step in range(20):
                x, _ = cases.batch("mlp", comm.rank, step)
                ab(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                ab.step()
            return weights_digest(ab.dense_state_dict()), ab.divergence

        return run_in_process(4, worker)

    plain, measured = run(measured=False), run(measured=True)
    assert plain[0][0] == measured[0][0] and plain[0][1] == []
    assert all(result[1] == measured[0][1] for result in measured)
    assert {entry["phase"] for entry in measured[0][1]} <= {"group", "factors", "warmup", "local"}
    distances = [layer["distance"] for entry in measured[0][1] for layer in entry["layers"].values()]
    assert len(distances) > 3 and all(0 <= distance < 10 for distance in distances) and max(distances) > 0
