"""What every structure family is: a module whose parameters are the factors of one matrix."""

from __future__ import annotations

import abc
import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from structc import ops
from structc.forms import Act, Bias, Form, Tile
from structc.numerics import weighted_error
from structc.records import Hyper


class AbstractFamily(nn.Module, abc.ABC):
    """A linear map ``y = M x + b`` kept as factors.

    A family is mathematics: how to fit a weight, with what error, and which form computes it. It
    never names a backend. Weights are ``(out_features, in_features)``, a Gram matrix is
    ``E[x x^T]`` of shape ``(in_features, in_features)``.

    Laws (the contract suite checks them for every line of ``FAMILIES``):
        ``module(x) == x @ module.to_dense().T + bias`` up to rounding;
        ``module.form() == type(module).form_of(in, out, module.hyper(), bias, activation)``;
        ``fit`` returns a family or a :class:`~structc.records.Refusal`, never raises for a
        weight's values (:func:`structc.families.fits.analytic` sees to that);
        with a Gram, ``fit`` is at or below the unweighted fit in ``weighted_error``;
        a weight of the class is found again if ``finds_members`` says so.

    Attributes:
        fit_error: relative output error that ``fit`` reached, under its Gram and on the factors as
            they are stored; NaN for a module that was not fitted.
    """

    name: ClassVar[str]
    finds_members: ClassVar[bool] = True
    """Whether ``fit`` finds a weight of the class again to rounding, or only a local optimum."""
    scales: ClassVar[bool] = True
    """Whether a multiple of a member is a member; a permutation times two is none."""
    bias: nn.Parameter | None
    fit_error: float = math.nan

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        """Hyper-parameters worth pricing for a weight of this size, most parameters first.

        None for what is recognised, or asked for, but approximates no weight well.
        """
        return ()

    @classmethod
    @abc.abstractmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Form:
        """The form that computes the map, known before anything is fitted."""

    @classmethod
    @abc.abstractmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        """A module of the right shapes with uninitialised factors, to load a state into."""

    @classmethod
    @abc.abstractmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        """The error that an unweighted fit reaches on a Gaussian matrix, by formula or sampled."""

    @classmethod
    def null(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        """:meth:`gaussian_error`, computed once for a size.

        A fit at its null has found nothing: only what it gains below shows structure in a weight.
        Data count as structure too, for inputs that do not vary need no weights.
        """
        return _null(cls, in_features, out_features, tuple(hyper.items()))

    def null_error(self) -> float:
        """The null of this module's size and hyper-parameters."""
        return self.null(self.in_features, self.out_features, self.hyper())

    @classmethod
    def hyper_names(cls) -> tuple[str, ...]:
        """What ``fit`` takes beside weight and Gram."""
        parameters = inspect.signature(cls.fit).parameters.values()  # type: ignore[attr-defined]
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @classmethod
    def hyper_words(cls) -> tuple[str, ...]:
        """Which of them are words; the others are whole numbers."""
        parameters = inspect.signature(cls.fit).parameters  # type: ignore[attr-defined]
        return tuple(n for n in cls.hyper_names() if parameters[n].annotation == "str")

    @abc.abstractmethod
    def hyper(self) -> Hyper:
        """The hyper-parameters of this module."""

    @abc.abstractmethod
    def factors(self) -> list[Tensor]:
        """The parameters and buffers that the form takes, in its order."""

    def factor_names(self) -> list[str]:
        """Names of the tensors that :meth:`factors` gives, in its order: graphs hold names."""
        named = {id(t): n for n, t in (*self.named_parameters(), *self.named_buffers())}
        return [named[id(factor)] for factor in self.factors()]

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix ``(out_features, in_features)``, from the factors."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in_features) -> (..., out_features)``."""

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        """How many equal contiguous blocks of outputs the class may be mixed inside of; 0: none.

        1 says that any matrix from the left keeps a member in the class.
        """
        return 0

    def mix_outputs(self, mix: Tensor) -> None:
        """Replace M by ``blockdiag(mix) M``; ``mix`` is (output_blocks, s, s)."""
        raise NotImplementedError(f"{self.name} is not closed under mixing of outputs")

    def form(self, activation: str = "") -> Form:
        """The form that computes this map and its bias, then an activation."""
        return self.form_of(
            self.in_features,
            self.out_features,
            self.hyper(),
            bias=self.bias is not None,
            activation=activation,
        )

    def error(self, weight: Tensor, gram: Tensor | None = None) -> float:
        """Relative output error against a weight, measured on the factors as they are stored."""
        return weighted_error(weight, self.to_dense(), gram)

    def extra_repr(self) -> str:
        hyper = "".join(f", {k}={v}" for k, v in self.hyper().items())
        return f"{self.in_features}, {self.out_features}{hyper}, bias={self.bias is not None}"


class AbstractStructured(AbstractFamily):
    """A family that runs as a tile program.

    ``weight`` reconstructs the dense matrix, for code that reads ``layer.weight`` instead of
    calling the layer (``nn.TransformerEncoderLayer`` does): right, but as slow as a dense layer.
    """

    transposed: bool = False
    """Whether the layer that this replaces stored its weight ``(in_features, out_features)``."""

    @property
    def weight(self) -> Tensor:
        dense = self.to_dense()
        return dense.t() if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        weights = self.factors() if self.bias is None else [*self.factors(), self.bias]
        hyper = tuple(self.hyper().items())
        program = _program(
            type(self), self.in_features, self.out_features, hyper, self.bias is not None
        )
        return ops.tile([x], weights, program)[0]


@functools.lru_cache(maxsize=4096)
def _null(
    family: type[AbstractFamily], n: int, m: int, hyper: tuple[tuple[str, int], ...]
) -> float:
    return family.gaussian_error(n, m, dict(hyper))


@functools.lru_cache(maxsize=4096)
def _program(
    family: type[AbstractFamily], n: int, m: int, hyper: tuple[tuple[str, int], ...], bias: bool
) -> str:
    """The text of a family's form: the same at every call of a layer."""
    return str(family.form_of(n, m, dict(hyper), bias=bias, activation=""))


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product that share its singular values evenly.

    Fits leave all of a matrix's scale in one factor, or a scale of their own in both; gradient
    steps and narrow dtypes want neither. With P Q = U S V^T: P' = U S^(1/2), Q' = S^(1/2) V^T.

    Args:
        left: P, ``(..., m, r)``.
        right: Q, ``(..., r, n)``.

    >>> p, q = balanced(1e4 * torch.randn(6, 2).double(), 1e-4 * torch.randn(2, 5).double())
    >>> torch.allclose(p.mT @ p, q @ q.mT)
    True
    """
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    root = s.sqrt()
    p, q = (q1 @ u) * root[..., None, :], root[..., :, None] * (vh @ q2.mT)
    rank = left.shape[-1]
    if p.shape[-1] == rank:
        return p, q
    more = rank - p.shape[-1]  # a rank above a side of the matrix: the rest is zero
    return nn.functional.pad(p, (0, more)), nn.functional.pad(q, (0, 0, 0, more))


def with_epilogue(program: Tile, *, bias: bool, activation: str) -> Tile:
    """A program followed by bias and activation."""
    if bias:
        program = program.then(Bias(program.out_features))
    return program.then(Act(activation, program.out_features)) if activation else program


def ranks_for(
    full: int, per_rank: int, most: int, fractions: Sequence[float], multiple: int = 16
) -> Iterator[int]:
    """Ranks that keep about these fractions of ``full`` parameters, rounded to whole vectors.

    Args:
        full: parameters of the dense weight.
        per_rank: parameters that one unit of rank costs.
        most: the largest rank that makes sense.
        multiple: ranks are rounded down to it where they are large enough.
    """
    seen: set[int] = set()
    if per_rank < 1:
        return
    for fraction in fractions:
        rank = int(full * fraction / per_rank)
        step = multiple if rank >= 2 * multiple else 8 if rank >= 16 else 1
        rank = min(rank // step * step, most)
        if rank >= 1 and rank * per_rank < full and rank not in seen:
            seen.add(rank)
            yield rank
