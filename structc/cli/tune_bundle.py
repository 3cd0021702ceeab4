"""``structc tune MODEL --target GPU -o BUNDLE``: kernels compiled without that GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from structc.cli.bench_triton import dtype_of, needed_triton
from structc.cli.session import Answer
from structc.cli.timed import example_of
from structc.errors import ConfigError
from structc.progress import named, progress_bars
from structc.sources.source import TextOptions


def bundle_answer(
    model: str,
    artifact: Path | None,
    target: str,
    out: Path | None,
    text: TextOptions,
    *,
    dtype: str | None,
    trust: bool,
    no_progress: bool,
) -> Answer:
    """The answer: what became of each program that the compiled model calls."""

    from structc.codegen.triton import bundle
    from structc.codegen.triton.calls import recorded
    from structc.codegen.triton.targets import target_of

    gpu = target_of(target)
    if out is None:
        raise ConfigError("tune --target writes a bundle", hint="Say where: -o BUNDLE.")
    own = None if dtype is None else dtype_of(dtype, "float32, float16 or bfloat16")
    needed_triton()
    with progress_bars(wanted=not no_progress) as progress:
        fast, example = _compiled(model, artifact, text, trust=trust)
        args, kwargs = example.args, example.kwargs
        calls = recorded(lambda: fast(*args, **kwargs))
        if not calls:
            raise ConfigError(
                f"{model} calls no structc operator that kernels are emitted for",
                hint="Convert it first with a budget, then name the result: --artifact OUT. Plain "
                "dense products are left to the vendor's library.",
            )
        if own is not None:
            calls = tuple(replace(c, dtype=own) for c in calls)
        found = bundle.build(calls, gpu, out, progress=named(progress, "bundle"))
    data = {"bundle": str(out), "target": gpu.name, "gpu": gpu.gpu, **_rows(found)}
    return Answer(data, "\n".join(_lines(data)))


def _compiled(model: str, artifact: Path | None, text: TextOptions, *, trust: bool) -> Any:
    """The model as it will run, and its example call."""
    import torch

    import structc
    from structc.sources import load_source

    source = load_source(model, text, trust=trust)
    source.model.eval()
    example = example_of(source)
    if artifact is not None:
        return structc.load(artifact, source.model), example
    with torch.no_grad():
        return structc.compile(source.model, source.example_inputs, effort="none"), example


def _rows(found: Any) -> dict[str, list[dict[str, Any]]]:
    from structc.codegen.triton.calls import AttentionCall
    from structc.codegen.triton.method_kernel import MethodCall

    rows: dict[str, list[dict[str, Any]]] = {"programs": [], "attention": [], "methods": []}
    for one in found:
        told = {"dtype": str(one.call.dtype).removeprefix("torch."), "refusal": one.refusal}
        if isinstance(one.call, AttentionCall):
            configs = [str(c) for c in one.configs]
            told |= {"queries": one.call.queries, "keys": one.call.keys, "configs": configs}
            rows["attention"].append({"form": str(one.call.shape.form), **told})
        elif isinstance(one.call, MethodCall):
            sizes = ", ".join(f"{name} {int(size)}" for name, size in one.call.sizes)
            told |= {"sizes": sizes, "configs": [str(c) for c in one.configs]}
            rows["methods"].append({"kernel": one.call.kernel.name, **told})
        else:
            told |= {"rows": one.call.rows, "plans": list(one.plans)}
            rows["programs"].append({"program": one.call.program, **told})
    return rows


def _lines(data: dict[str, Any]) -> list[str]:
    rows = data["programs"]
    kept = [r for r in rows if r["plans"]]
    seen = [r for r in data["attention"] if r["configs"]]
    methods = [r for r in data["methods"] if r["configs"]]
    counts = ((kept, "programs"), (seen, "attentions"), (methods, "launches of attention methods"))
    what = " and ".join(f"{len(some)} {name}" for some, name in counts if some or some is kept)
    lines = [
        f"{data['bundle']}: kernels of {what} for {data['target']} ({data['gpu']}), compiled; "
        "nothing was timed.",
        "model us: what a cost model predicts of the first plan, and of the one to hold it "
        "against.",
        "",
        f"{'rows':>6} {'dtype':<8} {'model us':>16}  program",
    ]
    for row in rows:
        told = " ".join(f"{p['predicted_us']:.1f}" for p in row["plans"]) or "none"
        lines.append(f"{row['rows']:>6} {row['dtype']:<8} {told:>16}  {row['program'][:100]}")
        if row["refusal"]:
            lines.append(f"{'':>33}{row['refusal']}")
    if data["attention"]:
        lines += ["", f"{'queries':>7} {'keys':>6} {'dtype':<8}  attention, its first config"]
    for row in data["attention"]:
        told = row["configs"][0] if row["configs"] else row["refusal"]
        sizes = f"{row['queries']:>7} {row['keys']:>6} {row['dtype']:<8}"
        lines.append(f"{sizes}  {row['form']}, {told}")
    if data["methods"]:
        lines += ["", f"{'dtype':<8}  kernels of attention methods, the first config of each"]
    for row in data["methods"]:
        told = row["configs"][0] if row["configs"] else row["refusal"]
        lines.append(f"{row['dtype']:<8}  {row['kernel']} ({row['sizes']}), {told}")
    lines += ["", "On that GPU:", f"    structc.use_bundle({data['bundle']!r})"]
    return lines
