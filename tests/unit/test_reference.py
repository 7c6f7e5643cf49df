"""The engine equals the paper's algorithm on one page, weight by weight."""

import pytest
import torch

from abtrain.comm.in_process import run_in_process
from tests import cases
from tests.cases import build, largest_difference, train, train_by_reference

LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)]


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("recipe", ["ab", "ab_no_groups"])
@pytest.mark.parametrize(("workers", "group_size"), LAYOUTS)
def test_three_cycles_equal_the_reference(kind: str, recipe: str, workers: int, group_size: int) -> None:
    models = [build(kind) for _ in range(workers)]
    results = run_in_process(workers, lambda comm: train(comm, models[comm.rank], kind, recipe), group_size=group_size)
    expected = train_by_reference(kind, recipe, workers, group_size)
    for result in results:
        assert largest_difference(result, expected) < 1e-9
    assert all(torch.equal(results[0][name], result[name]) for result in results for name in result)


def test_no_warmup_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SCHEDULE, "warmup_steps", 0)
    models = [build("mlp") for _ in range(2)]
    results = run_in_process(2, lambda comm: train(comm, models[comm.rank], "mlp"))
    assert largest_difference(results[0], train_by_reference("mlp", "ab", 2, 1)) < 1e-9


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_momentum_sgd_equals_the_reference(kind: str) -> None:
    models = [build(kind) for _ in range(4)]
    results = run_in_process(4, lambda comm: train(comm, models[comm.rank], kind, optimizer="sgd"))
    assert largest_difference(results[0], train_by_reference(kind, "ab", 4, 1, "sgd")) < 1e-9


def test_shared_svd_gives_the_same_weights() -> None:
    models = [build("mlp") for _ in range(3)]
    results = run_in_process(3, lambda comm: train(comm, models[comm.rank], "mlp", svd="shared"))
    assert largest_difference(results[0], train_by_reference("mlp", "ab", 3, 1)) < 1e-9


def test_the_reference_really_trains_and_factors() -> None:
    start = dict(build("mlp").state_dict())
    end = train_by_reference("mlp", "ab", 4, 1)
    together = train_by_reference("mlp", "ab_no_groups", 4, 1)
    assert largest_difference(start, end) > 1e-2
    assert largest_difference(end, together) > 1e-4
