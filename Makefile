# Each target installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= outputs/quickstart

.PHONY: quickstart test lint benchmark

# One thread computes while another process decodes: two computing threads wait for each other whenever anything else
# runs on a machine of two cores, and an epoch of seconds becomes one of minutes.
quickstart: .venv/requirements
	OMP_NUM_THREADS=1 $(BIN)/python run_captioning.py recipes/quickstart.json --output_dir $(OUTPUT) --resume_from_checkpoint true

test: .venv/requirements-dev
	$(BIN)/python -m pytest -n 2

lint: .venv/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Minutes, on a model of a sixth of the layers: what is faster, not by how much. benchmarks/README.md has the long form.
benchmark: .venv/requirements-dev
	for name in evaluation training memory input_pipeline; do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

# The stamps are newer than the requirements that they were installed from.
.venv/%: %.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r $<
	touch $@
