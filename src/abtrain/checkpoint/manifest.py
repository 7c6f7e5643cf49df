"""The manifest of a checkpoint: its files, their sizes and digests."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from abtrain.checkpoint.tensor_files import read_json
from abtrain.checks import anything, by_name, mapping, one_of, row, said, text, whole
from abtrain.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_BODY = mapping(
    {
        "format": anything,
        "step": whole(0, 2**63 - 1),
        "workers": whole(1, 10**6),
        "resizable": one_of(True, False),
        "files": by_name(row(whole(0, 2**63 - 1), text())),
    }
)


def manifest(step: int, resizable: bool, workers: int, written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a manifest; `written` has size and SHA-256 by file name."""
    body = {"format": FORMAT, "step": step, "workers": workers, "resizable": resizable, "files": dict(written)}
    return {"manifest": body, "sha256": _digest(body)}


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the valid manifest of a folder that holds exactly the files in it, and the manifest's digest.

    Raises:
        CheckpointError: the folder or the manifest is missing, damaged or invalid.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path} is not a folder")
        held = set(os.listdir(path))  # noqa: PTH208
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror}") from error
    content = read_json(path / MANIFEST)
    body = content.get("manifest") if isinstance(content, dict) else None
    try:
        sha = _digest(body)
    except RecursionError:
        sha = ""  # Python reads more levels than it writes
    if not isinstance(body, dict) or not sha or content.get("sha256") != sha:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its digest is not the one that was written")
    for problem in _problems(body):
        raise CheckpointError(f"{path / MANIFEST}: {problem}")
    wanted = {*body["files"], MANIFEST}
    for name in sorted(wanted - held):
        raise CheckpointError(f"{path / name} is missing")
    for name in sorted(held - wanted):
        raise CheckpointError(f"{path / name} does not belong there: remove it if you know its origin")
    return body, sha


def _problems(body: Mapping[str, Any]) -> Iterator[str]:
    if body.get("format") != FORMAT:
        yield f"its format is {said(body.get('format'))}, and this version of abtrain reads {FORMAT}"
        return
    problems = list(_BODY("manifest", body))
    yield from problems
    if not problems:
        files, workers = body["files"].keys(), body["workers"]
        expected = {f"part-{rank}.{kind}" for rank in range(workers) for kind in ("json", "safetensors")}
        yield from (f"it lists {said(name)}, which {workers} workers do not write" for name in sorted(files - expected))
        yield from (f"it does not list {name}" for name in sorted(expected - files))


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
