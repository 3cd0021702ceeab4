"""Writing an artifact: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc.artifact.files import (
    MANIFEST,
    REPORT_HTML,
    REPORT_JSON,
    SCHEMA,
    WEIGHTS,
    dtype_name,
    sha256,
)
from structc.attention_records import AttentionSite
from structc.compiled import Handle, handle_of
from structc.errors import ArtifactWrite, ConfigError
from structc.records import DimGuard, LinearSite, Region


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a compiled model to a folder: whole or not at all.

    Everything is written to a folder beside it, which then takes its place; an interruption or a
    full disk leaves what was there before.

    Errors: :class:`ConfigError` for a model that is not compiled; :class:`ArtifactWrite` if the
        folder exists (give ``overwrite=True``) or cannot be written.
    """
    from safetensors.torch import save_file

    handle = handle_of(model)
    if handle is None:
        raise ConfigError("save: this model was not made by structc.compile")
    target = Path(path)
    _check_target(target, overwrite)
    state = _state(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as e:
        raise _unwritable(target, e, state) from None
    try:
        _check_space(work, state)
        save_file(state, work / WEIGHTS)
        handle.report.save(work / REPORT_JSON)
        handle.report.save(work / REPORT_HTML)
        manifest = _manifest(model, handle, state)
        manifest["sha256"] = {f: sha256(work / f) for f in (WEIGHTS, REPORT_JSON, REPORT_HTML)}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))
        for file in work.iterdir():
            file.chmod(0o644)
            _sync(file)
        work.chmod(0o755)
        _swap(work, target)
    except OSError as e:
        raise _unwritable(target, e, state) from None
    except Exception as e:
        if type(e).__name__ == "SafetensorError":  # it wraps the operating system's errors
            raise _unwritable(target, e, state) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactWrite(f"save: {target} is a file", hint="Give the path of a folder.")
    if any(target.iterdir()) and not (target / MANIFEST).exists():
        raise ArtifactWrite(
            f"save: {target} is a folder with other things in it",
            hint="Give an empty or a new folder; structc replaces its own artifacts only.",
        )
    if any(target.iterdir()) and not overwrite:
        raise ArtifactWrite(
            f"save: {target} holds an artifact already", hint="Give overwrite=True to replace it."
        )


def _swap(work: Path, target: Path) -> None:
    """Put the new folder in place; the old one is kept until the new one is there."""
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        target.replace(old / "artifact")
        try:
            work.replace(target)
        except OSError:
            (old / "artifact").replace(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        work.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_space(folder: Path, state: Mapping[str, Tensor]) -> None:
    need = sum(t.nbytes for t in state.values()) + 4 * 1024 * 1024
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ArtifactWrite(
            f"save: {folder.parent} has {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB are needed",
            hint="Free space or choose another folder; nothing was changed.",
        )


def _unwritable(target: Path, error: Exception, state: Mapping[str, Tensor]) -> ArtifactWrite:
    need = sum(t.nbytes for t in state.values())
    return ArtifactWrite(
        f"save: {target} cannot be written ({need / 1e6:.1f} MB): {error}",
        hint="Free space or choose another folder; what was there before is unchanged.",
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, tied names left to the module tree."""
    state: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[name] = tensor.detach().contiguous().cpu().clone()
    return state


def _manifest(model: nn.Module, handle: Handle, state: Mapping[str, Tensor]) -> dict[str, Any]:
    import structc

    return {
        "schema_version": SCHEMA,
        "structc": structc.__version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "runner": handle.runner,
        "state": {n: [list(t.shape), dtype_name(t.dtype)] for n, t in state.items()},
        "sites": [_site_data(s) for s in handle.sites.linear],
        "choices": {
            n: {"family": c.family, "hyper": dict(c.hyper)} for n, c in handle.plan.choices.items()
        },
        "replaced": sorted(handle.replaced),
        "regions": [d for r in handle.regions if (d := _region_data(r)) is not None],
        "kernels": list(handle.kernels),
        "chains": sorted(handle.chains),
        "filters": sorted(handle.filters),
        "attention": [_attention_data(s) for s in handle.sites.attention if s.kernel or s.by_head],
    }


def _attention_data(site: AttentionSite) -> dict[str, Any]:
    """Where an attention is, and what computes it; its parts are read from the graph again."""
    return {
        "name": site.name,
        "node": [site.node.region, site.node.node],
        "kernel": site.kernel,
        "by_head": site.by_head,
        "hooked": site.hooked,
    }


def _site_data(site: LinearSite) -> dict[str, Any]:
    data = asdict(site)
    data["dtype"] = dtype_name(site.dtype)
    data["tags"] = sorted(site.tags)
    data["nodes"] = [[n.region, n.node] for n in site.nodes]
    return data


def _region_data(region: Region) -> dict[str, Any] | None:
    """A region's guards; None where its inputs are of types that JSON cannot say."""
    try:
        spec = pytree.treespec_dumps(region.guards.spec)
    except (NotImplementedError, TypeError, ValueError):
        return None
    leaves: list[Any] = []
    example = pytree.tree_leaves((region.example.args, region.example.kwargs))
    for guard, value in zip(region.guards.leaves, example, strict=True):
        if isinstance(guard, DimGuard):
            leaves.append(
                {
                    "where": guard.where,
                    "dims": list(guard.dims),
                    "dtype": dtype_name(guard.dtype),
                    "device": guard.device,
                    "shape": list(value.shape),
                }
            )
        elif guard is None or isinstance(guard, (bool, int, float, str)):
            leaves.append({"value": guard})
        else:
            return None
    return {
        "path": region.path,
        "hash": region.hash,
        "spec": spec,
        "leaves": leaves,
        "ranges": {k: list(v) for k, v in region.guards.ranges.items()},
    }
