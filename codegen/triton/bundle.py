"""Bundles: kernels for one GPU, compiled where there is none, and found there without a compiler.

    bundle.json     target, versions, for each program, dtype and number of rows its plans, and
                    for each attention, and each launch of an attention method, its configs
    kernels/KEY/    what Triton's cache would hold: the binary and its metadata

A key is a hash over the source, Triton itself, the target and all options: a bundle that does not
fit is compiled anew, never run. Plans are data; nothing of a bundle is code that Python runs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import structc
from structc import attend, ops
from structc.codegen.triton import (
    aot,
    attention,
    bundle_attention,
    bundle_launch,
    bundle_methods,
    load,
    method_kernel,
    serve,
)
from structc.codegen.triton.aot import Compiled, Job
from structc.codegen.triton.attempt import Tuned
from structc.codegen.triton.bundle_launch import BuiltLaunch
from structc.codegen.triton.calls import AttentionCall, Call, TileCall
from structc.codegen.triton.config import checked
from structc.codegen.triton.device import running
from structc.codegen.triton.emit import emit
from structc.codegen.triton.entry import stage_jobs
from structc.codegen.triton.method_kernel import MethodCall
from structc.codegen.triton.plan import VARIANTS, Plan, plans, room
from structc.codegen.triton.serve import bucket_of
from structc.codegen.triton.targets import TARGETS, GpuTarget
from structc.codegen.triton.tile import DTYPES, analyse
from structc.errors import ConfigError
from structc.files import write_atomic
from structc.forms import Tile
from structc.records import Refusal

FORMAT = 3
LAUNCHES: Mapping[str, tuple[type, Any]] = {
    "attention": (AttentionCall, bundle_attention),
    "methods": (MethodCall, bundle_methods),
}
"""What else than programs a bundle holds, by its name in the manifest: the calls, and the module
that says what is compiled for one, how it is written down and read."""
MANIFEST, FOLDER = "bundle.json", "kernels"
MANY = 2
"""Plans of a program that are compiled: the first, and the one to hold it against."""
BATCH = 16
"""Jobs that one child process compiles: progress is seen."""
TRIED = 8
"""Plans that are compiled at most until so many fit the GPU."""
T = TypeVar("T")
_KEPT = (".json", ".cubin", ".hsaco")
_WORDS = {word: dtype for dtype, word in DTYPES.items()}


@dataclass(frozen=True)
class Built:
    """What became of one call.

    Attributes:
        call: the program and its rows.
        refusal: why there is no kernel, or ``""``.
        plans: as they stand in the manifest.
    """

    call: TileCall
    refusal: str
    plans: tuple[dict[str, Any], ...] = ()


def build(
    calls: Sequence[Call],
    target: GpuTarget,
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Built | BuiltLaunch]:
    """Compile the kernels of calls for a GPU into a new folder.

    Args:
        calls: of :func:`structc.codegen.triton.calls.recorded`.
        target: the GPU.
        folder: must not exist.
        progress: told how many calls are done.

    Errors: :class:`ConfigError` if the folder exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already", hint="Name a new folder for the bundle.")
    tiles = [c for c in calls if isinstance(c, TileCall)]
    buckets = dict.fromkeys((c.program, c.dtype, bucket_of(c.rows)) for c in tiles)
    with tempfile.TemporaryDirectory(dir=_parent(folder), prefix=".bundle-") as text:
        work = Path(text)
        (work / "out").mkdir()
        some = [_Open.of(TileCall(*key), target) for key in buckets]
        _compile(some, target, work / "cache", progress)
        found = [one.built() for one in some]
        launched = {
            name: bundle_launch.build(
                name, (kind.launch(c, target) for c in calls if isinstance(c, call)), target,
                work / "cache", progress,
            )
            for name, (call, kind) in LAUNCHES.items()
        }  # fmt: skip
        _keep(work / "cache", work / "out" / FOLDER)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "structc": structc.__version__,
            "triton": list(load.version() or ()),
            "target": target.name,
            "programs": [
                {"program": b.call.program, "dtype": DTYPES[b.call.dtype], "rows": b.call.rows,
                 "plans": list(b.plans)}
                for b in found if b.plans
            ],
        }  # fmt: skip
        for name, (_, kind) in LAUNCHES.items():
            manifest[name] = [kind.data(b) for b in launched[name] if b.configs]
        write_atomic(work / "out" / MANIFEST, json.dumps(manifest, indent=1).encode())
        (work / "out").rename(folder)
    return [*found, *(b for some in launched.values() for b in some)]


def use_bundle(path: str | Path, *, rerank: bool = False) -> int:
    """Take a bundle's kernels from here on; how many programs, attentions and kernels of methods.

    Its binaries are copied to Triton's cache, where calls find them.

    Args:
        path: what ``structc tune MODEL --target GPU -o PATH`` wrote.
        rerank: time the plans of a program on its first call here, and keep the fastest.

    Errors: :class:`ConfigError` if it is no bundle, is damaged, or is for another GPU.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    here = running()
    if isinstance(here, Refusal):
        raise ConfigError(f"{folder}: {here.reason}")
    if torch.cuda.is_available() and manifest["target"] != here.name:
        raise ConfigError(
            f"{folder} is for {manifest['target']}, this GPU counts as {here.name}",
            hint=f"structc tune MODEL --target {here.name} -o OUT",
        )
    tuned = dict(_programs(manifest, folder))
    launched = {
        name: dict(_read(folder, e, kind.parse, rerank) for e in manifest[name])
        for name, (_, kind) in LAUNCHES.items()
    }
    _install(folder / FOLDER)
    attention.TUNED.update(launched["attention"])
    attention.source_of.cache_clear()
    method_kernel.TUNED.update(launched["methods"])
    method_kernel.forget()
    for (program, dtype), found in tuned.items():
        own = {rows: Tuned(some, rerank) for rows, some in found.items()}
        serve.TUNED.setdefault((program, dtype), {}).update(own)
    ops.search_again()
    attend.forget()
    return len(tuned) + sum(map(len, launched.values()))


# ---------------------------------------------------------------------------- building


def _parent(folder: Path) -> Path:
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder.parent} is no folder to write {folder.name} to")
    return folder.absolute().parent


@dataclass
class _Open:
    """A call whose plans are being compiled."""

    call: TileCall
    ranked: list[Plan]
    refusal: str = ""
    tried: int = 0
    kept: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(call: TileCall, target: GpuTarget) -> _Open:
        program = analyse(Tile.parse(call.program), call.dtype)
        if isinstance(program, Refusal):
            return _Open(call, [], program.reason)
        none = room(program, call.rows, DTYPES[call.dtype], target)
        if none is not None:
            return _Open(call, [], none.reason)
        return _Open(call, plans(program, call.rows, DTYPES[call.dtype], target, many=3)[:TRIED])

    def next(self) -> list[Plan]:
        """The plans that may still become one of those kept."""
        some = self.ranked[self.tried : self.tried + MANY - len(self.kept)]
        self.tried += len(some)
        return some

    def take(self, plan: Plan, made: Sequence[Compiled], target: GpuTarget) -> None:
        """A plan that was compiled."""
        bad = [m.status for m in made if m.status != "ok"]
        bad += ["no room for it" for m in made if m.shared_bytes > target.shared]
        if bad:
            self.refusal = f"nothing compiles: {bad[0]}"
        else:
            self.kept.append(_plan_data(plan, made))

    def built(self) -> Built:
        return Built(self.call, "" if self.kept else self.refusal, tuple(self.kept))


def _compile(
    some: Sequence[_Open],
    target: GpuTarget,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> None:
    """Rounds of compilation until every call has its plans, or has no more to try."""
    while todo := [(one, plan) for one in some for plan in one.next()]:
        jobs = [_jobs(plan, one.call.dtype, target) for one, plan in todo]
        every = [job for group in jobs for job in group]
        made: list[Compiled] = []
        for start in range(0, len(every), BATCH):
            progress("kernels", start, len(every))
            made += aot.compiled(every[start : start + BATCH], cache=cache)
        progress("kernels", len(every), len(every))
        rest = iter(made)
        for (one, plan), group in zip(todo, jobs, strict=True):
            one.take(plan, [next(rest) for _ in group], target)


def _jobs(plan: Plan, dtype: torch.dtype, target: GpuTarget) -> list[Job]:
    word, path = DTYPES[dtype], str(load.write(emit(plan.program)))
    stages = enumerate(zip(plan.program.stages, plan.configs, strict=True))
    found = [stage_jobs(path, at, *both, word, target.name) for at, both in stages]
    return [job for some in found for _, _, job in some]


def _plan_data(plan: Plan, made: Sequence[Compiled]) -> dict[str, Any]:
    return {
        "variant": plan.variant,
        "configs": [asdict(config) for config in plan.configs],
        "predicted_us": 1e6 * plan.seconds,
        "shared_bytes": max(m.shared_bytes for m in made),
        "spilled_bytes": sum(m.spilled_bytes for m in made),
    }


def _keep(cache: Path, folder: Path) -> None:
    """Binaries and their metadata alone: nothing else is asked for when one is found."""
    folder.mkdir()
    for entry in sorted(cache.iterdir()) if cache.is_dir() else ():
        files = [f for f in entry.glob("*") if f.suffix in _KEPT and not f.name.startswith("__grp")]
        if any(f.suffix != ".json" for f in files):
            (folder / entry.name).mkdir()
            for file in files:
                shutil.copy2(file, folder / entry.name / file.name)


# ---------------------------------------------------------------------------- using


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        data = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is no bundle: it has no {MANIFEST}",
            hint="structc tune MODEL --target cuda:90 -o BUNDLE writes one.",
        ) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{folder / MANIFEST} cannot be read: {e}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise ConfigError(f"{folder} has format {found}, this version reads {FORMAT}")
    lists = all(isinstance(data.get(name), list) for name in ("programs", *LAUNCHES))
    if data.get("target") not in TARGETS or not lists:
        raise ConfigError(f"{folder / MANIFEST} is damaged: no target or no programs")
    return data


def _programs(
    manifest: Mapping[str, Any], folder: Path
) -> Iterator[tuple[tuple[str, torch.dtype], dict[int, tuple[Plan, ...]]]]:
    found: dict[tuple[str, torch.dtype], dict[int, tuple[Plan, ...]]] = {}
    for entry in manifest["programs"]:
        form, dtype, rows, some = _read(folder, entry, _tile)
        found.setdefault((str(form), dtype), {})[bucket_of(rows)] = some
    yield from found.items()


def _read(folder: Path, entry: Any, take: Callable[..., T], *more: object) -> T:
    """What ``take`` makes of an entry of the manifest.

    Errors: :class:`ConfigError` for whatever a changed file holds.
    """
    try:
        return take(entry, *more)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"{folder / MANIFEST} is damaged: {type(e).__name__}: {e} in {str(entry)[:80]}"
        ) from None


def _tile(entry: Mapping[str, Any]) -> tuple[Tile, torch.dtype, int, tuple[Plan, ...]]:
    form, dtype = Tile.parse(entry["program"]), _WORDS[entry["dtype"]]
    some = tuple(_plan(data, form, dtype) for data in entry["plans"])
    return form, dtype, int(entry["rows"]), some


def _plan(data: Mapping[str, Any], form: Tile, dtype: torch.dtype) -> Plan:
    program = analyse(form, dtype)
    if isinstance(program, Refusal):
        raise ValueError(program.reason)
    changed = VARIANTS[data["variant"]](program)
    configs = tuple(checked(c) for c in data["configs"])
    if len(configs) != len(changed.stages):
        raise ValueError(f"{len(configs)} configs for {len(changed.stages)} stages")
    return Plan(data["variant"], changed, configs, float(data["predicted_us"]) / 1e6)


def _install(folder: Path) -> None:
    """Copy what Triton's cache lacks, with the list of files that it looks for."""
    import triton

    cache = Path(triton.knobs.cache.dir)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = [f for f in entry.glob("*") if f.suffix in _KEPT]
        meta = next((f.name for f in files if f.suffix == ".json"), None)
        if meta is None or (cache / entry.name / f"__grp__{meta}").exists():
            continue
        (cache / entry.name).mkdir(parents=True, exist_ok=True)
        for file in files:
            write_atomic(cache / entry.name / file.name, file.read_bytes())
        group = {"child_paths": {f.name: str(cache / entry.name / f.name) for f in files}}
        write_atomic(cache / entry.name / f"__grp__{meta}", json.dumps(group).encode())
