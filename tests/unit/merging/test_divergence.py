"""The distance of groups at merges: what it is, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from abtrain import recipes
from abtrain.checkpoint.digest import weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.engine.ab_training import ABTraining
from abtrain.merging.divergence import divergence
from tests import cases

SUBSPACE = pytest.approx(0.5**0.5)


def observed(changes: list[dict[str, torch.Tensor]], anchors: dict[str, torch.Tensor]) -> dict[str, Any]:
    mean = {name: torch.stack([change[name] for change in changes]).mean(dim=0) for name in anchors}

    results = run_in_process(len(changes), lambda comm: divergence(comm, changes[comm.rank], mean, anchors))
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
