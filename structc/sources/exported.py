"""A ``.pt2`` file of ``torch.export``: loaded on explicit trust alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from structc.errors import ConfigError
from structc.sources.source import Source


class Exported(nn.Module):
    """An exported program as a plain module.

    It takes arguments as they were exported: positional ones have no names of their own in a
    program, and structc would else pass them by the names of its graph.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        # torch forbids train() and eval() on a program, since a mode changes nothing in it
        for name in ("train", "eval"):
            program.__dict__.pop(name, None)
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)


def from_exported(path: Path, *, trust: bool) -> Source:
    """The model in a ``.pt2`` file, with the inputs that it was exported with.

    Errors: :class:`ConfigError` without trust, or if the file is no such archive.
    """
    if not trust:
        raise ConfigError(
            f"MODEL {str(path)!r}: loading a .pt2 file can run code that is hidden in it, because "
            "torch.export.load unpickles parts of it",
            hint="Pass --trust if you made the file, or trust whoever did.",
        )
    try:
        program = torch.export.load(path)
        model = Exported(program.module())
    except Exception as e:  # torch raises whatever the archive makes it raise
        raise ConfigError(
            f"MODEL {str(path)!r}: torch.export cannot load it: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else 'no message'}",
            hint="Export it again with this version of torch: torch.export.save(program, path).",
        ) from e
    if program.example_inputs is None:
        raise ConfigError(
            f"MODEL {str(path)!r}: it was saved without example inputs",
            hint="Load it in a factory of your own, and return (model, example_inputs).",
        )
    args, kwargs = program.example_inputs
    return Source(model, (tuple(args), dict(kwargs)))
