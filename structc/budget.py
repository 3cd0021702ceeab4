"""What a user is willing to pay, and what they demand for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from structc.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """The quality that may be spent, and the savings that are demanded.

    ``Budget()`` is the exact tier: only rewrites that leave every output equal within
    ``numerics.tolerance(dtype)``.

    Args:
        metric: ``metric(model) -> float``, higher is better; or one of :mod:`structc.metrics`,
            which compare with the original on held-out calibration data. A function with a second
            parameter is called with the part of its data to use, ``"select"`` or ``"verify"``, so
            that what selection sees is not what verification measures. None with ``max_drop`` is
            ``similarity_spearman``, or ``kl`` for models that return logits.
        max_drop: relative drop of the metric that is allowed: ``0.01`` or ``"1%"``.
        error: largest relative output error of the whole model.
        latency: demand on the time of a call, relative to the best dense version: ``"0.8x"``,
            ``0.8`` or ``"80%"``.
        params: demand on the parameters of the linear layers that are left: ``"50%"``, ``0.5``.

    >>> Budget(max_drop="1%").max_drop, Budget(latency="0.5x").latency, Budget().exact
    (0.01, 0.5, True)
    """

    metric: Callable[..., float] | Any | None = None
    max_drop: float | str | None = None
    error: float | str | None = None
    latency: float | str | None = None
    params: float | str | None = None

    def __post_init__(self) -> None:
        for name in ("max_drop", "error", "latency", "params"):
            object.__setattr__(self, name, _share(name, getattr(self, name)))
        if self.metric is not None and self.max_drop is None:
            raise ConfigError(
                "Budget: a metric without max_drop does not say how much of it may be lost",
                hint='Give both: Budget(metric=fn, max_drop=0.01) or max_drop="1%".',
            )
        if self.max_drop is not None and self.error is not None:
            raise ConfigError(
                "Budget: max_drop and error are two currencies for one thing",
                hint="Give max_drop for a task metric, or error for the relative output error.",
            )

    @property
    def exact(self) -> bool:
        """Whether only exact rewrites are allowed."""
        return not any((self.max_drop, self.error, self.latency, self.params))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports and artifacts."""
        name = getattr(self.metric, "name", None) or getattr(self.metric, "__name__", None)
        return {
            "metric": name,
            "max_drop": self.max_drop,
            "error": self.error,
            "latency": self.latency,
            "params": self.params,
        }

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from the command line: ``max_drop=1%`` or ``error=0.05,latency=0.8x``.

        >>> Budget.parse("max_drop=1%, latency=0.8x")
        Budget(metric=None, max_drop=0.01, error=None, latency=0.8, params=None)
        """
        values: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, value = part.partition("=")
            if name.strip() not in ("max_drop", "error", "latency", "params") or not value:
                raise ConfigError(
                    f"budget: cannot read {part!r}",
                    hint="Write max_drop=1%, error=0.05, latency=0.8x or params=50%, with commas.",
                )
            values[name.strip()] = value.strip()
        return cls(**values)


_UNITS: Mapping[str, float] = {"%": 0.01, "x": 1.0}
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "max_drop": (lambda x: 0 <= x < 1, "max_drop lies in [0, 1)."),
    "error": (lambda x: x >= 0, "error is not negative; 0 is the exact tier."),
    "latency": (lambda x: x > 0, "latency is positive: no call takes no time."),
    "params": (lambda x: x > 0, "params is positive: no layer is left without parameters."),
}
"""What a field may be, and that in words."""


def _share(name: str, value: float | str | None) -> float | None:
    if value is None:
        return None
    number: float
    try:
        if isinstance(value, str):
            unit = value.strip()[-1:]
            text = value.strip().rstrip("%x") if unit in _UNITS else value
            number = float(text) * _UNITS.get(unit, 1.0)
        else:
            number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    holds, range_ = _RANGES[name]
    if not (math.isfinite(number) and holds(number)):
        raise ConfigError(
            f"Budget: {name} is {value!r}; expected a share such as 0.01, '1%' or '0.8x'",
            hint=range_,
        )
    return number
