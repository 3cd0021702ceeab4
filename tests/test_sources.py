"""MODEL arguments: what is loaded, and what each mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from structc.errors import CalibrationError, ConfigError, StructcError, UnsupportedModel
from structc.sources import TextOptions, load_source
from structc.sources.texts import read_texts

NOTHING = TextOptions()
HEAD = "import torch\nfrom torch import nn\n"


@pytest.fixture
def write(tmp_path: Path):
    def file(body: str, name: str = "model.py") -> str:
        path = tmp_path / name
        path.write_text(HEAD + body)
        return str(path)

    return file


# ---------------------------------------------------------------------------- factories


@pytest.mark.parametrize(
    "returned",
    [
        "(nn.Linear(4, 4), torch.ones(2, 4))",
        "(nn.Linear(4, 4), torch.ones(2, 4), [torch.ones(2, 4)])",
        "(nn.Linear(4, 4), torch.ones(2, 4), [torch.ones(2, 4)], lambda model: 1.0)",
        "(nn.Linear(4, 4), (torch.ones(2, 4),), None, None)",
        "{'model': nn.Linear(4, 4), 'example_inputs': {'input': torch.ones(2, 4)}}",
    ],
    ids=["pair", "calibration", "metric", "nones", "dict"],
)
def test_a_factory_may_return(write, returned: str) -> None:
    file = write(f"def make(): return {returned}\n")
    source = load_source(f"{file}:make", NOTHING)
    assert isinstance(source.model, nn.Linear) and source.example_inputs is not None


def test_the_same_command_sees_the_same_data(write) -> None:
    """An interrupted conversion is taken up by its inputs: torch.randn must give them again."""
    body = "import random, numpy as np\ndef make(): return nn.Linear(4, 4), torch.randn(2, 4) * "
    file = write(body + "random.random() * np.random.rand()\n")
    one, two, other = (load_source(f"{file}:make", NOTHING, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.example_inputs, two.example_inputs)
    assert torch.equal(one.model.weight, two.model.weight)
    assert not torch.equal(one.example_inputs, other.example_inputs)


def test_a_factory_may_be_a_class_or_a_model(write) -> None:
    file = write(
        "class Net(nn.Linear):\n"
        "    dummy_inputs = torch.ones(1, 4)\n"
        "    def __init__(self): super().__init__(4, 4)\n"
        "net = Net()\n"
    )
    assert type(load_source(f"{file}:Net", NOTHING).model).__name__ == "Net"
    assert type(load_source(f"{file}:net", NOTHING).model).__name__ == "Net"


def test_a_file_may_import_its_neighbours(write) -> None:
    write("SIZE = 5\n", "neighbour_of_model.py")
    body = "from neighbour_of_model import SIZE\n"
    file = write(body + "def make(): return nn.Linear(SIZE, 1), torch.ones(1, SIZE)\n", "my-net.py")
    assert load_source(f"{file}:make", NOTHING).model.in_features == 5


def test_generators_of_calibration_are_read_once(write) -> None:
    file = write(
        "def make(): return nn.Linear(4, 4), torch.ones(2, 4), (torch.ones(2, 4) for _ in range(3))"
    )
    assert len(load_source(f"{file}:make", NOTHING).calibration) == 3


@pytest.mark.parametrize(
    ("body", "spec", "says"),
    [
        ("def make(): return 3", "make", "got int '3'"),
        ("def make(): return None", "make", "got None"),
        ("def make(): return (nn.Linear(1, 1),) * 5", "make", "got 5 items"),
        ("def make(): return ()", "make", "got 0 items"),
        ("def make(): return {'module': 1}", "make", "unknown key 'module'"),
        ("def make(): return {'metric': len}", "make", "no key 'model'"),
        ("def make(): return nn.Linear(1, 1)", "make", "no example inputs"),
        ("def make(): return nn.Linear(1, 1), 'text'", "make", "got str"),
        ("def make(): return nn.Linear(1, 1), torch.ones(1), [], len", "make", "0 batches"),
        ("def make(): return nn.Linear(1, 1), torch.ones(1), None, 5", "make", "metric"),
        ("def make(): raise ValueError('odd')", "make", "raised ValueError: odd (.*line 3)"),
        ("def make(a): pass", "make", "raised TypeError"),
        ("def make(): raise SystemExit(1)", "make", "raised SystemExit"),
        ("def make(: pass", "make", "running the file raised SyntaxError"),
        ("import no_such_module_at_all", "make", "raised ModuleNotFoundError"),
        ("def make(): pass", "mkae", "no function 'mkae'"),
        ("def make(): pass", "", "'' is not the name"),
        ("def make(): pass", "make()", "is not the name"),
        ("def make(): pass", "__import__('os')", "is not the name"),
        ("make = 3", "make", "expected a function, got int"),
    ],
)
def test_a_factory_that_is_wrong(write, body: str, spec: str, says: str) -> None:
    file = write(f"{body}\n")
    with pytest.raises(StructcError, match=says) as caught:
        load_source(f"{file}:{spec}", NOTHING)
    assert caught.value.hint


def test_near_misses_are_named(write) -> None:
    file = write("def make_model(): pass\n")
    with pytest.raises(ConfigError, match="Did you mean 'make_model'"):
        load_source(f"{file}:make_modle", NOTHING)


def test_text_options_are_refused_for_factories(write) -> None:
    file = write("def make(): return nn.Linear(4, 4), torch.ones(2, 4)\n")
    with pytest.raises(ConfigError, match=r"--calib, --seqlen: .*folders only"):
        load_source(f"{file}:make", TextOptions(Path("a.txt"), 8))


# ---------------------------------------------------------------------------- other forms


@pytest.mark.parametrize(
    "spec",
    ["", "nothing", "nothing.py:make", "org/model", "a\0b", "x" * 5000, "\x1b[31m", "--", ":", "/"],
)
def test_what_is_no_model(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_source(spec, NOTHING)
    assert caught.value.hint


def test_a_file_without_a_function(write) -> None:
    with pytest.raises(ConfigError, match="the function is missing"):
        load_source(write(""), NOTHING)


def test_an_artifact_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "structc.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an artifact"):
        load_source(str(tmp_path), NOTHING)


def test_a_program_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)
    torch.export.save(torch.export.export(model, (x,)), path)
    with pytest.raises(ConfigError, match="can run code"):
        load_source(str(path), NOTHING)
    source = load_source(str(path), NOTHING, trust=True)
    args, kwargs = source.example_inputs
    source.model.eval()
    torch.testing.assert_close(source.model(*args, **kwargs), model(x))


def test_a_program_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ConfigError, match="cannot load it"):
        load_source(str(path), NOTHING, trust=True)


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("content", "texts", "how"),
    [
        ("one\ntwo\n", ["one", "two"], "lines"),
        ("one\ntwo\n\nthree\n", ["one two", "three"], "paragraphs"),
        ("\n".join([*"abcdefghijklmnopqrstu", "", "z"]), [*"abcdefghijklmnopqrstu", "z"], "lines"),
        ("\ufeffone\r\ntwo", ["one", "two"], "lines"),
    ],
)
def test_text_files(tmp_path: Path, content: str, texts: list[str], how: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert read_texts(path, 100) == (texts, how)
    assert read_texts(path, 1) == (texts[:1], how)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " ", "id": 1}\n{"text": "tw\\ud800o"}\n')
    assert read_texts(path, 9) == (["one", "tw?o"], "JSONL")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\n \n", "no text"),
        ("a.txt", b"ok\n\xff\xfe", "not UTF-8"),
        ("a.csv", b"x", "expected a .txt or a .jsonl"),
        ("a.jsonl", b'{"text": "a"}\nnot json', "line 2: not JSON"),
        ("a.jsonl", b'{"content": "a"}', "line 1: expected"),
        ("a.jsonl", b'["a"]', "line 1: expected"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_broken_text(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        read_texts(tmp_path / name, 9)


def test_missing_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        read_texts(tmp_path / "a.txt", 9)


# ---------------------------------------------------------------------------- folders

WORDS = ("[PAD]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", ".")


def save_tokenizer(folder: Path) -> None:
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat on a mat .\na dog ran .\nthe dog sat\n" * 3)
    return path


def test_a_folder_without_text(encoder: Path) -> None:
    source = load_source(str(encoder), TextOptions(seqlen=16, batch_size=3))
    assert type(source.model).__name__ == "BertForSequenceClassification"
    assert source.example_inputs["input_ids"].shape == (3, 16)
    assert source.calibration is None and "data-free" in source.notes[0]


def test_a_folder_with_text(encoder: Path, texts: Path) -> None:
    source = load_source(str(encoder), TextOptions(texts, nsamples=7, batch_size=4))
    assert [len(b["input_ids"]) for b in source.calibration] == [4, 3]
    assert source.example_inputs["input_ids"].shape == (4, 8)  # 7 tokens, rounded up
    assert set(source.calibration[0]) <= {"input_ids", "attention_mask", "token_type_ids"}
    assert int(source.calibration[0]["attention_mask"][1].sum()) == 4
    source.model(**source.example_inputs)


def test_language_models_get_full_windows(tmp_path: Path, texts: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    llama = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    for name in ("gpt2", "llama"):
        source = load_source(str(tmp_path / name), TextOptions(texts, seqlen=8, batch_size=2))
        assert [tuple(b["input_ids"].shape) for b in source.calibration] == [(2, 8)] * 2
        source.model(**source.example_inputs)


def test_lengths_beyond_the_model(encoder: Path) -> None:
    with pytest.raises(ConfigError, match="at most 32 tokens"):
        load_source(str(encoder), TextOptions(seqlen=64))


def test_broken_folders(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ConfigError, match="has none"):
        load_source(str(folder), NOTHING)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        load_source(str(folder), NOTHING)
    (folder / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="cannot load its model"):
        load_source(str(folder), NOTHING)
    config = json.loads((encoder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no tokenizer in it"):
        load_source(str(folder), NOTHING)


def test_code_in_a_folder_is_never_run(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes())
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UnsupportedModel, match="never run"):
        load_source(str(folder), NOTHING)


def test_odd_architectures_are_not_looked_up(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for name in ("__class__", "pipeline", "GPT2Model", "os.system", ""):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert type(load_source(str(folder), NOTHING).model).__name__ == "BertModel"
