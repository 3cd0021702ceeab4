"""Reading an artifact: everything is checked before anything is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
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
from structc.attention.by_head import groups_of
from structc.attention_records import PER_HEAD, AttentionSite
from structc.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactVersion, InternalError
from structc.families import BY_NAME
from structc.forms import Tile
from structc.records import Choice, DimGuard, Guards, LinearSite, NodeRef, Plan, Sites, Window
from structc.report import Report

MOST_BYTES = 64 * 1024 * 1024
"""A larger manifest is not one of ours."""
MOST_ELEMENTS = 2**28
"""An example input that is larger is not made again."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], Report]:
    """The checked parts of an artifact: manifest, state and report.

    Errors: :class:`ArtifactCorrupt` naming the file that is missing, altered or not what it says;
        :class:`ArtifactVersion` for a newer schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    manifest = _read_manifest(folder)
    for name, digest in manifest["sha256"].items():
        if name not in (WEIGHTS, REPORT_JSON, REPORT_HTML):
            raise _corrupt(folder / MANIFEST, f"it lists an unknown file {name!r}")
        file = folder / name
        if not file.is_file():
            raise _corrupt(file, "it is missing")
        if sha256(file) != digest:
            raise _corrupt(file, "its sha256 is not the recorded one: truncated or altered")
    if set(manifest["sha256"]) != {WEIGHTS, REPORT_JSON, REPORT_HTML}:
        raise _corrupt(folder / MANIFEST, "its list of files is incomplete")
    _check_sizes(folder, manifest)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as e:
        raise _corrupt(folder / WEIGHTS, str(e)) from None
    wanted = {n: (tuple(s), d) for n, (s, d) in manifest["state"].items()}
    found = {n: (tuple(t.shape), dtype_name(t.dtype)) for n, t in state.items()}
    if wanted != found:
        raise _corrupt(folder / WEIGHTS, "its tensors are not those that the manifest lists")
    report = Report.from_dict(_json(folder / REPORT_JSON))
    return manifest, state, report


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not folder.is_dir() or not file.is_file():
        raise ArtifactCorrupt(
            f"{folder} is no structc artifact: {MANIFEST} is missing",
            hint="Give the folder that model.save(path) or `structc convert -o` wrote.",
        )
    data = _json(file)
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _corrupt(file, "it has no schema_version")
    if version > SCHEMA:
        raise ArtifactVersion(
            f"{file} has schema {version}, this structc reads up to {SCHEMA}",
            hint="Update structc: pip install -U structc.",
        )
    kinds = {
        "state": dict,
        "sites": list,
        "choices": dict,
        "replaced": list,
        "regions": list,
        "kernels": list,
        "chains": list,
        "sha256": dict,
        "runner": str,
        "model": str,
    }
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise _corrupt(file, f"{key!r} is missing or not a {kind.__name__}")
    if data["runner"] not in ("graph", "inductor", "modules"):
        raise _corrupt(file, f"it names no way to run: {data['runner'][:40]!r}")
    return data


def _json(file: Path) -> dict[str, Any]:
    def refuse(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    try:
        if file.stat().st_size > MOST_BYTES:
            raise _corrupt(file, f"it has {file.stat().st_size} bytes, far too many")
        data = json.loads(file.read_text(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as e:
        raise _corrupt(file, f"it cannot be read: {e}") from None
    if not isinstance(data, dict):
        raise _corrupt(file, "it is no JSON object")
    return data


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The tensors that the manifest promises must fit into the file, before any is allocated."""
    total = 0
    for name, entry in manifest["state"].items():
        shape, dtype = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(shape, list) or not isinstance(kind, torch.dtype):
            raise _corrupt(folder / MANIFEST, f"state {name!r} has no shape and dtype")
        count = 1
        for size in shape:
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise _corrupt(folder / MANIFEST, f"state {name!r} has a size of {size!r}")
            count *= size
        total += count * kind.itemsize
    if total > (folder / WEIGHTS).stat().st_size:
        raise _corrupt(folder / WEIGHTS, f"the manifest promises {total} bytes, it has fewer")


def _corrupt(file: Path, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"artifact: {file}: {what}", hint="Convert the model again, or fetch the artifact again."
    )


# ---------------------------------------------------------------------------- records again


def sites_from(manifest: Mapping[str, Any], where: Path) -> tuple[Sites, Plan]:
    """The sites and the plan of a manifest."""
    try:
        sites = tuple(_site_from(d) for d in manifest["sites"])
        attention = tuple(_attention_from(d) for d in manifest.get("attention", []))
        choices = {}
        attended = {s.name for s in attention}
        for name, choice in manifest["choices"].items():
            if choice["family"] not in BY_NAME and (name, choice["family"]) not in {
                (a, PER_HEAD) for a in attended
            }:
                raise ValueError(f"unknown family {choice['family']!r}")
            items = choice["hyper"].items()
            hyper = {str(k): v if isinstance(v, str) else _natural(v) for k, v in items}
            choices[name] = Choice(choice["family"], hyper)
        held = sum(math.prod(shape) for shape, _ in manifest["state"].values())
        for site in sites:
            _check_choice(site, choices[site.name], held)
        if unknown := set(map(str, manifest["replaced"])) - set(choices):
            raise ValueError(f"{unknown.pop()!r} is replaced and no site")
    except (KeyError, TypeError, ValueError, AttributeError, InternalError) as e:
        raise _corrupt(where / MANIFEST, f"a site or choice is broken: {e}") from None
    return Sites(sites, attention, ()), Plan(choices)


def _check_choice(site: LinearSite, choice: Choice, held: int) -> None:
    """A choice must be one that the family could make, of no more elements than the file holds."""
    family, hyper = BY_NAME[choice.family], choice.hyper
    if set(hyper) != set(family.hyper_names()) or 0 in hyper.values():
        raise ValueError(f"{site.name}: {choice.family} is not made of {dict(hyper)}")
    n, m = site.in_features, site.out_features
    form = family.form_of(n, m, hyper, bias=False, activation="")
    if (form.in_features, form.out_features) != (n, m) or form.params > held:
        raise ValueError(f"{site.name}: {form} is not a {m} x {n} matrix of the file's size")
    steps = form.steps if isinstance(form, Tile) else ()
    if any(s.out_features > max(held, m, n) for s in steps):
        raise ValueError(f"{site.name}: {form} has more features than the file has numbers")


def _site_from(data: Mapping[str, Any]) -> LinearSite:
    dtype = getattr(torch, str(data["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {data['dtype']!r}")
    text = {k: str(data[k]) for k in ("name", "module", "weight", "activation", "group")}
    return LinearSite(
        **text,
        bias=None if data["bias"] is None else str(data["bias"]),
        in_features=_natural(data["in_features"]),
        out_features=_natural(data["out_features"]),
        transposed=bool(data["transposed"]),
        nodes=tuple(NodeRef(str(r), str(n)) for r, n in data["nodes"]),
        rows=_natural(data["rows"]),
        dtype=dtype,
        tags=frozenset(map(str, data["tags"])),
        window=None if data.get("window") is None else _window_from(data["window"]),
    )


def _attention_from(data: Mapping[str, Any]) -> AttentionSite:
    """Where it is and what computes it; the rest is read from the graph."""
    region, node = map(str, data["node"])
    if data["kernel"] not in ("", "structc", "torch"):
        raise ValueError(f"unknown attention kernel {data['kernel']!r}")
    site = AttentionSite(str(data["name"]), NodeRef(region, node), "", "", None, 0, 0, 0, 0)
    groups = str(data.get("by_head", ""))
    if groups:
        groups_of(groups)  # an InternalError if it is none
    hooked = bool(data.get("hooked", False))
    return replace(site, kernel=data["kernel"], by_head=groups, hooked=hooked)


def _window_from(data: Mapping[str, Any]) -> Window:
    kernel, stride, padding = (
        tuple(_natural(v) for v in data[k]) for k in ("kernel", "stride", "padding")
    )
    if not 1 <= len(kernel) == len(stride) == len(padding) <= 2 or 0 in (*kernel, *stride):
        raise ValueError(f"{dict(data)} is no window")
    return Window(kernel, stride, padding)


def guards_from(data: Mapping[str, Any], where: Path) -> tuple[str, str, Guards, list[Any]]:
    """Path, hash, guards and example leaves of one region.

    The tree of inputs may be made of tuples, lists and dicts alone: no other type is looked up.
    """
    try:
        if not _only_containers(json.loads(data["spec"])):
            raise ValueError("its inputs are of unknown types")
        spec = pytree.treespec_loads(data["spec"])
        guards: list[Any] = []
        example: list[Any] = []
        for leaf in data["leaves"]:
            if "value" in leaf:
                guards.append(leaf["value"])
                example.append(leaf["value"])
                continue
            dtype = getattr(torch, str(leaf["dtype"]))
            dims = tuple(d if isinstance(d, str) else _natural(d) for d in leaf["dims"])
            guards.append(DimGuard(str(leaf["where"]), dims, dtype, str(leaf["device"])))
            shape = [_natural(s) for s in leaf["shape"]]
            if math.prod(shape) > MOST_ELEMENTS:
                raise ValueError(f"an example input of {shape}")
            example.append(torch.zeros(shape, dtype=dtype))
        ranges = {str(k): (_natural(a), _natural(b)) for k, (a, b) in data["ranges"].items()}
        return str(data["path"]), str(data["hash"]), Guards(spec, tuple(guards), ranges), example
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as e:
        raise _corrupt(where / MANIFEST, f"a region is broken: {e}") from None


def _only_containers(spec: Any) -> bool:
    """Whether a serialised tree spec names no types but plain containers."""
    if isinstance(spec, list):
        return all(map(_only_containers, spec))
    if isinstance(spec, dict):
        kind = spec.get("type")
        plain = (
            None,
            "builtins.tuple",
            "builtins.list",
            "builtins.dict",
            "torch.utils._pytree.LeafSpec",
        )
        return kind in plain and all(map(_only_containers, spec.values()))
    return True


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise ValueError(f"{value!r} is no size")
    return value


def _same_window(model: nn.Module, site: LinearSite) -> bool:
    """Whether the model has this convolution where the artifact rewrote one."""
    conv = dict(model.named_modules()).get(site.module)
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or site.window is None:
        return False
    window, padding = site.window, conv.padding
    same = not isinstance(padding, str) and tuple(padding) == window.padding
    return same and (tuple(conv.kernel_size), tuple(conv.stride)) == (window.kernel, window.stride)


def check_same_model(model: nn.Module, sites: Sites, manifest: Mapping[str, Any]) -> None:
    """The model must have every weight that the artifact rewrote, in its shape, and all others.

    Errors: :class:`ArtifactMismatch`, with the first differences.
    """
    own = {n: tuple(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}
    every = {n: tuple(t.shape) for n, t in model.named_parameters(remove_duplicate=False)}
    saved = {n: tuple(s) for n, (s, _) in manifest["state"].items()}
    replaced = set(manifest["replaced"])
    wrong: list[str] = []
    gone = set()
    for site in sites.linear:
        if site.name not in replaced:
            continue
        shape = (site.out_features, site.in_features)
        want = shape[::-1] if site.transposed else shape
        have = every.get(site.weight)
        if site.window is not None:
            if not _same_window(model, site):
                wrong.append(f"{site.module} is no convolution of {site.window}")
                continue
            assert have is not None
            have = (have[0], math.prod(have[1:]))
        if have is None:
            wrong.append(f"{site.weight} is missing")
        elif have != want:
            wrong.append(f"{site.weight} is {every.get(site.weight)}, the artifact has {want}")
        if site.bias is not None and site.bias not in every:
            wrong.append(f"{site.bias} is missing")
        if site.window is not None:
            gone |= {n for n in (site.weight, site.bias) if n is not None}
        elif site.module:
            gone.add(site.weight)
        else:  # factors have taken the place of the tensors that the module held itself
            gone |= {n for n in (site.weight, site.bias) if n is not None and n not in saved}
    for name, have in own.items():
        if name not in gone and name not in saved:
            wrong.append(f"{name} is not in the artifact")
        elif name in saved and name not in gone and saved[name] != have:
            wrong.append(f"{name} is {have}, the artifact has {saved[name]}")
    if wrong:
        raise ArtifactMismatch(
            f"load: the artifact was made for another model ({manifest['model']}): "
            + "; ".join(wrong[:3])
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            hint="Give load() a model of the class and configuration that was compiled.",
        )
