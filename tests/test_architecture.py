"""What the layout promises: who imports whom, what importing costs, what never appears."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import structc
from structc.settings import VARIABLES

ROOT = Path(structc.__file__).parent.parent
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("settings",),
    ("boundary", "files", "records", "numerics", "hardware", "step"),
    ("spectral_steps", "attention_records"),
    ("steps", "spectral"),
    ("forms", "softmax"),
    ("names", "progress", "reference", "timing", "trace", "watch"),
    ("inputs", "ops", "budget", "workdir"),
    ("filters", "attend"),
    ("families", "attention", "metrics", "transformers_attention"),
    ("recognition",),
    ("passes", "codegen", "compiled", "report"),
    ("artifact", "options"),
    ("pricing", "head_work"),
    ("fitting", "heads", "built", "bundle"),
    ("pipeline", "reload"),
    ("sources",),
    ("cli", "__init__"),
    ("__main__",),
)
"""A module may import what stands above it, and within its own package."""
LEVEL = {name: at for at, tier in enumerate(TIERS) for name in tier}
PIPELINE = (
    "pipeline",
    "pricing",
    "fitting",
    "heads",
    "head_work",
    "built",
    "bundle",
    "reload",
    "sources",
    "cli",
    "__init__",
    "__main__",
)
"""The layers that may know both the passes and the kernels."""


def sources() -> list[tuple[str, Path]]:
    """(layer, file) of everything that is shipped; links are walked by their real folders."""
    found = [(p.stem, p) for p in sorted((ROOT / "structc").glob("*.py"))]
    for package in ("families", "attention", "recognition", "artifact", "report", "cli", "sources"):
        found += [(package, p) for p in sorted((ROOT / "structc" / package).rglob("*.py"))]
    for package in ("passes", "codegen"):
        found += [(package, p) for p in sorted((ROOT / package).rglob("*.py"))]
    return found


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, layer of structc) of each import at any depth, those for types alone left out."""
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            if name.startswith("structc."):
                found.append((node.lineno, name.split(".")[1]))
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for layer, file in sources():
        assert layer in LEVEL, f"{file.name}: {layer} stands in no tier; add it to TIERS"
        for line, other in imported(ast.parse(file.read_text())):
            if other not in LEVEL or other == layer:
                continue
            if LEVEL[other] >= LEVEL[layer] and (layer, other) not in ALLOWED:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {layer} imports {other}")
            if {layer, other} == {"passes", "codegen"}:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {layer} imports {other}")
    assert not wrong, "imports against the order of layers:\n" + "\n".join(wrong)


ALLOWED = {
    ("records", "names"),  # for an error text, inside a method
    ("compiled", "artifact"),  # save() is a method of the product
    ("artifact", "__init__"),
}
"""Imports against the order, inside functions, each with its reason."""


def test_only_the_top_knows_passes_and_kernels() -> None:
    for layer, file in sources():
        seen = {other for _, other in imported(ast.parse(file.read_text()))}
        if {"passes", "codegen"} <= seen:
            assert layer in PIPELINE, f"{file.relative_to(ROOT)} knows both"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_lean() -> None:
    heavy = "triton rich typer jinja2 scipy networkx transformers torch._inductor torch._dynamo"
    code = f"""
import sys
import torch
before = set(sys.modules)
import structc
loaded = set(sys.modules) - before
print(sorted(h for h in {heavy.split()!r} if h in loaded))
print(sorted(m for m in loaded if m.startswith("structc.") and m != "structc.errors"))
structc.Budget, structc.compile, structc.inspect, structc.load, structc.families
print(sorted(h for h in "triton rich typer torch._inductor".split() if h in sys.modules))
print(sorted(m for m in ("passes", "codegen") if m in sys.modules))
"""
    assert run_python(code) == "[]\n[]\n[]\n[]\n"


def test_compiling_starts_no_compiler_without_effort() -> None:
    code = """
import subprocess
def never(*a, **k): raise AssertionError(a)
subprocess.Popen.__init__ = never
import sys, torch, structc
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
structc.compile(model, torch.randn(4, 8), effort="none")
print([m for m in ("structc.codegen.triton", "typer") if m in sys.modules])
"""
    assert run_python(code) == "[]\n"  # torch.export itself imports triton where it is installed


def test_every_public_name_is_there() -> None:
    assert structc.__all__ == sorted(structc.__all__)
    for name in structc.__all__:
        assert getattr(structc, name) is not None
    assert set(dir(structc)) == set(structc.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        structc.nothing  # noqa: B018


# ---------------------------------------------------------------------------- what never appears


def test_no_pickle_and_no_code_from_files() -> None:
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for _, file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name.split(".")[0] for a in node.names}
                names.add((getattr(node, "module", "") or "").split(".")[0])
                assert not names & banned, f"{where} imports pickle"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec"), f"{where} calls {called}"
                if called == "torch.load":
                    words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert words.get("weights_only") == "True", f"{where}: torch.load is a pickle"


def test_no_import_writes_a_bare_folder_name() -> None:
    for _, file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("passes", "codegen"), f"{file}:{node.lineno}"


def test_links_join_the_folders_to_the_package() -> None:
    for name in ("passes", "codegen"):
        link = ROOT / "structc" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"


# ---------------------------------------------------------------------------- documentation


def public_definitions() -> list[tuple[str, ast.AST]]:
    found: list[tuple[str, ast.AST]] = []
    for layer, file in sources():
        if layer in ("cli", "sources", "codegen"):
            continue
        where = file.relative_to(ROOT)
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), f"{where} has no docstring"
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if "overload" not in {ast.unparse(d) for d in node.decorator_list}:
                found.append((f"{where}:{node.lineno}: {node.name}", node))
    return found


def test_every_public_definition_has_a_docstring() -> None:
    missing = [w for w, n in public_definitions() if not ast.get_docstring(n)]  # type: ignore[arg-type]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", ["detect", "rewrite"])
def test_passes_say_what_they_rewrite_and_why(name: str) -> None:
    module = importlib.import_module(f"structc.passes.{name}")
    text = getattr(module, name).__doc__
    for word in ("rewrite:", "Sound because:", "Skips when:"):
        assert word in text, f"{name} does not say {word}"


def test_families_say_their_mathematics() -> None:
    for family in structc.families.FAMILIES:
        for word in ("Math:", "Shapes:", "Cost:", "Errors:", "Source:", ">>>"):
            assert word in (family.__doc__ or ""), f"{family.__name__} does not say {word}"


def test_settings_are_documented() -> None:
    page = ROOT / "docs" / "environment.md"
    text = page.read_text()
    listed = set(re.findall(r"STRUCTC_[A-Z_]+", text)) - {
        "STRUCTC_TEST_MODELS",
        "STRUCTC_TEST_DATA",
    }
    assert listed == set(VARIABLES)
    read = set()
    for _, file in sources():
        read |= set(re.findall(r"[\"'](STRUCTC_[A-Z_]+)[\"']", file.read_text()))
    assert read <= set(VARIABLES), f"read, but not documented: {read - set(VARIABLES)}"


def modules() -> list[str]:
    """Everything that has doctests, as it is imported."""
    names = [m.name for m in pkgutil.walk_packages([str(ROOT / "structc")], "structc.")]
    return [n for n in names if ".cpu" not in n and "__main__" not in n]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_are_true(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    torch.manual_seed(0)
    more = {"torch": torch, "nn": nn, "structc": structc}
    failed, _ = doctest.testmod(module, extraglobs=more, optionflags=flags)
    assert failed == 0
