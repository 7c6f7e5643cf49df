"""Buffers at merges: what all workers hold the same stays as it is, to the bit, whatever it holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import ConfigurationError, NonFiniteError
from abtrain.recipes.recipe import Recipe
from tests.cases import batch, build, seeded
from tests.faults.loops import told
from tests.gloo import run_gloo

RECIPES = {
    "local_sgd": recipes.local_sgd(24, every=4),
    "diloco hidden": recipes.diloco(24, every=8, delay=4, fragments=2, wire="int8"),
    "ab_outer": recipes.ab_outer(24, every=4, warmup_steps=8),
    "ab_local": recipes.ab_local(24, every=4, warmup_steps=8),
    "ab": recipes.ab(24, warmup_steps=4, ab_steps=4, rebound_steps=2),
}

CONSTANTS: dict[str, Callable[[], Tensor]] = {
    "mask": lambda: torch.triu(torch.full((4, 4), -math.inf), 1),
    "frequencies": lambda: torch.logspace(-4, 1, 333),
    "nan": lambda: torch.full((3,), math.nan),
    "halves": lambda: torch.logspace(-3, 1, 33).half(),
    "flags": lambda: torch.tensor([True, False]),
    "codes": lambda: torch.arange(5, dtype=torch.uint8),
    "complex": lambda: torch.polar(torch.ones(7), torch.arange(7.0)),
    "scalar": lambda: torch.tensor(0.1),
    "zeros": lambda: torch.tensor([0.0, -0.0]),
    "strided": lambda: torch.arange(12.0).view(3, 4).T,
    "empty": lambda: torch.zeros(0, 3),
}


class WithBuffers(nn.Module):
    def __init__(self, buffers: dict[str, Tensor], norm: bool = False) -> None:
        super().__init__()
        self.net = build("mlp", torch.float32)
        self.norm = nn.BatchNorm1d(10) if norm else nn.Identity()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.norm(x))
        return y


def train(
    comm: Communicator,
    model: nn.Module,
    recipe: Recipe,
    each: Callable[[ABTraining], None] | None = None,
    **options: Any,
) -> ABTraining:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ab = ABTraining(model, optimizer, recipe, communicator=comm, **options)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if each is not None:
            each(ab)
        ab.step()
    return ab


def bits(tensor: Tensor) -> bytes:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def constants_after(comm: Communicator, name: str) -> dict[str, bytes]:
    model = WithBuffers({key: make() for key, make in CONSTANTS.items()}, norm=True)

    def look(ab: ABTraining) -> None:
        if ab.steps_done % 5 == 2:
            with ab.merged():
                pass

    train(comm, model, RECIPES[name], look)
    return {key: bits(model.get_buffer(key)) for key in CONSTANTS}


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_constants_stay_as_they_are(name: str, workers: int) -> None:
    wanted = {key: bits(make()) for key, make in CONSTANTS.items()}
    assert run_in_process(workers, lambda comm: constants_after(comm, name)) == [wanted] * workers


def test_constants_stay_as_they_are_in_processes() -> None:
    wanted = {key: bits(make()) for key, make in CONSTANTS.items()}
    assert run_gloo(3, constants_after, "diloco hidden") == [wanted] * 3


@pytest.mark.parametrize("workers", [3, 7])
@pytest.mark.parametrize("delay", [0, 2])
def test_what_changes_everywhere_in_the_same_way_stays_too(delay: int, workers: int) -> None:
    """A schedule in a buffer, and a mask that is recreated."""

    def work(comm: Communicator) -> list[tuple[bytes, bytes]]:
        model = WithBuffers({"decay": torch.tensor(0.1), "mask": torch.zeros(5)})
        seen = []

        def change(ab: ABTraining) -> None:
            model.get_buffer("decay").mul_(0.97)
            model.get_buffer("mask").copy_(torch.where(torch.arange(5) < ab.steps_done % 5, -math.inf, 0.0))
            seen.append((bits(model.get_buffer("decay")), bits(model.get_buffer("mask"))))

        train(comm, model, recipes.local_sgd(30, every=3, delay=delay), change)
        assert seen[-1] == (bits(model.get_buffer("decay")), bits(model.get_buffer("mask")))
        return seen

    decay, wanted = torch.tensor(0.1), []
    for _ in range(30):
        decay.mul_(0.97)
        wanted.append(bits(decay))
    for seen in run_in_process(workers, work):
        assert [one for one, _ in seen] == wanted


def test_equal_buffers_cost_no_bytes() -> None:
    def sent(buffers: dict[str, Tensor]) -> int:
        def work(comm: Communicator) -> int:
            train(comm, WithBuffers(buffers), RECIPES["local_sgd"])
            return int(comm.meter.payload()["by_phase"]["local"])

        return run_in_process(3, work)[0]

    assert sent({"pe": torch.randn(1000), "mask": torch.full((9,), -math.inf)}) == sent({})


def test_running_statistics_are_averaged_until_they_are_frozen() -> None:
    """Then they stay as the last merge has left them."""

    def work(comm: Communicator) -> tuple[list[bytes], int]:
        model = WithBuffers({}, norm=True)
        seen: list[bytes] = []

        def freeze(ab: ABTraining) -> None:
            if ab.steps_done == 7:
                model.norm.eval()
            if ab.steps_done % 4 == 0 and ab.steps_done:
                seen.append(bits(model.get_buffer("norm.running_mean")))

        train(comm, model, recipes.local_sgd(40, every=4), freeze)
        return seen, int(model.get_buffer("norm.num_batches_tracked"))

    for seen, count in run_in_process(3, work):
        assert len(set(seen[2:])) == 1 and seen[0] != seen[2]
        assert count == 8
    together = [seen for seen, _ in run_in_process(3, work)]
    assert together[0][2:] == together[1][2:] == together[2][2:]


@pytest.mark.parametrize("policy", ["stop", "drop_worker"])
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("before", [0, 6])
def test_a_buffer_that_is_not_finite_on_one_worker(policy: Any, delay: int, before: int) -> None:
    """Before buffers were ever compared, and after; it is named."""

    def work(comm: Communicator) -> list[float]:
        model = WithBuffers({"mask": torch.full((2,), -math.inf)}, norm=True)

        def spoil(ab: ABTraining) -> None:
            if ab.steps_done == before and comm.rank == 1:
                model.get_buffer("norm.running_var")[0] = math.nan

        train(comm, model, recipes.local_sgd(16, every=4, delay=delay), spoil, on_nonfinite=policy)
        return [*model.get_buffer("norm.running_var").tolist(), *model.get_buffer("mask").tolist()]

    if policy == "stop":
        for error in told(3, work):
            assert isinstance(error, NonFiniteError)
            assert "the merge found NaN or infinity on rank 1 (buffer norm.running_var)" in str(error)
        return
    first, second, third = run_in_process(3, work)
    assert (
        first == second == third and all(math.isfinite(value) for value in first[:-2]) and first[-2:] == [-math.inf] * 2
    )


def test_what_cannot_be_averaged_follows_the_first_finite_worker() -> None:
    def work(comm: Communicator) -> tuple[list[bool], list[int]]:
        model = WithBuffers({"flags": torch.tensor([True, False]), "codes": torch.arange(3)})

        def change(ab: ABTraining) -> None:
            if ab.steps_done == 5:
                model.get_buffer("flags")[1] = comm.rank == 1
                model.get_buffer("codes").add_(comm.rank)
                if comm.rank == 0:
                    model.get_parameter("net.0.weight").data[0] = math.nan

        train(comm, model, recipes.local_sgd(8, every=4), change, on_nonfinite="drop_worker")
        return model.get_buffer("flags").tolist(), model.get_buffer("codes").tolist()

    assert run_in_process(3, work) == [([True, True], [1, 2, 3])] * 3


@pytest.mark.parametrize("spoil", [False, True], ids=["changed", "spoilt"])
def test_a_hidden_merge_that_is_begun_again_merges_what_it_began_with(spoil: bool) -> None:
    """Later changes of the buffers do not matter."""

    def run(comm: Communicator, resumes: bool) -> list[float]:
        model = WithBuffers({}, norm=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ab = ABTraining(model, optimizer, recipes.local_sgd(16, every=8, delay=6), communicator=comm)
        while not ab.finished:
            if ab.steps_done == 9 and spoil and comm.rank == 1:
                model.get_buffer("norm.running_mean").fill_(math.nan)
            if ab.steps_done == 10 and resumes:
                ab.load_state_dict(copy.deepcopy(ab.state_dict()))
            if ab.steps_done == 12 and spoil and comm.rank == 1:
                model.get_buffer("norm.running_mean").zero_()
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return [*model.get_buffer("norm.running_mean").tolist(), *model.get_buffer("norm.running_var").tolist()]

    assert run_in_process(2, lambda comm: run(comm, True)) == run_in_process(2, lambda comm: run(comm, False))


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64], ids=str)
def test_a_gradient_that_is_not_finite_once_drops_its_worker_once(kind: torch.dtype) -> None:
    """Complex numbers in the optimizer's state are looked at too."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = build("mlp", torch.float32), nn.Parameter(torch.ones(5, dtype=kind))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x) * self.scale.abs()
            return y

    def work(comm: Communicator) -> list[dict[str, Any]]:
        model = Scaled()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        ab = ABTraining(model, optimizer, recipes.local_sgd(24, every=4), communicator=comm, on_nonfinite="drop_worker")
        while not ab.finished:
            x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            if ab.steps_done == 5 and comm.rank == 1:
                assert model.scale.grad is not None
                model.scale.grad *= math.nan
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return ab.dropped_parts

    assert run_in_process(2, work) == [[{"step": 8, "ranks": [1]}]] * 2


def changed_here(rank: int) -> Callable[[ABTraining], None]:
    """Something of its own on every worker, in buffers of all kinds."""

    def change(ab: ABTraining) -> None:
        if ab.steps_done == 5:
            model = ab.module
            model.get_buffer("keep")[rank] = 0.0
            model.get_buffer("codes").copy_(torch.randn(3, generator=torch.Generator().manual_seed(rank)))
            model.get_buffer("unit").copy_(F.normalize(torch.arange(1.0, 4.0) ** rank, dim=0))
            model.get_buffer("level").fill_(float(rank))

    return change


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("workers", [2, 3])
def test_only_statistics_are_averaged(delay: int, workers: int) -> None:
    """The mean of masks, of codebooks or of unit vectors is none; a glob says what else is averaged."""

    def work(comm: Communicator) -> tuple[dict[str, list[float]], list[float], str]:
        buffers = {"keep": torch.ones(6), "codes": torch.zeros(3), "unit": torch.zeros(3), "level": torch.zeros(1)}
        model = WithBuffers(buffers, norm=True)
        recipe = recipes.local_sgd(8, every=4, delay=delay)
        ab = train(comm, model, recipe, changed_here(comm.rank), average_buffers=["lev*"])
        values = {name: model.get_buffer(name).tolist() for name in buffers}
        return values, model.get_buffer("norm.running_mean").tolist(), str(ab.describe())

    (first, statistics, text), *others = run_in_process(workers, work)
    assert all((values, found) == (first, statistics) for values, found, _ in others)
    assert first["keep"] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert first["codes"] == torch.randn(3, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.tensor(first["unit"]).norm() == pytest.approx(1)
    assert first["level"] == [pytest.approx((workers - 1) / 2)]
    lines = [line.split() for line in text.splitlines()]
    assert ["level", "averaged"] in lines and ["norm.running_var", "averaged"] in lines
    assert ["keep", "follows", "one", "worker"] in lines


@pytest.mark.parametrize("globs", [[], ["*"]])
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_keeps_unit_vectors(norm: Callable[[nn.Module], nn.Module], globs: list[str]) -> None:
    def work(comm: Communicator) -> list[float]:
        with seeded():
            layer = norm(nn.Linear(10, 16))
        model = nn.Sequential(layer, build("mlp", torch.float32)[1:])
        train(comm, model, recipes.local_sgd(8, every=4), average_buffers=globs)
        return [float(b.norm()) for name, b in model.named_buffers() if name.endswith(("_u", "_v"))]

    for norms in run_in_process(3, work):
        assert norms == [pytest.approx(1, abs=1e-5)] * 2


@pytest.mark.parametrize(("patterns", "words"), [(["nom.*"], "'nom.*' matches no buffer"), ("norm.*", "is a string")])
def test_globs_of_buffers_that_cannot_be(patterns: Any, words: str) -> None:
    model = WithBuffers({}, norm=True)
    with pytest.raises(ConfigurationError, match=words):
        ABTraining(model, torch.optim.SGD(model.parameters(), 0.1), recipes.ddp(3), average_buffers=patterns)


def test_a_buffer_that_grows_on_one_worker_is_named() -> None:
    def work(comm: Communicator) -> None:
        model = WithBuffers({"cache": torch.zeros(3)})

        def grow(ab: ABTraining) -> None:
            if ab.steps_done == 2 and comm.rank == 1:
                model.cache = torch.zeros(5)

        train(comm, model, recipes.local_sgd(8, every=4), grow)

    for error in told(2, work):
        assert "cache is '(3,) of torch.float32' on rank 0 and '(5,) of torch.float32' on rank 1" in str(error)


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_buffer_replaced_during_a_hidden_merge_gets_its_result(fragments: int) -> None:
    """As in `self.m = 0.9 * self.m + 0.1 * new`."""

    def work(comm: Communicator, replaces: bool) -> list[list[float]]:
        model, seen = WithBuffers({"m": torch.zeros(2)}), []

        def change(ab: ABTraining) -> None:
            new = 0.9 * model.m + 0.1 * (1 + comm.rank)
            if replaces:
                model.m = new
            else:
                model.m.copy_(new)
            seen.append(model.m.tolist())

        recipe = recipes.diloco(24, every=6, delay=4, fragments=fragments)
        train(comm, model, recipe, change, average_buffers=["m"])
        return [*seen, model.m.tolist()]

    assert run_in_process(2, lambda comm: work(comm, True)) == run_in_process(2, lambda comm: work(comm, False))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.int8], ids=str)
@pytest.mark.parametrize("delay", [0, 2])
def test_buffers_of_odd_dtypes_follow_one_worker(dtype: torch.dtype, delay: int) -> None:
    def work(comm: Communicator) -> bytes:
        model = WithBuffers({"odd": torch.ones(3).to(dtype)}, norm=True)

        def change(ab: ABTraining) -> None:
            if ab.steps_done == 1:
                model.get_buffer("odd").copy_(torch.full((3,), float(2 + comm.rank)).to(dtype))

        train(comm, model, recipes.local_sgd(8, every=4, delay=delay), change)
        return bits(model.get_buffer("odd"))

    assert run_in_process(3, work) == [bits(torch.full((3,), 2.0).to(dtype))] * 3


def test_buffers_of_different_layout_are_reported_at_the_next_phase() -> None:
    def work(comm: Communicator) -> None:
        model = WithBuffers({"table": torch.zeros(3)})

        def change(ab: ABTraining) -> None:
            if ab.steps_done == 6 and comm.rank == 1:  # the last step of the group phase
                model.table = torch.zeros(3, dtype=torch.float64)

        train(comm, model, recipes.ab(14, warmup_steps=3, ab_steps=4, rebound_steps=3), change)

    for error in told(2, work):
        assert "table" in str(error) and "torch.float64" in str(error)
