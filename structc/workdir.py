"""Work in progress on disk: what makes Ctrl-C harmless. The same command continues.

One finished item is one file, written to a temporary name and renamed; a file is the record. The
manifest holds a fingerprint of everything that the items depend on; another model, other data or
other options are refused, naming the field that differs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc.errors import ArtifactWrite, ResumeMismatch
from structc.files import write_atomic
from structc.records import Call

ALGORITHM = 2
"""Raised whenever fits or measurements change their meaning: old work is then not taken up."""


class WorkDir:
    """Finished items of one conversion, by name.

    Args:
        path: the folder, or None to keep nothing.
        fingerprint: short texts that must be the same for work to be continued.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, str]) -> None:
        self.path = path
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ArtifactWrite(f"work_dir {path} cannot be created: {e}") from None
        wanted = {"algorithm": str(ALGORITHM), **fingerprint}
        manifest = path / "manifest.json"
        known = _read_json(manifest)
        if known is None:
            write_atomic(manifest, json.dumps(wanted, indent=1).encode())
            return
        for key, value in wanted.items():
            if known.get(key) != value:
                again = (
                    "The inputs differ from last time: seed what is random in them. "
                    if key == "data"
                    else ""
                )
                raise ResumeMismatch(
                    f"work_dir {path} holds another conversion: {key} was {known.get(key)!r}, "
                    f"is {value!r}",
                    hint=f"{again}Delete the folder, or give another work_dir.",
                )

    def get(self, name: str) -> Any | None:
        """A finished JSON item, or None."""
        return None if self.path is None else _read_json(self.path / f"{_file_name(name)}.json")

    def put(self, name: str, value: Any) -> None:
        """Keep a finished JSON item."""
        if self.path is not None:
            write_atomic(self.path / f"{_file_name(name)}.json", json.dumps(value).encode())

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Finished tensors, or None; an unreadable file counts as not there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.path is None:
            return None
        file = self.path / f"{_file_name(name)}.safetensors"
        try:
            return load_file(file) if file.exists() else None
        except (SafetensorError, OSError):
            return None

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep finished tensors."""
        from safetensors.torch import save

        if self.path is not None:
            write_atomic(self.path / f"{_file_name(name)}.safetensors", save(tensors))


def _read_json(path: Path) -> Any | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _file_name(name: str) -> str:
    """A safe file name that keeps the readable part and is unique for the name."""
    readable = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_calls(calls: list[Call]) -> str:
    """A hash of the tensors in a list of calls."""
    leaves = pytree.tree_leaves([(c.args, c.kwargs) for c in calls])
    return hash_tensors({str(i): t for i, t in enumerate(leaves) if isinstance(t, Tensor)})


def hash_source(function: object) -> str:
    """A hash of the code of a function, or of the class of a callable object; empty for None.

    What it reads from elsewhere is not in it.
    """
    if function is None:
        return ""
    written = function if inspect.isroutine(function) else type(function)
    try:
        text = inspect.getsource(written)
    except (OSError, TypeError):  # typed in by hand, or compiled
        text = repr(getattr(getattr(written, "__code__", None), "co_code", written))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
