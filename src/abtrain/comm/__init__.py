"""Talking to other workers: the only part of abtrain that knows torch.distributed.

`communicator.py` has the contract, `data_parallel.py` that of averaged gradients. `torch_distributed.py` and
`in_process.py` implement both, and one test suite runs on all of them.
"""

from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.comm.meter import Meter
from abtrain.comm.topology import Topology
from abtrain.comm.torch_distributed import TorchCommunicator, default_communicator

__all__ = [
    "Communicator",
    "Meter",
    "SingleProcess",
    "Topology",
    "TorchCommunicator",
    "default_communicator",
    "run_in_process",
]
