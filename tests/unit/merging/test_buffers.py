"""Buffers that merges average."""

from __future__ import annotations

from abtrain.merging.buffers import averaged_buffers


def test_globs_match_buffers_of_compiled_modules_by_either_name() -> None:
    names = ["0._orig_mod.level", "0._orig_mod.mask", "1._orig_mod.running_mean"]
    for glob in ("0.level", "*._orig_mod.level"):
        assert averaged_buffers(names, [glob]) == ["0._orig_mod.level", "1._orig_mod.running_mean"]
