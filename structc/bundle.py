"""Kernels for a GPU that were compiled beforehand."""

from __future__ import annotations

from pathlib import Path


def use_bundle(path: str | Path, *, rerank: bool = False) -> int:
    """Take the kernels of a bundle from here on; how many programs it has plans for.

    ``structc tune MODEL --target cuda:90 -o BUNDLE`` wrote it, on a machine with or without a GPU.
    Calls on this one then find their kernels compiled. With another version of Triton, or another
    dtype or program, they are compiled when they are needed, as without a bundle.

    Args:
        path: the bundle's folder.
        rerank: time the two plans that it holds of a program on its first call here, and keep the
            faster one; else the one that the cost model ranked first.

    Errors: :class:`structc.ConfigError` if it is no bundle, is damaged, or is for another GPU.

    >>> use_bundle("nowhere")
    Traceback (most recent call last):
        ...
    structc.errors.ConfigError: nowhere is no bundle: it has no bundle.json
      structc tune MODEL --target cuda:90 -o BUNDLE writes one.
    """
    from structc.codegen.triton import bundle

    return bundle.use_bundle(path, rerank=rerank)
