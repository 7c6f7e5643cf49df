"""Other people's code saves, loads and copies a module while its weights are factored, as if they were dense."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn

from abtrain import FixedRank
from abtrain.lowrank.loading import cutting
from abtrain.lowrank.surgery import restore_
from abtrain.lowrank.svd import decompose
from abtrain.lowrank.weight import FactoredWeight
from tests.unit.lowrank.test_surgery import CASES, Attention, factored

FORMS = ["linear_wide", "conv2d_tall", "grouped", "in_proj"]


def setup(case: str, rank: int = 2) -> tuple[nn.Module, torch.Tensor, FactoredWeight]:
    """A model with a factored weight, an input of it, and the record."""
    model, shape, name = copy.deepcopy(CASES[case])
    record = factored(model, name, FixedRank(rank))
    return model, torch.randn(shape), record


@pytest.mark.parametrize("case", FORMS)
def test_the_state_is_that_of_the_dense_model_in_its_order(case: str) -> None:
    dense = copy.deepcopy(CASES[case][0])
    model, x, record = setup(case)
    state = model.state_dict()
    assert list(state) == list(dense.state_dict())
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    dense.load_state_dict(state)
    torch.testing.assert_close(dense(x), model(x))
    torch.testing.assert_close(state[record.name], record.weight())


def test_the_state_of_a_submodule_is_dense_too() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.ConvTranspose2d(2, 3, 3))
    factored(model, "0.0.weight")
    factored(model, "1.weight")
    assert list(model[0].state_dict()) == ["0.weight", "0.bias"]
    assert list(model[1].state_dict(prefix="it.")) == ["it.weight", "it.bias"]


def test_kept_variables_lead_back_to_the_factors() -> None:
    model, _, record = setup("linear_wide")
    model.state_dict(keep_vars=True)["weight"].sum().backward()
    assert record.A.grad is not None and record.B.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_has_the_dtype_of_its_model_whatever_autocast_says(dtype: torch.dtype) -> None:
    model = nn.Linear(12, 7).to(dtype)
    factored(model, "weight", FixedRank(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.state_dict()["weight"].dtype == dtype


@pytest.mark.parametrize("case", FORMS)
def test_a_state_that_was_saved_is_loaded_again(case: str) -> None:
    model, x, record = setup(case)
    before, state, factors = model(x), copy.deepcopy(model.state_dict()), (record.A, record.B)
    with torch.no_grad():
        record.A.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(x), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(model(x), before)
    assert factors == (record.A, record.B) and record.k == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FORMS)
def test_a_state_of_the_present_weights_leaves_the_factors(case: str, dtype: torch.dtype) -> None:
    model, _, record = setup(case)
    A, B = record.A.detach().clone(), record.B.detach().clone()
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    assert torch.equal(record.A, A) and torch.equal(record.B, B)


@pytest.mark.parametrize("case", FORMS)
def test_a_swap_of_weights_comes_back_to_the_very_factors(case: str) -> None:
    model, _, record = setup(case)
    A, B, own = record.A.detach().clone(), record.B.detach().clone(), copy.deepcopy(model.state_dict())
    for _ in range(2):
        with cutting(True):
            model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in own.items()})
        assert not torch.equal(record.A, A)
        model.load_state_dict(own)
        assert torch.equal(record.A, A) and torch.equal(record.B, B)


@pytest.mark.parametrize("case", FORMS)
def test_a_weight_nearby_is_loaded_into_factors_nearby(case: str) -> None:
    model, _, record = setup(case, rank=3)
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    with torch.no_grad():
        record.A.copy_(record.A @ turn)
        record.B.copy_(torch.linalg.solve(turn, record.B))
    A, B = record.A.detach().clone(), record.B.detach().clone()
    near = record.matrix_shape.to_tensor((A + 1e-3 * torch.randn_like(A)) @ (B + 1e-3 * torch.randn_like(B)))
    model.load_state_dict(model.state_dict() | {record.name: near})
    torch.testing.assert_close(record.weight(), near, rtol=1e-4, atol=1e-5)
    assert 0 < (record.A - A).norm() < 0.05 * A.norm() and 0 < (record.B - B).norm() < 0.05 * B.norm()


def test_factors_that_are_loaded_do_not_depend_on_signs_of_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, record = setup("grouped")
    W = record.matrix_shape.to_tensor(torch.outer(torch.randn(18), torch.randn(8)))
    state = model.state_dict() | {"weight": W}
    twin = copy.deepcopy(model)
    model.load_state_dict(state)

    def turned(W: torch.Tensor, rule: Any) -> Any:
        A, B = decompose(W, rule)
        return type(decompose(W, rule))(-A, -B)

    monkeypatch.setattr("abtrain.lowrank.loading.decompose", turned)
    other = factored(twin, "weight", FixedRank(2))
    twin.load_state_dict(state)
    assert torch.equal(record.A, other.A)
    assert bool((record.A[:, 0].gather(0, record.A[:, :1].abs().argmax(0)) > 0).all())


def test_a_weight_of_lower_rank_fills_up_with_zeros() -> None:
    model, _, record = setup("linear_tall", rank=4)
    W = torch.outer(torch.arange(12.0), torch.arange(7.0))
    model.load_state_dict({"weight": W})
    torch.testing.assert_close(model.weight, W)
    assert record.k == 4 and torch.count_nonzero(record.A.norm(dim=0)) == 1


def test_a_weight_is_loaded_into_factors_that_are_not_finite() -> None:
    model, x, record = setup("linear_wide")
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    with torch.no_grad():
        record.A[0, 0], record.B[0, 0] = torch.nan, torch.inf
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_would_lose_more_than_rounding_is_refused_unless_it_may_be_cut() -> None:
    model, _, record = setup("in_proj")
    name, before = record.name, record.weight()
    state = model.state_dict() | {name: torch.randn(36, 12)}
    with pytest.raises(RuntimeError, match=rf"{name} is factored with rank 2 .*lose [0-9.]+% of it.*cut=True"):
        model.load_state_dict(state)
    assert torch.equal(record.weight(), before)
    with cutting(True):
        model.load_state_dict(state)
    S = torch.linalg.svdvals(state[name])
    torch.testing.assert_close((record.weight() - state[name]).norm(), S[2:].norm())


def test_rounding_of_halves_is_no_loss() -> None:
    model, _, record = setup("linear_wide")
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(record.weight(), state["weight"].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_by_assignment_keeps_the_factors(assign: bool) -> None:
    model, x, record = setup("in_proj")
    before, A = model(x), record.A
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    torch.testing.assert_close(model(x), before)
    assert model.attention.in_proj_weight_A is A  # type: ignore[union-attr]
    restore_(record)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("case", FORMS)
def test_what_does_not_fit_is_reported_under_the_dense_name(case: str) -> None:
    model, _, record = setup(case)
    before = record.weight()
    state = model.state_dict()
    result = model.load_state_dict({name: state[name] for name in state if name != record.name}, strict=False)
    assert result.missing_keys == [record.name]
    with pytest.raises(RuntimeError, match=rf"size mismatch for {record.name}"):
        model.load_state_dict(state | {record.name: torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{record.name}_A"):
        model.load_state_dict(state | {f"{record.name}_A": record.A})
    with pytest.raises(RuntimeError, match=rf"While loading {record.name} .*NaN or infinity"):
        model.load_state_dict(state | {record.name: torch.full_like(before, float("nan"))})
    torch.testing.assert_close(record.weight(), before)


def pickled(model: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": pickled, "save": saved}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("case", FORMS)
def test_a_copy_is_dense_and_trains_apart(case: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    dense = copy.deepcopy(CASES[case][0])
    model, x, record = setup(case)
    if copied is copy.copy and record.attribute != "weight":
        return  # a shallow copy of a parent has the same children
    twin, before = copied(model), model(x)
    assert [type(module) for module in twin.modules()] == [type(module) for module in dense.modules()]
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert type(twin.get_parameter(record.name)) is nn.Parameter
    assert all(set(one.__dict__) == set(two.__dict__) for one, two in zip(twin.modules(), dense.modules(), strict=True))
    torch.testing.assert_close(twin(x), before)
    twin(x).sum().backward()
    with torch.no_grad():
        twin.get_parameter(record.name).add_(1.0)
    assert torch.equal(model(x), before)
    assert record.A.grad is None and type(record.module) is not type(twin.get_submodule(record.name.rpartition(".")[0]))


def test_a_copy_shares_a_weight_with_whoever_kept_it() -> None:
    model, _, record = setup("in_proj")
    twin, kept = copy.deepcopy((model, [record.dense]))
    assert twin.get_parameter(record.name) is kept[0]


def test_forward_hooks_are_copied() -> None:
    model, x, _ = setup("linear_wide")
    model.register_forward_hook(doubled)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


class WithOwnState(nn.Linear):
    """Leaves a cache out of its copies, and tells how it is made."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.cache: Any = lambda: None  # cannot be pickled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_modules_with_a_state_of_their_own_copy_by_it(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = WithOwnState(6, 4)
    record = factored(model, "weight", FixedRank(2))
    twin = copied(model)
    assert type(twin) is WithOwnState and twin.cache is None and model.cache is not None
    torch.testing.assert_close(twin.weight, record.weight())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_of_abtrain_is_in_a_pickle(protocol: int) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.MultiheadAttention(4, 2), WithOwnState(4, 3))
    for name in ("0.weight", "1.in_proj_weight", "2.weight"):
        factored(model, name, FixedRank(2))
    content = pickle.dumps(model, protocol)
    assert b"abtrain" not in content and b"Factored" not in content
    assert [name for name, _ in pickle.loads(content).named_parameters()] == list(model.state_dict())


class WithOwnNames(nn.Linear):
    """Has names that a factored module might want for itself."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.rank, self.dense_type, self.weight_A = 3, "mine", torch.zeros(1)

    def factors(self) -> int:
        return self.rank

    def product(self) -> torch.Tensor:
        return self.weight_A * 2


def test_names_of_a_modules_own_stay_its_own() -> None:
    model, before = WithOwnNames(), set(vars(WithOwnNames()))
    record = factored(model, "weight", FixedRank(2))
    assert (model.factors(), model.dense_type, model.product().item()) == (3, "mine", 0.0)
    model.rank = 4
    assert torch.equal(copy.deepcopy(model).weight, model.weight)
    restore_(record)
    assert set(vars(model)) == before and model.rank == 4


def test_averages_that_pair_states_by_order_stay_right() -> None:
    model, _, record = setup("in_proj")
    average = Attention()
    for mine, its in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(its)
    torch.testing.assert_close(average.state_dict()[record.name], record.weight())


class CopiesItself(nn.Linear):
    """Makes its copies by a method of its own, and refers to itself."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.copies = 0
        self.__dict__["me"] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.copies += 1
        return twin


def traced() -> nn.Module:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    return torch.fx.symbolic_trace(Reader())


@pytest.mark.parametrize("make", [lambda: CopiesItself(6, 4), traced], ids=["own", "fx"])
def test_modules_with_a_way_of_copying_of_their_own_copy_by_it(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(3, 6)
    kind = type(model)
    record = factored(model, "weight", FixedRank(2))
    before, inside = model(x), type(model)
    twin = copy.deepcopy(model)
    assert "Factored" not in type(twin).__name__
    assert type(twin.weight) is nn.Parameter and torch.equal(twin.weight, record.weight())
    torch.testing.assert_close(twin(x), before)
    assert type(model) is inside and torch.equal(model(x), before) and not hasattr(twin, "_abtrain_weights")
    if isinstance(twin, CopiesItself):
        assert twin.copies == 1 and twin.me is twin
    restore_(record)
    assert type(model) is kind
