"""Models that people really train go through one full cycle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abtrain import ABTraining, recipes
from abtrain.comm.in_process import run_in_process

torchvision = pytest.importorskip("torchvision", reason="needs the extra 'vision'")

ONE_CYCLE = {"warmup_steps": 1, "ab_steps": 2, "rebound_steps": 1, "lr_rebound_steps": 1}


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def transformer() -> nn.Module:
    """ViT-B/16 with the first two of its twelve blocks, which are all alike."""
    return torchvision.models.VisionTransformer(224, 16, 2, 12, 768, 3072, num_classes=10)


@pytest.mark.parametrize(("build", "size", "workers"), [(resnet, 64, 2), (transformer, 224, 1)])
def test_one_full_cycle(build: Callable[[], nn.Module], size: int, workers: int) -> None:
    models = [build() for _ in range(workers)]

    def work(comm):  # type: ignore[no-untyped-def]
        model = models[comm.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        recipe = recipes.ab(4, **ONE_CYCLE, sigma_cutoff=0.4)
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(4):
            x = torch.randn(2, 3, size, size, generator=generator)
            F.cross_entropy(ab(x), torch.randint(0, 10, (2,), generator=generator)).backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        return ab

    runs = run_in_process(workers, work, timeout=250)
    description = runs[0].describe()
    parameters = sum(p.numel() for p in models[0].parameters())
    assert sum(description.parameters.values()) == parameters
    assert sum(t.numel for t in description.treatments if t.kind == "factored") > 0.97 * parameters
    assert len(runs[0].rank_history) == 1
    state = runs[0].dense_state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    build().load_state_dict(state)
