"""Which kernels and configurations are worth timing for a form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from structc.codegen import spectral
from structc.codegen.bench import Job
from structc.codegen.cpu.served import analyse
from structc.codegen.cpu.tile import DEFAULT
from structc.codegen.dense import tile_form
from structc.forms import Convolve, Form, PackedDense, Tile
from structc.records import Refusal

Config = Mapping[str, int | str]
FEW_ROWS = 512
"""Below this, sharing one tile's outputs between threads can beat giving each its own tile."""
NARROW = 256
"""Diagonals up to which a band may be faster by dense products than by an FFT."""
SINGLE = 8
"""Rows up to which planning an FFT takes as long as the FFT."""


@dataclass(frozen=True)
class Contender:
    """A kernel and its configuration; the first contender of a list is the default."""

    kernel: str
    config: Config = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in a price.

        >>> Contender("tile", {"tile": 64}).label, Contender("aten").label
        ('tile[64]', 'aten')
        """
        if self.kernel in spectral.KERNELS:
            return f"{self.kernel}[{','.join(map(str, self.config.values()))}]"
        if self.kernel != "tile":
            return self.kernel
        return f"tile[{self.config['tile']}]"


@dataclass(frozen=True)
class Request:
    """One form to price at one number of rows.

    Attributes:
        form: a tile program with its bias and activation steps, or a dense product.
        rows: of one call.
        dtype: of inputs and weights.
        bias: whether a bias is added (part of the program for a tile form).
        activation: at the end, or ``""`` (part of the form as well).
        transposed: dense only: the weight is stored (in_features, out_features).
        parts: for the yardstick of a chain: text and kernel of each of its products, which then run
            one after the other, with PyTorch's own operators in between.
        of: a chain's dense original, to be held against that chain's parts instead of its own.
    """

    form: Form
    rows: int
    dtype: torch.dtype
    bias: bool
    activation: str
    transposed: bool = False
    parts: str = ""
    of: str = ""

    @property
    def in_features(self) -> int:
        return self.form.in_features

    @property
    def out_features(self) -> int:
        return self.form.out_features

    def dense(self) -> Request:
        """What this form has to beat: the dense product; a chain is held against its parts."""
        if isinstance(self.form, PackedDense) or self.parts:
            return self
        form = PackedDense(self.in_features, self.out_features, self.activation)
        return Request(form, self.rows, self.dtype, self.bias, self.activation)

    def contenders(self, effort: str) -> list[Contender]:
        """What may serve it, the default first."""
        if self.parts:
            return [Contender("parts", {"kernels": self.parts})]
        if isinstance(self.form, PackedDense):
            return dense_contenders(self.form, self.rows, self.dtype, effort)
        if found := spectral.convolution(self.form):
            return [*convolutions(found[0], self.rows, effort), Contender("reference")]
        return tile_contenders(self.form, self.rows, self.dtype, effort)

    def job(self, contender: Contender) -> Job:
        """One contender as data for the worker."""
        name = str(self.dtype).removeprefix("torch.")
        text, kernel, config = str(self.form), contender.kernel, dict(contender.config)
        return Job(text, self.rows, name, self.bias, self.transposed, kernel, config)


def dense_contenders(
    form: PackedDense, rows: int, dtype: torch.dtype, effort: str
) -> list[Contender]:
    """Dense kernels; eager comes first: it is replaced only by something measurably faster."""
    found = [Contender("aten"), Contender("onednn")]
    if dtype == torch.float32:
        found.append(Contender("mkl"))
    if isinstance(analyse(tile_form(form, bias=True), dtype), Refusal):
        return found
    tiles = {_default_tile(rows)} if effort == "quick" else {16, 32, 64, 128}
    if rows > 128:
        tiles.add(128)
    for height in sorted(t for t in tiles if t <= max(16, 2 * rows)):
        for width in _widths(dtype, effort):
            for split in _splits(rows):
                config = {"tile": height, "panel": width, "split": split}
                found.append(Contender("tile", config))
    return found


def tile_contenders(form: Tile, rows: int, dtype: torch.dtype, effort: str) -> list[Contender]:
    """Configurations of the emitted kernel, the most likely one first; PyTorch's operators last.

    Without a compiler, or on another processor, these are what there is: two thin products by MKL
    are still fewer than one dense product. A chain is held against them, as its parts.
    """
    plain = [] if form.is_chain else [Contender("reference")]
    found: dict[tuple[tuple[str, int | str], ...], Contender] = {}

    def add(**config: int | str) -> None:
        full = {**DEFAULT, **config}
        found.setdefault(tuple(full.items()), Contender("tile", full))

    if isinstance(analyse(form, dtype), Refusal):
        return plain
    height, split = _default_tile(rows), _splits(rows)[0]
    likely, *others = _widths(dtype, effort)
    add(tile=height, panel=likely, split=split)
    heights = (8, 16, 32, 64, 128) if effort == "full" else (height // 2, height * 2)
    for tall in (t for t in heights if 8 <= t <= 128):
        for chosen in _splits(rows):
            for width in (likely, *others) if effort == "full" else (likely,):
                add(tile=tall, panel=width, split=chosen)
    for width in others:
        add(tile=height, panel=width, split=split)
    for chosen in _splits(rows)[1:]:
        add(tile=height, panel=likely, split=chosen)
    return [*found.values(), *plain]


def convolutions(step: Convolve, rows: int, effort: str) -> list[Contender]:
    """FFTs in chunks of several sizes, the likeliest first; blocks of the band if it is narrow."""
    points = (0, 1, -1, -2, 2) if effort == "full" else (0, 1)
    found: list[Contender] = []
    for size in spectral.sizes(step):
        chunks = [max(1, int(spectral.CHUNK * 2.0**p) // size) for p in points]
        for chunk in dict.fromkeys(min(c, rows) for c in chunks):
            found.append(Contender("fft", {"size": size, "chunk": chunk}))
        if rows <= SINGLE:
            found.append(Contender("pocket", {"size": size}))
    least, most = step.diagonals
    if most - least < NARROW:
        blocks = (32, 64, 128) if effort == "full" else (32, 64)
        found += [Contender("band", {"block": block}) for block in blocks]
    return found


def _widths(dtype: torch.dtype, effort: str) -> tuple[int, ...]:
    """Widths of panels, the likeliest first: sums of so many columns fill the registers."""
    if dtype == torch.float32:
        return (64, 48, 32) if effort == "full" else (64, 48)
    return (64, 32, 128) if effort == "full" else (64, 32)


def _default_tile(rows: int) -> int:
    return 64 if rows >= 64 else 32 if rows > 16 else 16


def _splits(rows: int) -> tuple[int, ...]:
    """Whether threads share the outputs of a tile; both where it can go either way."""
    return (0,) if rows >= FEW_ROWS else (1, 0)
