"""Lists the allowed values of settings. The module does not import torch, which would delay `--help`."""

from __future__ import annotations

from typing import Literal

Init = Literal["default", "orthogonal"]
Precision = Literal["fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]
OnBadImage = Literal["stop", "skip"]
OnCheckpointError = Literal["warn", "stop"]
DEVICES = ("auto", "cpu", "cuda")
