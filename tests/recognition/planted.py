"""Matrices with a structure, for the tests of recognition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from structc.families.base import AbstractFamily
from structc.recognition import Recognition

Array = NDArray[Any]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shuffled(matrix: Array, seed: int = 0) -> Array:
    """Rows and columns in random orders."""
    m, n = matrix.shape
    return matrix[rng(seed).permutation(m)][:, rng(seed + 1).permutation(n)]


def scaled(matrix: Array, seed: int = 0) -> Array:
    """Rows and columns times random positive factors."""
    m, n = matrix.shape
    r, s = np.exp(rng(seed).normal(size=m)), np.exp(rng(seed + 1).normal(size=n))
    return r[:, None] * matrix * s


def signed(matrix: Array, seed: int = 0) -> Array:
    """Rows and columns times random signs, or phases where the matrix is complex."""
    m, n = matrix.shape
    g = rng(seed)
    if np.iscomplexobj(matrix):
        r, s = np.exp(2j * np.pi * g.random(m)), np.exp(2j * np.pi * g.random(n))
    else:
        r, s = g.choice([-1.0, 1.0], m), g.choice([-1.0, 1.0], n)
    return r[:, None] * matrix * s


def real_dft(n: int) -> Array:
    spectrum = scipy.fft.fft(np.eye(n))[: n // 2 + 1]
    return np.concatenate([spectrum.real, spectrum.imag])


def hartley(n: int) -> Array:
    spectrum = scipy.fft.fft(np.eye(n))
    return np.asarray(spectrum.real - spectrum.imag)


def fixed(kind: str, n: int) -> Array:
    """The matrix of a named transform, from scipy."""
    if kind == "dft":
        return np.asarray(scipy.fft.fft(np.eye(n)))
    if kind == "idft":
        return np.asarray(scipy.fft.ifft(np.eye(n)))
    if kind == "hartley":
        return hartley(n)
    if kind == "hadamard":
        return np.asarray(scipy.linalg.hadamard(n).astype(np.float64))
    if kind == "circulant":
        return np.asarray(scipy.linalg.circulant(rng(7).normal(size=n)))
    one = scipy.fft.dct if kind.startswith("dct") else scipy.fft.dst
    return np.asarray(one(np.eye(n), type=int(kind[-1]), axis=0))


def monarch(k: int, j: int, l: int, i: int, r: int) -> Array:
    g = rng(3)
    w1, w2 = g.normal(size=(k, j, r, i)), g.normal(size=(j, l, r, k))
    return np.einsum("jlrk,kjri->jlki", w2, w1).reshape(j * l, k * i)


def strided(matrix: Array, blocks: int) -> Array:
    """Contiguous row groups to rows taken in turn from each group."""
    m, n = matrix.shape
    return matrix.reshape(blocks, m // blocks, n).transpose(1, 0, 2).reshape(m, n)


def tensor(matrix: Array, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of a real dtype, or of the complex one of its width."""
    weight = torch.from_numpy(np.ascontiguousarray(matrix))
    if weight.is_complex():
        dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return weight.to(dtype)


def checked(found: Recognition | None, weight: Tensor, name: str, at_most: float) -> AbstractFamily:
    """The family, after what every recognition promises was held against the weight."""
    assert found is not None, f"no {name} was found"
    assert found.name == name
    assert found.residual <= min(at_most, found.tolerance)
    dense = found.family.to_dense().detach().to(torch.complex128)
    wanted = weight.detach().to(torch.complex128)
    assert dense.shape == wanted.shape
    gap = dense - wanted
    assert float(gap.norm() / wanted.norm().clamp_min(1e-300)) <= at_most
    assert abs(float(gap.abs().max()) - found.max_error) <= at_most * float(wanted.abs().max())
    assert found.words
    return found.family


Maker = Callable[[], Array]
