"""Loops that use a factored model as the dense one in the midst of a run: loads, penalties, masks, tied weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import FixedRank, checkpoint, recipes, weights_digest
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, ConfigurationError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import batch, largest_difference, seeded
from tests.faults.loops import AB, HIDDEN, OUTER, Loop

LOCAL = recipes.ab_local(20, every=2, warmup_steps=4, rank_rule=FixedRank(3))


def nothing(loop: Loop) -> None:
    """Leaves the loop as it is."""


def load_its_own(loop: Loop) -> None:
    loop.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))


def swap_an_average(loop: Loop) -> None:
    """Validates by other weights, and comes back to its own."""
    own = copy.deepcopy(loop.ab.dense_state_dict())
    average = {name: tensor * 0.7 + 0.01 for name, tensor in own.items()}
    loop.ab.load_dense_state_dict(average, cut=True)
    loop.ab.load_dense_state_dict(own)


@pytest.mark.parametrize("act", [load_its_own, swap_an_average])
@pytest.mark.parametrize("recipe", [AB, OUTER, HIDDEN, LOCAL], ids=["ab", "outer", "hidden", "local"])
@pytest.mark.parametrize("workers", [1, 2])
def test_loads_that_change_no_weight_change_no_bit_of_a_run(
    act: Callable[[Loop], None], recipe: Recipe, workers: int
) -> None:
    def run(act: Callable[[Loop], None]) -> list[dict[str, Tensor]]:
        def work(comm: Communicator) -> dict[str, Tensor]:
            loop = Loop(comm, recipe)
            while not loop.ab.finished:
                loop.step()
                act(loop)
            return loop.ab.dense_state_dict()

        return run_in_process(workers, work)

    for one, other in zip(run(nothing), run(act), strict=True):
        assert largest_difference(one, other) == 0


# Reads of `module.weight`, and of Parameters that were kept from before.


class OwnLinear(nn.Linear):
    """Has no factored form, so that its weight is rebuilt when it is read."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.view(-1).norm() / self.weight.norm()
        return F.linear(input, self.weight * scale, self.bias)


def net(first: type[nn.Linear] = nn.Linear) -> nn.Module:
    with seeded():
        layers = (first(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
        return nn.Sequential(*layers).double()


def factored_loop(model: nn.Module) -> Loop:
    return Loop(SingleProcess(), recipes.ab_outer(20, every=4, warmup_steps=0, rank_rule=FixedRank(3)), model)


def clip_in_place(layer: Any) -> None:
    layer.weight.data.clamp_(-0.1, 0.1)


def mask(layer: Any) -> None:
    layer.weight.data *= 0.5


def set_row(layer: Any) -> None:
    layer.weight[:, 0] = 0.0


WRITES: dict[str, Callable[[Any], object]] = {
    "a mask": mask,
    "a limit": clip_in_place,
    "to a column": set_row,
    "a product": lambda layer: layer.weight.mul_(0.0),
    "to a view": lambda layer: layer.weight.T.zero_(),
    "of new data": lambda layer: setattr(layer.weight, "data", torch.zeros(16, 10)),
    "by initialisation": lambda layer: nn.init.zeros_(layer.weight),
    "by another one": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "of all parameters": lambda layer: layer.reset_parameters(),
    "in place by request": lambda layer: F.relu(layer.weight, inplace=True),
    "that freezes": lambda layer: layer.weight.requires_grad_(False),
    "of requires_grad": lambda layer: setattr(layer.weight, "requires_grad", False),
    "of a hook": lambda layer: layer.weight.register_hook(print),
    "that retains": lambda layer: layer.weight.retain_grad(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("first", [nn.Linear, OwnLinear])
def test_writing_to_the_weight_of_a_module_is_an_error(first: type[nn.Linear], write: Callable[[Any], object]) -> None:
    loop = factored_loop(net(first))
    before = copy.deepcopy(loop.model.state_dict())
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(UsageError, match="currently factored would have no effect"):
            write(loop.model[0])
    assert largest_difference(before, loop.model.state_dict()) == 0


class Masked(nn.Linear):
    """Masks its weight in every forward pass, as PixelCNN and MADE do."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= torch.ones_like(self.weight).tril()
        return super().forward(input)


def test_a_mask_that_a_forward_pass_writes_is_an_error_once_the_weight_is_factored() -> None:
    recipe = recipes.ab_outer(20, every=4, warmup_steps=4, rank_rule=FixedRank(3))
    loop = Loop(SingleProcess(), recipe, net(Masked))
    loop.run(until=4)
    with pytest.raises(UsageError, match=r"mul_ on a weight of shape \(16, 10\).*option exclude"):
        loop.step()


@pytest.mark.parametrize("first", [nn.Linear, OwnLinear])
def test_the_weight_of_a_module_has_the_gradient_of_its_factors(first: type[nn.Linear]) -> None:
    loop = factored_loop(net(first))
    layer, (x, y) = loop.model[0], batch("mlp", 0, 0)
    assert layer.weight.grad is None and layer.weight.requires_grad and layer.weight.is_contiguous()
    F.cross_entropy(loop.ab(x), y).backward()
    factors = torch.cat([layer.weight_A.grad.flatten(), layer.weight_B.grad.flatten()])
    assert torch.equal(layer.weight.grad, factors)
    norm = nn.utils.clip_grad_norm_([loop.model[i].weight for i in (0, 2, 4)], 1e-3)
    assert float(norm) > 1e-2
    live = [p.grad for p in loop.model.parameters() if p.grad is not None and p.ndim > 1]
    assert float(nn.utils.get_total_norm(live)) <= 1.01e-3
    layer.weight.grad = None
    assert layer.weight_A.grad is None and layer.weight_B.grad is None


@pytest.mark.parametrize("read", [lambda layer: layer.weight, lambda layer: layer.weight.data], ids=["weight", "data"])
def test_copies_of_a_value_that_is_read_are_plain(read: Callable[[Any], Tensor]) -> None:
    layer = factored_loop(net()).model[0]
    value = layer.weight.detach().clone()
    shown = layer.weight.detach().numpy()
    shown[:] = 0.0
    for copied in (copy.deepcopy(read(layer)), pickle.loads(pickle.dumps(read(layer)))):
        assert type(copied) in (Tensor, nn.Parameter) and torch.equal(copied, value)
        copied.data.zero_()
    assert torch.equal(layer.weight, value)


PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of squares": lambda W, start: W.pow(2).sum(),
    "of the way from a start": lambda W, start: (W - start).pow(2).sum(),
    "of angles": lambda W, start: (W @ W.T - torch.eye(len(W))).norm(),
    "of a stack": lambda W, start: torch.stack([W, start]).abs().mean(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_penalty_over_kept_parameters_reaches_the_factors(
    penalty: Callable[[Tensor, Tensor], Tensor], hooked: bool
) -> None:
    model = net()
    kept, start = model[0].weight, model[0].weight.detach().clone()
    if hooked:
        kept.register_hook(lambda gradient: 2 * gradient)
    loop = factored_loop(model)
    layer: Any = loop.model[0]
    assert not kept.detach().requires_grad and not kept.data.requires_grad
    with torch.no_grad():
        assert not kept.clone().requires_grad
    penalty(kept, start).backward()
    A, B = (factor.detach().requires_grad_() for factor in (layer.weight_A, layer.weight_B))
    penalty(A @ B, start).backward()
    for factor, expected in ((layer.weight_A, A.grad), (layer.weight_B, B.grad)):
        torch.testing.assert_close(factor.grad, expected * (2 if hooked else 1))


class TiedByUse(nn.Module):
    """Uses the weight of a layer again, by a list or by the layer, and is not told that by names."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(10, 16, bias=False), nn.Linear(10, 5)
        self.kept = [self.encode.weight] if kept else []

    def forward(self, x: Tensor) -> Tensor:
        W = self.kept[0] if self.kept else self.encode.weight
        return self.head(F.linear(torch.tanh(self.encode(x)), W.t()))


@pytest.mark.parametrize("kept", [False, True])
def test_a_weight_that_is_tied_by_use_gets_the_gradient_of_both_uses(kept: bool) -> None:
    model = TiedByUse(kept).double()
    loop = factored_loop(model)
    dense = TiedByUse(False).double()
    dense.load_state_dict(model.state_dict())
    x, y = batch("mlp", 0, 0)
    F.cross_entropy(loop.ab(x), y).backward()
    F.cross_entropy(dense(x), y).backward()
    G: Any = dense.encode.weight.grad
    layer: Any = model.encode
    torch.testing.assert_close(layer.weight_A.grad, G @ layer.weight_B.T)
    torch.testing.assert_close(layer.weight_B.grad, layer.weight_A.T @ G)


@pytest.mark.parametrize("transform", ["jacrev", "vmap", "grad"])
@pytest.mark.parametrize("first", [nn.Linear, OwnLinear])
def test_transforms_of_functions_take_a_factored_model(first: type[nn.Linear], transform: str) -> None:
    model = factored_loop(net(first)).model
    x = batch("mlp", 0, 0)[0]
    if transform == "jacrev":
        assert torch.func.jacrev(model)(x[0]).shape == (5, 10)
    elif transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    else:
        assert torch.func.grad(lambda x: model(x).sum())(x).shape == x.shape


class Wrapped(Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize("first", [nn.Linear, OwnLinear])
def test_inputs_of_a_class_of_their_own_keep_it(first: type[nn.Linear]) -> None:
    model = factored_loop(net(first)).model
    x = batch("mlp", 0, 0)[0]
    result = model(x.as_subclass(Wrapped))
    assert type(result) is Wrapped and torch.equal(result.as_subclass(Tensor), model(x))


def test_attention_takes_its_fast_path_with_factored_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(64, 5))
    loop = factored_loop(model)
    assert "Factored" in type(model[0].self_attn).__name__  # type: ignore[union-attr]
    model.eval()
    x = torch.randn(2, 4, 16)
    slow = loop.ab(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
    assert calls


# State of modules beyond parameters and buffers.


class Counting(nn.Module):
    """Scales its output by the number of its forward passes, which it keeps as extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.count = net(), 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "kinds": ["a", None], "mean": torch.full((2,), float(self.count))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        assert state["kinds"] == ["a", None] and float(state["mean"][0]) == self.count

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        result: Tensor = self.net(x) * min(1.0, self.count / 8)
        return result


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("recipe", [OUTER, AB], ids=["outer", "ab"])
def test_a_resumed_run_has_the_extra_state_of_its_modules(recipe: Recipe, nested: bool, tmp_path: Path) -> None:
    def build() -> Loop:
        model = nn.Sequential(Counting()) if nested else Counting()
        return Loop(SingleProcess(), recipe, model)

    whole, loop = build(), build()
    whole.run()
    loop.run(until=10)
    checkpoint.save(tmp_path, 10, loop.ab.state_dict(), SingleProcess())
    saved = checkpoint.latest(tmp_path, SingleProcess())
    assert saved is not None
    again = build()
    again.ab.load_state_dict(saved.states[0])
    digest = weights_digest(again.run())
    assert digest == weights_digest(whole.model)
    module: Any = again.model[0] if nested else again.model
    assert module.count == recipe.total_steps


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({}, "extra lacks ''"),
        ({"": {"count": object()}}, "extra/ contains an object, which cannot be saved"),
        ({"": {}, "net": {}}, "extra has 'net', which is not a known key"),
    ],
)
def test_extra_state_that_does_not_fit_is_refused(extra: dict[str, Any], problem: str) -> None:
    loop = Loop(SingleProcess(), OUTER, Counting())
    loop.run(until=3)
    state = loop.ab.state_dict()
    state["model"]["extra"] = extra
    with pytest.raises(CheckpointError, match=problem):
        loop.ab.load_state_dict(state)


def test_averages_and_digests_pass_over_extra_state() -> None:
    loop = Loop(SingleProcess(), OUTER, Counting())
    loop.run(until=10)
    ema = loop.ab.ema(0.5)
    loop.step()
    ema.update()
    state = ema.state_dict()
    assert state["_extra_state"]["count"] == 11  # type: ignore[index]  # it is no tensor
    assert "_extra_state" not in loop.ab.factored_state_dict()
    before = weights_digest(loop.model)
    cast(Any, loop.model).count += 1
    assert weights_digest(loop.ab.dense_state_dict()) == before
    loop.ab.load_dense_state_dict(state, cut=True)
    other = loop.ab.ema(0.5)
    other.load_state_dict(state)
    assert weights_digest(other.state_dict()) == weights_digest(state)


class Rotary(nn.Module):
    """Keeps a cache that grows on demand and is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("cache", torch.ones(2).double(), persistent=False)

    def grow(self, size: int) -> None:
        self.cache = torch.arange(float(size)).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


def grown(loop: Loop, size: int) -> Loop:
    cast(Rotary, loop.model).grow(size)
    return loop


@pytest.mark.parametrize("recipe", [OUTER, HIDDEN], ids=["outer", "hidden"])
@pytest.mark.parametrize(("before", "after"), [(6, 2), (2, 6)])
@pytest.mark.parametrize("own", [False, True])
def test_a_cache_of_another_size_does_not_stop_a_resume(recipe: Recipe, before: int, after: int, own: bool) -> None:
    def work(comm: Communicator) -> None:
        def build(size: int) -> Loop:
            model = Rotary()
            if own:
                model._ddp_params_and_buffers_to_ignore = ["cache"]
            return grown(Loop(comm, recipe, model), size)

        whole, loop = build(before), build(before)
        whole.run()
        loop.run(until=13)
        again = build(after)
        again.ab.load_state_dict(copy.deepcopy(loop.ab.state_dict()))
        assert len(cast(Rotary, again.model).cache) == after
        assert largest_difference(again.run(), whole.ab.dense_state_dict()) == 0

    run_in_process(2, work)


def test_a_buffer_of_another_size_that_is_saved_stops_a_resume() -> None:
    loop, again = (Loop(SingleProcess(), OUTER, Rotary()) for _ in range(2))
    for one in (loop, again):
        cast(Rotary, one.model)._non_persistent_buffers_set.clear()
    loop.run(until=3)
    state = copy.deepcopy(loop.ab.state_dict())
    grown(again, 6)
    with pytest.raises(CheckpointError, match=r"buffers/cache is .* not a dense tensor of .* shape \(6,\)"):
        again.ab.load_state_dict(state)


# Tensors and functions that are not supported say so.


@pytest.mark.parametrize(
    ("buffer", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
    ids=["coo", "csr", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:.*beta state")
@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_buffers_that_are_not_dense_are_refused_by_name(buffer: Callable[[], Tensor], kind: str) -> None:
    model = net()
    model.register_buffer("adjacency", buffer())
    with pytest.raises(ConfigurationError, match=rf"only dense tensors .*: adjacency \({kind}\)\. .*to_dense"):
        Loop(SingleProcess(), OUTER, model)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("first", [nn.Linear, OwnLinear])
def test_a_factored_model_can_be_exported(first: type[nn.Linear], strict: bool) -> None:
    model = factored_loop(net(first)).model
    x = batch("mlp", 0, 0)[0]
    torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


def test_a_kept_parameter_in_a_compiled_function_is_reported() -> None:
    model = net()
    kept = model[0].weight
    layer: Any = factored_loop(model).model[0]
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match=r"compiled function uses .* \(16, 10\) that was taken .*: in that function, read"
    ):
        torch.compile(lambda: kept.square().sum(), backend="eager")()
    torch.testing.assert_close(
        torch.compile(lambda: layer.weight.square().sum(), backend="eager")(), kept.square().sum()
    )
