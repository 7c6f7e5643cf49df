import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.task import (
    TASKS,
    Task,
    batches,
    build_model,
    build_optimizer,
    build_schedule,
    flip_and_shift,
)
from abtrain.errors import ConfigurationError

SAMPLES = 50


def numbered() -> Data:
    """Samples that tell which they are."""
    numbers = torch.arange(SAMPLES)
    return Data(Split(numbers, numbers), Split(numbers, numbers % 2))


def task(**changes: object) -> Task:
    settings: dict[str, object] = {
        "name": "numbers",
        "model": lambda: nn.Linear(1, 2),
        "find": lambda folder: None,
        "load": lambda folder: numbered(),
        "prepare": Tensor.float,
        "steps": 10,
    }
    return Task(**(settings | changes))  # type: ignore[arg-type]


def drawn(count: int, *, rank: int = 0, seed: int = 0, start: int = 0, world_size: int = 3) -> list[list[int]]:
    stream = batches(task(), numbered(), seed=seed, rank=rank, world_size=world_size, batch_size=4, start=start)
    return [y.tolist() for _, y in itertools.islice(stream, count)]


def test_workers_share_an_epoch_without_overlap() -> None:
    per_epoch = SAMPLES // 3 // 4
    seen = [number for rank in range(3) for batch in drawn(per_epoch, rank=rank) for number in batch]
    assert len(seen) == len(set(seen)) == 3 * per_epoch * 4


def test_every_epoch_has_an_order_of_its_own() -> None:
    per_epoch = SAMPLES // 4
    stream = drawn(2 * per_epoch, world_size=1)
    assert stream[:per_epoch] != stream[per_epoch:]
    assert drawn(per_epoch, world_size=1) == stream[:per_epoch]
    assert drawn(per_epoch, world_size=1, seed=1) != stream[:per_epoch]


@pytest.mark.parametrize("start", [1, 4, 5, 11])
def test_a_stream_can_start_anywhere(start: int) -> None:
    assert drawn(3, start=start) == drawn(start + 3)[start:]


def test_augmentation_depends_on_seed_rank_and_step_alone() -> None:
    noisy = task(augment=lambda x, generator: x + torch.rand(len(x), generator=generator))

    def noise(seed: int, rank: int, step: int) -> list[float]:
        stream = batches(noisy, numbered(), seed=seed, rank=rank, world_size=2, batch_size=4, start=step)
        x, y = next(stream)
        return (x - y).tolist()

    places = list(itertools.product(range(2), repeat=3))
    drawn_noise = [noise(*place) for place in places]
    assert all(a != b for a, b in itertools.combinations(drawn_noise, 2))
    torch.manual_seed(3)
    assert [noise(*place) for place in places] == drawn_noise


def test_too_small_a_training_set_is_an_error_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"batch size 20 x 3 workers .* at most 16"):
        batches(task(), numbered(), seed=0, rank=0, world_size=3, batch_size=20)


def test_flip_and_shift_moves_whole_images() -> None:
    images = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 3] = 5  # left of the middle, so that a mirrored image shows
    moved = flip_and_shift(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.dtype == images.dtype
    assert moved.flatten(1).sum(dim=1).tolist() == [5] * 400
    _, _, rows, columns = moved.nonzero(as_tuple=True)
    assert set(rows.tolist()) == {3, 4, 5}
    assert set(columns.tolist()) == {2, 3, 4} | {4, 5, 6}


def test_flip_and_shift_moves_zeros_in() -> None:
    moved = flip_and_shift(torch.ones(400, 1, 6, 6), torch.Generator().manual_seed(0))
    kept = moved.flatten(1).sum(dim=1)
    assert kept.max() == 36 and kept.min() == 25


def test_build_model_follows_the_seed_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (build_model(TASKS["digits-mlp"], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0].weight, again[0].weight)  # type: ignore[index]
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[index]


def test_build_model_orthogonal() -> None:
    weight = build_model(TASKS["digits-mlp"], 0, "orthogonal")[2].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)


def test_weight_decay_is_for_matrices() -> None:
    model = TASKS["fashion-cnn"].model()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.3)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and {p.ndim for p in decayed["params"]} == {2, 4}
    assert spared["weight_decay"] == 0 and {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedule_climbs_then_falls_to_zero(steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    climb = max(1, round(0.05 * steps))
    assert rates[climb - 1] == 2.0 == max(rates)
    assert rates[:climb] == sorted(rates[:climb]) and rates[climb:] == sorted(rates[climb:], reverse=True)
    assert min(rates) > 0
    if steps > 1:
        assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


class Parity(nn.Module):
    """Knows the answer of `numbered`, and is unsure about the last sample."""

    def forward(self, x: Tensor) -> Tensor:
        odd = torch.where(x == SAMPLES - 1, 1 - x % 2, x % 2)
        return torch.stack([1 - odd, odd], dim=1) * 100.0


def test_evaluate() -> None:
    model = Parity().train()
    scores = evaluate(model, task(), numbered(), batch_size=7)
    assert scores["top1"] == pytest.approx(98)
    assert scores["loss"] == pytest.approx(100 / SAMPLES)
    assert model.training
    assert evaluate(model.eval(), task(classifies=False), numbered())["top1"] is None
    assert not model.training


def test_a_random_model_is_worth_what_chance_is() -> None:
    gpt = TASKS["pysrc-gpt"]
    data = Data(*(Split(*torch.randint(256, (2, 10, 128), dtype=torch.uint8)) for _ in range(2)))
    scores = evaluate(build_model(gpt, 0), gpt, data)
    assert scores["top1"] is None and scores["loss"] == pytest.approx(math.log(256), rel=0.1)


@pytest.mark.parametrize("name", ["digits-mlp", "pysrc-gpt"])
def test_tasks_fit_their_data(name: str) -> None:
    chosen = TASKS[name]
    x, y = next(batches(chosen, chosen.load(None), seed=0, rank=0, world_size=4, batch_size=chosen.batch_size))
    loss = chosen.loss(build_model(chosen, 0)(x), y)
    assert loss.ndim == 0 and math.isfinite(loss.item())


def test_random_tokens_are_the_same_everywhere_and_each_target_is_the_next() -> None:
    data = TASKS["random-gpt2"].load(None)
    again = TASKS["random-gpt2"].load(None)
    assert data.train.x.shape == (4096, 64) and len(data.test) == 16  # type: ignore[attr-defined]
    assert torch.equal(data.train.x[:, 1:], data.train.y[:, :-1])  # type: ignore[attr-defined]
    assert torch.equal(data.train.x, again.train.x)  # type: ignore[attr-defined]
