"""Artifacts: the same bits in another process, and nothing believed that was not checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, floats, run, sequential

import structc
from structc.artifact import MANIFEST, REPORT_JSON, SCHEMA, WEIGHTS
from structc.compiled import CompiledModel
from structc.families import LowRank, Monarch

TESTS = Path(__file__).parent
FORCED = {
    "0": {"family": "low_rank", "rank": 5},
    "2": {"family": "monarch", "in_blocks": 2, "out_blocks": 2, "rank": 2},
}


def structured(model: nn.Module | None = None) -> CompiledModel:
    torch.manual_seed(5)
    return structc.compile(
        model or sequential(),
        floats(8, 12),
        budget=structc.Budget(error=5.0, params="99%"),
        config=FORCED,
        effort="none",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, Path]:
    """A product with factors of two families, and where it was saved."""
    fast = structured()
    assert isinstance(fast[0], LowRank) and isinstance(fast[2], Monarch)
    return fast, fast.save(tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def broken(saved: tuple[CompiledModel, Path], tmp_path: Path) -> Path:
    """A copy of the artifact to break."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


# ---------------------------------------------------------------------------- round trips


def test_loading_gives_the_same_bits(saved: tuple[CompiledModel, Path]) -> None:
    fast, folder = saved
    again = structc.load(folder, sequential())
    assert isinstance(again, nn.Sequential) and isinstance(again, CompiledModel)
    one, two = fast.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    with torch.no_grad():
        assert torch.equal(again(floats(5, 12)), fast(floats(5, 12)))
    assert {n: str(c) for n, c in again.plan.choices.items()} == {
        n: str(c) for n, c in fast.plan.choices.items()
    }
    assert again.report.to_dict() == fast.report.to_dict()
    assert "_structc_runner" in again.__dict__, "the graph is used again"
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "structc.json", "report.json", "report.html",
    }  # fmt: skip


def test_loading_leaves_the_given_model_alone(saved: tuple[CompiledModel, Path]) -> None:
    model = sequential()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    again = structc.load(saved[1], model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model[0]) is nn.Linear
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}


def test_a_model_without_values_is_enough(saved: tuple[CompiledModel, Path]) -> None:
    with torch.device("meta"):
        model = sequential()
    again = structc.load(saved[1], model)
    with torch.no_grad():
        assert torch.equal(again(floats(5, 12)), saved[0](floats(5, 12)))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("forced", [{}, {"_default": "low_rank"}], ids=["exact", "low_rank"])
@pytest.mark.parametrize("name", ["functional", "encoder", "bert", "gpt2", "branches"])
def test_kinds_of_models_come_back(
    name: str, forced: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structc.passes.trial.EXACT_KERNELS", ())
    case = ZOO[name]
    budget = structc.Budget(error=5.0) if forced else None
    fast = structc.compile(case.model(), case.call(), budget=budget, config=forced, effort="none")
    assert {"low_rank"} <= {c.family for c in fast.plan.choices.values()} or not forced
    again = structc.load(fast.save(tmp_path / "out"), case.model())
    runners = [m for m in again.modules() if "_structc_runner" in m.__dict__]
    assert len(runners) == len(case.regions)
    one, two = dict(fast.named_parameters()), dict(again.named_parameters())
    assert one.keys() == two.keys()
    ties = [
        {n for n, p in m.named_parameters(remove_duplicate=False) if p is q}
        for m in (fast, again)
        for q in m.parameters()
    ]
    assert sorted(map(sorted, ties[: len(ties) // 2])) == sorted(
        map(sorted, ties[len(ties) // 2 :])
    )
    with torch.no_grad():
        for size in case.sizes[:2]:
            got, want = run(again, case.call(*size)), run(fast, case.call(*size))
            assert structc_error(got, want) < 1e-6  # MKL's sums depend on where tensors lie


def structc_error(got: Any, want: Any) -> float:
    from structc.numerics import output_error

    return output_error(got, want)


def test_a_fresh_process_gives_the_same_bits(
    saved: tuple[CompiledModel, Path], tmp_path: Path
) -> None:
    fast, folder = saved
    with torch.no_grad():
        torch.save(fast(floats(5, 12)), tmp_path / "want.pt")
    script = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        import torch, structc
        from zoo import floats, sequential
        again = structc.load({str(folder)!r}, sequential())
        want = torch.load({str(tmp_path / "want.pt")!r}, weights_only=True)
        with torch.no_grad():
            assert torch.equal(again(floats(5, 12)), want)
        print(again.plan.explain("0"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0: low rank 5\n  time ") and "why not   dense" in done.stdout


def test_a_trained_product_is_saved_as_it_is_now(tmp_path: Path) -> None:
    fast = structured()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1.0)
    again = structc.load(fast.save(tmp_path / "out"), sequential())
    with torch.no_grad():
        assert torch.equal(again(floats(5, 12)), fast(floats(5, 12)))


def test_a_loaded_product_can_be_saved_again(
    saved: tuple[CompiledModel, Path], tmp_path: Path
) -> None:
    again = structc.load(saved[1], sequential())
    third = structc.load(again.save(tmp_path / "again"), sequential())
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), again.parameters()))


# ---------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, REPORT_JSON, "report.html"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "bit", "empty", "folder"])
def test_files_that_were_harmed_are_named(broken: Path, name: str, harm: str) -> None:
    file = broken / name
    data = file.read_bytes()
    file.unlink()
    if harm == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "bit":
        at = len(data) * 2 // 3
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "folder":
        file.mkdir()
    with pytest.raises(structc.ArtifactCorrupt, match=name.replace(".", r"\.")):
        structc.load(broken, sequential())


def test_every_single_bit_of_the_weights_counts(broken: Path) -> None:
    data = (broken / WEIGHTS).read_bytes()
    for at in range(0, len(data), len(data) // 23):
        (broken / WEIGHTS).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(structc.ArtifactCorrupt):
            structc.load(broken, sequential())


@pytest.mark.parametrize("path", ["nowhere", "file", "empty"])
def test_what_is_no_artifact_says_so(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(structc.ArtifactCorrupt, match="no structc artifact"):
        structc.load(tmp_path / path, sequential())


def test_a_newer_schema_asks_for_an_update(broken: Path) -> None:
    rewrite_manifest(broken, lambda m: m.update(schema_version=SCHEMA + 1))
    with pytest.raises(structc.ArtifactVersion, match=f"schema {SCHEMA + 1}"):
        structc.load(broken, sequential())


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    "model",
    [
        lambda: sequential(12, 20, 9),
        lambda: sequential(12, 24, 8),
        Other,
        lambda: nn.Sequential(*sequential(), nn.Linear(8, 8)),
        lambda: nn.Sequential(nn.Linear(12, 20)),
        lambda: nn.Sequential(nn.Linear(12, 20, bias=False), nn.GELU(), nn.Linear(20, 8)),
    ],
    ids=["out", "hidden", "class", "longer", "shorter", "no-bias"],
)
def test_another_model_is_refused_with_the_difference(
    saved: tuple[CompiledModel, Path], model: Callable[[], nn.Module]
) -> None:
    with pytest.raises(structc.ArtifactMismatch) as caught:
        structc.load(saved[1], model())
    assert any(word in str(caught.value) for word in ("weight", "bias", "layer"))


def test_a_weight_that_the_model_has_not_is_called_missing(
    saved: tuple[CompiledModel, Path],
) -> None:
    with pytest.raises(structc.ArtifactMismatch, match=r"2\.weight is missing") as caught:
        structc.load(saved[1], nn.Sequential(nn.Linear(12, 20)))
    assert "None" not in str(caught.value)


def test_another_graph_runs_as_modules(saved: tuple[CompiledModel, Path]) -> None:
    """The same weights under other code: the graph is not the one that was compiled."""
    other = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).eval()
    again = structc.load(saved[1], other)
    fast, x = saved[0], floats(5, 12)
    with torch.no_grad():
        assert torch.allclose(again(x), fast[2](torch.tanh(fast[0](x))), atol=1e-5)


# ---------------------------------------------------------------------------- hostile manifests


def deep(n: int = 100_000) -> str:
    return "[" * n + "]" * n


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "negative-size": lambda m: m["state"].update({"0.v": [[-5, 12], "float32"]}),
    "huge-size": lambda m: m["state"].update({"0.v": [[2**40, 2**20], "float32"]}),
    "huge-rank": lambda m: m["choices"]["0"]["hyper"].update(rank=2**35),
    "negative-rank": lambda m: m["choices"]["0"]["hyper"].update(rank=-1),
    "text-rank": lambda m: m["choices"]["0"]["hyper"].update(rank="5"),
    "boolean-rank": lambda m: m["choices"]["0"]["hyper"].update(rank=True),
    "float-rank": lambda m: m["choices"]["0"]["hyper"].update(rank=5.0),
    "no-rank": lambda m: m["choices"]["0"].update(hyper={}),
    "more-hyper": lambda m: m["choices"]["0"]["hyper"].update(sneaky=1),
    "zero-blocks": lambda m: m["choices"]["2"]["hyper"].update(in_blocks=0),
    "other-grid": lambda m: m["choices"]["2"]["hyper"].update(in_blocks=3),
    "boolean-size": lambda m: m["state"].update({"0.v": [[True, 12], "float32"]}),
    "float-size": lambda m: m["state"].update({"0.v": [[5.0, 12], "float32"]}),
    "no-dtype": lambda m: m["state"].update({"0.v": [[5, 12], "nn"]}),
    "code-dtype": lambda m: m["sites"][0].update(dtype="load"),
    "unknown-family": lambda m: m["choices"]["0"].update(family="os.system"),
    "family-list": lambda m: m["choices"]["0"].update(family=["low_rank"]),
    "traversal": lambda m: m["sha256"].update({"../../etc/passwd": "0" * 64}),
    "absolute": lambda m: m["sha256"].update({"/etc/passwd": "0" * 64}),
    "fewer-files": lambda m: m["sha256"].pop(WEIGHTS),
    "no-files": lambda m: m.update(sha256={}),
    "digest-number": lambda m: m["sha256"].update({WEIGHTS: 7}),
    "state-list": lambda m: m.update(state=[]),
    "state-scalar": lambda m: m["state"].update({"0.v": 3}),
    "sites-text": lambda m: m.update(sites="none"),
    "site-number": lambda m: m.update(sites=[3]),
    "site-negative": lambda m: m["sites"][0].update(in_features=-12),
    "site-huge": lambda m: m["sites"][0].update(in_features=2**60),
    "site-other-size": lambda m: m["sites"][0].update(in_features=13),
    "site-path": lambda m: m["sites"][0].update(module="__class__", weight="__class__.weight"),
    "site-nowhere": lambda m: m["sites"][0].update(module="7", weight="7.weight"),
    "site-nodes": lambda m: m["sites"][0].update(nodes=[["", "missing"]]),
    "site-node-shape": lambda m: m["sites"][0].update(nodes=[3]),
    "replaced-unknown": lambda m: m.update(replaced=["0", "2", "nine"]),
    "replaced-numbers": lambda m: m.update(replaced=[0]),
    "choice-missing": lambda m: m["choices"].pop("0"),
    "region-number": lambda m: m.update(regions=[3]),
    "region-path": lambda m: m["regions"][0].update(path="__class__"),
    "region-nowhere": lambda m: m["regions"][0].update(path="7.8"),
    "region-spec-code": lambda m: m["regions"][0].update(
        spec='[1, {"type": "os.system", "context": "null", "children_spec": []}]'
    ),
    "region-spec-deep": lambda m: m["regions"][0].update(spec=deep()),
    "region-spec-none": lambda m: m["regions"][0].update(spec=None),
    "region-leaf-huge": lambda m: m["regions"][0]["leaves"][0].update(shape=[2**39, 2**39]),
    "region-leaf-negative": lambda m: m["regions"][0]["leaves"][0].update(shape=[-1, 12]),
    "region-leaf-dtype": lambda m: m["regions"][0]["leaves"][0].update(dtype="load"),
    "region-ranges": lambda m: m["regions"][0].update(ranges={"s0": [2]}),
    "schema-text": lambda m: m.update(schema_version="1"),
    "schema-none": lambda m: m.pop("schema_version"),
    "schema-boolean": lambda m: m.update(schema_version=True),
    "schema-negative": lambda m: m.update(schema_version=-1),
    "runner-number": lambda m: m.update(runner=3),
    "runner-unknown": lambda m: m.update(runner="rm -rf"),
    "model-number": lambda m: m.update(model=3),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_hostile_manifest_is_never_believed(broken: Path, harm: str) -> None:
    rewrite_manifest(broken, HOSTILE[harm])
    try:
        again = structc.load(broken, sequential())
    except (structc.ArtifactCorrupt, structc.ArtifactMismatch, structc.ArtifactVersion) as e:
        assert len(str(e)) < 2000
        return
    except structc.StructcError as e:
        raise AssertionError(f"{type(e).__name__} is not an artifact's error: {e}") from e
    # what cannot be used is left out; what is loaded computes what was saved
    with torch.no_grad():
        assert torch.allclose(again(floats(5, 12)), structured()(floats(5, 12)), atol=1e-5)
    assert harm.startswith(("region", "runner", "site-node")), "this must be refused"


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{", '{"schema_version": NaN}', '{"schema_version": 1e999}', deep(),
     "\x00", '{"a": ' * 5000 + "1" + "}" * 5000],
    ids=["empty", "null", "list", "number", "open", "nan", "infinite", "deep", "zero", "nested"],
)  # fmt: skip
def test_what_is_no_json_object_is_corrupt(broken: Path, text: str) -> None:
    (broken / MANIFEST).write_text(text)
    with pytest.raises(structc.ArtifactCorrupt, match=r"structc\.json"):
        structc.load(broken, sequential())


def test_a_manifest_that_is_not_text_is_corrupt(broken: Path) -> None:
    (broken / MANIFEST).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(structc.ArtifactCorrupt):
        structc.load(broken, sequential())


def test_weights_that_are_a_pickle_are_never_opened(broken: Path) -> None:
    class Boom:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(broken / "pwned"),))

    import pickle

    payload = pickle.dumps(Boom())
    (broken / WEIGHTS).write_bytes(payload + bytes(4096))
    digest = hashlib.sha256((broken / WEIGHTS).read_bytes()).hexdigest()
    rewrite_manifest(broken, lambda m: m["sha256"].update({WEIGHTS: digest}))
    with pytest.raises(structc.ArtifactCorrupt):
        structc.load(broken, sequential())
    assert not (broken / "pwned").exists()


@pytest.mark.parametrize(
    "kernels",
    [
        [3],
        [{}],
        [{"form": "dense(1,2", "dtype": "float32"}],
        [{"form": "block(1,2,3,1)", "dtype": "load", "rows": 1, "kernel": "x", "config": {},
          "transposed": False}],
        [{"form": "dense(12,20,gelu)", "dtype": "float32", "rows": 8, "kernel": "../evil",
          "config": {}, "transposed": False}],
        [{"form": "dense(12,20,gelu)", "dtype": "float32", "rows": -8, "kernel": "aten",
          "config": [1], "transposed": False}],
    ],
    ids=["number", "empty", "form", "dtype", "kernel", "config"],
)  # fmt: skip
def test_kernels_that_make_no_sense_are_left_out(
    broken: Path, kernels: list[Any], saved: tuple[CompiledModel, Path]
) -> None:
    rewrite_manifest(broken, lambda m: m.update(kernels=kernels))
    again = structc.load(broken, sequential())
    with torch.no_grad():
        assert torch.allclose(again(floats(5, 12)), saved[0](floats(5, 12)), atol=1e-6)


# ---------------------------------------------------------------------------- writing


def test_an_artifact_is_replaced_only_when_asked(tmp_path: Path) -> None:
    fast = structured()
    folder = fast.save(tmp_path / "out")
    stamp = (folder / WEIGHTS).read_bytes()
    with pytest.raises(structc.ArtifactWrite, match="overwrite=True"):
        fast.save(folder)
    assert (folder / WEIGHTS).read_bytes() == stamp
    with torch.no_grad():
        fast[0].bias += 1
    fast.save(folder, overwrite=True)
    assert (folder / WEIGHTS).read_bytes() != stamp
    structc.load(folder, sequential())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(structc.ArtifactWrite, match="other things"):
        structured().save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(structc.ArtifactWrite, match="is a file"):
        structured().save(tmp_path / "out", overwrite=True)
    with pytest.raises(structc.ArtifactWrite):
        structured().save(tmp_path / "out" / "below")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    structc.load(structured().save(tmp_path), sequential())


def test_models_that_are_not_compiled_are_not_saved(tmp_path: Path) -> None:
    from structc.artifact import save

    with pytest.raises(structc.ConfigError, match="compile"):
        save(sequential(), tmp_path / "out")


@pytest.mark.parametrize("where", ["save_file", "_sync", "_manifest", "_swap"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failed_save_leaves_the_old_artifact(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = structured()
    folder = fast.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise error

    module = "safetensors.torch" if where == "save_file" else "structc.artifact.write"
    monkeypatch.setattr(f"{module}.{where}", fail)
    expected = structc.ArtifactWrite if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        fast.save(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing half written stays behind"


def test_a_real_limit_on_file_sizes(tmp_path: Path) -> None:
    """A full disk as the operating system reports it, in a process of its own."""
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(TESTS)!r})
        import structc
        from test_artifact import structured
        from zoo import sequential
        fast = structured(sequential(12, 20, 8))
        fast.save({str(tmp_path / "out")!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            fast.save({str(tmp_path / "out")!r}, overwrite=True)
        except structc.ArtifactWrite as e:
            print("refused:", "MB" in str(e))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused: True\n"
    structc.load(tmp_path / "out", sequential())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(structc.ArtifactWrite):
            structured().save(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)
