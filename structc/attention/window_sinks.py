"""A window around each query and a few first keys: what most heads of trained models look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv, exact
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal
from structc.softmax import Softmax

MASSES = (0.8, 0.9, 0.95, 0.97, 0.99)
"""Mean shares of the mass for which a window is tried."""


@dataclass(frozen=True)
class WindowSinks(AbstractMethod):
    """Exact softmax over the last ``window`` keys and the first ``sinks``.

    What is left out is all of the error: the Kullback-Leibler divergence of a row is minus the
    logarithm of the mass that is kept, its total variation one minus that mass.

    Args:
        window: keys ``i - window < j`` (and ``j < i + window`` unless causal).
        sinks: first keys that every query sees besides.
        is_causal: whether later keys are hidden.

    Cost:    ``4 n (window + sinks) d`` flops causal, about twice that otherwise.
    Source:  StreamingLLM, Xiao et al. 2023 (https://arxiv.org/abs/2309.17453).

    >>> q, k, v = torch.randn(3, 1, 2, 64, 8).unbind(0)
    >>> WindowSinks(16, 2)(q, k, v).shape
    torch.Size([1, 2, 64, 8])
    """

    name: ClassVar[str] = "window_sinks"
    certified: ClassVar[bool] = True

    window: int
    sinks: int = 0
    is_causal: bool = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ConfigError(f"window_sinks: window {self.window}, {self.sinks} sinks")

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[WindowSinks, ...] | Refusal:
        """The cheapest windows that keep each share of the mass."""
        found = [w for mass in MASSES if (w := stats.window(mass)) is not None]
        if found:
            unique = dict.fromkeys(found)
            return tuple(WindowSinks(w, s, is_causal=stats.causal) for w, s in unique)
        if not stats.kept:
            return Refusal("", cls.name, "SHORT", f"{stats.length} keys are few")
        (window, sinks), kept = max(stats.kept.items(), key=lambda item: item[1])
        reason = f"window {window} with {sinks} sinks keeps {kept:.0%} of the mass"
        return Refusal("", cls.name, "MASS", reason)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and row sums over the keys that are kept."""
        check_qkv(q, k, v)
        return exact(
            q,
            k,
            v,
            is_causal=self.is_causal,
            window=self.window,
            sinks=self.sinks,
            scale=self.scale,
            return_lse=True,
        )

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax of the scores under the mask."""
        n, m = q.shape[2], k.shape[2]
        rule = Softmax(1.0, causal=self.is_causal, window=self.window, sinks=self.sinks)
        seen = rule.visible(torch.arange(n), torch.arange(m))
        assert seen is not None
        scores = self.sigma(q) * (q @ k.mT)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the keys inside, and half a tile at each edge."""
        reach = min(keys, (1 if self.is_causal else 2) * self.window + self.sinks + 16)
        return 4.0 * queries * reach * head_dim
