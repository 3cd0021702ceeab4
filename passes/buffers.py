"""Buffers that move in forward: kept while a model is only looked at, copied when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back as they were: caches, counters and running statistics move in forward."""
    before = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give a clone's buffers the values that the original's have now."""
    own = dict(source.named_buffers())
    with torch.no_grad():
        for name, buffer in target.named_buffers():
            value = own.get(name)
            if value is not None and not (buffer.shape == value.shape and buffer.equal(value)):
                buffer.resize_(value.shape).copy_(value)
