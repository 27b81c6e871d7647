# `make demo` trains the offline language model, `make test` runs every test, `make docs` builds the guide into site/; each makes
# .venv with what it needs, from nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint docs notebooks clean

demo: .venv/train
	$(BIN)/python -m experiments.deq_lm --config configs/pydoc.py --workdir runs/pydoc
	$(BIN)/python -m experiments.deq_lm --config configs/pydoc.py --workdir runs/pydoc --mode eval
	$(BIN)/python -m experiments.deq_lm --config configs/pydoc.py --workdir runs/pydoc --mode generate

test: .venv/test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/docs
	$(BIN)/mkdocs build --strict --quiet

# Every notebooks/*.ipynb from the .py beside it.
notebooks: .venv/test
	$(BIN)/python -m tests.notebooks

# A stamp per extra; remade when the requirements change.
.venv/%: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deqjax needs Python 3.11 or newer; point to one with: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build site *.egg-info
