"""What a MODEL argument of the command line stands for: a model, inputs, data and a metric.

file.py:factory   a function of the user's that returns the model and what goes with it
FOLDER            a Hugging Face folder on disk, with text to tokenise
FILE.pt2          a torch.export archive, only with explicit trust
"""

from __future__ import annotations

from pathlib import Path

from structc.errors import ConfigError
from structc.sources.source import Source, TextOptions

__all__ = ["Source", "TextOptions", "load_source"]

FORMS = (
    "MODEL is file.py:factory, a Hugging Face folder on disk (config.json and safetensors), or "
    "with --trust a .pt2 file."
)


def load_source(spec: str, text: TextOptions, *, trust: bool = False, seed: int = 0) -> Source:
    """The model that an argument names.

    Args:
        spec: ``file.py:factory``, a folder or a ``.pt2`` file.
        text: calibration text and how to cut it; for folders only.
        trust: whether a ``.pt2`` file may be loaded, which runs code from it.
        seed: of all random generators before the user's code runs, so that the same command sees
            the same data.

    Errors: :class:`ConfigError` for anything that is none of these, missing or broken;
        :class:`CalibrationError` for unreadable text; :class:`UnsupportedModel`.
    """
    _seed_all(seed)
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        from structc.sources.factory import from_factory

        text.refuse_for("a file.py:factory model: let the factory return its own calibration")
        return from_factory(Path(file), function)
    path = Path(spec)
    if "\0" in spec or not _exists(path):
        raise ConfigError(
            f"MODEL {spec!r}: there is no such file or folder",
            hint=f"{FORMS} Nothing is downloaded: fetch a model from a hub first.",
        )
    if path.suffix == ".py":
        raise ConfigError(
            f"MODEL {spec!r}: the function is missing",
            hint=f"Write {spec}:NAME, where NAME is a function in it that returns the model.",
        )
    if path.suffix == ".pt2" and path.is_file():
        from structc.sources.exported import from_exported

        text.refuse_for("a .pt2 file: its own example inputs are used")
        return from_exported(path, trust=trust)
    if path.is_dir():
        return _from_folder(path, text)
    raise ConfigError(f"MODEL {spec!r}: a file of an unknown kind", hint=FORMS)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the file system
        return False


def _from_folder(path: Path, text: TextOptions) -> Source:
    if (path / "structc.json").exists():
        raise ConfigError(
            f"MODEL {str(path)!r} is an artifact of structc, not a model",
            hint="Name the model that it was converted from; see `structc report` for its report.",
        )
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"MODEL {str(path)!r}: a Hugging Face folder has a config.json, this one has none",
            hint=FORMS,
        )
    from structc.sources.folder import from_folder

    return from_folder(path, text)


def _seed_all(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
