"""The manifest of a checkpoint: its files, their sizes and digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abtrain.checkpoint.tensor_files import read_json
from abtrain.checks import said
from abtrain.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_FILE = re.compile(r"part-\d{1,9}\.(json|safetensors)")
_MOST_WORKERS = 10**6


def manifest(step: int, resizable: bool, workers: int, written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a manifest.

    Args:
        step: the number of steps done.
        resizable: whether another number of workers may continue from here.
        workers: the number of workers that saved.
        written: size and SHA-256 by file name.
    """
    body = {"format": FORMAT, "step": step, "workers": workers, "resizable": resizable, "files": dict(written)}
    return {"manifest": body, "sha256": _digest(body)}


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the valid manifest of a folder that holds exactly the files in it, and the manifest's digest.

    Raises:
        CheckpointError: the folder or the manifest is missing, damaged or invalid.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path} is no folder")
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
    if problem := _problem(body):
        raise CheckpointError(f"{path / MANIFEST}: {problem}")
    wanted = {*body["files"], MANIFEST}
    for name in sorted(wanted - held):
        raise CheckpointError(f"{path / name} is missing")
    for name in sorted(held - wanted):
        raise CheckpointError(f"{path / name} does not belong there: remove it if you know its origin")
    return body, sha


def _problem(body: Mapping[str, Any]) -> str:
    """Returns the problem of a manifest; empty if there is none."""
    if body.get("format") != FORMAT:
        return f"its format is {said(body.get('format'))}, and this version of abtrain reads {FORMAT}"
    step, workers, files = body.get("step"), body.get("workers"), body.get("files")
    if type(step) is not int or step < 0 or type(workers) is not int or not 1 <= workers <= _MOST_WORKERS:
        return f"step {said(step)} of {said(workers)} workers is impossible"
    if not isinstance(files, dict) or not isinstance(body.get("resizable"), bool):
        return "it does not say which files there are, or whether another number of workers may continue"
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            return f"the file name {said(name)} is impossible: parts have names such as part-0.json"
        if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)):
            return f"it lacks the size or the digest of {name}"
    expected = {f"part-{rank}.{kind}" for rank in range(workers) for kind in ("json", "safetensors")}
    return "" if expected == files.keys() else f"it does not name the files of {workers} workers"


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
