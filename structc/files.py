"""Writing files so that they are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from structc.errors import ArtifactWrite


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Errors: :class:`ArtifactWrite` with the bytes that were needed; the temporary file is removed.
    """
    handle, name = -1, ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except OSError as e:
        if name:
            Path(name).unlink(missing_ok=True)
        raise ArtifactWrite(
            f"{path} cannot be written ({len(data)} bytes): {e.strerror or e}",
            hint="Free space or choose another folder; nothing that was there is changed.",
        ) from None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
