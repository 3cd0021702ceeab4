"""The arguments and flags that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structc.sources.source import TextOptions

DATA, RUN = "Calibration text (Hugging Face folders)", "Running"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:factory, a Hugging Face folder on disk, or with --trust a .pt2 file.",
        show_default=False,
    ),
]
Artifact = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder that `structc convert` wrote.", show_default=False),
]
Calib = Annotated[
    Path | None,
    typer.Option(
        "--calib",
        metavar="FILE",
        help='Text: .txt with a text a line or paragraphs, or .jsonl with {"text": ...}.',
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens an item: by default of the longest text, at most 128.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--nsamples",
        min=1,
        help="Texts to use: 128 by default.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Items a batch, the size that is made fast: 8 by default.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Effort = Annotated[
    str,
    typer.Option(
        metavar="none|recorded|quick|full|60s",
        help="none predicts prices and times nothing; recorded takes them from the tuning "
        "database; full times every configuration; 60s is a quick search that ends then.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="PATTERN",
        help="Layers to leave alone: a name, its start or end, or re:REGEX. May be repeated.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Load a .pt2 file, which can run code hidden in it."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output.", rich_help_panel=RUN)
]
NoProgress = Annotated[
    bool,
    typer.Option(
        "--no-progress",
        help="No progress bars; without a terminal there are none anyway.",
        rich_help_panel=RUN,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Log everything, and show tracebacks: as STRUCTC_LOG=debug does.",
        rich_help_panel=RUN,
    ),
]


def text_options(
    calib: Path | None, seqlen: int | None, nsamples: int | None, batch_size: int | None
) -> TextOptions:
    """The flags of calibration text as one record."""
    return TextOptions(calib, seqlen, nsamples, batch_size)
