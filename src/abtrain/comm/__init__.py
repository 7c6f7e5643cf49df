"""Talking to other workers: the only part of abtrain that knows torch.distributed.

`communicator.py` has the contract; `torch_distributed.py` and `in_process.py` keep it, and one test suite
holds all forms to it. `agreement.py` is built on the contract: proving that workers hold the same, and
sharing where they do not.
"""

from abtrain.comm.communicator import Communicator, DataParallel, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.comm.meter import Meter
from abtrain.comm.topology import Topology
from abtrain.comm.torch_distributed import TorchCommunicator, default_communicator

__all__ = [
    "Communicator",
    "DataParallel",
    "Meter",
    "SingleProcess",
    "Topology",
    "TorchCommunicator",
    "default_communicator",
    "run_in_process",
]
