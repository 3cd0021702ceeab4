"""The product: the user's model with fast leaves, and a handle to what was done to it."""

from __future__ import annotations

import copyreg
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from structc.errors import ConfigError

if TYPE_CHECKING:
    from structc.records import Plan, Region, Sites
    from structc.report import Report


@dataclass(eq=False)
class Handle:
    """What structc knows about a compiled model.

    Attributes:
        report: what was done and why not more.
        plan: the decision at each site.
        sites: from detection.
        regions: the graphs as exported, before any rewrite.
        kernels: bindings ``{form, dtype, rows, kernel, config, transposed}`` that the plan uses.
        runner: ``"graph"``, ``"inductor"`` or ``"modules"``.
        replaced: for each rewritten site the name of its family module in the product.
        chains: programs that a graph runs as one operator.
        filters: depthwise convolutions that run by FFT.
        original: the model that was compiled, as long as somebody else keeps it.
    """

    report: Report
    plan: Plan
    sites: Sites
    regions: tuple[Region, ...]
    kernels: tuple[dict[str, Any], ...]
    runner: str
    replaced: dict[str, str] = field(default_factory=dict)
    chains: frozenset[str] = frozenset()
    filters: tuple[str, ...] = ()
    original: weakref.ref[nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self


class CompiledModel(nn.Module):
    """A compiled model: an instance of the user's own class with four names more.

    ``report``, ``plan``, ``save(path)`` and ``structc``, the :class:`Handle` that holds them. A
    name that the user's model has already is left to the model; the handle always has all of them.
    """

    if TYPE_CHECKING:  # given to each product by wrap(), where its own names leave room
        structc: Handle
        report: Report
        plan: Plan

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the artifact folder; see :func:`structc.artifact.save`."""
        from structc.artifact import save

        return save(self, path, overwrite=overwrite)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies are made as ever; pickles, whose class nobody could import, name ``save``."""
        made = super().__reduce_ex__(max(2, protocol))  # below 2 Python has a way of its own
        if isinstance(made, str) or made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made  # the user's class has its own way
        return _again, (_OwnClass(made[1][0]), *made[1][1:]), *made[2:]


class _OwnClass:
    """The class of one product: it lives as long as the product and is in no module."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> _OwnClass:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            f"a compiled {self.kind.__name__} cannot be pickled: its class is made for it alone",
            hint="Write it with model.save(path) and read it with structc.load(path, model), "
            "or keep model.state_dict().",
        )


def _again(own: _OwnClass, *arguments: Any) -> Any:
    return own.kind.__new__(own.kind, *arguments)


def wrap(tree: nn.Module, handle: Handle) -> CompiledModel:
    """Give a rewritten tree its names, as a subclass of its own class."""
    base = type(tree)
    names: dict[str, Any] = {}
    for name, value in (
        ("report", property(lambda self: self.__dict__["_structc_handle"].report)),
        ("plan", property(lambda self: self.__dict__["_structc_handle"].plan)),
        ("save", CompiledModel.save),
        ("structc", property(lambda self: self.__dict__["_structc_handle"])),
    ):
        if not hasattr(tree, name):
            names[name] = value
    names |= {"__module__": base.__module__, "__doc__": base.__doc__, "forward": base.forward}
    # CompiledModel comes last in the method order: nothing of the user's model is hidden by it
    bases = (base,) if issubclass(base, CompiledModel) else (base, CompiledModel)
    metaclass: Any = type(base)
    tree.__class__ = metaclass(base.__name__, bases, names)
    tree.__dict__["_structc_handle"] = handle
    return tree  # type: ignore[return-value]


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a compiled model, or None for any other."""
    found = model.__dict__.get("_structc_handle")
    return found if isinstance(found, Handle) else None
