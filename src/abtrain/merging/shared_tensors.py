"""Gives access to the tensors that merges make equal, and compares and averages them for validation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from abtrain.checks import told_names
from abtrain.comm.buckets import exact_average
from abtrain.comm.checksums import checksum, fingerprint, layouts_of
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import agree_on_tensors, differing_tensors, share
from abtrain.consistency.settings import HYPERPARAMETERS, layout, optimizer_settings
from abtrain.errors import RanksDisagreeError
from abtrain.lowrank.classify import Treatment
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.nested import tensors_in
from abtrain.merging.buffers import averaged_buffers, settled
from abtrain.merging.changes import as_real
from abtrain.merging.copies import WeightCopies
from abtrain.own import IGNORED, shared_buffers, shared_parameters
from abtrain.recipes.phase import Phase

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
        self.copies = WeightCopies(model)
        self._comm = comm
        self._average_buffers = tuple(average_buffers)
        self._frozen_sums: dict[str, int] = {}

    def parameters(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name, in the same order on all workers; complex ones as real numbers."""
        return as_real({name: p.data for name, p in self.model.trained(self.treatments).items()})

    def buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that workers share by name; complex ones as real numbers."""
        return as_real(shared_buffers(self.model.model))

    def replicated(self) -> dict[str, Tensor]:
        """Returns the trained and the frozen parameters by name. All are equal on workers that share gradients."""
        return self.parameters() | self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        """Returns the frozen parameters that are plain tensors, by name."""
        held = {name: self.model.model.get_parameter(name).data for name in self.frozen_names()}
        return as_real({name: tensor for name, tensor in held.items() if type(tensor) is Tensor})

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
        return [treatment.name for treatment in self.treatments if treatment.kind == "frozen"]

    def compared_settings(self, phase: Phase) -> Collection[str]:
        """Returns the names of the optimizer settings that must be equal on all workers in a phase."""
        # Equal gradients keep workers equal only under equal settings.
        return HYPERPARAMETERS if phase.shares_gradients or (phase.rounds and self.same_settings) else ()

    def agree(self) -> None:
        """Gives all workers rank 0's parameters, frozen ones included, and buffers. Collective over the world.

        Raises:
            RanksDisagreeError: tensor subclasses, such as quantized weights, differ. They cannot be overwritten.
        """
        model = self.model.model
        tensors = {name: p.data for name, p in shared_parameters(model).items()} | shared_buffers(model)
        plain = {name: tensor for name, tensor in tensors.items() if type(tensor) is Tensor}
        differed = agree_on_tensors(self._comm, plain)
        unlike = differing_tensors(self._comm, {name: t for name, t in tensors.items() if name not in plain})
        if unlike:
            raise RanksDisagreeError(
                f"tensors that cannot be sent (subclasses of Tensor) differ between workers: {told_names(unlike)}. "
                "Load the same weights on all workers before building ABTraining"
            )
        self._frozen_sums = {name: checksum(tensor) for name, tensor in self._frozen().items()}
        if differed and self._comm.rank == 0:
            log.info("%d tensors had different initial values on workers: all now use rank 0's values", len(differed))

    def place(self, step: int, phase: int, **more: object) -> dict[str, object]:
        """Returns by name the values that must be equal on all workers before averaging: step, shapes, `more` etc."""
        sums = {name: checksum(tensor) for name, tensor in self._frozen().items()}
        changed = {
            name: f"{total:x}: list a tensor that the model changes itself in {IGNORED}, or make it a buffer"
            for name, total in sums.items()
            if total != self._frozen_sums.get(name)
        }
        place = {"step": step, "phase": phase, "shapes": layouts_of(self.parameters() | self.buffers()), **more}
        place |= {"frozen_but_changed": changed, "copies_of_weights": self.copies.names}
        if self.same_settings:
            place["param_groups"] = optimizer_settings(self.model.optimizers, self.model.parameters(), HYPERPARAMETERS)
        return place

    def forget_nonfinite(self) -> None:
        """Drops, on this worker, the optimizer state of each parameter whose state has NaN or infinity."""
        for optimizer in self.model.optimizers.stateful:
            for parameter, held in list(optimizer.state.items()):
                if not all(bool(torch.isfinite(value).all()) for value in tensors_in(held)):
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
        numbers = self.parameters() | {name: tensor for name, tensor in differing.items() if name in averaged}
        with _restored([*numbers.values(), *followed, *self.copies.tensors()]):
            self.copies.average(self._comm)
            means = exact_average(list(numbers.values()), self._comm)
            for (name, tensor), mean in zip(numbers.items(), means, strict=True):
                tensor.copy_(settled(name, mean) if name in differing else mean)
            share(self._comm, followed, [0] * len(followed))
            yield

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
