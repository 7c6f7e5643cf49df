"""Checks whether a saved state fits a model, whose weights may be factored, and its optimizers. Changes nothing.

A layout is a dict of tensors by name, of which only shapes and dtypes are used. Most are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abtrain.checks import (
    POSITIVE,
    Check,
    also,
    anything,
    by_name,
    data,
    each,
    first_problems,
    like,
    mapping,
    number,
    one_of,
    said,
    tensor,
    text,
)
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.model_state import modules_with_extra_state, own_tensors
from abtrain.lowrank.names import factor_names
from abtrain.lowrank.optimizer_fit import optimizer_problems
from abtrain.lowrank.svd import MatrixShape
from abtrain.own import shared_buffers
from abtrain.shards import cut

Layout = dict[str, Tensor]


_PARTS: dict[str, Check] = {
    "factored": each(text()),
    "damping": number(0, 1),
    "compression": number(POSITIVE),
    "weights": by_name(tensor()),
    "buffers": by_name(tensor()),
    "optimizers": each(
        mapping(
            {
                "kind": text(),
                "groups": each(by_name(anything)),
                "owned": each(each(text())),
                "state": by_name(by_name(anything)),
                # An optimizer may use keys of any type here.
                "general": also(anything, lambda value: isinstance(value, Mapping), "a dict"),
                "more": by_name(anything),
            }
        )
    ),
}
_OPTIONAL: dict[str, Check] = {
    "own": by_name(tensor()),
    "extra": by_name(data),
    "weights_same_on": one_of("world", "group", "counterparts"),
    "sharded": each(text()),
}
MODEL_STATE: Check = mapping({**_PARTS, **_OPTIONAL}, required=_PARTS)
"""Checks the structure of a state from `model_state`, for any model. Checkpoints add `weights_same_on` to the state."""


def model_problems(
    model: FactoredModel, state: Mapping[str, Any], factored: bool, place: int = 0, count: int = 1
) -> list[str]:
    """Returns messages that explain why a state does not fit a model; an empty list if it fits.

    The state must have passed `MODEL_STATE`. `factored`: whether it was saved in a phase with factored weights. `place`
    and `count`: which of how many shards of sharded parameters the state has.
    """
    return first_problems(
        lambda: _name_problems(model, state, factored),
        lambda: _rank_problems(dense_layout(model), state),
        lambda: _tensor_problems(model, state, saved_layout(model, state, place, count)),
        lambda: mapping(dict.fromkeys(modules_with_extra_state(model), data))("extra", state.get("extra", {})),
        lambda: iter(optimizer_problems(model, state, saved_layout(model, state, place, count))),
    )


def dense_layout(model: FactoredModel) -> Layout:
    """Returns the layout of all parameters that the model has while no weight is factored."""
    factors = model.factors()
    dense = {name: meta(p.shape, p.dtype) for name, p in model.parameters().items() if name not in factors}
    return dense | {name: meta(record.matrix_shape.dense, record.A.dtype) for name, record in model.records.items()}


def state_layout(model: FactoredModel, state: Mapping[str, Any]) -> Layout:
    """Returns the layout of all whole parameters in a state. The state's names and ranks must have been checked."""
    layout = dense_layout(model)
    for name in state["factored"]:
        dense = layout.pop(name)
        name_A, name_B = factor_names(name)
        matrix, k = MatrixShape(dense.shape), len(state["weights"][name_B])
        layout |= {name_A: meta((matrix.m, k), dense.dtype), name_B: meta((k, matrix.n), dense.dtype)}
    return layout


def saved_layout(model: FactoredModel, state: Mapping[str, Any], place: int, count: int) -> Layout:
    """Returns the layout of all parameters in a state, with shards of sharded ones."""
    layout = state_layout(model, state)
    return layout | cut({name: layout[name] for name in state.get("sharded", ())}, place, count)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name_problems(model: FactoredModel, state: Mapping[str, Any], factored: bool) -> Iterator[str]:
    names = state["factored"]
    yield from (
        f"{said(name)} is factored in the state, but never in this run" for name in sorted({*names} - {*model.names})
    )
    if len({*names}) < len(names):
        yield "the state lists a factored weight twice"
    if names and not factored:
        yield f"{names[0]} is factored in the state, but the state was saved in a phase with full weights"
    strange = [name for name in state.get("sharded", ()) if name not in dense_layout(model) or name in names]
    if strange:
        yield f"{said(strange[0])} is sharded in the state, but is no full weight of this run"


def _rank_problems(dense: Layout, state: Mapping[str, Any]) -> Iterator[str]:
    for name in state["factored"]:
        A, B = (tuple(getattr(state["weights"].get(factor), "shape", ())) for factor in factor_names(name))
        matrix = MatrixShape(dense[name].shape)
        m, n, k = matrix.m, matrix.n, B[0] if B else 0
        if not (1 <= k <= n and (m, k) == A and (k, n) == B):
            yield f"factors of {name} have shapes {A} and {B}, not ({m}, k) and (k, {n}) with k from 1 to {n}"


def buffer_layout(model: FactoredModel, state: Mapping[str, Any]) -> Layout:
    """Returns the layout of the buffers that workers share. Non-persistent buffers have the shapes in the state."""
    saved = state["buffers"]
    grown = _caches(model.model) & saved.keys()
    return {
        name: meta(saved[name].shape, held.dtype) if name in grown else held
        for name, held in shared_buffers(model.model).items()
    }


def _tensor_problems(model: FactoredModel, state: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    own, grown = own_tensors(model), _caches(model.model)
    weights = {name: held for name, held in layout.items() if name not in own}
    wanted = {"weights": weights, "buffers": shared_buffers(model.model), "own": own}
    for part, tensors in wanted.items():
        fits = {name: tensor(dtype=held.dtype) if name in grown else like(held) for name, held in tensors.items()}
        yield from mapping(fits)(part, state.get(part, {}))


def _caches(model: nn.Module) -> frozenset[str]:
    """Returns the names of buffers that state dicts leave out (`persistent=False`), such as caches that grow."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    )
