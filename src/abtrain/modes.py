"""Runs abtrain in PyTorch's default modes, whatever modes the caller has set.

Training loops call abtrain under autocast, in inference mode, in deterministic or anomaly mode, or with another default
dtype or device. None of these settings may change abtrain's results or the type of the tensors that it keeps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _ProcessSetting:
    """Resets a process-wide setting of PyTorch to its default, even if several threads do so at the same time."""

    def __init__(self, get: Callable[[], Any], set_to: Callable[[Any], object], default: Any) -> None:
        self._get, self._set, self._default = get, set_to, default
        self._lock = threading.Lock()
        self._inside = 0

    def differs(self) -> bool:
        return self._inside > 0 or self._get() != self._default

    @contextmanager
    def at_default(self) -> Iterator[None]:
        """Sets the default inside the context. The last thread to leave the context restores the caller's value."""
        with self._lock:
            if not self._inside:
                self._callers = self._get()
                self._set(self._default)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._set(self._callers)


_PROCESS_SETTINGS = (
    _ProcessSetting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    _ProcessSetting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
        (False, False),
    ),
    _ProcessSetting(
        torch.is_anomaly_enabled,
        lambda enabled: torch.autograd.set_detect_anomaly(enabled, torch.is_anomaly_check_nan_enabled()),
        False,
    ),
)


@contextmanager
def own_modes() -> Iterator[None]:
    """Sets PyTorch's modes (such as autocast and gradient mode), default dtype and default device to their defaults."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for setting in _PROCESS_SETTINGS:
            if setting.differs():
                stack.enter_context(setting.at_default())
        yield


in_own_modes = own_modes()
"""A decorator that runs a function in the `own_modes` context."""
