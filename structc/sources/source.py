"""What every kind of MODEL argument becomes, and the options that shape text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Source:
    """A model and what goes with it.

    Attributes:
        model: the model.
        example_inputs: of the sizes that matter; None if the model brings its own.
        calibration: batches, or None: fits then know no data.
        metric: quality measure for budgets with ``max_drop``; None for the default.
        notes: sentences about how the data were read.
    """

    model: nn.Module
    example_inputs: Any = None
    calibration: Any = None
    metric: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextOptions:
    """How calibration text becomes batches; None is the default of the model.

    Attributes:
        calib: a .txt or .jsonl file.
        seqlen: tokens an item.
        nsamples: items.
        batch_size: items a batch.
    """

    calib: Path | None = None
    seqlen: int | None = None
    nsamples: int | None = None
    batch_size: int | None = None

    def refuse_for(self, what: str) -> None:
        """Options that would be ignored are errors."""
        given = [
            flag
            for flag, value in (
                ("--calib", self.calib),
                ("--seqlen", self.seqlen),
                ("--nsamples", self.nsamples),
                ("--batch-size", self.batch_size),
            )
            if value is not None
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: text can be tokenised for Hugging Face folders only, not "
                f"for {what.split(':', 1)[0]}",
                hint=f"For {what}.",
            )
