"""SyncBatchNorm layers that are pointed at a group: copied, saved and given back as plain layers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abtrain.comm import Meter
from abtrain.comm.communicator import Communicator
from abtrain.comm.link import Link
from abtrain.comm.sync_batch_norm import point_sync_batch_norm
from tests.gloo import run_gloo


class Group:
    """As a process group, it can be neither copied nor pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle a process group")


class Watched(nn.SyncBatchNorm):
    """A layer of the user's own, which notes the groups that it is to talk to."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.seen: list[Any] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(self.process_group)
        return input * self.weight


def pointed(layer: nn.SyncBatchNorm) -> tuple[nn.Module, Any, Any]:
    group: Any = Group()
    model = nn.Sequential(nn.Linear(2, 2), layer)
    link = Link(rank=2, ranks=(2, 3), group=group, spans="within_groups", meter=Meter())
    return model, group, point_sync_batch_norm(model, link, alone=False).close


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, Watched])
def test_a_copy_is_a_plain_layer_without_a_group(copied: Any, kind: type[nn.SyncBatchNorm]) -> None:
    model, group, _ = pointed(kind(2))
    if copied is copy.copy:
        layer, twin = model[1], copy.copy(model[1])
    else:
        layer, twin = model[1], copied(model)[1]
    assert layer.process_group is group
    assert type(twin) is kind and twin.process_group is None
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True))


def test_what_is_pickled_needs_no_abtrain_to_be_loaded() -> None:
    assert b"abtrain" not in pickle.dumps(pointed(nn.SyncBatchNorm(2))[0])


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, Watched])
def test_the_layer_gets_back_its_class_and_its_own_group(kind: type[nn.SyncBatchNorm]) -> None:
    layer, own = kind(2), object()
    layer.process_group = own
    attributes = dict(vars(layer))
    _, group, release = pointed(layer)
    assert layer.process_group is group
    assert isinstance(layer, kind) and type(layer).__qualname__ == kind.__qualname__
    release()
    assert type(layer) is kind and layer.process_group is own and vars(layer) == attributes


def test_a_layer_that_is_pointed_again_goes_by_the_last_group() -> None:
    layer = nn.SyncBatchNorm(2)
    pointed(layer)
    _, group, release = pointed(layer)
    assert layer.process_group is group
    release()
    assert type(layer) is nn.SyncBatchNorm


def test_nothing_keeps_a_pointed_layer_alive() -> None:
    model, _, release = pointed(nn.SyncBatchNorm(2))
    layer = weakref.ref(model[1])
    del model, release
    gc.collect()
    assert layer() is None


def test_a_pass_that_is_computed_again_talks_to_the_same_group() -> None:
    layer = Watched(2)
    model, group, _ = pointed(layer)
    checkpoint(model, torch.ones(3, 2), use_reentrant=False).sum().backward()
    assert layer.seen == [group, group]


def test_a_wrapper_gives_the_layers_back_when_it_is_closed() -> None:
    assert run_gloo(4, kinds_of_layers, group_size=2) == [("SyncBatchNorm", True, False, True)] * 4


def kinds_of_layers(comm: Communicator) -> tuple[str, bool, bool, bool]:
    """The layer in a wrapper: its name, whether it has a group, and whether it is plain then and after the wrapper."""
    # DDP refuses such layers on CPU: there is none around a model with nothing to train.
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)).requires_grad_(False)
    wrapper, layer = comm.data_parallel(model, "group"), model[1]
    name, has_group, plain = type(layer).__name__, layer.process_group is not None, type(layer) is nn.SyncBatchNorm
    wrapper.close()
    return name, has_group, plain, type(layer) is nn.SyncBatchNorm and layer.process_group is None


def test_a_wrapper_that_cannot_be_built_gives_them_back_too() -> None:
    assert run_gloo(2, layers_after_a_refusal) == [True, True]


def layers_after_a_refusal(comm: Communicator) -> bool:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        comm.data_parallel(model, "world")
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    return type(model[1]) is nn.SyncBatchNorm and not hooked
