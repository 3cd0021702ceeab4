"""``structc bench triton``: what Triton's kernels take of each GPU, compiled without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structc.cli.session import Answer, note
from structc.errors import ConfigError
from structc.progress import named, progress_bars

if TYPE_CHECKING:
    import torch


def needed_triton() -> tuple[int, int]:
    """The version of Triton, with a note where nobody tested it.

    Errors: :class:`ConfigError` if there is none.
    """
    from structc.codegen.triton import load

    version = load.version()
    if version is None:
        raise ConfigError(
            "kernels for GPUs are compiled with Triton, which is not installed",
            hint="pip install triton; no GPU is needed.",
        )
    if told := load.untested():
        note(told)
    return version


def dtype_of(name: str, choice: str) -> torch.dtype:
    """What ``--dtype`` names.

    Errors: :class:`ConfigError` with the choice there is.
    """
    from structc.codegen.triton.tile import DTYPES

    known = {str(d).removeprefix("torch."): d for d in DTYPES}
    if name not in known:
        raise ConfigError(f"--dtype must be {choice}, got {name!r}")
    return known[name]


def triton_table(dtype: str, *, every: bool, no_progress: bool) -> Answer:
    """The answer: a row for each kernel and target; nothing is timed."""
    from structc.codegen.triton.table import table, wanted
    from structc.codegen.triton.targets import TARGETS

    names = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    dtypes = [dtype_of(name, "float32, float16, bfloat16 or both") for name in names]
    version = needed_triton()
    with progress_bars(wanted=not no_progress) as progress:
        rows = table(
            wanted(dtypes, list(TARGETS), every=every), progress=named(progress, "kernels")
        )
    text = ".".join(map(str, version))
    head = f"Triton {text}, compiled ahead of time: resources of a program. Nothing is timed;\n"
    head += "model us: what a cost model predicts, for 4096 rows where the case names no others."
    return Answer(rows, "\n".join([head, "", *_lines(rows)]))


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    wide = max(len(r["case"]) for r in rows)
    head = (
        f"{'case':<{wide}} {'kernel':<10} {'dtype':<5} {'target':<10} {'config':<41} {'shared':>7} "
        f"{'regs':>5} {'spills':>6} {'matrix':>6} {'wide':>5} {'model us':>8}"
    )
    return [head, *(_line(r, wide) for r in rows)]


def _line(r: Mapping[str, Any], wide: int) -> str:
    start = (
        f"{r['case']:<{wide}} {r['kernel']:<10} {r['dtype']:<5} {r['target']:<10} {r['config']:<41}"
    )
    if r["status"] != "ok":
        return f"{start} {r['status']}"
    predicted = "" if r["predicted_us"] is None else f"{r['predicted_us']:.1f}"
    return (
        f"{start} {r['shared_bytes']:>7} {r['registers']:>5} {r['spilled_bytes']:>6} "
        f"{r['matrix_instructions']:>6} {r['wide_loads']:>5} {predicted:>8}"
    )
