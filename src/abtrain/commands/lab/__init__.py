"""Emulated clusters on one Linux machine: hosts with shaped links, bytes counted at their interfaces, faults."""

from abtrain.commands.lab.config import LabConfig
from abtrain.commands.lab.faults import LabFault
from abtrain.commands.lab.job import Job
from abtrain.commands.lab.lab import Lab, clean
from abtrain.commands.lab.rates import parse_link_rate
from abtrain.commands.lab.result import HostResult, LabResult

__all__ = ["HostResult", "Job", "Lab", "LabConfig", "LabFault", "LabResult", "clean", "parse_link_rate"]
