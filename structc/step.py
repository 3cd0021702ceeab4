"""What every step of a tile program is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar


class Written:
    """A step as its program's text has it: ``word(field,field)``."""

    word: ClassVar[str]

    @property
    def params(self) -> int:
        """Elements of its factors; biases, gains and places are not counted."""
        return 0

    @property
    def flops(self) -> int:
        """Of its products, for one row."""
        return 2 * self.params

    def __str__(self) -> str:
        this: Any = self
        return f"{self.word}({','.join(str(getattr(self, f.name)) for f in fields(this))})"


class Alike(Written):
    """A step that gives as many features as it takes."""

    n: int

    @property
    def in_features(self) -> int:
        return self.n

    out_features = in_features
