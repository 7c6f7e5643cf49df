"""Noise correction: steps of Adam on a share of a batch, as long as those of the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.noise import NoiseCorrection
from tests.cases import batch, build, largest_difference

BETAS = (0.9, 0.999)


def moved(
    gradients: Tensor, workers: int, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
) -> tuple[Tensor, Tensor]:
    """The last step of a parameter of ones, by rows of gradients: without the correction, and with it."""
    steps = []
    for corrected in (False, True):
        p = nn.Parameter(torch.ones(gradients.shape[1]))
        optimizer = make([p], lr=1e-3, **options)
        noise = NoiseCorrection(optimizer, workers)
        for row in gradients:
            before = p.detach().clone()
            p.grad = row.clone()
            if corrected:
                noise.before_step()
            optimizer.step()
            if corrected:
                noise.after_step()
        steps.append(p.detach() - before)
    return steps[0], steps[1]


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_gradients_that_agree_make_steps_as_long_as_before(workers: int) -> None:
    plain, corrected = moved(torch.full((50, 3), 0.3), workers, betas=BETAS, weight_decay=0.1)
    torch.testing.assert_close(corrected, plain, atol=1e-6, rtol=1e-3)


def test_gradients_of_noise_alone_make_steps_up_to_root_n_times_as_long() -> None:
    noise = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    plain, corrected = moved(noise, 16, betas=BETAS, weight_decay=0.0)
    ratio = corrected / plain
    assert ratio.min() > 0.9 and ratio.max() < 4.1  # but for rounding of a parameter of 1
    # The mean of the last tenth or so is no more than noise either: 0.05 of the mean square.
    assert 2.5 < ratio.median() < 4


def test_steps_are_those_of_the_whole_batch() -> None:
    """Gradients of 1 with noise of 3 in a worker's share: the whole batch of 16 workers sees 3 / 4."""
    random = torch.Generator().manual_seed(0)
    share = 1 + 3 * torch.randn(2000, 2000, generator=random)
    whole = 1 + 0.75 * torch.randn(2000, 2000, generator=random)
    options = {"betas": (0.99, 0.999), "weight_decay": 0.0}
    plain, corrected = moved(share, 16, **options)
    wanted, _ = moved(whole, 1, **options)
    assert plain.mean() / wanted.mean() < 0.5
    assert corrected.mean() / wanted.mean() == pytest.approx(1, abs=0.1)


def test_weight_decay_is_left_alone() -> None:
    noise = 1e-3 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    plain, corrected = moved(noise, 16, betas=BETAS, weight_decay=0.5)
    without, corrected_without = moved(noise, 16, betas=BETAS, weight_decay=0.0)
    torch.testing.assert_close(corrected - corrected_without, plain - without, atol=3e-5, rtol=0.05)


def test_elements_without_gradients_stay_where_they_are() -> None:
    plain, corrected = moved(torch.zeros(3, 4), 8, weight_decay=0.0)
    assert not plain.any() and not corrected.any()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_other_optimizers_are_left_alone(make: Callable[..., torch.optim.Optimizer]) -> None:
    noise = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    plain, corrected = moved(noise, 16, make)
    assert torch.equal(plain, corrected)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_of_adams_family_are_corrected(make: Callable[..., torch.optim.Optimizer]) -> None:
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    plain, corrected = moved(noise, 4, make, betas=BETAS)
    assert 1.3 < (corrected / plain).median() < 2


def _trained(recipe: str, workers: int, steps: int, **options: Any) -> dict[str, Tensor]:
    models = [build("mlp") for _ in range(workers)]

    def run(comm: Communicator) -> None:
        model = models[comm.rank]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ab = ABTraining(model, optimizer, recipes.build(recipe, 12, every=3, **options), communicator=comm)
        while ab.steps_done < steps:
            x, y = batch("mlp", comm.rank, ab.steps_done)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()

    run_in_process(workers, run)
    return dict(models[0].state_dict())


def _changed(recipe: str, workers: int, steps: int = 12, **options: Any) -> bool:
    plain, corrected = (_trained(recipe, workers, steps, noise_correction=on, **options) for on in (False, True))
    return largest_difference(plain, corrected) > 0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("local_sgd", {}), ("diloco", {}), ("ab_outer", {}), ("ab_outer", {"warmup_steps": 9, "warmup_every": 0})],
)
def test_it_changes_training_apart(recipe: str, options: dict[str, Any]) -> None:
    assert _changed(recipe, 2, **options)


def test_one_worker_alone_has_the_whole_batch() -> None:
    assert not _changed("local_sgd", 1)


def test_shared_gradients_are_those_of_the_whole_batch() -> None:
    assert not _changed("local_sgd", 2, steps=6, warmup_steps=6)
    assert _changed("local_sgd", 2, steps=7, warmup_steps=6)
