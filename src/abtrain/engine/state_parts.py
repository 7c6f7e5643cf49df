"""Checks for all parts of a saved state.

The checks depend on the step of the state, since each phase has its own form of weights and its own merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from abtrain.checks import (
    POSITIVE,
    Check,
    also,
    anything,
    by_name,
    each,
    like,
    mapping,
    maybe,
    number,
    one_of,
    row,
    said,
    tensor,
    text,
    whole,
)
from abtrain.comm.checksums import LIMIT
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.classify import UNSHARED
from abtrain.lowrank.fit import Layout, buffer_layout, state_layout
from abtrain.lowrank.names import factor_names
from abtrain.merging.changes import as_real, wide
from abtrain.merging.rounds import CHECKING
from abtrain.merging.selection import tensors_due, trained_by, trained_factors, whole_round
from abtrain.merging.shared_tensors import SharedTensors
from abtrain.merging.wires.wire import make_wire
from abtrain.own import own_names
from abtrain.recipes.numbers import MOST
from abtrain.recipes.recipe import Position, Recipe
from abtrain.shards import cut

_FLAG, _COUNT = one_of(True, False), whole(0, MOST)
_FACTORING = mapping({"cycle": _COUNT, "step": _COUNT, "ranks": by_name(whole(1, MOST)), "dense": by_name(text())})
_METER = mapping(
    {
        "phase": text(),
        "sync_seconds": number(0),
        "by_scope": mapping({"between_groups": _COUNT, "within_groups": _COUNT}),
        "by_phase": by_name(_COUNT),
        "of_group": by_name(_COUNT),
    }
)


class ResumedRun(NamedTuple):
    """A run that is about to load a saved state. Its model may be dense or factored at this time."""

    recipe: Recipe
    comm: Communicator
    shared: SharedTensors
    grad_scaler: torch.amp.GradScaler | None


class Resumption:
    """A saved state, and the position from which its run continues. The state's step and model must be valid.

    Attributes:
        position: the position of the next step in the recipe; at its end, the position of the last step.
        rounds: the merge settings of the phase at this position; None if the phase has no merges.
        factors: the names of all factors.
        parameters: the names, shapes and dtypes of shared parameters, as merges see them (complex as real).
        pieces: those of the pieces that this worker merges.
        buffers: the names, shapes and dtypes of shared buffers, as merges see them (complex as real).
    """

    def __init__(self, run: ResumedRun, state: Mapping[str, Any]) -> None:
        self.run, self.state, self.step = run, state, state["step"]
        self.model, self.topology = run.shared.model, run.comm.topology
        self.recipe, self.position = run.recipe, position_of(run.recipe, state)
        self.rounds = self.position.phase.rounds
        self.ended = self.step == self.recipe.total_steps
        layout = state_layout(self.model, state["model"])
        self.factors = [factor for name in state["model"]["factored"] for factor in factor_names(name)]
        self.parameters: Layout = {}
        for treatment in run.shared.treatments:
            pair = factor_names(treatment.name)
            names = pair if pair[0] in self.factors else (treatment.name,)
            self.parameters |= as_real({name: layout[name] for name in names if treatment.kind not in UNSHARED})
        self.pieces = cut(self.parameters, self.topology.place_of(run.comm.rank), self.topology.group_size)
        self.buffers = as_real(buffer_layout(self.model, state["model"]))


def position_of(recipe: Recipe, state: Mapping[str, Any]) -> Position:
    """Returns the position of the next step in the recipe; at its end, the position of the last step."""
    return recipe.at(min(state["step"], recipe.total_steps - 1))


def _workers_equal(at: Resumption) -> Check:
    before = at.recipe.at(at.step - 1) if at.step else None
    equal = before is None or before.phase.shares_gradients
    if before is not None and before.phase.rounds is not None:
        rounds = before.phase.rounds
        equal = len(before.merging) == rounds.fragments and (before.last or not rounds.delay)
    # A run with a new number of workers continues directly after a merge, without unfinished merges.
    back = at.rounds is not None and at.position.starts_round and not at.ended and not at.state["rounds"]["under_way"]
    if equal:
        return one_of(True)
    return _FLAG if back else one_of(False)


def _arrivals(at: Resumption) -> Check:
    """Returns a check that the order of gradients is empty (unknown), or contains each index once."""
    model, factors = at.model, {*at.factors}
    dense = {name: p for name, p in model.parameters().items() if name not in model.factors()}
    dense |= {name: record.dense for name, record in model.records.items()}
    own = own_names(model.model)
    count = sum(
        p.requires_grad for name, p in dense.items() if factor_names(name)[0] not in factors and name not in own
    )
    both = trained_factors(at.position, at.topology, at.run.comm.rank) == "all"
    count += len(at.factors) // (1 if both else 2)
    order = list(range(count))
    return also(each(whole(0, count - 1)), lambda value: sorted(value) in ([], order), f"empty, or an order of {count}")


def _merger(at: Resumption) -> Check:
    wide_ones = {name: like(p, wide(p.dtype)) for name, p in at.pieces.items()}
    return mapping(
        {
            "places": whole(at.topology.group_size, at.topology.group_size),
            "anchors": mapping(wide_ones if at.rounds else {}),
            "momentum": mapping(wide_ones, required=()),
            "residuals": mapping({n: like(p, torch.float32) for n, p in at.pieces.items()}, required=()),
            "buffers": mapping(dict.fromkeys(at.buffers, whole(-1, LIMIT - 1)), required=()),
        }
    )


def _rounds(at: Resumption) -> Check:
    return mapping(
        {
            "losses": tensor((None,), torch.float64),
            "dropped": each(mapping({"step": whole(0, at.step), "ranks": each(whole(0, 10**6))})),
            "under_way": also(each(partial(_under_way, at)), _in_order, "in the order in which merges began"),
        }
    )


def _in_order(merges: Sequence[Mapping[str, Any]]) -> bool:
    return all(one["step"] < other["step"] for one, other in pairwise(merges))


def _under_way(at: Resumption, place: str, entry: Any) -> Iterator[str]:
    """Yields the problems of the entry for a hidden merge in a saved state."""
    begun = entry.get("step") if isinstance(entry, Mapping) else None
    sync, first = at.rounds, at.position.step - at.position.step_in_phase
    position = None
    if sync is not None and type(begun) is int and max(first, at.step - sync.delay) < begun <= at.step:
        position = at.recipe.at(begun - 1)
    if sync is None or position is None or not position.merges or at.ended:
        yield f"{place} is {said(entry)} of step {said(begun)}, not a merge that may be under way at step {at.step}"
        return
    who = trained_by(position, at.topology, at.factors)
    due = tensors_due(position, at.parameters, who)
    merged = {name: at.pieces[name] for name in due} | (at.buffers if whole_round(position) else {})
    groups = at.topology.n_groups
    stages = CHECKING + make_wire(sync.wire, groups).stages(groups)
    passed = at.step - position.step - 1
    yield from mapping(
        {
            "step": anything,
            "progress": row(whole(passed, passed), whole(0, stages - 1)),
            "loss": maybe(tensor((), torch.float64)),
            "started": mapping({name: like(held) for name, held in merged.items()}),
        }
    )(place, entry)


def _rebound(at: Resumption) -> Check:
    longest = at.recipe.lr_rebound_steps
    return also(
        mapping({"length": whole(0, longest), "done": whole(0, longest)}),
        lambda value: value["length"] in (0, longest) and value["done"] <= value["length"],
        f"a ramp of 0 or {longest} steps, with no more steps done than it has",
    )


def _preconditioner(at: Resumption) -> Check:
    roots = mapping(dict.fromkeys(at.model.names, row(*[tensor((None, None))] * 2)), required=())
    if at.position.phase.damping and not at.ended and not at.state["round_began"]:
        names = filter(at.model.preconditions, at.state["model"]["factored"])
        B = {name: at.parameters[factor_names(name)[1]] for name in names}
        square = {name: tensor((len(b),) * 2, torch.promote_types(b.dtype, torch.float32)) for name, b in B.items()}
        roots = mapping({name: row(check, check) for name, check in square.items()})
    return mapping({"damping": number(0), "scale": number(0), "roots": roots})


def _grad_scaler(at: Resumption) -> Check:
    scaler = at.run.grad_scaler
    if scaler is None:
        return by_name(anything)
    float32 = torch.finfo(torch.float32)
    known: Mapping[str, Check] = {
        "scale": number(float32.smallest_normal * float32.eps, float32.max),
        "growth_factor": number(1),
        "backoff_factor": number(POSITIVE, 1),
        "growth_interval": whole(1, MOST),
        "_growth_tracker": whole(0, 2**31 - 1),
    }
    kept = mapping({key: known.get(key, anything) for key in scaler.state_dict() or known})
    return lambda place, value: iter(()) if isinstance(value, Mapping) and not value else kept(place, value)


def _copies(at: Resumption) -> Check:
    names = each(row(whole(0, len(at.model.optimizers.all) - 1), text()))
    return mapping({"seen": names, "copies": names})


PARTS: Mapping[str, Callable[[Resumption], Check]] = {
    # These entries are checked earlier, since the checks of the others depend on them.
    **dict.fromkeys(("version", "recipe", "step", "model"), lambda at: anything),
    "round_began": lambda at: _FLAG,
    "skipped_steps": lambda at: each(whole(0, at.step - 1)),
    "rank_history": lambda at: each(_FACTORING),
    "dense_this_cycle": lambda at: by_name(text()),
    "seconds": lambda at: mapping({"svd": number(0)}),
    "arrivals": _arrivals,
    "merger": _merger,
    "rounds": _rounds,
    "workers_equal": _workers_equal,
    "rebound": _rebound,
    "preconditioner": _preconditioner,
    "copies": _copies,
    "grad_scaler": _grad_scaler,
    "meter": lambda at: _METER,
    "settings": lambda at: by_name(text()),
    # The recipe has been completed by it, and compared.
    "chosen": lambda at: anything,
}
