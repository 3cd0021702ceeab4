"""Stand-ins for families that are not there yet; removed with the first line that imports them."""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
from torch import Tensor, nn

from structc.recognize import kinds


class _Standin(nn.Module):
    def apply_rows(self, x: Tensor) -> Tensor:
        """x (rows, n) -> x M^T."""
        return x.to(torch.promote_types(x.dtype, self.to_dense().dtype)) @ self.to_dense().T

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_rows(x)


class Diagonal(_Standin):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.in_features = len(scale)

    def to_dense(self):
        return torch.diag(self.scale)

    def apply_rows(self, x):
        return x * self.scale


class Selection(_Standin):
    def __init__(self, index, in_features):
        super().__init__()
        self.register_buffer("index", index)
        self.in_features = in_features

    def to_dense(self):
        return torch.eye(self.in_features, dtype=torch.float64)[self.index]

    def apply_rows(self, x):
        return x[:, self.index]


class Transform(_Standin):
    def __init__(self, kind, n):
        super().__init__()
        self.kind, self.in_features = kind, n

    def to_dense(self):
        return self.apply_rows(torch.eye(self.in_features, dtype=torch.float64)).T

    def apply_rows(self, x):
        x = x.detach().numpy()
        if self.kind == "irdft":
            n = self.in_features
            t = np.linalg.pinv(kinds.forward("rdft", np.eye(n)).T)
            return torch.from_numpy(x @ t.T)
        return torch.from_numpy(np.ascontiguousarray(kinds.forward(self.kind, x)))


class Circulant(_Standin):
    def __init__(self, taps):
        super().__init__()
        self.taps = nn.Parameter(taps)
        self.in_features = len(taps)

    def to_dense(self):
        n = len(self.taps)
        i = torch.arange(n)
        return self.taps[(i[:, None] - i) % n]


class Toeplitz(_Standin):
    def __init__(self, taps, in_features):
        super().__init__()
        self.taps = nn.Parameter(taps)
        self.in_features = in_features

    def to_dense(self):
        n = self.in_features
        m = len(self.taps) - n + 1
        return self.taps[torch.arange(m)[:, None] - torch.arange(n) + n - 1]


class Hankel(Toeplitz):
    def to_dense(self):
        n = self.in_features
        m = len(self.taps) - n + 1
        return self.taps[torch.arange(m)[:, None] + torch.arange(n)]


class Displacement(_Standin):
    def __init__(self, g, h):
        super().__init__()
        self.g, self.h = nn.Parameter(g), nn.Parameter(h)
        self.in_features = g.shape[1]

    def to_dense(self):
        n = self.in_features
        i = torch.arange(n)
        at = i[:, None] - i
        skew = torch.where(at >= 0, 1.0, -1.0).to(torch.float64)
        out = 0
        for g, h in zip(self.g, self.h):
            out = out + g[at % n] @ (h[at % n] * skew).T
        return out


class Kronecker(_Standin):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.in_features = a.shape[2] * b.shape[2]

    def to_dense(self):
        return sum(torch.kron(a, b) for a, b in zip(self.a, self.b))


class BlockDiagonal(_Standin):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.Parameter(blocks)
        self.in_features = blocks.shape[0] * blocks.shape[2]

    def to_dense(self):
        return torch.block_diag(*self.blocks)

    def apply_rows(self, x):
        g, l, i = self.blocks.shape
        x = x.to(torch.promote_types(x.dtype, self.blocks.dtype))
        return torch.einsum("gli,bgi->bgl", self.blocks, x.reshape(-1, g, i)).flatten(1)


class BlockSparse(_Standin):
    def __init__(self, values, rows, columns, in_features):
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.in_features = in_features

    def to_dense(self):
        _, b, c = self.values.shape
        m = (len(self.rows) - 1) * b
        out = torch.zeros(m // b, self.in_features // c, b, c, dtype=self.values.dtype)
        row = torch.repeat_interleave(torch.arange(m // b), self.rows.diff())
        out[row, self.columns] = self.values
        return out.permute(0, 2, 1, 3).reshape(m, self.in_features)


class Product(_Standin):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].in_features

    def to_dense(self):
        x = torch.eye(self.in_features, dtype=torch.float64)
        for p in self.parts:
            if hasattr(p, "apply_rows"):
                x = p.apply_rows(x)
            else:
                x = x.to(torch.promote_types(x.dtype, p.to_dense().dtype)) @ p.to_dense().T
        return x.T


__all__ = ["scipy"]
