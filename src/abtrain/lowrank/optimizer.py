"""Converts an optimizer's state for a weight into state for the weight's factors, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from abtrain.lowrank.optimizers import is_a
from abtrain.lowrank.weight import FactoredWeight
from abtrain.optim import Muon

State = dict[str, Any]

LINEAR_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
"""The keys in optimizer state whose values are running means of gradients."""
SQUARED_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""The keys in optimizer state whose values are running means, maxima of means, or sums of squared gradients."""
PROJECTABLE = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, torch.optim.Muon, Muon)
"""The optimizers whose state is known to consist of linear or squared moments and step counts."""
_TINY = torch.finfo(torch.float64).tiny


def project_to_factors(state: State, record: FactoredWeight, A: Tensor, B: Tensor) -> tuple[State, State]:
    """Converts the optimizer state for a weight W, which has the gradient G, into states for its factors A and B.

    The factors' gradients are G B^T and A^T G, and running means of G are converted in the same way. Running means of
    squares are multiplied by the squared factors. This is exact if the elements of G are uncorrelated. Step counts
    and other state are copied. A and B are those that `abtrain.lowrank.precondition.seen_through` returns.
    """
    state_A, state_B = State(), State()
    for key, value in state.items():
        if key in LINEAR_MOMENTS | SQUARED_MOMENTS and isinstance(value, Tensor):
            M = record.matrix_shape.to_matrix(value).to(A.dtype)
            of_A, of_B = (A * A, B * B) if key in SQUARED_MOMENTS else (A, B)
            state_A[key], state_B[key] = (E.to(value.dtype).contiguous() for E in (M @ of_B.T, of_A.T @ M))
        else:
            state_A[key], state_B[key] = (value.clone() if isinstance(value, Tensor) else value for _ in "AB")
    return _consistent(state_A), _consistent(state_B)


def project_to_weight(state_A: State, state_B: State, record: FactoredWeight, A: Tensor, B: Tensor) -> State:
    """Converts the optimizer states for A and B, of which one may be empty, into state for W.

    A and B are as in `project_to_factors`. From the means M_A and M_B of the factors' gradients, the mean for W becomes
    the smallest G with G B^T = M_A and A^T G = M_B: G = A (A^T A)^-1 M_B + (I - P) M_A (B B^T)^-1 B, where P projects
    onto the columns of A. A mean of squares is spread evenly over the elements that it sums, which keeps it positive.
    """
    A, B = A.double(), B.double()
    A_plus, B_plus = torch.linalg.pinv(A), torch.linalg.pinv(B)
    # Step counts and similar state come from the trained factor, since the frozen factor's did not advance.
    merged = dict(state_A if float(state_A.get("step", 0)) >= float(state_B.get("step", 0)) else state_B)
    for key in (LINEAR_MOMENTS | SQUARED_MOMENTS) & (state_A.keys() | state_B.keys()):
        of_A, of_B = state_A.get(key), state_B.get(key)
        if of_A is None and of_B is None:
            continue
        M = _explain(of_A, of_B, A, A_plus, B_plus) if key in LINEAR_MOMENTS else _spread(of_A, of_B, A, B)
        merged[key] = torch.empty_like(record.dense, requires_grad=False).copy_(record.matrix_shape.to_tensor(M))
    return _consistent(merged)


def _consistent(state: State) -> State:
    """Raises mean squares to their lower bounds. Otherwise, an optimizer might take the root of a negative number.

    Means of gradients and of their squares are converted by different sums, so the squared mean may exceed the mean
    square. RMSprop's centred variance, square_avg - grad_avg^2, would then be negative.
    """
    mean = state.get("grad_avg")
    least = {"max_exp_avg_sq": state.get("exp_avg_sq"), "square_avg": mean * mean if isinstance(mean, Tensor) else None}
    for key, bound in least.items():
        if isinstance(state.get(key), Tensor) and isinstance(bound, Tensor):
            state[key] = torch.maximum(state[key], bound)
    return state


def _explain(M_A: Tensor | None, M_B: Tensor | None, A: Tensor, A_plus: Tensor, B_plus: Tensor) -> Tensor:
    """Returns the smallest matrix G with M_A = G B^T and M_B = A^T G. M_A or M_B may be None."""
    if M_A is None:
        assert M_B is not None
        return A_plus.T @ M_B.double()
    G = M_A.double() @ B_plus.T
    return G if M_B is None else G - A @ (A_plus @ G) + A_plus.T @ M_B.double()


def _spread(V_A: Tensor | None, V_B: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """Estimates V by rows from V_A = V (B*B)^T, by columns from V_B = (A*A)^T V, or by the mean of both estimates."""
    estimates = []
    if V_A is not None:
        rows = V_A.double().sum(1, keepdim=True) / (B * B).sum().clamp_min(_TINY)
        estimates.append(rows.expand(-1, B.shape[1]))
    if V_B is not None:
        columns = V_B.double().sum(0, keepdim=True) / (A * A).sum().clamp_min(_TINY)
        estimates.append(columns.expand(A.shape[0], -1))
    return torch.stack(estimates).mean(0)


def fresh_state(optimizer: Optimizer, parameter: Tensor) -> State:
    """Returns the state that an optimizer needs before its first step with a parameter; empty for most optimizers.

    Adagrad only creates state in its constructor. Fused SGD assumes momentum for all parameters if one has it.
    """
    group = next(group for group in optimizer.param_groups if any(held is parameter for held in group["params"]))
    if is_a(optimizer, (Adagrad,)):
        twin = Adagrad([parameter], initial_accumulator_value=group["initial_accumulator_value"])
        return dict(twin.state[parameter])
    if is_a(optimizer, (SGD,)) and group.get("fused") and group["momentum"]:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    return {}
