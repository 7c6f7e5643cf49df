"""Replaces a weight of a model by its factors in place (`factorize_`), and undoes this (`restore_`).

The module object and the weight's `Parameter` object stay, so references to both stay valid. The storage of the
Parameter is freed while the weight is factored.
"""

from __future__ import annotations

from torch import nn

from abtrain.lowrank.attention import LowRankAttention
from abtrain.lowrank.classify import has_factored_form, owner
from abtrain.lowrank.kept import MARK_SHAPE, FactoredMark, give_back_, keep_
from abtrain.lowrank.layers import FACTORED_LAYERS, Factored, rebuilding
from abtrain.lowrank.svd import Factors, MatrixShape
from abtrain.lowrank.weight import FactoredWeight, Names, after_accumulation


def factorize_(model: nn.Module, name: str, factors: Factors) -> FactoredWeight:
    """Replaces the weight `name` of a model by factors and frees its storage. Returns the record for `restore_`."""
    module, attribute = owner(model, name)
    dense = module.get_parameter(attribute)
    names = Names(*(_free_name(module, f"{attribute}_{what}") for what in ("factored", "A", "B")))
    A, B = nn.Parameter(factors.A), nn.Parameter(factors.B)
    hooks = dense._backward_hooks or {}
    record = FactoredWeight(
        name, module, attribute, dense, A, B, names, MatrixShape(dense.shape), dense.stride(), hooks
    )
    _rename_(module, attribute, names.mark, factors.A.new_zeros(MARK_SHAPE).as_subclass(FactoredMark))
    module._parameters.update({names.A: A, names.B: B})
    known = module._abtrain_weights if isinstance(module, Factored) else {}
    _show_(module, {**known, attribute: record})
    dense.grad = None
    dense.data = dense.data.new_empty(0)
    after_accumulation(dense, record.factors)
    keep_(record)
    return record


def restore_(record: FactoredWeight) -> nn.Parameter:
    """Undoes `factorize_`: writes W = A B to the dense Parameter, puts it back into its module, and returns it."""
    module, attribute = record.module, record.attribute
    assert isinstance(module, Factored)
    give_back_(record.dense)
    for factor in record.factors:
        # The hooks refer to the factors, in a cycle that would keep them alive.
        (factor._post_accumulate_grad_hooks or {}).clear()
    # Fused optimizers and the optimizer state of dense weights depend on the former memory layout.
    record.dense.data = record.laid_out()
    del module._parameters[record.names.A], module._parameters[record.names.B]
    _rename_(module, record.names.mark, attribute, record.dense)
    _show_(module, {name: one for name, one in module._abtrain_weights.items() if name != attribute})
    return record.dense


def _show_(module: nn.Module, records: dict[str, FactoredWeight]) -> None:
    """Changes a module's class so that exactly the weights in `records` are factored; to the dense class if empty."""
    dense_type = module._abtrain_dense_type if isinstance(module, Factored) else type(module)
    module.__class__ = dense_type
    if not records:
        del module._abtrain_weights
        return
    first = next(iter(records.values()))
    if len(records) == 1 and has_factored_form(module, first.attribute, bool(first.hooks)):
        module.__class__ = FACTORED_LAYERS[dense_type]
    else:
        base = LowRankAttention if dense_type is nn.MultiheadAttention else Factored
        module.__class__ = rebuilding(dense_type, frozenset(records), base)  # type: ignore[arg-type]  # a class is hashable
    module.__dict__["_abtrain_weights"] = records


def _rename_(module: nn.Module, old: str, new: str, parameter: nn.Parameter) -> None:
    """Replaces a module's parameter by another one under a new name, without changing the order of its parameters."""
    renamed = [(new, parameter) if name == old else (name, p) for name, p in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(renamed)


def _free_name(module: nn.Module, name: str) -> str:
    """Returns `name`, with underscores appended until the module has no attribute of that name."""
    while hasattr(module, name):
        name += "_"
    return name
