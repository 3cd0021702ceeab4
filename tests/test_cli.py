"""The command line: exit codes, what goes to which stream, what is written and what never is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from structc.cli import app
from structc.cli.convert import read_config
from structc.errors import ConfigError

FIXTURE = """
import torch
from torch import nn
print("noise at import")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x):
        print("noise in forward")
        return self.down(torch.nn.functional.gelu(self.up(x)))

def make():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(16, 64), [torch.randn(16, 64) for _ in range(7)]

def other():
    return nn.Linear(3, 3), torch.randn(1, 3)

def altered():
    model, *rest = make()
    with torch.no_grad():
        model.down.weight.mul_(-1)
    return model, *rest

def accurate():
    return *make(), lambda model: 1.0

def broken():
    raise RuntimeError("\\x1b[31mfirst\\nsecond")

def hostile():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("[red]\\x1b]0;title\\x07layer", nn.Linear(64, 64))
        def forward(self, x):
            return self._modules["[red]\\x1b]0;title\\x07layer"](x)
    return Odd().eval(), torch.randn(8, 64)

def deep():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(4)]
    return nn.Sequential(*layers).eval(), torch.randn(8, 128), [torch.randn(8, 128)] * 6
"""
FAST = ("--effort", "none")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("STRUCTC_LOG", "STRUCTC_NATIVE", "STRUCTC_CXX", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FIXTURE)
    return "net.py:make"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "structc", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a test run in the background of a script has Ctrl-C turned off, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One conversion that several tests read."""
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "net.py").write_text(FIXTURE)
    out = folder / "out"
    done = run("convert", f"{folder}/net.py:make", "-o", str(out), "--budget", "error=0.6", *FAST)
    assert done.exit_code == 0, done.stderr
    return out


# ---------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "name",
    ["", "inspect", "convert", "verify", "report", "bench", "tune", "cache verify", "doctor"],
    ids=lambda n: n or "-",
)
def test_help(name: str, golden: Callable[[str, str], None]) -> None:
    done = run(*name.split(), "--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert done.exit_code == 0 and "Examples:" in text and f"structc {name}" in text
    if metadata.version("typer") == "0.29.2":  # others lay tables out in another way
        text = "\n".join(line.rstrip() for line in text.splitlines())
        file = "_".join(name.split()) or "structc"
        golden(f"cli/help_{file}.txt", text + "\n")


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys\nfrom structc.cli import app\n"
        "for a in (['--help'], ['--version'], ['convert', '--help']):\n"
        "    try: app(a)\n    except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "structc 0." in done.stdout


@pytest.mark.parametrize(
    "args",
    [["nothing"], ["convert"], ["convert", "m.py:f"], ["inspect", "m", "--seqlen", "0"], ["bench"]],
)
def test_usage_errors(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2 and not done.stdout


# ---------------------------------------------------------------------------- inspect, dry run


def test_inspect(model: str) -> None:
    done = run("inspect", model)
    assert done.exit_code == 0 and "what could change" in done.stdout and "Net" in done.stdout
    assert "noise" not in done.stdout and "noise in forward" in done.stderr


def test_inspect_json_is_pure(model: str) -> None:
    done = run("inspect", model, "--json", "-v")
    assert json.loads(done.stdout)["kind"] == "inspect"


def test_a_dry_run_writes_nothing(model: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    args = ["convert", model, "-o", "deep/out", "--dry-run", "--budget", "error=0.5", *FAST]
    done = run(*args)
    assert done.exit_code == 0 and "nothing was written" in done.stdout
    data = json.loads(run(*args, "--json").stdout)
    assert data["dry_run"]["weights_bytes_at_most"] > 0 and data["report"]["kind"] == "inspect"
    after = [p for p in sorted(tmp_path.iterdir()) if p.name not in ("__pycache__", "cache")]
    assert after == before
    Path("config.json").write_text('{"upp": "low_rank"}')
    done = run(*args, "--config", "config.json")
    assert done.exit_code == 2 and "Did you mean 'up'" in done.stderr


# ---------------------------------------------------------------------------- convert


def test_convert_json_and_overwrite(model: str, tmp_path: Path) -> None:
    args = ["convert", model, "-o", "out", "--budget", "error=0.6", *FAST]
    done = run(*args, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(Path("out/report.json").read_text())
    assert not Path("out.structc-work").exists()
    before = Path("out/structc.json").read_text()
    started = time.monotonic()
    again = run("convert", "does-not-matter.py:f", "-o", "out")
    assert again.exit_code == 2 and "--overwrite" in again.stderr and not again.stdout
    assert time.monotonic() - started < 30 and Path("out/structc.json").read_text() == before
    assert run(*args, "--overwrite").exit_code == 0


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--dry-run"]])
def test_only_artifacts_are_replaced(model: str, flags: list[str]) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("x")
    done = run("convert", model, "-o", "out", *FAST, *flags)
    assert done.exit_code == 2 and "other things" in done.stderr
    assert [p.name for p in Path("out").iterdir()] == ["thesis.txt"]


def test_odd_places_for_out(model: str) -> None:
    Path("file").write_text("x")
    Path("link").symlink_to("nowhere")
    Path("busy.structc-work").mkdir()
    Path("busy.structc-work/mine.txt").write_text("x")
    for out, says in (
        ("file", "is a file"),
        ("link", "is a link"),
        ("file/out", "cannot be"),
        ("busy", "in the way"),
        (".", "other things"),
        ("/", "other things"),
        ("x" * 300, "cannot be used"),
    ):
        done = run("convert", model, "-o", out, "--no-resume", *FAST)
        assert done.exit_code == 2, (out, done.stderr)
        assert says in done.stderr.replace("not a folder that can be", "cannot be"), done.stderr
    assert Path("busy.structc-work/mine.txt").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--budget", "max_drop"], "cannot read"),
        (["--budget", "error=-1"], "expected a share"),
        (["--budget", "error=0.1,max_drop=1%"], "two currencies"),
        (["--effort", "huge"], "effort must be one of"),
        (["--ignore", "re:("], "not a regular expression"),
        (["--ignore", "uq"], "matches none"),
        (["--config", "none.json"], "cannot be read"),
        (["--calib", "a.txt"], "folders only"),
    ],
)
def test_options_that_make_no_sense(model: str, args: list[str], says: str) -> None:
    done = run("convert", model, "-o", "out", "--effort", "none", *args)
    assert done.exit_code == 2 and says in done.stderr and not done.stdout
    assert not Path("out").exists() and not Path("out.structc-work").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "{", '{"a": 3}', '{"a": {"rank": 3}}', '{"a": {"family": "x", "rank": "y"}}'],
)
def test_configs_that_make_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        read_config(tmp_path / "config.json")


def test_forced_choices_arrive(model: str) -> None:
    Path("c.json").write_text('{"up": {"family": "low_rank", "rank": 8}, "down": null}')
    args = ["-o", "out", "--budget", "error=0.99", "--config", "c.json", "--json"]
    done = run("convert", model, *args, *FAST)
    sites = {s["name"]: s["choice"] for s in json.loads(done.stdout)["sites"]}
    assert sites["up"] == {"family": "low_rank", "hyper": {"rank": 8}}
    assert sites["down"]["family"] == "dense"


def test_an_unmet_demand_saves_the_best(model: str) -> None:
    args = ["-o", "out", "--budget", "error=0.3,params=1%", "--json"]
    done = run("convert", model, *args, *FAST)
    assert done.exit_code == 3 and "BudgetNotMet" in done.stderr and "saved in out" in done.stderr
    assert any("not met" in note for note in json.loads(done.stdout)["notes"])
    assert run("verify", "out", "--against", model, "--rounds", "1").exit_code == 0


def test_a_metric_of_the_model_is_used(model: str) -> None:
    args = ["--budget", "max_drop=1%", "--json", *FAST]
    done = run("convert", "net.py:accurate", "-o", "out", *args)
    assert json.loads(done.stdout)["verification"]["metric_name"] == "<lambda>"
    missing = run("verify", "out", "--against", model)
    assert missing.exit_code == 2 and "returns this metric" in missing.stderr
    assert run("verify", "out", "--against", "net.py:accurate", "--rounds", "1").exit_code == 0


# ---------------------------------------------------------------------------- errors


def test_unexpected_errors_are_one_line(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import structc

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(structc, "inspect", broken, raising=False)
    done = run("inspect", model)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("noise")]
    assert done.exit_code == 1 and len(lines) == 1 and "ZeroDivisionError: one" in lines[0]
    assert "Traceback" in run("inspect", model, "-v").stderr
    monkeypatch.setenv("STRUCTC_LOG", "debug")
    assert "Traceback" in run("inspect", model).stderr


def test_errors_of_a_factory(model: str) -> None:
    done = run("inspect", "net.py:broken")
    assert done.exit_code == 2 and "RuntimeError: first" in done.stderr
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in run("inspect", "net.py:broken", "-v").stderr


def test_hostile_names(model: str) -> None:
    done = run("inspect", "net.py:hostile")
    assert done.exit_code == 0 and "\x1b" not in done.stdout + done.stderr
    assert "[red]layer" in done.stdout
    for name in ("\x1b[2J.py:f", "--", "a;touch b.py:f", "$(touch b).py:f", "../..", "%s", "{x}"):
        done = run("inspect", "--", name)
        assert done.exit_code == 2 and "\x1b" not in done.stderr
    assert not Path("b").exists()


def test_bad_settings(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_LOG", "loud")
    done = run("inspect", model)
    assert done.exit_code == 2 and "STRUCTC_LOG" in done.stderr


# ---------------------------------------------------------------------------- artifacts


def test_verify(artifact: Path, model: str) -> None:
    done = run("verify", str(artifact), "--against", model, "--rounds", "1", "--json")
    data = json.loads(done.stdout)
    assert done.exit_code == 0 and data["held"] and data["data"] == "held-out calibration data"
    assert {row["name"] for row in data["latency"]} == {"eager", "structc"}
    report = json.loads((artifact / "report.json").read_text())
    assert data["error"] == pytest.approx(report["verification"]["error"], rel=1e-3)
    assert "is within" in run("verify", str(artifact), "--against", model, "--rounds", "1").stdout


def test_verify_fails_for_another_model(artifact: Path, model: str) -> None:
    mismatch = run("verify", str(artifact), "--against", "net.py:other")
    assert mismatch.exit_code == 4 and "ArtifactMismatch" in mismatch.stderr
    done = run("verify", str(artifact), "--against", "net.py:altered", "--rounds", "1")
    assert done.exit_code == 4 and "OUTSIDE OF" in done.stdout
    assert "VerificationFailed" in done.stderr


def test_report(artifact: Path) -> None:
    shown = run("report", str(artifact))
    assert shown.exit_code == 0 and "structc rewrite report" in shown.stdout
    done = run("report", str(artifact), "--json", "--html", "page.html")
    assert json.loads(done.stdout) == json.loads((artifact / "report.json").read_text())
    assert Path("page.html").read_text().lower().startswith("<!doctype html")
    assert run("report", str(artifact), "--html", "page.pdf").exit_code == 2


def test_corrupt_artifacts(artifact: Path, model: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    report = (copy / "report.json").read_bytes()
    (copy / "report.json").write_bytes(report.replace(b"Net", b"Bet", 1))
    for args in (["report"], ["verify", "--against", model], ["bench", "--against", model]):
        done = run(args[0], str(copy), *args[1:])
        assert done.exit_code == 4 and "sha256" in done.stderr
    (copy / "report.json").write_bytes(report)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert run("verify", str(copy), "--against", model).exit_code == 4
    assert run("report", str(tmp_path)).exit_code == 4
    newer = b'{"schema_version": 99}'
    (copy / "report.json").write_bytes(newer)
    manifest = json.loads((copy / "structc.json").read_text())
    manifest["sha256"]["report.json"] = hashlib.sha256(newer).hexdigest()
    (copy / "structc.json").write_text(json.dumps(manifest))
    done = run("report", str(copy))
    assert done.exit_code == 4 and "ArtifactVersion" in done.stderr


def test_bench(artifact: Path, model: str) -> None:
    done = run("bench", str(artifact), "--against", model, "--no-torch-compile", "--rounds", "1")
    assert done.exit_code == 0 and "structc" in done.stdout and "eager" in done.stdout
    done = run("bench", model, "--no-torch-compile", "--rounds", "1", "--json")
    assert [row["name"] for row in json.loads(done.stdout)["latency"]] == ["eager"]
    assert run("bench", str(artifact)).exit_code == 2


@pytest.mark.slow
def test_bench_against_torch_compile(artifact: Path, model: str) -> None:
    done = run("bench", str(artifact), "--against", model, "--rounds", "3", "--json")
    names = {row["name"] for row in json.loads(done.stdout)["latency"]}
    assert {"eager", "structc", "torch.compile, static", "torch.compile, dynamic"} == names


# ---------------------------------------------------------------------------- doctor


def test_doctor(model: str) -> None:
    done = run("doctor", model, "--json")
    data = json.loads(done.stdout)
    names = {line["name"] for line in data["checks"]}
    assert done.exit_code == 0 and data["ok"]
    assert {"python", "torch", "cpu", "threads", "compiler", "cache", "export"} <= names
    assert all(line["todo"] for line in data["checks"] if line["status"] == "warning")


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STRUCTC_CXX", str(tmp_path / "no-such-compiler"))
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    done = run("doctor")
    assert done.exit_code == 0
    assert re.search(r"^warning +compiler .*no-such-compiler", done.stdout, re.M)
    assert re.search(r"^warning +cache .*not writable", done.stdout, re.M)


def test_doctor_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo cxx 1 && exit\necho error: no >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("STRUCTC_CXX", str(script))
    done = run("doctor")
    assert done.exit_code == 0
    assert re.search(r"^warning +emitted kernel .*failed \(1\): error: no", done.stdout, re.M)


# ---------------------------------------------------------------------------- interruption


def interrupted(*args: str) -> subprocess.Popen[str]:
    """Start a conversion, and send Ctrl-C as soon as something is finished."""
    process = start(*args)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if any(Path("out.structc-work").glob("gram-*.safetensors")):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    return process


def test_an_interrupted_conversion_continues(model: str) -> None:
    args = ("convert", "net.py:deep", "-o", "out", "--budget", "error=0.6", *FAST)
    process = interrupted(*args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert not out and "continue" in err and not Path("out").exists()
    assert any(Path("out.structc-work").iterdir())
    other = run("convert", "net.py:deep", "-o", "out", "--budget", "error=0.5", *FAST)
    assert other.exit_code == 2 and "--no-resume" in other.stderr
    done = run(*args)
    assert done.exit_code == 0 and "continuing" in done.stderr
    assert Path("out/structc.json").exists() and not Path("out.structc-work").exists()


def test_no_resume_starts_over(model: str) -> None:
    Path("out.structc-work").mkdir()
    Path("out.structc-work/manifest.json").write_text('{"algorithm": "0"}')
    assert run("convert", model, "-o", "out", *FAST).exit_code == 2
    assert run("convert", model, "-o", "out", "--no-resume", *FAST).exit_code == 0
    assert not Path("out.structc-work").exists()
