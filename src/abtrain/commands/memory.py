"""Reads how much memory this process uses."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def present_memory() -> int:
    """Returns the bytes of this process in main memory now; where the system does not tell, the peak."""
    return _of_linux("VmRSS") or peak_memory()


def peak_memory() -> int:
    """Returns the largest number of bytes that this process has had in main memory."""
    # A child process inherits the peak of `getrusage` from its parent.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _of_linux("VmHWM") or peak * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Makes `peak_memory` forget earlier peaks, where the system permits it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memories(device: torch.device) -> dict[str, int]:
    """Returns the peak bytes of this process in main memory (`host`) and, if it uses a GPU, there (`cuda`)."""
    of_gpu = {"cuda": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"host": peak_memory(), **of_gpu}


def _of_linux(key: str) -> int:
    """Returns an entry of Linux's process status in bytes; 0 on other systems."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)
