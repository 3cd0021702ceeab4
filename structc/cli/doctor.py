"""``structc doctor``: what of the environment structc can use, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

import structc
from structc import settings
from structc.cli import flags
from structc.cli.session import Answer, command
from structc.errors import StructcError

OK, WARNING, BROKEN = "ok", "warning", "broken"
NEEDED = (
    "torch",
    "numpy",
    "scipy",
    "networkx",
    "safetensors",
    "jinja2",
    "filelock",
    "platformdirs",
)
LEAST_TORCH = (2, 10)
SELF_TEST_S = 120.0


@dataclass(frozen=True)
class Line:
    """One finding: ``ok``, ``warning`` with what to do, or ``broken``."""

    name: str
    status: str
    text: str
    todo: str = ""


class Broken(StructcError):
    """Something that structc needs does not work."""

    code = "DOCTOR"


MaybeModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Also say where this model fails to export.", show_default=False
    ),
]


@command
def doctor(
    model: MaybeModel = None,
    calib: flags.Calib = None,
    seqlen: flags.Seqlen = None,
    nsamples: flags.Samples = None,
    batch_size: flags.BatchSize = None,
    trust: flags.Trust = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Check the environment, and with MODEL what of it can be exported.

    Really builds a kernel and tests it. Exits with 1 if something that structc needs is broken;
    what is merely missing is a warning, and says what is lost and what to do.

    \b
    Examples:
      structc doctor
      structc doctor model.py:make
    """
    lines = list(_packages())
    if not any(line.status == BROKEN for line in lines):
        for check in (_machine, _kernels, _cache, _database, _extras):
            lines += check()
        if model is not None:
            from structc.cli.doctor_model import examine

            text = flags.text_options(calib, seqlen, nsamples, batch_size)
            lines += examine(model, text, trust=trust)
    bad = [line.name for line in lines if line.status == BROKEN]
    error = Broken(f"{', '.join(bad)}: structc does not work here") if bad else None
    return Answer(
        {"checks": [asdict(line) for line in lines], "ok": not bad}, _shown(lines), error=error
    )


def _shown(lines: list[Line]) -> str:
    out = []
    for line in lines:
        out.append(f"{line.status:<8} {line.name:<16} {line.text}")
        if line.todo:
            out.append(f"{'':<25} -> {line.todo}")
    return "\n".join(out)


# ---------------------------------------------------------------------------- the environment


def _packages() -> Iterator[Line]:
    """Python and the packages that structc cannot do without."""
    machine = f"{platform.machine()}, {platform.system()}"
    yield Line("python", OK, f"{platform.python_version()} ({machine})")
    for name in NEEDED:
        try:
            found = metadata.version(name)
            importlib.import_module(name)
        except Exception as e:  # a broken binary raises ImportError, OSError and worse
            yield Line(name, BROKEN, f"{type(e).__name__}: {e}", f"pip install {name}")
            continue
        if name == "torch":
            yield _torch(found)


def _torch(version: str) -> Line:
    numbers = tuple(int(n) if n.isdecimal() else 0 for n in version.split(".")[:2])
    if numbers < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        return Line(
            "torch", BROKEN, f"{version}, at least {least}", f"pip install 'torch>={least}'"
        )
    return Line("torch", OK, version)


def _machine() -> Iterator[Line]:
    from structc.hardware import target

    here = target()
    if here.isa:
        yield Line("cpu", OK, f"{here.cpu}; {', '.join(here.isa)}")
    else:
        text = f"{here.cpu}; no vector instructions that structc knows"
        yield Line("cpu", WARNING, text, "Emitted kernels will be slow; dense ones stay.")
    quota = _cpu_quota()
    text = f"{here.threads} of {here.cores} logical processors"
    if quota is not None and here.threads > max(1.0, quota):
        yield Line(
            "threads",
            WARNING,
            f"{text}, but this container may use {quota:g}",
            f"Set OMP_NUM_THREADS={max(1, int(quota))}: threads that wait for each other are slow.",
        )
    elif here.threads > here.cores:
        todo = f"Set OMP_NUM_THREADS={here.cores}."
        yield Line("threads", WARNING, f"{text}: more threads than processors", todo)
    else:
        yield Line("threads", OK, text)


def _cpu_quota() -> float | None:
    """Processors that the control group allows, if it limits them."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _kernels() -> Iterator[Line]:
    from structc.codegen.cpu import build
    from structc.records import Refusal

    now = settings.current()
    if not now.native:
        yield Line(
            "compiler",
            WARNING,
            "not asked: emitted kernels are turned off (STRUCTC_NATIVE=0)",
            "Unset STRUCTC_NATIVE: without emitted kernels few layers get faster.",
        )
        return
    version = build.compiler_version(now.compiler)
    if isinstance(version, Refusal):
        yield Line(
            "compiler",
            WARNING,
            version.reason,
            "Install g++ or clang++, or set STRUCTC_CXX; without it few layers get faster.",
        )
        return
    yield Line("compiler", OK, f"{now.compiler}: {version}")
    found = _self_test()
    if isinstance(found, str):
        todo = "Run with -v, and report it; meanwhile STRUCTC_NATIVE=0 keeps such kernels out."
        yield Line("emitted kernel", WARNING, found, todo)
        return
    if found["tile"]:
        todo = "Try another compiler (STRUCTC_CXX); until then references run instead."
        yield Line("emitted kernel", WARNING, str(found["tile"]), todo)
    else:
        text = f"built, loaded and correct in {found['seconds']:.1f} s"
        yield Line("emitted kernel", OK, text)
    if found["onednn"]:
        todo = "Dense layers run by plain PyTorch; use a build of torch with oneDNN."
        yield Line("oneDNN", WARNING, str(found["onednn"]), todo)
    else:
        yield Line("oneDNN", OK, "packed products work")


def _self_test() -> dict[str, float | str] | str:
    """What the self-test says, or how it died. It builds anew, in a cache folder of its own."""
    own = str(Path(structc.__file__).parent.parent)  # a checkout that is not installed works too
    path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="structc-doctor-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "structc.cli.selftest"],
                env={**os.environ, "STRUCTC_CACHE_DIR": folder, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SELF_TEST_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"the self-test did not finish in {SELF_TEST_S:.0f} s"
        except OSError as e:
            return f"the self-test cannot be started: {e}"
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        return f"the self-test died ({done.returncode}): {last}"
    return dict(found)


# ---------------------------------------------------------------------------- caches and extras


def _cache() -> Iterator[Line]:
    folder = settings.current().cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            yield Line("cache", OK, str(folder))
    except OSError as e:
        text = f"{folder} is not writable: {e.strerror or e}"
        todo = "Set STRUCTC_CACHE_DIR; until then kernels are built and timed again each time."
        yield Line("cache", WARNING, text, todo)


def _database() -> Iterator[Line]:
    from structc.codegen.tuning_db import TuningDb
    from structc.hardware import target

    database = TuningDb()
    if not database.path.exists():
        yield Line("tuning database", OK, "empty: the first conversion fills it")
        return
    rows = database.list()
    here = target()
    fitting = sum(key.get("cpu") == here.cpu and key.get("torch") == here.torch for key, _ in rows)
    if database.path.exists():
        text = f"{len(rows)} rows, {fitting} of this processor and torch"
        yield Line("tuning database", OK, text)
    else:
        text = "it was damaged, and is moved aside"
        yield Line("tuning database", WARNING, text, "Nothing: prices are measured again.")


def _extras() -> Iterator[Line]:
    lost: tuple[tuple[str, str, str, Callable[[], bool]], ...] = (
        ("transformers", "hf", "Hugging Face folders", lambda: True),
        ("triton", "triton", "kernels for GPUs", _has_gpu),
    )
    for name, extra, what, matters in lost:
        if importlib.util.find_spec(name) is not None:
            yield Line(name, OK, metadata.version(name))
            continue
        status = WARNING if matters() else OK
        todo = f"pip install 'structc[{extra}]'" if status == WARNING else ""
        yield Line(name, status, f"not installed: needed for {what} alone", todo)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
