"""The caller's modes: none of them changes what abtrain computes, or which kind of tensors it keeps.

Loops call abtrain under autocast, in inference mode, with another default dtype or device, under deterministic or
anomaly mode. Every entry point of the engine runs in modes of its own, which are PyTorch's defaults.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _Shared(Generic[T]):
    """A setting of the whole process, which several threads may want to have changed at once.

    Args:
        get: the setting.
        set_to: changes it.
        own: what it is to be meanwhile.
    """

    def __init__(self, get: Callable[[], T], set_to: Callable[[T], object], own: T) -> None:
        self._get, self._set, self._own = get, set_to, own
        self._lock = threading.Lock()
        self._inside = 0

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Inside it the setting is our own; the last thread to leave puts the caller's back."""
        with self._lock:
            if not self._inside:
                self._callers = self._get()
                self._set(self._own)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._set(self._callers)

    @property
    def differs(self) -> bool:
        return self._inside > 0 or self._get() != self._own


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def _set_anomaly(enabled: bool) -> None:
    torch.autograd.set_detect_anomaly(enabled, torch.is_anomaly_check_nan_enabled())


_SHARED: tuple[_Shared[Any], ...] = (
    _Shared(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    _Shared(_deterministic, _set_deterministic, (False, False)),
    _Shared(torch.is_anomaly_enabled, _set_anomaly, False),
)


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside it PyTorch's modes are its defaults, whatever the caller has set."""
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
        for setting in _SHARED:
            if setting.differs:
                stack.enter_context(setting.changed())
        yield


def in_own_modes(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run in `own_modes`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_modes():
            return function(*args, **kwargs)

    return wrapped
