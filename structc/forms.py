"""What a machine executes: tile programs and packed dense products.

Many families become few forms, so that a new family usually needs no new kernel. A form is frozen
data with a text that a person can read and an operator can carry:

>>> form = Tile((Block(1, 96, 384, 1), Block(1, 384, 96, 1), Bias(384), Act("gelu", 384)))
>>> str(form)
'block(1,96,384,1) block(1,384,96,1) bias(384) act(gelu,384)'
>>> Tile.parse(str(form)) == form
True
>>> form.in_features, form.out_features, form.flops, form.params
(384, 384, 147456, 73728)
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields

from structc.errors import InternalError
from structc.spectral_steps import COMPLEX, POWERS, TRANSFORMS, Convolve, Displace, Flip, Transform
from structc.steps import (
    ACTIVATIONS,
    NORMS,
    SLOTS,
    SPECTRAL,
    STEPS,
    Act,
    Add,
    Bias,
    Block,
    Keep,
    Load,
    Mul,
    Norm,
    Pattern,
    Permute,
    Repeat,
    Select,
    Shared,
    Sparse,
    Step,
)

__all__ = [
    "ACTIVATIONS",
    "COMPLEX",
    "SPECTRAL",
    "TRANSFORMS",
    "Act",
    "Add",
    "Bias",
    "Block",
    "Convolve",
    "Displace",
    "Flip",
    "Form",
    "Keep",
    "Load",
    "Mul",
    "Norm",
    "PackedDense",
    "Pattern",
    "Permute",
    "Repeat",
    "Select",
    "Shared",
    "Sparse",
    "Step",
    "Tile",
    "Transform",
    "parse_form",
]

_TEXT = re.compile(r"(\w+)\(([^()]*)\)")
_WHOLE = re.compile(r"-?\d+")
FACTORS = (Block, Shared, Repeat, Sparse, Permute, Select, *SPECTRAL)
"""Steps that are a matrix."""


@dataclass(frozen=True)
class Tile:
    """A straight-line program on a tile of tokens: the form of everything token-local.

    Each step maps the features of one token; weights are taken in the order of the steps.

    Errors:  :class:`InternalError` if sizes do not chain: programs are built by families and
             passes, never by users.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise InternalError("a tile program needs at least one step")
        for s in self.steps:
            if isinstance(s, Act) and s.fn not in ACTIVATIONS:
                raise InternalError(f"tile program: activation {s.fn!r} is none of {ACTIVATIONS}")
            if isinstance(s, Norm) and (s.kind not in NORMS or not _is_number(s.eps)):
                raise InternalError(f"tile program: {s} is no normalisation")
            if isinstance(s, Transform) and s.kind not in TRANSFORMS:
                raise InternalError(f"tile program: {s.kind!r} is no transform")
            if isinstance(s, Transform) and s.kind in POWERS and s.n & (s.n - 1):
                raise InternalError(f"tile program: {s} needs a power of two")
            if isinstance(s, SPECTRAL) and min(s.in_features, s.out_features) < 1:
                raise InternalError(f"tile program: sizes of {s} start at 1")
            if isinstance(s, Sparse) and (not s.b or not s.c or s.m % s.b or s.n % s.c):
                raise InternalError(f"tile program: {s} has no whole blocks")
        if isinstance(self.steps[0], Load):
            raise InternalError(f"tile program {self} starts with a load")
        self._check_slots()
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if not isinstance(after, Load) and before.out_features != after.in_features:
                raise InternalError(
                    f"tile program {self}: {before} gives {before.out_features} "
                    f"features, {after} takes {after.in_features}"
                )

    def _check_slots(self) -> None:
        features = dict(enumerate(self.input_features))
        inputs = len(features)
        if inputs > SLOTS:
            raise InternalError(f"a tile program may have {SLOTS} inputs, this one has {inputs}")
        for s in self.steps:
            if isinstance(s, Keep):
                if not inputs <= s.index < SLOTS:
                    raise InternalError(f"tile program {self}: {s} is no free slot")
                features[s.index] = s.n
            elif isinstance(s, (Add, Mul, Load)) and features.get(s.index) != s.n:
                raise InternalError(f"tile program {self}: {s} finds other features")

    @property
    def in_features(self) -> int:
        first = self.steps[0]
        assert not isinstance(first, Load)
        return first.in_features

    @property
    def out_features(self) -> int:
        return self.steps[-1].out_features

    @property
    def weights(self) -> int:
        """How many weight tensors the program takes."""
        return sum(s.weights for s in self.steps)

    @property
    def input_features(self) -> tuple[int, ...]:
        """Features of each input that the program takes; one that it never reads has none."""
        found, kept = {0: self.in_features}, set()
        for s in self.steps:
            if isinstance(s, Keep):
                kept.add(s.index)
            elif isinstance(s, (Add, Mul, Load)) and s.index not in kept:
                found.setdefault(s.index, s.n)
        return tuple(found.get(i, 0) for i in range(max(found) + 1))

    @property
    def flops(self) -> int:
        """Of the products, for one row."""
        return sum(s.flops for s in self.steps)

    @property
    def params(self) -> int:
        """Elements of the factors."""
        return sum(s.params for s in self.steps)

    def pieces(self) -> list[Tile | Step]:
        """The matrices of a chain, each with its bias and activation, and the steps in between.

        >>> form = Tile.parse("block(1,4,3,1) act(relu,4) block(1,2,4,1) add(2,1)")
        >>> list(map(str, form.pieces()))
        ['block(1,4,3,1) act(relu,4)', 'block(1,2,4,1)', 'add(2,1)']
        """
        found: list[list[Step]] = []
        before = ""
        for step in self.steps:
            factor = isinstance(step, FACTORS)
            joins = (factor and before == "factor") or (
                isinstance(step, (Bias, Act)) and before in ("factor", "tail")
            )
            if joins:
                found[-1].append(step)
            else:
                found.append([step])
            before = "factor" if factor else "tail" if joins else ""
        return [Tile(tuple(p)) if isinstance(p[0], FACTORS) else p[0] for p in found]

    @property
    def is_chain(self) -> bool:
        """Whether the program is more than one matrix with its bias and activation.

        >>> Tile.parse("block(1,4,3,1) act(relu,4) block(1,2,4,1)").is_chain
        True
        >>> Tile.parse("block(1,3,3,1) keep(3,1) load(3,0) block(1,3,3,1) add(3,1)").is_chain
        False
        """
        steps = list(self.steps)
        if isinstance(steps[-1], Act):
            steps.pop()
        if steps and isinstance(steps[-1], Bias):
            steps.pop()
        inputs = len(self.input_features)
        return not all(
            isinstance(s, (*FACTORS, Keep, Load)) or (isinstance(s, Add) and s.index >= inputs)
            for s in steps
        )

    def then(self, *steps: Step) -> Tile:
        """The program followed by further steps."""
        return Tile(self.steps + steps)

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Tile:
        """The program that :meth:`__str__` wrote."""
        steps: list[Step] = []
        for part in text.split(" "):
            match = _TEXT.fullmatch(part)
            step = STEPS.get(match[1]) if match else None
            words = match[2].split(",") if match else []
            values = [int(w) if _WHOLE.fullmatch(w) else w for w in words]
            wanted = [f.type for f in fields(step)] if step else None
            told = [type(v).__name__ for v in values]
            below = any(isinstance(v, int) and v < 0 for v in values)  # a shift may be
            if "" in words or wanted != told or (below and step is not Convolve):
                raise InternalError(f"tile program {text!r}: {part!r} is no step")
            assert step is not None
            steps.append(step(*values))  # type: ignore[arg-type]
        return Tile(tuple(steps))


@dataclass(frozen=True)
class PackedDense:
    """A dense product with its epilogue: y = act(x @ W.T + b), W kept as it is stored.

    Beside :class:`Tile` because the library kernels that serve it (oneDNN, MKL) want the weight in
    a layout of their own, packed once.

    >>> PackedDense(384, 1536, "gelu").flops
    1179648
    """

    in_features: int
    out_features: int
    activation: str = ""

    @property
    def params(self) -> int:
        return self.in_features * self.out_features

    @property
    def flops(self) -> int:
        return 2 * self.params

    def __str__(self) -> str:
        return f"dense({self.in_features},{self.out_features},{self.activation or 'none'})"

    @staticmethod
    def parse(text: str) -> PackedDense:
        """The form that :meth:`__str__` wrote."""
        match = re.fullmatch(r"dense\((\d+),(\d+),(\w+)\)", text)
        if match is None or match[3] not in ("none", *ACTIVATIONS):
            raise InternalError(f"{text!r} is no dense form")
        act = "" if match[3] == "none" else match[3]
        return PackedDense(int(match[1]), int(match[2]), act)


Form = Tile | PackedDense


def parse_form(text: str) -> Form:
    """The form that ``str`` wrote.

    >>> parse_form("dense(3,4,none)")
    PackedDense(in_features=3, out_features=4, activation='')

    Errors: :class:`InternalError` for a text that is no form.
    """
    return PackedDense.parse(text) if text.startswith("dense(") else Tile.parse(text)


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < 1e38 and not text.isdecimal()  # whole numbers are read as sizes
    except ValueError:
        return False
