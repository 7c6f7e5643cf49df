"""Emulates clusters on one Linux machine: links of limited rate, byte counters at interfaces, and faults."""

from abtrain.commands.lab.config import LabConfig, parse_link_rate
from abtrain.commands.lab.faults import LabFault
from abtrain.commands.lab.job import Job
from abtrain.commands.lab.lab import Lab, clean
from abtrain.commands.lab.result import HostResult, LabResult

__all__ = ["HostResult", "Job", "Lab", "LabConfig", "LabFault", "LabResult", "clean", "parse_link_rate"]
