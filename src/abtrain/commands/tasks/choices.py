"""The values of settings with a fixed choice. The module imports no torch, so that `--help` answers immediately."""

from __future__ import annotations

from typing import Literal

Init = Literal["default", "orthogonal"]
Precision = Literal["fp32", "bf16"]
OnBadImage = Literal["stop", "skip"]
OnCheckpointError = Literal["warn", "stop"]
DEVICES = ("auto", "cpu", "cuda")
