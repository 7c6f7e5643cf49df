"""Defines a wire that sends the changes of matrices in a round as low-rank factors, by PowerSGD's algorithm.

Vogels, Karimireddy, Jaggi, "PowerSGD" (arXiv 1905.13727), algorithm 1, with the change of a weight instead of its
gradient. M_i is the change on worker i. A merge makes one step of a power iteration, from the last merge's Q:

    P = mean(M_i) Q ;  P orthonormal ;  Q = mean(M_i)^T P ;  mean(M_i) ~ P Q^T ;  E_i = M_i - P (M_i^T P)^T

Each worker computes P and P Q^T itself, with the same bits on any processor: by sums and products of single numbers in
a fixed order, which IEEE 754 rounds in one way. The bits of a matrix product or a norm depend on the instruction set.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.communicator import Calls, Communicator
from abtrain.comm.stages import Stages
from abtrain.merging.wires.direct import DirectWire
from abtrain.merging.wires.wire import Averages, Wire

_DEPENDENT = 1e-4
"""A column counts as dependent on earlier columns if its part orthogonal to them is below this share of its norm."""
_CACHED = 2**17
"""The number of elements of a product that are computed at once, so that they fit into a cache."""


class LowRankWire(Wire):
    """Sends tensors of two or more dimensions, reshaped to (first dimension, rest), as two factors of rank `rank`.

    All other tensors, and those whose factors would not be smaller, are sent in full. `code` encodes all numbers.

    Attributes:
        starts: by name, the (n, rank) factor that the next merge's iteration starts from; the same on all workers.
    """

    lossy = True

    def __init__(self, rank: int, code: str = "fp32") -> None:
        super().__init__()
        self._rank = rank
        self._direct = DirectWire(code)

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        if comm.topology.n_groups == 1:
            return Averages(dict(numbers), {})
        matrices = {name: t.float().flatten(1) for name, t in numbers.items() if _pays(t, self._rank)}
        rest = {name: tensor for name, tensor in numbers.items() if name not in matrices}
        P = {name: M @ self._start(name, M) for name, M in matrices.items()}
        # A rounding error of P only changes the subspace. Q is computed from the rounded P, which compensates for it.
        averages = yield from self._direct.average(P | rest, comm)
        P = {name: orthonormal(averages.mean[name]) for name in matrices}
        Q = {name: M.T @ P[name] for name, M in matrices.items()}
        second = yield from self._direct.average(Q, comm)
        self.starts |= second.mean
        mean, error = {}, {}
        for name, tensor in numbers.items():
            if name in matrices:
                mean[name] = product(P[name], second.mean[name]).view(tensor.shape).to(tensor.dtype)
                arrived = Q[name] - second.error[name] if name in second.error else Q[name]
                sent = P[name] @ arrived.T
                error[name] = torch.sub(matrices[name], sent, out=sent).view(tensor.shape)
            else:
                mean[name] = averages.mean[name]
                error[name] = averages.error.get(name, torch.zeros_like(tensor, dtype=torch.float32))
        return Averages(mean, error)

    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        matrices = [tensor.float().flatten(1) for tensor in tensors if _pays(tensor, self._rank)]
        rest = [tensor for tensor in tensors if not _pays(tensor, self._rank)]
        P = [M.new_empty(M.shape[0], self._rank) for M in matrices]
        Q = [M.new_empty(M.shape[1], self._rank) for M in matrices]
        return (*self._direct.sends(P + rest, workers), *self._direct.sends(Q, workers))

    def holds(self, tensors: Sequence[Tensor], workers: int) -> int:
        matrices = [tensor.float().flatten(1) for tensor in tensors if _pays(tensor, self._rank)]
        rest = [tensor for tensor in tensors if not _pays(tensor, self._rank)]
        factors = [M.new_empty(sum(M.shape), self._rank) for M in matrices]
        return sum(one.nbytes for one in (*tensors, *factors)) + self._direct.holds(factors + rest, workers)

    def keeps(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: (t.numel() // t.shape[0], self._rank) for name, t in tensors.items() if _pays(t, self._rank)}

    def _start(self, name: str, M: Tensor) -> Tensor:
        # All workers draw the same numbers, on any device.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(M.shape[1], self._rank, generator=generator).to(M.device)
        known = self.starts.get(name)
        if known is None or known.shape != drawn.shape:
            return drawn
        # A column of zeros would stay zero.
        return _scaled(torch.where(known.any(dim=0), known, drawn))


def _scaled(Q: Tensor) -> Tensor:
    """Scales columns to absolute sums between 1/2 and 1, so that M Q does not overflow for any finite M.

    Scaling by powers of two is exact, and the iteration depends only on the directions of the columns. So its result
    stays bitwise the same.
    """
    exponents = torch.frexp(Q.double().abs().sum(0)).exponent
    return torch.ldexp(Q.double(), -exponents).to(Q.dtype)


def _pays(tensor: Tensor, rank: int) -> bool:
    """Returns whether a tensor has at least two dimensions and more elements than its factors of this rank."""
    if tensor.ndim < 2 or not tensor.numel():
        return False
    m = tensor.shape[0]
    n = tensor.numel() // m
    return rank * (m + n) < m * n


def orthonormal(P: Tensor) -> Tensor:
    """Returns P (m, r) with orthonormal columns, computed one by one (Gram-Schmidt, twice, in float64).

    A column that depends linearly on earlier columns becomes zero. A QR decomposition would replace it by an arbitrary
    direction, which results from rounding and differs between processors.
    """
    columns = P.new_empty(P.shape[0], 0, dtype=torch.float64)
    for column in P.double().unbind(1):
        before = _norm(column)
        for _ in range(2):
            parts = columns * _total(columns * column[:, None])
            column = column - _total(parts.T)
        after = _norm(column)
        dependent = after <= _DEPENDENT * before
        column = torch.where(dependent, torch.zeros_like(column), column / after)
        columns = torch.cat([columns, column[:, None]], dim=1)
    return columns.to(P.dtype)


def product(P: Tensor, Q: Tensor) -> Tensor:
    """Returns P Q^T (m, n) of P (m, r) and Q (n, r), computed column after column."""
    m, n = len(P), len(Q)
    result, columns = P.new_empty(m, n), Q.T.contiguous()
    # A CPU computes as many rows at once as fit into its cache.
    rows = m if P.is_cuda else max(1, _CACHED // n)
    term = P.new_empty(min(rows, m), n)
    for start in range(0, m, rows):
        part, block = P[start : start + rows], result[start : start + rows]
        torch.mul(part[:, :1], columns[0], out=block)
        for p, q in zip(part.unbind(1)[1:], columns[1:], strict=True):
            block += torch.mul(p[:, None], q, out=term[: len(part)])
    return result


def _norm(column: Tensor) -> Tensor:
    return _total(column * column).sqrt()


def _total(terms: Tensor) -> Tensor:
    """Sums over the first dimension in a fixed order: adds one half of the rows to the other, repeatedly."""
    while len(terms) > 1:
        half = len(terms) // 2
        folded = terms[:half] + terms[half : 2 * half]
        terms = torch.cat([folded, terms[2 * half :]]) if len(terms) % 2 else folded
    return terms.sum(0)
