"""Connects workers: only this package calls the collectives of torch.distributed.

`communicator.py` defines the interface for collectives, and `data_parallel.py` the one for averaging gradients.
`torch_distributed.py` and `in_process.py` implement both. The same tests run on every implementation.
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
