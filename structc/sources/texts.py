"""Calibration text from a file: one text a line, paragraphs, or JSONL with a field ``text``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from structc.errors import CalibrationError

MOST_CHARS = 16 * 1024 * 1024
"""More than this of a file is never read."""
BLANK_SHARE = 20
"""With a blank line in this many lines or fewer, a text file holds paragraphs."""

BUILT_IN = (
    "The ferry leaves the harbour twice a day, once at dawn and once when the market closes.",
    "Water boils at a lower temperature on a mountain, because the air above it weighs less.",
    "How do I return a parcel that arrived damaged? Keep the box, and write to the shop first.",
    "The committee met for three hours, agreed on the budget, and put everything else off.",
    "A good map leaves most things out; what stays must be worth the ink and the reader's time.",
    "In spring the river rises over the meadows, and the road to the mill cannot be used.",
    "She tuned the old piano by ear, one string after another, until the octaves stopped beating.",
    "Prices of copper fell on Tuesday after two mines reported more output than was expected.",
)
"""What example inputs are made of when no text is given. Fits never see it."""


def read_texts(path: Path, most: int) -> tuple[list[str], str]:
    """The first texts of a file, and how it was read: ``"lines"``, ``"paragraphs"``, ``"JSONL"``.

    Errors: :class:`CalibrationError` naming the file, and the line that cannot be read.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(
            f"--calib {str(path)!r}: expected a .txt or a .jsonl file",
            hint='One text a line or paragraphs; or one {"text": "..."} a line.',
        )
    try:
        with path.open(encoding="utf-8-sig") as stream:
            content = stream.read(MOST_CHARS)
            cut = bool(stream.read(1))
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"--calib {str(path)!r}: not UTF-8 text (byte {e.start})", hint="Convert it to UTF-8."
        ) from None
    except OSError as e:
        raise CalibrationError(
            f"--calib {str(path)!r}: {e.strerror or e}", hint="Give a file that can be read."
        ) from None
    lines = content.split("\n")
    if cut:
        lines.pop()
    if path.suffix == ".jsonl":
        found, how = _from_jsonl(path, lines), "JSONL"
    else:
        found, how = _from_text(lines)
    texts = []
    for text in found:
        # a lone surrogate, which JSON can spell, is no text to a tokenizer
        text = text.strip().encode("utf-8", "replace").decode()
        if text:
            texts.append(text)
        if len(texts) == most:
            break
    if not texts:
        raise CalibrationError(
            f"--calib {str(path)!r}: there is no text in it",
            hint="Give at least a few dozen texts.",
        )
    return texts, how


def _from_text(lines: list[str]) -> tuple[Iterator[str], str]:
    """Paragraphs where blank lines are regular; a stray one between lines joins nothing."""
    trimmed = "\n".join(lines).strip().split("\n")
    blank = sum(not line.strip() for line in trimmed)
    if blank * BLANK_SHARE < len(trimmed):
        return iter(trimmed), "lines"
    return _paragraphs(trimmed), "paragraphs"


def _paragraphs(lines: list[str]) -> Iterator[str]:
    held: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            held.append(line.strip())
        elif held:
            yield " ".join(held)
            held = []


def _from_jsonl(path: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise CalibrationError(
                f"--calib {str(path)!r}, line {number}: not JSON: {e}",
                hint='Each line is one object: {"text": "..."}.',
            ) from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            got = sorted(map(str, value))[:5] if isinstance(value, dict) else type(value).__name__
            raise CalibrationError(
                f'--calib {str(path)!r}, line {number}: expected {{"text": "..."}}, got {got}',
                hint="The field must be called text and hold a string.",
            )
        yield text
