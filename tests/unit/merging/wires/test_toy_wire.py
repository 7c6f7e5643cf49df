"""A wire of one's own: its class, and one line where its name is known. Its prediction comes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import ABTraining, recipes
from abtrain.comm.buckets import average_exactly, sent_by_average
from abtrain.comm.communicator import Calls, Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import Stages
from abtrain.comm.topology import Topology
from abtrain.commands.plan.payload import predict
from abtrain.commands.plan.recipe_words import phases_in_words
from abtrain.commands.plan.shapes import shapes_of
from abtrain.commands.plan.totals import payload
from abtrain.errors import ConfigurationError
from abtrain.merging.wires.wire import Averages, Wire
from abtrain.recipes.wires import FORMS, Form
from tests.cases import sgd


class FewWire(Wire):
    """Sends the first numbers of each tensor, and keeps the rest for later merges."""

    lossy = True
    _count = 3

    def __init__(self, code: str) -> None:
        assert code == "fp32"

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        sent = [tensor.flatten()[: self._count] for tensor in numbers.values()]
        means = yield from average_exactly(sent, comm)
        mean, error = {}, {}
        for (name, tensor), head in zip(numbers.items(), means, strict=True):
            mean[name], error[name] = torch.zeros_like(tensor), tensor.float().clone()
            mean[name].view(-1)[: self._count] = head
            error[name].view(-1)[: self._count] = 0
        return Averages(mean, error)

    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        return (sent_by_average([tensor.flatten()[: self._count] for tensor in tensors]),)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "few:CODE", Form(f"{__name__}:FewWire", "the first of each tensor in {code}"))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def run(comm: Communicator, model: nn.Module, options: dict[str, Any]) -> tuple[Any, Tensor]:
    optimizer = sgd(model.parameters())
    ab = ABTraining(model, optimizer, recipes.local_sgd(8, every=4, **options), communicator=comm)
    for step in range(8):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        ab(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return comm.meter.payload(), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("delay", [0, 2])
def test_it_sends_what_it_says(delay: int) -> None:
    options, models = {"wire": "few:fp32", "delay": delay}, [network() for _ in range(2)]
    (counted, one), (_, other) = run_in_process(2, lambda comm: run(comm, models[comm.rank], options))
    assert torch.equal(one, other)
    recipe, topology = recipes.local_sgd(8, every=4, **options), Topology(2)
    assert payload(predict(recipe, shapes_of(network()), topology), topology) == counted


def test_its_names() -> None:
    said = phases_in_words(recipes.local_sgd(8, every=4, wire="few:fp32"))[0]
    assert "(mean, the first of each tensor in fp32)" in said
    with pytest.raises(ConfigurationError, match=r"unknown wire format 'few:x'.*few:CODE"):
        recipes.local_sgd(8, every=4, wire="few:x")
