"""Weights that must be equal on all workers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abtrain.comm import Communicator, run_in_process
from abtrain.consistency.replicas import check_replicas
from abtrain.errors import RanksDisagreeError


@pytest.mark.parametrize(
    ("tensor", "drift"),
    [(torch.ones(3, dtype=torch.int64), 1), (torch.ones(3, dtype=torch.complex64), 1e-3j)],
    ids=["whole", "imaginary"],
)
def test_drift_of_any_dtype_is_found(tensor: Tensor, drift: complex) -> None:
    def work(comm: Communicator) -> None:
        check_replicas(comm, {"scale": tensor + comm.rank * drift}, "world", "step 1")

    with pytest.raises(RanksDisagreeError, match=r"rank 1 has different weights from rank 0: step 1.* scale differs"):
        run_in_process(2, work)
