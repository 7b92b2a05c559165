# Each target installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= outputs/quickstart

.PHONY: quickstart test test-all lint benchmark lock audit

# One thread computes while another process decodes: two computing threads wait for each other whenever anything else
# runs on a machine of two cores, and an epoch of seconds becomes one of minutes.
quickstart: .venv/requirements
	OMP_NUM_THREADS=1 $(BIN)/python run_captioning.py recipes/quickstart.json --output_dir $(OUTPUT) --resume_from_checkpoint true

# Each of the two processes takes a half of the files, so that a model is trained once for the tests of its file.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

# Without long sweeps, launchers and repeats; what each of them protects has a faster test among these, too.
test: .venv/requirements-dev
	$(PYTEST) -m "not slow"

test-all: .venv/requirements-dev
	$(PYTEST)

lint: .venv/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Minutes, on a model of a sixth of the layers: what is faster, not by how much, and what became slower since the stored
# results. benchmarks/README.md has the long form.
benchmark: .venv/requirements-dev
	mkdir -p outputs/benchmark && rm -f outputs/benchmark/*.json
	for name in evaluation training memory weights input_pipeline end_to_end; do \
		$(BIN)/python benchmarks/$$name.py --quick --json outputs/benchmark/$$name.json || exit 1; done
	$(BIN)/python benchmarks/compare.py outputs/benchmark

# All packages with their hashes; PyTorch apart, see the head that is put before them. What need not change keeps its
# version; `make lock UPGRADE=--upgrade` takes the newest of all.
lock: .venv/tools
	@.venv/tools-env/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "make lock: the lock is of Python 3.11, this is %d.%d; set PYTHON=python3.11" % sys.version_info[:2])'
	grep '^#' requirements.lock > .venv/lock.head
	cp requirements.lock .venv/lock.body
	.venv/tools-env/bin/pip-compile --quiet --generate-hashes --strip-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --unsafe-package torch --output-file .venv/lock.body $(UPGRADE) requirements.txt
	sed -e '/^# WARNING/,$$d' -e '/^$$/d' .venv/lock.body | cat .venv/lock.head - > requirements.lock

# Known vulnerabilities of what is locked, and of PyTorch.
audit: .venv/tools
	.ci/audit .venv/tools-env/bin/pip-audit

.venv/tools: Makefile
	test -x .venv/tools-env/bin/python || $(PYTHON) -m venv .venv/tools-env
	.venv/tools-env/bin/python -m pip install --quiet pip-tools==7.6.2 pip-audit==2.10.1
	touch $@

# The stamps are newer than the requirements that they were installed from.
.venv/%: %.txt requirements.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r $<
	touch $@
