# make demo       convert a real model, print the report, leave out/minilm/
# make test       the whole test suite
# make test-all   with the long tests
# make bench      the figures of the README; DATA=folder with the STS-B files
# make lint       ruff and mypy
#
# PYTHON=python3.12       another interpreter
# TORCH_INDEX=URL         where to take PyTorch from (the CPU wheels, say); see the README

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/examples
	$(BIN)/python examples/minilm.py --models .models --out out/minilm

bench: $(VENV)/examples
	$(BIN)/python examples/bench_fits.py --models .models $(if $(DATA),--data $(DATA))
	$(BIN)/python examples/bench_minilm.py --models .models $(if $(DATA),--data $(DATA))

test: $(VENV)/test
	$(BIN)/python -m pytest

test-all: $(VENV)/test
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/test
	$(BIN)/ruff check structc passes codegen tests examples
	$(BIN)/ruff format --check structc passes codegen tests examples
	$(BIN)/mypy

# A torch that is installed already and new enough is used as it is: the environment then sees the
# system's packages, and the pin of torch is left out. Otherwise the pinned one is installed.
$(VENV)/torch:
	@if $(PYTHON) -c "import torch; v = torch.__version__.split('.'); assert (int(v[0]), int(v[1])) >= (2, 10)" 2>/dev/null; then \
		echo "using the PyTorch that $(PYTHON) has"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
		grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV); \
		cp constraints.txt $(VENV)/constraints.txt; \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt \
			$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; \
	fi
	@touch $@

$(VENV)/examples: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[examples]"
	@touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[test,examples]"
	@touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
