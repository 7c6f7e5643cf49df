"""The choices of settings. Pure: the command's help is built from it, and should not wait for torch."""

from __future__ import annotations

from typing import Literal

Init = Literal["default", "orthogonal"]
OnNonFinite = Literal["stop", "drop_worker", "skip"]
OnCheckpointError = Literal["warn", "stop"]
Precision = Literal["fp32", "bf16"]
OnBadImage = Literal["stop", "skip"]
DEVICES = ("auto", "cpu", "cuda")
