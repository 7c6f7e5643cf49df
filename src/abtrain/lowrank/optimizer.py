"""The optimizer's side of a change of shape: parameters swapped in place, moments mapped.

The optimizer stays the object that the user made, and so do its param groups: learning rates, weight decay and
schedulers go on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.names import factor_names, weight_name
from abtrain.lowrank.optimizers import Optimizers, is_a
from abtrain.lowrank.weight import FactoredWeight

State = dict[str, Any]

LINEAR_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
"""State that is a running mean of gradients."""
SQUARED_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""State that is a running mean (or sum) of squared gradients."""
PROJECTABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Muon,
)
"""Optimizers whose whole state is known to be linear or squared moments and step counts."""
_TINY = torch.finfo(torch.float64).tiny
_AT_LEAST = (("max_exp_avg_sq", "exp_avg_sq"),)
"""Pairs of state of which the first is never below the second."""


def is_projectable(optimizer: Optimizer) -> bool:
    """Whether the state of an optimizer can follow a weight into its factors and back."""
    return is_a(optimizer, PROJECTABLE)


def replace_(
    optimizers: Optimizers, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
) -> list[tuple[Optimizer, list[State]]]:
    """Puts `new` where `old[0]` stands in its param groups, and takes the other `old` out.

    Returns:
        For each optimizer with a state of its own, the states that the `old` ones had, in their order (empty where
        there was none).
    """
    for group in optimizers.groups():
        _replace_in(group, old, new)
    optimizers.hand_over(old, new)
    return [(one, [one.state.pop(parameter, {}) for parameter in old]) for one in optimizers.stateful]


def _replace_in(group: dict[str, Any], old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
    gone = {id(parameter) for parameter in old}
    parameters = group["params"]
    places = [i for i, parameter in enumerate(parameters) if parameter is old[0]]
    if places:
        kept = [(p, i) for i, p in enumerate(parameters) if id(p) not in gone]
        names = group.get("param_names")
        if names is not None:
            weight = weight_name(names[places[0]])
            fresh = (weight,) if len(new) == 1 else factor_names(weight)
            before = [names[i] for _, i in kept if i < places[0]]
            names[:] = [*before, *fresh, *(names[i] for _, i in kept if i > places[0])]
        # In place: some optimizers keep this very list.
        parameters[:] = [
            *(p for p, i in kept if i < places[0]),
            *new,
            *(p for p, i in kept if i > places[0]),
        ]


def project_to_factors(state: State, record: FactoredWeight, A: Tensor, B: Tensor) -> tuple[State, State]:
    """State of W -> states of A and B.

    The gradients are G_A = G B^T and G_B = A^T G, so running means map the same way. Running means of squares map
    through the squared factors, which is exact where the entries of G are uncorrelated.

    Args:
        state: of the dense weight.
        record: of the factored one.
        A, B: through which the optimizer sees the weight's gradients: the factors, or what a preconditioner makes of
            them (see `abtrain.lowrank.precondition.seen_through`).
    """
    shape = record.matrix_shape

    def to_A(M: Tensor, squared: bool) -> Tensor:
        return (shape.to_matrix(M).to(B.dtype) @ ((B * B).T if squared else B.T)).to(M.dtype)

    def to_B(M: Tensor, squared: bool) -> Tensor:
        return (((A * A).T if squared else A.T) @ shape.to_matrix(M).to(A.dtype)).to(M.dtype)

    return _consistent(_mapped(state, to_A)), _consistent(_mapped(state, to_B))


def project_to_weight(state_A: State, state_B: State, record: FactoredWeight, A: Tensor, B: Tensor) -> State:
    """States of A and B -> state of W; either may be empty. The arguments are those of `project_to_factors`.

    Of a mean M_A of G B^T and a mean M_B of A^T G, the smallest G that explains both is taken: with P the projector on
    the columns of A, G = A (A^T A)^-1 M_B + (I - P) M_A (B B^T)^-1 B. A mean of squares is spread evenly over the
    entries that it was summed over, which keeps it positive.
    """
    shape, A, B = record.matrix_shape, A.double(), B.double()
    A_plus, B_plus = torch.linalg.pinv(A), torch.linalg.pinv(B)
    # Step counts and the like come from the factor that was trained: the frozen one's stood still.
    further = state_A if float(state_A.get("step", 0)) >= float(state_B.get("step", 0)) else state_B
    merged: State = dict(further)
    for key in (LINEAR_MOMENTS | SQUARED_MOMENTS) & (state_A.keys() | state_B.keys()):
        of_A, of_B = state_A.get(key), state_B.get(key)
        if of_A is None and of_B is None:
            continue
        M = _explain(of_A, of_B, A, A_plus, B_plus) if key in LINEAR_MOMENTS else _spread(of_A, of_B, A, B)
        merged[key] = torch.empty_like(record.dense, requires_grad=False).copy_(shape.to_tensor(M))
    return _consistent(merged)


def _consistent(state: State) -> State:
    """Keeps between items of state what an optimizer takes the root of, or divides by, from becoming negative.

    A mean of gradients and one of their squares map by unlike sums: the first may come out larger than the root of the
    second, which it never was.
    """
    for larger, smaller in _AT_LEAST:
        if isinstance(state.get(larger), Tensor) and isinstance(state.get(smaller), Tensor):
            state[larger] = torch.maximum(state[larger], state[smaller])
    # RMSprop's centred variance is square_avg - grad_avg^2.
    square, mean = state.get("square_avg"), state.get("grad_avg")
    if isinstance(square, Tensor) and isinstance(mean, Tensor):
        state["square_avg"] = torch.maximum(square, mean * mean)
    return state


def _explain(M_A: Tensor | None, M_B: Tensor | None, A: Tensor, A_plus: Tensor, B_plus: Tensor) -> Tensor:
    G: Tensor | float = 0.0
    if M_A is not None:
        G = M_A.double() @ B_plus.T
    if M_B is not None:
        G = G - A @ (A_plus @ G) if isinstance(G, Tensor) else 0.0
        G = G + A_plus.T @ M_B.double()
    assert isinstance(G, Tensor)
    return G


def _spread(V_A: Tensor | None, V_B: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """Rows of V from V_A = V (B*B)^T and columns of V from V_B = (A*A)^T V, averaged where both are known."""
    estimates = []
    if V_A is not None:
        rows = V_A.double().sum(1, keepdim=True) / (B * B).sum().clamp_min(_TINY)
        estimates.append(rows.expand(-1, B.shape[1]))
    if V_B is not None:
        columns = V_B.double().sum(0, keepdim=True) / (A * A).sum().clamp_min(_TINY)
        estimates.append(columns.expand(A.shape[0], -1))
    return torch.stack(estimates).mean(0)


def _mapped(state: State, convert: Callable[[Tensor, bool], Tensor]) -> State:
    """Moments converted; everything else (step counts, None) taken over, tensors as copies."""
    mapped: State = {}
    for key, value in state.items():
        if key in LINEAR_MOMENTS | SQUARED_MOMENTS and isinstance(value, Tensor):
            mapped[key] = convert(value, key in SQUARED_MOMENTS).contiguous()
        else:
            mapped[key] = value.clone() if isinstance(value, Tensor) else value
    return mapped


def fresh_state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> State:
    """Returns the state that an optimizer needs for a parameter before its first step; empty for most optimizers.

    Adagrad makes its state when it is built, for the parameters of that day. Fused SGD goes by the first parameter
    whether all have momentum.
    """
    if is_a(optimizer, (torch.optim.Adagrad,)):
        twin = torch.optim.Adagrad([parameter], initial_accumulator_value=group["initial_accumulator_value"])
        return dict(twin.state[parameter])
    if is_a(optimizer, (torch.optim.SGD,)) and group.get("fused") and group["momentum"]:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    return {}
