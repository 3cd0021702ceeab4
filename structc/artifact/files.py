"""Names and small helpers that writing and reading share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

SCHEMA = 1
WEIGHTS, MANIFEST, REPORT_JSON, REPORT_HTML = (
    "model.safetensors",
    "structc.json",
    "report.json",
    "report.html",
)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``."""
    return str(dtype).removeprefix("torch.")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
