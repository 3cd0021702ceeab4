"""``STRUCTC_TRACE=folder``: one numbered text file a stage, for people who want to see inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc import settings
from structc.files import write_atomic

STAGES = (
    "capture",
    "detect",
    "recognise",
    "calibrate",
    "price",
    "fit",
    "heads",
    "select",
    "rewrite",
    "heal",
    "verify",
    "report",
)


def dump(stage: str, record: object) -> None:
    """Write what a stage returned, if the environment asks for it."""
    folder = settings.current().trace
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    number = STAGES.index(stage) + 1
    text = "\n".join(lines(record)) + "\n"
    write_atomic(folder / f"{number:02}-{stage}.txt", text.encode())


def lines(value: object, name: str = "", depth: int = 0) -> Iterator[str]:
    """A record as indented lines: graphs as code, tensors as shapes, everything else as it is.

    >>> list(lines({"a": (1, torch.zeros(2))}))
    ['a', '  1', '  float32[2]']
    """
    pad = "  " * depth
    head = f"{pad}{name}" if name else ""
    if isinstance(value, torch.fx.GraphModule):
        yield f"{head}:"
        yield from (f"{pad}  {line}" for line in str(value.graph).splitlines())
    elif isinstance(value, nn.Module):
        yield f"{head}: {type(value).__name__}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, pytree.TreeSpec)):
        yield from _all(_fields(value), name or type(value).__name__, depth)
    elif isinstance(value, Mapping):
        yield from _all(value, name, depth)
    elif isinstance(value, (list, tuple)) and value:
        if head:
            yield head
        for item in value:
            yield from lines(item, "", depth + 1 if head else depth)
    else:
        yield f"{head}: {_plain(value)}" if head else f"{pad}{_plain(value)}"


def _all(items: Mapping[Any, Any], name: str, depth: int) -> Iterator[str]:
    if name:
        yield "  " * depth + name
    for key, value in items.items():
        yield from lines(value, str(key), depth + 1 if name else depth)


def _fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _plain(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return " ".join(str(value).split())
