"""Models that people really train go through one full cycle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from abtrain import ABTraining, recipes
from abtrain.comm.in_process import run_in_process

torchvision = pytest.importorskip("torchvision", reason="needs the extra 'vision'")

ONE_CYCLE = {"warmup_steps": 1, "ab_steps": 2, "rebound_steps": 1, "lr_rebound_steps": 1}


@pytest.mark.parametrize(("name", "size", "workers"), [("resnet18", 64, 2), ("vit_b_16", 224, 1)])
def test_one_full_cycle(name: str, size: int, workers: int) -> None:
    models = [torchvision.models.get_model(name, num_classes=10) for _ in range(workers)]

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
    torchvision.models.get_model(name, num_classes=10).load_state_dict(state)
