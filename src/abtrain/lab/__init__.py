"""Emulated clusters on one Linux machine: hosts with shaped links, bytes counted at their interfaces, faults."""

from abtrain.lab.config import LabConfig
from abtrain.lab.faults import Fault
from abtrain.lab.job import Job
from abtrain.lab.lab import Lab, clean
from abtrain.lab.rates import format_rate, parse_rate
from abtrain.lab.result import HostResult, LabResult

__all__ = ["Fault", "HostResult", "Job", "Lab", "LabConfig", "LabResult", "clean", "format_rate", "parse_rate"]
