"""What every test may ask for, and what no test may leak into the next."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: no test needs a GPU

import pytest
import torch

import structc

GOLDEN = Path(__file__).parent / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/ from what comes out now"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text equals ``tests/golden/<name>``, or becomes it."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path.name} is missing: run pytest --update-golden"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernels and prices of this session alone: never the user's, never an earlier run's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("STRUCTC_")]:
            if name not in ("STRUCTC_TEST_MODELS", "STRUCTC_TEST_DATA"):
                patch.delenv(name)
        patch.setenv("STRUCTC_CACHE_DIR", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """The same random numbers at the start of each test, no attached kernels at its end."""
    torch.manual_seed(0)
    random.seed(0)
    yield
    structc.reset()
