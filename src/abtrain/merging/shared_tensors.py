"""The tensors that merges make equal: trained parameters and buffers, compared, averaged and restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from abtrain.comm.averages import exact_average
from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.layouts import layouts_of
from abtrain.consistency.agreement import agree_on_tensors, differing_tensors, share
from abtrain.consistency.settings import HYPERPARAMETERS, layout, leaves, optimizer_settings
from abtrain.errors import RanksDisagreeError
from abtrain.lowrank.classify import Treatment
from abtrain.lowrank.model import FactoredModel
from abtrain.merging.buffers import averaged_buffers, settled
from abtrain.merging.copies import WeightCopies
from abtrain.own import IGNORED, shared_buffers, shared_parameters

log = logging.getLogger("abtrain")


class SharedTensors:
    """The tensors of a model that merges make equal, as they are at present: factors while they live.

    Args:
        model: with its optimizer.
        treatments: what becomes of each parameter.
        comm: of this worker.
        copies: of the weights that optimizers keep.
        average_buffers: globs of buffers that are averaged beside running statistics.
        same_settings: whether the optimizers' settings have to be equal at merges.
    """

    def __init__(
        self,
        model: FactoredModel,
        treatments: Sequence[Treatment],
        comm: Communicator,
        copies: WeightCopies,
        average_buffers: Sequence[str] = (),
        same_settings: bool = True,
    ) -> None:
        self._copies = copies
        self._frozen_sums: dict[str, int] = {}
        self._average_buffers, self._same_settings = tuple(average_buffers), same_settings
        self._model = model
        self._treatments = treatments
        self._comm = comm

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by name, as real tensors that write through; the same order on all workers."""
        return as_real({name: p.data for name, p in self._model.trained(self._treatments).items()})

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that workers share by name, likewise."""
        return as_real(shared_buffers(self._model.model))

    def replicated(self) -> dict[str, Tensor]:
        """Returns the tensors that are equal while gradients are shared: trained parameters, and frozen ones."""
        return self.parameters() | self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        """The frozen parameters that are plain tensors."""
        held = {name: self._model.model.get_parameter(name).data for name in self.frozen()}
        return as_real({name: tensor for name, tensor in held.items() if type(tensor) is Tensor})

    def averaged_buffers(self) -> list[str]:
        """Names of the buffers that are averaged where they differ."""
        buffers = self.buffers()
        real = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
        return averaged_buffers(real, self._average_buffers)

    def layout(self) -> dict[str, dict[str, object]]:
        """Returns the properties that have to be equal on all workers before training, by parameter and buffer."""
        kinds = {treatment.name: treatment.kind for treatment in self._treatments}
        model = self._model.model
        parameters = {
            name: layout(p, requires_grad=p.requires_grad, treatment=kinds[name])
            for name, p in shared_parameters(model).items()
        }
        return parameters | {name: layout(buffer) for name, buffer in shared_buffers(model).items()}

    def frozen(self) -> list[str]:
        """Names of the parameters that nobody trains, and no merge shares."""
        return [treatment.name for treatment in self._treatments if treatment.kind == "frozen"]

    def agree(self) -> None:
        """Makes what workers share the same on all of them, frozen parameters too: where they differ, rank 0's.

        Raises:
            RanksDisagreeError: tensors of a class of their own, such as quantised weights, differ. They cannot be
                written.
        """
        model = self._model.model
        tensors = {name: p.data for name, p in shared_parameters(model).items()} | shared_buffers(model)
        plain = {name: tensor for name, tensor in tensors.items() if type(tensor) is Tensor}
        differed = agree_on_tensors(self._comm, plain)
        wrapped = {name: tensor for name, tensor in tensors.items() if name not in plain}
        unlike = differing_tensors(self._comm, wrapped)
        if unlike:
            raise RanksDisagreeError(
                f"{', '.join(unlike[:4])} differ between workers, and are tensors of a class of their own, which "
                "cannot be sent: load the same weights on all workers before ABTraining is built"
            )
        self._frozen_sums = {name: checksum(tensor) for name, tensor in self._frozen().items()}
        if differed and self._comm.rank == 0:
            log.info("initial values of %d tensors differed between workers: rank 0's were taken", len(differed))

    def place(self, step: int, phase: int, **more: int) -> dict[str, int | Mapping[str, str]]:
        """Returns everything that has to be equal on all workers before they average.

        Args:
            step: how many steps are done.
            phase: which of the recipe's phases this is.
            more: what else has to be equal.
        """
        shapes = layouts_of(self.parameters() | self.buffers())
        sums = {name: checksum(tensor) for name, tensor in self._frozen().items()}
        changed = {
            name: f"frozen and changed ({total:x}): list what a model moves itself in {IGNORED}, or make it a buffer,"
            for name, total in sums.items()
            if total != self._frozen_sums.get(name)
        }
        place: dict[str, int | Mapping[str, str]] = {"step": step, "phase": phase, "shapes": shapes, **more}
        place["frozen"] = changed
        if self._copies.names:
            place["copies"] = {"state that is a copy of weights": self._copies.names}
        if self._same_settings:
            settings = optimizer_settings(self._model.optimizers, self._model.parameters(), HYPERPARAMETERS)
            place["settings"] = dict(leaves("param_groups", settings))
        return place

    def forget_nonfinite(self) -> None:
        """Drops this worker's optimizer state of every parameter for which it holds NaN or infinity."""
        for optimizer in self._model.optimizers.stateful:
            for parameter, held in list(optimizer.state.items()):
                if not all(bool(torch.isfinite(value).all()) for value in _tensors_in(held)):
                    self._model.drop_state(parameter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the model holds the average of all workers. Collective on entry, not on exit.

        Buffers are treated as in a merge: what all hold the same stays, and of the others what is not averaged follows
        rank 0.
        """
        buffers = self.buffers()
        differing = {name: buffers[name] for name in differing_tensors(self._comm, buffers)}
        tensors = self.parameters() | differing
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        averaged = self.averaged_buffers()
        followed = [tensor for name, tensor in differing.items() if name not in averaged]
        numbers = {name: tensor for name, tensor in tensors.items() if name not in differing or name in averaged}
        means = exact_average(list(numbers.values()), self._comm)
        for (name, tensor), mean in zip(numbers.items(), means, strict=True):
            tensor.copy_(settled(name, mean) if name in differing else mean)
        share(self._comm, followed, [0] * len(followed))
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(own[name])

    def told_of_buffers(self) -> int:
        """62 bits that are equal on all workers if they hold the same buffers."""
        return fingerprint(*((name, checksum(buffer)) for name, buffer in self.buffers().items()))

    @contextmanager
    def with_first_buffers(self) -> Iterator[None]:
        """Inside it the buffers that differ between workers are rank 0's. Collective on entry, not on exit."""
        buffers = self.buffers()
        differing = [buffers[name] for name in differing_tensors(self._comm, buffers)]
        own = [tensor.clone() for tensor in differing]
        share(self._comm, differing, [0] * len(differing))
        try:
            yield
        finally:
            for tensor, value in zip(differing, own, strict=True):
                tensor.copy_(value)


def _tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of a parameter's optimizer state, complex ones and those in lists and dicts included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def as_real(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complex tensors as real ones that write through, with a last dimension of 2."""
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}
