"""Every parameter has a treatment and a reason."""

import pytest
import torch
from torch import nn

from abtrain import SigmaCutoff
from abtrain.lowrank.classify import classify
from abtrain.recipes.factoring import Factoring


class Zoo(nn.Module):
    """One of everything that has to be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm([4, 8])
        self.rnn = nn.GRU(8, 8)
        self.thin = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.position = nn.Parameter(torch.zeros(1, 16, 8))
        self.complex_weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
        self.empty_weight = nn.Parameter(torch.zeros(0, 4))
        self.own_weight = nn.Parameter(torch.ones(4, 4))


def test_every_parameter_is_accounted_for_with_its_reason() -> None:
    model = Zoo()
    treatments = {t.name: t for t in classify(model, Factoring(SigmaCutoff(), exclude=("own_*",)))}
    assert set(treatments) == {name for name, _ in model.named_parameters()}
    assert sum(t.numel for t in treatments.values()) == sum(p.numel() for p in model.parameters())
    factored = {name for name, t in treatments.items() if t.kind == "factored"}
    assert factored == {
        "linear.weight",
        "conv.weight",
        "grouped.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    reasons = {
        "linear.bias": "a vector",
        "embedding.weight": "tied with head.weight",
        "norm.weight": "a norm",
        "rnn.weight_ih_l0": "recurrent",
        "thin.weight": "below min_dim=2",
        "frozen.weight": "does not require a gradient",
        "position": "its name does not end in 'weight'",
        "complex_weight": "only real weights",
        "empty_weight": "empty",
        "own_weight": "excluded by 'own_*'",
    }
    for name, reason in reasons.items():
        assert reason in treatments[name].reason, name
    assert "factored form" in treatments["conv.weight"].reason
    assert "rebuilt" in treatments["grouped.weight"].reason


def test_without_factored_phases_all_are_averaged() -> None:
    kinds = {t.kind for t in classify(nn.Linear(4, 4), None)}
    assert kinds == {"averaged"}


def test_what_the_optimizer_does_not_hold_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    held = {id(p) for p in model[0].parameters()}
    kinds = {t.name: t.kind for t in classify(model, Factoring(SigmaCutoff()), held)}
    assert kinds == {"0.weight": "factored", "0.bias": "averaged", "1.weight": "frozen", "1.bias": "frozen"}


def test_min_dim_and_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    treatments = {t.name: t for t in classify(model, Factoring(SigmaCutoff(), min_dim=5))}
    assert treatments["0.weight"].reason == "an embedding"
    assert "smaller matrix dimension 4 is below min_dim=5" in treatments["1.weight"].reason


class Wide(nn.Parameter):
    """A parameter of somebody's own class."""


@pytest.mark.parametrize("first", [0, 2])
def test_a_parameter_of_a_class_of_its_own_stays_dense(first: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[first].weight = Wide(torch.randn(8, 8))  # type: ignore[union-attr]
    treatments = {t.name: t for t in classify(model, Factoring(SigmaCutoff()))}
    assert treatments[f"{first}.weight"].kind == "averaged" and "a Wide:" in treatments[f"{first}.weight"].reason
    assert treatments[f"{2 - first}.weight"].kind == "factored"


class Tied(nn.Module):
    """Shares memory between parameters and buffers that are no one object."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.alone, self.seen = (nn.Linear(8, 8) for _ in range(4))
        self.other.weight.data = self.one.weight.data
        self.register_buffer("view", self.seen.weight.data[2:])


@pytest.mark.parametrize(("name", "tie"), [("one", "other.weight"), ("other", "one.weight"), ("seen", "view")])
def test_a_weight_that_shares_its_memory_stays_dense(name: str, tie: str) -> None:
    treatments = {t.name: t for t in classify(Tied(), Factoring(SigmaCutoff()))}
    assert treatments[f"{name}.weight"].kind == "averaged"
    assert treatments[f"{name}.weight"].reason == f"shares memory with {tie}"
    assert treatments["alone.weight"].kind == "factored"


@pytest.mark.parametrize("glob", ["0.*", "0._orig_mod.*"])
def test_compiled_modules_are_excluded_by_either_name(glob: str) -> None:
    model = nn.Sequential(torch.compile(nn.Linear(8, 6), backend="eager"), nn.Linear(6, 8))
    kinds = {t.name: t.kind for t in classify(model, Factoring(SigmaCutoff(), exclude=(glob,)))}
    assert kinds["0._orig_mod.weight"] == "averaged" and kinds["1.weight"] == "factored"
