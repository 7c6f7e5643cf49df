"""Gives access to the tensors that merges make equal, and compares and averages them for validation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.comm.buckets import average_exactly, exact_average
from abtrain.comm.checksums import checksum, fingerprint, layouts_of
from abtrain.comm.communicator import Communicator, Scope
from abtrain.comm.stages import finish
from abtrain.consistency.agreement import (
    Hashed,
    agree_on_tensors,
    differing_tensors,
    gather_json,
    largest,
    share,
    take_first,
)
from abtrain.consistency.replicas import check_replicas
from abtrain.consistency.settings import HYPERPARAMETERS, GroupNames, layout, optimizer_settings
from abtrain.errors import RanksDisagreeError
from abtrain.lowrank.classify import Treatment, sharing_memory
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.nested import tensors_in
from abtrain.merging.buffers import averaged_buffers, settled
from abtrain.merging.changes import as_real
from abtrain.merging.copies import WeightCopies
from abtrain.merging.held import Held
from abtrain.own import IGNORED, shared_buffers, shared_parameters
from abtrain.recipes.phase import Phase
from abtrain.shards import is_sharded, local
from abtrain.side_by_side import lay_side_by_side

log = logging.getLogger("abtrain")


class SharedTensors:
    """Gives access to the trained parameters and the buffers that merges make equal, as weights or factors.

    `copies` are the copies of weights in the optimizers' state. `average_buffers` has glob patterns of buffers that are
    averaged, in addition to running statistics. If `same_settings`, optimizers must have equal settings at merges.
    """

    def __init__(
        self,
        model: FactoredModel,
        treatments: Sequence[Treatment],
        comm: Communicator,
        average_buffers: Sequence[str] = (),
        same_settings: bool = True,
    ) -> None:
        self.model, self.treatments, self.same_settings = model, treatments, same_settings
        self.copies = WeightCopies(model, comm)
        self._comm = comm
        self._average_buffers = tuple(average_buffers)
        self._frozen_sums: dict[str, int] = {}
        self._frozen_names = [treatment.name for treatment in treatments if treatment.kind == "frozen"]
        self.release()

    def release(self) -> None:
        """Forgets the parameters that were returned last, so that they do not keep memory."""
        self._held, self._held_in = Held({}), (-1, list[int]())
        self._shapes: tuple[Held, dict[str, str], Hashed] | None = None
        self._group_names = GroupNames()

    def parameters(self) -> Held:
        """Returns the trained parameters by name, in the same order on all workers; complex ones as real numbers.

        Returns the same object as before if no parameter was replaced or has moved. If the model is sharded, these are
        this worker's shards.
        """
        trained = self.model.trained(self.treatments)
        # A parameter that was given other data has another address, since `_held` still occupies the former memory.
        held_in = self.model.version, [] if self.model.sharded else list(map(Tensor.data_ptr, trained.values()))
        if held_in != self._held_in or self.model.sharded:
            self._held = Held(as_real({name: local(parameter) for name, parameter in trained.items()}))
            self._held_in = held_in
        return self._held

    def lay_out(self) -> None:
        """Moves many small parameters into one piece of memory (see `side_by_side.py`). Changes no values."""
        trained, sharing = self.model.trained(self.treatments), sharing_memory(self.model.model)
        for batch in [] if self.model.sharded else self.parameters().batches():
            if not sharing.keys() & set(batch.names):
                lay_side_by_side([trained[name] for name in batch.names])

    def buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that workers share by name; complex ones as real numbers."""
        return as_real(self.model.buffers())

    def replicated(self) -> dict[str, Tensor]:
        """Returns the trained and the frozen parameters by name. All are equal on workers that share gradients."""
        return self.parameters() | self._frozen()

    def _sum(self) -> int:
        """Returns a hash of all that `replicated` returns."""
        held = self.parameters()
        sums = [checksum(held.flat(batch)) for batch in held.batches()]
        return fingerprint(*sums, *map(checksum, self._frozen().values()))

    def same_on(self, scope: Scope | None) -> Scope | None:
        """Returns the scope on whose workers parameters are equal if the workers of `scope` have equal models.

        Workers of a group have different shards of a sharded model, and counterparts have the same ones.
        """
        if not self.model.sharded:
            return scope
        return "counterparts" if scope == "world" else None

    def check_equal(self, scope: Scope, where: str, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Checks that parameters are equal where they must be if the workers of a scope have equal models.

        Collective over the scope, and over the world for a sharded model. Arguments, and errors: see `check_replicas`.
        """
        if len(self._comm.ranks(scope)) == 1:
            return None
        if not self.model.sharded:
            return check_replicas(self._comm, self.replicated(), scope, where, buffers, self._sum())
        same, problem = self.same_on(scope), ""
        if same is None:
            return None
        try:
            check_replicas(self._comm, self.replicated(), same, where, total=self._sum())
        except RanksDisagreeError as error:
            problem = str(error)
        # All workers must stop, since those of a group need each other's shards.
        for found in filter(None, gather_json(self._comm, problem)):
            raise RanksDisagreeError(found)
        return None

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Returns for each flag whether it is true on any worker of the group, if the model is sharded.

        Otherwise returns this worker's flags, which are those of its group. Collective in the group of a sharded model.
        """
        if not self.model.sharded or not flags:
            return list(flags)
        return [value > 0 for value in largest(self._comm, [*map(float, flags)], scope="group")]

    def _frozen(self) -> dict[str, Tensor]:
        """Returns the frozen parameters that are plain tensors, or this worker's shards of them, by name."""
        held = {name: local(self.model.model.get_parameter(name)) for name in self.frozen_names()}
        return as_real({name: tensor for name, tensor in held.items() if type(tensor) is Tensor})

    def _sums_of_frozen(self) -> dict[str, int]:
        """Returns checksums of the frozen parameters, by name. Collective in the group if some of them are sharded."""
        sums = {name: checksum(tensor) for name, tensor in self._frozen().items()}
        if not sums.keys() & {*self.model.sharded}:
            return sums
        row = torch.tensor(list(sums.values()), dtype=torch.int64, device=self._comm.device)
        columns = self._comm.all_gather(row, "group").T.tolist()
        return {name: fingerprint(*column) for name, column in zip(sums, columns, strict=True)}

    def averaged_buffers(self) -> list[str]:
        """Returns the names of the buffers that are averaged where they differ."""
        real = [name for name, buffer in self.buffers().items() if buffer.is_floating_point()]
        return averaged_buffers(real, self._average_buffers)

    def layout(self) -> dict[str, dict[str, object]]:
        """Returns, by parameter and buffer, the properties that must be equal on all workers before training."""
        kinds = {treatment.name: treatment.kind for treatment in self.treatments}
        model = self.model.model
        parameters = {
            name: layout(p, requires_grad=p.requires_grad, treatment=kinds[name])
            for name, p in shared_parameters(model).items()
        }
        return parameters | {name: layout(buffer) for name, buffer in shared_buffers(model).items()}

    def frozen_names(self) -> list[str]:
        """Returns the names of the parameters that no worker trains. They do not merge."""
        return self._frozen_names

    def compared_settings(self, phase: Phase) -> Collection[str]:
        """Returns the names of the optimizer settings that must be equal on all workers in a phase."""
        # Equal gradients keep workers equal only under equal settings.
        return HYPERPARAMETERS if phase.shares_gradients or (phase.rounds and self.same_settings) else ()

    def agree(self) -> None:
        """Gives all workers rank 0's parameters, frozen ones included, and buffers. Collective over the world.

        The shards of a sharded model become those of rank 0's group.

        Raises:
            RanksDisagreeError: tensor subclasses, such as quantized weights, differ. They cannot be overwritten.
        """
        model = self.model.model
        tensors = {name: p.data for name, p in shared_parameters(model).items()} | shared_buffers(model)
        plain = {name: tensor for name, tensor in tensors.items() if type(tensor) is Tensor}
        shards = {name: local(tensor) for name, tensor in tensors.items() if is_sharded(tensor)}
        differed = agree_on_tensors(self._comm, plain) + take_first(self._comm, shards, "counterparts")
        rest = {name: tensor for name, tensor in tensors.items() if name not in plain and name not in shards}
        unlike = differing_tensors(self._comm, rest)
        if unlike:
            raise RanksDisagreeError(
                f"tensors that cannot be sent (subclasses of Tensor) differ between workers: {told_names(unlike)}. "
                "Load the same weights on all workers before building ABTraining"
            )
        self._frozen_sums = self._sums_of_frozen()
        if differed and self._comm.rank == 0:
            log.info("%d tensors had different initial values on workers: all now use rank 0's values", len(differed))

    def place(self, step: int, phase: int, held: Held | None = None, **more: object) -> dict[str, object]:
        """Returns by name the values that must be equal on all workers before averaging: step, shapes, `more` etc.

        `held` is what `parameters` returns, if it is known.
        """
        sums = self._sums_of_frozen()
        changed = {
            name: f"{total:x}: list a tensor that the model changes itself in {IGNORED}, or make it a buffer"
            for name, total in sums.items()
            if total != self._frozen_sums.get(name)
        }
        place = {"step": step, "phase": phase, "shapes": self._layouts(held or self.parameters()), **more}
        place |= {"frozen_but_changed": changed, "copies_of_weights": self.copies.names}
        if self.same_settings:
            self._group_names.key = self.model.version
            known = self.model.optimizers, self.model.parameters()
            place["param_groups"] = optimizer_settings(*known, HYPERPARAMETERS, self._group_names)
        return place

    def _layouts(self, held: Held) -> Hashed:
        """Returns the shapes and dtypes of the parameters `held` and of buffers, by name."""
        buffers = layouts_of(self.buffers())
        if self._shapes is None or self._shapes[0] is not held or self._shapes[1] != buffers:
            # The shapes of whole parameters, since those of shards may differ within a group.
            layouts = layouts_of(self.model.trained(self.treatments)) | buffers
            self._shapes = held, buffers, Hashed(layouts)
        return self._shapes[2]

    def forget_nonfinite(self) -> None:
        """Drops, on this worker, the optimizer state of each parameter whose state has NaN or infinity."""
        states = [item for one in self.model.optimizers.stateful for item in list(one.state.items())]
        well = [all(bool(torch.isfinite(local(value)).all()) for value in tensors_in(held)) for _, held in states]
        broken = self.anywhere([not finite for finite in well])
        for (parameter, _), drops in zip(states, broken, strict=True):
            if drops:
                self.model.drop_state(parameter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the model the average weights of all workers inside a `with` block. Collective on entry, not on exit.

        Buffers are treated as in a merge: those that are equal on all workers keep their values. The others
        are averaged or follow rank 0. Copies of weights that optimizers keep are averaged with the weights.
        """
        buffers = self.buffers()
        differing = {name: buffers[name] for name in differing_tensors(self._comm, buffers)}
        averaged = self.averaged_buffers()
        followed = [tensor for name, tensor in differing.items() if name not in averaged]
        pooled = {name: tensor for name, tensor in differing.items() if name in averaged}
        parameters = list(self.parameters().values())
        with _restored([*parameters, *pooled.values(), *followed, *self.copies.tensors()]):
            self.copies.average()
            self._average(parameters, list(pooled.values()))
            for name, tensor in pooled.items():
                tensor.copy_(settled(name, tensor))
            share(self._comm, followed, [0] * len(followed))
            yield

    def _average(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Averages parameters (or shards) and buffers over all workers, in place. Collective over the world."""
        both = [*parameters, *buffers]
        if self.model.sharded:
            means = finish(average_exactly(parameters, self._comm)) + exact_average(buffers, self._comm)
        else:
            means = exact_average(both, self._comm)
        for tensor, mean in zip(both, means, strict=True):
            tensor.copy_(mean)

    def buffers_fingerprint(self) -> int:
        """Returns an integer of 62 bits, which is equal on all workers if their buffers are equal."""
        return fingerprint(*((name, checksum(buffer)) for name, buffer in self.buffers().items()))

    @contextmanager
    def with_first_buffers(self) -> Iterator[None]:
        """Gives the model rank 0's buffers inside a `with` block. Collective on entry, not on exit."""
        buffers = self.buffers()
        differing = [buffers[name] for name in differing_tensors(self._comm, buffers)]
        with _restored(differing):
            share(self._comm, differing, [0] * len(differing))
            yield


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restores the values of tensors after the `with` block."""
    own = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.copy_(value)
